"""From files or Hugging Face data sets to batches of fixed shapes: load_rows -> encode -> plan -> make_batch.

Nothing here is random but the order of `plan`, a function of (seed, epoch) alone: a run that resumes at step
n asks for batch n of the plan and gets the arrays that it would have seen.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from .tasks import Hub, Row, Task

Batch = dict[str, np.ndarray]  # what is in it: see make_batch


# Rows: from a source, with the task's column names, checked line by line.


def load_rows(task: Task, source: str | Path | None, split: str) -> list[Row]:
    """The rows of one split ('train', 'dev' or 'test'), under the task's own column names.

    `source` is a folder (JSONL, or TSV with a header line and no quoting), the name of a Hugging Face data
    set (`owner/name` or `owner/name:config`), or None for the task's own. Where a source has no dev split and
    the task states a `holdout`, dev is that share of train, drawn with a fixed seed, and train is the rest.
    """
    if task.kind not in ("classification", "regression", "generation") or len(task.inputs) not in (1, 2):
        raise ValueError(
            f"Task {task.name!r} has kind {task.kind!r} and inputs {task.inputs!r}; expected classification, "
            "regression or generation, and a tuple of one or two columns."
        )
    if task.chats is not None:
        from . import sft  # here, as it reads by this module

        return sft.rows(task.chats, None if source is None else str(source), split)
    if source is None and task.made is not None:
        return _checked(task, _Source(lambda split: True, _made(task.made)), split)
    found = _hub(task, source) if source is None or not Path(source).is_dir() else _folder(task, Path(source))
    if split in ("train", "dev") and task.holdout and not found.has("dev"):
        rows = _checked(task, found, "train")
        order = np.random.default_rng(0).permutation(len(rows))
        dev = set(order[: math.ceil(task.holdout * len(rows))].tolist())
        return [row for i, row in enumerate(rows) if (i in dev) == (split == "dev")]
    return _checked(task, found, split)


def labels_of(task: Task, train_rows: Sequence[Row]) -> tuple[Any, ...] | None:
    """The label values in id order: the task's, or the sorted values of the train rows; None without classes.

    With `task._replace(labels=labels_of(task, rows))`, `load_rows` checks the other splits line by line.
    """
    if task.kind != "classification":
        return None
    seen = {str(row[task.target]): row[task.target] for row in train_rows}
    return task.labels or tuple(sorted(seen.values(), key=lambda label: (isinstance(label, str), label)))


class _Source(NamedTuple):
    has: Callable[[str], bool]
    read: Callable[[str], Iterator[tuple[str, Row]]]  # split -> (where the row stands, for messages; the row)


def _made(make: Callable[[str], list[Row]]) -> Callable[[str], Iterator[tuple[str, Row]]]:
    return lambda split: ((f"made row {i}", dict(row)) for i, row in enumerate(make(split), 1))


def _folder(task: Task, folder: Path) -> _Source:
    def files(split: str) -> list[Path]:
        for names in task.files.get(split, ()):
            if all((folder / name).is_file() for name in names):
                return [folder / name for name in names]
        return []

    def read(split: str) -> Iterator[tuple[str, Row]]:
        if not files(split):
            wanted = " or ".join(" with ".join(names) for names in task.files.get(split, ())) or "none named"
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{folder} has no {split} file of task {task.name!r} ({wanted}); it holds: {there}."
            )
        for path in files(split):
            yield from read_file(path)

    return _Source(lambda split: bool(files(split)), read)


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a JSONL or TSV file, each with where it stands."""
    header: list[str] | None = None
    empty = True
    with path.open("rb") as file:  # in bytes a line ends with \n only: no cut at U+2028 and the like
        for number, raw in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                message = f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file."
                raise ValueError(message) from None
            if not line.strip():
                continue
            if path.suffix == ".tsv" and header is None:
                header = line.split("\t")
                continue
            empty = False
            yield where, _parse_tsv(where, line, header) if header is not None else _parse_json(where, line)
    if empty:
        raise ValueError(f"{path} holds no rows; expected one row a line.")


def _parse_json(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"{where}: malformed JSON at column {error.colno}: {error.msg}; expected an object a line."
        raise ValueError(message) from None
    if not isinstance(row, dict):
        raise ValueError(f'{where}: a JSON {type(row).__name__}; expected an object such as {{"text": "…"}}.')
    return row


def _parse_tsv(where: str, line: str, header: list[str]) -> Row:
    fields = line.split("\t")
    if len(fields) != len(header):
        raise ValueError(
            f"{where}: {len(fields)} fields, but the header has {len(header)} ({', '.join(header)}); "
            "expected one tab between fields, none inside, no quoting."
        )
    return dict(zip(header, fields, strict=True))


def _hub(task: Task, source: str | Path | None) -> _Source:
    hub = _find_hub(task, source)

    def read(split: str) -> Iterator[tuple[str, Row]]:
        if split not in hub.splits:
            raise ValueError(
                f"Task {task.name!r} has no {split!r} split with labels on {hub.name}; it has: {', '.join(hub.splits)}."
            )
        import datasets  # here, for it takes a second and folders do without

        try:
            table = datasets.load_dataset(hub.name, hub.config, split=hub.splits[split], revision=hub.revision)
        except (OSError, ValueError, RuntimeError) as error:
            raise FileNotFoundError(
                f"{hub.name!r} (config {hub.config}, split {hub.splits[split]!r}) is neither a folder under "
                f"{Path.cwd()} nor a data set that Hugging Face could load: {error}"
            ) from error
        names = _class_names(task, table.features)
        for number, item in enumerate(table, 1):
            row = dict(item)
            for column, values in names.items():
                if row[column] in range(len(values)):
                    row[column] = values[row[column]]
            yield f"{hub.name} {hub.config or ''} {hub.splits[split]}, row {number}", row

    return _Source(lambda split: split in hub.splits, read)


def _find_hub(task: Task, source: str | Path | None) -> Hub:
    if source is None:
        if task.hub is None:
            raise ValueError(f"Task {task.name!r} names no Hugging Face data set; give a folder with its files.")
        return task.hub
    name, _, config = str(source).partition(":")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):  # what no repository can be called must be a path
        raise FileNotFoundError(
            f"{source} is not a folder (looked from {Path.cwd()}); give a folder, or a data set's owner/name."
        )
    if task.hub is not None and name == task.hub.name:
        return task.hub._replace(config=config or task.hub.config)
    return Hub(name, config or None)


def _class_names(task: Task, features: Mapping[str, Any]) -> dict[str, list[str]]:
    """The target's, if it is a ClassLabel whose names are the task's labels: the order may differ."""
    targets = [column for column in features if task.aliases.get(column, column) == task.target]
    named = {column: getattr(features[column], "names", ()) for column in targets}  # only a ClassLabel has names
    ours = None if task.labels is None else set(map(str, task.labels))
    return {column: names for column, names in named.items() if names and (ours is None or ours >= set(names))}


def _checked(task: Task, source: _Source, split: str) -> list[Row]:
    rows = []
    for where, row in source.read(split):
        for alias, column in task.aliases.items():
            if alias in row and column not in row:
                row[column] = row.pop(alias)
        for column in (*task.inputs, task.target):
            if column not in row:
                raise ValueError(
                    f"{where}: no column {column!r}; there are: {', '.join(row)}. Rename one, or give the "
                    f"task aliases={{'theirs': {column!r}}}."
                )
        for column in task.inputs:
            if not isinstance(row[column], str):
                raise ValueError(f"{where}: column {column!r} is {row[column]!r}; expected a text.")
        if task.kind == "generation":
            target = row[task.target]
            references = target if isinstance(target, list) else [target]
            if not references or not all(isinstance(text, str) and text for text in references):
                of = "; ".join(str(row[column]) for column in task.inputs)
                raise ValueError(f"{where}: column {task.target!r} is {target!r}; expected a text or texts for {of!r}.")
            rows += [{**row, task.target: text} for text in references]
        else:
            _label(task, task.labels, row[task.target], where)
            rows.append(row)
    if not rows:  # an empty file is refused when it is read; a data set may be empty too
        raise ValueError(f"The {split} split of task {task.name!r} holds no rows.")
    return rows


def _label(task: Task, labels: Sequence[Any] | None, value: Any, where: str) -> int | float:
    """The id of a class, or the number itself. `labels` None: any text or integer will do; no id yet."""
    if task.kind == "regression":
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{where}: {task.target!r} is {value!r}; expected a finite number.")
        return number
    if labels is None and isinstance(value, str | int):
        return 0
    ids = {str(label): i for i, label in enumerate(labels or ())}
    if not any(re.fullmatch(r"-?\d+", label) for label in ids):  # named classes: their ids will do too
        ids |= {str(i): i for i in range(len(ids))}
    if str(value) not in ids:
        known = ", ".join(map(repr, labels)) if labels else "any text or integer"
        raise ValueError(
            f"{where}: label {value!r} is not one of task {task.name!r} ({known}); correct one or the other."
        )
    return ids[str(value)]


# Examples: rows as token ids.


class Example(NamedTuple):
    """One row in tokens, unpadded."""

    input_ids: list[int]
    type_ids: list[int] | None = None  # where the tokenizer gives them
    label: int | float | None = None  # class id or score
    loss_mask: list[int] | None = None  # causal LM: 1 on the tokens to predict, completion and EOS
    references: list[str] | None = None  # for generation: every accepted text
    slots: list[str] | None = None  # for generation: what the text must say, where the task has slots
    target_ids: list[int] | None = None  # of a decoder beside an encoder: completion and EOS, all to be predicted
    choices: list[tuple[str, list[int]]] | None = (
        None  # of multiple choice: every answer and its tokens; label: the right
    )


class Encoded(NamedTuple):
    examples: list[Example]
    truncated: int  # how many were cut to max_length
    longest: int  # in tokens, before the cut
    notes: tuple[str, ...] = ()  # what else the reader should know


def encode(
    task: Task,
    rows: Sequence[Row],
    tokenizer: Any,
    labels: Sequence[Any] | None,
    max_length: int | None = None,
    *,
    for_generation: bool = False,
    for_encoder: bool = False,
) -> Encoded:
    """Rows as tokens, at most `max_length` each (None: the task's).

    Classification and regression: as the tokenizer joins one text or two. Generation: BOS (if the tokenizer
    has one), prompt, completion, EOS, with the loss on completion and EOS only. `for_generation`: BOS and
    prompt, where rows of equal inputs are one example with several references, in the order of their first
    appearance. `for_encoder`: the prompt, as the tokenizer ends a text, is for an encoder, and completion and EOS are
    for its decoder; each of the two may be as long as the limit.

    `labels`: the values in id order (`labels_of`), for classification. A longer text is an error unless the
    task says `truncate`; then the longer of a pair is cut first, and of a generation's prompt the beginning (for an
    encoder, where the tokenizer cuts).
    """
    if not rows:
        raise ValueError(f"No rows of task {task.name!r} to encode; expected at least one.")
    limit = task.max_length if max_length is None else max_length
    if task.chats is not None:
        from . import sft

        if for_encoder:
            raise ValueError(f"{task.name} is for decoders, which read question and answer as one text")
        return sft.encode(task.chats, rows, tokenizer, limit, for_generation=for_generation)
    if task.kind == "generation":
        encode_ = _encode_pairs if for_encoder else _encode_texts
        examples, lengths = encode_(task, rows, tokenizer, limit, for_generation)
    else:
        examples, lengths = _encode_labelled(task, rows, tokenizer, labels, limit)
    return Encoded(examples, truncated=sum(length > limit for length in lengths), longest=max(lengths))


def _encode_labelled(
    task: Task, rows: Sequence[Row], tokenizer: Any, labels: Sequence[Any] | None, limit: int
) -> tuple[list[Example], list[int]]:
    if task.kind == "classification" and labels is None:
        raise ValueError(f"Task {task.name!r} is a classification; give labels=labels_of(task, train_rows).")
    targets = [_label(task, labels, row[task.target], f"row {i}") for i, row in enumerate(rows, 1)]
    columns = [[row[column] for row in rows] for column in task.inputs]
    tokens = tokenizer(*columns, verbose=False)  # silent about long texts, which are seen to below
    ids, types = tokens["input_ids"], tokens.get("token_type_ids") or [None] * len(rows)
    lengths = [len(tokens) for tokens in ids]
    for i in _too_long(task, lengths, limit):
        cut = tokenizer(*(column[i] for column in columns), truncation="longest_first", max_length=limit)
        ids[i], types[i] = cut["input_ids"], cut.get("token_type_ids")
    return [Example(*fields) for fields in zip(ids, types, targets, strict=True)], lengths


def _encode_texts(
    task: Task, rows: Sequence[Row], tokenizer: Any, limit: int, for_generation: bool
) -> tuple[list[Example], list[int]]:
    rows, references, prompts = _prompts(task, rows, tokenizer, for_generation)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    heads = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    if for_generation:
        tails = [[] for _ in rows]
    else:  # as one text, so that the first word gets the token that it has after a blank, in any tokenizer
        texts = [f"{prompt} {row[task.target]}" for prompt, row in zip(prompts, rows, strict=True)]
        whole = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for prompt, head, ids in zip(prompts, heads, whole, strict=True):
            if ids[: len(head)] != head:  # generation, given the prompt alone, would start elsewhere
                raise ValueError(
                    f"The tokenizer joins the end of the prompt {prompt!r} with the blank after it; let the "
                    "task's prompt end in a sign such as ':'."
                )
        tails = [[*ids[len(head) :], tokenizer.eos_token_id] for head, ids in zip(heads, whole, strict=True)]

    lengths = [len(begin) + len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    for i in _too_long(task, lengths, limit):
        surplus = lengths[i] - limit
        if surplus > len(heads[i]):
            raise ValueError(
                f"Row {i + 1} of task {task.name!r} is longer than {limit} tokens even without its prompt "
                f"({len(tails[i])} tokens); shorten it, or give a larger max_length."
            )
        heads[i] = heads[i][surplus:]
    if min(lengths) == 0:
        raise ValueError(f"Row {lengths.index(0) + 1} of task {task.name!r} gives no token; write a prompt.")
    examples = [
        Example(
            [*begin, *head, *tail],
            loss_mask=None if for_generation else [0] * len(begin + head) + [1] * len(tail),
            references=texts,
            slots=task.slots(row) if task.slots is not None and for_generation else None,
        )
        for head, tail, texts, row in zip(heads, tails, references, rows, strict=True)
    ]
    return examples, lengths


def _prompts(
    task: Task, rows: Sequence[Row], tokenizer: Any, for_generation: bool
) -> tuple[Sequence[Row], list[list[str] | None], list[str]]:
    """The rows, for generation one of each group of equal inputs; the references of each; their prompts."""
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no end-of-text token, so no text would end; set tokenizer.eos_token.")
    references: list[list[str] | None] = [None] * len(rows)
    if for_generation:
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(tuple(row[column] for column in task.inputs), []).append(row)
        references = [[row[task.target] for row in group] for group in groups.values()]
        rows = [group[0] for group in groups.values()]
    return rows, references, [row[task.inputs[0]] if task.prompt is None else task.prompt(row) for row in rows]


def _encode_pairs(
    task: Task, rows: Sequence[Row], tokenizer: Any, limit: int, for_generation: bool
) -> tuple[list[Example], list[int]]:
    rows, references, prompts = _prompts(task, rows, tokenizer, for_generation)
    sources = tokenizer(prompts, verbose=False)["input_ids"]
    targets: list[list[int]] = [[] for _ in rows]
    if not for_generation:
        texts = [row[task.target] for row in rows]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        targets = [[*one, tokenizer.eos_token_id] for one in ids]
    lengths = [max(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
    for i in _too_long(task, lengths, limit):
        if len(targets[i]) > limit:
            raise ValueError(
                f"The completion of row {i + 1} of task {task.name!r} is longer than {limit} tokens "
                f"({len(targets[i])}); shorten it, or give a larger max_length."
            )
        sources[i] = tokenizer(prompts[i], truncation=True, max_length=limit)["input_ids"]
    if empty := [i + 1 for i, source in enumerate(sources) if not source]:
        raise ValueError(f"Row {empty[0]} of task {task.name!r} gives no token; write a prompt.")
    examples = [
        Example(
            source,
            references=texts,
            slots=task.slots(row) if task.slots is not None and for_generation else None,
            target_ids=None if for_generation else target,
        )
        for source, target, texts, row in zip(sources, targets, references, rows, strict=True)
    ]
    return examples, lengths


def encode_choices(
    task: Task, rows: Sequence[Row], tokenizer: Any, max_length: int, *, for_encoder: bool = False
) -> Encoded:
    """Rows of multiple choice: the prompt, every answer's tokens as they would follow it, and which one is right.

    Encoded as `encode` does the row with that answer, without EOS. Each row is an example, equal prompts or not.

    Raises:
      ValueError: a row whose target is not one of its answers, or is among fewer than two; and as `encode`.
    """
    assert task.choices is not None  # what this function is for
    spread: list[Row] = []
    right, texts = [], []
    for i, row in enumerate(rows, 1):
        answers = list(task.choices(row))
        if len(answers) < 2 or len({*answers}) < len(answers) or row[task.target] not in answers:
            raise ValueError(
                f"Row {i} of task {task.name!r} has the target {row[task.target]!r} and the answers {answers}; "
                "expected two or more different answers, and the target among them."
            )
        right.append(answers.index(row[task.target]))
        texts.append(answers)
        spread += [{**row, task.target: answer} for answer in answers]
    encode_ = _encode_pairs if for_encoder else _encode_texts
    flat, lengths = encode_(task, spread, tokenizer, max_length, False)
    examples, longest, at = [], [], 0
    for answers, label, row in zip(texts, right, rows, strict=True):
        each, part = flat[at : at + len(answers)], lengths[at : at + len(answers)]
        at += len(answers)
        cuts = [len(e.input_ids) - sum(e.loss_mask or []) for e in each]  # where the answer begins; not of an encoder
        tails = [(e.target_ids or e.input_ids[cut:])[:-1] for e, cut in zip(each, cuts, strict=True)]  # no EOS
        heads = [e.input_ids[:cut] for e, cut in zip(each, cuts, strict=True)]
        shortest = min(heads, key=len)  # a long answer may have cut it, from the left
        choices = list(zip(answers, tails, strict=True))
        examples.append(Example(shortest, label=label, references=[row[task.target]], choices=choices))
        longest.append(max(part))
    return Encoded(examples, truncated=sum(n > max_length for n in longest), longest=max(longest))


def _too_long(task: Task, lengths: Sequence[int], limit: int) -> list[int]:
    long = [i for i, length in enumerate(lengths) if length > limit]
    if long and not task.truncate:
        raise ValueError(
            f"{len(long)} of {len(lengths)} texts of task {task.name!r} are longer than {limit} tokens (the "
            f"longest has {max(lengths)}, row {lengths.index(max(lengths)) + 1}); raise max_length (up to "
            "the model's own, less what virtual tokens take), shorten them, or allow cutting with "
            "task._replace(truncate=True)."
        )
    return long


# Batches: examples padded to a few lengths, so that a jitted step compiles a few times only.


def bucket_lengths(
    lengths: Sequence[int], max_buckets: int = 3, multiple: int = 8, limit: int | None = None
) -> tuple[int, ...]:
    """At most `max_buckets` lengths, multiples of `multiple` (or `limit`), that pad `lengths` least in total.

    Exact: dynamic programming over the distinct rounded lengths l_1 < … < l_m with counts c_i, where the
    cheapest cover of the first j by k buckets is  cost_k(j) = min_i cost_{k-1}(i) + l_j (c_{i+1} + … + c_j).

    >>> bucket_lengths([3, 5, 8, 30, 60], max_buckets=2)
    (8, 64)
    """
    if not len(lengths) or max_buckets < 1 or multiple < 1:
        raise ValueError(
            f"Buckets for {len(lengths)} lengths, max_buckets={max_buckets}, multiple={multiple}; "
            "expected at least 1 of each."
        )
    if limit is not None and max(lengths) > limit:
        raise ValueError(f"The longest text has {max(lengths)} tokens, over the limit {limit}; see `encode`.")
    rounded = Counter(min(-(-length // multiple) * multiple, limit or math.inf) for length in lengths)
    ends = np.array(sorted(rounded), np.int64)
    below = np.concatenate([[0], np.cumsum([rounded[end] for end in ends])])  # how many texts are shorter
    cost = np.array([0.0] + [math.inf] * len(ends))
    chosen: list[tuple[int, ...]] = [()] * (len(ends) + 1)
    for _ in range(min(max_buckets, len(ends))):
        # step[i, j]: the first i lengths are covered; bucket ends[j] takes those from i to j
        step = cost[:-1, None] + ends[None, :] * (below[None, 1:] - below[:-1, None])
        step[np.tril_indices(len(ends), -1)] = math.inf
        best = step.argmin(0)
        chosen = [(), *((*chosen[i], int(end)) for i, end in zip(best, ends, strict=True))]
        cost = np.concatenate([[math.inf], step.min(0)])
    return chosen[-1]  # of exactly that many: one bucket more never pads more


class Planned(NamedTuple):
    """One batch before its arrays are built."""

    length: int  # T
    index: np.ndarray  # (n,) int32, n <= batch size: which examples
    target_length: int = 0  # of a decoder beside an encoder; the same for all batches of a bucket


def plan(
    examples: Sequence[Example],
    batch_size: int,
    buckets: Sequence[int],
    *,
    shuffle_seed: int | None = None,
    epoch: int = 0,
) -> list[Planned]:
    """The batches of one epoch in order: every example once, each batch from one bucket.

    With a seed, the examples of a bucket are shuffled by default_rng((seed, epoch)), and the batches by
    default_rng(epoch), so that step by step every seed has batches of the same length (runs with several seeds train in
    one program); without one (evaluation) both keep their order. No arrays are built: `make_batch` builds those of one.
    """
    ends = np.array(sorted(buckets))
    lengths = np.array([len(example.input_ids) for example in examples])
    if batch_size < 1 or not examples or not len(ends) or lengths.max() > ends[-1]:
        raise ValueError(
            f"Cannot put {len(examples)} examples of up to {max(lengths, default=0)} tokens into batches of "
            f"{batch_size} with buckets {tuple(buckets)}; expected examples, a size above 0 and a bucket "
            "for the longest."
        )
    rng = None if shuffle_seed is None else np.random.default_rng((shuffle_seed, epoch))
    which = np.searchsorted(ends, lengths)  # the shortest bucket that holds it
    planned = []
    for bucket, end in enumerate(ends):
        index = np.flatnonzero(which == bucket).astype(np.int32)
        if rng is not None:
            rng.shuffle(index)
        longest = max((len(examples[i].target_ids or ()) for i in index.tolist()), default=0)
        target = -(-longest // 8) * 8
        planned += [Planned(int(end), index[i : i + batch_size], target) for i in range(0, len(index), batch_size)]
    return planned if rng is None else [planned[i] for i in np.random.default_rng(epoch).permutation(len(planned))]


def pack(
    lengths: Sequence[int], row_length: int, *, shuffle_seed: int | None = None, epoch: int = 0
) -> list[list[int]]:
    """Texts put together in rows of at most `row_length` tokens: first-fit decreasing.

    The longest text first, each into the first row that has room for it. Texts of one length come in an order drawn by
    default_rng((seed, epoch)), and then the rows; how many rows there are depends on the lengths alone.

    Returns:
      The numbers of the texts in each row.

    >>> pack([3, 5, 2, 4], 7)
    [[1, 2], [3, 0]]
    """
    if not len(lengths) or max(lengths) > row_length:
        raise ValueError(
            f"Cannot pack {len(lengths)} texts of up to {max(lengths, default=0)} tokens into rows of {row_length}; "
            "expected texts, and rows as long as the longest."
        )
    rng = None if shuffle_seed is None else np.random.default_rng((shuffle_seed, epoch))
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    room = np.full(len(lengths), row_length)  # of each row; there are no more rows than texts
    rows: list[list[int]] = []
    for i in order.tolist():
        row = int(np.argmax(room[: len(rows) + 1] >= lengths[i]))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows if rng is None else [rows[i] for i in rng.permutation(len(rows))]


def make_packed(
    examples: Sequence[Example], rows: Sequence[Sequence[int]], batch_size: int, row_length: int, *, pad_id: int
) -> Batch:
    """Several texts of a causal LM in each row, as numpy arrays of B = `batch_size` rows of T = `row_length` tokens:

    - `input_ids`, `attention_mask`, `loss_mask` (B, T) int32 as in `make_batch`; the first token of a text is never to
      be predicted, for what is before it is another text;
    - `segment_ids` (B, T) int32: 1 in a row's first text, 2 in its second, ..., 0 at padding;
    - `positions` (B, T) int32: from 0 in each text;
    - `weight` (B,) float32: 1, or 0 in the filler rows that complete a partial batch and repeat the first row.
    """
    names = ("input_ids", "segment_ids", "positions", "loss_mask")
    batch: Batch = {name: np.zeros((batch_size, row_length), np.int32) for name in names}
    batch["input_ids"][:] = pad_id
    for i, row in enumerate([*rows, *[rows[0]] * (batch_size - len(rows))]):
        start = 0
        for number, which in enumerate(row, 1):
            ids, mask = examples[which].input_ids, examples[which].loss_mask or [1] * len(examples[which].input_ids)
            here = slice(start, start + len(ids))
            batch["input_ids"][i, here], batch["segment_ids"][i, here] = ids, number
            batch["positions"][i, here] = np.arange(len(ids))
            batch["loss_mask"][i, here] = [0, *mask[1:]]
            start += len(ids)
    batch["loss_mask"][len(rows) :] = 0
    batch["attention_mask"] = (batch["segment_ids"] > 0).astype(np.int32)
    batch["weight"] = (np.arange(batch_size) < len(rows)).astype(np.float32)
    return batch


def packed_batches(
    examples: Sequence[Example],
    batch_size: int,
    row_length: int,
    *,
    pad_id: int,
    shuffle_seed: int | None = None,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch: `make_packed` over `pack`; every epoch has as many."""
    rows = pack([len(e.input_ids) for e in examples], row_length, shuffle_seed=shuffle_seed, epoch=epoch)
    for i in range(0, len(rows), batch_size):
        yield make_packed(examples, rows[i : i + batch_size], batch_size, row_length, pad_id=pad_id)


def make_batch(
    examples: Sequence[Example],
    planned: Planned,
    batch_size: int,
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
) -> Batch:
    """A dict of numpy arrays, B = `batch_size` rows of T = `planned.length` tokens:

    - `input_ids`, `attention_mask` (B, T) int32, padded with `pad_id` and 0 on that `side`: left for prompts;
    - `type_ids` (B, T) int32, where the tokenizer gave them;
    - `labels` (B,) int32 of classes, float32 of scores;
    - `loss_mask` (B, T) int32 of a causal LM: 1 where `input_ids` is to be predicted, by the position before;
    - `target_ids` and `loss_mask` (B, `planned.target_length`) int32 of a decoder beside an encoder, on the right;
    - `weight` (B,) float32 and `index` (B,) int32: 1 and the example's number, or 0 and -1 in the filler rows
      that complete a partial batch. A filler row repeats the first row, with a loss mask of 0: a row without
      a single token would make attention's softmax 0 / 0.
    """
    n = len(planned.index)
    rows = [examples[i] for i in planned.index] + [examples[planned.index[0]]] * (batch_size - n)

    def padded(
        values: Sequence[Sequence[int] | None], fill: int, length: int = planned.length, side: str = side
    ) -> np.ndarray:
        out = np.full((batch_size, length), fill, np.int32)
        for line, value in zip(out, values, strict=True):
            assert value is not None  # all examples of a task have the same fields
            line[slice(len(value)) if side == "right" else slice(length - len(value), None)] = value
        return out

    first = rows[0]
    real = np.arange(batch_size) < n
    batch = {
        "input_ids": padded([row.input_ids for row in rows], pad_id),
        "attention_mask": padded([[1] * len(row.input_ids) for row in rows], 0),
        "weight": real.astype(np.float32),
        "index": np.where(real, np.resize(planned.index, batch_size), -1).astype(np.int32),
    }
    if first.type_ids is not None:
        batch["type_ids"] = padded([row.type_ids for row in rows], 0)
    if first.label is not None:
        dtype = np.int32 if isinstance(first.label, int) else np.float32
        batch["labels"] = np.array([row.label for row in rows], dtype)
    if first.loss_mask is not None:
        batch["loss_mask"] = padded([row.loss_mask for row in rows], 0) * real[:, None].astype(np.int32)
    if first.target_ids is not None:
        targets = [row.target_ids or [] for row in rows]
        batch["target_ids"] = padded(targets, pad_id, planned.target_length, "right")
        ones = padded([[1] * len(target) for target in targets], 0, planned.target_length, "right")
        batch["loss_mask"] = ones * real[:, None].astype(np.int32)
    return batch


def batches(
    examples: Sequence[Example],
    batch_size: int,
    buckets: Sequence[int],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
    shuffle_seed: int | None = None,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The batches of one epoch: `make_batch` over `plan`."""
    for planned in plan(examples, batch_size, buckets, shuffle_seed=shuffle_seed, epoch=epoch):
        yield make_batch(examples, planned, batch_size, pad_id=pad_id, side=side)


def even_batches(
    examples: Sequence[Example],
    most: int,
    buckets: Sequence[int],
    *,
    pad_id: int,
    side: Literal["left", "right"] = "right",
) -> Iterator[Batch]:
    """Every example once, in batches of at most `most` rows that are even within a bucket: few rows are filler.

    Each bucket has one size, as few batches as `batches` makes of it, and so as many shapes: 20 examples are a batch of
    24 rows and not of 64, and 70 two of 40.
    """
    for whole in plan(examples, max(1, len(examples)), buckets):
        size = even_size(len(whole.index), most)
        for i in range(0, len(whole.index), size):
            part = whole._replace(index=whole.index[i : i + size])
            yield make_batch(examples, part, size, pad_id=pad_id, side=side)


def even_size(n: int, most: int, multiple: int = 8) -> int:
    """The rows of each batch where n go into the fewest batches of at most `most`; a multiple, unless that is too many.

    >>> even_size(70, 64), even_size(20, 64), even_size(64, 6)
    (40, 24, 6)
    """
    rows = -(-n // -(-n // most))
    return min(most, -(-rows // multiple) * multiple)


def common(a: Sequence, b: Sequence) -> int:
    """How many items (characters, tokens) the two begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
