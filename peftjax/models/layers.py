"""Layers that read arrays, nodes and hooks from the tree, and the one loop over blocks.

A layer asks the tree what to do: a product dispatches on the weight it finds (`peftjax.weights`), a bias
is added if there is one, a hook runs if and only if its node is there. Hook points, by module:

| module | hook | called with |
|---|---|---|
| Linear | `input` | y = x = the input |
| Linear | `output` | y = the output with bias, x = the input |
| block | `attention_output`, `mlp_output` | y = the sub-layer's output before the sum, x = its input |
| block | `after_mlp` | the same, after `mlp_output`; in a post-norm block y = the block's output, after sum and norm |
| block of a decoder beside an encoder | `cross_attention_output` | likewise |
| attention | `prefix` | y = (keys, values), x = the module's input |
| model | `shift` | y = positions, x = token ids |
| model | `prompt` | y = (embedded text, mask, positions), x = None; see `begin` |
| Embed | `output` | y = the looked-up rows, x = ids, context = each token's text, see below |

A table of words tells its hook which text each token is of: (batch, length) of 1, of 1, 2, ... in packed rows, and of 0
at padding.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .. import weights
from . import cudnn


class Context(NamedTuple):
    """What hooks and blocks may need beside their input.

    Attributes:
      mask: (batch or 1, 1, queries, keys) booleans, True where a query may look.
      positions: (batch, length) of the tokens.
      index: where in the cache the first of these tokens goes; None without a cache.
      deterministic: no dropout.
      causal: whether the mask shows no token a later one; it may hide more.
    """

    mask: jax.Array | None
    positions: jax.Array
    index: jax.Array | None = None
    deterministic: bool = True
    causal: bool = False


class Cache(NamedTuple):
    """Keys and values of the tokens so far, in buffers of a fixed length.

    Attributes:
      layers: a tuple of (keys, values) a layer, each (batch, length, key/value heads, size); or one such
        pair with a leading layer axis for the scanned layout.
      valid: (batch, length), True where the buffer holds a token that may be looked at.
      index: the number of slots filled.
      source: (batch, source length), True where an encoder's states may be looked at; None without an encoder. A layer
        then holds their keys and values too.
    """

    layers: Any
    valid: jax.Array
    index: jax.Array
    source: jax.Array | None = None


def elementwise(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function whose backward pass keeps one array, its slope, made beside its value.

    It is computed in float32. What autodiff would keep of a gelu are three arrays, each written and read again.
    """

    def wide(x):
        return f(x.astype(jnp.float32)).astype(x.dtype)

    @jax.custom_jvp
    def g(x):
        return wide(x)

    @g.defjvp
    def _(primals, tangents):
        y, slope = jax.jvp(wide, primals, (jnp.ones_like(primals[0]),))
        return y, slope * tangents[0]

    return g


@elementwise
def gelu(x):
    """`x Φ(x)`, Φ by erf as PyTorch has it; by erfc it takes a CPU twice the time."""
    return 0.5 * x * (1 + jax.lax.erf(x * 2**-0.5))


@elementwise
def gelu_tanh(x):
    return jax.nn.gelu(x, approximate=True)


silu = elementwise(jax.nn.silu)
ACTIVATIONS: dict[str, Callable] = {
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "quick_gelu": elementwise(lambda x: x * jax.nn.sigmoid(1.702 * x)),
    "relu": jax.nn.relu,
    "silu": silu,
    "swish": silu,
    "tanh": jnp.tanh,
}


def read(module: nn.Module, name: str, init: Callable, *args) -> Any:
    """The variable in the tree, array or node; created only if the tree has none (at initialisation)."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, init, *args)


def optional(module: nn.Module, name: str) -> Any:
    """The variable if the tree has it, else None; static under jit."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def hook(module: nn.Module, name: str, y: Any, *, x: Any, context: Any) -> Any:
    """Calls the hook of that name if this module's dict holds one; otherwise returns y."""
    found = optional(module, name)
    return y if found is None else found(y, x=x, context=context)


def vector(module: nn.Module, name: str, init: Callable, x: jax.Array) -> jax.Array:
    """A vector over the last axis of x, in the dtype and the rank of x."""
    return _along_last(read(module, name, init, (x.shape[-1],)), x)


def _along_last(v: Any, x: jax.Array) -> jax.Array:
    v = weights.materialize(v)
    return v.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


class Linear(nn.Module):
    """`x W + b`; W is `kernel` (inputs, features), b is `bias` (features)."""

    features: int
    use_bias: bool = True
    std: float = 0.02

    @nn.compact
    def __call__(self, x, context=None):
        x = hook(self, "input", x, x=x, context=context)
        w = read(self, "kernel", nn.initializers.normal(self.std), (x.shape[-1], self.features))
        if self.is_initializing() and self.use_bias:
            read(self, "bias", nn.initializers.zeros, (self.features,))
        y = weights.dot(w, x)
        b = optional(self, "bias")  # the tree decides: a method may add a bias to a layer without one
        if b is not None:
            y = y + _along_last(b, y)
        return hook(self, "output", y, x=x, context=context)


class Embed(nn.Module):
    """Rows of `embedding` (rows, features) by id, times `scale`; `attend` is the head tied to it, without."""

    rows: int
    features: int
    dtype: Any = jnp.float32
    std: float = 0.02
    scale: float = 1.0

    def setup(self):
        self.embedding = read(self, "embedding", nn.initializers.normal(self.std), (self.rows, self.features))

    def __call__(self, ids, context=None):
        y = weights.take(self.embedding, ids).astype(self.dtype)
        y = y if self.scale == 1.0 else y * jnp.asarray(self.scale, self.dtype)
        return hook(self, "output", y, x=ids, context=context)

    def attend(self, x):
        return weights.attend(self.embedding, x)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) · scale + bias`, computed in float32; without the last two if not `affine`."""

    eps: float
    affine: bool = True

    @nn.compact
    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h - h.mean(-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        if self.affine:
            h = h * vector(self, "scale", nn.initializers.ones, h) + vector(self, "bias", nn.initializers.zeros, h)
        return h.astype(x.dtype)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) · scale`, the quotient in float32."""

    eps: float

    @nn.compact
    def __call__(self, x):
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.eps)
        return h.astype(x.dtype) * vector(self, "scale", nn.initializers.ones, x)


class Output(NamedTuple):
    """What a model returns; what it has no head for, or was not asked for, is None.

    Attributes:
      hidden: (batch, length, width), the last hidden states.
      pooled: (batch, width).
      logits: (batch, length, vocabulary) of a language model, (batch, labels) of a classifier.
      cache: the cache with these tokens in it.
    """

    hidden: jax.Array
    pooled: jax.Array | None = None
    logits: jax.Array | None = None
    cache: Cache | None = None


def activation(name: str) -> Callable:
    """The activation of a config's name; an unknown one raises with the list."""
    if name not in ACTIVATIONS:
        raise ValueError(f"the activation {name!r} is not supported; supported are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def attention(
    module,
    q,
    k,
    v,
    mask,
    *,
    bias=None,
    scale: float | None = None,
    cap: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    deterministic: bool = True,
):
    """Dot-product attention with grouped key/value heads and dropout on the probabilities.

    Without dropout and cap it is cuDNN's in a program that is lowered for a GPU, where that fits (`cudnn.fits`).
    Elsewhere queries of a causal mask are taken in blocks, and of a block's scores those that it cannot see are not
    computed, which leaves a little more than half of them.

    Args:
      module: gives the dropout key.
      q: (batch, queries, heads, size).
      k, v: (batch, keys, key/value heads, size).
      mask: (batch or 1, 1, queries, keys') booleans. Keys beyond keys' come first and are always seen:
        a prefix.
      bias: (batch or 1, heads, queries or 1, keys), added to the scores; keys of a prefix included.
      scale: of the scores, before the bias; default: 1 / sqrt(size).
      cap: the scaled scores s become cap · tanh(s / cap), before the bias.
      causal: whether the mask hides from every query the keys that come after its own, the last query's being the
        last key.

    Returns:
      (batch, queries, heads · size)
    """
    extra = k.shape[1] - mask.shape[-1]
    if extra:
        mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (extra, 0)), constant_values=True)
    drops = bool(dropout) and not deterministic

    def drop(weights):
        return nn.Dropout(dropout, parent=module)(weights, deterministic=False) if drops else weights

    def attend(q, k, v, bias, mask):
        hidden = k.shape[1] - q.shape[1]  # keys before the first query's own
        ends = _ends(q.shape[1]) if causal and hidden >= 0 else [q.shape[1]]
        blocks = []
        for first, end in itertools.pairwise([0, *ends]):
            seen = hidden + end if causal and hidden >= 0 else k.shape[1]
            own = [None if x is None else x[:, :, first:end] if x.shape[2] > 1 else x for x in (bias, mask)]
            bias_, mask_ = (None if x is None else x[..., :seen] for x in own)
            blocks.append(_attend(q[:, first:end], k[:, :seen], v[:, :seen], bias_, mask_, scale, cap, drop))
        return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)

    if not drops and cap is None and cudnn.fits(q, k, v):
        fused = functools.partial(cudnn.attention, scale)
        y = jax.lax.platform_dependent(q, k, v, bias, mask, cuda=fused, default=attend)
    else:
        y = attend(q, k, v, bias, mask)
    return y.reshape(*q.shape[:2], -1)


BLOCK, BLOCKS = 64, 8  # queries of a block of causal attention, at least; blocks, at most: each is compiled


def _ends(queries: int) -> list[int]:
    """Where the blocks of so many queries end.

    >>> _ends(63), _ends(200), _ends(2048)[:3]
    ([63], [67, 134, 200], [256, 512, 768])
    """
    n = max(1, min(BLOCKS, queries // BLOCK))
    size = math.ceil(queries / n)
    return [min(queries, (i + 1) * size) for i in range(n)]


def _attend(q, k, v, bias, mask, scale, cap, drop):
    """`softmax(q k) v`, heads first, so that both are products of matrices; scores, sums and quotients are float32.

    It divides at the end, where there is less to divide, and the gradient by a score is `p (dp - y dy)` as in flash
    attention: where p is nearly 1 that difference is rounded as its terms are, as it is not in a softmax of its own.

    Args:
      as for `attention`, but the mask is for all keys, and `drop` takes what is to be divided.

    Returns:
      (batch, queries, heads, size)
    """
    batch, queries, heads, size = q.shape
    keys, shared = k.shape[1:3]
    grouped = q.reshape(batch, queries, shared, -1, size).transpose(0, 2, 3, 1, 4).reshape(batch, shared, -1, size)
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    both = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(grouped, k, (((3,), (3,)), both), preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, shared, -1, queries, keys) * (size**-0.5 if scale is None else scale)
    if cap is not None:
        scores = cap * jnp.tanh(scores / cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(-1, shared, heads // shared, *bias.shape[2:])
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    dropped = drop(weights).astype(v.dtype).reshape(batch, shared, -1, keys)
    y = jax.lax.dot_general(dropped, v, (((3,), (2,)), both), preferred_element_type=jnp.float32)
    y = (y.reshape(batch, shared, -1, queries, size) / weights.sum(-1, keepdims=True)).astype(q.dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, size)


def causal_mask(attention_mask: jax.Array) -> jax.Array:
    """(batch, length) of 0 and 1 -> (batch, 1, length, length): own and earlier tokens, no padding."""
    t = attention_mask.shape[1]
    return attention_mask[:, None, None, :].astype(bool) & jnp.tril(jnp.ones((t, t), bool))[None, None]


def window(mask: jax.Array, size: int) -> jax.Array:
    """The mask (batch or 1, 1, queries, keys), but of the keys that a query sees only the last `size`.

    What is hidden already, padding or another text of a packed row, takes no room, so a text and the virtual tokens
    before it are as far apart wherever they stand.
    """
    if mask.shape[-1] <= size:
        return mask
    return mask & (jax.lax.cumsum(mask.astype(jnp.int32), axis=3, reverse=True) <= size)


def last_token(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """(batch, length, width), (batch, length) of 0 and 1 -> (batch, width) at each row's last token, no padding."""
    last = jnp.argmax(jnp.where(mask > 0, jnp.arange(mask.shape[1]), -1), axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def shift_right(ids: jax.Array, start: int) -> jax.Array:
    """What a decoder reads to predict `ids`, (batch, length): the start token, then all but the last of them.

    >>> shift_right(jnp.array([[5, 6, 7]]), 0).tolist()
    [[0, 5, 6]]
    """
    return jnp.concatenate([jnp.full_like(ids[:, :1], start), ids[:, :-1]], axis=1)


def extend_cache(cache: Cache, attention_mask: jax.Array) -> tuple[Cache, jax.Array]:
    """Makes room for new tokens; returns the cache and the mask (batch, 1, new, length) of what they see."""
    new = attention_mask.shape[1]
    valid = jax.lax.dynamic_update_slice(cache.valid, attention_mask.astype(bool), (0, cache.index))
    slots, rows = jnp.arange(valid.shape[1]), cache.index + jnp.arange(new)
    mask = valid[:, None, None, :] & (slots[None, :] <= rows[:, None])[None, None]
    return cache._replace(valid=valid, index=cache.index + new), mask


def repeat_rows(cache: Cache, n: int) -> Cache:
    """Every row n times, the copies beside each other: for beams."""
    axis = 0 if isinstance(cache.layers[0], tuple) else 1  # scanned buffers have a layer axis before the batch's
    valid, source = jnp.repeat(cache.valid, n, 0), None if cache.source is None else jnp.repeat(cache.source, n, 0)
    layers = jax.tree.map(lambda x: jnp.repeat(x, n, axis), cache.layers)
    return Cache(layers, valid, cache.index, source)


def gather_rows(cache: Cache, rows: jax.Array) -> Cache:
    """Keys and values of these rows, (batch); only within copies of one row, as what all copies share stays."""

    def own(layer, axis):  # an encoder's keys and values, after the first two, are shared
        return *(jnp.take(x, rows, axis) for x in layer[:2]), *layer[2:]

    if isinstance(cache.layers[0], tuple):
        return cache._replace(layers=tuple(own(layer, 0) for layer in cache.layers))
    return cache._replace(layers=own(cache.layers, 1))


def causal_context(
    attention_mask: jax.Array,
    positions: jax.Array,
    cache: Cache | None,
    deterministic: bool,
    segments: jax.Array | None = None,
) -> tuple[Context, Cache | None]:
    """A decoder's context for new tokens, (batch, length) of 0 and 1, and the cache with room for them, if any.

    Args:
      segments: (batch, text length), of packed texts: the number of each token's text, 0 at padding. A token looks at
        its own text, and at the virtual tokens that stand before the row.

    Raises:
      ValueError: packed texts and a cache.
    """
    if segments is not None and cache is not None:
        raise ValueError("packed texts (segment_ids) are for training, and a cache holds one text a row; leave one out")
    if cache is None:
        mask = causal_mask(attention_mask)
        if segments is not None:
            mask &= _same_text(segments, attention_mask.shape[1])
        return Context(mask, positions, None, deterministic, causal=True), None
    extended, mask = extend_cache(cache, attention_mask)
    return Context(mask, positions, cache.index, deterministic), extended


def _same_text(segments: jax.Array, length: int) -> jax.Array:
    """(batch, text length) -> (batch, 1, length, length); 0, of virtual tokens and padding, goes with any text.

    Padding as a key is left to the attention mask; as a query it looks somewhere, lest a softmax be over nothing.
    """
    all_ = jnp.pad(segments, ((0, 0), (length - segments.shape[1], 0)))
    queries, keys = all_[:, None, :, None], all_[:, None, None, :]
    return (queries == keys) | (keys == 0) | (queries == 0)


def begin(
    module: nn.Module,
    x: jax.Array,
    mask: jax.Array,
    positions: jax.Array | None,
    cache: Cache | None = None,
    *,
    continued: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """Puts the n virtual tokens of the `prompt` hook, if there is one, before the embedded text.

    Padding on the left stands between the two. What continues a text in the cache gets no virtual tokens again.

    Args:
      x: (batch, length, width) of the text.
      mask: (batch, length) of 0 and 1.
      positions: (batch or 1, length) of the text alone; default: counted from 0, or from the cache's end.

    Returns:
      x, mask and positions with what was put before them, and how many columns that are.
    """
    prompt = optional(module, "prompt")
    n = 0 if prompt is None else prompt.n
    counted = jnp.arange(x.shape[1])[None] + (0 if cache is None else cache.index - n * continued)
    own: jax.Array = (counted if positions is None else positions) + n
    if prompt is None or continued:
        return x, mask, own, 0
    return *prompt((x, mask, own), x=None, context=None), n


def write_cache(layer: tuple, k: jax.Array, v: jax.Array, index: jax.Array) -> tuple:
    """Writes new keys and values into a layer's buffers from slot `index` on."""
    return tuple(
        jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, index, 0, 0))
        for old, new in zip(layer, (k, v), strict=True)
    )


def _recompute(policy: Callable) -> Callable:
    return lambda call, **how: nn.remat(call, policy=policy, **how)


# What is kept of a block for the backward pass, which computes the rest again: name -> (call, prevent_cse) -> call.
REMAT: dict[str, Callable] = {
    "none": lambda call, **how: call,  # all activations are kept
    "block": _recompute(jax.checkpoint_policies.nothing_saveable),  # its input
    "dots": _recompute(jax.checkpoint_policies.save_only_these_names(weights.DOT)),  # and what its weights give
}


def rematerialise(call: Callable, name: str, **how: Any) -> Callable:
    """The call, of a module and arrays, that keeps for the backward pass what `REMAT` says; an unknown name raises."""
    if name not in REMAT:
        raise ValueError(f"there is no rematerialisation {name!r}; write one of {', '.join(map(repr, REMAT))}")
    return REMAT[name](call, **how)


def run_blocks(
    parent: nn.Module,
    block: Callable,
    name: str,
    n: int,
    x: jax.Array,
    context: Context,
    cache: Any,
    *args,
    each: tuple = (),
    remat: str,
) -> tuple[jax.Array, Any]:
    """Runs n blocks `name_0 ...` one after another, or scans over `name_*` if that is what the tree holds.

    Args:
      block: name -> module whose call is `(x, layer cache or None, context, *own, *args) -> (x, layer cache)`.
      args: arrays that all blocks share, such as rotary angles.
      each: arrays of n rows, one for each block: its `own`.
      remat: what the backward pass keeps of a block's activations, a name in `REMAT`.

    Raises:
      ValueError: an unknown name of that kind.
    """
    stacked = f"{name}_*"
    static = {"deterministic": context.deterministic, "causal": context.causal}
    arrays = context._replace(**dict.fromkeys(static))

    def call(module, x, layer, own, arrays, args):
        return module(x, layer, arrays._replace(**static), *own, *args)

    if parent.has_variable("params", stacked):
        body = rematerialise(call, remat, prevent_cse=False)  # two loops share nothing to eliminate
        scan = nn.scan(
            body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType] - a tree is allowed
            length=n,
        )
        return scan(block(stacked), x, cache, each, arrays, args)
    caches = []
    body = rematerialise(call, remat, prevent_cse=True)
    for i in range(n):
        own = tuple(rows[i] for rows in each)
        x, layer = body(block(f"{name}_{i}"), x, None if cache is None else cache[i], own, arrays, args)
        caches.append(layer)
    return x, None if cache is None else tuple(caches)
