"""Adapter arithmetic: what adapters really change, and sums, prunings and low-rank forms of that.

The *true update* of an adapter is what merging it would add to each array of the base: path -> change. Where that is a
product of two small factors it stays one. All else here is arithmetic on such updates, in float32 on the host, and
`adapter` makes an ordinary adapter of the result, which trains, saves and merges as any other.

>>> from peftjax import hub
>>> from peftjax.methods import lora, vera
>>> model = hub.load("tiny-books")
>>> one, two = (m.init(jax.random.key(0), model.params, model.sites) for m in (lora(rank=2), vera(rank=3)))
>>> both = combine_updates([updates(model, one), updates(model, two)], [1.0, -0.5])
>>> made = adapter(model, both)
>>> made.method.spec[0][1]["rank"], made.method.spec[0][1]["targets"]
(5, ['model/layers_\\\\d+/self_attn/q_proj/kernel', 'model/layers_\\\\d+/self_attn/v_proj/kernel'])
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .hub import Model
from .layout import unstack_layers
from .methods import Method, bitfit, chain, full, lora
from .methods.base import path_key
from .methods.fishmask import largest
from .methods.lora import LoRA
from .tree import Tree, cast, flatten, nearest, patterns, update
from .weights import (
    Blocks,
    Trained,
    Weight,
    data_fields,
    is_node,
    is_quantized,
    map_nodes,
    materialize,
    quantized_paths,
    static_fields,
)

WAYS = ("sum", "ties", "dare", "dare-ties", "prune")
ELECTIONS = ("total", "frequency")


class Product(NamedTuple):
    """The change `a @ b`: `a` is (inputs, r), `b` is (r, outputs)."""

    a: np.ndarray
    b: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.a), self.b.shape[1]

    @property
    def rank(self) -> int:
        return len(self.b)


Update = Product | np.ndarray
Updates = dict[str, Update]  # path of an array of the base -> its change


def dense(change: Update) -> np.ndarray:
    """The change as one array, float32."""
    return change.a @ change.b if isinstance(change, Product) else change


# What an adapter changes


def updates(base: Model | Tree, params: Tree) -> Updates:
    """What the adapter in `params` adds to each array of the base, as merging would; what stays is left out.

    LoRA and its relatives, whatever they are nested in, give a `Product` (of a fused weight, with the parts' columns
    in their place); all else gives arrays. A base in bfloat16 or quantised is widened to float32 first: the change is
    then that of the dequantised weight, not rounded as merging would round it.

    Args:
      base: the model, or its parameters alone. A task head that was drawn for the model (`Model.fresh`) is nothing that
        anyone else has: its update counts from zero.
      params: adapted, per-layer or stacked, resolved (`method.resolve(params, None)`; what `load_adapter` gives is).

    Raises:
      ValueError: what no weight can hold (a prefix, an adapter, the look-up of a tied embedding alone), or another
        base; the message names the path.
    """
    model = base if isinstance(base, Model) else None
    fresh = frozenset() if model is None else frozenset(model.fresh)
    return dict(_changes(base if model is None else model.params, params, fresh))


def _changes(base: Tree, params: Tree, fresh: Collection[str]) -> Iterator[tuple[str, Update]]:
    base, params = unstack_layers(base), unstack_layers(params)
    there = flatten(base, is_leaf=is_node)
    seen = set()
    _refuse_hooks(params)
    for path, w in _leaves("", params):
        old = there.get(path)
        seen.add(path)
        if old is None and not _is_new_bias(path, there):
            raise ValueError(
                f"no arithmetic with {path}: the base has no such array; the nearest are {nearest(path, there)}. "
                "Resolve the parameters first, and keep what is no change of a weight as an adapter file"
            )
        if old is not None and tuple(w.shape) != tuple(old.shape):
            raise ValueError(f"{path} has shape {tuple(w.shape)}, the base's has {tuple(old.shape)}: another base")
        try:
            change = _wide_array(w) if path in fresh else _change(w, old)
        except ValueError as e:
            raise ValueError(f"no arithmetic with {path}: {e}") from e
        if change is not None:
            yield path, change
    if missing := [p for p in there if p not in seen]:
        raise ValueError(f"the parameters lack {missing[:3]} ({len(missing)} in all), which the base has: another base")


def _refuse_hooks(params: Tree) -> None:
    """Raises where a hook cannot be folded; of several, the message names the deepest."""
    hooks = {p: n for p, n in flatten(params, is_leaf=is_node).items() if is_node(n) and not isinstance(n, Weight)}
    if found := [p for p, n in hooks.items() if getattr(type(n), "fold", None) is None]:
        path = max(found, key=lambda p: p.count("/"))
        raise ValueError(
            f"no arithmetic with {path}: {type(hooks[path]).__name__} computes what no weight of the base can hold; "
            "keep it as an adapter file"
        )


def _is_new_bias(path: str, there: Mapping) -> bool:
    module, _, name = path.rpartition("/")
    return name == "bias" and f"{module}/kernel" in there


def _leaves(path: str, tree: Mapping) -> Iterator[tuple[str, Any]]:
    """Path and what stands there, with the hooks beside it folded in, of every array and weight."""
    hooks = {k: v for k, v in tree.items() if is_node(v) and not isinstance(v, Weight)}
    rest = {k: v for k, v in tree.items() if k not in hooks}
    before = {k: v if isinstance(v, Mapping) else _wide(v) for k, v in rest.items()} if hooks else rest
    after = before
    for name, hook in hooks.items():
        try:
            after = dict(type(hook).fold(_wide(hook), after))
        except ValueError as e:
            raise ValueError(f"no arithmetic with {path}{name}: {e}") from e
    for k, v in after.items():
        stays = k in rest and v is before[k]
        if isinstance(v, Mapping):
            yield from _leaves(f"{path}{k}/", v)
        else:
            yield path + k, rest[k] if stays else v


def _change(w: Any, base: Any) -> Update | None:
    """What w adds to the base's array or node; None where that is nothing and no method asked for it."""
    if w is base:
        return None
    if isinstance(w, Blocks):
        there = {name: None if base is None else w.piece(base, name) for name in w.blocks}
        return _side_by_side(w, {name: _change(x, there[name]) for name, x in w.blocks.items()})
    wide = _wide(w)
    factors = wide.compact().factors() if isinstance(wide, Weight) else None
    if factors is not None:
        own = Product(*(np.asarray(x, np.float32) for x in factors))
        below = _change(w.base, base)
        return _add([(1.0, x) for x in (below, own) if x is not None and not _is_nothing(x)])
    new = _wide_array(w)
    change = new if base is None else new - _wide_array(base)
    plain = not is_node(w) or is_quantized(w)
    return None if plain and base is not None and not change.any() else change


def _is_nothing(change: Update) -> bool:
    return isinstance(change, Product) and not change.rank


def _side_by_side(w: Blocks, parts: Mapping[str, Update | None]) -> Update | None:
    """The change of a fused array from those of its parts: their ranks add, since each has its own columns."""
    there = {name: x for name, x in parts.items() if x is not None}
    if not there:
        return None
    width = w.columns[-1][2]
    if all(isinstance(x, Product) for x in there.values()):
        padded = []
        for name, first, end in w.columns:
            if isinstance(x := there.get(name), Product):
                b = np.zeros((x.rank, width), np.float32)
                b[:, first:end] = x.b
                padded.append((1.0, Product(x.a, b)))
        return _add(padded)
    out = np.zeros(w.shape, np.float32)
    for name, first, end in w.columns:
        if name in there:
            out[..., first:end] = dense(there[name])
    return out


def _wide(x: Any) -> Any:
    """An array or a node with all that is floating in float32, and codes that stand for float32."""

    def visit(_, n):
        return dataclasses.replace(n, to="float32") if is_quantized(n) and "to" in static_fields(n) else n

    return map_nodes(visit, cast(x, jnp.float32))


def _wide_array(w: Any) -> np.ndarray:
    return np.asarray(materialize(_wide(w)), np.float32)


# Sums of updates


def combine_updates(
    changes: Sequence[Mapping[str, Update]],
    weights: Sequence[float],
    how: str = "sum",
    *,
    density: float | None = None,
    elect: str = "total",
    seed: int = 0,
    exempt: Collection[str] = (),
) -> Updates:
    """One update of several, each with its weight; below zero it is subtracted.

    - 'sum': `Σ_i w_i τ_i`, task arithmetic: Ilharco et al. 2023 (arXiv:2212.04089), section 2. Products stay products
      whose ranks add, so it is exact; it is Hugging Face PEFT's 'cat' and, compressed by `adapter`, its 'svd'.
    - 'ties': Yadav et al. 2023 (arXiv:2306.01708), section 4: trim each τ_i to the share `density` with the largest
      magnitudes, elect a sign for each entry, and take the mean of those that have it.
    - 'dare': Yu et al. 2024 (arXiv:2311.03099), section 3.2: keep each entry with probability `density` (1 - p of the
      paper), times 1 / density; then the sum.
    - 'dare-ties': the same drawing, then election and mean.
    - 'prune': trim as TIES does, then the sum.

    All but 'sum' give dense arrays: they act on entries, and on the true updates. Hugging Face PEFT's 'linear', 'ties',
    'dare_linear', 'dare_ties' and 'magnitude_prune' act on A and on B and multiply afterwards, `(Σ w A_i)(Σ w B_i)`,
    which has the terms `A_i B_j` that no adapter ever had, and depends on how a product was split in two; its `*_svd`
    ways act on the true update, as here. As in the paper the trimming is over the whole update of an adapter (all
    entries of the arrays that it changes), where PEFT trims matrix by matrix. TIES weighs the updates before the
    election, so that a negative weight votes against; with equal positive weights λ it is the paper's `λ τ_m`.

    Args:
      changes: from `updates`, over one base.
      density: share of the entries that is kept, in (0, 1].
      elect: the sign of the sum, or 'frequency', the sign of more adapters (where as many have each, of the sum).
      seed: of what DARE drops.
      exempt: paths that are summed whatever `how`: task heads that count from zero, `Model.fresh`.

    Raises:
      ValueError: no updates; not one weight for each, or one that is no finite number; an unknown way; a density that
        is out of range, missing, or given to 'sum'; shapes that differ at a path.
    """
    check_choices(len(changes), weights, how, density, elect)
    pairs = list(zip(weights, changes, strict=True))
    paths = list(dict.fromkeys(p for c in changes for p in c))
    for path in paths:
        shapes = {tuple(c[path].shape) for c in changes if path in c}
        if len(shapes) > 1:
            raise ValueError(f"the updates of {path} have the shapes {sorted(shapes)}; they are of different bases")
    if how == "sum":
        return {p: _add([(w, c[p]) for w, c in pairs if p in c]) for p in paths}
    assert density is not None  # else it was refused
    whole = {p: _add([(w, c[p]) for w, c in pairs if p in c]) for p in paths if p in exempt}
    parts = [{p: x for p, x in c.items() if p not in exempt} for c in changes]
    if how.startswith("dare"):
        keys = [jax.random.fold_in(jax.random.key(seed), i) for i in range(len(parts))]
        parts = [drop(c, density, key) for c, key in zip(parts, keys, strict=True)]
    else:
        parts = [trim(c, density) for c in parts]
    out: Updates = {}
    for path in paths:
        if path in whole:
            out[path] = whole[path]
            continue
        there = [np.float32(w) * c[path] for w, c in zip(weights, parts, strict=True) if path in c]
        out[path] = _elected_mean(np.stack(there), elect) if how.endswith("ties") else np.sum(there, axis=0)
    return out


def check_choices(n: int, weights: Sequence[float], how: str, density: float | None, elect: str) -> None:
    """Raises as `combine_updates` does, before any of n updates is there."""
    if not n:
        raise ValueError("there is nothing to combine; give the updates of at least one adapter")
    if len(weights) != n:
        raise ValueError(f"there are {n} adapters and {len(weights)} weights; give one weight for each")
    if wrong := [w for w in weights if isinstance(w, str | bool) or not math.isfinite(w)]:
        raise ValueError(f"a weight must be a finite number, such as 0.5 or -1; got {wrong[0]!r}")
    if how not in WAYS:
        raise ValueError(
            f"there is no way {how!r} to combine; there are {', '.join(WAYS)} ('sum' is exact, and with a rank or "
            "energy is what others call 'svd')"
        )
    if elect not in ELECTIONS:
        raise ValueError(f"elect must be one of {', '.join(ELECTIONS)}; got {elect!r}")
    if how == "sum" and density is not None:
        raise ValueError(f"'sum' keeps all entries; leave density={density} out, or choose another way")
    if how != "sum":
        _check_density(density, how)


def _check_density(density: Any, how: str) -> None:
    if density is None or isinstance(density, str | bool) or not 0 < density <= 1:
        raise ValueError(f"{how}: density, the share of entries to keep, must be in (0, 1]; got {density}")


def _add(terms: Sequence[tuple[float, Update]]) -> Any:
    """The weighted sum; a product if all of them are. None of nothing."""
    if not terms:
        return None
    if all(isinstance(x, Product) for _, x in terms):
        a = [x.a for _, x in terms if isinstance(x, Product)]
        b = [np.float32(w) * x.b for w, x in terms if isinstance(x, Product)]
        return Product(np.concatenate(a, axis=1), np.concatenate(b, axis=0))
    return np.sum([np.float32(w) * dense(x) for w, x in terms], axis=0)


def trim(change: Mapping[str, Update], density: float) -> dict[str, np.ndarray]:
    """The share of all entries with the largest magnitudes, the rest zero; one at least stays, of equal ones the first.

    >>> trim({"w": np.array([[3.0, -1.0]]), "v": np.array([-2.0, 0.5])}, 0.5)
    {'w': array([[3., 0.]]), 'v': array([-2.,  0.])}
    """
    _check_density(density, "trim")
    arrays = {p: dense(x) for p, x in change.items()}
    n = sum(x.size for x in arrays.values())
    kept = largest({p: np.abs(x) for p, x in arrays.items()}, max(1, int(density * n))) if n else {}
    out = {}
    for path, x in arrays.items():
        flat, at = np.zeros(x.size, x.dtype), kept.get(path, np.zeros(0, np.int64))
        flat[at] = x.reshape(-1)[at]
        out[path] = flat.reshape(x.shape)
    return out


def drop(change: Mapping[str, Update], density: float, key: jax.Array) -> dict[str, np.ndarray]:
    """Each entry kept with probability `density` and divided by it, else zero: what is expected of it stays."""
    _check_density(density, "drop")

    def one(path, x):
        kept = np.asarray(jax.random.bernoulli(path_key(key, path), float(density), x.shape))
        return np.where(kept, x / np.float32(density), np.float32(0))

    return {path: one(path, dense(x)) for path, x in change.items()}


def _elected_mean(terms: np.ndarray, elect: str) -> np.ndarray:
    """(adapters, ...) -> the mean of the entries whose sign is the elected one; zeros have none."""
    total = np.sign(terms.sum(0))
    sign = total if elect == "total" else np.sign(np.sign(terms).sum(0))
    sign = np.where(sign == 0, total, sign)
    agree = (np.sign(terms) == sign) & (terms != 0)
    return (terms * agree).sum(0) / np.maximum(agree.sum(0), 1).astype(np.float32)


# Low-rank forms


class Kept(NamedTuple):
    """What a matrix's low-rank form keeps of its change.

    Attributes:
      rank: of the form.
      energy: share of the sum of squared entries.
      error: the largest singular value left out, the spectral norm of the error; no entry errs by more.
    """

    rank: int
    energy: float
    error: float


def compress(change: Update, rank: int | None = None, energy: float | None = None) -> tuple[Product | None, Kept]:
    """The nearest product of a rank (Eckart and Young 1936), the square root of the singular values in either factor.

    A `Product` is taken apart by QR of its factors and an SVD of an (r, r) matrix: no dense one is formed.

    Args:
      rank: at most this; default: what is numerically there.
      energy: the smallest rank that keeps this share of the sum of squares.

    Returns:
      The product, or None where nothing changes; and what it keeps.

    Raises:
      ValueError: a rank below 1, an energy not in (0, 1], a change that is not finite or no matrix.

    >>> change, kept = compress(np.diag(np.array([3.0, 1.0], np.float32)), energy=0.9)
    >>> change.rank, round(kept.energy, 3), round(kept.error, 3)
    (1, 0.9, 1.0)
    """
    _check_form(rank, energy)
    if len(change.shape) != 2:
        raise ValueError(f"a change of shape {change.shape} is no matrix and has no low-rank form")
    u, s, v = _svd(change)
    if not np.isfinite(s).all():
        raise ValueError("the change is not finite")
    there = int((s > 8 * np.finfo(np.float32).eps * s[:1]).sum())  # below, only the rounding of float32 is left
    if not there:
        return None, Kept(0, 1.0, 0.0)
    shares = np.cumsum(np.square(s, dtype=np.float64))
    shares /= shares[-1]
    r = there if energy is None or energy == 1 else min(there, int((shares < energy).sum()) + 1)
    r = r if rank is None else min(r, rank)
    root = np.sqrt(s[:r])
    left_out = float(s[r]) if r < there else 0.0
    share = float(shares[r - 1]) if r < there else 1.0
    return Product(u[:, :r] * root, root[:, None] * v[:r]), Kept(r, share, left_out)


def _svd(change: Update) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with jax.default_matmul_precision("highest"):
        if isinstance(change, Product):
            qa, ra = jnp.linalg.qr(change.a)
            qb, rb = jnp.linalg.qr(change.b.T)
            u, s, v = jnp.linalg.svd(ra @ rb.T, full_matrices=False)
            u, v = qa @ u, v @ qb.T
        else:
            u, s, v = jnp.linalg.svd(change, full_matrices=False)
    return np.asarray(u), np.asarray(s), np.asarray(v)


def _check_form(rank: Any, energy: Any) -> None:
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1; got {rank!r}")
    if energy is not None and (isinstance(energy, str | bool) or not 0 < energy <= 1):
        raise ValueError(f"energy, the share of the sum of squares to keep, must be in (0, 1]; got {energy!r}")


# Adapters of updates


class Combined(NamedTuple):
    """An adapter made of updates; `save_adapter(file, model, made.method, made.params)` writes it.

    Attributes:
      params: the base's with LoRA nodes of scale 1 and `Trained` arrays in it, per-layer.
      method: the chain of `lora` and `full` (and `bitfit`, where biases were created) that trains it on.
      kept: path of each LoRA -> what it keeps of the change.
    """

    params: Tree
    method: Method
    kept: dict[str, Kept]

    @property
    def energy(self) -> float:
        """The smallest share of the sum of squares that a matrix keeps."""
        return min((k.energy for k in self.kept.values()), default=1.0)

    @property
    def error(self) -> float:
        """The largest error of a matrix, in spectral norm."""
        return max((k.error for k in self.kept.values()), default=0.0)


def adapter(
    model: Model, changes: Mapping[str, Update], rank: int | None = None, energy: float | None = None
) -> Combined:
    """An ordinary adapter that makes these changes: products as LoRAs of scale 1, other arrays whole, as `full` trains.

    Args:
      changes: path -> change, from `updates` or `combine_updates`.
      rank: of every matrix but task heads, at most: what is a product of no larger rank stays exact, all else is
        compressed (`compress`). At most the smaller side of the largest matrix; of a smaller one, all there is.
      energy: the share of each matrix's sum of squares to keep; 1: all. With a rank, both hold.

    Raises:
      ValueError: nothing changes; an impossible rank or energy; a path or shape that the base does not have; a
        change of a quantised weight that is no product, without rank or energy.
    """
    return _adapter(model, changes.items(), rank, energy)


def to_lora(model: Model, params: Tree, rank: int | None = None, energy: float | None = None) -> Combined:
    """Any adapter that can be merged, as plain LoRAs of scale 1: exact where its change is a product.

    Products of a rank above a matrix's smaller side are written with that rank, also exactly. What is no product (DoRA,
    IA3, full fine-tuning) needs a rank or an energy; biases, norms and task heads stay whole arrays.

    Args: as for `updates` and `adapter`.

    Raises:
      ValueError: as `updates` and `adapter` do; or there is neither, and a matrix's change is no product.
    """
    changes = updates(model, params)
    if rank is None and energy is None:
        for path, x in changes.items():
            if not isinstance(x, Product) and x.ndim == 2 and path.rpartition("/")[0] not in _heads(model):
                raise ValueError(f"to_lora: the change of {path} is no low-rank product; write rank=, or energy=0.99")
    return _adapter(model, changes.items(), rank, energy)


def difference(base: Model, tuned: Model, rank: int | None = None, energy: float | None = None) -> Combined:
    """What tuning changed of a model, as an adapter of the base: low-rank by `compress`, other changed arrays whole.

    Args:
      tuned: the base's architecture with other parameters.
      rank, energy: as for `adapter`; without either, all changed arrays are kept whole.

    Raises:
      ValueError: the models differ in more than parameters, or in none; or as `adapter` does.
    """
    here, there = base.config._asdict(), tuned.config._asdict()
    names = [m.hf_config.architectures[0] for m in (base, tuned)]
    if names[0] != names[1] or here.keys() != there.keys():
        raise ValueError(f"difference: the base is a {names[0]} and the tuned model a {names[1]}; they must be alike")
    if unlike := sorted(k for k in here if here[k] != there[k]):
        said = "; ".join(f"{k} {here[k]!r} and {there[k]!r}" for k in unlike[:5])
        raise ValueError(f"difference: the configs of the base and of the tuned model differ: {said}")
    if tuned.fresh:
        raise ValueError(f"difference: the tuned model's {list(tuned.fresh)} are in no file; nothing was tuned there")
    return _adapter(base, _changes(base.params, tuned.params, frozenset(base.fresh)), rank, energy)


def _adapter(model: Model, changes: Iterable[tuple[str, Update]], rank: int | None, energy: float | None) -> Combined:
    """One change after the other, so that all of them need not be in memory."""
    _check_form(rank, energy)
    base, heads = flatten(unstack_layers(model.params), is_leaf=is_node), _heads(model)
    new: dict[str, Any] = {}
    kept: dict[str, Kept] = {}
    created, sides = [], []
    for path, change in changes:
        w = base.get(path)
        if w is None and not _is_new_bias(path, base):
            raise ValueError(f"the base has no {path}; the nearest paths are {nearest(path, base)}")
        if w is not None and tuple(w.shape) != tuple(change.shape):
            raise ValueError(f"the change of {path} has shape {tuple(change.shape)}, the base's array {tuple(w.shape)}")
        form: Update | None = change
        if isinstance(change, Product) or (change.ndim == 2 and path.rpartition("/")[0] not in heads):
            sides.append(min(change.shape))
            try:
                form, how = _form(change, rank, energy)
            except ValueError as e:
                raise ValueError(f"{path}: {e}") from e
            if form is None:
                continue
            if isinstance(form, Product):
                kept[path] = how
                new[path] = LoRA(w, jnp.asarray(form.a), jnp.asarray(form.b))
                continue
        assert not isinstance(form, Product)
        if w is not None and quantized_paths(w):
            raise ValueError(
                f"the change of {path} is no low-rank product, and codes hold no other; write rank= or energy=, or "
                "load the base without quantize"
            )
        created += [path] if w is None else []
        fresh = w is None or path in model.fresh
        new[path] = Trained(jnp.asarray(form if fresh else _wide_array(w) + form))
    if not new:
        raise ValueError("nothing changes: there is no update to make an adapter of")
    if rank is not None and sides and rank > max(sides):
        raise ValueError(f"rank {rank} is larger than any matrix here; write a rank of at most {max(sides)}")
    return Combined(update(unstack_layers(model.params), new), _method_of(new, created, base), kept)


def _form(change: Update, rank: int | None, energy: float | None) -> tuple[Update | None, Kept]:
    """A matrix's change as the adapter holds it, None where there is none, and what it keeps."""
    if isinstance(change, Product):
        most = min(change.shape) if rank is None else min(rank, *change.shape)
        if change.rank > most or (energy is not None and energy < 1):
            return compress(change, most, energy)
        return change, Kept(change.rank, 1.0, 0.0)
    if rank is None and energy is None:
        return change, Kept(min(change.shape), 1.0, 0.0)
    return compress(change, rank, energy)


def _heads(model: Model) -> set[str]:
    return {s.module for s in model.sites if s.kind == "head"}


def _method_of(new: Mapping[str, Any], created: Sequence[str], base: Mapping[str, Any]) -> Method:
    parts, ranks = [], {p: n.a.shape[1] for p, n in new.items() if isinstance(n, LoRA)}
    if ranks:
        (usual, _), *others = Counter(ranks.values()).most_common()
        by_rank = {r: [p for p in ranks if ranks[p] == r] for r, _ in others}
        special = {pattern: r for r, paths in by_rank.items() for pattern in patterns(paths, ranks)}
        parts.append(lora(rank=usual, targets=patterns(ranks, base), rank_pattern=special))
    whole = [p for p, n in new.items() if isinstance(n, Trained) and p not in created]
    parts += [full(targets=patterns(whole, base))] if whole else []
    if created:
        kernels = [f"{p.rpartition('/')[0]}/kernel" for p in created]
        parts.append(bitfit(targets=patterns(kernels, base), create=True))
    return chain(*parts)


# Hot swap


def swap(params: Tree, other: Tree) -> Tree:
    """`params` with the adapter of `other`: a compiled function takes it as it took `params`, without compiling again.

    Both hold an adapter of one structure over one base. The base's arrays stay those of `params`, and what comes in is
    put where the array that it replaces is.

    Raises:
      ValueError: a function would be compiled again, the message names the first difference and what mends it; or the
        bases differ.

    >>> from peftjax.methods import lora
    >>> base = {"q": {"kernel": jnp.ones((4, 4))}}
    >>> one = lora(rank=2, alpha=4, targets=["q/kernel"]).init(jax.random.key(0), base, ())
    >>> two = lora(rank=1, targets=["q/kernel"]).init(jax.random.key(1), base, ())
    >>> one = fold_scale(one)
    >>> swap(one, pad_rank(two, one))["q"]["kernel"].a.shape
    (4, 2)
    """
    first, second = (flatten(t, is_leaf=is_node) for t in (params, other))
    for path in {**first, **second}:
        if said := _difference(path, first.get(path), second.get(path)):
            raise ValueError(f"swap: {said}, so a compiled function would be compiled again{_mended(said)}")
    beneath = jax.tree.leaves(_beneath(params))
    paths, structure = list(flatten(params)), jax.tree.structure(params)
    leaves = zip(paths, beneath, jax.tree.leaves(params), jax.tree.leaves(other), strict=True)
    return jax.tree.unflatten(structure, [_taken(*leaf) for leaf in leaves])


def _taken(path: str, is_the_bases: bool, old: Any, new: Any) -> Any:
    if old is new:
        return old
    if isinstance(old, jax.Array):  # jit tells apart what was put on a device and what merely is there
        away = isinstance(new, jax.Array) and new.committed
        new = jax.device_put(new, old.sharding) if old.committed else jnp.asarray(jax.device_get(new) if away else new)
    if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key) and bool(jnp.array_equal(old, new)):
        return old
    if is_the_bases:
        raise ValueError(f"swap: {path} is the base's, and the two differ there: these are adapters of different bases")
    return new


def _beneath(tree: Tree, inside: bool = False) -> Tree:
    """True for the base's arrays below nodes."""

    def visit(x):
        if not is_node(x):
            return inside
        own = {"base"} if not isinstance(x, Blocks) else {"blocks"}
        held = {f: getattr(x, f) for f in data_fields(x)}
        return dataclasses.replace(x, **{f: _beneath(y, is_quantized(x) or f in own) for f, y in held.items()})

    return jax.tree.map(visit, tree, is_leaf=is_node)


def _difference(path: str, x: Any, y: Any) -> str:
    """How two arrays or nodes of one path differ to a compiled function; '' if they do not."""
    if x is None or y is None:
        return "" if x is y else f"{path} is in one adapter only"
    if is_node(x) or is_node(y):
        if type(x) is not type(y):
            return f"{path} is {_name(x)} in one and {_name(y)} in the other"
        mine, theirs = static_fields(x), static_fields(y)
        for field, value in mine.items():
            if value != theirs[field]:
                return f"{path} has {field} {value!r} in one and {theirs[field]!r} in the other"
        fields = {f: [flatten(getattr(n, f), is_leaf=is_node) for n in (x, y)] for f in data_fields(x)}
        pairs = [
            (f"{path}/{f}/{p}".rstrip("/"), a.get(p), b.get(p)) for f, (a, b) in fields.items() for p in {**a, **b}
        ]
        return next((said for pair in pairs if (said := _difference(*pair))), "")
    if x.shape != y.shape or x.dtype != y.dtype:
        return f"{path} is {x.dtype}{list(x.shape)} in one and {y.dtype}{list(y.shape)} in the other"
    return ""


def _name(x: Any) -> str:
    return type(x).__name__ if is_node(x) else "an array"


def _mended(said: str) -> str:
    if re.search(r" has (scale|dropout|ratio|trains) ", said):
        return "; write fold_scale(...) around both"
    if re.search(r"/[ab] is ", said):
        return "; write pad_rank(..., rank) around the smaller"
    return "; make plain LoRAs of both with to_lora"


def fold_scale(params: Tree) -> Tree:
    """Every LoRA with scale 1, its scale multiplied into `b`, and without what only training needs (dropout, ratio).

    Each entry of b is rounded once more, to 6e-8 of itself in float32; not at all where the scale is a power of two.

    Raises:
      ValueError: there is no LoRA.
    """

    def one(_, n):
        b = (n.scale * n.b).astype(n.b.dtype)
        return LoRA(n.base, n.a, b, only=n.only)

    return _map_loras("fold_scale", params, one)


def pad_rank(params: Tree, to: int | Tree) -> Tree:
    """Every LoRA widened by zeros to a rank, or to the ranks of another adapter; the function stays as it is.

    The new columns of A and rows of B get no gradient while the others are zero: for running, not to train on.

    Raises:
      ValueError: there is no LoRA, or one of a larger rank, or none at its place in the other adapter.
    """
    ranks: dict[str, int] = {}

    def note(path, n):
        ranks[path] = n.a.shape[-1]
        return n

    if not isinstance(to, int):
        _map_loras("pad_rank", to, note)

    def one(path, n):
        r = to if isinstance(to, int) else ranks.get(path)
        if r is None:
            raise ValueError(f"pad_rank: {path} is a LoRA, and the other adapter has none there")
        if r < n.a.shape[-1]:
            raise ValueError(f"pad_rank: {path} has rank {n.a.shape[-1]}, more than {r}; pad to at least that")
        more = r - n.a.shape[-1]
        a = jnp.pad(n.a, [(0, 0)] * (n.a.ndim - 1) + [(0, more)])
        return dataclasses.replace(n, a=a, b=jnp.pad(n.b, [(0, 0)] * (n.b.ndim - 2) + [(0, more), (0, 0)]))

    return _map_loras("pad_rank", params, one)


def _map_loras(name: str, params: Tree, f: Any) -> Tree:
    found = []

    def visit(path, n):
        if not isinstance(n, LoRA):
            return n
        found.append(path)
        return f(path, n)

    out = map_nodes(visit, params)
    if not found:
        raise ValueError(f"{name}: the parameters hold no LoRA; make some with to_lora")
    return out
