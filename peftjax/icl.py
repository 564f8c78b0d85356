"""Few-shot or fine-tune: a model with demonstrations in its prompt beside the same model trained, on one test set.

Every row of the table is scored on the same test inputs, in the same words, by the same metric: the most likely of the
choices, or a text written greedily. Beside its score stands what a query costs and, for what was trained, after how
many queries the training has cost less than demonstrations would have.
"""

import hashlib
import json
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.table import Table

from . import compare, costs, data, hub, icl_report
from .checkpoint import load_adapter, read_header, write_atomically
from .demonstrations import CONTENT_FREE, SELECTIONS, Asked, Bench, FewShot, Item, ask, wording
from .generate import Decoding, Writer, decoder
from .icl_report import BASE
from .likelihood import Likelihood
from .loop import NonFinite
from .methods import parse
from .methods.base import virtual_tokens
from .metrics import score
from .problem import prepare
from .quantize import quantized_as
from .run import Entry, check_writable, configuration, names_of, rate_of, run, short_hash
from .tasks import Row, Task, get_task
from .templates import Rendered
from .train import Settings
from .tree import Tree, flatten
from .weights import is_node

SHARES = {"accuracy", "exact_match", "gsm8k", "gsm8k_last"}  # metrics that are shares of right answers
SHOTS = (0, 1, 2, 4, 8)  # where nobody says; those that fit


def icl(
    model_name: str,
    task: str | Task,
    source: str | None = None,
    *,
    how: FewShot,
    methods: str | None = None,
    adapters: Sequence[str | Path] = (),
    rates: dict[str, float],
    out: str | Path,
    settings: Settings,
    watch: Callable = lambda title: nullcontext(lambda record: None),
    say: Callable[[str], Any] = print,
    **options: Any,
) -> tuple[Table, ...]:
    """Scores the base with demonstrations, adapters likewise, methods after training; writes the report.

    What is there already is not scored or trained again.

    Args:
      methods: to be trained on the same template, as on the command line; None: none.
      adapters: files, scored at all numbers of shots; one that was trained on conversations, in its chat template.
      rates: method name -> learning rate; '' stands for all others.
      out: `results.jsonl` (a line for each row, at once when it is done), `report.md`, `costs.png`, `runs/`.
      options: for `peftjax.problem.prepare`.

    Raises:
      ValueError: bad input, or demonstrations that do not fit into the context, before anything is scored.
    """
    task = get_task(task) if isinstance(task, str) else task
    _check(how, methods)
    out = check_writable(out)
    store = _Store(out / "results.jsonl")
    taken = max([read_header(file)["virtual_tokens"] for file in adapters], default=0)
    bench, chosen = _bench(model_name, task, source, how, methods, settings, dict(options))
    model = bench.problem.model
    files = _named(adapters)
    prompted = {BASE: model.params} | {name: load_adapter(file, model).params for name, file in files.items()}
    rated = _rated(bench, chosen, rates, settings, model_name)
    context = min(options.get("max_length") or model.max_length, model.max_length)
    spoken = {name: read_header(file)["extra"].get("chat_template") for name, file in files.items()}
    ways = {template: _fitting(bench, context, taken, template) for template in dict.fromkeys([None, *spoken.values()])}
    asked, left_out = ways[None][0], dict.fromkeys(note for _, notes in ways.values() for note in notes)
    plain = asked.get((0, 0)) or (ask(bench, 0, 0) if chosen else None)
    if plain is not None and chosen:
        _check_room(0, 0, plain, context, max(_virtual(bench, entry) for entry in chosen))
    notes = [*bench.problem.notes, *left_out, *(f"{e.name}: {e.note}" for e in chosen if e.note)]
    notes += [f"{file} is asked in the chat template that it was trained with" for file in spoken if spoken[file]]
    for note in notes:
        say(f"note: {note}")

    rows = []
    for name, params in prompted.items():
        mark, scorer = None if name == BASE else _digest_of(files[name]), None
        template = spoken.get(name)
        for (shots, seed), one in ways[template][0].items():
            config = _configuration(bench, shots, seed, mark, template)
            title = f"{name}, {shots} shot{'s' * (shots > 1)}, seed {seed}" if shots else f"{name}, zero-shot"
            done = store.get(config)
            if done is not None:
                say(f"{title}: already scored, taken from {store.file}")
            else:
                scorer = scorer or Scorer(bench, params)
                with watch(title):
                    done = store.add(scorer(one) | {"method": name, "shots": shots, "seed": seed, "config": config})
            rows.append(done | {"method": name} | ({} if name == BASE else _spent(files[name])))
    for entry, of_entry in zip(chosen, rated, strict=True):
        for seed in range(how.seeds):
            try:
                with watch(f"{entry.name} seed {seed}") as note:
                    own = replace(of_entry, seed=seed)
                    rows.append(_tuned(bench, entry, own, plain, store, out, say, note) | {"method": entry.name})
            except NonFinite as e:
                notes.append(f"{entry.name} seed {seed} is left out: {e}")
                say(notes[-1])
    lines, title = summarise(bench, rows), f"{Path(model_name).name} on {task.name}: few-shot or fine-tune"
    return icl_report.write(lines, title, [*_facts(bench, rows, settings if chosen else None), *notes], out)


def _check(how: FewShot, methods: str | None) -> None:
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
    template, words = wording(task, how.template, how.templates)
    split = options.pop("eval_split", None) or task.reported
    limits = [options.pop(name, None) for name in ("train_limit", "eval_limit")]
    for name, value in zip(("train_limit", "eval_limit"), limits, strict=True):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    all_rows = data.load_rows(task, source, "train")
    if task.kind == "classification":
        task = task._replace(labels=data.labels_of(task, all_rows))
        template, words = wording(task, how.template, how.templates)
    train = all_rows[: limits[0]]
    tested = _grouped(task, data.load_rows(task, source, split))[: limits[1]]
    dev = [] if split == "dev" or methods is None else data.load_rows(task, source, "dev")
    items = [_item(task, group, words, how, template) for group in tested]
    inputs = {tuple(group[0][c] for c in task.inputs) for group in tested}
    kept = [row for row in train if tuple(row[c] for c in task.inputs) not in inputs]
    notes = [] if len(kept) == len(train) else [f"{len(train) - len(kept)} training rows left out: they are tested on"]
    notes += [
        f"the first {n} {what} only" for n, what in zip(limits, ("training rows", f"{split} inputs"), strict=True) if n
    ]
    if not kept:
        raise ValueError(f"no training row of {task.name} is left that is not a test input")
    pool = [words(row) for row in kept]
    if how.select == "balanced" and not items[0].choices:
        raise ValueError(f"balanced demonstrations need a task with choices; {task.name} by {template!r} has none")

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
        max_length=max(task.max_length, Task._field_defaults["max_length"]),  # a template has words of its own
        made=lambda name: [{**row, **_columns(words(row))} for row in splits[name]],
        slots=task.slots,
    )
    options["eval_split"] = split
    if options.get("max_new_tokens") is None:
        options["max_new_tokens"] = 1 + max(map(len, targets))
    chosen: list[Entry] = []
    if methods is None:
        problem = prepare(model_name, derived, None, need_train=False, **options)
    else:
        problem, chosen = compare.set_up(model_name, derived, None, methods, settings, **options)
    if problem.model.fresh:
        raise ValueError(f"{model_name} holds no {list(problem.model.fresh)}; a model that answers must be trained")
    problem = problem._replace(notes=(*problem.notes, *notes))
    texts, buckets = [_text(task, row) for row in kept], options.get("max_buckets", 3)
    return Bench(how, task, template, items, pool, texts, problem, buckets), chosen


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


# Whether the prompts fit


def _fitting(
    bench: Bench, context: int, taken: int, template: str | None
) -> tuple[dict[tuple[int, int], Asked], list[str]]:
    """(shots, seed) -> the prompts, all of which fit; and a note on what does not, if nobody asked for it."""
    found, wanted = {}, sorted(SHOTS if bench.how.shots is None else bench.how.shots)
    for shots in wanted:
        try:
            of_seeds = {(shots, seed): ask(bench, shots, seed, template) for seed in _seeds(bench.how, shots)}
            for (_, seed), asked in of_seeds.items():
                _check_room(shots, seed, asked, context, taken)
        except ValueError as e:
            if bench.how.shots is None and shots > 0:
                return found, [f"{shots} shots and more are left out: {e}"]
            fits = ",".join(str(n) for n, _ in dict.fromkeys((n, 0) for n, _ in found))
            raise ValueError(f"{e}; what fits is --shots {fits}" if fits else str(e)) from None
        found |= of_seeds
    return found, []


def _check_room(shots: int, seed: int, asked: Asked, context: int, taken: int) -> None:
    longest = int(np.argmax(asked.lengths))
    if asked.lengths[longest] > context - taken:
        beside = f" beside {taken} virtual tokens" if taken else ""
        raise ValueError(
            f"{shots} shots do not fit into the context: test input {longest + 1} (seed {seed}) has "
            f"{asked.lengths[longest]} tokens with its demonstrations and answer, and there is room for "
            f"{context - taken}{beside}; ask for fewer shots, leave long inputs out (--eval-limit), or "
            "take a model with more positions"
        )


def _seeds(how: FewShot, shots: int) -> range:
    """One draw is all there is where nothing is drawn."""
    return range(1 if shots == 0 or how.select == "bm25" else how.seeds)


def _virtual(bench: Bench, entry: Entry) -> int:
    model, init = bench.problem.model, entry.method.init
    return virtual_tokens(jax.eval_shape(lambda p: init(jax.random.key(0), p, model.sites), model.params))


def _rated(
    bench: Bench, chosen: Sequence[Entry], rates: dict[str, float], settings: Settings, model_name: str
) -> list[Settings]:
    """The settings of each method with its learning rate; what cannot be trained is said here."""
    for name in rates:
        if name and not any(name in names_of(e) for e in chosen):
            raise ValueError(f"a learning rate is given for {name!r}; the methods are {[e.name for e in chosen]}")
    for entry in chosen:
        entry.method.planned(settings.steps or settings.epochs * bench.problem.steps_per_epoch(settings.batch_size))
    return [replace(settings, learning_rate=rate_of(e, rates, bench.problem.model, model_name)) for e in chosen]


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
        if bench.items[0].choices:
            self.likelihood = Likelihood(p.model, p.pad_id, how.batch_size, bench.buckets, jit=self._metered)
        else:
            how = Decoding(p.max_new_tokens, stop=(p.tokenizer.eos_token_id,))
            decode = decoder(p.model, how, p.pad_id)
            self.parts: dict[tuple, tuple[costs.Count, costs.Count]] = {}
            self.meter = costs.Meter(
                lambda params, b: decode(params, b["input_ids"], b["attention_mask"]), self._count_written
            )
            self.writer = Writer(p.model, p.tokenizer, how, lambda params, ids, mask, key: self._ask(params, ids, mask))

    def __call__(self, asked: Asked) -> dict:
        bench = self.bench
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
            ends = (bench.how.separator,)
            predictions = self.writer.complete(self.params, asked.prompts, until=ends, batch_size=bench.how.batch_size)
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

    def _ask(self, params: Tree, ids: Any, mask: Any) -> Any:
        return self.meter(params, {"input_ids": ids, "attention_mask": mask})

    def _metered(self, function: Callable) -> costs.Meter:
        model = self.bench.problem.model
        self.meter = costs.Meter(
            function, lambda params, batch, out, compiled: costs.forward(model, params, batch, compiled)
        )
        return self.meter

    def _count_written(self, params: Tree, batch: dict, tokens: Any, compiled: Any) -> costs.Count:
        """The prompts, and one step for each further token until the last row has ended."""
        p, (rows, length) = self.bench.problem, batch["input_ids"].shape
        if (rows, length) not in self.parts:
            self.parts[rows, length] = costs.decoding(p.model, params, rows, length, p.max_new_tokens)
        first, step = self.parts[rows, length]
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
    if metric in SHARES:
        right = np.array([[scores(bench, r["predictions"], [i])[metric] > 0 for i in range(n)] for r in runs])
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

    def get(self, config: dict) -> dict | None:
        return self.done.get(short_hash(config))

    def add(self, row: dict) -> dict:
        row = {"key": short_hash(row["config"])} | row
        self.done[row["key"]] = row
        write_atomically(self.file, "".join(json.dumps(r) + "\n" for r in self.done.values()))
        return row


def _configuration(bench: Bench, shots: int, seed: int, mark: str | None, template: str | None = None) -> dict:
    """All that a row depends on, as JSON; `mark` tells what was put on the base, `template` is of its conversations."""
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
        "buckets": bench.buckets,
        "max_new_tokens": None if bench.items[0].choices else p.max_new_tokens,
        "dtype": jax.numpy.dtype(p.model.module.dtype).name,
        "param_dtype": str(next(iter(flatten(p.model.params, is_leaf=is_node).values())).dtype),
        "quantize": quantized_as(p.model.params),
    }
    if template is not None:
        config["chat_template"] = template
    return json.loads(json.dumps(config))


def _digest_of(file: str | Path) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _named(files: Sequence[str | Path]) -> dict[str, Path]:
    """Adapter files by their names in a table: the file's, or its folder's; the whole path where two are alike."""
    paths = [Path(file) for file in dict.fromkeys(files)]
    short = [p.absolute().parent.name if p.stem == "adapter" else p.stem for p in paths]
    return {n if short.count(n) == 1 and n != BASE else str(p): p for n, p in zip(short, paths, strict=True)}


def _spent(file: Path) -> dict:
    """What the training of an adapter took, as far as its file and the result beside it say."""
    flops, beside = read_header(file)["extra"].get("training_flops"), file.with_name("result.json")
    if flops is None:
        return {}
    seconds = json.loads(beside.read_text())["seconds"] if beside.is_file() else None
    return {"training_flops": flops, "training_counted": costs.JAXPR, "training_seconds": seconds}


def _tuned(
    bench: Bench, entry: Entry, settings: Settings, asked: Asked | None, store: _Store, out: Path, say, report
) -> dict:
    """Trains a method, or takes a run that is done, and scores it zero-shot."""
    assert asked is not None  # prompts without demonstrations are made wherever a method is trained
    problem = bench.problem
    trained = short_hash(configuration(problem, entry.method, settings))
    config = _configuration(bench, 0, settings.seed, trained)
    if (done := store.get(config)) is not None:
        say(f"{entry.name} seed {settings.seed}: already trained and scored, taken from {store.file}")
        return done
    name = re.sub(r"[^a-zA-Z0-9.=+-]+", "_", entry.name).strip("_")[:80]
    new = out / "runs" / f"{name}-seed{settings.seed}-{trained}"
    folder = next((out / "runs").glob(f"*-{trained}"), new)
    result = run(problem, entry, settings, folder, report=report)
    params = load_adapter(folder / "adapter.safetensors", problem.model).params
    flops = result["training_flops"]
    spent = costs.training(problem, entry.method, settings) if flops is None else costs.Count(flops, costs.JAXPR)
    steps = settings.steps or settings.epochs * problem.steps_per_epoch(settings.batch_size)
    step = result["step_seconds"]
    row = {
        **Scorer(bench, params)(asked),
        "method": entry.name,
        "shots": 0,
        "seed": settings.seed,
        "trainable": result["trainable"],
        "training_flops": spent.flops,
        "training_counted": spent.by,
        "training_seconds": step * steps if step == step else result["seconds"],  # no number: of a single step
        "folder": folder.name,
        "config": config,
    }
    return store.add(row)


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
            line[key] = None if runs[0].get(key) is None else statistics.fmean(r[key] for r in runs)
        lines.append(line)
    return lines


def _command() -> str:
    """The verb, or the experiment that called it."""
    program = Path(sys.argv[0])
    own = program.parent.name == "experiments"
    return shlex.join([*(("python", f"experiments/{program.name}") if own else ("peftjax",)), *sys.argv[1:]])


def _facts(bench: Bench, rows: Sequence[dict], settings: Settings | None) -> list[str]:
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
    by = sorted({r["counted"] for r in rows} | {r["training_counted"] for r in rows if "training_counted" in r})
    who = {costs.XLA: "XLA's count of the programs", costs.ANALYTIC: "2 N T and the attention"}
    who |= {costs.JAXPR: "the equations of the training steps"}
    return [
        *facts,
        f"queries in batches of {how.batch_size}; FLOPs: {' and '.join(who[x] for x in by)}",
        f"activations {jax.numpy.dtype(p.model.module.dtype).name}"
        + (f"; the base's linear weights are quantised: {form}" if (form := quantized_as(p.model.params)) else ""),
        f"jax {jax.__version__}, {device.platform if device.platform == 'cpu' else device.device_kind}",
        f"command: `{_command()}`",
    ]
