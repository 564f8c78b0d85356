"""GPT-NeoX (Black et al. 2022, arXiv:2204.06745), Pythia too: attention and MLP side by side; part of a head turns."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ..methods.base import Site
from .base import Family
from .decoder import Decoder
from .fused import MLP, Attention, block_sites, by_part
from .layers import Context, Embed, LayerNorm, activation, begin, causal_context, hook, run_blocks
from .rope import check_rope, rope_angles, rotate


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    attention_dropout: float
    hidden_dropout: float
    max_position_embeddings: int
    initializer_range: float
    layer_norm_eps: float
    use_parallel_residual: bool  # the MLP reads the block's input, not what the attention made of it
    rope_parameters: dict
    attention_bias: bool
    tie_word_embeddings: bool
    num_labels: int


def turning(c: Config) -> tuple[dict, int]:
    """The rope parameters of what turns of a head, and how many of its features, the first, that is."""
    size, rope = c.hidden_size // c.num_attention_heads, c.rope_parameters
    if rope["rope_type"] == "proportional":  # has its share within
        return rope, size
    rest = {k: v for k, v in rope.items() if k != "partial_rotary_factor"}
    return rest, int(size * rope.get("partial_rotary_factor", 1.0))


class Layer(nn.Module):
    config: Config

    @nn.compact
    def __call__(self, x, cache, context: Context, cos, sin):
        c = self.config
        drop = nn.Dropout(c.hidden_dropout, deterministic=context.deterministic)
        heads, dim, std = c.num_attention_heads, 2 * cos.shape[-1], c.initializer_range

        def turn(y):
            return jnp.concatenate([rotate(y[..., :dim], cos, sin), y[..., dim:]], axis=-1)

        h = LayerNorm(c.layer_norm_eps, name="input_layernorm")(x)
        attend = Attention(heads, c.attention_bias, std, c.attention_dropout, name="attention")
        y, cache = attend(h, cache, context, turn)
        after = x + hook(self, "attention_output", drop(y), x=h, context=context)
        h = LayerNorm(c.layer_norm_eps, name="post_attention_layernorm")(x if c.use_parallel_residual else after)
        y = drop(MLP(c.intermediate_size, activation(c.hidden_act), std, name="mlp")(h, context))
        for name in ("mlp_output", "after_mlp"):
            y = hook(self, name, y, x=h, context=context)
        return after + y, cache


class Base(nn.Module):
    """Embedding, blocks and the last norm."""

    config: Config
    dtype: Any
    remat: str

    def setup(self):
        c = self.config
        self.embed_in = Embed(c.vocab_size, c.hidden_size, self.dtype, c.initializer_range)

    @nn.compact
    def __call__(self, input_ids, attention_mask, positions, cache, deterministic, continued, segments):
        c = self.config
        x = self.embed_in(input_ids, attention_mask if segments is None else segments)
        x, attention_mask, positions, n = begin(self, x, attention_mask, positions, cache, continued=continued)
        positions = hook(self, "shift", positions, x=input_ids, context=None)
        context, cache = causal_context(attention_mask, positions, cache, deterministic, segments)
        angles = rope_angles(*turning(c), c.max_position_embeddings, positions)
        x = nn.Dropout(c.hidden_dropout)(x, deterministic=deterministic)

        def block(name):
            return Layer(c, name=name)

        layers = None if cache is None else cache.layers
        x, layers = run_blocks(
            self, block, "layers", c.num_hidden_layers, x, context, layers, *angles, remat=self.remat
        )
        x = LayerNorm(c.layer_norm_eps, name="final_layer_norm")(x[:, n:])
        return x, None if cache is None else cache._replace(layers=layers)

    def attend(self, x):
        return self.embed_in.attend(x)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer; query, key and value are parts of one product."""
    d = c.hidden_size
    tied = head == "causal-lm" and c.tie_word_embeddings
    rows = [
        Site("gpt_neox", "positions", width=d),
        Site("gpt_neox", "input", width=d),
        Site("gpt_neox/embed_in/embedding", "embedding", width=d, tied=tied),
    ]
    for i in range(c.num_hidden_layers):
        at = f"gpt_neox/layers_{i}"
        rows += block_sites(at, "attention", i, d, c.intermediate_size, c.num_attention_heads)
    rows.append(Site("gpt_neox/final_layer_norm/scale", "norm", width=d))
    if head == "causal-lm" and not tied:
        rows.append(Site("embed_out/kernel", "lm_head", width=c.vocab_size))
    if head == "classification":
        rows.append(Site("score/kernel", "head", width=c.num_labels))
    return tuple(rows)


def _check(c: Config) -> None:
    if c.hidden_size % c.num_attention_heads:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.num_attention_heads} attention heads")
    rope, dim = turning(c)
    if dim < 2 or dim % 2:
        raise ValueError(
            f"partial_rotary_factor {c.rope_parameters.get('partial_rotary_factor')} of a head of "
            f"{c.hidden_size // c.num_attention_heads} features is {dim}; supported is an even number of at least 2"
        )
    check_rope(rope, dim)
    activation(c.hidden_act)


def _order(c: Config, path: str) -> np.ndarray | None:
    heads = c.num_attention_heads
    return by_part(heads, c.hidden_size // heads) if "/query_key_value/" in path else None


FAMILY = Family(
    name="gpt_neox",
    config=Config,
    module=functools.partial(Decoder, body=Base, at="gpt_neox", unembed="embed_out"),
    sites=sites,
    base="gpt_neox",
    heads={
        "GPTNeoXModel": "none",
        "GPTNeoXForCausalLM": "causal-lm",
        "GPTNeoXForSequenceClassification": "classification",
    },
    unused=(
        r"(gpt_neox\.)?layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
        r"embed_out\.weight",
        r"score\.weight",
    ),
    # of another head; names that older configs have for rates which transformers reads under others
    harmless=("classifier_dropout", "is_decoder", "attention_probs_dropout_prob", "hidden_dropout_prob"),
    bias_keys=("attention_bias",),
    check=_check,
    cache_shape=lambda c: (c.num_hidden_layers, c.num_attention_heads, c.hidden_size // c.num_attention_heads),
    order=_order,
    unembed="embed_out.weight",
)
