"""Each metric against its library called directly, and BLEU against scores published by others."""

import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from scipy import stats
from sklearn import metrics as sk

from peftjax.metrics import METRICS, score

E2E = Path(__file__).parents[2] / "shared/data/e2e"
needs_e2e = pytest.mark.skipif(not E2E.is_dir(), reason="the shared E2E data is not beside the repository")


@pytest.fixture
def labels():
    rng = np.random.default_rng(0)
    return rng.integers(0, 2, 200), rng.integers(0, 2, 200)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("accuracy", sk.accuracy_score),
        ("f1", sk.f1_score),
        ("matthews", sk.matthews_corrcoef),
    ],
)
def test_label_metrics_equal_scikit_learn(name, reference, labels):
    predictions, truth = labels
    assert score((name,), predictions, truth)[name] == pytest.approx(100 * reference(truth, predictions))
    assert score((name,), predictions.tolist(), truth.tolist()) == score((name,), predictions, truth)


@pytest.mark.parametrize(("name", "reference"), [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)])
def test_correlations_equal_scipy(name, reference):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 100)).astype(np.float32)
    y += x
    assert score((name,), x, y)[name] == pytest.approx(100 * reference(x, y).statistic, abs=1e-4)
    assert score((name,), -y, y)[name] == pytest.approx(-100)


def test_f1_is_of_class_one():
    assert score(("f1",), [0, 0, 1], [0, 0, 1])["f1"] == 100
    assert score(("f1",), [0, 0], [0, 0])["f1"] == 0  # no positive anywhere
    truth, predictions = [0, 1, 2, 1, 0], [0, 1, 1, 2, 0]
    expected = sk.f1_score(truth, predictions, labels=[1], average=None)[0]  # pyright: ignore[reportIndexIssue] (stub)
    assert score(("f1",), predictions, truth)["f1"] == pytest.approx(100 * expected)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_score_zero_without_a_warning(name, constant):
    assert score((name,), [constant] * 4, [0, 1, 1, 0]) == {name: 0.0}
    assert score((name,), [0, 1, 1, 0], [constant] * 4) == {name: 0.0}
    assert score((name,), [constant], [constant]) == {name: 0.0}


@pytest.mark.filterwarnings("error")
def test_nearly_constant_predictions_do_not_warn():
    score(("pearson", "spearman"), [1.0, 1.0 + 1e-15, 1.0], [1.0, 2.0, 3.0])


def test_nan_predictions_raise():
    with pytest.raises(ValueError, match="prediction 1 is nan"):
        score(("pearson",), [0.0, float("nan")], [0.0, 1.0])


@needs_e2e
@pytest.mark.parametrize("system", ["ukp_model_d_seed1_dev.txt", "ukp_model_d_seed12_dev.txt", "ukp_model_t_dev.txt"])
def test_bleu_equals_the_official_e2e_script(system):
    """547 outputs with 1 to 43 references each; expected: the official script, published to four digits."""
    expected = json.loads((E2E / "metric_examples/reference_scores.json").read_text("utf-8"))[system]
    outputs = (E2E / "metric_examples" / system).read_text("utf-8").strip("\n").split("\n")
    references: dict[str, list[str]] = {}
    for line in (E2E / "dev.jsonl").read_text("utf-8").strip("\n").split("\n"):
        row = json.loads(line)
        references.setdefault(row["mr"], []).append(row["ref"])
    bleu = score(("bleu",), outputs, list(references.values()))["bleu"]
    assert bleu == pytest.approx(100 * expected["recomputed_pymteval"]["bleu"], abs=0.01)


def test_bleu_equals_sacrebleu():
    outputs = ["The cat sat on the mat.", "A dog ran past the old house."]
    references = ["the cat sat on a mat.", "A dog ran by the old house."]
    expected = sacrebleu.corpus_bleu(outputs, [references], lowercase=True).score
    assert score(("bleu",), outputs, references)["bleu"] == pytest.approx(expected)
    assert score(("bleu",), outputs, [[r] for r in references])["bleu"] == pytest.approx(expected)


def test_exact_match_takes_any_reference():
    assert score(("exact_match",), ["a ", "b"], [["x", "a"], "c"]) == {"exact_match": 50.0}


def test_errors_say_what_to_write():
    with pytest.raises(ValueError, match="No metric 'acuracy'; did you mean 'accuracy'"):
        score(("acuracy",), [1], [1])
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        score(("accuracy",), [1, 1], [1])
    with pytest.raises(ValueError, match="0 predictions"):
        score(("accuracy",), [], [])
    with pytest.raises(ValueError, match="empty list of references"):
        score(("bleu",), ["a"], [[]])


def test_every_metric_gives_a_float_and_keeps_the_order():
    numbers, texts = [0, 1, 1], ["a b c d e", "f", "g"]
    names = ("spearman", "accuracy", "f1", "matthews", "pearson")
    assert list(score(names, numbers, numbers)) == list(names)
    assert {*names, *score(("bleu", "exact_match", "slots"), texts, texts, [texts] * 3)} <= set(METRICS)
    assert all(type(value) is float for value in score(names, np.array(numbers), np.array(numbers)).values())
