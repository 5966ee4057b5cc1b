"""Graders: what each kind is worth, that no formula or template is ever more than arithmetic and text, and what is refused."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from saddlepoint.errors import ModelError, UsageError
from saddlepoint.finetuning import formula, grader_types, graders
from saddlepoint.finetuning.similarity import METRICS, bleu, cosine, fuzzy_match, gleu, rouge, rouge_l
from saddlepoint.types import Chat, Completion, Message, Sampling

pytest.importorskip("rapidfuzz"), pytest.importorskip("sacrebleu"), pytest.importorskip("fastapi")
from test_serve import running  # noqa: E402

if TYPE_CHECKING:
    from saddlepoint.targets.hf import HF

CAT, LAY = "the cat sat on the mat", "the cat lay on the mat"
WORDS = st.text(st.sampled_from("abc XY.,é"), max_size=30)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def nobody(model: str, chat: Chat, sampling: Sampling, schema: Mapping[str, Any]) -> Completion:
    raise ModelError(f"no model '{model}'")


def says(*texts: str, **more: Any) -> graders.Ask:
    """A model that answers these texts, one after the other."""
    left = list(texts)
    return lambda model, chat, sampling, schema: Completion(left.pop(0), 10, 3, **more)


def worth(given: Mapping[str, Any], sample: str, item: Mapping[str, Any] | None = None, ask: graders.Ask = nobody) -> graders.Graded:
    return graders.grade(grader_types.read(given), sample, item or {}, ask)


def check(operation: str, reference: str = "{{item.wanted}}", text: str = "{{sample.output_text}}") -> dict[str, Any]:
    return {"type": "string_check", "name": "check", "input": text, "reference": reference, "operation": operation}


# ---- checks and templates


@pytest.mark.parametrize(
    ("operation", "sample", "reward"),
    [("eq", "Oslo", 1), ("eq", "oslo", 0), ("eq", " Oslo", 0), ("ne", "Oslo", 0), ("ne", "Rome", 1), ("like", "In Oslo.", 1), ("like", "In oslo.", 0), ("ilike", "in oslo.", 1), ("ilike", "Rome", 0)],
)  # fmt: skip
def test_a_string_check_is_worth_what_its_operation_says(operation: str, sample: str, reward: float) -> None:
    assert worth(check(operation), sample, {"wanted": "Oslo"}) == graders.Graded(float(reward))


def test_templates_reach_into_answers_and_items() -> None:
    item = {"rows": [{"a-b": 3}, {"a-b": True}], "none": None, "list": [1, "x"]}
    sample = '{"city": {"name": "Oslo", "size": [1, 2.5]}}'
    filled = {
        "{{ sample.output_json.city.name }}!": "Oslo!",
        "{{sample.output_json.city.size[1]}}": "2.5",
        "{{item.rows[1].a-b}}/{{item.rows[0].a-b}}": "true/3",
        "{{item.none}} {{item.list}}": 'null [1, "x"]',
        "{{sample.output_text}}": sample,
        "{no} {{": "{no} {{",
    }
    for template, text in filled.items():
        assert worth(check("eq", text, template), sample, item).reward == 1.0, template


def test_what_an_answer_says_is_no_template() -> None:
    assert worth(check("eq", "{{sample.output_text}}", "{{item.secret}}"), "{{item.secret}}", {"secret": "x"}).reward == 0.0
    assert worth(check("like", "{{item.secret}}"), "{{item.secret}}", {"secret": "x"}).reward == 0.0


def test_what_is_not_there_is_an_error_and_worth_nothing() -> None:
    found = worth(check("ne"), "x", {})
    assert found.reward == 0.0 and found.errors == {"invalid_variable": "there is no '.wanted'"}
    found = worth(check("ne", "a", "{{sample.output_json.x}}"), '{"y": 1}')
    assert found.reward == 0.0 and set(found.errors) == {"invalid_variable"}
    found = worth(check("ne", "a", "{{sample.output_json.x}}"), "prose")
    assert found.reward == 0.0 and set(found.errors) == {"sample_parse"}
    grader = grader_types.read(check("eq", "{{item.a}} {{item.b[0]}}"))
    assert [grader_types.missing(grader, i) for i in ({"a": 1, "b": [2]}, {"a": 1, "b": []}, {})] == ["", "item.b[0]", "item.a"]


@pytest.mark.parametrize("hole", ["{{sample.text}}", "{{output_text}}", "{{item}}", "{{item.__class__()}}", "{{}}", "{{ sample.output_textual }}", "{{item.a|b}}"])  # fmt: skip
def test_a_template_that_names_no_variable_is_refused(hole: str) -> None:
    with pytest.raises(UsageError, match="is no variable; there are"):
        grader_types.read(check("eq", hole))


def test_templates_do_not_blow_up() -> None:
    began = time.monotonic()
    long = '{"x": "' + "a" * 90_000 + '"}'
    for template in (
        "{{sample.output_text}}" * 4000,
        "{{sample.output_json.x}}" * 4000,
        "{{" * 50_000,
        "{{ " * 30_000,
        "{{item.a}}" * 9000,
    ):
        assert worth(check("eq", template), long, {"a": "b"}).errors.keys() <= {"truncated"}
    assert set(worth(check("eq", "{{sample.output_text}}" * 2), long).errors) == {"truncated"}
    assert time.monotonic() - began < 5


@given(st.text(max_size=40), st.dictionaries(st.sampled_from(["a", "wanted"]), JUNK, max_size=2))
@example('{"x": "\\ud800"}', {"wanted": "\ud800"})
@example("[" * 5000, {"wanted": 1})
@example("1" * 5000, {"wanted": 1})
def test_grading_never_raises_for_what_an_answer_or_a_line_holds(sample: str, item: dict[str, Any]) -> None:
    for metric in ("fuzzy_match", "bleu", "rouge_l"):
        kind = {"type": "text_similarity", "input": "{{sample.output_json.x}}", "reference": "{{item.wanted}}", "evaluation_metric": metric}
        assert 0.0 <= worth(kind, sample, item).reward <= 1.0


# ---- likeness, by hand


def test_likeness_has_the_values_that_are_computed_by_hand() -> None:
    # 22 characters each; "sat" and "lay" share an "a", so 2 + 2 of 44 are deleted and inserted.
    assert fuzzy_match(CAT, LAY) == pytest.approx(1 - 4 / 44)
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 triples ("on the mat") and, smoothed, half of one of 3 fours.
    assert bleu(CAT, LAY) == pytest.approx((5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25)
    assert gleu(CAT, LAY) == pytest.approx((5 + 3 + 1 + 0) / (6 + 5 + 4 + 3))
    assert gleu("the cat", CAT) == pytest.approx((2 + 1) / 18)  # the smaller of 3/3 and 3/18
    assert [rouge(CAT, LAY, n) for n in (1, 2, 3, 4, 5)] == pytest.approx([5 / 6, 3 / 5, 1 / 4, 0, 0])
    assert rouge("the cat", CAT, 1) == pytest.approx(2 * 2 / (2 + 6))
    assert rouge_l(CAT, LAY) == pytest.approx(5 / 6)
    assert rouge_l("mat on cat", CAT) == pytest.approx(2 * 1 / 9)  # a subsequence keeps its order
    assert rouge_l("On THE, mat!", CAT) == pytest.approx(2 * 3 / 9)


@given(WORDS, WORDS)
def test_likeness_is_one_for_equal_texts_and_never_outside_0_and_1(a: str, b: str) -> None:
    for name, metric in METRICS.items():
        if name != "cosine":
            assert metric(a, a) == pytest.approx(1.0)
            assert 0.0 <= metric(a, b) <= 1.0


def test_the_cosine_is_of_embeddings() -> None:
    pytest.importorskip("torch")
    try:
        near, far = (
            cosine("a cat lay on the mat", "a kitten rested on the rug"),
            cosine("a cat lay on the mat", "the rate of interest rose"),
        )
    except ModelError as wrong:
        pytest.skip(str(wrong))
    assert cosine(CAT, CAT) == pytest.approx(1.0, abs=1e-4) and near > 0.5 > 0.3 > far


def test_meteor_says_why_it_cannot_be_had() -> None:
    with pytest.raises(UsageError, match=r"meteor needs WordNet.*there are: fuzzy_match, bleu"):
        grader_types.read({"type": "text_similarity", "input": "a", "reference": "b", "evaluation_metric": "meteor"})


# ---- models that grade


def score(**more: Any) -> dict[str, Any]:
    turns = [{"role": "developer", "content": "Grade."}, {"role": "user", "content": [{"type": "input_text", "text": "It says {{sample.output_text}}"}]}]  # fmt: skip
    return {"type": "score_model", "name": "s", "model": "judge", "input": turns, **more}


def label(**more: Any) -> dict[str, Any]:
    more = {"labels": ["good", "not good"], "passing_labels": ["good"], **more}
    return {"type": "label_model", "name": "l", "model": "judge", "input": [{"role": "user", "content": "{{item.x}}"}], **more}


@pytest.mark.parametrize(
    ("said", "reward"),
    [('{"result": 0.25}', 0.25), ('Sure: {"score": 1}', 1.0), ("0.5", 0.5), ("I give it 0.75.", 0.75), ('{"result": "0.5"}', 0.5), ("1", 1.0)],
)  # fmt: skip
def test_a_score_is_read_from_what_a_model_says(said: str, reward: float) -> None:
    assert worth(score(), "hello", ask=says(said)) == graders.Graded(reward, tokens={"judge": 13})


@pytest.mark.parametrize("said", ["2", '{"result": 7}', "between 0 and 1", "good", "", '{"result": true}', '{"result": 1e999}', f'{{"result": {"9" * 999}}}', '{"result": NaN}', "v1.2.3"])  # fmt: skip
def test_what_is_no_score_within_the_range_is_an_error(said: str) -> None:
    found = worth(score(), "hello", ask=says(said))
    assert found.reward == 0.0 and set(found.errors) == {"model_parse"} and found.tokens == {"judge": 13}


def test_a_model_is_asked_as_the_grader_says() -> None:
    seen: list[Any] = []

    def ask(*asked: Any) -> Completion:
        seen.append(asked)
        return Completion("4")

    drawn = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_completions_tokens": 9}
    assert worth(score(range=[1, 5], sampling_params=drawn), "hello", ask=ask).reward == 4.0
    ((model, chat, sampling, schema),) = seen
    assert model == "judge" and chat == (Message("system", "Grade."), Message("user", "It says hello"))
    assert sampling == Sampling(9, 0.5, 0.9, 7) and schema["properties"]["result"] == {"type": "number", "minimum": 1.0, "maximum": 5.0}


@pytest.mark.parametrize(("said", "reward"), [("good", 1), ("Not good.", 0), ('{"label": "not good"}', 0), ('{"label": "good"}', 1)])
def test_a_label_is_read_from_what_a_model_says(said: str, reward: float) -> None:
    assert worth(label(), "-", {"x": 1}, says(said)).reward == reward and not worth(label(), "-", {"x": 1}, says(said)).errors


def test_models_that_do_not_grade_are_told_apart() -> None:
    assert set(worth(label(), "-", {"x": 1}, says("goodness")).errors) == {"model_parse"}
    assert set(worth(score(), "-", ask=says("I'm sorry, but I can't help with that.")).errors) == {"model_refusal"}
    assert set(worth(score(), "-", ask=says("", finish="filter", blocked="guard: no")).errors) == {"model_refusal"}
    assert worth(score(), "-", ask=says("", finish="error", error="down")).errors == {"model_server": "down"}
    assert worth(score(), "-").errors == {"model_server": "no model 'judge'"}
    with pytest.raises(UsageError, match=r"passing_labels names fine, which labels does not have"):
        grader_types.read(label(passing_labels=["fine"]))


# ---- sums


def multi(formula: str, **parts: Any) -> dict[str, Any]:
    return {"type": "multi", "name": "both", "graders": parts, "calculate_output": formula}


def test_a_multi_grader_combines_rewards_tokens_and_errors() -> None:
    parts = {"same": check("eq"), "near": {**check("eq"), "type": "text_similarity", "evaluation_metric": "rouge_1"}, "judge": score()}
    parts["near"].pop("operation")
    found = worth(multi("0.5 * same + near^2 - min(judge, 0.125)", **parts), "a b", {"wanted": "a c"}, says('{"result": 0.5}'))
    assert found.reward == pytest.approx(0.5**2 - 0.125) and found.sub_rewards == {"same": 0.0, "near": 0.5, "judge": 0.5}
    assert found.tokens == {"judge": 13} and not found.errors
    found = worth(multi("same + judge", same=check("eq"), judge=score()), "a", {"wanted": "a"})
    assert found.reward == 1.0 and found.errors == {"model_server": "judge: no model 'judge'"}
    assert set(worth(multi("1 / same", same=check("eq")), "a", {"wanted": "b"}).errors) == {"formula"}
    assert grader_types.models(grader_types.read(multi("a + b", a=score(), b=label(model="other")))) == {"judge", "other"}


def test_graders_in_a_list_or_alone_go_by_their_names() -> None:
    wired = {"type": "multi", "name": "m", "graders": [check("eq"), {**score(), "name": "judged"}], "calculate_output": "check + judged"}
    assert worth(wired, "a", {"wanted": "a"}, says("1")).reward == 2.0
    assert worth({**wired, "graders": check("eq"), "calculate_output": "check"}, "a", {"wanted": "a"}).reward == 1.0
    with pytest.raises(UsageError, match="needs a name of its own"):
        grader_types.read({**wired, "graders": [check("eq"), check("ne")]})


def test_graders_that_cannot_be_had_say_so() -> None:
    code = {"type": "python", "name": "p", "source": "def grade(sample, item): return 1.0"}
    for bad in (code, multi("p", p=code), {**multi("p"), "graders": [code]}):
        with pytest.raises(UsageError, match="python graders run code"):
            grader_types.read(bad)
    for bad, said in [
        (multi("a", a=multi("b", b=check("eq"))), "multi"),
        (multi("max", max=check("eq")), "'max' cannot be a name"),
        (multi("b", a=check("eq")), "the formula names 'b'; there are: a"),
        (multi("1"), "graders"),
        ({**check("eq"), "operation": "regex"}, "operation"),
        ({**check("eq"), "more": 1}, "more"),
        (score(range=[1, 1]), "range must be"),
        ("string_check", "grader"),
        (None, "grader"),
    ]:
        with pytest.raises(UsageError, match=said):
            grader_types.read(bad)


@given(JUNK | st.fixed_dictionaries({"type": st.sampled_from(["multi", "python", "score_model", "string_check"])}, optional={"graders": JUNK, "input": JUNK, "calculate_output": JUNK, "name": JUNK}))  # fmt: skip
def test_reading_a_grader_raises_nothing_else(junk: Any) -> None:
    with pytest.raises(UsageError):
        grader_types.read(junk)


# ---- the evaluator

NAMES = {"a": 0.5, "b": -2.0}
PYTHON = {"min": min, "max": max, "abs": abs, "floor": math.floor, "ceil": math.ceil, "exp": math.exp, "sqrt": math.sqrt, "log": math.log}
FORMULAS = st.recursive(
    st.sampled_from(["a", "b", "0.5", "3.0", "1e-3", "2."]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "**"]), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        st.tuples(st.sampled_from("+-"), inner).map("".join),
        st.tuples(st.sampled_from(sorted(PYTHON)), inner).map(lambda t: f"{t[0]}({t[1]}{', a' if t[0] in ('min', 'max') else ''})"),
    ),
    max_leaves=12,
)


@given(FORMULAS)
def test_a_formula_comes_to_what_python_makes_of_it(text: str) -> None:
    try:
        want = eval(text, {"__builtins__": {}}, {**PYTHON, **NAMES})
        want = float(want) if not isinstance(want, complex) and math.isfinite(want) else None
    except (ArithmeticError, ValueError, TypeError):  # a comparison of a complex number in between
        want = None
    try:
        found = formula.value(formula.parsed(text, NAMES), NAMES)
    except (ArithmeticError, ValueError):
        found = None
    assert (found is None) == (want is None)
    assert want is None or found == pytest.approx(want, rel=1e-9)
    assert text.count("**") == 0 or found is None or found == formula.value(formula.parsed(text.replace("**", "^"), NAMES), NAMES)


@given(st.text(max_size=60) | st.text(st.sampled_from("ab01+-*/^().,eE_[]{}'\"@ "), max_size=60))
def test_any_text_is_a_formula_or_a_mistake(text: str) -> None:
    try:
        tree = formula.parsed(text, NAMES)
    except UsageError:
        return
    with suppress(ArithmeticError, ValueError):
        assert math.isfinite(formula.value(tree, NAMES))


@pytest.mark.parametrize(
    "text",
    ["", "__import__('os')", "a.real", "a if b else 1", "[a][0]", "a; b", "lambda: 1", "(a := 1)", "a < b", "a // b", "a % b", "a @ b", "~1", "not a", "True", "None", "'a'", "1j", "max", "max()", "sqrt(1, 2)", "max(*[1])", "log(x=1)", "abs(abs)", "pow(2, 3)", "eval(1)", "c", "a b", "\u0430", "(" * 300 + "1" + ")" * 300, "-" * 600 + "1", "1+" * 700 + "1", "9" * 900, "f'{a}'", "a\nb"],
)  # fmt: skip
def test_what_is_no_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="the formula"):
        try:
            formula.parsed(text, NAMES)
        except UsageError as wrong:
            raise UsageError(str(wrong).replace("max takes", "the formula").replace("sqrt takes", "the formula")) from None


@pytest.mark.parametrize("text", ["1 / 0", "sqrt(b)", "log(0)", "9 ^ 9 ^ 9", "exp(1000)", "(0 - 8) ^ 0.5", "1e308 * 10"])
def test_a_formula_without_a_finite_value_is_an_error(text: str) -> None:
    with pytest.raises((ArithmeticError, ValueError)):
        formula.value(formula.parsed(text, NAMES), NAMES)


def test_a_grader_is_plain_data() -> None:
    """It comes back from JSON as it was, so that a job can keep it."""
    for one in (check("eq"), score(), label(), multi("a + b", a=check("eq"), b=score())):
        read = grader_types.read(one)
        assert grader_types.read(json.loads(read.model_dump_json())) == read


# ---- over the protocol


@pytest.fixture(scope="module")
def client(tiny: "HF") -> Iterator[Any]:
    """The official client of a running server with a model, one that scripts its answers, and one that is down."""
    openai = pytest.importorskip("openai")
    from saddlepoint.service.app import Service
    from saddlepoint.service.chat import Served
    from saddlepoint.targets.scripted import Scripted

    scripted = Scripted(lambda q: '{"result": 0.75}' if "Grade" in q.chat[0].text else "not good")
    down = Scripted(lambda q: Completion("", finish="error", error="connection failed"))
    service = Service.of([Served("tiny", tiny), Served("judge", scripted), Served("down", down)])
    with running(service) as url, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as made:
        yield made


def test_the_official_client_runs_graders(client: Any) -> None:
    run = client.fine_tuning.alpha.graders.run
    found = run(grader=check("eq"), model_sample="Oslo", item={"wanted": "Oslo"})
    assert found.metadata.sampled_model_name is None
    assert found.reward == 1.0 and found.sub_rewards == {} and found.api_model_grader_token_usage_per_model == {}
    assert found.metadata.name == "check" and found.metadata.type == "string_check" and found.metadata.scores == {"check": 1.0}
    assert found.metadata.execution_time >= 0 and not any(v for k, v in found.metadata.errors.to_dict().items())
    assert len(found.metadata.errors.to_dict()) == 14
    found = run(grader=score(), model_sample="hello")
    assert found.metadata.sampled_model_name == "judge"
    assert found.reward == 0.75 and found.metadata.token_usage == found.api_model_grader_token_usage_per_model["judge"]
    found = run(grader=multi("(a + b) / 2", a=check("ilike"), b=label()), model_sample="OSLO", item={"wanted": "oslo", "x": 1})
    assert found.reward == 0.5 and found.sub_rewards == {"a": 1.0, "b": 0.0} and found.metadata.scores == {"a": 1.0, "b": 0.0}
    found = run(grader=check("eq", "{{item.reference_answer}}"), model_sample="a", extra_body={"reference_answer": "a"})  # as of 2025
    assert found.reward == 1.0


def test_the_flags_say_what_went_wrong(client: Any) -> None:
    def flags(**asked: Any) -> set[str]:
        found = client.fine_tuning.alpha.graders.run(**{"model_sample": "prose", **asked})
        assert found.reward == 0.0
        return {name for name, there in found.metadata.errors.to_dict().items() if there is True}

    assert flags(grader=check("eq")) == {"invalid_variable_error"}
    assert flags(grader=check("eq", "a", "{{sample.output_json.x}}")) == {"sample_parse_error"}
    assert flags(grader=multi("1 / a", a=check("eq", "x"))) == {"formula_parse_error"}
    assert flags(grader=label(), item={"x": 1}) == set()
    assert flags(grader=score(input=[{"role": "user", "content": "What?"}])) == {"model_grader_parse_error"}
    assert flags(grader=score(model="down")) == {"model_grader_server_error"}
    found = client.fine_tuning.alpha.graders.run(grader=score(model="down"), model_sample="x")
    assert "connection failed" in found.metadata.errors.api_model_grader_server_error_details


def test_a_model_that_would_ramble_is_held_to_a_number_or_a_label(client: Any) -> None:
    """The random model says nothing that can be read, so what it gives can only come of the schema."""
    for grader in (score(model="tiny", range=[2, 3]), label(model="tiny")):
        found = client.fine_tuning.alpha.graders.run(grader=grader, model_sample="x", item={"x": "tea"})
        assert not found.metadata.errors.api_model_grader_parse_error and found.api_model_grader_token_usage_per_model["tiny"] > 0
        assert 2 <= found.reward <= 3 if grader["type"] == "score_model" else found.reward in (0.0, 1.0)


def test_a_grader_is_validated_or_refused(client: Any) -> None:
    openai = pytest.importorskip("openai")
    validate = client.fine_tuning.alpha.graders.validate
    good = multi("a", a=check("eq"))
    assert validate(grader=good).grader.to_dict() == good
    for bad, said in [
        ({"type": "python", "name": "p", "source": "1"}, "python graders run code"),
        (multi("a +", a=check("eq")), "cannot be read"),
        (check("eq", "{{sample.x}}"), "is no variable"),
    ]:
        for call in (
            lambda bad=bad: validate(grader=bad),
            lambda bad=bad: client.fine_tuning.alpha.graders.run(grader=bad, model_sample=""),
        ):
            with pytest.raises(openai.BadRequestError, match=said) as caught:
                call()
            assert caught.value.code == "invalid_grader" and caught.value.param == "grader"
    for name in ('"\\ud800"', "NaN", "[" * 5000 + "]" * 5000):  # what the client itself would not send
        raw = json.dumps({"grader": {**check("eq"), "name": "NAME"}}).replace('"NAME"', name)
        found = pytest.importorskip("httpx2").post(f"{client.base_url}fine_tuning/alpha/graders/validate", content=raw)
        assert found.status_code == 400 and set(found.json()["error"]) == {"message", "type", "param", "code"}
    with pytest.raises(openai.NotFoundError, match="'nobody' does not exist"):
        validate(grader=score(model="nobody"))
