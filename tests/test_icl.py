"""In-context learning beside fine-tuning: what is shown, how answers are ranked, what it costs, what stays on disk."""

import dataclasses
import json
import math
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from conftest import SHARED, needs_shared

from peftjax import costs, hub, icl_report, methods
from peftjax.checkpoint import read_header, save_adapter
from peftjax.cli import main
from peftjax.demonstrations import SELECTIONS, Bench, FewShot, Item, join, select, wording
from peftjax.generate import Decoding, complete
from peftjax.icl import Scorer, calibrated, icl, interval_of, scores
from peftjax.likelihood import Likelihood
from peftjax.problem import objective, prepare
from peftjax.tasks import Task, get_task
from peftjax.templates import TEMPLATES, Rendered, Template
from peftjax.train import Settings, make_optimizer, make_step, start

WORDS = Template("words", "{{ sentence }} is", "{{ label }}", "good ||| bad", {"label": {0: "bad", 1: "good"}})
QUICK = Settings(steps=3, batch_size=8, learning_rate=1e-2)


@pytest.fixture(autouse=True)
def _template(monkeypatch):
    """The tiny tokenizer knows few words; the template's choices are not in the labels' order on purpose."""
    monkeypatch.setitem(TEMPLATES, "sst2", (WORDS, *TEMPLATES["sst2"]))


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    at = tmp_path_factory.mktemp("icl")
    for family in ("llama", "t5"):
        tiny.folder(at / family, family)
    for task in ("sst2", "e2e"):
        tiny.data(at / task, task)
    return at


def run(at, out, family="llama", task="sst2", said=None, **changes):
    """Runs the comparison; gives the rows by (method, shots, seed)."""
    how = changes.pop("how", FewShot(shots=(0, 2), batch_size=4))
    options = {"rates": {}, "settings": QUICK, "say": (lambda _: None) if said is None else said.append} | changes
    icl(str(at / family), task, str(at / task), how=how, out=out, max_buckets=1, **options)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {(r["method"], r["shots"], r["seed"]): r for r in rows}


# Selection

TEXTS = ["red cat red", "blue dog", "the red dog ran far", "small cat", "the blue cat sat near the dog", "fox"]
QUERIES = ["the red cat", "a dog ran", "nothing known", "cat cat dog"]


def bm25(query, texts, k1=1.5, b=0.75):
    """Robertson's formula with Lucene's idf, written out."""
    documents = [t.split() for t in texts]
    mean, scores = np.mean([len(d) for d in documents]), []
    for d in documents:
        total = 0.0
        for word in query.split():
            df = sum(word in other for other in documents)
            if df:
                idf = math.log(1 + (len(documents) - df + 0.5) / (df + 0.5))
                tf = d.count(word)
                total += idf * tf / (tf + k1 * (1 - b + b * len(d) / mean))
        scores.append(total)
    return scores


def test_bm25_is_the_formula_the_nearest_last_and_of_equals_the_earlier():
    for query, chosen in zip(QUERIES, select("bm25", TEXTS, ["x"] * 6, QUERIES, 3, seed=1), strict=True):
        scores = bm25(query, TEXTS)
        order = sorted(range(len(TEXTS)), key=lambda i: (-round(scores[i], 6), i))
        assert chosen == tuple(order[:3][::-1])


def test_random_is_one_set_for_all_queries_nested_and_of_the_seed():
    sets = {seed: select("random", TEXTS, ["x"] * 6, QUERIES, 4, seed) for seed in range(6)}
    for seed, found in sets.items():
        assert len(set(found)) == 1
        assert len(set(found[0])) == 4
        assert select("random", TEXTS, ["x"] * 6, QUERIES, 2, seed)[0] == found[0][:2]
        assert select("random", TEXTS, ["x"] * 6, QUERIES, 4, seed) == found
    assert len({found[0] for found in sets.values()}) > 3
    assert {i for found in sets.values() for i in found[0]} == set(range(6))


@pytest.mark.parametrize("shots", [2, 4, 5])
def test_balanced_counts_each_answer_alike_in_any_order(shots):
    answers = ["b", "a", "a", "a", "a", "b", "a", "b"]
    sets = [select("balanced", ["t"] * 8, answers, ["q"], shots, seed)[0] for seed in range(20)]
    for chosen in sets:
        assert len(set(chosen)) == shots
        counts = Counter(answers[i] for i in chosen)
        assert max(counts.values()) - min(counts.values()) == shots % 2
    assert {answers[chosen[0]] for chosen in sets} == {"a", "b"}
    if shots % 2:
        assert len({Counter(answers[i] for i in chosen)["a"] for chosen in sets}) == 2  # the odd one is drawn


def test_select_refuses_what_is_not_there():
    assert select("random", TEXTS, ["x"] * 6, QUERIES, 0) == [()] * 4
    with pytest.raises(ValueError, match="7 shots need as many training rows; there are 6"):
        select("random", TEXTS, ["x"] * 6, QUERIES, 7)
    with pytest.raises(ValueError, match="no selection 'nearest'; there are random, balanced, bm25"):
        select("nearest", TEXTS, ["x"] * 6, QUERIES, 1)
    with pytest.raises(ValueError, match="4 balanced shots need 2 training rows with the answer 'b'; there are 1"):
        select("balanced", ["t"] * 4, ["a", "a", "a", "b"], ["q"], 4)
    assert SELECTIONS == ("random", "balanced", "bm25")


def test_a_test_row_is_never_shown(at, tmp_path):
    """Every test sentence is in training too, where BM25 would find it first; six rows are left."""
    folder = tmp_path / "sst2"
    dev = tiny.rows("sst2", 4, 1)
    folder.mkdir()
    tiny.write_rows(folder / "dev.jsonl", dev)
    tiny.write_rows(folder / "train.jsonl", [*tiny.rows("sst2", 6, 0), *dev])
    how = FewShot(shots=(7,), select="bm25")
    with pytest.raises(ValueError, match="7 shots need as many training rows; there are 6"):
        icl(str(at / "llama"), "sst2", str(folder), how=how, out=tmp_path, rates={}, settings=QUICK)


# Words


def test_the_choices_are_in_the_order_of_the_labels_and_a_text_is_a_label_too():
    name, words = wording(get_task("sst2"))
    assert name == "words"
    assert words({"sentence": "red cat", "label": 1}) == Rendered("red cat is", "good", ("bad", "good"))
    assert words({"sentence": "red cat", "label": "1"}).target == "good"


def test_a_generation_task_has_its_own_words(monkeypatch):
    monkeypatch.delitem(TEMPLATES, "e2e", raising=False)
    row = {"mr": "name[cat], area[near]", "ref": "the cat"}
    assert wording(get_task("e2e"))[1](row) == Rendered("name : cat | area : near ||", "the cat")


def test_templates_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("e2e:\n  target: '{{ ref }}'\n  templates:\n    told: 'Tell: {{ mr }}'\n    short: '{{ mr }} ='\n")
    row = {"mr": "name[cat]", "ref": "the cat"}
    assert wording(get_task("e2e"), None, file)[1](row) == Rendered("Tell: name[cat]", "the cat")
    assert wording(get_task("e2e"), "short", file)[1](row) == Rendered("name[cat] =", "the cat")
    assert wording(get_task("sst2"), None, file)[0] == wording(get_task("sst2"))[0]
    with pytest.raises(ValueError, match="e2e has no template 'attributes'; it has told, short"):
        wording(get_task("e2e"), "attributes", file)


@pytest.mark.parametrize(
    ("task", "name", "message"),
    [
        (get_task("sst2"), "sonnet", "sst2 has no template 'sonnet'; it has words, review"),
        (get_task("sst2")._replace(name="qa"), None, "no template for task 'qa'"),
    ],
)
def test_no_such_template(task, name, message):
    with pytest.raises(ValueError, match=message):
        wording(task, name)


# Calibration


def test_calibration_by_hand():
    """p = (0.6, 0.4); after the content-free inputs (0.9, 0.1) and (0.7, 0.3), in the mean (0.8, 0.2)."""
    scaled = np.exp(calibrated(np.log([0.3, 0.2]), np.log([[0.09, 0.01], [0.14, 0.06]])))  # only the ratios matter
    np.testing.assert_allclose(scaled, [0.6 / 0.8, 0.4 / 0.2], rtol=1e-6)


def test_calibration_survives_likelihoods_that_underflow():
    found = calibrated(np.array([-2000.0, -3000.0]), np.array([[-1000.0, -4000.0]] * 3))
    np.testing.assert_allclose(found, [0.0, -1000.0 + 3000.0], rtol=1e-6)


# Costs


def test_break_even():
    assert costs.break_even(900.0, 10.0, 7.0) == 300.0
    assert costs.break_even(900.0, 7.0, 7.0) is None
    assert costs.break_even(900.0, 7.0, 10.0) is None


def line(method, shots, score, flops, seconds, trained=None):
    spent = {"training_flops": None, "training_seconds": None} if trained is None else trained
    own = {"method": method, "shots": shots, "trained": trained is not None, "scores": {"accuracy": score}}
    return own | {"interval": (score - 5, score + 5), "prompt_tokens": 9.0, "flops": flops, "seconds": seconds} | spent


def test_the_report_compares_with_the_best_number_of_shots(tmp_path):
    lora = line("lora", 0, 80.0, 2e9, 0.02, {"training_flops": 6e12, "training_seconds": 30.0})
    lines = [line("base", 0, 70.0, 2e9, 0.01), line("base", 2, 65.0, 4e9, 0.01), line("base", 4, 60.0, 8e9, 0.05), lora]
    assert icl_report.best_shots(lines) is lines[1]
    cells = icl_report.cells(lora, lines[1])
    assert (cells["pays after, by FLOP"], cells["by time"]) == ("3,000", "never")  # 6e12 / (4e9 - 2e9)
    assert icl_report.cells(lora, lines[2])["by time"] == "1,000"
    assert "lora is better than 2 shots (accuracy 80.0 against 65.0); it is cheaper after 3,000" in icl_report.verdict(
        lines
    )
    icl_report.write(lines, "title", ["a fact"], tmp_path)
    report = (tmp_path / "report.md").read_text()
    assert "| lora | never | 3,000 | 1,000 |" in report  # by FLOPs, against 0, 2 and 4 shots
    assert "| lora | never | never | 1,000 |" in report  # by time
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_intervals():
    """Wilson's by its formula; the bootstrap of a mean holds the true one about as often as it says."""
    n, hits, z = 40, 31, 1.959964
    p, half = hits / n, z * math.sqrt(hits / n * (1 - hits / n) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    found = costs.interval(lambda i: 0.0, n, hits=hits)
    np.testing.assert_allclose(found, (100 * (middle - half), 100 * (middle + half)), rtol=1e-5)
    assert costs.interval(lambda i: 0.0, 1) is None
    rng, held = np.random.default_rng(0), 0
    for _ in range(100):
        values = rng.normal(3.0, 2.0, 40)
        low, high = costs.interval(lambda i, v=values: float(v[i].mean()), 40, resamples=199)
        held += low <= 3.0 <= high
    assert 86 <= held <= 100


@pytest.mark.parametrize(("said", "low", "high"), [("#### 5", 83.9, 100.0), ("five", 0.0, 16.1)])
def test_the_interval_of_right_answers_in_words_is_wilsons(said, low, high):
    items = [Item("t", "t", references=("#### 5",))] * 20
    bench: Any = Bench(FewShot(), get_task("gsm8k"), "own", items, [], [], None, 3)
    found = interval_of(bench, [{"scores": scores(bench, [said] * 20), "predictions": [said] * 20}])
    assert np.allclose(found, (low, high), atol=0.05)


def test_a_text_may_be_as_long_as_the_task_says(at, tmp_path):
    tiny.folder(tmp_path / "long", "llama", max_position_embeddings=1024)
    task = Task("long", "generation", ("q",), "a", metrics=("exact_match",), max_length=900)
    row = {"q": "cat dog " * 300 + ":", "a": "red"}
    task = task._replace(made=lambda split: [{**row, "q": f"{split == 'dev'} {row['q']}"}])
    how = FewShot(shots=(0,), batch_size=1)
    icl(str(tmp_path / "long"), task, how=how, out=tmp_path / "out", rates={}, settings=QUICK, say=lambda _: None)
    assert json.loads((tmp_path / "out/results.jsonl").read_text())["prompt_tokens"] > 600


@pytest.fixture(scope="module")
def books():
    return prepare("tiny-books", "places", train_limit=16, eval_limit=2, max_buckets=1)


def ones(rows, length):
    names = ("input_ids", "attention_mask", "loss_mask")
    return {n: np.ones((rows, length), np.int32) for n in names} | {"weight": np.ones(rows, np.float32)}


def test_the_count_of_a_forward_pass_is_2_n_t(books):
    model, batch = books.model, ones(2, 64)
    by_hand = 2 * 64 * (2 * 1_104_512 + 4 * 64 * 4 * 128)  # rows · T · (2 N + 4 T Σ d); the table is the head
    found, compiled = costs.forward(model, model.params, batch), Likelihood(model)._score.lower(model.params, batch)
    assert found.by == "XLA"
    assert costs.analytic(model, 2, 64) == pytest.approx(by_hand, rel=0.01)
    assert found.flops == pytest.approx(by_hand, rel=0.03)
    assert costs.forward(model, model.params, batch, compiled.compile()).flops == pytest.approx(by_hand, rel=0.04)

    class Nothing:
        def cost_analysis(self):
            return None

    assert costs.forward(model, model.params, batch, Nothing()) == (costs.analytic(model, 2, 64), "analytic")


def test_the_count_of_training_is_that_of_its_compiled_steps(books):
    method, settings = methods.lora(), Settings(epochs=3, batch_size=8)
    tx = make_optimizer(settings, 6, method)
    state, frozen = start(method, method.init(jax.random.key(0), books.model.params, books.model.sites), tx)
    batch = next(books.epoch(0, 8, 0))
    step = jax.jit(make_step(objective(books), method, tx)).lower(state, frozen, batch, jax.random.key(0)).compile()
    found = costs.training(books, method, settings)
    assert found.flops == pytest.approx(6 * step.cost_analysis()["flops"], rel=0.02)
    assert found.flops < costs.training(books, methods.full(), settings).flops
    parts = costs.training(books, method, dataclasses.replace(settings, accumulate=2, layout="scan"))
    assert parts.flops == pytest.approx(found.flops, rel=0.05)  # a scan's first layer hands on its gradient


def test_the_count_of_decoding_is_2_n_a_token(books):
    model = books.model
    first, step = costs.decoding(model, model.params, 2, 64, 16)
    head = 2 * 1920 * 128  # only the last position's logits
    assert first.flops == pytest.approx(costs.analytic(model, 2, 64) - 2 * 63 * head, rel=0.15)  # looks at empty slots
    assert step.flops == pytest.approx(2 * (2 * 1_104_512 + 4 * 80 * 4 * 128), rel=0.05)


def test_a_meter_counts_rows_and_leaves_compilation_out():
    def count(params, batch, out, compiled):
        return costs.Count(10.0 * out.shape[1])

    meter = costs.Meter(lambda p, b: b["input_ids"] + p, count)
    for index, length in (([0, 1], 8), ([2, -1], 8), ([3, 4], 16)):
        meter(1, {"input_ids": np.zeros((2, length), np.int32), "index": np.array(index)})
    assert len(meter.compiled) == 2
    everything, first = costs.total(meter.calls), costs.total(meter.calls, 3)
    assert (everything.rows, everything.flops) == (5, 80 + 40 + 160)
    assert (first.rows, first.flops) == (3, 80 + 40)
    assert 0 < first.seconds < everything.seconds < 1


# The whole command


def ranked_by_transformers(at, shots, seed):
    """The calibrated choices' numbers, from the logits of transformers' model; every choice is one token."""
    torch = pytest.importorskip("torch")
    import transformers

    reference, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(at / "llama").eval(), tiny.tokenizer()
    _, words = wording(get_task("sst2"))
    train, dev = ([words(r) for r in tiny.rows("sst2", n, i)] for i, n in enumerate((24, 8)))
    shown = [train[i] for i in select("random", [""] * 24, [""] * 24, [""], shots, seed)[0]]

    def p(text):
        ids = tokenizer(join(shown, text), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits[0, -1].numpy()
        two = np.exp(logits[[tokenizer.convert_tokens_to_ids(c) for c in ("bad", "good")]])
        return two / two.sum()

    free = np.mean([p(f"{text} is") for text in ("N/A", "", "[MASK]")], axis=0)
    chosen = [int(np.argmax(p(item.input) / free)) for item in dev]
    return chosen, [item.choices[i] == item.target for item, i in zip(dev, chosen, strict=True)]


def test_rows_are_the_references_and_stay(at, tmp_path):
    """Predictions as transformers ranks them; a rerun scores nothing, what is new is all that is done."""
    how = FewShot(shots=(0, 2), seeds=2, batch_size=4, calibrate=True)
    rows = run(at, tmp_path, how=how)
    assert list(rows) == [("base", 0, 0), ("base", 2, 0), ("base", 2, 1)]
    for (_, shots, seed), row in rows.items():
        chosen, right = ranked_by_transformers(at, shots, seed)
        assert len(set(chosen)) == 2  # else the test would say little
        assert row["predictions"] == chosen
        assert row["scores"] == {"accuracy": pytest.approx(100 * np.mean(right))}
    assert rows["base", 0, 0]["prompt_tokens"] < rows["base", 2, 0]["prompt_tokens"]
    assert 0 < rows["base", 0, 0]["flops"] < rows["base", 2, 0]["flops"]

    said, one = [], how._replace(shots=(0, 1), seeds=1)
    more = run(at, tmp_path, how=one, methods="lora", said=said)
    assert sum("already" in x for x in said) == 1
    assert more.keys() - rows.keys() == {("base", 1, 0), ("lora", 0, 0)}
    assert more["lora", 0, 0]["training_flops"] > 3 * 8 * rows["base", 0, 0]["flops"] / 2
    assert {"report.md", "costs.png"} <= {p.name for p in tmp_path.iterdir()}

    said.clear()
    file = next(tmp_path.glob("runs/lora-seed0*/adapter.safetensors"))
    name = file.parent.name
    last = run(at, tmp_path, how=one, methods="lora", adapters=[file], said=said)
    assert sum("already" in x for x in said) == 3
    assert last == more | {k: v for k, v in last.items() if k[0] == name}
    assert last[name, 0, 0]["predictions"] == more["lora", 0, 0]["predictions"]
    assert last[name, 1, 0]["prompt_tokens"] == more["base", 1, 0]["prompt_tokens"]
    report = (tmp_path / "report.md").read_text()
    assert f"| {name} | 1 |" in report
    assert f"{read_header(file)['extra']['training_flops'] * 1e-9:,.0f}" in report, "what the adapter cost"

    before = (tmp_path / "results.jsonl").read_text()
    assert run(at, tmp_path, how=one, methods="lora", adapters=[file]) == last
    assert (tmp_path / "results.jsonl").read_text() == before


def test_an_adapter_of_conversations_is_asked_in_their_template(at, tmp_path, key):
    """Labels as transformers ranks them after the template's words; texts as written after its tokens."""
    torch = pytest.importorskip("torch")
    import transformers

    base, method = hub.load(at / "llama", "generation"), methods.lora(rank=2)
    params = method.init(key, base.params, base.sites)  # which is the base's function, as B is zero
    turn = "{{ bos_token }}{% for m in messages %}name : {{ m.content }}{% endfor %} || "
    save_adapter(tmp_path / "talks.safetensors", base, method, params, {"chat_template": turn})
    file, said = tmp_path / "talks.safetensors", []
    how = FewShot(shots=(0,), batch_size=4)
    rows = run(at, tmp_path / "labels", how=how, adapters=[file], said=said)
    reference, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(at / "llama").eval(), tiny.tokenizer()
    chosen = []
    for row in tiny.rows("sst2", 8, 1):
        ids = tokenizer(f"name : {row['sentence']} is ||", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = reference(torch.tensor([[2, *ids]])).logits[0, -1]
        bad, good = (float(logits[tokenizer.convert_tokens_to_ids(c)]) for c in ("bad", "good"))
        chosen.append(int(good > bad))
    assert rows["talks", 0, 0]["predictions"] == chosen
    assert rows["talks", 0, 0]["prompt_tokens"] == rows["base", 0, 0]["prompt_tokens"] + 3
    assert any("is asked in the chat template" in x for x in said)

    rows = run(at, tmp_path / "texts", task="e2e", how=how, adapters=[file])
    queries = [wording(get_task("e2e"))[1](row).input for row in tiny.rows("e2e", 8, 1)]
    ids = tokenizer([f"[CLS]name : {q} || " for q in dict.fromkeys(queries)], add_special_tokens=False)["input_ids"]
    new = rows["talks", 0, 0]["config"]["max_new_tokens"]
    want = complete(base, base.params, tokenizer, ids, Decoding(new, stop=(3,)), until=["\n\n"])
    assert rows["talks", 0, 0]["predictions"] == [text.strip() for text in want]


def test_what_is_done_stays_when_a_later_row_fails(at, tmp_path, monkeypatch):
    score = Scorer.__call__

    def cut_off(self, asked):
        if asked.prompt_tokens > 15:
            raise RuntimeError("cut off")
        return score(self, asked)

    with monkeypatch.context() as m:
        m.setattr(Scorer, "__call__", cut_off)
        with pytest.raises(RuntimeError, match="cut off"):
            run(at, tmp_path, how=FewShot(shots=(0, 3)))
    said = []
    assert list(run(at, tmp_path, how=FewShot(shots=(0, 3)), said=said)) == [("base", 0, 0), ("base", 3, 0)]
    assert sum("already scored" in x for x in said) == 1


def test_bm25_calibrated_and_by_token(at, tmp_path):
    """Content-free prompts that differ by query are part of what a query costs; those that are shared are not."""
    shots = FewShot(shots=(2,), batch_size=4)
    plain = run(at, tmp_path, how=shots)["base", 2, 0]
    shared = run(at, tmp_path / "b", how=shots._replace(calibrate=True))["base", 2, 0]
    near = run(at, tmp_path / "c", how=shots._replace(calibrate=True, select="bm25", normalize=True))["base", 2, 0]
    assert shared["flops"] == pytest.approx(plain["flops"], rel=0.2)
    assert near["flops"] > 2.5 * plain["flops"]
    assert len(near["predictions"]) == 8


def test_texts_by_t5(at, tmp_path):
    """A T5 reads the prompt with its encoder and is trained and scored like the others."""
    rows = run(at, tmp_path, "t5", "e2e", how=FewShot(shots=(1,), batch_size=8), methods="bitfit")
    assert set(rows) == {("base", 1, 0), ("bitfit", 0, 0)}
    for row in rows.values():
        assert row["scores"].keys() == {"bleu", "nist", "rouge_l", "cider"}
        assert all(isinstance(p, str) for p in row["predictions"])
        assert 0 < row["flops"] < 1e9


@pytest.mark.parametrize("select", SELECTIONS)
def test_what_does_not_fit_is_said_before_anything_is_scored(at, tmp_path, select):
    message = r"12 shots do not fit .* has \d+ tokens .* room for 64; .*what fits is --shots 0,1"
    with pytest.raises(ValueError, match=message):
        run(at, tmp_path, how=FewShot(shots=(0, 1, 12), select=select))
    assert not (tmp_path / "results.jsonl").exists()


def test_where_nobody_says_what_fits_is_taken(at, tmp_path):
    said = []
    rows = run(at, tmp_path, how=FewShot(), said=said)
    assert [shots for _, shots, _ in rows] == [0, 1, 2, 4]
    assert any("8 shots and more are left out: 8 shots do not fit" in x for x in said)


def test_shorter_texts_leave_more_room(at, tmp_path, capsys):
    say = ["icl", "--model", at / "llama", "--task", "e2e", "--data", at / "e2e", "--shots", "0", "--out", tmp_path]
    main([str(x) for x in [*say, "--max-new-tokens", 2]])
    (row,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert row["config"]["max_new_tokens"] == 2
    assert max(len(text.split()) for text in row["predictions"]) <= 2
    with pytest.raises(SystemExit):
        main([str(x) for x in [*say, "--max-new-tokens", 0]])
    assert "max_new_tokens must be at least 1; got 0" in capsys.readouterr().err


def test_virtual_tokens_take_room(at, tmp_path):
    with pytest.raises(ValueError, match=r"0 shots do not fit .* room for 9 beside 55 virtual tokens"):
        run(at, tmp_path, how=FewShot(shots=(0,)), methods="prompt(length=55)")
    assert not (tmp_path / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"how": FewShot(shots=(0, 99))}, "99 shots need as many training rows; there are 24; write fewer --shots"),
        ({"how": FewShot(shots=(-1,))}, "shots must be different numbers from 0 on"),
        ({"how": FewShot(select="near")}, "there is no selection 'near'"),
        ({"how": FewShot(seeds=0)}, "seeds and query_batch must be at least 1; got 0"),
        ({"how": FewShot(separator="")}, "the separator is empty"),
        ({"how": FewShot(template="sonnet")}, "has no template 'sonnet'"),
        ({"task": "e2e", "how": FewShot(calibrate=True)}, "--calibrate needs a task with choices; e2e by"),
        (
            {"task": "e2e", "how": FewShot(select="balanced", shots=(2,))},
            "balanced demonstrations need a task with choices; e2e",
        ),
        ({"task": "stsb"}, "stsb is a regression; few-shot learning needs a task with labels or texts"),
        ({"methods": "lor"}, "there is no method 'lor'"),
        ({"methods": "lora", "rates": {"bitfit": 1.0}}, "a learning rate is given for 'bitfit'"),
        ({"eval_limit": 0}, "eval_limit must be at least 1; got 0"),
        ({"adapters": ["nowhere.safetensors"]}, "nowhere"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_scored(at, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(at, tmp_path, **changes)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_template_that_names_a_missing_column(at, tmp_path, monkeypatch):
    wrong = Template("wrong", "{{ text }}", "{{ label }}", "bad ||| good", WORDS.words)
    monkeypatch.setitem(TEMPLATES, "sst2", (wrong,))
    with pytest.raises(ValueError, match=r"template 'wrong': 'text' is undefined; the row has the columns"):
        run(at, tmp_path)
    monkeypatch.setitem(TEMPLATES, "sst2", (wrong._replace(input="{{ sentence }}", choices="bad ||| fine"),))
    with pytest.raises(ValueError, match=r"its choices are \('bad', 'fine'\), but the labels read \('bad', 'good'\)"):
        run(at, tmp_path)


def test_the_command(tmp_path, capsys):
    few = ("--train-limit", "40", "--eval-limit", "4", "--buckets", "1", "--out", str(tmp_path))
    main(["icl", "--shots", "0", *few])
    out = capsys.readouterr().out
    rows = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["shots"]) for r in rows] == [("base", 0)]
    assert rows[0]["scores"].keys() == {"slots", "bleu"}
    assert "places: few-shot or fine-tune" in out
    with pytest.raises(SystemExit):
        main(["icl", "--shots", "one", *few])
    assert "cannot read the shots 'one'; write 0,1,2,4" in capsys.readouterr().err


@needs_shared
def test_sentiment_by_the_bundled_base(tmp_path, capsys):
    data = ("--task", "sst2", "--data", str(SHARED / "data/glue/sst2"), "--template", "review")
    few = ("--train-limit", "60", "--eval-limit", "12", "--buckets", "1", "--out", str(tmp_path))
    main(["icl", *data, *few, "--shots", "0,2", "--select", "balanced", "--calibrate"])
    rows = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [r["examples"] for r in rows] == [12, 12]
    assert rows[1]["prompt_tokens"] > 2 * rows[0]["prompt_tokens"] - 40
    assert rows[0]["counted"] == "XLA"
