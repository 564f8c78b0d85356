"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama's blocks, in which a token may see the last few tokens only.

The virtual keys of a prefix are seen from everywhere. The virtual tokens of a prompt are tokens as others: through n
layers they reach n · (window - 1) tokens.
"""

from typing import NamedTuple

from .llama import Design, relative


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_parameters: dict
    sliding_window: int | None  # how many tokens a token sees, itself included; None: all
    attention_dropout: float
    tie_word_embeddings: bool
    num_labels: int


def design(c: Config) -> Design:
    """No biases; all layers slide, or none does."""
    return Design(c.head_dim, window=c.sliding_window, slides=(c.sliding_window is not None,) * c.num_hidden_layers)


FAMILY = relative("mistral", "Mistral", Config, design)
