"""What all tests share: the shared data, quick compilation, a key of its own for each test."""

import importlib.metadata
import importlib.util
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The tests compile a thousand tiny programs once each: LLVM's optimisations would cost more than they save.
QUICK_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax").startswith("0.10."):  # later ones do not know it, and abort
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK_COMPILE)

import io
import types
from pathlib import Path

import jax
import pytest

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models/stories260K"
CAPP = SHARED / "models/capp-gpt2-tiny"
MINILM = SHARED / "models/all-MiniLM-L6-v2"
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data and weights are not here")


def experiment(name: str) -> types.ModuleType:
    """A script of `experiments/` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def key(request):
    """A key that depends on the test's name only."""
    import zlib

    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def call(capsys, monkeypatch):
    """Runs the command in this process, `said` on its standard input; gives exit status, stdout and stderr."""
    from peftjax.cli import main

    monkeypatch.setattr("peftjax.devices.keep_memory", lambda: False)  # it is for the whole process, the tests' own

    def run(*arguments, said=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        status = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    return run
