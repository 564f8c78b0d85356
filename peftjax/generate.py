"""Greedy generation with a static key/value cache: prefill, then one `while_loop`, all under one jit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .hub import Model
from .models.layers import Cache
from .tree import Tree


def empty_cache(model: Model, params: Tree, batch: int, length: int) -> Cache:
    """Buffers for `length` tokens and the virtual ones of a prompt, per-layer or stacked as the parameters are.

    Raises:
      ValueError: the model is an encoder.
    """
    if model.family.cache_shape is None:
        raise ValueError(f"{model.family.name} is an encoder and cannot generate")
    layers, heads, size = model.family.cache_shape(model.config)
    prompt = params[model.family.base].get("prompt")
    length += 0 if prompt is None else prompt.n
    shape = (batch, length, heads, size)

    def pair(shape):
        return jnp.zeros(shape, model.module.dtype), jnp.zeros(shape, model.module.dtype)

    scanned = any(k.endswith("_*") for k in params[model.family.base])
    buffers = pair((layers, *shape)) if scanned else tuple(pair(shape) for _ in range(layers))
    return Cache(buffers, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))


def greedy(model: Model, max_new_tokens: int, eos_id: int | None, pad_id: int = 0) -> Callable[..., jax.Array]:
    """A jitted function that continues prompts with the most likely token, again and again.

    It compiles once for each shape of prompts. Rows that have ended are filled with `pad_id`; the loop stops
    when all rows have. Methods must be resolved (`method.resolve(params, None)`); prefixes are included.

    Args:
      max_new_tokens: tokens to add at most, at least 1.
      eos_id: the token that ends a row; it is part of the output. None: never.

    Returns:
      (params, input_ids, attention_mask) -> (batch, max_new_tokens) int32; the prompts are (batch, length),
      padded on the left.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")

    def step(params, tokens, mask, positions, cache, continued):
        batch = {"input_ids": tokens, "attention_mask": mask, "positions": positions}
        out = model.forward(params, batch, cache=cache, last_only=True, continued=continued)
        assert out.logits is not None  # a head 'causal-lm' is asked for below
        return jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32), out.cache

    @jax.jit
    def generate(params: Tree, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        rows, length = input_ids.shape
        cache = empty_cache(model, params, rows, length + max_new_tokens)
        positions = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        token, cache = step(params, input_ids, attention_mask, positions, cache, continued=False)
        written = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        ended = token == eos_id if eos_id is not None else jnp.zeros(rows, bool)

        def go_on(carry: Any):
            i, _, ended, _, _, _ = carry
            return (i < max_new_tokens) & ~ended.all()

        def body(carry: Any):
            i, token, ended, written, cache, position = carry
            ones = jnp.ones((rows, 1), jnp.int32)
            new, cache = step(params, token[:, None], ones, position[:, None], cache, continued=True)
            new = jnp.where(ended, pad_id, new)
            written = jax.lax.dynamic_update_slice(written, new[:, None], (0, i))
            ended = ended if eos_id is None else ended | (new == eos_id)
            return i + 1, new, ended, written, cache, position + 1

        carry = (jnp.int32(1), token, ended, written, cache, attention_mask.sum(axis=1))
        return jax.lax.while_loop(go_on, body, carry)[3]

    if model.module.head != "causal-lm":
        raise ValueError(f"generation needs a language model; this model's head is {model.module.head!r}")
    return generate
