"""Who decides whether an answer is harmful. A search judge steers an attack; a different final judge decides."""

from functools import partial

from saddlepoint.registry import Call
from saddlepoint.targets import open_target
from saddlepoint.types import Judge


def open_judge(call: Call) -> Judge:
    """A judge ready for use, with the models that it needs opened."""
    return partial(call.method.call, **call.bound(open_target))
