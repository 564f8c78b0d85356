"""The loop: one run, or several in one program, from the first state or a saved one to the best."""

import dataclasses
import itertools
import json
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .checkpoint import StateFolder, write_atomically
from .counting import flops as count_flops
from .layout import stack_layers, unstack_layers
from .methods import Method
from .together import alike, alone, member, once, own, share, side_batches, side_by_side, stack
from .train import Objective, Settings, TrainState, make_optimizer, make_step, start
from .tree import Tree, combine, count, partition

AHEAD = 2  # steps that the device has before it when the host waits for one
MAY_DIFFER = ("seed", "data_seed", "learning_rate")  # between runs in one program


class NonFinite(ArithmeticError):
    """The loss or the gradient stopped being finite; the message says where and what came before."""


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; its state is saved and the message says how to resume."""


class Logger(NamedTuple):
    """What else takes a run's records, as they go into its log: `add` each of them, `close` at the end."""

    add: Callable[[dict], Any]
    close: Callable[[], Any]


class Run(NamedTuple):
    """One run.

    Attributes:
      params: adapted parameters, per-layer.
      settings: of runs in one program, equal but for `MAY_DIFFER`.
      epoch: number -> its batches, a function of nothing else, so that a run can resume anywhere.
      folder: where its log goes.
      loggers: each is made when the training begins, from the records up to where it resumes.
    """

    params: Tree
    settings: Settings
    epoch: Callable[[int], Iterator[dict]]
    folder: str | Path | None = None
    loggers: Sequence[Callable[[Sequence[dict]], Logger]] = ()


class Fitted(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the adapted parameters with the best trainables, in the run's layout.
      history: one record a step (`loss`, `grad_norm`) and one an evaluation (`eval`).
      best: the record of the best evaluation; None if there was none.
      trainable: number of trained scalars.
      peak_bytes: of the compiled step: arguments, outputs and temporaries, largest over the shapes.
      step_seconds: median, without compilation; of a program with n runs, an nth of it.
      compilations: number of compiled steps, one for each shape.
      seconds: of the loop, compilation included, of all the processes that a resumed run took; an nth of it.
      flops: of the steps, counted from their jaxpr (`counting.flops`), in either layout; an nth of the program's.
      together: n, the runs in the program.
    """

    params: Tree
    history: list[dict]
    best: dict | None
    trainable: int
    peak_bytes: int
    step_seconds: float
    compilations: int
    seconds: float
    flops: float
    together: int = 1


def lower(new: dict, old: dict) -> bool:
    """Whether the loss of these scores is below that of the old ones."""
    return new["loss"] < old["loss"]


def fit(
    params: Tree,
    method: Method,
    objective: Objective,
    epoch: Callable[[int], Iterator[dict]],
    steps_per_epoch: int,
    settings: Settings,
    *,
    evaluate: Callable[[Tree], dict] | None = None,
    better: Callable[[dict, dict], bool] = lower,
    folder: str | Path | None = None,
    resume_hint: str = "run the same command again",
    report: Callable[[dict], None] = lambda record: None,
) -> Fitted:
    """Trains a method and keeps its best state.

    Args:
      params: adapted parameters, per-layer.
      objective: (params, batch, key) -> (sum of losses, sum of weights).
      epoch: number -> its batches, a function of nothing else, so that a run can resume anywhere.
      folder: where training states and the log go; a run with the same folder resumes from the newest.
      evaluate, better, resume_hint, report: as for `fit_together`.

    Raises:
      NonFinite: with the step and the last finite values; the state before it is saved. Also for a
        non-finite evaluation.
      Interrupted: on Ctrl-C, after saving the state.
    """
    states = None if folder is None else Path(folder) / "state"
    run = Run(params, settings, epoch, folder)
    how: dict[str, Any] = {"evaluate": evaluate, "better": better, "resume_hint": resume_hint, "report": report}
    (found,) = fit_together([run], method, objective, steps_per_epoch, states=states, **how)
    if isinstance(found, NonFinite):
        raise found
    return found


def fit_together(
    runs: Sequence[Run],
    method: Method,
    objective: Objective,
    steps_per_epoch: int,
    *,
    lanes: int | None = None,
    evaluate: Callable[[Tree], dict] | None = None,
    better: Callable[[dict, dict], bool] = lower,
    states: str | Path | None = None,
    resume_hint: str = "run the same command again",
    report: Callable[[dict], None] = lambda record: None,
) -> list[Fitted | NonFinite]:
    """Trains several runs of a method in one program, each to what it would be alone, and keeps their best states.

    A run whose loss stops being finite stays where it was, and the others go on.

    Args:
      method: of all runs; each has its parameters by its own `init`.
      objective: (params, batch, key) -> (sum of losses, sum of weights).
      lanes: how many runs are computed at once, the others after them in the same program; default: all.
      evaluate: resolved params -> scores; called at the end of each epoch, or every `eval_every` steps.
      better: (new scores, best scores) -> whether to keep the new ones.
      states: folder for the training states; runs with the same folder resume from the newest.
      report: called with every record, of several runs with the means of those that are finite; `time_left` (seconds),
        `tokens` and `total` (steps) are added.

    Returns:
      For each run what it leaves, or why it has ended.

    Raises:
      ValueError: the runs differ in more than a program allows.
      Interrupted: on Ctrl-C, after saving the state.
    """
    began = time.perf_counter()
    _check_settings(runs, lanes)
    settings, n = runs[0].settings, len(runs)
    total = settings.steps or settings.epochs * steps_per_epoch
    program = _Program(runs, method, objective, total, n if lanes is None else lanes)
    state, keys = program.state, stack([jax.random.key(r.settings.seed) for r in runs])
    courses = [_Course(method, r, program.trainable(state, i)) for i, r in enumerate(runs)]
    times: list[float] = []
    flops = 0.0
    folder = None if states is None else StateFolder(states)
    if folder is not None and (newest := folder.latest()) is not None:
        (state, kept), meta = folder.restore(newest, (state, [c.kept for c in courses]))
        state, kept = jax.tree.map(jnp.asarray, (state, kept))
        state = state._replace(finite=jnp.ones_like(state.finite))  # what stopped a run may be gone
        for course, best, why in zip(courses, meta["best"], meta["ended"], strict=True):
            course.best, course.ended = best, None if why is None else NonFinite(why)
        for course, x in zip(courses, kept, strict=True):
            course.kept = x
        times, program.peaks, flops = meta["times"], meta["peaks"], meta["flops"]
        began -= meta["seconds"]
    done = int(np.max(state.step))
    for course in courses:
        course.log.keep(done)  # also without a state: a kill may have come before the first one was saved

    def over() -> bool:
        return all(c.ended is not None for c in courses)

    def save() -> None:
        if folder is not None:
            ended = [None if n == 1 or c.ended is None else str(c.ended) for c in courses]  # one alone may try again
            meta = {"best": [c.best for c in courses], "ended": ended, "times": times[-20:], "peaks": program.peaks}
            meta |= {"flops": flops, "seconds": time.perf_counter() - began}
            folder.save(int(np.max(state.step)), (state, [c.kept for c in courses]), meta)

    def note(of_step: tuple, timed: bool) -> None:
        """Reads the numbers of a step, which waits for it."""
        nonlocal clock
        step, metrics, extra = of_step
        losses, norms = (np.broadcast_to(metrics[k], (n,)).tolist() for k in ("loss", "grad_norm"))
        each = [{"step": step, "loss": x, "grad_norm": g} for x, g in zip(losses, norms, strict=True)]
        if records := [r for c, r in zip(courses, each, strict=True) if c.goes_on(r)]:
            report(_mean(records) | extra)
        if over():
            save()  # the state of before the step, as the last of them is not finite
        now = time.perf_counter()
        if timed:
            times.append(now - clock)
        clock = now

    def judge(evaluate: Callable[[Tree], dict]) -> None:
        """Evaluates the runs, and keeps those states that are the best so far."""
        records = []
        for i, course in enumerate(courses):
            if course.ended is not None:
                continue
            record = {"step": done, "eval": evaluate(program.resolved(state, i))}
            if not course.goes_on(record):
                continue
            records.append(record["eval"])
            if done >= method.settles(total) and (course.best is None or better(record["eval"], course.best["eval"])):
                course.best, course.kept = record, program.trainable(state, i)
        if records:
            report({"step": done, "eval": _mean(records)})

    waiting: deque[tuple] = deque()  # steps whose numbers are read while later ones run
    clock = time.perf_counter()
    with _Interrupts() as interrupts, ExitStack() as opened:
        for x in (*([] if folder is None else [folder]), *(c.log for c in courses)):
            opened.enter_context(closing(x))
        for batch in () if over() else program.batches(steps_per_epoch, done, total):
            step, compiling, of_step = program.compiled(state, batch, keys)
            while compiling and waiting:
                note(waiting.popleft(), timed=False)
            clock = time.perf_counter() if compiling else clock
            state, metrics = step(state, program.frozen, batch, keys)
            done += 1
            flops += of_step
            left = (total - done) * (float(np.median(times[-20:])) if times else 0.0)
            tokens = program.repeats * int(np.sum(batch["attention_mask"])) if "attention_mask" in batch else 0
            waiting.append((done, metrics, {"time_left": left, "tokens": tokens, "total": total}))
            stop = interrupts.seen
            due = done % (settings.eval_every or steps_per_epoch) == 0 or done == total
            saving = due or stop or done % settings.save_every == 0
            while len(waiting) > (0 if saving else AHEAD):
                note(waiting.popleft(), timed=True)
            if due and evaluate is not None:
                judge(evaluate)
            if over():
                break
            if not saving:
                continue
            save()
            clock = time.perf_counter()
            if interrupts.seen:
                where = f"its state is saved in {states}; to resume, {resume_hint}" if states else "nothing was saved"
                raise Interrupted(f"interrupted after step {done} of {total}; {where}")
    costs = {
        "peak_bytes": max(program.peaks.values(), default=0),
        "step_seconds": float(np.median(times)) / n if times else float("nan"),
        "compilations": len(program.peaks),
        "seconds": (time.perf_counter() - began) / n,
        "flops": flops / n,
        "together": n,
    }

    def left_by(i: int, course: _Course) -> Fitted | NonFinite:
        if course.ended is not None:
            return course.ended
        params = program.params(course.kept if course.best else program.trainable(state, i), i)
        return Fitted(params, course.log.records, course.best, program.counts[i], **costs)

    return [left_by(i, course) for i, course in enumerate(courses)]


def _check_settings(runs: Sequence[Run], lanes: int | None) -> None:
    if lanes is not None and lanes < 1:
        raise ValueError(f"lanes must be at least 1; got {lanes}")
    first = dataclasses.asdict(runs[0].settings)
    for run in runs[1:]:
        there = dataclasses.asdict(run.settings)
        if other := [k for k in first if k not in MAY_DIFFER and first[k] != there[k]]:
            raise ValueError(
                f"runs in one program may differ in {', '.join(MAY_DIFFER)}; these differ in {other}: train them apart"
            )


def _mean(records: Iterable[dict]) -> dict:
    """The means of all values; of one record, itself."""
    first, *others = records
    return {k: type(v)(np.mean([v, *(r[k] for r in others)])) if others else v for k, v in first.items()}


class _Program:
    """The runs as one: the state, what is frozen, and the compiled step for each shape of batch.

    Attributes:
      state: of all runs, along a first axis if there are several.
      frozen: the frozen arrays, those that all runs share once.
      counts: trained scalars of each run.
      repeats: how many runs see each batch.
      peaks: bytes of the compiled step by shape; of a resumed run, also those of before.
    """

    def __init__(self, runs: Sequence[Run], method: Method, objective: Objective, total: int, lanes: int):
        settings = runs[0].settings
        self.runs, self.n, self.method, self.layout = runs, len(runs), method, settings.layout
        self.padded = alike([r.params for r in runs])
        txs = [make_optimizer(r.settings, total, method) for r in runs]
        how = (settings.layout, settings.trainable_dtype, once(jnp.stack))
        states, frozen = zip(*(start(method, p, tx, *how) for p, tx in zip(self.padded, txs, strict=True)), strict=True)
        self.counts = [count(partition(r.params, method.trainable(r.params))[0]) for r in runs]  # before any padding
        self.state, (self.frozen, self.axes, self.whole) = stack(states), share(frozen)
        self.one_order = len({r.settings.order for r in runs}) == 1
        self.repeats = self.n if self.one_order else 1
        inner = make_step(objective, method, txs[0], settings.accumulate, settings.update)

        def step(state, frozen, batch, key):
            return inner(state, self.whole(frozen), batch, key)

        self._step = jax.jit(side_by_side(step, self.n, lanes, self.axes, self.one_order), donate_argnums=0)
        self._join = once(jnp.stack)
        self._resolve = jax.jit(lambda t, f: method.resolve(combine(t, self.whole(f)), None))
        self._steps: dict[str, Any] = {}
        self.peaks: dict[str, int] = {}
        self._flops: dict[str, int] = {}

    def trainable(self, state: TrainState, i: int) -> Tree:
        """A copy of run i's trainables."""
        return jax.tree.map(jnp.copy, state.trainable) if self.n == 1 else member(state.trainable, i, self.n)

    def resolved(self, state: TrainState, i: int) -> Tree:
        """Run i's parameters as its model takes them, to evaluate."""
        return self._resolve(member(state.trainable, i, self.n), own(self.frozen, self.axes, i))

    def params(self, trainable: Tree, i: int) -> Tree:
        """Run i's adapted parameters, in the run's layout."""
        params, first = combine(trainable, self.whole(own(self.frozen, self.axes, i))), self.runs[i].params
        if self.padded[i] is first:
            return params
        whole = alone(unstack_layers(params), self.padded[i], first)
        mask = self.method.trainable(first)
        whole = combine(partition(whole, mask)[0], partition(first, mask)[1])  # the base's arrays are no copies
        return stack_layers(whole, self._join) if self.layout == "scan" else whole

    def batches(self, steps_per_epoch: int, first: int, total: int) -> Iterator[dict]:
        """The batches from step `first` on: one of each run, or one for all if they share the order."""
        several = self.runs[:1] if self.one_order else self.runs
        for batches in zip(*(_from_step(r.epoch, steps_per_epoch, first, total) for r in several), strict=True):
            yield side_batches(batches)

    def compiled(self, state, batch, keys) -> tuple[Any, bool, int]:
        """The step for this batch, whether it was compiled just now, and its FLOPs."""
        shape = ", ".join(f"{k} {v.shape}" for k, v in sorted(batch.items()))
        new = shape not in self._steps
        if new:
            traced = self._step.trace(state, self.frozen, batch, keys)
            self._steps[shape], self._flops[shape] = traced.lower().compile(), count_flops(traced.jaxpr).total
            plan, self.peaks[shape] = self._steps[shape].memory_analysis(), 0
            if plan is not None:
                arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
                self.peaks[shape] = arguments + plan.temp_size_in_bytes
        return self._steps[shape], new, self._flops[shape]


def _from_step(epoch, steps_per_epoch, first, total) -> Iterator[dict]:
    """The batches from step `first` on, as if the epochs before had been walked through."""
    done = first
    while done < total:
        number, skip = divmod(done, steps_per_epoch)
        for batch in itertools.islice(epoch(number), skip, steps_per_epoch):
            if done < total:
                yield batch
                done += 1
        if done < min(total, (number + 1) * steps_per_epoch):
            raise ValueError(f"epoch {number} has fewer batches than steps_per_epoch={steps_per_epoch}")


class _Course:
    """What each run has of its own: its log, its best state, and, if it is over, why."""

    def __init__(self, method: Method, run: Run, kept: Tree):
        self.name = "+".join(name for name, _ in method.spec)
        self.log, self.kept = _Log(run), kept
        self.best: dict | None = None
        self.ended: NonFinite | None = None

    def goes_on(self, record: dict) -> bool:
        """Whether it does after this record, of a step or an evaluation; one that is not finite ends it."""
        if self.ended is not None:
            return False
        if np.isfinite(list(record.get("eval", record).values())).all():
            self.log.add(record)
            return True
        said = f"the loss is {record['loss']} and the gradient's norm {record['grad_norm']}" if "loss" in record else ""
        said = said or f"the evaluation gives {record['eval']}"
        before = next((r for r in reversed(self.log.records) if "loss" in r), None)
        self.ended = NonFinite(
            f"{self.name}: at step {record['step']} {said}; the last finite values were {before or 'none'}; "
            "try a smaller learning rate, a longer warm-up or clipping"
        )
        return False


class _Log:
    """The records of a run, also as JSON lines in the run's folder, and by its loggers."""

    def __init__(self, run: Run):
        self.file = None if run.folder is None else Path(run.folder) / "log.jsonl"
        self.records: list[dict] = []
        self.makers, self.loggers = run.loggers, []
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def keep(self, step: int) -> None:
        """Takes up the records up to a step; later ones, and one that a kill left half written, are dropped."""
        if self.file is not None and self.file.is_file():
            for line in self.file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break
                if record["step"] <= step:
                    self.records.append(record)
            write_atomically(self.file, "".join(json.dumps(r) + "\n" for r in self.records))
        self.loggers = [make(self.records) for make in self.makers]

    def add(self, record: dict) -> None:
        self.records.append(record)
        if self.file is not None:
            with self.file.open("a") as f:
                f.write(json.dumps(record) + "\n")
        for logger in self.loggers:
            logger.add(record)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()


class _Interrupts:
    """Turns the first Ctrl-C into a request to stop after the step; a second one acts at once."""

    def __enter__(self):
        self.seen = False
        self.old = {}
        if threading.current_thread() is threading.main_thread():
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self._note)
        return self

    def _note(self, number, frame):
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)
