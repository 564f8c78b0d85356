"""What a problem is made of: the split to choose on and the split to report, and texts that fit the model."""

import pytest
import tiny

from peftjax.methods import lora
from peftjax.problem import Evaluator, prepare
from peftjax.run import Entry, run
from peftjax.train import Settings


def _with_test_split(at, task):
    folder = tiny.data(at / task, task)
    tiny.write_rows(folder / "test.jsonl", tiny.rows(task, 12, seed=7))
    return str(tiny.folder(at / "model", "llama")), str(folder)


def test_the_best_step_is_chosen_on_dev_and_the_score_is_of_test(tmp_path):
    model, data = _with_test_split(tmp_path, "e2e")
    problem = prepare(model, "e2e", data, eval_split="test", max_new_tokens=4)
    assert problem.scored is not None
    assert problem.dev != problem.scored
    assert problem.dev == prepare(model, "e2e", data, max_new_tokens=4).dev
    result = run(problem, Entry("lora", lora(rank=2)), Settings(epochs=1, batch_size=8), tmp_path / "out")
    evaluation = next(r for r in result["history"] if "eval" in r)
    assert result["scores"]["loss"] != evaluation["eval"]["loss"], "the reported loss is not dev's"
    alone = prepare(model, "e2e", data, eval_split="test", need_train=False, max_new_tokens=4)
    assert alone.dev == problem.scored
    base = Evaluator(alone).on_dev(alone.model.params)["loss"]
    assert result["scores"]["loss"] < base


def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path):
    """A lookup beyond the table would be clamped to its last row without a word."""
    model = tiny.folder(tmp_path / "model", "llama", vocab_size=12)
    with pytest.raises(ValueError, match=r"gives token ids up to \d+, but the model has 12 of them"):
        prepare(str(model), "e2e", str(tiny.data(tmp_path / "e2e", "e2e")))


def test_prompts_obey_the_limits(tmp_path):
    model, data = _with_test_split(tmp_path, "e2e")
    with pytest.raises(ValueError, match="new tokens leave no room for a prompt"):
        prepare(model, "e2e", data, max_new_tokens=10_000)
