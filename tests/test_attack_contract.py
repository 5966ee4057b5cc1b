"""Every attack keeps the rules of `saddlepoint.testing.check_attack`, and that check finds an attack that breaks them."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from saddlepoint import registry
from saddlepoint.errors import MissingExtraError, SaddlepointError, UsageError
from saddlepoint.testing import check_attack, check_attack_file
from saddlepoint.types import Artifact

# Values that make an attack quick enough for a test, where its defaults would search for minutes.
QUICK: dict[str, dict[str, Any]] = {
    "gcg": {"num_steps": 3, "search_width": 4, "topk": 8, "test_steps": 1},
    "gcg_multi": {"num_steps": 3, "search_width": 4, "topk": 8, "n_behaviors": 2},
    "replay": {"artifact": Artifact("gcg_multi", "! {x} !")},
    "hotflip": {"edits": 3, "candidates": 4},
    "uat": {"sweeps": 2, "candidates": 4, "init": "the the"},
    "autoprompt": {"num_steps": 4, "candidates": 4, "init": "! ! !"},
    "gbda": {"num_steps": 3, "samples": 2, "draws": 8},
    "arca": {"sweeps": 2, "outputs": 2, "candidates": 4, "averaged": 2, "init": "! ! !"},
    "uat_lm": {"sweeps": 2, "candidates": 4, "length": 3},
    "utsc": {"sweeps": 2, "candidates": 4, "samples": 2},
    "sear": {"texts": 4, "candidates": 4, "similarity": -1.0, "uses": 1},
    "textfooler": {"candidates": 4, "similarity": -1.0},
    "soft_prompt": {"num_steps": 4, "test_steps": 2, "init": "x x x"},
}


@pytest.mark.parametrize("name", registry.names("attack"))
def test_attack_keeps_the_contract(name: str, request: pytest.FixtureRequest) -> None:
    try:
        method = registry.get("attack", name)
    except MissingExtraError as missing:
        pytest.skip(str(missing))
    if method.access == "gray-box" and "encoder" in method.parameters:  # a search on a classifier
        folder = request.getfixturevalue("tiny_classifier_folder")
        return check_attack(name, whitebox=request.getfixturevalue("tiny_classifier"), encoder=str(folder), **QUICK.get(name, {}))
    if method.access != "white-box":
        return check_attack(name, **QUICK.get(name, {}))
    check_attack_file(name)
    try:
        tiny = request.getfixturevalue("tiny")
    except pytest.FixtureLookupError:
        pytest.skip(f"'{name}' needs weights, and there is no fixture `tiny`; only its file was checked")
    check_attack(name, whitebox=tiny, **QUICK.get(name, {}))


def test_black_box_attacks_are_listed_and_loaded_without_torch() -> None:
    names = [n for n in registry.names("attack") if _is_black_box(n)]
    code = f"import sys; from saddlepoint import registry; [registry.get('attack', n) for n in {names}]; sys.exit('torch' in sys.modules)"
    root = Path(registry.__file__).parents[1]

    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=120).returncode == 0


def _is_black_box(name: str) -> bool:
    try:
        return registry.get("attack", name).access == "black-box"
    except MissingExtraError:
        return False


def test_a_white_box_attack_is_not_called_checked_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _load(tmp_path, monkeypatch, GOOD.replace("black-box", "white-box"))

    with pytest.raises(UsageError, match="needs weights"):
        check_attack(module.mine)


def test_what_is_no_attack_is_said_to_be_none() -> None:
    with pytest.raises(UsageError, match="is no attack"):
        check_attack(len)
    with pytest.raises(SaddlepointError, match="no attack 'direkt'; closest: 'direct'"):
        check_attack("direkt")


def test_an_outside_attack_that_keeps_the_rules_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_attack(_load(tmp_path, monkeypatch, GOOD).mine)
    check_attack(_load(tmp_path, monkeypatch, GOOD).mine, tries=1)
    with pytest.raises(UsageError, match="greater than or equal to 1"):
        check_attack(_load(tmp_path, monkeypatch, GOOD).mine, tries=0)


GOOD = '''"""Ask twice.

Source:  Nobody 2024, "Nothing", https://example.org/paper
Differs: in nothing.
Cost:    2 queries.
"""

from random import Random
from typing import Annotated

from annotated_types import Ge

from saddlepoint.registry import attack
from saddlepoint.types import Ask, Behavior, Context, Steps, user


@attack(paper="https://example.org/paper", access="black-box")
def mine(behavior: Behavior, ctx: Context, *, tries: Annotated[int, Ge(1)] = 2) -> Steps:
    """Ask.

    Args:
        tries: How often, >= 1.
    """
    for _ in range(tries):
        replies = yield [Ask(user(f"{behavior.prompt} {ctx.rng.random()}", behavior.system))]
        if any(r.unsafe for r in replies):
            return
'''


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("Ask twice.", "Ask twice", "ends with a period"),
        ("Ask twice.", f"Ask {'twice ' * 30}.", "at most 140"),
        ("Source:", "From:", "`Source:`"),
        ("Differs: in nothing.", "", "`Differs:`"),
        ("Cost:", "Price:", "`Cost:`"),
        ('"Nothing", https://example.org/paper', '"Nothing", https://example.org/papers', "registered paper's https link"),
        ("def mine", "def yours", "must be the same"),
        ("*, tries", "tries", "keyword-only"),
        ("Annotated[int, Ge(1)] = 2", "Annotated[int, Ge(1)]", "have a default"),
        ("Annotated[int, Ge(1)] = 2", "int = 2", "needs a range"),
        ("Annotated[int, Ge(1)] = 2", "Annotated[int, Ge(1)] = 0", "default: "),
        ("from random", "from __future__ import annotations\n\nfrom random", "not text"),
        ("tries: How often", "times: How often", "no entry under `Args:`"),
        ("behavior: Behavior, ctx: Context", "ctx: Context, behavior: Behavior", "behavior, ctx"),
        ("from random import Random", "import random", "randomness comes only from ctx.rng"),
        ("from random import Random", "import logging", "no I/O"),
        ("from random import Random", "import torch", "registered as black-box"),
        ("from random import Random", "from saddlepoint.targets.scripted import Scripted", "may import only"),
        ("from random import Random", "from saddlepoint import targets", "may import only"),
        ("from random import Random", "#\n" * 130, "lines; at most 130"),
        ("    for _", "    open('x')\n    for _", "calls open()"),
        ('f"{behavior.prompt} {ctx.rng.random()}"', '"{}".format(behavior.prompt)', "calls .format()"),
        ("yield [Ask(user(", "[Ask(user(", "generator function"),
        ("yield [Ask(user(", "yield [] and [Ask(user(", "empty batch"),
        ("yield [Ask(user(", "yield [behavior, Ask(user(", "a list of Ask"),
        ("for _ in range(tries)", "for _ in range(0)", "asks nothing"),
        (", behavior.system", "", "drops the behavior's system prompt"),
        (", behavior.system", ", behavior.system, behavior.affirmative and '  '", "empty message"),
        ("{behavior.prompt} {ctx", "{behavior.prompt % ()} {ctx", "raises TypeError"),
        ("any(r.unsafe for r in replies)", "False", "goes on after a reply that is unsafe"),
        ("if any", "if replies[0].text[0] and any", "raises IndexError"),
        ("            return", "            return 1", "returns a value"),
        ("ctx.rng.random()", "object()", "same seed"),
        ("ctx.rng.random()", "__import__('random').random()", "calls __import__()"),
        ("ctx.rng.random()", "Random.__init__.__globals__['_inst'].random()", "same seed"),
        ("ctx.rng.random()", "ctx.examples[0].id", "raises IndexError"),
    ],
)
def test_an_attack_that_breaks_a_rule_is_told_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, said: str) -> None:
    assert old in GOOD
    with pytest.raises(AssertionError) as wrong:
        check_attack(_load(tmp_path, monkeypatch, GOOD.replace(old, new)).__dict__["yours" if "yours" in new else "mine"])
    assert said in str(wrong.value)


@pytest.mark.parametrize("tries", [2, 99])
def test_an_attack_that_cannot_be_closed_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    (line,) = [line for line in GOOD.splitlines() if "replies = yield" in line]
    again = f"        try:\n    {line}\n        except GeneratorExit:\n            yield []"

    with pytest.raises(AssertionError, match="cannot be closed"):
        check_attack(_load(tmp_path, monkeypatch, GOOD.replace(line, again)).mine, tries=tries)


def _load(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> ModuleType:
    (folder / "mine.py").write_text(text, encoding="utf-8")
    spec = importlib.util.spec_from_loader("mine", None, origin=str(folder / "mine.py"))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(compile(text, str(folder / "mine.py"), "exec"), module.__dict__)
    return module
