"""Methods: one file each. `METHODS` maps the name of each to its factory."""

import ast
from collections.abc import Callable

from .base import Method as Method
from .base import Site as Site
from .base import chain as chain
from .base import method as method
from .base import select as select
from .base import weight_method as weight_method
from .bitfit import bitfit as bitfit
from .full import full as full
from .head import head as head
from .lora import lora as lora
from .prefix import prefix as prefix

METHODS: dict[str, Callable[..., Method]] = {
    "full": full,
    "head": head,
    "bitfit": bitfit,
    "lora": lora,
    "prefix": prefix,
}


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
        import inspect

        known = list(inspect.signature(METHODS[name]).parameters)
        raise ValueError(f"{name}: {e}; its arguments are {known}") from e


def from_spec(spec) -> Method:
    """The method that a spec, as an adapter file holds it, describes."""
    return chain(*(build(name, dict(arguments)) for name, arguments in spec))


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
        raise ValueError(
            f"cannot read the methods {text!r}; write for example 'head, lora(rank=4), lora+bitfit'"
        )
    return {ast.unparse(item).replace(" + ", "+"): chain(*_terms(item)) for item in items.elts}


def _terms(item: ast.expr) -> list[Method]:
    match item:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left) + _terms(right)
        case ast.Name(id=name):
            return [build(name, {})]
        case ast.Call(func=ast.Name(id=name), args=[], keywords=keywords):
            if all(k.arg for k in keywords):  # ** has no name
                return [build(name, {str(k.arg): ast.literal_eval(k.value) for k in keywords})]
    raise ValueError(
        f"cannot read {ast.unparse(item)!r}; write a name, or a name with arguments such as lora(rank=4)"
    )
