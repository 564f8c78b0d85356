"""Parameter-efficient fine-tuning in JAX: compare methods, train one, evaluate or merge an adapter.

peftjax compare --model FOLDER --task rte --data FOLDER --methods head,bitfit,lora --out runs/rte
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 120)


@dataclasses.dataclass
class Base:
    """The model and the data.

    Attributes:
      model: folder in Hugging Face's layout, or a hub name; tiny-books comes with the package.
      task: places (built in), cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, banking77 or e2e.
      data: folder with the task's files, or a Hugging Face data set; default: the task's own.
      split: what to score on, dev or test; default: the task's.
      train_limit: use only so many training rows.
      eval_limit: score on only so many inputs.
      max_length: of a text in tokens; default: the task's.
      buckets: number of lengths that batches are padded to.
      dtype: of the activations.
      param_dtype: of the base's parameters; what trains is float32.
      quantize: hold the linear weights of the base in 8 or 4 bits (lora over nf4 is QLoRA).
      fresh_head: draw a new task head even if the model has one.
      remat: recompute the blocks' activations in the backward pass; less memory, more time.
    """

    model: str = "tiny-books"
    task: str = "places"
    data: str | None = None
    split: Literal["dev", "test"] | None = None
    train_limit: int | None = None
    eval_limit: int | None = None
    max_length: int | None = None
    buckets: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None
    fresh_head: bool = False
    remat: bool = False


@dataclasses.dataclass
class Training:
    """How to train.

    Attributes:
      epochs: passes over the training rows.
      steps: number of steps, instead of epochs.
      batch_size: texts a step.
      schedule: how the learning rate falls after the warm-up.
      warmup: share of the steps in which it rises.
      weight_decay: AdamW's; biases, norms and what scales the base (DoRA's lengths, IA3's factors) are spared.
      clip: global norm of the gradient; 0 for none.
      accumulate: parts into which a batch is split, one after another, to save memory.
      eval_every: steps between evaluations; default: once an epoch.
      save_every: steps between the training states that a killed run resumes from.
      layout: a loop over the layers (fast), or a scan (compiles fast).
    """

    epochs: int = 3
    steps: int | None = None
    batch_size: int = 16
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.01
    clip: float = 1.0
    accumulate: int = 1
    eval_every: int | None = None
    save_every: int = 200
    layout: Literal["loop", "scan"] = "loop"


@dataclasses.dataclass
class Compare:
    """Trains several methods on one model and task and prints the table.

    Attributes:
      methods: separated by commas; `+` chains, arguments as in Python: "head,lora(rank=4),prefix+bitfit"; "all";
        default: a selection of every kind.
      seeds: number of seeds, counted from 0.
      lr: learning rate for all, or by method: "full=1e-4,lora=1e-3"; default: each method's own.
      out: where results, report, plots and adapters go; default: runs/MODEL-TASK.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    training: tyro.conf.OmitArgPrefixes[Training]
    methods: str | None = None
    seeds: int = 1
    lr: str = ""
    out: Path | None = None


@dataclasses.dataclass
class Train:
    """Trains one method; a run that was cut off resumes when the same command is given again.

    Attributes:
      method: such as "lora", "lora(rank=4, targets=['linear'])" or "lora+bitfit".
      seed: fixes everything that is random.
      lr: learning rate; default: the method's own.
      out: where the adapter, the log and the training state go.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    training: tyro.conf.OmitArgPrefixes[Training]
    method: str = "lora"
    seed: int = 0
    lr: float | None = None
    out: Path = Path("runs/train")


@dataclasses.dataclass
class Evaluate:
    """Scores an adapter, or the base model without one.

    Attributes:
      adapter: the adapter file; default: none.
      ranks: of a DyLoRA adapter, such as 1,2,4,8: a table with the scores at each of them.
      seed: of a task head that neither the base nor an adapter has.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    adapter: Path | None = None
    ranks: str = ""
    seed: int = 0


@dataclasses.dataclass
class Proxy:
    """Scores a large model steered by a small one before and after tuning (proxy-tuning); nothing is trained.

    Attributes:
      antiexpert: the small model as it was.
      expert: the small model tuned, as a folder; or give the adapter.
      adapter: an adapter trained on the anti-expert, which makes it the expert.
      alpha: how far to follow the difference of the two.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    antiexpert: str
    expert: str | None = None
    adapter: Path | None = None
    alpha: float = 1.0


@dataclasses.dataclass
class Merge:
    """Writes base and adapter as one model, in a folder that transformers loads.

    Attributes:
      model: the base that the adapter was trained on.
      adapter: the adapter file.
      out: the new folder.
      param_dtype: of the file.
    """

    model: str
    adapter: Path
    out: Path
    param_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass
class Methods:
    """Lists the methods: what trains, where, whether it merges, the paper."""


@dataclasses.dataclass
class FromTemplates:
    """Puts the rows of data sets in words by templates, and mixes the tasks (Flan, P3).

    Attributes:
      tasks: each with its source: "sst2=FOLDER,places,dolly=FILE.jsonl"; a file without templates holds instructions.
      out: JSONL of instruction, input, output and source.
      split: of the tasks that have splits.
      cap: rows that count for a task's share, at most.
      temperature: 1: shares as the capped sizes; the larger, the more equal.
      number: of lines; default: the sum of the capped sizes.
      templates: YAML file with templates of your own, which replace those of the tasks that it names.
      seed: fixes which rows and templates, and their order.
    """

    tasks: str
    out: Path = Path("runs/instructions.jsonl")
    split: Literal["train", "dev", "test"] = "train"
    cap: int = 3000
    temperature: float = 1.0
    number: int | None = None
    templates: Path | None = None
    seed: int = 0


@dataclasses.dataclass
class FromModel:
    """Has a model write instructions and answers, from a few seed tasks (Self-Instruct); resumes after a kill.

    Attributes:
      seed_tasks: JSONL of instruction, instances and is_classification.
      out: folder for the replies, instructions, examples and statistics.
      number: of instructions wanted.
      llm: name of a model at an endpoint of OpenAI's chat completions.
      base_url: of the endpoint, such as http://localhost:8000/v1; default: OpenAI's.
      key_env: environment variable with the key.
      model: instead of an endpoint: a model here, as a folder or hub name.
      parallel: requests at once (to an endpoint).
      max_requests: in all, those of earlier runs included.
      price_in: of a million tokens of prompts.
      price_out: of a million tokens of replies.
      max_tokens: of a reply.
      temperature: of new instructions.
      top_p: of new instructions.
      novelty: ROUGE-L with another instruction that is too much.
      timeout: seconds to wait for a reply.
      attempts: at most, for each request.
      backoff: seconds before the second attempt; doubled each time.
      longest_wait: seconds; an endpoint that asks for more is given up.
      seed: fixes what is random here.
    """

    seed_tasks: Path
    out: Path = Path("runs/self-instruct")
    number: int = 100
    llm: str | None = None
    base_url: str | None = None
    key_env: str = "OPENAI_API_KEY"
    model: str | None = None
    parallel: int = 4
    max_requests: int | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    max_tokens: int = 1024
    temperature: float = 0.7
    top_p: float = 0.5
    novelty: float = 0.7
    timeout: float = 60.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0
    seed: int = 0


@dataclasses.dataclass
class Instruct:
    """Makes instruction data: from data sets by templates, or from a model (Self-Instruct)."""

    way: tyro.conf.OmitArgPrefixes[
        Annotated[FromTemplates, tyro.conf.subcommand("templates")] | Annotated[FromModel, tyro.conf.subcommand("self")]
    ]


def compare(args: Compare) -> None:
    from . import compare as comparison

    out = args.out or Path("runs") / f"{Path(args.base.model).name}-{args.base.task}"
    found = comparison.compare(
        args.base.model,
        args.base.task,
        args.base.data,
        methods=args.methods,
        seeds=args.seeds,
        rates=_rates(args.lr),
        out=out,
        settings=_settings(args.training),
        watch=_watch,
        say=_say,
        **_prepare(args.base),
    )
    console.print(*found, sep="\n")
    _say(f"written: {out}/results.jsonl, report.md, pareto.png, curves.png", style="dim")


def train(args: Train) -> None:
    from . import compare as comparison

    result = comparison.train(
        args.base.model,
        args.base.task,
        args.base.data,
        method=args.method,
        rate=args.lr,
        out=args.out,
        settings=dataclasses.replace(_settings(args.training), seed=args.seed),
        watch=_watch,
        say=_say,
        **_prepare(args.base),
    )
    scores = ", ".join(f"{k} {v:.4g}" for k, v in result["scores"].items())
    _say(f"{result['method']}: {scores}; {result['trainable']:,} trained ({100 * result['share']:.3f}%)")
    _say(f"written: {args.out}/adapter.safetensors, result.json, log.jsonl", style="dim")


def evaluate(args: Evaluate) -> None:
    from . import compare as comparison

    where = (args.base.model, args.base.task, args.base.data)
    options = {"seed": args.seed, "say": _say, **_prepare(args.base)}
    if args.ranks:
        if args.adapter is None:
            raise ValueError("--ranks needs the --adapter of a DyLoRA")
        ranks = _ranks(args.ranks)
        console.print(comparison.evaluate_ranks(*where, adapter=args.adapter, ranks=ranks, **options))
        return
    scores = comparison.evaluate(*where, adapter=args.adapter, **options)
    _say(", ".join(f"{k} {v:.4g}" for k, v in scores.items()))


def proxy(args: Proxy) -> None:
    from . import compare as comparison

    table = comparison.steer(
        args.base.model,
        args.base.task,
        args.base.data,
        antiexpert=args.antiexpert,
        expert=args.expert,
        adapter=args.adapter,
        alpha=args.alpha,
        say=_say,
        **_prepare(args.base),
    )
    console.print(table)


def merge(args: Merge) -> None:
    from . import compare as comparison

    folder = comparison.merge_adapter(args.model, args.adapter, args.out, args.param_dtype)
    _say(f"written: {folder}")


def methods(args: Methods) -> None:
    from .methods import HEADER, lines

    table = Table(box=box.SIMPLE_HEAD)
    for column in HEADER:
        table.add_column(column, no_wrap=column not in ("trains", "acts on"), overflow="fold")
    for cells in lines():
        table.add_row(*cells)
    console.print(table)


def instruct(args: Instruct) -> None:
    if isinstance(args.way, FromTemplates):
        _from_templates(args.way)
    else:
        _from_model(args.way)


def _from_templates(a: FromTemplates) -> None:
    from . import instruct as instructions

    options = {"split": a.split, "templates": a.templates, "cap": a.cap, "temperature": a.temperature}
    tasks = instructions.parse_tasks(a.tasks)
    found = instructions.from_templates(a.out, tasks, number=a.number, seed=a.seed, **options)
    console.print(instructions.lengths_table(found))
    _say(f"written: {a.out}", style="dim")


def _from_model(a: FromModel) -> None:
    from . import replies, self_instruct

    if (a.llm is None) == (a.model is None):
        raise ValueError("give either --llm NAME, of a model at an endpoint, or --model FOLDER, for one here")
    seeds = self_instruct.read_seeds(a.seed_tasks)
    if a.llm is not None:
        patience = {"attempts": a.attempts, "backoff": a.backoff, "longest_wait": a.longest_wait}
        generate = replies.endpoint(a.llm, a.base_url, key_env=a.key_env, timeout=a.timeout, **patience)
    else:
        from . import hub

        model = hub.load(str(a.model), "generation")
        generate = replies.local(model, model.params, hub.load_tokenizer(str(a.model)))
    settings = self_instruct.Settings(
        a.number, a.seed, novelty=a.novelty, temperature=a.temperature, top_p=a.top_p, max_tokens=a.max_tokens
    )
    found = self_instruct.run(
        a.out,
        seeds,
        generate,
        str(a.llm or a.model),
        settings,
        parallel=a.parallel if a.llm else 1,
        max_requests=a.max_requests,
        prices=(a.price_in, a.price_out),
        say=_say,
    )
    console.print(self_instruct.statistics_table(found.statistics))
    _say(f"written: {a.out}/examples.jsonl, instructions.jsonl, statistics.json, replies.jsonl", style="dim")


VERBS: dict[type, Callable] = {
    Compare: compare,
    Train: train,
    Evaluate: evaluate,
    Proxy: proxy,
    Merge: merge,
    Methods: methods,
    Instruct: instruct,
}
Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Proxy, tyro.conf.subcommand("proxy")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Instruct, tyro.conf.subcommand("instruct")]
)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and runs the verb; errors that a user can mend are one line and exit status 1."""
    args = tyro.cli(Command, prog="peftjax", description=(__doc__ or "").partition("\n")[0], args=argv)
    try:
        VERBS[type(args)](args)
    except (ValueError, OSError, ArithmeticError) as e:
        _say(f"error: {' '.join(str(e).split())}", Console(stderr=True), style="red")
        sys.exit(1)
    except KeyboardInterrupt as e:
        _say(str(e) or "interrupted", Console(stderr=True))
        sys.exit(130)


def _say(text: str, on: Console = console, **style: Any) -> None:
    """One line, whatever its length, taken as it is."""
    on.print(text, highlight=False, markup=False, soft_wrap=True, **style)


def _settings(t: Training):
    from .train import Settings

    return Settings(**{**dataclasses.asdict(t), "clip": t.clip or None})


def _prepare(b: Base) -> dict:
    import jax.numpy as jnp

    return {
        "eval_split": b.split,
        "train_limit": b.train_limit,
        "eval_limit": b.eval_limit,
        "max_length": b.max_length,
        "max_buckets": b.buckets,
        "dtype": jnp.dtype(b.dtype),
        "param_dtype": jnp.dtype(b.param_dtype),
        "quantize": b.quantize,
        "fresh_head": b.fresh_head,
        "remat": b.remat,
    }


def _rates(text: str) -> dict[str, float]:
    from .methods import parse

    rates, items, depth = {}, [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:  # a comma between arguments parts no rates
            items.append("")
        else:
            items[-1] += c
    for item in filter(str.strip, items):
        name, _, value = item.rpartition("=")
        try:
            rate = float(value)
        except ValueError:
            raise ValueError(f"cannot read the learning rate {item!r}; write 1e-3, or full=1e-4,lora=1e-3") from None
        rates |= dict.fromkeys(parse(name) if name.strip() else [""], rate)
    return rates


def _ranks(text: str) -> list[int]:
    try:
        return [int(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"cannot read the ranks {text!r}; write 1,2,4") from None


@contextlib.contextmanager
def _watch(title: str) -> Iterator[Callable[[dict], None]]:
    """A progress bar with loss, tokens a second and time left, fed by the records of a run."""
    from .progress import watch

    with watch(console, title) as report:
        yield report
