"""LORA (with DoRA, rsLoRA, PiSSA, OLoRA and trained tokens), ADALORA and VERA folders.

PEFT's matrices act from the left: `lora_A` is (r, inputs) and `lora_B` (outputs, r), also beside GPT-2's Conv1D, whose
own weight is (inputs, outputs). Here A is (inputs, r) and B is (r, outputs).
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..hub import Model
from ..methods import Method, adalora, dora, lora, olora, pissa, trainable_tokens, vera
from ..methods.adalora import AdaLoRA
from ..methods.dora import DoRA
from ..methods.dylora import DyLoRA
from ..methods.lora import LoRA
from ..methods.pissa import Moved
from ..methods.trainable_tokens import Tokens
from ..methods.vera import VeRA
from ..tree import get
from . import names
from .base import STEM, Format, Reader, Writer, Written, contiguous, numerator
from .names import Module, by_pattern, ends_with, modules, spec_targets

PLAIN = (True, False, "gaussian", "eva", "orthogonal")  # starts of LoRA that leave the base as it is
MAKE = {"lora": lora, "dora": dora, "pissa": pissa, "olora": olora}


def read_lora(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """`W + scale · A B` (arXiv:2106.09685, section 4.1); scale: alpha / r, or alpha / sqrt(r) of rsLoRA."""
    c, kind = r.config, _kind(r.config)
    nodes: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    alphas: dict[str, Any] = {}
    for m in r.targets("linear", "embedding"):
        _check_embedding(r, m)
        rank = by_pattern(c.get("rank_pattern"), m.name, c["r"])
        alpha = by_pattern(c.get("alpha_pattern"), m.name, c["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if c.get("use_rslora") else rank)
        site = r.site(m.path)
        only = "take" if site is not None and site.tied else None
        common = {"scale": float(scale), "dropout": float(c.get("lora_dropout") or 0.0), "only": only}
        a, b = _factors(r, m, rank)
        if kind == "dora":
            length = r.take(f"{STEM}{m.name}.lora_magnitude_vector", b.shape[1:])
            nodes[m.path] = DoRA(r.weight(m), a, b, r.outputs(m, length), **common)
        else:
            nodes[m.path] = LoRA(r.weight(m), a, b, **common)
        ranks |= {m.path: rank} if rank != c["r"] else {}
        alphas |= {m.path: alpha} if alpha != c["lora_alpha"] else {}
        _check_copy(r, m)
    method = MAKE[kind](
        c["r"],
        c["lora_alpha"],
        spec_targets(r.model, nodes),
        rank_pattern=_by_rule(r, ranks),
        alpha_pattern=_by_rule(r, alphas),
        rslora=bool(c.get("use_rslora")),
        dropout=float(c.get("lora_dropout") or 0.0),
        tied_embedding="take",
    )
    if kind in ("pissa", "olora"):  # PEFT subtracts the start from the base, which here stays as it is
        started = method.init(jax.random.key(0), r.model.params, r.model.sites)
        for path, n in nodes.items():
            s = get(started, path)
            nodes[path] = Moved(n.base, n.a, n.b, s.a0, s.b0, scale=n.scale, dropout=n.dropout, only=n.only)
    tokens, methods = _read_tokens_beside(r)
    return nodes | tokens, [method, *methods]


def _kind(c: Mapping[str, Any]) -> str:
    start = c.get("init_lora_weights", True)
    if start in ("pissa", "olora") and not c.get("use_dora"):
        return start
    if start not in PLAIN:
        raise ValueError(
            f"init_lora_weights={start!r} starts from changed base weights, which the folder does not hold; supported "
            f"are {', '.join(map(repr, PLAIN))}, 'pissa' and 'olora'; PEFT's path_initial_model_for_weight_conversion "
            "makes a plain LoRA of it"
        )
    return "dora" if c.get("use_dora") else "lora"


def _factors(r: Reader, m: Module, rank: int) -> tuple[jax.Array, jax.Array]:
    """A, (inputs, r), and B, (r, outputs)."""
    inputs, outputs = r.weight(m).shape
    if m.kind == "embedding":
        a = r.take(f"{STEM}{m.name}.lora_embedding_A", (rank, inputs))
        b = r.take(f"{STEM}{m.name}.lora_embedding_B", (outputs, rank))
    else:
        a = r.take(f"{STEM}{m.name}.lora_A.weight", (rank, inputs))
        b = r.take(f"{STEM}{m.name}.lora_B.weight", (outputs, rank))
    return jnp.asarray(a.T), r.outputs(m, b.T)


def _check_embedding(r: Reader, m: Module) -> None:
    """Raises where PEFT's adapter of an embedding is no change of the table."""
    r.check_used(m)
    why = {
        "embed_positions": "it computes the positions that it looks up, and PEFT takes its first argument for them",
        "rel_embeddings": "the model reads the table itself, which PEFT leaves as it is",
    }
    if said := why.get(m.name.rpartition(".")[2]):
        raise ValueError(f"LoRA on {m.name} means another thing in PEFT: {said}. Leave it out of target_modules")


def _check_copy(r: Reader, m: Module) -> None:
    """PEFT writes the base's own table beside the adapter of an embedding; it must be the base's."""
    name = f"{STEM}{m.name}.base_layer.weight"
    if name not in r.tensors:
        return
    if not np.array_equal(r.tensors[name], names.to_file(r.model, m.path, names.array(r.weight(m)))):
        raise ValueError(
            f"{name} is not the table of this base: the adapter was made for another base, or for a resized vocabulary"
        )


def _by_rule(r: Reader, values: dict[str, Any]) -> dict[str, Any]:
    """path -> value, as patterns."""
    paths = {v: [p for p, x in values.items() if x == v] for v in values.values()}
    return {pattern: v for v, found in paths.items() for pattern in spec_targets(r.model, found)}


def _read_tokens_beside(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """LoRA's `trainable_token_indices`: a list for the input's table, or its name -> list."""
    indices = r.config.get("trainable_token_indices")
    if not indices:
        return {}, []
    m = input_table(r)
    if isinstance(indices, Mapping):
        if len(indices) != 1 or not ends_with(m.name, indices):
            raise ValueError(f"trainable_token_indices of {[*indices]} is not supported; only of {m.name!r}")
        (indices,) = indices.values()
    return read_tokens(r, m, indices, f"{STEM}{m.name}.token_adapter.trainable_tokens_delta")


def input_table(r: Reader) -> Module:
    """The module of the word embeddings."""
    table = next(s for s in r.model.sites if s.kind == "embedding")
    return next(m for m in modules(r.model).values() if m.paths.get("weight") == table.path)


def read_tokens(r: Reader, m: Module, indices: list[int], name: str) -> tuple[dict[str, Any], list[Method]]:
    """Trained rows of a table; PEFT keeps them in the order of the configuration, here they ascend."""
    if wrong := [i for i in indices if not 0 <= i < r.weight(m).shape[0]]:
        raise ValueError(f"there are no tokens {wrong[:5]}; {m.name} has {r.weight(m).shape[0]} rows")
    rows, order = r.take(name, (len(indices), r.weight(m).shape[1])), np.argsort(indices, kind="stable")
    ids = jnp.asarray(np.asarray(indices)[order], jnp.int32)
    return {m.path: Tokens(r.weight(m), ids, jnp.asarray(rows[order]))}, [trainable_tokens(sorted(indices))]


def write_rows(w: Writer, path: str, indices: list[int] | None) -> tuple[list[int], np.ndarray]:
    """The ids and rows of a `Tokens`, in the given order of ids.

    Raises:
      ValueError: it acts on the look-up of a tied table only.
    """
    n = w.nodes[path]
    if n.only:
        raise ValueError(
            f"{path}: PEFT trains tokens of a tied table in the look-up and the head; this one is 'take' only"
        )
    ids = np.asarray(n.ids).tolist()
    order = indices if indices and sorted(indices) == ids else ids
    return order, contiguous(n.rows)[[ids.index(i) for i in order]]


def write_lora(w: Writer) -> Written:
    """The inverse of `read_lora`; the most common rank and alpha are the configuration's, others its patterns."""
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {}
    found = {p: n for p, n in w.nodes.items() if not isinstance(n, Tokens)}
    found = {p: plain(n) for p, n in found.items()}
    kinds = {type(n) for n in found.values()}
    if len(kinds) > 1:
        raise ValueError(f"a folder holds one kind of adapter; these are {sorted(k.__name__ for k in kinds)}")
    dropouts = {n.dropout for n in found.values()}
    arguments = w.arguments(*MAKE, "lora_plus", "lora_fa", "dylora")
    rslora = bool(arguments.get("rslora"))
    ranks, alphas, chosen = {}, {}, []
    for path, n in found.items():
        m, rank = w.modules[path], n.a.shape[1]
        site = w.site(path)
        if site is not None and site.tied and n.only is None:
            raise ValueError(
                f"{path} is tied to the head and adapted as both, while PEFT adapts its look-up alone; train with "
                "tied_embedding='take', or merge"
            )
        ranks[m.name] = rank
        hints = (
            w.source.get("lora_alpha"),
            *(w.source.get("alpha_pattern") or {}).values(),
            arguments.get("alpha"),
            rank,
        )
        alphas[m.name] = numerator(n.scale, math.sqrt(rank) if rslora else rank, hints)
        chosen.append(m)
        a, b = ("lora_embedding_A", "lora_embedding_B") if m.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
        tensors[f"{STEM}{m.name}.{a}"] = contiguous(n.a.T)
        tensors[f"{STEM}{m.name}.{b}"] = np.ascontiguousarray(w.outputs(m, n.b).T)
        if isinstance(n, DoRA):
            tensors[f"{STEM}{m.name}.lora_magnitude_vector"] = w.outputs(m, n.magnitude)
    for path, n in w.nodes.items():
        if isinstance(n, Tokens):
            name = w.modules[path].name
            given = w.source.get("trainable_token_indices")
            given = next(iter(given.values())) if isinstance(given, Mapping) else given
            order, rows = write_rows(w, path, given)
            config["trainable_token_indices"] = order
            tensors[f"{STEM}{name}.token_adapter.trainable_tokens_delta"] = rows
    rank, alpha = (Counter(x.values()).most_common(1)[0][0] for x in (ranks, alphas))
    start = next((name for name, _ in w.method.spec if name in ("pissa", "olora")), True)
    if start == "pissa" and arguments.get("niter") is not None:
        raise ValueError(
            "PEFT draws the start of a fast PiSSA (niter) anew when it loads; convert it first: as_lora(params)"
        )
    if start == "olora" and w.target_fields(chosen, ("linear",))["fan_in_fan_out"]:
        raise ValueError("PEFT's OLoRA does not turn GPT-2's Conv1D weights; convert it to LoRA first: as_lora(params)")
    config |= {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max(dropouts),
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "use_rslora": rslora,
        "use_dora": kinds == {DoRA},
        "init_lora_weights": start if kinds == {Moved} else True,
        **w.target_fields(chosen, ("linear", "embedding")),
    }
    return Written(config, tensors)


def plain(n: Any) -> Any:
    """DyLoRA at its full rank is a LoRA; others stay."""
    if isinstance(n, DyLoRA):
        return LoRA(n.base, n.a, n.b, scale=n.alpha / n.a.shape[1], dropout=n.dropout)
    return n


# AdaLoRA


def read_adalora(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """`W + scale · P Λ Q` (arXiv:2303.10512, section 3.1): `lora_E`, (r, 1), is Λ; scale: alpha / (first r + 1e-5)."""
    c, nodes = r.config, {}
    alpha = c["lora_alpha"] if c["lora_alpha"] > 0 else float(c["init_r"])
    flags = c.get("rank_pattern") or {}
    ranks: dict[str, int] = {name.rpartition(".")[0]: int(np.sum(kept)) for name, kept in flags.items()}
    for m in r.targets("linear"):
        inputs, outputs = r.weight(m).shape
        rank = ranks[m.name] if m.name in ranks else int(c["init_r"])
        p = r.take(f"{STEM}{m.name}.lora_A", (rank, inputs)).T
        lam = r.take(f"{STEM}{m.name}.lora_E", (rank, 1))[:, 0]
        q = r.take(f"{STEM}{m.name}.lora_B", (outputs, rank)).T
        nodes[m.path] = AdaLoRA(
            r.weight(m),
            jnp.asarray(p),
            jnp.asarray(lam),
            r.outputs(m, q),
            scale=alpha / (c["init_r"] + EPSILON),
            dropout=float(c.get("lora_dropout") or 0.0),
        )
    method = adalora(
        min(c["target_r"], c["init_r"]),
        c["init_r"],
        alpha,
        targets=spec_targets(r.model, nodes),
        dropout=float(c.get("lora_dropout") or 0.0),
    )
    return nodes, [method]


EPSILON = 1e-5  # which PEFT adds to the initial rank that it divides by


def write_adalora(w: Writer) -> Written:
    """The inverse of `read_adalora`; `rank_pattern` says which of the first triplets are left."""
    arguments, tensors, kept, chosen = w.arguments("adalora"), {}, {}, []
    start = w.source.get("init_r") or arguments["init_rank"]
    for path, n in w.nodes.items():
        m, rank = w.modules[path], n.lam.shape[0]
        chosen.append(m)
        kept[f"{m.name}.lora_E"] = [True] * rank + [False] * (start - rank)
        tensors[f"{STEM}{m.name}.lora_A"] = contiguous(n.a.T)
        tensors[f"{STEM}{m.name}.lora_E"] = contiguous(n.lam[:, None])
        tensors[f"{STEM}{m.name}.lora_B"] = np.ascontiguousarray(w.outputs(m, n.b).T)
    scales = {n.scale for n in w.nodes.values()}
    if len(scales) > 1:
        raise ValueError(f"PEFT's AdaLoRA has one scale for all modules; these have {sorted(scales)}")
    hints = (w.source.get("lora_alpha"), arguments.get("alpha"))
    config = {
        "target_r": arguments["target_rank"],
        "init_r": start,
        "r": arguments["target_rank"],
        "lora_alpha": numerator(scales.pop(), start + EPSILON, hints),
        "lora_dropout": max(n.dropout for n in w.nodes.values()),
        "rank_pattern": kept if any(not all(flags) for flags in kept.values()) else None,
        "total_step": arguments["total"] or 1,
        **w.target_fields(chosen, ("linear",)),
    }
    return Written(config, tensors)


# VeRA


def read_vera(r: Reader) -> tuple[dict[str, Any], list[Method]]:
    """`W + (A ∘ d) (B ∘ b)` (arXiv:2310.11454, section 3); `vera_A`, (r, inputs), and `vera_B`, (outputs, r)."""
    c, nodes, chosen = r.config, {}, r.targets("linear")
    inputs = max(r.weight(m).shape[0] for m in chosen)
    outputs = max(r.weight(m).shape[1] for m in chosen)
    if c.get("save_projection", True):
        a = r.take("base_model.vera_A", (c["r"], inputs))
        b = r.take("base_model.vera_B", (outputs, c["r"]))
    else:
        a, b = _projections(c["projection_prng_key"], c["r"], inputs, outputs)
    _refuse_reordered(r.model, chosen)
    shared = {"shared_a": jnp.asarray(a.T), "shared_b": jnp.asarray(b.T)}
    for m in chosen:
        d = r.take(f"{STEM}{m.name}.vera_lambda_d", (c["r"],))
        out = r.take(f"{STEM}{m.name}.vera_lambda_b", r.weight(m).shape[1:])
        nodes[m.path] = VeRA(
            r.weight(m), jnp.asarray(d), jnp.asarray(out), **shared, seed=None, sizes=(inputs, c["r"], outputs)
        )
    return nodes, [vera(c["r"], spec_targets(r.model, nodes), d_initial=c.get("d_initial", 0.1))]


def _refuse_reordered(model: Model, chosen: list[Module]) -> None:
    if mixed := [m.name for m in chosen if names.is_reordered(model, m.path)]:
        raise ValueError(
            f"PEFT's VeRA counts the outputs of {mixed[0]} head by head; its matrices cannot be shared here"
        )


def _projections(seed: int, rank: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The random matrices that PEFT draws by torch: A, (r, inputs), and B, (outputs, r), Kaiming-uniform.

    Raises:
      ValueError: torch is not installed.
    """
    try:
        import torch
    except ImportError as e:
        raise ValueError(
            "this VeRA was saved without its projections (save_projection=False), which only torch can draw again; "
            "install torch, or save it in PEFT with save_projection=True"
        ) from e
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def draw(rows, columns):
        bound = math.sqrt(6 / columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).numpy()

    return draw(rank, inputs), draw(outputs, rank)


def write_vera(w: Writer) -> Written:
    """The inverse of `read_vera`."""
    tensors, chosen = {}, []
    for path, n in w.nodes.items():
        m = w.modules[path]
        chosen.append(m)
        tensors[f"{STEM}{m.name}.vera_lambda_d"] = contiguous(n.d)
        tensors[f"{STEM}{m.name}.vera_lambda_b"] = w.outputs(m, n.b)
    _refuse_reordered(w.model, chosen)
    first = next(iter(w.nodes.values()))
    arguments, save = w.arguments("vera"), w.source.get("save_projection", True)
    if save:
        tensors["base_model.vera_A"] = contiguous(first.shared_a.T)
        tensors["base_model.vera_B"] = contiguous(first.shared_b.T)
    config = {
        "r": first.d.shape[0],
        "d_initial": arguments["d_initial"],
        "projection_prng_key": w.source.get("projection_prng_key", arguments["seed"]),
        "save_projection": save,
        **w.target_fields(chosen, ("linear",)),
    }
    return Written(config, tensors)


TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias")
LORA = Format(
    read_lora,
    write_lora,
    (LoRA, DoRA, Moved, DyLoRA, Tokens),
    (
        *TARGETS,
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
        *("init_lora_weights", "trainable_token_indices"),
    ),
)
ADALORA = Format(
    read_adalora,
    write_adalora,
    (AdaLoRA,),
    (
        *TARGETS,
        *("r", "lora_alpha", "lora_dropout", "rank_pattern", "init_lora_weights"),
        *("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    ),
)
VERA = Format(
    read_vera,
    write_vera,
    (VeRA,),
    (*TARGETS, "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial"),
)
