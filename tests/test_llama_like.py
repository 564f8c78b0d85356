"""Mistral, Qwen2 and Qwen3, Llama's blocks with other designs, against transformers on tiny random models."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, fast, moved, ours, texts, theirs, torch_model

from peftjax import chain, count, hub, stack_layers
from peftjax.generate import Decoding, decoder
from peftjax.methods import bitfit, lora, norm_tuning, prefix, prompt
from peftjax.models.layers import causal_mask, window
from peftjax.tree import cast, flatten

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SLIDES: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3}
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 4}),
    "mistral, all seen": (
        "Mistral",
        {"sliding_window": None, "head_dim": 12, "hidden_act": "gelu", "rms_norm_eps": 1e-2, "num_key_value_heads": 1},
    ),
    "mistral, one seen": ("Mistral", {"sliding_window": 1, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen2, last layers slide": ("Qwen2", {**SLIDES, "max_window_layers": 1, "num_key_value_heads": 4}),
    "qwen2, a first layer slides": (
        "Qwen2",
        {**SLIDES, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 10, "rms_norm_eps": 1e-2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "qwen3, last layers slide": (
        "Qwen3",
        {**SLIDES, "max_window_layers": 1, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3, all slide": ("Qwen3", {**SLIDES, "max_window_layers": 0, "head_dim": 16, "rope_parameters": YARN}),
}
SLIDING = ("mistral", "qwen2, a first layer slides", "qwen3, last layers slide")
ONE_LAYOUT = pytest.mark.parametrize(
    ("name", "layout"), [*zip(SLIDING, ("per-layer", "per-layer", "scanned"), strict=True)]
)


def torch_like(name, head="ForCausalLM", **changes):
    family, extra = VARIANTS[name]
    config = getattr(transformers, family + "Config")(**{**SIZES, **extra, **changes})
    return torch_model(family + head, config)


def padded() -> dict[str, Any]:
    """Texts with padding on the left, and others with padding on the right."""
    left, right = texts(padding="left"), texts(padding="right", seed=1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(tmp_path, name):
    torch_one, batch = torch_like(name), padded()
    model = moved(torch_one, tmp_path)
    assert ("lm_head" in model.params) is not VARIANTS[name][1].get("tie_word_embeddings", False)
    want, real = theirs(torch_one, batch).logits, batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


@pytest.mark.parametrize("name", SLIDING)
def test_classifier(tmp_path, name):
    """At the last token that is no padding, on either side; blocks computed again change nothing."""
    torch_one, batch = torch_like(name, "ForSequenceClassification", num_labels=3), padded()
    model = moved(torch_one, tmp_path, remat="block")
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, theirs(torch_one, batch).logits)


def test_base_without_a_mask(tmp_path):
    torch_one, batch = torch_like("qwen3, last layers slide", "Model"), {"input_ids": texts()["input_ids"]}
    got = ours(moved(torch_one, tmp_path), batch)
    assert got.logits is None
    assert_same(got.hidden, theirs(torch_one, batch).last_hidden_state)


# Windows


@pytest.mark.parametrize("size", [1, 2, 5, 9, 20])
def test_a_window_leaves_the_last_keys_that_are_seen(size):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 1, 4, 9)) < 0.6
    want = np.zeros_like(mask)
    for row in np.ndindex(mask.shape[:3]):
        want[row][np.flatnonzero(mask[row])[-size:]] = True
    np.testing.assert_array_equal(window(jnp.asarray(mask), size), want)


def test_a_window_is_that_of_transformers():
    """A token sees itself and the `size` - 1 before it."""
    seen = window(causal_mask(jnp.ones((1, 6), int)), 3)[0, 0]
    i, j = np.indices((6, 6))
    np.testing.assert_array_equal(seen, (j <= i) & (j > i - 3))


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@ONE_LAYOUT
def test_generation_past_the_window_is_that_of_transformers(tmp_path, name, layout):
    torch: Any = pytest.importorskip("torch")
    torch_one, batch = torch_like(name), texts(8, "left", rows=4)
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    want = torch_one.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 8:]
    model = moved(torch_one, tmp_path)
    got = decoder(model, Decoding(12), 0)(LAYOUTS[layout](model.params), *batch.values())
    np.testing.assert_array_equal(got, want)
    assert len({tuple(row.tolist()) for row in want}) > 1
    wide = hub.from_config(_wider(model.hf_config), "causal-lm", seed=None)._replace(params=model.params)
    assert not np.array_equal(decoder(wide, Decoding(12), 0)(model.params, *batch.values()), want)


def _wider(config):
    """The config without a window."""
    values = {**config.to_dict(), "sliding_window": None, "layer_types": None, "use_sliding_window": False}
    if config.model_type == "mistral":
        del values["layer_types"], values["use_sliding_window"]
    return type(config)(**values)


@pytest.mark.parametrize("layout", [pytest.param("per-layer", marks=pytest.mark.slow), "scanned"])
def test_a_cache_and_padding_change_nothing(layout, key):
    """Rows with a prefix and a prompt, whose virtual tokens the window leaves behind; each as if it were alone."""
    changes: dict[str, Any] = {**VARIANTS["qwen3, last layers slide"][1], "sliding_window": 4}
    model = hub.from_config(transformers.Qwen3Config(**{**SIZES, **changes}), "causal-lm")
    method = chain(prefix(2, std=1.0), prompt(3))
    params = LAYOUTS[layout](method.init(key, tiny.roughen(model.params), model.sites))
    batch = {k: jnp.asarray(v) for k, v in texts(8, "left", rows=2).items()}
    batch["positions"] = jnp.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    want = np.asarray(ours(model, batch, params=params).logits)
    step = jax.jit(model.forward, static_argnames="continued")
    cache, logits = model.empty_cache(params, 2, 8), []
    for at in (slice(0, 5), *(slice(i, i + 1) for i in range(5, 8))):
        out = step(params, {k: v[:, at] for k, v in batch.items()}, cache=cache, continued=at.start > 0)
        cache, logits = out.cache, [*logits, out.logits]
    real = batch["attention_mask"] > 0
    assert_same(jnp.concatenate(logits, axis=1), want, real)
    alone = ours(model, {k: v[:1, 1:] for k, v in batch.items()}, params=params).logits
    assert_same(np.asarray(alone)[0], want[0, 1:])


# Files


def torch_again(folder, batch):
    (cls,) = json.loads((folder / "config.json").read_text())["architectures"]
    return theirs(getattr(transformers, cls).from_pretrained(folder).eval(), batch)[0]


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("mistral", "ForCausalLM"),
        ("mistral, one seen", "Model"),
        ("qwen2, a first layer slides", "ForCausalLM"),
        ("qwen2", "ForSequenceClassification"),
        ("qwen3", "ForCausalLM"),
        ("qwen3, last layers slide", "ForCausalLM"),
    ],
)
def test_saved_for_transformers(tmp_path, name, head, key):
    """There and back by names and bits; then what was trained, merged, computes the same in transformers."""
    torch_one, batch = torch_like(name, head), {"input_ids": texts()["input_ids"]}
    model = moved(torch_one, tmp_path / "theirs")
    hub.save(model, stack_layers(model.params), tmp_path / "ours")
    want, got = (load_file(tmp_path / f"{whose}/model.safetensors") for whose in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in want)
    assert hub.load(tmp_path / "ours").config == model.config

    biases = any(p.endswith("/bias") for p in flatten(model.params))
    method = chain(lora(2, targets=["query"]), lora(1, targets=["linear"]), bitfit() if biases else norm_tuning())
    mask = method.trainable(params := method.init(key, model.params, model.sites))
    params = jax.tree.map(lambda x, m: x + 0.1 * jax.random.normal(key, x.shape) if m else x, params, mask)
    got = ours(model, batch, params=params)
    got = got.hidden if head == "Model" else got.logits
    hub.save(model, params, tmp_path / "merged")
    assert_same(torch_again(tmp_path / "merged", batch), got)
    assert np.abs(got - theirs(torch_one, batch)[0].numpy()).max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_created_biases(tmp_path, name, key):
    """Only Qwen3's config can name any."""
    model = moved(torch_like(name), tmp_path / "theirs")
    targets = ["attention_out"] if name == "qwen2" else ["query"]
    params = tiny.roughen(bitfit(targets, create=True).init(key, model.params, model.sites))
    if name != "qwen3":
        with pytest.raises(ValueError, match=r"ForCausalLM has no place for .*_proj/bias.*as an adapter file"):
            hub.save(model, params, tmp_path / "ours")
        return
    hub.save(model, params, tmp_path / "ours")
    batch = {"input_ids": texts()["input_ids"]}
    assert_same(torch_again(tmp_path / "ours", batch), ours(model, batch, params=params).logits)


# As in the files of Mistral-7B-v0.1, Qwen2.5-3B-Instruct and Qwen3-0.6B, but for the sizes.
HUB: dict[str, dict[str, Any]] = {
    "mistral": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.34.0.dev0",
        "use_cache": True,
    },
    "qwen2": {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "max_window_layers": 70,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
    },
    "qwen3": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_older_files(tmp_path, name):
    """Their configs, buffers that are computed now, and a head that is once more the embedding."""
    torch_like(name, head_dim=8, tie_word_embeddings=name != "mistral").save_pretrained(tmp_path)
    config, file = tmp_path / "config.json", tmp_path / "model.safetensors"
    architecture = json.loads(config.read_text())["architectures"]
    config.write_text(json.dumps({**SIZES, **HUB[name], "model_type": name, "architectures": architecture}))
    tensors = load_file(file)
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"].copy())
    save_file(tensors, file, metadata={"format": "pt"})
    batch = padded()
    got, want = ours(hub.load(tmp_path), batch).logits, torch_again(tmp_path, batch)
    assert_same(got, want.float(), batch["attention_mask"] > 0, atol=0.2)  # theirs computes in the config's bfloat16
    as_32 = {**json.loads(config.read_text()), "torch_dtype": "float32"}
    config.write_text(json.dumps(as_32))
    assert_same(got, torch_again(tmp_path, batch), batch["attention_mask"] > 0)


MIXED: list[str] = ["full_attention", "sliding_attention"]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("Mistral", {"sliding_window": 0}, "sliding_window must be at least 1 where layers slide; got 0"),
    ("Mistral", {"layer_types": MIXED}, r"layer_types=\[.*\] \(supported: None\)"),
    ("Mistral", {"num_key_value_heads": 3}, "4 attention heads do not divide into 3 key/value heads"),
    ("Mistral", {"attention_bias": True}, r"attention_bias=True \(supported: None\)"),
    ("Qwen2", {"use_mrope": True}, r"use_mrope=True \(supported: False\)"),
    ("Qwen2", {"hidden_size": 30}, "hidden_size 30 does not divide into 4 attention heads"),
    ("Qwen2", {"layer_types": MIXED}, "sliding_window must be at least 1 where layers slide; got None"),
    (
        "Qwen2",
        {**SLIDES, "layer_types": ["full_attention", "chunked_attention"]},
        r"the layer_types \['chunked_attention'\] are not supported; .*'full_attention', 'sliding_attention'",
    ),
    ("Qwen3", {"layer_types": ["linear_attention"] * 2}, r"\['linear_attention'\] are not supported"),
    ("Qwen3", {**SLIDES, "sliding_window": -1, "max_window_layers": 0}, "sliding_window must be .* got -1"),
    ("Qwen3", {"hidden_act": "mish"}, "the activation 'mish' is not supported; supported are"),
    ("Qwen3", {"rope_parameters": {"rope_type": "su", "rope_theta": 1.0}}, "rope_type 'su' is not supported"),
    ("Qwen3", {"mlp_bias": True}, r"mlp_bias=True \(supported: None\)"),
]


@pytest.mark.parametrize(("family", "changes", "message"), BAD)
def test_configs_that_are_refused(family, changes, message):
    config = getattr(transformers, family + "Config")(**{**SIZES, **changes})
    with pytest.raises(ValueError, match=message):
        hub.from_config(config, "causal-lm", seed=None)


def test_layer_types_of_too_few_layers():
    config = transformers.Qwen2Config(**SIZES)
    config.layer_types = ["full_attention"]
    with pytest.raises(ValueError, match="layer_types names 1 layers, and num_hidden_layers is 2"):
        hub.from_config(config, "causal-lm", seed=None)


# Sites, counts, dtypes, dropout


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_sites_name_the_tree(name, task):
    family, extra = VARIANTS[name]
    config = getattr(transformers, family + "Config")(**{**SIZES, **extra})
    model = hub.from_config(config, task, seed=None)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "positions", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    assert {s.path for s in model.sites} & set(leaves) == {p for p in leaves if not p.endswith("/bias")}
    norms = {s.path for s in model.sites if s.kind == "norm"}
    assert ("model/layers_1/self_attn/k_norm/scale" in norms) is (family == "Qwen3")


REAL: dict[str, Any] = {
    "Mistral-7B-v0.1": transformers.MistralConfig(),
    "Qwen2.5-7B": transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
    "Qwen3-0.6B": transformers.Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_counts(name):
    torch: Any = pytest.importorskip("torch")
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(REAL[name])
    model = hub.from_config(REAL[name], "causal-lm", seed=None)
    assert count(model.params) == sum(p.numel() for p in reference.parameters())


@ONE_LAYOUT
def test_bf16_is_not_promoted(name, layout, key):
    family, extra = VARIANTS[name]
    config = getattr(transformers, family + "Config")(**{**SIZES, **extra})
    model = hub.from_config(config, "causal-lm", dtype=jnp.bfloat16)
    method = chain(lora(2, targets=["linear"]), norm_tuning(), prefix(2))
    params = LAYOUTS[layout](method.init(key, cast(model.params, jnp.bfloat16), model.sites))
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, {"input_ids": jnp.ones((2, 5), int)})
    assert out.hidden.dtype == jnp.bfloat16
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 7
    assert all({v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.bfloat16)} for e in dots)


def test_attention_dropout(key):
    config = transformers.Qwen3Config(**SIZES, attention_dropout=0.5, initializer_range=0.2)
    model, batch = hub.from_config(config, "causal-lm"), texts(5, rows=1)
    forward = fast(lambda key: model.forward(model.params, batch, key).logits)
    first, again, plain = np.asarray(forward(key)), forward(key), forward(None)
    assert_same(first, again, atol=0)
    assert np.abs(first - plain).max() > 1e-3
