"""P-tuning: a prompt that comes out of a small network, which is dropped in the end."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp

from .. import masks
from ..tree import Tree, flatten, update
from ..weights import is_node, node, static
from .base import Method, check_whole, method
from .prompt import Prompt, where

ENCODER = "prompt_encoder"  # its place in the tree, beside the model


@node
class PromptEncoder:
    """`MLP(E)` or `MLP(LSTM(E))` over n trained vectors, the embedding E, (n, width); an adapter file drops it.

    Attributes:
      lstm: by layer, and 'forward' or 'backward': `w` (inputs + hidden, 4 hidden), gates in the order input, forget,
        cell, output, and `b1` (4 hidden); empty without an LSTM.
      mlp: by layer `w` and `b1`, ReLU between them.
    """

    embedding: Any
    lstm: Any
    mlp: Any
    trains = ("embedding", "lstm", "mlp")

    def __call__(self) -> jax.Array:
        h = self.embedding
        for i in sorted(self.lstm):
            both = self.lstm[i]
            h = jnp.concatenate([_lstm(both["forward"], h), _lstm(both["backward"], h[::-1])[::-1]], axis=-1)
        for i in sorted(self.mlp):
            h = (h if i == min(self.mlp) else jax.nn.relu(h)) @ self.mlp[i]["w"] + self.mlp[i]["b1"]
        return h


def _lstm(layer: dict, xs: jax.Array) -> jax.Array:
    """(n, inputs) -> (n, hidden): `c = σ(f) c + σ(i) tanh(g)`, `h = σ(o) tanh(c)` (Hochreiter & Schmidhuber 1997)."""

    into, across = jnp.split(layer["w"], [xs.shape[1]])  # what does not depend on h is one product for all positions

    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x + h @ across, 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        return (h := jax.nn.sigmoid(o) * jnp.tanh(c), c), h

    zero = jnp.zeros(layer["w"].shape[1] // 4, xs.dtype)
    return jax.lax.scan(step, (zero, zero), xs @ into + layer["b1"])[1]


def p_tuning(length: int = 20, *, encoder: str = "lstm", hidden: int = 128, layers: int = 2) -> Method:
    """Trains a prompt through a network: Liu et al. 2021 (arXiv:2103.10385), section 3.2, `h_i = MLP(LSTM(e))_i`.

    `resolve` writes the network's output where a prompt stands; only that is saved, and a loaded adapter trains on as
    a prompt. The virtual tokens come before the text; the paper's patterns with slots inside the text are not built.

    Args:
      length: n.
      encoder: 'lstm' (bidirectional, then two linear layers and a ReLU) or 'mlp' (three, as Hugging Face PEFT has it).
      hidden, layers: size of each direction of the LSTM, or of the MLP's layers; number of the LSTM's.

    Raises:
      ValueError: a number below 1, an unknown encoder; or, from `init`, a model without a place for a prompt.

    The count is `n d` plus the network: for 'mlp' `2 d h + h² + 2 h + d`.
    """
    arguments = {"length": length, "encoder": encoder, "hidden": hidden, "layers": layers}
    for name in ("length", "hidden", "layers"):
        check_whole(f"p_tuning: {name}", arguments[name])
    if encoder not in ("lstm", "mlp"):
        raise ValueError(f"p_tuning: encoder must be 'lstm' or 'mlp'; got {encoder!r}")

    def init(key, params, sites):
        place, _ = where("p_tuning", params, sites)
        keys = iter(jax.random.split(key, 2 * layers + 4))

        def linear(inputs, outputs, fan_in):
            w = jax.random.uniform(next(keys), (inputs, outputs), minval=-(fan_in**-0.5), maxval=fan_in**-0.5)
            return {"w": w, "b1": jnp.zeros(outputs)}

        d, lstm = place.width, {}
        sizes = [2 * hidden, 2 * hidden, d] if encoder == "lstm" else [d, hidden, hidden, d]
        for i in range(layers if encoder == "lstm" else 0):
            inputs = (d if i == 0 else 2 * hidden) + hidden
            lstm[str(i)] = {way: linear(inputs, 4 * hidden, hidden) for way in ("forward", "backward")}
        mlp = {str(i): linear(a, b, a) for i, (a, b) in enumerate(itertools.pairwise(sizes))}
        start = PromptEncoder(jax.random.normal(next(keys), (length, d)), lstm, mlp)
        return update(params, {f"{place.path}/prompt": Virtual(length), ENCODER: start})

    return method(
        "p_tuning",
        arguments,
        init,
        trainable=lambda params: masks.by_node(PromptEncoder if ENCODER in params else Prompt)(params),
        resolve=write_prompt,
    )


@node
class Virtual:
    """Holds the place of a prompt of n vectors until `resolve` writes them."""

    n: int = static(default=0)
    trains: tuple[str, ...] = static(default=())

    def __call__(self, y, *, x, context):
        raise ValueError("p_tuning: the prompt is not there yet; write method.resolve(params, None) first")


def write_prompt(params: Tree, key: jax.Array | None) -> Tree:
    """Puts the network's output at the prompt's place and drops the network."""
    if ENCODER not in params:
        return params
    place = next(p for p, x in flatten(params, is_leaf=is_node).items() if isinstance(x, Virtual))
    return update({k: v for k, v in params.items() if k != ENCODER}, {place: Prompt(params[ENCODER]())})
