"""Special tokens that a message spells out are its text, and not the template's.

A template writes the special tokens that part the turns; whoever wrote a message must not be able to write them too, or a user's words could
end the user's turn and begin one of the system. Chats that spell none are tokenized as they always were.
"""

import re
import secrets
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

_SECRET = secrets.token_hex(8)  # so that nobody can write a mark
_MARK = f"\u2063{_SECRET} {{}}\u2063"
_MARKED = re.compile(f"\u2063{_SECRET} ([0-9]+)\u2063")


class Plain:
    """The special tokens of a tokenizer, and how to write them as text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = sorted(
            (t.content for t in tokenizer.added_tokens_decoder.values() if t.special and t.content), key=len, reverse=True
        )
        self._any = re.compile(f"({'|'.join(map(re.escape, self._special))})" if self._special else "(?!)")
        # A tokenizer of its own, for the setting is one of the whole tokenizer, which threads share.
        self._own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else None
        if self._own:
            self._own.encode_special_tokens = True
            self._own.no_padding()
            self._own.no_truncation()

    def marked(self, text: str) -> str:
        """A message's text with a mark in the place of each special token that it spells."""
        return self._any.sub(lambda found: _MARK.format(self._special.index(found[0])), text)

    def ids(self, rendered: str) -> list[int]:
        """Token ids of a rendered text: what is marked is text, other special tokens are such."""
        made: list[int] = []
        run = ""
        for piece in self._any.split(rendered) if _MARKED.search(rendered) else [rendered]:
            if not _MARKED.search(piece):
                run += piece
                continue
            made += [*self._ids(run), *self._text_ids(_MARKED.sub(lambda mark: self._special[int(mark[1])], piece))]
            run = ""
        return [*made, *self._ids(run)]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_ids(self, text: str) -> Sequence[int]:
        if self._own:
            return list(self._own.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
