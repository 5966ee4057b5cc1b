"""A text classifier as a target: it reads a request and answers with its label, so that evading it can be measured.

It reads the text of the last user message and nothing else: no system prompt, no earlier turn. Of its labels one lets a
request pass. An answer is a label as text, finish "stop" where the request passes and "filter" where it does not, and
the log-probabilities of all labels, the passing one first.
"""

import logging
import threading
from collections.abc import Iterator, Sequence
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as hf_logging

from saddlepoint.errors import ModelError, UsageError
from saddlepoint.models import HEAD, SAFELY, card, pull
from saddlepoint.targets import bare_name, folder_of
from saddlepoint.types import Chat, Completion, Compute, Frame, Place, Query, Reduce, user

PASSES = ("safe", "allowed", "benign", "ok", "harmless", "neutral", "normal", "clean", "non-toxic", "not_toxic", "legit")
UNSAFE = ("unsafe", "harmful", "malicious", "jailbreak", "injection", "toxic", "hate", "offensive", "abusive", "spam", "nsfw")
_TOKENS_AT_ONCE = 8192  # rows * length of one forward pass


class MeanPooled(nn.Module):
    """A BERT-like encoder one of whose layers is averaged over a text's tokens and read by a linear head; logits (n, labels)."""

    def __init__(self, encoder: Any, layer: int, head: nn.Linear):
        super().__init__()
        self.base_model, self.head, self.config = encoder, head, encoder.config
        # The layers above are not run for it: the same weights once more, up to this layer.
        self.lower = deepcopy(encoder, {id(p): p for p in encoder.parameters()})
        self.lower.encoder.layer = self.lower.encoder.layer[:layer]

    def pooled(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """(n, width): what the head reads."""
        return _mean(self.lower(attention_mask=attention_mask, **inputs).last_hidden_state, attention_mask)

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.pooled(attention_mask, **inputs)))


class Classifier:
    """A sequence classifier with its weights at hand. Implements `WhiteBox` and `Encoder`.

    In a frame the affirmative is the label that an attacker wants, an int64 tensor of length 1: the passing label, or the
    one that the behavior's affirmative names. A row is the tokens of a text and then a label, so `scored` is always 1.

    Args:
        labels: The names of the logits, in order.
        passes: The label that lets a request pass; None takes the one whose name does not mean unsafe.

    Raises:
        UsageError: No such label, or the names do not say which one lets a request pass.
    """

    def __init__(self, name: str, model: Any, tokenizer: Any, labels: Sequence[str], passes: str | None = None):
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.passes = passing(name, self.labels, passes)
        self.device: torch.device = self.embedding.device
        self.compute = Compute()
        self._lock = threading.RLock()
        self._anchor = self.ids("a")
        whole: list[int] = tokenizer("a")["input_ids"]
        begin = next((i for i in range(len(whole)) if whole[i : i + len(self._anchor)] == self._anchor), 0)
        self._begin, self._end = whole[:begin], whole[begin + len(self._anchor) :]

    def __repr__(self) -> str:
        return f"Classifier({self.name!r}, passes={self.passes!r})"

    @classmethod
    def load(cls, name: str, dtype: str = "auto", device: str = "auto") -> "Classifier":
        """Load by target name: `guard`, a folder, or `hf:ORG/NAME`; `NAME#LABEL` says which label lets a request pass.

        Args:
            dtype: "auto" is float32: such models are small, and a search needs their small differences.
            device: "auto" takes the GPU if there is one.
        """
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        allowed = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in allowed:
            raise UsageError(f"no dtype '{dtype}'; allowed: {', '.join(allowed)}")
        bare = bare_name(name)
        folder, chosen = folder_of(bare), name[len(bare) + 1 :]
        hf_logging.disable_progress_bar()
        try:
            if (folder / HEAD).is_file():
                written = card(folder)
                base, labels = pull(written["base"], say=logging.getLogger("saddlepoint").info), written["labels"]
                tensors = load_file(folder / HEAD)
                head = nn.Linear(tensors["weight"].shape[1], tensors["weight"].shape[0])
                head.load_state_dict(tensors)
                encoder = AutoModel.from_pretrained(base, dtype=torch.float32, **SAFELY)
                model: Any = MeanPooled(encoder, written["layer"], head)
                chosen = chosen or written.get("passes", "")
            else:
                base = folder
                model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=allowed[dtype], **SAFELY)
                labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
            tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        except (OSError, ValueError, KeyError, RuntimeError) as wrong:
            raise ModelError(f"'{name}' cannot be loaded: {(str(wrong).splitlines() or ['no reason given'])[0]}") from wrong
        return cls(name, model.to(allowed[dtype]).to(where), tokenizer, labels, chosen or None)

    # ---- answering ----------------------------------------------------------------------------------------------

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Label each query's last user message, in order."""
        answers: dict[int, Completion] = {}
        read: dict[int, list[int]] = {}
        for i, query in enumerate(queries):
            try:
                read[i] = self.prompt_ids(query.chat)
            except UsageError as wrong:
                answers[i] = Completion("", finish="error", error=str(wrong))
        logprobs = self._logits(list(read.values())).log_softmax(-1).tolist() if read else []
        order = sorted(range(len(self.labels)), key=lambda k: k != self.passes)
        for (i, ids), row in zip(read.items(), logprobs, strict=True):
            said = max(range(len(row)), key=row.__getitem__)
            spread = tuple((self.labels[k], row[k]) for k in order)
            answers[i] = Completion(self.labels[said], len(ids), finish="stop" if said == self.passes else "filter", top_logprobs=(spread,))
        return [answers[i] for i in range(len(queries))]

    @torch.no_grad()
    def _logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """float32 (n, labels) of token rows."""
        found = torch.empty(len(rows), len(self.labels))
        for index, ids, mask in self._batches(rows):
            found[index] = self.model(input_ids=ids, attention_mask=mask).logits.float().cpu()
        return found

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 (n, width): a vector of length 1 for each text, the mean of its last hidden states.

        A text longer than the context is read up to there.
        """
        room = self.room - len(self._begin) - len(self._end)
        rows = [[*self._begin, *self.ids(text)[:room], *self._end] for text in texts]
        found = torch.empty(len(rows), self.embedding.shape[1])
        for index, ids, mask in self._batches(rows):
            found[index] = _mean(self.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state, mask).float().cpu()
        return F.normalize(found, dim=-1)

    @torch.no_grad()
    def pooled(self, texts: Sequence[str]) -> Tensor:
        """float32 (n, width): what the head of a `MeanPooled` model reads of each text."""
        rows = [self.prompt_ids(user(text)) for text in texts]
        found = torch.empty(len(rows), self.embedding.shape[1])
        for index, ids, mask in self._batches(rows):
            found[index] = self.model.pooled(input_ids=ids, attention_mask=mask).float().cpu()
        return found

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, ids, mask) of batches of alike lengths, padded right; one batch at a time is on the device."""
        waiting = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        pad = self.tokenizer.pad_token_id or 0
        with self._lock:
            while waiting:
                size = max((n for n in range(1, len(waiting) + 1) if n * len(rows[waiting[n - 1]]) <= _TOKENS_AT_ONCE), default=1)
                index, waiting = waiting[:size], waiting[size:]
                width = len(rows[index[-1]])
                ids = torch.tensor([[*rows[i], *[pad] * (width - len(rows[i]))] for i in index], device=self.device)
                mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in index], device=self.device)
                self.compute.tokens += ids.numel()
                yield index, ids, mask

    # ---- text and tokens ----------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tokens that it reads at most."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 30))

    def ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Token ids of the last user message, with the special tokens around them.

        Raises:
            UsageError: There is none, it holds embeddings or token ids, or it is longer than the context; it is never cut.
        """
        last = next((m for m in reversed(chat) if m.role == "user"), None)
        if last is None:
            raise UsageError(f"'{self.name}' reads the last user message, and the chat has none; give one")
        if last.soft or last.ids:
            raise UsageError(f"'{self.name}' reads text, and this message has embeddings or token ids of its own")
        found = [*self._begin, *self.ids(last.text), *self._end]
        if len(found) > self.room:
            raise UsageError(f"the request has {len(found)} tokens; '{self.name}' reads {self.room}; give a shorter one")
        return found

    def text(self, ids: Tensor) -> str:
        """Decode token ids of shape (length,); a first token that begins a word brings its space."""
        after = self.tokenizer.decode([*self._anchor, *ids.tolist()])
        return str(after).removeprefix(str(self.tokenizer.decode(self._anchor)))

    def frame(self, chat: Chat, control: str, affirmative: str, place: Place = "suffix") -> Frame:
        """Tokenize the last user message with `control` before or after it; the affirmative becomes a label.

        Raises:
            UsageError: There is no user message, the control has no tokens, or the context is too short.
        """
        self.prompt_ids(chat)
        text = next(m for m in reversed(chat) if m.role == "user").text
        if place == "suffix":
            parts = [[*self._begin, *self.ids(text)], self.ids(f" {control}"), self._end]
        else:
            parts = [self._begin, self.ids(control), [*self.ids(f" {text}"), *self._end]]
        if not parts[1]:
            raise UsageError(f"the control {control!r} has no tokens under '{self.name}'; give some text")
        if (length := sum(map(len, parts))) > self.room:
            raise UsageError(f"request and control have {length} tokens; '{self.name}' reads {self.room}; give a shorter request")
        named = [k for k, label in enumerate(self.labels) if label.lower() == affirmative.strip().lower()]
        return Frame(*(torch.tensor(p, dtype=torch.long, device=self.device) for p in (*parts, [named[0] if named else self.passes])))

    def candidates(self, ascii_only: bool) -> Tensor:
        """bool (vocabulary,): tokens that an optimizer may write: no special, reserved or padded ones, each one readable."""
        allowed = torch.zeros(self.embedding.shape[0], dtype=torch.bool)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        for token in range(min(len(self.tokenizer), len(allowed))):
            text = self.tokenizer.decode([token])
            readable = text.isprintable() and text.strip() != "" and "\ufffd" not in text and not text.startswith("[unused")
            allowed[token] = token not in special and readable and (text.isascii() or not ascii_only)
        return allowed.to(self.device)

    def survives(self, frame: Frame, controls: Tensor) -> Tensor:
        """bool (n,): which controls come back unchanged when the whole text is decoded and tokenized again."""
        before, after = frame.before.tolist()[len(self._begin) :], frame.after.tolist()
        after = after[: len(after) - len(self._end)]
        rows = [[*before, *control, *after] for control in controls.tolist()]
        if not rows:
            return torch.empty(0, dtype=torch.bool, device=self.device)
        again = self.tokenizer([self.tokenizer.decode(row) for row in rows], add_special_tokens=False)["input_ids"]
        return torch.tensor([a == b for a, b in zip(rows, again, strict=True)], device=self.device)

    # ---- losses and gradients -----------------------------------------------------------------------------------

    @property
    def embedding(self) -> Tensor:
        """(vocabulary, width)"""
        weight: Tensor = self.model.base_model.get_input_embeddings().weight
        return weight

    def loss(
        self, rows: Sequence[Tensor] | Tensor, scored: int, near: Tensor | None = None, exact: bool = True, reduce: Reduce | None = None
    ) -> Tensor:
        """float32 (n,): negative log-likelihood in nats of the label that ends each row.

        It attends in both directions, so rows share nothing: `near` and `exact` change neither the cost nor the result.
        """
        self._check(scored)
        logits = self._logits([row[:-1].tolist() for row in rows]).to(self.device)
        wanted = torch.stack([row[-1] for row in rows]).to(self.device)
        return _reduced(F.cross_entropy(logits, wanted, reduction="none"), reduce)

    def gradient(self, row: Tensor, at: slice, scored: int, reduce: Reduce | None = None) -> Tensor:
        """float32 (len(at), vocabulary): gradient of that loss by the one-hot of each token in `at`; row is int64 (length,)."""
        self._check(scored)
        embeds = self.embedding[row[:-1]].clone().requires_grad_(True)
        with self._lock, torch.enable_grad():
            loss = _reduced(self._soft_losses(embeds[None], row[-1:]), reduce).sum()
            (grad,) = torch.autograd.grad(loss, embeds)
            self.compute.gradients += 1
        return (grad[at].to(self.embedding.dtype) @ self.embedding.T).float()

    def soft_loss(self, frame: Frame, controls: Tensor) -> Tensor:
        """float32 (n,): the same loss of `frame` with embeddings (n, length, width) for its control; differentiable by them."""
        n = len(controls)
        before, after = (self.embedding[ids].expand(n, -1, -1) for ids in (frame.before, frame.after))
        return self._soft_losses(torch.cat([before, controls.to(before.dtype), after], dim=1), frame.affirmative.expand(n))

    def _soft_losses(self, embeds: Tensor, wanted: Tensor) -> Tensor:
        """float32 (n,) of embeddings (n, length, width) and labels (n,)."""
        mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=self.device)
        with self._lock:
            self.compute.tokens += mask.numel()
            logits = self.model(inputs_embeds=embeds, attention_mask=mask).logits.float()
        return F.cross_entropy(logits, wanted, reduction="none")

    def soft_logprobs(self, frame: Frame, controls: Tensor, at: slice) -> Tensor:
        """Not to be had: a classifier predicts a label, and no token.

        Raises:
            UsageError: Always.
        """
        raise UsageError(f"'{self.name}' is a classifier and predicts no tokens; this attack needs a model that writes")

    def logprobs(self, texts: Sequence[tuple[Chat, str]]) -> list[Tensor]:
        """For each (chat, label): float32 (1,), the log-probability in nats of that label.

        Raises:
            UsageError: A text that is no label: a classifier has no likelihood of text.
        """
        if astray := [text for _, text in texts if text not in self.labels]:
            raise UsageError(f"'{self.name}' knows only its labels ({', '.join(self.labels)}); it has no likelihood of {astray[0]!r:.60}")
        found = self._logits([self.prompt_ids(chat) for chat, _ in texts]).log_softmax(-1)
        return [row[self.labels.index(text)][None] for row, (_, text) in zip(found, texts, strict=True)]

    def _check(self, scored: int) -> None:
        if scored != 1:
            raise ValueError(f"'{self.name}' predicts one label, so scored must be 1; got {scored}")


def passing(name: str, labels: Sequence[str], chosen: str | None) -> int:
    """The index of the label that lets a request pass."""
    lower = [label.lower() for label in labels]
    if chosen is not None and chosen.lower() in lower:
        return lower.index(chosen.lower())
    fine = [k for k, label in enumerate(lower) if label in PASSES]
    bad = [k for k, label in enumerate(lower) if label in UNSAFE]
    if chosen is None and (len(fine) == 1 or (len(lower) == 2 and len(bad) == 1)):
        return fine[0] if fine else 1 - bad[0]
    wrong = "the label names do not say which one lets a request pass" if chosen is None else f"no label '{chosen}'"
    raise UsageError(f"'{name}': {wrong}; labels: {', '.join(labels)}; name it behind the target: {name.partition('#')[0]}#LABEL")


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(n, width): the mean of hidden states (n, length, width) where the mask (n, length) is 1."""
    kept = mask[..., None].to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1)


def _reduced(losses: Tensor, reduce: Reduce | None) -> Tensor:
    return losses if reduce is None else reduce(losses[:, None])
