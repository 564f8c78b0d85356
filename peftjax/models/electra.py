"""ELECTRA (Clark et al. 2020, arXiv:2003.10555): BERT's blocks under embeddings of another width, without a pooler."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ..methods.base import Site
from . import bert
from .base import Family


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    embedding_size: int  # projected to hidden_size where it is another
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    classifier_dropout: float | None
    num_labels: int


def module(config: Config, head: str = "none", dtype: Any = jnp.float32, remat: str = "none") -> bert.Bert:
    """ELECTRA with or without a classification head; see `Bert`."""
    width = config.embedding_size
    return bert.Bert(config, head, dtype, remat, at="electra", pools=False, act="gelu", width=width)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    return bert.sites(c, head, at="electra", pools=False, act="gelu", width=c.embedding_size)


FAMILY = Family(
    name="electra",
    config=Config,
    module=module,
    sites=sites,
    base="electra",
    heads={"ElectraModel": "none", "ElectraForSequenceClassification": "classification"},
    unused=(
        r"discriminator_predictions\..*",
        r"generator_(predictions|lm_head)\..*",
        r"(electra\.)?embeddings\.position_ids",
        r"classifier\.(dense|out_proj)\.(weight|bias)",
    ),
    renames=bert.RENAMES,
    fixed=bert.FIXED,
    harmless=(
        "tie_word_embeddings",  # of the generator's head, which is not here
        *("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout"),  # of multiple choice
    ),
    check=bert.check,
)
