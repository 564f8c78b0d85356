"""What a method chose to train of each array: `allocation` and `sizes` of a run's result."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
import tiny

from peftjax import stack_layers, unstack_layers
from peftjax.methods import child_tuning, lora
from peftjax.methods.adalora import AdaLoRA
from peftjax.methods.base import Site
from peftjax.methods.fishmask import Sparse
from peftjax.run import entries_for, run
from peftjax.train import Settings
from peftjax.tree import count, flatten
from peftjax.weights import Weight, allocation, node, split


def test_by_hand():
    w = jnp.zeros((2, 3))
    sparse = Sparse(w, jnp.array([0, 4]), jnp.ones(2))
    triplets = AdaLoRA(w, jnp.ones((2, 3)), jnp.array([0.5, 0.0, -1e-9]), jnp.ones((3, 3)))
    fused = split(jnp.zeros((2, 6)), {"query": slice(0, 2), "value": slice(2, 6)})
    fused = dataclasses.replace(fused, blocks=fused.blocks | {"value": Sparse(fused.blocks["value"], *one(7))})
    params = {"h_0": {"q": sparse, "k": w, "qkv": fused}, "h_1": {"q": triplets, "k": Sparse(triplets, *one(1))}}
    want = {"h_0/q": (2, 6), "h_0/qkv/blocks/value": (1, 8), "h_1/q": (2, 6), "h_1/k": (1, 6), "h_1/k/base": (2, 6)}
    assert allocation(params) == want


def one(index):
    return jnp.array([index]), jnp.ones(1)


def test_padding_of_the_scanned_layout_is_no_choice():
    w = jnp.zeros((2, 3))
    params = {"h_0": {"q": Sparse(w, jnp.array([0, 4, 5]), jnp.ones(3))}, "h_1": {"q": Sparse(w, *one(2))}}
    assert allocation(unstack_layers(stack_layers(params))) == allocation(params) == {"h_0/q": (3, 6), "h_1/q": (1, 6)}


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return tiny.problem(tmp_path_factory.mktemp("tiny"), "bert", "rte", max_buckets=1)


def trained(problem, folder, text, layout="loop"):
    (entry,) = entries_for(text, problem.model)  # with the task head
    return run(problem, entry, Settings(batch_size=8, steps=6, learning_rate=2e-2, layout=layout), folder)


def sizes_of(problem, paths):
    there = flatten(problem.model.params)
    return {path: count(there[path]) for path in paths}


def test_fish_mask(problem, tmp_path):
    result = trained(problem, tmp_path, "fishmask(count=50, samples=8, targets=['linear'])")
    assert sum(result["allocation"].values()) == 50
    assert result["sizes"] == sizes_of(problem, result["allocation"])
    assert all(0 < n <= result["sizes"][path] for path, n in result["allocation"].items())


def test_adalora(problem, tmp_path):
    result = trained(problem, tmp_path, "adalora(target_rank=1, init_rank=3, warmup=1, final=2)", "scan")
    assert len(result["allocation"]) == 4
    assert sum(result["allocation"].values()) == 4
    assert result["sizes"] == sizes_of(problem, result["allocation"])
    assert json.loads((tmp_path / "result.json").read_text())["allocation"] == result["allocation"]


def test_child_tuning():
    """Gradients that are the parameters themselves: of ten entries of the block, the five largest."""

    def half_squares(params, batch, key):
        return sum(jnp.square(x).sum() / 2 for x in jax.tree.leaves(params)), jnp.float32(1)

    params = {"h": {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(4.0) + 3}, "head": jnp.full(3, 9.0)}
    sites = (Site("h", "block"),)
    m = child_tuning(mode="D", p=0.5).observed(half_squares, params, sites, [{"weight": jnp.ones(1)}])
    assert allocation(m.init(jax.random.key(0), params, sites)) == {"h/w": (2, 6), "h/b": (3, 4)}


def test_where_nothing_is_chosen_there_is_nothing(problem):
    for m in (lora(rank=2), child_tuning(mode="F")):
        assert allocation(m.init(jax.random.key(0), problem.model.params, problem.model.sites)) == {}


def test_a_new_node_takes_part():
    @node
    class Rows(Weight):
        base: jax.Array
        rows: jax.Array
        trains = ("rows",)

        def allocated(self):
            return len(self.rows)

    params = {"w": Rows(jnp.ones((4, 2)), jnp.ones((3, 2)))}
    assert allocation(params) == {"w": (3, 8)}
