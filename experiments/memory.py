"""Memory plans: every method for Llama-2-7B, both layouts and remat policies, and plans against measured peaks.

    python experiments/memory.py methods     # needs pip install '.[plan]', and no GPU
    python experiments/memory.py layouts
    python experiments/memory.py measured    # needs a GPU: twelve configurations, each in a process of its own

writes into `experiments/results/memory/` a JSONL file (what is there is not planned again) and a table for each.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import transformers
import tyro

from peftjax import devices, hub, memory
from peftjax.devices import GB
from peftjax.methods import METHODS
from peftjax.run import entries
from peftjax.train import Settings

OUT = Path(__file__).parent / "results/memory"
# Without arguments these ask for data or for what a table cannot choose.
TEXTS: dict[str, str] = {"prompt": "prompt(length=20)", "neftune": "lora+neftune"}


def llama(layers: int = 32) -> Any:
    return transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
    )


def case(
    config: Any,
    method: str,
    rows: int,
    length: int,
    *,
    layout: str = "loop",
    remat: str = "block",
    quantize: str | None = None,
    kind: str = "generation",
) -> memory.Case:
    """A step in bfloat16."""
    half = jnp.dtype(jnp.bfloat16)
    (entry,) = entries(method, is_classifier=kind == "classification", has_biases=False)
    return memory.Case(
        functools.partial(hub.from_config, config, kind, seed=None),
        lambda _: entry.method,
        lambda m: memory.abstract_batch(m, kind, rows, length),
        kind,
        Settings(batch_size=rows, layout=layout),  # pyright: ignore[reportArgumentType]
        {"dtype": half, "param_dtype": half, "quantize": quantize, "remat": remat},
    )


def planned(file: Path, key: dict[str, Any], one: memory.Case, device: str) -> dict[str, Any]:
    """The plan of a case, from the file if it is there; a method that does not fit the model gives why."""
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    if there := [r for r in lines if all(r.get(k) == v for k, v in key.items())]:
        return there[-1]
    try:
        facts = memory.plan(one, devices.find(device)).json()
    except ValueError as e:
        facts = {"refused": str(e)}
    record = {"jax": jax.__version__, **facts, **key}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(json.dumps(record) + "\n")
    print(key, f"{record['peak'] / GB:.2f} GB" if "peak" in record else record["refused"], flush=True)
    return record


def gb(record: dict, *names: str) -> list[str]:
    return [f"{record[name] / GB:.3f}" if record[name] < GB / 10 else f"{record[name] / GB:.2f}" for name in names]


def methods() -> None:
    """Every method, Llama-2-7B in the scanned layout, 4 rows of 2,048 tokens, on an H200."""
    file, rows, refused = OUT / "methods.jsonl", [], []
    for name in METHODS:
        key = {"method": TEXTS.get(name, name), "rows": 4, "length": 2048, "device": "h200"}
        kind = "classification" if name == "head" else "generation"
        one = case(llama(), key["method"], 4, 2048, layout="scan", kind=kind)
        record = planned(file, key, one, "h200")
        refused += [f"`{name}`: {record['refused']}"] if "refused" in record else []
        if "peak" in record:
            cells = [
                f"`{TEXTS.get(name, name)}`{', of a classifier' * (name == 'head')}",
                *gb(record, *memory.COLUMNS),
                "yes" if record["fits"] else "no",
            ]
            rows.append([*cells, *costs(record)])
    header = ["method", *memory.COLUMNS, "fits", "TFLOP", "GB moved", "ms, at best"]
    title = "Every method: Llama-2-7B, scanned, blocks computed again, 4 x 2,048 tokens, on an H200"
    write("methods", title, header, rows, refused, file)


def costs(record: dict) -> list[str]:
    moved = "-" if record["traffic"] is None else f"{record['traffic'] / GB:.0f}"
    return [f"{record['flops'] / 1e12:.1f}", moved, f"{1000 * record['seconds']:.0f}"]


def layouts() -> None:
    """Loop and scan, and what the backward pass computes again: LoRA on Llama-2-7B, plain and in NF4, a row of 512."""
    file, rows = OUT / "layouts.jsonl", []
    for quantize, remat in ((None, "none"), (None, "dots"), (None, "block"), ("nf4", "block")):
        for layout in ("loop", "scan"):
            key = {"rows": 1, "length": 512, "quantize": quantize, "remat": remat, "layout": layout}
            one = case(llama(), "lora", 1, 512, layout=layout, remat=remat, quantize=quantize)
            r = planned(file, {**key, "device": "h200"}, one, "h200")
            cells = [quantize or "bfloat16", remat, layout, *gb(r, "activations", "peak"), *costs(r)]
            rows.append([*cells, f"{r['compile_seconds']:.0f}"])
    header = [
        "base",
        "remat",
        "layout",
        "activations",
        "peak",
        "TFLOP",
        "GB moved",
        "ms, at best",
        "compile s",
    ]
    write("layouts", "Layouts and remat: LoRA on Llama-2-7B, one row of 512 tokens, on an H200", header, rows, [], file)


TWELVE = [
    (method, quantize, rows, length)
    for method, quantize in (("full", None), ("lora", None), ("lora", "nf4"), ("prefix", None))
    for rows, length in ((1, 512), (4, 512), (1, 2048))
]


def measured(one: int | None = None) -> None:
    """Twelve steps of a Llama of 8 layers, planned for the GPU that is here and then run."""
    method, quantize, rows, length = TWELVE[one or 0]
    chosen = functools.partial(case, llama(8))
    if one is not None:
        print(memory.measure(chosen(method, rows, length, quantize=quantize)))
        return
    device = jax.devices()[0]
    if device.platform == "cpu":
        raise SystemExit("measured: there is no GPU here")
    file, lines = OUT / "measured.jsonl", []
    for i, (method, quantize, rows, length) in enumerate(TWELVE):
        plan = memory.plan(chosen(method, rows, length, quantize=quantize), devices.present())
        command = [sys.executable, __file__, "measured", "--one", str(i)]
        peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        record = {"method": method, "quantize": quantize, "rows": rows, "length": length, "device": device.device_kind}
        record |= {"planned": plan.peak, "measured": peak, "jax": jax.__version__}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as f:
            f.write(json.dumps(record) + "\n")
        ratio = plan.peak / peak
        cells = [
            method,
            quantize or "bfloat16",
            f"{rows} x {length}",
            *gb(record, "planned", "measured"),
            f"{ratio:.3f}",
        ]
        lines.append([*cells, "yes" if abs(ratio - 1) <= 0.05 else "no"])
    header = ["method", "base", "batch", "planned", "measured", "ratio", "within 5%"]
    write(
        "measured", f"Plans and measured peaks, {device.device_kind}, 8 layers of Llama-2-7B", header, lines, [], file
    )


def write(name: str, title: str, header: list[str], rows: list[list[str]], left_out: list[str], file: Path) -> None:
    records = [json.loads(x) for x in file.read_text().splitlines()]
    by = ", ".join(sorted({r["by"] for r in records if "by" in r})) or "XLA"
    versions = ", ".join(sorted({r["jax"] for r in records}))
    text = [
        f"# {title}",
        f"GB are 1e9 bytes; weights and activations in bfloat16, what trains in float32, AdamW. Planned by {by}, jax "
        f"{versions}. Made by `python experiments/memory.py {name}`.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows)),
        *(["Left out:\n\n" + "\n".join(f"- {x}" for x in left_out)] if left_out else []),
    ]
    (OUT / f"{name}.md").write_text("\n\n".join(text) + "\n")


def main(what: Literal["methods", "layouts", "measured"], one: int | None = None, /) -> None:
    measured(one) if what == "measured" else {"methods": methods, "layouts": layouts}[what]()


if __name__ == "__main__":
    tyro.cli(main)
