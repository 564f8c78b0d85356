"""Prefix-tuning: trained keys and values before those of the text, in every attention layer."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..layout import is_stacked, layer_paths
from ..tree import Tree, flatten, update
from ..weights import is_node, node, static
from .base import Method, method, path_key


@node
class Prefix:
    """Hook of an attention module: n keys and values of shape (n, key/value heads, head size) come first."""

    key: Any
    value: Any
    trains: tuple[str, ...] = static(default=("key", "value"))

    def __call__(self, y, *, x, context):
        """(keys, values), each (batch, length, heads, size) -> the same with length n + length."""

        def before(prefix, rest):
            rows = jnp.broadcast_to(prefix.astype(rest.dtype), (rest.shape[0], *prefix.shape))
            return jnp.concatenate([rows, rest], axis=1)

        return before(self.key, y[0]), before(self.value, y[1])


@node
class Shift:
    """Hook of a model's positions: the text comes after n virtual tokens."""

    n: int = static(default=0)
    trains: tuple[str, ...] = static(default=())

    def __call__(self, y, *, x, context):
        return y + self.n


@node
class PrefixMLP:
    """The reparametrisation of all layers' prefixes: `tanh(P' W1 + b1) W2 + b2`; an adapter file drops it."""

    embedding: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any
    trains = ("embedding", "w1", "b1", "w2", "b2")

    def __call__(self):
        return jnp.tanh(self.embedding @ self.w1 + self.b1) @ self.w2 + self.b2


REPARAMETRISATION = "prefix_mlp"  # its place in the tree, beside the model


def prefix(length: int = 10, *, mlp: bool = False, hidden: int = 512, std: float = 0.02) -> Method:
    """Trains keys and values of virtual tokens in all layers: Li & Liang 2021 (arXiv:2101.00190), section 4.

    `h_i = P[i]` for the n prefix positions, else `LM(z_i, h_<i)`, equation 3. The text's own positions start
    at n. With `mlp`, section 4.3: `P[i] = MLP(P'[i])` with one hidden tanh layer, as the authors' code has
    it; `resolve` writes its output into the layers, and only that output is saved: a loaded adapter trains on
    as keys and values.

    Of an encoder and its decoder, each attention gets a prefix, the one between them too, as in the authors' code
    for BART, and nothing is counted from n. BART's text keeps its positions, as in the code of He et al. 2022
    (arXiv:2110.04366). Where they are relative (T5), the prefix stands at the n positions before the text (and its
    padding, if that is on the left) and the scores get the bias of that distance, as transformers has it for keys that
    it is given; in the attention between the two there is no bias.

    Args:
      length: n, the number of virtual tokens.
      mlp: train through the MLP instead of the keys and values themselves.
      hidden: its hidden size (512 for table-to-text, 800 for summarisation in the paper).
      std: standard deviation of the random start. The paper leaves it open.

    Raises:
      ValueError: a length or hidden size below 1, or, from `init`, a model without attention sites.

    The count is `2 n L k` for L attention modules whose keys have k features; with the MLP
    `n d + (d + 1) hidden + (hidden + 1) 2 L k` train, d being the model's width.
    """
    arguments = {"length": length, "mlp": mlp, "hidden": hidden, "std": std}
    for name in ("length", "hidden"):
        if not isinstance(arguments[name], int) or arguments[name] < 1:
            raise ValueError(f"prefix: {name} must be a whole number of at least 1; got {arguments[name]!r}")

    if not std > 0:
        raise ValueError(f"prefix: std must be above 0; got {std!r}")

    def init(key, params, sites):
        sites = tuple(sites)
        attention = [s for s in sites if s.kind == "attention"]
        positions = [s for s in sites if s.kind == "positions"]
        if not attention:
            raise ValueError(
                "prefix: the sites must name the attention modules; "
                f"these are of kinds {sorted({s.kind for s in sites})}"
            )
        new: dict[str, Any] = {f"{s.path}/shift": Shift(length) for s in positions}
        for s in attention:
            k, v = jax.random.split(path_key(key, s.path))
            shape = (length, *s.heads[1:])
            if mlp:
                new[f"{s.path}/prefix"] = Prefix(jnp.zeros(shape), jnp.zeros(shape), trains=())
            else:
                new[f"{s.path}/prefix"] = Prefix(std * jax.random.normal(k, shape), std * jax.random.normal(v, shape))
        if mlp:
            new[REPARAMETRISATION] = _fresh_mlp(key, attention, length, hidden, std)
        return update(params, new)

    return method(
        "prefix",
        arguments,
        init,
        trainable=lambda params: masks.by_node(PrefixMLP if REPARAMETRISATION in params else Prefix)(params),
        saved=masks.by_node(Prefix, "key", "value"),
        resolve=write_prefixes if mlp else lambda params, key: params,
    )


def _fresh_mlp(key, attention, length, hidden, std) -> PrefixMLP:
    width = attention[0].width
    out = sum(2 * s.heads[1] * s.heads[2] for s in attention)
    k = [jax.random.fold_in(key, i) for i in range(3)]
    return PrefixMLP(
        embedding=jax.random.normal(k[0], (length, width)),
        w1=jax.random.normal(k[1], (width, hidden)) / width**0.5,
        b1=jnp.zeros(hidden),
        w2=std * jax.random.normal(k[2], (hidden, out)),
        b2=jnp.zeros(out),
    )


def write_prefixes(params: Tree, key: jax.Array | None) -> Tree:
    """Runs the MLP and writes each layer's keys and values, per-layer or stacked; then drops the MLP."""
    mlp = params.get(REPARAMETRISATION)
    if mlp is None:
        return params
    nodes = {p: n for p, n in flatten(params, is_leaf=is_node).items() if isinstance(n, Prefix)}
    layers = {  # path -> those of its layers
        p: layer_paths(p, n.key.shape[0]) if is_stacked(p) else [p] for p, n in nodes.items()
    }
    sizes = {one: nodes[p].key.shape[-3:] for p, paths in layers.items() for one in paths}  # (length, heads, size)
    rest, pairs = mlp(), {}
    for one in sorted(sizes, key=_natural):  # in the order of the layers, whatever the layout
        shape = sizes[one]
        part, rest = jnp.split(rest, [2 * shape[1] * shape[2]], axis=1)
        pairs[one] = part.reshape(-1, 2, *shape[1:]).transpose(1, 0, 2, 3)
    flat = {}
    for path, paths in layers.items():
        pair = jnp.stack([pairs[one] for one in paths], axis=1) if is_stacked(path) else pairs[path]
        flat[path] = dataclasses.replace(nodes[path], key=pair[0], value=pair[1], trains=("key", "value"))
    return update({k: v for k, v in params.items() if k != REPARAMETRISATION}, flat)


def _natural(path: str) -> list:
    return [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)]
