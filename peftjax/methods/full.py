"""Full fine-tuning: everything trains, or some arrays whole."""

from collections.abc import Sequence

from .. import masks
from ..weights import Trained
from .base import Method, mark, method, refuse_codes, select


def full(targets: Sequence[str] | None = None) -> Method:
    """Full fine-tuning: every floating leaf trains, or those of some targets alone.

    Args:
      targets: kinds of site or path patterns, such as `['embedding', 'lm_head']` or `['classifier/.*']` for a module
        with its bias; default: everything.

    Raises:
      ValueError: (from `init`) the base is quantised, or a target matches nothing.

    >>> import jax, jax.numpy as jnp
    >>> full().trainable({"w": jnp.ones(2)})
    {'w': True}
    >>> new = full(["head/.*"]).init(jax.random.key(0), {"head": {"kernel": jnp.ones((2, 1))}, "w": jnp.ones(2)}, ())
    >>> full(["head/.*"]).trainable(new)["w"]
    False
    """
    if targets is None:

        def everything(key, params, sites):
            return refuse_codes("full", params)

        return method("full", {}, everything, trainable=masks.everything)

    def init(key, params, sites):
        return mark("full", params, select(params, sites, targets))

    arguments = {"targets": targets if isinstance(targets, str) else list(targets)}
    return method("full", arguments, init, trainable=masks.by_node(Trained))
