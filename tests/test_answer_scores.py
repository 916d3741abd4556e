"""Tests of the per-family scores of generated answers. Strings in, figures out; no model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import UsageError
from evaluators.answer_scores import score_answers, score_by_hops, wilson_lower_bound


@pytest.mark.parametrize(
    ("correct", "count", "expected"),
    # Worked out apart from the code, from the textbook interval at z = 1.96 (scipy's binomtest method "wilson").
    [(81, 263, 0.2552), (15, 148, 0.0624), (50, 100, 0.4038), (100, 100, 0.9630), (1, 1, 0.2065), (0, 20, 0.0)],
)
def test_wilson_bound_equals_published_figures(correct: int, count: int, expected: float) -> None:
    assert wilson_lower_bound(correct, count) == pytest.approx(expected, abs=1e-4)


@given(st.integers(1, 500), st.data())
def test_wilson_bound_lies_between_zero_and_the_share_and_grows_with_it(count: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, count))
    bound = wilson_lower_bound(correct, count)
    assert 0 <= bound <= correct / count
    if correct < count:
        assert wilson_lower_bound(correct + 1, count) > bound
    assert wilson_lower_bound(2 * correct, 2 * count) >= bound


def test_scores_of_each_family_and_overall() -> None:
    families = ["sum"] * 4 + ["logic"] * 6
    references = ["7", "8", "9", "7", "yes", "no", "yes", "yes", "no", "yes"]
    answers = ["7", "8", "1", "", "yes", "no", "yes", "yes", "no", "yes"]
    scores = score_answers(families, references, answers)
    assert scores["families"]["sum"] == {
        "accuracy": 0.5, "baseline": 0.5, "count": 4,
        "lower_95": wilson_lower_bound(2, 4), "upper_95": 1 - wilson_lower_bound(2, 4),
    }  # fmt: skip
    assert scores["families"]["logic"]["accuracy"] == 1.0
    assert scores["families"]["logic"]["baseline"] == pytest.approx(4 / 6)
    # (2 + 4) of 10 by the two constants "7" and "yes".
    ends = {"lower_95": wilson_lower_bound(8, 10), "upper_95": 1 - wilson_lower_bound(2, 10)}
    assert scores["overall"] == {"accuracy": 0.8, "baseline": 0.6, "count": 10, **ends}


@pytest.mark.parametrize(
    ("answer", "right"),
    [("82", True), (" 82\n", True), ("", False), ("  ", False), ("82.", False), ("8 2", False), ("182", False)],
)
def test_only_surrounding_white_space_is_forgiven(answer: str, right: bool) -> None:
    assert score_answers(["addition"], ["82"], [answer])["overall"]["accuracy"] == float(right)


def test_case_is_not_forgiven() -> None:
    assert score_answers(["spell"], ["C A T"], ["c a t"])["overall"]["accuracy"] == 0.0


def test_scores_by_hops_are_those_of_their_questions_alone() -> None:
    families = ["map", "map", "order", "map", "sum"]
    found = score_by_hops([2, 1, 2, 2, None], families, ["A", "B", "C", "D", "9"], ["A", "x", "C", "x", "9"])
    assert list(found) == [1, 2]
    assert found[1] == score_answers(["map"], ["B"], ["x"])
    assert found[2] == score_answers(["map", "order", "map"], ["A", "C", "D"], ["A", "C", "x"])
    assert score_by_hops([None], ["sum"], ["9"], ["9"]) == {}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1), st.sampled_from("xyz"))
def test_no_constant_answer_beats_the_baseline(rows: list[tuple[str, str]], constant: str) -> None:
    families, references = [row[0] for row in rows], [row[1] for row in rows]
    scores = score_answers(families, references, [constant] * len(rows))
    for score in (scores["overall"], *scores["families"].values()):
        assert score["accuracy"] <= score["baseline"]


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        score_answers([], [], [])
