"""Conversations from rows, the loss on answers only, mixtures of files, NEFTune, and the verb that trains on them."""

import json
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import SHARED, STORIES, needs_shared

from peftjax import chain, data, hub, merge, sft
from peftjax.checkpoint import load_adapter, read_header, save_adapter
from peftjax.cli import main
from peftjax.loop import fit
from peftjax.methods import METHODS, lora, neftune, parse, prefix, prompt
from peftjax.methods.neftune import Noise
from peftjax.problem import objective, prepare
from peftjax.run import Entry, run
from peftjax.tasks import TASKS, Chats
from peftjax.train import Settings
from peftjax.tree import flatten, map_with_path, update

USER, BOT = "user", "assistant"
# Each turn between words, ends of turns after the answers, and a word after the end that no answer says.
MARKED = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}the {% generation %}{{ m.content }} {{ eos_token }}{% endgeneration %} near "
    "{% else %}{{ m.role }} : {{ m.content }} | {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}the {% endif %}"
)
BETWEEN = "\n\n### Input:\n"
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [{"role": USER, "content": "cat ran"}, {"role": BOT, "content": "red dog"}]
LONG_CHAT = [
    {"role": "system", "content": "good"},
    *CHAT,
    {"role": USER, "content": "cat"},
    {"role": BOT, "content": "big"},
]


def row(messages, number=0, file="a.jsonl"):
    asked = max(i for i, turn in enumerate(messages) if turn["role"] == BOT)
    answer = messages[asked]["content"]
    return {
        "messages": messages,
        "prompt": json.dumps(messages[:asked]),
        "answer": answer,
        "file": file,
        "at": f"{file}, line {number}",
    }


def tokenizer(template=UNMARKED):
    out = tiny.tokenizer()
    out.chat_template = template
    return out


def learnt(tokenizer, example):
    return tokenizer.decode([i for i, m in zip(example.input_ids, example.loss_mask, strict=True) if m])


# Conversations


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({"messages": LONG_CHAT}, ["good", "cat ran", "red dog", "cat", "big"]),
        ({"instruction": "a", "input": "b", "output": "c", "id": 3}, ["a\n\nb", "c"]),
        ({"instruction": "a", "input": "", "response": "c"}, ["a", "c"]),
        ({"instruction": "a", "output": "c"}, ["a", "c"]),
        ({"prompt": "a", "completion": "c"}, ["a", "c"]),
        ({"prompt": "a", "answer": "c", "input": "not of this form"}, ["a", "c"]),
    ],
)
def test_forms_of_rows(given, turns):
    assert [turn["content"] for turn in sft.conversation(given)] == turns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"question": "a", "answer": "b"}, "x: the columns are question, answer; expected"),
        ({"instruction": "a"}, "x: the columns are instruction; expected"),
        ({"instruction": "a", "output": " "}, "x: output is ' '; expected a text"),
        ({"instruction": "", "output": "a"}, "x: instruction is ''; expected a text"),
        ({"instruction": "a", "input": 3, "output": "b"}, "x: input is 3; expected a text"),
        ({"messages": []}, "x: no turn is the assistant's"),
        ({"messages": "hello"}, "x: messages are no list of turns"),
        ({"messages": [{"role": BOT}]}, "x: messages are no list of turns"),
        ({"messages": CHAT[:1]}, "x: no turn is the assistant's, so there is nothing to learn"),
        ({"messages": [CHAT[0], {"role": BOT, "content": ""}]}, "x: the content of turn 2 is ''; expected a text"),
        ({"messages": [{"role": USER, "content": None}, CHAT[1]]}, "x: the content of turn 1 is None; expected a text"),
    ],
)
def test_rows_of_no_known_form(given, message):
    with pytest.raises(ValueError, match=message):
        sft.conversation(given, "x")


# The loss on the answers


@pytest.mark.parametrize("template", [UNMARKED, MARKED], ids=["by prefixes", "by marks"])
def test_the_loss_is_on_the_answers_and_their_ends(template):
    t = tokenizer(template)
    one, two = sft.encode(Chats(), [row(CHAT), row(LONG_CHAT)], t, 99).examples
    assert learnt(t, one) == "red dog [SEP]"
    assert learnt(t, two) == "red dog [SEP] big [SEP]"
    assert t.decode(one.input_ids) == "[CLS] [UNK] : cat ran | the red dog [SEP] near"
    for example, turns in ((one, CHAT), (two, LONG_CHAT)):
        whole = t.apply_chat_template(turns, tokenize=True)["input_ids"]
        assert example.input_ids == whole
        assert example.input_ids.count(t.bos_token_id) == 1


def test_an_unknown_word_does_not_end_an_answer():
    t = tokenizer("{% for m in messages %}{{ m.content }} {% endfor %}")
    (example,) = sft.encode(Chats(), [row([CHAT[0], {"role": BOT, "content": "red zebra blue"}])], t, 99).examples
    assert learnt(t, example) == "red [UNK] blue"


def test_what_is_generated_from_is_what_was_trained_on():
    t = tokenizer()
    (example,) = sft.encode(Chats(), [row(LONG_CHAT)], t, 99).examples
    (begin,) = sft.encode(Chats(), [row(LONG_CHAT)], t, 99, for_generation=True).examples
    n = len(begin.input_ids)
    assert example.input_ids[:n] == begin.input_ids
    assert t.decode(example.input_ids[n:]) == "big [SEP] near"
    assert begin.references == ["big"]
    (cut,) = sft.encode(Chats(), [row(LONG_CHAT)], t, 5, for_generation=True).examples
    assert cut.input_ids == begin.input_ids[-5:]


def test_a_template_whose_beginnings_change():
    """Of such a template only marks can tell where the answers stand."""
    changing = "{{ messages | length }} " + UNMARKED
    with pytest.raises(
        ValueError, match=r"conversation in a.jsonl, line 7 up to turn 3 otherwise than as the beginning"
    ):
        sft.encode(Chats(), [row(LONG_CHAT, 7)], tokenizer(changing), 99)
    t = tokenizer("{{ messages | length }} " + MARKED)
    (example,) = sft.encode(Chats(), [row(LONG_CHAT)], t, 99).examples
    assert learnt(t, example) == "red dog [SEP] big [SEP]"


def test_templates_that_cannot_be():
    with pytest.raises(ValueError, match="no chat template; write --chat-template alpaca, plain, or a F"):
        sft.encode(Chats(), [row(CHAT)], tiny.tokenizer(), 99)
    with pytest.raises(ValueError, match=r"refuses the conversation in a.jsonl, line 3: roles must alternate"):
        sft.encode(Chats(), [row(CHAT, 3)], tokenizer("{{ raise_exception('roles must alternate') }}"), 99)
    with pytest.raises(ValueError, match="refuses the conversation"):
        sft.encode(Chats(), [row(CHAT)], tokenizer("{% for %}"), 99)
    with pytest.raises(ValueError, match="there is no chat template 'alpacca'; write alpaca, plain or a file"):
        sft.template("alpacca")
    endless = tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no end-of-text token"):
        sft.encode(Chats(), [row(CHAT)], endless, 99)


def test_an_answer_that_begins_within_a_token_is_said():
    end = "{% if not add_generation_prompt %} {{ eos_token }}{% endif %}"
    t = tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}" + end)
    encoded = sft.encode(Chats(), [row([{"role": USER, "content": "ca"}, {"role": BOT, "content": "t dog"}])], t, 99)
    assert learnt(t, encoded.examples[0]) == "cat dog [SEP]"
    assert encoded.notes == ("1 answers begin within a token, which counts as theirs",)


@pytest.mark.parametrize("long", ["cut", "drop"])
def test_conversations_that_are_too_long(long):
    t = tokenizer()
    chats = [row(CHAT), row(LONG_CHAT), row([{"role": USER, "content": "cat " * 20}, CHAT[1]])]
    lengths = [len(e.input_ids) for e in sft.encode(Chats(), chats, t, 99).examples]
    encoded = sft.encode(Chats(long=long), chats, t, lengths[0] + 1)
    kept = [learnt(t, e) for e in encoded.examples]
    if long == "cut":
        assert kept == ["red dog [SEP]", "red"]
        assert encoded.truncated == 2
        assert encoded.notes == (f"1 of 3 left out, without an answer in their first {lengths[0] + 1} tokens",)
    else:
        assert kept == ["red dog [SEP]"]
        assert encoded.truncated == 0
        assert encoded.notes == (f"2 of 3 left out, longer than {lengths[0] + 1} tokens",)
    assert encoded.longest == max(lengths)
    with pytest.raises(ValueError, match=f"no answer fits into 3 tokens; the shortest conversation has {min(lengths)}"):
        sft.encode(Chats(long=long), chats, t, 3)


@needs_shared
@pytest.mark.parametrize("name", sft.TEMPLATES)
@pytest.mark.parametrize("model", ["tiny-books", str(STORIES)], ids=["tiny-books", "stories260K"])
def test_built_in_templates_on_real_tokenizers(model, name):
    """No answer begins within a token, BOS comes once, and what is learnt reads as the answer and the end."""
    t = hub.load_tokenizer(model)
    t.chat_template = sft.template(name)
    rows = sft.rows(Chats(), f"{SHARED}/data/instruct/gpteacher_roleplay.jsonl", "dev")[:20]
    twice = [row([*r["messages"], *r["messages"]], i, r["file"]) for i, r in enumerate(rows)]
    encoded = sft.encode(Chats(), [*rows, *twice], t, 10_000)
    assert encoded.notes == ()
    for r, example in zip([*rows, *rows], encoded.examples, strict=True):
        assert example.input_ids.count(t.bos_token_id) == 1
        answer = r["answer"].strip()
        said = learnt(t, example)
        assert said.replace(" ", "") in [(answer + t.eos_token).replace(" ", "") * n for n in (1, 2)]


@needs_shared
def test_alpacas_prompt_is_that_of_a_data_set_written_out_in_it():
    lines = (SHARED / "data/instruct/dolly_sample.jsonl").read_text().splitlines()
    t = hub.load_tokenizer("tiny-books")
    t.chat_template = sft.template("alpaca")
    for line in lines[:20]:
        written = json.loads(line)["prompt"]
        asked, _, extra = (
            written.partition("### Instruction:\n")[2].removesuffix("\n\n### Response:").partition(BETWEEN)
        )
        turns = sft.conversation({"instruction": asked, "input": extra, "output": "x"})[:1]
        ours = t.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert ours == t.bos_token + written + "\n"


# Files


def files(at, **sizes):
    at.mkdir(parents=True, exist_ok=True)
    for name, n in sizes.items():
        lines = [{"instruction": f"cat {i}", "output": f"{name} red {'dog ' * (i % 5)}"} for i in range(n)]
        tiny.write_rows(at / f"{name}.jsonl", lines)
    return {name: str(at / f"{name}.jsonl") for name in sizes}


def test_the_held_out_share_is_of_every_file_and_never_trained_on(tmp_path):
    f = files(tmp_path, a=40, b=10)
    source, chats = f"{f['a']},{f['b']}", Chats(holdout=0.2)
    train, dev = sft.rows(chats, source, "train"), sft.rows(chats, source, "dev")
    assert (len(train), len(dev)) == (40, 10)
    assert [r["file"] for r in dev] == [f["a"]] * 8 + [f["b"]] * 2
    assert not {r["at"] for r in train} & {r["at"] for r in dev}
    assert sft.rows(chats, source, "train") == train
    assert {r["file"] for r in train[:20]} == set(f.values())
    assert len(sft.rows(Chats(holdout=0.2, cap=5), source, "train")) == 8


def test_shares(tmp_path):
    f = files(tmp_path, a=42, b=11, c=21)

    def taken(source, **chats):
        rows = sft.rows(Chats(**chats), source, "train")
        return {name: sum(r["file"] == path for r in rows) for name, path in f.items()}, rows

    counts, rows = taken(f"{f['a']},{f['b']}=0.5")  # 39 and 10 to train on
    assert counts == {"a": 24, "b": 24, "c": 0}
    each = {at: sum(r["at"] == at for r in rows) for at in {r["at"] for r in rows if r["file"] == f["b"]}}
    assert sorted(each.values()) == [2] * 6 + [3] * 4, "none comes a third time before all came twice"
    assert taken(f"{f['a']}=3,{f['b']}=1")[0] == {"a": 37, "b": 12, "c": 0}
    assert taken(f"{f['a']},{f['b']}=0.5,{f['c']}")[0] == {"a": 23, "b": 34, "c": 11}
    notes = sft.encode(Chats(), rows, tokenizer(), 99).notes
    assert notes == (f"24 of {f['a']}, 24 of {f['b']} (10 different)",)


@pytest.mark.parametrize(
    ("source", "chats", "message"),
    [
        ("", {}, "sft needs files; write --data FILE.jsonl"),
        ("none.jsonl", {}, "there is no file none.jsonl; write FILE.jsonl"),
        ("none.jsonl=0.3", {}, "there is no file none.jsonl; write"),
        ("{a}=lots", {}, "cannot read the share 'lots'"),
        ("{a}=0", {}, "must be above 0; got 0"),
        ("{a},{a}", {}, "is named twice"),
        ("{a}=1,{b}", {}, "the shares of --data sum to 1 and leave nothing"),
        ("{a}", {"holdout": 0}, "holdout is the share of rows held out, between 0 and 1; got 0"),
        ("{a}", {"holdout": 0.99}, "holdout 0.99 leaves no row"),
        ("{a}", {"cap": 1}, "cap must be at least 2 rows"),
        ("{a}", {"long": "no"}, "long must be 'cut' or 'drop'"),
        ("{one}", {}, "has one row, and one is held out"),
    ],
)
def test_sources_that_cannot_be(tmp_path, source, chats, message):
    with pytest.raises((ValueError, OSError), match=message):
        sft.rows(Chats(**chats), source.format(**files(tmp_path, a=6, b=6, one=1)), "train")


# NEFTune


def drawn(shapes):
    rng = np.random.default_rng(0)
    return map_with_path(lambda _, x: jnp.asarray(0.3 * rng.normal(size=x.shape) + 0.1, jnp.float32), shapes)


def noise(ids, segments, key, alpha=5.0, d=8):
    y = jnp.zeros((*ids.shape, d))
    return np.asarray(Noise(key, alpha)(y, x=ids, context=jnp.asarray(segments)))


def test_noise_has_the_papers_bound_and_variance(key):
    """Uniform in ±α/sqrt(L d): variance α²/(3 L d), for each text by its own length; none on padding."""
    segments = np.array([[1] * 50 + [2] * 20 + [0] * 10, [1] * 80])
    e = noise(np.zeros_like(segments), segments, key, alpha=7.0, d=400)
    for where, length in (((0, slice(50)), 50), ((0, slice(50, 70)), 20), ((1, slice(80)), 80)):
        bound = 7 / np.sqrt(length * 400)
        assert 0.99 * bound < np.abs(e[where]).max() <= bound
        np.testing.assert_allclose(e[where].var(), 7**2 / (3 * length * 400), rtol=0.05)
        assert abs(e[where].mean()) < 5 * bound / np.sqrt(3 * e[where].size)
    assert not e[0, 70:].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", pytest.param("t5", marks=pytest.mark.slow)])
def test_noise_is_added_to_what_is_looked_up(family, key):
    """The model with noise is the model whose table has it, one row a token; evaluating there is none."""
    model = hub.from_config(tiny.config(family), "encoder" if family == "bert" else "generation", seed=None)
    model = model._replace(params=drawn(model.params))
    params = neftune(alpha=9).init(key, model.params, model.sites)
    (path,) = [p for p in flatten(params, is_leaf=lambda x: isinstance(x, Noise)) if p.endswith("/output")]
    ids, mask = jnp.arange(4, 10)[None], jnp.asarray([[1, 1, 1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    batch |= {"decoder_input_ids": ids[:, :1]} if family == "t5" else {}

    @jax.jit
    def out(params):
        x = model.forward(params, batch).hidden
        return x if family == "t5" else x[:, :4]

    method = neftune(alpha=9)
    plain, quiet = out(model.params), out(method.resolve(params, None))
    assert np.array_equal(plain, quiet)
    loud = [out(method.resolve(params, jax.random.key(i))) for i in (0, 1, 0)]
    assert np.array_equal(loud[0], loud[2])
    assert min(float(jnp.abs(a - b).max()) for a, b in pairwise([plain, *loud])) > 1e-3
    if family == "t5":  # its decoder looks up in the same table
        return
    resolved = method.resolve(params, jax.random.key(0))
    at = path.removesuffix("/output")
    table = flatten(model.params)[f"{at}/embedding"]
    node = flatten(resolved, is_leaf=lambda x: isinstance(x, Noise))[path]
    e = jax.random.uniform(node.key, (1, 6, 16), minval=-1, maxval=1) * 9 / np.sqrt(4 * 16) * mask[..., None]
    by_hand = update(model.params, {f"{at}/embedding": table.at[ids[0]].add(e[0])})  # each id is there once
    np.testing.assert_allclose(out(by_hand), loud[0], atol=1e-5)


def test_padding_of_a_decoder_beside_an_encoder_is_not_its_text(tmp_path, key, monkeypatch):
    problem, lengths = tiny.problem(tmp_path, "t5", "e2e"), []
    method, add = neftune(), Noise.__call__

    def record(self, y, *, x, context):
        lengths.append(np.asarray(context).sum(1).tolist())
        return add(self, y, x=x, context=context)

    monkeypatch.setattr(Noise, "__call__", record)
    params = method.resolve(method.init(key, problem.model.params, problem.model.sites), key)
    examples = problem.train[:3]
    (batch,) = data.batches(examples, 4, problem.buckets[-1:], pad_id=0)
    total, weight = objective(problem)(params, batch, None)
    assert np.isfinite(total)  # with a filler row
    assert weight == sum(len(e.target_ids or ()) for e in examples)
    assert lengths[0][:3] == [len(e.input_ids) for e in examples]
    assert lengths[1][:3] == [len(e.target_ids or ()) for e in examples]


def test_neftune_trains_merges_and_is_saved_beside_another_method(tmp_path):
    model = hub.from_config(tiny.config("llama"), "causal-lm", seed=None)
    model = model._replace(params=drawn(model.params))
    method = chain(lora(rank=2), neftune(alpha=5), prompt(2))
    batch = {"input_ids": jnp.arange(4, 16).reshape(2, 6), "attention_mask": jnp.ones((2, 6), int)}

    def loss(params, batch, key):
        logits = model.forward(params, batch, key).logits
        return -jax.nn.log_softmax(logits)[..., 5].sum(), jnp.float32(12)

    settings = Settings(steps=4, batch_size=2, learning_rate=1e-2, warmup=0.5)
    params = method.init(jax.random.key(0), model.params, model.sites)
    fitted = fit(params, method, loss, lambda n: iter([batch]), 1, settings)
    quiet = float(jax.jit(loss)(method.resolve(params, None), batch, None)[0]) / 12
    losses = [r["loss"] for r in fitted.history]
    assert abs(losses[0] - quiet) > 1e-4
    assert abs(losses[1] - losses[0]) > 1e-4, "the rate of the first step is 0: what differs is the noise"
    save_adapter(tmp_path / "a", model, method, fitted.params)
    loaded = load_adapter(tmp_path / "a", model)
    forward = jax.jit(model.forward)
    there = forward(method.resolve(fitted.params, None), batch).logits
    assert np.array_equal(forward(loaded.params, batch).logits, there)
    assert [name for name, _ in loaded.method.spec] == ["lora", "neftune", "prompt"]
    params = chain(lora(rank=2), neftune()).init(jax.random.key(0), model.params, model.sites)
    assert tiny.same(jax.tree.map(jnp.shape, merge(params)), jax.tree.map(jnp.shape, model.params))


def test_neftune_alone_trains_nothing():
    model = hub.from_config(tiny.config("gpt2"), "causal-lm", seed=None)
    model = model._replace(params=drawn(model.params))
    for method in (neftune(), *parse("neftune").values()):
        params = method.init(jax.random.key(0), model.params, model.sites)
        with pytest.raises(
            ValueError, match="neftune trains nothing by itself; chain it with a method that does, such a"
        ):
            fit(params, method, lambda *_: (0.0, 0.0), lambda n: iter([{}]), 1, Settings())
    with pytest.raises(ValueError, match="alpha must be a number above 0"):
        neftune(alpha=0)
    assert "neftune" in METHODS


# The verb


def call(capsys, *args):
    try:
        main([str(a) for a in args])
        status = 0
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("verb", [("sft", "--data"), ("generate", "--chat", "--prompt"), ("chat", "--system")])
def test_a_missing_chat_template_is_said_before_the_weights_are_read(tmp_path, capsys, monkeypatch, verb):
    model, f = tiny.folder(tmp_path / "model", "llama"), files(tmp_path / "data", a=4)
    monkeypatch.setattr(hub, "load", lambda *a, **k: pytest.fail("the weights are read"))
    status, _, err = call(capsys, *verb, f["a"], "--model", model)
    assert (status, err.count("\n")) == (1, 1)
    assert "has no chat template" in err


def test_the_verb_trains_resumes_and_its_adapter_works_elsewhere(tmp_path, capsys):
    model, f = tiny.folder(tmp_path / "model", "llama"), files(tmp_path / "data", a=30, b=10)
    source = f"{f['a']},{f['b']}=0.4"
    (tmp_path / "words.jinja").write_text(UNMARKED)
    common = ["--model", model, "--data", source]
    train = ["sft", *common, "--method", "lora(rank=2)+neftune", "--pack", "--holdout", "0.2", "--batch-size", "4"]
    train += ["--max-new-tokens", "4", "--out", tmp_path / "out", "--epochs", "2"]
    status, _, err = call(capsys, *train)
    assert status == 1
    assert "the tokenizer has no chat template; write --chat-template alpaca" in err
    train += ["--chat-template", tmp_path / "words.jinja"]
    status, out, err = call(capsys, *train)
    assert status == 0, err
    assert "training texts packed into" in out
    assert "(8 different)" in out
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["scores"].keys() == {"loss"}
    assert result["config"]["packed"] == 64
    assert len(result["samples"]) == 5
    assert call(capsys, *train)[0] == 0, "what is done comes back"
    adapter = tmp_path / "out/adapter.safetensors"
    extra = read_header(adapter)["extra"]
    assert (extra["chat_template"], extra["chats"]["holdout"]) == (UNMARKED, 0.2)
    status, out, err = call(capsys, "evaluate", *common, "--task", "sft", "--adapter", adapter)
    assert status == 0, err
    assert out.splitlines()[-1] == f"loss {result['scores']['loss']:.4g}"
    say = ["generate", "--model", model, "--chat", "--prompt", "the cat", "--max-new-tokens", "4"]
    status, out, err = call(capsys, *say, "--adapter", adapter)
    assert status == 0, err
    assert call(capsys, *say, "--adapter", adapter, "--chat-template", tmp_path / "words.jinja")[1] == out
    assert "has no chat template" in call(capsys, *say)[2]
    assert call(capsys, "merge", "--model", model, "--adapter", adapter, "--out", tmp_path / "merged")[0] == 0
    assert hub.load_tokenizer(tmp_path / "merged").chat_template == UNMARKED


@pytest.mark.slow
def test_compare_takes_conversations_too(tmp_path, capsys):
    model, f = tiny.folder(tmp_path / "model", "gpt2"), files(tmp_path / "data", a=20)
    args = ["--model", model, "--task", "sft", "--data", f["a"], "--chat-template", "plain", "--pack", "--epochs", "1"]
    status, _, err = call(capsys, "compare", *args, "--methods", "lora", "--out", tmp_path / "out")
    assert status == 0, err
    lines = (tmp_path / "out/results.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["zero-shot", "lora"]


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    model, f = tiny.folder(tmp_path / "model", "t5"), files(tmp_path / "data", a=20)
    args = ["sft", "--model", model, "--data", f["a"], "--chat-template", "plain", "--out", tmp_path / "out"]
    status, _, err = call(capsys, *args)
    assert status == 1
    assert "sft is for decoders" in err


@pytest.fixture(scope="module")
def shared_problem():
    where = SHARED / "data/instruct"
    task = TASKS["sft"]._replace(chats=Chats(cap=60), new_tokens=4)
    source = f"{where}/dolly_sample.jsonl,{where}/gpteacher_roleplay.jsonl=0.5"
    return prepare("tiny-books", task, source, chat_template=sft.template("plain"), pack=True, max_length=128)


def test_a_chat_template_where_there_are_no_conversations():
    with pytest.raises(ValueError, match="a chat template is for conversations; e2e has prompts of its own"):
        prepare("no-such-model", "e2e", "no-such-folder", chat_template=UNMARKED)


@needs_shared
def test_shared_instructions_fit_the_bundled_base(shared_problem):
    problem = shared_problem
    assert problem.packed == 128
    lengths = [len(e.input_ids) for e in problem.train]
    rows = data.pack(lengths, 128)
    assert sum(lengths) / (len(rows) * 128) > 0.85


@needs_shared
@pytest.mark.slow
def test_shared_instructions_train_the_bundled_base(shared_problem, tmp_path):
    settings = Settings(steps=3, batch_size=4, learning_rate=1e-2, warmup=0.0)
    result = run(shared_problem, Entry("lora", chain(lora(), prefix(2))), settings, tmp_path)
    first = next(r["loss"] for r in result["history"] if "loss" in r)
    assert 0 < result["scores"]["loss"] < first + 0.5
