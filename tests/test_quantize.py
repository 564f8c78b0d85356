"""Quantised bases: the laws over the table of methods, the numbers against written-out ones, loading, files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_methods import CASES, FAMILIES, _adapt, _logits, _noise, _steps

from peftjax import combine, merge, partition
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.methods import default_rate
from peftjax.quantize import quantize
from peftjax.tree import flatten

WHOLE = ("fishmask+head", "fishmask-random", "lora over fishmask")  # choose entries of weights, here codes
FROZEN = [name for name, case in CASES.items() if case.base_frozen and name not in WHOLE]
LAWS = [
    *((name, "llama", "nf4-double") for name in FROZEN),
    *((name, "llama", "int8") for name in ("lora", "dora-everywhere", "prefix+lora")),
    *((name, family, "nf4") for name in ("dora", "bitfit-subset", "lora over lora") for family in ("gpt2", "bert")),
]


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in FAMILIES.items()}


def quantized(model, how):
    return model._replace(params=quantize(model.params, model.sites, how))


@pytest.mark.parametrize(("name", "family", "how"), LAWS)
def test_the_laws_on_a_quantised_base(models, name, family, how, tmp_path):
    """Laws 1, 3, 4, 5 and 6: starts unchanged, the loss falls, nothing frozen moves, merges, saves and loads."""
    case, model = CASES[name], quantized(models[family], how)
    params = _adapt(model, case.method)
    if case.unchanged:
        start = _logits(model, case.method.resolve(params, None))
        np.testing.assert_allclose(start, _logits(model, model.params), atol=1e-5)
    before = jax.tree.map(np.array, params)
    fitted = _steps(model, case.method, params, rate=30 * default_rate(case.method, 768))
    losses = [r["loss"] for r in fitted.history]
    assert min(losses[-3:]) < 0.97 * losses[0]
    mask, start = flatten(case.method.trainable(params)), flatten(before)
    moved = {p for p, x in flatten(fitted.params).items() if not np.array_equal(np.asarray(x), start[p])}
    assert moved and moved <= {p for p, m in mask.items() if m}
    trainable, frozen = partition(fitted.params, case.method.trainable(params))
    adapted = combine(_noise(trainable, 0.2), frozen)
    resolved = case.method.resolve(adapted, None)
    save_adapter(tmp_path / "a", model, case.method, adapted)
    loaded = load_adapter(tmp_path / "a", model)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(resolved)
    pairs = zip(jax.tree.leaves(loaded.params), jax.tree.leaves(resolved), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    if case.merges:
        merged = merge(resolved)
        assert flatten(merged).keys() == flatten(models[family].params).keys()
        np.testing.assert_allclose(_logits(model, merged), _logits(model, resolved), atol=2e-5)
