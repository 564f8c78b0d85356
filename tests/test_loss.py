"""The chunked cross-entropy is the plain one: its values and gradients, with fewer bytes and no more FLOPs."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from peftjax import hub
from peftjax.likelihood import Likelihood
from peftjax.loss import _read_by, cross_entropy, log_likelihoods
from peftjax.methods import full, lora
from peftjax.mixed import mix
from peftjax.problem import objective, prepare
from peftjax.proxy import proxy
from peftjax.quantize import nf4
from peftjax.tree import combine, partition
from peftjax.weights import merge

VOCABULARY = 250_880  # BLOOM's and mT5's, nearly
HEADS = {  # family, changes to its config, method
    "untied": ("llama", {}, full()),
    "tied": ("llama", {"tie_word_embeddings": True}, full()),
    "LoRA on the head": ("llama", {}, lora(rank=2, targets=["lm_head", "query"])),
    "LoRA on the table": ("gpt2", {}, lora(rank=2, targets=["embedding"], tied_embedding="both")),
    "embed_out": ("gpt_neox", {"tie_word_embeddings": False}, full()),
    "scaled": ("t5", {}, full()),
    "T5's own": ("t5", {"tie_word_embeddings": False}, full()),
    "with a bias": ("bart", {}, full()),
    "capped": ("gemma2", {"final_logit_softcapping": 2.0}, full()),
    "projected": ("opt", {"word_embed_proj_dim": 12}, full()),
}


def _plain(head, params, hidden, targets, weights):
    return (optax.softmax_cross_entropy_with_integer_labels(head(params, hidden), targets) * weights).sum()


def _tokens(*shape, vocabulary=24):
    rng = np.random.default_rng(0)
    return rng.integers(0, vocabulary, shape), rng.uniform(size=shape).astype(np.float32)


def _close(a, b, rtol=1e-5):
    """Relative to the largest entry of each array."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * max(np.abs(y).max(initial=0.0), 1e-2))


@functools.cache
def _model(name):
    family, changes, method = HEADS[name]
    model = hub.from_config(tiny.config(family, **changes), "generation")
    params = method.init(jax.random.key(0), model.params, model.sites)
    return model, *partition(tiny.roughen(params), method.trainable(params))


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_the_plain_ones(name):
    """13 positions in chunks of 3, the last one padded."""
    model, trainable, frozen = _model(name)
    width = getattr(model.config, "word_embed_proj_dim", tiny.WIDTH)
    hidden = np.random.default_rng(1).normal(size=(3, 13, width)).astype(np.float32)
    targets, weights = _tokens(3, 13)

    def of(loss, **kwargs):
        def f(trainable, hidden, weights):
            return loss(model.logits, combine(trainable, frozen), hidden, targets, weights, **kwargs)

        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(trainable, hidden, weights), jax.jit(f)

    (loss, grads), alone = of(cross_entropy, tokens=12)
    expected, _ = of(_plain)
    _close((loss, grads), expected)
    _close(alone(trainable, hidden, weights), loss, 1e-6)


@pytest.mark.parametrize("name", ["tied", "with a bias", "projected"])
def test_the_head_alone_and_the_states_alone_are_the_model(name):
    model, trainable, frozen = _model(name)
    batch = {"input_ids": _tokens(2, 5)[0]}
    if model.family.start_id is not None:
        batch["decoder_input_ids"] = batch["input_ids"]

    @jax.jit
    def run(params):
        alone = model.forward(params, batch, hidden_only=True)
        assert alone.logits is None
        whole = model.forward(params, batch)
        return (alone.hidden, model.logits(params, alone.hidden)), (whole.hidden, whole.logits)

    _close(*run(combine(trainable, frozen)))


def test_only_what_the_head_reads_is_differentiated():
    for name, leaves in (("tied", 1), ("untied", 1), ("LoRA on the head", 3), ("with a bias", 2)):
        model, trainable, frozen = _model(name)
        hidden = jnp.ones((2, 3, tiny.WIDTH))
        read, _, vocabulary = _read_by(model.logits, combine(trainable, frozen), hidden)
        assert (len(read), vocabulary) == (leaves, model.config.vocab_size), name


def test_a_problem_is_trained_on_the_plain_loss(tmp_path):
    """The shifted targets of whole texts, by a decoder; its gradients reach all layers."""
    folder = tiny.folder(tmp_path / "llama", "llama", tie_word_embeddings=True)
    problem = prepare(str(folder), "e2e", str(tiny.data(tmp_path / "e2e", "e2e")))
    model, batch = problem.model, next(problem.epoch(0, 4, 0))

    def plain(params):
        logits = model.forward(params, batch).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
        weight = batch["loss_mask"][:, 1:] * batch["weight"][:, None]
        return (each * weight).sum(), weight.sum()

    both = [
        jax.jit(jax.value_and_grad(f, has_aux=True))(model.params)
        for f in (lambda p: objective(problem)(p, batch, None), plain)
    ]
    _close(*both)


def test_codes_and_keys_may_be_among_the_parameters():
    """A head of NF4 codes and a trained vector, with dropout: other draws in each chunk."""
    params = {"w": nf4(jnp.asarray(np.random.default_rng(2).normal(size=(64, 24)), jnp.float32)), "b": jnp.ones(24)}
    params |= {"key": jax.random.key(3), "unread": jnp.arange(3)}
    targets, weights = _tokens(2, 8)
    hidden = jnp.ones((2, 8, 64))

    def drop(key, x):
        return x * jax.random.bernoulli(key, 0.5, x.shape)

    def head(params, x):
        return params["w"].dot(drop(params["key"], x)) + params["b"]

    def loss(b, hidden, tokens):
        return cross_entropy(head, params | {"b": b}, hidden, targets, weights, tokens)

    def plain(b, hidden, tokens):
        keys = [jax.random.fold_in(params["key"], i) for i in range(4)] if tokens else [params["key"]]
        parts = jnp.split(hidden, len(keys), axis=1)
        dropped = jnp.concatenate([drop(k, x) for k, x in zip(keys, parts, strict=True)], axis=1)
        return _plain(lambda p, x: p["w"].dot(x) + p["b"], params | {"b": b}, dropped, targets, weights)

    for tokens in (None, 4):
        ours, theirs = (
            jax.jit(jax.value_and_grad(functools.partial(f, tokens=tokens), (0, 1)))(params["b"], hidden)
            for f in (loss, plain)
        )
        _close(ours, theirs)


def _linear(dtype=jnp.float32):
    rng = np.random.default_rng(4)
    table, hidden = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((24, 16), (3, 8, 16)))
    targets, weights = _tokens(3, 8)
    return table, hidden.astype(dtype), targets, weights


def _attend(table, x):
    return jnp.einsum("...d,vd->...v", x, table.astype(x.dtype)).astype(jnp.float32)


def test_gradients_of_each_example_under_vmap():
    def one(table, x, y, w, loss):
        return loss(_attend, table, x[None], y[None], w[None])

    ours, plain = (functools.partial(one, loss=f) for f in (functools.partial(cross_entropy, tokens=2), _plain))
    each = [jax.jit(jax.vmap(jax.grad(f, (0, 1)), (None, 0, 0, 0)))(*_linear()) for f in (ours, plain)]
    _close(*each)
    sums = [
        jax.jit(jax.grad(lambda *a, f=f: jax.vmap(f, (None, 0, 0, 0))(*a).sum()))(*_linear()) for f in (ours, plain)
    ]
    _close(*sums)


@pytest.mark.parametrize("head", [jnp.float32, jnp.bfloat16])
def test_bfloat16_states(head):
    """A chunk's gradient is rounded once, as the plain one is; the sum of them is not rounded until the end."""
    table, *rest = _linear(jnp.bfloat16)
    table = table.astype(head)
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(jax.value_and_grad(functools.partial(cross_entropy, _attend, tokens=6), (0, 1)))(table, *rest)
    plain = jax.jit(jax.value_and_grad(functools.partial(_plain, _attend), (0, 1)))(table, *rest)
    _close(ours, plain, 1e-2)
    assert [x.dtype for x in ours[1]] == [head, jnp.bfloat16]


def test_weights_may_be_whole_numbers():
    table, hidden, targets, weights = _linear()
    both = [
        jax.jit(jax.value_and_grad(functools.partial(f, _attend), (0, 1)))(
            table, hidden, targets, np.int32(weights > 0.5)
        )
        for f in (cross_entropy, _plain)
    ]
    _close(*both)


def test_likelihoods_in_chunks():
    table, hidden, targets, _ = _linear()
    logprobs, greedy = jax.jit(functools.partial(log_likelihoods, _attend, tokens=9))(table, hidden, targets)
    every = jax.nn.log_softmax(_attend(table, hidden))
    np.testing.assert_allclose(logprobs, np.take_along_axis(every, targets[..., None], -1)[..., 0], rtol=1e-5)
    assert (greedy == (every.argmax(-1) == targets)).all()


def test_heads_of_several_models_at_once():
    """Proxy-tuning's three heads and mixed adapters, row by row; a likelihood reads the former."""
    model, trainable, frozen = _model("LoRA on the head")
    params, batch = combine(trainable, frozen), {"input_ids": _tokens(2, 5)[0]}
    other = combine(jax.tree.map(lambda x: 2 * x, trainable), frozen)
    method = HEADS["LoRA on the head"][2]
    base = merge(combine(jax.tree.map(jnp.zeros_like, trainable), frozen))
    mixed, both = mix(model._replace(params=base), [params, other], method)
    three = proxy(model, model, model)
    for many, of in ((mixed, mixed.bind(both, [1, 0])), (three, (params, other, params))):

        @jax.jit
        def run(of, many=many):
            return many.logits(of, many.forward(of, batch, hidden_only=True).hidden), many.forward(of, batch).logits

        _close(*run(of))
    pairs = [([2, 5, 7], [8, 9]), ([2, 6], [5])]
    steered, tuned = (Likelihood(m)(p, pairs) for m, p in ((three, (params, other, params)), (model, other)))
    assert [x.logprob for x in steered] == pytest.approx([x.logprob for x in tuned], rel=1e-4)


@functools.cache
def _traced(loss, trains, shape):
    """The gradient of the head's loss at a vocabulary of 250,880, for abstract arrays; as traced, and compiled."""
    config = tiny.config("llama", vocab_size=VOCABULARY, hidden_size=64, tie_word_embeddings=True)
    model = hub.from_config(config, "causal-lm", seed=None)
    floats = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*shape, 64), shape)]

    def f(moving, frozen, targets, weights):
        params = {"model": {"embed_tokens": {"embedding": (moving | frozen)["table"]}}}
        return loss(model.logits, params, moving["hidden"], targets, weights)

    table = {"table": model.params["model"]["embed_tokens"]["embedding"]}
    moving, frozen = {"hidden": floats[0]} | (table if trains else {}), {} if trains else table
    targets = jax.ShapeDtypeStruct(shape, jnp.int32)
    traced = jax.jit(jax.value_and_grad(f)).trace(moving, frozen, targets, floats[1])
    return traced.jaxpr.jaxpr, traced.lower().compile()


def _products(jaxpr):
    """FLOPs of all products; what a loop computes counts as often as it runs."""
    total = 0
    for e in jaxpr.eqns:
        if e.primitive.name == "dot_general":
            (summed, _), _ = e.params["dimension_numbers"]
            total += 2 * math.prod(e.outvars[0].aval.shape) * math.prod(e.invars[0].aval.shape[i] for i in summed)
        inner = [getattr(x, "jaxpr", x) for x in e.params.values()]
        total += e.params.get("length", 1) * sum(_products(j) for j in inner if hasattr(j, "eqns"))
    return total


@pytest.mark.parametrize("trains", [False, True])
def test_temporaries_and_flops_at_a_large_vocabulary(trains):
    table = VOCABULARY * 64 * 4
    for shape, share in (((8, 512), 0.25), ((8, 64), 1.0)):
        (jaxpr, compiled), (plain_jaxpr, plain) = (_traced(f, trains, shape) for f in (cross_entropy, _plain))
        temporaries, most = (c.memory_analysis().temp_size_in_bytes for c in (compiled, plain))
        assert temporaries <= share * most
        chunk = 256 * VOCABULARY * 4  # logits, their gradient and, for the table's, that transposed
        assert temporaries < (3 if trains else 2) * chunk + table / 2, "the table is copied"
        products = 2 * math.prod(shape) * VOCABULARY * 64 * (3 if trains else 2)
        assert _products(plain_jaxpr) == products
        assert _products(jaxpr) <= 1.02 * products


def test_a_head_that_trains_is_looped_over_only_where_that_saves_memory():
    """A loop needs the table's gradient twice; the logits of few tokens are smaller."""

    def loops(width, length, trains):
        table, hidden = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((VOCABULARY, width), (8, length, width)))
        weights, targets = (jax.ShapeDtypeStruct((8, length), d) for d in (jnp.float32, jnp.int32))
        f = jax.grad(functools.partial(cross_entropy, _attend), (0, 1) if trains else 1)
        return "scan" in str(jax.make_jaxpr(f)(table, hidden, targets, weights))

    assert loops(4096, 64, trains=False)
    assert not loops(4096, 64, trains=True)
    assert loops(4096, 512, trains=True)


def test_bad_input():
    table, hidden, targets, weights = _linear()
    with pytest.raises(ValueError, match=r"of the same tokens; got \(3, 8, 16\), \(3, 7\) and \(3, 8\)"):
        cross_entropy(_attend, table, hidden, targets[:, 1:], weights)
    with pytest.raises(ValueError, match="at least 1 token; got tokens=0"):
        cross_entropy(_attend, table, hidden, targets, weights, 0)
    classifier = hub.from_config(tiny.config("llama"), "classification", seed=None)
    with pytest.raises(ValueError, match="this head is 'classification'"):
        classifier.logits(classifier.params, hidden)
