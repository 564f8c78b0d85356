"""The tree algebra: paths, partition and combine, masks, nodes and their products, merge, layout, chain."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from peftjax import (
    METHODS,
    Site,
    Trained,
    Weight,
    attend,
    chain,
    combine,
    count,
    dot,
    masks,
    materialize,
    merge,
    method,
    nbytes,
    node,
    partition,
    stack_layers,
    static,
    take,
    unstack_layers,
    weight_method,
)
from peftjax.layout import layer_count, layer_paths
from peftjax.methods import bitfit, build, fishmask, full, head, lora, parse, prefix, select
from peftjax.methods.base import leaf_key, mark, path_key
from peftjax.methods.lora import LoRA
from peftjax.methods.prefix import Prefix
from peftjax.tree import cast, flatten, get, map_with_path, nearest, update
from peftjax.weights import NODES, data_fields, is_node, map_nodes, split, static_fields


@node
class Scaled(Weight):
    """A weight method as a user writes one: `materialize` alone."""

    base: Any
    s: Any
    trains = ("s",)

    def materialize(self):
        return materialize(self.base) * self.s[..., None, :]


@node
class Wavy(Weight):
    """A weight whose gradient needs an intermediate of full size."""

    base: Any
    s: Any
    trains = ("s",)

    def materialize(self):
        return jnp.sin(self.base) * self.s[..., None, :]


@node
class Multiply:
    """A hook that can be folded: it scales a linear layer's output, hence kernel and bias."""

    s: Any
    trains = ("s",)

    def __call__(self, y, *, x, context):
        return y * self.s

    def fold(self, siblings):
        return siblings | {
            "kernel": materialize(siblings["kernel"]) * self.s[None, :],
            "bias": materialize(siblings["bias"]) * self.s,
        }


@node
class Opaque:
    """A hook that no weight can hold."""

    s: Any
    trains = ("s",)

    def __call__(self, y, *, x, context):
        return jnp.tanh(y) * self.s


def equal(a, b) -> bool:
    """Same structure, same values, bit for bit."""
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def around(w, **settings) -> LoRA:
    """LoRA of rank 1 over a (2, 3) weight."""
    return LoRA(w, jnp.ones((2, 1)), jnp.ones((1, 3)), **settings)


def model(layers=2, width=4):
    """Parameters of `layers` blocks and a head, all values distinct, and their sites."""
    sites = []
    params: dict[str, Any] = {"head": {"kernel": jnp.ones((width, 2)), "bias": jnp.full(2, 0.5)}}
    for i in range(layers):
        at = f"h_{i}"
        square = jnp.arange(width**2, dtype=jnp.float32).reshape(width, width)
        params[at] = {k: {"kernel": square + 10 * i, "bias": jnp.full(width, i + 1.0)} for k in ("query", "value")}
        sites += [Site(f"{at}/{k}/kernel", k, i, width) for k in ("query", "value")]
    return params, (*sites, Site("head/kernel", "head", width=2))


# Paths


def test_flatten_names_the_fields_of_nodes():
    params = {"a": {"w": LoRA(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)))}, "b": jnp.ones(1)}
    assert list(flatten(params)) == ["a/w/base", "a/w/a", "a/w/b", "b"]
    assert list(flatten(params, is_leaf=is_node)) == ["a/w", "b"]
    assert flatten(map_with_path(lambda p, x: p, params)) == {p: p for p in flatten(params)}


def test_count_and_bytes_of_concrete_and_abstract():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((), jnp.bfloat16), "c": jnp.ones((5, 0))}
    abstract = jax.eval_shape(lambda: params)
    assert count(params) == count(abstract) == 7
    assert nbytes(params) == nbytes(abstract) == 26


def test_get_update_nearest():
    params = {"a": {"b": jnp.ones(1), "c": Trained(jnp.ones(1))}}
    assert get(params, "a/b") is params["a"]["b"]
    assert get(params, "a/c") is params["a"]["c"]
    with pytest.raises(ValueError, match=r"no parameter at 'a/bb'; the nearest paths are \['a/b'"):
        get(params, "a/bb")
    with pytest.raises(ValueError, match="no parameter at 'a/b/x'"):
        get(params, "a/b/x")
    new = update(params, {"a/b": 5, "d/e/f": 6})
    assert (new["a"]["b"], new["d"]) == (5, {"e": {"f": 6}})
    assert new["a"]["c"] is params["a"]["c"]
    assert list(params) == ["a"]  # the old tree stays
    assert params["a"]["b"] is not new["a"]["b"]
    with pytest.raises(ValueError, match="cannot put 'a/b/c' into the tree: 'b' on its way is a leaf"):
        update(params, {"a/b/c": 1})
    with pytest.raises(ValueError, match="cannot put 'a/c/value' into the tree: 'c' on its way is a leaf"):
        update(params, {"a/c/value": 1})
    assert nearest("querry", ["key", "query", "value"], 1) == ["query"]
    assert nearest("x", []) == []


def test_cast_spares_integers_and_keys():
    tree = {"w": jnp.ones(2), "i": jnp.ones(2, jnp.int8), "k": jax.random.key(0), "b": jnp.ones(2, bool)}
    new = cast(tree, jnp.bfloat16)
    assert [new[k].dtype for k in ("w", "i", "b")] == [jnp.bfloat16, jnp.int8, jnp.bool]
    assert new["k"].dtype == tree["k"].dtype


# Partition and combine

names = st.text("abc", min_size=1, max_size=2)
arrays = st.integers(0, 3).map(lambda n: jnp.arange(n, dtype=jnp.float32))
nodes = st.one_of(
    arrays,
    arrays.map(Trained),
    st.tuples(arrays, arrays).map(lambda x: Scaled(*x)),
    st.tuples(arrays, arrays, arrays).map(lambda x: LoRA(Trained(x[0]), x[1], x[2])),
)
trees = st.dictionaries(names, st.recursive(nodes, lambda t: st.dictionaries(names, t, max_size=3)), min_size=1)


@settings(deadline=None, max_examples=60)
@given(trees, st.data())
def test_partition_and_combine_are_inverse(params, data):
    mask = jax.tree.map(lambda _: data.draw(st.booleans()), params)
    chosen = flatten(mask)
    if not any(chosen.values()):
        with pytest.raises(ValueError, match="selects none of the"):
            partition(params, mask)
        return
    trainable, frozen = partition(params, mask)
    assert set(flatten(trainable)) == {p for p, m in chosen.items() if m}
    assert set(flatten(frozen)) == {p for p, m in chosen.items() if not m}
    both = combine(trainable, frozen)
    assert jax.tree.structure(both) == jax.tree.structure(params)
    assert all(x is y for x, y in zip(jax.tree.leaves(both), jax.tree.leaves(params), strict=True))
    assert equal(combine(frozen, trainable), params)  # the order of the halves does not matter


def test_only_the_trainable_half_is_differentiated():
    params = {"a": {"w": jnp.ones(2), "i": jnp.ones(2, jnp.int32)}, "b": jnp.ones(3)}
    trainable, frozen = partition(params, masks.by_path("b")(params))
    grads = jax.grad(lambda t: jnp.sin(combine(t, frozen)["b"]).sum())(trainable)
    assert list(flatten(grads)) == ["b"]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": {"w": True}}, r"differ in structure at \['a/i'\]"),
        ({"a": {"w": True, "i": False, "x": True}}, r"differ in structure at \['a/x'\]"),
        ({"a": {"w": 1, "i": False}}, "the mask at 'a/w' is 1; expected True or False"),
        ({"a": {"w": True, "i": np.array([True])}}, r"the mask at 'a/i' is array\(\[ True\]\)"),
        ({"a": {"w": False, "i": False}}, "selects none of the 2 leaves"),
        ({"a": {"w": True, "i": True}}, "selects 'a/i' of dtype int32; only floating arrays can train"),
    ],
)
def test_partition_errors(mask, message):
    with pytest.raises(ValueError, match=message):
        partition({"a": {"w": jnp.ones(2), "i": jnp.ones(2, jnp.int32)}}, mask)


def test_partition_tells_a_node_from_its_mask():
    old, new = {"w": jnp.ones(2)}, {"w": Trained(jnp.ones(2))}
    with pytest.raises(ValueError, match=r"differ in structure at \['w', 'w/value'\]"):
        partition(new, masks.everything(old))
    one, two = (Prefix(jnp.ones(1), jnp.ones(1), trains=t) for t in (("key",), ()))
    with pytest.raises(ValueError, match="differ in structure at a node"):  # only a static field differs
        partition(*(f({"p": p}) for f, p in zip((lambda x: x, masks.everything), (one, two), strict=True)))


def test_combine_errors():
    trainable, frozen = {"a": {"w": jnp.ones(2), "b": None}}, {"a": {"w": None, "b": jnp.ones(1)}}
    with pytest.raises(ValueError, match="both halves have a leaf at 'a/w'"):
        combine(trainable, {"a": {"w": jnp.ones(2), "b": jnp.ones(1)}})
    for wrong, path in [({"a": {"w": None}}, "a/b"), ({"a": None}, "a/w"), (frozen | {"c": None}, "c")]:
        with pytest.raises(ValueError, match=rf"differ in structure at .*'{path}'"):
            combine(trainable, wrong)
        with pytest.raises(ValueError, match=rf"differ in structure at .*'{path}'"):
            combine(wrong, trainable)


# Masks


def test_by_path_matches_the_whole_path():
    params = {"a": {"kernel": 1, "bias": 2}, "b": {"bias_2": 3}}
    assert flatten(masks.by_path(".*/bias")(params)) == {"a/bias": True, "a/kernel": False, "b/bias_2": False}
    assert flatten(masks.by_path("a/kernel", "b/.*")(params)) == {
        "a/bias": False,
        "a/kernel": True,
        "b/bias_2": True,
    }
    for partial in ("bias", "a", "a/bia", ".*/bias_"):
        with pytest.raises(ValueError, match="matches no whole path of the parameters; the nearest are"):
            masks.by_path(partial)(params)
    with pytest.raises(ValueError, match=r"'a/kernels' matches no whole path.*\['a/kernel'"):
        masks.by_path(".*/bias", "a/kernels")(params)  # one good pattern does not excuse another
    with pytest.raises(ValueError, match=r"'\(' is no valid regular expression"):
        masks.by_path("(")(params)
    with pytest.raises(ValueError, match="at least one pattern"):
        masks.by_path()


def test_by_node_finds_nested_nodes():
    inner = Scaled(jnp.ones((2, 3)), jnp.ones(3))
    params = {
        "a": LoRA(inner, jnp.ones((2, 1)), jnp.ones((1, 3))),
        "b": Trained(LoRA(jnp.ones((2, 3)), jnp.ones((2, 1)), jnp.ones((1, 3)))),
        "c": Prefix(jnp.ones(1), jnp.ones(1), trains=()),
        "d": jnp.ones(1),
    }

    def chosen(mask):
        return {p for p, m in flatten(mask(params)).items() if m}

    assert chosen(masks.by_node(LoRA)) == {"a/a", "a/b", "b/value/a", "b/value/b"}
    assert chosen(masks.by_node(LoRA, "a")) == {"a/a", "b/value/a"}
    assert chosen(masks.by_node(LoRA, "base")) == {"a/base/base", "a/base/s", "b/value/base"}
    assert chosen(masks.by_node(Scaled)) == {"a/base/s"}
    assert chosen(masks.by_node(Trained)) == {"b/value/base", "b/value/a", "b/value/b"}
    assert chosen(masks.by_node(Prefix, "key")) == {"c/key"}
    assert jax.tree.structure(masks.by_node(LoRA)(params)) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="hold no Prefix with a field that trains"):
        masks.by_node(Prefix)(params)  # this one trains nothing
    with pytest.raises(ValueError, match="hold no Multiply"):
        masks.by_node(Multiply)(params)
    with pytest.raises(ValueError, match=r"LoRA has no field \['c'\]; its fields are \['base', 'a', 'b', 'key'\]"):
        masks.by_node(LoRA, "a", "c")
    with pytest.raises(ValueError, match=r"LoRA has no field \['scale'\]"):
        masks.by_node(LoRA, "scale")  # static: no leaf


def test_masks_compose():
    params = {"a": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "i": jnp.ones(1, jnp.int32)}
    a, bias = masks.by_path("a/.*"), masks.by_path(".*/bias")

    def chosen(mask):
        return {p for p, m in flatten(mask(params)).items() if m}

    assert chosen(masks.everything) == {"a/kernel", "a/bias"}
    assert chosen(masks.any_of(bias, masks.by_path("i"))) == {"a/bias", "i"}
    assert chosen(masks.all_of(a, bias)) == {"a/bias"}
    assert chosen(masks.all_of(a, masks.invert(bias))) == {"a/kernel"}
    with pytest.raises(ValueError, match="all_of selects none of the 3 leaves"):
        masks.all_of(bias, masks.by_path("i"))(params)
    with pytest.raises(ValueError, match="invert selects none of the 3 leaves"):
        masks.invert(masks.by_path(".*"))(params)
    for empty in (masks.any_of, masks.all_of):
        with pytest.raises(ValueError, match="at least one mask"):
            empty()


# Nodes


def test_nodes_are_registered_frozen_pytrees():
    w: Any = Scaled(jnp.ones((2, 3)), jnp.ones(3))
    assert NODES["Scaled"] is Scaled
    assert {"LoRA", "Prefix", "PrefixMLP", "Shift", "Trained"} <= set(NODES)
    assert is_node(w)
    assert not any(is_node(x) for x in (jnp.ones(1), {}, None, Scaled, "Scaled"))
    assert (w.shape, w.dtype, w.ndim) == ((2, 3), jnp.float32, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.s = 1
    assert data_fields(LoRA) == data_fields(around(w)) == ["base", "a", "b", "key"]
    assert static_fields(around(w, scale=2.0)) == {
        "scale": 2.0,
        "dropout": 0.0,
        "only": None,
        "ratio": 1.0,
        "trains": ("a", "b"),
    }
    assert jax.tree.structure(around(w, scale=1.0)) != jax.tree.structure(around(w, scale=2.0))

    @node
    class Late:
        x: Any
        n: int = static(default=2)

    try:
        assert jax.tree.leaves(Late(5)) == [5]
        assert jax.jit(lambda v: v.x * v.n)(Late(5)) == 10
    finally:
        NODES.pop("Late")


def test_a_node_is_never_an_array_by_accident():
    """Without `__jax_array__` a forgotten `materialize` is loud, not slow."""
    w: Any
    for w in (Scaled(jnp.ones((2, 3)), jnp.ones(3)), Trained(jnp.ones(3))):
        assert not any(hasattr(w, name) for name in ("__jax_array__", "__array__"))
        with pytest.raises(TypeError):
            jnp.add(w, 1.0)
        with pytest.raises(TypeError):
            jnp.matmul(jnp.ones((1, 2)), w)


def test_a_weight_without_materialize_says_so():
    @node
    class Bare(Weight):
        base: Any

    try:
        with pytest.raises(TypeError, match="Bare must define materialize"):
            dot(Bare(jnp.ones((2, 2))), jnp.ones((1, 2)))
    finally:
        NODES.pop("Bare")


def test_map_nodes_reaches_inside_and_works_from_there():
    params = {"a": {"w": around(Scaled(jnp.ones((2, 3)), jnp.ones(3)))}, "b": jnp.ones(1)}
    seen = []

    def f(path, w):
        seen.append((path, type(w).__name__, type(w.base).__name__))
        return Trained(w)

    new = map_nodes(f, params)
    assert [(p, n) for p, n, _ in seen] == [("a/w/base", "Scaled"), ("a/w", "LoRA")]
    assert seen[1][2] == "Trained"  # the inner one was rewritten before the outer one was met
    assert isinstance(new["a"]["w"].value.base.value, Scaled)
    assert new["b"] is params["b"]


# Products


def scaled(key):
    k = jax.random.split(key, 4)
    w = Scaled(jax.random.normal(k[0], (6, 5)), jax.random.normal(k[1], (5,)))
    return w, jax.random.normal(k[2], (2, 3, 6)), jax.random.normal(k[3], (2, 3, 5))


@pytest.mark.parametrize("wrap", [lambda w: w, Trained, lambda w: Trained(Trained(w))])
def test_default_products_and_gradients(key, wrap):
    """A weight that defines `materialize` alone; the reference forms the dense array."""
    w, x, y = scaled(key)
    ids = jnp.array([[0, 5, 5], [1, 2, 0]])

    def through(w, x, y):
        return jnp.sin(dot(w, x)).sum() + jnp.cos(take(w, ids)).sum() + jnp.sin(attend(w, y)).sum()

    def dense(w, x, y):
        full = w.base * w.s[None, :]
        return jnp.sin(x @ full).sum() + jnp.cos(full[ids]).sum() + jnp.sin(y @ full.T).sum()

    got = jax.value_and_grad(lambda w, x, y: through(wrap(w), x, y), (0, 1, 2))(w, x, y)
    expected = jax.value_and_grad(dense, (0, 1, 2))(w, x, y)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_products_of_plain_arrays(key):
    k = jax.random.split(key, 3)
    w, x, y = (jax.random.normal(k[i], s) for i, s in enumerate([(6, 5), (2, 3, 6), (2, 3, 5)]))
    np.testing.assert_allclose(dot(w, x), np.asarray(x) @ np.asarray(w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(attend(w, y), np.asarray(y) @ np.asarray(w).T, rtol=1e-5, atol=1e-5)
    assert np.array_equal(take(w, jnp.array([5, 0])), np.asarray(w)[[5, 0]])
    assert np.array_equal(take(w, jnp.array([99])), np.asarray(w)[[5]])  # clamped
    assert materialize(w) is w


@pytest.mark.parametrize("wrap", [lambda w: w, Trained])
def test_products_keep_the_dtype_of_the_activations(key, wrap):
    w, x, y = scaled(key)
    w, x, y = wrap(w), x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    assert dot(w, x).dtype == attend(w, y).dtype == jnp.bfloat16
    assert dot(jnp.ones((6, 5)), x).dtype == attend(jnp.ones((6, 5)), y).dtype == jnp.bfloat16


def test_default_products_under_scan(key):
    w, _, _ = scaled(key)
    stacked = Scaled(jnp.stack([w.base[:5], 2 * w.base[:5]]), jnp.stack([w.s, -w.s]))
    x = jax.random.normal(key, (3, 5))

    def scanned(w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(dot(w, x)), None), x, w)[0].sum()

    def loop(w):
        y = x
        for i in range(2):
            y = jnp.tanh(y @ (w.base[i] * w.s[i][None, :]))
        return y.sum()

    got, expected = (jax.value_and_grad(f)(stacked) for f in (scanned, loop))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def stored(f, *args) -> set[tuple[int, ...]]:
    """Shapes of what the backward pass of `f` stores and did not get as an argument."""
    _, back = jax.vjp(f, *args)
    given = {id(x) for x in jax.tree.leaves(args)}
    return {x.shape for x in jax.tree.leaves(back) if id(x) not in given}


@pytest.mark.parametrize("product", ["dot", "take", "attend"])
def test_the_backward_pass_stores_no_dense_array(product):
    w, ids = Wavy(jnp.ones((64, 32)), jnp.ones(32)), jnp.array([1, 2])
    x = {"dot": jnp.ones((2, 64)), "take": jnp.ones((2, 32)), "attend": jnp.ones((2, 32))}[product]

    def through(w, x):
        return jnp.sin({"dot": dot, "attend": attend, "take": lambda w, x: take(w, ids) * x}[product](w, x))

    def careless(w, x):
        full = w.materialize()
        return jnp.sin(
            {"dot": lambda: x @ full, "attend": lambda: x @ full.T, "take": lambda: full[ids] * x}[product]()
        )

    assert (64, 32) not in stored(through, w, x)
    assert {(64, 32), (32, 64)} & stored(careless, w, x)  # so the measure sees it where it is stored


def test_the_scan_stores_no_stack_of_dense_arrays():
    w, x = Scaled(jnp.ones((3, 32, 32)), jnp.ones((3, 32))), jnp.ones((2, 32))

    def run(product):
        return lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(product(w, x)), None), x, w)[0]

    assert (3, 32, 32) not in stored(run(dot), w, x)
    assert (3, 32, 32) in stored(run(lambda w, x: x @ w.materialize()), w, x)


# Merge


def test_merge_gives_plain_arrays_in_the_original_structure(key):
    params, _ = model()
    w = params["h_0"]["query"]["kernel"]
    a, b = jax.random.normal(key, (4, 2)), jnp.ones((2, 4))
    new = update(
        params,
        {
            "h_0/query/kernel": LoRA(Scaled(w, jnp.arange(4.0)), a, b, scale=3.0),
            "h_0/query/bias": Trained(params["h_0"]["query"]["bias"]),
        },
    )
    merged = merge(new)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert not any(is_node(x) for x in jax.tree.leaves(merged, is_leaf=is_node))
    np.testing.assert_allclose(merged["h_0"]["query"]["kernel"], w * jnp.arange(4.0)[None] + 3 * a @ b, rtol=1e-6)
    untouched = update(merged, {"h_0/query/kernel": w})
    assert equal(untouched, params)
    assert equal(merge(params), params)


def test_merge_folds_hooks_into_kernel_and_bias(key):
    params, _ = model()
    s, x = jnp.array([2.0, -1.0, 0.5, 3.0]), jax.random.normal(key, (3, 4))
    layer = params["h_1"]["query"]
    lora_kernel = LoRA(layer["kernel"], jnp.ones((4, 1)), jnp.ones((1, 4)), scale=2.0)
    hooked = update(
        params,
        {"h_1/query/output": Multiply(s), "h_1/query/kernel": lora_kernel, "h_1/query/bias": Trained(layer["bias"])},
    )
    y = Multiply(s)(dot(lora_kernel, x) + layer["bias"][None], x=x, context=None)
    merged = merge(hooked)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    kernel, bias = merged["h_1"]["query"]["kernel"], merged["h_1"]["query"]["bias"]
    np.testing.assert_allclose(x @ kernel + bias[None], y, rtol=1e-5)
    assert np.any(layer["bias"])  # a fold that forgets the bias must fail above
    assert equal(
        update(merged, {"h_1/query/kernel": 0, "h_1/query/bias": 0}),
        update(params, {"h_1/query/kernel": 0, "h_1/query/bias": 0}),
    )


def test_merge_errors_name_the_path():
    params, _ = model()
    with pytest.raises(ValueError, match="cannot merge h_0/value/output: Opaque computes what no weight"):
        merge(update(params, {"h_0/value/output": Opaque(jnp.ones(4))}))
    with pytest.raises(ValueError, match="cannot merge h_0/prefix: Prefix computes"):
        merge(update(params, {"h_0/prefix": Prefix(jnp.ones(1), jnp.ones(1))}))
    table = LoRA(jnp.ones((5, 4)), jnp.ones((5, 1)), jnp.ones((1, 4)), only="take")
    with pytest.raises(ValueError, match=r"cannot merge embed/embedding: .*tied_embedding='both'"):
        merge({"embed": {"embedding": table}})
    with pytest.raises(ValueError, match="cannot merge embed/embedding"):
        merge({"embed": {"embedding": Scaled(table, jnp.ones(4))}})  # nested


# Layout


def test_stack_and_unstack_are_inverse():
    params, _ = model(layers=3)
    params = update(
        params,
        {
            **{
                f"h_{i}/query/kernel": LoRA(
                    params[f"h_{i}"]["query"]["kernel"],
                    jnp.full((4, 1), i + 1.0),
                    jnp.ones((1, 4)),
                    jax.random.key(i),
                    2.0,
                    0.5,
                )
                for i in range(3)
            },
            **{f"h_{i}/e_{j}/w": jnp.full(2, 10.0 * i + j) for i in range(3) for j in range(2)},
            "ln_f": jnp.ones(4),
        },
    )
    stacked = stack_layers(params)
    assert set(stacked) == {"h_*", "head", "ln_f"}
    w: Any = stacked["h_*"]["query"]["kernel"]
    assert w.__class__ is LoRA
    assert (w.shape, w.a.shape, w.scale, w.dropout) == ((3, 4, 4), (3, 4, 1), 2.0, 0.5)
    assert w.a[:, 0, 0].tolist() == [1, 2, 3]  # in order
    assert np.array_equal(jax.random.key_data(w.key[2]), jax.random.key_data(jax.random.key(2)))
    assert stacked["h_*"]["e_*"]["w"][2, 1].tolist() == [21, 21]  # a stack inside a stack
    assert layer_count(stacked["h_*"]) == 3

    def data(tree):
        return map_with_path(lambda p, x: jax.random.key_data(x) if p.endswith("/key") else x, tree)

    assert equal(data(unstack_layers(stacked)), data(params))
    assert unstack_layers(params).keys() == params.keys()
    assert equal(data(stack_layers(stacked)), data(stacked))


def test_stack_and_unstack_masks_and_halves():
    params, _ = model(layers=3)
    params = update(
        params, {f"h_{i}/query/kernel": Scaled(params[f"h_{i}"]["query"]["kernel"], jnp.ones(4)) for i in range(3)}
    )
    stacked = stack_layers(params)
    for mask in (masks.by_node(Scaled), masks.by_path(".*bias")):
        m = mask(params)
        assert jax.tree.structure(stack_layers(m)) == jax.tree.structure(stacked)
        assert equal(stack_layers(m), mask(stacked))
        assert equal(unstack_layers(stack_layers(m), like=stacked), m)
        for half, half_stacked in zip(partition(params, m), partition(stacked, mask(stacked)), strict=True):
            assert equal(stack_layers(half), half_stacked)
            assert equal(unstack_layers(half_stacked, like=stacked), half)
    only_head, _ = partition(stacked, masks.by_path("head/.*")(stacked))  # no array below h_*
    with pytest.raises(ValueError, match="does not say how many layers it has; give `like`"):
        unstack_layers(only_head)
    assert stack_layers({"h_0": {"w": np.True_}, "h_1": {"w": np.True_}}) == {"h_*": {"w": True}}


def test_stack_takes_complete_runs_only():
    def w(*names):
        return {name: {"w": jnp.ones(1)} for name in names}

    for tree in (w("h_5"), w("h_0", "h_2"), w("h_1", "h_2"), w("h_0", "h_5"), w("h_00", "h_01"), {"h_0": jnp.ones(1)}):
        assert equal(stack_layers(tree), tree)
    assert set(stack_layers(w("h_0"))) == {"h_*"}
    many = stack_layers({f"h_{i}": {"w": jnp.full(1, i)} for i in range(12)})
    assert many["h_*"]["w"][:, 0].tolist() == list(range(12))  # 10 after 9, not after 1


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"w": jnp.ones(3), "q": {"w": jnp.ones(1)}}, r"h_1/w is of shape \(3,\) and h_0/w is of shape \(2,\)"),
        ({"w": jnp.ones(2)}, r"h_1 differs from h_0 in \['q/w'\]"),
        ({"w": Trained(jnp.ones(2)), "q": {"w": jnp.ones(1)}}, r"h_1 differs from h_0 in \['w', 'w/value'\]"),
    ],
)
def test_uneven_layers(second, message):
    with pytest.raises(ValueError, match=f"cannot stack layers: {message}; use the per-layer layout"):
        stack_layers({"h_0": {"w": jnp.ones(2), "q": {"w": jnp.ones(1)}}, "h_1": second})


def test_uneven_settings_masks_and_ranks():
    def kernel(r, scale):
        return {"q": {"kernel": LoRA(jnp.ones((4, 4)), jnp.ones((4, r)), jnp.ones((r, 4)), scale=scale)}}

    with pytest.raises(ValueError, match=r"h_1 differs from h_0 in \['q/kernel'\]"):
        stack_layers({"h_0": kernel(1, 1.0), "h_1": kernel(1, 2.0)})
    with pytest.raises(ValueError, match=r"h_1/q/kernel/a is of shape \(4, 2\) and h_0/q/kernel/a"):
        stack_layers({"h_0": kernel(1, 1.0), "h_1": kernel(2, 1.0)})
    with pytest.raises(ValueError, match="h_2/w is False and h_0/w is True"):
        stack_layers({f"h_{i}": {"w": i < 2} for i in range(3)})
    with pytest.raises(ValueError, match=r"one first axis for all leaves; found sizes \[\(2,\), \(3,\)\]"):
        unstack_layers({"h_*": {"a": jnp.ones((2, 1)), "b": jnp.ones((3, 1))}})


def test_layer_paths_and_keys(key):
    assert layer_paths("m/h_*/w", 2) == ["m/h_0/w", "m/h_1/w"]
    keys = leaf_key(key, "m/h_*/w", 2)
    for i in range(2):
        assert np.array_equal(jax.random.key_data(keys[i]), jax.random.key_data(path_key(key, f"m/h_{i}/w")))
    assert not np.array_equal(*jax.random.key_data(keys))
    assert np.array_equal(jax.random.key_data(leaf_key(key, "w", None)), jax.random.key_data(path_key(key, "w")))


# Chain


def scale_method(*targets):
    return weight_method("scale", {}, targets, Scaled, lambda key, w, site: Scaled(w, jnp.ones(w.shape[-1])))


def trained(method, params) -> set[str]:
    return set(flatten(partition(params, method.trainable(params))[0]))


def test_chain_of_different_leaves_is_both(key):
    """Law 10, with either order giving the same paths."""
    params, sites = model()
    first, second = lora(2, targets=["query"]), bitfit(["value"])
    both = chain(first, second)
    new = both.init(key, params, sites)
    keys = [jax.random.fold_in(key, i) for i in range(2)]
    assert equal(new, second.init(keys[1], first.init(keys[0], params, sites), sites))
    assert equal(new, first.init(keys[0], second.init(keys[1], params, sites), sites))
    alone = [m.init(key, params, sites) for m in (first, second)]
    assert trained(both, new) == trained(first, alone[0]) | trained(second, alone[1])
    assert set(flatten(new)) == set(flatten(chain(second, first).init(key, params, sites)))
    assert both.spec == (*first.spec, *second.spec)
    assert chain(chain(first, second), head()).spec == chain(first, second, head()).spec
    assert equal(both.saved(new), both.trainable(new))


def test_chain_passes_keys_resolves_and_penalties():
    seen = []

    def recorder(name, amount):
        def resolve(params, key):
            seen.append((name, None if key is None else int(jax.random.key_data(key)[-1])))
            return params | {name: amount}

        return method(
            name,
            {},
            lambda key, params, sites: params,
            masks.everything,
            resolve=resolve,
            penalty=lambda params: amount * params["w"].sum(),
            optimizer=lambda tx: f"{name}({tx})",
        )

    both = chain(recorder("one", 2.0), recorder("two", 3.0))
    assert both.resolve({"w": 1}, jax.random.key(0)) == {"w": 1, "one": 2.0, "two": 3.0}
    assert [name for name, _ in seen] == ["one", "two"]
    assert seen[0][1] != seen[1][1]  # a key each
    both.resolve({}, None)
    assert [key for _, key in seen[2:]] == [None, None]
    assert both.penalty({"w": jnp.ones(2)}) == 10.0
    assert both.optimizer("adam") == "two(one(adam))"


def test_chain_nests_on_the_same_leaf(key):
    params, sites = model()
    path = "h_0/query/kernel"
    for inner, outer, expected in [
        (lora(2, targets=["query"]), lora(3, targets=["query"]), {"base/a", "base/b", "a", "b"}),
        (scale_method("query"), lora(3, targets=["query"]), {"base/s", "a", "b"}),
        (lora(3, targets=["query"]), scale_method("query"), {"base/a", "base/b", "s"}),
    ]:
        both = chain(inner, outer)
        new = both.init(key, params, sites)
        assert {p for p in trained(both, new) if p.startswith(path)} == {f"{path}/{f}" for f in expected}
        base = new["h_0"]["query"]["kernel"].base.base
        assert base is params["h_0"]["query"]["kernel"]
    both = chain(head(), lora(2, targets=["head"]))
    new = both.init(key, params, sites)
    assert trained(both, new) == {f"head/{p}" for p in ("bias/value", "kernel/a", "kernel/b", "kernel/base/value")}
    three = chain(scale_method("query"), lora(2, targets=["query"]), lora(3, targets=["query"]))
    assert {f"{path}/{f}" for f in ("base/base/s", "base/a", "a")} <= trained(three, three.init(key, params, sites))
    wrapped = chain(
        scale_method("head"),
        method(
            "mark",
            {},
            lambda k, p, s: update(p, {"head/kernel": Trained(get(p, "head/kernel"))}),
            masks.by_node(Trained),
        ),
    )
    assert "head/kernel/value/s" in trained(wrapped, wrapped.init(key, params, sites))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (head(), head(), "head: head/bias is already a Trained"),
        (bitfit(), bitfit(), "bitfit: h_0/query/bias is already a Trained"),
        (bitfit(["head"]), head(), "head: head/bias is already a Trained"),
        (lora(2, targets=["head"]), head(), "head: head/kernel is already a LoRA"),
    ],
)
def test_chain_refuses_to_mark_twice(key, first, second, message):
    params, sites = model()
    with pytest.raises(ValueError, match=message):
        chain(first, second).init(key, params, sites)


def test_chain_refuses_to_overwrite(key):
    params, sites = model()

    def rewrite(name, new):
        return method(name, {}, lambda key, params, sites: new(params), masks.everything)

    replace = rewrite("replace", lambda p: update(p, {"h_0/query/kernel": Scaled(jnp.ones((4, 4)), jnp.ones(4))}))
    remove = rewrite("remove", lambda p: {k: v for k, v in p.items() if k != "h_0"})
    for second in (replace, remove):
        with pytest.raises(ValueError, match=f"{second.spec[0][0]} overwrites h_0/query/kernel, which lora already"):
            chain(lora(2, targets=["query"]), second).init(key, params, sites)
        with pytest.raises(ValueError, match="overwrites h_0/query/kernel, which lora already"):
            chain(lora(2, targets=["query"]), full(), second).init(key, params, sites)
    chain(bitfit(["value"]), replace).init(key, params, sites)  # what nobody rewrote may change
    attention = (Site("h_0", "attention", 0, 4, (2, 2, 2)), Site("h_1", "positions"))
    with pytest.raises(ValueError, match=r"prefix overwrites h_.*, which prefix already rewrote"):
        chain(prefix(2), prefix(3)).init(key, params, attention)


def test_chain_needs_a_method():
    with pytest.raises(ValueError, match="chain needs at least one method"):
        chain()


# Targets


def test_select():
    params, sites = model()

    def paths(targets, **rest):
        return [s.path for s in select(params, sites, targets, **rest)]

    query, value = ([f"h_{i}/{k}/kernel" for i in range(2)] for k in ("query", "value"))
    assert paths(["query"]) == query
    assert paths(["value", "query"]) == value + query
    assert set(paths(["linear"])) == {*query, *value}
    assert paths(["head"]) == ["head/kernel"]
    assert paths([r"h_1/.*/kernel"]) == ["h_1/query/kernel", "h_1/value/kernel"]
    assert paths(["query", "h_0/query/kernel"]) == query  # once each
    assert paths(iter(["query"])) == query
    assert select(params, sites, ["h_0/query/kernel"])[0] is sites[0]
    assert select(params, sites, ["h_0/query/bias"]) == [Site("h_0/query/bias", "weight")]
    assert paths(["query"], kinds=["query"]) == query
    for bad, message in [
        (["querry"], r"'querry' is no kind of site of this model \(it has \['head', 'query', 'value'\]\)"),
        (["query", "key"], "'key' is no kind of site"),
        (["h_0/quer/kernel"], r"the nearest paths are \['h_0/query/kernel'"),
        (["h_0/query"], "matches no whole path"),
        ([], "targets is empty"),
        (["["], "no valid regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            select(params, sites, bad)
    with pytest.raises(ValueError, match=r"must be a list of kinds or patterns, such as \['query'\]"):
        select(params, sites, "query")
    with pytest.raises(ValueError, match=r"it has \['query'\]"):
        select(params, sites, ["value"], kinds=["query"])
    with pytest.raises(ValueError, match=r"'linear' is no kind of site"):
        select(params, [], ["linear"])
    with pytest.raises(ValueError, match=r"h_\*/query/.* is stacked; use unstack_layers first"):
        select(stack_layers(params), sites, ["query"])


def test_select_takes_a_rewritten_weight_as_one(key):
    params, sites = model()
    new = lora(2, targets=["query"]).init(key, params, sites)
    assert [s.path for s in select(new, sites, ["h_0/.*/kernel"])] == ["h_0/query/kernel", "h_0/value/kernel"]
    with pytest.raises(ValueError, match="matches no whole path"):
        select(new, sites, ["h_0/query/kernel/a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1; got 0"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"rank_pattern": {"query": 0}}, "rank must be a whole number"),
        (
            {"rank": 5},
            r"rank 5 is larger than the matrix h_0/query/kernel of shape \(4, 4\); write a rank of at most 4",
        ),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
        ({"tied_embedding": "head"}, "must be 'both' or 'take'"),
        (
            {"rank_pattern": {"key": 2}},
            r"the pattern 'key' fits none of the targets; they are of kinds \['query', 'value'\]",
        ),
        ({"alpha_pattern": {"h_0/.*/bias": 2}}, "the pattern 'h_0/.*/bias' fits none of the targets"),
        ({"alpha_pattern": {"(": 2}}, "no valid regular expression"),
        ({"targets": "query"}, "must be a list"),
        ({"targets": ["h_0/query/bias"]}, r"h_0/query/bias has shape \(4,\); expected a matrix"),
        ({"targets": ["attention"]}, r"h_0/query \(kind 'attention'\) is no weight; target weights such as"),
    ],
)
def test_lora_errors(key, arguments, message):
    params, sites = model()
    sites = (*sites, Site("h_0/query", "attention"))
    with pytest.raises(ValueError, match=message):
        lora(**{"rank": 2} | arguments).init(key, params, sites)


def test_other_method_errors(key):
    params, sites = model()
    bare = {"q": {"kernel": jnp.ones((4, 4))}, "e": {"embedding": jnp.ones((4, 4))}}
    bare_sites = (Site("q/kernel", "query"), Site("e/embedding", "embedding"))
    for m, p, s, message in [
        (head(), bare, bare_sites, r"no task head \(its kinds of site are \['embedding', 'query'\]\)"),
        (bitfit(), bare, bare_sites, r"no bias at the targets; write bitfit\(create=True\)"),
        (bitfit(["embedding"], create=True), bare, bare_sites, "e/embedding, which has no bias; leave the target out"),
        (bitfit("query"), params, sites, "must be a list"),
        (prefix(2), params, sites, "the sites must name the attention modules"),
        (
            lora(2, targets=["h_0/query/output"]),
            update(params, {"h_0/query/output": Multiply(jnp.ones(4))}),
            sites,
            "h_0/query/output .* is no weight",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            m.init(key, p, s)
    wrong: list[dict[str, Any]] = [{"length": 0}, {"length": 1.5}, {"hidden": 0}]
    for arguments in wrong:
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            prefix(**arguments)
    created = bitfit(create=True).init(key, bare, bare_sites)
    assert flatten(created, is_leaf=is_node).keys() == {"q/kernel", "q/bias", "e/embedding"}
    assert not np.any(created["q"]["bias"].value)
    with pytest.raises(ValueError, match="h_0/query/bias is already a Trained; apply x first"):
        mark("x", bitfit().init(key, params, sites), ["h_0/query/bias"])


# Names


def test_parse():
    methods = parse("head, lora(rank=4, targets=['query']) + bitfit , full,prefix(length=3, mlp=True)")
    assert list(methods) == ["head", "lora(rank=4, targets=['query'])+bitfit", "full", "prefix(length=3, mlp=True)"]
    assert [[name for name, _ in m.spec] for m in methods.values()] == [
        ["head"],
        ["lora", "bitfit"],
        ["full"],
        ["prefix"],
    ]
    assert methods["lora(rank=4, targets=['query'])+bitfit"].spec[0][1]["rank"] == 4
    assert [n for n, _ in parse("head+lora+bitfit")["head+lora+bitfit"].spec] == ["head", "lora", "bitfit"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read the methods ''"),
        ("lora(", "cannot read the methods"),
        ("lora] + [head", "cannot read the methods"),
        ("lora lora", "cannot read the methods"),
        ("lora(4)", r"cannot read 'lora\(4\)'; write a name"),
        ("lora(**{'rank': 4})", "cannot read .lora"),
        ("lora - head", "cannot read 'lora - head'"),
        ("'lora'", "cannot read"),
        ("lora(rank=open('x'))", "cannot read the argument rank=open"),
        ("lorra", f"there is no method 'lorra'; the methods are {', '.join(METHODS)}"),
        ("lora(ranks=4)", r"lora: .*'ranks'.*; its arguments are \['rank', 'alpha'"),
        ("lora(rank=0)", "rank must be a whole number"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_argument_is_answered_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"{name}: .*its arguments are"):
        build(name, {"no_such": 1})


# Parts of a fused weight


FUSED = {"query": slice(0, 4), "key": slice(4, 6), "value": slice(6, 10)}


def fused(key):
    """One fused weight of 5 inputs and 10 outputs, with its bias, and its site."""
    params = {"c_attn": {"kernel": jax.random.normal(key, (5, 10)), "bias": jnp.arange(10.0)}}
    return params, (Site("c_attn/kernel", "fused_qkv", 0, 10, parts=FUSED),)


def test_blocks_are_the_weight(key):
    params, _ = fused(key)
    w = params["c_attn"]["kernel"]
    blocks, x, y = split(w, FUSED), jax.random.normal(key, (3, 5)), jax.random.normal(key, (3, 10))
    assert blocks.shape == w.shape
    assert np.array_equal(materialize(blocks), w)
    np.testing.assert_allclose(dot(blocks, x), x @ w, atol=1e-6)
    np.testing.assert_allclose(take(blocks, jnp.array([4, 0])), w[jnp.array([4, 0])])
    np.testing.assert_allclose(attend(blocks, y), y @ w.T, atol=1e-5)
    stacked = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), blocks)
    assert np.array_equal(stacked.materialize(), jnp.stack([w, 2 * w]))
    for parts in ({"query": slice(0, 4)}, {"a": slice(0, 6), "b": slice(4, 10)}, {"a": slice(4, 10), "b": slice(0, 4)}):
        with pytest.raises(ValueError, match="do not lay out the 10 columns"):
            split(w, parts)


def test_a_part_is_a_target_of_any_weight_method(key):
    params, sites = fused(key)

    def new(key, w, site):
        assert (site.kind, site.width) == (site.part, w.shape[1])
        return Scaled(w, jnp.full(w.shape[1], 2.0))

    m = weight_method("scaled", {}, ["value", "key"], Scaled, new)
    adapted = m.init(key, params, sites)
    merged = merge(adapted)["c_attn"]["kernel"]
    factors = np.repeat([1.0, 2.0, 2.0], [4, 2, 4])
    np.testing.assert_allclose(merged, params["c_attn"]["kernel"] * factors)
    trained = {p for p, t in flatten(m.trainable(adapted)).items() if t}
    assert trained == {"c_attn/kernel/blocks/key/s", "c_attn/kernel/blocks/value/s"}


def test_parts_get_keys_of_their_own_and_the_whole_covers_its_parts(key):
    params, sites = fused(key)
    w = lora(rank=2, targets=["query", "value"]).init(key, params, sites)["c_attn"]["kernel"]
    assert not np.allclose(w.blocks["query"].a, w.blocks["value"].a)
    both = lora(rank=2, targets=["query", "linear"]).init(key, params, sites)["c_attn"]["kernel"]
    assert type(both) is LoRA
    assert both.b.shape == (2, 10)


def test_methods_of_parts_chain_and_a_whole_comes_after_its_parts(key):
    params, sites = fused(key)
    m = chain(
        lora(rank=1, targets=["query"]), bitfit(["key"]), lora(rank=2, targets=["value"]), lora(2, targets=["linear"])
    )
    adapted = m.init(key, params, sites)["c_attn"]
    assert type(adapted["kernel"]) is LoRA
    assert {n: type(b).__name__ for n, b in adapted["kernel"].base.blocks.items()} == {
        "query": "LoRA",
        "key": "ArrayImpl",
        "value": "LoRA",
    }
    assert np.array_equal(adapted["bias"].blocks["key"].value, [4.0, 5.0])
    with pytest.raises(ValueError, match="already a LoRA as a whole, so its part 'query'"):
        chain(lora(2, targets=["linear"]), lora(1, targets=["query"])).init(key, params, sites)
    with pytest.raises(ValueError, match=r"it has \['fused_qkv', 'key', 'query', 'value'\]"):
        lora(1, targets=["qeury"]).init(key, params, sites)
    with pytest.raises(ValueError, match="bitfit: c_attn/bias is already a Trained"):
        chain(bitfit(["key"]), bitfit(["key"])).init(key, params, sites)


def test_a_created_bias_has_no_parts(key):
    params, sites = fused(key)
    bare = {"c_attn": {"kernel": params["c_attn"]["kernel"]}}
    with pytest.raises(ValueError, match="beside the part 'query' alone cannot be created"):
        bitfit(["query"], create=True).init(key, bare, sites)
    made = bitfit(["linear"], create=True).init(key, bare, sites)["c_attn"]["bias"]
    assert np.array_equal(made.value, np.zeros(10))


def test_layers_stack_though_one_alone_has_an_entry_of_a_part(key):
    """FISH Mask puts nothing where nothing was chosen; halves of a partition and masks stack alike."""
    layers = [fused(jax.random.fold_in(key, i))[0] for i in range(3)]
    params = {f"h_{i}": layer for i, layer in enumerate(layers)}
    sites = [Site(f"h_{i}/c_attn/kernel", "fused_qkv", i, 10, parts=FUSED) for i in range(3)]
    m = fishmask(count=2, targets=["query"], score="random")
    adapted = m.init(key, params, sites)
    kinds = {type(adapted[f"h_{i}"]["c_attn"]["kernel"]).__name__ for i in range(3)}
    assert kinds == {"Blocks", "ArrayImpl"}
    stacked = stack_layers(adapted)
    assert equal(unstack_layers(stacked), adapted)
    halves = partition(stacked, m.trainable(stacked))
    assert equal(combine(*halves), stacked)
    assert equal(combine(*(unstack_layers(h, like=stacked) for h in halves)), adapted)
    assert np.array_equal(merge(stacked)["h_*"]["c_attn"]["kernel"], jnp.stack([x["c_attn"]["kernel"] for x in layers]))


def test_numpy_numbers_are_plain_in_a_spec():
    import json

    spec = lora(np.int64(4), alpha=np.float32(8), rank_pattern={"b": np.int64(2), "a": 1}).spec
    assert json.loads(json.dumps(spec))[0][1]["alpha"] == 8
    assert list(spec[0][1]["rank_pattern"]) == ["b", "a"]  # the first that fits counts
