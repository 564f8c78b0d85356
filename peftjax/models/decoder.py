"""What all decoders share around their blocks: how they are called, and the heads over the last hidden states."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .layers import Linear, Output, last_token


class Decoder(nn.Module):
    """A decoder as a base, a causal language model, or a classifier.

    A family's `module` is this class with what is its own: `functools.partial(Decoder, body=Base, at="model")`.

    Attributes:
      config: sizes and rates; it has `vocab_size`, `initializer_range`, `tie_word_embeddings` and `num_labels`.
      head: 'none', 'causal-lm' or 'classification' (reads the last token that is not padding).
      dtype: of the activations.
      remat: which activations of a block are kept for the backward pass, see `layers.REMAT`.
      body: (config, dtype, remat) -> module of embedding, blocks and last norm, called with (ids, mask, positions,
        cache, deterministic, continued, segment ids) for the hidden states and the cache; its `attend` is the tied
        head.
      at: the name of the body in the tree.
      unembed: the name of a head that is not tied.
      cap: logits -> logits, at the end of the language model's head.
    """

    config: Any
    head: str = "causal-lm"
    dtype: Any = jnp.float32
    remat: str = "none"
    body: Callable = nn.Module
    at: str = "model"
    unembed: str = "lm_head"
    cap: Callable = lambda c, logits: logits

    @nn.compact
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask=None,
        type_ids=None,
        positions=None,
        cache=None,
        deterministic=True,
        last_only=False,
        continued=False,
        segment_ids=None,
        hidden=None,
        hidden_only=False,
    ):
        """Token ids (batch, length) -> `Output`.

        Args:
          input_ids: None with `hidden`.
          attention_mask: (batch, length), 1 at tokens and 0 at padding, on either side.
          type_ids: must be None; decoders have none.
          positions: (batch, length); default: counted from 0, or from the cache's end.
          cache: keys and values of the tokens before these.
          last_only: a language model's logits of the last position only, (batch, 1, vocabulary).
          continued: the tokens continue a text whose beginning, virtual tokens included, is in the cache.
          segment_ids: (batch, length) of packed texts: 1, 2, ... by text and 0 at padding; a token looks at its own
            text only. Give the positions too, from 0 for each text.
          hidden: (batch, length, width), the last hidden states, instead of ids: a language model's head runs alone.
          hidden_only: leave the head out.

        Raises:
          ValueError: token types; or more tokens, virtual ones included, than learned positions.
        """
        if type_ids is not None:
            raise ValueError("a decoder has no token types; leave type_ids out")
        c = self.config
        base = self.body(c, self.dtype, self.remat, name=self.at)
        if hidden is not None:
            return Output(hidden, logits=_logits(self, base, hidden))
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden, cache = base(input_ids, mask, positions, cache, deterministic, continued, segment_ids)
        logits = None
        if hidden_only:
            return Output(hidden, cache=cache)
        if self.head == "causal-lm":
            hidden = hidden[:, -1:] if last_only else hidden
            logits = _logits(self, base, hidden)
        elif self.head == "classification":
            logits = Linear(c.num_labels, False, c.initializer_range, name="score")(last_token(hidden, mask))
            logits = logits.astype(jnp.float32)
        return Output(hidden, None, logits, cache)


def _logits(module: Decoder, base: Any, hidden: jax.Array) -> jax.Array:
    c = module.config
    if c.tie_word_embeddings:
        logits = base.attend(hidden)
    else:
        logits = Linear(c.vocab_size, False, c.initializer_range, name=module.unembed)(hidden)
    return module.cap(c, logits.astype(jnp.float32))
