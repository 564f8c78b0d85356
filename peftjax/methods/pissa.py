"""PiSSA and OLoRA: LoRA whose factors start as a part of the weight itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import Tree
from ..weights import Weight, map_nodes, materialize, node, static
from .base import Method
from .lora import Factors, LoRA, low_rank, low_rank_arguments


@node
class Moved(Weight):
    """`W + scale · (A B - A0 B0)`: the base W stays as it is, and the factors count from where they started.

    Computed as `(A - A0) B + A0 (B - B0)`, one product of rank 2 r. It is zero at the start to the bit, and in bfloat16
    small changes of large factors are not rounded away.

    Attributes:
      a: (inputs, r), and a0, its start.
      b: (r, outputs), and b0, its start.
      key, scale, dropout, only: as in `LoRA`. What is dropped is the input of the whole change.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    a0: jax.Array
    b0: jax.Array
    key: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    only: str | None = static(default=None)
    trains = ("a", "b")
    repeats = ("a0", "b0")
    undecayed = ("a", "b")

    def lora(self) -> LoRA:
        """The same weight as a LoRA of rank 2 r."""
        a = jnp.concatenate([self.a - self.a0, self.a0.astype(self.a.dtype)], axis=-1)
        b = jnp.concatenate([self.b, self.b - self.b0], axis=-2)
        return LoRA(self.base, a, b, self.key, scale=self.scale, dropout=self.dropout, only=self.only)

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


def as_lora(params: Tree) -> Tree:
    """Turns the nodes of `pissa` and `olora` into plain LoRAs of twice the rank, the function unchanged.

    >>> params = {"q": {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0]))}}
    >>> as_lora(pissa(rank=1, targets=["q/kernel"]).init(jax.random.key(0), params, ()))["q"]["kernel"].a.shape
    (3, 2)
    """
    return map_nodes(lambda path, n: n.lora() if isinstance(n, Moved) else n, params)


def pissa(
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    niter: int | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    tied_embedding: str = "both",
) -> Method:
    """LoRA from the principal singular parts: with `W = U S Vᵀ`, `A0 = U_r √S_r`, `B0 = √S_r V_rᵀ`, W's rest frozen.

    Meng et al. 2024 (arXiv:2404.02948), section 3, equations 2 to 4: the model is `W - A0 B0 + A B`. Here weights act
    from the right, as in the paper. With a scale other than 1, S is divided by it first. The base itself is not
    rewritten: `Moved` subtracts the start, which the file holds with the factors.

    Args:
      niter: None for the exact decomposition; else that many rounds of subspace iteration on r random directions
        (the paper's fast SVD; Halko et al. 2011, arXiv:0909.4061), drawn from the key of `init`.
      The others are as for `lora`.

    Raises:
      ValueError: a negative niter, or as `lora` does.

    >>> params = {"q": {"kernel": jnp.diag(jnp.array([1.0, 4.0]))}}
    >>> w = pissa(rank=1, targets=["q/kernel"]).init(jax.random.key(0), params, ())["q"]["kernel"]
    >>> (w.a @ w.b).round(4).tolist()
    [[0.0, 0.0], [0.0, 4.0]]
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)
    if niter is not None and (not isinstance(niter, int) or isinstance(niter, bool) or niter < 0):
        raise ValueError(f"pissa: niter must be a whole number of at least 0, or None; got {niter!r}")

    def factors(w: jax.Array, f: Factors):
        r = f.a.shape[1]
        u, s, v = jnp.linalg.svd(w, full_matrices=False) if niter is None else fast_svd(f.key, w, r, niter)
        root = jnp.sqrt(s[:r] / f.scale)
        return u[:, :r] * root, root[:, None] * v[:r]

    return _moved("pissa", {**arguments, "niter": niter}, factors)


def fast_svd(key: jax.Array, w: jax.Array, r: int, niter: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """About the first r singular parts of w, as (inputs, r), (r), (r, outputs)."""
    q, _ = jnp.linalg.qr(w @ jax.random.normal(key, (w.shape[1], r)))
    for _ in range(niter):
        q, _ = jnp.linalg.qr(w @ jnp.linalg.qr(w.T @ q)[0])
    u, s, v = jnp.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u, s, v


def olora(
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
    """LoRA from an orthonormal start: with `Wᵀ = Q R`, `A0 = R_rᵀ` and `B0 = Q_rᵀ`, and W's rest frozen.

    Büyükakyüz 2024 (arXiv:2406.01775), section 3. The paper's weights act from the left, hence the transposes. The
    model is `W + (alpha / r) (A B - A0 B0)`: as in Hugging Face PEFT the scale is not divided out of the start.

    Args: as for `lora`.

    Raises:
      ValueError: as `lora` does.

    >>> params = {"q": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    >>> w = olora(rank=2, targets=["q/kernel"]).init(jax.random.key(0), params, ())["q"]["kernel"]
    >>> (w.a @ w.b).round(4).tolist(), (w.b @ w.b.T).round(4).tolist()
    ([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [[1.0, 0.0], [0.0, 1.0]])
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)

    def factors(w: jax.Array, f: Factors):
        q, r = jnp.linalg.qr(w.T)
        rank = f.a.shape[1]
        return r[:rank].T, q[:, :rank].T

    return _moved("olora", arguments, factors)


def _moved(name: str, arguments: dict, factors: Callable[[jax.Array, Factors], tuple[jax.Array, jax.Array]]) -> Method:
    """The method whose factors start as `factors(weight in float32, LoRA's start)`."""

    def new(w, f: Factors):
        try:
            dense = materialize(w).astype(jnp.float32)
        except ValueError as e:
            raise ValueError(
                f"{name}: another method adapts the look-up of a tied embedding alone, so there is no one matrix to "
                f"take apart; put {name} first in the chain, or give that method tied_embedding='both'"
            ) from e
        a, b = factors(dense, f)
        return Moved(w, a, b, a, b, scale=f.scale, dropout=arguments["dropout"], only=f.only)

    return low_rank(name, arguments, Moved, new, saved=masks.by_node(Moved, "a", "b", "a0", "b0"))
