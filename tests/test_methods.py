"""The laws of `peftjax.methods.base`, over the table of methods and the families."""

import json
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from peftjax import METHODS, Method, chain, combine, count, hub, merge, partition, stack_layers
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.loop import fit
from peftjax.methods import (
    adalora,
    adapter,
    bitfit,
    child_tuning,
    default_rate,
    dora,
    dylora,
    fishmask,
    from_spec,
    full,
    head,
    ia3,
    lora,
    lora_fa,
    lora_plus,
    mam,
    neftune,
    norm_tuning,
    olora,
    p_tuning,
    parallel_adapter,
    pfeiffer,
    pissa,
    prefix,
    prompt,
    trainable_tokens,
    vera,
)
from peftjax.train import Settings
from peftjax.tree import cast, flatten, map_with_path

T5_INNER = 24  # features of T5's heads, more than the width
D, FF, LAYERS, HEADS, KV, VOCAB, LABELS = 16, 24, 2, 4, 2, 37, 3
SIZE = D // HEADS
EMBEDDING = 12  # features of ELECTRA's embeddings, fewer than the width


def llama() -> hub.Model:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
}


def mistral() -> hub.Model:
    """All layers slide, and a prompt reaches the last token; with biases, which Mistral has none of, beside all."""
    return _llama_like(transformers.MistralConfig, sliding_window=6)


def qwen2() -> hub.Model:
    """The last layer slides; with biases beside all linear layers."""
    return _llama_like(transformers.Qwen2Config, use_sliding_window=True, sliding_window=3, max_window_layers=1)


def qwen3() -> hub.Model:
    """The first layer slides; with biases beside all linear layers."""
    types = ["sliding_attention", "full_attention"]
    slides = {"use_sliding_window": True, "sliding_window": 3, "layer_types": types}
    return _llama_like(transformers.Qwen3Config, **slides, head_dim=SIZE, attention_bias=True)


def _llama_like(config, **changes) -> hub.Model:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    model = hub.from_config(config(**sizes | changes), "classification", labels=LABELS)
    return _noisy(model._replace(params=materialized(bitfit(create=True), model)))


def bert() -> hub.Model:
    return _noisy(hub.from_config(transformers.BertConfig(**ENCODER), "classification", labels=LABELS))


def roberta() -> hub.Model:
    return _noisy(hub.from_config(transformers.RobertaConfig(**ENCODER), "classification", labels=LABELS))


def xlm_roberta() -> hub.Model:
    return _noisy(hub.from_config(transformers.XLMRobertaConfig(**ENCODER), "classification", labels=LABELS))


def electra() -> hub.Model:
    config = transformers.ElectraConfig(**ENCODER, embedding_size=EMBEDDING)
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def deberta() -> hub.Model:
    """With all parts of version 2's larger models: the convolution, and a norm of the relative positions."""
    config = transformers.DebertaV2Config(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
        relative_attention=True,
        pos_att_type="p2c|c2p",
        position_buckets=6,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        conv_kernel_size=3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def gpt2() -> hub.Model:
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=D,
        n_inner=FF,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        initializer_range=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def bloom() -> hub.Model:
    """Its MLP is four times as wide as the model, whatever the config says."""
    config = transformers.BloomConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        n_layer=LAYERS,
        n_head=HEADS,
        initializer_range=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def gpt_neox() -> hub.Model:
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        initializer_range=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def opt() -> hub.Model:
    config = transformers.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        ffn_dim=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def t5() -> hub.Model:
    """With biases, which T5 has none of, beside all linear layers, for the methods on biases."""
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=D,
        d_kv=T5_INNER // HEADS,
        d_ff=FF,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=6,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = hub.from_config(config, "classification", labels=LABELS)
    return _noisy(model._replace(params=materialized(bitfit(create=True), model)))


def gemma2() -> hub.Model:
    """With biases beside the MLP's layers, which the config cannot name, and caps that are felt."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return _gemma(transformers.Gemma2Config(**GEMMA, **caps))


def gemma3() -> hub.Model:
    return _gemma(transformers.Gemma3TextConfig(**GEMMA, sliding_window_pattern=2))


GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "intermediate_size": FF,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": SIZE,
    "query_pre_attn_scalar": 2 * SIZE,
    "sliding_window": 4,
    "attention_bias": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def _gemma(config) -> hub.Model:
    model = hub.from_config(config, "classification", labels=LABELS)
    return _noisy(model._replace(params=materialized(bitfit(create=True), model)))


def bart() -> hub.Model:
    config = transformers.BartConfig(
        vocab_size=VOCAB,
        d_model=D,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FF,
        decoder_ffn_dim=FF,
        max_position_embeddings=64,
        dropout=0.0,
        init_std=0.3,
    )
    return _noisy(hub.from_config(config, "classification", labels=LABELS))


def materialized(method, model):
    return merge(method.init(jax.random.key(0), model.params, model.sites))


def _noisy(model: hub.Model) -> hub.Model:
    """Biases and norm scales away from 0 and 1, as in a trained model."""
    return model._replace(params=_noise(model.params, 0.1))


def _noise(params, size):
    def add(path, x):
        if not jnp.issubdtype(x.dtype, jnp.floating):  # indices
            return x
        rng = np.random.default_rng(sum(map(ord, path)))
        return x + (size * rng.normal(size=x.shape)).astype(x.dtype)

    return map_with_path(add, params)


FAMILIES = {
    "llama": llama,
    "bert": bert,
    "roberta": roberta,
    "xlm_roberta": xlm_roberta,
    "electra": electra,
    "deberta": deberta,
    "gpt2": gpt2,
    "opt": opt,
    "t5": t5,
    "bloom": bloom,
    "gpt_neox": gpt_neox,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "bart": bart,
}


class Sizes(NamedTuple):
    """What the counting formulas need; biases are those outside the task head."""

    kv: int
    biases: int
    head: int
    mlp_in: int  # matrices a layer
    attention: int  # inputs and outputs of the attention's matrices, in all
    norms: int  # scales and biases
    blocks: int  # parameters in the blocks
    ff: int = FF
    embedding: int = D  # features of the embeddings


SIZES = {
    "llama": Sizes(
        kv=KV * SIZE,
        biases=LAYERS * (D + 2 * KV * SIZE + D + FF + FF + D),
        head=D * LABELS,
        mlp_in=2,
        attention=4 * D + 2 * (D + KV * SIZE),
        norms=(2 * LAYERS + 1) * D,
        blocks=LAYERS * ((D + 1) * (2 * D + 2 * KV * SIZE) + 2 * D + 2 * (D + 1) * FF + (FF + 1) * D),
    ),
    # q k v o, two norms, intermediate, output; the embeddings' norm and the pooler
    "bert": Sizes(
        kv=D,
        biases=LAYERS * (4 * D + 2 * D + FF + D) + D + D,
        head=(D + 1) * LABELS,
        mlp_in=1,
        attention=8 * D,
        norms=(2 * LAYERS + 1) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
    ),
    # BERT's, with a dense layer in the head in place of the pooler
    **dict.fromkeys(
        ("roberta", "xlm_roberta"),
        Sizes(
            kv=D,
            biases=LAYERS * (4 * D + 2 * D + FF + D) + D,
            head=(D + 1) * (D + LABELS),
            mlp_in=1,
            attention=8 * D,
            norms=(2 * LAYERS + 1) * 2 * D,
            blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
        ),
    ),
    # the embeddings' norm is as wide as they are; the projection has a bias
    "electra": Sizes(
        kv=D,
        biases=LAYERS * (4 * D + 2 * D + FF + D) + EMBEDDING + D,
        head=(D + 1) * (D + LABELS),
        mlp_in=1,
        attention=8 * D,
        norms=2 * LAYERS * 2 * D + 2 * EMBEDDING,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
        embedding=EMBEDDING,
    ),
    # as BERT; the norms of embeddings and of relative positions, the convolution and its norm; the pooler is the head's
    "deberta": Sizes(
        kv=D,
        biases=LAYERS * (4 * D + 2 * D + FF + D) + 4 * D,
        head=(D + 1) * (D + LABELS),
        mlp_in=1,
        attention=8 * D,
        norms=(2 * LAYERS + 3) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
    ),
    # three times as many attention modules as layers, biases beside all that is linear
    "t5": Sizes(
        kv=T5_INNER,
        biases=LAYERS * (3 * (3 * T5_INNER + D) + 2 * (2 * FF + D)),
        head=(D + 1) * (D + LABELS),
        mlp_in=2,
        attention=4 * (D + T5_INNER),
        norms=(5 * LAYERS + 2) * D,
        blocks=LAYERS * (3 * (4 * T5_INNER * D + 3 * T5_INNER + D) + 2 * (2 * (D + 1) * FF + (FF + 1) * D) + 5 * D),
    ),
    # likewise; five norms in a layer of both, and one of each embedding
    "bart": Sizes(
        kv=D,
        biases=LAYERS * (3 * 4 * D + 5 * D + 2 * (FF + D)) + 2 * D,
        head=(D + 1) * (D + LABELS),
        mlp_in=1,
        attention=8 * D,
        norms=(5 * LAYERS + 2) * 2 * D,
        blocks=LAYERS * (3 * 4 * (D + 1) * D + 5 * 2 * D + 2 * ((D + 1) * FF + (FF + 1) * D)),
    ),
    "gpt2": Sizes(
        kv=D,
        biases=LAYERS * (3 * D + D + FF + D + 2 * D) + D,
        head=D * LABELS,
        mlp_in=1,
        attention=4 * D + 2 * D,  # q k v are one
        norms=(2 * LAYERS + 1) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
    ),
    "bloom": Sizes(
        kv=D,
        biases=LAYERS * (3 * D + D + 4 * D + D + 2 * D) + 2 * D,  # the embeddings' norm, the last one
        head=D * LABELS,
        mlp_in=1,
        attention=4 * D + 2 * D,  # q k v are one
        norms=(2 * LAYERS + 2) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * 4 * D + (4 * D + 1) * D),
        ff=4 * D,
    ),
    "gpt_neox": Sizes(
        kv=D,
        biases=LAYERS * (3 * D + D + FF + D + 2 * D) + D,
        head=D * LABELS,
        mlp_in=1,
        attention=4 * D + 2 * D,  # q k v are one
        norms=(2 * LAYERS + 1) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
    ),
    "opt": Sizes(
        kv=D,
        biases=LAYERS * (4 * D + 2 * D + FF + D) + D,
        head=D * LABELS,
        mlp_in=1,
        attention=8 * D,
        norms=(2 * LAYERS + 1) * 2 * D,
        blocks=LAYERS * (4 * (D + 1) * D + 4 * D + (D + 1) * FF + (FF + 1) * D),
    ),
}
# Llama's with two more norms a layer; of Gemma 3, also those of queries and keys
SIZES["gemma2"] = SIZES["llama"]._replace(norms=(4 * LAYERS + 1) * D, blocks=SIZES["llama"].blocks + LAYERS * 2 * D)
SIZES["gemma3_text"] = SIZES["gemma2"]._replace(
    norms=SIZES["gemma2"].norms + LAYERS * 2 * SIZE, blocks=SIZES["gemma2"].blocks + LAYERS * 2 * SIZE
)
SIZES |= {
    "mistral": SIZES["llama"],
    "qwen2": SIZES["llama"],
    "qwen3": SIZES["llama"]._replace(  # norms of queries and keys
        norms=SIZES["llama"].norms + LAYERS * 2 * SIZE, blocks=SIZES["llama"].blocks + LAYERS * 2 * SIZE
    ),
}


class Case(NamedTuple):
    """A row of the table of laws."""

    method: Method
    trains: str  # pattern that the trainable paths match, all of them and no others; see NAMES
    count: Callable[[Sizes, int], int]  # (sizes, all parameters of the base) -> the paper's formula
    start: float | None = 1e-5  # how far the function may move at init; None: the paper wants it to move
    merges: bool = True
    base_frozen: bool = True


def _lora_count(r, *shapes):
    return LAYERS * r * sum(a + b for a, b in shapes)


NAMES = {  # kind of site -> what families call it; `<query>` in a pattern is any of them
    "query": "query|query_proj|q_proj",
    "key": "key|key_proj|k_proj",
    "value": "value|value_proj|v_proj",
    "attention_out": r"o_proj|out_proj|attention/output/dense|attn/c_proj|(self_attention|layers_\d+/attention)/dense",
    "mlp_in": "gate_proj|up_proj|intermediate/dense|c_fc|fc1|dense_h_to_4h",
    "mlp_out": r"down_proj|layer_\d+/output/dense|mlp/c_proj|fc2|dense_4h_to_h",
    "embedding": "word_embeddings|embed_tokens|wte|embed_in|shared",
    "head": "classifier|score|classification_head|pooler",
}


def _named(pattern: str) -> str:
    return re.sub("<([a-z_]+)>", lambda m: NAMES[m[1]], pattern)


CASES = {
    "full": Case(full(), r".*", lambda s, n: n, base_frozen=False),
    "full-targets": Case(full(["mlp_out"]), r".*/(<mlp_out>)/kernel/value", lambda s, n: LAYERS * s.ff * D),
    "head": Case(head(), r"(<head>)/.*", lambda s, n: s.head),
    "bitfit": Case(bitfit(), r".*/bias/value", lambda s, n: s.biases),
    "bitfit-subset": Case(
        bitfit(["query", "mlp_in"]),
        r".*/(<query>|<mlp_in>|blocks/query)(/bias)?/value",
        lambda s, n: LAYERS * (D + s.mlp_in * s.ff),
    ),
    "fishmask+head": Case(
        chain(fishmask(0.1, samples=5), head()),
        r".*/values|(<head>)/.*",
        lambda s, n: int(0.1 * n),  # the head's within
    ),
    "fishmask-random": Case(
        fishmask(0.3, score="random"), r"(?!(<head>)/).*/values", lambda s, n: int(0.3 * n) - s.head
    ),
    "lora over fishmask": Case(
        chain(fishmask(count=300, targets=["query", "mlp_in"], score="random"), lora(rank=2, targets=["query"])),
        r".*/kernel/values|.*/(<query>)(/kernel)?/(base/values|[ab])",
        lambda s, n: 300 + _lora_count(2, (D, D)),
    ),
    "lora": Case(
        lora(rank=3, alpha=5),
        r".*/(<query>|<value>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)),
    ),
    "lora+neftune": Case(
        chain(lora(rank=3), neftune()),
        r".*/(<query>|<value>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)),
    ),
    "lora_plus": Case(
        lora_plus(rank=3, alpha=5, ratio=4),
        r".*/(<query>|<value>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)),
    ),
    "lora_fa": Case(
        lora_fa(rank=3, alpha=5, dropout=0.1),
        r".*/(<query>|<value>)(/kernel)?/b",
        lambda s, n: LAYERS * 3 * (D + s.kv),
    ),
    "lora+lora_fa": Case(
        chain(lora(rank=2, targets=["attention_out"]), lora_fa(rank=3, targets=["mlp_out"])),
        r".*/(<attention_out>)/kernel/[ab]"
        r"|.*/(<mlp_out>)/kernel/b",
        lambda s, n: LAYERS * (2 * 2 * D + 3 * D),
    ),
    "pissa": Case(
        pissa(rank=3, alpha=5),
        r".*/(<query>|<value>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)),
    ),
    "pissa-everywhere": Case(
        pissa(rank=2, niter=2, dropout=0.2, targets=["linear", "embedding"], rank_pattern={"mlp_out": 1}),
        r".*(layer|layers|h)_\d+/.*/kernel/[ab]|.*/(<embedding>)/embedding/[ab]",
        lambda s, n: 2 * (VOCAB + s.embedding) + LAYERS * (2 * s.attention + 2 * s.mlp_in * (D + s.ff) + (s.ff + D)),
    ),
    "olora": Case(
        olora(rank=3, alpha=2, targets=["linear"]),
        r".*(layer|layers|h)_\d+/.*/kernel/[ab]",
        lambda s, n: LAYERS * 3 * (s.attention + (s.mlp_in + 1) * (D + s.ff)),
    ),
    "vera": Case(
        vera(rank=20),
        r".*/(<query>|<value>)(/kernel)?/[db]",
        lambda s, n: LAYERS * (20 + D + 20 + s.kv),
    ),
    "vera-wider": Case(
        vera(rank=5, targets=["mlp_in", "mlp_out", "embedding"], d_initial=1, seed=3),
        r".*(layer|layers|h)_\d+/.*/kernel/[db]|.*/(<embedding>)/embedding/[db]",
        lambda s, n: 5 + s.embedding + LAYERS * (s.mlp_in * (5 + s.ff) + 5 + D),
    ),
    "dora": Case(
        dora(rank=3, alpha=5),
        r".*/(<query>|<value>)(/kernel)?/([ab]|magnitude)",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)) + LAYERS * (D + s.kv),
    ),
    "dora-everywhere": Case(
        dora(rank=2, alpha=3, dropout=0.2, targets=["linear", "embedding"], rank_pattern={"mlp_out": 1}),
        r".*(layer|layers|h)_\d+/.*/kernel/([ab]|magnitude)|.*/(<embedding>)/embedding/([ab]|magnitude)",
        lambda s, n: (
            2 * (VOCAB + s.embedding)
            + s.embedding
            + LAYERS * (2 * s.attention + 2 * s.mlp_in * (D + s.ff) + (s.ff + D))
            + LAYERS * (2 * D + 2 * s.kv + s.mlp_in * s.ff + D)  # a length for each output
        ),
    ),
    "rslora-dropout": Case(
        lora(rank=2, alpha=7, rslora=True, dropout=0.3, targets=["key"]),
        r".*/(<key>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(2, (D, s.kv)),
    ),
    "lora-patterns": Case(
        lora(
            rank=1,
            targets=["linear", "embedding"],
            rank_pattern={"mlp_out": 4, ".*_0/.*": 2},
            alpha_pattern={"attention_out": 9},
        ),
        r".*(layer|layers|h)_\d+/.*/kernel/[ab]|.*(<embedding>)/embedding/[ab]",
        lambda s, n: (
            (VOCAB + s.embedding)
            + 3 * (s.attention + s.mlp_in * (D + s.ff))  # rank 2 in layer 0, rank 1 in layer 1
            + 2 * 4 * (s.ff + D)
        ),
    ),
    "adalora": Case(
        adalora(target_rank=2, init_rank=3, targets=["query", "mlp_out"]),
        r".*/(<query>|<mlp_out>)(/kernel)?/(a|lam|b)",
        lambda s, n: _lora_count(3, (D, D), (s.ff, D)) + 2 * LAYERS * 3,
    ),
    "adalora+lora+head": Case(
        chain(adalora(2, 4, targets=["value", "embedding"], dropout=0.1), lora(rank=2, targets=["query"]), head()),
        r".*/(<value>)(/kernel)?/(a|lam|b)|.*/embedding/(a|lam|b)|.*/(<query>)(/kernel)?/[ab]|(<head>)/.*",
        lambda s, n: (
            _lora_count(4, (D, s.kv)) + LAYERS * 4 + 4 * (VOCAB + s.embedding + 1) + _lora_count(2, (D, D)) + s.head
        ),
    ),
    "dylora": Case(
        dylora(rank=3, alpha=5),
        r".*/(<query>|<value>)(/kernel)?/[ab]",
        lambda s, n: _lora_count(3, (D, D), (D, s.kv)),
    ),
    "dylora-frozen": Case(
        dylora(rank=4, targets=["linear", "embedding"], frozen=True, distribution="geometric", dropout=0.1),
        r".*(layer|layers|h)_\d+/.*/kernel/[ab]|.*(<embedding>)/embedding/[ab]",
        lambda s, n: 4 * (VOCAB + s.embedding) + LAYERS * 4 * (s.attention + (s.mlp_in + 1) * (D + s.ff)),
    ),
    "prefix": Case(prefix(5), r".*/prefix/(key|value)", lambda s, n: 2 * 5 * LAYERS * s.kv, start=None, merges=False),
    "prefix-mlp": Case(
        prefix(5, mlp=True, hidden=7),
        r"prefix_mlp/.*",
        lambda s, n: 5 * D + (D + 1) * 7 + (7 + 1) * 2 * LAYERS * s.kv,
        start=None,
        merges=False,
    ),
    "lora+bitfit+head": Case(
        chain(lora(rank=2, targets=["value"]), bitfit(), head()),
        r".*/(<value>)(/kernel)?/[ab]|.*/bias/value|(<head>)/.*",
        lambda s, n: _lora_count(2, (D, s.kv)) + s.biases + s.head,
    ),
    "prefix+lora": Case(
        chain(prefix(3), lora(rank=2, targets=["query"])),
        r".*/prefix/(key|value)|.*/(<query>)(/kernel)?/[ab]",
        lambda s, n: 6 * LAYERS * s.kv + _lora_count(2, (D, D)),
        start=None,
        merges=False,
    ),
    "lora over lora": Case(
        chain(lora(rank=2, targets=["query"]), lora(rank=3, alpha=1, targets=["query"])),
        r".*/(<query>)(/kernel)?/(base/)?[ab]",
        lambda s, n: _lora_count(5, (D, D)),
    ),
    "prompt": Case(prompt(5), r".*/prompt/vectors", lambda s, n: 5 * s.embedding, start=None, merges=False),
    "prompt-ids": Case(
        prompt(4, start="random", ids=[3, 1]),
        r".*/prompt/vectors",
        lambda s, n: 4 * s.embedding,
        start=None,
        merges=False,
    ),
    "p_tuning": Case(
        p_tuning(3, hidden=4, layers=2),
        r"prompt_encoder/.*",
        lambda s, n: (
            3 * s.embedding
            + 2 * 16 * (s.embedding + 4 + 1)
            + 2 * 16 * (8 + 4 + 1)
            + (8 + 1) * 8
            + (8 + 1) * s.embedding
        ),
        start=None,
        merges=False,
    ),
    "p_tuning-mlp": Case(
        p_tuning(3, encoder="mlp", hidden=6),
        r"prompt_encoder/.*",
        lambda s, n: 3 * s.embedding + 2 * s.embedding * 6 + 6 * 6 + 2 * 6 + s.embedding,
        start=None,
        merges=False,
    ),
    "adapter": Case(
        adapter(4),
        r".*_\d+/(attention|mlp)_output/[wb][12]",
        lambda s, n: 2 * LAYERS * (2 * D * 4 + D + 4),
        start=1e-2,
        merges=False,
    ),
    "adapter-dropped": Case(
        adapter(3, activation="relu", std=0.02, layers=[1]),
        r".*_1/(attention|mlp)_output/[wb][12]",
        lambda s, n: 2 * (2 * D * 3 + D + 3),
        start=0.2,
        merges=False,
    ),
    "pfeiffer": Case(
        pfeiffer(4),
        r".*_\d+/after_mlp/[wb][12]",
        lambda s, n: LAYERS * (2 * D * 4 + D + 4),
        start=1e-2,
        merges=False,
    ),
    "parallel_adapter": Case(
        parallel_adapter(4, where=["attention", "mlp"]),
        r".*_\d+/(attention|mlp)_output/[wb][12]",
        lambda s, n: 2 * LAYERS * (2 * D * 4 + D + 4),
        merges=False,
    ),
    "mam": Case(
        mam(3, 4),
        r".*_\d+/mlp_output/[wb][12]|.*/prefix/(key|value)",
        lambda s, n: 2 * 3 * LAYERS * s.kv + LAYERS * (2 * D * 4 + D + 4),
        start=None,
        merges=False,
    ),
    "ia3": Case(ia3(), r".*/(output|input)/l", lambda s, n: LAYERS * (2 * s.kv + s.ff)),
    "ia3-others": Case(
        ia3(["query", "attention_out", "mlp_in"]), r".*/output/l", lambda s, n: LAYERS * (2 * D + s.mlp_in * s.ff)
    ),
    "norm_tuning": Case(
        norm_tuning(), r".*(norm|LayerNorm|layernorm|ln_[12f])/(scale|bias)/value", lambda s, n: s.norms
    ),
    "trainable_tokens": Case(
        trainable_tokens([7, 3, 30]), r".*/(<embedding>)/embedding/rows", lambda s, n: 3 * s.embedding
    ),
    "trainable_tokens-frequent": Case(
        trainable_tokens(count=5), r".*/(<embedding>)/embedding/rows", lambda s, n: 5 * s.embedding
    ),
    "child_tuning": Case(child_tuning("F", 0.5), r".*", lambda s, n: n, base_frozen=False),
    "child_tuning-D": Case(
        child_tuning("D", 0.3, samples=5),
        r".*/(values|value)",
        lambda s, n: n - s.blocks + int(0.3 * s.blocks),
    ),
    "lora+ia3+head": Case(
        chain(lora(rank=2, alpha=3), ia3(["mlp_out"]), head()),
        r".*/(<query>|<value>)(/kernel)?/[ab]|.*/input/l|(<head>)/.*",
        lambda s, n: _lora_count(2, (D, D), (D, s.kv)) + LAYERS * s.ff + s.head,
    ),
    "prefix+adapter": Case(
        chain(prefix(3), adapter(2)),
        r".*/prefix/(key|value)|.*_output/[wb][12]",
        lambda s, n: 6 * LAYERS * s.kv + 2 * LAYERS * (2 * D * 2 + D + 2),
        start=None,
        merges=False,
    ),
}


def _pair_count(s, r, n):
    """LoRA's of rank r on n matrices of an attention module, of which an encoder and its decoder have three a layer."""
    return 3 * n * _lora_count(r, (D, s.kv))


def _pair_all(s):
    """Inputs and outputs of all matrices of a layer of both."""
    return 3 * s.attention + 2 * (s.mlp_in + 1) * (D + FF)


PAIRS_OF_STACKS = {  # where three times as many attention modules as layers make another count, and twice as many MLPs
    "full-targets": lambda s, n: 2 * LAYERS * FF * D,
    "bitfit-subset": lambda s, n: LAYERS * (3 * s.kv + 2 * s.mlp_in * FF),
    "lora over fishmask": lambda s, n: 300 + _pair_count(s, 2, 1),
    "lora": lambda s, n: _pair_count(s, 3, 2),
    "dora": lambda s, n: _pair_count(s, 3, 2) + 6 * LAYERS * s.kv,
    "dora-everywhere": lambda s, n: (
        2 * (VOCAB + D)
        + D
        + LAYERS * (2 * _pair_all(s) - 2 * (FF + D))  # rank 1 in the two mlp_out
        + LAYERS * (3 * (3 * s.kv + D) + 2 * (s.mlp_in * FF + D))
    ),
    "rslora-dropout": lambda s, n: _pair_count(s, 2, 1),
    "lora-patterns": lambda s, n: (VOCAB + D) + 3 * (_pair_all(s) - 2 * (FF + D)) + LAYERS * 2 * 4 * (FF + D),
    "prefix": lambda s, n: 3 * 2 * 5 * LAYERS * s.kv,
    "prefix-mlp": lambda s, n: 5 * D + (D + 1) * 7 + (7 + 1) * 3 * 2 * LAYERS * s.kv,
    "lora+bitfit+head": lambda s, n: _pair_count(s, 2, 1) + s.biases + s.head,
    "prefix+lora": lambda s, n: 3 * 6 * LAYERS * s.kv + _pair_count(s, 2, 1),
    "lora over lora": lambda s, n: _pair_count(s, 5, 1),
    "lora+neftune": lambda s, n: _pair_count(s, 3, 2),
    "lora_plus": lambda s, n: _pair_count(s, 3, 2),
    "lora_fa": lambda s, n: 3 * LAYERS * 3 * 2 * s.kv,
    "lora+lora_fa": lambda s, n: _pair_count(s, 2, 1) + 2 * LAYERS * 3 * D,
    "pissa": lambda s, n: _pair_count(s, 3, 2),
    "pissa-everywhere": lambda s, n: 2 * (VOCAB + D) + LAYERS * (2 * _pair_all(s) - 2 * (FF + D)),
    "olora": lambda s, n: LAYERS * 3 * _pair_all(s),
    "vera": lambda s, n: 3 * LAYERS * 2 * (20 + s.kv),
    "vera-wider": lambda s, n: 5 + D + 2 * LAYERS * (s.mlp_in * (5 + FF) + 5 + D),
    "adalora": lambda s, n: _pair_count(s, 3, 1) + 3 * LAYERS * 3 + 2 * LAYERS * 3 * (FF + D + 1),
    "adalora+lora+head": lambda s, n: (
        _pair_count(s, 4, 1) + 3 * LAYERS * 4 + 4 * (VOCAB + D + 1) + _pair_count(s, 2, 1) + s.head
    ),
    "dylora": lambda s, n: _pair_count(s, 3, 2),
    "dylora-frozen": lambda s, n: 4 * (VOCAB + D) + LAYERS * 4 * _pair_all(s),
    **{row: lambda s, n, row=row: 2 * CASES[row].count(s, n) for row in ("adapter", "pfeiffer", "parallel_adapter")},
    "mam": lambda s, n: 3 * 2 * 3 * LAYERS * s.kv + 2 * LAYERS * (2 * D * 4 + D + 4),
    "ia3": lambda s, n: LAYERS * (3 * 2 * s.kv + 2 * FF),
    "ia3-others": lambda s, n: LAYERS * (3 * (s.kv + D) + 2 * s.mlp_in * FF),
    "lora+ia3+head": lambda s, n: _pair_count(s, 2, 2) + 2 * LAYERS * FF + s.head,
    "prefix+adapter": lambda s, n: 3 * 6 * LAYERS * s.kv + 4 * LAYERS * (2 * D * 2 + D + 2),
}

T5_QV, T5_ALL = r".*/[qv]/kernel/", r".*block_\d+/.*/kernel/"
T5 = {  # other names make another pattern
    "full-targets": r".*/wo/kernel/value",
    "bitfit-subset": r".*/(q|wi\d)/bias/value",
    "lora over fishmask": r".*/kernel/values|.*/q/kernel/(base/values|[ab])",
    **{row: T5_QV + "[ab]" for row in ("lora", "lora+neftune", "lora_plus", "pissa", "dylora")},
    "lora_fa": T5_QV + "b",
    "dora": T5_QV + "([ab]|magnitude)",
    "vera": T5_QV + "[db]",
    "rslora-dropout": r".*/k/kernel/[ab]",
    "olora": T5_ALL + "[ab]",
    "dora-everywhere": T5_ALL + "([ab]|magnitude)|.*/shared/embedding/([ab]|magnitude)",
    **{row: T5_ALL + "[ab]|.*/shared/embedding/[ab]" for row in ("lora-patterns", "pissa-everywhere", "dylora-frozen")},
    "vera-wider": T5_ALL + "[db]|.*/shared/embedding/[db]",
    "lora+bitfit+head": r".*/v/kernel/[ab]|.*/bias/value|(<head>)/.*",
    "prefix+lora": r".*/prefix/(key|value)|.*/q/kernel/[ab]",
    "lora over lora": r".*/q/kernel/(base/)?[ab]",
    "lora+lora_fa": r".*/o/kernel/[ab]|.*/wo/kernel/b",
    "adalora": r".*/(q|wo)/kernel/(a|lam|b)",
    "adalora+lora+head": r".*/v/kernel/(a|lam|b)|.*/embedding/(a|lam|b)|.*/q/kernel/[ab]|(<head>)/.*",
    "lora+ia3+head": r".*/[qv]/kernel/[ab]|.*/input/l|(<head>)/.*",
}
BART = {"norm_tuning": r".*(norm|layernorm_embedding)/(scale|bias)/value"}


def _other(patterns, counts):
    """Rows whose pattern or count is not that of the table."""
    rows = {*patterns, *counts}
    return {r: (patterns.get(r, CASES[r].trains), counts.get(r, CASES[r].count)) for r in rows}


OTHERS = {  # family -> its rows that differ
    "t5": _other(T5, PAIRS_OF_STACKS),
    "bart": _other(BART, PAIRS_OF_STACKS),
}
# What is quick runs for every row on Llama and for these on every family; what trains, for a row a method and for the
# first eight; bfloat16 and the layouts, which compile slowly, for fewer. All of it: `experiments/laws.py`.
CORE = ("full", "bitfit", "lora", "dora", "fishmask+head", "adapter", "prefix", "prompt")
FEW = ("llama", "bert", "gpt2", "t5")
VARIANTS = [  # of a method that has another row
    *(
        "full-targets",
        "bitfit-subset",
        "fishmask-random",
        "lora-patterns",
        "rslora-dropout",
        "lora+lora_fa",
        "pissa-everywhere",
    ),
    *("vera-wider", "dora-everywhere", "adalora+lora+head", "dylora-frozen", "prefix-mlp", "prefix+lora"),
    *("lora+neftune", "prompt-ids", "p_tuning-mlp", "adapter-dropped", "ia3-others", "trainable_tokens-frequent"),
]


def _cells(core, left_out=(), beyond=None):
    """The cells of a law: `core` on the first families, `beyond` on others, on Llama all that is not left out."""

    def marks(family, name):
        rows = core if family in FEW or beyond is None else beyond
        runs = name not in left_out if family == "llama" else name in rows
        return () if runs else pytest.mark.slow

    cells = [pytest.param(f, name, marks=marks(f, name)) for f in FAMILIES for name in CASES]
    return pytest.mark.parametrize(("family", "name"), cells)


CELLS, FEWER = _cells(CORE), _cells(CORE, VARIANTS)
BF16 = _cells(("lora",), VARIANTS)
LAYOUTS = _cells(("lora", "prefix", "prompt", "fishmask+head"), VARIANTS, beyond=("lora", "prefix"))
EVERY = pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FEW else pytest.mark.slow) for f in FAMILIES]
)
ALL_CASES = pytest.mark.parametrize("name", CASES)


class Models(dict):
    """Family -> model, made when it is asked for."""

    def __missing__(self, name):
        self[name] = FAMILIES[name]()
        return self[name]


@pytest.fixture(scope="module")
def models():
    return Models()


def _batch():
    rng = np.random.default_rng(0)
    mask = np.ones((6, 9), np.int32)
    mask[1, 5:] = mask[4, 7:] = 0
    return {
        "input_ids": jnp.asarray(rng.integers(1, VOCAB, (6, 9)), jnp.int32),
        "attention_mask": jnp.asarray(mask),
        "labels": jnp.asarray(rng.integers(0, LABELS, 6), jnp.int32),
    }


ADAPTED: dict[tuple, tuple] = {}  # each law starts from the same adapted parameters; the model is kept for its id


def _adapt(model, method):
    at = id(model.params), json.dumps(method.spec)
    if at not in ADAPTED:
        ADAPTED[at] = _adapt_anew(model, method), model
    return ADAPTED[at][0]


def _adapt_anew(model, method):
    method = method.observed(_objective(model), model.params, model.sites, [_batch()])
    return method.init(jax.random.key(1), model.params, model.sites)


FORWARDS: dict[int, Callable] = {}


def _logits(model, params):
    if id(model.module) not in FORWARDS:  # one function a module, for jit to know it again
        FORWARDS[id(model.module)] = jax.jit(lambda params, batch: model.forward(params, batch).logits)
    with jax.numpy_dtype_promotion("strict"):  # nothing may widen silently
        return FORWARDS[id(model.module)](params, _batch())


def _objective(model):
    def loss(params, batch, key):
        log_p = jax.nn.log_softmax(model.forward(params, batch, key).logits)
        return -jnp.take_along_axis(log_p, batch["labels"][:, None], 1).sum(), jnp.float32(len(batch["labels"]))

    return loss


def _steps(model, method, params, n=12, rate=1e-2):
    settings = Settings(steps=n, learning_rate=rate, warmup=0.0, schedule="constant", batch_size=6)
    return fit(params, method, _objective(model), lambda i: iter([_batch()]), 1, settings)


def test_every_method_is_in_the_table():
    named = {name for case in CASES.values() for name, _ in case.method.spec}
    assert named == set(METHODS)


@FEWER
def test_law_1_the_function_starts_unchanged(models, family, name):
    case, model = CASES[name], models[family]
    got = _logits(model, case.method.resolve(_adapt(model, case.method), None))
    difference = float(jnp.abs(got - _logits(model, model.params)).max())
    assert difference > 1e-4 if case.start is None else difference < case.start


@CELLS
def test_law_2_the_papers_leaves_and_count(models, family, name):
    case, model = CASES[name], models[family]
    params = _adapt(model, case.method)
    mask = flatten(case.method.trainable(params))
    trains, formula = OTHERS.get(family, {}).get(name, case[1:3])
    trains = _named(trains)
    assert {p for p, m in mask.items() if m} == {p for p in mask if re.fullmatch(trains, p)}
    trainable, _ = partition(params, case.method.trainable(params))
    assert count(trainable) == formula(SIZES[family], count(model.params))


@FEWER
def test_laws_3_and_4_frozen_stays_loss_falls_one_compilation(models, family, name):
    case, model = CASES[name], models[family]
    params = _adapt(model, case.method)
    before = jax.tree.map(np.array, params)
    rate = 30 * default_rate(case.method, 768)
    fitted = _steps(model, case.method, params, rate=rate)
    losses = [r["loss"] for r in fitted.history]
    assert min(losses[-3:]) < 0.97 * losses[0]
    assert fitted.compilations == 1
    mask = flatten(case.method.trainable(params))
    after, start = flatten(fitted.params), flatten(before)
    moved = {p for p in after if not np.array_equal(np.asarray(after[p]), start[p])}
    assert moved <= {p for p, m in mask.items() if m}
    assert moved, "something must have trained"
    assert all(np.array_equal(np.asarray(x), start[p]) for p, x in flatten(params).items()), "the caller's tree"


@CELLS
def test_law_5_merging_keeps_the_function(models, family, name):
    case, model = CASES[name], models[family]
    params = case.method.resolve(_noise(_adapt(model, case.method), 0.2), None)
    if not case.merges:
        with pytest.raises(ValueError, match=r"cannot merge .*as an adapter file"):
            merge(params)
        return
    merged = merge(params)
    extra = set(flatten(merged)) - set(flatten(model.params))
    assert not extra
    want = _logits(model, params)
    assert float(jnp.abs(want - _logits(model, model.params)).max()) > 1e-2, "the adapter must do something"
    np.testing.assert_allclose(_logits(model, merged), want, atol=2e-5)


@FEWER
def test_law_6_files(models, family, name, tmp_path):
    case, model = CASES[name], models[family]
    params = _noise(_adapt(model, case.method), 0.2)
    trainable, _ = partition(params, case.method.trainable(params))
    base = jax.tree.map(lambda x: x, model.params)
    if case.base_frozen:  # put the untouched base back under the noisy trainables
        _, clean = partition(_adapt(model, case.method), case.method.trainable(params))
        params = jax.tree.map(lambda t, f: f if t is None else t, trainable, clean, is_leaf=lambda x: x is None)
    size = save_adapter(tmp_path / "a.safetensors", model, case.method, params)
    assert size == (tmp_path / "a.safetensors").stat().st_size
    loaded = load_adapter(tmp_path / "a.safetensors", model)
    want = case.method.resolve(params, None)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(want)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(want), strict=True))
    assert loaded.method.spec == from_spec(case.method.spec).spec
    other = model._replace(params=_noise(base, 0.1))
    with pytest.raises(ValueError, match="another base"):
        load_adapter(tmp_path / "a.safetensors", other)


@ALL_CASES
def test_a_spec_builds_the_method_again(models, name):
    """Through JSON, as an adapter file holds it."""
    method, model = CASES[name].method, models["llama"]
    spec = json.loads(json.dumps(method.spec))
    again = from_spec(spec)
    assert json.loads(json.dumps(again.spec)) == spec
    one = _adapt_anew(model, method if len(method.spec) > 1 else chain(method))
    two = _adapt_anew(model, again)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@BF16
def test_law_7_bf16_base(models, family, name):
    case, model = CASES[name], models[family]
    small = model._replace(params=cast(model.params, jnp.bfloat16), module=model.module.clone(dtype=jnp.bfloat16))
    params = _adapt(small, case.method)
    out = jax.eval_shape(lambda p: small.forward(case.method.resolve(p, None), _batch()), params)
    assert out.hidden.dtype == jnp.bfloat16, "a float32 trainable has widened the activations"
    fitted = _steps(small, case.method, params, n=8, rate=30 * default_rate(case.method, 768))
    losses = [r["loss"] for r in fitted.history]
    assert min(losses[-3:]) < losses[0]
    mask = flatten(case.method.trainable(params))
    assert {x.dtype for p, x in flatten(fitted.params).items() if mask[p]} == {jnp.dtype(jnp.float32)}


@LAYOUTS
def test_the_scanned_layout_has_the_same_loss_and_gradients(models, family, name):
    case, model = CASES[name], models[family]
    params = _adapt(model, case.method)
    if name in ("lora-patterns", "adapter-dropped"):  # what differs by layer cannot be stacked, and says so
        with pytest.raises(ValueError, match="cannot stack layers"):
            stack_layers(params)
        return
    results = []
    for tree in (params, stack_layers(params)):
        trainable, frozen = partition(tree, case.method.trainable(tree))

        def loss(t, frozen=frozen):
            return _objective(model)(case.method.resolve(combine(t, frozen), jax.random.key(3)), _batch(), None)[0]

        value, grads = jax.jit(jax.value_and_grad(loss))(trainable)
        results.append((value, flatten(grads if tree is not params else stack_layers(grads))))
    (one, grads), (two, others) = results
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert grads.keys() == others.keys()
    assert all(np.allclose(grads[p], others[p], atol=1e-4, rtol=1e-4) for p in grads)


BAD = {
    "no such kind": (lambda: lora(targets=["qeury"]), "qeury.*nearest paths"),
    "a pattern that matches nothing": (lambda: lora(targets=["bert/layer_.*/q/kernel"]), "nearest paths"),
    "rank too large": (lambda: lora(rank=D + 1), "larger than the matrix .* at most 16"),
    "rank 0": (lambda: lora(rank=0), "at least 1"),
    "rank no number": (lambda: lora(rank=2.0), "whole number"),  # type: ignore[arg-type] # the point of the test
    "rank pattern 0": (lambda: lora(rank_pattern={"query": 0}), "at least 1"),
    "rank pattern fits nothing": (lambda: lora(rank_pattern={"mlp_in": 2}), "mlp_in.*fits none of the targets"),
    "alpha pattern fits nothing": (lambda: lora(alpha_pattern={"nowhere/.*": 2}), "fits none of the targets"),
    "dropout 1": (lambda: lora(dropout=1.0), r"\[0, 1\)"),
    "tied": (lambda: lora(tied_embedding="head"), "'both' or 'take'"),
    "targets a string": (lambda: lora(targets="query"), r"list .*\['query'\]"),
    "a target no text": (lambda: lora(targets=["query", 3]), "kinds or patterns.*got 3"),  # type: ignore[list-item] # the point
    "a broken pattern": (lambda: lora(targets=["q("]), "regular expression"),
    "a bias as a matrix": (lambda: lora(targets=[".*/bias"]), "expected a matrix"),
    "bitfit of an embedding": (lambda: bitfit(["embedding"]), "create=True"),
    "alpha 0": (lambda: lora(alpha=0), "alpha must be a number above 0"),
    "rank of dora too large": (lambda: dora(rank=D + 1), "dora: rank 17 is larger .* at most 16"),
    "dropout of dora": (lambda: dora(dropout=-0.1), r"dora: dropout must be in \[0, 1\)"),
    "lora_plus ratio 0": (lambda: lora_plus(ratio=0), "ratio must be a number above 0, such as 16; got 0"),
    "rank of pissa too large": (lambda: pissa(rank=D + 1), "pissa: rank 17 is larger .* at most 16"),
    "rank of olora too large": (lambda: olora(rank=D + 1), "olora: rank 17 is larger .* at most 16"),
    "rank of lora_fa 0": (lambda: lora_fa(rank=0), "lora_fa: the rank must be a whole number of at least 1"),
    "niter of pissa": (lambda: pissa(niter=-1), "niter must be a whole number of at least 0, or None; got -1"),
    "rank of vera 0": (lambda: vera(rank=0), "vera: rank must be a whole number of at least 1; got 0"),
    "seed of vera": (lambda: vera(seed=-1), "vera: seed must be a whole number of at least 0; got -1"),
    "d of vera": (lambda: vera(d_initial=0), "vera: d_initial must be a number other than 0"),
    "vera of a bias": (lambda: vera(targets=[".*/bias"]), "vera: .*/bias has shape .*expected a matrix"),
    "vera of a module": (lambda: vera(targets=["attention"]), "is no weight"),
    "rank true": (lambda: lora(rank=True), "whole number"),
    "one target without a bias": (
        lambda: bitfit(["query", "embedding"]),
        "word_embeddings/embedding, which has no bias",
    ),
    "adalora, target above the start": (lambda: adalora(9, 8), "target_rank 9 is above init_rank 8"),
    "adalora, no target": (lambda: adalora(0), "target_rank must be a whole number of at least 1; got 0"),
    "adalora, rank too large": (lambda: adalora(2, D + 1), "adalora: rank 17 is larger .* at most 16"),
    "adalora, warm-up past the end": (
        lambda: adalora(2, 3, warmup=6, final=4, total=10),
        "6 steps of warm-up and 4 final ones leave none of 10",
    ),
    "adalora, a share past the end": (
        lambda: adalora(2, 3, warmup=1.5),
        r"warmup must .* a share in \[0, 1\); got 1.5",
    ),
    "adalora, shares past the end": (
        lambda: adalora(2, 3, warmup=0.6, final=0.5),
        "warmup=0.6 and final=0.5 leave no steps",
    ),
    "adalora, a beta": (lambda: adalora(2, 3, beta2=1.0), "beta2 must be between 0 and 1"),
    "adalora, orthogonality": (lambda: adalora(2, 3, orthogonality=-1), "orthogonality must be at least 0; got -1"),
    "adalora twice": (
        lambda: chain(adalora(2, 3, targets=["query"]), adalora(2, 3, targets=["key"])),
        "is an AdaLoRA already, .* write one adalora with all the targets",
    ),
    "dylora, min_rank above": (
        lambda: dylora(2, min_rank=3),
        "min_rank must be a whole number from 1 to rank=2; got 3",
    ),
    "dylora, distribution": (lambda: dylora(2, distribution="normal"), "'uniform' or 'geometric'; got 'normal'"),
    "dylora, p": (lambda: dylora(2, p=1), "p must be between 0 and 1; got 1"),
    "dylora, rank too large": (lambda: dylora(D + 1), "dylora: rank 17 is larger .* at most 16"),
    "dylora twice": (
        lambda: chain(dylora(2, targets=["query"]), dylora(3, targets=["key"])),
        "is a DyLoRA already, .* write one dylora with all the targets",
    ),
    "prefix std": (lambda: prefix(2, std=-1.0), "std must be above 0"),
    "prefix length": (lambda: prefix(0), "at least 1"),
    "prefix hidden": (lambda: prefix(2, hidden=0), "at least 1"),
    "fishmask of nothing": (lambda: fishmask(0.0), "fraction must be a number above 0 and at most 1; got 0.0"),
    "fishmask in percent": (lambda: fishmask(5), "at most 1; got 5"),
    "fishmask without samples": (lambda: fishmask(samples=0), "samples must be a whole number of at least 1; got 0"),
    "fishmask count 0": (lambda: fishmask(count=0), "count must be a whole number of at least 1; got 0"),
    "fishmask score": (lambda: fishmask(score="magnitude"), "'fisher' or 'random'; got 'magnitude'"),
    "fishmask, less than the head": (
        lambda: fishmask(0.005, score="random"),
        r"0.005 of 5,923 parameters is 29, which leaves nothing beside the task head's 51; write a larger",
    ),
    "fishmask, more than there is": (lambda: fishmask(count=513, targets=["query"]), "513 entries .* have 512"),
    "fishmask of a module": (lambda: fishmask(targets=["attention"]), "attention/self is no floating array"),
    "fishmask unobserved": (lambda: fishmask(0.1)._replace(observe=None), r"method.observed\(objective, params"),
    "fishmask after lora": (
        lambda: chain(lora(rank=2), fishmask(0.1)),
        "query/kernel is already a LoRA; give fishmask targets without it",
    ),
    "bitfit after fishmask": (lambda: chain(fishmask(0.5), bitfit()), "is already a Sparse; apply bitfit first"),
    "adapter size": (lambda: adapter(0), "adapter: size must be a whole number of at least 1; got 0"),
    "adapter activation": (lambda: adapter(4, activation="gulu"), "'gulu' is not supported; supported are"),
    "adapter std": (lambda: pfeiffer(4, std=0.0), "pfeiffer: std must be above 0"),
    "adapter in a layer that is not there": (lambda: adapter(4, layers=[1, 2]), r"among \[0, 1\] .* got \[1, 2\]"),
    "adapter in no layer": (lambda: adapter(4, layers=[]), r"among \[0, 1\]"),
    "parallel adapter nowhere": (lambda: parallel_adapter(4, where=["norm"]), "'attention' and 'mlp'"),
    "parallel adapter scale": (lambda: parallel_adapter(4, scale=0), "scale must be above 0"),
    "adapter twice": (lambda: chain(adapter(4), parallel_adapter(4)), "parallel_adapter overwrites .*mlp_output"),
    "prompt length": (lambda: prompt(0), "prompt: length must be a whole number"),
    "prompt start": (lambda: prompt(2, start="zero"), "'vocabulary' or 'random'"),
    "prompt bound": (lambda: prompt(2, start="random", bound=0), "bound must be above 0"),
    "prompt with too many ids": (lambda: prompt(2, ids=[1, 2, 3]), "at most 2 numbers"),
    "prompt ids no numbers": (lambda: prompt(2, ids=[1.5]), "at most 2 numbers"),  # type: ignore[list-item] # the point
    "prompt beyond the table": (lambda: prompt(2, ids=[VOCAB]), "no token 37; the embedding has 37 rows"),
    "prompt text without ids": (lambda: prompt(2, text="Is it so?"), "with_text_ids"),
    "prompt twice": (lambda: chain(prompt(2), p_tuning(3)), "p_tuning overwrites .* prompt already rewrote"),
    "p_tuning encoder": (lambda: p_tuning(2, encoder="gru"), "'lstm' or 'mlp'"),
    "p_tuning hidden": (lambda: p_tuning(2, hidden=0), "hidden must be a whole number of at least 1"),
    "ia3 of an embedding": (lambda: ia3(["embedding"]), "no kind of site .*'query'"),
    "ia3 of a bias": (lambda: ia3([".*/query/bias"]), "query/bias is no linear layer"),
    "tokens without ids": (lambda: trainable_tokens([]), "different numbers of at least 0"),
    "tokens no numbers": (lambda: trainable_tokens([1.5]), "different numbers of at least 0; got"),  # type: ignore[list-item] # the point
    "tokens trained twice": (
        lambda: chain(trainable_tokens([2, 5]), lora(2, targets=["embedding"]), trainable_tokens([5, 6])),
        "token 5 of .* is trained already",
    ),
    "tokens twice": (lambda: trainable_tokens([3, 3]), "different numbers of at least 0"),
    "tokens out of range": (lambda: trainable_tokens([5, VOCAB]), "no token 37; .* has 37 rows"),
    "tokens count": (lambda: trainable_tokens(count=0), "count must be a whole number"),
    "tokens unobserved": (lambda: trainable_tokens()._replace(observe=None), "needs ids, or data before init"),
    "tokens tied": (lambda: trainable_tokens([1], tied_embedding="head"), "'both' or 'take'"),
    "child-tuning mode": (lambda: child_tuning("E"), "'F' or 'D'"),
    "child-tuning share": (lambda: child_tuning(p=0), "above 0 and at most 1; got 0"),
    "child-tuning samples": (lambda: child_tuning("D", samples=0), "samples must be a whole number"),
    "child-tuning unobserved": (lambda: child_tuning("D")._replace(observe=None), "needs data before init"),
    "child-tuning after lora": (lambda: chain(lora(2), child_tuning("D", samples=5)), "is already a LoRA; put child"),
    "norms twice": (lambda: chain(norm_tuning(), bitfit()), "is already a Trained; apply bitfit first or leave it out"),
    "head twice": (lambda: chain(head(), head()), "already"),
    "prefix twice": (lambda: chain(prefix(2), prefix(3)), "prefix overwrites .* prefix already rewrote"),
    "empty chain": (lambda: chain(), "at least one"),
}


@pytest.mark.parametrize("what", BAD)
def test_law_8_bad_input(models, what):
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        _adapt_anew(models["bert"], make())


@ALL_CASES
def test_law_8_stacked_parameters_are_refused(models, name):
    model = models["bert"]
    with pytest.raises(ValueError, match="per-layer layout"):
        CASES[name].method.init(jax.random.key(0), stack_layers(model.params), model.sites)


PAIRS = [
    (lora(rank=2), bitfit()),
    (bitfit(), head()),
    (prefix(3), lora(rank=2, targets=["linear"])),
    (fishmask(0.2, score="random"), head()),
    (fishmask(0.1, score="random", targets=["mlp_in"]), lora(rank=2, targets=["query"])),
    (prefix(2), fishmask(0.2, score="random")),
    (lora(rank=2, targets=["query"]), lora(rank=3, targets=["key"])),
    (prefix(3, mlp=True, hidden=5), head()),
    (prompt(3), lora(rank=2)),
    (prefix(3), prompt(2)),
    (adapter(2), ia3(["key"])),
    (ia3(["value"]), lora(rank=2, targets=["value"])),
    (trainable_tokens([1, 4]), norm_tuning()),
    (norm_tuning(), bitfit(["query"])),
    (dylora(3, targets=["query"]), lora(rank=2, targets=["key"])),
    (adalora(2, 3, targets=["query"]), lora(rank=2, targets=["key"])),
    (lora(rank=2, targets=["query"]), lora_fa(rank=2, targets=["mlp_in"])),
    (lora_plus(rank=2, targets=["query"]), pissa(rank=2, targets=["value"])),
    (pissa(rank=2, targets=["mlp_in"]), olora(rank=2, targets=["mlp_out"])),
    (vera(rank=4), vera(rank=3, targets=["mlp_in"], seed=1)),
    (vera(rank=4), lora(rank=2, targets=["mlp_out"])),
]


@EVERY
@pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "+".join(n for m in p for n, _ in m.spec))
def test_law_10_chain_equals_both(models, family, pair):
    model = models[family]
    key = jax.random.key(1)
    together = chain(*pair).init(key, model.params, model.sites)
    one = pair[0].init(jax.random.fold_in(key, 0), model.params, model.sites)
    both = pair[1].init(jax.random.fold_in(key, 1), one, model.sites)
    assert jax.tree.structure(together) == jax.tree.structure(both)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(both), strict=True))
    masks = [flatten(m.trainable(together)) for m in (*pair, chain(*pair))]
    assert all(masks[2][p] == (masks[0][p] or masks[1][p]) for p in masks[2])


def test_the_default_rate_of_a_chain_suits_all_its_parts():
    alone = {m.spec[0][0]: default_rate(m, 128) for m in (lora(), prompt(), head())}
    assert alone["lora"] < alone["prompt"]
    assert default_rate(chain(prompt(), lora(), head()), 128) == alone["lora"], "a prompt's would make LoRA diverge"
    assert default_rate(chain(prompt(), head()), 128) == alone["prompt"], "the head's does not count"
    assert default_rate(chain(prompt(), lora()), 128, {"prompt": 1e-3, "lora": 1e-2}) == 1e-3
