"""Parameter-efficient fine-tuning in JAX: compare methods, train one, evaluate or merge an adapter.

peftjax compare --model FOLDER --task rte --data FOLDER --methods head,bitfit,lora --out runs/rte
"""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console(width=None if sys.stdout.isatty() else 120)


@dataclasses.dataclass
class Base:
    """The model and the data.

    Attributes:
      model: folder in Hugging Face's layout, or a hub name; tiny-books comes with the package.
      task: places (built in), cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, banking77, e2e, gsm8k, boolq, piqa,
        social_i_qa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa or sft.
      data: folder with the task's files, or a Hugging Face data set; default: the task's own; of sft: JSONL files, with
        shares if you like: a.jsonl,b.jsonl=0.3.
      split: what to score on, dev or test; default: the task's.
      train_limit: use only so many training rows.
      eval_limit: score on only so many inputs.
      max_length: of a text in tokens; default: the task's.
      max_new_tokens: of a generated text; default: the longest answer of the rows read, or as the adapter was trained.
      buckets: number of lengths that batches are padded to.
      dtype: of the activations.
      param_dtype: of the base's parameters; what trains is float32.
      quantize: hold the linear weights of the base in 8 or 4 bits (lora over nf4 is QLoRA).
      fresh_head: draw a new task head even if the model has one.
      head_prior: start a new task head's bias at the labels' mean, or the logarithms of their frequencies.
      remat: what is kept of a block's activations for the backward pass: all; its input (least memory, most time); or
        its products with weights too.
      chat_template: of conversations (sft): alpaca, plain, or a file with a Jinja template; default: the tokenizer's.
    """

    model: str = "tiny-books"
    task: str = "places"
    data: str | None = None
    split: Literal["dev", "test"] | None = None
    train_limit: int | None = None
    eval_limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    buckets: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None
    fresh_head: bool = False
    head_prior: bool = False
    remat: Literal["none", "block", "dots"] = "none"
    chat_template: str | None = None


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
      update: of all parameters at the end, or of each layer inside the backward pass, which then never holds the
        gradients of all layers at once (a scan does): to train everything in less memory; it needs --clip 0.
      trainable_dtype: of what trains; bfloat16 halves its memory and rounds updates at random (moments stay float32).
      data_seed: one order of the data for all seeds; default: each seed has its own.
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
    update: Literal["whole", "backward"] = "whole"
    trainable_dtype: Literal["float32", "bfloat16"] = "float32"
    data_seed: int | None = None


@dataclasses.dataclass
class Decode:
    """How texts are generated to be scored.

    Attributes:
      beams: texts that are followed at once (beam search); 1: the most likely token, again and again.
      length_penalty: a finished text of n tokens is ranked by log-probability over n to this power.
      no_repeat_ngram: no sequence of so many tokens comes twice; 0: no such rule. LoRA on E2E: 10 beams, 0.8, 4.
    """

    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0


@dataclasses.dataclass
class Compare:
    """Trains several methods on one model and task and prints the table.

    Attributes:
      methods: separated by commas; `+` chains, arguments as in Python: "head,lora(rank=4),prefix+bitfit"; "all";
        default: a selection of every kind.
      seeds: number of seeds, counted from 0; those of a method train in one program where the memory allows it.
      lr: learning rate for all, or by method: "full=1e-4,lora=1e-3"; default: each method's own.
      out: where results, report, plots and adapters go; default: runs/MODEL-TASK.
      pack: put several texts of a generation task into a row of max_length tokens.
      lanes: runs of a program that are computed at once; default: what the memory allows, on a CPU one.
      log: where each run's numbers go besides its log.jsonl: tensorboard, wandb, or both with a comma.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    training: tyro.conf.OmitArgPrefixes[Training]
    decode: tyro.conf.OmitArgPrefixes[Decode]
    methods: str | None = None
    seeds: int = 1
    lr: str = ""
    out: Path | None = None
    pack: bool = False
    lanes: int | None = None
    log: str = ""


@dataclasses.dataclass
class Train:
    """Trains one method; a run that was cut off resumes when the same command is given again.

    Several seeds, learning rates or ranks train in one program, and what they leave is as of compare.

    Attributes:
      method: such as "lora", "lora(rank=4, targets=['linear'])" or "lora+bitfit".
      seed: fixes everything that is random; the first, if there are several.
      seeds: number of seeds.
      lr: learning rate, or several: 1e-4,3e-4,1e-3; default: the method's own.
      ranks: of a LoRA, several: 1,2,4,8.
      out: where the adapter, the log and the training state go.
      pack: put several texts of a generation task into a row of max_length tokens.
      lanes, log: as of compare.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    training: tyro.conf.OmitArgPrefixes[Training]
    decode: tyro.conf.OmitArgPrefixes[Decode]
    method: str = "lora"
    seed: int = 0
    seeds: int = 1
    lr: str = ""
    ranks: str = ""
    out: Path = Path("runs/train")
    pack: bool = False
    lanes: int | None = None
    log: str = ""


@dataclasses.dataclass
class Sweep:
    """Makes all runs of a grid; what is there is not made again, and several processes may share the folder.

    Attributes:
      grid: YAML file with models, tasks, methods, ranks, rates, seeds, search, settings, options, rules
        (`peftjax.grid.Grid`).
      out: where runs and results.jsonl go; default: runs/ and the file's name.
      shard: i/n: make the i-th of n parts only, for array jobs.
      retry: make the runs that failed again.
      stale: seconds without a sign of life after which another process's runs are taken over.
      lanes, log: as of compare.
      list: show the runs and make none.
      launch: make them by jobs that are submitted now: of Slurm, or processes on this machine (pip install
        'peftjax[slurm]').
      jobs: how many, each with a shard of its own.
      launch_options: of the jobs: partition=gpu,gpus_per_node=1,timeout_min=600, as submitit and sbatch call them; a
        job that is out of time is queued again and goes on.
    """

    grid: tyro.conf.Positional[Path]
    out: Path | None = None
    shard: str = "1/1"
    retry: bool = False
    stale: float = 600.0
    lanes: int | None = None
    log: str = ""
    list: bool = False
    launch: Literal["slurm", "local"] | None = None
    jobs: int = 1
    launch_options: str = ""


@dataclasses.dataclass
class Sft:
    """Supervised fine-tuning on instructions or chats, the loss on the answers; resumes as train does.

    Attributes:
      data: JSONL files, separated by commas, each with a share if you like: a.jsonl,b.jsonl=0.3. A row is
        {"messages": [...]}, or "instruction" (and "input") with "output", or "prompt" with "completion".
      method: such as "lora" or "lora+neftune(alpha=5)".
      chat_template: alpaca, plain, or a file with a Jinja chat template; default: the tokenizer's.
      pack: put several conversations into a row of max_length tokens.
      max_length: of a conversation in tokens; default: what the model has room for, at most 1024.
      long: what becomes of longer ones: cut at their end, or dropped.
      holdout: share of each file's rows that is held out for the loss.
      cap: at most so many rows of each file.
      max_new_tokens: of the answers to held-out rows that are shown; default: 64.
      seed: fixes everything that is random.
      lr: learning rate; default: the method's own.
      out: where the adapter, the log and the training state go.
      log: as of compare.
    """

    data: str
    training: tyro.conf.OmitArgPrefixes[Training]
    model: str = "tiny-books"
    method: str = "lora"
    chat_template: str | None = None
    pack: bool = False
    max_length: int | None = None
    long: Literal["cut", "drop"] = "cut"
    holdout: float = 0.05
    cap: int | None = None
    max_new_tokens: int | None = None
    buckets: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None
    remat: Literal["none", "block", "dots"] = "none"
    seed: int = 0
    lr: float | None = None
    out: Path = Path("runs/sft")
    log: str = ""


@dataclasses.dataclass
class Evaluate:
    """Scores an adapter, or the base model without one.

    Attributes:
      adapter: the adapter file; default: none.
      ranks: of a DyLoRA adapter, such as 1,2,4,8: a table with the scores at each of them.
      seed: of a task head that neither the base nor an adapter has.
    """

    base: tyro.conf.OmitArgPrefixes[Base]
    decode: tyro.conf.OmitArgPrefixes[Decode]
    adapter: Path | None = None
    ranks: str = ""
    seed: int = 0


@dataclasses.dataclass
class Score:
    """Scores a file of texts with a task's metrics, or with others; no model is needed.

    Attributes:
      predictions: one text a line, in the order of the split's inputs.
      task: e2e, gsm8k, ...
      data: folder with the task's files, or a Hugging Face data set; default: the task's own.
      split: dev or test; default: the task's.
      metrics: such as bleu,nist,meteor; default: the task's.
    """

    predictions: Path
    task: str = "e2e"
    data: str | None = None
    split: Literal["dev", "test"] | None = None
    metrics: str = ""


@dataclasses.dataclass
class LmEval:
    """Runs tasks of EleutherAI's lm-evaluation-harness on a model; needs pip install 'peftjax[lm-eval]'.

    Attributes:
      tasks: names, separated by commas.
      model: folder in Hugging Face's layout, or a hub name.
      adapter: the adapter file; default: none.
      out: where the table, the results and the samples go; the answers there are used again by the same command.
      limit: use only the first so many rows of each task.
      include: a folder with YAML files of own tasks.
      shots: worked examples before each question; default: the task's.
      chat: put the questions into the tokenizer's chat template.
      batch_size: requests at once.
      max_length: of a text in tokens; default: what the model has room for.
      seed: of sampled texts.
      dtype, param_dtype: of the activations, and of the base's parameters.
      quantize: hold the linear weights of the base in 8 or 4 bits.
    """

    tasks: str
    model: str = "tiny-books"
    adapter: Path | None = None
    out: Path = Path("runs/lm-eval")
    limit: int | None = None
    include: Path | None = None
    shots: int | None = None
    chat: bool = False
    batch_size: int = 32
    max_length: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None


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
      templates: YAML file with templates of your own, which replace the task's.
      calibrate: divide by the choices' probabilities after queries without content.
      normalize: rank choices by their likelihood a token.
      separator: between demonstrations; \\n is a line's end.
      methods: to train on the same template, as of compare; default: none.
      adapter: adapter files to score at all numbers of shots; one of sft in its chat template.
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
    templates: Path | None = None
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
class Import:
    """Makes an adapter file of a Hugging Face PEFT folder, or of loralib's tensors.

    Attributes:
      source: the folder, a hub name, or a safetensors file with loralib's names.
      model: the base that it was trained on.
      out: the adapter file.
      labels: of a classifier; default: as many as the trained head has.
      alpha: of loralib's LoRA, whose file does not hold it.
    """

    source: tyro.conf.Positional[str]
    model: str
    out: Path
    labels: int | None = None
    alpha: float | None = None


@dataclasses.dataclass
class Export:
    """Writes an adapter file as a folder that Hugging Face PEFT loads.

    Attributes:
      adapter: the adapter file.
      model: the base that it was trained on.
      out: the new folder.
    """

    adapter: tyro.conf.Positional[Path]
    model: str
    out: Path


@dataclasses.dataclass
class Inspect:
    """Says what an adapter is, without its base.

    Attributes:
      adapter: an adapter file, a Hugging Face PEFT folder, or a hub name.
    """

    adapter: tyro.conf.Positional[str]


@dataclasses.dataclass
class Combine:
    """Makes one adapter of several by arithmetic on what they change; or of a tuned model, its difference to a base.

    Attributes:
      out: the new adapter file.
      model: the base of the adapters.
      adapters: adapter files, each with its weight: a.safetensors=0.7,b.safetensors=-0.3; below 0: subtracted.
      difference: folder or hub name of a tuned model, instead of adapters.
      how: the exact sum; or TIES, DARE, both, or pruning by magnitude, which need a density.
      density: share of the entries of each adapter's change that is kept.
      elect: the sign of an entry in TIES: of the sum, or of the greater number of adapters.
      rank: of the result's matrices, at most; default: as exact as it comes, whole arrays where no product will do.
      energy: share of each matrix's sum of squares that the result keeps.
      seed: of what DARE drops.
    """

    out: Path
    model: str = "tiny-books"
    adapters: str = ""
    difference: str | None = None
    how: Literal["sum", "ties", "dare", "dare-ties", "prune"] = "sum"
    density: float | None = None
    elect: Literal["total", "frequency"] = "total"
    rank: int | None = None
    energy: float | None = None
    seed: int = 0


@dataclasses.dataclass
class Speaker:
    """What writes.

    Attributes:
      model: folder in Hugging Face's layout, or a hub name; tiny-books comes with the package.
      adapter: the adapter file; default: none.
      max_new_tokens: of an answer.
      temperature: 0: the most likely token; above: tokens are drawn.
      top_k: draw from so many of the most likely tokens.
      top_p: draw from the fewest most likely tokens whose probabilities sum to this.
      seed: of what is drawn.
      chat_template: alpaca, plain or a file (Jinja); default: the adapter's, or the tokenizer's own.
      dtype: of the activations.
      param_dtype: of the base's parameters.
      quantize: hold the linear weights of the base in 8 or 4 bits.
    """

    model: str = "tiny-books"
    adapter: Path | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    chat_template: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None


@dataclasses.dataclass
class Generate:
    """Writes on after a prompt, or after each line of standard input, and shows the text as it comes.

    Attributes:
      prompt: default: each line of standard input is one.
      stop: texts before which an answer ends.
      chat: give the prompt as a user's message, by the chat template.
    """

    speaker: tyro.conf.OmitArgPrefixes[Speaker]
    decode: tyro.conf.OmitArgPrefixes[Decode]
    prompt: str | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False


@dataclasses.dataclass
class Chat:
    """A conversation by the model's chat template; /reset begins anew, /exit ends it.

    Attributes:
      system: message that the conversation begins with.
    """

    speaker: tyro.conf.OmitArgPrefixes[Speaker]
    system: str | None = None


@dataclasses.dataclass
class Memory:
    """Plans the memory of a training step on a named device, from the model's config alone.

    The device's own compiler plans it (pip install 'peftjax[plan]' for GPUs, 'peftjax[tpu]' for TPUs; no device is
    needed), or else this machine's, as an estimate.

    Attributes:
      model: folder in Hugging Face's layout, hub name, or config file; no weight is read.
      method: as the methods of compare: "lora,full", "all".
      device: names separated by commas: h200, h100, a100-80g, a100-40g, rtx4090, l4, rtx4060, v5e, v5p, cpu, here.
      batch: rows.
      seq: tokens of a row; of an encoder's text where a decoder is beside it.
      target: tokens that such a decoder writes; default: as seq.
      task: what the model is for; default: by its config.
      labels: of a classifier; 1: a regression.
      dtype: of the activations.
      param_dtype: of the base's parameters; default: as dtype.
      trainable_dtype: of what trains.
      quantize: hold the linear weights of the base in 8 or 4 bits.
      remat: what the backward pass computes again.
      layout: a loop over the layers, a scan, or both side by side.
      accumulate: parts into which a batch is split.
      update: after the backward pass, or within it, layer by layer.
      fit: plan the largest batch that fits.
      compiler: the device's own, this machine's CPU's (an estimate), or the first that is installed.
      json: print JSON, one line a plan.
    """

    model: str = "tiny-books"
    method: str | None = None
    device: str = "h200"
    batch: int = 8
    seq: int = 128
    target: int | None = None
    task: Literal["generation", "classification"] | None = None
    labels: int = 2
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    trainable_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["int8", "nf4", "nf4-double"] | None = None
    remat: Literal["none", "block", "dots"] = "none"
    layout: Literal["loop", "scan", "both"] = "loop"
    accumulate: int = 1
    update: Literal["whole", "backward"] = "whole"
    fit: bool = False
    compiler: Literal["auto", "device", "cpu"] = "auto"
    json: bool = False


@dataclasses.dataclass
class Report:
    """Tables, comparisons and pictures of sweeps: report.md, report.html (one page, nothing else needed), figures/.

    Attributes:
      results: files of a sweep (results.jsonl), or folders that hold one.
      baseline: the method that others are compared with; default: the grid's, or full.
      out: folder; default: that of the first results.
      title: of the report; default: the grid's.
    """

    results: tyro.conf.Positional[tuple[Path, ...]]
    baseline: str | None = None
    out: Path | None = None
    title: str | None = None


@dataclasses.dataclass
class Methods:
    """Lists the methods: what trains, where, whether it merges, the paper."""


@dataclasses.dataclass
class Models:
    """Lists the families of models: architectures, and what of a config is honoured, fixed or harmless.

    Attributes:
      family: show this one in full, such as llama.
    """

    family: tyro.conf.Positional[str | None] = None


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
      adapter: of the model here.
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
    adapter: Path | None = None
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
    from . import compare as comparison, loggers

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
        decoding=_decoding(args.decode),
        pack=args.pack,
        lanes=args.lanes,
        log=loggers.openers(args.log, out, _say),
        **_prepare(args.base),
    )
    console.print(*found, sep="\n")
    _say(f"written: {out}/results.jsonl, report.md, pareto.png, curves.png", style="dim")


def train(args: Train) -> None:
    from . import compare as comparison, loggers

    if args.seeds < 1:
        raise ValueError(f"seeds must be at least 1; got {args.seeds}")
    rates, ranks = _numbers(args.lr, "learning rates", "1e-4,3e-4,1e-3", float), _ranks(args.ranks)
    where = (args.base.model, args.base.task, args.base.data)
    common: dict[str, Any] = {"method": args.method, "out": args.out, "watch": _watch, "say": _say}
    common |= {"decoding": _decoding(args.decode), "pack": args.pack, **_prepare(args.base)}
    common["log"] = loggers.openers(args.log, args.out, _say)
    settings = dataclasses.replace(_settings(args.training), seed=args.seed)
    if args.seeds > 1 or len(rates) > 1 or ranks:
        seeds = range(args.seed, args.seed + args.seeds)
        several = {"seeds": seeds, "rates": rates, "ranks": ranks, "lanes": args.lanes}
        found = comparison.train_several(*where, settings=settings, **several, **common)
        console.print(*found, sep="\n")
        _say(f"written: {args.out}/results.jsonl, report.md, pareto.png, curves.png, runs", style="dim")
        return
    if args.lanes is not None:
        raise ValueError("--lanes is for several runs in one program; write --seeds, several rates or --ranks, too")
    _say_trained(comparison.train(*where, rate=rates[0] if rates else None, settings=settings, **common), args.out)


def sweep(args: Sweep) -> None:
    from . import grid as grids, loggers, sweep as sweeps

    grid = grids.read(args.grid)
    out = args.out or Path("runs") / args.grid.stem
    if args.list:
        console.print(sweeps.listed(grid, out))
        return
    log = loggers.openers(args.log, out, _say)
    if args.launch is not None:
        _launch(args, args.launch, out)
        return
    if args.jobs != 1 or args.launch_options:
        raise ValueError("--jobs and --launch-options are for --launch slurm or local; write that, too")
    how: dict[str, Any] = {"retry": args.retry, "stale": args.stale, "lanes": args.lanes}
    found = sweeps.sweep(grid, out, shard=_shard(args.shard), log=log, **how)
    failed = [r for r in found if r["kind"] == "failed"]
    for r in failed:
        _say(f"failed: {r['model']}, {r['task']}, {r['method']}, seed {r['seed']}: {r['error']}")
    again = "; to make these again: --retry" if failed else ""
    _say(f"{len(found)} runs are over, {len(failed)} of them failed{again}")
    _say(f"written: {out}/results.jsonl; to read: peftjax report {out}", style="dim")


def _launch(args: Sweep, cluster: str, out: Path) -> None:
    from .launch import launch, options

    if args.shard != "1/1":
        raise ValueError("--launch gives each job its own shard; leave --shard out, and say how many with --jobs")
    more = [f"--stale={args.stale}", *(["--retry"] if args.retry else [])]
    more += [f"--{name}={value}" for name in ("lanes", "log") if (value := getattr(args, name))]
    parameters = options(args.launch_options)
    jobs, logs = launch(args.grid, out, cluster=cluster, jobs=args.jobs, parameters=parameters, more=more)
    _say(f"submitted: {', '.join(str(job.job_id) for job in jobs)}")
    _say(f"logs: {logs}; how far it is: peftjax sweep {args.grid} --out {out} --list", style="dim")


def _shard(text: str) -> tuple[int, int]:
    i, _, n = text.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"cannot read the shard {text!r}; write i/n with i from 1 to n, such as 1/4")
    return int(i), int(n)


def sft(args: Sft) -> None:
    from . import compare as comparison, loggers
    from .tasks import Chats, get_task

    names = [f.name for f in dataclasses.fields(Base)]
    base = Base(task="sft", **{name: getattr(args, name) for name in names if name in vars(args)})
    result = comparison.train(
        base.model,
        get_task("sft")._replace(chats=Chats(args.holdout, args.cap, args.long)),
        base.data,
        method=args.method,
        rate=args.lr,
        out=args.out,
        settings=dataclasses.replace(_settings(args.training), seed=args.seed),
        watch=_watch,
        say=_say,
        pack=args.pack,
        log=loggers.openers(args.log, args.out, _say),
        **_prepare(base),
    )
    _say_trained(result, args.out)


def _say_trained(result: dict, out: Path) -> None:
    scores = ", ".join(f"{k} {v:.4g}" for k, v in result["scores"].items())
    _say(f"{result['method']}: {scores}; {result['trainable']:,} trained ({100 * result['share']:.3f}%)")
    _say(f"written: {out}/adapter.safetensors, result.json, log.jsonl", style="dim")


def evaluate(args: Evaluate) -> None:
    from . import compare as comparison

    where = (args.base.model, args.base.task, args.base.data)
    options = {"seed": args.seed, "say": _say, "decoding": _decoding(args.decode), **_prepare(args.base)}
    if args.ranks:
        if args.adapter is None:
            raise ValueError("--ranks needs the --adapter of a DyLoRA")
        ranks = _ranks(args.ranks)
        console.print(comparison.evaluate_ranks(*where, adapter=args.adapter, ranks=ranks, **options))
        return
    scores = comparison.evaluate(*where, adapter=args.adapter, **options)
    _say(", ".join(f"{k} {v:.4g}" for k, v in scores.items()))


def score(args: Score) -> None:
    from . import compare as comparison

    metrics = [m.strip() for m in args.metrics.split(",") if m.strip()]
    scores = comparison.score_file(args.task, args.data, args.predictions, split=args.split, metrics=metrics)
    _say(", ".join(f"{k} {v:.4g}" for k, v in scores.items()))


def lm_eval(args: LmEval) -> None:
    try:
        from . import harness
    except ImportError as e:
        raise ValueError(str(e)) from e
    from .run import check_writable

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    check_writable(args.out)
    manager = harness.find_tasks(names, args.include)  # before a model is loaded
    fields = ("model", "adapter", "batch_size", "max_length", "seed", "dtype", "param_dtype", "quantize")
    lm = harness.PeftjaxLM(**{name: getattr(args, name) for name in fields})
    ways: dict[str, Any] = {"limit": args.limit, "shots": args.shots, "chat": args.chat}
    _, table = harness.run_tasks(lm, names, manager, args.out, **ways)
    _say(table)
    _say(f"written: {args.out}/table.md, results.json, samples_*.jsonl", style="dim")


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
        templates=args.templates,
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


def import_(args: Import) -> None:
    from .interop import import_adapter

    size = import_adapter(args.source, args.model, args.out, labels=args.labels, alpha=args.alpha)
    _say(f"wrote {args.out}, {size:,} bytes")


def export(args: Export) -> None:
    from .interop import export_adapter

    _say(f"wrote {export_adapter(args.adapter, args.model, args.out)}")


def inspect(args: Inspect) -> None:
    from .interop import inspect

    facts, lines = inspect(args.adapter)
    for name, fact in facts.items():
        _say(f"{name}: {fact}")
    table = Table(box=None)
    for title in ("tensor", "times", "shape", "dtype"):
        table.add_column(title, overflow="fold")
    for line in lines:
        table.add_row(escape(line.name), str(line.count), " x ".join(map(str, line.shape)), line.dtype)
    console.print(table)


def combine(args: Combine) -> None:
    from . import compare as comparison

    form = {"rank": args.rank, "energy": args.energy}
    if bool(args.adapters) == (args.difference is not None):
        raise ValueError("give either --adapters a.safetensors=0.5,b.safetensors=0.5 or --difference TUNED_FOLDER")
    if args.difference is not None:
        if args.how != "sum" or args.density is not None:
            raise ValueError("--how and --density are for --adapters; leave them out with --difference")
        made, size = comparison.extract_difference(args.model, args.difference, args.out, **form)
    else:
        choices: dict[str, Any] = {name: getattr(args, name) for name in ("how", "density", "elect", "seed")}
        made, size = comparison.combine_adapters(args.model, _weighted(args.adapters), args.out, **choices, **form)
    if made.kept:
        ranks = [k.rank for k in made.kept.values()]
        spread = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else ranks[0]
        _say(
            f"{len(ranks)} matrices of rank {spread}, {100 * made.energy:.4g}% or more of the squares of each; "
            f"largest error {made.error:.3g} in spectral norm"
        )
    _say(f"written: {args.out}, {size:,} bytes", style="dim")


def generate(args: Generate) -> None:
    import jax

    from . import chat

    if args.speaker.chat_template is not None and not args.chat:
        raise ValueError("--chat-template is for conversations; write --chat too")
    writer, params, key = _open(args.speaker, args.chat, **dataclasses.asdict(args.decode))
    template = chat.template_of(writer.tokenizer, args.speaker.chat_template) if args.chat else ""

    def read(text: str) -> Any:
        message = {"role": "user", "content": text}
        return chat.encode(writer.tokenizer, [message], template) if args.chat else text

    lines = (line.rstrip("\r\n") for line in sys.stdin) if args.prompt is None else iter([args.prompt])
    prompts = (read(line) for line in lines if line.strip() or args.prompt is not None)
    if args.decode.beams > 1:
        for text in writer.complete(params, list(prompts), key=key, until=args.stop):
            print(text, flush=True)
        return
    for i, prompt in enumerate(prompts):
        own = None if key is None else jax.random.fold_in(key, i)
        for piece in writer.stream(params, prompt, key=own, until=args.stop):
            print(piece, end="", flush=True)
        print(flush=True)


def chat(args: Chat) -> None:
    from .chat import converse, template_of

    writer, params, key = _open(args.speaker, True)
    template = template_of(writer.tokenizer, args.speaker.chat_template)
    asks = sys.stdin.isatty() and sys.stdout.isatty()

    def read() -> str | None:
        try:
            return input("> " if asks else "")
        except EOFError:
            return None

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    def note(text: str) -> None:
        _say(text, Console(stderr=True), style="dim")

    converse(writer, params, template, read=read, write=write, note=note, system=args.system, key=key)


def memory(args: Memory) -> None:
    import json

    import jax.numpy as jnp

    from . import memory as plans
    from .train import Settings

    dtypes = {"dtype": jnp.dtype(args.dtype), "param_dtype": jnp.dtype(args.param_dtype or args.dtype)}
    settings = Settings(
        batch_size=args.batch,
        accumulate=args.accumulate,
        update=args.update,
        trainable_dtype=args.trainable_dtype,
        clip=1.0 if args.update == "whole" else None,
    )
    found = []
    for row in plans.survey(
        args.model,
        args.method,
        [name.strip() for name in args.device.split(",")],
        settings,
        length=args.seq,
        target_length=args.target,
        purpose=args.task,
        labels=args.labels,
        layouts=("loop", "scan") if args.layout == "both" else (args.layout,),
        fit=args.fit,
        compiler=args.compiler,
        say=lambda text: _say(text, Console(stderr=True)),
        quantize=args.quantize,
        remat=args.remat,
        **dtypes,
    ):
        found.append(row)
        if args.json:
            print(json.dumps(row.json()), flush=True)
    if not args.json:
        console.print(plans.table(found))
        for line in plans.notes(found):
            _say(line, style="dim")


def report(args: Report) -> None:
    from . import page

    if not args.results:
        raise ValueError("give at least one results.jsonl of `peftjax sweep`, or a folder that holds one")
    tables, folder = page.report(args.results, args.baseline, args.out, args.title)
    for table in tables:
        console.print(table)
    _say(f"written: {folder}/report.md, report.html, figures/", style="dim")


def methods(args: Methods) -> None:
    from .methods import HEADER, lines

    table = Table(box=box.SIMPLE_HEAD)
    for column in HEADER:
        table.add_column(column, no_wrap=column not in ("trains", "acts on"), overflow="fold")
    for cells in lines():
        table.add_row(*cells)
    console.print(table)


def models(args: Models) -> None:
    from .models import FAMILIES
    from .models.base import details, summary

    if args.family not in (None, *FAMILIES):
        raise ValueError(f"there is no family {args.family!r}; the families are {', '.join(FAMILIES)}")
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("family", "config", ""):
        table.add_column(column, no_wrap=column != "", overflow="fold")
    for family in FAMILIES.values() if args.family is None else [FAMILIES[args.family]]:
        for i, (what, value) in enumerate((summary if args.family is None else details)(family)):
            table.add_row("" if i else family.name, what, value)
        table.add_section()
    console.print(table)
    more = "; bookkeeping is left alone: `peftjax models llama` lists those keys" if args.family is None else ""
    _say(f"A key that is not here must have transformers' own default; another value is refused{more}.", style="dim")


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
        from .checkpoint import load_adapter

        model = hub.load(str(a.model), "generation")
        params = model.params if a.adapter is None else load_adapter(a.adapter, model).params
        generate = replies.local(model, params, hub.load_tokenizer(str(a.model)))
    settings = self_instruct.Settings(
        a.number, a.seed, novelty=a.novelty, temperature=a.temperature, top_p=a.top_p, max_tokens=a.max_tokens
    )
    found = self_instruct.run(
        a.out,
        seeds,
        generate,
        str(a.llm or a.adapter or a.model),
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
    Sweep: sweep,
    Sft: sft,
    Evaluate: evaluate,
    Score: score,
    LmEval: lm_eval,
    Proxy: proxy,
    Icl: icl,
    Merge: merge,
    Import: import_,
    Export: export,
    Inspect: inspect,
    Combine: combine,
    Generate: generate,
    Chat: chat,
    Memory: memory,
    Report: report,
    Methods: methods,
    Models: models,
    Instruct: instruct,
}
LIGHT = (Score, Inspect, Memory, Report, Methods, Models)  # verbs that compile nothing for the device that is here
Command = (
    Annotated[Compare, tyro.conf.subcommand("compare")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Sft, tyro.conf.subcommand("sft")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Score, tyro.conf.subcommand("score")]
    | Annotated[LmEval, tyro.conf.subcommand("lm-eval")]
    | Annotated[Proxy, tyro.conf.subcommand("proxy")]
    | Annotated[Icl, tyro.conf.subcommand("icl")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Combine, tyro.conf.subcommand("combine")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Memory, tyro.conf.subcommand("memory")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Methods, tyro.conf.subcommand("methods")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Instruct, tyro.conf.subcommand("instruct")]
)


def main(argv: list[str] | None = None) -> None:
    """Reads the command line and runs the verb; errors that a user can mend are one line and exit status 1."""
    args = tyro.cli(Command, prog="peftjax", description=(__doc__ or "").partition("\n")[0], args=argv)
    from .devices import keep_memory, keep_to_cpu

    keep_to_cpu()
    try:
        if type(args) not in LIGHT:
            keep_memory()
            _keep_programs()
        VERBS[type(args)](args)
    except (ValueError, OSError, ArithmeticError) as e:
        _say(f"error: {' '.join(str(e).split())}", Console(stderr=True), style="red")
        sys.exit(1)
    except KeyboardInterrupt as e:
        _say(str(e) or "interrupted", Console(stderr=True))
        sys.exit(130)


def _keep_programs() -> None:
    """Keeps what is compiled for a GPU or TPU in the user's cache for the next run, unless a folder is set already.

    XDG Base Directory Specification: $XDG_CACHE_HOME, or ~/.cache where that is empty or not absolute. Programs for a
    CPU are compiled anew: they are for the CPU that is here, and a cache may be shared by several.
    """
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] - made when it runs
    if chosen is not None or jax.default_backend() == "cpu":
        return
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = home if home.is_absolute() else Path("~/.cache").expanduser()
    jax.config.update("jax_compilation_cache_dir", str(home / "peftjax" / "xla"))


def _say(text: str, on: Console = console, **style: Any) -> None:
    """One line, whatever its length, taken as it is."""
    on.print(text, highlight=False, markup=False, soft_wrap=True, **style)


def _settings(t: Training):
    from .train import Settings

    return Settings(**{**dataclasses.asdict(t), "clip": t.clip or None})


def _prepare(b: Base) -> dict:
    import jax.numpy as jnp

    from . import sft

    return {
        "eval_split": b.split,
        "train_limit": b.train_limit,
        "eval_limit": b.eval_limit,
        "max_length": b.max_length,
        "max_new_tokens": b.max_new_tokens,
        "max_buckets": b.buckets,
        "dtype": jnp.dtype(b.dtype),
        "param_dtype": jnp.dtype(b.param_dtype),
        "quantize": b.quantize,
        "fresh_head": b.fresh_head,
        "head_prior": b.head_prior,
        "remat": b.remat,
        **({"chat_template": sft.template(b.chat_template)} if b.chat_template else {}),
    }


def _decoding(d: Decode):
    from .generate import Decoding

    return Decoding(**dataclasses.asdict(d))


def _open(s: Speaker, chats: bool, **choices: Any) -> tuple:
    """The writer, its parameters, and a key where tokens are drawn."""
    import jax
    import jax.numpy as jnp

    from .chat import load
    from .generate import Decoding

    how = Decoding(s.max_new_tokens, s.temperature, s.top_k, s.top_p, **choices)
    dtypes = {"dtype": jnp.dtype(s.dtype), "param_dtype": jnp.dtype(s.param_dtype)}
    spoken = chats and s.chat_template is None
    writer, params = load(s.model, s.adapter, how, spoken=spoken, quantize=s.quantize, **dtypes)
    return writer, params, jax.random.key(s.seed) if s.temperature else None


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


def _weighted(text: str) -> list[tuple[str, float]]:
    pairs = []
    for item in filter(None, map(str.strip, text.split(","))):
        file, _, weight = item.rpartition("=")
        try:
            pairs.append((file, float(weight)))
        except ValueError:
            file = ""
        if not file:
            raise ValueError(f"cannot read the adapter {item!r}; write a file and its weight, such as {item}=0.5")
    return pairs


def _ranks(text: str) -> list[int]:
    return _numbers(text, "ranks", "1,2,4", int)


def _numbers(text: str, what: str, such_as: str, kind: type) -> list:
    try:
        return [kind(x) for x in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"cannot read the {what} {text!r}; write {such_as}") from None


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
