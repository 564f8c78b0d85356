"""Sampling, beams, n-grams, streams and the verbs: against transformers, and against searches without a cache."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny
from conftest import STORIES, needs_shared
from test_generate import prompts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peftjax import chain, chat, compare as comparison, hub, stack_layers
from peftjax.generate import (
    E2E_OF_LORA,
    Decoding,
    Writer,
    _read_last,
    _start,
    _written,
    check,
    complete,
    decoder,
    narrowed,
    padding_side,
    without_repeats,
)
from peftjax.methods import prefix, prompt
from peftjax.problem import Evaluator
from peftjax.proxy import proxy
from peftjax.run import configuration

PAD, FAMILIES = 0, ("gpt2", "llama", "t5")


def one_layer(family):
    return {"num_layers": 1} if family == "t5" else {"num_hidden_layers": 1}


def random_model(family, roughened=2, **changes):
    spread = {} if family == "t5" else {"initializer_range": 0.5}
    model = hub.from_config(tiny.config(family, **spread, **changes), "generation")
    for seed in range(12 if family == "t5" else roughened):  # else T5 would say one token only
        model = model._replace(params=tiny.roughen(model.params, seed))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model here and in transformers."""
    pytest.importorskip("torch")
    return both(random_model(request.param, **one_layer(request.param)), tmp_path_factory.mktemp(request.param))


def both(model, folder):
    import transformers

    hub.save(model, model.params, folder)
    cls = {
        "GPT2LMHeadModel": transformers.GPT2LMHeadModel,
        "LlamaForCausalLM": transformers.LlamaForCausalLM,
        "T5ForConditionalGeneration": transformers.T5ForConditionalGeneration,
    }[model.hf_config.architectures[0]]
    return model, cls.from_pretrained(folder).eval()


def cut(rows, stop):
    """What stands after the stop token is filling, of which transformers has its own."""
    rows = np.asarray(rows).tolist()
    return [row[: next((i + 1 for i, t in enumerate(row) if t in stop), len(row))] for row in rows]


def theirs(reference, ids, mask, how):
    torch = pytest.importorskip("torch")

    out = reference.generate(
        torch.tensor(ids, dtype=torch.long),
        attention_mask=torch.tensor(mask),
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        num_beams=how.beams,
        length_penalty=how.length_penalty,
        no_repeat_ngram_size=how.no_repeat_ngram,
        early_stopping=False,
        eos_token_id=list(how.stop) or None,
        pad_token_id=PAD,
    )
    return cut(out[:, 1 if reference.config.is_encoder_decoder else ids.shape[1] :].numpy(), how.stop)


def assert_as_transformers(pair, how, seed):
    model, reference = pair
    ids, mask = prompts((3, 8, 1, 5), seed=seed)
    got = cut(decoder(model, how, PAD)(model.params, ids, mask), how.stop)
    assert got == theirs(reference, ids, mask, how)
    return got


# The search


BEAMS = {
    "gpt2": (
        Decoding(12, beams=4, length_penalty=0.8, no_repeat_ngram=2, stop=(3, 5)),
        Decoding(10, beams=5, length_penalty=0.0, no_repeat_ngram=3, stop=(3, 7)),
    ),
    "llama": (
        Decoding(9, beams=2, length_penalty=2.0, no_repeat_ngram=1, stop=(3,)),
        Decoding(12, beams=3, length_penalty=-1.0, stop=(6, 9)),
    ),
    "t5": (
        Decoding(12, beams=2, no_repeat_ngram=2, stop=(3, 5)),
        Decoding(9, beams=4, length_penalty=2.0, stop=(3,)),
    ),
}


@pytest.mark.filterwarnings("ignore")  # of torch and transformers
def test_beams_equal_transformers(pair):
    first, second = BEAMS[pair[0].family.name]
    got = assert_as_transformers(pair, first, seed=1)
    longer = assert_as_transformers(pair, second, seed=2)
    assert len({len(row) for row in got + longer}) > 2, "some end early, some do not"


@pytest.mark.filterwarnings("ignore")
def test_greedy_without_repeats_and_with_two_stop_tokens_equals_transformers(pair):
    n = 1 if pair[0].family.name == "llama" else 2
    assert_as_transformers(pair, Decoding(12, no_repeat_ngram=n, stop=(3, 5)), seed=n)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(25))
def test_any_beams_equal_transformers(pair, seed):
    rng = np.random.default_rng(seed)
    stop = tuple(rng.choice(np.arange(3, 26), rng.integers(1, 4), replace=False).tolist())
    beams, penalty = int(rng.integers(2, 8)), float(rng.choice([-1, 0, 0.5, 0.8, 1, 2]))
    how = Decoding(int(rng.integers(1, 20)), 0.0, None, 1.0, beams, penalty, int(rng.integers(0, 5)), stop)
    assert_as_transformers(pair, how, seed)


@needs_shared
@pytest.mark.filterwarnings("ignore")
def test_beams_of_stories260K_equal_transformers():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    model = hub.load(STORIES, "causal-lm")
    ids, mask = prompts((2, 9, 5), vocabulary=500, seed=3)
    how = E2E_OF_LORA._replace(max_new_tokens=30, beams=4, stop=(hub.load_tokenizer(STORIES).eos_token_id, 403))
    reference = transformers.LlamaForCausalLM.from_pretrained(STORIES).eval()
    got = cut(decoder(model, how, PAD)(model.params, ids, mask), how.stop)
    assert got == theirs(reference, ids, mask, how)
    assert len({tuple(row) for row in got}) == 3


def searched(logprobs, new, beams, penalty, stop):
    """The search in numpy for one text: `logprobs` of a list of tokens written so far, no cache, no batch."""
    live, done, hopeful = [(0.0, [])], [], True
    for n in range(1, new + 1):
        found = [(s + p, [*text, t]) for s, text in live for t, p in enumerate(logprobs(text))]
        found = sorted(found, key=lambda x: -x[0])[: (1 + len(stop)) * beams]
        over = [n == new or text[-1] in stop for _, text in found]
        done += [(s / n**penalty, text) for (s, text), o in list(zip(found, over, strict=True))[:beams] if o]
        done = sorted(done, key=lambda x: -x[0])[:beams]
        live = [f for f, o in zip(found, over, strict=True) if not o][:beams]
        hopeful = bool(live) and (len(done) < beams or live[0][0] / n**penalty > done[-1][0])
        if not hopeful:
            break
    return done[0][1]


def batch_of(model, lengths, seed):
    ids, mask = prompts(lengths, seed=seed)
    if padding_side(model) == "right":
        ids, mask = (np.stack([np.roll(r, n) for r, n in zip(x, lengths, strict=True)]) for x in (ids, mask))
    return ids, mask


def with_methods(model):
    method = chain(prompt(3, start="random"), prefix(2, std=0.5))
    return method.resolve(method.init(jax.random.key(1), model.params, model.sites), None)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_beams_see_prompts_and_prefixes(family):
    model = random_model(family)
    params = with_methods(model)
    how = Decoding(5, beams=3, length_penalty=0.8, stop=(3, 7))
    ids, mask = batch_of(model, (3, 6), seed=4)
    got = cut(decoder(model, how, PAD)(stack_layers(params), ids, mask), how.stop)
    for row, tokens, seen in zip(got, ids, mask, strict=True):
        assert row == searched(uncached(model, params, tokens[seen > 0], 5), 5, 3, 0.8, how.stop)


def test_beams_of_a_proxy():
    three = [random_model("llama", roughened=n, num_hidden_layers=1) for n in (1, 2, 3)]
    model, params = proxy(*three, alpha=0.7), tuple(m.params for m in three)
    how = Decoding(4, beams=3, stop=(3,))
    ids, mask = prompts((3, 6), seed=5)
    got = cut(decoder(model, how, PAD)(params, ids, mask), how.stop)
    for row, tokens, seen in zip(got, ids, mask, strict=True):
        assert row == searched(uncached(model, params, tokens[seen > 0], 4), 4, 3, 1.0, how.stop)


def uncached(model, params, text, new):
    """(written tokens) -> log-probabilities of the next, by a forward over all of the text, padded on the right."""
    text, encodes = np.asarray(text).tolist(), model.family.start_id is not None
    forward = jax.jit(lambda params, batch: jax.nn.log_softmax(model.forward(params, batch).logits))

    def logprobs(written):
        read = [model.family.start_id(model.config), *written] if encodes else [*text, *written]
        width = 1 + new if encodes else len(text) + new
        filled, there = np.zeros((1, width), np.int32), (np.arange(width) < len(read)).astype(np.int32)[None]
        filled[0, : len(read)] = read
        batch = {"input_ids": filled, "attention_mask": there}
        if encodes:
            batch = {"input_ids": np.array([text]), "decoder_input_ids": filled}
        return np.asarray(forward(params, batch)[0, len(read) - 1])

    return logprobs


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "prompt+prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family, adapted):
    model = random_model(family)
    params = with_methods(model) if adapted else model.params
    ids, mask = batch_of(model, (3, 6), seed=6)
    logits, text = jax.jit(lambda p, x, m: _start(model, p, x, m, 5, PAD))(params, ids, mask)
    step, written = jax.jit(lambda p, t: _read_last(model, p, t)), []
    whole = [uncached(model, params, row[seen > 0], 5) for row, seen in zip(ids, mask, strict=True)]
    for i in range(5):
        for row, of in enumerate(whole):
            want = of([w[row] for w in written])
            np.testing.assert_allclose(jax.nn.log_softmax(logits[row]), want, atol=1e-4)
        written.append([4 + i, 9 - i])
        if i < 4:
            logits, text = step(params, _written(text, jnp.array(written[-1], jnp.int32)))


def test_repeats_are_those_of_transformers():
    torch: Any = pytest.importorskip("torch")
    from transformers import NoRepeatNGramLogitsProcessor

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, (64, 12))
    scores = rng.normal(size=(64, 6)).astype(np.float32)
    for n in (1, 2, 3, 4):
        run = jax.jit(lambda s, t, length, n=n: without_repeats(s, t, length, n))
        for length in (1, 2, 3, 7, 12):
            want = NoRepeatNGramLogitsProcessor(n)(torch.tensor(tokens[:, :length]), torch.tensor(scores))
            np.testing.assert_array_equal(run(scores, tokens, jnp.int32(length)), want.numpy())
    assert without_repeats(scores, tokens[:, :3], jnp.int32(3), 4) is scores


# Drawing


def test_the_tokens_to_draw_from_are_those_of_transformers():
    torch: Any = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 3 * np.random.default_rng(1).normal(size=(300, 40)).astype(np.float32)
    for temperature, k, p in ((0.7, 10, 0.9), (1.0, None, 0.5), (2.0, 3, 1.0), (1.0, 99, 0.99), (0.5, None, 1e-4)):
        scores = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
        scores = scores if k is None else TopKLogitsWarper(k)(None, scores)
        scores = TopPLogitsWarper(p)(None, scores) if p < 1 else scores
        got = narrowed(jnp.asarray(logits), Decoding(temperature=temperature, top_k=k, top_p=p))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(scores.numpy()))
        np.testing.assert_allclose(got, scores.numpy(), rtol=1e-6)


@pytest.fixture(scope="module")
def llama():
    return random_model("llama", roughened=1, num_hidden_layers=1)


def test_draws_follow_the_softmax(llama):
    """The second token, which has a cache before it, given the first: chi-square over 4,000 draws."""
    how = Decoding(2, temperature=2.0, top_k=20, top_p=0.9)
    ids, mask = np.tile([[5, 9, 7]], (4000, 1)), np.ones((4000, 3), np.int32)
    drawn = np.asarray(decoder(llama, how)(llama.params, ids, mask, jax.random.key(0)))
    logprobs = uncached(llama, llama.params, [5, 9, 7], 2)
    common = np.bincount(drawn[:, 0]).argmax()
    for got, before in ((drawn[:, 0], []), (drawn[drawn[:, 0] == common, 1], [int(common)])):
        p = np.asarray(jax.nn.softmax(narrowed(jnp.asarray(logprobs(before)), how)), np.float64)
        seen = np.bincount(got, minlength=len(p))
        assert seen[p == 0].sum() == 0
        assert len(got) > 300
        assert scipy.stats.chisquare(seen[p > 0], len(got) * p[p > 0] / p.sum()).pvalue > 0.01
        assert scipy.stats.chisquare(seen[p > 0]).pvalue < 1e-6, "the draws are not uniform"


def test_a_row_with_its_key_does_not_depend_on_the_batch(llama):
    ids, mask = prompts((3, 7, 1, 5))
    how = Decoding(6, temperature=1.0, stop=(3,))
    run, keys = decoder(llama, how), jax.random.split(jax.random.key(3), 4)
    together = np.asarray(run(llama.params, ids, mask, keys))
    order = np.array([2, 0, 3, 1])
    shuffled = np.asarray(run(llama.params, ids[order], mask[order], keys[order]))
    np.testing.assert_array_equal(shuffled, together[order])
    same = np.asarray(run(llama.params, ids[[1] * 4], mask[[1] * 4], jax.random.key(3)))
    assert len({tuple(row) for row in same.tolist()}) == 4, "one key gives every row draws of its own"
    with pytest.raises(ValueError, match=r"drawing tokens needs a key; write key=jax\.random\.key"):
        run(llama.params, ids, mask)
    with pytest.raises(ValueError, match=r"one for each of the 4 rows; got key<fry>\(3,\)"):
        run(llama.params, ids, mask, keys[:3])


# Texts


def test_texts_do_not_depend_on_what_stands_beside_them_and_streams_equal_them(llama):
    tokenizer, words = tiny.tokenizer(), tiny.WORDS
    asked = ["cat", "dog sat ran", " ".join(words[:9]), " ".join(words[:18]), "red blue"]
    writer, key = Writer(llama, tokenizer, Decoding(9, temperature=1.5, stop=(3,))), jax.random.key(5)
    texts = writer.complete(llama.params, asked, key=key, batch_size=2)
    assert len(set(texts)) == 5
    for i, (text, words_) in enumerate(zip(texts, asked, strict=True)):
        pieces = list(writer.stream(llama.params, words_, key=jax.random.fold_in(key, i)[None]))
        assert "".join(pieces) == text
        assert len(pieces) > 2 or len(text.split()) < 3
    for run in (writer._decode, writer._first, writer._next):  # texts of at most 16 and of at most 24 tokens
        assert run._cache_size() == 2  # pyright: ignore[reportFunctionMemberAccess] - jax has no public counter
    (text,) = writer.complete(llama.params, [asked[1]], key=key)
    assert text != texts[1], "prompt 0 draws by another key"
    assert "".join(writer.stream(llama.params, asked[1], key=key)) == text
    word = text.split()[2]
    assert writer.complete(llama.params, [asked[1]], key=key, until=["x", word]) == [text[: text.index(word)]]
    assert "".join(writer.stream(llama.params, asked[1], key=key, until=[word])) == text[: text.index(word)]
    assert writer.complete(llama.params, []) == []


def test_texts_after_an_encoder():
    model, tokenizer = random_model("t5", num_layers=1), tiny.tokenizer()
    how, ids = Decoding(7, stop=(3,)), np.array([tokenizer("cat sat")["input_ids"]])
    row = cut(decoder(model, how)(model.params, ids, np.ones_like(ids)), how.stop)[0]
    text = tokenizer.decode(row, skip_special_tokens=True)
    assert complete(model, model.params, tokenizer, ["cat sat", "dog in the place"], how)[0] == text
    assert len(text.split()) > 2
    with pytest.raises(ValueError, match="3 beams are known at the end only"):
        Writer(model, tokenizer, how._replace(beams=3)).stream(model.params, "cat")


def streamed(monkeypatch, tokenizer, ids, until=()):
    model = random_model("llama", vocab_size=300)
    writer = Writer(model, tokenizer, Decoding(len(ids)))
    monkeypatch.setattr(writer, "_first", lambda *_: ([ids[0]], 0))
    monkeypatch.setattr(writer, "_next", lambda params, i, keys, number: ([ids[i + 1]], i + 1))
    return list(writer.stream(model.params, [5], until=until))


def test_pieces_are_whole_characters_and_not_what_may_end_the_text(monkeypatch):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    import transformers

    byte = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    ids = byte("aü 😀b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 9
    assert streamed(monkeypatch, byte, ids) == ["a", "ü", " ", "😀", "b"]
    assert streamed(monkeypatch, byte, ids[:3] + ids[:1]) == ["a", "ü", "a"]
    assert "".join(streamed(monkeypatch, byte, ids[:2])) == "a\ufffd"
    ids = byte("one\n\ttwo\n\nQ: x", add_special_tokens=False)["input_ids"]
    pieces = streamed(monkeypatch, byte, ids, until=["\n\nQ:", "\nA"])
    assert "".join(pieces) == "one\n\ttwo"
    assert "\n\t" in pieces, "the line end waits for what comes after it"


def test_what_cannot_be_written_is_refused(llama):
    tokenizer = tiny.tokenizer()
    writer = Writer(llama, tokenizer, Decoding(40, stop=(3,)))
    assert writer.room(llama.params) == 24
    params = prompt(10).init(jax.random.key(0), llama.params, llama.sites)
    assert writer.room(params) == 14
    with pytest.raises(ValueError, match="prompt 1 has 31 tokens; with 40 new ones the model has room for 24"):
        writer.complete(llama.params, ["cat", "cat " * 30])
    with pytest.raises(ValueError, match="the prompt has 25 tokens"):
        writer.stream(llama.params, "cat " * 24)
    with pytest.raises(ValueError, match="the prompt has the token 99, and the model has 26"):
        writer.stream(llama.params, [99])
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        writer.complete(llama.params, [[]])
    for until in ("stop", [""]):
        with pytest.raises(ValueError, match="a list of texts, none of them empty"):
            writer.complete(llama.params, ["cat"], until=until)
    with pytest.raises(ValueError, match=r"the stop tokens \[26\] are not among the 26"):
        decoder(llama, Decoding(stop=(3, 26)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1; got 0"),
        ({"beams": 0}, "beams must be a whole number, at least 1"),
        ({"top_k": 0, "temperature": 1.0}, "top_k must be a whole number, at least 1"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram must be a whole number, at least 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* or above; got -0.1"),
        ({"temperature": float("nan")}, "got nan"),
        ({"top_p": 0.0, "temperature": 1.0}, "top_p must be above 0 and at most 1; got 0"),
        ({"top_p": 1.1, "temperature": 1.0}, "got 1.1"),
        ({"length_penalty": float("inf"), "beams": 2}, "length_penalty must be a finite number"),
        ({"beams": 2, "temperature": 1.0}, "2 beams are followed by probability, not drawn"),
        ({"top_p": 0.5}, "are for drawing; give a temperature too"),
        ({"length_penalty": 0.5}, "ranks beams, and there is one"),
    ],
)
def test_a_decoding_that_means_nothing_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        check(Decoding(**changes))


# Scores


def test_generation_tasks_are_scored_by_the_decoding(tmp_path):
    plain = tiny.problem(tmp_path, "llama", "e2e")
    assert "decoding" not in configuration(plain, None, None)
    assert tiny.problem(tmp_path, "llama", "e2e", decoding=Decoding(5, stop=(3,))).decoding is None
    how = Decoding(beams=3, length_penalty=0.8, no_repeat_ngram=4)
    problem = tiny.problem(tmp_path, "llama", "e2e", decoding=how)
    config = configuration(problem, None, None)
    assert config.pop("decoding") == {"beams": 3, "length_penalty": 0.8, "no_repeat_ngram": 4}
    assert config == configuration(plain, None, None)
    got = Evaluator(problem).generate(problem.model.params)
    how = how._replace(max_new_tokens=problem.max_new_tokens, stop=(3,))
    texts = complete(
        problem.model, problem.model.params, problem.tokenizer, [e.input_ids for e in problem.prompts], how
    )
    assert got == [text.strip() for text in texts]
    assert got != Evaluator(plain).generate(plain.model.params)
    with pytest.raises(ValueError, match="beams and n-grams are for generated texts, and rte is a classification task"):
        tiny.problem(tmp_path, "llama", "rte", decoding=how)
    with pytest.raises(ValueError, match="scores are of texts that are not drawn"):
        tiny.problem(tmp_path, "llama", "e2e", decoding=Decoding(temperature=1.0))


# The verbs


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    at = tmp_path_factory.mktemp("decoding")
    for family in ("llama", "t5"):
        tiny.folder(at / family, family, **one_layer(family))
    (at / "chat.jinja").write_text("{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} || {% endfor %}")
    return at


@pytest.mark.parametrize(
    ("family", "changes"), [("t5", {}), ("llama", {"beams": 3, "no_repeat_ngram": 2})], ids=["t5", "llama-beams"]
)
def test_generate(family, changes, at, call):
    """Lines of standard input, empty ones aside, give what `complete` writes."""
    model, tokenizer = hub.load(at / family, "generation"), hub.load_tokenizer(at / family)
    want = complete(model, model.params, tokenizer, ["cat sat", "dog in the place"], Decoding(6, stop=(3,), **changes))
    flags = [x for k, v in changes.items() for x in (f"--{k.replace('_', '-')}", v)]
    got = call("generate", "--model", at / family, "--max-new-tokens", 6, *flags, said="cat sat\n\ndog in the place")
    assert got == (0, "".join(f"{text}\n" for text in want), "")


def test_generate_by_a_chat_template_and_what_is_wrong(at, call):
    few = ("generate", "--model", at / "llama", "--max-new-tokens", 6)
    model, tokenizer = hub.load(at / "llama", "generation"), hub.load_tokenizer(at / "llama")
    ids = tokenizer("user : cat sat || ", add_special_tokens=False)["input_ids"]
    (want,) = complete(model, model.params, tokenizer, [ids], Decoding(6, stop=(3,)))
    assert call(*few, "--chat", "--chat-template", at / "chat.jinja", "--prompt", "cat sat")[1] == want + "\n"
    status, _, said = call(*few, "--chat", "--prompt", "cat")
    assert status == 1
    assert "has no chat template" in said
    assert "--chat-template alpaca" in said
    assert said.count("\n") == 1
    assert "write --chat too" in call(*few, "--chat-template", "plain", "--prompt", "cat")[2]
    status, _, said = call(*few, "--prompt", "cat " * 80)
    assert (status, said.count("\n")) == (1, 1)
    assert "the prompt has 81 tokens; with 6 new ones the model has room for 58" in said


def test_a_conversation(at, call):
    few = ("chat", "--model", at / "llama", "--max-new-tokens", 6, "--chat-template", at / "chat.jinja")
    lines = ["cat sat", "", "dog ran", "/reset", "cat sat", "red " * 70]
    status, out, said = call(*few, said="\n".join(lines))
    assert status == 0
    answers = out.split("\n")
    assert len(answers) == 4
    assert answers[0] == answers[2], "after /reset it is a new conversation"
    model, tokenizer = hub.load(at / "llama", "generation"), hub.load_tokenizer(at / "llama")
    talk = f"user : cat sat || assistant : {answers[0]} || user : dog ran || "
    ids = tokenizer(talk, add_special_tokens=False)["input_ids"]
    assert [answers[1]] == complete(model, model.params, tokenizer, [ids], Decoding(6, stop=(3,)))
    assert "the conversation begins anew" in said
    assert "error: this message is too long" in said


def test_the_oldest_turns_are_forgotten(at):
    how = Decoding(4, temperature=1.0)
    writer, params = chat.load(str(at / "llama"), None, how)
    template, notes = (at / "chat.jinja").read_text(), []
    lines = iter(["red " * 20, "blue " * 20, "cat " * 20, "/exit", "cat"])
    talk: dict[str, Any] = {"read": lambda: next(lines), "write": str, "note": notes.append}
    kept = chat.converse(writer, params, template, system="good", key=jax.random.key(0), **talk)
    assert next(lines) == "cat"
    assert [m["role"] for m in kept] == ["system", "user", "assistant", "user", "assistant"]
    assert kept[1]["content"].startswith("blue")
    assert notes == ["the 2 oldest messages no longer fit into the model's positions and are forgotten"]
    with pytest.raises(ValueError, match="does not take these messages"):
        chat.converse(writer, params, "{{ messages[0].", read=lambda: None, write=str, note=str)


@pytest.mark.parametrize("verb", ["evaluate", "train", "compare"])
def test_scores_by_beams_from_the_command_line(verb, at, call, monkeypatch):
    seen: list[dict] = []

    def prepared(*args, **options):
        seen.append(options)
        raise ValueError("far enough")

    monkeypatch.setattr(comparison, "prepare", prepared)
    base = (verb, "--model", at / "llama", "--task", "e2e", "--data", at)
    out = () if verb == "evaluate" else ("--out", at / "out")
    status, _, said = call(*base, *out, "--beams", 3, "--length-penalty", 0.8, "--no-repeat-ngram", 4)
    assert (status, said) == (1, "error: far enough\n")
    assert seen[0]["decoding"] == Decoding(beams=3, length_penalty=0.8, no_repeat_ngram=4)
    monkeypatch.undo()
    status, _, said = call(*base, *out, "--length-penalty", 0.8)
    assert status == 1
    assert "ranks beams" in said
