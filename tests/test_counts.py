"""A run says in words what became of its rows, and warns where that can't be meant."""

from typing import Any

import pytest

from dataset.text.counts import describe_counts, warnings_about


def counts(**of: Any) -> dict[str, Any]:
    none = {
        "read": 1000,
        "kept": 900,
        "truncated": 0,
        "prompt_cut": 0,
        "answer_cut": 0,
        "beyond_subset": 0,
        "dropped": {},
        "bad": {},
    }
    return {**none, **of}


def test_counts_are_lines_and_none_is_left_out() -> None:
    assert describe_counts(counts()) == ["rows read: 1,000, of these in this split: 900"]
    found = counts(
        truncated=12, prompt_cut=8, answer_cut=5, beyond_subset=1200, dropped={"no_answer": 2, "too_long": 30}, bad={"bad_json": 1}
    )
    assert describe_counts(found)[1:] == [
        "cut to dataset.seq_len: 12 (in the prompt 8, at the end 5)",
        "left out: too_long 30, no_answer 2",
        "malformed: bad_json 1",
        "beyond subset_size: 1,200",
    ]


def test_kinds_that_are_not_known_are_shown_as_they_are() -> None:
    found = counts(
        forms={"messages": 3, "alpaca": 1997}, ignored={}, overlap=7, oldest="x", places=["a", "b"], of={"a": [1], "b": 2}
    )
    assert describe_counts(found)[1:] == [
        "forms: alpaca 1,997, messages 3",
        "overlap: 7",
        "oldest: x",
        "places: ['a', 'b']",
        "of: b 2, a [1]",
    ]
    assert describe_counts({}) == ["rows read: 0, of these in this split: 0"]


@pytest.mark.parametrize(
    ("of", "warned"),
    [
        ({"truncated": 450}, None),
        ({"truncated": 451}, "451 of 900 rows (50%) are longer than dataset.seq_len"),
        ({"dropped": {"no_answer": 150}, "bad": {"bad_json": 50}}, None),
        (
            {"dropped": {"no_answer": 151}, "bad": {"bad_json": 50}},
            "201 of 1,000 rows (20%) are not trained on (no_answer 151, bad_json",
        ),
        ({"dropped": {"blank_line": 500, "no_answer": 100}}, None),
        ({"dropped": {"blank_line": 500, "no_answer": 101}}, "101 of 500 rows (20%)"),
        ({"dropped": {"too_long": 150, "answer_beyond_seq_len": 60}}, "dataset.long_rows=keep_prompt_end"),
    ],
)
def test_what_cannot_be_meant_is_warned_of_with_what_to_do(of: dict[str, Any], warned: str | None) -> None:
    found = warnings_about(counts(**of))
    assert len(found) == (warned is not None)
    assert warned is None or (warned in found[0] and ": " in found[0])
