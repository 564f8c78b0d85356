"""The methods against Hugging Face `peft` and plain torch autograd: outputs and gradients of the trainables.

Base models are tiny and random with non-zero biases; adapters are random, non-zero, copied from torch.
"""

import copy
import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    CONFIGS,
    LAYERS,
    LLAMA,
    TOLERANCE,
    VOCABULARY,
    WIDTH,
    Link,
    Pair,
    base_pair,
    check,
    fill,
    negative_log_likelihood,
    only,
    pair,
    peft,
    plain_links,
    randomise,
    shapes,
    start,
    torch,
    transformers,
    transposed,
)

from peftjax import Site, chain, hub, masks, merge, partition, stack_layers, unstack_layers
from peftjax.loop import fit
from peftjax.methods import METHODS, bitfit, dora, fishmask, full, head, lora, prefix
from peftjax.methods.dora import DoRA
from peftjax.methods.fishmask import Sparse, fisher
from peftjax.methods.lora import LoRA
from peftjax.methods.prefix import PrefixMLP
from peftjax.models.base import hf_name
from peftjax.train import Settings
from peftjax.tree import combine, count, flatten, map_with_path
from peftjax.weights import Trained, attend, dot, is_node, take

# peft and transformers warn about each other's deprecated names and about tied targets
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
__all__ = ["pair"]  # a fixture

# LoRA


def lora_links(theirs, params) -> dict[str, Link]:
    """Each factor here and peft's of the same module."""
    links = {}
    for path, w in flatten(params, is_leaf=is_node).items():
        if isinstance(w, LoRA | DoRA):
            module = theirs.base_model.model.get_submodule(hf_name(path).removesuffix(".weight"))
            embedding = path.endswith("/embedding")
            a = module.lora_embedding_A["default"] if embedding else module.lora_A["default"].weight
            b = module.lora_embedding_B["default"] if embedding else module.lora_B["default"].weight
            links |= {f"{path}/a": transposed(a), f"{path}/b": transposed(b)}
            if isinstance(w, DoRA):
                links[f"{path}/magnitude"] = Link(module.lora_magnitude_vector["default"].weight)
    return links


def with_lora(pair: Pair, config: dict, method):
    theirs = peft.get_peft_model(copy.deepcopy(pair.theirs), peft.LoraConfig(**config)).eval()
    params = start(pair, method)
    links = lora_links(theirs, params)
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == len(links)
    randomise(theirs, links)
    return theirs, fill(params, links), links


QV = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}
ALL = {
    "bert": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
LORA = {
    "query, value": ("bert", {"r": 4, "lora_alpha": 8, "target_modules": QV["bert"]}, lora(4, 8)),
    "llama": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": QV["llama"]}, lora(4, 8)),
    "default alpha": ("llama", {"r": 4, "lora_alpha": 4, "target_modules": QV["llama"]}, lora(4)),
    "no biases": (
        "llama-no-bias",
        {"r": 3, "lora_alpha": 6, "target_modules": ALL["llama"]},
        lora(3, 6, ["linear"]),
    ),
    "all linear": (
        "bert",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL["bert"]},
        lora(4, 6, ["linear", "pooler"]),
    ),
    "all linear, llama": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL["llama"]},
        lora(4, 6, ["linear"]),
    ),
    "rslora": (
        "llama",
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": QV["llama"]},
        lora(4, 6, rslora=True),
    ),
    "patterns": (
        "bert",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ALL["bert"],
            "rank_pattern": {"layer.1.output.dense": 5, "query": 2},
            "alpha_pattern": {"query": 7, "intermediate.dense": 3},
        },
        lora(
            4,
            6,
            ["linear", "pooler"],
            rank_pattern={".*/layer_1/output/dense/kernel": 5, "query": 2},
            alpha_pattern={"query": 7, "mlp_in": 3},
        ),
    ),
    "rslora, patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": QV["llama"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 5},
        },
        lora(4, 6, rslora=True, rank_pattern={"query": 2}, alpha_pattern={".*/layers_1/.*/q_proj/kernel": 5}),
    ),
    "embedding": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
        lora(4, 6, ["embedding", "query"]),
    ),
    "embedding, bert": (
        "bert",
        {"r": 2, "lora_alpha": 6, "target_modules": ["word_embeddings", "token_type_embeddings"]},
        lora(2, 6, ["embedding", ".*/token_type_embeddings/embedding"]),
    ),
    "lm head": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ["lm_head"]},
        lora(4, 6, ["lm_head"]),
    ),
    "tied, take": (
        "llama-tied",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "v_proj"]},
        lora(4, 6, ["embedding", "value"], tied_embedding="take"),
    ),
    "gpt2, whole c_attn": (
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        lora(4, 6, ["fused_qkv"]),
    ),
    "gpt2, all linear": (
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        lora(4, 6, ["linear"]),
    ),
}


@pytest.mark.parametrize("name", LORA)
def test_lora(pair, name):
    base, config, method = LORA[name]
    theirs, params, links = with_lora(pair(base), config, method)
    check(pair(base), theirs, method, params, links)


@pytest.mark.parametrize(
    "name", ["all linear", "all linear, llama", "patterns", "rslora", "embedding", "gpt2, all linear"]
)
def test_merged_lora_is_peft_merge_and_unload(pair, name):
    base, config, method = LORA[name]
    theirs, params, _ = with_lora(pair(base), config, method)
    expected = dict(theirs.merge_and_unload().named_parameters())
    merged = flatten(merge(params))
    assert set(merged) == set(flatten(pair(base).ours.params))
    for path, w in merged.items():
        reference = expected[hf_name(path)].detach().numpy()
        reference = reference.T if pair(base).ours.family.transposed(path) else reference
        np.testing.assert_allclose(w, reference, atol=1e-6, err_msg=path)
    assert any(np.abs(w).min() > 0 for path, w in merged.items() if path.endswith("/bias"))
    batch = pair(base).batch
    np.testing.assert_allclose(
        pair(base).ours.forward(merge(params), batch).logits,
        pair(base).ours.forward(params, batch).logits,
        atol=TOLERANCE,
    )


# DoRA


DORA = {
    "query, value": ("bert", {"r": 4, "lora_alpha": 8, "target_modules": QV["bert"]}, {"alpha": 8}),
    "all linear": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ALL["llama"], "use_rslora": True},
        {"alpha": 6, "targets": ["linear"], "rslora": True},
    ),
    "no biases, patterns": (
        "llama-no-bias",
        {"r": 4, "lora_alpha": 4, "target_modules": QV["llama"], "rank_pattern": {"q_proj": 2}},
        {"alpha": 4, "rank_pattern": {"query": 2}},
    ),
    "embedding": (
        "llama",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "q_proj"]},
        {"alpha": 6, "targets": ["embedding", "query"]},
    ),
    "tied, take": (
        "llama-tied",
        {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens"]},
        {"alpha": 6, "targets": ["embedding"], "tied_embedding": "take"},
    ),
    "gpt2": (
        "gpt2",
        {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        {"alpha": 6, "targets": ["linear"]},
    ),
}


def with_dora(pair, name):
    base, config, arguments = DORA[name]
    method = dora(4, **arguments)
    theirs, params, links = with_lora(pair(base), config | {"use_dora": True}, method)
    with torch.no_grad():
        for path, link in links.items():
            if path.endswith("/magnitude"):  # as long as columns are, so that gradients are not tiny
                link.tensor.add_(1.0)
    return pair(base), method, theirs, fill(params, links), links


@pytest.mark.parametrize("name", DORA)
def test_dora(pair, name):
    base, method, theirs, params, links = with_dora(pair, name)
    check(base, theirs, method, params, links)


@pytest.mark.parametrize("name", ["query, value", "all linear", "embedding", "gpt2"])
def test_merged_dora_is_peft_merge_and_unload(pair, name):
    base, _, theirs, params, _ = with_dora(pair, name)
    expected, merged = dict(theirs.merge_and_unload().named_parameters()), flatten(merge(params))
    assert any(np.abs(w).min() > 0 for path, w in merged.items() if path.endswith("/bias"))
    for path, w in merged.items():
        reference = expected[hf_name(path)].detach().numpy()
        reference = reference.T if base.ours.family.transposed(path) else reference
        np.testing.assert_allclose(w, reference, atol=1e-5, err_msg=path)
    want = base.ours.forward(params, base.batch).logits
    np.testing.assert_allclose(base.ours.forward(merge(params), base.batch).logits, want, atol=TOLERANCE)


def some_dora(seed, rows=7, columns=5, r=3, **kwargs):
    k = [jax.random.fold_in(seed, i) for i in range(4)]
    w, a = jax.random.normal(k[0], (rows, columns)), jax.random.normal(k[1], (rows, r))
    return DoRA(w, a, jax.random.normal(k[2], (r, columns)), jnp.exp(jax.random.normal(k[3], (columns,))), **kwargs)


def test_dora_start(pair):
    """m is the norm of each output's weights, so nothing changes; against torch, which has them in rows."""
    base, method = pair("bert"), dora(4)
    params = start(base, method)
    for path, w in flatten(params, is_leaf=is_node).items():
        if isinstance(w, DoRA):
            weight = dict(base.theirs.named_parameters())[hf_name(path)]
            np.testing.assert_allclose(w.magnitude, torch.linalg.norm(weight, dim=1).detach(), rtol=1e-6)
    want = base.ours.forward(base.ours.params, base.batch).logits
    np.testing.assert_allclose(base.ours.forward(params, base.batch).logits, want, atol=1e-5)


def test_dora_products_are_the_equations(key):
    """Equation 5 and, for the gradient, equation 11: the norm is a constant."""
    w, x = some_dora(key, scale=1.5), jax.random.normal(key, (4, 7))

    def equation(w, x, detached=True):
        v = w.base + w.scale * w.a @ w.b
        norm = jnp.linalg.norm(v, axis=0)
        return x @ (w.magnitude * v / (jax.lax.stop_gradient(norm) if detached else norm))

    np.testing.assert_allclose(dot(w, x), equation(w, x), atol=1e-5)
    np.testing.assert_allclose(w.materialize(), equation(w, jnp.eye(7)), atol=1e-5)
    np.testing.assert_allclose(take(w, jnp.array([[3, 0]])), equation(w, jnp.eye(7))[jnp.array([[3, 0]])], atol=1e-5)
    y = jax.random.normal(key, (2, 5))
    np.testing.assert_allclose(attend(w, y), y @ equation(w, jnp.eye(7)).T, atol=1e-5)

    def gradient(f):
        return jax.grad(lambda a, b, m: jnp.sin(f(dataclasses.replace(w, a=a, b=b, magnitude=m))).sum(), (0, 1, 2))(
            w.a, w.b, w.magnitude
        )

    got = gradient(lambda w: dot(w, x))
    for g, same, other in zip(
        got, gradient(lambda w: equation(w, x)), gradient(lambda w: equation(w, x, False)), strict=True
    ):
        np.testing.assert_allclose(g, same, atol=1e-4)
        assert g.shape == w.magnitude.shape or np.abs(g - other).max() > 1e-2
    for layers in (dot(w, x), jax.vmap(dot, (0, None))(jax.tree.map(lambda v: jnp.stack([v, v]), w), x)[1]):
        np.testing.assert_allclose(layers, equation(w, x), atol=1e-5)
    stacked = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), w)
    np.testing.assert_allclose(stacked.materialize()[0], w.materialize(), atol=1e-5)


def test_dora_of_a_column_of_zeros_stays_zero(key):
    w = dataclasses.replace(some_dora(key), base=jnp.zeros((7, 5)), b=jnp.zeros((3, 5)), magnitude=jnp.zeros(5))
    assert np.array_equal(dot(w, jnp.ones((1, 7))), np.zeros((1, 5)))
    assert np.isfinite(
        jax.grad(lambda m: dot(dataclasses.replace(w, magnitude=m), jnp.ones((1, 7))).sum())(w.magnitude)
    ).all()


def test_dora_over_an_adapter_of_the_look_up_alone_is_refused(pair):
    take = {"targets": ["embedding"], "tied_embedding": "take"}
    with pytest.raises(ValueError, match="columns have no length; put dora first"):
        start(pair("llama-tied"), chain(lora(2, **take), dora(2, **take)))


def test_dora_drops_the_change_of_the_bases_output_too(key):
    """The authors' form: W x + (c - 1) W x~ + c s A B x~."""
    w, x = some_dora(key, key=jax.random.key(5), scale=1.5, dropout=0.4), jax.random.normal(key, (6, 7))
    dropped = jnp.where(jax.random.bernoulli(jax.random.key(5), 0.6, x.shape), x / 0.6, 0)
    c = w.magnitude / jnp.linalg.norm(w.base + w.scale * w.a @ w.b, axis=0)
    want = x @ w.base + (c - 1) * (dropped @ w.base) + c * w.scale * (dropped @ w.a @ w.b)
    np.testing.assert_allclose(dot(w, x), want, atol=1e-5)


def step_flops(method) -> float:
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8
    )
    model = hub.from_config(config, "causal-lm", seed=None)
    params = jax.eval_shape(lambda p: method.init(jax.random.key(0), p, model.sites), model.params)
    trainable, frozen = partition(params, method.trainable(params))

    def loss(trainable, frozen, ids, key):
        tree = method.resolve(combine(trainable, frozen), key)
        return jax.nn.logsumexp(model.forward(tree, {"input_ids": ids}).logits, axis=-1).sum()

    ids, key = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
    return jax.jit(jax.grad(loss)).lower(trainable, frozen, ids, key).compile().cost_analysis()["flops"]


def test_a_dora_step_costs_as_many_flops_as_loras():
    """At dropout 0; with dropout W x~ is a second product."""
    cost = {name: step_flops(m(8, 16, ["linear"])) for name, m in (("lora", lora), ("dora", dora))}
    assert cost["lora"] < cost["dora"] <= 1.1 * cost["lora"]
    assert step_flops(dora(8, 16, ["linear"], dropout=0.1)) > 1.2 * cost["lora"]


# Parts of a fused product


def test_lora_on_query_and_value_of_a_fused_product(pair):
    """As one LoRA of twice the rank on all of c_attn: A = [A_q A_v], B = the two blocks, zero elsewhere."""
    base, method, r = pair("gpt2"), lora(3, 5), 3
    config = {"r": 2 * r, "lora_alpha": 10, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), peft.LoraConfig(**config)).eval()
    params, links = start(base, method), {}
    blocks = {"query": (slice(0, r), slice(0, WIDTH)), "value": (slice(r, 2 * r), slice(2 * WIDTH, 3 * WIDTH))}
    for i in range(LAYERS):
        module = theirs.base_model.model.transformer.h[i].attn.c_attn
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for part, (rank, columns) in blocks.items():
            at = f"transformer/h_{i}/attn/c_attn/kernel/blocks/{part}"
            links[f"{at}/a"] = Link(a, lambda x, rank=rank: x[rank].T)
            links[f"{at}/b"] = Link(b, lambda x, rank=rank, columns=columns: x[columns, rank].T)
    randomise(theirs, links)
    with torch.no_grad():
        for link in links.values():
            if len(link.tensor) == 3 * WIDTH:
                keep = torch.zeros_like(link.tensor)
                for rank, columns in blocks.values():
                    keep[columns, rank] = 1
                link.tensor.mul_(keep)
    params = fill(params, links)
    check(base, theirs, method, params, links)
    merged = merge(params)
    assert jax.tree.structure(merged) == jax.tree.structure(base.ours.params)
    want = theirs.merge_and_unload().transformer.h[1].attn.c_attn.weight.detach().numpy()
    np.testing.assert_allclose(merged["transformer"]["h_1"]["attn"]["c_attn"]["kernel"], want, atol=1e-6)


def test_lora_with_head_is_peft_modules_to_save(pair):
    base, method = pair("bert"), chain(head(), lora(4, 8))
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=QV["bert"])
    theirs = peft.get_peft_model(copy.deepcopy(base.theirs), config).eval()
    params = start(base, method)
    classifier = theirs.base_model.model.classifier.modules_to_save["default"]
    links = lora_links(theirs, params) | {
        "classifier/kernel/value": transposed(classifier.weight),
        "classifier/bias/value": Link(classifier.bias),
    }
    randomise(theirs, links)
    check(base, theirs, method, fill(params, links), links)


def test_lora_on_look_up_and_head_of_a_tied_embedding(pair, key):
    """`peft` cannot; the reference is the gradient through the dense table W + sAB."""
    base, method = pair("llama-tied"), lora(4, 6, ["embedding"])
    params = start(base, method)
    path = "model/embed_tokens/embedding"
    values = {
        f"{path}/{f}": 0.3 * jax.random.normal(jax.random.fold_in(key, i), s)
        for i, (f, s) in enumerate({"a": (VOCABULARY, 4), "b": (4, WIDTH)}.items())
    }
    params = map_with_path(lambda p, x: values.get(p, x), params)
    trainable, frozen = partition(params, method.trainable(params))

    def loss(trainable, dense):
        tree = combine(trainable, frozen)
        return jnp.sin(base.ours.forward(merge(tree) if dense else tree, base.batch).logits).sum()

    for (path, g), reference in zip(
        flatten(jax.grad(loss)(trainable, False)).items(),
        jax.tree.leaves(jax.grad(loss)(trainable, True)),
        strict=True,
    ):
        np.testing.assert_allclose(g, reference, atol=TOLERANCE, rtol=TOLERANCE, err_msg=path)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lora_products_are_the_equations(key, dtype):
    k = jax.random.split(key, 5)
    w, a, b = (jax.random.normal(k[i], s) for i, s in enumerate([(7, 5), (7, 3), (3, 5)]))
    x, y = jax.random.normal(k[3], (2, 4, 7)).astype(dtype), jax.random.normal(k[4], (2, 4, 5)).astype(dtype)
    w, ids = w.astype(dtype), jnp.array([[0, 6, 6], [2, 1, 0]])
    lora_w = LoRA(w, a, b, scale=2.5)
    w64, a64, b64, x64, y64 = (np.asarray(v, np.float64) for v in (w, a, b, x, y))
    dense = w64 + 2.5 * a64 @ b64
    rtol, atol = (1e-5, 1e-5) if dtype == jnp.float32 else (3e-2, 0.3)
    for ours, expected in [
        (lora_w.materialize(), dense),
        (dot(lora_w, x), x64 @ dense),
        (attend(lora_w, y), y64 @ dense.T),
        (take(lora_w, ids), dense[np.asarray(ids)]),
        (attend(LoRA(w, a, b, scale=2.5, only="take"), y), y64 @ w64.T),
        (take(LoRA(w, a, b, scale=2.5, only="take"), ids), dense[np.asarray(ids)]),
    ]:
        assert ours.dtype == dtype  # float32 factors must not promote what comes after
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=rtol, atol=atol)


def test_lora_start(key):
    """A uniform in ±1/sqrt(inputs), B zero; an embedding's the other way round."""
    params = {"q": {"kernel": jnp.ones((400, 50))}, "e": {"embedding": jnp.ones((50, 400))}}
    sites = [Site("q/kernel", "query"), Site("e/embedding", "embedding")]
    new = flatten(lora(20, targets=["query", "embedding"]).init(key, params, sites))
    assert not np.any(new["q/kernel/b"])
    assert not np.any(new["e/embedding/a"])
    np.testing.assert_allclose(np.abs(new["q/kernel/a"]).max(), 1 / 20, rtol=1e-2)
    np.testing.assert_allclose(np.std(new["q/kernel/a"]), 1 / 20 / 3**0.5, rtol=3e-2)
    np.testing.assert_allclose(np.std(new["e/embedding/b"]), 1, rtol=3e-2)


# Dropout


def dropped(pair, rate=0.25, **arguments):
    """A BERT with LoRA that drops, b non-zero."""
    method = lora(4, 8, dropout=rate, **arguments)
    params = start(pair("bert"), method)
    fresh = jax.random.normal(jax.random.key(1), (LAYERS, 4, WIDTH))
    return method, map_with_path(lambda p, x: 0.3 * fresh[0] if p.endswith("/b") else x, params)


def dropout_keys(params) -> dict:
    return {p: jax.random.key_data(x) for p, x in flatten(params).items() if p.endswith("/key")}


def test_dropout_keeps_the_mean(key):
    k = jax.random.split(key, 4)
    w, a, b = (jax.random.normal(k[i], s) for i, s in enumerate([(7, 5), (7, 3), (3, 5)]))
    x = jax.random.normal(k[3], (7,))
    outputs = jax.vmap(lambda key: dot(LoRA(w, a, b, key, scale=2.0, dropout=0.25), x))(jax.random.split(key, 20_000))
    error = outputs.std(0) / 20_000**0.5
    assert np.all(error > 0)
    assert np.all(np.abs(outputs.mean(0) - dot(LoRA(w, a, b, scale=2.0), x)) < 5 * error)
    # inverted dropout of an input kept with probability q: variance (1 - q) / q (s x_i (a b)_ij)²
    expected = (0.25 / 0.75) * np.square(2.0 * x[:, None] * (a @ b)).sum(0)
    np.testing.assert_allclose(outputs.var(0), expected, rtol=0.1)


def test_dropout_follows_the_key(pair):
    method, params = dropped(pair)
    base = pair("bert")

    def logits(key):
        return np.asarray(base.ours.forward(method.resolve(params, key), base.batch).logits)

    one, two = jax.random.split(jax.random.key(0))
    assert np.array_equal(logits(one), logits(one))
    assert not np.array_equal(logits(one), logits(two))
    undropped = lora(4, 8).resolve(map_with_path(lambda p, x: x, params), None)
    assert np.array_equal(logits(None), base.ours.forward(undropped, base.batch).logits)
    assert not np.array_equal(logits(one), logits(None))
    keys = dropout_keys(method.resolve(params, one))
    assert len({tuple(k.tolist()) for k in keys.values()}) == 2 * LAYERS  # no two layers drop alike
    assert not dropout_keys(method.resolve(method.resolve(params, one), None))
    assert not dropout_keys(lora(4).resolve(start(base, lora(4)), one))  # no rate, no key


def test_dropout_is_the_same_stacked(pair, key):
    """The masks bit for bit; the outputs to rounding, since a scan is another program."""
    method, params = dropped(pair)
    base = pair("bert")
    loop, scan = method.resolve(params, key), method.resolve(stack_layers(params), key)
    stacked = dropout_keys(stack_layers(loop))
    assert len(stacked) == 2
    for path, k in dropout_keys(scan).items():
        assert np.array_equal(k, stacked[path]), path
    x = jnp.ones((3, WIDTH))
    for path, w in flatten(scan, is_leaf=is_node).items():
        if isinstance(w, LoRA):
            for i in range(LAYERS):
                one = flatten(loop, is_leaf=is_node)[path.replace("*", str(i))]
                assert np.array_equal(dot(jax.tree.map(lambda v, i=i: v[i], w), x), dot(one, x))
    np.testing.assert_allclose(
        base.ours.forward(scan, base.batch).logits, base.ours.forward(loop, base.batch).logits, atol=1e-5
    )


def test_dropout_reaches_a_lora_inside_another(pair, key):
    method = chain(lora(2, dropout=0.5, targets=["query"]), lora(3, dropout=0.5, targets=["query"]))
    params = method.resolve(start(pair("bert"), method), key)
    keys = dropout_keys(params)
    assert len({tuple(k.tolist()) for k in keys.values()}) == len(keys) == 2 * LAYERS


# Prefix-tuning


def prefix_paths(pair: Pair) -> list[str]:
    return [f"{s.path}/prefix" for s in pair.ours.sites if s.kind == "attention"]


def prefix_links(theirs, pair: Pair) -> dict[str, Link]:
    """peft's table is (n, layers · 2 · heads · size), keys before values in every layer."""
    table = theirs.prompt_encoder["default"].embedding.weight
    _, heads, size = next(s.heads for s in pair.ours.sites if s.heads)
    return {
        f"{path}/{field}": Link(table, lambda x, i=i, j=j: x.view(len(x), LAYERS, 2, heads, size)[:, i, j])
        for i, path in enumerate(prefix_paths(pair))
        for j, field in enumerate(("key", "value"))
    }


def mlp_links(theirs) -> dict[str, Link]:
    encoder = theirs.prompt_encoder["default"]
    first, _, second = encoder.transform
    return {
        "prefix_mlp/embedding": Link(encoder.embedding.weight),
        "prefix_mlp/w1": transposed(first.weight),
        "prefix_mlp/b1": Link(first.bias),
        "prefix_mlp/w2": transposed(second.weight),
        "prefix_mlp/b2": Link(second.bias),
    }


def with_prefix(pair: Pair, n: int, **config):
    task = "SEQ_CLS" if pair.ours.family.name == "bert" else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=n, **config)
    theirs = peft.get_peft_model(copy.deepcopy(pair.theirs), config).eval()
    if task == "SEQ_CLS":
        _by_its_old_name(theirs.base_model.bert)
    return theirs


def _by_its_old_name(module) -> None:
    """transformers 5.24 calls `past_key_values` `cache`; peft 0.21 looks for the old name in BERT's signature."""
    forward = module.forward
    if "past_key_values" not in inspect.signature(forward).parameters:
        module.forward = lambda *args, past_key_values=None, **kw: forward(*args, cache=past_key_values, **kw)


@pytest.mark.parametrize("name", ["bert", "llama", "llama-no-bias", "llama-tied", "gpt2"])
def test_prefix(pair, name):
    """Grouped heads, own head size, padding on either side.

    transformers 5 and peft 0.21 treat BERT as they treat Llama: peft hands a cache of n keys and values to
    `BertModel`, which uses it though `is_decoder` is false, counts the text's positions from n on, and gets a
    mask with n ones in front. `Shift` and the prefix's always-seen keys do the same.
    """
    base, method = pair(name), prefix(5)
    theirs = with_prefix(base, 5)
    links = prefix_links(theirs, base)
    randomise(theirs, links)
    check(base, theirs, method, fill(start(base, method), links), links)


@pytest.mark.parametrize("name", ["bert", "llama", "llama-mha"])
def test_prefix_through_an_mlp(pair, name):
    """With grouped heads peft's embedding has the keys' width, ours the model's; the node takes either."""
    base, method = pair(name), prefix(5, mlp=True, hidden=6)
    theirs = with_prefix(base, 5, prefix_projection=True, encoder_hidden_size=6)
    links = mlp_links(theirs)
    randomise(theirs, links)
    params = fill(start(base, method), links)
    if name != "llama":
        assert shapes(params) == shapes(start(base, method))
    check(base, theirs, method, params, links)


def test_prefix_mlp_is_the_same_stacked(pair, key):
    base, method = pair("llama"), prefix(3, mlp=True, hidden=6)
    params = start(base, method)
    loop, scan = method.resolve(params, None), method.resolve(stack_layers(params), None)
    for path, x in flatten(stack_layers(loop)).items():
        assert np.array_equal(x, flatten(scan)[path]), path
    assert not any(isinstance(x, PrefixMLP) for x in jax.tree.leaves(loop, is_leaf=is_node))
    assert np.abs(flatten(loop)["model/layers_1/self_attn/prefix/value"]).max() > 0


def test_prefix_layers_are_in_order_beyond_ten(key):
    config = transformers.LlamaConfig(**LLAMA | {"num_hidden_layers": 11, "num_key_value_heads": 2})
    base = hub.from_config(config, "causal-lm", seed=None)
    method = prefix(2, mlp=True, hidden=3)
    params = jax.eval_shape(lambda p: method.init(key, p, base.sites), base.params)
    out = jnp.arange(11 * 2 * 8, dtype=jnp.float32)  # the output's bias alone: layer, key or value, head, feature
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    filled = map_with_path(lambda p, x: out if p == "prefix_mlp/b2" else x, zeros)
    resolved = flatten(method.resolve(filled, None))
    for i in range(11):
        for j, field in enumerate(("key", "value")):
            got = resolved[f"model/layers_{i}/self_attn/prefix/{field}"]
            assert np.array_equal(got[1].ravel(), out.reshape(11, 2, 8)[i, j]), (i, field)


# What trains as it is: bitfit, head, full


PLAIN = {
    "bitfit": ("bert", bitfit(), lambda n: n.endswith("bias") and "classifier" not in n),
    "bitfit, llama": ("llama", bitfit(), lambda n: n.endswith("bias")),
    "bitfit, subset": (
        "bert",
        bitfit(["query", "mlp_in"]),
        lambda n: n.endswith(("query.bias", "intermediate.dense.bias")),
    ),
    "bitfit, gpt2": ("gpt2", bitfit(), lambda n: n.endswith("bias")),
    "full, gpt2": ("gpt2", full(), lambda n: True),
    "head": ("bert", head(), lambda n: n.startswith("classifier")),
    "bitfit and head": ("bert", chain(bitfit(), head()), lambda n: n.endswith("bias") or "classifier" in n),
    "full": ("bert", full(), lambda n: True),
    "full, tied": ("llama-tied", full(), lambda n: True),
    "full, grouped": ("llama", full(), lambda n: True),
}


@pytest.mark.parametrize("name", PLAIN)
def test_what_trains_as_it_is(pair, name):
    base, method, wanted = PLAIN[name]
    theirs, params, links = only(pair(base), method, wanted)
    check(pair(base), theirs, method, params, links)


def test_bitfit_creates_zero_biases_that_train(pair):
    """Llama without biases: the start is unchanged, and the gradients are those of a Llama with biases."""
    base, method = pair("llama-no-bias"), bitfit(create=True)
    params = start(base, method)
    assert np.array_equal(
        base.ours.forward(params, base.batch).logits, base.ours.forward(base.ours.params, base.batch).logits
    )
    config = CONFIGS["llama-no-bias"]()
    config.attention_bias = config.mlp_bias = True
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(base.theirs.state_dict(), strict=False)
    trainable, _ = partition(params, method.trainable(params))
    links = plain_links(theirs, trainable, base.ours.family)
    assert len(links) == 7 * LAYERS
    randomise(theirs, links)
    check(base, theirs, method, fill(params, links), links)


# FISH Mask


def clear_cut(scores: dict, near: float) -> int:
    """A k near a share of all, at which the next score is so much smaller that no rounding changes the choice."""
    ordered = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[::-1]
    middle = int(near * len(ordered))
    some = np.arange(middle // 2, 2 * middle)
    k = int(some[np.argmax(ordered[some - 1] / ordered[some])])
    assert ordered[k - 1] > 1.001 * ordered[k] > 0
    return k


def top(scores: dict, k: int) -> dict[str, list[int]]:
    """The paper's mask: the flat indices of the k largest scores of all leaves together."""
    every = sorted(((s, p, i) for p, x in scores.items() for i, s in enumerate(x.ravel())), reverse=True)
    return {p: sorted(i for _, q, i in every[:k] if q == p) for p in {p for _, p, _ in every[:k]}}


def chosen(params) -> dict[str, list[int]]:
    return {p: n.indices.tolist() for p, n in flatten(params, is_leaf=is_node).items() if isinstance(n, Sparse)}


def test_fishmask_is_the_equation_in_float64():
    """tanh layer and softmax by hand; two batches, filler rows, and fewer samples asked for than there are."""
    rng = np.random.default_rng(0)
    shapes = {"h/kernel": (5, 7), "h/bias": (7,), "scale": (7,), "out/kernel": (7, 4), "out/bias": (4,)}
    p = {path: rng.normal(size=s) for path, s in shapes.items()}
    x, labels = rng.normal(size=(10, 5)), rng.integers(0, 4, 10)
    scores = {path: np.zeros(s) for path, s in shapes.items()}
    real = [0, 1, 2, 3, 5, 6, 7]  # row 4 is a filler; after seven examples the rest is not looked at
    for n in real:
        h = np.tanh(x[n] @ p["h/kernel"] + p["h/bias"])
        z = (h * p["scale"]) @ p["out/kernel"] + p["out/bias"]
        d = np.exp(z) / np.exp(z).sum() - np.eye(4)[labels[n]]
        back = p["out/kernel"] @ d
        inner = back * p["scale"] * (1 - h * h)
        grads = (np.outer(x[n], inner), inner, back * h, np.outer(h * p["scale"], d), d)
        for path, g in zip(shapes, grads, strict=True):
            scores[path] += g * g / len(real)

    def forward(q, batch):
        h = jnp.tanh(batch["x"] @ q["h"]["kernel"] + q["h"]["bias"])
        return (h * q["scale"]) @ q["out"]["kernel"] + q["out"]["bias"]

    params = {
        "h": {"kernel": p["h/kernel"], "bias": p["h/bias"]},
        "scale": p["scale"],
        "out": {"kernel": p["out/kernel"], "bias": p["out/bias"]},
    }
    params = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), params)
    batch = {"x": x.astype(np.float32), "labels": labels, "weight": np.ones(10, np.float32)}
    batch["weight"][4] = 0
    batches = [jax.tree.map(lambda v: v[:6], batch), jax.tree.map(lambda v: v[6:], batch)]
    objective = negative_log_likelihood(forward)
    got = flatten(fisher(objective, params, batches, samples=7))
    for path, s in scores.items():
        np.testing.assert_allclose(got[path], s, rtol=1e-4, atol=1e-7, err_msg=path)
    k = clear_cut(scores, 0.3)
    method = fishmask(samples=7, count=k).observed(objective, params, (), iter(batches))
    new = method.init(jax.random.key(0), params, ())
    assert chosen(new) == top(scores, k)
    assert len(chosen(new)) > 2
    for node in flatten(new, is_leaf=is_node).values():
        if isinstance(node, Sparse):
            assert np.array_equal(node.values, np.asarray(node.base).ravel()[node.indices])


@functools.cache
def _fish(folder):
    """The tiny BERT, labels, the Fisher information by torch autograd in float64, and a clear k."""
    base = base_pair("bert", folder)
    theirs = copy.deepcopy(base.theirs).double()
    rng = np.random.default_rng(3)
    batch = {k: np.concatenate([v, v[:, ::-1]]) for k, v in base.batch.items()}
    batch["attention_mask"][3:] = 1
    batch |= {"labels": rng.integers(0, 3, 6), "weight": np.ones(6, np.float32)}
    names = {"input_ids": "input_ids", "attention_mask": "attention_mask", "type_ids": "token_type_ids"}
    inputs = {theirs_: torch.tensor(np.ascontiguousarray(batch[ours])) for ours, theirs_ in names.items()}
    links = plain_links(theirs, base.ours.params, base.ours.family)
    scores = {path: np.zeros(x.shape) for path, x in flatten(base.ours.params).items()}
    for n in range(6):
        theirs.zero_grad()
        logits = theirs(**{k: v[n : n + 1] for k, v in inputs.items()}).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor(batch["labels"][n : n + 1])).backward()
        for path, link in links.items():
            scores[path] += np.square(link.grad()) / 6
    scores = {p: s for p, s in scores.items() if not p.startswith("classifier")}
    objective = negative_log_likelihood(lambda params, b: base.ours.forward(params, b).logits)
    return base, theirs, links, inputs, batch, objective, scores, clear_cut(scores, 0.1)


@pytest.fixture
def fish(tmp_path_factory):
    return _fish(tmp_path_factory.getbasetemp())


def test_fishmask_chooses_what_torch_autograd_says(fish):
    base, _, _, _, batch, objective, scores, k = fish
    got = flatten(fisher(objective, base.ours.params, [batch]))
    for path, s in scores.items():
        np.testing.assert_allclose(got[path], s, rtol=1e-3, atol=1e-6 * s.max() + 1e-9, err_msg=path)
    method = fishmask(count=k).observed(objective, base.ours.params, base.ours.sites, [batch])
    assert chosen(start(base, method)) == top(scores, k)


def test_the_gradient_of_fishmask_is_the_dense_ones_entries(fish):
    base, _, _, _, batch, objective, _, k = fish
    method = fishmask(count=4 * k).observed(objective, base.ours.params, base.ours.sites, [batch])
    params = start(base, method)
    trainable, frozen = partition(params, method.trainable(params))
    grads = flatten(jax.grad(lambda t: objective(combine(t, frozen), batch, None)[0])(trainable))
    dense = flatten(jax.grad(lambda p: objective(p, batch, None)[0])(base.ours.params))
    kinds = {p.rpartition("/")[2] for p in chosen(params)}
    assert kinds == {"kernel", "bias", "scale", "embedding"}
    for path, indices in chosen(params).items():
        want = np.asarray(dense[path]).ravel()[indices]
        np.testing.assert_allclose(grads[f"{path}/values"], want, rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_fishmask_trains_as_adam_on_masked_gradients(fish, layout):
    """The authors' way: dense weights, every gradient times the mask, Adam without weight decay; in float64."""
    base, theirs, links, inputs, batch, objective, scores, k = fish
    method = chain(fishmask(count=k), head()).observed(objective, base.ours.params, base.ours.sites, [batch])
    theirs = copy.deepcopy(theirs)
    links = plain_links(theirs, base.ours.params, base.ours.family)
    masks_ = {p: np.zeros(x.shape).ravel() for p, x in scores.items()}
    for path, indices in top(scores, k).items():
        masks_[path][indices] = 1
    masks_ = {
        p: torch.tensor(links[p].view(torch.tensor(m.reshape(scores[p].shape))).numpy()) for p, m in masks_.items()
    }
    tx = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for _ in range(5):
        tx.zero_grad()
        torch.nn.functional.cross_entropy(theirs(**inputs).logits, torch.tensor(batch["labels"])).backward()
        for path, m in masks_.items():
            links[path].tensor.grad *= m
        tx.step()
    settings = Settings(
        steps=5,
        learning_rate=1e-2,
        warmup=0.0,
        schedule="constant",
        weight_decay=0.0,
        clip=None,
        batch_size=6,
        layout=layout,
    )
    fitted = fit(start(base, method), method, objective, lambda i: iter([batch]), 1, settings)
    assert fitted.trainable == k + 3 * WIDTH + 3
    before, after = flatten(base.ours.params), flatten(merge(unstack_layers(fitted.params)))
    for path, w in after.items():
        np.testing.assert_allclose(w, links[path].value(), atol=1e-4, err_msg=path)
        if path in scores:
            moved = np.flatnonzero(np.asarray(w) != np.asarray(before[path])).tolist()
            assert moved == top(scores, k).get(path, []), path


# Abstract shapes


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("base", ["bert", "llama"])
def test_init_needs_no_values(name, base):
    """Every method starts from shapes alone, and from them gives the structure that values give."""
    task = "causal-lm" if base == "llama" else "classification"
    if (name, base) == ("head", "llama"):
        task = "classification"
    model = hub.from_config(CONFIGS[base](), task, seed=None)
    needed = {"fishmask": {"count": 99, "score": "random"}, "trainable_tokens": {"ids": [1, 2]}}
    needed["adalora"] = {"target_rank": 2, "init_rank": 3}
    method = METHODS[name](**needed.get(name, {}))
    abstract = jax.eval_shape(lambda k, p: method.init(k, p, model.sites), jax.random.key(0), model.params)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.params)
    real = method.init(jax.random.key(0), zeros, model.sites)
    if name == "fishmask":  # which entries depends on more than shapes, how many does not
        assert count(partition(abstract, method.trainable(abstract))[0]) == 99
        assert count(partition(real, method.trainable(real))[0]) == 99
        return
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert shapes(abstract) == shapes(real)
    assert jax.tree.leaves(method.trainable(abstract)) == jax.tree.leaves(method.trainable(real))


def test_a_nested_lora_trains_with_the_one_inside(pair):
    """Law 10: over LoRA, LoRA nests; the sum of both products is what one of the summed ranks gives."""
    base = pair("bert")
    method = chain(lora(2, 4, ["query"]), lora(3, 3, ["query"]))
    params = start(base, method)
    path = "bert/encoder/layer_0/attention/self/query/kernel"
    trainable, frozen = partition(params, method.trainable(params))
    assert {f"{path}/a", f"{path}/b", f"{path}/base/a", f"{path}/base/b"} <= set(flatten(trainable))
    assert f"{path}/base/base" in flatten(frozen)
    trainable = map_with_path(lambda p, x: 0.3 * jnp.sin(jnp.arange(x.size).reshape(x.shape)), trainable)
    params = combine(trainable, frozen)
    w = flatten(params, is_leaf=is_node)[path]
    both = LoRA(w.base.base, jnp.hstack([2 * w.base.a, w.a]), jnp.vstack([w.base.b, w.b]))
    x = jnp.cos(jnp.arange(3.0 * WIDTH)).reshape(3, WIDTH)
    np.testing.assert_allclose(dot(w, x), dot(both, x), atol=1e-5)
    np.testing.assert_allclose(w.materialize(), both.materialize(), atol=1e-6)
    np.testing.assert_allclose(
        base.ours.forward(merge(params), base.batch).logits,
        base.ours.forward(params, base.batch).logits,
        atol=TOLERANCE,
    )


def test_lora_over_trained_trains_both(pair):
    base = pair("bert")
    method = chain(head(), lora(2, targets=["head"]))
    params = start(base, method)
    trainable, _ = partition(params, method.trainable(params))
    assert set(flatten(trainable)) == {
        "classifier/bias/value",
        "classifier/kernel/a",
        "classifier/kernel/b",
        "classifier/kernel/base/value",
    }
    assert isinstance(params["classifier"]["kernel"].base, Trained)
    assert masks.by_node(Trained)(params)["classifier"]["kernel"].base.value is True
