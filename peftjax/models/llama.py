"""Llama (Touvron et al. 2023, arXiv:2302.13971): pre-norm decoder with RMSNorm, RoPE, gated MLP.

Its relatives (`mistral.py`, `qwen2.py`, `qwen3.py`) are these blocks with another `Design`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

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
    window,
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


class Design(NamedTuple):
    """What Llama and its relatives have each their own way, for one config.

    Attributes:
      size: of a head.
      qkv_bias: of queries, keys and values; `out_bias`: of the attention's output; `mlp_bias`: of the MLP.
      head_norms: a norm over each head's queries and keys, before they turn.
      window: how many tokens a token sees in the layers that slide, itself included.
      slides: whether a layer does, for each of them; empty: none does.
    """

    size: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    window: int | None = None
    slides: tuple[bool, ...] = ()


def design(c: Config) -> Design:
    """Llama's own."""
    return Design(c.head_dim, c.attention_bias, c.attention_bias, c.mlp_bias)


class Attention(nn.Module):
    config: Any
    design: Design

    @nn.compact
    def __call__(self, x, cache, context: Context, cos, sin):
        c, d = self.config, self.design

        def project(name, heads):
            y = Linear(heads * d.size, d.qkv_bias, c.initializer_range, name=f"{name}_proj")(x, context)
            return y.reshape(*x.shape[:2], heads, d.size)

        def turned(name, heads):
            y = project(name, heads)
            y = RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(y) if d.head_norms else y
            return rotate(y, cos, sin)

        q, k = turned("q", c.num_attention_heads), turned("k", c.num_key_value_heads)
        v = project("v", c.num_key_value_heads)
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        drop = c.attention_dropout
        causal, fixed = context.causal, context.deterministic
        y = attention(self, q, k, v, context.mask, causal=causal, dropout=drop, deterministic=fixed)
        return Linear(c.hidden_size, d.out_bias, c.initializer_range, name="o_proj")(y, context), cache


class MLP(nn.Module):
    config: Any
    design: Design

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def linear(features, name):
            return Linear(features, self.design.mlp_bias, c.initializer_range, name=name)

        gate = linear(c.intermediate_size, "gate_proj")(x, context)
        up = linear(c.intermediate_size, "up_proj")(x, context)
        return linear(c.hidden_size, "down_proj")(activation(c.hidden_act)(gate) * up, context)


class Layer(nn.Module):
    config: Any
    design: Design

    @nn.compact
    def __call__(self, x, cache, context: Context, slides, masks, cos, sin):
        """`masks`: of a layer that slides and of one that does not; None where none slides."""
        c, d = self.config, self.design
        if masks is not None:
            context = context._replace(mask=jnp.where(slides, *masks))
        h = RMSNorm(c.rms_norm_eps, name="input_layernorm")(x)
        y, cache = Attention(c, d, name="self_attn")(h, cache, context, cos, sin)
        x = x + hook(self, "attention_output", y, x=h, context=context)
        h = RMSNorm(c.rms_norm_eps, name="post_attention_layernorm")(x)
        y = MLP(c, d, name="mlp")(h, context)
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return x + y, cache


class Base(nn.Module):
    """Embedding, blocks and the last norm."""

    config: Any
    dtype: Any
    remat: str
    design: Callable[[Any], Design]

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c, d = self.config, self.design(self.config)
        x = self.embed_tokens(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        positions = hook(self, "shift", positions, x=input_ids, context=None)
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        assert context.mask is not None  # `causal_context` gives one
        masks = (window(context.mask, d.window), context.mask) if d.window and any(d.slides) else None
        angles = rope_angles(c.rope_parameters, d.size, c.max_position_embeddings, positions)

        def block(name):
            return Layer(c, d, name=name)

        slides = jnp.array(d.slides or (False,) * c.num_hidden_layers)
        layers = None if cache is None else cache.layers
        args = (masks, *angles)
        x, layers = run_blocks(
            self, block, "layers", c.num_hidden_layers, x, context, layers, *args, each=(slides,), remat=self.remat
        )
        x = RMSNorm(c.rms_norm_eps, name="norm")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.embed_tokens.attend(x)


def sites(design: Callable[[Any], Design], c: Any, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    d, ff, size, head_norms = c.hidden_size, c.intermediate_size, design(c).size, design(c).head_norms
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
            *(Site(f"{at}/self_attn/{x}_norm/scale", "norm", i, size) for x in "qk" if head_norms),
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


def _check(design: Callable[[Any], Design], c: Any) -> None:
    d = design(c)
    if c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(
            f"{c.num_attention_heads} attention heads do not divide into {c.num_key_value_heads} key/value heads"
        )
    if len(d.slides) not in (0, c.num_hidden_layers):
        raise ValueError(f"layer_types names {len(d.slides)} layers, and num_hidden_layers is {c.num_hidden_layers}")
    if any(d.slides) and not (d.window and d.window > 0):
        raise ValueError(f"sliding_window must be at least 1 where layers slide; got {d.window}")
    check_rope(c.rope_parameters, d.size)
    activation(c.hidden_act)


def relative(name: str, classes: str, config: Any, design: Callable[[Any], Design], **rest) -> Family:
    """The family of these blocks with another design.

    Args:
      name: transformers' `model_type`; `classes`: how its classes begin.
      config: NamedTuple of the keys that are honoured.
      design: config -> `Design`; raises for what it cannot honour.
      rest: fields of `Family`.
    """
    return Family(
        name=name,
        config=config,
        module=functools.partial(Decoder, body=functools.partial(Base, design=design), at="model"),
        sites=functools.partial(sites, design),
        base="model",
        heads={
            f"{classes}Model": "none",
            f"{classes}ForCausalLM": "causal-lm",
            f"{classes}ForSequenceClassification": "classification",
        },
        unused=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight"),
        check=functools.partial(_check, design),
        cache_shape=lambda c: (c.num_hidden_layers, c.num_key_value_heads, design(c).size),
        **rest,
    )


FAMILY = relative(
    "llama", "Llama", Config, design, fixed={"pretraining_tp": 1}, bias_keys=("attention_bias", "mlp_bias")
)
