"""The matrix of defenses: what is asked, what counts as static and adaptive, and which stacks no other beats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saddlepoint import registry
from saddlepoint.store import Store

pytest.importorskip("torch"), pytest.importorskip("sacrebleu")
from saddlepoint.bench import defenses as bench  # noqa: E402

ATTACKS = "direct, prefill"


def settings(folder: Path, *stacks: str) -> bench.Settings:
    return bench.Settings(stacks, str(folder), attacks=ATTACKS, weights="", limit=2)


def test_what_is_known_names_defenses_and_attacks_that_exist() -> None:
    for name, attacks in bench.KNOWN.items():
        registry.get("defense", name)
        registry.parse("attack", attacks)
    registry.parse("attack", f"{bench.ATTACKS}, {bench.WEIGHTS}")


def test_every_defense_that_needs_nothing_is_in_the_matrix() -> None:
    found = bench.everything()

    assert "human_approval" not in found and "safe_decoding" not in found  # a person, a model of one's own
    assert {"self_reminder", "perplexity_filter", "smooth_llm", "refusal_steering", "back_translation"} <= set(found)
    for name in found:
        registry.parse("defense", name)


def test_an_attacker_adds_what_gets_around_the_defenses_each_once() -> None:
    config = bench._config(bench.Settings(("",)), "classifier_guard, erase_and_check")
    attacks = list(map(str, registry.parse("attack", config.attacks)))

    assert config.adaptive and config.defenses == "classifier_guard, erase_and_check"
    assert attacks.count("prefix_injection+synonym_swap") == attacks.count("prefill+past_tense") == 1
    for stack, searched in {"self_reminder": True, "classifier_guard": True, "perplexity_filter": True, "erase_and_check": False}.items():
        assert (bench.WEIGHTS in bench._config(bench.Settings(("",)), stack).attacks) is searched  # only where a loss can tell it


@pytest.fixture(scope="module")
def measured(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("bench")
    return out, bench.bench(settings(tiny_folder, "self_reminder", "drawn_text, hidden_text"), out, lambda _: None)


def test_each_stack_has_its_row(measured: tuple[Path, dict[str, Any]]) -> None:
    bare, reminded, guarded = measured[1]["rows"]

    assert [r["defense"] for r in (bare, reminded, guarded)] == ["", "self_reminder", "drawn_text, hidden_text"]
    assert guarded["class"] == "detection" and reminded["class"] == "demonstration"
    assert bare["static"] is None and bare["seconds"] is None
    for row in (reminded, guarded):
        assert set(row["attacks"]) >= {"direct", "prefill"}
        assert all(0 <= row["attacks"][a][kind]["value"] <= 1 for a in ("direct", "prefill") for kind in ("static", "adaptive"))
        assert row["any"]["n"] == 2 and row["over_refusal"]["n"] == 2 and row["ordinary"]["n"] == 20
    # The reminder's words are read with every query; guards that let ordinary requests pass change nothing and read nothing.
    assert reminded["tokens"]["value"] > 20 and guarded["tokens"]["value"] == 0
    assert guarded["kept"]["value"] == 1.0 > reminded["kept"]["value"]


def test_a_matrix_that_was_measured_is_not_measured_again(tiny_folder: Path, measured: tuple[Path, dict[str, Any]]) -> None:
    out, found = measured
    before = {f: Store.open(f).read("machine") for f in out.iterdir()}
    sizes = {f: sum(1 for _ in Store.open(f).queries()) for f in out.iterdir()}
    again = bench.bench(settings(tiny_folder, "self_reminder", "drawn_text, hidden_text"), out, lambda _: None)

    assert again["rows"] == found["rows"] and len(before) == 3
    assert sizes == {f: sum(1 for _ in Store.open(f).queries()) for f in out.iterdir()}


def test_the_page_and_the_table_hold_every_number(measured: tuple[Path, dict[str, Any]]) -> None:
    found = measured[1]
    table, page = bench.table(found), bench.page(found)

    assert json.loads(json.dumps(found)) == found
    for said in ("self_reminder", "drawn_text, hidden_text", "prefill"):
        assert said in table and said in page
    assert table.count("\n| ") == 2 * (2 + 3) and "→" in table
    assert page.count("<section") == 2 + 3 and "<script" in page and "http" not in page.partition("<main>")[2].replace("http-equiv", "")


POINTS = st.lists(st.tuples(*[st.integers(0, 5)] * 4), min_size=1, max_size=8)


@given(POINTS)
def test_the_front_holds_what_no_other_beats(points: list[tuple[int, int, int, int]]) -> None:
    rows = [
        {"worst": {"value": a / 5}, "over_refusal": {"value": b / 5}, "clearance": {"value": 1 - c / 5}, "seconds": {"value": d / 5 + 0.01}}
        for a, b, c, d in points
    ]
    front = bench.front(rows)

    assert front and min(range(len(rows)), key=lambda i: points[i]) in front
    for i, p in enumerate(points):
        beaten = any(q != p and all(x <= y for x, y in zip(q, p, strict=True)) for q in points)
        assert (i in front) is not beaten
