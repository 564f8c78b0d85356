"""Adapters of Hugging Face PEFT: made there and read here, made here and read there."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import hub
from peftjax.interop import load_peft, save_peft
from peftjax.tree import flatten

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
warnings.filterwarnings("ignore", module="peft")

VOCAB, LABELS = 37, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
}
LLAMA = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
MAKE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, attention_bias=True)),
    "llama-tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama-labels": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**LLAMA, num_labels=LABELS)
    ),
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=LABELS)),
    "bert-bare": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=40, bos_token_id=1, eos_token_id=1
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4, decoder_start_token_id=0
        )
    ),
}
TASKS = {"llama": "CAUSAL_LM", "llama-tied": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TASKS |= {"bert": "SEQ_CLS", "llama-labels": "SEQ_CLS", "bert-bare": "FEATURE_EXTRACTION"}
BASES: dict[str, Any] = {}


def noisy(model, trained_only=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad or not trained_only:
                p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """name -> (folder of the base, the model here)."""

    def get(name):
        if name not in BASES:
            folder = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            noisy(MAKE[name]()).save_pretrained(folder)
            BASES[name] = folder, hub.load(folder)
        return BASES[name]

    yield get
    BASES.clear()


def torch_base(name, folder):
    return type(MAKE[name]()).from_pretrained(folder).eval()


def batch(name):
    rng = np.random.default_rng(0)
    ids = rng.integers(1, VOCAB, (3, 7))
    mask = np.ones((3, 7), int)
    if name in ("bert", "t5", "bert-bare"):
        mask[0, 5:] = 0
    out = {"input_ids": ids, "attention_mask": mask}
    return out | ({"decoder_input_ids": rng.integers(1, VOCAB, (3, 5))} if name == "t5" else {})


def theirs(model, name):
    with torch.no_grad():
        out = model(**{k: torch.tensor(v) for k, v in batch(name).items()})
    return np.asarray(out.last_hidden_state if name == "bert-bare" else out.logits)


def ours(model, params, name):
    out = model.forward(params, {k: jnp.asarray(v) for k, v in batch(name).items()})
    return np.asarray(out.hidden if name == "bert-bare" else out.logits)


def L(**k):  # noqa: N802 - as short as the table needs
    return lambda: peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | k)


CASES: dict[str, tuple[str, Any]] = {
    "lora": ("llama", L(target_modules=["q_proj", "v_proj"])),
    "lora-patterns": (
        "llama",
        L(
            target_modules=["q_proj", "down_proj", "o_proj"],
            rank_pattern={"down_proj": 5, "layers.0.self_attn.q_proj": 2},
            alpha_pattern={"o_proj": 7},
            use_rslora=True,
            lora_dropout=0.1,
        ),
    ),
    "lora-string": ("llama", L(target_modules=r".*\.1\.self_attn\.(q|k)_proj")),
    "lora-all-linear": ("bert", L(target_modules="all-linear")),
    "lora-all-linear-decoder": ("llama", L(target_modules="all-linear", exclude_modules=["up_proj"])),
    "lora-layers": ("llama", L(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers")),
    "lora-bias-all": ("llama", L(target_modules=["q_proj"], bias="all")),
    "lora-bias-all-head": ("bert", L(target_modules=["query", "dense"], bias="all")),
    "lora-bias-own": ("bert", L(target_modules=["query", "value"], bias="lora_only")),
    "lora-head": ("bert", L(target_modules=["query"])),
    "lora-bare": ("bert-bare", L(target_modules=["query", "pooler.dense"])),
    "lora-labels": ("llama-labels", L(target_modules=["q_proj"])),
    "lora-whole": ("llama", L(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])),
    "lora-embedding": ("llama", L(target_modules=["embed_tokens", "k_proj"])),
    "lora-embedding-head": ("llama", L(target_modules=["embed_tokens", "lm_head"])),
    "lora-embedding-tied": ("llama-tied", L(target_modules=["embed_tokens", "k_proj"])),
    "lora-tokens": ("llama", L(target_modules=["k_proj"], trainable_token_indices=[7, 3])),
    "lora-tokens-named": ("llama", L(target_modules=["k_proj"], trainable_token_indices={"embed_tokens": [9, 2]})),
    "lora-tokens-tied": ("llama-tied", L(target_modules=["k_proj"], trainable_token_indices=[7, 3])),
    "lora-gpt2": ("gpt2", L(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "lora-gpt2-mixed": ("gpt2", L(target_modules=["c_attn", "wte", "wpe"], fan_in_fan_out=True)),
    "lora-t5": ("t5", L(target_modules=["q", "v", "wo"])),
    "dora": ("llama", L(target_modules=["q_proj", "v_proj"], use_dora=True)),
    "dora-gpt2": ("gpt2", L(target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True)),
    "dora-embedding": ("llama-tied", L(target_modules=["embed_tokens", "q_proj"], use_dora=True, use_rslora=True)),
    "pissa": ("llama", L(target_modules=["q_proj"], init_lora_weights="pissa")),
    "olora": ("llama", L(target_modules=["q_proj", "down_proj"], init_lora_weights="olora")),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"])),
    "vera": ("llama", lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])),
    "vera-bare": (
        "llama",
        lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], save_projection=False, bias="all"),
    ),
    "ia3": ("llama", lambda: peft.IA3Config()),
    "ia3-gpt2": ("gpt2", lambda: peft.IA3Config()),
    "ia3-t5": ("t5", lambda: peft.IA3Config()),
    "ia3-head": ("bert", lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=[])),
    "norms": ("bert", lambda: peft.LNTuningConfig(target_modules=["LayerNorm"])),
    "norms-some": ("llama", lambda: peft.LNTuningConfig(target_modules=["input_layernorm"])),
    "tokens": ("llama", lambda: peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"])),
    "tokens-tied": (
        "llama-tied",
        lambda: peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["embed_tokens"]),
    ),
    "prefix": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3)),
    "prefix-mlp": (
        "gpt2",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
    ),
    "prompt": ("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3)),
    "prompt-t5": ("t5", lambda: peft.PromptTuningConfig(num_virtual_tokens=3)),
    "prompt-labels": ("llama-labels", lambda: peft.PromptTuningConfig(num_virtual_tokens=3)),
    "p-tuning": ("llama", lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8)),
    "p-tuning-lstm": (
        "gpt2",
        lambda: peft.PromptEncoderConfig(
            num_virtual_tokens=3, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
        ),
    ),
}


def made_there(name, base_folder, config, folder):
    config.task_type = TASKS[name]
    model = noisy(peft.get_peft_model(torch_base(name, base_folder), config), trained_only=True, seed=1)
    model.save_pretrained(folder)


def read_there(name, base_folder, folder):
    return peft.PeftModel.from_pretrained(torch_base(name, base_folder), folder).eval()


def json_of(folder):
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    targets = config.get("target_modules")
    return config | {"target_modules": set(targets) if isinstance(targets, list) else targets}


def tensors_of(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


def last(logits, like):
    """Without the virtual tokens' rows."""
    return logits[:, -like.shape[1] :] if logits.ndim == 3 else logits


@pytest.mark.parametrize("case", CASES)
def test_made_there(case, base, tmp_path):
    name, config = CASES[case]
    base_folder, model = base(name)
    made_there(name, base_folder, config(), tmp_path / "a")
    adapter = load_peft(tmp_path / "a", model)
    got = ours(model, adapter.params, name)
    want = theirs(read_there(name, base_folder, tmp_path / "a"), name)
    assert np.abs(got - ours(model, model.params, name)).max() > 1e-2, "the adapter must matter"
    np.testing.assert_allclose(got, last(want, got), atol=1e-4, rtol=0)
    save_peft(tmp_path / "b", model, adapter.method, adapter.params, adapter.header["extra"])
    assert json_of(tmp_path / "b") == json_of(tmp_path / "a")
    assert tensors_of(tmp_path / "b") == tensors_of(tmp_path / "a")
    # without the memory of where it came from
    save_peft(tmp_path / "c", model, adapter.method, adapter.params)
    np.testing.assert_allclose(theirs(read_there(name, base_folder, tmp_path / "c"), name), want, atol=1e-4, rtol=0)
