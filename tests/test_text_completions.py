"""Text completions as clients send them: prompts as texts or ids, echoed with the log-probabilities that the model gives them."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from dataset.text.conversation import Template, Turn, encode_conversation
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder
from models.losses import log_probs
from scripts import serve
from scripts.completions import ApiError, CompletionRequest, parse_request
from tests.running_server import MODEL, Running

TEXTS = ["Red 3 plus 4 gives", " blue é\n", "What"]
CONVERSATION = (Turn("system", "Red"), Turn("user", "What is 2"), Turn("assistant", "blue"), Turn("user", "What"))
DEFAULT = Options(8, 4)


def parsed(**fields: Any) -> CompletionRequest:
    return parse_request(json.dumps({"model": "m", "prompt": "hi", **fields}).encode(), CompletionRequest)


@pytest.fixture(scope="module", params=["causal", "prefix"])
def responder(request: pytest.FixtureRequest, tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> Responder:
    model = tiny_model(f"arch.attention={request.param}", vocab_size=tiny_tokenizer.vocab_size, halt_scale=2.0)
    options = Options(max_output_tokens=6, act_steps=4)
    return Responder(model, tiny_tokenizer, Template(), context=64, options=options, rows=4, kv_budget_gb=1.0)


@pytest.fixture(scope="module")
def server(responder: Responder) -> Iterator[Running]:
    running = Running(responder, serve.Access(MODEL))
    yield running
    running.stop()


def complete(server: Running, **fields: Any) -> Any:
    return server.client().completions.create(model=MODEL, **fields)


def expected_logp(responder: Responder, ids: list[int], segment: Any, act_steps: int = 4) -> np.ndarray:
    """log p [T-1, V] of what follows each id but the last, by the whole row at once."""
    ids_1T, segments_1T = torch.tensor([ids]), torch.tensor(np.array([segment]), dtype=torch.int64)
    with torch.no_grad():
        *_, refined = responder.model.refine_rows(ids_1T[:, :-1], segments_1T[:, :-1], act_steps=act_steps)
        return np.array(log_probs(responder.model.logits(refined.output_BTD[0]), responder.model.config.loss))


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("as_ids", [False, True])
def test_echoed_prompts_have_the_log_probabilities_of_raw_text(
    server: Running, responder: Responder, max_tokens: int, as_ids: bool
) -> None:
    tokenizer = responder.tokenizer
    prompts: list[Any] = [tokenizer.encode(text) if as_ids else text for text in TEXTS]
    got = complete(server, prompt=prompts, echo=True, logprobs=1, max_tokens=max_tokens, temperature=0, seed=1234)
    assert [choice.index for choice in got.choices] == [0, 1, 2]
    for text, choice in zip(TEXTS, got.choices, strict=True):
        raw = encode_conversation([Turn("text", text)], tokenizer, Template())
        ids = raw.ids[:-1].tolist()
        logp = expected_logp(responder, ids, raw.segment[:-1])
        shown = choice.logprobs
        count = len(ids) - 1
        assert (
            len(shown.tokens)
            == len(shown.token_logprobs)
            == len(shown.top_logprobs)
            == len(shown.text_offset)
            == count + max_tokens
        )
        assert shown.token_logprobs[:count] == pytest.approx(logp[np.arange(count), ids[1:]], abs=1e-5)
        assert [max(top.values()) for top in shown.top_logprobs[:count]] == pytest.approx(logp.max(1), abs=1e-5)
        is_best = [own == max(top.values()) for own, top in zip(shown.token_logprobs, shown.top_logprobs, strict=True)]
        assert is_best[:count] == (logp.argmax(1) == ids[1:]).tolist() and all(is_best[count:])
        assert choice.text.startswith(tokenizer.decode(ids)) and shown.text_offset[0] == 0
        assert shown.text_offset == sorted(shown.text_offset) and shown.text_offset[-1] <= len(choice.text)
        if max_tokens == 0:
            assert choice.text == text and choice.finish_reason == "length"
    assert got.usage.completion_tokens == max_tokens * len(TEXTS)


def test_ids_with_tags_are_the_conversation_that_they_spell(server: Running, responder: Responder) -> None:
    encoded = responder.prompt(CONVERSATION)
    made = responder.ids_prompt(encoded.ids.tolist())
    assert made.ids.tolist() == encoded.ids.tolist() and made.segment.tolist() == encoded.segment.tolist()
    (choice,) = complete(server, prompt=encoded.ids.tolist(), echo=True, logprobs=0, max_tokens=0).choices
    logp = expected_logp(responder, encoded.ids.tolist(), encoded.segment)
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.tokens[0] == responder.tokenizer.piece(responder.tokenizer.bos_id)
    assert choice.logprobs.token_logprobs[1:] == pytest.approx(logp[np.arange(len(encoded.ids) - 1), encoded.ids[1:]], abs=1e-5)
    (answered,) = complete(server, prompt=encoded.ids.tolist(), max_tokens=5).choices
    (expected,) = responder.answers([CONVERSATION], max_output_tokens=5)
    assert answered.text == expected.text and answered.act_steps == expected.act_steps


def test_a_text_goes_on_as_one_text(server: Running, responder: Responder) -> None:
    tokenizer = responder.tokenizer
    for text in TEXTS:
        (alone,) = complete(server, prompt=text, logprobs=0, extra_body={"halt_threshold": 0.5}).choices
        (echoed,) = complete(server, prompt=text, echo=True, extra_body={"halt_threshold": 0.5}).choices
        assert echoed.text == text + alone.text and echoed.logprobs is None
        ids = tokenizer.encode(text)
        speaker = responder.speaker([responder.request(responder.ids_prompt(ids), responder.options.changed(halt_threshold=0.5))])
        new: list[int] = []
        while speaker.busy:
            new += [piece.token.id for piece in speaker.tick()]
        assert tokenizer.decode([*ids, *new]) == text + alone.text


def test_streams_and_samples_are_the_same_choices_in_pieces(server: Running) -> None:
    fields = {"prompt": TEXTS[:2], "n": 2, "echo": True, "logprobs": 2, "max_tokens": 3, "temperature": 1.5, "seed": 7}
    whole = complete(server, **fields)
    assert len({choice.text for choice in whole.choices}) == 4 and [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    texts, logprobs = [""] * 4, [[] for _ in range(4)]
    for chunk in complete(server, **fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            logprobs[choice.index] += choice.logprobs.token_logprobs
    assert texts == [choice.text for choice in whole.choices]
    assert logprobs == [choice.logprobs.token_logprobs for choice in whole.choices]


def test_an_eos_is_one_of_the_tokens_that_are_shown(responder: Responder, monkeypatch: pytest.MonkeyPatch, server: Running) -> None:
    # Clients that score a prompt cut one token off, whatever it is.
    monkeypatch.setattr(server.service._speaker._engine, "eos_id", int(server_first_id(server)))
    (choice,) = complete(server, prompt=TEXTS[0], echo=True, logprobs=1, max_tokens=1).choices
    assert choice.finish_reason == "stop" and choice.text == TEXTS[0]
    assert len(choice.logprobs.tokens) == len(responder.tokenizer.encode(TEXTS[0])) + 1


def server_first_id(server: Running) -> int:
    """The id that comes after the first of the texts."""
    responder = server.service.responder
    request = responder.request(responder.ids_prompt(responder.tokenizer.encode(TEXTS[0])), responder.options)
    speaker = responder.speaker([request])
    while not (pieces := speaker.tick()):
        pass
    return pieces[0].token.id


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [["a"]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": ["a", 3]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "n": 2}, "max_tokens"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"messages": []}, "messages"),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_that_holds_it(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parsed(**fields).options(DEFAULT)
    assert caught.value.status == 400 and caught.value.param == param


def test_fields_that_ask_for_nothing_are_taken() -> None:
    plain = parsed().model_dump()
    assert parsed(suffix="", best_of=1, user="me", seed=-1, max_tokens=-1, logit_bias=None).model_dump() == plain


def test_prompts_that_no_model_can_take_are_refused(server: Running) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError, match="prompt 1 holds the token id 99999"):
        client.completions.create(model=MODEL, prompt=[[5], [99999]])
    with pytest.raises(openai.BadRequestError, match="the context holds 64") as too_long:
        client.completions.create(model=MODEL, prompt=[[5], [5] * 70])
    assert too_long.value.code == "context_length_exceeded" and too_long.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="13 answers requested"):
        client.completions.create(model=MODEL, prompt=["a"] * 13)
    assert httpx.get(server.url + "/health").json()["pending"] == 0
