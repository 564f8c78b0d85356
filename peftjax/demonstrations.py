"""Demonstrations: which training rows are shown before a query, and how the prompt reads."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .tasks import Row, Task
from .templates import TEMPLATES, Rendered, templates_of

SELECTIONS = ("random", "balanced", "bm25")
SEPARATOR = "\n\n"  # between demonstrations
OWN = "own"  # the name of a generation task's own prompt


def join(shown: Sequence[Rendered], query: str, separator: str = SEPARATOR) -> str:
    """The prompt: each demonstration with its answer, then the query without one.

    >>> join([Rendered("2 + 2 =", "4")], "1 + 2 =", separator="; ")
    '2 + 2 = 4; 1 + 2 ='
    """
    return separator.join([*(f"{r.input} {r.target}" for r in shown), query])


def wording(task: Task, name: str | None = None) -> tuple[str, Callable[[Row], Rendered]]:
    """How the task's rows read: the name of the template, and row -> words.

    Args:
      name: of a template of the task; default: the first. A generation task without templates is put in words by its
        own prompt and target, under the name 'own'.

    The choices of a classification are in the order of its labels.

    Raises:
      ValueError: no template, or none of that name; or, from the function, a column that the row lacks, or choices that
        are not the labels' words.
    """
    if task.kind == "generation" and (name == OWN or (name is None and task.name not in TEMPLATES)):
        prompt = task.prompt or (lambda row: row[task.inputs[0]])
        return OWN, lambda row: Rendered(prompt(row), row[task.target])
    known = {t.name: t for t in templates_of(task)}
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
    - balanced: one set for all queries with equally many rows of each answer; where the shots do not divide, the answers
      with one row more are drawn. The order is shuffled.
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
