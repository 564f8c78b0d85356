"""Training whose update runs inside the backward pass, so that the gradients of all layers never exist at once.

The program of the gradient is traced once and run in segments: where the gradient of one group of parameters is
complete, the group is updated, and barriers keep the next segment from starting before. The backward pass goes from the
last layer to the first, so about one layer's gradient lives at a time (the fused update of Lv et al. 2023,
arXiv:2306.09782, section 3.1, which has SGD; here any optimizer that treats each group alone). This holds of the
per-layer layout: a scan gives the gradients of its stack together, so that the stack is one group and little is saved.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import ClosedJaxpr, DebugInfo, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, jaxprs_in_params

from .methods.base import path_key
from .tree import HOLE, Tree, flatten, map_with_path

_LAYER = re.compile(r"(.*?_(?:\d+|\*))/.*")


def group_of(path: str) -> str:
    """The group of a leaf: its layer, or itself outside the layers. In the scanned layout a stack is one group.

    >>> group_of("model/layers_3/mlp/up_proj/kernel"), group_of("model/norm/scale")
    ('model/layers_3', 'model/norm/scale')
    """
    layer = _LAYER.fullmatch(path)
    return path if layer is None else layer[1]


def groups(tree: Tree) -> dict[str, Tree]:
    """One tree for each group, in the structure of the whole with holes elsewhere, so that paths stay.

    >>> groups({"h_0": {"w": 1}, "h_1": {"w": 2}})
    {'h_0': {'h_0': {'w': 1}, 'h_1': {'w': None}}, 'h_1': {'h_0': {'w': None}, 'h_1': {'w': 2}}}
    """
    names = dict.fromkeys(map(group_of, flatten(tree)))
    return {name: map_with_path(lambda p, x, name=name: x if group_of(p) == name else HOLE, tree) for name in names}


def unite(parts: Iterable[Tree]) -> Tree:
    """The tree of which these are the groups."""

    def hole(x):
        return x is HOLE

    return jax.tree.map(lambda *xs: next((x for x in xs if x is not HOLE), HOLE), *parts, is_leaf=hole)


def by_group(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The optimizer with a state of its own for each group, by its name; it updates those groups that it is given.

    Raises:
      ValueError: (from `init`) the update of one group depends on the gradient of another.

    >>> params = {"h_0": {"w": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    >>> sorted(by_group(optax.adam(0.1)).init(params))
    ['h_0', 'norm/scale']
    """
    tx = optax.with_extra_args_support(tx)

    def init(params):
        _check_alone(tx, params)
        return {name: tx.init(part) for name, part in groups(params).items()}

    def update(updates, state, params=None, **extra):
        of = {} if params is None else groups(params)

        def one(name, grads):
            drawn = {"key": path_key(extra["key"], name)} if "key" in extra else {}  # no two groups draw the same
            return tx.update(grads, state[name], of.get(name), **{**extra, **drawn})

        new = {name: one(name, grads) for name, grads in groups(updates).items()}
        return unite(u for u, _ in new.values()), {name: s for name, (_, s) in new.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def _check_alone(tx: optax.GradientTransformationExtraArgs, params: Tree) -> None:
    """Raises unless each group's update depends on the gradients of that group alone.

    This is read off the optimizer's program, so clipping by the global norm shows as well as a ranking of all matrices.
    """

    def update(grads, state, params):
        return tx.update(grads, state, params, key=jax.random.key(0), step=jnp.int32(0))

    state = jax.eval_shape(tx.init, params)
    jaxpr = jax.make_jaxpr(update)(params, state, params).jaxpr
    own = [{group_of(path)} for path in flatten(params)]
    before, in_state = None, [set() for _ in jax.tree.leaves(state)]
    found: list[set[str]] = []
    while in_state != before:  # what a step leaves in the state, the next one reads
        found = _sources(jaxpr, [*own, *in_state, *own])
        before, in_state = in_state, found[len(own) :]
    mixed = [(name, other) for (name,), of in zip(own, found, strict=False) for other in sorted(of - {name})]
    mixed += [tuple(sorted(of)[:2]) for of in in_state if len(of) > 1]
    if mixed:
        raise ValueError(
            f"the optimizer needs the gradients of {mixed[0][0]} and of {mixed[0][1]} at once, as a clip by the global "
            "norm or adalora does, and an update in the backward pass never has both; write update='whole' "
            "(--update whole), or choose another method"
        )


def _sources(jaxpr: Jaxpr, inputs: Sequence[set[str]]) -> list[set[str]]:
    """The labels of the inputs that each output may depend on.

    Looked into are functions under `jit`; of other inner programs each output counts as depending on all inputs.
    """
    labels = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atoms):
        return [set() if isinstance(v, Literal) else labels.get(v, set()) for v in atoms]

    for eqn in jaxpr.eqns:
        given = of(eqn.invars)
        inner = list(jaxprs_in_params(eqn.params)) if eqn.primitive.name in ("jit", "pjit") else []
        found = _sources(inner[0], given) if inner else [set().union(*given)] * len(eqn.outvars)
        labels.update(zip(eqn.outvars, found, strict=True))
    return of(jaxpr.outvars)


def update_in_backward(
    gradient: Callable[..., tuple[Any, Tree]],
    trainable: Tree,
    arguments: tuple,
    begin: Callable[[Any], Any],
    update: Callable[[str, Tree, Any], tuple[Any, Any]],
) -> tuple[dict[str, Any], Any]:
    """Computes a gradient and updates each group of parameters as soon as its part is there.

    Args:
      gradient: (trainable, *arguments) -> (value, gradient), such as what `jax.value_and_grad` gives.
      begin: value -> what is carried from update to update.
      update: (name of a group, its gradients with holes elsewhere, carry) -> (the group's new values, carry).

    Returns:
      The new values by group, and the last carry.
    """
    closed, (value, grads) = jax.make_jaxpr(gradient, return_shape=True)(trainable, *arguments)
    jaxpr, n = closed.jaxpr, len(jax.tree.leaves(value))
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values |= dict(zip(jaxpr.invars, jax.tree.leaves((trainable, *arguments)), strict=True))
    given, names = set(values), [group_of(path) for path in flatten(trainable)]

    def read(atoms):
        return [v.val if isinstance(v, Literal) else values[v] for v in atoms]

    new, carry, structure = {}, None, jax.tree.structure(grads)
    for stop in _stops(jaxpr, n, names):
        values |= _run(stop.equations, values, stop.results | stop.later, jaxpr.debug_info)
        if carry is None:
            carry = begin(jax.tree.unflatten(jax.tree.structure(value), read(jaxpr.outvars[:n])))
        own = read(v for v, of in zip(jaxpr.outvars[n:], names, strict=True) if of == stop.name)
        rest = [v for v in values if v in stop.later and v not in given and jnp.issubdtype(v.aval.dtype, jnp.floating)]
        # what else was made so far comes before the update, so that this may overwrite the old values ...
        own, moved = jax.lax.optimization_barrier((own, read(rest)))
        found = iter(own)
        whole = jax.tree.unflatten(structure, [next(found) if of == stop.name else HOLE for of in names])
        new[stop.name], carry = update(stop.name, whole, carry)
        # ... and what comes after starts from there, so that this gradient is gone by then
        moved, new[stop.name], carry = jax.lax.optimization_barrier((moved, new[stop.name], carry))
        values |= dict(zip(rest, moved, strict=True))
    return new, carry


class _Stop(NamedTuple):
    """A segment of a gradient's program, after which a group is updated.

    Attributes:
      name: of the group.
      equations: of the segment.
      results: the group's gradients, and before the first stop the value.
      later: what the segments after this one read, and the gradients of the groups that are not yet updated.
    """

    name: str
    equations: list[JaxprEqn]
    results: set[Var]
    later: set[Var]


def _stops(jaxpr: Jaxpr, n: int, names: Sequence[str]) -> list[_Stop]:
    """A stop as soon as the value and a group's gradients are there and nothing reads its old parameters any more.

    Args:
      n: leaves of the value, the first outputs; the others are gradients.
      names: the group of each leaf that is differentiated, the first inputs.
    """
    needed, eqns = _variables(jaxpr.outvars), []
    for eqn in reversed(jaxpr.eqns):  # the barriers would keep alive what nothing needs
        if eqn.effects or needed & set(eqn.outvars):
            needed |= _variables(eqn.invars)
            eqns.append(eqn)
    eqns.reverse()
    made = {v: i for i, eqn in enumerate(eqns, 1) for v in eqn.outvars}
    read = {v: i for i, eqn in enumerate(eqns, 1) for v in _variables(eqn.invars)}
    value, gradients = _variables(jaxpr.outvars[:n]), {name: set() for name in names}
    ready = dict.fromkeys(names, max((made.get(v, 0) for v in value), default=0))
    for name, old, gradient in zip(names, jaxpr.invars, jaxpr.outvars[n:], strict=False):  # then come the arguments
        gradients[name] |= _variables([gradient])
        ready[name] = max(ready[name], read.get(old, 0), *(made.get(v, 0) for v in gradients[name]))
    order = sorted(gradients, key=ready.__getitem__)
    ready[order[-1]] = len(eqns)  # also what only has effects
    starts = [0, *(ready[name] for name in order)]
    stops: list[_Stop] = []
    later: set[Var] = set()
    for name, start in zip(reversed(order), reversed(starts[:-1]), strict=True):
        segment = eqns[start : ready[name]]
        stops.append(_Stop(name, segment, gradients[name] | value, later))
        later = later.union(gradients[name], *(_variables(eqn.invars) for eqn in segment))
    return stops[::-1]


def _run(segment: Sequence[JaxprEqn], values: dict[Var, Any], later: set[Var], of: DebugInfo) -> dict[Var, Any]:
    """What the equations make that is needed later."""
    made = {v for eqn in segment for v in eqn.outvars}
    inputs = list({v: None for eqn in segment for v in eqn.invars if not isinstance(v, Literal) and v not in made})
    outputs = [v for eqn in segment for v in eqn.outvars if v in later]
    effects = frozenset().union(*(eqn.effects for eqn in segment))
    of = of._replace(arg_names=("",) * len(inputs), result_paths=("",) * len(outputs))
    run = jaxpr_as_fun(ClosedJaxpr(Jaxpr((), inputs, outputs, segment, effects, of), ()))
    return dict(zip(outputs, run(*(values[v] for v in inputs)), strict=True))


def _variables(atoms: Iterable[Any]) -> set[Var]:
    return {v for v in atoms if not isinstance(v, Literal)}
