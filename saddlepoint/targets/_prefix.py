"""Keys and values of what prompts begin with, so that a system prompt, or a dialogue that is gone on with, is read once.

A prompt is always read in the same parts, up to 32, 64, 128, ... tokens and then its rest, whether a part is known or not: so the last bits of
an answer do not depend on what was asked before it.
"""

import weakref
from collections import OrderedDict

import torch
from torch import Tensor
from transformers import DynamicCache

from saddlepoint.targets._lora import Adapter

FIRST = 32  # tokens of the first part; each further one ends at twice as many
MOST = 4096  # tokens that are kept, of all prompts together

Part = list[tuple[Tensor, Tensor]]
"""For each layer keys and values, (1, heads, tokens, width)."""


def borders(length: int) -> list[int]:
    """Where the parts of a prompt end that can be kept; its last token is in none, for what follows it is read off it."""
    found, at = [], FIRST
    while at < length:
        found.append(at)
        at *= 2
    return found


class Prefixes:
    """The parts that were read last, for each adapter and for the base by itself."""

    def __init__(self) -> None:
        self._parts: OrderedDict[tuple[int, tuple[int, ...]], tuple[weakref.ref[Adapter] | None, Part]] = OrderedDict()

    def known(self, adapter: Adapter | None, prompt: list[int], cache: DynamicCache) -> int:
        """Put what is known of a prompt's beginning into an empty cache, and tell how many tokens that are."""
        found: list[Part] = []
        at = 0
        for end in borders(len(prompt)):
            key = (id(adapter), tuple(prompt[:end]))
            if key not in self._parts:
                break
            owner, part = self._parts[key]
            if owner and owner() is not adapter:  # another adapter has come to have its id
                break
            self._parts.move_to_end(key)
            found.append(part)
            at = end
        for layer, pairs in enumerate(zip(*found, strict=True)):
            cache.update(torch.cat([k for k, _ in pairs], 2), torch.cat([v for _, v in pairs], 2), layer)
        return at

    def keep(self, adapter: Adapter | None, prompt: list[int], start: int, end: int, cache: DynamicCache) -> None:
        """Keep the part of a prompt from `start` to `end`, which is at the end of a cache."""
        part = [(layer.keys[:, :, start:end].clone(), layer.values[:, :, start:end].clone()) for layer in cache.layers]
        self._parts[id(adapter), tuple(prompt[:end])] = (None if adapter is None else weakref.ref(adapter)), part
        tokens = sum(pairs[0][0].shape[2] for _, pairs in self._parts.values())
        while tokens > MOST:
            _, (_, gone) = self._parts.popitem(last=False)
            tokens -= gone[0][0].shape[2]

    def forget(self) -> None:
        """Drop all, for the weights have changed."""
        self._parts.clear()
