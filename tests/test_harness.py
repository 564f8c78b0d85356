"""lm-eval on models here, offline: likelihoods, windows and texts against transformers, and whole tasks by the verb."""

import functools
import json
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import transformers

pytest.importorskip("lm_eval")

from lm_eval.api.registry import get_model

from peftjax import cli, generate, harness, hub
from peftjax.checkpoint import save_adapter
from peftjax.harness import PeftjaxLM
from peftjax.likelihood import Likelihood
from peftjax.methods import lora
from peftjax.tree import combine, partition

torch = pytest.importorskip("torch")

WORDS = tiny.WORDS[:12]
OPTIONS = ["cat", "dog sat ran", "the red cat"]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    """Two tiny models, and two tasks for lm-eval."""
    at = tmp_path_factory.mktemp("harness")
    for family in ("llama", "t5"):
        tiny.folder(at / family, family, seed=2)  # the T5 of other seeds writes special tokens only
    return at


def _requests(*arguments) -> list:
    return [SimpleNamespace(args=each) for each in arguments]


@functools.cache
def _torch(folder):
    cls = transformers.T5ForConditionalGeneration if "t5" in str(folder) else transformers.AutoModelForCausalLM
    return cls.from_pretrained(folder).eval()


def _plain(folder, context: list[int], target: list[int]) -> tuple[float, bool]:
    """log p of the target and whether it is greedy, of one pair of ids, by transformers."""
    if "t5" in str(folder):
        inputs = {"input_ids": torch.tensor([context]), "decoder_input_ids": torch.tensor([[0, *target[:-1]]])}
    else:
        inputs = {"input_ids": torch.tensor([[*context, *target][:-1]])}
    with torch.no_grad():
        logits = _torch(folder)(**inputs).logits[0, -len(target) :]
    chosen = torch.log_softmax(logits, -1)[range(len(target)), target]
    return chosen.sum().item(), logits.argmax(-1).tolist() == target


def _ids(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_likelihoods_are_those_of_transformers(at, family):
    """With a blank at the end of the context, without a context, and with one that is longer than the model."""
    pairs = [("the cat ", "sat"), ("the cat", " sat ran"), ("", "red big"), ("the cat " * 40, " ran")]
    lm, seen = PeftjaxLM(str(at / family), batch_size=2), []
    for context, target in pairs:
        if family == "t5":
            seen.append(([2, *_ids(context), 3] if context else [2], _ids(target)))
        else:
            whole = [2, *_ids(context), *_ids(target)]
            n = len(_ids(target))
            seen.append((whole[:-n][-(65 - n) :], whole[-n:]))
    expected = [_plain(at / family, *each) for each in seen]
    got = lm.loglikelihood(_requests(*pairs), disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in got], [x for x, _ in expected], rtol=1e-4, atol=1e-4)
    assert [x for _, x in got] == [x for _, x in expected]


def test_a_long_document_is_read_in_windows(at):
    """As lm-eval's docstring has it: every token once, and the last window with the context that fits."""
    words = "cat dog sat ran red blue big small good bad".split()  # noqa: SIM905 - reads better than a list
    t = _ids(" ".join(words))
    windows = [([2], t[:4]), ([t[3]], t[4:8]), (t[5:8], t[8:10])]
    expected = sum(_plain(at / "llama", *window)[0] for window in windows)
    lm = PeftjaxLM(str(at / "llama"), max_length=4)
    short = _plain(at / "llama", [2], t[:2])[0]
    got = lm.loglikelihood_rolling(_requests((" ".join(words),), (" ".join(words[:2]),), ("",)))
    assert got == pytest.approx([expected, short, 0], abs=1e-3)


def _greedy(folder, prompt: str, new: int) -> list[int]:
    encodes = "t5" in str(folder)
    ids = torch.tensor([[2, *_ids(prompt), 3] if encodes else [2, *_ids(prompt)]])
    with torch.no_grad():
        out = _torch(folder).generate(ids, do_sample=False, max_new_tokens=new, min_new_tokens=0)
    return out[0, 1 if encodes else ids.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_texts_are_those_of_transformers_up_to_what_ends_them(at, family):
    lm = PeftjaxLM(str(at / family))
    prompts = ["the cat sat", "red big dog", "is name : place", "|| ran", "small bad good blue"]
    full = [tiny.tokenizer().decode(_greedy(at / family, p, 6), skip_special_tokens=True) for p in prompts]
    plain = {"until": [], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0}
    got = lm.generate_until(_requests(*((p, plain) for p in prompts)))
    assert [x.strip() for x in got] == [x.strip() for x in full]
    i = max(range(5), key=lambda i: len(full[i].split()))
    end = full[i].split()[-1]
    cut = lm.generate_until(_requests((prompts[i], plain | {"until": end}), (prompts[i - 1], plain)))
    assert cut == [got[i][: got[i].index(end)], got[i - 1]]


def test_texts_begin_with_one_bos_and_a_decoding_compiles_once(at, monkeypatch):
    lm, made, read = PeftjaxLM(str(at / "llama")), [], []
    lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chat = lm.apply_chat_template([{"role": "user", "content": "cat dog"}])

    def decoder(model, how, pad_id):
        made.append(how)

        def decode(params, ids, mask, key=None):
            read.extend(row[on > 0].tolist() for row, on in zip(ids, mask, strict=True))
            return np.full((len(ids), how.max_new_tokens), 3)

        return decode

    monkeypatch.setattr(generate, "decoder", decoder)
    monkeypatch.setattr(harness, "CHUNK", 1)
    lm.generate_until(_requests(*((text, {"until": [], "max_gen_toks": 4}) for text in ("cat dog", chat))))
    assert read == [[2, *_ids("cat dog")]] * 2
    assert len(made) == 1


def test_what_a_task_asks_of_the_decoding_is_passed_on(at, monkeypatch):
    lm, asked = PeftjaxLM(str(at / "llama")), []

    def record(writer, params, prompts, **rest):
        asked.append((writer.how, prompts, rest))
        return ["" for _ in prompts]

    monkeypatch.setattr(harness.Writer, "complete", record)
    drawn = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "until": ["a"], "max_gen_toks": 4}
    lm.generate_until(_requests(("the cat " * 40, drawn), ("dog", {"temperature": 0.7, "do_sample": False})))
    (hot, (long,), rest), (cold, _, _) = asked
    assert (hot.temperature, hot.top_p, hot.top_k, hot.max_new_tokens, hot.stop) == (0.7, 0.9, 5, 4, (3,))
    assert rest["until"] == ("a",)
    assert long == [2, *_ids("the cat " * 40)[-59:]]  # 64 positions less the 4 new tokens, BOS among them
    assert (cold.temperature, cold.max_new_tokens) == (0, 32)
    with pytest.raises(ValueError, match=r"generation_kwargs \['colour'\] are not known"):
        lm.generate_until(_requests(("dog", {"colour": 1})))
    with pytest.raises(ValueError, match="64 new tokens leave no room for a prompt in the 64 positions"):
        lm.generate_until(_requests(("dog", {"max_gen_toks": 64})))


def test_adapters_and_quantised_bases_are_scored_as_they_are(at, tmp_path, key):
    context, target = "the cat", " sat ran"
    base, method = hub.load(at / "llama", "generation"), lora(rank=2)
    params = method.init(key, base.params, base.sites)
    trained, frozen = partition(params, method.trainable(params))
    params = combine(tiny.roughen(trained), frozen)
    save_adapter(tmp_path / "adapter", base, method, params)
    hub.save(base, params, tmp_path / "merged")
    coded = hub.load(at / "llama", "generation", quantize="int8")
    hub.save(coded, coded.params, tmp_path / "int8")
    plain = {
        name: _plain(at_, [2, *_ids(context)], _ids(target))[0]
        for name, at_ in (("base", at / "llama"), ("adapter", tmp_path / "merged"), ("int8", tmp_path / "int8"))
    }
    assert len({round(x, 4) for x in plain.values()}) == 3
    for name, way in (("adapter", {"adapter": tmp_path / "adapter"}), ("int8", {"quantize": "int8"})):
        lm = PeftjaxLM(str(at / "llama"), **way)
        got = lm.loglikelihood(_requests((context, target)), disable_tqdm=True)[0][0]
        assert got == pytest.approx(plain[name], abs=1e-4), name


def test_an_adapter_of_conversations_is_asked_in_their_template(at, tmp_path, key):
    """The BOS token that the template writes is not put before it again."""
    base, method = hub.load(at / "llama", "generation"), lora(rank=2)
    params = method.init(key, base.params, base.sites)
    turn = "{{ bos_token }}{% for m in messages %}name : {{ m.content }}{% endfor %} ||"
    save_adapter(tmp_path / "adapter", base, method, params, {"chat_template": turn})
    lm = PeftjaxLM(str(at / "llama"), adapter=tmp_path / "adapter")
    text = lm.apply_chat_template([{"role": "user", "content": "the cat sat"}])
    assert text == "[CLS]name : the cat sat ||"
    (got,) = lm.generate_until(_requests((text, {"until": [], "max_gen_toks": 6})))
    want = tiny.tokenizer().decode(_greedy(at / "llama", "name : the cat sat ||", 6), skip_special_tokens=True)
    assert got.strip() == want.strip()
    with pytest.raises(ValueError, match="has a chat template; leave out --chat"):
        PeftjaxLM(str(at / "llama")).apply_chat_template([{"role": "user", "content": "cat"}])


def test_lm_eval_finds_the_class_by_its_name(at):
    lm = get_model("peftjax").create_from_arg_string(f"model={at / 'llama'},seed=3", {"batch_size": 4, "device": None})
    kept = [harness._digest(x) for x in (lm, PeftjaxLM(str(at / "llama")), PeftjaxLM(str(at / "llama")))]
    assert kept[0] != kept[1] == kept[2]  # another seed draws other texts
    assert isinstance(lm, PeftjaxLM)
    assert (lm.batch_size, lm.max_length, lm.prefix_token_id, lm.eot_token_id) == (4, 64, 2, 3)
    with pytest.raises(ValueError, match=r"takes no \['colour'\]"):
        PeftjaxLM(str(at / "llama"), colour=1)


def _task(folder, name: str, kind: str, rows: list[dict], more: str) -> None:
    tiny.write_rows(folder / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\noutput_type: {kind}\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  cache_dir: {folder}/cache\n  data_files:\n    test: {folder}/{name}.jsonl\n"
        f'doc_to_text: "{{{{question}}}}"\n{more}'
    )


def test_whole_tasks_by_the_verb(at, tmp_path, capsys, monkeypatch):
    """The numbers of the table, computed one answer at a time by transformers; then again from what was kept."""
    rng = np.random.default_rng(0)
    rows = [{"question": " ".join(rng.choice(WORDS, 3)), "options": OPTIONS, "gold": i % 3} for i in range(9)]
    logprobs = [[_plain(at / "llama", [2, *_ids(r["question"])], _ids(o))[0] for o in OPTIONS] for r in rows]
    gold = np.array([r["gold"] for r in rows])
    acc = (np.argmax(logprobs, 1) == gold).mean()
    norm = (np.argmax(np.array(logprobs) / [len(o) for o in OPTIONS], 1) == gold).mean()
    assert acc != norm
    _task(
        tmp_path,
        "tiny_choice",
        "multiple_choice",
        rows,
        ('doc_to_choice: "{{options}}"\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n  - metric: acc_norm\n'),
    )
    decode = tiny.tokenizer().decode
    texts = [decode(_greedy(at / "llama", r["question"], 4), skip_special_tokens=True) for r in rows[:4]]
    asked = [
        {"question": r["question"], "answer": t if i else "none"}
        for i, (r, t) in enumerate(zip(rows[:4], texts, strict=True))
    ]
    _task(
        tmp_path,
        "tiny_text",
        "generate_until",
        asked,
        (
            'doc_to_target: "{{answer}}"\ngeneration_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 4\n'
            "metric_list:\n  - metric: exact_match\n"
        ),
    )
    manager = harness.find_tasks(["tiny_choice", "tiny_text"], tmp_path)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: manager)  # it takes seconds
    command = ["lm-eval", "--tasks", "tiny_choice,tiny_text", "--model", str(at / "llama"), "--include", str(tmp_path)]
    command += ["--out", str(tmp_path / "out")]
    cli.main(command)
    assert "|tiny_text" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert results["tiny_choice"]["acc,none"] == pytest.approx(acc)
    assert results["tiny_choice"]["acc_norm,none"] == pytest.approx(norm)
    assert results["tiny_text"]["exact_match,none"] == pytest.approx(3 / 4)
    table = (tmp_path / "out/table.md").read_text()
    assert len((tmp_path / "out/samples_tiny_choice.jsonl").read_text().splitlines()) == 9
    monkeypatch.setattr(Likelihood, "__call__", lambda *a: pytest.fail("asked again"))
    monkeypatch.setattr(harness.Writer, "complete", lambda *a, **k: pytest.fail("asked again"))
    cli.main(command)
    assert (tmp_path / "out/table.md").read_text() == table
    with pytest.raises(ValueError, match=r"lm-eval has no task \['hellaswagg'\]; `lm_eval ls tasks` lists them"):
        harness.find_tasks(["tiny_text", "hellaswagg"])


def test_an_adapter_of_conversations_brings_its_chat_template(at, tmp_path, key):
    model = hub.load(at / "llama", "generation")
    params = lora(rank=2).init(key, model.params, model.sites)
    for name, extra in (("chat", {"chat_template": "{{ messages[0].content }}!"}), ("plain", {})):
        save_adapter(tmp_path / name, model, lora(rank=2), params, extra)
    lm = PeftjaxLM(str(at / "llama"), tmp_path / "chat")
    assert lm.apply_chat_template([{"role": "user", "content": "cat"}]) == "cat!"
    lm = PeftjaxLM(str(at / "llama"), tmp_path / "plain")
    manager: Any = None  # what is wrong is said before a task is looked at
    with pytest.raises(ValueError, match="has no chat template; leave out --chat, or give an --adapter"):
        harness.run_tasks(lm, ["tiny_text"], manager, tmp_path / "out", chat=True)


def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    def error(*arguments):
        with pytest.raises(SystemExit):
            cli.main(["lm-eval", "--out", str(tmp_path / "out"), *arguments])
        return capsys.readouterr().err.strip()

    assert "nowhere is no folder" in error("--tasks", "piqa", "--include", "nowhere")
    for name in [m for m in sys.modules if m.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "peftjax.harness")
    monkeypatch.delattr("peftjax.harness")
    assert re.fullmatch(
        r"error: this needs the package lm-eval .*; run: pip install 'peftjax\[lm-eval\]'", error("--tasks", "piqa")
    )
