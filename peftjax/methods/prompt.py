"""Prompt tuning: trained vectors before the embedded text."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import Tree, get, update
from ..weights import node, take
from .base import Method, Site, check_whole, is_token, method, plain

FREQUENT = 5000  # sentencepiece and BPE vocabularies are, roughly, in the order of frequency


@node
class Prompt:
    """Hook of a model's input: n vectors, (n, width), at the positions 0 to n - 1 before the text.

    Attributes:
      unused: (n, width) that Hugging Face PEFT's files hold for an encoder's decoder and that no one reads.
    """

    vectors: Any
    unused: Any = None
    trains = ("vectors",)

    @property
    def n(self) -> int:
        return self.vectors.shape[0]

    def __call__(self, y, *, x, context):
        """(embeddings (batch, length, width), mask (batch, length), positions) -> the same with n + length columns."""
        embedded, mask, positions = y
        rows = jnp.broadcast_to(self.vectors.astype(embedded.dtype), (len(embedded), *self.vectors.shape))
        first = jnp.broadcast_to(jnp.arange(self.n), (len(positions), self.n))
        ones = jnp.ones((len(mask), self.n), mask.dtype)
        pairs = ((rows, embedded), (ones, mask), (first.astype(positions.dtype), positions))
        return tuple(jnp.concatenate(pair, axis=1) for pair in pairs)


def prompt(
    length: int = 20,
    *,
    start: str = "vocabulary",
    ids: Sequence[int] | None = None,
    text: str | None = None,
    bound: float = 0.5,
) -> Method:
    """Trains n vectors before the text: Lester et al. 2021 (arXiv:2104.08691), section 2, `Pr(Y | [P; X])`.

    The text's positions start at n; labels, and what is generated, are of the text alone. Of an encoder-decoder the
    encoder's input gets the prompt.

    Args:
      length: n.
      start: 'vocabulary', embeddings of tokens drawn from the 5,000 first, the most frequent ones, none of them twice;
        or 'random', uniform in ±bound (section 3.2).
      ids: token ids whose embeddings come first, such as the labels' or a text's; the rest starts as `start` says.
      text: a text to start from, in place of `ids`; `with_text_ids` gives its ids, as the command line does.
      bound: of the uniform start.

    Raises:
      ValueError: a length below 1, more ids than that, an unknown start; or, from `init`, an id beyond the table, a
        text without its ids, or a model without a place for a prompt.

    >>> params = {"model": {"wte": {"embedding": jnp.ones((7, 2))}}}
    >>> sites = [Site("model", "input", width=2), Site("model/wte/embedding", "embedding")]
    >>> prompt(3).init(jax.random.key(0), params, sites)["model"]["prompt"].vectors.shape
    (3, 2)
    """
    ids = None if ids is None else plain([*ids])
    arguments = {"length": length, "start": start, "ids": ids, "text": text, "bound": bound}
    check_whole("prompt: length", length)
    if start not in ("vocabulary", "random"):
        raise ValueError(f"prompt: start must be 'vocabulary' or 'random'; got {start!r}")
    if not bound > 0:
        raise ValueError(f"prompt: bound must be above 0; got {bound!r}")
    if ids is not None and (len(ids) > length or not all(map(is_token, ids))):
        raise ValueError(
            f"prompt: ids must be at most {length} numbers of at least 0, the length; got {len(ids)}: {ids[:10]}"
        )

    def init(key, params, sites):
        if text is not None and ids is None:
            raise ValueError(
                "prompt: the text has no token ids yet; write with_text_ids(method, tokenizer), or give ids"
            )
        place, words = where("prompt", params, sites)
        table = get(params, words.path)
        rows = table.shape[0]
        if ids and max(ids) >= rows:
            raise ValueError(f"prompt: there is no token {max(ids)}; the embedding has {rows} rows")
        given = ids or []
        n = length - len(given)
        if start == "random":
            rest = jax.random.uniform(key, (n, place.width), minval=-bound, maxval=bound)
        else:
            most = min(rows, FREQUENT)
            rest = words.scale * take(table, jax.random.choice(key, most, (n,), replace=n > most))
        first = words.scale * take(table, jnp.asarray(given, jnp.int32))
        return update(params, {f"{place.path}/prompt": Prompt(jnp.concatenate([first.astype(rest.dtype), rest]))})

    saved = masks.by_node(Prompt, "vectors", "unused")
    return method("prompt", arguments, init, trainable=masks.by_node(Prompt), saved=saved)


def where(name: str, params: Tree, sites) -> tuple[Site, Site]:
    """The sites of the model's input and of its table of word embeddings."""
    by_kind = {s.kind: s for s in sites}
    if not {"input", "embedding"} <= set(by_kind):
        raise ValueError(f"{name}: the sites must name the model's 'input' and 'embedding'; they are {sorted(by_kind)}")
    return by_kind["input"], by_kind["embedding"]
