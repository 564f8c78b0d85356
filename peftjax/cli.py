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
class Icl:
    """Few-shot or fine-tune: scores a model with demonstrations in its prompt, and trained, with what a query costs.

    Attributes:
      shots: numbers of demonstrations, such as 0,1,2,4; default: those of 0,1,2,4,8 that fit into the context.
      select: how they are chosen: random, balanced over the answers, or bm25, the nearest to each query.
      seeds: draws of the demonstrations, and trainings of each method, counted from 0.
      template: how rows are put in words; default: the task's first.
      calibrate: divide by the choices' probabilities after queries without content.
      normalize: rank choices by their likelihood a token.
      separator: between demonstrations; \\n is a line's end.
      methods: to train on the same template, as of compare; default: none.
      adapter: adapter files to score at all numbers of shots.
      lr: learning rate for all, or by method, as of compare.
      query_batch: prompts scored at once.
      out: where results, report, plot and adapters go; default: runs/MODEL-TASK-icl.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    training: tyro.conf.OmitArgPrefixes[Training]
    shots: str = ""
    select: Literal["random", "balanced", "bm25"] = "random"
    seeds: int = 1
    template: str | None = None
    calibrate: bool = False
    normalize: bool = False
    separator: str = "\\n\\n"
    methods: str | None = None
    adapter: tuple[Path, ...] = ()
    lr: str = ""
    query_batch: int = 16
    out: Path | None = None


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


def icl(args: Icl) -> None:
    from .icl import FewShot, icl

    out = args.out or Path("runs") / f"{Path(args.base.model).name}-{args.base.task}-icl"
    how = FewShot(
        shots=_shots(args.shots),
        select=args.select,
        seeds=args.seeds,
        template=args.template,
        calibrate=args.calibrate,
        normalize=args.normalize,
        separator=args.separator.replace("\\n", "\n").replace("\\t", "\t"),
        batch_size=args.query_batch,
    )
    found = icl(
        args.base.model,
        args.base.task,
        args.base.data,
        how=how,
        methods=args.methods,
        adapters=args.adapter,
        rates=_rates(args.lr),
        out=out,
        settings=_settings(args.training),
        watch=_watch,
        say=_say,
        **_prepare(args.base),
    )
    console.print(*found, sep="\n")
    _say(f"written: {out}/results.jsonl, report.md, costs.png", style="dim")


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


VERBS: dict[type, Callable] = {
    Compare: compare,
    Train: train,
    Evaluate: evaluate,
    Proxy: proxy,
    Icl: icl,
    Merge: merge,
    Methods: methods,
}
Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Proxy, tyro.conf.subcommand("proxy")]
    | Annotated[Icl, tyro.conf.subcommand("icl")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
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


def _shots(text: str) -> tuple[int, ...] | None:
    try:
        return tuple(int(x) for x in text.split(",")) if text else None
    except ValueError:
        raise ValueError(f"cannot read the shots {text!r}; write 0,1,2,4") from None


@contextlib.contextmanager
def _watch(title: str) -> Iterator[Callable[[dict], None]]:
    """A progress bar with loss, tokens a second and time left, fed by the records of a run."""
    from .progress import watch

    with watch(console, title) as report:
        yield report
