"""Per-layer and scanned layout: a tree transform between `layers_0, layers_1, ...` and `layers_*`.

Per-layer paths are the language of patterns, files and papers, and the default. The scanned layout
stacks the layers' leaves along a new first axis under one key, `layers_*`, and the model then runs
`lax.scan` over it: one block is compiled instead of many.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .tree import Tree, flatten
from .weights import data_fields, is_node

_LAYER = re.compile(r"(.+_)(0|[1-9]\d*)")
STACKED = "*"


def stack_layers(params: Tree, join: Callable[[Sequence], Any] = jnp.stack) -> Tree:
    """Stacks every complete run of siblings `<name>_0 ... <name>_{n-1}` into `<name>_*`.

    Array leaves gain a first axis of n; masks (Python booleans) must agree in all layers and stay booleans.
    A class of nodes whose arrays vary in length between layers defines `align(nodes) -> nodes`, a function of what
    the layers hold at one place (its nodes, plain leaves, holes), which makes them alike; and `trim(self, like)`,
    which undoes it in `unstack_layers`, where `like` is the layer's whole node. They must do for halves of a
    partition and for masks too.

    Args:
      join: makes one array of the layers' arrays.

    Raises:
      ValueError: the layers differ in structure or shape (LoRA in some layers only, ranks that differ);
        the message names layer and path.

    >>> stack_layers({"h_0": {"w": jnp.zeros(3)}, "h_1": {"w": jnp.ones(3)}})["h_*"]["w"].shape
    (2, 3)
    """
    if not isinstance(params, Mapping):
        return params
    runs: dict[str, set[int]] = {}
    for k, v in params.items():
        if (m := _LAYER.fullmatch(k)) and isinstance(v, Mapping):
            runs.setdefault(m[1], set()).add(int(m[2]))
    out = {k: stack_layers(v, join) for k, v in params.items()}
    for name, indices in runs.items():
        if indices == set(range(len(indices))):
            out[name + STACKED] = _stack(name, [out.pop(f"{name}{i}") for i in sorted(indices)], join)
    return out


def align(layers: Sequence[Tree]) -> Sequence[Tree]:
    """Layers, or whole trees, whose nodes are alike: by `align` of their classes, as `stack_layers` says."""
    if all(isinstance(x, Mapping) and x.keys() == layers[0].keys() for x in layers):
        columns = {k: align([x[k] for x in layers]) for k in layers[0]}
        return [{k: column[i] for k, column in columns.items()} for i in range(len(layers))]
    cls = next((type(x) for x in layers if is_node(x)), None)
    if cls is None or any(type(x) is not cls and (is_node(x) or isinstance(x, Mapping)) for x in layers):
        return layers
    by_class = getattr(cls, "align", None)
    layers = layers if by_class is None else by_class(layers)
    if any(type(x) is not cls for x in layers):
        return layers
    columns = {f: align([getattr(x, f) for x in layers]) for f in data_fields(cls)}
    return [dataclasses.replace(x, **{f: c[i] for f, c in columns.items()}) for i, x in enumerate(layers)]


def trim(tree: Tree, like: Tree) -> Tree:
    """Undoes `align`: a tree by `trim` of its nodes' classes, `like` being the whole of which it may be a half."""
    if isinstance(tree, Mapping):
        return {k: trim(x, like[k]) for k, x in tree.items()}
    if not is_node(tree) or type(tree) is not type(like):
        return tree
    inner = {f: trim(getattr(tree, f), getattr(like, f)) for f in data_fields(tree)}
    by_class = getattr(type(tree), "trim", None)
    tree = dataclasses.replace(tree, **inner)
    return tree if by_class is None else by_class(tree, like)


def _stack(name, layers, join):
    layers = align(layers)
    first, structure = flatten(layers[0]), jax.tree.structure(layers[0])
    for i, layer in enumerate(layers):
        here = flatten(layer)
        if jax.tree.structure(layer) != structure:
            where = sorted(set(here) ^ set(first))[:3] or _differing_nodes(layers[0], layer)
            raise ValueError(
                f"cannot stack layers: {name}{i} differs from {name}0 in {where}; use the per-layer layout"
            )
        for path, x in here.items():
            if np.shape(x) != np.shape(first[path]) or (_is_bool(x) and x != first[path]):
                raise ValueError(
                    f"cannot stack layers: {name}{i}/{path} is {_say(x)} and {name}0/{path} is "
                    f"{_say(first[path])}; use the per-layer layout"
                )
    return jax.tree.map(lambda *xs: xs[0] if _is_bool(xs[0]) else join(xs), *layers)


def _differing_nodes(first, second):
    pairs = zip(flatten(first, is_leaf=is_node).items(), flatten(second, is_leaf=is_node).values(), strict=True)
    return [p for (p, x), y in pairs if jax.tree.structure(x) != jax.tree.structure(y)][:3]


def _is_bool(x):
    return isinstance(x, bool | np.bool_)


def _say(x):
    return x if _is_bool(x) else f"of shape {np.shape(x)}"


def unstack_layers(params: Tree, like: Tree | None = None) -> Tree:
    """The inverse of `stack_layers`; a tree that is not stacked comes back unchanged.

    Args:
      like: stacked parameters that tell how many layers there are; for a mask, or for a half of a partition,
        which may hold no array to tell it.

    >>> sorted(unstack_layers({"h_*": {"w": jnp.ones((2, 3))}}))
    ['h_0', 'h_1']
    """
    return _unstack(params, params if like is None else like)


def _unstack(params, like):
    if not isinstance(params, Mapping):
        return params
    out = {}
    for key, value in params.items():
        if key.endswith("_" + STACKED):
            for i in range(layer_count(like[key])):
                one = _slice(like[key], i)
                out[f"{key[:-1]}{i}"] = _unstack(trim(_slice(value, i), one), one)
        else:
            out[key] = _unstack(value, like[key])
    return out


def _slice(tree, i):
    return jax.tree.map(lambda x: x if _is_bool(x) else x[i], tree)


def layer_count(stacked: Tree) -> int:
    """Number of layers in the subtree under a `<name>_*` key."""
    sizes = {np.shape(x)[:1] for x in jax.tree.leaves(stacked) if not _is_bool(x)}
    if not sizes:
        raise ValueError("a stacked subtree without arrays does not say how many layers it has; give `like`")
    if len(sizes) > 1 or sizes == {()}:
        raise ValueError(f"a stacked subtree must have one first axis for all leaves; found sizes {sorted(sizes)}")
    return sizes.pop()[0]


def layer_paths(path: str, n: int) -> list[str]:
    """The per-layer paths that a stacked path stands for: `'h_*/w'`, 2 -> `['h_0/w', 'h_1/w']`."""
    return [path.replace("_" + STACKED, f"_{i}", 1) for i in range(n)]


def is_stacked(path: str) -> bool:
    """True for a path below a `<name>_*` key."""
    return f"_{STACKED}/" in path
