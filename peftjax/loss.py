"""Cross-entropy of a language model, a few tokens at a time: the logits of all of them never exist at once.

With a vocabulary of 250,000 the logits of 4,096 tokens take 4 GB, and their gradient as much again. The head is linear,
or nearly so, and its loss is a sum over tokens, so both can be made and dropped chunk by chunk. The gradient of a chunk
is computed beside its loss, while its logits are there: no product is computed twice, as it would be if the chunk
were recomputed in the backward pass.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .tree import Tree

Head = Callable[[Tree, Any], jax.Array]  # (params, hidden states (batch, length, width)) -> logits, float32

LOGITS, TOKENS = 2**26, 256  # logits at once, about; tokens at once, at least: else the products would be too thin


def cross_entropy(
    head: Head, params: Tree, hidden: Any, targets: jax.Array, weights: jax.Array, tokens: int | None = None
) -> jax.Array:
    """`Σ_t w_t (log Σ_v exp z_tv - z_t,y_t)` with the logits `z = head(params, hidden)`, and its gradient.

    A chunk's gradient by its logits is `w_t (softmax(z_t) - onehot(y_t))`; the head's own derivative takes it on to
    the hidden states, and to those leaves of `params` that are differentiated and that the head reads. No other leaf
    costs anything. The sums over the chunks are float32. Chunks are cut along the length, so a batch that is spread
    over devices stays spread. Dropout keys in `params` are drawn anew for each chunk.

    A loop needs the gradient of the leaves twice, for the chunk and for the sum. Where that would cost more than the
    logits, a head that trains and few tokens, there is no loop.

    Args:
      head: such as `Model.logits`; it must not close over what is differentiated.
      params: any tree; leaves that are no floats may be in it.
      hidden: (batch, length, width); a tree of such arrays, if the head takes it.
      targets: (batch, length) token ids y.
      weights: (batch, length) w, 0 where nothing is predicted.
      tokens: in a chunk, at most; default: as many as have about 2^26 logits, but at least 256. There is no chunk of
        less than one position of each row.

    Returns:
      () float32. Only reverse mode can differentiate it.

    Raises:
      ValueError: shapes that do not fit, or tokens below 1.

    >>> table, hidden = jnp.eye(3), jnp.ones((1, 4, 3))
    >>> def head(params, x):
    ...     return x @ params
    >>> loss, grad = jax.value_and_grad(cross_entropy, 1)(head, table, hidden, jnp.zeros((1, 4), int), jnp.ones((1, 4)))
    >>> round(float(loss), 4), [f"{x:.3f}" for x in grad[0]]  # 4 log 3
    (4.3944, ['-2.667', '1.333', '1.333'])
    """
    _check(hidden, targets, weights, tokens)
    leaves, narrow, vocabulary = _read_by(head, params, hidden)

    @jax.custom_vjp
    def total(leaves, hidden, targets, weights):
        def part(_, xs, number):
            return (), -_chosen(narrow(_of_chunk(leaves, number), xs[0]), xs[1])[0]

        size = _positions(targets.shape, vocabulary, tokens)
        _, each = _by_chunks(part, (), (hidden, targets), size)
        return (each * weights.astype(jnp.float32)).sum()

    def forward(leaves, hidden, targets, weights):
        trains, moves = [leaf.perturbed for leaf in leaves], any(h.perturbed for h in jax.tree.leaves(hidden))
        leaves, hidden, y, w = jax.tree.map(lambda x: x.value, (leaves, hidden, targets, weights))
        trained = [leaf for leaf, t in zip(leaves, trains, strict=True) if t]

        def part(sums, xs, number):
            x, y, w = xs
            rest = _of_chunk(leaves, number)

            def logits(trained, x=x):
                new = iter(trained)
                return narrow([next(new) if t else leaf for leaf, t in zip(rest, trains, strict=True)], x)

            z, pullback = jax.vjp(logits, trained, *([x] if moves else []))
            logprob, normal = _chosen(z, y)
            target = jax.lax.broadcasted_iota(y.dtype, z.shape, z.ndim - 1) == y[..., None]
            by_trained, *by_hidden = pullback(w[..., None] * (jnp.exp(z - normal[..., None]) - target.astype(z.dtype)))
            return jax.tree.map(lambda s, g: s + g.astype(s.dtype), sums, by_trained), (-logprob, by_hidden)

        size = _positions(y.shape, vocabulary, tokens, sum(leaf.size for leaf in trained))
        zeros = [jnp.zeros(leaf.shape, _wide(leaf.dtype)) for leaf in trained]
        sums, (each, by_hidden) = _by_chunks(part, zeros, (hidden, y, w.astype(jnp.float32)), size)
        by_trained = iter(s.astype(leaf.dtype) for s, leaf in zip(sums, trained, strict=True))
        by_leaf = [next(by_trained) if t else None for t in trains]
        return (each * w.astype(jnp.float32)).sum(), (
            by_leaf,
            by_hidden,
            each.astype(w.dtype) if weights.perturbed else None,
        )

    def backward(gradients, cotangent):
        def scale(g):
            return (cotangent * g.astype(_wide(g.dtype))).astype(g.dtype)

        by_leaf, by_hidden, each = jax.tree.map(scale, gradients)
        return by_leaf, by_hidden[0] if by_hidden else None, None, each

    total.defvjp(forward, backward, symbolic_zeros=True)
    return total(leaves, hidden, targets, weights)


def log_likelihoods(
    head: Head, params: Tree, hidden: Any, targets: jax.Array, tokens: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """`log softmax(head(params, hidden))_y` of every target y, and whether it is the most likely token.

    For what is not differentiated; the backward pass would keep all logits.

    Args: as for `cross_entropy`.

    Returns:
      (batch, length) float32 and booleans.
    """

    def part(_, xs, number):
        z = head(params, xs[0])
        return (), (_chosen(z, xs[1])[0], z.argmax(-1) == xs[1])

    vocabulary = jax.eval_shape(head, params, _one(hidden)).shape[-1]
    return _by_chunks(part, (), (hidden, targets), _positions(targets.shape, vocabulary, tokens))[1]


def _check(hidden, targets, weights, tokens) -> None:
    for x in jax.tree.leaves(hidden):
        if x.ndim != 3 or not x.shape[:2] == targets.shape == weights.shape:
            raise ValueError(
                "the loss needs hidden states (batch, length, width), and targets and weights (batch, length) of the "
                f"same tokens; got {x.shape}, {targets.shape} and {weights.shape}"
            )
    if tokens is not None and tokens < 1:
        raise ValueError(f"a chunk has at least 1 token; got tokens={tokens}")


def _wide(dtype: Any) -> Any:
    """What is summed up in: at least float32."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def _one(hidden: Any) -> Any:
    """The shape of one position of each row."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((x.shape[0], 1, *x.shape[2:]), x.dtype), hidden)


def _read_by(head: Head, params: Tree, hidden: Any) -> tuple[list, Callable, int]:
    """The leaves that the head computes with, the head as a function of them and hidden states, and its vocabulary."""
    leaves, structure = jax.tree.flatten(params)
    traced = jax.make_jaxpr(lambda leaves, x: head(jax.tree.unflatten(structure, leaves), x))(leaves, _one(hidden))
    used = {id(v) for e in traced.jaxpr.eqns for v in e.invars}
    read = [i for i, v in enumerate(traced.jaxpr.invars[: len(leaves)]) if id(v) in used]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]  # for the rest: to compute with one is an error

    def narrow(given, x):
        whole = shapes.copy()
        for i, leaf in zip(read, given, strict=True):
            whole[i] = leaf
        return head(jax.tree.unflatten(structure, whole), x)

    return [leaves[i] for i in read], narrow, traced.out_avals[0].shape[-1]


def _of_chunk(leaves: list, number: jax.Array | None) -> list:
    """The leaves, with keys as those of a chunk, lest dropout be the same in all of them."""
    if number is None:
        return leaves

    def draw(x):
        return jax.vmap(jax.random.fold_in, (0, None))(x.reshape(-1), number).reshape(x.shape)

    return [draw(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]


def _chosen(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The targets' logarithmic probabilities, and the logarithm of the sum that they are normalised by."""
    normal = jax.nn.logsumexp(logits, axis=-1)
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - normal, normal


def _positions(shape: tuple[int, ...], vocabulary: int, tokens: int | None, trained: int = 0) -> int:
    """How many positions of all rows make a chunk: so many that the last one needs least padding.

    Args:
      shape: (batch, length).
      tokens: at most; default: by the vocabulary.
      trained: entries of the leaves whose gradient a loop would sum up.

    >>> _positions((8, 512), 32_000, None), _positions((8, 512), 250_880, None), _positions((8, 64), 250_880, None)
    (256, 32, 32)
    >>> _positions((8, 64), 250_880, None, trained=250_880 * 4096)
    64
    """
    batch, length = shape
    most = max(1, (tokens or max(TOKENS, LOGITS // vocabulary)) // batch)
    saved = batch * (length - most) * vocabulary  # logits and their gradient; the loop costs a second one of the leaves
    if most >= length or (tokens is None and 2 * saved < trained):
        return length
    return min(range(most, most // 2, -1), key=lambda n: math.ceil(length / n) * n)


def _by_chunks(part: Callable, carry: Any, arrays: Any, size: int) -> tuple[Any, Any]:
    """`jax.lax.scan` over chunks of so many positions of arrays (batch, length, ...); without a loop if one will do.

    What `part` gives for each position is put together again; of the padding, all zeros, it is dropped.

    Args:
      part: (carry, arrays of a chunk, its number, None without a loop) -> (carry, arrays (batch, positions, ...)).
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    if size >= length:
        return part(carry, arrays, None)
    n = math.ceil(length / size)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, n * size - length), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)

    def join(x):
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(x.shape[0], n * size, *x.shape[3:])[:, :length]

    chunks = jax.tree.map(split, arrays), jnp.arange(n)
    carry, each = jax.lax.scan(lambda carry, x: part(carry, *x), carry, chunks)
    return carry, jax.tree.map(join, each)
