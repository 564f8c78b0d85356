"""Costs read from a step's text, against XLA's own count, plan and traffic of the compiled step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from peftjax import counting, hub, methods
from peftjax.train import Settings, make_optimizer, make_step, start

METHODS = {
    "full": methods.full(),
    "lora": methods.lora(rank=4),
    "dora": methods.dora(rank=4),
    "prefix": methods.prefix(length=4),
}
SIZES = {"hidden_size": 64, "intermediate_size": 128}
ROWS, LENGTH = 8, 32


def likelihood(model):
    def loss(params, batch, key):
        logits = jax.nn.log_softmax(model.forward(params, batch).logits[:, :-1])
        picked = jnp.take_along_axis(logits, batch["input_ids"][:, 1:, None], -1)
        return -picked.sum(), jnp.float32(picked.size)

    return loss


@functools.cache
def traced(name, layout="loop", parts=1, remat="none"):
    """The training step of a small Llama, on abstract shapes."""
    m, model = METHODS[name], hub.from_config(tiny.config("llama", **SIZES), "generation", seed=None, remat=remat)
    tx = make_optimizer(Settings(), 10, m)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda k, p: m.init(k, p, model.sites), key, model.params)
    state, frozen = jax.eval_shape(lambda p: start(m, p, tx, layout), params)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    step = jax.jit(make_step(likelihood(model), m, tx, parts), donate_argnums=0)
    return step.trace(state, frozen, {"input_ids": ids, "attention_mask": ids}, key)


@functools.cache
def compiled(*which):
    return traced(*which).lower().compile()


def count(f, *shapes):
    """Ours and XLA's count of a function of float32 arrays; XLA's of the unoptimised program."""
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    program = jax.jit(f).trace(*args)
    xla = program.lower().cost_analysis()
    return counting.flops(program.jaxpr), (xla.get("flops", 0), xla.get("transcendentals", 0))


# FLOPs


@pytest.mark.parametrize("name", METHODS)
def test_the_flops_of_a_step_are_xlas(name):
    found = counting.flops(traced(name).jaxpr)
    assert found.total == pytest.approx(traced(name).lower().cost_analysis()["flops"], rel=0.02)
    assert found.total == pytest.approx(compiled(name, "loop", 1, "none").cost_analysis()["flops"], rel=0.02)
    assert 0.85 * found.total < found.products < found.total


@pytest.mark.parametrize("name", ["full", "lora"])
def test_accumulation_costs_what_the_whole_batch_does(name):
    found, parts = (counting.flops(traced(name, "loop", n).jaxpr).total for n in (1, 2))
    assert parts == pytest.approx(found, rel=0.01)
    assert traced(name, "loop", 2).lower().cost_analysis()["flops"] < 0.6 * found, "XLA counts one part"


def test_the_scanned_layout_costs_as_much_but_for_the_gradient_that_its_first_layer_hands_on():
    full, scanned = (counting.flops(traced("full", layout).jaxpr) for layout in ("loop", "scan"))
    assert scanned.total == pytest.approx(full.total, rel=0.01)
    assert scanned.products == full.products
    # Below the first adapters nothing trains: the loop leaves out the keys' gradient there, and the input's.
    loop, scan = (counting.flops(traced("lora", layout).jaxpr) for layout in ("loop", "scan"))
    inputs = 2 * ROWS * LENGTH * 64 * (64 + 32 + 32 + 4 + 4)  # through q, k, v and two factors A
    keys = 2 * ROWS * LENGTH**2 * 64
    assert scan.products - loop.products == inputs + keys


def test_a_frozen_base_saves_the_products_of_its_gradients():
    full, lora = (counting.flops(traced(name).jaxpr).products for name in ("full", "lora"))
    assert 0.6 < lora / full < 0.75  # about 4 N T instead of 6 N T


OPERATIONS = {
    "elementwise": (lambda x: jnp.where(x > 0, -x / 2, jnp.abs(x)) + jnp.maximum(x, 1) ** 3, (7, 9)),
    "transcendental": (lambda x: jnp.exp(x) + jax.lax.rsqrt(x) * jnp.tanh(x), (7, 9)),
    "reductions": (lambda x: x.sum(0) + x.max(0) * x.min(), (7, 9)),
    "conversions": (lambda x: x.astype(jnp.int32) + 1, (7, 9)),
    "products": (lambda x: jnp.einsum("btnh,bsnh->bnts", x, x), (2, 5, 3, 4)),
    "scatter": (lambda x: jax.ops.segment_sum(x, x[:, 0].astype(jnp.int32), 3), (8, 5)),
    "nothing": (lambda x: jnp.concatenate([x.T, x.T])[1:].reshape(-1)[::2], (8, 5)),
    "unused": (lambda x: (x @ x, jax.jit(lambda y: (y + 1, y @ y @ y))(x))[1][0], (8, 8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_counts_what_it_counts_in_xla(name):
    f, shape = OPERATIONS[name]
    found, (flops, transcendentals) = count(f, shape)
    assert (found.total, found.transcendentals) == (flops, transcendentals)
    assert found.products == (flops if name == "products" else 0)


@pytest.mark.parametrize(
    "how",
    [
        {"padding": "SAME", "window_strides": (2, 1)},
        {"padding": [(2, 1), (0, 3)], "window_strides": (1, 1), "rhs_dilation": (2, 1)},
        {"padding": [(1, 2), (0, 1)], "window_strides": (1, 1), "lhs_dilation": (2, 3)},
        {"padding": "SAME", "window_strides": (1, 1), "feature_group_count": 2},
    ],
)
def test_a_convolution_counts_what_meets(how):
    kernel = (4, 6 // how.get("feature_group_count", 1), 3, 2)
    found, (flops, _) = count(lambda x, k: jax.lax.conv_general_dilated(x, k, **how), (2, 6, 9, 8), kernel)
    assert found == (flops, flops, 0)


def test_what_runs_inside_counts_as_often_as_it_runs():
    x, square = jnp.ones((4, 4)), 2 * 4**3

    def products(f):
        return counting.flops(jax.make_jaxpr(f)(x)).products

    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, None, length=5)[0]

    assert products(looped) == 5 * square
    assert products(jax.grad(lambda x: looped(x).sum())) == 15 * square
    assert products(lambda x: jax.lax.scan(lambda c, _: (c, c @ c), x, None, length=5)[0]) == 0  # its results unread
    assert products(lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ c, x)) == square
    assert products(lambda x: jax.lax.cond(x.sum() > 0, lambda x: x @ x @ x, lambda x: x @ x, x)) == 2 * square
    assert products(jax.vmap(lambda row: x @ row)) == square
    assert products(jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x))(x).sum())) == 4 * square - square
    mesh = jax.sharding.AbstractMesh((2, 3), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = {"in_specs": P("data"), "out_specs": P("data")}
    shared = jax.shard_map(lambda x: x @ x.T, mesh=mesh, axis_names={"data"}, **spec)
    assert products(shared) == 2 * (2 * 2 * 2 * 4)


def test_a_carry_that_only_a_later_pass_reads_is_used():
    def f(x):
        def body(carry, _):
            _, second, unread = carry
            return (second, second @ second, unread @ unread), None

        return jax.lax.scan(body, (x, x, x), None, length=3)[0][0]

    assert counting.flops(jax.make_jaxpr(f)(jnp.ones((4, 4)))).products == 3 * 2 * 4**3


def test_an_effect_keeps_what_it_prints():
    def f(x):
        jax.debug.print("{}", (x @ x).sum())
        return x

    assert counting.flops(jax.make_jaxpr(f)(jnp.ones((4, 4)))).products == 2 * 4**3


# The bound of the temporaries


@pytest.mark.parametrize(
    "which",
    [
        ("full", "loop", 1, "none"),
        ("lora", "loop", 1, "none"),
        ("lora", "scan", 1, "none"),
        ("lora", "scan", 2, "block"),
    ],
    ids=str,
)
def test_the_bound_is_above_the_plan_and_not_far(which):
    plan = compiled(*which).memory_analysis().temp_size_in_bytes
    assert plan <= counting.bound(traced(*which).jaxpr) < 2 * plan


@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_the_bound_knows_rematerialisation(layout):
    """The CPU's compiler drops the barriers that keep a recomputation late, so that its plan is no measure of it."""
    kept, again = (counting.bound(traced("lora", layout, 1, remat).jaxpr) for remat in ("none", "block"))
    assert again < 0.7 * kept


def test_the_bound_by_hand():
    x = jax.ShapeDtypeStruct((256,), jnp.float32)
    kb = 1024

    def bound(f):
        return counting.bound(jax.make_jaxpr(f)(x))

    assert bound(lambda x: x) == 0
    assert bound(lambda x: jnp.sin(jnp.sin(jnp.sin(x)))) == 2 * kb
    assert bound(lambda x: (y := jnp.sin(x)) * jnp.sin(jnp.cos(y))) == 3 * kb
    assert bound(jax.jit(lambda x: jnp.sin(jnp.sin(jnp.sin(x))))) == 2 * kb
    stacked = bound(lambda x: jax.lax.scan(lambda c, _: (-c, jnp.sin(c)), x, None, length=7)[1])
    assert stacked == (1 + 7 + 2) * kb, "the carry, the results, and one pass's two"
    assert bound(lambda x: (jnp.sin(x) @ x, jnp.cos(x))[0]) == kb + 4, "dead code takes nothing"


# Bytes that move


@pytest.mark.parametrize("name", METHODS)
def test_the_traffic_of_a_step_is_xlas(name):
    program = compiled(name, "loop", 1, "none")
    assert counting.traffic(program.as_text()) == pytest.approx(program.cost_analysis()["bytes accessed"], rel=0.02)


def repeated(length):
    w = jax.ShapeDtypeStruct((length, 64, 64), jnp.float32)
    f = jax.jit(lambda x, w: jax.lax.scan(lambda c, w: (jnp.sin(c @ w), c), x, w))
    return f.lower(jax.ShapeDtypeStruct((64, 64), jnp.float32), w).compile()


def test_the_body_of_a_loop_moves_its_bytes_at_each_trip():
    """A pass reads its slice and writes its result in place, however long the stacks are."""
    short, long = (counting.traffic(repeated(n).as_text()) for n in (8, 24))
    assert short is not None
    assert long == pytest.approx(3 * short, rel=0.05)
    assert 7 < short / (8 * 64 * 64 * 4) < 13  # a product's three arrays, a sine's two, a slice's and a result's two
    scan, loop = (compiled("lora", layout, 1, "none") for layout in ("scan", "loop"))
    moved = [counting.traffic(program.as_text()) for program in (scan, loop)]
    assert moved[0] > 1.2 * moved[1] > scan.cost_analysis()["bytes accessed"]


def test_trips_that_nobody_noted_are_those_of_the_condition():
    program = repeated(8)
    text = program.as_text()
    assert counting.traffic(re.sub(r"known_trip_count", "", text)) == counting.traffic(text)


GPU = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[64,16]{1,0}, s32[])->f32[64,16]{1,0}}

%fused_update (p0: f32[64,16], p1: f32[64,16], p2: s32[]) -> f32[64,16] {
  %p0 = f32[64,16]{1,0} parameter(0)
  %p1 = f32[64,16]{1,0:T(8,128)} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %row = f32[1,16]{1,0} dynamic-slice(%p1, %p2, /*index=2*/%zero), dynamic_slice_sizes={1,16}
  %twice = f32[1,16]{1,0} add(%row, %row)
  ROOT %set = f32[64,16]{1,0} dynamic-update-slice(%p0, %twice, %p2, %zero)
}

%async (q: bf16[64,16]) -> bf16[64,16] {
  %q = bf16[64,16]{1,0} parameter(0)
  ROOT %n = bf16[64,16]{1,0} negate(%q)
}

%small (s: (f32[64,16])) -> f32[64,16] {
  %s = (f32[64,16]{1,0}) parameter(0)
  ROOT %g = f32[64,16]{1,0} get-tuple-element(%s), index=0
}

%large (t: (f32[64,16])) -> f32[64,16] {
  %t = (f32[64,16]{1,0}) parameter(0)
  %h = f32[64,16]{1,0} get-tuple-element(%t), index=0
  ROOT %copied = f32[64,16]{1,0} copy(%h)
}

ENTRY %main (a: f32[64,16], i: s32[]) -> f32[64,16] {
  %a = f32[64,16]{1,0} parameter(0), metadata={op_name="a)]}"}
  %i = s32[] parameter(1)
  %b = bf16[64,16]{1,0} convert(%a)
  %start = ((bf16[64,16]{1,0}), bf16[64,16]{1,0}) async-start(%b), calls=%async
  %done = bf16[64,16]{1,0} async-done(%start)
  %gemm = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%b, /*index=1*/%done), custom_call_target="__cublas$gemm"
  %new = f32[64,16]{1,0} some-later-opcode(%a)
  %t = (f32[64,16]{1,0}) tuple(%new)
  %either = f32[64,16]{1,0} conditional(%i, %t, %t), branch_computations={%small, %large}
  ROOT %f = f32[64,16]{1,0} fusion(%either, %a, %i), kind=kLoop, calls=%fused_update
}
"""


def test_the_traffic_of_a_text_by_hand():
    full, half, row = 64 * 16 * 4, 64 * 16 * 2, 16 * 4
    convert, negate, gemm = full + half, 2 * half, 2 * half + 64 * 64 * 2
    unknown, copied, fusion = 2 * full, 2 * full, row + row + 4
    assert counting.traffic(GPU) == convert + negate + gemm + unknown + copied + fusion
    assert counting.traffic(GPU.replace("%", "")) == counting.traffic(GPU)
    inside = re.sub(r"ROOT (%set.*)", r"\1\n  ROOT %end = f32[64,16]{1,0} negate(%set)", GPU)
    assert counting.traffic(inside) == counting.traffic(GPU) + 2 * full - row, "not the result: not written in place"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "module @jit_f { }",
        GPU[: GPU.index("ROOT %f")],
        GPU.replace("calls=%async", "calls=%gone"),
        GPU.replace("%a)", "%z)"),
    ],
    ids=["empty", "stablehlo", "cut", "no computation", "no operand"],
)
def test_what_is_no_hlo_has_no_traffic(text):
    assert counting.traffic(text) is None


def test_sizes_of_types():
    sizes = {
        "pred[3]": 3,
        "u4[3,2]{1,0}": 3,
        "f8e4m3fn[2]": 2,
        "bf16[]": 2,
        "(s32[2], /*index=1*/c64[2])": 24,
        "token[]": 0,
    }
    assert {shape: counting._shape_bytes(shape) for shape in sizes} == sizes
    assert np.isclose(counting._shape_bytes("f32[<=8,2]{1,0:T(8,128)S(1)}"), 64)


def test_a_branch_for_a_platform():
    """Of what is lowered by platform, the platform's own; else the dearest."""

    def f(x):
        return jax.lax.platform_dependent(x, cuda=lambda x: x @ x @ x, tpu=lambda x: x, default=lambda x: x @ x)

    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    for g in (f, jax.checkpoint(f), lambda x: jax.lax.fori_loop(0, 1, lambda i, y: f(y), x)):
        jaxpr = jax.make_jaxpr(g)(x)
        counts = [counting.flops(jaxpr, name).products for name in (None, "cuda", "cpu", "tpu")]
        assert counts == [2048, 2048, 1024, 0]
