"""Nodes: structured values that stand where the parameter tree had an array, or beside it.

A *weight* node replaces one array and answers the products that a layer asks for. A *hook* node is an
extra entry of a module's dict; a layer that finds it calls it. Both are frozen dataclasses registered
as pytrees, so `jax.grad`, `jax.jit`, partitioning and saving see through them.

To write a new weight method, write a dataclass with its fields, say which fields train, and write
`materialize`. If you also write `dot`, it is fast.

>>> @node
... class Scaled(Weight):
...     base: Any
...     s: Any
...     trains = ("s",)
...     def materialize(self):
...         return materialize(self.base) * self.s
>>> w = Scaled(jnp.ones((2, 3)), jnp.array([1.0, 2.0, 3.0]))
>>> dot(w, jnp.ones((1, 2))).tolist()
[[2.0, 4.0, 6.0]]
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .tree import flatten, map_with_path

DOT = "x @ W"  # the name, for policies of `jax.checkpoint`, of what a weight gives; low-rank parts have none
NODES: dict[str, type] = {}  # class name -> class; adapter files name nodes by it

Cls = TypeVar("Cls", bound=type)


def static(default: Any = dataclasses.MISSING) -> Any:
    """A node's field that belongs to the structure and not to the data.

    Write `static(default=...)`: type checkers see only the keyword.
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static))
def node(cls: Cls) -> Cls:
    """Makes a class a frozen dataclass, a JAX pytree, and known to adapter files by its name.

    Fields made with `static` are part of the structure (hashable, not traced); all others are children.
    There must be no validation in `__post_init__`: JAX rebuilds nodes from tracers and None.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    jax.tree_util.register_dataclass(cls)
    NODES[cls.__name__] = cls
    return cls


def is_node(x: Any) -> bool:
    """True for an instance of a class made by `node`."""
    return type(x) is NODES.get(type(x).__name__)


def data_fields(n: Any) -> list[str]:
    """Names of the fields of a node, or of a class of nodes, that hold children."""
    return [f.name for f in dataclasses.fields(n) if not f.metadata.get("static")]


def static_fields(n: Any) -> dict[str, Any]:
    """The static fields of a node and their values."""
    return {f.name: getattr(n, f.name) for f in dataclasses.fields(n) if f.metadata.get("static")}


def is_quantized(x: Any) -> bool:
    """True for a weight that holds its array as codes (`peftjax.quantize`)."""
    return isinstance(x, Weight) and x.quantized


def quantized_paths(tree: Any) -> list[str]:
    """The paths of quantised weights, those inside other nodes too."""
    return [p for p, x in flatten(tree, is_leaf=is_quantized).items() if is_quantized(x)]


def map_nodes(f: Callable, tree: Any) -> Any:
    """Rewrites every node to `f(path, node)`, those inside other nodes first; all else stays."""

    def visit(path, x):
        if not is_node(x):
            return x
        inner = {
            field: map_with_path(
                lambda p, y, at=f"{path}/{field}": visit(f"{at}/{p}" if p else at, y), value, is_leaf=is_node
            )
            for field in data_fields(x)
            if (value := getattr(x, field)) is not None
        }
        return f(path, dataclasses.replace(x, **inner))

    return map_with_path(visit, tree, is_leaf=is_node)


class Weight:
    """Stands for one array of shape `(..., inputs, outputs)`, or `(..., rows, width)` for an embedding.

    Leading axes, if any, are layers (`peftjax.layout`); the products are only asked of one layer.
    """

    base: Any
    trains: tuple[str, ...] = ()  # names of the fields that train
    repeats: tuple[str, ...] = ()  # names of the fields that stand for entries of the base and add none
    undecayed: tuple[str, ...] = ()  # names of the fields that weight decay spares: at 0 the base would not be itself
    quantized: bool = False  # of a class: its fields are codes for the array's entries, and none of them can train
    regrows: tuple[str, ...] = ()  # names of the fields that `regrow(**static fields)` makes: no file holds them

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self):
        return self.base.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def materialize(self) -> jax.Array:
        """The array that this node stands for."""
        raise TypeError(f"{type(self).__name__} must define materialize")

    def dot(self, x: jax.Array) -> jax.Array:
        """`x @ W`. The checkpoint keeps the dense array out of what the backward pass stores."""
        return jax.checkpoint(lambda w, x: dot(w.materialize(), x))(self, x)

    def take(self, ids: jax.Array) -> jax.Array:
        """`W[ids]`, the rows of an embedding."""
        return jax.checkpoint(lambda w: w.materialize()[ids])(self)

    def attend(self, x: jax.Array) -> jax.Array:
        """`x @ W.T`, the head tied to an embedding."""
        return jax.checkpoint(lambda w, x: _attend(w.materialize(), x))(self, x)

    def factors(self) -> tuple[jax.Array, jax.Array] | None:
        """`a`, (inputs, r), and `b`, (r, outputs), where `W = base + a b`; None where the change is no such product.

        Raises:
          ValueError: no single table stands for this node.
        """
        return None

    def ready(self) -> "Weight":
        """The node with what all its products compute of its own arrays computed once; any number of layers."""
        return self

    def compact(self) -> Any:
        """The node as an adapter file holds it, without what adds nothing; asked of one layer, outside of a trace."""
        return self

    def allocated(self) -> int | None:
        """How much of this array the method chose to train, in its own unit: entries, ranks; asked as `compact` is.

        None where all arrays get the same, so that there was nothing to choose.
        """
        return None


@node
class Trained(Weight):
    """An array of the base that trains as it is: the mark that selective methods leave."""

    value: Any
    trains = ("value",)

    @property
    def shape(self):
        return self.value.shape

    @property
    def dtype(self):
        return self.value.dtype

    def materialize(self):
        return materialize(self.value)

    def dot(self, x):
        return dot(self.value, x)

    def take(self, ids):
        return take(self.value, ids)

    def attend(self, x):
        return attend(self.value, x)


@node
class Blocks(Weight):
    """Column blocks side by side, `W = [W_1 | W_2 | ...]`, so that a method can act on one of them.

    Attributes:
      blocks: name -> array or node.
      columns: (name, first, last + 1) of each block, from left to right, leaving nothing out.

    >>> w = split(jnp.ones((2, 3)), {"query": slice(0, 1), "value": slice(1, 3)})
    >>> w.blocks["value"].shape, dot(w, jnp.ones((1, 2))).tolist()
    ((2, 2), [[2.0, 2.0, 2.0]])
    """

    blocks: dict[str, Any]
    columns: tuple[tuple[str, int, int], ...] = static(default=())
    trains = ()

    @property
    def shape(self):
        first = self.blocks[self.columns[0][0]]
        return (*first.shape[:-1], self.columns[-1][2])

    @property
    def dtype(self):
        return self.blocks[self.columns[0][0]].dtype

    def materialize(self):
        return self.join({name: materialize(w) for name, w in self.blocks.items()})

    def dot(self, x):
        return self.join({name: dot(w, x) for name, w in self.blocks.items()})

    def take(self, ids):
        return self.join({name: take(w, ids) for name, w in self.blocks.items()})

    def join(self, arrays: Mapping[str, jax.Array]) -> jax.Array:
        """Puts one array a block side by side again, in the widest of their dtypes."""
        wide = max((x.dtype for x in arrays.values()), key=lambda dtype: dtype.itemsize)
        return jnp.concatenate([arrays[name].astype(wide) for name, _, _ in self.columns], axis=-1)

    @staticmethod
    def align(nodes: list) -> list:
        """The layers' nodes, or plain arrays, as blocks of the same columns."""
        columns = next(n.columns for n in nodes if isinstance(n, Blocks))
        parts = {name: slice(first, end) for name, first, end in columns}

        def blocks(x):
            if isinstance(x, Blocks):
                return x
            if x is None or isinstance(x, bool):  # a hole of a partition, or an entry of a mask
                return Blocks(dict.fromkeys(parts, x), columns)
            return split(x, parts)

        return [blocks(x) for x in nodes]

    def trim(self, like: "Blocks") -> Any:
        """The plain array again, where no block is a node."""
        if any(is_node(b) for b in self.blocks.values()):
            return self
        first = next(iter(self.blocks.values()))
        return first if first is None or isinstance(first, bool) else self.join(self.blocks)

    def piece(self, whole: Any, name: str) -> Any:
        """The columns of `whole`, an array or blocks of the same columns, that a block stands for."""
        if isinstance(whole, Blocks):
            return whole.blocks[name]
        return next(whole[..., first:end] for n, first, end in self.columns if n == name)


def split(w: Any, parts: Mapping[str, slice]) -> Blocks:
    """An array as `Blocks` of its last axis, by the parts of a fused site.

    Raises:
      ValueError: the parts, from left to right, leave columns out or share some.
    """
    columns = tuple((name, s.start, s.stop) for name, s in parts.items())
    ends = [0, *(end for _, _, end in columns)]
    if [first for _, first, _ in columns] != ends[:-1] or ends[-1] != w.shape[-1]:
        raise ValueError(f"the parts {dict(parts)} do not lay out the {w.shape[-1]} columns from left to right")
    return Blocks({name: w[..., first:end] for name, first, end in columns}, columns)


def materialize(w: Any) -> jax.Array:
    """The array itself, or the array that a node stands for."""
    return w.materialize() if isinstance(w, Weight) else w


def dot(w: Any, x: jax.Array) -> jax.Array:
    """`x @ W` in the dtype of `x`; shapes `(..., inputs)`, `(inputs, outputs)` -> `(..., outputs)`."""
    return w.dot(x) if isinstance(w, Weight) else checkpoint_name(product(x, w.astype(x.dtype)), DOT)


def product(x: jax.Array, w: jax.Array) -> jax.Array:
    """`x @ W` for arrays, with the leading axes of x as one: the gradient by W is then a product over one axis.

    Over two, XLA's CPU compiler makes it without its fast kernels, in up to ten times the seconds.
    """
    rows = math.prod(x.shape[:-1])  # said, as there may be no column to tell: a rank of 0
    return (x.reshape(rows, x.shape[-1]) @ w).reshape(*x.shape[:-1], w.shape[-1])


def take(w: Any, ids: jax.Array) -> jax.Array:
    """`W[ids]`; shapes `(...)`, `(rows, width)` -> `(..., width)`. Ids out of range are clamped."""
    return w.take(ids) if isinstance(w, Weight) else w[ids]


def attend(w: Any, x: jax.Array) -> jax.Array:
    """`x @ W.T`; shapes `(..., width)`, `(rows, width)` -> `(..., rows)`."""
    return w.attend(x) if isinstance(w, Weight) else _attend(w, x)


def _attend(w, x):
    return jnp.einsum("...d,vd->...v", x, w.astype(x.dtype))  # a transpose would copy the table


def compact(params: Any) -> Any:
    """Every weight node as an adapter file holds it: AdaLoRA's without its dead ranks. Per-layer parameters only."""
    return map_nodes(lambda _, n: n.compact() if isinstance(n, Weight) else n, params)


def allocation(params: Any) -> dict[str, tuple[int, int]]:
    """What a method chose to train of each array, and the array's number of entries, by path; per-layer parameters.

    Entries of FISH Mask and of Child-Tuning D, ranks that AdaLoRA left; empty for methods that choose nothing. A part
    of a fused array is at `<path>/blocks/<name>`.
    """
    found = {}

    def note(path, n):
        if isinstance(n, Weight) and (chosen := n.allocated()) is not None:
            found[path] = (chosen, math.prod(n.shape))
        return n

    map_nodes(note, params)
    return found


def merge(params: Any) -> Any:
    """Plain arrays in the original structure: hooks are folded into their siblings, nodes materialised.

    Raises:
      ValueError: a hook cannot be folded (a prefix, say), or a node cannot be written as one array;
        the message names the path.
    """

    def visit(path: str, tree: Mapping) -> dict:
        out = {k: visit(f"{path}{k}/", v) if isinstance(v, Mapping) else v for k, v in tree.items()}
        for name in [k for k, v in out.items() if is_node(v) and not isinstance(v, Weight)]:
            hook = out.pop(name)
            fold = getattr(type(hook), "fold", None)
            if fold is None:
                raise ValueError(
                    f"cannot merge {path}{name}: {type(hook).__name__} computes what no weight of the base "
                    "can hold; keep it as an adapter file"
                )
            out = dict(fold(hook, out))
        return out

    def dense(path, w):
        try:
            return materialize(w)
        except ValueError as e:
            raise ValueError(f"cannot merge {path}: {e}") from e

    return map_with_path(dense, visit("", params), is_leaf=is_node)
