"""Norm tuning: the scales and biases of the normalisation layers train."""

from .. import masks
from ..tree import flatten
from ..weights import Trained, is_node
from .base import Method, mark, method


def norm_tuning() -> Method:
    """Trains the norms, their scales and biases: Zhao et al. 2024 (arXiv:2312.11420), section 3.

    All of them count: in the blocks, after the embeddings, after the last block.

    Raises:
      ValueError: (from `init`) the model has no site of kind 'norm'.

    The count is `2 d` a LayerNorm and `d` an RMSNorm.
    """

    def init(key, params, sites):
        sites = tuple(sites)
        modules = {s.module for s in sites if s.kind == "norm"}
        if not modules:
            raise ValueError(f"norm_tuning: no site is a norm; their kinds are {sorted({s.kind for s in sites})}")
        leaves = flatten(params, is_leaf=is_node)
        return mark("norm_tuning", params, [p for p in leaves if p.rpartition("/")[0] in modules])

    return method("norm_tuning", {}, init, trainable=masks.by_node(Trained))
