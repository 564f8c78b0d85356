"""Generation with a static key/value cache: prefill, then one `while_loop`, all under one jit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import data
from .hub import TASKS, Model
from .mixed import Mixed, Mixture
from .proxy import Proxy
from .tree import Tree


class Decoding(NamedTuple):
    """How tokens are chosen.

    Attributes:
      max_new_tokens: tokens to add at most.
      temperature: 0: the most likely token; above: drawn from the softmax of the logits over it.
      top_k: draw from so many of the most likely tokens; None: from all.
      top_p: draw from the fewest most likely tokens whose probabilities sum to this.
      beams: texts that are followed at once; the best is returned.
      length_penalty: a finished text of n tokens has the score `Σ log p / n^length_penalty`.
      no_repeat_ngram: no sequence of so many tokens comes twice; 0: no such rule.
      stop: ids of the tokens that end a text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[int, ...] = ()


def decoder(model: Model | Proxy | Mixed, how: Decoding, pad_id: int = 0) -> Callable[..., jax.Array]:
    """(params, input_ids, attention_mask, key=None) -> (batch, max_new_tokens) int32, jitted."""
    eos = how.stop[0] if how.stop else None
    run = greedy(model, how.max_new_tokens, eos, pad_id)
    return lambda params, input_ids, attention_mask, key=None: run(params, input_ids, attention_mask)


def complete(
    model: Model | Proxy | Mixed,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[str],
    how: Decoding,
    *,
    key: jax.Array | None = None,
    until: Sequence[str] = (),
    batch_size: int = 32,
) -> list[str]:
    """What the model writes after each prompt, cut before the first of the texts in `until`."""
    encodes = model.family.start_id is not None
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(list(prompts), add_special_tokens=encodes, verbose=False)["input_ids"]
    examples = [data.Example(x if encodes else [*begin, *x]) for x in ids]
    pad = tokenizer.pad_token_id or 0
    run, texts = decoder(model, how, pad), {}
    buckets = data.bucket_lengths([len(e.input_ids) for e in examples])
    for batch in data.batches(examples, batch_size, buckets, pad_id=pad, side="left"):
        own = params.rows(batch["index"], len(prompts)) if isinstance(params, Mixture) else params
        tokens = np.asarray(run(own, batch["input_ids"], batch["attention_mask"], key))
        for i, row in zip(batch["index"].tolist(), tokens.tolist(), strict=True):
            end = next((j for j, t in enumerate(row) if t in how.stop), len(row))
            text = tokenizer.decode(row[:end], skip_special_tokens=True)
            texts[i] = text[: min((text.index(u) for u in until if u in text), default=len(text))]
    return [texts[i] for i in range(len(prompts))]


def greedy(
    model: Model | Proxy | Mixed, max_new_tokens: int, eos_id: int | None, pad_id: int = 0
) -> Callable[..., jax.Array]:
    """A jitted function that continues prompts with the most likely token, again and again.

    It compiles once for each shape of prompts. Rows that have ended are filled with `pad_id`; the loop stops
    when all rows have. Methods must be resolved (`method.resolve(params, None)`); prefixes are included.
    Beside an encoder, which runs once, the decoder begins with its start token instead of the prompt.

    Args:
      max_new_tokens: tokens to add at most, at least 1.
      eos_id: the token that ends a row; it is part of the output. None: never.

    Returns:
      (params, input_ids, attention_mask) -> (batch, max_new_tokens) int32; the prompts are (batch, length),
      padded on the left, or for an encoder on either side.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1; got {max_new_tokens}")

    encodes = model.family.start_id is not None

    def step(params, batch, cache, *, first):
        way: dict[str, Any] = {} if encodes else {"continued": not first}
        out = model.forward(params, batch, cache=cache, last_only=True, **way)
        assert out.logits is not None  # a head with logits of tokens is asked for below
        return jnp.argmax(out.logits[:, -1], axis=-1).astype(jnp.int32), out.cache

    @jax.jit
    def generate(params: Tree, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        rows, length = input_ids.shape
        cache = model.empty_cache(params, rows, max_new_tokens if encodes else length + max_new_tokens)
        prompt = {"input_ids": input_ids, "attention_mask": attention_mask}
        if not encodes:
            prompt["positions"] = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
        token, cache = step(params, prompt, cache, first=True)
        written = jnp.full((rows, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        ended = token == eos_id if eos_id is not None else jnp.zeros(rows, bool)

        def go_on(carry: Any):
            i, _, ended, _, _, _ = carry
            return (i < max_new_tokens) & ~ended.all()

        def body(carry: Any):
            i, token, ended, written, cache, position = carry
            if encodes:
                batch = {"decoder_input_ids": token[:, None]}
            else:
                ones = jnp.ones((rows, 1), jnp.int32)
                batch = {"input_ids": token[:, None], "attention_mask": ones, "positions": position[:, None]}
            new, cache = step(params, batch, cache, first=False)
            new = jnp.where(ended, pad_id, new)
            written = jax.lax.dynamic_update_slice(written, new[:, None], (0, i))
            ended = ended if eos_id is None else ended | (new == eos_id)
            return i + 1, new, ended, written, cache, position + 1

        carry = (jnp.int32(1), token, ended, written, cache, attention_mask.sum(axis=1))
        return jax.lax.while_loop(go_on, body, carry)[3]

    if model.module.head not in TASKS["generation"]:
        raise ValueError(f"generation needs a language model; this model's head is {model.module.head!r}")
    return generate
