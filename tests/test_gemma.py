"""Gemma 2 and the text model of Gemma 3 against transformers on tiny random models; their files, counts, generation."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_generate import prompts
from test_models import LAYOUTS, assert_same, equations, fast, layouts, moved, ours, texts, theirs, torch_model

from peftjax import chain, count, hub, merge, stack_layers
from peftjax.generate import Decoding, decoder
from peftjax.methods import bitfit, lora, prefix, prompt
from peftjax.models.gemma import FULL, SLIDING
from peftjax.models.layers import Embed
from peftjax.tree import cast, flatten

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # 4 of them are wider than the model
    "max_position_embeddings": 16,
    "query_pre_attn_scalar": 7,
    "sliding_window": 3,
    "pad_token_id": 0,
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5}  # small enough to be felt
ROPES: dict[str, Any] = {
    FULL: {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    SLIDING: {"rope_type": "default", "rope_theta": 20.0},
}


class Variant(NamedTuple):
    """`family` as transformers' classes begin; `changes` of `SIZES`."""

    family: str
    changes: dict[str, Any]

    def torch_model(self, head="ForCausalLM", **changes):
        three = self.family == "Gemma3"
        text = "Text" if three and head != "ForCausalLM" else ""
        made = getattr(transformers, "Gemma3TextConfig" if three else "Gemma2Config")
        return torch_model(f"{self.family}{text}{head}", made(**{**SIZES, **self.changes, **changes}))


UNTIED: dict[str, Any] = {"tie_word_embeddings": False, "attention_bias": True, "rms_norm_eps": 1e-2}
VARIANTS = {
    "gemma2": Variant("Gemma2", CAPS),
    "gemma2, full first, one rope scaled": Variant(
        "Gemma2",
        {**CAPS, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, FULL], "rope_parameters": ROPES[FULL]},
    ),
    "gemma2, uncapped, untied, mqa": Variant(
        "Gemma2", {**UNTIED, **dict.fromkeys(CAPS), "num_key_value_heads": 1, "hidden_activation": "silu"}
    ),
    "gemma3, two to one": Variant("Gemma3", {"num_hidden_layers": 3, "sliding_window_pattern": 3}),
    "gemma3, full first, own ropes": Variant("Gemma3", {"layer_types": [FULL, SLIDING], "rope_parameters": ROPES}),
    "gemma3, capped, untied, mha": Variant(
        "Gemma3",
        {**UNTIED, "sliding_window_pattern": 2, "final_logit_softcapping": 2.5, "num_key_value_heads": 4},
    ),
}
TWO = {"gemma2": VARIANTS["gemma2"], "gemma3_text": VARIANTS["gemma3, full first, own ropes"]}
each = pytest.mark.parametrize("family", TWO)


def padded() -> dict[str, np.ndarray]:
    """A batch with padding on the left and, in other rows, on the right."""
    left, right = texts(padding="left"), texts(padding="right", seed=1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


def ours_of(family, task="causal-lm", **changes) -> hub.Model:
    """A random model of ours; no norm is one and no bias zero."""
    made = transformers.Gemma2Config if family == "gemma2" else transformers.Gemma3TextConfig
    model = hub.from_config(made(**{**SIZES, **TWO[family].changes, **changes}), task, seed=None)
    rng = np.random.default_rng(0)
    return model._replace(
        params=jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), model.params)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(tmp_path, name):
    reference = VARIANTS[name].torch_model()
    model, batch = moved(reference, tmp_path), padded()
    assert ("lm_head" in model.params) is ("untied" in name)
    want, real = theirs(reference, batch).logits, batch["attention_mask"] > 0
    assert want.abs().max() > 1
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


@each
def test_other_heads(tmp_path, family):
    """A classifier reads the last token that is no padding; the base's states come without a mask, too."""
    reference, batch = TWO[family].torch_model("ForSequenceClassification", num_labels=3), padded()
    got = ours(moved(reference, tmp_path / "classifier"), batch, stack_layers).logits
    assert got.shape == (6, 3)
    assert_same(got, theirs(reference, batch).logits)
    reference, batch = TWO[family].torch_model("Model"), {"input_ids": texts()["input_ids"]}
    got = ours(moved(reference, tmp_path / "base"), batch)
    assert got.logits is None
    assert_same(got.hidden, theirs(reference, batch).last_hidden_state)


# Decoding


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@each
def test_generation_past_the_window_equals_transformers(tmp_path, family):
    torch: Any = pytest.importorskip("torch")
    reference = TWO[family].torch_model()
    model, new = moved(reference, tmp_path), 7
    ids, mask = prompts((3, 8, 1, 5), seed=2)
    want = reference.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
    )[:, ids.shape[1] :].numpy()
    assert len({*want.ravel().tolist()}) > 5
    for layout in LAYOUTS.values():
        got = np.asarray(decoder(model, Decoding(new), 0)(layout(model.params), ids, mask))
        np.testing.assert_array_equal(got, want)


@layouts
@each
def test_cached_equals_uncached(family, layout, key):
    """With a prefix, which every window leaves in view; in pieces longer and shorter than the window."""
    model = ours_of(family)
    params = layout(prefix(length=2, std=1.0).init(key, model.params, model.sites))
    batch = {k: jnp.asarray(v) for k, v in texts(11, "left").items()}
    batch["positions"] = jnp.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    want = ours(model, batch, params=params).logits
    step = fast(lambda params, batch, cache: model.forward(params, batch, cache=cache))
    cache, logits = model.empty_cache(params, 3, 12), []
    for piece in (slice(0, 5), slice(5, 7), slice(7, 9), slice(9, 11)):
        out = step(params, {k: v[:, piece] for k, v in batch.items()}, cache)
        cache = out.cache
        logits.append(out.logits)
    assert_same(jnp.concatenate(logits, axis=1), want, np.asarray(batch["attention_mask"]) > 0, atol=2e-5)


@each
def test_a_window_hides_what_is_before_it_from_windowed_layers_only(family):
    ids = np.repeat(texts(9, rows=1)["input_ids"], 2, 0)
    ids[1, 0] += 1
    models = ours_of(family, layer_types=[SLIDING, SLIDING]), ours_of(family)
    near, far = (np.abs(np.subtract(*ours(model, {"input_ids": ids}).hidden)).max(-1) for model in models)
    assert (near[:5] > 1e-4).all()  # a window of 3, twice: five positions
    assert (near[5:] < 1e-6).all()
    assert far[8] > 1e-4, "one of its two layers looks at everything"


@each
def test_packed_texts_are_the_same_texts(family):
    model, (a, b) = ours_of(family), (texts(6, rows=1)["input_ids"], texts(5, rows=1, seed=3)["input_ids"])
    packed = {"input_ids": np.concatenate([a, b, np.zeros((1, 1), int)], 1)}
    packed["segment_ids"] = np.array([[1] * 6 + [2] * 5 + [0]])
    packed["attention_mask"] = np.sign(packed["segment_ids"])
    packed["positions"] = np.array([[*range(6), *range(5), 0]])
    got = ours(model, packed, stack_layers).logits[0]
    assert_same(got[:6], ours(model, {"input_ids": a}).logits[0], atol=2e-5)
    assert_same(got[6:11], ours(model, {"input_ids": b}).logits[0], atol=2e-5)


# Methods


@each
def test_a_prompt_of_tokens_is_these_tokens(family, key):
    """A prompt starts from rows as the model sees them, times the root of the width."""
    model, batch = ours_of(family), texts(7, rows=2)
    ids = [7, 11, 30]
    params = prompt(3, ids=ids).init(key, model.params, model.sites)
    longer = {k: np.pad(v, ((0, 0), (3, 0)), constant_values=1) for k, v in batch.items()}
    longer["input_ids"][:, :3] = ids
    assert_same(ours(model, batch, params=params).hidden, ours(model, longer).hidden[:, 3:], atol=1e-5)


class Doubled:
    """A hook that doubles what it is given."""

    def __call__(self, y, *, x, context):
        return 2 * y


@each
@pytest.mark.parametrize(("name", "norm"), [("attention_output", "attention"), ("mlp_output", "feedforward")])
def test_hooks_are_called_after_the_second_norm(family, name, norm):
    """Twice the half's output is a norm of twice the scale, 1 + (1 + 2 w)."""
    model, batch = ours_of(family, task="encoder"), texts()
    at = model.params["model"]["layers_0"]
    hooked = {**at, name: jax.tree_util.Partial(Doubled())}
    scaled = {**at, f"post_{norm}_layernorm": {"scale": 1 + 2 * at[f"post_{norm}_layernorm"]["scale"]}}
    one, two = (
        ours(model, batch, params={"model": {**model.params["model"], "layers_0": layer}}).hidden
        for layer in (hooked, scaled)
    )
    assert_same(one, two, atol=1e-5)
    assert np.abs(one - ours(model, batch).hidden).max() > 1e-2


# bfloat16


@layouts
@each
def test_bf16_is_not_promoted(family, layout, key):
    model = ours_of(family)
    model = model._replace(params=cast(model.params, jnp.bfloat16), module=model.module.clone(dtype=jnp.bfloat16))
    params = chain(lora(rank=2, targets=["query", "mlp_out"]), prefix(2)).init(key, model.params, model.sites)
    batch = {k: jnp.asarray(v) for k, v in padded().items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(layout(params), batch)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) > 8
    assert not [e for e in dots if {v.aval.dtype for v in e.invars} != {jnp.dtype(jnp.bfloat16)}]


def test_the_embedding_is_scaled_in_the_dtype_of_the_activations():
    """As transformers has it: the root of the width is rounded to bfloat16 first."""
    torch: Any = pytest.importorskip("torch")
    reference, ids = TWO["gemma2"].torch_model("Model").to(torch.bfloat16).embed_tokens, texts()["input_ids"]
    table = jnp.asarray(reference.weight.detach().float().numpy(), jnp.bfloat16)
    got = Embed(50, 24, jnp.bfloat16, scale=24**0.5).apply({"params": {"embedding": table}}, jnp.asarray(ids))
    assert isinstance(got, jax.Array)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), reference(torch.tensor(ids)).detach().float())


# Files


@layouts
@pytest.mark.parametrize("name", ["gemma2", "gemma2, uncapped, untied, mqa", "gemma3, capped, untied, mha"])
def test_saved_for_transformers(tmp_path, name, layout):
    """There and back: names and bytes are those of the file that transformers wrote."""
    model = moved(VARIANTS[name].torch_model(), tmp_path / "theirs")
    hub.save(model, layout(model.params), tmp_path / "ours")
    want, got = (load_file(tmp_path / f"{whose}/model.safetensors") for whose in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in want)


@each
def test_merged_for_transformers(tmp_path, family, key):
    reference, batch = TWO[family].torch_model(attention_bias=True), padded()
    model = moved(reference, tmp_path / "base")
    method = chain(lora(rank=2), bitfit())
    params = method.init(key, model.params, model.sites)
    params = jax.tree.map(lambda t, x, y: y if t else x, method.trainable(params), params, tiny.roughen(params))
    want, real = ours(model, batch, params=params).logits, batch["attention_mask"] > 0
    hub.save(model, merge(params), tmp_path / "merged")
    merged = type(reference).from_pretrained(tmp_path / "merged").eval()
    assert_same(want, theirs(merged, batch).logits, real)
    assert np.abs(want - theirs(reference, batch).logits.numpy())[real].max() > 1e-2


# What checkpoints on the hub say: google/gemma-2-2b and google/gemma-3-1b-it
HUB: dict[str, Any] = {
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "rope_theta": 10000.0},
    "gemma3_text": {
        "cache_implementation": "hybrid",
        "rope_theta": 300.0,
        "rope_local_base_freq": 20.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": None,
        "eos_token_id": [1, 106],
    },
}


@each
def test_files_of_the_hub(tmp_path, family):
    """Older keys of the config, buffers of older releases, a copy of the tied table."""
    changes = {"layer_types": None, "sliding_window_pattern": 2} if family == "gemma3_text" else {}
    reference, batch = TWO[family].torch_model(**changes), padded()
    reference.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern", "use_bidirectional_attention"):
        config.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(config | HUB[family]))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(5, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, file, metadata={"format": "pt"})
    real = batch["attention_mask"] > 0
    assert_same(ours(hub.load(tmp_path), batch).logits, theirs(reference, batch).logits, real)


def test_a_language_model_as_a_classifier(tmp_path):
    TWO["gemma3_text"].torch_model().save_pretrained(tmp_path)
    model = hub.load(tmp_path, "classification", labels=3)
    assert model.fresh == ("score/kernel",)


def test_a_multimodal_checkpoint_is_refused_by_the_name_of_its_text_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": {}}))
    message = "'gemma3', which reads more than text; peftjax has the text model alone, 'gemma3_text'.*Gemma3ForCausalLM"
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)
    with pytest.raises(ValueError, match=message):
        hub.from_config(transformers.Gemma3Config(), seed=None)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True \(supported: False\)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, r"use_bidirectional_attention=True"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50.0 \(supported: None\)"),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping must be above 0, or None"),
        ("gemma3_text", {"final_logit_softcapping": -1.0}, "final_logit_softcapping must be above 0, or None"),
        ("gemma2", {"hidden_activation": "mish"}, "activation 'mish' is not supported"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be above 0; got 0"),
        ("gemma2", {"head_dim": 3}, "head_dim 3 is odd"),
        ("gemma2", {"num_key_value_heads": 3}, "4 attention heads do not divide into 3"),
        ("gemma3_text", {"sliding_window": 0}, "sliding_attention need a sliding_window of at least 1; got 0"),
        ("gemma2", {"sliding_window": None}, "sliding_attention need a sliding_window of at least 1; got None"),
        ("gemma2", {"layerdrop": 0.1}, "layerdrop=0.1"),
    ],
)
def test_configs_that_are_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        ours_of(family, **changes)


def test_layer_types_that_are_refused():
    """What transformers' own check lets through or not, by its release."""
    config = transformers.Gemma2Config(**SIZES)
    for kinds, message in (
        ([FULL, "chunked_attention"], r"layer_types \['chunked_attention'\] are not supported; supported are"),
        ([FULL], "layer_types names 1 layers, and num_hidden_layers 2"),
    ):
        config.layer_types = kinds
        with pytest.raises(ValueError, match=message):
            hub.from_config(config, "causal-lm", seed=None)


def test_ropes_that_are_refused():
    ropes = {**ROPES, SLIDING: {**ROPES[SLIDING], "rope_type": "spiral"}}
    config = transformers.Gemma3TextConfig(**SIZES)
    config.rope_parameters = ropes
    with pytest.raises(ValueError, match="rope_type 'spiral' is not supported"):
        hub.from_config(config, "causal-lm", seed=None)


# Sites and counts


@each
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_sites_name_the_tree(family, task):
    model = ours_of(family, task, tie_word_embeddings=task == "classification")
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "input", "positions"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    assert set(leaves) == {s.path for s in model.sites} & set(leaves)
    assert sum(s.kind == "norm" for s in model.sites) == 1 + 2 * (4 if family == "gemma2" else 6)


GEMMA2_2B: dict[str, Any] = {}  # transformers' defaults
GEMMA2_9B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
GEMMA3_1B: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
COUNTS = {  # as the hub counts the parameters in the files
    "google/gemma-2-2b": (transformers.Gemma2Config, GEMMA2_2B, 2_614_341_888),
    "google/gemma-2-9b": (transformers.Gemma2Config, GEMMA2_9B, 9_241_705_984),
    "google/gemma-3-1b-it": (transformers.Gemma3TextConfig, GEMMA3_1B, 999_885_952),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    config, changes, want = COUNTS[name]
    assert count(hub.from_config(config(**changes), "causal-lm", seed=None).params) == want
