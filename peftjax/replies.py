"""Who answers a prompt (an endpoint, or a model here), and the log that makes a run of many prompts resumable."""

import contextlib
import functools
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple

from .tree import Tree


class Params(NamedTuple):
    """How a reply is written. `seed` is for models here; endpoints do not get it."""

    max_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0


class Request(NamedTuple):
    """One prompt. `step` parts requests that would otherwise be the same."""

    step: str
    prompt: str
    params: Params = Params()

    def id(self, model: str) -> str:
        """Thirty-two hex digits of all that decides the reply."""
        text = json.dumps([model, self.step, self.prompt, list(self.params)])
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class Reply(NamedTuple):
    """What came back.

    Attributes:
      text: of the reply; empty where there was none.
      finish: why it ended: 'stop', 'length' (cut off), or 'malformed': no reply in the endpoint's format.
      prompt_tokens, completion_tokens: as counted by who replied; 0 if not.
      time: seconds since 1970, from who replied where that is said.
    """

    text: str
    finish: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    time: int = 0


Generator = Callable[[str, Params], Reply]


class Log:
    """Asks a generator, and keeps every reply on disk before it is used: what the file holds is not asked again.

    Args:
      file: JSONL, made if it is not there; a last line that was cut off is dropped, and `say` tells.
      generate: who answers; called from `parallel` threads.
      model: its name, a part of a request's identity.
      most: requests to answer, those from the file included; None: all.
      say: takes notes for the user.

    Raises:
      ValueError: the file is not such a log.
    """

    def __init__(
        self,
        file: Path,
        generate: Generator,
        model: str,
        *,
        parallel: int = 1,
        most: int | None = None,
        say: Callable[[str], None] = print,
    ):
        self.file, self.generate, self.model, self.parallel, self.most = file, generate, model, parallel, most
        self.offline = False  # True: what the file lacks is not asked, and is None
        self.used: dict[str, Reply] = {}
        self.asked = 0
        self._lock = threading.Lock()
        file.parent.mkdir(parents=True, exist_ok=True)
        self._known = _read(file, say) if file.exists() else {}

    @property
    def left(self) -> int | None:
        """Requests that may still be answered; None: any number."""
        return None if self.most is None else max(0, self.most - len(self.used))

    def ask(self, requests: Sequence[Request]) -> list[Reply | None]:
        """The replies, in order; None where the limit of requests is reached, or offline.

        An error of the generator is raised after the replies under way have been written down.
        """
        ids = [r.id(self.model) for r in requests]
        wanted = list(dict.fromkeys(i for i in ids if i not in self.used))
        allowed = {i for i in wanted[: self.left] if not self.offline or i in self._known}
        missing = {i: r for i, r in zip(ids, requests, strict=True) if i in allowed and i not in self._known}
        stop = threading.Event()

        def ask(id: str, request: Request) -> None:
            try:
                if not stop.is_set():
                    self._ask(id, request)
            except BaseException:
                stop.set()
                raise

        with ThreadPoolExecutor(self.parallel) as pool:  # its end waits for those under way
            futures = [pool.submit(ask, i, r) for i, r in missing.items()]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()
        self.used |= {i: self._known[i] for i in wanted if i in allowed}
        return [self.used.get(i) for i in ids]

    def _ask(self, id: str, request: Request) -> None:
        reply = self.generate(request.prompt, request.params)
        if not reply.time:
            reply = reply._replace(time=int(time.time()))
        line = {"id": id, "model": self.model, "step": request.step, "reply": reply._asdict()}
        line |= {"prompt": request.prompt, "params": request.params._asdict()}
        with self._lock:
            with self.file.open("ab") as file:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            self._known[id] = reply
            self.asked += 1

    def tokens(self) -> tuple[int, int]:
        """Of the prompts and of the replies used."""
        return sum(r.prompt_tokens for r in self.used.values()), sum(r.completion_tokens for r in self.used.values())


def _read(file: Path, say: Callable[[str], None]) -> dict[str, Reply]:
    content, known = file.read_bytes(), {}
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = json.loads(line)
            known[row["id"]] = Reply(**row["reply"])
        except (ValueError, TypeError, KeyError) as e:
            if number < len(lines):
                raise ValueError(
                    f"{file}, line {number} is not a line of a log of replies ({e}); mend or move it"
                ) from None
            say(f"{file}: the last line was cut off, and is dropped")
            with file.open("r+b") as f:
                f.truncate(len(content) - len(line))
            return known
    if lines[-1]:  # whole but for its end
        with file.open("ab") as f:
            f.write(b"\n")
    return known


def endpoint(
    llm: str,
    base_url: str | None = None,
    *,
    key_env: str = "OPENAI_API_KEY",
    timeout: float = 60.0,
    attempts: int = 6,
    backoff: float = 1.0,
    longest_wait: float = 120.0,
) -> Generator:
    """A model behind an endpoint of OpenAI's chat completions.

    What may pass (no connection, no answer in time, the status 408, 409, 425, 429 or 5xx) is tried again after
    `backoff · 2^n` seconds, or after what the endpoint asks for in Retry-After.

    Args:
      llm: the model's name there.
      base_url: such as http://localhost:8000/v1; default: OpenAI's.
      key_env: the environment variable that holds the key; an endpoint of one's own may do without.
      timeout: seconds without an answer.
      attempts: at most, for each request.
      backoff: seconds before the second attempt.
      longest_wait: seconds; one that asks for more is given up.

    Raises:
      ValueError: `openai` is not installed, no key; (from the generator) the endpoint refuses, or the last attempt
        failed. No message holds the key.
    """
    try:
        import openai
    except ImportError:
        raise ValueError("an endpoint needs the openai client: pip install 'peftjax[api]'") from None
    key = os.environ.get(key_env, "")
    if not key and base_url is None:
        raise ValueError(f"the environment variable {key_env} holds no key; set it, or name another by --key-env")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1; got {attempts}")
    client = openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0)
    name = f"{llm} at {client.base_url}"

    def generate(prompt: str, params: Params) -> Reply:
        options: dict[str, Any] = {"max_tokens": params.max_tokens, "temperature": params.temperature}
        options |= {"top_p": params.top_p} | ({"stop": list(params.stop)} if params.stop else {})
        messages: Any = [{"role": "user", "content": prompt}]
        for attempt in range(1, attempts + 1):
            wait = backoff * 2 ** (attempt - 1) * random.uniform(0.8, 1.2)  # apart, where several threads wait
            try:
                answer = client.chat.completions.with_raw_response.create(model=llm, messages=messages, **options)
                content = answer.http_response.content
                if content.lstrip().startswith(b"<"):
                    raise ValueError(f"{name} answers with a web page, not a chat completion; mend --base-url")
                return _parse(content)
            except openai.APITimeoutError:
                problem = f"did not answer within {timeout:g} s"
            except openai.APIConnectionError as e:
                problem = f"cannot be reached ({e.__cause__ or e})"
            except openai.APIStatusError as e:
                problem = f"answers {e.status_code}: {_message(e.response.text, key)}"
                passes = e.status_code in (408, 409, 425, 429) or e.status_code >= 500
                if not passes or e.code == "insufficient_quota":
                    raise ValueError(f"{name} {problem}") from None
                wait = _retry_after(e.response.headers.get("retry-after"), wait)
            if attempt < attempts and wait > longest_wait:
                raise ValueError(f"{name} {problem}; it asks to wait {wait:.0f} s, which is over {longest_wait:g} s")
            if attempt < attempts:
                time.sleep(wait)
        raise ValueError(f"{name} {problem}, in the last of {attempts} attempts")

    return generate


def _parse(content: bytes) -> Reply:
    try:
        answer = json.loads(content)
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        text = choice["message"]["content"] or ""
        text = text.encode(errors="replace").decode()  # half a surrogate pair would fit into no file
        counts = [int(usage.get(k) or 0) for k in ("prompt_tokens", "completion_tokens")]
        finish = "length" if choice.get("finish_reason") == "length" else "stop"
        at = int(answer.get("created") or 0)
        return Reply(text, finish, *counts, time=at if 0 < at < 2**33 else 0)  # some count milliseconds
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError):
        return Reply("", "malformed")


def _message(text: str, key: str) -> str:
    with contextlib.suppress(ValueError, TypeError, KeyError):
        text = json.loads(text)["error"]["message"]
    text = " ".join(str(text).split())
    return (text.replace(key, "[key]") if key else text)[:200] or "nothing"


def _retry_after(header: str | None, otherwise: float) -> float:
    """Seconds, or a date."""
    if header is None:
        return otherwise
    try:
        return max(0.0, float(header))
    except ValueError:
        try:
            return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return otherwise


def local(model: Any, params: Tree, tokenizer: Any) -> Generator:
    """A model here, by `generate.Writer`; its chat template is not used, the prompts suit both kinds.

    Raises:
      ValueError: (from the generator) prompt and reply do not fit into the model's positions.
    """
    import jax

    from .generate import Decoding, Writer

    stop = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)

    @functools.cache  # each compiles once
    def writer(p: Params) -> Writer:
        how = Decoding(p.max_tokens, p.temperature, top_p=p.top_p if p.temperature else 1.0, stop=stop)
        return Writer(model, tokenizer, how)

    def generate(prompt: str, p: Params) -> Reply:
        asked, room = len(tokenizer(prompt, verbose=False)["input_ids"]), model.room(params)
        if asked + p.max_tokens > room:
            raise ValueError(
                f"a prompt of {asked} tokens and a reply of up to {p.max_tokens} do not fit into the {room} positions "
                "of this model; allow fewer tokens, or take a model with more positions"
            )
        one = writer(p._replace(seed=0, stop=()))
        (text,) = one.complete(params, [prompt], key=jax.random.key(p.seed), until=p.stop)
        written = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        return Reply(text, "length" if written >= p.max_tokens else "stop", asked, written)

    return generate
