"""AdaLoRA: low-rank changes as singular triplets; training keeps the most important ones of all matrices together."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..layout import layer_paths
from ..tree import Tree
from ..weights import Weight, map_nodes, node, static
from .base import Method, plain
from .lora import Factors, LoRA, low_rank, low_rank_arguments


@node
class AdaLoRA(Weight):
    """`W + scale · P Λ Q`: `a` is P, (inputs, r), `lam` the diagonal of Λ, (r), and `b` is Q, (r, outputs)."""

    base: Any
    a: jax.Array
    lam: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    trains: tuple[str, ...] = static(default=("a", "lam", "b"))

    def lora(self) -> LoRA:
        """The same with Λ multiplied into P."""
        return LoRA(self.base, self.a * self.lam[..., None, :], self.b, self.key, self.scale, self.dropout)

    def factors(self):
        return self.lora().factors()

    def materialize(self):
        return self.lora().materialize()

    def dot(self, x):
        return self.lora().dot(x)

    def take(self, ids):
        return self.lora().take(ids)

    def attend(self, x):
        return self.lora().attend(x)

    def compact(self):
        """Without the triplets whose singular value is 0."""
        alive = np.flatnonzero(np.asarray(self.lam))
        return dataclasses.replace(self, a=self.a[:, alive], lam=self.lam[alive], b=self.b[alive])

    def allocated(self):
        """The rank: the triplets whose singular value is not 0."""
        return int(np.count_nonzero(self.lam))


class Budget(NamedTuple):
    """The total rank by step, steps being counted from 1: equation 14 as the authors' code has it.

    The printed equation has t_f in the numerator once more, and is then above the initial budget at first.

    Attributes:
      warmup: t_i, steps before any pruning.
      final: t_f, last steps, in which nothing is pruned anew.
      total: T, all steps.
      every: ΔT, steps between allocations; the last is at T - t_f whatever it is.
    """

    warmup: int
    final: int
    total: int
    every: int

    def at(self, step: int, start: int, target: int) -> int:
        """`target + (start - target) (1 - (t - t_i) / (T - t_i - t_f))³`, rounded down, between warm-up and end."""
        done = (step - self.warmup) / (self.total - self.warmup - self.final)
        return int((start - target) * (1 - min(max(done, 0.0), 1.0)) ** 3 + target)

    def allocates(self, step: jax.Array) -> jax.Array:
        last = self.total - self.final
        return (step == last) | ((step > self.warmup) & (step < last) & (step % self.every == 0))


class Pruning(NamedTuple):
    """The state of `prune`; the dicts are by the path of a node.

    Attributes:
      inner: of the wrapped optimizer.
      step: steps taken.
      sensitivity, uncertainty: averages for each entry of `a`, `lam` and `b`.
      kept: the triplets of the last allocation, booleans shaped as `lam`.
    """

    inner: Any
    step: jax.Array
    sensitivity: dict[str, dict[str, jax.Array]]
    uncertainty: dict[str, dict[str, jax.Array]]
    kept: dict[str, jax.Array]


def prune(
    tx: optax.GradientTransformation, budget: Budget, target_rank: int, beta1: float, beta2: float
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer: what its update makes of the singular values that are out of budget becomes 0 (algorithm 1).

    Between two allocations they train, and may come back; after the last they stay 0.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        own = _triplets(params)
        kept = {path: jnp.ones(t["lam"].shape, bool) for path, t in own.items()}
        return Pruning(
            tx.init(params), jnp.int32(0), jax.tree.map(jnp.zeros_like, own), jax.tree.map(jnp.zeros_like, own), kept
        )

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError("adalora: its optimizer needs the parameters; write tx.update(grads, state, params)")
        grads = _triplets(updates)
        updates, inner = tx.update(updates, state.inner, params, **extra)
        step, last, own = state.step + 1, budget.total - budget.final, _triplets(params)
        # the sensitivity takes the weight after this step's update, as the authors' code does
        now = jax.tree.map(lambda w, u, g: jnp.abs((w + u) * g), own, _triplets(updates), grads)
        mean, spread = state.sensitivity, state.uncertainty
        new_mean = jax.tree.map(lambda s, x: beta1 * s + (1 - beta1) * x, mean, now)
        new_spread = jax.tree.map(lambda u, x, s: beta2 * u + (1 - beta2) * jnp.abs(x - s), spread, now, new_mean)
        mean, spread = jax.tree.map(
            lambda new, old: jnp.where(step < last, new, old), (new_mean, new_spread), (mean, spread)
        )
        start = sum(t["lam"].size for t in own.values())
        target = min(start, target_rank * sum(len(_rows(path, t["lam"])) for path, t in own.items()))
        budgets = jnp.array([budget.at(t, start, target) for t in range(budget.total + 1)], jnp.int32)
        scores = {
            path: (mean[path]["lam"] * spread[path]["lam"])
            + (mean[path]["a"] * spread[path]["a"]).mean(-2)
            + (mean[path]["b"] * spread[path]["b"]).mean(-1)
            for path in own
        }
        allocates, largest = budget.allocates(step), _largest(scores, budgets[step])
        kept = {path: jnp.where(allocates, largest[path], k) for path, k in state.kept.items()}

        def zero(path, w):
            if not isinstance(w, AdaLoRA):
                return w
            dead = (allocates | (step > last)) & ~kept[path]
            return dataclasses.replace(w, lam=jnp.where(dead, -own[path]["lam"], w.lam))

        return map_nodes(zero, updates), Pruning(inner, step, mean, spread, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _triplets(tree: Tree) -> dict[str, dict[str, jax.Array]]:
    """`a`, `lam` and `b` of every AdaLoRA, by path."""
    found = {}

    def visit(path, w):
        if isinstance(w, AdaLoRA):
            found[path] = {"a": w.a, "lam": w.lam, "b": w.b}
        return w

    map_nodes(visit, tree)
    return found


def _rows(path: str, x: jax.Array) -> dict[str, jax.Array]:
    """An array of (r), or one of each stacked layer, by the per-layer path."""
    return {path: x} if x.ndim == 1 else dict(zip(layer_paths(path, len(x)), x, strict=True))


def _largest(scores: dict[str, jax.Array], n: jax.Array) -> dict[str, jax.Array]:
    """Which n scores of all are the largest; of equal ones, those first by per-layer path, in either layout."""
    rows = {p: r for path, x in scores.items() for p, r in _rows(path, x).items()}
    order = sorted(rows)
    flat = jnp.concatenate([rows[p] for p in order])
    best = jnp.zeros(flat.shape, bool).at[jnp.argsort(-flat, stable=True)].set(jnp.arange(len(flat)) < n)
    ends = np.cumsum([len(rows[p]) for p in order])[:-1]
    chosen = dict(zip(order, jnp.split(best, ends), strict=True))
    return {path: jnp.stack([chosen[p] for p in _rows(path, x)]).reshape(x.shape) for path, x in scores.items()}


def adalora(
    target_rank: int = 8,
    init_rank: int = 12,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    warmup: int | float = 0.1,
    final: int | float = 0.5,
    total: int | None = None,
    every: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.1,
    dropout: float = 0.0,
) -> Method:
    """Trains `W + (alpha / r) P Λ Q` and spreads a falling budget of ranks over all matrices by importance.

    Zhang et al. 2023 (arXiv:2303.10512). A triplet's importance is `s(λ) + mean s(P_i) + mean s(Q_i)` (equation 8),
    s being the averaged sensitivity `|w ∇w|` times its averaged uncertainty (equations 9 to 11); from step t_i on,
    those out of the budget (`Budget`) get λ = 0 every ΔT steps. To the loss comes `orthogonality` times the mean over
    all P and Q of `‖PᵀP - I‖_F`; as the code has it, where equation 4 sums squares. P and Q start normal with
    deviation 0.02, Λ zero, so the function starts unchanged; r is `init_rank` to the end. Shapes never change; the
    adapter file leaves out what is 0, so a loaded adapter's ranks differ by matrix. Where training clips, the
    sensitivity takes the gradient before; the authors' code takes it after.

    Args:
      target_rank: the final rank, on average over the matrices.
      init_rank: r at first; the paper takes 1.5 times the target.
      alpha: the scale's numerator; default: `init_rank`, hence scale 1.
      targets: kinds of site or path patterns, as for `lora`.
      warmup, final: t_i and t_f in steps, or as shares (floats below 1) of all steps.
      total: T; default: the steps of the run, which `Method.planned` tells.
      every: ΔT.
      beta1, beta2: of the averages of sensitivity and uncertainty.
      orthogonality: γ.
      dropout: as for `lora`.

    Raises:
      ValueError: an impossible argument or schedule; or as `lora` does.

    The count at first is `r (inputs + outputs + 1)` a matrix.

    >>> params = {"q": {"kernel": jnp.ones((6, 4))}}
    >>> new = adalora(1, 2, targets=["q/kernel"]).init(jax.random.key(0), params, ())
    >>> new["q"]["kernel"].lam.tolist()
    [0.0, 0.0]
    """
    arguments = plain(
        {
            "target_rank": target_rank,
            "init_rank": init_rank,
            "alpha": alpha,
            "targets": targets if isinstance(targets, str) else list(targets),
            "warmup": warmup,
            "final": final,
            "total": total,
            "every": every,
            "beta1": beta1,
            "beta2": beta2,
            "orthogonality": orthogonality,
            "dropout": dropout,
        }
    )
    _check(arguments)

    def new(w, f: Factors):
        p, q = (0.02 * jax.random.normal(k, x.shape) for k, x in zip(jax.random.split(f.key), (f.a, f.b), strict=True))
        return AdaLoRA(w, p, jnp.zeros(f.a.shape[-1]), q, scale=f.scale, dropout=dropout)

    def init(key, params, sites):
        if found := _triplets(params):
            raise ValueError(
                f"adalora: {next(iter(found))} is an AdaLoRA already, and one budget holds for all; "
                "write one adalora with all the targets"
            )
        return base.init(key, params, sites)

    def plan(steps):
        if total is not None and total > steps:
            raise ValueError(f"adalora: total={total}, but the run has {steps} steps; leave total out")
        schedule = _budget(arguments, steps if total is None else total)
        return lambda tx: prune(tx, schedule, target_rank, beta1, beta2)

    def settles(steps):
        schedule = _budget(arguments, steps if total is None else total)
        return schedule.total - schedule.final

    def unplanned(tx):
        raise ValueError(
            "adalora: how many steps are there? write adalora(total=...), or method.planned(total).optimizer"
        )

    def penalty(params):
        grams = [_off_identity(t[f], f) for t in _triplets(params).values() for f in ("a", "b")]
        return orthogonality * sum(g.sum() for g in grams) / sum(g.size for g in grams)

    shared = low_rank_arguments(init_rank, alpha, targets, None, None, False, dropout, "both")
    base = low_rank("adalora", shared, AdaLoRA, new)
    return base._replace(
        spec=(("adalora", arguments),),
        init=init,
        optimizer=unplanned if total is None else plan(total),
        plan=plan,
        settles=settles,
        penalty=penalty,
    )


def _off_identity(x: jax.Array, field: str) -> jax.Array:
    """`‖PᵀP - I‖_F` or `‖QQᵀ - I‖_F`, one for each layer; its gradient at 0 is 0."""
    gram = jnp.einsum("...ir,...is->...rs" if field == "a" else "...ri,...si->...rs", x, x)
    square = jnp.square(gram - jnp.eye(gram.shape[-1])).sum((-2, -1))
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _budget(arguments: dict, total: int) -> Budget:
    warmup, final = (int(x * total) if isinstance(x, float) else x for x in (arguments["warmup"], arguments["final"]))
    if warmup + final >= total:
        raise ValueError(
            f"adalora: {warmup} steps of warm-up and {final} final ones leave none of {total} to prune in; "
            "write smaller numbers of steps, or shares such as warmup=0.1, final=0.5"
        )
    return Budget(warmup, final, total, arguments["every"])


def _check(arguments: dict) -> None:
    def whole(name, least):
        value = arguments[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"adalora: {name} must be a whole number of at least {least}; got {value!r}")

    for name in ("target_rank", "init_rank", "every", *(["total"] if arguments["total"] is not None else [])):
        whole(name, 1)
    if arguments["target_rank"] > arguments["init_rank"]:
        raise ValueError(f"adalora: target_rank {arguments['target_rank']} is above init_rank {arguments['init_rank']}")
    for name in ("warmup", "final"):
        if not isinstance(arguments[name], float):
            whole(name, 0)
        elif not 0 <= arguments[name] < 1:
            raise ValueError(f"adalora: {name} must be a number of steps, or a share in [0, 1); got {arguments[name]}")
    shares = [arguments[name] for name in ("warmup", "final") if isinstance(arguments[name], float)]
    if sum(shares) >= 1:  # whatever rounding makes of them in a short run
        raise ValueError(
            f"adalora: warmup={arguments['warmup']} and final={arguments['final']} leave no steps to prune in; "
            "write shares that add up to less than 1, such as warmup=0.1, final=0.5"
        )
    for name in ("beta1", "beta2"):
        if not 0 < arguments[name] < 1:
            raise ValueError(f"adalora: {name} must be between 0 and 1; got {arguments[name]}")
    if not arguments["orthogonality"] >= 0:
        raise ValueError(f"adalora: orthogonality must be at least 0; got {arguments['orthogonality']}")
