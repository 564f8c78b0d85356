"""What a comparison leaves to read: a table, `results.jsonl`, `report.md`, `pareto.png`, `curves.png`."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .checkpoint import write_atomically
from .methods import TABLE

ONLY_IN_FILES = ("rate", "compiled", "share")  # columns that a narrow terminal has no room for


def summarise(results: Sequence[dict]) -> list[dict]:
    """One row a method: mean and standard deviation (n - 1) over its seeds, in order of first appearance."""
    rows = []
    for name in dict.fromkeys(r["method"] for r in results):
        runs = [r for r in results if r["method"] == name]
        first = runs[0]
        row = {k: first[k] for k in ("method", "trainable", "share", "adapter_bytes", "compilations", "note")}
        for k in ("peak_bytes", "step_seconds", "seconds"):
            row[k] = None if first[k] is None else statistics.fmean(r[k] for r in runs)
        scores = {m: [r["scores"][m] for r in runs] for m in first["scores"]}
        row["scores"] = {m: statistics.fmean(v) for m, v in scores.items()}
        row["spread"] = {m: statistics.stdev(v) if len(v) > 1 else None for m, v in scores.items()}
        row["seeds"] = [r["seed"] for r in runs]
        row["rate"] = first["config"]["settings"].get("learning_rate")
        names = [name for name, _ in first["config"]["spec"]]
        row["kind"] = next((TABLE[n].kind for n in names if n in TABLE and n != "head"), "-")
        rows.append(row)
    return rows


def cells(row: dict) -> dict[str, str]:
    """The row as text, by column; megabytes and kilobytes are powers of ten; '-' is what has no meaning there."""

    def said(value, form, factor=1.0):
        return "-" if value is None else format(value * factor, form)

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
        "peak MB": said(row["peak_bytes"], ",.0f", 1e-6),
        "step ms": said(row["step_seconds"], ",.0f", 1e3),
        "file kB": said(row["adapter_bytes"], ",.1f", 1e-3),
        "compiled": said(row["compilations"], "d", 1),
        "rate": said(row["rate"], ".1e"),
        "seconds": said(row["seconds"], ",.0f"),
    }


def table(rows: Sequence[dict], title: str) -> Table:
    """The comparison as a rich table."""
    lines = [{k: v for k, v in cells(r).items() if k not in ONLY_IN_FILES} for r in rows]
    compiled = max(r["compilations"] or 0 for r in rows)
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
    seeds, most = rows[-1]["seeds"], max(r.get("together") or 1 for r in results)
    out += [
        "",
        f"Scores are {'means ± standard deviations over seeds ' + str(seeds) if len(seeds) > 1 else 'of one seed'}, "
        "of the best evaluation of each run, metrics in percent but for nist and cider. Share: of the base and what "
        "was added. Peak: XLA's plan of the compiled training step, arguments and temporaries together"
        + (f", of up to {most} runs in one program, of which step and seconds are a run's share" if most > 1 else "")
        + ". Step: median, without compilation. Compiled: training steps compiled, one for each length.",
        "",
        *(f"\\* {r['method']}: {r['note']}." for r in rows if r["note"]),
        "",
        "![score by trainable parameters](pareto.png)",
        "",
        "![loss by step](curves.png)",
    ]
    for i, (prompt, texts) in enumerate(samples(results)):
        out += ["", *(["## Samples", ""] if not i else []), f"**{prompt}**", ""]
        out += [f"- {who}: {text}" for who, text in texts.items()]
    return "\n".join(out).rstrip() + "\n"


def samples(results: Sequence[dict]) -> list[tuple[str, dict[str, str]]]:
    """(prompt, who -> text) for each prompt that is shown: the reference and every method's first seed."""
    first = {r["method"]: r for r in reversed(results) if r["samples"]}
    names = [n for n in dict.fromkeys(r["method"] for r in results) if n in first]
    return [
        (s["prompt"], {"reference": s["reference"], **{n: first[n]["samples"][i]["output"] for n in names}})
        for i, s in enumerate(first[names[0]]["samples"] if names else [])
    ]


def samples_table(results: Sequence[dict], most: int = 2) -> Table | None:
    """The first samples as a rich table; None for a task without texts."""
    shown = samples(results)[:most]
    if not shown:
        return None
    out = Table(title="Samples", box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_header=False)
    out.add_column(no_wrap=True)
    out.add_column(overflow="fold")
    for prompt, texts in shown:
        out.add_row(Text("input", "bold"), Text(prompt, "bold"))
        for who, text in texts.items():
            out.add_row(Text(who), Text(text))
        out.add_section()
    return out


COLOURS = {"-": "0.35", "selective": "C2", "low-rank": "C0", "additive": "C1"}  # by kind of method
MARKERS = "osD^vP*X"


def plots(rows: Sequence[dict], results: Sequence[dict], metric: str, title: str, folder: Path) -> None:
    """`pareto.png`: score by trained parameters; `curves.png`: training and evaluation loss by step.

    The colour tells the kind of method. The base as it is has no point, but a dashed line.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    trained = [r for r in rows if r["trainable"]]
    base = next((r for r in rows if not r["trainable"]), None)
    style = {}
    for r in trained:
        alike = [name for name, s in style.items() if s["color"] == COLOURS.get(r["kind"], "C3")]
        style[r["method"]] = {"color": COLOURS.get(r["kind"], "C3"), "marker": MARKERS[len(alike) % len(MARKERS)]}
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})

    fig, ax = plt.subplots(figsize=(8, 5), layout="constrained")
    for r in trained:
        x, y = r["trainable"], r["scores"][metric]
        ax.errorbar(x, y, yerr=r["spread"][metric], markersize=11, capsize=3, alpha=0.9, **style[r["method"]])
        ax.annotate(r["method"], (x, y), xytext=(9, 7), textcoords="offset points")
    if base is not None:
        ax.axhline(base["scores"][metric], color="0.6", linestyle="--", zorder=0)
        ax.annotate(base["method"], (0.01, base["scores"][metric]), xycoords=("axes fraction", "data"), va="bottom")
    handles = [Line2D([], [], color=c, marker="o", linestyle="") for c in COLOURS.values()]
    there = {r["kind"] for r in trained}
    shown = [(h, k if k != "-" else "reference") for h, k in zip(handles, COLOURS, strict=True) if k in there]
    if len(shown) > 1:
        ax.legend(*zip(*shown, strict=True), frameon=False, loc="best", fontsize=10)
    label = metric if metric == "loss" else f"{metric} (%)"
    ax.set(xscale="log", xlabel="trained parameters", ylabel=label, title=title)
    ax.margins(x=0.15, y=0.15)
    ax.grid(alpha=0.3)
    fig.savefig(folder / "pareto.png", dpi=150)
    plt.close(fig)

    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for i, name in enumerate(style):
        run = next(r for r in results if r["method"] == name)
        steps = [r for r in run["history"] if "loss" in r]
        evals = [r for r in run["history"] if "eval" in r]
        window = max(1, len(steps) // 40)
        smooth = [statistics.fmean(r["loss"] for r in steps[max(0, i - window) : i + 1]) for i in range(len(steps))]
        line = {"color": f"C{i % 10}", "label": name}
        left.plot([r["step"] for r in steps], smooth, **line)
        right.plot([r["step"] for r in evals], [r["eval"]["loss"] for r in evals], "o-", **line)
    left.set(xlabel="step", ylabel="training loss (running mean)", title=title)
    right.set(xlabel="step", ylabel="loss on dev")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=10)
    fig.savefig(folder / "curves.png", dpi=150)
    plt.close(fig)


def write(
    results: Sequence[dict], metric: str, title: str, facts: Sequence[str], folder: str | Path
) -> tuple[Table, ...]:
    """Writes all files of a comparison into the folder and returns the tables to print."""
    folder = Path(folder)
    rows = summarise(results)
    write_atomically(folder / "results.jsonl", "".join(json.dumps(_without_history(r)) + "\n" for r in results))
    write_atomically(folder / "report.md", markdown(rows, results, title, facts))
    plots(rows, results, metric, title, folder)
    shown = samples_table(results)
    return (table(rows, title),) if shown is None else (table(rows, title), shown)


def _without_history(result: dict) -> dict:
    return {k: v for k, v in result.items() if k != "history"}
