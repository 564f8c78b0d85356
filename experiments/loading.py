"""How much host memory loading takes: the peak against the largest shard and the parameters.

    python experiments/loading.py

writes `experiments/results/loading.md`. A synthetic Llama of about 2 GB in shards of about 0.5 GB is written to a
temporary folder, once in float32 and once in bfloat16, and loaded in a fresh process for each target. Expected: every
peak is below 1.2 times the largest shard and the parameters in the target dtype.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import transformers
from safetensors.numpy import save_file

from peftjax import hub
from peftjax.tree import flatten

ROOT = Path(__file__).parents[1]
OUT = ROOT / "experiments/results/loading.md"
PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32"))  # in the files, wanted
BOUND = 1.2

# Run in a process of its own. The highest resident memory since the kernel was told to forget it, and what the process
# had then: Python, JAX's backend, and the libraries, some of which are imported only when a first model is loaded.
LOAD = """
import sys
import jax, jax.numpy as jnp
from peftjax import hub
from peftjax.tree import nbytes

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

jax.block_until_ready(hub.load(sys.argv[3]).params)
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
model = hub.load(sys.argv[1], param_dtype=jnp.dtype(sys.argv[2]))
jax.block_until_ready(model.params)
print(memory("VmHWM") - before, nbytes(model.params))
"""


class Measured(NamedTuple):
    """Bytes of one load.

    Attributes:
      files: of all shards.
      shard: of the largest.
      params: in the wanted dtype.
      peak: resident, above what the process had before.
    """

    files: int
    shard: int
    params: int
    peak: int

    @property
    def ratio(self) -> float:
        return self.peak / (self.shard + self.params)


def write(folder: Path, size: int, shards: int, dtype: str) -> Path:
    """Writes a random Llama of about `size` bytes in so many shards, a shard at a time."""
    width, vocabulary = (2048, 16384) if size > 10**9 else (512, 4096)
    if not size:
        width, vocabulary = 64, 128
    item, ff = jnp.dtype(dtype).itemsize, 11 * width // 4
    layers = max(1, round((size / item - 2 * vocabulary * width) / (4 * width * width + 3 * width * ff)))
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=ff,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        tie_word_embeddings=False,
    )
    model = hub.from_config(config, "causal-lm", seed=None)
    model.hf_config.save_pretrained(folder)
    rng, where, held, files = np.random.default_rng(0), {}, {}, 0
    shapes = flatten(model.params)
    for i, (path, x) in enumerate(shapes.items()):
        shape = x.shape[::-1] if model.family.transposed(path) else x.shape
        held[model.family.tensor(path)] = rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))
        last = i == len(shapes) - 1
        if last or (sum(v.nbytes for v in held.values()) >= size / shards and files < shards - 1):
            files += 1
            file = f"model-{files:05d}.safetensors"
            save_file(held, folder / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(held, file))
            held.clear()
    (folder / hub.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def measure(folder: Path, dtype: str) -> Measured:
    """Loads the folder in a fresh process."""
    with tempfile.TemporaryDirectory() as tiny:
        command = [sys.executable, "-c", LOAD, str(folder), dtype, str(write(Path(tiny), 0, 1, dtype))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    peak, params = map(int, done.stdout.split())
    sizes = [file.stat().st_size for file in folder.glob("*.safetensors")]
    return Measured(sum(sizes), max(sizes), params, peak)


def table(size: int, shards: int) -> str:
    """The measurements in Markdown, and whether they are within the bound."""
    rows, inside = [], True
    with tempfile.TemporaryDirectory() as at:
        for stored in dict.fromkeys(stored for stored, _ in PAIRS):
            folder = Path(at) / stored
            folder.mkdir()
            write(folder, size, shards, stored)
            for wanted in (wanted for s, wanted in PAIRS if s == stored):
                m = measure(folder, wanted)
                inside &= m.ratio < BOUND
                mb = " | ".join(f"{n / 1e6:,.0f}" for n in (m.files, m.shard, m.params, m.peak))
                rows.append(f"| {stored} | {wanted} | {mb} | {m.ratio:.2f} |")
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "safetensors", "transformers"))
    return "\n".join(
        [
            "# Host memory that loading takes",
            "",
            "`python experiments/loading.py`: a synthetic Llama in several shards, loaded in a fresh process; MB. The",
            "peak is the highest resident memory, mapped files included, above that of the process before it loads.",
            f"{'All peaks are' if inside else 'Not all peaks are'} below {BOUND} (largest shard + parameters).",
            f"{versions}, Python {sys.version.split()[0]}, CPU.",
            "",
            "| in the files | wanted | files | largest shard | parameters | peak | peak / (shard + parameters) |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Host memory that loading takes.")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    found = table(round(args.gigabytes * 1e9), args.shards)
    args.out.write_text(found)
    print(found)
