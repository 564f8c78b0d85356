"""Full fine-tuning: everything trains."""

from .. import masks
from .base import Method, method, refuse_codes


def full() -> Method:
    """Full fine-tuning: every floating leaf trains.

    Raises:
      ValueError: (from `init`) the base is quantised.

    >>> import jax, jax.numpy as jnp
    >>> full().trainable({"w": jnp.ones(2)})
    {'w': True}
    """

    def init(key, params, sites):
        return refuse_codes("full", params)

    return method("full", {}, init, trainable=masks.everything)
