"""Templates: every one says what its row says, in words that stand among its choices."""

import json
import re

import pytest
from conftest import SHARED, needs_shared

from peftjax.data import labels_of, load_rows
from peftjax.tasks import TASKS, Task
from peftjax.templates import TEMPLATES, Template, read_templates, templates_of

QUESTION = "Please choose the correct answer to the question: Who barks?\n\n"
THREE = "Answer1: the cat Answer2: the dog Answer3: Answers in a book\n\nAnswer format: answer1/answer2/answer3"
MULTIPLE = {"instruction": QUESTION + THREE, "output": "the correct answer is answer2", "answer": "answer2"}
PAIR = {"sentence1": "All dogs bark.", "sentence2": "Rex the dog barks."}
ROWS = {  # task -> rows, each label among them, with the words that every template's input and target must hold
    "sst2": [{"sentence": "fine soup ", "label": i} for i in (0, 1)],
    "cola": [{"sentence": "Soup the ate.", "label": i} for i in (0, 1)],
    "rte": [PAIR | {"label": x} for x in ("entailment", "not_entailment", 0, 1)],
    "mnli": [
        {"premise": "All dogs bark.", "hypothesis": "Rex barks.", "label": x}
        for x in ("entailment", "neutral", "contradiction", 0, 1, 2)
    ],
    "qnli": [{"question": "Who barks?", "sentence": "All dogs bark.", "label": x} for x in ("entailment", "1")],
    "qqp": [{"question1": "Who barks?", "question2": "What is it that barks?", "label": x} for x in (0, 1, "0", "1")],
    "mrpc": [PAIR | {"label": i} for i in (0, 1)],
    "stsb": [PAIR | {"score": s} for s in (0.0, 2.6, 3.0, "5.000")],
    "wnli": [PAIR | {"label": i} for i in (0, 1)],
    "banking77": [{"text": "Where is my card?", "category": "card_arrival"}],
    "boolq": [
        {
            "instruction": f"Please answer the following question with true or false, question: {q}\n\n"
            "Answer format: true/false",
            "answer": a,
        }
        for q, a in (("do dogs bark?", "true"), ("do cats bark", "false"))
    ],
    "piqa": [
        {
            "instruction": "Please choose the correct solution to the question: bark\n\nSolution1: be a cat \n\n"
            "Solution2: be a dog\n\nAnswer format: solution1/solution2",
            "answer": f"solution{i}",
        }
        for i in (1, 2)
    ],
    "social_i_qa": [MULTIPLE],
    "winogrande": [
        {
            "instruction": "Please choose the correct answer to fill in the blank to complete the given sentence: "
            "Rex bit Tom and _ barked.\n\nOption1: Rex Option2: Tom Answer format: option1/option2",
            "answer": f"option{i}",
        }
        for i in (1, 2)
    ],
    "hellaswag": [
        {
            "instruction": "Please choose the correct ending to complete the given sentence: Roofs: A man sits on a "
            "roof. he\n\nEnding1: sings. Ending2: falls asleep. Ending3: lays tiles. Ending4: is a dog.\n\n"
            "Answer format: ending1/ending2/ending3/ending4",
            "answer": f"ending{i}",
        }
        for i in (1, 2, 3, 4)
    ],
    "arc_easy": [MULTIPLE],
    "arc_challenge": [MULTIPLE],
    "openbookqa": [
        MULTIPLE | {"instruction": MULTIPLE["instruction"].replace("\n\nAnswer f", " Answer4: Tom\n\nAnswer f")}
    ],
    "gsm8k": [{"question": "2 dogs, 4 legs each?", "answer": "There are 2*4 = <<2*4=8>>8 legs.\n#### 8"}],
    "e2e": [{"mr": "name[The Dog], area[riverside]", "ref": "The Dog is by the river."}],
    "places": [{"attributes": "name: Old Dog; kind: inn", "text": "The Old Dog is an inn."}],
}


@pytest.mark.parametrize("task", ROWS)
def test_every_template_of_a_task(task):
    templates = TEMPLATES[task]
    assert len(templates) >= 4
    assert len({t.input for t in templates}) == len({t.name for t in templates}) == len(templates)
    assert "reversed" not in templates[0].name
    for t in templates:
        rendered = [t.render(row) for row in ROWS[task]]
        assert any(r.input and r.target for r in rendered)
        for r in rendered:
            assert not re.search(r"[{}]|_card|label|None", r.input.replace("Label", "")), r.input
            assert r.choices is None or (r.target in r.choices and len(r.choices) > 1)
        if "reversed" not in t.name and t.choices is not None:  # another label is another answer
            few = {str(row.get("label", row.get("answer", row.get("score")))) for row in ROWS[task]}
            assert len({r.target for r in rendered}) >= (len(few) + 1) // 2


def test_the_table_covers_the_tasks():
    assert set(ROWS) == set(TEMPLATES)
    assert {name for name, task in TASKS.items() if task.chats is None} <= set(TEMPLATES)
    assert templates_of(TASKS["rte"]) == TEMPLATES["rte"]
    with pytest.raises(ValueError, match=r"no template for task 'mine'.*places"):
        templates_of(Task("mine", "generation", ("a",), "b"))


def by_name(task, name):
    return next(t for t in TEMPLATES[task] if t.name == name)


def test_columns_are_read_out_of_the_row():
    letters = by_name("arc_easy", "letters").render(MULTIPLE)
    assert letters.input.splitlines()[:4] == ["Who barks?", "A) the cat", "B) the dog", "C) Answers in a book"]
    assert (letters.target, letters.choices) == ("B", ("A", "B", "C"))
    assert by_name("arc_easy", "plain").render(MULTIPLE).choices == ("answer1", "answer2", "answer3")
    assert by_name("arc_challenge", "in words").render(MULTIPLE).target == "the dog"
    whole = by_name("winogrande", "whole").render(ROWS["winogrande"][1])
    assert whole.target == "Rex bit Tom and Tom barked."
    assert whole.choices == ("Rex bit Tom and Rex barked.", "Rex bit Tom and Tom barked.")
    ends = by_name("hellaswag", "goes on").render(ROWS["hellaswag"][2])
    assert ends == (
        "Roofs: A man sits on a roof. he",
        "lays tiles.",
        ("sings.", "falls asleep.", "lays tiles.", "is a dog."),
    )
    assert by_name("piqa", "how").render(ROWS["piqa"][0]).choices == ("be a cat", "be a dog")
    steps = by_name("gsm8k", "steps").render(ROWS["gsm8k"][0])
    assert steps.target == "There are 2*4 = 8 legs.\n#### 8"
    assert by_name("gsm8k", "number only").render(ROWS["gsm8k"][0]).target == "8"
    assert by_name("gsm8k", "question").render(ROWS["gsm8k"][0]).target == ROWS["gsm8k"][0]["answer"]
    assert by_name("stsb", "decimal").render(ROWS["stsb"][3]).target == "5.0"
    assert by_name("e2e", "facts reversed").render(ROWS["e2e"][0]).target == "name[The Dog], area[riverside]"


def test_a_reversed_template_applies_only_where_it_makes_sense():
    t = by_name("mrpc", "rewrite reversed")
    no, yes = (t.render(row) for row in ROWS["mrpc"])
    assert no.input == ""
    assert yes.input.endswith("All dogs bark.")
    assert yes.target == "Rex the dog barks."


@needs_shared
def test_on_the_data_itself():
    data = SHARED / "data"
    rows = {
        "sst2": "glue/sst2",
        "cola": "glue/cola",
        "rte": "glue/rte",
        "mrpc": "glue_noncommercial/mrpc",
        "stsb": "glue/stsb",
        "banking77": "banking77",
        "e2e": "e2e",
    }
    read = {task: load_rows(TASKS[task], data / folder, "train")[:40] for task, folder in rows.items()}
    for task in ("boolq", "piqa", "social_i_qa", "winogrande", "arc_easy", "arc_challenge", "openbookqa"):
        lines = (data / "commonsense" / f"{task}.test.jsonl").read_text().splitlines()[:40]
        read[task] = [json.loads(line) for line in lines]
    for task, some in read.items():
        for t in TEMPLATES[task]:
            for r in map(t.render, some):
                assert r.choices is None or r.target in r.choices
                assert "Answer format" not in r.input or t.name == "plain"
                assert (r.input and r.target) or "reversed" in t.name
    labels = labels_of(TASKS["banking77"], load_rows(TASKS["banking77"], data / "banking77", "train"))
    choices = TEMPLATES["banking77"][0].render(read["banking77"][0]).choices
    assert sorted(choices) == sorted(x.replace("_", " ").lower() for x in labels)


# Templates of one's own


OWN = """
reviews:
  target: "{{ label }}"
  choices: bad ||| good
  words: {label: {0: bad, 1: good}}
  columns: {first: 'text.split(" ")[0]', loud: first | upper}
  templates:
    plain: "Review: {{ text }}"
    shout: {input: "{{ loud }}!"}
    write reversed: {input: "Write a {{ label }} review.", target: "{{ text }}", choices: null}
"""


def test_a_file(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    plain, shout, write = read_templates(file)["reviews"]
    row = {"text": "Fine soup", "label": "1"}
    assert plain.render(row) == ("Review: Fine soup", "good", ("bad", "good"))
    assert shout.render(row).input == "FINE!"
    assert write.render(row) == ("Write a good review.", "Fine soup", None)
    assert plain.render({"text": "Fine soup", "label": "good"}).target == "good"  # a word already


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("reviews:", "reviews: [", "is no YAML"),
        ("0: bad, 1: good", "0: no, 1: yes", r"reviews.*plain.*got False.*quotes"),
        ("  templates:", "  Templates:", "reviews.*expected `templates`, written {NAME: INPUT}, beside `target`"),
        ("{input: ", "{inputs: ", "shout.*'inputs' is none of input, target"),
        ('  target: "{{ label }}"\n', "", "plain.*`target` must be a text; got None"),
        ("choices: bad ||| good", "choices: [bad, good]", "`choices` must be one text"),
        ("words: {label: {0: bad, 1: good}}", "words: [a]", "`words` must be a mapping"),
        ("loud: first | upper", "loud: 1", "`columns` must map names to Jinja"),
        ('"Review: {{ text }}"', "7", "plain.*expected its input"),
        (OWN, "", "expected tasks"),
    ],
)
def test_a_file_that_is_none(tmp_path, before, after, message):
    file = tmp_path / "own.yaml"
    assert before in OWN
    file.write_text(OWN.replace(before, after, 1))
    with pytest.raises(ValueError, match=message) as e:
        read_templates(file)
    assert str(file) in str(e.value)


@pytest.mark.parametrize(
    ("source", "row", "message"),
    [
        ("{{ texts }}", {"text": "a"}, r"'mine': 'texts' is undefined; the row has the columns \['text'\]"),
        ("{{ text", {"text": "a"}, "'mine' is no Jinja"),
        ("{{ text / 2 }}", {"text": "a"}, "'mine' failed: unsupported operand"),
        ("{{ late }}", {"text": "a"}, "'mine': 'lost' is undefined"),
        ("{{ label }}", {"label": 3}, "'mine' has no word for label 3; it has some for 0, 1"),
        ("{{ text.__class__.__mro__ }}", {"text": "a"}, "'mine' failed: access to attribute '__class__'.*unsafe"),
    ],
)
def test_a_template_that_fails(source, row, message):
    template = Template("mine", source, "x", None, {"label": {0: "a", 1: "b"}}, {"late": "lost"})
    with pytest.raises(ValueError, match=message):
        template.render(row)


def test_a_column_is_computed_only_where_it_is_used():
    assert Template("mine", "{{ text }}", "x", columns={"late": "lost + 1"}).render({"text": "a"}).input == "a"
