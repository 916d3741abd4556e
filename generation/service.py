"""Answers for many callers at once. One thread owns the model, any thread may submit prompts, and
every answer ends.

Limits the waiting and running answers, the time of each, and the KV cache. Knows nothing of HTTP.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
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
    """The thread that owns the model has failed; the service doesn't recover."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """The next piece of one of a submission's answers."""

    index: int
    """Number of the answer: all samples of the first prompt, then those of the next."""
    piece: Piece


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The ids of a prompt, without BOS, with their log p. Delivered before answers to it."""

    prompt: int
    tokens: list[Token]


Event = ChoiceDelta | PromptScores

Deliver = Callable[[Event | ServiceError], None]
"""Receives a submission's events, on the service's thread. It must return at once and not raise."""


@dataclass(eq=False)
class Submission:
    """Prompts whose answers are waiting or running. Callers only pass it to `Service.cancel`."""

    requests: list[Request]
    """One for each prompt."""
    samples: int
    """Answers per prompt; 0: prompts are only scored."""
    options: Options
    scored: bool
    deliver: Deliver
    deadline: float
    """On the clock of time.monotonic."""
    unfinished: int
    """Unfinished answers, or prompts that are only scored. Changed only by the service's thread."""
    indices: dict[int, int] = field(default_factory=dict)
    """Each answer's index, by its request's number. Used only by the service's thread."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, including the assistant's tags."""
        return sum(len(request.prompt.ids) for request in self.requests)


class Service:
    """A `Speaker` for the full context, in its own thread."""

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
        self._speaker = Speaker(responder, rows=self.rows, positions=responder.context)
        self._by_number: dict[int, Submission] = {}
        self._to_score: deque[tuple[Submission, int]] = deque()
        self._changed = threading.Condition()
        # Guarded by the lock:
        self._arrived: deque[Submission] = deque()
        self._cancelled: list[Submission] = []
        self._open: set[Submission] = set()
        self._pending = 0
        self._refusal: ServiceError | None = None
        self._is_closing = False
        self._has_ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Number of waiting and running answers."""
        return self._pending

    @property
    def running(self) -> int:
        """Number of running answers."""
        return self._speaker.running

    @property
    def refusal(self) -> ServiceError | None:
        """Why submissions are refused; None while they are accepted."""
        return self._refusal

    def submit(
        self, prompts: Sequence[Callable[[], Prompt]], options: Options, samples: int, deliver: Deliver, *, scored: bool = False
    ) -> Submission:
        """Submit prompts for `samples` answers each. scored: also compute the log p of the prompts'
        ids (0 samples: only that).

        `deliver` receives scores and pieces of answers, the last piece of each with the `Answer`;
        or one error. Each of `prompts` encodes one, in the caller's thread. Raises UsageError for a
        prompt longer than the context, Full without room for these answers, Closed or Broken once
        submissions are refused.
        """
        deadline = time.monotonic() + self.timeout
        n = len(prompts) * max(1, samples)
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            if self._pending + n > self.capacity:
                raise Full(
                    f"{self._pending} of at most {self.capacity} answers are waiting or running: no room for {n} more, try later"
                )
            self._pending += n
        try:
            requests = [self.responder.request(encode(), options) for encode in prompts]
        except BaseException:
            self._release(n)
            raise
        submission = Submission(requests, samples, options, scored, deliver, deadline, unfinished=n)
        with self._changed:
            if self._refusal is not None and self._has_ended:
                self._pending -= n
                raise self._refusal
            self._open.add(submission)
            self._arrived.append(submission)
            self._changed.notify()
        return submission

    def cancel(self, submission: Submission) -> None:
        """Drop unfinished answers; their rows are free before the next tick. May be repeated."""
        with self._changed:
            self._cancelled.append(submission)
            self._changed.notify()

    def drain(self) -> None:
        """Refuse new submissions; finish those that were accepted."""
        with self._changed:
            self._refusal = self._refusal or Closed("the server is shutting down")

    def close(self) -> None:
        """End the thread after its current tick; unfinished answers get `Closed`. May be repeated."""
        self.drain()
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _release(self, n: int) -> None:
        with self._changed:
            self._pending -= n

    # The methods below run in the service's thread.

    def _run(self) -> None:
        error: ServiceError = Closed("the server is shutting down")
        try:
            while self._take_up():
                if self._to_score:
                    # Begin one prompt between two ticks, so that running answers don't stall.
                    self._score(*self._to_score.popleft())
                for piece in self._speaker.tick():
                    self._hand_out(piece)
                self._end_overdue()
        except Exception as failure:
            log.exception("the engine has failed; restart the server, which answers nothing until then")
            error = Broken(f"the engine has failed ({type(failure).__name__}): see the server's log, and restart the server")
        with self._changed:
            # `submit` refuses from here on, so nothing arrives that would stay unanswered.
            self._has_ended = True
            if self._refusal is None or isinstance(error, Broken):
                self._refusal = error
            left = list(self._open)
        for submission in left:
            self._close(submission)
            submission.deliver(error)

    def _take_up(self) -> bool:
        """Wait for work and pass it to the engine. Returns False once the service is closing."""
        with self._changed:
            while not (self._arrived or self._cancelled or self._is_closing or self._to_score or self._speaker.busy):
                self._changed.wait()
            if self._is_closing:
                return False
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, []
        for submission in arrived:
            for prompt in range(len(submission.requests)):
                if submission.scored:
                    self._to_score.append((submission, prompt))
                else:
                    self._begin(submission, prompt)
        for submission in cancelled:
            self._forget(submission)
        return True

    def _begin(self, submission: Submission, prompt: int) -> None:
        for sample in range(submission.samples):
            request = dataclasses.replace(submission.requests[prompt], sample=sample)
            number = self._speaker.submit(request, submission.options.stop)
            submission.indices[number] = prompt * submission.samples + sample
            self._by_number[number] = submission

    def _score(self, submission: Submission, prompt: int) -> None:
        tokens = self.responder.token_scores(submission.requests[prompt].prompt, submission.options)
        self._begin(submission, prompt)
        if not submission.samples:
            self._end_one(submission)
        submission.deliver(PromptScores(prompt, tokens))

    def _hand_out(self, piece: Piece) -> None:
        submission = self._by_number[piece.request]
        delta = ChoiceDelta(submission.indices[piece.request], piece)
        if piece.answer is not None:
            del self._by_number[piece.request], submission.indices[piece.request]
            self._end_one(submission)
        submission.deliver(delta)

    def _end_one(self, submission: Submission) -> None:
        submission.unfinished -= 1
        self._release(1)
        if not submission.unfinished:
            self._close(submission)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        unfinished = {*self._by_number.values(), *(one for one, _ in self._to_score)}
        for submission in {one for one in unfinished if one.deadline < now}:
            self._forget(submission)
            submission.deliver(TimedOut(f"the answer was not ready {self.timeout:g} s after its request"))

    def _forget(self, submission: Submission) -> None:
        """Remove a submission's unfinished answers from the engine."""
        self._to_score = deque(waiting for waiting in self._to_score if waiting[0] is not submission)
        for number in submission.indices:
            self._speaker.cancel(number)
            del self._by_number[number]
        submission.indices.clear()
        self._close(submission)

    def _close(self, submission: Submission) -> None:
        """End a submission; its unfinished answers no longer count as pending. May be repeated."""
        with self._changed:
            self._open.discard(submission)
            self._pending -= submission.unfinished
            submission.unfinished = 0
