"""Training: one loop that differentiates and optimises the trainable partition only."""

import dataclasses
import itertools
import json
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .backward import by_group, groups, unite, update_in_backward
from .checkpoint import StateFolder, write_atomically
from .counting import flops as count_flops
from .layout import stack_layers
from .methods import Method, chain
from .rounding import apply_updates
from .tree import Tree, cast, combine, count, distinct, map_with_path, partition
from .weights import map_nodes

Objective = Callable[[Tree, dict, jax.Array | None], tuple[jax.Array, jax.Array]]  # the key turns dropout on
AHEAD = 2  # steps that the device has before it when the host waits for one


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one run trains. Everything random follows from `seed`."""

    epochs: int = 3
    steps: int | None = None  # instead of epochs
    batch_size: int = 32
    learning_rate: float = 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # how the rate falls after the warm-up
    warmup: float = 0.06  # share of the steps in which the rate rises from 0
    weight_decay: float = 0.01  # AdamW's; see `decays` for what is spared
    clip: float | None = 1.0  # global norm of the trainables' gradient
    accumulate: int = 1  # parts into which a batch is split, one after another
    seed: int = 0
    eval_every: int | None = None  # steps; None: at the end of each epoch
    save_every: int = 200  # steps between training states
    layout: Literal["loop", "scan"] = "loop"
    update: Literal["whole", "backward"] = "whole"  # of all at the end, or of each layer inside the backward pass
    trainable_dtype: Literal["float32", "bfloat16"] = "float32"  # the optimizer's moments are float32 in any case

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate", "save_every", "steps", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a number above 0; got {value}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be a number of at least 0; got {self.weight_decay}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of the steps, between 0 and 1; got {self.warmup}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0; got {self.seed}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} does not divide into accumulate={self.accumulate} parts")
        for name in ("schedule", "layout", "update", "trainable_dtype"):
            known = get_args(get_type_hints(Settings)[name])
            if getattr(self, name) not in known:
                raise ValueError(f"there is no {name} {getattr(self, name)!r}; there are {known}")
        if self.update == "backward" and self.clip is not None:
            raise ValueError(
                f"clip={self.clip} needs the norm of the whole gradient, and update='backward' never has it at once; "
                "write clip=None (--clip 0)"
            )
        if self.update == "backward" and self.accumulate > 1:
            raise ValueError(
                f"accumulate={self.accumulate} keeps the whole gradient to add to it, and update='backward' is there "
                "to keep none; write accumulate=1, with a smaller batch_size if memory is short"
            )


class TrainState(NamedTuple):
    """What changes from step to step.

    Attributes:
      step: steps taken.
      trainable: the trainable partition, with holes.
      opt_state: of the optimizer; nothing in it belongs to a frozen leaf.
      finite: False from the first non-finite loss or gradient on; the state then stays as it was before.
    """

    step: jax.Array
    trainable: Tree
    opt_state: Any
    finite: jax.Array


class NonFinite(ArithmeticError):
    """The loss or the gradient stopped being finite; the message says where and what came before."""


class Interrupted(KeyboardInterrupt):
    """The run was interrupted; its state is saved and the message says how to resume."""


def schedule(settings: Settings, total: int) -> optax.Schedule:
    """The learning rate by step: a linear rise over the warm-up, then the named decay to 0."""
    rise = round(settings.warmup * total)
    peak, rest = settings.learning_rate, max(total - rise, 1)
    falls = {
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "constant": optax.constant_schedule(peak),
    }
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(rise, 1)), falls[settings.schedule]], [rise])


def decays(trainable: Tree) -> Tree:
    """The mask of weight decay: all leaves but biases (a prefix MLP's are `b1`, `b2`), norms' scales, and `undecayed`.

    A class of nodes names in `undecayed` the fields that at 0 would not leave the base as it is: DoRA's lengths,
    IA3's factors, PiSSA's and OLoRA's factors. Their decay would shrink the base's weights; LoRA's does not.
    """
    kept = set()

    def note(path, n):
        kept.update(f"{path}/{field}" for field in getattr(type(n), "undecayed", ()))
        return n

    map_nodes(note, trainable)
    spared = r"(^|/)(bias|scale|b\d+)(/|$)"
    return map_with_path(lambda path, _: path not in kept and re.search(spared, path) is None, trainable)


def make_optimizer(settings: Settings, total: int, method: Method) -> optax.GradientTransformationExtraArgs:
    """AdamW with clipping and the schedule, wrapped by the method; for an update in the backward pass, by group."""
    adamw = optax.adamw(schedule(settings, total), weight_decay=settings.weight_decay, mask=decays)
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    inner = optax.with_extra_args_support(optax.chain(clip, adamw))  # so that a wrapper can hand on all it gets
    tx = optax.with_extra_args_support(method.planned(total).optimizer(inner))
    return by_group(tx) if settings.update == "backward" else tx


def make_step(
    objective: Objective,
    method: Method,
    tx: optax.GradientTransformationExtraArgs,
    accumulate: int = 1,
    update: str = "whole",
):
    """The training step `(state, frozen, batch, key) -> (state, {'loss', 'grad_norm'})`, to be jitted.

    The loss is the objective's sum over its weight, over the whole batch, plus the method's penalty; split
    into `accumulate` parts it is the same number.

    Args:
      tx: the optimizer; for `update='backward'` one with states by group (`backward.by_group`).
      update: 'whole', or 'backward' for an update of each group as soon as its gradient is there: the same numbers,
        and only about one layer's gradient in memory. It differs where a gradient is not finite: what the backward pass
        updated before it met that gradient stays updated. A loss that is not finite leaves everything as it was.
    """

    def part(trainable, frozen, batch, key):
        resolve_key, model_key = jax.random.split(key)
        params = method.resolve(combine(trainable, frozen), resolve_key)
        return objective(params, batch, model_key)

    gradient = jax.value_and_grad(part, has_aux=True)
    penalty = jax.value_and_grad(lambda t, f: jnp.asarray(method.penalty(combine(t, f)), jnp.float32))

    def mean(grads, weight, extra):
        return jax.tree.map(lambda g, e: g.astype(jnp.float32) / weight + e, grads, extra)

    def updated(grads, opt_state, trainable, key, step):
        tx_key = jax.random.fold_in(key, 2**32 - 1)  # no number that `split` counts to
        updates, opt_state = tx.update(grads, opt_state, cast(trainable, jnp.float32), key=tx_key, step=step)
        rounding_key = jax.random.fold_in(key, 2**32 - 2)
        return apply_updates(rounding_key, trainable, updates), opt_state

    def whole(state: TrainState, frozen: Tree, batch: dict, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        if accumulate == 1:
            (total, weight), grads = gradient(state.trainable, frozen, batch, key)
        else:
            parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)

            def add(carry, xs):
                (total, weight), grads = gradient(state.trainable, frozen, xs[0], xs[1])
                return jax.tree.map(jnp.add, carry, (total, weight, cast(grads, jnp.float32))), None

            zero = (jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, cast(state.trainable, jnp.float32)))
            (total, weight, grads), _ = jax.lax.scan(add, zero, (parts, jax.random.split(key, accumulate)))
        weight = jnp.maximum(weight, 1e-6)
        extra, extra_grads = penalty(state.trainable, frozen)
        loss = total / weight + extra
        grads = mean(grads, weight, extra_grads)
        norm = optax.tree.norm(grads)
        finite = state.finite & jnp.isfinite(loss) & jnp.isfinite(norm)
        trainable, opt_state = updated(grads, state.opt_state, state.trainable, key, state.step)
        new = TrainState(state.step + 1, trainable, opt_state, finite)
        return _kept(finite, new, state._replace(finite=finite)), {"loss": loss, "grad_norm": norm}

    def backward(state: TrainState, frozen: Tree, batch: dict, key: jax.Array):
        key = jax.random.fold_in(key, state.step)
        extra, extra_grads = penalty(state.trainable, frozen)
        old, extras = groups(state.trainable), groups(extra_grads)

        def begin(value):
            total, weight = value[0], jnp.maximum(value[1], 1e-6)
            loss = total / weight + extra
            return loss, weight, jnp.zeros(()), state.finite & jnp.isfinite(loss)

        def update(name, grads, carry):
            loss, weight, square, finite = carry
            grads, before = mean(grads, weight, extras[name]), (old[name], {name: state.opt_state[name]})
            square = square + optax.tree.norm(grads, squared=True)
            finite = finite & jnp.isfinite(square)
            new = updated(grads, before[1], before[0], key, state.step)
            return _kept(finite, new, before), (loss, weight, square, finite)

        arguments = (frozen, batch, key)
        new, (loss, _, square, finite) = update_in_backward(gradient, state.trainable, arguments, begin, update)
        trainable = unite(part for part, _ in new.values())
        opt_state = {name: s for _, states in new.values() for name, s in states.items()}
        step = jnp.where(finite, state.step + 1, state.step)
        return TrainState(step, trainable, opt_state, finite), {"loss": loss, "grad_norm": jnp.sqrt(square)}

    if update == "backward" and accumulate > 1:
        raise ValueError(f"update='backward' takes the whole batch at once; got accumulate={accumulate}")
    return backward if update == "backward" else whole


def _kept(finite: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


class Fitted(NamedTuple):
    """What a run leaves.

    Attributes:
      params: the adapted parameters with the best trainables, in the run's layout.
      history: one record a step (`loss`, `grad_norm`) and one an evaluation (`eval`).
      best: the record of the best evaluation; None if there was none.
      trainable: number of trained scalars.
      peak_bytes: of the compiled step: arguments, outputs and temporaries, largest over the shapes.
      step_seconds: median, without compilation.
      compilations: number of compiled steps, one for each shape.
      seconds: of the loop, compilation included, of all the processes that a resumed run took.
      flops: of the steps, counted from their jaxpr (`counting.flops`), in either layout.
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


def start(
    method: Method, params: Tree, tx: Any, layout: str = "loop", dtype: Any = jnp.float32
) -> tuple[TrainState, Tree]:
    """The first state and the frozen partition of adapted, per-layer parameters.

    Trainables are copied to the dtype: they are donated to the step, and a selective method's trainables are
    the base's own arrays. The optimizer sees them in float32.
    """
    params = stack_layers(params) if layout == "scan" else params
    trainable, frozen = partition(params, chain(method).trainable(params))  # a chain refuses to train nothing
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), cast(trainable, dtype))
    opt_state = jax.jit(lambda t: tx.init(cast(t, jnp.float32)))(trainable)  # compiled: the cast itself is never made
    state = TrainState(jnp.int32(0), trainable, opt_state, jnp.bool_(True))
    return state, frozen


def fit(
    params: Tree,
    method: Method,
    objective: Objective,
    epoch: Callable[[int], Iterator[dict]],
    steps_per_epoch: int,
    settings: Settings,
    *,
    evaluate: Callable[[Tree], dict] | None = None,
    better: Callable[[dict, dict], bool] = lambda new, old: new["loss"] < old["loss"],
    folder: str | Path | None = None,
    resume_hint: str = "run the same command again",
    report: Callable[[dict], None] = lambda record: None,
) -> Fitted:
    """Trains a method and keeps its best state.

    Args:
      params: adapted parameters, per-layer.
      objective: (params, batch, key) -> (sum of losses, sum of weights).
      epoch: number -> its batches, a function of nothing else, so that a run can resume anywhere.
      evaluate: resolved params -> scores; called at the end of each epoch, or every `eval_every` steps.
      better: (new scores, best scores) -> whether to keep the new ones.
      folder: where training states and the log go; a run with the same folder resumes from the newest.
      report: called with every record; `time_left` (seconds), `tokens` and `total` (steps) are added.

    Raises:
      NonFinite: with the step and the last finite values; the state before it is saved. Also for a
        non-finite evaluation.
      Interrupted: on Ctrl-C, after saving the state.
    """
    began = time.perf_counter()
    total = settings.steps or settings.epochs * steps_per_epoch
    tx = make_optimizer(settings, total, method)
    state, frozen = start(method, params, tx, settings.layout, settings.trainable_dtype)
    frozen, whole = distinct(frozen)
    trained = count(partition(params, method.trainable(params))[0])  # before stacking, which may pad
    best_trainable, best = jax.tree.map(jnp.copy, state.trainable), None
    log = _Log(folder)
    inner = make_step(objective, method, tx, settings.accumulate, settings.update)

    def step(state, frozen, batch, key):
        return inner(state, whole(frozen), batch, key)

    compiled = _Compiled(step)
    times: list[float] = []
    flops = 0.0
    states = None if folder is None else StateFolder(Path(folder) / "state")
    if states is not None and (newest := states.latest()) is not None:
        (state, best_trainable), meta = states.restore(newest, (state, best_trainable))
        state, best_trainable = jax.tree.map(jnp.asarray, (state, best_trainable))
        state = state._replace(finite=jnp.bool_(True))  # what stopped the run may be gone
        best, times, compiled.peaks = meta["best"], meta["times"], meta["peaks"]
        flops = meta["flops"]
        began -= meta["seconds"]
    key = jax.random.key(settings.seed)
    resolved = jax.jit(lambda t, f: method.resolve(combine(t, whole(f)), None))
    done = int(state.step)
    log.keep(done)  # also without a state: a kill may have come before the first one was saved

    def save():
        if states is not None:
            meta = {"best": best, "times": times[-20:], "peaks": compiled.peaks, "flops": flops}
            meta["seconds"] = time.perf_counter() - began
            states.save(int(state.step), (state, best_trainable), meta)  # of a non-finite step: the one before

    def note(pending, timed):
        nonlocal clock
        _note(log, pending, method, save, report)
        now = time.perf_counter()
        if timed:
            times.append(now - clock)
        clock = now

    waiting: deque[tuple] = deque()  # steps whose numbers are read while later ones run
    clock = time.perf_counter()
    with _Interrupts() as interrupts, nullcontext() if states is None else closing(states):
        for batch in _from_step(epoch, steps_per_epoch, done, total):
            run, compiling, of_step = compiled.get(state, frozen, batch, key)
            while compiling and waiting:
                note(waiting.popleft(), timed=False)
            clock = time.perf_counter() if compiling else clock
            state, metrics = run(state, frozen, batch, key)
            done += 1
            flops += of_step
            left = (total - done) * (float(np.median(times[-20:])) if times else 0.0)
            tokens = int(np.sum(batch["attention_mask"])) if "attention_mask" in batch else 0
            waiting.append((done, metrics, {"time_left": left, "tokens": tokens, "total": total}))
            stop = interrupts.seen
            due = done % (settings.eval_every or steps_per_epoch) == 0 or done == total
            saving = due or stop or done % settings.save_every == 0
            while len(waiting) > (0 if saving else AHEAD):
                note(waiting.popleft(), timed=True)
            if due and evaluate is not None:
                scores = evaluate(resolved(state.trainable, frozen))
                record = {"step": done, "eval": scores}
                if not np.isfinite(list(scores.values())).all():
                    raise _non_finite(method, done, f"the evaluation gives {scores}", log)
                log.add(record)
                report(record)
                if done >= method.settles(total) and (best is None or better(scores, best["eval"])):
                    best, best_trainable = record, jax.tree.map(jnp.copy, state.trainable)
            if not saving:
                continue
            save()
            clock = time.perf_counter()
            if interrupts.seen:
                where = f"its state is saved in {folder}; to resume, {resume_hint}" if folder else "nothing was saved"
                raise Interrupted(f"interrupted after step {done} of {total}; {where}")
    if best is None:
        best_trainable = state.trainable
    return Fitted(
        params=combine(best_trainable, whole(frozen)),
        history=log.records,
        best=best,
        trainable=trained,
        peak_bytes=max(compiled.peaks.values(), default=0),
        step_seconds=float(np.median(times)) if times else float("nan"),
        compilations=len(compiled.peaks),
        seconds=time.perf_counter() - began,
        flops=flops,
    )


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


def _note(log, pending, method, save, report) -> None:
    step, metrics, extra = pending
    record = {"step": step, "loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}
    if not (np.isfinite(record["loss"]) and np.isfinite(record["grad_norm"])):
        save()
        said = f"the loss is {record['loss']} and the gradient's norm {record['grad_norm']}"
        raise _non_finite(method, step, said, log)
    log.add(record)
    report({**record, **extra})


def _non_finite(method, step, said, log) -> NonFinite:
    before = next((r for r in reversed(log.records) if "loss" in r), None)
    names = "+".join(name for name, _ in method.spec)
    return NonFinite(
        f"{names}: at step {step} {said}; the last finite values were {before or 'none'}. The last state saved "
        "before is kept; try a smaller learning rate, a longer warm-up or clipping"
    )


class _Compiled:
    """One compiled step for each shape of batch, with its memory plan and its FLOPs."""

    def __init__(self, step):
        self.jitted = jax.jit(step, donate_argnums=0)
        self.steps: dict[str, Any] = {}
        self.peaks: dict[str, int] = {}  # bytes by shape; of a resumed run, also those of before
        self.flops: dict[str, int] = {}

    def get(self, state, frozen, batch, key):
        shape = ", ".join(f"{k} {v.shape}" for k, v in sorted(batch.items()))
        new = shape not in self.steps
        if new:
            traced = self.jitted.trace(state, frozen, batch, key)
            self.steps[shape], self.flops[shape] = traced.lower().compile(), count_flops(traced.jaxpr).total
            plan, self.peaks[shape] = self.steps[shape].memory_analysis(), 0
            if plan is not None:
                arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
                self.peaks[shape] = arguments + plan.temp_size_in_bytes
        return self.steps[shape], new, self.flops[shape]


class _Log:
    """The records of a run, also as JSON lines in the run's folder."""

    def __init__(self, folder: str | Path | None):
        self.file = None if folder is None else Path(folder) / "log.jsonl"
        self.records: list[dict] = []
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

    def add(self, record: dict) -> None:
        self.records.append(record)
        if self.file is not None:
            with self.file.open("a") as f:
                f.write(json.dumps(record) + "\n")


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
