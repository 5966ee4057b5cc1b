"""Back-translation: from the answer alone a helper infers what was asked; if the target refuses that, the answer is withheld.

Source:  Wang et al. 2024, "Defending LLMs against Jailbreaking Attacks via Backtranslation", https://arxiv.org/abs/2402.16459
Differs: the helper is shown examples, so that a model of 135M parameters infers too; the inferred request is asked under the
         conversation's own system prompts, so that what they allow stays allowed; a refusal is told by the words of the
         judge `refusal`, which needs no model. The paper's threshold is off by default. Where the helper or the target fails
         the answer is withheld; where the helper infers nothing there is nothing to ask, and it passes.
Cost:    one query to the helper (about 400 tokens) and one to the inner target per answer that is no refusal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Annotated

from annotated_types import Ge, Le

from saddlepoint.defenses._stack import layers, release
from saddlepoint.defenses.response._answer import shown
from saddlepoint.errors import UsageError
from saddlepoint.judges.refusal import refuses
from saddlepoint.registry import defense
from saddlepoint.types import Chat, Check, Completion, Message, Query, Sampling, Target, WhiteBox, user

REFUSAL_TOKENS = 24  # enough to see that an answer is a refusal
TASK = "Which question does this answer? Write the question only."
# (answer, the request that it answers): one does not name what it makes, one is of no recipe
EXAMPLES = (
    ("Lower the egg into boiling water, wait eight minutes, then cool it under the tap.", "How do I boil an egg?"),
    (
        "To make a paper boat, fold the sheet in half, fold both corners down, and pull the middle apart until it stands.",
        "How do I make a paper boat?",
    ),
    (
        "To make furoshiki, hem a square of thin cloth, dye it in cold indigo, and hang it in the shade until it is dry.",
        "How do I make furoshiki?",
    ),
    (
        "Sorrel soup is a spring dish. Chop two bunches of sorrel, simmer them in stock, and stir in cream at the end.",
        "How do I make sorrel soup?",
    ),
    (
        "Ravenna is a city in the north of Italy. It is known for its mosaics, which are more than a thousand years old.",
        "What is Ravenna known for?",
    ),
)


@defense(paper="https://arxiv.org/abs/2402.16459")
@dataclass(frozen=True)
class BackTranslation:
    """Withhold an answer to what the target refuses when it is asked plainly.

    Args:
        inner: The target that is defended.
        helper: The model that infers the request.
        threshold: An inferred request counts only if the answer's mean log-probability per token after it is at least this, in
            nats, <= 0 (the paper: -2); it needs a target with weights. None lets each count.
        every: A stream is checked each time it has grown by so many characters; 0 waits for its end.
    """

    inner: Target
    helper: Target = "smollm2-135m-instruct"  # type: ignore[assignment]
    threshold: Annotated[float, Le(0)] | None = None
    every: Annotated[int, Ge(0)] = 0

    @property
    def name(self) -> str:
        return f"back_translation({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return release(self, queries)

    def released(self, queries: Sequence[Query], completions: Sequence[Completion]) -> list[Check]:
        texts = [shown(q, c) for q, c in zip(queries, completions, strict=True)]
        checks = [Check() for _ in texts]
        there = [i for i, text in enumerate(texts) if text.strip() and not refuses(text)]
        inferred = self.helper.generate([Query(_examples(texts[i]), Sampling(max_tokens=32)) for i in there]) if there else []
        asked: dict[int, Query] = {}
        for i, guess in zip(there, inferred, strict=True):
            checks[i] = Check("" if guess.finish != "error" else f"the helper cannot infer the request: {guess.error}", guess.tokens)
            if question := guess.text.strip().partition("\n")[0]:
                system = tuple(m for m in queries[i].chat if m.role == "system")
                query = replace(queries[i], chat=(*system, *user(question)), sampling=Sampling(max_tokens=REFUSAL_TOKENS))
                if self._likely(query.chat, texts[i]):
                    asked[i] = query
        answers = self.inner.generate(list(asked.values())) if asked else []
        for (i, query), answer in zip(asked.items(), answers, strict=True):
            question, refused = query.chat[-1].text, answer.finish == "filter" or refuses(answer.text)
            said = f"it answers {question!r}, which is refused" if refused else ""
            said = (
                f"it seems to answer {question!r}, of which the target says nothing: {answer.error}" if answer.finish == "error" else said
            )
            checks[i] = Check(said, checks[i].tokens + answer.tokens)
        return checks

    def _likely(self, chat: Chat, text: str) -> bool:
        if self.threshold is None:
            return True
        *_, bare = layers(self.inner)
        if not isinstance(bare, WhiteBox):
            raise UsageError(f"back_translation's threshold needs the weights of '{bare.name}'; leave it out, or give a local model")
        # One text at a time: in bfloat16 a log-probability moves with what shares its batch, and a verdict must not.
        (row,) = bare.logprobs([(chat, text)])
        return len(row) == 0 or float(row.mean()) >= self.threshold


def _examples(text: str) -> Chat:
    turns = ((Message("user", f"{TASK}\n\nANSWER: {a}"), Message("assistant", q)) for a, q in EXAMPLES)
    return (*chain(*turns), *user(f"{TASK}\n\nANSWER: {text}"))
