"""A run: a method trained on a problem, in a folder that holds its adapter, its log and its result.

A folder belongs to one configuration. Running that again resumes what is unfinished and returns what is done;
another configuration in the same folder is refused.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from .checkpoint import save_adapter, write_atomically
from .hub import BUNDLED, Model, fingerprint
from .layout import unstack_layers
from .loop import Fitted, Logger, NonFinite, Run, fit_together, lower
from .methods import METHODS, TABLE, Method, build, chain, default_rate, head, parse, with_text_ids
from .problem import Evaluator, Problem, objective
from .quantize import quantized_as
from .together import alike
from .train import Settings
from .tree import count, flatten, nbytes
from .weights import allocation, is_node, is_quantized, map_nodes

SAMPLES = 5
# What is compared where nobody says: the survey's three kinds, each with its best-known members.
SELECTION = ("head", "bitfit", "fishmask", "lora", "dora", "adalora", "ia3", "adapter", "prompt", "prefix", "full")
CHOICES = ("beams", "length_penalty", "no_repeat_ngram")  # of a decoding, what scores depend on
ZERO_SHOT = "zero-shot"  # the row of the base as it is
Open = Callable[[Path, dict, Sequence[dict]], Logger]  # a run's folder, configuration, records so far -> its logger


class Entry(NamedTuple):
    """A method as a table lists it: its name there, the method, and what the reader should know."""

    name: str
    method: Method
    note: str = ""


def named(which: str | None, *, is_classifier: bool) -> str:
    """The methods of a comparison, with their defaults and full fine-tuning last; the head alone only where it is.

    Args:
      which: None, a selection of every kind; 'all'; or a text that names them itself and comes back as it is.
    """
    if which not in (None, "all"):
        return which
    chosen = SELECTION if which is None else [m for m in METHODS if TABLE[m].rate < float("inf")]
    return ", ".join([*(m for m in chosen if m != "full" and (m != "head" or is_classifier)), "full"])


def entries(
    text: str, *, is_classifier: bool, has_biases: bool, tokenizer: Callable[[], Any] | None = None
) -> list[Entry]:
    """Reads methods as written on the command line and fits them to a model.

    The task head of a classifier trains with every method. BitFit on a model without biases gets zero biases
    (`create=True`), and a note that says so. The texts of prompts become token ids by the tokenizer.
    """
    out = []
    for name, m in parse(text).items():
        names, note = [n for n, _ in m.spec], ""
        if "bitfit" in names and not has_biases:
            m = chain(*(build(n, a | {"create": True} if n == "bitfit" else a) for n, a in m.spec))
            note = "the model has no biases; zero ones were added and trained (merging needs a place for them)"
        if tokenizer is not None and "prompt" in names:
            m = with_text_ids(m, tokenizer())
        if is_classifier and not any(_trains_the_head(n, a) for n, a in m.spec):
            m = chain(m, head())
        out.append(Entry(name, m, note))
    return out


def entries_for(methods: str | None, model: Model, tokenizer: Callable[[], Any] | None = None) -> list[Entry]:
    """`entries` of the methods that a text names (`named`), fitted to this model."""
    heads = {s.module for s in model.sites if s.kind == "head"}
    has_biases = any(p.endswith("/bias") and p.rpartition("/")[0] not in heads for p in flatten(model.params))
    facts: dict[str, Any] = {"is_classifier": bool(heads), "has_biases": has_biases, "tokenizer": tokenizer}
    return entries(named(methods, is_classifier=bool(heads)), **facts)


def _trains_the_head(name: str, arguments: dict) -> bool:
    targets = arguments.get("targets")
    return name in ("head", "child_tuning") or (name == "full" and (not targets or "head" in targets))


def rate_of(entry: Entry, rates: dict[str, float], model: Model, model_name: str) -> float:
    """The learning rate given for the entry's name, a method in it, or all (''), or the default for this model."""
    given = [rates[name] for name in (*names_of(entry), "") if name in rates]
    width = next(s.width for s in model.sites if s.kind == "embedding")
    own = BUNDLED[model_name].rates if model_name in BUNDLED else {}
    return given[0] if given else default_rate(entry.method, width, own)


def names_of(entry: Entry) -> list[str]:
    """What a learning rate may call an entry: its full name, or one of its methods."""
    return list(dict.fromkeys([entry.name, *(name for name, _ in parse(entry.name)[entry.name].spec)]))


def check_writable(folder: str | Path) -> Path:
    """Creates the folder and tries to write in it, before anything costs time.

    Raises:
      ValueError: it cannot be written, with the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-test-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except OSError as e:
        raise ValueError(f"cannot write into the output folder {folder}: {e.strerror}; choose another --out") from e
    return folder


# Settings that a configuration names only where they are not these: results of before they existed stay valid.
SILENT = {"update": "whole", "trainable_dtype": "float32", "data_seed": None}
REMAT = {"none": False, "block": True}  # likewise: a configuration has it as it was before there were names


def configuration(problem: Problem, method: Method | None, settings: Settings | None) -> dict:
    """All that the result depends on, as JSON; without a method, that of the base as it is."""
    settings_ = {k: v for k, v in dataclasses.asdict(settings).items() if k != "save_every"} if settings else {}
    settings_ = {k: v for k, v in settings_.items() if k not in SILENT or v != SILENT[k]}
    config = {
        "base": fingerprint(problem.model),
        "task": problem.task.name,
        "data": problem.digest(),
        "spec": [[name, arguments] for name, arguments in method.spec] if method else [],
        "settings": settings_,
        "dtype": jax.numpy.dtype(problem.model.module.dtype).name,
        "param_dtype": str(next(iter(flatten(problem.model.params, is_leaf=is_node).values())).dtype),
        "remat": REMAT.get(problem.model.module.remat, problem.model.module.remat),
        "buckets": problem.buckets,
        "max_new_tokens": problem.max_new_tokens,
    }
    if how := quantized_as(problem.model.params):
        config["quantize"] = how
    if problem.decoding is not None:
        config["decoding"] = {k: v for k, v in problem.decoding._asdict().items() if k in CHOICES}
    if problem.packed is not None:
        config["packed"] = problem.packed
    if problem.head_prior:
        config["head_prior"] = True
    return json.loads(json.dumps(config))  # as `config.json` gives it back


def short_hash(config: dict) -> str:
    """Eight hex digits of a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


class Job(NamedTuple):
    """A run to do.

    Attributes:
      problem: with the task head of the seed, if the model has none of its own.
      entry: the method.
      settings: how it trains.
      folder: where its adapter, log and result go.
    """

    problem: Problem
    entry: Entry
    settings: Settings
    folder: Path


def run(
    problem: Problem,
    entry: Entry,
    settings: Settings,
    folder: str | Path,
    *,
    evaluator: Evaluator | None = None,
    resume_hint: str = "run the same command again",
    report: Callable[[dict], None] = lambda record: None,
    log: Sequence[Open] = (),
) -> dict[str, Any]:
    """Trains, scores and saves one method; returns the result, which is also `result.json` in the folder.

    The result's keys: `method`, `seed`, `task`, `scores` (on the evaluation split, of the best state),
    `trainable`, `share` (of base plus added), `peak_bytes` (of the compiled step), `step_seconds`, `training_flops`,
    `compilations`, `together` (runs in the program), `adapter_bytes`, `seconds` (training and scoring), `samples`,
    `config`, `note`; where the method chose what trains, `allocation` and `sizes` (`peftjax.weights.allocation`).
    Its numbers go to `log.jsonl` in the folder, and to the loggers of `log` (`peftjax.loggers.openers`).

    Raises:
      ValueError: the folder holds a run of another configuration.
      NonFinite, Interrupted: from training; what was done is kept.
    """
    job = Job(problem, entry, settings, Path(folder))
    (result,) = run_together([job], evaluator=evaluator, resume_hint=resume_hint, report=report, log=log)
    if isinstance(result, NonFinite):
        raise result
    return result


def run_together(
    jobs: Sequence[Job],
    *,
    lanes: int | None = None,
    evaluator: Evaluator | None = None,
    resume_hint: str = "run the same command again",
    report: Callable[[dict], None] = lambda record: None,
    log: Sequence[Open] = (),
) -> list[dict[str, Any] | NonFinite]:
    """`run` for several jobs of one problem and one method, trained in one program; what is done already stays.

    Args:
      jobs: they differ in seed, order of the data, learning rate or LoRA's rank; where they add what no program can
        hold together, they train one after another.
      lanes: as for `peftjax.loop.fit_together`.
      log: what makes the loggers of each run (`peftjax.loggers.openers`).

    Returns:
      For each job its result, or why it has ended.

    Raises:
      ValueError: a folder holds a run of another configuration.
      Interrupted: from training; what was done is kept.
    """
    configs = [configuration(j.problem, j.entry.method, j.settings) for j in jobs]
    results: dict[int, dict | NonFinite] = {}
    for i, (job, config) in enumerate(zip(jobs, configs, strict=True)):
        if (done := _claim(check_writable(job.folder), config)) is not None:
            results[i] = done
            shutil.rmtree(job.folder / "state", ignore_errors=True)  # a kill may have come before it was removed
    waiting = [i for i in range(len(jobs)) if i not in results]
    if not waiting:
        shutil.rmtree(_shared(jobs, configs), ignore_errors=True)
    if waiting and _shared(jobs, configs).is_dir():  # cut off when some results were there: the state is of all
        waiting = [*range(len(jobs))]
    begun = {i: _begin(jobs[i], configs[i], log) for i in waiting}
    groups = [waiting] if _go_together([run for _, run in begun.values()]) else [[i] for i in waiting]
    evaluator = evaluator or Evaluator(jobs[0].problem)
    for group in filter(None, groups):
        problem, (method, _) = jobs[group[0]].problem, begun[group[0]]
        folder = jobs[group[0]].folder
        if len(group) > 1:
            folder = check_writable(_shared([jobs[i] for i in group], [configs[i] for i in group]))
            write_atomically(folder / RUNS, json.dumps([jobs[i].folder.name for i in group]))
        _drop_other_states([jobs[i] for i in group], folder)
        found = fit_together(
            [begun[i][1] for i in group],
            method,
            objective(problem),
            problem.steps_per_epoch(jobs[group[0]].settings.batch_size),
            lanes=lanes,
            evaluate=evaluator.on_dev,
            better=_better(problem),
            states=folder / "state",
            resume_hint=resume_hint,
            report=report,
        )
        for i, fitted in zip(group, found, strict=True):
            if i not in results:
                ended = isinstance(fitted, NonFinite)
                results[i] = fitted if ended else _finish(jobs[i], configs[i], *begun[i], fitted, evaluator)
        if len(group) > 1:
            shutil.rmtree(folder)
    return [results[i] for i in range(len(jobs))]


RUNS = "runs.json"  # in the folder of several runs' states: the names of their own folders, which are beside it


def _shared(jobs: Sequence[Job], configs: Sequence[dict]) -> Path:
    return jobs[0].folder.parent / f"together-{short_hash({'runs': configs})}"


def _drop_other_states(jobs: Sequence[Job], folder: Path) -> None:
    """A run's log goes with one state: those that it has from programs of other runs are of no use any more."""
    names = {job.folder.name for job in jobs}
    for file in jobs[0].folder.parent.glob(f"together-*/{RUNS}"):
        if file.parent != folder and names & {*_names_in(file)}:
            shutil.rmtree(file.parent, ignore_errors=True)
    for job in jobs:
        if job.folder != folder:
            shutil.rmtree(job.folder / "state", ignore_errors=True)


def _names_in(file: Path) -> list[str]:
    """The runs of a program; none if it is over by now: other processes may share the folder."""
    try:
        return _read_json(file)
    except FileNotFoundError:
        return []


def cut_off(jobs: Sequence[Job]) -> list[list[Job]]:
    """What trained, in one program or alone, when it was cut off: so it resumes. Some may have a result."""
    of = {job.folder.name: job for job in jobs}
    named = [_names_in(file) for file in sorted(jobs[0].folder.parent.glob(f"together-*/{RUNS}"))]
    groups = [[of[name] for name in names] for names in named if names and of.keys() >= {*names}]
    return [*groups, *([job] for job in jobs if (job.folder / "state").is_dir())]


def _begin(job: Job, config: dict, log: Sequence[Open]) -> tuple[Method, Run]:
    """The method that has looked at the data, and the run with its first parameters."""
    problem, settings, model = job.problem, job.settings, job.problem.model
    alone = problem._replace(packed=None)  # what looks at examples wants one a row
    batches = alone.epoch(0, settings.batch_size, settings.order)  # lazy, and the same when a run is resumed
    method = job.entry.method.observed(objective(problem), model.params, model.sites, batches)
    params = method.init(jax.random.key(settings.seed), model.params, model.sites)

    def epoch(number):
        return problem.epoch(number, settings.batch_size, settings.order)

    loggers = [functools.partial(make, job.folder, config) for make in log]
    return method, Run(params, settings, epoch, job.folder, loggers)


def _go_together(runs: Sequence[Run]) -> bool:
    try:
        alike([r.params for r in runs])
    except ValueError:
        return False
    return True


def _better(problem: Problem) -> Callable[[dict, dict], bool]:
    if problem.task.kind == "generation":
        return lower
    return lambda new, old: new[problem.task.headline] > old[problem.task.headline]


def _finish(job: Job, config: dict, method: Method, begun: Run, fitted: Fitted, evaluator: Evaluator) -> dict:
    """Scores and saves what a run leaves."""
    problem, folder, fitted_at = job.problem, job.folder, time.perf_counter()
    resolved = jax.jit(lambda p: method.resolve(p, None))(fitted.params)
    texts = evaluator.generate(resolved) if evaluator.generates else []
    if fitted.best is not None and problem.task.kind != "generation" and problem.scored is None:
        scores = fitted.best["eval"]
    else:
        scores = evaluator.scores(resolved, texts)
    extra = {
        "task": problem.task.name,
        "labels": None if problem.task.labels is None else [str(x) for x in problem.task.labels],
        "scores": scores,
        "config": config,
        "training_flops": fitted.flops,
    }
    if problem.task.chats is not None:
        extra |= {"chats": problem.task.chats._asdict(), "chat_template": problem.tokenizer.chat_template}
    size = save_adapter(folder / "adapter.safetensors", problem.model, method, fitted.params, extra)
    result = {
        "method": job.entry.name,
        "seed": job.settings.seed,
        "task": problem.task.name,
        "scores": scores,
        "trainable": fitted.trainable,
        "share": fitted.trainable / count(map_nodes(_once, begun.params)),
        "base_bytes": nbytes(problem.model.params),
        "peak_bytes": fitted.peak_bytes,
        "step_seconds": fitted.step_seconds,
        "training_flops": fitted.flops,
        "compilations": fitted.compilations,
        "together": fitted.together,
        "adapter_bytes": size,
        "seconds": fitted.seconds + time.perf_counter() - fitted_at,
        "samples": _samples(problem, texts),
        "history": thin(fitted.history),
        "note": job.entry.note,
        "config": config,
    }
    if chosen := allocation(unstack_layers(fitted.params)):
        result["allocation"] = {path: n for path, (n, _) in chosen.items()}
        result["sizes"] = {path: size for path, (_, size) in chosen.items()}
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    shutil.rmtree(folder / "state", ignore_errors=True)
    return result


def zero_shot(problem: Problem, folder: str | Path, *, evaluator: Evaluator | None = None) -> dict[str, Any]:
    """Scores the base as it is; the result's keys are those of `run`, and what has no meaning here is None.

    Raises:
      ValueError: the base has a task head that was just drawn, so its answers would say nothing.
    """
    if problem.model.fresh:
        raise ValueError(f"the task head {list(problem.model.fresh)} is new; train it before scoring")
    folder = check_writable(folder)
    config = configuration(problem, None, None)
    done = _claim(folder, config)
    if done is not None:
        return done
    began = time.perf_counter()
    evaluator = evaluator or Evaluator(problem)
    texts = evaluator.generate(problem.model.params) if evaluator.generates else []
    scores = evaluator.scores(problem.model.params, texts)
    result = {
        "method": ZERO_SHOT,
        "seed": None,
        "task": problem.task.name,
        "scores": scores,
        "trainable": 0,
        "share": 0.0,
        "base_bytes": nbytes(problem.model.params),
        **dict.fromkeys(("peak_bytes", "step_seconds", "training_flops", "compilations", "together", "adapter_bytes")),
        "seconds": time.perf_counter() - began,
        "samples": _samples(problem, texts),
        "history": [],
        "note": "",
        "config": config,
    }
    write_atomically(folder / "result.json", json.dumps(result, indent=1))
    return result


def _once(path: str, n: Any) -> Any:
    """A node without what is counted with its base; a quantised one as the array that it stands for."""
    if is_quantized(n):
        return jax.ShapeDtypeStruct(n.shape, n.dtype)
    return dataclasses.replace(n, **dict.fromkeys(getattr(type(n), "repeats", ())))


def _claim(folder: Path, config: dict) -> dict | None:
    """The finished result if there is one; otherwise writes the configuration down for those who come later."""
    file = folder / "config.json"
    if file.is_file():
        there = _read_json(file)
        if there != config:
            different = sorted(k for k in {*there, *config} if there.get(k) != config.get(k))
            raise ValueError(
                f"{folder} holds a run of another configuration (different: {', '.join(different)}); "
                "choose another --out, or remove that folder"
            )
        if (folder / "result.json").is_file():
            return _read_json(folder / "result.json")
    else:
        write_atomically(file, json.dumps(config, indent=1))
    return None


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is damaged ({e}); remove its folder to train that run again") from e


def _samples(problem: Problem, texts: list[str]) -> list[dict]:
    few = problem.prompts[:SAMPLES]
    prompts = problem.tokenizer.batch_decode([e.input_ids for e in few], skip_special_tokens=True)
    return [
        {"prompt": p, "output": t, "reference": (e.references or [""])[0]}
        for p, t, e in zip(prompts, texts, few, strict=False)
    ]


def thin(history: list[dict], most: int = 500) -> list[dict]:
    """The evaluations and at most so many evenly spaced steps, for curves."""
    steps = [r for r in history if "loss" in r]
    return steps[:: max(1, -(-len(steps) // most))] + [r for r in history if "eval" in r]
