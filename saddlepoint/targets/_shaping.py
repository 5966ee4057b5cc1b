"""What a client asks of an answer's words, done to the scores of its row before a token is drawn: biases, penalties, a grammar.

A grammar is kept by llguidance, which says at each step what may come next; nothing else can be drawn. The end of the answer may
be drawn where the grammar allows it only.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from saddlepoint.errors import MissingExtraError, TargetError
from saddlepoint.types import Query, Shaping

# What may stand between two tokens of JSON: nothing, a space, or a new line and its indentation; else some models write spaces for ever.
_SPACE = r"(\n {0,16}| )?"


class Grammars:
    """What llguidance knows of a model's tokens.

    Args:
        tokenizer: A fast tokenizer of transformers.
        width: Tokens that the model scores.
        ends: Those that end an answer.

    Raises:
        MissingExtraError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Any, width: int, ends: frozenset[int]):
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as missing:
            raise MissingExtraError(f"an answer of a given form needs {missing.name}: pip install 'saddlepoint[serve]'") from missing
        self._tokens = from_tokenizer(tokenizer, n_vocab=width, eos_token=sorted(ends))

    def matcher(self, grammar: str) -> Any:
        """An `LLMatcher` at a grammar's beginning; see `Shaping.grammar`. One that is broken says why by `get_error`."""
        from llguidance import LLMatcher

        return LLMatcher(self._tokens, _compiled(grammar), log_level=0)


def _compiled(grammar: str) -> str:
    from llguidance import LLMatcher

    if not grammar.startswith("{"):
        return str(LLMatcher.grammar_from_lark(grammar))
    schema = {key: value for key, value in json.loads(grammar).items() if key != "x-guidance"}  # the library's own settings
    return str(LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _SPACE}))


class Shaped(LogitsProcessor):  # type: ignore[misc]
    """Biases, penalizes and masks the scores of each row as its query wants it. Of one batch, from its first step on."""

    def __init__(self, queries: Sequence[Query], matcher: Callable[[str], Any]):
        wanted = [(r, q.shaping) for r, q in enumerate(queries) if q.shaping != Shaping()]
        self._rows = [(r, shaping, matcher(shaping.grammar) if shaping.grammar else None) for r, shaping in wanted]
        self._prompt = -1

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._prompt = input_ids.shape[1] if self._prompt < 0 else self._prompt
        scores = scores.clone() if self._rows else scores  # they are the logits that log-probabilities are read off
        for r, shaping, matcher in self._rows:
            made = input_ids[r, self._prompt :]
            if len(made) and (shaping.presence or shaping.frequency):
                counts = torch.bincount(made, minlength=scores.shape[1])[: scores.shape[1]].to(scores.dtype)
                scores[r] -= shaping.presence * (counts > 0) + shaping.frequency * counts
            for token, bias in shaping.bias:
                scores[r, token] += bias
            if matcher is None or (matcher.is_stopped() and not matcher.is_error()):  # what follows an answer's end is none of it
                continue
            if len(made):
                matcher.consume_token(int(made[-1]))
            allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[: scores.shape[1]]
            if matcher.is_error():
                raise TargetError(f"the answer's grammar is too much for llguidance: {matcher.get_error()}; give a simpler one")
            scores[r, ~torch.from_numpy(allowed.astype(bool)).to(scores.device)] = -torch.inf
        return scores
