"""What comparisons with torch share: one tiny random model here and there, leaves linked to torch's parameters.

Base models have non-zero biases; adapters are random, non-zero, copied from torch. Without torch, whoever imports
this is skipped.
"""

import copy
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from peftjax import hub, partition
from peftjax.models.base import hf_name
from peftjax.tree import combine, flatten, map_with_path

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
VOCABULARY, WIDTH, LAYERS, HEADS = 29, 16, 2, 4
LLAMA = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=20,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=32,
    tie_word_embeddings=False,
)
CONFIGS = {
    "bert": lambda: transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=20,
        max_position_embeddings=32,
        num_labels=3,
    ),
    "llama": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, attention_bias=True, mlp_bias=True),
    "llama-no-bias": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=2, head_dim=6),
    "llama-mha": lambda: transformers.LlamaConfig(**LLAMA, num_key_value_heads=HEADS),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_inner=24,
        n_positions=32,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        scale_attn_by_inverse_layer_idx=True,
        eos_token_id=0,
        bos_token_id=0,
    ),
    "t5": lambda: transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=6,
        d_ff=20,
        num_layers=LAYERS,
        num_heads=HEADS,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=12,
        decoder_start_token_id=0,
        pad_token_id=0,
    ),
    "llama-tied": lambda: transformers.LlamaConfig(**LLAMA | {"tie_word_embeddings": True}),
}


class Pair(NamedTuple):
    """The same model here and in torch, and one batch for both."""

    ours: hub.Model
    theirs: Any
    batch: dict[str, np.ndarray]


@functools.cache
def base_pair(name: str, folder) -> Pair:
    torch.manual_seed(len(name))
    config = CONFIGS[name]()
    kinds = {"bert": transformers.AutoModelForSequenceClassification, "t5": transformers.AutoModelForSeq2SeqLM}
    kind = kinds.get(name, transformers.AutoModelForCausalLM)
    theirs = kind.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for path, p in theirs.named_parameters():
            p.normal_(0, 0.3)
            p.add_(1.0 if re.search(r"norm\.weight|ln_\w\.weight", path.lower()) else 0.0)
    theirs.save_pretrained(folder / name)
    ours = hub.load(folder / name)
    assert not ours.fresh
    rng = np.random.default_rng(0)
    batch = {"input_ids": rng.integers(1, VOCABULARY, (3, 7)), "attention_mask": np.ones((3, 7), int)}
    batch["attention_mask"][1, 5:] = 0  # padded right
    batch["attention_mask"][2, :2] = 0  # padded left
    if name == "bert":
        batch["type_ids"] = (np.arange(7) > 3).astype(int)[None].repeat(3, 0)
    if name == "t5":
        batch["decoder_input_ids"] = rng.integers(1, VOCABULARY, (3, 5))
    return Pair(ours, theirs, batch)


@pytest.fixture
def pair(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    return lambda name: base_pair(name, folder)


class Link(NamedTuple):
    """A torch parameter that a leaf here equals after a linear change of layout."""

    tensor: Any
    view: Callable = lambda x: x

    def value(self):
        return jnp.asarray(self.view(self.tensor.detach()).numpy())

    def grad(self):
        return self.view(self.tensor.grad).numpy()


def transposed(tensor) -> Link:
    return Link(tensor, lambda x: x.T)


def fill(params, links: dict[str, Link]):
    """Puts the torch values at the paths of `links`."""
    assert set(links) <= set(flatten(params))
    return map_with_path(lambda path, x: links[path].value() if path in links else x, params)


def randomise(theirs, links: dict[str, Link]) -> None:
    """Random values in exactly the linked torch parameters, which alone get gradients."""
    linked = {id(link.tensor) for link in links.values()}
    torch.manual_seed(0)  # not what the tests before this one left
    with torch.no_grad():
        for p in theirs.parameters():
            p.requires_grad_(id(p) in linked)
            if id(p) in linked:
                p.normal_(0, 0.3)


def check(pair: Pair, theirs, method, params, links: dict[str, Link]) -> None:
    """Same logits and same gradients; the leaves that train here are exactly the linked ones."""
    trainable, frozen = partition(params, method.trainable(params))
    assert set(flatten(trainable)) == set(links)
    batch = {("token_type_ids" if k == "type_ids" else k): torch.tensor(v) for k, v in pair.batch.items()}
    expected = theirs(**batch).logits
    weight = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    whole = expected.ndim == 2 or "decoder_input_ids" in pair.batch
    valid = np.ones(expected.shape[:-1], int) if whole else pair.batch["attention_mask"]
    weight *= valid.reshape(*valid.shape, *[1] * (expected.ndim - valid.ndim)) / valid.sum()  # a mean over tokens
    theirs.zero_grad()
    (expected * torch.tensor(weight)).sum().backward()

    @functools.partial(jax.grad, has_aux=True)
    def ours(trainable):
        logits = pair.ours.forward(method.resolve(combine(trainable, frozen), None), pair.batch).logits
        return (logits * weight).sum(), logits

    grads, logits = ours(trainable)
    kept = valid.astype(bool)
    np.testing.assert_allclose(logits[kept], expected.detach().numpy()[kept], atol=TOLERANCE, rtol=TOLERANCE)
    assert np.abs(expected.detach().numpy()[kept]).max() > 0.1
    for path, g in flatten(grads).items():
        reference = links[path].grad()
        np.testing.assert_allclose(g, reference, atol=TOLERANCE, rtol=TOLERANCE, err_msg=path)
        if "/key/bias" not in path:  # a key's bias moves all of BERT's scores alike: its gradient is zero
            assert np.abs(reference).max() > 1e-2, f"{path}: the reference has no gradient to compare"


def shapes(params) -> dict:
    return {path: (x.shape, x.dtype) for path, x in flatten(params).items()}


def start(pair: Pair, method):
    return method.init(jax.random.key(0), pair.ours.params, pair.ours.sites)


def plain_links(theirs, params, family) -> dict[str, Link]:
    named = dict(theirs.named_parameters())
    links = {}
    for path in flatten(params):
        leaf = path.removesuffix("/value")
        tensor = named[hf_name(leaf)]
        links[path] = transposed(tensor) if family.transposed(leaf) else Link(tensor)
    return links


def only(pair: Pair, method, wanted: Callable[[str], bool]):
    """torch with `requires_grad` on the parameters whose names are wanted, and nothing else."""
    theirs = copy.deepcopy(pair.theirs)
    params = start(pair, method)
    trainable, _ = partition(params, method.trainable(params))
    links = plain_links(theirs, trainable, pair.ours.family)
    for name, p in theirs.named_parameters():
        p.requires_grad_(wanted(name))
    linked = {id(link.tensor) for link in links.values()}
    assert {n for n, p in theirs.named_parameters() if id(p) in linked} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    return theirs, params, links


def negative_log_likelihood(forward):
    def loss(params, batch, key):
        log_p = jax.nn.log_softmax(forward(params, batch))
        each = -jnp.take_along_axis(log_p, batch["labels"][:, None], 1)[:, 0]
        return (each * batch["weight"]).sum(), batch["weight"].sum()

    return loss
