"""Parameter-efficient fine-tuning in JAX: every method is a tree transform plus a mask."""

from . import arithmetic as arithmetic, hub as hub, masks as masks, quantize as quantize, train as train
from .layout import stack_layers as stack_layers, unstack_layers as unstack_layers
from .methods import (
    METHODS as METHODS,
    Method as Method,
    Site as Site,
    chain as chain,
    method as method,
    weight_method as weight_method,
)
from .mixed import Mixed as Mixed, Mixture as Mixture, load_mixed as load_mixed, mix as mix, per_adapter as per_adapter
from .tree import combine as combine, count as count, nbytes as nbytes, partition as partition
from .weights import (
    Trained as Trained,
    Weight as Weight,
    attend as attend,
    compact as compact,
    dot as dot,
    materialize as materialize,
    merge as merge,
    node as node,
    static as static,
    take as take,
)
