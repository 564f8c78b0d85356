"""What `peftjax icl` leaves to read: a table, `report.md`, `costs.png`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .checkpoint import write_atomically
from .costs import break_even

UNITS = (("flops", "FLOPs"), ("seconds", "time"))
BASE = "base"  # the method's name of the model as it is


def best_shots(lines: Sequence[dict]) -> dict | None:
    """The base's line with the best first metric among those with demonstrations; None: there is none."""
    few = [line for line in lines if line["method"] == BASE and line["shots"] and not line["trained"]]
    return max(few, key=lambda line: next(iter(line["scores"].values())), default=None)


def queries(tuned: dict, few: dict, unit: str) -> float | None:
    """After how many queries the training of `tuned` has cost less than `few`; the unit is 'flops' or 'seconds'."""
    return break_even(tuned[f"training_{unit}"], few[unit], tuned[unit])


def _pays(tuned: dict, few: dict, unit: str) -> str:
    """That number in words; '-' where the training's cost is not known."""
    return "-" if tuned[f"training_{unit}"] is None else _said(queries(tuned, few, unit), none="never")


def _few(line: dict) -> str:
    shots = f"{line['shots']} shot{'' if line['shots'] == 1 else 's'}"
    return shots if line["method"] == BASE else f"{line['method']}, {shots}"


def _name(line: dict) -> str:
    return _few(line) if line["shots"] else line["method"]


def _said(value: float | None, form: str = ",.0f", factor: float = 1.0, none: str = "-") -> str:
    return none if value is None else format(value * factor, form)


def cells(line: dict, best: dict | None) -> dict[str, str]:
    """A line as text, by column. GFLOP are 10^9; the last two columns compare with the best number of shots."""
    metric = next(iter(line["scores"]))
    span = "-" if line["interval"] is None else "{:.1f} to {:.1f}".format(*line["interval"])
    out = {"method": line["method"], "shots": str(line["shots"])}
    for name, value in line["scores"].items():
        out[name] = f"{value:.2f}"
        if name == metric:
            out["95%"] = span
    out |= {
        "tokens": _said(line["prompt_tokens"]),
        "ms": _said(line["seconds"], ",.2f", 1e3),
        "GFLOP": _said(line["flops"], ",.4g", 1e-9),
        "trained s": _said(line["training_seconds"], ",.1f"),
        "trained GFLOP": _said(line["training_flops"], ",.0f", 1e-9),
    }
    for unit, column in (("flops", "pays after, by FLOP"), ("seconds", "by time")):
        out[column] = "-"
        if line["trained"] and best is not None:
            out[column] = _pays(line, best, unit)
    return out


def verdict(lines: Sequence[dict]) -> str:
    """One sentence on the best trained method against the best number of shots; empty where there is none of one."""
    best = best_shots(lines)
    tuned = [line for line in lines if line["trained"]]
    if best is None or not tuned:
        return ""
    metric = next(iter(best["scores"]))
    top = max(tuned, key=lambda line: line["scores"][metric])
    better = "better" if top["scores"][metric] > best["scores"][metric] else "no better"
    spans = [line["interval"] for line in (top, best) if line["interval"] is not None]
    unsure = len(spans) == 2 and max(low for low, _ in spans) <= min(high for _, high in spans)
    known = [(unit, what) for unit, what in UNITS if top[f"training_{unit}"] is not None]
    paid = [
        f"after {n:,.0f} queries by {what}"
        if (n := queries(top, best, unit)) is not None
        else f"at no number by {what}"
        for unit, what in known
    ]
    return (
        f"{_name(top)} is {better} than {_few(best)} ({metric} {top['scores'][metric]:.1f} against "
        f"{best['scores'][metric]:.1f}{', and the intervals overlap' if unsure else ''}); it is cheaper "
        f"{' and '.join(paid)}"
    )


def write(lines: Sequence[dict], title: str, facts: Sequence[str], folder: Path) -> tuple[Table, ...]:
    """Writes `report.md` and `costs.png`, and returns the table to print.

    Args:
      lines: of `peftjax.icl.summarise`.
    """
    best, answer = best_shots(lines), verdict(lines)
    texts = [cells(line, best) for line in lines]
    trained = any(line["trained"] for line in lines)
    wide = [c for c in texts[0] if trained or not (c.startswith(("trained", "pays")) or c == "by time")]
    plot(lines, title, folder / "costs.png")
    write_atomically(folder / "report.md", _markdown(lines, texts, wide, title, facts, answer))
    out = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=answer or None)
    for column in wide:
        name = column == "method"
        width = None if name else max(len(text[column]) for text in texts)  # headers may wrap, numbers not
        out.add_column(column, justify="left" if name else "right", overflow="fold", min_width=width)
    for text in texts:
        out.add_row(*(Text(text[c]) for c in wide))
    return (out,)


def _markdown(lines, texts, wide, title, facts, answer) -> str:
    def table(head, body):
        return [
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *("| " + " | ".join(row) + " |" for row in body),
        ]

    out = [f"# {title}", "", *([f"**{answer}.**", ""] if answer else []), *(f"- {fact}" for fact in facts), ""]
    out += table(wide, [[text[c] for c in wide] for text in texts])
    out += [
        "",
        "Metrics in percent, means over the seeds. 95%: of the first metric, over the test inputs: Wilson's interval "
        "of a share of right answers, otherwise the percentile bootstrap (of several seeds, of their mean). Tokens: of "
        "a prompt, mean. Ms and GFLOP: of one query, that is all its choices or its whole text, in batches as padded; "
        "time without compilation, a median over batches. Trained: all steps, without compilation and evaluations; the "
        "seconds of an adapter given as a file are those of its whole run. Texts are written until all of a batch have "
        "ended, and a text that goes on after the separator has not. "
        "Pays after: the queries after which training has cost less than the best number of shots.",
    ]
    tuned, few = [x for x in lines if x["trained"]], [x for x in lines if not x["trained"]]
    if tuned and few:
        for unit, what in UNITS:
            head = ["cheaper after so many queries, by " + what]
            head += [_few(x) for x in few]
            body = [[_name(t), *(_pays(t, x, unit) for x in few)] for t in tuned]
            out += ["", *table(head, body)]
        if any(x["method"] != BASE for x in few):
            out += ["", "Of adapters in the last table's columns it is not known what they cost to train."]
    out += ["", "![total cost by number of queries](costs.png)"]
    return "\n".join(out) + "\n"


def plot(lines: Sequence[dict], title: str, file: Path) -> None:
    """Total FLOPs by the number of queries: demonstrations cost with every query, training once."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tuned = [line for line in lines if line["trained"] and not line["shots"]]
    few = [line for line in lines if not line["trained"]]
    crossings = [n for t in tuned for f in few if (n := queries(t, f, "flops")) is not None]  # flops are always known
    most = 10.0 ** np.ceil(np.log10(max([1e4, *(10 * n for n in crossings if n < 1e9)])))
    n = np.geomspace(1, most, 200)
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    fig, ax = plt.subplots(figsize=(10, 5), layout="constrained")
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, max(len(few), 2)))
    for line, colour in zip(few, shades, strict=False):
        ax.plot(n, n * line["flops"], color=colour, label=_few(line))
    colours = plt.get_cmap("tab10" if len(tuned) <= 10 else "tab20").colors  # pyright: ignore[reportAttributeAccessIssue] - of listed maps
    for i, line in enumerate(tuned):
        cost = line["training_flops"] + n * line["flops"]
        ax.plot(n, cost, "--", color=colours[i % len(colours)], linewidth=2, label=f"{_name(line)}, trained")
    ax.set(xscale="log", yscale="log", xlabel="queries", ylabel="FLOPs in all", title=title)
    ax.grid(alpha=0.3)
    fig.legend(frameon=False, fontsize=10, loc="outside right upper")
    fig.savefig(file, dpi=150)
    plt.close(fig)
