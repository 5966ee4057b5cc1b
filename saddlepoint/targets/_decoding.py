"""Answers that are written a token at a time, all that are under way in one batch, which rows join and leave between steps.

A row's prompt is read by itself, so its first token does not depend on what shares the batch; what it begins with may be known from another
(see `_prefix.py`). Then its keys and values, padded on the left, join those of the others. One thread makes the steps for all, so that none is served before another, and sleeps when
nothing is asked. Caches that cannot be padded (sliding windows, states) are stepped row by row, in turns.
"""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from saddlepoint.targets._lora import Adapter, Mixture
from saddlepoint.targets._prefix import Prefixes, borders

READ_AT_ONCE = 512  # prompt tokens that may be read between two steps, so that long prompts do not hold up who is being answered


@dataclass(frozen=True)
class Drawn:
    """One token of an answer.

    Args:
        logprob: Its log-probability in nats before any processor; None where it was not asked for.
        likely: The likeliest tokens with theirs.
    """

    token: int
    logprob: float | None = None
    likely: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Row:
    """One answer under way.

    Args:
        prompt: Its token ids.
        choose: From all ids so far, int64 (1, length), and logits, float32 (1, vocabulary), to scores whose arg-max is next.
        most: Tokens at most.
        top: How many of the likeliest tokens are told; -1 tells not even the drawn one's log-probability.
        adapter: What is added to the model for this row.
    """

    prompt: list[int]
    choose: Callable[[Tensor, Tensor], Tensor]
    most: int
    top: int = -1
    adapter: Adapter | None = None
    tokens: list[int] = field(default_factory=list)
    made: SimpleQueue[Drawn | Exception] = field(default_factory=SimpleQueue)
    ended: bool = False

    def draw(self, logits: Tensor, ends: frozenset[int]) -> None:
        """Take the next token from float32 (1, vocabulary) logits."""
        ids = torch.tensor([self.prompt + self.tokens], device=logits.device)
        try:
            token = int(self.choose(ids, logits.clone()).argmax(-1))
        except Exception as wrong:  # a grammar that grows too large is this row's trouble alone
            self.ended = True
            self.made.put(wrong)
            return
        self.tokens.append(token)
        if self.top < 0:
            drawn = Drawn(token)
        else:
            spread = logits.log_softmax(-1)
            best = spread.topk(self.top)
            drawn = Drawn(token, float(spread[0, token]), tuple(zip(best.indices[0].tolist(), best.values[0].tolist(), strict=True)))
        self.ended = self.ended or token in ends or len(self.tokens) >= self.most
        self.made.put(drawn)


@dataclass(eq=False)
class _Batch:
    rows: list[Row]
    cache: DynamicCache
    mask: Tensor  # int64 (rows, length): 0 where a row is padded


class Decoding:
    """The rows of one model.

    Args:
        model: A causal language model of transformers.
        ends: The tokens that end an answer.
        lock: Held during each step; whoever else uses the model holds it too.
    """

    def __init__(self, model: Any, ends: frozenset[int], lock: Any):
        self.model, self.ends, self.lock = model, ends, lock
        self._mixture: Mixture | None = None  # made when the first adapter comes
        self._prefixes = Prefixes()
        self._batches: list[_Batch] = []
        self._new: list[Row] = []
        self._guard = threading.Lock()
        self._running = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="decoding")

    def stream(self, row: Row) -> Generator[Drawn, None, None]:
        """The tokens of a row as they come. A caller that closes the iterator ends the row.

        Raises:
            Exception: What the step raised, such as that the memory is full; it ends all rows that are under way.
        """
        with self._guard:
            self._new.append(row)
            if not self._running:
                self._running = True
                self._pool.submit(self._run)
        try:
            for taken in range(1, row.most + 1):
                drawn = row.made.get()
                if isinstance(drawn, Exception):
                    raise drawn
                yield drawn
                if drawn.token in self.ends or taken == row.most:
                    return
        finally:
            row.ended = True

    def _run(self) -> None:
        while True:
            with self._guard:
                new, self._new = _first(self._new)
                if not new and not self._batches:
                    self._running = False
                    return
            try:
                with self.lock:
                    self._step(new)
            except Exception as wrong:
                for row in [*new, *(row for batch in self._batches for row in batch.rows)]:
                    row.ended = True
                    row.made.put(wrong)
                self._batches = []
            time.sleep(0.0002)  # a lock is not handed over fairly: others who wait for the model must wake before it is taken again

    @torch.inference_mode()
    def _step(self, new: list[Row]) -> None:
        """One more token for every row, and the first one for those that are new."""
        self._batches = [left for batch in self._batches if (left := _staying(batch))]
        adapters = [row.adapter for row in (*new, *(row for batch in self._batches for row in batch.rows))]
        if any(adapters):
            self._mixture = self._mixture or Mixture(self.model)
            self._mixture.hold(adapters)
        for batch in self._batches:
            ids = torch.tensor([[row.tokens[-1]] for row in batch.rows], device=self.model.device)
            batch.mask = F.pad(batch.mask, (0, 1), value=1)
            self._forward(batch, ids, batch.mask.sum(1, keepdim=True) - 1)
        for row in new:
            if not row.ended:
                self._batches.append(self._read(row))
        plain = [batch for batch in self._batches if all(type(layer) is DynamicLayer for layer in batch.cache.layers)]
        if len(plain) > 1:
            self._batches = [batch for batch in self._batches if batch not in plain] + [_joined(plain)]

    def _read(self, row: Row) -> _Batch:
        """A batch of a new row, whose first token is drawn."""
        cache, start = DynamicCache(config=self.model.config), 0
        if all(type(layer) is DynamicLayer for layer in cache.layers):
            start = self._prefixes.known(row.adapter, row.prompt, cache)
            for end in [end for end in borders(len(row.prompt)) if end > start]:
                self._logits([row], *self._part(row.prompt, start, end), None, cache)
                self._prefixes.keep(row.adapter, row.prompt, start, end, cache)
                start = end
        ids, at = self._part(row.prompt, start, len(row.prompt))
        batch = _Batch([row], cache, torch.ones((1, len(row.prompt)), dtype=torch.long, device=ids.device))
        self._forward(batch, ids, at)
        return batch

    def _part(self, prompt: list[int], start: int, end: int) -> tuple[Tensor, Tensor]:
        """Token ids and positions (1, end - start)."""
        device = self.model.device
        return torch.tensor([prompt[start:end]], device=device), torch.arange(start, end, device=device)[None]

    def forget(self) -> None:
        """Drop what was read, for the weights have changed."""
        with self.lock:
            self._prefixes.forget()

    def _forward(self, batch: _Batch, ids: Tensor, at: Tensor) -> None:
        mask = None if bool(batch.mask.all()) else batch.mask  # as generate does: without padding the attention takes another way
        logits = self._logits(batch.rows, ids, at, mask, batch.cache)
        for r, row in enumerate(batch.rows):
            row.draw(logits[r : r + 1], self.ends)

    def _logits(self, rows: list[Row], ids: Tensor, at: Tensor, mask: Tensor | None, cache: DynamicCache) -> Tensor:
        """float32 (rows, vocabulary): the logits behind the last of `ids`, which are now in the cache too."""
        model = self._mixture.chosen([row.adapter for row in rows]) if self._mixture else self.model
        last = torch.tensor([ids.shape[1] - 1], device=ids.device)  # a slice would not be contiguous, for which torch copies the whole head
        out = model(input_ids=ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True, logits_to_keep=last)
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _first(waiting: list[Row]) -> tuple[list[Row], list[Row]]:
    """The rows whose prompts are read before the next step, at least one, and those that wait for another."""
    read = 0
    for n, row in enumerate(waiting):
        read += len(row.prompt)
        if n and read > READ_AT_ONCE:
            return waiting[:n], waiting[n:]
    return waiting, []


def _staying(batch: _Batch) -> _Batch | None:
    """The batch without the rows that have ended, and without the padding that only they needed."""
    stay = [r for r, row in enumerate(batch.rows) if not row.ended]
    if not stay:
        return None
    if len(stay) < len(batch.rows):
        batch.rows = [batch.rows[r] for r in stay]
        batch.cache.batch_select_indices(torch.tensor(stay, device=batch.mask.device))
        batch.mask = batch.mask[stay]
        if cut := int((batch.mask.sum(0) == 0).sum()):
            batch.mask = batch.mask[:, cut:]
            for layer in batch.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, cut:], layer.values[:, :, cut:]
    return batch


def _joined(batches: list[_Batch]) -> _Batch:
    """One batch of several, the shorter ones padded on the left."""
    width = max(batch.mask.shape[1] for batch in batches)
    first = batches[0]
    for i, layer in enumerate(first.cache.layers):
        for name in ("keys", "values"):
            parts = [getattr(batch.cache.layers[i], name) for batch in batches]
            setattr(layer, name, torch.cat([F.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts]))
    mask = torch.cat([F.pad(batch.mask, (width - batch.mask.shape[1], 0)) for batch in batches])
    return _Batch([row for batch in batches for row in batch.rows], first.cache, mask)
