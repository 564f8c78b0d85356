"""Prompt tuning by model size: Lester et al. 2021 (arXiv:2104.08691), figure 1 and table 4.

    python experiments/prompt_size.py [--scale paper] [--list] [--counts] [--model FOLDER]

Not seen: SuperGLUE by model size, which is a plot (figure 1); there are no numbers to meet. What is here instead:
table 4's parameters for each size and length, table 3's scores of T5-XXL on each task, and the scores of three prompts
released for T5-base (the models with `lm100k` in their names).
Measured: SuperGLUE's development sets, the mean of prompts trained with five seeds, the best step of each. Of its
tasks BoolQ alone is here, in the form and with the data that `dora_commonsense.py` has, a choice between true and
false by their likelihood; so at paper scale compare sizes with each other, not with the figure.

Decided. T5 1.1 as adapted to language modelling; length 100, 30,000 steps, batches of 32, a constant rate of 0.3,
weight decay 1e-5. Prompts start from the vocabulary; the paper's default starts from the labels' embeddings.
Not here: Adafactor (AdamW takes its place) and stopping early.

Small: prompts and full fine-tuning of decoders of 0.26 M and 1.1 M parameters and that of `--model` on the built-in
task; 6 runs a method and model, one to ten minutes each on two CPU cores.
Paper: 4 N FLOPs a token come to about 75 hours of an H200 at 200 TFLOP/s, three quarters of it for XXL.
"""

from paper import Columns, Table, main, named, published, rows

from peftjax.grid import Grid, Search

LENGTHS = (1, 5, 20, 50, 100, 150)
PARAMETERS = rows(
    """
setting    | trainable
# t5-v1.1-small
1 tokens   | 512
5 tokens   | 2,560
20 tokens  | 10,420
50 tokens  | 25,600
100 tokens | 51,200
150 tokens | 76,800
# t5-v1.1-base
1 tokens   | 768
5 tokens   | 3,840
20 tokens  | 15,360
50 tokens  | 38,400
100 tokens | 76,800
150 tokens | 115,200
# t5-v1.1-large
1 tokens   | 1,024
5 tokens   | 5,120
20 tokens  | 20,480
50 tokens  | 51,200
100 tokens | 102,400
150 tokens | 153,600
# t5-v1.1-xl
1 tokens   | 2,048
5 tokens   | 10,240
20 tokens  | 40,960
50 tokens  | 102,400
100 tokens | 204,800
150 tokens | 307,200
# t5-v1.1-xxl
1 tokens   | 4,096
5 tokens   | 20,480
20 tokens  | 81,920
50 tokens  | 204,800
100 tokens | 409,600
150 tokens | 614,400
""",
    {f"{n} tokens": f"prompt(length={n})" for n in LENGTHS},
)
XXL = rows(
    """
setting              | trainable | BoolQ | CB        | COPA  | MultiRC   | ReCoRD    | RTE  | WiC  | WSC  | SuperGLUE
# t5-v1.1-lm100k-xxl
average of 5 prompts |           | 91.1  | 99.3/99.0 | 98.8  | 65.7/88.7 | 92.7/93.4 | 92.6 | 76.2 | 95.8 | 90.5
best                 |           | 91.3  | 100/100   | 100.0 | 66.3/89.0 | 92.9/93.5 | 93.5 | 76.6 | 96.2 | 91.0
5-prompt ensemble    |           | 91.7  | 100/100   | 100.0 | 67.1/89.4 | 93.2/93.9 | 93.5 | 77.4 | 96.2 | 91.3
""",
    {"average of 5 prompts": "prompt(length=100)"},
)
RELEASED = rows(
    """
setting                                       | trainable | validation
# t5-v1.1-lm100k-base
SST2, length 100, batch 128, class-label init |           | 95.07 acc
MRPC, length 100, batch 32, class-label init  |           | 89.7/85.3 F1/acc
RTE, length 100, batch 32, class-label init   |           | 68.6 acc
"""
)
COLUMNS: Columns = {"BoolQ": (("boolq", "accuracy"),)}

CALLED = {f"t5-v1.1-lm100k-{size}": f"t5-v1.1-{size}" for size in ("base", "xxl")}
PAPER = Grid(
    models=named("t5-v1.1-small", "t5-v1.1-base", "t5-v1.1-large", "t5-v1.1-xl", "t5-v1.1-xxl"),
    tasks={"boolq": "{data}/commonsense"},
    methods=("prompt(length=100)",),
    seeds=5,
    settings={
        "steps": 30_000,
        "batch_size": 32,
        "learning_rate": 0.3,
        "schedule": "constant",
        "warmup": 0.0,
        "weight_decay": 1e-5,
        "eval_every": 1000,
    },
    published=published(XXL, COLUMNS, "Lester et al. 2021, table 3", CALLED),
    title="Prompt tuning by model size",
)
SMALL = Grid(
    models={"stories260K": "{models}/stories260K", "tiny-books": "tiny-books", "{name}": "{model}"},
    tasks={"places": None},
    methods=("prompt", "full"),
    seeds=3,
    search=Search(factors=(0.3, 1.0, 3.0)),
    settings={"epochs": 3, "batch_size": 16},
    title="Prompt tuning by model size, places",
)
TABLE = Table(
    name="prompt_size",
    paper="Lester et al. 2021, arXiv:2104.08691",
    table="figure 1 and table 4",
    rows={
        "prompt_tuning/table4_params": PARAMETERS,
        "prompt_tuning/table3_superglue_dev_t5xxl": XXL,
        "prompt_tuning/repo_prompts_t5_base": RELEASED,
    },
    grids={"paper": (PAPER,), "small": (SMALL,)},
    out="prompt-size",
    called=CALLED,
    why={("t5-v1.1-small", "20 tokens", "10,420"): "a misprint: 20 · 512"},
)

if __name__ == "__main__":
    main(TABLE, __doc__)
