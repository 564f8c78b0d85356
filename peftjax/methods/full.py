"""Full fine-tuning: everything trains."""

from .. import masks
from .base import Method, method


def full() -> Method:
    """Full fine-tuning: every floating leaf trains.

    >>> import jax, jax.numpy as jnp
    >>> full().trainable({"w": jnp.ones(2)})
    {'w': True}
    """
    return method("full", {}, init=lambda key, params, sites: params, trainable=masks.everything)
