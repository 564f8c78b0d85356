"""Mixed-adapter batches: one base, and rows that use different adapters of one method.

The arrays that the adapters do not share are stacked along a new first axis. Each row gathers its own and runs the
base's forward under `jax.vmap`, with what is shared not mapped: a frozen matrix then meets the whole batch in one
product, and only the products of the adapters are batched. No method knows of this.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .checkpoint import load_adapter
from .hub import Model
from .layout import is_stacked, stack_layers
from .methods import Method
from .models.layers import Cache, Output
from .tree import Tree, combine, flatten
from .weights import Weight, is_node, map_nodes


class Mixture(NamedTuple):
    """The parameters of a `Mixed`; `partition`, `combine` and `jax.jit` take them as any tree.

    Attributes:
      own: what trains and what else differs between the k adapters, (k, ...) each, with holes elsewhere.
      shared: the rest, with holes where `own` has the leaf.
      ids: (rows,) int32, which adapter each row of a batch uses; None before `Mixed.bind`.
    """

    own: Tree
    shared: Tree
    ids: Any = None

    def rows(self, index: np.ndarray, of: int) -> "Mixture":
        """The same with the ids of some rows, in their order, out of `of` rows that were bound."""
        if self.ids is None or len(self.ids) != of:
            there = "none" if self.ids is None else len(self.ids)
            raise ValueError(f"there are {of} texts and {there} adapter ids; write mixed.bind(params, ids), one a text")
        return self._replace(ids=np.asarray(self.ids)[index])


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Shared:
    """Stands in an adapter's tree for a leaf that all adapters share; vmap passes it through."""

    index: int


class Mixed(NamedTuple):
    """A base with k adapters, used as a `Model`; make it by `mix` or `load_mixed`.

    Attributes:
      model: the base.
      method: of all the adapters.
      size: k.
    """

    model: Model
    method: Method
    size: int

    def bind(self, params: Mixture, ids: Sequence[int] | np.ndarray) -> Mixture:
        """The parameters with the adapter of each row, (rows,); outside of a trace, where ids can be checked.

        Where a batch has n times as many rows as there are ids, as in beam search, each id stands for n rows in
        succession.

        Raises:
          ValueError: an id is no whole number from 0 to k - 1.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(
                f"adapter ids are whole numbers, one a row; got shape {array.shape} of {array.dtype}: write (rows,)"
            )
        if wrong := sorted({i for i in array.tolist() if not 0 <= i < self.size}):
            raise ValueError(f"there are {self.size} adapters, 0 to {self.size - 1}; got the ids {wrong[:5]}")
        return params._replace(ids=array.astype(np.int32))

    def adapter(self, params: Mixture, i: int) -> Tree:
        """The parameters of one adapter, as its method made them: to save, to merge, to run alone."""
        return combine(jax.tree.map(lambda x: x[i], params.own), params.shared)

    def trainable(self, params: Mixture) -> Tree:
        """The mask function: what the method trains, of all k adapters."""
        mask = self.method.trainable(jax.eval_shape(lambda p: self.adapter(p, 0), params._replace(ids=None)))
        own = jax.tree.map(lambda x, m: None if x is None else m, params.own, mask, is_leaf=_is_hole)
        return Mixture(own, *jax.tree.map(lambda _: False, (params.shared, params.ids)))

    def forward(
        self, params: Mixture, batch: dict, key: jax.Array | None = None, *, cache: Cache | None = None, **kwargs
    ) -> Output:
        """The base's forward, each row with its own adapter; with a key, each with its own dropout."""
        at = 0 if cache is None or isinstance(cache.layers[0], tuple) else 1  # stacked layers stand before the rows

        def run(params, batch, key, cache):
            out = self.model.forward(params, batch, key, cache=cache, **kwargs)
            new = None if out.cache is None else _along_rows(jnp.squeeze, out.cache, at)
            return jax.tree.map(lambda x: x[0], out._replace(cache=None)), new

        axes: Any = (at, 0, None, 0)
        if cache is not None:
            cache = _along_rows(lambda x, axis: jnp.expand_dims(x, axis + 1), cache, at)
        out, new = self._each_row(run, params, batch, key, cache, None if cache is None else Cache(*axes))
        return out._replace(cache=new)

    def logits(self, params: Mixture, hidden: jax.Array) -> jax.Array:
        """The base's head over hidden states (rows, length, width), each row with its own adapter."""

        def run(params, batch, key, cache):
            return self.model.logits(params, batch["hidden"])[0]

        return self._each_row(run, params, {"hidden": hidden}, None, None, None)

    def empty_cache(self, params: Mixture, batch: int, length: int) -> Cache:
        """As the base's: rows on the same axes, one index for all."""

        def one(params):
            return self.method.resolve(self.adapter(params, 0), None)

        return self.model.empty_cache(jax.eval_shape(one, params._replace(ids=None)), batch, length)

    def losses(self, objective: Callable) -> Callable[..., jax.Array]:
        """(params, batch, key=None) -> (k,): the loss of each adapter, the mean over its own rows, plus its penalty.

        Differentiate the sum of them: each adapter's gradient is then that of a run of its own on its own rows, with
        whatever weights its rows have. The loss of an adapter without rows is its penalty; give each adapter rows in
        every batch, since an optimizer's momentum and decay move it all the same.

        Args:
          objective: (parameters of one adapter, batch, key or None) -> (sum of losses, sum of weights), such as
            `peftjax.problem.objective` of the plain base.
        """

        def each(params: Mixture, batch: dict, key: jax.Array | None = None) -> jax.Array:
            totals, weights = self._each_row(lambda p, b, k, _: objective(p, b, k), params, batch, key, None, None)
            ids = _spread(params.ids, len(totals))
            total, weight = (jax.ops.segment_sum(x, ids, self.size) for x in (totals, weights))

            def penalty(own):
                return jnp.asarray(self.method.penalty(combine(own, params.shared)), jnp.float32)

            return total / jnp.maximum(weight, 1e-6) + jax.vmap(penalty)(params.own)

        return each

    def _each_row(
        self, f: Callable, params: Mixture, batch: dict, key: jax.Array | None, cache: Any, cache_axes: Any
    ) -> Any:
        """`f(parameters of the row's adapter, a batch of this row, key, cache)`, all rows at once.

        What a method computes of its own arrays (`resolve`, `Weight.ready`) is computed once an adapter.
        """
        batch = {k: x for k, x in batch.items() if x is not None}
        n = max(x.shape[0] for x in jax.tree.leaves(batch))
        batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape[1:])), batch)
        ids = _spread(params.ids, n)
        leaves = jax.tree.leaves(params.shared)
        index = {id(x): i for i, x in enumerate(leaves)}

        def once(own, key):
            tree = self.method.resolve(combine(own, params.shared), key)
            tree = map_nodes(lambda _, x: x.ready() if isinstance(x, Weight) else x, tree)
            return jax.tree.map(lambda x: _Shared(index[id(x)]) if id(x) in index else x, tree)

        def one(own, number, batch, key, cache):
            tree = jax.tree.map(
                lambda x: leaves[x.index] if isinstance(x, _Shared) else _of_row(x, number),
                own,
                is_leaf=lambda x: isinstance(x, _Shared),
            )
            return f(tree, jax.tree.map(lambda x: x[None], batch), key, cache)

        first, second = (None, None) if key is None else jax.random.split(key)
        keys = None if first is None else jax.random.split(first, self.size)
        own = jax.tree.map(lambda x: x[ids], jax.vmap(once)(params.own, keys))
        keys = None if second is None else jax.random.split(second, n)
        out_axes = 0 if cache_axes is None else (0, cache_axes)
        rows = jax.vmap(one, in_axes=(0, 0, 0, 0, cache_axes), out_axes=out_axes)
        return rows(own, jnp.arange(n), batch, keys, cache)

    @property
    def family(self):
        return self.model.family

    @property
    def module(self):
        return self.model.module

    @property
    def config(self):
        return self.model.config

    @property
    def forced(self):
        return self.model.forced

    @property
    def max_length(self):
        return self.model.max_length

    def room(self, params: Mixture) -> int:
        """Longest text in tokens after the virtual ones of an adapter."""
        return self.model.room(jax.eval_shape(lambda p: self.adapter(p, 0), params._replace(ids=None)))


def mix(model: Model, adapters: Sequence[Tree], method: Method) -> tuple[Mixed, Mixture]:
    """Puts k adapters of one method over one base, to be used in one batch: row i runs with adapter `ids[i]`.

    `y_i = f(x_i; W, θ_ids[i])`. Punica (Chen et al. 2023, arXiv:2310.18547) serves LoRA so with kernels of its own;
    here the method is any, the products are XLA's, and training works too.

    What the method starts from is often the base itself (LoRA, DoRA, adapters, IA3, BitFit): `method.init(...)`
    untrained is then an adapter for the rows that should see the base alone. Memory: k times the adapter, and in a
    batch once a row; methods that train much of the base (`full`, `fishmask`) form their matrices once a row.

    Args:
      model: the base.
      adapters: parameters with an adapter in them, as `method.init`, training or `load_adapter` gives; all per-layer
        or all stacked.
      method: of all of them.

    Raises:
      ValueError: no adapters; two that differ in a node, a shape or a dtype (another rank, other targets); or an
        array of the base that differs from the model's and does not train.

    Two adapters that train at once, and then one of them alone:

    >>> from peftjax import hub, partition
    >>> from peftjax.methods import lora
    >>> model, method = hub.load("tiny-books"), lora(rank=2)
    >>> mixed, params = mix(model, [method.init(jax.random.key(i), model.params, model.sites) for i in (0, 1)], method)
    >>> params = mixed.bind(params, [0, 1, 1])
    >>> trainable, frozen = partition(params, mixed.trainable(params))
    >>> def objective(params, batch, key):
    ...     logits = model.forward(params, batch, key).logits[:, :-1]
    ...     each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
    ...     return each.sum(), each.size
    >>> @jax.jit
    ... def step(trainable, state, frozen, batch):
    ...     def loss(trainable):
    ...         each = mixed.losses(objective)(combine(trainable, frozen), batch)
    ...         return each.sum(), each
    ...     grads, losses = jax.grad(loss, has_aux=True)(trainable)
    ...     updates, state = tx.update(grads, state, trainable)
    ...     return optax.apply_updates(trainable, updates), state, losses
    >>> tx = per_adapter(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
    >>> state, batch = tx.init(trainable), {"input_ids": jnp.array([[5, 6, 7], [8, 9, 10], [11, 12, 13]])}
    >>> trainable, state, first = step(trainable, state, frozen, batch)
    >>> trainable, state, second = step(trainable, state, frozen, batch)
    >>> bool((second < first).all())
    True
    >>> alone = mixed.adapter(combine(trainable, frozen), 1)  # for save_adapter, merge, model.forward
    """
    if not adapters:
        raise ValueError("mix: there are no adapters; give the parameters of at least one")
    _check_alike(adapters)
    structure, paths = jax.tree.structure(adapters[0]), list(flatten(adapters[0]))
    mask = jax.tree.leaves(method.trainable(adapters[0]))
    base = flatten(stack_layers(model.params) if any(map(is_stacked, paths)) else model.params)
    own, shared = [], []
    for path, trains, *column in zip(paths, mask, *map(jax.tree.leaves, adapters), strict=True):
        first = column[0]
        if different := [x for x in column if x.shape != first.shape or x.dtype != first.dtype]:
            raise ValueError(
                f"mix: {path} is {_shape(first)} in the first adapter and {_shape(different[0])} in another; adapters "
                "of one batch must agree in rank, targets and dtype"
            )
        below = base.get(re.sub(r"/(base|blocks/[^/]+)(?=/|$)", "", path))  # None: an array that the method added
        whole = below is not None and below.shape == first.shape  # else a column block of it
        known = below if whole else first
        alike = not trains and all(_same(x, known) for x in column)
        if below is not None and not trains and not alike:
            raise ValueError(f"mix: {path} does not train and is not the base's; these adapters are of another base")
        own.append(None if alike else jnp.stack(column))
        shared.append(known if alike else None)
    own, shared = jax.tree.unflatten(structure, own), jax.tree.unflatten(structure, shared)
    return Mixed(model, method, len(adapters)), Mixture(own, shared)


def load_mixed(model: Model, files: Sequence[str | Path]) -> tuple[Mixed, Mixture]:
    """`mix` of adapter files.

    Raises:
      FileNotFoundError, ValueError: from `load_adapter` (another base, a broken file) and from `mix`; or the files are
        of different methods.
    """
    if not files:
        raise ValueError("load_mixed: there are no adapter files; give at least one")
    loaded = [load_adapter(f, model) for f in files]
    names = ["+".join(name for name, _ in a.method.spec) for a in loaded]
    if len({*names}) > 1:
        other = next(i for i, name in enumerate(names) if name != names[0])
        raise ValueError(
            f"load_mixed: {files[0]} is of the method {names[0]} and {files[other]} of {names[other]}; the adapters of "
            "one batch must be of one method"
        )
    return mix(model, [a.params for a in loaded], loaded[0].method)


def per_adapter(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer that treats each adapter alone: a global-norm clip by its own norm, masks by its own paths.

    For the trainable half of a `Mixture`; what else `update` is given (key, step) is the same for all.

    >>> tx = per_adapter(optax.clip_by_global_norm(1.0))
    >>> grads = Mixture({"w": jnp.array([[3.0, 4.0], [0.3, 0.4]])}, {"w": None})
    >>> updates = tx.update(grads, tx.init(grads))[0].own["w"]
    >>> [f"{x:.1f} {y:.1f}" for x, y in updates.tolist()]  # the second is short enough
    ['0.6 0.8', '0.3 0.4']
    """
    inner = optax.with_extra_args_support(tx)

    def init(params):
        return jax.vmap(inner.init)(params.own)

    def update(updates, state, params=None, **extra):
        def one(updates, state, params):
            return inner.update(updates, state, params, **extra)

        new, state = jax.vmap(one)(updates.own, state, None if params is None else params.own)
        return updates._replace(own=new), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] - of Mixtures


def _is_hole(x: Any) -> bool:
    return x is None


def _spread(ids: Any, rows: int) -> jax.Array:
    """The ids of so many rows, each repeated where there are fewer."""
    if ids is None:
        raise ValueError("which adapter does each row use? Write mixed.bind(params, ids)")
    if rows % len(ids):
        raise ValueError(f"the batch has {rows} rows and {len(ids)} adapter ids; bind one id a row")
    return jnp.repeat(jnp.asarray(ids), rows // len(ids))


def _along_rows(f: Callable, cache: Cache, at: int) -> Cache:
    """`f(array, axis of its rows)` for every array of a cache; the index has no rows."""
    layers = jax.tree.map(lambda x: f(x, at), cache.layers)
    source = None if cache.source is None else f(cache.source, 0)
    return cache._replace(layers=layers, valid=f(cache.valid, 0), source=source)


def _of_row(x: Any, number: jax.Array) -> Any:
    """A dropout key, drawn for the adapter, as a key of the row; all else stays."""
    if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(x.reshape(-1)).reshape(x.shape)


def _check_alike(adapters: Sequence[Tree]) -> None:
    first = flatten(adapters[0], is_leaf=is_node)
    for i, tree in enumerate(adapters):
        here = flatten(tree, is_leaf=is_node)
        kinds = [{p: jax.tree.structure(x) for p, x in t.items()} for t in (first, here)]
        if kinds[0] != kinds[1]:
            path = next(p for p in {**first, **here} if kinds[0].get(p) != kinds[1].get(p))
            raise ValueError(
                f"mix: adapters 0 and {i} differ at {path}: {_say(first.get(path))} and {_say(here.get(path))}; "
                "adapters of one batch must be of one method with the same targets, ranks and scales"
            )


def _say(x: Any) -> str:
    if x is None:
        return "nothing"
    if not is_node(x):
        return f"an array {_shape(x)}"
    fixed = {f.name: getattr(x, f.name) for f in dataclasses.fields(x) if f.metadata.get("static")}
    return f"{type(x).__name__}({', '.join(f'{k}={v!r}' for k, v in fixed.items())})"


def _shape(x: Any) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def _same(x: Any, y: Any) -> bool:
    return x is y or (x.shape == y.shape and x.dtype == y.dtype and bool(jnp.array_equal(x, y)))
