"""A target that answers by a function: for tests, for examples, and for trying an attack without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

from saddlepoint.types import Completion, Query


@dataclass(eq=False)
class Scripted:
    """Answers each query with what `answer` returns for it. Implements `Target`.

    `answer` is never called twice at once, so it may keep state, such as an iterator over prepared answers.

    >>> from saddlepoint.types import Query, user
    >>> target = Scripted(lambda query: "no" if "bomb" in query.chat[-1].text else "yes")
    >>> [completion.text for completion in target.generate([Query(user("a bomb")), Query(user("a cake"))])]
    ['no', 'yes']
    >>> len(target.asked)
    2

    Args:
        answer: From a query to its answer; a text stands for a Completion of that text.
        name: The target's name.
        asked: Every query so far, in the order in which they were answered.
    """

    answer: Callable[[Query], str | Completion]
    name: str = "scripted"
    asked: list[Query] = field(default_factory=list)
    _lock: Any = field(default_factory=RLock, init=False, repr=False)

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order."""
        with self._lock:
            return [self._one(query) for query in queries]

    def _one(self, query: Query) -> Completion:
        self.asked.append(query)
        said = self.answer(query)
        return Completion(said) if isinstance(said, str) else said
