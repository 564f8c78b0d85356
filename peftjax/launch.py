"""A sweep as jobs of a cluster: an array under Slurm, or processes on this machine, by submitit.

Each of n jobs makes the same sweep with `--shard i/n`. The grid is copied when the jobs are submitted, so editing the
file changes no job that still waits. A job that reaches its time limit, or is preempted, is queued again and goes on
from its newest training state.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import write_atomically
from .grid import read
from .sweep import check_shards

REQUEUED = 1000  # times that a job may reach its time limit
MINUTES = 24 * 60  # of a job, unless it is said
GENERAL = ("name", "nodes", "tasks_per_node", "cpus_per_task", "mem_gb", "timeout_min", "stderr_to_stdout")
GENERAL += ("gpus_per_node",)  # submitit's parameters for any cluster; all others are Slurm's own


class Shard(NamedTuple):
    """What a job does: `peftjax sweep` with these arguments."""

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        from .cli import main

        main(["sweep", *self.arguments])

    def checkpoint(self) -> Any:
        """What submitit queues again when the job is out of time: the same, as a sweep goes on where it was."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def shards(grid: Path, out: Path, jobs: int, more: Sequence[str] = ()) -> list[Shard]:
    """One for each job.

    >>> shards(Path("/g.yaml"), Path("/out"), 2, ["--retry"])[1].arguments
    ('/g.yaml', '--out', '/out', '--shard', '2/2', '--retry')
    """
    return [Shard((str(grid), "--out", str(out), "--shard", f"{i + 1}/{jobs}", *more)) for i in range(jobs)]


def options(text: str) -> dict[str, Any]:
    """Reads `name=value` pairs with commas between them; whole numbers and true or false as such.

    Raises:
      ValueError: a pair is none.

    >>> options("partition=gpu,gpus_per_node=1,exclusive=true,time=1-00:00:00")
    {'partition': 'gpu', 'gpus_per_node': 1, 'exclusive': True, 'time': '1-00:00:00'}
    """
    found: dict[str, Any] = {}
    for item in filter(None, map(str.strip, text.split(","))):
        name, equals, value = (x.strip() for x in item.partition("="))
        if not (name and equals and value):
            raise ValueError(f"cannot read the launch option {item!r}; write partition=gpu,gpus_per_node=1")
        found[name] = {"true": True, "false": False}.get(value, int(value) if value.isdigit() else value)
    return found


def executor(cluster: str, folder: Path, parameters: Mapping[str, Any]) -> Any:
    """submitit's executor with its parameters: `GENERAL` ones, and Slurm's by the names that sbatch has for them.

    Raises:
      ValueError: submitit is not installed, there is no Slurm here, or a parameter is unknown.
    """
    if importlib.util.find_spec("submitit") is None:
        raise ValueError("a launcher needs the package submitit; run: pip install 'peftjax[slurm]'")
    import submitit

    given = {k if k in GENERAL or k.startswith("slurm_") else f"slurm_{k}": v for k, v in parameters.items()}
    try:
        made = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=REQUEUED, local_max_num_timeout=REQUEUED)
        made.update_parameters(**{"name": "peftjax", "timeout_min": MINUTES, **given})
    except (RuntimeError, NameError, TypeError, ValueError, AssertionError) as e:
        raise ValueError(f"cannot launch by {cluster}: {' '.join(str(e).split())}") from e
    return made


def launch(
    grid: str | Path,
    out: str | Path,
    *,
    cluster: str,
    jobs: int,
    parameters: Mapping[str, Any] | None = None,
    more: Sequence[str] = (),
) -> tuple[list[Any], Path]:
    """Submits the jobs of a sweep.

    Args:
      grid: YAML file.
      out: the folder of the runs, which all jobs must see.
      cluster: 'slurm', or 'local' for processes on this machine, which outlive this one.
      jobs: how many.
      parameters: of the jobs (`executor`).
      more: further arguments of `peftjax sweep`.

    Returns:
      submitit's jobs, and the folder with their logs (`JOB_0_log.out` and `.err`).

    Raises:
      ValueError: as `executor`; jobs below 1, or more than the grid has shards.
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1; got {jobs}")
    check_shards(read(grid), jobs)
    folder = Path(out).resolve() / "launch"
    made = executor(cluster, folder, parameters or {})
    text = Path(grid).read_text()
    copy = folder / f"{Path(grid).stem}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(copy, text)
    with made.batch():
        submitted = [made.submit(shard) for shard in shards(copy, folder.parent, jobs, more)]
    return submitted, folder
