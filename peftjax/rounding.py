"""Parameters in bfloat16 whose updates are rounded at random, so that small ones are not lost."""

import jax
import jax.numpy as jnp

from .methods.base import path_key
from .tree import Tree, map_with_path


def round_randomly(key: jax.Array, x: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two nearest bfloat16 values, with the probabilities that make the mean x.

    Stochastic rounding (Gupta et al. 2015, arXiv:1502.02551, section 3.1): a random number of 16 bits is added to the
    16 bits that bfloat16 does not have, and these are cut off. What is not finite stays as it is.

    >>> x = jnp.full(10_000, 1 + 2**-10)  # bfloat16 has 1 and 1 + 2**-7
    >>> y = round_randomly(jax.random.key(0), x)
    >>> sorted(set(y.tolist())), round(float(jnp.mean(y == 1)), 1)
    ([1.0, 1.0078125], 0.9)
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (_noise(key, x.shape) >> 16)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """32 random bits an element, each from its number alone, so that they are made where they are used.

    `jax.random.bits` would make an array of its own: 2 GB for the embedding of BLOOM 7B. The mixing function is
    "lowbias32" (Wellons 2018, hash prospector), applied twice, once with each of two words drawn by the key.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    number, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        number = number + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return _mixed(_mixed(number ^ first) + second)


def _mixed(x: jax.Array) -> jax.Array:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)


def apply_updates(key: jax.Array, params: Tree, updates: Tree) -> Tree:
    """`params + updates`, summed in the updates' float32; for parameters in bfloat16 the sum is rounded at random.

    Each leaf draws by its path, whatever else is in the tree.
    """

    def one(path, p, u):
        if p.dtype != jnp.bfloat16:
            return (p + u).astype(p.dtype)
        return round_randomly(path_key(key, path), p.astype(jnp.float32) + u)

    return map_with_path(one, params, updates)
