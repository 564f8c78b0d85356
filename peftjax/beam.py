"""Beam search of static shapes, with the rules of transformers' `generate(num_beams=..., early_stopping=False)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

FAR = -1e9  # the score of a beam that is not there; finite, as in transformers, so that differences exist


class Beams(NamedTuple):
    """The search between two steps, for B rows and K beams.

    Attributes:
      tokens: (B, K, width), the texts that are followed, what was read included, and `scores` (B, K) = Σ log p, sorted.
      best: (B, K, width), the texts that have ended, and `best_scores` (B, K) = Σ log p / n^length_penalty, sorted.
      ended: (B, K), which of `best` are texts.
      hopeful: (B), False once no followed text could enter `best`; then it stays so.
      came_from: (B, K), the beam of the step before that each text continues.
      stuck: no candidate can be continued.
    """

    tokens: jax.Array
    scores: jax.Array
    best: jax.Array
    best_scores: jax.Array
    ended: jax.Array
    hopeful: jax.Array
    came_from: jax.Array
    stuck: jax.Array


def search(
    logits: jax.Array,
    tokens: jax.Array,
    state: Any,
    *,
    beams: int,
    max_new_tokens: int,
    length_penalty: float,
    stop: tuple[int, ...],
    forbid: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    repeat: Callable[[Any], Any],
    gather: Callable[[Any, jax.Array], Any],
    advance: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]],
) -> jax.Array:
    """The best text of each row by `Σ_t log p(y_t | x, y_<t) / n^a`, over the n new tokens, the stop token included.

    Each step keeps the K best continuations that have not ended. Of the K best in all, those that have ended
    are offered to the K finished texts. A row is done when `s / n^a` of its best followed text at its present length n
    is no better than the worst of K finished ones; the loop ends when all rows are, or at `max_new_tokens`.

    Args:
      logits: (rows, vocabulary) after what was read.
      tokens: (rows, length) of what was read, which `forbid` may look at.
      state: what `repeat`, `gather` and `advance` pass on: the cache.
      beams: K.
      length_penalty: a.
      stop: tokens that end a text.
      forbid: (log-probabilities, tokens, number of tokens) -> log-probabilities, -inf for what must not come.
      repeat: state of B rows -> state of B · K rows, a row's beams adjacent.
      gather: (state, (B · K) indices of rows) -> state of these.
      advance: (state, (B · K) new tokens, number of tokens before them) -> logits, state.

    Returns:
      (rows, max_new_tokens), filled up with what `tokens` is filled with.
    """
    rows, width = tokens.shape
    begun = width - max_new_tokens
    ends = jnp.array(stop, jnp.int32)
    wanted = max(2, 1 + len(stop)) * beams  # so many that `beams` of them go on, whatever ends

    def pick(logits, b: Beams, length) -> Beams:
        logp = forbid(jax.nn.log_softmax(logits), b.tokens.reshape(-1, width), length)
        vocabulary = logp.shape[-1]
        total = (logp.reshape(rows, beams, vocabulary) + b.scores[..., None]).reshape(rows, -1)
        scores, at = jax.lax.top_k(total, min(wanted, total.shape[1]))
        beam, token = at // vocabulary, at % vocabulary
        texts = _take(b.tokens, beam).at[:, :, length].set(token)
        n = length + 1 - begun
        over = jnp.isin(token, ends) | (n >= max_new_tokens)
        alive, keep = jax.lax.top_k(scores + jnp.where(over, FAR, 0.0), beams)
        ending = over & (jnp.arange(over.shape[1]) < beams)
        norm = n.astype(jnp.float32) ** length_penalty
        offered = scores / norm + jnp.where(b.hopeful, 0.0, FAR)[:, None] + jnp.where(ending, 0.0, FAR)
        best_scores, chosen = jax.lax.top_k(jnp.concatenate([b.best_scores, offered], 1), beams)
        best = _take(jnp.concatenate([b.best, texts], 1), chosen)
        ended = jnp.take_along_axis(jnp.concatenate([b.ended, ending], 1), chosen, 1)
        worst = jnp.where(ended, best_scores.min(1, keepdims=True), FAR)
        hopeful = b.hopeful & (alive[:, :1] / norm > worst).any(1)
        came_from = jnp.take_along_axis(beam, keep, 1)
        return Beams(_take(texts, keep), alive, best, best_scores, ended, hopeful, came_from, over.all())

    def go_on(carry):
        _, b, _ = carry
        return b.hopeful.any() & ~b.stuck

    def body(carry):
        length, b, state = carry
        source = jnp.arange(rows)[:, None] * beams + b.came_from
        state = gather(state, source.reshape(-1))
        last = jax.lax.dynamic_index_in_dim(b.tokens.reshape(-1, width), length - 1, 1, keepdims=False)
        logits, state = advance(state, last, length - 1)
        return length + 1, pick(logits, b, length), state

    first = jnp.repeat(tokens[:, None], beams, 1)
    alone = jnp.full((rows, beams), FAR).at[:, 0].set(0.0)  # the first step continues one text, not its copies
    none = jnp.zeros((rows, beams), bool)
    scores = jnp.full((rows, beams), FAR)
    b = Beams(first, alone, first, scores, none, jnp.ones(rows, bool), none.astype(jnp.int32), jnp.array(False))
    b = pick(jnp.repeat(logits, beams, 0), b, jnp.int32(begun))
    _, b, _ = jax.lax.while_loop(go_on, body, (jnp.int32(begun + 1), b, repeat(state)))
    return b.best[:, 0, begun:]


def _take(x: jax.Array, at: jax.Array) -> jax.Array:
    """(B, n, width), (B, m) -> (B, m, width)."""
    return jnp.take_along_axis(x, at[..., None], 1)
