"""The requests, responses and errors of OpenAI's chat completions and text completions.

Knows nothing of HTTP, threads or queues; scripts/serve.py does. docs/serving.md lists the fields.
"""

import dataclasses
import secrets
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import from_json

from config.errors import UsageError
from dataset.text.conversation import Conversation, Role, Turn, question
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder
from generation.engine import Prompt, Token
from generation.service import Event, PromptScores
from generation.text_stream import TextStream


class ApiError(Exception):
    """The refusal of a request, with its HTTP status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The response body that OpenAI's clients expect."""
        kind = "server_error" if self.status >= 500 else "rate_limit_error" if self.status == 429 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, param: str, code: str = "invalid_value") -> ApiError:
    """The error for a wrong field."""
    return ApiError(400, message, code=code, param=param)


# Requests.

Encode = Callable[[], Prompt]
_IGNORED = {"user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
"""Fields that don't affect a model without tools."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto",),
    "best_of": (1,),
    "suffix": ("",),
}
"""Unsupported fields, and for each the values that request nothing."""
_NEUTRAL_OF_MESSAGE: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "annotations": ([],), "refusal": ("",)}
_IGNORED_OF_MESSAGE = {"name", "reasoning_content"}
"""Speakers' names, which training doesn't use, and reasoning, which clients don't expect to be
read.
"""


def _without(values: dict[str, Any], neutral: dict[str, tuple[Any, ...]], ignored: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ignored and value not in neutral.get(name, ())}


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_null(cls, values: Any) -> Any:
        """Clients send null for unset fields, and send back our messages, with nulls."""
        return {key: value for key, value in values.items() if value is not None} if isinstance(values, dict) else values


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


def _text_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _several(stop: Any) -> Any:
    return ([stop] if stop else []) if isinstance(stop, str) else stop


class ChatMessage(_Body):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_text_parts)]

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, values: Any) -> Any:
        return _without(values, _NEUTRAL_OF_MESSAGE, _IGNORED_OF_MESSAGE) if isinstance(values, dict) else values

    def turn(self) -> Turn:
        """The model's turn for this message."""
        role: Role = "system" if self.role == "developer" else self.role
        return Turn(role, "".join(part.text for part in self.content))


class StreamOptions(_Body):
    """Options of a stream."""

    include_usage: bool = False


def _unless(*nothing: int) -> BeforeValidator:
    """Treat these numbers, which clients send for an unset field, as null."""
    return BeforeValidator(lambda value: None if value in nothing and not isinstance(value, bool) else value)


class SampledRequest(_Body):
    """The fields that both kinds of requests share. Missing ones have the server's defaults."""

    param: ClassVar[str]
    """The field with the prompts."""
    model: str
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    """0 and -1: no limit."""
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)
    seed: Annotated[int | None, Field(ge=0, lt=2**64), _unless(-1)] = None
    max_tokens: Annotated[int | None, Field(ge=0), _unless(-1)] = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_several), Field(max_length=16)] | None = None
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    act_steps: int | None = Field(None, ge=1)
    """ACT steps per token; with `halt_threshold`, the maximum."""
    halt_threshold: float | None = Field(None, gt=0, lt=1)
    """A token halts once its halting probability exceeds this."""

    @property
    def samples(self) -> int:
        """Answers per prompt; 0: only echo the prompts."""
        return self.n

    @property
    def is_scored(self) -> bool:
        """Whether to compute the prompts' log-probabilities."""
        return False

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @abstractmethod
    def prompts(self, responder: Responder) -> tuple[list[Encode], dict[str, Any]]:
        """A function for each prompt that encodes it, and additional fields of the response."""

    def options(self, default: Options) -> Options:
        """The request's options over `default`, whose act_steps is the maximum.

        Without a seed every call draws differently, as callers of this API expect; the response has
        the seed.
        """
        if self.act_steps is not None and self.act_steps > default.act_steps:
            raise invalid(f"act_steps is {self.act_steps}: this server offers 1 to {default.act_steps}", "act_steps")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs stream: true", "stream_options")
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.top_k is not None:
            given["top_k"] = self.top_k if self.top_k > 0 else None
        seed = secrets.randbits(32) if self.seed is None else self.seed
        chooses_depth = self.act_steps is not None or self.halt_threshold is not None
        return default.changed(
            max_output_tokens=self.max_tokens or default.max_output_tokens,
            act_steps=self.act_steps or default.act_steps,
            halt_threshold=self.halt_threshold if chooses_depth else default.halt_threshold,
            stop=default.stop if self.stop is None else self.stop,
            seed=seed,
            **given,
        )


class ChatRequest(SampledRequest):
    """The fields of a chat completion."""

    param = "messages"
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Annotated[int | None, Field(ge=1), _unless(-1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1), _unless(-1)] = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    truncation: Literal["auto", "disabled"] = "disabled"
    """auto: drop the oldest exchanges of a conversation without room for an answer."""

    @property
    def continues(self) -> bool:
        """Whether the answer continues the last message."""
        return self.messages[-1].role == "assistant"

    def conversation(self, default_system: str | None) -> Conversation:
        """The messages, after the default system turn if they have none; empty means none."""
        expected = {"continue_final_message": self.continues, "add_generation_prompt": not self.continues}
        for name, value in expected.items():
            if getattr(self, name) not in (None, value):
                raise invalid(f"{name}: the assistant's last message is continued, the user's is answered", name)
        turns = [message.turn() for message in self.messages]
        begun = (turns.pop(),) if self.continues else ()
        try:
            return (*question(turns, default_system), *begun)
        except UsageError as error:
            raise invalid(str(error), "messages") from None

    def prompts(self, responder: Responder) -> tuple[list[Encode], dict[str, Any]]:
        conversation, extras = self.conversation(responder.system), {}
        if self.truncation == "auto":
            answering = dataclasses.replace(responder, options=self.options(responder.options))
            conversation, extras["forgotten_messages"] = answering.shortened(conversation)
        return [partial(responder.begun_prompt if self.continues else responder.prompt, conversation)], extras

    def options(self, default: Options) -> Options:
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
        limit = {"max_output_tokens": self.max_completion_tokens} if self.max_completion_tokens else {}
        return super().options(default).changed(top=self.top_logprobs, **limit)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    several = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
    if not isinstance(several, list) or not several or not all(isinstance(one, str) or _is_ids(one) for one in several):
        raise ValueError("expected a text, a list of token ids, or a list of texts or of lists of token ids")
    return several


class CompletionRequest(SampledRequest):
    """The fields of a text completion."""

    param = "prompt"
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool = False
    """Include the prompt in the text and in the log-probabilities."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """How many of the most probable tokens to report with each token."""

    @property
    def samples(self) -> int:
        return 0 if self.max_tokens == 0 else self.n

    @property
    def is_scored(self) -> bool:
        return self.echo and (self.logprobs is not None or not self.samples)

    def prompts(self, responder: Responder) -> tuple[list[Encode], dict[str, Any]]:
        """Text is encoded as raw text, ids are taken unchanged."""
        ids = range(responder.tokenizer.vocab_size)
        encoders: list[Encode] = []
        for place, prompt in enumerate(self.prompt):
            if isinstance(prompt, str):
                encoders.append(partial(responder.begun_prompt, (Turn("text", prompt),)))
                continue
            for token in prompt:
                if token not in ids:
                    raise invalid(f"prompt {place} holds the token id {token}: the model's are 0 to {ids[-1]}", "prompt")
            encoders.append(partial(responder.ids_prompt, prompt))
        return encoders, {}

    def options(self, default: Options) -> Options:
        if self.max_tokens == 0 and (not self.echo or self.n > 1):
            raise invalid("max_tokens is 0, which needs echo: true and n: 1", "max_tokens")
        return super().options(default).changed(top=self.logprobs or 0)


AnyRequest = ChatRequest | CompletionRequest


def parse_request(body: bytes, kind: type[AnyRequest]) -> AnyRequest:
    """Parse a request body. Raises ApiError (400) that names a wrong or unsupported field."""
    try:
        values = from_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(_without(values, _NEUTRAL, _IGNORED))
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).removeprefix(".")
        if problem["type"] == "extra_forbidden":
            raise invalid(f"{name} is not supported: leave it out", name, "unsupported_parameter") from None
        raise invalid(f"{name}: {problem['msg']}", name) from None


# Answers.


@dataclass
class Choice:
    """One of the answers of a response, or a piece of it."""

    index: int
    text: str = ""
    tokens: list[tuple[Token | None, int]] = field(default_factory=list)
    """Tokens, with the number of characters before each. None: a BOS that the caller sent."""
    act_steps: list[int] = field(default_factory=list)
    """Of each generated token, EOS included."""
    finish: str | None = None

    def add(self, piece: "Choice") -> None:
        """Continue with a piece."""
        self.text += piece.text
        self.tokens += piece.tokens
        self.act_steps += piece.act_steps
        self.finish = piece.finish


@dataclass
class Completion:
    """The answers to one request, while they are generated: those of text completions."""

    id: str
    asked: AnyRequest
    tokenizer: Tokenizer
    prompt_tokens: int
    seed: int
    extras: dict[str, Any] = field(default_factory=dict)
    """Additional fields of each response."""
    created: int = field(default_factory=lambda: int(time.time()))
    new_tokens: int = 0
    """Number of generated tokens of all answers, EOS included."""
    _lengths: dict[int, int] = field(default_factory=dict)
    """Number of characters of each choice's text so far."""

    kinds = ("text_completion", "text_completion")
    """The `object` fields of a response and of a stream's chunk."""

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """The response, from all events of all answers."""
        choices: dict[int, Choice] = {}
        for piece in chain(*self._echoes(), *map(self._pieces, events)):
            choices.setdefault(piece.index, Choice(piece.index)).add(piece)
        shown = [self._shown(choices[index], is_whole=True) for index in sorted(choices)]
        return {**self._response(self.kinds[0], shown), "usage": self._usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream."""
        return list(map(self._chunk, self._echoes()))

    def chunk(self, event: Event) -> dict[str, Any]:
        """The chunk of one token, with its final text: often none, or that of several tokens. Or
        the chunk of a prompt.
        """
        return self._chunk(self._pieces(event))

    def closing(self) -> list[dict[str, Any]]:
        """The chunks after the last token."""
        return [{**self._chunk([]), "usage": self._usage()}] if self.asked.wants_usage else []

    def _chunk(self, pieces: Iterable[Choice]) -> dict[str, Any]:
        usage = {"usage": None} if self.asked.wants_usage else {}
        return {**self._response(self.kinds[1], list(map(self._shown, pieces))), **usage}

    def _response(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model, "seed": self.seed}
        return {**head, **self.extras, "choices": choices}

    def _usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens, "total_tokens": total}

    def _pieces(self, event: Event) -> list[Choice]:
        if isinstance(event, PromptScores):
            return self._echo(event.prompt, event.tokens)
        self.new_tokens += 1
        text, token, answer = event.piece.text, event.piece.token, event.piece.answer
        begin = self._lengths.get(event.index, 0)
        self._lengths[event.index] = begin + len(text)
        return [Choice(event.index, text, [(token, begin)], [token.act_steps], None if answer is None else answer.finish)]

    def _echoes(self) -> list[list[Choice]]:
        """The prompts, if they are echoed without log-probabilities."""
        asked = self.asked
        if isinstance(asked, ChatRequest) or not asked.echo or asked.is_scored:
            return []
        return [self._echo(prompt, ()) for prompt in range(len(asked.prompt))]

    def _echo(self, prompt: int, tokens: Sequence[Token]) -> list[Choice]:
        """The prompt, to begin each of its choices, without a BOS that the caller didn't send."""
        assert isinstance(self.asked, CompletionRequest)
        asked = self.asked.prompt[prompt]
        echoed: list[tuple[Token | None, int]] = [(None, 0)] if asked[:1] == [self.tokenizer.bos_id] else []
        stream = TextStream(self.tokenizer)
        for token in tokens:
            echoed.append((token, len(stream.text)))
            stream.push(token.id)
        text = asked if isinstance(asked, str) else self.tokenizer.decode(asked)
        choices = max(1, self.asked.samples)
        indices = range(prompt * choices, (prompt + 1) * choices)
        self._lengths.update(dict.fromkeys(indices, len(text)))
        return [Choice(index, text, echoed, [], None if self.asked.samples else "length") for index in indices]

    def _shown(self, choice: Choice, *, is_whole: bool = False) -> dict[str, Any]:
        """A choice, or a piece of it, as a response has it."""
        columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, offset in choice.tokens if self.asked.logprobs is not None else ():
            values: tuple[Any, ...]
            if token is None:
                values = self.tokenizer.piece(self.tokenizer.bos_id), None, None, offset
            else:
                entry = token_logprobs(self.tokenizer, token)
                # Each token is among its alternatives. Of ids with the same text, the first is the most probable.
                alternatives: dict[str, float] = {}
                for one in (*entry["top_logprobs"], entry):
                    alternatives.setdefault(one["token"], one["logprob"])
                values = entry["token"], entry["logprob"], alternatives, offset
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        return {
            "index": choice.index,
            "text": choice.text,
            "logprobs": None if self.asked.logprobs is None else columns,
            "finish_reason": choice.finish,
            "act_steps": choice.act_steps,
        }


class ChatCompletion(Completion):
    """The answers to a chat request."""

    kinds = ("chat.completion", "chat.completion.chunk")

    def opening(self) -> list[dict[str, Any]]:
        about = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{**self._chunk([]), "choices": [{"index": sample, **about}]} for sample in range(self.asked.n)]

    def _shown(self, choice: Choice, *, is_whole: bool = False) -> dict[str, Any]:
        if is_whole:
            said = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            said = {"delta": {"content": choice.text} if choice.text or choice.finish is None else {}}
        # EOS is left out of the log-probabilities.
        shown = [token for token, _ in choice.tokens if self.asked.logprobs and token is not None and token.finish != "stop"]
        content = [token_logprobs(self.tokenizer, token) for token in shown]
        logprobs = {"content": content, "refusal": None} if self.asked.logprobs else None
        about = {"logprobs": logprobs, "finish_reason": choice.finish, "act_steps": choice.act_steps}
        return {"index": choice.index, **said, **about}


def token_logprobs(tokenizer: Tokenizer, token: Token) -> dict[str, Any]:
    """A token and its alternatives with their log p, in nats, before temperature and truncation."""

    def shown(token_id: int, logp: float) -> dict[str, Any]:
        # SentencePiece writes a space as U+2581.
        content = tokenizer.raw_bytes(token_id) or tokenizer.piece(token_id).replace("\u2581", " ").encode()
        try:
            text = content.decode()
        except UnicodeDecodeError:
            text = "".join(f"\\x{byte:02x}" for byte in content)
        return {"token": text, "logprob": logp, "bytes": list(content)}

    return {**shown(token.id, token.logp), "top_logprobs": [shown(*candidate) for candidate in token.candidates]}
