"""The scripts of papers' tables: their rows against the survey's, grids that can be run, counts explained."""

import doctest
import functools
import importlib
import json
import re

import paper
import pytest
import yaml
from conftest import EXPERIMENTS, SHARED, needs_shared

from peftjax.grid import finals, number_of_runs, trials
from peftjax.methods import parse

SCRIPTS = {name: importlib.import_module(name) for name in paper.SCRIPTS}
TABLES = {name: script.TABLE for name, script in SCRIPTS.items()}
EMPTY = {"dylora_ranks"}  # of whose table nothing was seen


@functools.cache
def survey() -> dict:
    return yaml.safe_load((SHARED / "papers/tables.yaml").read_text())["methods"]


def as_printed(score) -> str:
    """A cell; of a log's, the metrics without the step."""
    if isinstance(score, dict):
        return "/".join(str(v) for k, v in score.items() if k != "last_step")
    return str(score)


@needs_shared
@pytest.mark.parametrize("name", TABLES)
def test_published_rows_are_the_survey_s(name):
    """Every row that was seen is there, cell by cell, and no other."""
    for key, ours in TABLES[name].rows.items():
        method, table = key.split("/")
        theirs = {
            (r["model"], r["setting"], r.get("trainable_params_published") or ""): {
                column: as_printed(score) for column, score in (r.get("scores") or {}).items() if score is not None
            }
            for r in survey()[method]["tables"][table]["rows"]
            if r.get("seen")
        }
        assert {r.name: dict(r.cells) for r in ours} == theirs
        assert len({r.name for r in ours}) == len(ours)


@pytest.mark.parametrize("name", TABLES)
def test_a_script_says_what_it_is(name):
    table, doc = TABLES[name], SCRIPTS[name].__doc__
    assert table.name == name
    assert bool(table.rows) == (name not in EMPTY)
    number = re.search(r"arXiv:\d{4}\.\d{5}", table.paper)
    assert number is not None
    assert number[0] in doc
    assert all(f"\n{word}" in doc for word in ("Measured", "Decided.", "Small:", "Paper:"))


@pytest.mark.parametrize("scale", ["paper", "small"])
@pytest.mark.parametrize("name", TABLES)
def test_grids_can_be_enumerated(name, scale):
    """Methods are written as they are read; every run has its settings; no rule is for nothing."""
    for grid in TABLES[name].grids[scale]:
        texts = [*grid.methods, *(m for rule in grid.rules for m in rule.methods), *(grid.search or _NONE).rates]
        assert [next(iter(parse(t))) for t in texts] == texts
        cells = [cell for cell, _ in finals(grid, lambda search: next(iter(search.candidates())))]
        assert len(cells) == number_of_runs(grid)[1] == len({cell.key for cell in cells})
        for rule in grid.rules:
            hit = [
                c
                for c in cells
                if c.task in (rule.tasks or grid.tasks)
                and c.model in (rule.models or grid.models)
                and c.method in (rule.methods or grid.methods)
            ]
            assert hit, rule
        runs = {(c.model, c.task) for c in cells}
        assert all(
            (p.model, p.task) in runs for p in grid.published if p.method in grid.methods and p.model in grid.models
        )


_NONE = type("NoSearch", (), {"rates": {}})


def test_the_small_grids_on_glue_share_their_runs():
    grids = [grid for table in TABLES.values() if table.out == "glue-small" for grid in table.grids["small"]]
    keys = {}
    for grid in grids:
        for (_, _, method), search in trials(grid).items():
            searched = (method, *sorted({c.task for c in search.cells}))
            assert keys.setdefault(searched, {c.key for c in search.cells}) == {c.key for c in search.cells}
    methods = {m for grid in grids for m in grid.methods}
    assert {"full", "fishmask(score='random')", "dylora(rank=8)", *(f"lora(rank={r})" for r in paper.RANKS)} <= methods


@functools.cache
def committed() -> dict[str, list[dict]]:
    lines = [json.loads(line) for line in (EXPERIMENTS / "results/counts/counts.jsonl").read_text().splitlines()]
    return {name: [r for r in lines if r["script"] == name] for name in TABLES}


@pytest.mark.parametrize("name", TABLES)
def test_counts_are_the_published_ones_or_explained(name):
    """In the committed file, which has all that the script lists."""
    table, records = TABLES[name], committed()[name]
    assert [paper.Count(*(r[k] for k in paper.Count._fields)) for r in records] == paper.listed_counts(table)
    for r in records:
        assert r["why"] == table.why.get((r["model"], r["setting"], r["printed"]), "")
        assert (r["agreement"] in ("equal", "not printed")) == (not r["why"]), r
    assert {(r["model"], r["setting"], r["printed"]) for r in records if r["why"]} == set(table.why)


AGAIN = (  # rows with a method or a convention of their own; `-m slow` counts all
    ("lora_glue", "roberta-base", "BitFit*"),
    ("lora_glue", "roberta-large", "LoRA (dagger)"),
    ("lora_e2e", "gpt2-medium", "FTTop2*"),
    ("lora_e2e", "gpt2-large", "PreLayer*"),
    ("fishmask_glue", "bert-large-cased-whole-word-masking", "FISH Mask, head counted"),
    ("child_tuning_glue", "bert-large", "Child-Tuning_D (HyPe run)"),
    ("adalora_glue", "deberta-v3-base", "AdaLoRA"),
    ("prompt_size", "t5-v1.1-small", "20 tokens"),
    ("dora_commonsense", "llama-3-8b", "DoRA-dagger r=16"),
)


@pytest.mark.parametrize(("name", "model", "setting"), AGAIN)
def test_committed_counts_are_those_of_the_configurations(name, model, setting):
    records = [r for r in committed()[name] if (r["model"], r["setting"]) == (model, setting)]
    assert records
    for r in records:
        assert paper.counted(TABLES[name], paper.Count(*(r[k] for k in paper.Count._fields))) == r


@pytest.mark.slow
def test_all_counts_again(tmp_path):
    paper.write_counts(tmp_path)
    for file in ("counts.jsonl", "counts.md"):
        there = (EXPERIMENTS / "results/counts" / file).read_text()
        assert (tmp_path / file).read_text() == there, "run python experiments/paper.py"


def test_lists_without_network(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["adalora_glue.py", "--scale", "paper", "--list", "--seeds", "1"])
    assert paper.main(TABLES["adalora_glue"], "") is None
    out = capsys.readouterr().out
    assert out.count("# ") == 8
    assert re.search(r"final  deberta-v3-base  cola  adalora\(.*orthogonality=0.5\)  rate 0.0005 .*\"epochs\": 25", out)
    assert "lora(rank=8, targets=['linear'])  0.3 x default, 1 x default, 3 x default; by cola" in out


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--seeds", "0"), "seeds must be at least 1; got 0"),
        (("--shard", "5/4"), "a shard is i/n with i from 1 to n; got 5/4"),
        (("--shard", "half"), "cannot read the shard 'half'"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path, monkeypatch, asked, said):
    monkeypatch.setattr("sys.argv", ["dylora_ranks.py", "--out", str(tmp_path), *asked])
    with pytest.raises(SystemExit, match=said):
        paper.main(TABLES["dylora_ranks"], "")


def test_runs_that_failed_are_made_again_when_asked(tmp_path, monkeypatch, capsys):
    asked = []
    records = [{"kind": "failed"}, {"kind": "run"}]
    monkeypatch.setattr(paper, "sweep", lambda grid, out, **how: asked.append(how) or records)
    for more in ([], ["--retry"]):
        monkeypatch.setattr("sys.argv", ["dylora_ranks.py", "--out", str(tmp_path), *more])
        done = paper.main(TABLES["dylora_ranks"], "")
        assert done is not None
        assert len(done.records) == 2
    assert [how["retry"] for how in asked] == [False, True]
    assert "2 runs are over, 1 of them failed; to make these again: --retry" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["setting | trainable\nLoRA | 1M", "setting | trainable | A\n# m\nLoRA | 1M"])
def test_a_row_that_does_not_fit(text):
    with pytest.raises(ValueError, match="a row needs a model before it"):
        paper.rows(text)


def test_a_column_that_does_not_fit():
    with pytest.raises(ValueError, match="epochs has 3 values; write one, or one for each of cola, rte"):
        paper.by_task("cola rte", epochs="1 2 3")


def test_metrics_of_glue_s_server():
    """F1 and Spearman where it is the test set that was scored."""
    found = {p.task: p.metric for p in SCRIPTS["adapter_glue"].LONG.published}
    assert (found["mrpc"], found["qqp"], found["stsb"], found["cola"]) == ("f1", "f1", "spearman", "matthews")


def test_steered_models_are_called_as_their_targets():
    script = SCRIPTS["proxy_tuning"]
    small, steered = next(iter(script.PAPER.models)), script.STEERED["paper"]
    names = {(m, script.called(alpha, small)) for m in steered.large for alpha in steered.alphas}
    names |= {(m, script.AS_IS) for m in steered.large}
    targets = {(p.model, p.method) for p in script.PAPER.published}
    assert names < targets
    assert {method for _, method in targets - names} == {"full"}


def test_doctests():
    assert doctest.testmod(paper).failed == 0
