"""BERT (Devlin et al. 2019, arXiv:1810.04805): post-norm encoder with learned positions and a pooler."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from ..methods.base import Site
from .base import Family
from .layers import Context, Embed, LayerNorm, Linear, Output, activation, attention, begin, hook, run_blocks


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    classifier_dropout: float | None
    num_labels: int


class Embeddings(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, input_ids, mask, type_ids, before, deterministic):
        """`before`: word embeddings -> (the same with virtual tokens of type 0 before them, positions)."""
        c = self.config

        def table(rows, name):
            return Embed(rows, c.hidden_size, self.dtype, c.initializer_range, name=name)

        x, positions = before(table(c.vocab_size, "word_embeddings")(input_ids, mask))
        type_ids = jnp.pad(type_ids, ((0, 0), (x.shape[1] - type_ids.shape[1], 0)))
        x = x + table(c.type_vocab_size, "token_type_embeddings")(type_ids)
        x = x + table(c.max_position_embeddings, "position_embeddings")(positions)
        x = LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class SelfAttention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def heads(name):
            y = Linear(c.hidden_size, std=c.initializer_range, name=name)(x, context)
            return y.reshape(*y.shape[:2], c.num_attention_heads, -1)

        q = heads("query")
        k, v = hook(self, "prefix", (heads("key"), heads("value")), x=x, context=context)
        drop = c.attention_probs_dropout_prob
        return attention(self, q, k, v, context.mask, dropout=drop, deterministic=context.deterministic)


class Projection(nn.Module):
    """Dense, dropout, the block's hook, residual sum and norm: how both halves of a BERT block end."""

    config: Any  # BERT's, or of a family with these keys

    @nn.compact
    def __call__(self, y, residual, context, after):
        c = self.config
        y = Linear(c.hidden_size, std=c.initializer_range, name="dense")(y, context)
        y = nn.Dropout(c.hidden_dropout_prob)(y, deterministic=context.deterministic)
        return LayerNorm(c.layer_norm_eps, name="LayerNorm")(after(y) + residual)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context, after):
        y = SelfAttention(self.config, name="self")(x, context)
        return Projection(self.config, name="output")(y, x, context, after)


class Intermediate(nn.Module):
    config: Any  # BERT's, or of a family with these keys

    @nn.compact
    def __call__(self, x, context):
        c = self.config
        y = Linear(c.intermediate_size, std=c.initializer_range, name="dense")(x, context)
        return activation(c.hidden_act)(y)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context):
        def after(name, x):
            return lambda y: hook(self, name, y, x=x, context=context)

        x = Attention(self.config, name="attention")(x, context, after("attention_output", x))
        y = Intermediate(self.config, name="intermediate")(x, context)
        y = Projection(self.config, name="output")(y, x, context, after("mlp_output", x))
        return after("after_mlp", x)(y), cache


class Encoder(nn.Module):
    config: Config
    remat: bool

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def block(name):
            return Layer(c, name=name)

        x, _ = run_blocks(self, block, "layer", c.num_hidden_layers, x, context, None, remat=self.remat)
        return x


class Pooler(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        return jnp.tanh(Linear(c.hidden_size, std=c.initializer_range, name="dense")(x[:, 0]))


class Base(nn.Module):
    """Embeddings, blocks and pooler."""

    config: Config
    dtype: Any
    remat: bool

    @nn.compact
    def __call__(self, input_ids, attention_mask, type_ids, positions, deterministic):
        c = self.config
        shift = hook(self, "shift", 0, x=input_ids, context=None)
        mask, n = attention_mask, 0

        def before(x):
            nonlocal mask, positions, n
            x, mask, positions, n = begin(self, x, mask, positions)
            if x.shape[1] + shift > c.max_position_embeddings:
                raise ValueError(
                    f"{input_ids.shape[1]} tokens after {n + shift} virtual ones are more than the "
                    f"{c.max_position_embeddings} positions of this model"
                )
            positions = positions + shift
            return x, positions

        x = Embeddings(c, self.dtype, name="embeddings")(input_ids, attention_mask, type_ids, before, deterministic)
        context = Context(mask[:, None, None, :].astype(bool), positions, deterministic=deterministic)
        x = Encoder(c, self.remat, name="encoder")(x, context)[:, n:]
        return x, Pooler(c, name="pooler")(x)


class Bert(nn.Module):
    """BERT with or without a classification head.

    Attributes:
      config: sizes and rates.
      head: 'none' or 'classification' (with one label: regression).
      dtype: of the activations.
      remat: recompute each block's activations in the backward pass.
    """

    config: Config
    head: str = "none"
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, type_ids=None, positions=None, cache=None, deterministic=True):
        """Token ids (batch, length) -> `Output`; the mask is 1 at tokens and 0 at padding, on either side."""
        c, (_, length) = self.config, input_ids.shape
        if length > c.max_position_embeddings:
            raise ValueError(f"{length} tokens are more than the {c.max_position_embeddings} positions of this model")
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if type_ids is None else type_ids
        base = Base(c, self.dtype, self.remat, name="bert")
        hidden, pooled = base(input_ids, mask, types, positions, deterministic)
        if self.head == "none":
            return Output(hidden, pooled)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        x = nn.Dropout(rate)(pooled, deterministic=deterministic)
        logits = Linear(c.num_labels, std=c.initializer_range, name="classifier")(x)
        return Output(hidden, pooled, logits.astype(jnp.float32))


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    d, ff = c.hidden_size, c.intermediate_size
    heads = (c.num_attention_heads, c.num_attention_heads, d // c.num_attention_heads)
    rows = [
        Site("bert", "positions", width=d),
        Site("bert", "input", width=d),
        Site("bert/embeddings/word_embeddings/embedding", "embedding", width=d),
        Site("bert/embeddings/token_type_embeddings/embedding", "embedding_other", width=d),
        Site("bert/embeddings/position_embeddings/embedding", "embedding_other", width=d),
        Site("bert/embeddings/LayerNorm/scale", "norm", width=d),
    ]
    for i in range(c.num_hidden_layers):
        at = f"bert/encoder/layer_{i}"
        rows += [
            Site(at, "block", i, d),
            Site(f"{at}/attention/self", "attention", i, d, heads),
            *(Site(f"{at}/attention/self/{k}/kernel", k, i, d) for k in ("query", "key", "value")),
            Site(f"{at}/attention/output/dense/kernel", "attention_out", i, d),
            Site(f"{at}/attention/output/LayerNorm/scale", "norm", i, d),
            Site(f"{at}/intermediate/dense/kernel", "mlp_in", i, ff),
            Site(f"{at}/output/dense/kernel", "mlp_out", i, d),
            Site(f"{at}/output/LayerNorm/scale", "norm", i, d),
        ]
    rows.append(Site("bert/pooler/dense/kernel", "pooler", width=d))
    if head == "classification":
        rows.append(Site("classifier/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.num_attention_heads} attention heads")
    activation(c.hidden_act)


FAMILY = Family(
    name="bert",
    config=Config,
    module=Bert,
    sites=sites,
    base="bert",
    heads={"BertModel": "none", "BertForSequenceClassification": "classification"},
    unused=(r"cls\..*", r"(bert\.)?embeddings\.position_ids", r"classifier\.(weight|bias)"),
    renames=((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias")),
    fixed={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"},
    check=_check,
    max_length=lambda c: c.max_position_embeddings,
)
