"""The requests and responses of OpenAI's text completions: prompts as plain text or ids, and
log-probabilities of prompts.

Knows nothing of HTTP, threads or queues; scripts/serve.py does. docs/serving.md lists the fields.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from dataset.text.conversation import Turn
from generation.answers import Options, Responder
from generation.engine import Prompt, Token
from generation.service import ChoiceDelta, Event
from generation.text_stream import TextStream
from scripts.chat_completions import Completion, SampledRequest, finish_and_steps, invalid, token_logprobs


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    several = [value] if isinstance(value, str) or (value and _is_ids(value)) else value
    if not isinstance(several, list) or not several or not all(isinstance(one, str) or _is_ids(one) for one in several):
        raise ValueError("expected a text, a list of token ids, or a list of texts or of lists of token ids")
    return several


class CompletionRequest(SampledRequest):
    """The fields of a text completion."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    echo: bool = False
    """Include the prompt in the text and in the log-probabilities."""
    logprobs: int | None = Field(None, ge=0, le=20)
    """How many of the most probable tokens to report with each token."""

    @property
    def samples(self) -> int:
        """Answers per prompt; 0: only echo the prompts."""
        return 0 if self.max_tokens == 0 else self.n

    @property
    def is_scored(self) -> bool:
        """Whether to compute the prompts' log-probabilities."""
        return self.echo and (self.logprobs is not None or not self.samples)

    def prompts(self, responder: Responder) -> list[Callable[[], Prompt]]:
        """A function for each prompt that encodes it: text as raw text, ids unchanged."""
        ids = range(responder.tokenizer.vocab_size)
        for place, prompt in enumerate(self.prompt):
            if not isinstance(prompt, str) and (unknown := next((token for token in prompt if token not in ids), None)) is not None:
                raise invalid(f"prompt {place} holds the token id {unknown}: the model's are 0 to {ids[-1]}", "prompt")
        return [
            partial(responder.begun_prompt, (Turn("text", prompt),))
            if isinstance(prompt, str)
            else partial(responder.ids_prompt, prompt)
            for prompt in self.prompt
        ]

    def options(self, default: Options) -> Options:
        """See `SampledRequest.options`."""
        if self.max_tokens == 0 and (not self.echo or self.n > 1):
            raise invalid("max_tokens is 0, which needs echo: true and n: 1", "max_tokens")
        return super().options(default).changed(top=self.logprobs or 0)


@dataclass
class TextCompletion(Completion):
    """The answers to a request for text completions."""

    asked: CompletionRequest
    _kinds = ("text_completion", "text_completion")
    _lengths: dict[int, int] = field(default_factory=dict)
    """Number of characters of each choice's text so far."""

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """See `Completion.whole`."""
        of_choice: dict[int, list[dict[str, Any]]] = {choice: [] for choice in range(len(self.asked.prompt) * self._choices)}
        for chunk in (*self.opening(), *(self.chunk(event) for event in events)):
            for choice in chunk["choices"]:
                of_choice[choice["index"]].append(choice)
        return self._whole([_joined(choice, own) for choice, own in of_choice.items()])

    def opening(self) -> list[dict[str, Any]]:
        """The prompts, if they are echoed without log-probabilities."""
        if not self.asked.echo or self.asked.is_scored:
            return []
        return [self._echo(prompt, ()) for prompt in range(len(self.asked.prompt))]

    def chunk(self, event: Event) -> dict[str, Any]:
        """See `Completion.chunk`; also the chunk of a prompt."""
        if not isinstance(event, ChoiceDelta):
            return self._echo(event.prompt, event.tokens)
        self.new_tokens += 1
        begin = self._lengths.get(event.index, 0)
        self._lengths[event.index] = begin + len(event.piece.text)
        logprobs = self._logprobs([event.piece.token], [begin])
        return self._chunk([{"index": event.index, "text": event.piece.text, "logprobs": logprobs, **finish_and_steps([event])}])

    @property
    def _choices(self) -> int:
        """Choices per prompt."""
        return max(1, self.asked.samples)

    def _echo(self, prompt: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """The prompt, to begin each of its choices, without a BOS that the caller didn't send."""
        asked = self.asked.prompt[prompt]
        stream = TextStream(self.tokenizer)
        offsets = []
        for token in tokens:
            offsets.append(len(stream.text))
            stream.push(token.id)
        stream.finish()
        text = asked if isinstance(asked, str) else self.tokenizer.decode(asked)
        logprobs = self._logprobs(tokens, offsets)
        if logprobs is not None and not isinstance(asked, str) and asked[:1] == [self.tokenizer.bos_id]:
            first = {"tokens": self.tokenizer.piece(asked[0]), "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
            logprobs = {name: [first[name], *values] for name, values in logprobs.items()}
        finish = "length" if not self.asked.samples else None
        indices = range(prompt * self._choices, (prompt + 1) * self._choices)
        self._lengths.update(dict.fromkeys(indices, len(text)))
        about: dict[str, Any] = {"text": text, "logprobs": logprobs, "finish_reason": finish, "act_steps": []}
        return self._chunk([{"index": index, **about} for index in indices])

    def _logprobs(self, tokens: Sequence[Token], offsets: Sequence[int]) -> dict[str, list[Any]] | None:
        """Every token, including EOS, and its alternatives, which include the token itself."""
        if self.asked.logprobs is None:
            return None
        shown = [token_logprobs(self.tokenizer, token) for token in tokens]
        return {
            "tokens": [entry["token"] for entry in shown],
            "token_logprobs": [entry["logprob"] for entry in shown],
            "top_logprobs": [_by_text([*entry["top_logprobs"], entry]) for entry in shown],
            "text_offset": list(offsets),
        }


def _by_text(entries: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Log-probabilities by text; for ids with the same text, the highest."""
    found: dict[str, float] = {}
    for entry in entries:
        found[entry["token"]] = max(entry["logprob"], found.get(entry["token"], entry["logprob"]))
    return found


def _joined(index: int, chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A choice, joined from the chunks of its stream."""
    parts = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
    logprobs = {name: [value for part in parts for value in part[name]] for name in parts[0]} if parts else None
    return {
        "index": index,
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": logprobs,
        "finish_reason": chunks[-1]["finish_reason"],
        "act_steps": [steps for chunk in chunks for steps in chunk["act_steps"]],
    }
