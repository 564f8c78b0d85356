"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv:2407.10671): Llama's blocks with biases of queries, keys and values.

Some of the layers may see a window of tokens only, as Mistral's do.
"""

from typing import Any, NamedTuple

from .llama import Design, relative

LAYER_TYPES = ("full_attention", "sliding_attention")


class Config(NamedTuple):
    """The config keys that this model honours, by their names in transformers.

    transformers gives every config its `layer_types`, and no `sliding_window` to one without `use_sliding_window`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None  # None: hidden_size / num_attention_heads
    hidden_act: str
    max_position_embeddings: int
    initializer_range: float
    rms_norm_eps: float
    rope_parameters: dict
    use_sliding_window: bool
    max_window_layers: int  # how many layers do not slide, the first ones; of no effect beside `layer_types`
    sliding_window: int | None
    layer_types: list[str]
    attention_dropout: float
    tie_word_embeddings: bool
    num_labels: int


def sliding(c: Any) -> tuple[bool, ...]:
    """Whether each layer sees a window only, from the config's `layer_types`.

    Raises:
      ValueError: a type that is neither of the two.
    """
    if unknown := sorted(set(c.layer_types) - set(LAYER_TYPES)):
        raise ValueError(f"the layer_types {unknown} are not supported; supported are {list(LAYER_TYPES)}")
    return tuple(t == "sliding_attention" for t in c.layer_types)


def design(c: Config) -> Design:
    """Biases of queries, keys and values alone."""
    if c.head_dim is None and c.hidden_size % c.num_attention_heads:
        raise ValueError(f"hidden_size {c.hidden_size} does not divide into {c.num_attention_heads} attention heads")
    size = c.head_dim or c.hidden_size // c.num_attention_heads
    return Design(size, qkv_bias=True, window=c.sliding_window, slides=sliding(c))


FAMILY = relative("qwen2", "Qwen2", Config, design, absent={"head_dim": None}, fixed={"use_mrope": False})
