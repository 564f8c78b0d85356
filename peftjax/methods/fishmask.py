"""FISH Mask: the entries of the base with the largest Fisher information train, wherever they are."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import masks
from ..tree import Tree, combine, flatten, map_with_path, partition
from ..weights import Blocks, Weight, data_fields, is_node, materialize, node, quantized_paths
from .base import Method, Site, method, path_key, replace, select

NOWHERE = np.iinfo(np.int32).max  # an index beyond any array: padding, which the scatter drops


@node
class Sparse(Weight):
    """The base with k of its entries replaced: `indices` (k,) count through the flat base, `values` (k,) train.

    The optimizer's state has the size of `values`. A product forms the dense array and drops it again, so the
    gradient of the dense array exists for a moment; it has the base's dtype, to which the values are rounded. In
    the scanned layout the layers' k may differ: `align` pads them, `trim` takes the padding off.
    """

    base: Any
    indices: jax.Array
    values: jax.Array
    trains = ("values",)
    repeats = ("indices", "values")

    def materialize(self):
        w = materialize(self.base)
        if self.indices.ndim > 1:  # stacked layers
            return jax.vmap(lambda *fields: Sparse(*fields).materialize())(w, self.indices, self.values)
        flat = w.reshape(-1).at[self.indices]
        new = flat.set(self.values.astype(w.dtype), mode="drop", indices_are_sorted=True, unique_indices=True)
        return new.reshape(w.shape)

    def allocated(self):
        """The number of entries."""
        return int((np.asarray(self.indices) < NOWHERE).sum())

    @staticmethod
    def align(nodes: list) -> list:
        """The layers' nodes, or plain arrays, as nodes of one k: the largest."""
        first = next(n for n in nodes if isinstance(n, Sparse))
        none = [x if _no_array(x) else x[:0] for x in (first.indices, first.values)]
        nodes = [n if isinstance(n, Sparse) else Sparse(n, *none) for n in nodes]
        k = max((len(x) for n in nodes for x in (n.indices, n.values) if not _no_array(x)), default=0)
        pad = functools.partial(_pad, k=k)
        return [dataclasses.replace(n, indices=pad(n.indices, NOWHERE), values=pad(n.values, 0)) for n in nodes]

    def trim(self, like: "Sparse") -> Any:
        """Without padding, which the indices of `like` tell; where nothing else is left, the base alone."""
        if _no_array(like.indices) or isinstance(like.indices, Tracer):
            return self
        k = int((np.asarray(like.indices) < NOWHERE).sum())
        return dataclasses.replace(self, indices=_cut(self.indices, k), values=_cut(self.values, k)) if k else self.base


def _no_array(x: Any) -> bool:
    """A hole of a partition, or an entry of a mask."""
    return x is None or isinstance(x, bool | np.bool_)


# Outside of a trace these two are numpy's, which compiles nothing for every k.


def _pad(x: Any, fill: int, k: int) -> Any:
    if _no_array(x):
        return x
    return (jnp if isinstance(x, Tracer) else np).pad(x, (0, k - len(x)), constant_values=fill)


def _cut(x: Any, k: int) -> Any:
    if _no_array(x):
        return x
    return x[:k] if isinstance(x, Tracer) else jnp.asarray(np.asarray(x)[:k])


def fisher(
    objective: Callable,
    params: Tree,
    batches: Iterable[dict],
    samples: int = 1024,
    mask: masks.Mask = masks.everything,
) -> Tree:
    """The diagonal of the empirical Fisher information: `F_i = 1/N Σ_n (∂ log p(y_n | x_n) / ∂θ_i)²`.

    Sung et al. 2021 (arXiv:2111.09839), section 3, equations 3 and 4 with the true labels. One example at a
    time, without dropout, as in the authors' code.

    Args:
      objective: (params, batch, None) -> (sum of losses, sum of weights); of one row, the first is
        -log p(y|x), up to constants (so a squared error will do).
      batches: dicts of arrays with the examples along the first axis. A row whose weight is 0 is no example.
      samples: N; if the batches hold fewer examples, all of them.
      mask: which leaves are scored.

    Returns:
      float32 scores in the structure of `params`, holes where the mask is False.

    Raises:
      ValueError: there is no example, or a gradient is not finite.

    >>> def squares(params, batch, key):
    ...     return ((batch["x"] @ params["w"] - batch["y"]) ** 2).sum(), jnp.float32(len(batch["y"]))
    >>> batch = {"x": jnp.eye(2), "y": jnp.array([1.0, 3.0])}
    >>> fisher(squares, {"w": jnp.zeros(2)}, [batch])["w"].tolist()
    [2.0, 18.0]
    """
    wanted, rest = partition(params, mask(params))

    def add(carry, wanted, rest, batch):
        def row(carry, one):
            total, n = carry
            one = jax.tree.map(lambda x: x[None], one)
            loss = jax.grad(lambda t: objective(combine(t, rest), one, None), has_aux=True)
            grads, weight = loss(wanted)
            counts = (weight > 0) & (n < samples)
            squares = jax.tree.map(lambda g: jnp.square(g.astype(jnp.float32)), grads)
            total = jax.tree.map(lambda s, q: s + jnp.where(counts, q, 0.0), total, squares)
            return (total, n + counts.astype(jnp.int32)), None

        return jax.lax.scan(row, carry, batch)[0]

    # On a GPU sums vary from run to run, and a run that resumes must choose the same entries.
    options: dict = {"xla_gpu_deterministic_ops": True} if jax.default_backend() == "gpu" else {}
    add = jax.jit(add, donate_argnums=0, compiler_options=options)
    carry = (jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), wanted), jnp.int32(0))
    for batch in batches:
        carry = add(carry, wanted, rest, batch)
        if int(carry[1]) >= samples:
            break
    total, n = carry
    if not int(n):
        raise ValueError(
            "the Fisher information needs at least one example with a weight above 0; the batches had none"
        )
    if bad := [p for p, x in flatten(total).items() if not bool(jnp.isfinite(x).all())]:
        raise ValueError(f"the gradient is not finite at {bad[:5]} ({len(bad)} leaves); look at the data and the base")
    return jax.tree.map(lambda x: x / n, total)


def fishmask(
    fraction: float = 0.005,
    samples: int = 1024,
    *,
    count: int | None = None,
    targets: Sequence[str] | None = None,
    score: str = "fisher",
) -> Method:
    """Trains the k entries of the base with the largest Fisher information, chosen over all leaves together.

    Sung et al. 2021 (arXiv:2111.09839), section 3: the mask is fixed before training. As in the authors'
    code k is `int(fraction · all parameters) - parameters of the task head`, since the head trains whole (chain
    `head`) and is part of the budget; any other leaf may be chosen from, embeddings and pooler too. The authors train
    without weight decay; here it acts on the chosen entries, as on what other methods train.

    The choice needs data before `init`: `method.observed(objective, params, sites, batches)`, which
    `peftjax.run` calls with the training set. Of abstract parameters (`jax.eval_shape`) there is nothing to
    choose by: k is spread over the leaves in proportion to their sizes, which gives the right totals. The choice
    costs N gradients of one example, and the memory of two float32 copies of the candidates.

    Args:
      fraction: share of all parameters of the model, whatever the targets.
      samples: examples that the Fisher information is estimated from (`fisher`).
      count: k itself, instead of `fraction`.
      targets: kinds of site or path patterns to choose from; default: every floating leaf but the task head's.
      score: 'fisher', or 'random' for k entries drawn uniformly, the paper's baseline, which needs no data.

    Raises:
      ValueError: an impossible argument; or, from `init`, a k below 1 or above the number of candidates, a
        leaf that another method rewrote, or that `observed` was not called.

    >>> params = {"w": jnp.array([[3.0, 1.0], [0.0, 2.0]]), "b": jnp.zeros(2)}
    >>> def loss(params, batch, key):
    ...     return (params["w"] ** 2).sum() * batch["weight"].sum(), batch["weight"].sum()
    >>> m = fishmask(count=2).observed(loss, params, (), [{"weight": jnp.ones(1)}])
    >>> new = m.init(jax.random.key(0), params, ())
    >>> new["w"].indices.tolist(), new["w"].values.tolist(), new["b"].tolist()
    ([0, 3], [3.0, 2.0], [0.0, 0.0])
    """
    arguments = {
        "fraction": fraction,
        "samples": samples,
        "count": count,
        "targets": targets if targets is None or isinstance(targets, str) else list(targets),
        "score": score,
    }
    if isinstance(fraction, str | bool) or not 0 < fraction <= 1:
        raise ValueError(f"fishmask: fraction must be a number above 0 and at most 1; got {fraction!r}")
    for name, value in (("samples", samples), ("count", 1 if count is None else count)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"fishmask: {name} must be a whole number of at least 1; got {value!r}")
    if score not in ("fisher", "random"):
        raise ValueError(f"fishmask: score must be 'fisher' or 'random'; got {score!r}")

    def choices(params, sites) -> tuple[dict[str, Candidate], int]:
        """The arrays to choose from, and k."""
        sites = tuple(sites)
        candidates = _candidates(params, sites, targets)
        k = _budget(params, sites, fraction) if count is None else count
        n = sum(math.prod(c.array.shape) for c in candidates.values())
        if k > n:
            raise ValueError(
                f"fishmask: {k:,} entries are to train, but the targets have {n:,}; write a smaller number"
            )
        return candidates, k

    def init(key, params, sites):
        candidates, k = choices(params, sites)
        if any(isinstance(c.array, Tracer) for c in candidates.values()):
            return spread(params, candidates, k)
        if score == "fisher":
            raise ValueError(
                "fishmask needs data before init: write method = method.observed(objective, params, sites, batches) "
                "first, or choose with score='random'"
            )
        bits = {p: np.asarray(jax.random.bits(path_key(key, p), c.array.shape)) for p, c in candidates.items()}
        return put_sparse(params, candidates, largest(bits, k))

    def observe(objective, params, sites, batches):
        candidates, k = choices(params, sites)
        paths = {c.site.path for c in candidates.values()}
        scores = fisher(objective, params, batches, samples, lambda tree: map_with_path(lambda p, _: p in paths, tree))
        whole = {p: np.asarray(x) for p, x in flatten(scores).items()}
        chosen = largest({p: c.site.columns(whole[c.site.path]) for p, c in candidates.items()}, k)
        shapes = {p: candidates[p].array.shape for p in chosen}

        def init(key, params, sites):
            there = _candidates(params, tuple(sites), targets)
            if other := [p for p in chosen if p not in there or there[p].array.shape != shapes[p]]:
                raise ValueError(f"fishmask: {other[0]} is not what it was when the method observed; observe again")
            return put_sparse(params, there, chosen)

        return init

    return method(
        "fishmask",
        arguments,
        init,
        trainable=masks.by_node(Sparse),
        saved=masks.by_node(Sparse, "indices", "values"),
        observe=observe if score == "fisher" else None,
    )


class Candidate(NamedTuple):
    """An array that entries may be chosen from: a leaf, or the part of a fused one that a site means."""

    site: Site
    array: Any


def _candidates(params: Tree, sites: tuple[Site, ...], targets: Sequence[str] | None) -> dict[str, Candidate]:
    """What entries may be chosen from, by path."""
    leaves = flatten(params, is_leaf=is_node)
    if targets is None:
        heads = _heads(sites)
        weights = {p: x for p, x in leaves.items() if isinstance(x, Weight) or not is_node(x)}
        floating = {p: x for p, x in weights.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        chosen = [Site(p, "weight") for p in floating if p.rpartition("/")[0] not in heads]
    else:
        chosen = select(params, sites, targets)
    found = {}
    for site in chosen:
        x = leaves.get(site.path)
        if site.part and isinstance(x, Blocks):
            x = x.blocks[site.part]
        elif x is not None and not is_node(x):
            x = site.columns(x)
        if x is not None and quantized_paths(x):
            raise ValueError(
                f"fishmask: the base is quantised ({site.path}), and codes cannot train one by one; load it without "
                "quantize, or give targets that are not quantised, such as ['embedding', '.*/bias']"
            )
        if isinstance(x, Weight):
            wraps = "base" in data_fields(x)
            first = ", or put fishmask first, so that the other method wraps what it leaves" if wraps else ""
            raise ValueError(
                f"fishmask: {site.path} is already a {type(x).__name__}; give fishmask targets without it{first}"
            )
        if x is None or is_node(x) or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"fishmask: {site.path} is no floating array; target weights, such as 'query' or '.*/bias'"
            )
        found[f"{site.path}/{site.part}" if site.part else site.path] = Candidate(site, x)
    return found


def _heads(sites: Iterable[Site]) -> set[str]:
    return {s.module for s in sites if s.kind == "head"}


def _budget(params: Tree, sites: Iterable[Site], fraction: float) -> int:
    heads = _heads(sites)
    leaves = flatten(params, is_leaf=is_node)
    sizes = {p: math.prod(x.shape) for p, x in leaves.items() if isinstance(x, Weight) or not is_node(x)}
    total, head = sum(sizes.values()), sum(n for p, n in sizes.items() if p.rpartition("/")[0] in heads)
    k = int(fraction * total) - head
    if k < 1:
        raise ValueError(
            f"fishmask: {fraction:g} of {total:,} parameters is {int(fraction * total):,}, which leaves nothing beside "
            f"the task head's {head:,}; write a larger fraction, or the number of entries as count"
        )
    return k


def largest(scores: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """The flat indices of the k largest entries over all leaves, ascending; of equal ones, the first.

    A pool of the scores is all the memory this takes: no index of all entries is ever sorted.
    """
    pool = np.concatenate([x.reshape(-1) for x in scores.values()])
    pool.partition(len(pool) - k)
    least = pool[len(pool) - k]
    room = k - int((pool > least).sum())
    del pool
    chosen = {}
    for path, x in scores.items():
        equal = np.flatnonzero(x == least)[:room]
        room -= len(equal)
        found = np.sort(np.concatenate([np.flatnonzero(x > least), equal]))
        if len(found):
            chosen[path] = found
    return chosen


def put_sparse(params: Tree, candidates: Mapping[str, Candidate], chosen: Mapping[str, np.ndarray]) -> Tree:
    """Puts a node at every leaf, or part of one, with a chosen entry; its values start as the base's."""

    def new(path, w):
        if w.size > NOWHERE:
            raise ValueError(f"fishmask: {path} has {w.size:,} entries, more than 32-bit indices count; leave it out")
        flat = w.reshape(-1) if isinstance(w, Tracer) else np.asarray(w).reshape(-1)
        return Sparse(w, jnp.asarray(chosen[path], jnp.int32), jnp.asarray(flat[chosen[path]]))

    return replace(params, {p: (candidates[p].site, new(p, candidates[p].array)) for p in chosen}.values())


def spread(params: Tree, candidates: Mapping[str, Candidate], k: int) -> Tree:
    """k entries in proportion to the sizes, by largest remainders. For shapes only: the values are NaN."""
    sizes = {p: math.prod(c.array.shape) for p, c in candidates.items()}
    total = sum(sizes.values())
    parts = {p: k * n // total for p, n in sizes.items()}
    for p in sorted(sizes, key=lambda p: -(k * sizes[p] % total))[: k - sum(parts.values())]:
        parts[p] += 1
    nodes = []
    for p, n in parts.items():
        w = candidates[p].array
        if n:
            nodes.append((candidates[p].site, Sparse(w, jnp.arange(n), jnp.full(n, jnp.nan, w.dtype))))
    return replace(params, nodes)
