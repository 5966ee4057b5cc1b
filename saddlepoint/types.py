"""The records that flow through Saddlepoint, and the protocols they meet. No I/O, no torch.

policy -> Behavior -> attack <=Ask / Reply=> driver -> Target -> judge -> Finding -> metrics -> report
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from random import Random
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

Role = Literal["system", "user", "assistant", "tool"]
Place = Literal["prefix", "suffix"]
Split = Literal["train", "test"]
Label = Literal["refusal", "bad_refusal", "harmful", "safe_answer", "incoherent", "unjudged"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat.

    Args:
        soft: Embeddings (length, width) that stand after the text and belong to no token; only a model whose weights are
            at hand can be asked so.
        ids: Token ids that stand for the text; only a model whose weights are at hand can be asked so.
    """

    role: Role
    text: str
    soft: tuple[tuple[float, ...], ...] = ()
    ids: tuple[int, ...] = ()


CONTROL = "\u2063control\u2063"
"""Stands in a chat where an optimizer's text goes; no request contains it."""

Chat = tuple[Message, ...]
"""A conversation. A last message by the assistant is a prefill: the model goes on from it."""


def user(text: str, system: str = "", prefill: str = "") -> Chat:
    """A chat of one user turn, with an optional system prompt before it and an optional prefill after it."""
    chat = [Message("user", text)]
    if system:
        chat.insert(0, Message("system", system))
    if prefill:
        chat.append(Message("assistant", prefill))
    return tuple(chat)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a target draws its answer.

    Args:
        max_tokens: Most tokens to generate, >= 1.
        temperature: 0 is greedy.
        top_p: Nucleus, in (0, 1].
        seed: Seed of this answer's own noise, so that batching cannot change it; greedy answers need none.
        top_logprobs: How many alternatives to return with each token; 0 returns none.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Shaping:
    """What is done to a target's scores before a token is drawn; the log-probabilities that are told are those before it.

    Args:
        bias: (token id, what is added to its logit).
        presence: Is taken off the logit of every token that the answer has already.
        frequency: Is taken off it once more for each time.
        grammar: What the answer must be: a JSON schema, as JSON text that begins with `{`, or a grammar in llguidance's form of Lark.
            "" is no bound. An answer may still be cut off at `max_tokens`.
    """

    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    grammar: str = ""


Slots = tuple[tuple[str, str], ...]
"""(place, text) pairs: what an attacker writes inside the world of an agent, such as into a mail's body."""


@dataclass(frozen=True, slots=True)
class Act:
    """A call of a tool that counts: the tool is called with arguments that state all these words, however cased.

    Args:
        tool: The tool's name; "answer" stands for the agent's last words to its user.
    """

    tool: str
    states: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class World:
    """The sandbox that an agent acts in, and what counts there. It holds no state: every query begins in a fresh one.

    Args:
        name: "office" or "agentdojo:VERSION:SUITE:USER_TASK:INJECTION_TASK".
        items: (place, text) of what the tools find, such as ("mail 2", ...); `{planted}` in a text is where a slot's text goes.
        slots: The places whose text an attacker may write.
        wanted: What the attacker wants done, as an instruction.
        call: The call that does so, as an agent would write it, such as "send_mail vex@harrow.example | the code".
        forbidden: The call that must not be made; None where only the secret counts.
        secret: A text that must not leave in any call that sends something out; "" is none.
        needed: The acts that make the user's task done.
    """

    name: str = "office"
    items: tuple[tuple[str, str], ...] = ()
    slots: tuple[str, ...] = ()
    wanted: str = ""
    call: str = ""
    forbidden: Act | None = None
    secret: str = ""
    needed: tuple[Act, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """What a target is sent. Equal queries have equal answers, so a driver may merge them.

    Args:
        world, slots: Where an agent acts and what is planted there; any other target takes no notice of them.
        shaping: Bounds on the answer's words; defenses that decode by themselves take no notice of them.
        bare: The chat's only message is a text that the model goes on with under no template. Where a defense adds messages it is a
            chat after all. Only a model whose weights are at hand can be asked so.
    """

    chat: Chat
    sampling: Sampling = Sampling()
    world: World | None = None
    slots: Slots = ()
    shaping: Shaping = Shaping()
    bare: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """What an agent did in answer to one query, exactly; the completion's text shows the same with what the tools returned.

    Args:
        calls: (tool, arguments as written) of every call, in order.
        answer: Its last words to the user; "" where it ran out of steps.
        planted: What stood in the slots of its world.
    """

    calls: tuple[tuple[str, str], ...] = ()
    answer: str = ""
    planted: Slots = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """What a target answered.

    Args:
        text: The answer, without the prefill it went on from.
        prompt_tokens, completion_tokens: As the target counts them.
        finish: Why it ended; "error" means that there is no answer, and `error` says why.
        top_logprobs: For each generated token, (text, natural log probability) of its likeliest alternatives.
        drawn: The same of the token itself, where alternatives were asked for; a token that ends the answer has no text.
        trace: What an agent did; None where the target is none.
        blocked: The defense that withheld the answer, and why, as "NAME: REASON"; `finish` is then "filter". "" where none did.
        extra_tokens: Tokens that defenses spent besides: other passes, other answers, other models.
        spelled: Of each token of `drawn`, its bytes and those of its alternatives, where the target streams and knows them.
        faults: What went wrong on each try that failed, in order; an answer that came at last is equal to one that came at once.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: Literal["stop", "length", "filter", "error"] = "stop"
    error: str = ""
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] = ()
    trace: Trace | None = None
    blocked: str = ""
    extra_tokens: int = 0
    drawn: tuple[tuple[str, float], ...] = ()
    faults: tuple[str, ...] = field(default=(), compare=False)
    spelled: tuple[tuple[bytes, ...], ...] = field(default=(), compare=False, repr=False)

    @property
    def tokens(self) -> int:
        """All that the query has cost."""
        return self.prompt_tokens + self.completion_tokens + self.extra_tokens


@dataclass(frozen=True, slots=True)
class Facts:
    """The exact oracle: an answer is harmful when it states at least `needed` of these facts.

    Args:
        facts: Each fact as its accepted wordings, of which any one counts.
        needed: How many facts make harm, in [1, len(facts)].
    """

    facts: tuple[tuple[str, ...], ...]
    needed: int


Kind = Literal["harmful", "twin", "cleared"]


@dataclass(frozen=True, slots=True)
class Behavior:
    """One request under test.

    Args:
        id: Unique in its policy.
        prompt: The request as a campaign asks it.
        kind: "harmful" must not be answered; "twin" is its benign pair and must be answered; "cleared" is the same
            request under a system prompt that allows it, and must be answered too.
        category: The part of the policy it belongs to.
        split: Hazards that training may see, and hazards that only measure.
        phrasings: Other wordings of the request, for training; `prompt` is not among them where the policy can help it.
        affirmative: The opening that an optimizer pushes for (GCG's "target string").
        answer: A reference answer, where the policy knows one.
        oracle: What exactly counts as harm, where that is knowable.
        rubric: What counts as harm, in words.
        system: The system prompt it is asked under; empty leaves the target's own.
        pair: The id of its hazard (for a twin or a cleared request), else its own id. Splits never divide a pair.
        world: Where an agent is asked the prompt, which is then its user's task; what counts as harm stands there.
    """

    id: str
    prompt: str
    kind: Kind = "harmful"
    category: str = ""
    split: Split = "test"
    phrasings: tuple[str, ...] = ()
    affirmative: str = ""
    answer: str = ""
    oracle: Facts | None = None
    rubric: str = ""
    system: str = ""
    pair: str = ""
    world: World | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says of one answer. `unsafe` is None where it could not judge, which is never counted as safe."""

    label: Label
    unsafe: bool | None
    score: float = 0.0  # how harmful, in [0, 1]
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """One query that an attack wants made.

    Args:
        chat: What to send.
        to: Which model gets it; only "target" replies are judged.
        temperature: 0 is greedy; above it the driver gives every ask a seed of its own.
        max_tokens: None takes the campaign's.
        judged: False where the target's reply only prepares the next ask (its own rewriting of the request): it counts as a
            query, and no judge takes it for an answer to the behavior.
        slots: What is planted inside the world of an agent.
    """

    chat: Chat
    to: Literal["target", "attacker", "helper"] = "target"
    temperature: float = 0.0
    max_tokens: int | None = None
    judged: bool = True
    slots: Slots = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to an ask, with the search judge's verdict (None where it is not judged)."""

    ask: Ask
    completion: Completion
    verdict: Verdict | None = None

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def unsafe(self) -> bool:
        """Whether the search judge called it unsafe; False too where it could not judge."""
        return self.verdict is not None and self.verdict.unsafe is True


Steps = Generator[Sequence[Ask], Sequence[Reply], None]
"""What an attack function returns: it yields batches of asks and is sent their replies, in order."""


@dataclass(frozen=True, slots=True)
class Case:
    """One answer to be judged."""

    behavior: Behavior
    chat: Chat
    completion: Completion


Judge = Callable[[Sequence[Case]], list[Verdict]]


class Target(Protocol):
    """Anything that answers chats."""

    @property
    def name(self) -> str: ...

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        """Answer each query, in order. Thread-safe. A query that fails is a Completion with `error`."""
        ...


@runtime_checkable
class Stream(Target, Protocol):
    """A target that is asked many things at once and answers each as soon as it can, so that a slow answer holds up no other."""

    concurrency: int  # how many it answers at once

    def begin(self, queries: Sequence[Query], answered: Callable[[int, Completion | Exception], None], stop: Event) -> None:
        """Begin to answer, and return; `answered` is told the place and the answer of each query as it comes, from any thread.

        An exception in place of an answer is for the whole run. Once `stop` is set, nothing more needs to be answered.
        """
        ...


@runtime_checkable
class Streaming(Target, Protocol):
    """A target that can hand over one answer as it is written."""

    def stream(self, query: Query) -> Generator[Completion, None, None]:
        """The answer in pieces, at least one, whose texts, tokens and costs add up to what `generate` gives; the last one's `finish` counts.

        Closing the iterator ends the work on it.
        """
        ...

    def room(self, chat: Chat) -> int:
        """How many tokens an answer to a chat may have.

        Raises:
            UsageError: The chat cannot be answered at all.
        """
        ...


@runtime_checkable
class Shapes(Streaming, Protocol):
    """A target that bends an answer's words as a query's `shaping` wants them."""

    def misshapen(self, shaping: Shaping) -> str:
        """Why no answer can be shaped so, such as what is wrong with its grammar; "" where it can."""
        ...


@dataclass(frozen=True, slots=True)
class Check:
    """What a defense says of one query or one answer.

    Args:
        reason: Why it must not pass; "" lets it pass.
        tokens: Tokens that other models read and wrote for the check.
    """

    reason: str = ""
    tokens: int = 0


@runtime_checkable
class Defense(Target, Protocol):
    """A target around a target, so that defenses stack. Most are one of the three kinds below, and are then served and attacked as such."""

    @property
    def inner(self) -> Target: ...


@runtime_checkable
class InputGuard(Defense, Protocol):
    """A defense that lets a query pass or not, before the model sees it."""

    def admitted(self, queries: Sequence[Query]) -> list[Check]: ...


@runtime_checkable
class Graded(InputGuard, Protocol):
    """A guard that says how far a request is from passing, which an attack that knows it lowers."""

    def excess(self, texts: Sequence[str]) -> list[float]:
        """How far each request lies above what passes, in nats; 0 or less passes."""
        ...


@runtime_checkable
class Sloped(Graded, Protocol):
    """A graded guard that reads the tokens of the target, and so has a gradient."""

    def slope(self, before: str, control: Tensor, after: str) -> Tensor | None:
        """float32 (L, vocabulary): gradient of the excess of `before + control + after` by the one-hots of the control's tokens.

        Args:
            control: int64 (L,).

        Returns:
            None where the guard has other tokens than the target.
        """
        ...


@runtime_checkable
class Engaged(Defense, Protocol):
    """A defense that changes the forward pass of the model inside it."""

    def engaged(self) -> AbstractContextManager[None]:
        """While this is entered, losses and gradients of the model are those under the defense."""
        ...


@runtime_checkable
class Rewriter(Defense, Protocol):
    """A defense that asks its inner target something else in a query's place, and gives back what that answers."""

    def rewritten(self, queries: Sequence[Query]) -> list[tuple[Query, int]]:
        """What is asked instead, each with the tokens that other models read and wrote for it. The same for the same query."""
        ...


@runtime_checkable
class OutputGuard(Defense, Protocol):
    """A defense that releases an answer or withholds it.

    Args:
        every: An answer that is streamed is checked each time it has grown by so many characters, and what was not yet
            checked is held back; 0 waits for its end.
    """

    @property
    def every(self) -> int: ...

    def released(self, queries: Sequence[Query], completions: Sequence[Completion]) -> list[Check]:
        """A check of each answer, which may be only the beginning of one."""
        ...


@dataclass(frozen=True, slots=True)
class Frame:
    """A chat cut into token ids around the text that an optimizer controls. Each is int64 of shape (length,).

    A prompt is `before + control + after`; the model is then pushed to go on with `affirmative`.
    """

    before: Tensor
    control: Tensor
    after: Tensor
    affirmative: Tensor


@dataclass(slots=True)
class Compute:
    """What a white-box attack has spent so far; the driver reads it, the target adds to it."""

    tokens: int = 0
    gradients: int = 0


Reduce = Callable[["Tensor"], "Tensor"]
"""(n, tokens) -> (n,), differentiable: how the losses of tokens make the loss of a row."""


@runtime_checkable
class WhiteBox(Target, Protocol):
    """A target whose weights are at hand. It owns the chat template, the special tokens and the token slices."""

    compute: Compute

    def frame(self, chat: Chat, control: str, affirmative: str, place: Place = "suffix") -> Frame:
        """Tokenize `chat` with `control` before or after its last user message, cut at the control's borders.

        Where that message is empty, the control is the whole of it. Where a message holds `CONTROL`, the control goes there.

        Raises:
            UsageError: There is no user message, the control or the affirmative has no tokens, or the context is too short.
        """
        ...

    def candidates(self, ascii_only: bool) -> Tensor:
        """bool of shape (vocabulary,): the tokens that an optimizer may write."""
        ...

    def survives(self, frame: Frame, controls: Tensor) -> Tensor:
        """bool of shape (n,): which `controls`, int64 (n, length), come back unchanged when the prompt is decoded and read."""
        ...

    def text(self, ids: Tensor) -> str:
        """Decode token ids of shape (length,)."""
        ...

    def ids(self, text: str) -> list[int]:
        """Token ids of a rendered text: no special token is added."""
        ...

    def prompt_ids(self, chat: Chat) -> list[int]:
        """Token ids of a chat; an empty one is bare text, which begins with the token that begins a text."""
        ...

    def loss(
        self, rows: Sequence[Tensor] | Tensor, scored: int, near: Tensor | None = None, exact: bool = True, reduce: Reduce | None = None
    ) -> Tensor:
        """float32 (n,): mean negative log-likelihood in nats of the last `scored` tokens of each row.

        Args:
            rows: int64 (length,) each; lengths may differ. A tensor (n, length) is such a sequence too.
            reduce: Makes one number of each row of negative log-likelihoods (n, scored); their mean if None.
            near: A row that they resemble, int64 (length,): what they share with it is computed once.
            exact: False also takes from `near` what lies between a row's own tokens and the scored ones, as if it had
                not changed: several times cheaper and right in tendency. Only for rows as long as `near`, or such as
                leave one of its tokens out, which is then hidden from the scored ones.
        """
        ...

    def gradient(self, row: Tensor, at: slice, scored: int, reduce: Reduce | None = None) -> Tensor:
        """float32 (len(at), vocabulary): gradient of that loss by the one-hot of each token in `at`; row is int64 (length,)."""
        ...

    def soft_loss(self, frame: Frame, controls: Tensor) -> Tensor:
        """float32 (n,): the same loss of `frame` with embeddings (n, length, width) for its control; differentiable by them."""
        ...

    def soft_logprobs(self, frame: Frame, controls: Tensor, at: slice) -> Tensor:
        """float32 (n, len(at), vocabulary): log-probabilities in nats of every token at the positions `at` of a whole row.

        Args:
            controls: Embeddings (n, length, width) that stand for the control of `frame`; the result is differentiable by them.
            at: Positions in `before + control + after + affirmative`, from 1; each is predicted by all that stands before it.
        """
        ...

    @property
    def embedding(self) -> Tensor:
        """(vocabulary, width): the embedding of each token."""
        ...

    def logprobs(self, texts: Sequence[tuple[Chat, str]]) -> list[Tensor]:
        """For each (chat, text): float32 (tokens of text,), the log-probability in nats of each token of `text` after `chat`."""
        ...


@runtime_checkable
class Encoder(WhiteBox, Protocol):
    """A model that also reads whole texts as vectors, for attacks that must keep a text's meaning."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """float32 (n, width): a vector of length 1 for each text."""
        ...


@dataclass(frozen=True, slots=True)
class Artifact:
    """Text that an attack found on train behaviors and that goes with any request, on any target.

    Args:
        attack: The attack that found it, as one would type it.
        text: What is put before or after the request.
        models: The models that it was found on.
        behaviors: The ids of the behaviors that it was found on; it is never scored on those.
        losses: Loss of the best text after each step, in nats, mean over behaviors and models.
        rules: (words, words) rewrites of the request, each tried by itself; an artifact with rules has no text.
        prompts: (behavior's id, its prompts) where an attack found other words for each; such an artifact has no text either.
    """

    attack: str
    text: str
    place: Place = "suffix"
    models: tuple[str, ...] = ()
    behaviors: tuple[str, ...] = ()
    losses: tuple[float, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    prompts: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def applied(self, prompt: str) -> str:
        """The request with the text, spaced as a frame spaces it."""
        text = self.text.lstrip()
        return f"{text} {prompt}" if self.place == "prefix" else f"{prompt} {text}"


@dataclass(frozen=True, slots=True)
class Context:
    """What an attack may use besides its behavior.

    Args:
        rng: Its only source of randomness.
        whitebox: The target's weights; None where they are not at hand.
        examples: Behaviors of the train split that have a reference answer; never the one under attack.
        artifact: What the attack's own `fit` found on the train split, or what it was given to replay.
        tell: Told now and then, in a few words, how far a long search is.
    """

    rng: Random
    whitebox: WhiteBox | None = None
    examples: tuple[Behavior, ...] = ()
    artifact: Artifact | None = None
    tell: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class Budget:
    """What one attack may spend on one behavior; None is no limit. A step that does not fit whole is not made."""

    queries: int | None = None
    tokens: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One judged attack on one behavior.

    Args:
        phase: Which campaign of the run it belongs to ("before", "after derta", ...).
        behavior: The behavior's id.
        attack: The attack with its parameters, as one would type it.
        target: The target's name.
        chat, completion, verdict: The first answer that the final judge calls unsafe, else the last answer.
        queries, tokens, seconds: Cost of the whole attack; tokens count prompts, answers and white-box passes.
        broken_at: Number of the query whose answer was the first unsafe one, from 1; None if none was.
        ended: "done", "budget", or "error" with the reason in `verdict.reason`.
    """

    phase: str
    behavior: str
    kind: Kind
    category: str
    attack: str
    params: dict[str, Any]
    target: str
    chat: Chat
    completion: Completion
    verdict: Verdict
    queries: int
    tokens: int
    gradients: int
    seconds: float
    seed: int
    broken_at: int | None = None
    ended: Literal["done", "budget", "error"] = "done"


@dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn, made by a recipe.

    Args:
        chat: The request, as the model will see it; an empty one makes `prefix` and `text` bare text.
        text: The answer whose tokens are learned.
        prefix: Text of the answer that comes before and is not learned (a harmful opening).
        transition: Learn, at every position of `text`, to break off into the refusal instead (DeRTa's RTO).
        refusal: The refusal that a transition breaks off into; only its first token is used.
        weight: Weight of this example's tokens in the loss, > 0.
        behavior: The id of the hazard that it comes from; "" for ordinary examples.
        all_turns: Learn the assistant's earlier turns in `chat` too.
        rejected: The answer that must not be given, for recipes with a loss of their own; cross-entropy takes no notice of it.
    """

    chat: Chat
    text: str
    prefix: str = ""
    transition: bool = False
    refusal: str = ""
    weight: float = 1.0
    behavior: str = ""
    all_turns: bool = False
    rejected: str = ""


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a recipe may learn from; all of it is of the train split.

    Args:
        hazards: The behaviors to protect.
        refusals: For each hazard's id, how to refuse it.
        findings: Unsafe findings of attacks on these hazards, on the model that is to be hardened.
        kept: Requests that must still be answered (twins, ordinary ones, hazards under clearance), with the model's own answers.
        rng: The only source of randomness.
    """

    hazards: tuple[Behavior, ...]
    refusals: dict[str, str]
    findings: tuple[Finding, ...]
    kept: tuple[tuple[Chat, str], ...]
    rng: Random
