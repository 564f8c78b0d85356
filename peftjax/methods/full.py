"""Full fine-tuning: everything trains."""

from .. import masks
from ..weights import quantized_paths
from .base import Method, method


def full() -> Method:
    """Full fine-tuning: every floating leaf trains.

    Raises:
      ValueError: (from `init`) the base is quantised.

    >>> import jax, jax.numpy as jnp
    >>> full().trainable({"w": jnp.ones(2)})
    {'w': True}
    """

    def init(key, params, sites):
        if codes := quantized_paths(params):
            raise ValueError(
                f"full: the base is quantised ({codes[0]} and {len(codes) - 1} more), and codes cannot train; load it "
                "without quantize, or choose a method that keeps the base frozen, such as lora"
            )
        return params

    return method("full", {}, init, trainable=masks.everything)
