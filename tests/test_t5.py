"""T5 and mT5 against transformers on tiny random models; their files, counts, methods and generation."""

import json
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, layouts, moved, ours, texts, theirs, torch_model

from peftjax import chain, combine, count, hub, node, partition
from peftjax.checkpoint import load_adapter
from peftjax.cli import main
from peftjax.generate import Decoding, decoder
from peftjax.layout import stack_layers, unstack_layers
from peftjax.methods import bitfit, dora, head, lora, prefix
from peftjax.models.layers import REMAT, shift_right
from peftjax.models.t5 import buckets_of
from peftjax.problem import objective, prepare
from peftjax.tasks import get_task
from peftjax.tree import cast, flatten, update
from peftjax.weights import is_node

T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
FLAN: dict[str, Any] = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}


class Variant(NamedTuple):
    """`own_head`: the file holds a head that is not the embedding, as that of T5 1.1, Flan-T5 and mT5."""

    family: str
    changes: dict[str, Any]
    own_head: bool


VARIANTS = {
    "t5": Variant("T5", {}, False),
    "flan": Variant("T5", FLAN, True),
    "unscaled, tied": Variant("T5", FLAN, False),
    "silu": Variant("T5", {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2}, False),
    "mt5": Variant("MT5", {}, True),
    "mt5, relu, tied": Variant("MT5", {"feed_forward_proj": "relu"}, False),
}


def torch_t5(name, seed=0, head="ForConditionalGeneration", **changes):
    """A random torch model of a variant; an own head is a parameter of its own, as in files of T5 1.1."""
    variant = VARIANTS[name]
    config = getattr(transformers, variant.family + "Config")(**{**T5, **variant.changes, **changes})
    model = torch_model(variant.family + head, config, seed)
    if variant.own_head and head == "ForConditionalGeneration":
        torch: Any = pytest.importorskip("torch")
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.2)
    return model


def both(source: str | None = "right", target: str | None = "right", seed=0) -> dict[str, Any]:
    """A batch for encoder and decoder, padded on these sides."""
    batch = texts(9, source, seed=seed)
    other = texts(7, target, seed=seed + 1)
    return batch | {"decoder_input_ids": other["input_ids"], "decoder_attention_mask": other["attention_mask"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(tmp_path, name):
    torch_model = torch_t5(name)
    model = moved(torch_model, tmp_path)
    assert ("lm_head" in model.params) is VARIANTS[name].own_head
    for sides in ((None, None), ("right", "right"), ("left", "left"), ("left", "right")):
        batch = both(*sides)
        want, real = theirs(torch_model, batch).logits, batch["decoder_attention_mask"] > 0
        assert np.abs(want).max() > 0.1
        for layout in LAYOUTS.values():
            assert_same(ours(model, batch, layout).logits, want, real)


@pytest.mark.parametrize("buckets", [8, 16, 32])
@pytest.mark.parametrize("distance", [20, 64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_buckets(buckets, distance, causal):
    """Every distance falls into transformers' bucket, at the powers of two above all."""
    torch: Any = pytest.importorskip("torch")
    from transformers.models.t5.modeling_t5 import T5Attention

    relative = torch.arange(-3 * distance, 3 * distance)
    want = T5Attention._relative_position_bucket(relative, not causal, buckets, distance).numpy()
    half = buckets if causal else buckets // 2
    got = buckets_of(half, distance)[np.minimum(np.maximum(-relative, 0) if causal else np.abs(relative), distance)]
    np.testing.assert_array_equal(got if causal else got + half * (relative.numpy() > 0), want)


def test_distances_beyond_the_last_bucket(tmp_path):
    torch_model = torch_t5("t5")
    batch = texts(31, "left") | {"decoder_input_ids": texts(29, seed=1)["input_ids"]}
    want = theirs(torch_model, batch).logits
    for layout in LAYOUTS.values():
        assert_same(ours(moved(torch_model, tmp_path), batch, layout).logits, want)


def ended(padding, length=9) -> dict[str, Any]:
    """Texts with one end-of-text token each, the last that is no padding, and none elsewhere."""
    batch = texts(length, padding)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row[np.flatnonzero(mask)[-1]] = 1
    return batch


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_classifier(tmp_path, name, padding):
    torch_model = torch_t5(name, head="ForSequenceClassification", num_labels=3)
    model, batch = moved(torch_model, tmp_path), ended(padding)
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout).logits
        assert got.shape == (3, 3)
        assert_same(got, theirs(torch_model, batch).logits)


def test_a_classifier_reads_the_last_of_several_ends(tmp_path):
    torch_model = torch_t5("t5", head="ForSequenceClassification", num_labels=1)
    model, batch = moved(torch_model, tmp_path), texts(9, "right")
    batch["input_ids"][:, [1, 4]] = 1
    assert_same(ours(model, batch).logits, theirs(torch_model, batch).logits)


def test_a_classifier_reads_the_last_token_of_a_text_without_an_end(tmp_path):
    model, batch = moved(torch_t5("t5", head="ForSequenceClassification"), tmp_path), ended("left")
    batch["input_ids"][batch["input_ids"] == 1] = 49
    other = model.module.clone(config=model.config._replace(eos_token_id=49))
    assert_same(ours(model, batch).logits, ours(model._replace(module=other), batch).logits, atol=1e-6)


@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_base(tmp_path, name):
    torch_model = torch_t5(name, head="Model")
    model, batch = moved(torch_model, tmp_path), both("left", "right")
    got = ours(model, batch)
    assert got.logits is None
    assert_same(got.hidden, theirs(torch_model, batch).last_hidden_state, batch["decoder_attention_mask"] > 0)


def test_input_that_is_refused():
    model = hub.from_config(transformers.T5Config(**T5), "seq2seq")
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        ours(model, texts())
    with pytest.raises(ValueError, match="no token types"):
        ours(model, both() | {"type_ids": texts()["input_ids"]})
    with pytest.raises(ValueError, match="needs input_ids"):
        ours(model, {"decoder_input_ids": texts()["input_ids"]})


def test_shift_right_is_that_of_transformers():
    torch: Any = pytest.importorskip("torch")
    torch_model, ids = torch_t5("t5", decoder_start_token_id=4), texts()["input_ids"]
    want = torch_model._shift_right(torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(shift_right(jnp.asarray(ids), 4), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_attention_num_buckets": 6}, "multiple of 4"),
        ({"relative_attention_num_buckets": 32}, "below twice the relative_attention_max_distance 12"),
        ({"feed_forward_proj": "gated-mish"}, "activation 'mish' is not supported"),
        ({"eos_token_id": [1, 2]}, "one token"),
        ({"is_decoder": True}, r"is_decoder=True \(supported: False\)"),
        ({"layerdrop": 0.1}, "layerdrop=0.1"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hub.from_config(transformers.T5Config(**{**T5, **changes}), "seq2seq", seed=None)


# Files


@layouts
@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("t5", "ForConditionalGeneration"),
        ("flan", "ForConditionalGeneration"),
        ("mt5", "ForConditionalGeneration"),
        ("mt5, relu, tied", "ForConditionalGeneration"),
        ("t5", "ForSequenceClassification"),
        ("t5", "Model"),
    ],
)
def test_saved_for_transformers(tmp_path, name, head, layout):
    """There and back: the names, and so every tensor, are those of the file that transformers wrote."""
    torch_model = torch_t5(name, head=head)
    model, batch = moved(torch_model, tmp_path / "theirs"), both()
    hub.save(model, layout(model.params), tmp_path / "ours")
    want, got = (load_file(tmp_path / f"{whose}/model.safetensors") for whose in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[k], want[k]) for k in want)
    again = type(torch_model).from_pretrained(tmp_path / "ours").eval()
    batch = ended("right") if "Classification" in head else batch
    assert_same(theirs(again, batch)[0], theirs(torch_model, batch)[0], atol=1e-6)


def rewrite(folder, change):
    """Changes the tensors in a folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_old_files_with_copies_of_the_table(tmp_path):
    torch_model = torch_t5("t5")
    torch_model.save_pretrained(tmp_path)

    def older(tensors):
        for stack in ("encoder", "decoder"):
            tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].copy()
        tensors["lm_head.weight"] = tensors["shared.weight"].copy()
        where = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[where] = np.ones((8, 4), np.float32)  # of the first release; nothing reads it

    rewrite(tmp_path, older)
    batch = both()
    assert_same(ours(hub.load(tmp_path), batch).logits, theirs(torch_model, batch).logits, atol=1e-4)
    rewrite(tmp_path, lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"] + 1}))
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight .* two different tensors"):
        hub.load(tmp_path)


def test_a_config_written_by_an_older_transformers(tmp_path):
    """Flan-T5's says that nothing is tied, and nothing about the scale."""
    torch_model = torch_t5("flan")
    torch_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"tie_word_embeddings": False, "n_positions": 512, "task_specific_params": {"a": 1}, "output_past": True}
    del config["scale_decoder_outputs"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    batch = both()
    assert_same(ours(hub.load(tmp_path), batch).logits, theirs(torch_model, batch).logits)


def test_a_start_token_that_no_config_names(tmp_path):
    config = {k: v for k, v in T5.items() if k != "decoder_start_token_id"}
    model = hub.from_config(transformers.T5Config(**config, pad_token_id=3), "seq2seq", seed=None)
    assert model.family.start_id(model.config) == 3


def test_missing_and_extra_tensors_are_named_as_in_the_file(tmp_path):
    torch_t5("t5").save_pretrained(tmp_path)
    where = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rewrite(tmp_path, lambda tensors: tensors.pop(where))
    with pytest.raises(ValueError, match="missing: transformer." + re.escape(where)):
        hub.load(tmp_path)


def test_a_language_model_as_a_classifier(tmp_path):
    """The head is drawn anew; the rest, an own language head aside, is what the file holds."""
    torch_t5("flan").save_pretrained(tmp_path)
    model = hub.load(tmp_path, "classification", labels=3)
    assert {p.split("/")[0] for p in model.fresh} == {"classification_head"}
    assert len(model.fresh) == 4
    want = load_file(tmp_path / "model.safetensors")["shared.weight"]
    np.testing.assert_array_equal(model.params["transformer"]["shared"]["embedding"], want)
    assert {s.kind for s in model.sites if s.path.startswith("classification_head")} == {"head"}


def test_what_generates():
    assert hub.from_config(transformers.T5Config(**T5), "generation", seed=None).module.head == "seq2seq-lm"
    assert hub.from_config(transformers.GPT2Config(), "generation", seed=None).module.head == "causal-lm"
    assert hub.task_of("MT5ForConditionalGeneration") == "seq2seq"


# Layout, sites, counts


def test_only_blocks_are_stacked():
    model = hub.from_config(transformers.T5Config(**T5, feed_forward_proj="gated-gelu"), "seq2seq")
    paths = flatten(stack_layers(model.params))
    assert {p.split("/")[2] for p in paths if "*" in p} == {"block_*"}
    assert all(p.count("*") == ("/block_" in p) for p in paths)
    assert not any(re.search(r"_\d", p) for p in paths)
    back = unstack_layers(stack_layers(model.params))
    assert jax.tree.structure(back) == jax.tree.structure(model.params)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("task", ["seq2seq", "classification", "encoder"])
def test_sites_name_the_tree(task, gated):
    config = transformers.T5Config(**T5, **(FLAN if gated else {}))
    model = hub.from_config(config, task)
    leaves = flatten(model.params)
    for site in model.sites:
        if site.kind in ("attention", "block", "input"):
            assert any(p.startswith(site.path + "/") for p in leaves), site
        else:
            assert leaves[site.path].shape[-1] == site.width, site
    weights = {p for p in leaves if p.endswith(("/kernel", "/embedding", "/scale"))}
    assert weights == {s.path for s in model.sites} & set(leaves)
    layers = {s.layer for s in model.sites if s.layer is not None}
    assert layers == set(range(5))
    assert all((s.layer < 2) == ("/encoder/" in s.path) for s in model.sites if s.layer is not None)


def t5_of(d, ff, layers, heads, size=64, vocab=32128, **changes):
    return transformers.T5Config(
        vocab_size=vocab, d_model=d, d_ff=ff, num_layers=layers, num_heads=heads, d_kv=size, **changes
    )


def test_t5_base_counts():
    """The total is that of the config and of transformers; peft's documentation has 55,296 more.

    Its 223,843,584 for LoRA (r = 8) is the total, 884,736 for the adapter, and a vector of 768 for each of the 72
    adapted layers, as if each had a bias; peft itself counts 223,788,288 today.
    """
    base = hub.from_config(t5_of(768, 3072, 12, 12), "seq2seq", seed=None)
    d, ff, v, layers, heads = 768, 3072, 32128, 12, 12
    block = 4 * d * d + 2 * d * ff
    want = v * d + layers * (block + 2 * d) + layers * (block + 4 * d * d + 3 * d) + 2 * (d + 32 * heads)
    assert count(base.params) == want == 222_903_552
    method = lora(8)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, base.sites), base.params)
    assert count(partition(params, method.trainable(params))[0]) == 884_736 == 36 * 2 * 8 * (768 + 768)
    assert want + 884_736 + 72 * 768 == 223_843_584
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = transformers.T5ForConditionalGeneration(t5_of(768, 3072, 12, 12))
        adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=["q", "v"]))
    assert adapted.get_nb_trainable_parameters() == (884_736, want + 884_736)


COUNTS = {  # from the sizes in Raffel et al. 2020 and the released configs; totals as transformers counts them
    "t5-small": (t5_of(512, 2048, 6, 8), 60_506_624),
    "t5-large": (t5_of(1024, 4096, 24, 16), 737_668_096),
    "t5-v1.1-small": (t5_of(512, 1024, 8, 6, feed_forward_proj="gated-gelu"), 76_961_152),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    config, want = COUNTS[name]
    if config.is_gated_act:
        config.tie_word_embeddings = False
    assert count(hub.from_config(config, "seq2seq", seed=None).params) == want


# Generation


@layouts
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["t5", "flan", "mt5"])
def test_greedy_is_that_of_transformers(tmp_path, name, padding, layout):
    torch: Any = pytest.importorskip("torch")
    torch_model = torch_t5(name, num_decoder_layers=2)  # another number than the encoder's, transformers cannot
    model, batch = moved(torch_model, tmp_path), texts(9, padding, rows=6, seed=3)
    params, prompts = layout(model.params), (batch["input_ids"], batch["attention_mask"])
    endless = np.asarray(decoder(model, Decoding(14))(params, *prompts))
    assert len({tuple(row) for row in endless.tolist()}) > 3, "the texts depend on the prompts"
    eos = int(endless[0, 5])  # so that some row ends
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    want = torch_model.generate(**inputs, max_new_tokens=14, do_sample=False, eos_token_id=eos, pad_token_id=0)
    want = want.numpy()[:, 1:]  # without the start token
    got = np.asarray(decoder(model, Decoding(14, stop=(eos,)))(params, *prompts))
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert (got[:, want.shape[1] :] == 0).all()


@layouts
@pytest.mark.parametrize("with_prefix", [False, True], ids=["plain", "prefix"])
def test_cached_equals_uncached(layout, with_prefix, key):
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    model = hub.from_config(config, "seq2seq")
    params = model.params
    if with_prefix:
        params = prefix(length=3, std=1.0).init(key, params, model.sites)
    params = layout(params)
    batch = {k: jnp.asarray(v) for k, v in both("left", None).items()}
    batch["decoder_input_ids"] = batch["decoder_input_ids"].at[:, 0].set(0)
    want = ours(model, batch, params=params).logits
    step = jax.jit(lambda params, batch, cache: model.forward(params, batch, cache=cache))
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask")}
    out = step(params, prompt, model.empty_cache(params, 3, 9))
    logits = [out.logits]
    for piece in (slice(1, 4), slice(4, 5), slice(5, 7)):
        out = step(params, {"decoder_input_ids": batch["decoder_input_ids"][:, piece]}, out.cache)
        logits.append(out.logits)
    assert out.cache.index == 7
    assert_same(jnp.concatenate(logits, axis=1), want)
    assert jnp.abs(want).max() > 0.1


def test_the_encoder_runs_once_and_the_function_compiles_once():
    model = hub.from_config(transformers.T5Config(**T5), "seq2seq")
    generate, batch = decoder(model, Decoding(6)), texts(9)
    for seed in (1, 2):
        ids = texts(9, seed=seed)["input_ids"]
        assert generate(model.params, ids, batch["attention_mask"]).shape == (3, 6)
    assert generate._cache_size() == 1
    program = equations(jax.make_jaxpr(generate)(model.params, ids, ids).jaxpr)
    loop = next(e for e in program if e.primitive.name == "while")
    body = loop.params["body_jaxpr"].jaxpr
    assert not any("encode" in str(e.source_info.name_stack) for e in equations(body))
    # of the attention to the encoder, a step computes q and o only
    products = [e for e in equations(body) if "EncDecAttention" in str(e.source_info.name_stack)]
    names = {str(e.source_info.name_stack).split("/")[-1] for e in products if e.primitive.name == "dot_general"}
    assert not names & {"k", "v"}
    assert {"q", "o"} <= names


# Tasks and the command line


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A tiny T5 in a folder, and the data of two tasks."""
    at = tmp_path_factory.mktemp("tiny")
    tiny.folder(at / "t5", "t5", feed_forward_proj="gated-gelu")
    for task in ("rte", "e2e"):
        tiny.data(at / task, task)
    return at


def test_examples_of_an_encoder_and_a_decoder(at):
    problem = tiny.problem(at, "t5", "e2e", max_buckets=2)
    tokenizer, eos = problem.tokenizer, 3
    assert problem.task.prompt is not None
    row = tiny.rows("e2e", 24, 0)[0]
    prompt = problem.task.prompt(row)
    example = problem.train[0]
    assert example.input_ids == tokenizer(prompt)["input_ids"]
    assert example.input_ids[-1] == eos
    assert example.target_ids == [*tokenizer(row["ref"], add_special_tokens=False)["input_ids"], eos]
    assert example.loss_mask is None
    assert all(e.target_ids is None and e.references for e in problem.prompts)
    assert problem.max_new_tokens == max(len(e.target_ids or ()) for e in problem.train)
    shapes = set()
    for batch in problem.epoch(0, 8, 0):
        assert batch["target_ids"].shape == batch["loss_mask"].shape
        assert (batch["loss_mask"].sum(1) == (batch["target_ids"] > 0).sum(1) * (batch["weight"] > 0)).all()
        shapes.add((batch["input_ids"].shape, batch["target_ids"].shape))
    assert len(shapes) <= 2


def test_the_loss_is_that_of_transformers(at):
    torch: Any = pytest.importorskip("torch")
    problem = tiny.problem(at, "t5", "e2e")
    reference = transformers.T5ForConditionalGeneration.from_pretrained(at / "t5").eval()
    batch = next(problem.epoch(0, 8, 0))
    total, weight = jax.jit(lambda p, b: objective(problem)(p, b, None))(problem.model.params, batch)
    labels = np.where(batch["loss_mask"] > 0, batch["target_ids"], -100)
    inputs = {k: torch.tensor(batch[k]).long() for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want = reference(**inputs, labels=torch.tensor(labels).long()).loss
    assert weight == batch["loss_mask"].sum()
    np.testing.assert_allclose(total / weight, float(want), rtol=1e-4)


def test_texts_that_are_too_long(at):
    with pytest.raises(ValueError, match="longer than 5 tokens"):
        tiny.problem(at, "t5", "e2e", max_length=5)
    task = get_task("e2e")._replace(truncate=True)
    source = str(tiny.data(at / "e2e", "e2e"))
    cut = prepare(str(at / "t5"), task, source, max_length=10)
    assert max(len(e.input_ids) for e in cut.train) == 10
    assert all(e.input_ids[-1] == 3 for e in cut.train)
    with pytest.raises(ValueError, match=r"completion of row .* longer than 5 tokens"):
        prepare(str(at / "t5"), task, source, max_length=5)


QUICK = ("--steps", "3", "--batch-size", "8", "--buckets", "1")


def run(*arguments):
    main([str(a) for a in arguments])


def test_every_verb_on_a_generation_task(at, tmp_path):
    base = ("--model", at / "t5", "--task", "e2e", "--data", at / "e2e")
    run("compare", *base, *QUICK, "--methods", "prefix(length=3), bitfit", "--out", tmp_path / "all")
    rows = [json.loads(line) for line in (tmp_path / "all/results.jsonl").read_text().splitlines()]
    assert {r["method"] for r in rows} >= {"zero-shot", "prefix(length=3)", "bitfit"}
    assert all(np.isfinite(r["scores"]["loss"]) and "bleu" in r["scores"] for r in rows)
    run("train", *base, *QUICK, "--method", "lora(rank=2)", "--layout", "scan", "--out", tmp_path / "one")
    adapter = tmp_path / "one/adapter.safetensors"
    run("evaluate", *base, "--adapter", adapter)
    run("merge", "--model", at / "t5", "--adapter", adapter, "--out", tmp_path / "merged")
    merged = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    problem = tiny.problem(at, "t5", "e2e")
    batch = both()
    batch = {k: np.minimum(v, 20) for k, v in batch.items()}
    params = load_adapter(adapter, problem.model).params
    assert_same(ours(problem.model, batch, params=params).logits, theirs(merged, batch).logits)


@pytest.mark.slow
def test_every_verb_on_a_classification_task(at, tmp_path):
    base = ("--model", at / "t5", "--task", "rte", "--data", at / "rte")
    run("compare", *base, *QUICK, "--methods", "head, prefix(length=3)", "--out", tmp_path / "all")
    run("train", *base, *QUICK, "--method", "lora(rank=2)", "--out", tmp_path / "one")
    adapter = tmp_path / "one/adapter.safetensors"
    run("evaluate", *base, "--adapter", adapter)
    run("merge", "--model", at / "t5", "--adapter", adapter, "--out", tmp_path / "merged")
    merged = transformers.T5ForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    batch = texts(9)
    batch["input_ids"] = np.clip(batch["input_ids"], 4, 20)  # transformers wants one end a row
    batch["input_ids"][:, -1] = 3
    got = ours(hub.load(tmp_path / "merged"), batch).logits
    assert_same(got, theirs(merged, batch).logits)


# Methods on what only T5 has


@layouts
def test_created_biases_on_a_model_without_any(layout, key):
    model = hub.from_config(transformers.T5Config(**T5), "classification", labels=3)
    method = chain(bitfit(create=True), head())
    params = method.init(key, model.params, model.sites)
    batch = {k: jnp.asarray(v) for k, v in ended("right").items()}
    assert_same(ours(model, batch, layout, params).logits, ours(model, batch).logits, atol=1e-6)
    attention, mlp = 3 * 24 + 32, 48 + 32
    want = (2 + 3 + 3) * attention + (2 + 3) * mlp + 32 * 33 + 3 * 33
    assert count(partition(params, method.trainable(params))[0]) == want
    trainable, frozen = partition(layout(params), method.trainable(layout(params)))

    def loss(trainable):
        out: Any = model.forward(combine(trainable, frozen), batch)
        return jnp.square(out.logits).sum()

    grads = jax.grad(loss)(trainable)
    assert all(jnp.abs(g).max() > 0 for p, g in flatten(grads).items() if "/k/" not in p)  # of keys: softmax ignores it


@layouts
@pytest.mark.parametrize("sort", ["self", "cross"])
def test_a_prefix_is_keys_from_before(tmp_path, layout, sort, key):
    """In the decoder, against transformers with past keys and values: of positions before the text, with their bias."""
    torch: Any = pytest.importorskip("torch")
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    torch_model = torch_t5("t5", num_decoder_layers=2)
    model, batch, n = moved(torch_model, tmp_path), both("left", None), 5
    params = prefix(n, std=1.0).init(key, model.params, model.sites)
    name = {"self": "layer0/SelfAttention", "cross": "layer1/EncDecAttention"}[sort]
    flat = flatten(params, is_leaf=is_node)
    kept = {p: x for p, x in flat.items() if not p.endswith("/prefix") or ("decoder" in p and name in p)}
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    params = update({}, kept)
    got = ours(model, batch, layout, params).logits
    states = torch_model.encoder(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for i, block in enumerate(torch_model.decoder.block):
        node = kept[f"transformer/decoder/block_{i}/{name}/prefix"]
        k, v = (torch.tensor(np.asarray(x))[None].expand(3, -1, -1, -1).transpose(1, 2) for x in (node.key, node.value))
        if sort == "self":
            cache.self_attention_cache.update(k, v, i)
            continue
        attention = block.layer[1].EncDecAttention
        pair = [m(states).view(3, -1, 4, 6).transpose(1, 2) for m in (attention.k, attention.v)]
        cache.cross_attention_cache.update(*(torch.cat(two, 2) for two in zip((k, v), pair, strict=True)), i)
        cache.is_updated[i] = True
    mask = torch.cat([torch.ones(3, n).long(), inputs["attention_mask"]], 1)
    seen = torch.cat([torch.ones(3, n).long(), inputs["decoder_attention_mask"]], 1)
    with torch.no_grad():
        want = torch_model(
            encoder_outputs=(states if sort == "self" else torch.zeros(3, n + 9, 32),),
            attention_mask=inputs["attention_mask"] if sort == "self" else mask,
            decoder_input_ids=inputs["decoder_input_ids"],
            decoder_attention_mask=seen if sort == "self" else None,
            past_key_values=cache,
        ).logits
    assert_same(got, want)
    assert np.abs(np.asarray(got) - np.asarray(ours(model, batch).logits)).max() > 1e-2


def test_cross_attention_has_its_hook_and_targets(key):
    model = hub.from_config(transformers.T5Config(**T5), "seq2seq")
    batch = both()

    @node
    class Double:
        def __call__(self, y, *, x, context):
            assert context.mask.shape == (3, 1, 1, 9)
            return 2 * y

    path = "transformer/decoder/block_0/cross_attention_output"
    doubled = ours(model, batch, params=update(model.params, {path: Double()})).logits
    o = "transformer/decoder/block_0/layer1/EncDecAttention/o/kernel"
    want = ours(model, batch, params=update(model.params, {o: 2 * flatten(model.params)[o]})).logits
    assert_same(doubled, want, atol=1e-5)
    one = lora(rank=2, targets=[".*/EncDecAttention/[qv]/kernel"]).init(key, model.params, model.sites)
    assert sum(is_node(x) for x in flatten(one, is_leaf=is_node).values()) == 2 * 3


@layouts
@pytest.mark.parametrize("method", [lora(rank=2), dora(rank=2), prefix(3), prefix(3, mlp=True, hidden=7)])
def test_bf16_is_not_promoted(method, layout, key):
    config = transformers.T5Config(**T5, feed_forward_proj="gated-gelu")
    model = hub.from_config(config, "seq2seq", dtype=jnp.bfloat16)
    params = method.init(key, cast(model.params, jnp.bfloat16), model.sites)
    params = method.resolve(layout(params), None)
    batch = {k: jnp.asarray(v) for k, v in both().items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, batch)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    mixed = [e for e in dots if {v.aval.dtype for v in e.invars} != {jnp.dtype(jnp.bfloat16)}]
    assert len(dots) > 20
    assert not mixed or method.spec[0][0] == "dora"  # its lengths are float32


def test_dropout(key):
    model = hub.from_config(transformers.T5Config(**T5, dropout_rate=0.5), "seq2seq")
    batch = {k: jnp.asarray(v) for k, v in both().items()}
    forward = jax.jit(model.forward)
    first, again, other, plain = (forward(model.params, batch, k).logits for k in (key, key, jax.random.key(1), None))
    assert_same(first, again, atol=0)
    for x in (other, plain):
        assert jnp.abs(first - x).max() > 1e-3
    program = equations(jax.make_jaxpr(model.forward)(model.params, batch, key).jaxpr)
    drawn = sum(e.primitive.name == "random_bits" for e in program)
    ends, encoder, decoder = 2, 4, 6  # a stack's input and output; probabilities, MLP, and what each sub-layer adds
    assert drawn == (ends + 2 * encoder) + (ends + 3 * decoder)


@layouts
def test_remat_changes_no_gradient(layout):
    model = hub.from_config(transformers.T5Config(**T5), "seq2seq")
    batch = {k: jnp.asarray(v) for k, v in both().items()}
    results = []
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))

        def loss(params, again=again):
            out: Any = again.forward(params, batch)
            return jnp.square(out.logits).mean()

        results.append(flatten(jax.jit(jax.grad(loss))(layout(model.params))))
    for path, g in results[0].items():
        for other in results[1:]:
            assert_same(other[path], g, atol=1e-6)
