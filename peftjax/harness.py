"""Any model here under EleutherAI's lm-evaluation-harness: a model class for lm-eval, and a run of its tasks.

Needs the package lm-eval; importing this module registers the class there as `peftjax`.
"""

import functools
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, handle_non_serializable, make_disjoint_window, make_table
except ImportError as e:
    raise ImportError(f"this needs the package lm-eval ({e}); run: pip install 'peftjax[lm-eval]'") from e

from . import hub
from .chat import adopt_template, ends
from .checkpoint import load_adapter, write_atomically
from .generate import Decoding, Writer
from .likelihood import Likelihood
from .run import check_writable
from .tree import Tree

CHUNK = 512  # requests between two that are kept: of a run that is cut off, what was answered can be used again
SAMPLING = {"do_sample", "temperature", "top_k", "top_p", "num_beams", "length_penalty", "no_repeat_ngram_size"}
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # lm-eval's names for one thing


@register_model("peftjax")
class PeftjaxLM(TemplateLM):
    """A language model for lm-eval, with its adapter and quantised or not.

    A text begins with the BOS token, if the tokenizer has one, as it does in training here; pairs are cut where the
    context ends, contexts that are too long from the left, and documents into windows, as lm-eval has it.
    Beside an encoder, the context is the encoder's, and of a document's later windows the token before them.

    Args:
      model: folder or hub name, or a model-like value with the `params` and `tokenizer` to use.
      adapter: file of an adapter that was trained on the model; of one trained on conversations, with its template.
      quantize, dtype, param_dtype: as for `peftjax.hub.load`.
      batch_size: requests at once.
      max_length: in tokens; default: what the model has room for, less virtual tokens.
      seed: of sampled texts.

    Raises:
      ValueError: the model is no language model, or as `load_adapter`.
    """

    def __init__(
        self,
        model: Any,
        adapter: str | Path | None = None,
        *,
        params: Tree | None = None,
        tokenizer: Any = None,
        quantize: str | None = None,
        dtype: str = "float32",
        param_dtype: str = "float32",
        batch_size: int | str = 32,
        max_length: int | None = None,
        seed: int = 0,
        **unused: Any,
    ):
        super().__init__()  # lm-eval's own state, its ranks and cache
        if given := {k: v for k, v in unused.items() if k not in ("device", "max_batch_size") or v is not None}:
            raise ValueError(f"the peftjax model takes no {sorted(given)}; JAX chooses the device, batch_size is fixed")
        if isinstance(model, str | Path):
            tokenizer = tokenizer or hub.load_tokenizer(model)
            dtypes: dict[str, Any] = {"dtype": jax.numpy.dtype(dtype), "param_dtype": jax.numpy.dtype(param_dtype)}
            model = hub.load(model, "generation", quantize=quantize, **dtypes)
        if adapter is not None:
            params = load_adapter(adapter, model).params
            adopt_template(tokenizer, adapter)
        self.model, self.tokenizer = model, tokenizer
        self.params = model.params if params is None else params
        self.encodes = model.family.start_id is not None
        self.backend = "seq2seq" if self.encodes else "causal"  # how TemplateLM cuts pairs
        self.batch_size = int(batch_size)
        room = model.room(self.params)
        self.max_length = min(int(max_length or room), room)
        self._likely = Likelihood(model, tokenizer.pad_token_id or 0, self.batch_size)
        self.seed, self._key = seed, jax.random.key(seed)
        self._writer = functools.cache(functools.partial(Writer, model, tokenizer))  # each decoding compiles once

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_gen_toks(self) -> int:
        """Of a task that says nothing: lm-eval's 256, but half of a small model's room."""
        return min(256, self.max_length // 2)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.tokenizer.chat_template is None:
            raise ValueError("neither this model's tokenizer nor the adapter has a chat template; leave out --chat")
        way = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **way)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = add_special_tokens is not False
        ids = self.tokenizer(string, add_special_tokens=special and self.encodes, verbose=False)["input_ids"]
        begin = self.tokenizer.bos_token_id
        if special and not self.encodes and begin is not None and ids[:1] != [begin]:  # a chat template may write it
            return [begin, *ids]
        return ids

    def _loglikelihood_tokens(self, requests: Sequence, **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(f"an answer of {len(continuation)} tokens; the model has room for {self.max_length}")
            room = self.max_length if self.encodes else self.max_length + 1 - len(continuation)
            pairs.append((context[-room:], continuation))
        found: list[tuple[float, bool]] = []
        for at in range(0, len(pairs), CHUNK):
            for i, one in enumerate(self._likely(self.params, pairs[at : at + CHUNK]), at):
                found.append((one.logprob, one.greedy))
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for (text,) in (r.args for r in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = map(
                make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            )
            each = self._loglikelihood_tokens([(None, *w) for w in windows])
            totals.append(sum(logprob for logprob, _ in each))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        out: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        seen: Counter[str] = Counter()  # a prompt may be asked several times
        keys: list[jax.Array] = []
        for i, r in enumerate(requests):
            way = json.dumps(r.args[1], sort_keys=True)
            groups.setdefault(way, []).append(i)
            asked = json.dumps([r.args[0], way, seen[r.args[0]]])
            seen[r.args[0]] += 1
            # A key of its own: a run that goes on draws what one that was not cut off draws.
            keys.append(jax.random.fold_in(self._key, zlib.crc32(asked.encode())))
        ways = {way: self._decoding(json.loads(way)) for way in groups}  # what is wrong, before the first text
        for way, members in groups.items():
            how, until = ways[way]
            members.sort(key=lambda i: len(requests[i].args[0]))  # equal lengths together: less padding
            for at in range(0, len(members), CHUNK):
                part = members[at : at + CHUNK]
                prompts = [self._shortened(requests[i].args[0], how.max_new_tokens) for i in part]
                rest: dict[str, Any] = {
                    "key": jnp.stack([keys[i] for i in part]),
                    "until": until,
                    "batch_size": self.batch_size,
                }
                texts = self._writer(how).complete(self.params, prompts, **rest)
                for i, text in zip(part, texts, strict=True):
                    out[i] = text
                    self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return [out[i] for i in range(len(requests))]

    def _decoding(self, asked: dict[str, Any]) -> tuple[Decoding, tuple[str, ...]]:
        if unknown := sorted(asked.keys() - SAMPLING - {"until", *LENGTHS}):
            raise ValueError(
                f"generation_kwargs {unknown} are not known here; known: {sorted(SAMPLING)}, until, {LENGTHS}"
            )
        until = asked.get("until") or []
        new = next((int(asked[k]) for k in LENGTHS if asked.get(k) is not None), self.max_gen_toks)
        if new >= self.max_length and not self.encodes:
            raise ValueError(
                f"{new} new tokens leave no room for a prompt in the {self.max_length} positions; write a smaller "
                "max_gen_toks in the task's generation_kwargs"
            )
        temperature = float(asked.get("temperature") or 0.0)
        drawn = asked.get("do_sample", temperature > 0)  # lm-eval: greedy where do_sample is false
        beams = int(asked.get("num_beams", 1))
        how = Decoding(
            max_new_tokens=new,
            temperature=(temperature or 1.0) if drawn else 0.0,
            top_k=asked.get("top_k") or None if drawn else None,  # without effect where nothing is drawn, as there
            top_p=float(asked.get("top_p", 1.0)) if drawn else 1.0,
            beams=beams,
            length_penalty=float(asked.get("length_penalty", 1.0)) if beams > 1 else 1.0,
            no_repeat_ngram=int(asked.get("no_repeat_ngram_size", 0)),
            stop=ends(self.model, self.tokenizer) or (self.eot_token_id,),
        )
        return how, (until,) if isinstance(until, str) else tuple(until)

    def _shortened(self, prompt: str, new: int) -> list[int]:
        """The prompt as tokens, as `tok_encode` begins it, without those that leave no room for the text."""
        ids = self.tok_encode(prompt)
        room = self.max_length if self.encodes else self.max_length - new
        begin = ids[:1] if not self.encodes and ids[:1] == [self.tokenizer.bos_token_id] else []
        return ids if len(ids) <= room else [*begin, *ids[len(ids) - room + len(begin) :]]


def find_tasks(names: Sequence[str], include: str | Path | None = None) -> TaskManager:
    """lm-eval's tasks, and those of the YAML files in the folder `include`.

    Raises:
      ValueError: a name is none of them.
    """
    if include is not None and not Path(include).is_dir():
        raise ValueError(f"--include {include} is no folder; give the folder that holds the tasks' YAML files")
    manager = TaskManager(include_path=None if include is None else str(include))
    if missing := [n for n in names if not manager.match_tasks([n])] or not names:
        raise ValueError(
            f"lm-eval has no task {missing}; `lm_eval ls tasks` lists them, --include adds a folder of own"
        )
    return manager


def run_tasks(
    lm: Any,
    names: Sequence[str],
    manager: TaskManager,
    out: str | Path,
    *,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> tuple[dict, str]:
    """Runs tasks by `lm_eval.simple_evaluate`; returns the results and lm-eval's table (Markdown).

    The folder gets `results.json`, `table.md`, `samples_TASK.jsonl` and the answers as they come
    (`answers-MODEL_rank0.db`), which the same model uses again if the run is repeated there.

    Raises:
      ValueError: `chat`, and the tokenizer has no chat template.
    """
    if chat and lm.tokenizer.chat_template is None:
        raise ValueError(
            "this model's tokenizer has no chat template; leave out --chat, or give an --adapter that was trained on "
            "conversations (peftjax sft)"
        )
    out = check_writable(out)
    results: Any = simple_evaluate(
        lm,
        tasks=list(names),
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        use_cache=str(out / f"answers-{_digest(lm)}"),
        apply_chat_template=chat,
        bootstrap_iters=1000,
    )
    table = make_table(results) + ("\n" + make_table(results, "groups") if results.get("groups") else "")
    for task, samples in results.pop("samples", {}).items():
        lines = (json.dumps(s, default=handle_non_serializable, ensure_ascii=False) for s in samples)
        write_atomically(out / f"samples_{task}.jsonl", "".join(f"{line}\n" for line in lines))
    kept = {
        k: v for k, v in results.items() if k in ("results", "groups", "configs", "versions", "n-shot", "n-samples")
    }
    write_atomically(out / "results.json", json.dumps(kept, default=handle_non_serializable, indent=1))
    write_atomically(out / "table.md", table)
    return results, table


def _digest(lm: Any) -> str:
    """Sixteen hex digits of what answers depend on."""
    digest = hashlib.sha256(f"{lm.model.config} {lm.max_length} {lm.model.module.dtype} {lm.seed}".encode())
    for x in jax.tree.leaves(lm.params):
        flat = x.reshape(-1)
        digest.update(f"{x.dtype} {x.shape}".encode() + jax.device_get(flat[:: max(1, x.size // 1024)]).tobytes())
    return digest.hexdigest()[:16]
