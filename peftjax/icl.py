"""Few-shot or fine-tune: a model with demonstrations in its prompt beside the same model trained, on one test set.

Every row of the table is scored on the same test inputs, put in words by the same template, by the same metric: the most
likely of the choices, or a text written greedily. Beside its score stands what a query costs, and for what was trained,
after how many queries the training has cost less than demonstrations would have.
"""

import hashlib
import json
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import compare, costs, data, hub
from .checkpoint import load_adapter, read_header, write_atomically
from .demonstrations import SELECTIONS, SEPARATOR, join, select, wording
from .generate import Decoding, complete, decoder
from .likelihood import Likelihood, Pair, encode_pair
from .methods import parse
from .methods.base import virtual_tokens
from .metrics import score
from .problem import Problem, prepare
from .quantize import quantized_as
from .run import Entry, check_writable, configuration, names_of, rate_of, run, short_hash
from .tasks import Row, Task, get_task
from .templates import Rendered
from .train import NonFinite, Settings
from .tree import Tree, flatten
from .weights import is_node

SHOTS = (0, 1, 2, 4, 8)  # where nobody says; those that fit
CONTENT_FREE = ("N/A", "", "[MASK]")
BASE = "base"


class FewShot(NamedTuple):
    """How demonstrations are chosen and answers scored.

    Attributes:
      shots: numbers of demonstrations; None: those of `SHOTS` that fit.
      select: one of `peftjax.demonstrations.SELECTIONS`.
      seeds: sets of demonstrations drawn, and trainings of each method, counted from 0.
      template: name; None: the task's first.
      calibrate: divide by the probabilities after a query without content (`calibrated`).
      normalize: rank choices by log-likelihood a token, not by that of the whole.
      separator: between demonstrations; a generated text ends before it.
      batch_size: prompts at once; of a task with choices, prompts with one of them.
    """

    shots: tuple[int, ...] | None = None
    select: str = "random"
    seeds: int = 1
    template: str | None = None
    calibrate: bool = False
    normalize: bool = False
    separator: str = SEPARATOR
    batch_size: int = 16


class Item(NamedTuple):
    """A test input.

    Attributes:
      text: its columns, to find similar rows by.
      input: in words.
      choices, answer: of a task with choices: the texts, and the number of the right one.
      free: the input in words with its columns replaced by each of `CONTENT_FREE`.
      references, slots: of a generation task.
    """

    text: str
    input: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    free: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    slots: tuple[str, ...] | None = None


class Bench(NamedTuple):
    """What all rows of the table share.

    Attributes:
      how, task, template: as asked for.
      items: the test inputs.
      pool: the training rows in words, to draw demonstrations from; `texts`: their columns.
      problem: the model and its tokenizer, and the text-to-text task for training.
    """

    how: FewShot
    task: Task
    template: str
    items: list[Item]
    pool: list[Rendered]
    texts: list[str]
    problem: Problem

    @property
    def encodes(self) -> bool:
        return self.problem.model.family.start_id is not None


def icl(
    model_name: str,
    task: str | Task,
    source: str | None = None,
    *,
    how: FewShot = FewShot(),
    methods: str | None = None,
    adapters: Sequence[str | Path] = (),
    rates: dict[str, float] | None = None,
    out: str | Path,
    settings: Settings = Settings(),
    watch: Callable = lambda title: nullcontext(lambda record: None),
    say: Callable[[str], Any] = print,
    **options: Any,
) -> tuple[Table, ...]:
    """Scores the base with demonstrations, adapters likewise, methods after training; writes the report.

    Args:
      methods: to be trained on the same template, as on the command line; None: none.
      adapters: files, scored at all numbers of shots.
      rates: method name -> learning rate; '' stands for all others.
      out: `results.jsonl` (a line for each row, at once when it is done), `report.md`, `costs.png`, `runs/`.
      options: for `peftjax.problem.prepare`.

    Raises:
      ValueError: bad input, or demonstrations that do not fit into the context, before anything is scored.
    """
    task = get_task(task) if isinstance(task, str) else task
    _check(how, methods, settings)
    out = check_writable(out)
    bench, chosen = _bench(model_name, task, source, how, methods, settings, dict(options))
    model = bench.problem.model
    room = min(options.get("max_length") or model.max_length, model.max_length)
    taken = [read_header(file)["virtual_tokens"] for file in adapters]  # all files are read before anything is scored
    rates, rated = rates or {}, []
    for name in rates:
        if name and not any(name in names_of(e) for e in chosen):
            raise ValueError(f"a learning rate is given for {name!r}; the methods are {[e.name for e in chosen]}")
    for entry in chosen:
        rated.append(replace(settings, learning_rate=rate_of(entry, rates, model, model_name)))
        entry.method.planned(settings.steps or settings.epochs * bench.problem.steps_per_epoch(settings.batch_size))
    notes = list(bench.problem.notes)
    asked, left_out = _fitting(bench, room - max(taken, default=0))
    if chosen:
        _check_room(
            bench, 0, 0, asked[0, 0] if (0, 0) in asked else _asked(bench, 0, 0), room - _virtual(bench, chosen)
        )
    notes += left_out
    for note in (*notes, *(f"{e.name}: {e.note}" for e in chosen if e.note)):
        say(f"note: {note}")

    store, rows = _Store(out / "results.jsonl"), []
    for name, load in _prompted(bench, adapters):
        mark, scorer = None if name == BASE else _digest_of(name), None
        for (shots, seed), questions in asked.items():
            config = _configuration(bench, shots, seed, mark)
            if (done := store.done.get(short_hash(config))) is not None:
                say(f"{_title(name, shots, seed)}: already scored, taken from {store.file}")
            else:
                scorer = scorer or Scorer(bench, load())
                with watch(_title(name, shots, seed)):
                    done = scorer(questions) | {"method": name, "shots": shots, "seed": seed, "config": config}
                store.add(done)
            rows.append(done)
    zero = asked.get((0, 0)) or (_asked(bench, 0, 0) if chosen else None)
    for entry, of_entry in zip(chosen, rated, strict=True):
        for seed in range(how.seeds):
            own = replace(of_entry, seed=seed)
            try:
                with watch(f"{entry.name} seed {seed}") as note:
                    rows.append(_tuned(bench, entry, own, zero, store, out, say, note))
            except NonFinite as e:
                notes.append(f"{entry.name} seed {seed} is left out: {e}")
                say(notes[-1])
    title = f"{Path(model_name).name} on {task.name}: few-shot or fine-tune"
    return write(bench, rows, title, [*_facts(bench, settings if chosen else None), *notes], out)


def _check(how: FewShot, methods: str | None, settings: Settings) -> None:
    if how.shots is not None and (not how.shots or min(how.shots) < 0 or len(set(how.shots)) < len(how.shots)):
        raise ValueError(f"shots must be different numbers from 0 on, such as 0,1,2,4; got {how.shots}")
    if how.select not in SELECTIONS:
        raise ValueError(f"there is no selection {how.select!r}; there are {', '.join(SELECTIONS)}")
    if how.seeds < 1 or how.batch_size < 1:
        raise ValueError(f"seeds and query_batch must be at least 1; got {how.seeds} and {how.batch_size}")
    if not how.separator:
        raise ValueError("the separator is empty; write what stands between demonstrations, such as a blank line")
    if methods not in (None, "all"):
        parse(methods)


# The test inputs, the pool, and the same as a text-to-text task


def _bench(
    model_name: str,
    task: Task,
    source: str | None,
    how: FewShot,
    methods: str | None,
    settings: Settings,
    options: dict,
) -> tuple[Bench, list[Entry]]:
    if task.kind == "regression":
        raise ValueError(f"{task.name} is a regression; few-shot learning needs a task with labels or texts")
    template, words = wording(task, how.template)
    split = options.pop("eval_split", None) or task.reported
    limits = [options.pop(name, None) for name in ("train_limit", "eval_limit")]
    for name, value in zip(("train_limit", "eval_limit"), limits, strict=True):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    all_rows = data.load_rows(task, source, "train")
    if task.kind == "classification":
        task = task._replace(labels=data.labels_of(task, all_rows))
        template, words = wording(task, how.template)
    train = all_rows[: limits[0]]
    tested = _grouped(task, data.load_rows(task, source, split))[: limits[1]]
    dev = [] if split == "dev" or methods is None else data.load_rows(task, source, "dev")
    items = [_item(task, group, words, how, template) for group in tested]
    inputs = {tuple(group[0][c] for c in task.inputs) for group in tested}
    kept = [row for row in train if tuple(row[c] for c in task.inputs) not in inputs]
    notes = [] if len(kept) == len(train) else [f"{len(train) - len(kept)} training rows left out: they are tested on"]
    notes += [f"the first {n} {what} only" for n, what in zip(limits, ("training rows", f"{split} inputs")) if n]
    if not kept:
        raise ValueError(f"no training row of {task.name} is left that is not a test input")
    pool = [words(row) for row in kept]

    tokenizer = hub.load_tokenizer(model_name)
    targets = tokenizer([f" {r.target}" for r in pool], add_special_tokens=False, verbose=False)["input_ids"]
    splits = {"train": kept, "dev": dev, split: [row for group in tested for row in group]}
    derived = Task(
        f"{task.name} by {template}",
        "generation",
        inputs=("input",),
        target="target",
        metrics=("exact_match",) if items[0].choices else task.metrics,
        truncate=task.truncate,
        made=lambda name: [{**row, **_columns(words(row))} for row in splits[name]],
        slots=task.slots,
    )
    options |= {"eval_split": split, "max_new_tokens": 1 + max(map(len, targets))}
    chosen: list[Entry] = []
    if methods is None:
        problem = prepare(model_name, derived, None, need_train=False, **options)
    else:
        problem, chosen = compare.set_up(model_name, derived, None, methods, settings.layout, **options)
    if problem.model.fresh:
        raise ValueError(f"{model_name} holds no {list(problem.model.fresh)}; a model that answers must be trained")
    problem = problem._replace(notes=(*problem.notes, *notes))
    return Bench(how, task, template, items, pool, [_text(task, row) for row in kept], problem), chosen


def _columns(r: Rendered) -> dict[str, str]:
    return {"input": r.input, "target": r.target}


def _text(task: Task, row: Row) -> str:
    return " ".join(row[c] for c in task.inputs)


def _grouped(task: Task, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one test input together: a generation task may have several references for it."""
    if task.kind != "generation":
        return [[row] for row in rows]
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[c] for c in task.inputs)].append(row)
    return list(groups.values())


def _item(task: Task, group: list[Row], words: Callable, how: FewShot, template: str) -> Item:
    row, read = group[0], words(group[0])
    if not read.choices:
        if how.calibrate:
            raise ValueError(f"--calibrate needs a task with choices; {task.name} by template {template!r} has none")
        slots = None if task.slots is None else tuple(task.slots(row))
        return Item(_text(task, row), read.input, references=tuple(words(r).target for r in group), slots=slots)
    if read.target not in read.choices:
        raise ValueError(f"template {template!r}: the answer {read.target!r} is none of {read.choices}")
    free = tuple(words({**row, **dict.fromkeys(task.inputs, x)}).input for x in CONTENT_FREE) if how.calibrate else ()
    return Item(_text(task, row), read.input, read.choices, read.choices.index(read.target), free)


# Prompts


class Asked(NamedTuple):
    """The prompts of one row of the table.

    Attributes:
      prompts: one for each item.
      pairs: of a task with choices: all (prompt, choice), each once.
      choices: item -> the pairs of its choices.
      free: item -> content-free input -> the pairs of its choices.
      counted: so many of the pairs are what queries cost; the others are there once for all queries.
      lengths: tokens of each item's longest text that has to fit.
      prompt_tokens: mean.
    """

    prompts: list[str]
    pairs: list[Pair]
    choices: list[list[int]]
    free: list[list[list[int]]]
    counted: int
    lengths: list[int]
    prompt_tokens: float


def _asked(bench: Bench, shots: int, seed: int) -> Asked:
    how, tokenizer = bench.how, bench.problem.tokenizer
    answers, queries = [r.target for r in bench.pool], [item.text for item in bench.items]
    sets = select(how.select, bench.texts, answers, queries, shots, seed)
    shown = [[bench.pool[i] for i in one] for one in sets]
    prompts = [join(s, item.input, how.separator) for s, item in zip(shown, bench.items, strict=True)]
    if not bench.items[0].choices:
        begin = 0 if bench.encodes or tokenizer.bos_token_id is None else 1
        ids = tokenizer(prompts, add_special_tokens=bench.encodes, verbose=False)["input_ids"]
        lengths = [begin + len(x) for x in ids]
        more = 0 if bench.encodes else bench.problem.max_new_tokens
        return Asked(prompts, [], [], [], 0, [n + more for n in lengths], statistics.fmean(lengths))
    numbers: dict[tuple[str, str], int] = {}

    def number(prompt: str, item: Item) -> list[int]:
        return [numbers.setdefault((prompt, " " + choice), len(numbers)) for choice in item.choices]

    choices = [number(prompt, item) for prompt, item in zip(prompts, bench.items, strict=True)]
    queries_end = len(numbers)
    free = [
        [number(join(s, text, how.separator), item) for text in item.free]
        for s, item in zip(shown, bench.items, strict=True)
    ]
    pairs = [encode_pair(tokenizer, *texts, encodes=bench.encodes) for texts in numbers]
    sizes = [len(x) if bench.encodes else len(x) + len(y) for x, y in pairs]
    of_item = [[*c, *(i for one in f for i in one)] for c, f in zip(choices, free, strict=True)]
    once = len(set(sets)) == 1  # then the content-free prompts are the same for all queries, however many
    return Asked(
        prompts,
        pairs,
        choices,
        free,
        queries_end if once else len(pairs),
        [max(sizes[i] for i in one) for one in of_item],
        statistics.fmean(len(pairs[c[0]][0]) for c in choices),
    )


def _fitting(bench: Bench, room: int) -> tuple[dict[tuple[int, int], Asked], list[str]]:
    """(shots, seed) -> the prompts, all of which fit; and a note on what does not, if nobody asked for it."""
    found, wanted = {}, sorted(bench.how.shots or SHOTS)
    for shots in wanted:
        try:
            for seed in _seeds(bench.how, shots):
                asked = _asked(bench, shots, seed)
                _check_room(bench, shots, seed, asked, room)
                found[shots, seed] = asked
        except ValueError as e:
            if bench.how.shots is not None or shots == 0:
                fits = [str(s) for s in wanted if s < shots]
                raise ValueError(f"{e}; write --shots {','.join(fits)}" if fits else str(e)) from None
            return {k: v for k, v in found.items() if k[0] < shots}, [f"{shots} shots and more are left out: {e}"]
    return found, []


def _check_room(bench: Bench, shots: int, seed: int, asked: Asked, room: int) -> None:
    longest = int(np.argmax(asked.lengths))
    if asked.lengths[longest] > room:
        raise ValueError(
            f"{shots} shots do not fit into the context: test input {longest + 1} (seed {seed}) has "
            f"{asked.lengths[longest]} tokens with its demonstrations and answer, and there is room for {room}"
        )


def _seeds(how: FewShot, shots: int) -> range:
    """One draw is all there is where nothing is drawn."""
    return range(1 if shots == 0 or how.select == "bm25" else how.seeds)


def _virtual(bench: Bench, chosen: Sequence[Entry]) -> int:
    model = bench.problem.model

    def taken(entry: Entry) -> int:
        init = entry.method.init
        return virtual_tokens(jax.eval_shape(lambda p: init(jax.random.key(0), p, model.sites), model.params))

    return max(map(taken, chosen))


# Scores


def calibrated(logprobs: np.ndarray, free: np.ndarray) -> np.ndarray:
    """`log(W p)`, W = diag(p_cf)^-1: Zhao et al. 2021 (arXiv:2102.09690), contextual calibration, with b = 0.

    p are the choices' probabilities, made to sum to 1; p_cf is the mean of those after each content-free input.

    Args:
      logprobs: (choices), log-likelihoods after the query.
      free: (inputs, choices), after the content-free inputs.

    >>> p, free = np.log([0.6, 0.4]), np.log([[0.9, 0.1], [0.7, 0.3]])
    >>> np.exp(calibrated(p, free)).round(6).tolist()
    [0.75, 2.0]
    """
    from scipy.special import log_softmax, logsumexp

    p_free = logsumexp(log_softmax(free, axis=1), axis=0) - np.log(len(free))
    return log_softmax(logprobs) - p_free


class Scorer:
    """Scores one set of parameters; its functions compile once for each padded length.

    The result of a call: `predictions` (numbers of choices, or texts), `prompt_tokens`, `examples`, and of one query
    `flops`, who `counted` them, and `seconds`.
    """

    def __init__(self, bench: Bench, params: Tree):
        self.bench, self.params = bench, params
        p, how = bench.problem, bench.how
        few = len(p.buckets)
        if bench.items[0].choices:
            self.likelihood = Likelihood(p.model, p.pad_id, how.batch_size, few, jit=self._metered)
        else:
            self.decoding = Decoding(p.max_new_tokens, stop=(p.tokenizer.eos_token_id,))
            decode = decoder(p.model, self.decoding, p.pad_id)
            self.parts: dict[tuple, tuple[costs.Count, costs.Count]] = {}
            self.meter = costs.Meter(
                lambda params, b: decode(params, b["input_ids"], b["attention_mask"]), self._count_written
            )

    def __call__(self, asked: Asked) -> dict:
        bench, p = self.bench, self.bench.problem
        n = len(bench.items)
        if asked.pairs:
            found = self.likelihood(self.params, asked.pairs)
            calls, self.meter.calls = self.meter.calls, []
            each = np.array([f.logprob / (f.tokens if bench.how.normalize else 1) for f in found])
            predictions = []
            for choices, free in zip(asked.choices, asked.free, strict=True):
                ranked = calibrated(each[choices], each[np.array(free)]) if free else each[choices]
                predictions.append(int(ranked.argmax()))
            cost = costs.total(calls, asked.counted)
        else:
            predictions = complete(
                p.model,
                self.params,
                p.tokenizer,
                asked.prompts,
                self.decoding,
                until=(bench.how.separator,),
                batch_size=bench.how.batch_size,
                decode=lambda params, ids, mask, key: self.meter(params, {"input_ids": ids, "attention_mask": mask}),
            )
            predictions = [text.strip() for text in predictions]
            calls, self.meter.calls = self.meter.calls, []
            cost = costs.total(calls)
            cost = cost._replace(flops=cost.flops * n / cost.rows, seconds=cost.seconds * n / cost.rows)  # no fillers
        return {
            "scores": scores(bench, predictions),
            "predictions": predictions,
            "examples": n,
            "prompt_tokens": asked.prompt_tokens,
            "flops": cost.flops / n,
            "counted": cost.by,
            "seconds": cost.seconds / n,
        }

    def _metered(self, function: Callable) -> costs.Meter:
        model = self.bench.problem.model
        self.meter = costs.Meter(
            function, lambda params, batch, out, compiled: costs.forward(model, params, batch, compiled)
        )
        return self.meter

    def _count_written(self, params: Tree, batch: dict, tokens: Any, compiled: Any) -> costs.Count:
        """The prompts, and one step for each further token until the last row has ended."""
        p, shape = self.bench.problem, batch["input_ids"].shape
        if shape not in self.parts:
            self.parts[shape] = costs.decoding(p.model, params, *shape, p.max_new_tokens)
        first, step = self.parts[shape]
        ends = np.asarray(tokens) == p.tokenizer.eos_token_id
        written = int(np.where(ends.any(1), ends.argmax(1) + 1, ends.shape[1]).max())
        return costs.Count(first.flops + (written - 1) * step.flops, first.by)


def scores(bench: Bench, predictions: Sequence[Any], index: Sequence[int] | np.ndarray | None = None) -> dict:
    """The task's metrics on the items of these numbers, or on all."""
    at = range(len(predictions)) if index is None else [int(i) for i in index]
    items, given = [bench.items[i] for i in at], [predictions[i] for i in at]
    if items[0].choices:
        metrics = bench.task.metrics if bench.task.kind == "classification" else ("accuracy",)
        return score(metrics, given, [item.answer for item in items])
    slots = [list(item.slots or ()) for item in items] if bench.task.slots is not None else None
    return score(bench.task.metrics, given, [list(item.references) for item in items], slots)


def interval_of(bench: Bench, runs: Sequence[dict]) -> tuple[float, float] | None:
    """The 95% interval of the first metric, over the test inputs; of several seeds, that of their mean."""
    metric, n = next(iter(runs[0]["scores"])), len(bench.items)
    if metric == "accuracy":
        right = np.array([[p == i.answer for p, i in zip(r["predictions"], bench.items, strict=True)] for r in runs])
        hits = int(right.sum()) if len(runs) == 1 else None
        each = right.mean(0)
        return costs.interval(lambda index: 100.0 * float(each[index].mean()), n, hits=hits)

    def mean(index: np.ndarray) -> float:
        return statistics.fmean(scores(bench, r["predictions"], index)[metric] for r in runs)

    return costs.interval(mean, n, resamples=999 if bench.items[0].choices else 200)  # a corpus BLEU takes its time


# Rows


class _Store:
    """The rows done in this folder, one a line, by the hash of their configuration."""

    def __init__(self, file: Path):
        self.file, self.done = file, {}
        for line in file.read_text().splitlines() if file.is_file() else ():
            try:
                row = json.loads(line)
                self.done[row["key"]] = row
            except (json.JSONDecodeError, KeyError, TypeError) as e:
                raise ValueError(
                    f"{file} holds a line that is no row of this command ({e}); choose another --out"
                ) from e

    def add(self, row: dict) -> None:
        row["key"] = short_hash(row["config"])
        self.done[row["key"]] = row
        write_atomically(self.file, "".join(json.dumps(r) + "\n" for r in self.done.values()))


def _configuration(bench: Bench, shots: int, seed: int, mark: str | None) -> dict:
    """All that a row depends on, as JSON; `mark` tells what was put on the base."""
    p, how = bench.problem, bench.how
    pool = bench.pool if shots else []
    what = repr([bench.items, pool, bench.texts if shots and how.select == "bm25" else None])
    config = {
        "base": hub.fingerprint(p.model),
        "adapter": mark,
        "task": bench.task.name,
        "template": bench.template,
        "data": hashlib.sha256(what.encode()).hexdigest()[:16],
        "shots": shots,
        "select": how.select if shots else None,
        "seed": seed,
        "calibrate": how.calibrate,
        "normalize": how.normalize,
        "separator": how.separator if shots or not bench.items[0].choices else None,
        "batch_size": how.batch_size,
        "buckets": len(p.buckets),
        "max_new_tokens": None if bench.items[0].choices else p.max_new_tokens,
        "dtype": jax.numpy.dtype(p.model.module.dtype).name,
        "param_dtype": str(next(iter(flatten(p.model.params, is_leaf=is_node).values())).dtype),
        "quantize": quantized_as(p.model.params),
    }
    return json.loads(json.dumps(config))


def _digest_of(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _prompted(bench: Bench, adapters: Sequence[str | Path]) -> Iterator[tuple[str, Callable[[], Tree]]]:
    """What is scored with demonstrations: its name, and a function that gives its parameters."""
    model = bench.problem.model
    yield BASE, lambda: model.params
    for file in adapters:

        def load(file=file):
            return load_adapter(file, model).params

        yield str(file), load


def _title(name: str, shots: int, seed: int) -> str:
    return f"{name}, {shots} shots, seed {seed}" if shots else f"{name}, zero-shot"


def _tuned(
    bench: Bench, entry: Entry, settings: Settings, asked: Asked | None, store: _Store, out: Path, say, report
) -> dict:
    """Trains a method, or takes a run that is done, and scores it zero-shot."""
    assert asked is not None  # prompts without demonstrations are made wherever a method is trained
    problem = bench.problem
    trained = short_hash(configuration(problem, entry.method, settings))
    config = _configuration(bench, 0, settings.seed, trained)
    if (done := store.done.get(short_hash(config))) is not None:
        say(f"{entry.name} seed {settings.seed}: already trained and scored, taken from {store.file}")
        return done | {"method": entry.name}
    name = re.sub(r"[^a-zA-Z0-9.=+-]+", "_", entry.name).strip("_")[:80]
    new = out / "runs" / f"{name}-seed{settings.seed}-{trained}"
    folder = next((out / "runs").glob(f"*-{trained}"), new)
    result = run(problem, entry, settings, folder, report=report)
    params = load_adapter(folder / "adapter.safetensors", problem.model).params
    spent = costs.training(problem, entry.method, settings)
    steps = settings.steps or settings.epochs * problem.steps_per_epoch(settings.batch_size)
    step = result["step_seconds"]
    row = Scorer(bench, params)(asked) | {
        "method": entry.name,
        "shots": 0,
        "seed": settings.seed,
        "trainable": result["trainable"],
        "training_flops": spent.flops,
        "training_counted": spent.by,
        "training_seconds": result["seconds"] if step != step else step * steps,  # not a number: a single step
        "folder": folder.name,
        "config": config,
    }
    store.add(row)
    return row


# Report


def summarise(bench: Bench, rows: Sequence[dict]) -> list[dict]:
    """One line for each method and number of shots: means over the seeds, and the interval of the first metric."""
    groups: dict[tuple[str, int, bool], list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row["shots"], "training_flops" in row].append(row)
    lines = []
    for (name, shots, trained), runs in groups.items():
        line: dict[str, Any] = {"method": name, "shots": shots, "trained": trained, "seeds": len(runs)}
        line["scores"] = {m: statistics.fmean(r["scores"][m] for r in runs) for m in runs[0]["scores"]}
        line["interval"] = interval_of(bench, runs)
        for key in ("prompt_tokens", "seconds", "flops", "training_flops", "training_seconds"):
            line[key] = statistics.fmean(r[key] for r in runs) if key in runs[0] else None
        lines.append(line)
    return lines


def best_shots(lines: Sequence[dict]) -> dict | None:
    """The base's line with the best first metric among those with demonstrations; None: there is none."""
    few = [line for line in lines if line["method"] == BASE and line["shots"] and not line["trained"]]
    return max(few, key=lambda line: next(iter(line["scores"].values())), default=None)


def queries(tuned: dict, few: dict, unit: str) -> float | None:
    """After how many queries the training of `tuned` has cost less than `few`; the unit is 'flops' or 'seconds'."""
    return costs.break_even(tuned[f"training_{unit}"], few[unit], tuned[unit])


def _said(value: float | None, form: str = ",.0f", factor: float = 1.0, none: str = "-") -> str:
    return none if value is None else format(value * factor, form)


def cells(line: dict, best: dict | None) -> dict[str, str]:
    """A line as text, by column. GFLOP are 10^9; the last two columns compare with the best number of shots."""
    metric = next(iter(line["scores"]))
    span = "-" if line["interval"] is None else "{:.1f} to {:.1f}".format(*line["interval"])
    out = {"method": line["method"], "shots": str(line["shots"])}
    for name, value in line["scores"].items():
        out[name] = f"{value:.2f}"
        if name == metric:
            out["95%"] = span
    out |= {
        "tokens": _said(line["prompt_tokens"]),
        "ms": _said(line["seconds"], ",.2f", 1e3),
        "GFLOP": _said(line["flops"], ",.4g", 1e-9),
        "trained s": _said(line["training_seconds"], ",.1f"),
        "trained GFLOP": _said(line["training_flops"], ",.0f", 1e-9),
    }
    for unit, column in (("flops", "pays after, by FLOP"), ("seconds", "by time")):
        compared = line["trained"] and best is not None
        out[column] = _said(queries(line, best, unit), none="never") if compared and best is not None else "-"
    return out


def verdict(lines: Sequence[dict]) -> str:
    """One sentence on the best trained method against the best number of shots; empty where there is none of one."""
    best = best_shots(lines)
    tuned = [line for line in lines if line["trained"]]
    if best is None or not tuned:
        return ""
    metric = next(iter(best["scores"]))
    top = max(tuned, key=lambda line: line["scores"][metric])
    better = "better" if top["scores"][metric] > best["scores"][metric] else "no better"
    paid = [
        f"after {n:,.0f} queries by {what}" if (n := queries(top, best, unit)) is not None else f"never by {what}"
        for unit, what in (("flops", "FLOPs"), ("seconds", "time"))
    ]
    return (
        f"{top['method']} is {better} than {best['shots']} shots ({metric} {top['scores'][metric]:.1f} against "
        f"{best['scores'][metric]:.1f}), and cheaper {' and '.join(paid)}"
    )


def write(bench: Bench, rows: Sequence[dict], title: str, facts: Sequence[str], folder: Path) -> tuple[Table, ...]:
    """Writes `report.md` and `costs.png`, and returns the table to print."""
    lines = summarise(bench, rows)
    best, answer = best_shots(lines), verdict(lines)
    texts = [cells(line, best) for line in lines]
    trained = any(line["trained"] for line in lines)
    wide = [c for c in texts[0] if trained or not (c.startswith(("trained", "pays")) or c == "by time")]
    plot(lines, title, folder / "costs.png")
    write_atomically(folder / "report.md", _markdown(lines, texts, wide, title, facts, answer))
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=answer or None)
    for column in wide:
        name = column == "method"
        out.add_column(column, justify="left" if name else "right", overflow="fold")
    for text in texts:
        out.add_row(*(Text(text[c]) for c in wide))
    return (out,)


def _markdown(lines, texts, wide, title, facts, answer) -> str:
    def table(head, body):
        return [
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(row) + " |" for row in body),
        ]

    counted = {line["flops"] is not None for line in lines}
    out = [f"# {title}", "", *([f"**{answer}.**", ""] if answer else []), *(f"- {fact}" for fact in facts), ""]
    out += table(wide, [[text[c] for c in wide] for text in texts])
    out += [
        "",
        "Metrics in percent, means over the seeds. 95%: of the first metric, over the test inputs: Wilson's interval of a "
        "share of right answers, otherwise the percentile bootstrap (of several seeds, of their mean). Tokens: of a "
        "prompt, mean. Ms and GFLOP: of one query, that is all its choices or its whole text, in batches; time without "
        "compilation, a median over batches. Trained: steps only, without compilation and evaluations.",
    ]
    tuned, few = [x for x in lines if x["trained"]], [x for x in lines if not x["trained"]]
    if tuned and few and counted:
        for unit, what in (("flops", "FLOPs"), ("seconds", "time")):
            head = ["cheaper after so many queries, by " + what]
            head += [f"{'' if x['method'] == BASE else x['method'] + ', '}{x['shots']} shots" for x in few]
            body = [[t["method"], *(_said(queries(t, x, unit), none="never") for x in few)] for t in tuned]
            out += ["", *table(head, body)]
        out += ["", "What an adapter given as a file has cost to train is not known here and does not count."]
    out += ["", "![total cost by number of queries](costs.png)"]
    return "\n".join(out) + "\n"


def plot(lines: Sequence[dict], title: str, file: Path) -> None:
    """Total FLOPs by the number of queries: demonstrations cost with every query, training once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tuned = [line for line in lines if line["trained"]]
    few = [line for line in lines if not line["trained"]]
    crossings = [n for t in tuned for f in few if (n := queries(t, f, "flops")) is not None]
    most = 10.0 ** np.ceil(np.log10(max([1e4, *(10 * n for n in crossings if n < 1e9)])))
    n = np.geomspace(1, most, 200)
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, max(len(few), 2)))
    for line, colour in zip(few, shades, strict=False):
        name = f"{'' if line['method'] == BASE else line['method'] + ', '}{line['shots']} shots"
        ax.plot(n, n * line["flops"], color=colour, label=name)
    for i, line in enumerate(tuned):
        total = line["training_flops"] + n * line["flops"]
        ax.plot(n, total, "--", color=f"C{(i + 1) % 10}", linewidth=2, label=f"{line['method']}, trained")
    ax.set(xscale="log", yscale="log", xlabel="queries", ylabel="FLOPs in all", title=title)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=10)
    fig.savefig(file, dpi=150)
    plt.close(fig)


def _facts(bench: Bench, settings: Settings | None) -> list[str]:
    how, p = bench.how, bench.problem
    device = jax.devices()[0]
    ranked = "the text written greedily"
    if bench.items[0].choices:
        ranked = "the most likely choice" + (" by likelihood a token" if how.normalize else "")
        ranked += ", calibrated by " + ", ".join(map(repr, CONTENT_FREE)) if how.calibrate else ""
    facts = [
        f"{len(bench.items):,} test inputs, {len(bench.pool):,} training rows; template `{bench.template}`; {ranked}",
        f"demonstrations: {how.select}, joined by {how.separator!r}; {how.seeds} seed{'s' * (how.seeds > 1)}",
    ]
    if settings is not None:
        length = f"{settings.steps} steps" if settings.steps else f"{settings.epochs} epochs"
        facts.append(f"methods: {length}, batches of {settings.batch_size}, on the same template, scored zero-shot")
    return [
        *facts,
        f"activations {p.model.module.dtype.name}; base {quantized_as(p.model.params) or 'not quantised'}",
        f"jax {jax.__version__}, {device.platform if device.platform == 'cpu' else device.device_kind}",
        f"command: `{shlex.join(['peftjax', *sys.argv[1:]])}`",
    ]
