"""OPT (Zhang et al. 2022, arXiv:2205.01068): decoder with learned positions, counted over tokens; pre- or post-norm.

Paths here leave out the files' `decoder`: `model/layers_0/fc1/kernel` is `model.decoder.layers.0.fc1.weight`.
"""

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
    optional,
    run_blocks,
    write_cache,
)

EPS = 1e-5  # of the norms
OFFSET = 2  # rows of the table of positions before position 0; row 1 is padding's


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    ffn_dim: int
    max_position_embeddings: int
    do_layer_norm_before: bool  # else after each sum, as in the 350M model
    remove_final_layer_norm: bool  # `_remove_final_layer_norm` in files
    word_embed_proj_dim: int  # features of the embedding; other than hidden_size: projected in and out
    dropout: float
    attention_dropout: float
    activation_function: str
    init_std: float
    enable_bias: bool
    layer_norm_elementwise_affine: bool
    tie_word_embeddings: bool
    num_labels: int

    @property
    def initializer_range(self) -> float:
        return self.init_std

    @property
    def projects(self) -> bool:
        return self.word_embed_proj_dim != self.hidden_size

    @property
    def last_norm(self) -> bool:
        return self.do_layer_norm_before and not self.remove_final_layer_norm


def _norm(c: Config, name: str) -> LayerNorm:
    return LayerNorm(EPS, c.layer_norm_elementwise_affine, name=name)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context):
        c = self.config

        def project(name):
            y = Linear(c.hidden_size, c.enable_bias, c.init_std, name=name)(x, context)
            return y.reshape(*x.shape[:2], c.num_attention_heads, -1)

        q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
        if cache is not None and context.index is not None:
            k, v = cache = write_cache(cache, k, v, context.index)
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        drop = c.attention_dropout
        causal, fixed = context.causal, context.deterministic
        y = attention(self, q, k, v, context.mask, causal=causal, dropout=drop, deterministic=fixed)
        return Linear(c.hidden_size, c.enable_bias, c.init_std, name="out_proj")(y, context), cache


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context):
        c = self.config
        first = c.do_layer_norm_before

        def drop(y):
            return nn.Dropout(c.dropout)(y, deterministic=context.deterministic)

        norm = _norm(c, "self_attn_layer_norm")
        h = norm(x) if first else x
        y, cache = Attention(c, name="self_attn")(h, cache, context)
        x = x + hook(self, "attention_output", drop(y), x=h, context=context)
        x = x if first else norm(x)
        norm = _norm(c, "final_layer_norm")
        h = norm(x) if first else x
        y = activation(c.activation_function)(Linear(c.ffn_dim, c.enable_bias, c.init_std, name="fc1")(h, context))
        y = drop(Linear(c.hidden_size, c.enable_bias, c.init_std, name="fc2")(y, context))
        y = hook(self, "mlp_output", y, x=h, context=context)
        if first:
            return x + hook(self, "after_mlp", y, x=h, context=context), cache
        return hook(self, "after_mlp", norm(x + y), x=h, context=context), cache


class Base(nn.Module):
    """Token and position embeddings, blocks, the last norm, and the projections of a narrower embedding."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.embed_tokens = Embed(c.vocab_size, c.word_embed_proj_dim, self.dtype, c.init_std)
        self.embed_positions = Embed(c.max_position_embeddings + OFFSET, c.hidden_size, self.dtype, c.init_std)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c = self.config
        x = self.embed_tokens(input_ids, attention_mask if segments is None else segments)
        if positions is None:  # of the text's own tokens: padding counts for nothing, on either side
            positions = jnp.cumsum(attention_mask, axis=1, dtype=attention_mask.dtype) * attention_mask - 1
            if cache is not None:
                prompt = optional(self, "prompt")
                before = cache.valid.sum(1, keepdims=True, dtype=positions.dtype)
                positions = positions + before - (prompt.n if prompt is not None and continued else 0)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        shift = hook(self, "shift", 0, x=input_ids, context=None)
        length = x.shape[1] if cache is None else cache.valid.shape[1]
        if length + shift > c.max_position_embeddings:
            after = f" after {n + shift} virtual ones" if n + shift else ""
            raise ValueError(
                f"{length - n} tokens{after} are more than the {c.max_position_embeddings} positions of this model"
            )
        positions = positions + shift
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        if c.projects:
            x = Linear(c.hidden_size, False, c.init_std, name="project_in")(x)
        x = x + self.embed_positions(positions + OFFSET)

        def block(name):
            return Layer(c, name=name)

        layers = None if cache is None else cache.layers
        x, layers = run_blocks(self, block, "layers", c.num_hidden_layers, x, context, layers, remat=self.remat)
        x = x[:, n:]
        if c.last_norm:
            x = _norm(c, "final_layer_norm")(x)
        if c.projects:
            x = Linear(c.word_embed_proj_dim, False, c.init_std, name="project_out")(x)
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.embed_tokens.attend(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    d, narrow = c.hidden_size, c.word_embed_proj_dim
    heads = (c.num_attention_heads, c.num_attention_heads, d // c.num_attention_heads)
    tied = head == "causal-lm" and c.tie_word_embeddings

    def norm(at, i=None):
        return [Site(f"{at}/scale", "norm", i, d)] if c.layer_norm_elementwise_affine else []

    rows = [
        Site("model", "positions", width=d),
        Site("model", "input", width=narrow),
        Site("model/embed_tokens/embedding", "embedding", width=narrow, tied=tied),
        Site("model/embed_positions/embedding", "embedding_other", width=d),
    ]
    for i in range(c.num_hidden_layers):
        at = f"model/layers_{i}"
        rows += [
            Site(at, "block", i, d),
            Site(f"{at}/self_attn", "attention", i, d, heads),
            *(Site(f"{at}/self_attn/{k[0]}_proj/kernel", k, i, d) for k in ("query", "key", "value")),
            Site(f"{at}/self_attn/out_proj/kernel", "attention_out", i, d),
            *norm(f"{at}/self_attn_layer_norm", i),
            Site(f"{at}/fc1/kernel", "mlp_in", i, c.ffn_dim),
            Site(f"{at}/fc2/kernel", "mlp_out", i, d),
            *norm(f"{at}/final_layer_norm", i),
        ]
    rows += norm("model/final_layer_norm") if c.last_norm else []
    if head == "causal-lm" and not tied:
        rows.append(Site("lm_head/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("score/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.num_attention_heads} attention heads")
    activation(c.activation_function)


FAMILY = Family(
    name="opt",
    config=Config,
    module=functools.partial(Decoder, body=Base, at="model"),
    sites=sites,
    base="model",
    heads={
        "OPTModel": "none",
        "OPTForCausalLM": "causal-lm",
        "OPTForSequenceClassification": "classification",
    },
    unused=(r"(model\.)?decoder\.version", r"lm_head\.weight", r"score\.weight"),
    fixed={"layerdrop": 0.0, "learned_embeddings": True, "scale_embeddings": False},  # the last two: Galactica's
    harmless=("activation_dropout", "prefix"),  # transformers reads neither
    bias_keys=("enable_bias",),
    check=_check,
    cache_shape=lambda c: (c.num_hidden_layers, c.num_attention_heads, c.hidden_size // c.num_attention_heads),
    max_length=lambda c: c.max_position_embeddings,
    places=((r"^model/", "model/decoder/"),),
)
