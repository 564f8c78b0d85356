"""What `peftjax report` says of a sweep's lines: statistics, comparison with papers, pictures, the page."""

import json
import math
import random
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import experiment
from scipy import stats

from peftjax import figures, page, summary

NASTY = 'odd(name="<b>&|$x_1$")'


def line(method="lora(rank=8)", task="cola", seed=0, score=50.0, model="minilm", **changes):
    """A run of the table."""
    headline = {"cola": "matthews", "rte": "accuracy", "sst2": "accuracy", "sft": "loss"}[task]
    stage = changes.get("stage", "final")
    rate = changes.get("rate", 1e-3)
    return {
        "kind": "run",
        "key": f"{model} {task} {method} {seed} {stage} {rate}",
        "stage": stage,
        "model": model,
        "task": task,
        "method": method,
        "seed": seed,
        "rate": rate,
        "headline": headline,
        "scores": {"loss": 0.5, headline: score},
        "trainable": 1000,
        "peak_bytes": 50e6,
        "seconds": 30.0,
        "note": "",
        "history": [],
        "cell": {"method": method, "settings": {"seed": seed, "epochs": 3}, "rate": rate},
        "versions": {"peftjax": "0.1.0", "jax": "0.10.2"},
        "device": {"kind": "cpu", "count": 1, "cores": 2, "name": "Some CPU"},
        "at": "2026-11-30T18:00:00+00:00",
    } | changes


def failure(method="lora(rank=8)", task="cola", seed=0, error="it diverged", **changes):
    made = line(method, task, seed, **changes)
    kept = ("key", "stage", "model", "task", "method", "seed", "rate", "cell", "versions", "device", "at")
    return {"kind": "failed", **{k: made[k] for k in kept}, "error": error, "attempts": 2}


def cell(method, score, task="cola", metric="matthews", model="big", **changes):
    return (
        {"kind": "published", "method": method, "model": model, "task": task, "metric": metric}
        | {
            "score": score,
            "spread": None,
            "trainable": None,
            "source": "Some et al. 2021, table 2",
        }
        | changes
    )


METHODS = {  # trainable, peak MB, seconds, score over the base's
    "full": (22_700_000, 420.0, 60.0, 9.0),
    "head": (770, 80.0, 9.0, 0.0),
    "bitfit": (40_000, 130.0, 30.0, 5.0),
    "fishmask": (110_000, 240.0, 44.0, 6.0),
    "adalora(rank=8)": (150_000, 190.0, 50.0, 7.5),
    "dylora(rank=8)": (149_000, 185.0, 41.0, 6.5),
    **{f"lora(rank={r})": (18_500 * r, 160.0 + r, 36.0, 5.5 + math.log2(r)) for r in (1, 2, 4, 8)},
    NASTY: (9_000, 120.0, 28.0, 3.0),
}
MATRICES = ("query/kernel", "query/bias", "value/kernel", "up/kernel", "down/kernel")


def allocated(method, rng):
    paths = [f"encoder/layer_{i}/{m}" for i in range(6) for m in MATRICES] + ["embeddings/norm/scale"]
    if "adalora" in method:
        paths = [p for p in paths if p.endswith("kernel")]
        return {p: rng.randrange(9) for p in paths}, dict.fromkeys(paths, 147456)
    sizes = {p: 147456 if p.endswith("kernel") else 384 for p in paths}
    return {p: int(rng.random() ** 3 * n) for p, n in sizes.items()}, sizes


def sweep(methods=METHODS, models=("minilm", "stories"), tasks=("cola", "rte", "sst2"), seeds=3):
    """Lines of all kinds: runs, trials, failures, published cells."""
    out = [{"kind": "grid", "title": "GLUE on <small> models", "baseline": "full"}]
    for model in models:
        for task in tasks:
            for method, (trainable, peak, seconds, gain) in methods.items():
                rng = random.Random(f"{model} {task} {method}")
                for rate in (3e-4, 1e-3, 3e-3):
                    out.append(line(method, task, 1000, 40.0, model, stage="search", rate=rate))
                for seed in range(seeds):
                    score = 45 + 10 * (task == "rte") + gain + rng.gauss(0, 1.2)
                    steps = range(5, 190, 5)
                    history = [{"step": s, "loss": 0.7 * math.exp(-s * gain / 900) + rng.gauss(0, 0.02)} for s in steps]
                    more = {}
                    for s in (63, 126, 189):
                        reached = score - 12 * math.exp(-s / 50)
                        metric = "matthews" if task == "cola" else "accuracy"
                        history.append({"step": s, "eval": {"loss": 0.6, metric: reached}})
                    if method in ("fishmask", "adalora(rank=8)"):
                        more["allocation"], more["sizes"] = allocated(method, rng)
                    if method.startswith("dylora"):
                        more["by_rank"] = {str(r): {metric: score - 3 + math.log2(r)} for r in (1, 2, 4, 8)}
                    cost = {"trainable": trainable, "peak_bytes": peak * 1e6, "seconds": seconds + rng.random()}
                    rate = 3e-3 if method == "head" else 1e-3
                    out.append(line(method, task, seed, score, model, history=history, rate=rate, **cost, **more))
    out = [x for x in out if (x.get("method"), x.get("task"), x.get("seed")) != ("bitfit", "cola", 2)]
    out.append(failure(NASTY, "cola", 3, 'a shape was <3, 4> & not "5"', model=models[0]))
    out.append(failure("ia3", "cola", 0, "out of memory", model=models[0]))
    for method, score, trainable in (("full", 63.6, 125e6), ("bitfit", 62.0, 0.1e6), ("lora(rank=8)", 63.4, 0.3e6)):
        out.append(cell(method, score, trainable=trainable, spread=1.2))
        out.append(cell(method, score + 20, "sst2", "accuracy", trainable=trainable, spread=0.2))
    out.append(cell("another's method", 60.1, trainable=0.9e6))
    return out


def written(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def study(lines, folder):
    records = summary.read([written(folder, lines)])
    (found,) = summary.studies(records)
    return found, records


def by_method(found):
    return {r.method: r for r in summary.rows(found)}


# Statistics


def test_mean_sd_and_interval_are_those_of_scipy():
    values = [70.0, 71.5, 74.0, 70.5]
    m = summary.mean(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    np.testing.assert_allclose(m, (4, 71.5, np.std(values, ddof=1), low, high))
    assert summary.mean([3.0]) == (1, 3.0, None, None, None)
    assert summary.mean([3.0, 3.0]) == (2, 3.0, 0.0, 3.0, 3.0)
    assert summary.mean([]) is None


def test_average_is_over_seeds_that_have_every_task(tmp_path):
    scores = {("cola", 0): 10.0, ("cola", 1): 20.0, ("rte", 1): 60.0, ("rte", 2): 90.0}
    found, _ = study([line(task=t, seed=s, score=x) for (t, s), x in scores.items()], tmp_path)
    (row,) = summary.rows(found)
    assert row.average == (1, 40.0, None, None, None)  # seed 1 alone
    assert row.scores["cola"].mean == 15.0
    assert row.seeds == {"cola": (0, 1), "rte": (1, 2)}


def test_no_average_of_percent_and_loss(tmp_path):
    found, _ = study([line(task="cola"), line(task="sft", score=1.2)], tmp_path)
    assert summary.rows(found)[0].average is None


def test_difference_is_scipys_bootstrap_and_keeps_its_sign():
    values = [1.0, 2.5, 0.5, 3.0, 1.5, 2.0]
    d = summary.difference(values)
    by_hand = stats.bootstrap(
        (np.asarray(values) + 50, np.full(6, 50.0)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    np.testing.assert_allclose((d.low, d.high), by_hand, atol=0.06)
    assert (d.pairs, d.mean, d.verdict) == (6, 1.75, "better")
    assert summary.difference([-x for x in values]).verdict == "worse"
    assert summary.difference(values) == d  # the same draws each time


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], (0, None, None, None, "no pairs")),
        ([2.0], (1, 2.0, None, None, "too few pairs")),
        ([2.0] * 6, (6, 2.0, 2.0, 2.0, "better")),
        ([0.0] * 6, (6, 0.0, 0.0, 0.0, "not told apart")),
        ([1.0] * 5, (5, 1.0, 1.0, 1.0, "too few pairs")),
    ],
)
def test_difference_of_few_or_equal_pairs(values, said):
    assert summary.difference(values) == said


def test_pairs_are_matched_by_task_and_seed_and_not_by_place(tmp_path):
    base = [line("full", seed=s, score=10.0 * s) for s in range(6)]
    ours = [line("bitfit", seed=s, score=10.0 * s + 1) for s in reversed(range(7))]
    found, _ = study([*base, *ours, line("bitfit", "rte", 0, 99.0)], tmp_path)
    assert summary.differences(found, "bitfit", "full", found.headline) == (6, 1.0, 1.0, 1.0, "better")
    assert summary.differences(found, "full", "bitfit", found.headline).verdict == "worse"


def test_less_of_a_loss_is_better(tmp_path):
    lines = [line(m, "sft", s, x + s) for m, x in (("full", 2.0), ("bitfit", 1.0)) for s in range(6)]
    found, _ = study(lines, tmp_path)
    assert summary.differences(found, "bitfit", "full", found.headline).verdict == "better"
    cells = {row[0].text: row[1] for row in page.scores(found, summary.rows(found)).rows}
    assert cells["bitfit"].best
    assert not cells["full"].best


# What was run


def test_the_last_line_of_a_key_counts_over_all_files(tmp_path):
    written(tmp_path / "a", [failure(seed=0), line(seed=1, score=40.0), cell("full", 60.0)])
    written(tmp_path / "b", [line(seed=0, score=50.0), line(seed=1, score=60.0), cell("full", 60.0)])
    records = summary.read([tmp_path / "a", tmp_path / "b" / "results.jsonl"])
    assert not records.failed
    assert len(records.published) == 1
    assert {r["seed"]: r["scores"]["matthews"] for r in records.runs} == {0: 50.0, 1: 60.0}


def test_a_score_that_is_no_number_is_a_failure(tmp_path):
    found, records = study([line(seed=0, score=math.nan), line(seed=1, score=math.inf), line(seed=2)], tmp_path)
    assert [r["error"] for r in records.failed] == ["its matthews is not a finite number"] * 2
    assert summary.rows(found)[0].scores["cola"].n == 1
    assert not summary.missing(found)


def test_failed_fewer_and_missing(tmp_path):
    lines = [line("full", t, s) for t in ("cola", "rte") for s in (0, 1)]
    lines += [
        line("bitfit", "cola", 0),
        failure("bitfit", "cola", 1),
        line("bitfit", "rte", 1),
        failure("ia3", "rte", 0),
    ]
    found, _ = study(lines, tmp_path)
    assert by_method(found)["ia3"].scores == {}
    assert summary.fewer(found, summary.rows(found)) == [("bitfit", "cola", 1, 2), ("bitfit", "rte", 1, 2)]
    assert summary.missing(found) == [("bitfit", "rte", [0]), ("ia3", "cola", [0, 1]), ("ia3", "rte", [1])]


def test_edge_of_the_search(tmp_path):
    def trials(method, task):
        return [line(method, task, 1000, stage="search", rate=r, factor=r / 1e-3) for r in (1e-4, 1e-3)]

    lines = [*trials("full", "cola"), failure("full", seed=1000, stage="search", rate=None) | {"factor": 10.0}]
    lines += [line("full", "cola", rate=1e-3), line("full", "rte", rate=1e-4)]  # rte was not searched
    lines += [*trials("bitfit", "cola"), *trials("bitfit", "rte")[:1]]
    lines += [line("bitfit", "cola", rate=1e-3), line("bitfit", "rte", rate=1e-4)]  # of rte one rate alone was tried
    found, _ = study(lines, tmp_path)
    rows = by_method(found)
    assert rows["full"].edges == {"rte": "lowest"}  # of cola a higher one was tried, and failed
    assert rows["bitfit"].edges == {"cola": "highest"}
    assert rows["full"].scores["cola"].n == 1  # no trial is in the table


def test_runs_that_differ_in_a_setting_are_rows_of_their_own(tmp_path):
    lines = [line(seed=s, rate=r, score=1e4 * r) for r in (1e-3, 2e-3) for s in (0, 1)]
    found, _ = study(lines, tmp_path)
    assert {r.method: r.scores["cola"].mean for r in summary.rows(found)} == {
        "lora(rank=8) [rate 0.001]": 10.0,
        "lora(rank=8) [rate 0.002]": 20.0,
    }
    longer = line(key="longer", score=70.0, cell=line()["cell"] | {"settings": {"epochs": 9, "seed": 0}})
    found, _ = study([line(), longer, line("full")], tmp_path)
    assert list(found.runs) == ["full", "lora(rank=8) [epochs 3]", "lora(rank=8) [epochs 9]"]
    found, _ = study([line(f"lora(rank={r})") for r in (16, 2)], tmp_path)
    assert list(found.runs) == ["lora(rank=2)", "lora(rank=16)"]
    again = line(key="again", score=70.0)
    found, _ = study([line(), again], tmp_path)
    assert summary.repeated(found) == [("lora(rank=8)", "cola", 0)]


def searched_and_default():
    """Runs with a searched rate of two tasks, and of one of them also at the default rate, by other ranks too."""
    found = [
        line(m, t, s, 60.0 + s, rate=3e-3) for m in ("full", "lora(rank=8)") for t in ("cola", "rte") for s in (0, 1)
    ]
    found += [line("full", seed=s, score=40.0 + s) for s in (0, 1)]
    return found + [line(f"lora(rank={r})", seed=s, score=40.0 + r) for r in (1, 2, 8) for s in (0, 1)]


def test_a_method_that_was_run_in_several_ways_is_compared_with(tmp_path, call):
    folder = written(tmp_path, [*searched_and_default(), {"kind": "grid", "title": "", "baseline": "full"}])
    status, *_ = call("report", folder)
    assert status == 0
    text = (folder / "report.md").read_text()
    assert "Compared with full." in text
    assert "full was run in several ways; the one of most tasks and seeds is full \\[rate 0.003\\]." in text
    assert "Too few pairs to tell from full \\[rate 0.003\\]: full \\[rate 0.001\\], lora(rank=1)" in text
    status, *_ = call("report", folder, "--baseline", "lora( rank = 8 ) [rate 0.001]")
    assert status == 0


def test_ranks_of_one_rate_are_one_line(tmp_path):
    found, _ = study(searched_and_default(), tmp_path)
    means = {m: {r: x.mean for r, x in points.items()} for m, points in summary.ranked(found, "cola").items()}
    assert means == {"lora [rate 0.001]": {1: 41.0, 2: 42.0, 8: 48.0}}


def test_ways_of_a_method_stand_beside_its_published_cell(tmp_path):
    lines = [*searched_and_default(), cell("full", 63.0, trainable=1e6), cell("lora(rank = 1)", 62.0)]
    found, records = study(lines, tmp_path)
    (beside,) = summary.beside(found, records.published)
    ours = {m: cells["cola", "matthews"][1].mean for m, cells in beside.rows.items()}
    assert ours == {"full [rate 0.003]": 60.5, "full [rate 0.001]": 40.5, "lora(rank = 1)": 41.0}
    assert {m: theirs for m, (theirs, _) in beside.trainable.items()} == {
        "full [rate 0.003]": 1e6,
        "full [rate 0.001]": 1e6,
        "lora(rank = 1)": None,
    }
    assert (beside.orders[0].pairs, beside.orders[0].same) == (2, 1)


def test_pictures_of_methods_with_brackets_are_pictures_in_markdown(tmp_path):
    from markdown_it import MarkdownIt

    name = "adalora(target_rank=2, targets=['linear'])"
    page.report([written(tmp_path, [line(name, allocation={"layer_0/q": 2}, sizes={"layer_0/q": 9})])])
    text = (tmp_path / "report.md").read_text()
    assert name in MarkdownIt().render(text).replace("&quot;", '"')
    assert MarkdownIt().render(text).count("<img") == text.count("](figures/") > 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no run is recorded"),
        ('{"kind": "run", "key"', "line 1: expected a JSON object"),
        ('\n{"kind": "other"}', "line 2: expected a JSON object"),
        (
            '{"kind": "published", "method": "full"}',
            "line 1: a line of kind published needs model, task, metric, score",
        ),
        (json.dumps(cell("full", "63.6±1.2")), "line 1: a published score must be a number; got '63.6±1.2'"),
        (json.dumps(cell("full", math.nan)), "line 1: a published score must be a number; got None"),
        (json.dumps(line(scores=None)), "line 1: scores must map metrics to numbers; got None"),
    ],
)
def test_files_that_are_none_of_a_sweep(tmp_path, text, said, call):
    (tmp_path / "results.jsonl").write_text(text)
    status, _, stderr = call("report", tmp_path)
    assert status == 1
    assert said in stderr
    assert not list(tmp_path.glob("report.*"))


# Beside papers


def test_published_orders_counted_by_hand(tmp_path):
    ours = {"full": (60.0, 61.0), "bitfit": (62.5, 63.5), "head": (40.0, 41.0), "lora(rank=8)": (50.0, 70.0)}
    theirs = {"full": 70.0, "bitfit": 65.0, "head": 50.0, "lora(rank = 8)": 69.0, "houlsby": 80.0}
    lines = [line(m, seed=s, score=x) for m, scores in ours.items() for s, x in enumerate(scores)]
    lines += [cell(m, x, spread=0.5, trainable=1e6) for m, x in theirs.items()]
    lines += [cell("full", 1.0, model="nobody's", task="rte", metric="accuracy"), cell("x", 1.0, model="unrelated")]
    found, records = study(lines, tmp_path)
    big, nobodys = summary.beside(found, records.published)
    # published: full > lora > bitfit > head; ours: bitfit 63 > full 60.5 > lora 60 > head: 2 of 6 pairs are turned,
    # full and bitfit by more than a spread; lora and bitfit by less than lora's.
    (order,) = big.orders
    assert (order.pairs, order.same) == (6, 4)
    assert order.tau == pytest.approx((4 - 2) / 6)
    assert order.turned == [("full", "bitfit", 5.0, -2.5)]
    assert big.trainable["full"] == (1e6, (1000, 1000))
    assert big.rows["houlsby"]["cola", "matthews"][1] is None
    assert nobodys.rows["full"]["rte", "accuracy"][1] is None
    (said, *rest) = page._orders(big)
    assert "4 of 6 pairs in the published order (Kendall's tau 0.33)" in said
    assert "full is better than bitfit by 5.00; here bitfit is better by 2.50" in said
    assert "1 pair the other way round or equal" in said
    assert rest == ["Published, and without a score here: houlsby."]
    assert "no two methods" in page._orders(nobodys)[0]


def test_published_stands_beside_the_model_that_it_is_of(tmp_path):
    lines = [line(model=m, seed=s) for m in ("base", "large", "tiny") for s in (0, 1)]
    lines += [cell("lora(rank=8)", 60.0, model=m) for m in ("base", "large", "huge")]
    page.report([written(tmp_path, lines)])
    said = [x for x in (tmp_path / "report.md").read_text().splitlines() if x.startswith("### ") and "beside" in x]
    of = {("base", "base"), ("large", "large"), *((m, "huge") for m in ("base", "large", "tiny"))}
    assert {tuple(x[4:].split(" (")[0].split(": beside ")) for x in said} == of
    assert len(said) == len(of)


# What the pictures show


def test_layers_and_matrices():
    assert summary.place("model/layers_10/mlp/fc1/kernel") == (10, "model/mlp/fc1/kernel")
    assert summary.place("encoder/block_1/layer_0/q") == (1, "encoder/layer_0/q")
    assert summary.place("head/fc1/bias") == (None, "head/fc1/bias")
    names, layers, grid = summary.heat({"a/h_2/q/w": 3.0, "a/h_0/q/w": 1.0, "a/h_0/up/w": 2.0, "a/norm": 4.0})
    assert (names, layers) == (["q", "up", "a/norm"], [0, 2, None])
    np.testing.assert_array_equal(grid, [[1, 3, np.nan], [2, np.nan, np.nan], [np.nan, np.nan, 4]])


def test_names_of_files_that_would_be_alike(tmp_path):
    part = {"allocation": {"layer_0/q": 1}, "sizes": {"layer_0/q": 2}}
    found, _ = study([line("mask(a=1)", **part), line("mask(a='1')", **part)], tmp_path)
    drawn = [p for p in figures.pictures(found, summary.rows(found)) if p.kind == "parts"]
    assert [p.name for p in drawn] == ["parts-minilm-cola-mask-a-1", "parts-minilm-cola-mask-a-1-2"]
    assert ElementTree.fromstring(drawn[0].file()).tag.endswith("svg")


def test_allocation_is_a_share_of_entries_or_a_rank():
    sizes = {"layer_0/q": 10}
    runs = [line("fishmask", seed=s, allocation={"layer_0/q": n}, sizes=sizes) for s, n in enumerate((1, 3))]
    assert summary.allocation(runs, "cola") == {"layer_0/q": pytest.approx(0.2)}
    runs = [r | {"method": "adalora(rank=8)"} for r in runs]
    assert summary.allocation(runs, "cola") == {"layer_0/q": 2.0}


def test_ranks(tmp_path):
    lines = [line(f"lora(rank={r})", seed=s, score=r + s) for r in (2, 16) for s in (0, 2)]
    lines.append(line("dylora(rank=8)", by_rank={str(r): {"matthews": 5.0 * r} for r in (1, 8)}))
    lines.append(line("adalora(rank=4)"))
    found, _ = study(lines, tmp_path)
    means = {m: {r: x.mean for r, x in points.items()} for m, points in summary.ranked(found, "cola").items()}
    assert means == {"lora": {2: 3.0, 16: 17.0}, "dylora(rank=8), cut to the rank": {1: 5.0, 8: 40.0}}


def test_curves_are_means_at_steps_that_all_seeds_have():
    steps = ([0, 10, 20], [10, 15, 20, 30])
    runs = [
        line(seed=i, history=[{"step": s, "eval": {"matthews": s + 2.0 * i}} for s in x]) for i, x in enumerate(steps)
    ]
    at, means, sd = summary.curve(runs, "cola", "matthews")
    np.testing.assert_array_equal(at, [10, 15, 20])
    np.testing.assert_allclose(means, [11, 16, 21])
    np.testing.assert_allclose(sd, math.sqrt(2))
    assert summary.curve(runs, "cola", None) is None


def test_long_names_are_files(tmp_path):
    names = ["lora(targets=['" + "x" * 300 + end + "'])" for end in ("a", "b")]
    page.report([written(tmp_path, [line(m, allocation={"layer_0/q": 2}, sizes={"layer_0/q": 9}) for m in names])])
    assert len(list((tmp_path / "figures").glob("parts-*.png"))) == 2


# The page


VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Well-formed or not; what is loaded; the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.loads, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        found = dict(attrs)
        assert len(found) == len(attrs), attrs
        self.ids += [found["id"]] if "id" in found else []
        for name, value in attrs:
            if name in ("href", "xlink:href") and (value or "").startswith("#"):
                self.refs.append(value[1:])
            elif name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.loads.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += [] if self.open and self.open[-1] in ("style", "script") else [data]


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """A small sweep's folder with its report."""
    kept = {m: METHODS[m] for m in ("full", "head", "bitfit", "fishmask", "dylora(rank=8)", "lora(rank=8)", NASTY)}
    folder = written(tmp_path_factory.mktemp("sweep"), sweep(kept, models=("minilm",), tasks=("cola", "sst2")))
    page.report([folder])
    return folder


def test_the_page_is_whole_and_loads_nothing(reported):
    text = (reported / "report.html").read_text()
    found = Page(text)
    assert not found.loads
    assert len(set(found.ids)) == len(found.ids)
    assert set(found.refs) <= set(found.ids)
    assert set(found.refs) > {"s0", "s1"}
    for way in ("http:", "https:", "//cdn", "@import", "url(data", "<img", "<link", "<iframe"):
        assert way not in text, way
    assert figures.INK not in text
    assert "prefers-color-scheme: dark" in text
    shown = " ".join(" ".join(found.text).split())
    for what in ("GLUE on <small> models", NASTY, 'a shape was <3, 4> & not "5"', "out of memory", "another's method"):
        assert what in shown, what
    assert "<b>" not in text
    for bad in ("nan", "None", "inf", "NaN", "undefined"):
        assert f" {bad} " not in f" {shown} ", bad


def test_what_the_report_says(reported):
    text = (reported / "report.md").read_text()
    for what in (
        "bitfit has 2 seeds of cola, others up to 3.",
        "| bitfit (fewer seeds) |",
        "head: the search chose the highest of the rates that it tried",
        "| ia3 | - | - | - | 0 |",
        "| ia3 | minilm | cola | table | 0 | 0.001 | 2 | out of memory |",
        "minilm, ia3, sst2: seeds 0, 1, 2",
        "Worse than full:",
        "62 ± 1.2",
        "In all, ",
        "2 runs failed.",
        "On Some CPU, 2 cores.",
        "jax 0.10.2",
    ):
        assert what in text, what
    linked = {part.split(")")[0] for part in text.split("](")[1:]}
    assert linked == {f"figures/{f.name}" for f in (reported / "figures").glob("*.png")}
    assert all((reported / file).with_suffix(".svg").is_file() for file in linked)


def test_the_command(tmp_path, call):
    lines = [line(m, "cola", seed) for m in ("bitfit", "head") for seed in (0, 1)] + [cell("full", 60.0)]
    folder = written(tmp_path / "sweep", lines)
    status, stdout, _ = call("report", folder, "--baseline", "head", "--out", tmp_path / "out", "--title", "Mine [x]")
    assert status == 0
    assert "Mine [x]: minilm" in stdout
    assert "bitfit" in stdout
    text = (tmp_path / "out/report.md").read_text()
    assert "Too few pairs to tell from head: bitfit." in text
    assert "none of its methods was run: big (Some et al. 2021, table 2)." in text
    assert not (folder / "report.md").exists()
    status, _, stderr = call("report", folder, "--baseline", "full")
    assert status == 1
    assert "the baseline 'full' has no run here; choose one of bitfit, head" in stderr
    status, _, stderr = call("report", tmp_path / "nowhere")
    assert status == 1
    assert "there is no" in stderr


def test_the_page_in_a_browser(reported):
    pytest.importorskip("playwright", reason="pip install playwright, and a Chromium, to look at the page")
    from playwright.sync_api import Error

    try:
        wrong = experiment("screenshot").look(reported / "report.html")
    except Error as e:
        if "Executable doesn't exist" in str(e):
            pytest.skip("there is no Chromium here")
        raise
    assert not wrong


def test_how_many_runs_a_peak_is_of():
    def said(**together):
        lines = [line(m, seed=s, together=n) for m, n in together.items() for s in (0, 1)]
        (study,) = summary.studies(summary.Records(lines, [], [], [], None, None))
        return [note for note in page.notes(study, summary.rows(study)) if note.startswith("Peaks")]

    assert said(full=2, lora=2) == []
    (note,) = said(full=1, lora=3, bitfit=3)
    assert "1 run for full; 3 runs for bitfit, lora:" in note
