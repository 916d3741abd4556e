"""The shapes of OpenAI's chat completions: what a request may hold, and how answers and errors look.

Knows nothing of HTTP, threads or queues; scripts/serve.py does. docs/serving.md lists the fields.
"""

import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from config.errors import UsageError
from dataset.text.conversation import Conversation, Role, Turn, question
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options
from generation.engine import Token
from generation.service import Part


class ApiError(Exception):
    """A request that is refused, with its HTTP status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str, code: str = "invalid_value") -> ApiError:
    """The refusal of a field."""
    return ApiError(400, message, code=code, param=param)


# Requests.

_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that change no answer of a model without tools."""
_NEUTRAL: dict[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "store": False,
    "service_tier": "auto",
}
"""Fields that are not supported, and the value of each that asks for nothing."""


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        """Clients send null for what they don't set, and hand back whole messages of ours, full of nulls."""
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _text_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _several(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class ChatMessage(_Body):
    """A turn so far."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_text_parts)]

    def turn(self) -> Turn:
        """The turn as the model knows it."""
        role: Role = "system" if self.role == "developer" else self.role
        return Turn(role, "".join(part.text for part in self.content))


class StreamOptions(_Body):
    """What a stream holds besides the answer."""

    include_usage: bool = False


class ChatRequest(_Body):
    """The fields that are supported. What is left out is the server's choice."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=2**64)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_several), Field(max_length=16)] | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    act_steps: int | None = Field(None, ge=1)
    """ACT steps a token takes: exactly, without `halt_threshold`; at most, with it."""
    halt_threshold: float | None = Field(None, gt=0, lt=1)
    """A token stops when its halting probability passes this."""

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    def conversation(self, default_system: str | None) -> Conversation:
        """The messages, opened by the default system turn if they have none; an empty one is a wish for none."""
        try:
            return question([message.turn() for message in self.messages], default_system)
        except UsageError as error:
            raise invalid(str(error), "messages") from None

    def options(self, default: Options) -> Options:
        """How to answer: what is asked for, else `default`, whose act_steps are the most there are.

        Without a seed every call draws differently, as callers of this API expect; the answer names the seed.
        """
        if self.act_steps is not None and self.act_steps > default.act_steps:
            raise invalid(f"act_steps is {self.act_steps}: this server offers 1 to {default.act_steps}", "act_steps")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        seed = secrets.randbits(32) if self.seed is None else self.seed
        chooses_depth = self.act_steps is not None or self.halt_threshold is not None
        return default.changed(
            max_output_tokens=self.max_completion_tokens or self.max_tokens or default.max_output_tokens,
            act_steps=self.act_steps or default.act_steps,
            halt_threshold=self.halt_threshold if chooses_depth else default.halt_threshold,
            stop=default.stop if self.stop is None else self.stop,
            top=self.top_logprobs,
            seed=seed,
            **given,
        )


def parse_request(body: bytes) -> ChatRequest:
    """The request in a body. Raises ApiError (400) that names the field that is wrong or not supported."""
    try:
        values = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    for name, neutral in _NEUTRAL.items():
        if values.get(name) == neutral:
            del values[name]
    try:
        return ChatRequest.model_validate({name: value for name, value in values.items() if name not in _IGNORED})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
        if problem["type"] == "extra_forbidden":
            raise invalid(f"{name} is not supported: leave it out", name, "unsupported_parameter") from None
        raise invalid(f"{name}: {problem['msg']}", name) from None


# Answers.


@dataclass
class Completion:
    """The answers to one request, as they grow."""

    id: str
    asked: ChatRequest
    tokenizer: Tokenizer
    prompt_tokens: int
    seed: int
    created: int = field(default_factory=lambda: int(time.time()))
    new_tokens: int = 0
    """All generated tokens, of all answers, EOS included."""

    def whole(self, parts: Iterable[Part]) -> dict[str, Any]:
        """The response, from all parts of all answers."""
        of_sample: list[list[Part]] = [[] for _ in range(self.asked.n)]
        for part in parts:
            self.new_tokens += 1
            of_sample[part.sample].append(part)
        choices = []
        for sample, own in enumerate(of_sample):
            message = {"role": "assistant", "content": "".join(part.piece.text for part in own), "refusal": None}
            choices.append({"index": sample, "message": message, **self._about(own)})
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that open each answer of a stream."""
        delta = {"role": "assistant", "content": ""}
        about = {"logprobs": None, "finish_reason": None}
        return [self._chunk([{"index": sample, "delta": delta, **about}]) for sample in range(self.asked.n)]

    def chunk(self, part: Part) -> dict[str, Any]:
        """The chunk of one token, whose text is what it made certain: often none, or that of several tokens."""
        self.new_tokens += 1
        delta = {"content": part.piece.text} if part.piece.text or part.piece.answer is None else {}
        return self._chunk([{"index": part.sample, "delta": delta, **self._about([part])}])

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after the last token."""
        return [{**self._chunk([]), "usage": self._usage()}] if self.asked.wants_usage else []

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.wants_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": choices, **usage}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "seed": self.seed}

    def _about(self, parts: Sequence[Part]) -> dict[str, Any]:
        """What a choice says of these tokens besides their text. EOS counts in act_steps and has no log-probability shown."""
        answer = parts[-1].piece.answer if parts else None
        tokens = [part.piece.token for part in parts]
        shown = [token_logprobs(self.tokenizer, token) for token in tokens if token.finish != "stop"]
        return {
            "logprobs": {"content": shown, "refusal": None} if self.asked.logprobs else None,
            "finish_reason": answer.finish if answer is not None else None,
            "act_steps": [token.act_steps for token in tokens],
        }

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens, "total_tokens": total}


def token_logprobs(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token and its rivals with their log p, in nats, before temperature and cuts."""

    def shown(token_id: int, logp: float) -> dict[str, Any]:
        # SentencePiece writes a blank as U+2581.
        content = tokenizer.raw_bytes(token_id) or tokenizer.piece(token_id).replace("\u2581", " ").encode()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = "".join(f"\\x{byte:02x}" for byte in content)
        return {"token": text, "logprob": logp, "bytes": list(content)}

    return {**shown(token.id, token.logp), "top_logprobs": [shown(*candidate) for candidate in token.candidates]}
