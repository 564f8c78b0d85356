"""Supervised fine-tuning: instructions and chats, rendered by a chat template, with the loss on the answers only.

rows -> (one conversation each) -> encode. A conversation is a list of `{"role", "content"}`; the template is a Jinja
text that the tokenizer holds (`tokenizer.chat_template`).
"""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .data import Encoded, Example, common, read_file
from .tasks import Chats, Row

SAMPLES = 5  # answers that are generated, to be looked at
ANSWERS = ("output", "response", "completion", "answer")
FORMS = (
    'expected {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}, or '
    '"instruction" (and "input") with "output", or "prompt" with "completion"'
)

# Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca. Deviation: the answer starts on a line of its own, so that no
# tokenizer joins its first sign with the colon. Turns after the first follow a blank line.
ALPACA = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'system' %}{{- m.content | trim }}{{- '\\n\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '### Response:\\n' }}{{- m.content | trim }}{{- eos_token }}"
    "{%- else %}"
    "{%- if loop.first %}{{- 'Below is an instruction that describes a task' }}"
    "{%- if m.input %}{{- ', paired with an input that provides further context' }}{%- endif %}"
    "{{- '. Write a response that appropriately completes the request.\\n\\n' }}"
    "{%- elif loop.previtem.role == 'assistant' %}{{- '\\n\\n' }}{%- endif %}"
    "{{- '### Instruction:\\n' }}{{- (m.instruction or m.content) | trim }}{{- '\\n\\n' }}"
    "{%- if m.input %}{{- '### Input:\\n' }}{{- m.input | trim }}{{- '\\n\\n' }}{%- endif %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
)
# Nothing but the turns, an answer after a blank and ended by its token, as the text-to-text tasks here are worded: what
# learns from it reads the prompts of `icl`, `evaluate` and `generate`.
PLAIN = (
    "{{- bos_token }}"
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}{{- ' ' }}{{- m.content | trim }}{{- eos_token }}"
    "{%- else %}{%- if not loop.first %}{{- '\\n' }}{%- endif %}{{- m.content | trim }}{%- endif %}"
    "{%- endfor %}"
)
TEMPLATES = {"alpaca": ALPACA, "plain": PLAIN}


def template(which: str) -> str:
    """The chat template of a name ('alpaca', 'plain') or in a file.

    >>> template("plain").startswith("{{- bos_token }}")
    True
    """
    if which in TEMPLATES:
        return TEMPLATES[which]
    if not Path(which).is_file():
        raise ValueError(f"there is no chat template {which!r}; write alpaca, plain or a file with a Jinja template")
    return Path(which).read_text()


def conversation(row: Mapping[str, Any], where: str = "the row") -> list[dict[str, str]]:
    """The turns of a row, whichever of the known forms it has.

    An instruction's input follows it after a blank line; a template that tells them apart finds both beside this.

    >>> conversation({"instruction": "Add.", "input": "1 and 2", "output": "3"})[0]
    {'role': 'user', 'content': 'Add.\\n\\n1 and 2', 'instruction': 'Add.', 'input': '1 and 2'}
    >>> [turn["content"] for turn in conversation({"prompt": "Who?", "answer": "Me."})]
    ['Who?', 'Me.']

    Raises:
      ValueError: another form, an empty answer, or a conversation without one.
    """

    def text(value, name):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {name} is {value!r}; expected a text")
        return value

    if "messages" in row:
        turns = row["messages"]
        if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= {*t} for t in turns):
            raise ValueError(f"{where}: messages are no list of turns; {FORMS}")
        for i, turn in enumerate(turns, 1):
            text(turn["role"], f"the role of turn {i}")
            if turn["role"] == "assistant":
                text(turn["content"], f"the content of turn {i}")
            elif not isinstance(turn["content"], str):
                raise ValueError(f"{where}: the content of turn {i} is {turn['content']!r}; expected a text")
        if all(turn["role"] != "assistant" for turn in turns):
            raise ValueError(f"{where}: no turn is the assistant's, so there is nothing to learn; {FORMS}")
        return turns
    asked, answer = (next((k for k in keys if k in row), None) for keys in (("instruction", "prompt"), ANSWERS))
    if asked is None or answer is None:
        raise ValueError(f"{where}: the columns are {', '.join(row)}; {FORMS}")
    user = {"role": "user", "content": text(row[asked], asked)}
    extra = row.get("input") or "" if asked == "instruction" else ""
    if not isinstance(extra, str):
        raise ValueError(f"{where}: input is {extra!r}; expected a text")
    if extra.strip():
        user |= {"content": f"{row[asked]}\n\n{extra}", "instruction": row[asked], "input": extra}
    return [user, {"role": "assistant", "content": text(row[answer], answer)}]


# Rows: from files, some held out, mixed.


def parse_sources(text: str) -> dict[Path, float | None]:
    """Files, separated by commas, each with its share of the training rows where one is given.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: no file, one twice, or a share that is no number above 0.
    """
    sources: dict[Path, float | None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, sign, share = (item, "", "") if Path(item).is_file() else item.rpartition("=")
        path = Path(name if sign or not share else item)
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}; write FILE.jsonl, or FILE.jsonl=0.3 for a share of 0.3")
        if path in sources:
            raise ValueError(f"{path} is named twice; name each file once")
        try:
            sources[path] = float(share) if sign else None
        except ValueError:
            raise ValueError(f"cannot read the share {share!r} of {path}; write a number, such as {path}=0.3") from None
        if sign and not 0 < float(share) < math.inf:
            raise ValueError(f"the share of {path} must be above 0; got {share}")
    if not sources:
        raise ValueError("sft needs files; write --data FILE.jsonl, or FILE.jsonl,OTHER.jsonl=0.3")
    return sources


def rows(chats: Chats, source: str | None, split: str) -> list[Row]:
    """The rows of 'train' or 'dev': conversations of all files, the held-out share of each being 'dev'.

    Without shares 'train' is all the rest. With shares it has as many rows as the rest, each file its share of them:
    some of its rows, or all and some again; files without a share divide what is left by their sizes. What is drawn is
    drawn with a fixed seed, so that it is the same in every epoch and every run.
    """
    if split not in ("train", "dev"):
        raise ValueError(f"sft has the splits train and dev, the share held out; there is no {split!r}")
    if not 0 < chats.holdout < 1:
        raise ValueError(f"holdout is the share of rows held out, between 0 and 1; got {chats.holdout}")
    if chats.cap is not None and chats.cap < 2:
        raise ValueError(f"cap must be at least 2 rows, one of them held out; got {chats.cap}")
    if chats.long not in ("cut", "drop"):
        raise ValueError(f"long must be 'cut' or 'drop'; got {chats.long!r}")
    sources, parts = parse_sources(source or ""), []
    for number, path in enumerate(sources):
        there = [_row(path, where, row) for where, row in read_file(path)]
        if len(there) < 2:
            raise ValueError(f"{path} has one row, and one is held out for the loss; expected at least two")
        order = np.random.default_rng((0, number)).permutation(len(there))[: chats.cap]
        dev = order[: math.ceil(chats.holdout * len(order))]
        train = order[len(dev) :]
        if not len(train):
            raise ValueError(f"holdout {chats.holdout} leaves no row of {path} to train on; write a smaller one")
        parts.append([there[i] for i in sorted((dev if split == "dev" else train).tolist())])
    if split == "dev" or len(parts) == 1:
        return [*itertools.chain(*parts)]
    mixed = _mixed(parts, list(sources.values()))
    return [mixed[i] for i in np.random.default_rng(1).permutation(len(mixed))]  # so that the first few are of all


def _row(path: Path, where: str, row: Row) -> Row:
    messages = conversation(row, where)
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant")
    asked = json.dumps(messages[:last])
    return {"messages": messages, "prompt": asked, "answer": messages[last]["content"], "file": str(path), "at": where}


def _mixed(parts: list[list[Row]], weights: list[float | None]) -> list[Row]:
    if all(w is None for w in weights):
        return [*itertools.chain(*parts)]
    sizes, given = [len(part) for part in parts], sum(w for w in weights if w is not None)
    open_ = sum(n for n, w in zip(sizes, weights, strict=True) if w is None)
    if open_ and given >= 1:
        raise ValueError(f"the shares of --data sum to {given:g} and leave nothing for the files without one")
    out = []
    for i, (part, w) in enumerate(zip(parts, weights, strict=True)):
        share = (1 - given) * len(part) / open_ if w is None else w / (1 if open_ else given)
        wanted = max(1, round(share * sum(sizes)))
        again, some = divmod(wanted, len(part))
        drawn = np.random.default_rng((2, i)).permutation(len(part))[:some]
        out += part * again + [part[j] for j in sorted(drawn.tolist())]
    return out


# Tokens


def check_tokenizer(tokenizer: Any) -> None:
    """Raises a ValueError unless the tokenizer has a chat template and a token that ends an answer."""
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template; write --chat-template alpaca, plain, or a FILE with a Jinja template "
            "(in Python: tokenizer.chat_template = sft.template('alpaca'))"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-text token, so no answer would end; set tokenizer.eos_token")


def encode(chats: Chats, rows: Sequence[Row], tokenizer: Any, limit: int, *, for_generation: bool = False) -> Encoded:
    """Conversations as tokens, at most `limit` each, with the loss on the assistant's turns, their ends included.

    A turn's tokens are those that the conversation up to it has beyond the conversation before it with the template's
    opening of an answer; up to the last special token among them, so that a line break after an end-of-turn token is
    not learnt. Where the template marks the answers itself (`{% generation %}`), its marks count. `for_generation`: the
    first few conversations up to their last answer, cut at their beginning, to be completed.

    Raises:
      ValueError: no chat template, no end-of-text token, a template that refuses a conversation or whose beginnings
        change with what follows, or no answer that fits into the limit.
    """
    check_tokenizer(tokenizer)
    if for_generation:
        asked = [json.loads(row["prompt"]) for row in rows[:SAMPLES]]
        texts = [_render(tokenizer, turns, row["at"], True) for turns, row in zip(asked, rows, strict=False)]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        examples = [Example(x[-limit:], references=[row["answer"]]) for x, row in zip(ids, rows, strict=False)]
        return Encoded(examples, sum(len(x) > limit for x in ids), max(map(len, ids)))
    marked = re.search(r"\{%-?\s*generation\b", tokenizer.get_chat_template()) is not None
    pairs, joined = _by_marks(tokenizer, rows) if marked else _by_prefixes(tokenizer, rows)
    lengths = [len(ids) for ids, _ in pairs]
    kept = [(ids[:limit], mask[:limit]) for ids, mask in pairs if chats.long == "cut" or len(ids) <= limit]
    examples = [Example(ids, loss_mask=mask) for ids, mask in kept if any(mask[1:])]
    if not examples:
        raise ValueError(f"no answer fits into {limit} tokens; the shortest conversation has {min(lengths)}")
    cut = sum(length > limit for length in lengths) if chats.long == "cut" else 0
    notes = []
    if len({row["file"] for row in rows}) > 1:
        notes.append(_shares(rows))
    if left_out := len(rows) - len(examples):
        why = "longer than" if chats.long == "drop" else "without an answer in their first"
        notes.append(f"{left_out} of {len(rows)} left out, {why} {limit} tokens")
    if joined:
        notes.append(f"{joined} answers begin within a token, which counts as theirs")
    return Encoded(examples, cut, max(lengths), tuple(notes))


def _shares(rows: Sequence[Row]) -> str:
    taken = Counter(row["file"] for row in rows)
    different = {file: len({row["at"] for row in rows if row["file"] == file}) for file in taken}
    again = {file: f" ({different[file]} different)" if different[file] < n else "" for file, n in taken.items()}
    return ", ".join(f"{n} of {file}{again[file]}" for file, n in sorted(taken.items()))


def _render(tokenizer: Any, turns: list[dict], where: str, begin: bool = False) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=begin)
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template refuses the conversation in {where}: {e}") from e


def _by_marks(tokenizer: Any, rows: Sequence[Row]) -> tuple[list[tuple[list[int], list[int]]], int]:
    out = []
    for row in rows:
        _render(tokenizer, row["messages"], row["at"])
        got = tokenizer.apply_chat_template(row["messages"], return_dict=True, return_assistant_tokens_mask=True)
        out.append((got["input_ids"], got["assistant_masks"]))
    return out, 0


def _by_prefixes(tokenizer: Any, rows: Sequence[Row]) -> tuple[list[tuple[list[int], list[int]]], int]:
    texts: list[str] = []
    for row in rows:
        turns = row["messages"]
        whole = _render(tokenizer, turns, row["at"])
        texts.append(whole)
        for i in _answers(turns):
            before = _render(tokenizer, turns[:i], row["at"], begin=True)
            after = _render(tokenizer, turns[: i + 1], row["at"])
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"the chat template writes the conversation in {row['at']} up to turn {i + 1} otherwise than as "
                    "the beginning of the whole, so where its answer stands is unclear; mark the answers in the "
                    "template with {% generation %} and {% endgeneration %}, or give another --chat-template"
                )
            texts += [before, after]
    tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
    special, out, joined = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}, [], 0  # words may be unknown
    for row in rows:
        ids = next(tokens)
        mask = [0] * len(ids)
        for _ in _answers(row["messages"]):
            before, after = next(tokens), next(tokens)
            start, end = common(before, ids), common(after, ids)
            joined += start < len(before)
            end = max((j + 1 for j in range(start, end) if ids[j] in special), default=end)
            mask[start:end] = [1] * (end - start)
        out.append((ids, mask))
    return out, joined


def _answers(turns: list[dict]) -> list[int]:
    return [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
