"""What the training loop costs beside the bare jitted step: `fit` with its log, saved states and progress bar.

    python experiments/overhead.py

writes into `experiments/results/overhead/` a line a chunk (`results.jsonl`) and tables (`report.md`). Both run the same
step on the same batches in one process, 25 steps in turns, so that other work on the machine slows both. The bare
loop has its batches built beforehand, keeps nothing, and waits for the device at the end of its 25 steps only.
Expected: below 3% at steps of 50 ms, a state saved every 200 steps included.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import transformers
from rich.console import Console

from peftjax import data, hub
from peftjax.checkpoint import StateFolder
from peftjax.hub import Model
from peftjax.loop import fit
from peftjax.methods import METHODS, Method
from peftjax.problem import loss_of
from peftjax.progress import watch
from peftjax.train import Settings, make_optimizer, make_step, start
from peftjax.tree import Tree

OUT = Path(__file__).parent / "results/overhead"
CHUNK, SKIPPED, CHUNKS = 25, 3, 8  # steps that count, and that do not after a pause; 200 count, one of which saves


class Case(NamedTuple):
    """One row of the table.

    Attributes:
      texts: whose lengths are drawn: a log-normal distribution of this `mean`, `deviation`, and `range`, in tokens.
      config: of a model of random weights.
      rows: of a batch.
      method: a name of `METHODS`.
    """

    texts: str
    mean: int
    deviation: int
    range: tuple[int, int]
    config: Any
    rows: int
    method: str = "lora"

    @property
    def kind(self) -> str:
        return "classification" if self.config.model_type == "bert" else "generation"

    @property
    def model(self) -> str:
        return f"{self.config.model_type} {self.config.num_hidden_layers}x{self.config.hidden_size}"


def llama(width: int, layers: int) -> Any:
    return transformers.LlamaConfig(
        vocab_size=1920,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )


def bert(width: int) -> Any:
    """Of as many arrays as BERT-base."""
    return transformers.BertConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=12, num_attention_heads=4
    )


PLACES, E2E, RTE = ("places", 67, 7, (48, 88)), ("E2E", 70, 12, (32, 112)), ("RTE", 84, 50, (24, 256))
CASES = (
    Case(*PLACES, llama(64, 2), 1),
    Case(*PLACES, llama(128, 4), 2),
    Case(*E2E, llama(128, 4), 6),
    Case(*RTE, bert(32), 2),
)


class Side(NamedTuple):
    """What both sides of a case share."""

    model: Model
    params: Tree
    method: Method
    settings: Settings
    compiles: int  # steps at the beginning
    per_epoch: int
    epoch: Callable[[int], Iterator[dict]]


def prepare(case: Case) -> Side:
    rng = np.random.default_rng(0)
    spread = np.sqrt(np.log1p((case.deviation / case.mean) ** 2))
    drawn = np.exp(rng.normal(np.log(case.mean) - spread**2 / 2, spread, 240 * case.rows)).astype(int)
    texts = []
    for i, n in enumerate(drawn.clip(*case.range).tolist()):
        ids = rng.integers(3, case.config.vocab_size, n).tolist()
        if case.kind == "classification":
            texts.append(data.Example(ids, label=i % 2, type_ids=[0] * n))
        else:
            texts.append(data.Example(ids, loss_mask=[0] * (n // 2) + [1] * (n - n // 2)))
    buckets = data.bucket_lengths([len(e.input_ids) for e in texts])
    planned = data.plan(texts, case.rows, buckets, shuffle_seed=0)
    each = list({one.length: one for one in planned}.values())

    def epoch(number: int) -> Iterator[dict]:  # it begins with one batch of each length, to compile
        return (data.make_batch(texts, one, case.rows, pad_id=0) for one in [*each, *planned])

    model = hub.from_config(case.config, case.kind, seed=0)
    method = METHODS[case.method]()
    params = method.init(jax.random.key(0), model.params, model.sites)
    steps = len(each) + CHUNKS * (CHUNK + SKIPPED)
    settings = Settings(steps=steps, batch_size=case.rows, learning_rate=1e-4)
    return Side(model, params, method, settings, len(each), len(each) + len(planned), epoch)


def bare(side: Side, kind: str) -> Callable[[list[dict]], float]:
    """A function of batches that gives the seconds of their steps."""
    tx = make_optimizer(side.settings, side.settings.steps or 0, side.method)
    step = jax.jit(make_step(loss_of(side.model, kind), side.method, tx), donate_argnums=0)
    state, frozen = start(side.method, side.params, tx)
    key = jax.random.key(0)

    def run(batches: list[dict]) -> float:
        nonlocal state
        began = time.perf_counter()
        for batch in batches:
            state, _ = step(state, frozen, batch, key)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    return run


def measure(case: Case, turns: int) -> Iterator[dict]:
    """A record a chunk: seconds of CHUNK steps of `fit`, and of as many bare ones right after them.

    The bare ones run in `fit`'s report, when the step in flight has ended.
    """
    side = prepare(case)
    run = bare(side, case.kind)
    walked = [b for number in range(-(-(side.settings.steps or 0) // side.per_epoch)) for b in side.epoch(number)]
    run(walked[: side.compiles])
    facts = {"texts": case.texts, "model": case.model, "method": case.method, "rows": case.rows}
    facts["load"] = round(os.getloadavg()[0], 1)
    tx = make_optimizer(side.settings, side.settings.steps or 0, side.method)
    facts["arrays"] = len(jax.tree.leaves(start(side.method, side.params, tx)))
    for turn in range(turns):
        for record in alternate(case, side, run, walked):
            yield {**facts, "turn": turn, **record}


def alternate(case: Case, side: Side, run: Callable[[list[dict]], float], walked: list[dict]) -> list[dict]:
    """Seconds of CHUNK steps of one `fit` and of as many bare ones, again and again."""
    found: list[dict] = []
    began = 0.0
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as out,
        watch(Console(file=out, force_terminal=True, width=120), case.texts) as show,
    ):

        def report(record: dict) -> None:
            nonlocal began
            show(record)
            at, now = record["step"] - side.compiles, time.perf_counter()
            if at > 0 and at % (CHUNK + SKIPPED) == 0:
                time.sleep(4 * (now - began) / CHUNK)  # the steps in flight
                found.append({"fit": now - began, "bare": run(walked[record["step"] - CHUNK : record["step"]])})
            elif at % (CHUNK + SKIPPED) == SKIPPED:
                began = now

        objective = loss_of(side.model, case.kind)
        more: Any = {"folder": folder, "report": report}
        fit(side.params, side.method, objective, side.epoch, side.per_epoch, side.settings, **more)
    return found


def pieces(case: Case) -> dict[str, float]:
    """Milliseconds of what the loop does for each step, and of saving a state."""
    side = prepare(case)
    tx = make_optimizer(side.settings, side.settings.steps or 0, side.method)
    step = jax.jit(make_step(loss_of(side.model, case.kind), side.method, tx), donate_argnums=0)
    state, frozen = start(side.method, side.params, tx)
    batch, key = next(side.epoch(0)), jax.random.key(0)
    dispatch = []
    for _ in range(30):
        began = time.perf_counter()
        state, metrics = step(state, frozen, batch, key)
        dispatch.append(time.perf_counter() - began)
        jax.block_until_ready(state)
    found = {"dispatch": median(dispatch)}
    found["two numbers read"] = timed(lambda: [float(x) for x in metrics.values()], 50)
    found["a batch built"] = timed(lambda: list(side.epoch(0)), 5) / len(list(side.epoch(0)))
    with tempfile.TemporaryDirectory() as folder:
        line = json.dumps({"step": 1, "loss": 1.234567, "grad_norm": 0.1234})
        file = Path(folder) / "log.jsonl"
        found["a line logged"] = timed(lambda: _append(file, line), 50)
        with closing(StateFolder(Path(folder) / "state")) as states:
            each = iter(range(100))
            found["a state to disk"] = timed(lambda: states.save(next(each), (state, state.trainable), {}), 5)
    shown = []
    with open(os.devnull, "w") as out, watch(Console(file=out, force_terminal=True, width=120), "") as show:
        record = {"step": 1, "loss": 1.0, "tokens": 100, "time_left": 1.0, "total": 9}
        for _ in range(100):
            began = time.perf_counter()
            show(record)
            shown.append(time.perf_counter() - began)
            time.sleep(0.005)
    return {**found, "progress": median(shown)}


def _append(file: Path, line: str) -> None:
    with file.open("a") as f:
        f.write(line + "\n")


def median(seconds: list[float]) -> float:
    return 1000 * float(np.median(seconds))


def timed(call: Callable[[], Any], times: int) -> float:
    """Median milliseconds; the first call does not count."""
    call()
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return median(taken)


def table(records: list[dict], costs: list[dict]) -> str:
    """Both tables in Markdown."""
    names = ("texts", "model", "method", "rows", "arrays", "load")
    rows = []
    for key in dict.fromkeys(tuple(r[n] for n in names) for r in records):
        mine = [r for r in records if tuple(r[n] for n in names) == key]
        whole = [
            sum(r["fit"] for r in mine if r["turn"] == t) / sum(r["bare"] for r in mine if r["turn"] == t) - 1
            for t in sorted({r["turn"] for r in mine})
        ]
        chunks = [r["fit"] / r["bare"] - 1 for r in mine]
        low, high = np.quantile(chunks, (0.25, 0.75))
        cells = [*map(str, key), *(f"{median([r[n] for r in mine]) / CHUNK:.1f}" for n in ("bare", "fit"))]
        cells += [f"{np.median(chunks):.1%} ({low:.1%} to {high:.1%})"]
        rows.append([*cells, f"{np.median(whole):.1%} ({min(whole):.1%} to {max(whole):.1%})"])
    header = [*names, "bare, ms", "`fit`, ms", "overhead, by chunk", "by 200 steps, one state saved"]
    each = [n for n in costs[0] if n not in names]
    lines = [[c["texts"], c["model"], c["method"], *(f"{c[n]:.3f}" for n in each)] for c in costs]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "orbax-checkpoint"))
    return "\n\n".join(
        [
            "# The training loop beside the bare jitted step",
            f"Made by `python experiments/overhead.py` on {os.cpu_count()} CPU cores ({platform.machine()}), "
            f"{versions}. `fit` logs to a file, feeds a progress bar and saves a state every 200 steps; the bare loop "
            "only steps, on batches built beforehand. Both in one process, 25 steps in turns. The first overhead is "
            "the median of the chunks (quartiles), most of which save nothing; the second of 200 steps (range). The "
            "load average is that of the machine when the case began: beside other programs' work a loop that waits "
            "for a step is woken late.",
            _markdown(header, rows),
            "What the loop does on the host, in ms each (medians). A state is written in a thread, and all else "
            "overlaps the steps that are running, as a step's numbers are read when the next ones are under way.",
            _markdown(["texts", "model", "method", *each], lines),
            "",
        ]
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def main(turns: int, out: Path) -> None:
    records, costs = [], []
    out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        for record in measure(case, turns):
            records.append(record)
            print(json.dumps(record), flush=True)
        costs.append({"texts": case.texts, "model": case.model, "method": case.method, **pieces(case)})
        print(json.dumps(costs[-1]), flush=True)
        (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (*records, *costs)))
        (out / "report.md").write_text(table(records, costs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the training loop costs beside the bare jitted step.")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    main(args.turns, args.out)
