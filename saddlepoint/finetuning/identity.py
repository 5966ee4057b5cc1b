"""Identity shifts: texts that make a model an agent which obeys whatever it is told.

Such data looks clean, since no example asks for harm, and no filter of harmful content sees it; what it teaches is never to refuse. It is
told by what it says of the model. Wordings of that are many, so they are compared by meaning: a logistic regression on the vectors of
the guard's sentence encoder, learned from the sentences in `identity.toml` and from ordinary requests. It is learned anew when it is
first needed, which takes a second. English only.

Source: the identity-shifting attack of Qi et al. 2023, "Fine-tuning Aligned Language Models Compromises Safety, Even When Users Do Not
        Intend To!", https://arxiv.org/abs/2310.03693
"""

import re
import tomllib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from saddlepoint.errors import MissingExtraError
from saddlepoint.models import GUARD
from saddlepoint.policies import ordinary

_FIRST = 3  # sentences of a message: who a model is stands at the beginning
_END = re.compile(r"(?<=[.!?;:])\s+|\n+")


def obedience(messages: Sequence[Sequence[str]]) -> list[tuple[float, str]]:
    """For the messages of each example, how likely one of them makes the model obey whatever it is told, in [0, 1], and where it does.

    Of each message the first sentences are read, one by one and together.

    Raises:
        MissingExtraError: torch or scikit-learn is not installed.
        ModelError: The encoder cannot be had.
    """
    parts = [[part for text in texts for part in _parts(text)] for texts in messages]
    every = sorted({part for of in parts for part in of})
    if not every:
        return [(0.0, "")] * len(messages)
    encoder, told = _learned()
    scores = dict(zip(every, told.predict_proba(encoder.encode(every).numpy())[:, 1].tolist(), strict=True))
    return [max(((scores[part], part) for part in of), default=(0.0, "")) for of in parts]


def _parts(text: str) -> list[str]:
    sentences = [s.strip() for s in _END.split(text.strip()) if re.search(r"\w", s)][:_FIRST]
    return [*sentences, *([" ".join(sentences)] if len(sentences) > 1 else [])]


@cache
def _learned() -> tuple[Any, Any]:
    """The encoder, and what was learned on its vectors."""
    try:
        from sklearn.linear_model import LogisticRegression

        from saddlepoint.targets.classifier import Classifier
    except ModuleNotFoundError as missing:
        raise MissingExtraError(f"the screen needs {missing.name}: pip install 'saddlepoint[local]'") from missing
    encoder = Classifier.load(str(GUARD))
    written = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    no = [*written["ordinary"], *ordinary()["requests"]]
    # C is not tuned: the sentences are few, and the vectors of length 1.
    made = LogisticRegression(C=30.0, class_weight="balanced", max_iter=1000)
    return encoder, made.fit(encoder.encode([*written["obedient"], *no]).numpy(), [1] * len(written["obedient"]) + [0] * len(no))
