"""BitFit: the bias terms train and nothing else."""

from collections.abc import Sequence

import jax.numpy as jnp

from .. import masks
from ..tree import flatten, get, update
from ..weights import Trained, is_node
from .base import LINEAR, Method, mark, method, select


def bitfit(targets: Sequence[str] | None = None, *, create: bool = False) -> Method:
    """Trains the biases of a model: Ben Zaken et al. 2022 (arXiv:2106.10199), section 3.

    All biases count: of linear layers, of norms, of the embeddings' norm and of the pooler, but not of a
    task head (chain `head` for that). The paper's subset is `targets=["query", "mlp_in"]`: b_q and b_m2.

    Args:
      targets: kinds of site or patterns of *weights* whose biases train; default: all biases.
      create: put zero biases beside the targeted linear weights that have none (Llama, for one), so that
        the function starts unchanged.

    Raises:
      ValueError: (from `init`) there is no bias to train.

    >>> import jax
    >>> params = {"q": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    >>> bitfit().init(jax.random.key(0), params, ())["q"]["bias"]
    Trained(value=Array([0., 0.], dtype=float32))
    """
    arguments = {"targets": None if targets is None else list(targets), "create": create}

    def init(key, params, sites):
        sites = tuple(sites)
        heads = {s.module for s in sites if s.kind == "head"}
        leaves = flatten(params, is_leaf=is_node)
        if targets is None:
            modules = {p.rpartition("/")[0] for p in leaves if p.endswith("/bias")} - heads
            weights = [s for s in sites if s.kind in LINEAR] if create else []
        else:
            weights = select(params, sites, targets)
            _check_targets(params, sites, targets, leaves, create)
            modules = {s.module for s in weights if f"{s.module}/bias" in leaves}
        parts = [s._replace(path=f"{s.module}/bias") for s in weights if s.part]
        if created := [s for s in parts if s.path not in leaves]:
            raise ValueError(
                f"bitfit: {created[0].path} does not exist, and a bias beside the part {created[0].part!r} alone "
                "cannot be created; target the whole weight"
            )
        linear = [s for s in weights if s.path.endswith("/kernel")]  # a bias beside an embedding would never be read
        missing = [s for s in linear if create and s.module not in modules]
        if not modules and not missing:
            raise ValueError(
                "bitfit: this model has no bias at the targets; write bitfit(create=True) to put zero biases "
                "beside its linear layers and train those"
            )
        zeros = {s.module: jnp.zeros(get(params, s.path).shape[-1:], get(params, s.path).dtype) for s in missing}
        params = update(params, {f"{m}/bias": zero for m, zero in zeros.items()})
        whole = {*modules, *zeros} - {s.module for s in parts}
        return mark("bitfit", params, [*(f"{m}/bias" for m in sorted(whole)), *parts])

    return method("bitfit", arguments, init, trainable=masks.by_node(Trained))


def _check_targets(params, sites, targets, leaves, create) -> None:
    """Every target must have a bias, or be a linear layer that can be given one."""
    for target in targets:
        found = select(params, sites, [target])
        bare = [s.path for s in found if f"{s.module}/bias" not in leaves]
        if create:
            bare = [p for p in bare if not p.endswith("/kernel")]
        if bare:
            way = "leave the target out" if create else "write create=True to put zero biases there, or leave it out"
            raise ValueError(f"bitfit: the target {target!r} names {bare[0]}, which has no bias; {way}")
