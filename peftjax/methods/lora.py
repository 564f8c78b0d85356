"""LoRA: low-rank adaptation, with rank-stabilised scaling, dropout and embeddings."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import Tree, matches
from ..weights import Weight, attend, dot, map_nodes, materialize, node, product, static, take
from .base import Method, Site, leaf_key, method, plain, select, wrap


@node
class LoRA(Weight):
    """`W + scale · A B`, never formed in training; `a` is (inputs, r), `b` is (r, outputs).

    Attributes:
      only: 'take' where the weight is an embedding tied to the head and only the look-up is adapted.
      key: the dropout key of this step; without one there is no dropout.
      ratio: B's learning rate over A's, for the optimizer of `lora_plus`.
    """

    base: Any
    a: jax.Array
    b: jax.Array
    key: jax.Array | None = None
    scale: float = static(default=1.0)
    dropout: float = static(default=0.0)
    only: str | None = static(default=None)
    ratio: float = static(default=1.0)
    trains: tuple[str, ...] = static(default=("a", "b"))

    def factors(self):
        check_whole(self)
        return self.a, self.scale * self.b

    def materialize(self):
        return low_rank_sum(self).astype(self.dtype)

    def dot(self, x):
        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return dot(self.base, x) + self.scale * product(product(drop(x, self.key, self.dropout), a), b)

    def take(self, ids):
        rows = take(self.base, ids)
        return rows + (self.scale * product(self.a[ids], self.b)).astype(rows.dtype)

    def attend(self, x):
        y = attend(self.base, x)
        if self.only == "take":
            return y
        return y + self.scale * product(attend(self.b, x), self.a.T.astype(x.dtype))


def low_rank_sum(w: Any) -> jax.Array:
    """`W + scale · A B` of a LoRA or DoRA, in the wider of their dtypes.

    Raises:
      ValueError: it acts on the look-up of a tied embedding only.
    """
    check_whole(w)
    base, change = materialize(w.base), w.scale * (w.a @ w.b)
    wide = max(base.dtype, change.dtype, key=lambda dtype: dtype.itemsize)
    return base.astype(wide) + change.astype(wide)


def check_whole(w: Any) -> None:
    """Raises where a LoRA or DoRA acts on the look-up of a tied embedding only."""
    if w.only:
        raise ValueError(
            f"this {type(w).__name__} acts on the look-up of a tied embedding only, so no single table stands for it; "
            "train with tied_embedding='both' to merge"
        )


def drop(x: jax.Array, key: jax.Array | None, rate: float) -> jax.Array:
    """Inverted dropout; none without a key."""
    if key is None or not rate:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def lora(
    rank: int = 8,
    alpha: float | None = None,
    targets: Sequence[str] = ("query", "value"),
    *,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    rslora: bool = False,
    dropout: float = 0.0,
    tied_embedding: str = "both",
) -> Method:
    """Adds a trainable low-rank product to frozen weights: `h = W x + (alpha / r) B A x`.

    Hu et al. 2022 (arXiv:2106.09685), section 4.1, equation 3. Here weights act from the right, so A is
    (inputs, r) and B is (r, outputs). A starts as the authors' code has it, uniform in ±1/sqrt(inputs); the
    paper says Gaussian. B starts at zero, so the function starts unchanged. For an embedding the roles are
    exchanged, as in the authors' code: A, (rows, r), is zero and B normal. The default targets are the
    paper's.

    Args:
      rank: r, at least 1 and at most the smaller side of each target.
      alpha: the scale's numerator; default: the rank, hence scale 1.
      targets: kinds of site ('query', 'embedding', 'linear' for all linear ones, ...) or path patterns.
      rank_pattern: kind or pattern -> rank, instead of `rank`; the first entry that fits counts.
      alpha_pattern: likewise for alpha.
      rslora: scale by alpha / sqrt(r): Kalajdzievski 2023 (arXiv:2312.03732), theorem 3.2.
      dropout: probability that an input of A is dropped in training.
      tied_embedding: for an embedding that is also the head, 'both' adapts the look-up and the head, 'take'
        the look-up alone (as Hugging Face PEFT does; such an adapter cannot be merged).

    Raises:
      ValueError: an impossible rank or dropout, an unknown `tied_embedding`, or, from `init`, a target or
        pattern that matches nothing, a rank larger than a matrix.

    >>> import jax.numpy as jnp
    >>> params = {"q": {"kernel": jnp.ones((6, 4))}}
    >>> new = lora(rank=2, targets=["q/kernel"]).init(jax.random.key(0), params, ())
    >>> new["q"]["kernel"].a.shape, new["q"]["kernel"].b.shape
    ((6, 2), (2, 4))
    """
    arguments = low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding)

    def new(w, f: Factors):
        return LoRA(w, f.a, f.b, scale=f.scale, dropout=dropout, only=f.only)

    return low_rank("lora", arguments, LoRA, new)


def low_rank_arguments(rank, alpha, targets, rank_pattern, alpha_pattern, rslora, dropout, tied_embedding) -> dict:
    """The arguments of `lora`, which its relatives share, as a spec holds them."""
    return {
        "rank": rank,
        "alpha": alpha,
        "targets": list(targets) if not isinstance(targets, str) else targets,
        "rank_pattern": dict(rank_pattern or {}),
        "alpha_pattern": dict(alpha_pattern or {}),
        "rslora": rslora,
        "dropout": dropout,
        "tied_embedding": tied_embedding,
    }


class Factors(NamedTuple):
    """The start of a low-rank product beside a weight.

    Attributes:
      a: (inputs, r).
      b: (r, outputs).
      scale: alpha / r, or alpha / sqrt(r).
      only: 'take' where only the look-up of a tied embedding is adapted.
      site: of the weight; at an embedding A is zero and B random, elsewhere the other way round.
      key: for what else is drawn.
    """

    a: jax.Array
    b: jax.Array
    scale: float
    only: str | None
    site: Site
    key: jax.Array


def low_rank(name: str, arguments: dict, cls: type, new: Callable[[Any, Factors], Any], **rest) -> Method:
    """The method that puts `new(weight, factors)`, a node of class `cls`, at each target; arguments as `lora`'s.

    Raises:
      ValueError: as `lora` does.
    """
    arguments = plain(arguments)
    rank, alpha, dropout = arguments["rank"], arguments["alpha"], arguments["dropout"]
    for r in (rank, *arguments["rank_pattern"].values()):
        if not isinstance(r, int) or isinstance(r, bool) or r < 1:
            raise ValueError(f"{name}: the rank must be a whole number of at least 1; got {r!r}")
    for value in (1 if alpha is None else alpha, *arguments["alpha_pattern"].values()):
        if isinstance(value, str | bool) or not value > 0:
            raise ValueError(f"{name}: alpha must be a number above 0; got {value!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"{name}: dropout must be in [0, 1); got {dropout}")
    if arguments["tied_embedding"] not in ("both", "take"):
        raise ValueError(f"{name}: tied_embedding must be 'both' or 'take'; got {arguments['tied_embedding']!r}")

    def factors(key, w, site) -> Factors:
        if len(w.shape) != 2 or site.axes is not None:
            raise ValueError(f"{name}: {site.path} has shape {w.shape}; expected a matrix (inputs, outputs)")
        r = _override(arguments["rank_pattern"], site, rank)
        if r > min(w.shape):
            raise ValueError(
                f"{name}: rank {r} is larger than the matrix {site.path} of shape {w.shape}; "
                f"write a rank of at most {min(w.shape)}, or a rank_pattern for this path"
            )
        scale = _override(arguments["alpha_pattern"], site, r if alpha is None else alpha)
        scale = float(scale) / (math.sqrt(r) if arguments["rslora"] else r)  # a numpy scalar would promote bfloat16
        rows, columns = w.shape
        if site.kind.startswith("embedding"):
            a, b = jnp.zeros((rows, r)), jax.random.normal(key, (r, columns))
        else:
            bound = 1 / math.sqrt(rows)
            a, b = jax.random.uniform(key, (rows, r), minval=-bound, maxval=bound), jnp.zeros((r, columns))
        only = "take" if site.tied and arguments["tied_embedding"] == "take" else None
        return Factors(a, b, scale, only, site, jax.random.fold_in(key, 1))

    def init(key, params, sites):
        chosen = select(params, sites, arguments["targets"])
        for pattern in (*arguments["rank_pattern"], *arguments["alpha_pattern"]):
            if not any(_fits(pattern, s) for s in chosen):
                raise ValueError(
                    f"{name}: the pattern {pattern!r} fits none of the targets; they are of kinds "
                    f"{sorted({s.kind for s in chosen})}, such as {chosen[0].path!r}"
                )
        return wrap(key, params, chosen, lambda key, w, site: new(w, factors(key, w, site)))

    def resolve(params, key):
        return write_dropout_keys(params, key, cls)

    return method(name, arguments, init, masks.by_node(cls), resolve=resolve, **rest)


def _fits(pattern: str, site: Site) -> bool:
    return pattern == site.kind or matches(pattern, site.path)


def _override(patterns: Mapping, site: Site, default):
    return next((value for pattern, value in patterns.items() if _fits(pattern, site)), default)


def write_dropout_keys(params: Tree, key: jax.Array | None, cls: type = LoRA) -> Tree:
    """Writes this step's dropout key into every node of the class that drops; a key of None turns dropout off."""

    def visit(path, w):
        if not isinstance(w, cls):
            return w
        stacked = w.a.shape[0] if w.a.ndim == 3 else None
        new = None if key is None or not w.dropout else leaf_key(key, path, stacked)
        return dataclasses.replace(w, key=new)

    return map_nodes(visit, params)
