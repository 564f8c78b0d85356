"""Mixed-adapter batches against the separate runs: forward, generation, training, and what they cost."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from peftjax import chain, combine, hub, load_mixed, mix, partition, per_adapter, stack_layers
from peftjax.checkpoint import save_adapter
from peftjax.generate import Decoding, complete, decoder
from peftjax.methods import METHODS, adalora, adapter, bitfit, dora, head, ia3, lora, lora_fa, prefix, prompt
from peftjax.tree import flatten
from peftjax.weights import is_node

PAD, NEW, K = 0, 8, 3
IDS = np.array([2, 0, 1, 2, 0])
LENGTHS = (3, 7, 1, 5, 7)
BASES = {"llama": "causal-lm", "gpt2": "causal-lm", "bert": "classification", "t5": "seq2seq"}
CASES = {
    "lora": lora(rank=2, targets=["linear"]),
    "dora": dora(rank=2, targets=["linear"]),
    "prefix": prefix(length=3, std=1.0),
    "prompt": prompt(length=3),
    "adapter": adapter(size=3),
    "ia3": ia3(),
    "bitfit": bitfit(create=True),
}
QUICK = [("llama", name) for name in CASES] + [("gpt2", "lora"), ("gpt2", "prefix"), ("bert", "dora"), ("t5", "lora")]


def base(family, layers=2, **options):
    changes = {"num_layers" if family == "t5" else "num_hidden_layers": layers}
    changes |= {"initializer_range": 0.5} if family in ("llama", "gpt2") else {}
    rough = 5 if family == "t5" else 1  # less rough, it writes one token for ever
    made = hub.from_config(tiny.config(family, **changes), BASES[family], **options)
    if options.get("quantize"):
        return made
    return made._replace(params=jax.tree.map(lambda x, y: x + rough * (y - x), made.params, tiny.roughen(made.params)))


@pytest.fixture(scope="module")
def llama():
    return base("llama")


@pytest.fixture(scope="module")
def shallow():
    """What takes long to compile is shown on one layer."""
    return base("llama", layers=1)


def method_for(name, family):
    return chain(CASES[name], head()) if family == "bert" else CASES[name]


def adapters(method, model, k=K):
    """Each with trained values of its own."""
    made = []
    for i in range(k):
        params, rng = method.init(jax.random.key(i), model.params, model.sites), np.random.default_rng(i)

        def move(trains, x, rng=rng):
            return jnp.asarray(np.asarray(x) + 0.3 * rng.normal(size=x.shape).astype(np.float32)) if trains else x

        made.append(jax.tree.map(move, method.trainable(params), params))
    return made


def batch_for(model, side="right"):
    rng, width = np.random.default_rng(0), max(LENGTHS)
    ids, mask = np.full((len(LENGTHS), width), PAD, np.int32), np.zeros((len(LENGTHS), width), np.int32)
    for i, n in enumerate(LENGTHS):
        at = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, at], mask[i, at] = rng.integers(4, 26, n), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.family.name == "t5":
        batch["decoder_input_ids"] = rng.integers(4, 26, (len(LENGTHS), 4)).astype(np.int32)
    if model.family.name == "bert":
        batch["type_ids"] = rng.integers(0, 2, ids.shape).astype(np.int32)
    return batch


def close(a, b, tolerance=1e-5):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


def check_forward(model, method, trees):
    """Logits of the mixed batch are those of each row's own adapter, and they do differ."""
    mixed, params = mix(model, trees, method)
    batch = batch_for(model)
    got = jax.jit(lambda p: mixed.forward(p, batch).logits)(mixed.bind(params, IDS))
    alone = jax.jit(lambda p: model.forward(method.resolve(p, None), batch).logits)
    each = [alone(tree) for tree in trees]
    assert got.shape == each[0].shape
    seen = batch["attention_mask"] > 0
    for row, i in enumerate(IDS):
        where = seen[row] if got.ndim == 3 and model.family.start_id is None else slice(None)
        assert close(got[row][where], each[i][row][where])
        assert not close(got[row][where], each[(i + 1) % K][row][where], 1e-3)


@pytest.mark.parametrize(("family", "name"), QUICK)
def test_a_mixed_batch_equals_the_separate_runs(family, name):
    model = base(family, layers=1)
    method = method_for(name, family)
    check_forward(model, method, adapters(method, model))


@pytest.mark.slow
@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("name", CASES)
def test_every_family_and_method(family, name):
    if (family, name) not in QUICK:
        test_a_mixed_batch_equals_the_separate_runs(family, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("proxy", "head", "adalora", "fishmask")])
def test_every_method_of_the_table(name, llama):
    options = {"trainable_tokens": {"ids": [*range(4, 26)]}, "bitfit": {"create": True}}.get(name, {})
    method = METHODS[name](**options)
    check_forward(llama, method, adapters(method, llama))


@pytest.mark.parametrize("name", ["dora", "prefix"])
def test_the_scanned_layout(name, llama):
    check_forward(llama, CASES[name], [stack_layers(tree) for tree in adapters(CASES[name], llama)])


def test_over_a_quantised_base():
    model, method = base("llama", layers=1, quantize="nf4"), dora(rank=2)
    check_forward(model, method, adapters(method, model))


# Generation


def prompts_for(model):
    batch = batch_for(model, side="left")
    return batch["input_ids"], batch["attention_mask"]


def check_generation(model, method, trees, ends=False):
    mixed, params = mix(model, trees, method)
    ids, mask = prompts_for(model)
    free: jax.stages.Wrapped = decoder(mixed, Decoding(NEW), PAD)  # pyright: ignore[reportAssignmentType] - it is jitted
    got = np.asarray(free(mixed.bind(params, IDS), ids, mask))
    alone = decoder(model, Decoding(NEW), PAD)
    each = [np.asarray(alone(method.resolve(tree, None), ids, mask)) for tree in trees]
    for row, i in enumerate(IDS):
        assert got[row].tolist() == each[i][row].tolist()
    assert len({each[i].tobytes() for i in range(K)}) > 1
    other = np.asarray(free(mixed.bind(params, (IDS + 1) % K), ids, mask))
    assert other[0].tolist() == each[(IDS[0] + 1) % K][0].tolist()
    assert free._cache_size() == 1  # pyright: ignore[reportAttributeAccessIssue] - jax has no public counter
    if ends:
        eos = int(got[0, 3])  # a token that does come up
        ended = np.asarray(decoder(mixed, Decoding(NEW, stop=(eos,)), PAD)(mixed.bind(params, IDS), ids, mask))
        for row, tokens in zip(ended.tolist(), got.tolist(), strict=True):
            end = tokens.index(eos) + 1 if eos in tokens else NEW
            assert row == tokens[:end] + [PAD] * (NEW - end)


@pytest.mark.parametrize("name", ["dora", "prompt"])
def test_generation_equals_the_separate_runs(name, shallow):
    check_generation(shallow, CASES[name], adapters(CASES[name], shallow), ends=name == "prompt")


@pytest.mark.parametrize("name", ["lora"])
def test_generation_of_an_encoder_decoder(name):
    model = base("t5", layers=1)
    check_generation(model, CASES[name], adapters(CASES[name], model))


def test_generation_in_the_scanned_layout(llama):
    method = prefix(length=2, std=1.0)
    check_generation(llama, method, [stack_layers(tree) for tree in adapters(method, llama)])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "layout"), [("llama", "scan"), ("gpt2", "loop"), ("t5", "loop"), ("t5", "scan")])
@pytest.mark.parametrize("name", CASES)
def test_generation_of_every_family_and_method(family, name, layout):
    model, method = base(family), method_for(name, family)
    trees = adapters(method, model)
    check_generation(model, method, [stack_layers(t) for t in trees] if layout == "scan" else trees)


def test_ids_follow_rows_that_are_repeated(shallow):
    """As beams are: row r's copies are r k to r k + k - 1."""
    method = CASES["lora"]
    mixed, params = mix(shallow, adapters(method, shallow), method)
    params = mixed.bind(params, IDS)
    forward = jax.jit(lambda p, b: mixed.forward(p, b).logits)
    once = batch_for(shallow)
    twice = {k: np.repeat(x, 2, axis=0) for k, x in once.items()}
    assert close(forward(params, twice), np.repeat(forward(params, once), 2, axis=0))
    with pytest.raises(ValueError, match="the batch has 4 rows and 5 adapter ids; bind one id a row"):
        forward(params, {k: x[:4] for k, x in once.items()})


def test_texts_keep_their_adapter_in_whatever_batch_they_are(shallow):
    method, tokenizer = CASES["lora"], tiny.tokenizer()
    trees = adapters(method, shallow)
    mixed, params = mix(shallow, trees, method)
    texts = ["cat sat in", "the red dog", "dog ran in", "cat is bad", "red pub near"]
    how = Decoding(max_new_tokens=NEW)
    got = complete(mixed, mixed.bind(params, IDS), tokenizer, texts, how, batch_size=2)
    alone = [complete(shallow, tree, tokenizer, texts, how, batch_size=2) for tree in trees[1:]]
    assert [[x == y for x, y in zip(got, a, strict=True)] for a in alone] == [[i == own for own in IDS] for i in (1, 2)]
    with pytest.raises(ValueError, match=r"there are 4 texts and 5 adapter ids; write mixed.bind\(params, ids\)"):
        complete(mixed, mixed.bind(params, IDS), tokenizer, texts[:4], how)


# Training


def objective_of(model):
    def objective(params, batch, key):
        logits = model.forward(params, batch, key).logits[:, :-1]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["input_ids"][:, 1:])
        weight = batch["attention_mask"][:, 1:] * batch["weight"][:, None]
        return (each * weight).sum(), weight.sum()

    return objective


def train_batches(steps=5, rows=6):
    for step in range(steps):
        rng = np.random.default_rng(step)
        mask = (np.arange(7) < rng.integers(3, 8, (rows, 1))).astype(np.int32)
        yield {
            "input_ids": rng.integers(4, 26, (rows, 7)).astype(np.int32),
            "attention_mask": mask,
            "weight": rng.integers(1, 3, rows).astype(np.float32),
        }


def training_alone(model, method, tx):
    """(adapted parameters, batches) -> (trained parameters, losses)."""
    objective = objective_of(model)

    @jax.jit
    def step(trainable, state, frozen, batch):
        def loss(trainable):
            params = combine(trainable, frozen)
            total, weight = objective(method.resolve(params, None), batch, None)
            return total / weight + method.penalty(params)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    def train(tree, batches):
        trainable, frozen = partition(tree, method.trainable(tree))
        state, losses = tx.init(trainable), []
        for batch in batches:
            trainable, state, value = step(trainable, state, frozen, batch)
            losses.append(float(value))
        return combine(trainable, frozen), losses

    return train


def check_training(model, method, tx):
    trees, ids = adapters(method, model), np.array([0, 1, 2, 1, 0, 2])
    mixed, params = mix(model, trees, method)
    train_alone = training_alone(model, method, tx)
    params = mixed.bind(params, ids)
    trainable, frozen = partition(params, mixed.trainable(params))
    objective, together = mixed.losses(objective_of(model)), per_adapter(tx)
    state, got = together.init(trainable), []

    @jax.jit
    def step(trainable, state, batch):
        def loss(trainable):
            each = objective(combine(trainable, frozen), batch)
            return each.sum(), each

        grads, each = jax.grad(loss, has_aux=True)(trainable)
        updates, state = together.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, each

    for batch in train_batches():
        trainable, state, each = step(trainable, state, batch)
        got.append(each)
    for i, tree in enumerate(trees):
        own = [{k: x[ids == i] for k, x in batch.items()} for batch in train_batches()]
        alone, losses = train_alone(tree, own)
        assert close(np.array(got)[:, i], losses)
        mine = mixed.adapter(combine(trainable, frozen), i)
        assert jax.tree.structure(mine) == jax.tree.structure(alone)
        assert all(close(x, y) for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(alone), strict=True))
        moved = jax.tree.map(lambda x, y: not close(x, y, 1e-3), alone, tree)
        assert sum(jax.tree.leaves(moved)) == sum(jax.tree.leaves(method.trainable(tree)))


CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-2, weight_decay=0.1))


@pytest.mark.parametrize("method", [dora(rank=2), prompt(length=3)])
def test_training_together_is_training_apart(method, shallow):
    check_training(shallow, method, CLIPPED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *CASES.values(),
        lora_fa(rank=2),
        prefix(length=2, mlp=True, hidden=5, std=1.0),
        adalora(2, 3),
    ],
)
def test_training_of_every_method(method, shallow):
    check_training(shallow, method, CLIPPED)


def test_each_row_has_its_own_dropout_and_each_adapter_its_own_resolve(shallow):
    method = lora(rank=2, dropout=0.5)
    mixed, params = mix(shallow, adapters(method, shallow, 2), method)
    params = mixed.bind(params, [0, 0, 1])
    same = {"input_ids": np.tile(np.arange(4, 9, dtype=np.int32), (3, 1))}
    forward = jax.jit(lambda key: mixed.forward(params, same, key).logits)
    dropped, again, other = (forward(jax.random.key(i)) for i in (0, 0, 1))
    assert np.array_equal(dropped, again)
    assert not close(dropped, other, 1e-3)
    assert not close(dropped[0], dropped[1], 1e-3)
    plain = jax.jit(lambda: mixed.forward(params, same).logits)()
    assert close(plain[0], plain[1])


# What it is made of


def test_the_base_is_shared_and_what_adapters_add_is_not(llama):
    method = lora_fa(rank=2)
    trees = adapters(method, llama)
    mixed, params = mix(llama, trees, method)
    assert {id(x) for x in jax.tree.leaves(params.shared)} == {id(x) for x in jax.tree.leaves(llama.params)}
    trains = sum(jax.tree.leaves(mixed.trainable(params)))
    assert trains == 4  # query's and value's B in two layers
    assert len(jax.tree.leaves(params.own)) == 8  # A is drawn for each adapter, and does not train
    assert all(tiny.same(mixed.adapter(params, i), tree) for i, tree in enumerate(trees))


def test_an_untrained_adapter_is_the_base(shallow):
    method = CASES["dora"]
    start = method.init(jax.random.key(9), shallow.params, shallow.sites)
    mixed, params = mix(shallow, [start, adapters(method, shallow)[0]], method)
    batch = batch_for(shallow)
    got = jax.jit(lambda p: mixed.forward(p, batch).logits)(mixed.bind(params, [0, 1, 0, 1, 1]))
    plain = jax.jit(lambda p: shallow.forward(p, batch).logits)(shallow.params)
    same = [close(got[i, : LENGTHS[i]], plain[i, : LENGTHS[i]]) for i in range(5)]
    assert same == [True, False, True, False, False]


def flops_of(f, *args):
    return jax.jit(f).lower(*args).compile().cost_analysis().get("flops", 0)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_frozen_matrix_meets_the_whole_batch_in_one_product(name):
    """No array has one frozen matrix a row, and the count of operations is that of one adapter for all rows."""
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 1}
    model = hub.from_config(tiny.config("llama", **sizes), "causal-lm")
    method = CASES[name]
    trees = adapters(method, model)
    mixed, params = mix(model, trees, method)
    batch = {"input_ids": np.ones((11, 1), np.int32)}  # one token a row, as in decoding
    params = mixed.bind(params, np.arange(11) % K)
    program = jax.jit(lambda p, b: mixed.forward(p, b).logits).lower(params, batch).compile()
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", program.as_text())}
    assert (32, 88) in shapes
    assert not any(11 in s and (s[-2:] in ((32, 88), (88, 32))) for s in shapes)
    plain = flops_of(lambda p, b: model.forward(p, b).logits, trees[0], batch)
    nodes = [x for x in flatten(trees[0], is_leaf=is_node).values() if is_node(x)]
    once = K * flops_of(lambda nodes: [w.ready() for w in nodes], nodes)  # DoRA's norms, once an adapter
    assert program.cost_analysis()["flops"] < 1.1 * plain + once


def test_files_of_adapters(llama, tmp_path):
    method = chain(prefix(length=2, std=1.0), lora(rank=2))
    trees = adapters(method, llama)
    files = [tmp_path / f"{i}.safetensors" for i in range(K)]
    for file, tree in zip(files, trees, strict=True):
        save_adapter(file, llama, method, tree)
    mixed, params = load_mixed(llama, files)
    assert mixed.method.spec == method.spec
    assert all(tiny.same(mixed.adapter(params, i), tree) for i, tree in enumerate(trees))
    other = tmp_path / "bitfit.safetensors"
    bias = bitfit(create=True)
    save_adapter(other, llama, bias, adapters(bias, llama, 1)[0])
    with pytest.raises(ValueError, match=r"0.safetensors is of the method prefix\+lora and .* of bitfit"):
        load_mixed(llama, [files[0], other])
    with pytest.raises(ValueError, match="there are no adapter files"):
        load_mixed(llama, [])
    with pytest.raises(ValueError, match="an adapter for another base"):
        load_mixed(base("llama", seed=1), files)


def test_what_cannot_be_mixed_is_said(llama):
    def start(method, model=llama):
        return method.init(jax.random.key(0), model.params, model.sites)

    two = lora(rank=2)
    with pytest.raises(ValueError, match="there are no adapters"):
        mix(llama, [], two)
    with pytest.raises(ValueError, match=r"/q_proj/kernel/a is \(16, 2\) float32 .*\(16, 3\) float32"):
        mix(llama, [start(two), start(lora(rank=3, alpha=3))], two)
    with pytest.raises(ValueError, match=r"adapters 0 and 1 differ at .*/k_proj/kernel: an array .* and LoRA\(scale=1"):
        mix(llama, [start(two), start(lora(rank=2, targets=["query", "key", "value"]))], two)
    with pytest.raises(ValueError, match=r"differ at .*/q_proj/kernel: LoRA\(scale=1.0.* and LoRA\(scale=4.0"):
        mix(llama, [start(two), start(lora(rank=2, alpha=8))], two)
    with pytest.raises(ValueError, match=r"differ at .*: LoRA.* and DoRA"):
        mix(llama, [start(two), start(dora(rank=2))], two)
    with pytest.raises(ValueError, match=r"does not train and is not the base's; these adapters are of another base"):
        mix(llama, [start(two), start(two, base("llama", seed=1))], two)
    with pytest.raises(ValueError, match=r"does not train and is not the base's"):
        mix(base("llama", seed=1), [start(two)], two)


def test_ids_are_checked(llama):
    mixed, params = mix(llama, adapters(CASES["lora"], llama), CASES["lora"])
    for ids, said in (
        ([0, 3], r"there are 3 adapters, 0 to 2; got the ids \[3\]"),
        ([-1], r"got the ids \[-1\]"),
        ([0.0], "whole numbers, one a row; got shape .* of float64"),
        (1, r"got shape \(\)"),
        ([], "got shape"),
    ):
        with pytest.raises(ValueError, match=said):
            mixed.bind(params, ids)
    with pytest.raises(ValueError, match="which adapter does each row use"):
        mixed.forward(params, batch_for(llama))
