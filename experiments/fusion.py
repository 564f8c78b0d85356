"""Is one product for query, key and value, and one for gate and up, worth it beside frozen weights with LoRA?

    python experiments/fusion.py moved    # needs pip install '.[plan]', and no GPU: bytes by the CUDA compiler
    python experiments/fusion.py timed    # on this machine's CPU, in float32

writes into `experiments/results/speed/` a JSONL file each and, from both, `fusion.md`. Two pre-norm blocks as Llama's
are run forward and backward, down to the activations and the low-rank factors, with their products laid out as
`VARIANTS` says. To be built into the models, an arrangement has to save 5% of a step's time on the CPU or 10% of the
bytes on an H200.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from peftjax import devices
from peftjax.counting import traffic
from peftjax.models.layers import attention, causal_mask

OUT = Path(__file__).parent / "results/speed"
LAYERS, RANK = 2, 8
MERGED = {"xla_gpu_dot_merger_threshold_mb": 256}


class Shape(NamedTuple):
    """Sizes of a block: `kv` is the width of keys and of values; without `gated` the MLP has no gate."""

    name: str
    rows: int
    length: int
    width: int
    kv: int
    ff: int
    gated: bool = True
    size: int = 64  # of a head


class Variant(NamedTuple):
    """How the products are arranged.

    Attributes:
      fused: the frozen weights of q, k, v, and of gate and up, lie side by side and are one product.
      low: the A's of a group, by 'side' each their own product, or 'joined' in one, or with the B's in 'blocks', too.
      transposed: the frozen weights are stored (outputs, inputs).
      options: for the CUDA compiler.
    """

    fused: bool = False
    low: str = "side"
    transposed: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed


VARIANTS = {
    "separate": Variant(),
    "A's joined": Variant(low="joined"),
    "fused": Variant(True),
    "fused, A's joined": Variant(True, "joined"),
    "fused, A's and B's in blocks": Variant(True, "blocks"),
    "separate, transposed": Variant(transposed=True),
    "separate, merged by XLA": Variant(options=MERGED),
}
BERT = Shape("BERT-base", 32, 128, 768, 768, 3072, gated=False)
LLAMA = Shape("Llama 1B", 4, 512, 2048, 512, 8192)
SMALL = [
    Shape(f"{tokens} x {width}", tokens // 128, 128, width, width, 3 * width)
    for width, tokens in ((256, 512), (256, 2048), (512, 1024), (1024, 512))
]


def groups(s: Shape) -> dict[tuple[str, ...], tuple[int, ...]]:
    """What could be one product: names -> outputs of each."""
    mlp: dict[tuple[str, ...], tuple[int, ...]] = {("gate", "up"): (s.ff, s.ff)} if s.gated else {("up",): (s.ff,)}
    return {("q", "k", "v"): (s.width, s.kv, s.kv), ("o",): (s.width,), **mlp, ("down",): (s.width,)}


def weights(key: jax.Array, s: Shape, v: Variant, adapted: tuple[str, ...], dtype: Any) -> tuple[list, list]:
    """Frozen and trained weights of each layer."""
    frozen, trained = [], []
    for layer in range(LAYERS):
        dense, low = {}, {}
        for i, (names, outputs) in enumerate(groups(s).items()):
            inputs = s.ff if names == ("down",) else s.width
            sub = jax.random.fold_in(jax.random.fold_in(key, layer), i)
            each = [0.02 * jax.random.normal(jax.random.fold_in(sub, j), (inputs, n)) for j, n in enumerate(outputs)]
            ws = [jnp.concatenate(each, 1)] if v.fused else each
            dense[names] = [(w.T if v.transposed else w).astype(dtype) for w in ws]
            for j, (name, n) in enumerate(zip(names, outputs, strict=True)):
                if name in adapted:
                    a = jax.random.normal(jax.random.fold_in(sub, 10 + j), (inputs, RANK)) / inputs**0.5
                    low[name] = (a, jax.random.normal(jax.random.fold_in(sub, 20 + j), (RANK, n)) / n**0.5)
        frozen.append(dense)
        trained.append(low)
    return frozen, trained


def products(v: Variant, x: jax.Array, names: tuple, outputs: tuple, ws: list, low: dict) -> list[jax.Array]:
    """`x W + (x A) B` for each of a group; x is (tokens, inputs): of two token axes XLA would copy a transpose."""
    full = [jnp.einsum("...i,oi->...o", x, w) if v.transposed else x @ w for w in ws]
    ends = np.cumsum(outputs)[:-1]
    mine = [n for n in names if n in low]
    a = {n: low[n][0].astype(x.dtype) for n in mine}
    b = {n: low[n][1].astype(x.dtype) for n in mine}
    if v.low == "side" or not mine:
        parts = jnp.split(full[0], ends, axis=-1) if v.fused else full
        return [y + (x @ a[n]) @ b[n] if n in low else y for n, y in zip(names, parts, strict=True)]
    h = x @ jnp.concatenate([a[n] for n in mine], 1)
    if v.low == "blocks":
        rows = [
            [b[m] if n == m else jnp.zeros((RANK, width), x.dtype) for m, width in zip(names, outputs, strict=True)]
            for n in mine
        ]
        return jnp.split(full[0] + h @ jnp.block(rows), ends, axis=-1)
    parts = jnp.split(full[0], ends, axis=-1) if v.fused else full
    hs = dict(zip(mine, jnp.split(h, len(mine), axis=-1), strict=True))
    return [y + hs[n] @ b[n] if n in low else y for n, y in zip(names, parts, strict=True)]


def step(s: Shape, v: Variant) -> Callable:
    """(trained, frozen, x) -> gradients by trained and x, of a scalar of the blocks' output."""

    def norm(x):
        h = x.astype(jnp.float32)
        return (h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)

    def loss(trained, x, frozen):
        sizes, mask = groups(s), causal_mask(jnp.ones((s.rows, s.length), jnp.int32))
        for dense, low in zip(frozen, trained, strict=True):

            def of(x, *names, dense=dense, low=low):
                ys = products(v, x.reshape(-1, x.shape[-1]), names, sizes[names], dense[names], low)
                return [y.reshape(*x.shape[:-1], -1) for y in ys]

            q, k, value = (y.reshape(s.rows, s.length, -1, s.size) for y in of(norm(x), "q", "k", "v"))
            y = attention(None, q, k, value, mask)
            x = x + of(y, "o")[0]
            if s.gated:
                gate, up = of(norm(x), "gate", "up")
                h = jax.nn.silu(gate) * up
            else:
                h = jax.nn.gelu(of(norm(x), "up")[0])
            x = x + of(h, "down")[0]
        return jnp.square(x.astype(jnp.float32)).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))


def arguments(s: Shape, v: Variant, adapted: tuple[str, ...], dtype: Any) -> tuple:
    frozen, trained = weights(jax.random.key(0), s, v, adapted, dtype)
    return trained, jax.random.normal(jax.random.key(1), (s.rows, s.length, s.width)).astype(dtype), frozen


def adaptations(s: Shape) -> dict[str, tuple[str, ...]]:
    return {"q, v": ("q", "v"), "all linear": tuple(n for names in groups(s) for n in names)}


def keep(file: Path, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def moved() -> None:
    """Bytes that a step moves on an H200 in bfloat16, and its peak; what is in the file is not compiled again."""
    file = OUT / "fusion-moved.jsonl"
    place = devices.target(devices.find("h200"))
    sharding = jax.sharding.SingleDeviceSharding(place.device)
    for s in (LLAMA, BERT):
        for targets, adapted in adaptations(s).items():
            for name, v in VARIANTS.items():
                key = {"shape": s.name, "lora": targets, "variant": name}
                if any(all(r[k] == x for k, x in key.items()) for r in records(file)):
                    continue
                shapes = jax.eval_shape(lambda s=s, v=v, on=adapted: arguments(s, v, on, jnp.bfloat16))
                there = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
                options = {**place.options, **v.options}
                compiled = jax.jit(step(s, v)).trace(*there).lower().compile(compiler_options=options)
                memory: Any = compiled.memory_analysis()
                keep(
                    file, {**key, "moved": traffic(compiled.as_text() or ""), "temporaries": memory.temp_size_in_bytes}
                )


def timed(repeats: int) -> None:
    """Seconds of a step on this CPU in float32, all variants in turns."""
    file = OUT / "fusion-timed.jsonl"
    variants = {name: v for name, v in VARIANTS.items() if not v.options}
    for s in SMALL:
        for targets, adapted in adaptations(s).items():
            if any((r["shape"], r["lora"]) == (s.name, targets) for r in records(file)):
                continue
            calls = {name: jax.jit(step(s, v)) for name, v in variants.items()}
            inputs = {name: arguments(s, v, adapted, jnp.float32) for name, v in variants.items()}
            taken: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(1 + repeats):  # the first compiles
                for name, call in calls.items():
                    began = time.perf_counter()
                    jax.block_until_ready(call(*inputs[name]))
                    taken[name].append(time.perf_counter() - began)
            for name, seconds in taken.items():
                ratios = np.array(seconds[1:]) / np.array(taken["separate"][1:])
                spread = [float(x) for x in np.quantile(ratios, (0.25, 0.5, 0.75))]
                key = {"shape": s.name, "lora": targets, "variant": name}
                keep(file, {**key, "seconds": float(np.median(seconds[1:])), "ratios": spread})


def write() -> None:
    """Both tables."""
    there, here = records(OUT / "fusion-moved.jsonl"), records(OUT / "fusion-timed.jsonl")
    parts = ["# One product for query, key and value, and one for gate and up", TEXT]
    for found, title, cell in (
        (there, f"GB moved by a step of {LAYERS} blocks, bfloat16, an H200's program by XLA's CUDA compiler", _moved),
        (
            here,
            f"Seconds of a step of {LAYERS} blocks over those of `separate`, float32, {os.cpu_count()} CPU cores",
            _ratio,
        ),
    ):
        columns = list(dict.fromkeys((r["shape"], r["lora"]) for r in found))
        of = {(r["variant"], r["shape"], r["lora"]): r for r in found}
        rows = [[""] + [f"{shape}, {lora}" for shape, lora in columns], ["---"] * (1 + len(columns))]
        for name in dict.fromkeys(r["variant"] for r in found):
            first = [of.get(("separate", *c)) for c in columns]
            rows.append([name] + [cell(of.get((name, *c)), f) for c, f in zip(columns, first, strict=True)])
        parts += [f"## {title}", "\n".join(f"| {' | '.join(row)} |" for row in rows)]
    (OUT / "fusion.md").write_text("\n\n".join(parts) + "\n")


def _moved(r: dict | None, separate: dict | None) -> str:
    return (
        "-" if r is None or separate is None else f"{r['moved'] / 1e9:.2f} ({r['moved'] / separate['moved'] - 1:+.1%})"
    )


def _ratio(r: dict | None, separate: dict | None) -> str:
    return "-" if r is None else "{1:.2f} ({0:.2f} to {2:.2f})".format(*r["ratios"])


TEXT = f"""Made by `python experiments/fusion.py` (jax {jax.__version__}). {LAYERS} pre-norm blocks, forward and
backward to the activations and the factors of LoRA (rank {RANK}). Ratios are medians of calls in turns (quartiles),
taken beside other programs' work."""


def main(what: str, repeats: int) -> None:
    if what == "moved":
        moved()
    else:
        timed(repeats)
    write()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What fused products would save beside LoRA.")
    parser.add_argument("what", choices=("moved", "timed"))
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    main(args.what, args.repeats)
