"""From questions to answers: prompts, decoding, streamed text, stop strings; and the probability of
a given answer.

`generation.load` returns a `Responder`, the Python interface of a trained model. Prompts are built
by the same functions as in training (dataset/text/conversation.py). Knows nothing of training,
files or flags.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from config.errors import UsageError
from dataset.text.conversation import Conversation, TaggedRole, Template, Turn, encode_conversation, encode_prompt, question
from dataset.text.forms import parse_turns
from dataset.text.rows import BadRow
from dataset.text.tokenizer import Tokenizer
from generation.engine import Engine, Prompt, Request, Token, rows_that_fit
from generation.sampling import GREEDY, Sampling, check_limits
from generation.text_stream import TextStream
from models.act import RecursiveModel
from models.device import on_device
from models.losses import log_probs

Question = str | Sequence[Mapping[str, Any]] | Conversation
"""A user's message; messages (`role`, `content`) that end with the user's; or turns, unchanged."""

# Positions scored at a time: their logits take 32 MB in float32 for a vocabulary of 32,000.
_SCORED_AT_ONCE = 256


@dataclass(frozen=True)
class Options:
    """How to answer one conversation. Raises UsageError for a value out of range."""

    max_output_tokens: int
    act_steps: int
    """Maximum number of ACT steps per token."""
    halt_threshold: float | None = None
    """A token halts once its halting probability exceeds this; None: no early halting."""
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    top: int = 0
    """How many of the most probable tokens to report with each token."""

    def __post_init__(self) -> None:
        limits = (
            ("max_output_tokens", self.max_output_tokens >= 1, "at least 1"),
            ("act_steps", self.act_steps >= 1, "at least 1"),
            ("halt_threshold", self.halt_threshold is None or 0 < self.halt_threshold < 1, "between 0 and 1, or none at all"),
            ("stop", "" not in self.stop, "texts that aren't empty"),
        )
        check_limits(self, limits)

    def changed(self, **changes: Any) -> "Options":
        """These options with `changes`: fields of this class and `Sampling`. Raises UsageError."""
        of_sampling = {field.name for field in dataclasses.fields(Sampling)}
        own = {field.name for field in dataclasses.fields(self)}
        if unknown := sorted(changes.keys() - own - of_sampling):
            known = ", ".join(sorted((own | of_sampling) - {"sampling"}))
            raise UsageError(f"no such option: {', '.join(unknown)}; there are {known}")
        sampling = {name: changes.pop(name) for name in of_sampling & changes.keys()}
        if sampling:
            changes["sampling"] = dataclasses.replace(changes.get("sampling", self.sampling), **sampling)
        if "stop" in changes:
            stop = changes["stop"]
            changes["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
        return dataclasses.replace(self, **changes)


@dataclass
class Answer:
    """One generated answer."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    """Its ids, without EOS."""
    log_probability: float = 0.0
    """Sum over the generated ids, EOS included, in nats."""
    act_steps: list[int] = field(default_factory=list)
    """ACT steps of each generated id, EOS included."""
    finish: Literal["stop", "length"] = "length"
    """stop: it ended with EOS or before a stop string. length: it was cut off."""

    def __str__(self) -> str:
        return self.text


class Score(NamedTuple):
    """The probability of a given answer."""

    log_probability: float
    """Sum over its tokens, EOS included, in nats."""
    nats_per_token: float
    """-log p per token, EOS included."""
    bits_per_byte: float
    """-log2 p of its text (without EOS) per UTF-8 byte; NaN for an answer without text."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A token of one answer, and the text that became final with it (may be empty)."""

    request: int
    text: str
    token: Token
    answer: Answer | None
    """The whole answer, in its last piece; None before."""


@dataclass(frozen=True)
class Responder:
    """A model with its tokenizer and template, ready to answer; `generation.load` makes one.

    context: the most input positions in training; a prompt must leave room for at least one new
    token. rows: answers that are generated at the same time, at most; fewer if their KV cache would
    exceed `kv_budget_gb` GB. compiled: compiled code has a copy of the weights, so they must not
    change. system: text of the system turn for a question without one.

    Each method takes options by keyword, for this call: the fields of `Options` and of `Sampling`,
    such as act_steps, halt_threshold, temperature, top_k, seed, stop, max_output_tokens. They raise
    UsageError for an option that is unknown or out of range, for an empty question, and for one
    that is longer than the context.

    >>> model = load("checkpoints/demo/run")
    >>> answer = model.answer("What is 2 plus 3?", max_output_tokens=8, temperature=0.7, seed=1)
    >>> answer.finish in ("stop", "length") and len(answer.act_steps) <= 8
    True
    >>> history = [
    ...     {"role": "system", "content": "Answer with one word."},
    ...     {"role": "user", "content": "Red or blue?"},
    ...     {"role": "assistant", "content": "Red."},
    ...     {"role": "user", "content": "Why?"},
    ... ]
    >>> model.chat(history, act_steps=1).act_steps[0]
    1
    >>> "".join(piece.text for piece in model.stream("Red or blue?")) == str(model.answer("Red or blue?"))
    True
    >>> [answer.text for answer in model.answers(["Red or blue?", history])] == [
    ...     model.answer("Red or blue?").text,
    ...     model.chat(history).text,
    ... ]
    True
    >>> score = model.score("What is 2 plus 3?", "5, Red.")
    >>> score.nats_per_token > 0 and score.bits_per_byte > 0
    True
    """

    model: RecursiveModel
    tokenizer: Tokenizer
    template: Template
    context: int
    options: Options
    rows: int
    kv_budget_gb: float
    compiled: bool = False
    system: str | None = None

    def conversation(self, asked: Question) -> Conversation:
        """The turns of a question, with the system turn; see `Question` and `system`."""
        if isinstance(asked, str):
            return question([Turn("user", asked)], self.system)
        turns = tuple(turn for turn in asked if isinstance(turn, Turn))
        if turns and len(turns) == len(asked):
            return turns
        if turns:
            raise UsageError("the messages can't be read: expected turns or mappings, found both")
        try:
            return question(parse_turns({"messages": list(asked)}).turns, self.system)
        except BadRow as error:
            raise UsageError(f"the messages can't be read: {error}") from None

    def prompt(self, conversation: Conversation) -> Prompt:
        """Encode a history for its next answer. Raises UsageError with the counts if it is longer than the context."""
        encoded = encode_prompt(conversation, self.tokenizer, self.template)
        return self._within_context(Prompt(encoded.ids, encoded.segment))

    def begun_prompt(self, conversation: Conversation) -> Prompt:
        """Encode turns to continue the last one, an assistant's or raw text. Raises like `prompt`."""
        encoded = encode_conversation(conversation, self.tokenizer, self.template)
        return self._within_context(Prompt(encoded.ids[:-1], encoded.segment[:-1]))  # without its EOS

    def ids_prompt(self, ids: Sequence[int]) -> Prompt:
        """A prompt of these ids, with a BOS before them if they don't begin with one. Raises like
        `prompt`.

        A BOS with a role's tag begins a turn of that role; a BOS without a tag begins raw text.
        """
        bos = self.tokenizer.bos_id
        kept = np.array(ids if ids[:1] == [bos] else [bos, *ids], np.int32)
        tags = {role: self.tokenizer.encode(self.template.tag(role)) for role in get_args(TaggedRole)}
        segment = np.zeros_like(kept)
        begins = np.flatnonzero(kept == bos).tolist()
        number = 1
        for begin, end in zip(begins, [*begins[1:], len(kept)], strict=True):
            text = kept[begin + 1 : end].tolist()
            role = next((role for role, tag in tags.items() if text[: len(tag)] == tag), None)
            opening = 1 if role is None else 1 + len(tags[role])
            is_learned = role in (None, "assistant")
            segment[begin : begin + opening if is_learned else end] = number
            number += is_learned
        return self._within_context(Prompt(kept, segment))

    def _within_context(self, prompt: Prompt) -> Prompt:
        if len(prompt.ids) > self.context:
            raise UsageError(
                f"the prompt has {len(prompt.ids)} tokens, the context holds {self.context} (dataset.seq_len): shorten the message"
            )
        return prompt

    def prompt_length(self, conversation: Conversation) -> int:
        """Number of tokens of the prompt, which may exceed the context."""
        return len(encode_prompt(conversation, self.tokenizer, self.template).ids)

    def fits(self, conversation: Conversation) -> bool:
        """Whether the context has room for an answer after the history."""
        return self.prompt_length(conversation) <= self.context

    def shortened(self, conversation: Conversation) -> tuple[Conversation, int]:
        """Drop the oldest exchanges until there is room for an answer. Returns the rest, and the
        number of dropped turns.

        Leading system turns stay, and so does the last exchange: a user's turn and what follows it.
        """
        # Try to reserve a quarter of the context for the answer.
        room = self.context - min(self.options.max_output_tokens, self.context // 4) + 1
        opening = next((place for place, turn in enumerate(conversation) if turn.role != "system"), len(conversation))
        system, turns = conversation[:opening], conversation[opening:]
        begins = [place for place, turn in enumerate(turns) if place and turn.role == "user"]
        kept = next((at for at in (0, *begins) if self.prompt_length((*system, *turns[at:])) <= room), begins[-1] if begins else 0)
        return (*system, *turns[kept:]), kept

    def request(self, asked: Conversation | Prompt, options: Options, sample: int = 0) -> Request:
        """The engine's request to answer a history or continue a prompt. Raises UsageError if it is
        longer than the context.
        """
        prompt = asked if isinstance(asked, Prompt) else self.prompt(asked)
        # The last token of an answer is no input, so it may be one position beyond the context.
        return Request(
            prompt=prompt,
            max_new_tokens=min(options.max_output_tokens, self.context - len(prompt.ids) + 1),
            sampling=options.sampling,
            sample=sample,
            act_steps=options.act_steps,
            halt_threshold=options.halt_threshold,
            top=options.top,
        )

    def answer(self, message: str, **options: Any) -> Answer:
        """Answer a user's message."""
        return self.answers([message], **options)[0]

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Answer the last of `messages`: `role` (system, user, assistant) and `content`."""
        return self.answers([messages], **options)[0]

    def answers(self, questions: Sequence[Question], **options: Any) -> list[Answer]:
        """Answer many questions together; results in the given order."""
        answers = [Answer() for _ in questions]
        for index, answer in self.with_options(**options).finished(questions):
            answers[index] = answer
        return answers

    def finished(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """Answer each question; yields its index and its answer, in the order in which they finish."""
        if isinstance(questions, str):
            raise UsageError("expected a list of questions, found one text: use `answer`")
        speaker = self.speaker([self.request(self.conversation(asked), self.options) for asked in questions])
        while speaker.busy:
            yield from ((piece.request, piece.answer) for piece in speaker.tick() if piece.answer is not None)

    def stream(self, asked: Question, sample: int = 0, **options: Any) -> Iterator[Piece]:
        """Answer one question; yields pieces of the answer. Each `sample` draws differently."""
        answering = self.with_options(**options)
        speaker = answering.speaker([self.request(self.conversation(asked), answering.options, sample)])
        while speaker.busy:
            yield from speaker.tick()

    def score(self, asked: Question, answer: str, **options: Any) -> Score:
        """The probability of `answer` as the whole answer to a question. Of the options, depth and
        halting threshold matter.
        """
        chosen = self.with_options(**options).options
        conversation = self.conversation(asked)
        encoded = encode_conversation((*conversation, Turn("assistant", answer)), self.tokenizer, self.template)
        if len(encoded.ids) - 1 > self.context:
            raise UsageError(
                f"question and answer have {len(encoded.ids)} tokens, the context holds {self.context + 1} (dataset.seq_len + 1)"
            )
        begin = self.prompt_length(conversation)
        scored = self.token_scores(Prompt(encoded.ids, encoded.segment), chosen, begin)
        nll = -np.array([token.logp for token in scored])
        text_bytes = len(self.tokenizer.decode(encoded.ids[begin:]).encode())
        bits_per_byte = float(nll[:-1].sum()) / math.log(2) / text_bytes if text_bytes else math.nan
        return Score(-float(nll.sum()), float(nll.mean()), bits_per_byte)

    @torch.no_grad()
    def token_scores(self, prompt: Prompt, options: Options, begin: int = 1) -> list[Token]:
        """The ids of a prompt from index `begin` >= 1 on, each with its log p given the ids before
        it.

        options: the depth, the halting threshold, and the number of most probable ids to report.
        """
        if len(prompt.ids) <= begin:
            return []
        ids_T, segments_T = (on_device(values.astype(np.int64), self.model.device) for values in (prompt.ids, prompt.segment))
        refinement = self.model.refine_rows(
            ids_T[None, :-1], segments_T[None, :-1], act_steps=options.act_steps, halt_threshold=options.halt_threshold
        )
        refined = collections.deque(refinement, maxlen=1).pop()
        steps = refined.steps_BT[0].tolist()
        tokens = []
        for start in range(begin, len(prompt.ids), _SCORED_AT_ONCE):
            chunk = slice(start - 1, min(start - 1 + _SCORED_AT_ONCE, len(prompt.ids) - 1))
            logp_NV = log_probs(self.model.logits(refined.output_BTD[0, chunk]), self.model.config.loss)
            labels_N = ids_T[1:][chunk]
            logps = logp_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1).tolist()
            best = torch.topk(logp_NV, min(options.top, logp_NV.shape[1]))
            rivals = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for token_id, logp, depth, (ids, values) in zip(labels_N.tolist(), logps, steps[chunk], rivals, strict=True):
                tokens.append(Token(0, token_id, logp, depth, None, tuple(zip(ids, values, strict=True))))
        return tokens

    def speaker(self, requests: Sequence[Request]) -> "Speaker":
        """A speaker with room for these requests, which are submitted as numbers 0, 1, ..."""
        positions = max((len(request.prompt.ids) + request.max_new_tokens - 1 for request in requests), default=1)
        speaker = Speaker(self, rows=min(self.rows, max(1, len(requests))), positions=positions)
        for request in requests:
            speaker.submit(request, self.options.stop)
        return speaker

    def at_depth(self, act_steps: int, halt_threshold: float | None = None) -> "Responder":
        """The same model with another number of ACT steps, or with a threshold at most that many."""
        return dataclasses.replace(self, options=self.options.changed(act_steps=act_steps, halt_threshold=halt_threshold))

    def with_options(self, **changes: Any) -> "Responder":
        """The same model with other options; see `Options.changed`."""
        options = self.options.changed(**changes)
        if options.act_steps > self.model.config.halt_max_steps:
            raise UsageError(f"act_steps is {options.act_steps}: the model has 1 to {self.model.config.halt_max_steps}")
        return dataclasses.replace(self, options=options)


class Speaker:
    """An engine whose requests come out as text."""

    def __init__(self, responder: Responder, *, rows: int, positions: int) -> None:
        """Raises UsageError if the KV cache of one row of `positions` exceeds the budget."""
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
        self._open: dict[int, tuple[TextStream, Answer]] = {}

    @property
    def busy(self) -> bool:
        """Whether any answer is unfinished."""
        return self._engine.busy

    @property
    def running(self) -> int:
        """Number of running answers."""
        return self._engine.running

    def submit(self, request: Request, stop: Iterable[str] = ()) -> int:
        """Submit a request. Its answer ends before the first `stop` string. Returns its number."""
        stream = TextStream(self._tokenizer, tuple(stop), is_begun=not request.prompt.segment[-1])
        number = self._engine.submit(request)
        self._open[number] = stream, Answer()
        return number

    def cancel(self, number: int) -> None:
        """Drop a request. Does nothing for a finished one."""
        self._engine.cancel(number)
        self._open.pop(number, None)

    def tick(self) -> list[Piece]:
        """Run one tick of the engine. Returns the new pieces of answers."""
        return [self._piece(token) for token in self._engine.tick() if token.request in self._open]

    def _piece(self, token: Token) -> Piece:
        stream, answer = self._open[token.request]
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
