"""The README's code runs, its new method obeys the laws, and its tables are generated."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers

from peftjax import METHODS, hub, merge, partition
from peftjax.checkpoint import load_adapter, save_adapter
from peftjax.methods import methods_table
from peftjax.tree import cast, flatten, map_with_path

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
EXAMPLE, NEW_METHOD = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_is_short_trains_and_merges():
    lines = [line for line in EXAMPLE.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 15
    names: dict = {}
    exec(EXAMPLE, names)
    first = names["model"].forward(names["model"].params, {"input_ids": names["ids"]}).logits[:, :-1]
    first = optax.softmax_cross_entropy_with_integer_labels(first, names["ids"][:, 1:]).mean()
    assert names["value"] < 0.7 * first
    assert flatten(names["plain"]).keys() == flatten(names["model"].params).keys()


def test_the_new_method_is_short_and_obeys_the_laws(tmp_path):
    assert len(NEW_METHOD.strip().splitlines()) <= 25
    names: dict = {}
    exec(NEW_METHOD, names)
    try:
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
        )
        model = hub.from_config(config, "causal-lm")
        method = METHODS["krona"](p=4, q=2, scale=0.5)
        params = method.init(jax.random.key(0), model.params, model.sites)
        ids = {"input_ids": jnp.arange(12).reshape(2, 6)}
        base = model.forward(model.params, ids).logits
        np.testing.assert_allclose(model.forward(params, ids).logits, base, atol=1e-5)
        trainable, _ = partition(params, method.trainable(params))
        assert set(flatten(trainable)) == {p for p in flatten(params) if p.endswith(("kernel/a", "kernel/b"))}
        loud = map_with_path(lambda p, x: x + 0.1 if p.endswith("kernel/b") else x, params)
        out = model.forward(loud, ids).logits
        assert float(jnp.abs(out - base).max()) > 1e-3
        np.testing.assert_allclose(model.forward(merge(loud), ids).logits, out, atol=1e-4)
        small = model._replace(params=cast(model.params, jnp.bfloat16), module=model.module.clone(dtype=jnp.bfloat16))
        low = method.init(jax.random.key(0), small.params, small.sites)
        assert small.forward(low, ids).hidden.dtype == jnp.bfloat16, "a float32 trainable has widened the activations"
        save_adapter(tmp_path / "a.safetensors", model, method, loud)
        np.testing.assert_array_equal(
            model.forward(load_adapter(tmp_path / "a.safetensors", model).params, ids).logits, out
        )
    finally:
        METHODS.pop("krona", None)


def test_the_diff_of_a_method_is_what_is_there():
    """Every added line stands in the file that the block names; the new file is shown whole."""
    (block,) = re.findall(r"```diff\n(.*?)```", TEXT, re.DOTALL)
    for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
        name, *added = part.splitlines()
        text = (README.parent / name.split()[0]).read_text()
        if "(new)" in name:
            assert "\n".join(line[1:] for line in added) == text.rstrip()
        assert all(line[1:] in text.splitlines() for line in added), name


def test_a_method_is_a_short_file():
    files = [f for f in (README.parent / "peftjax/methods").glob("*.py") if f.name not in ("__init__.py", "base.py")]
    lengths = sorted(len(f.read_text().splitlines()) for f in files)
    assert lengths[len(lengths) // 2] <= 120


def test_the_table_of_methods_is_the_tables():
    block = re.search(r"<!-- methods -->\n(.*?)\n<!-- /methods -->", TEXT, re.DOTALL)
    assert block is not None
    assert block[1].strip() == methods_table(), "write methods_table() between the marks"


def test_every_file_of_the_package_is_in_the_tree():
    package = README.parent / "peftjax"
    for path in package.iterdir():
        if path.name not in ("__init__.py", "__main__.py", "__pycache__"):
            assert path.name in TEXT, f"{path.name} is not in the README's tree"


def test_it_is_short():
    prose = re.sub(r"```.*?```", "", TEXT.split("## Methods")[0], flags=re.DOTALL)
    assert len(prose.split()) < 900
