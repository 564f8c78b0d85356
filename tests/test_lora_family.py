"""LoRA's relatives, LoRA+, LoRA-FA, PiSSA, OLoRA and VeRA, against peft, optax and the equations."""

import copy
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from paper import bert
from reference import TOLERANCE, Link, check, fill, pair, peft, randomise, start, torch, transposed
from safetensors.numpy import load_file
from test_counts import trained_count
from test_numerics import ALL, QV, lora_links

from peftjax import chain, merge, partition, stack_layers
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.loop import fit
from peftjax.methods import as_lora, lora, lora_fa, lora_plus, olora, pissa, vera
from peftjax.methods.lora import LoRA
from peftjax.methods.pissa import Moved, fast_svd
from peftjax.methods.vera import VeRA
from peftjax.models.base import hf_name
from peftjax.run import _once
from peftjax.train import Settings, make_optimizer
from peftjax.tree import combine, count, flatten, map_with_path
from peftjax.weights import attend, dot, is_node, map_nodes, take

__all__ = ["pair"]  # a fixture

GPT2 = ["c_attn", "c_proj", "c_fc"]


def nodes(params, cls):
    return {p: n for p, n in flatten(params, is_leaf=is_node).items() if isinstance(n, cls)}


def module(theirs, path):
    return theirs.base_model.model.get_submodule(hf_name(path).removesuffix(".weight"))


def merged_is_theirs(base, params, theirs):
    """The merged weights are those of peft's merge, and give the unmerged function."""
    expected = dict(theirs.merge_and_unload().named_parameters())
    for path, w in flatten(merge(params)).items():
        reference = expected[hf_name(path)].detach().numpy()
        reference = reference.T if base.ours.family.transposed(path) else reference
        np.testing.assert_allclose(w, reference, atol=1e-5, err_msg=path)
    merged, unmerged = (base.ours.forward(p, base.batch).logits for p in (merge(params), params))
    np.testing.assert_allclose(merged, unmerged, atol=TOLERANCE)


# PiSSA and OLoRA


MOVED = {
    "pissa, bert": ("bert", "pissa", {"r": 4, "lora_alpha": 6, "target_modules": QV["bert"]}, pissa(4, 6)),
    "pissa, llama": (
        "llama",
        "pissa",
        {"r": 3, "lora_alpha": 3, "target_modules": ALL["llama"]},
        pissa(3, targets=["linear"]),
    ),
    "pissa, gpt2": (
        "gpt2",
        "pissa",
        {"r": 4, "lora_alpha": 6, "target_modules": GPT2, "fan_in_fan_out": True, "use_rslora": True},
        pissa(4, 6, ["linear"], rslora=True),
    ),
    "olora, bert": (
        "bert",
        "olora",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL["bert"]},
        olora(4, 6, ["linear", "pooler"]),
    ),
    "olora, llama": (
        "llama",
        "olora",
        {"r": 4, "lora_alpha": 8, "target_modules": ALL["llama"]},
        olora(4, 8, ["linear"]),
    ),
    # peft's OLoRA takes the weights of GPT-2 apart untransposed, which fits no matrix that is not square
    "olora, gpt2": (
        "gpt2",
        None,
        {"r": 4, "lora_alpha": 6, "target_modules": GPT2, "fan_in_fan_out": True},
        olora(4, 6, ["linear"]),
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_moved_is_pefts(pair, name):
    base_name, init, config, method = MOVED[name]
    base = pair(base_name)
    config = peft.LoraConfig(**config, **({"init_lora_weights": init} if init else {}))
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    params = start(base, method)
    there = nodes(params, Moved)
    links = {}
    for path, w in there.items():
        m = module(theirs, path)
        a, b = transposed(m.lora_A["default"].weight), transposed(m.lora_B["default"].weight)
        links |= {f"{path}/a": a, f"{path}/b": b}
        theirs_base = transposed(m.base_layer.weight) if base_name != "gpt2" else Link(m.base_layer.weight)
        if init is None:
            with torch.no_grad():
                m.base_layer.weight -= torch.tensor(np.asarray(w.scale * (w.a0 @ w.b0)))
        else:  # the same start, up to the signs of the components
            np.testing.assert_allclose(w.a0 @ w.b0, a.value() @ b.value(), atol=3e-5)  # two float32 SVDs
            np.testing.assert_allclose(jnp.abs(w.a0), jnp.abs(a.value()), atol=TOLERANCE)
            np.testing.assert_allclose(jnp.abs(w.b0), jnp.abs(b.value()), atol=TOLERANCE)
            params = fill(params, {f"{path}/a0": a, f"{path}/b0": b})  # so that their gradients compare
        np.testing.assert_allclose(w.base - w.scale * (w.a0 @ w.b0), theirs_base.value(), atol=3e-5)
    assert 2 * len(there) == len(links) == sum("lora_" in n for n, _ in theirs.named_parameters())
    randomise(theirs, links)
    params = fill(params, links)
    check(base, theirs, method, params, links)
    plain = as_lora(params)
    assert not nodes(plain, Moved)
    assert {n.a.shape[1] for n in nodes(plain, LoRA).values()} == {2 * config.r}
    logits, want = (base.ours.forward(p, base.batch).logits for p in (plain, params))
    np.testing.assert_allclose(logits, want, atol=TOLERANCE)
    merged_is_theirs(base, params, theirs)


def some_moved(key, rows=7, columns=5, r=3, dtype=jnp.float32, **settings):
    shapes = ((rows, columns), (rows, r), (r, columns), (rows, r), (r, columns))
    w, a, b, a0, b0 = (jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 5), shapes, strict=True))
    return Moved(w.astype(dtype), a, b, a0, b0, **settings)


def test_moved_products_are_the_equation(key):
    m = some_moved(key, scale=2.5)
    w, a, b, a0, b0 = (np.asarray(x, np.float64) for x in (m.base, m.a, m.b, m.a0, m.b0))
    dense = w + 2.5 * (a @ b - a0 @ b0)
    x, y = np.random.default_rng(0).normal(size=(2, 7)), np.random.default_rng(1).normal(size=(2, 5))
    np.testing.assert_allclose(m.materialize(), dense, atol=1e-5)
    np.testing.assert_allclose(dot(m, jnp.asarray(x, jnp.float32)), x @ dense, atol=1e-4)
    np.testing.assert_allclose(take(m, jnp.array([4, 0])), dense[[4, 0]], atol=1e-5)
    np.testing.assert_allclose(attend(m, jnp.asarray(y, jnp.float32)), y @ dense.T, atol=1e-4)


def test_moved_in_bfloat16_keeps_small_changes(key):
    """To the bit the base at the start; and a change of a thousandth is there, where bfloat16 has 8 bits."""
    m = some_moved(key, rows=64, columns=64, r=8, dtype=jnp.bfloat16)
    x = jax.random.normal(key, (16, 64)).astype(jnp.bfloat16)
    at_start = Moved(m.base, m.a0, m.b0, m.a0, m.b0)
    assert np.array_equal(dot(at_start, x), dot(m.base, x))
    d, e = (1e-3 * jax.random.normal(k, y.shape) for k, y in zip(jax.random.split(key), (m.a, m.b), strict=True))
    got = dot(Moved(jnp.zeros_like(m.base), m.a0 + d, m.b0 + e, m.a0, m.b0), x)
    want = x.astype(jnp.float32) @ ((m.a0 + d) @ (m.b0 + e) - m.a0 @ m.b0)
    assert float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)) < 0.02


def spectrum(key, rows, columns):
    """A matrix whose singular values fall by half."""
    one, two = jax.random.split(key)
    u, v = (jnp.linalg.qr(jax.random.normal(k, (n, columns)))[0] for k, n in ((one, rows), (two, columns)))
    return (u * 2.0 ** -jnp.arange(columns)) @ v.T


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_pissa_starts_from_the_principal_part(key, shape):
    w = spectrum(key, 9, 6) if shape == (9, 6) else spectrum(key, 9, 6).T
    u, s, v = np.linalg.svd(np.asarray(w, np.float64), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]

    def node(**arguments):
        method = pissa(2, 6, ["q/kernel"], **arguments)
        return method.init(key, {"q": {"kernel": w}}, ())["q"]["kernel"]

    exact = node()
    np.testing.assert_allclose(3 * (exact.a @ exact.b), best, atol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(exact.a, axis=0) ** 2, s[:2] / 3, atol=1e-6)  # half in each factor
    np.testing.assert_allclose(jnp.linalg.norm(exact.b, axis=1) ** 2, s[:2] / 3, atol=1e-6)
    errors = [float(jnp.abs(3 * (n.a @ n.b) - best).max()) for n in (node(niter=0), node(niter=1), node(niter=8))]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5
    assert np.array_equal(node(niter=2).a, node(niter=2).a)
    other = fast_svd(jax.random.key(7), w, 2, 0)[0]
    assert not np.allclose(np.abs(other), np.abs(fast_svd(jax.random.key(8), w, 2, 0)[0]), atol=1e-3)


def test_olora_starts_from_the_qr_decomposition(key):
    w = jax.random.normal(key, (9, 6))
    n = olora(3, targets=["q/kernel"]).init(key, {"q": {"kernel": w}}, ())["q"]["kernel"]
    q, r = np.linalg.qr(np.asarray(w, np.float64).T)
    np.testing.assert_allclose(n.a @ n.b, (q[:, :3] @ r[:3]).T, atol=1e-5)
    np.testing.assert_allclose(n.b @ n.b.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(n.a[:3], np.tril(n.a[:3]), atol=1e-6)


@pytest.mark.parametrize("make", [pissa, olora])
def test_a_part_of_a_fused_weight_is_taken_apart_alone(pair, make):
    base = pair("gpt2")
    params = start(base, make(2, targets=["key"]))
    w = base.ours.params["transformer"]["h_1"]["attn"]["c_attn"]["kernel"]
    part = w[:, w.shape[1] // 3 : 2 * w.shape[1] // 3]
    alone = make(2, targets=["q/kernel"]).init(jax.random.key(0), {"q": {"kernel": part}}, ())["q"]["kernel"]
    inside = params["transformer"]["h_1"]["attn"]["c_attn"]["kernel"].blocks["key"]
    np.testing.assert_allclose(inside.a @ inside.b, alone.a @ alone.b, atol=1e-5)
    np.testing.assert_allclose(
        base.ours.forward(params, base.batch).logits, base.ours.forward(base.ours.params, base.batch).logits, atol=1e-5
    )


def test_pissa_over_an_adapter_of_the_look_up_alone_is_refused(pair):
    first = lora(2, targets=["embedding"], tied_embedding="take")
    with pytest.raises(ValueError, match=r"pissa: another method adapts the look-up .*put pissa first"):
        start(pair("llama-tied"), chain(first, pissa(2, targets=["embedding"])))


# LoRA+


def quadratic(params):
    """A loss that moves every weight of a pair's model, without the model."""
    leaves = [x for x in jax.tree.leaves(map_nodes(lambda p, n: n.materialize(), params)) if x.ndim >= 2]
    return sum(((x - 0.1) ** 2).sum() for x in leaves)


PLUS = {
    "alone": (lora_plus(2, ratio=16), {"query": 16, "value": 16}),
    "beside lora": (chain(lora_plus(2, targets=["query"], ratio=8), lora(2, targets=["mlp_in"])), {"query": 8}),
    "two ratios": (
        chain(lora_plus(2, targets=["query"], ratio=8), lora_plus(2, targets=["value"], ratio=3)),
        {"query": 8, "value": 3},
    ),
    "the same ratio twice": (
        chain(lora_plus(2, targets=["query"]), lora_fa(2, targets=["mlp_in"]), lora_plus(3, targets=["value"])),
        {"query": 16, "value": 16},
    ),
    "embedding": (lora_plus(2, targets=["embedding", "query"], ratio=5), {"query": 5}),
}


@pytest.mark.parametrize("layout", ["loop", "scan"])
@pytest.mark.parametrize("name", PLUS)
def test_lora_plus_is_two_groups_of_learning_rates(pair, name, layout):
    method, ratios = PLUS[name]
    params = start(pair("bert"), method)
    params = stack_layers(params) if layout == "scan" else params
    trainable, frozen = partition(params, method.trainable(params))

    def ratio(path, _):
        found = re.search(r"/(\w+)/kernel/b$", path)
        return str(ratios.get(found[1], 1)) if found else "1"

    def adamw(rate):
        return optax.adamw(rate, weight_decay=0.1)

    labels = map_with_path(ratio, trainable)
    assert set(jax.tree.leaves(labels)) == {"1", *map(str, ratios.values())}
    groups = optax.partition({r: adamw(1e-3 * float(r)) for r in set(jax.tree.leaves(labels))}, labels)
    wrapped = method.optimizer(adamw(1e-3))
    results = []
    for tx in (wrapped, groups):
        here, state = trainable, tx.init(trainable)
        step = jax.jit(lambda t, s, tx=tx: tx.update(jax.grad(lambda t: quadratic(combine(t, frozen)))(t), s, t))
        for _ in range(4):
            updates, state = step(here, state)
            here = optax.apply_updates(here, updates)
        results.append(flatten(here))
    one, two = results
    for path in one:
        np.testing.assert_allclose(one[path], two[path], rtol=1e-5, atol=1e-7, err_msg=path)
        assert not np.array_equal(one[path], flatten(trainable)[path])
    assert count(wrapped.init(trainable)) == 2 * count(trainable) + 1


def test_lora_plus_trains_as_pefts_optimizer(pair):
    from peft.optimizers import create_loraplus_optimizer

    base, method = pair("llama"), lora_plus(4, 8, ratio=6)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=QV["llama"])
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    params = start(base, method)
    links = lora_links(theirs, params)
    randomise(theirs, links)
    trainable, frozen = partition(fill(params, links), method.trainable(params))
    mean = base.batch["attention_mask"][..., None] / base.batch["attention_mask"].sum()

    @jax.jit
    @jax.grad
    def gradient(trainable):
        return (jnp.square(base.ours.forward(combine(trainable, frozen), base.batch).logits) * mean).sum()

    # a large epsilon, so that a gradient near zero does not turn rounding into a full step
    reference = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=6, eps=1e-2)
    tx = method.optimizer(optax.adamw(1e-2, eps=1e-2, weight_decay=0.0))
    state, first = tx.init(trainable), trainable
    for _ in range(5):
        updates, state = tx.update(gradient(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        reference.zero_grad()
        out = theirs(**{k: torch.tensor(v) for k, v in base.batch.items()}).logits
        (out.square() * torch.tensor(mean)).sum().backward()
        reference.step()
    for path, x in flatten(trainable).items():
        np.testing.assert_allclose(x, links[path].value(), atol=TOLERANCE, rtol=TOLERANCE, err_msg=path)
    moved = {p: float(jnp.abs(x - flatten(first)[p]).max()) for p, x in flatten(trainable).items()}
    assert min(v for p, v in moved.items() if p.endswith("/b")) > 2 * max(
        v for p, v in moved.items() if p.endswith("/a")
    )


def test_lora_plus_moves_b_by_the_ratio_in_the_first_step(pair):
    """Through the loop's own optimizer; gradients scaled before Adam would move it by the rate alone."""
    method = lora_plus(2, ratio=16)
    params = start(pair("bert"), method)
    trainable, frozen = partition(params, method.trainable(params))
    settings = Settings(learning_rate=1e-3, warmup=0.0, schedule="constant", weight_decay=0.0)
    tx = make_optimizer(settings, 10, method)
    grads = jax.grad(lambda t: quadratic(combine(t, frozen)))(trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable, key=jax.random.key(0), step=0)
    sizes = {p: float(jnp.abs(u).max()) for p, u in flatten(updates).items() if p.endswith("/b")}
    assert sizes
    np.testing.assert_allclose(list(sizes.values()), 16e-3, rtol=0.01)


# LoRA-FA


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_lora_fa_is_lora_with_a_frozen(pair, name):
    base, method = pair(name), lora_fa(4, 6, ["linear"])
    targets = GPT2 if name == "gpt2" else ALL[name]
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=name == "gpt2")
    if name == "bert":
        config.exclude_modules = r".*pooler.*"
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    params = start(base, method)
    links = lora_links(theirs, params)
    randomise(theirs, links)
    trained = {path: link for path, link in links.items() if path.endswith("/b")}
    check(base, theirs, method, fill(params, links), trained)
    merged_is_theirs(base, fill(params, links), theirs)


def kept(method, tokens=11, width=32, r=3) -> list:
    """Shapes of what the backward pass through two weights in a row keeps, the parameters left out."""
    params = {"q": {"kernel": jnp.ones((width, width))}, "k": {"kernel": jnp.ones((width, width))}}
    params = method(r, targets=["[qk]/kernel"]).init(jax.random.key(0), params, ())
    trainable, frozen = partition(params, method(r).trainable(params))

    def forward(trainable, x):
        params = combine(trainable, frozen)
        return dot(params["k"]["kernel"], dot(params["q"]["kernel"], x))

    _, backward = jax.vjp(functools.partial(forward, x=jnp.ones((tokens, width))), trainable)
    return sorted(x.shape for x in jax.tree.leaves(backward) if tokens in x.shape)


def test_the_backward_pass_of_lora_fa_keeps_no_inputs():
    assert kept(lora_fa) == [(11, 3), (11, 3)]
    assert (11, 32) in kept(lora)


def test_lora_fa_keeps_its_a_beside_lora(pair):
    base = pair("bert")
    method = chain(lora(2), lora_fa(3, targets=["mlp_in", "embedding"]))
    params = start(base, method)
    trainable, _ = partition(params, method.trainable(params))
    paths = set(flatten(trainable))
    assert any(p.endswith("query/kernel/a") for p in paths)
    assert not any(p.endswith("intermediate/dense/kernel/a") for p in paths)
    assert any(p.endswith("intermediate/dense/kernel/b") for p in paths)
    embedding = {p for p in paths if "/word_embeddings/" in p}
    assert {p[-2:] for p in embedding} == {"/a"}, "the factor that starts at zero"
    assert count(optax.adamw(1e-3).init(trainable)) == 2 * count(trainable) + 1
    saved = {p for p, keep in flatten(method.saved(params)).items() if keep}
    assert paths < saved
    assert {p[-2:] for p in saved} == {"/a", "/b"}


# VeRA


VERA = {
    "bert": ({"r": 5, "target_modules": QV["bert"]}, vera(5)),
    "llama": ({"r": 40, "target_modules": ALL["llama"]}, vera(40, ["linear"])),  # inputs and outputs of many widths
    "gpt2": ({"r": 5, "target_modules": GPT2, "fan_in_fan_out": True}, vera(5, ["linear"])),
}


@pytest.mark.parametrize("name", VERA)
def test_vera_is_pefts(pair, name):
    config, method = VERA[name]
    base = pair(name)
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), peft.VeraConfig(**config)).eval()
    params = start(base, method)
    links, shared = {}, {}
    for path in nodes(params, VeRA):
        m = module(theirs, path)
        links |= {f"{path}/d": Link(m.vera_lambda_d["default"]), f"{path}/b": Link(m.vera_lambda_b["default"])}
        shared |= {
            f"{path}/shared_a": transposed(m.vera_A["default"]),
            f"{path}/shared_b": transposed(m.vera_B["default"]),
        }
    here = flatten(params)
    for path, link in (shared | links).items():
        assert here[path].shape == link.value().shape
        if path.endswith(("/d", "/b")):
            np.testing.assert_allclose(here[path], link.value(), err_msg=path)  # the same start
        else:
            bound = float(jnp.abs(link.value()).max())
            assert 0.9 * bound < float(jnp.abs(here[path]).max()) < bound / 0.9
    assert sum("vera_lambda" in n for n, _ in theirs.named_parameters()) == len(links)
    randomise(theirs, links)
    with torch.no_grad():
        for link in links.values():
            link.tensor.mul_(4)  # for gradients large enough to compare
    params = fill(params, links | shared)
    check(base, theirs, method, params, links)
    merged_is_theirs(base, params, theirs)


def test_vera_shares_two_arrays_and_saves_none(pair, tmp_path):
    base, method = pair("llama"), vera(40, ["linear"], seed=3)
    params = start(base, method)
    adapted = map_with_path(lambda p, x: x + 0.1 if p.endswith(("/d", "/kernel/b")) else x, params)
    save_adapter(tmp_path / "a", base.ours, method, adapted)
    assert {p.rpartition("/")[2] for p in load_file(tmp_path / "a")} == {"d", "b"}
    loaded = load_adapter(tmp_path / "a", base.ours).params
    for tree in (params, loaded):
        there = list(nodes(tree, VeRA).values())
        assert len({id(n.shared_a) for n in there}) == len({id(n.shared_b) for n in there}) == 1
    one, two = (next(iter(nodes(t, VeRA).values())) for t in (adapted, loaded))
    assert np.array_equal(one.shared_a, two.shared_a)
    assert np.array_equal(one.shared_b, two.shared_b)
    there = nodes(params, VeRA).values()
    added = sum(n.shape[1] + 40 for n in there)
    assert count(map_nodes(_once, params)) == count(base.ours.params) + added


def test_veras_shared_arrays_are_given_once_to_the_training_step(pair):
    """The plan of the step is far smaller than the arrays of all leaves."""
    base, method = pair("bert"), vera(4096, ["linear"])
    batch = {k: x[:1, :3] for k, x in base.batch.items()}

    def loss(params, batch, key):
        return (base.ours.forward(params, batch).logits ** 2).sum(), jnp.float32(1)

    params = start(base, method)
    settings = Settings(steps=2, batch_size=1)
    fitted = fit(params, method, loss, lambda i: iter([batch]), 1, settings, evaluate=lambda p: {"loss": 1.0})
    leaves = sum(x.nbytes for x in jax.tree.leaves(params))
    once = sum(x.nbytes for x in {id(x): x for x in jax.tree.leaves(params)}.values())
    assert fitted.peak_bytes < leaves / 2
    assert once < leaves / 4
    assert len({id(n.shared_a) for n in nodes(fitted.params, VeRA).values()}) == 1


def test_vera_with_other_shared_arrays_is_not_saved(pair, tmp_path):
    base, method = pair("bert"), vera(4)
    params = map_with_path(lambda p, x: x + 1 if p.endswith("shared_b") else x, start(base, method))
    with pytest.raises(ValueError, match=r"shared_b is not what its node's static fields give"):
        save_adapter(tmp_path / "a", base.ours, method, params)


def test_veras_shared_arrays_are_the_same_compiled_and_by_numpy():
    sizes = (70, 9, 30)
    eager, compiled = VeRA.regrow(5, sizes), jax.jit(lambda: VeRA.regrow(5, sizes))()
    keys = jax.random.split(jax.random.key(5))
    for key, (name, fan) in zip(keys, {"shared_a": 70, "shared_b": 9}.items(), strict=True):
        x = np.asarray(eager[name])
        assert np.array_equal(x, compiled[name])
        bits = np.asarray(jax.random.bits(key, x.shape, jnp.uint32)) >> 8
        bound = np.float32((6 / fan) ** 0.5)
        assert np.array_equal(x, (bits / 2**23 - 1).astype(np.float32) * bound)
        np.testing.assert_allclose(x.std(), bound / 3**0.5, rtol=0.1)
    assert not np.array_equal(eager["shared_a"], VeRA.regrow(6, sizes)["shared_a"])


def test_vera_products_are_the_equation(key):
    keys = jax.random.split(key, 3)
    shared = VeRA.regrow(0, (9, 4, 8))
    d, b = jax.random.normal(keys[0], (4,)), jax.random.normal(keys[1], (5,))
    v = VeRA(jax.random.normal(keys[2], (7, 5)), d, b, shared["shared_a"], shared["shared_b"], sizes=(9, 4, 8))
    w, a, up = (np.asarray(x, np.float64) for x in (v.base, shared["shared_a"][:7], shared["shared_b"][:, :5]))
    dense = w + a @ np.diag(np.asarray(d, np.float64)) @ up @ np.diag(np.asarray(b, np.float64))
    x, y = np.random.default_rng(0).normal(size=(2, 7)), np.random.default_rng(1).normal(size=(2, 5))
    np.testing.assert_allclose(v.materialize(), dense, atol=1e-5)
    np.testing.assert_allclose(dot(v, jnp.asarray(x, jnp.float32)), x @ dense, atol=1e-4)
    np.testing.assert_allclose(take(v, jnp.array([4, 0])), dense[[4, 0]], atol=1e-5)
    np.testing.assert_allclose(attend(v, jnp.asarray(y, jnp.float32)), y @ dense.T, atol=1e-4)


# Counts


COUNTS = {  # as published
    # Kopiczko et al. 2024, table 2: 0.043M for RoBERTa-base at rank 1024, 0.061M for large at 256
    "vera, base": (bert(), vera(1024), 43_008),
    "vera, large": (bert(24, 1024, 16), vera(256), 61_440),
    "lora_fa": (bert(), lora_fa(8), 24 * 8 * 768),
    "lora_plus": (bert(), lora_plus(8), 294_912),
    "pissa": (bert(), pissa(8), 294_912),
    "olora": (bert(), olora(8), 294_912),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    config, method, expected = COUNTS[name]
    assert trained_count(config, method) == expected
