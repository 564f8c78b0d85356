"""The loader and writer of Hugging Face folders: what they refuse, and that nothing changes on the way."""

import json
import os
import shutil
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from conftest import CAPP, MINILM, STORIES, needs_shared
from safetensors.numpy import load_file, save_file
from tiny import config as tiny_config

from peftjax import hub
from peftjax.layout import stack_layers
from peftjax.methods import bitfit, chain, lora, prefix
from peftjax.models.base import read_config
from peftjax.tree import cast, flatten, map_with_path, update

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BERT: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
LLAMA: dict[str, Any] = {**BERT, "num_key_value_heads": 1}
GPT2: dict[str, Any] = {
    "vocab_size": 30,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(family="llama", task="causal-lm", **extra):
    """A model from a config with random values in every leaf, biases and norms too."""
    if family == "bert":
        config = transformers.BertConfig(**{**BERT, **extra})
    elif family == "gpt2":
        config = transformers.GPT2Config(**{**GPT2, **extra})
    else:
        config = transformers.LlamaConfig(**{**LLAMA, **extra})
    model = hub.from_config(config, task)
    rng = np.random.default_rng(0)

    def noise(path, x):
        return x + jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype)

    return model._replace(params=map_with_path(noise, model.params))


def saved(folder, *args, **kwargs):
    model = tiny(*args, **kwargs)
    return hub.save(model, model.params, folder)


def edit(folder, drop=(), **values):
    """Rewrites config.json: keys set, keys dropped."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in drop}))


def edit_tensors(folder, drop=(), rename=lambda name: name, **new):
    """Rewrites the tensors: some dropped, all renamed, some set; '__' in a keyword stands for a dot."""
    tensors = {rename(k): v for k, v in load_file(folder / WEIGHTS).items() if k not in drop}
    tensors.update({k.replace("__", "."): v for k, v in new.items()})
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def assert_equal_trees(a, b):
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype, path
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def outputs(model, params=None, length=7, **batch) -> Any:
    ids = np.random.default_rng(1).integers(0, 30, (2, length))
    batch = {"input_ids": jnp.asarray(ids), **batch}
    return model.forward(model.params if params is None else params, batch)


def torch_logits(folder, cls, length=7):
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(1).integers(0, 30, (2, length))
    model = getattr(transformers, cls).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.tensor(ids))


# Folders


def test_wrong_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no folder; write the folder that holds config\.json"):
        hub.load(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", "./absent", "~/absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            hub.load(name)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hub.load(tmp_path)


def test_unknown_hub_name():
    with pytest.raises(FileNotFoundError, match="'peftjax-tests/no-such-model' is no folder here, and the hub did not"):
        hub.load("peftjax-tests/no-such-model")


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        hub.load_tokenizer(saved(tmp_path))


# Configs


def test_config_that_is_no_json(tmp_path):
    (saved(tmp_path) / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list; expected an object"):
        hub.load(tmp_path)


@pytest.mark.parametrize("model_type", ["gptj", None])
def test_unknown_model_type(tmp_path, model_type):
    edit(saved(tmp_path), model_type=model_type)
    with pytest.raises(
        ValueError, match=rf"of model type '?{model_type}'?; peftjax has the families .*'bert', .*'llama'"
    ):
        hub.load(tmp_path)


def test_unknown_architecture(tmp_path):
    edit(saved(tmp_path), architectures=["LlamaForTokenClassification"])
    with pytest.raises(ValueError, match=r"'LlamaForTokenClassification' is unknown; .*'LlamaForCausalLM'"):
        hub.load(tmp_path)
    edit(tmp_path, drop=["architectures"])
    with pytest.raises(ValueError, match=r"architecture None is unknown; .*say what the model is for with task="):
        hub.load(tmp_path)
    assert hub.load(tmp_path, "causal-lm").module.head == "causal-lm"


def test_architectures_tell_the_task():
    for name, task in [("GPT2LMHeadModel", "causal-lm"), ("LlamaModel", "encoder"), ("GPT2Model", "encoder")]:
        assert hub.task_of(name) == task
    for family in hub.FAMILIES.values():
        for architecture in family.heads:
            config = tiny_config({"deberta-v2": "deberta", "mt5": "t5"}.get(family.name, family.name))
            config.model_type = family.name
            assert hub.from_config(config, hub.task_of(architecture), seed=None).hf_config.architectures == [
                architecture
            ]


def test_unknown_task(tmp_path):
    with pytest.raises(ValueError, match=r"no task 'poetry' for a model; the tasks are .*'causal-lm'"):
        hub.load(saved(tmp_path), "poetry")
    with pytest.raises(ValueError, match="bert models have no head for 'causal-lm'"):
        hub.from_config(transformers.BertConfig(**BERT), "causal-lm")
    with pytest.raises(ValueError, match="model type 'gptj'; peftjax has the families"):
        hub.from_config(transformers.GPTJConfig(), "causal-lm")


BAD_CONFIGS: list[Any] = [
    ("bert", "encoder", {"is_decoder": True}, r"is_decoder=True \(supported: False\)"),
    ("bert", "encoder", {"position_embedding_type": "relative_key"}, r"'relative_key' \(supported: 'absolute'\)"),
    ("bert", "encoder", {"hidden_act": "mish"}, "activation 'mish' is not supported; supported are .*'gelu'"),
    ("bert", "encoder", {"pruned_heads": {"0": [1]}}, r"pruned_heads=\{'0': \[1\]\}"),
    ("bert", "encoder", {"hidden_size": 15}, "hidden_size 15 does not divide into 2 attention heads"),
    ("bert", "encoder", {"num_attention_heads": 0}, "bert config has num_attention_heads=0; supported is 1 or more"),
    ("gpt2", "causal-lm", {"add_cross_attention": True}, r"add_cross_attention=True \(supported: False\)"),
    ("gpt2", "causal-lm", {"n_head": 3}, "n_embd 16 does not divide into 3 attention heads"),
    ("gpt2", "causal-lm", {"activation_function": "mish"}, "activation 'mish' is not supported"),
    ("llama", "causal-lm", {"n_ctx": 64}, r"n_ctx=64 \(supported: None\)"),
    ("llama", "causal-lm", {"summary_type": "mean"}, r"summary_type='mean'"),
    ("llama", "causal-lm", {"sliding_window": 128}, r"sliding_window=128 \(supported: None\)"),
    ("llama", "causal-lm", {"sliding_window": 0}, r"sliding_window=0 \(supported: None\)"),
    ("llama", "causal-lm", {"pretraining_tp": 2}, r"pretraining_tp=2 \(supported: 1\)"),
    ("llama", "causal-lm", {"num_key_value_heads": 3}, "2 attention heads do not divide into 3 key/value heads"),
    ("llama", "causal-lm", {"hidden_act": "mish"}, "activation 'mish' is not supported"),
    ("llama", "causal-lm", {"hidden_size": "wide"}, r"transformers refuses .*config\.json.*hidden_size"),
    ("llama", "causal-lm", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method='gptq'"),
    ("llama", "causal-lm", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported"),
    ("llama", "causal-lm", {"rope_parameters": {"rope_type": "linear"}}, "transformers refuses .*factor"),
    (
        "llama",
        "causal-lm",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "fcator": 3.0}},
        r"rope parameters \['fcator'\] are not known; known are .*'factor'",
    ),
    (
        "llama",
        "causal-lm",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor other than 1",
    ),
]


@pytest.mark.parametrize(("family", "task", "values", "message"), BAD_CONFIGS)
def test_config_values_that_are_not_honoured(tmp_path, family, task, values, message):
    edit(saved(tmp_path, family, task), **values)
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)


def test_all_bad_config_values_in_one_message(tmp_path):
    edit(saved(tmp_path), sliding_window=128, pretraining_tp=2, logit_scale=0.5)
    with pytest.raises(ValueError, match=r"logit_scale=0\.5.*pretraining_tp=2.*sliding_window=128"):
        hub.load(tmp_path)


def test_harmless_config_values(tmp_path):
    values = {
        "use_cache": False,
        "max_sequence_length": 12,
        "torchscript": False,
        "pruned_heads": {},
        "xla_device": None,
    }
    edit(saved(tmp_path), **values, temperature=0.9, max_length=20)
    hub.load(tmp_path)


@pytest.mark.parametrize("family", hub.FAMILIES)
def test_config_values_that_transformers_4_gave_every_family(family):
    kind = transformers.CONFIG_MAPPING[family]
    written = {"is_decoder": False, "add_cross_attention": False, "_attn_implementation_autoset": True}

    def read(**values):
        return read_config(hub.FAMILIES[family], kind(**values).to_dict(), kind().to_dict())

    assert read(**written) == read()
    with pytest.raises(ValueError, match=r"add_cross_attention=True \(supported: False\)"):
        read(add_cross_attention=True)


def test_harmless_config_values_of_gpt2(tmp_path):
    values = {"n_ctx": 64, "summary_type": "mean", "summary_first_dropout": 0.3, "reorder_and_upcast_attn": True}
    edit(saved(tmp_path, "gpt2"), **values)
    assert_equal_trees(hub.load(tmp_path).params, tiny("gpt2").params)


def test_remote_code(tmp_path):
    edit(saved(tmp_path), auto_map={"AutoModel": "modeling_evil.Evil"})
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match=r"asks for remote code \(auto_map\); peftjax runs none"):
        hub.load(tmp_path)


# Tensors


def test_missing_extra_and_wrong_shape_in_one_message(tmp_path):
    edit_tensors(
        saved(tmp_path),
        drop=["model.norm.weight", "lm_head.weight"],
        model__surprise=np.zeros(2, np.float32),
        lm_head__bias=np.zeros(30, np.float32),
        model__layers__0__mlp__up_proj__weight=np.zeros((16, 24), np.float32),
    )
    with pytest.raises(ValueError, match="do not fit LlamaForCausalLM") as e:
        hub.load(tmp_path)
    assert "missing: lm_head.weight, model.norm.weight;" in str(e.value)
    assert "not known to the model: lm_head.bias, model.surprise;" in str(e.value)
    assert "model.layers.0.mlp.up_proj.weight (16, 24), expected (24, 16)" in str(e.value)
    assert "fresh_head" not in str(e.value)


def test_wrong_shape_in_a_bare_file_is_said_once(tmp_path):
    saved(tmp_path, "bert", "encoder")
    assert "embeddings.word_embeddings.weight" in load_file(tmp_path / WEIGHTS)
    edit_tensors(tmp_path, pooler__dense__weight=np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"of a wrong shape: pooler\.dense\.weight \(3, 3\)") as e:
        hub.load(tmp_path)
    assert "missing" not in str(e.value)


def test_two_tensors_for_one_parameter(tmp_path):
    saved(tmp_path, "bert", "encoder")
    edit_tensors(tmp_path, embeddings__LayerNorm__gamma=np.ones(16, np.float32))
    with pytest.raises(ValueError, match=r"a second tensor for bert/embeddings/LayerNorm/scale"):
        hub.load(tmp_path)


def test_half_a_head(tmp_path):
    saved(tmp_path, "bert", "classification")
    edit_tensors(tmp_path, drop=["classifier.bias"])
    with pytest.raises(ValueError, match=r"missing: classifier\.bias"):
        hub.load(tmp_path)
    assert hub.load(tmp_path, fresh_head=True).fresh == ("classifier/bias", "classifier/kernel")


def test_pickle_only(tmp_path):
    (saved(tmp_path) / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\['pytorch_model.bin'\]: a pickle can run any code"):
        hub.load(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        hub.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -8])
def test_truncated_file(tmp_path, keep):
    file = saved(tmp_path) / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated or no safetensors file"):
        hub.load(tmp_path)


def test_corrupted_header(tmp_path):
    file = saved(tmp_path) / WEIGHTS
    file.write_bytes(struct.pack("<Q", 10) + b"not a json" + file.read_bytes())
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        hub.load(tmp_path)


# Shards


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "SHARD_BYTES", 5000)
    return saved(tmp_path)


def test_shards(sharded):
    shards = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_equal_trees(hub.load(sharded).params, tiny().params)
    got = torch_logits(sharded, "LlamaForCausalLM").logits
    np.testing.assert_allclose(outputs(tiny()).logits, got, atol=1e-4)


def test_saving_again_leaves_no_stale_shards(sharded, monkeypatch):
    other = tiny(num_hidden_layers=1)
    monkeypatch.setattr(hub, "SHARD_BYTES", 10**9)
    hub.save(other, other.params, sharded)
    assert {p.name for p in sharded.iterdir()} == {"config.json", WEIGHTS}
    assert_equal_trees(hub.load(sharded).params, other.params)
    monkeypatch.setattr(hub, "SHARD_BYTES", 5000)
    hub.save(tiny(), tiny().params, sharded)
    assert not (sharded / WEIGHTS).exists()
    assert_equal_trees(hub.load(sharded).params, tiny().params)


def test_missing_shard(sharded):
    first = sorted(sharded.glob("*.safetensors"))[0]
    first.unlink()
    with pytest.raises(FileNotFoundError, match=f"lists shards that are not there: .*'{first.name}'"):
        hub.load(sharded)


@pytest.mark.parametrize("name", ["../{}", "sub/{}", "{folder}/{}", "sub/link.safetensors"])
def test_shard_outside_the_folder(sharded, name):
    first = sorted(sharded.glob("*.safetensors"))[0]
    outside = sharded.parent / first.name
    shutil.copy(first, outside)
    (sharded / "sub").mkdir()
    shutil.copy(first, sharded / "sub")
    (sharded / "sub/link.safetensors").symlink_to(outside)
    index = json.loads((sharded / INDEX).read_text())
    new = name.format(first.name, folder=sharded.parent)
    index["weight_map"] = {k: new if v == first.name else v for k, v in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lists files outside the folder"):
        hub.load(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_bad_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(ValueError, match="is no index of shards"):
        hub.load(sharded)


def test_a_tensor_that_no_shard_holds(sharded):
    last = sorted(sharded.glob("*.safetensors"))[-1]
    name = next(iter(load_file(last)))
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != last.name}
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"missing: .*{name}"):
        hub.load(sharded)


# Tied embeddings


def test_tied_stays_tied(tmp_path):
    folder = saved(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    assert "lm_head" not in hub.load(folder).params
    table = load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_tensors(folder, lm_head__weight=table)
    assert_equal_trees(hub.load(folder).params, tiny(tie_word_embeddings=True).params)
    edit_tensors(folder, lm_head__weight=table + 1)
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight, but .* two different"):
        hub.load(folder)
    edit_tensors(folder, drop=["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match=r"missing: model\.embed_tokens\.weight"):
        hub.load(folder)


# Heads


def test_old_layer_norm_names(tmp_path):
    folder = saved(tmp_path, "bert", "classification")

    def old(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    edit_tensors(folder, rename=old, bert__embeddings__position_ids=np.arange(12)[None])
    assert sum("gamma" in name for name in load_file(folder / WEIGHTS)) == 5
    assert_equal_trees(hub.load(folder).params, tiny("bert", "classification").params)


def test_old_gpt2_files(tmp_path):
    """Without the prefix and with buffers, as the first GPT-2 files are; the tied head again or not."""
    folder = saved(tmp_path, "gpt2")
    tensors = load_file(folder / WEIGHTS)
    assert "transformer.h.0.ln_1.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)  # a Conv1D is not transposed
    buffers = {f"h.{i}.attn.{n}": np.ones((1, 1)) for i in range(2) for n in ("bias", "masked_bias")}
    edit_tensors(folder, rename=lambda name: name.removeprefix("transformer."), **buffers)
    assert_equal_trees(hub.load(folder).params, tiny("gpt2").params)
    edit_tensors(folder, lm_head__weight=tensors["transformer.wte.weight"])
    assert_equal_trees(hub.load(folder).params, tiny("gpt2").params)
    edit_tensors(folder, lm_head__weight=tensors["transformer.wte.weight"] + 1)
    with pytest.raises(ValueError, match=r"ties lm_head\.weight to transformer\.wte\.weight, but .* two different"):
        hub.load(folder)
    edit_tensors(folder, drop=["lm_head.weight"], h__0__attn__c_attn__bais=np.ones(48))
    with pytest.raises(ValueError, match=r"not known to the model: h\.0\.attn\.c_attn\.bais"):
        hub.load(folder)


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", ("classifier/bias", "classifier/kernel")), ("llama", ("score/kernel",)), ("gpt2", ("score/kernel",))],
)
def test_base_file_into_a_classifier(tmp_path, family, head):
    folder = saved(tmp_path, family, "encoder")
    model, again = (hub.load(folder, "classification", labels=3) for _ in range(2))
    assert model.fresh == head
    assert flatten(model.params)[head[-1]].shape == (16, 3)
    assert_equal_trees(model.params, again.params)
    other = hub.load(folder, "classification", labels=3, seed=1)
    assert not jnp.array_equal(flatten(model.params)[head[-1]], flatten(other.params)[head[-1]])
    base = flatten(tiny(family, "encoder").params)
    assert_equal_trees({p: flatten(model.params)[p] for p in base}, base)
    assert outputs(model).logits.shape == (2, 3)


def test_files_of_other_heads(tmp_path):
    """A language model as a classifier and as a base; a classifier as a base: the unused head is left."""
    folder = saved(tmp_path / "lm")
    assert hub.load(folder, "classification", labels=2).fresh == ("score/kernel",)
    assert hub.load(folder, "encoder").fresh == ()
    folder = saved(tmp_path / "bert", "bert", "classification")
    edit_tensors(folder, cls__predictions__bias=np.zeros(30, np.float32))
    assert_equal_trees(hub.load(folder, "encoder").params, {"bert": tiny("bert", "classification").params["bert"]})
    folder = saved(tmp_path / "base", "llama", "encoder")
    with pytest.raises(ValueError, match=r"missing: lm_head\.weight"):
        hub.load(folder, "causal-lm")


def test_fresh_head(tmp_path):
    folder = saved(tmp_path, "bert", "classification")
    with pytest.raises(ValueError, match=r"wrong shape: classifier\.bias .* write fresh_head=True"):
        hub.load(folder, labels=["a", "b", "c"])
    model = hub.load(folder, labels=["a", "b", "c"], fresh_head=True)
    assert model.hf_config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.num_labels == 3
    same_size = hub.load(folder, fresh_head=True)
    assert same_size.fresh == ("classifier/bias", "classifier/kernel")
    assert not jnp.array_equal(
        same_size.params["classifier"]["kernel"], hub.load(folder).params["classifier"]["kernel"]
    )
    assert hub.load(folder).fresh == ()


def test_from_config_leaves_the_config_alone():
    config = transformers.BertConfig(**BERT)
    first = hub.from_config(config, "classification", labels=3)
    second = hub.from_config(config, "encoder")
    assert (config.architectures, config.num_labels) == (None, 2)
    assert first.hf_config.architectures == ["BertForSequenceClassification"]
    assert second.hf_config.architectures == ["BertModel"]


# Round trips


@pytest.mark.parametrize(
    ("family", "task", "extra"),
    [
        ("bert", "encoder", {}),
        ("bert", "classification", {"num_labels": 1}),
        ("llama", "causal-lm", {"attention_bias": True, "mlp_bias": True}),
        ("llama", "causal-lm", {"tie_word_embeddings": True}),
        ("llama", "classification", {"num_labels": 3}),
        ("gpt2", "causal-lm", {"n_inner": 20, "scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", "causal-lm", {"tie_word_embeddings": False}),
        ("gpt2", "classification", {"num_labels": 3}),
        ("gpt2", "encoder", {}),
        ("llama", "encoder", {"rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 2.0}}),
    ],
)
def test_save_load_save_is_byte_equal(tmp_path, family, task, extra):
    model = tiny(family, task, **extra)
    first = hub.save(model, model.params, tmp_path / "first")
    loaded = hub.load(first)
    assert loaded.config == model.config
    assert_equal_trees(loaded.params, model.params)
    second = hub.save(loaded, stack_layers(loaded.params), tmp_path / "second")
    names = {p.name for p in first.iterdir()}
    assert names == {p.name for p in second.iterdir()} == {"config.json", WEIGHTS}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@needs_shared
@pytest.mark.parametrize("folder", [MINILM, STORIES, CAPP], ids=["minilm", "stories", "capp"])
def test_real_tensors_survive(tmp_path, folder):
    model = hub.load(folder, param_dtype=jnp.float16 if folder == MINILM else jnp.float32)
    hub.save(model, model.params, tmp_path)
    want, got = load_file(folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    want = {k: v for k, v in want.items() if k not in ("lm_head.weight", "embeddings.position_ids")}
    assert_equal_trees({"x": got}, {"x": want})


MERGED: list[Any] = [
    ("bert", "encoder", "BertModel", {}),
    ("bert", "classification", "BertForSequenceClassification", {"num_labels": 3}),
    ("llama", "causal-lm", "LlamaForCausalLM", {"attention_bias": True}),
    ("llama", "causal-lm", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", "classification", "LlamaForSequenceClassification", {"pad_token_id": 29, "mlp_bias": True}),
    ("gpt2", "causal-lm", "GPT2LMHeadModel", {}),
    ("gpt2", "causal-lm", "GPT2LMHeadModel", {"tie_word_embeddings": False, "scale_attn_weights": False}),
    ("gpt2", "classification", "GPT2ForSequenceClassification", {"pad_token_id": 29}),
]


@pytest.mark.parametrize(("family", "task", "cls", "extra"), MERGED)
def test_merged_models_load_in_transformers(tmp_path, family, task, cls, extra, key):
    model = tiny(family, task, **extra)
    method = chain(lora(2, targets=["query"]), lora(rank=2, alpha=5, targets=["linear", "embedding"]), bitfit())
    mask = method.trainable(params := method.init(key, model.params, model.sites))
    params = jax.tree.map(lambda x, m: x + 0.1 * jax.random.normal(key, x.shape) if m else x, params, mask)
    want = outputs(model, params)
    assert jnp.abs(want.hidden - outputs(model).hidden).max() > 0.01
    hub.save(model, stack_layers(params), tmp_path)
    got = torch_logits(tmp_path, cls)
    if task == "encoder":
        np.testing.assert_allclose(want.hidden, got.last_hidden_state, atol=1e-4)
        np.testing.assert_allclose(want.pooled, got.pooler_output, atol=1e-4)
    else:
        np.testing.assert_allclose(want.logits, got.logits, atol=1e-4)
    np.testing.assert_allclose(outputs(hub.load(tmp_path)).hidden, want.hidden, atol=1e-4)


@pytest.mark.parametrize(("given", "pad", "named"), [(None, 7, 7), (5, 7, 5), (None, None, None), (None, 30, None)])
def test_a_classifiers_config_names_the_padding(tmp_path, given, pad, named):
    """By it transformers finds a text's last token; a token that the embedding does not have is none."""
    tokenizer = SimpleNamespace(pad_token_id=pad, save_pretrained=lambda folder: None)
    model = tiny(task="classification", pad_token_id=given)
    hub.save(model, model.params, tmp_path, tokenizer)
    assert json.loads((tmp_path / "config.json").read_text()).get("pad_token_id") == named
    if named is not None:
        ids = np.array([[3, 4, 6], [3, 4, named]])
        want = model.forward(model.params, {"input_ids": ids, "attention_mask": (ids != named).astype(np.int32)})
        torch = pytest.importorskip("torch")
        reference = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            got = reference(torch.tensor(ids), attention_mask=torch.tensor(ids != named)).logits
        np.testing.assert_allclose(np.asarray(want.logits), got, atol=1e-4)


def test_created_biases_do_not_widen_the_file(tmp_path, key):
    """The biases that no method made, zero, are of the other tensors' dtype."""
    model = tiny()
    model = model._replace(params=cast(model.params, jnp.bfloat16))
    params = bitfit(["query"], create=True).init(key, model.params, model.sites)
    hub.save(model, stack_layers(params), tmp_path)
    assert {str(x.dtype) for x in load_file(tmp_path / WEIGHTS).values()} == {"bfloat16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert not model.hf_config.attention_bias


def test_the_saved_config_names_the_dtype_of_the_file(tmp_path):
    """transformers loads in the dtype that config.json names, whatever the file holds."""
    folder = saved(tmp_path / "old")
    edit(folder, torch_dtype="float16", drop=["dtype"])
    model = hub.load(folder)
    hub.save(model, model.params, tmp_path / "new")
    assert json.loads((tmp_path / "new/config.json").read_text())["dtype"] == "float32"
    got = torch_logits(tmp_path / "new", "LlamaForCausalLM").logits
    np.testing.assert_allclose(outputs(model).logits, got, atol=1e-4)
    hub.save(model, model.params, tmp_path / "half", param_dtype=jnp.bfloat16)
    assert json.loads((tmp_path / "half/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("method", [bitfit(create=True), bitfit(["query"], create=True)], ids=["all", "query"])
def test_biases_that_a_method_created_are_exported(tmp_path, key, method):
    """The config then names them; those of other layers are zero."""
    model = tiny()
    params = map_with_path(
        lambda p, x: x + 0.3 if p.endswith("/bias/value") else x, method.init(key, model.params, model.sites)
    )
    hub.save(model, params, tmp_path / "out")
    want = outputs(model, params).logits
    assert float(jnp.abs(want - outputs(model).logits).max()) > 1e-2
    np.testing.assert_allclose(want, torch_logits(tmp_path / "out", "LlamaForCausalLM").logits, atol=1e-4)


def test_save_refuses_what_the_architecture_cannot_hold(tmp_path, key):
    model = tiny()
    params = update(model.params, {"model/norm/bias": jnp.zeros(16)})
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no place for \['model/norm/bias'\] \(1 parameters\)"):
        hub.save(model, params, tmp_path / "out")
    params = prefix(length=2).init(key, model.params, model.sites)
    with pytest.raises(ValueError, match="cannot merge model/layers_0/self_attn/prefix"):
        hub.save(model, params, tmp_path / "out")
    params = update(model.params, {"model/norm/scale": jnp.ones(3)})
    del params["lm_head"]
    with pytest.raises(ValueError, match=r"lm_head/kernel missing, .*; model/norm/scale \(3,\), expected \(16,\)"):
        hub.save(model, params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@needs_shared
def test_the_tokenizer_is_saved_too(tmp_path):
    model = hub.load(STORIES)
    hub.save(model, model.params, tmp_path, tokenizer=hub.load_tokenizer(STORIES))
    text = "Once upon a time"
    assert hub.load_tokenizer(tmp_path)(text).input_ids == hub.load_tokenizer(STORIES)(text).input_ids


# Stored dtypes


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_stored_and_wanted_dtypes(tmp_path, stored, wanted):
    model = tiny("bert", "encoder")
    hub.save(model, model.params, tmp_path, param_dtype=stored)
    assert {str(x.dtype) for x in load_file(tmp_path / WEIGHTS).values()} == {stored}
    loaded = hub.load(tmp_path, "classification", param_dtype=jnp.dtype(wanted))
    for path, x in flatten(loaded.params).items():
        assert x.dtype == wanted, path
        if path not in loaded.fresh:
            np.testing.assert_array_equal(x, flatten(model.params)[path].astype(stored).astype(wanted), err_msg=path)


# The hub's cache


def test_hub_name_from_the_cache(tmp_path):
    """A model in huggingface_hub's own cache loads by its name, without a network and through symlinks."""
    sha = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache/models--someone--tiny"
    snapshot = repo / "snapshots" / sha
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text(sha)
    (repo / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(saved(tmp_path / "made").iterdir()):
        blob = repo / "blobs" / str(i)
        shutil.move(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    code = (
        "from peftjax import hub\n"
        "for revision in (None, 'main'):\n"
        "    print(hub.fingerprint(hub.load('someone/tiny', revision=revision)))\n"
        "try:\n"
        "    hub.load('someone/tiny', revision='other')\n"
        "except FileNotFoundError as e:\n"
        "    print('refused:', e)\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    one, two, refused = done.stdout.splitlines()[:3]
    assert one == two == hub.fingerprint(tiny())
    assert refused.startswith("refused: 'someone/tiny' is no folder here, and the hub did not give it")


def test_sharded_symlinks_load(sharded, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    for file in sharded.glob("*.safetensors"):
        shutil.move(file, blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert_equal_trees(hub.load(sharded).params, tiny().params)


# Fingerprints


def test_fingerprint(tmp_path):
    folder = saved(tmp_path / "base", "bert", "encoder")
    base = hub.fingerprint(hub.load(folder))
    assert len(base) == 16
    int(base, 16)
    assert hub.fingerprint(hub.load(folder, param_dtype=jnp.bfloat16)) == base
    for seed in (0, 1):
        with_head = hub.load(folder, "classification", labels=2 + seed, seed=seed)
        assert hub.fingerprint(with_head) == base
    model = hub.load(folder)
    for path, x in flatten(model.params).items():
        changed = model._replace(params=update(model.params, {path: x.at[(0,) * x.ndim].add(1)}))
        assert hub.fingerprint(changed) != base, path
    assert hub.fingerprint(tiny("bert", "encoder", num_hidden_layers=1)) != base
    headed = saved(tmp_path / "headed", "bert", "classification")
    assert hub.fingerprint(hub.load(headed)) != hub.fingerprint(hub.load(headed, fresh_head=True))


def test_a_trained_head_keeps_the_order_of_its_labels(tmp_path):
    """Renaming the labels of a trained head would silently invert its answers."""
    model = tiny("bert", "classification", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    hub.save(model, model.params, tmp_path)
    assert hub.load(tmp_path, "classification", labels=["no", "yes"]).fresh == ()
    with pytest.raises(ValueError, match=r"trained for the labels \['no', 'yes'\].*\['yes', 'no'\].*fresh_head"):
        hub.load(tmp_path, "classification", labels=["yes", "no"])
    assert hub.load(tmp_path, "classification", labels=["yes", "no"], fresh_head=True).fresh


def test_the_fingerprint_knows_the_config(tmp_path):
    """The same weights under another number of heads are another model."""
    model = tiny("bert", "encoder")
    other = model._replace(config=model.config._replace(num_attention_heads=1))
    assert hub.fingerprint(model) != hub.fingerprint(other)
