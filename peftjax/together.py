"""Several runs in one program: their states along a first axis, and once what they share.

The runs differ in seed, order of the data, learning rate or LoRA's rank; a program that trains one is mapped over them
(`jax.vmap`, `jax.lax.map`), with the frozen arrays that are the same for all, the base's, held once. Each run has its
own key, so that it draws what it would draw alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .layout import align, trim
from .methods.ranked import one_rank, own_rank
from .tree import Tree, flatten


def alike(trees: Sequence[Tree]) -> Sequence[Tree]:
    """Adapted parameters, per-layer, in one structure and of equal shapes.

    LoRAs of several ranks are padded to the largest (`peftjax.methods.ranked`); nodes whose arrays vary in length are
    padded by their class, as for the scanned layout. `alone` undoes it. Trees that are alike come back as they are.

    Raises:
      ValueError: the runs differ in more.
    """
    if all(_form(t) == _form(trees[0]) for t in trees):
        return trees
    first, *others = (flatten(t) for t in trees)
    try:
        trees = align(one_rank(trees))
    except (ValueError, TypeError):
        different = sorted(set(first) ^ set().union(*others))[:3]
        raise ValueError(
            f"runs that differ in structure cannot train in one program: {different or 'a node'}"
        ) from None
    first, *others = (flatten(t) for t in trees)
    for i, other in enumerate(others, 1):
        for path in {**first, **other}:
            a, b = (np.shape(t[path]) if path in t else "missing" for t in (first, other))
            if a != b:
                raise ValueError(f"runs cannot train in one program: {path} is {a} in run 0 and {b} in run {i}")
        if jax.tree.structure(trees[i]) != jax.tree.structure(trees[0]):
            raise ValueError(f"runs 0 and {i} cannot train in one program: their nodes differ in static fields")
    return trees


def _form(tree: Tree) -> tuple:
    return jax.tree.structure(tree), [np.shape(x) for x in jax.tree.leaves(tree)]


def alone(tree: Tree, padded: Tree, first: Tree) -> Tree:
    """One of the `alike` trees without its padding; `padded` and `first`: the tree as it was after and before."""
    return own_rank(trim(tree, padded), first)


def stack(trees: Sequence[Tree]) -> Tree:
    """Each leaf along a new first axis; a single tree stays as it is.

    >>> stack([{"w": jnp.zeros(2)}, {"w": jnp.ones(2)}])["w"].shape
    (2, 2)
    """
    return trees[0] if len(trees) == 1 else jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def once(f: Callable[[Sequence], Any]) -> Callable[[Sequence], Any]:
    """The function of several arrays, giving one object for the same arrays: what runs share they share stacked, too.

    >>> x, join = jnp.ones(2), once(jnp.stack)
    >>> join([x, x]) is join([x, x])
    True
    """
    found: dict[tuple[int, ...], tuple] = {}

    def same(xs: Sequence) -> Any:
        key = tuple(map(id, xs))
        if key not in found:
            found[key] = f(xs), xs  # the arrays live as long as their ids are kept
        return found[key][0]

    return same


def member(tree: Tree, i: int, n: int) -> Tree:
    """Tree number i of the n that were stacked."""
    return tree if n == 1 else jax.tree.map(lambda x: x[i], tree)


def share(trees: Sequence[Tree]) -> tuple[list, list[int | None], Callable[[Sequence], Tree]]:
    """The arrays of the trees, their axes, and the function that makes one run's tree of its arrays.

    An array that is the same object in all trees is held once, however many leaves it is, and its axis is None; where
    the trees have different ones, these are stacked, and the axis is 0.

    >>> base = jnp.ones(2)
    >>> arrays, axes, whole = share([{"w": base, "a": jnp.zeros(3)}, {"w": base, "a": jnp.ones(3)}])
    >>> [x.shape for x in arrays], axes
    ([(2, 3), (2,)], [0, None])
    """
    structure = jax.tree.structure(trees[0])
    columns = list(zip(*(jax.tree.leaves(t) for t in trees), strict=True))
    keys = [tuple(map(id, column)) for column in columns]
    found = dict(zip(keys, columns, strict=True))
    same = {key: len(set(key)) == 1 for key in found}
    arrays = [column[0] if same[key] else jnp.stack(column) for key, column in found.items()]
    numbers = {key: i for i, key in enumerate(found)}

    def whole(arrays: Sequence) -> Tree:
        return structure.unflatten([arrays[numbers[key]] for key in keys])

    return arrays, [None if same[key] else 0 for key in found], whole


def own(arrays: Sequence, axes: Sequence[int | None], i: int) -> list:
    """The arrays of run i."""
    return [x if axis is None else x[i] for x, axis in zip(arrays, axes, strict=True)]


def side_by_side(step: Callable, n: int, lanes: int, axes: Sequence[int | None], one_batch: bool) -> Callable:
    """The step `(state, frozen arrays, batch, key) -> (state, metrics)` of one run as that of n runs.

    Args:
      lanes: how many are computed at once; the others follow, in the same program.
      axes: of the frozen arrays.
      one_batch: the runs share the batch; otherwise it has a first axis too.
    """
    if n == 1:
        return step
    at_once = jax.vmap(step, in_axes=(0, list(axes), None if one_batch else 0, 0))
    if lanes >= n:
        return at_once

    def in_turn(state: Any, frozen: Sequence, batch: dict, key: jax.Array):
        stacked = [x for x, axis in zip(frozen, axes, strict=True) if axis == 0]

        def one(xs):
            state, mine, batch_, key = xs
            rest = iter(mine)
            arrays = [x if axis is None else next(rest) for x, axis in zip(frozen, axes, strict=True)]
            return step(state, arrays, batch if one_batch else batch_, key)

        xs = (state, stacked, None if one_batch else batch, key)
        return jax.lax.map(one, xs, batch_size=lanes if lanes > 1 else None)

    return in_turn


def side_batches(batches: Sequence[dict]) -> dict:
    """One batch of each run, along a first axis.

    Raises:
      ValueError: they differ in shape.
    """
    if len(batches) == 1:
        return batches[0]
    shapes = [{k: np.shape(v) for k, v in b.items()} for b in batches]
    if other := next((s for s in shapes if s != shapes[0]), None):
        raise ValueError(
            f"runs in one program need batches of one shape at each step; got {shapes[0]} and {other}; give them one "
            "order of the data (data_seed), or draw the examples of a length and not the order of lengths"
        )
    return {k: np.stack([b[k] for b in batches]) for k in batches[0]}
