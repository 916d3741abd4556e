"""The shapes of OpenAI's API: what a request may hold, and that nothing it asks for is dropped in silence."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.text.conversation import Turn
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options
from generation.engine import Token
from generation.sampling import Sampling
from scripts.completions import ApiError, ChatRequest, parse_request, token_logprobs

DEFAULT = Options(8, 4, halt_threshold=0.75, sampling=Sampling(temperature=0.5, top_k=7), stop=("#",))

BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def parsed(**fields: Any) -> ChatRequest:
    request = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return parse_request(json.dumps(request).encode(), ChatRequest)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        request = parsed(**fields)
        request.conversation(None)
        request.options(DEFAULT)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"act_steps": 0}, "act_steps"),
        ({"act_steps": 5}, "act_steps"),
        ({"halt_threshold": 1}, "halt_threshold"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "ho"}]}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": BEGUN, "continue_final_message": False}, "continue_final_message"),
        ({"messages": BEGUN, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"truncation": "yes"}, "truncation"),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_that_holds_it(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param and error.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"3": 1}},
        {"reasoning_effort": "high"},
        {"no_such_field": 1},
    ],
)
def test_what_is_not_supported_is_refused_and_not_dropped(fields: dict[str, Any]) -> None:
    error = refusal(**fields)
    assert error.code == "unsupported_parameter" and error.param == next(iter(fields)) and "not supported" in str(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tool_choice": None},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"functions": []},
        {"function_call": "none"},
        {"function_call": "auto"},
        {"parallel_tool_calls": True},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"frequency_penalty": 0.0},
        {"presence_penalty": 0},
        {"logit_bias": {}},
        {"best_of": 1},
        {"suffix": ""},
        {"store": False},
        {"service_tier": "auto"},
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"safety_identifier": "me"},
        {"prompt_cache_key": "a"},
        {"max_tokens": None},
        {"max_tokens": -1},
        {"max_completion_tokens": -1},
        {"seed": -1},
        {"stop": None},
        {"add_generation_prompt": True, "continue_final_message": False},
    ],
)
def test_a_field_that_asks_for_nothing_is_as_if_left_out(fields: dict[str, Any]) -> None:
    plain = parsed()
    assert parsed(**fields).model_dump(exclude=set(fields)) == plain.model_dump(exclude=set(fields))
    options = [request.options(DEFAULT).changed(seed=0) for request in (parsed(**fields), plain)]
    assert options[0] == options[1] and parsed(**fields).conversation(None) == plain.conversation(None)


@pytest.mark.parametrize("cut", [0, -1])
def test_top_k_of_0_or_minus_1_is_no_cut(cut: int) -> None:
    assert parsed(top_k=cut).options(DEFAULT).sampling.top_k is None


def test_an_empty_stop_string_is_no_stop_string() -> None:
    assert parsed(stop="").options(DEFAULT).stop == ()


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "Bo"},
        {"tool_calls": []},
        {"tool_calls": None},
        {"annotations": []},
        {"refusal": None},
        {"refusal": ""},
        {"reasoning_content": "hm"},
        {"audio": None, "function_call": None},
    ],
)
def test_a_message_may_hold_what_clients_hand_back(fields: dict[str, Any]) -> None:
    messages = [BEGUN[0], {**BEGUN[1], **fields}, {**BEGUN[0], "name": "Bo"}]
    assert parsed(messages=messages).conversation(None) == (Turn("user", "hi"), Turn("assistant", "ho"), Turn("user", "hi"))


@pytest.mark.parametrize("fields", [{}, {"continue_final_message": True, "add_generation_prompt": False}])
def test_a_last_message_of_the_assistant_is_the_beginning_of_the_answer(fields: dict[str, Any]) -> None:
    asked = parsed(messages=BEGUN, **fields)
    assert asked.continues and not parsed().continues
    assert asked.conversation("Be blue.") == (Turn("system", "Be blue."), Turn("user", "hi"), Turn("assistant", "ho"))


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'"a"', b"[" * 100_000, b'{"model": "\xff"}'])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="JSON"):
        parse_request(body, ChatRequest)


@pytest.mark.parametrize("text", [rb'"\ud800"', rb'"a\udfff"'])
def test_text_that_is_no_unicode_is_refused(text: bytes) -> None:
    with pytest.raises(ApiError):
        parse_request(b'{"model": "m", "messages": [{"role": "user", "content": ' + text + b"}]}", ChatRequest)


@given(
    st.binary(max_size=40)
    | st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_body_is_parsed_or_refused(body: bytes) -> None:
    with pytest.raises(ApiError):
        parse_request(body, ChatRequest)


def test_messages_become_turns() -> None:
    text_parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    user = {"role": "user", "content": text_parts}
    assert parsed(messages=[user]).conversation("Be blue.") == (Turn("system", "Be blue."), Turn("user", "ab"))
    for role in ("system", "developer"):
        own = [{"role": role, "content": "Be red."}, user]
        assert parsed(messages=own).conversation("Be blue.") == (Turn("system", "Be red."), Turn("user", "ab"))
    assert parsed(messages=[{"role": "system", "content": ""}, user]).conversation("Be blue.") == (Turn("user", "ab"),)


def test_what_is_left_out_is_the_servers_choice() -> None:
    options = parsed().options(DEFAULT)
    assert options.sampling.seed != parsed().options(DEFAULT).sampling.seed, "without a seed every call draws differently"
    assert options.sampling.temperature == 0.5 and options.sampling.top_k == 7
    assert (options.max_output_tokens, options.act_steps, options.halt_threshold, options.stop, options.top) == (
        8,
        4,
        0.75,
        ("#",),
        0,
    )


def test_what_is_asked_for_is_done() -> None:
    asked = parsed(
        temperature=1,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        repetition_penalty=1.5,
        seed=5,
        max_tokens=3,
        stop="x",
        logprobs=True,
        top_logprobs=2,
    )
    sampling = Sampling(temperature=1, top_p=0.5, top_k=3, min_p=0.1, repetition_penalty=1.5, seed=5)
    assert asked.options(DEFAULT) == Options(3, 4, 0.75, sampling, ("x",), top=2)
    assert parsed(max_completion_tokens=6, stop=["a", "b"]).options(DEFAULT).max_output_tokens == 6
    assert parsed(stop=[]).options(DEFAULT).stop == ()


def test_depth_is_fixed_by_steps_and_bounded_by_them_with_a_threshold() -> None:
    depths = ({"act_steps": 2}, {"halt_threshold": 0.5}, {"act_steps": 2, "halt_threshold": 0.5}, {})
    options = [parsed(**depth).options(DEFAULT) for depth in depths]
    assert [(o.act_steps, o.halt_threshold) for o in options] == [(2, None), (4, 0.5), (2, 0.5), (4, 0.75)]


def test_tokens_are_shown_as_text_and_bytes(tiny_tokenizer: Tokenizer) -> None:
    (blank, *_), (byte, *_) = tiny_tokenizer.encode(" What"), tiny_tokenizer.encode("é")[-1:]
    shown = token_logprobs(tiny_tokenizer, Token(1, byte, -0.5, 2, None, ((blank, -0.1),)))
    assert shown["token"] == "\\xa9" and shown["bytes"] == [0xA9] and shown["logprob"] == -0.5
    (rival,) = shown["top_logprobs"]
    assert rival["token"].startswith(" ") and bytes(rival["bytes"]).decode() == rival["token"]
