"""BitFit on GLUE: Ben Zaken et al. 2022 (arXiv:2106.10199), tables 1 and 2.

    python experiments/bitfit_glue.py [--scale paper] [--list] [--counts]

Not seen: the paper's own tables (BERT-large, BERT-base) and its grid of learning rates; they are no targets. What is
here instead are BitFit's rows in other papers, with their models, and the paper's shares of parameters.
Measured there: the score on GLUE's development sets; LoRA's table 2 quotes prior work, AdaLoRA's table 1 is a mean of
five seeds, with MNLI matched and mismatched (ours: matched), and ReFT's table 4 is on the held-out half of the
development sets, not to be compared with the others.

Decided. The repository's defaults: 16 epochs, batches of 8, 128 tokens, a constant rate without warm-up, clipping at
1, no weight decay. Its rate of 1e-3 is one of three that are tried, as the grid is not known. BERT-base and -large are
the cased ones. All biases train, the embeddings' norm's and the pooler's with them; counts leave the task head out.

Small: 12 runs a method, about a minute each on two CPU cores, shared with the other tables on GLUE.
Paper: 4 N FLOPs a token come to about 20 hours of an H200 at 200 TFLOP/s.
"""

from paper import GLUE, GLUE_TASKS, Count, Table, glue_small, main, named, published, rows

from peftjax.grid import Grid, Search

PUBLISHED = (
    *rows(
        """
setting                                      | trainable| MNLI| SST-2| MRPC| CoLA| QNLI| QQP | RTE | STS-B| Avg
# roberta-base
BitFit in LoRA Table 2 (prior work)          | 0.1M     | 84.7| 93.7 | 92.7| 62.0| 91.8| 84.0| 81.5| 90.8 | 85.2
BitFit in ReFT Table 4 (from Wu et al. 2024a)| 0.080%   | 84.7| 94.0 | 88.0| 54.0| 91.0| 87.3| 69.8| 89.5 | 82.3
""",
        {"BitFit in LoRA Table 2 (prior work)": "bitfit", "BitFit in ReFT Table 4 (from Wu et al. 2024a)": "bitfit"},
    ),
    *rows(
        """
setting                  | trainable| MNLI-m/mm  | SST-2| CoLA | QQP        | QNLI | RTE  | MRPC | STS-B| Avg
# deberta-v3-base
BitFit in AdaLoRA Table 1| 0.1M     | 89.37/89.91| 94.84| 66.96| 88.41/84.95| 92.24| 78.70| 87.75| 91.35| 86.02
""",
        {"BitFit in AdaLoRA Table 1": "bitfit"},
    ),
    *rows(
        """
setting                   | trainable | XSum              | enroMT
# bart-large/mbart-large
BitFit in He 2022 Table 6 | 0.1%      | 40.64/17.32/32.19 | 26.4
""",
        {"BitFit in He 2022 Table 6": "bitfit"},
    ),
)
COUNTS = (
    Count("bert-base-cased", "BitFit", "0.09%", "bitfit"),
    Count("bert-large-cased", "BitFit", "0.08%", "bitfit"),
    Count("bert-base-cased", "BitFit, b_q and b_m2 alone", "0.04%", "bitfit(targets=['query', 'mlp_in'])"),
)
WHY = {
    ("roberta-base", "BitFit in ReFT Table 4 (from Wu et al. 2024a)", "0.080%"): "0.1M of 125M, rounded before",
}

PAPER = Grid(
    models=named("bert-base-cased", "bert-large-cased", "roberta-base"),
    tasks=GLUE_TASKS,
    methods=("bitfit", "full"),
    seeds=5,
    search=Search(factors=(0.3, 1.0, 3.0), rates={"bitfit": (4e-4, 1e-3, 3e-3)}),
    settings={"epochs": 16, "batch_size": 8, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "clip": 1.0},
    options={"max_length": 128},
    published=published(PUBLISHED[:1], GLUE, "Hu et al. 2022, table 2"),
    title="BitFit on GLUE",
)
SMALL = glue_small("full", "head", "bitfit")
TABLE = Table(
    name="bitfit_glue",
    paper="Ben Zaken et al. 2022, arXiv:2106.10199",
    table="tables 1 and 2",
    rows={"bitfit/quoted_elsewhere": PUBLISHED},
    grids={"paper": (PAPER,), "small": (SMALL,)},
    out="glue-small",
    counts=COUNTS,
    called={"bart-large/mbart-large": "bart-large"},
    why=WHY,
)

if __name__ == "__main__":
    main(TABLE, __doc__)
