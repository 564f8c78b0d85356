"""Adapters on GLUE: Houlsby et al. 2019 (arXiv:1902.00751), table 1.

    python experiments/adapter_glue.py [--scale paper] [--list] [--counts]

Measured: GLUE's *test* server, the run that is best on the development set of five seeds and a grid of sizes {8, 64,
256}, rates {3e-5, 3e-4, 3e-3} and epochs {3, 20}. The labels of the test sets are not public: ours are development
scores. Total is the server's score, not the mean of the cells.

Decided. BERT-large is the uncased one. The norms train with the adapters, as in the paper. Batches of 32, warm-up of a
tenth, linear decay, weight decay 0.01, clipping at 1, 128 tokens. The rate is searched for each task by one trial,
then come five seeds, for each size, once with 3 epochs and once with 20; the paper's 'adapters 8-256' is the best size
of each task. The table has no names of metrics; as GLUE's server has it in BERT's own paper, from which the row of full
fine-tuning has its MRPC (89.3) and QQP (72.1), those two are F1 and STS-B is Spearman's correlation.

Small: 12 runs a method, about a minute each on two CPU cores, shared with the other tables on GLUE. There the norms do
not train with the adapters.
Paper: 4 N FLOPs a token come to about 60 hours of an H200 at 200 TFLOP/s.
"""

from dataclasses import replace

from paper import GLUE, GLUE_TASKS, Columns, Table, beside, glue_small, main, named, published, rows

from peftjax.grid import Grid, Search

SOURCE = "Houlsby et al. 2019, table 1 (test)"
SIZES = tuple(f"adapter(size={size})+norm_tuning" for size in (8, 64, 256))
PUBLISHED = rows(
    """
setting        | trainable         | CoLA | SST-2 | MRPC | STS-B | QQP  | MNLI-m | MNLI-mm | QNLI | RTE  | Total
# bert-large
full FT        | 100% (9.0x total) | 60.5 | 94.9  | 89.3 | 87.6  | 72.1 | 86.7   | 85.9    | 91.1 | 70.1 | 80.4
adapters 8-256 | 3.6% (1.3x)       | 59.5 | 94.0  | 89.5 | 86.9  | 71.8 | 84.9   | 85.1    | 90.7 | 71.5 | 80.0
adapters 64    | 2.1% (1.2x)       | 56.9 | 94.2  | 89.6 | 87.3  | 71.8 | 85.3   | 84.6    | 91.4 | 68.8 | 79.6
""",
    {"full FT": "full", "adapters 64": SIZES[1]},
)
WHY = {
    ("bert-large", "adapters 8-256", "3.6% (1.3x)"): "the size of each task's best run is not printed",
    ("bert-large", "adapters 64", "2.1% (1.2x)"): "1.9% of the model; 2.1% of its 24 layers",
}

COLUMNS: Columns = {
    **GLUE,
    "MRPC": (("mrpc", "f1"),),
    "QQP": (("qqp", "f1"),),
    "STS-B": (("stsb", "spearman"),),
}
CALLED = {"bert-large": "bert-large-uncased"}
LONG = Grid(
    models=named("bert-large-uncased"),
    tasks=GLUE_TASKS,
    methods=SIZES,
    seeds=5,
    search=Search(rates=dict.fromkeys(SIZES, (3e-5, 3e-4, 3e-3))),
    settings={"epochs": 20, "batch_size": 32, "warmup": 0.1, "weight_decay": 0.01, "clip": 1.0},
    options={"max_length": 128},
    published=published(PUBLISHED, COLUMNS, SOURCE, CALLED),
    title=f"{SOURCE}: 20 epochs",
)
SHORT = replace(LONG, settings={**LONG.settings, "epochs": 3}, title=f"{SOURCE}: 3 epochs")
SMALL = glue_small(
    *("full", "adapter"),
    published=beside(PUBLISHED, COLUMNS, SOURCE, {"full FT": "full", "adapters 64": "adapter"}),
)
TABLE = Table(
    name="adapter_glue",
    paper="Houlsby et al. 2019, arXiv:1902.00751",
    table="table 1",
    rows={"adapter/houlsby_table1": PUBLISHED},
    grids={"paper": (SHORT, LONG), "small": (SMALL,)},
    out="glue-small",
    called=CALLED,
    why=WHY,
)

if __name__ == "__main__":
    main(TABLE, __doc__)
