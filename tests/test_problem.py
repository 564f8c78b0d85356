"""What a problem is made of: the split to choose on and the split to report, and texts that fit the model."""

import numpy as np
import pytest
import tiny
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.metrics import log_loss, mean_squared_error

from peftjax import hub
from peftjax.checkpoint import load_adapter
from peftjax.grid import Grid, Rule
from peftjax.methods import chain, head, lora
from peftjax.problem import Evaluator, prepare, with_head_of_seed, with_prior
from peftjax.run import Entry, configuration, run
from peftjax.sweep import sweep
from peftjax.train import Settings
from peftjax.tree import flatten, update


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


CLASSIFIERS = ("bert", "roberta", "deberta", "t5")


def _silent(model):
    """The model without its head's kernel: what is left of the logits is the bias."""
    kernel = [s for s in model.sites if s.kind == "head"][-1].path
    return model._replace(params=update(model.params, {kernel: 0 * flatten(model.params)[kernel]}))


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize(("task", "sense"), [("sst2", "classes"), ("stsb", "scores")])
def test_a_head_at_its_prior_answers_what_the_labels_alone_say(family, task, sense, tmp_path):
    """Against scikit-learn's dummy estimators."""
    folder = str(tiny.folder(tmp_path / "model", family))
    problem = prepare(folder, task, str(tiny.data(tmp_path / task, task)), train_limit=9, head_prior=True)
    labels = [e.label for e in problem.train]
    assert len(labels) == 9
    assert labels.count(labels[0]) not in (0, 9), "all alike"
    model = _silent(problem.model)
    rows = np.zeros((len(problem.dev), 1))
    theirs = (DummyClassifier() if sense == "classes" else DummyRegressor()).fit(np.zeros((9, 1)), labels)
    truth = [e.label for e in problem.dev]
    if sense == "classes":
        expected = log_loss(truth, theirs.predict_proba(rows), labels=[0, 1])
    else:
        expected = mean_squared_error(truth, theirs.predict(rows))
    assert Evaluator(problem).on_dev(model.params)["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_head_of_every_seed_starts_there(tmp_path):
    folder, data = str(tiny.folder(tmp_path / "model", "bert")), str(tiny.data(tmp_path / "stsb", "stsb"))
    problem = prepare(folder, "stsb", data, head_prior=True)
    heads = [with_head_of_seed(problem, seed).model.params["classifier"] for seed in (0, 1)]
    mean = np.mean([e.label for e in problem.train])
    assert [float(h["bias"][0]) for h in heads] == pytest.approx([mean, mean])
    assert not np.array_equal(heads[0]["kernel"], heads[1]["kernel"])
    grid = Grid(
        models={"bert": folder},
        tasks={"stsb": data},
        methods=("head",),
        settings={"steps": 1, "batch_size": 24, "learning_rate": 1e-9},
        rules=(Rule(options={"head_prior": True}, tasks=("stsb",)),),
    )
    (record,) = [r for r in sweep(grid, tmp_path / "out") if r["kind"] == "run"]
    variance = np.var([e.label for e in problem.train])
    assert record["history"][0]["loss"] == pytest.approx(variance, rel=0.2), "not the loss around the mean"


def test_a_class_without_rows_is_not_impossible(tmp_path):
    problem = prepare(str(tiny.folder(tmp_path / "model", "bert")), "sst2", str(tiny.data(tmp_path / "sst2", "sst2")))
    bias = with_prior(problem.model, [1, 1, 1]).params["classifier"]["bias"]
    np.testing.assert_allclose(np.exp(bias), [0.5 / 3.5, 3 / 3.5], rtol=1e-6)


def test_a_prior_needs_a_new_head_with_a_bias(tmp_path):
    sst2, e2e = (str(tiny.data(tmp_path / task, task)) for task in ("sst2", "e2e"))
    llama = str(tiny.folder(tmp_path / "llama", "llama"))
    with pytest.raises(ValueError, match="e2e is a generation task"):
        prepare(llama, "e2e", e2e, head_prior=True)
    with pytest.raises(ValueError, match="head, score, has no bias"):
        prepare(llama, "sst2", sst2, head_prior=True)
    plain = prepare(str(tiny.folder(tmp_path / "bert", "bert")), "sst2", sst2)
    trained = hub.save(plain.model, plain.model.params, tmp_path / "trained", plain.tokenizer)
    with pytest.raises(ValueError, match="has a trained head; leave it out, or write fresh_head=True"):
        prepare(str(trained), "sst2", sst2, head_prior=True)
    prepare(str(trained), "sst2", sst2, head_prior=True, fresh_head=True)


def test_a_prior_is_part_of_the_configuration_and_of_what_is_saved(tmp_path):
    folder, data = str(tiny.folder(tmp_path / "model", "bert")), str(tiny.data(tmp_path / "stsb", "stsb"))
    plain, begun = prepare(folder, "stsb", data), prepare(folder, "stsb", data, head_prior=True)
    settings = Settings(epochs=1, batch_size=8)
    method = chain(lora(rank=2), head())
    assert configuration(plain, method, settings) != configuration(begun, method, settings)
    result = run(begun, Entry("lora", method), settings, tmp_path / "out")
    alone = prepare(folder, "stsb", data, need_train=False, head_prior=True)
    params = load_adapter(tmp_path / "out/adapter.safetensors", alone.model).params
    assert Evaluator(alone).scores(params)["loss"] == pytest.approx(result["scores"]["loss"])


def test_a_prior_of_scores_below_zero(tmp_path):
    problem = prepare(str(tiny.folder(tmp_path / "model", "bert")), "stsb", str(tiny.data(tmp_path / "stsb", "stsb")))
    assert with_prior(problem.model, [-3.0, 1.0]).params["classifier"]["bias"].tolist() == [-1.0]
