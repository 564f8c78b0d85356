"""LoRA+: LoRA whose two factors learn at different rates."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from ..tree import Tree
from ..weights import map_nodes
from .base import Method
from .lora import Factors, LoRA, low_rank, low_rank_arguments


def lora_plus(
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    ratio: float = 16.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    tied_embedding: str = "both",
) -> Method:
    """LoRA where B's learning rate is `ratio` times A's: `A ← A - η G_A`, `B ← B - ratio · η G_B`.

    Hayou et al. 2024 (arXiv:2402.12354), sections 4 and 5. G is what the optimizer makes of the gradient: the wrapper
    scales B's *updates* after it, weight decay included, as a group with its own rate would have them. Scaled gradients
    would not do: Adam divides the factor out again. The factors of an embedding learn at one rate, since the ratio
    comes from A's inputs growing with the width, and an embedding's do not.

    Args:
      ratio: B's learning rate over A's, above 0; the paper finds values above 1 best, and advises 2^4.
      The others are as for `lora`.

    Raises:
      ValueError: a ratio of 0 or less, or as `lora` does.

    >>> import jax.numpy as jnp
    >>> m = lora_plus(rank=1, targets=["q/kernel"], ratio=4)
    >>> params = m.init(jax.random.key(0), {"q": {"kernel": jnp.ones((3, 2))}}, ())
    >>> trained = jax.tree.map(lambda x, train: jnp.ones_like(x) if train else None, params, m.trainable(params))
    >>> tx = m.optimizer(optax.sgd(0.5))
    >>> new = tx.update(trained, tx.init(trained), trained)[0]["q"]["kernel"]
    >>> new.a.ravel().tolist(), new.b.ravel().tolist()
    ([-0.5, -0.5, -0.5], [-2.0, -2.0])
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)
    if isinstance(ratio, str | bool) or not 0 < ratio < float("inf"):
        raise ValueError(f"lora_plus: ratio must be a number above 0, such as 16; got {ratio!r}")

    def new(w, f: Factors):
        own = 1.0 if f.site.kind.startswith("embedding") else float(ratio)
        return LoRA(w, f.a, f.b, scale=f.scale, dropout=dropout, only=f.only, ratio=own)

    return low_rank("lora_plus", {**arguments, "ratio": ratio}, LoRA, new, optimizer=scale_updates)


class Scaled(NamedTuple):
    """The state of `scale_updates`: the inner transformation's, and by its type the mark that it scales."""

    inner: Any


def scale_updates(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of every LoRA's B by the node's own ratio; within another of its kind it does nothing."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        updates, inner = tx.update(updates, state.inner, params, **extra)
        return updates if _scales(inner) else _scale(updates), Scaled(inner)

    return optax.GradientTransformationExtraArgs(lambda params: Scaled(tx.init(params)), update)


def _scales(state: Any) -> bool:
    def scaled(x):
        return isinstance(x, Scaled)

    return any(scaled(x) for x in jax.tree.leaves(state, is_leaf=scaled))


def _scale(updates: Tree) -> Tree:
    def visit(path, n):
        if not isinstance(n, LoRA) or n.ratio == 1 or n.b is None:
            return n
        return dataclasses.replace(n, b=n.ratio * n.b)

    return map_nodes(visit, updates)
