"""Hugging Face PEFT folders: `adapter_config.json` and `adapter_model.safetensors`, read and written."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..checkpoint import Adapter, write_atomically
from ..hub import Model
from ..layout import unstack_layers
from ..methods import Method, chain
from ..methods.ia3 import IA3
from ..methods.neftune import Noise
from ..tree import Tree, flatten, nearest, update
from ..weights import Blocks, Trained, compact, data_fields, is_node, is_quantized, static_fields
from . import low_rank, selective, virtual
from .base import STEM, Format, Reader, Writer, Written
from .names import TASK_TYPES, array, modules, to_file

FORMATS: dict[str, Format] = {
    "LORA": low_rank.LORA,
    "ADALORA": low_rank.ADALORA,
    "VERA": low_rank.VERA,
    "IA3": selective.IA3_FORMAT,
    "LN_TUNING": selective.NORMS,
    "TRAINABLE_TOKENS": selective.TOKENS,
    "PREFIX_TUNING": virtual.PREFIX,
    "PROMPT_TUNING": virtual.PROMPT,
    "P_TUNING": virtual.PROMPT,
}
KIND = {  # what a method here is there
    **dict.fromkeys(["lora", "lora_plus", "lora_fa", "dora", "pissa", "olora", "dylora"], "LORA"),
    **{"adalora": "ADALORA", "vera": "VERA", "ia3": "IA3", "norm_tuning": "LN_TUNING", "prefix": "PREFIX_TUNING"},
    **{"prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING", "trainable_tokens": "TRAINABLE_TOKENS"},
}
BESIDE = ("head", "full", "bitfit", "neftune", "trainable_tokens", "norm_tuning")  # what another may have with it
# Biases that PEFT writes a second time for a module that is saved whole, and its own reader leaves unread.
IDLE = re.compile(r".*\.(modules_to_save|original_module)\.bias")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Fields that change nothing about the function of a trained adapter.
NEUTRAL = frozenset(
    [
        *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "megatron_core", "qalora_group_size", "runtime_config", "fan_in_fan_out", "eva_config"),
        *("init_ia3_weights", "init_weights", "loftq_config"),
    ]
)


SIZES = ("r", "init_r", "target_r", "num_virtual_tokens")
PATTERNS = ("rank_pattern", "alpha_pattern")
NEEDED = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "target_r", "lora_alpha"),
    "VERA": ("r",),
    "TRAINABLE_TOKENS": ("token_indices",),
    **dict.fromkeys(["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"], ("num_virtual_tokens",)),
}


def load_peft(folder: str | Path, model: Model, revision: str | None = None) -> Adapter:
    """Puts an adapter of Hugging Face PEFT, a folder or a hub name, into the base that it was trained on.

    The adapter trains on, merges and saves like one made here. Its header keeps the folder's configuration, so that
    `save_peft` writes it again as it was.

    Raises:
      FileNotFoundError: there is no such folder, or a file is not in it.
      ValueError: an unknown `peft_type`; a field of the configuration that changes the result and is not honoured; a
        tensor that is missing, of another shape, or taken by nothing; weights that are a pickle.
    """
    path = find_folder(folder, revision)
    config = read_config(path)
    tensors, copies, idle = load_tensors(path / WEIGHTS), [], {}
    narrow: dict[str, list[str]] = {}
    for name, x in tensors.items():
        if is_narrow(x):
            narrow.setdefault(x.dtype.name, []).append(name)
    for name in [n for n in tensors if IDLE.fullmatch(n)]:
        idle[name] = tensors.pop(name).tolist()
    try:
        params, method = read(model, config, tensors, copies)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from e
    source = {"config": config, "copies": copies, "idle": idle, "narrow": narrow}
    return Adapter(params, method, {"extra": {"peft": source}})


def read(
    model: Model, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], copies: list
) -> tuple[Tree, Method]:
    """The adapted parameters and the method that a configuration and its tensors say.

    Tensors in float16 and bfloat16 are widened to float32, as PEFT does: sums and training need it.

    Args:
      copies: gets the names of tensors that are the base's own.

    Raises:
      ValueError: as `load_peft` does.
    """
    form = format_of(config)
    _check_fields(config, form)
    _check_values(config)
    stem = "base_model." if form.virtual else STEM
    wide = {name: x.astype(np.float32) if is_narrow(x) else x for name, x in tensors.items()}
    r = Reader(model, _with_head(config, tensors, stem), wide)
    nodes, methods = form.read(r)
    for name in [n for n in r.tensors if n.endswith(".base_layer.weight")]:
        copies.append(name)
        del r.tensors[name]
    whole, others = selective.read_whole(r, stem)
    problems = [("missing", r.missing), ("of a wrong shape", r.wrong), ("taken by nothing", r.tensors)]
    if any(rows for _, rows in problems):
        said = "; ".join(f"{what}: {', '.join(sorted(rows))}" for what, rows in problems if rows)
        near = (
            f"; the model's modules are such as {nearest(next(iter(r.tensors)), modules(model))}" if r.tensors else ""
        )
        raise ValueError(f"the tensors do not fit {model.hf_config.architectures[0]}: {said}{near}")
    methods = [*methods, *others]
    return update(model.params, {**nodes, **whole}), chain(*methods) if len(methods) > 1 else methods[0]


def is_narrow(x: np.ndarray) -> bool:
    """Whether it is in float16, bfloat16 or less."""
    return jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4


def _with_head(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], stem: str) -> dict[str, Any]:
    """With a classifier's trained head in `modules_to_save`, where PEFT takes it to be; old files do not say so."""
    there, saved = ("classifier", "score"), [*(config.get("modules_to_save") or ())]
    heads = [e for e in there if e not in saved and any(name.startswith(f"{stem}{e}.") for name in tensors)]
    return dict(config) | ({"modules_to_save": saved + heads} if heads and config.get("task_type") == "SEQ_CLS" else {})


def format_of(config: Mapping[str, Any]) -> Format:
    """The format of a configuration's `peft_type`; an unknown one raises with the list."""
    kind = config.get("peft_type")
    if kind not in FORMATS:
        raise ValueError(f"the peft_type {kind!r} is not supported; supported are {sorted(FORMATS)}")
    return FORMATS[kind]


def _check_fields(config: Mapping[str, Any], form: Format) -> None:
    bad = {
        k: v for k, v in config.items() if k not in NEUTRAL and k not in form.fields and v not in (None, False, {}, [])
    }
    if (loftq := config.get("loftq_config")) and config.get("init_lora_weights") == "loftq":
        bad["loftq_config"] = loftq
    if bad:
        said = ", ".join(f"{k}={v!r}" for k, v in sorted(bad.items()))
        raise ValueError(
            f"the configuration has fields that change the result and are not supported for {config['peft_type']}: "
            f"{said}"
        )


def _is_pattern(x: Any) -> bool:
    try:
        return isinstance(x, str) and re.compile(x) is not None
    except re.error:
        return False


def _is_whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _is_list(x: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(map(kind, x))


def _is_name(x: Any) -> bool:
    return isinstance(x, str)


# what is expected, of which fields, and whether a value is that
VALUES: tuple[tuple[str, tuple[str, ...], Callable[[Any], bool]], ...] = (
    ("a whole number of at least 1", SIZES, lambda x: _is_whole(x) and x >= 1),
    ("a number", ("lora_alpha", "lora_dropout"), lambda x: isinstance(x, int | float) and not isinstance(x, bool)),
    (
        "a list of names, or a pattern",
        ("target_modules", "exclude_modules", "feedforward_modules"),
        lambda x: _is_pattern(x) or _is_list(x, _is_name),
    ),
    ("a list of names", ("modules_to_save",), lambda x: _is_list(x, _is_name)),
    ("a list of whole numbers", ("token_indices",), lambda x: _is_list(x, _is_whole)),
    ("whole numbers", ("layers_to_transform",), lambda x: _is_whole(x) or _is_list(x, _is_whole)),
    ("names or patterns with values", PATTERNS, lambda x: isinstance(x, Mapping) and all(map(_is_pattern, x))),
    ("'none', 'all', 'lora_only' or 'vera_only'", ("bias",), lambda x: x in ("none", "all", "lora_only", "vera_only")),
)


def _check_values(config: Mapping[str, Any]) -> None:
    """Raises where a field that is needed is missing, or has no value that could be meant."""
    needed = NEEDED.get(config["peft_type"], ())
    if missing := [k for k in needed if config.get(k) is None]:
        raise ValueError(f"the configuration lacks {missing}, which {config['peft_type']} needs")
    for expected, fields, fits in VALUES:
        for k in fields:
            if config.get(k) is not None and not fits(config[k]):
                raise ValueError(f"the configuration's {k} must be {expected}; got {config[k]!r}")


def find_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder itself, or the hub's snapshot of an adapter, downloaded if need be."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") != 1 or path.exists():
        raise FileNotFoundError(f"{name} is no folder; write the folder that holds {CONFIG}, or a hub name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=["adapter_*"]))
    except Exception as e:  # the hub's errors are many: no such name, gated, no network
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({type(e).__name__}: {e})"
        ) from e


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's configuration.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is no JSON object.
    """
    file = folder / CONFIG
    if not file.is_file():
        inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
        said = f"write one of its folders {inside}" if inside else "write the folder of an adapter that PEFT saved"
        raise FileNotFoundError(f"{folder} has no {CONFIG}; {said}")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{file} is no JSON: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds a {type(config).__name__}; expected an object of fields")
    return config


def load_tensors(file: Path, only_check: bool = False) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name; none, if it is only to be seen whether they can be read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: there are pickled weights in its stead, or it is truncated.
    """
    if not file.is_file():
        if pickles := sorted(p.name for p in file.parent.glob(f"{file.stem}.*")):
            raise ValueError(
                f"{file.parent} has weights only as {pickles}: a pickle can run any code when read, so it is refused; "
                "save it in PEFT again, which writes safetensors"
            )
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    try:
        with safe_open(file, framework="flax") as f:
            names = () if only_check else f.keys()
            return {k: np.asarray(f.get_tensor(k)) for k in names}
    except SafetensorError as e:
        raise ValueError(f"{file} is truncated or no safetensors file: {e}") from e


def save_peft(
    folder: str | Path,
    model: Model,
    method: Method,
    params: Tree,
    extra: Mapping[str, Any] | None = None,
    base: str = "",
) -> Path:
    """Writes an adapter as a folder that Hugging Face PEFT loads.

    Args:
      model: the base.
      params: adapted parameters, per-layer or stacked.
      extra: of the adapter's header: where it came from such a folder, its configuration is written again.
      base: what the configuration calls the base, a hub name or folder.

    Raises:
      ValueError: what the format cannot hold, by name; nothing is written then.
    """
    source = dict((extra or {}).get("peft") or {})
    written, config = write(model, method, params, source.get("config") or {})
    tensors = dict(written.tensors)
    there = {m.name: m for m in modules(model).values()}
    for name in source.get("copies") or ():
        m = there[name.removeprefix(STEM).removesuffix(".base_layer.weight")]
        tensors[name] = to_file(model, m.path, array(flatten(model.params)[m.path]))
    tensors |= {name: np.asarray(x, np.float32) for name, x in (source.get("idle") or {}).items()}
    for dtype, found in (source.get("narrow") or {}).items():  # as it came, unless it has trained on
        was = {name: tensors[name].astype(jnp.dtype(dtype)) for name in found if name in tensors}
        if all(np.array_equal(x.astype(np.float32), tensors[name]) for name, x in was.items()):
            tensors |= was
    if base and not config.get("base_model_name_or_path"):
        config["base_model_name_or_path"] = base
    folder = Path(folder)
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True))
    return folder


def write(model: Model, method: Method, params: Tree, source: Mapping[str, Any]) -> tuple[Written, dict[str, Any]]:
    """The tensors and the whole configuration of an adapter, read back and compared before anyone sees them."""
    params = _without_noise(compact(unstack_layers(method.resolve(params, None))))
    base = flatten(model.params, is_leaf=is_node)
    nodes = {p: n for p, n in flatten(params, is_leaf=is_node).items() if is_node(n) and n is not base.get(p)}
    nodes = {p: n for p, n in nodes.items() if not is_quantized(n)}  # what is left of a quantised base
    norms = {p for p in selective.norms(model) if isinstance(nodes.get(p), Trained)}
    kind = _kind(method, bool(norms))
    form, norms = FORMATS[kind], norms if kind == "LN_TUNING" else set()
    own = {p: n for p, n in nodes.items() if isinstance(n, form.nodes) or p in norms}
    trained = {p: n for p, n in nodes.items() if isinstance(n, Trained) and p not in own}
    rest = {p: n for p, n in nodes.items() if p not in own and p not in trained}
    _refuse(rest | own, kind)
    there = {m.path: m for m in modules(model).values() if "weight" in m.paths}
    w = Writer(model, method, own, there, source)
    written = form.write(w)
    own_biases = {"LORA": "lora_only", "ADALORA": "lora_only", "VERA": "vera_only"}  # as PEFT calls them
    stem = "base_model." if form.virtual else STEM
    targeted = [there[p].name for p in own if p in there]
    whole = selective.write_whole(w, trained, targeted, stem, own_biases.get(kind))
    written = Written({**written.config, **whole.config}, {**written.tensors, **whole.tensors})
    task = TASK_TYPES[model.module.head]
    if task == "SEQ_CLS" and not written.config.get("modules_to_save"):
        task = None  # else PEFT would look for a trained head
    config = {"peft_type": kind, "task_type": task, "inference_mode": True, **written.config}
    for candidate in [dict(source)] * bool(source) + [config]:
        try:
            again, _ = read(model, candidate, written.tensors, [])
        except ValueError:
            if candidate is config:
                raise
            continue
        if not (lost := _different(params, again)):
            return written, candidate
    raise ValueError(f"PEFT's {kind} cannot hold {lost[:5]} as they are; merge the adapter, or convert it to LoRA")


def _without_noise(tree: Tree) -> Tree:
    """Without NEFTune's hooks, which act in training only."""
    return {k: _without_noise(v) if isinstance(v, Mapping) else v for k, v in tree.items() if not isinstance(v, Noise)}


def _kind(method: Method, norms: bool) -> str:
    """The `peft_type` of a method; arrays that train whole are norms, or stand beside another method."""
    found = [name for name, _ in method.spec]
    kinds = {KIND[name] for name in found if name in KIND and name not in BESIDE}
    if not kinds and {*found} <= {*BESIDE}:
        kinds = {"TRAINABLE_TOKENS"} if "trainable_tokens" in found else {"LN_TUNING"} if norms else set()
    strange = [name for name in found if name not in KIND and name not in BESIDE]
    if strange or len(kinds) != 1:
        raise ValueError(
            f"Hugging Face PEFT has no place for {'+'.join(found)}; a folder holds one of {sorted(KIND)}, with a head "
            "or whole modules beside it. What merges can be converted to LoRA, or saved merged"
        )
    return kinds.pop()


def _refuse(nodes: Mapping[str, Any], kind: str) -> None:
    """What no folder can hold: a part of a fused product, a node in a node, a node of another method."""
    for path, n in nodes.items():
        if isinstance(n, Blocks):
            raise ValueError(
                f"{path} is adapted in parts ({', '.join(n.blocks)}), and PEFT adapts a fused product as a whole; "
                "convert the adapter to LoRA first (peftjax combine)"
            )
        inner = [f for f in data_fields(n) if is_node(getattr(n, f)) and not is_quantized(getattr(n, f))]
        if inner or not isinstance(n, FORMATS[kind].nodes or Trained):
            raise ValueError(
                f"PEFT's {kind} has no place for the {type(n).__name__} at {path}; convert it to LoRA first "
                "(peftjax combine)"
            )


def _different(ours: Tree, again: Tree) -> list[str]:
    """The paths at which two adapted trees are not the same function."""
    a, b = (flatten(t, is_leaf=is_node) for t in (ours, again))
    return [p for p in {**a, **b} if p not in a or p not in b or not _same(a[p], b[p])]


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if is_node(x) and is_node(y):
        x, y = low_rank.plain(x), low_rank.plain(y)
        if isinstance(x, IA3) and isinstance(y, IA3):
            return np.array_equal(x.factors(), y.factors())
        if type(x) is not type(y):
            return False
        sx, sy = static_fields(x), static_fields(y)
        if abs(sx.get("scale", 0.0) - sy.get("scale", 0.0)) > 1e-6 * abs(sx.get("scale", 0.0)):
            return False
        skip = ("a0", "b0", "key", "unused")
        return all(f in skip or _same(getattr(x, f), getattr(y, f)) for f in data_fields(x))
    if is_node(x) or is_node(y) or isinstance(x, Mapping) or isinstance(y, Mapping) or x is None or y is None:
        return x is y
    return bool(jnp.array_equal(jax.device_get(x), jax.device_get(y)))
