"""BLOOM and GPT-NeoX against transformers: fused products that go head by head, ALiBi, a partial rotation."""

import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_models import (
    LAYOUTS,
    LONG,
    YARN,
    assert_same,
    equations,
    fast,
    moved,
    ours,
    texts,
    theirs,
    torch_model,
)

from peftjax import chain, hub, merge, stack_layers
from peftjax.data import Example, make_packed
from peftjax.generate import Decoding, decoder
from peftjax.methods import bitfit, lora, prefix, prompt
from peftjax.models.bloom import slopes
from peftjax.models.layers import REMAT
from peftjax.quantize import quantize
from peftjax.tree import cast, combine, flatten, get, map_with_path, partition, update
from peftjax.weights import is_node

BLOOM: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}
NEOX: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
}


class Kind(NamedTuple):
    """A family here and in transformers."""

    name: str
    config: dict[str, Any]
    base: str
    layer: str  # in a file
    attends: str


KINDS = {
    "bloom": Kind("Bloom", BLOOM, "transformer", "h", "self_attention"),
    "gpt_neox": Kind("GPTNeoX", NEOX, "gpt_neox", "layers", "attention"),
}
families = pytest.mark.parametrize("family", KINDS)
mostly_bloom = pytest.mark.parametrize("family", ["bloom", pytest.param("gpt_neox", marks=pytest.mark.slow)])


def rope(kind="default", share=0.5, **more) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 100.0, **more, "rope_type": kind, "partial_rotary_factor": share}}


SEQUENTIAL: dict[str, Any] = {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "relu"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("bloom", {}),
    "six heads": ("bloom", {"n_head": 6, "hidden_size": 36, "layer_norm_epsilon": 1e-2, "n_layer": 3}),
    "after the norm": ("bloom", {"apply_residual_connection_post_layernorm": True, "tie_word_embeddings": False}),
    "gpt_neox": ("gpt_neox", {}),
    "sequential": ("gpt_neox", SEQUENTIAL | rope("linear", factor=3.0) | {"layer_norm_eps": 1e-2}),
    "tied": ("gpt_neox", {"tie_word_embeddings": True, "hidden_act": "gelu_fast", **rope(share=1.0)}),
    "odd share": ("gpt_neox", rope("dynamic", 0.8, factor=2.0) | {"attention_bias": False, "num_hidden_layers": 3}),
}


def torch_of(variant, head="ForCausalLM", **changes):
    """A random torch model of a variant."""
    family, own = VARIANTS[variant]
    config = getattr(transformers, KINDS[family].name + "Config")(
        **json.loads(json.dumps({**KINDS[family].config, **own, **changes}))  # transformers writes into the dicts
    )
    return torch_model(KINDS[family].name + head, config)


def both_sides(length=13):
    """Rows padded on the left, rows padded on the right, and rows without padding."""
    left, right = texts(length, "left"), texts(length, "right", seed=1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


# Parity


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits(tmp_path, variant):
    reference = torch_of(variant)
    model, batch = moved(reference, tmp_path), both_sides()
    untied = {"bloom": "lm_head", "gpt_neox": "embed_out"}[model.family.name]
    assert (untied in model.params) is not reference.config.tie_word_embeddings
    want, real = theirs(reference, batch).logits, batch["attention_mask"] > 0
    assert want.abs().max() > 1
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}
SHORT_LONG: dict[str, Any] = {"factor": 1.5, "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
ROPES: dict[str, Any] = {
    "yarn": rope("yarn", **YARN | {"beta_fast": 2.0}),
    "longrope": rope("longrope", **LONG | SHORT_LONG),
    "llama3": rope("llama3", 0.75, **LLAMA3),
    "proportional": rope("proportional", 0.5, factor=2.0),
}


@pytest.mark.parametrize("name", [n if n == "proportional" else pytest.param(n, marks=pytest.mark.slow) for n in ROPES])
def test_ropes_of_a_part_of_a_head(tmp_path, name):
    reference = torch_of("gpt_neox", **ROPES[name], num_hidden_layers=1)
    model, batch = moved(reference, tmp_path), texts(15, "left")
    want, real = theirs(reference, batch).logits, batch["attention_mask"] > 0
    assert_same(ours(model, batch).logits, want, real)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 8, 12, 14, 16, 20, 25, 32, 112])
def test_slopes(heads):
    torch: Any = pytest.importorskip("torch")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    want = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(slopes(heads), want, rtol=1e-6)


@families
def test_base_without_a_mask(tmp_path, family):
    reference = torch_of(family, "Model")
    model, batch = moved(reference, tmp_path), {"input_ids": texts(9)["input_ids"]}
    got = ours(model, batch)
    assert_same(got.hidden, theirs(reference, batch).last_hidden_state)
    assert got.logits is None


@families
def test_classifier(tmp_path, family):
    reference = torch_of(family, "ForSequenceClassification", num_labels=3)
    model, batch = moved(reference, tmp_path), both_sides(9)
    got = ours(model, batch, stack_layers).logits
    assert got.shape == (6, 3)
    assert_same(got, theirs(reference, batch).logits)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize("variant", ["six heads", "gpt_neox"])
def test_generation_equals_transformers(tmp_path, variant):
    torch: Any = pytest.importorskip("torch")
    reference = torch_of(variant, tie_word_embeddings=False)
    model, batch, new = moved(reference, tmp_path), texts(7, "left", rows=4), 9
    ids, mask = batch["input_ids"], batch["attention_mask"]
    got = np.asarray(decoder(model, Decoding(new), 0)(model.params, jnp.asarray(ids), jnp.asarray(mask)))
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    want = reference.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_array_equal(got, want[:, 7:])
    assert len(np.unique(got)) > 5


@pytest.mark.parametrize(
    ("family", "layout"),
    [("bloom", LAYOUTS["per-layer"]), ("bloom", stack_layers), ("gpt_neox", stack_layers)],
    ids=["bloom", "bloom, scanned", "gpt_neox, scanned"],
)
def test_cached_equals_uncached(tmp_path, family, layout, key):
    """With virtual tokens of both kinds, padding on the left between them and the text, positions as one generates."""
    model = moved(torch_of({"bloom": "six heads"}.get(family, family)), tmp_path)
    method = chain(prefix(length=3, std=1.0), prompt(2))
    params = layout(method.init(key, model.params, model.sites))
    batch = {k: jnp.asarray(v) for k, v in texts(9, "left").items()}
    batch["positions"] = jnp.maximum(batch["attention_mask"].cumsum(1) - 1, 0)
    want = ours(model, batch, params=params).logits
    cache, logits = model.empty_cache(params, 3, 11), []
    step = fast(lambda params, batch, cache: model.forward(params, batch, cache=cache))
    again = fast(lambda params, batch, cache: model.forward(params, batch, cache=cache, continued=True))
    for i, piece in enumerate((slice(0, 7), slice(7, 8), slice(8, 9))):
        out = (again if i else step)(params, {k: v[:, piece] for k, v in batch.items()}, cache)
        cache = out.cache
        logits.append(out.logits)
    assert cache.index == 11
    assert_same(jnp.concatenate(logits, axis=1), want, np.asarray(batch["attention_mask"]) > 0)


@pytest.mark.filterwarnings("ignore")  # of the argument's name in transformers
@families
def test_a_prefix_is_keys_from_before(tmp_path, family, key):
    """Against transformers with past keys and values, as peft gives them: BLOOM's have the bias of their distance."""
    torch: Any = pytest.importorskip("torch")
    from transformers.cache_utils import DynamicCache

    reference, n = torch_of({"bloom": "six heads"}.get(family, family)), 5
    model, batch = moved(reference, tmp_path), both_sides(9)
    params = prefix(n, std=1.0).init(key, model.params, model.sites)
    nodes = [x for x in flatten(params, is_leaf=is_node).values() if is_node(x) and type(x).__name__ == "Prefix"]
    cache, rows = DynamicCache(), len(batch["input_ids"])
    for i, node in enumerate(nodes):
        pair = (
            torch.tensor(np.asarray(x))[None].expand(rows, -1, -1, -1).transpose(1, 2) for x in (node.key, node.value)
        )
        cache.update(*pair, i)
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    inputs["attention_mask"] = torch.cat([torch.ones(rows, n).long(), inputs["attention_mask"]], 1)
    with torch.no_grad():
        want = reference(**inputs, past_key_values=cache).logits
    got, real = np.asarray(ours(model, batch, params=params).logits), batch["attention_mask"] > 0
    assert_same(got, want, real)
    assert np.abs(got - np.asarray(ours(model, batch).logits))[real].max() > 0.1


@families
def test_packed_texts_are_the_texts_alone(tmp_path, family, key):
    """After a prefix and a prompt, from which every text has the same distance."""
    model = moved(torch_of({"bloom": "six heads"}.get(family, family)), tmp_path)
    params = chain(prefix(length=3, std=1.0), prompt(2)).init(key, model.params, model.sites)
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(3, 50, n).tolist(), loss_mask=[1] * n) for n in (4, 5, 3)]
    packed = make_packed(examples, [[0, 1, 2]], 1, 14, pad_id=0)
    packed = {k: packed[k] for k in ("input_ids", "attention_mask", "segment_ids", "positions")}
    got = np.asarray(ours(model, packed, params=params).logits)[0]
    alone = {k: np.zeros((3, 5), int) for k in ("input_ids", "attention_mask")}
    for i, e in enumerate(examples):
        alone["input_ids"][i, : len(e.input_ids)], alone["attention_mask"][i, : len(e.input_ids)] = e.input_ids, 1
    want = np.asarray(ours(model, alone, params=params).logits)[alone["attention_mask"] > 0]
    assert_same(got[:12], want)


# What the layers do with dtype and dropout


@families
def test_bf16_is_not_promoted(family, key):
    kind = KINDS[family]
    config = getattr(transformers, kind.name + "Config")(**kind.config, tie_word_embeddings=True)
    model = hub.from_config(config, "causal-lm", dtype=jnp.bfloat16)
    method = chain(lora(rank=2, targets=["query", "value"]), bitfit(["key", "mlp_in"]), prefix(length=2))
    params = method.init(key, cast(model.params, jnp.bfloat16), model.sites)
    trainable, frozen = partition(params, method.trainable(params))
    params = combine(cast(trainable, jnp.float32), frozen)
    batch = {k: jnp.asarray(v) for k, v in texts(padding="right").items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, batch)
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    assert len(dots) >= 7
    assert all({v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.bfloat16)} for e in dots)


@families
@pytest.mark.parametrize("rate", ["hidden_dropout", "attention_dropout"])
def test_dropout(family, rate, key):
    kind = KINDS[family]
    config = getattr(transformers, kind.name + "Config")(**{**kind.config, rate: 0.5})
    model = hub.from_config(config, "causal-lm")
    params = jax.tree.map(lambda x: x * 5, model.params)
    batch = {k: jnp.asarray(v) for k, v in texts().items()}
    forward = fast(model.forward)
    first, again, other = (forward(params, batch, k).logits for k in (key, key, jax.random.key(1)))
    assert_same(first, again, atol=0)
    assert jnp.abs(first - other).max() > 1e-3


@mostly_bloom
def test_remat_changes_no_gradient(tmp_path, family, key):
    model = moved(torch_of(family), tmp_path)
    method = chain(lora(rank=2, targets=["query", "mlp_out"]), prefix(2))
    params = stack_layers(method.init(key, model.params, model.sites))
    trainable, frozen = partition(params, method.trainable(params))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    batch, grads = {k: jnp.asarray(v) for k, v in texts(7, "left").items()}, []
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))

        def loss(trainable, again=again):
            out: Any = again.forward(combine(trainable, frozen), batch)
            return jnp.square(out.logits).mean()

        grads.append(flatten(fast(jax.grad(loss))(trainable)))
    for path, g in grads[0].items():
        assert jnp.abs(g).max() > 0, path
        for other in grads[1:]:
            assert_same(other[path], g, atol=1e-4)


# Files


@families
def test_the_order_of_a_fused_product(tmp_path, family):
    """In the file by head, (heads, 3, size); here query, key and value one after another."""
    kind, reference = KINDS[family], torch_of(family)
    model = moved(reference, tmp_path)
    site = next(s for s in model.sites if s.kind == "fused_qkv")
    at = f"{kind.base}.{kind.layer}.0.{kind.attends}.query_key_value"
    file = load_file(tmp_path / "model.safetensors")
    weight, bias = file[f"{at}.weight"].reshape(4, 3, 8, 32), file[f"{at}.bias"].reshape(4, 3, 8)
    for i, part in enumerate(("query", "key", "value")):
        one = site.only(part)
        np.testing.assert_array_equal(one.columns(get(model.params, site.path)), weight[:, i].reshape(32, 32).T)
        np.testing.assert_array_equal(one.columns(get(model.params, f"{site.module}/bias")), bias[:, i].reshape(-1))


@pytest.mark.parametrize(
    ("variant", "head"),
    [
        *((v, "ForCausalLM") for v in VARIANTS),
        *((v, h) for v in ("six heads", "gpt_neox") for h in ("ForSequenceClassification", "Model")),
    ],
)
def test_saved_for_transformers(tmp_path, variant, head):
    """There and back: names and bits are those of the file that transformers wrote."""
    model = moved(torch_of(variant, head), tmp_path / "theirs")
    hub.save(model, stack_layers(model.params), tmp_path / "ours")
    want, got = (load_file(tmp_path / f"{whose}/model.safetensors") for whose in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize("variant", ["six heads", "gpt_neox", "sequential"])
def test_a_merged_model_in_transformers(tmp_path, variant, key):
    model = moved(torch_of(variant), tmp_path / "theirs")
    method = chain(lora(rank=3, targets=["query", "mlp_in"]), bitfit())
    params = method.init(key, model.params, model.sites)
    mask, rng = method.trainable(params), np.random.default_rng(0)
    noisy = map_with_path(lambda _, x: x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)
    params = jax.tree.map(lambda m, x, y: y if m else x, mask, params, noisy)
    hub.save(model, merge(params), tmp_path / "merged")
    again = getattr(transformers, model.hf_config.architectures[0]).from_pretrained(tmp_path / "merged").eval()
    batch = both_sides(9)
    got, real = ours(model, batch, params=params).logits, batch["attention_mask"] > 0
    assert_same(got, theirs(again, batch).logits, real)
    assert np.abs(got - ours(model, batch).logits).max() > 0.1


def test_a_bias_where_the_config_has_none(tmp_path, key):
    """The product goes back to the file's order, its new bias too."""
    model = moved(torch_of("sequential"), tmp_path / "theirs")
    method = bitfit(["fused_qkv", "attention_out"], create=True)
    params = method.init(key, model.params, model.sites)
    mask = method.trainable(params)
    params = jax.tree.map(lambda m, x: x + jnp.arange(x.size, dtype=x.dtype) / 9 if m else x, mask, params)
    hub.save(model, params, tmp_path / "merged")
    again = hub.load(tmp_path / "merged")
    assert again.config.attention_bias
    bias = load_file(tmp_path / "merged/model.safetensors")["gpt_neox.layers.0.attention.query_key_value.bias"]
    np.testing.assert_allclose(bias.reshape(4, 3, 8).swapaxes(0, 1).reshape(-1), np.arange(96) / 9, rtol=1e-6)


@families
def test_quantised_as_it_is_read(tmp_path, family):
    model = moved(torch_of(family), tmp_path)
    want = flatten(quantize(model.params, model.sites, "int8"))
    got = flatten(hub.load(tmp_path, quantize="int8").params)
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[p], want[p]) for p in want)
    assert any("query_key_value/kernel/blocks/query" in p for p in got)


def rewrite(folder, change):
    """Changes the tensors in a folder's file."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


OLD_CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 32,
        "n_inner": None,
        "n_layer": 2,
        "num_attention_heads": 4,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 2,
        "seq_length": 1024,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "unk_token_id": 0,
        "use_cache": True,
        "vocab_size": 50,
    },
    "gpt_neox": {
        "architectures": ["GPTNeoXForCausalLM"],
        "attention_probs_dropout_prob": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0,
        "hidden_size": 32,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 1024,
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rotary_emb_base": 77,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50,
    },
}


@families
def test_files_as_the_hub_has_them(tmp_path, family):
    """BLOOM's tensors without the base's name, its head once more; GPT-NeoX's buffers; configs of older versions."""
    kind = KINDS[family]
    turns: Any = {} if family == "bloom" else rope(rope_theta=77.0)
    reference = torch_of(family, **turns)
    reference.save_pretrained(tmp_path)

    def bloom(tensors):
        bare = {k.removeprefix("transformer."): x for k, x in tensors.items()}
        return bare | {"lm_head.weight": bare["word_embeddings.weight"].copy()}

    def neox(tensors):
        at = "gpt_neox.layers.1.attention."
        buffers = {"bias": np.ones((1, 1, 4, 4), bool), "masked_bias": np.full(1, -1e9, np.float32)}
        return tensors | {at + k: x for k, x in {**buffers, "rotary_emb.inv_freq": np.ones(2, np.float32)}.items()}

    rewrite(tmp_path, {"bloom": bloom, "gpt_neox": neox}[family])
    (tmp_path / "config.json").write_text(json.dumps(OLD_CONFIGS[family]))
    model, batch = hub.load(tmp_path), texts()
    assert model.max_length == 1024
    assert_same(ours(model, batch).logits, theirs(reference, batch).logits)
    fresh = hub.load(tmp_path, "classification", labels=3).fresh
    assert fresh == ("score/kernel",)
    if family == "bloom":
        rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
        with pytest.raises(ValueError, match=r"ties lm_head.weight .* two different tensors"):
            hub.load(tmp_path)
        return
    rewrite(tmp_path, lambda tensors: {k: x for k, x in tensors.items() if k != "embed_out.weight"})
    with pytest.raises(ValueError, match=r"missing: embed_out.weight"):
        hub.load(tmp_path)
    assert kind.base in hub.load(tmp_path, "encoder").params


def test_a_tied_head_in_the_file_must_be_the_embedding(tmp_path):
    torch_of("tied").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"embed_out.weight": tensors["gpt_neox.embed_in.weight"].copy()})
    assert "embed_out" not in hub.load(tmp_path).params
    rewrite(tmp_path, lambda tensors: tensors | {"embed_out.weight": tensors["embed_out.weight"] + 1})
    with pytest.raises(ValueError, match=r"ties embed_out.weight to gpt_neox.embed_in.weight"):
        hub.load(tmp_path)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("bloom", {"slow_but_exact": True}, r"slow_but_exact=True \(supported: False\)"),
        ("bloom", {"n_head": 5}, "hidden_size 32 does not divide into 5 attention heads"),
        ("bloom", {"layerdrop": 0.1}, "layerdrop=0.1"),
        ("gpt_neox", {"hidden_act": "mish"}, "activation 'mish' is not supported; supported are"),
        ("gpt_neox", rope(share=0.4), "partial_rotary_factor 0.4 of a head of 8 features is 3; supported is an even"),
        ("gpt_neox", rope(share=0.0), "is 0; supported is an even number of at least 2"),
        ("gpt_neox", {"attn_scale": 2.0}, "attn_scale=2.0"),
    ],
)
def test_configs_that_are_refused(family, changes, message):
    config = getattr(transformers, KINDS[family].name + "Config")(**{**KINDS[family].config, **changes})
    with pytest.raises(ValueError, match=message):
        hub.from_config(config, "causal-lm", seed=None)


def test_lengths():
    def longest(family, **changes):
        kind = KINDS[family]
        config = getattr(transformers, kind.name + "Config")(**{**kind.config, **changes})
        return hub.from_config(config, "causal-lm", seed=None).max_length

    assert longest("bloom") == 2048
    assert longest("bloom", seq_length=77) == 77
    assert longest("gpt_neox") == 12


@families
@pytest.mark.parametrize("task", ["causal-lm", "classification", "encoder"])
def test_sites_name_the_tree(family, task):
    kind = KINDS[family]
    config = getattr(transformers, kind.name + "Config")(**{**kind.config, "tie_word_embeddings": False})
    model = hub.from_config(config, task, seed=None)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "positions", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    weights = {p for p in leaves if p.endswith(("/kernel", "/embedding", "/scale"))}
    assert weights == {s.path for s in model.sites} & set(leaves)
    assert update({}, leaves).keys() == model.params.keys()
