"""Tiny models in Hugging Face folders and small data sets, made here: quick, and without the shared folder."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from peftjax import hub
from peftjax.problem import Problem, prepare
from peftjax.tree import Tree, map_with_path

WORDS = "cat dog sat ran red blue big small good bad name type pub place is and in the near : | ||".split()  # noqa: SIM905 - reads better than a list
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WIDTH, LAYERS = 16, 2
ENCODERS = ("bert", "roberta", "xlm-roberta", "electra")


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a word; `[CLS] a [SEP] b [SEP]` for an encoder, `[CLS]` and `[SEP]` as BOS and EOS for a decoder."""
    vocabulary = {w: i for i, w in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_input_names=inputs, **names)


def config(family: str, **changes) -> transformers.PretrainedConfig:
    """Of a model 16 wide with 2 layers."""
    sizes: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    if family == "bert":
        return transformers.BertConfig(**sizes | changes)
    if family in ("roberta", "xlm-roberta"):
        kind = transformers.RobertaConfig if family == "roberta" else transformers.XLMRobertaConfig
        return kind(**sizes | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3} | changes)
    if family == "electra":
        return transformers.ElectraConfig(**sizes | {"embedding_size": 12} | changes)
    if family == "deberta":
        own: dict[str, Any] = {"relative_attention": True, "position_buckets": 6, "pos_att_type": "p2c|c2p"}
        own |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        return transformers.DebertaV2Config(**sizes | own | changes)
    ends: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    if family == "t5":
        own = {"d_model": WIDTH, "d_kv": 6, "d_ff": 24, "num_layers": LAYERS, "num_heads": 4}
        own |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "initializer_factor": 0.7}
        own |= {"decoder_start_token_id": 0, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": sizes["vocab_size"]}
        return transformers.T5Config(**own | changes)
    if family == "bloom":
        own = {"vocab_size": sizes["vocab_size"], "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 4}
        return transformers.BloomConfig(**own | {"initializer_range": 0.2, "seq_length": 64} | ends | changes)
    if family == "gpt_neox":
        turn = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}}
        return transformers.GPTNeoXConfig(**sizes | turn | ends | changes)
    if family == "opt":
        return transformers.OPTConfig(
            ffn_dim=sizes.pop("intermediate_size"), init_std=sizes.pop("initializer_range"), **sizes | ends | changes
        )
    if family == "bart":
        own = {f"{stack}_{k}": v for stack in ("encoder", "decoder") for k, v in (("layers", LAYERS), ("ffn_dim", 24))}
        own |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": WIDTH, "init_std": 0.2}
        own |= {"vocab_size": sizes["vocab_size"], "max_position_embeddings": 64, **ends}
        return transformers.BartConfig(**own | {"decoder_start_token_id": 3, "forced_eos_token_id": 3} | changes)
    if family == "gpt2":
        return transformers.GPT2Config(n_inner=sizes.pop("intermediate_size"), **sizes | ends | changes)
    if family in ("gemma2", "gemma3_text"):
        sizes |= {"num_key_value_heads": 2, "head_dim": 6, "query_pre_attn_scalar": 6, "sliding_window": 4}
        if family == "gemma2":
            return transformers.Gemma2Config(**sizes | ends | changes)
        return transformers.Gemma3TextConfig(**sizes | {"sliding_window_pattern": 2} | ends | changes)
    sizes |= {"num_key_value_heads": 2, "tie_word_embeddings": False}
    relatives = {
        "mistral": transformers.MistralConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": functools.partial(transformers.Qwen3Config, head_dim=WIDTH // 4),
    }
    return relatives.get(family, transformers.LlamaConfig)(**sizes | ends | changes)


def folder(at: Path, family: str, seed: int = 0, **changes) -> Path:
    """Saves a random model without a task head, tokenizer included; no bias is zero."""
    made = config(family, **changes)
    task = "encoder" if hub.FAMILIES[made.model_type].cache_shape is None else "generation"
    model = hub.from_config(made, task, seed=seed)
    return hub.save(model, roughen(model.params, seed), at, tokenizer())


def roughen(params: Tree, seed: int = 0) -> Tree:
    """Adds noise to every array, so that nothing is zero or one by chance of its start."""
    rng = np.random.default_rng(seed)
    return map_with_path(lambda _, x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def rows(task: str, n: int, seed: int = 0) -> list[dict]:
    """Rows of a data set's own columns; the label follows from the words."""
    rng, out = np.random.default_rng(seed), []
    for i in range(n):
        good = bool(rng.integers(2))
        words = rng.choice(WORDS[:8], rng.integers(2, 7)).tolist() + (["good"] if good else ["bad"])
        text, other = " ".join(rng.permutation(words)), " ".join(rng.choice(WORDS[:8], 3))
        out.append(
            {
                "rte": {"sentence1": text, "sentence2": other, "label": "entailment" if good else "not_entailment"},
                "sst2": {"sentence": text, "label": int(good)},
                "stsb": {"sentence1": text, "sentence2": other, "score": 5.0 * good},
                "banking77": {"text": text, "category": f"topic {i % 77}"},
                "e2e": {"mr": f"name[{words[0]}], type[pub]", "ref": f"the {text}"},
            }[task]
        )
    return out


def data(at: Path, task: str, train: int = 24, dev: int = 8) -> Path:
    """A folder with the files of a task."""
    at.mkdir(parents=True, exist_ok=True)
    for i, (name, n) in enumerate((("train", train), ("dev", dev))):
        write_rows(at / f"{name}.jsonl", rows(task, n, i))
    return at


def write_rows(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))


def problem(at: Path, family: str, task: str, **options) -> Problem:
    """A tiny model and a tiny task; what is there already is used again."""
    model = at / family
    if not model.is_dir():
        folder(model, family)
    return prepare(str(model), task, str(data(at / task, task)), **options)


def same(a: Tree, b: Tree) -> bool:
    """Whether structure and every bit are equal."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )
