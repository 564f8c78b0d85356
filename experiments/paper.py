"""What the scripts of papers' tables share: a table as data, its trainable parameters by configuration, its command.

    python experiments/lora_glue.py                       # the small grid; runs that are there are not repeated
    python experiments/lora_glue.py --scale paper --list  # every run at the paper's scale, with its settings
    python experiments/lora_glue.py --counts              # trainable parameters beside the published ones
    python experiments/paper.py                           # the same of all tables, into experiments/results/counts

A script holds the published rows as text, as they are printed, and says which of our methods stands for which. Grids
name folders as `{data}`, `{models}` and `{model}`, which the command line fills in. The small grids on GLUE have
models, tasks, settings and search in common, so that one folder of results serves them all.

Expected times in the scripts are estimates. At paper scale they are of training alone: N parameters without the
embeddings, 4 N FLOPs a token where the base is frozen and 6 N where it trains, 64 to 200 tokens a text, all seeds and
searches.
"""

import ast
import dataclasses
import functools
import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import jax
import transformers
import tyro

from peftjax import hub, partition
from peftjax.grid import Grid, Published, Rule, Search, finals, number_of_runs, trials
from peftjax.methods import Method, chain, head, parse
from peftjax.sweep import sweep
from peftjax.tree import count

ROOT = Path(__file__).parents[1]
COUNTS = ROOT / "experiments/results/counts"
SCRIPTS = (
    *("lora_glue", "lora_e2e", "bitfit_glue", "fishmask_glue", "child_tuning_glue", "adapter_glue", "prefix_e2e"),
    *("prompt_size", "adalora_glue", "dylora_ranks", "dora_commonsense", "proxy_tuning"),
)


# Models, at their published sizes


def bert(layers=12, width=768, heads=12, vocabulary=28996):
    """BERT; the vocabulary is the cased one's."""
    return transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )


def roberta(layers=12, width=768, heads=12):
    return transformers.RobertaConfig(
        vocab_size=50265,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


def llama(layers, width, heads, kv=None, ff=None, vocabulary=100):
    return transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ff or 4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv or heads,
        tie_word_embeddings=False,
    )


def gpt2(layers, width, heads):
    return transformers.GPT2Config(n_embd=width, n_layer=layers, n_head=heads)


def deberta(layers, width, heads, **more):
    """As versions 2 and 3 have it: relative positions only, in 256 buckets, projected as contents are."""
    config: Any = transformers.DebertaV2Config  # its signature does not name all that it takes
    return config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        relative_attention=True,
        position_buckets=256,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        **more,
    )


def t5(layers, width, heads, ff, config: Any = transformers.T5Config, vocabulary=32128, first=False):
    """T5 1.1, with a gated MLP and a head of its own; `first`: the T5 before it, with neither."""
    made = config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=64,
        d_ff=ff,
        num_layers=layers,
        num_heads=heads,
        feed_forward_proj="relu" if first else "gated-gelu",
    )
    made.tie_word_embeddings = first  # transformers' class makes it true, whatever it is given
    return made


class Base(NamedTuple):
    """A paper's model.

    Attributes:
      hub: its name on the Hugging Face hub.
      config: makes transformers' config.
      task: of `peftjax.hub.from_config`, in this project's tables.
    """

    hub: str
    config: Callable[[], Any]
    task: str


BASES: dict[str, Base] = {  # as the tables call them
    "bert-base-cased": Base("google-bert/bert-base-cased", bert, "classification"),
    "bert-large-cased": Base("google-bert/bert-large-cased", lambda: bert(24, 1024, 16), "classification"),
    "bert-large-cased-whole-word-masking": Base(
        "google-bert/bert-large-cased-whole-word-masking", lambda: bert(24, 1024, 16), "classification"
    ),
    "bert-large-uncased": Base("google-bert/bert-large-uncased", lambda: bert(24, 1024, 16, 30522), "classification"),
    "roberta-base": Base("FacebookAI/roberta-base", roberta, "classification"),
    "roberta-large": Base("FacebookAI/roberta-large", lambda: roberta(24, 1024, 16), "classification"),
    "deberta-v3-base": Base("microsoft/deberta-v3-base", lambda: deberta(12, 768, 12), "classification"),
    "deberta-v2-xxlarge": Base(
        "microsoft/deberta-v2-xxlarge",
        lambda: deberta(48, 1536, 24, conv_kernel_size=3, conv_act="gelu", attention_head_size=64),
        "classification",
    ),
    "bart-large": Base("facebook/bart-large", transformers.BartConfig, "encoder"),
    "gpt2-medium": Base("openai-community/gpt2-medium", lambda: gpt2(24, 1024, 16), "causal-lm"),
    "gpt2-large": Base("openai-community/gpt2-large", lambda: gpt2(36, 1280, 20), "causal-lm"),
    "llama-7b": Base("huggyllama/llama-7b", lambda: llama(32, 4096, 32, ff=11008, vocabulary=32000), "causal-lm"),
    "llama-13b": Base("huggyllama/llama-13b", lambda: llama(40, 5120, 40, ff=13824, vocabulary=32000), "causal-lm"),
    "llama-2-7b": Base(
        "meta-llama/Llama-2-7b-hf", lambda: llama(32, 4096, 32, ff=11008, vocabulary=32000), "causal-lm"
    ),
    "llama-2-13b": Base(
        "meta-llama/Llama-2-13b-hf", lambda: llama(40, 5120, 40, ff=13824, vocabulary=32000), "causal-lm"
    ),
    "llama-2-70b": Base(
        "meta-llama/Llama-2-70b-hf", lambda: llama(80, 8192, 64, 8, ff=28672, vocabulary=32000), "causal-lm"
    ),
    "llama-3-8b": Base(
        "meta-llama/Meta-Llama-3-8B", lambda: llama(32, 4096, 32, 8, ff=14336, vocabulary=128256), "causal-lm"
    ),
    "t5-v1.1-small": Base("google/t5-small-lm-adapt", lambda: t5(8, 512, 6, 1024), "seq2seq"),
    "t5-v1.1-base": Base("google/t5-base-lm-adapt", lambda: t5(12, 768, 12, 2048), "seq2seq"),
    "t5-v1.1-large": Base("google/t5-large-lm-adapt", lambda: t5(24, 1024, 16, 2816), "seq2seq"),
    "t5-v1.1-xl": Base("google/t5-xl-lm-adapt", lambda: t5(24, 2048, 32, 5120), "seq2seq"),
    "t5-v1.1-xxl": Base("google/t5-xxl-lm-adapt", lambda: t5(24, 4096, 64, 10240), "seq2seq"),
}


def named(*models: str) -> dict[str, str]:
    """Name -> name on the hub, as `Grid.models` wants it."""
    return {m: BASES[m].hub for m in models}


# Published rows


class Row(NamedTuple):
    """A row of a published table.

    Attributes:
      model, setting: as the survey's `tables.yaml` calls them.
      trainable: parameters as printed; empty where the table has none.
      method: ours, as on the command line; empty where we have none.
      cells: column -> the score as printed, without what is empty.
    """

    model: str
    setting: str
    trainable: str
    method: str
    cells: Mapping[str, str]

    @property
    def name(self) -> tuple[str, str, str]:
        return self.model, self.setting, self.trainable


def rows(text: str, methods: Mapping[str, str] = MappingProxyType({})) -> tuple[Row, ...]:
    """The rows of a table as text: columns setting, trainable and scores, and a line `# model` before its rows.

    Args:
      methods: 'setting trainable', 'model setting' or 'setting' -> our method; the first that is there counts.

    >>> text = '''
    ... setting | trainable | CoLA     | Avg
    ... # roberta-base
    ... LoRA    | 0.3M      | 63.4±1.2 |
    ... '''
    >>> rows(text, {"LoRA": "lora(alpha=16)"})[0]
    Row(model='roberta-base', setting='LoRA', trainable='0.3M', method='lora(alpha=16)', cells={'CoLA': '63.4±1.2'})

    Raises:
      ValueError: a line has more or fewer cells than there are columns, or there is no model before it.
    """
    header, *lines = text.strip().splitlines()
    columns, model, made = _split(header), "", []
    for line in lines:
        if line.startswith("# "):
            model = line[2:].strip()
            continue
        cells = _split(line)
        if len(cells) != len(columns) or not model:
            raise ValueError(f"a row needs a model before it and {len(columns)} cells; got {len(cells)}: {line}")
        setting, trainable, *scores = cells
        names = (f"{setting} {trainable}", f"{model} {setting}", setting)
        method = next((methods[name] for name in names if name in methods), "")
        found = {k: v for k, v in zip(columns[2:], scores, strict=True) if v}
        made.append(Row(model, setting, trainable, method, found))
    return tuple(made)


def _split(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")]


Columns = Mapping[str, tuple[tuple[str, str], ...]]  # a table's column -> (task, metric) of each of its scores
GLUE: Columns = {
    "MNLI": (("mnli", "accuracy"),),
    "MNLI-m": (("mnli", "accuracy"),),
    "MNLI-m/mm": (("mnli", "accuracy"),),
    "SST-2": (("sst2", "accuracy"),),
    "MRPC": (("mrpc", "accuracy"),),
    "CoLA": (("cola", "matthews"),),
    "QNLI": (("qnli", "accuracy"),),
    "QQP": (("qqp", "accuracy"), ("qqp", "f1")),
    "RTE": (("rte", "accuracy"),),
    "STS-B": (("stsb", "pearson"),),
}
E2E: Columns = {
    "BLEU": (("e2e", "bleu"),),
    "NIST": (("e2e", "nist"),),
    "METEOR": (("e2e", "meteor"),),
    "ROUGE-L": (("e2e", "rouge_l"),),
    "CIDEr": (("e2e", "cider"),),
}


def published(
    table: Iterable[Row], columns: Columns, source: str, called: Mapping[str, str] = MappingProxyType({})
) -> tuple[Published, ...]:
    """The cells that have a task and metric here, under our method's name, or else under the paper's.

    Args:
      called: the table's name of a model -> the grid's, where they differ.

    >>> row = Row("roberta-base", "LoRA", "0.3M", "lora", {"QQP": "90.8±.1/88.1", "Avg": "87.2"})
    >>> [(p.metric, p.score, p.spread) for p in published([row], GLUE, "")]
    [('accuracy', 90.8, 0.1), ('f1', 88.1, None)]
    """
    found = []
    for row in table:
        method = next(iter(parse(row.method))) if row.method else f"{row.setting} {row.trainable}".strip()
        millions = re.fullmatch(r"([\d.,]+)M", row.trainable)
        trainable = float(millions[1].replace(",", "")) * 1e6 if millions else None
        for column, text in row.cells.items():
            for (task, metric), part in zip(columns.get(column, ()), text.split("/"), strict=False):
                score, _, spread = part.partition("±")
                spread = float(spread) if spread else None
                where = (method, called.get(row.model, row.model), task, metric)
                found.append(Published(*where, float(score.split()[0]), spread, trainable, source))
    return tuple(found)


def beside(
    table: Iterable[Row], columns: Columns, source: str, methods: Mapping[str, str], models: Iterable[str] = ()
) -> tuple[Published, ...]:
    """The cells that stand beside a small grid: of the rows that one of its methods stands for.

    Args:
      methods: 'setting trainable' or 'setting' -> the grid's method.
      models: the published models that are meant; empty: all.

    >>> row = Row("roberta-base", "LoRA", "0.3M", "lora(rank=8, alpha=16)", {"CoLA": "63.4±1.2"})
    >>> [(p.method, p.score) for p in beside([row], GLUE, "", {"LoRA": "lora(rank=8)"})]
    [('lora(rank=8)', 63.4)]
    """
    wanted = [row for row in table if not models or row.model in models]
    named = ((row, methods.get(f"{row.setting} {row.trainable}", methods.get(row.setting))) for row in wanted)
    return published([row._replace(method=method) for row, method in named if method], columns, source)


def by_task(tasks: str, methods: Iterable[str] = (), models: Iterable[str] = (), **values: str) -> tuple[Rule, ...]:
    """A rule for each task from columns as papers print them; one value stands for all tasks.

    Args:
      values: a setting, or the option `max_length` -> its values in the order of the tasks.

    >>> [(r.tasks, r.settings) for r in by_task("cola rte", epochs="80 30", learning_rate="4e-4")]
    [(('cola',), {'epochs': 80, 'learning_rate': 0.0004}), (('rte',), {'epochs': 30, 'learning_rate': 0.0004})]

    Raises:
      ValueError: a column has neither one value nor one for each task.
    """
    names = tasks.split()
    columns = {k: [ast.literal_eval(x.lstrip("0") or "0") for x in v.split()] for k, v in values.items()}
    for k, v in columns.items():
        if len(v) not in (1, len(names)):
            raise ValueError(f"{k} has {len(v)} values; write one, or one for each of {', '.join(names)}")
    made = []
    for i, task in enumerate(names):
        each = {k: v[0] if len(v) == 1 else v[i] for k, v in columns.items()}
        options = {k: v for k, v in each.items() if k == "max_length"}
        settings = {k: v for k, v in each.items() if k not in options}
        made.append(Rule(settings, options, tuple(methods), (task,), tuple(models)))
    return tuple(made)


# Grids that several scripts share

GLUE_TASKS: dict[str, str | None] = dict.fromkeys(("mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"))
RANKS = (1, 2, 4, 8)


def glue_small(*methods: str, published: tuple[Published, ...] = ()) -> Grid:
    """MiniLM on three tasks, 1,000 training rows each; rates are searched on CoLA.

    On STS-B the head's bias starts at the mean score: from zero, three quarters of the first loss are that mean, and
    what trains beside the head learns it first (README.md, 'what failed').
    """
    return Grid(
        models={"minilm": "{models}/all-MiniLM-L6-v2"},
        tasks={"cola": "{data}/glue/cola", "stsb": "{data}/glue/stsb", "sst2": "{data}/glue/sst2"},
        methods=methods,
        seeds=3,
        search=Search(factors=(0.3, 1.0, 3.0), tasks=("cola",)),
        settings={"epochs": 3, "batch_size": 16},
        options={"train_limit": 1000},
        rules=(Rule(options={"head_prior": True}, tasks=("stsb",)),),
        baseline="full" if "full" in methods else None,
        published=published,
        title="Methods on GLUE: MiniLM, 1,000 training rows",
    )


def stsb_small(*methods: str, factors: tuple[float, ...] = (), published: tuple[Published, ...] = ()) -> Grid:
    """MiniLM on STS-B alone, for what differs in one thing.

    Args:
      factors: of each method's default rate, to be searched on STS-B itself; empty: the default.
    """
    glue = glue_small(*methods, published=published)
    title = "Ranks, allocations, masks and children: MiniLM on STS-B, 1,000 training rows"
    search = Search(factors, tasks=("stsb",)) if factors else None
    return dataclasses.replace(glue, tasks={"stsb": glue.tasks["stsb"]}, search=search, title=title)


def e2e_small(*methods: str, published: tuple[Published, ...] = ()) -> Grid:
    """A decoder on E2E, at its default rates; scored on the whole test set with all its references."""
    return Grid(
        models={"{name}": "{model}"},
        tasks={"e2e": "{data}/e2e"},
        methods=methods,
        seeds=1,
        settings={"epochs": 3, "batch_size": 16},
        options={"eval_split": "test"},
        baseline="full",
        published=published,
        title="Methods on E2E",
    )


# A table


class Count(NamedTuple):
    """A published number of trained parameters that no row of the table has.

    Attributes:
      model, setting: as in `Row`.
      printed: as published.
      method: ours.
    """

    model: str
    setting: str
    printed: str
    method: str


class Table(NamedTuple):
    """A script: the table of a paper.

    Attributes:
      name: of the script.
      paper: authors, year and arXiv number.
      table: as the paper calls it.
      rows: key of `tables.yaml` ('lora/table2') -> its rows that were seen.
      grids: 'paper' and 'small' -> the sweeps at that scale.
      out: folder of the small scale's results in `runs`; tables that share runs share it.
      counts: published counts beside those of the rows.
      called: the table's name of a model -> that in `BASES`, where they differ.
      kept: method -> what is left of it after training, where that is what the paper counts.
      why: (model, setting, trainable) -> why a count cannot be made, or is not the published one.
      over: what a published percentage is of: 'base', or 'base+adapter'.
      counts_head: whether published counts have the task head in them.
    """

    name: str
    paper: str
    table: str
    rows: Mapping[str, tuple[Row, ...]]
    grids: Mapping[str, tuple[Grid, ...]]
    out: str
    counts: tuple[Count, ...] = ()
    called: Mapping[str, str] = MappingProxyType({})
    kept: Mapping[str, str] = MappingProxyType({})
    why: Mapping[tuple[str, str, str], str] = MappingProxyType({})
    over: Literal["base", "base+adapter"] = "base"
    counts_head: bool = False


# Trainable parameters


class Printed(NamedTuple):
    """A figure as printed: 24.5K has the number 24.5 and the unit K."""

    number: Decimal
    unit: str

    def agreement(self, n: int, whole: int) -> str:
        """How n, or its share of the whole, agrees with it: the strongest word that is true.

        An integer without a unit is exact or differs; the other words are about the digits after the point.
        """
        if self.unit == "":
            return "exact" if n == self.number else "differs"
        value = Decimal(100 * n) / whole if self.unit == "%" else n / Decimal({"K": 1_000, "M": 1_000_000}[self.unit])
        digit = Decimal(1).scaleb(int(self.number.as_tuple().exponent))  # of the last printed place
        for word, rounding in (("rounds", ROUND_HALF_UP), ("truncates", ROUND_DOWN)):
            if value.quantize(digit, rounding) == self.number:
                return word
        for percent in (2, 7):
            if 100 * abs(value - self.number) <= percent * self.number:
                return f"within_{percent}pct"
        return "differs"


AGREES = ("exact", "rounds", "truncates")


def figures(text: str) -> list[Printed]:
    """The figures before any remark: '8,192 / 559,222,784 (in the docs)' has two."""
    found = [re.match(r"([\d,]+(?:\.\d+)?)\s*([%KM]?)", part.strip().upper()) for part in text.split("(")[0].split("/")]
    return [Printed(Decimal(m[1].replace(",", "")), m[2]) for m in found if m]


@functools.cache
def abstract(model: str) -> hub.Model:
    """The shapes of a paper's model, with a head for two labels where it is a classifier."""
    base = BASES[model]
    labels = 2 if base.task == "classification" else None
    return hub.from_config(base.config(), base.task, labels=labels, seed=None)


def trained(model: hub.Model, method: Method) -> int:
    """How many parameters a method trains, from shapes alone."""
    params = jax.eval_shape(lambda k, p: method.init(k, p, model.sites), jax.random.key(0), model.params)
    return count(partition(params, method.trainable(params))[0])


def listed_counts(table: Table) -> list[Count]:
    """What is counted of a table: its rows that have a published number or a method of ours, and what stands beside."""
    found = [Count(r.model, r.setting, r.trainable, r.method) for rs in table.rows.values() for r in rs]
    return [c for c in dict.fromkeys((*found, *table.counts)) if c.printed or c.method]


def counted(table: Table, one: Count) -> dict:
    """A record of a published count: ours, what was printed, and how they agree or why they do not."""
    record = {"script": table.name, **one._asdict()}
    why = table.why.get((one.model, one.setting, one.printed), "")
    if not one.method:
        return record | {"trained": None, "share": None, "agreement": "not counted", "why": why}
    (method,) = parse(table.kept.get(one.method, one.method)).values()
    shapes = abstract(table.called.get(one.model, one.model))
    n = trained(shapes, chain(method, head()) if table.counts_head and one.method != "full" else method)
    whole = count(shapes.params) + (n if table.over == "base+adapter" else 0)
    word = figures(one.printed)[0].agreement(n, whole) if one.printed else "not printed"
    agreement = "equal" if word in AGREES else word
    return record | {"trained": n, "share": round(100 * n / whole, 4), "agreement": agreement, "why": why}


def counts_table(records: Iterable[dict]) -> str:
    """The records as a table in Markdown."""
    lines = ["| model | row | method | trained | % | published | |", "|---|---|---|--:|--:|--:|---|"]
    for r in records:
        ours = ("-", "-") if r["trained"] is None else (f"{r['trained']:,}", f"{r['share']:g}")
        method = f"`{r['method']}`" if r["method"] else "-"
        said = ": ".join(x for x in (r["agreement"].replace("_", " ").replace("pct", "%"), r["why"]) if x)
        lines.append(
            f"| {r['model']} | {r['setting']} | {method} | {' | '.join(ours)} | {r['printed'] or '-'} | {said} |"
        )
    return "\n".join(lines)


def write_counts(out: Path = COUNTS) -> None:
    """The counts of all tables: `counts.jsonl`, a line each, and `counts.md`."""
    out.mkdir(parents=True, exist_ok=True)
    parts, lines = ["# Trainable parameters at the papers' scale, from configurations alone\n"], []
    for name in SCRIPTS:
        table = importlib.import_module(name).TABLE
        records = [counted(table, one) for one in listed_counts(table)]
        lines += [json.dumps(r) + "\n" for r in records]
        parts.append(f"## {table.paper}, {table.table}\n\n`python experiments/{name}.py --counts`\n")
        parts.append(counts_table(records) + "\n")
    (out / "counts.jsonl").write_text("".join(lines))
    (out / "counts.md").write_text("\n".join(parts))


# The command


@dataclasses.dataclass(frozen=True)
class Arguments:
    scale: Literal["small", "paper"] = "small"
    out: Path | None = None  # default: a folder in runs/, which tables that share runs share
    seeds: int | None = None  # default: the grid's
    shard: str = "1/1"  # "1/4": the first of four parts of the runs, each for a process of its own
    retry: bool = False  # make the runs that failed again
    data: Path = ROOT.parent / "shared/data"
    models: Path = ROOT.parent / "shared/models"
    model: str = "tiny-books"  # the decoder of the small scale: a folder, or the bundled base
    counts: bool = False  # print trainable parameters beside the published ones, and run nothing
    list: bool = False  # print the runs, and run nothing

    def fill(self, text: str) -> str:
        """The text with its folders; `{name}` is that of the folder of `model`."""
        return text.format(data=self.data, models=self.models, model=self.model, name=Path(self.model).name)


class Done(NamedTuple):
    """What a command ran: the grids with their folders, and the records of their runs, which are in `out`."""

    scale: str
    out: Path
    grids: tuple[Grid, ...]
    records: tuple[dict, ...]
    fill: Callable[[str], str]


def filled(grid: Grid, args: Arguments) -> Grid:
    """The grid with its folders and its number of seeds."""
    models = {args.fill(k): args.fill(v) for k, v in grid.models.items()}
    tasks = {k: v and args.fill(v) for k, v in grid.tasks.items()}
    return dataclasses.replace(grid, models=models, tasks=tasks, seeds=grid.seeds if args.seeds is None else args.seeds)


def listed(grid: Grid) -> Iterator[str]:
    """A line for every search, then one for every run of the table."""
    searches = trials(grid)
    for (model, task, method), search in searches.items():
        rates = [f"{factor:g} x default" if rate is None else f"{rate:g}" for rate, factor in search.candidates()]
        tasks = dict.fromkeys(cell.task for cell in search.cells)
        yield f"search  {model}  {task}  {method}  {', '.join(rates)}; by {', '.join(tasks)}"
    for cell, where in finals(grid, lambda search: next(iter(search.candidates()))):
        assert cell is not None  # none waits for a search here
        rate = "as found" if where in searches else "default" if cell.rate is None else f"{cell.rate:g}"
        said = json.dumps(cell.settings | cell.options)
        yield f"final  {cell.model}  {cell.task}  {cell.method}  rate {rate}  {said}"


def main(table: Table, description: str | None) -> Done | None:
    """Runs a table as the command line asks; None where that was to list or to count."""
    args = tyro.cli(Arguments, description=description)
    if args.counts:
        print(counts_table(counted(table, one) for one in listed_counts(table)))
        return None
    try:
        return _run(table, args)
    except ValueError as e:
        raise SystemExit(str(e)) from None


def _run(table: Table, args: Arguments) -> Done | None:
    grids = tuple(filled(grid, args) for grid in table.grids[args.scale])
    if args.list:
        for grid in grids:
            searched, final = number_of_runs(grid)
            print(f"# {grid.title}: {final} runs, {searched} of searches", *listed(grid), sep="\n")
        return None
    out = args.out or Path("runs") / (table.out if args.scale == "small" else f"{table.name}-paper")
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if shard is None:
        raise ValueError(f"cannot read the shard {args.shard!r}; write i/n with i from 1 to n, such as 1/4")
    i, n = map(int, shard.groups())
    records = [record for grid in grids for record in sweep(grid, out, shard=(i, n), retry=args.retry)]
    failed = sum(r["kind"] == "failed" for r in records)
    print(
        f"{len(records)} runs are over, {failed} of them failed" + ("; to make these again: --retry" if failed else "")
    )
    print(f"to read: peftjax report {out}")
    return Done(args.scale, out, grids, tuple(records), args.fill)


if __name__ == "__main__":
    write_counts()
