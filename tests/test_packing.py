"""Packed texts are the same texts: loss and gradients of rows with several texts equal those of one text a row."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from peftjax import data, hub, stack_layers
from peftjax.data import Example
from peftjax.methods import adapter, chain, full, lora, p_tuning, prefix, prompt
from peftjax.models import FAMILIES, layers
from peftjax.problem import Problem, objective, prepare
from peftjax.run import Entry, configuration, run
from peftjax.tasks import get_task
from peftjax.train import Settings
from peftjax.tree import combine, flatten, map_with_path, partition

ROOM = 24
METHODS = {
    "full": full(),
    "lora": lora(rank=2),
    "adapter": adapter(4),
    "prefix": prefix(3),
    "prompt": prompt(3),
    "all": chain(prompt(2, start="random"), prefix(2), lora(rank=2), adapter(4)),
    "p_tuning": p_tuning(2, encoder="mlp", hidden=4),
}
DROP = {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "llama": {}}
DROP["mistral"] = {"sliding_window": 4}  # less than the rows, so that a prompt's distance matters


def texts(n=11, seed=0) -> list[Example]:
    """Of 2 to 10 tokens, the loss on a part of each that may be its first token too."""
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        length = int(rng.integers(2, 11))
        begin = int(rng.integers(0, length))
        out.append(Example(rng.integers(4, 20, length).tolist(), loss_mask=[0] * begin + [1] * (length - begin)))
    return out


@pytest.fixture(scope="module")
def models():
    out = {}
    for family, changes in DROP.items():
        model, rng = hub.from_config(tiny.config(family, **changes), "causal-lm", seed=None), np.random.default_rng(0)

        def draw(path, x, rng=rng):
            return jnp.asarray(path.endswith("scale") + 0.2 * rng.normal(size=x.shape), jnp.float32)

        out[family] = model._replace(params=map_with_path(draw, model.params))
    return out


def problem(model, examples, packed=None) -> Problem:
    return Problem(model, tiny.tokenizer(), get_task("e2e"), examples, examples, [], (16,), 4, (), packed=packed)


def epoch_sums(problem, method, params, batch_size):
    """Loss, weight and gradient, summed over an epoch."""
    loss = objective(problem)
    trainable, frozen = partition(params, method.trainable(params))

    @jax.jit
    def part(trainable, batch):
        resolved = method.resolve(combine(trainable, frozen), None)
        return loss(resolved, batch, None)

    step = jax.jit(jax.value_and_grad(part, has_aux=True))
    total, weight, grads = 0.0, 0.0, jax.tree.map(jnp.zeros_like, trainable)
    for batch in problem.epoch(0, batch_size, seed=3):
        (a, w), g = step(trainable, batch)
        total, weight, grads = total + float(a), weight + float(w), jax.tree.map(jnp.add, grads, g)
    return total, weight, {p: np.asarray(x) / weight for p, x in flatten(grads).items()}


NAMES = [name if name in ("full", "all") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", DROP)
@pytest.mark.parametrize("layout", ["loop", pytest.param("scan", marks=pytest.mark.slow)])
def test_packed_equals_unpacked(models, family, name, layout):
    _compare(models[family], METHODS[name], layout)


def test_packed_equals_unpacked_in_a_scan(models):
    _compare(models["gpt2"], METHODS["all"], "scan")


def _compare(model, method, layout):
    params = tiny.roughen(method.init(jax.random.key(1), model.params, model.sites), 1)
    params = stack_layers(params) if layout == "scan" else params
    examples = texts()
    one = epoch_sums(problem(model, examples), method, params, 3)
    packed = epoch_sums(problem(model, examples, ROOM), method, params, 3)
    assert packed[1] == one[1] > 0
    np.testing.assert_allclose(packed[0], one[0], rtol=1e-5)
    assert packed[2].keys() == one[2].keys()
    for path, g in one[2].items():
        np.testing.assert_allclose(packed[2][path], g, atol=1e-5, err_msg=path)


def test_the_dropout_path_sees_segments_too():
    """Attention with dropout is another code path; at a rate that never drops it must give the same."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 4, 3)), jnp.float32) for _ in range(3))
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    context, _ = layers.causal_context((segments > 0).astype(int), jnp.arange(6)[None], None, True, segments)
    plain = layers.attention(None, q, k, v, context.mask)

    class Dropping(nn.Module):
        @nn.compact
        def __call__(self):
            return layers.attention(self, q, k, v, context.mask, dropout=1e-9, deterministic=False)

    dropped = Dropping().apply({}, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(dropped, plain, atol=1e-5)


def test_texts_do_not_see_one_another(models):
    """Changing the first text changes no logit of the second, and padding changes none at all."""
    for model in models.values():
        batch = data.make_packed(texts(), [[0, 1, 2]], 1, 40, pad_id=0)
        n = len(texts()[0].input_ids)
        other = {**batch, "input_ids": batch["input_ids"].copy()}
        other["input_ids"][0, :n] = 5
        other["input_ids"][batch["segment_ids"] == 0] = 6
        forward = jax.jit(model.forward)
        a, b = (np.asarray(forward(model.params, x).logits)[0] for x in (batch, other))
        later = batch["segment_ids"][0] > 1
        np.testing.assert_allclose(a[later], b[later], atol=1e-6)
        assert np.abs(a[:n] - b[:n]).max() > 1e-3


def test_a_packed_batch():
    examples = [Example([7, 8, 9], loss_mask=[1, 0, 1]), Example([4, 5], loss_mask=[0, 1]), Example([6])]
    batch = data.make_packed(examples, [[0, 1], [2]], 3, 6, pad_id=1)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 4, 5, 1], [6, 1, 1, 1, 1, 1], [7, 8, 9, 4, 5, 1]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [1, 1, 1, 2, 2, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 0], [0] * 6, [0, 1, 2, 0, 1, 0]]
    assert batch["loss_mask"].tolist() == [[0, 0, 1, 0, 1, 0], [0] * 6, [0] * 6]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0], [1] + [0] * 5, [1] * 5 + [0]]
    assert batch["weight"].tolist() == [1, 1, 0]


def test_rows_hold_every_text_once_and_epochs_have_as_many():
    lengths = np.random.default_rng(1).integers(1, 40, 300).tolist()
    plain = data.pack(lengths, 64)
    assert sorted(i for row in plain for i in row) == list(range(300))
    assert max(sum(lengths[i] for i in row) for row in plain) <= 64
    least = -(-sum(lengths) // 64)
    assert least <= len(plain) <= 11 * least / 9 + 1, "first-fit decreasing keeps within 11/9 of the best"
    epochs = [data.pack(lengths, 64, shuffle_seed=5, epoch=e) for e in (0, 1, 0)]
    assert {len(rows) for rows in epochs} == {len(plain)}
    assert epochs[0] == epochs[2] != epochs[1]
    assert data.pack(lengths, 64, shuffle_seed=6) != epochs[0]
    with pytest.raises(ValueError, match="Cannot pack 2 texts of up to 9 tokens into rows of 8"):
        data.pack([9, 1], 8)


def test_who_cannot_pack(models):
    with pytest.raises(ValueError, match="packing is for generation tasks; rte is a classification task"):
        prepare("no-such-model", "rte", "no-such-folder", pack=True)
    batch, model = data.make_packed(texts(), [[0, 1]], 1, 24, pad_id=0), models["llama"]
    for family, what in (("t5", "an encoder with a decoder"), ("bert", "an encoder")):
        with pytest.raises(
            ValueError, match=f"for decoders, such as llama and gpt2; {family} is {what}: leave out pack"
        ):
            model._replace(family=FAMILIES[family]).forward(model.params, batch)
    with pytest.raises(ValueError, match="need positions that start from 0 for each text"):
        model.forward(model.params, {k: v for k, v in batch.items() if k != "positions"})
    with pytest.raises(ValueError, match="a cache holds one text a row"):
        model.forward(model.params, batch, cache=model.empty_cache(model.params, 1, 24))


def test_a_packed_problem(tmp_path):
    """Its epochs are functions of seed and number, so that a resumed run sees the same; its configuration says it."""
    packed = tiny.problem(tmp_path, "gpt2", "e2e", pack=True, max_new_tokens=4)
    plain = packed._replace(packed=None)
    assert packed.packed == 64
    found = re.fullmatch(
        r"24 training texts packed into (\d+) rows of 64 tokens: (.+)% of them padding, (.+)% with one text a row",
        packed.notes[0],
    )
    assert found is not None
    batches = list(packed.epoch(1, 2, seed=4))
    assert len(batches) == packed.steps_per_epoch(2) == -(-int(found[1]) // 2) < plain.steps_per_epoch(2)
    tokens = sum(len(e.input_ids) for e in packed.train)
    assert float(found[2]) == round(100 - 100 * tokens / (int(found[1]) * 64), 1)
    alone = sum(b["input_ids"].size for b in plain.epoch(0, 1, 0))
    assert float(found[3]) == round(100 - 100 * tokens / alone, 1)
    assert all(tiny.same(a, b) for a, b in zip(batches, packed.epoch(1, 2, seed=4), strict=True))
    assert not all(tiny.same(a, b) for a, b in zip(batches, packed.epoch(2, 2, seed=4), strict=True))
    settings = Settings()
    there, here = (configuration(p, lora(), settings) for p in (packed, plain))
    assert there == here | {"packed": 64}


@pytest.mark.slow
def test_a_packed_run_cannot_go_on_in_another_folder(tmp_path):
    packed = tiny.problem(tmp_path, "gpt2", "e2e", pack=True, max_new_tokens=4)
    settings = Settings(epochs=1, batch_size=2)
    result = run(packed, Entry("lora", lora(rank=2)), settings, tmp_path / "out")
    assert result["compilations"] == 1
    with pytest.raises(ValueError, match="different: packed"):
        run(packed._replace(packed=None), Entry("lora", lora(rank=2)), settings, tmp_path / "out")
