"""Instruction data from a model: Self-Instruct (Wang et al. 2023, arXiv:2212.10560).

Instructions from others, classification or not, instances, each with its filters (sections 2.2 and 2.3, appendix A).
The prompts are written for chat models as well as for plain ones. Everything random is a function of (seed, step).
"""

import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.table import Table

from . import data
from .checkpoint import write_atomically
from .instruct import Words, words_of
from .replies import Generator, Log, Params, Reply, Request

ROUND = 5  # prompts that see the same pool of instructions, so that they can be answered at once
WANTED = 8  # instructions that one prompt asks for
CHUNK = 16  # instructions that are classified and given instances at once
DRY = 10  # rounds without a new instruction, after which the model is given up
WORDS = (4, 150)  # of an instruction
# What a model of text cannot see, draw or open (the list of appendix A's filter).
UNSUITED = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)
NONE = {"", "none", "n/a", "no input", "not needed", "empty"}


class Settings(NamedTuple):
    """Of a run.

    Attributes:
      number: instructions wanted.
      human, machine: of the instructions in a prompt: from the seed tasks, and at most so many from the model.
      novelty: an instruction is dropped whose ROUGE-L with any other reaches this.
      temperature, top_p: of new instructions; the other steps take the most likely reply.
      max_tokens: of a reply.
      instances: asked for, of each instruction.
      shots: tasks shown before a question about one: (classification, not) to tell them apart, and before instances.
    """

    number: int = 100
    seed: int = 0
    human: int = 6
    machine: int = 2
    novelty: float = 0.7
    temperature: float = 0.7
    top_p: float = 0.5
    max_tokens: int = 1024
    instances: int = 3
    shots: tuple[int, int, int] = (12, 19, 6)


class Seed(NamedTuple):
    id: str
    instruction: str
    is_classification: bool
    instances: Sequence[Words]


class Task(NamedTuple):
    """An instruction of the model's. `shown`: ids of the tasks in its prompt; `rouge_l`: with the nearest other."""

    id: str
    instruction: str
    shown: tuple[str, ...]
    rouge_l: float
    request: str


class Found(NamedTuple):
    """What a run has made so far: lines of instruction data, and counts."""

    lines: list[dict]
    statistics: dict[str, Any]


def read_seeds(file: Path) -> list[Seed]:
    """Seed tasks, from Self-Instruct's JSONL or any that `instruct.words_of` reads.

    Raises:
      ValueError, OSError: no such file, or not such rows.
    """
    seeds = []
    for number, (where, row) in enumerate(data.read_file(Path(file))):
        words = words_of(row, where)
        if words:
            about = bool(row.get("is_classification", False))
            seeds.append(Seed(str(row.get("id", f"seed_{number}")), _line(words[0].instruction), about, words))
    if len(seeds) < 2:
        raise ValueError(f"{file} holds {len(seeds)} seed tasks; expected some dozens, at least 2")
    return seeds


def run(
    out: Path,
    seeds: Sequence[Seed],
    generate: Generator,
    model: str,
    settings: Settings | None = None,
    *,
    parallel: int = 1,
    max_requests: int | None = None,
    prices: tuple[float, float] = (0.0, 0.0),
    say: Callable[[str], None] = print,
) -> Found:
    """Writes `examples.jsonl` (the data) and `statistics.json` beside the log of replies, `replies.jsonl`.

    The same call goes on where a run was cut off, and asks nothing twice. After an error the files hold what could be
    made of the replies so far.

    Args:
      out: folder.
      seeds: see `read_seeds`.
      generate: who answers (`replies.endpoint`, `replies.local`).
      model: its name.
      parallel: requests at once.
      max_requests: in all, those of earlier runs included; what there is by then is finished without more.
      prices: of a million tokens, in prompts and in replies.
      say: takes a line for the user.

    Raises:
      ValueError: settings out of range; the generator's errors; no usable instruction in many replies.
    """
    s = settings or Settings()
    if s.number < 1 or s.instances < 1 or not 0 < s.novelty <= 1 or s.human < 1 or s.machine < 0 or parallel < 1:
        raise ValueError(
            "number, instances, human and parallel must be at least 1, machine at least 0, and novelty in (0, 1]; "
            f"got {s.number}, {s.instances}, {s.human}, {parallel}, {s.machine} and {s.novelty}"
        )
    log = Log(out / "replies.jsonl", generate, model, parallel=parallel, most=max_requests, say=say)
    counts: dict[str, Counter] = {k: Counter() for k in ("instructions", "classification", "instances")}
    tasks: list[Task] = []
    lines: list[dict] = []
    try:
        _instructions(log, seeds, s, tasks, counts["instructions"], say)
        _examples(log, seeds, s, tasks, lines, counts, say)
    except (ValueError, KeyboardInterrupt) as e:
        log.offline = True
        for made in (lines, counts["classification"], counts["instances"]):
            made.clear()
        _examples(log, seeds, s, tasks, lines, counts, lambda text: None)  # what the replies so far give
        what = (
            f"{str(e) or 'interrupted'}; what there is so far is in {out}: the command, given again, goes on from there"
        )
        raise (ValueError(what) if isinstance(e, ValueError) else KeyboardInterrupt(what)) from None
    finally:
        found = Found(lines, _statistics(log, tasks, lines, counts, prices))
        for name, rows in (("instructions", [t._asdict() for t in tasks]), ("examples", lines)):
            write_atomically(out / f"{name}.jsonl", "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows))
        write_atomically(out / "statistics.json", json.dumps(found.statistics, indent=1, ensure_ascii=False) + "\n")
    say(f"{log.asked} requests asked now, {len(log.used) - log.asked} answered by the log")
    if not log.used:
        raise ValueError(f"no request was asked; the first round asks {ROUND}: allow --max-requests at least so many")
    if not lines:
        why = "; ".join(f"{k}: {', '.join(f'{reason} {n}' for reason, n in c.items())}" for k, c in counts.items() if c)
        raise ValueError(f"no example came of {len(log.used)} replies ({why}); allow more requests or a stronger model")
    return found


# New instructions


def _instructions(
    log: Log, seeds: Sequence[Seed], s: Settings, tasks: list[Task], counts: Counter, say: Callable[[str], None]
) -> None:
    novel = _Novelty([seed.instruction for seed in seeds], s.novelty)
    start = step = 0
    while len(tasks) < s.number:
        if log.left is not None and log.left - ROUND < 2 * len(tasks):  # each will take two requests more
            say(f"the limit of requests leaves no more than {len(tasks)} of {s.number} instructions")
            return
        shown, requests = [], []
        for i in range(ROUND):
            rng = np.random.default_rng((s.seed, 1, step + i))
            of_model = _sample(rng, tasks, s.machine)
            both = [*of_model, *_sample(rng, seeds, s.human + s.machine - len(of_model))]
            both = [both[j] for j in rng.permutation(len(both))]
            shown.append(tuple(x.id for x in both))
            params = Params(s.max_tokens, s.temperature, s.top_p, seed=_seed(s, f"instruction {step + i}"))
            prompt = _ask_instructions([x.instruction for x in both])
            requests.append(Request(f"instruction {step + i}", prompt, params))
        before = len(tasks)
        for request, ids, reply in zip(requests, shown, log.ask(requests), strict=True):
            if reply is None:
                continue
            proposed, problem = list_of(reply, len(ids) + 1)
            counts.update([problem] if problem else [])
            for text in proposed:
                counts["proposed"] += 1
                reason, rouge = unsuited(text), 0.0
                if reason is None:
                    rouge = novel.nearest(text)
                    reason = "like another" if rouge >= s.novelty else None
                if reason is not None:
                    counts[reason] += 1
                elif len(tasks) == s.number:
                    counts["more than wanted"] += 1
                else:
                    novel.add(text)
                    tasks.append(Task(f"machine_{len(tasks)}", text, ids, round(rouge, 4), request.id(log.model)))
        step += ROUND
        start = start if len(tasks) == before else step
        say(f"{len(tasks)} of {s.number} instructions after {step} requests")
        if step - start >= DRY * ROUND and len(tasks) < s.number:
            why = ", ".join(f"{k} {n}" for k, n in counts.most_common())
            say(f"no new instruction in {step - start} replies ({why}): going on with the {len(tasks)} there are")
            return


def _ask_instructions(shown: Sequence[str]) -> str:
    first, last = len(shown) + 1, len(shown) + WANTED
    listed = "".join(f"{i}. {text}\n" for i, text in enumerate(shown, 1))
    return (
        "People ask a helpful writing assistant for many kinds of things. The list below shows some. Add new ones of "
        f"other kinds, up to number {last}: a line each, numbered, nothing else. Each must be possible to do in "
        f"writing alone; it may speak of a text that will be given with it.\n\n{listed}{first}."
    )


def list_of(reply: Reply, start: int) -> tuple[list[str], str | None]:
    """The items of a numbered list that goes on from `start`, and what is wrong with the reply (None: nothing).

    A reply that continues the prompt has its first item before the first number; the last item of one that was cut
    off is left out.

    >>> list_of(Reply("Name a river.\\n10. Write a haiku\\nabout rain."), 9)
    (['Name a river.', 'Write a haiku about rain.'], None)
    """
    problem = _problem(reply)
    if problem in ("malformed", "empty"):
        return [], problem
    before, *rest = re.split(r"(?m)^\s*(\d{1,4})\s*[.)]\s+", "\n" + reply.text)
    if not rest:
        return [], "no list"
    items = rest[1::2]
    if int(rest[0]) == start + 1 and before.strip():
        items = [before, *items]
    items = [_line(text) for text in (items[:-1] if problem == "cut off" else items)]
    return [text for text in items if text], problem


def unsuited(instruction: str) -> str | None:
    """Why an instruction is dropped, by its words alone; None: it is not.

    >>> unsuited("Draw a map of France with all its rivers.")
    'asks for what text is not'
    """
    words = len(instruction.split())
    if words < WORDS[0]:
        return "too short"
    if words > WORDS[1]:
        return "too long"
    if UNSUITED.search(instruction):
        return "asks for what text is not"
    if re.match(r"write a program\b", instruction, re.IGNORECASE):
        return "asks for a program"
    if instruction[0] in string.punctuation:
        return "begins with punctuation"
    if not instruction[0].isascii():
        return "begins with another script"
    return None


class _Novelty:
    """ROUGE-L (F-measure) of an instruction with all so far; each text is tokenised once."""

    def __init__(self, texts: Sequence[str], threshold: float):
        from rouge_score import rouge_scorer, tokenizers

        self._tokenizer, self._known, self._texts = tokenizers.DefaultTokenizer(), {}, []
        self._scorer = rouge_scorer.RougeScorer(["rougeL"], tokenizer=self)
        for text in texts:
            self.add(text)

    def tokenize(self, text: str) -> list[str]:
        """What the scorer calls."""
        if text not in self._known:
            self._known[text] = self._tokenizer.tokenize(text)
        return self._known[text]

    def add(self, text: str) -> None:
        self._texts.append((text, Counter(self.tokenize(text))))

    def nearest(self, text: str) -> float:
        words = Counter(self.tokenize(text))
        best, length = 0.0, words.total()
        for other, counted in self._texts:
            shared = (words & counted).total()  # no common subsequence is longer
            if shared and 2 * shared / (length + counted.total()) > best:
                best = max(best, self._scorer.score(other, text)["rougeL"].fmeasure)
        return best


# Classification or not, and instances


def _examples(
    log: Log,
    seeds: Sequence[Seed],
    s: Settings,
    tasks: Sequence[Task],
    lines: list[dict],
    counts: dict[str, Counter],
    say: Callable[[str], None],
) -> None:
    question = _question(seeds, s)
    heads = {kind: _head(seeds, s, kind) for kind in (False, True)}
    for at in range(0, len(tasks), CHUNK):
        part = tasks[at : at + CHUNK]
        asked = [_request("classification", t, f"{question}Task: {t.instruction}\nClassification:", 8) for t in part]
        replies = zip(part, asked, log.ask(asked), strict=True)
        found = [(t, r.id(log.model), _yes(x, counts["classification"])) for t, r, x in replies if x is not None]
        asked = [_request("instances", t, f"{heads[k]}Task: {t.instruction}\n", s.max_tokens) for t, _, k in found]
        for (t, before, kind), request, reply in zip(found, asked, log.ask(asked), strict=True):
            if reply is None:
                continue
            parsed, problem = (labelled if kind else paired)(reply)
            counts["instances"].update([problem] if problem else [])
            source = {"model": log.model, "task": t.id, "shown": list(t.shown), "rouge_l": t.rouge_l}
            source |= {"classification": kind, "requests": [t.request, before, request.id(log.model)]}
            source["time"] = datetime.fromtimestamp(reply.time, UTC).isoformat()
            for x in clean(parsed[: s.instances], counts["instances"]):
                lines.append({"instruction": t.instruction, **x, "source": source})
        say(f"{len(lines)} examples of {at + len(part)} instructions")


def _request(step: str, task: Task, prompt: str, max_tokens: int) -> Request:
    return Request(f"{step} {task.id}", prompt, Params(max_tokens, stop=("\nTask:",)))


def _question(seeds: Sequence[Seed], s: Settings) -> str:
    rng = np.random.default_rng((s.seed, 2))
    shown = _sample(rng, [x for x in seeds if x.is_classification], s.shots[0])
    shown += _sample(rng, [x for x in seeds if not x.is_classification], s.shots[1])
    shown = [shown[i] for i in rng.permutation(len(shown))]
    head = (
        "A classification task is one whose answer is picked from a few fixed labels. "
        "Say of each task whether it is one, by Yes or No.\n\n"
    )
    return head + "".join(
        f"Task: {x.instruction}\nClassification: {'Yes' if x.is_classification else 'No'}\n\n" for x in shown
    )


def _yes(reply: Reply, counts: Counter) -> bool:
    word = re.search(r"\b(yes|no)\b", reply.text, re.IGNORECASE)
    counts[word[1].lower() if word else "unclear, taken for no"] += 1  # for most tasks are none
    return word is not None and word[1].lower() == "yes"


def _head(seeds: Sequence[Seed], s: Settings, classification: bool) -> str:
    rng = np.random.default_rng((s.seed, 3, classification))
    short = [x for x in seeds if x.is_classification == classification and sum(map(len, x.instances[0])) < 800]
    shown = _sample(rng, short, s.shots[2])
    if classification:
        head = (
            f"Make up examples for tasks that are answered by a label: {s.instances} of them, each of another label if "
            "there are enough. Each is three lines: Example and its number, Label, and Input, which has that label. "
            "Write nothing else.\n\n"
        )
        one = "Example {}\nLabel: {x.output}\nInput: {x.input}\n"
    else:
        head = (
            f"Make up {s.instances} examples for a task. Each is three lines: Example and its number, Input, and the "
            "right Output for it. A task that needs no input has one example, whose input is none. "
            "Write nothing else.\n\n"
        )
        one = "Example {}\nInput: {x.input}\nOutput: {x.output}\n"
    for seed in shown:
        words = [x if x.input else x._replace(input="none") for x in seed.instances[: s.instances]]
        head += f"Task: {seed.instruction}\n" + "".join(one.format(i, x=x) for i, x in enumerate(words, 1)) + "\n"
    return head


def paired(reply: Reply) -> tuple[list[dict[str, str]], str | None]:
    """Input-first instances: `Input: ... Output: ...`, as often as they come.

    >>> paired(Reply("Example 1\\nInput: none\\nOutput: A wren."))
    ([{'input': '', 'output': 'A wren.'}], None)
    """
    return _fields(reply, "Input", r"(?:Input:(?P<input>.*?)\n)?\s*Output:(?P<output>.*)")


def labelled(reply: Reply) -> tuple[list[dict[str, str]], str | None]:
    """Output-first instances: `Label: ... Input: ...`, as often as they come.

    >>> labelled(Reply("Example 1\\nLabel: good\\nInput: Fine soup.\\nExample 2\\nLabel: bad\\nInput: Cold soup."))
    ([{'input': 'Fine soup.', 'output': 'good'}, {'input': 'Cold soup.', 'output': 'bad'}], None)
    """
    return _fields(reply, "Label", r"Label:(?P<output>.*?)(?:\n\s*Input:(?P<input>.*))?")


def _fields(reply: Reply, first: str, form: str) -> tuple[list[dict[str, str]], str | None]:
    problem = _problem(reply)
    if problem in ("malformed", "empty"):
        return [], problem
    parts = [p.strip() for p in re.split(rf"(?m)^\W*Example \d+\W*$|^(?={first}:)", reply.text) if p.strip()]
    if problem == "cut off":
        parts = parts[:-1]
    found = [m for m in (re.fullmatch(form, part, re.DOTALL) for part in parts) if m]
    out = []
    for match in found:
        given = (match["input"] or "").strip()
        bare = given.lower().strip(" .()<>[]")
        out.append({"input": "" if bare in NONE else given, "output": match["output"].strip()})
    return out, problem or (None if out else "no instance")


def clean(instances: Sequence[dict[str, str]], counts: Counter) -> list[dict[str, str]]:
    """The instances of one task that pass the filters; `counts` says why the others did not.

    Dropped: no output, an output that repeats the input, one side that ends in a colon (its rest is missing), an
    instance that came before, and all of those that give one input different outputs. An empty input may have several.

    >>> clean([{"input": "a", "output": "b"}, {"input": "a", "output": "c"}], Counter())
    []
    """
    counts["instances"] += len(instances)
    kept: list[dict[str, str]] = []
    for x in instances:
        if not x["output"]:
            counts["no output"] += 1
        elif x["output"] == x["input"]:
            counts["output repeats the input"] += 1
        elif x["output"].endswith(":") or x["input"].endswith(":"):
            counts["unfinished"] += 1
        elif x in kept:
            counts["came before"] += 1
        else:
            kept.append(x)
    outputs = Counter(x["input"] for x in kept if x["input"])
    out = [x for x in kept if outputs[x["input"]] < 2]
    counts["one input, several outputs"] += len(kept) - len(out)
    counts["kept"] += len(out)
    return out


def _problem(reply: Reply) -> str | None:
    if reply.finish == "malformed":
        return "malformed"
    if not reply.text.strip():
        return "empty"
    return "cut off" if reply.finish == "length" else None


def _line(text: str) -> str:
    return " ".join(text.split())


def _sample(rng: np.random.Generator, items: Sequence, most: int) -> list:
    return [items[i] for i in rng.permutation(len(items))[:most].tolist()]


def _seed(s: Settings, step: str) -> int:
    return zlib.crc32(f"{s.seed} {step}".encode())


def _statistics(
    log: Log, tasks: Sequence[Task], lines: Sequence[dict], counts: dict[str, Counter], prices: tuple[float, float]
) -> dict[str, Any]:
    words = {k: [len(x[k].split()) for x in lines] for k in ("instruction", "input", "output")}
    read, written = log.tokens()
    return {
        "model": log.model,
        "instructions": len(tasks),
        "examples": len(lines),
        "with input": sum(bool(x["input"]) for x in lines),
        "mean words": {k: round(float(np.mean(n)), 2) if n else 0.0 for k, n in words.items()},
        "mean rouge_l with the nearest": round(float(np.mean([t.rouge_l for t in tasks])), 4) if tasks else 0.0,
        "requests": len(log.used),
        "prompt tokens": read,
        "completion tokens": written,
        "cost": round((read * prices[0] + written * prices[1]) / 1e6, 6),
        "counts": {k: {reason: n for reason, n in sorted(c.items()) if n} for k, c in counts.items()},
    }


def statistics_table(statistics: dict[str, Any]) -> Table:
    """Name and value, the counts of each step in one cell."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for name, value in statistics.items():
        if name == "counts":
            for step, counts in value.items():
                table.add_row(step, ", ".join(f"{k} {n}" for k, n in counts.items()))
        elif isinstance(value, dict):
            table.add_row(name, ", ".join(f"{k} {n}" for k, n in value.items()))
        else:
            table.add_row(name, str(value))
    return table
