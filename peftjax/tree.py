"""Paths, counting, and the split of parameters into trainable and frozen.

Parameters are nested dicts. A leaf has one name, its path: `'model/layers_0/self_attn/q_proj/kernel'`.
A node (see `peftjax.weights`) may stand where an array was; its fields continue the path: `.../kernel/a`.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tree = Any
HOLE = None  # what `partition` leaves where the other half has the leaf; an empty subtree to JAX


def path_str(key_path: tuple) -> str:
    """The '/'-joined string of a JAX key path."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: Tree, is_leaf: Callable | None = None) -> dict[str, Any]:
    """Maps each path to its leaf, in tree order.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {path_str(path): leaf for path, leaf in leaves}


def map_with_path(f: Callable, tree: Tree, *rest: Tree, is_leaf: Callable | None = None) -> Tree:
    """Like `jax.tree.map`, but `f` also receives the path: `f(path, leaf, *rest_leaves)`."""
    return jax.tree_util.tree_map_with_path(lambda p, *xs: f(path_str(p), *xs), tree, *rest, is_leaf=is_leaf)


def count(tree: Tree) -> int:
    """Number of scalars in all array leaves (concrete or abstract)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes of all array leaves (concrete or abstract)."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def nearest(name: str, names, n: int = 5) -> list[str]:
    """The `n` names most like `name`, for error messages."""
    names = list(names)
    return difflib.get_close_matches(name, names, n=n, cutoff=0.0) if names else []


def matches(pattern: str, path: str) -> bool:
    """Whether the regular expression matches the whole path.

    Raises:
      ValueError: it is no valid regular expression.
    """
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as e:
        raise ValueError(f"the pattern {pattern!r} is no valid regular expression: {e}") from e


def patterns(paths: Iterable[str], of: Iterable[str]) -> list[str]:
    """Patterns that match these paths and no others `of` all: the layers of one place share one.

    >>> there = ["h_0/q", "h_1/q", "h_0/v", "h_1/v", "h_2/v", "head"]
    >>> patterns(["h_0/q", "h_1/q", "h_0/v", "h_2/v", "head"], there)
    ['h_\\\\d+/q', 'h_(0|2)/v', 'head']
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for path in of:
        place, number = _place(path)
        layers.setdefault(place, []).append(number)
    chosen: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        place, number = _place(path)
        chosen.setdefault(place, []).append(number)

    def pattern(place, numbers):
        every = len(numbers) == len(layers[place]) > 1
        middle = r"\d+" if every else numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        return re.escape(place[0]) + middle + re.escape(place[1])

    return [pattern(place, numbers) for place, numbers in chosen.items()]


def _place(path: str) -> tuple[tuple[str, str], str]:
    """A path without the number of its layer, and that number, '' if there is none."""
    m = re.fullmatch(r"(.*?_)(0|[1-9]\d*)(/.*)", path)
    return ((path, ""), "") if m is None else ((m[1], m[3]), m[2])


def get(tree: Tree, path: str) -> Any:
    """What stands at a path of nested dicts; a missing path raises with the nearest ones.

    >>> get({"a": {"b": 1}}, "a/b")
    1
    """
    here = tree
    for part in path.split("/"):
        if not isinstance(here, Mapping) or part not in here:
            raise ValueError(f"no parameter at {path!r}; the nearest paths are {nearest(path, flatten(tree))}")
        here = here[part]
    return here


def update(tree: Tree, new: Mapping[str, Any]) -> Tree:
    """A copy of the nested dict with the given paths set; missing dicts on the way are created.

    >>> update({"a": {"b": 1}}, {"a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    copy = _copy_dicts(tree)
    for path, value in new.items():
        *parents, last = path.split("/")
        here = copy
        for part in parents:
            here = here.setdefault(part, {})
            if not isinstance(here, dict):
                raise ValueError(f"cannot put {path!r} into the tree: {part!r} on its way is a leaf")
        here[last] = value
    return copy


def _copy_dicts(tree: Tree) -> Tree:
    return {k: _copy_dicts(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def cast(tree: Tree, dtype) -> Tree:
    """Casts the floating leaves; integers, booleans and PRNG keys stay."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def partition(params: Tree, mask: Tree) -> tuple[Tree, Tree]:
    """Splits params into `(trainable, frozen)`, each with holes where the other has the leaf.

    Differentiate and optimise the first only; `combine` puts the two together.

    Args:
      params: nested dict of arrays and nodes.
      mask: booleans in the same structure, made by a mask function (`peftjax.masks`).

    Raises:
      ValueError: the structures differ, a mask leaf is no boolean, nothing is selected, or a
        selected leaf is not floating (only floating arrays have gradients).

    >>> t, f = partition({"w": jnp.ones(2), "b": jnp.zeros(2)}, {"w": False, "b": True})
    >>> t["w"] is None, f["b"] is None, sorted(combine(t, f))
    (True, True, ['b', 'w'])
    """
    if jax.tree.structure(params) != jax.tree.structure(mask):
        different = set(flatten(params)) ^ set(flatten(mask))
        raise ValueError(
            f"the mask and the parameters differ in structure at {sorted(different)[:5] or 'a node'}; "
            "make the mask with a mask function on these very parameters"
        )
    flat = flatten(mask)
    for path, selected in flat.items():
        if not isinstance(selected, bool | np.bool_):
            raise ValueError(f"the mask at {path!r} is {selected!r}; expected True or False")
    if not any(flat.values()):
        raise ValueError(f"the mask selects none of the {len(flat)} leaves; nothing would be trained")
    for path, leaf in flatten(params).items():
        if flat[path] and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"the mask selects {path!r} of dtype {leaf.dtype}; only floating arrays can train")
    trainable = jax.tree.map(lambda x, m: x if m else HOLE, params, mask)
    frozen = jax.tree.map(lambda x, m: HOLE if m else x, params, mask)
    return trainable, frozen


def combine(trainable: Tree, frozen: Tree) -> Tree:
    """Puts the halves of `partition` together again.

    Raises:
      ValueError: both halves have a leaf at the same path, or the structures differ.
    """

    def hole(x):
        return x is HOLE

    if jax.tree.structure(trainable, is_leaf=hole) != jax.tree.structure(frozen, is_leaf=hole):
        different = set(flatten(trainable, is_leaf=hole)) ^ set(flatten(frozen, is_leaf=hole))
        raise ValueError(
            f"the two halves differ in structure at {sorted(different)[:5] or 'a node'}; "
            "combine the halves of one partition"
        )

    def pick(path, a, b):
        if a is not HOLE and b is not HOLE:
            raise ValueError(f"both halves have a leaf at {path!r}; one of them must be a hole")
        return b if a is HOLE else a

    return map_with_path(pick, trainable, frozen, is_leaf=hole)
