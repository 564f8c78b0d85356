"""What a report says: the same sections as Markdown, as one HTML page, and as a table on the terminal."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from . import figures, summary
from .checkpoint import write_atomically
from .figures import Picture
from .summary import LOWER, Beside, Difference, Mean, Order, Records, Row, Study


class Cell(NamedTuple):
    """A cell of a table.

    Attributes:
      text: what it says.
      detail: what is smaller beside it.
      value: what it is sorted by; None sorts last.
      best: of its column.
    """

    text: str
    detail: str = ""
    value: float | str | None = None
    best: bool = False


class Sheet(NamedTuple):
    """A table; its first column names the rows."""

    head: list[Cell]
    rows: list[list[Cell]]


Block = str | list[str] | Sheet | Picture
Blocks = Sequence[Block]


class Section(NamedTuple):
    """A part of the report.

    Attributes:
      title: its heading.
      level: 2, or 3 of a part of the section before.
      brief: its heading among those of its parts.
      blocks: texts, lists of texts, tables and pictures, in order.
    """

    title: str
    level: int
    brief: str
    blocks: Blocks


def report(
    places: Sequence[str | Path], baseline: str | None = None, out: str | Path | None = None, title: str | None = None
) -> tuple[tuple[Table, ...], Path]:
    """Writes `report.md`, `report.html` and `figures/`; gives the tables to print, one for each model, and the folder.

    Args:
      places: files, or folders that hold a `results.jsonl`.
      baseline: the method that others are compared with; None: the grid's, or 'full' where it was run.
      out: the folder; None: that of the first place.
      title: None: the grid's.

    Raises:
      ValueError: there is nothing to read, or the baseline was not run.
    """
    records = summary.read(places)
    studies = summary.studies(records)
    chosen = _baseline(studies, baseline, records.baseline)
    first = Path(places[0])
    folder = Path(out) if out is not None else first if first.is_dir() else first.parent
    title = title or records.title or "Results"
    lead, sections = contents(records, studies, chosen)
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Picture):
                write_atomically(folder / "figures" / f"{block.name}.png", block.png)
                write_atomically(folder / "figures" / f"{block.name}.svg", block.file())
    write_atomically(folder / "report.md", markdown(title, lead, sections))
    write_atomically(folder / "report.html", html(title, lead, sections))
    tables = [_rich(scores(study, summary.rows(study)), f"{title}: {study.model}") for study in studies]
    return tuple(tables), folder


def _baseline(studies: Sequence[Study], asked: str | None, grids: str | None) -> str | None:
    run = list(dict.fromkeys(m for s in studies for m, runs in s.runs.items() if runs))
    found = [m for m in (asked, grids, "full") if m is not None and any(summary.ways(s, m) for s in studies)]
    if asked is not None and asked not in found:
        raise ValueError(f"the baseline {asked!r} has no run here; choose one of {', '.join(run)}")
    return next(iter(found), None)


def contents(records: Records, studies: Sequence[Study], baseline: str | None) -> tuple[list[str], list[Section]]:
    """The lead, and the sections: each model's scores, comparison, published tables, pictures; then what is missing."""
    sections: list[Section] = []
    names: set[str] = set()
    shown: set[tuple[str, str]] = set()
    models = {study.model for study in studies}
    for study in studies:
        rows = summary.rows(study)
        sections.append(Section(study.model, 2, study.model, [scores(study, rows), *_listed(notes(study, rows))]))
        if baseline is not None:
            sections.append(_part(study, f"against {baseline}", _against(study, baseline)))
        # what is published of a model that was run here stands beside that one alone
        cells = [p for p in records.published if p["model"] == study.model or p["model"] not in models]
        for b in summary.beside(study, cells):
            shown.add((b.source, b.model))
            about = f"beside {b.model}" + (f" ({b.source})" if b.source else "")
            sections.append(_part(study, about, [published(b, study), _orders(b)]))
        drawn = figures.pictures(study, rows, names)
        names |= {p.name for p in drawn}
        for kind, heading in KINDS.items():
            if found := [p for p in drawn if p.kind == kind]:
                sections.append(_part(study, heading, [*found]))
    alone = [
        f"Published, and none of its methods was run: {model}{f' ({source})' if source else ''}."
        for source, model in dict.fromkeys((p.get("source") or "", p["model"]) for p in records.published)
        if (source, model) not in shown
    ]
    for heading, blocks in (
        ("What failed and what is missing", [*_gone(studies, records.failed), *_listed(alone)]),
        ("How to read this", [_reading(baseline)]),
    ):
        sections.append(Section(heading, 2, heading, blocks))
    return _lead(records, studies, baseline), sections


KINDS = {"cost": "scores by cost", "ranks": "ranks", "curves": "learning curves", "parts": "what trains, by layer"}


def _part(study: Study, heading: str, blocks: Blocks) -> Section:
    return Section(f"{study.model}: {heading}", 3, heading, blocks)


def _listed(texts: list[str]) -> list[list[str]]:
    return [texts] if texts else []


# Numbers as text


def number(value: float | None, digits: int = 2, plus: bool = False) -> str:
    """A number as text; '-' is none.

    >>> number(1234.5), number(None), number(0.5, 1, plus=True), number(-0.001)
    ('1,234.50', '-', '+0.5', '0.00')
    """
    if value is None or not math.isfinite(value):
        return "-"
    value = round(value, digits) + 0.0  # no minus before a zero
    return f"{value:{'+' if plus else ''},.{digits}f}"


def _digits(metric: str) -> int:
    return 3 if metric in summary.NOT_PERCENT else 2


def spread(m: Mean | None, digits: int = 2) -> str:
    """Mean ± standard deviation."""
    if m is None:
        return "-"
    return number(m.mean, digits) + ("" if m.sd is None else f" ± {number(m.sd, digits)}")


def _span(m: Mean | Difference, digits: int, plus: bool = False) -> str:
    return "" if m.low is None else f"{number(m.low, digits, plus)} to {number(m.high, digits, plus)}"


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {_and(seeds)}"


def _and(texts: Iterable[Any]) -> str:
    return ", ".join(map(str, texts))


def _range(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "-"
    low, high = counts
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# The tables


def scores(study: Study, rows: Sequence[Row]) -> Sheet:
    """A row for each method: each task's headline, their average, seeds, parameters, memory, time, rates."""
    averaged = summary.averaged(study)
    columns: list[tuple[Cell, list[Cell]]] = []
    for task, metric in study.headline.items():
        found = [r.scores.get(task) for r in rows]
        columns.append((Cell(task, metric), _means(found, _digits(metric), metric in LOWER)))
    if averaged:
        columns.append((Cell("average", "of tasks"), _means([r.average for r in rows], 2, False)))
    most = [max((len(s) for s in r.seeds.values()), default=0) for r in rows]
    columns.append((Cell("seeds"), [Cell(str(n), value=n) for n in most]))
    counts = [None if r.trainable is None else r.trainable[1] for r in rows]
    columns.append((Cell("trainable"), _least([_range(r.trainable) for r in rows], counts)))
    peaks = [None if r.peak_bytes is None else r.peak_bytes / 1e6 for r in rows]
    columns.append((Cell("peak", "MB"), _least([number(p, 1) for p in peaks], peaks)))
    columns.append((Cell("time", "s a run"), _least([number(r.seconds, 1) for r in rows], [r.seconds for r in rows])))
    columns.append((Cell("learning rate"), [_rates(r) for r in rows]))
    names = [Cell(r.method, "fewer seeds" if _fewer(study, rows, r) else "", r.method) for r in rows]
    head = [Cell("method"), *(head for head, _ in columns)]
    return Sheet(head, [[name, *(cells[i] for _, cells in columns)] for i, name in enumerate(names)])


def _fewer(study: Study, rows: Sequence[Row], row: Row) -> bool:
    return any(method == row.method for method, *_ in summary.fewer(study, rows))


def _means(found: Sequence[Mean | None], digits: int, lower: bool) -> list[Cell]:
    most = max((m.n for m in found if m is not None), default=0)
    shown = [round(m.mean, digits) for m in found if m is not None]
    best = (min if lower else max)(shown, default=None)
    cells = []
    for m in found:
        if m is None:
            cells.append(Cell("-"))
            continue
        detail = ", ".join(filter(None, [_span(m, digits), f"n {m.n}" if m.n < most else ""]))
        cells.append(Cell(spread(m, digits), detail, m.mean, round(m.mean, digits) == best and len(shown) > 1))
    return cells


def _least(texts: Sequence[str], values: Sequence[float | None]) -> list[Cell]:
    """Best is the least that is not 0: what trains nothing saves nothing."""
    best = min((t for t in zip(values, texts, strict=True) if t[0]), default=(None, ""))[1]
    several = len([v for v in values if v]) > 1
    return [Cell(t, "", v, several and t == best) for t, v in zip(texts, values, strict=True)]


def _rates(row: Row) -> Cell:
    """One rate, or each task's; an asterisk for one at the end of what was tried."""
    said = {
        task: "/".join(map(summary.short, rates)) + (" *" if task in row.edges else "")
        for task, rates in row.rates.items()
    }
    if not said:
        return Cell("-")
    value = next(iter(row.rates.values()))[0]
    if len(set(said.values())) == 1:
        return Cell(next(iter(said.values())), "", value)
    return Cell(_and(f"{task} {rate}" for task, rate in said.items()), "", value)


def notes(study: Study, rows: Sequence[Row]) -> list[str]:
    """What the table alone does not say: edges of the search, fewer seeds, runs that nothing tells apart."""
    out = []
    for r in rows:
        for edge in ("lowest", "highest"):
            if tasks := [t for t, e in r.edges.items() if e == edge]:
                out.append(
                    f"{r.method}: the search chose the {edge} of the rates that it tried (*), on {_and(tasks)}; a "
                    f"{'lower' if edge == 'lowest' else 'higher'} one may be better."
                )
        out += [f"{r.method}: {note.rstrip('.')}." for note in r.notes]
    for method, task, n, most in summary.fewer(study, rows):
        out.append(f"{method} has {_count(n, 'seed')} of {task}, others up to {most}.")
    for method, task, seed in summary.repeated(study):
        out.append(f"{method}, {task}, seed {seed}: several runs that no setting tells apart; the last one counts.")
    if len(held := _held(study)) > 1:
        said = [f"{_count(n, 'run')} for {_and(methods)}" for n, methods in sorted(held.items())]
        out.append(f"Peaks are of programs that hold {'; '.join(said)}: compare them with that in mind.")
    if not summary.averaged(study) and len(study.headline) > 1:
        out.append(f"No average: {_and(sorted(set(study.headline.values())))} are not all in percent.")
    return out


def _held(study: Study) -> dict[int, list[str]]:
    """Runs in a program -> the methods that trained so."""
    found: dict[int, list[str]] = {}
    for method, runs in study.runs.items():
        if runs:
            found.setdefault(max(r.get("together") or 1 for r in runs), []).append(method)
    return found


def _against(study: Study, baseline: str) -> Blocks:
    ways = summary.ways(study, baseline)
    if not ways:
        return [f"{baseline} has no run with {study.model}."]
    several = [f"{baseline} was run in several ways; the one of most tasks and seeds is {ways[0]}."] if ways[1:] else []
    baseline = ways[0]
    found = [m for m in study.runs if m != baseline]
    if not found:
        return [f"There is no other method than {baseline}."]
    tasks = list(study.headline)
    joined = len(tasks) == 1 or summary.averaged(study)
    head = [Cell("method")]
    head += [Cell("difference", "all tasks"), Cell("95% interval"), Cell("pairs"), Cell("verdict")] if joined else []
    singles = [] if len(tasks) == 1 else tasks
    head += [Cell(t, study.headline[t]) for t in singles]
    rows, words = [], []
    for method in found:
        line = [Cell(method, value=method)]
        if joined:
            d = summary.differences(study, method, baseline, tasks)
            digits = _digits(study.headline[tasks[0]])
            line += [
                Cell(number(d.mean, digits, plus=True), "", d.mean),
                Cell(_span(d, digits, plus=True) or "-", "", d.low),
                Cell(str(d.pairs), "", d.pairs),
                Cell(d.verdict, "", d.verdict),
            ]
            words.append((method, d.verdict))
        for t in singles:
            d, digits = summary.differences(study, method, baseline, [t]), _digits(study.headline[t])
            detail = _and(
                filter(
                    None,
                    [_span(d, digits, plus=True), d.verdict if joined else f"{_count(d.pairs, 'pair')}, {d.verdict}"],
                )
            )
            line.append(Cell(number(d.mean, digits, plus=True), detail, d.mean))
        rows.append(line)
    said = []
    for verdict, form in VERDICTS.items():
        if methods := [m for m, v in words if v == verdict]:
            said.append(form.format(methods=_and(methods), baseline=baseline))
    return [*several, Sheet(head, rows), *_listed(said)]


VERDICTS = {
    "better": "Better than {baseline}: {methods}.",
    "worse": "Worse than {baseline}: {methods}.",
    "not told apart": "Not told apart from {baseline}: {methods}.",
    "too few pairs": "Too few pairs to tell from {baseline}: {methods}.",
    "no pairs": "No seed of a task in common with {baseline}: {methods}.",
}


def published(b: Beside, study: Study) -> Sheet:
    """Published and ours side by side."""
    head = [Cell("method"), Cell("parameters", b.model), Cell("parameters", f"{study.model}, here")]
    for task, metric in b.columns:
        head += [Cell(task, f"{metric}, published"), Cell(task, f"{metric}, here")]
    rows = []
    for method, cells in b.rows.items():
        theirs, ours = b.trainable[method]
        line = [
            Cell(method, value=method),
            Cell("-" if theirs is None else figures.thousands(theirs), "", theirs),
            Cell(_range(ours), "", None if ours is None else ours[1]),
        ]
        for column in b.columns:
            if column not in cells:
                line += [Cell("-"), Cell("-")]
                continue
            p, m = cells[column]
            error = "" if p.get("spread") is None else f" ± {summary.short(p['spread'])}"
            line += [Cell(f"{p['score']:g}{error}", "", p["score"])]
            line += [Cell(spread(m, _digits(column[1])), "" if m is None else f"n {m.n}", m and m.mean)]
        rows.append(line)
    return Sheet(head, rows)


def _orders(b: Beside) -> list[str]:
    """Which published orders hold, in words."""
    told = [o for o in b.orders if o.pairs]
    out = []
    if len(told) > 1:
        same, pairs = sum(o.same for o in told), sum(o.pairs for o in told)
        out.append(f"In all, {same} of {_count(pairs, 'pair')} of methods are in the published order.")
    out += [_order(o) for o in b.orders]
    missing = [m for m, cells in b.rows.items() if all(ours is None for _, ours in cells.values())]
    return out + ([f"Published, and without a score here: {_and(missing)}."] if missing else [])


def _order(o: Order) -> str:
    if not o.pairs:
        return f"{o.task}, {o.metric}: no two methods with different published scores were run here."
    tau = "" if o.tau is None else f" (Kendall's tau {number(o.tau)})"
    text = f"{o.task}, {o.metric}: {o.same} of {_count(o.pairs, 'pair')} in the published order{tau}."
    digits = _digits(o.metric)
    for better, worse, theirs, ours in o.turned:
        text += (
            f" Published, {better} is better than {worse} by {number(abs(theirs), digits)}; here {worse} is better by "
            f"{number(abs(ours), digits)}."
        )
    rest = o.pairs - o.same - len(o.turned)
    return text + (f" {_count(rest, 'pair')} the other way round or equal, within a spread." if rest else "")


def _gone(studies: Sequence[Study], failed: Sequence[dict]) -> Blocks:
    out: list[Block] = []
    if failed:
        head = [Cell(c) for c in ("method", "model", "task", "stage", "seed", "rate", "tries", "error")]
        rows = []
        for f in failed:
            line = [
                f["method"],
                f["model"],
                f["task"],
                "table" if f["stage"] == "final" else f["stage"],
                str(f["seed"]),
            ]
            times = f"{f['factor']:g} times its default" if f.get("rate") is None and f.get("factor") else ""
            line += [times or summary.short(f.get("rate")), str(f.get("attempts") or "-"), str(f["error"])]
            rows.append([Cell(text, value=text) for text in line])
        out += [f"{_count(len(failed), 'run')} failed.", Sheet(head, rows)]
    else:
        out.append("No run failed.")
    gone = [(s, *missing) for s in studies for missing in summary.missing(s)]
    if gone:
        out.append("Missing, where other methods have a run or a failure:")
        out.append([f"{s.model}, {method}, {task}: {_seeds(seeds)}" for s, method, task, seeds in gone])
    else:
        out.append("Nothing is missing: every method has a record of each task and seed that another has.")
    return out


# The lead and the end


def _lead(records: Records, studies: Sequence[Study], baseline: str | None) -> list[str]:
    """What was run, on what."""
    every = records.runs + records.trials + records.failed
    methods = {m for s in studies for m in s.runs}
    tasks = {t for s in studies for t in s.headline}
    seeds = {r["seed"] for r in records.runs}
    out = [
        f"{_count(len(records.runs), 'run')} of {_count(len(methods), 'method')} on {_count(len(tasks), 'task')} with "
        f"{_count(len(studies), 'model')} and {_count(len(seeds), 'seed')}"
        + (f", after {_count(len(records.trials), 'trial')} of learning rates" if records.trials else "")
        + (f"; {len(records.failed)} failed" if records.failed else "; none failed")
        + (f". Compared with {baseline}." if baseline else ".")
    ]
    if records.baseline and baseline is None:
        out.append(f"Nothing is compared, since the grid's baseline {records.baseline} has no run of that name.")
    devices = Counter(_device(r["device"]) for r in every if r.get("device"))
    if devices:
        out.append("On " + "; ".join(d if len(devices) == 1 else f"{d} ({n} runs)" for d, n in devices.items()) + ".")
    versions: dict[str, dict[str, None]] = {}
    for r in every:
        for package, version in (r.get("versions") or {}).items():
            versions.setdefault(package, {})[str(version)] = None
    if versions:
        out.append("With " + _and(f"{p} {' and '.join(v)}" for p, v in versions.items()) + ".")
    days = sorted({str(r["at"])[:10] for r in every if r.get("at")})
    if days:
        out.append(f"Run on {days[0]}." if days[0] == days[-1] else f"Run from {days[0]} to {days[-1]}.")
    return out


def _device(d: dict) -> str:
    """One line of a device.

    >>> _device({"kind": "cpu", "name": "cpu", "count": 1, "cores": 2})
    'cpu, 2 cores'
    >>> _device({"kind": "gpu", "name": "NVIDIA H200", "count": 4, "cores": 16})
    '4 NVIDIA H200, 16 cores'
    """
    count = d.get("count") or 1
    cores = f", {_count(d['cores'], 'core')}" if d.get("cores") else ""
    return f"{f'{count} ' if count > 1 else ''}{d.get('name') or d.get('kind') or 'device'}{cores}"


def _reading(baseline: str | None) -> list[str]:
    out = [
        "Scores are of the best evaluation of each run, in percent, but for loss, nist and cider: mean ± standard "
        "deviation (n - 1) over seeds, and below it Student's 95% interval for the mean over seeds. An average is over "
        "the tasks for each seed that has them all, then over those seeds. In bold: the best of a column.",
        "Trainable: parameters that train, as counted; a range where the heads of tasks differ. Peak: XLA's plan of "
        "the compiled training step, with all the runs that it holds, the largest of the tasks. Time: of a run, the "
        "mean of the tasks; of runs that trained together, a run's share.",
        "A learning rate with an asterisk is the lowest or highest that the search tried.",
    ]
    if baseline is not None:
        out.append(
            f"Differences are a method's score minus that of {baseline}, of the same task and seed (of a loss the "
            "other way round: more is always better). Their interval is the percentile bootstrap's over those pairs, "
            "9,999 draws; it speaks of these tasks and is not corrected for the number of methods. A method is called "
            f"better or worse if it leaves out 0, of at least {summary.FEWEST_PAIRS} pairs: fewer go all one way by "
            "chance more often than one time in twenty."
        )
    out.append(
        "A published order of two methods holds if the means here are in the same order. A pair the other way round is "
        "named if it differs by more than the larger spread of the two on both sides; a spread that is not published "
        "counts as 0."
    )
    return out


# Markdown, page, terminal


def markdown(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The report for reading in a repository."""
    out = [f"# {_plain(title)}", "", _plain(" ".join(lead))]
    for section in sections:
        out += ["", f"{'#' * section.level} {_plain(section.title)}"]
        for block in section.blocks:
            out.append("")
            match block:
                case str():
                    out.append(_plain(block))
                case list():
                    out += [f"- {_plain(text)}" for text in block]
                case Sheet():
                    out.append("| " + " | ".join(_plain(_beside(c)) for c in block.head) + " |")
                    out.append("|---|" + "---:|" * (len(block.head) - 1))
                    out += ["| " + " | ".join(map(_bold, row)) + " |" for row in block.rows]
                case Picture():
                    out += [f"![{_plain(block.caption)}](figures/{block.name}.png)", "", _plain(block.caption)]
    return "\n".join(out) + "\n"


def _plain(text: str) -> str:
    """The text in one line, with nothing that Markdown would read as its own.

    >>> _plain("a|b <i> [c]")
    'a\\\\|b \\\\<i> \\\\[c\\\\]'
    """
    text = " ".join(str(text).split())
    for c in "\\`*_|<[]":
        text = text.replace(c, f"\\{c}")
    return text


def _bold(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text)
    return text + (f" ({_plain(cell.detail)})" if cell.detail else "")


def _beside(cell: Cell) -> str:
    return cell.text + (f" ({cell.detail})" if cell.detail else "")


def html(title: str, lead: Sequence[str], sections: Sequence[Section]) -> str:
    """The report as one page that loads nothing else."""
    shown = [(f"s{i}", section, [(_kind(b), b) for b in section.blocks]) for i, section in enumerate(sections)]
    contents = []
    for link, section, _ in shown:
        if section.level == 2:
            contents.append((link, section, []))
        else:
            contents[-1][2].append((link, section))
    return _template().render(title=title, lead=lead, sections=shown, contents=contents)


def _kind(block: Block) -> str:
    return {str: "text", list: "list", Sheet: "sheet", Picture: "picture"}[type(block)]


@functools.cache
def _template():
    import jinja2

    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    env = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return env.from_string(text)


def _rich(sheet: Sheet, title: str) -> Table:
    """A sheet for the terminal, without its details; heads and names may wrap, numbers not."""
    texts = [[c.text.replace(" ± ", "±") for c in row] for row in sheet.rows]
    out = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for i, cell in enumerate(sheet.head):
        head = Text(cell.text + (f"\n{cell.detail}" if cell.detail else ""))
        width = max(len(row[i]) for row in texts) if 0 < i < len(sheet.head) - 1 else None
        out.add_column(head, justify="right" if i else "left", overflow="fold", min_width=width)
    for row, shown in zip(sheet.rows, texts, strict=True):
        out.add_row(*(Text(text, "bold" if c.best else "") for c, text in zip(row, shown, strict=True)))
    return out
