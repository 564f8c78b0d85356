"""What all encoders with a decoder beside them share around their stacks: how they are called, memory, and heads."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from .layers import (
    Context,
    Embed,
    Linear,
    Output,
    begin,
    causal_context,
    last_token,
    shift_right,
    write_cache,
)


def keys_and_values(make: Callable, source: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
    """Keys, values, and what a layer's cache holds from now on.

    Args:
      make: source -> (keys, values) of it.
      source: what they are made from; None: the cache holds them all.
      cache: buffers to write them into; None: with an index, they are kept as they are (an encoder's states).
      index: where in the buffers; None: nothing is kept.
    """
    if source is None:
        return *cache, cache
    k, v = make(source)
    if index is not None:
        k, v = cache = (k, v) if cache is None else write_cache(cache, k, v, index)
    return k, v, cache


def halves(cache: Any) -> tuple[Any, Any]:
    """What a block's cache holds for its own attention, and for that to the encoder; None where there is none."""
    return (None, None) if cache is None else (cache[:2], cache[2:] or None)


class Base(nn.Module):
    """The embedding that both stacks share, and the stacks.

    Attributes:
      stack: (config, whether it decodes, dtype, remat) -> module called with (embedded text, layers of the cache,
        context, and of a decoder: the encoder's states and which may be looked at) for states and layers.
      std: of the embedding's start.
      scale: of the embedded text.
    """

    config: Any
    dtype: Any
    remat: str
    stack: Callable
    std: float
    scale: float = 1.0

    def setup(self):
        c = self.config
        self.shared = Embed(c.vocab_size, c.d_model, self.dtype, self.std)
        self.encoder, self.decoder = (self.stack(c, decodes, self.dtype, self.remat) for decodes in (False, True))

    def encode(self, ids, mask, deterministic):
        """-> the states, and the mask of those that may be looked at."""
        x, mask, positions, _ = begin(self, self.shared(ids, mask) * self.scale, mask, None)
        context = Context(mask[:, None, None].astype(bool), positions, deterministic=deterministic)
        return self.encoder(x, None, context)[0], mask.astype(bool)

    def decode(self, ids, mask, memory, source, cache, deterministic):
        positions = jnp.arange(ids.shape[1])[None] + (0 if cache is None else cache.index)
        context, cache = causal_context(mask, positions, cache, deterministic)
        layers = None if cache is None else cache.layers
        x = self.shared(ids, mask) * self.scale
        x, layers = self.decoder(x, layers, context, memory, source[:, None, None])
        return x, None if cache is None else cache._replace(layers=layers, source=source)

    def attend(self, x):
        return self.shared.attend(x)


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, `out_proj`."""

    labels: int
    dropout: float
    std: float

    @nn.compact
    def __call__(self, x, deterministic):
        drop = nn.Dropout(self.dropout, deterministic=deterministic)
        x = jnp.tanh(Linear(x.shape[-1], std=self.std, name="dense")(drop(x)))
        return Linear(self.labels, std=self.std, name="out_proj")(drop(x))


class EncoderDecoder(nn.Module):
    """An encoder with a decoder, as a base, a text-to-text model, or a classifier.

    A family's `module` is this class with what is its own: `functools.partial(EncoderDecoder, stack=Stack, ...)`.

    Attributes:
      config: sizes and rates; it has `vocab_size`, `d_model`, `eos_token_id`, `classifier_dropout` and `num_labels`.
      head: 'none', 'seq2seq-lm' or 'classification' (reads the decoder at the last end-of-text token of the input,
        which the decoder is given too, shifted right; without such a token, at the last that is not padding).
      dtype: of the activations.
      remat: which activations of a block are kept for the backward pass, see `layers.REMAT`.
      at: the name of the base in the tree.
      stack: as for `Base`.
      start: config -> the token that a decoder's text begins with.
      unembed: (this module, base, hidden states) -> logits of the language model.
      std, scale: config -> those of `Base`.
      head_std: config -> of the classification head's start.
    """

    config: Any
    head: str = "seq2seq-lm"
    dtype: Any = jnp.float32
    remat: str = "none"
    at: str = "model"
    stack: Callable = nn.Module
    start: Callable = lambda c: c.decoder_start_token_id
    unembed: Callable = lambda module, base, x: base.attend(x)
    std: Callable = lambda c: 1.0
    scale: Callable = lambda c: 1.0
    head_std: Callable = lambda c: 0.02

    @nn.compact
    def __call__(
        self,
        input_ids: Any = None,
        attention_mask=None,
        type_ids=None,
        positions=None,
        decoder_input_ids=None,
        decoder_attention_mask=None,
        cache=None,
        deterministic=True,
        last_only=False,
        hidden=None,
        hidden_only=False,
    ):
        """Token ids of encoder (batch, source length) and decoder (batch, length) -> `Output` of the decoder.

        Args:
          input_ids: None where the cache holds a text's keys and values already, and with `hidden`.
          attention_mask: of the encoder, 1 at tokens and 0 at padding, on either side.
          type_ids, positions: must be None; there are no types, and both stacks count their positions themselves.
          decoder_input_ids: default: with an empty cache the start token, without one (classification) the input
            shifted right.
          decoder_attention_mask: of the decoder; default: all ones, as padding on the right is never looked at.
          cache: keys and values of the decoder's tokens before these, and of the encoder's states.
          last_only: logits of the last position only, (batch, 1, vocabulary).
          hidden: (batch, length, width), the decoder's last hidden states, instead of ids: a language model's head
            runs alone.
          hidden_only: leave the head out.
        """
        if type_ids is not None or positions is not None:
            raise ValueError(
                "an encoder with a decoder has no token types and counts its positions itself; leave type_ids and "
                "positions out"
            )
        c = self.config
        base = Base(c, self.dtype, self.remat, self.stack, self.std(c), self.scale(c), name=self.at)
        if hidden is not None:
            return Output(hidden, logits=self.unembed(self, base, hidden).astype(jnp.float32))
        if input_ids is None:
            if cache is None or cache.source is None:
                raise ValueError("the encoder needs input_ids, unless a cache holds what it gave")
            memory, source = None, cache.source
        else:
            mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
            memory, source = base.encode(input_ids, mask, deterministic)
        ids = decoder_input_ids
        if ids is None and cache is not None:
            ids = jnp.full((source.shape[0], 1), self.start(c), jnp.int32)
        elif ids is None and input_ids is not None and (self.head == "classification" or self.is_initializing()):
            ids = shift_right(input_ids, self.start(c))
        elif ids is None:
            raise ValueError(
                "the decoder needs decoder_input_ids: the target after `peftjax.models.layers.shift_right`"
            )
        seen = jnp.ones_like(ids) if decoder_attention_mask is None else decoder_attention_mask
        hidden, cache = base.decode(ids, seen, memory, source, cache, deterministic)
        logits = None
        if hidden_only:
            return Output(hidden, cache=cache)
        if self.head == "seq2seq-lm":
            hidden = hidden[:, -1:] if last_only else hidden
            logits = self.unembed(self, base, hidden)
        elif self.head == "classification":
            ends = (input_ids == c.eos_token_id) & (mask > 0)
            ends = jnp.where(ends.any(1, keepdims=True), ends, mask > 0)
            x = last_token(hidden, ends.astype(int))
            head = ClassificationHead(c.num_labels, c.classifier_dropout, self.head_std(c), name="classification_head")
            logits = head(x, deterministic)
        return Output(hidden, None, None if logits is None else logits.astype(jnp.float32), cache)
