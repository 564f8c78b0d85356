"""Templates: how a row of a data set reads as an instruction and its answer (Jinja)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .tasks import Task

_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
BETWEEN = "|||"  # parts the choices, as in promptsource


class Rendered(NamedTuple):
    """A row in words. `choices`: every answer that could stand in the place of `target`; None: any text."""

    input: str
    target: str
    choices: tuple[str, ...] | None = None


class Template(NamedTuple):
    """One way to put a task in words.

    Attributes:
      name: unique for its task.
      input, target: Jinja sources; the row's columns are their variables.
      choices: Jinja source of all answers, parted by `|||`; None for tasks that are answered in any words.
      words: column -> words for its values, e.g. {"label": {0: "negative", 1: "positive"}}: the sources see the words.

    >>> t = Template("plain", "Review: {{ sentence }}", "{{ label }}", "bad ||| good", {"label": {0: "bad", 1: "good"}})
    >>> t.render({"sentence": "Fine soup.", "label": 1})
    Rendered(input='Review: Fine soup.', target='good', choices=('bad', 'good'))
    """

    name: str
    input: str
    target: str
    choices: str | None = None
    words: Mapping[str, Mapping[Any, str]] = {}

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """The row in words, blanks at the ends aside.

        Raises:
          ValueError: the source is no Jinja, or names a column that the row lacks.
        """
        row = {k: self.words.get(k, {}).get(v, v) if isinstance(v, str | int) else v for k, v in row.items()}
        choices = None
        if self.choices is not None:
            choices = tuple(text.strip() for text in _fill(self, self.choices, row).split(BETWEEN))
        return Rendered(_fill(self, self.input, row), _fill(self, self.target, row), choices)


@functools.lru_cache(maxsize=512)
def _compiled(source: str) -> jinja2.Template:
    return _JINJA.from_string(source)


def _fill(template: Template, source: str, row: Mapping[str, Any]) -> str:
    try:
        return _compiled(source).render(**row).strip()
    except jinja2.UndefinedError as e:
        raise ValueError(f"template {template.name!r}: {e.message}; the row has the columns {sorted(row)}") from None
    except jinja2.TemplateError as e:
        raise ValueError(f"template {template.name!r} is no Jinja: {e}") from None


_SENTIMENT = {"label": {0: "negative", 1: "positive"}}
TEMPLATES: dict[str, tuple[Template, ...]] = {
    "sst2": (
        Template("review", "Review: {{ sentence }}\nSentiment:", "{{ label }}", "negative ||| positive", _SENTIMENT),
    ),
    "rte": (
        Template(
            "question",
            "{{ sentence1 }}\nQuestion: {{ sentence2 }} True or false?\nAnswer:",
            "{{ label }}",
            "true ||| false",
            {"label": {"entailment": "true", "not_entailment": "false"}},
        ),
    ),
}


def templates_of(task: Task) -> Sequence[Template]:
    """The task's templates; of a text-to-text task without any, its own prompt and target.

    Raises:
      ValueError: a task with labels and no template.
    """
    if task.name in TEMPLATES:
        return TEMPLATES[task.name]
    raise ValueError(f"there is no template for task {task.name!r}; there are some for {', '.join(sorted(TEMPLATES))}")
