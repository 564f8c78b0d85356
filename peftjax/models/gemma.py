"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118) and the text model of Gemma 3 (2025, arXiv:2503.19786).

Decoders whose blocks have a norm on both sides of each half, and whose layers look either at all of the text or at a
window of it. Gemma 2 caps its scores and logits; Gemma 3 norms queries and keys instead, and turns them faster in
the windowed layers. The hooks `attention_output` and `mlp_output` are called after the half's second norm, on what
is added to the residual stream.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ..methods.base import Site
from .base import Family
from .decoder import Decoder
from .layers import (
    Context,
    Embed,
    Linear,
    activation,
    attention,
    begin,
    causal_context,
    hook,
    run_blocks,
    vector,
    window,
    write_cache,
)
from .rope import check_rope, rope_angles, rotate

FULL, SLIDING = "full_attention", "sliding_attention"


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    model_type: str  # 'gemma2' or 'gemma3_text'
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_activation: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_parameters: dict  # of Gemma 3: type of layer -> its own
    attention_bias: bool
    attention_dropout: float
    query_pre_attn_scalar: int  # the scores are divided by its root
    sliding_window: int | None
    layer_types: list
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    tie_word_embeddings: bool
    num_labels: int


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · (1 + scale)`, all of it in float32; `scale` is what the files hold."""

    eps: float

    @nn.compact
    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return (h * (1 + vector(self, "scale", nn.initializers.zeros, h))).astype(x.dtype)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, cos, sin):
        c = self.config

        def project(name, heads):
            y = Linear(heads * c.head_dim, c.attention_bias, c.initializer_range, name=f"{name}_proj")(x, context)
            return y.reshape(*x.shape[:2], heads, c.head_dim)

        def turned(name, heads):
            y = project(name, heads)
            y = RMSNorm(c.rms_norm_eps, name=f"{name}_norm")(y) if _is_gemma3(c) else y
            return rotate(y, cos, sin)

        q, k = turned("q", c.num_attention_heads), turned("k", c.num_key_value_heads)
        v = project("v", c.num_key_value_heads)
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        y = attention(
            self,
            q,
            k,
            v,
            context.mask,
            scale=c.query_pre_attn_scalar**-0.5,
            cap=c.attn_logit_softcapping,
            dropout=c.attention_dropout,
            deterministic=context.deterministic,
        )
        return Linear(c.hidden_size, c.attention_bias, c.initializer_range, name="o_proj")(y, context), cache


class MLP(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def linear(features, name):
            return Linear(features, False, c.initializer_range, name=name)

        gate = linear(c.intermediate_size, "gate_proj")(x, context)
        up = linear(c.intermediate_size, "up_proj")(x, context)
        return linear(c.hidden_size, "down_proj")(activation(c.hidden_activation)(gate) * up, context)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, slides, turn, masks, cos, sin):
        """`masks`: of a layer that slides and of one that does not; `turn`: which rotation, along the first axis."""
        c = self.config

        def norm(name):
            return RMSNorm(c.rms_norm_eps, name=name)

        seen = context._replace(mask=jnp.where(slides, *masks))
        h = norm("input_layernorm")(x)
        y, cache = Attention(c, name="self_attn")(h, cache, seen, cos[turn], sin[turn])
        y = norm("post_attention_layernorm")(y)
        x = x + hook(self, "attention_output", y, x=h, context=context)
        h = norm("pre_feedforward_layernorm")(x)
        y = norm("post_feedforward_layernorm")(MLP(c, name="mlp")(h, context))
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return x + y, cache


class Base(nn.Module):
    """Embedding times the root of the width, blocks and the last norm."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        rows = (c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)
        self.embed_tokens = Embed(*rows, scale=c.hidden_size**0.5)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c = self.config
        x = self.embed_tokens(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        positions = hook(self, "shift", positions, x=input_ids, context=None)
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        sliding = np.array([kind == SLIDING for kind in c.layer_types], bool)
        assert context.mask is not None  # `causal_context` gives one
        near = window(context.mask, c.sliding_window) if c.sliding_window and sliding.any() else context.mask
        ropes = _ropes(c)
        turns = jnp.asarray(sliding & (len(ropes) > 1), jnp.int32)
        angles = (rope_angles(p, c.head_dim, c.max_position_embeddings, positions) for p in ropes.values())
        angles = (jnp.stack(a) for a in zip(*angles, strict=True))

        def block(name):
            return Layer(c, name=name)

        layers = None if cache is None else cache.layers
        each, args = (jnp.asarray(sliding), turns), ((near, context.mask), *angles)
        x, layers = run_blocks(
            self, block, "layers", c.num_hidden_layers, x, context, layers, *args, each=each, remat=self.remat
        )
        x = RMSNorm(c.rms_norm_eps, name="norm")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.embed_tokens.attend(x)


def _is_gemma3(c: Config) -> bool:
    return c.model_type == "gemma3_text"


def _ropes(c: Config) -> dict[str, Mapping]:
    """Type of layer -> rope parameters, that of full attention first; of Gemma 2 one for all."""
    return {kind: c.rope_parameters[kind] for kind in (FULL, SLIDING)} if _is_gemma3(c) else {FULL: c.rope_parameters}


def _capped(c: Config, logits):
    cap = c.final_logit_softcapping
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    d, ff, size = c.hidden_size, c.intermediate_size, c.head_dim
    heads = (c.num_attention_heads, c.num_key_value_heads, size)
    tied = head == "causal-lm" and c.tie_word_embeddings
    rows = [
        Site("model", "positions", width=d),
        Site("model", "input", width=d),
        Site("model/embed_tokens/embedding", "embedding", width=d, tied=tied, scale=d**0.5),
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
            Site(f"{at}/mlp/gate_proj/kernel", "mlp_in", i, ff),
            Site(f"{at}/mlp/up_proj/kernel", "mlp_in", i, ff),
            Site(f"{at}/mlp/down_proj/kernel", "mlp_out", i, d),
            *(Site(f"{at}/{when}_layernorm/scale", "norm", i, d) for when in ("input", "post_attention")),
            *(Site(f"{at}/{when}_feedforward_layernorm/scale", "norm", i, d) for when in ("pre", "post")),
        ]
        if _is_gemma3(c):
            rows += [Site(f"{at}/self_attn/{x}_norm/scale", "norm", i, size) for x in "qk"]
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
    if unknown := sorted({str(kind) for kind in c.layer_types} - {FULL, SLIDING}):
        raise ValueError(f"the layer_types {unknown} are not supported; supported are {[FULL, SLIDING]}")
    if len(c.layer_types) != c.num_hidden_layers:
        raise ValueError(f"layer_types names {len(c.layer_types)} layers, and num_hidden_layers {c.num_hidden_layers}")
    if SLIDING in c.layer_types and (c.sliding_window is None or c.sliding_window < 1):
        raise ValueError(f"layers of {SLIDING} need a sliding_window of at least 1; got {c.sliding_window!r}")
    if not c.query_pre_attn_scalar > 0:
        raise ValueError(f"query_pre_attn_scalar must be above 0; got {c.query_pre_attn_scalar!r}")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (cap := getattr(c, key)) is not None and not cap > 0:
            raise ValueError(f"{key} must be above 0, or None for no cap; got {cap!r}")
    for parameters in _ropes(c).values():
        check_rope(parameters, c.head_dim)
    activation(c.hidden_activation)


def _family(name: str, heads: Mapping[str, str], **rest) -> Family:
    return Family(
        name=name,
        config=Config,
        module=functools.partial(Decoder, body=Base, at="model", cap=_capped),
        sites=sites,
        base="model",
        heads=heads,
        unused=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", r"lm_head\.weight", r"score\.weight"),
        bias_keys=("attention_bias",),
        check=_check,
        cache_shape=lambda c: (c.num_hidden_layers, c.num_key_value_heads, c.head_dim),
        **rest,
    )


GEMMA2 = _family(
    "gemma2",
    {
        "Gemma2Model": "none",
        "Gemma2ForCausalLM": "causal-lm",
        "Gemma2ForSequenceClassification": "classification",
    },
    fixed={"use_bidirectional_attention": False},
    # transformers reads hidden_activation and sliding_window instead of the two older keys
    harmless=("hidden_act", "sliding_window_size", "cache_implementation"),
)
GEMMA3 = _family(
    "gemma3_text",
    {
        "Gemma3TextModel": "none",
        "Gemma3ForCausalLM": "causal-lm",
        "Gemma3TextForSequenceClassification": "classification",
    },
    # transformers' Gemma 3 takes a cap of the scores and does not apply it
    fixed={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
    # the pattern is in layer_types
    harmless=("sliding_window_pattern", "_sliding_window_pattern", "cache_implementation"),
)
