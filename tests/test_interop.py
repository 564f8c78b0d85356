"""Adapters of Hugging Face PEFT: made there and read here, made here and read there."""

import json
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED, needs_shared

from peftjax import METHODS, chain, hub, merge
from peftjax.arithmetic import to_lora
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.interop import from_loralib, import_adapter, load_peft, save_peft
from peftjax.interop.folder import read
from peftjax.layout import stack_layers
from peftjax.methods import (
    adalora,
    adapter,
    bitfit,
    dora,
    dylora,
    fishmask,
    full,
    head,
    ia3,
    lora,
    lora_fa,
    lora_plus,
    neftune,
    norm_tuning,
    olora,
    p_tuning,
    pissa,
    prefix,
    prompt,
    trainable_tokens,
    vera,
)
from peftjax.tree import flatten, map_with_path

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
MAKE |= {
    "bloom": lambda: transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES, rotary_pct=0.5)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**{k: v for k, v in SIZES.items() if k != "intermediate_size"}, ffn_dim=24)
    ),
    "roberta": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**SIZES, num_labels=LABELS, pad_token_id=0)
    ),
}
TASKS = {"llama": "CAUSAL_LM", "llama-tied": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}
TASKS |= dict.fromkeys(["bloom", "neox", "opt"], "CAUSAL_LM") | {"roberta": "SEQ_CLS"}
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
    if name in ("bert", "roberta", "t5", "bert-bare"):
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


def L(**k):
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
    "lora-bloom": ("bloom", L(target_modules=["query_key_value", "dense_4h_to_h"], bias="all")),
    "lora-neox": ("neox", L(target_modules=["query_key_value"], bias="lora_only", modules_to_save=["dense"])),
    "lora-opt": ("opt", L(target_modules=["q_proj", "fc1", "embed_tokens"])),
    "lora-roberta": ("roberta", L(target_modules="all-linear")),
    "lora-layer": ("llama", L(target_modules=["q_proj"], layers_to_transform=0)),
    "dora-neox": ("neox", L(target_modules=["query_key_value"], use_dora=True)),
    "ia3-bloom": ("bloom", lambda: peft.IA3Config()),
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
    "tokens-t5": ("t5", lambda: peft.TrainableTokensConfig(token_indices=[5, 2], target_modules=["shared"])),
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


OWN: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lora(3, 5)),
    "lora-patterns": (
        "llama",
        lora(
            2, 6, ["query", "mlp_out"], rank_pattern={"mlp_out": 4}, alpha_pattern={".*_0/.*q_proj.*": 3}, rslora=True
        ),
    ),
    "lora-head": ("bert", chain(lora(3, targets=["linear"], dropout=0.1), head())),
    "lora-bitfit": ("llama", chain(lora(3), bitfit())),
    "lora-bitfit-head": ("bert", chain(lora(3), bitfit(), head())),
    "lora-bitfit-own": ("bert", chain(lora(3, targets=["query"]), bitfit(["query"]))),
    "lora-embedding": ("llama", lora(3, 4, ["embedding", "lm_head"])),
    "lora-take": ("llama-tied", lora(3, 4, ["embedding", "key"], tied_embedding="take")),
    "lora-tokens": ("llama", chain(lora(3), trainable_tokens([8, 4]))),
    "lora-whole": ("llama", chain(lora(3), full(["lm_head", "embedding"]), neftune())),
    "lora-gpt2": ("gpt2", lora(3, targets=["fused_qkv", "attention_out", "embedding_other"])),
    "lora-t5": ("t5", lora(3, targets=["query", "mlp_in", "mlp_out"])),
    "lora_plus": ("llama", lora_plus(3, 5)),
    "lora_fa": ("llama", lora_fa(3, 5)),
    "dylora": ("llama", dylora(4, 6)),
    "dora": ("bert", chain(dora(3, 5, ["query", "mlp_in"]), head())),
    "dora-gpt2": ("gpt2", dora(3, targets=["fused_qkv"])),
    "pissa": ("llama", pissa(3, 5)),
    "olora": ("bert", chain(olora(3, 5, ["mlp_in"]), head())),
    "adalora": ("llama", adalora(2, 4, 7, targets=["query", "mlp_in"], total=20)),
    "vera": ("llama", vera(8, ["query", "value", "mlp_out"])),
    "vera-bitfit": ("llama", chain(vera(8), bitfit())),
    "ia3": ("llama", ia3()),
    "ia3-gpt2": ("gpt2", ia3()),
    "ia3-t5": ("t5", ia3(["query", "value", "mlp_in"])),
    "norms": ("bert", chain(norm_tuning(), head())),
    "norms-llama": ("llama", norm_tuning()),
    "tokens": ("llama", trainable_tokens([5, 2, 11])),
    "tokens-tied": ("llama-tied", trainable_tokens([8, 4])),
    "tokens-t5": ("t5", trainable_tokens([8, 4])),
    "prefix": ("gpt2", prefix(4)),
    "prefix-mlp": ("llama", prefix(4, mlp=True, hidden=6)),
    "prompt": ("gpt2", prompt(4)),
    "prompt-t5": ("t5", prompt(4)),
    "p-tuning": ("llama", p_tuning(4, encoder="mlp", hidden=6)),
    "p-tuning-lstm": ("llama-labels", chain(p_tuning(4, hidden=6), head())),
}


def trained(model, method, seed=3):
    """Adapted parameters whose trainables are away from their start; of AdaLoRA's triplets one is dead."""
    params = method.init(jax.random.key(0), model.params, model.sites)
    mask, rng = flatten(method.trainable(params)), np.random.default_rng(seed)

    def move(path, x):
        x = x + 0.2 * rng.normal(size=x.shape).astype(np.float32) if mask[path] else x
        return x.at[1].set(0) if path.endswith("/lam") and "layers_1" in path else x

    return map_with_path(move, params)


@pytest.mark.parametrize("case", OWN)
def test_made_here(case, base, tmp_path):
    name, method = OWN[case]
    base_folder, model = base(name)
    params = trained(model, method)
    save_peft(tmp_path / "a", model, method, params)
    want = ours(model, method.resolve(params, None), name)
    assert np.abs(want - ours(model, model.params, name)).max() > 1e-2
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        there = read_there(name, base_folder, tmp_path / "a")
    assert not [w for w in said if "missing" in str(w.message) or "Unexpected" in str(w.message)]
    np.testing.assert_allclose(last(theirs(there, name), want), want, atol=1e-4, rtol=0)
    again = load_peft(tmp_path / "a", model)
    np.testing.assert_allclose(ours(model, again.params, name), want, atol=1e-5, rtol=0)
    save_peft(tmp_path / "b", model, again.method, again.params, again.header["extra"])
    save_peft(tmp_path / "c", model, again.method, again.params)
    for other in ("b", "c"):
        assert tensors_of(tmp_path / other) == tensors_of(tmp_path / "a")
    assert json_of(tmp_path / "b") == json_of(tmp_path / "a")
    # as an adapter of this library: it trains, and its file gives it back
    moving = flatten(again.method.trainable(again.params))
    assert any(moving.values())
    save_adapter(tmp_path / "x.safetensors", model, again.method, again.params, again.header["extra"])
    back = load_adapter(tmp_path / "x.safetensors", model)
    assert np.array_equal(ours(model, back.params, name), ours(model, again.params, name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("case", ["lora-embedding", "lora-whole", "ia3", "pissa"])
def test_narrow_tensors(case, dtype, base, tmp_path):
    """They are widened as in PEFT, and written as they came; what has trained on is written in float32."""
    name, config = CASES[case]
    base_folder, model = base(name)
    there = noisy(peft.get_peft_model(torch_base(name, base_folder), config()), trained_only=True)
    for p in there.parameters():
        p.data = p.data.to(getattr(torch, dtype)) if p.requires_grad else p.data
    there.save_pretrained(tmp_path / "a")
    adapter = load_peft(tmp_path / "a", model)
    got = ours(model, adapter.params, name)
    np.testing.assert_allclose(got, theirs(read_there(name, base_folder, tmp_path / "a"), name), atol=1e-4, rtol=0)
    np.testing.assert_allclose(ours(model, merge(adapter.params), name), got, atol=1e-4, rtol=0)
    save_peft(tmp_path / "b", model, adapter.method, adapter.params, adapter.header["extra"])
    assert tensors_of(tmp_path / "b") == tensors_of(tmp_path / "a")
    mask = flatten(adapter.method.trainable(adapter.params))
    moved = map_with_path(lambda p, x: x * 1.001 if mask[p] else x, adapter.params)
    save_peft(tmp_path / "c", model, adapter.method, moved, adapter.header["extra"])
    want = ours(model, moved, name)
    np.testing.assert_allclose(ours(model, load_peft(tmp_path / "c", model).params, name), want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_configuration_that_does_not_name_the_head(name, base, tmp_path):
    """Older versions of PEFT wrote the head of a classifier, and not its name."""
    base_folder, model = base(name)
    made_there(name, base_folder, L(target_modules="all-linear")(), tmp_path / "a")
    was = json_of(tmp_path / "a")
    kept = ("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "inference_mode")
    old = {k: was[k] for k in kept} | {"modules_to_save": None, "target_modules": "all-linear"}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(old))
    got = ours(model, load_peft(tmp_path / "a", model).params, name)
    np.testing.assert_allclose(got, theirs(read_there(name, base_folder, tmp_path / "a"), name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8", "nf4"])
def test_what_is_exported_does_not_hang_on_the_base(quantize, stacked, base, tmp_path):
    base_folder, plain = base("llama")
    model = hub.load(base_folder, quantize=quantize)
    method = chain(dora(3, 5, ["query", "mlp_out"]), bitfit(["query"]), trainable_tokens([4]))
    params = trained(model, method)
    save_peft(tmp_path / "a", model, method, stack_layers(params) if stacked else params)
    there = load_peft(tmp_path / "a", model)
    np.testing.assert_allclose(ours(model, there.params, "llama"), ours(model, params, "llama"), atol=1e-6, rtol=0)
    theirs(read_there("llama", base_folder, tmp_path / "a"), "llama")
    assert set(load_peft(tmp_path / "a", plain).params) == set(plain.params)


MEANS_ANOTHER_THING = {
    "shared": ("t5", L(target_modules=["v", "shared"]), "shared is the table that encoder and decoder share"),
    "positions": ("opt", L(target_modules=["q_proj", "embed_positions"]), "embed_positions means another thing"),
}


@pytest.mark.parametrize("what", MEANS_ANOTHER_THING)
def test_embeddings_that_peft_does_not_adapt(what, base, tmp_path):
    """What PEFT trains there is no change of the table: the logits would be others."""
    name, config, message = MEANS_ANOTHER_THING[what]
    base_folder, model = base(name)
    made_there(name, base_folder, config(), tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load_peft(tmp_path / "a", model)
    own = lora(3, targets=["embedding" if what == "shared" else "embedding_other"], tied_embedding="take")
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "b", model, own, trained(model, own))


# The command line, real adapters, bad input

GPT2_TIGRINYA = SHARED / "models/gpt2-tigrinya-lora-peft"
MNLI = SHARED / "models/roberta_base_lora_mnli/lora_and_head.safetensors"


def test_the_verbs(base, tmp_path, call):
    base_folder, _ = base("bert")
    made_there("bert", base_folder, L(target_modules=["query"])(), tmp_path / "there")
    status, out, err = call("import", tmp_path / "there", "--model", base_folder, "--out", tmp_path / "a.safetensors")
    assert status == 0, err
    for source in (tmp_path / "there", tmp_path / "a.safetensors"):
        status, out, err = call("inspect", source)
        assert status == 0, err
        assert "r=3" in out or "rank=3" in out
        assert "3 x 16" in out or "16 x 3" in out
    status, out, err = call("export", tmp_path / "a.safetensors", "--model", base_folder, "--out", tmp_path / "back")
    assert status == 0, err
    assert tensors_of(tmp_path / "back") == tensors_of(tmp_path / "there")
    assert json_of(tmp_path / "back") == json_of(tmp_path / "there")
    status, out, err = call("export", tmp_path / "a.safetensors", "--model", base_folder, "--out", tmp_path / "back")
    assert status == 1
    assert "holds an adapter already" in err
    status, out, err = call(
        "export", tmp_path / "a.safetensors", "--model", base_folder, "--out", tmp_path / "a.safetensors"
    )
    assert (status, "is a file; write a new folder" in err) == (1, True)
    status, out, err = call(
        "merge", "--adapter", tmp_path / "a.safetensors", "--model", base_folder, "--out", tmp_path / "m"
    )
    assert status == 0, err
    pair = f"{tmp_path / 'a.safetensors'}=2,{tmp_path / 'a.safetensors'}=-1"
    status, out, err = call("combine", "--adapters", pair, "--model", base_folder, "--out", tmp_path / "c.safetensors")
    assert status == 0, err
    status, out, err = call("export", tmp_path / "c.safetensors", "--model", base_folder, "--out", tmp_path / "sum")
    assert status == 0, err
    want = theirs(read_there("bert", base_folder, tmp_path / "there"), "bert")
    got = theirs(read_there("bert", base_folder, tmp_path / "sum"), "bert")
    np.testing.assert_allclose(got, want, atol=1e-4, rtol=0)
    np.testing.assert_allclose(theirs(torch_base("bert", tmp_path / "m"), "bert"), want, atol=1e-4, rtol=0)


@needs_shared
def test_a_real_adapter_of_gpt2(tmp_path):
    """The file of a hub, on a random GPT-2 of its size: it loads, acts as in PEFT, and is written again as it was."""
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=40, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = hub.load(tmp_path / "base")
    adapter = load_peft(GPT2_TIGRINYA, model)
    there = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    there = peft.PeftModel.from_pretrained(there, GPT2_TIGRINYA).eval()
    got = ours(model, adapter.params, "gpt2")
    np.testing.assert_allclose(got, theirs(there, "gpt2"), atol=2e-4, rtol=0)
    np.testing.assert_allclose(ours(model, merge(adapter.params), "gpt2"), got, atol=2e-4, rtol=0)
    save_peft(tmp_path / "again", model, adapter.method, adapter.params, adapter.header["extra"])
    assert tensors_of(tmp_path / "again") == tensors_of(GPT2_TIGRINYA)
    assert json_of(tmp_path / "again") == json_of(GPT2_TIGRINYA)


@needs_shared
def test_a_real_adapter_of_roberta(tmp_path):
    """loralib's file of MNLI, on a random RoBERTa of its size: every tensor, against the product in float64."""
    from safetensors.numpy import load_file

    config = transformers.RobertaConfig(vocab_size=VOCAB, max_position_embeddings=40, pad_token_id=0, num_labels=3)
    torch.manual_seed(0)
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    import_adapter(MNLI, str(tmp_path / "base"), tmp_path / "a.safetensors", alpha=16)
    model = hub.load(tmp_path / "base")
    adapter = load_adapter(tmp_path / "a.safetensors", model)
    tensors, made = load_file(MNLI), flatten(merge(adapter.params))
    bare, taken = flatten(model.params), set()
    for path, w in made.items():
        name = model.family.tensor(path)
        module, _, leaf = name.rpartition(".")
        if name in tensors:
            assert np.array_equal(w.T if leaf == "weight" else w, tensors[name])
            taken |= {name}
        elif leaf == "weight" and f"{module}.lora_A" in tensors:
            a, b = (tensors[f"{module}.lora_{x}"].astype(np.float64) for x in "AB")
            np.testing.assert_allclose(w.T, bare[path].T + 16 / 8 * b @ a, atol=1e-6, rtol=0)
            taken |= {f"{module}.lora_A", f"{module}.lora_B"}
        else:
            assert np.array_equal(w, bare[path])
    assert taken == set(tensors)
    assert len(tensors) == 52
    save_peft(tmp_path / "there", model, adapter.method, adapter.params)
    there = read_there("roberta", tmp_path / "base", tmp_path / "there")
    np.testing.assert_allclose(ours(model, adapter.params, "roberta"), theirs(there, "roberta"), atol=2e-4, rtol=0)


def test_biases_of_loralib(base, tmp_path):
    _, model = base("bert")
    rng, stem = np.random.default_rng(0), "bert.encoder.layer.0.attention.self.query"
    shapes = {"lora_A": (3, 16), "lora_B": (16, 3), "bias": (16,)}
    tensors = {f"{stem}.{x}": rng.normal(size=shape).astype(np.float32) for x, shape in shapes.items()}
    params, _ = read(model, *from_loralib(tensors, 3), [])
    made = flatten(merge(params))["bert/encoder/layer_0/attention/self/query/bias"]
    assert np.array_equal(made, tensors[f"{stem}.bias"])
    with pytest.raises(ValueError, match=r"no tensor ends in .lora_A"):
        from_loralib({f"{stem}.lora_B": tensors[f"{stem}.lora_B"]}, 3)


def spoiled(folder, tmp_path, config=None, tensors=lambda t: t):
    """A copy of the folder with other fields and tensors."""
    from safetensors.numpy import load_file, save_file

    out = tmp_path / "spoiled"
    out.mkdir()
    fields = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (out / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors(load_file(folder / "adapter_model.safetensors")), out / "adapter_model.safetensors")
    return out


A0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD: dict[str, tuple[dict, Any, str]] = {
    "peft type": ({"peft_type": "OFT"}, None, "peft_type 'OFT' is not supported; supported are .*LORA"),
    "a field": (
        {"use_qalora": True, "lora_bias": True},
        None,
        "not supported for LORA: lora_bias=True, use_qalora=True",
    ),
    "a start": (
        {"init_lora_weights": "pissa_niter_4"},
        None,
        "init_lora_weights='pissa_niter_4' starts from changed base",
    ),
    "missing": ({}, lambda t: {k: x for k, x in t.items() if k != A0}, f"missing: {A0}"),
    "shape": (
        {},
        lambda t: t | {A0: np.zeros((3, 17), np.float32)},
        r"wrong shape: .*q_proj.lora_A.weight \(3, 17\), exp",
    ),
    "unknown": (
        {},
        lambda t: t | {"base_model.model.x.lora_A.weight": t[A0]},
        "taken by nothing: base_model.model.x.lora_A",
    ),
    "more targets": ({"target_modules": ["q_proj", "k_proj"]}, None, "missing: .*k_proj.lora_A.weight"),
    "no target": (
        {"target_modules": ["query"]},
        None,
        r"target_modules \['query'\] matches none of the model's modules",
    ),
    "no targets": ({"target_modules": None}, None, "has no target_modules"),
    "rank": ({"r": 4}, None, r"lora_A.weight \(3, 16\), expected \(4, 16\)"),
    "no rank": ({"r": None}, None, r"lacks \['r'\], which LORA needs"),
    "zero rank": ({"r": 0}, None, "r must be a whole number of at least 1; got 0"),
    "a rank in words": ({"r": "3"}, None, "r must be a whole number of at least 1; got '3'"),
    "no pattern": ({"target_modules": "("}, None, r"target_modules must be a list of names, or a pattern; got '\('"),
    "no exclusion": ({"exclude_modules": "("}, None, "exclude_modules must be a list of names, or a pattern"),
    "no patterns": ({"rank_pattern": [1]}, None, r"rank_pattern must be names or patterns with values; got \[1\]"),
    "a layer in words": ({"layers_to_transform": "1"}, None, "layers_to_transform must be whole numbers; got '1'"),
    "one name": ({"modules_to_save": "lm_head"}, None, "modules_to_save must be a list of names"),
    "biases": ({"bias": "some"}, None, "bias must be 'none', 'all', 'lora_only' or 'vera_only'; got 'some'"),
    "a token": ({"trainable_token_indices": [99]}, None, r"there are no tokens \[99\]; model.embed_tokens has 37 rows"),
    "a module": ({"modules_to_save": ["nowhere"]}, None, r"modules_to_save names \['nowhere'\]"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_folders(what, base, tmp_path):
    config, tensors, message = BAD[what]
    base_folder, model = base("llama")
    made_there("llama", base_folder, L(target_modules=["q_proj"])(), tmp_path / "a")
    folder = spoiled(tmp_path / "a", tmp_path, config, tensors or (lambda t: t))
    with pytest.raises(ValueError, match=message):
        load_peft(folder, model)


def test_bad_files(base, tmp_path):
    _, model = base("llama")
    with pytest.raises(FileNotFoundError, match=r"is no folder; write the folder that holds adapter_config.json"):
        load_peft(tmp_path / "nowhere", model)
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json"):
        load_peft(tmp_path, model)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"write one of its folders \['other'\]"):
        load_peft(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        load_peft(tmp_path, model)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model.safetensors"):
        load_peft(tmp_path, model)
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a pickle can run any code"):
        load_peft(tmp_path, model)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="truncated or no safetensors"):
        load_peft(tmp_path, model)


UNHELD = {
    "adapter": ("llama", adapter(2), "no place for adapter"),
    "bitfit": ("llama", bitfit(), "no place for bitfit"),
    "fishmask": ("llama", fishmask(0.1, score="random"), "no place for fishmask"),
    "two": ("llama", chain(lora(2), prefix(2)), r"no place for lora\+prefix"),
    "two kinds": ("llama", chain(lora(2, targets=["query"]), dora(2, targets=["key"])), "one kind of adapter; .*DoRA"),
    "nested": ("llama", chain(lora(2), lora(3)), "no place for the LoRA at .*q_proj/kernel; convert it to LoRA"),
    "parts": ("gpt2", lora(2), "adapted in parts .*convert the adapter to LoRA"),
    "both": ("llama-tied", lora(2, targets=["embedding"]), "tied to the head and adapted as both"),
    "some biases": ("llama", chain(lora(2), bitfit(["key"])), "no place for .*k_proj/bias"),
    "fast pissa": ("llama", pissa(2, niter=2), "draws the start of a fast PiSSA"),
    "olora of conv1d": ("gpt2", olora(2, targets=["mlp_in"]), "does not turn GPT-2's Conv1D"),
    "take tokens": ("llama-tied", trainable_tokens([1], tied_embedding="take"), "this one is 'take' only"),
    "tied whole": ("llama-tied", chain(lora(2), full(["embedding"])), "tied to the head and trains whole"),
    "prompt of an encoder": ("bert", chain(prompt(2), head()), "means another thing in PEFT"),
    "prefix of both": ("t5", prefix(2), "is not the same in PEFT"),
}


@pytest.mark.parametrize("what", UNHELD)
def test_what_the_format_cannot_hold(what, base, tmp_path):
    name, method, message = UNHELD[what]
    _, model = base(name)
    with pytest.raises(ValueError, match=message):
        save_peft(tmp_path / "a", model, method, trained(model, method))
    assert not (tmp_path / "a").exists()


def test_another_base(base, tmp_path):
    base_folder, _ = base("llama")
    made_there("llama", base_folder, L(target_modules=["q_proj"])(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"matches none of the model's modules; the nearest are"):
        load_peft(tmp_path / "a", base("bert")[1])
    folder, _ = base("llama-tied")
    made_there("llama-tied", folder, L(target_modules=["embed_tokens"])(), tmp_path / "b")
    with pytest.raises(ValueError, match="is not the table of this base"):
        load_peft(tmp_path / "b", base("llama")[1])


def test_vera_without_projections_needs_torch(base, tmp_path, monkeypatch):
    base_folder, model = base("llama")
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=False)
    made_there("llama", base_folder, config, tmp_path / "a")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(ValueError, match=r"without its projections .*only torch can draw again"):
        load_peft(tmp_path / "a", model)


# The README's table

SMALL = {  # arguments for tiny models
    **{name: (3,) for name in ("lora", "lora_plus", "lora_fa", "pissa", "olora", "dora", "dylora", "vera")},
    **{name: (2,) for name in ("prefix", "prompt", "adapter", "pfeiffer", "parallel_adapter")},
    **{"adalora": (2, 4), "mam": (2, 2), "p_tuning": (2,), "trainable_tokens": ([3, 5],)},
}


def interop_table(base, folder) -> str:
    """What each method can be made of and made into, tried on a Llama, of a head on a BERT."""
    lines = ["| method | PEFT's | import | export | merge | convert to LoRA |", "|---|---|---|---|---|---|"]
    for name, make in METHODS.items():
        if name == "neftune":
            continue
        if name in ("fishmask", "child_tuning"):
            method = make(score="random") if name == "fishmask" else make("F")
        else:
            method = make(*SMALL.get(name, ()))
        _, model = base("bert" if name == "head" else "llama")
        params = method.resolve(trained(model, method), None)

        def tried(f):
            try:
                return f()
            except ValueError:
                return "-"

        def both_ways(method=method, params=params, model=model, name=name):
            save_peft(folder / name, model, method, params)
            load_peft(folder / name, model)
            return json_of(folder / name)["peft_type"]

        def convert(params=params, model=model):
            made = to_lora(model, params, energy=1.0)
            whole = {n for n, _ in made.method.spec} == {"full"}
            return "stays whole" if whole else "exact" if _is_product(model, params) else "by SVD"

        kind = tried(both_ways)
        yes = "yes" if kind != "-" else "-"
        merges = tried(lambda params=params: merge(params) and "yes")
        lines.append(f"| `{name}` | {kind} | {yes} | {yes} | {merges} | {tried(convert)} |")
    return "\n".join(lines)


def _is_product(model, params):
    try:
        to_lora(model, params)
    except ValueError:
        return False
    return True


def test_the_readmes_table(base, tmp_path):
    text = (Path(__file__).parents[1] / "README.md").read_text()
    want = interop_table(base, tmp_path)
    assert f"<!-- interop -->\n{want}\n<!-- /interop -->" in text, f"the table is now:\n{want}"
