"""IA3, LN_TUNING and TRAINABLE_TOKENS folders, and what any folder may hold whole: modules and biases."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..hub import Model
from ..methods import Method, full, head, ia3, norm_tuning
from ..methods.ia3 import IA3
from ..methods.trainable_tokens import Tokens
from ..tree import flatten
from ..weights import Trained, is_node
from . import names
from .base import STEM, Format, Reader, Writer, Written, contiguous
from .low_rank import TARGETS, input_table, read_tokens, write_rows
from .names import Module, ends_with, modules, spec_targets, under

# IA3


def read_ia3(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """PEFT's vector is (outputs, 1), or (1, inputs) at a feed-forward module, whose input it multiplies."""
    nodes: dict[str, Any] = {}
    chosen = r.targets("linear")
    for m in chosen:
        inputs, outputs = r.weight(m).shape
        name, parent = f"{STEM}{m.name}.ia3_l", m.path.rpartition("/")[0]
        if _is_feedforward(r.config.get("feedforward_modules") or [], m.name):
            x = jnp.asarray(r.take(name, (1, inputs))[0])
            nodes[f"{parent}/input"] = IA3(x, ((0, inputs),), "input", inputs)
        else:
            x = r.outputs(m, r.take(name, (outputs, 1))[:, 0])
            nodes[f"{parent}/output"] = IA3(x, ((0, outputs),), "output", outputs)
    return nodes, [ia3(spec_targets(r.model, [m.path for m in chosen]))]


def _is_feedforward(wanted: str | list[str], name: str) -> bool:
    return bool(re.fullmatch(wanted, name)) if isinstance(wanted, str) else any(name.endswith(t) for t in wanted)


def write_ia3(w: Writer) -> Written:
    """A factor that acts on some columns of a fused product is written with ones for the others."""
    tensors, sides = {}, {}
    for path, n in w.nodes.items():
        parent, _, side = path.rpartition("/")
        m = w.modules[f"{parent}/kernel"]
        if m.name in sides:
            raise ValueError(f"PEFT's IA3 acts on the input or the output of a module; {m.name} has both")
        sides[m.name] = side
        x = contiguous(n.factors())
        tensors[f"{STEM}{m.name}.ia3_l"] = x[None] if side == "input" else w.outputs(m, x)[:, None]
    linear = [m for m in w.modules.values() if m.kind == "linear"]
    inside = [m for m in linear if sides.get(m.name) == "input"]
    config = w.target_fields([m for m in linear if m.name in sides], ("linear",))
    return Written({**config, "feedforward_modules": names.shortest(inside, linear) if inside else []}, tensors)


# Norms


def read_norms(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    chosen = r.targets("norm")
    nodes = {
        path: Trained(r.whole(f"{STEM}{m.name}.ln_tuning_layers.{leaf}", path))
        for m in chosen
        for leaf, path in m.paths.items()
    }
    return nodes, [norm_tuning() if len(nodes) == len(norms(r.model)) else full(spec_targets(r.model, nodes))]


def norms(model: Model) -> list[str]:
    """The paths of all parameters of norms."""
    return [p for m in modules(model).values() if m.kind == "norm" for p in m.paths.values()]


def write_norms(w: Writer) -> Written:
    tensors, chosen = {}, []
    for m in modules(w.model).values():
        there = [leaf for leaf, path in m.paths.items() if path in w.nodes]
        if there and len(there) < len(m.paths):
            raise ValueError(f"PEFT trains norms whole; of {m.name} only {there} trains")
        for leaf in there:
            path = m.paths[leaf]
            x = names.to_file(w.model, path, names.array(w.nodes[path].value))
            tensors[f"{STEM}{m.name}.ln_tuning_layers.{leaf}"] = x
        chosen += [m] if there else []
    return Written({"target_modules": names.shortest(chosen, modules(w.model).values())}, tensors)


# Tokens


def read_trained_tokens(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """The rows of what is tied to the table stand in the file once more."""
    table = input_table(r)
    wanted = r.config.get("target_modules")
    if wanted is not None and not (
        re.fullmatch(wanted, table.name) if isinstance(wanted, str) else ends_with(table.name, wanted)
    ):
        raise ValueError(f"target_modules {wanted!r} of TRAINABLE_TOKENS is not supported; only {table.name!r}")
    name = f"{STEM}{table.name}.trainable_tokens_delta"
    for twin in _twins(r.model, table):
        x = r.tensors.pop(f"{STEM}{twin}.trainable_tokens_delta", None)
        if x is not None and name in r.tensors and not np.array_equal(x, r.tensors[name]):
            raise ValueError(f"the rows of {twin} differ from those of the table that it is tied to")
    return read_tokens(r, table, r.config["token_indices"], name)


def _twins(model: Model, table: Module) -> list[str]:
    """The modules whose weight is the table too: the head, and the embeddings of an encoder and its decoder."""
    at = table.name.rpartition("shared")[0]
    both = [f"{at}encoder.embed_tokens", f"{at}decoder.embed_tokens"] if model.family.start_id is not None else []
    return [*both, *(["lm_head"] if any(s.tied and s.path == table.path for s in model.sites) else [])]


def write_trained_tokens(w: Writer) -> Written:
    (path,) = w.nodes
    m = w.modules[path]
    order, rows = write_rows(w, path, w.source.get("token_indices"))
    tensors = {f"{STEM}{name}.trainable_tokens_delta": rows for name in (m.name, *_twins(w.model, m))}
    return Written({"token_indices": order, "target_modules": [m.name.rpartition(".")[2]]}, tensors)


# Whole modules and biases, in any folder


def read_whole(r: Reader, stem: str) -> tuple[dict[str, Any], list[Method]]:
    """What `modules_to_save` and `bias` say is in the file.

    Raises:
      ValueError: a name that no module has, or the table that is tied to the head: PEFT would untie it.
    """
    entries = [*dict.fromkeys(r.config.get("modules_to_save") or ())]
    found = under(r.model, entries)
    if lost := [e for e in entries if e not in found and e not in ("classifier", "score")]:
        raise ValueError(f"modules_to_save names {lost}, but the model has no such module")
    tied = [s.path for s in r.model.sites if s.tied]
    nodes: dict[str, Any] = {}
    for m in (m for some in found.values() for m in some):
        if m.paths.get("weight") in tied:
            raise ValueError(
                f"modules_to_save holds {m.name}, which is tied to the head; PEFT trains a copy of it and leaves the "
                "head, which one table cannot say. Untie the base first (tie_word_embeddings=False)"
            )
        r.check_used(m)
        nodes |= {path: Trained(r.whole(f"{stem}{m.name}.{leaf}", path)) for leaf, path in m.paths.items()}
    if r.config.get("bias", "none") != "none":
        for m in modules(r.model).values():
            path = m.paths.get("bias")
            for name in (f"{stem}{m.name}.base_layer.bias", f"{stem}{m.name}.bias"):
                if path is not None and path not in nodes and name in r.tensors:
                    nodes[path] = Trained(r.whole(name, path))
    return nodes, _methods(r.model, nodes)


def _methods(model: Model, paths: dict[str, Any]) -> list[Method]:
    own = set(_heads(model))
    rest = [p for p in paths if p not in own or not own <= set(paths)]
    return [*([head()] if own and own <= set(paths) else []), *([full(spec_targets(model, rest))] if rest else [])]


def _heads(model: Model) -> list[str]:
    at = {s.module for s in model.sites if s.kind == "head"}
    return [p for p in flatten(model.params, is_leaf=is_node) if p.rpartition("/")[0] in at]


def write_whole(w: Writer, trained: dict[str, Trained], targeted: list[str], stem: str, word: str | None) -> Written:
    """`modules_to_save` and `bias` for arrays that train whole.

    Args:
      targeted: names of the modules that have an adapter, whose biases PEFT keeps elsewhere.
      word: what the format calls the biases of these alone, 'lora_only' say; None: it holds no biases.

    Raises:
      ValueError: arrays that neither can hold.
    """
    there, left = modules(w.model), dict(trained)
    tied = [s.path for s in w.model.sites if s.tied]
    tensors: dict[str, np.ndarray] = {}
    whole = [m for m in there.values() if set(m.paths.values()) <= set(trained) and m.name not in targeted]
    biases = {m.paths["bias"]: m for m in there.values() if "bias" in m.paths}
    if bad := [m.name for m in whole if m.path in tied]:
        raise ValueError(f"{bad[0]} is tied to the head and trains whole; PEFT would train a copy and untie it")
    for m in whole:
        for leaf, path in m.paths.items():
            tensors[f"{stem}{m.name}.{leaf}"] = _whole(w, path, left.pop(path))
    kind = "none"
    if left:
        own = {p for p, m in biases.items() if m.name in targeted}
        kind = "all" if set(left) | {p for m in whole for p in m.paths.values()} >= set(biases) else word
        fits = set(left) <= set(biases) if kind == "all" else set(left) == own
        if word is None or not fits:
            raise ValueError(
                f"PEFT's folder has no place for {sorted(left)[:5]}: it holds whole modules, all biases, or all biases "
                "of the adapted modules"
            )
        for path in list(left):
            m = biases[path]
            name = f"{stem}{m.name}.base_layer.bias" if m.name in targeted else f"{stem}{m.name}.bias"
            tensors[name] = _whole(w, path, left.pop(path))
    fields: dict[str, Any] = {} if word is None else {"bias": kind}
    return Written({**fields, **({"modules_to_save": _entries(w.model, whole)} if whole else {})}, tensors)


def _whole(w: Writer, path: str, n: Trained) -> np.ndarray:
    return names.to_file(w.model, path, names.array(n.value))


def _entries(model: Model, whole: list[Module]) -> list[str]:
    """Names for `modules_to_save`: that of the task head, and last parts of others where they mean no more."""
    heads = {m.name for m in whole if set(m.paths.values()) <= set(_heads(model))}
    tops = [*dict.fromkeys(name.partition(".")[0] for name in heads)]
    rest = [m for m in whole if m.name not in heads]
    short = names.shortest(rest, modules(model).values()) if rest else []
    meant = {m.name for some in under(model, [*tops, *short]).values() for m in some}
    return [*tops, *(short if meant == {m.name for m in whole} else sorted(m.name for m in rest))]


IA3_FORMAT = Format(read_ia3, write_ia3, (IA3,), (*TARGETS[:4], "modules_to_save", "feedforward_modules"))
NORMS = Format(read_norms, write_norms, (), ("target_modules", "exclude_modules", "modules_to_save"))
TOKENS = Format(read_trained_tokens, write_trained_tokens, (Tokens,), ("token_indices", "target_modules"))
