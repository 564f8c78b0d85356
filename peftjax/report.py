"""What a comparison leaves to read: a table, `results.jsonl`, `report.md`, `pareto.png`, `curves.png`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .checkpoint import write_atomically

ONLY_IN_FILES = ("rate", "compiled", "share")  # columns that a narrow terminal has no room for


def summarise(results: Sequence[dict]) -> list[dict]:
    """One row a method: mean and standard deviation (n - 1) over its seeds, in order of first appearance."""
    rows = []
    for name in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == name]
        first = runs[0]
        row = {k: first[k] for k in ("method", "trainable", "share", "adapter_bytes", "compilations", "note")}
        row |= {k: statistics.fmean(r[k] for r in runs) for k in ("peak_bytes", "step_seconds", "seconds")}
        scores = {m: [r["scores"][m] for r in runs] for m in first["scores"]}
        row["scores"] = {m: statistics.fmean(v) for m, v in scores.items()}
        row["spread"] = {m: statistics.stdev(v) if len(v) > 1 else None for m, v in scores.items()}
        row["seeds"] = [r["seed"] for r in runs]
        row["rate"] = first["config"]["settings"]["learning_rate"]
        rows.append(row)
    return rows


def cells(row: dict) -> dict[str, str]:
    """The row as text, by column; megabytes and kilobytes are powers of ten."""
    out = {
        "method": row["method"] + (" *" if row["note"] else ""),
        "trainable": f"{row['trainable']:,}",
        "share": f"{100 * row['share']:.3f}%",
    }
    for metric, value in row["scores"].items():
        digits = 3 if metric == "loss" else 2
        spread = row["spread"][metric]
        out[metric] = f"{value:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")
    return out | {
        "peak MB": f"{row['peak_bytes'] / 1e6:,.0f}",
        "step ms": f"{1e3 * row['step_seconds']:,.0f}",
        "file kB": f"{row['adapter_bytes'] / 1e3:,.1f}",
        "compiled": str(row["compilations"]),
        "rate": f"{row['rate']:.1e}",
        "seconds": f"{row['seconds']:,.0f}",
    }


def table(rows: Sequence[dict], title: str) -> Table:
    """The comparison as a rich table."""
    lines = [{k: v for k, v in cells(r).items() if k not in ONLY_IN_FILES} for r in rows]
    compiled = max(r["compilations"] for r in rows)
    out = Table(
        title=title,
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        caption=f"training steps compiled for each method: at most {compiled}",
    )
    for column in lines[0]:
        name = column == "method"
        out.add_column(column, justify="left" if name else "right", no_wrap=not name, overflow="fold")
    for line in lines:
        out.add_row(*map(Text, line.values()))  # not markup: methods may hold brackets
    return out


def markdown(rows: Sequence[dict], results: Sequence[dict], title: str, facts: Sequence[str]) -> str:
    """The report: facts, table, notes, pictures, samples."""
    lines = [cells(r) for r in rows]
    head = list(lines[0])
    out = [f"# {title}", "", *(f"- {fact}" for fact in facts), ""]
    out += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    out += ["| " + " | ".join(line.values()) + " |" for line in lines]
    seeds = rows[0]["seeds"]
    out += [
        "",
        f"Scores are {'means ± standard deviations over seeds ' + str(seeds) if len(seeds) > 1 else 'of one seed'}, "
        "of the best evaluation of each run, metrics in percent. Share: of the base and what was added. Peak: "
        "XLA's plan of the compiled training step, arguments and temporaries together. Step: median, without "
        "compilation. Compiled: training steps compiled, one for each length.",
        "",
        *(f"\\* {r['method']}: {r['note']}." for r in rows if r["note"]),
        "",
        "![score by trainable parameters](pareto.png)",
        "",
        "![loss by step](curves.png)",
    ]
    if samples := _samples(results):
        out += ["", "## Samples", "", *samples]
    return "\n".join(out).rstrip() + "\n"


def _samples(results: Sequence[dict]) -> list[str]:
    first = {r["method"]: r for r in reversed(results) if r["samples"]}
    if not first:
        return []
    names = [n for n in dict.fromkeys(r["method"] for r in results) if n in first]
    out = []
    for i, sample in enumerate(first[names[0]]["samples"]):
        out += [f"**{sample['prompt']}**", "", f"- reference: {sample['reference']}"]
        out += [f"- {name}: {first[name]['samples'][i]['output']}" for name in names]
        out.append("")
    return out


def plots(rows: Sequence[dict], results: Sequence[dict], metric: str, title: str, folder: Path) -> None:
    """`pareto.png`: score by trained parameters; `curves.png`: training and evaluation loss by step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colour = {r["method"]: f"C{i % 10}" for i, r in enumerate(rows)}
    fig, ax = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for r in rows:
        ax.errorbar(
            r["trainable"],
            r["scores"][metric],
            yerr=r["spread"][metric],
            marker="o",
            markersize=9,
            capsize=3,
            color=colour[r["method"]],
        )
        ax.annotate(r["method"], (r["trainable"], r["scores"][metric]), xytext=(8, 6), textcoords="offset points")
    ax.set(xscale="log", xlabel="trained parameters", ylabel=metric, title=title)
    ax.margins(x=0.15, y=0.15)
    ax.grid(alpha=0.3)
    fig.savefig(folder / "pareto.png", dpi=150)
    plt.close(fig)

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in colour:
        run = next(r for r in results if r["method"] == name)
        steps = [r for r in run["history"] if "loss" in r]
        evals = [r for r in run["history"] if "eval" in r]
        window = max(1, len(steps) // 40)
        smooth = [statistics.fmean(r["loss"] for r in steps[max(0, i - window) : i + 1]) for i in range(len(steps))]
        left.plot([r["step"] for r in steps], smooth, color=colour[name], label=name)
        right.plot([r["step"] for r in evals], [r["eval"]["loss"] for r in evals], "o-", color=colour[name])
    left.set(xlabel="step", ylabel="training loss (running mean)", title=title)
    right.set(xlabel="step", ylabel="evaluation loss")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend()
    fig.savefig(folder / "curves.png", dpi=150)
    plt.close(fig)


def write(results: Sequence[dict], metric: str, title: str, facts: Sequence[str], folder: str | Path) -> Table:
    """Writes all files of a comparison into the folder and returns the table to print."""
    folder = Path(folder)
    rows = summarise(results)
    write_atomically(folder / "results.jsonl", "".join(json.dumps(_without_history(r)) + "\n" for r in results))
    write_atomically(folder / "report.md", markdown(rows, results, title, facts))
    plots(rows, results, metric, title, folder)
    return table(rows, title)


def _without_history(result: dict) -> dict:
    return {k: v for k, v in result.items() if k != "history"}
