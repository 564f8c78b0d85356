"""Loggers: what TensorBoard's own reader and W&B's offline file give back, resumed runs and failures included."""

import json
import os
import signal
import struct
from contextlib import contextmanager

import pytest
import tiny

from peftjax import loggers
from peftjax.loop import Logger

QUICK = ("--steps", "9", "--batch-size", "8", "--buckets", "1", "--eval-every", "3", "--save-every", "4")


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    tiny.folder(at / "bert", "bert")
    tiny.data(at / "rte", "rte")
    return at


def base(at):
    return ("--model", at / "bert", "--task", "rte", "--data", at / "rte", *QUICK, "--method", "lora(rank=2)")


def written(folder):
    """What log.jsonl says, as the loggers name it: name -> [(step, value), ...]."""
    found = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in loggers.scalars(record).items():
            found.setdefault(name, []).append((record["step"], pytest.approx(value, rel=1e-6)))
    assert len(found["loss"]) == 9
    assert [step for step, _ in found["eval/accuracy"]] == [3, 6, 9]
    return found


def by_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def records_of(file):
    """The records of a W&B file: LevelDB's log format (blocks of 32 KiB, pieces with a header of 7 bytes)."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, whole = file.read_bytes(), 7, b""  # 7 bytes say what the file is
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, n, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + n]
        at += 7 + n
        if kind in (1, 4):  # a whole record, or its last piece
            yield pb.Record.FromString(whole)
            whole = b""


def by_wandb(file):
    """The run's start, and its history as name -> [(step, value), ...]."""
    start, found = None, {}
    for record in records_of(file):
        start = record.run if record.HasField("run") else start
        for item in record.history.item:
            name = item.key or "/".join(item.nested_key)
            if not name.startswith("_"):
                found.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return start, found


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)


@pytest.fixture
def cut_at(monkeypatch):
    """Where the training gets its Ctrl-C, which the loop sees some steps later: a list of one step, or of none."""
    steps = []

    @contextmanager
    def watch(console, title):
        def report(record):
            if record["step"] in steps and "loss" in record:
                os.kill(os.getpid(), signal.SIGINT)

        yield report

    monkeypatch.setattr("peftjax.progress.watch", watch)
    return steps


def test_each_run_of_a_program_has_its_own_and_a_resumed_one_each_step_once(at, tmp_path, call, offline, cut_at):
    out = tmp_path / "table"
    verb = ("train", *base(at), "--seeds", 2, "--log", "tensorboard,wandb", "--out", out)
    cut_at.append(4)
    assert call(*verb)[0] == 130
    cut_at.clear()
    status, _, err = call(*verb)
    assert (status, err) == (0, "")
    folders = sorted(out.glob("runs/*-seed*"))
    assert len(folders) == 2
    runs = []
    for folder in folders:
        want = written(folder)
        assert len([*folder.glob("tensorboard/*tfevents*")]) == 2
        assert by_tensorboard(folder) == want
        first, last = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda f: f.parent.name)
        cut, _ = by_wandb(first)
        start, found = by_wandb(last)
        assert found == want
        assert cut.run_id == start.run_id
        assert (start.display_name, start.run_group) == (folder.name, "table")
        config = {x.key: json.loads(x.value_json) for x in start.config.update if x.key != "_wandb"}
        assert config == json.loads((folder / "config.json").read_text())
        assert config == json.loads((folder / "result.json").read_text())["config"]
        runs.append(start.run_id)
    assert len(set(runs)) == 2
    assert by_tensorboard(folders[0])["loss"] != by_tensorboard(folders[1])["loss"]
    status, said, _ = call(*verb[:-4], "--out", out)  # a logger is no part of a configuration
    assert status == 0
    assert said.count("already trained") == 2
    assert sorted(out.glob("runs/*-seed*")) == folders


def test_a_logger_that_comes_later_gets_all(tmp_path):
    pytest.importorskip("tensorboardX")
    (make,) = loggers.openers("tensorboard", tmp_path)
    records = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 1, "eval": {"loss": 3.0}}]
    logger = make(tmp_path, {}, records)
    logger.add({"step": 2, "loss": 1.5, "grad_norm": 0.5})
    logger.close()
    want = {"loss": [(1, 2.0), (2, 1.5)], "grad_norm": [(1, 1.0), (2, 0.5)], "eval/loss": [(1, 3.0)]}
    assert by_tensorboard(tmp_path) == want


@pytest.mark.parametrize("fails", ["open", "add", "close"])
def test_what_a_logger_raises_ends_the_logger(fails, tmp_path):
    seen, said = [], []

    def act(what):
        seen.append(what)
        if what == fails:
            raise OSError("No space\nleft on device")

    def make(folder, config, records):
        act("open")
        return Logger(lambda record: act("add"), lambda: act("close"))

    logger = loggers.careful("tensorboard", make, said.append)(tmp_path, {}, [])
    for _ in range(2):
        logger.add({})
    logger.close()
    (line,) = said
    assert line.startswith(f"tensorboard stops for {tmp_path} (OSError: No space left on device); the training goes on")
    assert seen == {"open": ["open"], "add": ["open", "add"], "close": ["open", "add", "add", "close"]}[fails]


def test_a_full_disk_does_not_end_the_training(at, tmp_path, call, monkeypatch):
    writer = pytest.importorskip("tensorboardX.record_writer").RecordWriter
    flush = writer.flush

    def full(self):
        file = tmp_path / "run/log.jsonl"
        if file.exists() and file.read_text().count("eval") > 1:
            raise OSError(28, "No space left on device")
        flush(self)

    monkeypatch.setattr(writer, "flush", full)
    status, out, err = call("train", *base(at), "--log", "tensorboard", "--out", tmp_path / "run")
    assert (status, err) == (0, "")
    (line,) = (x for x in out.splitlines() if "No space left on device" in x)
    assert line.startswith("tensorboard stops for")
    written(tmp_path / "run")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("wandb", "the logger wandb needs the package no_such_package; run: pip install 'peftjax[wandb]'"),
        ("tensorboard,comet", "there is no logger 'comet'; the loggers are tensorboard, wandb, and log.jsonl"),
    ],
)
@pytest.mark.parametrize("verb", ["compare", "train", "sft"])
def test_what_is_not_there_is_said_before_anything(verb, log, said, tmp_path, call, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.Known(loggers.wandb, "no_such_package"))
    monkeypatch.setattr("peftjax.compare.check_writable", lambda folder: pytest.fail("it went on"))
    data = ("--data", tmp_path) if verb == "sft" else ()
    status, _, err = call(verb, *data, "--log", log, "--out", tmp_path / "out")
    assert status == 1
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_folder_of_its_runs_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "some_logger").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.Known(loggers.wandb, "some_logger"))
    with pytest.raises(ValueError, match="needs the package some_logger"):
        loggers.openers("wandb", tmp_path)
