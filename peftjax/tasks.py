"""One row per data set: columns, labels, metrics, files. No code asks for a task's name.

A data set of one's own is a row made by hand, given wherever a task's name is (see `Task`).
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

from . import places

Kind = Literal["classification", "regression", "generation"]
Row = dict[str, Any]


def _files(dev: str = "dev") -> dict[str, tuple[tuple[str, ...], ...]]:
    names = {"train": ("train",), "dev": (dev, "validation"), "test": ("test",)}
    return {
        split: tuple((f"{stem}{ending}",) for stem in stems for ending in (".jsonl", ".tsv"))
        for split, stems in names.items()
    }


_FILES = _files()
_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_NO_ALIASES: dict[str, str] = {}


class Hub(NamedTuple):
    """A Hugging Face data set: the arguments of `datasets.load_dataset`."""

    name: str
    config: str | None = None
    splits: Mapping[str, str] = _SPLITS
    revision: str | None = None  # "refs/convert/parquet" where main is a script, which datasets 4 refuses


class Chats(NamedTuple):
    """How `peftjax.sft` reads conversations.

    Attributes:
      holdout: share of the rows of each file that is held out for the loss.
      cap: at most so many rows of each file, drawn with a fixed seed.
      long: what becomes of a conversation of too many tokens: 'cut' at its end, or 'drop'.
    """

    holdout: float = 0.05
    cap: int | None = None
    long: Literal["cut", "drop"] = "cut"


class Task(NamedTuple):
    """What `peftjax.data` and `peftjax.metrics` need to know about a data set.

    `aliases` maps other spellings of a column, whichever source they come from, to the one used here. A row
    whose target is a list stands for several rows, one for each reference (E2E's test file).

    Own data: a folder with `train.jsonl`, `dev.jsonl` (or `.tsv` with a header line), and a row made here.

    >>> import json, pathlib, tempfile
    >>> from peftjax.data import load_rows
    >>> reviews = Task("reviews", "classification", inputs=("text",), target="stars", labels=("bad", "good"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     line = json.dumps({"text": "The soup was cold.", "stars": "bad"})
    ...     _ = pathlib.Path(folder, "train.jsonl").write_text(line)
    ...     load_rows(reviews, folder, "train")
    [{'text': 'The soup was cold.', 'stars': 'bad'}]

    The same for text to text: the loss is on the target only, which follows the prompt after one blank.

    >>> questions = Task(
    ...     "questions", "generation", inputs=("question",), target="answer", metrics=("exact_match",),
    ...     prompt=lambda row: f"Question: {row['question']} Answer:",
    ... )
    >>> questions.prompt({"question": "Who?", "answer": "Nobody."})
    'Question: Who? Answer:'
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]  # one column, or two for a sentence pair
    target: str
    labels: tuple[Any, ...] | None = None  # in id order; None: the sorted values of the train split
    metrics: tuple[str, ...] = ("accuracy",)  # keys of metrics.METRICS; the first decides which step is best
    files: Mapping[str, tuple[tuple[str, ...], ...]] = _FILES  # split -> alternatives, each files to join
    hub: Hub | None = None
    aliases: Mapping[str, str] = _NO_ALIASES  # a source's column -> the name used here
    holdout: float = 0.0  # the share of train that becomes dev where a source has no dev; 0: an error
    prompt: Callable[[Mapping[str, Any]], str] | None = None  # generation; None: the first input as it stands
    truncate: bool = False  # whether a text longer than max_length may be cut; otherwise it is an error
    max_length: int = 512  # in tokens, special tokens included
    made: Callable[[str], list[Row]] | None = None  # split -> rows, where no source is given
    slots: Callable[[Mapping[str, Any]], list[str]] | None = None  # what a generated text must say, for `slots`
    reported: Literal["dev", "test"] = "dev"  # the split of a table, unless another is asked for
    # Multiple choice: a generation task scored by the likelihood of each answer, of which the target is one.
    choices: Callable[[Mapping[str, Any]], list[str]] | None = None
    chats: Chats | None = None  # rows are conversations, read and encoded by `peftjax.sft`
    new_tokens: int | None = None  # of a generated text, at most half the room; None: the longest completion

    @property
    def headline(self) -> str:
        """The score that a table is about."""
        return self.metrics[0] if self.metrics else "loss"


def e2e_fields(mr: str) -> list[tuple[str, str]]:
    """The attributes of an E2E meaning representation, in order.

    >>> e2e_fields("name[The Duck], eatType[coffee shop]")
    [('name', 'The Duck'), ('eatType', 'coffee shop')]
    """
    field = r"([^\[\],]+)\[([^\[\]]*)\]"
    if not re.fullmatch(rf"{field}(, *{field})*", mr):
        raise ValueError(f"E2E meaning representation {mr!r} is not of the form 'name[The Duck], area[riverside]'.")
    return [(name.strip(), value) for name, value in re.findall(field, mr)]


def e2e_prompt(row: Mapping[str, Any]) -> str:
    """E2E's linearised form of prefix-tuning (Li & Liang 2021, arXiv:2101.00190) and of LoRA's GPT-2 runs.

    Their files rename three attributes and set `||` between the two sides. Deviations: their code puts
    GPT-2's `<|endoftext|>`, which other tokenizers lack, in the place of `||`; their files part `£` from the
    number, here values are verbatim.

    >>> e2e_prompt({"mr": "name[The Duck], eatType[pub], familyFriendly[no]"})
    'name : The Duck | Type : pub | family friendly : no ||'
    """
    renamed = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
    fields = [f"{renamed.get(name, name)} : {value}" for name, value in e2e_fields(row["mr"])]
    return " | ".join(fields) + " ||"


# GLUE keeps its test labels to itself; its development split is what papers report and what `dev` means here.
_GLUE_SPLITS = {"train": "train", "dev": "validation"}
_MNLI_SPLITS = {"train": "train", "dev": "validation_matched"}
_NLI = ("entailment", "not_entailment")  # GLUE's order: 0 is entailment


def _glue(name: str, inputs: tuple[str, ...], labels: tuple[Any, ...] | None, **changes: Any) -> Task:
    """Texts are cut at 128 tokens, the usual length for GLUE, unless the row says otherwise."""
    row = Task(
        name=name,
        kind="classification",
        inputs=inputs,
        target="label",
        labels=labels,
        hub=Hub("nyu-mll/glue", name, _GLUE_SPLITS),
        truncate=True,
        max_length=128,
    )
    return row._replace(**changes)


def commonsense_answers(row: Mapping[str, Any]) -> list[str]:
    """The answers that a row in LLM-Adapters' form allows, from the format that ends its instruction.

    >>> commonsense_answers({"instruction": "Is water wet? Answer format: true/false"})
    ['the correct answer is true', 'the correct answer is false']
    """
    words = row["instruction"].rpartition("Answer format:")[2].strip().split("/")
    return [f"the correct answer is {word.strip()}" for word in words]


def _commonsense(name: str) -> Task:
    """LLM-Adapters' form of a commonsense task (Hu et al. 2023, arXiv:2304.01933; github.com/AGI-Edgerunners).

    Its prompt is the instruction alone, without the frame ("Below is an instruction ...") that their script puts around
    it, and its answer is chosen by likelihood, where they generate a text and look for the answer in it.
    """
    splits = ("train", "dev", "test")
    return Task(
        name=name,
        kind="generation",
        inputs=("instruction",),
        target="output",
        metrics=("accuracy", "accuracy_norm"),
        files={split: ((f"{name}.{split}.jsonl",), (f"{split}.jsonl",)) for split in splits},
        holdout=0.1,  # published as train and test alone
        truncate=True,  # the beginning of a long question, as they cut at 256 tokens
        reported="test",
        choices=commonsense_answers,
    )


_COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")

_ROWS = (
    _glue(
        "cola",
        ("sentence",),
        (0, 1),
        metrics=("matthews", "accuracy"),
        files=_FILES | {"dev": (*_FILES["dev"], ("dev_in_domain.jsonl", "dev_out_of_domain.jsonl"))},
    ),
    _glue("sst2", ("sentence",), (0, 1)),
    # GLUE reports accuracy and F1 for both; accuracy leads, as in the tables of the LoRA paper.
    _glue(
        "mrpc",
        ("sentence1", "sentence2"),
        (0, 1),
        metrics=("accuracy", "f1"),
        aliases={"Quality": "label", "#1 String": "sentence1", "#2 String": "sentence2"},
    ),
    _glue(
        "qqp",
        ("question1", "question2"),
        (0, 1),
        metrics=("accuracy", "f1"),
        aliases={"is_duplicate": "label"},
    ),
    _glue(
        "stsb",
        ("sentence1", "sentence2"),
        None,
        kind="regression",
        target="score",
        metrics=("pearson", "spearman"),
        aliases={"label": "score"},
        holdout=0.1,  # the STS benchmark is also handed on as train and test alone
    ),
    _glue(
        "mnli",
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        files=_files(dev="dev_matched"),
        hub=Hub("nyu-mll/glue", "mnli", _MNLI_SPLITS),
        aliases={"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"},
    ),
    _glue("qnli", ("question", "sentence"), _NLI),
    _glue("rte", ("sentence1", "sentence2"), _NLI, max_length=256),  # 128 would cut one pair in eight
    _glue("wnli", ("sentence1", "sentence2"), (0, 1)),
    Task(
        name="banking77",
        kind="classification",
        inputs=("text",),
        target="category",
        hub=Hub("legacy-datasets/banking77", splits={"train": "train", "test": "test"}),
        aliases={"label": "category"},
        holdout=0.1,  # published as train and test alone; choosing the best step on test would not be a test
        truncate=True,
        max_length=128,
    ),
    Task(
        name="e2e",
        kind="generation",
        inputs=("mr",),
        target="ref",
        metrics=("bleu", "nist", "rouge_l", "cider"),
        hub=Hub("tuetschek/e2e_nlg", revision="refs/convert/parquet"),
        aliases={"refs": "ref", "meaning_representation": "mr", "human_reference": "ref"},
        prompt=e2e_prompt,
    ),
    Task(
        name="places",
        kind="generation",
        inputs=("attributes",),
        target="text",
        metrics=("slots", "bleu"),
        prompt=lambda row: f"{row['attributes']}.",
        made=places.rows,
        slots=places.slots,
        reported="test",
    ),
    Task(
        name="gsm8k",
        kind="generation",
        inputs=("question",),
        target="answer",
        metrics=("gsm8k", "gsm8k_last"),
        hub=Hub("openai/gsm8k", "main", {"train": "train", "test": "test"}),
        holdout=0.05,  # published as train and test alone
        prompt=lambda row: f"Question: {row['question']}\nAnswer:",
        max_length=1024,
        reported="test",
    ),
    *map(_commonsense, _COMMONSENSE),
    Task(
        name="sft",
        kind="generation",
        inputs=("prompt",),
        target="answer",
        metrics=(),
        chats=Chats(),
        max_length=1024,
        new_tokens=64,
    ),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}


def get_task(name: str) -> Task:
    """The row of that name.

    >>> get_task("rte").labels
    ('entailment', 'not_entailment')
    """
    if name in TASKS:
        return TASKS[name]
    close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"No task {name!r}{meant} Known: {', '.join(sorted(TASKS))}; for own data build a Task.")
