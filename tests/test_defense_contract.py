"""Every defense keeps the rules of `saddlepoint.testing.check_defense`, and that check finds a defense that breaks them."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest

from saddlepoint import registry
from saddlepoint.errors import MissingExtraError, SaddlepointError, UsageError
from saddlepoint.registry import Method
from saddlepoint.targets.scripted import Scripted
from saddlepoint.testing import check_defense, check_defense_file
from saddlepoint.types import Encoder, WhiteBox

# Values that make a defense quick enough for a test. A model that is not named here is a tiny one (see `models`).
QUICK: dict[str, dict[str, Any]] = {
    "erase_and_check": {"max_erase": 3},
    "human_approval": {"folder": mkdtemp(), "wait": 0.0},
    "rain": {"searches": 1, "width": 2},
    "window_check": {"every": 2000, "reach": 200},
}
# Defenses that reach into the weights or the tokenizer of what they wrap; they are checked around the tiny model.
ON_WEIGHTS: set[str] = {"rain", "refusal_steering", "retokenization", "safe_decoding"}


@pytest.mark.parametrize("name", registry.names("defense"))
def test_defense_keeps_the_contract(name: str, request: pytest.FixtureRequest) -> None:
    try:
        method = registry.get("defense", name)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    inner = request.getfixturevalue("tiny") if name in ON_WEIGHTS else None
    check_defense(name, inner, **models(method, request.getfixturevalue), **QUICK.get(name, {}))


def models(method: Method, fixture: Callable[[str], Any]) -> dict[str, Any]:
    """Tiny models for the parameters that take one: `guard` is a classifier, another model writes or is read."""
    taken = [p for p in method.parameters.values() if p.is_target and p.name not in QUICK.get(method.name, {})]
    wanted = {
        p.name: "tiny_classifier" if p.annotation is Encoder or p.default == "guard" else "tiny"
        for p in taken
        if p.default or p.annotation is WhiteBox
    }
    helpers = {n for p in taken if p.annotation not in (WhiteBox, Encoder) for n in [p.name] if wanted.get(n) == "tiny"}
    return {n: Scripted(lambda q: f"Say: {q.chat[-1].text}") if n in helpers else fixture(f) for n, f in wanted.items()}


# ---- the check itself -----------------------------------------------------------------------------------------------

GOOD = '''"""A defense that says please.

Source:  A. Author 2020, "Please", https://example.org/please
Differs: in nothing.
Cost:    1 token per query.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from saddlepoint.defenses._stack import admit, release, request, rewrite, with_request
from saddlepoint.registry import defense
from saddlepoint.types import Check, Completion, Query, Target


@defense(paper="https://example.org/please")
@dataclass(frozen=True)
class Mine:
    """Say please.

    Args:
        inner: The target that is defended.
        times: How often.
    """

    inner: Target
    times: Annotated[int, Ge(1)] = 1

    @property
    def name(self) -> str:
        return f"mine({self.inner.name})"

    def generate(self, queries: Sequence[Query]) -> list[Completion]:
        return rewrite(self, queries)

    def rewritten(self, queries: Sequence[Query]) -> list[tuple[Query, int]]:
        return [(replace(q, chat=with_request(q.chat, request(q.chat) + " please")), 0) for q in queries]
'''
GENERATE = "        return rewrite(self, queries)\n"
REWRITTEN = '        return [(replace(q, chat=with_request(q.chat, request(q.chat) + " please")), 0) for q in queries]\n'
OWN = GOOD.replace("    def rewritten(self", "    def changed(self")  # of none of the three kinds


def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Any:
    (tmp_path / "mine.py").write_text(text)
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    spec.loader.exec_module(module)
    return module.Mine


def test_a_defense_of_ones_own_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = load(tmp_path, monkeypatch, GOOD)

    check_defense(mine)
    check_defense(mine, times=3)
    check_defense(mine.__saddlepoint__)
    check_defense(mine, Scripted(lambda _: "yes"))


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("@dataclass(frozen=True)", "@dataclass", "must be a frozen dataclass"),
        ("    inner: Target\n", "    inner: object\n", "its first field must be `inner: Target`"),
        ("    times: Annotated[int, Ge(1)] = 1\n", "    times: int = 1\n", "needs a range"),
        ("= 1\n", "= 0\n", "default: its signature: parameter 'times' got 0"),
        ("        times: How often.\n", "", "has no entry under `Args:`"),
        ("Differs: in nothing.", "", "must have `Differs:`"),
        ("class Mine:", "class Other:", "class 'Other' must be the same"),
        ('"""A defense that says please.', '"""A defense that says please', "ends with a period"),
        ("A. Author", "x\n" * 131, "lines; at most 130"),
        (' + " please"', ".format()", "calls .format()"),
    ],
)
def test_what_can_be_read_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, wrong: str) -> None:
    assert old in GOOD
    mine = load(tmp_path, monkeypatch, GOOD.replace(old, new) + ("\n\nMine = Other\n" if "Other" in new else ""))

    with pytest.raises(AssertionError, match=wrong.replace("(", r"\(").replace(")", r"\)")):
        check_defense_file(mine)


def body(text: str) -> str:
    return "".join(f"        {line}\n" for line in text.split("\n"))


@pytest.mark.parametrize(
    ("source", "new", "wrong"),
    [
        (OWN, "return self.inner.generate(queries[:1])", "gives 1 answers to 14 queries"),
        (OWN, "return self.inner.generate(queries) or [Completion('')]", "gives 1 answers to 0 queries"),
        (OWN, "return list(reversed(self.inner.generate(queries)))", "in another order"),
        (OWN, "return [Completion(str(random.random())) for _ in queries]", "when it is asked the same again"),
        (OWN, "random.random()\nreturn self.inner.generate(queries)", "global randomness"),
        (OWN, "return [Completion(str(len(queries))) for _ in queries]", "when others are asked too"),
        (OWN, "return [Completion('x') for _ in queries]", "answers without asking"),
        (OWN, "return [Completion('x', finish='filter') for _ in queries]", "in `blocked`"),
        (OWN, "return [Completion('x', finish='error') for _ in queries]", "in `error`"),
        (OWN, "return ['x' for _ in queries]", "no Completion"),
        (OWN, "return [a if a.text[:0] else Completion(a.text) for a in self.inner.generate(queries)]", "must stay that error"),
        (OWN, "[q.chat[0] for q in queries]\nreturn self.inner.generate(queries)", "raises IndexError"),
        (OWN, "return self.inner.generate([replace(q, chat=q.chat[-1:]) for q in queries])", "drops the system prompt"),
        (
            OWN,
            "return self.inner.generate([replace(q, chat=q.chat[:1] + q.chat[2:]) for q in queries])",
            "drops or moves the prefill|drops an earlier turn",
        ),
        (OWN, "self.inner.generate([Query(())])\nreturn self.inner.generate(queries)", "though it was asked nothing"),
        (GOOD, "return self.inner.generate(queries)", "is a Rewriter, so its generate must be rewrite"),
    ],
)
def test_how_it_behaves_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, new: str, wrong: str) -> None:
    mine = load(tmp_path, monkeypatch, source.replace(GENERATE, body(new)))

    with pytest.raises(AssertionError, match=wrong):
        check_defense(mine)


def test_a_withheld_answer_must_stay_withheld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new = "return [a if a.finish != 'filter' else Completion('Fine.') for a in self.inner.generate(queries)]"

    with pytest.raises(AssertionError, match="must stay withheld"):
        check_defense(load(tmp_path, monkeypatch, OWN.replace(GENERATE, body(new))))


def test_the_parts_of_an_answer_must_be_checked_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = GOOD[: GOOD.index("    def rewritten")].replace("return rewrite(self", "return release(self")
    guard = guard.replace(" = 1\n", " = 1\n    every: Annotated[int, Ge(0)] = 0\n").replace(
        "How often.\n", "How often.\n        every: Characters.\n"
    )
    guard += "    def released(self, queries, completions):\n"

    check_defense(load(tmp_path, monkeypatch, guard + body("return [Check('' if c.text else 'empty') for c in completions]")))
    with pytest.raises(AssertionError, match="one Check for each answer"):
        check_defense(load(tmp_path, monkeypatch, guard + body("return [Check() for _ in queries] if len(queries) != 2 else [Check()]")))


def test_what_is_no_defense_is_said_to_be_none() -> None:
    with pytest.raises(UsageError, match="is no defense"):
        check_defense(int)
    with pytest.raises(SaddlepointError, match="no defense 'self_remindr'; closest: 'self_reminder'"):
        check_defense("self_remindr")
