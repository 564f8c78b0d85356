"""A sweep that is killed (SIGKILL) at twenty random moments, against one that nobody disturbs.

    python experiments/killed_sweep.py

writes `experiments/results/killed-sweep/` (`results.jsonl`, `report.md`). The sweep has searches for the learning rate,
seeds that train in one program, a method that cannot be built and one that diverges. By turns one process works on it
and two share its folder, of which either is killed. In the end there must be one record for each configuration, with
the scores of the undisturbed sweep; anything else is an error. About fifteen minutes on two cores.
"""

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import tyro

from peftjax import grid as grids, hub
from peftjax.checkpoint import read_header
from peftjax.grid import Grid, Rule, Search
from peftjax.sweep import device, versions

OUT = Path(__file__).parents[1] / "experiments/results/killed-sweep"
CLOSE = 1e-3  # relative, of a loss: a run alone and in a program are equal but for rounding


@dataclasses.dataclass(frozen=True)
class How:
    """Kills a sweep again and again.

    Attributes:
      kills: how many.
      seed: of the moments, and of which process it is.
      moments: seconds after which a process is killed, from and to.
      steps: of each run: so many that the sweep outlives the kills.
      out: where the report goes.
    """

    kills: int = 20
    seed: int = 0
    moments: tuple[float, float] = (4.0, 40.0)
    steps: int = 150
    out: Path = OUT


def main(how: How) -> None:
    with tempfile.TemporaryDirectory() as at:
        grid = whole_grid(Path(at), how.steps)
        seconds = finish(grid, Path(at) / "undisturbed")
        found = disturb(grid, Path(at) / "killed", how)
        facts = {"kind": "end", "seconds": round(seconds, 1), **compare(Path(at) / "killed", Path(at) / "undisturbed")}
    facts |= {"versions": versions(), "device": device()}
    how.out.mkdir(parents=True, exist_ok=True)
    (how.out / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*found, facts]))
    (how.out / "report.md").write_text(report(found, facts, how))
    print((how.out / "report.md").read_text())


# The sweep


def whole_grid(at: Path, steps: int) -> Path:
    """A search and three seeds of two methods, and two methods that fail: eighteen configurations."""
    broken = "ia3(targets=['nothing'])"
    return write(
        at,
        methods=("lora(rank=2)", "bitfit", "full", broken),
        seeds=3,
        search=Search(factors=(0.02, 0.1, 0.3)),
        settings={"steps": steps, "batch_size": 8, "eval_every": steps // 6, "save_every": max(1, steps // 30)},
        rules=(
            Rule(settings={"learning_rate": 1e30}, methods=("full",)),
            Rule(settings={"learning_rate": 1e-3}, methods=(broken,)),
        ),
    )


def write(at: Path, **grid: Any) -> Path:
    """A grid on a decoder 16 wide and a task of telling good from bad, as a file."""
    tokenizer = hub.load_tokenizer("tiny-books")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    model = hub.from_config(config, "generation")
    hub.save(model, model.params, at / "model", tokenizer)
    (at / "data").mkdir()
    for i, (name, n) in enumerate((("train", 64), ("dev", 32))):
        (at / "data" / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows(i, n)))
    options = {"max_buckets": 1, "max_length": 16}
    made = Grid(models={"tiny": str(at / "model")}, tasks={"sst2": str(at / "data")}, options=options, **grid)
    file = at / "grid.yaml"
    file.write_text(json.dumps(grids.to_json(made)))  # which is YAML, too
    return file


def rows(seed: int, n: int) -> list[dict]:
    rng, words = np.random.default_rng(seed), ["the", "cat", "dog", "sat", "ran", "red", "big"]
    labels = rng.integers(2, size=n).tolist()
    texts = [[*rng.choice(words, 4), ("bad", "good")[label]] for label in labels]
    return [{"sentence": " ".join(rng.permutation(t)), "label": x} for t, x in zip(texts, labels, strict=True)]


def start(grid: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = ["nice", "-n", "5", sys.executable, "-m", "peftjax", "sweep", str(grid), "--out", str(out)]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def finish(grid: Path, out: Path) -> float:
    """Runs the sweep to its end; the seconds.

    Raises:
      RuntimeError: it has not ended well, with the end of what it said.
    """
    began = time.monotonic()
    if (status := start(grid, out).wait()) != 0:
        raise RuntimeError(f"the sweep ended with {status}: {out.with_suffix('.log').read_text()[-2000:]}")
    return time.monotonic() - began


def lines(out: Path) -> list[dict]:
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] in ("run", "failed")]


# The kills


def disturb(grid: Path, out: Path, how: How) -> list[dict]:
    """Kills the sweep, a process at a time, and then runs it to its end; what each kill met.

    Odd kills meet one process, even ones two, of which the other lives on until the kill after that.
    """
    rng, found, alive = random.Random(how.seed), [], []
    for number in range(1, how.kills + 1):
        while len(alive) < 2 - number % 2:
            alive.append((start(grid, out), time.monotonic()))
        time.sleep(rng.uniform(*how.moments))
        process, began = alive.pop(rng.randrange(len(alive)))
        ended = process.poll()
        process.kill()
        process.wait()
        if ended not in (None, 0):
            raise RuntimeError(f"the sweep ended with {ended}: {out.with_suffix('.log').read_text()[-2000:]}")
        lived = {"lived": round(time.monotonic() - began, 1), "others": len(alive), "was_over": ended == 0}
        found.append({"kind": "kill", "number": number, **lived, **state(out)})
    for process, _ in alive:
        process.wait()
    finish(grid, out)
    return found


def state(out: Path) -> dict:
    """What a killed sweep leaves: how many records, and the last step in the logs of the runs without one."""
    runs = out / "runs"
    done = {f.parent.name for f in runs.glob("*/record.json")}
    logs = {f.parent.name: f.read_bytes().count(b'"loss": ') for f in runs.glob("*/log.jsonl")}
    return {
        "records": len(done),
        "begun": {key: n for key, n in sorted(logs.items()) if key not in done and n},
        "states": len([*runs.glob("*/state"), *runs.glob("together-*")]),
        "claims": len([*(out / "claims").glob("*.[0-9]*")]),
    }


# The end


def compare(out: Path, undisturbed: Path) -> dict:
    """What holds of the killed sweep against the undisturbed one; the largest difference of a loss.

    Raises:
      ValueError: something does not hold.
    """
    found, want = {r["key"]: r for r in lines(out)}, {r["key"]: r for r in lines(undisturbed)}
    files = [json.loads(f.read_text()) for f in (out / "runs").glob("*/record.json")]
    same: dict[str, Callable[[str], bool]] = {
        "kinds": lambda k: found[k]["kind"] == want[k]["kind"],
        "errors": lambda k: said(found[k]) == said(want[k]),
        "trained parameters": lambda k: found[k].get("trainable") == want[k].get("trainable"),
        "rates": lambda k: found[k]["rate"] == want[k]["rate"],
        "scores": lambda k: close(found[k].get("scores", {}), want[k].get("scores", {})),
        "steps in the logs": lambda k: steps(out, k) == steps(undisturbed, k),
    }
    held = {
        "one record for each configuration": sorted(r["key"] for r in lines(out)) == sorted(want),
        "one file for each record": sorted(r["key"] for r in files) == sorted(want),
        "an adapter for each run": all(
            read_header(out / "runs" / k / "adapter.safetensors") for k, r in found.items() if r["kind"] == "run"
        ),
        **{f"equal {name}": found.keys() == want.keys() and all(map(check, want)) for name, check in same.items()},
    }
    if wrong := [name for name, holds in held.items() if not holds]:
        kept = shutil.copytree(out, tempfile.mkdtemp(prefix="killed-sweep-"), dirs_exist_ok=True)
        raise ValueError(f"does not hold: {', '.join(wrong)}; the folder is kept in {kept}")
    both = [(found[k]["scores"], want[k]["scores"]) for k in want if want[k]["kind"] == "run"]
    return {
        "held": [*held],
        "runs": len(both),
        "failed": len(want) - len(both),
        "largest_difference": max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in both),
        "equal_to_the_bit": sum(a == b for a, b in both),
        "left": ", ".join(f"{v} {k}" for k, v in state(out).items() if k in ("states", "claims")),
    }


def steps(out: Path, key: str) -> list[int]:
    """The steps in a run's log, in its order."""
    file = out / "runs" / key / "log.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [r["step"] for r in records if "loss" in r]


def said(record: dict) -> str:
    """The error, without what rounding may change."""
    return record.get("error", "").partition(";")[0]


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=CLOSE, abs_tol=1e-9) for k in b)


def report(found: list[dict], facts: dict, how: How) -> str:
    rows = []
    for r in found:
        begun = ", ".join(f"{key[:4]} at {n}" for key, n in r["begun"].items()) or "-"
        met = "the sweep was over" if r["was_over"] else begun
        cells = (r["number"], r["lived"], r["others"] + 1, r["records"], met, r["states"], r["claims"])
        rows.append(f"| {' | '.join(map(str, cells))} |")
    over = sum(r["was_over"] for r in found)
    d = facts["device"]
    return "\n".join(
        [
            "# A sweep killed at random moments",
            "",
            f"`python experiments/killed_sweep.py --seed {how.seed}`: {facts['runs'] + facts['failed']} configurations "
            f"({facts['failed']} of them fail), {how.steps} steps each; undisturbed {facts['seconds']:.0f} s on "
            f"{d['cores']} cores beside other work (jax {facts['versions']['jax']}). Of {len(found)} kills, {over} "
            "came when the sweep was over.",
            "",
            "It then ran to its end, and these held, against an undisturbed sweep: " + ", ".join(facts["held"]) + ".",
            f"Of {facts['runs']} runs, {facts['equal_to_the_bit']} have the very same scores; the largest difference "
            f"of a loss is {facts['largest_difference']:.1e} of it (a run in a program with others, and without, is "
            "equal but for rounding).",
            f"Left over, and in nobody's way: {facts['left']}.",
            "",
            "What each kill met: steps are those in the logs of the runs that had no record yet; folders of states "
            "count a program's own and the one within it.",
            "",
            "| kill | lived, s | processes | records | runs begun | folders of states | claims |",
            "|--:|--:|--:|--:|---|--:|--:|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    main(tyro.cli(How, description=(__doc__ or "").partition("\n")[0]))
