"""Adapters: small bottlenecks after, or beside, the halves of every block."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..models.layers import activation as activation_of
from ..tree import update
from ..weights import node, product, static
from .base import Method, method, path_key, plain

AFTER_BOTH = ("attention_output", "mlp_output")  # hooks of a block


@node
class Adapter:
    """Hook of a block: `y + scale · (f(h W_1 + b_1) W_2 + b_2)`; h is y, or the sub-layer's input if `parallel`.

    Attributes:
      w1: (width, size); `b1` (size).
      w2: (size, width); `b2` (width).
    """

    w1: Any
    b1: Any
    w2: Any
    b2: Any
    activation: str = static(default="gelu")
    scale: float = static(default=1.0)
    parallel: bool = static(default=False)
    trains = ("w1", "b1", "w2", "b2")

    def __call__(self, y, *, x, context):
        w1, b1, w2, b2 = (w.astype(y.dtype) for w in (self.w1, self.b1, self.w2, self.b2))
        h = activation_of(self.activation)(product(x if self.parallel else y, w1) + b1)
        return y + self.scale * (product(h, w2) + b2)


def adapter(
    size: int = 64, *, activation: str = "gelu", std: float = 1e-3, layers: Sequence[int] | None = None
) -> Method:
    """Adapters after attention and after the MLP, before each sum: Houlsby et al. 2019 (arXiv:1902.00751), section 2.1.

    `y + f(y W_1 + b_1) W_2 + b_2`, with weights from a normal distribution cut at two standard deviations, so the
    function starts near the base's. The paper also trains the norms: `chain(adapter(), norm_tuning())`.

    Args:
      size: m, of the bottleneck.
      activation: f; the authors' code has GELU.
      std: of the start, the authors' 1e-3.
      layers: indices of the blocks that get adapters; default: all. Fewer cost less: Rücklé et al. 2021
        (arXiv:2010.11918).

    Raises:
      ValueError: a size below 1, an unknown activation, a std not above 0; or, from `init`, a layer that is not there.

    The count is `2 (2 d m + d + m)` a layer.
    """
    return _adapter("adapter", AFTER_BOTH, size, activation, std, layers)


def pfeiffer(
    size: int = 64, *, activation: str = "relu", std: float = 1e-3, layers: Sequence[int] | None = None
) -> Method:
    """One adapter a block, after the MLP: Pfeiffer et al. 2021 (arXiv:2005.00247), section 4 and appendix.

    In a post-norm model it stands after sum and norm, as He et al. 2022 (arXiv:2110.04366, section 2.1) describe it;
    in a pre-norm model, where no norm follows the sum, at the MLP's output. AdapterHub's variant of a post-norm model
    has one norm more, after the adapter. Arguments as for `adapter`.

    The count is `2 d m + d + m` a layer.
    """
    return _adapter("pfeiffer", ("after_mlp",), size, activation, std, layers)


def parallel_adapter(
    size: int = 64,
    *,
    scale: float = 4.0,
    activation: str = "relu",
    where: Sequence[str] = ("mlp",),
    layers: Sequence[int] | None = None,
) -> Method:
    """Adapters beside a sub-layer, reading its input: He et al. 2022 (arXiv:2110.04366), section 4.

    `y + scale · (f(x W_1 + b_1) W_2 + b_2)`, started as LoRA is (W_2 zero), so the function starts unchanged.

    Args:
      scale: s; the paper's 4 (section 4.6).
      where: 'mlp', 'attention', or both; the paper finds the MLP best.

    Others, errors and count as for `adapter`, one adapter for each entry of `where`.
    """
    hooks = {"attention": "attention_output", "mlp": "mlp_output"}
    if isinstance(where, str) or not where or set(where) - set(hooks):
        raise ValueError(f"parallel_adapter: where must be a list of 'attention' and 'mlp'; got {where!r}")
    if not scale > 0:
        raise ValueError(f"parallel_adapter: scale must be above 0; got {scale!r}")
    places = [hooks[w] for w in where]
    own = {"scale": scale, "where": list(where)}
    return _adapter("parallel_adapter", places, size, activation, None, layers, own, parallel=True, scale=float(scale))


def _adapter(name, hooks, size, f, std, layers, own=None, **fields) -> Method:
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{name}: size must be a whole number of at least 1; got {size!r}")
    if std is not None and not std > 0:
        raise ValueError(f"{name}: std must be above 0; got {std!r}")
    activation_of(f)
    arguments = {"size": size, "activation": f, "layers": None if layers is None else list(layers), **(own or {})}
    arguments |= {} if std is None else {"std": std}

    def new(key, width):
        k1, k2 = jax.random.split(key)
        if std is None:  # LoRA's start
            bound = width**-0.5
            w1 = jax.random.uniform(k1, (width, size), minval=-bound, maxval=bound)
            w2 = jnp.zeros((size, width))
        else:
            w1, w2 = (
                std * jax.random.truncated_normal(k, -2, 2, s) for k, s in ((k1, (width, size)), (k2, (size, width)))
            )
        return Adapter(w1, jnp.zeros(size), w2, jnp.zeros(width), f, **fields)

    def init(key, params, sites):
        blocks = {s.layer: s for s in sites if s.kind == "block"}
        chosen = list(blocks) if layers is None else plain(list(layers))
        if not chosen or set(chosen) - set(blocks):
            raise ValueError(f"{name}: the layers must be among {sorted(blocks)} of this model; got {chosen}")
        paths = {f"{blocks[i].path}/{hook}": blocks[i].width for i in chosen for hook in hooks}
        return update(params, {p: new(path_key(key, p), width) for p, width in paths.items()})

    return method(name, arguments, init, trainable=masks.by_node(Adapter))
