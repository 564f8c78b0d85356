"""cuDNN's fused attention, for programs that are lowered for a GPU: scores and probabilities are never in memory.

It is `jax.nn.dot_product_attention(implementation="cudnn")` and what that asks for: a bias in the dtype of the queries
with a row for each of them, and even lengths, where there is a gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def fits(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
    """Whether cuDNN can do it: arrays as for `attention`, of 16 bits; heads of a multiple of 8 up to 128.

    One query alone, a step of generation, makes so few scores that nothing would be saved.
    """
    half = q.dtype == k.dtype == v.dtype and q.dtype in (jnp.bfloat16, jnp.float16)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and q.shape[1] > 1 and traceable()


@functools.cache
def traceable() -> bool:
    """Whether jax's CUDA plugin is here, which cuDNN's attention is traced with, and no GPU that is too old for it.

    The GPU that a program is compiled for need not be here.
    """
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    old = [d for d in jax.devices() if d.platform == "gpu" and float(getattr(d, "compute_capability", 8)) < 8]
    try:
        jax.eval_shape(functools.partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except RuntimeError:
        return False
    return not old


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(scale: float | None, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, mask: jax.Array):
    """`softmax(scale · q k + bias) v` over the keys that the mask shows; a query that sees none gets no NaN.

    The backward pass calls the forward kernel again, with the same arguments: XLA computes it once where both are in
    one loop body or none, and from loop to loop the kernel's output and statistics are not kept.

    Args:
      scale: default: 1 / sqrt(size).
      q: (batch, queries, heads, size).
      k, v: (batch, keys, key/value heads, size).
      bias: (batch or 1, heads or 1, queries or 1, keys).
      mask: (batch or 1, 1, queries or 1, keys) booleans.

    Returns:
      (batch, queries, heads, size)
    """
    return _forward(scale, q, k, v, bias, mask)[0]


def _forward(scale, q, k, v, bias, mask):
    def call(*args):  # the kernel that gradients need, so that it is the same one in both passes
        return jax.vjp(functools.partial(_kernel, scale, args[-1]), *args[:-1])[0]

    return _folded(call)(q, k, v, bias, mask), (q, k, v, bias, mask)


def _backward(scale, arguments, dy):
    def call(dy, mask, *args):
        return jax.vjp(functools.partial(_kernel, scale, mask), *args)[1](dy)

    *args, mask = arguments
    return *_folded(call)(dy, mask, *args), None


attention.defvjp(_forward, _backward)


def _kernel(scale, mask, q, k, v, bias):
    queries, keys = q.shape[1], k.shape[1]
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], queries, keys))
    if bias is not None:
        bias = _even(_relative(bias, mask).astype(q.dtype), 2, 3)
    q, k, v = (_even(x, 1) for x in (q, k, v))
    mask = _even(mask, 2, 3)  # what is added is not seen
    y = jax.nn.dot_product_attention(q, k, v, bias, mask, scale=scale, implementation="cudnn")
    return y[:, :queries]


def _relative(bias: jax.Array, mask: jax.Array) -> jax.Array:
    """A bias of one row for all queries, less the largest that a query sees; the softmax drops the difference.

    ALiBi's grows along the keys, and in 8 bits its last ones would all be the same. What is near the largest stays
    exact, and the rest has no weight.
    """
    if bias.shape[2] != 1:
        return bias
    top = jnp.where(mask, jax.lax.stop_gradient(bias), -jnp.inf).max(-1, keepdims=True)
    return bias - jnp.where(jnp.isfinite(top), top, 0)


def _even(x: jax.Array, *axes: int) -> jax.Array:
    """Zeros behind the axes of odd length."""
    return jnp.pad(x, [(0, n % 2 if i in axes else 0) for i, n in enumerate(x.shape)])


def _folded(f: Callable) -> Callable:
    """`f`, whose `jax.vmap` is `f` itself on a longer batch.

    jax's own way to map cuDNN's attention cannot map a bias or mask that heads share. The arguments' first axis is the
    batch, as long as the first one's or 1.
    """
    mapped = jax.custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def rule(n, batched, *args):
        one = jax.tree.map(lambda x, has: x[0] if has else x, args, tuple(batched))
        size = one[0].shape[0]

        def fold(x, has):  # (n, batch or 1, ...) or without n -> (n · batch, ...)
            x = x if has else x[None]
            return jnp.broadcast_to(x, (n, size, *x.shape[2:])).reshape(n * size, *x.shape[2:])

        def unfold(y, like):
            y = y.reshape(n, size, *y.shape[1:])
            return y if like.shape[0] == size else y.sum(1, keepdims=True)  # the gradient of what a batch shares

        y = mapped(*jax.tree.map(fold, args, tuple(batched)))
        y = jax.tree.map(unfold, y, jax.eval_shape(f, *one))
        return y, jax.tree.map(lambda _: True, y)

    return mapped
