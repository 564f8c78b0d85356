"""T5 and mT5 against transformers on tiny random models; their files, counts, methods and generation."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from test_models import LAYOUTS, assert_same, layouts, moved, ours, texts, theirs, torch_model

from peftjax import hub
from peftjax.models.layers import shift_right
from peftjax.models.t5 import buckets_of
from peftjax.tree import flatten

T5: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "decoder_start_token_id": 0,
}
FLAN: dict[str, Any] = {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}


class Variant(NamedTuple):
    """`own_head`: the file holds a head that is not the embedding, as that of T5 1.1, Flan-T5 and mT5."""

    family: str
    changes: dict[str, Any]
    own_head: bool


VARIANTS = {
    "t5": Variant("T5", {}, False),
    "flan": Variant("T5", FLAN, True),
    "unscaled, tied": Variant("T5", FLAN, False),
    "silu": Variant("T5", {"feed_forward_proj": "gated-silu", "layer_norm_epsilon": 1e-2}, False),
    "mt5": Variant("MT5", {}, True),
    "mt5, relu, tied": Variant("MT5", {"feed_forward_proj": "relu"}, False),
}


def torch_t5(name, seed=0, head="ForConditionalGeneration", **changes):
    """A random torch model of a variant; an own head is a parameter of its own, as in files of T5 1.1."""
    variant = VARIANTS[name]
    config = getattr(transformers, variant.family + "Config")(**{**T5, **variant.changes, **changes})
    model = torch_model(variant.family + head, config, seed)
    if variant.own_head and head == "ForConditionalGeneration":
        torch: Any = pytest.importorskip("torch")
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.2)
    return model


def both(source="right", target="right", seed=0):
    """A batch for encoder and decoder, padded on these sides."""
    batch = texts(9, source, seed=seed)
    other = texts(7, target, seed=seed + 1)
    return batch | {"decoder_input_ids": other["input_ids"], "decoder_attention_mask": other["attention_mask"]}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits(tmp_path, name):
    torch_model = torch_t5(name)
    model = moved(torch_model, tmp_path)
    assert ("lm_head" in model.params) is VARIANTS[name].own_head
    for sides in ((None, None), ("right", "right"), ("left", "left"), ("left", "right")):
        batch = both(*sides)
        want, real = theirs(torch_model, batch).logits, batch["decoder_attention_mask"] > 0
        assert np.abs(want).max() > 0.1
        for layout in LAYOUTS.values():
            assert_same(ours(model, batch, layout).logits, want, real)
