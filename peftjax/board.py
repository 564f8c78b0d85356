"""How a sweep goes: a table of methods by tasks, what trains now, and the time that is left."""

import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .grid import SEARCH, Cell, Grid, methods_of


class Board:
    """Shows a sweep on a terminal, live; elsewhere, a line for each run that is over.

    Args:
      console: where; default: standard output.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(width=None if sys.stdout.isatty() else 120)
        self.now, self.far, self.body = "", "", Table()
        live = {"console": self.console, "refresh_per_second": 2, "get_renderable": self._render}
        self.live = Live(**live) if self.console.is_terminal else None

    def __enter__(self) -> "Board":
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, grid: Grid, records: Mapping[str, dict], tasks: Sequence, workers: int) -> None:
        """Takes in what is done and what is left, `tasks` being those of this process that can be named by now."""
        self.body = table(grid, records, tasks)
        left = [t for t in tasks if t.cell.key not in records]
        failed = sum(r["kind"] == "failed" for t in tasks if (r := records.get(t.cell.key)))
        said = f"{len(tasks) - len(left)} of {len(tasks)} runs are over" + (f", {failed} failed" if failed else "")
        seconds = time_left(records, [t.cell for t in left]) / max(workers, 1)
        before, self.far = self.far, said + (f"; about {clock(seconds)} left" if seconds else "")
        if self.live is None and left and self.far != before:  # not again while it waits for others
            self.say(self.far)

    @contextlib.contextmanager
    def watch(self, cells: Sequence[Cell]) -> Iterator[Callable[[dict], None]]:
        """Gives a function to call with each record of `peftjax.loop.fit_together`."""
        first, began = cells[0], time.perf_counter()
        several = f", {len(cells)} runs" if len(cells) > 1 else f", seed {first.seed}"
        title = f"{first.model}, {first.task}, {first.method}{several}"
        self.now = f"{title}: compiling"

        def note(record: dict) -> None:
            if "loss" not in record:
                return
            at = f"step {record['step']} of {record['total']}, loss {record['loss']:.3f}"
            self.now = f"{title}: {at}, {clock(time.perf_counter() - began)} so far, {clock(record['time_left'])} left"

        yield note
        self.now = ""

    def _render(self) -> Group:
        return Group(self.body, *(Text(line, overflow="ellipsis", no_wrap=True) for line in (self.far, self.now)))


def table(grid: Grid, records: Mapping[str, dict], tasks: Sequence) -> Table:
    """Methods by tasks: runs that are over of those that are wanted, trials of a search apart."""
    several = len(grid.models) > 1
    out = Table(title=grid.title or None, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    out.add_column("method", overflow="fold")
    columns = [(model, task) for model in grid.models for task in grid.tasks]
    for model, task in columns:
        out.add_column(f"{model}\n{task}" if several else task, justify="right")
    for method in methods_of(grid):
        mine = [t for t in tasks if t.cell.method == method]
        if mine:
            out.add_row(Text(method), *(_count(records, [t for t in mine if _in(t, *c)]) for c in columns))
    return out


def _in(task, model: str, name: str) -> bool:
    return task.cell.model == model and task.cell.task == name


def _count(records: Mapping[str, dict], tasks: Iterable) -> Text:
    said = Text()
    for is_trial in (True, False):
        there = [records.get(t.cell.key) for t in tasks if (t.stage == SEARCH) == is_trial]
        if there:
            over, failed = sum(r is not None for r in there), any(r and r["kind"] == "failed" for r in there)
            style = "red" if failed else "green" if over == len(there) else ""
            said.append(" " if said else "").append(f"{over}/{len(there)}", style=f"{style} dim" if is_trial else style)
    return said


def time_left(records: Mapping[str, dict], cells: Iterable[Cell]) -> float:
    """Seconds that the runs will take, each as long as its likes took: of its task and method, its task, or any."""
    done = [r for r in records.values() if r["kind"] == "run"]

    def mean(fits: Callable[[dict], bool]) -> float:
        return statistics.fmean(x) if (x := [r["seconds"] for r in done if fits(r)]) else 0.0

    def of(cell: Cell) -> float:
        here = mean(lambda r: (r["model"], r["task"], r["method"]) == (cell.model, cell.task, cell.method))
        return here or mean(lambda r: (r["model"], r["task"]) == (cell.model, cell.task)) or mean(lambda r: True)

    return sum(of(cell) for cell in cells)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3723), clock(83)
    ('1:02:03', '1:23')
    """
    minutes, s = divmod(int(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}" if h else f"{m}:{s:02d}"
