"""VeRA: two random matrices shared by all targets, and vectors that train between them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import Tree, flatten
from ..weights import Weight, attend, dot, is_node, materialize, node, static, take
from .base import Method, method, plain, select, wrap


@node
class VeRA(Weight):
    """`W + (A ∘ d) (B ∘ b)`, never formed in training, with A, B the first rows and columns of shared arrays.

    The shared arrays follow from the static fields alone (`regrow`), so that no file holds them; all layers hold the
    same two arrays, unless they are stacked.

    Attributes:
      d: (r), between A and B.
      b: (outputs), after B.
      shared_a: (at least inputs, r).
      shared_b: (r, at least outputs).
      seed: of the shared arrays; None: they come from elsewhere, and files hold them.
      sizes: (inputs, r, outputs) of the shared arrays.
    """

    base: Any
    d: jax.Array
    b: jax.Array
    shared_a: jax.Array
    shared_b: jax.Array
    seed: int | None = static(default=0)
    sizes: tuple[int, int, int] = static(default=(1, 1, 1))
    trains = ("d", "b")
    repeats = ("shared_a", "shared_b")
    regrows = ("shared_a", "shared_b")

    @staticmethod
    def regrow(seed: int, sizes: tuple[int, int, int]) -> dict[str, jax.Array]:
        """The shared arrays, uniform in ±sqrt(6 / fan in): Kaiming's (He et al. 2015, arXiv:1502.01852)."""
        inputs, r, outputs = sizes
        one, two = jax.random.split(jax.random.key(seed))
        return {
            "shared_a": _uniform(one, (inputs, r), (6 / inputs) ** 0.5),
            "shared_b": _uniform(two, (r, outputs), (6 / r) ** 0.5),
        }

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """`A ∘ d`, (inputs, r), and `B ∘ b`, (r, outputs)."""
        inputs, outputs = self.shape[-2:]
        a, b = self.shared_a[..., :inputs, :], self.shared_b[..., :outputs]
        return a * self.d[..., None, :], b * self.b[..., None, :]

    def materialize(self):
        a, b = self.factors()
        return (materialize(self.base).astype(a.dtype) + a @ b).astype(self.dtype)

    def dot(self, x):
        inputs, outputs = self.shape
        a, b = self.shared_a[:inputs].astype(x.dtype), self.shared_b[:, :outputs].astype(x.dtype)
        y = ((x @ a) * self.d.astype(x.dtype)) @ b  # vectors on activations: the products' gradients stay vectors
        return dot(self.base, x) + y * self.b.astype(x.dtype)

    def take(self, ids):
        a, b = self.factors()
        rows = take(self.base, ids)
        return rows + (a[ids] @ b).astype(rows.dtype)

    def attend(self, x):
        a, b = self.factors()
        return attend(self.base, x) + attend(a, attend(b, x))


def _uniform(key: jax.Array, shape: tuple[int, int], bound: float) -> jax.Array:
    """Uniform in [-bound, bound), to the bit the same on every device: nothing is rounded before the last product."""
    bits = jax.random.bits(key, shape, jnp.uint32) >> 8
    return (bits.astype(jnp.float32) * 2.0**-23 - 1) * jnp.float32(bound)


def vera(
    rank: int = 256,
    targets: Sequence[str] = ("query", "value"),
    *,
    d_initial: float = 0.1,
    seed: int = 0,
) -> Method:
    """Trains two vectors a weight between random matrices that all share: `h = W x + Λ_b B Λ_d A x`.

    Kopiczko et al. 2024 (arXiv:2310.11454), section 3, equation 2. A and B are drawn once for all targets, as Hugging
    Face PEFT draws them: as large as the widest target needs, each target taking the first rows and columns. They
    follow from the seed, so a file holds d and b alone, and they count as no parameters. b starts at zero, so the
    function starts unchanged. Here weights act from the right, so A is (inputs, r) and B is (r, outputs).

    Args:
      rank: r, at least 1; since only r scalars train by it, it may exceed the weights' sides (the paper: 256 to 1024).
      targets: kinds of site or path patterns.
      d_initial: where d starts (section 3.3: 0.1).
      seed: of A and B, whatever the key of `init`.

    Raises:
      ValueError: an impossible rank, start or seed, or, from `init`, a target that matches nothing or is no matrix.

    The count is `outputs + r` a matrix.

    >>> params = {"q": {"kernel": jnp.ones((6, 4))}, "v": {"kernel": jnp.ones((6, 2))}}
    >>> new = vera(rank=8, targets=["./kernel"]).init(jax.random.key(0), params, ())
    >>> q, v = new["q"]["kernel"], new["v"]["kernel"]
    >>> v.d.shape, v.b.shape, q.shared_b is v.shared_b
    ((8,), (2,), True)
    """
    arguments = {
        "rank": rank,
        "targets": targets if isinstance(targets, str) else list(targets),
        "d_initial": d_initial,
        "seed": seed,
    }
    for name, least in (("rank", 1), ("seed", 0)):
        value = arguments[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"vera: {name} must be a whole number of at least {least}; got {value!r}")
    if isinstance(d_initial, str | bool) or d_initial == 0 or not abs(d_initial) < float("inf"):
        raise ValueError(f"vera: d_initial must be a number other than 0, such as 0.1; got {d_initial!r}")

    def init(key, params, sites):
        chosen, shapes = select(params, sites, targets), []

        def look(key, w, site):
            if len(w.shape) != 2 or site.axes is not None:
                raise ValueError(f"vera: {site.path} has shape {w.shape}; expected a matrix (inputs, outputs)")
            shapes.append(w.shape)
            return w

        wrap(key, params, chosen, look)
        inputs, outputs = (max(sides) for sides in zip(*shapes, strict=True))
        sizes = (inputs, rank, outputs)
        shared = VeRA.regrow(seed, sizes)

        def new(key, w, site):
            d, b = jnp.full(rank, d_initial, jnp.float32), jnp.zeros(w.shape[1])
            return VeRA(w, d, b, **shared, seed=seed, sizes=sizes)

        return wrap(key, params, chosen, new)

    return method("vera", plain(arguments), init, masks.by_node(VeRA), saved=_saved)


def _saved(params: Tree) -> Tree:
    """d and b, and shared arrays that no seed gives."""
    foreign = any(isinstance(n, VeRA) and n.seed is None for n in flatten(params, is_leaf=is_node).values())
    return masks.by_node(VeRA, *(("d", "b", *VeRA.regrows) if foreign else ()))(params)
