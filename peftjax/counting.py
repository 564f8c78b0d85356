"""What a step costs, from its text alone: FLOPs and a bound of its memory from the jaxpr, bytes moved from the HLO.

XLA's own count (`cost_analysis`) takes a loop's body once and is missing on some platforms; a jaxpr says how often a
`scan` runs, and is there before anything is compiled.
"""

import math
import re
from collections.abc import Iterable
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
    whole = sum(len(_shape(v)) == len(_shape(b)) for v, b in zip(eqn.invars, body.invars, strict=True))
    carries = sum(len(_shape(v)) == len(_shape(b)) for v, b in zip(eqn.outvars, body.outvars, strict=True))
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


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TRANSCENDENTAL = _words(
    "acos acosh asin asinh atan atan2 atanh cbrt cos cosh digamma erf erf_inv erfc exp exp2 expm1 lgamma log log1p "
    "log2 logistic pow rsqrt sin sinh sqrt tan tanh"
)
_ELEMENTWISE = _words(
    "abs add add_any and ceil clamp convert_element_type div eq floor ge gt is_finite le lt max min mul ne neg "
    "nextafter not or reduce_precision rem round select_n shift_left shift_right_arithmetic shift_right_logical sign "
    "square sub xor"
)
_REDUCTIONS = _words("reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor")
_RUNNING = _words("cumlogsumexp cummax cummin cumprod cumsum")
_SCATTERS = _words("scatter-add scatter-max scatter-min scatter-mul scatter-sub")


def flops(jaxpr: ClosedJaxpr, platform: str | None = None) -> Flops:
    """FLOPs of one run of a program, from `jax.make_jaxpr(f)(*abstract)` or `jitted.trace(*abstract).jaxpr`.

    Counted as by XLA, so that the two agree where XLA sees all: a matrix product is 2 multiply-adds for each
    element of its result and contracted index; an elementwise operation one an element of its result, of integers,
    booleans and conversions too; a reduction its input's elements less its output's; a scatter that adds, its
    updates' elements. A scan counts by its length, a shard_map by its devices, of the branches of a `cond` the one
    with the largest sum of all operations (of `jax.lax.platform_dependent`, that of the platform, if it is given),
    and the body of a `while` once, its number of passes being unknown. Equations whose results nothing uses do not
    count. cuDNN's attention counts its two products, backward five (Dao et al. 2022, arXiv:2205.14135, algorithms 1
    and 4). Random bits, sorts, decompositions and custom kernels count nothing.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    >>> flops(jax.make_jaxpr(lambda x: jnp.tanh(x @ x) + 1)(x))
    Flops(total=1088, products=1024, transcendentals=64)
    >>> flops(jax.make_jaxpr(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: x @ y, x))(x)).products
    10240
    """
    return _flops(_needed(jaxpr), platform)


def _flops(program: _Program, platform: str | None) -> Flops:
    return _sum(_equation_flops(e, platform) for e in program.equations)


def _sum(counts: Iterable[Flops]) -> Flops:
    return Flops(*(sum(c) for c in zip(Flops(0, 0, 0), *counts, strict=True)))


def _equation_flops(e: _Equation, platform: str | None) -> Flops:
    name, params = e.eqn.primitive.name, e.eqn.params
    inner = [_flops(p, platform) for p in e.inner]
    if name == "cond" and platform is not None and (lowered := params.get("branches_platforms")):
        return next(c for c, names in zip(inner, lowered, strict=True) if names is None or platform in names)
    if name == "cond":
        return max(inner, key=lambda c: c.total + c.transcendentals)
    if name == "scan":
        return Flops(*(params["length"] * n for n in inner[0]))
    if name == "shard_map":
        axes = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]  # its name has changed
        devices = math.prod(params["mesh"].shape[axis] for axis in axes)
        return Flops(*(devices * n for n in inner[0]))
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
    shapes = [_shape(v) for v in eqn.invars]
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
    p, x, kernel, out = eqn.params, *map(_shape, (*eqn.invars, *eqn.outvars))
    numbers = p["dimension_numbers"]
    fma = x[numbers.lhs_spec[0]] // p["batch_group_count"] * math.prod(kernel[i] for i in numbers.rhs_spec[:2])
    for axis, (i, k, o) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        dilation = p["lhs_dilation"][axis]
        at = np.arange(out[o])[:, None] * p["window_strides"][axis] - p["padding"][axis][0]
        at = at + np.arange(kernel[k]) * p["rhs_dilation"][axis]
        fma *= int(((at >= 0) & (at <= (x[i] - 1) * dilation) & (at % dilation == 0)).sum())
    return 2 * fma


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())  # a token has none


def _size(v: Any) -> int:
    return math.prod(_shape(v))


# A bound of the temporaries


def bound(jaxpr: ClosedJaxpr) -> int:
    """Bytes that a program's temporaries and results take at most, when its equations run in their order.

    The peak, over the equations, of the values that a later equation uses, the equation's results, and what runs
    inside it: nothing is fused, nothing written in place, nothing shared within an equation, no input donated. Inputs
    do not count. Of a scan: its carries, its stacked results, a pass's slices, and the body's own peak.

    A compiler plans less, unless it changes the order for the worse, hoists something out of a loop, or converts:
    the CPU's drops the barriers of `jax.checkpoint` outside a scan and may recompute early, and makes float32 copies
    of bfloat16 weights, none of which is in here; nor is the workspace of a kernel.

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


# Bytes that a compiled program moves


class _Instruction(NamedTuple):
    """A line of HLO text: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; of a parameter its number, of a constant its numbers
    attributes: str


class _Computation(NamedTuple):
    """Named instructions; the root is what the computation gives."""

    instructions: dict[str, _Instruction]
    root: str


class _Unreadable(ValueError):
    """The text is not HLO as it is known here."""


_FREE = _words(
    "parameter constant tuple get-tuple-element bitcast after-all add-dependency opt-barrier domain partition-id "
    "replica-id"
)
_SLICES = _words("slice dynamic-slice gather")
_HEADER = re.compile(r"(ENTRY )?%?([^\s(]+) .*\{$")
_LINE = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+?\d+\w*)\[([^\]]*)\]")
_TRIPS = re.compile(r"known_trip_count\W+n\W+(\d+)")


def traffic(hlo: str) -> float | None:
    """Bytes that one run of a compiled program reads and writes, from its text (`compiled.as_text()`).

    The operands and the result of every kernel: an instruction of the entry or of what it calls. The body of a loop
    counts by the trips that the compiler noted (else by the constant its condition compares with, else once), of a
    conditional the branch that moves most. Of a slice, a gather, or a fusion that only slices an operand, what is
    read counts; of a dynamic-update-slice or a scatter, the update. Workspaces of custom calls do not count, and
    nothing is known of caches. None: the text is not such HLO.

    XLA's `bytes accessed` of a program without loops is the same but for a percent or two; of loops it counts the body
    once, and of some platforms there is none.

    >>> text = '''HloModule m
    ...
    ... ENTRY %main (x: f32[8]) -> f32[8] {
    ...   %x = f32[8]{0} parameter(0)
    ...   ROOT %y = f32[8]{0} negate(%x)
    ... }'''
    >>> traffic(text)
    64.0
    >>> traffic("nothing") is None
    True
    """
    try:
        computations, entry = _parse(hlo)
        return _moved(entry, computations)
    except _Unreadable:
        return None


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, name = {}, None, None
    for line in hlo.splitlines():
        if name is None and (head := _HEADER.fullmatch(line)) and "->" in line:
            name, entry = head[2], head[2] if head[1] else entry
            instructions, root = {}, ""
        elif name is not None and line.startswith("}"):
            computations[name] = _Computation(instructions, root or next(reversed(instructions), ""))
            name = None
        elif name is not None and (found := _LINE.match(line)):
            instructions[found[2]] = _instruction(found[2], found[3])
            root = found[2] if found[1] else root
    if entry is None or name is not None:
        raise _Unreadable
    return computations, entry


def _instruction(name: str, text: str) -> _Instruction:
    start = _closing(text, 0) if text.startswith("(") else 0
    if (opcode := _OPCODE.search(text, start)) is None:
        raise _Unreadable
    end = _closing(text, opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", text[opcode.end() : end - 1])
    operands = tuple(o.split()[-1].lstrip("%") for o in _split(inside))
    return _Instruction(name, text[: opcode.start()], opcode[1], operands, text[end:])


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if depth == 0:
            return at + 1
    raise _Unreadable


def _split(text: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p for p in parts if p.strip()]


def _shape_bytes(shape: str) -> float:
    """Bytes of an array or a tuple of arrays, by the bits in the types' names; tokens have none."""
    total = 0.0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        total += bits / 8 * math.prod(int(re.sub(r"\D", "", s)) for s in sizes.split(",") if s)
    return total


def _named(attributes: str, key: str) -> list[str]:
    """The computations that `key=%a` or `key={%a, %b}` names."""
    if (found := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|([^\s,]+))", attributes)) is None:
        return []
    return [n.strip().lstrip("%") for n in (found[1] or found[2]).split(",")]


def _get(found: dict[str, Any], name: str) -> Any:
    if name not in found:
        raise _Unreadable
    return found[name]


def _moved(name: str, computations: dict[str, _Computation]) -> float:
    within: _Computation = _get(computations, name)
    return sum(_of_instruction(i, within, computations) for i in within.instructions.values())


def _of_instruction(i: _Instruction, within: _Computation, computations: dict[str, _Computation]) -> float:
    opcode, attributes = i.opcode.removesuffix("-start"), i.attributes
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0

    def of(name):
        return _moved(name, computations)

    if opcode == "while":
        (body,), (condition,) = _named(attributes, "body") or [""], _named(attributes, "condition") or [""]
        return _trips(attributes, condition, computations) * (of(body) + of(condition))
    if opcode == "conditional":
        keys = ("branch_computations", "true_computation", "false_computation")
        return max((of(n) for key in keys for n in _named(attributes, key)), default=0.0)
    if opcode in ("call", "async"):
        return sum(of(n) for key in ("to_apply", "calls") for n in _named(attributes, key))
    sizes = [_shape_bytes(_get(within.instructions, o).shape) for o in i.operands]
    if opcode == "fusion" and (called := _named(attributes, "calls")):
        inside: _Computation = _get(computations, called[0])
        reads = (_read(p, inside, sizes[n]) for n, p in _parameters(inside) if n < len(sizes))
        return sum(reads) + _written(inside)
    if opcode in _SLICES:
        return 2 * _shape_bytes(i.shape) + sum(sizes[1:])
    if opcode == "dynamic-update-slice":
        return 2 * sizes[1] + sum(sizes[2:])
    if opcode == "scatter":  # what stood there is read, the update too, and the sum is written
        return sizes[len(sizes) // 2] + 3 * sum(sizes[len(sizes) // 2 + 1 :])
    if opcode != i.opcode:  # a transfer begins: its result holds the operands again
        return 2 * sum(sizes)
    return sum(sizes) + (_without_workspace(i.shape) if opcode == "custom-call" else _shape_bytes(i.shape))


def _without_workspace(shape: str) -> float:
    """Of a custom call's result, which a kernel's own memory follows as a row of bytes."""
    return _shape_bytes(re.sub(r"(?<=[ (])[su]8\[\d+\]", "", shape) if shape.startswith("(") else shape)


def _trips(attributes: str, condition: str, computations: dict[str, _Computation]) -> int:
    """The trips that the compiler noted; else the one whole number in the condition, if there is one; else 1."""
    if found := _TRIPS.search(attributes):
        return int(found[1])
    tested: _Computation = _get(computations, condition)
    called = {
        n for i in tested.instructions.values() for key in ("calls", "to_apply") for n in _named(i.attributes, key)
    }
    everything = [i for c in (tested, *(_get(computations, n) for n in called)) for i in c.instructions.values()]
    numbers = {i.operands for i in everything if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.shape)}
    limit = numbers.pop()[0] if len(numbers) == 1 else "1"
    return int(limit) if limit.isdigit() else 1


def _parameters(inside: _Computation) -> list[tuple[int, str]]:
    """Number and name of what a fusion is given."""
    return [(int(i.operands[0]), i.name) for i in inside.instructions.values() if i.opcode == "parameter"]


def _read(name: str, inside: _Computation, whole: float) -> float:
    """Bytes of an operand that a fusion reads: of slices of it, what they give; of what is written over, nothing."""
    total = 0.0
    for user in inside.instructions.values():
        if name not in user.operands:
            continue
        if user.opcode == "bitcast":
            total += _read(user.name, inside, whole)
        elif user.opcode in _SLICES and user.operands.count(name) == 1 and user.operands[0] == name:
            total += _shape_bytes(user.shape)
        elif user.name not in _in_place(inside) or user.operands.index(name) > 0:
            return whole
    return min(total, whole)


def _in_place(inside: _Computation) -> set[str]:
    """The dynamic-update-slices that a fusion gives as its results, of buffers that it was given."""
    found = (_behind(r, inside) for r in _results(inside))
    updates = (i for i in found if i.opcode == "dynamic-update-slice")
    return {i.name for i in updates if _behind(i.operands[0], inside).opcode == "parameter"}


def _results(inside: _Computation) -> tuple[str, ...]:
    root: _Instruction = _get(inside.instructions, inside.root)
    return root.operands if root.opcode == "tuple" else (root.name,)


def _behind(name: str, inside: _Computation) -> _Instruction:
    """What a name stands for, bitcasts left away."""
    found: _Instruction = _get(inside.instructions, name)
    return _behind(found.operands[0], inside) if found.opcode == "bitcast" else found


def _written(inside: _Computation) -> float:
    """Bytes of a fusion's results; of one that is written in place, of the update."""
    in_place, total = _in_place(inside), 0.0
    for name in _results(inside):
        result = _behind(name, inside)
        of_update = result.name in in_place
        total += _shape_bytes(_get(inside.instructions, result.operands[1] if of_update else name).shape)
    return total
