"""Per-layer and scanned layout: a tree transform between `layers_0, layers_1, ...` and `layers_*`.

Per-layer paths are the language of patterns, files and papers, and the default. The scanned layout
stacks the layers' leaves along a new first axis under one key, `layers_*`, and the model then runs
`lax.scan` over it: one block is compiled instead of many.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from .tree import Tree, flatten

_LAYER = re.compile(r"(.+_)(\d+)")
STACKED = "*"


def stack_layers(params: Tree) -> Tree:
    """Stacks every complete run of siblings `<name>_0 ... <name>_{n-1}` into `<name>_*`.

    Array leaves gain a first axis of n; masks (Python booleans) must agree in all layers and stay booleans.

    Raises:
      ValueError: the layers differ in structure or shape (LoRA in some layers only, ranks that differ);
        the message names layer and path.

    >>> stack_layers({"h_0": {"w": jnp.zeros(3)}, "h_1": {"w": jnp.ones(3)}})["h_*"]["w"].shape
    (2, 3)
    """
    if not isinstance(params, Mapping):
        return params
    names = {m[1]: 0 for k in params if (m := _LAYER.fullmatch(k)) and isinstance(params[k], Mapping)}
    out = {}
    for name in names:
        n = sum(f"{name}{i}" in params for i in range(len(params)))
        layers = [stack_layers(params[f"{name}{i}"]) for i in range(n) if f"{name}{i}" in params]
        if len(layers) == n:
            names[name] = n
            out[name + STACKED] = _stack(name, layers)
    stacked = {f"{name}{i}" for name, n in names.items() for i in range(n)}
    return {k: stack_layers(v) for k, v in params.items() if k not in stacked} | out


def _stack(name, layers):
    first, structure = flatten(layers[0]), jax.tree.structure(layers[0])
    for i, layer in enumerate(layers):
        here = flatten(layer)
        if jax.tree.structure(layer) != structure:
            where = sorted(set(here) ^ set(first))[:3] or "the settings of a node"
            raise ValueError(f"cannot stack layers: {name}{i} differs from {name}0 in {where}; use the per-layer layout")
        for path, x in here.items():
            if np.shape(x) != np.shape(first[path]) or (isinstance(x, bool) and x != first[path]):
                raise ValueError(
                    f"cannot stack layers: {name}{i}/{path} is {_say(x)} and {name}0/{path} is "
                    f"{_say(first[path])}; use the per-layer layout"
                )
    return jax.tree.map(lambda *xs: xs[0] if isinstance(xs[0], bool) else jnp.stack(xs), *layers)


def _say(x):
    return x if isinstance(x, bool) else f"of shape {np.shape(x)}"


def unstack_layers(params: Tree) -> Tree:
    """The inverse of `stack_layers`; a tree that is not stacked comes back unchanged.

    >>> sorted(unstack_layers({"h_*": {"w": jnp.ones((2, 3))}}))
    ['h_0', 'h_1']
    """
    if not isinstance(params, Mapping):
        return params
    out = {}
    for key, value in params.items():
        if key.endswith("_" + STACKED):
            n = layer_count(value)
            for i in range(n):
                layer = jax.tree.map(lambda x, i=i: x if isinstance(x, bool) else x[i], value)
                out[f"{key[:-1]}{i}"] = unstack_layers(layer)
        else:
            out[key] = unstack_layers(value)
    return out


def layer_count(stacked: Tree) -> int:
    """Number of layers in the subtree under a `<name>_*` key."""
    sizes = {np.shape(x)[0] for x in jax.tree.leaves(stacked) if not isinstance(x, bool)}
    if len(sizes) != 1:
        raise ValueError(f"a stacked subtree must have one first axis for all leaves; found sizes {sorted(sizes)}")
    return sizes.pop()


def layer_paths(path: str, n: int) -> list[str]:
    """The per-layer paths that a stacked path stands for: `'h_*/w'`, 2 -> `['h_0/w', 'h_1/w']`."""
    return [path.replace("_" + STACKED, f"_{i}", 1) for i in range(n)]


def is_stacked(path: str) -> bool:
    """True for a path below a `<name>_*` key."""
    return f"_{STACKED}/" in path
