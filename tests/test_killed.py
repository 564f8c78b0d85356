"""A sweep that is killed, quickly; `experiments/killed_sweep.py` is the long way."""

import json
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
from conftest import experiment

from peftjax import grid as grids, run as runs
from peftjax.claims import Claims
from peftjax.grid import Search
from peftjax.problem import Evaluator
from peftjax.run import Job, entries_for, run_together
from peftjax.sweep import _claim, sweep
from peftjax.train import Settings

killed = experiment("killed_sweep")
BROKEN = "ia3(targets=['nothing'])"


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """A search, two seeds in one program, and a method that cannot be built."""
    settings = {"steps": 60, "batch_size": 8, "eval_every": 20, "save_every": 5}
    methods, search = ("bitfit", BROKEN), Search(factors=(0.1, 0.3))
    return killed.write(tmp_path_factory.mktemp("grid"), methods=methods, seeds=2, search=search, settings=settings)


@pytest.fixture(scope="module")
def undisturbed(grid, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    sweep(grids.read(grid), out)
    return out


def test_a_killed_sweep_ends_as_an_undisturbed_one(grid, undisturbed, tmp_path):
    """One process, killed; two, of which one is killed and the other goes on."""
    kills = killed.disturb(grid, tmp_path / "out", killed.How(kills=2, moments=(5.0, 9.0)))
    assert [k["others"] for k in kills] == [0, 1]
    assert not kills[0]["was_over"]  # of the second kill that would be no error, on a quick machine
    facts = killed.compare(tmp_path / "out", undisturbed)
    assert (facts["runs"], facts["failed"]) == (4, 2)


def test_a_run_that_was_cut_off_in_two_programs_has_a_whole_log(tmp_path):
    """In one with another, then alone, then with the other again: the log is of the state that it goes on from."""
    problem = tiny.problem(tmp_path, "bert", "rte", max_buckets=1)
    (entry,) = entries_for("bitfit", problem.model)
    settings = [Settings(batch_size=8, steps=9, save_every=2, seed=i) for i in range(2)]
    jobs = [Job(problem, entry, s, tmp_path / "runs" / str(i)) for i, s in enumerate(settings)]
    evaluator = Evaluator(problem)

    def train(jobs, cut_at=None):
        def report(record):
            if record["step"] == cut_at:
                raise RuntimeError("cut")

        run_together(jobs, evaluator=evaluator, report=report)

    for some, step in ((jobs, 7), (jobs[:1], 5)):
        with pytest.raises(RuntimeError, match="cut"):
            train(some, step)
    train(jobs)
    for job in jobs:
        assert killed.steps(tmp_path, job.folder.name) == [*range(1, 10)]
    assert not [*tmp_path.glob("runs/together-*"), *tmp_path.glob("runs/*/state")]


def test_a_group_that_another_process_is_claiming_is_left_to_it(tmp_path):
    groups = [[SimpleNamespace(cell=SimpleNamespace(key=k)) for k in group] for group in ("abc", "de")]
    with Claims(tmp_path) as ours, Claims(tmp_path) as theirs:
        theirs.take("a")
        theirs.take("e")
        got = _claim(groups, ours, tmp_path, {})  # pyright: ignore[reportArgumentType] - all that it looks at
        assert [task.cell.key for task in got] == ["d"]
        assert [*ours.held] == ["d"]


def test_a_program_of_another_process_may_end_meanwhile(tmp_path, monkeypatch):
    """Its folder goes between the look and the reading."""
    file, read = tmp_path / "together-1/runs.json", runs._read_json
    file.parent.mkdir()
    file.write_text(json.dumps(["theirs"]))

    def late(file):
        shutil.rmtree(file.parent, ignore_errors=True)
        return read(file)

    monkeypatch.setattr(runs, "_read_json", late)
    job: Any = SimpleNamespace(folder=tmp_path / "ours")
    runs._drop_other_states([job], job.folder)
    assert runs.cut_off([job]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: [r[0], *r], "one record for each configuration"),
        (lambda r: r[1:], "one record for each configuration"),
        (lambda r: [r[0] | {"kind": "failed"}, *r[1:]], "equal kinds"),
        (lambda r: [r[0] | {"scores": r[0]["scores"] | {"loss": 9.0}}, *r[1:]], "equal scores"),
        (lambda r: [r[0] | {"trainable": 1}, *r[1:]], "equal trained parameters"),
    ],
)
def test_what_is_wrong_is_found(change, said, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(killed.shutil, "copytree", lambda *args, **how: tmp_path)
    records = killed.lines(undisturbed)
    (tmp_path / "runs").symlink_to(undisturbed / "runs")
    (tmp_path / "claims").mkdir()
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert killed.compare(tmp_path, undisturbed)["equal_to_the_bit"] == 4
    changed = change(sorted(records, key=lambda r: r["kind"], reverse=True))
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
    with pytest.raises(ValueError, match=f"does not hold: .*{said}"):
        killed.compare(tmp_path, undisturbed)
