"""DyLoRA by rank on GLUE: Valipour et al. 2023 (arXiv:2210.07558), the table of scores by rank.

    python experiments/dylora_ranks.py [--scale paper] [--list] [--counts]

Not seen: the paper's table (ranks 1 to 8 on GLUE); a summary had three cells with columns that may be mislabelled.
There are no targets. What is compared: one DyLoRA, scored at every rank (`by_rank` in the sweep's records), with a
LoRA trained at each rank.
Measured: GLUE's development sets, the best epoch of each run by the score at full rank; five seeds.

Decided. The released scripts: r = 8, alpha = 16, weight decay 0.1, 6% warm-up, 512 tokens and their rates, epochs and
batches, which they run on each of eight GPUs (CoLA: two); here on all together. They train one direction a step
(`frozen=True`) with a rank drawn uniformly. DyLoRA's scale at rank b is alpha / b: LoRA has the same alpha at each
rank. At the small scale all directions below the drawn rank train, and both have alpha = 8.

Small: on STS-B at the default rate, the same for both. 3 runs a method, about a minute each on a CPU core.
Paper: 4 N FLOPs a token come to about 22 hours of an H200 at 200 TFLOP/s.
"""

from paper import GLUE_TASKS, RANKS, Count, Table, by_task, main, named, stsb_small

from peftjax.grid import Grid

PAPER = Grid(
    models=named("roberta-base"),
    tasks=GLUE_TASKS,
    methods=("dylora(rank=8, alpha=16, frozen=True)", *(f"lora(rank={r}, alpha=16)" for r in RANKS)),
    seeds=5,
    settings={"warmup": 0.06, "weight_decay": 0.1},
    options={"max_length": 512},
    rules=by_task(
        "cola mnli mrpc qnli qqp rte sst2 stsb",
        learning_rate="4e-4 5e-4 4e-4 4e-4 5e-4 5e-4 5e-4 4e-4",
        epochs="80 30 30 25 25 80 60 40",
        batch_size="32 16 16 32 16 16 16 16",
    ),
    title="DyLoRA by rank, RoBERTa-base",
)
SMALL = stsb_small("dylora(rank=8)", *(f"lora(rank={r})" for r in RANKS))
TABLE = Table(
    name="dylora_ranks",
    paper="Valipour et al. 2023, arXiv:2210.07558",
    table="scores by rank",
    rows={},
    grids={"paper": (PAPER,), "small": (SMALL,)},
    out="glue-small",
    counts=tuple(Count("roberta-base", m.partition("(")[0], "", m) for m in PAPER.methods),
)

if __name__ == "__main__":
    main(TABLE, __doc__)
