"""The bundled base and the script that made it."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import transformers
from conftest import EXPERIMENTS, SHARED, experiment, needs_shared

from peftjax import count, hub

FOLDER = hub.BUNDLED["tiny-books"].folder
SCRIPT = EXPERIMENTS / "pretrain.py"


def script():
    return experiment("pretrain")


def stated(row: str) -> float:
    """A number of the model card's table."""
    found = re.search(rf"\| {row}[^|]*\| ([\d.]+) \|", (FOLDER / "README.md").read_text())
    assert found is not None
    return float(found[1])


def test_it_is_small_and_loads_by_name():
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 4_000_000
    model, tokenizer = hub.load("tiny-books"), hub.load_tokenizer("tiny-books")
    assert count(model.params) <= 1_500_000
    assert 1000 <= len(tokenizer) == model.config.vocab_size <= 2000
    text = "Merry café, £12.50\n— and snow ☃"  # bytes: nothing is unknown
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_transformers_loads_it_too():
    torch = pytest.importorskip("torch")
    ids = np.random.default_rng(0).integers(3, 1900, (2, 11))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = hub.load("tiny-books")
    with torch.no_grad():
        want = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model.forward(model.params, {"input_ids": ids}).logits, want, atol=1e-4)


def test_a_folder_of_that_name_does_not_hide_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-books").mkdir()
    assert hub.find_folder("tiny-books") == FOLDER
    assert hub.find_folder("./tiny-books") == Path("tiny-books")


@needs_shared
def test_the_validation_loss_is_the_stated_one_and_beats_counting():
    pretrain = script()
    model, tokenizer = hub.load("tiny-books"), hub.load_tokenizer("tiny-books")
    ids = {s: pretrain.stream(pretrain.read(SHARED / "data/text/books" / s), tokenizer) for s in ("train", "valid")}
    length = model.config.max_position_embeddings
    rows = ids["valid"][: len(ids["valid"]) // length * length].reshape(-1, length)

    @jax.jit
    def loss(rows):
        logits = model.forward(model.params, {"input_ids": rows}).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).sum()

    cut = [rows[i : i + 64] for i in range(0, len(rows) // 64 * 64, 64)]
    ours = (sum(loss(c) for c in cut) + loss(rows[len(cut) * 64 :])) / (rows.size - len(rows))
    assert float(ours) == pytest.approx(stated("this model"), abs=2e-3)
    unigram, bigram = pretrain.bigram_losses(ids["train"], ids["valid"], len(tokenizer))
    assert (unigram, bigram) == pytest.approx((stated("unigram"), stated("bigram")), abs=1e-3)
    assert stated("this model") < bigram - 0.5


def test_unigram_and_bigram_against_counting_by_hand():
    train, valid = np.array([0, 1, 0, 1, 0, 2]), np.array([0, 1, 0])
    unigram, bigram = script().bigram_losses(train, valid, 3)
    p = np.array([4, 3, 2]) / 9
    assert unigram == pytest.approx(-np.log(p[[1, 0]]).mean())
    best = min(-np.log([w * 2 / 3 + (1 - w) * p[1], w * 1.0 + (1 - w) * p[0]]).mean() for w in np.arange(0.05, 1, 0.05))
    assert bigram == pytest.approx(best)


def test_the_script_from_books_to_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    words = ["sea", "ship", "gold", "the", "and", "old", "man", "went", "home"]
    for split in ("train", "valid"):
        (tmp_path / split).mkdir()
        text = "\n\n".join(" ".join(rng.choice(words, 30)) for _ in range(40))
        (tmp_path / split / "book.txt").write_text(text)
    pretrain = script()
    small = {"vocab": 300, "width": 16, "layers": 1, "heads": 2, "mlp": 16, "length": 32, "batch": 4}
    args = pretrain.Args(books=tmp_path, out=tmp_path / "out", steps=4, **small)
    pretrain.main(args)
    said = json.loads((tmp_path / "out/stated.json").read_text())
    assert said["parameters"] == count(hub.load(tmp_path / "out/model").params)
    assert f"{said['valid_loss']:.3f}" in (tmp_path / "out/model/README.md").read_text()
    rows = np.concatenate([b["input_ids"] for b in pretrain.windows(np.arange(5000, dtype=np.int32), args, 0)])
    repeating = np.mean([len(set(row.tolist())) < args.length for row in rows])
    assert 0.25 < repeating < 0.55, "two windows in five repeat"
