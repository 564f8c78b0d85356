"""Adapter arithmetic against dense numpy, Hugging Face PEFT where that is right, and what the nodes compute."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_methods import CASES, FAMILIES, _adapt, _batch, _logits, _noise, _steps

from peftjax import chain, hub, merge, quantize, stack_layers
from peftjax.arithmetic import (
    Product,
    adapter,
    combine_updates,
    compress,
    dense,
    difference,
    drop,
    fold_scale,
    pad_rank,
    swap,
    to_lora,
    trim,
    updates,
)
from peftjax.checkpoint import load_adapter, read_header, save_adapter
from peftjax.methods import adalora, bitfit, dora, dylora, from_spec, head, ia3, lora, pissa, prefix, vera
from peftjax.tree import cast, flatten, map_with_path
from peftjax.weights import Trained, is_node

NODES_OF_THEIR_OWN = (  # one of each kind; the others are slow
    *("full", "bitfit-subset", "fishmask-random", "lora over fishmask", "lora-patterns", "lora over lora", "vera"),
    *("dora", "adalora", "dylora", "pissa", "ia3", "lora+ia3+head", "trainable_tokens", "lora+neftune"),
)
MERGES = [
    pytest.param(name, marks=() if name in NODES_OF_THEIR_OWN else pytest.mark.slow)
    for name, case in CASES.items()
    if case.merges
]


@pytest.fixture(scope="module")
def models():
    return {"gpt2": FAMILIES["gpt2"](), "llama": FAMILIES["llama"]()}


@pytest.fixture(scope="module")
def model(models):
    return models["llama"]


def adapted(model, method, seed=0):
    """With values as if it had been trained, which follow from the seed."""
    params = method.init(jax.random.key(seed), model.params, model.sites)
    rng = np.random.default_rng(seed)

    def move(trains, x):
        return x + 0.3 * rng.normal(size=x.shape).astype(np.float32) if trains else x

    return jax.tree.map(move, method.trainable(params), params)


def arrays(params):
    return {p: np.asarray(x, np.float64) for p, x in flatten(merge(params)).items()}


def changes_of(model, params):
    """The true change of every array by merging, in float64."""
    base = arrays(model.params)
    return {p: x - base.get(p, 0.0) for p, x in arrays(params).items()}


def assert_updates(got, want, atol=1e-5):
    assert {*got} <= {*want}
    for path, change in want.items():
        here = dense(got[path]) if path in got else np.zeros(())
        assert path not in got or here.dtype == np.float32
        np.testing.assert_allclose(here + np.zeros_like(change), change, atol=atol, err_msg=path)


def close(one, two, atol=1e-4):
    one, two = arrays(one), arrays(two)
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_allclose(x, two[path], atol=atol, err_msg=path)


# The true update


@pytest.mark.parametrize("name", MERGES)
def test_every_mergeable_method_as_lora_keeps_the_function(models, name, tmp_path):
    model = models["gpt2"]  # whose query, key and value are one
    method = CASES[name].method
    params = method.resolve(_noise(_adapt(model, method), 0.2), None)
    changes = updates(model, params)
    assert_updates(changes, changes_of(model, params))
    made = to_lora(model, params, energy=1)
    close(made.params, params)
    assert made.error == 0
    assert made.energy == 1
    heads = {p for p in changes if p.startswith("score/") and not isinstance(changes[p], Product)}
    for path, change in changes.items():
        node = flatten(made.params, is_leaf=is_node).get(path)
        if change.ndim == 2 if not isinstance(change, Product) else True:
            want = "Trained" if path in heads else "LoRA"
            assert type(node).__name__ == want or not dense(change).any()
        else:
            assert isinstance(node, Trained)
    if name in ("lora-patterns", "lora+ia3+head"):  # the nodes run, the file loads, the spec makes the same
        np.testing.assert_allclose(_logits(model, made.params), _logits(model, params), atol=1e-4)
        save_adapter(tmp_path / "a.safetensors", model, made.method, made.params)
        again = load_adapter(tmp_path / "a.safetensors", model)
        assert tiny.same(again.params, made.params)
        assert again.method.spec == made.method.spec
        fresh = from_spec(made.method.spec).init(jax.random.key(0), model.params, model.sites)
        assert jax.tree.structure(fresh) == jax.tree.structure(made.params)
        assert [x.shape for x in jax.tree.leaves(fresh)] == [x.shape for x in jax.tree.leaves(made.params)]


@pytest.mark.parametrize("family", [pytest.param(f, marks=() if f == "bert" else pytest.mark.slow) for f in FAMILIES])
def test_every_matrix_of_a_family_takes_a_lora(family):
    """The nodes run where a dense change was found: tables of positions and types, heads of their own."""
    model = FAMILIES[family]()
    params = _noise(model.params, 0.05)
    made = to_lora(model, params, energy=1)
    assert {p for p, n in flatten(made.params, is_leaf=is_node).items() if not is_node(n)} == set()
    np.testing.assert_allclose(_logits(model, made.params), _logits(model, params), atol=1e-3)


LOW_RANK = {
    "lora": (lora(rank=3, alpha=5, rslora=True), 3),
    "adalora": (adalora(2, 3), 3),
    "dylora": (dylora(rank=3, alpha=2), 3),
    "vera": (vera(rank=3), 3),
    "pissa": (pissa(rank=2, alpha=3), 4),
    "nested": (chain(lora(rank=2), vera(rank=3)), 5),
}


@pytest.mark.parametrize("name", LOW_RANK)
def test_products_stay_products_of_their_rank(model, name):
    method, rank = LOW_RANK[name]
    params = adapted(model, method)
    got = updates(model, params)
    assert {x.rank for x in got.values() if isinstance(x, Product)} == {rank}
    assert all(isinstance(x, Product) for x in got.values())
    assert to_lora(model, params).method.spec[0][1]["rank"] == rank, "no rank need be said"
    assert_updates(updates(model, stack_layers(params)), changes_of(model, params))


def test_parts_of_a_fused_weight_stand_in_their_columns(models):
    model = models["gpt2"]
    params = adapted(model, lora(rank=2, targets=["query", "value"], rank_pattern={"value": 3}))
    assert_updates(updates(model, params), changes_of(model, params))
    change = updates(model, params)["transformer/h_0/attn/c_attn/kernel"]
    assert isinstance(change, Product)
    assert change.rank == 5
    assert not dense(change)[:, 16:32].any()
    assert dense(change)[:, :16].any()


def test_dead_ranks_of_adalora_are_left_out(model):
    params = adapted(model, adalora(2, 4, targets=["query"]))
    params = map_with_path(
        lambda p, x: x.at[1:].set(0) if p.endswith("layers_0/self_attn/q_proj/kernel/lam") else x, params
    )
    made = to_lora(model, params)
    ((_, arguments),) = made.method.spec
    assert arguments["rank_pattern"] == {"model/layers_0/self_attn/q_proj/kernel": 1} or arguments["rank"] == 1
    close(made.params, params)


def test_created_biases_are_created_again(tmp_path):
    model = hub.from_config(tiny.config("llama"), "causal-lm")
    method = bitfit(["query", "mlp_out"], create=True)
    params = adapted(model, method)
    made = adapter(model, updates(model, params))
    close(made.params, params)
    assert [name for name, _ in made.method.spec] == ["bitfit"]
    save_adapter(tmp_path / "a", model, made.method, made.params)
    assert tiny.same(load_adapter(tmp_path / "a", model).params, made.params)


def test_a_new_head_counts_from_zero(model, tmp_path):
    drawn = model._replace(fresh=("score/kernel",))
    params = adapted(drawn, chain(lora(rank=2), head()))
    change = updates(drawn, params)["score/kernel"]
    assert np.array_equal(change, params["score"]["kernel"].value)
    made = to_lora(drawn, params)
    assert np.array_equal(made.params["score"]["kernel"].value, params["score"]["kernel"].value)
    save_adapter(tmp_path / "a", drawn, made.method, made.params)
    half = combine_updates([updates(drawn, params)] * 2, [0.25, 0.25], "ties", density=0.1, exempt=drawn.fresh)
    np.testing.assert_allclose(half["score/kernel"], 0.5 * change, rtol=1e-6)


def test_a_quantised_base_is_not_dequantised_by_products_and_keeps_its_codes(models, tmp_path):
    for family in ("llama", "gpt2"):
        model = models[family]
        small = model._replace(params=quantize.quantize(model.params, model.sites, "nf4"))
        one = adapted(small, lora(rank=2, targets=["query"], alpha=4))
        changes = updates(small, one)
        assert_updates(changes, changes_of(small, one))
        assert all(isinstance(x, Product) for x in changes.values())
        made = to_lora(small, one)
        close(made.params, one)
        save_adapter(tmp_path / "a", small, made.method, made.params)
        assert tiny.same(load_adapter(tmp_path / "a", small).params, made.params)
        tall = adapted(small, dora(rank=2, targets=["query"]))
        assert_updates(updates(small, tall), changes_of(small, tall))
        with pytest.raises(ValueError, match=r"c_attn|q_proj/kernel is no low-rank product, and codes hold no other"):
            adapter(small, updates(small, tall))
        close(to_lora(small, tall, energy=1).params, tall)


def test_a_bfloat16_base_is_widened(model):
    small = model._replace(params=cast(model.params, jnp.bfloat16))
    params = adapted(small, dora(rank=2, targets=["query"]))
    wide = model._replace(params=cast(small.params, jnp.float32))
    exact = adapted(wide, dora(rank=2, targets=["query"]))
    assert_updates(updates(small, params), changes_of(wide, exact))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (prefix(2), r"no arithmetic with model/layers_0/self_attn/prefix: Prefix computes what no weight"),
        (prefix(2, mlp=True, hidden=3), "no arithmetic with .*prefix"),
        (CASES["prompt"].method, "no arithmetic with model/prompt"),
        (CASES["adapter"].method, r"no arithmetic with model/layers_0/attention_output: Adapter"),
    ],
)
def test_what_no_weight_can_hold_is_refused_by_name(model, method, message):
    with pytest.raises(ValueError, match=message):
        updates(model, method.init(jax.random.key(0), model.params, model.sites))


def test_what_adapts_a_tied_look_up_alone_is_refused():
    tied = hub.from_config(tiny.config("gpt2"), "causal-lm")
    for method in (lora, dora):
        params = adapted(tied, method(rank=2, targets=["embedding"], tied_embedding="take"))
        with pytest.raises(ValueError, match=r"no arithmetic with transformer/wte/embedding: .*look-up"):
            updates(tied, params)
    close(to_lora(tied, params := adapted(tied, lora(rank=2, targets=["embedding"]))).params, params)


def test_another_base_is_refused(model, models):
    params = adapted(model, lora(rank=2))
    with pytest.raises(ValueError, match=r"another base|has no such array"):
        updates(models["gpt2"], params)
    wide = hub.from_config(tiny.config("llama", intermediate_size=32), "causal-lm")
    with pytest.raises(ValueError, match=r"shape \(16, 24\), the base's has \(16, 32\): another base"):
        updates(wide, hub.from_config(tiny.config("llama"), "causal-lm").params)


# Sums


def some(shapes, seed, rank=None):
    rng = np.random.default_rng(seed)

    def one(s):
        if rank is None or len(s) == 1:
            return rng.normal(size=s).astype(np.float32)
        return Product(*(rng.normal(size=x).astype(np.float32) for x in ((s[0], rank), (rank, s[1]))))

    return {p: one(s) for p, s in shapes.items()}


SHAPES = {"q": (6, 5), "v": (4, 7), "bias": (9,)}


def test_a_sum_of_products_is_exact_and_their_ranks_add(model):
    one, two = (adapted(model, m, i) for i, m in enumerate((lora(rank=2, alpha=3), lora(rank=3, targets=["query"]))))
    both = [updates(model, x) for x in (one, two)]
    got = combine_updates(both, [0.7, -0.3])
    assert {x.rank for x in got.values()} == {2, 5}
    want = [changes_of(model, x) for x in (one, two)]
    assert_updates(got, {p: 0.7 * want[0][p] - 0.3 * want[1][p] for p in want[0]})
    nothing = combine_updates([both[0]] * 2, [1, -1])
    assert max(np.abs(dense(x)).max() for x in nothing.values()) < 1e-6


def test_ties_is_the_papers():
    changes, weights, density = [some(SHAPES, i) for i in range(3)], [0.7, 1.0, -0.4], 0.4
    for elect in ("total", "frequency"):
        got = combine_updates(changes, weights, "ties", density=density, elect=elect)
        tau = np.stack([np.concatenate([c[p].ravel() for p in SHAPES]) for c in changes]).astype(np.float64)
        for t in tau:  # trim: of each whole task vector
            t[np.argsort(-np.abs(t))[int(density * len(t)) :]] = 0
        tau *= np.array(weights)[:, None]
        gamma = np.sign(tau.sum(0))
        if elect == "frequency":
            votes = np.sign(np.sign(tau).sum(0))
            gamma = np.where(votes == 0, gamma, votes)
        want = []
        for column, sign in zip(tau.T, gamma, strict=True):
            agree = [x for x in column if x and np.sign(x) == sign]
            want.append(np.mean(agree) if agree else 0.0)
        np.testing.assert_allclose(np.concatenate([got[p].ravel() for p in SHAPES]), want, atol=1e-6)
    assert np.count_nonzero(trim(changes[0], density)["q"]) != int(density * 30), "over all arrays, not each"


def test_dare_keeps_what_is_expected():
    change = {"q": np.ones((200, 300), np.float32), "v": np.ones((200, 300), np.float32)}
    got = combine_updates([change, change], [1.0, 1.0], "dare", density=0.25, seed=3)
    again = combine_updates([change, change], [1.0, 1.0], "dare", density=0.25, seed=3)
    other = combine_updates([change, change], [1.0, 1.0], "dare", density=0.25, seed=4)
    assert np.array_equal(got["q"], again["q"])
    assert not np.array_equal(got["q"], other["q"])
    assert not np.array_equal(got["q"], got["v"]), "each array is drawn for itself"
    assert {*np.unique(got["q"])} == {0.0, 4.0, 8.0}, "each adapter too"
    assert abs(got["q"].mean() - 2) < 0.05
    parts = [drop(change, 0.25, jax.random.fold_in(jax.random.key(3), i))["q"] for i in range(2)]
    assert np.array_equal(got["q"], parts[0] + parts[1])
    elected = combine_updates([change, change], [1.0, 1.0], "dare-ties", density=0.25, seed=3)["q"]
    want = np.where((parts[0] != 0) | (parts[1] != 0), 4.0, 0.0)
    assert np.array_equal(elected, want), "the mean of those that are there"
    whole = combine_updates([change], [2.0], "dare", density=1)
    assert np.array_equal(whole["q"], 2 * change["q"])


@pytest.mark.filterwarnings("ignore")  # of torch and peft
def test_against_pefts_weighted_adapters():
    """Theirs is right for 'cat', the '*svd' ways, and 'linear' of one adapter; of two, it has cross terms."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = torch.nn.Linear(12, 10, bias=False)

    configs = [peft.LoraConfig(r=3, lora_alpha=alpha, target_modules=["q"]) for alpha in (6, 3)]
    net = peft.get_peft_model(Net(), configs[0], adapter_name="a0")
    net.add_adapter("a1", configs[1])
    layer, rng = net.base_model.model.q, np.random.default_rng(0)
    ours = []
    for i, scale in enumerate((2.0, 1.0)):
        a, b = (rng.normal(size=s).astype(np.float32) for s in ((12, 3), (3, 10)))
        layer.lora_A[f"a{i}"].weight.data, layer.lora_B[f"a{i}"].weight.data = torch.tensor(a.T), torch.tensor(b.T)
        ours.append({"q": Product(a, scale * b)})

    def theirs(kind, weights, **options):
        name = f"new{len(layer.lora_A)}"
        net.add_weighted_adapter([f"a{i}" for i in range(len(weights))], weights, name, kind, **options)
        return layer.get_delta_weight(name).detach().numpy().T

    def us(weights, how="sum", rank=None, **options):
        change = combine_updates(ours[: len(weights)], weights, how, **options)["q"]
        return dense(change if rank is None else compress(change, rank)[0])

    weights = [0.7, 0.4]
    true = sum(w * dense(c["q"]) for w, c in zip(weights, ours, strict=True))
    np.testing.assert_allclose(us(weights), true, atol=1e-5)
    np.testing.assert_allclose(theirs("cat", weights), true, atol=1e-5)
    np.testing.assert_allclose(theirs("svd", weights, svd_rank=10), true, atol=1e-5)
    np.testing.assert_allclose(us(weights, rank=4), theirs("svd", weights, svd_rank=4), atol=1e-5)
    np.testing.assert_allclose(us([0.7]), theirs("linear", [0.7]), atol=1e-5)
    assert np.abs(theirs("linear", weights) - true).max() > 0.5, "the terms A_0 B_1 and A_1 B_0"
    for kind, how in (("ties_svd", "ties"), ("magnitude_prune_svd", "prune")):
        got = us([0.5, 0.5], how, density=0.4, rank=10)
        np.testing.assert_allclose(got, theirs(kind, [0.5, 0.5], svd_rank=10, density=0.4), atol=1e-5)
    assert np.abs(us(weights, "prune", density=0.4) - theirs("magnitude_prune", weights, density=0.4)).max() > 0.5


BAD = {
    "nothing": (lambda c: combine_updates([], []), "nothing to combine"),
    "weights missing": (lambda c: combine_updates([c, c], [1.0]), "2 adapters and 1 weights; give one weight for each"),
    "a weight no number": (lambda c: combine_updates([c], [float("nan")]), "finite number, such as 0.5 or -1; got nan"),
    "way": (lambda c: combine_updates([c], [1], "svd"), "no way 'svd' to combine; there are sum, ties"),
    "election": (lambda c: combine_updates([c], [1], "ties", density=1, elect="most"), "total, frequency; got 'most'"),
    "density missing": (lambda c: combine_updates([c], [1], "ties"), r"ties: density, .* in \(0, 1\]; got None"),
    "density 0": (lambda c: combine_updates([c], [1], "dare", density=0), r"dare: density.*\(0, 1\]; got 0"),
    "density above 1": (lambda c: combine_updates([c], [1], "prune", density=1.5), r"\(0, 1\]; got 1.5"),
    "density of a sum": (lambda c: combine_updates([c], [1], density=0.5), "leave density=0.5 out"),
    "shapes": (
        lambda c: combine_updates([c, {"q": c["v"]}], [1, 1]),
        r"updates of q have the shapes \[\(4, 7\), \(6, 5\)\]",
    ),
    "rank 0": (lambda c: compress(c["q"], 0), "rank must be a whole number of at least 1; got 0"),
    "energy 0": (lambda c: compress(c["q"], energy=0), r"in \(0, 1\]; got 0"),
    "of a vector": (lambda c: compress(c["bias"]), r"shape \(9,\) is no matrix"),
    "not finite": (lambda c: compress(c["q"] * np.nan), "not finite"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    make, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        make(some(SHAPES, 0))


def test_bad_input_of_adapters(model):
    change = updates(model, adapted(model, dora(rank=2)))
    with pytest.raises(ValueError, match="rank 17 is larger than any matrix here; write a rank of at most 16"):
        adapter(model, change, rank=17)
    with pytest.raises(ValueError, match="q_proj/kernel is no low-rank product; write rank=, or energy="):
        to_lora(model, adapted(model, dora(rank=2)))
    with pytest.raises(ValueError, match="nothing changes"):
        adapter(model, {})
    with pytest.raises(ValueError, match="nothing changes"):
        to_lora(model, model.params)
    with pytest.raises(ValueError, match="the base has no nowhere"):
        adapter(model, {"nowhere": np.ones(3)})
    with pytest.raises(ValueError, match=r"shape \(3,\), the base's array \(16,\)"):
        adapter(model, {"model/norm/scale": np.ones(3)})


# Low-rank forms


@pytest.mark.parametrize("rank", [None, 2])
def test_compression_is_the_svd_of_the_dense_sum(rank):
    for change in (
        some({"q": (30, 20)}, 0)["q"],
        combine_updates([some({"q": (30, 20)}, i, 3) for i in (1, 2)], [1, -2])["q"],
    ):
        u, s, v = np.linalg.svd(dense(change).astype(np.float64), full_matrices=False)
        there = int((s > 1e-5).sum())
        got, kept = compress(change, rank)
        r = rank or there
        assert got.rank == kept.rank == r
        np.testing.assert_allclose(dense(got), (u[:, :r] * s[:r]) @ v[:r], atol=1e-4)
        assert kept.energy == pytest.approx((s[:r] ** 2).sum() / (s**2).sum(), abs=1e-6)
        assert kept.error == pytest.approx(s[r] if r < there else 0, abs=1e-4)
        assert np.abs(dense(got) - dense(change)).max() <= kept.error + 1e-4
        np.testing.assert_allclose((got.a**2).sum(0), (got.b**2).sum(1), rtol=1e-4), "the two share each value"


def test_energy_takes_the_smallest_rank_that_keeps_it():
    u, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 9)))
    change = (u[:, :4] * np.sqrt([50, 30, 15, 5])) @ u[:, 4:8].T
    for energy, rank in ((0.4, 1), (0.5001, 2), (0.79, 2), (0.9, 3), (0.96, 4), (1, 4)):
        got, kept = compress(change.astype(np.float32), energy=energy)
        assert got.rank == rank
        assert kept.energy >= min(energy, 1 - 1e-6)
    assert compress(change.astype(np.float32), 2, 0.96)[0].rank == 2, "both hold"
    assert compress(np.zeros((4, 3), np.float32), 2)[0] is None


def test_products_are_compressed_without_a_dense_matrix():
    rng = np.random.default_rng(0)
    tall = Product(*(rng.normal(size=s).astype(np.float32) for s in ((300_000, 4), (4, 200_000))))  # 240 GB if it were
    got, kept = compress(tall, 2)
    assert got.a.shape == (300_000, 2)
    assert 0.4 < kept.energy < 0.7


def test_results_train_and_layers_share_patterns(model, tmp_path):
    both = [updates(model, adapted(model, m, i)) for i, m in enumerate((lora(rank=2), ia3(), chain(bitfit(), head())))]
    made = adapter(model, combine_updates(both, [0.5, 0.3, 0.2], "ties", density=0.5), rank=4)
    (one, loras), (two, whole) = made.method.spec
    assert (one, two) == ("lora", "full")
    assert loras["rank"] == 4
    assert r"model/layers_\d+/self_attn/q_proj/kernel" in loras["targets"]
    assert r"model/layers_\d+/self_attn/q_proj/bias" in whole["targets"]
    assert len(loras["targets"]) < 8
    assert 0 < made.energy < 1
    assert made.error > 0
    fitted = _steps(model, made.method, made.params, n=6)
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"]
    save_adapter(tmp_path / "a", model, made.method, fitted.params)
    assert np.allclose(_logits(model, load_adapter(tmp_path / "a", model).params), _logits(model, fitted.params))


def test_the_difference_of_two_models(model, tmp_path):
    tuned = model._replace(params=merge(adapted(model, chain(lora(rank=2, targets=["linear"]), bitfit(), head()))))
    made = difference(model, tuned, energy=1 - 1e-6)
    close(made.params, tuned.params, 5e-3)
    assert {k.rank for k in made.kept.values()} == {2}
    assert [name for name, _ in made.method.spec] == ["lora", "full"]
    assert len(made.kept) == 2 * 7
    assert difference(model, tuned, 1).energy < 1
    close(difference(model, tuned, energy=1).params, tuned.params)
    close(difference(model, tuned).params, tuned.params, 1e-6)
    save_adapter(tmp_path / "a", model, made.method, made.params)
    assert tiny.same(load_adapter(tmp_path / "a", model).params, made.params)
    with pytest.raises(
        ValueError, match="configs of the base and of the tuned model differ: intermediate_size 24 and 32"
    ):
        difference(*(hub.from_config(tiny.config("llama", intermediate_size=n), "causal-lm") for n in (24, 32)))
    with pytest.raises(ValueError, match=r"base is a LlamaForSeq.* and the tuned model a GPT2"):
        difference(model, FAMILIES["gpt2"]())
    with pytest.raises(ValueError, match="nothing changes"):
        difference(model, model)


# Hot swap


def test_swap_compiles_once(model):
    traced = []

    @jax.jit
    def forward(params, batch):
        traced.append(1)
        return model.forward(params, batch).logits

    small = lora(rank=2, alpha=6, dropout=0.1)
    one, two = adapted(model, lora(rank=4, alpha=4), 1), adapted(model, small, 2)
    running = fold_scale(one)
    first = forward(running, _batch())
    with pytest.raises(ValueError, match=r"q_proj/kernel has scale 1.0 in one and 3.0 in the other.*fold_scale"):
        swap(running, two)
    with pytest.raises(ValueError, match=r"kernel/a is float32\[16, 4\] in one and float32\[16, 2\].*pad_rank"):
        swap(running, fold_scale(two))
    swapped = swap(running, pad_rank(fold_scale(two), running))
    second = forward(swapped, _batch())
    with jax.log_compiles(False):
        assert len(traced) == 1
    assert forward._cache_size() == 1
    np.testing.assert_allclose(first, _logits(model, one), atol=1e-5)
    np.testing.assert_allclose(second, _logits(model, two), atol=1e-5)
    assert np.abs(first - second).max() > 1e-2
    place = ("model", "layers_0", "self_attn", "q_proj", "kernel")
    old, new = running, swapped
    for part in place:
        old, new = old[part], new[part]
    assert new.base is old.base
    assert swap(running, running)["score"]["kernel"] is running["score"]["kernel"]
    back = forward(swap(swapped, running), _batch())
    assert np.array_equal(back, first)
    assert forward._cache_size() == 1


def test_swap_keeps_where_arrays_are(model):
    device = jax.devices()[0]
    running = jax.device_put(fold_scale(adapted(model, lora(rank=2), 1)), device)  # committed, as sharded ones are
    f = jax.jit(lambda p: model.forward(p, _batch()).logits)
    f(running)
    other = adapted(model, lora(rank=2), 2)
    new = swap(running, fold_scale(other))
    f(new)
    assert f._cache_size() == 1
    stacked = swap(stack_layers(running), stack_layers(fold_scale(other)))
    assert tiny.same(stacked, stack_layers(new))


def test_swap_refuses_what_would_compile_again_or_is_of_another_base(model, models):
    one = adapted(model, lora(rank=2), 1)
    with pytest.raises(ValueError, match=r"q_proj/kernel is LoRA in one and DoRA in the other.*to_lora"):
        swap(one, adapted(model, dora(rank=2)))
    with pytest.raises(ValueError, match="k_proj/kernel is an array in one and LoRA in the other"):
        swap(one, adapted(model, lora(rank=2, targets=["query", "key", "value"])))
    with pytest.raises(ValueError, match="is in one adapter only"):
        swap(one, adapted(model, chain(lora(rank=2), prefix(2))))
    moved = adapted(model._replace(params=_noise(model.params, 0.1)), lora(rank=2))
    with pytest.raises(ValueError, match="q_proj/kernel/base is the base's, and the two differ there"):
        swap(one, moved)
    with pytest.raises(ValueError, match=r"has rank 2, more than 1; pad to at least that"):
        pad_rank(one, 1)
    with pytest.raises(ValueError, match="fold_scale: the parameters hold no LoRA"):
        fold_scale(model.params)
    heads = [adapted(model, chain(lora(rank=2), head()), i) for i in (1, 2)]
    assert np.array_equal(swap(*heads)["score"]["kernel"].value, heads[1]["score"]["kernel"].value)
    fused = [adapted(models["gpt2"], lora(rank=2), i) for i in (1, 2)]
    assert tiny.same(swap(*fused), fused[1])


# The command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base's folder and a tuned one; adapters a, b and a prefix of the base, and one of another base."""
    at = tmp_path_factory.mktemp("combine")
    model = hub.load(tiny.folder(at / "base", "llama"))
    for i, name in enumerate("ab"):
        method = lora(rank=2, alpha=3)
        extra = {"task": "e2e", "labels": None, "config": {"max_new_tokens": 8 + i}}
        save_adapter(at / f"{name}.safetensors", model, method, adapted(model, method, i), extra)
    params = adapted(model, lora(rank=2, targets=["linear"]), 5)
    hub.save(model, params, at / "tuned", tiny.tokenizer())
    save_adapter(
        at / "prefix.safetensors", model, prefix(2), prefix(2).init(jax.random.key(0), model.params, model.sites)
    )
    other = hub.load(tiny.folder(at / "other", "llama", seed=1))
    save_adapter(at / "other.safetensors", other, lora(rank=2), adapted(other, lora(rank=2)))
    return at


def test_combine(files, call):
    a, b, out = (files / f"{name}.safetensors" for name in ("a", "b", "new"))
    base = ("combine", "--model", files / "base", "--out", out)
    status, said, err = call(*base, "--adapters", f"{a}=0.7,{b}=-0.3")
    assert (status, err) == (0, "")
    assert "4 matrices of rank 4, 100% or more of the squares of each; largest error 0 in spectral norm" in said
    model = hub.load(files / "base")
    one, two, got = (changes_of(model, load_adapter(f, model).params) for f in (a, b, out))
    for path, change in got.items():
        np.testing.assert_allclose(change, 0.7 * one[path] - 0.3 * two[path], atol=1e-5)
    extra = read_header(out)["extra"]
    assert extra["task"] == "e2e"
    assert extra["config"]["max_new_tokens"] == 9
    assert extra["combined"]["adapters"] == [["a.safetensors", 0.7], ["b.safetensors", -0.3]]
    ways = ("--adapters", f"{a}=1,{b}=1", "--how", "ties", "--density", 0.5, "--rank", 3)
    status, said, err = call(*base, *ways)
    assert (status, err) == (0, "")
    assert re.search(r"4 matrices of rank 3, \d\d\.?\d*% or more", said)
    merged = call("merge", "--model", files / "base", "--adapter", out, "--out", files / "merged")
    assert merged[0] == 0


def test_combine_takes_a_difference(files, call):
    out = files / "difference.safetensors"
    arguments = ("combine", "--difference", files / "tuned", "--model", files / "base", "--rank", 2, "--out", out)
    status, said, err = call(*arguments)
    assert (status, err) == (0, "")
    assert "14 matrices of rank 2, 100% or more" in said
    model = hub.load(files / "base")
    close(load_adapter(out, model).params, hub.load(files / "tuned").params)

    encoder, tuned, merged = (files / name for name in ("bert", "bert-tuned", "bert-merged"))  # with a head of its own
    new = hub.load(tiny.folder(encoder, "bert"), "classification", labels=["no", "yes"])
    hub.save(new, adapted(new, chain(lora(rank=2), head())), tuned, tiny.tokenizer())
    arguments = ("combine", "--difference", tuned, "--model", encoder, "--energy", 1, "--out", out)
    assert call(*arguments)[0] == 0
    assert read_header(out)["extra"]["labels"] == ["no", "yes"]
    assert call("merge", "--model", encoder, "--adapter", out, "--out", merged)[0] == 0
    close(hub.load(merged).params, hub.load(tuned).params)


def test_combine_says_what_is_wrong(files, call):
    a, b = files / "a.safetensors", files / "b.safetensors"
    out = files / "never.safetensors"

    def fails(*arguments, message, model="base"):
        status, _, err = call("combine", "--model", files / model, "--out", out, *arguments)
        assert status == 1
        assert re.search(message, err), err
        assert not out.exists()

    fails(
        "--adapters", f"{a}=1,{files / 'other.safetensors'}=1", message="adapters are of different bases: .*a.safetens"
    )
    fails("--adapters", f"{a}=1", message="is an adapter for another base", model="other")
    fails(
        "--adapters",
        f"{files / 'prefix.safetensors'}=1",
        message="prefix.safetensors: no arithmetic with model/layers_0",
    )
    fails("--adapters", f"{a},{b}=0.5", message="cannot read the adapter .*a.safetensors'; write a file and its weight")
    fails("--adapters", f"{a}=1", "--how", "ties", "--density", 2, message=r"ties: density.*\(0, 1\]; got 2")
    fails("--adapters", f"{a}=1", "--rank", 99, message="rank 99 is larger than any matrix")
    fails("--adapters", ",", message="there are no adapters")
    fails(message="give either --adapters")
    fails("--difference", files / "base", message="nothing changes")
    fails("--difference", files / "tuned", "--density", 0.5, message="--how and --density are for --adapters")
