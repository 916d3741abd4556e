"""Answers for many callers at once. Prompts may come at any time, and every answer ends.

Limits the waiting and running answers, the time of each, and the KV cache. All of it runs in one
asyncio loop, except the model, which has a thread: who came or left meanwhile is taken up between
two ticks. Knows nothing of HTTP.
"""

import asyncio
import dataclasses
import functools
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from generation.answers import Options, Piece, Responder, Speaker
from generation.engine import Prompt, Request, Token, cache_bytes, rows_that_fit

log = logging.getLogger(__name__)


class ServiceError(Exception):
    """Why an answer can't be given or completed."""


class Full(ServiceError):
    """Too many answers are waiting; try later."""


class TimedOut(ServiceError):
    """An answer took longer than the limit."""


class Closed(ServiceError):
    """The service has been closed."""


class Broken(ServiceError):
    """The engine has failed; the service doesn't recover."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """The next piece of one of a submission's answers."""

    index: int
    """Number of the answer: all samples of the first prompt, then those of the next."""
    piece: Piece


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The ids of a prompt, without BOS, with their log p. Comes before answers to it."""

    prompt: int
    tokens: list[Token]


Event = ChoiceDelta | PromptScores


@dataclass(eq=False)
class Submission:
    """Prompts whose answers are waiting or running. Callers only pass it to the service."""

    requests: list[Request]
    """One for each prompt."""
    samples: int
    """Answers per prompt; 0: prompts are only scored."""
    options: Options
    scored: bool
    deadline: float
    """On the loop's clock."""
    unfinished: int
    """Unfinished answers, or prompts that are only scored."""
    events: "asyncio.Queue[Event | ServiceError]" = field(default_factory=asyncio.Queue)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, including the assistant's tags."""
        return sum(len(request.prompt.ids) for request in self.requests)


class Service:
    """A `Speaker` for the full context. Its methods belong to the loop of the first submission."""

    def __init__(self, responder: Responder, *, queue: int, timeout: float) -> None:
        """queue: answers that may wait. timeout: seconds from submission within which an answer
        must end.

        Raises UsageError if the KV cache of one row of the whole context exceeds the responder's
        budget.
        """
        self.responder = responder
        self.timeout = timeout
        act_steps = responder.options.act_steps
        self.rows = rows_that_fit(responder.model, act_steps, responder.context, responder.kv_budget_gb, responder.rows)
        self.cache_bytes = cache_bytes(responder.model, act_steps, self.rows, responder.context)
        self.capacity = self.rows + queue
        """Limit of waiting and running answers."""
        self.pending = 0
        """Number of waiting and running answers."""
        self.refusal: ServiceError | None = None
        """Why submissions are refused; None while they are accepted."""
        self._speaker = Speaker(responder, rows=self.rows, positions=responder.context)
        self._thread = ThreadPoolExecutor(1, "engine")
        self._engine: asyncio.Task[None] | None = None
        self._has_ended = False
        self._open: set[Submission] = set()
        self._coming: deque[tuple[Submission, int]] = deque()
        """Prompts that the engine doesn't have yet."""
        self._begun: dict[int, tuple[Submission, int]] = {}
        """The submission and the index of each answer in the engine, by its request's number."""
        self._left: list[int] = []
        """Requests that the engine is to drop."""

    @property
    def running(self) -> int:
        """Number of running answers."""
        return self._speaker.running

    async def submit(
        self, prompts: Sequence[Callable[[], Prompt]], options: Options, samples: int, *, scored: bool = False
    ) -> Submission:
        """Submit prompts for `samples` answers each. scored: also compute the log p of the prompts'
        ids (0 samples: only that).

        Each of `prompts` encodes one. Raises UsageError for a prompt longer than the context, Full
        without room for these answers, Closed or Broken once submissions are refused.
        """
        deadline = asyncio.get_running_loop().time() + self.timeout
        n = len(prompts) * max(1, samples)
        if self.refusal is not None:
            raise self.refusal
        if self.pending + n > self.capacity:
            raise Full(f"{self.pending} of at most {self.capacity} answers are waiting or running: no room for {n} more, try later")
        self.pending += n
        try:
            # In a thread, because encoding a long text takes time.
            requests = await asyncio.to_thread(lambda: [self.responder.request(encode(), options) for encode in prompts])
            if self._has_ended and self.refusal is not None:
                raise self.refusal
        except BaseException:
            self.pending -= n
            raise
        submission = Submission(requests, samples, options, scored, deadline, unfinished=n)
        self._open.add(submission)
        self._coming.extend((submission, prompt) for prompt in range(len(requests)))
        if self._engine is None or self._engine.done():
            self._engine = asyncio.create_task(self._run())
        return submission

    async def events(self, submission: Submission, beat: float) -> AsyncIterator[Event | None]:
        """Scores and pieces of answers, the last piece of each with the `Answer`; None after `beat`
        seconds without one. Raises the ServiceError that ends them.
        """
        clock = asyncio.get_running_loop().time
        while submission.unfinished or not submission.events.empty():
            try:
                async with asyncio.timeout_at(min(clock() + beat, submission.deadline)):
                    event = await submission.events.get()
            except TimeoutError:
                event = None
            # Also for a caller that takes pieces more slowly than they come.
            if submission.unfinished and clock() >= submission.deadline:
                raise TimedOut(f"the answer was not ready {self.timeout:g} s after its request")
            if isinstance(event, ServiceError):
                raise event
            yield event

    def cancel(self, submission: Submission) -> None:
        """Drop unfinished answers; their rows are free before the next tick. May be repeated."""
        if submission in self._open:
            self._end(submission, submission.unfinished)
            self._coming = deque(coming for coming in self._coming if coming[0] is not submission)
            self._left += [number for number, (own, _) in self._begun.items() if own is submission]
            self._begun = {number: begun for number, begun in self._begun.items() if begun[0] is not submission}

    def drain(self) -> None:
        """Refuse new submissions; finish those that were accepted."""
        self.refusal = self.refusal or Closed("the server is shutting down")

    async def close(self) -> None:
        """End after the current tick; unfinished answers get `Closed`. May be repeated."""
        self.drain()
        self._end_all()
        if self._engine is not None:
            await self._engine
        self._thread.shutdown()

    def _end_all(self) -> None:
        """End all submissions with the reason why new ones are refused."""
        assert self.refusal is not None
        self._has_ended = True
        for submission in list(self._open):
            self.cancel(submission)
            submission.events.put_nowait(self.refusal)

    def _end(self, submission: Submission, answers: int) -> None:
        self.pending -= answers
        submission.unfinished -= answers
        if not submission.unfinished:
            self._open.discard(submission)

    async def _run(self) -> None:
        """Run the engine until it has no more work."""
        in_thread = functools.partial(asyncio.get_running_loop().run_in_executor, self._thread)
        try:
            while self._coming or self._begun or self._left:
                while self._left:
                    self._speaker.cancel(self._left.pop())
                for submission, prompt in self._coming:
                    if not submission.scored:
                        self._begin(submission, prompt)
                self._coming = deque(coming for coming in self._coming if coming[0].scored)
                if self._coming:
                    # Score one prompt between two ticks, so that running answers don't stall.
                    submission, prompt = self._coming.popleft()
                    ids = submission.requests[prompt].prompt
                    scores = await in_thread(self.responder.token_scores, ids, submission.options)
                    if submission in self._open:  # Its caller may have left meanwhile.
                        submission.events.put_nowait(PromptScores(prompt, scores))
                        self._begin(submission, prompt)
                for piece in await in_thread(self._next_pieces) if self._begun else ():
                    if piece.request not in self._begun:
                        continue
                    submission, index = self._begun[piece.request]
                    submission.events.put_nowait(ChoiceDelta(index, piece))
                    if piece.answer is not None:
                        del self._begun[piece.request]
                        self._end(submission, 1)
        except Exception as failure:
            log.exception("the engine has failed; restart the server, which answers nothing until then")
            name = type(failure).__name__
            self.refusal = Broken(f"the engine has failed ({name}): see the server's log, and restart the server")
            self._end_all()

    def _begin(self, submission: Submission, prompt: int) -> None:
        for sample in range(submission.samples):
            request = dataclasses.replace(submission.requests[prompt], sample=sample)
            number = self._speaker.submit(request, submission.options.stop)
            self._begun[number] = submission, prompt * submission.samples + sample
        if not submission.samples:
            self._end(submission, 1)

    def _next_pieces(self) -> list[Piece]:
        """Tick until there are pieces, or until someone comes or leaves. Runs in the thread."""
        while not (pieces := self._speaker.tick()) and not self._coming and not self._left:
            pass
        return pieces
