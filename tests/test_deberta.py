"""DeBERTa v2 and v3 against transformers, and what the family must hold by itself."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, fast, layouts, moved, ours, texts, theirs, torch_model

from peftjax import chain, hub, merge, stack_layers
from peftjax.methods import bitfit, lora, prefix, prompt
from peftjax.methods.prefix import Prefix
from peftjax.models.deberta import Config, SelfAttention, buckets_of, relative_rows
from peftjax.models.layers import REMAT, Context
from peftjax.tree import cast, combine, flatten, map_with_path, partition

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
V3: dict[str, Any] = {  # what the checkpoints of version 3 have
    "relative_attention": True,
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "max_relative_positions": -1,
    "position_biased_input": False,
}
V2 = {**V3, "conv_kernel_size": 3, "conv_act": "gelu", "attention_head_size": 4}  # the larger ones of version 2
VARIANTS: dict[str, Any] = {
    "v3": V3,
    "v2": V2,
    "plain": {"type_vocab_size": 2, "hidden_act": "relu"},  # BERT, but for the mask on the embeddings
    "no buckets": {
        **V3,
        "position_buckets": -1,
        "max_relative_positions": 5,
        "share_att_key": False,
        "norm_rel_ebd": "none",
        "position_biased_input": True,
        "type_vocab_size": 3,
    },
    "c2p": {**V3, "pos_att_type": ["c2p"], "share_att_key": False, "layer_norm_eps": 1e-2, "num_hidden_layers": 3},
    "p2c": {**V3, "pos_att_type": ["p2c"], "share_att_key": False, "position_buckets": 5, "hidden_act": "gelu_new"},
    "no terms": {**V3, "pos_att_type": None, "conv_kernel_size": 5, "conv_groups": 4},
    "terms without positions": {**V3, "relative_attention": False, "norm_rel_ebd": "none", "conv_kernel_size": 1},
    "narrow embedding": {
        **V2,
        "embedding_size": 12,
        "position_biased_input": True,
        "type_vocab_size": 2,
        "position_buckets": 8,
        "max_relative_positions": 12,
        "norm_rel_ebd": "none | Layer_Norm",
    },
}


def config(extra, **more):
    return transformers.DebertaV2Config(**{**SIZES, **extra, **more})


def both_sides(length=13, types=0):
    """Padding on either side; distances beyond the buckets' largest and, in the last rows, no padding."""
    left, right = texts(length, "left", types=types), texts(length, "right", types=types, seed=1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


@pytest.mark.parametrize("extra", VARIANTS.values(), ids=VARIANTS)
def test_variants(tmp_path, extra):
    reference = torch_model("DebertaV2ForSequenceClassification", config(extra, num_labels=3))
    model = moved(reference, tmp_path)
    batch = both_sides(types=extra.get("type_vocab_size", 0))
    want, hidden = theirs(reference, batch).logits, theirs(reference.deberta, batch).last_hidden_state
    real = batch["attention_mask"] > 0
    assert want.abs().max() > 0.1
    for name in LAYOUTS if extra in (V2, V3) else ["scanned"]:
        got = ours(model, batch, LAYOUTS[name])
        assert_same(got.logits, want)
        assert_same(got.hidden, hidden, real)
        assert got.pooled.shape == (6, 16)


@pytest.mark.parametrize("extra", [V2, VARIANTS["no buckets"]], ids=["v2", "no buckets"])
def test_encoder(tmp_path, extra):
    """Without a mask, without types, and where there is a table of positions, at other ones."""
    reference = torch_model("DebertaV2Model", config(extra))
    model = moved(reference, tmp_path)
    batch = {"input_ids": texts()["input_ids"]}
    got = ours(model, batch)
    assert_same(got.hidden, theirs(reference, batch).last_hidden_state)
    assert got.logits is None
    assert got.pooled is None
    batch["positions"] = np.broadcast_to(np.arange(9)[::-1] + 7, (3, 9)).copy()
    moved_to = ours(model, batch, LAYOUTS["scanned"]).hidden
    assert_same(moved_to, theirs(reference, batch).last_hidden_state)
    assert (jnp.abs(moved_to - got.hidden).max() > 1e-2) == extra.get("position_biased_input", True)


def test_regression_with_the_heads_own_activation(tmp_path):
    extra = {**V3, "pooler_hidden_act": "tanh", "pooler_dropout": 0.2, "cls_dropout": 0.3}
    reference = torch_model("DebertaV2ForSequenceClassification", config(extra, num_labels=1))
    batch = texts(3)
    assert_same(ours(moved(reference, tmp_path), batch).logits, theirs(reference, batch).logits)


def test_one_token(tmp_path):
    reference = torch_model("DebertaV2Model", config(V2))
    batch = texts(1, rows=2)
    assert_same(ours(moved(reference, tmp_path), batch).hidden, theirs(reference, batch).last_hidden_state)


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (6, 24), (5, 24), (2, 9), (32, 100), (256, 1024)])
def test_buckets(buckets, furthest):
    """Of transformers' own function, beyond the largest distance too, where they are cut off."""
    torch = pytest.importorskip("torch")
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    made = config(V3, max_position_embeddings=furthest, position_buckets=buckets)
    c: Config = hub.from_config(made, "encoder", seed=None).config
    n = 2 * furthest
    want = make_log_bucket_position(torch.arange(1 - n, n), buckets, furthest).long().numpy()
    np.testing.assert_array_equal(buckets_of(c, n), want[n - 1 :])
    np.testing.assert_array_equal(relative_rows(c, n), np.clip(want[::-1] + buckets, 0, 2 * buckets - 1))


def test_a_long_text(tmp_path):
    """Relative positions have no longest text: what is too far apart is in the last bucket."""
    reference = torch_model("DebertaV2Model", config(V3))
    model, batch = moved(reference, tmp_path), texts(40, "right")
    assert model.max_length > 10**6
    want = theirs(reference, batch).last_hidden_state
    assert_same(ours(model, batch).hidden, want, batch["attention_mask"] > 0)


# Files


def test_masked_lm_files_load(tmp_path):
    """The usual checkpoints: the head of masked words goes, a task's head is drawn; also in old spellings."""
    for legacy, extra in ((True, V3), (False, V2)):
        folder = tmp_path / f"{legacy}"
        reference = torch_model("DebertaV2ForMaskedLM", config(extra, legacy=legacy))
        reference.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new, was in old.items():
            tensors = {k.replace(new, was): v for k, v in tensors.items()}
        tensors["deberta.embeddings.position_ids"] = np.arange(24)[None]
        tensors["deberta.embeddings.position_embeddings.weight"] = np.zeros((24, 16), np.float32)
        tensors["mask_predictions.dense.weight"] = np.zeros((16, 16), np.float32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        model, batch = hub.load(folder, "classification", labels=3), texts(7)
        assert set(model.fresh) == {f"{m}/{x}" for m in ("pooler/dense", "classifier") for x in ("kernel", "bias")}
        got = ours(model, batch, LAYOUTS["scanned"])
        assert_same(got.hidden, theirs(reference.deberta, batch).last_hidden_state)
        assert got.logits.shape == (3, 3)
        assert tiny.same(hub.load(folder, "encoder").params["deberta"], model.params["deberta"])
    with pytest.raises(ValueError, match="architecture 'DebertaV2ForMaskedLM' is unknown"):
        hub.load(tmp_path / "True")


def test_the_names_of_hub_configs(tmp_path):
    """Keys as in the published config.json, where relative positions have one string and no class is named."""
    reference = torch_model("DebertaV2Model", config(V2))
    reference.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pooler_dropout": 0}
    kept = {k: raw[k] for k in SIZES} | V2 | rates | {"model_type": "deberta-v2", "type_vocab_size": 0}
    kept |= {"hidden_act": "gelu", "pooler_hidden_act": "gelu", "pooler_hidden_size": 16}
    kept |= {"layer_norm_eps": 1e-7, "initializer_range": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    batch = texts()
    assert_same(ours(hub.load(tmp_path, "encoder"), batch).hidden, theirs(reference, batch).last_hidden_state)


@pytest.mark.parametrize("name", ["v2", "narrow embedding", "no buckets"])
def test_load_save_load(tmp_path, name):
    reference = torch_model("DebertaV2ForSequenceClassification", config(VARIANTS[name]))
    model = moved(reference, tmp_path / "theirs")
    hub.save(model, model.params, tmp_path / "ours")
    theirs_, saved = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    assert saved.keys() == theirs_.keys()
    assert all(saved[k].tobytes() == theirs_[k].tobytes() for k in saved)
    assert tiny.same(hub.load(tmp_path / "ours").params, model.params)


def test_merged_export(tmp_path):
    """Adapted at the query, which positions go through too, at every bias, and at the convolution's."""
    reference = torch_model("DebertaV2ForSequenceClassification", config(V2))
    model = moved(reference, tmp_path / "theirs")
    method = chain(lora(rank=2, targets=["query"], alpha=5), bitfit())
    params = method.init(jax.random.key(0), model.params, model.sites)
    rng = np.random.default_rng(0)
    params = map_with_path(
        lambda p, x: x + rng.normal(size=x.shape).astype(x.dtype) * 0.3 if p.endswith(("/a", "/b", "/value")) else x,
        params,
    )
    batch = texts(padding="right")
    adapted = ours(model, batch, params=params).logits
    assert jnp.abs(adapted - ours(model, batch).logits).max() > 1e-2
    hub.save(model, merge(params), tmp_path / "ours")
    again = transformers.DebertaV2ForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert_same(adapted, theirs(again, batch).logits)


# What methods and layouts need


@layouts
@pytest.mark.parametrize("extra", [V2, VARIANTS["no buckets"]], ids=["v2", "no buckets"])
def test_bf16_is_not_promoted(extra, layout, key):
    model = hub.from_config(config(extra), "classification", dtype=jnp.bfloat16, seed=None)
    method = chain(prefix(2), prompt(2, start="random"))

    def adapted(key, params):
        params = method.init(key, cast(params, jnp.bfloat16), model.sites)
        trainable, frozen = partition(params, method.trainable(params))
        return layout(combine(cast(trainable, jnp.float32), frozen))

    params = jax.eval_shape(adapted, key, model.params)
    batch = {k: jnp.asarray(v) for k, v in texts(padding="right").items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, batch)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    products = [e for e in equations(closed.jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
    assert products
    assert all({v.aval.dtype for v in e.invars} == {jnp.dtype(jnp.bfloat16)} for e in products)


VIRTUAL = {
    "v2, prefix": (V2, prefix(3, std=1.0)),
    "v2, prompt": (V2, prompt(3, start="random")),
    "narrow, prompt": (VARIANTS["narrow embedding"], prompt(3)),
    "learned positions, prefix": (VARIANTS["no buckets"], prefix(3, std=1.0)),
}


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens(name, key):
    """They move the function, and what they do to a text does not depend on the padding on its right."""
    extra, method = VIRTUAL[name]
    model = hub.from_config(config(extra), "encoder")
    model = model._replace(params=jax.tree.map(lambda x: x * 4, model.params))
    params = method.init(key, model.params, model.sites)
    batch = texts(padding="right")
    short = {k: v[:1, :8] for k, v in batch.items()}  # the first row without its padding
    got = ours(model, batch, LAYOUTS["scanned"], params).hidden
    assert_same(ours(model, short, params=params).hidden, got[:1, :8])
    assert jnp.abs(got - ours(model, batch, LAYOUTS["scanned"]).hidden)[:1, :8].max() > 1e-2
    if extra.get("position_biased_input", True):
        with pytest.raises(ValueError, match="22 tokens after 3 virtual ones are more than the 24 positions"):
            ours(model, texts(22), params=params)
    else:
        assert model.room(params) > 10**6


@pytest.mark.parametrize("name", ["c2p", "p2c", "v3"])
def test_attention_is_the_papers(name, key):
    """Section 3.1 in float64, each pair of columns by itself; a prefix has the contents' term only."""
    c: Config = hub.from_config(config(VARIANTS[name]), "encoder", seed=None).config
    n, extra = 5, 2
    x, table, *virtual = (
        jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, shape in enumerate([(1, n, 16), (2 * c.span, 16), (extra, 4, 4), (extra, 4, 4)])
    )
    context = Context(jnp.ones((1, 1, n, n), bool), jnp.arange(n)[None])
    module = SelfAttention(c)
    params = jax.tree.map(lambda p: 9 * p, module.init(key, x, context, table)["params"])
    got = module.apply({"params": {**params, "prefix": Prefix(*virtual)}}, x, context, table)

    def product(name, x):
        p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
        return (np.asarray(x, np.float64) @ p["kernel"] + p["bias"]).reshape(-1, 4, 4)

    shared = c.share_att_key
    q, k, v = (product(f"{which}_proj", x[0]) for which in ("query", "key", "value"))
    rows = relative_rows(c, n)[::-1]  # of query less key = 1 - n ... n - 1
    zeros = np.zeros((2 * c.span, 4, 4))
    r_k = product("key_proj" if shared else "pos_key_proj", table) if "c2p" in c.terms else zeros
    r_q = product("query_proj" if shared else "pos_query_proj", table) if "p2c" in c.terms else zeros
    for h in range(4):
        for i in range(n):
            scores = [q[i, h] @ np.asarray(p[h], np.float64) for p in virtual[0]]
            for j in range(n):
                row = rows[i - j + n - 1]
                scores.append(q[i, h] @ k[j, h] + q[i, h] @ r_k[row, h] + k[j, h] @ r_q[row, h])
            p = np.exp(np.array(scores) / np.sqrt(4 * (1 + len(c.terms))))
            values = np.concatenate([np.asarray(virtual[1], np.float64)[:, h], v[:, h]])
            assert_same(got[0, i, 4 * h : 4 * h + 4], p @ values / p.sum(), atol=1e-5)


RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout", "pooler_dropout")


@pytest.mark.parametrize("rate", RATES)
def test_dropout(rate, key):
    rates: dict[str, Any] = {**dict.fromkeys(RATES, 0.0), rate: 0.5}
    model = hub.from_config(config(V2, **rates), "classification")
    batch = {k: jnp.asarray(v) for k, v in texts().items()}
    params = stack_layers(jax.tree.map(lambda x: x * 5, model.params))
    forward = fast(model.forward)
    first, again, other = (forward(params, batch, k) for k in (key, key, jax.random.key(1)))
    plain = forward(params, batch)
    assert_same(first.logits, again.logits, atol=0)
    for x in (other, plain):
        assert jnp.abs(first.logits - x.logits).max() > 1e-3
    assert (jnp.abs(first.hidden - plain.hidden).max() == 0) == (rate in ("cls_dropout", "pooler_dropout"))


@pytest.mark.slow
def test_remat_changes_no_gradient(key):
    model = hub.from_config(config(V2), "classification")
    params = stack_layers(jax.tree.map(lambda x: x * 4, model.params))
    batch = {k: jnp.asarray(v) for k, v in texts(padding="right").items()}
    grads = []
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))
        loss = fast(jax.grad(lambda p, again=again: jnp.square(again.forward(p, batch, key).logits).mean()))
        grads.append(flatten(loss(params)))
    for path, g in grads[0].items():
        assert jnp.abs(g).max() > 0, path
        for other in grads[1:]:
            assert_same(other[path], g, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_sites_name_the_tree(name):
    model = hub.from_config(config(VARIANTS[name]), "classification", seed=None)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "positions", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    weights = {p for p in leaves if p.endswith(("/kernel", "/embedding", "/scale"))}
    assert weights == {s.path for s in model.sites} & set(leaves)


def test_a_problem_without_token_types(tmp_path):
    """Its tokenizer gives them all the same."""
    problem = tiny.problem(tmp_path, "deberta", "rte")
    assert all(e.type_ids is None for e in problem.train)
    assert tiny.problem(tmp_path, "bert", "rte").train[0].type_ids is not None


# Input that it refuses

BAD = {
    "heads": ({"num_attention_heads": 3}, "hidden_size 16 does not divide into 3 attention heads"),
    "head size": ({"attention_head_size": 8}, "attention_head_size=8 is not supported; supported is 4"),
    "pooler": ({"pooler_hidden_size": 8}, "pooler_hidden_size=8 is not supported; supported is hidden_size, 16"),
    "terms": ({"pos_att_type": ["p2p", "c2p"]}, r"pos_att_type has \['p2p'\].*supported are \['c2p', 'p2c'\]"),
    "norm": ({"norm_rel_ebd": "rms"}, r"norm_rel_ebd has \['rms'\].*supported are 'layer_norm' and 'none'"),
    "norm of nothing": (
        {"relative_attention": False},
        "norm_rel_ebd='layer_norm' .* relative_attention=False has none of; supported with it is 'none'",
    ),
    "buckets": ({"position_buckets": 46}, "position_buckets 46 must be 2 or more, and less than twice .* 23 "),
    "one bucket": ({"position_buckets": 1}, "position_buckets 1 must be 2 or more"),
    "even": ({"conv_kernel_size": 4}, "conv_kernel_size=4 is not supported; supported are 0 and odd sizes"),
    "groups": ({"conv_kernel_size": 3, "conv_groups": 3}, "hidden_size 16 does not divide into conv_groups 3"),
    "activation": ({"conv_act": "gulu"}, "'gulu' is not supported"),
    "unknown": ({"z_steps": 2}, "z_steps=2"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_configs(what):
    extra, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        hub.from_config(config({**V3, **extra}), "encoder", seed=None)


def test_token_types_and_positions_there_are_none_of():
    model = hub.from_config(config(V3), "encoder")
    with pytest.raises(ValueError, match=r"no token types \(its type_vocab_size is 0\); leave type_ids out"):
        ours(model, texts(types=2))
    model = hub.from_config(config({}), "encoder")
    with pytest.raises(ValueError, match="25 tokens are more than the 24 positions"):
        ours(model, texts(25))
