"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama's blocks with a norm over each head's queries and keys.

Some of the layers may see a window of tokens only, as Qwen2's may.
"""

from typing import NamedTuple

from .llama import Design, relative
from .qwen2 import sliding


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers; Qwen2's docstring is of windows."""

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
    attention_bias: bool
    use_sliding_window: bool
    max_window_layers: int
    sliding_window: int | None
    layer_types: list[str]
    attention_dropout: float
    tie_word_embeddings: bool
    num_labels: int


def design(c: Config) -> Design:
    """Norms of queries and keys; biases in the whole attention or nowhere."""
    bias = c.attention_bias
    return Design(c.head_dim, bias, bias, head_norms=True, window=c.sliding_window, slides=sliding(c))


FAMILY = relative("qwen3", "Qwen3", Config, design, bias_keys=("attention_bias",))
