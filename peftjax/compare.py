"""The verbs: compare methods on one model and task, train one, evaluate, merge or combine adapters."""

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table

from . import devices, hub, memory, report
from .arithmetic import Combined, adapter, check_choices, combine_updates, difference, updates
from .chat import adopt_template
from .checkpoint import base_of, load_adapter, read_header, save_adapter
from .data import load_rows
from .generate import Decoding
from .hub import Model
from .layout import stack_layers
from .loop import MAY_DIFFER, NonFinite
from .methods import Method, at_rank, build, chain, parse
from .methods.base import virtual_tokens
from .metrics import score
from .problem import Evaluator, Problem, prepare, with_head_of_seed
from .proxy import proxy, same_words
from .run import (
    ZERO_SHOT,
    Entry,
    Job,
    Open,
    check_writable,
    configuration,
    cut_off,
    entries_for,
    names_of,
    rate_of,
    run,
    run_together,
    short_hash,
    zero_shot,
)
from .tasks import Chats, Task, get_task
from .train import Settings, make_optimizer, start
from .tree import count, partition

# of an adapter file's extras, what holds for a combination too
KEPT = ("task", "labels", "num_labels", "chats", "chat_template")


def compare(
    model_name: str,
    task: str,
    source: str | None,
    *,
    methods: str | None,
    seeds: int,
    rates: dict[str, float],
    out: str | Path,
    settings: Settings,
    lanes: int | None = None,
    watch: Callable = lambda title: nullcontext(lambda record: None),
    say: Callable[[str], Any] = print,
    log: Sequence[Open] = (),
    **options: Any,
) -> tuple[Table, ...]:
    """Trains every method with every seed and writes the report; what is there already is not trained again.

    The seeds of a method, and LoRAs that differ in rank alone, train in one program where the memory allows it.

    Args:
      methods: as on the command line (`peftjax.methods.parse`); 'all'; None: a selection of every kind.
      seeds: how many, counted from 0; a seed fixes the data order, the methods' start, dropout and the head.
      rates: method name -> learning rate; '' stands for all others.
      lanes: how many runs are computed at once in a program; default: what the memory allows, on a CPU one.
      log: what makes the loggers of each run (`peftjax.loggers.openers`).
      options: for `peftjax.problem.prepare`.

    Raises:
      ValueError: bad input, before anything is trained. A method whose loss stops being finite is left out
        of the table and said; if none remains, that is an error.
    """
    if methods not in (None, "all"):
        parse(methods)  # what can be wrong is found before anything costs time
    get_task(task)
    for name, value in {"seeds": seeds, "lanes": lanes}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    out = check_writable(out)
    problem, chosen = set_up(model_name, task, source, methods, settings, **options)
    for name in rates:
        if name and not any(name in names_of(e) for e in chosen):
            raise ValueError(f"a learning rate is given for {name!r}; the methods are {[e.name for e in chosen]}")
    evaluator, results = Evaluator(problem), []
    rated = [
        dataclasses.replace(settings, learning_rate=rate_of(e, rates, problem.model, model_name)) for e in chosen
    ]  # all, before anything is trained
    check_plans(problem, chosen, settings)
    _say_notes(problem, chosen, say)
    if not problem.model.fresh:
        with watch(ZERO_SHOT):
            folder = out / "runs" / f"{ZERO_SHOT}-{short_hash(configuration(problem, None, None))}"
            results.append(zero_shot(problem, folder, evaluator=evaluator))
    runs = [
        (entry, dataclasses.replace(own, seed=seed))
        for entry, own in zip(chosen, rated, strict=True)
        for seed in range(seeds)
    ]
    trained, left_out = _train_all(_jobs(problem, runs, out), evaluator, lanes, watch, say, log)
    results += trained
    title = f"{Path(model_name).name} on {task}"
    return report.write(results, problem.task.headline, title, [*_facts(problem, settings, options), *left_out], out)


def _jobs(problem: Problem, runs: Iterable[tuple[Entry, Settings]], out: Path) -> list[Job]:
    """The runs with their folders, one for each configuration: what is there already, however it was written then."""
    jobs, folders = [], {}
    for entry, settings in runs:
        name = re.sub(r"[^a-zA-Z0-9.=+-]+", "_", entry.name).strip("_")[:80]
        h = short_hash(configuration(problem, entry.method, settings))
        if h not in folders:
            new = out / "runs" / f"{name}-seed{settings.seed}-{h}"
            folders[h] = next((out / "runs").glob(f"*-seed*-{h}"), new)
        jobs.append(Job(with_head_of_seed(problem, settings.seed), entry, settings, folders[h]))
    return jobs


def _train_all(
    jobs: Sequence[Job],
    evaluator: Evaluator,
    lanes: int | None,
    watch: Callable,
    say: Callable,
    log: Sequence[Open],
) -> tuple[list[dict], list[str]]:
    """Results in the order of the jobs, those in one program together; and what is left out, with the reason.

    Raises:
      ValueError: nothing is left.
    """
    found: dict[Path, dict | NonFinite] = {}
    for job in jobs:
        if (job.folder / "result.json").is_file():
            say(f"{_title(job)}: already trained, taken from {job.folder}")
            found[job.folder] = run(*job, evaluator=evaluator)
    for group, at_once in _programs([*{job.folder: job for job in jobs}.values()], lanes):
        with watch(_titles(group)) as note:
            ended = run_together(group, lanes=at_once, evaluator=evaluator, report=note, log=log)
        for job, result in zip(group, ended, strict=True):
            found[job.folder] = result
            if isinstance(result, NonFinite):
                say(_left_out(job, result))
    ended = [(job, found[job.folder]) for job in jobs]
    results = [r | {"method": job.entry.name} for job, r in ended if not isinstance(r, NonFinite)]
    if not results:
        raise ValueError("no run finished with a finite loss; try smaller learning rates with --lr")
    return results, [_left_out(job, e) for job, e in ended if isinstance(e, NonFinite)]


def _left_out(job: Job, why: NonFinite) -> str:
    return f"{_title(job)} is left out: {why}"


def _programs(jobs: Sequence[Job], lanes: int | None) -> Iterator[tuple[list[Job], int]]:
    """What is to be trained in one program, and how many of it at once: what was cut off as it was, then by kin."""
    begun = cut_off(jobs)
    for group in begun:
        yield group, room(group, lanes)[1]
    there, alike = {job.folder for group in begun for job in group}, {}
    for job in jobs:
        if job.folder not in there and not (job.folder / "result.json").is_file():
            alike.setdefault(kin(job.entry.method, job.settings), []).append(job)
    for group in alike.values():
        size, at_once = room(group, lanes)
        for i in range(0, len(group), size):
            yield group[i : i + size], min(at_once, size)


def room(jobs: Sequence[Job], lanes: int | None) -> tuple[int, int]:
    """`memory.room_for` runs as large as the largest of these."""
    if len(jobs) == 1:
        return 1, 1
    largest = max(jobs, key=lambda job: sum(a.get("rank", 0) for _, a in job.entry.method.spec))
    return memory.room_for(_case(largest), devices.present(), len(jobs), lanes)


def _case(job: Job) -> memory.Case:
    problem, settings = job.problem, job.settings
    batch = problem.largest_batch(settings.batch_size)
    settings = dataclasses.replace(settings, steps=_steps(problem, settings))
    return memory.Case(
        lambda **_: problem.model, lambda _: job.entry.method, lambda _: batch, problem.task.kind, settings
    )


RANKED = ("lora", "lora_fa", "lora_plus")  # whose ranks train in one program


def kin(method: Method, settings: Settings) -> str:
    """What runs in one program have in common."""
    free = {name: {"rank", "alpha"} if name in RANKED else set() for name, _ in method.spec}
    spec = [(name, {k: v for k, v in a.items() if k not in free[name]}) for name, a in method.spec]
    same = {k: v for k, v in dataclasses.asdict(settings).items() if k not in MAY_DIFFER}
    return json.dumps([spec, same], sort_keys=True)


def _title(job: Job) -> str:
    return f"{job.entry.name} seed {job.settings.seed}"


def _titles(jobs: Sequence[Job]) -> str:
    """What the progress bar calls the runs of a program."""
    names = list(dict.fromkeys(job.entry.name for job in jobs))
    if len(jobs) == 1:
        return _title(jobs[0])
    said = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"{said}, {len(jobs)} runs"


def train(
    model_name: str,
    task: str | Task,
    source: str | None,
    *,
    method: str,
    rate: float | None,
    out: str | Path,
    settings: Settings,
    watch: Callable = lambda title: nullcontext(lambda record: None),
    say: Callable[[str], Any] = print,
    log: Sequence[Open] = (),
    **options: Any,
) -> dict:
    """Trains one method into a folder; see `peftjax.run.run` for what it holds and returns.

    Raises:
      ValueError: bad input, or a folder that holds another run.
      NonFinite, Interrupted: from training; the state is kept.
    """
    if len(parse(method)) != 1:
        raise ValueError(f"train takes one method (chain several with +); got {method!r}")
    if isinstance(task, str):
        get_task(task)
    out = check_writable(out)
    problem, (entry,) = set_up(model_name, task, source, method, settings, **options)
    problem = with_head_of_seed(problem, settings.seed)
    _say_notes(problem, [entry], say)
    rates = {} if rate is None else {"": rate}
    settings = dataclasses.replace(settings, learning_rate=rate_of(entry, rates, problem.model, model_name))
    check_plans(problem, [entry], settings)
    hint = "run the same command again: " + shlex.join(["peftjax", *sys.argv[1:]])
    with watch(entry.name) as note:
        return run(problem, entry, settings, out, resume_hint=hint, report=note, log=log)


def train_several(
    model_name: str,
    task: str | Task,
    source: str | None,
    *,
    method: str,
    seeds: Sequence[int],
    rates: Sequence[float],
    ranks: Sequence[int],
    out: str | Path,
    settings: Settings,
    lanes: int | None = None,
    watch: Callable = lambda title: nullcontext(lambda record: None),
    say: Callable[[str], Any] = print,
    log: Sequence[Open] = (),
    **options: Any,
) -> tuple[Table, ...]:
    """Trains one method with every seed, learning rate and rank, in one program where the memory allows it.

    Args:
      rates: learning rates; empty: the method's own.
      ranks: of a LoRA; empty: the method's own.
      lanes, log: as for `compare`.

    Returns:
      The tables of `report.write`, a row for each rate and rank; adapters, logs and results are in `runs`.

    Raises:
      ValueError: bad input, or none of the runs has a finite loss.
    """
    if len(parse(method)) != 1:
        raise ValueError(f"train takes one method (chain several with +); got {method!r}")
    row = get_task(task) if isinstance(task, str) else task
    for name, values in {"seeds": seeds, "learning rates": rates, "ranks": ranks}.items():
        if len(set(values)) < len(values):
            raise ValueError(f"the {name} {', '.join(map(str, values))} name one twice; write each once")
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes must be at least 1; got {lanes}")
    out = check_writable(out)
    problem, (entry,) = set_up(model_name, task, source, method, settings, **options)
    entries = [_of_rank(entry, r) for r in ranks] or [entry]
    for one in entries:
        _try(one, problem.model, settings.layout)
    chosen = [*rates] or [rate_of(entry, {}, problem.model, model_name)]
    check_plans(problem, entries, settings)
    _say_notes(problem, [entry], say)
    runs = []
    for rate, one, seed in itertools.product(chosen, entries, seeds):
        named = one._replace(name=f"{one.name}, lr {rate:g}") if len(chosen) > 1 else one
        runs.append((named, dataclasses.replace(settings, learning_rate=rate, seed=seed)))
    results, left_out = _train_all(_jobs(problem, runs, out), Evaluator(problem), lanes, watch, say, log)
    title = f"{entry.name}: {Path(model_name).name} on {row.name}"
    return report.write(results, problem.task.headline, title, [*_facts(problem, settings, options), *left_out], out)


def _of_rank(entry: Entry, rank: int) -> Entry:
    """The entry with another rank of its LoRA.

    Raises:
      ValueError: it has none of the kinds whose ranks train in one program.
    """
    spec = entry.method.spec
    if not any(name in RANKED for name, _ in spec):
        raise ValueError(f"--ranks is for {', '.join(RANKED)}; {entry.name} has none of them")
    made = [build(name, a | {"rank": rank} if name in RANKED else a) for name, a in spec]
    return entry._replace(name=f"{entry.name}, rank {rank}", method=chain(*made))


def evaluate(
    model_name: str,
    task: str,
    source: str | None,
    *,
    adapter: str | Path | None,
    seed: int = 0,
    say: Callable[[str], Any] = print,
    **options: Any,
) -> dict[str, float]:
    """The scores of an adapter, or of the base alone.

    Raises:
      ValueError: the adapter was made for another base, or for labels that are not the task's.
    """
    problem = _problem_of(adapter, model_name, task, source, seed, say, options)
    params = problem.model.params if adapter is None else load_adapter(adapter, problem.model).params
    return Evaluator(problem).scores(params)


def score_file(
    task: str, source: str | None, predictions: str | Path, *, split: str | None = None, metrics: Sequence[str] = ()
) -> dict[str, float]:
    """The task's metrics of texts that are there already, or other metrics.

    Args:
      predictions: a file with one text a line, in the order of the split's inputs (rows of equal inputs are one).
      metrics: names of `peftjax.metrics.METRICS`; default: the task's.

    Raises:
      ValueError: the task is no generation, or is scored by likelihoods; more or fewer lines than inputs; a metric
        that is unknown or lacks its program.
      FileNotFoundError: no such file, or no data.
    """
    row = get_task(task)
    if row.kind != "generation" or row.choices is not None:
        raise ValueError(f"score reads generated texts, and {task} is answered otherwise; use evaluate")
    metrics = tuple(metrics) or row.metrics
    texts = Path(predictions).read_text("utf-8").removesuffix("\n").split("\n")
    groups: dict[tuple[str, ...], list[dict]] = {}
    for one in load_rows(row, source, split or row.reported):
        groups.setdefault(tuple(one[c] for c in row.inputs), []).append(one)
    if len(texts) != len(groups):
        at = list(groups)[len(texts) :]
        lacks = f"; the first without one is {'; '.join(at[0])!r}" if at else ""
        raise ValueError(f"{predictions} has {len(texts)} lines, and the split has {len(groups)} inputs{lacks}")
    references = [[one[row.target] for one in group] for group in groups.values()]
    slots = None if row.slots is None else [row.slots(group[0]) for group in groups.values()]
    return score(metrics, [text.strip() for text in texts], references, slots)


def evaluate_ranks(
    model_name: str,
    task: str,
    source: str | None,
    *,
    adapter: str | Path,
    ranks: Sequence[int],
    seed: int = 0,
    say: Callable[[str], Any] = print,
    **options: Any,
) -> Table:
    """The scores of one DyLoRA adapter at several ranks, with what the adapter then counts.

    Raises:
      ValueError: as `evaluate`; or the adapter has no such rank.
    """
    problem = _problem_of(adapter, model_name, task, source, seed, say, options)
    params, method, _ = load_adapter(adapter, problem.model)
    at = {rank: at_rank(params, rank) for rank in ranks}  # all, before anything is scored
    evaluator, table = Evaluator(problem), Table()
    for rank, cut in at.items():
        scores = evaluator.scores(cut)
        if not table.columns:
            for column in ("rank", "parameters", *scores):
                table.add_column(column, justify="right")
        trained = count(partition(cut, method.trainable(cut))[0])
        table.add_row(str(rank), f"{trained:,}", *(f"{v:.4g}" for v in scores.values()))
    return table


def steer(
    model_name: str,
    task: str,
    source: str | None,
    *,
    antiexpert: str,
    expert: str | None = None,
    adapter: str | Path | None = None,
    alpha: float = 1.0,
    say: Callable[[str], Any] = print,
    **options: Any,
) -> Table:
    """The scores of a large model by proxy-tuning (`peftjax.proxy`), beside those of the three models alone.

    Args:
      antiexpert: a small model, by folder or name.
      expert: the same one tuned; or give the `adapter` that was trained on it.
      alpha: how far to follow the difference of the two.

    Raises:
      ValueError: neither or both of `expert` and `adapter`; models that share no vocabulary or are no language models.
    """
    if (expert is None) == (adapter is None):
        raise ValueError("proxy: give either the expert or the adapter that makes one of the anti-expert")
    if get_task(task).kind != "generation":
        raise ValueError(f"proxy: {task} is no generation task, and proxy-tuning is a way to decode")
    names = {"base": model_name, "expert": expert or antiexpert, "anti-expert": antiexpert}
    same_words(names, {role: hub.load_tokenizer(name) for role, name in names.items()})
    dtypes = {k: options[k] for k in ("dtype", "param_dtype") if k in options}
    small = hub.load(antiexpert, "generation", **dtypes)
    tuned = small if expert is None else hub.load(expert, "generation", **dtypes)
    if adapter is not None:
        tuned = tuned._replace(params=load_adapter(adapter, small).params)
        trained = read_header(adapter)["extra"].get("config", {}).get("max_new_tokens")
        options["max_new_tokens"] = options.get("max_new_tokens") or trained
    room = min(small.max_length, tuned.room(tuned.params))

    def reserve(model: Model) -> int:
        return max(0, model.max_length - room)

    problem = prepare(model_name, task, source, need_train=False, reserve=reserve, **options)
    _say_notes(problem, [], say)
    three = proxy(problem.model, tuned, small, alpha)
    rows = {
        "base": (problem.model, problem.model.params),
        "expert": (tuned, tuned.params),
        "anti-expert": (small, small.params),
        f"proxy, alpha {alpha:g}": (three, (problem.model.params, tuned.params, small.params)),
    }
    table = Table()
    for role, (model, params) in rows.items():
        scores = Evaluator(problem._replace(model=model)).scores(params)
        if not table.columns:
            table.add_column("model")
            for column in scores:
                table.add_column(column, justify="right")
        table.add_row(role, *(f"{v:.4g}" for v in scores.values()))
    return table


def _problem_of(adapter, model_name, task, source, seed, say, options) -> Problem:
    """The problem to score an adapter on, or the base."""
    row = get_task(task)
    header = None if adapter is None else read_header(adapter)
    if header is not None and options.get("max_new_tokens") is None:  # texts as long as when it was trained
        options["max_new_tokens"] = header["extra"].get("config", {}).get("max_new_tokens") or None
    if header is not None and row.chats is not None and "chats" in header["extra"]:  # the rows that were held out then
        task = row._replace(chats=Chats(**header["extra"]["chats"]))
        options["chat_template"] = options.get("chat_template") or header["extra"]["chat_template"]
    taken = 0 if header is None else header["virtual_tokens"]
    problem = prepare(model_name, task, source, need_train=False, reserve=lambda _: taken, seed=seed, **options)
    labels = None if problem.task.labels is None else [str(x) for x in problem.task.labels]
    if header is not None and "labels" in header["extra"] and header["extra"]["labels"] != labels:
        raise ValueError(f"{adapter} was trained for the labels {header['extra']['labels']}; {task} has {labels}")
    _say_notes(problem, [], say)
    return problem


def merge_adapter(model_name: str, adapter: str | Path, out: str | Path, param_dtype: str = "float32") -> Path:
    """Writes the base with the adapter merged in as a folder that transformers loads, tokenizer included.

    Raises:
      ValueError: the adapter cannot be merged (a prefix), or is for another base; or the folder holds a model.
    """
    header = read_header(adapter)
    if (Path(out) / "config.json").exists():
        raise ValueError(f"{out} holds a model already; choose another --out, or remove that folder")
    out = check_writable(out)
    model = base_of(header, model_name)  # quantised as then: what is written is the function that was trained
    params = load_adapter(adapter, model).params
    tokenizer = hub.load_tokenizer(model_name)
    adopt_template(tokenizer, adapter)
    folder = hub.save(model, params, out, tokenizer, jnp.dtype(param_dtype))
    generation = hub.find_folder(model_name) / "generation_config.json"
    if generation.is_file() and model.module.head.endswith("-lm"):  # stop tokens, beams: the merged model's too
        shutil.copyfile(generation, folder / generation.name)
    return folder


def combine_adapters(
    model_name: str,
    adapters: Sequence[tuple[str | Path, float]],
    out: str | Path,
    *,
    how: str = "sum",
    density: float | None = None,
    elect: str = "total",
    seed: int = 0,
    rank: int | None = None,
    energy: float | None = None,
) -> tuple[Combined, int]:
    """Writes one adapter made of several of one base; the result and the file's size.

    Args:
      adapters: (file, weight) of each.
      how, density, elect, seed: as for `peftjax.arithmetic.combine_updates`.
      rank, energy: as for `peftjax.arithmetic.adapter`.

    Raises:
      ValueError: no adapters; adapters of different bases or labels, or of another base than the model; one that cannot
        be merged; or bad choices.
    """
    if not adapters:
        raise ValueError("combine: there are no adapters; write --adapters a.safetensors=0.5,b.safetensors=0.5")
    files, weights = [f for f, _ in adapters], [w for _, w in adapters]
    check_choices(len(files), weights, how, density, elect)
    headers = [read_header(f) for f in files]
    first = headers[0]
    for file, header in zip(files, headers, strict=True):
        if header["base"] != first["base"]:
            said = [", ".join(f"{k} {v}" for k, v in h["base"].items()) for h in (first, header)]
            raise ValueError(
                f"combine: the adapters are of different bases: {files[0]} of {said[0]}; {file} of {said[1]}"
            )
        if header["extra"].get("labels") != first["extra"].get("labels"):
            said = [h["extra"].get("labels") for h in (first, header)]
            raise ValueError(f"combine: {files[0]} was trained for the labels {said[0]}, {file} for {said[1]}")
    model = base_of(first, model_name)
    changes = []
    for file in files:
        try:
            changes.append(updates(model, load_adapter(file, model).params))
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e
    choices = {"density": density, "elect": elect, "seed": seed}
    made = adapter(model, combine_updates(changes, weights, how, **choices, exempt=model.fresh), rank, energy)
    extras = [h["extra"] for h in headers]
    extra = {k: v for k, v in extras[0].items() if k in KEPT and all(x.get(k) == v for x in extras)}
    longest = [x.get("config", {}).get("max_new_tokens") for x in extras]
    if all(longest):  # so that texts are as long as when they were trained
        extra["config"] = {"max_new_tokens": max(longest)}
    origin = {"adapters": [[Path(f).name, w] for f, w in adapters], "how": how, **choices}
    extra["combined"] = {**origin, "rank": rank, "energy": energy}
    return made, save_adapter(out, model, made.method, made.params, extra)


def extract_difference(
    model_name: str, tuned: str, out: str | Path, *, rank: int | None = None, energy: float | None = None
) -> tuple[Combined, int]:
    """Writes what tuning changed of a model as an adapter of it; the result and the file's size.

    Args:
      tuned: folder or name of the tuned model.
      rank, energy: as for `peftjax.arithmetic.difference`.

    Raises:
      ValueError: as `difference` does.
    """
    after = hub.load(tuned)
    purpose = hub.task_of(after.hf_config.architectures[0])
    names = after.hf_config.id2label
    labels = [str(names[i]) for i in sorted(names)] if purpose == "classification" else []
    before = hub.load(model_name, purpose, labels=labels or None)
    made = difference(before, after, rank, energy)
    origin = {"tuned": Path(tuned).name, "rank": rank, "energy": energy}
    known = labels if len(labels) > 1 else None  # one: regression
    return made, save_adapter(out, before, made.method, made.params, {"labels": known, "difference": origin})


def set_up(
    model_name: str, task: str | Task, source: str | None, methods: str | None, settings: Settings, **options: Any
) -> tuple[Problem, list[Entry]]:
    """The problem, and the methods fitted to its model; each transform is tried on abstract shapes.

    Args:
      methods: as in `compare`; what fits the model is taken, where nobody asked for it by name.
      settings: of their training: what cannot fit into the memory is refused before the weights are read.

    Raises:
      ValueError: a method does not fit the model (a target that matches nothing, a rank too large, ...).
      DoesNotFit: a step of a method needs more memory than there is, with what would make it fit.
    """
    chosen: list[Entry] = []
    left_out: list[str] = []

    by_name = methods not in (None, "all")

    def keep(found: list[Entry], fits: Callable[[Entry], Any]) -> None:
        """Takes those that fit; what nobody asked for by name is left out with a note."""
        chosen.clear()
        for entry in found:
            try:
                fits(entry)
            except ValueError as e:
                if by_name:
                    raise
                left_out.append(f"{entry.name} is left out: {e}")
            else:
                chosen.append(entry)

    def reserve(model: Model) -> int:
        found = entries_for(methods, model, lambda: hub.load_tokenizer(model_name))
        keep(found, lambda entry: _try(entry, model, settings.layout))
        return max(virtual_tokens(_try(e, model, settings.layout)) for e in chosen)

    def before(problem: Problem, describe: Callable[..., Model]) -> None:
        batch, here = problem.largest_batch(settings.batch_size), devices.present()
        how = dataclasses.replace(settings, steps=_steps(problem, settings))  # a method's schedule has to fit into them
        facts = {k: options[k] for k in ("dtype", "param_dtype", "quantize", "remat") if k in options}

        def fits(entry: Entry) -> None:
            made = (lambda _: entry.method, lambda _: batch)
            memory.check(memory.Case(describe, *made, problem.task.kind, how, facts), here, entry.name, by_name)

        keep([*chosen], fits)
        if not chosen:
            raise memory.DoesNotFit(f"no method fits into the memory: {left_out[-1]}")

    problem = prepare(model_name, task, source, reserve=reserve, before=before, **options)
    return problem._replace(notes=(*problem.notes, *left_out)), chosen


def _try(entry: Entry, model: Model, layout: str) -> Any:
    m = entry.method
    params = jax.eval_shape(lambda p: _adapted(m, p, model), model.params)
    m.trainable(params)
    if layout == "scan":
        jax.eval_shape(stack_layers, params)
    return params


def check_plans(problem: Problem, chosen: list[Entry], settings: Settings) -> None:
    """Tells every method how long it would train, so that what does not fit is said before anything is trained."""
    total = _steps(problem, settings)
    for entry in chosen:
        m = entry.method.planned(total)
        if settings.update == "backward":  # not every optimizer can
            tx = make_optimizer(settings, total, m)
            jax.eval_shape(lambda p, m=m, tx=tx: start(m, _adapted(m, p, problem.model), tx)[0], problem.model.params)


def _steps(problem: Problem, settings: Settings) -> int:
    return settings.steps or settings.epochs * problem.steps_per_epoch(settings.batch_size)


def _adapted(m: Any, params: Any, model: Model) -> Any:
    return m.init(jax.random.key(0), params, model.sites)


def _say_notes(problem: Problem, chosen: list[Entry], say: Callable) -> None:
    for note in (*problem.notes, *(f"{e.name}: {e.note}" for e in chosen if e.note)):
        say(f"note: {note}")


def _facts(problem: Problem, s: Settings, options: dict) -> list[str]:
    device = jax.devices()[0]
    where = f"{os.cpu_count()} CPU cores" if device.platform == "cpu" else device.device_kind
    length = f"{s.steps} steps" if s.steps else f"{s.epochs} epochs"
    scored = (len(problem.prompts) if problem.task.metrics else 0) or len(problem.scored or problem.dev)
    clip = "no clipping" if s.clip is None else f"clipping at {s.clip}"
    split = options.get("eval_split") or problem.task.reported
    return [
        f"{len(problem.train):,} training examples, scored on {scored:,} of {split}",
        *problem.notes,
        f"{length}, batches of {s.batch_size}, AdamW, {s.schedule} decay after {100 * s.warmup:g}% warm-up, "
        f"weight decay {s.weight_decay}, {clip}; learning rates in the table",
        f"padded to {', '.join(map(str, problem.buckets))} tokens; activations {problem.model.module.dtype.name}",
        *([f"the base's linear weights are quantised: {how}"] if (how := options.get("quantize")) else []),
        *([f"texts by {_said(problem.decoding)}"] if problem.decoding else []),
        f"jax {jax.__version__}, {where}",
        f"command: `{shlex.join(['peftjax', *sys.argv[1:]])}`",
    ]


def _said(how: Decoding) -> str:
    beams = f"{how.beams} beams, length penalty {how.length_penalty:g}" if how.beams > 1 else "the most likely token"
    return beams + (f", no sequence of {how.no_repeat_ngram} tokens twice" if how.no_repeat_ngram else "")
