"""Llama (Touvron et al. 2023, arXiv:2302.13971): pre-norm decoder with RMSNorm, RoPE, gated MLP."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn

from ..methods.base import Site
from .base import Family
from .decoder import Decoder
from .layers import (
    Context,
    Embed,
    Linear,
    RMSNorm,
    activation,
    attention,
    begin,
    causal_context,
    hook,
    run_blocks,
    write_cache,
)
from .rope import check_rope, rope_angles, rotate


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_parameters: dict
    attention_bias: bool
    attention_dropout: float
    mlp_bias: bool
    tie_word_embeddings: bool
    num_labels: int


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, cos, sin):
        c = self.config

        def project(name, heads, x):
            y = Linear(heads * c.head_dim, c.attention_bias, c.initializer_range, name=name)(x, context)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        q = rotate(project("q_proj", c.num_attention_heads, x), cos, sin)
        k = rotate(project("k_proj", c.num_key_value_heads, x), cos, sin)
        v = project("v_proj", c.num_key_value_heads, x)
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        drop = c.attention_dropout
        y = attention(self, q, k, v, context.mask, dropout=drop, deterministic=context.deterministic)
        return Linear(c.hidden_size, c.attention_bias, c.initializer_range, name="o_proj")(y, context), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def linear(features, name):
            return Linear(features, c.mlp_bias, c.initializer_range, name=name)

        gate = linear(c.intermediate_size, "gate_proj")(x, context)
        up = linear(c.intermediate_size, "up_proj")(x, context)
        return linear(c.hidden_size, "down_proj")(activation(c.hidden_act)(gate) * up, context)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, cos, sin):
        c = self.config
        h = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        y, cache = Attention(c, name="self_attn")(h, cache, context, cos, sin)
        x = x + hook(self, "attention_output", y, x=h, context=context)
        h = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        y = MLP(c, name="mlp")(h, context)
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return x + y, cache


class Base(nn.Module):
    """Embedding, blocks and the last norm."""

    config: Config
    dtype: Any
    remat: bool

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c = self.config
        x = self.embed_tokens(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        positions = hook(self, "shift", positions, x=input_ids, context=None)
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        angles = rope_angles(c.rope_parameters, c.head_dim, c.max_position_embeddings, positions)

        def block(name):
            return Layer(c, name=name)

        layers = None if cache is None else cache.layers
        x, layers = run_blocks(
            self, block, "layers", c.num_hidden_layers, x, context, layers, *angles, remat=self.remat
        )
        x = RMSNorm(c.rms_norm_eps, name="norm")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.embed_tokens.attend(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    d, ff, size = c.hidden_size, c.intermediate_size, c.head_dim
    heads = (c.num_attention_heads, c.num_key_value_heads, size)
    tied = head == "causal-lm" and c.tie_word_embeddings
    rows = [
        Site("model", "positions", width=d),
        Site("model", "input", width=d),
        Site("model/embed_tokens/embedding", "embedding", width=d, tied=tied),
    ]
    for i in range(c.num_hidden_layers):
        at = f"model/layers_{i}"
        rows += [
            Site(at, "block", i, d),
            Site(f"{at}/self_attn", "attention", i, d, heads),
            Site(f"{at}/self_attn/q_proj/kernel", "query", i, heads[0] * size),
            Site(f"{at}/self_attn/k_proj/kernel", "key", i, heads[1] * size),
            Site(f"{at}/self_attn/v_proj/kernel", "value", i, heads[1] * size),
            Site(f"{at}/self_attn/o_proj/kernel", "attention_out", i, d),
            Site(f"{at}/input_layernorm/scale", "norm", i, d),
            Site(f"{at}/mlp/gate_proj/kernel", "mlp_in", i, ff),
            Site(f"{at}/mlp/up_proj/kernel", "mlp_in", i, ff),
            Site(f"{at}/mlp/down_proj/kernel", "mlp_out", i, d),
            Site(f"{at}/post_attention_layernorm/scale", "norm", i, d),
        ]
    rows.append(Site("model/norm/scale", "norm", width=d))
    if head == "causal-lm" and not tied:
        rows.append(Site("lm_head/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("score/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(
            f"{c.num_attention_heads} attention heads do not divide into {c.num_key_value_heads} key/value heads"
        )
    check_rope(c.rope_parameters, c.head_dim)
    activation(c.hidden_act)


FAMILY = Family(
    name="llama",
    config=Config,
    module=functools.partial(Decoder, body=Base, at="model"),
    sites=sites,
    base="model",
    heads={
        "LlamaModel": "none",
        "LlamaForCausalLM": "causal-lm",
        "LlamaForSequenceClassification": "classification",
    },
    unused=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight"),
    fixed={"pretraining_tp": 1},
    bias_keys=("attention_bias", "mlp_bias"),
    check=_check,
    cache_shape=lambda c: (c.num_hidden_layers, c.num_key_value_heads, c.head_dim),
    max_length=lambda c: c.max_position_embeddings,
)
