"""Methods: one file each. `METHODS` maps the name of each to its factory."""

import ast
import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .adalora import adalora as adalora
from .adapter import adapter as adapter, parallel_adapter as parallel_adapter, pfeiffer as pfeiffer
from .base import (
    Method as Method,
    Site as Site,
    chain as chain,
    method as method,
    select as select,
    weight_method as weight_method,
)
from .bitfit import bitfit as bitfit
from .child_tuning import child_tuning as child_tuning
from .dora import dora as dora
from .dylora import at_rank as at_rank, dylora as dylora
from .fishmask import fisher as fisher, fishmask as fishmask
from .full import full as full
from .head import head as head
from .ia3 import ia3 as ia3
from .lora import lora as lora
from .lora_fa import lora_fa as lora_fa
from .lora_plus import lora_plus as lora_plus
from .mam import mam as mam
from .neftune import neftune as neftune
from .norm_tuning import norm_tuning as norm_tuning
from .p_tuning import p_tuning as p_tuning
from .pissa import as_lora as as_lora, olora as olora, pissa as pissa
from .prefix import prefix as prefix
from .prompt import prompt as prompt
from .trainable_tokens import trainable_tokens as trainable_tokens
from .vera import vera as vera


class Row(NamedTuple):
    """One line of the table of methods.

    Attributes:
      factory: (arguments) -> Method.
      kind: 'additive', 'selective', 'low-rank', or '-' for the two ends of the scale.
      trains: the count of trained scalars, as a formula. d: width, L: layers, r: rank, n: virtual tokens,
        k: features of the keys.
      acts: where.
      merges: whether the result can be written as plain weights of the base.
      rate: the default learning rate at width 768; it is taken times 768 / width, as matrices under Adam want it
        (Yang et al. 2022, arXiv:2203.03466, table 3), and as biases and prefixes of bases 64 and 128 wide did too; inf
        where nothing trains.
      paper: where it is defined.
    """

    factory: Callable[..., Method]
    kind: str
    trains: str
    acts: str
    merges: bool
    rate: float
    paper: str


TABLE: dict[str, Row] = {
    "full": Row(full, "-", "all", "everywhere", True, 5e-5, "-"),
    "head": Row(head, "-", "(d + 1) labels", "task head", True, 1e-3, "-"),
    "bitfit": Row(bitfit, "selective", "all biases", "biases", True, 3e-3, "arXiv:2106.10199"),
    # the paper's 5e-5 at BERT-large's width 1024
    "fishmask": Row(
        fishmask,
        "selective",
        "a share of all, the head's included",
        "any entry",
        True,
        6.67e-5,
        "arXiv:2111.09839",
    ),
    "lora": Row(lora, "low-rank", "r (inputs + outputs) a matrix", "weights", True, 5e-4, "arXiv:2106.09685"),
    # a paper's script: 2e-4 for A at width 768; B's is the ratio times that
    "lora_plus": Row(lora_plus, "low-rank", "r (inputs + outputs) a matrix", "weights", True, 2e-4, "arXiv:2402.12354"),
    "lora_fa": Row(lora_fa, "low-rank", "r outputs a matrix", "weights", True, 5e-4, "arXiv:2308.03303"),
    # PiSSA's 2e-5 at Llama-2-7B's width 4096: the factors are as large as the weight, so that less moves them
    "pissa": Row(pissa, "low-rank", "r (inputs + outputs) a matrix", "weights", True, 1e-4, "arXiv:2404.02948"),
    "olora": Row(olora, "low-rank", "r (inputs + outputs) a matrix", "weights", True, 1e-4, "arXiv:2406.01775"),
    # the paper's rates for RoBERTa-base are 4e-3 to 1e-2: b starts at zero behind random matrices and d of 0.1
    "vera": Row(vera, "low-rank", "outputs + r a matrix", "weights", True, 1e-2, "arXiv:2310.11454"),
    "dora": Row(dora, "low-rank", "r (inputs + outputs) + outputs a matrix", "weights", True, 5e-4, "arXiv:2402.09353"),
    # the middle of the paper's 5e-4 to 2.2e-3: Λ starts at 0 between small factors, so weights move less than LoRA's
    "adalora": Row(
        adalora,
        "low-rank",
        "r (inputs + outputs + 1) a matrix at first",
        "weights",
        True,
        1e-3,
        "arXiv:2303.10512",
    ),
    "dylora": Row(dylora, "low-rank", "r (inputs + outputs) a matrix", "weights", True, 5e-4, "arXiv:2210.07558"),
    "prefix": Row(prefix, "additive", "2 n L k", "attention", False, 1e-2, "arXiv:2101.00190"),
    "prompt": Row(prompt, "additive", "n d", "input", False, 0.3, "arXiv:2104.08691"),
    "p_tuning": Row(p_tuning, "additive", "n d and a network, dropped", "input", False, 1e-2, "arXiv:2103.10385"),
    "adapter": Row(adapter, "additive", "2 (2 d m + d + m) L", "attention and MLP", False, 1e-3, "arXiv:1902.00751"),
    "pfeiffer": Row(pfeiffer, "additive", "(2 d m + d + m) L", "MLP", False, 1e-3, "arXiv:2005.00247"),
    "parallel_adapter": Row(parallel_adapter, "additive", "(2 d m + d + m) L", "MLP", False, 1e-3, "arXiv:2110.04366"),
    "mam": Row(mam, "additive", "2 n L k + (2 d m + d + m) L", "attention and MLP", False, 1e-3, "arXiv:2110.04366"),
    # the paper's 3e-3 on T0-3B, 2048 wide
    "ia3": Row(ia3, "additive", "(2 k + ff) L", "keys, values, MLP", True, 8e-3, "arXiv:2205.05638"),
    "norm_tuning": Row(norm_tuning, "selective", "all norms", "norms", True, 3e-3, "arXiv:2312.11420"),
    "trainable_tokens": Row(trainable_tokens, "selective", "d a token", "embedding", True, 1e-3, "-"),
    "child_tuning": Row(
        child_tuning, "selective", "all, a drawn share a step", "everywhere", True, 5e-5, "arXiv:2109.05687"
    ),
    "neftune": Row(neftune, "-", "nothing; chain it", "embedded tokens, noise", True, math.inf, "arXiv:2310.05914"),
}
METHODS: dict[str, Callable[..., Method]] = {name: row.factory for name, row in TABLE.items()}


HEADER = ("method", "kind", "trains", "acts on", "merges", "rate", "paper", "file")


def cells(name: str) -> list[str]:
    """A method's line of the table, under `HEADER`; the file is the one in `peftjax/methods` that defines it."""
    r = TABLE[name]
    file = r.factory.__module__.rpartition(".")[2] + ".py"
    rate = f"{r.rate:g}" if math.isfinite(r.rate) else "-"
    return [name, r.kind, r.trains, r.acts, "yes" if r.merges else "no", rate, r.paper, file]


# No method, as it rewrites no tree: a way to decode, with a command of its own.
PROXY = ["proxy", "additive", "nothing of the base", "logits", "no", "-", "arXiv:2401.08565", "../proxy.py"]


def lines() -> list[list[str]]:
    """The table of methods, one list of cells for each, under `HEADER`."""
    return [*(cells(name) for name in TABLE), PROXY]


def methods_table() -> str:
    """The table of methods in Markdown."""
    rows = [HEADER, ["---"] * len(HEADER), *([f"`{name}`", *rest] for name, *rest in lines())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def default_rate(method: Method, width: int, own: Mapping[str, float] = MappingProxyType({})) -> float:
    """The default learning rate of a method: the smallest that a part of it, the task head left out, asks for.

    One rate holds for all parts: a prompt trains at LoRA's, if slowly, but LoRA does not at a prompt's.

    Args:
      own: name of a method -> the rate of a base for which it is known; the table's otherwise.
    """
    names = [name for name, _ in method.spec if name in TABLE]
    names = [name for name in names if name != "head"] or names
    return min((own.get(name, TABLE[name].rate * 768 / width) for name in names), default=1e-3)


def build(name: str, arguments: dict) -> Method:
    """The method of a name with its arguments.

    Raises:
      ValueError: an unknown name or argument; the message says which there are.
    """
    if name not in METHODS:
        raise ValueError(f"there is no method {name!r}; the methods are {', '.join(METHODS)}")
    try:
        return METHODS[name](**arguments)
    except TypeError as e:
        known = list(inspect.signature(METHODS[name]).parameters)
        raise ValueError(f"{name}: {e}; its arguments are {known}") from e


def from_spec(spec) -> Method:
    """The method that a spec, as an adapter file holds it, describes."""
    return chain(*(build(name, dict(arguments)) for name, arguments in spec))


def with_text_ids(made: Method, tokenizer: Any) -> Method:
    """The method with the token ids of its prompts' texts, at most as many as the prompt has room for."""

    def one(name, arguments):
        text = arguments.get("text") if name == "prompt" else None
        if text is None or arguments["ids"] is not None:
            return build(name, arguments)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: arguments["length"]]
        return build(name, {**arguments, "ids": ids})

    if all(name != "prompt" for name, _ in made.spec):
        return made
    return chain(*(one(name, dict(arguments)) for name, arguments in made.spec))


def parse(text: str) -> dict[str, Method]:
    """Reads methods as one writes them on the command line: name -> method, in order.

    Commas separate methods, `+` chains them, arguments are written as in Python.

    >>> list(parse("head, bitfit, lora(rank=4, targets=['query']) + bitfit"))
    ['head', 'bitfit', "lora(rank=4, targets=['query'])+bitfit"]

    Raises:
      ValueError: text that is no such list; an unknown method or argument.
    """
    try:
        items = ast.parse(f"[{text}]", mode="eval").body
    except SyntaxError:
        items = None
    if not isinstance(items, ast.List) or not items.elts:
        raise ValueError(f"cannot read the methods {text!r}; write for example 'head, lora(rank=4), lora+bitfit'")
    return {ast.unparse(item).replace(" + ", "+"): chain(*_terms(item)) for item in items.elts}


def _terms(item: ast.expr) -> list[Method]:
    match item:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left) + _terms(right)
        case ast.Name(id=name):
            return [build(name, {})]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            if all(k.arg for k in keywords):  # ** has no name
                return [build(name, {str(k.arg): _literal(k) for k in keywords})]
    raise ValueError(f"cannot read {ast.unparse(item)!r}; write a name, or a name with arguments such as lora(rank=4)")


def _literal(keyword: ast.keyword):
    try:
        return ast.literal_eval(keyword.value)
    except ValueError as e:
        value = ast.unparse(keyword.value)
        raise ValueError(f"cannot read the argument {keyword.arg}={value}; write a number, 'text' or a list") from e
