"""Clients that people have already, on our server: each gets the answer, the same in a stream, and errors as its own.

OpenAI's is in tests/test_serve.py, that of lm-evaluation-harness in tests/test_lm_eval.py. Two that are large are no requirement of
development: `pip install litellm langchain-openai` makes their tests run, too.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder
from scripts import serve
from tests.running_server import KEY, MODEL, QUESTION, WAIT, Running

SYSTEM = {"role": "system", "content": "Be blue."}
HISTORY = [SYSTEM, *QUESTION, {"role": "assistant", "content": "Red"}, {"role": "user", "content": "And now?"}]
TOO_LONG = [{"role": "user", "content": "plus " * 200}]


class Client(NamedTuple):
    """What every client can do, and how it says that a prompt is too long."""

    ask: Callable[[list[dict[str, str]]], tuple[str, int, int]]
    """Text, prompt tokens and answer tokens."""
    stream: Callable[[list[dict[str, str]]], Iterator[str]]
    error: type[Exception]


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> Responder:
    model, options = tiny_model(vocab_size=tiny_tokenizer.vocab_size), Options(max_output_tokens=6, act_steps=2)
    return Responder(model, tiny_tokenizer, Template(), context=128, options=options, rows=4, kv_budget_gb=1.0)


@pytest.fixture(scope="module")
def server(responder: Responder) -> Iterator[Running]:
    running = Running(responder, serve.Access(MODEL, KEY))
    yield running
    running.stop()


def huggingface_hub(url: str) -> Client:
    from huggingface_hub import InferenceClient
    from huggingface_hub.errors import HfHubHTTPError

    client = InferenceClient(base_url=f"{url}/v1", api_key=KEY, timeout=WAIT)

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        got = client.chat_completion(messages, model=MODEL)
        return got.choices[0].message.content, got.usage.prompt_tokens, got.usage.completion_tokens

    def stream(messages: list[dict[str, str]]) -> Iterator[str]:
        for chunk in client.chat_completion(messages, model=MODEL, stream=True):
            yield chunk.choices[0].delta.content or ""

    return Client(ask, stream, HfHubHTTPError)


def litellm(url: str) -> Client:
    import litellm

    options: dict[str, Any] = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": KEY, "timeout": WAIT}

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        got = litellm.completion(messages=messages, **options)
        return got.choices[0].message.content, got.usage.prompt_tokens, got.usage.completion_tokens

    def stream(messages: list[dict[str, str]]) -> Iterator[str]:
        for chunk in litellm.completion(messages=messages, stream=True, **options):
            yield chunk.choices[0].delta.content or ""

    return Client(ask, stream, litellm.ContextWindowExceededError)


def langchain_openai(url: str) -> Client:
    import openai
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=WAIT)

    def ask(messages: list[dict[str, str]]) -> tuple[str, int, int]:
        got = model.invoke(messages)
        return got.text, got.usage_metadata["input_tokens"], got.usage_metadata["output_tokens"]

    def stream(messages: list[dict[str, str]]) -> Iterator[str]:
        yield from (chunk.text for chunk in model.stream(messages))

    return Client(ask, stream, openai.BadRequestError)


@pytest.mark.parametrize("make", [huggingface_hub, litellm, langchain_openai], ids=lambda make: make.__name__)
def test_a_client_gets_the_responders_answer(make: Callable[[str], Client], server: Running, responder: Responder) -> None:
    pytest.importorskip(make.__name__)
    client = make(server.url)
    for messages in (QUESTION, HISTORY):
        expected = responder.chat(messages)
        prompt = responder.prompt(responder.conversation(messages))
        assert client.ask(messages) == (expected.text, len(prompt.ids), len(expected.act_steps))
        pieces = list(client.stream(messages))
        assert "".join(pieces) == expected.text and len(pieces) > 1
    with pytest.raises(client.error, match=r"has \d+ tokens, the context holds 128"):
        client.ask(TOO_LONG)
