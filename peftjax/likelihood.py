"""Log-likelihoods of continuations: what multiple choice, few-shot classification and lm-eval rank by."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from . import data
from .hub import TASKS, Model
from .loss import log_likelihoods
from .models.layers import shift_right
from .tree import Tree

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


class Likely(NamedTuple):
    """How likely a continuation is.

    Attributes:
      logprob: natural logarithm of the probability of all its tokens, given the context.
      greedy: every one of them is the most likely token where it stands.
      tokens: how many they are.
    """

    logprob: float
    greedy: bool
    tokens: int


class Likelihood:
    """`log p(y | x) = Σ_t log p(y_t | x, y_<t)` of pairs (x, y), in batches; compiled once for each padded length.

    Beside an encoder, the context is the encoder's and the continuation the decoder's.

    Args:
      model: a language model.
      pad_id: fills the batches; it is never looked at.
      batch_size: pairs at once.
      buckets: lengths that the pairs are padded to, at most.
      jit: compiles the function of (params, batch) that scores a batch; e.g. one that also takes the time.

    Raises:
      ValueError: the model is no language model; or, from the call, a pair with an empty side or longer than the model.
    """

    def __init__(self, model: Model, pad_id: int = 0, batch_size: int = 32, buckets: int = 4, jit: Callable = jax.jit):
        if model.module.head not in TASKS["generation"]:
            raise ValueError(f"likelihoods need a language model; this model's head is {model.module.head!r}")
        self.model, self.pad_id, self.batch_size, self.buckets = model, pad_id, batch_size, buckets
        self._score = jit(self._of)

    def _of(self, params: Tree, batch: dict) -> tuple[jax.Array, jax.Array]:
        if self.model.family.start_id is not None:
            start, targets, mask = (
                self.model.family.start_id(self.model.config),
                batch["target_ids"],
                batch["loss_mask"],
            )
            inputs = batch | {"decoder_input_ids": shift_right(targets, start)}
        else:
            targets, mask = batch["input_ids"][:, 1:], batch["loss_mask"][:, 1:]
            inputs = {k: batch[k][:, :-1] for k in ("input_ids", "attention_mask")}  # nothing follows the last token
        hidden = self.model.forward(params, inputs, hidden_only=True).hidden
        chosen, greedy = log_likelihoods(self.model.logits, params, hidden, targets)
        return (chosen * mask).sum(axis=1), (greedy | (mask == 0)).all(axis=1)

    def __call__(self, params: Tree, pairs: Sequence[Pair]) -> list[Likely]:
        """The likelihood of each pair, in their order; methods must be resolved."""
        encodes = self.model.family.start_id is not None
        examples = []
        for i, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                raise ValueError(f"pair {i} has {len(context)} and {len(continuation)} tokens; both sides need some")
            if encodes:
                examples.append(data.Example(context, target_ids=continuation))
            else:
                mask = [0] * len(context) + [1] * len(continuation)
                examples.append(data.Example([*context, *continuation], loss_mask=mask))
        if not examples:
            return []
        lengths = [len(e.input_ids) for e in examples]
        room, longest = self.model.room(params) + (not encodes), int(np.argmax(lengths))  # the last token is not read
        if lengths[longest] > room:
            raise ValueError(f"pair {longest} has {lengths[longest]} tokens; the model has room for {room}")
        out: dict[int, Likely] = {}
        buckets = data.bucket_lengths(lengths, self.buckets, limit=room)
        for batch in data.batches(examples, self.batch_size, buckets, pad_id=self.pad_id):
            logprobs, greedy = map(np.asarray, self._score(params, batch))
            for i, logprob, most in zip(batch["index"].tolist(), logprobs.tolist(), greedy.tolist(), strict=True):
                if i >= 0:
                    out[i] = Likely(logprob, most, len(pairs[i][1]))
        return [out[i] for i in range(len(pairs))]


def encode_pair(tokenizer: Any, context: str, continuation: str, *, encodes: bool = False) -> Pair:
    """Token ids of the two sides, cut where the context ends when both are read as one text.

    Blanks at the end of the context belong to the continuation, as most tokenizers have them. The context begins with
    the BOS token, if there is one; for an encoder it ends as the tokenizer ends a text.

    >>> from peftjax import hub
    >>> tokenizer = hub.load_tokenizer("tiny-books")
    >>> x, y = encode_pair(tokenizer, "The ship came", " home.")
    >>> tokenizer.decode(y).strip()
    'home.'
    """
    if encodes:
        return tokenizer(context)["input_ids"], tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
    stripped = context.rstrip()
    continuation, context = context[len(stripped) :] + continuation, stripped
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    head = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer(context + continuation, add_special_tokens=False, verbose=False)["input_ids"]
    return [*begin, *whole[: len(head)]], whole[len(head) :]
