"""Sweeps as jobs: what sbatch gets, by a stand-in for it; two processes of submitit's local executor; bad input."""

import json
import os
import pickle
import shlex
import time
from pathlib import Path

import pytest
import tiny

from peftjax.launch import Shard, launch, shards

pytest.importorskip("submitit")


@pytest.fixture
def grid(tmp_path):
    """Two methods on a tiny model: one run for each of two jobs."""
    model = tiny.folder(tmp_path / "bert", "bert")
    settings = {"steps": 2, "batch_size": 8}
    tasks = {"rte": str(tiny.data(tmp_path / "rte", "rte"))}
    file = tmp_path / "small.yaml"
    said = {"models": {"bert": str(model)}, "tasks": tasks, "methods": ["bitfit", "head"], "settings": settings}
    file.write_text(json.dumps(said | {"options": {"max_buckets": 1}}))
    return file


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in on the PATH that says what Slurm says, and keeps the file that it got."""
    at = tmp_path / "bin"
    at.mkdir()
    (at / "srun").write_text("#!/bin/sh\n")
    (at / "sbatch").write_text(f"#!/bin/sh\ncp $1 {shlex.quote(str(at))}/got\necho Submitted batch job 4711\n")
    for name in ("srun", "sbatch"):
        (at / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{at}{os.pathsep}{os.environ['PATH']}")
    return at / "got"


def pickled(file):
    with file.open("rb") as f:
        return pickle.load(f)


def test_an_array_of_slurm(grid, tmp_path, call, sbatch):
    out = tmp_path / "out"
    how = ("--launch", "slurm", "--jobs", 2, "--launch-options", "partition=gpu,gpus_per_node=1,timeout_min=600")
    status, said, err = call("sweep", grid, "--out", out, *how, "--retry", "--lanes", 2, "--stale", 99)
    assert (status, err) == (0, "")
    assert "submitted: 4711_0, 4711_1" in said
    assert f"logs: {out}/launch" in said
    flags = dict(
        line.removeprefix("#SBATCH --").split("=") for line in sbatch.read_text().splitlines() if "#SBATCH" in line
    )
    want = {"array": "0-1%2", "partition": "gpu", "gpus-per-node": "1", "time": "600", "job-name": "peftjax"}
    assert want.items() <= flags.items()
    assert flags["signal"].startswith("USR")  # a while before the time is over
    assert "submitit.core._submit" in sbatch.read_text()
    jobs = sorted((out / "launch").glob("*_submitted.pkl"))
    assert [f.name for f in jobs] == [f"4711_{i}_submitted.pkl" for i in range(2)]
    (copy,) = (out / "launch").glob("small-*.yaml")
    assert copy.read_text() == grid.read_text()
    for i, file in enumerate(jobs):
        more = ("--stale=99.0", "--retry", "--lanes=2")
        assert pickled(file).function == Shard((str(copy), "--out", str(out), "--shard", f"{i + 1}/2", *more))
        assert pickled(file)._timeout_countdown == 1000


def test_a_process_here_makes_its_shard(grid, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr("peftjax.launch.shards", lambda *args: shards(*args)[1:])  # one of the two: it costs seconds
    (job,), logs = launch(grid, tmp_path / "out", cluster="local", jobs=2)
    grid.write_text("changed: meanwhile")
    deadline = time.monotonic() + 300
    while not job.done() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job.exception() is None, job.stderr()
    assert "1 runs are over, 0 of them failed" in (logs / f"{job.job_id}_0_log.out").read_text()
    (record,) = (json.loads(f.read_text()) for f in (tmp_path / "out/runs").glob("*/record.json"))
    assert (record["method"], record["kind"]) == ("head", "run")


def test_what_is_out_of_time_is_queued_again_as_it_was(tmp_path):
    """submitit's protocol, by its own handler: what would be queued is the same shard."""
    from submitit.core.job_environment import _checkpoint
    from submitit.core.utils import DelayedSubmission

    file = tmp_path / "submitted.pkl"
    shard = Shard(("g.yaml", "--shard", "1/2"))
    assert _checkpoint(DelayedSubmission(shard), file, countdown=7) == ""
    assert pickled(file).function == shard
    assert pickled(file)._timeout_countdown == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--launch slurm --shard 1/2", "leave --shard out"),
        ("--launch slurm", "cannot launch by slurm: Could not detect"),
        ("--launch local --jobs 0", "jobs must be at least 1; got 0"),
        ("--launch local --jobs 3", "3 shards are more than this grid can fill"),
        ("--launch local --launch-options partition", "cannot read the launch option 'partition'; write partition=gpu"),
        ("--launch local --launch-options partitoin=gpu", "cannot launch by local: Unknown argument 'partitoin'"),
        ("--jobs 8", "--jobs and --launch-options are for --launch slurm or local"),
    ],
)
def test_bad_input(arguments, said, grid, tmp_path, call, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("peftjax.sweep.sweep", lambda *args, **how: pytest.fail("it went on"))
    monkeypatch.setattr("subprocess.Popen", lambda *args, **how: pytest.fail("it started something"))
    status, _, err = call("sweep", grid, "--out", tmp_path / "out", *arguments.split())
    assert status == 1
    assert said in err
    assert err.count("\n") == 1


def test_without_submitit(grid, tmp_path, call, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = call("sweep", grid, "--out", tmp_path / "out", "--launch", "local")
    assert status == 1
    assert "pip install 'peftjax[slurm]'" in err
