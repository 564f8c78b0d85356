"""Model families: one file each. `FAMILIES` maps transformers' `model_type` to the family."""

from .bart import FAMILY as BART
from .base import Family as Family
from .bert import FAMILY as BERT
from .gpt2 import FAMILY as GPT2
from .llama import FAMILY as LLAMA
from .t5 import FAMILY as T5, MT5

FAMILIES: dict[str, Family] = {f.name: f for f in (BART, BERT, GPT2, LLAMA, T5, MT5)}
