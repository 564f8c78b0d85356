"""T5 (Raffel et al. 2020, arXiv:1910.10683): pre-norm encoder and decoder with relative position biases.

T5 1.1 and Flan-T5 (gated MLP, a head of its own) and mT5 (Xue et al. 2021, arXiv:2010.11934) are the same module.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..methods.base import Site
from .base import Family
from .encoder_decoder import EncoderDecoder, halves, keys_and_values
from .layers import Context, Embed, Linear, RMSNorm, activation, attention, hook, run_blocks


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    d_model: int
    d_kv: int  # of a head; the heads together need not be as wide as the model
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    dense_act_fn: str
    is_gated_act: bool
    dropout_rate: float
    classifier_dropout: float
    layer_norm_epsilon: float
    initializer_factor: float
    scale_decoder_outputs: bool  # divide what the head reads by sqrt(d_model), as the first T5 did
    tie_word_embeddings: bool
    decoder_start_token_id: int | None  # None: the padding token
    pad_token_id: int | None
    eos_token_id: int | None
    num_labels: int


def start_id(c: Config) -> int:
    """The token that a decoder's text begins with."""
    return (c.pad_token_id or 0) if c.decoder_start_token_id is None else c.decoder_start_token_id


def buckets_of(buckets: int, max_distance: int) -> np.ndarray:
    """The bucket of each distance 0 ... max_distance: half of them exact, half logarithmic (section 2.1).

    Computed once in numpy's float32: at powers of two, another rounding would choose another bucket.
    """
    exact, distance = buckets // 2, np.arange(max_distance + 1)
    share = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(max_distance / exact)
    far = np.minimum(exact + (share * (buckets - exact)).astype(int), buckets - 1)
    return np.where(distance < exact, distance, far)


def relative_bias(c: Config, table: jax.Array, queries: jax.Array, keys: jax.Array, *, causal: bool) -> jax.Array:
    """(buckets, heads), positions (queries,) and (keys,) -> (1, heads, queries, keys), added to the scores.

    A causal stack has all buckets for keys before the query; the other halves them by direction.
    """
    ahead = keys[None, :] - queries[:, None]
    half = c.relative_attention_num_buckets if causal else c.relative_attention_num_buckets // 2
    distance = jnp.maximum(-ahead, 0) if causal else jnp.abs(ahead)
    found = jnp.asarray(buckets_of(half, c.relative_attention_max_distance))
    bucket = found[jnp.minimum(distance, c.relative_attention_max_distance)]
    bucket = bucket if causal else bucket + jnp.where(ahead > 0, half, 0)
    return table[bucket].transpose(2, 0, 1)[None]


class Attention(nn.Module):
    config: Config
    causal: bool

    @nn.compact
    def __call__(self, x, source, cache, context: Context, table: Any = None, bias: Any = None):
        """`source`: what keys and values are made from; None: the cache holds them all."""
        c = self.config
        std = c.initializer_factor * c.d_model**-0.5

        def heads(name, x, std):
            y = Linear(c.num_heads * c.d_kv, False, std, name=name)(x, context)
            return y.reshape(*x.shape[:2], c.num_heads, c.d_kv)

        q = heads("q", x, std * c.d_kv**-0.5)
        k, v, cache = keys_and_values(
            lambda source: (heads("k", source, std), heads("v", source, std)), source, cache, context.index
        )
        seen = k.shape[1]
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        if bias is not None and (extra := k.shape[1] - seen):  # virtual tokens stand right before the text
            before = relative_bias(c, table, context.positions[0], jnp.arange(-extra, 0), causal=self.causal)
            bias = jnp.concatenate([before, bias], axis=-1)
        drop, fixed = c.dropout_rate, context.deterministic
        y = attention(self, q, k, v, context.mask, bias=bias, scale=1.0, dropout=drop, deterministic=fixed)
        std = c.initializer_factor * (c.num_heads * c.d_kv) ** -0.5
        return Linear(c.d_model, False, std, name="o")(y, context), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        act = activation(c.dense_act_fn)

        def inner(name):
            return Linear(c.d_ff, False, c.initializer_factor * c.d_model**-0.5, name=name)(x, context)

        y = act(inner("wi0")) * inner("wi1") if c.is_gated_act else act(inner("wi"))
        y = nn.Dropout(c.dropout_rate)(y, deterministic=context.deterministic)
        return Linear(c.d_model, False, c.initializer_factor * c.d_ff**-0.5, name="wo")(y, context)


class SubLayer(nn.Module):
    """Norm, attention or MLP, dropout; gives back the normed input, the output and the cache."""

    config: Config
    inner: str
    causal: bool = False

    @nn.compact
    def __call__(self, x, source, cache, context, *args):
        c = self.config
        h = RMSNorm(c.layer_norm_epsilon, name="layer_norm")(x)
        if self.inner == "DenseReluDense":
            y = MLP(c, name=self.inner)(h, context)
        else:
            source = h if self.inner == "SelfAttention" else source
            y, cache = Attention(c, self.causal, name=self.inner)(h, source, cache, context, *args)
        return h, nn.Dropout(c.dropout_rate)(y, deterministic=context.deterministic), cache


class Block(nn.Module):
    """Of the encoder, or, with cross-attention, of the decoder."""

    config: Config
    decodes: bool

    @nn.compact
    def __call__(self, x, cache, context: Context, table, bias, memory=None, source=None):
        """`memory`: the encoder's states, None where the cache has their keys; `source`: which may be looked at."""
        own, cross = halves(cache)

        def sublayer(i, inner):
            return SubLayer(self.config, inner, self.decodes, name=f"layer{i}")

        h, y, own = sublayer(0, "SelfAttention")(x, None, own, context, table, bias)
        x = x + hook(self, "attention_output", y, x=h, context=context)
        if self.decodes:
            across = context._replace(mask=source, index=None if cache is None else 0)
            h, y, cross = sublayer(1, "EncDecAttention")(x, memory, cross, across)
            x = x + hook(self, "cross_attention_output", y, x=h, context=across)
        h, y, _ = sublayer(1 + self.decodes, "DenseReluDense")(x, None, None, context)
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return x + y, None if cache is None else (*own, *cross)


class Stack(nn.Module):
    config: Config
    decodes: bool
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x, cache, context: Context, *args):
        c, seen = self.config, context.mask
        layers = c.num_decoder_layers if self.decodes else c.num_layers
        assert seen is not None  # `Base` gives one
        x = nn.Dropout(c.dropout_rate)(x, deterministic=context.deterministic)
        rows, std = c.relative_attention_num_buckets, c.initializer_factor * c.d_model**-0.5
        table = Embed(rows, c.num_heads, self.dtype, std, name="relative_attention_bias")(jnp.arange(rows), context)
        keys = jnp.arange(seen.shape[-1])
        bias = relative_bias(c, table, context.positions[0], keys, causal=self.decodes)

        def block(name):
            return Block(c, self.decodes, name=name)

        x, cache = run_blocks(self, block, "block", layers, x, context, cache, table, bias, *args, remat=self.remat)
        x = RMSNorm(c.layer_norm_epsilon, name="final_layer_norm")(x)
        return nn.Dropout(c.dropout_rate)(x, deterministic=context.deterministic), cache


def unembed(module: nn.Module, base: Any, x: jax.Array) -> jax.Array:
    c = module.config
    x = x * c.d_model**-0.5 if c.scale_decoder_outputs else x
    if c.tie_word_embeddings:
        return base.attend(x)
    return Linear(c.vocab_size, False, c.initializer_factor, name="lm_head")(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; layers are counted through the encoder, then the decoder."""
    d, inner = c.d_model, c.num_heads * c.d_kv
    heads = (c.num_heads, c.num_heads, c.d_kv)
    tied = head == "seq2seq-lm" and c.tie_word_embeddings
    rows = [
        Site("transformer", "input", width=d),
        Site("transformer/shared/embedding", "embedding", width=d, tied=tied),
    ]

    def attend(at, i):
        return [
            Site(at, "attention", i, d, heads),
            *(Site(f"{at}/{n}/kernel", k, i, inner) for n, k in (("q", "query"), ("k", "key"), ("v", "value"))),
            Site(f"{at}/o/kernel", "attention_out", i, d),
        ]

    layer = 0
    for stack, n, last in (("encoder", c.num_layers, 1), ("decoder", c.num_decoder_layers, 2)):
        top = f"transformer/{stack}"
        rows.append(Site(f"{top}/relative_attention_bias/embedding", "embedding_other", width=c.num_heads))
        for j in range(n):
            at, i = f"{top}/block_{j}", layer + j
            mlp = f"{at}/layer{last}/DenseReluDense"
            rows += [Site(at, "block", i, d), *attend(f"{at}/layer0/SelfAttention", i)]
            rows += attend(f"{at}/layer1/EncDecAttention", i) if stack == "decoder" else []
            names = ("wi0", "wi1") if c.is_gated_act else ("wi",)
            rows += [Site(f"{mlp}/{name}/kernel", "mlp_in", i, c.d_ff) for name in names]
            rows.append(Site(f"{mlp}/wo/kernel", "mlp_out", i, d))
            rows += [Site(f"{at}/layer{s}/layer_norm/scale", "norm", i, d) for s in range(last + 1)]
        rows.append(Site(f"{top}/final_layer_norm/scale", "norm", width=d))
        layer += n
    if head == "seq2seq-lm" and not tied:
        rows.append(Site("lm_head/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("classification_head/dense/kernel", "head", width=d))
        rows.append(Site("classification_head/out_proj/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    buckets, distance = c.relative_attention_num_buckets, c.relative_attention_max_distance
    if buckets % 4 or not 0 < buckets < 2 * distance:
        raise ValueError(
            f"relative_attention_num_buckets {buckets} must be a multiple of 4 below twice the "
            f"relative_attention_max_distance {distance}"
        )
    if c.eos_token_id is not None and not isinstance(c.eos_token_id, int):
        raise ValueError(f"eos_token_id must be one token; got {c.eos_token_id!r}")
    activation(c.dense_act_fn)


def _family(name: str, prefix: str, absent: dict[str, Any]) -> Family:
    return Family(
        name=name,
        config=Config,
        module=functools.partial(
            EncoderDecoder,
            at="transformer",
            stack=Stack,
            start=start_id,
            unembed=unembed,
            std=lambda c: c.initializer_factor,
            head_std=lambda c: c.initializer_factor * c.d_model**-0.5,
        ),
        sites=sites,
        base="transformer",
        heads={
            f"{prefix}Model": "none",
            f"{prefix}ForConditionalGeneration": "seq2seq-lm",
            f"{prefix}ForSequenceClassification": "classification",
        },
        unused=(
            r"(transformer\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
            r"lm_head\.weight",
            r"classification_head\.(dense|out_proj)\.(weight|bias)",
        ),
        fixed={"is_encoder_decoder": True, "is_decoder": False},
        harmless=("feed_forward_proj", "n_positions"),  # transformers reads dense_act_fn and is_gated_act off the first
        absent=absent,
        check=_check,
        cache_shape=lambda c: (c.num_decoder_layers, c.num_heads, c.d_kv),
        max_length=lambda c: 2**31 - 1,  # positions are relative
        start_id=start_id,
        bare=("none", "seq2seq-lm"),
        copies=(r"(transformer\.)?(encoder|decoder)\.embed_tokens\.weight",),
        unties=True,
        places=(
            (r"coder/relative_attention_bias/", r"coder/block_0/layer_0/SelfAttention/relative_attention_bias/"),
            (r"/layer(\d)/", r"/layer_\1/"),
            (r"/wi(\d)/", r"/wi_\1/"),
        ),
    )


FAMILY = _family("t5", "T5", {"decoder_start_token_id": None})
MT5 = _family("mt5", "MT5", {"decoder_start_token_id": None, "scale_decoder_outputs": False})
