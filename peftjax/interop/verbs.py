"""What the command line does with adapters of others: import, export, inspect."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from .. import hub
from ..checkpoint import Adapter, base_of, load_adapter, read_header, save_adapter
from .base import STEM
from .folder import CONFIG, WEIGHTS, find_folder, load_peft, load_tensors, read, read_config, save_peft
from .names import TASK_TYPES

HEAD = re.compile(r"(.*\.)?(score|classifier|classification_head)(\.out_proj)?\.weight")


def import_adapter(
    source: str | Path, model_name: str, out: str | Path, *, labels: int | None = None, alpha: float | None = None
) -> int:
    """Makes an adapter file of a PEFT folder, or of loralib's tensors; returns the file's size in bytes.

    Args:
      source: the folder, a hub name, or a safetensors file with loralib's names.
      model_name: the base that it was trained on.
      labels: of a classifier; default: as many as the trained head has.
      alpha: of loralib's LoRA, whose file does not hold it.

    Raises:
      FileNotFoundError, ValueError: as `load_peft` and `hub.load` do.
    """
    file = Path(source)
    if file.is_file():
        config, tensors = from_loralib(load_tensors(file), alpha)
    elif alpha is not None:
        raise ValueError(f"alpha is for loralib's files; {source} says its own")
    else:
        folder = find_folder(source)
        config, tensors = read_config(folder), load_tensors(folder / WEIGHTS)
    n = labels or next((len(x) for name, x in tensors.items() if HEAD.fullmatch(name) and "dense" not in name), None)
    task = {kind: task for task, kind in TASK_TYPES.items()}.get(str(config.get("task_type")))
    task = {"seq2seq-lm": "seq2seq", "none": "encoder"}.get(str(task), task)
    model = hub.load(model_name, task, labels=n if task == "classification" else None)
    if file.is_file():
        params, method = read(model, config, tensors, [])
        adapter = Adapter(params, method, {"extra": {}})
    else:
        adapter = load_peft(source, model)
    extra = {**adapter.header["extra"], **({} if n is None else {"num_labels": n})}
    return save_adapter(out, model, adapter.method, adapter.params, extra)


def from_loralib(
    tensors: Mapping[str, np.ndarray], alpha: float | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """loralib's tensors, `X.lora_A` (r, inputs) and `X.lora_B` (outputs, r), as PEFT's configuration and tensors.

    What is no factor is a module that trained whole, or a bias.

    Raises:
      ValueError: there are no factors, or no alpha is given.
    """
    factors = {n: x for n, x in tensors.items() if n.endswith((".lora_A", ".lora_B"))}
    if not any(n.endswith(".lora_A") for n in factors):
        raise ValueError(
            f"no tensor ends in .lora_A; the file holds {sorted(tensors)[:3]}. Write the folder of an adapter"
        )
    if alpha is None:
        raise ValueError("loralib's files do not say alpha; give it (--alpha), as the training script has it")
    rest = {n: x for n, x in tensors.items() if n not in factors}
    biases = {n for n in rest if n.endswith(".bias") and f"{n.removesuffix('.bias')}.weight" not in rest}
    whole = {n: x for n, x in rest.items() if n not in biases}
    ranks = {n.rpartition(".")[0]: x.shape[0] for n, x in factors.items() if n.endswith("_A")}
    rank = max(set(ranks.values()), key=[*ranks.values()].count)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if any(map(HEAD.fullmatch, whole)) else "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "target_modules": sorted(ranks),
        "bias": "all" if biases else "none",
        "modules_to_save": sorted({n.rpartition(".")[0] for n in whole}),
    }
    renamed = {f"{STEM}{n}.weight": x for n, x in factors.items()} | {f"{STEM}{n}": x for n, x in rest.items()}
    return config, renamed


def export_adapter(file: str | Path, model_name: str, out: str | Path) -> Path:
    """Writes an adapter file as a PEFT folder.

    Raises:
      ValueError: the folder holds an adapter already; as `save_peft` and `load_adapter` do.
    """
    if Path(out).is_file():
        raise ValueError(f"{out} is a file; write a new folder as --out")
    if (Path(out) / CONFIG).exists():
        raise ValueError(f"{out} holds an adapter already; choose another --out, or remove that folder")
    header = read_header(file)
    model = base_of(header, model_name)
    adapter = load_adapter(file, model)
    return save_peft(out, model, adapter.method, adapter.params, adapter.header["extra"], base=model_name)


class Line(NamedTuple):
    """Tensors of one name in all layers."""

    name: str
    count: int
    shape: tuple[int, ...]
    dtype: str


def inspect(source: str | Path) -> tuple[dict[str, str], list[Line]]:
    """What an adapter is, as words, and its tensors, those of all layers together; the base is not needed.

    Args:
      source: an adapter file, a PEFT folder, or a hub name.

    Raises:
      FileNotFoundError, ValueError: there is no such adapter, or it cannot be read.
    """
    file = Path(source)
    if file.is_file():
        header = read_header(file)
        facts = {
            "method": " + ".join(f"{name}({_said(arguments)})" for name, arguments in header["spec"]),
            "base": f"{header['base']['architecture']}, fingerprint {header['base']['fingerprint']}",
            "virtual tokens": str(header["virtual_tokens"]) if header["virtual_tokens"] else "",
            "quantised base": header["base"].get("quantized") or "",
        }
    else:
        folder = find_folder(source)
        config = read_config(folder)
        file = folder / WEIGHTS
        said = {k: v for k, v in config.items() if k not in ("peft_type", "task_type", "base_model_name_or_path")}
        facts = {
            "method": f"{config.get('peft_type')} of Hugging Face PEFT ({_said(said)})",
            "base": str(config.get("base_model_name_or_path")),
            "task": str(config.get("task_type")),
        }
    lines = _lines(file)
    total = sum(line.count * int(np.prod(line.shape)) for line in lines)
    return {k: v for k, v in {**facts, "values": f"{total:,}"}.items() if v}, lines


def _said(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items() if v not in (None, False, {}, [], "none"))


def _lines(file: Path) -> list[Line]:
    load_tensors(file, only_check=True)
    seen: dict[tuple, int] = {}
    with safe_open(file, framework="numpy") as f:
        for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
            piece = f.get_slice(name)
            general = re.sub(r"(?<=[._])\d+(?=[./])", "*", name)
            key = (general, tuple(piece.get_shape()), piece.get_dtype())
            seen[key] = seen.get(key, 0) + 1
    return [Line(name, n, shape, dtype) for (name, shape, dtype), n in sorted(seen.items())]
