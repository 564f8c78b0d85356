"""BART (Lewis et al. 2020, arXiv:1910.13461): post-norm encoder and decoder with learned positions.

Virtual tokens of a prefix have keys and values and no positions: a text counts its own from 0 with a prefix or without,
as in the code of He et al. 2022 (arXiv:2110.04366). Those of a prompt stand before the encoder's text and have the
first positions; they are added to words that `scale_embedding` has scaled already.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import weights
from ..methods.base import Site
from .base import Family
from .encoder_decoder import EncoderDecoder, halves, keys_and_values
from .layers import Context, Embed, LayerNorm, Linear, activation, attention, hook, read, run_blocks

OFFSET = 2  # rows of the tables of positions that no text reads
EPS = 1e-5


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    d_model: int
    encoder_layers: int
    decoder_layers: int
    encoder_attention_heads: int
    decoder_attention_heads: int
    encoder_ffn_dim: int
    decoder_ffn_dim: int
    activation_function: str
    dropout: float
    attention_dropout: float
    activation_dropout: float
    classifier_dropout: float
    max_position_embeddings: int
    init_std: float
    scale_embedding: bool  # the words by sqrt(d_model), on the way in only
    decoder_start_token_id: int
    eos_token_id: int | None
    num_labels: int


class Attention(nn.Module):
    config: Config
    heads: int

    @nn.compact
    def __call__(self, x, source, cache, context: Context):
        """`source`: what keys and values are made from; None: the cache holds them all."""
        c = self.config

        def heads(name, x):
            y = Linear(c.d_model, std=c.init_std, name=name)(x, context)
            return y.reshape(*x.shape[:2], self.heads, -1)

        q = heads("q_proj", x)
        k, v, cache = keys_and_values(
            lambda source: (heads("k_proj", source), heads("v_proj", source)), source, cache, context.index
        )
        k, v = hook(self, "prefix", (k, v), x=x, context=context)
        y = attention(self, q, k, v, context.mask, dropout=c.attention_dropout, deterministic=context.deterministic)
        return Linear(c.d_model, std=c.init_std, name="out_proj")(y, context), cache


class Layer(nn.Module):
    """Of the encoder, or, with cross-attention, of the decoder."""

    config: Config
    decodes: bool

    @nn.compact
    def __call__(self, x, cache, context: Context, memory=None, source=None):
        """`memory`: the encoder's states, None where the cache has their keys; `source`: which may be looked at."""
        c = self.config
        own, cross = halves(cache)

        def drop(y, rate=c.dropout):
            return nn.Dropout(rate)(y, deterministic=context.deterministic)

        def add(name, norm, y, context=context):
            y = hook(self, name, drop(y), x=x, context=context)
            return LayerNorm(EPS, name=norm)(x + y)

        def attend(name, source, cache, context):
            heads = c.decoder_attention_heads if self.decodes else c.encoder_attention_heads
            return Attention(c, heads, name=name)(x, source, cache, context)

        y, own = attend("self_attn", x, own, context)
        x = add("attention_output", "self_attn_layer_norm", y)
        if self.decodes:
            across = context._replace(mask=source, index=None if cache is None else 0)
            y, cross = attend("encoder_attn", memory, cross, across)
            x = add("cross_attention_output", "encoder_attn_layer_norm", y, across)
        width = c.decoder_ffn_dim if self.decodes else c.encoder_ffn_dim
        y = activation(c.activation_function)(Linear(width, std=c.init_std, name="fc1")(x, context))
        y = Linear(c.d_model, std=c.init_std, name="fc2")(drop(y, c.activation_dropout), context)
        y = hook(self, "after_mlp", add("mlp_output", "final_layer_norm", y), x=x, context=context)
        return y, None if cache is None else (*own, *cross)


class Stack(nn.Module):
    """Adds positions to the embedded text, then norm and blocks."""

    config: Config
    decodes: bool
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x, cache, context: Context, *args):
        c, seen = self.config, context.mask
        assert seen is not None  # `Base` gives one
        most = c.max_position_embeddings
        if seen.shape[-1] > most:
            raise ValueError(f"{seen.shape[-1]} tokens, virtual ones included, are more than the {most} positions")
        table = Embed(most + OFFSET, c.d_model, self.dtype, c.init_std, name="embed_positions")
        x = LayerNorm(EPS, name="layernorm_embedding")(x + table(context.positions + OFFSET))
        x = nn.Dropout(c.dropout)(x, deterministic=context.deterministic)

        def block(name):
            return Layer(c, self.decodes, name=name)

        layers = c.decoder_layers if self.decodes else c.encoder_layers
        return run_blocks(self, block, "layers", layers, x, context, cache, *args, remat=self.remat)


def unembed(module: nn.Module, base: Any, x: jax.Array) -> jax.Array:
    """The tied head and a bias, which is a buffer in transformers: no gradient reaches it."""
    bias = read(module, "final_logits_bias", nn.initializers.zeros, (1, module.config.vocab_size))
    bias = jax.lax.stop_gradient(weights.materialize(bias).astype(jnp.float32))
    return base.attend(x).astype(jnp.float32) + bias


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; layers are counted through the encoder, then the decoder.

    There is no site of the kind 'positions': nothing moves them.
    """
    d = c.d_model
    rows = [
        Site("model", "input", width=d),
        Site("model/shared/embedding", "embedding", width=d, tied=head == "seq2seq-lm"),
    ]
    layer = 0
    for stack, n, heads, ff in (
        ("encoder", c.encoder_layers, c.encoder_attention_heads, c.encoder_ffn_dim),
        ("decoder", c.decoder_layers, c.decoder_attention_heads, c.decoder_ffn_dim),
    ):
        top = f"model/{stack}"
        rows += [
            Site(f"{top}/embed_positions/embedding", "embedding_other", width=d),
            Site(f"{top}/layernorm_embedding/scale", "norm", width=d),
        ]
        for i in range(layer, layer + n):
            at = f"{top}/layers_{i - layer}"
            rows.append(Site(at, "block", i, d))
            for name in ("self_attn", "encoder_attn")[: 1 + (stack == "decoder")]:
                kinds = ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "attention_out")
                rows += [
                    Site(f"{at}/{name}", "attention", i, d, (heads, heads, d // heads)),
                    *(Site(f"{at}/{name}/{linear}/kernel", kind, i, d) for linear, kind in kinds),
                    Site(f"{at}/{name}_layer_norm/scale", "norm", i, d),
                ]
            rows += [
                Site(f"{at}/fc1/kernel", "mlp_in", i, ff),
                Site(f"{at}/fc2/kernel", "mlp_out", i, d),
                Site(f"{at}/final_layer_norm/scale", "norm", i, d),
            ]
        layer += n
    if head == "classification":
        rows.append(Site("classification_head/dense/kernel", "head", width=d))
        rows.append(Site("classification_head/out_proj/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    for stack, heads in (("encoder", c.encoder_attention_heads), ("decoder", c.decoder_attention_heads)):
        if c.d_model % heads:
            raise ValueError(f"d_model {c.d_model} does not divide into {heads} {stack}_attention_heads")
    if not isinstance(c.decoder_start_token_id, int):
        raise ValueError(f"decoder_start_token_id must be one token; got {c.decoder_start_token_id!r}")
    if c.eos_token_id is not None and not isinstance(c.eos_token_id, int):
        raise ValueError(f"eos_token_id must be one token; got {c.eos_token_id!r}")
    activation(c.activation_function)


FAMILY = Family(
    name="bart",
    config=Config,
    module=functools.partial(
        EncoderDecoder,
        stack=Stack,
        unembed=unembed,
        std=lambda c: c.init_std,
        scale=lambda c: c.d_model**0.5 if c.scale_embedding else 1.0,
        head_std=lambda c: c.init_std,
    ),
    sites=sites,
    base="model",
    heads={
        "BartModel": "none",
        "BartForConditionalGeneration": "seq2seq-lm",
        "BartForSequenceClassification": "classification",
    },
    unused=(
        r"(model\.)?(encoder|decoder)\.version",
        r"final_logits_bias",
        r"lm_head\.weight",
        r"classification_head\.(dense|out_proj)\.(weight|bias)",
    ),
    zero=("final_logits_bias",),
    fixed={
        "is_encoder_decoder": True,
        "is_decoder": False,
        "tie_word_embeddings": True,  # without it, transformers reads three tables of words
        # of an older transformers, which had mBART and others in this class
        "normalize_before": False,
        "normalize_embedding": True,
        "add_final_layer_norm": False,
        "add_bias_logits": False,
        "static_position_embeddings": False,
        "extra_pos_embeddings": OFFSET,
    },
    harmless=(  # of generation, see `hub.Model.forced`; of an older transformers, in names that are honoured now
        "forced_bos_token_id",
        "forced_eos_token_id",
        "force_bos_token_to_be_generated",
        "prefix",
        "classif_dropout",
        "save_step",  # of distillation, as the next
        "replacing_rate",
    ),
    check=_check,
    cache_shape=lambda c: (c.decoder_layers, c.decoder_attention_heads, c.d_model // c.decoder_attention_heads),
    start_id=lambda c: c.decoder_start_token_id,
    copies=(r"(model\.)?(encoder|decoder)\.embed_tokens\.weight",),
)
