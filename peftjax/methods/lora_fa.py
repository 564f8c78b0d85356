"""LoRA-FA: LoRA whose first factor stays at its random start."""

from collections.abc import Mapping, Sequence

from .. import masks
from .base import Method
from .lora import Factors, LoRA, low_rank, low_rank_arguments


def lora_fa(
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
    """LoRA with A frozen where it was drawn: `h = W x + (alpha / r) B A x`, and B alone trains.

    Zhang et al. 2023 (arXiv:2308.03303), section 3. The backward pass then needs `A x`, of size r, and not x, which
    LoRA must keep for A's gradient. The gradient of B is used as it is; later versions of the paper and Hugging Face
    PEFT's optimizer multiply it by the inverse of `A Aᵀ`. A is drawn as `lora` draws it (the paper: normal), and the
    file holds it. Of an embedding, whose A is zero and B random, B is frozen and A trains.

    Args: as for `lora`.

    Raises:
      ValueError: as `lora` does.

    The count is `r outputs` a matrix.

    >>> import jax, jax.numpy as jnp
    >>> m = lora_fa(rank=2, targets=["q/kernel"])
    >>> params = m.init(jax.random.key(0), {"q": {"kernel": jnp.ones((6, 4))}}, ())
    >>> w = m.trainable(params)["q"]["kernel"]
    >>> w.a, w.b
    (False, True)
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)

    def new(w, f: Factors):
        trains = ("a",) if f.site.kind.startswith("embedding") else ("b",)  # the factor that starts at zero
        return LoRA(w, f.a, f.b, scale=f.scale, dropout=dropout, only=f.only, trains=trains)

    return low_rank("lora_fa", arguments, LoRA, new, saved=masks.by_node(LoRA, "a", "b"))
