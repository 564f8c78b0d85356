"""The families against transformers on tiny random models, and what each must hold by itself."""

import itertools
import json
import math
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import CAPP, MINILM, SHARED, STORIES, needs_shared

from peftjax import hub
from peftjax.layout import stack_layers
from peftjax.methods import bitfit, chain, lora, prefix
from peftjax.models.layers import ACTIVATIONS, REMAT, attention, causal_mask
from peftjax.models.rope import rope_angles
from peftjax.tree import cast, combine, count, flatten, partition

LAYOUTS = {"per-layer": lambda params: params, "scanned": stack_layers}
layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)

BERT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 20,
    "type_vocab_size": 3,
}
LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {
    "vocab_size": 50,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def fast(f):
    """`jax.jit` that compiles in half the time, for functions that run once."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def torch_model(name, config, seed=0):
    """A random torch model whose attention is far from uniform, with biases and norms away from 0 and 1."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            norm = ("norm" in path.lower() or "ln_" in path) and path.endswith("weight")
            p.copy_(torch.randn(p.shape) * 0.2 + (1.0 if norm else 0.0))
    return model


def moved(model, folder, **kwargs):
    """The torch model as ours, by way of a folder: the loader is part of the test."""
    model.save_pretrained(folder)
    return hub.load(folder, **kwargs)


def texts(length=9, padding=None, rows=3, types=0, vocab=50, seed=0):
    """A batch as numpy arrays; row i has i + 1 padded positions at the side, the last row none."""
    rng = np.random.default_rng(seed)
    batch = {"input_ids": rng.integers(3, vocab, (rows, length)), "attention_mask": np.ones((rows, length), int)}
    for i in range(rows - 1 if padding else 0):
        side = slice(0, i + 1) if padding == "left" else slice(length - i - 1, length)
        batch["attention_mask"][i, side] = 0
        batch["input_ids"][i, side] = 0
    if types:
        batch["type_ids"] = rng.integers(0, types, (rows, length))
    return batch


def ours(model, batch, layout=LAYOUTS["per-layer"], params=None, **kwargs):
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
    params = layout(model.params if params is None else params)
    return fast(lambda params, batch: model.forward(params, batch, **kwargs))(params, batch)


def theirs(model, batch) -> Any:
    torch: Any = pytest.importorskip("torch")
    names = {"type_ids": "token_type_ids", "positions": "position_ids"}
    batch = {names.get(k, k): torch.tensor(v) for k, v in batch.items()}
    with torch.no_grad():
        return model(**batch)


def assert_same(got, want, at: Any = ..., atol=1e-4):
    np.testing.assert_allclose(np.asarray(got)[at], np.asarray(want)[at], atol=atol, rtol=0)


# Parity with transformers: BERT


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_bert_encoder(tmp_path, padding):
    torch_bert = torch_model("BertModel", transformers.BertConfig(**BERT))
    model = moved(torch_bert, tmp_path)
    batch = texts(padding=padding, types=3)
    want, real = theirs(torch_bert, batch), batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout)
        assert_same(got.hidden, want.last_hidden_state, real)
        assert_same(got.pooled, want.pooler_output)
        assert got.logits is None


@pytest.mark.parametrize(
    "extra",
    [
        {"num_labels": 3},
        {"num_labels": 1, "hidden_act": "gelu_new"},
        {"hidden_act": "relu", "classifier_dropout": 0.3, "layer_norm_eps": 1e-3},
    ],
    ids=["pairs", "regression", "relu"],
)
def test_bert_classifier(tmp_path, extra):
    torch_bert = torch_model("BertForSequenceClassification", transformers.BertConfig(**BERT, **extra))
    model = moved(torch_bert, tmp_path)
    batch = texts(padding="right", types=2)
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout)
        assert got.logits.shape == (3, extra.get("num_labels", 2))
        assert_same(got.logits, theirs(torch_bert, batch).logits)


def test_bert_without_mask_and_types(tmp_path):
    torch_bert = torch_model("BertModel", transformers.BertConfig(**BERT))
    batch = {"input_ids": texts()["input_ids"]}
    want = theirs(torch_bert, batch).last_hidden_state
    assert_same(ours(moved(torch_bert, tmp_path), batch).hidden, want)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    torch = pytest.importorskip("torch")
    from transformers.activations import ACT2FN

    x = np.linspace(-6, 6, 201, dtype=np.float32)
    there = torch.tensor(x, requires_grad=True)
    y = ACT2FN[name](there)
    (slope,) = torch.autograd.grad(y.sum(), there)
    assert_same(ACTIVATIONS[name](jnp.asarray(x)), y.detach(), atol=2e-6)
    assert_same(jax.grad(lambda x: ACTIVATIONS[name](x).sum())(jnp.asarray(x)), slope, atol=6e-6)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name not in ("relu", "tanh")])
def test_the_backward_pass_keeps_one_array_of_an_activation(name):
    x = jax.ShapeDtypeStruct((7, 5), jnp.bfloat16)
    backward = jax.eval_shape(lambda x: jax.vjp(ACTIVATIONS[name], x)[1], x)
    assert [(k.shape, k.dtype) for k in jax.tree.leaves(backward)] == [((7, 5), jnp.bfloat16)]


# Parity with transformers: Llama

SHAPES: dict[str, Any] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1, "rms_norm_eps": 1e-2},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    "head_dim": {"head_dim": 12, "attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("extra", SHAPES.values(), ids=SHAPES)
def test_llama_shapes(tmp_path, extra):
    torch_llama = torch_model("LlamaForCausalLM", transformers.LlamaConfig(**{**LLAMA, **extra}))
    model = moved(torch_llama, tmp_path)
    assert ("lm_head" in model.params) is not extra.get("tie_word_embeddings", False)
    left, right = texts(padding="left"), texts(padding="right", seed=1)
    batch = {k: np.concatenate([left[k], right[k]]) for k in left}
    want, real = theirs(torch_llama, batch).logits, batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4],
    "long_factor": [2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5],
    "original_max_position_embeddings": 12,
}
ROPES: dict[str, Any] = {  # the parameters, and whether lengths on both sides of a boundary matter
    "default": {"rope_type": "default", "rope_theta": 50.0},
    "linear": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 0.5,
        "high_freq_factor": 2.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {**YARN, "beta_fast": 2.0, "beta_slow": 0.25},
    "yarn-defaults": YARN,
    "yarn-factor": {**YARN, "attention_factor": 0.7, "beta_fast": 1.0, "beta_slow": 0.25},
    "yarn-mscale": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 2.0},
    "yarn-mscale-alone": {**YARN, "mscale": 0.7},
    "yarn-no-truncate": {**YARN, "truncate": False, "beta_fast": 1.0, "beta_slow": 0.3},
    "longrope": {**LONG, "factor": 1.5},
    "longrope-no-factor": LONG,
    "longrope-attention": {**LONG, "attention_factor": 1.3},
    "proportional": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    "proportional-factor": {
        "rope_type": "proportional",
        "rope_theta": 100.0,
        "partial_rotary_factor": 0.75,
        "factor": 2.0,
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_llama_rope(tmp_path, rope):
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}, head_dim=16, rope_parameters=dict(rope))
    torch_llama = torch_model("LlamaForCausalLM", config)
    model = moved(torch_llama, tmp_path)
    for length, layout in ((9, "scanned"), (23, "per-layer")):  # within and beyond 12 and 16
        batch = texts(length, "right")
        want, real = theirs(torch_llama, batch).logits, batch["attention_mask"] > 0
        assert_same(ours(model, batch, LAYOUTS[layout]).logits, want, real)


def test_rope_types_are_distinguishable():
    """The parity of one type says something only if the types differ at the tested lengths."""
    positions = jnp.arange(23)[None]
    angles = {n: jnp.stack(rope_angles(p, 16, 16, positions)) for n, p in ROPES.items()}
    for a, b in itertools.combinations(ROPES, 2):
        if {a, b} != {"yarn-defaults", "yarn-mscale-alone"}:  # one of the two scales alone means nothing
            assert jnp.abs(angles[a] - angles[b]).max() > 1e-2, (a, b)


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 77.0},
        {"rope_theta": 77.0, "rope_scaling": None},
        {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_theta": 77.0, "rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0}},
    ],
)
def test_both_spellings_of_rope(tmp_path, spelling):
    config = transformers.LlamaConfig(**LLAMA, **json.loads(json.dumps(spelling)))
    torch_llama = torch_model("LlamaForCausalLM", config)
    torch_llama.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps({**raw, **spelling}))
    model = hub.load(tmp_path)
    assert model.config.rope_parameters["rope_theta"] == 77.0
    batch = texts(20)
    assert_same(ours(model, batch).logits, theirs(torch_llama, batch).logits)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_llama_classifier(tmp_path, padding):
    config = transformers.LlamaConfig(**{**LLAMA, "num_labels": 3})
    torch_llama = torch_model("LlamaForSequenceClassification", config)
    model = moved(torch_llama, tmp_path)
    batch = texts(padding=padding)
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, theirs(torch_llama, batch).logits)


def test_llama_base(tmp_path):
    torch_llama = torch_model("LlamaModel", transformers.LlamaConfig(**LLAMA))
    batch = texts()
    got = ours(moved(torch_llama, tmp_path), batch)
    assert_same(got.hidden, theirs(torch_llama, batch).last_hidden_state)
    assert got.logits is None


# Parity with transformers: GPT-2

SCALES: dict[str, Any] = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
VARIANTS: dict[str, Any] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False, "n_inner": 40},
    "by layer": {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3},
    "unscaled": {"scale_attn_weights": False, "activation_function": "relu"},
    "by layer, unscaled": {**SCALES, "activation_function": "gelu", "layer_norm_epsilon": 1e-2},
    "upcast": {"reorder_and_upcast_attn": True, "attn_implementation": "eager", "scale_attn_weights": False},
}


@pytest.mark.parametrize("extra", VARIANTS.values(), ids=VARIANTS)
def test_gpt2_variants(tmp_path, extra):
    torch_gpt2 = torch_model("GPT2LMHeadModel", transformers.GPT2Config(**{**GPT2, **extra}))
    model = moved(torch_gpt2, tmp_path)
    assert ("lm_head" in model.params) is not extra.get("tie_word_embeddings", True)
    left, right = texts(padding="left"), texts(padding="right", seed=1)
    batch = {k: np.concatenate([left[k], right[k]]) for k in left}
    want, real = theirs(torch_gpt2, batch).logits, batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


@pytest.mark.parametrize("counted", ["slots", "tokens"])
def test_gpt2_base(tmp_path, counted):
    torch_gpt2 = torch_model("GPT2Model", transformers.GPT2Config(**GPT2))
    model = moved(torch_gpt2, tmp_path)
    batch = texts(padding="left")
    if counted == "tokens":  # as a generator counts: from the first token that is no padding
        batch["positions"] = np.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout)
        assert_same(got.hidden, theirs(torch_gpt2, batch).last_hidden_state, batch["attention_mask"] > 0)
        assert got.logits is None


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_gpt2_classifier(tmp_path, padding):
    torch_gpt2 = torch_model("GPT2ForSequenceClassification", transformers.GPT2Config(**GPT2, num_labels=3))
    model = moved(torch_gpt2, tmp_path)
    batch = texts(padding=padding)
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, theirs(torch_gpt2, batch).logits)


# Real weights


@needs_shared
def test_capp_gpt2():
    pytest.importorskip("torch")
    model, reference = hub.load(CAPP), transformers.GPT2LMHeadModel.from_pretrained(CAPP, dtype="float32").eval()
    batch = texts(40, "left", rows=4, vocab=53)
    want, real = theirs(reference, batch).logits, batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real, atol=5e-4)  # of logits up to 60


@needs_shared
def test_minilm_hidden_states():
    pytest.importorskip("torch")
    reference = transformers.BertModel.from_pretrained(MINILM, dtype="float32").eval()
    tokens = transformers.AutoTokenizer.from_pretrained(MINILM)(
        ["A man is eating.", "How are you?", "The weather today"],
        ["Someone is having a meal in a small restaurant.", "Fine.", "is awful: it rains."],
        padding=True,
        return_tensors="np",
    )
    batch = {"type_ids" if k == "token_type_ids" else k: v for k, v in tokens.items()}
    want, real = theirs(reference, batch), batch["attention_mask"] > 0
    assert not real.all()
    for layout in LAYOUTS.values():
        got = ours(hub.load(MINILM), batch, layout)
        assert_same(got.hidden, want.last_hidden_state, real)
        assert_same(got.pooled, want.pooler_output)


@needs_shared
@layouts
def test_stories_greedy(layout):
    """Each expected token is the most likely one after those before it: greedy decoding, in one forward."""
    model = hub.load(STORIES)
    expected = json.loads((STORIES / "expected.json").read_text())
    ids = np.asarray(expected["greedy_from_bos_ids"])
    assert ids[0] == model.hf_config.bos_token_id
    assert len(ids) > 100
    got = ours(model, {"input_ids": ids[None, :-1]}, layout).logits
    np.testing.assert_array_equal(np.argmax(got[0], axis=-1), ids[1:])


# Cached decoding


DECODERS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, attention_bias=True),
    "gpt2": lambda: transformers.GPT2Config(**GPT2, **SCALES),
}


@layouts
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("with_prefix", [False, True], ids=["plain", "prefix"])
def test_cached_equals_uncached(family, layout, with_prefix, key):
    model = hub.from_config(DECODERS[family](), "causal-lm")
    params = jax.tree.map(lambda x: x * 4, model.params)
    if with_prefix:
        params = prefix(length=3, std=1.0).init(key, params, model.sites)
    params = layout(params)
    batch = {k: jnp.asarray(v) for k, v in texts(11, "left").items()}
    if with_prefix:  # as a generator counts: from the first token that is no padding; else by slots
        batch["positions"] = jnp.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    want = ours(model, batch, params=params)
    step = fast(lambda params, batch, cache: model.forward(params, batch, cache=cache))
    cache, logits = model.empty_cache(params, 3, 14), []
    for piece in (slice(0, 6), *(slice(i, i + 1) for i in range(6, 11))):
        out = step(params, {k: v[:, piece] for k, v in batch.items()}, cache)
        cache = out.cache
        logits.append(out.logits)
    assert cache.index == 11
    real = np.asarray(batch["attention_mask"]) > 0
    assert_same(jnp.concatenate(logits, axis=1), want.logits, real)
    assert jnp.abs(want.logits).max() > 0.1


@pytest.mark.parametrize("family", DECODERS)
def test_last_only(family):
    model = hub.from_config(DECODERS[family](), "causal-lm")
    batch = texts()
    assert_same(ours(model, batch, last_only=True).logits, ours(model, batch).logits[:, -1:], atol=1e-6)


# bfloat16


def equations(jaxpr):
    """All equations of a jaxpr, those inside scans, checkpoints and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


MIXED = {
    "plain": None,
    "bitfit": bitfit(),
    "lora": lora(rank=2, targets=["linear", "embedding"], rslora=True, alpha=3),
    "parts": chain(lora(rank=2, targets=["query", "value"]), bitfit(["key"])),
    "prefix": prefix(length=2),
    "all": chain(lora(rank=2, targets=["linear"]), bitfit(), prefix(length=2)),
}


def bf16_model(family, param_dtype):
    if family == "bert":
        model = hub.from_config(transformers.BertConfig(**BERT), "classification", dtype=jnp.bfloat16)
    elif family == "gpt2":
        config = transformers.GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)
        model = hub.from_config(config, "causal-lm", dtype=jnp.bfloat16)
    else:
        config = transformers.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
        model = hub.from_config(config, "causal-lm", dtype=jnp.bfloat16)
    return model._replace(params=cast(model.params, param_dtype))


@layouts
@pytest.mark.parametrize("method", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_bf16_is_not_promoted(family, method, layout, key):
    model = bf16_model(family, jnp.float32 if method is None else jnp.bfloat16)
    params = model.params
    if method is not None:
        params = method.init(key, params, model.sites)
        trainable, frozen = partition(params, method.trainable(params))
        params = combine(cast(trainable, jnp.float32), frozen)
    batch = {k: jnp.asarray(v) for k, v in texts(padding="right").items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(layout(params), batch)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 7
    mixed = [e for e in dots if {v.aval.dtype for v in e.invars} != {jnp.dtype(jnp.bfloat16)}]
    if method is MIXED["lora"]:  # rows of the embedding are looked up in the table's dtype, then cast
        assert re.search("embed|wte", str(mixed.pop(0).source_info.name_stack))
    assert not mixed  # a promoted sum would be an operand of some later product


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_bf16_is_close_to_float32(family):
    model = bf16_model(family, jnp.float32)
    exact = model._replace(module=model.module.clone(dtype=jnp.float32))
    batch = texts(padding="right")
    got, want = ours(model, batch), ours(exact, batch)
    assert want.hidden.dtype == jnp.float32
    real = batch["attention_mask"] > 0
    assert_same(got.hidden.astype(jnp.float32), want.hidden, real, atol=0.06)
    assert 0 < jnp.abs(got.logits - want.logits).max() < 0.06


# Rematerialisation


@layouts
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_remat_changes_no_gradient(family, layout, key):
    if family == "bert":
        make, config = "classification", transformers.BertConfig(**BERT)
    else:
        make, config = "causal-lm", DECODERS[family]()
    method = lora(rank=2, targets=["query", "mlp_out"], dropout=0.5)
    batch = {k: jnp.asarray(v) for k, v in texts(padding="right").items()}
    model = hub.from_config(config, make)
    params = layout(method.init(key, jax.tree.map(lambda x: x * 4, model.params), model.sites))
    trainable, frozen = partition(params, method.trainable(params))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    results = []
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))

        def loss(trainable, frozen, key, again=again):
            out: Any = again.forward(method.resolve(combine(trainable, frozen), key), batch)
            return jnp.square(out.logits).mean()

        closed = jax.make_jaxpr(loss)(trainable, frozen, key)
        blocks = [e for e in equations(closed.jaxpr) if e.primitive.name in ("remat2", "checkpoint", "remat")]
        assert bool(blocks) is (remat != "none")
        value_and_grad = fast(jax.value_and_grad(loss))
        results.append(value_and_grad(trainable, frozen, key))
        other, _ = value_and_grad(trainable, frozen, jax.random.key(1))
        assert abs(other - results[-1][0]) > 1e-6  # the dropout is on
    (loss0, grad0), *others = results
    for loss1, grad1 in others:
        assert_same(loss1, loss0, atol=1e-6)
        for path, g in flatten(grad0).items():
            assert jnp.abs(g).max() > 0, path
            assert_same(flatten(grad1)[path], g, atol=3e-6)


# Dropout


class Attend(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, q, k, v, mask):
        return attention(self, q, k, v, mask, dropout=self.rate, deterministic=False)


def heads(key, queries=5, keys=7, q_heads=4, kv_heads=2, size=8):
    q, k, v = jax.random.split(key, 3)
    return (
        jax.random.normal(q, (2, queries, q_heads, size)),
        jax.random.normal(k, (2, keys, kv_heads, size)),
        jax.random.normal(v, (2, keys, kv_heads, size)),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("extra", [0, 2], ids=["text", "prefix"])
def test_attention_with_tiny_dropout_is_attention(kv_heads, extra, key):
    q, k, v = heads(key, queries=5, keys=5 + extra, kv_heads=kv_heads)
    mask = causal_mask(jnp.asarray(texts(5, "left", rows=2)["attention_mask"]))
    want = fast(lambda *args: attention(None, *args))(q, k, v, mask)
    got = fast(lambda *args: Attend(1e-9).apply({}, *args, rngs={"dropout": key}))(q, k, v, mask)
    seen = jnp.concatenate([jnp.ones((2, 1, 5, extra), bool), mask], axis=-1)  # a prefix is always seen
    assert_same(attention(None, q, k, v, seen), want, atol=1e-6)
    real = np.any(mask, axis=-1)[:, 0]
    assert_same(got, want, real, atol=1e-5)


def test_attention_dropout_has_the_right_mean(key):
    q, k, v = heads(key)
    mask = jnp.ones((2, 1, 5, 7), bool).at[0, :, :, :2].set(False)
    keys = jax.random.split(key, 4000)
    draws = jax.jit(jax.vmap(lambda key: Attend(0.4).apply({}, q, k, v, mask, rngs={"dropout": key})))(keys)
    error = draws.std(0) / math.sqrt(len(keys))
    assert draws.std(0).min() > 0.05
    assert (jnp.abs(draws.mean(0) - attention(None, q, k, v, mask)) < 5 * error).all()


@layouts
@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_bert_dropout(rate, layout, key):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    rates: dict[str, Any] = {**dict.fromkeys(names, 0.0), rate: 0.5}
    model = hub.from_config(transformers.BertConfig(**BERT, **rates), "classification")
    batch = {k: jnp.asarray(v) for k, v in texts().items()}
    params = layout(jax.tree.map(lambda x: x * 5, model.params))
    forward = fast(model.forward)
    first, again, other = (forward(params, batch, k) for k in (key, key, jax.random.key(1)))
    plain = forward(params, batch)
    assert_same(first.logits, again.logits, atol=0)
    for x in (other, plain):
        assert jnp.abs(first.logits - x.logits).max() > 1e-3
    assert (jnp.abs(first.hidden - plain.hidden).max() == 0) == (rate == "classifier_dropout")


def test_llama_attention_dropout(key):
    model = hub.from_config(transformers.LlamaConfig(**LLAMA, attention_dropout=0.5), "causal-lm")
    batch = {k: jnp.asarray(v) for k, v in texts().items()}
    forward = fast(model.forward)
    first, other, plain = (forward(model.params, batch, k).logits for k in (key, jax.random.key(1), None))
    for x in (other, plain):
        assert jnp.abs(first - x).max() > 1e-6


@layouts
@pytest.mark.parametrize("rate", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_gpt2_dropout(rate, layout, key):
    rates: dict[str, Any] = {**dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0), rate: 0.5}
    model = hub.from_config(transformers.GPT2Config(**GPT2, **rates), "causal-lm")
    batch = {k: jnp.asarray(v) for k, v in texts().items()}
    params = layout(jax.tree.map(lambda x: x * 5, model.params))
    forward = fast(model.forward)
    first, again, other, plain = (forward(params, batch, k).logits for k in (key, key, jax.random.key(1), None))
    assert_same(first, again, atol=0)
    for x in (other, plain):
        assert jnp.abs(first - x).max() > 1e-3


def test_scanned_layers_draw_their_own_dropout(key):
    """With equal layers, one mask for all would drop the same inputs twice."""
    params = {"layer_*": {"x": jnp.zeros((2, 1))}}

    class Drop(nn.Module):
        @nn.compact
        def __call__(self, x, cache, context):
            self.get_variable("params", "x")
            return nn.Dropout(0.5)(x, deterministic=context.deterministic), cache

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            from peftjax.models.layers import Context, run_blocks

            context = Context(None, jnp.zeros((1, 1)), deterministic=False)
            return run_blocks(self, lambda name: Drop(name=name), "layer", 2, x, context, None, remat="none")[0]

    y = np.asarray(Stack().apply({"params": params}, jnp.ones(2000), rngs={"dropout": key}))
    assert abs((y > 0).mean() - 0.25) < 0.05


# Input that the models refuse


def test_bert_refuses_what_passes_its_positions(key):
    model = hub.from_config(transformers.BertConfig(**BERT), "encoder")
    ours(model, texts(20))
    with pytest.raises(ValueError, match="21 tokens are more than the 20 positions"):
        ours(model, texts(21))
    params = prefix(length=3).init(key, model.params, model.sites)
    ours(model, texts(17), params=params)
    with pytest.raises(ValueError, match="18 tokens after 3 virtual ones"):
        ours(model, texts(18), params=params)


def test_gpt2_refuses_what_passes_its_positions(key):
    model = hub.from_config(transformers.GPT2Config(**GPT2), "causal-lm")
    ours(model, texts(20))
    with pytest.raises(ValueError, match="21 tokens are more than the 20 positions"):
        ours(model, texts(21))
    params = prefix(length=3).init(key, model.params, model.sites)
    ours(model, texts(17), params=params)
    with pytest.raises(ValueError, match="18 tokens after 3 virtual ones"):
        ours(model, texts(18), params=params)
    ours(model, texts(4), cache=model.empty_cache(model.params, 3, 20))
    with pytest.raises(ValueError, match="21 tokens are more than the 20 positions"):
        ours(model, texts(4), cache=model.empty_cache(model.params, 3, 21))


@pytest.mark.parametrize("family", DECODERS)
def test_decoders_refuse_type_ids(family):
    model = hub.from_config(DECODERS[family](), "causal-lm")
    with pytest.raises(ValueError, match="no token types"):
        ours(model, texts(types=2))


# Counts, from shapes alone; derivations in shared/papers/tables.yaml

BERT_LARGE: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
LLAMA_13B: dict[str, Any] = {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
}
LLAMA_3: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "intermediate_size": 14336}
COUNTS: dict[str, Any] = {
    "bert-base-cased": ("BertConfig", {"vocab_size": 28996}, 108310272),
    "bert-large-cased": ("BertConfig", {"vocab_size": 28996, **BERT_LARGE}, 333579264),
    "bert-base-uncased": ("BertConfig", {"vocab_size": 30522}, 109482240),
    "bert-large-uncased": ("BertConfig", {"vocab_size": 30522, **BERT_LARGE}, 335141888),
    "gpt2-medium": ("GPT2Config", {"n_embd": 1024, "n_layer": 24, "n_head": 16}, 354823168),
    "gpt2-large": ("GPT2Config", {"n_embd": 1280, "n_layer": 36, "n_head": 20}, 774030080),
    "llama-7b": ("LlamaConfig", {}, 6738415616),
    "llama-13b": ("LlamaConfig", LLAMA_13B, 13015864320),
    "llama-3-8b": ("LlamaConfig", LLAMA_3, 8030261248),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    cls, extra, want = COUNTS[name]
    task = "encoder" if cls == "BertConfig" else "causal-lm"
    model = hub.from_config(getattr(transformers, cls)(**extra), task, seed=None)
    assert count(model.params) == want


@needs_shared
def test_counts_are_those_of_the_tables():
    yaml = pytest.importorskip("yaml")
    rows = yaml.safe_load((SHARED / "papers/tables.yaml").read_text())["count_tests"]
    published = {r["id"]: r["count"] for r in rows}
    assert {n: c for n, (_, _, c) in COUNTS.items()} == {n: published[f"total_{n}"] for n in COUNTS}


# Sites


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_sites_name_the_tree(family):
    model = bf16_model(family, jnp.float32)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "mlp", "block", "positions", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    weights = {p for p in leaves if p.endswith(("/kernel", "/embedding", "/scale"))}
    assert weights == {s.path for s in model.sites} & set(leaves)
