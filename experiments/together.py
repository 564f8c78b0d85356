"""What several seeds in one program cost, against as many programs one after another.

    python experiments/together.py

writes `experiments/results/together/` (`results.jsonl`, `report.md`; with `--allocator default`, `-default` in their
names). Steps of n seeds, each with its own batch, are timed in three ways that take turns in one process:

- separate: the compiled step of one run, called n times;
- lanes 1: one program in which the runs follow each other (`jax.lax.map`);
- lanes n: one program that computes all at once (`jax.vmap`).

`whole` is a whole training of so many steps: compilation, once a program, and steps. About ten minutes on two cores.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import transformers
import tyro

from peftjax import hub
from peftjax.devices import keep_memory
from peftjax.hub import Model
from peftjax.problem import loss_of
from peftjax.run import entries_for
from peftjax.together import alike, share, side_by_side, stack
from peftjax.train import Settings, make_optimizer, make_step, start

OUT = Path(__file__).parents[1] / "experiments/results/together"
# BERT-base has 12 layers of width 768; these are half of the width and a third of the layers.
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
BERT: dict[str, Any] = dict(zip(SIZES, (384, 4, 6, 1536), strict=True))
BASE: dict[str, Any] = {}
TINIEST: dict[str, Any] = dict(zip(SIZES, (64, 4, 4, 172), strict=True))


@dataclasses.dataclass(frozen=True)
class How:
    """Times several seeds in one program.

    Attributes:
      cases: model, rows of a batch, tokens of a row.
      methods: as on the command line of peftjax.
      seeds: how many.
      steps: of the whole training that is reckoned.
      repeats: of each timing.
      allocator: 'kept': the process keeps the memory it frees, as the command line's does; 'default': glibc's.
      base: BERT-base itself, too, at 32 x 128 tokens (for a GPU).
    """

    cases: tuple[str, ...] = ("llama-64 4x32", "tiny-books 16x88", "bert-384 8x64")
    methods: tuple[str, ...] = ("lora", "bitfit", "full")
    seeds: int = 8
    steps: int = 228
    repeats: int = 9
    allocator: Literal["kept", "default"] = "kept"
    base: bool = False
    out: Path = OUT


def main(how: How) -> None:
    if how.allocator == "kept":
        keep_memory()
    how.out.mkdir(parents=True, exist_ok=True)
    cases = [*how.cases, *(["bert-base 32x128"] if how.base else [])]
    records = [measure(case, method, how) for case in cases for method in how.methods]
    end = "" if how.allocator == "kept" else f"-{how.allocator}"
    (how.out / f"results{end}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (how.out / f"report{end}.md").write_text(report(records, how))
    print(table(records))


def model_of(name: str) -> Model:
    """A model with random weights, but for tiny-books."""
    if name == "tiny-books":
        return hub.load(name, "generation")
    if name == "llama-64":
        return hub.from_config(transformers.LlamaConfig(vocab_size=512, **TINIEST), "generation")
    sizes = BERT if name == "bert-384" else BASE
    return hub.from_config(transformers.BertConfig(**sizes), "classification", labels=2)


def batch_of(model: Model, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, model.config.vocab_size, (rows, length)).astype(np.int32)
    ones = np.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": ones, "weight": np.ones(rows, np.float32)}
    if model.module.head == "classification":
        return batch | {"type_ids": ones - 1, "labels": rng.integers(0, 2, rows).astype(np.int32)}
    return batch | {"loss_mask": ones}


def measure(case: str, name: str, how: How) -> dict[str, Any]:
    """The timings of one model and method, in seconds."""
    at, _, shape = case.partition(" ")
    rows, length = map(int, shape.split("x"))
    model, n = model_of(at), how.seeds
    (entry,) = entries_for(name, model)
    m, settings = entry.method, Settings(batch_size=rows, steps=10**6)
    tx = make_optimizer(settings, 10**6, m)
    kind = "classification" if model.module.head == "classification" else "generation"
    inner = make_step(loss_of(model, kind), m, tx)
    keys = [jax.random.key(i) for i in range(n)]
    batches = [batch_of(model, rows, length, i) for i in range(n)]
    params = alike([m.init(key, model.params, model.sites) for key in keys])
    seconds: dict[str, float] = {}

    def begin() -> tuple[list, list]:
        begun = [start(m, p, tx) for p in params]
        return [s for s, _ in begun], [f for _, f in begun]

    def step_of(whole: Callable) -> Callable:
        return lambda state, frozen, batch, key: inner(state, whole(frozen), batch, key)

    def compiled(way: str, step: Callable, *arguments: Any) -> Any:
        began = time.perf_counter()
        made = jax.jit(step, donate_argnums=0).lower(*arguments).compile()
        seconds[way] = time.perf_counter() - began
        return made

    alone, frozen = begin()
    arrays, whole = [share([f])[0] for f in frozen], share(frozen[:1])[2]
    single = compiled("separate", step_of(whole), alone[0], arrays[0], batches[0], keys[0])

    def separate() -> None:
        for i in range(n):
            alone[i], metrics = single(alone[i], arrays[i], batches[i], keys[i])
        jax.block_until_ready(metrics)

    ways: dict[str, Callable[[], None]] = {"separate": separate}
    side = {k: np.stack([b[k] for b in batches]) for k in batches[0]}
    for lanes in (1, n):
        states, frozen = begin()
        shared, axes, again = share(frozen)
        held = {"state": stack(states)}
        arguments = (held["state"], shared, side, stack(keys))
        run = compiled(f"lanes {lanes}", side_by_side(step_of(again), n, lanes, axes, False), *arguments)

        def together(run=run, held=held, rest=arguments[1:]) -> None:
            held["state"], metrics = run(held["state"], *rest)
            jax.block_until_ready(metrics)

        ways[f"lanes {lanes}"] = together
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(how.repeats + 1):
        for way, run in ways.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first is to warm up
                times[way].append(time.perf_counter() - began)
    steps = {way: statistics.median(t) for way, t in times.items()}
    ratios = {way: statistics.median(a / b for a, b in zip(times[way], times["separate"], strict=True)) for way in ways}
    compiles = {way: seconds[way] * (n if way == "separate" else 1) for way in ways}
    wholes = {way: compiles[way] + how.steps * steps[way] for way in ways}
    record = {"case": case, "method": name, "seeds": n, "step": steps, "ratio": ratios, "compile": compiles}
    record |= {"whole": wholes, "load": os.getloadavg()[0], "jax": jax.__version__, "device": device()}
    print(json.dumps(record), flush=True)
    return record


def device() -> str:
    d = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if d.platform == "cpu" else d.device_kind


def table(records: list[dict[str, Any]]) -> str:
    ways = [*records[0]["step"]]
    others = ways[1:]
    head = ["model and batch", "method", *(f"{w}, ms" for w in ways), *(f"{w}, ratio" for w in others)]
    head += [f"{w}, whole" for w in others]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for r in records:
        cells = [r["case"], r["method"], *(f"{1e3 * r['step'][w]:,.0f}" for w in ways)]
        cells += [f"{r['ratio'][w]:.2f}" for w in others]
        cells += [f"{r['whole'][w] / r['whole']['separate']:.2f}" for w in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def report(records: list[dict[str, Any]], how: How) -> str:
    first, loads = records[0], [r["load"] for r in records]
    flag = "" if how.allocator == "kept" else f" --allocator {how.allocator}"
    return "\n".join(
        [
            f"# {how.seeds} seeds in one program",
            "",
            f"- a step of all {how.seeds} seeds, each with its own batch; medians of {how.repeats} that took turns",
            "- ratio: to the separate steps, below 1 is faster; median of the ratios of neighbouring timings",
            f"- whole: a training of {how.steps} steps with its compilation, which separate runs do {how.seeds} times",
            f"- jax {first['jax']}, {first['device']}, load of the machine {min(loads):.1f} to {max(loads):.1f}",
            f"- command: `python experiments/together.py{flag}`",
            "",
            table(records),
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(How))
