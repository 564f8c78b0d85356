"""RoBERTa, XLM-RoBERTa and ELECTRA against transformers on tiny random models; their files, positions and methods."""

import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, fast, moved, ours, texts, theirs, torch_model

from peftjax import chain, combine, count, hub, partition
from peftjax.layout import stack_layers
from peftjax.methods import bitfit, head, lora, prefix, prompt
from peftjax.tree import cast, flatten

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 20,
}
ODD: dict[str, Any] = {"hidden_act": "gelu_new", "layer_norm_eps": 1e-2, "num_attention_heads": 2, "num_labels": 1}


class Variant(NamedTuple):
    """`base`: the base's name in files and in the tree."""

    kind: str
    base: str
    changes: dict[str, Any]


VARIANTS = {
    "roberta": Variant("Roberta", "roberta", {"type_vocab_size": 1, "num_labels": 3}),
    "roberta, odd": Variant("Roberta", "roberta", {**ODD, "pad_token_id": 2, "type_vocab_size": 3}),
    "xlm-roberta": Variant("XLMRoberta", "roberta", {"hidden_act": "relu"}),
    "electra": Variant("Electra", "electra", {"embedding_size": 12, "num_labels": 3}),
    "electra, odd": Variant("Electra", "electra", {**ODD, "embedding_size": 16, "pad_token_id": 2}),
}
variants = pytest.mark.parametrize("name", VARIANTS)
FAMILIES = pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "electra"])


def config_of(name, **changes):
    kind, _, own = VARIANTS[name]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **changes})


def made(name, kind="ForSequenceClassification", **changes) -> Any:
    return torch_model(VARIANTS[name].kind + kind, config_of(name, **changes))


def adapted(model, method, key, size=0.3):
    """Parameters whose trainable leaves are away from their start."""
    params = method.init(key, model.params, model.sites)
    mask = method.trainable(params)
    return jax.tree.map(lambda x, m: x + size * jax.random.normal(key, x.shape) if m else x, params, mask)


def padded(pad=1, types=1):
    """Six texts, padded left or right or not at all, with the model's padding token."""
    left, right = texts(padding="left", types=types), texts(padding="right", types=types, seed=1)
    batch = {k: np.concatenate([left[k], right[k]]) for k in left}
    batch["input_ids"][batch["attention_mask"] == 0] = pad
    return batch


# Parity with transformers


@variants
def test_classifier(tmp_path, name):
    torch_one = made(name)
    model, c = moved(torch_one, tmp_path), torch_one.config
    batch = padded(c.pad_token_id, c.type_vocab_size)
    want, hidden = theirs(torch_one, batch).logits, theirs(torch_one.base_model, batch).last_hidden_state
    assert np.ptp(want.numpy(), axis=0).min() > 0.1
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout)
        assert got.logits.shape == (6, c.num_labels)
        assert_same(got.logits, want)  # of the first column, padding or not
        assert_same(got.hidden, hidden)  # of padding too


@FAMILIES
def test_base_without_mask_and_types(tmp_path, name):
    torch_one = made(name, "Model")
    model, batch = moved(torch_one, tmp_path), {"input_ids": texts(18)["input_ids"]}
    want, got = theirs(torch_one, batch), ours(model, batch, stack_layers)
    assert_same(got.hidden, want.last_hidden_state)
    assert got.logits is None
    if VARIANTS[name].base == "roberta":
        assert_same(got.pooled, want.pooler_output)
    else:
        assert got.pooled is None


# Positions


@pytest.mark.parametrize("name", ["roberta, odd", "electra"])
def test_positions_are_counted_from_0_where_given(tmp_path, name):
    torch_one, batch = made(name, "Model"), texts()
    given = np.random.default_rng(0).integers(0, 12, (3, 9))
    first = torch_one.config.pad_token_id + 1 if "roberta" in name else 0
    want = theirs(torch_one, batch | {"positions": given + first}).last_hidden_state
    got = ours(moved(torch_one, tmp_path), batch | {"positions": given}).hidden
    assert_same(got, want)


def test_the_mask_says_what_padding_is(tmp_path):
    """A text that holds the padding token; and padding that holds another."""
    torch_one, batch = made("roberta", "Model"), padded()
    batch["input_ids"][:, 4] = 1
    batch["input_ids"][batch["attention_mask"] == 0] = 7
    positions = batch["attention_mask"].cumsum(1) * batch["attention_mask"] + 1
    want = theirs(torch_one, batch | {"positions": positions}).last_hidden_state
    got = ours(moved(torch_one, tmp_path), batch).hidden
    assert_same(got, want)


@pytest.mark.parametrize("name", ["roberta, odd", "electra"])
def test_prompt(tmp_path, key, name):
    """transformers over embeddings with a prompt before them; the prompt is as wide as they are."""
    torch: Any = pytest.importorskip("torch")
    torch_one = made(name, "Model")
    model, c = moved(torch_one, tmp_path), torch_one.config
    params = adapted(model, prompt(4), key)
    vectors = params[VARIANTS[name].base]["prompt"].vectors
    batch = padded(c.pad_token_id)
    mask = np.pad(batch["attention_mask"], ((0, 0), (4, 0)), constant_values=1)
    words = torch_one.embeddings.word_embeddings(torch.tensor(batch["input_ids"])).detach().numpy()
    embedded = np.concatenate([np.broadcast_to(vectors, (6, *vectors.shape)), words], axis=1)
    columns = {"inputs_embeds": embedded, "attention_mask": mask}
    if "roberta" in name:  # for embeddings, transformers cannot tell padding
        columns["positions"] = mask.cumsum(1) * mask + c.pad_token_id
    want = theirs(torch_one, columns).last_hidden_state[:, 4:]
    assert_same(ours(model, batch, stack_layers, params).hidden, want)


@pytest.mark.parametrize("name", ["roberta, odd", "electra, odd"])
def test_prefix(tmp_path, key, name):
    """transformers with keys and values that it is given: the text's positions come after them."""
    torch: Any = pytest.importorskip("torch")
    torch_one = made(name, "Model")
    model, c = moved(torch_one, tmp_path), torch_one.config
    params = adapted(model, prefix(3), key)
    cache = transformers.DynamicCache()
    for i in range(2):
        node = params[VARIANTS[name].base]["encoder"][f"layer_{i}"]["attention"]["self"]["prefix"]
        pair = (np.broadcast_to(np.asarray(x).swapaxes(0, 1), (6, 2, 3, 8)) for x in (node.key, node.value))
        cache.update(*(torch.tensor(x) for x in pair), i)
    batch = padded(c.pad_token_id)
    names = {k: torch.tensor(v) for k, v in batch.items() if k != "type_ids"}
    names["attention_mask"] = torch.nn.functional.pad(names["attention_mask"], (3, 0), value=1)
    with torch.no_grad():
        want = torch_one(**names, cache=cache).last_hidden_state
    assert_same(ours(model, batch, stack_layers, params).hidden, want)


@pytest.mark.parametrize(("name", "room"), [("roberta", 18), ("roberta, odd", 17), ("electra", 20)])
def test_what_passes_the_positions_is_refused(key, name, room):
    model = hub.from_config(config_of(name), "encoder")
    params = prefix(length=3).init(key, model.params, model.sites)
    assert (model.max_length, model.room(params)) == (room, room - 3)
    for n, given in ((room, model.params), (room - 3, params)):
        jax.eval_shape(model.forward, given, texts(n))
    with pytest.raises(ValueError, match=f"{room + 1} tokens are more than the {room} positions"):
        model.forward(model.params, texts(room + 1))
    with pytest.raises(ValueError, match=f"{room - 2} tokens after 3 virtual ones are more than the {room} positions"):
        model.forward(params, texts(room - 2))


# Files


@FAMILIES
@pytest.mark.parametrize("kind", ["Model", "ForSequenceClassification"])
def test_files_keep_names_and_bytes(tmp_path, name, kind):
    model = moved(made(name, kind), tmp_path / "theirs")
    hub.save(model, stack_layers(model.params), tmp_path / "ours")
    one, two = (load_file(tmp_path / x / "model.safetensors") for x in ("theirs", "ours"))
    assert one.keys() == two.keys()
    assert all(one[n].tobytes() == two[n].tobytes() and one[n].shape == two[n].shape for n in one)
    again = flatten(hub.load(tmp_path / "ours").params)
    assert all(np.array_equal(x, again[p]) for p, x in flatten(model.params).items())


PRETRAINED = {  # architectures of the hub's files, and the tensors of their heads
    "RobertaForMaskedLM": ("roberta", r"lm_head\..*"),
    "XLMRobertaForMaskedLM": ("xlm-roberta", r"lm_head\..*"),
    "ElectraForMaskedLM": ("electra", r"generator_.*"),
    "ElectraForPreTraining": ("electra", r"discriminator_predictions\..*"),
}


@pytest.mark.parametrize("architecture", PRETRAINED)
def test_pretrained_files(tmp_path, architecture):
    """They load for classification with a fresh head, and as encoders; what their own head needs is left out."""
    name, unused = PRETRAINED[architecture]
    torch_one = torch_model(architecture, config_of(name))
    model, base = moved(torch_one, tmp_path, task="classification", labels=5), VARIANTS[name].base
    encoder = hub.load(tmp_path, "encoder")
    heads = [f"classifier/{layer}/{leaf}" for layer in ("dense", "out_proj") for leaf in ("bias", "kernel")]
    assert sorted(model.fresh) == heads
    assert encoder.fresh == ()
    there = {n for n in load_file(tmp_path / "model.safetensors") if not re.fullmatch(unused, n)}
    for one in (model, encoder):
        assert {one.family.tensor(p) for p in flatten(one.params)} - {h.replace("/", ".") for h in heads} >= there
    assert {p for p in flatten(model.params) if p.startswith(base)} == set(flatten(encoder.params))
    assert {s.path for s in encoder.sites if "/" in s.path and s.kind not in ("block", "attention")} <= set(
        flatten(encoder.params)
    )
    with pytest.raises(ValueError, match=f"'{architecture}' is unknown"):
        hub.load(tmp_path)


@pytest.mark.parametrize("name", ["roberta", "bert"])
def test_an_encoder_without_a_pooler(tmp_path, name):
    """As files of masked-language models have none: the hidden states are there, and saved as they were."""
    cls = {"roberta": "Roberta", "bert": "Bert"}[name]
    config = getattr(transformers, f"{cls}Config")(**SIZES, pad_token_id=1)
    torch_one = torch_model(f"{cls}ForMaskedLM", config)
    model, batch = moved(torch_one, tmp_path, task="encoder"), padded()
    want, got = theirs(torch_one.base_model, batch).last_hidden_state, ours(model, batch)
    assert_same(got.hidden, want, batch["attention_mask"] > 0)
    assert got.pooled is None
    hub.save(model, model.params, tmp_path / "again")
    again = getattr(transformers, f"{cls}Model").from_pretrained(tmp_path / "again", add_pooling_layer=False)
    assert_same(theirs(again.eval(), batch).last_hidden_state, want)
    assert flatten(hub.load(tmp_path / "again").params).keys() == flatten(model.params).keys()


def test_half_a_pooler_is_missing(tmp_path):
    made("roberta", "Model").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["pooler.dense.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: roberta\.pooler\.dense\.bias$"):
        hub.load(tmp_path)
    bert = torch_model("BertForMaskedLM", transformers.BertConfig(**SIZES))
    with pytest.raises(ValueError, match=r"missing: bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight$"):
        moved(bert, tmp_path / "bert", task="classification")  # whose head reads it


@FAMILIES
def test_old_names_and_buffers(tmp_path, name):
    model = moved(made(name), tmp_path)
    file, base = tmp_path / "model.safetensors", VARIANTS[name].base
    spelling = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    old = {n: x for n, x in load_file(file).items() if "LayerNorm" not in n}
    old |= {n.replace(new, was): x for n, x in load_file(file).items() for new, was in spelling if new in n}
    old[f"{base}.embeddings.position_ids"] = np.arange(20)[None]
    if base == "roberta":  # a pooler that a classifier has no use for
        old |= {"roberta.pooler.dense.weight": np.ones((16, 16)), "roberta.pooler.dense.bias": np.ones(16)}
    save_file(old, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"position_embedding_type": "absolute", "tie_word_embeddings": False}
    config |= {"summary_type": "mean", "summary_use_proj": False} if base == "electra" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = flatten(hub.load(tmp_path).params)
    assert all(np.array_equal(x, again[p]) for p, x in flatten(model.params).items())


@pytest.mark.parametrize("name", ["roberta", "electra"])
def test_merged_models_load_in_transformers(tmp_path, key, name):
    model, batch = moved(made(name), tmp_path / "base"), padded()
    params = adapted(model, chain(lora(2, alpha=5, targets=["query"]), bitfit(), head()), key, 0.1)
    want = ours(model, batch, params=params).logits
    assert jnp.abs(want - ours(model, batch).logits).max() > 0.1
    hub.save(model, stack_layers(params), tmp_path / "merged")
    kind = getattr(transformers, f"{VARIANTS[name].kind}ForSequenceClassification")
    assert_same(theirs(kind.from_pretrained(tmp_path / "merged").eval(), batch).logits, want)


REAL: dict[str, Any] = {  # the hub's configs
    "roberta-base": ("Roberta", {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "xlm-roberta-base": ("XLMRoberta", {"vocab_size": 250002, "max_position_embeddings": 514, "type_vocab_size": 1}),
    "electra-small-discriminator": ("Electra", {}),
    "electra-base-discriminator": (
        "Electra",
        {"embedding_size": 768, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    ),
}


@pytest.mark.parametrize("name", REAL)
def test_counts(name):
    torch: Any = pytest.importorskip("torch")
    kind, values = REAL[name]
    config = getattr(transformers, f"{kind}Config")(**values)
    for cls, task in ((f"{kind}Model", "encoder"), (f"{kind}ForSequenceClassification", "classification")):
        with torch.device("meta"):
            want = sum(p.numel() for p in getattr(transformers, cls)(config).parameters())
        assert count(hub.from_config(config, task, seed=None).params) == want


# Configs


BAD: dict[str, Any] = {
    "decoder": ("roberta", {"is_decoder": True}, r"is_decoder=True \(supported: False\)"),
    "cross": ("electra", {"add_cross_attention": True}, r"add_cross_attention=True \(supported: False\)"),
    "relative": ("xlm-roberta", {"position_embedding_type": "relative_key"}, r"'relative_key' \(supported: 'absolute'"),
    "heads": ("electra", {"num_attention_heads": 3}, "hidden_size 16 does not divide into 3 attention heads"),
    "activation": ("roberta", {"hidden_act": "mish"}, "activation 'mish' is not supported; supported are .*'gelu'"),
    "no padding": ("roberta", {"pad_token_id": None}, r"one of 0 \.\.\. 18, before .*got None"),
    "padding": ("roberta", {"pad_token_id": 19}, r"pad_token_id \+ 1, so it must be one of 0 \.\.\. 18.*got 19"),
    "chunks": ("roberta", {"chunk_size_feed_forward": 2}, r"chunk_size_feed_forward=2 \(supported: 0\)"),
    "embeddings": ("roberta", {"embedding_size": 12}, r"embedding_size=12 \(supported: None\)"),
}


@pytest.mark.parametrize("what", BAD)
def test_config_values_that_are_not_honoured(what):
    name, values, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        hub.from_config(config_of(name, **values), "classification", seed=None)


# What holds of ours alone


@variants
@pytest.mark.parametrize("task", ["encoder", "classification"])
def test_sites_name_the_tree(name, task):
    model = hub.from_config(config_of(name), task, seed=None)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "positions", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    weights = {p for p in leaves if p.endswith(("/kernel", "/embedding", "/scale"))}
    assert weights == {s.path for s in model.sites} & set(leaves)
    kinds = {s.kind for s in model.sites}
    assert ("projection" in kinds) == (name == "electra")
    assert ("pooler" in kinds) == ("roberta" in name and task == "encoder")


@FAMILIES
def test_bf16_is_not_promoted(name, key):
    model = hub.from_config(config_of(name), "classification", dtype=jnp.bfloat16)
    model = model._replace(params=cast(model.params, jnp.bfloat16))
    method = chain(lora(rank=2, targets=["linear"]), bitfit(), prefix(length=2), head())
    params = method.init(key, model.params, model.sites)
    trainable, frozen = partition(params, method.trainable(params))
    params = combine(cast(trainable, jnp.float32), frozen)
    batch = {k: jnp.asarray(v) for k, v in padded().items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(stack_layers(params), batch)
    assert (out.hidden.dtype, out.logits.dtype) == (jnp.bfloat16, jnp.float32)
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    assert len(dots) >= 8
    assert {v.aval.dtype for e in dots for v in e.invars} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_dropout(rate, key):
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    rates: dict[str, Any] = {**dict.fromkeys(names, 0.0), rate: 0.5}
    model = hub.from_config(config_of("electra", **rates), "classification")
    params, batch = jax.tree.map(lambda x: x * 9, model.params), {k: jnp.asarray(v) for k, v in texts().items()}
    forward = fast(model.forward)
    first, again, other = (forward(params, batch, k) for k in (key, key, jax.random.key(1)))
    assert_same(first.logits, again.logits, atol=0)
    assert jnp.abs(first.logits - other.logits).max() > 1e-3
    assert (jnp.abs(first.hidden - other.hidden).max() == 0) == (rate == "classifier_dropout")
