"""Proxy-tuning: the equation against transformers' models, and the verb."""

import jax
import numpy as np
import pytest
import tiny
import transformers

from peftjax import hub
from peftjax.checkpoint import save_adapter
from peftjax.cli import main
from peftjax.compare import steer
from peftjax.generate import Decoding, decoder
from peftjax.methods import lora
from peftjax.proxy import proxy, same_words

IDS = np.array([[0, 0, 5, 9, 4], [7, 11, 6, 8, 10]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def llama(seed: int, width: int = 16, **changes) -> hub.Model:
    model = hub.from_config(tiny.config("llama", hidden_size=width, **changes), "causal-lm", seed=seed)
    return model._replace(params=tiny.roughen(model.params, seed))


@pytest.fixture(scope="module")
def three():
    return llama(0, 32), llama(1), llama(2)


def trees(models):
    return tuple(m.params for m in models)


def test_the_equation_and_greedy_decoding_are_torchs(three, tmp_path):
    """Three models in transformers, their logits added as equation 1 says, without a cache or padding."""
    torch = pytest.importorskip("torch")
    theirs = []
    for i, model in enumerate(three):
        hub.save(model, model.params, tmp_path / str(i))
        theirs.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(i)).eval())
    model, alpha = proxy(*three, alpha=0.7), 0.7
    texts = np.asarray(decoder(model, Decoding(6))(trees(three), IDS, MASK))
    for row, ids, mask in zip(texts, IDS, MASK, strict=True):
        text, want = ids[mask > 0].tolist(), []
        for _ in range(6):
            with torch.no_grad():
                base, expert, anti = (m(torch.tensor([text])).logits[0].double() for m in theirs)
            logits = base + alpha * (expert - anti)
            if not want:
                ours = model.forward(trees(three), {"input_ids": np.array([text])}).logits[0]
                np.testing.assert_allclose(ours, logits, atol=1e-4)
            want.append(int(logits[-1].argmax()))
            text.append(want[-1])
        assert row.tolist() == want
    alone = np.asarray(decoder(three[0], Decoding(6))(three[0].params, IDS, MASK))
    assert (alone != texts).any(), "the expert must matter"


def test_without_a_difference_or_a_weight_it_is_the_base(three):
    base, expert, anti = three
    want = np.asarray(decoder(base, Decoding(5))(base.params, IDS, MASK))
    zero = decoder(proxy(base, expert, anti, alpha=0.0), Decoding(5))
    np.testing.assert_array_equal(zero((base.params, expert.params, anti.params), IDS, MASK), want)
    same = decoder(proxy(base, anti, anti), Decoding(5))
    np.testing.assert_array_equal(same((base.params, anti.params, anti.params), IDS, MASK), want)


def test_one_compilation_for_all_three(three):
    generate = decoder(proxy(*three), Decoding(4))
    generate(trees(three), IDS, MASK)
    generate(tuple(jax.tree.map(lambda x: 2 * x, p) for p in trees(three)), IDS, MASK)
    assert generate._cache_size() == 1


def test_beside_encoders():
    """Three of T5: at alpha 1, where base and anti-expert are one, the expert's texts."""
    models = []
    for seed in range(2):
        model = hub.from_config(tiny.config("t5"), "generation", seed=seed)
        models.append(model._replace(params=tiny.roughen(model.params, seed)))
    base, expert = models
    got = decoder(proxy(base, expert, base), Decoding(5))((base.params, expert.params, base.params), IDS, MASK)
    np.testing.assert_array_equal(got, decoder(expert, Decoding(5))(expert.params, IDS, MASK))


def test_what_cannot_be_added_is_refused(three):
    with pytest.raises(ValueError, match=r"share one vocabulary; their sizes are .*'anti-expert': 99"):
        proxy(three[0], three[1], llama(3, vocab_size=99))
    with pytest.raises(ValueError, match="expert must be a language model; its head is 'none'"):
        proxy(three[0], hub.from_config(tiny.config("bert"), "encoder"), three[2])
    with pytest.raises(ValueError, match="decode alone, or all beside an encoder"):
        proxy(three[0], three[1], hub.from_config(tiny.config("t5"), "generation"))
    with pytest.raises(ValueError, match="alpha must be a finite number; got nan"):
        proxy(*three, alpha=float("nan"))
    words, other = tiny.tokenizer(), tiny.tokenizer()
    other.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=r"big and small do not share one vocabulary \(different: .*zebra"):
        same_words({"base": "big", "expert": "small"}, {"base": words, "expert": other})


def test_the_verb(tmp_path, capsys):
    """A folder as the expert, or an adapter of the anti-expert; four rows, of which proxy's is none of the others."""
    big = tiny.folder(tmp_path / "big", "llama", seed=0, hidden_size=32)
    small = tiny.folder(tmp_path / "small", "llama", seed=1)
    data = str(tiny.data(tmp_path / "e2e", "e2e"))
    base, method = hub.load(small, "generation"), lora(rank=4)
    params = method.init(jax.random.key(0), base.params, base.sites)
    mask, noisy = method.trainable(params), tiny.roughen(params)
    params = jax.tree.map(lambda m, x, y: 3 * y if m else x, mask, params, noisy)
    save_adapter(tmp_path / "a.safetensors", base, method, params, {"config": {"max_new_tokens": 5}})
    models = ["--model", str(big), "--antiexpert", str(small), "--adapter", str(tmp_path / "a.safetensors")]
    main(["proxy", *models, "--task", "e2e", "--data", data, "--alpha", "2"])
    out = capsys.readouterr().out
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") > 2}
    assert list(rows) == ["base", "expert", "anti-expert", "proxy, alpha 2"]
    assert len({*rows.values()}) == 4
    hub.save(base, params, tmp_path / "tuned", tiny.tokenizer())
    tuned = str(tmp_path / "tuned")
    table = steer(str(big), "e2e", data, antiexpert=str(small), expert=tuned, alpha=2, max_new_tokens=5)
    again = {str(a): str(b) for a, b in zip(table.columns[0].cells, table.columns[1].cells, strict=True)}
    assert float(again["proxy, alpha 2"]) == pytest.approx(float(rows["proxy, alpha 2"]), rel=1e-3)
    for kwargs, message in (({}, "either the expert or the adapter"), ({"expert": "a", "adapter": "b"}, "either")):
        with pytest.raises(ValueError, match=message):
            steer(str(big), "e2e", data, antiexpert=str(small), **kwargs)
    with pytest.raises(ValueError, match="rte is no generation task"):
        steer(str(big), "rte", data, antiexpert=str(small), expert=str(small))
