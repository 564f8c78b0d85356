"""The task head alone: linear probing."""

from .. import masks
from ..tree import flatten
from ..weights import Trained, is_node
from .base import Method, mark, method


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
            kinds = sorted({s.kind for s in sites})
            raise ValueError(
                f"head: this model has no task head (its kinds of site are {kinds}); leave head out, "
                "or load the model for a task that has one"
            )
        return mark("head", params, chosen)

    return method("head", {}, init, trainable=masks.by_node(Trained))
