"""Talking to a model: which tokens end its texts, chat templates, a conversation that stays within its positions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jinja2

from . import hub, sft
from .checkpoint import load_adapter, read_header
from .generate import Decoding, Writer, check
from .tree import Tree

Message = dict[str, str]  # {"role": "system", "user" or "assistant", "content": text}


def load(
    model_name: str, adapter: str | Path | None, how: Decoding, *, spoken: bool = False, **options: Any
) -> tuple[Writer, Tree]:
    """A writer of the model, and its parameters with the adapter's; the model's own end tokens are added to `how.stop`.

    An adapter that was trained on conversations brings its chat template.

    Args:
      spoken: there must be a chat template.
      options: for `peftjax.hub.load`.

    Raises:
      ValueError: from `check`, or no chat template, before the weights are read; or the adapter is for another base.
    """
    check(how)
    tokenizer = hub.load_tokenizer(model_name)
    if adapter is not None:
        adopt_template(tokenizer, adapter)
    if spoken:
        template_of(tokenizer)
    model = hub.load(model_name, "generation", **options)
    params = model.params if adapter is None else load_adapter(adapter, model).params
    return Writer(model, tokenizer, how._replace(stop=(*how.stop, *ends(model, tokenizer)))), params


def adopt_template(tokenizer: Any, adapter: str | Path) -> None:
    """Gives the tokenizer the chat template that the adapter was trained with, if it was trained on conversations."""
    tokenizer.chat_template = read_header(adapter)["extra"].get("chat_template") or tokenizer.chat_template


def ends(model: hub.Model, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens that the tokenizer and the model's config name.

    >>> ends(hub.load("tiny-books"), hub.load_tokenizer("tiny-books"))
    (2,)
    """
    named = model.hf_config.eos_token_id
    named = list(named) if isinstance(named, list | tuple) else [named]
    return tuple(dict.fromkeys(t for t in (tokenizer.eos_token_id, *named) if t is not None))


def template_of(tokenizer: Any, which: str | None = None) -> str:
    """The chat template of a name ('alpaca', 'plain') or in a file, or the tokenizer's own.

    Raises:
      ValueError: there is none.
    """
    if which is not None:
        return sft.template(which)
    if tokenizer.chat_template is None:
        raise ValueError(
            "this model's tokenizer has no chat template, so it was probably not made for conversations; "
            "write --chat-template alpaca, plain or a file with a Jinja template, or use `peftjax generate` without "
            "--chat"
        )
    return tokenizer.get_chat_template()


def encode(tokenizer: Any, messages: Sequence[Message], template: str, answer: str = "") -> list[int]:
    """The conversation as tokens, up to where the assistant's next message begins, and `answer` as what it says.

    Raises:
      ValueError: the template is no Jinja, or refuses the messages.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=template, add_generation_prompt=True, tokenize=False
        )
    except jinja2.TemplateError as e:
        raise ValueError(f"the chat template does not take these messages: {e}") from None
    return tokenizer(text + answer, add_special_tokens=False, verbose=False)["input_ids"]


def fitted(
    messages: Sequence[Message], room: int, tokens: Callable[[Sequence[Message]], list[int]]
) -> tuple[list[Message], list[int]]:
    """The messages without the oldest turns, so that they are at most `room` tokens; a system message stays.

    Raises:
      ValueError: the last message alone is too long.

    >>> talk = [{"role": r, "content": c} for r, c in (("user", "aaaa"), ("assistant", "bbbb"), ("user", "cc"))]
    >>> fitted(talk, 6, lambda messages: [0 for m in messages for c in m["content"]])
    ([{'role': 'user', 'content': 'cc'}], [0, 0])
    """
    kept = list(messages)
    while len(ids := tokens(kept)) > room:
        first = next(i for i, m in enumerate(kept) if m["role"] != "system")
        later = (i for i, m in enumerate(kept) if i > first and m["role"] == "user")
        if (second := next(later, None)) is None:
            raise ValueError(f"this message is too long: {len(ids)} tokens, and the model has room for {max(room, 0)}")
        del kept[first:second]
    return kept, ids


def converse(
    writer: Writer,
    params: Tree,
    template: str,
    *,
    read: Callable[[], str | None],
    write: Callable[[str], Any],
    note: Callable[[str], Any],
    system: str | None = None,
    key: jax.Array | None = None,
) -> list[Message]:
    """Answers each line until there are none or `/exit`; `/reset` begins anew. Returns the conversation.

    What no longer fits into the model's positions is forgotten, the oldest turns first, and `note` says so.

    Args:
      read: gives the next line, None at the end.
      write: takes the answers, piece by piece.
      note: takes what is to be said beside them.

    Raises:
      ValueError: the template does not take a message, or the system message leaves no room for any.
    """

    def tokens(messages):
        return encode(writer.tokenizer, messages, template)

    start = [] if system is None else [{"role": "system", "content": system}]
    room, messages, number = writer.room(params), list(start), 0
    fitted([*start, {"role": "user", "content": "?"}], room, tokens)  # what is wrong is said before anyone writes
    while (line := read()) is not None:
        line = line.strip()
        if line == "/exit":
            break
        if line == "/reset":
            messages = list(start)
            note("the conversation begins anew")
        if not line or line == "/reset":
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            kept, ids = fitted(asked, room, tokens)
        except ValueError as e:
            note(f"error: {e}")
            continue
        if dropped := len(asked) - len(kept):
            note(f"the {dropped} oldest messages no longer fit into the model's positions and are forgotten")
        said = ""
        try:
            for piece in writer.stream(params, ids, key=None if key is None else jax.random.fold_in(key, number)):
                said += piece
                write(piece)
        except KeyboardInterrupt:
            note("interrupted")  # the answer, not the conversation
        write("\n")
        messages, number = [*kept, {"role": "assistant", "content": said}], number + 1
    return messages
