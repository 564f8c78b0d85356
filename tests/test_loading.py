"""What loading takes of the host's memory, and what it says of folders that are not right."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from conftest import EXPERIMENTS, experiment
from safetensors.numpy import load_file, save_file

from peftjax import hub
from peftjax.tree import flatten

EXPERIMENT = EXPERIMENTS / "loading.py"
needs_proc = pytest.mark.skipif(
    not (EXPERIMENT.is_file() and Path("/proc/self/clear_refs").is_file()), reason="memory is read from Linux's /proc"
)


@pytest.fixture(scope="module")
def loading():
    return experiment("loading")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model in one file, and in shards."""
    at = tmp_path_factory.mktemp("made")
    model = hub.load(tiny.folder(at / "whole", "llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "SHARD_BYTES", 5000)
        hub.save(model, model.params, at / "shards")
    return at


@needs_proc
def test_one_shard_and_the_parameters_are_in_memory(loading, tmp_path):
    """The strictest of the pairs: what is wanted is half of what is stored."""
    loading.write(tmp_path, 300_000_000, 4, "float32")
    m = loading.measure(tmp_path, "bfloat16")
    assert (m.files, m.shard) == pytest.approx((3e8, 75e6), rel=0.1)
    assert m.params == pytest.approx(m.files / 2, rel=1e-3)
    assert 0.8 < m.ratio < loading.BOUND  # below 0.8 something has not been measured


@needs_proc
@pytest.mark.slow
def test_two_gigabytes(loading):
    text = loading.table(2 * 10**9, 4)
    assert f"All peaks are below {loading.BOUND}" in text, text


@needs_proc
def test_the_synthetic_checkpoint_is_a_model(loading, tmp_path):
    """All shards are read: each tensor is there, in the file's own values."""
    loading.write(tmp_path, 0, 3, "bfloat16")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 3
    model, stored = hub.load(tmp_path), {k: v for f in files for k, v in load_file(f).items()}
    for path, x in flatten(model.params).items():
        want = stored[model.family.tensor(path)].astype(np.float32)
        np.testing.assert_array_equal(x, want.T if path.endswith("kernel") else want, err_msg=path)


def test_the_values_in_every_dtype(made):
    """Casting on the host rounds as XLA does, and a matrix keeps its rows."""
    stored = load_file(made / "whole" / hub.WEIGHTS)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        params = flatten(hub.load(made / "whole", param_dtype=dtype).params)
        x = params["model/layers_0/mlp/up_proj/kernel"]
        want = jnp.asarray(stored["model.layers.0.mlp.up_proj.weight"]).T.astype(dtype)
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, want)


# Folders that are not right; more in test_hub.py


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made / "shards", tmp_path / "model"))


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"metadata": {}}', "no index of shards: expected an object with 'weight_map'"),
        (b"\xff\xfe{}", "no index of shards: expected an object with 'weight_map'"),
        (b'{"weight_map": {}}', "no index of shards: its 'weight_map' names no file"),
        (b'{"weight_map": {"a": 3, "b": 4}}', r"no index of shards: its 'weight_map' names \[3, 4\]"),
        (b'{"weight_map": {"a": null}}', r"its 'weight_map' names \[None\]"),
        (b'{"weight_map": {"a": 3, "b": "x"}}', "no index of shards"),
    ],
)
def test_bad_index(folder, text, message):
    (folder / hub.INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=message):
        hub.load(folder)


def test_all_missing_shards_are_named(folder):
    first, second, *_ = shards(folder)
    first.unlink()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=rf"not there: \['{first.name}', '{second.name}'\]"):
        hub.load(folder)


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd"])
def test_a_shard_that_is_no_file_of_the_folder(folder, name):
    (folder / hub.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"outside the folder|not there"):
        hub.load(folder)


@pytest.mark.parametrize("keep", [4, 100, -3])
def test_a_truncated_shard_is_named(folder, keep):
    last = shards(folder)[-1]
    last.write_bytes(last.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{last.name} is truncated or no safetensors file"):
        hub.load(folder)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize("protocol", [2, 5, "zip"])
def test_a_pickle_under_another_name_is_not_read(folder, protocol):
    shard = shards(folder)[1]
    if protocol == "zip":
        torch = pytest.importorskip("torch")
        torch.save({"x": Evil()}, shard)
    else:
        shard.write_bytes(pickle.dumps(Evil(), protocol))
    with pytest.raises(ValueError, match=f"{shard.name} is no safetensors file but a pickle: a pickle can run any"):
        hub.load(folder)


def test_pickles_in_shards_are_refused(folder):
    for file in shards(folder):
        file.rename(folder / file.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
    (folder / hub.INDEX).rename(folder / "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"weights only as \['pytorch_model-00001.*: a pickle can run any code"):
        hub.load(folder)


def test_a_config_of_other_bytes(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        hub.load(folder)


def test_all_wrong_shapes_and_types_in_one_message(made, tmp_path):
    """Integers where weights should be are the codes of a quantised file: read as numbers they would mean nothing."""
    folder = Path(shutil.copytree(made / "whole", tmp_path / "model"))
    file = folder / hub.WEIGHTS
    tensors = load_file(file)
    up, down, norm = (
        f"model.layers.{i}.{n}.weight" for i, n in ((0, "mlp.up_proj"), (1, "mlp.down_proj"), (1, "input_layernorm"))
    )
    tensors |= {up: tensors[up].T.copy(), norm: np.ones(3, np.float32), down: tensors[down].astype(np.int8)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit LlamaForCausalLM") as e:
        hub.load(folder)
    said = str(e.value)
    assert f"of a wrong shape: {up} (16, 24), expected (24, 16), {norm} (3,), expected (16,)" in said
    assert said.endswith(f"of a type that is none of F64, F32, F16, BF16: {down} I8")
    assert "missing" not in said


def test_a_header_that_points_past_the_file(folder):
    shard = shards(folder)[0]
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}}).encode()
    shard.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 32)
    with pytest.raises(ValueError, match=f"{shard.name} is truncated or no safetensors file"):
        hub.load(folder)
