"""The adapter file and the training state: bit-equal both ways, and every damage is said."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from peftjax import chain, checkpoint, hub, method, stack_layers
from peftjax.checkpoint import StateFolder, load_adapter, read_header, save_adapter, write_atomically
from peftjax.methods import (
    adalora,
    bitfit,
    dora,
    dylora,
    fishmask,
    full,
    head,
    lora,
    lora_fa,
    lora_plus,
    olora,
    pissa,
    prefix,
    vera,
)
from peftjax.tree import flatten, get, update
from peftjax.weights import NODES

ADAPTERS = {
    "full": full(),
    "head": head(),
    "bitfit": bitfit(create=True),
    "fishmask": fishmask(0.2, score="random"),
    "lora+fishmask": chain(fishmask(count=99, targets=["query"], score="random"), lora(rank=2, targets=["query"])),
    "lora": lora(rank=2, targets=["linear"], rank_pattern={"query": 3}, dropout=0.1, rslora=True),
    "dora": dora(rank=2, targets=["linear", "embedding"], dropout=0.1),
    "lora_plus": lora_plus(rank=2, ratio=8),
    "lora_fa": lora_fa(rank=2, targets=["linear"]),
    "pissa": pissa(rank=2, alpha=3, niter=1),
    "olora": olora(rank=2, targets=["linear"], dropout=0.1),
    "vera": vera(rank=7, targets=["linear"], seed=5),
    "lora over vera": chain(vera(rank=7), lora(rank=2)),
    "lora-tied": lora(rank=2, targets=["embedding", "query"], tied_embedding="take"),
    "adalora": adalora(2, 3, targets=["linear", "embedding"], dropout=0.1),
    "dylora": dylora(3, alpha=5, targets=["linear", "embedding"], dropout=0.1, frozen=True),
    "prefix": prefix(length=3),
    "prefix-mlp": prefix(length=3, mlp=True, hidden=5),
    "lora+bitfit": chain(lora(rank=2), bitfit(create=True)),
    "lora+lora": chain(lora(rank=2, targets=["query"]), lora(rank=3, targets=["query"])),
    "lora+full": chain(lora(rank=2), full()),
}
PARTS = {  # on GPT-2, whose query, key and value are blocks of one weight
    "lora": lora(rank=2),
    "dora, then lora over it": chain(dora(rank=2), lora(rank=1, targets=["query"])),
    "pissa, and the third part with olora": chain(pissa(rank=2), olora(rank=1, targets=["key"])),
    "vera": vera(rank=5),
    "entries of one block": fishmask(count=40, targets=["key"], score="random"),
    "one block, thrice": chain(*(lora(rank=r, targets=["key"]) for r in (1, 2, 3))),
    "inside a whole": chain(lora(rank=2, targets=["value"]), lora(rank=3, targets=["linear"]), bitfit(["query"])),
    "two blocks, then full": chain(lora(rank=2, targets=["query"]), bitfit(["value"]), bitfit(["key"]), full()),
    "all blocks": bitfit(["value", "key", "query"]),
}


def llama(dtype: Any = jnp.float32, seed=0, task="causal-lm", **changes) -> hub.Model:
    config = tiny.config("llama", tie_word_embeddings=True, **changes)
    model = hub.from_config(config, task, seed=seed)
    params = jax.tree.map(lambda x: x.astype(dtype), tiny.roughen(model.params, seed))
    return model._replace(params=params)


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture(scope="module")
def classifier():
    return llama(task="classification")


@pytest.fixture(scope="module")
def fused():
    model = hub.from_config(tiny.config("gpt2"), "causal-lm")
    return model._replace(params=tiny.roughen(model.params))


def adapted(m, model, seed=5):
    """Adapted parameters whose trained leaves have moved."""
    params = m.init(jax.random.key(0), model.params, model.sites)
    mask, moved = m.trainable(params), tiny.roughen(params, seed)
    return jax.tree.map(lambda keep, x, y: y if keep else x, mask, params, moved)


@pytest.fixture
def saved(base, tmp_path) -> Path:
    m = ADAPTERS["lora"]
    save_adapter(tmp_path / "a.safetensors", base, m, adapted(m, base), {"task": "e2e"})
    return tmp_path / "a.safetensors"


def reheader(file: Path, change, tensors=None) -> None:
    """Writes the file anew with a changed header, sealed again, and perhaps other tensors."""
    header, old = checkpoint._open(file)
    header = change(header) or header
    sealed = json.dumps({**header, "seal": checkpoint._seal(header)})
    save_file(old if tensors is None else tensors, file, metadata={"peftjax": sealed})


# Round trips


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_and_loaded_is_bit_equal(name, stacked, base, classifier, tmp_path):
    m, model = ADAPTERS[name], classifier if name == "head" else base
    check_round_trip(m, model, stacked, tmp_path)


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "scan"])
@pytest.mark.parametrize("name", PARTS)
def test_blocks_are_bit_equal(name, stacked, fused, tmp_path):
    check_round_trip(PARTS[name], fused, stacked, tmp_path)


def check_round_trip(m, model, stacked, tmp_path):
    params = adapted(m, model)
    resolved = m.resolve(params, None)
    size = save_adapter(tmp_path / "a", model, m, stack_layers(params) if stacked else params, {"n": 1})
    assert size == (tmp_path / "a").stat().st_size
    got = load_adapter(tmp_path / "a", model)
    assert tiny.same(got.params, resolved)
    assert got.method.spec == m.spec
    assert got.header["extra"] == {"n": 1}
    assert "prefix_mlp" not in got.params
    tokens = {"input_ids": jnp.arange(4, 10)[None]}
    assert np.array_equal(model.forward(got.params, tokens).logits, model.forward(resolved, tokens).logits)
    save_adapter(tmp_path / "b", model, got.method, got.params, {"n": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_blocks_that_do_not_train_are_the_bases(fused, tmp_path):
    """The file names them, holds none of them, and they come from the base at hand, in its dtype."""
    m, path = lora(rank=2, targets=["key"]), "transformer/h_0/attn/c_attn/kernel"
    save_adapter(tmp_path / "a", fused, m, adapted(m, fused))
    assert {p.partition("kernel")[2] for p in load_file(tmp_path / "a")} == {"/blocks/key/a", "/blocks/key/b"}
    items = read_header(tmp_path / "a")["nodes"][path]["fields"]["blocks"]["items"]
    assert (items["query"], items["value"], items["key"]["fields"]["base"]) == ("base", "base", "base")
    half = fused._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), fused.params))
    got, want = get(load_adapter(tmp_path / "a", half).params, path), get(half.params, path)
    whole = [got.blocks["query"], got.blocks["key"].base, got.blocks["value"]]
    assert tiny.same(jnp.concatenate(whole, axis=1), want)


@pytest.mark.parametrize("block", ["query", "key"])
def test_a_block_of_the_base_that_changed_unsaved_is_refused(block, fused, tmp_path):
    m, path = lora(rank=2, targets=["key"]), "transformer/h_1/attn/c_attn/kernel"
    params = adapted(m, fused)
    w = get(params, path)
    louder = {**w.blocks, block: jax.tree.map(lambda x: x + 1, w.blocks[block])}
    with pytest.raises(ValueError, match="changed arrays of the base that it does not save"):
        save_adapter(tmp_path / "a", fused, m, update(params, {path: dataclasses.replace(w, blocks=louder)}))


def test_the_file_holds_what_the_method_saves_and_no_more(saved, base):
    tensors = load_file(saved)
    assert {p.rpartition("/")[2] for p in tensors} == {"a", "b"}
    assert len(tensors) == 2 * 7 * tiny.LAYERS
    header = read_header(saved)
    assert header["spec"] == [["lora", ADAPTERS["lora"].spec[0][1]]]
    assert header["base"] == {"fingerprint": hub.fingerprint(base), "architecture": "LlamaForCausalLM"}


@pytest.mark.parametrize("name", ["lora", "full", "bitfit"])
def test_bfloat16(name, tmp_path):
    m, model = ADAPTERS[name], llama(jnp.bfloat16)
    params = adapted(m, model)
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    save_adapter(tmp_path / "a", model, m, params)
    assert tiny.same(load_adapter(tmp_path / "a", model).params, params)


def test_the_base_may_be_loaded_in_another_dtype(saved, base):
    half = base._replace(params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), base.params))
    got = flatten(load_adapter(saved, half).params)
    assert {got[p].dtype.name for p in load_file(saved)} == {"float32"}


# Another base


@pytest.mark.parametrize("other", ["values", "layers", "architecture", "labels"])
def test_another_base_is_refused(other, saved, base, classifier, tmp_path):
    if other == "labels":
        m, file = ADAPTERS["head"], tmp_path / "h"
        save_adapter(file, classifier, m, adapted(m, classifier))
        three = llama(task="classification", num_labels=3)
        model = three._replace(params=update(classifier.params, {"score/kernel": three.params["score"]["kernel"]}))
        fresh = {"fresh": ("score/kernel",)}  # a head does not tell bases apart
        save_adapter(file, classifier._replace(**fresh), m, adapted(m, classifier))
        with pytest.raises(ValueError, match=r"score/kernel has shape \(16, 2\), the base has \(16, 3\)"):
            load_adapter(file, model._replace(**fresh))
        return
    model = {
        "values": lambda: llama(seed=1),
        "layers": lambda: llama(num_hidden_layers=3),
        "architecture": lambda: classifier._replace(params={**base.params}),
    }[other]()
    with pytest.raises(ValueError, match=r"a.safetensors is an adapter for another base \(LlamaForCausalLM with"):
        load_adapter(saved, model)


# Damage


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.25, 0.5, 0.9, -1])
def test_a_truncated_file_is_refused(keep, saved, base):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"a.safetensors is truncated or corrupted"):
        load_adapter(saved, base)


def test_one_flipped_byte_anywhere_is_found(saved, base):
    data, whole = saved.read_bytes(), load_adapter(saved, base).params
    start = 8 + int.from_bytes(data[:8], "little")
    rng = np.random.default_rng(0)
    inside = [*range(start, len(data), 97), len(data) - 1]
    before = [*range(8), *rng.integers(8, start, 400).tolist()]
    assert len(inside) > 20
    for at in (*before, *inside):
        broken = bytearray(data)
        broken[at] ^= int(rng.integers(1, 256))
        saved.write_bytes(broken)
        said, got = "", None
        try:
            got = load_adapter(saved, base).params
        except ValueError as e:
            said = str(e)
        # a blank between two signs of the header may become another blank
        assert "a.safetensors" in said or (at < start and tiny.same(got, whole)), at


def test_missing_and_unknown_tensors_are_named(saved, base):
    tensors = load_file(saved)
    name = next(iter(tensors))
    rest = {p: x for p, x in tensors.items() if p != name}
    reheader(saved, lambda h: None, rest | {"stray": np.ones(2)})
    with pytest.raises(ValueError, match=rf"missing tensors \['{name}'\], unknown tensors \['stray'\]"):
        load_adapter(saved, base)


def test_files_that_are_no_adapters(tmp_path, base):
    with pytest.raises(FileNotFoundError, match=r"there is no adapter file .*nowhere"):
        load_adapter(tmp_path / "nowhere", base)
    with pytest.raises(FileNotFoundError, match="there is no adapter file"):
        read_header(tmp_path)
    save_file({"x": np.ones(2)}, tmp_path / "x")
    with pytest.raises(ValueError, match="no peftjax adapter of format 2"):
        load_adapter(tmp_path / "x", base)
    (tmp_path / "text").write_text("hello, this is a text and no tensors")
    with pytest.raises(ValueError, match="truncated or corrupted"):
        load_adapter(tmp_path / "text", base)


def test_another_format_is_refused(saved, base):
    reheader(saved, lambda h: h | {"format": 1})
    with pytest.raises(ValueError, match="no peftjax adapter of format 2"):
        load_adapter(saved, base)


def test_an_unknown_node_class_and_changed_fields_are_said(saved, base, monkeypatch):
    cls = NODES["LoRA"]
    with monkeypatch.context() as m:
        m.delitem(NODES, "LoRA")
        with pytest.raises(ValueError, match="_proj/kernel is a LoRA, which is not known here; import the module"):
            load_adapter(saved, base)
    assert NODES["LoRA"] is cls

    def rename(header):
        for description in header["nodes"].values():
            description["static"]["rate"] = description["static"].pop("dropout")

    reheader(saved, rename)
    with pytest.raises(ValueError, match=r"the fields \['dropout', 'rate'\] of LoRA differ from the file's"):
        load_adapter(saved, base)


def test_an_unknown_method_is_said(saved, base):
    reheader(saved, lambda h: h | {"spec": [["lorra", {}]]})
    with pytest.raises(ValueError, match="there is no method 'lorra'"):
        load_adapter(saved, base)


def test_an_array_at_a_place_that_the_base_lacks(base, tmp_path):
    m = full()
    save_adapter(tmp_path / "a", base, m, base.params)
    tensors = load_file(tmp_path / "a")
    tensors["model/nrm/scale"] = tensors.pop("model/norm/scale")

    def rename(header):
        header["arrays"] = sorted(tensors)
        header["digest"] = checkpoint._digest(tensors)

    reheader(tmp_path / "a", rename, tensors)
    with pytest.raises(ValueError, match=r"the base has no \['model/nrm/scale'\]; the nearest paths are \['model/norm"):
        load_adapter(tmp_path / "a", base)


def test_what_would_be_lost_is_an_error(base, tmp_path):
    path = "model/layers_0/self_attn/q_proj/bias"
    m = method("hidden", {}, lambda key, p, sites: update(p, {path: jnp.ones(16)}), full().trainable, saved=head_only)
    with pytest.raises(ValueError, match=rf"does not save \['{path}'\], and they are not the base's"):
        save_adapter(tmp_path / "a", base, m, m.init(jax.random.key(0), base.params, base.sites))
    half = lora(rank=2)._replace(saved=head_only)
    with pytest.raises(ValueError, match=r"the method does not save .*/kernel/a, and it is not the base's"):
        save_adapter(tmp_path / "a", base, half, adapted(lora(rank=2), base))
    assert not list(tmp_path.iterdir())


def head_only(params):
    return jax.tree.map(lambda _: False, params)


# Writing


@pytest.mark.parametrize("fails", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rest(fails, saved, base, monkeypatch):
    old = saved.read_bytes()

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*{"replace": (Path, "replace"), "fsync": (os, "fsync")}[fails], full_disk)
    m = prefix(length=2)
    for file in (saved, saved.parent / "new"):
        with pytest.raises(OSError, match="No space left"):
            save_adapter(file, base, m, adapted(m, base))
    assert saved.read_bytes() == old
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_write_atomically_makes_folders_and_tells_the_size(tmp_path):
    assert write_atomically(tmp_path / "a/b/c.txt", "äö") == 4
    assert [p.name for p in (tmp_path / "a/b").iterdir()] == ["c.txt"]


# Training states

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(3, jnp.bfloat16), "step": jnp.int32(7), "hole": None}


@pytest.fixture
def states(tmp_path):
    folder = StateFolder(tmp_path / "state")
    yield folder
    folder.close()


def test_a_state_comes_back_bit_equal(states):
    assert states.latest() is None
    for step in (3, 6, 9):
        states.save(step, STATE, {"best": {"loss": 0.1}})
    assert states.latest() == 9
    got, meta = states.restore(9, jax.tree.map(jnp.zeros_like, STATE))
    assert tiny.same(got, STATE)
    assert meta == {"best": {"loss": 0.1}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"w": jnp.ones((2, 4))}, r"w: float32\[2, 3\], expected float32\[2, 4\]"),
        ({"half": jnp.ones(3)}, r"half: bfloat16\[3\], expected float32\[3\]"),
        ({"step": None}, r"step: int32\[\], expected None"),
        ({"hole": jnp.ones(1)}, r"hole: None, expected float32\[1\]"),
    ],
    ids=["shape", "dtype", "one less", "one more"],
)
def test_a_state_of_another_structure_is_refused(states, change, said):
    states.save(1, STATE, {})
    with pytest.raises(ValueError, match=rf"is of another run \(1 arrays differ: {said}\); remove that folder"):
        states.restore(1, STATE | change)


def test_a_damaged_state_is_said(states, tmp_path):
    states.save(1, STATE, {})
    states.close()
    file = tmp_path / "state/1/state/_METADATA"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"training state of step 1 in .* cannot be read .*; remove that folder"):
        StateFolder(tmp_path / "state").restore(1, STATE)


@pytest.mark.filterwarnings("ignore")  # orbax warns about what the kill left
def test_what_a_kill_leaves_does_no_harm(states, tmp_path):
    for step in (1, 2):
        states.save(step, STATE, {})
    states.close()
    folder = tmp_path / "state"
    (folder / "3.orbax-checkpoint-tmp/state").mkdir(parents=True)
    (folder / "1/_CHECKPOINT_METADATA").unlink()  # killed while the oldest was being removed
    again = StateFolder(folder)
    assert again.latest() == 2
    assert tiny.same(again.restore(2, STATE)[0], STATE)
    for step in (3, 4):
        again.save(step, STATE, {})
    assert again.latest() == 4
    again.close()


def test_unstacked_and_stacked_files_are_the_same(base, tmp_path):
    m = ADAPTERS["lora"]
    params = adapted(m, base)
    save_adapter(tmp_path / "a", base, m, params)
    save_adapter(tmp_path / "b", base, m, stack_layers(params))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_new_head_that_is_not_saved_is_refused(tmp_path, base):
    m = lora(rank=2)
    fresh = base._replace(fresh=("model/norm/scale",))
    with pytest.raises(ValueError, match=r"new task head .* would not be saved"):
        save_adapter(tmp_path / "a", fresh, m, adapted(m, base))


def test_a_base_array_that_changed_unsaved_is_refused(tmp_path, base):
    m = lora(rank=2)
    params = adapted(m, base)
    params = update(params, {"model/norm/scale": params["model"]["norm"]["scale"] + 1})
    with pytest.raises(ValueError, match="changed arrays of the base that it does not save"):
        save_adapter(tmp_path / "a", base, m, params)
