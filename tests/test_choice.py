"""Multiple choice by the likelihood of each answer: against transformers, and through the verbs."""

import json

import numpy as np
import pytest
import tiny
import transformers

from peftjax import cli, problem as problems
from peftjax.data import encode_choices, load_rows
from peftjax.problem import Evaluator, prepare
from peftjax.tasks import TASKS, Task, commonsense_answers

torch = pytest.importorskip("torch")

PETS = Task(
    "pets",
    "generation",
    inputs=("question",),
    target="answer",
    metrics=("accuracy", "accuracy_norm"),
    prompt=lambda row: f"{row['question']} :",
    choices=lambda row: row["options"],
)
ANSWERS = ["cat", "dog sat ran", "the red cat", "big"]


def _rows(n: int, seed: int = 0) -> list[dict]:
    rng, out = np.random.default_rng(seed), []
    for _ in range(n):
        options = rng.permutation(ANSWERS)[: rng.integers(2, 5)].tolist()
        question = " ".join(rng.choice(tiny.WORDS[:8], rng.integers(1, 6)))
        out.append({"question": question, "options": options, "answer": options[rng.integers(len(options))]})
    return out


def _prepared(at, family: str, task: Task = PETS, rows: list[dict] | None = None, **options):
    if not (at / family).is_dir():
        tiny.folder(at / family, family)
    tiny.write_rows(at / "dev.jsonl", rows or _rows(9))
    return prepare(str(at / family), task, str(at), need_train=False, **options)


@pytest.fixture(scope="module")
def at(tmp_path_factory):
    return tmp_path_factory.mktemp("choice")


def _by_transformers(folder, family: str, row: dict) -> np.ndarray:
    """log p of each answer, one at a time, without padding."""
    cls = transformers.T5ForConditionalGeneration if family == "t5" else transformers.LlamaForCausalLM
    model, tokenizer, out = cls.from_pretrained(folder).eval(), tiny.tokenizer(), []
    prompt = f"{row['question']} :"
    for answer in row["options"]:
        target = torch.tensor([tokenizer(answer, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            if family == "t5":
                start = torch.cat([torch.zeros(1, 1, dtype=torch.long), target[:, :-1]], 1)
                source = torch.tensor([tokenizer(prompt)["input_ids"]])
                logits = model(input_ids=source, decoder_input_ids=start).logits
            else:
                head = torch.tensor([[2, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
                logits = model(input_ids=torch.cat([head, target], 1)).logits[:, head.shape[1] - 1 : -1]
        out.append(torch.log_softmax(logits, -1).gather(2, target[..., None]).sum().item())
    return np.array(out)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_likeliest_answer_is_that_of_transformers(at, family):
    rows = _rows(9)
    problem = _prepared(at, family, rows=rows)
    logprobs = [_by_transformers(at / family, family, row) for row in rows]
    characters = [np.array([len(answer) for answer in row["options"]]) for row in rows]
    best = [int(x.argmax()) for x in logprobs]
    norm = [int((x / n).argmax()) for x, n in zip(logprobs, characters, strict=True)]
    assert best != norm, "the two differ on this data, or nothing is tested"
    evaluator = Evaluator(problem)
    assert evaluator.choose(problem.model.params) == {"accuracy": best, "accuracy_norm": norm}
    right = [row["options"].index(row["answer"]) for row in rows]
    scores = evaluator.scores(problem.model.params)
    assert scores["accuracy"] == pytest.approx(100 * np.mean(np.equal(best, right)))
    assert scores["accuracy_norm"] == pytest.approx(100 * np.mean(np.equal(norm, right)))
    assert list(scores) == ["loss", "accuracy", "accuracy_norm"]


def test_the_order_of_the_answers_does_not_matter(at):
    rows = [row | {"options": ANSWERS, "answer": "big"} for row in _rows(6, 1)]
    turned = [row | {"options": ANSWERS[::-1]} for row in rows]
    chosen = []
    for these in (rows, turned):
        problem = _prepared(at, "llama", rows=these)
        picks = Evaluator(problem).choose(problem.model.params)
        chosen.append([[row["options"][i] for row, i in zip(these, picks[m], strict=True)] for m in sorted(picks)])
    assert chosen[0] == chosen[1]


def test_of_equal_answers_the_first_is_taken_and_equal_prompts_stay_apart(at):
    """Words that the tokenizer does not know are one token, so that these answers are equally likely."""
    options = ["owl", "fox", "bee"]
    rows = [{"question": "the cat", "options": options, "answer": answer} for answer in ("owl", "owl", "bee", "owl")]
    problem = _prepared(at, "llama", rows=rows)
    assert len(problem.prompts) == 4
    evaluator = Evaluator(problem)
    assert evaluator.choose(problem.model.params) == {"accuracy": [0] * 4, "accuracy_norm": [0] * 4}
    assert evaluator.scores(problem.model.params)["accuracy"] == 75
    assert len(_prepared(at, "llama", rows=rows, eval_limit=2).prompts) == 2


@pytest.mark.parametrize("encodes", [False, True])
def test_examples_hold_every_answer_as_training_has_it(encodes):
    row = {"question": "the cat", "options": ["dog sat", "big"], "answer": "big"}
    (example,) = encode_choices(PETS, [row], tiny.tokenizer(), 64, for_encoder=encodes).examples
    ids = dict(zip(tiny.WORDS, range(4, 99), strict=False))
    context = [2, ids["the"], ids["cat"], ids[":"]]
    assert example.input_ids == ([*context, 3] if encodes else context)
    assert example.choices == [("dog sat", [ids["dog"], ids["sat"]]), ("big", [ids["big"]])]
    assert (example.label, example.references) == (1, ["big"])


def test_a_long_prompt_is_cut_from_the_left_and_counted_once():
    task = PETS._replace(truncate=True)
    rows = [{"question": "red blue cat", "options": ["big", "dog sat ran"], "answer": "big"}]
    rows += [rows[0] | {"question": "cat"}]
    encoded = encode_choices(task, rows, tiny.tokenizer(), 7)  # BOS, 4 of the prompt, 3 of the longer answer, EOS
    assert (encoded.truncated, encoded.longest) == (1, 9)
    assert tiny.tokenizer().decode(encoded.examples[0].input_ids).split() == ["[CLS]", "cat", ":"]
    assert [len(ids) for _, ids in encoded.examples[0].choices or []] == [1, 3]


def test_what_is_wrong_is_said(at):
    rows = _rows(2)
    for bad in ({"answer": "ran"}, {"options": ["cat"], "answer": "cat"}, {"options": ["cat", "cat"], "answer": "cat"}):
        with pytest.raises(ValueError, match=r"Row 2 of task 'pets' has the target .* expected two or more different"):
            _prepared(at, "llama", rows=[rows[0], rows[1] | bad])
    with pytest.raises(ValueError, match=r"has choices, so its kind is 'generation' and its metrics are among .*bleu"):
        _prepared(at, "llama", PETS._replace(metrics=("bleu",)))
    with pytest.raises(ValueError, match="longer than 6 tokens"):
        _prepared(at, "llama", max_length=6)


def test_commonsense_rows_are_read(tmp_path):
    row = {"instruction": "Is it?\n\nAnswer format: true/false", "input": "", "output": "the correct answer is false"}
    assert commonsense_answers(row)[1] == row["output"]
    tiny.write_rows(
        tmp_path / "boolq.train.jsonl", [row | {"instruction": f"{i}? {row['instruction']}"} for i in range(20)]
    )
    tiny.write_rows(tmp_path / "boolq.test.jsonl", [row])
    assert [len(load_rows(TASKS["boolq"], tmp_path, split)) for split in ("train", "dev", "test")] == [18, 2, 1]
    with pytest.raises(FileNotFoundError, match="no train file of task 'hellaswag'"):
        load_rows(TASKS["hellaswag"], tmp_path, "train")


def _arc(folder, name: str, n: int) -> None:
    """Rows whose answer is the word that the instruction repeats."""
    rng, rows = np.random.default_rng(n), []
    for _ in range(n):
        right = str(rng.choice(["cat", "dog"]))
        text = f"{right} {right} {' '.join(rng.choice(tiny.WORDS[2:8], 3))} Answer format: cat/dog"
        rows.append({"instruction": text, "input": "", "output": f"the correct answer is {right}", "answer": right})
    tiny.write_rows(folder / name, rows)


def _verbs(at, family: str, folder, monkeypatch) -> list[str]:
    monkeypatch.setattr(problems, "decoder", lambda *a: pytest.fail("a text was generated"))
    if not (at / family).is_dir():
        tiny.folder(at / family, family)
    _arc(folder, "arc_easy.train.jsonl", 20)
    _arc(folder, "arc_easy.test.jsonl", 8)
    return ["--model", str(at / family), "--task", "arc_easy", "--data", str(folder), "--buckets", "1"]


def test_compare_and_evaluate_score_alike_without_writing_a_text(at, tmp_path, capsys, monkeypatch):
    where, out = _verbs(at, "llama", tmp_path, monkeypatch), tmp_path / "out"
    cli.main(["compare", *where, "--steps", "3", "--batch-size", "8", "--methods", "lora", "--out", str(out)])
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    lora = next(r for r in results if r["trainable"])
    assert list(lora["scores"]) == ["loss", "accuracy", "accuracy_norm"]
    capsys.readouterr()
    (adapter,) = out.glob("runs/lora*/adapter.safetensors")
    cli.main(["evaluate", *where, "--adapter", str(adapter)])
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert printed == ", ".join(f"{k} {v:.4g}" for k, v in lora["scores"].items())


@pytest.mark.slow
def test_an_encoder_and_decoder_train_without_writing_a_text(at, tmp_path, monkeypatch):
    where, out = _verbs(at, "t5", tmp_path, monkeypatch), tmp_path / "out"
    cli.main(["train", *where, "--steps", "2", "--batch-size", "8", "--method", "ia3", "--out", str(out)])
    assert {"accuracy", "accuracy_norm"} < set(json.loads((out / "result.json").read_text())["scores"])
