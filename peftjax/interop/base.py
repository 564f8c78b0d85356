"""What reads and writes one kind of Hugging Face PEFT folder: a `Format`, given a `Reader` or a `Writer`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..hub import Model
from ..methods.base import Method, Site
from ..tree import get
from . import names
from .names import Module

STEM = "base_model.model."  # before the names of modules; a prompt's file has 'base_model.' before those it saves whole


@dataclasses.dataclass
class Reader:
    """A folder being read. Tensors are taken out of it, so that what nothing takes is seen.

    Attributes:
      missing, wrong: tensors that were asked for and are not there, or are of another shape.
    """

    model: Model
    config: Mapping[str, Any]
    tensors: dict[str, np.ndarray]
    missing: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor of this name and shape; zeros, and a note of it, where there is none."""
        x = self.tensors.pop(name, None)
        if x is None:
            self.missing.append(name)
        elif x.shape != shape:
            self.wrong.append(f"{name} {x.shape}, expected {shape}")
        else:
            return x
        return np.zeros(shape, np.float32)

    def whole(self, name: str, path: str) -> jax.Array:
        """A base parameter that the folder holds whole."""
        shape = get(self.model.params, path).shape
        x = self.take(name, shape[::-1] if self.model.family.transposed(path) else shape)
        return jnp.asarray(names.from_file(self.model, path, x))

    def outputs(self, m: Module, x: np.ndarray) -> jax.Array:
        """What lies along a module's outputs, in the order of the outputs here."""
        return jnp.asarray(x if m.kind == "embedding" else names.in_order(self.model, m.path, x))

    def targets(self, *kinds: str) -> list[Module]:
        return names.targets(self.model, self.config, kinds)

    def weight(self, m: Module) -> Any:
        return get(self.model.params, m.path)

    def site(self, path: str) -> Site | None:
        return next((s for s in self.model.sites if s.path == path), None)

    def check_used(self, m: Module) -> None:
        """Raises for the table of an encoder with a decoder: the module that PEFT would adapt computes nothing."""
        table = next(s for s in self.model.sites if s.kind == "embedding")
        if self.model.family.start_id is not None and m.path == table.path:
            raise ValueError(
                f"{m.name} is the table that encoder and decoder share; PEFT adapts the module of that name, which "
                "neither of them calls, so the adapter changes nothing there. Trained tokens are supported"
            )


class Writer(NamedTuple):
    """An adapter being written.

    Attributes:
      nodes: path -> node, those of the format.
      modules: path of a weight -> module.
      source: the configuration of the folder that the adapter came from, or {}.
    """

    model: Model
    method: Method
    nodes: dict[str, Any]
    modules: dict[str, Module]
    source: Mapping[str, Any]

    def outputs(self, m: Module, x: Any) -> np.ndarray:
        """The inverse of `Reader.outputs`."""
        x = names.array(x)
        return x if m.kind == "embedding" else names.in_file_order(self.model, m.path, x)

    def site(self, path: str) -> Site | None:
        return next((s for s in self.model.sites if s.path == path), None)

    def arguments(self, *methods: str) -> dict[str, Any]:
        """Those of the first of these methods in the spec."""
        return next((a for name, a in self.method.spec if name in methods), {})

    def target_fields(self, chosen: list[Module], kinds: tuple[str, ...]) -> dict[str, Any]:
        """`target_modules`, and whether a targeted weight is stored as (inputs, outputs)."""
        there = [m for m in self.modules.values() if m.kind in kinds]
        conv = [m.kind == "linear" and not self.model.family.transposed(m.path) for m in chosen]
        return {"target_modules": names.shortest(chosen, there), "fan_in_fan_out": any(conv)}


class Written(NamedTuple):
    """The fields of a configuration that are a format's own, and tensors by name."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]


class Format(NamedTuple):
    """How one `peft_type` is read and written.

    Attributes:
      read: Reader -> (path -> node, methods whose specs say what is there).
      write: Writer -> Written.
      nodes: the classes of nodes that it holds.
      fields: of the configuration that it honours, beside `folder.NEUTRAL`.
      virtual: whether it is a prompt's, whose tensors have no module.
    """

    read: Callable[[Reader], tuple[dict[str, Any], list[Method]]]
    write: Callable[[Writer], Written]
    nodes: tuple[type, ...]
    fields: tuple[str, ...]
    virtual: bool = False


def numerator(scale: float, denominator: float, hints: tuple) -> float:
    """The alpha whose quotient is the scale: a hint if one is, else a whole number if one is."""
    whole = round(scale * denominator)
    return next((x for x in (*hints, whole) if x is not None and x / denominator == scale), scale * denominator)


def contiguous(x: Any) -> np.ndarray:
    return np.ascontiguousarray(names.array(x))
