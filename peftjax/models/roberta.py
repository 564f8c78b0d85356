"""RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-RoBERTa (Conneau et al. 2020, arXiv:1911.02116): BERT's blocks.

What differs: tokens are counted from the position after padding's, and the classifier has a dense layer of its own in
place of the pooler. transformers takes for padding what has the padding token's id; here the attention mask says what
padding is, which is the same but where a text without a mask holds that token.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from ..methods.base import Site
from . import bert
from .base import Family


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int  # rows of the table, those up to padding's position included
    type_vocab_size: int
    initializer_range: float
    layer_norm_eps: float
    classifier_dropout: float | None
    pad_token_id: int  # also the position of padding
    num_labels: int


def module(config: Config, head: str = "none", dtype: Any = jnp.float32, remat: str = "none") -> bert.Bert:
    """RoBERTa with or without a classification head; see `Bert`."""
    pools, padding = head == "none", config.pad_token_id
    return bert.Bert(config, head, dtype, remat, at="roberta", pools=pools, act="tanh", padding=padding)


def sites(c: Config, head: str) -> tuple[Site, ...]:
    """Where methods may act, per layer."""
    return bert.sites(c, head, at="roberta", pools=head == "none", act="tanh")


def _max_length(c: Config) -> int:
    return bert.positions_of(c, c.pad_token_id)


def _check(c: Config) -> None:
    bert.check(c)
    if c.pad_token_id is None or not 0 <= c.pad_token_id < c.max_position_embeddings - 1:
        raise ValueError(
            f"positions are counted from pad_token_id + 1, so it must be one of 0 ... {c.max_position_embeddings - 2}, "
            f"before the last of the max_position_embeddings; got {c.pad_token_id!r}"
        )


def _family(name: str, prefix: str) -> Family:
    return Family(
        name=name,
        config=Config,
        module=module,
        sites=sites,
        base="roberta",
        heads={f"{prefix}Model": "none", f"{prefix}ForSequenceClassification": "classification"},
        unused=(
            r"lm_head\..*",
            r"(roberta\.)?pooler\.dense\.(weight|bias)",
            r"(roberta\.)?embeddings\.position_ids",
            r"classifier\.(dense|out_proj)\.(weight|bias)",
        ),
        renames=bert.RENAMES,
        fixed=bert.FIXED,
        harmless=("tie_word_embeddings",),  # of the masked-language model's head, which is not here
        check=_check,
        max_length=_max_length,
    )


FAMILY = _family("roberta", "Roberta")
XLM = _family("xlm-roberta", "XLMRoberta")
