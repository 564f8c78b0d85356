"""Scores, most by a well-kept library, as the papers' tables print them: in percent but for NIST and CIDEr.

>>> score(("accuracy", "f1"), [1, 0, 1, 1], [1, 0, 0, 1])
{'accuracy': 75.0, 'f1': 80.0}
"""

import difflib
import re
import warnings
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from . import nlg

# scikit-learn, scipy.stats and sacrebleu are imported where used: a command should not wait for all three.

Values = Sequence[Any] | np.ndarray


def accuracy(predictions: Values, references: Values) -> float:
    """The share of equal pairs."""
    from sklearn.metrics import accuracy_score

    return 100.0 * float(accuracy_score(references, predictions))


def f1(predictions: Values, references: Values) -> float:
    """F1 of class 1 against the rest, as GLUE scores MRPC and QQP; 0 where neither side has class 1."""
    from sklearn.metrics import f1_score

    return 100.0 * float(f1_score(np.equal(references, 1), np.equal(predictions, 1), zero_division=0.0))  # pyright: ignore[reportArgumentType] (stub has str only)


def matthews(predictions: Values, references: Values) -> float:
    """Matthews' correlation; 0 where either side is constant (scikit-learn's definition of 0 / 0)."""
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(references):
        return 0.0  # scikit-learn gives 0 too, and sometimes a warning with it
    return 100.0 * float(matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Pearson's correlation; 0 where either side is constant, where it is not defined (scipy: nan)."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, references)


def spearman(predictions: Values, references: Values) -> float:
    """Spearman's rank correlation; 0 where either side is constant, where it is not defined (scipy: nan)."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, references)


def bleu(predictions: Values, references: Values) -> float:
    """Corpus BLEU-4, one or more references each, case-insensitive over mteval-13a tokens.

    That is what the E2E challenge's script (github.com/tuetschek/e2e-metrics) computes. Where some n-gram
    order never matches, sacrebleu's default smoothing applies.
    """
    from sacrebleu.metrics.bleu import BLEU

    lists = [_as_list(reference, i) for i, reference in enumerate(references)]
    # sacrebleu wants the k-th reference of every example as one stream, with None where an example has fewer
    streams = [[refs[k] if k < len(refs) else None for refs in lists] for k in range(max(map(len, lists)))]
    metric = BLEU(lowercase=True, tokenize="13a", force=True)  # force: no advice about detokenising on the log
    return float(metric.corpus_score(list(predictions), streams).score)  # pyright: ignore[reportArgumentType] (None is documented)


def exact_match(predictions: Values, references: Values) -> float:
    """The share of predictions equal to one of their references, blanks at the ends aside."""
    hits = [
        prediction.strip() in {text.strip() for text in _as_list(reference, i)}
        for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True))
    ]
    return 100.0 * sum(hits) / len(hits)


def slots(predictions: Values, references: Values) -> float:
    """The share of the slots' values that are said, word for word but for capitals, in all predictions together.

    >>> slots(["The Red Fox serves soup."], [["Red Fox", "soup", "cheap"]])
    66.66666666666667
    """
    said = [
        re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None
        for text, values in zip(predictions, references, strict=True)
        for value in values
    ]
    if not said:
        raise ValueError("No text has a value that it must say; `slots` has nothing to count.")
    return 100.0 * sum(said) / len(said)


def accuracy_norm(predictions: Values, references: Values) -> float:
    """The share of right answers where each is the one with the largest log-likelihood a character.

    Of multiple choice only, where `peftjax.problem` gives it these answers and gives `accuracy` those with the largest
    log-likelihood; as lm-eval's `acc_norm`, which counts characters and not bytes.
    """
    return accuracy(predictions, references)


def gsm8k(predictions: Values, references: Values) -> float:
    """The share of right answers: equal to the reference's after `####`, as GSM8K's files are written.

    As the official script (github.com/openai/grade-school-math) reads them: the first `####` and a number, commas left
    out. Beyond it: a dollar sign, blanks and a period at the end are left out, and numbers are compared as numbers, so
    that 18.00 is 18. A prediction without `####` is wrong.

    >>> gsm8k(["9 * 2 = 18 #### $18.00.", "It is 18."], ["#### 18", "#### 18"])
    50.0
    """
    return _numbers(predictions, references, _marked)


def gsm8k_last(predictions: Values, references: Values) -> float:
    """As `gsm8k`, but of a prediction the last number counts, wherever it stands.

    >>> gsm8k_last(["So she makes $1,018 in all.", "none"], ["#### 1018", "#### 18"])
    50.0
    """
    return _numbers(predictions, references, _last)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy,
    "accuracy_norm": accuracy_norm,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "bleu": bleu,
    "nist": nlg.nist,
    "rouge_l": nlg.rouge_l,
    "cider": nlg.cider,
    "meteor": nlg.meteor,
    "exact_match": exact_match,
    "slots": slots,
    "gsm8k": gsm8k,
    "gsm8k_last": gsm8k_last,
}
TEXT = {"bleu", "nist", "rouge_l", "cider", "meteor", "exact_match", "gsm8k", "gsm8k_last"}  # against several texts


def check_metrics(metrics: Sequence[str]) -> None:
    """Says what is wrong with the names before anything costs time.

    Raises:
      ValueError: there is no such metric, or the program that computes it is not here.
    """
    for name in metrics:
        if name not in METRICS:
            close = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5)
            meant = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"No metric {name!r}{meant} Known: {', '.join(METRICS)}.")
    if "meteor" in metrics:
        nlg.find_meteor()


def score(
    metrics: Sequence[str], predictions: Values, references: Values, required: Sequence[Sequence[str]] | None = None
) -> dict[str, float]:
    """Every named metric of `predictions` (n) against `references` (n), in the order asked for.

    In percent, but for nist and cider, which no table prints so. Labels or numbers for classification and regression;
    texts for generation, against one text or a list of texts each. `slots` looks at `required` instead of the
    references: the values that each text must say.
    """
    check_metrics(metrics)
    if len(predictions) != len(references) or len(references) == 0:
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; expected one each.")
    if "slots" in metrics and required is None:
        raise ValueError("The metric 'slots' needs the values that each text must say; give the task `slots`.")
    against: dict[str, Any] = {"slots": required or []}
    against |= {name: [_as_list(r, i) for i, r in enumerate(references)] for name in TEXT & {*metrics}}
    return {name: METRICS[name](predictions, against.get(name, references)) for name in metrics}


def _as_list(reference: str | Sequence[str], number: int) -> list[str]:
    texts = [reference] if isinstance(reference, str) else list(reference)
    if not texts:
        raise ValueError(f"Example {number} (from 0) has an empty list of references; expected at least one text.")
    return texts


_MINUS = "\N{MINUS SIGN}"
_NUMBER = rf"(?:(?:(?<![\w.])[-{_MINUS}])?\$?|\$[-{_MINUS}])(?:\d[\d,]*(?:\.\d+)?|\.\d+)"  # 9-18 ends in 18


def _numbers(predictions: Values, references: Values, read: Callable[[str], Decimal | None]) -> float:
    right = 0
    for i, (text, reference) in enumerate(zip(predictions, references, strict=True)):
        wanted = {_marked(one) for one in _as_list(reference, i)}
        if None in wanted:
            raise ValueError(
                f"Answer {i} (from 0), {reference!r}, has no number after '####'; those of GSM8K end in one."
            )
        right += read(text) in wanted
    return 100.0 * right / len(predictions)


def _marked(text: str) -> Decimal | None:
    found = re.search(rf"####[ \t]*({_NUMBER})", text)
    return _number(found[1]) if found else None


def _last(text: str) -> Decimal | None:
    found = re.findall(_NUMBER, text)
    return _number(found[-1]) if found else None


def _number(text: str) -> Decimal:
    return Decimal(text.replace(_MINUS, "-").replace("$", "").replace(",", ""))


def _constant(values: Values) -> bool:
    return bool(np.all(np.asarray(values) == np.asarray(values)[0]))


def _correlation(function: Callable[..., Any], predictions: Values, references: Values) -> float:
    x, y = np.asarray(predictions, np.float64), np.asarray(references, np.float64)
    for name, values in (("prediction", x), ("reference", y)):
        if not np.isfinite(values).all():
            where = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(f"A correlation needs finite numbers; {name} {where} is {values[where]}.")
    if _constant(x) or _constant(y):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nearly constant": the number is returned all the same
        return 100.0 * float(function(x, y).statistic)
