"""From conversations to the texts of their next answers: prompts, the engine, text as it forms, stop strings.

Prompts are built by the same functions as training's (dataset/text/conversation.py). Knows nothing of training, files or flags.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from config.errors import UsageError
from dataset.text.conversation import Conversation, Template, encode_prompt
from dataset.text.tokenizer import Tokenizer
from generation.engine import Engine, Prompt, Request, Token, rows_that_fit
from generation.sampling import GREEDY, Sampling
from generation.text_stream import TextStream
from models.act import RecursiveModel


@dataclass(frozen=True)
class Options:
    """How one conversation is answered."""

    max_output_tokens: int
    act_steps: int
    """ACT steps a token takes, at most."""
    halt_threshold: float | None = None
    """A token stops for good when its halting probability passes this; None: every token takes all steps."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    top: int = 0
    """How many of the most probable tokens to report with each token."""


@dataclass
class Answer:
    """One generated answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Its ids, EOS left out."""
    log_probability: float = 0.0
    """Sum over the generated ids, EOS included, in nats."""
    act_steps: list[int] = field(default_factory=list)
    """ACT steps behind each generated id, EOS included."""
    finish: Literal["stop", "length"] = "length"
    """stop: it ended with an EOS or before a stop string. length: it was cut off."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of one answer, and the text that it made certain (which may be empty)."""

    request: int
    text: str
    token: Token
    answer: Answer | None
    """The whole answer, with its last piece."""


@dataclass(frozen=True)
class Responder:
    """A model with its tokenizer and template, ready to answer.

    `context` is the most input positions the model was trained on; a prompt must leave room for at least one new token in it.
    At most `rows` answers form at the same time, fewer where `kv_budget_gb` (GB of keys and values) says so. If
    `compiled`, the weights are copied into compiled code and must not change any more.
    """

    model: RecursiveModel
    tokenizer: Tokenizer
    template: Template
    context: int
    options: Options
    rows: int
    kv_budget_gb: float
    compiled: bool = False

    def prompt(self, conversation: Conversation) -> Prompt:
        """Encode a history for its next answer. Raises UsageError with the counts if it is longer than the context."""
        encoded = encode_prompt(conversation, self.tokenizer, self.template)
        if len(encoded.ids) > self.context:
            raise UsageError(
                f"the prompt has {len(encoded.ids)} tokens, the context holds {self.context} (dataset.seq_len): shorten the message"
            )
        return Prompt(encoded.ids, encoded.segment)

    def prompt_length(self, conversation: Conversation) -> int:
        """Tokens of the prompt, however long it is."""
        return len(encode_prompt(conversation, self.tokenizer, self.template).ids)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the history leaves room for an answer in the context."""
        return self.prompt_length(conversation) <= self.context

    def request(self, conversation: Conversation, options: Options, sample: int = 0) -> Request:
        """What the engine needs to answer `conversation`. Raises UsageError if it is longer than the context."""
        prompt = self.prompt(conversation)
        # The last token of an answer is never fed back, so it may stand one position beyond the context.
        return Request(
            prompt=prompt,
            max_new_tokens=min(options.max_output_tokens, self.context - len(prompt.ids) + 1),
            sampling=options.sampling,
            sample=sample,
            act_steps=options.act_steps,
            halt_threshold=options.halt_threshold,
            top=options.top,
        )

    def answers(self, conversations: Sequence[Conversation]) -> list[Answer]:
        """Answer each conversation (which ends before the answer); results in the given order."""
        answers = [Answer() for _ in conversations]
        for index, answer in self.finished(conversations):
            answers[index] = answer
        return answers

    def finished(self, conversations: Sequence[Conversation]) -> Iterator[tuple[int, Answer]]:
        """Answer each conversation; yields its place in the sequence and its answer, in the order in which answers end."""
        speaker = self.speaker([self.request(conversation, self.options) for conversation in conversations])
        while speaker.busy:
            yield from ((piece.request, piece.answer) for piece in speaker.tick() if piece.answer is not None)

    def stream(self, conversation: Conversation, sample: int = 0) -> Iterator[Piece]:
        """Answer one conversation, piece by piece as it forms."""
        speaker = self.speaker([self.request(conversation, self.options, sample)])
        while speaker.busy:
            yield from speaker.tick()

    def speaker(self, requests: Sequence[Request]) -> "Speaker":
        """A speaker with room for these requests, which it has taken up as numbers 0, 1, ..."""
        positions = max((len(request.prompt.ids) + request.max_new_tokens - 1 for request in requests), default=1)
        speaker = Speaker(self, rows=min(self.rows, max(1, len(requests))), positions=positions)
        for request in requests:
            speaker.submit(request, self.options.stop)
        return speaker

    def at_depth(self, act_steps: int, halt_threshold: float | None = None) -> "Responder":
        """The same model at another number of ACT steps: fixed, or at most that many with a threshold."""
        return self.with_options(act_steps=act_steps, halt_threshold=halt_threshold)

    def with_options(self, **changes: object) -> "Responder":
        """The same model with other options (fields of `Options`)."""
        return dataclasses.replace(self, options=dataclasses.replace(self.options, **changes))  # type: ignore[arg-type]


class Speaker:
    """An engine whose requests come out as text."""

    def __init__(self, responder: Responder, *, rows: int, positions: int) -> None:
        """Raises UsageError if the key-value cache of a single row of `positions` positions is over the budget."""
        act_steps = responder.options.act_steps
        self._tokenizer = responder.tokenizer
        self._engine = Engine(
            responder.model,
            eos_id=responder.tokenizer.eos_id,
            act_steps=act_steps,
            rows=rows_that_fit(responder.model, act_steps, positions, responder.kv_budget_gb, rows),
            positions=positions,
            compiled=responder.compiled,
        )
        self._streams: dict[int, TextStream] = {}
        self._answers: dict[int, Answer] = {}

    @property
    def busy(self) -> bool:
        """Whether an answer is still to come."""
        return self._engine.busy

    def submit(self, request: Request, stop: Iterable[str] = ()) -> int:
        """Take up a request, whose answer ends before the first of the texts `stop`. Returns its number."""
        stream = TextStream(self._tokenizer, tuple(stop))
        number = self._engine.submit(request)
        self._streams[number], self._answers[number] = stream, Answer()
        return number

    def cancel(self, number: int) -> None:
        """Forget a request; one that has finished is forgotten already."""
        self._engine.cancel(number)
        self._streams.pop(number, None)
        self._answers.pop(number, None)

    def tick(self) -> list[Piece]:
        """One tick of the engine: the pieces of answers that came of it."""
        return [self._piece(token) for token in self._engine.tick() if token.request in self._answers]

    def _piece(self, token: Token) -> Piece:
        stream, answer = self._streams[token.request], self._answers[token.request]
        answer.log_probability += token.logp
        answer.act_steps.append(token.act_steps)
        text = ""
        if token.finish != "stop":
            answer.ids.append(token.id)
            text = stream.push(token.id)
        if token.finish is None and not stream.stopped:
            return Piece(token.request, text, token, None)
        text += stream.finish()
        answer.text = stream.text
        answer.finish = "stop" if stream.stopped or token.finish == "stop" else "length"
        self.cancel(token.request)
        return Piece(token.request, text, token, answer)
