"""Files: the adapter file, and the training state that a killed run resumes from.

An adapter file is one safetensors file: the leaves that the method saves, named by their paths, and a JSON
header under the metadata key `peftjax`. The header holds the method's spec, the base's fingerprint, for every
rewritten path the class, static fields and nesting of its node, how many virtual tokens there are, a digest of the
tensors and one of all this (`seal`). Fields that a class can `regrow` from its static ones, such as VeRA's random
matrices, are in no file. Loading needs neither data nor `init`.
"""

import dataclasses
import functools
import hashlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from .hub import Model, fingerprint, load, task_of
from .layout import unstack_layers
from .methods import Method, from_spec
from .methods.base import virtual_tokens
from .quantize import quantized_as
from .tree import Tree, flatten, nearest, update
from .weights import NODES, Blocks, compact, data_fields, is_node, static_fields

FORMAT = 2
SAVED, BASE, REGROWN = "saved", "base", "regrown"


class Adapter(NamedTuple):
    """What an adapter file gives back.

    Attributes:
      params: the base's parameters with the adapter in them, per-layer.
      method: the method that made it, from its spec.
      header: the whole header; `header['extra']` is what the writer added (task, labels, scores).
    """

    params: Tree
    method: Method
    header: dict


def save_adapter(file: str | Path, model: Model, method: Method, params: Tree, extra: dict | None = None) -> int:
    """Writes the adapter file, whole or not at all, and returns its size in bytes.

    Args:
      model: the base that was adapted.
      params: adapted parameters, per-layer or stacked; `method.resolve(params, None)` and `compact` are applied here.
      extra: JSON to keep in the header.

    Raises:
      ValueError: an array that the method does not save is not the base's either.
      OSError: the file cannot be written; nothing is left behind.
    """
    params = compact(unstack_layers(method.resolve(params, None)))
    saved = flatten(method.saved(params))
    base = flatten(model.params, is_leaf=is_node)
    there = {p: n for p, n in flatten(params, is_leaf=is_node).items() if is_node(n)}
    nodes = {p: n for p, n in there.items() if not _is_the_bases(p, n, saved, base.get(p))}
    tensors = {p: np.asarray(x) for p, x in flatten(params).items() if saved[p]}
    arrays = sorted(p for p in tensors if not any(p.startswith(n + "/") for n in nodes))
    if lost := [p for p in flatten(params, is_leaf=is_node) if p not in {*base, *nodes, *arrays}]:
        raise ValueError(f"the method does not save {lost}, and they are not the base's; the file could not be loaded")
    _check_unsaved(model, params, saved)
    regrow = _regrow_once()
    header = {
        "format": FORMAT,
        "spec": [[name, arguments] for name, arguments in method.spec],
        "base": _base(model),
        "digest": _digest(tensors),
        "nodes": {p: _describe(p, n, saved, base.get(p), regrow) for p, n in sorted(nodes.items())},
        "arrays": arrays,
        "virtual_tokens": virtual_tokens(params),
        "extra": extra or {},
    }
    text = json.dumps({**header, "seal": _seal(header)}, sort_keys=True)
    return write_atomically(file, save(tensors, metadata={"peftjax": text}))


def _check_unsaved(model: Model, params: Tree, saved: dict[str, bool]) -> None:
    """What is not saved must be what a reader will have: the base's own arrays, and none that was drawn anew."""
    there = flatten(params, is_leaf=is_node)
    base = flatten(model.params, is_leaf=is_node)
    beneath = {p: _beneath(p, there[p], saved, x) for p, x in base.items() if p in there}
    seen = {p: x for p, x in beneath.items() if x is not None}
    if drawn := [p for p in model.fresh if p in seen]:
        raise ValueError(
            f"the model's new task head {drawn} would not be saved, and a reader would draw another one; "
            "chain the method with head()"
        )
    if fingerprint(model) != fingerprint(model._replace(params=update(model.params, seen))):
        raise ValueError("the method changed arrays of the base that it does not save; let `saved` select them too")


def _is_the_bases(path: str, x: Any, saved: dict[str, bool], whole: Any) -> bool:
    """Whether x is the base's own node (a quantised weight), of which nothing is saved."""
    return (
        is_node(whole)
        and jax.tree.structure(x) == jax.tree.structure(whole)
        and not any(saved[f"{path}/{p}"] for p in flatten(x))
    )


def _beneath(path: str, x: Any, saved: dict[str, bool], whole: Any) -> Any:
    """What lies under x and is not saved, in the form of the base's array or node `whole`; None if all is saved."""
    if _is_the_bases(path, x, saved, whole):
        return x
    if isinstance(x, Blocks):
        pieces = {
            name: _beneath(f"{path}/blocks/{name}", w, saved, x.piece(whole, name)) for name, w in x.blocks.items()
        }
        if all(piece is None for piece in pieces.values()):
            return None
        pieces = {n: x.piece(whole, n) if piece is None else piece for n, piece in pieces.items()}
        return dataclasses.replace(whole, blocks=pieces) if isinstance(whole, Blocks) else x.join(pieces)
    if is_node(x):
        return _beneath(f"{path}/base", x.base, saved, whole) if "base" in data_fields(x) else None
    return None if saved[path] else x


def write_atomically(file: str | Path, data: bytes | str) -> int:
    """Writes beside the file, then renames; a reader or a crash never sees half of it. Returns the size."""
    file = Path(file)
    data = data.encode() if isinstance(data, str) else data
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")  # machines may share the folder, and numbers
    try:
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    return len(data)


def read_header(file: str | Path) -> dict:
    """The header of an adapter file, without its tensors.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is truncated, no safetensors file, or no adapter file of this format.
    """
    return _open(file)[0]


def base_of(header: dict, model_name: str) -> Model:
    """Loads the base that an adapter file's header asks for: its task, labels and quantisation."""
    purpose = task_of(header["base"]["architecture"])
    labels = header["extra"].get("labels") or header["extra"].get("num_labels") or 1
    how = header["base"].get("quantized")
    return load(model_name, purpose, labels=labels if purpose == "classification" else None, quantize=how)


def load_adapter(file: str | Path, model: Model) -> Adapter:
    """Puts a saved adapter into the base it was trained on.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is truncated or corrupted, was made for another base, or its tensors, nodes or
        paths are not those that the header and the base say; the message names them.
    """
    header, tensors = _open(file)
    there, here = header["base"], _base(model)
    if (then := there.get("quantized")) != (now := here.get("quantized")):
        way = f"quantize={then!r} (--quantize {then})" if then else "no quantize"
        raise ValueError(
            f"{file} was trained over a base quantised as {then or 'nothing'}; this one is quantised as "
            f"{now or 'nothing'}. Load it with {way}"
        )
    if there != here:
        raise ValueError(
            f"{file} is an adapter for another base ({there['architecture']} with fingerprint "
            f"{there['fingerprint']}); this one is {here['architecture']} with {here['fingerprint']}"
        )
    wanted = set(header["arrays"]) | {t for p, d in header["nodes"].items() for t in _tensor_names(p, d)}
    if wanted != set(tensors):
        raise ValueError(
            f"{file}: missing tensors {sorted(wanted - set(tensors))}, unknown tensors {sorted(set(tensors) - wanted)}"
        )
    if header["digest"] != _digest(tensors):
        raise ValueError(f"{file} is corrupted: its tensors do not match the digest in its header")
    base = flatten(model.params, is_leaf=is_node)
    if strange := [p for p in header["arrays"] if p not in base]:
        raise ValueError(f"{file}: the base has no {strange}; the nearest paths are {nearest(strange[0], base)}")
    new = {p: jnp.asarray(tensors[p]) for p in header["arrays"]}
    regrow = _regrow_once()
    new |= {p: _rebuild(file, p, d, tensors, base.get(p), regrow) for p, d in header["nodes"].items()}
    for path, x in new.items():
        if path in base and x.shape != base[path].shape:
            raise ValueError(f"{file}: {path} has shape {x.shape}, the base has {base[path].shape}")
    spec = [(name, arguments) for name, arguments in header["spec"]]
    return Adapter(update(model.params, new), from_spec(spec), header)


def _open(file: str | Path) -> tuple[dict, dict[str, np.ndarray]]:
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no adapter file {file}")
    try:
        with safe_open(file, framework="flax") as f:
            meta = (f.metadata() or {}).get("peftjax")
            tensors = {k: np.asarray(f.get_tensor(k)) for k in f.keys()}  # noqa: SIM118 - safe_open is no mapping
        header = json.loads(meta) if meta else None
    except (SafetensorError, json.JSONDecodeError) as e:
        raise ValueError(f"{file} is truncated or corrupted: {e}") from e
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"{file} is a safetensors file, but no peftjax adapter of format {FORMAT}")
    if header.pop("seal", None) != _seal(header):
        raise ValueError(f"{file} is corrupted: its header does not match the digest in it")
    return header, tensors


def _base(model: Model) -> dict[str, str]:
    base = {"fingerprint": fingerprint(model), "architecture": model.hf_config.architectures[0]}
    how = quantized_as(model.params)
    return base if how is None else {**base, "quantized": how}


def _seal(header: dict) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _digest(tensors: dict[str, np.ndarray]) -> str:
    h = hashlib.sha256()
    for name in sorted(tensors):
        h.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        h.update(np.ascontiguousarray(tensors[name]).tobytes())
    return h.hexdigest()


def _regrow_once() -> Callable[[Any, dict], dict[str, Any]]:
    """(class, static fields) -> the fields that the class makes of them; equal ones are made once and shared."""

    @functools.cache
    def regrow(cls, statics):
        return cls.regrow(**{k: _tuples(v) for k, v in json.loads(statics).items()})

    return lambda cls, statics: regrow(cls, json.dumps(statics, sort_keys=True))


def _describe(path: str, n: Any, saved: dict[str, bool], whole: Any, regrow: Callable) -> dict:
    """A node in JSON; `whole` is the base's array or node that it stands for, if it stands for one."""

    def field(name, value, whole):
        here = f"{path}/{name}"
        if value is None:
            return None
        beneath = name == "base" or isinstance(n, Blocks)
        if beneath and _is_the_bases(here, value, saved, whole):
            return BASE
        if is_node(value):
            return _describe(here, value, saved, whole, regrow)
        if name in getattr(type(n), "regrows", ()) and not saved.get(here):
            if not np.array_equal(value, regrow(type(n), static_fields(n))[name]):
                raise ValueError(f"{here} is not what its node's static fields give; let the method save it")
            return REGROWN
        if isinstance(value, dict):
            parts = whole.blocks if isinstance(whole, Blocks) else dict.fromkeys(value, whole)
            return {"items": {k: field(f"{name}/{k}", v, parts[k]) for k, v in value.items()}}
        if saved.get(here):
            return SAVED
        if beneath and whole is not None:
            return BASE
        raise ValueError(f"the method does not save {here}, and it is not the base's; the file could not be loaded")

    fields = {name: field(name, getattr(n, name), whole) for name in data_fields(n)}
    return {"class": type(n).__name__, "static": static_fields(n), "fields": fields}


def _tensor_names(path: str, description: dict) -> list[str]:
    out = []
    for name, d in (description["items"] if "items" in description else description["fields"]).items():
        here = f"{path}/{name}"
        out += [here] if d == SAVED else _tensor_names(here, d) if isinstance(d, dict) else []
    return out


def _rebuild(file, path: str, description: dict, tensors: dict, whole: Any, regrow: Callable) -> Any:
    """The node of a description; `whole` is the base's array or node that it stands for, if it stands for one."""
    cls = NODES.get(description["class"])
    if cls is None:
        raise ValueError(
            f"{file}: {path} is a {description['class']}, which is not known here; import the module that defines it"
        )
    unknown = {*description["fields"], *description["static"]} ^ {f.name for f in dataclasses.fields(cls)}
    if unknown:
        raise ValueError(f"{file}: {path}: the fields {sorted(unknown)} of {cls.__name__} differ from the file's")
    values = {k: _tuples(v) for k, v in description["static"].items()}

    def field(here, d, whole):
        if isinstance(d, dict):
            return _rebuild(file, here, d, tensors, whole, regrow)
        if d == REGROWN:
            return regrow(cls, description["static"])[here.rpartition("/")[2]]
        return jnp.asarray(tensors[here]) if d == SAVED else None if d is None else whole

    for name, d in description["fields"].items():
        here = f"{path}/{name}"
        if isinstance(d, dict) and "items" in d:
            bare = cls(**{**dict.fromkeys(description["fields"]), **values})  # knows which columns are whose
            values[name] = {k: field(f"{here}/{k}", x, bare.piece(whole, k)) for k, x in d["items"].items()}
        else:
            values[name] = field(here, d, whole)
    return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


class StateFolder:
    """Training states in a folder, by orbax; the newest whole one survives a kill at any moment.

    A state is any pytree of arrays; its structure comes from the template given to `restore`.
    """

    def __init__(self, folder: str | Path):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    def latest(self) -> int | None:
        """The newest step that was saved whole."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, meta: dict) -> None:
        """Saves the state's arrays and JSON beside them under a step; they are copied, and written in a thread.

        `close` waits for it, as the next `save` does.
        """
        if step == self.latest():
            return
        arrays = {f"{i:05d}": np.asarray(x) for i, x in enumerate(jax.device_get(jax.tree.leaves(state)))}
        args = self._ocp.args
        meta = {"arrays": _shapes(state), "meta": meta}
        self._manager.save(step, args=args.Composite(state=args.StandardSave(arrays), meta=args.JsonSave(meta)))

    def restore(self, step: int, template: Tree) -> tuple[Tree, dict]:
        """The state of a step in the template's structure, and its JSON.

        Raises:
          ValueError: the saved arrays are not those of the template, or cannot be read.
        """
        leaves, structure = jax.tree.flatten(template)
        shapes = {f"{i:05d}": jax.ShapeDtypeStruct(x.shape, x.dtype) for i, x in enumerate(leaves)}
        meta = self._read(step, meta=self._ocp.args.JsonRestore())["meta"]
        there, here = meta["arrays"], _shapes(template)
        if different := sorted(k for k in {*there, *here} if there.get(k) != here.get(k)):
            said = "; ".join(f"{k}: {there.get(k)}, expected {here.get(k)}" for k in different[:5])
            raise ValueError(
                f"the training state in {self._manager.directory} is of another run ({len(different)} arrays "
                f"differ: {said}); remove that folder to start again"
            )
        got = self._read(step, state=self._ocp.args.StandardRestore(shapes))["state"]
        return jax.tree.unflatten(structure, [got[k] for k in sorted(shapes)]), meta["meta"]

    def _read(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as e:  # orbax has many names for what it misses
            raise ValueError(
                f"the training state of step {step} in {self._manager.directory} cannot be read "
                f"({type(e).__name__}: {e}); remove that folder to start again"
            ) from e

    def close(self) -> None:
        self._manager.close()


def _shapes(state: Tree) -> dict[str, str]:
    return {p: f"{x.dtype}{list(x.shape)}" for p, x in flatten(state).items()}
