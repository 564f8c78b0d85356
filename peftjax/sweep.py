"""A sweep: every run of a grid once, whoever of several processes makes it, and whenever one of them is killed.

A folder holds `runs/KEY` for each run (adapter, log, training state, and `record.json` when it is over),
`claims`, and `results.jsonl`, all records as lines. Runs that a program holds together train together
(`peftjax.run.run_together`). What is recorded is not run again; a run that failed is recorded with its error.
"""

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import grid as grids
from .board import Board
from .checkpoint import load_adapter, write_atomically
from .claims import Claims
from .compare import check_plans, kin, room, set_up
from .generate import Decoding
from .grid import FINAL, SEARCH, Cell, Grid, Trials
from .loop import Interrupted, NonFinite
from .methods import at_rank, parse
from .problem import Evaluator, Problem, with_head_of_seed
from .run import Entry, Job, Open, check_writable, rate_of, run_together, thin
from .tasks import get_task
from .train import Settings

RECORD = "record.json"
POINTS = 60  # of a run's losses that a record keeps
POLL = 5.0  # seconds between looks at what others are doing
KEPT = ("scores", "trainable", "share", "peak_bytes", "step_seconds", "seconds", "training_flops", "together")
KEPT += ("adapter_bytes", "base_bytes", "compilations", "note", "allocation", "sizes", "config")
PACKAGES = ("peftjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "numpy")


class Task(NamedTuple):
    """A run to make: where in the grid it belongs, and why it is made."""

    cell: Cell
    stage: str
    place: tuple[str, str]  # model and method: what a shard is made of


def sweep(
    grid: Grid,
    out: str | Path,
    *,
    shard: tuple[int, int] = (1, 1),
    retry: bool = False,
    stale: float = 600.0,
    lanes: int | None = None,
    log: Sequence[Open] = (),
    board: Board | None = None,
) -> list[dict]:
    """Makes the runs of a grid that are not there yet; returns the records of all of its runs, in the grid's order.

    Several processes, on one machine or on several that share the folder, may do this at once.

    Args:
      shard: (i, n), the i-th of n parts, counted from 1: models and methods are dealt out in turn, so that a search
        and the runs that wait for it are in one part.
      retry: make the runs that failed again.
      stale: seconds without a sign of life after which another process counts as dead.
      lanes, log: as for `peftjax.compare.compare`.
      board: shows how it goes.

    Raises:
      ValueError: a shard, a time or lanes that cannot be, or a folder that cannot be written.
      Interrupted: on Ctrl-C, after saving the state; the same call goes on.
    """
    i, n = shard
    if not 1 <= i <= n:
        raise ValueError(f"a shard is i/n with i from 1 to n; got {i}/{n}")
    check_shards(grid, n)
    if not stale > 0:
        raise ValueError(f"stale must be seconds above 0; got {stale}")
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes must be at least 1; got {lanes}")
    out = check_writable(out)
    _keep_grid(grid, out)
    board = board or Board()
    again = {r["key"]: r["attempts"] for r in _records(out).values() if retry and r["kind"] == "failed"}
    with Claims(out / "claims", stale) as claims, board:
        while True:
            records = {k: r for k, r in _records(out).items() if _over(r, again)}
            tasks = [t for t in _tasks(grid, records) if t.place in _share_of(grid, i, n)]
            waiting = [t for t in tasks if t.cell.key not in records]
            board.show(grid, records, tasks, claims.others({t.cell.key for t in waiting}) + 1)
            if not waiting:
                break
            group = _claim(_groups(waiting), claims, out, again)
            if not group:
                time.sleep(min(POLL, claims.stale / 4))
                continue
            try:
                _make(group, out, lanes, log, claims, board, again)
            except Lost as e:
                board.say(str(e))
            finally:
                for task in group:
                    claims.release(task.cell.key)
                gather(out)
    gather(out)
    found = _records(out)
    return [found[t.cell.key] for t in _tasks(grid, found) if t.cell.key in found]


def listed(grid: Grid, out: str | Path) -> Table:
    """The runs of a grid, and which are over; those whose rate a search has to find first have none."""
    records = _records(Path(out))
    cells = list({c.key: (SEARCH, c) for s in grids.trials(grid).values() for c in s.cells}.values())
    table = Table(box=SIMPLE_HEAD)
    for column in ("stage", "model", "task", "method", "rate", "seed", "settings and options", ""):
        table.add_column(column, overflow="fold", no_wrap=column in ("stage", "rate", "seed"))
    for cell, where in grids.finals(grid, _chosen(records)):
        cells.append((FINAL, cell or Cell(where[0], "", where[1], None, where[2], {}, {})))
    for stage, cell in cells:
        rate = f"{cell.rate:g}" if cell.rate is not None else f"{cell.factor:g} x own" if cell.settings else "searched"
        more = ", ".join(f"{k} {v}" for k, v in (cell.settings | cell.options).items() if k != "seed")
        state = records[cell.key]["kind"].replace("run", "done") if cell.key in records else ""
        row = (stage, cell.model, cell.task, cell.method, rate, str(cell.settings.get("seed", "")), more, state)
        table.add_row(*map(Text, row))
    return table


def winner(search: Trials, records: Mapping[str, dict]) -> tuple[float | None, float] | None:
    """The (rate, factor) with the best mean score over its trials, of equal ones that with the lowest loss.

    None while a trial is missing. A rate of which a trial failed is out.

    Raises:
      LookupError: all have failed.
    """
    if any(cell.key not in records for cell in search.cells):
        return None
    scored = {}
    for rate, cells in search.candidates().items():
        found = [records[c.key] for c in cells]
        if all(r["kind"] == "run" for r in found):
            losses = [-r["scores"].get("loss", 0.0) for r in found]
            scored[rate] = statistics.fmean(goodness(r) for r in found), statistics.fmean(losses)
    if not scored:
        raise LookupError(f"no trial of the search finished: {records[search.cells[0].key]['error']}")
    return max(scored, key=lambda rate: scored[rate])


def goodness(record: Mapping[str, Any]) -> float:
    """The headline score, or the negative loss where that is it; not a number counts as the worst."""
    score = record["scores"][record["headline"]]
    value = -score if record["headline"] == "loss" else score
    return value if value == value else float("-inf")


def gather(out: str | Path) -> list[dict]:
    """Writes `results.jsonl` from the records in the folder and returns its lines.

    Looks again after it has written: what another process has recorded and gathered meanwhile stays in.
    """
    out = Path(out)
    lines = _lines(out)
    while True:
        write_atomically(out / "results.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        there, lines = lines, _lines(out)
        if json.dumps(there) == json.dumps(lines):  # not ==, as some numbers may be none
            return lines


def _lines(out: Path) -> list[dict]:
    lines: list[dict] = []
    for file in sorted((out / "grids").glob("*.json")):
        data = json.loads(file.read_text())
        lines.append({"kind": "grid", "baseline": data["baseline"], "title": data["title"]})
        lines += [line for p in data["published"] if (line := {"kind": "published", **p}) not in lines]
    order = ("stage", "model", "task", "method", "rate", "seed")
    return lines + sorted(_records(out).values(), key=lambda r: tuple(str(r[k]) for k in order))


def _keep_grid(grid: Grid, out: Path) -> None:
    """Keeps what the report wants to know of a grid, once for each grid that is run in the folder."""
    facts = grids.to_json(grid)
    name = grids.digest({k: v for k, v in facts.items() if k not in ("models", "tasks")})
    (out / "grids").mkdir(exist_ok=True)
    write_atomically(out / "grids" / f"{name}.json", json.dumps(facts, indent=1))


def _records(out: Path) -> dict[str, dict]:
    """key -> record. Files are written whole or not at all."""
    return {r["key"]: r for f in sorted((out / "runs").glob(f"*/{RECORD}")) if (r := json.loads(f.read_text()))}


def _tasks(grid: Grid, records: Mapping[str, dict]) -> list[Task]:
    """The runs that can be named, in the order in which they are made: by model, task, and search before table."""
    found: dict[str, Task] = {}
    for cell in (c for search in grids.trials(grid).values() for c in search.cells):
        found.setdefault(cell.key, Task(cell, SEARCH, (cell.model, cell.method)))
    for cell, (model, _, method) in grids.finals(grid, _chosen(records)):
        if cell is not None:
            found.setdefault(cell.key, Task(cell, FINAL, (model, method)))
    models, tasks = [*grid.models], [*grid.tasks]
    return sorted(found.values(), key=lambda t: (models.index(t.cell.model), tasks.index(t.cell.task)))


def _chosen(records: Mapping[str, dict]) -> grids.Chosen:
    """What the searches have found; of one whose trials have all failed nothing, so that its table is not made.

    A rate that nobody chose would stand there as if it were the best, where the trials failed for another reason.
    """

    def chosen(search: Trials) -> tuple[float | None, float] | None:
        try:
            return winner(search, records)
        except LookupError:
            return None

    return chosen


def _places(grid: Grid) -> list[tuple[str, str]]:
    return [(model, method) for model in grid.models for method in grids.methods_of(grid)]


def _share_of(grid: Grid, i: int, n: int) -> set[tuple[str, str]]:
    return {*_places(grid)[i - 1 :: n]}


def check_shards(grid: Grid, n: int) -> None:
    """Whether n parts of a grid all have something to do.

    Raises:
      ValueError: there are fewer pairs of a model and a method, which is what is dealt out.
    """
    if n > (most := len(_places(grid))):
        raise ValueError(
            f"{n} shards are more than this grid can fill: each takes whole pairs of a model and a method, and there "
            f"are {most}; write at most {most}"
        )


def _groups(tasks: Iterable[Task]) -> list[list[Task]]:
    """What one program may hold: one problem, one kind of method, settings alike; and one stage."""
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        cell = task.cell
        (method,) = parse(cell.method).values()
        same = kin(method, Settings(**cell.settings))
        where = json.dumps([task.stage, cell.model, cell.task, cell.options, same], sort_keys=True)
        groups.setdefault(where, []).append(task)
    return [*groups.values()]


def _claim(groups: Iterable[list[Task]], claims: Claims, out: Path, again: Mapping[str, int]) -> list[Task]:
    """The first group that nobody has begun to claim, as far as it is free.

    Two processes that come at once do not share it out: whoever has its first run gets the others. A program of some of
    them could not go on from the state of all.
    """
    for group in groups:
        if not claims.take(group[0].cell.key):
            continue
        mine = [group[0], *(task for task in group[1:] if claims.take(task.cell.key))]
        done = [t for t in mine if _over(_record(out, t.cell.key), again)]
        for task in done:  # recorded between the look and the claim
            claims.release(task.cell.key)
        if rest := [task for task in mine if task not in done]:
            return rest
    return []


def _record(out: Path, key: str) -> dict | None:
    file = out / "runs" / key / RECORD
    return json.loads(file.read_text()) if file.is_file() else None


def _over(record: Mapping[str, Any] | None, again: Mapping[str, int]) -> bool:
    """Whether a run is not to be made (again): it is recorded, and not as the failure that is to be tried again."""
    return record is not None and record.get("attempts") != again.get(record["key"], 0)


def _make(
    group: list[Task],
    out: Path,
    lanes: int | None,
    log: Sequence[Open],
    claims: Claims,
    board: Board,
    again: Mapping[str, int],
) -> None:
    """Makes the runs of a group and records them; where a program of several fails, each by itself."""
    began = time.perf_counter()
    try:
        problem, entries = _set_up(group)
        jobs = [_job(task, problem, entries[task.cell.method], out) for task in group]
        size, at_once = room(jobs, lanes)
        evaluator = Evaluator(problem)
        for start in range(0, len(jobs), size):
            part, these = jobs[start : start + size], group[start : start + size]
            with board.watch([t.cell for t in these]) as note:
                report = _unless_lost(note, claims)
                ended = run_together(part, lanes=min(at_once, size), evaluator=evaluator, report=report, log=log)
            for task, job, result in zip(these, part, ended, strict=True):
                if isinstance(result, NonFinite):
                    _fail(task, out, result, again)
                    board.say(f"{_said(task.cell)} failed: {_sentence(result)}")
                else:
                    _keep(out, _run_record(task, job, result, evaluator))
                    board.say(f"{_said(task.cell)}: " + ", ".join(f"{k} {v:.4g}" for k, v in result["scores"].items()))
    except (Interrupted, KeyboardInterrupt, Lost):
        raise
    except Exception as e:
        if len(group) > 1:
            board.say(f"{_said(group[0].cell)} and {len(group) - 1} more: {_sentence(e)}; each by itself now")
            for task in group:
                if not _over(_record(out, task.cell.key), again):
                    _make([task], out, lanes, log, claims, board, again)
            return
        _fail(group[0], out, e, again)
        board.say(f"{_said(group[0].cell)} failed after {time.perf_counter() - began:.0f} s: {_sentence(e)}")


class Lost(RuntimeError):
    """Another process has taken a run over, because this one gave no sign of life for too long."""


def _unless_lost(note: Callable[[dict], None], claims: Claims) -> Callable[[dict], None]:
    def report(record: dict) -> None:
        note(record)
        if "eval" in record and (lost := claims.lost()):
            raise Lost(f"{', '.join(lost)}: taken over by another process, which took this one for dead")

    return report


def _set_up(group: Sequence[Task]) -> tuple[Problem, dict[str, Entry]]:
    """The problem and the methods of a group, fitted to the model."""
    cell = group[0].cell
    texts = list(dict.fromkeys(t.cell.method for t in group))
    settings = Settings(**cell.settings)
    how: dict[str, Any] = {"max_buckets": 2, **cell.options}
    how |= {k: jnp.dtype(how[k]) for k in ("dtype", "param_dtype") if k in how}
    if how.get("decoding") is not None:
        how["decoding"] = Decoding(**how["decoding"])
    problem, entries = set_up(cell.source, cell.task, cell.data, ", ".join(texts), settings, **how)
    check_plans(problem, entries, settings)
    return problem, dict(zip(texts, entries, strict=True))


def _job(task: Task, problem: Problem, entry: Entry, out: Path) -> Job:
    cell = task.cell
    rate = cell.rate if cell.rate is not None else cell.factor * rate_of(entry, {}, problem.model, cell.source)
    settings = Settings(**cell.settings, learning_rate=rate)
    return Job(with_head_of_seed(problem, cell.seed), entry, settings, out / "runs" / cell.key)


def _said(cell: Cell) -> str:
    rate = f"lr {cell.rate:g}" if cell.rate is not None else f"{cell.factor:g} x lr"
    return f"{cell.model}, {cell.task}, {cell.method}, {rate}, seed {cell.seed}"


def _sentence(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__


def _facts(task: Task) -> dict[str, Any]:
    """What all records have."""
    cell = task.cell
    names = {"kind": "run", "key": cell.key, "stage": task.stage, "model": cell.model, "task": cell.task}
    return {
        **names,
        "method": cell.method,
        "seed": cell.seed,
        "rate": cell.rate,
        "factor": cell.factor,
        "headline": get_task(cell.task).headline,
        "cell": cell._asdict(),
        "versions": versions(),
        "device": device(),
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _run_record(task: Task, job: Job, result: Mapping[str, Any], evaluator: Evaluator) -> dict[str, Any]:
    own = {k: result[k] for k in KEPT if k in result}
    own |= {"rate": job.settings.learning_rate, "history": _rounded(thin(result["history"], POINTS))}
    own |= {"samples": result["samples"][:2]} if result["samples"] else {}
    if any(name == "dylora" for name, _ in job.entry.method.spec):
        own["by_rank"] = _by_rank(job, evaluator)
    return _facts(task) | own


def _rounded(history: Iterable[dict]) -> list[dict]:
    def short(value):
        return {k: short(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.5g}")

    return [{k: v if k == "step" else short(v) for k, v in r.items() if k != "grad_norm"} for r in history]


def _by_rank(job: Job, evaluator: Evaluator) -> dict[str, dict[str, float]]:
    """The scores of a DyLoRA cut to 1, 2, 4, ... of its directions."""
    params = load_adapter(job.folder / "adapter.safetensors", job.problem.model).params
    rank = next(a["rank"] for name, a in job.entry.method.spec if name == "dylora")
    ranks = [r for r in (2**i for i in range(rank.bit_length())) if r < rank]
    return {str(r): evaluator.scores(at_rank(params, r)) for r in [*ranks, rank]}


def _fail(task: Task, out: Path, why: BaseException, again: Mapping[str, int]) -> None:
    lines = traceback.format_exception(why)
    failed = {"kind": "failed", "error": _sentence(why), "attempts": again.get(task.cell.key, 0) + 1}
    _keep(out, _facts(task) | failed | {"traceback": "".join(lines)[-4000:]})


def _keep(out: Path, record: Mapping[str, Any]) -> None:
    folder = out / "runs" / record["key"]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RECORD, json.dumps(record))


@functools.cache
def versions() -> dict[str, str]:
    """Of what results may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            found[name] = "not installed"
    return found


@functools.cache
def device() -> dict[str, Any]:
    """Of what times and memory depend on."""
    there = jax.devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"kind": there[0].platform, "name": there[0].device_kind, "count": len(there), "cores": cores}
