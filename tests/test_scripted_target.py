import doctest
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import saddlepoint.targets.scripted
from saddlepoint.targets.scripted import Scripted
from saddlepoint.types import Completion, Query, Target, user


def test_its_example_runs():
    assert 0 == doctest.testmod(saddlepoint.targets.scripted).failed


def test_answers_texts_and_completions_in_order_and_keeps_what_was_asked():
    queries = [Query(user("a")), Query(user("b")), Query(user("a"))]
    cut = Completion("half", 1, 2, "length")
    target: Target = Scripted(lambda query: cut if query == queries[1] else query.chat[-1].text, name="puppet")

    assert [Completion("a"), cut, Completion("a")] == target.generate(queries)
    assert queries == target.asked
    assert "puppet" == target.name


def test_threads_share_one_iterator():
    texts = iter(str(number) for number in range(200))  # a generator raises when it is entered twice at once
    target = Scripted(lambda _: next(texts))
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: target.generate([Query(user("hi"))] * 5), range(40)))

    assert set(map(str, range(200))) == {completion.text for batch in answers for completion in batch}
    assert all(int(batch[0].text) + 4 == int(batch[4].text) for batch in answers)
    assert 200 == len(target.asked)


def test_an_answer_may_ask_its_own_target():
    answer: Callable[[Query], str] = lambda query: query.chat[-1].text or target.generate([Query(user("inner"))])[0].text
    target = Scripted(answer)

    assert ["inner"] == [completion.text for completion in target.generate([Query(user(""))])]
