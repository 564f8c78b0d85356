"""Child-Tuning on four small GLUE tasks: Xu et al. 2021 (arXiv:2109.05687), table 1.

    python experiments/child_tuning_glue.py [--scale paper] [--list] [--counts]

Not seen: table 1 itself (BERT, XLNet, RoBERTa, ELECTRA large), and its grids of p; they are no targets. What is here
instead is table 5 of HyPe, whose authors ran vanilla, F and D again on BERT-large and quote three rows of Xu et al.
Its order of F and D was fixed by recomputing the averages; its average of vanilla (79.31) is not that of its cells
(79.15).
Measured: GLUE's development sets, mean and deviation; how many seeds was not seen, five here.

Decided. The released command (bert-large-cased, RTE, mode D, p = 0.3): 4e-5, batches of 16, 3 epochs, 128 tokens,
weight decay 0.01, for all four tasks. No warm-up: the command says a tenth, and the trainer reads `warmup_steps`
alone. F scales by 1/p and D does not; D masks the blocks and leaves embeddings, pooler and head to train whole.
Not here: weight decay of the entries that D does not train, and a Fisher information of whole batches.

Small: on STS-B at the default rate, the same for all three. 3 runs a method, about two minutes each on a CPU core.
Paper: 6 N FLOPs a token come to a quarter of an hour of an H200.
"""

from paper import GLUE, Table, beside, main, named, published, rows, stsb_small

from peftjax.grid import Grid

PUBLISHED = rows(
    """
setting                   | trainable | STS-B     | CoLA       | MRPC       | RTE        | Avg
# bert-large
Vanilla (HyPe run)        |           | 90.07±.67 | 63.63±1.82 | 90.67±.92  | 72.24±2.18 | 79.31
Child-Tuning_F (HyPe run) |           | 90.24±.45 | 63.86±1.60 | 91.43±1.11 | 73.77±2.09 | 79.83
Child-Tuning_D (HyPe run) |           | 90.34±.55 | 64.48±1.29 | 91.43±.24  | 73.65±.51  | 79.97
Top-K (Xu 2021)           |           | 89.97     | 62.63      | 91.09      | 70.90      | 78.65
Mixout (Xu 2021)          |           | 89.99     | 63.60      | 91.29      | 72.15      | 79.26
RecAdam (Xu 2021)         |           | 89.86     | 64.33      | 90.85      | 71.63      | 79.17
""",
    {
        "Vanilla (HyPe run)": "full",
        "Child-Tuning_F (HyPe run)": "child_tuning(mode='F', p=0.3)",
        "Child-Tuning_D (HyPe run)": "child_tuning(mode='D', p=0.3)",
    },
)

CALLED = {"bert-large": "bert-large-cased"}
PAPER = Grid(
    models=named("bert-large-cased"),
    tasks=dict.fromkeys(("cola", "rte", "mrpc", "stsb")),
    methods=("full", "child_tuning(mode='F', p=0.3)", "child_tuning(mode='D', p=0.3)"),
    seeds=5,
    settings={"epochs": 3, "batch_size": 16, "learning_rate": 4e-5, "warmup": 0.0, "weight_decay": 0.01},
    options={"max_length": 128},
    published=published(PUBLISHED, GLUE, "HyPe, table 5", CALLED),
    title="Child-Tuning, BERT-large",
)
SMALL = stsb_small(
    *("full", "child_tuning(mode='F')", "child_tuning(mode='D')"),
    published=beside(
        PUBLISHED,
        GLUE,
        "HyPe, table 5",
        {
            "Vanilla (HyPe run)": "full",
            "Child-Tuning_F (HyPe run)": "child_tuning(mode='F')",
            "Child-Tuning_D (HyPe run)": "child_tuning(mode='D')",
        },
    ),
)
TABLE = Table(
    name="child_tuning_glue",
    paper="Xu et al. 2021, arXiv:2109.05687",
    table="table 1",
    rows={"child_tuning/hype_table5": PUBLISHED},
    grids={"paper": (PAPER,), "small": (SMALL,)},
    out="glue-small",
    called=CALLED,
)

if __name__ == "__main__":
    main(TABLE, __doc__)
