"""Templates: how a row of a data set reads as an instruction and its answer (Jinja); `templates.yaml` holds them."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.meta
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .tasks import Task

_JINJA = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_JINJA.filters["findall"] = lambda text, pattern: re.findall(pattern, text, re.DOTALL)
_JINJA.filters["sub"] = lambda text, pattern, by: re.sub(pattern, by, text, flags=re.DOTALL)
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
      columns: further columns: Jinja expressions over the row and the columns before; computed only where a source
        names them. The filters `findall(pattern)` and `sub(pattern, by)` are `re`'s.

    >>> t = Template("plain", "Review: {{ sentence }}", "{{ label }}", "bad ||| good", {"label": {0: "bad", 1: "good"}})
    >>> t.render({"sentence": "Fine soup.", "label": 1})
    Rendered(input='Review: Fine soup.', target='good', choices=('bad', 'good'))
    """

    name: str
    input: str
    target: str
    choices: str | None = None
    words: Mapping[str, Mapping[Any, str]] = {}
    columns: Mapping[str, str] = {}

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """The row in words, blanks at the ends aside. An empty input or target: it does not apply to this row.

        Raises:
          ValueError: a source is no Jinja, names a column that the row lacks, or fails; a value without its word.
        """
        variables = _variables(self, row)
        choices = None
        if self.choices is not None:
            choices = tuple(text.strip() for text in _fill(self, self.choices, variables).split(BETWEEN))
        return Rendered(_fill(self, self.input, variables), _fill(self, self.target, variables), choices)


def _variables(template: Template, row: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(row)
    for column in template.words.keys() & out.keys():
        words, value = {str(k): word for k, word in template.words[column].items()}, out[column]
        if str(value) not in words and value not in words.values():
            known = ", ".join(words)
            raise ValueError(f"template {template.name!r} has no word for {column} {value!r}; it has some for {known}")
        out[column] = words.get(str(value), value)
    sources = [s for s in (template.input, template.target, template.choices) if s is not None]
    wanted = set().union(*(_names(template.name, s) for s in sources))
    for column, source in reversed(list(template.columns.items())):
        if column in wanted:
            wanted |= _names(template.name, f"{{{{ {source} }}}}")
    for column, source in template.columns.items():
        if column in wanted:
            out[column] = _run(template, lambda source=source: _expression(source)(**out), row)
    return out


def _fill(template: Template, source: str, variables: Mapping[str, Any]) -> str:
    return _run(template, lambda: _compiled(source).render(**variables), variables).strip()


def _run(template: Template, what, row: Mapping[str, Any]) -> Any:
    try:
        return what()
    except jinja2.UndefinedError as e:
        raise ValueError(f"template {template.name!r}: {e.message}; the row has the columns {sorted(row)}") from None
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"template {template.name!r} is no Jinja: {e}") from None
    except Exception as e:  # a template is a program of its writer's, and may raise anything
        raise ValueError(f"template {template.name!r} failed: {e}; the row has the columns {sorted(row)}") from None


@functools.lru_cache(maxsize=2048)
def _compiled(source: str) -> jinja2.Template:
    return _JINJA.from_string(source)


@functools.lru_cache(maxsize=512)
def _expression(source: str):
    return _JINJA.compile_expression(source, undefined_to_none=False)


@functools.lru_cache(maxsize=2048)
def _names(name: str, source: str) -> frozenset[str]:
    try:
        return frozenset(jinja2.meta.find_undeclared_variables(_JINJA.parse(source)))
    except jinja2.TemplateSyntaxError as e:
        raise ValueError(f"template {name!r} is no Jinja: {e}") from None


_SHARED = ("target", "choices", "words", "columns")


def read_templates(file: str | Path) -> dict[str, tuple[Template, ...]]:
    """Task -> its templates, from YAML: what they share, then each as its input, or as a mapping of what differs.

    ```yaml
    reviews:
      target: "{{ label }}"
      choices: bad ||| good
      words: {label: {0: bad, 1: good}}
      templates:
        plain: "Review: {{ text }}"
        write reversed: {input: "Write a {{ label }} review.", target: "{{ text }}", choices: null}
    ```

    Raises:
      ValueError, OSError: not such a file; it says where.
    """
    text = Path(file).read_text(encoding="utf-8")
    try:
        content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as e:
        raise ValueError(f"{file} is no YAML: {e}") from None
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: expected tasks, each with its `templates`; got {type(content).__name__}")
    return {str(task): _task(f"{file}, task {task!r}", value) for task, value in content.items()}


def _task(where: str, value: Any) -> tuple[Template, ...]:
    templates = value.get("templates") if isinstance(value, dict) else None
    if not isinstance(templates, dict) or not templates:
        raise ValueError(f"{where}: expected `templates`, written {{NAME: INPUT}}, beside `target`; got {value!r:.80}")
    _known(where, value, (*_SHARED, "templates"))
    shared = {k: v for k, v in value.items() if k != "templates"}
    out = []
    for name, own in templates.items():
        there = f"{where}, template {name!r}"
        own = {"input": own} if isinstance(own, str) else own
        if not isinstance(own, dict):
            raise ValueError(f"{there}: expected its input, or a mapping of what differs; got {own!r:.80}")
        _known(there, own, ("input", *_SHARED))
        fields = {"choices": None, "words": {}, "columns": {}} | shared | own
        for field in ("input", "target"):
            if not isinstance(fields.get(field), str):
                raise ValueError(f"{there}: `{field}` must be a text; got {fields.get(field)!r}")
        if not isinstance(fields["choices"], str | None):
            raise ValueError(f"{there}: `choices` must be one text, parted by {BETWEEN}; got {fields['choices']!r:.80}")
        for column, words in _mapping(there, "words", fields).items():
            wrong = [w for w in words.values() if not isinstance(w, str)] if isinstance(words, dict) else [words]
            if wrong:
                raise ValueError(
                    f"{there}: `words` of {column} must map values to texts; got {wrong[0]!r}. YAML reads yes, no, "
                    'true and numbers as other than texts: put them in quotes, as in {0: "no"}'
                )
        if not all(isinstance(source, str) for source in _mapping(there, "columns", fields).values()):
            raise ValueError(f"{there}: `columns` must map names to Jinja expressions; got {fields['columns']!r:.80}")
        out.append(Template(str(name), **fields))
    return tuple(out)


def _known(where: str, value: Mapping, names: Sequence[str]) -> None:
    unknown = [k for k in value if k not in names]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]!r} is none of {', '.join(names)}")


def _mapping(where: str, field: str, fields: Mapping[str, Any]) -> Mapping:
    if not isinstance(fields[field], dict):
        raise ValueError(f"{where}: `{field}` must be a mapping; got {fields[field]!r:.80}")
    return fields[field]


TEMPLATES = read_templates(Path(__file__).with_suffix(".yaml"))


def templates_of(task: Task, table: Mapping[str, Sequence[Template]] | None = None) -> Sequence[Template]:
    """The task's templates, the plain one first; from the table, by default `TEMPLATES`.

    Raises:
      ValueError: it has none.
    """
    table = TEMPLATES if table is None else table
    if task.name in table:
        return table[task.name]
    raise ValueError(f"there is no template for task {task.name!r}; there are some for {', '.join(sorted(table))}")
