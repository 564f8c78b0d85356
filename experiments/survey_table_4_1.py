"""The survey's Table 4.1: what full fine-tuning, LoRA and QLoRA need on a card, published, planned and measured.

    python experiments/survey_table_4_1.py                # plans; needs pip install '.[plan]', and no GPU
    python experiments/survey_table_4_1.py --measure      # beside them the peak on the GPU that is here

writes `experiments/results/survey-4-1/`: `plans.jsonl` (one line a plan; what is there is not planned again),
`report.md` and `memory.png`, with each card's limit drawn.

Published: README of Hugging Face PEFT, GPU memory on an A100 80 GB, twitter_complaints, batches of 8: T0_3B and mt0-xxl
read 256 tokens and write up to 64, bloomz-7b1 reads 64; LoRA of rank 8, alpha 32 and dropout 0.1 on query and value, of
BLOOM on the fused query, key and value. Llama-2-7B, which the table does not have: one row of 2,048 tokens, LoRA of
rank 8 on query and value, for cards of 24 and 8 GB. Activations are in the dtype of the weights (in bfloat16 over NF4);
what trains, and Adam's moments, are float32, but for full fine-tuning in bfloat16, whose weights train in bfloat16
(moments float32), with the update within the backward pass. T0 and mt0 train with their dropout of 0.1, with which
attention is XLA's, and in the scanned layout; the others in a loop over the layers.
"""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import transformers
import tyro

from peftjax import devices, hub, memory
from peftjax.devices import GB
from peftjax.methods import full, lora
from peftjax.train import Settings

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OUT = Path(__file__).parent / "results/survey-4-1"


class Base(NamedTuple):
    """A model of the table.

    Attributes:
      config: makes transformers' config; the numbers are those of the published one.
      rows, length, target: of a batch.
      lora: targets.
      layout: of the parameters.
      cards: to plan for.
    """

    config: Callable[[], Any]
    rows: int
    length: int
    target: int | None
    lora: tuple[str, ...]
    layout: str = "loop"
    cards: tuple[str, ...] = ("a100-80g", "h200")


def t5(width: int, ff: int, heads: int, words: int, kind: type = transformers.T5Config) -> Any:
    """T5 1.1 and mT5: 24 and 24 layers, heads of 64, a gated MLP, a head of its own."""
    config = kind(
        vocab_size=words,
        d_model=width,
        d_kv=64,
        d_ff=ff,
        num_layers=24,
        num_decoder_layers=24,
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    config.tie_word_embeddings = False  # transformers 5 ties whatever it is told, until it has seen the weights
    return config


def bloomz() -> Any:
    return transformers.BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)


def llama() -> Any:
    return transformers.LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)


QV = ("query", "value")
BASES = {
    "T0_3B": Base(lambda: t5(2048, 5120, 32, 32128), 8, 256, 64, QV, "scan"),
    "mt0-xxl": Base(lambda: t5(4096, 10240, 64, 250112, transformers.MT5Config), 8, 256, 64, QV, "scan"),
    "bloomz-7b1": Base(bloomz, 8, 64, None, ("fused_qkv",)),
    "Llama-2-7B": Base(llama, 1, 2048, None, QV, "loop", ("a100-80g", "h200", "rtx4090", "rtx4060")),
}


class Way(NamedTuple):
    """A way to train.

    Attributes:
      method: 'full' or 'lora'.
      dtype: of weights and activations.
      quantize: of the weights.
      settings: beside the defaults of `Settings`.
    """

    method: str
    dtype: str
    quantize: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()


BACKWARD = (("update", "backward"), ("trainable_dtype", "bfloat16"), ("clip", None))
WAYS = {
    "full, float32": Way("full", "float32"),
    "full, bfloat16, update in backward": Way("full", "bfloat16", None, BACKWARD),
    "LoRA, float32": Way("lora", "float32"),
    "LoRA, bfloat16": Way("lora", "bfloat16"),
    "LoRA, NF4": Way("lora", "bfloat16", "nf4"),
    "QLoRA (NF4, doubly quantised)": Way("lora", "bfloat16", "nf4-double"),
}
# GB on the GPU, as published; None: out of memory on 80 GB. The published LoRA is in float32.
PUBLISHED: dict[tuple[str, str], float | None] = {
    ("T0_3B", "full, float32"): 47.14,
    ("mt0-xxl", "full, float32"): None,
    ("bloomz-7b1", "full, float32"): None,
    ("T0_3B", "LoRA, float32"): 14.4,
    ("mt0-xxl", "LoRA, float32"): 56.0,
    ("bloomz-7b1", "LoRA, float32"): 32.0,
}


def case(model: str, way: str) -> memory.Case:
    """The step of a row of the table."""
    base, how = BASES[model], WAYS[way]
    dtype = jnp.dtype(how.dtype)
    layout = "loop" if how.settings == BACKWARD else base.layout  # in a scan all layers are one group
    adapt = full() if how.method == "full" else lora(rank=8, alpha=32, dropout=0.1, targets=list(base.lora))
    return memory.Case(
        functools.partial(hub.from_config, base.config(), "generation", seed=None),
        lambda _: adapt,
        lambda m: memory.abstract_batch(m, "generation", base.rows, base.length, base.target),
        "generation",
        Settings(batch_size=base.rows, layout=layout, **dict(how.settings)),  # pyright: ignore[reportArgumentType]
        {"dtype": dtype, "param_dtype": dtype, "quantize": how.quantize, "remat": "block"},
    )


@dataclasses.dataclass
class Options:
    """What to do.

    Attributes:
      measure: also run each step on the GPU that is here, on zeros, in a process of its own.
      models: separated by commas; default: all.
      plan: what is not planned yet; without it the report is written of what is there.
      one: for `--measure`'s processes: `model|way`, prints the peak in bytes.
    """

    measure: bool = False
    models: str = ",".join(BASES)
    plan: bool = True
    one: str | None = None


def main(options: Options) -> None:
    if options.one is not None:
        print(memory.measure(case(*options.one.split("|"))))
        return
    OUT.mkdir(parents=True, exist_ok=True)
    if options.plan:
        _plan(options.models.split(","), OUT / "plans.jsonl")
    if options.measure:
        _measure(options, OUT / "measured.jsonl")
    rows = list({(r["model"], r["way"], r["card"]): r for r in _lines(OUT / "plans.jsonl")}.values())
    (OUT / "report.md").write_text(report(rows, _lines(OUT / "measured.jsonl")))
    draw(rows, OUT / "memory.png")


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _plan(models: list[str], file: Path) -> None:
    done = {(r["model"], r["way"], r["card"]) for r in _lines(file)}
    for model, way in itertools.product(models, WAYS):
        for card in BASES[model].cards:
            if (model, way, card) in done:
                continue
            found = plan(case(model, way), devices.find(card))
            key = {"model": model, "way": way, "card": card, "jax": jax.__version__}
            with file.open("a") as f:
                f.write(json.dumps(key | found.json()) + "\n")
            print(model, way, card, f"{found.peak / GB:.2f} GB", flush=True)


def plan(one: memory.Case, device: devices.Device) -> memory.Plan:
    """The plan; of what the card cannot hold without any activation, no more than that is known, and not compiled."""
    step = memory.lay_out(one)
    clipped = one.settings.clip is not None  # by the norm of all gradients, so that they exist at once
    gradients = step.trainable if clipped else 0
    if step.held + gradients <= device.memory:
        return memory.plan(one, device)
    parts = (step.frozen, step.trainable, gradients, step.optimizer, step.batch, step.held + gradients)
    return memory.Plan(device, "the sizes of the arrays", False, *parts, 0.0, None, 0.0, step.dtype)


def _measure(options: Options, file: Path) -> None:
    device = jax.devices()[0]
    if device.platform == "cpu":
        raise SystemExit("--measure: there is no GPU here")
    room = devices.present().room
    for model in options.models.split(","):
        for way in WAYS:
            if memory.lay_out(case(model, way)).held > room:
                continue
            command = [sys.executable, __file__, "--one", f"{model}|{way}"]
            ran = subprocess.run(command, capture_output=True, text=True)
            peak = int(ran.stdout.split()[-1]) if ran.returncode == 0 else None
            record = {"model": model, "way": way, "device": device.device_kind, "peak": peak, "jax": jax.__version__}
            with file.open("a") as f:
                f.write(json.dumps(record) + "\n")


def report(rows: list[dict], measured: list[dict]) -> str:
    """The table as markdown."""
    at = {(r["model"], r["way"], r["card"]): r for r in rows}
    on_gpu = {(r["model"], r["way"]): r for r in measured}
    gpu = f"measured, {measured[-1]['device']}" if measured else "measured"
    lines = [f"| model | way | published, A100 80 GB | planned, A100 80 GB | fits | planned, H200 | fits | {gpu} |"]
    lines += ["|---|---|---:|---:|---|---:|---|---:|"]
    for model in BASES:
        for way in WAYS:
            cells = [model, way, _published(model, way)]
            for card in ("a100-80g", "h200"):
                r = at.get((model, way, card))
                cells += ["-", "-"] if r is None else [_peak(r), "yes" if r["fits"] else "no"]
            r = on_gpu.get((model, way))
            cells.append("not run" if r is None else "out of memory" if r["peak"] is None else f"{r['peak'] / GB:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    small = ["| Llama-2-7B, 1 x 2,048 | RTX 4090 (24 GB) | fits | RTX 4060 (8 GB) | fits |", "|---|---:|---|---:|---|"]
    for way in WAYS:
        cells = [way]
        for card in ("rtx4090", "rtx4060"):
            r = at.get(("Llama-2-7B", way, card))
            cells += ["-", "-"] if r is None else [_peak(r), "yes" if r["fits"] else "no"]
        small.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(sorted({r["jax"] for r in rows}))
    by = ", ".join(sorted({r["by"] for r in rows if r["exact"]}))
    room = next((r for r in rows if r["card"] == "a100-80g"), None)
    said = (
        "" if room is None else f" An A100 80 GB has {(room['memory'] - room['reserved']) / GB:.1f} GB for a program."
    )
    facts = [
        "# Table 4.1: GPU memory of full fine-tuning, LoRA and QLoRA",
        "GB are 1e9 bytes. Published: Hugging Face PEFT's README (LoRA in float32). Planned: the peak of one training "
        f"step by {by}, jax {versions}, blocks computed again in the backward pass, cross-entropy in chunks, before "
        f"anything ran; the context (0.5 GB or so) comes on top.{said} Measured: the allocator's peak; the GPU column "
        "says 'not run' where none was at hand. A dash: not published, or not planned yet.",
        "\n".join(lines),
        "\n".join(small),
        "![memory](memory.png)",
        "Made by `python experiments/survey_table_4_1.py`.",
    ]
    return "\n\n".join(facts) + "\n"


def _peak(r: dict) -> str:
    return f"{r['peak'] / GB:.2f}" if r["exact"] else f"more than {r['peak'] / GB:.1f}"


def _published(model: str, way: str) -> str:
    if (model, way) not in PUBLISHED:
        return "-"
    value = PUBLISHED[model, way]
    return "out of memory" if value is None else f"{value:g}"


def draw(rows: list[dict], file: Path) -> None:
    """Bars for the A100, published beside planned, and the card's limit."""
    at = {(r["model"], r["way"]): r for r in rows if r["card"] == "a100-80g"}
    figure, axes = plt.subplots(1, len(BASES), figsize=(13, 3.6), sharex=True, sharey=True, layout="constrained")
    limit = devices.find("a100-80g").memory / GB
    for ax, model in zip(axes, BASES, strict=True):
        for i, way in enumerate(reversed(WAYS)):
            if (model, way) in at:
                peak = at[model, way]["peak"] / GB
                ax.barh(i - 0.2, peak, 0.4, color="#1f77b4" if peak < limit else "#d62728")
                ax.text(peak + 1, i - 0.2, f"{peak:.1f}", va="center", fontsize=8)
            if (model, way) in PUBLISHED:
                value = PUBLISHED[model, way]
                ax.barh(i + 0.2, value or limit, 0.4, color="#bbbbbb", hatch=None if value else "//")
                box = None if value else {"facecolor": "white", "edgecolor": "none", "pad": 1}
                at_x, said = (value + 1, f"{value:g}") if value else (3, "out of memory")
                ax.text(at_x, i + 0.2, said, va="center", fontsize=8, bbox=box)
        ax.axvline(limit, color="black", linewidth=1)
        ax.set_title(model)
        ax.set_yticks(range(len(WAYS)), list(reversed(WAYS)))
        ax.set_xlabel("GB")
    figure.suptitle("One training step on an A100 80 GB (line): planned (blue; red does not fit) and published (grey)")
    figure.savefig(file, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options))
