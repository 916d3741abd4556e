"""Rows of every form, malformed rows of many kinds, and the split by hash."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.text.conversation import Turn
from dataset.text.files import BadRow
from dataset.text.sources import (
    NothingToLearn,
    are_test_hashes,
    conversation_hash,
    parse_row,
    prompt_hash,
    question_hash,
    to_conversation,
)


def message(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value, **more}


def chat(*messages: Any) -> dict[str, Any]:
    return {"conversations": list(messages)}


HUMAN, GPT = message("human", "Why?"), message("gpt", "So.")


def test_slimorca_rows_keep_order_and_weight() -> None:
    row = chat(
        message("system", "Sys", weight=None),
        message("human", "A", weight=0),
        message("gpt", "B", weight=0),
        message("human", "C", weight=None),
        message("gpt", "D", weight=1),
        message("human", "left without an answer"),
    )
    supervised = [(turn.role, turn.text, turn.supervised or turn.role != "assistant") for turn in to_conversation(row)]
    assert supervised == [
        ("system", "Sys", True),
        ("user", "A", True),
        ("assistant", "B", False),
        ("user", "C", True),
        ("assistant", "D", True),
    ]


@pytest.mark.parametrize("prompt", ["prompt", "question", "input"])
@pytest.mark.parametrize("reply", ["response", "output", "answer"])
@pytest.mark.parametrize("system", [{}, {"system": "S"}, {"system_prompt": "S"}, {"system_prompt": ""}, {"system": None}])
def test_pair_rows(prompt: str, reply: str, system: dict[str, Any]) -> None:
    turns = to_conversation({"id": "x.1", prompt: "Q", reply: "A", **system})
    opening = [Turn("system", "S")] if "S" in system.values() else []
    assert list(turns) == [*opening, Turn("user", "Q"), Turn("assistant", "A")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat(), "no_user_turn"),
        (chat(message("system", "S"), GPT), "no_user_turn"),
        (chat(message("human", " \n"), GPT), "empty_prompt"),
        (chat(HUMAN), "no_answer"),
        (chat(GPT, HUMAN), "no_answer"),
        (chat(HUMAN, message("gpt", "  ")), "empty_answer"),
        (chat(HUMAN, message("gpt", "No.", weight=0)), "no_supervised_answer"),
        (chat(HUMAN, message("gpt", "No.", weight=0), HUMAN, message("gpt", "")), "no_supervised_answer"),
        ({"question": "Q"}, "no_answer"),
        ({"question": "Q", "response": ""}, "empty_answer"),
        ({"question": "", "response": "A"}, "empty_prompt"),
    ],
)
def test_rows_with_nothing_to_learn_have_a_reason(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(NothingToLearn) as caught:
        to_conversation(row)
    assert caught.value.reason == reason


def test_an_empty_answer_among_others_is_context() -> None:
    turns = to_conversation(chat(HUMAN, message("gpt", ""), HUMAN, GPT))
    assert [turn.supervised for turn in turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad_json"),
        (b'{"a": 1} trailing', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"1" * 10_000, "bad_json"),
        (b'{"prompt": "\xff", "answer": "x"}', "bad_utf8"),
        (b'{"prompt": "a", "prompt": "b", "answer": "x"}', "duplicate_key"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "value": "y"}]}', "duplicate_key"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
        (b"{}", "unknown_form"),
        (b'{"text": "x"}', "unknown_form"),
        (b'{"instruction": "I", "input": "x", "output": "y"}', "unknown_form"),
        (b'{"prompt": "a", "question": "b", "answer": "c"}', "unknown_form"),
        (b'{"prompt": "a", "answer": "b", "output": "c"}', "unknown_form"),
        (b'{"prompt": "a", "answer": "b", "system": "c", "system_prompt": "d"}', "unknown_form"),
        (b'{"prompt": null, "answer": "b"}', "wrong_type"),
        (b'{"prompt": "a", "answer": 7}', "wrong_type"),
        (b'{"prompt": "a", "answer": ["b"]}', "wrong_type"),
        (b'{"prompt": "a", "answer": "b", "system": 3}', "wrong_type"),
        (b'{"prompt": "a", "answer": "\\ud800"}', "bad_unicode"),
        (b'{"conversations": null}', "wrong_type"),
        (b'{"conversations": {"from": "human"}}', "wrong_type"),
        (b'{"conversations": ["hello"]}', "wrong_type"),
        (b'{"conversations": [{"from": "human"}]}', "missing_key"),
        (b'{"conversations": [{"value": "x"}]}', "missing_key"),
        (b'{"conversations": [{"from": "human", "value": null}]}', "wrong_type"),
        (b'{"conversations": [{"from": "human", "value": 5}]}', "wrong_type"),
        (b'{"conversations": [{"from": "tool", "value": "x"}]}', "unknown_role"),
        (b'{"conversations": [{"from": null, "value": "x"}]}', "unknown_role"),
        (b'{"conversations": [{"from": ["gpt"], "value": "x"}]}', "unknown_role"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "weight": 0.5}]}', "wrong_type"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "weight": "1"}]}', "wrong_type"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "weight": true}]}', "wrong_type"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "weight": [1]}]}', "wrong_type"),
    ],
)
def test_malformed_rows_have_a_reason_and_say_what_was_found(line: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match="expected") as caught:
        to_conversation(parse_row(line))
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 600


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["conversations", "from", "value", "weight", "prompt", "answer", "system", "gpt"]), inner)
    ),
    max_leaves=12,
)


@given(st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300)
def test_any_line_is_a_conversation_or_has_a_reason(line: bytes) -> None:
    try:
        turns = to_conversation(parse_row(line))
    except (BadRow, NothingToLearn) as outcome:
        assert outcome.reason
    else:
        assert turns[-1].role == "assistant"


def test_a_byte_order_mark_and_windows_newlines_are_no_obstacle() -> None:
    assert parse_row(b'\xef\xbb\xbf{"a": 1}\r') == {"a": 1}
    with pytest.raises(NothingToLearn, match="blank_line"):
        parse_row(b" \r")


def is_test(conversation: tuple[Turn, ...], seed: int, test_ratio: float) -> bool:
    return bool(are_test_hashes(np.array([prompt_hash(conversation)], np.uint64), seed, test_ratio)[0])


def asked(user: str, system: str = "") -> tuple[Turn, ...]:
    return tuple(([Turn("system", system)] if system else []) + [Turn("user", user), Turn("assistant", "A")])


def test_the_split_depends_on_seed_system_and_first_question_only() -> None:
    sides = [is_test(asked(f"Question {i}"), seed=0, test_ratio=0.3) for i in range(2000)]
    assert 0.26 < np.mean(sides) < 0.34
    for i in range(50):
        longer = (*asked(f" Question {i}\n")[:-1], Turn("assistant", "other"), Turn("user", "And?"))
        assert is_test(longer, 0, 0.3) == sides[i]
    assert [is_test(asked(f"Question {i}"), 1, 0.3) for i in range(2000)] != sides
    assert [is_test(asked(f"Question {i}", "Sys"), 0, 0.3) for i in range(2000)] != sides
    # A stored checkpoint's test split must stay the test split: these four are fixed for good.
    assert [is_test(asked(text), 0, 0.5) for text in ("a", "b", "c", "d")] == [True, True, True, False]


@given(st.text(max_size=10), st.integers(0, 5), st.floats(0, 0.99), st.floats(0, 0.99))
@settings(max_examples=100)
def test_a_larger_share_only_adds_test_rows(user: str, seed: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    conversation = (Turn("user", user), Turn("assistant", "A"))
    assert is_test(conversation, seed, low) <= is_test(conversation, seed, high)
    assert not is_test(conversation, seed, 0.0)


def test_hashes_tell_what_is_equal() -> None:
    one, other_system, other_answer = asked("Q"), asked("Q", "Sys"), (*asked("Q")[:-1], Turn("assistant", "B"))
    assert prompt_hash(one) == prompt_hash(other_answer) != prompt_hash(other_system)
    assert question_hash(one) == question_hash(other_system) != question_hash(asked("R"))
    # A conversation that goes on asks something else, though it begins alike, and is still held out with it.
    further = (*one, Turn("user", "R"), Turn("assistant", "A"))
    assert question_hash(further) != question_hash(one) and prompt_hash(further) == prompt_hash(one)
    assert question_hash(further) == question_hash((*other_answer, *further[len(one) :])) != question_hash(asked("QR"))
    assert conversation_hash(one) == conversation_hash(asked(" Q ")) != conversation_hash(other_answer)
    assert conversation_hash((Turn("user", "Q"),)) != conversation_hash((Turn("assistant", "Q"),))
