"""Trainable tokens: chosen rows of the embedding train, and nothing else."""

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import masks
from ..tree import get
from ..weights import Weight, attend, data_fields, is_node, materialize, node, static, take
from .base import Method, is_token, method, plain, select, wrap


@node
class Tokens(Weight):
    """An embedding with some of its rows replaced; the optimizer's state has the size of `rows`.

    Attributes:
      ids: (k,) in ascending order.
      rows: (k, width), which train.
      only: 'take' where the table is tied to the head and only the look-up is adapted.
    """

    base: Any
    ids: jax.Array
    rows: jax.Array
    only: str | None = static(default=None)
    trains = ("rows",)
    repeats = ("ids", "rows")

    def factors(self):
        """Unit vectors, and by how much each row has moved."""
        self._check_whole()
        ones = jax.nn.one_hot(self.ids, self.shape[0], axis=0, dtype=self.rows.dtype)
        return ones, self.rows - take(self.base, self.ids).astype(self.rows.dtype)

    def _check_whole(self):
        if self.only:
            raise ValueError(
                "these Tokens act on the look-up of a tied embedding only; train with tied_embedding='both'"
            )

    def materialize(self):
        self._check_whole()
        w = materialize(self.base)
        return w.at[self.ids].set(self.rows.astype(w.dtype))

    def take(self, ids):
        slot = jnp.minimum(jnp.searchsorted(self.ids, ids), len(self.ids) - 1)
        old = take(self.base, ids)
        return jnp.where((self.ids[slot] == ids)[..., None], self.rows[slot].astype(old.dtype), old)

    def attend(self, x):
        y = attend(self.base, x)
        return y if self.only == "take" else y.at[..., self.ids].set(attend(self.rows, x))


def _covered(w: Any) -> set[int]:
    """The tokens that the table's nodes replace already, as far as they are known."""
    below = _covered(w.base) if is_node(w) and "base" in data_fields(w) else set()
    return below | {*np.asarray(w.ids).tolist()} if isinstance(w, Tokens) and not isinstance(w.ids, Tracer) else below


def trainable_tokens(ids: Sequence[int] | None = None, *, count: int = 100, tied_embedding: str = "both") -> Method:
    """Trains the embeddings of a few tokens, say new ones; other rows, and their moments, do not exist for it.

    The rows start as they are. As Hugging Face PEFT's method of this name; there is no paper.

    Args:
      ids: of the tokens; default: the `count` most frequent ones of the training batches (`method.observed`).
      count: without `ids`, how many; fewer if the batches have fewer.
      tied_embedding: where the table is also the head, 'both' changes the look-up and the logits, 'take' the look-up
        alone (such an adapter cannot be merged).

    Raises:
      ValueError: no ids, one twice, or one below 0; or, from `init`, one beyond the table or trained already, or
        unobserved batches.

    >>> from peftjax import Site
    >>> params = {"wte": {"embedding": jnp.arange(8.0).reshape(4, 2)}}
    >>> sites = [Site("wte/embedding", "embedding", width=2)]
    >>> new = trainable_tokens([3, 1]).init(jax.random.key(0), params, sites)
    >>> new["wte"]["embedding"].rows.tolist()
    [[2.0, 3.0], [6.0, 7.0]]
    """
    given = None if ids is None else plain([*ids])
    if given is not None and (not given or len({*given}) < len(given) or not all(map(is_token, given))):
        raise ValueError(f"trainable_tokens: ids must be different numbers of at least 0; got {given[:10]}")
    given = None if given is None else sorted(given)
    arguments = {"ids": given, "count": count, "tied_embedding": tied_embedding}
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"trainable_tokens: count must be a whole number of at least 1; got {count!r}")
    if tied_embedding not in ("both", "take"):
        raise ValueError(f"trainable_tokens: tied_embedding must be 'both' or 'take'; got {tied_embedding!r}")

    def put(chosen, key, params, sites, known=True):
        def new(key, w, site):
            if chosen[-1] >= w.shape[0]:
                raise ValueError(f"trainable_tokens: there is no token {chosen[-1]}; {site.path} has {w.shape[0]} rows")
            if known and (twice := _covered(w) & {*chosen}):
                raise ValueError(
                    f"trainable_tokens: token {min(twice)} of {site.path} is trained already, and its second row would "
                    "hide the first; give different ids, or write one trainable_tokens"
                )
            only = "take" if site.tied and tied_embedding == "take" else None
            with jax.ensure_compile_time_eval() if known else nullcontext():  # numbers also where shapes are traced
                at = jnp.asarray(chosen, jnp.int32)
            return Tokens(w, at, take(w, at), only)

        return wrap(key, params, select(params, sites, ["embedding"]), new)

    def init(key, params, sites):
        if given is not None:
            return put(given, key, params, sites)
        table = get(params, select(params, sites, ["embedding"])[0].path)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(table)):  # for shapes only, any ids will do
            return put(range(min(count, table.shape[0])), key, params, sites, known=False)
        how = "method.observed(objective, params, sites, batches)"
        raise ValueError(f"trainable_tokens needs ids, or data before init: {how}")

    def observe(objective, params, sites, batches):
        seen: Counter = Counter()
        for batch in batches:
            there = np.asarray(batch["input_ids"])[np.asarray(batch["attention_mask"]) > 0]
            seen.update(dict(zip(*(x.tolist() for x in np.unique(there, return_counts=True)), strict=True)))
        if not seen:
            raise ValueError("trainable_tokens: the batches hold no token to choose from")
        chosen = sorted(i for i, _ in sorted(seen.items(), key=lambda x: (-x[1], x[0]))[:count])
        return lambda key, params, sites: put(chosen, key, params, sites)

    return method(
        "trainable_tokens",
        arguments,
        init,
        trainable=masks.by_node(Tokens),
        saved=masks.by_node(Tokens, "ids", "rows"),
        observe=observe if given is None else None,
    )
