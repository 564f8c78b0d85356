"""Child-Tuning: a step updates a random part of the network, or the part that the Fisher information picks."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from .. import masks
from ..tree import flatten, map_with_path
from ..weights import Trained, Weight, is_node
from .base import Method, Site, mark, method, refuse_codes
from .fishmask import Candidate, Sparse, fisher, largest, put_sparse, spread


def child_tuning(mode: str = "F", p: float = 0.3, *, samples: int = 1024) -> Method:
    """Updates a child network only: Xu et al. 2021 (arXiv:2109.05687), sections 2.2 and 2.3.

    Mode 'F', task-free: every step draws `M ~ Bernoulli(p)` for each entry of every array of the base, the task head's
    included, and the optimizer sees `g ⊙ M / p`; what other methods of a `chain` add is theirs. Mode 'D', task-driven:
    of all entries in the blocks, the share p with the largest Fisher information trains, chosen once before training;
    embeddings, pooler and head train whole, as in the authors' code, and there is no factor 1/p.

    Deviations. 'D' keeps moments of the chosen entries alone (`fishmask`'s node), which gives the same steps as Adam on
    masked gradients, but weight decay leaves the other entries alone; the code decays all. Its Fisher information is
    the paper's equation, by example; the code squares gradients of batches. In 'F', clipping sees the masked gradient.

    Args:
      mode: 'F' or 'D'.
      p: share of the entries, in (0, 1].
      samples: of 'D', examples that the Fisher information is estimated from.

    Raises:
      ValueError: an impossible argument; or, from `init`, a quantised base, or for 'D' a tree without blocks, or that
        `method.observed` was not called.

    The count is all for 'F' (with the optimizer's state of full fine-tuning), `p` of the blocks plus the rest for 'D'.
    """
    arguments = {"mode": mode, "p": p, "samples": samples}
    if mode not in ("F", "D"):
        raise ValueError(f"child_tuning: mode must be 'F' or 'D'; got {mode!r}")
    if isinstance(p, str | bool) or not 0 < p <= 1:
        raise ValueError(f"child_tuning: p must be a number above 0 and at most 1; got {p!r}")
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"child_tuning: samples must be a whole number of at least 1; got {samples!r}")
    if mode == "F":
        return method(
            "child_tuning",
            arguments,
            init=lambda key, params, sites: refuse_codes("child_tuning", params),
            trainable=masks.base,
            optimizer=lambda tx: drawn_gradients(tx, p),
        )

    def init(key, params, sites):
        sites = tuple(sites)
        there, k = _in_blocks(params, sites, p)
        if not any(isinstance(c.array, Tracer) for c in there.values()):
            how = "method.observed(objective, params, sites, batches)"
            raise ValueError(f"child_tuning needs data before init: {how}; or write mode='F'")
        return _rest(spread(params, there, k), sites)

    def observe(objective, params, sites, batches):
        there, k = _in_blocks(params, tuple(sites), p)
        scores = fisher(objective, params, batches, samples, lambda tree: map_with_path(lambda x, _: x in there, tree))
        chosen = largest({path: np.asarray(x) for path, x in flatten(scores).items()}, k)

        def init(key, params, sites):
            sites = tuple(sites)
            return _rest(put_sparse(params, _in_blocks(params, sites, p)[0], chosen), sites)

        return init

    return method(
        "child_tuning",
        arguments,
        init,
        trainable=masks.any_of(masks.by_node(Sparse), masks.by_node(Trained)),
        saved=masks.any_of(masks.by_node(Sparse, "indices", "values"), masks.by_node(Trained)),
        observe=observe,
    )


def _in_blocks(params, sites: tuple[Site, ...], p: float):
    """What entries of the blocks may be chosen from, and how many."""
    refuse_codes("child_tuning", params)
    blocks = tuple(f"{s.path}/" for s in sites if s.kind == "block")
    leaves = {x: w for x, w in flatten(params, is_leaf=is_node).items() if blocks and x.startswith(blocks)}
    if taken := [x for x, w in leaves.items() if isinstance(w, Weight)]:
        name = type(leaves[taken[0]]).__name__
        raise ValueError(f"child_tuning: {taken[0]} is already a {name}; put child_tuning first")
    there = {x: Candidate(Site(x, "weight"), w) for x, w in leaves.items() if not is_node(w)}
    if not there:
        raise ValueError("child_tuning: the sites name no block with parameters in it; write mode='F'")
    return there, max(1, int(p * sum(math.prod(c.array.shape) for c in there.values())))


def _rest(params, sites: tuple[Site, ...]):
    """Marks all outside the blocks: embeddings, pooler, head."""
    blocks = tuple(f"{s.path}/" for s in sites if s.kind == "block")
    leaves = flatten(params, is_leaf=is_node)
    return mark("child_tuning", params, [x for x, w in leaves.items() if not x.startswith(blocks) and not is_node(w)])


def drawn_gradients(tx: optax.GradientTransformation, p: float) -> optax.GradientTransformationExtraArgs:
    """The transformation on gradients of which, in the base, a fresh share p is kept, over p (section 2.2)."""
    tx = optax.with_extra_args_support(tx)

    def update(updates, state, params=None, **extra):
        leaves, structure = jax.tree.flatten(updates)
        keys, own = jax.random.split(extra["key"], len(leaves)), jax.tree.leaves(masks.base(updates))
        kept = [
            jnp.where(jax.random.bernoulli(k, p, g.shape), g / p, 0) if of_base else g
            for k, g, of_base in zip(keys, leaves, own, strict=True)
        ]
        return tx.update(jax.tree.unflatten(structure, kept), state, params, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)
