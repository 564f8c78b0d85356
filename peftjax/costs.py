"""What queries and training cost: FLOPs as XLA counts them, seconds by the clock; when training has paid for itself."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from . import data
from .counting import flops
from .hub import Model
from .methods import Method
from .methods.base import select
from .problem import Problem, objective
from .train import Settings, make_optimizer, make_step, start
from .tree import Tree, flatten
from .weights import is_node

XLA, ANALYTIC, JAXPR = "XLA", "analytic", "jaxpr"  # who counted


class Count(NamedTuple):
    """A number of FLOPs (multiplications and additions count one each), and who counted."""

    flops: float
    by: str = XLA


def analytic(model: Model, rows: int, length: int) -> float:
    """`rows (2 N T + 4 T² Σ_l d_l)`: the forward pass over T tokens of a row.

    N are the parameters of the linear weights and of the output head, d_l the features of the queries of layer l; the
    second term is that of the attention (scores, and the weighted sum of the values). What methods add does not count,
    and neither do norms and activations. Kaplan et al. 2020 (arXiv:2001.08361), section 2.1, with the attention over
    all T positions, since XLA computes masked ones too.
    """
    leaves = flatten(model.params, is_leaf=is_node)
    heads = {s.path for s in model.sites if s.kind == "lm_head"} or {s.path for s in model.sites if s.tied}
    paths = {s.path for s in select(model.params, model.sites, ["linear"])} | heads
    n = sum(int(np.prod(leaves[p].shape)) for p in paths)
    attention = sum(s.heads[0] * s.heads[2] for s in model.sites if s.kind == "attention" and s.heads is not None)
    return float(rows * (2 * n * length + 4 * length**2 * attention))


def counted(stage: jax.stages.Lowered | jax.stages.Compiled) -> float | None:
    """XLA's count of a lowered or compiled function; None where the platform gives none.

    Of a loop it counts the body once.
    """
    try:
        found = stage.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # a platform whose compiler counts nothing
        return None
    found = found[0] if isinstance(found, list) and found else found
    flops = found.get("flops", 0.0) if isinstance(found, dict) else 0.0
    return float(flops) if flops > 0 else None


def forward(model: Model, params: Tree, batch: dict, stage: Any = None) -> Count:
    """FLOPs of the forward pass over a batch: XLA's count of a compiled `stage`, else of the model, else `analytic`."""
    found = counted(jax.jit(lambda p, b: model.forward(p, b).logits).lower(params, batch) if stage is None else stage)
    rows, length = np.shape(batch["input_ids"])
    return Count(analytic(model, rows, length), ANALYTIC) if found is None else Count(found)


def decoding(model: Model, params: Tree, rows: int, length: int, new: int) -> tuple[Count, Count]:
    """FLOPs of decoding with a cache of `length + new` tokens: of the prompts, and of one further token of all rows."""
    encodes = model.family.start_id is not None

    def abstract(n):
        return jax.ShapeDtypeStruct((rows, n), np.int32)

    def first(params, batch):
        cache = model.empty_cache(params, rows, new if encodes else length + new)
        out = model.forward(params, batch, cache=cache, last_only=True)
        return out.logits, out.cache

    def more(params, batch, cache):
        way: dict[str, Any] = {} if encodes else {"continued": True}
        return model.forward(params, batch, cache=cache, last_only=True, **way).logits

    prompt = {"input_ids": abstract(length), "attention_mask": abstract(length)}
    token = {"decoder_input_ids": abstract(1)}
    if not encodes:
        prompt["positions"] = abstract(length)
        token = {"input_ids": abstract(1), "attention_mask": abstract(1), "positions": abstract(1)}
    start_ = counted(jax.jit(first).lower(params, prompt))
    _, cache = jax.eval_shape(first, params, prompt)
    step = counted(jax.jit(more).lower(params, token, cache))
    if start_ is None or step is None:
        return Count(analytic(model, rows, length), ANALYTIC), Count(analytic(model, rows, 1), ANALYTIC)
    return Count(start_), Count(step)


def training(problem: Problem, method: Method, settings: Settings) -> Count:
    """FLOPs of a training run: of the step's jaxpr at each padded length, times the steps of that length.

    XLA's count of the compiled step differs by a percent or two, but needs a compilation and counts of accumulation
    one part (`peftjax.counting.flops`). Evaluations during training do not count.
    """
    model, size = problem.model, settings.batch_size
    total = settings.steps or settings.epochs * problem.steps_per_epoch(size)
    tx = make_optimizer(settings, total, method)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, model.sites), model.params)
    state, frozen = jax.eval_shape(lambda p: start(method, p, tx, settings.layout), params)
    step = jax.jit(make_step(objective(problem), method, tx, settings.accumulate))
    planned = data.plan(problem.train, size, problem.buckets)
    seen: dict[tuple[int, int], int] = {}
    for one in planned:
        shape = (one.length, one.target_length)
        if shape not in seen:
            batch = data.make_batch(problem.train, one, size, pad_id=problem.pad_id)
            seen[shape] = flops(step.trace(state, frozen, batch, jax.random.key(0)).jaxpr).total
    each = [seen[one.length, one.target_length] for one in planned]
    return Count(total * sum(each) / len(each), JAXPR)


class Call(NamedTuple):
    """One call of a `Meter`: the shapes of its batch, its rows' numbers (-1: filler), and what it took."""

    shape: tuple
    index: tuple[int, ...]
    seconds: float
    count: Count


class Meter:
    """Calls a function of (params, batch), compiled ahead for each shape, and notes what every call takes.

    Args:
      function: traceable by JAX; `batch` is a dict of arrays with `input_ids` (rows, length).
      count: (params, batch, output, compiled) -> Count of the call.
    """

    def __init__(self, function: Callable, count: Callable[..., Count]):
        self.jitted, self.count = jax.jit(function), count
        self.compiled: dict[tuple, jax.stages.Compiled] = {}
        self.calls: list[Call] = []

    def __call__(self, params: Tree, batch: dict) -> Any:
        shape = tuple(sorted((k, np.shape(x)) for k, x in batch.items()))
        if shape not in self.compiled:
            self.compiled[shape] = self.jitted.lower(params, batch).compile()
        began = time.perf_counter()
        out = jax.block_until_ready(self.compiled[shape](params, batch))
        seconds = time.perf_counter() - began
        index = np.asarray(batch.get("index", np.arange(len(batch["input_ids"]))))
        count = self.count(params, batch, out, self.compiled[shape])
        self.calls.append(Call(shape, tuple(index.tolist()), seconds, count))
        return out


class Cost(NamedTuple):
    """Of all rows together: how many, their FLOPs, their seconds, who counted."""

    rows: int
    flops: float
    seconds: float
    by: str


def total(calls: Sequence[Call], first: int | None = None) -> Cost:
    """What the rows numbered below `first` (None: all but fillers) took.

    A row takes its share of its call; the seconds of a call are the median over all calls of its shape.
    """
    times = defaultdict(list)
    for call in calls:
        times[call.shape].append(call.seconds)
    rows, flops, seconds = 0, 0.0, 0.0
    for call in calls:
        n = sum(i >= 0 and (first is None or i < first) for i in call.index)
        share = n / len(call.index)
        rows, flops = rows + n, flops + share * call.count.flops
        seconds += share * float(np.median(times[call.shape]))
    return Cost(rows, flops, seconds, calls[0].count.by)


def break_even(training: float, few_shot: float, tuned: float) -> float | None:
    """The number of queries after which training has cost less: `training / (few_shot - tuned)`; None: never.

    Args:
      training: cost of the training, in FLOPs or seconds.
      few_shot, tuned: cost of a query with demonstrations, and of one after training.

    >>> break_even(1000.0, 6.0, 2.0)
    250.0
    >>> break_even(1000.0, 2.0, 2.0) is None
    True
    """
    return training / (few_shot - tuned) if few_shot > tuned else None


def interval(
    statistic: Callable[[np.ndarray], float], n: int, *, hits: int | None = None, resamples: int = 999
) -> tuple[float, float] | None:
    """A 95% confidence interval of a score on n test inputs; None for fewer than two.

    Args:
      statistic: (indices of inputs) -> score; for the percentile bootstrap over the inputs, with a fixed seed.
      hits: of a share of right answers, how many were right: Wilson's interval, in percent, instead.

    >>> [round(x, 1) for x in interval(lambda i: 0.0, 10, hits=8)]
    [49.0, 94.3]
    """
    from scipy import stats

    if n < 2:
        return None
    if hits is not None:
        low, high = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        return 100.0 * float(low), 100.0 * float(high)
    found = stats.bootstrap(
        (np.arange(n),),
        statistic,
        n_resamples=resamples,
        vectorized=False,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)
