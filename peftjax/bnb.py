"""Models that bitsandbytes quantised to NF4: their tensors as `NF4` nodes, code by code, nothing rounded again."""

import json
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from .quantize import BLOCK, DYNAMIC, NF4, NORMAL, OUTER

STATE = ".quant_state.bitsandbytes__nf4"
BESIDE = re.compile(r"(.*\.weight)\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__\w+)")
PADDING = 0x77  # two codes of 0


def take_way(where: Any, hf_config: Any) -> str | None:
    """How a model's files are quantised, as `quantize` calls it, taken out of its config; None: they are not.

    Raises:
      ValueError: it is not bitsandbytes' NF4 in bytes.
    """
    config = getattr(hf_config, "quantization_config", None)
    if config is None:
        return None
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    there = {"bnb_4bit_quant_storage": "uint8", **config}
    wanted |= {"bnb_4bit_quant_storage": "uint8"}
    if bad := {k: there.get(k) for k, v in wanted.items() if there.get(k) != v}:
        said = ", ".join(f"{k}={v!r} (supported: {wanted[k]!r})" for k, v in bad.items())
        raise ValueError(f"{where} is quantised in a way that is not read: {said}; load an unquantised model")
    del hf_config.quantization_config
    return "nf4-double" if config.get("bnb_4bit_use_double_quant") else "nf4"


def of(name: str) -> str | None:
    """The weight that a tensor stands beside, such as its absmaxes; None for any other tensor."""
    m = BESIDE.fullmatch(name)
    return m[1] if m else None


def read(name: str, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], dtype: Any) -> NF4:
    """The node of a weight of this name.

    bitsandbytes counts a weight's entries as `NF4` does, output by output, two codes in a byte, the first one high.

    Args:
      tensors: the weight's codes under its name, and what stands beside it.
      shape: (inputs, outputs) of the weight here.
      dtype: what the node stands for.

    Raises:
      ValueError: a tensor is missing, or other blocks, levels or another shape than this library has.
    """
    parts = {n.removeprefix(f"{name}."): x for n, x in tensors.items() if n != name}
    state = parts.get(STATE[1:])
    if state is None or "absmax" not in parts:
        raise ValueError(f"{name} is quantised, but {name}{STATE} or its absmax is not in the file")
    facts = json.loads(state.tobytes())
    inputs, outputs = shape
    if facts.get("quant_type") != "nf4" or facts.get("blocksize") != BLOCK:
        said = f"{facts.get('quant_type')!r} in blocks of {facts.get('blocksize')}"
        raise ValueError(f"{name} is quantised as {said}; supported is 'nf4' in blocks of {BLOCK}")
    if tuple(facts["shape"]) != (outputs, inputs):
        raise ValueError(f"{name} is of shape {tuple(facts['shape'])}, expected {(outputs, inputs)}")
    _check_levels(name, parts.get("quant_map"), NORMAL)
    blocks = -(-inputs * outputs // BLOCK)
    codes = np.full(blocks * BLOCK // 2, PADDING, np.uint8)
    codes[: tensors[name].size] = tensors[name].reshape(-1)
    if inputs * outputs % 2:
        codes[inputs * outputs // 2] |= 0x07
    absmax, to = parts["absmax"].reshape(-1), jnp.dtype(dtype).name
    if "nested_absmax" not in parts:
        return NF4(jnp.asarray(codes), jnp.asarray(absmax.astype(np.float32)), matrix=shape, to=to)
    if facts.get("nested_blocksize") != OUTER:
        raise ValueError(
            f"{name}: absmaxes are quantised in blocks of {facts.get('nested_blocksize')}, expected {OUTER}"
        )
    _check_levels(name, parts.get("nested_quant_map"), DYNAMIC)
    scale, offset = jnp.asarray(parts["nested_absmax"].reshape(-1)), jnp.float32(facts["nested_offset"])
    return NF4(jnp.asarray(codes), jnp.asarray(absmax), scale, offset, shape, to)


def _check_levels(name: str, there: np.ndarray | None, here: np.ndarray) -> None:
    if there is None or there.shape != here.shape or not np.allclose(there, here, atol=1e-6):
        raise ValueError(f"{name} has other levels than bitsandbytes' own for this kind of quantisation")
