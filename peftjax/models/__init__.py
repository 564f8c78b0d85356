"""Model families: one file each. `FAMILIES` maps transformers' `model_type` to the family."""

from .bart import FAMILY as BART
from .base import Family as Family
from .bert import FAMILY as BERT
from .bloom import FAMILY as BLOOM
from .deberta import FAMILY as DEBERTA
from .electra import FAMILY as ELECTRA
from .gemma import GEMMA2, GEMMA3
from .gpt2 import FAMILY as GPT2
from .gpt_neox import FAMILY as GPT_NEOX
from .llama import FAMILY as LLAMA
from .mistral import FAMILY as MISTRAL
from .opt import FAMILY as OPT
from .qwen2 import FAMILY as QWEN2
from .qwen3 import FAMILY as QWEN3
from .roberta import FAMILY as ROBERTA, XLM as XLM_ROBERTA
from .t5 import FAMILY as T5, MT5

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        BART,
        BERT,
        BLOOM,
        DEBERTA,
        ELECTRA,
        GEMMA2,
        GEMMA3,
        GPT2,
        GPT_NEOX,
        LLAMA,
        MISTRAL,
        OPT,
        QWEN2,
        QWEN3,
        ROBERTA,
        XLM_ROBERTA,
        T5,
        MT5,
    )
}
