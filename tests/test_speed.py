"""Whether the two sides of `experiments/speed.py` compute the same."""

import warnings

import pytest
from conftest import EXPERIMENTS, experiment

for name in ("torch", "peft"):
    pytest.importorskip(name)
warnings.filterwarnings("ignore", module="peft")
EXPERIMENT = EXPERIMENTS / "speed.py"
pytestmark = pytest.mark.skipif(not EXPERIMENT.is_file(), reason="the experiments are not here")


@pytest.fixture(scope="module")
def speed():
    return experiment("speed")


@pytest.fixture(scope="module")
def folders(speed, tmp_path_factory):
    """Tiny models and their folders."""
    sizes = {
        "llama": speed.Case(lambda: speed.llama(32, 48, 1, 4, 2, 31), "generation", 2, 9),
        "gpt2": speed.Case(lambda: speed.gpt2(64, 1, vocab_size=31), "generation", 2, 9),
        "bert": speed.Case(lambda: speed.bert(64, 1, vocab_size=31), "classification", 3, 9),
    }
    found = {}
    for family, case in sizes.items():
        found[family] = case, tmp_path_factory.mktemp(family)
        speed.write(case, "cpu", found[family][1])
    return found


CELLS = [("llama", m) for m in ("full", "lora", "dora", "prefix", "adalora", "ia3")]
CELLS += [("gpt2", "lora"), ("gpt2", "ia3"), ("bert", "dora"), ("bert", "ia3")]


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_both_sides_compute_the_same(speed, folders, family, method):
    """As many trained values, and the same losses in three steps, of which each depends on the updates before."""
    case, folder = folders[family]
    sides, record = speed.both(case, method, "cpu", folder, ("ours", "eager"))
    assert set(sides) == {"ours", "eager"}, record
    ours, theirs = record["losses"]["ours"], record["losses"]["eager"]
    assert len(ours) == speed.CHECKED
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert abs(ours[2] - ours[0]) > 1e-6  # else nothing trains
    assert record["trained"]["ours"] == record["trained"]["eager"]


def test_a_side_that_fails_has_a_reason(speed, folders):
    """PEFT gives no encoder a prefix, and ours is measured all the same."""
    case, folder = folders["bert"]
    sides, record = speed.both(case, "prefix", "cpu", folder, ("ours", "eager"))
    assert set(sides) == {"ours"}
    assert "a prefix of bert is not the same in PEFT" in record["sides"]["eager"]["why"]


def test_sides_that_differ_are_not_timed(speed):
    record = {"trained": {"ours": 3, "eager": 3}, "losses": {"ours": [1.0, 0.9], "eager": [1.0, 0.9001]}}
    speed.check(record, 2e-4)
    with pytest.raises(speed.Differs, match=r"differ by up to 1\.1e-04"):
        speed.check(record, 1e-5)
    with pytest.raises(speed.Differs, match="different numbers"):
        speed.check(record | {"trained": {"ours": 3, "eager": 4}}, 1.0)


def test_the_report_has_what_was_measured(speed, tmp_path):
    """Ratios are of turns in pairs, and a side that failed says why."""
    times = {"ours": {"seconds": [1.0, 2.0, 4.0], "compile_seconds": 3.0, "peak_bytes": 5e6}}
    times |= {"eager": {"seconds": [2.0, 3.0, 16.0], "peak_bytes": 8e6}, "compiled": {"why": "no compiler"}}
    facts = {"case": "tiny", "scale": "cpu", "dtype": "float32", "device": "a CPU", "versions": {"jax": "0"}}
    facts |= {"threads": {"torch": 1, "xla": 1}, "load": [0.1, 0.2], "rows": 2, "length": 4}
    losses = {"ours": [1.0], "eager": [1.001]}
    record = facts | {"method": "lora", "sides": times, "losses": losses, "trained": {"ours": 9}, "flops": 8e9}
    record |= {"rate": {"xla": 8e9, "torch": 4e9}}
    assert speed.ratios(record, "eager") == pytest.approx((1.75, 2.0, 3.0))
    text = speed.report([record, facts | {"method": "dora", "why": "out of memory"}], speed.Options(), "cpu")
    assert "**2.00** (1.75-3.00)" in text
    assert "| 4 | 3 | - |" in text  # tokens a second
    assert "lora, compiled: no compiler" in text
    assert "dora: out of memory" in text
    speed.plot([record], tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 1000
