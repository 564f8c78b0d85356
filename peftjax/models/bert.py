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
    config: Any
    width: int
    dtype: Any

    @nn.compact
    def __call__(self, input_ids, mask, type_ids, before, deterministic):
        """`before`: word embeddings -> (the same with virtual tokens of type 0 before them, positions)."""
        c = self.config

        def table(rows, name):
            return Embed(rows, self.width, self.dtype, c.initializer_range, name=name)

        x, positions = before(table(c.vocab_size, "word_embeddings")(input_ids, mask))
        type_ids = jnp.pad(type_ids, ((0, 0), (x.shape[1] - type_ids.shape[1], 0)))
        x = x + table(c.type_vocab_size, "token_type_embeddings")(type_ids)
        x = x + table(c.max_position_embeddings, "position_embeddings")(positions)
        x = LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class SelfAttention(nn.Module):
    config: Any

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
    config: Any

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
    config: Any

    @nn.compact
    def __call__(self, x, cache, context: Context):
        def after(name, x):
            return lambda y: hook(self, name, y, x=x, context=context)

        x = Attention(self.config, name="attention")(x, context, after("attention_output", x))
        y = Intermediate(self.config, name="intermediate")(x, context)
        y = Projection(self.config, name="output")(y, x, context, after("mlp_output", x))
        return after("after_mlp", x)(y), cache


class Encoder(nn.Module):
    config: Any
    remat: str

    @nn.compact
    def __call__(self, x, context):
        c = self.config

        def block(name):
            return Layer(c, name=name)

        x, _ = run_blocks(self, block, "layer", c.num_hidden_layers, x, context, None, remat=self.remat)
        return x


class Pooler(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x):
        c = self.config
        return jnp.tanh(Linear(c.hidden_size, std=c.initializer_range, name="dense")(x[:, 0]))


class Base(nn.Module):
    """Embeddings, blocks and, where there is one, the pooler; the attributes are those of `Bert`."""

    config: Any
    dtype: Any
    remat: str
    pools: bool
    padding: int | None
    width: int

    @nn.compact
    def __call__(self, input_ids, attention_mask, type_ids, positions, deterministic):
        c = self.config
        shift = hook(self, "shift", 0, x=input_ids, context=None)
        mask, n = attention_mask, 0
        if self.padding is not None and positions is None:
            positions = jnp.cumsum(attention_mask, axis=1) - 1

        def before(x):
            nonlocal mask, positions, n
            x, mask, positions, n = begin(self, x, mask, positions)
            if x.shape[1] + shift > (room := positions_of(c, self.padding)):
                raise ValueError(
                    f"{input_ids.shape[1]} tokens after {n + shift} virtual ones are more than the "
                    f"{room} positions of this model"
                )
            positions = positions + shift
            if self.padding is None:
                return x, positions
            return x, jnp.where(mask > 0, positions + self.padding + 1, self.padding)

        embeddings = Embeddings(c, self.width, self.dtype, name="embeddings")
        x = embeddings(input_ids, attention_mask, type_ids, before, deterministic)
        context = Context(mask[:, None, None, :].astype(bool), positions, deterministic=deterministic)
        if self.width != c.hidden_size:
            x = Linear(c.hidden_size, std=c.initializer_range, name="embeddings_project")(x, context)
        x = Encoder(c, self.remat, name="encoder")(x, context)[:, n:]
        pools = self.pools and (self.is_initializing() or self.has_variable("params", "pooler"))
        return x, Pooler(c, name="pooler")(x) if pools else None


def positions_of(c: Any, padding: int | None = None) -> int:
    """How many tokens have a position: the table's rows, less those of padding and before it."""
    return c.max_position_embeddings - (0 if padding is None else padding + 1)


class Classifier(nn.Module):
    """A head with a dense layer of its own, on the first token's states."""

    config: Any
    act: str
    rate: float

    @nn.compact
    def __call__(self, x, deterministic):
        c = self.config

        def linear(features, name, x):
            x = nn.Dropout(self.rate)(x, deterministic=deterministic)
            return Linear(features, std=c.initializer_range, name=name)(x)

        return linear(c.num_labels, "out_proj", activation(self.act)(linear(c.hidden_size, "dense", x)))


class Bert(nn.Module):
    """BERT, and encoders that are BERT but for what the attributes say, with or without a classification head.

    Attributes:
      config: sizes and rates.
      head: 'none' or 'classification' (with one label: regression).
      dtype: of the activations.
      remat: which activations of a block are kept for the backward pass, see `layers.REMAT`.
      at: the name of the base in the tree.
      pools: whether the base has a pooler; without a head it does without one that the tree has not.
      act: of a classifier with a dense layer of its own; None: the classifier reads the pooler.
      padding: the position of padding; tokens, which the mask tells, are counted from the next one on. None: columns
        are counted from 0, whatever they hold.
      width: of the embeddings; where the blocks have another, a linear layer leads from one to the other.
    """

    config: Any
    head: str = "none"
    dtype: Any = jnp.float32
    remat: str = "none"
    at: str = "bert"
    pools: bool = True
    act: str | None = None
    padding: int | None = None
    width: int | None = None

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, type_ids=None, positions=None, cache=None, deterministic=True):
        """Token ids (batch, length) -> `Output`; the mask is 1 at tokens and 0 at padding, on either side.

        Positions that are given are counted from 0, whatever the position of padding.
        """
        c, (_, length) = self.config, input_ids.shape
        if length > (room := positions_of(c, self.padding)):
            raise ValueError(f"{length} tokens are more than the {room} positions of this model")
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if type_ids is None else type_ids
        width = c.hidden_size if self.width is None else self.width
        base = Base(c, self.dtype, self.remat, self.pools, self.padding, width, name=self.at)
        hidden, pooled = base(input_ids, mask, types, positions, deterministic)
        if self.head == "none":
            return Output(hidden, pooled)
        rate = c.hidden_dropout_prob if c.classifier_dropout is None else c.classifier_dropout
        if self.act is None:
            x = nn.Dropout(rate)(pooled, deterministic=deterministic)
            logits = Linear(c.num_labels, std=c.initializer_range, name="classifier")(x)
        else:
            logits = Classifier(c, self.act, rate, name="classifier")(hidden[:, 0], deterministic)
        return Output(hidden, pooled, logits.astype(jnp.float32))


def sites(
    c: Any, head: str, *, at: str = "bert", pools: bool = True, act: str | None = None, width: int | None = None
) -> tuple[Site, ...]:
    """Where methods may act, per layer; the keywords are attributes of `Bert`."""
    d, ff, wide = c.hidden_size, c.intermediate_size, c.hidden_size if width is None else width
    heads = (c.num_attention_heads, c.num_attention_heads, d // c.num_attention_heads)
    rows = [
        Site(at, "positions", width=wide),
        Site(at, "input", width=wide),
        Site(f"{at}/embeddings/word_embeddings/embedding", "embedding", width=wide),
        Site(f"{at}/embeddings/token_type_embeddings/embedding", "embedding_other", width=wide),
        Site(f"{at}/embeddings/position_embeddings/embedding", "embedding_other", width=wide),
        Site(f"{at}/embeddings/LayerNorm/scale", "norm", width=wide),
    ]
    if wide != d:
        rows.append(Site(f"{at}/embeddings_project/kernel", "projection", width=d))
    for i in range(c.num_hidden_layers):
        layer = f"{at}/encoder/layer_{i}"
        rows += [
            Site(layer, "block", i, d),
            Site(f"{layer}/attention/self", "attention", i, d, heads),
            *(Site(f"{layer}/attention/self/{k}/kernel", k, i, d) for k in ("query", "key", "value")),
            Site(f"{layer}/attention/output/dense/kernel", "attention_out", i, d),
            Site(f"{layer}/attention/output/LayerNorm/scale", "norm", i, d),
            Site(f"{layer}/intermediate/dense/kernel", "mlp_in", i, ff),
            Site(f"{layer}/output/dense/kernel", "mlp_out", i, d),
            Site(f"{layer}/output/LayerNorm/scale", "norm", i, d),
        ]
    if pools:
        rows.append(Site(f"{at}/pooler/dense/kernel", "pooler", width=d))
    if head == "classification" and act is None:
        rows.append(Site("classifier/kernel", "head", width=c.num_labels))
    elif head == "classification":
        rows.append(Site("classifier/dense/kernel", "head", width=d))
        rows.append(Site("classifier/out_proj/kernel", "head", width=c.num_labels))
    return tuple(rows)


def check(c: Any) -> None:
    """Raises for a config that the blocks cannot honour."""
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.num_attention_heads} attention heads")
    activation(c.hidden_act)


RENAMES = ((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias"))
FIXED = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
FAMILY = Family(
    name="bert",
    config=Config,
    module=Bert,
    sites=sites,
    base="bert",
    heads={"BertModel": "none", "BertForSequenceClassification": "classification"},
    unused=(r"cls\..*", r"(bert\.)?embeddings\.position_ids", r"classifier\.(weight|bias)"),
    renames=RENAMES,
    fixed=FIXED,
    check=check,
    max_length=lambda c: c.max_position_embeddings,
)
