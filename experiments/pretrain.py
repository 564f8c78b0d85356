"""Pretrains the bundled base, `tiny-books`: a Llama of 1.1 M parameters on public-domain books.

    python experiments/pretrain.py --books ../shared/data/text/books --out runs/tiny-books

The folder of books holds `train/*.txt` and `valid/*.txt`. A run that was cut off resumes when the same command is
given again. It leaves a folder in Hugging Face's layout, with a model card that states the validation loss beside
a unigram's and a bigram's over the same tokens.

Two windows in five repeat their beginning, with a period drawn anew each time. Natural prose alone teaches a model of
this size to copy only after far more tokens, and copying values is what data to text needs. Validation is on
natural windows only.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from peftjax import hub
from peftjax.loop import fit
from peftjax.methods import full
from peftjax.train import Settings
from peftjax.tree import count

SPECIAL = ("<pad>", "<s>", "</s>")


@dataclasses.dataclass
class Args:
    """The defaults are those of the bundled base.

    Attributes:
      books: folder with `train/*.txt` and `valid/*.txt`.
      out: where the model goes, and the training state until it is done.
      steps: batches of 16 windows of 256 tokens.
      repeats: share of the windows that repeat their beginning.
    """

    books: Path
    out: Path
    steps: int = 5000
    vocab: int = 1920
    width: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 384
    length: int = 256
    batch: int = 16
    rate: float = 4e-3
    weight_decay: float = 0.1
    repeats: float = 0.4
    seed: int = 0


def read(folder: Path) -> list[str]:
    """One text a book, the lines of a paragraph joined."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise ValueError(f"{folder} holds no .txt files")
    paragraphs = [re.split(r"\n\s*\n", f.read_text().replace("\r\n", "\n")) for f in files]
    return ["\n".join(" ".join(p.split()) for p in book if p.strip()) for book in paragraphs]


def make_tokenizer(texts: list[str], vocab: int) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone."""
    bpe = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    )
    pad, bos, eos = SPECIAL
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def stream(texts: list[str], tokenizer) -> np.ndarray:
    """All books as one row of ids, each between BOS and EOS."""
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([[tokenizer.bos_token_id, *row, tokenizer.eos_token_id] for row in rows]).astype(np.int32)


def windows(ids: np.ndarray, a: Args, number: int) -> Iterator[dict]:
    """The batches of an epoch: windows from a drawn offset on, in drawn order, some of them repeating."""
    rng = np.random.default_rng((a.seed, number))
    start = rng.integers(a.length)
    rows = ids[start : start + (len(ids) - start) // a.length * a.length].reshape(-1, a.length)
    rows = rows[rng.permutation(len(rows))]
    for i in range(0, steps_per_epoch(ids, a) * a.batch, a.batch):
        batch = rows[i : i + a.batch].copy()
        for row in np.flatnonzero(rng.random(len(batch)) < a.repeats):
            batch[row] = np.resize(batch[row, : rng.integers(8, a.length // 2)], a.length)
        yield {"input_ids": batch}


def steps_per_epoch(ids: np.ndarray, a: Args) -> int:
    return (len(ids) // a.length - 1) // a.batch


def bigram_losses(train: np.ndarray, valid: np.ndarray, vocab: int) -> tuple[float, float]:
    """Validation loss in nats a token of a unigram (add one) and of an interpolated bigram.

    `p(b | a) = w c(a, b) / c(a) + (1 - w) p(b)`, with the w of {0.05, ..., 0.95} that is best on the validation
    tokens themselves, which favours the bigram.
    """
    uni = (np.bincount(train, minlength=vocab) + 1.0) / (len(train) + vocab)
    pairs = np.zeros((vocab, vocab))
    np.add.at(pairs, (train[:-1], train[1:]), 1)
    bi = pairs / np.maximum(pairs.sum(1, keepdims=True), 1)
    a, b = valid[:-1], valid[1:]
    mixed = [-np.log(w * bi[a, b] + (1 - w) * uni[b]).mean() for w in np.arange(0.05, 1, 0.05)]
    return float(-np.log(uni[b]).mean()), float(min(mixed))


def card(a: Args, stated: dict) -> str:
    """The model card."""
    n = {k: f"{v:,}" if isinstance(v, int) else f"{v:.3f}" for k, v in stated.items() if not isinstance(v, list)}
    return f"""# tiny-books

A Llama of {n["parameters"]} parameters ({a.layers} layers, {a.width} wide, {a.heads} heads, MLP {a.mlp}, context
{a.length}, biases, tied head) with a byte-level BPE vocabulary of {a.vocab:,}, pretrained from nothing by
`experiments/pretrain.py`: {n["steps"]} steps, {n["tokens_seen"]} tokens seen, of {len(stated["books"])} public-domain
books ({n["train_tokens"]} tokens). It is a base to try methods on, not a model to ask questions of.

| on {len(stated["valid_books"])} books held out, {n["valid_tokens"]} tokens | loss, nats a token |
|---|---:|
| this model | {n["valid_loss"]} |
| bigram, interpolated | {n["bigram_loss"]} |
| unigram | {n["unigram_loss"]} |

{n["bits_per_byte"]} bits a byte. {100 * a.repeats:g}% of the training windows repeat their beginning, to teach copying.

Trained on: {", ".join(stated["books"])}. Held out: {", ".join(stated["valid_books"])}. The texts are in the public
domain in the USA; the weights have the licence of the package.
"""


def main(a: Args) -> None:
    texts = {split: read(a.books / split) for split in ("train", "valid")}
    tokenizer = make_tokenizer(texts["train"], a.vocab)
    ids = {split: stream(t, tokenizer) for split, t in texts.items()}
    config = transformers.LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.width,
        intermediate_size=a.mlp,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.heads,
        max_position_embeddings=a.length,
        attention_bias=True,  # so that BitFit finds the biases it is about
        mlp_bias=True,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index("<pad>"),
        bos_token_id=SPECIAL.index("<s>"),
        eos_token_id=SPECIAL.index("</s>"),
    )
    model = hub.from_config(config, "causal-lm", seed=a.seed)
    print(f"{count(model.params):,} parameters; tokens: train {len(ids['train']):,}, valid {len(ids['valid']):,}")

    def objective(params, batch, key):
        logits = model.forward(params, {"input_ids": batch["input_ids"]}).logits
        assert logits is not None
        each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch["input_ids"][:, 1:])
        return each.sum(), jnp.float32(each.size)

    valid = ids["valid"][: len(ids["valid"]) // a.length * a.length].reshape(-1, a.length)
    loss = jax.jit(lambda params, rows: objective(params, {"input_ids": rows}, None))

    def evaluate(params):
        sums = [loss(params, valid[i : i + a.batch]) for i in range(0, len(valid), a.batch)]
        return {"loss": float(sum(s for s, _ in sums) / sum(n for _, n in sums))}

    def report(record):
        if "eval" in record:
            print(f"step {record['step']}: validation loss {record['eval']['loss']:.4f}", flush=True)
        elif record["step"] % 100 == 0:
            print(f"step {record['step']}: loss {record['loss']:.4f}, {record['time_left']:.0f} s left", flush=True)

    settings = Settings(
        steps=a.steps,
        batch_size=a.batch,
        learning_rate=a.rate,
        schedule="cosine",
        warmup=0.03,
        weight_decay=a.weight_decay,
        seed=a.seed,
        eval_every=500,
        save_every=250,
    )
    fitted = fit(
        model.params,
        full(),
        objective,
        lambda number: windows(ids["train"], a, number),
        steps_per_epoch(ids["train"], a),
        settings,
        evaluate=evaluate,
        folder=a.out,
        report=report,
    )
    hub.save(model, fitted.params, a.out / "model", tokenizer, param_dtype=jnp.bfloat16)
    saved = hub.load(a.out / "model").params  # what is stated is what the file gives
    ours = evaluate(saved)["loss"]
    unigram, bigram = bigram_losses(ids["train"], ids["valid"], a.vocab)
    assert fitted.best is not None
    stated = {
        "parameters": count(model.params),
        "train_tokens": len(ids["train"]),
        "valid_tokens": int(valid.size),
        "steps": fitted.best["step"],
        "tokens_seen": fitted.best["step"] * a.batch * a.length,
        "valid_loss": ours,
        "unigram_loss": unigram,
        "bigram_loss": bigram,
        "bits_per_byte": ours / math.log(2) * len(ids["valid"]) / sum(len(t.encode()) for t in texts["valid"]),
        "books": sorted(f.stem for f in (a.books / "train").glob("*.txt")),
        "valid_books": sorted(f.stem for f in (a.books / "valid").glob("*.txt")),
    }
    (a.out / "stated.json").write_text(json.dumps(stated, indent=1) + "\n")
    (a.out / "model" / "README.md").write_text(card(a, stated))
    print(json.dumps(stated, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
