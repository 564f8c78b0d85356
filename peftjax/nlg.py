"""The E2E challenge's metrics that no library computes as its script does: NIST, ROUGE-L, CIDEr; METEOR by its own jar.

The script is github.com/tuetschek/e2e-metrics; NIST follows its mteval-13a, ROUGE-L and CIDEr its copy of coco-caption.
Several references an item; all take texts as they are written.
"""

import functools
import math
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

Texts = Sequence[str]
References = Sequence[Sequence[str]]
Ngram = tuple[str, ...]

_CLITIC = re.compile(r"(?<=\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)")
_WORD = re.compile(
    r"n't(?!\w)|'(?:s|m|d|ll|re|ve)(?!\w)"
    r"|\d+(?:[.,:]\d+)+|\w+(?:[-/'&]\w+)*|[^\w\s'\"`.,:;?!()\[\]{}-]"
)


def words(text: str) -> list[str]:
    """The words of a text in small letters, punctuation left out: near coco-caption's, which are CoreNLP's PTB tokens.

    >>> words("It's kid-friendly, isn't it? Prices: £20-25.")
    ['it', "'s", 'kid-friendly', 'is', "n't", 'it', 'prices', '£', '20-25']
    """
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").replace("cannot", "can not")
    return _WORD.findall(_CLITIC.sub(r" \1", text))


def nist(predictions: Texts, references: References) -> float:
    """NIST-5, case-insensitive over mteval-13a tokens; not a percentage (E2E's tables: about 8).

    `BP · Σ_n Σ_{matched n-grams} info / (n-grams predicted)`, with `info(w_1…w_n) = log2(#(w_1…w_{n-1}) / #(w_1…w_n))`
    counted over all references, matches clipped at the most that one reference has, and
    `BP = exp(β log²(min(1, L / L_ref)))`, `β = log ½ / log² 1.5`, L_ref the mean length of all references times the
    number of items (Doddington 2002). That is the script's mteval-13a in Perl, its default; its Python form, for which
    L_ref is the sum of the items' mean lengths, punishes texts a little shorter than the references of a few items.

    >>> round(nist(["the cat sat"], [["the cat sat", "a cat sat"]]), 3)
    1.918
    """
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    split = functools.cache(Tokenizer13a())
    hypotheses = [split(text).lower().split() for text in predictions]
    lists = [[split(text).lower().split() for text in texts] for texts in references]
    seen: Counter[Ngram] = Counter()
    for tokens in (tokens for several in lists for tokens in several):
        seen.update(_ngrams(tokens, 5))
        seen[()] += len(tokens)
    gain, made = [0.0] * 5, [0] * 5
    for tokens, several in zip(hypotheses, lists, strict=True):
        most: Counter[Ngram] = Counter()
        for one in several:
            most |= _ngrams(one, 5)
        for ngram, n in (_ngrams(tokens, 5) & most).items():
            gain[len(ngram) - 1] += n * math.log2(seen[ngram[:-1]] / seen[ngram])
        made = [m + max(0, len(tokens) - n) for n, m in enumerate(made)]
    expected = len(lists) * seen[()] / sum(map(len, lists))
    if made[0] == 0 or expected == 0:
        return 0.0
    shortness = math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(min(1.0, made[0] / expected)) ** 2)
    return shortness * sum(g / m for g, m in zip(gain, made, strict=True) if m)


def rouge_l(predictions: Texts, references: References) -> float:
    """ROUGE-L as coco-caption has it, in percent: the mean over items of `(1 + β²) P R / (R + β² P)`, β = 1.2.

    P and R: the longest common subsequence over the length of the prediction and of the reference, each of them the
    largest over the references (Lin 2004), over `words`. An empty prediction scores 0.

    >>> round(rouge_l(["the cat sat"], [["the cat sat down", "a cat"]]), 2)
    83.56
    """
    total = 0.0
    for text, texts in zip(predictions, references, strict=True):
        hypothesis, others = words(text), [w for w in map(words, texts) if w]
        if not hypothesis or not others:
            continue
        common = [_common(hypothesis, other) for other in others]
        p = max(common) / len(hypothesis)
        r = max(c / len(other) for c, other in zip(common, others, strict=True))
        total += (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p else 0.0
    return 100.0 * total / len(predictions)


def cider(predictions: Texts, references: References) -> float:
    """CIDEr as coco-caption and the E2E script have it (the paper's CIDEr-D); not a percentage (E2E's tables: about 2).

    `10 · mean_n mean_refs exp(-(l - l_ref)² / 2σ²) · min(g, g_ref)·g_ref / (‖g‖ ‖g_ref‖)`, n = 1..4, σ = 6, with
    tf-idf vectors g of n-grams of `words`, idf over the items' references, l the number of bigrams; the mean over items
    (Vedantam et al. 2015, arXiv:1411.5726, section 5). Over one item every idf is 0, and so is the score.

    >>> round(cider(["a cat", "two dogs"], [["a cat"], ["two cats"]]), 2)
    3.12
    """
    count = functools.cache(lambda text: _ngrams(words(text), 4))
    among: Counter[Ngram] = Counter()
    for texts in references:
        among.update({ngram for text in texts for ngram in count(text)})
    items = math.log(len(references))

    @functools.cache
    def weigh(text: str) -> tuple[dict[Ngram, float], list[float], int]:
        counts = count(text)
        vector = {ngram: n * (items - math.log(max(1, among[ngram]))) for ngram, n in counts.items()}
        norms = [math.sqrt(sum(v * v for g, v in vector.items() if len(g) == n)) for n in (1, 2, 3, 4)]
        return vector, norms, sum(n for ngram, n in counts.items() if len(ngram) == 2)

    total = 0.0
    for text, texts in zip(predictions, references, strict=True):
        vector, norms, length = weigh(text)
        for other, other_norms, other_length in map(weigh, texts):
            dots = [0.0] * 4
            for ngram in vector.keys() & other.keys():
                dots[len(ngram) - 1] += min(vector[ngram], other[ngram]) * other[ngram]
            cosines = sum(d / (a * b) for d, a, b in zip(dots, norms, other_norms, strict=True) if a and b)
            total += cosines / 4 * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2)) / len(texts)
    return 10.0 * total / len(predictions)


def meteor(predictions: Texts, references: References) -> float:
    """METEOR 1.5 for English, in percent, by its reference implementation over `words`.

    Raises:
      ValueError: the environment's METEOR_JAR names no meteor-1.5.jar, there is no `java`, or the jar failed.
    """
    java, jar = find_meteor()

    def ask(lines: list[str]) -> list[str]:
        command = [java, "-Xmx2G", "-jar", jar, "-", "-", "-stdio", "-l", "en", "-norm"]
        done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8")
        if done.returncode or not done.stdout.strip():
            raise ValueError(f"METEOR ({jar}) failed: {done.stderr.strip()[-300:] or 'no output'}")
        return done.stdout.strip().split("\n")

    texts = [[" ".join(words(t)) for t in (*several, p)] for p, several in zip(predictions, references, strict=True)]
    statistics = ask([" ||| ".join(["SCORE", *each]) for each in texts])
    return 100.0 * float(ask([" ||| ".join(["EVAL", *statistics])])[-1])


def find_meteor() -> tuple[str, str]:
    """The paths of `java` and of METEOR's jar.

    Raises:
      ValueError: one of them is not here.
    """
    jar, java = os.environ.get("METEOR_JAR", ""), shutil.which("java")
    if java is None or not Path(jar).is_file():
        lack = f"METEOR_JAR is {jar!r}" if java else "there is no `java` on the PATH"
        raise ValueError(
            f"The metric 'meteor' runs METEOR's own program, but {lack}; install Java and set METEOR_JAR to the path "
            "of meteor-1.5.jar, its data folder beside it (`pip install pycocoevalcap` brings both), or leave it out."
        )
    return java, jar


def _ngrams(tokens: Sequence[str], most: int) -> Counter[Ngram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, most + 1) for i in range(len(tokens) - n + 1))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
