"""PREFIX_TUNING, PROMPT_TUNING and P_TUNING folders: one table `prompt_embeddings`, whatever it was trained through."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from ..methods import Method, p_tuning, prefix, prompt
from ..methods.base import Site
from ..methods.prefix import Prefix, Shift
from ..methods.prompt import Prompt
from .base import Format, Reader, Writer, Written, contiguous

TABLE = "prompt_embeddings"


def read_prefix(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """Rows of (layers, key and value, heads, size); here each layer has its keys and values, (n, heads, size).

    Where attention has a sliding window, PEFT's prefix leaves it as any token does, and here all tokens see it: texts
    that fit the window together with the prefix give the same.
    """
    places, n = _attention(r.model), r.config["num_virtual_tokens"]
    _, heads, size = heads_of(places[0])
    rows = r.take(TABLE, (n, len(places) * 2 * heads * size)).reshape(n, len(places), 2, heads, size)
    nodes: dict[str, Any] = {f"{s.path}/shift": Shift(n) for s in r.model.sites if s.kind == "positions"}
    for i, s in enumerate(places):
        nodes[f"{s.path}/prefix"] = Prefix(jnp.asarray(rows[:, i, 0]), jnp.asarray(rows[:, i, 1]))
    return nodes, [prefix(n)]


def write_prefix(w: Writer) -> Written:
    places = _attention(w.model)
    nodes = [w.nodes[f"{s.path}/prefix"] for s in places]
    n, heads, size = nodes[0].key.shape
    rows = np.stack([np.stack([contiguous(x.key), contiguous(x.value)], 1) for x in nodes], 1)
    config = {
        "num_virtual_tokens": n,
        "num_layers": len(places),
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": w.source.get("encoder_hidden_size", heads * size),
        "prefix_projection": bool(w.source.get("prefix_projection", w.arguments("prefix").get("mlp", False))),
    }
    return Written(config, {TABLE: rows.reshape(n, -1)})


def _attention(model) -> list[Site]:
    """A decoder's attention modules.

    Raises:
      ValueError: PEFT gives this kind of model its prefix elsewhere.
    """
    if model.family.cache_shape is None or model.family.start_id is not None:
        raise ValueError(
            f"a prefix of {model.family.name} is not the same in PEFT, which hands keys and values to a cache that "
            "only a decoder alone has; supported are decoders such as llama and gpt2"
        )
    return sorted((s for s in model.sites if s.kind == "attention"), key=lambda s: s.layer or 0)


def heads_of(s: Site) -> tuple[int, int, int]:
    """(query heads, key/value heads, head size) of an attention site."""
    assert s.heads is not None  # families give them
    return s.heads


def read_prompt(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """Rows of the width; for an encoder and its decoder there are twice as many, and PEFT uses the first half."""
    c, place = r.config, _input(r.model)
    n = c["num_virtual_tokens"]
    both = 2 if r.model.family.start_id is not None else 1
    rows = r.take(TABLE, (both * n, place.width))
    node = Prompt(jnp.asarray(rows[:n]), jnp.asarray(rows[n:]) if both == 2 else None)
    if c["peft_type"] == "PROMPT_TUNING":
        method = prompt(n)
    else:
        kind = str(c.get("encoder_reparameterization_type", "MLP")).lower()
        method = p_tuning(n, encoder=kind, hidden=c.get("encoder_hidden_size") or place.width)
    return {f"{place.path}/prompt": node}, [method]


def write_prompt(w: Writer) -> Written:
    (n,) = w.nodes.values()
    place = _input(w.model)
    both = w.model.family.start_id is not None
    rows = contiguous(n.vectors)
    if both:
        rows = np.concatenate([rows, rows if n.unused is None else contiguous(n.unused)])
    heads, _, _ = heads_of(next(s for s in w.model.sites if s.kind == "attention"))
    layers = 1 + max(s.layer for s in w.model.sites if s.layer is not None)
    config: dict[str, Any] = {
        "num_virtual_tokens": n.n,
        "num_transformer_submodules": 2 if both else 1,
        "token_dim": place.width,
        "num_layers": layers,
        "num_attention_heads": heads,
    }
    if any(name == "p_tuning" for name, _ in w.method.spec):
        a = w.arguments("p_tuning")
        config |= {
            "encoder_reparameterization_type": a["encoder"].upper(),
            "encoder_hidden_size": a["hidden"],
            "encoder_num_layers": a["layers"],
        }
    else:
        config["prompt_tuning_init"] = "RANDOM"
    return Written(config, {TABLE: rows})


def _input(model) -> Site:
    """Where a prompt goes.

    Raises:
      ValueError: the model is an encoder, whose first token PEFT takes from the prompt.
    """
    if model.family.cache_shape is None and model.module.head != "none":
        raise ValueError(
            f"a prompt before {model.family.name}'s text means another thing in PEFT: its head reads the first virtual "
            "token, here the text's own first token; supported are decoders, and encoders with a decoder"
        )
    return next(s for s in model.sites if s.kind == "input")


SHAPE = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")
PREFIX = Format(
    read_prefix,
    write_prefix,
    (Prefix, Shift),
    (*SHAPE, "modules_to_save", "encoder_hidden_size", "prefix_projection"),
    virtual=True,
)
PROMPT = Format(
    read_prompt,
    write_prompt,
    (Prompt,),
    (
        *SHAPE,
        *("modules_to_save", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
        *("tokenizer_kwargs", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"),
        "encoder_dropout",
    ),
    virtual=True,
)
