"""DyLoRA against its equations in float64: outputs, gradients in both modes, draws, ranks taken out, scores by rank."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from peftjax import chain, combine, hub, merge, partition, stack_layers
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.cli import main
from peftjax.methods import at_rank, dylora, lora
from peftjax.methods.dylora import DyLoRA
from peftjax.methods.lora import LoRA
from peftjax.tree import flatten, map_with_path
from peftjax.weights import attend, dot, is_node, materialize, take

R, ALPHA = 4, 6.0


def some(frozen=False):
    """Random arrays in float64, and the node of them."""
    rng = np.random.default_rng(0)
    w, a, b = rng.normal(size=(6, 5)), rng.normal(size=(6, R)), rng.normal(size=(R, 5))
    return (w, a, b), DyLoRA(*(jnp.asarray(x, jnp.float32) for x in (w, a, b)), alpha=ALPHA, frozen=frozen)


def drawn(n: DyLoRA, rank: int) -> DyLoRA:
    return dataclasses.replace(n, rank=jnp.int32(rank))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen"])
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_products_and_gradients_are_the_equations(rank, frozen):
    (w, a, b), n = some(frozen)
    rng = np.random.default_rng(1)
    x, g, ids = rng.normal(size=(3, 6)), rng.normal(size=(3, 5)), np.array([5, 0])
    s, first, last = ALPHA / rank, slice(0, rank), slice(rank - 1 if frozen else 0, rank)
    whole = w + s * a[:, first] @ b[first]
    n = drawn(n, rank)
    x32, g32 = jnp.asarray(x, jnp.float32), jnp.asarray(g, jnp.float32)
    np.testing.assert_allclose(dot(n, x32), x @ whole, atol=1e-4)
    np.testing.assert_allclose(materialize(n), whole, atol=1e-4)
    np.testing.assert_allclose(take(n, ids), whole[ids], atol=1e-4)
    np.testing.assert_allclose(attend(n, g32), g @ whole.T, atol=1e-4)
    want_a, want_b = np.zeros_like(a), np.zeros_like(b)
    want_a[:, last] = s * x.T @ g @ b[last].T
    want_b[last] = s * (x @ a[:, last]).T @ g
    grad = jax.grad(lambda t: (dot(dataclasses.replace(n, a=t[0], b=t[1]), x32) * g32).sum())((n.a, n.b))
    np.testing.assert_allclose(grad[0], want_a, atol=1e-4)
    np.testing.assert_allclose(grad[1], want_b, atol=1e-4)


@pytest.fixture(scope="module")
def base():
    model = hub.from_config(tiny.config("llama", attention_bias=True), "causal-lm")
    return model._replace(params=tiny.roughen(model.params))


TOKENS = {"input_ids": jnp.arange(4, 16).reshape(2, 6)}


def adapted(base, method):
    params = method.init(jax.random.key(0), base.params, base.sites)
    mask, moved = method.trainable(params), tiny.roughen(params, 5)
    return jax.tree.map(lambda keep, x, y: y if keep else x, mask, params, moved)


def with_rank(params, rank):
    def write(x):
        return drawn(x, rank) if isinstance(x, DyLoRA) else x

    return jax.tree.map(write, params, is_leaf=is_node)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_only_the_first_directions_are_used_bit_for_bit(base, rank):
    method = dylora(R, ALPHA, ["linear", "embedding"])
    params = adapted(base, method)

    def spoil(path, x):
        if path.endswith("/a"):
            return x.at[..., rank:].set(jnp.nan)
        return x.at[..., rank:, :].set(jnp.inf) if path.endswith("/b") else x

    @jax.jit
    def run(params):
        trainable, frozen = partition(params, method.trainable(params))

        def loss(t):
            logits = base.forward(with_rank(combine(t, frozen), rank), TOKENS).logits
            return jnp.square(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(trainable)

    clean, spoiled = run(params), run(map_with_path(spoil, params))
    assert tiny.same(clean, spoiled)
    grads = flatten(clean[0])
    assert all((g[..., rank:] == 0).all() for p, g in grads.items() if p.endswith("/a"))
    assert all((g[..., :rank] != 0).any() for p, g in grads.items() if p.endswith("/a"))


@pytest.mark.parametrize("rank", [1, 3, R])
def test_a_rank_taken_out_is_the_lora_of_its_directions(base, rank, tmp_path):
    method = dylora(R, ALPHA, ["linear"])
    params = adapted(base, method)
    small = at_rank(params, rank)
    want = base.forward(with_rank(params, rank), TOKENS).logits

    def as_lora(n):
        if not isinstance(n, DyLoRA):
            return n
        return LoRA(n.base, n.a[:, :rank], n.b[:rank], scale=ALPHA / rank)

    plain = jax.tree.map(as_lora, params, is_leaf=is_node)
    size = save_adapter(tmp_path / "small", base, method, small)
    assert size < save_adapter(tmp_path / "all", base, method, params) or rank == R
    loaded = load_adapter(tmp_path / "small", base).params
    assert tiny.same(loaded, small)
    for tree in (small, plain, merge(small), loaded, at_rank(stack_layers(params), rank)):
        np.testing.assert_allclose(base.forward(tree, TOKENS).logits, want, atol=1e-4)
    assert {n.a.shape[-1] for n in flatten(small, is_leaf=is_node).values() if isinstance(n, DyLoRA)} == {rank}
    ranks = [
        method.resolve(small, jax.random.key(i))["model"]["layers_0"]["mlp"]["up_proj"]["kernel"].rank for i in range(9)
    ]
    assert {int(r) for r in ranks} <= set(range(1, rank + 1)), "trained on, it draws the ranks that there are"


def test_ranks_that_are_not_there(base):
    params = adapted(base, dylora(3))
    for rank in (0, 4):
        with pytest.raises(ValueError, match=f"ranks from 1 to 3; got {rank}"):
            at_rank(params, rank)
    with pytest.raises(ValueError, match="hold no DyLoRA"):
        at_rank(adapted(base, lora(3)), 2)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (dylora(4), [1, 1, 1, 1]),
        (dylora(4, min_rank=3), [0, 0, 1, 1]),
        (dylora(4, distribution="geometric", p=0.4), [1, 0.6, 0.36, 0.216]),
        (dylora(4, min_rank=2, distribution="geometric"), [0, 1, 0.85, 0.7225]),
    ],
    ids=["uniform", "uniform from 3", "geometric", "geometric from 2"],
)
def test_the_draws_have_their_distribution(base, method, shares):
    params = method.init(jax.random.key(0), base.params, base.sites)
    n = 4000

    @jax.jit
    @jax.vmap
    def ranks(key):
        nodes = flatten(method.resolve(params, key), is_leaf=is_node).values()
        return jnp.stack([x.rank for x in nodes if isinstance(x, DyLoRA)])

    got = np.asarray(ranks(jax.random.split(jax.random.key(7), n)))
    assert got.shape == (n, 4)
    assert (got == got[:, :1]).all(), "one draw for all matrices"
    p = np.array(shares) / sum(shares)
    counts = np.bincount(got[:, 0], minlength=5)[1:]
    assert (np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))).all()
    assert (counts[p == 0] == 0).all()


def test_stacked_layers_draw_the_same_rank_and_evaluation_draws_none(base):
    method = chain(lora(2, targets=["key"]), dylora(4))
    params = method.init(jax.random.key(0), base.params, base.sites)
    key = jax.random.key(3)
    one = [x.rank for x in flatten(method.resolve(params, key), is_leaf=is_node).values() if isinstance(x, DyLoRA)]
    stacked = flatten(method.resolve(stack_layers(params), key), is_leaf=is_node).values()
    two = [x.rank for x in stacked if isinstance(x, DyLoRA)]
    assert {x.shape for x in two} == {(tiny.LAYERS,)}
    assert {int(r) for x in two for r in x} == {int(x) for x in one}
    assert tiny.same(method.resolve(method.resolve(params, key), None), params)


# The scores by rank


def test_evaluate_prints_the_scores_by_rank(tmp_path, capsys):
    import json

    folder, data = tiny.folder(tmp_path / "bert", "bert"), tiny.data(tmp_path / "rte", "rte")
    base = ["--model", str(folder), "--task", "rte", "--data", str(data)]
    adapter = ["--adapter", str(tmp_path / "run/adapter.safetensors")]
    quick = ["--steps", "3", "--batch-size", "8", "--method", "dylora(rank=4)", "--out", str(tmp_path / "run")]
    main(["train", *base, *quick])
    capsys.readouterr()
    main(["evaluate", *base, *adapter, "--ranks", "1,2,4"])
    rows = [re.findall(r"[\w.,]+", line) for line in capsys.readouterr().out.splitlines()]
    assert ["rank", "parameters", "loss", "accuracy"] in rows
    scores = json.loads((tmp_path / "run/result.json").read_text())["scores"]
    head_count = (tiny.WIDTH + 1) * 2
    table = {int(row[0]): row for row in rows if row and row[0].isdigit()}
    for rank in (1, 2, 4):
        assert int(table[rank][1].replace(",", "")) == head_count + rank * 2 * tiny.LAYERS * 2 * tiny.WIDTH
    assert table[4][2:] == [f"{v:.4g}" for v in scores.values()]
    for arguments, message in (
        ([*adapter, "--ranks", "1,5"], "ranks from 1 to 4; got 5"),
        ([*adapter, "--ranks", "all"], "cannot read the ranks 'all'; write 1,2,4"),
        (["--ranks", "1"], "--ranks needs the --adapter of a DyLoRA"),
    ):
        with pytest.raises(SystemExit):
            main(["evaluate", *base, *arguments])
        assert message in capsys.readouterr().err
