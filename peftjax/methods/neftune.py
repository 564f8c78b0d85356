"""NEFTune: uniform noise on the embedded tokens in training."""

import dataclasses

import jax
import jax.numpy as jnp

from ..tree import Tree, update
from ..weights import map_nodes, node, static
from .base import Method, method, path_key


@node
class Noise:
    """Hook of a word table: noise of this step's key on what is looked up; without a key, none."""

    key: jax.Array | None = None
    alpha: float = static(default=5.0)
    trains: tuple[str, ...] = static(default=())

    def __call__(self, y, *, x, context):
        """(batch, length, width) -> the same; `context`, (batch, length), numbers the texts, 0 at padding."""
        if self.key is None:
            return y
        texts = jnp.ones(y.shape[:2], jnp.int32) if context is None else context.astype(jnp.int32)
        length = (texts[:, :, None] == texts[:, None, :]).sum(-1)  # of the text that each token is in
        bound = jnp.where(texts > 0, self.alpha / jnp.sqrt(length * y.shape[-1]), 0.0)
        noise = jax.random.uniform(self.key, y.shape, minval=-1.0, maxval=1.0)
        return y + (bound[..., None] * noise).astype(y.dtype)

    def fold(self, module):
        """Merging leaves nothing of it."""
        return module


def neftune(alpha: float = 5.0) -> Method:
    """Noise on the embedded tokens in training: Jain et al. 2023 (arXiv:2310.05914), section 2.

    `X' = X + (α / sqrt(L d)) ε`, ε uniform in [-1, 1] and drawn anew for every step and entry; L is the number of
    tokens of the text, padding left out, and d the width. Of packed texts each has its own L. When evaluating there is
    no noise.

    It trains and saves nothing: chain it with a method that does, `lora+neftune(alpha=5)`. An encoder-decoder's two
    inputs both get noise. Virtual tokens get none.

    Args:
      alpha: α; the paper takes 5, 10 or 15.

    Raises:
      ValueError: α not above 0; or, from `init`, a model without a word table.

    >>> from peftjax.methods import chain, lora
    >>> [name for name, _ in chain(lora(rank=4), neftune(alpha=10)).spec]
    ['lora', 'neftune']
    """
    if isinstance(alpha, str | bool) or not 0 < alpha < float("inf"):
        raise ValueError(f"neftune: alpha must be a number above 0; got {alpha!r}")

    def init(key, params, sites):
        tables = [s.module for s in sites if s.kind == "embedding"]
        if not tables:
            raise ValueError("neftune: the sites must name the model's word embedding (kind 'embedding')")
        return update(params, {f"{module}/output": Noise(alpha=float(alpha)) for module in tables})

    def nothing(params: Tree) -> Tree:
        return jax.tree.map(lambda _: False, params)

    return method("neftune", {"alpha": alpha}, init, trainable=nothing, resolve=write_noise_keys)


def write_noise_keys(params: Tree, key: jax.Array | None) -> Tree:
    """Writes this step's key into every `Noise`; None turns the noise off."""

    def visit(path, n):
        if not isinstance(n, Noise):
            return n
        return dataclasses.replace(n, key=None if key is None else path_key(key, path))

    return map_nodes(visit, params)
