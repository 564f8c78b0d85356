"""A training step costs what its equations cost: FLOPs of every method against a count by hand.

The count by hand is of matrix products alone: for that of an (m, k) and a (k, n) matrix 2 m k n, and by the chain
rule as many again for the gradient of each factor that moves, that is, depends on something that trains. So what a
method costs follows from its equation and from where in the model it first acts: below that place nothing moves, and
there is no backward pass. The models here are as wide as BERT-base, on shapes alone, so that all that is no product
(norms, softmax, activations, the optimizer, random numbers), which XLA counts too, is a percent or three of the whole.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
import tiny
import transformers

from peftjax import counting, hub, methods, weights
from peftjax.memory import abstract_batch
from peftjax.methods.adapter import Adapter
from peftjax.methods.dora import DoRA
from peftjax.methods.lora import LoRA
from peftjax.problem import loss_of
from peftjax.train import Settings, make_optimizer, make_step, start

D, FF, LAYERS, HEADS, KV_HEADS, VOCAB, LABELS = 768, 3072, 2, 12, 4, 1024, 2
SIZE = D // HEADS
ROWS, LENGTH = 8, 128
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 256,
}
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attn_pdrop", "embd_pdrop", "resid_pdrop")
CONFIGS = {
    "llama": tiny.config("llama", **SIZES, intermediate_size=FF, num_key_value_heads=KV_HEADS),
    "bert": tiny.config("bert", **SIZES, intermediate_size=FF, **dict.fromkeys(RATES[:2], 0.0)),
    "gpt2": transformers.GPT2Config(
        **SIZES, n_inner=FF, **dict.fromkeys(RATES[2:], 0.0), bos_token_id=0, eos_token_id=0
    ),
}
LINEAR = ("query", "key", "value", "attention_out", "mlp_in", "mlp_out")


# The count by hand


class Products:
    """Adds up the FLOPs of a forward and a backward pass."""

    def __init__(self):
        self.flops = 0

    def __call__(self, m: int, k: int, n: int, left: bool, right: bool) -> bool:
        """(m, k) times (k, n), of which the left and the right factor move or not -> whether the product moves."""
        self.flops += 2 * m * k * n * (1 + left + right)
        return left or right


Beside = Callable[[Products, int, int, int, bool], None]  # (products, tokens, inputs, outputs, whether x moves)


class Acts(NamedTuple):
    """What a method makes of a model.

    Attributes:
      kernels: all matrices train, or as many entries of them that the gradient of the whole is needed.
      embedded: the embedded tokens move.
      norms: what a norm gives moves.
      outputs, inputs: kinds of linear layers whose output or input moves, by a bias or a factor.
      beside: kind of a linear layer -> the products beside its own; what they give moves.
      keys: of a prefix, in every attention.
      tokens: of a prompt, before the text.
      adapters: place -> size of the bottleneck there.
      parallel: adapters read the input of the sub-layer.
      network: products that no token is in.
    """

    kernels: bool = False
    embedded: bool = False
    norms: bool = False
    outputs: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    beside: Mapping[str, Beside] = {}
    keys: int = 0
    tokens: int = 0
    adapters: Mapping[str, int] = {}
    parallel: bool = False
    network: Callable[[Products], Any] = lambda p: None


def linear(p: Products, acts: Acts, kind: str, tokens: int, inputs: int, outputs: int, x: bool) -> bool:
    x = x or kind in acts.inputs
    y = p(tokens, inputs, outputs, x, acts.kernels)
    if kind in acts.beside:
        acts.beside[kind](p, tokens, inputs, outputs, x)
    return y or kind in (*acts.outputs, *acts.beside)


def pairs(queries: int, keys: int, causal: bool) -> int:
    """Queries times the keys they are multiplied with: of a decoder, in two blocks, each without the keys after it."""
    if not causal:
        return queries * keys
    half = -(-queries // 2)
    return half * (keys - queries + half) + (queries - half) * keys


def attention(p: Products, acts: Acts, x: bool, kv_heads: int, causal: bool) -> bool:
    tokens, queries = ROWS * (acts.tokens + LENGTH), acts.tokens + LENGTH
    q = linear(p, acts, "query", tokens, D, D, x)
    k, v = (linear(p, acts, kind, tokens, D, kv_heads * SIZE, x) or acts.keys > 0 for kind in ("key", "value"))
    seen = pairs(queries, acts.keys + queries, causal)
    y = p(ROWS * HEADS, seen, SIZE, p(ROWS * HEADS, SIZE, seen, q, k), v)
    return linear(p, acts, "attention_out", tokens, D, D, y)


def adapted(p: Products, acts: Acts, place: str, tokens: int, y: bool, x: bool) -> bool:
    if place not in acts.adapters:
        return y
    h = p(tokens, D, acts.adapters[place], x if acts.parallel else y, True)
    return p(tokens, acts.adapters[place], D, h, True)


def block(p: Products, acts: Acts, x: bool, post_norm: bool, kv_heads: int, mlp_in: int) -> bool:
    """A residual block, its norms before (Llama, GPT-2) or after (BERT) its halves."""
    tokens, before, after = ROWS * (acts.tokens + LENGTH), acts.norms and not post_norm, acts.norms and post_norm
    h = x or before
    y = adapted(p, acts, "attention_output", tokens, attention(p, acts, h, kv_heads, not post_norm), h)
    x = x or y or after
    h = x or before
    inner = [linear(p, acts, "mlp_in", tokens, D, FF, h) for _ in range(mlp_in)]
    y = linear(p, acts, "mlp_out", tokens, FF, D, any(inner))
    y = adapted(p, acts, "mlp_output", tokens, y, h)
    y = adapted(p, acts, "after_mlp", tokens, x or y or after if post_norm else y, h)
    return x or y


def by_hand(family: str, acts: Acts, head: bool) -> int:
    """FLOPs of a step; `head`: a task head trains."""
    p = Products()
    encoder = family == "bert"
    x = acts.embedded or acts.tokens > 0 or (encoder and acts.norms)
    for _ in range(LAYERS):
        x = block(p, acts, x, encoder, KV_HEADS if family == "llama" else HEADS, 2 if family == "llama" else 1)
    if encoder:
        x = p(ROWS, D, D, x, acts.kernels)  # the pooler
        p(ROWS, D, LABELS, x or "pooler" in acts.outputs, head)
    else:
        p(ROWS * LENGTH, D, VOCAB, x or acts.norms, acts.kernels)
    acts.network(p)
    return p.flops


# The methods' equations


def low_rank(r: int, a: bool = True, once: Callable | None = None) -> Beside:
    """`(x A) B` of rank r, of which B trains and A may; `once`: products of the weights alone."""

    def count(p, tokens, inputs, outputs, x):
        p(tokens, r, outputs, p(tokens, inputs, r, x, a), True)
        if once is not None:
            once(p, inputs, outputs)

    return count


def lengths(r: int) -> Callable:
    """DoRA's norms: `Wᵀ A`, `Aᵀ A` and that times B; no gradient is taken through them (its section 4.3)."""

    def count(p, inputs, outputs):
        p(outputs, inputs, r, False, False)
        p(r, inputs, r, False, False)
        p(r, r, outputs, False, False)

    return count


def orthogonality(r: int) -> Callable:
    """AdaLoRA's penalty (its equation 4): `Pᵀ P` and `Q Qᵀ`."""

    def count(p, inputs, outputs):
        p(r, inputs, r, True, True)
        p(r, outputs, r, True, True)

    return count


def vera(r: int) -> Beside:
    """`((x A) ∘ d) B ∘ b`: A and B are frozen, d trains between them."""

    def count(p, tokens, inputs, outputs, x):
        p(tokens, inputs, r, x, False)
        p(tokens, r, outputs, True, False)

    return count


def moved(r: int) -> Beside:
    """`(x (A - A0)) B + (x A0) (B - B0)`: the start is frozen."""

    def count(p, tokens, inputs, outputs, x):
        low_rank(r)(p, tokens, inputs, outputs, x)
        low_rank(r, a=False)(p, tokens, inputs, outputs, x)

    return count


def recurrent(n: int, h: int) -> Callable[[Products], None]:
    """P-tuning's network: two layers of an LSTM in both directions, four gates each, and two linear ones."""

    def count(p):
        for inputs in (D, 2 * h):
            for _ in range(2):
                p(n, inputs + h, 4 * h, True, True)
        p(n, 2 * h, 2 * h, True, True)
        p(n, 2 * h, D, True, True)

    return count


def on(beside: Beside, kinds=("query", "value")) -> Acts:
    return Acts(beside=dict.fromkeys(kinds, beside))


class Case(NamedTuple):
    """A method and what it makes of a model.

    Attributes:
      families: of the models that it is tried on.
      head: whether a task head trains.
    """

    method: methods.Method
    acts: Acts
    families: tuple[str, ...] = ("llama", "bert")
    head: bool = False
    quantize: str | None = None


BOTH = {"attention_output": 64, "mlp_output": 64}
BIASES = Acts(outputs=(*LINEAR, "pooler"))
EVERYWHERE = Acts(kernels=True, embedded=True, norms=True)
ALL_FAMILIES = ("llama", "bert", "gpt2")
CASES = {
    "full": Case(methods.full(), EVERYWHERE, head=True),
    "head": Case(methods.head(), Acts(), ("bert",), head=True),
    "bitfit": Case(methods.bitfit(), BIASES._replace(norms=True), ("bert", "gpt2")),
    "bitfit-created": Case(methods.bitfit(create=True), BIASES, ("llama",)),
    # the chosen entries' gradient is taken from the dense one: no product gives a few scattered entries for less
    "fishmask": Case(methods.fishmask(score="random"), EVERYWHERE),
    "lora": Case(methods.lora(8), on(low_rank(8)), ALL_FAMILIES),
    "lora-linear": Case(methods.lora(8, targets=["linear"]), on(low_rank(8), LINEAR)),
    "qlora": Case(methods.lora(8), on(low_rank(8)), quantize="nf4"),
    "lora_plus": Case(methods.lora_plus(8), on(low_rank(8))),
    "lora_fa": Case(methods.lora_fa(8), on(low_rank(8, a=False))),
    "pissa": Case(methods.pissa(8, niter=1), on(moved(8))),
    "olora": Case(methods.olora(8), on(moved(8))),
    "vera": Case(methods.vera(256), on(vera(256))),
    "dora": Case(methods.dora(8), on(low_rank(8, once=lengths(8)))),
    "dora-linear": Case(methods.dora(8, targets=["linear"]), on(low_rank(8, once=lengths(8)), LINEAR)),
    "qdora": Case(methods.dora(8), on(low_rank(8, once=lengths(8))), quantize="nf4"),
    "adalora": Case(methods.adalora(8, 12), on(low_rank(12, once=orthogonality(12)))),
    "dylora": Case(methods.dylora(8), on(low_rank(8))),
    "prefix": Case(methods.prefix(10), Acts(keys=10), ALL_FAMILIES),
    "prompt": Case(methods.prompt(20), Acts(tokens=20)),
    "p_tuning": Case(methods.p_tuning(20, hidden=128), Acts(tokens=20, network=recurrent(20, 128))),
    "adapter": Case(methods.adapter(64), Acts(adapters=BOTH)),
    "pfeiffer": Case(methods.pfeiffer(64), Acts(adapters={"after_mlp": 64})),
    "parallel_adapter": Case(methods.parallel_adapter(64), Acts(adapters={"mlp_output": 64}, parallel=True)),
    "mam": Case(methods.mam(30, 512), Acts(keys=30, adapters={"mlp_output": 512}, parallel=True)),
    "ia3": Case(methods.ia3(), Acts(outputs=("key", "value"), inputs=("mlp_out",)), ALL_FAMILIES),
    "norm_tuning": Case(methods.norm_tuning(), Acts(norms=True)),
    "trainable_tokens": Case(methods.trainable_tokens([1, 2, 3]), Acts(embedded=True)),
    "child_tuning": Case(methods.child_tuning(), EVERYWHERE, head=True),
    "lora+neftune": Case(methods.chain(methods.lora(8), methods.neftune()), on(low_rank(8))),
    "lora+prefix+head": Case(
        methods.chain(methods.lora(8), methods.prefix(10), methods.head()),
        on(low_rank(8))._replace(keys=10),
        ("bert",),
        head=True,
    ),
}


# The step


@functools.cache
def described(family: str, quantize: str | None = None) -> hub.Model:
    task, labels = ("classification", LABELS) if family == "bert" else ("generation", None)
    return hub.from_config(CONFIGS[family], task, labels=labels, quantize=quantize, seed=None)


@functools.cache
def traced(family: str, name: str) -> Any:
    """The training step of a case on abstract shapes."""
    m, model = CASES[name].method, described(family, CASES[name].quantize)
    kind = "classification" if family == "bert" else "generation"
    tx = make_optimizer(Settings(), 10, m)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = jax.eval_shape(lambda k, p: m.init(k, p, model.sites), key, model.params)
    state, frozen = jax.eval_shape(lambda p: start(m, p, tx), params)
    step = jax.jit(make_step(loss_of(model, kind), m, tx))
    return step.trace(state, frozen, abstract_batch(model, kind, ROWS, LENGTH), key)


def test_every_method_is_counted():
    counted = {name for case in CASES.values() for name, _ in case.method.spec}
    assert counted == {*methods.METHODS}


@pytest.mark.parametrize(("name", "family"), [(name, f) for name, case in CASES.items() for f in case.families])
def test_a_step_costs_what_its_equations_cost(name, family):
    hand, step = by_hand(family, CASES[name].acts, CASES[name].head), traced(family, name)
    # a fused product's whole output moves in GPT-2's first layer; PiSSA's factors are side by side with their start
    assert counting.flops(step.jaxpr).products == pytest.approx(hand, rel=0.005)
    assert 0.95 * hand < xla(step) <= 1.05 * hand


def xla(step: Any) -> float:
    return step.lower().cost_analysis()["flops"]


@pytest.mark.parametrize("where", ["", "-linear"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_length_for_each_column_costs_next_to_nothing(family, where):
    """DoRA without dropout: the norms need rank-sized products alone."""
    assert xla(traced(family, f"dora{where}")) <= 1.15 * xla(traced(family, f"lora{where}"))


NARROW, WIDE = 64, 512


def hooked(node: Any, x: jax.Array) -> jax.Array:
    return node(x, x=x, context=None)


W, A, B = (jnp.ones(shape) for shape in ((NARROW, WIDE), (NARROW, 4), (4, WIDE)))
PRODUCTS = {
    "lora": (weights.dot, LoRA(W, A, B), NARROW),
    "dora": (weights.dot, DoRA(W, A, B, jnp.ones(WIDE)), NARROW),
    "adapter": (hooked, Adapter(B.T, jnp.ones(4), B, jnp.ones(WIDE)), WIDE),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_gradient_of_a_factor_reads_what_is_there_as_it_lies(name):
    """Else XLA writes a transposed copy of the large gradient of the result first."""
    call, node, width = PRODUCTS[name]

    def loss(trained, x):
        return jnp.sin(call(dataclasses.replace(node, **trained), x)).sum()

    trained = {field: getattr(node, field) for field in node.trains}
    program = jax.jit(jax.grad(loss)).lower(trained, jnp.ones((3, 32, width))).compile().as_text()
    assert program is not None
    assert f"f32[96,{WIDE}]" in program
    assert re.search(rf"f32\[{WIDE},(3,32|96)\]", program) is None
