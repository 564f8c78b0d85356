"""What BLOOM and GPT-NeoX share: one product for query, key and value, head by head in their files; an MLP of two."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import numpy as np

from ..methods.base import Site
from .layers import Context, Linear, attention, hook, write_cache


def parts(width: int) -> Mapping[str, slice]:
    """Query, key and value of a fused output, each `width` wide, as columns here: one after another.

    >>> parts(4)["key"]
    slice(4, 8, None)
    """
    return {name: slice(i * width, (i + 1) * width) for i, name in enumerate(("query", "key", "value"))}


def by_part(heads: int, size: int) -> np.ndarray:
    """Where the file's columns (heads, 3, size) hold those here, (3, heads, size): `Family.order` of a fused output.

    >>> by_part(2, 1).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return np.arange(heads * 3 * size).reshape(heads, 3, size).swapaxes(0, 1).reshape(-1)


class Attention(nn.Module):
    """Attention through one product for query, key and value.

    Attributes:
      heads: of queries, and of keys and values.
      use_bias: beside both products.
      std: of their first values.
      dropout: of the probabilities.
    """

    heads: int
    use_bias: bool
    std: float
    dropout: float

    @nn.compact
    def __call__(self, x, cache, context: Context, turn: Callable = lambda y: y, bias: Callable = lambda extra: None):
        """(batch, length, width) -> the same, and the cache.

        Args:
          turn: queries or keys, (batch, length, heads, size) -> the same, turned by their positions.
          bias: number of keys that a prefix has put first -> what is added to the scores.
        """
        width = x.shape[-1]
        fused = Linear(3 * width, self.use_bias, self.std, name="query_key_value")(x, context)
        q, k, v = (fused[..., s].reshape(*x.shape[:2], self.heads, -1) for s in parts(width).values())
        q, k = turn(q), turn(k)
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        seen = k.shape[1]
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        added, causal = bias(k.shape[1] - seen), context.causal
        drop, fixed = self.dropout, context.deterministic
        y = attention(self, q, k, v, context.mask, bias=added, causal=causal, dropout=drop, deterministic=fixed)
        return Linear(width, self.use_bias, self.std, name="dense")(y, context), cache


class MLP(nn.Module):
    """`act(x W1 + b1) W2 + b2`, `features` in the middle."""

    features: int
    act: Callable[[jax.Array], jax.Array]
    std: float

    @nn.compact
    def __call__(self, x, context):
        y = self.act(Linear(self.features, std=self.std, name="dense_h_to_4h")(x, context))
        return Linear(x.shape[-1], std=self.std, name="dense_4h_to_h")(y, context)


def block_sites(at: str, attends: str, i: int, d: int, ff: int, heads: int) -> list[Site]:
    """The rows of a block at a path whose attention has the name `attends`: d wide, ff within the MLP."""
    return [
        Site(at, "block", i, d),
        Site(f"{at}/{attends}", "attention", i, d, (heads, heads, d // heads)),
        Site(f"{at}/input_layernorm/scale", "norm", i, d),
        Site(f"{at}/{attends}/query_key_value/kernel", "fused_qkv", i, 3 * d, parts=parts(d)),
        Site(f"{at}/{attends}/dense/kernel", "attention_out", i, d),
        Site(f"{at}/post_attention_layernorm/scale", "norm", i, d),
        Site(f"{at}/mlp/dense_h_to_4h/kernel", "mlp_in", i, ff),
        Site(f"{at}/mlp/dense_4h_to_h/kernel", "mlp_out", i, d),
    ]
