"""The memory plan of a training step, before it runs and without its weights: abstract shapes, and XLA's own compiler.

A step is described by a `Case`: a model from its config alone, a method, a batch. `plan` compiles it ahead of time for
a device, present or absent (`peftjax.devices`), and reads the compiler's buffer assignment. `check` refuses a run that
cannot fit, compiling only where bounds leave it open.
"""

import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from .backward import groups
from .counting import bound, flops, traffic
from .devices import GB, Device, Target, compiler_of, find, target
from .hub import TASKS, Model, describe
from .methods import Method
from .problem import loss_of
from .run import entries_for
from .together import alike, once, share, side_by_side, stack
from .train import Settings, make_optimizer, make_step, start
from .tree import Tree, nbytes

MORE = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95"
_TRITON = "xla_gpu_enable_triton_gemm"
STEPS = 10**6  # a run's length where nobody says, longer than any method's schedule; no array's size depends on it


class Case(NamedTuple):
    """A training step that could be run.

    Attributes:
      describe: (dtype, param_dtype, quantize, remat) by name -> the model's shapes: `peftjax.hub.describe`, say.
      method: model -> method.
      batch: model -> the arrays of a batch, or their shapes.
      kind: of the task: 'generation', 'classification' or 'regression'.
      settings: how it trains; `accumulate`, `layout`, `update` and `trainable_dtype` change the plan.
      options: for `describe`.
      runs: trained in one program, each with a batch of its own unless `settings.data_seed` gives all the same.
      lanes: how many of them are computed at once.
    """

    describe: Callable[..., Model]
    method: Callable[[Model], Method]
    batch: Callable[[Model], dict]
    kind: str
    settings: Settings
    options: Mapping[str, Any] = {}
    runs: int = 1
    lanes: int = 1


class Step(NamedTuple):
    """A step as it would be called, on shapes.

    Attributes:
      call: the jitted step, its state donated.
      arguments: state, frozen arrays, batch, key.
      frozen, trainable, optimizer, batch: bytes of each.
      dtype: of the activations.
    """

    call: Any
    arguments: tuple
    frozen: int
    trainable: int
    optimizer: int
    batch: int
    dtype: str

    @property
    def held(self) -> int:
        """Bytes of all that stays from step to step."""
        return self.frozen + self.trainable + self.optimizer + self.batch


class Plan(NamedTuple):
    """What a training step needs, in bytes and FLOPs.

    Attributes:
      device: what it was planned for.
      by: the compiler that planned it; `exact`: whether that is the device's own.
      frozen: weights that do not train.
      trainable: weights that do.
      gradients: of the trainables; where the update is part of the backward pass, of the largest group of them.
      optimizer: state of the optimizer.
      activations: everything else that lives during a step: activations, temporaries, the batch.
      peak: the sum.
      flops: of a step.
      traffic: bytes that a step moves to and from memory; None where the compiled program does not tell.
      compile_seconds: what compiling took here.
      dtype: of the activations.
    """

    device: Device
    by: str
    exact: bool
    frozen: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    flops: float
    traffic: float | None
    compile_seconds: float
    dtype: str

    @property
    def held(self) -> int:
        """Bytes that do not depend on the batch."""
        return self.peak - self.activations

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the device its reserve."""
        return self.peak <= self.device.room

    @property
    def seconds(self) -> float | None:
        """The roofline: no step is faster than its FLOPs at the device's rate, or its bytes at the bandwidth.

        Williams et al. 2009, "Roofline: an insightful visual performance model". None where the device's rates are not
        known.
        """
        rate = self.device.rates.get(self.dtype)
        if rate is None:
            return None
        moved = (self.traffic or 0.0) / self.device.bandwidth if self.device.bandwidth else 0.0
        return max(self.flops / rate, moved)

    def json(self) -> dict[str, Any]:
        """The plan as JSON, with the device's name, whether it fits and the roofline."""
        facts = {k: v for k, v in self._asdict().items() if k != "device"}
        room = {"device": self.device.title, "memory": self.device.memory, "reserved": self.device.reserved}
        return room | facts | {"fits": self.fits, "seconds": self.seconds}


def abstract_batch(model: Model, kind: str, rows: int, length: int, target_length: int | None = None) -> dict:
    """The shapes of a batch as `peftjax.data.make_batch` has it.

    Args:
      length: of the texts; of what an encoder reads, where a decoder is beside it.
      target_length: of what that decoder writes; default: `length`.
    """
    texts, numbers = ("input_ids", "attention_mask"), (rows, length)
    shapes: dict[str, tuple] = dict.fromkeys(texts, numbers)
    if getattr(model.config, "type_vocab_size", 0):
        shapes["type_ids"] = numbers
    if kind == "generation" and model.family.start_id is not None:
        shapes |= dict.fromkeys(("target_ids", "loss_mask"), (rows, target_length or length))
    elif kind == "generation":
        shapes["loss_mask"] = numbers
    else:
        shapes["labels"] = (rows,)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    if kind == "regression":
        batch["labels"] = jax.ShapeDtypeStruct((rows,), jnp.float32)
    return batch | {
        "weight": jax.ShapeDtypeStruct((rows,), jnp.float32),
        "index": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }


def lay_out(case: Case) -> Step:
    """The step of a case, on shapes alone: nothing is loaded, computed or compiled.

    Raises:
      ValueError: the method does not fit the model.
    """
    s = case.settings
    model = case.describe(**case.options)
    method, batch = case.method(model), _shapes(case.batch(model))
    tx, n = make_optimizer(s, s.steps or STEPS, method), case.runs
    held: list[tuple] = []

    def begin(params: Tree) -> tuple:
        adapted = alike([method.init(jax.random.key(i), params, model.sites) for i in range(n)])
        how = (s.layout, s.trainable_dtype, once(jnp.stack))
        states, frozen = zip(*(start(method, p, tx, *how) for p in adapted), strict=True)
        arrays, axes, whole = share(frozen)
        held.append((axes, whole))
        return stack(states), arrays

    state, frozen = jax.eval_shape(begin, model.params)
    (axes, whole), one_batch = held[0], n == 1 or s.data_seed is not None
    if not one_batch:
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), batch)
    inner = make_step(loss_of(model, case.kind), method, tx, s.accumulate, s.update)

    def step(state, frozen, batch, key):
        return inner(state, whole(frozen), batch, key)

    call = jax.jit(side_by_side(step, n, case.lanes, axes, one_batch), donate_argnums=0)
    keys = jax.eval_shape(lambda: stack([jax.random.key(i) for i in range(n)]))
    return Step(
        call,
        (state, frozen, batch, keys),
        frozen=nbytes(frozen),
        trainable=nbytes(state.trainable),
        optimizer=nbytes(state.opt_state),
        batch=nbytes(batch),
        dtype=jnp.dtype(model.module.dtype).name,
    )


def _shapes(batch: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), batch)


def _gradients(step: Step, settings: Settings) -> int:
    """Bytes of the gradients that exist at once."""
    trainable = step.arguments[0].trainable
    if settings.update == "whole":
        return nbytes(trainable)
    return max((nbytes(group) for group in groups(trainable).values()), default=0)


def plan(case: Case, device: Device, *, estimate: bool = False) -> Plan:
    """The memory plan of a case on a device, by XLA.

    Args:
      estimate: by the CPU's compiler instead of the device's own.

    Raises:
      ValueError: the device's compiler is not installed (with the extra that has it), or the method does not fit.
    """
    step, place = lay_out(case), target(device, estimate)
    sharding = jax.sharding.SingleDeviceSharding(place.device)
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), step.arguments)
    traced = step.call.trace(*arguments)
    began = time.perf_counter()
    peak, moved = _compile(traced, place)
    gradients = max(0, min(_gradients(step, case.settings), peak - step.held))
    return Plan(
        device=device,
        by=place.by,
        exact=place.exact,
        frozen=step.frozen,
        trainable=step.trainable,
        gradients=gradients,
        optimizer=step.optimizer,
        activations=peak - gradients - step.frozen - step.trainable - step.optimizer,
        peak=peak,
        flops=float(flops(traced.jaxpr, device.platform).total),
        traffic=moved,
        compile_seconds=time.perf_counter() - began,
        dtype=step.dtype,
    )


def _compile(traced: Any, place: Target) -> tuple[int, float | None]:
    """The peak of a compiled step, and the bytes that it moves."""
    try:
        compiled = traced.lower().compile(compiler_options=place.options)
    except jax.errors.JaxRuntimeError as e:
        # Without a GPU to try kernels on, the CUDA compiler finds no tiles for products of some odd lengths.
        if "tile sizes" in str(e) and _TRITON not in place.options:
            return _compile(traced, place._replace(options={**place.options, _TRITON: False}))
        # The TPU's compiler refuses what does not fit, and says how much it wanted.
        wanted = re.search(r"Used ([\d.]+)([MG]) of [\d.]+[MG] hbm", str(e))
        if wanted is None:
            raise
        return int(float(wanted[1]) * {"M": 2**20, "G": 2**30}[wanted[2]]), None
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return arguments + memory.temp_size_in_bytes, traffic(compiled.as_text())


def largest_batch(plan_of: Callable[[int], Plan], rows: int) -> tuple[int, Plan | None]:
    """The largest number of rows whose plan fits, and that plan; 0 and None where one row does not fit.

    A peak grows nearly in proportion to the rows, so each try is where the line through the nearest two says. The
    answer is exact all the same: its plan fits, and that of one row more does not.

    Args:
      plan_of: rows -> plan.
      rows: to start from.
    """
    plans: dict[int, Plan] = {}
    fits, fails = 0, None
    while fails is None or fails - fits > 1:
        plans[rows] = plan_of(rows)
        fits, fails = (rows, fails) if plans[rows].fits else (fits, rows)
        guess = _crossing(plans)
        if fails is None:
            rows = min(guess, 16 * fits) if guess > fits else 2 * fits
        elif len(plans) > 8:  # the line is no good here: halve
            rows = (fits + fails) // 2
        else:
            rows = min(max(guess, fits + 1), fails - 1)
    return fits, plans.get(fits)


def _crossing(plans: dict[int, Plan]) -> int:
    """Where the line through the two plans nearest to the room meets it; through one plan and what is held at none."""
    room = next(iter(plans.values())).device.room
    a, b = [*sorted(plans, key=lambda n: abs(plans[n].peak - room))[:2], 0][:2]
    at_b = plans[b].peak if b else plans[a].held
    slope = (plans[a].peak - at_b) / (a - b)
    return a + int((room - plans[a].peak) // slope) if slope > 0 else 2 * max(plans)


def measure(case: Case) -> int:
    """The peak of the allocator, in bytes, over one step on zeros on the GPU or TPU that is here.

    The peak is the process's: measure each case in a process of its own.

    Raises:
      ValueError: this machine's device does not count what it allocates (a CPU).
    """
    if jax.local_devices()[0].memory_stats() is None:
        raise ValueError("the peak is measured on a GPU or a TPU, and this machine computes on a CPU; plan it instead")
    step = lay_out(case)
    state, frozen, batch, _ = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (*step.arguments[:3], None))
    jax.block_until_ready(step.call(state, frozen, batch, jax.random.key(0)))
    return int((jax.local_devices()[0].memory_stats() or {})["peak_bytes_in_use"])


class DoesNotFit(ValueError):
    """A training step needs more memory than the device has; the message says what would make it fit."""


def check(case: Case, device: Device, name: str, advise: bool = True) -> None:
    """Raises where a step cannot run on the device. Nothing is loaded, and little compiled.

    What is held from step to step is a lower bound, and with every intermediate result alive (`counting.bound`) an
    upper one; only where the device's memory is between the two is the step compiled for its plan.

    Args:
      name: of the method, for the message.
      advise: also look for what would make it fit, which may compile a few steps.

    Raises:
      DoesNotFit: with the sizes, and with what would make it fit.
      ValueError: the method does not fit the model.
    """
    step = lay_out(case)
    if _surely_fits(step, device):
        return
    needs, what = step.held, "before any activation"
    if needs <= device.room:
        found = plan(case, device)
        if found.fits:
            return
        needs, what = found.peak, "at its peak"
    parts = {"frozen": step.frozen, "trainable": step.trainable, "optimizer": step.optimizer}
    raise DoesNotFit(
        f"{name} needs {_size(needs)} {what}, and {device.title} has {_size(device.room)} for it "
        f"({', '.join(f'{part} {_size(n)}' for part, n in parts.items())})"
        + (f"; {_advice(case, device)}" if advise else "")
        + (f"; {MORE} gives JAX more of the GPU than its default of 75%" if device.platform == "cuda" else "")
    )


def _surely_fits(step: Step, device: Device) -> bool:
    """Whether it fits even with every intermediate result alive."""
    if step.held > device.room:
        return False
    # The CPU's compiler computes again early what `remat` means to be late: up to 1.7 times the bound was seen.
    margin = 2 if device.platform == "cpu" else 1
    return step.held + margin * bound(step.call.trace(*step.arguments).jaxpr) <= device.room


COPIED = 64 * 2**20  # bytes of what trains, with its optimizer's state, that a program in turn copies in little time


def room_for(case: Case, device: Device, runs: int, lanes: int | None = None) -> tuple[int, int]:
    """How many of so many runs a program on the device can hold, and how many of these at once (`lanes`).

    First fewer at once, then fewer in a program: halves, as for all a step may have to be compiled. On a CPU one is
    computed at a time, since its caches hold the activations of one better than of several; and runs that train much
    (`COPIED`) go apart, as such a program copies their states (experiments/results/together).

    Args:
      lanes: how many at once at most, whatever the device; default: as said.

    >>> from peftjax import devices
    >>> room_for(None, devices.find("cpu"), 1)
    (1, 1)
    """
    if lanes is None and runs > 1 and device.platform == "cpu":
        one = lay_out(case)
        lanes, runs = 1, 1 if one.trainable + one.optimizer > COPIED else runs
    lanes = min(runs, lanes or runs)
    while runs > 1:
        tried = case._replace(runs=runs, lanes=lanes)
        step = lay_out(tried)
        if _surely_fits(step, device) or (step.held <= device.room and plan(tried, device).fits):
            return runs, lanes
        if lanes > 1 and step.held <= device.room:
            lanes = -(-lanes // 2)
        else:
            runs = -(-runs // 2)
            lanes = min(lanes, runs)
    return 1, 1


def _size(n: int) -> str:
    return f"{n / GB:.2f} GB" if n >= GB / 10 else f"{n / 10**6:.3g} MB"


def _advice(case: Case, device: Device) -> str:
    tried = []
    for flags, variant in variants(case):
        try:
            if lay_out(variant).held > device.room:
                tried.append(flags)
                continue
            found = plan(variant, device)
        except ValueError:  # a way that this method, or this model, does not take
            continue
        if found.fits:
            return f"it would fit with {flags} ({_size(found.peak)})"
        tried.append(flags)
    even = f"it would not fit even with {' or '.join(tried[-2:])}; " if tried else ""
    return f"{even}choose a smaller model"


def variants(case: Case) -> Iterator[tuple[str, Case]]:
    """Ways to need less memory, each beside those before it: the flags of the command line, and the case.

    From what changes no number, over what rounds, to what fixes the base; for what trains all of it, the update inside
    the backward pass. The scanned layout is tried by the way.
    """
    flags: list[str] = []

    def changed(of_model: Mapping[str, Any], **of_training: Any) -> Case:
        settings = dataclasses.replace(case.settings, **of_training)
        return case._replace(options={**case.options, **of_model}, settings=settings)

    s = case.settings
    if case.options.get("remat", "none") != "block":
        flags, case = [*flags, "--remat block"], changed({"remat": "block"})
        yield " ".join(flags), case
    if s.layout == "loop":
        yield " ".join([*flags, "--layout scan"]), changed({}, layout="scan")
    if s.accumulate < s.batch_size and s.update == "whole":
        flags, case = [*flags, f"--accumulate {s.batch_size}"], changed({}, accumulate=s.batch_size)
        yield " ".join(flags), case
    half = jnp.dtype(jnp.bfloat16)
    if any(jnp.dtype(case.options.get(name, jnp.float32)) != half for name in ("dtype", "param_dtype")):
        flags = [*flags, "--dtype bfloat16 --param-dtype bfloat16"]
        case = changed(dict.fromkeys(("dtype", "param_dtype"), half))
        yield " ".join(flags), case
    if case.options.get("quantize") is None:
        yield " ".join([*flags, "--quantize nf4"]), changed({"quantize": "nf4"})
    if s.update == "whole":
        inside = "--update backward --clip 0 --trainable-dtype bfloat16"
        kept = [flag for flag in flags if "accumulate" not in flag]
        how: dict[str, Any] = {"update": "backward", "clip": None, "trainable_dtype": "bfloat16", "accumulate": 1}
        yield " ".join([*kept, inside]), changed({}, **how)


class Row(NamedTuple):
    """A line of the table of plans.

    Attributes:
      device: its name in `peftjax.devices.DEVICES`.
      method: as it was written.
      layout: of the parameters.
      rows: of the batch.
      plan: None where not even one row fits.
      note: what the reader should know.
    """

    device: str
    method: str
    layout: str
    rows: int
    plan: Plan | None
    note: str = ""

    def json(self) -> dict[str, Any]:
        facts = {"name": self.device, "method": self.method, "layout": self.layout, "batch": self.rows}
        return facts | (self.plan.json() if self.plan else {"fits": False}) | {"note": self.note}


def survey(
    model_name: str,
    methods: str | None,
    names: Sequence[str],
    settings: Settings,
    *,
    length: int,
    target_length: int | None = None,
    purpose: str | None = None,
    labels: int = 2,
    layouts: Sequence[str] = ("loop",),
    fit: bool = False,
    compiler: str = "auto",
    say: Callable[[str], Any] = print,
    **options: Any,
) -> Iterator[Row]:
    """The plans of methods on devices, one after another.

    Args:
      model_name: hub name, folder or config file; no weight is read.
      methods: as on the command line of `compare`.
      names: of devices.
      settings: `batch_size` is the batch's rows.
      length, target_length: of the texts in tokens, as for `abstract_batch`.
      purpose: 'generation' or 'classification'; default: what the config's architecture says.
      labels: of a classifier; 1: a regression.
      fit: plan the largest batch that fits instead.
      compiler: 'device', the device's own; 'cpu', an estimate by the CPU's; 'auto': the first if it is installed.
      options: `dtype`, `param_dtype`, `quantize`, `remat`.

    Raises:
      ValueError: an unknown device (with the list), a compiler that is not installed (with the extra), a length or a
        number of labels that the model does not take, a method that does not fit the model.
    """
    if compiler not in ("auto", "device", "cpu"):
        raise ValueError(f"there is no compiler {compiler!r}; there are auto, device and cpu")
    for name, value in {"--seq": length, "--target": target_length, "--labels": labels}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    found = {name: find(name) for name in names}
    shapes = functools.cache(functools.partial(_described, model_name, purpose, labels))
    model = shapes(**options)
    kind = _kind(model, labels)
    if target_length is not None and (kind != "generation" or model.family.start_id is None):
        raise ValueError("--target is of what a decoder beside an encoder writes, and this model has none; write --seq")
    longest = max(length, target_length or 0)
    if longest > model.max_length:
        raise ValueError(f"texts of {longest} tokens: this model takes {model.max_length}; write a smaller --seq")
    chosen = entries_for(methods, model, lambda: _no_words)
    for entry, (name, device), layout in itertools.product(chosen, found.items(), layouts):
        estimate = compiler == "cpu" or (compiler == "auto" and not compiler_of(device))

        def plan_of(rows: int, entry=entry, device=device, layout=layout, estimate=estimate) -> Plan:
            s = dataclasses.replace(settings, batch_size=rows, layout=layout)
            sizes = {"kind": kind, "rows": rows, "length": length, "target_length": target_length}
            batch = functools.partial(abstract_batch, **sizes)
            return plan(Case(shapes, lambda _: entry.method, batch, kind, s, options), device, estimate=estimate)

        try:
            rows = settings.batch_size
            rows, best = largest_batch(plan_of, rows) if fit else (rows, plan_of(rows))
        except ValueError as e:
            if methods not in (None, "all"):
                raise
            say(f"{entry.name} is left out: {e}")  # nobody asked for it by name
        else:
            yield Row(name, entry.name, layout, rows, best, entry.note)


def _no_words(text: str, **_: Any) -> dict[str, list[int]]:
    """In place of a tokenizer, which a config file has not: what a prompt starts from changes no shape."""
    return {"input_ids": []}


def _described(name: str, purpose: str | None, labels: int, **options: Any) -> Model:
    model = describe(name, purpose, **options)
    if model.module.head != "classification":
        return model
    return describe(name, "classification", labels=labels, **options)


def _kind(model: Model, labels: int) -> str:
    """The kind of task that the model's head is for."""
    if model.module.head in TASKS["generation"]:
        return "generation"
    if model.module.head != "classification":
        raise ValueError("this model has no head to train; say what it is for with --task generation or classification")
    return "regression" if labels == 1 else "classification"


COLUMNS = ("frozen", "trainable", "gradients", "optimizer", "activations", "peak")


def table(rows: Sequence[Row]) -> Table:
    """The plans by part, in GB (1e9 bytes), or in MB where every peak is below 1 GB."""
    unit, scale = _unit(rows)
    several = len({row.layout for row in rows}) > 1
    out = Table(box=None, padding=(0, 1, 0, 0), title=unit)
    for title in ("device", "method", "batch"):
        out.add_column(title, no_wrap=True, justify="right" if title == "batch" else "left")
    for title in (*COLUMNS, "fits", "TFLOP", "moved", "ms", *(("layout", "compile s") if several else ())):
        out.add_column(title, justify="right")
    for row in rows:
        out.add_row(row.device, row.method, str(row.rows), *_cells(row.plan, scale), *_layout(row, several))
    return out


def _unit(rows: Sequence[Row]) -> tuple[str, float]:
    most = max((row.plan.peak for row in rows if row.plan is not None), default=GB)
    return ("GB", GB) if most >= GB else ("MB", GB / 1000)


def _cells(p: Plan | None, scale: float) -> list[str]:
    if p is None:
        return [*["-"] * len(COLUMNS), "no", *["-"] * 3]
    verdict = "yes" if p.fits else "no"
    return [
        *(f"{getattr(p, part) / scale:.2f}" for part in COLUMNS),
        verdict if p.exact else f"{verdict} (est.)",
        f"{p.flops / 1e12:.3g}",
        "-" if p.traffic is None else f"{p.traffic / scale:.3g}",
        "-" if p.seconds is None else f"{1000 * p.seconds:.3g}",
    ]


def _layout(row: Row, several: bool) -> list[str]:
    return [row.layout, "-" if row.plan is None else f"{row.plan.compile_seconds:.1f}"] if several else []


def notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table should know."""
    plans = [row.plan for row in rows if row.plan is not None]
    unit, _ = _unit(rows)
    found = [
        f"One training step in {unit} (1e{9 if unit == 'GB' else 6} bytes). Activations: with temporaries and the "
        "batch. ms: the least that its FLOPs take at the data sheet's rate, or its bytes at the bandwidth."
    ]
    for p in {p.device.title: p for p in plans}.values():
        kept = f", {p.device.reserved / GB:.2g} of them kept for context and workspaces" if p.device.reserved else ""
        found.append(
            f"{p.device.title}: {p.device.memory / GB:.4g} GB{kept}; planned by {p.by}, jax {jax.__version__}."
        )
    if any(p.device.platform == "cuda" and 0.75 * p.device.memory < p.peak and p.fits for p in plans):
        found.append(f"JAX takes 75% of a GPU by default; what needs more fits with {MORE}.")
    if any(not p.exact for p in plans):
        extras = {"cuda": "plan", "tpu": "tpu"}
        wanted = dict.fromkeys(extras[p.device.platform] for p in plans if not p.exact)
        found.append(
            "An estimate comes from this machine's compiler; for the device's own: "
            + " or ".join(f"pip install 'peftjax[{extra}]'" for extra in wanted)
        )
    return [*found, *dict.fromkeys(f"{row.method}: {row.note}" for row in rows if row.note)]
