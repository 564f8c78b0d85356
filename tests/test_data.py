"""Rows, tokens and batches, on made-up files and, where it is at hand, on the shared data and tokenizers."""

import itertools
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from peftjax.data import Example, batches, bucket_lengths, encode, even_batches, labels_of, load_rows, make_batch, plan
from peftjax.metrics import METRICS
from peftjax.tasks import TASKS, Hub, Task, e2e_fields, get_task

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not beside the repository")
PAIRS = Task("pairs", "classification", ("left", "right"), "label", labels=("no", "yes"))
ANSWERS = Task("answers", "generation", ("question",), "answer", prompt=lambda row: row["question"] + " :")


def tokenizer(name):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(SHARED / "models" / name)


def write(folder, name, *lines):
    (folder / name).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n", "utf-8")


# Rows


def test_every_task_names_known_metrics_and_columns():
    for name, task in TASKS.items():
        assert task.name == name
        assert set(task.metrics) <= set(METRICS)
        assert set(task.aliases.values()) <= {*task.inputs, task.target}


def test_unknown_task_gets_a_suggestion():
    with pytest.raises(ValueError, match="No task 'banking'; did you mean 'banking77'"):
        get_task("banking")


def test_jsonl_keeps_unicode_line_separators_and_skips_blank_lines(tmp_path):
    text = "one\u2028two\x85three"
    line = json.dumps({"left": text, "right": "b", "label": "yes"}, ensure_ascii=False)
    (tmp_path / "train.jsonl").write_bytes(f"\ufeff{line}\r\n\n".encode())
    assert load_rows(PAIRS, tmp_path, "train") == [{"left": text, "right": "b", "label": "yes"}]


def test_tsv_takes_quotes_as_they_stand_and_labels_as_text(tmp_path):
    write(tmp_path, "train.tsv", "Quality\t#1 String\t#2 String", '1\tThe "odd quote.\tb', "0\tc\td")
    rows = load_rows(get_task("mrpc"), tmp_path, "train")
    assert rows[0] == {"label": "1", "sentence1": 'The "odd quote.', "sentence2": "b"}
    assert labels_of(get_task("mrpc"), rows) == (0, 1)


def test_a_list_of_references_is_several_rows(tmp_path):
    write(tmp_path, "test.jsonl", {"question": "a", "answer": ["x", "y"]}, {"question": "b", "answer": "z"})
    rows = load_rows(ANSWERS, tmp_path, "test")
    assert [(row["question"], row["answer"]) for row in rows] == [("a", "x"), ("a", "y"), ("b", "z")]


def test_holdout_parts_train_once_and_for_all(tmp_path):
    task = Task("t", "classification", ("text",), "label", holdout=0.1)
    write(tmp_path, "train.jsonl", *({"text": str(i), "label": i % 3} for i in range(95)))
    train, dev = load_rows(task, tmp_path, "train"), load_rows(task, tmp_path, "dev")
    assert len(dev) == 10
    assert sorted(int(row["text"]) for row in train + dev) == list(range(95))
    assert dev == load_rows(task, str(tmp_path), "dev")
    write(tmp_path, "dev.jsonl", {"text": "own", "label": 0})
    assert len(load_rows(task, tmp_path, "train")) == 95
    assert [row["text"] for row in load_rows(task, tmp_path, "dev")] == ["own"]
    (tmp_path / "dev.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="no dev file"):
        load_rows(task._replace(holdout=0.0), tmp_path, "dev")


GOOD = {"left": "a", "right": "b", "label": "no"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"train\.jsonl holds no rows"),
        ([GOOD, '{"left": "a",'], r"train\.jsonl, line 2: malformed JSON at column \d+: .*an object a line"),
        ([GOOD, "", "[1]"], r"train\.jsonl, line 3: a JSON list; expected an object"),
        (
            [GOOD, {"left": "a", "label": "no"}],
            r"line 2: no column 'right'; there are: left, label\. .*aliases=",
        ),
        ([GOOD | {"left": None}], r"line 1: column 'left' is None; expected a text"),
        (
            [GOOD, GOOD | {"label": "maybe"}],
            r"line 2: label 'maybe' is not one of task 'pairs' \('no', 'yes'\)",
        ),
        ([GOOD | {"label": 2}], r"line 1: label 2 is not one of"),
        ([GOOD | {"label": True}], r"line 1: label True is not one of"),
    ],
)
def test_bad_jsonl_names_file_line_and_fix(tmp_path, lines, message):
    write(tmp_path, "train.jsonl", *lines)
    with pytest.raises(ValueError, match=message):
        load_rows(PAIRS, tmp_path, "train")


def test_other_bad_input_names_place_and_fix(tmp_path):
    write(tmp_path, "train.tsv", "left\tright\tlabel", "a\tno")
    with pytest.raises(ValueError, match=r"train\.tsv, line 2: 2 fields, but the header has 3"):
        load_rows(PAIRS, tmp_path, "train")
    (tmp_path / "dev.jsonl").write_bytes(b'{"left": "\xff"}\n')
    with pytest.raises(ValueError, match=r"dev\.jsonl, line 1: not UTF-8 .*convert"):
        load_rows(PAIRS, tmp_path, "dev")
    with pytest.raises(
        FileNotFoundError, match=r"no test file .*test\.jsonl or test\.tsv.*holds: dev\.jsonl, train\.tsv"
    ):
        load_rows(PAIRS, tmp_path, "test")
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder .*give a folder"):
        load_rows(PAIRS, tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="names no Hugging Face data set; give a folder"):
        load_rows(PAIRS, None, "train")
    with pytest.raises(ValueError, match="kind 'classify'"):
        load_rows(PAIRS._replace(kind="classify"), tmp_path, "train")  # pyright: ignore[reportArgumentType] (the point)
    scores = Task("scores", "regression", ("text",), "score")
    write(tmp_path, "train.jsonl", {"text": "a", "score": 1}, '{"text": "a", "score": NaN}')
    with pytest.raises(ValueError, match="line 2: 'score' is nan; expected a finite number"):
        load_rows(scores, tmp_path, "train")
    write(tmp_path, "train.jsonl", {"question": "a", "answer": []})
    with pytest.raises(ValueError, match=r"line 1: column 'answer' is \[\]; expected a text"):
        load_rows(ANSWERS, tmp_path, "train")


def test_hugging_face_names(monkeypatch):
    """Real `datasets.Dataset` tables, with the download alone replaced."""
    intents = datasets.ClassLabel(names=["wait", "go"])
    tables = {
        ("nyu-mll/glue", "rte", "validation"): datasets.Dataset.from_dict(
            {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]},
            datasets.Features(
                sentence1=datasets.Value("string"),
                sentence2=datasets.Value("string"),
                label=datasets.ClassLabel(names=["entailment", "not_entailment"]),
            ),
        ),
        ("me/intents", None, "train"): datasets.Dataset.from_dict(
            {"text": ["a", "b"], "label": [0, 1]},
            datasets.Features(text=datasets.Value("string"), label=intents),
        ),
        ("me/intents", None, "validation"): datasets.Dataset.from_dict({"text": ["a"], "label": [-1]}),
    }

    def load_dataset(name, config, *, split, revision):
        if (name, config, split) not in tables:
            raise ValueError(f"Unknown split {split}")
        return tables[name, config, split]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rte, banking = get_task("rte"), get_task("banking77")
    for source in (None, "nyu-mll/glue", "nyu-mll/glue:rte"):
        assert [row["label"] for row in load_rows(rte, source, "dev")] == ["not_entailment", "entailment"]
    with pytest.raises(ValueError, match=r"no 'test' split with labels on nyu-mll/glue; it has: train, dev"):
        load_rows(rte, None, "test")
    with pytest.raises(FileNotFoundError, match=r"neither a folder under .*could load: Unknown split"):
        load_rows(rte, "me/other", "train")

    rows = load_rows(banking, "me/intents", "train")
    assert [row["category"] for row in rows] == ["wait", "go"]  # names, not their order there
    assert labels_of(banking, rows) == ("go", "wait")
    known = banking._replace(labels=labels_of(banking, rows))
    with pytest.raises(ValueError, match=r"me/intents  ?validation, row 1: label -1 is not one of"):
        load_rows(known, "me/intents", "dev")
    hub = Hub("me/intents", splits={"train": "train"})  # without a dev split
    part = [load_rows(banking._replace(hub=hub, holdout=0.5), None, split) for split in ("train", "dev")]
    assert sorted(row["category"] for row in itertools.chain(*part)) == ["go", "wait"]


@needs_shared
@pytest.mark.parametrize(
    ("name", "folder", "split", "count"),
    [
        ("cola", "glue/cola", "train", 7551),
        ("cola", "glue/cola", "dev", 1043),
        ("sst2", "glue/sst2", "dev", 872),
        ("rte", "glue/rte", "train", 2190),
        ("rte", "glue/rte", "dev", 277),
        ("mrpc", "glue_noncommercial/mrpc", "test", 1725),
        ("stsb", "glue/stsb", "train", 3749 - 375),
        ("stsb", "glue/stsb", "dev", 375),
        ("banking77", "banking77", "train", 9003 - 901),
        ("banking77", "banking77", "dev", 901),
        ("banking77", "banking77", "test", 3080),
        ("e2e", "e2e", "train", 10002),
        ("e2e", "e2e", "dev", 4672),
        ("e2e", "e2e", "test", 4693),
    ],
)
def test_shared_files_have_the_published_counts(name, folder, split, count):
    task = get_task(name)
    rows = load_rows(task, SHARED / "data" / folder, split)
    assert len(rows) == count
    if name == "banking77":
        assert len(labels_of(task, rows) or ()) == 77
    if name == "e2e":
        assert all(e2e_fields(row["mr"])[0][0] == "name" for row in rows)


# Examples


@needs_shared
def test_pairs_are_joined_by_the_tokenizer_and_cut_where_the_task_says_so():
    bert, rte = tokenizer("all-MiniLM-L6-v2"), get_task("rte")
    rows = load_rows(rte, SHARED / "data/glue/rte", "dev")[:40]
    encoded = encode(rte, rows, bert, labels_of(rte, rows))
    for row, example in zip(rows, encoded.examples, strict=True):
        alone = bert(row["sentence1"], row["sentence2"])
        assert (example.input_ids, example.type_ids) == (alone["input_ids"], alone["token_type_ids"])
        assert example.label == ["entailment", "not_entailment"].index(row["label"])
    lengths = [len(example.input_ids) for example in encoded.examples]
    assert (encoded.truncated, encoded.longest) == (0, max(lengths))

    short = encode(rte, rows, bert, labels_of(rte, rows), 40)
    assert short.truncated == sum(length > 40 for length in lengths) > 0
    assert short.longest == max(lengths)
    assert [len(e.input_ids) for e in short.examples] == [min(length, 40) for length in lengths]
    assert all(
        len(e.input_ids) == len(e.type_ids or ()) and e.input_ids[-1] == bert.sep_token_id for e in short.examples
    )

    with pytest.raises(
        ValueError, match=rf"{short.truncated} of 40 texts .* 40 tokens \(the longest has {max(lengths)},"
    ):
        encode(rte._replace(truncate=False), rows, bert, rte.labels, 40)


@needs_shared
def test_labels_in_every_spelling():
    bert = tokenizer("all-MiniLM-L6-v2")
    rows = [{"left": "a", "right": "b", "label": label} for label in ("no", "yes", 0, "1")]
    assert [e.label for e in encode(PAIRS, rows, bert, PAIRS.labels).examples] == [0, 1, 0, 1]
    numbers = PAIRS._replace(labels=(1, 2))  # then a number is a label and never a position
    with pytest.raises(ValueError, match="row 1: label 0 is not one of task 'pairs'"):
        encode(numbers, [rows[2]], bert, numbers.labels)
    with pytest.raises(ValueError, match="give labels=labels_of"):
        encode(PAIRS, rows, bert, None)
    scores = Task("scores", "regression", ("text",), "score")
    assert encode(scores, [{"text": "a", "score": "2.5"}], bert, None).examples[0].label == 2.5


@needs_shared
def test_the_loss_is_on_the_completion_and_prompts_begin_alike():
    llama, e2e = tokenizer("stories260K"), get_task("e2e")
    rows = load_rows(e2e, SHARED / "data/e2e", "dev")[:60]
    trained = encode(e2e, rows, llama, None)
    prompts = encode(e2e, rows, llama, None, for_generation=True)
    by_mr = {}
    for row in rows:
        by_mr.setdefault(row["mr"], []).append(row["ref"])
    assert [example.references for example in prompts.examples] == list(by_mr.values())
    start = dict(zip(by_mr, prompts.examples, strict=True))
    for row, example in zip(rows, trained.examples, strict=True):
        ids, mask = example.input_ids, example.loss_mask
        assert mask is not None
        assert mask == sorted(mask)
        assert len(mask) == len(ids)
        head, tail = ids[: mask.index(1)], ids[mask.index(1) :]
        assert head == start[row["mr"]].input_ids
        assert head.count(llama.bos_token_id) == 1
        assert ids == [*llama(f"{e2e.prompt(row)} {row['ref']}")["input_ids"], llama.eos_token_id]
        assert llama.decode(tail[:-1]).strip() == row["ref"].strip()


@needs_shared
def test_every_e2e_prompt_parts_from_its_completion():
    llama, e2e = tokenizer("stories260K"), get_task("e2e")
    for split in ("train", "dev", "test"):
        encoded = encode(e2e, load_rows(e2e, SHARED / "data/e2e", split), llama, None)
        assert (encoded.truncated, encoded.longest <= 512) == (0, True)


@needs_shared
def test_a_long_prompt_loses_its_beginning_and_a_completion_nothing():
    llama, cut = tokenizer("stories260K"), ANSWERS._replace(truncate=True)
    rows = [{"question": "Once upon a time there was a little girl", "answer": "named Lily"}]
    whole = encode(ANSWERS, rows, llama, None).examples[0]
    encoded = encode(cut, rows, llama, None, len(whole.input_ids) - 3)
    assert encoded.truncated == 1
    assert encoded.examples[0].input_ids == [whole.input_ids[0], *whole.input_ids[4:]]
    assert sum(encoded.examples[0].loss_mask or ()) == sum(whole.loss_mask or ())
    with pytest.raises(ValueError, match=r"Row 1 .* even without its prompt .*larger max_length"):
        encode(cut, rows, llama, None, 3)
    with pytest.raises(ValueError, match=r"1 of 1 texts .*truncate=True"):
        encode(ANSWERS, rows, llama, None, 3, for_generation=True)
    with pytest.raises(ValueError, match="No rows of task 'answers'"):
        encode(ANSWERS, [], llama, None)
    with pytest.raises(ValueError, match="joins the end of the prompt"):
        encode(ANSWERS._replace(prompt=lambda row: "the lit"), [{"question": "", "answer": "x"}], Joining(), None)


class Joining:
    """A tokenizer that makes one token of each text, so that no prompt survives."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, texts, **_):
        return {"input_ids": [[len(text)] for text in texts]}


def test_malformed_meaning_representation():
    with pytest.raises(ValueError, match=r"'name\[The Duck' is not of the form"):
        e2e_fields("name[The Duck")


# Batches


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 4), st.sampled_from([1, 4, 8]))
def test_buckets_pad_as_little_as_any_choice_of_as_many(lengths, most, multiple):
    def padding(buckets):
        return sum(min(b for b in buckets if b >= length) for length in lengths)

    buckets = bucket_lengths(lengths, most, multiple)
    candidates = sorted({-(-length // multiple) * multiple for length in lengths})
    choices = [
        choice
        for k in range(1, min(most, 3, len(candidates)) + 1)
        for choice in itertools.combinations(candidates[:-1], k - 1)
    ]
    assert len(buckets) <= most
    assert list(buckets) == sorted(set(buckets))
    assert all(bucket % multiple == 0 for bucket in buckets)
    assert padding(buckets) <= min(padding((*choice, candidates[-1])) for choice in choices)


def test_buckets_stop_at_the_limit():
    assert bucket_lengths([3, 99], 2, 8, limit=100) == (8, 100)
    with pytest.raises(ValueError, match="101 tokens, over the limit 100"):
        bucket_lengths([101], limit=100)
    with pytest.raises(ValueError, match="0 lengths"):
        bucket_lengths([])


def examples_of(lengths):
    return [Example([i + 1] * n, [1] * n, i % 3, [0] * (n - 1) + [1]) for i, n in enumerate(lengths)]


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=50),
    st.integers(1, 7),
    st.none() | st.integers(0, 2**40),
    st.integers(0, 3),
    st.sampled_from(["left", "right"]),
)
def test_an_epoch_holds_every_example_once_in_fixed_shapes(lengths, size, seed, epoch, side):
    examples, buckets = examples_of(lengths), bucket_lengths(lengths)
    made = list(batches(examples, size, buckets, pad_id=0, side=side, shuffle_seed=seed, epoch=epoch))
    again = list(batches(examples, size, buckets, pad_id=0, side=side, shuffle_seed=seed, epoch=epoch))
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(made, again, strict=True) for key in a)
    seen = np.concatenate([batch["index"] for batch in made])
    assert sorted(seen[seen >= 0]) == list(range(len(lengths)))
    for batch in made:
        assert batch["input_ids"].shape[0] == size
        assert batch["input_ids"].shape[1] in buckets
        assert np.array_equal(batch["weight"], (batch["index"] >= 0).astype(np.float32))
        for i, ids, mask, loss in zip(
            batch["index"], batch["input_ids"], batch["attention_mask"], batch["loss_mask"], strict=True
        ):
            assert mask.any()  # also in filler rows
            assert np.array_equal(np.sort(mask)[:: 1 if side == "left" else -1], mask)
            assert not ids[mask == 0].any()
            if i >= 0:
                assert ids[mask == 1].tolist() == examples[i].input_ids
                assert loss[mask == 1].tolist() == examples[i].loss_mask
            else:
                assert not loss.any()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=150), st.sampled_from([1, 6, 16, 64]))
@settings(deadline=None, max_examples=40)
def test_even_batches_hold_every_example_once_with_little_filler(lengths, most):
    examples = [Example([7] * n, label=i) for i, n in enumerate(lengths)]
    buckets = bucket_lengths(lengths)
    even, filled = ([*f(examples, most, buckets, pad_id=0)] for f in (even_batches, batches))
    assert sorted(i for b in even for i in b["index"].tolist() if i >= 0) == list(range(len(lengths)))
    assert all(b["attention_mask"].sum() > 0 and len(b["index"]) <= most for b in even)
    shapes = {b["input_ids"].shape for b in even}
    assert len({length for _, length in shapes}) == len(shapes)  # one compilation a bucket
    assert len(even) == len(filled)
    per_bucket = Counter(b["input_ids"].shape[1] for b in even)
    filler = Counter()
    for b in even:
        filler[b["input_ids"].shape[1]] += int((b["index"] < 0).sum())
    assert all(filler[length] < 8 * n for length, n in per_bucket.items())


def test_order_follows_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(1, 30, 100)
    examples, buckets = examples_of(lengths), (8, 16, 32)

    def order(seed, epoch):
        return [i for step in plan(examples, 4, buckets, shuffle_seed=seed, epoch=epoch) for i in step.index.tolist()]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert orders == [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(x) for x in orders}) == 4
    steps = [step.length for step in plan(examples, 4, buckets, shuffle_seed=0)]
    assert steps != sorted(steps)  # the buckets are mixed, not one after the other
    in_order = plan(examples, 4, buckets)
    assert [step.length for step in in_order] == sorted(step.length for step in in_order)
    assert all(np.array_equal(step.index, np.sort(step.index)) for step in in_order)


def test_a_batch_may_be_made_alone():
    examples = examples_of([3, 9, 5, 2, 12, 7])
    whole = list(batches(examples, 2, (8, 16), pad_id=9, shuffle_seed=3, epoch=2))
    third = make_batch(examples, plan(examples, 2, (8, 16), shuffle_seed=3, epoch=2)[2], 2, pad_id=9)
    assert third.keys() == whole[2].keys()
    assert all(np.array_equal(third[key], whole[2][key]) for key in third)


def test_dtypes_and_optional_keys():
    (batch,) = batches([Example([5, 6], label=0.5)], 2, (4,), pad_id=1)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "input_ids": (np.int32, (2, 4)),
        "attention_mask": (np.int32, (2, 4)),
        "weight": (np.float32, (2,)),
        "index": (np.int32, (2,)),
        "labels": (np.float32, (2,)),
    }
    (batch,) = batches(examples_of([2]), 1, (4,), pad_id=1)
    assert all(batch[key].dtype == np.int32 for key in ("labels", "type_ids", "loss_mask"))


def test_impossible_batches_say_why():
    with pytest.raises(ValueError, match=r"up to 9 tokens .* buckets .*8.* a bucket for the longest"):
        plan(examples_of([9]), 2, (8,))
    with pytest.raises(ValueError, match="0 examples"):
        plan([], 2, (8,))
    with pytest.raises(ValueError, match="batches of 0"):
        plan(examples_of([3]), 0, (8,))
