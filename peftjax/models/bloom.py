"""BLOOM (Le Scao et al. 2022, arXiv:2211.05100): pre-norm decoder whose positions are ALiBi's bias on the scores."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..methods.base import Site
from .base import Family
from .decoder import Decoder
from .fused import MLP, Attention, block_sites, by_part
from .layers import Context, Embed, LayerNorm, activation, begin, causal_context, hook, run_blocks


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    n_layer: int
    n_head: int
    layer_norm_epsilon: float
    initializer_range: float
    apply_residual_connection_post_layernorm: bool  # the residual sums start from what the norms give
    hidden_dropout: float
    attention_dropout: float
    tie_word_embeddings: bool
    seq_length: int  # trained length; ALiBi itself has no end
    num_labels: int


def slopes(heads: int) -> np.ndarray:
    """ALiBi's slope of each head (Press et al. 2022, arXiv:2108.12409, section 3): 2^(-8 i / n), i = 1 ... n.

    Where the heads are no power of two, the first n have those of the power below, and the rest every other one of
    twice as many heads.

    >>> slopes(6).tolist()
    [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    """
    n = 2 ** math.floor(math.log2(heads))
    first, more = (2.0 ** (-8 / m * np.arange(1, m + 1)) for m in (n, 2 * n))
    return np.concatenate([first, more[::2][: heads - n]]).astype(np.float32)


def alibi(heads: int, positions: jax.Array, extra: int) -> jax.Array:
    """The bias slope · position of each key, (batch, heads, 1, extra + keys).

    The slope times the distance from a query, as in the paper, differs from it by a number for each query, which the
    softmax drops. It is float32; transformers rounds it to the activations' dtype, in bfloat16 to 8 bits.

    Args:
      positions: (batch, keys), of the keys among the tokens of their text.
      extra: keys of a prefix, which come first: they stand right before the text, as transformers has it for keys
        that it is given.
    """
    before = jnp.broadcast_to(jnp.arange(-extra, 0), (positions.shape[0], extra))
    all_ = jnp.concatenate([before, positions], axis=1).astype(jnp.float32)
    return jnp.asarray(slopes(heads))[None, :, None, None] * all_[:, None, None, :]


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, positions):
        """`positions`: of the keys, (batch, keys)."""
        c = self.config
        drop = nn.Dropout(c.hidden_dropout, deterministic=context.deterministic)
        attend = Attention(c.n_head, True, c.initializer_range, c.attention_dropout, name="self_attention")
        mlp = MLP(4 * c.hidden_size, activation("gelu_new"), c.initializer_range, name="mlp")
        after_norm = c.apply_residual_connection_post_layernorm

        h = LayerNorm(c.layer_norm_epsilon, name="input_layernorm")(x)
        y, cache = attend(h, cache, context, bias=lambda extra: alibi(c.n_head, positions, extra))
        x = (h if after_norm else x) + hook(self, "attention_output", drop(y), x=h, context=context)
        h = LayerNorm(c.layer_norm_epsilon, name="post_attention_layernorm")(x)
        y = drop(mlp(h, context))
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return (h if after_norm else x) + y, cache


class Base(nn.Module):
    """Embedding and its norm, blocks and the last norm."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.word_embeddings = Embed(c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        """`positions` are read of packed texts only; else a key's counts the tokens before it, as in transformers.

        So padding on the left does not come between a prompt and its text.
        """
        c = self.config
        x = self.word_embeddings(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        x = LayerNorm(c.layer_norm_epsilon, name="word_embeddings_layernorm")(x)
        keys = positions
        if segments is None:
            keys = jnp.cumsum(attention_mask if cache is None else cache.valid, axis=1, dtype=jnp.int32) - 1

        def block(name):
            return Layer(c, name=name)

        layers = None if cache is None else cache.layers
        x, layers = run_blocks(self, block, "h", c.n_layer, x, context, layers, keys, remat=self.remat)
        x = LayerNorm(c.layer_norm_epsilon, name="ln_f")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.word_embeddings.attend(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; query, key and value are parts of one product."""
    d = c.hidden_size
    tied = head == "causal-lm" and c.tie_word_embeddings
    rows = [
        Site("transformer", "input", width=d),
        Site("transformer/word_embeddings/embedding", "embedding", width=d, tied=tied),
        Site("transformer/word_embeddings_layernorm/scale", "norm", width=d),
    ]
    for i in range(c.n_layer):
        rows += block_sites(f"transformer/h_{i}", "self_attention", i, d, 4 * d, c.n_head)
    rows.append(Site("transformer/ln_f/scale", "norm", width=d))
    if head == "causal-lm" and not tied:
        rows.append(Site("lm_head/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("score/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.hidden_size % c.n_head:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.n_head} attention heads")


def _order(c: Config, path: str) -> np.ndarray | None:
    return by_part(c.n_head, c.hidden_size // c.n_head) if "/query_key_value/" in path else None


FAMILY = Family(
    name="bloom",
    config=Config,
    module=functools.partial(Decoder, body=Base, at="transformer"),
    sites=sites,
    base="transformer",
    heads={
        "BloomModel": "none",
        "BloomForCausalLM": "causal-lm",
        "BloomForSequenceClassification": "classification",
    },
    unused=(r"lm_head\.weight", r"score\.weight"),
    fixed={"slow_but_exact": False},
    harmless=(  # of Megatron's training; `n_inner` is null in BLOOM's configs, and transformers reads none of them
        *("pretraining_tp", "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion"),
        *("offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id", "n_inner"),
    ),
    absent={"seq_length": 2048},
    check=_check,
    cache_shape=lambda c: (c.n_layer, c.n_head, c.hidden_size // c.n_head),
    max_length=lambda c: c.seq_length,
    order=_order,
)
