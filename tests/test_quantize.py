"""Quantised bases: the laws over the table of methods, the numbers against written-out ones, loading, files."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file
from test_methods import CASES, FAMILIES, _adapt, _batch, _logits, _noise, _objective, _steps

from peftjax import (
    attend,
    chain,
    combine,
    count,
    dot,
    hub,
    masks,
    materialize,
    merge,
    nbytes,
    partition,
    quantize as quantization,
    stack_layers,
    take,
    unstack_layers,
)
from peftjax.checkpoint import load_adapter, read_header, save_adapter
from peftjax.cli import main
from peftjax.compare import _facts, set_up
from peftjax.methods import bitfit, child_tuning, default_rate, dora, fishmask, full, head, lora
from peftjax.methods.base import LINEAR
from peftjax.quantize import DYNAMIC, HOW, NORMAL, int8, nf4, quantize
from peftjax.run import _once
from peftjax.train import Settings
from peftjax.tree import cast, flatten
from peftjax.weights import is_node, is_quantized, map_nodes, quantized_paths

WHOLE = ("fishmask+head", "fishmask-random", "lora over fishmask", "child_tuning-D")  # choose entries, here codes
FROZEN = [name for name, case in CASES.items() if case.base_frozen and name not in WHOLE]
QUICK = [
    *(
        (name, "llama", "nf4-double")
        for name in ("lora", "dora", "adalora", "pissa", "vera", "prompt", "ia3", "bitfit")
    ),
    *((name, "llama", "int8") for name in ("lora", "prefix+adapter")),
    *((name, family, "nf4") for name, family in (("dora", "gpt2"), ("lora+bitfit+head", "bert"), ("lora", "t5"))),
]
LAWS = [  # the rest of the product is slow
    pytest.param(*row, marks=() if row in QUICK else pytest.mark.slow)
    for row in dict.fromkeys(
        [
            *QUICK,
            *((name, "llama", how) for name in FROZEN for how in ("nf4-double", "int8")),
            *((name, family, "nf4") for name in FROZEN for family in ("gpt2", "bert", "t5")),
        ]
    )
]


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in FAMILIES.items()}


def quantized(model, how):
    return model._replace(params=quantize(model.params, model.sites, how))


@pytest.mark.parametrize(("name", "family", "how"), LAWS)
def test_the_laws_on_a_quantised_base(models, name, family, how, tmp_path):
    """Laws 1, 3, 4, 5 and 6: starts unchanged, the loss falls, nothing frozen moves, merges, saves and loads."""
    case, model = CASES[name], quantized(models[family], how)
    params = _adapt(model, case.method)
    if case.start is not None:
        start = _logits(model, case.method.resolve(params, None))
        np.testing.assert_allclose(start, _logits(model, model.params), atol=case.start)
    before = jax.tree.map(np.array, params)
    fitted = _steps(model, case.method, params, rate=30 * default_rate(case.method, 768))
    losses = [r["loss"] for r in fitted.history]
    assert min(losses[-3:]) < 0.97 * losses[0]
    mask, start = flatten(case.method.trainable(params)), flatten(before)
    moved = {p for p, x in flatten(fitted.params).items() if not np.array_equal(np.asarray(x), start[p])}
    assert moved
    assert moved <= {p for p, m in mask.items() if m}
    trainable, frozen = partition(fitted.params, case.method.trainable(params))
    adapted = combine(_noise(trainable, 0.2), frozen)
    resolved = case.method.resolve(adapted, None)
    save_adapter(tmp_path / "a", model, case.method, adapted)
    loaded = load_adapter(tmp_path / "a", model)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(resolved)
    pairs = zip(jax.tree.leaves(loaded.params), jax.tree.leaves(resolved), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    if case.merges:
        merged = merge(resolved)
        assert flatten(merged).keys() == flatten(models[family].params).keys()
        np.testing.assert_allclose(_logits(model, merged), _logits(model, resolved), atol=2e-5)


# The numbers, against written-out ones


def level_reference():
    """QLoRA, appendix E, as bitsandbytes computes it: 8 levels below and 9 above share the 0; all over the largest."""
    stats = pytest.importorskip("scipy.stats")
    edge = 1 - (1 / 30 + 1 / 32) / 2
    above = stats.norm.ppf(np.linspace(edge, 0.5, 9)[:-1])
    below = -stats.norm.ppf(np.linspace(edge, 0.5, 8)[:-1])
    return np.sort([*above, 0.0, *below]) / above.max()


def map_reference():
    out = {0.0, 1.0}
    for decade in range(7):
        step = 0.9 / 2**decade
        for k in range(2**decade):
            value = (0.1 + (k + 0.5) * step) * 10.0 ** (decade - 6)
            out |= {value, -value}
    return np.array(sorted(out))


def nf4_reference(w, double):
    """Entry by entry, in float64: packed codes, absmaxes, and the array that they stand for."""
    inputs, outputs = w.shape
    flat = [float(w[i, o]) for o in range(outputs) for i in range(inputs)]
    flat += [0.0] * (-len(flat) % 64)
    levels, codes, most = NORMAL.astype(np.float64), [], []
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        most.append(max(map(abs, block)))
        codes += [int(np.argmin(np.abs(levels - x / (most[-1] or 1)))) for x in block]
    absmax = np.array(most)
    if double:
        small, mean = map_reference(), absmax.mean()
        for start in range(0, len(most), 256):
            rest = absmax[start : start + 256] - mean
            top = np.abs(rest).max()
            nearest = [small[np.argmin(np.abs(small - r / (top or 1)))] for r in rest]
            absmax[start : start + 256] = np.array(nearest) * top + mean
    values = [levels[c] * absmax[i // 64] for i, c in enumerate(codes)][: inputs * outputs]
    packed = [16 * first + second for first, second in zip(codes[::2], codes[1::2], strict=True)]
    return packed, most, np.array(values).reshape(outputs, inputs).T


def matrix(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) * rng.uniform(0.01, 2, shape[-1]), jnp.float32)


def test_the_levels_are_the_papers():
    np.testing.assert_allclose(NORMAL, level_reference(), atol=1e-6)
    np.testing.assert_allclose(DYNAMIC, map_reference(), rtol=1e-6)
    assert len(DYNAMIC) == 256


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(64, 12), (48, 20), (7, 3), (130, 301)], ids=str)
def test_nf4_is_the_written_out_one(shape, double):
    w = matrix(*shape).at[:, 0].set(0.0)  # a block of zeros stays one
    packed, absmax, values = nf4_reference(np.asarray(w), double)
    got = nf4(w, double)
    assert got.codes.tolist() == packed
    if not double:
        np.testing.assert_array_equal(got.absmax, np.array(absmax, np.float32))
    assert got.absmax.dtype == (jnp.uint8 if double else jnp.float32)
    np.testing.assert_allclose(materialize(got), values, atol=1e-6)
    assert (got.shape, got.dtype, got.ndim) == (shape, jnp.float32, 2)


def test_int8_is_the_written_out_one():
    w = matrix(33, 9).at[:, 4].set(0.0)
    scale = np.abs(np.asarray(w, np.float64)).max(0) / 127
    codes = np.rint(np.divide(w, scale, where=scale > 0, out=np.zeros_like(w, np.float64)))
    got = int8(w)
    assert got.codes.dtype == jnp.int8
    assert np.array_equal(got.codes, codes)
    np.testing.assert_allclose(materialize(got), codes * scale, rtol=1e-6)
    assert float(jnp.abs(materialize(got) - w).max()) <= scale.max() / 2 * 1.001


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_products_are_those_of_the_array(how, dtype):
    w = HOW[how](matrix(20, 12).astype(dtype))
    dense, close = materialize(w), 1e-5 if dtype == jnp.float32 else 0.1
    assert w.dtype == dense.dtype == dtype
    x, y = matrix(2, 5, 20).astype(dtype), matrix(2, 5, 12).astype(dtype)
    ids = jnp.array([[3, 19, 0]])
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        got = dot(w, x), attend(w, y), take(w, ids)
        want = dot(dense, x), attend(dense, y), take(dense, ids)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype == dtype
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=close, rtol=close)
        slopes = [jax.grad(lambda x, w=w: (dot(w, x).astype(jnp.float32) ** 2).sum())(x) for w in (w, dense)]
    np.testing.assert_allclose(*(s.astype(jnp.float32) for s in slopes), atol=20 * close, rtol=close)


@pytest.mark.parametrize("how", HOW)
def test_layers_are_quantised_apart(how):
    """Of sizes that no block divides, so that one that reached over two layers would show."""
    w = matrix(3, 10, 7)
    stacked, single = HOW[how](w), [HOW[how](x) for x in w]
    assert stacked.shape == (3, 10, 7)
    assert tiny.same(stacked, jax.tree.map(lambda *xs: jnp.stack(xs), *single))
    np.testing.assert_array_equal(materialize(stacked), jnp.stack([materialize(x) for x in single]))


BITS = {"int8": 8 + 32 / 1024, "nf4": 4 + 32 / 64, "nf4-double": 4 + 8 / 64 + 32 / (64 * 256) + 32 / 1024**2}


@pytest.mark.parametrize("how", HOW)
def test_bits_an_entry(how):
    """The last term of double quantisation is the mean, one number a matrix."""
    w = jax.eval_shape(HOW[how], jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16))
    assert 8 * nbytes(w) / 1024**2 == BITS[how]


@pytest.mark.parametrize(("family", "how"), [("llama", "nf4-double"), ("gpt2", "nf4"), ("bert", "int8")])
def test_gradients_over_codes_are_those_over_the_array(models, family, how):
    """Of LoRA on the linear weights: over NF4 this is QLoRA. In both layouts."""
    model = quantized(models[family], how)
    method = lora(rank=2, targets=["linear"])
    params = _noise(method.init(jax.random.key(0), model.params, model.sites), 0.2)
    dense = map_nodes(lambda path, n: materialize(n) if is_quantized(n) else n, params)
    found = []
    for tree in (params, dense, stack_layers(params)):
        trainable, frozen = partition(tree, method.trainable(tree))
        grads = jax.jit(jax.grad(lambda t, f: _objective(model)(combine(t, f), _batch(), None)[0]))(trainable, frozen)
        found.append(flatten(unstack_layers(grads, like=tree)))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for path, x in other.items():
            np.testing.assert_allclose(x, found[0][path], atol=3e-4, rtol=1e-3)  # of up to 0.4; attention saturates


@pytest.mark.parametrize("name", ["lora", "dora-everywhere", "prefix+lora"])
@pytest.mark.parametrize("how", ["int8", "nf4-double"])
def test_bfloat16_is_not_widened(models, name, how):
    small, method = models["gpt2"], CASES[name].method
    small = small._replace(params=cast(small.params, jnp.bfloat16), module=small.module.clone(dtype=jnp.bfloat16))
    small = quantized(small, how)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, small.sites), small.params)
    for tree in (params, jax.eval_shape(stack_layers, params)):
        out = jax.eval_shape(lambda p: small.forward(method.resolve(p, None), _batch()), tree)
        assert out.hidden.dtype == jnp.bfloat16


# Loading


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("how", HOW)
def test_loading_is_quantising_what_was_loaded(family, how, tmp_path):
    folder = tiny.folder(tmp_path / family, family)
    whole = hub.load(folder)
    want = quantize(whole.params, whole.sites, how)
    got = hub.load(folder, quantize=how)
    assert tiny.same(got.params, want)
    kept = {p for p, x in flatten(got.params, is_leaf=is_node).items() if not is_node(x)}
    linear = {s.path for s in whole.sites if s.kind in LINEAR}
    assert kept == set(flatten(whole.params)) - linear
    assert count(map_nodes(_once, got.params)) == count(whole.params)
    half = hub.load(folder, quantize=how, param_dtype=jnp.bfloat16)
    assert {materialize(x).dtype.name for x in flatten(half.params, is_leaf=is_node).values()} == {"bfloat16"}
    assert hub.fingerprint(half) == hub.fingerprint(got) != hub.fingerprint(whole)


def test_loading_never_holds_the_whole_model(tmp_path, monkeypatch):
    """Bytes alive at each tensor: what is quantised so far, and a copy or two of the one at hand."""
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8}
    folder = tiny.folder(tmp_path / "llama", "llama", **sizes)
    whole = hub.load(folder)
    full, largest = nbytes(whole.params), max(x.nbytes for x in jax.tree.leaves(whole.params))
    del whole
    gc.collect()
    alive, quantize_at, start = [], quantization.quantize_at, sum(x.nbytes for x in jax.live_arrays())

    def watched(*args):
        alive.append(sum(x.nbytes for x in jax.live_arrays()) - start)
        return quantize_at(*args)

    monkeypatch.setattr(quantization, "quantize_at", watched)
    small = nbytes(hub.load(folder, quantize="nf4").params)
    assert len(alive) == 8 * 7
    assert max(alive) <= small + 2 * largest < 0.4 * full


def test_abstract_shapes_for_memory_plans():
    model = hub.from_config(tiny.config("gpt2"), "causal-lm", seed=None, quantize="nf4-double")
    leaves = jax.tree.leaves(model.params)
    assert {type(x) for x in leaves} == {jax.ShapeDtypeStruct}
    drawn = hub.from_config(tiny.config("gpt2"), "causal-lm", quantize="nf4-double")
    assert jax.tree.structure(drawn.params) == jax.tree.structure(model.params)
    assert nbytes(drawn.params) == nbytes(model.params)
    adapted = jax.eval_shape(lambda p: lora(rank=2).init(jax.random.key(0), p, model.sites), model.params)
    assert count(partition(adapted, lora(rank=2).trainable(adapted))[0]) == 2 * 2 * 2 * (16 + 16)


# Files


def test_an_adapter_says_how_its_base_is_quantised(models, tmp_path):
    whole, file = models["gpt2"], tmp_path / "a"
    model, method = quantized(whole, "nf4"), lora(rank=2, targets=["query", "mlp_in"])
    save_adapter(file, model, method, _adapt(model, method))
    header = read_header(file)
    assert header["base"]["quantized"] == "nf4"
    assert len(header["nodes"]) == 4
    items = header["nodes"]["transformer/h_0/attn/c_attn/kernel"]["fields"]["blocks"]["items"]
    assert (items["key"], items["query"]["fields"]["base"]) == ("base", "base")
    assert {p.rpartition("/")[2] for p in load_file(file)} == {"a", "b"}
    for other, name in ((whole, "nothing"), (quantized(whole, "nf4-double"), "nf4-double")):
        with pytest.raises(ValueError, match=rf"as nf4; this one is quantised as {name}. Load it with quantize='nf4'"):
            load_adapter(file, other)
    save_adapter(file, whole, method, _adapt(whole, method))
    with pytest.raises(ValueError, match=r"as nothing; this one is quantised as nf4. Load it with no quantize"):
        load_adapter(file, model)
    moved = model._replace(params=_noise(model.params, 0.1))
    save_adapter(file, model, method, _adapt(model, method))
    with pytest.raises(ValueError, match="another base"):
        load_adapter(file, moved)


@pytest.mark.parametrize("targets", [["key"], ["fused_qkv"], ["attention_out"]])
@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "scan"])
def test_adapters_over_parts_and_wholes_are_bit_equal(models, targets, stacked, tmp_path):
    model = quantized(models["gpt2"], "int8")
    method = chain(lora(rank=2, targets=targets), dora(rank=1, targets=targets), bitfit(["query"]))
    params = _adapt(model, method)
    save_adapter(tmp_path / "a", model, method, stack_layers(params) if stacked else params)
    assert tiny.same(load_adapter(tmp_path / "a", model).params, params)


def test_codes_that_changed_unsaved_are_refused(models, tmp_path):
    model, method = quantized(models["gpt2"], "nf4"), lora(rank=2, targets=["key"])
    for name in ("query", "key"):
        params = _adapt(model, method)
        kernel = params["transformer"]["h_0"]["attn"]["c_attn"]["kernel"]
        codes = kernel.blocks[name] if name == "query" else kernel.blocks[name].base
        (codes,) = [x for x in jax.tree.leaves(codes) if x.dtype == jnp.uint8]
        changed = jax.tree.map(lambda x, codes=codes: x + 1 if x is codes else x, params)
        with pytest.raises(ValueError, match="changed arrays of the base"):
            save_adapter(tmp_path / "a", model, method, changed)


# Bad input


def refused(model, method, message):
    with pytest.raises(ValueError, match=message):
        _adapt(model, method)


def test_what_cannot_train_over_codes_says_so(models):
    for family, path in (("llama", "q_proj/kernel"), ("gpt2", "c_attn/kernel")):
        model = quantized(models[family], "int8")
        refused(model, full(), "full: the base is quantised .* more.*, and codes cannot train; load it without")
        refused(model, chain(lora(rank=2), full()), "full: the base is quantised")
        for mode in "FD":
            refused(model, child_tuning(mode), "child_tuning: the base is quantised")
        refused(model, fishmask(0.2, score="random"), "fishmask: the base is quantised .*codes cannot train one by one")
        refused(model, fishmask(count=9, score="random", targets=["query"]), rf"quantised \(.*{path}\)")
    model = models["bert"]
    model = model._replace(params=quantize(model.params, model.sites, "nf4", ["head", "linear"]))
    refused(model, head(), "head: classifier/kernel is quantised, and codes cannot train; leave it out of `quantize`")
    model = quantized(models["bert"], "nf4")
    assert count(partition(model.params, masks.everything(model.params))[0]) == count(
        [x for x in flatten(model.params, is_leaf=is_node).values() if not is_node(x)]
    )
    fishing = fishmask(count=20, samples=2, targets=["embedding", ".*/bias"])
    assert len(jax.tree.leaves(partition(p := _adapt(model, fishing), fishing.trainable(p))[0])) > 0


def test_quantising_says_what_is_wrong(models, tmp_path):
    model = models["gpt2"]
    with pytest.raises(ValueError, match="no way 'int4' to quantise; there are int8, nf4, nf4-double"):
        quantize(model.params, model.sites, "int4")
    with pytest.raises(ValueError, match="no way 'fp4'"):
        hub.load(tiny.folder(tmp_path / "gpt2", "gpt2"), quantize="fp4")
    with pytest.raises(ValueError, match=r"cannot quantise .*bias: nf4: got float32 of shape \(16,\); expected a"):
        quantize(model.params, model.sites, "nf4", ["transformer/h_0/attn/c_proj/bias"])
    with pytest.raises(ValueError, match=r"nothing/.*matches no whole path"):
        quantize(model.params, model.sites, "nf4", ["nothing/.*"])
    with pytest.raises(ValueError, match=r"c_attn/kernel.*this is a Blocks already; quantise the base before methods"):
        quantize(quantized(model, "nf4").params, model.sites, "int8")
    with pytest.raises(ValueError, match="per-layer layout"):
        quantize(stack_layers(model.params), model.sites, "nf4")


# The command line


def test_train_evaluate_and_merge_on_codes(tmp_path, capsys):
    """QLoRA from the command line: the scores of the trained, the loaded and the merged model agree."""
    tiny.folder(tmp_path / "gpt2", "gpt2")
    tiny.data(tmp_path / "sst2", "sst2")
    base = [f"--model={tmp_path}/gpt2", "--task=sst2", f"--data={tmp_path}/sst2", "--buckets=1"]
    file = tmp_path / "out/adapter.safetensors"
    main(["train", *base, "--quantize=nf4", "--method=lora", "--steps=3", f"--out={tmp_path}/out", "--lr=0.05"])
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["config"]["quantize"] == "nf4"
    model = hub.load(tmp_path / "gpt2", "classification", labels=["0", "1"], quantize="nf4")
    trained = 2 * 2 * 8 * (16 + 16) + 2 * 16
    assert result["trainable"] == trained
    whole = count(hub.load(tmp_path / "gpt2", "classification", labels=["0", "1"]).params)
    assert result["share"] == trained / (whole + trained - 2 * 16)
    assert result["base_bytes"] == nbytes(model.params)
    capsys.readouterr()
    main(["evaluate", *base, "--quantize=nf4", f"--adapter={file}"])
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["evaluate", *base, f"--adapter={file}"])
    assert "Load it with quantize='nf4' (--quantize nf4)" in capsys.readouterr().err
    main(["merge", f"--model={tmp_path}/gpt2", f"--adapter={file}", f"--out={tmp_path}/merged"])
    merged = hub.load(tmp_path / "merged", "classification")
    assert not quantized_paths(merged.params)
    tokens = {"input_ids": jnp.arange(4, 12)[None], "attention_mask": jnp.ones((1, 8), int)}
    want = model.forward(load_adapter(file, model).params, tokens).logits
    np.testing.assert_allclose(merged.forward(merged.params, tokens).logits, want, atol=1e-5)
    capsys.readouterr()
    main(["evaluate", f"--model={tmp_path}/merged", *base[1:]])
    assert capsys.readouterr().out == said


def test_compare_on_codes_leaves_out_what_must_train_them(tmp_path):
    tiny.folder(tmp_path / "llama", "llama")
    tiny.data(tmp_path / "e2e", "e2e")
    problem, chosen = set_up(
        f"{tmp_path}/llama", "e2e", f"{tmp_path}/e2e", None, Settings(), quantize="int8", dtype=jnp.dtype("float32")
    )
    assert {"full", "fishmask"}.isdisjoint(e.name for e in chosen)
    assert [n.partition(" is left out")[0] for n in problem.notes if "quantised" in n] == ["fishmask", "full"]
    assert "the base's linear weights are quantised: int8" in _facts(problem, Settings(), {"quantize": "int8"})
