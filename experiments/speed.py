"""A training step here beside one of Hugging Face PEFT: same weights, adapter, batch, dtype, precision and optimizer.

    python experiments/speed.py --scale cpu     # four small shapes in float32
    python experiments/speed.py --scale gpu     # BERT-base, GPT-2 medium, Llama of 1B and 7B

writes into `experiments/results/speed/` a line a cell (`cpu.jsonl`; what is there is not run again), a report and a
plot. A cell is a case and a method, in a process of its own:

- Random weights are written once as a transformers folder, which both sides load. PEFT makes the adapter, noise moves
  it off its start, and `peftjax.interop` carries it over, so both sides start from the same function.
- Both take three steps of AdamW (rate 1e-4, no decay, gradient clipped to norm 1; theirs fused), dropout 0. The number
  of trained values must be equal and the losses must agree (`TOLERANCE`), or the cell says so and times nothing.
- Then ours, PEFT as it is (eager) and PEFT under `torch.compile` take turns on the same batch, a turn being as many
  steps as last about `--turn` seconds, and a ratio is the median over turns. Where a side fails, its cell has the
  reason.

Under bfloat16 the frozen weights are bfloat16 on both sides and what trains is float32; PEFT runs under autocast, as
transformers' trainer has it. float32 products on a GPU are in TF32 on both sides. `full` trains float32 weights.

Peaks: of ours, XLA's plan of the step (arguments, outputs and temporaries) and on a GPU also what JAX's allocator
counted in this process; of theirs, the parameters and optimizer state and what torch's allocator adds in a step, on a
CPU as its profiler logs it. The libraries' own workspaces are outside of both on a CPU. Utilisation is the model's
FLOPs (`costs.analytic`: forward, backward to activations, and to the weights where all train; low-rank parts do not
count) over the seconds, against the faster of two measured products of large matrices, XLA's and torch's.

On a GPU, `--repeats 5 --minutes 7` stays within eight minutes: five turns of half a second a side, LoRA of every case
first, then DoRA and so on (`FIRST`), and no cell is begun after seven minutes. The same command goes on where it
stopped. A cell takes 10 to 60 s, most of it loading and compiling; `torch.compile` is tried on LoRA only.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two allocators share the GPU
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
)  # to ask for a GPU is not to start CUDA: it survives no fork

import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
import transformers
import tyro

from peftjax import costs, hub
from peftjax.counting import flops as count_flops
from peftjax.devices import keep_memory
from peftjax.interop import load_peft
from peftjax.methods import Method, adalora, chain, full, head, prefix
from peftjax.problem import loss_of
from peftjax.together import share
from peftjax.train import Settings, make_optimizer, make_step, start
from peftjax.tree import Tree, count

OUT = Path(__file__).parents[1] / "experiments/results/speed"
METHODS = ("full", "lora", "dora", "prefix", "adalora", "ia3", "qlora")
FIRST = ("lora", "dora", "full", "adalora", "qlora", "prefix", "ia3")  # the order in which they are run
SIDES = ("ours", "eager", "compiled")
CHECKED = 3  # steps whose losses must agree
RANK, ALPHA, TOKENS, RATE = 8, 16, 16, 1e-4  # TOKENS: of a prefix
# AdaLoRA allocates ranks at every step after the checked ones.
PRUNING = {"warmup": CHECKED + 1, "final": 1000, "total": 10_000, "every": 1, "orthogonality": 0.1}
TOLERANCE = {("cpu", "float32"): 1e-4, ("gpu", "float32"): 2e-3, ("gpu", "bfloat16"): 2e-2, ("cpu", "bfloat16"): 2e-2}
QUERY_VALUE = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"]}  # GPT-2's are one product
LINEAR = {
    "bert": r".*encoder.*\.(query|key|value|dense)",
    "gpt2": r".*\.(c_attn|c_proj|c_fc)",
    "llama": r".*\.(q|k|v|o|gate|up|down)_proj",
}


class Case(NamedTuple):
    """A model, and a batch of full rows.

    Attributes:
      config: () -> transformers' config, with all dropout 0.
      kind: 'classification' or 'generation'.
      dtype: of the frozen weights and the activations.
      methods: that are run.
    """

    config: Callable[[], Any]
    kind: str
    rows: int
    length: int
    dtype: str = "float32"
    methods: tuple[str, ...] = METHODS


def bert(width: int, layers: int, **sizes) -> Any:
    return transformers.BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **{"num_labels": 2, **sizes},
    )


def gpt2(width: int, layers: int, **sizes) -> Any:
    return transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=width // 64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes
    )


def llama(width: int, ff: int, layers: int, heads: int, kv: int, vocab_size: int = 32000) -> Any:
    return transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=4096,
    )


CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "bert-small": Case(lambda: bert(384, 6, vocab_size=8192), "classification", 8, 128),
        "gpt2-small": Case(lambda: gpt2(384, 4, vocab_size=4096), "generation", 4, 256),
        "llama-1b-small": Case(lambda: llama(512, 1408, 4, 8, 2, 4096), "generation", 2, 512),
        "llama-7b-small": Case(lambda: llama(768, 2048, 2, 12, 12, 4096), "generation", 2, 512),
    },
    "gpu": {
        "bert-base": Case(lambda: bert(768, 12), "classification", 32, 128),
        "gpt2-medium": Case(lambda: gpt2(1024, 24), "generation", 8, 512),
        "llama-1b": Case(lambda: llama(2048, 5632, 22, 32, 4), "generation", 4, 2048, "bfloat16"),
        "llama-7b": Case(
            lambda: llama(4096, 11008, 32, 32, 32), "generation", 4, 2048, "bfloat16", ("lora", "dora", "qlora")
        ),
    },
}
COMPILED = ("lora",)  # what `torch.compile` is tried on


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run.

    Attributes:
      scale: 'cpu' or 'gpu'.
      cases: their names; default: all of the scale.
      methods: default: all of a case.
      repeats: turns of each side.
      turn: seconds that a turn lasts, about.
      compiled: methods that `torch.compile` is tried on.
      threads: of each side on a CPU; default: all cores. With one, time is the process's on the CPU, not the clock's:
        other programs on the machine move it little, while two threads that wait for each other lose far more of it.
      allocator: 'kept': both sides in a process that keeps the memory it frees, as the command line's do
        (`peftjax.devices.keep_memory`); 'default': glibc's.
      most_load: a cell that is there but was taken under a load (of this process and others) above it is run again.
      minutes: after which no cell is begun.
      out: where the results go.
    """

    scale: Literal["cpu", "gpu"] = "cpu"
    cases: tuple[str, ...] = ()
    methods: tuple[str, ...] = METHODS
    repeats: int = 5
    turn: float = 0.5
    compiled: tuple[str, ...] = COMPILED
    threads: int | None = None
    allocator: Literal["kept", "default"] = "kept"
    most_load: float = math.inf
    minutes: float = math.inf
    out: Path = OUT


# The two sides


class Side(NamedTuple):
    """One side's training.

    Attributes:
      step: () -> the loss before the step, which may not be there yet.
      wait: waits until all steps are done.
      trained: number of trained values.
      compile_seconds: until the first step could run; None where the first step compiles.
      growth: () -> bytes at once: those held, and those that a step adds.
    """

    step: Callable[[], Any]
    wait: Callable[[], Any]
    trained: int
    compile_seconds: float | None
    peak: Callable[[], int]
    flops: int | None = None


def peft_config(method: str, case: Case) -> Any:
    """PEFT's configuration of a method; None for full fine-tuning."""
    family = case.config().model_type
    task = "SEQ_CLS" if case.kind == "classification" else "CAUSAL_LM"
    turned = {"fan_in_fan_out": family == "gpt2"}  # Conv1D
    low_rank = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "task_type": task, **turned}
    if method == "full":
        return None
    if method in ("lora", "qlora"):
        return peft.LoraConfig(target_modules=QUERY_VALUE[family], **low_rank)
    if method == "dora":
        return peft.LoraConfig(target_modules=LINEAR[family], use_dora=True, **low_rank)
    if method == "adalora":
        return peft.AdaLoraConfig(
            target_modules=QUERY_VALUE[family],
            init_r=12,
            target_r=RANK,
            lora_alpha=ALPHA,
            tinit=PRUNING["warmup"],
            tfinal=PRUNING["final"],
            deltaT=PRUNING["every"],
            total_step=PRUNING["total"],
            orth_reg_weight=PRUNING["orthogonality"],
            task_type=task,
            **turned,
        )
    if method == "ia3":
        return peft.IA3Config(task_type=task)
    return peft.PrefixTuningConfig(num_virtual_tokens=TOKENS, task_type=task)


def auto(case: Case) -> Any:
    """transformers' class of the case's model."""
    kind = case.kind
    return getattr(
        transformers,
        "AutoModelForSequenceClassification" if kind == "classification" else "AutoModelForCausalLM",
    )


def task(case: Case) -> str:
    """What `hub` calls it."""
    return "classification" if case.kind == "classification" else "causal-lm"


def on(scale: str) -> str:
    """torch's name of the device."""
    return "cuda" if scale == "gpu" else "cpu"


def write(case: Case, scale: str, folder: Path) -> None:
    """Random weights as a transformers folder."""
    torch.manual_seed(0)
    with torch.device(on(scale)):
        model = auto(case).from_config(case.config(), dtype=getattr(torch, case.dtype))
    model.save_pretrained(folder)


def numbers(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (rows, length) and labels (rows)."""
    rng = np.random.default_rng(0)
    vocabulary = case.config().vocab_size
    return rng.integers(0, vocabulary, (case.rows, case.length)), rng.integers(0, 2, case.rows)


def quantized(case: Case) -> Any:
    """bitsandbytes' NF4 of the blocks' linear layers, as ours has it."""
    importlib.import_module("bitsandbytes")  # transformers' own message of its absence is about an update

    skipped = ["lm_head", "classifier", "pooler.dense"]  # where names end
    dtype = getattr(torch, case.dtype)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    )


def adapted(case: Case, method: str, folder: Path, scale: str, codes: bool = False) -> Any:
    """The model under PEFT, always with the same adapter: its own start and some noise.

    Args:
      codes: whether bitsandbytes quantises the base.
    """
    more: dict[str, Any] = {"quantization_config": quantized(case)} if codes else {}
    dtype = torch.float32 if method == "full" else getattr(torch, case.dtype)
    model = auto(case).from_pretrained(folder, dtype=dtype, device_map=on(scale), **more)
    model.config.use_cache = False
    torch.manual_seed(1)
    config = peft_config(method, case)
    if config is None:
        return model.train()
    model = peft.get_peft_model(model, config)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += (0.02 * torch.randn(p.shape, generator=noise)).to(p.device, p.dtype)
    return model.train()


def theirs(case: Case, method: str, folder: Path, scale: str, compiled: bool) -> Side:
    """PEFT's training, eager or compiled."""
    where = on(scale)
    model = adapted(case, method, folder, scale, codes=method == "qlora")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    ids, labels = (torch.as_tensor(x, device=where) for x in numbers(case))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = labels if case.kind == "classification" else ids
    call = torch.compile(model) if compiled else model
    narrow = torch.autocast(where, torch.bfloat16) if case.dtype == "bfloat16" else contextlib.nullcontext()
    steps = iter(range(10**9))

    def step():
        optimizer.zero_grad(set_to_none=True)
        with narrow:
            loss = call(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if method == "adalora":
            model.base_model.update_and_allocate(next(steps))
        return loss.detach()

    def held():
        states = [x for s in optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
        tensors = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers(), *states)}
        return sum(tensors.values())

    def peak():
        optimizer.zero_grad(set_to_none=True)
        return held() + (growth_on_gpu if where == "cuda" else growth_on_cpu)(step)

    wait = torch.cuda.synchronize if where == "cuda" else lambda: None
    return Side(step, wait, sum(p.numel() for p in trained), None, peak)


def growth_on_gpu(step: Callable) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def growth_on_cpu(step: Callable) -> int:
    """What the allocator holds at most in a step above what it held before: its log in torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as at:
        file = Path(at) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events = sorted((e["ts"], i, e["args"]) for i, e in enumerate(events))
    _, _, first = events[0]
    return max(e["Total Allocated"] for _, _, e in events) - (first["Total Allocated"] - first["Bytes"])


def carried(case: Case, method: str, model: hub.Model, folder: Path | None) -> tuple[Tree, Method]:
    """The adapted parameters and the method: of a PEFT folder, or, without one, as made here."""
    if method == "full":
        return model.params, full()
    if folder is None:  # what PEFT cannot hand over
        made = prefix(TOKENS)
        made = chain(made, head()) if case.kind == "classification" else made
        return made.init(jax.random.key(0), model.params, model.sites), made
    adapter = load_peft(folder, model)
    if method != "adalora":
        return adapter.params, adapter.method
    own = adalora(RANK, 12, ALPHA, **PRUNING)  # a PEFT folder does not say how to train on
    return adapter.params, adapter.method._replace(plan=own.plan, penalty=own.penalty)


def ours(case: Case, method: str, folder: Path, adapter: Path | None) -> Side:
    """This library's training, with the adapter of a PEFT folder."""
    quantize = "nf4" if method == "qlora" else None
    dtype = jnp.dtype(case.dtype)
    model = hub.load(folder, task(case), dtype=dtype, param_dtype=dtype, quantize=quantize)
    settings = Settings(
        steps=int(PRUNING["total"]), learning_rate=RATE, schedule="constant", warmup=0.0, weight_decay=0.0
    )
    params, how = carried(case, method, model, adapter)
    tx = make_optimizer(settings, int(PRUNING["total"]), how)
    state, frozen = start(how, params, tx)
    model, params = model._replace(params=None), None  # what trains is a copy by now
    frozen, _, whole = share([frozen])
    inner = make_step(loss_of(model, case.kind), how, tx)
    jitted = jax.jit(lambda state, frozen, batch, key: inner(state, whole(frozen), batch, key), donate_argnums=0)
    ids, labels = (jnp.asarray(x, jnp.int32) for x in numbers(case))
    ones = jnp.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": ones, "weight": jnp.ones(case.rows)}
    batch |= {"labels": labels} if case.kind == "classification" else {"loss_mask": ones}
    key = jax.random.key(0)
    began = time.perf_counter()
    traced = jitted.trace(state, frozen, batch, key)
    compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    held = [state]

    def step():
        held[0], metrics = compiled(held[0], frozen, batch, key)
        return metrics["loss"]

    def peak():
        plan: Any = compiled.memory_analysis()
        arguments = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
        return arguments + plan.temp_size_in_bytes

    trained, flops = count(state.trainable), count_flops(traced.jaxpr).total
    return Side(step, lambda: jax.block_until_ready(held[0]), trained, seconds, peak, flops)


# A cell


class Differs(ValueError):
    """The two sides do not compute the same."""


def first_losses(side: Side) -> tuple[list[float], list[float]]:
    """Of the checked steps, and the seconds of each."""
    losses, seconds = [], []
    for _ in range(CHECKED):
        began = time.perf_counter()
        losses.append(float(side.step()))
        side.wait()
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def why(e: BaseException) -> str:
    """The reason that a side has no numbers, in a line without the folder's name."""
    return re.sub(rf"{tempfile.gettempdir()}/\S+: ", "", " ".join(f"{type(e).__name__}: {e}".split()))[:300]


def both(case: Case, method: str, scale: str, folder: Path, wanted: tuple[str, ...] = SIDES) -> tuple[dict, dict]:
    """The sides of a cell that work, after the checked steps, and what is to be recorded of all of them.

    Raises:
      Differs: unequal numbers of trained values, or losses that do not agree.
    """
    sides: dict[str, Side] = {}
    record: dict[str, Any] = {"sides": {}, "losses": {}, "trained": {}}
    with tempfile.TemporaryDirectory() as at:
        adapter: Path | None = Path(at)
        try:
            if method != "full":
                model = adapted(case, method, folder, scale)
                model.save_pretrained(adapter)
                del model
            sides["ours"] = ours(case, method, folder, adapter)
        except ValueError as e:
            if method != "prefix":
                raise
            record["sides"] |= {name: {"why": why(e)} for name in ("eager", "compiled")}
            sides["ours"] = ours(case, method, folder, None)
    for name in wanted:
        if name in record["sides"]:
            continue
        try:
            if name not in sides:
                sides[name] = theirs(case, method, folder, scale, compiled=name == "compiled")
            losses, seconds = first_losses(sides[name])
        except Exception as e:  # whatever torch's compiler, bitsandbytes or memory makes of it
            if name == "ours":
                raise
            sides.pop(name, None)
            record["sides"][name] = {"why": why(e)}
            continue
        side = sides[name]
        compiling = side.compile_seconds
        if name == "compiled":
            compiling = max(seconds) - min(seconds)
        record["sides"][name] = {"compile_seconds": compiling}
        record["losses"][name] = losses
        record["trained"][name] = side.trained
    record["counted_flops"] = sides["ours"].flops
    check(record, TOLERANCE[scale, case.dtype])
    return sides, record


def check(record: dict, tolerance: float) -> None:
    """Raises where the sides do not compute the same."""
    trained, losses = record["trained"], record["losses"]
    if len(set(trained.values())) > 1:
        raise Differs(f"the sides train different numbers of values: {trained}")
    for name, each in losses.items():
        gaps = [abs(a - b) / abs(b) for a, b in zip(each, losses["ours"], strict=True)]
        if not max(gaps) <= tolerance:
            raise Differs(f"the losses differ by up to {max(gaps):.1e}: ours {losses['ours']}, {name} {each}")


def take_turns(sides: dict[str, Side], repeats: int, turn: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a step of each side in every turn, the sides one after another."""
    steps, seconds = {}, {name: [] for name in sides}
    for name, side in sides.items():
        steps[name] = max(1, round(turn / timed(side, 1, clock)))
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(timed(side, steps[name], clock))
    return seconds


def timed(side: Side, steps: int, clock: Callable[[], float]) -> float:
    """Seconds a step."""
    side.wait()
    time.sleep(0.02)  # threads of the other side stop spinning
    began = clock()
    for _ in range(steps):
        side.step()
    side.wait()
    return (clock() - began) / steps


def rates(dtype: str, scale: str, clock: Callable[[], float]) -> dict[str, float]:
    """FLOPs a second of a product of large matrices through XLA and through torch, medians of turns."""
    n, steps = (8192, 20) if scale == "gpu" else (2048, 1)
    x = torch.randn(n, n, device=on(scale)).to(getattr(torch, dtype))
    y = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32), dtype)
    product = jax.jit(lambda a: a @ a)
    wait = torch.cuda.synchronize if scale == "gpu" else lambda: None

    def side(f, wait):
        return Side(f, wait, 0, None, lambda: 0)

    pair = {
        "xla": side(lambda: product(y), lambda: jax.block_until_ready(product(y))),
        "torch": side(lambda: x @ x, wait),
    }
    for each in pair.values():
        timed(each, 2, clock)
    seconds = {name: [] for name in pair}
    for _ in range(5):
        for name, each in pair.items():
            extra = 1 if name == "xla" else 0  # `wait` runs one more
            seconds[name].append(timed(each, steps, clock) * steps / (steps + extra))
    return {name: 2 * n**3 / statistics.median(each) for name, each in seconds.items()}


def model_flops(case: Case, method: str) -> float:
    """Of a step: forward, backward to activations, and to the weights where all of them train."""
    model = hub.from_config(case.config(), task(case), seed=None)
    return (3 if method == "full" else 2) * costs.analytic(model, case.rows, case.length)


def measure(
    case: Case,
    method: str,
    scale: str,
    folder: Path,
    wanted: tuple[str, ...],
    repeats: int,
    turn: float,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """The record of a cell."""
    flops = model_flops(case, method)
    sides, record = both(case, method, scale, folder, wanted)
    for name, each in take_turns(sides, repeats, turn, clock).items():
        record["sides"][name] |= {"seconds": each}
    for name, side in sides.items():
        record["sides"][name]["peak_bytes"] = side.peak()
    if scale == "gpu":
        record["sides"]["ours"]["allocated_bytes"] = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return record | {"flops": flops, "rate": rates(case.dtype, scale, clock)}


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "torch", "peft", "transformers", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def device(scale: str) -> str:
    if scale == "gpu":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    return f"{model}, {os.cpu_count()} cores"


def cell(options: Options, name: str, method: str, folder: Path, repeats: int) -> dict:
    """The record of a cell, run in this process; why there is none, if it fails."""
    scale, case = options.scale, CASES[options.scale][name]
    wanted = SIDES if method in options.compiled else SIDES[:2]
    key = {"case": name, "method": method, "scale": scale, "dtype": case.dtype}
    load = os.getloadavg()[0]
    if options.threads is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])  # XLA's pool is of that size
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if options.allocator == "kept":
        keep_memory()
    try:
        if scale == "gpu":
            torch.set_float32_matmul_precision("high")
            jax.config.update("jax_default_matmul_precision", "tensorfloat32")
            if jax.default_backend() != "gpu":
                raise RuntimeError(f"JAX computes on {jax.default_backend()}; --scale gpu needs a GPU for both sides")
        with tempfile.TemporaryDirectory() as cache:  # nothing compiled before is used again
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            found = measure(case, method, scale, folder, wanted, repeats, options.turn, clock)
    except Exception as e:
        traceback.print_exc()
        found = {"why": why(e)}
    facts = {
        "device": device(scale),
        "versions": versions(),
        "threads": {"torch": torch.get_num_threads(), "xla": len(os.sched_getaffinity(0))},
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "rows": case.rows,
        "length": case.length,
    }
    return key | facts | found


# All cells


def apart(function: Callable, *arguments, limit: float = 600.0) -> Any:
    """What a function gives, computed in a process of its own; None where it dies or takes too long.

    The process is a fork of this one, which has imported everything and computed nothing; a fresh one where an import
    (bitsandbytes') has started CUDA.
    """
    context: Any = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="os.fork")  # no thread has been started yet
        process.start()
    sender.close()
    found = None
    if receiver.poll(limit):
        with contextlib.suppress(EOFError):
            found = receiver.recv()
    process.terminate()
    process.join()
    return found


def _send(sender: Any, function: Callable, arguments: tuple) -> None:
    sender.send(function(*arguments))


def main(options: Options) -> None:
    """Runs what is missing, and writes report and plot."""
    known = CASES[options.scale]
    cases, began = options.cases or tuple(known), time.perf_counter()
    if unknown := [c for c in cases if c not in known] + [m for m in options.methods if m not in METHODS]:
        raise ValueError(f"there is no {unknown[0]!r}; cases are {', '.join(known)}, methods {', '.join(METHODS)}")
    stem = options.scale if options.threads is None else f"{options.scale}-{options.threads}"
    stem += "" if options.allocator == "kept" else f"-{options.allocator}"
    file = options.out / f"{stem}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [(c, m) for m in FIRST for c in cases if m in options.methods and m in known[c].methods]
    with tempfile.TemporaryDirectory() as at:
        for name, method in cells:
            begun = time.perf_counter()
            if done(file, name, method, options) or begun - began > 60 * options.minutes:
                continue
            folder = Path(at) / name
            if not folder.exists():
                apart(write, known[name], options.scale, folder)
            record = apart(cell, options, name, method, folder, options.repeats)
            record = record or {"case": name, "method": method, "scale": options.scale, "why": "the process died"}
            records = [r for r in read(file) if (r["case"], r["method"]) != (name, method)]
            file.write_text("".join(json.dumps(r) + "\n" for r in [*records, record]))
            print(f"{name} {method}: {said(record)} ({time.perf_counter() - begun:.0f} s)", flush=True)
    records = sorted(read(file), key=lambda r: list(known).index(r["case"]))
    (options.out / f"{stem}.md").write_text(report(records, options, stem))
    plot(records, options.out / f"{stem}.png")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def done(file: Path, case: str, method: str, options: Options) -> bool:
    """Whether a cell has its numbers, or its reason, and was not taken beside too much else."""
    found = next((r for r in read(file) if (r["case"], r["method"]) == (case, method)), None)
    return found is not None and "why" not in found and max(found["load"]) <= options.most_load


def ratios(record: dict, side: str) -> tuple[float, float, float] | None:
    """Quartiles over turns of a side's seconds over ours: above 1, ours is the faster one."""
    of = record.get("sides", {})
    if "seconds" not in of.get(side, {}) or "seconds" not in of.get("ours", {}):
        return None
    each = [a / b for a, b in zip(of[side]["seconds"], of["ours"]["seconds"], strict=True)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high


def said(record: dict) -> str:
    if "why" in record:
        return record["why"]
    parts = []
    for side in SIDES[1:]:
        found = ratios(record, side)
        reason = record["sides"].get(side, {}).get("why", "not run")
        parts.append(f"{side} / ours {found[1]:.2f}" if found else f"{side}: {reason[:80]}")
    return ", ".join(parts)


CLOCK = "Seconds are those of the process on the CPU: other programs ran beside it."
COLUMNS = [
    *("method", "trained", "ours tok/s", "eager tok/s", "compiled tok/s", "eager / ours", "compiled / ours"),
    *("use ours", "use eager", "peak MB ours", "eager", "compiled", "compile s ours", "torch", "losses agree to"),
]


def row(r: dict) -> list[str]:
    """A line of the table."""
    sides, tokens, rate = r["sides"], r["rows"] * r["length"], max(r["rate"].values())

    def seconds(side):
        return statistics.median(sides[side]["seconds"]) if "seconds" in sides.get(side, {}) else None

    def put(value, form, scale=1.0):
        return "-" if value is None else format(value * scale, form)

    def per(side, numerator):
        return None if (s := seconds(side)) is None else numerator / s

    def ratio(side):
        found = ratios(r, side)
        return "-" if found is None else f"**{found[1]:.2f}** ({found[0]:.2f}-{found[2]:.2f})"

    gaps = [
        abs(a - b) / abs(b)
        for name, each in r["losses"].items()
        for a, b in zip(each, r["losses"]["ours"], strict=True)
        if name != "ours"
    ]
    return [
        f"{r['method']}",
        f"{r['trained']['ours']:,}",
        *(put(per(side, tokens), ",.0f") for side in SIDES),
        *(ratio(side) for side in SIDES[1:]),
        *(put(per(side, r["flops"] / rate), ".0%") for side in SIDES[:2]),
        *(put(sides.get(side, {}).get("peak_bytes"), ",.0f", 1e-6) for side in SIDES),
        *(put(sides.get(side, {}).get("compile_seconds"), ".1f") for side in ("ours", "compiled")),
        put(max(gaps) if gaps else None, ".0e"),
    ]


def report(records: list[dict], options: Options, stem: str) -> str:
    """The results in Markdown."""
    good = [r for r in records if "why" not in r]
    flags = "" if options.threads is None else f" --threads {options.threads}"
    flags += "" if options.allocator == "kept" else f" --allocator {options.allocator}"
    lines = [
        "# A training step here and in Hugging Face PEFT",
        "",
        f"`python experiments/speed.py --scale {options.scale}{flags}`; the script says what is compared and how. "
        "Ratios are medians over turns of seconds over ours, quartiles in brackets: above 1, ours is the faster one. "
        "'use': share of the measured rate of matrix products. Peaks: of ours XLA's plan, of theirs the allocator's. "
        f"'torch': what `torch.compile` took. {CLOCK if options.threads == 1 else ''}".strip(),
        "",
    ]
    for facts in dict.fromkeys(
        f"- {r['device']}; {', '.join(f'{k} {v}' for k, v in r['versions'].items())}; threads: "
        f"{', '.join(f'{k} {v}' for k, v in r['threads'].items())}"
        for r in good
    ):
        lines.append(facts)
    for name in dict.fromkeys(r["case"] for r in records):
        mine = sorted(
            (r for r in records if r["case"] == name),
            key=lambda r: METHODS.index(r["method"]),
        )
        shown = [r for r in mine if "why" not in r]
        if shown:
            r = shown[0]
            fastest = {k: statistics.median(x["rate"][k] for x in shown) / 1e9 for k in r["rate"]}
            loads = [max(x["load"]) for x in shown]
            lines += [
                "",
                f"## {name}: {r['rows']} x {r['length']} tokens, {r['dtype']}",
                "",
                f"Products of large matrices: XLA {fastest['xla']:,.0f} GFLOP/s, torch {fastest['torch']:,.0f}. "
                f"Load of the machine, this process included: {min(loads):.1f} to {max(loads):.1f}.",
                "",
                f"| {' | '.join(COLUMNS)} |",
                f"|---|{'---:|' * (len(COLUMNS) - 1)}",
                *(f"| {' | '.join(row(x))} |" for x in shown),
            ]
        reasons = [f"- {r['method']}: {r['why']}" for r in mine if "why" in r]
        reasons += [
            f"- {r['method']}, {side}: {s['why']}" for r in shown for side, s in r["sides"].items() if "why" in s
        ]
        lines += ["", *reasons] if reasons else []
    return "\n".join([*lines, "", f"![ratios]({stem}.png)"]) + "\n"


def plot(records: list[dict], file: Path) -> None:
    """The ratios with their quartiles, a panel a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    good = [r for r in records if "why" not in r]
    names = list(dict.fromkeys(r["case"] for r in good))
    if not names:
        return
    shape = {"figsize": (4 * len(names), 4), "sharey": True, "squeeze": False}
    fig, axes = plt.subplots(1, len(names), layout="constrained", **shape)
    for ax, name in zip(axes[0], names, strict=True):
        mine = sorted((r for r in good if r["case"] == name), key=lambda r: METHODS.index(r["method"]))
        for i, side in enumerate(SIDES[1:]):
            for x, r in enumerate(mine):
                if (found := ratios(r, side)) is not None:
                    low, middle, high = found
                    spread = [[max(0.0, middle - low)], [max(0.0, high - middle)]]
                    ax.bar(x + 0.4 * i - 0.2, middle, 0.38, yerr=spread, color=f"C{i}", capsize=2)
        ax.axhline(1.0, color="0.4", linewidth=1)
        ax.set_xticks(range(len(mine)), [r["method"] for r in mine], rotation=45, ha="right")
        ax.set_title(name, fontsize=10)
    axes[0][0].set_ylabel("PEFT's seconds / ours")
    colours = [Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(2)]
    axes[0][0].legend(colours, SIDES[1:], frameon=False, fontsize=8)
    fig.savefig(file, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    main(tyro.cli(Options))
