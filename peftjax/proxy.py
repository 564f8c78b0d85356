"""Proxy-tuning: a large model decodes as if tuned, steered by what tuning changed in a small one.

Nothing of the large model trains, and only its logits are needed. Tune the small one as you like (an adapter will
do); before and after tuning it is the anti-expert and the expert.
"""

import math
from typing import Any, NamedTuple

import jax

from .hub import Model
from .models.layers import Output
from .tree import Tree


class Proxy(NamedTuple):
    """Three language models over one vocabulary that answer as one; make it by `proxy`, use it as a `Model`.

    Parameters are a tuple of three trees, of base, expert and anti-expert, and so are caches and hidden states.
    """

    base: Model
    expert: Model
    antiexpert: Model
    alpha: float

    def forward(
        self, params: tuple[Tree, Tree, Tree], batch: dict, key: jax.Array | None = None, *, cache: Any = None, **kwargs
    ) -> Output:
        """`logits = base + alpha (expert - anti-expert)`, from one batch."""
        caches = (None,) * 3 if cache is None else cache
        models = self.base, self.expert, self.antiexpert
        outs = [m.forward(p, batch, key, cache=c, **kwargs) for m, p, c in zip(models, params, caches, strict=True)]
        new = None if cache is None else tuple(o.cache for o in outs)
        logits = None if outs[0].logits is None else self._follow([o.logits for o in outs])
        return Output(tuple(o.hidden for o in outs), None, logits, new)  # pyright: ignore[reportArgumentType] - three of each

    def logits(self, params: tuple[Tree, Tree, Tree], hidden: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """The three heads over their hidden states, as one."""
        models = self.base, self.expert, self.antiexpert
        return self._follow([m.logits(p, h) for m, p, h in zip(models, params, hidden, strict=True)])

    def _follow(self, logits: Any) -> jax.Array:
        base, expert, antiexpert = logits
        return base + self.alpha * (expert - antiexpert)

    def empty_cache(self, params: tuple[Tree, Tree, Tree], batch: int, length: int) -> Any:
        """A cache for each of the three."""
        models = self.base, self.expert, self.antiexpert
        return tuple(m.empty_cache(p, batch, length) for m, p in zip(models, params, strict=True))

    @property
    def family(self):
        return self.base.family

    @property
    def module(self):
        return self.base.module

    @property
    def config(self):
        return self.base.config

    @property
    def forced(self):
        return self.base.forced

    @property
    def max_length(self) -> int:
        return min(m.max_length for m in (self.base, self.expert, self.antiexpert))

    def room(self, params: tuple[Tree, Tree, Tree]) -> int:
        """Longest text in tokens: what all three have room for after their virtual ones."""
        return min(m.room(p) for m, p in zip((self.base, self.expert, self.antiexpert), params, strict=True))


def proxy(base: Model, expert: Model, antiexpert: Model, alpha: float = 1.0) -> Proxy:
    """Decodes with `softmax(s_M + alpha (s_M+ - s_M-))`: Liu et al. 2024 (arXiv:2401.08565), section 2, equation 1.

    Args:
      base: M, the large model.
      expert: M+, the small one, tuned.
      antiexpert: M-, the small one as it was.
      alpha: how far to follow the difference; the paper's equation has 1.

    Raises:
      ValueError: one of them is no language model, or the vocabularies differ in size (the words are the caller's to
        compare: `same_words`), or some decode beside an encoder and some do not.

    >>> import jax.numpy as jnp
    >>> from peftjax import hub
    >>> model = hub.load("tiny-books")
    >>> tuned = jax.tree.map(lambda x: 1.1 * x, model.params)
    >>> three = proxy(model, model, model)
    >>> batch = {"input_ids": jnp.array([[5, 6, 7]])}
    >>> logits = three.forward((model.params, tuned, model.params), batch).logits
    >>> bool(jnp.allclose(logits, model.forward(tuned, batch).logits, atol=1e-4))  # here the base is the anti-expert
    True
    """
    roles = {"base": base, "expert": expert, "anti-expert": antiexpert}
    for role, model in roles.items():
        if model.module.head not in ("causal-lm", "seq2seq-lm"):
            raise ValueError(f"proxy: the {role} must be a language model; its head is {model.module.head!r}")
    if not math.isfinite(alpha):
        raise ValueError(f"proxy: alpha must be a finite number; got {alpha}")
    sizes = {role: model.config.vocab_size for role, model in roles.items()}
    if len({*sizes.values()}) > 1:
        raise ValueError(f"proxy: the three must share one vocabulary; their sizes are {sizes}")
    if len({model.module.head for model in roles.values()}) > 1:
        heads = {role: model.module.head for role, model in roles.items()}
        raise ValueError(f"proxy: all three must decode alone, or all beside an encoder; they are {heads}")
    return Proxy(base, expert, antiexpert, float(alpha))


def same_words(names: dict[str, str], tokenizers: dict[str, Any]) -> None:
    """Raises unless the tokenizers give every word the same id.

    Args:
      names: role -> name of the model, for the message; tokenizers: role -> tokenizer.
    """
    (first, words), *others = ((role, t.get_vocab()) for role, t in tokenizers.items())
    for role, other in others:
        if words != other:
            different = sorted({*words.items()} ^ {*other.items()})[:3]
            raise ValueError(
                f"proxy: {names[first]} and {names[role]} do not share one vocabulary (different: {different}); "
                "take models of one family"
            )
