"""Instruction data: mixtures by templates; Self-Instruct against an endpoint that misbehaves, killed and resumed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import numpy as np
import pytest
import tiny
from conftest import SHARED, needs_shared

from peftjax import hub, instruct, replies, self_instruct
from peftjax.generate import Decoding, Writer
from peftjax.replies import Log, Params, Reply, Request
from peftjax.templates import TEMPLATES


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# Mixtures


def test_shares():
    sizes, cap = [700, 40, 5000, 10_000], 3000
    held = np.minimum(sizes, cap)
    assert instruct.shares(sizes, cap) == held.tolist()
    for temperature in (1.0, 2.0, 8.0):
        exact = held ** (1 / temperature) / (held ** (1 / temperature)).sum() * 1000
        found = instruct.shares(sizes, cap, temperature, 1000)
        assert sum(found) == 1000
        assert np.abs(np.array(found) - exact).max() < 1
    for wrong in ({"cap": 0}, {"cap": 1, "temperature": 0}, {"cap": 1, "number": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            instruct.shares(sizes, **wrong)


def source(tmp_path, task="sst2", n=30):
    tiny.data(tmp_path / task, task, train=n)
    return instruct.read_source(task, str(tmp_path / task), "train")


def test_every_row_once_and_the_templates_in_turn(tmp_path):
    sst2 = source(tmp_path)
    lines = list(instruct.mix([sst2], [30]))
    assert sorted(x["source"]["row"] for x in lines) == list(range(30))
    assert set(Counter(x["source"]["template"] for x in lines).values()) == {5}  # of 6
    for x in lines:
        template = next(t for t in TEMPLATES["sst2"] if t.name == x["source"]["template"])
        rendered = template.render(sst2.rows[x["source"]["row"]])
        assert (x["instruction"], x["input"], x["output"]) == (rendered.input, "", rendered.target)
    every = [(x["source"]["row"], x["source"]["template"]) for x in instruct.mix([sst2], [6 * 30])]
    assert len(set(every)) == 6 * 30  # all pairs before one comes twice
    assert len(list(instruct.mix([sst2], [6 * 30 + 9]))) == 6 * 30 + 9


def test_what_a_source_gives_is_a_function_of_the_seed(tmp_path):
    sst2, rte = source(tmp_path), source(tmp_path, "rte")
    alone = list(instruct.mix([sst2], [20], seed=3))
    both = list(instruct.mix([rte, sst2], [10, 20], seed=3))
    assert [x for x in both if x["source"]["task"] == "sst2"] == alone
    assert [x["source"]["task"] for x in both] != ["rte"] * 10 + ["sst2"] * 20
    assert list(instruct.mix([sst2], [20], seed=4)) != alone
    assert {x["source"]["template"] for x in both} > {"conclude reversed"}
    assert all(x["instruction"] and x["output"] for x in both)  # a template that does not apply gives its turn away


def test_files_of_instructions(tmp_path):
    framed = "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    rows = [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("Add.", "1 2", "3")]),
        ({"instruction": "Sing.", "response": "La."}, [("Sing.", "", "La.")]),
        ({"prompt": framed, "answer": "3 "}, [("Add.", "1 2", "3")]),
        (
            {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"output": "4"}]},
            [("Add.", "1", "2"), ("Add.", "", "4")],
        ),
    ]
    for row, expected in rows:
        assert instruct.words_of(row) == expected
    for row in ({"text": "a"}, {"instruction": "a", "output": 3}, {"instruction": "a", "instances": [3]}):
        with pytest.raises(ValueError, match=r"here: .*(expected|must be)"):
            instruct.words_of(row, "here")
    file = tmp_path / "mine.jsonl"
    tiny.write_rows(file, [row for row, _ in rows])
    lines = list(instruct.mix([instruct.read_source("mine", str(file), "train")], [5]))
    assert lines[0]["source"].keys() == {"task", "file", "row"}
    assert Counter((x["instruction"], x["input"], x["output"]) for x in lines) == Counter(
        w for _, ws in rows for w in ws
    )


@needs_shared
def test_the_shared_files(tmp_path, call):
    folder = SHARED / "data/instruct"
    names = ("dolly_sample", "gpteacher_roleplay", "self_instruct_seed_tasks", "self_instruct_user_oriented")
    tasks = ",".join(f"{n}={folder / n}.jsonl" for n in names)
    status, _, err = call("instruct", "templates", "--tasks", tasks, "--cap", 100, "--out", tmp_path / "mix.jsonl")
    assert status == 0, err
    lines = lines_of(tmp_path / "mix.jsonl")
    assert Counter(x["source"]["task"] for x in lines) == dict.fromkeys(names, 100)
    assert not any("### Instruction" in x["instruction"] for x in lines)


def test_the_command(tmp_path, call):
    tiny.data(tmp_path / "sst2", "sst2")
    own = tmp_path / "own.yaml"
    own.write_text("places: {target: '{{ text }}', templates: {mine: 'Tell: {{ attributes }}'}}\n")
    out = tmp_path / "new/mix.jsonl"
    tasks = f"sst2={tmp_path / 'sst2'}, places"
    arguments = ("--tasks", tasks, "--out", out, "--cap", 20, "--number", 30, "--templates", own)
    status, printed, _ = call("instruct", "templates", *arguments)
    assert status == 0
    assert "write reversed" in printed
    lines = lines_of(out)
    assert Counter(x["source"]["task"] for x in lines) == {"sst2": 15, "places": 15}
    places = [x for x in lines if x["source"]["task"] == "places"]
    assert {(x["source"]["template"], x["instruction"][:6]) for x in places} == {("mine", "Tell: ")}
    first = out.read_bytes()
    call("instruct", "templates", *arguments)
    assert out.read_bytes() == first


def test_bad_input_is_said_before_anything_is_written(tmp_path, call):
    own, out = tmp_path / "own.yaml", tmp_path / "mix.jsonl"

    def error(tasks, template="Tell: {{ attributes }}", *more):
        own.write_text(f"places: {{target: '{{{{ text }}}}', templates: {{mine: '{template}'}}}}\n")
        arguments = ("--tasks", tasks, "--templates", own, "--out", out, *more)
        status, _, err = call("instruct", "templates", *arguments)
        assert status == 1
        assert err.count("\n") == 1
        return err

    said = error("places", "{{ attribute }}")
    assert "task places, split train, row 0: template 'mine': 'attribute' is undefined" in said
    assert "['attributes', 'text']" in said
    assert "no template gives" in error("places", "{{ attributes[:0] }}")
    assert "cannot read 'places='" in error("places=")
    assert "once" in error("places,places")
    assert "did you mean 'places'" in error("place")
    assert "nothing.jsonl" in error("a=nothing.jsonl")
    assert "at least 1" in error("places", "{{ text }}", "--cap", "0")
    assert not out.exists() or not out.read_text()
    # what is found wrong on the way leaves what came before
    rows = [{"attributes": "name: A", "text": "A."} for _ in range(9)] + [{"attributes": "name: A"}]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    said = error(f"places={tmp_path / 'rows.jsonl'}")
    assert "file rows.jsonl, row 9: template 'mine': 'text' is undefined" in said
    assert f"the {len(lines_of(out))} lines before it" in said


# Self-Instruct: the steps


def test_lists():
    read = self_instruct.list_of
    assert read(Reply("Sure:\n9. Name a river.\n10) Name\ta\nlake."), 9) == (["Name a river.", "Name a lake."], None)
    assert read(Reply("Name a river.\n10. Name a lake."), 9) == (["Name a river.", "Name a lake."], None)
    assert read(Reply("9. Name a river.\n10. Name a la", "length"), 9) == (["Name a river."], "cut off")
    assert read(Reply("I would rather not."), 9) == ([], "no list")
    assert read(Reply(" \n"), 9) == ([], "empty")
    assert read(Reply("", "malformed"), 9) == ([], "malformed")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name a river in France.", None),
        ("Name a river.", "too short"),
        ("Name " + "a very " * 75 + "long river.", "too long"),
        ("Describe the Graph of a function.", "asks for what text is not"),
        ("Go to the shop and buy soup.", "asks for what text is not"),
        ("Describe photographs and geography to me.", None),
        ("Write a program that adds numbers.", "asks for a program"),
        ("Write a programme for a concert.", None),
        ("**Name** a river in France.", "begins with punctuation"),
        ("Écris un poème sur la mer.", "begins with another script"),
    ],
)
def test_unsuited(text, reason):
    assert self_instruct.unsuited(text) == reason


def test_novelty_is_rouge_l():
    from rouge_score import rouge_scorer

    rng, words = (
        random.Random(0),
        ["name", "a", "river", "in", "France", "that", "is", "long", "and", "write", "about", "it", "now"],
    )
    texts = [" ".join(rng.choices(words, k=rng.randint(3, 12))) for _ in range(60)]
    score = rouge_scorer.RougeScorer(["rougeL"]).score
    novel = self_instruct._Novelty(texts[:40], 0.7)
    for text in texts[40:]:
        assert novel.nearest(text) == max(score(other, text)["rougeL"].fmeasure for other in texts[:40])


def test_instances():
    paired, labelled = self_instruct.paired, self_instruct.labelled
    two = [{"input": "a\nb", "output": "c"}, {"input": "", "output": "d\n\ne"}]
    assert paired(Reply("Example 1\nInput: a\nb\nOutput: c\n\nExample 2\nInput: None\nOutput: d\n\ne")) == (two, None)
    assert paired(Reply("Input: a\nb\nOutput: c\nInput: n/a\nOutput: d\n\ne")) == (two, None)
    assert paired(Reply("Output: c")) == ([{"input": "", "output": "c"}], None)
    assert paired(Reply("Example 1\nOutput: c\nExample 2\nOutput: d", "length"))[0] == [{"input": "", "output": "c"}]
    assert paired(Reply("I would rather not.")) == ([], "no instance")
    assert labelled(Reply("**Example 1**\nLabel: x\nInput: a\nLabel: y\nInput: b")) == (
        [{"input": "a", "output": "x"}, {"input": "b", "output": "y"}],
        None,
    )


def test_filters_of_instances():
    counts = Counter()
    kept = [{"input": "", "output": "x"}, {"input": "", "output": "y"}, {"input": "a", "output": "b"}]
    dropped = [("", ""), ("a", "a"), ("a", "the answer is:"), ("the text:", "b"), ("a", "b"), ("c", "d"), ("c", "e")]
    assert self_instruct.clean([*kept, *({"input": i, "output": o} for i, o in dropped)], counts) == kept
    assert counts == {
        "instances": 10,
        "kept": 3,
        "no output": 1,
        "output repeats the input": 1,
        "unfinished": 2,
        "came before": 1,
        "one input, several outputs": 2,
    }


# The log


def test_the_log_asks_once(tmp_path):
    asked = []

    def generate(prompt, params):
        asked.append(prompt)
        if prompt == "bad":
            raise ValueError("no")
        return Reply(prompt.upper())

    def log(**options):
        return Log(tmp_path / "log.jsonl", generate, "m", say=said.append, **options)

    said = []
    requests = [Request("s", p) for p in ("a", "b", "a")]
    assert [r.text for r in log().ask(requests)] == ["A", "B", "A"]
    assert [r.text for r in log().ask([*requests, Request("t", "a"), Request("s", "a", Params(seed=1))])][3:] == [
        "A",
        "A",
    ]
    assert asked == ["a", "b", "a", "a"]  # another step and other parameters are other requests
    with pytest.raises(ValueError, match="no"):
        log().ask([Request("s", p) for p in ("c", "bad", "d")])
    assert "c" in asked
    assert [r and r.text for r in log(most=3).ask([Request("s", p) for p in ("a", "a", "b", "c", "e")])] == [
        *("A", "A", "B", "C"),
        None,
    ]
    file = tmp_path / "log.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"id": "half')
    log()
    assert "dropped" in said[0]
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-1])  # whole but for the line's end
    log()
    assert file.read_bytes() == whole
    file.write_bytes(b"garbage\n" + whole)
    with pytest.raises(ValueError, match=r"log.jsonl, line 1 is not a line"):
        log()


def test_a_model_here(tmp_path, seeds, call, monkeypatch):
    made = []

    def spy(*args):
        made.append(Writer(*args))
        return made[-1]

    monkeypatch.setattr("peftjax.generate.Writer", spy)
    folder = tiny.folder(tmp_path / "llama", "llama")
    model, tokenizer = hub.load(folder, "generation"), hub.load_tokenizer(folder)
    generate = replies.local(model, model.params, tokenizer)
    reply = generate("the cat and", Params(4, 0.5, 0.9, ("dog",), seed=1))
    (writer,) = made
    assert writer.how == Decoding(4, 0.5, top_p=0.9, stop=(3,))
    assert reply.text == writer.complete(model.params, ["the cat and"], key=jax.random.key(1), until=("dog",))[0]
    assert generate("the dog", Params(4, 0.5, 0.9, ("cat",), seed=2)).text  # another seed compiles nothing
    assert generate("the dog", Params(4, 0.0, 0.9)).text == generate("the dog", Params(4, 0.0, 0.5)).text
    assert [w.how.temperature for w in made] == [0.5, 0.0, 0.0]
    assert reply.text
    assert reply.prompt_tokens == len(tokenizer("the cat and")["input_ids"])
    assert reply.completion_tokens == len(tokenizer(reply.text, add_special_tokens=False)["input_ids"])
    with pytest.raises(ValueError, match="do not fit into the 64 positions"):
        generate("cat " * 60, Params(8))
    status, _, err = call("instruct", "self", "--seed-tasks", seeds, "--model", folder, "--out", tmp_path / "out")
    assert status == 1
    assert "do not fit into the 64 positions" in err


# The endpoint


VERBS = ("Describe", "List", "Explain", "Compare", "Summarize", "Translate", "Rewrite", "Classify", "Invent", "Name")
THINGS = ("rivers", "soups", "trains", "poems", "birds", "winters", "markets", "songs", "bridges", "letters", "clocks")
WAYS = ("briefly", "politely", "for children", "in verse", "by letter", "with reasons", "in French", "from memory")
KEY = "sk-not-to-be-told"


class Endpoint:
    """Chat completions on loopback whose replies depend on the prompt alone; counts requests by prompt.

    The first answer to every fourth prompt is 429, 500, silence or a cut connection; some replies are of no use.
    """

    def __init__(self, delay=0.0, trouble=True):
        endpoint, self.trouble, self.delay = self, trouble, delay
        self.seen, self.answered, self.statuses = Counter(), Counter(), Counter()
        self.told_to_wait, self.waited = {}, []
        self.lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                assert self.path == "/v1/chat/completions"
                assert self.headers["authorization"] == f"Bearer {KEY}"
                endpoint.answer(self, body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler, body):
        prompt = json.loads(body)["messages"][0]["content"]
        digest = int(hashlib.sha256(prompt.encode()).hexdigest()[:8], 16)
        with self.lock:
            self.seen[prompt] += 1
            kind = len(self.seen) % 20 if self.trouble and self.seen[prompt] == 1 else None
        status, headers = {0: (429, {"Retry-After": "0.2"}), 4: (500, {}), 8: (503, {"Retry-After": "0"})}.get(
            kind, (200, {})
        )
        with self.lock:
            if status == 429:
                self.told_to_wait[prompt] = time.monotonic()
            elif prompt in self.told_to_wait:
                self.waited.append(time.monotonic() - self.told_to_wait[prompt])
            self.statuses["slow" if kind == 12 else "cut" if kind == 16 else status] += 1
        if kind == 12:
            time.sleep(2.3)
            return
        if kind == 16:
            handler.connection.close()
            return
        time.sleep(self.delay)
        content = self.content(prompt, digest) if status == 200 else b'{"error": {"message": "not now"}}'
        with self.lock:
            self.answered[prompt] += status == 200
        try:
            handler.send_response(status)
            for name, value in {"content-type": "application/json", "content-length": len(content), **headers}.items():
                handler.send_header(name, str(value))
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # the client was killed

    def content(self, prompt, digest):
        rng = random.Random(digest)
        finish, kind = "stop", rng.randrange(14) if self.trouble else 13
        if "numbered" in prompt:
            items = [f"{rng.choice(VERBS)} {rng.choice(THINGS)} {' '.join(rng.sample(WAYS, 3))}." for _ in range(8)]
            items[0] = "Explain rivers politely in verse."
            items[rng.randrange(1, 8)] = rng.choice(
                ["Draw a map of the town.", "Sing now.", "Write a program that adds."]
            )
            text = "Sure!\n" + "\n".join(f"{i}. {t}" for i, t in enumerate(items, 9))
        elif prompt.endswith("Classification:"):
            text = "Yes" if "Classify" in prompt.rpartition("Task:")[2] else "No."
        elif "label" in prompt[:60]:
            text = "Example 1\nLabel: old\nInput: a bridge\nExample 2\nLabel: new\nInput: a clock"
        else:
            text = f"Example 1\nInput: none\nOutput: {rng.choice(THINGS)}\nExample 2\nInput: x\nOutput: x"
        if kind == 0:
            text = "I cannot help with that."
        elif kind == 1:
            finish = "length"
        elif kind == 2:
            return b'{"choices": [{"mess'
        elif kind == 3:
            return b'{"choices": []}'
        elif kind == 4:
            text = None
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len((text or "").split())}
        reply = {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}
        return json.dumps(reply | {"created": 1_700_000_000 + digest % 1000}).encode()


@pytest.fixture
def serve(monkeypatch):
    """Endpoints that are closed at the end, and a key for them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = []

    def start(**options):
        made.append(Endpoint(**options))
        return made[-1]

    yield start
    for endpoint in made:
        endpoint.close()


@pytest.fixture
def seeds(tmp_path):
    file = tmp_path / "seeds.jsonl"
    rows = []
    for i in range(14):
        labels = i % 3 == 0
        given = {"input": "a soup" if labels else "", "output": "good" if labels else f"Number {i}."}
        text = f"Say what you think of subject {i} " + " ".join(chr(97 + i) * k for k in range(1, 6))
        rows.append({"id": f"seed_{i}", "instruction": text, "instances": [given], "is_classification": labels})
    tiny.write_rows(file, rows)
    return file


def arguments(seeds, out, url, *more, number=24):
    quick = ("--backoff", "0.02", "--timeout", "2", "--attempts", "4", "--price-in", "2", "--price-out", "10")
    where = ("--seed-tasks", seeds, "--out", out, "--number", number, "--llm", "canned", "--base-url", url)
    return [str(x) for x in ("instruct", "self", *where, *quick, *more)]


FILES = ("examples.jsonl", "instructions.jsonl", "statistics.json")


def test_a_run_that_is_killed_loses_nothing_and_asks_nothing_again(tmp_path, seeds, serve, call):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    endpoint = serve()
    status, printed, err = call(*arguments(seeds, whole, endpoint.url, "--parallel", "8"))
    assert status == 0, err
    assert min(endpoint.statuses[k] for k in (429, 500, 503, "slow", "cut")) >= 1, endpoint.statuses
    assert min(endpoint.waited) >= 0.19, "Retry-After was 0.2, the back-off is 0.02"
    assert max(endpoint.answered.values()) == 1
    statistics = json.loads((whole / "statistics.json").read_text())
    assert statistics["requests"] == len(endpoint.answered) == len(lines_of(whole / "replies.jsonl"))
    assert statistics["instructions"] == 24
    assert statistics["examples"] == len(lines_of(whole / "examples.jsonl")) > 12
    tokens = statistics["prompt tokens"], statistics["completion tokens"]
    usage = [x["reply"] for x in lines_of(whole / "replies.jsonl")]
    assert tokens == (sum(x["prompt_tokens"] for x in usage), sum(x["completion_tokens"] for x in usage))
    assert statistics["cost"] == pytest.approx((2 * tokens[0] + 10 * tokens[1]) / 1e6, abs=1e-6)
    counts = statistics["counts"]
    assert counts["instructions"].keys() >= {"like another", "asks for what text is not", "proposed"}
    reasons = counts["instructions"].keys() | counts["instances"].keys()
    assert reasons >= {"malformed", "empty", "cut off", "output repeats the input"}
    assert reasons & {"no list", "no instance"}
    assert str(statistics["examples"]) in printed

    endpoint = serve(delay=0.02)
    process = subprocess.Popen(
        [sys.executable, "-m", "peftjax", *arguments(seeds, killed, endpoint.url, "--parallel", "3")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    log, began = killed / "replies.jsonl", time.monotonic()
    while not log.exists() or log.read_bytes().count(b"\n") < 20:
        if process.poll() is not None or time.monotonic() - began > 60:
            process.kill()
            pytest.fail(process.communicate()[0].decode())
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    known = [json.loads(x)["prompt"] for x in log.read_bytes().split(b"\n")[:-1]]
    assert 20 <= len(known) < statistics["requests"]
    with log.open("ab") as f:
        f.write(b'{"id": "0123", "mod')  # what a crash of the machine may leave
    time.sleep(0.1)
    before = Counter(endpoint.seen)
    status, printed, err = call(*arguments(seeds, killed, endpoint.url))
    assert status == 0, err
    assert "cut off, and is dropped" in printed
    assert f"{statistics['requests'] - len(known)} requests asked now, {len(known)} answered by the log" in printed
    assert {p: endpoint.seen[p] for p in known} == {p: before[p] for p in known}
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    before = Counter(endpoint.seen)
    assert call(*arguments(seeds, killed, endpoint.url))[0] == 0
    assert endpoint.seen == before
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    for file in [*whole.iterdir(), *killed.iterdir()]:
        assert KEY not in file.read_text()


def test_where_examples_come_from(tmp_path, seeds, serve, call):
    endpoint = serve(trouble=False)
    assert call(*arguments(seeds, tmp_path / "out", endpoint.url, number=12))[0] == 0
    log = {x["id"]: x for x in lines_of(tmp_path / "out/replies.jsonl")}
    tasks = {x["id"]: x for x in lines_of(tmp_path / "out/instructions.jsonl")}
    shown_of_model = 0
    for x in lines_of(tmp_path / "out/examples.jsonl"):
        source, task = x["source"], tasks[x["source"]["task"]]
        steps = [log[i]["step"].partition(" ")[0] for i in source["requests"]]
        assert steps == ["instruction", "classification", "instances"]
        instruction, classification, instances = (log[i] for i in source["requests"])
        assert x["instruction"] == task["instruction"]
        assert task["instruction"] in instruction["reply"]["text"]
        assert f"Task: {task['instruction']}\n" in instances["prompt"]
        assert (
            source["classification"]
            == (classification["reply"]["text"] == "Yes")
            == ("Classify" in task["instruction"])
        )
        assert x["output"] in ({"old", "new"} if source["classification"] else set(THINGS))
        assert len(set(source["shown"])) == 8
        of_model = [i for i in source["shown"] if i.startswith("machine")]
        shown_of_model += len(of_model)
        assert len(of_model) <= 2
        for i in of_model:
            assert tasks[i]["instruction"] in instruction["prompt"]
        assert source["time"] == time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(instances["reply"]["time"]))
    assert {log[i]["params"]["temperature"] for t in tasks.values() for i in [t["request"]]} == {0.7}
    more = lines_of(tmp_path / "out/instructions.jsonl")
    assert call(*arguments(seeds, tmp_path / "out", endpoint.url, number=20))[0] == 0  # goes on from there
    assert lines_of(tmp_path / "out/instructions.jsonl")[:12] == more


def test_the_limit_of_requests(tmp_path, seeds, serve, call):
    endpoint = serve(trouble=False)
    status, printed, _ = call(*arguments(seeds, tmp_path / "out", endpoint.url, "--max-requests", "30", number=500))
    assert status == 0
    assert "limit of requests leaves no more than" in printed
    assert endpoint.answered.total() <= 30
    assert len(lines_of(tmp_path / "out/examples.jsonl")) > 3


@pytest.mark.parametrize("status", [401, 404, 429, 500, "slow", "refused", "patience", "page"])
def test_an_endpoint_that_refuses(tmp_path, seeds, serve, call, status, monkeypatch):
    """After some replies, which stay, and are not asked for again."""
    endpoint, out, attempts = serve(trouble=False), tmp_path / "out", Counter()
    said, more = {
        401: ("answers 401: no such key [key]", ()),
        404: ("answers 404", ()),
        429: ("answers 429: not now, in the last of 2 attempts", ()),
        500: ("answers 500", ()),
        "slow": ("did not answer within 0.2 s, in the last of 2", ("--timeout", "0.2")),
        "refused": ("cannot be reached", ()),
        "patience": ("it asks to wait 500 s, which is over 120 s", ()),
        "page": ("answers with a web page, not a chat completion; mend --base-url", ()),
    }[status]

    def answer(handler, body):
        prompt = json.loads(body)["messages"][0]["content"]
        if prompt.endswith("Classification:"):
            attempts[prompt] += 1
            if status == "slow":
                time.sleep(0.5)
                return
            code = {"patience": 429, "page": 200}.get(status, status)
            message = f"no such key {KEY}" if status == 401 else "not now"
            content = json.dumps({"error": {"message": message}}).encode()
            content = b" <!doctype html><html></html>" if status == "page" else content
            handler.send_response(code)
            handler.send_header("content-length", str(len(content)))
            if status == "patience":
                handler.send_header("retry-after", "500")
            handler.end_headers()
            handler.wfile.write(content)
        else:
            Endpoint.answer(endpoint, handler, body)

    if status == "refused":
        monkeypatch.setattr(endpoint, "answer", lambda handler, body: handler.connection.close())
    else:
        monkeypatch.setattr(endpoint, "answer", answer)
    url = endpoint.url
    if status == "refused":
        endpoint.close()
        endpoint.close = lambda: None
    command = arguments(seeds, out, url, *more, "--attempts", "2", number=8)
    code, _, err = call(*command)
    assert code == 1
    assert err.count("\n") == 1
    assert said in err
    assert "the command, given again, goes on from there" in err
    assert KEY not in err
    if status != "refused":
        assert max(attempts.values()) == (1 if status in (401, 404, "patience", "page") else 2)
        assert len(lines_of(out / "instructions.jsonl")) == 8
        assert len(lines_of(out / "replies.jsonl")) == 5
        monkeypatch.undo()
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert call(*command)[0] == 0
        assert max(endpoint.answered.values()) == 1


def test_retry_after():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30))
    assert 25 < replies._retry_after(soon, 1.0) <= 30
    assert [replies._retry_after(x, 1.5) for x in (None, "2", "-3", "soon")] == [1.5, 2.0, 0.0, 1.5]


@pytest.mark.parametrize(
    "answer",
    [
        *(b"<html>", b"[]", b"null", b"\xff", b"[" * 100_000),
        *(b'{"choices": [{"message": {"content": ["a"]}}]}', b'{"choices": [{"message": null}]}'),
        b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": Infinity}}',
    ],
    ids=range(8),
)
def test_no_reply_crashes(answer):
    assert replies._parse(answer) == Reply("", "malformed")


def test_what_a_reply_may_hold():
    answer = (
        rb'{"choices": [{"message": {"content": "\ud800 a"}, "finish_reason": "length"}], "created": 1700000000000}'
    )
    assert replies._parse(answer) == Reply("? a", "length")  # half a pair; milliseconds


def test_an_interrupted_run(tmp_path, seeds):
    endpoint, asked, most = object.__new__(Endpoint), [], [12]
    endpoint.trouble = False

    def generate(prompt, params):
        asked.append(prompt)
        if len(asked) > most[0]:
            raise KeyboardInterrupt
        return replies._parse(endpoint.content(prompt, zlib.crc32(prompt.encode())))

    def run(number=20):
        settings = self_instruct.Settings(number=number)
        return self_instruct.run(tmp_path, self_instruct.read_seeds(seeds), generate, "m", settings, say=lambda _: None)

    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; what there is so far is in"):
        run()
    assert len(lines_of(tmp_path / "instructions.jsonl")) == 20
    assert not lines_of(tmp_path / "examples.jsonl")
    most[0] = len(asked) + 9 + 5  # the other classifications of the first sixteen, and some instances
    with pytest.raises(KeyboardInterrupt):
        run()
    first = lines_of(tmp_path / "examples.jsonl")
    assert 0 < len(first) < 12
    most[0] = 10**6
    assert len(run().lines) == len(lines_of(tmp_path / "examples.jsonl")) >= 10
    assert max(Counter(asked).values()) == 2  # one that was under way
    assert len(lines_of(tmp_path / "replies.jsonl")) == len(asked) - 2
    whole = lines_of(tmp_path / "examples.jsonl")
    assert whole[: len(first)] == first
    most[0] = 0
    with pytest.raises(KeyboardInterrupt):
        run(number=60)
    assert lines_of(tmp_path / "examples.jsonl")[: len(whole)] == whole  # a larger run that fails loses nothing


def test_a_model_of_no_use_is_given_up(tmp_path, seeds, call):
    def generate(prompt, params):
        return Reply("I cannot help with that.")

    said = []
    with pytest.raises(ValueError, match=r"no example came of 50 replies \(instructions: no list 50\)"):
        self_instruct.run(tmp_path, self_instruct.read_seeds(seeds), generate, "mute", say=said.append)
    assert "no new instruction in 50 replies" in "".join(said)


def test_bad_settings(tmp_path, seeds, call, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    where = ("instruct", "self", "--seed-tasks", seeds, "--out", tmp_path / "out")
    for more, message in (
        ((), "give either --llm NAME"),
        (("--llm", "m"), "OPENAI_API_KEY holds no key"),
        (("--llm", "m", "--base-url", "http://127.0.0.1:1/v1", "--number", 0), "must be at least 1"),
    ):
        status, _, err = call(*where, *more)
        assert (status, message in err) == (1, True), err
    assert not (tmp_path / "out").exists()
    tiny.write_rows(seeds, [{"instruction": "One.", "output": "x"}])
    status, _, err = call(*where, "--llm", "m", "--base-url", "http://127.0.0.1:1/v1")
    assert "holds 1 seed tasks" in err
    monkeypatch.setitem(sys.modules, "openai", None)
    status, _, err = call("instruct", "self", "--seed-tasks", seeds, "--llm", "m")
    assert "holds 1 seed tasks" in err or "pip install 'peftjax[api]'" in err
    with pytest.raises(ValueError, match=r"pip install 'peftjax\[api\]'"):
        replies.endpoint("m", "http://127.0.0.1:1/v1")
