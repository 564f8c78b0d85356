"""What a method is: a tree transform plus a mask, as a value made of pure functions.

The laws that every method obeys (tests/test_methods.py checks them over the table `METHODS`):

1. At init the function is unchanged where the paper says so.
2. The trainable paths are exactly those the paper names, and their count is the paper's formula.
3. Frozen leaves are bit-identical after training; the optimizer state holds nothing for them.
4. Loss falls on a tiny task, and the step compiles once.
5. Merged parameters give the unmerged function.
6. Save, load: bit-equal; a wrong base, a missing or an unknown key raises.
7. A bf16 base with float32 trainables works; so does a quantised base, where nothing of what is quantised trains.
8. A pattern that matches nothing, an unknown field or an impossible rank raises and says what to write.
9. The numerics agree with an independent reference.
10. `chain` of methods that touch different leaves equals applying both; the same leaf nests or raises.
"""

import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import masks
from ..layout import is_stacked, layer_paths
from ..tree import Tree, flatten, get, matches, nearest, update
from ..weights import Blocks, Trained, Weight, data_fields, is_node, quantized_paths, split

LINEAR = ("query", "key", "value", "fused_qkv", "attention_out", "mlp_in", "mlp_out")  # kinds of weights `x @ W`


class Site(NamedTuple):
    """A place of a model where methods may act. A family publishes one row for each.

    Attributes:
      path: of the weight, or of the module for the kinds 'attention', 'block', 'positions' and 'input'.
      kind: 'query', 'key', 'value', 'fused_qkv', 'attention_out', 'mlp_in', 'mlp_out', 'embedding',
        'embedding_other' (types, learned positions), 'head' (of a task), 'lm_head', 'norm', 'attention', 'block',
        'positions' (where they are counted), 'input' (where the text is embedded), 'projection' (from the
        embeddings' width to the blocks', or back), 'pooler', 'convolution', 'position_key', 'position_query' (of
        relative positions).
      layer: index of the layer, or None outside the stack.
      width: features of the site's output.
      heads: (query heads, key/value heads, head size) at attention sites.
      axes: (input axes, output axes, leading layer axes) of a weight that is not `(inputs, outputs)`.
      parts: of a fused output, name -> slice of the output features; a target may name one of them.
      part: the part of the weight that is meant; None: the whole.
      tied: this embedding is also the output head.
      scale: what the model multiplies by it after looking up a row of this embedding.
    """

    path: str
    kind: str
    layer: int | None = None
    width: int = 0
    heads: tuple[int, int, int] | None = None
    axes: tuple | None = None
    parts: Mapping[str, slice] = {}
    part: str | None = None
    tied: bool = False
    scale: float = 1.0

    @property
    def module(self) -> str:
        """The path of the module that holds the weight."""
        return self.path.rpartition("/")[0]

    def only(self, part: str) -> "Site":
        """The site of one part of this fused weight."""
        columns = self.parts[part]
        return self._replace(kind=part, part=part, width=columns.stop - columns.start)

    def columns(self, w: Any) -> Any:
        """Those of an array of the whole weight's shape that this site means."""
        return w if self.part is None else w[..., self.parts[self.part]]


def _nothing(params: Tree, key: jax.Array | None) -> Tree:
    return params


class Method(NamedTuple):
    """A fine-tuning method. Compose with `chain`; there is no class hierarchy.

    Attributes:
      spec: ((name, JSON arguments), ...), enough to build the method again; adapter files record it.
      init: (key, params, sites) -> params', the tree transform, on the per-layer layout.
      trainable: params' -> mask, the mask function.
      saved: params' -> mask of the leaves an adapter file holds.
      resolve: (params', key or None) -> params', inside the loss: writes what varies by step (dropout keys,
        a prefix from its MLP). None when evaluating or exporting.
      optimizer: optax transformation -> optax transformation that wraps it.
      penalty: params' -> scalar added to the loss.
      observe: (objective, params, sites, batches) -> init, on the base's parameters: what needs data before `init`;
        None where nothing does. Call it through `observed`.
      plan: steps of the run -> optimizer: what needs to know how long training takes; None where nothing does. Call
        it through `planned`.
      settles: steps of the run -> the step from which a state may be kept as the best: AdaLoRA's last allocation,
        before which its ranks are above the budget.
    """

    spec: tuple[tuple[str, dict], ...]
    init: Callable[[jax.Array, Tree, Iterable[Site]], Tree]
    trainable: masks.Mask
    saved: masks.Mask
    resolve: Callable[[Tree, jax.Array | None], Tree] = _nothing
    optimizer: Callable = lambda tx: tx
    penalty: Callable[[Tree], Any] = lambda params: 0.0
    observe: Callable[[Callable, Tree, Iterable[Site], Iterable[dict]], Callable] | None = None
    plan: Callable[[int], Callable] | None = None
    settles: Callable[[int], int] = lambda steps: 0

    def planned(self, total: int) -> "Method":
        """The method with an `optimizer` that knows the number of training steps; itself, if it needs none.

        `train.make_optimizer` calls this, so whoever trains by `fit` need not.

        Raises:
          ValueError: the method's schedule does not fit into so many steps.
        """
        return self if self.plan is None else self._replace(optimizer=self.plan(total), plan=None)

    def observed(self, objective: Callable, params: Tree, sites: Iterable[Site], batches: Iterable[dict]) -> "Method":
        """The method with an `init` that knows what the data say; itself, and no batch read, if it needs none.

        Args:
          objective: (params, batch, key or None) -> (sum of losses, sum of weights).
          params: of the base, per-layer, before any `init`.
          batches: training batches; the same ones give the same method.
        """
        if self.observe is None:
            return self
        return self._replace(init=self.observe(objective, params, sites, batches), observe=None)


def method(
    name: str, arguments: dict, init: Callable, trainable: masks.Mask, observe: Callable | None = None, **rest
) -> Method:
    """A `Method` of one spec entry whose saved leaves, unless given, are those that train.

    Its transform refuses stacked parameters: sites name layers one by one.
    """

    def checked(init):
        def per_layer(key, params, sites):
            _refuse_stacked(params)
            return init(key, params, sites)

        return per_layer

    def looked(objective, params, sites, batches):
        assert observe is not None  # else it is not called
        _refuse_stacked(params)
        return checked(observe(objective, params, sites, batches))

    rest = {"saved": trainable, "observe": None if observe is None else looked, **rest}
    return Method(spec=((name, plain(arguments)),), init=checked(init), trainable=trainable, **rest)


def plain(x: Any) -> Any:
    """Arguments with numpy's numbers as Python's: JSON has no others, and numpy's would promote bfloat16."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    return x.item() if isinstance(x, np.generic) else x


def check_whole(what: str, value: int) -> None:
    """Raises unless it is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1; got {value!r}")


def is_token(x: Any) -> bool:
    """Whether it is a whole number of at least 0."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _refuse_stacked(params: Tree) -> None:
    if stacked := next((p for p in flatten(params, is_leaf=is_node) if is_stacked(p)), None):
        raise ValueError(f"methods act on the per-layer layout, but {stacked} is stacked; use unstack_layers first")


def chain(*methods: Method) -> Method:
    """Composes methods: transforms in order, masks united, optimizers nested, penalties added.

    A leaf that an earlier method rewrote may be wrapped by a later one (it nests), never overwritten.

    Raises:
      ValueError: (from `init`) a method replaces or removes what an earlier one put there.

    >>> from peftjax.methods import lora, bitfit
    >>> [name for name, _ in chain(lora(rank=4), bitfit()).spec]
    ['lora', 'bitfit']
    """
    if not methods:
        raise ValueError("chain needs at least one method")

    def init(key, params, sites):
        sites, owner = tuple(sites), {}
        for i, m in enumerate(methods):
            new = m.init(jax.random.fold_in(key, i), params, sites)
            _check_overlap(m, owner, params, new)
            before = flatten(params, is_leaf=is_node)
            changed = {p: x for p, x in flatten(new, is_leaf=is_node).items() if x is not before.get(p)}
            owner.update(dict.fromkeys(changed, m))
            params = new
        return params

    def observe(objective, params, sites, batches):
        sites, copies = tuple(sites), itertools.tee(batches, len(methods))  # each method reads them from the start
        return chain(*(m.observed(objective, params, sites, b) for m, b in zip(methods, copies, strict=True))).init

    def resolve(params, key):
        for i, m in enumerate(methods):
            params = m.resolve(params, None if key is None else jax.random.fold_in(key, i))
        return params

    def optimizer(tx):
        for m in methods:
            tx = m.optimizer(tx)
        return tx

    def plan(total):
        return chain(*(m.planned(total) for m in methods)).optimizer

    def trainable(params):
        mask = masks.any_of(*(m.trainable for m in methods))(params)
        if not any(jax.tree.leaves(mask)):
            names = "+".join(name for m in methods for name, _ in m.spec)
            raise ValueError(
                f"{names} trains nothing by itself; chain it with a method that does, such as lora+{names}"
            )
        return mask

    return Method(
        spec=sum((m.spec for m in methods), ()),
        init=init,
        trainable=trainable,
        saved=masks.any_of(*(m.saved for m in methods)),
        resolve=resolve,
        optimizer=optimizer,
        penalty=lambda params: sum(m.penalty(params) for m in methods),
        observe=observe if any(m.observe for m in methods) else None,
        plan=plan if any(m.plan for m in methods) else None,
        settles=lambda steps: max(m.settles(steps) for m in methods),
    )


def _check_overlap(m: Method, owner: dict[str, Method], old: Tree, new: Tree) -> None:
    new_leaves = flatten(new, is_leaf=is_node)
    old_leaves = flatten(old, is_leaf=is_node)
    for path, first in owner.items():
        if not _contains(new_leaves.get(path), old_leaves[path]):
            raise ValueError(
                f"chain: {m.spec[0][0]} overwrites {path}, which {first.spec[0][0]} already rewrote; "
                "give them different targets, or leave one out"
            )


def _contains(outer, inner) -> bool:
    if outer is inner:
        return True
    if isinstance(inner, Blocks):  # made anew for each part; what methods put into it must be there
        return all(_contains(outer, b) for b in inner.blocks.values() if is_node(b))
    if isinstance(outer, Mapping):
        return any(_contains(x, inner) for x in outer.values())
    return is_node(outer) and any(_contains(getattr(outer, f), inner) for f in data_fields(outer))


def select(params: Tree, sites: Iterable[Site], targets: Iterable[str], kinds: Iterable[str] = ()) -> list[Site]:
    """The sites that the targets name; a target is a kind of site or a pattern of whole paths.

    Args:
      params: per-layer parameters.
      sites: the family's table; patterns also reach paths without a site.
      targets: such as `['query', 'value']` or `['model/layers_[0-3]/.*_proj/kernel']`. 'linear' stands
        for all kinds of `LINEAR`. Where query, key and value are one fused product, 'query' means that part.
      kinds: if given, only sites of these kinds may be chosen by kind.

    Raises:
      ValueError: a target matches nothing; the message gives the kinds there are, or the nearest paths.

    >>> sites = [Site("h_0/q/kernel", "query"), Site("h_0/k/kernel", "key")]
    >>> [s.path for s in select({"h_0": {"q": {"kernel": 1}, "k": {"kernel": 2}}}, sites, ["query"])]
    ['h_0/q/kernel']
    """
    if isinstance(targets, str):
        raise ValueError(
            f"targets must be a list of kinds or patterns, such as [{targets!r}]; got the string {targets!r}"
        )
    targets = list(targets)
    if other := [t for t in targets if not isinstance(t, str)]:
        raise ValueError(f"targets are kinds or patterns, such as ['query', 'value']; got {other[0]!r} among them")
    if not targets:
        raise ValueError("targets is empty; write kinds or patterns, such as ['query', 'value']")
    paths = flatten(params, is_leaf=is_node)
    _refuse_stacked(params)
    by_path = {s.path: s for s in sites if not kinds or s.kind in kinds or s.path in paths}
    there = sorted({s.kind for s in sites if not kinds or s.kind in kinds})
    parts = sorted({part for s in by_path.values() for part in s.parts} - set(there))
    chosen: dict[tuple, Site] = {}
    for target in targets:
        wanted = [k for k in LINEAR if k in there] if target == "linear" else [target]
        found = [s for s in by_path.values() if s.kind in wanted and s.kind in there]
        if not found and target in parts:
            found = [s.only(target) for s in by_path.values() if target in s.parts]
        if not found:
            found = [by_path.get(p, Site(p, "weight")) for p in paths if matches(target, p)]
        if not found:
            raise ValueError(
                f"the target {target!r} is no kind of site of this model (it has {there + parts}) and as a pattern "
                f"matches no whole path; the nearest paths are {nearest(target, paths)}"
            )
        chosen.update(((s.path, s.part), s) for s in found)
    return [s for s in chosen.values() if s.part is None or (s.path, None) not in chosen]


def wrap(key: jax.Array, params: Tree, sites: Iterable[Site], new: Callable) -> Tree:
    """Rewrites the weight at each site to `new(key, weight, site)`, every site with a key of its own.

    Of a fused weight, a site may be one part: the array becomes `Blocks`, and the part's block is rewritten.

    Raises:
      ValueError: a site is a module or a hook and no weight, or a part of a weight rewritten as a whole.
    """
    out: dict[str, Any] = {}
    for s in sites:
        w = out[s.path] if s.path in out else get(params, s.path)
        if isinstance(w, Mapping) or (is_node(w) and not isinstance(w, Weight)):
            raise ValueError(f"{s.path} (kind {s.kind!r}) is no weight; target weights such as {LINEAR}")
        if s.part is None:
            out[s.path] = new(path_key(key, s.path), w, s)
            continue
        if is_node(w) and not isinstance(w, Blocks):
            raise ValueError(
                f"{s.path} is already a {type(w).__name__} as a whole, so its part {s.part!r} cannot be rewritten; "
                "apply the method of the part first, or target the whole"
            )
        w = w if isinstance(w, Blocks) else split(w, s.parts)
        block = new(path_key(key, f"{s.path}/{s.part}"), w.blocks[s.part], s)
        out[s.path] = dataclasses.replace(w, blocks={**w.blocks, s.part: block})
    return update(params, out)


def replace(params: Tree, new: Iterable[tuple[Site, Any]]) -> Tree:
    """Puts a node at each site, or at the part that it means."""
    nodes = {(s.path, s.part): (s, n) for s, n in new}
    sites = [s for s, _ in nodes.values()]
    return wrap(jax.random.key(0), params, sites, lambda key, w, site: nodes[site.path, site.part][1])


def mark(name: str, params: Tree, places: Iterable[str | Site]) -> Tree:
    """Replaces the arrays at the paths, or at parts of them, by `Trained` nodes, which train as they are.

    Raises:
      ValueError: an array is a node already; `name` is the method that the message speaks of.
    """

    def trained(key, x, site):
        if quantized_paths(x):
            raise ValueError(f"{name}: {site.path} is quantised, and codes cannot train; leave it out of `quantize`")
        if is_node(x):
            raise ValueError(f"{name}: {site.path} is already a {type(x).__name__}; apply {name} first or leave it out")
        return Trained(x)

    sites = [Site(p, "weight") if isinstance(p, str) else p for p in places]
    return wrap(jax.random.key(0), params, sites, trained)


def refuse_codes(name: str, params: Tree) -> Tree:
    """The parameters; raises where the base is quantised, for a method (`name`) that would train all of it."""
    if codes := quantized_paths(params):
        raise ValueError(
            f"{name}: the base is quantised ({codes[0]} and {len(codes) - 1} more), and codes cannot train; load it "
            "without quantize, or choose a method that keeps the base frozen, such as lora"
        )
    return params


def path_key(key: jax.Array, path: str) -> jax.Array:
    """A key for one path, the same in whatever order or company the path is met."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def leaf_key(key: jax.Array, path: str, layers: int | None) -> jax.Array:
    """`path_key`, or for a stacked path the keys of its layers along a first axis."""
    if layers is None:
        return path_key(key, path)
    return jnp.stack([path_key(key, p) for p in layer_paths(path, layers)])


def virtual_tokens(params: Tree) -> int:
    """How many positions the methods in the tree take before the text: the sum over `shift` and `prompt` hooks."""
    nodes = flatten(params, is_leaf=is_node)
    return sum(node.n for path, node in nodes.items() if path.endswith(("/shift", "/prompt")))


def weight_method(name: str, arguments: dict, targets: Iterable[str], cls: type, new: Callable, **rest) -> Method:
    """A method that replaces the targeted weights by nodes of a class; the node says which fields train.

    Args:
      new: (key, weight, site) -> node.
    """
    return method(
        name,
        arguments,
        init=lambda key, params, sites: wrap(key, params, select(params, sites, targets), new),
        trainable=masks.by_node(cls),
        **rest,
    )
