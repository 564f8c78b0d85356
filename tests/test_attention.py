"""cuDNN's attention: what it is asked for, where it is chosen, and, on a GPU, that it gives what XLA's does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from test_models import assert_same

from peftjax import data, hub
from peftjax.counting import flops
from peftjax.data import Example
from peftjax.methods import lora
from peftjax.models import cudnn, layers
from peftjax.models.bloom import alibi
from peftjax.tree import combine, flatten, partition

XLA = jax.nn.dot_product_attention


def stand_in(q, k, v, bias=None, mask=None, *, scale=None, implementation=None):
    """jax's attention, strict about what cuDNN's kernel takes; marked by a cosine in the program."""
    if implementation is None:
        return XLA(q, k, v, bias, mask, scale=scale)
    (b, t, _, size), s = q.shape, k.shape[1]
    assert k.shape[0] == v.shape[0] == b
    assert t % 2 == s % 2 == size % 8 == 0
    assert bias is None or bias.dtype == q.dtype
    for x in (mask,) if bias is None else (mask, bias):
        assert x.shape[0] in (1, b)
        assert x.shape[2:] == (t, s)
    bias = jnp.zeros((), q.dtype) if bias is None else bias
    return XLA(q, k, v, bias + jnp.where(mask, 0, -(2.0**41)).astype(q.dtype), scale=scale) * jnp.cos(0 * q[0, 0, 0, 0])


@pytest.fixture
def kernel(monkeypatch):
    """As if jax's CUDA plugin were here."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(cudnn, "traceable", lambda: True)


def masks(t):
    """Causal with padding on the left, packed texts, and keys alone, of 2 rows; True where a query may look."""
    padded = jnp.asarray([[1] * t, [0] * 3 + [1] * (t - 3)])
    segments = jnp.asarray([[1] * 3 + [2] * (t - 3), [1] * 2 + [2] * 3 + [0] * (t - 5)])
    packed, _ = layers.causal_context((segments > 0).astype(int), jnp.arange(t)[None], None, True, segments)
    return {"padded": layers.causal_mask(padded), "packed": packed.mask, "keys": padded[:, None, None, :].astype(bool)}


def biases(t, heads, rng):
    """None, ALiBi's, T5's, and one of DeBERTa's kind."""
    positions = jnp.broadcast_to(jnp.arange(t), (2, t))
    full = jnp.asarray(rng.normal(size=(2, heads, t, t)), jnp.float32)
    return {"none": None, "alibi": alibi(heads, positions, 0), "t5": full[:1], "deberta": full}


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize(
    ("mask", "bias", "t"),
    [("padded", "none", 8), ("packed", "none", 7), ("keys", "t5", 7), ("padded", "alibi", 9), ("packed", "deberta", 8)],
)
def test_what_the_kernel_is_asked_for_is_the_same_attention(kernel, mask, bias, t, mapped):
    """With grouped heads, at odd lengths, under `jax.vmap` with masks of each row; queries that see nothing aside."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, t, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    seen, added = masks(t)[mask], biases(t, 4, rng)[bias]
    rows = jnp.broadcast_to(seen.any(-1)[:, 0], (2, t))  # which queries see anything

    def loss(attend, q, k, v, added):
        if mapped:  # each row a batch of its own, what rows share not mapped
            axes = 0 if added is not None and added.shape[0] == 2 else None
            more = None if added is None or axes is None else added[:, None]
            one = jax.vmap(attend, in_axes=(0, 0, 0, axes if added is not None else None, 0))
            y = one(q[:, None], k[:, None], v[:, None], added if more is None else more, seen[:, None])[:, 0]
        else:
            y = attend(q, k, v, added, seen)
        return jnp.sum(jnp.sin(y) * rows[..., None, None]), y

    plain, fused = (functools.partial(loss, f) for f in (XLA, functools.partial(cudnn.attention, None)))
    grads = jax.value_and_grad(plain, (0, 1, 2, 3), has_aux=True), jax.value_and_grad(fused, (0, 1, 2, 3), has_aux=True)
    ((a, _), want), ((b, y), got) = (jax.jit(f)(q, k, v, added) for f in grads)
    assert np.isfinite(np.asarray(y)).all()
    assert_same(b, a, atol=1e-4)
    jax.tree.map(functools.partial(assert_same, atol=1e-5), got, want)


def test_a_shared_bias_gets_its_gradient_under_vmap(kernel):
    """Of two batches of three rows with a bias each, which the rows share."""
    rng = np.random.default_rng(0)
    q, k, v, bias = (jnp.asarray(rng.normal(size=(2, b, 4, 4, 8)), jnp.float32) for b in (3, 3, 3, 1))
    bias, mask = bias[..., :4], jnp.ones((1, 1, 4, 4), bool)

    def loss(attend, bias):
        return jnp.sin(jax.vmap(attend, in_axes=(0, 0, 0, 0, None))(q, k, v, bias, mask)).sum()

    want, got = (
        jax.jit(jax.grad(functools.partial(loss, f)))(bias) for f in (XLA, functools.partial(cudnn.attention, None))
    )
    assert_same(got, want, atol=1e-5)


def test_alibi_keeps_its_distances_in_bfloat16(kernel):
    """Rounded to 8 bits as it is, the bias of the last twenty keys of 600 would be one number."""
    t = 600
    bias = alibi(4, jnp.arange(t)[None], 0)
    mask = layers.causal_mask(jnp.ones((1, t), int))
    zero, v = jnp.zeros((1, t, 4, 8)), jax.random.normal(jax.random.key(0), (1, t, 4, 8))
    want = jax.jit(XLA)(zero, zero, v, bias, mask)
    half = (x.astype(jnp.bfloat16) for x in (zero, zero, v))
    got = jax.jit(functools.partial(cudnn.attention, None))(*half, bias, mask)
    assert_same(got.astype(jnp.float32), want, atol=0.03)


def test_the_program_chooses_by_the_platform_that_it_is_lowered_for(kernel):
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def program(platform, dtype=jnp.bfloat16):
        model = hub.from_config(config, "encoder", seed=None, dtype=dtype)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.params)

        def loss(params, ids):
            return model.forward(params, {"input_ids": ids}).hidden.astype(jnp.float32).sum()

        return jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(params, ids).mlir_module()

    there, here, wide = (program(*x).count("cosine") for x in (("cuda",), ("cpu",), ("cuda", jnp.float32)))
    assert there > here == wide


def test_where_it_fits(kernel):
    def fits(size=64, queries=8, dtype=jnp.bfloat16):
        x = jnp.zeros((1, queries, 2, size), dtype)
        return cudnn.fits(x, x, x)

    assert all([fits(), fits(dtype=jnp.float16), fits(size=128)])
    assert not any([fits(dtype=jnp.float32), fits(size=6), fits(size=136), fits(queries=1)])


def test_a_cpu_computes_and_keeps_what_it_did_before(kernel, monkeypatch):
    """The branch that is not taken leaves no work and no memory behind."""
    x, mask = jax.ShapeDtypeStruct((2, 16, 2, 24), jnp.bfloat16), layers.causal_mask(jnp.ones((2, 16), int))

    def loss(x):
        def body(x, _):
            q, k, v = jnp.split(x, 3, -1)
            return jnp.tile(layers.attention(None, q, k, v, mask).reshape(q.shape), 3), None

        return jax.lax.scan(body, x, length=3)[0].astype(jnp.float32).sum()

    def plan():
        program = jax.jit(jax.grad(lambda x: loss(x))).lower(x).compile()
        costs, memory = program.cost_analysis(), program.memory_analysis()
        assert costs is not None
        assert memory is not None
        return costs["flops"], memory.temp_size_in_bytes

    both = plan()
    monkeypatch.setattr(cudnn, "traceable", lambda: False)
    assert both == plan()


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("kind", ["packed", "left", "right", "odd"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_on_a_gpu_the_loss_and_gradients_are_those_of_xla(monkeypatch, family, kind):
    heads = {"num_attention_heads": 4} if family == "llama" else {"n_head": 4, "n_layer": 2}
    ends = {"vocab_size": 64, "hidden_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    name = {"llama": "LlamaConfig", "bloom": "BloomConfig"}[family]
    more = {"num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 256} if family == "llama" else {}
    config = getattr(transformers, name)(**heads, **more, **ends)
    rng = np.random.default_rng(0)
    if kind == "packed":
        texts = [Example(rng.integers(4, 60, n).tolist(), loss_mask=[1] * n) for n in (40, 50, 30, 70)]
        batch = data.make_packed(texts, [[0, 1], [2, 3]], 2, 128, pad_id=0)
    else:
        length = 127 if kind == "odd" else 128
        mask = np.ones((2, length), np.int32)
        mask[1, slice(0, 40) if kind == "left" else slice(-40, None)] = 0
        batch = {"input_ids": rng.integers(4, 60, (2, length)), "attention_mask": mask, "loss_mask": mask}
    batch = {k: jnp.asarray(x) for k, x in batch.items() if k not in ("weight", "target_ids")}
    model, method = hub.from_config(config, "causal-lm", dtype=jnp.bfloat16), lora(rank=4)
    params = method.init(jax.random.key(0), jax.tree.map(lambda x: x * 3, model.params), model.sites)
    trainable, frozen = partition(params, method.trainable(params))
    trainable = jax.tree.map(lambda x: x + 0.05, trainable)

    def loss(trainable):
        inputs = {k: x for k, x in batch.items() if k != "loss_mask"}
        out = model.forward(combine(trainable, frozen), inputs)
        scores = jax.nn.log_softmax(out.logits)[:, :-1]
        picked = jnp.take_along_axis(scores, batch["input_ids"][:, 1:, None], 2)[..., 0]
        return -(picked * batch["loss_mask"][:, 1:]).sum() / batch["loss_mask"][:, 1:].sum()

    def run():
        step = jax.jit(lambda x: jax.value_and_grad(loss)(x))
        return step(trainable), step.lower(trainable).compile().as_text()

    (a, want), program = run()
    assert "fmha" in program
    monkeypatch.setattr(cudnn, "traceable", lambda: False)
    (b, got), program = run()
    assert "fmha" not in program
    np.testing.assert_allclose(a, b, rtol=2e-2)
    for path, g in flatten(want).items():
        largest = float(jnp.abs(g).max())
        assert_same(flatten(got)[path], g, atol=0.05 * largest)


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("kind", ["padded", "packed", "sliding", "bias", "cap"])
def test_blocks_of_causal_attention_are_the_whole(kind, prefix, monkeypatch):
    """Value and gradients are those of jax's own attention, and no block multiplies with keys that none of it sees."""
    rng, t, heads, shared = np.random.default_rng(0), 12, 4, 2
    monkeypatch.setattr(layers, "BLOCK", 4)
    sizes = ((t, heads), (prefix + t, shared), (prefix + t, shared))
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, h, 8)), jnp.float32) for n, h in sizes)
    mask = layers.window(masks(t)["padded"], 3) if kind == "sliding" else masks(t).get(kind, masks(t)["padded"])
    bias = jnp.asarray(rng.normal(size=(1, heads, 1, prefix + t)), jnp.float32) if kind == "bias" else None
    cap = 2.0 if kind == "cap" else None

    seen = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (prefix, 0)), constant_values=True)
    sees = seen.any(-1)[:, 0, :, None]  # what padding gives that sees nothing is nobody's

    def total(f):
        return jax.value_and_grad(lambda q, k, v: (sees * f(q, k, v).reshape(2, t, -1) ** 3).sum(), (0, 1, 2))

    def own(causal):
        return lambda q, k, v: layers.attention(None, q, k, v, mask, bias=bias, cap=cap, causal=causal)

    want = own(False) if cap else lambda q, k, v: XLA(q, k, v, bias, seen)
    for got, one in zip(jax.tree.leaves(total(own(True))(q, k, v)), jax.tree.leaves(total(want)(q, k, v)), strict=True):
        np.testing.assert_allclose(got, one, rtol=2e-5, atol=2e-5)
    assert products(own(True), q, k, v) == 2 * heads * 2 * 4 * 8 * 2 * sum(prefix + end for end in (4, 8, 12))
    assert products(own(False), q, k, v) == 2 * heads * 2 * t * 8 * 2 * (prefix + t)


def products(f, *arguments) -> int:
    return flops(jax.make_jaxpr(f)(*arguments)).products
