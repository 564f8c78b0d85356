"""Parts of a step as they were and as they are: value and gradients, on one thread, the two taking turns.

    python experiments/speed_parts.py

writes `experiments/results/speed/parts.md`: seconds of the process on the CPU, which other programs move little, as
medians of turns, and XLA's plan of what is in memory beside arguments and results. `log.md` beside it says what else
was tried.
"""

import functools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax.models.layers import ACTIVATIONS, attention, causal_mask
from peftjax.weights import product

OUT = Path(__file__).parents[1] / "experiments/results/speed/parts.md"
TURNS = 15


class Part(NamedTuple):
    """Two functions of the same arguments, all of which are differentiated."""

    name: str
    before: Callable
    after: Callable
    arguments: tuple[jax.Array, ...]


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def attends(name: str, batch: int, length: int, heads: int, shared: int, causal: bool) -> Part:
    ones = jnp.ones((batch, length), jnp.int32)
    mask = causal_mask(ones) if causal else ones[:, None, None, :].astype(bool)
    arguments = (normal(batch, length, heads, 64), *(normal(batch, length, shared, 64),) * 2)

    def before(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, None, mask)

    return Part(name, before, lambda q, k, v: attention(None, q, k, v, mask, causal=causal), arguments)


def parts() -> list[Part]:
    """Of the small models of `speed.py`."""
    inner, outer = normal(8, 128, 1536), normal(8, 128, 384)
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    return [
        attends("attention 8 x 128, 6 heads", 8, 128, 6, 6, False),
        attends("causal attention 4 x 256, 6 heads", 4, 256, 6, 6, True),
        attends("causal attention 2 x 512, 8 heads on 2", 2, 512, 8, 2, True),
        Part("gelu of 1024 x 1536", gelu, ACTIVATIONS["gelu"], (inner,)),
        Part("gelu (tanh) of 1024 x 1536", jax.nn.gelu, ACTIVATIONS["gelu_new"], (inner,)),
        Part("silu of 1024 x 1536", jax.nn.silu, ACTIVATIONS["silu"], (inner,)),
        Part("8 x 128 x 384 by 384 x 1536, both gradients", jnp.matmul, product, (outer, normal(384, 1536))),
        Part("8 x 128 x 1536 by 1536 x 384, both gradients", jnp.matmul, product, (inner, normal(1536, 384))),
        Part("8 x 128 x 8 by 8 x 384, both gradients", jnp.matmul, product, (normal(8, 128, 8), normal(8, 384))),
    ]


def compiled(f: Callable, arguments: tuple) -> tuple[Callable, int]:
    """() -> value and gradients, done; and the plan's temporaries."""

    @jax.jit
    def both(xs, dy):
        y, pullback = jax.vjp(f, *xs)
        return y, pullback(dy.reshape(y.shape))

    dy = normal(*jax.eval_shape(f, *arguments).shape)
    program = both.lower(arguments, dy).compile()
    plan: Any = program.memory_analysis()
    return lambda: jax.block_until_ready(program(arguments, dy)), plan.temp_size_in_bytes


def line(part: Part) -> str:
    pair = [compiled(f, part.arguments) for f in (part.before, part.after)]
    seconds: list[list[float]] = [[], []]
    for turn in range(TURNS + 1):
        for (run, _), each in zip(pair, seconds, strict=True):
            began = time.process_time()
            run()
            if turn:
                each.append(time.process_time() - began)
    ratio = statistics.median(a / b for a, b in zip(*seconds, strict=True))
    ms = " | ".join(f"{1000 * statistics.median(each):.2f}" for each in seconds)
    mb = " | ".join(f"{n / 1e6:.1f}" for _, n in pair)
    return f"| {part.name} | {ms} | **{ratio:.2f}** | {mb} |"


if __name__ == "__main__":
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])  # XLA's pool gets one thread
    lines = [
        "# Parts of a step: before and after",
        "",
        f"`python experiments/speed_parts.py`: value and gradients, float32, jax {jax.__version__}, one CPU core of "
        f"{os.cpu_count()}. Milliseconds of the process on the CPU, medians of {TURNS} turns; MB of temporaries.",
        "",
        "| part | ms before | after | before / after | MB before | after |",
        "|---|---:|---:|---:|---:|---:|",
        *map(line, parts()),
    ]
    OUT.write_text("\n".join(lines) + "\n")
    print(OUT.read_text())
