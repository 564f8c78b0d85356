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
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def apply_updates(key: jax.Array, params: Tree, updates: Tree) -> Tree:
    """`params + updates`, summed in the updates' float32; for parameters in bfloat16 the sum is rounded at random.

    Each leaf draws by its path, whatever else is in the tree.
    """

    def one(path, p, u):
        if p.dtype != jnp.bfloat16:
            return (p + u).astype(p.dtype)
        return round_randomly(path_key(key, path), p.astype(jnp.float32) + u)

    return map_with_path(one, params, updates)
