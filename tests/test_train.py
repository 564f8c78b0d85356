"""The loop: what trains, by what formula, what it costs, how it stops and how it goes on."""

import itertools
import json
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from peftjax import chain, combine, masks, merge, method, partition, unstack_layers
from peftjax.checkpoint import StateFolder
from peftjax.loop import Interrupted, NonFinite, fit
from peftjax.methods import bitfit, dora, full, head, ia3, lora, olora, pissa, prefix, vera
from peftjax.problem import Evaluator, objective
from peftjax.train import Settings, TrainState, decays, make_optimizer, make_step, schedule, start
from peftjax.tree import count, flatten

PARAMS = {"lin": {"kernel": jnp.ones((4, 3)) / 4, "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(4)}}


def toy(trainable=masks.everything, **rest):
    """A method on `PARAMS` that changes nothing and trains what the mask says."""
    return method("toy", {}, lambda key, params, sites: params, trainable, **rest)


def squares(params, batch, key):
    """Weighted squared errors of a linear model."""
    h = batch["x"] * params["norm"]["scale"]
    each = jnp.square(h @ params["lin"]["kernel"] + params["lin"]["bias"] - batch["y"]).sum(-1)
    return (each * batch["weight"]).sum(), batch["weight"].sum()


def toy_epoch(number, n=5, rows=8):
    """n batches with unequal weights, the same whenever they are asked for."""
    rng = np.random.default_rng(number)
    for _ in range(n):
        x, y = rng.normal(size=(rows, 4)), rng.normal(size=(rows, 3))
        weight = rng.choice([0.0, 0.5, 3.0], rows)
        yield {"x": x.astype(np.float32), "y": y.astype(np.float32), "weight": weight.astype(np.float32)}


def fit_toy(m=None, settings=None, loss=squares, **kwargs):
    settings = settings or Settings(epochs=2, learning_rate=0.1)
    return fit(PARAMS, m or toy(), loss, toy_epoch, 5, settings, **kwargs)


def losses(fitted):
    return [r["loss"] for r in fitted.history if "loss" in r]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def rte(at):
    return tiny.problem(at, "bert", "rte", max_buckets=1)


@pytest.fixture(scope="module")
def e2e(at):
    return tiny.problem(at, "llama", "e2e", max_buckets=1)


def fit_problem(problem, m, loss=None, folder=None, report=lambda record: None, params=None, **settings):
    settings = Settings(**{"batch_size": 8, "steps": 6, "learning_rate": 1e-2} | settings)
    params = m.init(jax.random.key(0), problem.model.params, problem.model.sites) if params is None else params
    return fit(
        params,
        m,
        loss or objective(problem),
        lambda number: problem.epoch(number, settings.batch_size, settings.seed),
        problem.steps_per_epoch(settings.batch_size),
        settings,
        folder=folder,
        report=report,
    )


# What trains


@pytest.mark.parametrize("name", ["lora", "bitfit", "prefix"])
def test_frozen_leaves_stay_bit_equal_and_the_optimizer_holds_nothing_for_them(rte, name):
    m = {"lora": chain(lora(rank=2), head()), "bitfit": bitfit(), "prefix": prefix(length=2)}[name]
    params = m.init(jax.random.key(0), rte.model.params, rte.model.sites)
    fitted = fit_problem(rte, m, params=params)
    mask, before, after = (flatten(t) for t in (m.trainable(params), params, fitted.params))
    for path, x in before.items():
        assert mask[path] != np.array_equal(x, after[path]), path
    trainable, _ = partition(params, m.trainable(params))
    state, _ = start(m, params, make_optimizer(Settings(), 10, m))
    count = len(jax.tree.leaves(trainable))
    shapes = sorted(x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim)
    assert shapes == sorted(2 * [x.shape for x in jax.tree.leaves(trainable) if x.ndim])
    assert len(jax.tree.leaves(state.opt_state)) == 2 * count + 3  # Adam's moments, two step counts, the rate


def test_weight_decay_spares_biases_and_norms_whatever_stands_there(rte):
    m = chain(full(), bitfit())
    params = m.init(jax.random.key(0), rte.model.params, rte.model.sites)
    mask = flatten(decays(params))
    spared = {p for p, decayed in mask.items() if not decayed}
    assert "bert/encoder/layer_0/attention/self/query/bias/value" in spared
    assert "bert/embeddings/LayerNorm/scale" in spared
    assert all("/bias" in p or p.endswith("/scale") for p in spared)
    assert all("/bias" not in p and not p.endswith("/scale") for p in mask if p not in spared)
    lengths = dora(rank=1).init(jax.random.key(0), rte.model.params, rte.model.sites)
    assert {p.rpartition("/")[2] for p, d in flatten(decays(lengths)).items() if not d and "/kernel/" in p} == {
        "magnitude"
    }
    mlp = prefix(length=2, mlp=True, hidden=4).init(jax.random.key(0), rte.model.params, rte.model.sites)["prefix_mlp"]
    assert {p for p, decayed in flatten(decays({"prefix_mlp": mlp})).items() if not decayed} == {
        "prefix_mlp/b1",
        "prefix_mlp/b2",
    }


@pytest.mark.parametrize("layout", ["loop", "scan"])
@pytest.mark.parametrize(
    "method",
    [lora(rank=2), dora(rank=2), ia3(), pissa(rank=2), olora(rank=2), vera(rank=2)],
    ids=lambda m: m.spec[0][0],
)
def test_weight_decay_alone_leaves_the_base_as_it_is(rte, method, layout):
    """What decays must be what is nothing at 0."""
    params = method.init(jax.random.key(0), rte.model.params, rte.model.sites)
    tx = make_optimizer(Settings(learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup=0), 5, method)
    state, frozen = start(method, params, tx, layout)
    trainable, opt_state = state.trainable, state.opt_state
    for _ in range(5):
        updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, trainable), opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    after = flatten(merge(unstack_layers(combine(trainable, frozen))))
    for path, x in flatten(rte.model.params).items():
        np.testing.assert_allclose(after[path], x, atol=1e-5, err_msg=path)


def test_weight_decay_acts_where_the_gradient_is_zero():
    def nothing(params, batch, key):
        return 0 * squares(params, batch, key)[0], batch["weight"].sum()

    settings = Settings(epochs=1, learning_rate=0.1, weight_decay=0.5, schedule="constant", warmup=0)
    got = fit_toy(settings=settings, loss=nothing).params
    np.testing.assert_allclose(got["lin"]["kernel"], PARAMS["lin"]["kernel"] * 0.95**5, rtol=1e-5)
    assert np.array_equal(got["lin"]["bias"], PARAMS["lin"]["bias"])
    assert np.array_equal(got["norm"]["scale"], PARAMS["norm"]["scale"])


# By what formula


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 0.3, 1])
def test_the_rate_is_the_formula(name, warmup):
    total, peak = 20, 2.0
    rate = schedule(Settings(schedule=name, warmup=warmup, learning_rate=peak), total)
    rise = round(warmup * total)
    for step in range(total):
        if step < rise:
            expected = peak * step / rise
        else:
            share = (step - rise) / max(total - rise, 1)
            falls = {"linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2, "constant": 1}
            expected = peak * falls[name]
        assert np.asarray(rate(step)).item() == pytest.approx(expected, rel=1e-5, abs=1e-6), step


def adamw_by_hand(values, gradients, settings, total):
    """AdamW of Loshchilov & Hutter (arXiv:1711.05101), algorithm 2, after clipping; decay on the kernel only."""
    m, v = ({p: np.zeros_like(x) for p, x in values.items()} for _ in range(2))
    rate = schedule(settings, total)
    for t, g in enumerate(gradients):
        g = dict(g)
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        if settings.clip is not None and norm > settings.clip:
            g = {p: x * settings.clip / norm for p, x in g.items()}
        for p in values:
            m[p], v[p] = 0.9 * m[p] + 0.1 * g[p], 0.999 * v[p] + 0.001 * g[p] ** 2
            update = m[p] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v[p] / (1 - 0.999 ** (t + 1))) + 1e-8)
            decay = settings.weight_decay * values[p] if p == "lin/kernel" else 0
            values[p] = values[p] - np.asarray(rate(t)).item() * (update + decay)
    return values


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_update_is_adamw_after_clipping(clip):
    settings = Settings(epochs=1, learning_rate=0.05, weight_decay=0.1, clip=clip)
    gradients, state = [], PARAMS
    tx = make_optimizer(settings, 5, toy())
    opt = tx.init(state)
    for batch in toy_epoch(0):
        g = jax.grad(lambda p, b=batch: (lambda t, w: t / w)(*squares(p, b, None)))(state)
        gradients.append({k: np.asarray(x, np.float64) for k, x in flatten(g).items()})
        updates, opt = tx.update(g, opt, state)
        state = optax.apply_updates(state, updates)
    values = {k: np.asarray(x, np.float64) for k, x in flatten(PARAMS).items()}
    expected = adamw_by_hand(values, gradients, settings, 5)
    fitted = fit_toy(settings=settings)
    norms = [np.sqrt(sum((x**2).sum() for x in g.values())) for g in gradients]
    np.testing.assert_allclose([r["grad_norm"] for r in fitted.history], norms, rtol=1e-4)
    for path, x in flatten(fitted.params).items():
        np.testing.assert_allclose(x, expected[path], rtol=2e-4, atol=1e-5)


def one_step(problem, m, parts, batch):
    """Loss and gradient of one step; the optimizer hands the gradient on as it is."""
    params = tiny.roughen(m.init(jax.random.key(0), problem.model.params, problem.model.sites))
    tx = optax.with_extra_args_support(optax.scale(-1.0))
    state, frozen = start(m, params, tx)
    new, metrics = jax.jit(make_step(objective(problem), m, tx, parts))(state, frozen, batch, jax.random.key(0))
    return metrics, jax.tree.map(jnp.subtract, state.trainable, new.trainable)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_same_loss_and_gradient(e2e, parts):
    batch = next(b for b in e2e.epoch(0, 8, 0) if b["weight"].all())
    batch["loss_mask"][: 8 // parts] = 0  # unequal weights: the first part has none
    m = chain(lora(rank=2, targets=["linear"]), bitfit(create=True))
    whole, gradient = one_step(e2e, m, 1, batch)
    split, same = one_step(e2e, m, parts, batch)
    assert float(split["loss"]) == pytest.approx(float(whole["loss"]), rel=1e-5)
    assert float(whole["grad_norm"]) > 0.01
    for (path, a), b in zip(flatten(gradient).items(), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=path)


def test_penalty_and_optimizer_of_the_method_are_used():
    seen = []

    def optimizer(tx):
        def init(params):
            return tx.init(params), jnp.zeros((), jnp.int32)

        def update(updates, state, params=None, *, key, step, **extra):
            updates, inner = tx.update(updates, state[0], params, key=key, step=step, **extra)
            jax.debug.callback(lambda s, k: seen.append((int(s), tuple(k.tolist()))), step, jax.random.key_data(key))
            halved = jax.tree.map(lambda u: u / 2, updates)
            return halved, (inner, state[1] + 1)

        return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType] - asks for both

    settings = Settings(epochs=1, learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0)
    m = toy(penalty=lambda p: 7.0 * jnp.square(p["lin"]["bias"]).sum(), optimizer=optimizer)
    fitted = fit_toy(m, settings)
    jax.effects_barrier()
    plain = fit_toy(settings=settings)
    assert losses(fitted)[0] == pytest.approx(losses(plain)[0] + 21.0, rel=1e-6)
    assert [s for s, _ in sorted(seen)] == [0, 1, 2, 3, 4]
    assert len({k for _, k in seen}) == 5  # a key of its own each step
    batch = next(toy_epoch(0))
    gradient = jax.grad(lambda p: squares(p, batch, None)[0] / batch["weight"].sum() + m.penalty(p))(PARAMS)
    assert fitted.history[0]["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient)), rel=1e-5)
    once = fit_toy(m, Settings(steps=1, learning_rate=0.1, schedule="constant", warmup=0, weight_decay=0)).params
    moved = np.abs(once["lin"]["bias"] - PARAMS["lin"]["bias"])
    np.testing.assert_allclose(moved, 0.05, rtol=1e-4)  # Adam's first step is the rate, halved by the wrapper


# What it costs


def test_one_compilation_for_each_shape_and_one_trace(at, caplog):
    e2e, traces = tiny.problem(at, "llama", "e2e", max_buckets=2), []

    def counted(params, batch, key):
        traces.append(batch["input_ids"].shape)
        return objective(e2e)(params, batch, key)

    with jax.log_compiles():
        fitted = fit_problem(e2e, lora(rank=2), counted, steps=9)
    compiled = [r for r in caplog.messages if r.startswith("Finished XLA compilation of jit(step)")]
    shapes = {b["input_ids"].shape for n in range(3) for b in e2e.epoch(n, 8, 0)}
    assert fitted.compilations == len(shapes) == len(compiled) == len(traces) == len(set(traces)) == 2
    assert fitted.peak_bytes > sum(x.nbytes for x in jax.tree.leaves(e2e.model.params))


def test_the_flops_of_a_run_are_those_of_its_steps(e2e):
    whole, parts = fit_problem(e2e, full(), steps=3), fit_problem(e2e, full(), steps=3, layout="scan", accumulate=2)
    analytic = 6 * 8 * 3 * count(e2e.model.params) * next(e2e.epoch(0, 8, 0))["input_ids"].shape[1]
    assert whole.flops > 0.8 * analytic
    assert parts.flops == pytest.approx(whole.flops, rel=0.02)


def test_history_and_report():
    said = []
    fitted = fit_toy(evaluate=lambda p: {"loss": float(p["lin"]["bias"].sum())}, report=said.append)
    steps = [r for r in fitted.history if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 11))
    assert [r["step"] for r in fitted.history if "eval" in r] == [5, 10]
    assert fitted.best in fitted.history
    assert fitted.trainable == 19
    assert len(said) == len(fitted.history)
    assert {"step", "loss", "grad_norm", "time_left", "tokens", "total"} == set(said[0])
    assert fitted.step_seconds > 0
    assert fitted.seconds > 0


@pytest.mark.parametrize("every", [1, 3])
def test_the_step_time_is_measured_however_often_the_state_is_saved(tmp_path, every):
    assert 0 < fit_toy(settings=Settings(epochs=2, save_every=every), folder=tmp_path).step_seconds < 1
    assert 0 < fit_toy(settings=Settings(steps=1)).step_seconds < 1


def test_the_best_state_is_kept():
    worse_later = iter([3.0, 1.0, 2.0, 4.0])
    kept = []

    def evaluate(params):
        kept.append(params)
        return {"loss": next(worse_later)}

    fitted = fit_toy(settings=Settings(steps=8, eval_every=2, learning_rate=0.1), evaluate=evaluate)
    assert fitted.best == {"step": 4, "eval": {"loss": 1.0}}
    assert tiny.same(fitted.params, kept[1])
    assert not tiny.same(fitted.params, kept[3])


# How it stops


def test_a_loss_that_stops_being_finite(tmp_path):
    def poisoned(params, batch, key):
        total, weight = squares(params, batch, key)
        return jnp.where(batch["weight"][0] == 77, jnp.nan, total), weight

    def epoch(number, poison=True):
        for i, batch in enumerate(toy_epoch(number)):
            if poison and number == 1 and i == 2:
                batch["weight"][0] = 77
            yield batch

    settings = Settings(epochs=2, learning_rate=0.1, save_every=3)
    with pytest.raises(NonFinite, match=r"toy: at step 8 the loss is nan.*'step': 7, 'loss': \d") as e:
        fit(PARAMS, toy(), poisoned, epoch, 5, settings, folder=tmp_path)
    assert isinstance(e.value, ArithmeticError)
    folder = StateFolder(tmp_path / "state")
    assert folder.latest() == 7
    first, _ = start(toy(), PARAMS, make_optimizer(settings, 10, toy()))
    (state, _), _ = folder.restore(7, (first, [first.trainable]))
    folder.close()
    assert int(state.step) == 7
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    with pytest.raises(NonFinite, match="at step 8"):  # again: nothing was forgotten
        fit(PARAMS, toy(), poisoned, epoch, 5, settings, folder=tmp_path)
    mended = fit(PARAMS, toy(), poisoned, lambda n: epoch(n, False), 5, settings, folder=tmp_path)
    plain = fit(PARAMS, toy(), poisoned, lambda n: epoch(n, False), 5, settings)
    assert losses(mended) == losses(plain)
    assert tiny.same(mended.params, plain.params)


def test_a_huge_rate_and_a_non_finite_evaluation_stop():
    with pytest.raises(NonFinite, match="the last finite values were"):
        fit_toy(settings=Settings(epochs=20, learning_rate=1e30, clip=None, warmup=0))
    with pytest.raises(NonFinite, match=r"at step 5 the evaluation gives \{'loss': nan\}"):
        fit_toy(evaluate=lambda params: {"loss": float("nan")})


def test_an_interrupt_saves_the_state_and_says_how_to_resume(tmp_path):
    plain = fit_toy()

    def interrupt(record):
        if record["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"interrupted after step \d of 10; its state is saved in .*; to resume, do"):
        fit_toy(folder=tmp_path, report=interrupt, resume_hint="do so")
    assert signal.getsignal(signal.SIGINT) is before
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert 6 <= len(steps) <= 9  # the steps under way are read too
    resumed = fit_toy(folder=tmp_path)
    assert losses(resumed) == losses(plain)
    assert tiny.same(resumed.params, plain.params)
    with pytest.raises(Interrupted, match="nothing was saved"):
        fit_toy(report=interrupt)


def test_an_interrupt_in_the_last_evaluation_is_not_lost(tmp_path):
    def evaluate(params):
        os.kill(os.getpid(), signal.SIGINT)
        return {"loss": 1.0}

    with pytest.raises(Interrupted, match="after step 5 of 5"):
        fit_toy(settings=Settings(epochs=1), folder=tmp_path, evaluate=evaluate)
    fitted = fit_toy(settings=Settings(epochs=1), folder=tmp_path)
    assert fitted.best is not None
    assert [r["step"] for r in fitted.history] == [1, 2, 3, 4, 5, 5]


# How it goes on


def scores(params):
    return {"loss": float(jnp.abs(params["lin"]["kernel"]).sum())}


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 7, 10])
def test_a_run_cut_off_anywhere_ends_bit_equal(tmp_path, stop_at):
    settings = Settings(epochs=2, learning_rate=0.1, save_every=3)
    plain = fit_toy(settings=settings, evaluate=scores)

    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == stop_at:
            raise Killed

    with pytest.raises(Killed):
        fit_toy(settings=settings, evaluate=scores, folder=tmp_path, report=kill)
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 4, "lo')  # as a kill leaves it
    resumed = fit_toy(settings=settings, evaluate=scores, folder=tmp_path)
    assert resumed.history == plain.history
    assert resumed.best == plain.best
    assert tiny.same(resumed.params, plain.params)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == plain.history
    again = fit_toy(settings=settings, evaluate=scores, folder=tmp_path)  # finished: nothing is left to do
    assert again.history == plain.history
    assert tiny.same(again.params, plain.params)
    assert again.compilations == plain.compilations
    assert again.peak_bytes == plain.peak_bytes
    assert again.step_seconds > 0


DROPPING = chain(lora(rank=2, dropout=0.3), head())


@pytest.fixture(scope="module")
def uninterrupted(rte):
    return fit_problem(rte, DROPPING)


def test_a_real_model_with_dropout_resumes_bit_equal(rte, uninterrupted, tmp_path):
    def kill(record):
        if record["step"] == 5:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit_problem(rte, DROPPING, folder=tmp_path, report=kill, save_every=2)
    resumed = fit_problem(rte, DROPPING, folder=tmp_path, save_every=2)
    assert losses(resumed) == losses(uninterrupted)
    assert tiny.same(resumed.params, uninterrupted.params)


def test_the_seed_fixes_everything(rte, uninterrupted):
    again, other = (fit_problem(rte, DROPPING, seed=s) for s in (0, 1))
    assert losses(again) == losses(uninterrupted)
    assert tiny.same(again.params, uninterrupted.params)
    assert losses(other) != losses(uninterrupted)


def test_dropout_varies_by_step():
    keys = []

    def noisy(params, batch, key):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return squares(params, batch, key)

    fit_toy(loss=noisy, settings=Settings(epochs=1, batch_size=2, accumulate=2))
    jax.effects_barrier()
    assert len(keys) == len(set(keys)) == 10  # and by part


def test_an_epoch_shorter_than_promised_is_an_error():
    with pytest.raises(ValueError, match="epoch 0 has fewer batches than steps_per_epoch=9"):
        fit(PARAMS, toy(), squares, toy_epoch, 9, Settings(epochs=1))


def test_epochs_are_walked_in_order_with_their_own_batches():
    seen = []

    def epoch(number):
        seen.append(number)
        return toy_epoch(number)

    fit(PARAMS, toy(), squares, epoch, 5, Settings(steps=12))
    assert seen == [0, 1, 2]


# Layout and dtype


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_the_scanned_layout_trains_to_the_same_losses(e2e, name):
    m = {"lora": lora(rank=2, targets=["linear"]), "prefix": prefix(length=3, mlp=True, hidden=8)}[name]
    loop, scan = (fit_problem(e2e, m, layout=layout, steps=4) for layout in ("loop", "scan"))
    np.testing.assert_allclose(losses(scan), losses(loop), rtol=1e-5)
    assert "layers_*" in scan.params["model"]
    resolved = [m.resolve(f.params, None) for f in (loop, scan)]
    a, b = (Evaluator(e2e).on_dev(p)["loss"] for p in resolved)
    assert a == pytest.approx(b, rel=1e-4)


def test_a_bf16_base_trains_in_float32(at):
    problem = tiny.problem(at, "llama", "sst2", param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, max_buckets=1)
    for m in (chain(lora(rank=2), head()), full()):
        fitted = fit_problem(problem, m, steps=30, learning_rate=2e-2)
        mask, after = flatten(m.trainable(fitted.params)), flatten(fitted.params)
        assert {x.dtype.name for p, x in after.items() if mask[p]} == {"float32"}
        assert {x.dtype.name for p, x in after.items() if not mask[p]} <= {"bfloat16"}
        assert np.mean(losses(fitted)[-3:]) < 0.7 * np.mean(losses(fitted)[:3])


def test_the_callers_arrays_survive_donation():
    params = jax.tree.map(jnp.copy, PARAMS)
    fit(params, toy(), squares, toy_epoch, 5, Settings(epochs=1))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))  # a donated array would raise
    assert isinstance(start(toy(), params, make_optimizer(Settings(), 5, toy()))[0], TrainState)


def test_a_partition_comes_back_whole():
    state, frozen = start(toy(masks.by_path("lin/.*")), PARAMS, optax.sgd(0.1))
    assert tiny.same(combine(state.trainable, frozen), PARAMS)


# Bad settings


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"accumulate": 0}, "accumulate must be at least 1; got 0"),
        ({"batch_size": 6, "accumulate": 4}, "batch_size 6 does not divide into accumulate=4"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number above 0; got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be a number above 0"),
        ({"clip": -1.0}, "clip must be a number above 0"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0"),
        ({"warmup": 2}, "warmup is a share"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"save_every": 0}, "save_every must be at least 1"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"schedule": "cubic"}, "there is no schedule 'cubic'"),
        ({"layout": "pile"}, "there is no layout 'pile'"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_that_cannot_be(bad, said):
    with pytest.raises(ValueError, match=said):
        Settings(**bad)


def test_all_combinations_of_good_settings():
    for name, layout in itertools.product(("linear", "cosine", "constant"), ("loop", "scan")):
        assert Settings(schedule=name, layout=layout).clip == 1.0
