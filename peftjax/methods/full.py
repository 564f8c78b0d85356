"""The two ends of the scale: train everything, or the task head alone."""

from .. import masks
from ..tree import flatten
from ..weights import Trained, is_node
from .base import Method, mark, method


def full() -> Method:
    """Full fine-tuning: every floating leaf trains.

    >>> import jax, jax.numpy as jnp
    >>> full().trainable({"w": jnp.ones(2)})
    {'w': True}
    """
    return method("full", {}, init=lambda key, params, sites: params, trainable=masks.everything)


def head() -> Method:
    """The task head alone trains (linear probing); chain it with any other method of a classifier.

    Raises:
      ValueError: (from `init`) the model has no site of kind 'head', as a causal language model has none.
    """

    def init(key, params, sites):
        modules = {s.module for s in sites if s.kind == "head"}
        leaves = flatten(params, is_leaf=is_node)
        chosen = [p for p in leaves if p.rpartition("/")[0] in modules]
        if not chosen:
            raise ValueError(
                "head: this model has no task head (its kinds of site are "
                f"{sorted({s.kind for s in sites})}); leave head out, or load the model for a task that has one"
            )
        return mark("head", params, chosen)

    return method("head", {}, init, trainable=masks.by_node(Trained))
