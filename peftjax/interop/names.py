"""What Hugging Face PEFT calls the places of a model, and which of them an adapter's configuration means."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..hub import Model
from ..tree import flatten, nearest, patterns
from ..weights import is_node

TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "classification": "SEQ_CLS",
    "none": "FEATURE_EXTRACTION",
}


class Module(NamedTuple):
    """A module that holds parameters.

    Attributes:
      name: in transformers' class, such as 'model.layers.0.self_attn.q_proj'.
      kind: 'linear', 'embedding' or 'norm', by what it holds; '' for others.
      paths: 'weight' and 'bias' -> the path here.
    """

    name: str
    kind: str
    paths: Mapping[str, str]

    @property
    def path(self) -> str:
        """Of the weight."""
        return self.paths["weight"]


KINDS = {"kernel": "linear", "embedding": "embedding", "scale": "norm"}


def modules(model: Model) -> dict[str, Module]:
    """Every module of the model by its name in transformers."""
    found: dict[str, dict[str, str]] = {}
    bare = model.module.head in model.family.bare
    for path in flatten(model.params, is_leaf=is_node):
        tensor = model.family.tensor(path)
        tensor = tensor.removeprefix(model.family.base + ".") if bare else tensor
        name, _, leaf = tensor.rpartition(".")
        found.setdefault(name, {})[leaf] = path
    out = {}
    for name, paths in found.items():
        kind = KINDS.get(paths.get("weight", "").rpartition("/")[2], "")
        out[name] = Module(name, kind, paths)
    return out


def in_order(model: Model, path: str, x: Any) -> Any:
    """A vector or matrix along the outputs of a linear layer, in this library's order of a fused product's columns."""
    order = _order(model, path)
    return x if order is None else x[..., order]


def in_file_order(model: Model, path: str, x: Any) -> Any:
    """The inverse of `in_order`."""
    order = _order(model, path)
    return x if order is None else x[..., np.argsort(order)]


def is_reordered(model: Model, path: str) -> bool:
    """Whether the columns stand in another order here than in the file."""
    return _order(model, path) is not None


def _order(model: Model, path: str) -> Any:
    order = getattr(model.family, "order", None)
    return None if order is None else order(model.config, path)


def from_file(model: Model, path: str, x: np.ndarray) -> np.ndarray:
    """A base parameter as Hugging Face's files have it -> as the tree has it."""
    return in_order(model, path, x.T if model.family.transposed(path) else x)


def to_file(model: Model, path: str, x: np.ndarray) -> np.ndarray:
    """The inverse of `from_file`."""
    x = in_file_order(model, path, x)
    return np.ascontiguousarray(x.T if model.family.transposed(path) else x)


def targets(model: Model, config: Mapping[str, Any], kinds: Iterable[str]) -> list[Module]:
    """The modules of these kinds that a configuration targets, by PEFT's rules.

    Raises:
      ValueError: `target_modules` is missing, or targets nothing.
    """
    wanted = config.get("target_modules")
    there = [m for m in modules(model).values() if m.kind in kinds]
    if wanted is None:
        raise ValueError("the configuration has no target_modules; expected a list of names, a pattern or 'all-linear'")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        heads = ("lm_head", "embed_out", "score", "classifier")
        chosen = [m for m in there if m.kind == "linear" and m.name not in heads]
        chosen = [m for m in chosen if not _excluded(config, m.name)]
    else:
        chosen = [m for m in there if not _excluded(config, m.name) and _targeted(config, wanted, m.name)]
    if not chosen:
        near = nearest(wanted if isinstance(wanted, str) else " ".join(wanted), [m.name for m in there])
        raise ValueError(f"target_modules {wanted!r} matches none of the model's modules; the nearest are {near}")
    return chosen


def _excluded(config: Mapping[str, Any], name: str) -> bool:
    exclude = config.get("exclude_modules")
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else ends_with(name, exclude)):
        return True
    return any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ())


def _targeted(config: Mapping[str, Any], wanted: str | list[str], name: str) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if not ends_with(name, wanted):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    layers = [layers] if isinstance(layers, int) else layers
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    matched = [re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name) for p in patterns] or [
        re.match(r".*?\.[^.]*\.(\d+)\.", name)
    ]
    index = next((int(m[1]) for m in matched if m), None)
    return index in layers


def ends_with(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name is one of these, or ends in one after a dot."""
    return any(name == s or name.endswith(f".{s}") for s in suffixes)


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What PEFT's rank_pattern or alpha_pattern says of a module: the first key that is its name's end."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", name)), default)


def under(model: Model, entries: Iterable[str]) -> dict[str, list[Module]]:
    """The modules that `modules_to_save` means: entry -> those whose name, or a parent's, ends in it."""
    out: dict[str, list[Module]] = {}
    for m in modules(model).values():
        parts = m.name.split(".")
        parents = [".".join(parts[: i + 1]) for i in range(len(parts))]
        for entry in entries:
            if any(p.endswith(entry) for p in parents):
                out.setdefault(entry, []).append(m)
                break
    return out


def shortest(chosen: list[Module], there: Iterable[Module]) -> list[str]:
    """The fewest last parts of names that, as `target_modules`, mean these modules and no others of `there`."""
    names, others = {m.name for m in chosen}, {m.name for m in there} - {m.name for m in chosen}
    out = set()
    for name in names:
        parts = name.split(".")
        ends = [".".join(parts[-i:]) for i in range(1, len(parts) + 1)]
        out.add(next(e for e in ends if not any(ends_with(o, [e]) for o in others)))
    return sorted(out)


def spec_targets(model: Model, paths: Iterable[str]) -> list[str]:
    """Patterns, over all layers where they fit, that mean these paths and no others of the model."""
    return patterns(paths, flatten(model.params, is_leaf=is_node))


def array(x: Any) -> np.ndarray:
    """On the host; bfloat16 stays."""
    return np.asarray(jax.device_get(x))
