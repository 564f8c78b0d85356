"""AdaLoRA against `peft`: forward, gradients, penalty, pruning; the budget step by step; the adapter file."""

import copy
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from peftjax import chain, combine, compact, hub, merge, partition, stack_layers, unstack_layers
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.loop import fit
from peftjax.methods import adalora, lora
from peftjax.methods.adalora import AdaLoRA, Budget, Pruning, _largest
from peftjax.train import Settings, make_optimizer, make_step, start
from peftjax.tree import flatten
from peftjax.weights import dot, is_node

CONFIG: dict[str, Any] = {"r": 8, "init_r": 5, "target_r": 2, "lora_alpha": 7, "orth_reg_weight": 0.3}


@pytest.fixture(scope="module")
def base():
    model = hub.from_config(tiny.config("llama", attention_bias=True), "causal-lm")
    return model._replace(params=tiny.roughen(model.params))


def triplets(params) -> dict[str, AdaLoRA]:
    return {p: w for p, w in flatten(params, is_leaf=is_node).items() if isinstance(w, AdaLoRA)}


def ranks(params) -> dict[str, np.ndarray]:
    return {p: np.asarray(w.lam) != 0 for p, w in triplets(params).items()}


def total(params) -> int:
    return sum(int(r.sum()) for r in ranks(params).values())


def squares(model):
    batch = {"input_ids": jnp.asarray(np.random.default_rng(0).integers(4, 20, (8, 6)))}

    def loss(params, batch, key):
        logits = model.forward(params, batch).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
        return each.sum(), jnp.float32(each.size)

    return loss, batch


# Against peft


@pytest.fixture
def both():
    """The same model with AdaLoRA on query and value, here and in peft, adapters random."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    import reference as numerics

    return torch, peft, numerics


def with_adalora(both, pair, method, **config):
    _, peft, numerics = both
    config = CONFIG | {"total_step": 40, "target_modules": ["q_proj", "v_proj"]} | config
    theirs = peft.get_peft_model(copy.deepcopy(pair.theirs), peft.AdaLoraConfig(**config)).eval()
    params = numerics.start(pair, method)
    links = {}
    for path in triplets(params):
        module = theirs.base_model.model.get_submodule(numerics.hf_name(path).removesuffix(".weight"))
        links[f"{path}/a"] = numerics.transposed(module.lora_A["default"])
        links[f"{path}/b"] = numerics.transposed(module.lora_B["default"])
        links[f"{path}/lam"] = numerics.Link(module.lora_E["default"], lambda x: x[:, 0])
    numerics.randomise(theirs, links)
    return theirs, numerics.fill(params, links), links


@pytest.fixture
def pair(both, tmp_path_factory):
    return both[2].base_pair("llama", tmp_path_factory.getbasetemp())


@pytest.mark.filterwarnings("ignore")  # of peft about its own configuration
def test_outputs_and_gradients_are_pefts(both, pair):
    method = adalora(2, 5, 7, total=40)
    theirs, params, links = with_adalora(both, pair, method)
    both[2].check(pair, theirs, method, params, links)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_the_penalty_is_pefts(both, pair, layout):
    torch = both[0]
    method = adalora(2, 5, 7, total=40, orthogonality=0.3)
    theirs, params, links = with_adalora(both, pair, method)
    ids = torch.tensor(pair.batch["input_ids"])
    # peft adds it in `base_model`, which a `PeftModel` without a task type goes past
    expected = theirs.base_model(input_ids=ids, labels=ids).loss - theirs(input_ids=ids, labels=ids).loss
    expected.backward()
    trainable, frozen = partition(params, method.trainable(params))
    stack = stack_layers if layout == "scan" else lambda x: x
    value, grads = jax.value_and_grad(lambda t: method.penalty(stack(combine(t, frozen))))(trainable)
    assert value > 0.1
    np.testing.assert_allclose(value, expected.detach(), atol=1e-5)
    for path, g in flatten(grads).items():
        if not path.endswith("/lam"):
            np.testing.assert_allclose(g, links[path].grad(), atol=1e-5)
            assert np.abs(g).max() > 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "layout"), [(1, "loop"), (1, "scan"), (3, "loop")])
def test_forty_steps_of_importance_and_pruning_are_pefts(both, pair, every, layout):
    """The same optimizer, the same data: the same ranks survive at every step, with the same values."""
    torch, _, numerics = both
    steps, warmup, final = 40, 5, 9
    method = adalora(2, 5, 7, warmup=warmup, final=final, every=every, orthogonality=0.3)
    theirs, params, links = with_adalora(both, pair, method, tinit=warmup, tfinal=final, deltaT=every)
    tensors = [link.tensor for link in links.values()]
    adam = torch.optim.AdamW(tensors, lr=1e-2, eps=1e-6, weight_decay=0.01)
    tx = optax.adamw(1e-2, eps=1e-6, weight_decay=0.01)

    def loss(params, batch, key):
        ids = batch["input_ids"]
        logits = pair.ours.forward(params, batch).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return each.sum(), jnp.float32(each.size)

    tx = optax.with_extra_args_support(method.planned(steps).optimizer(tx))
    state, frozen = start(method, params, tx, layout)
    traces = []
    step = jax.jit(make_step(lambda *a: traces.append(1) or loss(*a), method, tx))
    rng = np.random.default_rng(3)
    for i in range(1, steps + 1):
        ids = rng.integers(1, numerics.VOCABULARY, (4, 7))
        state, metrics = step(state, frozen, {"input_ids": jnp.asarray(ids)}, jax.random.key(0))
        out = theirs.base_model(input_ids=torch.tensor(ids), labels=torch.tensor(ids))
        adam.zero_grad()
        out.loss.backward()
        adam.step()
        theirs.base_model.update_and_allocate(i)
        np.testing.assert_allclose(metrics["loss"], out.loss.detach(), rtol=1e-4)
        ours = flatten(unstack_layers(combine(state.trainable, frozen)))
        for path, link in links.items():
            expected = link.view(link.tensor.detach()).numpy()
            assert ((ours[path] != 0) == (expected != 0)).all(), f"step {i}, {path}"
            np.testing.assert_allclose(ours[path], expected, atol=1e-4, err_msg=f"step {i}, {path}")
    assert len(traces) == 1
    last = unstack_layers(combine(state.trainable, frozen))
    assert total(last) == 2 * len(triplets(last)) == 8
    assert len({int(r.sum()) for r in ranks(last).values()}) > 1, "the ranks differ by matrix"


# The budget


def test_the_schedule_is_the_equation():
    budget = Budget(warmup=10, final=20, total=100, every=7)
    for t in range(1, 101):
        share = 1 - (t - 10) / 70
        want = 48 if t <= 10 else 16 if t > 80 else int(16 + 32 * share**3)
        assert budget.at(t, 48, 16) == want
        assert bool(budget.allocates(jnp.int32(t))) == (t == 80 or (10 < t < 80 and t % 7 == 0))


SCHEDULES = {
    "each step": dict(warmup=3, final=5, every=1),
    "every third": dict(warmup=3, final=5, every=3),
    "shares": dict(warmup=0.2, final=0.25, every=2),
    "no warm-up, no end": dict(warmup=0, final=0, every=1),
}


def history(method, params, model, steps, layout="loop", **settings):
    """The trainables before and after every step, unstacked."""
    objective, batch = squares(model)
    tx = make_optimizer(Settings(learning_rate=3e-2, schedule="constant", warmup=0.0), steps, method)
    state, frozen = start(method, params, tx, layout)
    step = jax.jit(make_step(objective, method, tx, **settings))
    for i in range(steps):
        state, _ = step(state, frozen, batch, jax.random.key(1))
        yield i + 1, unstack_layers(combine(state.trainable, frozen)), state
    assert step._cache_size() == 1


@pytest.mark.parametrize(("name", "layout"), [*((name, "loop") for name in SCHEDULES), ("every third", "scan")])
def test_the_total_rank_is_the_budget(base, name, layout):
    method = adalora(2, 6, total=20, **SCHEDULES[name])
    budget = Budget(
        *(int(x * 20) if isinstance(x, float) else x for x in (SCHEDULES[name][k] for k in ("warmup", "final"))),
        total=20,
        every=SCHEDULES[name]["every"],
    )
    params = method.init(jax.random.key(0), base.params, base.sites)
    start, target = 6 * len(triplets(params)), 2 * len(triplets(params))
    seen, fixed = [], None
    for t, now, _ in history(method, params, base, 24 if name == "each step" else 20, layout):
        if bool(budget.allocates(jnp.int32(t))):
            assert total(now) == budget.at(t, start, target), t
            seen.append(total(now))
        if t >= budget.total - budget.final:
            assert total(now) == target, t
            fixed = fixed or ranks(now)
            assert all((fixed[p] == r).all() for p, r in ranks(now).items())
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) > 2


def test_accumulated_gradients_and_layouts_prune_alike(base):
    method = adalora(2, 4, warmup=1, final=2)
    params = method.init(jax.random.key(0), base.params, base.sites)
    *_, (_, one, _) = history(method, params, base, 8)
    for settings in ({"accumulate": 4}, {"layout": "scan"}):
        *_, (_, two, _) = history(method, params, base, 8, **settings)
        assert all((ranks(two)[p] == r).all() for p, r in ranks(one).items())


@pytest.mark.parametrize("n", range(8))
def test_ties_do_not_break_the_budget(n):
    equal = {"h_10/w": jnp.ones(3), "h_2/w": jnp.ones(4)}
    chosen = _largest(equal, jnp.int32(n))
    assert sum(int(x.sum()) for x in chosen.values()) == n
    stacked = _largest({"h_*/w": jnp.zeros((2, 3)), "z": jnp.zeros(1)}, jnp.int32(n))
    loose = _largest({"z": jnp.zeros(1), "h_0/w": jnp.zeros(3), "h_1/w": jnp.zeros(3)}, jnp.int32(n))
    assert np.array_equal(stacked["h_*/w"], jnp.stack([loose["h_0/w"], loose["h_1/w"]]))
    assert np.array_equal(stacked["z"], loose["z"])


def test_training_without_any_gradient_still_keeps_the_budget(base):
    """All importances are 0."""
    method = adalora(1, 3, warmup=1, final=1, orthogonality=0.0)
    tx = method.planned(6).optimizer(optax.sgd(0.1))
    params = tiny.roughen(method.init(jax.random.key(0), base.params, base.sites))
    trainable, _ = partition(params, method.trainable(params))
    state = tx.init(trainable)
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    assert total(trainable) == len(triplets(trainable))


# The optimizer and the run


def test_the_wrapper_holds_and_touches_its_own_leaves_only(base):
    method = chain(lora(2, targets=["query"]), adalora(1, 2, targets=["value"], warmup=0, final=0))
    params = method.init(jax.random.key(0), base.params, base.sites)
    trainable, _ = partition(params, method.trainable(params))
    tx = method.planned(2).optimizer(optax.sgd(1.0))
    state = tx.init(trainable)
    assert isinstance(state, Pruning)
    assert all("/v_proj/" in p for p in state.kept)
    assert not any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in jax.tree.leaves(state))
    grads = jax.tree.map(jnp.ones_like, trainable)
    updates, _ = tx.update(grads, state, trainable)
    assert all((x == -1).all() for p, x in flatten(updates).items() if "/q_proj/" in p)


def test_without_a_number_of_steps_it_says_what_to_write():
    with pytest.raises(ValueError, match=r"adalora\(total=...\), or method.planned\(total\)"):
        adalora(1, 2).optimizer(optax.sgd(1.0))
    with pytest.raises(ValueError, match="total=9, but the run has 8 steps"):
        chain(lora(2), adalora(1, 2, total=9)).planned(8)
    with pytest.raises(ValueError, match="5 steps of warm-up and 4 final ones leave none of 8"):
        adalora(1, 2, warmup=5, final=4).planned(8)
    assert adalora(1, 2).planned(1).plan is None


@pytest.fixture(scope="module")
def fitted(base):
    method = adalora(1, 3, 6, targets=["linear"], warmup=2, final=4)
    objective, batch = squares(base)
    params = method.init(jax.random.key(0), base.params, base.sites)
    settings = Settings(steps=14, learning_rate=5e-2, warmup=0.0)
    result = fit(params, method, objective, lambda i: iter([batch]), 1, settings)
    assert result.compilations == 1
    return method, result.params


def test_the_best_state_is_one_within_the_budget(base):
    """The first evaluation is the best and comes before the last allocation: it is recorded, and not kept."""
    method = adalora(1, 4, warmup=1, final=2)
    objective, batch = squares(base)
    params = method.init(jax.random.key(0), base.params, base.sites)
    settings = Settings(steps=6, learning_rate=1e-2, warmup=0.0, eval_every=1)
    losses = iter([0.1, 0.2, 0.3, 0.5, 0.4, 0.6])
    result = fit(
        params, method, objective, lambda i: iter([batch]), 1, settings, evaluate=lambda p: {"loss": next(losses)}
    )
    assert result.best == {"step": 5, "eval": {"loss": 0.4}}
    assert total(result.params) == len(triplets(params))
    assert chain(lora(2), method).settles(6) == method.settles(6) == 4
    assert lora(2).settles(6) == 0


@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_the_file_holds_the_ranks_that_live(base, fitted, layout, tmp_path):
    method, params = fitted
    size = save_adapter(tmp_path / "a", base, method, stack_layers(params) if layout == "scan" else params)
    got = load_adapter(tmp_path / "a", base)
    small = triplets(got.params)
    assert {p: w.lam.shape for p, w in small.items()} == {p: (int(r.sum()),) for p, r in ranks(params).items()}
    assert len({len(w.lam) for w in small.values()}) > 1
    assert sum(len(w.lam) for w in small.values()) == len(small) == 14
    assert size == (tmp_path / "a").stat().st_size
    _, batch = squares(base)
    want = base.forward(params, batch).logits
    np.testing.assert_allclose(base.forward(got.params, batch).logits, want, atol=1e-5)
    for tree in (params, got.params):
        np.testing.assert_allclose(base.forward(merge(tree), batch).logits, want, atol=1e-4)
    assert tiny.same(compact(got.params), got.params)


def test_a_loaded_adapter_trains_on(base, fitted, tmp_path):
    method, params = fitted
    save_adapter(tmp_path / "a", base, method, params)
    got = load_adapter(tmp_path / "a", base)
    for _, now, _ in history(got.method, got.params, base, 8):
        assert total(now) <= 14
    assert total(now) == 14


def test_products_are_the_equation_in_float64(key):
    rng = np.random.default_rng(0)
    w, p, lam, q = (rng.normal(size=s) for s in ((5, 4), (5, 3), (3,), (3, 4)))
    x, ids = rng.normal(size=(2, 5)), np.array([4, 0])
    n = AdaLoRA(*(jnp.asarray(v, jnp.float32) for v in (w, p, lam, q)), scale=0.7)
    whole = w + 0.7 * p @ np.diag(lam) @ q
    np.testing.assert_allclose(n.materialize(), whole, atol=1e-5)
    np.testing.assert_allclose(dot(n, jnp.asarray(x, jnp.float32)), x @ whole, atol=1e-5)
    np.testing.assert_allclose(n.take(ids), whole[ids], atol=1e-5)
    np.testing.assert_allclose(n.attend(jnp.asarray(x[:, :4], jnp.float32)), x[:, :4] @ whole.T, atol=1e-5)
    layers = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), n)
    np.testing.assert_allclose(layers.materialize()[0], whole, atol=1e-5)
    dead = dataclasses.replace(n, lam=n.lam.at[1].set(0.0))
    assert dead.compact().a.shape == (5, 2)
    np.testing.assert_allclose(dead.compact().materialize(), dead.materialize(), atol=1e-6)
