"""Mask functions `params -> mask`: which leaves of a tree are meant.

A mask is a tree of booleans in the structure of the parameters. Patterns match the *whole* path.
A mask function that selects nothing raises: a silent empty selection trains the wrong thing.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .tree import Tree, flatten, map_with_path, matches, nearest
from .weights import Blocks, Trained, data_fields, is_node, is_quantized

Mask = Callable[[Tree], Tree]


def by_path(*patterns: str) -> Mask:
    """Leaves whose whole path matches one of the regular expressions.

    >>> by_path(".*/bias")({"a": {"kernel": 1, "bias": 2}})
    {'a': {'bias': True, 'kernel': False}}

    Raises:
      ValueError: there is no pattern, or one matches no path; the message gives the nearest paths.
    """
    if not patterns:
        raise ValueError("by_path needs at least one pattern, such as '.*/bias'")

    def mask(params):
        paths = flatten(params)
        for p in patterns:
            if not any(matches(p, path) for path in paths):
                raise ValueError(
                    f"the pattern {p!r} matches no whole path of the parameters; the nearest are {nearest(p, paths)}"
                )
        return map_with_path(lambda path, _: any(matches(p, path) for p in patterns), params)

    return mask


def by_node(cls: type, *fields: str) -> Mask:
    """Leaves inside the given fields of nodes of a class; without fields, those that the node says train.

    Nested nodes are searched too: with LoRA over another node, both are found.

    Raises:
      ValueError: there is no such node, or a field that the class does not have.
    """
    known = data_fields(cls)
    if unknown := set(fields) - set(known):
        raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}; its fields are {known}")

    def mask(params):
        out = _walk(params, cls, fields)
        if not any(jax.tree.leaves(out)):
            raise ValueError(f"the parameters hold no {cls.__name__} with a field that trains")
        return out

    return mask


def _walk(tree, cls, fields):
    def visit(x):
        if not is_node(x):
            return False
        chosen = (fields or x.trains) if isinstance(x, cls) else ()
        mark = {f: _fill(getattr(x, f), True) for f in data_fields(x) if f in chosen}
        rest = {f: _walk(getattr(x, f), cls, fields) for f in data_fields(x) if f not in chosen}
        return dataclasses.replace(x, **mark, **rest)

    return jax.tree.map(visit, tree, is_leaf=is_node)


def _fill(tree, value):
    return jax.tree.map(lambda _: value, tree)


def everything(params: Tree) -> Tree:
    """Every floating leaf but those of quantised weights, which only scale codes."""

    def visit(x):
        return _fill(x, False) if is_quantized(x) else bool(jnp.issubdtype(x.dtype, jnp.floating))

    return jax.tree.map(visit, params, is_leaf=is_quantized)


def base(params: Tree) -> Tree:
    """Every floating leaf of the base, also below nodes, but for quantised weights; nothing of what methods added."""

    def visit(x):
        if not is_node(x):
            return bool(jnp.issubdtype(x.dtype, jnp.floating))
        own = {Trained: "value", Blocks: "blocks"}.get(type(x), "base") if not is_quantized(x) else None
        fields = {f: getattr(x, f) for f in data_fields(x)}
        return dataclasses.replace(x, **{f: base(y) if f == own else _fill(y, False) for f, y in fields.items()})

    return jax.tree.map(visit, params, is_leaf=is_node)


def any_of(*masks: Mask) -> Mask:
    """Leaves that at least one of the masks selects."""
    if not masks:
        raise ValueError("any_of needs at least one mask")
    return lambda params: jax.tree.map(lambda *m: any(m), *(f(params) for f in masks))


def all_of(*masks: Mask) -> Mask:
    """Leaves that all of the masks select; raises if that is none.

    >>> all_of(by_path(".*/bias"), by_path("a/.*"))({"a": {"bias": 1}, "b": {"bias": 2}})
    {'a': {'bias': True}, 'b': {'bias': False}}
    """
    if not masks:
        raise ValueError("all_of needs at least one mask")
    return _non_empty("all_of", lambda params: jax.tree.map(lambda *m: all(m), *(f(params) for f in masks)))


def invert(mask: Mask) -> Mask:
    """Leaves that the mask does not select; raises if that is none."""
    return _non_empty("invert", lambda params: jax.tree.map(lambda m: not m, mask(params)))


def _non_empty(name, f):
    def mask(params):
        out = f(params)
        if not np.any(jax.tree.leaves(out)):
            raise ValueError(f"{name} selects none of the {len(jax.tree.leaves(out))} leaves")
        return out

    return mask
