"""Prefix-tuning on E2E: Li and Liang 2021 (arXiv:2101.00190), table 1 of the arXiv version, table 2 of ACL's.

    python experiments/prefix_e2e.py [--scale paper] [--list] [--counts] [--model FOLDER]

Measured: BLEU, NIST, METEOR, ROUGE-L and CIDEr on E2E's test set (and WebNLG and DART, which are not here), one text
an input against all its references. The number of seeds was not seen; three here. METEOR needs a program of its own:
`peftjax score`.

Decided. Both published tables are here, as they differ: the arXiv version, which LoRA's table 3 quotes, has 69.7 BLEU
for the prefix and 68.2 for full fine-tuning, ACL's 70.3 and 68.8. ACL's rows are the targets. Hyperparameters of the
paper: a prefix of 5 through an MLP of 512, 8e-5, 5 epochs, batches of 10; full fine-tuning 5e-5, 5 epochs, batches of
10, and so for the top two layers, whose own were not seen; linear decay without warm-up, no weight decay
(transformers' default), beams of 5. What is counted is the prefix that is kept, not the MLP that made it.
Not here: tokens banned and a length of 5 at least in the repository's decoding, its loss summed by sentence, and Lin
et al.'s adapters.

Small: keys and values that train themselves, one run a method at its default rate, shared with LoRA's table 3.
Paper: 6 N FLOPs a token come to an hour of an H200, decoding aside.
"""

from dataclasses import replace

from paper import E2E, Count, Table, e2e_small, main, named, published, rows

from peftjax.grid import Grid, Rule

PREFIX = "prefix(length=5, mlp=True)"
TOP2 = {"gpt2-medium": "full(targets=['.*/h_2[23]/.*'])"}
METHODS = {"PREFIX": PREFIX, "FINE-TUNE": "full", "FT-FULL": "full", "FT-TOP2": TOP2["gpt2-medium"]}
ARXIV = rows(
    """
setting  | trainable| BLEU| NIST| METEOR| ROUGE-L| CIDEr| W-BLEU-S| W-BLEU-U| W-BLEU-A| D-BLEU| D-MET| D-TER
# gpt2-medium
FINE-TUNE| 100%     | 68.2| 8.62| 46.2  | 71.0   | 2.47 | 64.2    | 27.7    | 46.5    | 46.2  | 0.39 | 0.46
FT-TOP2  |          | 68.1| 8.59| 46.0  | 70.8   | 2.41 | 53.6    | 18.9    | 36.0    | 41.0  | 0.34 | 0.56
ADAPTER  | 3%       | 68.9| 8.71| 46.1  | 71.3   | 2.47 | 60.4    | 48.3    | 54.9    | 45.2  | 0.38 | 0.46
ADAPTER  | 0.1%     | 66.3| 8.41| 45.0  | 69.8   | 2.40 | 54.5    | 45.1    | 50.2    | 42.4  | 0.36 | 0.48
PREFIX   | 0.1%     | 69.7| 8.81| 46.1  | 71.4   | 2.49 | 62.9    | 45.6    | 55.1    | 46.4  | 0.38 | 0.46
# gpt2-large
FINE-TUNE| 100%     | 68.5| 8.78| 46.0  | 69.9   | 2.45 | 65.3    | 43.1    | 55.5    | 47.0  | 0.39 | 0.46
PREFIX   | 0.1%     | 70.3| 8.85| 46.2  | 71.7   | 2.47 | 63.4    | 47.7    | 56.3    | 46.7  | 0.39 | 0.45
""",
    METHODS,
)
ACL = rows(
    """
setting | trainable | BLEU | NIST | METEOR | ROUGE-L | CIDEr | W-BLEU-S | W-BLEU-U | W-BLEU-A | D-BLEU | D-MET | D-TER
# gpt2-medium
FT-FULL | 100%      | 68.8 | 8.71 | 46.1   | 71.1    | 2.43  | 64.7     | 26.7     | 45.7     | 46.2   | 0.39  | 0.46
FT-TOP2 |           | 68.1 | 8.59 | 46.0   | 70.8    | 2.41  | 53.6     | 18.9     | 36.0     | 41.0   | 0.34  | 0.56
ADAPTER | 3%        | 68.9 | 8.71 | 46.1   | 71.3    | 2.47  | 60.5     | 47.9     | 54.8     | 45.2   | 0.38  | 0.46
ADAPTER | 0.1%      | 66.3 | 8.41 | 45.0   | 69.8    | 2.40  | 54.5     | 45.1     | 50.2     | 42.4   | 0.36  | 0.48
PREFIX  | 0.1%      | 70.3 | 8.82 | 46.3   | 72.1    | 2.46  | 62.9     | 45.3     | 55.0     | 46.4   | 0.38  | 0.46
# gpt2-large
FT-FULL | 100%      | 68.5 | 8.78 | 46.0   | 69.9    | 2.45  | 65.3     | 43.1     | 55.5     | 47.0   | 0.39  | 0.46
PREFIX  | 0.1%      | 70.3 | 8.85 | 46.2   | 71.7    | 2.47  | 63.4     | 47.7     | 56.3     | 46.7   | 0.39  | 0.45
""",
    METHODS,
)
LIN = "Lin et al. 2020's adapter, which has a norm of its own, is not here; LoRA's table 3 prints {} for it"
WHY = {
    ("gpt2-medium", "ADAPTER", "3%"): LIN.format("11.09M"),
    ("gpt2-medium", "ADAPTER", "0.1%"): LIN.format("0.37M"),
    ("gpt2-medium", "prefix of 5, E2E", "250K"): "printed to two digits",
    ("gpt2-medium", "prefix of 10, DART", "500K"): "printed to one digit",
}

MEDIUM = Grid(
    models=named("gpt2-medium"),
    tasks={"e2e": None},
    methods=("full", TOP2["gpt2-medium"], PREFIX),
    seeds=3,
    settings={"epochs": 5, "batch_size": 10, "learning_rate": 5e-5, "warmup": 0.0, "weight_decay": 0.0},
    options={"eval_split": "test", "max_new_tokens": 100, "decoding": {"beams": 5}},
    rules=(Rule({"learning_rate": 8e-5}, methods=(PREFIX,)),),
    published=published((r for r in ACL if r.model == "gpt2-medium"), E2E, "Li and Liang 2021, table 2"),
    title="Li and Liang 2021, table 2: GPT-2 medium",
)
LARGE = Grid(
    models=named("gpt2-large"),
    tasks=MEDIUM.tasks,
    methods=("full", PREFIX),
    seeds=3,
    settings=MEDIUM.settings,
    options=MEDIUM.options,
    rules=MEDIUM.rules,
    published=published((r for r in ACL if r.model == "gpt2-large"), E2E, "Li and Liang 2021, table 2"),
    title="Li and Liang 2021, table 2: GPT-2 large",
)
SMALL = replace(e2e_small("full", "adapter", "prefix"), baseline="full")
TABLE = Table(
    name="prefix_e2e",
    paper="Li and Liang 2021, arXiv:2101.00190",
    table="table 1 (arXiv) and table 2 (ACL)",
    rows={"prefix_tuning/arxiv_table1": ARXIV, "prefix_tuning/acl_table2": ACL},
    grids={"paper": (MEDIUM, LARGE), "small": (SMALL,)},
    out="e2e-small",
    counts=(
        Count("gpt2-medium", "prefix of 5, E2E", "250K", PREFIX),
        Count("gpt2-medium", "prefix of 10, DART", "500K", "prefix(length=10, mlp=True)"),
    ),
    why=WHY,
    kept={PREFIX: "prefix(length=5)", "prefix(length=10, mlp=True)": "prefix(length=10)"},
)

if __name__ == "__main__":
    main(TABLE, __doc__)
