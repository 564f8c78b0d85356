"""What each rematerialisation policy keeps for the backward pass."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny
from test_models import LAYOUTS, fast

from peftjax import hub
from peftjax.methods import lora
from peftjax.models.layers import REMAT
from peftjax.tree import combine, partition
from peftjax.weights import Weight, dot, materialize, node

TASKS = {"llama": "causal-lm", "t5": "seq2seq"}
WIDE = {
    "llama": {"hidden_size": 32, "intermediate_size": 64},
    "t5": {"d_model": 32, "d_ff": 64},
}
SHAPES = [(32, 64), (64, 32), (32, 32), (32, 16), (32, 24), (24, 32)]  # of the blocks' weights, and of nothing else
TEXT = jax.ShapeDtypeStruct((3, 30), jnp.int32)


def programs(family, quantize, layout, layers):
    """For each policy: (trainable, frozen, batch) -> loss, and shapes of the three, with LoRA on all linear weights."""
    method = lora(rank=2, targets=["linear"])
    config = tiny.config(family, **WIDE[family], **{"num_layers" if family == "t5" else "num_hidden_layers": layers})
    model = hub.from_config(config, TASKS[family], seed=None, quantize=quantize)

    def init():
        plain = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.params)
        return layout(method.init(jax.random.key(0), plain, model.sites))

    params = jax.eval_shape(init)
    batch = {"input_ids": TEXT} | ({"decoder_input_ids": TEXT} if family == "t5" else {})
    for remat in REMAT:
        again = model._replace(module=model.module.clone(remat=remat))

        def loss(trainable, frozen, batch, again=again):
            out: Any = again.forward(combine(trainable, frozen), batch)
            return jnp.square(out.logits).mean()

        yield remat, loss, (*partition(params, method.trainable(params)), batch)


def kept(loss, arguments):
    """Shapes of what the backward pass is given, arguments included."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(lambda x: loss(x, *args[1:]), args[0])[1], *arguments))


def size(leaves):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(("family", "layout"), [("llama", "per-layer"), ("llama", "scanned"), ("t5", "scanned")])
def test_policies_keep_less_and_no_dense_copy_of_a_quantised_weight(family, layout):
    bytes_ = {}
    for remat, loss, arguments in programs(family, "nf4", LAYOUTS[layout], 3):
        leaves = kept(loss, arguments)
        bytes_[remat] = size(leaves)
        dense = [x for x in leaves if x.dtype == jnp.float32 and {x.shape, x.shape[1:]}.intersection(SHAPES)]
        assert not dense, (remat, dense)
    assert bytes_["block"] < 0.7 * bytes_["dots"] < 0.6 * bytes_["none"], bytes_


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_temporaries_are_ordered(quantize):
    """Of the scanned layout: the CPU's compiler forgets in an unrolled program what is to be computed again."""
    temporary = {}
    for remat, loss, arguments in programs("llama", quantize, LAYOUTS["scanned"], 8):
        plan = fast(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
        assert plan is not None
        temporary[remat] = plan.temp_size_in_bytes
    assert temporary["block"] < 0.6 * temporary["dots"] < 0.5 * temporary["none"], temporary


@node
class Shifted(Weight):
    """A node of a method that has no products of its own: `W + A B`."""

    base: Any
    a: jax.Array
    b: jax.Array
    trains = ("a", "b")

    def materialize(self):
        return materialize(self.base) + self.a @ self.b


@pytest.mark.parametrize("remat", ["block", "dots"])
def test_a_node_that_only_materialises_keeps_no_dense_array(remat):
    """A policy reaches into the node's own checkpoint, where A B is a product without batch dimensions."""
    import flax.linen as nn

    from peftjax.models.layers import Context, run_blocks

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, cache, context):
            return jnp.tanh(dot(self.get_variable("params", "kernel"), x)), cache

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            context = Context(None, jnp.zeros((1, 1)))
            return run_blocks(self, lambda name: Block(name=name), "layer", 2, x, context, None, remat=remat)[0]

    def loss(factors, bases, x):
        kernels = {f"layer_{i}": {"kernel": Shifted(bases[i], *factors[i])} for i in range(2)}
        return jnp.sin(Stack().apply({"params": kernels}, x)).sum()

    factors, bases = [(jnp.ones((16, 3)), jnp.ones((3, 16)))] * 2, [jnp.ones((16, 16))] * 2
    leaves = kept(loss, (factors, bases, jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)))
    assert sum(x.shape == (2, 8, 16) for x in leaves) == {"block": 3, "dots": 5}[remat]
    matrices = sum(x.shape == (16, 16) for x in leaves)  # bases; the first one's product is needed for no gradient
    assert matrices == {"block": 2, "dots": 1}[remat]


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="no rematerialisation 'layers'; write one of 'none', 'block', 'dots'"):
        hub.from_config(tiny.config("llama"), "causal-lm", remat="layers", seed=None)
