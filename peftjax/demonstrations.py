"""Demonstrations: which training rows are shown before a query, and how the prompt reads."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import chat
from .generate import Prompt
from .likelihood import Pair, encode_pair
from .problem import Problem
from .tasks import Row, Task
from .templates import TEMPLATES, Rendered, read_templates, templates_of

SELECTIONS = ("random", "balanced", "bm25")
SEPARATOR = "\n\n"  # between demonstrations
CONTENT_FREE = ("N/A", "", "[MASK]")  # Zhao et al. 2021, arXiv:2102.09690
OWN = "own"  # the name of a generation task's own prompt


def join(shown: Sequence[Rendered], query: str, separator: str = SEPARATOR) -> str:
    """The prompt: each demonstration with its answer, then the query without one.

    >>> join([Rendered("2 + 2 =", "4")], "1 + 2 =", separator="; ")
    '2 + 2 = 4; 1 + 2 ='
    """
    return separator.join([*(f"{r.input} {r.target}" for r in shown), query])


def wording(
    task: Task, name: str | None = None, file: str | Path | None = None
) -> tuple[str, Callable[[Row], Rendered]]:
    """How the task's rows read: the name of the template, and row -> words.

    Args:
      name: of a template of the task; default: the first. A generation task without templates is put in words by its
        own prompt and target, under the name 'own'.
      file: YAML with templates for tasks (`templates.read_templates`), which replace those that the tasks have.

    The choices of a classification are in the order of its labels.

    Raises:
      ValueError: no template, or none of that name; or, from the function, a column that the row lacks, or choices that
        are not the labels' words.
    """
    table = TEMPLATES if file is None else TEMPLATES | read_templates(file)
    if task.kind == "generation" and (name == OWN or (name is None and task.name not in table)):
        prompt = task.prompt or (lambda row: row[task.inputs[0]])
        return OWN, lambda row: Rendered(prompt(row), row[task.target])
    known = {t.name: t for t in templates_of(task, table)}
    name = next(iter(known)) if name is None else name
    if name not in known:
        raise ValueError(f"{task.name} has no template {name!r}; it has {', '.join(known)}")
    template, labels = known[name], {str(x): x for x in task.labels or ()}

    def words(row: Row) -> Rendered:
        if task.kind != "classification":
            return template.render(row)
        row = {**row, task.target: labels.get(str(row[task.target]), row[task.target])}  # a TSV file's are texts
        rendered = template.render(row)
        texts = tuple(template.render({**row, task.target: x}).target for x in labels.values())
        if sorted(rendered.choices or ()) != sorted(texts):
            raise ValueError(
                f"template {name!r}: its choices are {rendered.choices}, but the labels read {texts}; few-shot "
                "classification needs one choice for each label"
            )
        return rendered._replace(choices=texts)

    return name, words


def select(
    how: str,
    pool: Sequence[str],
    answers: Sequence[str],
    queries: Sequence[str],
    shots: int,
    seed: int = 0,
) -> list[tuple[int, ...]]:
    """The rows of the pool that are shown before each query, in the order in which they are shown.

    - random: one set for all queries, drawn without replacement. The sets of one seed are nested: that of 2 shots
      begins that of 4.
    - balanced: one set for all queries with equally many rows of each answer; where the shots do not divide, the
      answers with one row more are drawn. The order is shuffled.
    - bm25: for each query the rows nearest to it, the nearest last (Liu et al. 2021, arXiv:2101.06804, with BM25 for
      the similarity); of equally near ones the earlier. The seed does not matter.

    Args:
      pool, answers: (n) texts of the rows and their answers.
      queries: (m) texts.

    Returns:
      m tuples of `shots` indices.

    Raises:
      ValueError: an unknown selection, or fewer rows than shots.

    >>> select("bm25", ["a red cat", "a blue dog", "red dogs"], ["x", "y", "x"], ["one red cat", "my dog"], 2)
    [(2, 0), (0, 1)]
    """
    if how not in SELECTIONS:
        raise ValueError(f"there is no selection {how!r}; there are {', '.join(SELECTIONS)}")
    if shots > len(pool):
        raise ValueError(f"{shots} shots need as many training rows; there are {len(pool)}; write fewer --shots")
    if shots == 0:
        return [()] * len(queries)
    rng = np.random.default_rng(seed)
    if how == "random":
        return [tuple(rng.permutation(len(pool))[:shots].tolist())] * len(queries)
    if how == "balanced":
        return [_balanced(answers, shots, rng)] * len(queries)
    return _nearest(pool, queries, shots)


def _balanced(answers: Sequence[str], shots: int, rng: np.random.Generator) -> tuple[int, ...]:
    rows: dict[str, list[int]] = defaultdict(list)
    for i, answer in enumerate(answers):
        rows[answer].append(i)
    names = sorted(rows)
    each, more = divmod(shots, len(names))
    lucky = {names[i] for i in rng.permutation(len(names))[:more]}
    chosen: list[int] = []
    for name in names:
        wanted = each + (name in lucky)
        if wanted > len(rows[name]):
            raise ValueError(
                f"{shots} balanced shots need {wanted} training rows with the answer {name!r}; there are "
                f"{len(rows[name])}; write fewer --shots, or --select random"
            )
        chosen += rng.permutation(rows[name])[:wanted].tolist()
    return tuple(rng.permutation(chosen).tolist())


def _nearest(pool: Sequence[str], queries: Sequence[str], shots: int) -> list[tuple[int, ...]]:
    import bm25s

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize(list(texts), stopwords=[], token_pattern=r"\w+", show_progress=False, return_ids=False)

    documents = words(pool)
    vocabulary = {w for d in documents for w in d}
    index = bm25s.BM25()
    if vocabulary:
        index.index(documents, show_progress=False)
    found = []
    for query in words(queries):
        known = [w for w in query if w in vocabulary]
        scores = index.get_scores(known) if known else np.zeros(len(pool))
        found.append(tuple(np.argsort(-scores, kind="stable")[:shots][::-1].tolist()))
    return found


# What is asked: the test inputs and their prompts


class FewShot(NamedTuple):
    """How demonstrations are chosen and answers scored.

    Attributes:
      shots: numbers of demonstrations; None: those of `SHOTS` that fit.
      select: one of `peftjax.demonstrations.SELECTIONS`.
      seeds: sets of demonstrations drawn, and trainings of each method, counted from 0.
      template: name; None: the task's first.
      templates: YAML file with templates of one's own.
      calibrate: divide by the probabilities after a query without content (`calibrated`).
      normalize: rank choices by log-likelihood a token, not by that of the whole.
      separator: between demonstrations; a generated text ends before it.
      batch_size: prompts at once; of a task with choices, prompts with one of them.
    """

    shots: tuple[int, ...] | None = None
    select: str = "random"
    seeds: int = 1
    template: str | None = None
    templates: str | Path | None = None
    calibrate: bool = False
    normalize: bool = False
    separator: str = SEPARATOR
    batch_size: int = 16


class Item(NamedTuple):
    """A test input.

    Attributes:
      text: its columns, to find similar rows by.
      input: in words.
      choices, answer: of a task with choices: the texts, and the number of the right one.
      free: the input in words with its columns replaced by each of `CONTENT_FREE`.
      references, slots: of a generation task.
    """

    text: str
    input: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    free: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    slots: tuple[str, ...] | None = None


class Bench(NamedTuple):
    """What all rows of the table share.

    Attributes:
      how, task, template: as asked for.
      items: the test inputs.
      pool: the training rows in words, to draw demonstrations from; `texts`: their columns.
      problem: the model and its tokenizer, and the text-to-text task for training.
      buckets: lengths that the prompts are padded to, at most.
    """

    how: FewShot
    task: Task
    template: str
    items: list[Item]
    pool: list[Rendered]
    texts: list[str]
    problem: Problem
    buckets: int

    @property
    def encodes(self) -> bool:
        return self.problem.model.family.start_id is not None


class Asked(NamedTuple):
    """The prompts of one row of the table.

    Attributes:
      prompts: one for each item.
      pairs: of a task with choices: all (prompt, choice), each once.
      choices: item -> the pairs of its choices.
      free: item -> content-free input -> the pairs of its choices.
      counted: so many of the pairs are what queries cost; the others are there once for all queries.
      lengths: tokens of each item's longest text that has to fit.
      prompt_tokens: mean.
    """

    prompts: Sequence[Prompt]
    pairs: list[Pair]
    choices: list[list[int]]
    free: list[list[list[int]]]
    counted: int
    lengths: list[int]
    prompt_tokens: float


def ask(bench: Bench, shots: int, seed: int, template: str | None = None) -> Asked:
    """The prompts of all items with so many demonstrations; of a task with choices also as tokens, with each choice.

    With a chat template, each prompt is a user's message, and what is scored or written is the assistant's.
    """
    how, tokenizer = bench.how, bench.problem.tokenizer
    answers, queries = [r.target for r in bench.pool], [item.text for item in bench.items]
    sets = select(how.select, bench.texts, answers, queries, shots, seed)
    shown = [[bench.pool[i] for i in one] for one in sets]
    prompts = [join(s, item.input, how.separator) for s, item in zip(shown, bench.items, strict=True)]
    if not bench.items[0].choices:
        if template is not None:
            told = [chat.encode(tokenizer, _message(prompt), template) for prompt in prompts]
            lengths = [len(x) for x in told]
            most = [n + bench.problem.max_new_tokens for n in lengths]
            return Asked(told, [], [], [], 0, most, statistics.fmean(lengths))
        begin = 0 if bench.encodes or tokenizer.bos_token_id is None else 1
        ids = tokenizer(prompts, add_special_tokens=bench.encodes, verbose=False)["input_ids"]
        lengths = [begin + len(x) for x in ids]
        more = 0 if bench.encodes else bench.problem.max_new_tokens
        return Asked(prompts, [], [], [], 0, [n + more for n in lengths], statistics.fmean(lengths))
    numbers: dict[tuple[str, str], int] = {}

    def number(prompt: str, item: Item) -> list[int]:
        return [numbers.setdefault((prompt, " " + choice), len(numbers)) for choice in item.choices]

    choices = [number(prompt, item) for prompt, item in zip(prompts, bench.items, strict=True)]
    queries_end = len(numbers)
    free = [
        [number(join(s, text, how.separator), item) for text in item.free]
        for s, item in zip(shown, bench.items, strict=True)
    ]
    if template is None:
        pairs = [encode_pair(tokenizer, *texts, encodes=bench.encodes) for texts in numbers]
    else:
        pairs = [_chat_pair(tokenizer, *texts, template) for texts in numbers]
    sizes = [len(x) if bench.encodes else len(x) + len(y) for x, y in pairs]
    of_item = [[*c, *(i for one in f for i in one)] for c, f in zip(choices, free, strict=True)]
    once = len(set(sets)) == 1  # then the content-free prompts are the same for all queries, however many
    return Asked(
        prompts,
        pairs,
        choices,
        free,
        queries_end if once else len(pairs),
        [max(sizes[i] for i in one) for one in of_item],
        statistics.fmean(len(pairs[c[0]][0]) for c in choices),
    )


def _message(prompt: str) -> list[chat.Message]:
    return [{"role": "user", "content": prompt}]


def _chat_pair(tokenizer: Any, prompt: str, choice: str, template: str) -> Pair:
    """The conversation up to where the answer begins, and the answer as it is read after that."""
    head = chat.encode(tokenizer, _message(prompt), template)
    whole = chat.encode(tokenizer, _message(prompt), template, answer=choice.strip())
    start = next((i for i, (x, y) in enumerate(zip(head, whole, strict=False)) if x != y), len(head))
    return whole[:start], whole[start:]
