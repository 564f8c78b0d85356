"""A sweep as data: models x tasks x methods x ranks x rates x seeds, and the rules for what some of the runs have else.

A `Cell` is one run. Its key is a hash of all that the grid says about it, names of models and tasks included, paths
left out: the same run of two grids is one, and machines that mount the data elsewhere share a folder of results.
"""

import ast
import dataclasses
import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from .methods import METHODS, parse
from .tasks import get_task
from .train import Settings

SEARCH, FINAL = "search", "final"
FIRST_TRIAL_SEED = 1000  # no seed of a table is one that a rate was chosen on
OPTIONS = ("eval_split", "train_limit", "eval_limit", "max_length", "max_buckets", "max_new_tokens", "decoding", "pack")
OPTIONS += ("dtype", "param_dtype", "quantize", "fresh_head", "head_prior", "remat")


@dataclasses.dataclass(frozen=True)
class Search:
    """A search for the learning rate before the seeds, with the same number of trials for each method.

    Where the table is of the test split, the trials are scored on dev.

    Attributes:
      factors: the rates that are tried, as multiples of the method's default rate for the model.
      rates: method -> the rates that are tried instead, as many as there are factors.
      tasks: what is searched on, for all tasks; empty: each task for itself.
      seeds: trials of each rate, of which the mean counts; their seeds are from 1000 on.
    """

    factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    rates: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    seeds: int = 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """What some of the runs have otherwise; of several rules the last wins.

    Attributes:
      settings: fields of `peftjax.train.Settings`; a learning rate here is not searched for.
      options: arguments of `peftjax.problem.prepare`.
      methods, tasks, models: of the runs that are meant, as the grid has them; empty: all.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    methods: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    models: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Published:
    """A cell of a paper's table, to stand beside ours.

    Attributes:
      method: as the grid has it, or a name of its own.
      model, task, metric: what was scored; a task and metric as the grid's, to stand beside it.
      score: as published.
      spread: as published, whatever the paper has after ±.
      trainable: trained parameters as published.
      source: the paper and table.
    """

    method: str
    model: str
    task: str
    metric: str
    score: float
    spread: float | None = None
    trainable: float | None = None
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Runs as data.

    Attributes:
      models: name -> folder or hub name.
      tasks: name -> folder or hub name of the data; None: the task's own.
      methods: as on the command line, each by itself.
      ranks: every method that has a rank is run with each of these.
      rates: learning rates that every run is made with, for an ablation.
      seeds: how many, counted from 0.
      search: how the learning rates are found; None: those of `rates` or of the rules, or the methods' defaults.
      settings: fields of `peftjax.train.Settings` for all runs.
      options: arguments of `peftjax.problem.prepare` for all runs.
      rules: what some of the runs have otherwise.
      baseline: the method that the report compares the others with.
      published: what the report puts beside ours.
      title: of the report.

    Raises:
      ValueError: something in it cannot be, with what there is instead.
    """

    models: Mapping[str, str]
    tasks: Mapping[str, str | None]
    methods: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    seeds: int = 1
    search: Search | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    baseline: str | None = None
    published: tuple[Published, ...] = ()
    title: str = ""

    def __post_init__(self):
        _check(self)


class Cell(NamedTuple):
    """One run of a grid.

    Attributes:
      model, source: its name and its folder or hub name.
      task, data: its name and where the data are.
      method: one, as on the command line.
      settings: as JSON, with the seed, without the learning rate.
      options: as JSON.
      rate: the learning rate; None: `factor` times the method's default for the model.
    """

    model: str
    source: str
    task: str
    data: str | None
    method: str
    settings: dict[str, Any]
    options: dict[str, Any]
    rate: float | None = None
    factor: float = 1.0

    @property
    def key(self) -> str:
        """Twelve hex digits of the run's configuration, paths left out."""
        said = {k: v for k, v in self._asdict().items() if k not in ("source", "data")}
        return digest(said)

    @property
    def seed(self) -> int:
        return self.settings["seed"]


class Trials(NamedTuple):
    """The runs by which one learning rate is chosen."""

    cells: tuple[Cell, ...]

    def candidates(self) -> dict[tuple[float | None, float], list[Cell]]:
        """(rate, factor) -> its runs."""
        found: dict[tuple[float | None, float], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.rate, cell.factor), []).append(cell)
        return found


Chosen = Callable[[Trials], tuple[float | None, float] | None]


def trials(grid: Grid) -> dict[tuple[str, str, str], Trials]:
    """(model, task, method) -> the search that its learning rate comes from, where there is one."""
    if grid.search is None:
        return {}
    found = {}
    for model, task, method in _triples(grid):
        if not grid.rates and "learning_rate" not in _ruled(grid, model, task, method)[0]:
            on = grid.search.tasks or (task,)
            cells = [cell for other in on for cell in _tried(grid, model, other, method)]
            found[model, task, method] = Trials(tuple(cells))
    return found


def finals(grid: Grid, chosen: Chosen) -> Iterator[tuple[Cell | None, tuple[str, str, str]]]:
    """The runs of the table, with (model, task, method) of each.

    Args:
      chosen: what a search has found, as (rate, factor), or None while it is not over: then its runs are None.
    """
    searches = trials(grid)
    for where in _triples(grid):
        given = _ruled(grid, *where)[0].get("learning_rate")
        if grid.rates:
            rates: list = [(float(r), 1.0) for r in grid.rates]
        elif given is not None or where not in searches:
            rates = [(given, 1.0)]
        else:
            rates = [chosen(searches[where])]
        for rate in rates:
            for seed in range(grid.seeds):
                yield (None if rate is None else _cell(grid, *where, seed, *rate)), where


def number_of_runs(grid: Grid) -> tuple[int, int]:
    """How many runs a search has in all, and how many the table."""
    searched = {cell.key for search in trials(grid).values() for cell in search.cells}
    return len(searched), sum(1 for _ in finals(grid, lambda search: None))


def with_rank(text: str, rank: int) -> str | None:
    """The method with another rank; None where it has none.

    >>> with_rank("lora(targets=['linear']) + bitfit", 2), with_rank("bitfit", 2)
    ("lora(targets=['linear'], rank=2)+bitfit", None)
    """
    tree, changed = ast.parse(text.strip(), mode="eval"), False

    class Visitor(ast.NodeTransformer):
        def visit_Name(self, node):
            return self.of(node, node.id, [])

        def visit_Call(self, node):
            return self.of(node, getattr(node.func, "id", ""), node.keywords)

        def of(self, node, name, keywords):
            nonlocal changed
            if name not in METHODS or "rank" not in inspect.signature(METHODS[name]).parameters:
                return node
            changed = True
            kept = [k for k in keywords if k.arg != "rank"]
            return ast.Call(ast.Name(name, ast.Load()), [], [*kept, ast.keyword("rank", ast.Constant(rank))])

    made = ast.unparse(ast.fix_missing_locations(Visitor().visit(tree))).replace(" + ", "+")
    return made if changed else None


def read(file: str | Path) -> Grid:
    """A grid from YAML, with the fields of `Grid`; models and tasks may be lists, a model's name is then its folder's.

    Raises:
      ValueError: it is no such file; the message says where.
    """
    try:
        data = yaml.safe_load(Path(file).read_text())
    except yaml.YAMLError as e:
        raise ValueError(f"{file} is no YAML: {e}") from e
    if not isinstance(data, dict):
        raise ValueError(
            f"{file} must map fields to values, such as 'methods: [lora, full]'; got {type(data).__name__}"
        )
    try:
        return from_json(data)
    except ValueError as e:
        raise ValueError(f"{file}: {e}") from e


def from_json(data: Mapping[str, Any]) -> Grid:
    """A grid of dicts and lists, as YAML or JSON give it."""
    data = dict(data)
    if isinstance(data.get("models"), list | str):
        names = [Path(str(m)).name for m in _listed(data["models"])]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two models have the name {twice[0]!r}; write models as NAME: FOLDER, with other names")
        data["models"] = dict(zip(names, map(str, _listed(data["models"])), strict=True))
    if isinstance(data.get("tasks"), list | str):
        data["tasks"] = dict.fromkeys(_listed(data["tasks"]))
    if data.get("search") is not None:
        data["search"] = _made(Search, data["search"], "search")
    for name, cls in (("rules", Rule), ("published", Published)):
        data[name] = tuple(_made(cls, x, name) for x in _listed(data.get(name) or ()))
    return _made(Grid, data, "the grid")


def to_json(grid: Grid) -> dict[str, Any]:
    """The grid as `from_json` reads it."""
    return json.loads(json.dumps(dataclasses.asdict(grid)))


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _made(cls: type, data: Any, where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must map {', '.join(fields)} to values; got {data!r}")
    if unknown := [k for k in data if k not in fields]:
        raise ValueError(f"{where} has no field {unknown[0]!r}{_meant(unknown[0], fields)}; it has {', '.join(fields)}")
    needed = [k for k, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [k for k in needed if k not in data]:
        raise ValueError(f"{where} lacks {missing[0]!r}; it needs {', '.join(needed)}")
    values, kinds = {}, get_type_hints(cls)
    for name, value in data.items():
        if "tuple" in str(fields[name].type) and value is not None:
            value = tuple(_listed(value))
        values[name] = _numbers(name, value)
        _check_kind(f"{name} of {where}", values[name], kinds[name])
    return cls(**values)


KINDS = {int: "a whole number", float: "a number", str: "a text", Mapping: "names with values, as {a: 1}"}


def _check_kind(what: str, value: Any, hint: Any) -> None:
    """Whether a value is of a field's type, as far as JSON has it; what is in a mapping or a list is not looked at."""
    kinds = [get_origin(k) or k for k in (get_args(hint) if type(None) in get_args(hint) else (hint,))]
    known = [k for k in kinds if k in KINDS]
    given = type(value) if type(value) in (int, float, str, bool) else Mapping if isinstance(value, Mapping) else None
    there = {int, float} if float in known else {*known}
    if known and given not in there and not (value is None and type(None) in kinds):
        raise ValueError(f"{what} must be {' or '.join(KINDS[k] for k in known)}; got {value!r}")


def digest(data: Any) -> str:
    """Twelve hex digits of JSON."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def _numbers(name: str, value: Any) -> Any:
    """The numbers in a field of them: YAML reads 1e-3, without a point, as a text."""
    if name == "rates" and isinstance(value, Mapping):
        return {k: _numbers(name, tuple(_listed(v))) for k, v in value.items()}
    if name == "settings" and isinstance(value, Mapping):
        floating = ("learning_rate", "warmup", "weight_decay")
        floating += ("clip",) if isinstance(value.get("clip"), str) else ()  # others stay as they are, for the keys
        return {k: _numbers(k, (v,))[0] if k in floating else v for k, v in value.items()}
    if name not in ("factors", "rates", "learning_rate", "warmup", "weight_decay", "clip"):
        return value
    try:
        return tuple(float(v) for v in value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers; got {value!r}") from None


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _triples(grid: Grid) -> list[tuple[str, str, str]]:
    """(model, task, method with its rank)."""
    return [(m, t, method) for m in grid.models for t in grid.tasks for method in methods_of(grid)]


def methods_of(grid: Grid) -> list[str]:
    """The methods with their ranks, each as `peftjax.methods.parse` calls it."""
    names = []
    for text in grid.methods:
        ranked = [with_rank(text, rank) for rank in grid.ranks]
        names += [next(iter(parse(t))) for t in (ranked if ranked and ranked[0] else [text]) if t]
    return list(dict.fromkeys(names))


def _ruled(grid: Grid, model: str, task: str, method: str) -> tuple[dict, dict]:
    """Settings and options of a run."""
    settings, options = dict(grid.settings), dict(grid.options)
    for rule in grid.rules:
        fits = all(not there or x in there for x, there in ((task, rule.tasks), (model, rule.models)))
        if fits and (not rule.methods or method in _named(grid, rule)):
            settings |= rule.settings
            options |= rule.options
    return settings, options


def _named(grid: Grid, rule: Rule) -> set[str]:
    """The methods that a rule names, with all their ranks."""
    return {
        name
        for text in rule.methods
        for t in (text, *(with_rank(text, r) for r in grid.ranks))
        if t
        for name in parse(t)
    }


def _cell(grid: Grid, model: str, task: str, method: str, seed: int, rate: float | None, factor: float) -> Cell:
    settings, options = _ruled(grid, model, task, method)
    settings = {k: v for k, v in settings.items() if k != "learning_rate"} | {"seed": seed}
    settings, options = json.loads(json.dumps([settings, options]))  # as a record gives them back
    return Cell(model, grid.models[model], task, grid.tasks[task], method, settings, options, rate, factor)


def _tried(grid: Grid, model: str, task: str, method: str) -> Iterator[Cell]:
    assert grid.search is not None
    own = {name: rates for text, rates in grid.search.rates.items() for name in parse(text)}
    rates: list[tuple[float | None, float]] = [(None, float(f)) for f in grid.search.factors]
    if method in own:
        rates = [(float(r), 1.0) for r in own[method]]
    for rate, factor in rates:
        for seed in range(grid.search.seeds):
            cell = _cell(grid, model, task, method, FIRST_TRIAL_SEED + seed, rate, factor)
            if (cell.options.get("eval_split") or get_task(task).reported) == "test":
                cell = cell._replace(options=cell.options | {"eval_split": "dev"})
            yield cell


def _check(grid: Grid) -> None:
    if not grid.models or not grid.tasks or not grid.methods:
        raise ValueError("a grid needs models, tasks and methods; write at least one of each")
    if grid.seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {grid.seeds}")
    for what, named in (("models", grid.models), ("tasks", grid.tasks)):
        for name, place in named.items():
            if not isinstance(name, str) or (not isinstance(place, str) and (what == "models" or place is not None)):
                raise ValueError(f"{what} map names to folders or hub names; got {name!r}: {place!r}")
    for task in grid.tasks:
        get_task(task)
    for text in grid.methods:
        if len(parse(text)) != 1:
            raise ValueError(f"methods are written one by one, as a list; got {text!r}")
    for rank in grid.ranks:
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"ranks must be whole numbers of at least 1; got {rank!r}")
    for rate in grid.rates:
        Settings(learning_rate=rate)
    names = methods_of(grid)
    if grid.ranks and all(with_rank(text, 1) is None for text in grid.methods):
        raise ValueError(f"ranks are given, and none of the methods {', '.join(grid.methods)} has a rank")
    _check_overrides(grid, "the grid", grid.settings, grid.options)
    for rule in grid.rules:
        _check_overrides(grid, "a rule", rule.settings, rule.options)
        for what, there in (("tasks", grid.tasks), ("models", grid.models)):
            if unknown := [x for x in getattr(rule, what) if x not in there]:
                raise ValueError(f"a rule is for {unknown[0]!r}, which is none of the {what} {', '.join(there)}")
        if rule.methods and not _named(grid, rule) & {*names}:
            raise ValueError(f"a rule is for {', '.join(rule.methods)}; the methods are {', '.join(names)}")
    for where in _triples(grid):
        settings, _ = _ruled(grid, *where)
        try:
            Settings(**settings)
        except ValueError as e:
            raise ValueError(f"the settings of {', '.join(where)} cannot be: {e}") from e
    if grid.search is not None:
        _check_search(grid, grid.search, names)
    if grid.baseline is not None and next(iter(parse(grid.baseline))) not in names:
        raise ValueError(f"the baseline {grid.baseline!r} is none of the methods {', '.join(names)}")


def _check_overrides(grid: Grid, who: str, settings: Mapping, options: Mapping) -> None:
    known = [f.name for f in dataclasses.fields(Settings)]
    for what, given, there in (("settings", settings, known), ("options", options, OPTIONS)):
        if unknown := [k for k in given if k not in there]:
            hint = _meant(unknown[0], there)
            raise ValueError(f"{who} has {what} {unknown[0]!r}{hint}; there are {', '.join(there)}")
    if "seed" in settings:
        raise ValueError(f"{who} sets the seed; write seeds, their number, in the grid")
    kinds = get_type_hints(Settings)
    for name, value in settings.items():
        _check_kind(name, value, kinds[name])


def _check_search(grid: Grid, search: Search, names: Sequence[str]) -> None:
    if grid.rates:
        raise ValueError("a grid has either rates, all of which are run, or a search for one of them")
    if search.seeds < 1 or not search.factors:
        raise ValueError(f"a search needs factors and at least one seed; got {search}")
    for rate in (*search.factors, *(r for rates in search.rates.values() for r in rates)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"the factors and rates of a search must be numbers above 0; got {rate}")
    if unknown := [t for t in search.tasks if t not in grid.tasks]:
        raise ValueError(f"the search is on {unknown[0]!r}, which is none of the tasks {', '.join(grid.tasks)}")
    for text, rates in search.rates.items():
        if not {*parse(text)} & {*names}:
            raise ValueError(f"the search has rates for {text!r}; the methods are {', '.join(names)}")
        if len(rates) != len(search.factors):
            raise ValueError(
                f"the search has {len(rates)} rates for {text} and {len(search.factors)} factors for the others; the "
                "same number of trials for each method is what makes a comparison fair"
            )
