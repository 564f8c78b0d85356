"""Grids, claims and sweeps: which runs there are, who makes them, and what is left when something goes wrong."""

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from peftjax import grid as grids, sweep as sweeps
from peftjax.board import Board
from peftjax.claims import Claims
from peftjax.grid import Grid, Rule, Search, from_json, methods_of, number_of_runs, read, to_json, trials
from peftjax.sweep import gather, sweep, winner

QUICK = {"steps": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    at = tmp_path_factory.mktemp("sweep")
    tiny.folder(at / "bert", "bert")
    for task in ("rte", "stsb"):
        tiny.data(at / task, task)
    return at


def small(at, **changes) -> Grid:
    tasks = {"rte": str(at / "rte")}
    common = {"models": {"bert": str(at / "bert")}, "tasks": tasks, "settings": QUICK, "options": {"max_buckets": 1}}
    return Grid(**(common | {"methods": ("head", "lora(rank=2)")} | changes))


def records(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


# Grids


GRID = {
    "models": {"m": "folder/m"},
    "tasks": {"cola": "a", "stsb": "b"},
    "methods": ["full", "lora(alpha=4)", "lora+bitfit"],
    "ranks": [1, 2],
    "seeds": 3,
    "search": {"factors": ["1e-1", 1], "tasks": ["cola"]},
    "settings": {"epochs": 2},
}


def cells(grid, chosen=lambda search: (None, 1.0)):
    return [cell for cell, _ in grids.finals(grid, chosen)]


def test_the_product_and_the_search_before_it():
    grid = from_json(GRID)
    five = ["full", "lora(alpha=4, rank=1)", "lora(alpha=4, rank=2)", "lora(rank=1)+bitfit", "lora(rank=2)+bitfit"]
    assert methods_of(grid) == five
    assert number_of_runs(grid) == (5 * 2, 5 * 2 * 3)
    assert {c.task for s in trials(grid).values() for c in s.cells} == {"cola"}
    assert {c.seed for s in trials(grid).values() for c in s.cells} == {1000}  # no seed of the table
    assert [c.seed for c in cells(grid)][:3] == [0, 1, 2]
    each = from_json(GRID | {"search": {"factors": [1, 2, 3], "seeds": 2}})
    assert number_of_runs(each) == (5 * 2 * 3 * 2, 30)
    assert from_json(to_json(grid)) == grid


def test_rules_change_what_they_name_and_the_last_wins():
    rules = [
        {"methods": ["lora(alpha=4)"], "settings": {"learning_rate": "1e-3", "epochs": 5}},
        {"tasks": ["stsb"], "settings": {"epochs": 7}, "options": {"max_length": 64}},
    ]
    grid = from_json(GRID | {"rules": rules, "search": {"factors": [1]}})
    by = {(c.task, c.method): c for c in cells(grid)}
    assert by["cola", "full"].settings["epochs"] == 2
    assert by["cola", "lora(alpha=4, rank=2)"].settings["epochs"] == 5
    assert by["stsb", "lora(alpha=4, rank=2)"].settings["epochs"] == 7
    assert [by[t, "full"].options for t in ("cola", "stsb")] == [{}, {"max_length": 64}]
    assert by["stsb", "lora(alpha=4, rank=1)"].rate == 1e-3  # given, so not searched for
    assert {m for _, _, m in trials(grid)} == {"full", "lora(rank=1)+bitfit", "lora(rank=2)+bitfit"}


def test_rules_are_judged_with_what_they_add_to():
    """Alone, an update in the backward pass would meet the clipping that is the default."""
    grid = from_json(GRID | {"settings": {"clip": None}, "rules": [{"settings": {"update": "backward"}}]})
    assert cells(grid)[0].settings == {"clip": None, "update": "backward", "seed": 0}
    assert from_json(GRID | {"settings": {"clip": "1e-1"}}).settings["clip"] == 0.1  # as YAML reads it


@pytest.mark.parametrize("change", [{"options": {"eval_split": "test"}}, {"tasks": {"places": None}}])
def test_no_rate_is_chosen_on_the_test_split(change):
    grid = from_json(GRID | {"search": {"factors": [1]}} | change)
    assert {c.options["eval_split"] for s in trials(grid).values() for c in s.cells} == {"dev"}
    assert {c.options.get("eval_split", "test") for c in cells(grid)} == {"test"}


def test_rates_of_an_ablation_are_all_run():
    grid = from_json(GRID | {"search": None, "rates": ["1e-3", 0.01]})
    assert [c.rate for c in cells(grid)[:6]] == [1e-3] * 3 + [1e-2] * 3
    assert number_of_runs(grid) == (0, 5 * 2 * 2 * 3)


def test_a_key_is_of_the_configuration_and_not_of_paths():
    key = cells(from_json(GRID))[0].key
    assert cells(from_json(GRID | {"models": {"m": "elsewhere"}, "tasks": {"cola": "x", "stsb": None}}))[0].key == key
    others = [{"settings": {"epochs": 3}}, {"models": {"n": "folder/m"}}, {"options": {"train_limit": 5}}]
    assert len({key, *(cells(from_json(GRID | change))[0].key for change in others)}) == 4
    assert len({c.key for c in cells(from_json(GRID))}) == 30


def test_yaml_is_read(tmp_path):
    file = tmp_path / "g.yaml"
    file.write_text("models: [a/minilm]\ntasks: [places]\nmethods: lora\nrates: [1e-3]\nseeds: 2\n")
    grid = read(file)
    assert (grid.models, grid.tasks) == ({"minilm": "a/minilm"}, {"places": None})
    assert (grid.methods, grid.rates) == (("lora",), (1e-3,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"methods": []}, "needs models, tasks and methods"),
        ({"methods": ["lorra"]}, "there is no method 'lorra'"),
        ({"methods": ["lora, full"]}, "one by one"),
        ({"tasks": {"colla": None}}, "did you mean 'cola'"),
        ({"seeds": 0}, "at least 1; got 0"),
        ({"ranks": [0]}, "ranks must be whole numbers"),
        ({"methods": ["full"], "baseline": None}, "none of the methods full has a rank"),
        ({"settings": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"settings": {"seed": 3}}, "write seeds"),
        ({"settings": {"epochs": 0}}, "epochs must be at least 1"),
        ({"options": {"train_limits": 3}}, "did you mean 'train_limit'"),
        ({"rules": [{"tasks": ["sst2"]}]}, "none of the tasks cola, stsb"),
        ({"rules": [{"methods": ["ia3"]}]}, "a rule is for ia3"),
        ({"rules": [{"method": ["lora"]}]}, "did you mean 'methods'"),
        ({"search": {"rates": {"full": [1e-5]}}}, "the same number of trials"),
        ({"search": {"tasks": ["rte"]}}, "none of the tasks cola, stsb"),
        ({"search": {"factors": ["many"]}}, "must be numbers; got"),
        ({"rates": [1e-3]}, "either rates"),
        ({"baseline": "ia3"}, "the baseline 'ia3' is none"),
        ({"models": None}, "models of the grid must be names with values"),
        ({"method": ["full"]}, "did you mean 'methods'"),
        ({"seeds": "3"}, "seeds of the grid must be a whole number; got '3'"),
        ({"settings": {"epochs": 2.5}}, "epochs must be a whole number; got 2.5"),
        ({"settings": {"epochs": "2"}}, "epochs must be a whole number; got '2'"),
        ({"options": None}, "options of the grid must be names with values"),
        ({"rules": 3}, "rules must map"),
        ({"tasks": ["cola", 3]}, "tasks map names to folders or hub names; got 3"),
        ({"models": ["a/x", "b/x"]}, "two models have the name 'x'"),
        ({"search": None, "rates": [-1]}, "learning_rate must be a number above 0; got -1"),
        ({"search": {"factors": [0]}}, "must be numbers above 0; got 0.0"),
        ({"search": {"rates": [5]}}, "rates of search must be names with values"),
        (
            {"settings": {"batch_size": 8}, "rules": [{"tasks": ["stsb"], "settings": {"accumulate": 16}}]},
            "the settings of m, stsb, full cannot be: batch_size 8 does not divide",
        ),
    ],
)
def test_what_cannot_be_is_said(change, said):
    with pytest.raises(ValueError, match=said):
        from_json(GRID | change)


# Claims


def test_one_of_many_gets_a_claim(tmp_path):
    barrier, won = threading.Barrier(8), []
    everyone = [Claims(tmp_path) for _ in range(8)]

    def reach(claims):
        barrier.wait()
        for key in "abcdefgh":
            if claims.take(key):
                won.append(key)

    threads = [threading.Thread(target=reach, args=(c,)) for c in everyone]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(won) == [*"abcdefgh"]


def test_what_is_given_back_can_be_taken(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.take("a")
    assert not theirs.take("a")
    assert ours.take("b")
    assert theirs.others({"a", "b", "c"}) == 1  # one process
    assert theirs.others({"c"}) == ours.others({"a", "b"}) == 0
    ours.release("a")
    assert theirs.take("a")
    assert not [*tmp_path.glob("a.1")]


def dead_claim(folder: Path) -> None:
    """Another process takes 'a' and is killed."""
    take = f"from peftjax.claims import Claims; assert Claims({str(folder)!r}).take('a')"
    code = f"import os; {take}; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9


def test_a_dead_processes_claim_passes_to_one_other_at_once(tmp_path):
    dead_claim(tmp_path)
    everyone, barrier, won = [Claims(tmp_path) for _ in range(6)], threading.Barrier(6), []

    def reach(claims):
        barrier.wait()
        won.append(claims.take("a"))

    threads = [threading.Thread(target=reach, args=(c,)) for c in everyone]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(won) == [False] * 5 + [True]


def test_a_claim_of_elsewhere_passes_when_it_was_not_touched_for_long(tmp_path):
    claim = tmp_path / "a.0"
    claim.write_text(json.dumps({"host": "far", "machine": "another boot", "pid": 1, "started": "5"}))
    ours = Claims(tmp_path, stale=100)
    assert not ours.take("a")
    os.utime(claim, (time.time() - 101,) * 2)
    assert ours.take("a")
    ours.release("a")
    assert not [*tmp_path.glob("a.*")]


def test_a_claim_is_touched_while_it_is_held(tmp_path):
    with Claims(tmp_path, stale=0.5) as ours:
        ours.take("a")
        old = time.time() - 1000
        os.utime(tmp_path / "a.0", (old, old))
        for _ in range(100):
            if (tmp_path / "a.0").stat().st_mtime > old + 1:
                break
            time.sleep(0.05)
        assert (tmp_path / "a.0").stat().st_mtime > old + 1


def test_who_slept_too_long_finds_out(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path, stale=1)
    ours.take("a")
    assert ours.lost() == []
    (tmp_path / "a.0").write_text("{}")  # of another machine, so that only the time counts
    os.utime(tmp_path / "a.0", (1, 1))
    assert theirs.take("a")
    assert ours.lost() == ["a"]
    ours.release("a")
    assert theirs.lost() == []


def test_who_slept_while_others_came_and_went_does_not_take_what_is_theirs(tmp_path):
    """Numbers begin anew when all is given back: a file of the same name is another claim."""
    ours, theirs, third = Claims(tmp_path), Claims(tmp_path, stale=1), Claims(tmp_path)
    ours.take("a")
    claim = json.loads((tmp_path / "a.0").read_text())
    (tmp_path / "a.0").write_text(json.dumps(claim | {"machine": "another boot"}))
    os.utime(tmp_path / "a.0", (1, 1))
    assert theirs.take("a")
    theirs.release("a")
    assert third.take("a")
    assert ours.lost() == ["a"]
    ours.release("a")
    assert third.lost() == []


# Sweeps


def test_a_search_and_its_table(at, tmp_path):
    tasks = {"rte": str(at / "rte"), "stsb": str(at / "stsb")}
    grid = small(at, tasks=tasks, seeds=2, search=Search(factors=(1.0, 30.0), tasks=("rte",)))
    found = sweep(grid, tmp_path)
    lines = [r for r in records(tmp_path) if r["kind"] == "run"]
    assert len({r["key"] for r in lines}) == len(lines) == len(found) == 2 * 2 + 2 * 2 * 2
    by = {(r["stage"], r["task"], r["method"], r["seed"], r["factor"]): r for r in lines}
    for method in ("head", "lora(rank=2)"):
        tried = {f: by["search", "rte", method, 1000, f] for f in (1.0, 30.0)}
        assert tried[30.0]["rate"] == pytest.approx(30 * tried[1.0]["rate"])
        best = max(tried, key=lambda f: (tried[f]["scores"]["accuracy"], -tried[f]["scores"]["loss"]))
        for task in tasks:
            assert by["final", task, method, 0, best]["rate"] == tried[best]["rate"]
            assert by["final", task, method, 0, best]["together"] == 2  # its seeds in one program
    first = by["search", "rte", "head", 1000, 1.0]
    assert first["config"]["settings"]["learning_rate"] == first["rate"]
    assert first["versions"].keys() >= {"jax", "optax", "python"}
    assert first["device"]["kind"] == "cpu"
    assert first["peak_bytes"] > 0 < first["seconds"]
    assert first["history"][-1]["eval"]["loss"] == pytest.approx(first["scores"]["loss"], rel=1e-4)


def test_what_is_done_is_not_made_again_nor_read(at, tmp_path, monkeypatch):
    grid = small(at)
    sweep(grid, tmp_path)
    before = (tmp_path / "results.jsonl").read_text()

    def refuse(*arguments, **options):
        raise AssertionError("a run was made again")

    monkeypatch.setattr(sweeps, "_make", refuse)
    assert len(sweep(grid, tmp_path)) == 2
    assert (tmp_path / "results.jsonl").read_text() == before


def test_grids_share_a_folder(at, tmp_path):
    sweep(small(at), tmp_path)
    both = sweep(small(at, methods=("lora(rank=2)", "bitfit"), title="more"), tmp_path)
    assert [r["method"] for r in both] == ["lora(rank=2)", "bitfit"]
    lines = records(tmp_path)
    assert sorted(r["method"] for r in lines if r["kind"] == "run") == ["bitfit", "head", "lora(rank=2)"]
    assert {r["title"] for r in lines if r["kind"] == "grid"} == {"", "more"}


def test_a_failure_is_recorded_and_the_rest_goes_on(at, tmp_path):
    rules = (Rule(methods=("head",), settings={"learning_rate": 1e38, "clip": None}),)
    grid = small(at, methods=("head", "lora(rank=999)", "bitfit"), rules=rules, seeds=2)
    found = {(r["method"], r["seed"]): r for r in sweep(grid, tmp_path)}
    assert len(found) == 6
    for seed in (0, 1):
        assert found["bitfit", seed]["kind"] == "run"
        assert "rank" in found["lora(rank=999)", seed]["error"]
        assert "Traceback" in found["lora(rank=999)", seed]["traceback"]
        assert "finite" in found["head", seed]["error"]
        assert found["head", seed]["attempts"] == 1
    again = {(r["method"], r["seed"]): r for r in sweep(grid, tmp_path)}
    assert again["head", 0]["attempts"] == 1  # not tried again unless asked
    again = {(r["method"], r["seed"]): r for r in sweep(grid, tmp_path, retry=True)}
    assert [again[m, 0].get("attempts") for m in ("head", "lora(rank=999)", "bitfit")] == [2, 2, None]
    lines = [r for r in records(tmp_path) if r["kind"] in ("run", "failed")]
    assert len({r["key"] for r in lines}) == len(lines) == 6


def test_one_of_a_program_that_cannot_be_leaves_the_others_alone(at, tmp_path):
    grid = small(at, methods=("lora(rank=2)", "lora(rank=999)"))  # one kind, so one program
    assert [r["kind"] for r in sweep(grid, tmp_path)] == ["run", "failed"]


def test_what_is_done_can_be_read_before_the_end(at, tmp_path, monkeypatch):
    make, made = sweeps._make, []

    def once(*arguments):
        if made:
            raise sweeps.Interrupted("Ctrl-C")
        made.append(make(*arguments))

    monkeypatch.setattr(sweeps, "_make", once)
    with pytest.raises(sweeps.Interrupted):
        sweep(small(at), tmp_path)
    assert [r["method"] for r in records(tmp_path) if r["kind"] == "run"] == ["head"]


def test_a_search_that_fails_altogether_has_no_table_and_does_not_stop_the_rest(at, tmp_path, monkeypatch):
    grid = small(at, methods=("lora(rank=2)", "head"), search=Search(factors=(1.0, 2.0)))
    set_up = sweeps.set_up

    def away(model, task, data, methods, *rest, **how):  # the disk, the hub: what is there again later
        if "lora" in methods:
            raise OSError("not there just now")
        return set_up(model, task, data, methods, *rest, **how)

    monkeypatch.setattr(sweeps, "set_up", away)
    found = sweep(grid, tmp_path)
    assert sorted((r["method"], r["kind"]) for r in found) == [("head", "run")] * 3 + [("lora(rank=2)", "failed")] * 2
    monkeypatch.undo()
    assert len(sweep(grid, tmp_path)) == 5  # no rate that was not searched for, also when it could be made by now
    lines = [r for r in sweep(grid, tmp_path, retry=True) if r["method"] == "lora(rank=2)"]
    assert [(r["stage"], r["kind"]) for r in lines] == [("search", "run")] * 2 + [("final", "run")]


def test_shards_make_all_runs_once(at, tmp_path):
    grid = small(at, methods=("head", "bitfit", "ia3"), seeds=1)
    parts = [{r["key"] for r in sweep(grid, tmp_path / str(i), shard=(i, 2))} for i in (1, 2)]
    assert [len(p) for p in parts] == [2, 1]
    assert {*parts[0]} | {*parts[1]} == {c.key for c in cells(grid)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"shard": (3, 2)}, "from 1 to n; got 3/2"),
        ({"shard": (3, 3)}, "3 shards are more than this grid can fill.*write at most 2"),
        ({"stale": 0}, "stale must be seconds above 0; got 0"),
        ({"lanes": 0}, "lanes must be at least 1; got 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_recorded(how, said, at, tmp_path):
    with pytest.raises(ValueError, match=said):
        sweep(small(at), tmp_path / "out", **how)
    assert not (tmp_path / "out").exists()


def test_what_is_recorded_while_the_results_are_written_is_in_them(tmp_path, monkeypatch):
    """Another process records its last run and gathers, between this one's look and its writing."""
    write = sweeps.write_atomically

    def record(key):
        facts = dict.fromkeys(("stage", "model", "task", "method", "rate", "seed"), "")
        sweeps._keep(tmp_path, {"kind": "run", "key": key, **facts})

    def late(file, text):
        monkeypatch.setattr(sweeps, "write_atomically", write)
        record("theirs")
        gather(tmp_path)
        write(file, text)

    record("ours")
    monkeypatch.setattr(sweeps, "write_atomically", late)
    assert sorted(line["key"] for line in gather(tmp_path)) == ["ours", "theirs"]
    assert sorted(line["key"] for line in records(tmp_path)) == ["ours", "theirs"]


def test_what_another_process_makes_is_waited_for(at, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "POLL", 0.05)
    grid = small(at, methods=("head",))
    (cell,) = cells(grid)
    theirs = Claims(tmp_path / "claims")
    theirs.take(cell.key)

    def finish():
        time.sleep(0.5)
        folder = tmp_path / "runs" / cell.key
        folder.mkdir(parents=True)
        order = dict.fromkeys(("stage", "model", "task", "method", "rate", "seed"), "")
        (folder / "record.json").write_text(json.dumps({"kind": "run", "key": cell.key, "by": "others", **order}))
        theirs.release(cell.key)

    thread = threading.Thread(target=finish)
    thread.start()
    monkeypatch.setattr("peftjax.board.time_left", lambda *_: 0.0)
    (record,) = sweep(grid, tmp_path)
    thread.join()
    assert record["by"] == "others"


def test_the_winner_is_the_best_and_of_equal_ones_the_lowest_loss():
    grid = from_json(GRID | {"ranks": [], "methods": ["full"], "search": {"factors": [1, 2, 3], "seeds": 2}})
    search = trials(grid)["m", "cola", "full"]

    def having(scores, headline="accuracy"):
        def record(cell):
            score, loss = scores[cell.factor]
            own = {"accuracy": score, "loss": loss}
            return {"kind": "run", "key": cell.key, "headline": headline, "scores": own}

        return winner(search, {c.key: record(c) for c in search.cells})

    assert having({1.0: (70, 0.1), 2.0: (80, 0.9), 3.0: (75, 0.2)}) == (None, 2.0)
    assert having({1.0: (70, 0.3), 2.0: (70, 0.1), 3.0: (60, 0.0)}) == (None, 2.0)
    assert having({1.0: (70, 0.3), 2.0: (70, 0.1), 3.0: (60, 0.05)}, "loss") == (None, 3.0)
    assert having({1.0: (float("nan"), 0.3), 2.0: (1, 0.1), 3.0: (0, 0.05)}) == (None, 2.0)
    assert winner(search, {}) is None


def test_a_dylora_is_scored_by_rank(at, tmp_path):
    (record,) = sweep(small(at, methods=("dylora(rank=3)",)), tmp_path)
    assert [*record["by_rank"]] == ["1", "2", "3"]
    assert record["by_rank"]["3"]["loss"] == pytest.approx(record["scores"]["loss"], rel=1e-5)
    assert record["by_rank"]["1"]["loss"] != record["by_rank"]["3"]["loss"]


def test_the_verb(at, tmp_path, call):
    file = tmp_path / "small.yaml"
    text = {**to_json(small(at)), "published": [], "rules": []}
    file.write_text(json.dumps(text))  # which is YAML
    status, out, _ = call("sweep", file, "--out", tmp_path / "out", "--list")
    assert status == 0
    assert "lora(rank=2)" in out
    assert not (tmp_path / "out").exists()
    status, out, _ = call("sweep", file, "--out", tmp_path / "out")
    assert status == 0
    assert "2 runs are over, 0 of them failed" in out
    assert len(gather(tmp_path / "out")) == 3
    status, _, err = call("sweep", file, "--shard", "0/2")
    assert status == 1
    assert "write i/n" in err


def test_the_board_shows_what_is_over_and_what_is_left():
    grid = from_json(GRID | {"ranks": [], "methods": ["full", "lora"], "search": None, "seeds": 2})
    tasks = [sweeps.Task(cell, "final", (cell.model, cell.method)) for cell in cells(grid)]
    done = {"kind": "run", "model": "m", "task": "cola", "method": "full", "seconds": 30.0}
    found = {tasks[0].cell.key: done, tasks[2].cell.key: {"kind": "failed"}}
    out = io.StringIO()
    board = Board(Console(file=out, force_terminal=True, width=100))
    with board, board.watch([t.cell for t in tasks[:2]]) as note:
        board.show(grid, found, tasks, 2)
        note({"step": 3, "total": 20, "loss": 0.5, "time_left": 40.0, "tokens": 1})
        board.live.refresh()  # as it does by itself, twice a second
        board.say("as it is: [x]")
    said = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", out.getvalue())
    lines = [line.split() for line in said.splitlines()]
    rows = {row[0]: row[1:] for row in lines if row and row[0] in ("full", "lora")}
    assert rows == {"full": ["1/2", "0/2"], "lora": ["1/2", "0/2"]}
    assert "2 of 8 runs are over, 1 failed; about 1:30 left" in said  # six of 30 s, by two
    assert "m, cola, full, 2 runs: step 3 of 20, loss 0.500" in said
    assert "as it is: [x]" in said
    assert "\x1b[31m" in out.getvalue()  # what failed is red
