"""A training step: what it differentiates and optimises is the trainable partition only."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args, get_type_hints

import jax
import jax.numpy as jnp
import optax

from .backward import by_group, groups, unite, update_in_backward
from .layout import stack_layers
from .methods import Method, chain
from .rounding import apply_updates
from .tree import Tree, cast, combine, map_with_path, partition
from .weights import map_nodes

Objective = Callable[[Tree, dict, jax.Array | None], tuple[jax.Array, jax.Array]]  # the key turns dropout on


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
    data_seed: int | None = None  # of the data's order alone; None: the seed

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
        for name in ("seed", "data_seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be at least 0; got {value}")
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

    @property
    def order(self) -> int:
        """The seed of the data's order."""
        return self.seed if self.data_seed is None else self.data_seed


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
    shape = schedule(dataclasses.replace(settings, learning_rate=1.0), total)
    adamw = optax.adamw(shape, weight_decay=settings.weight_decay, mask=decays)
    clip = optax.identity() if settings.clip is None else optax.clip_by_global_norm(settings.clip)
    inner = optax.chain(clip, adamw, times_rate(settings.learning_rate))
    inner = optax.with_extra_args_support(inner)  # so that a wrapper can hand on all it gets
    tx = optax.with_extra_args_support(method.planned(total).optimizer(inner))
    return by_group(tx) if settings.update == "backward" else tx


class Rate(NamedTuple):
    """The state of `times_rate`: the peak of the learning rate."""

    rate: jax.Array


def times_rate(rate: float) -> optax.GradientTransformation:
    """Multiplies the updates by a rate that is part of the state, so that runs with several share a program.

    AdamW's update, decay included, is linear in the learning rate (Loshchilov and Hutter 2019, arXiv:1711.05101,
    algorithm 2, line 12): the schedule before it has its peak at 1.

    >>> tx = times_rate(0.5)
    >>> tx.update({"w": jnp.ones(2)}, tx.init(None))[0]["w"].tolist()
    [0.5, 0.5]
    """

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: state.rate.astype(u.dtype) * u, updates), state

    return optax.GradientTransformation(lambda params: Rate(jnp.float32(rate)), update)


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


def start(
    method: Method,
    params: Tree,
    tx: Any,
    layout: str = "loop",
    dtype: Any = jnp.float32,
    join: Callable[[Sequence], Any] = jnp.stack,
) -> tuple[TrainState, Tree]:
    """The first state and the frozen partition of adapted, per-layer parameters.

    Trainables are copied to the dtype: they are donated to the step, and a selective method's trainables are
    the base's own arrays. The optimizer sees them in float32.

    Args:
      join: for `stack_layers`.
    """
    params = stack_layers(params, join) if layout == "scan" else params
    trainable, frozen = partition(params, chain(method).trainable(params))  # a chain refuses to train nothing
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), cast(trainable, dtype))
    opt_state = jax.jit(lambda t: tx.init(cast(t, jnp.float32)))(trainable)  # compiled: the cast itself is never made
    state = TrainState(jnp.int32(0), trainable, opt_state, jnp.bool_(True))
    return state, frozen
