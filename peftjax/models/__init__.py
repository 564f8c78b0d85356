"""Model families: one file each. `FAMILIES` maps transformers' `model_type` to the family."""

from .base import Family as Family
from .bert import FAMILY as BERT
from .gemma import GEMMA2, GEMMA3
from .gpt2 import FAMILY as GPT2
from .llama import FAMILY as LLAMA
from .mistral import FAMILY as MISTRAL
from .qwen2 import FAMILY as QWEN2
from .qwen3 import FAMILY as QWEN3
from .t5 import FAMILY as T5, MT5

FAMILIES: dict[str, Family] = {f.name: f for f in (BERT, GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, T5, MT5)}
