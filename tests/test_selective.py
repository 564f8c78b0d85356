"""Norm tuning, trainable tokens and Child-Tuning against `peft`, torch autograd and the papers' equations."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import tiny
from reference import Link, check, fill, negative_log_likelihood, pair, peft, randomise, start

from peftjax import chain, hub, merge, partition
from peftjax.loop import fit
from peftjax.methods import child_tuning, full, lora_fa, norm_tuning, pissa, prefix, trainable_tokens, vera
from peftjax.methods.child_tuning import drawn_gradients
from peftjax.methods.fishmask import Sparse, fisher
from peftjax.methods.trainable_tokens import Tokens
from peftjax.models.base import hf_name
from peftjax.train import Settings
from peftjax.tree import flatten
from peftjax.weights import Trained, attend, is_node, take

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
__all__ = ["pair"]  # a fixture


# Norm tuning

NORMS = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
NORMS["gpt2"] = ["ln_1", "ln_2", "ln_f"]


@pytest.mark.parametrize("name", NORMS)
def test_norm_tuning(pair, name):
    """peft trains a copy of each norm; the same names, the same logits and gradients."""
    base, method = pair(name), norm_tuning()
    config = peft.LNTuningConfig(target_modules=NORMS[name])
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    params = start(base, method)
    ours = flatten(partition(params, method.trainable(params))[0])
    assert len(named) == len(ours)
    links = {}
    for path in ours:
        module, _, leaf = hf_name(path.removesuffix("/value")).rpartition(".")
        links[path] = Link(named[f"base_model.model.{module}.ln_tuning_layers.default.{leaf}"])
    randomise(theirs, links)
    check(base, theirs, method, fill(params, links), links)


# Trainable tokens

TOKENS = {
    "llama": ("llama", ["embed_tokens"], trainable_tokens([2, 5, 11])),
    "bert": ("bert", ["word_embeddings"], trainable_tokens([2, 5, 11])),
    "tied": ("llama-tied", ["embed_tokens"], trainable_tokens([2, 5, 11])),
    "gpt2, tied": ("gpt2", ["wte"], trainable_tokens([2, 5, 11])),
}


@pytest.mark.parametrize("name", TOKENS)
def test_trainable_tokens(pair, name):
    base, targets, method = TOKENS[name]
    base = pair(base)
    base.batch["input_ids"][0, :3] = [2, 5, 11]
    config = peft.TrainableTokensConfig(target_modules=targets, token_indices=[2, 5, 11])
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    (delta,) = (p for n, p in theirs.named_parameters() if "trainable_tokens_delta" in n)
    (path,) = (p for p in flatten(start(base, method)) if p.endswith("/rows"))
    links = {path: Link(delta)}
    np.testing.assert_array_equal(flatten(start(base, method))[path], links[path].value())  # the rows as they are
    randomise(theirs, links)
    check(base, theirs, method, fill(start(base, method), links), links)


def test_the_products_of_tokens_are_those_of_the_changed_table(key):
    table, rows = jax.random.normal(key, (9, 4)), jnp.arange(8.0).reshape(2, 4)
    changed = np.array(table)
    changed[[3, 8]] = rows
    ids = jnp.array([[0, 3, 8], [8, 7, 2]])
    for only in (None, "take"):
        w = Tokens(table, jnp.array([3, 8]), rows, only)
        np.testing.assert_array_equal(take(w, ids), changed[np.asarray(ids)])
        want = changed if only is None else np.asarray(table)
        np.testing.assert_allclose(attend(w, rows), rows @ want.T, rtol=1e-5)
    np.testing.assert_array_equal(merge({"e": Tokens(table, jnp.array([3, 8]), rows)})["e"], changed)
    with pytest.raises(ValueError, match="look-up of a tied embedding only"):
        merge({"e": w})


def test_the_most_frequent_tokens_are_those_that_are_no_padding():
    model = hub.from_config(tiny.config("llama"), "causal-lm")
    ids, mask = np.array([[7, 7, 9, 9], [9, 3, 0, 0]]), np.array([[1, 1, 1, 1], [1, 1, 0, 0]])
    batches = [{"input_ids": ids, "attention_mask": mask}]
    method = trainable_tokens(count=2).observed(full, model.params, model.sites, iter(batches))
    node = method.init(jax.random.key(0), model.params, model.sites)["model"]["embed_tokens"]["embedding"]
    assert node.ids.tolist() == [7, 9]
    few = trainable_tokens(count=50).observed(full, model.params, model.sites, iter(batches))
    node = few.init(jax.random.key(0), model.params, model.sites)["model"]["embed_tokens"]["embedding"]
    assert node.ids.tolist() == [3, 7, 9]
    with pytest.raises(ValueError, match="hold no token"):
        trainable_tokens(count=2).observed(full, model.params, model.sites, [])
    state = optax.adam(1e-3).init(
        partition(
            few.init(jax.random.key(0), model.params, model.sites),
            few.trainable(few.init(jax.random.key(0), model.params, model.sites)),
        )[0]
    )
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (3, tiny.WIDTH)}


# Child-Tuning


def test_child_tuning_f_draws_the_asked_share_and_scales_it():
    """Of ones, what reaches the optimizer is 0 or 1/p; how many by the binomial law, afresh in each step."""
    p, shapes = 0.3, {"a": (200, 300), "b": (5000,)}
    seen = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), lambda updates, state, params=None, **extra: (updates, state)
    )
    tx = child_tuning("F", p).optimizer(seen)
    grads = {k: jnp.ones(s) for k, s in shapes.items()}
    draws = []
    for step in range(4):
        out, _ = tx.update(grads, tx.init(grads), grads, key=jax.random.key(step), step=step)
        for k, x in out.items():
            values = np.unique(np.asarray(x))
            np.testing.assert_allclose(values, [0, 1 / p], rtol=1e-6)
            n = x.size
            test = scipy.stats.binomtest(int((x > 0).sum()), n, p)
            assert test.pvalue > 1e-4, (k, float((x > 0).mean()))
        draws.append(np.asarray(out["a"]))
    same = (draws[0] > 0) == (draws[1] > 0)
    assert abs(same.mean() - (p**2 + (1 - p) ** 2)) < 0.01, "the steps' masks must be independent"
    mean = np.mean(draws)
    assert abs(mean - 1) < 0.02, "the expected gradient is the gradient"


def test_child_tuning_f_is_adam_on_masked_gradients(key):
    """Equation 4 with the moments of the masked gradient; in float64 numpy."""
    tx = drawn_gradients(optax.adam(0.1, eps=1e-6), 0.4)
    w = np.linspace(-1, 1, 50)
    m, v = np.zeros(50), np.zeros(50)
    ours, state = {"w": jnp.asarray(w, jnp.float32)}, None
    state = tx.init(ours)
    for t in range(1, 6):
        step_key = jax.random.fold_in(key, t)
        g = np.cos(w)  # a gradient that depends on where we are
        mask = np.asarray(jax.random.bernoulli(jax.random.split(step_key, 1)[0], 0.4, (50,)))
        masked = g * mask / 0.4
        m, v = 0.9 * m + 0.1 * masked, 0.999 * v + 0.001 * masked**2
        w = w - 0.1 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        updates, state = tx.update({"w": jnp.cos(ours["w"])}, state, ours, key=step_key)
        ours = optax.apply_updates(ours, updates)
        np.testing.assert_allclose(ours["w"], w, atol=1e-4)
        assert 0 < mask.sum() < 50


OTHERS = [lora_fa(rank=2), pissa(rank=2), vera(rank=2), prefix(2)]


@pytest.mark.parametrize("other", OTHERS, ids=lambda m: m.spec[0][0])
def test_child_tuning_f_draws_from_the_base_alone(pair, other):
    """Beside another method: the base trains, that method's own leaves as it says, and theirs is the whole gradient."""
    model = pair("gpt2").ours
    both = chain(other, child_tuning("F", 0.4))
    params = both.init(jax.random.key(0), model.params, model.sites)
    theirs, mask = flatten(other.trainable(params)), flatten(both.trainable(params))
    base = sum(x.size for x in jax.tree.leaves(model.params))
    trained = sum(x.size for p, x in flatten(params).items() if mask[p] and not theirs[p])
    assert trained == base
    trainable, _ = partition(params, both.trainable(params))
    tx = both.optimizer(optax.with_extra_args_support(optax.identity()))
    out, _ = tx.update(jax.tree.map(jnp.ones_like, trainable), tx.init(trainable), trainable, key=jax.random.key(1))
    for path, x in flatten(out).items():
        assert set(np.unique(x)) <= ({1.0} if theirs[path] else {0.0, np.float32(2.5)}), path


def test_child_tuning_d_trains_the_largest_of_the_blocks_and_all_of_the_rest(pair):
    base, p = pair("bert"), 0.2
    batch = {**base.batch, "labels": np.array([0, 2, 1]), "weight": np.ones(3, np.float32)}
    objective = negative_log_likelihood(lambda p, b: base.ours.forward(p, b).logits)
    method = child_tuning("D", p).observed(objective, base.ours.params, base.ours.sites, [batch])
    params = start(base, method)
    scores = flatten(fisher(objective, base.ours.params, [batch]))
    blocks = {k: np.asarray(x).ravel() for k, x in scores.items() if "/layer_" in k}
    pool = np.sort(np.concatenate(list(blocks.values())))
    k = int(p * len(pool))
    nodes = flatten(params, is_leaf=is_node)
    sparse = {path: n for path, n in nodes.items() if isinstance(n, Sparse)}
    assert set(sparse) <= set(blocks)
    assert sum(len(n.indices) for n in sparse.values()) == k
    for path, x in blocks.items():
        chosen = set(sparse[path].indices.tolist()) if path in sparse else set()
        assert set(np.flatnonzero(x > pool[-k]).tolist()) <= chosen
        assert not chosen & set(np.flatnonzero(x < pool[-k]).tolist())
    rest = {path for path, n in nodes.items() if isinstance(n, Trained)}
    assert rest == set(scores) - set(blocks)
    settings = Settings(steps=3, learning_rate=1e-2, warmup=0.0, weight_decay=0.0, batch_size=3)
    fitted = fit(params, method, objective, lambda i: iter([batch]), 1, settings)
    for path, w in flatten(merge(fitted.params)).items():
        moved = np.asarray(w).ravel() != np.asarray(flatten(base.ours.params)[path]).ravel()
        if path in blocks:
            allowed = sparse[path].indices.tolist() if path in sparse else []
            assert set(np.flatnonzero(moved)) <= set(allowed), path
    with pytest.raises(ValueError, match="at least one example"):
        child_tuning("D").observed(objective, base.ours.params, base.ours.sites, [])
