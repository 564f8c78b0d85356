"""What `peftjax report` says of a sweep's lines: statistics, comparison with papers, pictures, the page."""

import json
import math
import random
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy import stats

from peftjax import figures, page, summary

NASTY = 'odd(name="<b>&|$x_1$")'


def line(method="lora(rank=8)", task="cola", seed=0, score=50.0, model="minilm", **changes):
    """A run of the table."""
    headline = {"cola": "matthews", "rte": "accuracy", "sst2": "accuracy", "sft": "loss"}[task]
    stage = changes.get("stage", "final")
    rate = changes.get("rate", 1e-3)
    return {
        "kind": "run",
        "key": f"{model} {task} {method} {seed} {stage} {rate}",
        "stage": stage,
        "model": model,
        "task": task,
        "method": method,
        "seed": seed,
        "rate": rate,
        "headline": headline,
        "scores": {"loss": 0.5, headline: score},
        "trainable": 1000,
        "peak_bytes": 50e6,
        "seconds": 30.0,
        "note": "",
        "history": [],
        "cell": {"method": method, "settings": {"seed": seed, "epochs": 3}, "rate": rate},
        "versions": {"peftjax": "0.1.0", "jax": "0.10.2"},
        "device": {"kind": "cpu", "count": 1, "cores": 2, "name": "Some CPU"},
        "at": "2026-11-30T18:00:00+00:00",
    } | changes


def failure(method="lora(rank=8)", task="cola", seed=0, error="it diverged", **changes):
    made = line(method, task, seed, **changes)
    kept = ("key", "stage", "model", "task", "method", "seed", "rate", "cell", "versions", "device", "at")
    return {"kind": "failed", **{k: made[k] for k in kept}, "error": error, "attempts": 2}


def cell(method, score, task="cola", metric="matthews", model="big", **changes):
    return (
        {"kind": "published", "method": method, "model": model, "task": task, "metric": metric}
        | {
            "score": score,
            "spread": None,
            "trainable": None,
            "source": "Some et al. 2021, table 2",
        }
        | changes
    )


METHODS = {  # trainable, peak MB, seconds, score over the base's
    "full": (22_700_000, 420.0, 60.0, 9.0),
    "head": (770, 80.0, 9.0, 0.0),
    "bitfit": (40_000, 130.0, 30.0, 5.0),
    "fishmask": (110_000, 240.0, 44.0, 6.0),
    "adalora(rank=8)": (150_000, 190.0, 50.0, 7.5),
    "dylora(rank=8)": (149_000, 185.0, 41.0, 6.5),
    **{f"lora(rank={r})": (18_500 * r, 160.0 + r, 36.0, 5.5 + math.log2(r)) for r in (1, 2, 4, 8)},
    NASTY: (9_000, 120.0, 28.0, 3.0),
}
MATRICES = ("query/kernel", "query/bias", "value/kernel", "up/kernel", "down/kernel")


def allocated(method, rng):
    paths = [f"encoder/layer_{i}/{m}" for i in range(6) for m in MATRICES] + ["embeddings/norm/scale"]
    if "adalora" in method:
        paths = [p for p in paths if p.endswith("kernel")]
        return {p: rng.randrange(9) for p in paths}, dict.fromkeys(paths, 147456)
    sizes = {p: 147456 if p.endswith("kernel") else 384 for p in paths}
    return {p: int(rng.random() ** 3 * n) for p, n in sizes.items()}, sizes


def sweep(methods=METHODS, models=("minilm", "stories"), tasks=("cola", "rte", "sst2"), seeds=3):
    """Lines of all kinds: runs, trials, failures, published cells."""
    out = [{"kind": "grid", "title": "GLUE on <small> models", "baseline": "full"}]
    for model in models:
        for task in tasks:
            for method, (trainable, peak, seconds, gain) in methods.items():
                rng = random.Random(f"{model} {task} {method}")
                for rate in (3e-4, 1e-3, 3e-3):
                    out.append(line(method, task, 1000, 40.0, model, stage="search", rate=rate))
                for seed in range(seeds):
                    score = 45 + 10 * (task == "rte") + gain + rng.gauss(0, 1.2)
                    steps = range(5, 190, 5)
                    history = [{"step": s, "loss": 0.7 * math.exp(-s * gain / 900) + rng.gauss(0, 0.02)} for s in steps]
                    more = {}
                    for s in (63, 126, 189):
                        reached = score - 12 * math.exp(-s / 50)
                        metric = "matthews" if task == "cola" else "accuracy"
                        history.append({"step": s, "eval": {"loss": 0.6, metric: reached}})
                    if method in ("fishmask", "adalora(rank=8)"):
                        more["allocation"], more["sizes"] = allocated(method, rng)
                    if method.startswith("dylora"):
                        more["by_rank"] = {str(r): {metric: score - 3 + math.log2(r)} for r in (1, 2, 4, 8)}
                    cost = {"trainable": trainable, "peak_bytes": peak * 1e6, "seconds": seconds + rng.random()}
                    rate = 3e-3 if method == "head" else 1e-3
                    out.append(line(method, task, seed, score, model, history=history, rate=rate, **cost, **more))
    out = [x for x in out if (x.get("method"), x.get("task"), x.get("seed")) != ("bitfit", "rte", 2)]
    out.append(failure(NASTY, "cola", 3, 'a shape was <3, 4> & not "5"', model=models[0]))
    out.append(failure("ia3", "cola", 0, "out of memory", model=models[0]))
    for method, score, trainable in (("full", 63.6, 125e6), ("bitfit", 62.0, 0.1e6), ("lora(rank=8)", 63.4, 0.3e6)):
        out.append(cell(method, score, trainable=trainable, spread=1.2))
        out.append(cell(method, score + 20, "sst2", "accuracy", trainable=trainable, spread=0.2))
    out.append(cell("another's method", 60.1, trainable=0.9e6))
    return out


def written(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder
