"""A problem: one model, one task, its data as tokens; the loss to train on and the score to judge by."""

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import data, hub, sft
from .generate import Decoding, check, decoder, padding_side
from .hub import Model
from .likelihood import Likelihood
from .loss import cross_entropy
from .metrics import check_metrics, score
from .models.layers import shift_right
from .tasks import Task, get_task
from .train import Objective
from .tree import Tree, flatten, update

EVAL_BATCH = 64
CHOICE_METRICS = {"accuracy", "accuracy_norm"}


class Problem(NamedTuple):
    """What methods are compared on.

    Attributes:
      model: the base.
      tokenizer: transformers' tokenizer of the base.
      task: with its labels filled in.
      train, dev: examples; a generation task's dev examples are for the loss.
      packed: length of the rows that training texts are packed into, several in each; None: one text a row.
      head_prior: whether the head's bias starts at the best constant answer (`with_prior`).
      scored: examples of the split that is reported, if that is not dev (on which the best step is chosen).
      prompts: of a generation task, with references, to be scored on; of multiple choice, with every answer.
      buckets: lengths that training batches are padded to, dev batches too.
      max_new_tokens: of a generated text: the longest completion of the training set.
      notes: what the reader of a table should know (texts cut, examples left out).
      decoding: of generated texts, but for `max_new_tokens` and the tokens that end them; None: the most likely token.
    """

    model: Model
    tokenizer: Any
    task: Task
    train: list[data.Example]
    dev: list[data.Example]
    prompts: list[data.Example]
    buckets: tuple[int, ...]
    max_new_tokens: int
    notes: tuple[str, ...]
    scored: list[data.Example] | None = None
    decoding: Decoding | None = None
    packed: int | None = None
    head_prior: bool = False

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id or 0

    def epoch(self, number: int, batch_size: int, seed: int) -> Iterator[dict]:
        """The shuffled training batches of an epoch."""
        pad = self.pad_id
        if self.packed is not None:
            order = {"shuffle_seed": seed, "epoch": number}
            return data.packed_batches(self.train, batch_size, self.packed, pad_id=pad, **order)
        return data.batches(self.train, batch_size, self.buckets, pad_id=pad, shuffle_seed=seed, epoch=number)

    def largest_batch(self, batch_size: int) -> dict:
        """A training batch of the greatest length."""
        if self.packed is not None:
            return next(self.epoch(0, batch_size, 0))
        planned = data.plan(self.train, batch_size, self.buckets)
        longest = max(planned, key=lambda one: one.length + one.target_length)
        return data.make_batch(self.train, longest, batch_size, pad_id=self.pad_id)

    def steps_per_epoch(self, batch_size: int) -> int:
        if self.packed is not None:
            return -(-len(data.pack([len(e.input_ids) for e in self.train], self.packed)) // batch_size)
        return len(data.plan(self.train, batch_size, self.buckets))

    def digest(self) -> str:
        """Sixteen hex digits of the examples."""
        h = hashlib.sha256()
        for examples in (self.train, self.dev, self.prompts, self.scored or []):
            for e in examples:
                h.update(repr(e).encode())
        return h.hexdigest()[:16]


def prepare(
    model_name: str,
    task: str | Task,
    source: str | None = None,
    *,
    eval_split: str | None = None,
    train_limit: int | None = None,
    eval_limit: int | None = None,
    reserve: Callable[[Model], int] = lambda model: 0,
    max_length: int | None = None,
    max_buckets: int = 3,
    need_train: bool = True,
    max_new_tokens: int | None = None,
    decoding: Decoding | None = None,
    pack: bool = False,
    chat_template: str | None = None,
    head_prior: bool = False,
    before: Callable[[Problem, Callable[..., Model]], None] = lambda problem, describe: None,
    **load: Any,
) -> Problem:
    """Loads a model, its tokenizer and a task's data, and turns the texts into tokens.

    Args:
      model_name: folder or hub name.
      task: a name of `peftjax.tasks.TASKS`, or a row of one's own.
      source: folder of the data, or a Hugging Face data set; default: the task's.
      eval_split: the split to report, 'dev' or 'test'; default: the task's. The best step is chosen on dev.
      train_limit, eval_limit: use the first so many rows (of a generation task: inputs to be scored).
      reserve: model -> positions that the methods take before the text (`virtual_tokens`).
      max_length: of a text in tokens; default: the task's, or what the model has room for.
      max_buckets: number of lengths that batches are padded to.
      need_train: False leaves the training examples out (the labels may still come from them).
      max_new_tokens: of a generated text; default: the longest completion of the examples read.
      decoding: how texts are generated to be scored; its `max_new_tokens` and `stop` do not count. Default: the most
        likely token, again and again.
      pack: put several training texts into a row, of as many tokens as a text may have; none sees another.
      chat_template: of conversations, a Jinja text; default: the tokenizer's own.
      head_prior: start the new head's bias at the best constant answer to the training rows (`with_prior`).
      before: called before the weights are read, with the problem on a model of shapes alone, and with
        `peftjax.hub.describe` of this name and task.
      load: passed to `peftjax.hub.load`.

    Raises:
      ValueError, FileNotFoundError: from the loaders; or a text that is too long where the task does not cut; or
        `head_prior` without a new head that has a bias.
    """
    task = get_task(task) if isinstance(task, str) else task
    decoding = None if decoding is None else _of_choice(check(decoding), task)
    check_metrics(task.metrics)
    if task.choices is not None and (task.kind != "generation" or {*task.metrics} - CHOICE_METRICS):
        raise ValueError(
            f"task {task.name!r} has choices, so its kind is 'generation' and its metrics are among "
            f"{sorted(CHOICE_METRICS)}; got {task.kind!r} and {task.metrics}"
        )
    eval_split = eval_split or task.reported
    if pack and task.kind != "generation":
        raise ValueError(f"packing is for generation tasks; {task.name} is a {task.kind} task: leave out pack")
    if chat_template is not None and task.chats is None:
        raise ValueError(
            f"a chat template is for conversations; {task.name} has prompts of its own: leave out --chat-template"
        )
    if head_prior and task.kind == "generation":
        raise ValueError(f"head_prior is for tasks with a head; {task.name} is a generation task: leave it out")
    limits = {"train_limit": train_limit, "eval_limit": eval_limit, "max_length": max_length}
    limits["max_new_tokens"] = max_new_tokens
    for name, value in limits.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    rows = data.load_rows(task, source, "train") if need_train or _open_labels(task) else []
    if _open_labels(task):
        task = task._replace(labels=data.labels_of(task, rows))
    eval_rows = data.load_rows(task, source, eval_split)
    dev_rows = data.load_rows(task, source, "dev") if need_train and eval_split != "dev" else eval_rows
    rows = rows[:train_limit] if need_train else []
    eval_rows, dev_rows = _first(task, eval_rows, eval_limit), _first(task, dev_rows, eval_limit)
    purpose, labels = "generation", None
    if task.kind != "generation":
        purpose, labels = "classification", 1 if task.labels is None else [str(x) for x in task.labels]
    tokenizer = None
    if task.chats is not None:  # what it lacks is said before the weights are read
        tokenizer = hub.load_tokenizer(model_name)
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        sft.check_tokenizer(tokenizer)
    describe = functools.cache(functools.partial(hub.describe, model_name, purpose, labels=labels))
    model = describe(**{k: v for k, v in load.items() if k not in ("fresh_head", "seed")})
    tokenizer = hub.load_tokenizer(model_name) if tokenizer is None else tokenizer
    if pack:
        hub.check_packable(model.family)
    reserved = reserve(model)
    room = model.max_length - reserved
    special = tokenizer.num_special_tokens_to_add(pair=task.kind != "generation" and len(task.inputs) > 1)
    if room <= special:
        raise ValueError(
            f"{reserved} virtual tokens leave no room for a text in the {model.max_length} positions of this model, "
            f"{special} of them for special tokens; write a shorter prompt or prefix"
        )
    limit = min(max_length or task.max_length, room)
    if limit <= special:
        raise ValueError(f"max_length {limit} leaves no room for a text: {special} are special tokens; write more")
    notes = []

    def encode(rows, what, how=None, **kwargs):
        most = kwargs.pop("limit", limit)
        kwargs["for_encoder"] = model.family.start_id is not None
        if how is not None:
            encoded = how(task, rows, tokenizer, most, **kwargs)
        else:
            encoded = data.encode(task, rows, tokenizer, task.labels, most, **kwargs)
        if encoded.truncated:
            notes.append(f"{encoded.truncated} of {len(encoded.examples)} {what} texts cut to {most} tokens")
        notes.extend(f"{what} texts: {note}" for note in encoded.notes)
        examples = encoded.examples
        if not getattr(model.config, "type_vocab_size", 0):  # some tokenizers give token types to models without
            examples = [e._replace(type_ids=None) for e in examples]
        _check_ids(examples, model, model_name)
        return examples

    train = encode(rows, "training") if rows else []
    dev = encode(dev_rows, "dev" if need_train else eval_split)
    scored = encode(eval_rows, eval_split) if need_train and eval_split != "dev" else None
    prompts, new_tokens = [], 0
    if task.choices is not None:
        prompts = encode(eval_rows, "prompt", how=data.encode_choices)
    elif task.kind == "generation":
        longest = max(len(e.target_ids or ()) or sum(e.loss_mask or []) for e in train or dev)
        new_tokens = max_new_tokens or (longest if task.new_tokens is None else min(task.new_tokens, room // 2))
        if new_tokens >= room:
            raise ValueError(
                f"{new_tokens} new tokens leave no room for a prompt in the {room} positions; "
                "give a smaller max_new_tokens"
            )
        prompts = encode(eval_rows, "prompt", limit=min(limit, room - new_tokens), for_generation=True)
    for limit_, what in ((train_limit if need_train else None, "training rows"), (eval_limit, f"{eval_split} inputs")):
        if limit_ is not None:
            notes.append(f"the first {limit_} {what} only")
    if head_prior and train:
        notes.append("the head's bias starts at the best constant answer")
    lengths = [len(e.input_ids) for e in [*train, *dev, *(scored or [])]]
    buckets = data.bucket_lengths(lengths, max_buckets, limit=limit)
    if pack and train:
        notes.append(_padding(train, buckets, limit))
    problem = Problem(
        model=model,
        tokenizer=tokenizer,
        task=task,
        train=train,
        dev=dev,
        prompts=prompts,
        buckets=buckets,
        max_new_tokens=new_tokens,
        notes=tuple(notes),
        scored=scored,
        decoding=decoding,
        packed=limit if pack else None,
        head_prior=head_prior and bool(train),
    )
    before(problem, describe)
    model = hub.load(model_name, purpose, labels=labels, **load)
    if problem.head_prior and not model.fresh:
        raise ValueError(f"head_prior: {model_name} has a trained head; leave it out, or write fresh_head=True")
    return _begin(problem, model)


def with_head_of_seed(problem: Problem, seed: int) -> Problem:
    """The problem with its new task head, if it has one, drawn from this seed."""
    return _begin(problem, hub.redraw(problem.model, seed)) if problem.model.fresh else problem


def _begin(problem: Problem, model: Model) -> Problem:
    labels = [e.label for e in problem.train]
    return problem._replace(model=with_prior(model, labels) if problem.head_prior else model)


def with_prior(model: Model, labels: Sequence[int | float | None]) -> Model:
    """The model with its head's bias at the best constant answer: b = mean(y), or b_c = log(n_c / n) of classes.

    So the first steps are not spent on it, by the head and by all that trains with it at the same rate: of STS-B's
    scores from 0 to 5, a head at zero is off by their mean. As Lin et al. 2017 (arXiv:1708.02002), section 3.3, set
    the bias of a rare class. A class without rows counts as half a row.

    Raises:
      ValueError: the head has no bias.

    >>> import transformers
    >>> config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = hub.from_config(config, "classification", labels=2)
    >>> with_prior(model, [0, 1, 1, 1]).params["classifier"]["bias"].round(2).tolist()
    [-1.3899999856948853, -0.28999999165534973]
    """
    module = [s for s in model.sites if s.kind == "head"][-1].module
    path = f"{module}/bias"
    if path not in flatten(model.params):
        raise ValueError(f"head_prior: this model's head, {module}, has no bias that could start there; leave it out")
    given = np.array(labels, np.float64)
    if (classes := model.config.num_labels) == 1:
        bias = given.mean(keepdims=True)
    else:
        counts = np.maximum(np.bincount(given.astype(int), minlength=classes), 0.5)
        bias = np.log(counts / counts.sum())
    return model._replace(params=update(model.params, {path: jnp.asarray(bias, flatten(model.params)[path].dtype)}))


def _padding(train: list[data.Example], buckets: tuple[int, ...], row_length: int) -> str:
    lengths = [len(e.input_ids) for e in train]
    rows, alone = len(data.pack(lengths, row_length)), sum(min(b for b in buckets if b >= n) for n in lengths)
    packed, unpacked = (1 - sum(lengths) / cells for cells in (rows * row_length, alone))
    return (
        f"{len(train)} training texts packed into {rows} rows of {row_length} tokens: {packed:.1%} of them padding, "
        f"{unpacked:.1%} with one text a row"
    )


def _check_ids(examples: list[data.Example], model: Model, name: str) -> None:
    """Ids beyond a table would be clamped to its last row."""
    c = model.config
    tables = {
        "token ids": (c.vocab_size, "input_ids"),
        "token types": (getattr(c, "type_vocab_size", None) or None, "type_ids"),
        "token ids of completions": (c.vocab_size, "target_ids"),
    }
    for what, (rows, field) in tables.items():
        most = max((max(getattr(e, field) or [0]) for e in examples), default=0)
        if rows is not None and most >= rows:
            raise ValueError(
                f"the tokenizer of {name} gives {what} up to {most}, but the model has {rows} of them; "
                "the tokenizer is not this model's"
            )


def _of_choice(decoding: Decoding, task: Task) -> Decoding | None:
    """What of a decoding belongs to the problem; None for the plain one."""
    plain = Decoding()
    decoding = decoding._replace(max_new_tokens=plain.max_new_tokens, stop=plain.stop)
    if decoding.temperature:
        raise ValueError("scores are of texts that are not drawn; leave out the temperature")
    if decoding != plain and task.kind != "generation":
        raise ValueError(f"beams and n-grams are for generated texts, and {task.name} is a {task.kind} task")
    return None if decoding == plain else decoding


def _open_labels(task: Task) -> bool:
    return task.kind == "classification" and task.labels is None


def _first(task: Task, rows: list[dict], limit: int | None) -> list[dict]:
    if limit is None or task.kind != "generation" or task.choices is not None:
        return rows[:limit]
    keys = list(dict.fromkeys(tuple(row[c] for c in task.inputs) for row in rows))[:limit]
    return [row for row in rows if tuple(row[c] for c in task.inputs) in set(keys)]


def objective(problem: Problem) -> Objective:
    """The loss of a problem: `loss_of` its model and the kind of its task."""
    return loss_of(problem.model, problem.task.kind)


def loss_of(model: Model, kind: str) -> Objective:
    """(params, batch, key or None) -> (sum of losses, sum of weights).

    Classification: cross-entropy an example; regression: squared error; generation: cross-entropy a token
    of the completion.
    """

    def loss(params, batch, key):
        if "target_ids" in batch and model.family.start_id is not None:
            start = model.family.start_id(model.config)
            seen = jnp.where(batch["weight"][:, None] > 0, batch["loss_mask"], 1)  # a filler row has to see something
            shifted = shift_right(batch["target_ids"], start)
            batch = batch | {"decoder_input_ids": shifted, "decoder_attention_mask": seen}
        weight = batch["weight"]
        if kind == "generation":
            targets, mask = batch.get("target_ids"), batch["loss_mask"]
            if targets is None:  # a text's own next token; of the last there is none
                targets, mask = (jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (batch["input_ids"], mask))
            weight = mask * weight[:, None]
            hidden = model.forward(params, batch, key, hidden_only=True).hidden
            return cross_entropy(model.logits, params, hidden, targets, weight), weight.sum()
        logits = model.forward(params, batch, key).logits
        assert logits is not None  # `prepare` loads a model with the task's head
        if kind == "classification":
            each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        else:
            each = jnp.square(logits[:, 0] - batch["labels"])
        return (each * weight).sum(), weight.sum()

    return loss


class Evaluator:
    """Scores resolved parameters of one problem; its functions compile once for each length."""

    def __init__(self, problem: Problem):
        self.problem = problem
        task, model, tokenizer = problem.task, problem.model, problem.tokenizer
        loss = objective(problem)

        def dev(params, batch):
            logits = model.forward(params, batch).logits if task.kind != "generation" else None
            return loss(params, batch, None), logits

        self._dev = jax.jit(dev)
        ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.generates = task.kind == "generation" and task.choices is None
        if task.choices is not None:
            self._likely = Likelihood(model, problem.pad_id, EVAL_BATCH // 2)
        if self.generates:
            how = (problem.decoding or Decoding())._replace(max_new_tokens=problem.max_new_tokens, stop=ends)
            self._generate, self._rows = decoder(model, how, problem.pad_id), max(1, EVAL_BATCH // how.beams)

    def on_dev(self, params: Tree) -> dict[str, float]:
        """Loss on the dev examples, and the metrics unless texts would have to be generated: to choose a step by."""
        return self._of(params, self.problem.dev)

    def scores(self, params: Tree, texts: list[str] | None = None) -> dict[str, float]:
        """Loss and metrics on the reported split.

        Of a generation task, on generated texts (`texts`, if given); of multiple choice, on the likeliest answers.
        """
        examples = self.problem.dev if self.problem.scored is None else self.problem.scored
        found = self._of(params, examples)
        if self.problem.task.choices is not None:
            picks = self.choose(params)
            labels = [e.label for e in self.problem.prompts]
            return found | {m: score((m,), picks[m], labels)[m] for m in self.problem.task.metrics}
        if self.problem.task.kind == "generation":
            texts = texts or self.generate(params)
            references = [e.references for e in self.problem.prompts]
            slots = [e.slots or [] for e in self.problem.prompts] if self.problem.task.slots is not None else None
            found |= score(self.problem.task.metrics, texts, references, slots)
        return found

    def _of(self, params, examples):
        p = self.problem
        total, weight, logits = 0.0, 0.0, {}
        for batch in data.even_batches(examples, EVAL_BATCH, p.buckets, pad_id=p.pad_id):
            (part, part_weight), out = self._dev(params, batch)
            total, weight = total + float(part), weight + float(part_weight)
            if out is not None:
                logits.update(
                    (i, row) for i, row in zip(batch["index"].tolist(), np.asarray(out), strict=True) if i >= 0
                )
        loss = {"loss": total / weight}
        if p.task.kind == "generation":
            return loss
        rows = np.array([logits[i] for i in range(len(logits))])
        predictions = rows[:, 0] if p.task.kind == "regression" else rows.argmax(-1)
        return loss | score(p.task.metrics, predictions.tolist(), [e.label for e in examples])

    def choose(self, params: Tree) -> dict[str, list[int]]:
        """Which answer is taken of every prompt, by `Σ log p` ('accuracy') and by that a character ('accuracy_norm').

        Of equal ones the first. Characters are those of the answer, as lm-eval's `acc_norm` counts them.
        """
        pairs = [(e.input_ids, ids) for e in self.problem.prompts for _, ids in e.choices or []]
        likely = iter(self._likely(params, pairs))
        picks: dict[str, list[int]] = {m: [] for m in sorted(CHOICE_METRICS)}
        for e in self.problem.prompts:
            logprobs = np.array([next(likely).logprob for _ in e.choices or []])
            characters = np.array([len(text) for text, _ in e.choices or []])
            picks["accuracy"].append(int(logprobs.argmax()))
            picks["accuracy_norm"].append(int((logprobs / characters).argmax()))
        return picks

    def generate(self, params: Tree) -> list[str]:
        """Continuations of the problem's prompts, in their order."""
        p = self.problem
        few = max(1, min(3, len(p.prompts) // self._rows))  # each length costs a compilation
        buckets = data.bucket_lengths([len(e.input_ids) for e in p.prompts], few)
        texts: dict[int, str] = {}
        for batch in data.even_batches(p.prompts, self._rows, buckets, pad_id=p.pad_id, side=padding_side(p.model)):
            tokens = np.asarray(self._generate(params, batch["input_ids"], batch["attention_mask"]))
            decoded = p.tokenizer.batch_decode(_until_end(tokens, p.tokenizer.eos_token_id), skip_special_tokens=True)
            texts.update((i, t.strip()) for i, t in zip(batch["index"].tolist(), decoded, strict=True) if i >= 0)
        return [texts[i] for i in range(len(texts))]


def _until_end(tokens: np.ndarray, eos_id: int) -> list[list[int]]:
    rows = [row.tolist() for row in tokens]
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]
