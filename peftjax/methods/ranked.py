"""LoRAs of several ranks in one program: all padded to the largest, each masked to its own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from ..tree import Tree
from ..weights import data_fields, is_node, node
from .lora import LoRA


@node
class Ranked(LoRA):
    """`W + A diag(scale) B`: a LoRA whose `scale`, (r,) in float32, is 0 beyond its own rank.

    Hu et al. 2022 (arXiv:2106.09685), equation 3, with A of (inputs, r) and B of (r, outputs) padded by zeros. Those
    columns and rows have no gradient and stay 0, so that the rest trains as the LoRA of the smaller rank does; only the
    random rounding of trainables in bfloat16 draws other numbers for a padded array.
    """

    scale: Any = None

    def whole(self) -> LoRA:
        """The LoRA with the scale in A."""
        return LoRA(
            self.base, self.a * self.scale[..., None, :], self.b, self.key, 1.0, self.dropout, self.only, self.ratio
        )

    def factors(self):
        return self.whole().factors()

    def materialize(self):
        return self.whole().materialize()

    def dot(self, x):
        return self.whole().dot(x)

    def take(self, ids):
        return self.whole().take(ids)

    def attend(self, x):
        return self.whole().attend(x)


def one_rank(trees: Sequence[Tree]) -> list[Tree]:
    """Parameters that may differ in the ranks and scales of their LoRAs, in one structure and of equal shapes.

    Where the LoRAs at a place differ, they become `Ranked`; all else stays.

    Raises:
      ValueError: the trees differ in structure elsewhere.

    >>> from peftjax.methods import lora
    >>> params = {"q": {"kernel": jnp.ones((6, 4))}}
    >>> two = [lora(r, targets=["q/kernel"]).init(jax.random.key(0), params, ()) for r in (1, 3)]
    >>> one, three = one_rank(two)
    >>> one["q"]["kernel"].a.shape, one["q"]["kernel"].scale.tolist(), three["q"]["kernel"].scale.tolist()
    ((6, 3), [1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    """

    if not jax.tree.leaves(trees[0], is_leaf=is_node):
        return [*trees]

    def one(*xs):
        if not is_node(xs[0]) or len({type(x) for x in xs}) > 1:
            return xs
        columns = {f: one_rank([getattr(x, f) for x in xs]) for f in data_fields(xs[0])}
        xs = [replace(x, **{f: column[i] for f, column in columns.items()}) for i, x in enumerate(xs)]
        if type(xs[0]) is not LoRA or len({(x.a.shape[-1], x.scale) for x in xs}) == 1:
            return xs
        return [_padded(x, max(x.a.shape[-1] for x in xs)) for x in xs]

    columns = jax.tree.map(one, *trees, is_leaf=is_node)
    structure = jax.tree.structure(trees[0], is_leaf=is_node)
    return [structure.unflatten(own) for own in zip(*structure.flatten_up_to(columns), strict=True)]


def own_rank(tree: Tree, like: Tree) -> Tree:
    """Parameters with every `Ranked` as the LoRA of its rank and scale, which `like`, of before `one_rank`, tells.

    >>> from peftjax.methods import lora
    >>> params = {"q": {"kernel": jnp.ones((6, 4))}}
    >>> two = [lora(r, targets=["q/kernel"]).init(jax.random.key(0), params, ()) for r in (1, 3)]
    >>> own_rank(one_rank(two)[0], two[0])["q"]["kernel"].a.shape
    (6, 1)
    """

    def one(n, own):
        if not is_node(n) or type(own) not in (type(n), LoRA):
            return n
        n = replace(n, **{f: own_rank(getattr(n, f), getattr(own, f)) for f in data_fields(own)})
        if type(n) is not Ranked:
            return n
        r = own.a.shape[-1]
        return LoRA(n.base, n.a[:, :r], n.b[:r], scale=own.scale, **_rest(n))

    return jax.tree.map(one, tree, like, is_leaf=is_node)


def _padded(n: LoRA, r: int) -> Ranked:
    more = r - n.a.shape[-1]
    scale = jnp.where(jnp.arange(r) < n.a.shape[-1], jnp.float32(n.scale), 0)
    a, b = jnp.pad(n.a, ((0, 0), (0, more))), jnp.pad(n.b, ((0, more), (0, 0)))
    return Ranked(n.base, a, b, scale=scale, **_rest(n))


def _rest(n: LoRA) -> dict[str, Any]:
    return {name: getattr(n, name) for name in ("key", "dropout", "only", "ratio", "trains")}
