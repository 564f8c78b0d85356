"""The memory plan: that it is what the step takes, what it is made of, where it comes from, and what it refuses."""

import functools
import importlib.util
import json
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings as examples, strategies as st

from peftjax import devices, hub, memory
from peftjax.compare import set_up
from peftjax.devices import DEVICES, Device
from peftjax.loop import NonFinite, Run, fit, fit_together
from peftjax.memory import Case, DoesNotFit, Plan, abstract_batch, check, largest_batch, lay_out, plan, survey, variants
from peftjax.methods import full, lora, lora_fa, parse, vera
from peftjax.problem import objective
from peftjax.train import Settings
from peftjax.tree import count, nbytes

HERE = Device("a small device", "cpu", 10**9)
BF16 = {"dtype": jnp.dtype("bfloat16"), "param_dtype": jnp.dtype("bfloat16")}


def case_of(family="llama", method=None, rows=4, length=16, kind="generation", settings=None, options=None, **changes):
    """A case of a tiny model."""
    task = "generation" if kind == "generation" else "classification"
    describe = functools.partial(hub.from_config, tiny.config(family, **changes), task, seed=None)
    batch = functools.partial(abstract_batch, kind=kind, rows=rows, length=length)
    settings = settings or Settings(batch_size=rows)
    return Case(describe, lambda _: method or lora(rank=2), batch, kind, settings, options or {})


@pytest.fixture
def cpu():
    return devices.find("cpu")


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return tiny.problem(tmp_path_factory.mktemp("memory"), "llama", "e2e", max_buckets=1)


@pytest.mark.parametrize("method", [lora(rank=2), full(), vera(rank=3)], ids=["lora", "full", "vera"])
@pytest.mark.parametrize("layout", ["loop", "scan"])
def test_the_plan_is_that_of_the_step_that_runs(problem, cpu, method, layout):
    """`fit` compiles the step on arrays; the plan knew its peak from shapes. VeRA's shared arrays count once."""
    settings = Settings(batch_size=8, steps=1, layout=layout)
    batch = problem.largest_batch(8)
    params = method.init(jax.random.key(0), problem.model.params, problem.model.sites)
    fitted = fit(params, method, objective(problem), lambda i: iter([batch]), 1, settings)
    describe = functools.partial(hub.from_config, problem.model.hf_config, "generation", seed=None)
    found = plan(Case(describe, lambda _: method, lambda _: batch, "generation", settings), cpu)
    assert found.peak == fitted.peak_bytes
    assert found.exact


def test_parts_are_those_of_the_arrays(cpu):
    case = case_of(options=BF16)
    model, found = case.describe(**BF16), plan(case, cpu)
    assert found.frozen == nbytes(model.params) == 2 * count(model.params)
    trained = 2 * (16 * 2 + 2 * 16) + 2 * (16 * 2 + 2 * 8)  # queries and values (2 of 4 heads) of two layers
    assert found.trainable == found.gradients == 4 * trained
    assert 8 * trained <= found.optimizer < 8 * trained + 64  # two moments, and the counts
    assert found.peak == sum(getattr(found, part) for part in memory.COLUMNS[:-1])
    assert found.held == found.peak - found.activations
    assert found.fits


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_plan_of_several_runs_is_that_of_their_program(problem, cpu, lanes):
    """LoRA-FA's frozen A is each run's own; the base is held once."""
    method, settings = lora_fa(rank=2), [Settings(batch_size=8, steps=1, seed=i) for i in range(3)]
    batch = problem.largest_batch(8)
    model = problem.model
    runs = [
        Run(method.init(jax.random.key(i), model.params, model.sites), s, lambda i: iter([batch]))
        for i, s in enumerate(settings)
    ]
    fitted = fit_together(runs, method, objective(problem), 1, lanes=lanes)
    describe = functools.partial(hub.from_config, model.hf_config, "generation", seed=None)
    one = Case(describe, lambda _: method, lambda _: batch, "generation", settings[0])
    found = plan(one._replace(runs=3, lanes=lanes), cpu)
    assert {f.peak_bytes for f in fitted if not isinstance(f, NonFinite)} == {found.peak}
    alone = plan(one, cpu)
    assert found.trainable == 3 * alone.trainable
    assert found.frozen - alone.frozen == 2 * (alone.frozen - nbytes(model.params)) > 0


def test_runs_that_do_not_fit_go_in_turn_or_in_groups(cpu, monkeypatch):
    gpu = Device("a small device", "cuda", 10**6)
    asked = []

    def of(room):
        def fake_plan(case, device):
            asked.append((case.runs, case.lanes))
            return fake(3 * case.runs + 10 * case.lanes, room)

        monkeypatch.setattr(memory, "plan", fake_plan)
        monkeypatch.setattr(memory, "_surely_fits", lambda step, device: False)
        asked.clear()
        return memory.room_for(case_of(), gpu, 6)

    assert of(78) == (6, 6)
    assert of(77) == (6, 3)
    assert of(30) == (6, 1)
    assert asked == [(6, 6), (6, 3), (6, 2), (6, 1)]
    assert of(20) == (3, 1)
    assert of(12) == (1, 1)  # what does not fit alone is refused before
    assert memory.room_for(case_of(), gpu._replace(memory=1000), 4) == (1, 1)
    monkeypatch.undo()
    assert memory.room_for(case_of(), cpu, 4) == (4, 1)
    assert memory.room_for(case_of(), cpu, 4, lanes=3) == (4, 3)
    much = case_of(method=full(), vocab_size=300_000)
    assert memory.room_for(much, cpu, 4) == (1, 1)
    assert memory.room_for(much, cpu, 4, lanes=1) == (4, 1)
    held = [lay_out(case_of()._replace(runs=n)).held for n in (2, 4)]
    assert memory.room_for(case_of(), cpu._replace(memory=held[1] - 1), 4)[0] < 4


def test_nf4_is_counted_by_its_codes():
    base, codes = lay_out(case_of()).frozen, lay_out(case_of(options={"quantize": "nf4"})).frozen
    model = case_of().describe()
    linear = sum(np.prod(s.shape) for p, s in hub.flatten(model.params).items() if "_proj" in p)
    assert base - codes > 0.8 * 4 * linear  # 4.5 bits and padding to blocks of 64, instead of 32 bits


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("t5", "generation"), ("gpt2", "regression")])
def test_batches_of_every_kind(family, kind, cpu):
    labels = {"classification": 2, "regression": 1}.get(kind)
    case = case_of(family, full(), kind=kind)
    case = case._replace(describe=functools.partial(case.describe, labels=labels))
    assert plan(case, cpu).peak > lay_out(case).held


def test_more_rows_need_more_and_accumulation_less(cpu):
    few, many = (plan(case_of(rows=rows, length=32), cpu).peak for rows in (8, 64))
    parts = plan(case_of(rows=64, length=32, settings=Settings(batch_size=64, accumulate=8)), cpu).peak
    assert few < parts < many


def fake(peak, room=1000, activations=0):
    device = Device("fake", "cpu", room)
    return Plan(device, "nobody", True, 0, 0, 0, 0, activations, peak, 0.0, None, 0.0, "float32")


@examples(max_examples=200, deadline=None)
@given(
    st.integers(0, 900), st.integers(1, 400), st.integers(1, 60), st.lists(st.integers(0, 30), min_size=0, max_size=20)
)
def test_the_largest_batch_is_the_largest(held, each, start, bumps):
    """Against trying every size, for peaks that grow unevenly."""

    def peak(n):
        return held + each * n + sum(bumps[:n])

    asked = []

    def plan_of(n):
        asked.append(n)
        return fake(peak(n), activations=peak(n) - held)

    wanted = max((n for n in range(1, 1001) if peak(n) <= 1000), default=0)
    rows, found = largest_batch(plan_of, start)
    assert rows == wanted
    assert (found is None) == (wanted == 0)
    assert len(asked) == len(set(asked)) <= 20


def test_roofline():
    """The slower of FLOPs and bytes; unknown without a rate."""
    h200 = DEVICES["h200"]
    assert fake(0)._replace(device=h200, flops=989.4e12, dtype="bfloat16").seconds == pytest.approx(1)
    slow = fake(0)._replace(device=h200, flops=1.0, traffic=9600e9, dtype="float32")
    assert slow.seconds == pytest.approx(2)
    assert fake(0).seconds is None


def test_what_plainly_fits_is_not_compiled(monkeypatch):
    monkeypatch.setattr(memory, "plan", None)
    check(case_of(), HERE, "lora")


def test_what_cannot_fit_is_refused_with_what_would(cpu):
    case = case_of(length=64, rows=32, settings=Settings(batch_size=32), num_hidden_layers=4)
    needs = plan(case, cpu).peak
    small = cpu._replace(memory=needs // 2)
    with pytest.raises(
        DoesNotFit, match=r"^lora needs \d+\.?\d* MB at its peak, and .* it would fit with --remat block"
    ):
        check(case, small, "lora")
    held = lay_out(case).held
    with pytest.raises(DoesNotFit, match="before any activation"):
        check(case, cpu._replace(memory=held // 2), "lora")
    with pytest.raises(DoesNotFit, match=r"not fit even with --remat block --accumulate 32 .* choose a smaller model"):
        check(case, cpu._replace(memory=1000), "lora")
    check(case, cpu._replace(memory=needs), "lora")


def test_variants_change_what_they_say():
    case = case_of(settings=Settings(batch_size=4))
    found = dict(variants(case))
    assert next(iter(found)) == "--remat block"
    *_, last, inside = found.values()
    assert inside.settings.update == "backward"
    assert last.settings.accumulate == 4
    assert last.options["quantize"] == "nf4"
    assert last.options["dtype"] == jnp.bfloat16


def test_advice_for_an_update_within_the_backward_pass(cpu):
    """It takes no accumulation; the others are tried."""
    settings = Settings(batch_size=4, update="backward", clip=None)
    case = case_of(method=full(), settings=settings)
    assert not any("--accumulate" in flags for flags, _ in variants(case))
    with pytest.raises(DoesNotFit, match="full needs"):
        check(case, cpu._replace(memory=1000), "full")


def test_a_run_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, call):
    """The folder has no weights, and nobody notices."""
    tiny.folder(tmp_path / "llama", "llama")
    (tmp_path / "llama/model.safetensors").unlink()
    tiny.data(tmp_path / "e2e", "e2e")
    monkeypatch.setattr(devices, "host_memory", lambda: 50_000)
    run = ("--model", tmp_path / "llama", "--task", "e2e", "--data", tmp_path / "e2e", "--out", tmp_path / "out")
    status, _, error = call("train", *run, "--method", "lora")
    assert status == 1
    assert re.match(r"error: lora needs \d+\.?\d* MB at its peak, and CPU of this machine has 0\.05 MB", error)
    monkeypatch.undo()
    status, _, error = call("train", *run, "--method", "lora")
    assert "holds no model.safetensors" in error


def test_describe_needs_a_config_alone(tmp_path):
    whole = hub.load(tiny.folder(tmp_path / "bert", "bert"), "classification", labels=3)
    only = tmp_path / "sizes.json"
    only.write_text((tmp_path / "bert/config.json").read_text())
    for where in (tmp_path / "bert", only):
        model = hub.describe(where, "classification", labels=3)
        assert jax.tree.map(np.shape, model.params) == jax.tree.map(np.shape, whole.params)
        assert model.sites == whole.sites
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        hub.describe(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_not_tied_is_described(tmp_path, tied):
    """transformers 5 ties T5's head whatever config.json says."""
    changes = {} if tied else {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
    config = tiny.config("t5", **changes)
    config.tie_word_embeddings = tied
    made = hub.from_config(config, "generation", seed=0)
    hub.save(made, tiny.roughen(made.params), tmp_path, tiny.tokenizer())
    model = hub.describe(tmp_path, "generation")
    assert jax.tree.map(np.shape, model.params) == jax.tree.map(np.shape, hub.load(tmp_path, "generation").params)
    assert ("lm_head" in model.params) is not tied


def test_the_command_prints_the_table_and_json(call, tmp_path):
    status, out, _ = call("memory", "--method", "lora(rank=4),full", "--device", "cpu", "--seq", 32, "--batch", 2)
    assert status == 0
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("cpu")]
    assert [line[1] for line in lines] == ["lora(rank=4)", "full"]
    status, out, _ = call("memory", "--method", "lora", "--device", "cpu", "--seq", 32, "--json", "--layout", "both")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [r["layout"] for r in rows] == ["loop", "scan"]
    for r in rows:
        assert r["peak"] == sum(r[part] for part in memory.COLUMNS[:-1])
        assert r["flops"] > 0
        assert r["fits"] is True
    assert rows[0]["flops"] == pytest.approx(rows[1]["flops"], rel=0.03)


def test_the_largest_batch_by_the_command(call, monkeypatch):
    device = ("--device", "cpu", "--seq", 16, "--method", "bitfit", "--json", "--dtype", "float32")
    (line,) = call("memory", *device, "--batch", 8)[1].splitlines()
    monkeypatch.setattr(devices, "host_memory", lambda: json.loads(line)["peak"])
    (line,) = call("memory", *device, "--batch", 2, "--fit")[1].splitlines()
    found = json.loads(line)
    assert found["batch"] == 8
    assert found["fits"] is True
    monkeypatch.setattr(devices, "host_memory", lambda: 1000)
    (line,) = call("memory", *device, "--fit")[1].splitlines()
    assert json.loads(line) | {"note": ""} == {
        "name": "cpu", "method": "bitfit", "layout": "loop", "batch": 0, "fits": False, "note": ""
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--device", "h300"), r"there is no device 'h300'; the devices are h200, h100, .*, cpu, here"),
        (("--device", "cpu", "--seq", 4096), "texts of 4096 tokens: this model takes 256; write a smaller --seq"),
        (("--device", "cpu", "--method", "lora(rank=0)"), "rank"),
        (("--device", "cpu", "--batch", 0), "batch_size must be at least 1"),
        (("--device", "cpu", "--seq", -5), "--seq must be at least 1; got -5"),
        (("--device", "cpu", "--labels", 0), "--labels must be at least 1; got 0"),
        (("--device", "cpu", "--target", 8), "--target is of what a decoder beside an encoder writes"),
        (("--device", "cpu", "--model", "no/such/folder"), "no/such/folder is no folder"),
    ],
    ids=["device", "length", "method", "batch", "seq", "labels", "target", "model"],
)
def test_bad_input(call, arguments, said):
    status, _, error = call("memory", *arguments)
    assert status == 1
    assert len(error.splitlines()) == 1
    assert re.search(said, error)


def test_a_config_file_alone_is_enough_for_prompts(call, tmp_path):
    """There is no tokenizer beside it; the text that a prompt starts from changes no size."""
    file = tiny.folder(tmp_path / "llama", "llama") / "config.json"
    (only := tmp_path / "only.json").write_text(file.read_text())
    run = ("--model", only, "--device", "cpu", "--seq", 8, "--batch", 1, "--method", "prompt(length=2, text='a word')")
    status, out, error = call("memory", *run, "--json")
    assert status == 0, error
    assert json.loads(out)["trainable"] == 4 * 2 * tiny.config("llama").hidden_size


def test_a_tokenizer_needs_no_weights(monkeypatch):
    """Of a hub's repository: what cannot fit is refused before its weights are downloaded."""
    asked = []

    def snapshot_download(name, *, allow_patterns, **kwargs):
        asked.extend(allow_patterns)
        return str(hub.find_folder("tiny-books"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub.load_tokenizer("some/model")
    hub.describe("some/model")
    assert "*.json" in asked
    assert "*.safetensors" not in asked


def test_codes_are_not_quantised_again(tmp_path):
    config = tiny.config("llama").to_dict() | {"architectures": ["LlamaForCausalLM"]}
    coded = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (file := tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": coded}))
    assert nbytes(hub.describe(file).params) == nbytes(hub.describe(file, quantize="nf4").params)
    with pytest.raises(ValueError, match="quantised already, as nf4; leave quantize='int8' out"):
        hub.describe(file, quantize="int8")


@pytest.mark.parametrize(("name", "extra"), [("h200", "plan"), ("v5e", "tpu")])
def test_a_compiler_that_is_not_there(call, monkeypatch, name, extra):
    """Asked for, its extra is named; else this machine's compiler estimates, and says so."""
    monkeypatch.setattr(devices, "CUDA_WHEELS", ("no-such-wheel",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    few = ("--device", name, "--method", "lora", "--seq", 16, "--batch", 1)
    status, _, error = call("memory", *few, "--compiler", "device")
    assert status == 1
    assert f"pip install 'peftjax[{extra}]'" in error
    status, out, _ = call("memory", *few)
    assert status == 0
    assert "yes (est.)" in out
    assert f"pip install 'peftjax[{extra}]'" in out


@pytest.mark.parametrize("name", ["h200", "a100-40g", "l4", "v5e"])
def test_a_device_that_is_not_there(name):
    """Its own compiler plans: the arguments' bytes are the same everywhere (but for tiles), the rest is its own."""
    device = DEVICES[name]
    if not devices.compiler_of(device):
        pytest.skip(f"the compiler for {name} is not installed")
    found = plan(case_of(options=BF16), device)
    assert found.exact
    assert found.peak > found.frozen
    assert found.peak < 2**22


def test_devices():
    """What the compiler is told of a GPU; a machine's own device by its name; this machine's memory."""
    text = devices.describe(DEVICES["rtx4090"])
    assert "core_count: 128\n" in text
    assert "cuda_compute_capability { major: 8 minor: 9 }" in text
    for name, kind in {
        "h100": "NVIDIA H100 80GB HBM3",
        "a100-40g": "NVIDIA A100-SXM4-40GB",
        "a100-80g": "NVIDIA A100-SXM4-80GB",
        "l4": "NVIDIA L4",
        "v5e": "TPU v5 lite",
    }.items():
        assert [n for n, d in DEVICES.items() if devices.same(d.title, kind)] == [name]
    assert not any(devices.same(d.title, "NVIDIA L40S") for d in DEVICES.values())
    assert 2**28 < devices.host_memory() < 2**50
    assert devices.present().platform == jax.default_backend()


def test_the_command_line_of_a_method_is_taken(cpu):
    (row,) = survey("tiny-books", "lora+bitfit", ["cpu"], Settings(batch_size=1), length=8)
    assert row.method in parse("lora+bitfit")
    assert row.plan is not None


def test_set_up_refuses_too(problem, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "host_memory", lambda: 1000)
    with pytest.raises(DoesNotFit, match="bitfit needs"):
        set_up("tiny-books", "places", None, "bitfit", Settings(batch_size=2), train_limit=4, eval_limit=2)


def test_a_method_s_schedule_is_that_of_the_run():
    """Not that of as many steps as a plan takes where nobody says."""
    method = f"adalora(target_rank=1, init_rank=2, total={memory.STEPS + 1})"
    few = {"train_limit": 4, "eval_limit": 2}
    (entry,) = set_up("tiny-books", "places", None, method, Settings(batch_size=2, epochs=memory.STEPS), **few)[1]
    assert entry.name == method
    with pytest.raises(ValueError, match=r"total=1000001, but the run has \d\d? steps"):
        set_up("tiny-books", "places", None, method, Settings(batch_size=2, epochs=3), **few)


def test_measuring_runs_the_step(monkeypatch):
    """On a device that counts what it allocates; a CPU does not."""
    with pytest.raises(ValueError, match="this machine computes on a CPU; plan it instead"):
        memory.measure(case_of())

    class Counting:
        def memory_stats(self):
            return {"peak_bytes_in_use": 12345}

    ran = []
    step = memory.lay_out(case_of())
    monkeypatch.setattr(memory, "lay_out", lambda case: step._replace(call=lambda *xs: ran.append(step.call(*xs))))
    monkeypatch.setattr(jax, "local_devices", lambda: [Counting()])
    assert memory.measure(case_of()) == 12345
    ((_, metrics),) = ran
    assert metrics["loss"].shape == ()


FAULTS = """
import resource, sys
import numpy as np
from peftjax.devices import keep_memory
print(keep_memory())
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(8_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone has mallopt")
@pytest.mark.parametrize(("own", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)], ids=["default", "said"])
def test_a_process_keeps_its_memory_unless_it_is_told_how_to(own, kept):
    """Ten arrays of 64 MB, one after another: page faults where each is mapped anew."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))} | own
    out = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True).stdout
    said, faults = out.split()
    assert said == str(kept)
    assert (int(faults) < 100) == kept
