"""The survey's three ways to adapt a model, on one task with one model: demonstrations, instruction tuning, PEFT.

    python experiments/three_ways.py --data FOLDER

tiny-books on `places`. FOLDER holds the other data sets, as `peftjax train --data` takes them: cola, rte, sst2, e2e,
banking77, gsm8k. Instruction tuning: full fine-tuning on a mixture of those by their templates, so that `places` and
its wording are new to the tuned model (as in Flan, arXiv:2109.01652, whose test tasks are held out); and once more with
`places` among them, a twelfth of the mixture. Every row is scored on the same test inputs; what training costs is XLA's
count of all its steps. About half an hour on two cores. What is there already is not run again.
"""

import argparse
from pathlib import Path

from peftjax import compare, instruct
from peftjax.demonstrations import FewShot
from peftjax.icl import icl
from peftjax.sft import template
from peftjax.train import Settings

ROOT = Path(__file__).parents[1]
MODEL, TASK = "tiny-books", "places"
OTHERS = {  # task -> its folder under --data
    **{name: f"glue/{name}" for name in ("cola", "rte", "sst2")},
    **{name: name for name in ("e2e", "banking77", "gsm8k")},
}
CAP = 1500  # rows of a task that count for its share
METHODS = "bitfit, ia3, lora, adapter, prefix, prompt, full"


def instruction_tune(folder: Path, sources: dict[str, str | None], steps: int, say=print) -> Path:
    """Trains the base on the mixture and returns the adapter file."""
    file = folder.with_suffix(".jsonl")
    if not file.is_file():
        instruct.from_templates(file, sources, cap=CAP)
    compare.train(
        MODEL,
        "sft",
        str(file),
        method="full",
        rate=None,
        out=folder,
        settings=Settings(steps=steps, batch_size=16),
        say=say,
        chat_template=template("plain"),
        pack=True,
        max_length=256,
    )
    return folder / "adapter.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/three-ways"), help="for what is not kept")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments/results/three-ways")
    parser.add_argument("--steps", type=int, default=400, help="of instruction tuning")
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    others: dict[str, str | None] = {name: str(args.data / where) for name, where in OTHERS.items()}
    adapters = [
        instruction_tune(args.work / "instructed-on-others", others, args.steps),
        instruction_tune(args.work / "instructed-on-places-too", others | {TASK: None}, args.steps),
    ]
    icl(
        MODEL,
        TASK,
        how=FewShot(seeds=args.seeds),
        methods=METHODS,
        adapters=adapters,
        rates={},
        out=args.out,
        settings=Settings(batch_size=16),
    )


if __name__ == "__main__":
    main()
