"""Models that bitsandbytes quantised: a real one's logits, the layout of its files, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import config as tiny_config, roughen, same

from peftjax import bnb, hub
from peftjax.checkpoint import base_of, load_adapter, save_adapter
from peftjax.methods import lora
from peftjax.quantize import DYNAMIC, NF4, NORMAL, quantize, quantized_as
from peftjax.tree import flatten
from peftjax.weights import is_quantized

REAL = Path(__file__).parent / "bnb_nf4"
SAID = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_a_real_one():
    model = hub.load(REAL)
    assert quantized_as(model.params) == "nf4-double"
    want = np.asarray(json.loads((REAL / "logits.json").read_text()))
    got = model.forward(model.params, {"input_ids": jnp.arange(1, 11).reshape(2, 5)}).logits
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, atol=1e-4)


def as_bitsandbytes(folder, model, how, shards=1):
    """Writes a model whose linear weights are `NF4` nodes as bitsandbytes' layout has it."""
    params = quantize(model.params, model.sites, how)
    nodes = {p: n for p, n in flatten(params, is_leaf=is_quantized).items() if is_quantized(n)}
    hub.save(model, model.params, folder)
    tensors = load_file(folder / "model.safetensors")
    for path, n in nodes.items():
        name, (inputs, outputs) = model.family.tensor(path), n.matrix
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [outputs, inputs]}
        beside = {"absmax": n.absmax, "quant_map": NORMAL}
        if n.scale is not None:
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(n.offset)}
            beside |= {"nested_absmax": n.scale, "nested_quant_map": DYNAMIC}
        tensors[name] = np.asarray(n.codes)[: -(-inputs * outputs // 2), None]
        tensors |= {f"{name}.{k}": np.asarray(x) for k, x in beside.items()}
        tensors[name + bnb.STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    config = json.loads((folder / "config.json").read_text())
    double = {"bnb_4bit_use_double_quant": how == "nf4-double"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SAID | double}))
    write(folder, tensors, shards)
    return params


def write(folder, tensors, shards=1):
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = {n: f"model-{i % shards}.safetensors" for i, n in enumerate(sorted(tensors))}  # a weight's parts in several
    for file in set(names.values()):
        save_file({n: x for n, x in tensors.items() if names[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def odd(family="llama") -> hub.Model:
    """Weights whose entries fill no whole number of blocks."""
    sizes: dict[str, Any] = {} if family == "gpt2" else {"intermediate_size": 21}
    model = hub.from_config(tiny_config(family, **sizes), "causal-lm")
    return model._replace(params=roughen(model.params))


@pytest.mark.parametrize(("family", "how", "shards"), [("llama", "nf4", 1), ("llama", "nf4-double", 3)])
def test_the_codes_are_read_as_they_are(tmp_path, family, how, shards):
    model = odd(family)
    params = as_bitsandbytes(tmp_path / "q", model, how, shards)
    read = hub.load(tmp_path / "q")
    assert quantized_as(read.params) == how
    assert same(read.params, params)
    ids = {"input_ids": jnp.arange(12).reshape(2, 6)}
    assert np.abs(read.forward(read.params, ids).logits - model.forward(model.params, ids).logits).max() > 1e-3
    method = lora(2)
    adapted = method.init(jax.random.key(0), read.params, read.sites)
    save_adapter(tmp_path / "a.safetensors", read, method, adapted)
    again = load_adapter(tmp_path / "a.safetensors", hub.load(tmp_path / "q", quantize=how))
    assert same(again.params, adapted)
    assert same(base_of(again.header, str(tmp_path / "q")).params, params)
    hub.save(read, adapted, tmp_path / "merged")
    merged = hub.load(tmp_path / "merged")
    assert quantized_as(merged.params) is None
    np.testing.assert_allclose(
        merged.forward(merged.params, ids).logits, read.forward(read.params, ids).logits, atol=1e-5
    )


def test_an_odd_number_of_entries():
    """The last byte holds one code; what pads the block is 0."""
    w = jnp.arange(35.0).reshape(5, 7) - 17
    whole = quantize({"w": {"kernel": w}}, (), "nf4", ["w/kernel"])["w"]["kernel"]
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [7, 5]}
    tensors = {
        "w.weight": np.asarray(whole.codes)[:18, None] & np.array([[255]] * 17 + [[240]], np.uint8),
        "w.weight.absmax": np.asarray(whole.absmax),
        "w.weight.quant_map": NORMAL,
        "w.weight" + bnb.STATE: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    got = bnb.read("w.weight", tensors, (5, 7), jnp.float32)
    assert isinstance(got, NF4)
    assert np.array_equal(got.codes, whole.codes)
    assert np.array_equal(got.materialize(), whole.materialize())


BAD = {
    "int8": ({"load_in_4bit": False, "load_in_8bit": True}, r"load_in_4bit=False \(supported: True\)"),
    "fp4": ({"bnb_4bit_quant_type": "fp4"}, r"bnb_4bit_quant_type='fp4' \(supported: 'nf4'\)"),
    "gptq": ({"quant_method": "gptq"}, "quant_method='gptq'"),
    "storage": ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage='bfloat16'"),
}


@pytest.mark.parametrize("what", BAD)
def test_other_ways_are_refused(tmp_path, what):
    change, message = BAD[what]
    as_bitsandbytes(tmp_path, odd(), "nf4")
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | change}))
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)


Q = "model.layers.0.self_attn.q_proj.weight"


def stated(tensors, **changes):
    state = json.loads(tensors[Q + bnb.STATE].tobytes()) | changes
    return tensors | {Q + bnb.STATE: np.frombuffer(json.dumps(state).encode(), np.uint8)}


SPOILED = {
    "no absmax": (lambda t: {n: x for n, x in t.items() if n != f"{Q}.absmax"}, "absmax is not in the file"),
    "levels": (lambda t: t | {f"{Q}.quant_map": NORMAL * 0.9}, "has other levels"),
    "no levels": (lambda t: {n: x for n, x in t.items() if n != f"{Q}.quant_map"}, "has other levels"),
    "blocks": (lambda t: stated(t, blocksize=128), "'nf4' in blocks of 128; supported is 'nf4' in blocks of 64"),
    "shape": (lambda t: stated(t, shape=[8, 32]), r"of shape \(8, 32\), expected \(16, 16\)"),
    "nothing to stand beside": (lambda t: t | {"x.weight.absmax": NORMAL}, "not known to the model: x.weight.absmax"),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_files(tmp_path, what):
    change, message = SPOILED[what]
    as_bitsandbytes(tmp_path, odd(), "nf4")
    write(tmp_path, change(load_file(tmp_path / "model.safetensors")))
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path)


def test_another_way_on_top(tmp_path):
    as_bitsandbytes(tmp_path, odd(), "nf4")
    with pytest.raises(ValueError, match="is quantised already, as nf4; leave quantize='int8' out"):
        hub.load(tmp_path, quantize="int8")
