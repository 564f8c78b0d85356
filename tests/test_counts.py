"""Trained parameters, counted from configurations alone, against the formulas and against what papers print."""

import functools
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import jax
import optax
import pytest
import transformers
import yaml
from conftest import SHARED, needs_shared
from paper import AGREES, BASES, Printed, bert, deberta, figures, gpt2, llama, t5, trained

from peftjax import chain, hub, partition
from peftjax.methods import (
    Method,
    adalora,
    adapter,
    bitfit,
    dora,
    fishmask,
    full,
    head,
    ia3,
    lora,
    mam,
    norm_tuning,
    parallel_adapter,
    pfeiffer,
    pissa,
    prefix,
    prompt,
    vera,
)
from peftjax.tree import count


def trained_count(config, method, task="encoder") -> int:
    return trained(hub.from_config(config, task, seed=None), method)


# By formula


COUNTS = {  # as published, and as counted independently in the survey's tables
    # Hu et al. 2022: 2 r d for each of query and value, in 12 layers
    "lora": (bert(), lora(8), "encoder", 294_912),
    "lora, llama": (llama(12, 768, 12), lora(8), "causal-lm", 294_912),
    # Hu et al. 2022's layers for GPT-2 medium, r = 4 on query and value: 2 r (d + d) each
    "lora, gpt2": (gpt2(24, 1024, 16), lora(4), "causal-lm", 24 * 2 * 4 * (1024 + 1024)),
    "bitfit subset, gpt2": (gpt2(24, 1024, 16), bitfit(["query", "mlp_in"]), "causal-lm", 24 * (1024 + 4096)),
    "prefix, gpt2": (gpt2(24, 1024, 16), prefix(5), "causal-lm", 245_760),
    # Ben Zaken et al. 2022, table 1: 0.09% of BERT-base and 0.08% of BERT-large; all biases, pooler included
    "bitfit, base": (bert(), bitfit(), "encoder", 102_912),
    "bitfit, large": (bert(24, 1024, 16), bitfit(), "encoder", 272_384),
    "bitfit, subset": (bert(), bitfit(["query", "mlp_in"]), "encoder", 46_080),
    # Li & Liang 2021 at GPT-2 medium's sizes: 2 n L k, and with the MLP n d + (d + 1) h + (h + 1) 2 L k
    "prefix": (llama(24, 1024, 16), prefix(5), "causal-lm", 245_760),
    "prefix, bert": (bert(24, 1024, 16), prefix(5), "encoder", 245_760),
    "prefix, mlp": (llama(24, 1024, 16), prefix(5, mlp=True, hidden=512), "causal-lm", 25_744_896),
    # Sung et al. 2021: 0.5% of BERT-large, int(0.005 · 333,581,314), the classifier's 2,050 within
    "fishmask": (bert(24, 1024, 16), chain(fishmask(), head()), "classification", 1_667_906),
    "head": (bert(), head(), "classification", 768 * 2 + 2),
    "full": (bert(), full(), "encoder", 108_310_272),
    # Zhang et al. 2023, table 1, of DeBERTa-v3-base: 184M, and 0.1M with BitFit
    "full, deberta": (deberta(12, 768, 12), full(), "encoder", 183_831_552),
    "bitfit, deberta": (deberta(12, 768, 12), bitfit(), "encoder", 102_912),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    config, method, task, expected = COUNTS[name]
    assert trained_count(config, method, task) == expected


def test_the_optimizer_of_fishmask_holds_two_moments_of_what_is_chosen():
    model = hub.from_config(bert(24, 1024, 16), "classification", seed=None)
    method = chain(fishmask(), head())
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, model.sites), model.params)
    trainable, _ = partition(params, method.trainable(params))
    state = jax.eval_shape(optax.adamw(1e-4).init, trainable)
    assert count(state) == 2 * 1_667_906 + sum(x.shape == () for x in jax.tree.leaves(state))


# As printed: a row of the survey's table for each


MODELS: dict[str, Callable[[], Any]] = {  # the rows' names of models -> transformers' config
    **{
        name.replace("t5-v1.1", "t5-v1.1-lm100k"): base.config for name, base in BASES.items() if "llama-2-" not in name
    },
    "llama-2-7b": BASES["llama-2-7b"].config,
    "bert-base-uncased": lambda: bert(vocabulary=30522),
    "mistral-7b": transformers.MistralConfig,
    "Qwen/Qwen2.5-3B-Instruct": lambda: transformers.Qwen2Config(
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "facebook/opt-350m": lambda: transformers.OPTConfig(
        hidden_size=1024,
        ffn_dim=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        word_embed_proj_dim=512,
        do_layer_norm_before=False,
    ),
    "t5-base": lambda: t5(12, 768, 12, 3072, first=True),
    "t5-large": lambda: t5(24, 1024, 16, 4096, first=True),
    "t0-3b": lambda: t5(24, 2048, 32, 5120),
    "t0-11b (T5-XXL LM-adapted)": lambda: t5(24, 4096, 64, 10240),
    "bigscience/bloomz-560m": lambda: transformers.BloomConfig(hidden_size=1024, n_layer=24, n_head=16),
    "mt0-large": lambda: t5(24, 1024, 16, 2816, transformers.MT5Config, 250112),
}

# Where the family is not here, one with the same shapes in all that the rows count: name -> (config, what is the same).
STANDS_IN: dict[str, tuple[Callable[[], Any], str]] = {
    "gpt3-175b": (lambda: gpt2(96, 12288, 96), "GPT-2's blocks and width; its sparse attention has no parameters"),
}
TASK = {  # of others: a language model
    "bart": "encoder",
    "bert": "encoder",
    "deberta-v2": "encoder",
    "roberta": "encoder",
    "t5": "seq2seq",
    "mt5": "seq2seq",
}


class Case(NamedTuple):
    """A method on the row's model, unless another is named, for the family's usual task, unless another is named."""

    method: Method
    task: str | None = None
    model: str | None = None
    labels: int | None = None


def roberta_head(labels: int, size: str = "base") -> Case:
    return Case(head(), "classification", f"roberta-{size}", labels)


FIVE = ["query", "key", "value", r".*/up_proj/kernel", "mlp_out"]  # Liu et al. 2024's targets in Llama
PROMPTS = {  # length by row
    f"prompt_t5_{size}_{n}": n
    for size in ("small", "base", "large", "xl", "xxl")
    for n in (1, 5, 20, 50, 100, 150)
    if (size, n) != ("xl", 50)  # no such row
}


CASES: dict[str, Case] = {
    **{
        f"total_{name}": Case(full())
        for name in (
            *("bert-base-cased", "bert-large-cased", "bert-base-uncased", "bert-large-uncased"),
            *("gpt2-medium", "gpt2-large", "llama-7b", "llama-13b", "llama-3-8b", "mistral-7b"),
        )
    },
    # Hu et al. 2022
    "lora_roberta_base_r8_qv": Case(lora(8)),
    "head_roberta_base_1": roberta_head(1),
    "head_roberta_base_2": roberta_head(2),
    "head_roberta_base_3": roberta_head(3),
    "lora_roberta_base_r8_qv_plus_head2": Case(lora(8)),
    "lora_roberta_large_r8_qv": Case(lora(8)),
    "lora_roberta_large_r8_qv_plus_head2": Case(lora(8)),
    "lora_deberta_xxl_r16_qv": Case(lora(16)),
    "lora_deberta_xxl_r8_qv": Case(lora(8)),
    "lora_gpt2m_r4_qv": Case(lora(4)),
    "lora_gpt2l_r4_qv": Case(lora(4)),
    **{f"lora_gpt3_r{r}_qv": Case(lora(r)) for r in (1, 2, 4, 8, 64)},
    **{f"adapterP_roberta_large_r{m}": Case(pfeiffer(m)) for m in (16, 64)},
    "adapterH_roberta_large_r64": Case(adapter(64)),
    **{f"adapterH_gpt3_r{m}": Case(adapter(m)) for m in (1, 4, 8, 16, 64)},
    "preembed_gpt3_256_8": Case(prompt(256 + 8)),  # as many vectors, wherever they stand
    # Houlsby et al. 2019
    "houlsby_bert_large_64": Case(chain(adapter(64), norm_tuning())),
    "houlsby_bert_base_LN_only": Case(norm_tuning()),
    # Ben Zaken et al. 2022; RoBERTa's classifier has no pooler
    "bitfit_bert-base-cased": Case(bitfit()),
    "bitfit_bert-large-cased": Case(bitfit()),
    "bitfit_qm2_bert-base-cased": Case(bitfit(["query", "mlp_in"])),
    "bitfit_roberta-large": Case(bitfit(), "classification"),
    # Sung et al. 2021: the head is within the budget
    "fish_bert_large_0.5pct": Case(chain(fishmask(0.005), head()), "classification", labels=2),
    # Li & Liang 2021
    **{f"prefix_gpt2-{size}_{n}": Case(prefix(n)) for size, n in (("medium", 5), ("medium", 10), ("large", 5))},
    **{
        f"prefix_gpt2-{size}_{n}_train": Case(prefix(n, mlp=True, hidden=512))
        for size, n in (("medium", 5), ("medium", 10), ("large", 5))
    },
    # Lester et al. 2021
    **{row: Case(prompt(n)) for row, n in PROMPTS.items()},
    # Liu et al. 2024
    **{f"lora_llama-7b_r{r}": Case(lora(r, targets=FIVE)) for r in (4, 8, 16, 32, 64)},
    **{f"dora_llama-7b_r{r}": Case(dora(r, targets=FIVE)) for r in (4, 8, 16, 32, 64)},
    "dora_llama-13b_r32": Case(dora(32, targets=FIVE)),
    "lora_llama-3-8b_r32": Case(lora(32, targets=FIVE)),
    "dora_llama-3-8b_r32": Case(dora(32, targets=FIVE)),
    "pissa_llama2-7b_r128": Case(pissa(128, targets=["linear"])),
    # Zhang et al. 2023; a final budget of 576 or 144 triplets, spread evenly, is 8 or 2 for each of 72 matrices
    "lora_debertav3_r8_all6": Case(lora(8, targets=["linear"])),
    **{f"adalora_debertav3_init_r{r}": Case(adalora(1, r, targets=["linear"])) for r in (2, 4, 6, 12)},
    "adalora_debertav3_bT576": Case(adalora(8, 8, targets=["linear"])),
    "adalora_debertav3_bT144": Case(adalora(2, 2, targets=["linear"])),
    "padapter_debertav3_64": Case(pfeiffer(64)),
    "padapter_debertav3_16": Case(pfeiffer(16)),
    "hadapter_debertav3_32": Case(adapter(32)),
    "hadapter_debertav3_8": Case(adapter(8)),
    # He et al. 2022: of BART's 36 attention modules, and of the MLPs in its 24 layers
    "he2022_prefix_l200": Case(prefix(200)),
    "he2022_lora_ffn_r102": Case(lora(102, targets=["mlp_in", "mlp_out"])),
    "he2022_pa_ffn_r200": Case(parallel_adapter(200)),
    "he2022_pa_ffn_r1024": Case(parallel_adapter(1024)),
    "he2022_mam_l30_r512": Case(mam(30, 512)),
    # Kopiczko et al. 2024
    "vera_roberta-base_r1024_glue": Case(vera(1024)),
    "vera_roberta-large_r256_glue": Case(vera(256)),
    **{f"vera_roberta-base_r{r}_t1": Case(vera(r)) for r in (1, 256)},
    **{f"vera_roberta-large_r{r}_t1": Case(vera(r)) for r in (1, 16, 256)},
    # Liu et al. 2022
    "ia3_mt0-large": Case(ia3()),
    "ia3_t0-3b": Case(ia3()),
    "ia3_t0-11b": Case(ia3()),
    # Hugging Face PEFT's documentation
    "peft_bloomz560m_prefix20": Case(prefix(20)),
    "peft_bloomz560m_prompt8": Case(prompt(8)),
    "peft_opt350m_r16": Case(lora(16)),
    "peft_t5base_r8": Case(lora(8)),
    "peft_t5large_prompt20": Case(prompt(20)),
    "peft_qwen2.5-3b_r16": Case(lora(16)),
}
ALSO = {  # what trains beside
    "lora_roberta_base_r8_qv_plus_head2": roberta_head(2),
    "lora_roberta_large_r8_qv_plus_head2": roberta_head(2, "large"),
}

# Biases of adapters, which He et al. 2022 train and leave out of their table 11's formulas.
BIASES = {
    "he2022_pa_ffn_r200": 24 * (200 + 1024),
    "he2022_pa_ffn_r1024": 24 * (1024 + 1024),
    "he2022_mam_l30_r512": 24 * (512 + 1024),
}

LIN = "Lin et al. 2020's adapter, which has a norm of its own, is not here"
NOT_HERE = {
    "adapterL_gpt2m_r6": LIN,
    "adapterL_gpt2m_r224": LIN,
    "adapterL_gpt2l_r8": LIN,
    "prelayer_gpt3_8_8": "prefix-layer tuning, which trains each layer's activations, is not here",
    "dora_llama-7b_qkv_magall": "dora has no magnitudes without factors",
    "dora_llama-13b_qkv_magall": "dora has no magnitudes without factors",
    "loreft_llama-7b_r8": "LoReFT is not here",
    "loreft_llama-3-8b_r8": "LoReFT is not here",
}


class Disagreement(NamedTuple):
    ours: int
    published: str
    reason: str


DISAGREES = {
    "total_gpt2-medium": Disagreement(354_823_168, "354.92M", "the config gives less, by about 100 rows of embedding"),
    "lora_deberta_xxl_r8_qv": Disagreement(2_359_296, "4.7M", "table 10 has r = 8; the scripts' 16 gives 4.7M"),
    "lora_gpt2m_r4_qv": Disagreement(
        393_216, "0.35M", "0.35M is 0.1% of the model; the released 1.5 MB are 393,216 floats"
    ),
    "lora_gpt2l_r4_qv": Disagreement(737_280, "0.77M", "0.77M is 0.1% of the model's 774.03M"),
    "adapterP_roberta_large_r64": Disagreement(3_171_840, "3.0M", "without biases 3,145,728, which is 3.0 · 2^20"),
    "adapterH_roberta_large_r64": Disagreement(6_343_680, "6.0M", "without biases 6,291,456, which is 6.0 · 2^20"),
    "houlsby_bert_large_64": Disagreement(6_444_032, "2.1%", "1.9% of the model; 2.1% of its 24 layers"),
    "houlsby_bert_base_LN_only": Disagreement(38_400, "40k", "printed to one digit"),
    "prefix_gpt2-medium_5": Disagreement(245_760, "250K", "printed to two digits"),
    "prefix_gpt2-medium_10": Disagreement(491_520, "500K", "printed to one digit"),
    "prompt_t5_small_20": Disagreement(10_240, "10,420", "a misprint: 20 · 512"),
    "lora_llama-7b_r16": Disagreement(28_049_408, "0.42%", "0.416% of the base; table 15 else takes base and adapter"),
    "adalora_debertav3_bT576": Disagreement(1_327_680, "1.27M", "the learned ranks fall on the smaller matrices"),
    "adalora_debertav3_bT144": Disagreement(331_920, "0.32M", "the learned ranks fall on the smaller matrices"),
    "hadapter_debertav3_32": Disagreement(
        1_198_848, "1.22M", "twice the 0.61M of half the size, but output biases do not double"
    ),
    "vera_roberta-large_r16_t1": Disagreement(49_920, "49.5K", "48 (1024 + 16); 49.5K would be rank 7"),
    "peft_t5large_prompt20": Disagreement(
        20_480, "40,960", "peft has one for the decoder too; the paper, the encoder's alone"
    ),
}
# In the printed total of all parameters, and not in base and adapter: as many as a bias for each adapted matrix has.
EXTRA = {"peft_t5base_r8": 36 * 2 * 768}


@functools.cache
def rows() -> dict[str, dict]:
    table = yaml.safe_load((SHARED / "papers/tables.yaml").read_text())["count_tests"]
    assert len({r["id"] for r in table}) == len(table)
    return {r["id"]: r for r in table}


MADE: dict[tuple, hub.Model] = {}


def abstract(name: str, task: str | None, labels: int | None) -> hub.Model:
    """The model's shapes, made once for all names whose configs say the same."""
    config = (MODELS.get(name) or STANDS_IN[name][0])()
    task = task or TASK.get(config.model_type, "causal-lm")
    key = config.to_json_string(), task, labels
    if key not in MADE:
        MADE[key] = hub.from_config(config, task, labels=labels, seed=None)
    return MADE[key]


@needs_shared
@pytest.mark.parametrize("name", CASES)
def test_published_count(name):
    """A row's count, the published figure and how they agree, percentages and totals."""
    row, case = rows()[name], CASES[name]
    model = abstract(case.model or row["model"], case.task, case.labels)
    n = trained(model, case.method) - BIASES.get(name, 0)
    if name in ALSO:
        also = ALSO[name]
        n += trained(abstract(also.model, also.task, also.labels), also.method)
    odd = DISAGREES.get(name)
    assert n == (odd.ours if odd else row["count"])
    base = count(model.params)
    if "percent" in row:
        assert row["model"] in MODELS  # what stands in has other totals
        _check_percent(row["percent"], n, base)
    if not row.get("published_seen"):
        assert odd is None
        return
    first, *rest = figures(row["published"])
    whole = base + n if row.get("percent_basis") == "base+adapter" else base
    word = first.agreement(n, whole)
    assert (word in AGREES) == (odd is None), f"{n:,} of {whole:,} is printed {row['published']!r}: {word}"
    if odd:
        assert figures(odd.published) == [first]
    if n == row["count"] and not row["agreement"].startswith("not computed"):
        assert word == row["agreement"]
    totals = [x for x in rest if x.unit == ""]
    for total in totals:
        if row["model"] in MODELS:
            assert base + EXTRA.get(name, 0) + row["count"] == total.number
        for share in (x for x in rest if x.unit == "%"):
            assert share.agreement(n, int(total.number)) in AGREES


def _check_percent(percent: dict, n: int, base: int) -> None:
    for key, value in percent.items():
        whole = {"trainable_over_base": base, "trainable_over_base_plus_adapter": base + n}
        whole |= {"trainable_over_total": base + n}
        if key == "total":
            assert value == base + n
        elif key in whole:
            assert round(100 * n / whole[key], 5) == value, key
        else:
            assert key == "total_basis"


@needs_shared
def test_every_row_is_checked_or_is_said_not_to_be_here():
    assert sorted([*CASES, *NOT_HERE]) == sorted(rows())  # each once
    assert set(DISAGREES) | set(ALSO) | set(EXTRA) | set(BIASES) <= set(CASES)
    known = {*MODELS, *STANDS_IN}
    assert not set(MODELS) & set(STANDS_IN)
    assert {c.model or rows()[name]["model"] for name, c in [*CASES.items(), *ALSO.items()]} == known


@pytest.mark.parametrize(
    ("text", "n", "whole", "word"),
    [
        ("0.3M", 294_912, 1, "rounds"),
        ("24.5K", 24_576, 1, "truncates"),
        ("40k", 38_400, 1, "within_7pct"),
        ("354.92M (LoRA Table 3)", 354_823_168, 1, "within_2pct"),
        ("0.68%", 68, 10_000, "rounds"),
        ("0.09%", 95, 100_000, "truncates"),  # to two places it would be 0.10: a half goes up
        ("0.35M", 393_216, 1, "differs"),
        ("1,572,864 / 332,769,280", 1_572_864, 1, "exact"),
        ("1,572,864 / 332,769,280", 1_572_865, 1, "differs"),
    ],
)
def test_agreement(text, n, whole, word):
    assert figures(text)[0].agreement(n, whole) == word


def test_figures():
    text = "983,040 / 560,197,632 / 0.1755% (printed in docs, 12 / 3)"
    assert [(str(x.number), x.unit) for x in figures(text)] == [("983040", ""), ("560197632", ""), ("0.1755", "%")]
    assert figures("2.1% per task") == [Printed(Decimal("2.1"), "%")]
    assert figures("884736 / 223843584")[1].number == 223_843_584
