"""What a step costs, from its text alone: FLOPs and a bound of its memory from the jaxpr, bytes moved from the HLO.

XLA's own count (`cost_analysis`) takes a loop's body once and is missing on some platforms; a jaxpr says how often a
`scan` runs, and is there before anything is compiled.
"""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params

# Which equations count


class _Equation(NamedTuple):
    """An equation of which some result is used, and what it runs inside."""

    eqn: JaxprEqn
    used: tuple[bool, ...]  # by result
    inner: tuple["_Program", ...]


class _Program(NamedTuple):
    """The equations of a jaxpr that something used depends on, in order, and which inputs they need."""

    jaxpr: Jaxpr
    used: tuple[bool, ...]  # by result
    equations: tuple[_Equation, ...]
    needs: tuple[bool, ...]  # by input


def _needed(closed: ClosedJaxpr) -> _Program:
    """The program without dead code: gradients of frozen leaves, for example, that nobody reads."""
    return _live(closed.jaxpr, (True,) * len(closed.jaxpr.outvars), {})


def _live(jaxpr: Jaxpr, used: tuple[bool, ...], seen: dict) -> _Program:
    """A backward pass: an equation lives if one of its results does, or if it has an effect."""
    if (found := seen.get((id(jaxpr), used))) is not None:
        return found
    alive = _variables(jaxpr.outvars, used)
    equations = []
    for eqn in reversed(jaxpr.eqns):
        of = tuple(v in alive for v in eqn.outvars)
        if not any(of) and not eqn.effects:
            continue
        inner, needs = _inside(eqn, of, seen)
        equations.append(_Equation(eqn, of, inner))
        alive |= _variables(eqn.invars, needs)
    program = _Program(jaxpr, used, tuple(reversed(equations)), tuple(v in alive for v in jaxpr.invars))
    seen[id(jaxpr), used] = program
    return program


def _variables(atoms: Iterable, which: Iterable[bool]) -> set[Var]:
    return {v for v, chosen in zip(atoms, which, strict=True) if chosen and isinstance(v, Var)}


def _inside(eqn: JaxprEqn, used: tuple[bool, ...], seen: dict) -> tuple[tuple[_Program, ...], tuple[bool, ...]]:
    """What an equation runs, and which of its operands it needs for the results that are used."""
    name, everything = eqn.primitive.name, (True,) * len(eqn.invars)
    if name == "scan":
        body = _scan_body(eqn, used, seen)
        return (body,), body.needs
    if name == "while":
        bodies = [eqn.params[k].jaxpr for k in ("body_jaxpr", "cond_jaxpr")]
        return tuple(_live(b, (True,) * len(b.outvars), seen) for b in bodies), everything
    if name == "cond":
        branches = tuple(_live(b.jaxpr, used, seen) for b in eqn.params["branches"])
        return branches, (True, *(any(n) for n in zip(*(b.needs for b in branches), strict=True)))
    if name == "optimization_barrier":
        return (), used
    if (body := _called(eqn)) is not None:
        program = _live(body, used, seen)
        return (program,), program.needs
    return (), everything


def _called(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr that a call hands its operands to (jit, checkpoint, custom_jvp, shard_map, ...); None: no call."""
    bodies = list(jaxprs_in_params(eqn.params))
    ways = [b for b in bodies if len(b.invars) == len(eqn.invars) and len(b.outvars) == len(eqn.outvars)]
    return ways[0] if len(bodies) == len(ways) == 1 else None


def _scan_carries(eqn: JaxprEqn) -> tuple[int, int]:
    """How many constants and how many carries the body of a scan takes; the rest are slices, of one axis less."""
    body: Jaxpr = eqn.params["jaxpr"].jaxpr
    whole = sum(v.aval.ndim == b.aval.ndim for v, b in zip(eqn.invars, body.invars, strict=True))
    carries = sum(v.aval.ndim == b.aval.ndim for v, b in zip(eqn.outvars, body.outvars, strict=True))
    return whole - carries, carries


def _scan_body(eqn: JaxprEqn, used: tuple[bool, ...], seen: dict) -> _Program:
    """The body, with the carries that a later pass of it needs counted as used."""
    constants, carries = _scan_carries(eqn)
    while True:
        body = _live(eqn.params["jaxpr"].jaxpr, used, seen)
        carried = body.needs[constants : constants + carries]
        wider = (*(u or n for u, n in zip(used[:carries], carried, strict=True)), *used[carries:])
        if wider == used:
            return body
        used = wider


# FLOPs


class Flops(NamedTuple):
    """Operations of a program, as XLA's `HloCostAnalysis` names them.

    Attributes:
      total: additions, multiplications and the like; transcendental functions are not among them.
      products: those of `total` in matrix products and convolutions, a multiply-add being two.
      transcendentals: exponentials, roots, logarithms, sines, ..., one an element.
    """

    total: int
    products: int
    transcendentals: int


_TRANSCENDENTAL = frozenset(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p log2 "
    "logistic pow rsqrt sin sinh sqrt tan tanh".split()  # noqa: SIM905 - reads better than a list
)
_ELEMENTWISE = frozenset(
    "abs add add_any and ceil clamp convert_element_type div eq floor ge gt is_finite le lt max min mul ne neg nextafter "
    "not or reduce_precision rem round select_n shift_left shift_right_arithmetic shift_right_logical sign square sub "
    "xor".split()  # noqa: SIM905 - reads better than a list
)
_REDUCTIONS = frozenset("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor".split())  # noqa: SIM905
_RUNNING = frozenset("cumlogsumexp cummax cummin cumprod cumsum".split())  # noqa: SIM905
_SCATTERS = frozenset("scatter-add scatter-max scatter-min scatter-mul scatter_add scatter_sub scatter-sub".split())  # noqa: SIM905


def flops(jaxpr: ClosedJaxpr) -> Flops:
    """FLOPs of one run of a program, from `jax.make_jaxpr(f)(*abstract)` or `jitted.trace(*abstract).jaxpr`.

    Counted as by XLA, so that the two agree where XLA sees all: a matrix product is 2 multiply-adds for each element
    of its result and contracted index; an elementwise operation one an element of its result, of integers, booleans
    and conversions too; a reduction its input's elements less its output's; a scatter that adds, its updates' elements.
    A scan counts by its length, a shard_map by its devices, of the branches of a `cond` the one with the largest sum
    of all operations, and the body of a `while` once, its number of passes being unknown. Equations whose results
    nothing uses do not count. cuDNN's attention counts its two products, backward five (Dao et al. 2022,
    arXiv:2205.14135, algorithms 1 and 4). Random bits, sorts, decompositions and custom kernels count nothing.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> flops(jax.make_jaxpr(lambda x: jnp.tanh(x @ x) + 1)(x))
    Flops(total=1088, products=1024, transcendentals=64)
    >>> flops(jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: x @ y, x))(x)).products
    10240
    """
    return _flops(_needed(jaxpr))


def _flops(program: _Program) -> Flops:
    return _sum(_equation_flops(e) for e in program.equations)


def _sum(counts: Iterable[Flops]) -> Flops:
    return Flops(*(sum(c) for c in zip(Flops(0, 0, 0), *counts, strict=True)))


def _equation_flops(e: _Equation) -> Flops:
    name, params = e.eqn.primitive.name, e.eqn.params
    inner = [_flops(p) for p in e.inner]
    if name == "cond":
        return max(inner, key=lambda c: c.total + c.transcendentals)
    if name == "scan":
        return Flops(*(params["length"] * n for n in inner[0]))
    if name == "shard_map":
        return Flops(*(params["mesh"].size * n for n in inner[0]))
    if inner:
        return _sum(inner)
    if (product := _product(name, e.eqn)) is not None:
        return Flops(product, product, 0)
    if name in _TRANSCENDENTAL:
        return Flops(0, 0, _size(e.eqn.outvars[0]))
    return Flops(_simple(name, e.eqn), 0, 0)


def _simple(name: str, eqn: JaxprEqn) -> int:
    first, result = _size(eqn.invars[0]) if eqn.invars else 0, _size(eqn.outvars[0]) if eqn.outvars else 0
    if name in _ELEMENTWISE or name in _RUNNING:
        return result
    if name == "integer_pow":  # by repeated squaring
        power = abs(eqn.params["y"])
        return result * max(power.bit_length() - 1 + power.bit_count() - 1 + (eqn.params["y"] < 0), 0)
    if name in _REDUCTIONS:
        return first - result
    return _size(eqn.invars[2]) if name in _SCATTERS else 0


def _product(name: str, eqn: JaxprEqn) -> int | None:
    """FLOPs of a matrix product, a convolution or cuDNN's attention; None: it is none of them."""
    shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * _size(eqn.outvars[0]) * math.prod(shapes[0][i] for i in contracted)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    if name.startswith("dot_product_attention_"):  # (batch, queries, heads, width) and (batch, keys, ...)
        batch, queries, heads, width = shapes[0]
        return (10 if "_bwd" in name else 4) * batch * heads * queries * shapes[1][1] * width
    return None


def _convolution(eqn: JaxprEqn) -> int:
    """2 multiply-adds for every pair of a kernel's and an input's element that meet; padding meets nothing."""
    p, (x, kernel) = eqn.params, (v.aval.shape for v in eqn.invars)
    numbers, out = p["dimension_numbers"], eqn.outvars[0].aval.shape
    fma = x[numbers.lhs_spec[0]] // p["batch_group_count"] * math.prod(kernel[i] for i in numbers.rhs_spec[:2])
    for axis, (i, k, o) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)):
        dilation = p["lhs_dilation"][axis]
        at = np.arange(out[o])[:, None] * p["window_strides"][axis] - p["padding"][axis][0]
        at = at + np.arange(kernel[k]) * p["rhs_dilation"][axis]
        fma *= int(((at >= 0) & (at <= (x[i] - 1) * dilation) & (at % dilation == 0)).sum())
    return 2 * fma


def _size(v: Any) -> int:
    return math.prod(getattr(v.aval, "shape", ()))


# A bound of the temporaries


def bound(jaxpr: ClosedJaxpr) -> int:
    """Bytes that a program's temporaries and results take at most, when its equations run in their order.

    The peak, over the equations, of the values that a later equation uses, the equation's results, and what runs
    inside it: nothing is fused, nothing written in place, nothing shared within an equation, no input donated. Inputs
    do not count. Of a scan: its carries, its stacked results, a pass's slices, and the body's own peak.

    A compiler plans less, unless it changes the order for the worse, hoists something out of a loop, or converts:
    the CPU's makes float32 copies of bfloat16 weights, which are not in here; nor is the workspace of a kernel.

    >>> import jax, jax.numpy as jnp
    >>> bound(jax.make_jaxpr(lambda x: (x + 1).sum())(jax.ShapeDtypeStruct((256,), jnp.float32)))
    1028
    """
    return _peak(_needed(jaxpr))


def _peak(program: _Program) -> int:
    given = {*program.jaxpr.invars, *program.jaxpr.constvars}
    alive = {v: _nbytes(v) for v in _variables(program.jaxpr.outvars, program.used) - given}
    total = peak = sum(alive.values())
    for e in reversed(program.equations):
        for v in e.eqn.outvars:
            total -= alive.pop(v, 0)
        for v in _variables(e.eqn.invars, (True,) * len(e.eqn.invars)) - given - alive.keys():
            alive[v] = _nbytes(v)
            total += alive[v]
        peak = max(peak, total + _taken(e))
    return peak


def _taken(e: _Equation) -> int:
    """Bytes of the results of an equation, or of what it takes while it runs if that is more."""
    results = sum(_nbytes(v) for v in e.eqn.outvars)
    if not e.inner:
        return results
    inside = max(_peak(p) for p in e.inner)
    if e.eqn.primitive.name == "scan":
        constants, carries = _scan_carries(e.eqn)
        body = e.inner[0]
        slices = list(zip(body.jaxpr.invars, body.needs, strict=True))[constants + carries :]
        return results + inside + sum(_nbytes(v) for v, needed in slices if needed)
    return results + inside if e.eqn.primitive.name == "while" else max(results, inside)


def _nbytes(v: Any) -> int:
    dtype = getattr(v.aval, "dtype", None)  # a token has none
    return 0 if dtype is None else _size(v) * dtype.itemsize
def traffic(text): return None
