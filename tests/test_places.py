"""The built-in task: what is held out is held out, what must be said is said."""

import itertools

import numpy as np
import pytest

from peftjax import places
from peftjax.data import load_rows
from peftjax.metrics import score, slots
from peftjax.tasks import get_task

SPLITS = {split: places.rows(split) for split in places.SIZES}


def fields(row):
    return dict(field.split(": ") for field in row["attributes"].split("; "))


def pairs(split):
    """The (kind, food) and (way, sight) pairs that occur in a split."""
    found = [tuple(fields(row).get(n) for n in names) for row in SPLITS[split] for names in places.HELD_OUT.values()]
    return {p for p in found if None not in p}


def test_dev_and_test_share_no_held_out_pair_with_train():
    held = set.union(*(places._held_out(kind) for kind in places.HELD_OUT))
    assert pairs("train") & held == set()
    for split in ("dev", "test"):
        assert all(
            any(tuple(fields(row).get(n) for n in names) in held for names in places.HELD_OUT.values())
            for row in SPLITS[split]
        )


def test_the_parts_of_a_held_out_pair_are_known_from_train():
    known = set(itertools.chain(*(fields(row).values() for row in SPLITS["train"])))
    assert {v for row in SPLITS["test"] for name, v in fields(row).items() if name != "name"} <= known


@pytest.mark.parametrize("split", SPLITS)
def test_texts_say_every_value_and_nothing_of_another_attribute(split):
    rows = SPLITS[split]
    assert slots([r["text"] for r in rows], [places.slots(r) for r in rows]) == 100
    for row in rows:
        there = fields(row)
        domain = places.EATING if there["kind"] in places.EATING["kind"] else places.SEEING
        unasked = [v for name in ("food", "guests", "way", "season") if name not in there for v in domain.get(name, ())]
        rest = row["text"].replace(there["name"], "")  # Summer Hill is no season
        assert not unasked or slots([rest], [unasked]) == 0


def test_sizes_and_no_list_twice():
    lists = {split: [r["attributes"] for r in rows] for split, rows in SPLITS.items()}
    assert {split: len(set(x)) for split, x in lists.items()} == places.SIZES
    assert not set(lists["train"]) & set(lists["test"])
    assert not set(lists["dev"]) & set(lists["test"])
    assert {len(list(g)) for _, g in itertools.groupby(lists["test"])} == {places.REFERENCES["test"]}


def test_texts_vary_and_are_english():
    starts = {" ".join(r["text"].split()[:2]) for r in SPLITS["train"]}
    assert len(starts) > 20
    for r in SPLITS["train"]:
        assert r["text"][0].isupper()
        assert r["text"].endswith(".")
        assert " a inn" not in r["text"]
        assert " a old" not in r["text"]


def test_the_same_rows_every_time():
    assert places.rows("test") == SPLITS["test"]
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter
    assert places.rows("dev") == SPLITS["dev"]


def test_as_a_task():
    task = get_task("places")
    rows = load_rows(task, None, "test")
    assert task.prompt is not None
    assert task.prompt(rows[0]) == f"{rows[0]['attributes']}."
    assert task.reported == "test"
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_rows(task, None, "validation")


def test_slots_counts_whole_words_over_all_texts():
    assert slots(["The Red Fox is near.", "Soups."], [["red fox", "near"], ["soup", "Soups"]]) == 75
    assert score(("slots", "exact_match"), ["a"], ["a"], [["b"]]) == {"slots": 0, "exact_match": 100}
    with pytest.raises(ValueError, match="give the task `slots`"):
        score(("slots",), ["a"], ["a"])
