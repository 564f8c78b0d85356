"""From the lines of `results.jsonl` to the rows of a report: means, intervals, paired differences, published orders.

Pure functions, but for `read`. A sweep leaves a line for each run (`kind` "run" or "failed"), for each published cell
("published") and for itself ("grid").
"""

import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95  # of every interval
FEWEST_PAIRS = 6  # of fewer, all go one way by chance more often than one time in twenty: 2 / 2**5
LOWER = frozenset({"loss", "perplexity"})  # metrics of which less is better
NOT_PERCENT = LOWER | {"nist", "cider"}  # no average is made of these and percentages


class Records(NamedTuple):
    """What the files hold, a dict for each line, in order.

    Attributes:
      runs: of the table; those of the search are in `trials`.
      trials: of the learning-rate search.
      failed: with `error`; also runs whose headline score is no finite number.
      published: cells of papers' tables, each once.
      baseline: as the grid names it.
      title: as the grid names it.
    """

    runs: list[dict]
    trials: list[dict]
    failed: list[dict]
    published: list[dict]
    baseline: str | None
    title: str | None


class Mean(NamedTuple):
    """A mean over seeds; `sd` (n - 1) and the 95% interval are None of a single one."""

    n: int
    mean: float
    sd: float | None
    low: float | None
    high: float | None


class Study(NamedTuple):
    """One model's runs.

    Attributes:
      model: its name in the grid.
      headline: task -> metric, in order of appearance.
      runs: method -> its runs, by name; a method that was run otherwise too (an ablation of rates) is there once for
        each way.
      failed: this model's.
      trials: this model's.
    """

    model: str
    headline: dict[str, str]
    runs: dict[str, list[dict]]
    failed: list[dict]
    trials: list[dict]


class Row(NamedTuple):
    """A method of a study.

    Attributes:
      method: its name.
      scores: task -> the headline over seeds.
      average: over the tasks for each seed that has them all, then over those seeds; None where there is no such seed.
      seeds: task -> seeds.
      trainable: least and most, since heads differ by task; None without a run.
      peak_bytes: the largest of the tasks' means.
      seconds: of a run: the mean of the tasks' means.
      rates: task -> learning rates.
      edges: task -> 'lowest' or 'highest', where the search chose the end of what it tried.
      notes: of its runs.
    """

    method: str
    scores: dict[str, Mean]
    average: Mean | None
    seeds: dict[str, tuple[int, ...]]
    trainable: tuple[int, int] | None
    peak_bytes: float | None
    seconds: float | None
    rates: dict[str, tuple[float, ...]]
    edges: dict[str, str]
    notes: tuple[str, ...]


class Difference(NamedTuple):
    """A method against the baseline over pairs; more is better; `low` and `high` are None of fewer than two pairs."""

    pairs: int
    mean: float | None
    low: float | None
    high: float | None
    verdict: str


class Beside(NamedTuple):
    """A published table and ours.

    Attributes:
      source: of the published numbers.
      model: the published one.
      columns: task and metric.
      rows: method -> {(task, metric): (published cell, ours or None)}.
      trainable: method -> parameters as published (None: not given) and as counted, least and most (None: no run).
      orders: one for each column.
    """

    source: str
    model: str
    columns: list[tuple[str, str]]
    rows: dict[str, dict[tuple[str, str], tuple[dict, Mean | None]]]
    trainable: dict[str, tuple[float | None, tuple[int, int] | None]]
    orders: list["Order"]


class Order(NamedTuple):
    """Whether a published order of methods holds here.

    Attributes:
      task: of the column.
      metric: of the column.
      pairs: of methods that both sides have and whose published scores differ.
      same: pairs that are in the same order here.
      tau: Kendall's, tau-b; None where one side has no order.
      turned: (better as published, better here, published difference, ours) of the pairs that are the other way round
        by more than the spread of either side.
    """

    task: str
    metric: str
    pairs: int
    same: int
    tau: float | None
    turned: list[tuple[str, str, float, float]]


def read(places: Sequence[str | Path]) -> Records:
    """The records of several files, or of folders that hold a `results.jsonl`.

    Of several lines with one key the last counts; a number that is not finite is None.

    Raises:
      ValueError: there is no such file, it holds no run, or a line is none of a sweep.
    """
    keyed: dict[str, dict] = {}
    published: dict[str, dict] = {}
    grids = []
    for place in map(Path, places):
        for line in _lines(place / "results.jsonl" if place.is_dir() else place):
            match line["kind"]:
                case "run" | "failed":
                    keyed.pop(line["key"], None)
                    keyed[line["key"]] = line
                case "published":
                    published[json.dumps(line, sort_keys=True)] = line
                case "grid":
                    grids.append(line)
    if not keyed:
        raise ValueError(
            f"{', '.join(map(str, places))}: no run is recorded there; `peftjax sweep` writes results.jsonl"
        )
    lines = [_checked(line) for line in keyed.values()]
    runs = [line for line in lines if line["kind"] == "run"]

    def said(field: str) -> str | None:
        return next((g[field] for g in reversed(grids) if g.get(field)), None)

    return Records(
        [r for r in runs if r["stage"] == "final"],
        [r for r in runs if r["stage"] == "search"],
        [r for r in lines if r["kind"] == "failed"],
        list(published.values()),
        said("baseline"),
        said("title"),
    )


NEEDED = {
    "run": ("key", "stage", "model", "task", "method", "seed", "headline", "scores"),
    "failed": ("key", "stage", "model", "task", "method", "seed", "error"),
    "published": ("method", "model", "task", "metric", "score"),
    "grid": (),
}


def _lines(file: Path) -> Iterable[dict]:
    if not file.is_file():
        raise ValueError(
            f"there is no {file}; give a results.jsonl of `peftjax sweep`, which it writes when its runs are over, or "
            "the folder that holds it"
        )
    for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            line = _finite(json.loads(text))
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict) or line.get("kind") not in NEEDED:
            raise ValueError(
                f"{file}, line {number}: expected a JSON object whose kind is one of {', '.join(NEEDED)}, got "
                f"{text[:60]!r}; if a sweep is writing it now, try again"
            )
        if missing := [field for field in NEEDED[line["kind"]] if field not in line]:
            raise ValueError(f"{file}, line {number}: a line of kind {line['kind']} needs {', '.join(missing)}")
        if line["kind"] == "run" and not isinstance(line["scores"], dict):
            raise ValueError(f"{file}, line {number}: scores must map metrics to numbers; got {line['scores']!r}")
        if line["kind"] == "published" and not isinstance(line["score"], int | float):
            raise ValueError(f"{file}, line {number}: a published score must be a number; got {line['score']!r}")
        yield line


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _checked(line: dict) -> dict:
    """A run without a headline score is a failed one."""
    if line["kind"] == "failed" or line["scores"].get(line["headline"]) is not None:
        return line
    return {**line, "kind": "failed", "error": f"its {line['headline']} is not a finite number"}


def mean(values: Sequence[float]) -> Mean | None:
    """Mean, standard deviation (n - 1) and Student's t interval for the mean: m ± t(0.975, n - 1) · sd / √n.

    >>> m = mean([1.0, 2.0, 3.0])
    >>> m.n, m.mean, m.sd, round(m.low, 3), round(m.high, 3)
    (3, 2.0, 1.0, -0.484, 4.484)
    """
    n = len(values)
    if not n:
        return None
    m = statistics.fmean(values)
    if n == 1:
        return Mean(1, m, None, None, None)
    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / math.sqrt(n)
    return Mean(n, m, sd, m - half, m + half)


def studies(records: Records) -> list[Study]:
    """A study for each model, in order of appearance."""
    everything = records.runs + records.failed + records.trials
    out = []
    for model in dict.fromkeys(r["model"] for r in everything):
        runs, trials, failed = ([r for r in part if r["model"] == model] for part in records[:3])
        headline = {}
        for r in runs + trials:
            headline.setdefault(r["task"], r["headline"])
        for r in failed:
            headline.setdefault(r["task"], r.get("headline") or "score")
        out.append(Study(model, headline, _ways(runs, failed + trials), failed, trials))
    return out


def _ways(runs: Sequence[dict], others: Sequence[dict]) -> dict[str, list[dict]]:
    """Method -> runs; where a method has several runs of one seed, those are told apart by what their settings are.

    So are then the runs of its other ranks.
    """
    alike: dict[tuple, list[dict]] = {}
    for r in runs:
        alike.setdefault((r["method"], r["task"], r["seed"]), []).append(r)
    differing: dict[str, set[str]] = {}
    for (method, *_), group in alike.items():
        differing.setdefault(without_rank(method), set()).update(_differing(group))
    out: dict[str, list[dict]] = {}
    for method in sorted({r["method"] for r in [*runs, *others]}, key=_natural):
        mine = [r for r in runs if r["method"] == method]
        out |= {} if mine else {method: []}
        for r in mine:
            facts, told = _facts(r), sorted(differing[without_rank(method)])
            way = ", ".join(f"{fact.rpartition('.')[2]} {short(facts.get(fact))}" for fact in told)
            out.setdefault(f"{method} [{way}]" if way else method, []).append(r)
    return out


def ways(study: Study, method: str) -> list[str]:
    """The names in `runs` of a method, or of one way of it, that has runs; that of most tasks and seeds first."""

    def named(name: str, runs: Sequence[dict]) -> bool:
        return _plain(method) in {_plain(text) for text in (name, *(r["method"] for r in runs[:1]))}

    found = {name: runs for name, runs in study.runs.items() if runs and named(name, runs)}
    return sorted(found, key=lambda name: -len(by_pair(found[name], study.headline)))


def _differing(group: Sequence[dict]) -> set[str]:
    facts = [_facts(r) for r in group]
    names = {name for f in facts for name in f}
    return {name for name in names if len({json.dumps(f.get(name)) for f in facts}) > 1}


def _natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts rank=2 before rank=16."""
    return [(int(digits or -1), rest) for digits, rest in re.findall(r"(\d*)(\D*)", text)]


NO_FACTS = ("rate", "learning_rate", "factor", "seed", "stage", "key", "source", "data")  # the rate is said once


def _facts(run: dict) -> dict[str, Any]:
    """What a run's cell says, flat; its learning rate is there once."""

    def flat(value, path) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            for k, v in value.items():
                yield from flat(v, f"{path}.{k}" if path else k)
        elif path.rpartition(".")[2] not in NO_FACTS:
            yield path, value

    return {"rate": run.get("rate"), **dict(flat(run.get("cell") or {}, ""))}


def short(value: Any) -> str:
    """A setting as text.

    >>> short(5e-4), short(None), short(True)
    ('0.0005', '-', 'True')
    """
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def by_pair(runs: Sequence[dict], headline: Mapping[str, str]) -> dict[tuple[str, int], float]:
    """(task, seed) -> the task's headline score; of two runs of one pair the later counts."""
    found = {(r["task"], r["seed"]): r["scores"].get(headline[r["task"]]) for r in runs}
    return {pair: score for pair, score in found.items() if score is not None}


def averaged(study: Study) -> bool:
    """Whether an average over the tasks means something: several, all in percent."""
    return len(study.headline) > 1 and not NOT_PERCENT & set(study.headline.values())


def rows(study: Study) -> list[Row]:
    """A row for each method."""
    return [_row(study, method) for method in study.runs]


def _row(study: Study, method: str) -> Row:
    runs = study.runs[method]
    scores = by_pair(runs, study.headline)
    tasks = [t for t in study.headline if any(t == task for task, _ in scores)]

    def over(task: str, field: str) -> float | None:
        found = [r[field] for r in runs if r["task"] == task and r.get(field) is not None]
        return statistics.fmean(found) if found else None

    def known(field: str) -> list[float]:
        return [x for t in tasks if (x := over(t, field)) is not None]

    seeds = {t: tuple(sorted(seed for task, seed in scores if task == t)) for t in tasks}
    whole = sorted(set.intersection(*map(set, seeds.values()))) if len(seeds) == len(study.headline) else []
    counts = [r["trainable"] for r in runs if r.get("trainable") is not None]
    rates = {t: tuple(sorted({r["rate"] for r in runs if r["task"] == t and r.get("rate") is not None})) for t in tasks}
    return Row(
        method,
        {t: m for t in tasks if (m := mean([scores[t, seed] for seed in seeds[t]])) is not None},
        mean([statistics.fmean(scores[t, seed] for t in tasks) for seed in whole]) if averaged(study) else None,
        seeds,
        (min(counts), max(counts)) if counts else None,
        max(known("peak_bytes"), default=None),
        statistics.fmean(found) if (found := known("seconds")) else None,
        {t: r for t, r in rates.items() if r},
        {t: edge for t in tasks if len(rates[t]) == 1 and (edge := _edge(study, runs, t, rates[t][0]))},
        tuple(dict.fromkeys(r["note"] for r in runs if r.get("note"))),
    )


def _edge(study: Study, runs: Sequence[dict], task: str, rate: float) -> str:
    """'lowest' or 'highest' where the rate is that of all tried: on this task, or on those searched for all tasks."""
    mine = [r for r in study.trials + study.failed if r["stage"] == "search" and r["method"] == runs[0]["method"]]
    # a failed trial may say its rate as a multiple of the default only, as trials that went well do beside the rate
    units = [r["rate"] / r["factor"] for r in mine if r.get("rate") and r.get("factor")]
    tried = [(r["task"], r.get("rate") or units[0] * r["factor"]) for r in mine if r.get("rate") or units]
    rates = {rate for t, rate in tried if t == task} or {rate for _, rate in tried}
    if len(rates) < 2:
        return ""
    return {min(rates): "lowest", max(rates): "highest"}.get(rate, "")


def fewer(study: Study, found: Sequence[Row]) -> list[tuple[str, str, int, int]]:
    """(method, task, its seeds, the most seeds that a method has there) where those are fewer."""
    most = {t: max(len(r.seeds.get(t, ())) for r in found) for t in study.headline}
    return [
        (r.method, t, len(r.seeds[t]), most[t])
        for r in found
        for t in study.headline
        if 0 < len(r.seeds.get(t, ())) < most[t]
    ]


def missing(study: Study) -> list[tuple[str, str, list[int]]]:
    """(method, task, seeds) of which others have a record, and this method neither a run nor a failure."""
    there: dict[str, set[int]] = {t: set() for t in study.headline}
    had: dict[tuple[str, str], set[int]] = {}
    final = [r for r in study.failed if r["stage"] == "final"]
    for method, runs in study.runs.items():
        name = runs[0]["method"] if runs else method
        for r in [*runs, *(f for f in final if f["method"] == name)]:
            there[r["task"]].add(r["seed"])
            had.setdefault((method, r["task"]), set()).add(r["seed"])
    return [
        (method, task, gone)
        for method in study.runs
        for task in study.headline
        if (gone := sorted(there[task] - had.get((method, task), set())))
    ]


def repeated(study: Study) -> list[tuple[str, str, int]]:
    """(method, task, seed) of which there are several runs that no setting tells apart; the last of them counts."""
    counted = Counter((m, r["task"], r["seed"]) for m, runs in study.runs.items() for r in runs)
    return [pair for pair, n in counted.items() if n > 1]


def differences(study: Study, method: str, baseline: str, tasks: Iterable[str]) -> Difference:
    """The method's headline minus the baseline's, over the pairs (task, seed) that both have.

    Of a metric of which less is better it is the other way round: more is always better.
    """
    ours, theirs = (by_pair(study.runs[name], study.headline) for name in (method, baseline))
    wanted = set(tasks)
    pairs = [pair for pair in ours if pair in theirs and pair[0] in wanted]
    signs = {t: -1.0 if metric in LOWER else 1.0 for t, metric in study.headline.items()}
    return difference([signs[t] * (ours[t, seed] - theirs[t, seed]) for t, seed in sorted(pairs)])


def difference(values: Sequence[float], seed: int = 0) -> Difference:
    """Mean difference, its 95% interval, and what it means.

    The interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13): pairs are drawn again, with
    replacement, 9,999 times. Fewer than six pairs tell nothing: they all go one way by chance too often.
    """
    n = len(values)
    if n < 2:
        return Difference(n, values[0] if n else None, None, None, "too few pairs" if n else "no pairs")
    m = statistics.fmean(values)
    low = high = m
    if min(values) != max(values):
        found = stats.bootstrap(
            (np.asarray(values),), np.mean, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed)
        )
        low, high = (float(x) for x in found.confidence_interval)
    told = "better" if low > 0 else "worse" if high < 0 else "not told apart"
    return Difference(n, m, low, high, told if n >= FEWEST_PAIRS else "too few pairs")


def beside(study: Study, published: Sequence[dict]) -> list[Beside]:
    """Every published table beside this model's runs, where one of its methods was run.

    A method that was run in several ways has a row for each.
    """
    out = []

    def named(method: str) -> dict[str, list[dict]]:
        found = {name: study.runs[name] for name in ways(study, method)}
        return found if len(found) > 1 else {method: [r for runs in found.values() for r in runs]}

    for source, model in dict.fromkeys((p.get("source") or "", p["model"]) for p in published):
        cells = [p for p in published if (p.get("source") or "", p["model"]) == (source, model)]
        if not any(ways(study, p["method"]) for p in cells):
            continue
        columns = list(dict.fromkeys((p["task"], p["metric"]) for p in cells))
        table: dict[str, dict] = {}
        trainable = {}
        for p, (name, runs) in [(cell, way) for cell in cells for way in named(cell["method"]).items()]:
            table.setdefault(name, {})[p["task"], p["metric"]] = (p, _metric(runs, p["task"], p["metric"]))
            before = trainable.get(name, (None, None))[0]
            counts = [r["trainable"] for r in runs if r.get("trainable") is not None]
            given = p.get("trainable") if p.get("trainable") is not None else before
            trainable[name] = (given, (min(counts), max(counts)) if counts else None)
        orders = [_order(table, column) for column in columns]
        out.append(Beside(source, model, columns, table, trainable, orders))
    return out


def _plain(method: str) -> str:
    return method.replace(" ", "").replace('"', "'")


def _metric(runs: Sequence[dict], task: str, metric: str) -> Mean | None:
    found = {r["seed"]: r["scores"].get(metric) for r in runs if r["task"] == task}
    return mean([score for score in found.values() if score is not None])


def _order(table: Mapping[str, Mapping], column: tuple[str, str]) -> Order:
    sides = [(m, *cells[column]) for m, cells in table.items() if column in cells and cells[column][1] is not None]
    same, pairs, turned = 0, 0, []
    for (a, p, x), (b, q, y) in itertools.combinations(sides, 2):
        theirs, ours = p["score"] - q["score"], x.mean - y.mean
        if not theirs:
            continue
        pairs += 1
        same += theirs * ours > 0
        spreads = max(p.get("spread") or 0, q.get("spread") or 0), max(x.sd or 0, y.sd or 0)
        if theirs * ours < 0 and abs(theirs) > spreads[0] and abs(ours) > spreads[1]:
            turned.append((a, b, theirs, ours) if (theirs > 0) != (column[1] in LOWER) else (b, a, -theirs, -ours))
    scores = [p["score"] for _, p, _ in sides], [x.mean for *_, x in sides]
    tau = float(np.asarray(stats.kendalltau(*scores))[0]) if pairs else math.nan
    return Order(*column, pairs, same, tau if math.isfinite(tau) else None, turned)


def place(path: str) -> tuple[int | None, str]:
    """The layer and the matrix of a parameter's path: the first component that is or ends in a number tells the layer.

    >>> place("encoder/layer_0/attention/query/kernel")
    (0, 'encoder/attention/query/kernel')
    >>> place("embeddings/word/kernel")
    (None, 'embeddings/word/kernel')
    """
    parts = path.split("/")
    for i, part in enumerate(parts):
        number = re.search(r"(?:^|[_.])(\d+)$", part)
        if number and len(parts) > 1:
            return int(number[1]), "/".join(parts[:i] + parts[i + 1 :])
    return None, path


def allocation(runs: Sequence[dict], task: str) -> dict[str, float]:
    """Path -> what trains of it, the mean over seeds: AdaLoRA's ranks, or else the share of a matrix's entries."""
    found: dict[str, list[float]] = {}
    for r in runs:
        if r["task"] != task:
            continue
        for path, value in (r.get("allocation") or {}).items():
            if is_rank(r["method"]):
                found.setdefault(path, []).append(value)
            elif (r.get("sizes") or {}).get(path):
                found.setdefault(path, []).append(value / r["sizes"][path])
    return {path: statistics.fmean(values) for path, values in found.items()}


def is_rank(method: str) -> bool:
    """Whether the method's allocation are ranks, not entries."""
    return "adalora" in method


def heat(values: Mapping[str, float]) -> tuple[list[str], list[int | None], np.ndarray]:
    """Rows (matrices), columns (layers; None last, for paths without one) and values (rows, columns), NaN where none.

    What all matrices of layers begin or end with is left out of their names.
    """
    placed = {path: place(path) for path in values}
    layered = list(dict.fromkeys(name for layer, name in placed.values() if layer is not None))
    loose = [name for layer, name in placed.values() if layer is None]
    layers: list[int | None] = [*sorted({layer for layer, _ in placed.values() if layer is not None})]
    layers += [None] if loose else []
    names = [*_trimmed(layered), *loose]
    grid = np.full((len(names), len(layers)), np.nan)
    for path, (layer, name) in placed.items():
        row = layered.index(name) if layer is not None else len(layered) + loose.index(name)
        grid[row, layers.index(layer)] = values[path]
    return names, layers, grid


def _trimmed(names: Sequence[str]) -> list[str]:
    """Names without the components that all of them begin or end with.

    >>> _trimmed(["bert/query/kernel", "bert/ffn/up/kernel"])
    ['query', 'ffn/up']
    """
    parts = [name.split("/") for name in names]
    while len(parts) > 1 and all(len(p) > 1 and p[0] == parts[0][0] for p in parts):
        parts = [p[1:] for p in parts]
    while len(parts) > 1 and all(len(p) > 1 and p[-1] == parts[0][-1] for p in parts):
        parts = [p[:-1] for p in parts]
    return ["/".join(p) for p in parts]


def ranked(study: Study, task: str) -> dict[str, dict[int, Mean]]:
    """Method without its rank -> {rank: headline over seeds}; of a DyLoRA also its scores cut to each rank.

    Those of one rank alone are no ablation and are left out.
    """
    out: dict[str, dict[int, list[float]]] = {}
    metric = study.headline[task]
    for method, runs in study.runs.items():
        rank = re.search(r"\brank=(\d+)", method)
        for r in runs:
            if r["task"] != task:
                continue
            if rank:
                name = without_rank(method)
                out.setdefault(name, {}).setdefault(int(rank[1]), []).append(r["scores"].get(metric))
            for cut, scores in (r.get("by_rank") or {}).items():
                out.setdefault(f"{method}, cut to the rank", {}).setdefault(int(cut), []).append(scores.get(metric))
    means = {
        name: {rank: m for rank, v in sorted(points.items()) if (m := mean([x for x in v if x is not None]))}
        for name, points in out.items()
    }
    return {name: points for name, points in means.items() if len(points) > 1}


def without_rank(method: str) -> str:
    """The method's text without its argument `rank`.

    >>> without_rank("lora(rank=8)+bitfit"), without_rank("lora(alpha=16, rank=8)"), without_rank("lora(rank=8, a=1)")
    ('lora+bitfit', 'lora(alpha=16)', 'lora(a=1)')
    """
    text = re.sub(r",\s*rank=\d+|\brank=\d+\s*(,\s*)?", "", method)
    return text.replace("()", "")


def curve(runs: Sequence[dict], task: str, metric: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Steps, mean and standard deviation over seeds (n - 1; zeros of one) of the training loss or of an evaluation.

    Args:
      metric: of the evaluations; None: the training loss, a running mean over a fortieth of the points to either side.

    Seeds are brought to the steps of all by linear interpolation, within the steps that every seed has.
    """
    series = []
    for r in runs:
        points = [(h["step"], _value(h, metric)) for h in r.get("history") or () if r["task"] == task]
        points = sorted((step, value) for step, value in points if value is not None)
        if points:
            steps, values = np.asarray(points, float).T
            series.append((steps, values if metric else _smooth(values)))
    if not series:
        return None
    first, last = max(s[0] for s, _ in series), min(s[-1] for s, _ in series)
    steps = np.unique(np.concatenate([s for s, _ in series]))
    steps = steps[(steps >= first) & (steps <= last)]
    if not len(steps):
        return None
    lines = np.stack([np.interp(steps, s, v) for s, v in series])
    sd = lines.std(0, ddof=1) if len(lines) > 1 else np.zeros(len(steps))
    return steps, lines.mean(0), sd


def _value(entry: Mapping, metric: str | None) -> float | None:
    return entry.get("loss") if metric is None else (entry.get("eval") or {}).get(metric)


def _smooth(values: np.ndarray) -> np.ndarray:
    half = len(values) // 40
    return np.asarray([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])
