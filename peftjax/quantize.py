"""Quantised bases: nodes that hold a frozen matrix in 8 or 4 bits. They nest under any method's node.

LoRA over `NF4` is QLoRA (Dettmers et al. 2023, arXiv:2305.14314). Quantise while loading, with
`hub.load(..., quantize="nf4")`, or a tree that is there, with `quantize`; then apply methods as ever.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .methods.base import Site, select, wrap
from .tree import Tree, flatten
from .weights import Blocks, Weight, attend, dot, is_node, is_quantized, node, split, static

BLOCK, OUTER = 64, 256  # entries that share an absmax; absmaxes that share one in double quantisation

# The 16 levels of NF4 as bitsandbytes has them, in float32: quantiles of N(0, 1) at equal steps of probability, 8
# below and 9 above with one 0 between them, scaled to [-1, 1] (arXiv:2305.14314, appendix E).
NORMAL = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)


def _dynamic() -> np.ndarray:
    """bitsandbytes' signed 8-bit map: 2^i mantissas in each decade 10^(i - 6) for i in 0..6, and 0 and 1.

    Dettmers et al. 2022 (arXiv:2110.02861), section 1.3.
    """
    decades = []
    for i in range(7):
        edges = np.linspace(0.1, 1, 2**i + 1)
        decades.append(10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = np.concatenate(decades)
    return np.sort(np.concatenate([-positive, [0.0, 1.0], positive])).astype(np.float32)


DYNAMIC = _dynamic()


@node
class Int8(Weight):
    """`W = codes · scale`, symmetric, with one scale for each output.

    The products scale outputs and not the weight: the same but for rounding, and whole numbers up to 127 are exact
    in bfloat16.

    Attributes:
      codes: (inputs, outputs) int8, from -127 to 127.
      scale: (outputs) float32, the largest magnitude of a column over 127.
      to: name of the dtype that this stands for.
    """

    codes: jax.Array
    scale: jax.Array
    to: str = static(default="float32")
    quantized = True

    @property
    def shape(self):
        return self.codes.shape

    @property
    def dtype(self):
        return jnp.dtype(self.to)

    def materialize(self):
        return (self.codes.astype(jnp.float32) * self.scale[..., None, :]).astype(self.dtype)

    def dot(self, x):
        return jax.checkpoint(lambda w, x: w.stretch(dot(w.codes, x)))(self, x)

    def take(self, ids):
        return self.stretch(self.codes[ids].astype(jnp.float32)).astype(self.dtype)

    def attend(self, x):
        return jax.checkpoint(lambda w, x: attend(w.codes, w.stretch(x)))(self, x)

    def stretch(self, y: jax.Array) -> jax.Array:
        """`y · scale` along the last axis, in the dtype of y."""
        scale = self.scale.reshape(*(1,) * (y.ndim - 1), -1)
        return (y.astype(jnp.float32) * scale).astype(y.dtype)


@node
class NF4(Weight):
    """`W = level[code] · absmax` with 16 levels for normally distributed weights and an absmax for each 64 entries.

    arXiv:2305.14314, section 3. The entries are counted output by output, all inputs of the first one before the next,
    as bitsandbytes counts them in PyTorch's (outputs, inputs). The last block is padded with zeros.

    Attributes:
      codes: (blocks · 32) uint8, two codes in each, the first one in the high bits.
      absmax: (blocks) float32; or, doubly quantised, uint8 codes of bitsandbytes' 8-bit map, so that the absmax is
        `map[code] · scale + offset`.
      scale: (blocks / 256, rounded up) float32, the largest magnitude of `absmax - offset` in each 256.
      offset: () float32, the mean absmax.
      matrix: (inputs, outputs).
      to: name of the dtype that this stands for.
    """

    codes: jax.Array
    absmax: jax.Array
    scale: jax.Array | None = None
    offset: jax.Array | None = None
    matrix: tuple[int, int] = static(default=(0, 0))
    to: str = static(default="float32")
    quantized = True

    @property
    def shape(self):
        return (*self.codes.shape[:-1], *self.matrix)

    @property
    def dtype(self):
        return jnp.dtype(self.to)

    def materialize(self):
        *layers, inputs, outputs = self.shape
        codes = jnp.stack([self.codes >> 4, self.codes & 15], axis=-1).reshape(*layers, -1, BLOCK)
        w = _look_up(NORMAL, codes) * self._absmax()[..., None]
        w = w.reshape(*layers, -1)[..., : inputs * outputs].reshape(*layers, outputs, inputs)
        return w.swapaxes(-1, -2).astype(self.dtype)

    def _absmax(self) -> jax.Array:
        if self.scale is None or self.offset is None:
            return self.absmax
        scale = jnp.repeat(self.scale, OUTER, axis=-1)[..., : self.absmax.shape[-1]]
        return _look_up(DYNAMIC, self.absmax) * scale + self.offset[..., None]


def _look_up(levels: np.ndarray, codes: jax.Array) -> jax.Array:
    return jnp.asarray(levels).at[codes].get(mode="promise_in_bounds")


def _nearest(levels: np.ndarray, x: jax.Array) -> jax.Array:
    """The number of the level next to each entry; halfway between two, the lower one."""
    middles = (levels[1:] + levels[:-1]) / 2
    method = "compare_all" if len(levels) == len(NORMAL) else "scan"  # the one fuses, of many it takes memory
    return jnp.searchsorted(jnp.asarray(middles), x, method=method).astype(jnp.uint8)


def _blocks(x: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(..., n) -> each block over its largest magnitude, (..., blocks, size), and that, (..., blocks)."""
    pad = -x.shape[-1] % size
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)]).reshape(*x.shape[:-1], -1, size)
    most = jnp.abs(x).max(-1)
    return x / jnp.where(most > 0, most, 1)[..., None], most


def int8(w: jax.Array) -> Int8:
    """Rounds a matrix to 8 bits: `round(W / scale)`, scale = max |W| / 127 over the inputs of each output.

    Args:
      w: (..., inputs, outputs); leading axes are layers.

    >>> q = int8(jnp.array([[127.0, 0.5], [-63.4, 0.0]]))
    >>> q.codes.tolist(), q.dot(jnp.array([[0.0, 2.0]])).tolist()
    ([[127, 127], [-63, 0]], [[-126.0, 0.0]])
    """
    _check_matrix("int8", w)
    return _int8(w)


@jax.jit
def _int8(w):
    x = w.astype(jnp.float32)
    scale = jnp.abs(x).max(-2) / 127
    codes = jnp.round(x / jnp.where(scale > 0, scale, 1)[..., None, :])
    return Int8(codes.astype(jnp.int8), scale, to=w.dtype.name)


def nf4(w: jax.Array, double: bool = False) -> NF4:
    """Rounds a matrix to NF4: 4.5 bits an entry, or with double quantisation 4.127.

    Dettmers et al. 2023 (arXiv:2305.14314), section 3: each block of 64 entries over its absmax, to the nearest of 16
    levels. With `double`, the absmaxes less their mean are rounded to 8 bits in blocks of 256.

    Args:
      w: (..., inputs, outputs); leading axes are layers, and no block reaches over two of them.

    >>> q = nf4(jnp.array([[0.01], [-2.0], [2.0]]))
    >>> [hex(code) for code in q.codes[:2].tolist()], q.materialize().tolist()  # the padding is 0, whose code is 7
    (['0x70', '0xf7'], [[0.0], [-2.0], [2.0]])
    """
    _check_matrix("nf4", w)
    return _nf4(w, double)


@functools.partial(jax.jit, static_argnums=1)
def _nf4(w, double):
    *layers, inputs, outputs = w.shape
    x = w.astype(jnp.float32).swapaxes(-1, -2).reshape(*layers, -1)
    x, absmax = _blocks(x, BLOCK)
    codes = _nearest(NORMAL, x).reshape(*layers, -1, 2)
    packed = codes[..., 0] << 4 | codes[..., 1]
    if not double:
        return NF4(packed, absmax, matrix=(inputs, outputs), to=w.dtype.name)
    offset = absmax.mean(-1)
    rest, scale = _blocks(absmax - offset[..., None], OUTER)
    small = _nearest(DYNAMIC, rest).reshape(*layers, -1)[..., : absmax.shape[-1]]
    return NF4(packed, small, scale, offset, (inputs, outputs), w.dtype.name)


def _check_matrix(name: str, w: Any) -> None:
    if is_node(w):
        raise ValueError(f"{name}: this is a {type(w).__name__} already; quantise the base before methods act on it")
    if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name}: got {w.dtype} of shape {w.shape}; expected a floating matrix (..., inputs, outputs)")


HOW: dict[str, Callable[[jax.Array], Int8 | NF4]] = {
    "int8": int8,
    "nf4": nf4,
    "nf4-double": functools.partial(nf4, double=True),
}


def quantize(params: Tree, sites: Iterable[Site], how: str, targets: Iterable[str] = ("linear",)) -> Tree:
    """Quantises the base's weights: a tree transform, to be applied before a method's.

    The parts of a fused weight (GPT-2's query, key and value) are quantised one by one, as `Blocks`, so that methods
    may act on one of them. Embeddings, norms, biases and heads stay as they are by default.

    Args:
      params: per-layer parameters.
      how: 'int8', 'nf4' or 'nf4-double'.
      targets: kinds of site or path patterns; default: the blocks' linear weights.

    Raises:
      ValueError: an unknown `how`, a target that matches nothing or is no matrix, a weight that is a node already.

    >>> params = {"q": {"kernel": jnp.ones((32, 8))}}
    >>> quantize(params, (), "nf4", ["q/kernel"])["q"]["kernel"].codes.shape
    (128,)
    """
    check(how)
    chosen = select(params, sites, targets)
    return wrap(jax.random.key(0), params, chosen, lambda key, w, site: quantize_at(site, w, how))


def check(how: str) -> None:
    """Raises a ValueError for a way of quantising that there is not."""
    if how not in HOW:
        raise ValueError(f"there is no way {how!r} to quantise; there are {', '.join(HOW)}")


def quantize_at(site: Site, w: Any, how: str, dtype: Any = None) -> Weight:
    """The quantised weight of a site: a node, or for a fused weight `Blocks` with a node for each part.

    Args:
      dtype: what the nodes stand for; default: the array's.
    """

    def coded(x):
        q = HOW[how](x)
        return q if dtype is None else dataclasses.replace(q, to=jnp.dtype(dtype).name)

    try:
        if not site.parts or site.part is not None or is_node(w):
            return coded(w)
        parts = split(w, site.parts)
        return Blocks({name: coded(x) for name, x in parts.blocks.items()}, parts.columns)
    except ValueError as e:
        raise ValueError(f"cannot quantise {site.path}: {e}") from e


def quantized_as(params: Tree) -> str | None:
    """How the weights of a tree are quantised, as `quantize` calls it; None where none is."""
    found = {_name(x) for x in flatten(params, is_leaf=is_quantized).values() if is_quantized(x)}
    return ", ".join(sorted(found)) or None


def _name(w: Weight) -> str:
    return "nf4-double" if isinstance(w, NF4) and w.scale is not None else type(w).__name__.lower()
