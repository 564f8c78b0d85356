"""DyLoRA: low-rank adapters trained for a range of ranks at once; any of the ranks can be taken out afterwards."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..tree import Tree
from ..weights import Weight, map_nodes, node, static
from .base import Method, plain
from .lora import Factors, LoRA, low_rank, low_rank_arguments


@node
class DyLoRA(Weight):
    """`W + (alpha / b) · A[:, :b] B[:b]`: `a` is (inputs, r), `b` (r, outputs), and b is r unless one is drawn.

    Attributes:
      rank: this step's b, drawn by `resolve`; None: r.
      frozen: with a drawn rank, only the b-th column of A and row of B get a gradient.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    rank: jax.Array | None = None
    alpha: float = static(default=1.0)
    frozen: bool = static(default=False)
    dropout: float = static(default=0.0)
    trains: tuple[str, ...] = static(default=("a", "b"))

    def lora(self) -> LoRA:
        """The LoRA of the drawn rank, or of the whole."""
        r = self.a.shape[-1]
        if self.rank is None:
            return LoRA(self.base, self.a * (self.alpha / r), self.b, self.key, dropout=self.dropout)
        rank = self.rank[..., None, None]  # of one layer, or of each of a stack

        def first(x, axis):
            i = jnp.arange(r).reshape((-1, 1) if axis == -2 else (1, -1))
            old = jax.lax.stop_gradient(x) if self.frozen else x
            return jnp.where(i < rank - 1, old, jnp.where(i == rank - 1, x, 0.0))

        a = first(self.a, -1) * (self.alpha / rank)
        return LoRA(self.base, a, first(self.b, -2), self.key, dropout=self.dropout)

    def factors(self):
        return self.lora().factors()

    def materialize(self):
        return self.lora().materialize()

    def dot(self, x):
        return self.lora().dot(x)

    def take(self, ids):
        return self.lora().take(ids)

    def attend(self, x):
        return self.lora().attend(x)


def dylora(
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    min_rank: int = 1,
    distribution: str = "uniform",
    p: float = 0.15,
    frozen: bool = False,
    dropout: float = 0.0,
) -> Method:
    """Trains `h = W x + (alpha / b) B[:, :b] A[:b] x` with a rank b drawn anew each step, one for all matrices.

    Valipour et al. 2022 (arXiv:2210.07558), section 3 and algorithm 1; here weights act from the right, so the first
    b columns of A, (inputs, r), and rows of B, (r, outputs), are used. Evaluated and saved at the full rank;
    `at_rank(params, b)` takes out a smaller one. A and B start as in `lora`.

    With `frozen` only the b-th column of A and row of B get a gradient, as the authors' training script has it. As
    there, the optimizer's momentum and weight decay go on moving the others.

    Args:
      rank: r, the largest rank.
      alpha: default: the rank, hence scale 1 at full rank and r / b at rank b.
      targets: kinds of site or path patterns, as for `lora`.
      min_rank: the smallest rank.
      distribution: 'uniform' over the ranks, as in the authors' code, or 'geometric': b falls on `min_rank + i` with
        a probability in proportion to `(1 - p)^i`.
      p: of the geometric distribution.
      frozen: which of the first b directions a step updates: the last alone, or all.
      dropout: as for `lora`.

    Where a batch is split (`Settings.accumulate`), each part draws its own rank.

    Raises:
      ValueError: an impossible argument; or as `lora` does.

    >>> params = {"q": {"kernel": jnp.ones((6, 4))}}
    >>> new = dylora(rank=3, targets=["q/kernel"]).init(jax.random.key(0), params, ())
    >>> at_rank(new, 2)["q"]["kernel"].a.shape
    (6, 2)
    """
    own = {"min_rank": min_rank, "distribution": distribution, "p": p, "frozen": frozen}
    shared = low_rank_arguments(rank, alpha, targets, None, None, False, dropout, "both")

    def new(w, f: Factors):
        return DyLoRA(w, f.a, f.b, alpha=float(rank if alpha is None else alpha), frozen=frozen, dropout=dropout)

    base = low_rank("dylora", shared, DyLoRA, new)
    if not isinstance(min_rank, int) or isinstance(min_rank, bool) or not 1 <= min_rank <= rank:
        raise ValueError(f"dylora: min_rank must be a whole number from 1 to rank={rank}; got {min_rank!r}")
    if distribution not in ("uniform", "geometric"):
        raise ValueError(f"dylora: distribution must be 'uniform' or 'geometric'; got {distribution!r}")
    if not 0 < p < 1:
        raise ValueError(f"dylora: p must be between 0 and 1; got {p!r}")

    def init(key, params, sites):
        if found := _nodes(params):
            raise ValueError(
                f"dylora: {next(iter(found))} is a DyLoRA already, and one rank is drawn for all; "
                "write one dylora with all the targets"
            )
        return base.init(key, params, sites)

    def resolve(params, key):
        params = base.resolve(params, key)
        largest = max((n.a.shape[-1] for n in _nodes(params).values()), default=rank)
        least = min(min_rank, largest)
        shares = (1 - p if distribution == "geometric" else 1.0) ** jnp.arange(largest - least + 1)
        drawn = None if key is None else least + jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(shares))

        def visit(path, n):
            if not isinstance(n, DyLoRA):
                return n
            return dataclasses.replace(n, rank=None if drawn is None else jnp.broadcast_to(drawn, n.a.shape[:-2]))

        return map_nodes(visit, params)

    kept = {k: shared[k] for k in ("rank", "alpha", "targets", "dropout")}
    return base._replace(spec=(("dylora", plain({**kept, **own})),), init=init, resolve=resolve)


def _nodes(params: Tree) -> dict[str, DyLoRA]:
    found = {}

    def visit(path, n):
        if isinstance(n, DyLoRA):
            found[path] = n
        return n

    map_nodes(visit, params)
    return found


def at_rank(params: Tree, rank: int) -> Tree:
    """The parameters with every DyLoRA cut to its first directions: the adapter of a smaller rank, scaled alpha / rank.

    Args:
      params: resolved, per-layer or stacked.

    Raises:
      ValueError: there is no DyLoRA, or it does not hold so many directions.
    """
    largest = min((n.a.shape[-1] for n in _nodes(params).values()), default=0)
    if not largest:
        raise ValueError("the parameters hold no DyLoRA, so there is no rank to choose; train with dylora")
    if not 1 <= rank <= largest:
        raise ValueError(f"the DyLoRA has ranks from 1 to {largest}; got {rank}")

    def visit(path, n):
        return dataclasses.replace(n, a=n.a[..., :rank], b=n.b[..., :rank, :]) if isinstance(n, DyLoRA) else n

    return map_nodes(visit, params)
