"""Where a run's numbers go besides `log.jsonl`: TensorBoard, Weights & Biases.

A logger is made for each run when its training begins, from the run's folder, its configuration and the records that
it has already: those up to the state that it resumes from. It takes them again, so a run that was cut off has each
step once, also where the logger was not asked for at first. A new logger is a function like `tensorboard` and a line in
`LOGGERS`.
"""

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .loop import Logger
from .run import Open, short_hash

FLUSH = 10.0  # seconds between two writes to the disk, each of which waits for it


def scalars(record: dict) -> dict[str, float]:
    """A record's numbers by name.

    >>> scalars({"step": 3, "eval": {"loss": 0.5, "accuracy": 75.0}})
    {'eval/loss': 0.5, 'eval/accuracy': 75.0}
    >>> scalars({"step": 3, "loss": 0.5, "grad_norm": 1.5})
    {'loss': 0.5, 'grad_norm': 1.5}
    """
    scores = {f"eval/{name}": value for name, value in record.get("eval", {}).items()}
    return {k: v for k, v in record.items() if k not in ("step", "eval")} | scores


def tensorboard(folder: Path, config: dict, records: Sequence[dict], *, group: str) -> Logger:
    """Event files in the folder `tensorboard` beside the log.

    The first event of a file is a session's start at step 0, by which TensorBoard drops what earlier files hold.
    tensorboardX's own `SummaryWriter` writes in a thread, and the training would wait for it for ever once a full disk
    has ended that; this writes in ours.
    """
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    proto: Any = event_pb2  # whose names are made when it runs
    place = folder / "tensorboard"
    place.mkdir(parents=True, exist_ok=True)
    writer = EventsWriter(str(place / "events"))
    begun = proto.SessionLog(status=proto.SessionLog.START)
    writer.write_event(proto.Event(wall_time=time.time(), step=0, session_log=begun))
    flushed = time.monotonic()

    def add(record: dict) -> None:
        nonlocal flushed
        for name, value in scalars(record).items():
            event = proto.Event(wall_time=time.time(), step=record["step"], summary=scalar(name, value))
            writer.write_event(event)
        if "eval" in record or time.monotonic() - flushed > FLUSH:
            writer.flush()
            flushed = time.monotonic()

    for record in records:
        add(record)
    writer.flush()
    return Logger(add, writer.close)


def wandb(folder: Path, config: dict, records: Sequence[dict], *, group: str) -> Logger:
    """A run of Weights & Biases, named as the run's folder; mode, account and all else are by WANDB_* variables.

    Its id follows from its names and configuration, so a run that resumes goes on in it, and what W&B has already is
    not sent again. Offline, where it cannot know, the newest folder has everything, and only that is to be synced.
    """
    import wandb as wb  # the package; not this function

    run = wb.init(
        project=os.environ.get("WANDB_PROJECT", "peftjax"),
        dir=os.environ.get("WANDB_DIR", str(folder)),
        id=short_hash({"group": group, "run": folder.name, "config": config}),
        group=group,
        name=folder.name,
        config=config,
        resume="allow",
        reinit="create_new",  # the runs of a program are open side by side
        settings=wb.Settings(console="off"),
    )
    first = run.step

    def add(record: dict) -> None:
        if record["step"] >= first:
            run.log(scalars(record), step=record["step"])

    for record in records:
        add(record)
    return Logger(add, run.finish)


class Known(NamedTuple):
    """A logger by name: the function that makes one, and the package that it needs."""

    make: Callable[..., Logger]
    package: str


LOGGERS = {"tensorboard": Known(tensorboard, "tensorboardX"), "wandb": Known(wandb, "wandb")}


def openers(text: str, out: str | Path, say: Callable[[str], Any] = print) -> list[Open]:
    """What makes the loggers of a run, for `peftjax.run.run_together`; nothing is opened yet.

    Args:
      text: names separated by commas, as on the command line; empty: none.
      out: the output folder, whose name groups its runs.
      say: called with one line when a logger fails, which then stops; the training goes on.

    Raises:
      ValueError: there is no such logger, or its package is not installed.

    >>> openers("tensorbord", "runs/rte")
    Traceback (most recent call last):
    ValueError: there is no logger 'tensorbord'; the loggers are tensorboard, wandb, and log.jsonl is always written
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in LOGGERS:
            known = ", ".join(LOGGERS)
            raise ValueError(f"there is no logger {name!r}; the loggers are {known}, and log.jsonl is always written")
        package = LOGGERS[name].package
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:  # a folder of that name, such as W&B leaves, is no package
            raise ValueError(f"the logger {name} needs the package {package}; run: pip install 'peftjax[{name}]'")
    group = Path(out).resolve().name
    return [careful(name, functools.partial(LOGGERS[name].make, group=group), say) for name in names]


def careful(name: str, make: Open, say: Callable[[str], Any]) -> Open:
    """The logger that an error ends, and not the training: one line says so."""

    def opened(folder: Path, config: dict, records: Sequence[dict]) -> Logger:
        going: list[Logger] = []

        def attempt(act: Callable, *arguments: Any) -> Any:
            try:
                return act(*arguments)
            except Exception as e:
                going.clear()
                why = " ".join(f"{type(e).__name__}: {e}".split())
                say(f"{name} stops for {folder} ({why}); the training goes on, and log.jsonl has everything")

        if (logger := attempt(make, folder, config, records)) is not None:
            going.append(logger)
        return Logger(lambda record: [attempt(x.add, record) for x in going], lambda: [attempt(x.close) for x in going])

    return opened
