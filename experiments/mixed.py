"""What a batch of mixed adapters costs, against a loop over the adapters and against one adapter for all rows.

    python experiments/mixed.py

writes `experiments/results/mixed/` (`results.json`, `report.md`). Forward, generation and training step are timed for
1 to 16 adapters of LoRA on the same rows, in three ways that take turns in one process:

- mixed: one batch, every row with its own adapter;
- loop: a batch for each adapter with its rows only, one after another, the compiled function called for each;
- single: one batch, one adapter for all rows, which no mixing could beat.

Expected: forward and generation of a mixed batch take 1.1 to 1.5 times those of one adapter, whatever the number of
adapters, and the loop grows with it. On a CPU, where a quarter of the rows takes nearly a quarter of the time, the loop
is the faster one for few adapters: mixed wins in generation from 8 on, by 1.2 to 1.6. Training is near the loop.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import transformers
import tyro

from peftjax import combine, hub, mix, partition, per_adapter
from peftjax.generate import Decoding, decoder
from peftjax.hub import Model
from peftjax.methods import METHODS

OUT = Path(__file__).parents[1] / "experiments/results/mixed"
# GPT-2 small has 12 layers of width 768; these are the width of a third and a quarter of the layers.
SMALL_GPT2: dict[str, Any] = {"n_embd": 256, "n_layer": 3, "n_head": 4, "vocab_size": 4096, "n_positions": 256}
WAYS = ("mixed", "loop", "single")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times mixed batches."""

    models: tuple[str, ...] = ("tiny-books", "gpt2-like")  # or folders, or hub names
    method: str = "lora"
    rank: int = 8
    adapters: tuple[int, ...] = (1, 2, 4, 8, 16)
    rows: int = 16
    length: int = 64  # of a text to train on; half of it is a prompt
    new_tokens: int = 16
    repeats: int = 15
    out: Path = OUT


def main(settings: Settings) -> None:
    records = []
    for name in settings.models:
        model = load(name)
        for k in settings.adapters:
            for what, functions in tasks(model, k, settings).items():
                seconds = take_turns(functions, settings.repeats)
                records.append({"model": name, "adapters": k, "what": what, "seconds": seconds})
                print(say(records[-1]), flush=True)
                write(settings, records)  # partial results stay


def load(name: str) -> Model:
    if name == "gpt2-like":
        return hub.from_config(transformers.GPT2Config(**SMALL_GPT2, bos_token_id=0, eos_token_id=0), "causal-lm")
    return hub.load(name, "causal-lm")


def tasks(model: Model, k: int, s: Settings) -> dict[str, dict[str, Callable[[], Any]]]:
    """What is timed -> way -> a call that does it for all rows."""
    if s.rows % k:
        raise ValueError(f"{s.rows} rows do not divide among {k} adapters")
    method = METHODS[s.method](rank=s.rank, targets=["linear"])
    trees = [method.init(jax.random.key(i), model.params, model.sites) for i in range(k)]
    mixed, params = mix(model, trees, method)
    ids = np.arange(s.rows) % k  # neighbours differ
    params = mixed.bind(params, ids)
    tokens = np.random.default_rng(0).integers(4, model.config.vocab_size, (s.rows, s.length)).astype(np.int32)
    own = [np.flatnonzero(ids == i) for i in range(k)]

    def ways(run_mixed, run_one, width):
        """Of functions of (adapter number or None, tokens): a number for one adapter, with its rows."""
        x = tokens[:, :width]
        parts = [x[rows] for rows in own]
        return {
            "mixed": lambda: run_mixed(x),
            "loop": lambda: [run_one(i, part) for i, part in enumerate(parts)],
            "single": lambda: run_one(0, x),
        }

    @jax.jit
    def forward_mixed(params, x):
        return mixed.forward(params, {"input_ids": x}).logits

    @jax.jit
    def forward_one(tree, x):
        return model.forward(tree, {"input_ids": x}).logits

    how = Decoding(max_new_tokens=s.new_tokens)
    decode_mixed, decode_one = decoder(mixed, how), decoder(model, how)
    step_mixed, step_one = trainers(mixed, params, method, trees)
    return {
        "forward": ways(lambda x: forward_mixed(params, x), lambda i, x: forward_one(trees[i], x), s.length),
        "generation": ways(
            lambda x: decode_mixed(params, x, np.ones_like(x)),
            lambda i, x: decode_one(trees[i], x, np.ones_like(x)),
            s.length // 2,
        ),
        "training step": ways(step_mixed, step_one, s.length),
    }


def trainers(mixed, params, method, trees) -> tuple[Callable, Callable]:
    """A step of AdamW on all adapters at once, and on one of them. Both start from the same state each time."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

    def objective(params, batch, key):
        logits = mixed.model.forward(params, batch, key).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
        return each.sum(), each.size

    def step_of(loss, tx):
        @jax.jit
        def step(trainable, state, frozen, x):
            grads = jax.grad(lambda t: loss(combine(t, frozen), {"input_ids": x}))(trainable)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state

        return step

    def mean(params, batch):
        total, weight = objective(params, batch, None)
        return total / weight

    together, losses = per_adapter(tx), mixed.losses(objective)
    step_mixed, step_one = step_of(lambda p, b: losses(p, b).sum(), together), step_of(mean, tx)
    all_trainable, all_frozen = partition(params, mixed.trainable(params))
    halves = [partition(tree, method.trainable(tree)) for tree in trees]
    all_state, states = together.init(all_trainable), [tx.init(trainable) for trainable, _ in halves]
    return (
        lambda x: step_mixed(all_trainable, all_state, all_frozen, x),
        lambda i, x: step_one(halves[i][0], states[i], halves[i][1], x),
    )


def take_turns(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Seconds of each in every turn, the ways one after another; the first turn compiles and does not count."""
    seconds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, f in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(f())
            if turn:
                seconds[name].append(round(time.perf_counter() - start, 5))
    return seconds


def say(record: dict) -> str:
    """A line of the table; ratios are medians over turns, which what else the machine does moves less than times."""
    s = record["seconds"]

    def ratio(a, b):
        return f"{statistics.median(x / y for x, y in zip(s[a], s[b], strict=True)):.2f}"

    ms = " | ".join(f"{1000 * statistics.median(s[way]):.1f}" for way in WAYS)
    columns = [
        record["model"],
        record["what"],
        record["adapters"],
        ms,
        ratio("loop", "mixed"),
        ratio("mixed", "single"),
    ]
    return f"| {' | '.join(map(str, columns))} |"


def write(settings: Settings, records: list[dict]) -> None:
    device = jax.devices()[0]
    facts = {
        "jax": jax.__version__,
        "device": f"{device.device_kind} ({os.cpu_count()} cores)" if device.platform == "cpu" else device.device_kind,
        "load": round(os.getloadavg()[1], 1),
        "settings": json.loads(json.dumps(dataclasses.asdict(settings) | {"out": None}, default=str)),
    }
    settings.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "results.json").write_text(json.dumps({**facts, "records": records}, indent=1) + "\n")
    s = settings
    text = [
        "# Mixed-adapter batches: time",
        f"{s.method}, rank {s.rank}, on all linear weights; {s.rows} rows of {s.length} tokens (generation: prompts of "
        f"{s.length // 2}, {s.new_tokens} new tokens). Medians of {s.repeats} turns, the three ways one after another "
        f"in each; ratios are medians of each turn's. jax {facts['jax']}, {facts['device']}, shared with other "
        f"programs: a load of {facts['load']} in the end.",
        "`loop / mixed` is how much faster the mixed batch is than a loop over the adapters with each one's rows; "
        "`mixed / single` is the price of mixing, against one adapter for the same rows.",
    ]
    order = sorted(records, key=lambda r: (settings.models.index(r["model"]), r["what"], r["adapters"]))
    table = ["| model | what | adapters | mixed ms | loop ms | single ms | loop / mixed | mixed / single |"]
    table += ["|---|---|---:|---:|---:|---:|---:|---:|", *map(say, order)]
    (settings.out / "report.md").write_text("\n\n".join([*text, "\n".join(table)]) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
