"""The progress bar of a run: step, loss, tokens a second, time left."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def watch(console: Console, title: str) -> Iterator[Callable[[dict], None]]:
    """Gives a function to call with each record of `peftjax.loop.fit`; an evaluation becomes a line."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        row = bar.add_task(title, total=None, said="compiling")
        recent: list[tuple[float, int]] = []

        def report(record: dict) -> None:
            if "eval" in record:
                scores = ", ".join(f"{k} {v:.4g}" for k, v in record["eval"].items())
                said = f"{title} step {record['step']}: {scores}"
                console.print(said, style="dim", highlight=False, markup=False, soft_wrap=True)
                return
            recent.append((time.perf_counter(), record["tokens"]))
            del recent[:-20]
            span = recent[-1][0] - recent[0][0]
            speed = sum(n for _, n in recent[1:]) / span if span else 0
            left = record["time_left"]
            said = f"loss {record['loss']:.3f}  {speed:,.0f} tokens/s  {int(left // 60)}:{int(left % 60):02d} left"
            bar.update(row, total=record["total"], completed=record["step"], said=said)

        yield report
