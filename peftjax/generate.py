"""Generation with a static key/value cache: greedy, sampling or beams, all under one jit; or text piece by piece."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import beam, data
from .hub import TASKS, Model
from .mixed import Mixed, Mixture
from .models.layers import Cache, gather_rows, repeat_rows
from .proxy import Proxy
from .tree import Tree

Speaker = Model | Proxy | Mixed  # what has logits of the next token
Prompt = str | Sequence[int]
UNFINISHED = "\ufffd"  # what tokenizers write for bytes that are no whole character yet


class Decoding(NamedTuple):
    """How tokens are chosen.

    Attributes:
      max_new_tokens: tokens to add at most.
      temperature: 0: the most likely token; above: drawn from the softmax of the logits over it.
      top_k: draw from so many of the most likely tokens; None: from all.
      top_p: draw from the fewest most likely tokens whose probabilities sum to this.
      beams: texts that are followed at once; the best is returned.
      length_penalty: a finished text of n tokens has the score `Σ log p / n^length_penalty`.
      no_repeat_ngram: no sequence of so many tokens comes twice, the prompt (of a decoder alone) and its padding
        counted, as in transformers; 0: no such rule.
      stop: ids of the tokens that end a text.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[int, ...] = ()


# E2E as the code of LoRA decodes it (github.com/microsoft/LoRA, examples/NLG); the paper's table of hyperparameters
# (arXiv:2106.09685, appendix D.3) has the length penalty 0.9 for E2E and 0.8 for WebNLG and DART.
E2E_OF_LORA = Decoding(max_new_tokens=64, beams=10, length_penalty=0.8, no_repeat_ngram=4)


def check(how: Decoding) -> Decoding:
    """The decoding itself.

    Raises:
      ValueError: a value that means nothing, or one that would have no effect beside the others.

    >>> check(Decoding(beams=4)).beams
    4
    """
    for name, least in (("max_new_tokens", 1), ("beams", 1), ("no_repeat_ngram", 0), ("top_k", 1)):
        value = getattr(how, name)
        if value is not None and (value < least or value != int(value)):
            raise ValueError(f"{name} must be a whole number, at least {least}; got {value}")
    if not (how.temperature >= 0 and math.isfinite(how.temperature)):
        raise ValueError(f"temperature must be 0 (the most likely token) or above; got {how.temperature}")
    if not 0 < how.top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1; got {how.top_p}")
    if not math.isfinite(how.length_penalty):
        raise ValueError(f"length_penalty must be a finite number; got {how.length_penalty}")
    if how.beams > 1 and how.temperature > 0:
        raise ValueError(
            f"{how.beams} beams are followed by probability, not drawn; leave out beams or the temperature "
            f"({how.temperature})"
        )
    if how.temperature == 0 and (how.top_k is not None or how.top_p < 1):
        raise ValueError("top_k and top_p are for drawing; give a temperature too, such as 1")
    if how.beams == 1 and how.length_penalty != 1:
        raise ValueError(
            f"length_penalty {how.length_penalty} ranks beams, and there is one; give beams too, such as 4"
        )
    return how


class Text(NamedTuple):
    """Texts that are being written, a batch of rows.

    Attributes:
      tokens: (rows, width): what the decoder read, what was written after it, padding.
      length: columns filled.
      shift: (rows,): a token's position less its column.
      cache: of all tokens but the last.
    """

    tokens: jax.Array
    length: jax.Array
    shift: jax.Array
    cache: Any


def _start(
    model: Speaker, params: Tree, input_ids: jax.Array, attention_mask: jax.Array, room: int, pad_id: int
) -> tuple[jax.Array, Text]:
    """Reads the prompts, (rows, length), with `room` columns after them; the logits are those of the next token."""
    rows, length = input_ids.shape
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    if model.family.start_id is not None:
        cache = model.empty_cache(params, rows, room)
        read, shift = jnp.full((rows, 1), model.family.start_id(model.config)), jnp.zeros(rows, jnp.int32)
    else:
        cache = model.empty_cache(params, rows, length + room)
        read, shift = input_ids, attention_mask.sum(axis=1).astype(jnp.int32) - length
        batch["positions"] = jnp.maximum(jnp.cumsum(attention_mask, axis=1) - 1, 0)
    out: Any = model.forward(params, batch, cache=cache, last_only=True)
    tokens = jnp.full((rows, read.shape[1] + room), pad_id, jnp.int32).at[:, : read.shape[1]].set(read)
    return out.logits[:, -1], Text(tokens, jnp.int32(read.shape[1]), shift, out.cache)


def _advance(model: Speaker, params: Tree, cache: Any, token: jax.Array, position: jax.Array) -> tuple[jax.Array, Any]:
    """Reads one more token a row, (rows,), at these positions."""
    if model.family.start_id is not None:
        out: Any = model.forward(params, {"decoder_input_ids": token[:, None]}, cache=cache, last_only=True)
    else:
        ones = jnp.ones((len(token), 1), jnp.int32)
        batch = {"input_ids": token[:, None], "attention_mask": ones, "positions": position[:, None]}
        out = model.forward(params, batch, cache=cache, last_only=True, continued=True)
    return out.logits[:, -1], out.cache


def without_repeats(scores: jax.Array, tokens: jax.Array, length: jax.Array, n: int) -> jax.Array:
    """-inf where a token would complete a sequence of n that is in the row already.

    Args:
      scores: (rows, vocabulary); tokens: (rows, width), of which the first `length` columns count.

    >>> scores = without_repeats(jnp.zeros((1, 5)), jnp.array([[1, 2, 3, 1, 0]]), jnp.int32(4), 2)
    >>> scores[0].tolist()  # 1 has been followed by 2
    [0.0, 0.0, -inf, 0.0, 0.0]
    """
    starts = tokens.shape[1] - n + 1
    if n == 0 or starts < 1:
        return scores
    windows = tokens[:, jnp.arange(starts)[:, None] + jnp.arange(n)]
    end = jax.lax.dynamic_slice_in_dim(tokens, length - n + 1, n - 1, axis=1)
    again = (windows[..., :-1] == end[:, None]).all(-1) & (jnp.arange(starts) + n <= length)
    last = jnp.where(again, windows[..., -1], scores.shape[1])
    return scores.at[jnp.arange(len(scores))[:, None], last].set(-jnp.inf, mode="drop")


def narrowed(logits: jax.Array, how: Decoding) -> jax.Array:
    """The logits over the temperature, -inf where top-k, then top-p, exclude a token; (..., vocabulary).

    Tokens as likely as the last that is let in are let in too.

    >>> narrowed(jnp.array([1.0, 2.0, 3.0, 4.0]), Decoding(temperature=2.0, top_k=3, top_p=0.8)).tolist()
    [-inf, -inf, 1.5, 2.0]
    """
    scores = logits / how.temperature
    if how.top_k is not None and how.top_k < scores.shape[-1]:
        scores = jnp.where(scores < jax.lax.top_k(scores, how.top_k)[0][..., -1:], -jnp.inf, scores)
    if how.top_p < 1:
        rising = jnp.sort(scores, axis=-1)
        out = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= 1 - how.top_p
        least = jnp.where(out.at[..., -1].set(False), jnp.inf, rising).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < least, -jnp.inf, scores)
    return scores


def allowed(model: Speaker, how: Decoding, scores: jax.Array, tokens: jax.Array, length: Any, number: Any) -> jax.Array:
    """-inf where a token must not come: one that `without_repeats` excludes, and all others where one is forced.

    A forced token has the score 0, as in transformers.

    Args:
      scores: (rows, vocabulary); tokens: (rows, width), of which the first `length` columns count.
      number: of new tokens before this one.
    """
    scores = without_repeats(scores, tokens, length, how.no_repeat_ngram)
    for token, at in zip(model.forced, (0, how.max_new_tokens - 1), strict=True):
        if token is not None:
            only = jnp.where(jnp.arange(scores.shape[-1]) == token, 0.0, -jnp.inf)
            scores = jnp.where(number == at, only.astype(scores.dtype), scores)
    return scores


def _choose(
    model: Speaker, how: Decoding, logits: jax.Array, text: Text, keys: jax.Array | None, number: Any
) -> jax.Array:
    """The next token of each row, (rows,); each draws by its own key and the number of the new token."""
    logits = allowed(model, how, logits, text.tokens, text.length, number)
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    assert keys is not None  # `_row_keys` gives some where tokens are drawn
    own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    return jax.vmap(jax.random.categorical)(own, narrowed(logits, how)).astype(jnp.int32)


def _written(text: Text, token: jax.Array) -> Text:
    tokens = jax.lax.dynamic_update_slice(text.tokens, token[:, None], (0, text.length))
    return text._replace(tokens=tokens, length=text.length + 1)


def _read_last(model: Speaker, params: Tree, text: Text) -> tuple[jax.Array, Text]:
    at = text.length - 1
    token = jax.lax.dynamic_index_in_dim(text.tokens, at, axis=1, keepdims=False)
    logits, cache = _advance(model, params, text.cache, token, at + text.shift)
    return logits, text._replace(cache=cache)


def _row_keys(how: Decoding, key: jax.Array | None, rows: int) -> jax.Array | None:
    if how.temperature == 0:
        return None
    if key is None:
        raise ValueError("drawing tokens needs a key; write key=jax.random.key(0), or temperature=0 to draw none")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape not in ((), (rows,)):
        raise ValueError(
            f"the key must be one jax.random.key, or one for each of the {rows} rows; got {key.dtype}{key.shape}"
        )
    return key if key.shape else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def decoder(model: Speaker, how: Decoding, pad_id: int = 0) -> Callable[..., jax.Array]:
    """A jitted function that continues prompts: (params, input_ids, attention_mask, key=None) -> new tokens.

    It compiles once for each shape of prompts. The prompts are (batch, length), padded on the left; for an encoder,
    beside which the decoder begins with its start token, on the right (`padding_side`). The new tokens are
    (batch, max_new_tokens) int32; a row ends with a token of `how.stop`, and is filled up with `pad_id`. The loop ends
    when all rows have. Methods must be resolved (`method.resolve(params, None)`); prefixes are included.

    The key, needed where tokens are drawn, is one `jax.random.key`, or one for each row: with its own key a row's text
    does not depend on the batch that it stands in.

    Raises:
      ValueError: no language model, a stop token beyond the vocabulary, or from `check`.

    >>> from peftjax import hub
    >>> model = hub.load("tiny-books")
    >>> ids = jnp.array([[5, 6, 7]])
    >>> decoder(model, Decoding(max_new_tokens=4, beams=3))(model.params, ids, jnp.ones_like(ids)).shape
    (1, 4)
    """
    check(how)
    if model.module.head not in TASKS["generation"]:
        raise ValueError(f"generation needs a language model; this model's head is {model.module.head!r}")
    if beyond := [t for t in how.stop if not 0 <= t < model.config.vocab_size]:
        raise ValueError(f"the stop tokens {beyond} are not among the {model.config.vocab_size} of this model")
    ends = jnp.array(how.stop, jnp.int32)

    def one_by_one(params, logits, text, keys):
        begun = text.length

        def add(logits, text, ended):
            token = jnp.where(ended, pad_id, _choose(model, how, logits, text, keys, text.length - begun))
            return _written(text, token), ended | jnp.isin(token, ends)

        def go_on(carry):
            text, ended = carry
            return (text.length - begun < how.max_new_tokens) & ~ended.all()

        def body(carry):
            text, ended = carry
            return add(*_read_last(model, params, text), ended)

        carry = add(logits, text, jnp.zeros(len(logits), bool))
        text, _ = jax.lax.while_loop(go_on, body, carry)
        return text.tokens[:, -how.max_new_tokens :]

    def by_beams(params, logits, text):
        shift = jnp.repeat(text.shift, how.beams)
        return beam.search(
            logits,
            text.tokens,
            text.cache,
            beams=how.beams,
            max_new_tokens=how.max_new_tokens,
            length_penalty=how.length_penalty,
            stop=how.stop,
            forbid=lambda scores, tokens, length: allowed(model, how, scores, tokens, length, length - text.length),
            repeat=lambda cache: _each_cache(lambda c: repeat_rows(c, how.beams), cache),
            gather=lambda cache, rows: _each_cache(lambda c: gather_rows(c, rows), cache),
            advance=lambda cache, token, at: _advance(model, params, cache, token, at + shift),
        )

    @jax.jit
    def generate(params: Tree, input_ids: jax.Array, attention_mask: jax.Array, key: Any = None) -> jax.Array:
        keys = _row_keys(how, key, len(input_ids))
        logits, text = _start(model, params, input_ids, attention_mask, how.max_new_tokens, pad_id)
        return one_by_one(params, logits, text, keys) if how.beams == 1 else by_beams(params, logits, text)

    return generate


def padding_side(model: Speaker) -> Literal["left", "right"]:
    """Where prompts are padded: a decoder writes on after their ends; an encoder has its virtual tokens before them."""
    return "left" if model.family.start_id is None else "right"


def _each_cache(change: Callable[[Cache], Cache], caches: Any) -> Any:
    return jax.tree.map(change, caches, is_leaf=lambda x: isinstance(x, Cache))


class Writer:
    """A model, its tokenizer and a way to choose tokens, for texts; each padded length compiles once.

    Prompts are texts or token ids. A text gets the BOS token before it, if there is one, or for an encoder what its
    tokenizer adds.

    Args:
      model: a language model.
      tokenizer: transformers' tokenizer of it.
      how: `stop` should hold the tokenizer's `eos_token_id`; only tokens in it end a text.
      decode: what `complete` calls for a batch, with `decoder`'s arguments; default: a `decoder` of its own.

    Raises:
      ValueError: from `decoder`; and from all calls, prompts that are empty or leave no room for the new tokens.
    """

    def __init__(self, model: Speaker, tokenizer: Any, how: Decoding, decode: Callable | None = None):
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.pad_id = tokenizer.pad_token_id or 0
        self._decode = decode or decoder(model, how, self.pad_id)
        self._first = jax.jit(self._begin)
        self._next = jax.jit(self._go_on, donate_argnums=1)  # the cache is written in place

    def complete(
        self,
        params: Tree,
        prompts: Sequence[Prompt],
        *,
        key: jax.Array | None = None,
        until: Sequence[str] = (),
        batch_size: int = 32,
    ) -> list[str]:
        """What the model writes after each prompt, cut before the first of the texts in `until`.

        Where tokens are drawn, prompt i draws by `fold_in(key, i)`.
        """
        _check_ends(until)
        if not len(prompts):
            return []
        examples = [data.Example(ids) for ids in self._encode(params, prompts)]
        keys = _row_keys(self.how, key, len(examples))
        lengths = [self._bucket(params, len(e.input_ids)) for e in examples]
        buckets = data.bucket_lengths(lengths, multiple=1)
        rows = min(batch_size, _power_of_two(len(examples)))
        texts: dict[int, str] = {}
        for batch in data.batches(examples, rows, buckets, pad_id=self.pad_id, side=padding_side(self.model)):
            real = batch["index"] >= 0
            at = np.where(real, batch["index"], batch["index"][0])
            mine = params.rows(at, len(examples)) if isinstance(params, Mixture) else params
            own = None if keys is None else keys[at]
            new = np.asarray(self._decode(mine, batch["input_ids"], batch["attention_mask"], own))
            for i, row in zip(batch["index"][real].tolist(), new[real].tolist(), strict=True):
                end = next((j for j, t in enumerate(row) if t in self.how.stop), len(row))
                text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
                texts[i] = text[: _end(text, until)]
        return [texts[i] for i in range(len(examples))]

    def stream(
        self, params: Tree, prompt: Prompt, *, key: jax.Array | None = None, until: Sequence[str] = ()
    ) -> Iterator[str]:
        """The text piece by piece, as it comes; together they are what `complete` writes after this prompt alone.

        Bytes that are no whole character yet, and what may be the beginning of a text in `until`, are held back.

        Raises:
          ValueError: beams; they are known at the end only.
        """
        if self.how.beams > 1:
            raise ValueError(f"{self.how.beams} beams are known at the end only; use complete, or stream one")
        _check_ends(until)
        (ids,) = self._encode(params, [prompt])
        keys = _row_keys(self.how, key, 1)
        length = self._bucket(params, len(ids))
        (batch,) = data.batches([data.Example(ids)], 1, [length], pad_id=self.pad_id, side=padding_side(self.model))
        return self._pieces(params, batch["input_ids"], batch["attention_mask"], keys, until)

    def _pieces(self, params, row, mask, keys, until):
        new, shown = [], ""
        token, text = self._first(params, row, mask, keys)
        for number in range(1, self.how.max_new_tokens + 1):
            new.append(int(token[0]))
            if new[-1] in self.how.stop:
                new.pop()
                break
            said = self.tokenizer.decode(new, skip_special_tokens=True)
            if _end(said, until) < len(said):
                break
            safe = said[: _open(said, until)].rstrip(UNFINISHED)
            if len(safe) > len(shown) and safe.startswith(shown):
                yield safe[len(shown) :]
                shown = safe
            if number < self.how.max_new_tokens:
                token, text = self._next(params, text, keys, jnp.int32(number))
        said = self.tokenizer.decode(new, skip_special_tokens=True)
        said = said[: _end(said, until)]
        if said != shown:
            yield said[data.common(shown, said) :]

    def _begin(self, params, input_ids, attention_mask, keys):
        room = self.how.max_new_tokens
        logits, text = _start(self.model, params, input_ids, attention_mask, room, self.pad_id)
        token = _choose(self.model, self.how, logits, text, keys, 0)
        return token, _written(text, token)

    def _go_on(self, params, text, keys, number):
        logits, text = _read_last(self.model, params, text)
        token = _choose(self.model, self.how, logits, text, keys, number)
        return token, _written(text, token)

    def room(self, params: Tree) -> int:
        """The longest prompt in tokens."""
        return self.model.room(params) - (0 if self.model.family.start_id is not None else self.how.max_new_tokens)

    def _encode(self, params: Tree, prompts: Sequence[Prompt]) -> list[list[int]]:
        encodes, bos = self.model.family.start_id is not None, self.tokenizer.bos_token_id
        begin = [] if encodes or bos is None else [bos]
        out, room, most = [], self.room(params), self.model.config.vocab_size
        for i, prompt in enumerate(prompts):
            ids, which = prompt, f"prompt {i}" if len(prompts) > 1 else "the prompt"
            if isinstance(prompt, str):
                ids = [*begin, *self.tokenizer(prompt, add_special_tokens=encodes, verbose=False)["input_ids"]]
            ids = [int(t) for t in ids]
            if not ids:
                raise ValueError(f"{which} has no tokens, and the tokenizer no BOS token; write at least a word")
            if len(ids) > room:
                raise ValueError(
                    f"{which} has {len(ids)} tokens; with {self.how.max_new_tokens} new ones the model has room for "
                    f"{max(room, 0)}; shorten it, or give a smaller max_new_tokens"
                )
            if max(ids) >= most or min(ids) < 0:
                raise ValueError(
                    f"{which} has the token {max(ids) if max(ids) >= most else min(ids)}, and the model has {most}; "
                    "the tokenizer is not this model's"
                )
            out.append(ids)
        return out

    def _bucket(self, params: Tree, length: int) -> int:
        """A power of two, or midway between two, so that few lengths are compiled."""
        up = max(16, _power_of_two(length))
        return min(3 * up // 4 if length <= 3 * up // 4 else up, self.room(params))


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _check_ends(until: Sequence[str]) -> None:
    if isinstance(until, str) or not all(until):
        raise ValueError(f"the texts that end an answer are a list of texts, none of them empty; got {until!r}")


def _end(text: str, until: Sequence[str]) -> int:
    """Where the first of the texts in `until` begins, or the text ends."""
    return min((text.index(u) for u in until if u in text), default=len(text))


def _open(text: str, until: Sequence[str]) -> int:
    """Where the longest beginning of a text in `until` that the text ends with begins, or the text ends."""
    kept = (n for u in until for n in range(min(len(u) - 1, len(text)), 0, -1) if text.endswith(u[:n]))
    return len(text) - max(kept, default=0)


def complete(
    model: Speaker,
    params: Tree,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    how: Decoding,
    *,
    key: jax.Array | None = None,
    until: Sequence[str] = (),
    batch_size: int = 32,
) -> list[str]:
    """What the model writes after each prompt, cut before the first of the texts in `until`.

    Each call compiles; a `Writer` that is called again does not.

    >>> from peftjax import hub
    >>> model, tokenizer = hub.load("tiny-books"), hub.load_tokenizer("tiny-books")
    >>> len(complete(model, model.params, tokenizer, ["The ship", "A house"], Decoding(max_new_tokens=8)))
    2
    """
    return Writer(model, tokenizer, how).complete(params, prompts, key=key, until=until, batch_size=batch_size)


def stream(
    model: Speaker,
    params: Tree,
    tokenizer: Any,
    prompt: Prompt,
    how: Decoding,
    *,
    key: jax.Array | None = None,
    until: Sequence[str] = (),
) -> Iterator[str]:
    """The text after one prompt, piece by piece; see `Writer.stream`.

    >>> from peftjax import hub
    >>> model, tokenizer = hub.load("tiny-books"), hub.load_tokenizer("tiny-books")
    >>> how = Decoding(max_new_tokens=8)
    >>> pieces = stream(model, model.params, tokenizer, "The ship", how)
    >>> "".join(pieces) == complete(model, model.params, tokenizer, ["The ship"], how)[0]
    True
    """
    return Writer(model, tokenizer, how).stream(params, prompt, key=key, until=until)
