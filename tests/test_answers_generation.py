"""From a conversation to text: order, limits, the context, EOS, single tokens for showing (generation/answers.py)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import generation.engine
from config.errors import UsageError
from dataset.text.conversation import Template, Turn, encode_prompt
from dataset.text.tokenizer import Tokenizer
from generation.answers import Responder
from models.cache import KVCache

ResponderFactory = Callable[..., Responder]
QUESTIONS = [(Turn("user", text),) for text in ("blue 1", "What is 2 plus 3 and 4 plus 5", "Red", "blue 17 plus 18 gives")]


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> ResponderFactory:
    def build(context: int = 256, **options: Any) -> Responder:
        model = tiny_model(vocab_size=tiny_tokenizer.vocab_size, halt_scale=2.0)
        return Responder(model, tiny_tokenizer, Template(), context=context, **{"act_steps": 2, **options})

    return build


@pytest.mark.parametrize("threshold", [None, 0.4])
def test_answers_do_not_depend_on_batches(responder: ResponderFactory, threshold: float | None) -> None:
    speaker = responder(halt_threshold=threshold)
    alone = [speaker.answers([question], max_output_tokens=6, batch_size=1)[0] for question in QUESTIONS]
    assert len({tuple(answer.ids) for answer in alone}) > 1
    for batch_size in (2, 3, 100):
        together = speaker.answers(QUESTIONS, max_output_tokens=6, batch_size=batch_size)
        assert [answer.ids for answer in together] == [answer.ids for answer in alone]
        assert [answer.text for answer in together] == [answer.text for answer in alone]
        for one, other in zip(together, alone, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-9) and one.act_steps == other.act_steps
    assert speaker.answers([], max_output_tokens=6, batch_size=2) == []


def test_streaming_shows_the_same_answer_and_its_rivals(responder: ResponderFactory, tiny_tokenizer: Tokenizer) -> None:
    speaker = responder()
    for question in QUESTIONS:
        (answer,) = speaker.answers([question], max_output_tokens=5, batch_size=1)
        tokens = list(speaker.stream(question, max_output_tokens=5, top=4))
        assert [t.id for t in tokens if t.id != tiny_tokenizer.eos_id] == answer.ids
        assert speaker.text([t.id for t in tokens]) == answer.text
        assert [t.act_steps for t in tokens] == answer.act_steps == [2] * len(tokens)
        assert sum(math.log(t.candidates[0].probability) for t in tokens) == pytest.approx(answer.log_probability, rel=1e-5)
        for token in tokens:
            probabilities = [c.probability for c in token.candidates]
            assert token.candidates[0].piece == token.piece == tiny_tokenizer.piece(token.id)
            assert probabilities == sorted(probabilities, reverse=True) and 0 < sum(probabilities) <= 1


def test_an_eos_ends_the_answer_counts_in_its_probability_and_is_not_shown(
    responder: ResponderFactory, tiny_tokenizer: Tokenizer
) -> None:
    speaker = responder()
    free = speaker.answers(QUESTIONS, max_output_tokens=12, batch_size=4)
    # An answer with a token that is not its first.
    row, end = next(
        (row, n) for row, answer in enumerate(free) for n in range(1, len(answer.ids)) if answer.ids[n] not in answer.ids[:n]
    )
    said, eos = free[row].ids[:end], tiny_tokenizer.eos_id
    with torch.no_grad():
        # Where that token was most probable, EOS now is.
        speaker.model.lm_head.weight[eos] = (1 + 1e-9) * speaker.model.lm_head.weight[free[row].ids[end]]
    (answer,) = speaker.answers([QUESTIONS[row]], max_output_tokens=12, batch_size=1)
    assert answer.ids == said and answer.text == tiny_tokenizer.decode(said) and len(answer.act_steps) == end + 1
    tokens = list(speaker.stream(QUESTIONS[row], max_output_tokens=12, top=1))
    assert [t.id for t in tokens] == [*said, eos]
    assert answer.log_probability == pytest.approx(sum(math.log(t.candidates[0].probability) for t in tokens), rel=1e-5)


def test_a_prompt_longer_than_the_context_is_told_with_both_numbers(responder: ResponderFactory, tiny_tokenizer: Tokenizer) -> None:
    length = len(encode_prompt(QUESTIONS[1], tiny_tokenizer, Template()).ids)
    exactly = responder(context=length)
    assert exactly.fits(QUESTIONS[1])
    assert len(exactly.answers([QUESTIONS[1]], max_output_tokens=50, batch_size=1)[0].act_steps) == 1, "one token stands beyond"
    assert len(responder(context=length + 3).answers([QUESTIONS[1]], max_output_tokens=50, batch_size=1)[0].act_steps) == 4
    short = responder(context=length - 1)
    assert not short.fits(QUESTIONS[1])
    with pytest.raises(UsageError, match=rf"has {length} tokens, the context holds {length - 1}"):
        short.answers([QUESTIONS[0], QUESTIONS[1]], max_output_tokens=1, batch_size=1)
    with pytest.raises(UsageError, match="shorten the message"):
        next(short.stream(QUESTIONS[1], max_output_tokens=1, top=1))


def test_a_prompt_is_the_beginning_of_what_is_trained_on(responder: ResponderFactory, tiny_tokenizer: Tokenizer) -> None:
    history = (Turn("system", "Be blue."), Turn("user", "Red 1"), Turn("assistant", "gives"), Turn("user", "plus"))
    prompt = responder().prompt(history)
    encoded = encode_prompt(history, tiny_tokenizer, Template())
    assert prompt.ids.tolist() == encoded.ids.tolist() and prompt.segment.tolist() == encoded.segment.tolist()
    assert set(prompt.segment.tolist()) == {0, 1, 2}


def test_the_configured_context_costs_nothing(responder: ResponderFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []
    real = KVCache.reserve

    def watch(self: KVCache, positions: int) -> None:
        real(self, positions)
        capacities.append(self.capacity)

    monkeypatch.setattr(generation.engine.KVCache, "reserve", watch)
    used = []
    for context in (128, 1_000_000):
        capacities.clear()
        responder(context=context).answers(QUESTIONS[:1], max_output_tokens=4, batch_size=1)
        used.append(max(capacities))
    assert used[0] == used[1] < 128


def test_depth_can_be_chosen_at_use(responder: ResponderFactory) -> None:
    speaker = responder(act_steps=1, halt_threshold=0.4)
    deeper = speaker.at_depth(3)
    assert (deeper.act_steps, deeper.halt_threshold, deeper.model) == (3, 0.4, speaker.model)
    fixed = responder(act_steps=3).answers(QUESTIONS[:1], max_output_tokens=4, batch_size=1)[0]
    assert set(fixed.act_steps) == {3}


def test_progress_sees_every_batch_once(responder: ResponderFactory) -> None:
    seen: list[Sequence[int]] = []

    def progress(batches: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        seen.extend(batches)
        return batches

    responder().answers(QUESTIONS, max_output_tokens=1, batch_size=3, progress=progress)
    assert sorted(index for batch in seen for index in batch) == [0, 1, 2, 3] and [len(batch) for batch in seen] == [3, 1]
