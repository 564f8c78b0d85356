"""Hugging Face folders and hub names <-> models: strict both ways, safetensors only, tied stays tied."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from . import bnb, quantize as quantization
from .layout import is_stacked, unstack_layers
from .methods.base import Site, select, virtual_tokens
from .models import FAMILIES, Family
from .models.base import read_config
from .models.layers import Cache, Output
from .tree import Tree, cast, flatten, get, update
from .weights import is_node, merge

TASKS = {  # what for -> heads that will do
    "causal-lm": ("causal-lm",),
    "seq2seq": ("seq2seq-lm",),
    "classification": ("classification",),
    "encoder": ("none",),
    "generation": ("causal-lm", "seq2seq-lm"),
}
SHARD_BYTES = 5 * 10**9
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names
NO_FLOATS = f"of a type that is none of {', '.join(FLOATS)}"
PICKLE = (
    "a pickle can run any code when read, so it is refused; convert it with transformers' save_pretrained, which "
    "writes safetensors"
)


class Bundled(NamedTuple):
    """A base that comes with the package.

    Attributes:
      folder: where it is.
      rates: method -> learning rate, the best of a few, a factor of two apart, by the dev loss of `places` after
        three epochs; of olora pissa's, and of trainable_tokens a first guess.
    """

    folder: Path
    rates: Mapping[str, float]


BUNDLED = {
    "tiny-books": Bundled(
        Path(__file__).parent / "tiny_books",
        {"full": 3e-3, "bitfit": 8e-2, "fishmask": 2e-2, "norm_tuning": 8e-2, "ia3": 0.32, "child_tuning": 3e-3}
        | {"lora": 4e-2, "lora_plus": 1e-2, "lora_fa": 0.64, "pissa": 4e-2, "olora": 4e-2, "vera": 0.4}
        | {"dora": 8e-2, "adalora": 8e-2, "dylora": 1.5e-2}
        | {"prefix": 0.3, "prompt": 1.2, "p_tuning": 1e-2, "trainable_tokens": 2e-2}
        | {"adapter": 2e-2, "pfeiffer": 2e-2, "parallel_adapter": 2e-2, "mam": 1e-2},
    )
}


class Model(NamedTuple):
    """A base model: a module, its parameters, and where methods may act.

    Attributes:
      family: the row of `peftjax.models.FAMILIES`.
      module: Linen module, called through `forward`.
      params: nested dict of arrays, per-layer.
      sites: the family's table for this config.
      config: the module's config.
      hf_config: transformers' config object, saved with a merged model.
      fresh: paths of parameters that no file held: a new task head.
      forced: the first and the last token of what a decoder beside an encoder writes, None where they are free:
        transformers' `forced_bos_token_id` and `forced_eos_token_id`, saved with a merged model.
    """

    family: Family
    module: Any
    params: Tree
    sites: tuple[Site, ...]
    config: Any
    hf_config: Any
    fresh: tuple[str, ...] = ()
    forced: tuple[int | None, int | None] = (None, None)

    def forward(self, params: Tree, batch: dict, key: jax.Array | None = None, **kwargs) -> Output:
        """Runs the module on a batch of `input_ids`, `attention_mask`, `type_ids`; a key turns dropout on.

        A decoder beside an encoder takes `decoder_input_ids` and `decoder_attention_mask` too; one without an encoder
        takes packed texts, `segment_ids` with `positions` (`peftjax.data.make_packed`). With `hidden_only=True` a
        decoder's head is left out; `logits` is that head.

        Raises:
          ValueError: packed texts for another kind of model, or without positions.
        """
        if "segment_ids" in batch:
            check_packable(self.family)
            if batch.get("positions") is None:
                raise ValueError("packed texts (segment_ids) need positions that start from 0 for each text; give both")
        inputs = {k: batch.get(k) for k in ("input_ids", "attention_mask", "type_ids", "positions")}
        inputs |= {k: batch[k] for k in ("decoder_input_ids", "decoder_attention_mask", "segment_ids") if k in batch}
        rngs = None if key is None else {"dropout": key}
        return self.module.apply({"params": params}, **inputs, **kwargs, deterministic=key is None, rngs=rngs)

    def logits(self, params: Tree, hidden: jax.Array) -> jax.Array:
        """The language model's head: last hidden states (batch, length, width) -> (batch, length, vocabulary), float32.

        Of the parameters it reads those of the head alone.

        Raises:
          ValueError: the model is no language model.

        >>> model = load("tiny-books")
        >>> batch = {"input_ids": jnp.array([[5, 6, 7]])}
        >>> hidden = model.forward(model.params, batch, hidden_only=True).hidden
        >>> bool(jnp.allclose(model.logits(model.params, hidden), model.forward(model.params, batch).logits))
        True
        """
        if self.module.head not in TASKS["generation"]:
            raise ValueError(f"only a language model has logits of hidden states; this head is {self.module.head!r}")
        return self.module.apply({"params": params}, hidden=hidden).logits

    def empty_cache(self, params: Tree, batch: int, length: int) -> Cache:
        """Buffers for `length` tokens of what decodes and, before its text, the virtual ones of a prompt.

        Per-layer or stacked as the parameters are.

        Raises:
          ValueError: the model is an encoder.
        """
        if self.family.cache_shape is None:
            raise ValueError(f"{self.family.name} is an encoder and cannot generate")
        layers, heads, size = self.family.cache_shape(self.config)
        prompt = params[self.family.base].get("prompt")
        if prompt is not None and self.family.start_id is None:  # else the encoder reads it
            length += prompt.n
        shape = (batch, length, heads, size)

        def pair(shape):
            return jnp.zeros(shape, self.module.dtype), jnp.zeros(shape, self.module.dtype)

        scanned = any(is_stacked(p) for p in flatten(params, is_leaf=is_node))
        buffers = pair((layers, *shape)) if scanned else tuple(pair(shape) for _ in range(layers))
        return Cache(buffers, jnp.zeros((batch, length), bool), jnp.zeros((), jnp.int32))

    @property
    def max_length(self) -> int:
        """Longest text in tokens."""
        return self.family.max_length(self.config)

    def room(self, params: Tree) -> int:
        """Longest text in tokens after the virtual ones of these parameters."""
        return self.max_length - virtual_tokens(params)


def load(
    name: str | Path,
    task: str | None = None,
    *,
    labels: int | list[str] | None = None,
    fresh_head: bool = False,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    quantize: str | None = None,
    remat: str = "none",
    seed: int = 0,
    revision: str | None = None,
) -> Model:
    """Loads a model from a folder in Hugging Face's layout, or by its hub name.

    Args:
      task: 'causal-lm', 'seq2seq', 'generation' (either), 'classification' (with `labels=1`: regression) or
        'encoder'; default: what the config's architecture says.
      labels: number of labels, or their names in id order, of a classifier.
      fresh_head: draw a new task head even if the file has one.
      dtype: of the activations; `param_dtype`: of the parameters. float32 or bfloat16.
      quantize: 'int8', 'nf4' or 'nf4-double': the linear weights of the blocks are quantised from the file's values
        as they are read, so that the whole model is never in memory; the other parameters are not quantised. What
        bitsandbytes quantised to NF4 is read as it is, without `quantize`.
      remat: which activations of a block are kept for the backward pass: 'none' (all of them), 'block' (its input; the
        least memory and the most time) or 'dots' (and what its weights give).
      seed: of a task head that the file does not have.
      revision: of a hub name.

    Raises:
      FileNotFoundError: no such folder, or a folder without config.json or safetensors.
      ValueError: an unknown architecture, a config value that is not honoured, missing or extra tensors or
        wrong shapes (all of them in one message), a pickle; an unknown `remat`.
    """
    folder = find_folder(name, revision)
    hf_config = _read_hf_config(folder)
    if _codes(folder, hf_config, quantize):
        quantize = None
    named = [str(hf_config.id2label[i]) for i in sorted(hf_config.id2label)]
    if labels is not None:
        _set_labels(hf_config, labels)
    model, files = _describe(hf_config, task, dtype, remat, folder), _tensor_files(folder)
    if model.family.unties and any(s.tied for s in model.sites) and _other_table(model, model.family.unembed, files):
        hf_config.tie_word_embeddings = False
        model = _describe(hf_config, task, dtype, remat, folder)
    params, missing = _read_params(model, files, fresh_head, param_dtype, quantize)
    if without := _spare(model).intersection(missing):
        missing = [p for p in missing if p not in without]
        model = model._replace(sites=tuple(s for s in model.sites if s.path not in without))
    heads = {s.module for s in model.sites if s.kind == "head"}
    trained = {p for p in flatten(model.params) if p.rpartition("/")[0] in heads} - set(missing)
    if trained and isinstance(labels, list):
        _check_labels(folder, named, [str(x) for x in labels])
    if missing:
        params = update(params, _draw(model, missing, seed, param_dtype))
    return model._replace(params=params, fresh=tuple(missing), forced=_forced(model, folder))


def check_packable(family: Family) -> None:
    """Raises unless it is a family of decoders without an encoder."""
    if family.cache_shape is None or family.start_id is not None:
        what = "an encoder" if family.cache_shape is None else "an encoder with a decoder"
        raise ValueError(f"packing is for decoders, such as llama and gpt2; {family.name} is {what}: leave out pack")


def task_of(architecture: str) -> str:
    """The task that an architecture is for.

    >>> task_of("GPT2LMHeadModel")
    'causal-lm'
    """
    heads = {a: head for family in FAMILIES.values() for a, head in family.heads.items()}
    if architecture not in heads:
        raise ValueError(f"the architecture {architecture!r} is unknown; peftjax has {sorted(heads)}")
    return next(task for task, fit in TASKS.items() if heads[architecture] in fit)


def redraw(model: Model, seed: int) -> Model:
    """The model with the parameters that no file held, its new task head, drawn from another seed."""
    dtype = get(model.params, model.fresh[0]).dtype
    return model._replace(params=update(model.params, _draw(model, list(model.fresh), seed, dtype)))


def from_config(
    hf_config: Any,
    task: str | None = None,
    *,
    labels: int | list[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    quantize: str | None = None,
    remat: str = "none",
    seed: int | None = 0,
) -> Model:
    """A model with random parameters from a transformers config; with seed None only abstract shapes.

    Args: as for `load`.

    >>> import transformers
    >>> model = from_config(transformers.BertConfig(), "encoder", seed=None)
    >>> from peftjax.tree import count
    >>> count(model.params)
    109482240
    """
    hf_config = copy.deepcopy(hf_config)  # the caller's stays as it is
    if labels is not None:
        _set_labels(hf_config, labels)
    model = _describe(hf_config, task, dtype, remat, type(hf_config).__name__)
    params = model.params if seed is None else _init(model, jax.random.key(seed))

    def change(params):
        params = cast(params, param_dtype)
        return params if quantize is None else quantization.quantize(params, model.sites, quantize)

    if quantize is not None or jnp.dtype(param_dtype) != jnp.float32:
        params = jax.eval_shape(change, params) if seed is None else change(params)
    return model._replace(params=params, forced=_forced(model))


def describe(
    name: str | Path,
    task: str | None = None,
    *,
    labels: int | list[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    quantize: str | None = None,
    remat: str = "none",
    revision: str | None = None,
) -> Model:
    """A model's shapes from its config alone: `load` without reading, or downloading, any weight.

    Args:
      name: a folder, a hub name, or a config file (JSON, as transformers writes it).
      the rest: as for `load`.

    Raises:
      FileNotFoundError, ValueError: as `load`, for what the config says.

    >>> from peftjax.tree import count
    >>> count(describe("tiny-books").params)
    1104512
    """
    where = Path(name) if Path(name).is_file() else find_folder(name, revision, ("config.json",))
    hf_config = _read_hf_config(where)
    quantize = _codes(where, hf_config, quantize) or quantize
    if FAMILIES[hf_config.model_type].unties:  # transformers 5 ties these whatever the file says; `load` sees the head
        file = where if where.is_file() else where / "config.json"
        hf_config.tie_word_embeddings = json.loads(file.read_text()).get("tie_word_embeddings", True)
    choices = {"dtype": dtype, "param_dtype": param_dtype, "quantize": quantize, "remat": remat}
    return from_config(hf_config, task, labels=labels, seed=None, **choices)


def _codes(where: Path, hf_config: Any, quantize: str | None) -> str | None:
    """How the files are quantised, taken out of the config; another way that was asked for raises."""
    codes = bnb.take_way(where, hf_config)
    if codes and quantize not in (None, codes):
        raise ValueError(f"{where} is quantised already, as {codes}; leave quantize={quantize!r} out")
    return codes


# What of a hub's repository is read; no pickle, no code.
WORDS = ("*.json", "*.model", "*.txt", "*.jinja")
FILES = (*WORDS, "*.safetensors")


def find_folder(name: str | Path, revision: str | None = None, files: tuple[str, ...] = FILES) -> Path:
    """The folder itself, a base that comes with the package, or the hub's snapshot, downloaded if need be.

    Args:
      files: patterns of what to download.
    """
    path = Path(name)
    if str(name) in BUNDLED:  # a folder of that name here is `./tiny-books`
        return BUNDLED[str(name)].folder
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1 or path.exists():
        raise FileNotFoundError(f"{name} is no folder; write the folder that holds config.json, or a hub name")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(name), revision=revision, allow_patterns=[*files]))
    except Exception as e:  # the hub's errors are many: no such name, gated, no network
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub did not give it ({type(e).__name__}: {e}); "
            "write an existing folder, or a hub name that this machine can reach"
        ) from e


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a folder or hub name, by transformers; remote code is refused."""
    import transformers

    folder = find_folder(name, revision, WORDS)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # transformers raises OSError, ValueError and others for a folder without one
        _read_hf_config(folder)  # what is no model's folder at all is said first
        raise FileNotFoundError(f"{folder} holds no tokenizer that transformers can load: {e}") from e


def save(model: Model, params: Tree, folder: str | Path, tokenizer: Any = None, param_dtype: Any = None) -> Path:
    """Writes merged parameters as a folder that transformers loads; tensors above 5 GB are sharded.

    Args:
      params: per-layer or stacked, with nodes or without; nodes are merged.
      param_dtype: of the file; default: each array's own.

    Raises:
      ValueError: a node cannot be merged (a prefix, say), a parameter has no place in the model (a bias
        where the config can name none), or one is missing or of another shape.
    """
    folder = Path(folder)
    merged = flatten(merge(unstack_layers(params)))
    expected = flatten(_shapes(model))
    if all(p.endswith("/bias") for p in set(merged) - set(expected)) and set(merged) - set(expected):
        model, merged = _with_biases(model, merged)
        expected = flatten(_shapes(model))
    architecture = model.hf_config.architectures[0]
    if extra := sorted(set(merged) - set(expected)):
        raise ValueError(
            f"{architecture} has no place for {extra[:5]}{' ...' if len(extra) > 5 else ''} "
            f"({len(extra)} parameters); keep them as an adapter file"
        )
    spare = _spare(model) if _spare(model).isdisjoint(merged) else set()
    if bad := [p for p, x in expected.items() if p not in spare and (p not in merged or merged[p].shape != x.shape)]:
        raise ValueError(
            f"{architecture} needs other parameters than these: "
            + "; ".join(
                f"{p} {merged[p].shape if p in merged else 'missing'}, expected {expected[p].shape}" for p in bad
            )
        )
    tensors = {}
    for path, x in merged.items():
        array = np.asarray(x if param_dtype is None else x.astype(param_dtype))
        order = model.family.order(model.config, path)
        array = array if order is None else array[..., np.argsort(order)]
        array = array.T if model.family.transposed(path) else array
        name = model.family.tensor(path)
        if model.module.head in model.family.bare:
            name = name.removeprefix(model.family.base + ".")
        tensors[name] = np.ascontiguousarray(array)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.hf_config)
    config.dtype = jnp.result_type(*tensors.values()).name  # transformers loads in the dtype named here
    _name_padding(config, model, tokenizer)
    config.save_pretrained(folder)
    _write_forced(model, folder)
    _write_tensors(folder, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def _name_padding(config: Any, model: Model, tokenizer: Any) -> None:
    """A classifier's config names the tokenizer's padding: transformers finds a text's last token by it."""
    if model.module.head != "classification" or tokenizer is None or tokenizer.pad_token_id is None:
        return
    if config.pad_token_id is None and tokenizer.pad_token_id < model.config.vocab_size:
        config.pad_token_id = tokenizer.pad_token_id


def _spare(model: Model) -> set[str]:
    """Paths of the pooler where no head reads it: files of a masked-language model have none, and it is left out."""
    if model.module.head != "none":
        return set()
    poolers = {s.module for s in model.family.sites(model.config, "none") if s.kind == "pooler"}
    return {p for p in flatten(_shapes(model)) if p.rpartition("/")[0] in poolers}


def _with_biases(model: Model, merged: dict[str, jax.Array]) -> tuple[Model, dict[str, jax.Array]]:
    """The model whose config gives its linear layers biases, if it can; those that no method made are zero."""
    config = copy.deepcopy(model.hf_config)
    for key in model.family.bias_keys:
        setattr(config, key, True)
    wide = _describe(config, None, model.module.dtype, model.module.remat, "the merged model")
    dtype = jnp.result_type(*merged.values())
    zeros = {p: jnp.zeros(x.shape, dtype) for p, x in flatten(wide.params).items() if p.endswith("/bias")}
    return wide, zeros | merged


def fingerprint(model: Model) -> str:
    """Sixteen hex digits that tell base models apart: config, names, shapes and a sample of the values.

    The values are rounded to bfloat16, so that loading in another dtype gives the same fingerprint; a fresh
    task head does not count.
    """
    config = {k: v for k, v in model.config._asdict().items() if k != "num_labels"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for path, x in sorted(flatten(model.params).items()):
        if path in model.fresh:
            continue
        sample = x.reshape(-1)[:: max(1, x.size // 1024)][:1024]
        digest.update(f"{path} {tuple(x.shape)}".encode())
        digest.update(np.asarray(sample.astype(jnp.bfloat16)).tobytes())
    return digest.hexdigest()[:16]


def _read_hf_config(folder: Path) -> Any:
    """transformers' config of a folder, or of a config file."""
    import transformers

    file = folder if folder.is_file() else folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json; write the folder of a model in Hugging Face's layout")
    try:
        raw = json.loads(file.read_text())
    except ValueError as e:  # of the syntax, or bytes that are no text
        raise ValueError(f"{file} is no JSON: {e}") from e
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}; expected an object of config keys")
    if "auto_map" in raw:
        raise ValueError(f"{file} asks for remote code (auto_map); peftjax runs none")
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(_no_family(file, raw.get("model_type")))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except Exception as e:  # KeyError, TypeError, huggingface_hub's own and others, by the key at fault
        raise ValueError(f"transformers refuses {file}: {e}") from e
    return config


def _no_family(where: Any, name: Any) -> str:
    part = f"{name}_text"  # as transformers calls the language model within a multimodal one
    if part in FAMILIES:
        return (
            f"{where} is of model type {name!r}, which reads more than text; peftjax has the text model alone, "
            f"{part!r}: write the folder of a checkpoint of that type ({', '.join(FAMILIES[part].heads)})"
        )
    return f"{where} is of model type {name!r}; peftjax has the families {sorted(FAMILIES)}"


def _generation(folder: Path) -> dict[str, Any]:
    """What transformers reads a model's way of generating from: a file of its own, else config.json."""
    file = next(f for name in ("generation_config.json", "config.json") if (f := folder / name).is_file())
    try:
        values = json.loads(file.read_text())
    except ValueError as e:  # of the syntax, or bytes that are no text
        raise ValueError(f"{file} is no JSON: {e}") from e
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}; expected an object of config keys")
    return values


def _forced(model: Model, folder: Path | None = None) -> tuple[int | None, int | None]:
    """`Model.forced` by the files of a folder, or by the config alone."""
    if model.family.start_id is None:
        return None, None
    values = model.hf_config.to_dict() if folder is None else _generation(folder)
    first: Any = values.get("forced_bos_token_id")
    last: Any = values.get("forced_eos_token_id")
    if first is None and values.get("force_bos_token_to_be_generated"):  # of an older transformers
        first = values.get("bos_token_id")
    last = last[0] if isinstance(last, list) and len(last) == 1 else last
    most = model.config.vocab_size
    if not all(x is None or (isinstance(x, int) and 0 <= x < most) for x in (first, last)):
        raise ValueError(
            f"forced_bos_token_id and forced_eos_token_id must each be one of the {most} tokens; got {first!r} and "
            f"{last!r}"
        )
    return first, last


def _write_forced(model: Model, folder: Path) -> None:
    """What transformers forces too; nothing where the config alone says it."""
    import transformers

    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)  # of an earlier save
    if model.forced != _forced(model):
        generation = transformers.GenerationConfig.from_model_config(model.hf_config)
        generation.forced_bos_token_id, generation.forced_eos_token_id = model.forced
        generation.save_pretrained(folder)


def _check_labels(folder: Path, named: list[str], labels: list[str]) -> None:
    """A trained head answers in the order of its own labels; only unnamed ones may be named anew."""
    if named != labels and named != [f"LABEL_{i}" for i in range(len(named))]:
        raise ValueError(
            f"the task head in {folder} was trained for the labels {named}, in this order; this task has {labels}; "
            "for a new head write fresh_head=True (on the command line --fresh-head)"
        )


def _set_labels(config: Any, labels: int | list[str]) -> None:
    names = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else [str(x) for x in labels]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _describe(hf_config: Any, task: str | None, dtype: Any, remat: str, where: Any) -> Model:
    family = FAMILIES.get(hf_config.model_type)
    if family is None:
        raise ValueError(_no_family(where, hf_config.model_type))
    architecture = (hf_config.architectures or [None])[0]
    if task is not None:
        if task not in TASKS:
            raise ValueError(f"there is no task {task!r} for a model; the tasks are {sorted(TASKS)}")
        architecture = next((a for a, head in family.heads.items() if head in TASKS[task]), None)
        if architecture is None:
            raise ValueError(f"{family.name} models have no head for {task!r}; they have {sorted(family.heads)}")
    if architecture is None or architecture not in family.heads:
        raise ValueError(
            f"{where}: the architecture {architecture!r} is unknown; of {family.name}, peftjax has "
            f"{sorted(family.heads)}; name one in config.json or say what the model is for with task="
        )
    hf_config.architectures = [architecture]
    head = family.heads[architecture]
    config = read_config(family, hf_config.to_dict(), type(hf_config)().to_dict())
    module = family.module(config, head, dtype, remat)
    model = Model(family, module, None, family.sites(config, head), config, hf_config)
    return model._replace(params=_shapes(model))


def _init(model: Model, key: jax.Array) -> Tree:
    return model.module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


def _shapes(model: Model) -> Tree:
    return jax.eval_shape(lambda key: _init(model, key), jax.random.key(0))


def _draw(model: Model, paths: list[str], seed: int, dtype: Any) -> dict[str, jax.Array]:
    """Initial values of some parameters; under jit, the others are never computed."""
    draw = jax.jit(lambda key: {p: flatten(_init(model, key))[p].astype(dtype) for p in paths})
    return draw(jax.random.key(seed))


def _tensor_files(folder: Path) -> list[Path]:
    single, index = folder / WEIGHTS, folder / INDEX
    if single.is_file():  # first, as transformers has it
        return [single]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{index} is no index of shards: expected an object with 'weight_map'") from e
        if not names or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{index} is no index of shards: its 'weight_map' names {names or 'no file'}")
        if outside := [n for n in names if Path(n).name != n]:
            raise ValueError(f"{index} lists files outside the folder: {outside}")
        if missing := [n for n in names if not (folder / n).is_file()]:
            raise FileNotFoundError(f"{index} lists shards that are not there: {missing}")
        return [folder / n for n in names]
    pickles = sorted(p.name for p in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
    if pickles:
        raise ValueError(f"{folder} has weights only as {pickles}: {PICKLE}")
    raise FileNotFoundError(f"{folder} holds no {WEIGHTS} and no {INDEX}")


def _tensors(files: list[Path]) -> Iterator[tuple[str, Any]]:
    """Names and readers, so that one tensor at a time is in memory."""
    for file in files:
        try:
            with safe_open(file, framework="numpy") as f:
                for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                    yield name, f
        except OSError as e:
            raise ValueError(f"{file} cannot be read: {e}") from e
        except Exception as e:
            if type(e).__name__ == "SafetensorError":
                if _is_pickle(file):
                    raise ValueError(f"{file} is no safetensors file but a pickle: {PICKLE}") from e
                raise ValueError(f"{file} is truncated or no safetensors file: {e}") from e
            raise


def _is_pickle(file: Path) -> bool:
    """Whether a file begins as those of `torch.save` do, old (a pickle's protocol) or new (a zip file)."""
    with file.open("rb") as f:
        return f.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")


def _read_params(
    model: Model, files: list[Path], fresh_head: bool, dtype: Any, quantize: str | None
) -> tuple[Tree, list[str]]:
    family, shapes = model.family, flatten(model.params)
    if quantize is not None:
        quantization.check(quantize)
    coded = {} if quantize is None else {s.path: s for s in select(model.params, model.sites, ["linear"])}
    expected = {family.tensor(path): path for path in shapes}
    heads = {s.module for s in model.sites if s.kind == "head"}
    optional = {p for p in shapes if p.rpartition("/")[0] in heads}
    tied_name = family.unembed if any(s.tied for s in model.sites) else None
    names = {name for name, _ in _tensors(files)}
    bare = not any(n.startswith(family.base + ".") for n in names)
    found, extra, wrong = {}, [], {}
    for name, f in _tensors(files):
        if bnb.of(name) in names:
            continue  # read with its weight
        full = name
        for pattern, replacement in family.renames:
            full = re.sub(pattern, replacement, full)
        if bare and full not in expected:
            full = f"{family.base}.{full}"
        path = expected.get(full)
        if path is None:
            if name == tied_name or any(re.fullmatch(p, name) for p in family.copies):
                _check_tied(model, name, files)
            elif not any(re.fullmatch(p, name) for p in family.unused):
                extra.append(name)
        elif path in found or path in wrong:
            extra.append(f"{name} (a second tensor for {path})")
        elif not (fresh_head and path in optional):
            stored = f.get_slice(name)
            if f"{name}{bnb.STATE}" in names:
                if family.order(model.config, path) is not None:
                    raise ValueError(
                        f"{name} is quantised head by head, which cannot be put in order; load it unquantised"
                    )
                beside = {n: g.get_tensor(n) for n, g in _tensors(files) if name in (n, bnb.of(n))}
                found[path] = bnb.read(name, beside, shapes[path].shape, dtype)
                continue
            shape = tuple(stored.get_shape())
            wanted = shapes[path].shape[::-1] if family.transposed(path) else shapes[path].shape
            if shape != wanted:
                wrong[path] = "of a wrong shape", f"{name} {shape}, expected {wanted}"
            elif stored.get_dtype() not in FLOATS:
                wrong[path] = NO_FLOATS, f"{name} {stored.get_dtype()}"
            else:
                wide = np.float32 if path in coded else dtype
                x = _to_device(f.get_tensor(name), family.transposed(path), family.order(model.config, path), wide)
                if quantize is not None and path in coded:
                    x = quantization.quantize_at(coded[path], x, quantize, dtype)
                # Else the next tensor is read while this one is still in memory twice.
                found[path] = jax.block_until_ready(x)
    for path, x in shapes.items():
        if path not in {*found, *wrong} and any(re.fullmatch(p, path) for p in family.zero):
            found[path] = jnp.zeros(x.shape, dtype)
    missing = [p for p in shapes if p not in found]
    alone = (optional, _spare(model))  # each is there whole or not at all
    excused = {p for part in alone if part.isdisjoint([*found, *wrong]) for p in part}
    absent = [family.tensor(p) for p in missing if p not in excused and p not in wrong]
    problems = [("missing", absent), ("not known to the model", extra)]
    problems += [(what, [x for w, x in wrong.values() if w == what]) for what in ("of a wrong shape", NO_FLOATS)]
    if any(rows for _, rows in problems):
        said = "; ".join(f"{what}: {', '.join(sorted(rows))}" for what, rows in problems if rows)
        unfit = not optional.isdisjoint(wrong)
        hint = "; for a new task head of another size write fresh_head=True (--fresh-head)" if unfit else ""
        raise ValueError(
            f"the tensors in {files[0].parent} do not fit {model.hf_config.architectures[0]}: {said}{hint}"
        )
    return update({}, found), missing


def _to_device(x: np.ndarray, transposed: bool, order: Any, dtype: Any) -> jax.Array:
    """Cast on the host: there the transfer transposes, and no program is compiled for each shape."""
    x = x.astype(jnp.dtype(dtype), copy=False)
    x = x.T if transposed else x
    return jnp.asarray(x if order is None else x[..., order])


def _check_tied(model: Model, name: str, files: list[Path]) -> None:
    if table := _other_table(model, name, files):
        raise ValueError(f"the config ties {name} to {table}, but the files hold two different tensors for them")


def _other_table(model: Model, name: str, files: list[Path]) -> str | None:
    """The name of the embedding if the files hold it and, under this name, another tensor."""
    table = next(model.family.tensor(s.path) for s in model.sites if s.kind == "embedding")
    wanted = (name, table, table.partition(".")[2])
    there = {n: f.get_tensor(n) for n, f in _tensors(files) if n in wanted}
    twin = next((n for n in wanted[1:] if n in there), name)  # without one, the table is missing
    return table if name in there and not np.array_equal(there[name], there[twin]) else None


def _like_its_neighbours(file: Path) -> None:
    """safetensors makes files that only their owner reads; a model's are as readable as its config."""
    file.chmod((file.parent / "config.json").stat().st_mode)


def _write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    shards, size = [{}], 0
    for name, x in tensors.items():
        if shards[-1] and size + x.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = x
        size += x.nbytes
    for stale in (folder / WEIGHTS, folder / INDEX, *folder.glob("model-*-of-*.safetensors")):
        stale.unlink(missing_ok=True)  # of an earlier save in other shards: a reader could take it for this one
    meta = {"format": "pt"}
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata=meta)
        _like_its_neighbours(folder / WEIGHTS)
        return
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata=meta)
        _like_its_neighbours(folder / file)
        where.update(dict.fromkeys(shard, file))
    total = sum(x.nbytes for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
