"""Instruction data from data sets: rows put in words by templates, tasks mixed with a cap.

In the manner of Flan (Wei et al. 2021, arXiv:2109.01652, section 2) and P3 (Sanh et al. 2021, arXiv:2110.08207).
"""

import itertools
import json
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from . import data
from .tasks import Row, get_task
from .templates import TEMPLATES, Template, read_templates

FORMS = (("instruction", "output"), ("instruction", "response"), ("prompt", "answer"), ("instruction", "instances"))
# The frame of Alpaca's prompts, which some files of (prompt, answer) come in.
_FRAME = re.compile(
    r".*?### Instruction:\n(?P<instruction>.*?)(\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*", re.DOTALL
)


class Words(NamedTuple):
    """A row in words: what a line of instruction data holds."""

    instruction: str
    input: str
    output: str


class Source(NamedTuple):
    """One part of a mixture.

    Attributes:
      name: the task's.
      origin: what a line says of it beside row and template.
      rows: of the data set.
      forms: (template or None, row -> its words or None where the template does not apply).
    """

    name: str
    origin: dict[str, str]
    rows: Sequence[Row]
    forms: Sequence[tuple[str | None, Callable[[Row], Words | None]]]


def read_source(
    name: str, where: str | None, split: str, templates: Mapping[str, Sequence[Template]] = TEMPLATES
) -> Source:
    """Reads a task from a folder or data set (`data.load_rows`), or from a JSONL or TSV file of rows.

    A file of a task without templates holds instructions: see `words_of`.

    Raises:
      ValueError, OSError: nothing there, no templates, a row without the columns.
    """
    if where is not None and (Path(where).is_file() or Path(where).suffix in (".jsonl", ".tsv")):
        rows = list(data.read_file(Path(where)))
        origin = {"task": name, "file": Path(where).name}
        if name in templates:
            return Source(name, origin, [row for _, row in rows], _forms(templates[name]))
        lines = [words for at, row in rows for words in words_of(row, at)]
        return Source(name, origin, [w._asdict() for w in lines], [(None, lambda row: _full(Words(**row)))])
    task = get_task(name)
    if name not in templates:
        raise ValueError(f"there is no template for task {name!r}; there are some for {', '.join(sorted(templates))}")
    return Source(name, {"task": name, "split": split}, data.load_rows(task, where, split), _forms(templates[name]))


def _forms(templates: Sequence[Template]) -> list[tuple[str | None, Callable[[Row], Words | None]]]:
    def words(template: Template, row: Row) -> Words | None:
        rendered = template.render(row)
        return _full(Words(rendered.input, "", rendered.target))

    return [(t.name, lambda row, t=t: words(t, row)) for t in templates]


def _full(words: Words) -> Words | None:
    return words if words.instruction and words.output else None


def words_of(row: Mapping[str, Any], where: str = "row") -> list[Words]:
    """The instructions of a row, whose columns are one of `FORMS`, `input` beside them or not.

    Of `instances`, as Self-Instruct's seed tasks have them, each is one; Alpaca's frame around a prompt is taken off.

    >>> words_of({"prompt": "Name a bird.", "answer": "Wren"})
    [Words(instruction='Name a bird.', input='', output='Wren')]

    Raises:
      ValueError: other columns, or what should be a text is none.
    """
    form = next((f for f in FORMS if all(c in row for c in f)), None)
    if form is None:
        forms = " or ".join("/".join(f) for f in FORMS)
        raise ValueError(f"{where}: expected the columns {forms}; there are: {', '.join(row)}")
    first, last = form
    pairs = [(row.get("input"), row[last])]
    if last == "instances":
        try:
            pairs = [(x.get("input"), x["output"]) for x in row[last]]
        except (TypeError, KeyError, AttributeError):
            raise ValueError(f"{where}: `instances` must be a list of objects with `output` and `input`") from None
    out = []
    for given, answer in pairs:
        words = Words(row[first], given or "", answer)
        if not all(isinstance(text, str) for text in words):
            raise ValueError(f"{where}: expected texts in {first}, input and {last}; got {tuple(words)!r:.120}")
        framed = _FRAME.fullmatch(words.instruction)
        if framed:
            words = words._replace(instruction=framed["instruction"], input=framed["input"] or words.input)
        out.append(Words(*(text.strip() for text in words)))
    return out


def shares(sizes: Sequence[int], cap: int, temperature: float = 1.0, number: int | None = None) -> list[int]:
    """How many examples each task gives: rates `r ∝ min(n, K)^(1/T)`, examples-proportional mixing with a limit.

    Raffel et al. 2019 (arXiv:1910.10683, section 3.5.2); Flan takes T = 1 and K = 3000.

    Args:
      sizes: rows of each task, n.
      cap: K.
      temperature: T; 1 is proportional, the larger it is the more equal are the shares.
      number: of examples in all; default: `Σ min(n, K)`.

    >>> shares([100, 50, 9000], cap=3000)
    [100, 50, 3000]
    >>> shares([100, 10_000], cap=400, temperature=2, number=30)
    [10, 20]
    """
    if cap < 1 or temperature <= 0 or (number is not None and number < 1):
        raise ValueError(
            f"expected a cap and a number of at least 1 and a temperature above 0; got {cap}, {number}, {temperature}"
        )
    held = np.minimum(np.array(sizes, float), cap)
    total = int(held.sum()) if number is None else number
    exact = held ** (1 / temperature)
    exact *= total / exact.sum()
    counts = np.floor(exact + 1e-9).astype(int)
    most = np.argsort(-(exact - counts), kind="stable")[: total - counts.sum()]  # the largest remainders
    counts[most] += 1
    return counts.tolist()


def mix(sources: Sequence[Source], counts: Sequence[int], seed: int = 0) -> Iterator[dict]:
    """The lines of the mixture, shuffled: `instruction`, `input`, `output` and `source`.

    Every row of a source comes once before one comes twice, and the templates take turns; a row that comes again has
    another template, until all pairs are used up. What a source gives depends on `seed` and its name alone.

    Raises:
      ValueError: at once, a template fails on the first row of its task; later, on another.
    """
    for source in sources:
        for form in source.forms:
            _words(source, 0, form)
    order = np.repeat(np.arange(len(sources)), counts)
    np.random.default_rng(seed).shuffle(order)
    drawn = [_draw(source, np.random.default_rng((seed, zlib.crc32(source.name.encode())))) for source in sources]
    return (next(drawn[i]) for i in order)


def _draw(source: Source, rng: np.random.Generator) -> Iterator[dict]:
    forms, turn = source.forms, itertools.count()
    while True:  # as often as there are pairs, and again
        had: list[set] = [set() for _ in source.rows]
        nothing = found = True
        while found:
            found = False
            for i in rng.permutation(len(source.rows)).tolist():
                first = next(turn)
                for form in (forms[k] for k in _turns(first % len(forms), len(forms), rng)):
                    if form[0] in had[i]:
                        continue
                    had[i].add(form[0])
                    words = _words(source, i, form)
                    if words is not None:
                        found, nothing = True, False
                        template = {} if form[0] is None else {"template": form[0]}
                        yield words._asdict() | {"source": {**source.origin, "row": i, **template}}
                        break
        if nothing:
            raise ValueError(f"task {source.name!r}: no template gives an input and a target for any of its rows")


def _turns(first: int, n: int, rng: np.random.Generator) -> Iterator[int]:
    yield first
    yield from rng.permutation(n).tolist()  # where it does not apply, any other


def _words(source: Source, i: int, form: tuple[str | None, Callable[[Row], Words | None]]) -> Words | None:
    try:
        return form[1](source.rows[i])
    except ValueError as e:
        where = ", ".join(f"{k} {v}" for k, v in source.origin.items())
        raise ValueError(f"{where}, row {i}: {e}") from None


class Lengths(NamedTuple):
    """Of the lines of one template, in words."""

    lines: int
    inputs: float
    outputs: float
    longest: int


def from_templates(
    out: Path,
    tasks: Mapping[str, str | None],
    *,
    split: str = "train",
    templates: Path | None = None,
    cap: int = 3000,
    temperature: float = 1.0,
    number: int | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], Lengths]:
    """Writes the mixture of the tasks and counts it by task and template.

    Args:
      out: the JSONL file; after an error it holds the lines before it.
      tasks: name -> folder, file or data set; None: the task's own.
      templates: YAML file (`templates.read_templates`); a task in it has these templates instead of its own.
      split, cap, temperature, number, seed: see `read_source`, `shares` and `mix`.
    """
    table = dict(TEMPLATES) | (read_templates(templates) if templates is not None else {})
    sources = [read_source(name, where, split, table) for name, where in tasks.items()]
    lines = mix(sources, shares([len(s.rows) for s in sources], cap, temperature, number), seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    sizes = defaultdict(list)
    with out.open("w", encoding="utf-8") as file:
        try:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                key = (line["source"]["task"], line["source"].get("template", "-"))
                given = len(line["instruction"].split()) + len(line["input"].split())
                sizes[key].append((given, len(line["output"].split())))
        except ValueError as e:
            written = sum(map(len, sizes.values()))
            raise ValueError(f"{e}; the {written} lines before it are in {out}") from None
    return {
        key: Lengths(len(x), float(np.mean([a for a, _ in x])), float(np.mean([b for _, b in x])), max(map(sum, x)))
        for key, x in sorted(sizes.items())
    }


def lengths_table(found: Mapping[tuple[str, str], Lengths]) -> Table:
    """Rows by task and template: lines, mean words of input and output, the longest of both."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "template", "lines", "words in", "words out", "longest"):
        table.add_column(column, justify="left" if column in ("task", "template") else "right")
    totals = Counter()
    for (task, template), x in found.items():
        totals[task] += x.lines
        table.add_row(task, template, f"{x.lines}", f"{x.inputs:.1f}", f"{x.outputs:.1f}", f"{x.longest}")
    table.add_section()
    for task, lines in totals.items():
        table.add_row(task, "all", f"{lines}", "", "", "")
    return table


def parse_tasks(text: str) -> dict[str, str | None]:
    """Name -> source.

    >>> parse_tasks("sst2=data/sst2, places")
    {'sst2': 'data/sst2', 'places': None}
    """
    out: dict[str, str | None] = {}
    for item in filter(None, (x.strip() for x in text.split(","))):
        name, given, where = (x.strip() for x in item.partition("="))
        if not name or (given and not where) or name in out:
            raise ValueError(f"cannot read {item!r} in the tasks {text!r}; write each once, as sst2=FOLDER,places")
        out[name] = where or None
    if not out:
        raise ValueError("no task is named; write sst2=FOLDER,places")
    return out
