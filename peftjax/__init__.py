"""Parameter-efficient fine-tuning in JAX: every method is a tree transform plus a mask."""

from . import hub as hub
from . import masks as masks
from . import quantize as quantize
from . import train as train
from .layout import stack_layers as stack_layers
from .layout import unstack_layers as unstack_layers
from .methods import METHODS as METHODS
from .methods import Method as Method
from .methods import Site as Site
from .methods import chain as chain
from .methods import method as method
from .methods import weight_method as weight_method
from .tree import combine as combine
from .tree import count as count
from .tree import nbytes as nbytes
from .tree import partition as partition
from .weights import Trained as Trained
from .weights import Weight as Weight
from .weights import attend as attend
from .weights import dot as dot
from .weights import materialize as materialize
from .weights import merge as merge
from .weights import node as node
from .weights import static as static
from .weights import take as take
