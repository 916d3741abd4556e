"""The split by hash, and what is equal."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.text.conversation import Turn
from dataset.text.splits import are_test_hashes, conversation_hash, prompt_hash, question_hash


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


def test_raw_text_is_split_and_compared_by_itself() -> None:
    text = (Turn("text", "Once upon a time."),)
    assert prompt_hash(text) != prompt_hash((Turn("text", "Another."),))
    assert prompt_hash(text) == prompt_hash((Turn("text", " Once upon a time.\n"),))
    assert question_hash(text) != question_hash((Turn("text", "Another."),))
