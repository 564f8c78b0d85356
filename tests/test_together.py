"""Several runs in one program are what each would be alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from peftjax import chain
from peftjax.hub import redraw
from peftjax.layout import stack_layers
from peftjax.loop import NonFinite, Run, _Program, fit, fit_together
from peftjax.methods import METHODS, adalora, bitfit, dora, full, head, lora, lora_plus, parse, prefix
from peftjax.methods.ranked import Ranked, one_rank, own_rank
from peftjax.problem import Evaluator, objective
from peftjax.together import alike, share
from peftjax.train import Settings
from peftjax.tree import count, flatten
from peftjax.weights import dot, materialize, merge, take

COMMON = Settings(batch_size=8, steps=8, learning_rate=1e-2, eval_every=4)
SEEDS = [
    dataclasses.replace(COMMON, seed=0),
    dataclasses.replace(COMMON, seed=3, learning_rate=2e-3),
    dataclasses.replace(COMMON, seed=5, data_seed=1),
]


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def rte(at):
    return tiny.problem(at, "bert", "rte", max_buckets=2)


@pytest.fixture(scope="module")
def e2e(at):
    return tiny.problem(at, "llama", "e2e", max_buckets=1)


def runs(problem, methods, settings, folders=None):
    """The runs, and the method of their steps."""
    made = []
    for i, (m, s) in enumerate(zip(methods, settings, strict=True)):
        model = redraw(problem.model, s.seed) if problem.model.fresh else problem.model
        batches = problem.epoch(0, s.batch_size, s.order)
        m = m.observed(objective(problem), model.params, model.sites, batches)
        params = m.init(jax.random.key(s.seed), model.params, model.sites)

        def epoch(number, s=s):
            return problem.epoch(number, s.batch_size, s.order)

        made.append(Run(params, s, epoch, None if folders is None else folders[i]))
    return made, m


EVALUATORS: dict[int, Evaluator] = {}  # by problem, which lives as long as the module: they compile once


def train(problem, methods, settings, folders=None, **rest):
    made, m = runs(problem, methods, settings, folders)
    steps = problem.steps_per_epoch(settings[0].batch_size)
    evaluate = EVALUATORS.setdefault(id(problem), Evaluator(problem)).on_dev
    return fit_together(made, m, objective(problem), steps, evaluate=evaluate, **rest)


def alone(problem, m, s):
    (fitted,) = train(problem, [m], [s])
    assert not isinstance(fitted, NonFinite)
    return fitted


def losses(fitted):
    return [r["loss"] for r in fitted.history if "loss" in r]


def check_same(together, separate):
    for a, b in zip(together, separate, strict=True):
        assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
        for path, x in flatten(a.params).items():
            y = np.asarray(flatten(b.params)[path], np.float64)
            # Adam turns a rounding error of a gradient near 0 into one of a whole step, so not entry by entry
            assert np.linalg.norm(x - y) <= 1e-5 * max(np.linalg.norm(y), 1e-3), path
        assert (a.trainable, a.best["step"]) == (b.trainable, b.best["step"])
        assert [r.get("step") for r in a.history] == [r.get("step") for r in b.history]
        for x, y in zip(a.history, b.history, strict=True):
            assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-5)
            assert x.get("eval", {}) == pytest.approx(y.get("eval", {}), rel=1e-5, abs=1e-6)


SOME = {
    "full": full(),
    "lora": lora(rank=2, targets=["linear"], dropout=0.3),
    "lora_fa": parse("lora_fa(rank=2)")["lora_fa(rank=2)"],
    "adalora": adalora(1, 2, warmup=1, final=2),
    "child_tuning": METHODS["child_tuning"](p=0.5),
    "fishmask": METHODS["fishmask"](fraction=0.01, samples=8),
    "dylora": METHODS["dylora"](rank=3),
    "prefix": prefix(length=2, mlp=True, hidden=4),
}


@pytest.mark.parametrize("name", SOME)
def test_seeds_and_rates_in_one_program_equal_separate_runs(e2e, name):
    m = SOME[name]
    separate = [alone(e2e, m, s) for s in SEEDS[1:]]
    assert separate[0].history[0]["loss"] != separate[1].history[0]["loss"]
    together = train(e2e, [m] * 2, SEEDS[1:])
    check_same(together, separate)
    assert all(isinstance(f, NonFinite) or f.together == 2 for f in together)


def test_eight_seeds_equal_eight_separate_runs(rte):
    seeds = [dataclasses.replace(COMMON, seed=seed, steps=4) for seed in range(8)]
    m = chain(lora(rank=1, targets=["query"]), head())
    check_same(train(rte, [m] * 8, seeds), [alone(rte, m, s) for s in seeds])


@pytest.mark.parametrize("lanes", [1, 2])
def test_lanes_change_no_number(rte, lanes):
    m = chain(lora(rank=2, dropout=0.2), head())
    separate = [alone(rte, m, s) for s in SEEDS]  # heads of their own seeds, too
    check_same(train(rte, [m] * 3, SEEDS, lanes=lanes), separate)


@pytest.mark.parametrize("how", [{"layout": "scan"}, {"accumulate": 2}, {"update": "backward", "clip": None}], ids=str)
def test_ways_to_train_go_together_too(e2e, how):
    settings = [dataclasses.replace(s, **how) for s in SEEDS[:2]]
    check_same(train(e2e, [bitfit(create=True)] * 2, settings), [alone(e2e, bitfit(create=True), s) for s in settings])


def test_runs_of_one_order_share_each_batch(e2e):
    settings = [dataclasses.replace(s, data_seed=7) for s in SEEDS]
    made, m = runs(e2e, [lora(rank=1)] * 3, settings)
    made = [made[0], *(r._replace(epoch=None) for r in made[1:])]  # not called
    together = fit_together(made, m, objective(e2e), e2e.steps_per_epoch(8))
    separate = [alone(e2e, lora(rank=1), s) for s in settings]
    for a, b in zip(together, separate, strict=True):
        np.testing.assert_allclose(losses(a), losses(b), 1e-5)


# Ranks


@pytest.mark.parametrize(
    "methods",
    [
        [lora(rank=r, targets=["linear"], dropout=0.2) for r in (1, 4, 2)],
        [lora(rank=r, alpha=8, targets=["embedding", "value"]) for r in (1, 2, 3)],
        [lora_plus(rank=r, alpha=4, ratio=4) for r in (4, 1, 2)],
    ],
    ids=["ranks", "scales and embeddings", "rates by factor"],
)
def test_ranks_in_one_program_equal_separate_runs(e2e, methods):
    settings = [dataclasses.replace(COMMON, seed=s) for s in (0, 0, 1)]
    separate = [alone(e2e, m, s) for m, s in zip(methods, settings, strict=True)]
    together = train(e2e, methods, settings)
    check_same(together, separate)
    assert len({f.trainable for f in separate}) == 3


def test_ranks_of_a_part_of_a_fused_product(at):
    problem = tiny.problem(at, "gpt2", "e2e", max_buckets=1)
    methods = [lora(rank=r, alpha=2, targets=["query", "value"]) for r in (1, 3)]
    settings = [COMMON, COMMON]
    separate = [alone(problem, m, s) for m, s in zip(methods, settings, strict=True)]
    check_same(train(problem, methods, settings), separate)


def test_a_ranked_lora_is_the_lora_of_its_rank():
    keys = jax.random.split(jax.random.key(0), 4)
    base, x = jax.random.normal(keys[0], (6, 5)), jax.random.normal(keys[1], (3, 6))
    params = {"q": {"kernel": base}}

    def made(r):
        w = lora(r, alpha=3, targets=["q/kernel"]).init(keys[2], params, ())["q"]["kernel"]
        return {"q": {"kernel": dataclasses.replace(w, b=jax.random.normal(keys[3], w.b.shape))}}

    small, large = made(2), made(4)
    padded = one_rank([small, large])[0]["q"]["kernel"]
    assert isinstance(padded, Ranked)
    assert padded.a.shape == (6, 4)
    small = small["q"]["kernel"]
    for f in (lambda w: dot(w, x), materialize, lambda w: take(w, jnp.array([1, 4])), lambda w: merge({"w": w})["w"]):
        np.testing.assert_allclose(f(padded), f(small), rtol=1e-6, atol=1e-6)
    again = own_rank({"w": padded}, {"w": small})["w"]
    assert tiny.same(again, small)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    assert type(one_rank([small, small])[0]) is type(small)


# What is held


@pytest.mark.parametrize("layout", ["loop", "scan"])
@pytest.mark.parametrize("ranks", [(1, 1), (1, 2)])
def test_no_layout_copies_the_base_for_each_run(e2e, layout, ranks):
    settings = [dataclasses.replace(s, layout=layout, data_seed=0) for s in SEEDS[:2]]
    made, m = runs(e2e, [lora(rank=r) for r in ranks], settings)
    program = _Program(made, m, objective(e2e), 8, 2)
    own = sum(x.size for x, axis in zip(program.frozen, program.axes, strict=True) if axis == 0)
    assert sum(x.size for x in program.frozen) - own == count(e2e.model.params)
    assert own <= 2 * 2 * 4 * tiny.LAYERS  # the ranks' scales
    left = [flatten(program.params(program.trainable(program.state, i), i)) for i in range(2)]
    frozen = [p for p in left[0] if not p.endswith(("/a", "/b"))]
    assert frozen
    assert all(left[0][p] is left[1][p] for p in frozen)
    for params, run in zip(left, made, strict=True):
        first = flatten(stack_layers(run.params) if layout == "scan" else run.params)
        assert {p: x.shape for p, x in params.items()} == {p: x.shape for p, x in first.items()}


def test_the_base_is_held_once(e2e):
    made, _ = runs(e2e, [lora(rank=1)] * 3, SEEDS)
    arrays, axes, whole = share([r.params for r in made])
    base = count(e2e.model.params)
    assert sum(x.size for x, axis in zip(arrays, axes, strict=True) if axis is None) == base
    assert sum(x.size for x, axis in zip(arrays, axes, strict=True) if axis == 0) == 3 * (count(made[0].params) - base)
    one = whole([x if axis is None else x[1] for x, axis in zip(arrays, axes, strict=True)])
    assert tiny.same(one, made[1].params)


def test_what_a_seed_draws_and_keeps_frozen_is_its_own(e2e):
    frozen = {p for p in flatten(runs(e2e, [SOME["lora_fa"]], SEEDS[:1])[0][0].params) if p.endswith("/a")}
    together = train(e2e, [SOME["lora_fa"]] * 2, SEEDS[:2])
    a, b = (flatten(f.params) for f in together if not isinstance(f, NonFinite))
    assert frozen
    assert not any(np.allclose(a[p], b[p]) for p in frozen)


# What ends early, and what resumes


def test_a_run_that_diverges_leaves_the_others_alone(e2e, tmp_path):
    settings = [COMMON, dataclasses.replace(COMMON, learning_rate=1e30), dataclasses.replace(COMMON, seed=1)]
    seen = []
    folders = [tmp_path / str(i) for i in range(3)]
    m = full()
    first, second, third = train(e2e, [m] * 3, settings, folders, report=seen.append, states=tmp_path / "states")
    assert isinstance(second, NonFinite)
    assert "full: at step" in str(second)
    check_same([first, third], [alone(e2e, m, s) for s in (settings[0], settings[2])])
    steps = [r["loss"] for r in seen if "loss" in r]
    assert np.isfinite(steps).all()
    assert len(steps) == 8
    assert len((folders[1] / "log.jsonl").read_text().splitlines()) < 8
    again = train(e2e, [m] * 3, settings, folders, states=tmp_path / "states")  # it was over: nothing is done again
    assert str(again[1]) == str(second)
    check_same([again[0], again[2]], [first, third])


def test_runs_that_all_diverge_stop(e2e):
    settings = [dataclasses.replace(COMMON, learning_rate=1e30, seed=s, steps=400) for s in range(2)]
    seen = []
    found = train(e2e, [full()] * 2, settings, report=seen.append)
    assert all(isinstance(f, NonFinite) for f in found)
    assert len(seen) < 20


def test_runs_that_all_diverged_stay_so(e2e, tmp_path):
    settings = [dataclasses.replace(COMMON, learning_rate=r, warmup=0.0) for r in (1e30, 1e33)]
    found, again = (train(e2e, [full()] * 2, settings, states=tmp_path / "states") for _ in range(2))
    assert list(map(str, again)) == list(map(str, found))


class Killed(BaseException):
    pass


def test_a_killed_program_resumes_where_all_its_runs_were(e2e, tmp_path):
    settings = [dataclasses.replace(s, save_every=3) for s in SEEDS]
    folders = [tmp_path / str(i) for i in range(3)]
    m = lora(rank=2, dropout=0.3)

    def kill(record):
        if record["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        train(e2e, [m] * 3, settings, folders, states=tmp_path / "states", report=kill)
    steps = []
    resumed = train(
        e2e, [m] * 3, settings, folders, states=tmp_path / "states", report=lambda r: steps.append(r["step"])
    )
    assert min(steps) == 7
    check_same(resumed, train(e2e, [m] * 3, settings))


# Refusals


def test_runs_that_cannot_go_together_say_why(e2e):
    made, m = runs(e2e, [lora(rank=1)] * 2, SEEDS[:2])
    other = made[1]._replace(settings=dataclasses.replace(COMMON, batch_size=4, clip=0.5))
    with pytest.raises(ValueError, match=r"may differ in seed, data_seed, learning_rate; .* \['batch_size', 'clip'\]"):
        fit_together([made[0], other], m, objective(e2e), 3)
    with pytest.raises(ValueError, match="lanes must be at least 1; got 0"):
        fit_together(made, m, objective(e2e), 3, lanes=0)
    (a,), (b,), (c,) = (
        runs(e2e, [m], SEEDS[:1])[0] for m in (dora(rank=1), dora(rank=2), lora(rank=1, targets=["key"]))
    )
    with pytest.raises(ValueError, match=r"kernel/a is \(16, 1\) in run 0 and \(16, 2\) in run 1"):
        alike([a.params, b.params])
    with pytest.raises(ValueError, match="cannot train in one program"):
        alike([a.params, c.params])


def test_batches_of_two_shapes_are_refused(e2e):
    made, m = runs(e2e, [lora(rank=1)] * 2, SEEDS[:2])
    one = next(made[0].epoch(0))
    short = {k: v[:4] for k, v in one.items()}
    made = [made[0]._replace(epoch=lambda n: iter([one])), made[1]._replace(epoch=lambda n: iter([short]))]
    with pytest.raises(ValueError, match="need batches of one shape at each step"):
        fit_together(made, m, objective(e2e), 1)


def test_fit_is_one_run_of_it(e2e):
    (run,), m = runs(e2e, [lora(rank=1)], SEEDS[:1])
    fitted = fit(run.params, m, objective(e2e), run.epoch, e2e.steps_per_epoch(8), SEEDS[0])
    assert fitted.together == 1
    assert fitted.best is None
