"""FISH Mask beside the laws and the numerics: layouts, shapes, what it reads, and a whole run."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from peftjax import chain, compare, hub, masks, merge, partition, stack_layers, unstack_layers
from peftjax.checkpoint import load_adapter
from peftjax.loop import fit
from peftjax.methods import bitfit, fishmask, head, lora
from peftjax.methods.fishmask import NOWHERE, Sparse, fisher
from peftjax.methods.lora import LoRA
from peftjax.train import Settings
from peftjax.tree import count, flatten
from peftjax.weights import Trained, is_node, materialize

TREE = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(3.0) - 5, "layers": {"k": jnp.ones((4, 2))}}


def sparse(*indices, shape=(2, 3), value=10.0):
    base = jnp.arange(float(np.prod(shape))).reshape(shape)
    return Sparse(base, jnp.array(indices, jnp.int32), value + jnp.arange(float(len(indices))))


def tasteless(params, batch, key):
    """Gradients that are the parameters themselves, an example."""
    half_squares = sum(jnp.square(x.astype(jnp.float32)).sum() / 2 for x in jax.tree.leaves(params))
    return half_squares * batch["weight"].sum(), batch["weight"].sum()


def rows(n):
    return {"weight": jnp.ones(n)}


def observed(m, params=TREE, batches=None):
    return m.observed(tasteless, params, (), [rows(1)] if batches is None else batches)


def indices(params) -> dict:
    return {p: n.indices.tolist() for p, n in flatten(params, is_leaf=is_node).items() if isinstance(n, Sparse)}


# Layouts

LAYERS = {
    "counts that differ": [sparse(0, 4, 5), sparse(1), sparse(2, 3)],
    "plain in between": [sparse(0, 5), jnp.full((2, 3), 7.0), sparse(1)],
    "plain first": [jnp.full((2, 3), 7.0), sparse(0, 5)],
    "a vector": [sparse(2, shape=(3,)), sparse(0, 1, shape=(3,))],
    "under LoRA": [LoRA(w, jnp.ones((2, 1)), jnp.ones((1, 3))) for w in (sparse(0, 2), jnp.ones((2, 3)), sparse(5))],
    "over itself": [
        Sparse(sparse(0), jnp.array([1, 2]), jnp.ones(2)),
        Sparse(sparse(0, 5), jnp.array([3]), jnp.ones(1)),
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_different_counts_are_stacked_and_come_back(name):
    """Parameters, masks, halves of a partition and gradients."""
    m = fishmask()
    params = {f"h_{i}": {"q": {"kernel": w}} for i, w in enumerate(LAYERS[name])}
    stacked = stack_layers(params)
    assert tiny.same(unstack_layers(stacked), params)
    mask = m.trainable(params)
    assert jax.tree.leaves(stack_layers(mask)) == jax.tree.leaves(m.trainable(stacked))
    assert jax.tree.structure(unstack_layers(stack_layers(mask), like=stacked)) == jax.tree.structure(mask)
    for half, want in zip(partition(params, mask), partition(stacked, m.trainable(stacked)), strict=True):
        assert tiny.same(stack_layers(half), want)
        assert tiny.same(unstack_layers(want, like=stacked), half)
    dense, every = merge(params), merge(stacked)["h_*"]["q"]["kernel"]
    for i in range(len(params)):
        assert np.array_equal(every[i], dense[f"h_{i}"]["q"]["kernel"])
    abstract = jax.eval_shape(stack_layers, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(stacked)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(stacked)
    ]
    traced = jax.jit(lambda t: merge(unstack_layers(t)))(stacked)  # padding stays where its extent is not known
    assert tiny.same(traced, dense)


def test_padding_gets_no_gradient():
    stacked = stack_layers({"h_0": {"w": sparse(0, 4)}, "h_1": {"w": sparse(1)}})["h_*"]["w"]
    assert stacked.indices.tolist() == [[0, 4], [1, NOWHERE]]

    def loss(values):
        return (3 * Sparse(stacked.base, stacked.indices, values).materialize()).sum()

    assert jax.grad(loss)(stacked.values).tolist() == [[3, 3], [3, 0]]


def test_other_nodes_are_not_aligned():
    with pytest.raises(ValueError, match=r"h_1 differs from h_0 in \['w.*; use the per-layer layout"):
        stack_layers({"h_0": {"w": sparse(1)}, "h_1": {"w": Trained(jnp.ones((2, 3)))}})


def test_a_scanned_run_counts_what_trains_and_not_the_padding():
    params = {f"h_{i}": {"w": jnp.full((2, 3), 1.0 + i)} for i in range(3)} | {"out": jnp.ones(2)}
    m = observed(fishmask(count=8), params)
    new = m.init(jax.random.key(0), params, ())
    assert indices(new) == {"h_1/w": [0, 1], "h_2/w": [0, 1, 2, 3, 4, 5]}
    s = Settings(steps=2, batch_size=1, layout="scan")
    fitted = fit(new, m, tasteless, lambda i: iter([rows(1)]), 1, s)
    assert fitted.params["h_*"]["w"].values.shape == (3, 6)
    assert fitted.trainable == 8
    assert indices(unstack_layers(fitted.params)) == indices(new)


# The node


@pytest.mark.parametrize("values", [jnp.float32, jnp.bfloat16])
def test_the_base_decides_the_dtype(values):
    w = sparse(1, 5)
    w = Sparse(w.base.astype(jnp.bfloat16), w.indices, w.values.astype(values))
    assert materialize(w).dtype == w.dtype == jnp.bfloat16
    assert materialize(w).tolist() == [[0, 10, 2], [3, 4, 11]]


# What is chosen


@pytest.mark.parametrize("k", [1, 4, 9, 16, 17])
def test_of_equal_scores_the_first_are_chosen(k):
    ones = jax.tree.map(jnp.ones_like, TREE)
    got = indices(observed(fishmask(count=k), ones).init(jax.random.key(0), ones, ()))
    assert [i for path in flatten(ones) for i in got.get(path, [])] == [*range(min(k, 3)), *range(8), *range(6)][:k]


def test_the_targets_bound_the_choice():
    model = hub.from_config(tiny.config("bert"), "classification")
    n, heads = count(model.params), 2 * (tiny.WIDTH + 1)
    for targets, pattern in ((["query"], "query/kernel"), ([".*/bias"], "/bias"), (None, "")):
        m = fishmask(0.03, targets=targets, score="random")
        new = m.init(jax.random.key(0), model.params, model.sites)
        assert sum(map(len, indices(new).values())) == int(0.03 * n) - heads  # of all parameters, whatever the targets
        assert all(p.endswith(pattern) for p in indices(new))
        assert targets or not any(p.startswith("classifier") for p in indices(new))


def test_random_entries_are_uniform_and_follow_the_key():
    m = fishmask(count=5, score="random")
    hits = {p: np.zeros(x.size) for p, x in flatten(TREE).items()}
    for i in range(300):
        got = indices(m.init(jax.random.key(i), TREE, ()))
        assert sum(map(len, got.values())) == 5
        for p, at in got.items():
            hits[p][at] += 1
    every = np.concatenate(list(hits.values())) / 300
    assert np.abs(every - 5 / 17).max() < 4 * np.sqrt(5 / 17 * 12 / 17 / 300)
    same = [indices(m.init(jax.random.key(7), TREE, ())) for _ in range(2)]
    assert same[0] == same[1]


def test_from_shapes_the_counts_are_right_and_no_choice_is_made():
    for k in (1, 5, 16, 17):
        for m in (fishmask(count=k), fishmask(count=k, score="random")):
            new = jax.eval_shape(lambda p, m=m: m.init(jax.random.key(0), p, ()), TREE)
            sizes = [n.values.shape[0] for n in flatten(new, is_leaf=is_node).values() if isinstance(n, Sparse)]
            assert sum(sizes) == k
            assert k < 17 or sizes == [3, 8, 6]
    new = jax.jit(lambda p: fishmask(count=5).init(jax.random.key(0), p, ()))(TREE)
    assert all(np.isnan(n.values).all() for n in flatten(new, is_leaf=is_node).values() if isinstance(n, Sparse))
    chosen = observed(fishmask(count=5))
    traced = jax.jit(lambda p: chosen.init(jax.random.key(0), p, ()))(TREE)
    assert tiny.same(traced, chosen.init(jax.random.key(0), TREE, ()))


# What is read


def test_examples_are_counted_up_to_samples():
    read = []

    def batches():
        for weights in ([1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 1]):
            read.append(weights)
            yield {"weight": jnp.array(weights, jnp.float32), "x": jnp.arange(3.0) + 10 * len(read)}

    def linear(params, batch, key):
        return (params["w"] * batch["x"] * batch["weight"]).sum(), batch["weight"].sum()

    got = fisher(linear, {"w": jnp.ones(())}, batches(), samples=4)["w"]
    assert got == np.mean(np.square([10, 12, 30, 31]))
    assert len(read) == 3
    assert fisher(linear, {"w": jnp.ones(())}, [rows(2) | {"x": jnp.array([1.0, 3.0])}])["w"] == 5


def test_fisher_scores_what_the_mask_says_in_float32():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), TREE) | {"ids": jnp.arange(3)}

    def loss(params, batch, key):
        return tasteless({k: v for k, v in params.items() if k != "ids"}, batch, key)

    got = fisher(loss, half, [rows(1)])
    assert {x.dtype.name for x in jax.tree.leaves(got)} == {"float32"}
    assert got["ids"] is None
    only = fisher(loss, half, [rows(1)], mask=masks.by_path("b"))
    assert list(flatten(only)) == ["b"]


def test_data_that_give_no_information_are_errors():
    with pytest.raises(ValueError, match="at least one example with a weight above 0"):
        fisher(tasteless, TREE, [{"weight": jnp.zeros(3)}])
    with pytest.raises(ValueError, match=r"gradient is not finite at \['b'\] \(1 leaves\)"):
        fisher(tasteless, TREE | {"b": jnp.full(3, jnp.inf)}, [rows(1)])


def test_only_methods_that_need_data_read_them():
    def unread():
        raise AssertionError("read")
        yield

    for m in (lora(), chain(bitfit(), lora()), fishmask(score="random"), head()):
        assert m.observed(tasteless, TREE, (), unread()) is m
    two = chain(fishmask(count=2, targets=["w"]), fishmask(count=2, targets=["layers/k"]))
    one_pass = iter([rows(1), rows(1)])
    assert set(indices(observed(two, batches=one_pass).init(jax.random.key(0), TREE, ()))) == {"w", "layers/k"}


def test_what_was_observed_must_be_what_is_adapted():
    m = observed(fishmask(count=12))
    with pytest.raises(ValueError, match="is not what it was when the method observed"):
        m.init(jax.random.key(0), TREE | {"w": jnp.ones((3, 3))}, ())
    with pytest.raises(ValueError, match="is stacked; use unstack_layers first"):
        observed(fishmask(count=1), stack_layers({"h_0": {"w": jnp.ones(2)}, "h_1": {"w": jnp.ones(2)}}))


# A whole run


@pytest.mark.parametrize("layout", ["loop", pytest.param("scan", marks=pytest.mark.slow)])
def test_a_run_from_the_command_line_that_is_killed_and_resumed(layout, tmp_path):
    model, data = tiny.folder(tmp_path / "bert", "bert"), tiny.data(tmp_path / "rte", "rte")
    settings = Settings(steps=4, batch_size=8, save_every=1, layout=layout, learning_rate=1e-2)

    def train(out, report=lambda record: None):
        return compare.train(
            str(model),
            "rte",
            str(data),
            method="fishmask(fraction=0.05, samples=20)",
            rate=None,
            out=tmp_path / out,
            settings=settings,
            watch=lambda title: nullcontext(report),
            max_buckets=1,
        )

    def kill(record):
        if record["step"] == 2:
            raise RuntimeError("killed")

    whole = train("whole")
    with pytest.raises(RuntimeError, match="killed"):
        train("cut", kill)
    resumed = train("cut")
    problem = tiny.problem(tmp_path, "bert", "rte", max_buckets=1)
    n = count(problem.model.params)
    for result in (whole, resumed):
        assert result["trainable"] == int(0.05 * n)
        assert result["share"] == int(0.05 * n) / n
    files = [tmp_path / out / "adapter.safetensors" for out in ("whole", "cut")]
    loaded = [load_adapter(f, problem.model) for f in files]
    assert tiny.same(loaded[0].params, loaded[1].params)
    params, m = loaded[0].params, loaded[0].method
    assert count(partition(params, m.trainable(params))[0]) == int(0.05 * n)
    assert [r["loss"] for r in whole["history"] if "loss" in r] == [
        r["loss"] for r in resumed["history"] if "loss" in r
    ]
    scores = compare.evaluate(str(model), "rte", str(data), adapter=files[0], max_buckets=1)
    assert scores == pytest.approx(whole["scores"], rel=1e-5)
