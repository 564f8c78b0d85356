"""Updates inside the backward pass against the plain step, what they save, and trainables in bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from peftjax import chain, hub, masks, method
from peftjax.backward import by_group, groups, unite
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.loop import NonFinite, fit
from peftjax.methods import adalora, bitfit, child_tuning, full, lora, lora_plus
from peftjax.problem import objective
from peftjax.rounding import apply_updates, round_randomly
from peftjax.run import configuration
from peftjax.train import Settings, decays, make_optimizer, make_step, start
from peftjax.tree import flatten, nbytes

BACKWARD = Settings(learning_rate=1e-2, clip=None, schedule="constant", warmup=0, weight_decay=0.1, update="backward")
WHOLE = Settings(learning_rate=1e-2, clip=None, schedule="constant", warmup=0, weight_decay=0.1)


def next_token(model):
    """Cross-entropy of every next token."""

    def loss(params, batch, key):
        logits = model.forward(params, batch, key).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
        return each.sum(), batch["attention_mask"][:, 1:].sum().astype(jnp.float32)

    return loss


def tokens(rows=2, length=8, seed=0):
    ids = np.random.default_rng(seed).integers(4, len(tiny.WORDS), (rows, length)).astype(np.int32)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


def prepared(model, m, settings, loss=None):
    """The first state, the frozen half and the jitted step; Adam has an epsilon above the noise of zero gradients."""
    params = m.init(jax.random.key(0), model.params, model.sites)
    tx = m.optimizer(optax.adamw(settings.learning_rate, eps=1e-3, weight_decay=0.1, mask=decays))
    tx = optax.with_extra_args_support(by_group(tx) if settings.update == "backward" else tx)
    state, frozen = start(m, params, tx, settings.layout, settings.trainable_dtype)
    step = make_step(loss or next_token(model), m, tx, settings.accumulate, settings.update)
    return state, frozen, jax.jit(step, donate_argnums=0)


def trained(model, m, settings, steps=4, loss=None):
    state, frozen, step = prepared(model, m, settings, loss)
    said = []
    for i in range(steps):
        state, metrics = step(state, frozen, tokens(seed=i), jax.random.key(7))
        said.append({k: float(x) for k, x in metrics.items()})
    return state, said


def moments(state, settings):
    """The optimizer's float leaves as one tree of the trainables, whichever way it keeps them."""
    by_name = state.opt_state.values() if settings.update == "backward" else [state.opt_state]
    return {k: unite(optax.tree.get(s, k) for s in by_name) for k in ("mu", "nu")}


# The same numbers


@functools.cache
def made(family):
    model = hub.from_config(tiny.config(family), "causal-lm", seed=0)
    return model._replace(params=tiny.roughen(model.params))


CASES = {  # bloom's embedding is tied, llama's is not
    "full, tied": ("bloom", full(), {"remat": "block"}, {}),
    "full, untied, scanned": ("llama", full(), {}, {"layout": "scan"}),
    "lora+ and bitfit": ("bloom", chain(lora_plus(rank=2, dropout=0.3), bitfit()), {}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_plain_step(name):
    family, m, options, how = CASES[name]
    again = hub.from_config(tiny.config(family), "causal-lm", seed=None, **options)
    model = again._replace(params=made(family).params)
    (plain, said), (fused, same) = (trained(model, m, dataclasses.replace(s, **how)) for s in (WHOLE, BACKWARD))
    for a, b in zip(said, same, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert int(fused.step) == int(plain.step) == 4
    assert bool(fused.finite)
    after = flatten(fused.trainable)
    for path, x in flatten(plain.trainable).items():
        np.testing.assert_allclose(after[path], x, atol=1e-6, err_msg=path)
    for a, b in zip(jax.tree.leaves(moments(plain, WHOLE)), jax.tree.leaves(moments(fused, BACKWARD)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


# A toy of many layers

LAYERS, WIDTH = 6, 16


def network(layers=LAYERS, width=WIDTH):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(9, width)), jnp.float32)
    return {"table": table, **{f"h_{i}": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)} for i in range(layers)}}


def toy(**rest):
    return method("toy", {}, lambda key, params, sites: params, masks.everything, **rest)


@jax.custom_vjp
def poisoned(x):
    return x


poisoned.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))


def deep(params, batch, key, at=None):
    """Squared distance of a deep network's output from its targets; the table is used at both ends.

    The gradient of the bias of layer `at` is not finite.
    """
    x = params["table"][batch["ids"]]
    for i in range(len(params) - 1):
        layer = params[f"h_{i}"]
        x = x + jnp.tanh(x @ layer["kernel"] + (poisoned(layer["bias"]) if i == at else layer["bias"]))
    each = jnp.square(x - params["table"][batch["targets"]]).mean(-1)
    return (each * batch["weight"]).sum(), batch["weight"].sum()


def toy_epoch(number, n=4, rows=4):
    rng = np.random.default_rng(number)
    for _ in range(n):
        ids, targets = rng.integers(0, 9, (2, rows)).astype(np.int32)
        yield {"ids": ids, "targets": targets, "weight": rng.choice([0.5, 2.0], rows).astype(np.float32)}


def start_toy(settings, m=None, loss=deep, params=None):
    m = m or toy()
    tx = make_optimizer(settings, 8, m)
    state, frozen = start(m, params or network(), tx, dtype=settings.trainable_dtype)
    return state, frozen, make_step(loss, m, tx, update=settings.update)


def fit_toy(settings, loss=deep, **kwargs):
    return fit(network(), toy(), loss, toy_epoch, 4, settings, **kwargs)


def plan(settings):
    state, frozen, step = start_toy(settings, params=network(24, 128))
    batch = next(toy_epoch(0))
    compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch, jax.random.key(0)).compile()
    found = compiled.memory_analysis()
    assert found is not None
    return found, nbytes(state.trainable)


def test_the_gradients_of_all_layers_never_exist_at_once():
    whole, gradients = plan(WHOLE)
    fused, _ = plan(BACKWARD)
    assert whole.temp_size_in_bytes > gradients
    assert fused.temp_size_in_bytes < 0.5 * gradients
    assert fused.alias_size_in_bytes >= 3 * gradients  # what is donated is written over


def test_a_penalty_counts():
    m = toy(penalty=lambda p: 3.0 * jnp.square(p["h_0"]["kernel"]).sum())
    news = []
    for settings in (WHOLE, BACKWARD):
        state, frozen, step = start_toy(settings, m)
        state, metrics = jax.jit(step)(state, frozen, next(toy_epoch(0)), jax.random.key(0))
        news.append((state.trainable, metrics))
    assert float(news[0][1]["grad_norm"]) > 6 * 0.9 * np.sqrt(WIDTH)
    for a, b in zip(*map(jax.tree.leaves, news), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def poisoned_loss(params, batch, key):
    total, weight = deep(params, batch, key)
    return jnp.where(batch["weight"][0] > 70, jnp.nan, total), weight


def test_a_loss_that_is_not_finite_leaves_everything_as_it_was():
    state, frozen, step = start_toy(BACKWARD, loss=poisoned_loss)
    batch = next(toy_epoch(0))
    batch["weight"][0] = 77
    after, metrics = jax.jit(step)(state, frozen, batch, jax.random.key(0))
    assert np.isnan(metrics["loss"])
    assert tiny.same(after._replace(finite=state.finite), state)
    assert not after.finite


def test_a_gradient_that_is_not_finite_stops_the_updates_from_there_on():
    state, frozen, step = start_toy(BACKWARD, loss=functools.partial(deep, at=2))
    after, metrics = jax.jit(step)(state, frozen, next(toy_epoch(0)), jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert np.isnan(metrics["grad_norm"])
    assert not after.finite
    assert int(after.step) == 0
    moved = {name for name, x in after.trainable.items() if not tiny.same(x, state.trainable[name])}
    assert moved == {f"h_{i}" for i in range(3, LAYERS)}
    assert {n for n, s in after.opt_state.items() if not tiny.same(s, state.opt_state[n])} == moved


def test_a_run_stops_and_resumes_to_the_same_bits(tmp_path):
    settings = dataclasses.replace(BACKWARD, epochs=2, save_every=1)
    plain = fit_toy(settings)

    def kill(record):
        if record["step"] == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit_toy(settings, folder=tmp_path, report=kill)
    resumed = fit_toy(settings, folder=tmp_path)
    assert tiny.same(resumed.params, plain.params)
    assert [r["loss"] for r in resumed.history] == [r["loss"] for r in plain.history]
    assert plain.compilations == 1
    with pytest.raises(ValueError, match="of another run"):
        fit_toy(dataclasses.replace(settings, update="whole"), folder=tmp_path)
    with pytest.raises(NonFinite, match=r"at step 1 the loss is .* and the gradient's norm nan"):
        fit_toy(settings, functools.partial(deep, at=2))


# What cannot be


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"clip": 1.0}, r"write clip=None \(--clip 0\)"),
        ({"accumulate": 2}, "write accumulate=1"),
        ({"update": "sometimes"}, "there is no update 'sometimes'"),
        ({"trainable_dtype": "float16"}, "there is no trainable_dtype 'float16'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be(bad, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(BACKWARD, **bad)


def test_the_command_says_what_to_write(call):
    status, _, said = call("train", "--method", "full", "--lr", 1e-3, "--update", "backward")
    assert status
    assert "--clip 0" in said


PAIR = {"h_0": {"w": jnp.ones(3)}, "h_1": {"w": jnp.ones(3)}}


def last_norm():
    """Scales by the norm of the gradient before, so that the groups mix through the state."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: u * state, updates), optax.tree.norm(updates)

    return optax.GradientTransformation(lambda params: jnp.zeros(()), update)


@pytest.mark.parametrize("tx", [optax.clip_by_global_norm(1.0), last_norm()], ids=["clip", "state"])
def test_an_optimizer_that_needs_all_gradients_is_refused(tx):
    said = r"needs the gradients of h_0 and of h_1 at once.*write update='whole' \(--update whole\)"
    with pytest.raises(ValueError, match=said):
        by_group(optax.chain(tx, optax.sgd(0.1))).init(PAIR)


def test_methods_are_refused_by_what_they_do():
    model = hub.from_config(tiny.config("llama"), "causal-lm", seed=None)

    def first(m):
        tx = make_optimizer(BACKWARD, 10, m.planned(10))
        jax.eval_shape(lambda p: start(m, m.init(jax.random.key(0), p, model.sites), tx)[0], model.params)

    first(child_tuning(p=0.5))
    with pytest.raises(ValueError, match="or choose another method"):
        first(adalora(1, 2))


def test_no_two_groups_draw_the_same():
    def update(updates, state, params=None, **extra):
        return jax.tree.map(lambda u: jax.random.normal(extra["key"], u.shape), updates), state

    tx = by_group(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update))
    drawn, _ = tx.update(PAIR, tx.init(PAIR), PAIR, key=jax.random.key(0))
    first, second = jax.tree.leaves(drawn)
    assert not np.array_equal(first, second)


def test_groups_come_together_again():
    tree = {"m": {"h_0": {"a": 1, "b": None}, "h_10": {"a": 2, "b": None}}, "norm": {"scale": 3}}
    assert list(groups(tree)) == ["m/h_0", "m/h_10", "norm/scale"]
    assert unite(groups(tree).values()) == tree


# Trainables in bfloat16


def test_rounding_at_random_is_right_in_the_mean():
    x = jax.random.normal(jax.random.key(0), (64,))
    draws = jax.vmap(lambda k: round_randomly(k, x))(jax.random.split(jax.random.key(1), 4000)).astype(jnp.float32)
    gap = jnp.abs(x) * 2**-7  # at least the distance of the two bfloat16 values around x
    assert (jnp.abs(draws - x) < gap).all()
    noise = gap / 2 / np.sqrt(4000)  # at least the deviation of the mean
    assert (jnp.abs(draws.mean(0) - x) < 5 * noise).all()
    nearest = x.astype(jnp.bfloat16).astype(jnp.float32)
    assert (jnp.abs(nearest - x) > 5 * noise).sum() > 32  # which is not right in the mean


def test_what_bfloat16_has_or_cannot_have_stays():
    x = jnp.array([0.0, 1.5, -2.0, jnp.inf, -jnp.inf, jnp.nan])
    y = jax.vmap(lambda k: round_randomly(k, x))(jax.random.split(jax.random.key(0), 50))
    np.testing.assert_array_equal(y.astype(jnp.float32), np.broadcast_to(x, (50, 6)))
    assert y.dtype == jnp.bfloat16


def test_updates_below_the_resolution_are_not_lost():
    params = {"w": jnp.ones(2000, jnp.bfloat16), "v": jnp.ones(2000)}
    small = jax.tree.map(lambda x: jnp.full(x.shape, 2e-4), params)  # bfloat16 has steps of 0.0078 above 1
    nearest = params["w"]
    for i in range(20):
        params = jax.jit(apply_updates)(jax.random.key(i), params, small)
        nearest = (nearest.astype(jnp.float32) + 2e-4).astype(jnp.bfloat16)
    assert (nearest == 1).all()
    np.testing.assert_allclose(params["v"], 1.004, rtol=1e-5)
    assert float(params["w"].astype(jnp.float32).mean()) == pytest.approx(1.004, abs=5e-4)


@pytest.mark.parametrize("update", ["whole", "backward"])
def test_bfloat16_trainables_go_where_float32_ones_go(update):
    """By steps of 1e-4, which rounding to the nearest would lose."""

    def linear(params, batch, key):
        weight = batch["weight"].sum()
        return weight * sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(params)), weight

    how = {"update": update, "learning_rate": 1e-4, "weight_decay": 0.0, "trainable_dtype": "bfloat16"}
    ones = {f"h_{i}": {"w": jnp.ones((64, 64))} for i in range(2)}
    state, frozen, step = start_toy(dataclasses.replace(BACKWARD, **how), loss=linear, params=ones)
    step = jax.jit(step, donate_argnums=0)
    for _ in range(10):
        state, _ = step(state, frozen, next(toy_epoch(0)), jax.random.key(0))
    assert {x.dtype.name for x in jax.tree.leaves(state.trainable)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.opt_state)} == {"float32", "int32"}
    mean = np.mean([x.astype(jnp.float32) for x in jax.tree.leaves(state.trainable)])
    assert mean == pytest.approx(1 - 10 * 1e-4, abs=2e-4)  # Adam's steps are the rate, as the gradient is 1


def test_an_adapter_from_bfloat16_trainables_loads(tmp_path):
    problem = tiny.problem(tmp_path, "llama", "e2e", max_buckets=1)
    m = lora(rank=2)
    settings = dataclasses.replace(BACKWARD, steps=2, batch_size=8, trainable_dtype="bfloat16")
    params = m.init(jax.random.key(0), problem.model.params, problem.model.sites)
    epoch = functools.partial(problem.epoch, batch_size=8, seed=0)
    fitted = fit(params, m, objective(problem), epoch, problem.steps_per_epoch(8), settings, folder=tmp_path / "run")
    save_adapter(tmp_path / "a.safetensors", problem.model, m, fitted.params)
    assert tiny.same(load_adapter(tmp_path / "a.safetensors", problem.model).params, fitted.params)
    again = fit(params, m, objective(problem), epoch, problem.steps_per_epoch(8), settings, folder=tmp_path / "run")
    assert tiny.same(again.params, fitted.params)
    assert configuration(problem, m, settings)["settings"]["trainable_dtype"] == "bfloat16"
    old = configuration(problem, m, Settings())["settings"]  # as results of before have it
    new = {"save_every", "update", "trainable_dtype", "data_seed"}
    assert {f.name for f in dataclasses.fields(Settings)} - set(old) == new
    for remat, was in (("none", False), ("block", True), ("dots", "dots")):
        other = problem.model._replace(module=problem.model.module.clone(remat=remat))
        assert configuration(problem._replace(model=other), m, settings)["remat"] == was
