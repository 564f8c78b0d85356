"""DoRA: a low-rank change of a weight's direction, and a trained length for each of its columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..weights import Weight, attend, dot, materialize, node, product, static, take
from .base import Method
from .lora import Factors, drop, low_rank, low_rank_arguments, low_rank_sum


@node
class DoRA(Weight):
    """`m ⊙ V / ‖V‖` with `V = W + scale · A B` and norms over the input axis; V is never formed in training.

    Attributes:
      a: (inputs, r).
      b: (r, outputs).
      magnitude: m, (outputs).
      key: the dropout key of this step; without one there is no dropout.
      only: 'take' where the weight is an embedding tied to the head and only the look-up is adapted.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    magnitude: jax.Array
    key: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    only: str | None = static(default=None)
    trains: tuple[str, ...] = static(default=("a", "b", "magnitude"))
    undecayed = ("magnitude",)

    def stretch(self) -> jax.Array:
        """`m / ‖V‖`, (outputs) in float32; the norm is a constant to the gradient (section 4.3).

        `‖V‖² = ‖W‖² + 2 scale Σ_r (Wᵀ A) Bᵀ + scale² Σ_r (Aᵀ A B) B`, by column: rank-sized products only. A column
        of zeros stays one.
        """
        w, a, b = (jax.lax.stop_gradient(materialize(x)).astype(jnp.float32) for x in (self.base, self.a, self.b))
        cross = jnp.einsum("...io,...ir->...ro", w, a)
        inner = jnp.einsum("...ir,...is->...rs", a, a) @ b
        square = (w * w).sum(-2) + ((2 * self.scale) * cross * b + self.scale**2 * inner * b).sum(-2)
        return self.magnitude / jnp.sqrt(jnp.maximum(square, jnp.finfo(jnp.float32).tiny))

    def ready(self):
        return Stretched(self, self.stretch())

    def materialize(self):
        return self.ready().materialize()

    def dot(self, x):
        return self.ready().dot(x)

    def take(self, ids):
        return self.ready().take(ids)

    def attend(self, x):
        return self.ready().attend(x)


@node
class Stretched(Weight):
    """A DoRA with what its products have in common: `factor`, the `stretch` of each column."""

    base: DoRA
    factor: jax.Array

    def materialize(self):
        v = low_rank_sum(self.base)
        return (self.factor[..., None, :] * v.astype(jnp.float32)).astype(self.dtype)

    def dot(self, x):
        w = self.base
        a, b = w.a.astype(x.dtype), (w.scale * self.factor * w.b).astype(x.dtype)
        dropped = drop(x, w.key, w.dropout)
        y = dot(w.base, dropped)
        changed = _times(self.factor, y) + product(product(dropped, a), b)  # the sum of the two is never stored
        return changed if dropped is x else dot(w.base, x) - y + changed

    def take(self, ids):
        w = self.base
        rows = take(w.base, ids)
        return _times(self.factor, rows + (w.scale * product(w.a[ids], w.b)).astype(rows.dtype))

    def attend(self, x):
        w = self.base
        if w.only == "take":
            return attend(w.base, x)
        x = _times(self.factor, x)
        return attend(w.base, x) + w.scale * product(attend(w.b, x), w.a.T.astype(x.dtype))


def _times(c: jax.Array, y: jax.Array) -> jax.Array:
    """`c · y` along the last axis in the dtype of y; bfloat16 would round c, which is near 1, by 0.4%."""
    return (c.reshape(*(1,) * (y.ndim - 1), -1) * y.astype(c.dtype)).astype(y.dtype)


def dora(
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    tied_embedding: str = "both",
) -> Method:
    """Trains length and direction of a weight's columns apart: `W' = m ⊙ V / ‖V‖`, `V = W + (alpha / r) A B`.

    Liu et al. 2024 (arXiv:2402.09353), section 4.1, equation 5. A and B start as in `lora`, m as the norms of W, so
    the function starts unchanged. The paper writes W as (d, k) with norms by column and m in R^(1 x k); its code takes
    them for each output feature, as here: over the input axis of a weight (inputs, outputs), over the rows of an
    embedding. The norm gets no gradient (section 4.3, equation 11).

    With dropout, as in the authors' code, the change of the base's own output is dropped with A's input:
    `W x + (c - 1) W x̃ + c (alpha / r) B A x̃` where `c = m / ‖·‖`; that needs a second product with W.

    Args and errors as for `lora`. The paper adapts query, key, value and the MLP and sets alpha to 2 r; the defaults
    here are LoRA's, so that the two compare at one place and scale.

    The count is `r (inputs + outputs) + outputs` a matrix.

    >>> params = {"q": {"kernel": jnp.ones((4, 2))}}
    >>> new = dora(rank=1, targets=["q/kernel"]).init(jax.random.key(0), params, ())
    >>> new["q"]["kernel"].magnitude.tolist()
    [2.0, 2.0]
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)

    def new(w, f: Factors):
        try:
            length = jnp.linalg.norm(materialize(w).astype(jnp.float32), axis=-2)
        except ValueError as e:
            raise ValueError(
                "dora: another method adapts the look-up of a tied embedding alone, so its columns have no length; "
                "put dora first in the chain, or give that method tied_embedding='both'"
            ) from e
        return DoRA(w, f.a, f.b, length, scale=f.scale, dropout=dropout, only=f.only)

    return low_rank("dora", arguments, DoRA, new)
