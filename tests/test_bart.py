"""BART against transformers on tiny random models; its files, counts, methods and generation."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from safetensors.numpy import load_file, save_file
from test_models import LAYOUTS, assert_same, equations, fast, layouts, moved, ours, texts, theirs, torch_model

from peftjax import chain, count, hub, merge, node, stack_layers
from peftjax.generate import Decoding, Writer, decoder
from peftjax.methods import bitfit, dora, lora, mam, prefix, prompt
from peftjax.models.bart import OFFSET
from peftjax.models.layers import REMAT, shift_right
from peftjax.problem import objective
from peftjax.tree import cast, flatten, get, map_with_path, update
from peftjax.weights import is_node

BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 20,
}
SMALL: dict[str, Any] = BART | {"encoder_layers": 1, "decoder_layers": 1}
VARIANTS: dict[str, dict[str, Any]] = {
    "bart": {},
    "scaled": {"scale_embedding": True, "activation_function": "relu", "encoder_layers": 1, "decoder_layers": 3},
}


def torch_bart(head="ForConditionalGeneration", seed=0, sizes=BART, **changes):
    """A random torch model; the bias of its logits is a buffer and not zero."""
    model = torch_model("Bart" + head, transformers.BartConfig(**{**sizes, **changes}), seed)
    if head == "ForConditionalGeneration":
        model.final_logits_bias.normal_()
    return model


def here(task="seq2seq", sizes=BART, **kwargs):
    """Ours, with attention far from uniform and no zeros."""
    model = hub.from_config(transformers.BartConfig(**sizes, init_std=0.2), task, **kwargs)
    return model._replace(params=tiny.roughen(model.params))


def both_sides(length: int, seed=0) -> dict[str, Any]:
    """Rows that are padded on the left, on the right and not at all, in one batch."""
    left, right = texts(length, "left", seed=seed), texts(length, "right", seed=seed + 1)
    return {k: np.concatenate([left[k], right[k]]) for k in left}


def pairs(seed=0) -> dict[str, Any]:
    """A batch for encoder and decoder, each side of the one with each of the other."""
    batch, other = both_sides(9, seed), both_sides(7, seed + 2)
    order = [3, 0, 5, 1, 4, 2]
    other = {k: v[order] for k, v in other.items()}
    return batch | {"decoder_input_ids": other["input_ids"], "decoder_attention_mask": other["attention_mask"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(tmp_path, name):
    torch_model = torch_bart(**VARIANTS[name])
    model, batch = moved(torch_model, tmp_path), pairs()
    want, real = theirs(torch_model, batch).logits, batch["decoder_attention_mask"] > 0
    assert want.abs().max() > 0.1
    for layout in LAYOUTS.values():
        assert_same(ours(model, batch, layout).logits, want, real)


def test_base_without_masks(tmp_path):
    torch_model = torch_bart("Model", sizes=SMALL, activation_function="gelu_new")
    model, batch = moved(torch_model, tmp_path), pairs()
    batch = {k: v for k, v in batch.items() if "mask" not in k}
    got = ours(model, batch)
    assert got.logits is None
    assert_same(got.hidden, theirs(torch_model, batch).last_hidden_state)


def ended(length=9, ends=(-1,), seed=0) -> dict[str, Any]:
    """Texts with the end of a text, 2, at these of their tokens that are no padding, and nowhere else."""
    batch = both_sides(length, seed)
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        row[np.flatnonzero(mask)[[*ends]]] = 2
    return batch


def test_classifier(tmp_path):
    torch_model = torch_bart("ForSequenceClassification", num_labels=4)
    model, single, several = moved(torch_model, tmp_path), ended(), ended(ends=(0, 3))  # 3 is read
    want = np.concatenate([theirs(torch_model, x).logits for x in (single, several)])
    batch = {k: np.concatenate([single[k], several[k]]) for k in single}
    for layout in LAYOUTS.values():
        got = ours(model, batch, layout).logits
        assert got.shape == (12, 4)
        assert_same(got, want)


def test_input_that_is_refused():
    model = hub.from_config(transformers.BartConfig(**BART), "seq2seq", seed=None)
    long = texts(21)["input_ids"]

    def shapes(batch, **kwargs):
        return jax.eval_shape(lambda p: model.forward(p, batch, **kwargs), model.params)

    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        shapes(texts())
    with pytest.raises(ValueError, match="no token types"):
        shapes(pairs() | {"type_ids": texts()["input_ids"]})
    with pytest.raises(ValueError, match="needs input_ids"):
        shapes({"decoder_input_ids": texts()["input_ids"]})
    for name in ("input_ids", "decoder_input_ids"):
        batch = {"input_ids": texts()["input_ids"], "decoder_input_ids": texts()["input_ids"]} | {name: long}
        with pytest.raises(ValueError, match="21 tokens, virtual ones included, are more than the 20 positions"):
            shapes(batch)
    with pytest.raises(ValueError, match="21 tokens"):
        shapes(texts(9), cache=model.empty_cache(model.params, 3, 21))
    assert model.max_length == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_attention_heads": 5}, "24 does not divide into 5 encoder_attention_heads"),
        ({"decoder_attention_heads": 7}, "24 does not divide into 7 decoder_attention_heads"),
        ({"activation_function": "mish"}, "activation 'mish' is not supported"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id must be one token; got \[1, 2\]"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id must be one token; got None"),
        ({"is_decoder": True}, r"is_decoder=True \(supported: False\)"),
        ({"tie_word_embeddings": False}, r"tie_word_embeddings=False \(supported: True\)"),
        ({"normalize_before": True}, r"normalize_before=True \(supported: False\)"),
        ({"add_final_layer_norm": True}, r"add_final_layer_norm=True \(supported: False\)"),
        ({"static_position_embeddings": True}, r"static_position_embeddings=True \(supported: False\)"),
        ({"encoder_layerdrop": 0.1}, r"encoder_layerdrop=0.1 \(supported: 0.0\)"),
        ({"forced_eos_token_id": 50}, "must each be one of the 50 tokens; got None and 50"),
        ({"forced_eos_token_id": [1, 2]}, r"got None and \[1, 2\]"),
    ],
)
def test_configs_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hub.from_config(transformers.BartConfig(**{**BART, **changes}), "seq2seq", seed=None)


# Files


@pytest.mark.parametrize("head", ["ForConditionalGeneration", "ForSequenceClassification", "Model"])
def test_saved_for_transformers(tmp_path, head):
    """There and back: the names, and so every tensor, are those of the file that transformers wrote."""
    model = moved(torch_bart(head), tmp_path / "theirs")
    hub.save(model, stack_layers(model.params), tmp_path / "ours")
    want, got = (load_file(tmp_path / f"{whose}/model.safetensors") for whose in ("theirs", "ours"))
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in want)
    hub.save(hub.load(tmp_path / "ours"), model.params, tmp_path / "again")
    assert (tmp_path / "ours/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "head", ["ForConditionalGeneration", pytest.param("ForSequenceClassification", marks=pytest.mark.slow)]
)
def test_merged_for_transformers(tmp_path, key, head):
    torch_model = torch_bart(head)
    model = moved(torch_model, tmp_path / "theirs")
    method = chain(lora(rank=2, alpha=3), bitfit())
    params = method.init(key, model.params, model.sites)
    trained = flatten(method.trainable(params))
    rng = np.random.default_rng(0)
    params = map_with_path(lambda p, x: x + 0.3 * rng.normal(size=x.shape) if trained[p] else x, params)
    batch = ended() if "Classification" in head else pairs()
    got = ours(model, batch, params=params).logits
    assert np.abs(got - theirs(torch_model, batch).logits.numpy()).max() > 0.1
    hub.save(model, merge(params), tmp_path / "merged")
    merged = getattr(transformers, "Bart" + head).from_pretrained(tmp_path / "merged").eval()
    real = batch["decoder_attention_mask"] > 0 if "decoder_attention_mask" in batch else ...
    assert_same(got, theirs(merged, batch).logits, real)


def rewrite(folder, change):
    """Changes the tensors in a folder's file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors) or tensors, file, metadata={"format": "pt"})


def test_old_files(tmp_path):
    """Copies of the table, versions; and a base's names for a model with a head, whose bias is zero then."""
    torch_model = torch_bart(sizes=SMALL)
    torch_model.save_pretrained(tmp_path)
    whole = hub.load(tmp_path)

    def older(tensors):
        for stack in ("encoder", "decoder"):
            tensors[f"model.{stack}.embed_tokens.weight"] = tensors["model.shared.weight"].copy()
            tensors[f"model.{stack}.version"] = np.array([3.0], np.float32)
        tensors["lm_head.weight"] = tensors["model.shared.weight"].copy()

    rewrite(tmp_path, older)
    assert tiny.same(hub.load(tmp_path).params, whole.params)
    rewrite(tmp_path, lambda t: {k.removeprefix("model."): v for k, v in t.items() if k.startswith("model.")})
    model = hub.load(tmp_path, "seq2seq")
    assert model.fresh == ()
    assert not get(model.params, "final_logits_bias").any()
    assert tiny.same(model.params["model"], whole.params["model"])
    classifier = hub.load(tmp_path, "classification", labels=5)
    assert {p.split("/")[0] for p in classifier.fresh} == {"classification_head"}
    assert len(classifier.fresh) == 4
    assert tiny.same(hub.load(tmp_path, "encoder").params["model"], whole.params["model"])
    rewrite(tmp_path, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1}))
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight .* two different tensors"):
        hub.load(tmp_path)
    rewrite(tmp_path, lambda t: {k: v for k, v in t.items() if not k.startswith("encoder.embed")})
    with pytest.raises(ValueError, match=r"missing: model.encoder.embed_positions.weight"):
        hub.load(tmp_path, "encoder")


def test_a_config_written_by_an_older_transformers(tmp_path):
    torch_bart().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"add_bias_logits": False, "add_final_layer_norm": False, "classif_dropout": 0.1, "early_stopping": True}
    config |= {"extra_pos_embeddings": 2, "normalize_before": False, "normalize_embedding": True, "num_beams": 4}
    config |= {"static_position_embeddings": False, "save_step": 11, "prefix": " ", "output_past": True}
    config |= {"replacing_rate": 0, "student_encoder_layers": None, "student_decoder_layers": None}
    config |= {
        "no_repeat_ngram_size": 3,
        "length_penalty": 2.0,
        "num_hidden_layers": 2,
        "gradient_checkpointing": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert hub.load(tmp_path).config == hub.from_config(transformers.BartConfig(**BART), "seq2seq", seed=None).config


FORCED = {  # what the files say: (generation_config.json, config.json's own) -> the first and the last token
    "config": (None, {"forced_bos_token_id": 5}, (5, 2)),
    "older config": (None, {"force_bos_token_to_be_generated": True, "forced_eos_token_id": None}, (0, None)),
    "a file of its own": ({"forced_bos_token_id": 7, "forced_eos_token_id": [4]}, {"forced_bos_token_id": 5}, (7, 4)),
    "a file that forces nothing": ({"eos_token_id": 2, "decoder_start_token_id": 2}, {}, (None, None)),
}


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.filterwarnings("ignore")
def test_forced_tokens_are_those_of_transformers(tmp_path, name):
    own, changes, expected = FORCED[name]
    torch_bart(sizes=SMALL).save_pretrained(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text()) | changes
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    (tmp_path / "a/generation_config.json").unlink()
    if own is not None:
        (tmp_path / "a/generation_config.json").write_text(json.dumps(own))
    model = hub.load(tmp_path / "a")
    assert model.forced == expected
    hub.save(model, model.params, tmp_path / "b")
    assert hub.load(tmp_path / "b").forced == expected
    for folder in ("a", "b"):
        found = transformers.BartForConditionalGeneration.from_pretrained(tmp_path / folder).generation_config
        last = found.forced_eos_token_id
        assert (found.forced_bos_token_id, last[0] if isinstance(last, list) else last) == expected


def test_only_a_decoder_beside_an_encoder_is_forced(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"forced_eos_token_id": 3}')
    for family, forced in (("gpt2", (None, None)), ("bart", (None, 3))):
        model = hub.from_config(tiny.config(family), "generation", seed=None)
        assert hub._forced(model, tmp_path) == forced
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config\.json holds a list"):
        hub._forced(model, tmp_path)
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"generation_config\.json is no JSON"):
        hub._forced(model, tmp_path)


# Layout, sites, counts


@pytest.mark.parametrize("task", ["seq2seq", "classification", "encoder"])
def test_sites_name_the_tree(task):
    model = hub.from_config(transformers.BartConfig(**BART | {"decoder_layers": 3}), task, seed=None)
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
    assert [s.heads for s in model.sites if s.kind == "attention"] == [(4, 4, 6)] * 2 + [(2, 2, 12)] * 6
    assert [s.tied for s in model.sites if s.kind == "embedding"] == [task == "seq2seq"]
    stacked = flatten(jax.eval_shape(stack_layers, model.params))
    assert {p.split("/")[2] for p in stacked if "*" in p} == {"layers_*"}
    assert not any(re.search(r"_\d", p) for p in stacked)


def test_counts():
    """The total of bart-base as transformers counts its parameters, and the buffer; bart-large is in test_counts.py."""
    sizes = {"layers": 6, "attention_heads": 12, "ffn_dim": 3072}
    both: Any = {f"{stack}_{k}": v for stack in ("encoder", "decoder") for k, v in sizes.items()}
    small = transformers.BartConfig(d_model=768, **both)
    assert count(hub.from_config(small, "seq2seq", seed=None).params) == 139_420_416 + 50_265


# Generation


def talkative():
    """A torch model that does not say one token only."""
    torch: Any = pytest.importorskip("torch")
    torch_model = torch_bart(seed=1)
    torch_model.final_logits_bias.mul_(0.3)
    with torch.no_grad():
        for path, p in torch_model.named_parameters():
            p.mul_(2 if path.endswith("weight") and "norm" not in path else 1)
    return torch_model


def said(torch_model, batch, n, first, last, eos, **kwargs):
    """What transformers writes with these tokens forced, without the start token."""
    torch: Any = pytest.importorskip("torch")
    generation = torch_model.generation_config
    generation.forced_bos_token_id, generation.forced_eos_token_id = first, last
    batch = {k: torch.tensor(v) for k, v in batch.items()}
    out = torch_model.generate(
        **batch, max_new_tokens=n, do_sample=False, eos_token_id=eos, pad_token_id=1, early_stopping=False, **kwargs
    )
    return out.numpy()[:, 1:]


@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
@pytest.mark.filterwarnings("ignore")
def test_greedy_is_that_of_transformers(tmp_path, forced):
    torch_model, batch = talkative(), {k: v[:5] for k, v in both_sides(9, seed=3).items()}
    endless = said(torch_model, batch, 11, None, None, None)
    assert len({tuple(row) for row in endless.tolist()}) > 3, "the texts depend on the prompts"
    eos = int(np.unique(endless[3])[1])  # so that some row ends
    first, last = (int(endless[0, 0]) + 1, eos) if forced else (None, None)
    want = said(torch_model, batch, 11, first, last, eos)
    model = moved(torch_model, tmp_path)
    assert model.forced == (first, last)
    params = stack_layers(model.params) if forced else model.params
    got = decoder(model, Decoding(11, stop=(eos,)), 1)(params, batch["input_ids"], batch["attention_mask"])
    got = np.asarray(got)
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert (got[:, want.shape[1] :] == 1).all()
    assert len({(row == eos).sum() for row in endless}) > 1
    if forced:
        assert (got[:, 0] == first).all()
        assert (got == eos).any(axis=1).all()
        assert (endless[:, 0] != first).any()


@pytest.mark.parametrize("beams", [3, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_beams_with_forced_tokens_are_those_of_transformers(tmp_path, beams):
    torch_model, batch = talkative(), {k: v[:4] for k, v in both_sides(8, seed=5).items()}
    how = Decoding(8, beams=beams, length_penalty=2.0, no_repeat_ngram=2, stop=(9,))
    search = {"num_beams": beams, "length_penalty": 2.0, "no_repeat_ngram_size": 2}
    free = said(torch_model, batch, 8, None, None, 9, **search)
    want = said(torch_model, batch, 8, 6, 9, 9, **search)
    model = moved(torch_model, tmp_path)
    assert model.forced == (6, 9)
    got = np.asarray(decoder(model, how, 1)(model.params, batch["input_ids"], batch["attention_mask"]))
    np.testing.assert_array_equal(got[:, : want.shape[1]], want)
    assert (got[:, 0] == 6).all()
    assert (got == 9).any(axis=1).all()
    assert (free[:, 0] != 6).all()
    assert len({tuple(row) for row in got.tolist()}) > 1


def test_drawn_and_streamed_texts_are_forced_too():
    config = tiny.config("bart", encoder_layers=1, decoder_layers=1)
    model = hub.from_config(config, "generation")._replace(forced=(5, 6))
    tokenizer = tiny.tokenizer()
    words = tokenizer.convert_ids_to_tokens([5, 6])
    writer, key = Writer(model, tokenizer, Decoding(4, temperature=1.5, top_k=9, top_p=0.9)), jax.random.key(0)
    (text,) = writer.complete(model.params, ["the cat"], key=key)
    assert [text.split()[0], text.split()[-1]] == words
    assert "".join(writer.stream(model.params, "the cat", key=key)) == text
    (one,) = Writer(model, tokenizer, Decoding(1)).complete(model.params, ["the cat"])
    assert one == words[1]  # the last wins, as in transformers


@pytest.mark.parametrize(
    "layout", [stack_layers, pytest.param(lambda p: p, marks=pytest.mark.slow)], ids=["scan", "loop"]
)
def test_cached_equals_uncached(layout, key):
    """With a prefix; without one, what is generated shows it."""
    model = here()
    params = layout(prefix(length=3, std=1.0).init(key, model.params, model.sites))
    batch = {k: jnp.asarray(v[:4]) for k, v in pairs().items() if k != "decoder_attention_mask"}
    batch["decoder_input_ids"] = batch["decoder_input_ids"].at[:, 0].set(2)
    want = ours(model, batch, params=params).logits
    step = fast(lambda params, batch, cache: model.forward(params, batch, cache=cache))
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask")}
    out = step(params, prompt, model.empty_cache(params, 4, 9))
    logits = [out.logits]
    for piece in (slice(1, 4), slice(4, 7)):
        out = step(params, {"decoder_input_ids": batch["decoder_input_ids"][:, piece]}, out.cache)
        logits.append(out.logits)
    assert out.cache.index == 7
    assert_same(jnp.concatenate(logits, axis=1), want)
    assert jnp.abs(want).max() > 0.1


# Methods


def test_a_prompt_has_the_first_positions(tmp_path, key):
    """Against transformers with the vectors among the embedded words, which `scale_embedding` has scaled."""
    torch: Any = pytest.importorskip("torch")
    torch_model = torch_bart(sizes=SMALL, scale_embedding=True)
    model, batch = moved(torch_model, tmp_path), pairs()
    params = prompt(4, start="random", bound=2.0).init(key, model.params, model.sites)
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    vectors = torch.tensor(np.asarray(params["model"]["prompt"].vectors))[None].expand(6, -1, -1)
    with torch.no_grad():
        words = torch.cat([vectors, torch_model.model.shared(inputs.pop("input_ids"))], 1)
        mask = torch.cat([torch.ones(6, 4).long(), inputs.pop("attention_mask")], 1)
        states = torch_model.model.encoder(inputs_embeds=words, attention_mask=mask)
        want = torch_model(encoder_outputs=states, attention_mask=mask, **inputs).logits
    assert_same(ours(model, batch, params=params).logits, want, batch["decoder_attention_mask"] > 0)
    longer = prompt(12).init(key, model.params, model.sites)
    with pytest.raises(ValueError, match="21 tokens, virtual ones included"):
        jax.eval_shape(lambda p: model.forward(p, batch), longer)


@pytest.mark.parametrize("sort", ["self_attn", "encoder_attn"])
@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames past_key_values
def test_mix_and_match_adapters(tmp_path, key, sort):
    """He et al. 2022: in the decoder, against transformers with past keys and values and beside its MLPs.

    The text's positions stay: transformers' would move by the prefix, so its table of them is moved back.
    """
    torch: Any = pytest.importorskip("torch")
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    torch_model, n = torch_bart(), 3
    model, batch = moved(torch_model, tmp_path), pairs()
    batch = {k: v[:3] for k, v in batch.items() if k != "decoder_attention_mask"}
    params = tiny.roughen(mam(n, 5).init(key, model.params, model.sites), 3)
    params = update(params, flatten(model.params))
    flat = flatten(params, is_leaf=is_node)
    kept = {p: x for p, x in flat.items() if not p.endswith("/prefix") or ("decoder" in p and sort in p)}
    params = update({}, kept)
    got, plain = ours(model, batch, params=params).logits, theirs(torch_model, batch).logits.numpy()

    def beside(adapter, inner, outer):
        """Adds an adapter's output to the MLP's, of which `inner` is the first product and `outer` the last."""
        w1, b1, w2, b2 = (torch.tensor(np.asarray(w)) for w in (adapter.w1, adapter.b1, adapter.w2, adapter.b2))
        seen = []
        inner.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        outer.register_forward_hook(lambda _, __, y: y + 4 * (torch.relu(seen.pop() @ w1 + b1) @ w2 + b2))

    for name, stack in (("encoder", torch_model.model.encoder), ("decoder", torch_model.model.decoder)):
        for i, layer in enumerate(stack.layers):
            beside(kept[f"model/{name}/layers_{i}/mlp_output"], layer.fc1, layer.fc2)
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    mask = inputs["attention_mask"]
    with torch.no_grad():
        states = torch_model.model.encoder(inputs["input_ids"], attention_mask=mask)[0]
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for i, layer in enumerate(torch_model.model.decoder.layers):
        node = kept[f"model/decoder/layers_{i}/{sort}/prefix"]
        pair = [torch.tensor(np.asarray(x))[None].expand(3, -1, -1, -1).transpose(1, 2) for x in (node.key, node.value)]
        if sort == "self_attn":
            cache.self_attention_cache.update(*pair, i)
            continue
        attention = layer.encoder_attn
        own = [m(states).view(3, -1, 2, 12).transpose(1, 2) for m in (attention.k_proj, attention.v_proj)]
        cache.cross_attention_cache.update(*(torch.cat(two, 2) for two in zip(pair, own, strict=True)), i)
        cache.is_updated[i] = True
    if sort == "self_attn":
        table = torch_model.model.decoder.embed_positions.weight.data
        table[OFFSET + n :] = table[OFFSET:-n].clone()
    else:
        mask, states = torch.cat([torch.ones(3, n).long(), mask], 1), torch.zeros(3, n + 9, 24)
    with torch.no_grad():
        want = torch_model(
            encoder_outputs=(states,),
            attention_mask=mask,
            decoder_input_ids=inputs["decoder_input_ids"],
            past_key_values=cache,
        ).logits
    assert_same(got, want)
    assert np.abs(np.asarray(got) - plain).max() > 1e-2


def test_hooks_and_targets_of_the_cross_attention(key):
    model, batch = here(sizes=SMALL), pairs()

    @node
    class Double:
        def __call__(self, y, *, x, context):
            assert context.mask.shape == (6, 1, 1, 9)
            return 2 * y

    path = "model/decoder/layers_0/cross_attention_output"
    doubled = ours(model, batch, params=update(model.params, {path: Double()})).logits
    leaves, out = flatten(model.params), "model/decoder/layers_0/encoder_attn/out_proj"
    twice = {f"{out}/{x}": 2 * leaves[f"{out}/{x}"] for x in ("kernel", "bias")}
    assert_same(doubled, ours(model, batch, params=update(model.params, twice)).logits, atol=1e-5)
    one = lora(rank=2, targets=[".*/encoder_attn/[qv]_proj/kernel"]).init(key, model.params, model.sites)
    assert sum(is_node(x) for x in flatten(one, is_leaf=is_node).values()) == 2


@layouts
@pytest.mark.parametrize(
    "method",
    [
        lora(rank=2),
        prefix(3),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (dora(rank=2), prefix(3, mlp=True, hidden=7))),
    ],
    ids=["lora", "prefix", "dora", "prefix-mlp"],
)
def test_bf16_is_not_promoted(method, layout, key):
    model = here(dtype=jnp.bfloat16)
    params = method.init(key, cast(model.params, jnp.bfloat16), model.sites)
    params = method.resolve(layout(params), None)
    batch = {k: jnp.asarray(v) for k, v in pairs().items()}
    closed, out = jax.make_jaxpr(model.forward, return_shape=True)(params, batch)
    assert out.hidden.dtype == jnp.bfloat16
    assert out.logits.dtype == jnp.float32
    dots = [e for e in equations(closed.jaxpr) if e.primitive.name == "dot_general"]
    mixed = [e for e in dots if {v.aval.dtype for v in e.invars} != {jnp.dtype(jnp.bfloat16)}]
    assert len(dots) > 20
    assert not mixed or method.spec[0][0] == "dora"  # its lengths are float32


@pytest.mark.parametrize(
    ("rate", "encoder", "decoder"),
    # a stack's input and what each sub-layer adds; what is drawn inside attention and MLP
    [("dropout", 1 + 2 * 2, 1 + 2 * 3), ("attention_dropout", 2, 2 * 2), ("activation_dropout", 2, 2)],
)
def test_dropout(rate, encoder, decoder, key):
    config = transformers.BartConfig(**BART, **{"dropout": 0.0, rate: 0.5})
    model, batch = hub.from_config(config, "seq2seq"), {k: jnp.asarray(v) for k, v in pairs().items()}
    program = equations(jax.make_jaxpr(model.forward)(model.params, batch, key).jaxpr)
    assert sum(e.primitive.name == "random_bits" for e in program) == encoder + decoder


@pytest.mark.slow
def test_remat_changes_no_gradient_and_the_buffer_has_none():
    model = here()
    batch = {k: jnp.asarray(v) for k, v in pairs().items()}
    results = []
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))

        def loss(params, again=again):
            out: Any = again.forward(params, batch)
            return jnp.square(out.logits).mean()

        results.append(flatten(fast(jax.grad(loss))(model.params)))
    for path, g in results[0].items():
        for other in results[1:]:
            assert_same(other[path], g, atol=1e-5)
    assert not results[0]["final_logits_bias"].any()
    assert all(jnp.abs(g).max() > 0 for p, g in results[0].items() if "k_proj/bias" not in p and "logits" not in p)


# Tasks


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """A tiny BART in a folder, and the data of two tasks."""
    at = tmp_path_factory.mktemp("tiny")
    tiny.folder(at / "bart", "bart")
    for task in ("rte", "e2e"):
        tiny.data(at / task, task)
    return at


def test_the_loss_is_that_of_transformers(at):
    torch: Any = pytest.importorskip("torch")
    problem = tiny.problem(at, "bart", "e2e")
    reference = transformers.BartForConditionalGeneration.from_pretrained(at / "bart").eval()
    batch = next(problem.epoch(0, 8, 0))
    total, weight = fast(lambda p, b: objective(problem)(p, b, None))(problem.model.params, batch)
    labels = torch.tensor(np.where(batch["loss_mask"] > 0, batch["target_ids"], -100)).long()
    inputs = {k: torch.tensor(batch[k]).long() for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want = reference(**inputs, labels=labels).loss
    np.testing.assert_allclose(total / weight, float(want), rtol=1e-4)
    shifted = shift_right(jnp.asarray(batch["target_ids"]), problem.model.family.start_id(problem.model.config))
    theirs = reference.prepare_decoder_input_ids_from_labels(torch.tensor(batch["target_ids"]).long())
    np.testing.assert_array_equal(shifted, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["e2e", "rte"])
def test_every_verb(at, tmp_path, call, task):
    base = ("--model", at / "bart", "--task", task, "--data", at / task)
    quick = ("--steps", "3", "--batch-size", "8", "--buckets", "1")
    adapter = tmp_path / "one/adapter.safetensors"
    for arguments in (
        ("compare", *base, *quick, "--methods", "mam(length=3, size=4), bitfit", "--out", tmp_path / "all"),
        ("train", *base, *quick, "--method", "lora(rank=2)", "--layout", "scan", "--out", tmp_path / "one"),
        ("evaluate", *base, "--adapter", adapter),
        ("merge", "--model", at / "bart", "--adapter", adapter, "--out", tmp_path / "merged"),
    ):
        status, _, err = call(*arguments)
        assert status == 0, err
    head = "ForConditionalGeneration" if task == "e2e" else "ForSequenceClassification"
    merged = getattr(transformers, "Bart" + head).from_pretrained(tmp_path / "merged").eval()
    batch = pairs() if task == "e2e" else ended()
    batch = {k: np.minimum(v, 20) for k, v in batch.items()}
    if task == "rte":  # transformers wants as many ends in each row
        batch["input_ids"][batch["input_ids"] == 3] = 4
        batch["input_ids"][batch["input_ids"] == 2] = 3
    real = batch["decoder_attention_mask"] > 0 if task == "e2e" else ...
    assert_same(ours(hub.load(tmp_path / "merged"), batch).logits, theirs(merged, batch).logits, real)
