"""IA3: trained factors on keys, values and the inner activations of the MLP."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import get, update
from ..weights import materialize, node, static
from .base import LINEAR, Method, method, select


@node
class IA3:
    """Hook of a linear layer: its output, or its input, times `l` at the given columns; bias included.

    Attributes:
      l: factors of all columns, one after another.
      columns: (first, last + 1) of each run of features that it acts on.
      side: 'output' or 'input'.
      width: features of that side.
    """

    l: Any  # noqa: E741 - the paper's letter
    columns: tuple[tuple[int, int], ...] = static(default=())
    side: str = static(default="output")
    width: int = static(default=0)
    trains = ("l",)
    undecayed = ("l",)

    def factors(self) -> jax.Array:
        """(width) with ones where it does not act."""
        full, start = jnp.ones((*self.l.shape[:-1], self.width), self.l.dtype), 0
        for first, end in self.columns:
            full = full.at[..., first:end].set(self.l[..., start : start + end - first])
            start += end - first
        return full

    def __call__(self, y, *, x, context):
        f = self.factors()  # bfloat16 would round what is near 1 by up to 0.4%
        return (y.astype(f.dtype) * f.reshape(*(1,) * (y.ndim - 1), -1)).astype(y.dtype)

    def fold(self, siblings: Mapping) -> dict:
        """The layer's kernel and bias with the factors in them."""
        f, w = self.factors(), materialize(siblings["kernel"])
        new = {"kernel": (w * (f[..., None, :] if self.side == "output" else f[..., :, None])).astype(w.dtype)}
        if self.side == "output" and "bias" in siblings:
            b = materialize(siblings["bias"])
            new["bias"] = (b * f).astype(b.dtype)
        return {**siblings, **new}


def ia3(targets: Sequence[str] = ("key", "value", "mlp_out")) -> Method:
    """Trains factors `l_k ⊙ K`, `l_v ⊙ V` and `(l_ff ⊙ γ(W_1 x)) W_2`: Liu et al. 2022 (arXiv:2205.05638), section 3.3.

    They start at 1, so the function starts unchanged. Where the target is an 'mlp_out', the factors act on its input,
    after the nonlinearity (and, in a gated MLP, after the gate); elsewhere on the output, bias included.

    Args:
      targets: kinds of site or path patterns of linear layers.

    Raises:
      ValueError: (from `init`) a target that matches nothing, or that is no linear layer.

    The count is a factor for each feature: `2 k + ff` a layer, and `2 k` more for each cross-attention.

    >>> params = {"v": {"kernel": jnp.ones((3, 2))}}
    >>> new = ia3(["v/kernel"]).init(jax.random.key(0), params, ())
    >>> new["v"]["output"].l.tolist()
    [1.0, 1.0]
    """
    arguments = {"targets": targets if isinstance(targets, str) else list(targets)}

    def init(key, params, sites):
        nodes: dict[str, IA3] = {}
        chosen = select(params, sites, targets, kinds=LINEAR)
        for s in sorted(chosen, key=lambda s: (s.path, s.parts[s.part].start if s.part else 0)):
            if not s.path.endswith("/kernel"):
                raise ValueError(f"ia3: {s.path} is no linear layer; target kinds such as 'key', 'value', 'mlp_out'")
            w = get(params, s.path)
            side = "input" if s.kind == "mlp_out" else "output"
            width = w.shape[0] if side == "input" else w.shape[-1]
            run = (s.parts[s.part].start, s.parts[s.part].stop) if s.part else (0, width)
            at = f"{s.module}/{side}"
            runs = (*(nodes[at].columns if at in nodes else ()), run)
            nodes[at] = IA3(jnp.ones(sum(end - first for first, end in runs)), runs, side, width)
        return update(params, nodes)

    return method("ia3", arguments, init, trainable=masks.by_node(IA3))
