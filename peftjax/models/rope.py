"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) with every scaling that Llama configs name.

The frequencies follow `transformers.modeling_rope_utils` key by key, so that its configs mean the same here.
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np


def _base_frequencies(theta: float, dim: int) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)


def _default(p, dim, max_length):
    return _base_frequencies(p["rope_theta"], dim), 1.0


def _linear(p, dim, max_length):
    return _base_frequencies(p["rope_theta"], dim) / p["factor"], 1.0


def _dynamic(p, dim, max_length):
    """NTK-aware: the base grows with the batch's longest position once that passes the trained length."""
    factor = p["factor"]

    def frequencies(length):
        length = jnp.maximum(length, max_length).astype(jnp.float32)
        grown = p["rope_theta"] * (factor * length / max_length - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / grown ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)

    return frequencies, 1.0


def _yarn(p, dim, max_length):
    """Peng et al. 2023 (arXiv:2309.00071): high frequencies stay, low ones are interpolated."""
    theta, trained = p["rope_theta"], p["original_max_position_embeddings"]
    factor = p.get("factor") or max_length / trained

    def magnitude(scale, m=1.0):
        return 1.0 if scale <= 1 else 0.1 * m * math.log(scale) + 1.0

    attention = p.get("attention_factor")
    if attention is None:
        m, m_all = p.get("mscale"), p.get("mscale_all_dim")
        attention = magnitude(factor, m) / magnitude(factor, m_all) if m and m_all else magnitude(factor)

    def dimension(rotations):
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(p.get("beta_fast") or 32), dimension(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / ((high - low) or 0.001), 0, 1)
    plain = _base_frequencies(theta, dim)
    return plain / factor * ramp + plain * (1 - ramp), float(attention)


def _longrope(p, dim, max_length):
    """Ding et al. 2024 (arXiv:2402.13753): one set of factors up to the trained length, another beyond."""
    trained = p["original_max_position_embeddings"]
    factor = p.get("factor") or max_length / trained
    attention = p.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    plain = _base_frequencies(p["rope_theta"], dim)
    short, long = (np.float32(plain / np.asarray(p[k])) for k in ("short_factor", "long_factor"))
    return lambda length: jnp.where(length > trained, long, short), float(attention)


def _llama3(p, dim, max_length):
    """Llama 3.1: long wavelengths are divided by the factor, short ones kept, a smooth blend between."""
    plain = _base_frequencies(p["rope_theta"], dim)
    low, high, trained = p["low_freq_factor"], p["high_freq_factor"], p["original_max_position_embeddings"]
    wavelength = 2 * math.pi / plain
    smooth = np.clip((trained / wavelength - low) / (high - low), 0, 1)
    return (1 - smooth) * plain / p["factor"] + smooth * plain, 1.0


def _proportional(p, dim, max_length):
    """Only the first part of the pairs rotates; the others have frequency 0."""
    pairs = int(p.get("partial_rotary_factor", 1.0) * dim // 2)
    plain = p["rope_theta"] ** -(np.arange(0, 2 * pairs, 2) / dim)
    return np.pad(plain, (0, dim // 2 - pairs)) / p.get("factor", 1.0), 1.0


# What `rope_parameters` may hold; transformers ignores keys that are another type's, and so do we.
ROPE_KEYS = frozenset(
    [
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"),
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        *("short_factor", "long_factor", "low_freq_factor", "high_freq_factor"),
    ]
)
ROPE_TYPES: dict[str, Callable] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "proportional": _proportional,
}


def check_rope(parameters: Mapping, dim: int) -> None:
    """Raises for parameters that `rope_angles` cannot honour.

    Args:
      parameters: the config's `rope_parameters`.
      dim: features of a head that turn.

    Raises:
      ValueError: an odd `dim`, an unknown type or parameter, or a share of the features where the type has none.
    """
    if dim % 2:
        raise ValueError(f"head_dim {dim} is odd; rotary position embedding turns pairs of features")
    if unknown := sorted(set(parameters) - ROPE_KEYS):
        raise ValueError(f"the rope parameters {unknown} are not known; known are {sorted(ROPE_KEYS)}")
    kind = parameters["rope_type"]
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {sorted(ROPE_TYPES)}")
    if kind != "proportional" and parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is supported for rope_type 'proportional' only")


def rope_angles(parameters: Mapping, dim: int, max_length: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation, times the attention scaling; float32, (batch, length, dim / 2).

    Args:
      parameters: the config's `rope_parameters`: 'rope_type', 'rope_theta' and what the type needs.
      dim: head size.
      max_length: the config's `max_position_embeddings`.
      positions: (batch, length).
    """
    frequencies, scaling = ROPE_TYPES[parameters["rope_type"]](parameters, dim, max_length)
    if callable(frequencies):
        frequencies = frequencies(positions.max() + 1)
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
    return jnp.cos(angles) * scaling, jnp.sin(angles) * scaling


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + size/2) of `x`, (batch, length, heads, size), by the angles."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
