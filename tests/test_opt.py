"""OPT against transformers on tiny random models; its files, its positions and its generation."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, fast, moved, ours, texts, theirs, torch_model

from peftjax import chain, hub, stack_layers
from peftjax.generate import Decoding, decoder
from peftjax.methods import bitfit, lora, prefix, prompt
from peftjax.models.layers import Context, LayerNorm
from peftjax.models.opt import Layer
from peftjax.tree import cast, flatten, map_with_path

WEIGHTS = "model.safetensors"
OPT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
POST: dict[str, Any] = {"do_layer_norm_before": False, "word_embed_proj_dim": 20}  # as the 350M model
VARIANTS: dict[str, Any] = {
    "pre-norm": {},
    "post-norm, narrow": POST,
    "bare": {
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
    },
    "no last norm, wide": {"_remove_final_layer_norm": True, "word_embed_proj_dim": 40, "tie_word_embeddings": False},
}


def torch_opt(name, head="ForCausalLM", **changes):
    return torch_model(f"OPT{head}", transformers.OPTConfig(**{**OPT, **VARIANTS[name], **changes}))


def drawn(**changes):
    """A model with random values in every leaf, made without a compilation."""
    model = hub.from_config(transformers.OPTConfig(**{**OPT, **changes}), "causal-lm", seed=None)
    rng = np.random.default_rng(0)

    def draw(path, x):
        return jnp.asarray(path.endswith("scale") + 0.2 * rng.normal(size=x.shape), jnp.float32)

    return model._replace(params=map_with_path(draw, model.params))


def both_sides():
    """A batch with padding on the left in some rows and on the right in others."""
    left, right = texts(padding="left"), texts(padding="right", seed=1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path, name):
    reference = torch_opt(name)
    model, batch = moved(reference, tmp_path), both_sides()
    assert ("lm_head" in model.params) is not VARIANTS[name].get("tie_word_embeddings", True)
    want, real = theirs(reference, batch).logits, batch["attention_mask"] > 0
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)
    names = set(load_file(tmp_path / WEIGHTS))
    loaded = hub.save(model, stack_layers(model.params), tmp_path / "again")
    first, second = load_file(tmp_path / WEIGHTS), load_file(loaded / WEIGHTS)
    assert set(second) == names
    assert all(first[n].tobytes() == second[n].tobytes() for n in names)
    assert json.loads((loaded / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())
    assert {s.path for s in model.sites} - {p.rpartition("/")[0] for p in flatten(model.params)} <= {
        *flatten(model.params),
        "model",
        *(f"model/layers_{i}{tail}" for i in range(2) for tail in ("", "/self_attn")),
    }


@pytest.mark.parametrize("name", ["pre-norm", "post-norm, narrow"])
def test_base_and_classifier(tmp_path, name):
    batch = both_sides()
    for head, key in (("Model", "last_hidden_state"), ("ForSequenceClassification", "logits")):
        reference = torch_opt(name, head, num_labels=3)
        model = moved(reference, tmp_path / head)
        got, want = ours(model, batch), theirs(reference, batch)[key]
        if head == "Model":
            assert got.logits is None
            assert_same(got.hidden, want, batch["attention_mask"] > 0)
        else:
            assert_same(got.logits, want)
    no_mask = {"input_ids": batch["input_ids"]}
    reference = torch_opt(name, "Model")
    assert_same(ours(moved(reference, tmp_path / "base"), no_mask).hidden, theirs(reference, no_mask).last_hidden_state)


def test_a_base_into_a_classifier(tmp_path):
    moved(torch_opt("post-norm, narrow"), tmp_path)
    model = hub.load(tmp_path, "classification", labels=3)
    assert model.fresh == ("score/kernel",)
    assert model.params["score"]["kernel"].shape == (20, 3)
    assert {s.kind: s.width for s in model.sites}["input"] == 20


def test_old_files(tmp_path):
    """Without `model.`, with the tied head again, a buffer of fairseq, and keys that only old configs have."""
    model = moved(torch_opt("post-norm, narrow"), tmp_path)
    tensors = {k.removeprefix("model."): v for k, v in load_file(tmp_path / WEIGHTS).items()}
    assert "decoder.project_in.weight" in tensors
    extra = {"decoder.version": np.ones(1, np.float32), "lm_head.weight": tensors["decoder.embed_tokens.weight"]}
    save_file(tensors | extra, tmp_path / WEIGHTS, metadata={"format": "pt"})
    file = tmp_path / "config.json"
    old = {"activation_dropout": 0.0, "prefix": "</s>", "learned_embeddings": True, "scale_embeddings": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | old))
    again = flatten(hub.load(tmp_path).params)
    assert all(np.array_equal(x, again[p]) for p, x in flatten(model.params).items())
    extra["lm_head.weight"] = extra["lm_head.weight"] + 1
    save_file(tensors | extra, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.decoder\.embed_tokens\.weight, but"):
        hub.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layerdrop": 0.1}, r"layerdrop=0\.1 \(supported: 0\.0\)"),
        ({"scale_embeddings": True}, r"scale_embeddings=True \(supported: False\)"),
        ({"learned_embeddings": False}, r"learned_embeddings=False \(supported: True\)"),
        ({"activation_function": "mish"}, "activation 'mish' is not supported; supported are .*'relu'"),
        ({"num_attention_heads": 3}, "hidden_size 32 does not divide into 3 attention heads"),
        ({"_remove_all_norms": True}, r"_remove_all_norms=True \(supported: None\)"),
    ],
)
def test_bad_config_values(values, message):
    with pytest.raises(ValueError, match=message):
        hub.from_config(transformers.OPTConfig(**{**OPT, **values}), "causal-lm", seed=None)


@pytest.mark.parametrize(("name", "adapted"), [("pre-norm", False), ("post-norm, narrow", True)])
@pytest.mark.filterwarnings("ignore")  # of torch's generate
def test_generation(tmp_path, name, adapted, key):
    """Greedy tokens of a batch padded on the left equal transformers'; a cache, filled bit by bit, changes no logit."""
    torch: Any = pytest.importorskip("torch")
    reference = torch_opt(name)
    model, batch = moved(reference, tmp_path), texts(9, "left")
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    free: Any = reference.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0)
    eos = int(free[0, 12])
    want: Any = reference.generate(**inputs, max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=0)
    got = decoder(model, Decoding(10, stop=(eos,)), 0)(
        model.params, jnp.asarray(batch["input_ids"], jnp.int32), jnp.asarray(batch["attention_mask"], jnp.int32)
    )
    assert np.array_equal(np.asarray(got)[:, : want.shape[1] - 9], want[:, 9:])
    params = stack_layers(model.params)
    if adapted:
        params = chain(prefix(2, std=1.0), prompt(3, start="random")).init(key, model.params, model.sites)
    whole = ours(model, batch, params=params).logits  # positions are counted over tokens, by the model itself
    cache, logits = model.empty_cache(params, 3, 9), []
    for piece in (slice(0, 4), slice(4, 9)):
        part = {k: jnp.asarray(v[:, piece], jnp.int32) for k, v in batch.items()}
        out = fast(lambda p, b, c, on=piece.start > 0: model.forward(p, b, cache=c, continued=on))(params, part, cache)
        cache = out.cache
        logits.append(out.logits)
    assert_same(jnp.concatenate(logits, axis=1), whole, batch["attention_mask"] > 0)


def test_positions_are_counted_over_tokens_after_virtual_ones(tmp_path, key):
    """What padding there is and where makes no difference, with prefix and prompt as without."""
    model = moved(torch_opt("pre-norm"), tmp_path)
    ids = texts(6, rows=1)["input_ids"]
    wide = {"input_ids": np.zeros((3, 9), int), "attention_mask": np.zeros((3, 9), int)}
    places = (slice(0, 6), slice(2, 8), slice(3, 9))
    for row, place in enumerate(places):
        wide["input_ids"][row, place], wide["attention_mask"][row, place] = ids[0], 1
    for method in (None, chain(prefix(2, std=1.0), prompt(3, start="random"))):
        params = model.params if method is None else method.init(key, model.params, model.sites)
        want, got = (ours(model, b, params=params).logits for b in ({"input_ids": ids}, wide))
        for row, place in enumerate(places):
            assert_same(got[row, place], want[0])
    with pytest.raises(ValueError, match="16 tokens after 5 virtual ones are more than the 20 positions"):
        ours(model, texts(16), params=params)
    with pytest.raises(ValueError, match="21 tokens are more than the 20 positions"):
        ours(model, texts(21))


@pytest.mark.parametrize("name", ["pre-norm", "post-norm, narrow"])
def test_merged_export(tmp_path, name, key):
    model = moved(torch_opt(name), tmp_path / "base")
    method = chain(lora(2, targets=["query", "mlp_in", "embedding"]), bitfit())
    params = method.init(key, model.params, model.sites)
    params = jax.tree.map(lambda x, m: x + 0.1 if m else x, params, method.trainable(params))
    batch = both_sides()
    want, real = ours(model, batch, params=params).logits, batch["attention_mask"] > 0
    assert np.abs(want - ours(model, batch).logits).max() > 0.1
    hub.save(model, params, tmp_path / "merged")
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_same(want, theirs(reference, batch).logits, real)


def test_biases_that_a_method_created_are_exported(tmp_path, key):
    model = moved(torch_opt("bare", layer_norm_elementwise_affine=True), tmp_path / "base")
    params = bitfit(["query"], create=True).init(key, model.params, model.sites)
    params = jax.tree.map(lambda x: x + 0.1 if x.shape == (32,) else x, params)
    batch = {"input_ids": texts()["input_ids"]}
    hub.save(model, params, tmp_path / "out")
    reference = transformers.OPTForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert reference.config.enable_bias
    assert_same(ours(model, batch, params=params).logits, theirs(reference, batch).logits)


def test_dropout(key):
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in texts(padding="left").items()}
    for rate in ("dropout", "attention_dropout"):
        rates = {"dropout": 0.0, "attention_dropout": 0.0, "num_hidden_layers": 1, rate: 0.5}
        model = drawn(**POST, **rates)
        forward = fast(lambda k, model=model: model.forward(model.params, batch, k).logits)
        one, again, other = (forward(k) for k in (key, key, jax.random.key(1)))
        assert_same(one, again, atol=0)
        assert jnp.abs(one - other).max() > 1e-3


def test_bf16_is_not_promoted(key):
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in texts(padding="left").items()}
    model = drawn(**POST)
    model = model._replace(params=cast(model.params, jnp.bfloat16), module=model.module.clone(dtype=jnp.bfloat16))
    params = chain(lora(2), bitfit(), prefix(2), prompt(2)).init(key, model.params, model.sites)
    trains = bitfit().trainable(params)
    params = jax.tree.map(lambda x, m: x.astype(jnp.float32) if m else x, params, trains)
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, batch)
    assert (out.hidden.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 20
    assert {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype(jnp.bfloat16)}


def test_hooks_of_both_orders(key):
    """y of `after_mlp` is the block's output in a post-norm block, the sub-layer's in a pre-norm one."""
    x = jax.random.normal(key, (1, 3, 32))
    context = Context(jnp.tril(jnp.ones((1, 1, 3, 3), bool)), jnp.arange(3)[None])
    for before in (True, False):
        model, seen = drawn(do_layer_norm_before=before), {}
        layer, params = Layer(model.config), model.params["model"]["layers_0"]
        plain, _ = layer.apply({"params": params}, x, None, context)
        for name in ("attention_output", "mlp_output", "after_mlp"):

            def keep(y, *, x, context, name=name, seen=seen):
                seen[name] = (x, y)
                return y

            params = {**params, name: keep}
        got, _ = layer.apply({"params": params}, x, None, context)
        assert_same(got, plain, atol=0)
        assert jnp.array_equal(seen["after_mlp"][1], got) is not before
        norm = LayerNorm(1e-5).apply({"params": params["self_attn_layer_norm"]}, x) if before else x
        assert_same(seen["attention_output"][0], norm, atol=0)


def test_packed_texts(tmp_path):
    """Two texts in a row say what each says alone."""
    model = moved(torch_opt("pre-norm"), tmp_path)
    ids = texts(9, rows=1)["input_ids"]
    packed = {
        "input_ids": ids,
        "attention_mask": np.array([[1] * 8 + [0]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0]]),
        "positions": np.array([[0, 1, 2, 0, 1, 2, 3, 4, 0]]),
    }
    got = ours(model, packed).logits[0]
    for place in (slice(0, 3), slice(3, 8)):
        assert_same(got[place], ours(model, {"input_ids": ids[:, place]}).logits[0])
