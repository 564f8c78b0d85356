"""The pictures of a report: scores by cost, ranks, learning curves, and where in the model what trains is.

Colours are those of Okabe and Ito (2008), which the colour-blind tell apart, with markers beside them. Each picture is
a PNG on white, and an SVG whose text, axes and background follow the page that it stands in.
"""

import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import summary
from .summary import Mean, Row, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#010203", "#040506"  # stand in the SVG for the page's own colours
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
MARKERS = "osD^vP*X<"  # as many as have no common divisor with the colours: 63 pairs
LINES = ("-", "--", "-.", ":")
WIDTH = 4.5  # inches: at 72 units an inch a text of 10 is 10 pixels high on a phone
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a method's name may hold a dollar
}


Drawn = tuple[str, str, str, "Figure"]  # kind, name, caption


class Picture(NamedTuple):
    """A picture.

    Attributes:
      kind: 'cost', 'ranks', 'curves' or 'parts'.
      name: of its files, without suffix.
      caption: one sentence.
      png: its bytes.
      svg: to stand in a page: text and axes in `currentColor`, the grid in `var(--rule)`.
    """

    kind: str
    name: str
    caption: str
    png: bytes
    svg: str

    def file(self) -> str:
        """The SVG as a file of its own, light or dark as the reader's system is."""
        dark = "@media(prefers-color-scheme:dark){svg{color:#ddd;--rule:#444;background:#15171a}}"
        style = f"<style>svg{{color:#1a1a1a;--rule:#ccc;background:#fff;font-family:sans-serif}}{dark}</style>"
        spaces = ' xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return self.svg.replace("<svg", "<svg" + spaces, 1).replace(">", ">" + style, 1)


def pictures(study: Study, rows: Sequence[Row], taken: Iterable[str] = ()) -> list[Picture]:
    """All pictures of one model that its records allow.

    Args:
      taken: names that other pictures have.
    """
    out: list[Picture] = []
    for draw in (_costs, _ranks, _curves, _parts):
        for kind, file, caption, fig in draw(study, rows):
            out.append(_picture(fig, kind, free(file, {*taken, *(p.name for p in out)}), caption))
    return out


def free(text: str, taken: Collection[str]) -> str:
    """The text, with a number where it is taken.

    >>> free("a", ["a", "a-2"]), free("b", ["a"])
    ('a-3', 'b')
    """
    return next(t for t in (text, *(f"{text}-{i}" for i in range(2, len(taken) + 3))) if t not in taken)


def slug(*parts: str) -> str:
    """A file's name, of no more letters than every file system takes.

    >>> slug("cost", "all-MiniLM", "lora(rank=8)")
    'cost-all-minilm-lora-rank-8'
    """
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower())[:120].strip("-")


COSTS: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("trainable", "trained parameters", lambda r: r.trainable and r.trainable[1]),
    ("memory", "peak memory (MB)", lambda r: None if r.peak_bytes is None else r.peak_bytes / 1e6),
    ("time", "seconds a run", lambda r: r.seconds),
)


def _costs(study: Study, rows: Sequence[Row]) -> Iterator[Drawn]:
    targets: list[tuple[str, dict[str, Mean]]]
    if summary.averaged(study):
        targets = [("average of the tasks", {r.method: r.average for r in rows if r.average is not None})]
    else:
        targets = [
            (f"{t}, {metric}", {r.method: r.scores[t] for r in rows if t in r.scores})
            for t, metric in study.headline.items()
        ]
    for what, scores in targets:
        for short, label, cost in COSTS:
            costs = {r.method: x for r in rows if r.method in scores and (x := cost(r)) is not None}
            shown = [r for r in rows if r.method in costs]
            if not shown:
                continue
            fig, ax = _axes()
            for r in shown:
                x, score = costs[r.method], scores[r.method]
                if short == "trainable" and not x:
                    ax.axhline(score.mean, linestyle="--", linewidth=1, color=INK, label=name(r.method))
                    continue
                style = styles(study)[r.method]
                look = {"color": style["color"], "marker": style["marker"]}
                ax.errorbar(
                    [x],
                    [score.mean],
                    yerr=score.sd,
                    linestyle="",
                    capsize=2,
                    markersize=7,
                    label=name(r.method),
                    **look,
                )
            _thousands(ax, log=short == "trainable" and any(costs.values()))
            ax.set(xlabel=label, ylabel=what)
            ax.margins(x=0.1, y=0.12)
            _legend(fig, ax)
            gone = [r.method for r in rows if r not in shown]
            caption = f"{study.model}: {what}, by {label}; bars: standard deviation over seeds."
            caption += f" Not shown, for want of a number: {', '.join(gone)}." if gone else ""
            yield "cost", slug(short, study.model, what), caption, fig


def _ranks(study: Study, rows: Sequence[Row]) -> Iterator[Drawn]:
    for task, metric in study.headline.items():
        lines = summary.ranked(study, task)
        if not lines:
            continue
        fig, ax = _axes()
        for i, (method, points) in enumerate(lines.items()):
            means = list(points.values())
            ax.errorbar(
                list(points),
                [m.mean for m in means],
                yerr=[m.sd or 0 for m in means],
                capsize=2,
                label=name(method),
                **_style(i),
            )
        ticks = sorted({rank for points in lines.values() for rank in points})
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set(xlabel="rank", ylabel=f"{task}, {metric}")
        _legend(fig, ax)
        caption = f"{study.model}, {task}: {metric} by rank; bars: standard deviation over seeds."
        yield "ranks", slug("ranks", study.model, task), caption, fig


def _curves(study: Study, rows: Sequence[Row]) -> Iterator[Drawn]:
    for task, metric in study.headline.items():
        for short, what in ((None, "training loss"), (metric, f"{metric} of the evaluations")):
            found = {m: c for m, runs in study.runs.items() if (c := summary.curve(runs, task, short)) is not None}
            if not found:
                continue
            fig, ax = _axes()
            for method, (steps, means, sd) in found.items():
                look = styles(study)[method]
                look = look if short else {**look, "marker": ""}
                ax.plot(steps, means, label=name(method), linewidth=1.5, **look)
                if sd.any():
                    ax.fill_between(steps, means - sd, means + sd, color=look["color"], alpha=0.15, linewidth=0)
            _thousands(ax)
            ax.set(xlabel="step", ylabel=f"{task}, {'training loss' if short is None else metric}")
            _legend(fig, ax)
            caption = f"{study.model}, {task}: {what} by step, mean over seeds; bands: standard deviation."
            yield "curves", slug("loss" if short is None else "score", study.model, task), caption, fig


def _parts(study: Study, rows: Sequence[Row]) -> Iterator[Drawn]:
    import matplotlib
    from matplotlib.figure import Figure

    for method, runs in study.runs.items():
        for task in study.headline:
            values = summary.allocation(runs, task)
            if not values:
                continue
            matrices, layers, grid = summary.heat(values)
            rank = summary.is_rank(runs[0]["method"])
            grid = grid if rank else 100 * grid
            with _style_context():
                fig = Figure(figsize=(WIDTH, 1.2 + 0.2 * len(matrices)), layout="constrained")
                ax = fig.add_subplot()
                top = float(np.nanmax(grid)) or 1.0
                colours = matplotlib.colormaps["cividis"].resampled(40)  # of more than 50 the bar would be a bitmap
                image = ax.pcolormesh(np.ma.masked_invalid(grid), cmap=colours, vmin=0, vmax=top)
                every = -(-len(layers) // 16)
                shown = [i for i, layer in enumerate(layers) if layer is None or not i % every]
                ax.set_xticks(
                    [i + 0.5 for i in shown], ["none" if layers[i] is None else str(layers[i]) for i in shown]
                )
                ax.set_yticks(np.arange(len(matrices)) + 0.5, [name(m, 26) for m in matrices], fontsize=9)
                ax.tick_params(length=0)
                ax.invert_yaxis()
                ax.set(xlabel="layer")
                for side in ax.spines.values():
                    side.set_visible(False)
                bar = fig.colorbar(image, ax=ax, location="bottom", aspect=40, pad=0.02)
                bar.set_label("rank left" if rank else "entries that train (%)")
                bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - a patch, typed as its class's attribute
            n = len({r["seed"] for r in runs if r["task"] == task and r.get("allocation")})
            what = "rank of each matrix" if rank else "share of each matrix's entries that train"
            caption = f"{study.model}, {task}, {method}: {what}, mean over {n} seed{'' if n == 1 else 's'}."
            yield "parts", slug("parts", study.model, task, method), caption, fig


def styles(study: Study) -> dict[str, dict[str, Any]]:
    """Method -> colour, marker and line, the same in all pictures of a model."""
    return {method: _style(i) for i, method in enumerate(study.runs)}


def _style(i: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {
        "color": COLOURS[i % n],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i // n % len(LINES)],
        "markersize": 5,
    }


def name(text: str, most: int = 48) -> str:
    """A text that is cut in the middle where it is long.

    >>> name("a" * 5 + "b" * 5, 7)
    'aaa…bbb'
    """
    if len(text) <= most:
        return text
    half = (most - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _style_context():
    import matplotlib

    return matplotlib.rc_context(STYLE)


def _axes() -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    with _style_context():
        fig = Figure(figsize=(WIDTH, 3.1), layout="constrained")
        ax = fig.add_subplot()
        ax.grid(linewidth=0.6, alpha=0.6)
        ax.set_axisbelow(True)
    return fig, ax


def _thousands(ax: "Axes", log: bool = False) -> None:
    """Ticks of the abscissa as 20k or 3M; on a logarithmic one, also between the powers of ten where it is short."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    form = FuncFormatter(lambda x, _: thousands(x))
    if not log:
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.xaxis.set_major_formatter(form)
        return
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,)))
    ax.xaxis.set_major_formatter(form)
    ax.xaxis.set_minor_formatter(NullFormatter())


def thousands(x: float) -> str:
    """A short number.

    >>> [thousands(x) for x in (0, 0.5, 12, 2e4, 1.5e6)]
    ['0', '0.5', '12', '20k', '1.5M']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= size:
            return f"{x / size:g}{letter}"
    return f"{x:g}"


def _legend(fig: "Figure", ax: "Axes") -> None:
    """Below the axes, in as many columns as the names leave room for; the picture grows by its lines."""
    handles, labels = ax.get_legend_handles_labels()
    longest = max(map(len, labels))
    columns = min(len(labels), 3 if longest <= 12 else 2 if longest <= 23 else 1)
    with _style_context():
        fig.legend(handles, labels, loc="outside lower left", ncols=columns, handlelength=2.4, columnspacing=1.2)
    fig.set_figheight(3.1 + 0.19 * -(-len(labels) // columns))


def _picture(fig: "Figure", kind: str, file: str, caption: str) -> Picture:
    import matplotlib

    png, svg = io.BytesIO(), io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": file}):
        fig.savefig(png, format="png", dpi=150, facecolor="white")
        fig.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Picture(kind, file, caption, png.getvalue(), inline(svg.getvalue(), file, caption))


def inline(svg: str, prefix: str, caption: str) -> str:
    """matplotlib's SVG as part of a page: ids of its own, the page's colours and font, the caption as its name."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    keep: Mapping[str, str] = {i: f"{prefix}-{i}" for i in used}
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{keep[m[1]]}"' if m[1] in keep else "", body)
    body = re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + keep[m[2]], body)
    body = re.sub(r"font: (?:[^;\"]*? )?([\d.]+px) [^;\"]*", r"font-size: \1", body)
    body = body.replace(INK, "currentColor").replace(FAINT, "var(--rule)")
    return f'<svg {box[0] if box else ""} role="img" aria-label="{escape(caption)}">{body.rstrip()}\n'
