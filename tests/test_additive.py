"""Adapters, IA3, prompts and P-tuning against `peft`, or against torch with the equation hooked into the model."""

import copy
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from reference import WIDTH, Link, check, fill, pair, peft, randomise, start, torch, transposed

from peftjax import chain, hub, merge, stack_layers
from peftjax.generate import Decoding, decoder
from peftjax.methods import (
    adapter,
    build,
    ia3,
    lora,
    mam,
    p_tuning,
    parallel_adapter,
    pfeiffer,
    prefix,
    prompt,
    with_text_ids,
)
from peftjax.methods.adapter import Adapter
from peftjax.models.base import hf_name
from peftjax.tree import flatten, get, map_with_path
from peftjax.weights import is_node

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
__all__ = ["pair"]  # a fixture


# Adapters: torch modules hooked into transformers' models where the papers put them


class Bottleneck(torch.nn.Module):
    """The equation of the papers, in torch."""

    def __init__(self, size, f, scale=1.0):
        super().__init__()
        self.down, self.up = torch.nn.Linear(WIDTH, size), torch.nn.Linear(size, WIDTH)
        self.f, self.scale = f, scale

    def forward(self, y, h):
        return y + self.scale * self.up(self.f(self.down(h)))


class Place(NamedTuple):
    """Where a hook goes: the module whose output is changed, and the one that receives the sub-layer's input."""

    output: str
    input: str


PLACES = {  # family -> hook here -> modules there, {i} the layer
    "bert": {
        "attention_output": Place("bert.encoder.layer.{i}.attention.output.dense", "bert.encoder.layer.{i}.attention"),
        "mlp_output": Place("bert.encoder.layer.{i}.output.dense", "bert.encoder.layer.{i}.intermediate"),
        "after_mlp": Place("bert.encoder.layer.{i}.output", "bert.encoder.layer.{i}.intermediate"),
    },
    "llama": {
        "attention_output": Place("model.layers.{i}.self_attn", "model.layers.{i}.self_attn"),
        "mlp_output": Place("model.layers.{i}.mlp", "model.layers.{i}.mlp"),
        "after_mlp": Place("model.layers.{i}.mlp", "model.layers.{i}.mlp"),
    },
    "t5": {
        "attention_output": Place("{stack}.block.{i}.layer.0.SelfAttention", "{stack}.block.{i}.layer.0.SelfAttention"),
        "mlp_output": Place(*["{stack}.block.{i}.layer.{last}.DenseReluDense"] * 2),
        "after_mlp": Place(*["{stack}.block.{i}.layer.{last}.DenseReluDense"] * 2),
    },
    "gpt2": {
        "attention_output": Place("transformer.h.{i}.attn", "transformer.h.{i}.attn"),
        "mlp_output": Place("transformer.h.{i}.mlp", "transformer.h.{i}.mlp"),
        "after_mlp": Place("transformer.h.{i}.mlp", "transformer.h.{i}.mlp"),
    },
}
GELU, RELU = torch.nn.functional.gelu, torch.relu
ADAPTERS = {  # method -> hooks, activation, scale, parallel
    "houlsby": (adapter(5), ("attention_output", "mlp_output"), GELU, 1.0, False),
    "pfeiffer": (pfeiffer(4), ("after_mlp",), RELU, 1.0, False),
    "parallel": (parallel_adapter(3), ("mlp_output",), RELU, 4.0, True),
    "parallel, both, scaled": (
        parallel_adapter(3, scale=0.5, where=["attention", "mlp"]),
        ("attention_output", "mlp_output"),
        RELU,
        0.5,
        True,
    ),
    "dropped": (adapter(5, layers=[1]), ("attention_output", "mlp_output"), GELU, 1.0, False),
}


def hooked(theirs, family: str, paths, f, scale, parallel, size):
    """The torch model with a bottleneck at each of our paths; and the bottlenecks by path."""
    theirs, made = copy.deepcopy(theirs), {}
    for path in paths:
        block, _, hook = path.rpartition("/")
        place = PLACES[family][hook]
        where = {"i": block.rpartition("_")[2], "stack": block.split("/")[1]}
        where["last"] = 2 if where["stack"] == "decoder" else 1
        made[path] = Bottleneck(size, f, scale)
        theirs.add_module(path.replace("/", "_"), made[path])
        seen = {}

        def before(module, args, kwargs, seen=seen):
            seen["x"] = args[0] if args else kwargs["hidden_states"]

        def after(module, args, output, seen=seen, made=made[path]):
            y = output[0] if isinstance(output, tuple) else output
            y = made(y, seen["x"] if parallel else y)
            return (y, *output[1:]) if isinstance(output, tuple) else y

        theirs.get_submodule(place.input.format(**where)).register_forward_pre_hook(before, with_kwargs=True)
        theirs.get_submodule(place.output.format(**where)).register_forward_hook(after)
    return theirs, made


def bottleneck_links(made) -> dict[str, Link]:
    links = {}
    for path, module in made.items():
        links[f"{path}/w1"], links[f"{path}/b1"] = transposed(module.down.weight), Link(module.down.bias)
        links[f"{path}/w2"], links[f"{path}/b2"] = transposed(module.up.weight), Link(module.up.bias)
    return links


@pytest.mark.parametrize(
    ("base", "name"),
    [
        *((base, name) for base in ("bert", "llama", "gpt2", "t5") for name in ("houlsby", "pfeiffer", "parallel")),
        *(("bert", name) for name in ("parallel, both, scaled", "dropped")),
    ],
)
def test_adapters_stand_where_the_papers_put_them(pair, base, name):
    method, hooks, f, scale, parallel = ADAPTERS[name]
    params = start(pair(base), method)
    nodes = {p: n for p, n in flatten(params, is_leaf=is_node).items() if isinstance(n, Adapter)}
    assert {p.rpartition("/")[2] for p in nodes} == set(hooks)
    size = next(iter(nodes.values())).b1.shape[0]
    theirs, made = hooked(pair(base).theirs, base, nodes, f, scale, parallel, size)
    links = bottleneck_links(made)
    randomise(theirs, links)
    check(pair(base), theirs.eval(), method, fill(params, links), links)


def test_adapters_start_as_the_papers_say(pair):
    base = pair("bert")
    for node in jax.tree.leaves(start(base, adapter(64, std=0.01)), is_leaf=is_node):
        if isinstance(node, Adapter):
            for w in (node.w1, node.w2):
                assert 0.005 < float(w.std()) < 0.01, "a normal distribution cut at two standard deviations"
                assert float(jnp.abs(w).max()) <= 0.02
            assert not node.b1.any()
            assert not node.b2.any()
    parallel = [n for n in jax.tree.leaves(start(base, parallel_adapter(8)), is_leaf=is_node) if isinstance(n, Adapter)]
    assert parallel
    assert all(not n.w2.any() and n.w1.any() for n in parallel)


def test_mam_is_prefix_and_parallel_adapter(pair):
    base, method = pair("llama"), mam(3, 4)
    parts = chain(prefix(3), parallel_adapter(4, scale=4.0))
    assert shapes(start(base, method)) == shapes(start(base, parts))
    assert method.spec == (("mam", {"length": 3, "size": 4, "scale": 4.0, "mlp": False, "hidden": 512}),)
    assert build(*method.spec[0]).spec == method.spec


def shapes(params):
    return {p: x.shape for p, x in flatten(params).items()}


# IA3

IA3 = {
    "bert": ("bert", ["key", "value", "output.dense"], [r".*\d\.output\.dense"], ia3()),
    "llama": ("llama", ["k_proj", "v_proj", "down_proj"], ["down_proj"], ia3()),
    "llama, no biases": ("llama-no-bias", ["k_proj", "v_proj", "down_proj"], ["down_proj"], ia3()),
    "gpt2": ("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"], ia3(["fused_qkv", "mlp_out"])),
    "t5": ("t5", ["k", "v", "wo"], ["wo"], ia3()),
    "others": ("llama", ["q_proj", "o_proj", "up_proj"], [], ia3(["query", "attention_out", ".*/up_proj/kernel"])),
}


def with_ia3(pair, name):
    base, targets, inner, method = IA3[name]
    if base == "bert":  # 'output.dense' alone would also be attention's
        targets, inner = r".*(key|value|\d\.output\.dense)", r".*\d\.output\.dense"
    config = peft.IA3Config(target_modules=targets, feedforward_modules=inner, fan_in_fan_out=base == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(pair(base).theirs), config).eval()
    params, links = start(pair(base), method), {}
    for path in flatten(params):
        if path.endswith("/l"):
            kernel = f"{path.rpartition('/')[0].rpartition('/')[0]}/kernel"
            name = pair(base).ours.family.tensor(kernel).removesuffix(".weight")
            name = name.removeprefix("transformer.") if base == "t5" else name
            links[path] = Link(theirs.base_model.model.get_submodule(name).ia3_l["default"], lambda x: x.reshape(-1))
    assert len(links) == sum("ia3_l" in n for n, _ in theirs.named_parameters())
    randomise(theirs, links)
    return theirs, fill(params, links), links


@pytest.mark.parametrize("name", IA3)
def test_ia3(pair, name):
    base, _, _, method = IA3[name]
    theirs, params, links = with_ia3(pair, name)
    check(pair(base), theirs, method, params, links)


def test_ia3_in_bfloat16_keeps_small_changes():
    """Factors are near 1, where bfloat16 has steps of 0.4 and 0.8%."""
    y = jax.random.normal(jax.random.key(0), (2, 3, 64)).astype(jnp.bfloat16)
    hook = ia3(["k/kernel"]).init(jax.random.key(0), {"k": {"kernel": jnp.ones((3, 64))}}, ())["k"]["output"]
    got = dataclasses.replace(hook, l=jnp.full(64, 1.003))(y, x=None, context=None)
    assert got.dtype == jnp.bfloat16
    assert np.array_equal(got, (y.astype(jnp.float32) * 1.003).astype(jnp.bfloat16))
    assert not np.array_equal(got, y)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_merged_ia3_is_peft_merge_and_unload(pair, name):
    base = IA3[name][0]
    theirs, params, _ = with_ia3(pair, name)
    expected = dict(theirs.merge_and_unload().named_parameters())
    for path, w in flatten(merge(params)).items():
        reference = expected[hf_name(path)].detach().numpy()
        reference = reference.T if pair(base).ours.family.transposed(path) else reference
        np.testing.assert_allclose(w, reference, atol=1e-6, err_msg=path)


def test_ia3_on_parts_of_a_fused_product(pair):
    """Key and value alone are the whole with ones at the query; and the merge knows it."""
    base = pair("gpt2")
    parts, whole = (start(base, ia3(t)) for t in (["value", "key"], ["fused_qkv"]))
    factors = jnp.linspace(-1, 2, 2 * WIDTH)
    parts = map_with_path(lambda p, x: factors if p.endswith("/output/l") else x, parts)
    full = jnp.concatenate([jnp.ones(WIDTH), factors])
    whole = map_with_path(lambda p, x: full if p.endswith("/output/l") else x, whole)
    logits = [base.ours.forward(p, base.batch).logits for p in (parts, whole, merge(parts))]
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-4)
    assert np.abs(logits[0] - base.ours.forward(base.ours.params, base.batch).logits).max() > 0.1


def test_ia3_scales_what_a_lora_adds(pair):
    """`l ⊙ (W + AB) x`, and the same merged."""
    base, method = pair("llama"), chain(lora(rank=2, targets=["value"]), ia3(["value"]))
    params = tiny.roughen(start(base, method))
    out = base.ours.forward(params, base.batch).logits
    np.testing.assert_allclose(base.ours.forward(merge(params), base.batch).logits, out, atol=1e-4)


# Prompts


class Cut(torch.nn.Module):
    """A peft model without the logits of its virtual tokens."""

    def __init__(self, model, n):
        super().__init__()
        self.model, self.n = model, n

    def forward(self, **batch):
        out = self.model(**batch)
        out.logits = out.logits[:, self.n :]
        return out


@pytest.mark.parametrize("name", ["llama", "llama-no-bias", "llama-tied", "gpt2"])
def test_prompt(pair, name):
    base, method = pair(name), prompt(5)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    theirs = Cut(peft.get_peft_model(copy.deepcopy(base.theirs), config).eval(), 5)
    (path,) = (p for p in flatten(start(base, method)) if p.endswith("prompt/vectors"))
    links = {path: Link(theirs.model.prompt_encoder["default"].embedding.weight)}
    randomise(theirs, links)
    check(base, theirs, method, fill(start(base, method), links), links)


class BertWithPrompt(torch.nn.Module):
    """transformers' BERT over embeddings with a prompt before them; the pooler reads [CLS], not the prompt."""

    def __init__(self, bert, n):
        super().__init__()
        self.bert, self.prompt, self.n = bert, torch.nn.Parameter(torch.zeros(n, WIDTH)), n

    def forward(self, input_ids, attention_mask, token_type_ids):
        b = self.bert.bert
        words = b.embeddings.word_embeddings(input_ids)
        embedded = torch.cat([self.prompt[None].expand(len(words), -1, -1), words], 1)
        mask, types = (
            torch.cat([fill_(x[:, :1]).expand(-1, self.n), x], 1)
            for x, fill_ in ((attention_mask, torch.ones_like), (token_type_ids, torch.zeros_like))
        )
        hidden = b(inputs_embeds=embedded, attention_mask=mask, token_type_ids=types).last_hidden_state[:, self.n :]
        return NamedLogits(self.bert.classifier(b.pooler(hidden)))


class NamedLogits(NamedTuple):
    logits: Any


def test_prompt_on_bert(pair):
    base, method = pair("bert"), prompt(4)
    theirs = BertWithPrompt(copy.deepcopy(base.theirs), 4).eval()
    links = {"bert/prompt/vectors": Link(theirs.prompt)}
    randomise(theirs, links)
    check(base, theirs, method, fill(start(base, method), links), links)


class T5WithPrompt(torch.nn.Module):
    """transformers' T5 with a prompt before the encoder's embedded text."""

    def __init__(self, t5, n):
        super().__init__()
        self.t5, self.prompt, self.n = t5, torch.nn.Parameter(torch.zeros(n, WIDTH)), n

    def forward(self, input_ids, attention_mask, decoder_input_ids):
        words = self.t5.shared(input_ids)
        embedded = torch.cat([self.prompt[None].expand(len(words), -1, -1), words], 1)
        mask = torch.cat([torch.ones(len(words), self.n, dtype=int), attention_mask], 1)
        return self.t5(inputs_embeds=embedded, attention_mask=mask, decoder_input_ids=decoder_input_ids)


def test_prompt_on_t5(pair):
    """Section 2: the encoder's input gets the prompt; relative positions count it, the decoder looks at it."""
    base, method = pair("t5"), prompt(4)
    theirs = T5WithPrompt(copy.deepcopy(base.theirs), 4).eval()
    links = {"transformer/prompt/vectors": Link(theirs.prompt)}
    randomise(theirs, links)
    check(base, theirs, method, fill(start(base, method), links), links)


def test_prompt_starts():
    model = hub.from_config(tiny.config("llama"), "causal-lm")
    table = get(model.params, "model/embed_tokens/embedding")

    def vectors(method):
        return np.asarray(method.init(jax.random.key(3), model.params, model.sites)["model"]["prompt"].vectors)

    rows = {x.tobytes() for x in np.asarray(table)}
    drawn = vectors(prompt(6))
    assert all(v.tobytes() in rows for v in drawn)
    assert len({v.tobytes() for v in vectors(prompt(len(rows)))}) == len(rows), "drawn without replacement"
    assert vectors(prompt(len(table) + 1)).shape[0] == len(table) + 1
    uniform = vectors(prompt(50, start="random", bound=0.2))
    assert 0.1 < uniform.max() <= 0.2
    assert -0.2 <= uniform.min() < -0.1
    given = vectors(prompt(5, ids=[7, 2]))
    np.testing.assert_array_equal(given[:2], np.asarray(table)[[7, 2]])
    tokenizer = tiny.tokenizer()
    text = with_text_ids(chain(prompt(3, text="good cat sat ran red"), lora(rank=2)), tokenizer)
    ids = tokenizer("good cat sat", add_special_tokens=False)["input_ids"]
    assert text.spec[0][1]["ids"] == ids
    np.testing.assert_array_equal(vectors(text), np.asarray(table)[ids])


@pytest.mark.parametrize("family", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "t5"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [("prompt", "loop"), pytest.param("prompt+prefix", "scan", marks=pytest.mark.slow), ("p_tuning", "loop")],
)
def test_generation_sees_the_prompt(family, layout, name):
    """Left-padded rows with a cache, each equal to plain argmax over its own text without padding or cache."""
    model = hub.from_config(tiny.config(family), "generation")
    for seed in range(20 if family == "t5" else 1):  # else T5 would say one token only
        model = model._replace(params=tiny.roughen(model.params, seed))
    method = {
        "prompt": prompt(3, start="random"),
        "prompt+prefix": chain(prompt(3, start="random"), prefix(2, std=0.5)),
        "p_tuning": p_tuning(3, hidden=4),
    }[name]
    params = method.resolve(method.init(jax.random.key(1), model.params, model.sites), None)
    texts = [[5, 9, 4, 7], [11, 6]]
    ids = np.array([t if len(t) == 4 else [0, 0, *t] for t in texts])
    mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    run = stack_layers(params) if layout == "scan" else params
    got = np.asarray(decoder(model, Decoding(5))(run, ids, mask))
    forward = jax.jit(lambda batch: model.forward(params, batch).logits[0, -1].argmax())
    for row, text in zip(got, texts, strict=True):
        want = []
        for _ in range(5):
            batch = {"input_ids": np.array([[*text, *want]])}
            if family == "t5":
                batch = {"input_ids": np.array([text]), "decoder_input_ids": np.array([[0, *want]])}
            want.append(int(forward(batch)))
        assert row.tolist() == want
    without, within = (model.forward(p, batch).logits for p in (model.params, params))
    assert np.abs(without - within).max() > 1e-2, "the prompt must matter"


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path):
    model = hub.from_config(tiny.config("gpt2"), "causal-lm")
    params = prompt(60).init(jax.random.key(0), model.params, model.sites)
    with pytest.raises(ValueError, match=r"5 tokens after 60 virtual ones are more than the 64 positions"):
        model.forward(params, {"input_ids": jnp.ones((1, 5), jnp.int32)})
    bert = hub.from_config(tiny.config("bert"), "encoder")
    params = prompt(60).init(jax.random.key(0), bert.params, bert.sites)
    with pytest.raises(ValueError, match="5 tokens after 60 virtual ones"):
        bert.forward(params, {"input_ids": jnp.ones((1, 5), jnp.int32)})


# P-tuning


class Joined(NamedTuple):
    """Torch parameters that one leaf here holds one after another; `alike` ones are summed there and one here."""

    links: tuple

    def value(self):
        return jnp.concatenate([link.value() for link in self.links])

    def grad(self):
        return np.concatenate([link.grad() for link in self.links])


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning(pair, base, encoder):
    base, method = pair(base), p_tuning(4, encoder=encoder, hidden=6)
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=6,
        encoder_num_layers=2,
        encoder_reparameterization_type=encoder.upper(),
    )
    theirs = Cut(peft.get_peft_model(copy.deepcopy(base.theirs), config).eval(), 4)
    network = theirs.model.prompt_encoder["default"]
    links: dict[str, Any] = {"prompt_encoder/embedding": Link(network.embedding.weight)}
    plain = dict(links)
    layers = [m for m in network.mlp_head if isinstance(m, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        plain[f"prompt_encoder/mlp/{i}/w"] = transposed(layer.weight)
        plain[f"prompt_encoder/mlp/{i}/b1"] = Link(layer.bias)
    links |= plain
    if encoder == "lstm":
        named = dict(network.lstm_head.named_parameters())
        for i in range(2):
            for way, ending in (("forward", ""), ("backward", "_reverse")):
                parts = tuple(transposed(named[f"weight_{kind}_l{i}{ending}"]) for kind in ("ih", "hh"))
                at = f"prompt_encoder/lstm/{i}/{way}"
                links[f"{at}/w"], links[f"{at}/b1"] = Joined(parts), Link(named[f"bias_ih_l{i}{ending}"])
                plain |= {f"{at}/{j}": link for j, link in enumerate(parts)} | {f"{at}/b": links[f"{at}/b1"]}
                with torch.no_grad():
                    named[f"bias_hh_l{i}{ending}"].zero_()  # torch adds two biases, here there is one
    randomise(theirs, plain)
    params = fill(start(base, method), links)
    check(base, theirs, method, params, links)
    vectors = method.resolve(params, None)[base.ours.family.base]["prompt"].vectors
    np.testing.assert_allclose(vectors, theirs.model.get_prompt(1)[0].detach(), atol=1e-5)


def test_an_unresolved_prompt_says_so():
    model = hub.from_config(tiny.config("llama"), "causal-lm")
    params = p_tuning(2, hidden=3).init(jax.random.key(0), model.params, model.sites)
    with pytest.raises(ValueError, match=r"method.resolve\(params, None\) first"):
        model.forward(params, {"input_ids": jnp.ones((1, 5), jnp.int32)})
