"""What a model family is: its module, its config keys, its sites, its names in Hugging Face files."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# Config keys that change nothing about the function: bookkeeping, generation, training of torch models.
HARMLESS = frozenset(
    """
    _attn_implementation_autoset
    _name_or_path architectures attn_implementation bos_token_id eos_token_id pad_token_id sep_token_id
    decoder_start_token_id dtype torch_dtype gradient_checkpointing id2label label2id model_type
    output_attentions output_hidden_states problem_type return_dict tokenizer_class transformers_version
    use_cache num_labels finetuning_task task_specific_params unsloth_version unsloth_fixed
    bad_words_ids diversity_penalty do_sample early_stopping length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_past output_scores
    remove_invalid_values repetition_penalty return_dict_in_generate temperature tf_legacy_loss tie_encoder_decoder
    top_k top_p torchscript typical_p use_bfloat16
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type transformers.js_config max_sequence_length sentence_transformers
    """.split()  # noqa: SIM905 - as a list it would take forty lines
)

# What transformers 4 gave the config of every family; its 5 gives some families none of the two.
EVERYWHERE = {"is_decoder": False, "add_cross_attention": False}


class Family(NamedTuple):
    """One row of the table of families.

    Attributes:
      name: transformers' `model_type`.
      config: NamedTuple of the config keys that the module honours.
      module: (config, head, dtype, remat) -> Linen module.
      sites: (config, head) -> table of sites.
      base: name of the base model's subtree, which a file of the base model alone leaves out.
      heads: architecture -> head.
      unused: patterns of tensor names that the module has no use for.
      renames: (pattern, replacement) for older spellings of tensor names.
      fixed: config key -> the only value supported.
      harmless: config keys of this family, beside HARMLESS, that change nothing about the function.
      check: raises for a config that the module cannot honour.
      absent: config key -> its value where transformers' config has none.
      cache_shape: config -> (layers, key/value heads, head size) of what decodes; None for an encoder.
      max_length: config -> longest text in tokens.
      bias_keys: config keys that give the linear layers biases, for a model saved with biases it had none of.
      transposed: whether Hugging Face stores a matrix of this path as (outputs, inputs).
      start_id: config -> the token that a decoder beside an encoder starts from; None where there is no such pair.
      bare: heads whose files leave the base's name out.
      copies: patterns of names under which files may hold the embedding once more.
      zero: patterns of paths that a file may leave out; they are zero then.
      unties: whether a head in the file that differs from the embedding counts, though the config ties them.
      places: (pattern, replacement) where a path here is another in Hugging Face's modules.
      order: (config, path) -> where the file's output columns, of a matrix already (inputs, outputs) or of a bias, hold
        those here, or None where they are the same: `here = file[..., order]`. Files of fused products that go head by
        head become query | key | value, so that each is a slice (`Site.parts`). A Hugging Face adapter's `b` on such a
        product has the file's columns too: read it through `order`, and write it through the inverse.
      unembed: the file's name of a head that is not tied.
    """

    name: str
    config: Any
    module: Callable
    sites: Callable
    base: str
    heads: Mapping[str, str]
    unused: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    fixed: Mapping[str, Any] = {}
    harmless: tuple[str, ...] = ()
    absent: Mapping[str, Any] = {}
    check: Callable[[Any], None] = lambda config: None
    cache_shape: Callable[[Any], tuple[int, int, int]] | None = None
    max_length: Callable[[Any], int] = lambda config: config.max_position_embeddings
    bias_keys: tuple[str, ...] = ()
    transposed: Callable[[str], bool] = lambda path: path.endswith("/kernel")
    start_id: Callable[[Any], int] | None = None
    bare: tuple[str, ...] = ("none",)
    copies: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    unties: bool = False
    places: tuple[tuple[str, str], ...] = ()
    order: Callable[[Any, str], Any] = lambda config, path: None
    unembed: str = "lm_head.weight"

    def tensor(self, path: str) -> str:
        """The name of a parameter in Hugging Face files, with the base's name."""
        for pattern, replacement in self.places:
            path = re.sub(pattern, replacement, path)
        return hf_name(path)


LISTS = "h|layers?|block"  # names of lists of modules; GPT-2's `ln_1` is no member of one


def hf_name(path: str) -> str:
    """The name of a parameter in Hugging Face files; the members of its lists are `.0`, ... there and `_0`, ... here.

    >>> hf_name("model/layers_0/self_attn/q_proj/kernel")
    'model.layers.0.self_attn.q_proj.weight'
    """
    *modules, leaf = path.split("/")
    modules = [re.sub(rf"^({LISTS})_(\d+)$", r"\1.\2", m) for m in modules]
    return ".".join([*modules, {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)])


def read_config(family: Family, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> Any:
    """The family's config from transformers' dict of values.

    Every key must be honoured, harmless, or at the value that transformers gives a fresh config.

    Raises:
      ValueError: keys that would change the function and are not honoured, with what is supported.
    """
    values = {**family.absent, **values, "num_labels": len(values.get("id2label") or {0: 0, 1: 1})}
    honoured = set(family.config._fields)
    # A field's name cannot start with an underscore, as some keys do.
    values = {k.lstrip("_") if k.lstrip("_") in honoured else k: v for k, v in values.items()}
    bad, defaults = [], {**EVERYWHERE, **defaults}
    for key, value in values.items():
        if key in family.fixed:
            if value not in (family.fixed[key], None):
                bad.append(f"{key}={value!r} (supported: {family.fixed[key]!r})")
        elif key not in honoured and key not in HARMLESS and key not in family.harmless:
            neutral = defaults.get(key) if key in defaults else None
            if value != neutral and value is not None and value not in ({}, []):
                bad.append(f"{key}={value!r} (supported: {neutral!r})")
    if bad:
        raise ValueError(
            f"this {family.name} config has values that the model does not honour: {'; '.join(sorted(bad))}"
        )
    missing = honoured - set(values)
    if missing:
        raise ValueError(f"this {family.name} config lacks {sorted(missing)}")
    config = family.config(**{k: values[k] for k in family.config._fields})
    few = [f"{k}={v}" for k, v in config._asdict().items() if "head" in k and isinstance(v, int) and v < 1]
    if few:
        raise ValueError(f"this {family.name} config has {', '.join(few)}; supported is 1 or more")
    family.check(config)
    return config


def summary(family: Family, types: bool = False) -> list[tuple[str, str]]:
    """What a family accepts, for the table of families: (what, value).

    Args:
      types: with the types of the config's values.
    """
    types_of = {key: t for key, t in family.config.__annotations__.items() if key not in family.fixed}
    keys = {key: getattr(t, "__name__", str(t)) for key, t in types_of.items()}
    rows = [
        ("architectures", ", ".join(f"{name} ({head})" for name, head in family.heads.items())),
        ("honoured", ", ".join(f"{key}: {t}" for key, t in keys.items()) if types else ", ".join(keys)),
        ("fixed", _settings(family.fixed)),
        ("harmless", ", ".join(family.harmless)),
    ]
    return [(what, value) for what, value in rows if value]


def details(family: Family) -> list[tuple[str, str]]:
    """All that a family's row says of files and configs: (what, value)."""
    rows = [
        ("harmless anywhere", ", ".join(sorted(HARMLESS))),
        ("if left out", _settings(family.absent)),
        ("base in files", f"{family.base}."),
        ("other paths", "\n".join(f"{path} -> {file}" for path, file in family.places)),
        ("older names", "\n".join(f"{old} -> {new}" for old, new in family.renames)),
        ("tensors not read", "\n".join((*family.unused, *family.copies))),
        ("generates", "no" if family.cache_shape is None else "yes"),
    ]
    return [*summary(family, types=True), *((what, value) for what, value in rows if value)]


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in values.items())
