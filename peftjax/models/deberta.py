"""DeBERTa (He et al. 2021, arXiv:2006.03654), versions 2 and 3: post-norm encoder with disentangled attention.

Version 3 (arXiv:2111.09543) has the same module as version 2, trained otherwise.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .. import weights
from ..methods.base import Site
from .base import Family
from .bert import Intermediate, Projection
from .layers import Context, Embed, LayerNorm, Linear, Output, activation, attention, begin, hook, read, run_blocks

TERMS = ("c2p", "p2c")  # content to position, position to content


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    embedding_size: int | None  # None: hidden_size
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    attention_head_size: int | None
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    position_biased_input: bool  # learned absolute positions beside the relative ones
    relative_attention: bool
    pos_att_type: list[str] | None  # which of TERMS the scores have
    share_att_key: bool  # positions are projected by the matrices of the contents
    position_buckets: int
    max_relative_positions: int
    norm_rel_ebd: str
    conv_kernel_size: int
    conv_groups: int
    conv_act: str
    initializer_range: float
    layer_norm_eps: float
    pooler_hidden_size: int
    pooler_dropout: float
    pooler_hidden_act: str
    cls_dropout: float | None
    num_labels: int

    @property
    def embedded(self) -> int:
        """The width of a row of the embedding tables."""
        return self.embedding_size or self.hidden_size

    @property
    def furthest(self) -> int:
        """The largest distance that is told apart."""
        return self.max_relative_positions if self.max_relative_positions > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Half the rows of the table of relative positions."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest

    @property
    def terms(self) -> tuple[str, ...]:
        return tuple(t for t in TERMS if t in (self.pos_att_type or ()))

    @property
    def norms_positions(self) -> bool:
        return "layer_norm" in _parts(self.norm_rel_ebd)


def _parts(value: str) -> list[str]:
    return [x.strip() for x in value.lower().split("|")]


def buckets_of(c: Config, length: int) -> np.ndarray:
    """The bucket of each distance 0 ... length - 1: half of them exact, the others logarithmic.

    In float32 as the checkpoints' own code has it: another rounding would choose another bucket at its edges.
    """
    distance = np.arange(length)
    if c.position_buckets <= 0:
        return distance
    exact = c.position_buckets // 2
    share = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    share = share / np.log(np.float32((c.furthest - 1) / exact))
    return np.where(distance <= exact, distance, np.ceil(share * np.float32(exact - 1)).astype(int) + exact)


def relative_rows(c: Config, length: int) -> np.ndarray:
    """(2 length - 1,) rows of the table of relative positions, for query less key = length - 1 ... 1 - length."""
    bucket = buckets_of(c, length)
    signed = np.concatenate([bucket[::-1], -bucket[1:]])
    return np.clip(signed + c.span, 0, 2 * c.span - 1)


def skew(x: jax.Array) -> jax.Array:
    """(..., n, 2 n - 1) -> (..., n, n) with y[i, j] = x[i, n - 1 - i + j]; by reshapes, without a gather.

    >>> skew(jnp.arange(15).reshape(3, 5)).tolist()
    [[2, 3, 4], [6, 7, 8], [10, 11, 12]]
    """
    n, lead = x.shape[-2], x.shape[:-2]
    flat = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)]).reshape(*lead, 2 * n * n)
    return flat[..., n - 1 : n - 1 + n * (2 * n - 1)].reshape(*lead, n, 2 * n - 1)[..., :n]


class Embeddings(nn.Module):
    config: Config
    dtype: Any

    @nn.compact
    def __call__(self, input_ids, mask, type_ids, before, deterministic):
        """`before`: word embeddings -> (the same with virtual tokens of type 0 before them, mask, positions)."""
        c = self.config

        def table(rows, name):
            return Embed(rows, c.embedded, self.dtype, c.initializer_range, name=name)

        x, mask, positions = before(table(c.vocab_size, "word_embeddings")(input_ids, mask))
        if c.position_biased_input:
            x = x + table(c.max_position_embeddings, "position_embeddings")(positions)
        if c.type_vocab_size:
            type_ids = jnp.zeros_like(input_ids) if type_ids is None else type_ids
            type_ids = jnp.pad(type_ids, ((0, 0), (x.shape[1] - type_ids.shape[1], 0)))
            x = x + table(c.type_vocab_size, "token_type_embeddings")(type_ids)
        if c.embedded != c.hidden_size:
            x = Linear(c.hidden_size, False, c.initializer_range, name="embed_proj")(x)
        x = LayerNorm(c.layer_norm_eps, name="LayerNorm")(x)
        x = x * mask[..., None].astype(x.dtype)  # the convolution looks at what is beside a token, padding too
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic=deterministic)


class SelfAttention(nn.Module):
    """Scores `(q_i · k_j + q_i · r^k_(i-j) + k_j · r^q_(i-j)) / sqrt(3 size)` (section 3.1).

    The root counts the terms there are. A prefix's keys stand at no distance and have the first term only, as in
    P-tuning v2's code for this model.
    """

    config: Config

    @nn.compact
    def __call__(self, x, context, table):
        """`table`: (2 span, width) of the relative positions; None without them."""
        c = self.config

        def linear(name):
            return Linear(c.hidden_size, std=c.initializer_range, name=name)

        def heads(y):
            return y.reshape(*y.shape[:2], c.num_attention_heads, -1)

        query, key = linear("query_proj"), linear("key_proj")
        q, own = heads(query(x, context)), heads(key(x, context))
        v = heads(linear("value_proj")(x, context))
        k, v = hook(self, "prefix", (own, v), x=x, context=context)
        scale, bias = (q.shape[-1] * (1 + len(c.terms))) ** -0.5, None
        if table is not None and c.terms:
            table = nn.Dropout(c.hidden_dropout_prob)(table, deterministic=context.deterministic)[None]
            at = relative_rows(c, x.shape[1])
            bias = jnp.zeros((), jnp.float32)
            if "c2p" in c.terms:
                r = heads((key if c.share_att_key else linear("pos_key_proj"))(table))[0, at]
                bias += skew(jnp.einsum("bihd,rhd->bhir", q, r, preferred_element_type=jnp.float32))
            if "p2c" in c.terms:  # by key and query, where the distances are those of the other order
                r = heads((query if c.share_att_key else linear("pos_query_proj"))(table))[0, at[::-1]]
                turned = skew(jnp.einsum("bjhd,rhd->bhjr", own, r, preferred_element_type=jnp.float32))
                bias += turned.swapaxes(2, 3)
            bias = jnp.pad(bias * scale, ((0, 0), (0, 0), (0, 0), (k.shape[1] - own.shape[1], 0)))
        drop, fixed = c.attention_probs_dropout_prob, context.deterministic
        return attention(self, q, k, v, context.mask, bias=bias, scale=scale, dropout=drop, deterministic=fixed)


class Attention(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, context, table, after):
        y = SelfAttention(self.config, name="self")(x, context, table)
        return Projection(self.config, name="output")(y, x, context, after)


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, first, table, mixed):
        """`mixed`: what `Conv` gave, which the first block alone adds; None without it."""
        c = self.config

        def after(name, x):
            return lambda y: hook(self, name, y, x=x, context=context)

        x = Attention(c, name="attention")(x, context, table, after("attention_output", x))
        y = Intermediate(c, name="intermediate")(x, context)
        y = Projection(c, name="output")(y, x, context, after("mlp_output", x))
        y = after("after_mlp", x)(y)
        if mixed is not None:
            added, real, norm = mixed
            summed = LayerNorm(c.layer_norm_eps, parent=None).apply({"params": norm}, y + added)
            y = jnp.where(first, summed * real, y)
        return y, cache


class Conv1d(nn.Module):
    """A convolution over the text; `kernel` is (size, inputs a group, features)."""

    config: Config

    @nn.compact
    def __call__(self, x):
        c = self.config
        shape = (c.conv_kernel_size, c.hidden_size // c.conv_groups, c.hidden_size)
        w = weights.materialize(read(self, "kernel", nn.initializers.normal(c.initializer_range), shape))
        b = weights.materialize(read(self, "bias", nn.initializers.zeros, (c.hidden_size,)))
        side = c.conv_kernel_size // 2
        y = jax.lax.conv_general_dilated(
            *(x, w.astype(x.dtype), (1,), [(side, side)]),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=c.conv_groups,
        )
        return y + b.astype(x.dtype)[None, None]


class Conv(nn.Module):
    """The n-grams of version 2's larger models: the embedded text, convolved, joins the first block's output.

    The sum and its norm are the block's, chosen by a flag: so all blocks are alike, and a scan over them has no first
    one apart. The price is a norm more in each of the others; the per-layer layout pays it for gradients only.
    """

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic):
        """-> what to add, 1 at tokens and 0 at padding, and the parameters of the sum's norm."""
        c = self.config
        y = nn.Dropout(c.hidden_dropout_prob)(Conv1d(c, name="conv")(x), deterministic=deterministic)
        y = activation(c.conv_act)(y)
        if self.is_initializing():
            LayerNorm(c.layer_norm_eps, name="LayerNorm")(y)
        return y, mask[..., None].astype(y.dtype), self.get_variable("params", "LayerNorm")


class Encoder(nn.Module):
    config: Config
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, x, mask, positions, deterministic):
        c, table = self.config, None
        # What is padded looks at nothing, and so at all alike: as in transformers, whose head reads it in texts that
        # are padded on the left.
        seen = (mask[:, None, None, :] * mask[:, None, :, None]).astype(bool)
        context = Context(seen, positions, deterministic=deterministic)
        if c.relative_attention:
            rows = Embed(2 * c.span, c.hidden_size, self.dtype, c.initializer_range, name="rel_embeddings")
            table = rows(jnp.arange(2 * c.span))
            table = LayerNorm(c.layer_norm_eps, name="LayerNorm")(table) if c.norms_positions else table
        mixed = Conv(c, name="conv")(x, mask, deterministic) if c.conv_kernel_size else None

        def block(name):
            return Layer(c, name=name)

        n = c.num_hidden_layers
        each = (np.arange(n) == 0,)  # numpy's: a constant to the compiler, which drops what it hides
        x, _ = run_blocks(self, block, "layer", n, x, context, None, table, mixed, each=each, remat=self.remat)
        return x


class Pooler(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, deterministic):
        c = self.config
        x = nn.Dropout(c.pooler_dropout)(x[:, 0], deterministic=deterministic)
        return activation(c.pooler_hidden_act)(Linear(c.hidden_size, std=c.initializer_range, name="dense")(x))


class Base(nn.Module):
    """Embeddings and blocks."""

    config: Config
    dtype: Any
    remat: str

    @nn.compact
    def __call__(self, input_ids, attention_mask, type_ids, positions, deterministic):
        c = self.config
        shift = hook(self, "shift", 0, x=input_ids, context=None)
        mask, n = attention_mask, 0

        def before(x):
            nonlocal mask, positions, n
            x, mask, positions, n = begin(self, x, mask, positions)
            if c.position_biased_input and x.shape[1] + shift > c.max_position_embeddings:
                raise ValueError(
                    f"{input_ids.shape[1]} tokens after {n + shift} virtual ones are more than the "
                    f"{c.max_position_embeddings} positions of this model"
                )
            positions = positions + shift
            return x, mask, positions

        x = Embeddings(c, self.dtype, name="embeddings")(input_ids, attention_mask, type_ids, before, deterministic)
        return Encoder(c, self.dtype, self.remat, name="encoder")(x, mask, positions, deterministic)[:, n:]


class Deberta(nn.Module):
    """DeBERTa with or without a classification head.

    Attributes:
      config: sizes and rates.
      head: 'none' or 'classification' (with one label: regression), which has the pooler.
      dtype: of the activations.
      remat: which activations of a block are kept for the backward pass, see `layers.REMAT`.
    """

    config: Config
    head: str = "none"
    dtype: Any = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, type_ids=None, positions=None, cache=None, deterministic=True):
        """Token ids (batch, length) -> `Output`; the mask is 1 at tokens and 0 at padding, on either side.

        Distances are counted in columns; `positions` are those of the learned table, where there is one.

        Raises:
          ValueError: token types for a model without them, or a text beyond its learned positions.
        """
        c, (_, length) = self.config, input_ids.shape
        if c.position_biased_input and length > c.max_position_embeddings:
            raise ValueError(f"{length} tokens are more than the {c.max_position_embeddings} positions of this model")
        if type_ids is not None and not c.type_vocab_size:
            raise ValueError("this DeBERTa has no token types (its type_vocab_size is 0); leave type_ids out")
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        base = Base(c, self.dtype, self.remat, name="deberta")
        hidden = base(input_ids, mask, type_ids, positions, deterministic)
        if self.head == "none":
            return Output(hidden)
        pooled = Pooler(c, name="pooler")(hidden, deterministic)
        rate = c.hidden_dropout_prob if c.cls_dropout is None else c.cls_dropout
        x = nn.Dropout(rate)(pooled, deterministic=deterministic)
        logits = Linear(c.num_labels, std=c.initializer_range, name="classifier")(x)
        return Output(hidden, pooled, logits.astype(jnp.float32))


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; the pooler is part of the task head, as no pretrained file has one."""
    d, ff = c.hidden_size, c.intermediate_size
    heads = (c.num_attention_heads, c.num_attention_heads, d // c.num_attention_heads)
    rows = [Site("deberta", "input", width=c.embedded)]
    tables = {"word": True, "position": c.position_biased_input, "token_type": c.type_vocab_size > 0}
    for name, there in tables.items():
        kind = "embedding" if name == "word" else "embedding_other"
        rows += [Site(f"deberta/embeddings/{name}_embeddings/embedding", kind, width=c.embedded)] if there else []
    if c.position_biased_input:
        rows.append(Site("deberta", "positions", width=d))
    if c.embedded != d:
        rows.append(Site("deberta/embeddings/embed_proj/kernel", "projection", width=d))
    rows.append(Site("deberta/embeddings/LayerNorm/scale", "norm", width=d))
    if c.relative_attention:
        rows.append(Site("deberta/encoder/rel_embeddings/embedding", "embedding_other", width=d))
        rows += [Site("deberta/encoder/LayerNorm/scale", "norm", width=d)] if c.norms_positions else []
    if c.conv_kernel_size:
        rows.append(Site("deberta/encoder/conv/conv/kernel", "convolution", width=d))
        rows.append(Site("deberta/encoder/conv/LayerNorm/scale", "norm", width=d))
    apart = c.terms if c.relative_attention and not c.share_att_key else ()
    for i in range(c.num_hidden_layers):
        at = f"deberta/encoder/layer_{i}"
        own = f"{at}/attention/self"
        rows += [
            Site(at, "block", i, d),
            Site(own, "attention", i, d, heads),
            *(Site(f"{own}/{k}_proj/kernel", k, i, d) for k in ("query", "key", "value")),
            *(Site(f"{own}/pos_{k}_proj/kernel", f"position_{k}", i, d) for k in map(_of_term, apart)),
            Site(f"{at}/attention/output/dense/kernel", "attention_out", i, d),
            Site(f"{at}/attention/output/LayerNorm/scale", "norm", i, d),
            Site(f"{at}/intermediate/dense/kernel", "mlp_in", i, ff),
            Site(f"{at}/output/dense/kernel", "mlp_out", i, d),
            Site(f"{at}/output/LayerNorm/scale", "norm", i, d),
        ]
    if head == "classification":
        rows.append(Site("pooler/dense/kernel", "head", width=d))
        rows.append(Site("classifier/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _of_term(term: str) -> str:
    return {"c2p": "key", "p2c": "query"}[term]


def _check(c: Config) -> None:
    d, heads = c.hidden_size, c.num_attention_heads
    if d % heads:
        raise ValueError(f"hidden_size {d} does not divide into {heads} attention heads")
    if c.attention_head_size not in (None, d // heads):
        raise ValueError(
            f"attention_head_size={c.attention_head_size} is not supported; supported is {d // heads}, which is "
            f"hidden_size {d} / num_attention_heads {heads}"
        )
    if c.pooler_hidden_size != d:
        raise ValueError(f"pooler_hidden_size={c.pooler_hidden_size} is not supported; supported is hidden_size, {d}")
    if unknown := sorted(set(c.pos_att_type or ()) - set(TERMS)):
        raise ValueError(f"pos_att_type has {unknown}, which are not supported; supported are {list(TERMS)}")
    if unknown := sorted(set(_parts(c.norm_rel_ebd)) - {"layer_norm", "none"}):
        raise ValueError(f"norm_rel_ebd has {unknown}, which are not supported; supported are 'layer_norm' and 'none'")
    if c.norms_positions and not c.relative_attention:
        raise ValueError(
            f"norm_rel_ebd={c.norm_rel_ebd!r} is the norm of relative positions, which relative_attention=False has "
            "none of; supported with it is 'none'"
        )
    if c.position_buckets > 0 and not 1 <= c.position_buckets // 2 < c.furthest - 1:
        raise ValueError(
            f"position_buckets {c.position_buckets} must be 2 or more, and less than twice the largest distance "
            f"{c.furthest - 1} of max_relative_positions (max_position_embeddings, if that is not above 0)"
        )
    if c.conv_kernel_size and (c.conv_kernel_size < 0 or c.conv_kernel_size % 2 == 0):
        raise ValueError(f"conv_kernel_size={c.conv_kernel_size} is not supported; supported are 0 and odd sizes")
    if c.conv_kernel_size and (c.conv_groups < 1 or d % c.conv_groups):
        raise ValueError(f"hidden_size {d} does not divide into conv_groups {c.conv_groups}")
    for name in (c.hidden_act, c.pooler_hidden_act, c.conv_act):
        activation(name)


FAMILY = Family(
    name="deberta-v2",
    config=Config,
    module=Deberta,
    sites=sites,
    base="deberta",
    heads={"DebertaV2Model": "none", "DebertaV2ForSequenceClassification": "classification"},
    unused=(
        r"(cls|lm_predictions|mask_predictions|pooler|classifier)\..*",
        r"(deberta\.)?embeddings\.position_(ids|embeddings\.weight)",  # the latter in files of models without
    ),
    renames=((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias")),
    harmless=("legacy", "tie_word_embeddings"),  # of the masked-LM head
    absent={
        "embedding_size": None,
        "attention_head_size": None,
        "share_att_key": False,
        "position_buckets": -1,
        "norm_rel_ebd": "none",
        "conv_kernel_size": 0,
        "conv_groups": 1,
        "conv_act": "tanh",
        "cls_dropout": None,
    },
    check=_check,
    max_length=lambda c: c.max_position_embeddings if c.position_biased_input else 2**31 - 1,  # else relative ones only
)
