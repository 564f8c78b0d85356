"""Greedy generation with a cache: against transformers, against the model without a cache, against the known text."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import STORIES, needs_shared

from peftjax import chain, hub, stack_layers
from peftjax.generate import Decoding, decoder
from peftjax.methods import bitfit, lora, prefix

EOS, PAD, NEW = 3, 0, 12


@pytest.fixture(scope="module")
def model():
    made = hub.from_config(tiny.config("llama", initializer_range=0.5), "causal-lm")
    return made._replace(params=tiny.roughen(made.params))


def prompts(lengths, vocabulary=26, seed=0):
    """Random ids, padded on the left."""
    rng, width = np.random.default_rng(seed), max(lengths)
    ids, mask = np.full((len(lengths), width), PAD, np.int32), np.zeros((len(lengths), width), np.int32)
    for i, n in enumerate(lengths):
        ids[i, width - n :], mask[i, width - n :] = rng.integers(4, vocabulary, n), 1
    return ids, mask


def step_by_step(model, params, ids, mask, eos, new=NEW):
    """Each row alone, no padding, no cache: the argmax over the text so far."""
    out = np.full((len(ids), new), PAD, np.int32)
    forward = jax.jit(lambda ids, mask: model.forward(params, {"input_ids": ids, "attention_mask": mask}).logits)
    width = ids.shape[1] + new
    for row, (tokens, seen) in enumerate(zip(ids, mask, strict=True)):
        text = tokens[seen > 0].tolist()
        for i in range(new):
            filled = np.array([text + [PAD] * (width - len(text))], np.int32)  # padding on the right changes nothing
            there = (np.arange(width) < len(text)).astype(np.int32)[None]
            out[row, i] = int(np.argmax(forward(filled, there)[0, len(text) - 1]))
            text.append(out[row, i])
            if out[row, i] == eos:
                break
    return out


def adapted(name, model):
    m = {"base": None, "prefix": prefix(length=5, std=1.0), "lora": lora(rank=2, targets=["linear"])}
    m["prefix+bitfit"] = chain(prefix(length=2, std=1.0), bitfit(create=True))
    if m[name] is None:
        return model.params
    params = m[name].init(jax.random.key(1), model.params, model.sites)
    mask, moved = m[name].trainable(params), tiny.roughen(params, 4)
    return jax.tree.map(lambda keep, x, y: y if keep else x, mask, params, moved)


@pytest.mark.parametrize("name", ["base", "prefix", "lora", "prefix+bitfit"])
def test_the_cache_changes_nothing(model, name):
    params = adapted(name, model)
    ids, mask = prompts((3, 7, 1, 5))
    free = np.asarray(decoder(model, Decoding(NEW), PAD)(params, ids, mask))
    eos = int(free[0, 4])  # a token that does come up
    got = np.asarray(decoder(model, Decoding(NEW, stop=(eos,)), PAD)(params, ids, mask))
    assert np.array_equal(free, step_by_step(model, params, ids, mask, None))
    assert np.array_equal(got, step_by_step(model, params, ids, mask, eos))
    assert eos in got[0]
    assert np.array_equal(got, decoder(model, Decoding(NEW, stop=(eos,)), PAD)(stack_layers(params), ids, mask))
    if name != "base":
        assert not np.array_equal(free, decoder(model, Decoding(NEW), PAD)(model.params, ids, mask))


def test_a_row_does_not_depend_on_the_others(model):
    ids, mask = prompts((3, 7, 1, 5))
    generate = decoder(model, Decoding(NEW))
    together = np.asarray(generate(model.params, ids, mask))
    for row, n in enumerate((3, 7, 1, 5)):
        alone = generate(model.params, ids[row : row + 1, -n:], mask[row : row + 1, -n:])
        assert np.array_equal(alone[0], together[row])


def test_rows_that_end_are_filled_and_the_loop_stops_when_all_have(model):
    ids, mask = prompts((4, 4))
    ids[1] = ids[0]
    free = np.asarray(decoder(model, Decoding(NEW), PAD)(model.params, ids, mask))[0]
    eos = int(free[2])
    at = free.tolist().index(eos)
    got = np.asarray(decoder(model, Decoding(NEW, stop=(eos,)), 17)(model.params, ids, mask))
    assert (got == [*free[: at + 1], *[17] * (NEW - at - 1)]).all()


def test_one_new_token(model):
    ids, mask = prompts((3, 7))
    one = decoder(model, Decoding(1, stop=(EOS,)), PAD)(model.params, ids, mask)
    assert one.shape == (2, 1)
    assert one.dtype == jnp.int32
    assert np.array_equal(one, step_by_step(model, model.params, ids, mask, EOS, 1))


def test_one_compilation_for_each_shape(model):
    generate: jax.stages.Wrapped = decoder(model, Decoding(2, stop=(EOS,)), PAD)  # pyright: ignore[reportAssignmentType] - it is jitted
    for lengths in ((3, 7), (7, 2), (1, 7)):
        generate(model.params, *prompts(lengths))
    assert generate._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue] - jax has no public counter


def test_what_cannot_generate_is_said(model):
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number, at least 1; got 0"):
        decoder(model, Decoding(0, stop=(EOS,)))
    encoder = hub.from_config(tiny.config("bert"), "encoder")
    with pytest.raises(ValueError, match="a language model; this model's head is 'none'"):
        decoder(encoder, Decoding(3, stop=(EOS,)))
    with pytest.raises(ValueError, match="bert is an encoder and cannot generate"):
        encoder.empty_cache(encoder.params, 1, 8)
    classifier = hub.from_config(tiny.config("llama"), "classification")
    with pytest.raises(ValueError, match="this model's head is 'classification'"):
        decoder(classifier, Decoding(3, stop=(EOS,)))


# Against transformers


def by_transformers(folder, ids, mask, eos, new):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    out = reference.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=eos,
        pad_token_id=PAD,
    )[:, ids.shape[1] :].numpy()
    return np.pad(out, ((0, 0), (0, new - out.shape[1])), constant_values=PAD)


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
@pytest.mark.parametrize("with_eos", [True, False])
def test_a_left_padded_batch_equals_transformers(model, tmp_path, with_eos):
    pytest.importorskip("torch")
    hub.save(model, model.params, tmp_path)
    ids, mask = prompts((3, 8, 1, 5), seed=2)
    free = np.asarray(decoder(model, Decoding(NEW), PAD)(model.params, ids, mask))
    eos = int(free[1, 5]) if with_eos else None
    how = Decoding(NEW, stop=() if eos is None else (eos,))
    got = np.asarray(decoder(model, how, PAD)(model.params, ids, mask))
    assert np.array_equal(got, by_transformers(tmp_path, ids, mask, eos, NEW))
    assert not with_eos or eos in got[1, :-1]


@needs_shared
@pytest.mark.filterwarnings("ignore")
def test_stories260K_equals_transformers_and_the_known_text():
    expected = json.loads((STORIES / "expected.json").read_text())
    known = expected["greedy_from_bos_ids"]
    model, tokenizer = hub.load(STORIES, "causal-lm"), hub.load_tokenizer(STORIES)
    bos = np.array([[known[0]]], np.int32)
    new = len(known) - 1
    got = np.asarray(
        decoder(model, Decoding(new, stop=(tokenizer.eos_token_id,)))(model.params, bos, np.ones_like(bos))
    )
    assert got[0].tolist() == known[1:]
    assert tokenizer.decode(got[0], skip_special_tokens=True).strip() == expected["greedy_text"]
    pytest.importorskip("torch")
    ids, mask = prompts((2, 9, 5), vocabulary=500, seed=3)
    got = np.asarray(decoder(model, Decoding(40, stop=(tokenizer.eos_token_id,)), PAD)(model.params, ids, mask))
    assert np.array_equal(got, by_transformers(STORIES, ids, mask, tokenizer.eos_token_id, 40))
