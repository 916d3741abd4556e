"""From conversations to texts: order, limits, the context, EOS, stop strings, pieces as they form (generation/answers.py)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from config.errors import UsageError
from dataset.text.conversation import Template, Turn, encode_conversation, encode_prompt
from dataset.text.loader import Example
from dataset.text.tokenizer import Tokenizer
from evaluators.language import evaluate_language
from generation.answers import Answer, Options, Responder
from generation.engine import Prompt
from generation.sampling import Sampling

ResponderFactory = Callable[..., Responder]
QUESTIONS = [(Turn("user", text),) for text in ("blue 1", "What is 2 plus 3 and 4 plus 5", "Red", "blue 17 plus 18 gives")]


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> ResponderFactory:
    def build(context: int = 256, rows: int = 4, budget: float = 1.0, **options: Any) -> Responder:
        model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, halt_scale=2.0)
        chosen = Options(**{"max_output_tokens": 6, "act_steps": 2, **options})
        return Responder(model, tiny_tokenizer, Template(), context, chosen, rows, budget)

    return build


def as_values(answer: Answer) -> tuple[object, ...]:
    return answer.text, answer.ids, answer.act_steps, answer.finish, pytest.approx(answer.log_probability, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"halt_threshold": 0.4}, {"sampling": Sampling(temperature=1.5, seed=3)}])
def test_answers_do_not_depend_on_what_is_answered_beside_them(responder: ResponderFactory, options: dict[str, Any]) -> None:
    alone = [responder(**options).answers([question])[0] for question in QUESTIONS]
    assert len({tuple(answer.ids) for answer in alone}) > 1
    for rows in (1, 3, 100):
        together = responder(rows=rows, **options).answers(QUESTIONS)
        assert [as_values(answer) for answer in together] == [as_values(answer) for answer in alone]
    assert responder().answers([]) == []


def test_answers_come_as_they_end(responder: ResponderFactory) -> None:
    speaker = responder(rows=2)
    finished = dict(speaker.finished(QUESTIONS))
    assert [as_values(finished[i]) for i in range(4)] == [as_values(answer) for answer in speaker.answers(QUESTIONS)]


def test_streaming_gives_the_same_answer_piece_by_piece(responder: ResponderFactory) -> None:
    for question in QUESTIONS:
        (answer,) = responder().answers([question])
        pieces = list(responder(top=4).stream(question))
        assert "".join(piece.text for piece in pieces) == answer.text
        assert [piece.answer is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert pieces[-1].answer is not None and as_values(pieces[-1].answer) == as_values(answer)
        assert [piece.token.act_steps for piece in pieces] == answer.act_steps == [2] * len(pieces)
        for piece in pieces:
            logps = [logp for _, logp in piece.token.candidates]
            assert piece.token.candidates[0][0] == piece.token.id and len(logps) == 4
            assert logps == sorted(logps, reverse=True) and logps[0] == pytest.approx(piece.token.logp)


def test_samples_of_one_prompt_differ_and_repeat(responder: ResponderFactory) -> None:
    speaker = responder(sampling=Sampling(temperature=2.0, seed=1))

    def text(sample: int) -> str:
        return "".join(piece.text for piece in speaker.stream(QUESTIONS[0], sample))

    assert len({text(sample) for sample in range(4)}) > 1
    assert [text(sample) for sample in range(4)] == [text(sample) for sample in range(4)]


def test_an_answer_ends_before_a_stop_string(responder: ResponderFactory) -> None:
    whole = responder(max_output_tokens=12).answers(QUESTIONS)[1].text
    middle = whole[len(whole) // 2 : len(whole) // 2 + 3]
    speaker = responder(max_output_tokens=12, stop=(middle, "never said"))
    (answer,) = speaker.answers([QUESTIONS[1]])
    assert answer.text == whole[: whole.index(middle)] and answer.finish == "stop"
    assert "".join(piece.text for piece in speaker.stream(QUESTIONS[1])) == answer.text


def test_an_eos_ends_the_answer_counts_in_its_probability_and_is_not_shown(
    responder: ResponderFactory, tiny_tokenizer: Tokenizer
) -> None:
    speaker = responder(max_output_tokens=12)
    free = speaker.answers(QUESTIONS)
    assert {answer.finish for answer in free} == {"length"}
    # An answer with a token that is not its first.
    row, end = next(
        (row, n) for row, answer in enumerate(free) for n in range(1, len(answer.ids)) if answer.ids[n] not in answer.ids[:n]
    )
    said, eos = free[row].ids[:end], tiny_tokenizer.eos_id
    with torch.no_grad():
        # Where that token was most probable, EOS now is.
        speaker.model.lm_head.weight[eos] = (1 + 1e-9) * speaker.model.lm_head.weight[free[row].ids[end]]
    (answer,) = speaker.answers([QUESTIONS[row]])
    assert answer.ids == said and answer.text == tiny_tokenizer.decode(said) and len(answer.act_steps) == end + 1
    assert answer.finish == "stop"
    pieces = list(speaker.stream(QUESTIONS[row]))
    assert [piece.token.id for piece in pieces] == [*said, eos]
    assert answer.log_probability == pytest.approx(sum(piece.token.logp for piece in pieces), rel=1e-9)


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers(responder: ResponderFactory, tiny_tokenizer: Tokenizer) -> None:
    length = len(encode_prompt(QUESTIONS[1], tiny_tokenizer, Template()).ids)
    exactly = responder(context=length, max_output_tokens=50)
    assert exactly.fits(QUESTIONS[1])
    assert len(exactly.answers([QUESTIONS[1]])[0].act_steps) == 1, "one token stands beyond"
    assert len(responder(context=length + 3, max_output_tokens=50).answers([QUESTIONS[1]])[0].act_steps) == 4
    short = responder(context=length - 1)
    assert not short.fits(QUESTIONS[1])
    with pytest.raises(UsageError, match=rf"has {length} tokens, the context holds {length - 1}"):
        short.answers([QUESTIONS[0], QUESTIONS[1]])
    with pytest.raises(UsageError, match="shorten the message"):
        next(short.stream(QUESTIONS[1]))


def test_a_prompt_is_the_beginning_of_what_is_trained_on(responder: ResponderFactory, tiny_tokenizer: Tokenizer) -> None:
    history = (Turn("system", "Be blue."), Turn("user", "Red 1"), Turn("assistant", "gives"), Turn("user", "plus"))
    prompt = responder().prompt(history)
    encoded = encode_prompt(history, tiny_tokenizer, Template())
    assert prompt.ids.tolist() == encoded.ids.tolist() and prompt.segment.tolist() == encoded.segment.tolist()
    assert set(prompt.segment.tolist()) == {0, 1, 2}


def test_the_configured_context_costs_nothing(responder: ResponderFactory) -> None:
    def allocated(context: int) -> int:
        speaker = responder(context=context)
        return speaker.speaker([speaker.request(QUESTIONS[0], speaker.options)])._engine._cache.buffer.nbytes

    assert allocated(128) == allocated(1_000_000)


def test_keys_and_values_stay_within_the_budget(responder: ResponderFactory) -> None:
    plenty = responder(rows=4)
    requests = [plenty.request(question, plenty.options) for question in QUESTIONS]
    whole = plenty.speaker(requests)._engine._cache.buffer
    tight = responder(rows=4, budget=0.6 * whole.nbytes / 1e9)
    assert tight.speaker(requests)._engine._cache.buffer.shape[0] == 2
    assert [as_values(answer) for answer in tight.answers(QUESTIONS)] == [as_values(a) for a in plenty.answers(QUESTIONS)]
    with pytest.raises(UsageError, match="kv_budget_gb"):
        responder(budget=0.1 * whole.nbytes / 1e9).answers(QUESTIONS)


def test_depth_can_be_chosen_at_use(responder: ResponderFactory) -> None:
    speaker = responder(act_steps=1, halt_threshold=0.4)
    deeper = speaker.at_depth(3, 0.4)
    assert (deeper.options.act_steps, deeper.options.halt_threshold, deeper.model) == (3, 0.4, speaker.model)
    (fixed,) = speaker.at_depth(3).answers(QUESTIONS[:1])
    assert set(fixed.act_steps) == {3}


def test_options_of_one_call_are_those_of_a_responder(responder: ResponderFactory) -> None:
    plain = responder()
    (question,) = QUESTIONS[1]
    for options in ({"temperature": 1.5, "seed": 3}, {"act_steps": 1}, {"halt_threshold": 0.4}, {"max_output_tokens": 2}):
        expected = plain.with_options(**options).answers([QUESTIONS[1]])[0]
        assert as_values(plain.answer(question.text, **options)) == as_values(expected)
        assert as_values(plain.chat([{"role": "user", "content": question.text}], **options)) == as_values(expected)
        assert "".join(piece.text for piece in plain.stream(question.text, **options)) == str(expected)
    text = plain.answer(question.text).text
    assert plain.answer(question.text, stop=text[-1]).text == text[: text.index(text[-1])]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"heat": 1}, "no such option: heat; there are act_steps, "),
        ({"temperature": -1}, "temperature must be"),
        ({"act_steps": 5}, "act_steps is 5: the model has 1 to 4"),
        ({"act_steps": 0}, "act_steps must be at least 1"),
        ({"halt_threshold": 1.0}, "halt_threshold must be between 0 and 1"),
        ({"max_output_tokens": 0}, "max_output_tokens must be at least 1"),
        ({"stop": ["Red", ""]}, "stop must be texts that aren't empty"),
    ],
)
def test_a_wrong_option_is_told(responder: ResponderFactory, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        responder().answer("Red", **options)


@pytest.mark.parametrize(
    ("question", "told"),
    [
        ("  ", "the last message must be the user's, with text"),
        ([], "the last message must be the user's, with text"),
        ([{"role": "assistant", "content": "Red"}], "the last message must be the user's, with text"),
        ([{"role": "user", "text": "Red"}], "the messages can't be read: "),
        (
            [Turn("user", "Red"), Turn("assistant", "blue"), {"role": "user", "content": "Red"}],
            "expected turns or mappings, found both",
        ),
    ],
)
def test_a_question_that_asks_nothing_is_told(responder: ResponderFactory, question: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        responder().answers([question])


def test_a_text_in_place_of_a_list_of_questions_is_told(responder: ResponderFactory) -> None:
    with pytest.raises(UsageError, match="found one text: use `answer`"):
        responder().answers("Red")


@pytest.mark.parametrize("options", [{}, {"act_steps": 1}, {"halt_threshold": 0.4}])
def test_a_score_is_the_evaluator_s_of_the_same_row(
    responder: ResponderFactory, tiny_tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    model = responder(**options)
    history = [{"role": "user", "content": "Red"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "blue"}]
    turns = (Turn("user", "Red"), Turn("assistant", "1", supervised=False), Turn("user", "blue"), Turn("assistant", "blu\u00e9 17"))
    row = encode_conversation(turns, tiny_tokenizer, Template())
    example = Example(row.ids, row.supervised, row.segment, row.turn_bytes)
    depth = {"act_steps": 2, "halt_threshold": None, **options}
    expected = evaluate_language(model.model, [example], eos_id=tiny_tokenizer.eos_id, batch_size=1, **depth).by_depth[-1]
    score = model.score(history, "blu\u00e9 17")
    assert score.log_probability == pytest.approx(-expected.nll) and expected.text_bytes == 8
    assert score.nats_per_token == pytest.approx(expected.metrics()["loss_per_token"])
    assert score.bits_per_byte == pytest.approx(expected.metrics()["bits_per_byte"])
    if not options:
        assert model.score(history, "blu\u00e9 17", act_steps=1) != score


def test_a_score_needs_room_in_the_context_and_text_to_divide_by(responder: ResponderFactory) -> None:
    empty = responder().score("Red", "")
    assert math.isnan(empty.bits_per_byte) and empty.log_probability == -empty.nats_per_token < 0
    with pytest.raises(UsageError, match="the context holds 257"):
        responder().score("Red", "blue " * 400)


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_a_text_that_is_continued_goes_on_as_if_it_had_been_generated(
    responder: ResponderFactory, tiny_tokenizer: Tokenizer, threshold: float | None
) -> None:
    speaker = responder(halt_threshold=threshold)

    def tokens(prompt: Prompt) -> list[tuple[int, int]]:
        running = speaker.speaker([speaker.request(prompt, speaker.options)])
        found = []
        while running.busy:
            found += [(piece.token.id, piece.token.act_steps) for piece in running.tick()]
        return found

    begun = speaker.begun_prompt((Turn("text", "What is 2 plus"),))
    assert begun.ids.tolist() == [tiny_tokenizer.bos_id, *tiny_tokenizer.encode("What is 2 plus")]
    whole = tokens(begun)
    for given in (1, 2, 3):
        ids = [*begun.ids.tolist(), *(token for token, _ in whole[:given])]
        assert tokens(speaker.ids_prompt(ids))[: len(whole) - given] == whole[given:]
    assert threshold is None or len({steps for _, steps in whole}) > 1


def test_a_conversation_loses_its_oldest_exchanges_until_an_answer_has_room(responder: ResponderFactory) -> None:
    speaker = responder(context=128, max_output_tokens=1000)
    system = (Turn("system", "Red"), Turn("system", "blue"))
    exchanges = [(Turn("user", f"{number} plus"), Turn("assistant", "blue"), Turn("assistant", "Red")) for number in range(9)]
    turns = (*system, *(turn for exchange in exchanges for turn in exchange), Turn("user", "What"))
    kept, dropped = speaker.shortened(turns)
    assert dropped and dropped % 3 == 0 and kept == (*system, *turns[2 + dropped :])
    room = 128 - 128 // 4 + 1
    assert speaker.prompt_length(kept) <= room < speaker.prompt_length((*system, *turns[2 + dropped - 3 :]))
    assert speaker.shortened(kept) == (kept, 0)
    alone = (Turn("user", "plus " * 200),)
    assert speaker.shortened((*exchanges[0], *alone)) == (alone, 3), "the last exchange stays, however long it is"
