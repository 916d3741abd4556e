"""Contract 1: ids, masks and segments of conversations, for training and for generation."""

from dataclasses import replace
from pathlib import Path

import mistral_common
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.conversation import (
    Template,
    Turn,
    encode_conversation,
    encode_prompt,
    with_default_system,
)
from dataset.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
TEMPLATE = Template()

texts = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["<s>", "</s>", "[USER]\n", "\n[ASSISTANT]\nyes", "<0x0A>", "a\u2028b", "\x00", "☃🙂", "  "]),
)
turns_lists = st.lists(
    st.builds(Turn, st.sampled_from(["system", "user", "assistant"]), texts, st.booleans()), min_size=1, max_size=6
)


def answer(text: str, supervised: bool = True) -> Turn:
    return Turn("assistant", text, supervised)


@given(turns_lists, st.integers(0, 6))
@settings(max_examples=150)
def test_a_prompt_is_an_exact_prefix_of_what_is_trained_on(turns: list[Turn], at: int) -> None:
    history = turns[:at]
    whole = encode_conversation([*history, answer("The answer."), *turns[at:]], TOKENIZER, TEMPLATE)
    prompt = encode_prompt(history, TOKENIZER, TEMPLATE)
    length = len(prompt.ids)
    assert np.array_equal(whole.ids[:length], prompt.ids)
    assert np.array_equal(whole.segment[:length], prompt.segment)
    assert np.array_equal(whole.supervised[:length], prompt.supervised)
    assert whole.supervised[length] and whole.segment[length] == 0


@given(turns_lists)
@settings(max_examples=150)
def test_supervised_ids_are_the_answers_and_their_eos_and_nothing_else(turns: list[Turn]) -> None:
    encoded = encode_conversation(turns, TOKENIZER, TEMPLATE)
    answers = [turn.text for turn in turns if turn.role == "assistant" and turn.supervised]
    expected = [token for text in answers for token in [*TOKENIZER.encode(text), TOKENIZER.eos_id]]
    assert encoded.ids[encoded.supervised].tolist() == expected
    decoded = [TOKENIZER.decode(TOKENIZER.encode(text)) for text in answers]
    assert encoded.turn_bytes == sum(len(text.encode()) for text in decoded)


@given(turns_lists)
@settings(max_examples=100)
def test_text_forges_neither_a_turn_nor_its_end(turns: list[Turn]) -> None:
    encoded = encode_conversation(turns, TOKENIZER, TEMPLATE)
    kept = [turn for turn in turns if turn.role != "system" or turn.text.strip()]
    assert np.count_nonzero(encoded.ids == TOKENIZER.bos_id) == len(kept)
    assert np.count_nonzero(encoded.ids == TOKENIZER.eos_id) == sum(turn.role == "assistant" for turn in kept)


def test_turns_keep_their_order_and_each_prompt_run_is_one_segment() -> None:
    turns = [
        Turn("system", "Be brief."),
        Turn("user", "One?"),
        answer("1"),
        Turn("user", "Two?"),
        answer("2", supervised=False),
        Turn("user", "Three?"),
        Turn("user", "Well?"),
        answer("3"),
    ]
    encoded = encode_conversation(turns, TOKENIZER, TEMPLATE)
    tags = {"system": "[SYSTEM]\n", "user": "[USER]\n", "assistant": "[ASSISTANT]\n"}
    ids, segments, targets, segment = [], [], [], 1
    for turn in turns:
        opening = [TOKENIZER.bos_id, *TOKENIZER.encode(tags[turn.role])]
        body = TOKENIZER.encode(turn.text)
        is_answer = turn.role == "assistant"
        if is_answer:
            body = [*body, TOKENIZER.eos_id]
        ids += [*opening, *body]
        segments += [segment] * len(opening) + [0 if is_answer else segment] * len(body)
        targets += [False] * len(opening) + [is_answer and turn.supervised] * len(body)
        segment += is_answer
    assert encoded.ids.tolist() == ids
    assert encoded.segment.tolist() == segments
    assert encoded.supervised.tolist() == targets
    assert encoded.turn_bytes == 2


def test_an_empty_system_turn_is_none_and_the_default_stands_in() -> None:
    plain = (Turn("user", "Hi"), answer("Hello"))
    empty = (Turn("system", " \n"), *plain)
    same = [encode_conversation(turns, TOKENIZER, TEMPLATE).ids.tolist() for turns in (plain, empty)]
    assert same[0] == same[1]
    assert with_default_system(empty, "Help.") == (Turn("system", "Help."), *plain)
    assert with_default_system(empty, None) == with_default_system(empty, "") == plain
    own = (Turn("system", "Mine."), *plain)
    assert with_default_system(own, "Help.") == own


def test_a_cut_counts_what_is_kept() -> None:
    row = [Turn("user", "Name it."), answer("A long answer of many words")]
    whole = encode_conversation(row, TOKENIZER, TEMPLATE)
    cut = encode_conversation(row, TOKENIZER, TEMPLATE, len(whole.ids) - 3)
    assert np.array_equal(cut.ids, whole.ids[:-3]) and cut.full_length == len(whole.ids)
    assert cut.turn_bytes == len(TOKENIZER.decode(cut.ids[cut.supervised])) < whole.turn_bytes


def test_the_template_goes_through_a_checkpoint_and_refuses_what_it_does_not_know() -> None:
    own = Template(user="<human>\n")
    assert Template.from_dict(own.to_dict()) == own
    for wrong in ({**own.to_dict(), "version": 99}, {**own.to_dict(), "tool": "x"}, {"user": "x"}):
        with pytest.raises(UsageError):
            Template.from_dict(wrong)
    with pytest.raises(UsageError, match="different"):
        Template(user="[SYSTEM]\n")


@given(turns_lists, st.text(min_size=1, max_size=8), st.integers(24, 90))
@settings(max_examples=200)
def test_a_shortened_prompt_keeps_the_answer_the_turns_forms_and_the_end_of_the_question(
    history: list[Turn], question: str, max_ids: int
) -> None:
    history = [replace(turn, supervised=False) for turn in history]
    row = [*history, Turn("user", question), answer("The answer, at length.")]
    encoded = encode_conversation(row, TOKENIZER, TEMPLATE, max_ids, keep_prompt_end=True)
    whole = encode_conversation(row, TOKENIZER, TEMPLATE)
    assert len(encoded.ids) == min(max_ids, len(whole.ids)) or (encoded.prompt_cut and len(encoded.ids) < max_ids)
    assert encoded.full_length == len(whole.ids)
    assert encoded.supervised.any() and encoded.ids[0] == TOKENIZER.bos_id
    kept = encoded.ids[encoded.supervised]
    assert np.array_equal(kept, whole.ids[whole.supervised][: len(kept)])
    assert encoded.end_cut == (len(kept) < whole.supervised.sum())
    # The first answer stands behind the last id of its question and the assistant's tag.
    tail = len(TOKENIZER.encode("[ASSISTANT]\n")) + 2
    first, first_whole = int(encoded.supervised.argmax()), int(whole.supervised.argmax())
    assert np.array_equal(encoded.ids[first - tail : first], whole.ids[first_whole - tail : first_whole])
    openings = [[TOKENIZER.bos_id, *TOKENIZER.encode(tag)] for tag in ("[SYSTEM]\n", "[USER]\n", "[ASSISTANT]\n")]
    for begin in np.flatnonzero(encoded.ids[:first] == TOKENIZER.bos_id):
        assert any(encoded.ids[begin : begin + len(opening)].tolist() == opening for opening in openings)


def test_the_oldest_turns_go_first_and_the_system_turn_stays() -> None:
    old = [Turn("user", "old " * 20), answer("so " * 20, supervised=False)]
    row = [Turn("system", "Be brief."), *old, Turn("user", "And now?"), answer("Yes.")]
    shorter = [row[0], *row[-2:]]
    encoded = encode_conversation(row, TOKENIZER, TEMPLATE, 60, keep_prompt_end=True)
    assert np.array_equal(encoded.ids, encode_conversation(shorter, TOKENIZER, TEMPLATE).ids)
    assert encoded.prompt_cut and not encoded.end_cut


@pytest.mark.parametrize("between", [Turn("system", "Be brief."), answer("Let me think.", supervised=False)])
@pytest.mark.parametrize("length", [1, 20, 200])
def test_the_question_stays_when_other_turns_follow_it(between: Turn, length: int) -> None:
    """It loses its beginning only, like what stands between it and the answer."""
    row = [Turn("user", "old "), answer("so ", supervised=False), Turn("user", "word " * 120 + "end?"), between, answer("Paris")]
    row[3] = replace(between, text=between.text * length)
    encoded = encode_conversation(row, TOKENIZER, TEMPLATE, 120, keep_prompt_end=True)
    text = TOKENIZER.decode(encoded.ids.tolist())
    assert len(encoded.ids) == 120 and encoded.prompt_cut and not encoded.end_cut
    assert text.index("end?") < text.index(between.text[-4:]) < text.index("Paris") and "old" not in text
    # What fits in an even part stays whole.
    assert (text.count(between.text) == 1) == (length == 1)


@given(texts)
@settings(max_examples=100)
def test_raw_text_stands_between_bos_and_eos_and_is_learned_whole(text: str) -> None:
    turn = Turn("text", text)
    assert with_default_system([turn], "Help.") == (turn,)
    encoded = encode_conversation([turn], TOKENIZER, TEMPLATE)
    body = TOKENIZER.encode(text)
    assert encoded.ids.tolist() == [TOKENIZER.bos_id, *body, TOKENIZER.eos_id]
    assert encoded.supervised.tolist() == [False] + [True] * (len(body) + 1)
    # As an assistant's text: causal under prefix attention, too.
    assert encoded.segment.tolist() == [1] + [0] * (len(body) + 1)
    assert encoded.turn_bytes == len(TOKENIZER.decode(body).encode())


def test_raw_text_beyond_the_context_loses_its_end() -> None:
    turn = Turn("text", "word " * 50)
    whole = encode_conversation([turn], TOKENIZER, TEMPLATE)
    encoded = encode_conversation([turn], TOKENIZER, TEMPLATE, 20, keep_prompt_end=True)
    assert np.array_equal(encoded.ids, whole.ids[:20]) and encoded.end_cut and not encoded.prompt_cut
    assert encoded.full_length == len(whole.ids)
