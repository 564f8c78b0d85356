"""GPT-2 (Radford et al. 2019): pre-norm decoder with learned positions; one fused product for q, k and v."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..methods.base import Site
from .base import Family
from .decoder import Decoder
from .layers import (
    Context,
    Embed,
    LayerNorm,
    Linear,
    activation,
    attention,
    begin,
    causal_context,
    hook,
    run_blocks,
    write_cache,
)


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None  # None: 4 n_embd
    activation_function: str
    resid_pdrop: float
    embd_pdrop: float
    attn_pdrop: float
    layer_norm_epsilon: float
    initializer_range: float
    scale_attn_weights: bool  # divide the scores by sqrt(head size)
    scale_attn_by_inverse_layer_idx: bool  # and by the number of the layer, counted from 1
    reorder_and_upcast_attn: bool  # scores in float32, which they are here in any case
    tie_word_embeddings: bool
    num_labels: int


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, share):
        c = self.config
        size = c.n_embd // c.n_head
        fused = Linear(3 * c.n_embd, std=c.initializer_range, name="c_attn")(x, context)
        q, k, v = (y.reshape(*x.shape[:2], c.n_head, size) for y in jnp.split(fused, 3, axis=-1))
        scale = 1.0 if c.scale_attn_weights else size**0.5  # `attention` divides by sqrt(size)
        q = q * scale
        if c.scale_attn_by_inverse_layer_idx:
            q = q * share.astype(q.dtype)
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        causal, fixed = context.causal, context.deterministic
        y = attention(self, q, k, v, context.mask, causal=causal, dropout=c.attn_pdrop, deterministic=fixed)
        y = Linear(c.n_embd, std=c.initializer_range / (2 * c.n_layer) ** 0.5, name="c_proj")(y, context)
        return nn.Dropout(c.resid_pdrop)(y, deterministic=context.deterministic), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        y = Linear(c.n_inner or 4 * c.n_embd, std=c.initializer_range, name="c_fc")(x, context)
        y = activation(c.activation_function)(y)
        y = Linear(c.n_embd, std=c.initializer_range / (2 * c.n_layer) ** 0.5, name="c_proj")(y, context)
        return nn.Dropout(c.resid_pdrop)(y, deterministic=context.deterministic)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, share):
        """`share`: 1 / (index of the layer + 1)."""
        c = self.config
        h = LayerNorm(c.layer_norm_epsilon, name="ln_1")(x)
        y, cache = Attention(c, name="attn")(h, cache, context, share)
        x = x + hook(self, "attention_output", y, x=h, context=context)
        h = LayerNorm(c.layer_norm_epsilon, name="ln_2")(x)
        y = MLP(c, name="mlp")(h, context)
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return x + y, cache


class Base(nn.Module):
    """Token and position embeddings, blocks and the last norm."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.wte = Embed(c.vocab_size, c.n_embd, self.dtype, c.initializer_range)
        self.wpe = Embed(c.n_positions, c.n_embd, self.dtype, c.initializer_range)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c = self.config
        x = self.wte(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        shift = hook(self, "shift", 0, x=input_ids, context=None)
        length = x.shape[1] if cache is None else cache.valid.shape[1]
        if length + shift > c.n_positions:
            after = f" after {n + shift} virtual ones" if n + shift else ""
            raise ValueError(f"{length - n} tokens{after} are more than the {c.n_positions} positions of this model")
        positions = positions + shift
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        x = x + self.wpe(positions)
        x = nn.Dropout(c.embd_pdrop)(x, deterministic=deterministic)

        def block(name):
            return Layer(c, name=name)

        shares = 1 / jnp.arange(1, c.n_layer + 1, dtype=jnp.float32)
        layers = None if cache is None else cache.layers
        x, layers = run_blocks(self, block, "h", c.n_layer, x, context, layers, each=(shares,), remat=self.remat)
        x = LayerNorm(c.layer_norm_epsilon, name="ln_f")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.wte.attend(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; query, key and value are parts of one product."""
    d = c.n_embd
    heads = (c.n_head, c.n_head, d // c.n_head)
    parts = {"query": slice(0, d), "key": slice(d, 2 * d), "value": slice(2 * d, 3 * d)}
    tied = head == "causal-lm" and c.tie_word_embeddings
    rows = [
        Site("transformer", "positions", width=d),
        Site("transformer", "input", width=d),
        Site("transformer/wte/embedding", "embedding", width=d, tied=tied),
        Site("transformer/wpe/embedding", "embedding_other", width=d),
    ]
    for i in range(c.n_layer):
        at = f"transformer/h_{i}"
        rows += [
            Site(at, "block", i, d),
            Site(f"{at}/attn", "attention", i, d, heads),
            Site(f"{at}/ln_1/scale", "norm", i, d),
            Site(f"{at}/attn/c_attn/kernel", "fused_qkv", i, 3 * d, parts=parts),
            Site(f"{at}/attn/c_proj/kernel", "attention_out", i, d),
            Site(f"{at}/ln_2/scale", "norm", i, d),
            Site(f"{at}/mlp/c_fc/kernel", "mlp_in", i, c.n_inner or 4 * d),
            Site(f"{at}/mlp/c_proj/kernel", "mlp_out", i, d),
        ]
    rows.append(Site("transformer/ln_f/scale", "norm", width=d))
    if head == "causal-lm" and not tied:
        rows.append(Site("lm_head/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("score/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.n_embd % c.n_head:
        raise ValueError(f"n_embd {c.n_embd} does not divide into {c.n_head} attention heads")
    activation(c.activation_function)


FAMILY = Family(
    name="gpt2",
    config=Config,
    module=functools.partial(Decoder, body=Base, at="transformer"),
    sites=sites,
    base="transformer",
    heads={
        "GPT2Model": "none",
        "GPT2LMHeadModel": "causal-lm",
        "GPT2ForSequenceClassification": "classification",
    },
    unused=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)", r"lm_head\.weight", r"score\.weight"),
    harmless=(  # of another head, and a second name of n_positions
        "n_ctx",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
    ),
    fixed={"add_cross_attention": False},
    check=_check,
    cache_shape=lambda c: (c.n_layer, c.n_head, c.n_embd // c.n_head),
    max_length=lambda c: c.n_positions,
    transposed=lambda path: path in ("lm_head/kernel", "score/kernel"),  # the rest is Conv1D: (inputs, outputs)
)
