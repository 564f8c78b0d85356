"""E2E's metrics against published scores and slow references; GSM8K's; GLUE's against scikit-learn and scipy."""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import tiny
from conftest import SHARED
from hypothesis import given, settings, strategies as st
from scipy import stats
from sklearn import metrics as sk

from peftjax import cli
from peftjax.metrics import score
from peftjax.nlg import cider, meteor, nist, rouge_l, words
from peftjax.tasks import TASKS

E2E = SHARED / "data/e2e"
needs_e2e = pytest.mark.skipif(not E2E.is_dir(), reason="the shared E2E data is not beside the repository")
SYSTEMS = [f"ukp_model_{x}_dev.txt" for x in ("d_seed1", "d_seed18", "d_seed12", "d_seed15", "t")]


def _published() -> dict:
    return json.loads((E2E / "metric_examples/reference_scores.json").read_text("utf-8"))


def _outputs(system: str) -> list[str]:
    return (E2E / "metric_examples" / system).read_text("utf-8").strip("\n").split("\n")


def _references() -> list[list[str]]:
    groups: dict[str, list[str]] = {}
    for line in (E2E / "dev.jsonl").read_text("utf-8").strip("\n").split("\n"):
        row = json.loads(line)
        groups.setdefault(row["mr"], []).append(row["ref"])
    return list(groups.values())


@needs_e2e
@pytest.mark.parametrize("system", [*SYSTEMS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in SYSTEMS[2:])])
def test_scores_are_the_published_ones(system):
    """BLEU and NIST to the digit. ROUGE-L and CIDEr were computed over CoreNLP's tokens: 0.005 is asked for.

    Of model_t the file does not fit the published values; its README says to take the recomputed BLEU and NIST.
    """
    row = _published()[system]
    got = score(TASKS["e2e"].metrics, _outputs(system), _references())
    assert round(got["bleu"] / 100, 4) == row["recomputed_pymteval"]["bleu"]
    assert round(got["nist"], 4) == row["recomputed_pymteval"]["nist"]
    if expected := row.get("published_scores_csv"):
        assert got["rouge_l"] / 100 == pytest.approx(expected["rouge"], abs=2e-4)
        assert got["cider"] == pytest.approx(expected["cider"], abs=1e-3)


@needs_e2e
def test_nist_of_few_items_is_that_of_mteval_in_perl():
    """7.8212: printed by mteval-v13a-sig.pl of e2e-metrics; its Python form, with another length, gives 7.7889."""
    blocks = (E2E / "metric_examples/devel-conc.txt").read_text("utf-8").strip().split("\n\n")
    got = nist(_outputs("baseline-output.txt"), [block.split("\n") for block in blocks])
    assert round(got, 4) == 7.8212


@needs_e2e
@pytest.mark.slow
@pytest.mark.skipif("METEOR_JAR" not in os.environ, reason="METEOR_JAR is not set")
def test_meteor_has_the_published_digits():
    got = score(("meteor",), _outputs(SYSTEMS[0]), _references())["meteor"]
    assert got / 100 == pytest.approx(_published()[SYSTEMS[0]]["published_scores_csv"]["meteor"], abs=2e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [  # as CoreNLP's PTB tokenizer has them, but for its # where a £ was
        ("It's a kid-friendly pub.", "it 's a kid-friendly pub"),
        ("They don't, can't and won't!", "they do n't ca n't and wo n't"),
        ("£20-25 per head; 5 out of 5?", "£ 20-25 per head 5 out of 5"),
        ('"Browns Cambridge" (cheap) is open...', "browns cambridge cheap is open"),
        ("I cannot say 1,000.50 or A&E", "i can not say 1,000.50 or a&e"),
        ("", ""),
    ],
)
def test_words(text, expected):
    assert words(text) == expected.split()


# Slow references, over items of words without punctuation: one loop for each sum in the equations.

_text = st.lists(st.sampled_from(["the", "cat", "sat", "dog"]), min_size=1, max_size=6).map(" ".join)
_items = st.lists(st.tuples(_text, st.lists(_text, min_size=1, max_size=3)), min_size=1, max_size=4)


def _split(items):
    return [text for text, _ in items], [texts for _, texts in items]


def _grams(text: str, n: int) -> list[str]:
    tokens = text.split()
    return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _subsequence(a: list, b: list) -> int:
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + _subsequence(a[1:], b[1:])
    return max(_subsequence(a[1:], b), _subsequence(a, b[1:]))


@settings(max_examples=25, deadline=None)
@given(_items)
def test_rouge_l_equals_its_equation(items):
    total = 0.0
    for text, texts in items:
        common = [_subsequence(text.split(), t.split()) for t in texts]
        p = max(c / len(text.split()) for c in common)
        r = max(c / len(t.split()) for c, t in zip(common, texts, strict=True))
        total += 0 if p == 0 else (1 + 1.44) * p * r / (r + 1.44 * p)
    assert rouge_l(*_split(items)) == pytest.approx(100 * total / len(items))


@settings(max_examples=25, deadline=None)
@given(_items)
def test_nist_equals_its_equation(items):
    everything = [t for _, texts in items for t in texts]
    made = sum(len(text.split()) for text, _ in items)
    length = len(items) * sum(len(t.split()) for t in everything) / len(everything)
    total = 0.0
    for n in range(1, 6):
        gain = 0.0
        for text, texts in items:
            for gram, times in Counter(_grams(text, n)).items():
                hits = min(times, max(_grams(t, n).count(gram) for t in texts))
                if hits:
                    before = gram.rpartition(" ")[0]
                    longer = sum(_grams(t, n).count(gram) for t in everything)
                    shorter = sum(_grams(t, n - 1).count(before) if n > 1 else len(t.split()) for t in everything)
                    gain += hits * math.log2(shorter / longer)
        count = sum(len(_grams(text, n)) for text, _ in items)
        total += gain / count if count else 0
    penalty = 1 if made >= length else 0.5 ** ((math.log(made / length) / math.log(1.5)) ** 2)
    assert nist(*_split(items)) == pytest.approx(penalty * total)


@settings(max_examples=25, deadline=None)
@given(_items)
def test_cider_equals_its_equation(items):
    def weights(text, n, grams):
        idf = [math.log(len(items) / max(1, sum(any(g in _grams(t, n) for t in ts) for _, ts in items))) for g in grams]
        return np.array([_grams(text, n).count(g) for g in grams]) * np.array(idf)

    total = 0.0
    for text, texts in items:
        for t in texts:
            for n in (1, 2, 3, 4):
                grams = sorted({*_grams(text, n), *_grams(t, n)})
                a, b = weights(text, n, grams), weights(t, n, grams)
                sizes = np.sqrt(a @ a) * np.sqrt(b @ b)
                near = math.exp(-((len(_grams(text, 2)) - len(_grams(t, 2))) ** 2) / 72)
                total += 10 * near * (np.minimum(a, b) @ b) / sizes / 4 / len(texts) if sizes > 0 else 0
    assert cider(*_split(items)) == pytest.approx(total / len(items), abs=1e-9)


def test_an_empty_text_scores_nothing_and_is_no_error():
    texts, references = ["", "the cat sat"], [["a dog"], ["the cat sat"]]
    got = score(("bleu", "nist", "rouge_l", "cider"), texts, references)
    assert got["rouge_l"] == pytest.approx(50)
    assert score(("nist", "rouge_l", "cider"), [""], [["a dog"]]) == {"nist": 0, "rouge_l": 0, "cider": 0}


def test_meteor_without_its_program_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("METEOR_JAR", raising=False)
    with pytest.raises(ValueError, match=r"METEOR_JAR|no `java`"):
        meteor(["a"], [["a"]])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="there is no `java` on the PATH; install Java and set METEOR_JAR"):
        score(("meteor",), ["a"], [["a"]])


def test_meteor_speaks_with_its_program(monkeypatch, tmp_path):
    """A stand-in for Java that answers each line in METEOR's form: statistics, then a score a text and one of all."""
    heard, java, jar = tmp_path / "heard", tmp_path / "java", tmp_path / "meteor.jar"
    jar.touch()
    java.write_text(
        f'#!/bin/sh\nwhile read -r line; do echo "$line" >> {heard}\n'
        'case "$line" in SCORE*) echo "1.0 2.0";; *) printf "0.5\\n0.7\\n0.625\\n";; esac; done\n'
    )
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("METEOR_JAR", str(jar))
    assert meteor(["A cat.", "It's"], [["the cat", "cats"], ["it"]]) == 62.5
    lines = heard.read_text().strip().split("\n")
    assert lines == ["SCORE ||| the cat ||| cats ||| a cat", "SCORE ||| it ||| it 's", "EVAL ||| 1.0 2.0 ||| 1.0 2.0"]
    java.write_text("#!/bin/sh\necho no such file >&2; exit 1\n")
    with pytest.raises(ValueError, match=r"METEOR \(.*\) failed: no such file"):
        meteor(["a"], [["a"]])


def _e2e(folder, references):
    lines = [{"mr": f"name[The {name}]", "ref": ref} for name, ref in references]
    tiny.write_rows(folder / "dev.jsonl", lines)
    return str(folder)


def test_score_reads_a_file_of_texts(tmp_path, capsys):
    data = _e2e(tmp_path, [("Duck", "The Duck is near."), ("Fox", "The Fox."), ("Duck", "Near is The Duck.")])
    texts = tmp_path / "texts.txt"
    texts.write_text("The Duck is near.\nThe Fox.\n")
    command = ["score", "--task", "e2e", "--data", data, "--predictions", str(texts), "--split", "dev"]
    cli.main(command)
    expected = score(
        ("bleu", "nist", "rouge_l", "cider"),
        ["The Duck is near.", "The Fox."],
        [["The Duck is near.", "Near is The Duck."], ["The Fox."]],
    )
    assert capsys.readouterr().out.strip() == ", ".join(f"{k} {v:.4g}" for k, v in expected.items())
    cli.main([*command, "--metrics", "exact_match"])
    assert capsys.readouterr().out.strip() == "exact_match 100"


def test_a_meaning_without_texts_is_named(tmp_path, capsys):
    data = _e2e(tmp_path, [("Duck", "The Duck is near."), ("Fox", "The Fox.")])
    texts = tmp_path / "texts.txt"
    texts.write_text("The Duck is near.\n")
    command = ["score", "--task", "e2e", "--data", data, "--predictions", str(texts), "--split", "dev"]
    with pytest.raises(SystemExit):
        cli.main(command)
    message = "has 1 lines, and the split has 2 inputs; the first without one is 'name[The Fox]'"
    assert message in capsys.readouterr().err
    _e2e(tmp_path, [("Duck", "The Duck is near."), ("Fox", [])])
    with pytest.raises(SystemExit):
        cli.main(command)
    assert "line 2: column 'ref' is []; expected a text or texts for 'name[The Fox]'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"Example 1 \(from 0\) has an empty list of references"):
        score(("nist",), ["a", "b"], [["a"], []])
    with pytest.raises(SystemExit):
        cli.main(["score", "--task", "rte", "--predictions", str(texts)])
    assert "rte is answered otherwise; use evaluate" in capsys.readouterr().err


# GSM8K.


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("She has 3 * 6 = 18.\n#### 18", True, True),
        ("#### 18.", True, True),
        ("#### $18", True, True),
        ("####18.00 dollars", True, True),
        ("#### 18\nQuestion: 5 + 5\n#### 10", True, False),
        ("So 18 it is", False, True),
        ("18", False, True),
        ("#### eighteen, or 18", False, True),
        ("### 18", False, True),
        ("#### -18", False, False),
        ("#### \N{MINUS SIGN}18", False, False),
        ("#### 180", False, False),
        ("#### 1,8", True, True),  # commas go, as in the official script
        ("#### 18.5", False, False),
        ("It costs $18.", False, True),
        ("9-18", False, True),
        ("####", False, False),
        ("", False, False),
    ],
)
def test_gsm8k_reads_the_number_after_the_mark(text, marked, last):
    assert score(("gsm8k", "gsm8k_last"), [text], ["9 + 9 = <<9+9=18>>18\n#### 18"]) == {
        "gsm8k": 100.0 * marked,
        "gsm8k_last": 100.0 * last,
    }


def test_gsm8k_numbers_are_compared_as_numbers():
    assert score(
        ("gsm8k",),
        ["#### 1,018", "#### -$2.50", "#### $-2.5", "#### .5"],
        ["#### 1018", *["#### -2.5"] * 2, "#### 0.5"],
    ) == {"gsm8k": 100}
    with pytest.raises(ValueError, match=r"Answer 1 .* has no number after '####'"):
        score(("gsm8k",), ["1", "1"], ["#### 1", "one"])


# GLUE.


def test_every_task_of_glue_has_its_metrics():
    expected = {name: {"accuracy"} for name in ("sst2", "mnli", "qnli", "rte", "wnli")}
    expected |= {"cola": {"matthews", "accuracy"}, "mrpc": {"accuracy", "f1"}, "qqp": {"accuracy", "f1"}}
    expected |= {"stsb": {"pearson", "spearman"}}
    assert {name: {*TASKS[name].metrics} for name in expected} == expected
    assert TASKS["cola"].metrics[0] == "matthews"


_pairs = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=30)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=30, deadline=None)
@given(_pairs)
def test_glue_labels_equal_scikit_learn(pairs):
    predictions, truth = map(list, zip(*pairs, strict=True))
    expected = {
        "accuracy": 100 * sk.accuracy_score(truth, predictions),
        "f1": 100 * sk.f1_score(truth, predictions, zero_division=0),  # pyright: ignore[reportArgumentType] (stub has str only)
        "matthews": 100 * sk.matthews_corrcoef(truth, predictions),
    }
    assert score(tuple(expected), predictions, truth) == pytest.approx(expected)


_numbers = st.lists(st.tuples(*[st.integers(-20, 20).map(lambda x: x / 4)] * 2), min_size=3, max_size=20)


@settings(max_examples=30, deadline=None)
@given(_numbers)
def test_glue_correlations_equal_scipy(pairs):
    x, y = np.array(pairs).T
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        expected = {"pearson": 0.0, "spearman": 0.0}
    else:
        expected = {"pearson": stats.pearsonr(x, y).statistic, "spearman": stats.spearmanr(x, y).statistic}
    assert score(("pearson", "spearman"), x, y) == pytest.approx({k: 100 * v for k, v in expected.items()})
