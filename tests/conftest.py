"""Strictness for all tests: warnings are errors, ranks never promote silently, a fresh key each time."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

from pathlib import Path

import jax
import pytest

SHARED = Path(__file__).parents[2] / "shared"
STORIES = SHARED / "models/stories260K"
MINILM = SHARED / "models/all-MiniLM-L6-v2"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data and weights are not here")

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def key(request):
    """A key that depends on the test's name only."""
    import zlib

    return jax.random.key(zlib.crc32(request.node.nodeid.encode()))
