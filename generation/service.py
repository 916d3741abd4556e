"""Answers for many callers at once: one thread owns the model, any thread may ask, and every answer asked for comes to an end.

Knows nothing of HTTP. What is bounded here: the answers in the house, the time each may take, the keys and values.
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
    """Why there is no answer, or no more of one."""


class Full(ServiceError):
    """Too many answers wait already; later there will be room."""


class TimedOut(ServiceError):
    """An answer took longer than any may."""


class Closed(ServiceError):
    """The service ends."""


class Broken(ServiceError):
    """The thread that owns the model has failed. It doesn't come back."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of one of the answers to some prompts."""

    place: int
    """Of the answer: those to the first prompt come first, sample by sample."""
    piece: Piece


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The ids of one of the prompts, all but its BOS, with their log p. It comes before the answers to that prompt."""

    prompt: int
    tokens: list[Token]


Event = Part | PromptScores

Deliver = Callable[[Event | ServiceError], None]
"""Takes what comes of a submission, on the service's thread: it must return at once and not raise."""


@dataclass(eq=False)
class Submission:
    """Answers to some prompts, waiting or in work. Callers only hand it back to `Service.cancel`."""

    requests: list[Request]
    """One for each prompt."""
    samples: int
    """Answers to each prompt; 0: the prompts are only scored."""
    options: Options
    scored: bool
    deliver: Deliver
    deadline: float
    """On the clock of time.monotonic."""
    unfinished: int
    """Answers, or prompts that are only scored, that are still to come. Changed by the service's thread alone."""
    places: dict[int, int] = field(default_factory=dict)
    """Of each of its requests in the engine, by number: the answer's place. Used by the service's thread alone."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, openings of answers included."""
        return sum(len(request.prompt.ids) for request in self.requests)


class Service:
    """A `Speaker` for the full context, in a thread of its own."""

    def __init__(self, responder: Responder, *, queue: int, timeout: float) -> None:
        """`queue` answers may wait for those in work; each must end `timeout` seconds after it was asked for.

        Raises UsageError if the keys and values of one row of the whole context are over the responder's budget.
        """
        self.responder = responder
        self.timeout = timeout
        act_steps = responder.options.act_steps
        self.rows = rows_that_fit(responder.model, act_steps, responder.context, responder.kv_budget_gb, responder.rows)
        self.cache_bytes = cache_bytes(responder.model, act_steps, self.rows, responder.context)
        self.capacity = self.rows + queue
        """Most answers waiting and in work."""
        self._speaker = Speaker(responder, rows=self.rows, positions=responder.context)
        self._by_number: dict[int, Submission] = {}
        self._to_score: deque[tuple[Submission, int]] = deque()
        self._changed = threading.Condition()
        # What follows is guarded by that lock.
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
        """Answers waiting and in work."""
        return self._pending

    @property
    def running(self) -> int:
        """Answers in work."""
        return self._speaker.running

    @property
    def refusal(self) -> ServiceError | None:
        """Why nothing is taken up any more; None while it is."""
        return self._refusal

    def submit(
        self, prompts: Sequence[Callable[[], Prompt]], options: Options, samples: int, deliver: Deliver, *, scored: bool = False
    ) -> Submission:
        """Ask for answers to prompts, `samples` to each; `scored`: for the log p of the prompts' ids, too, or (0 samples) alone.

        `deliver` gets scores and parts of answers, the last of each with the `Answer`, or one error. Each of `prompts` encodes one,
        in the caller's thread. Raises UsageError for a prompt longer than the context, Full when there is no room for so many more
        answers, Closed or Broken when nothing is taken up any more.
        """
        deadline = time.monotonic() + self.timeout
        n = len(prompts) * max(1, samples)
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            if self._pending + n > self.capacity:
                raise Full(
                    f"{self._pending} of at most {self.capacity} answers are waiting or in work: no room for {n} more, try later"
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
        """The caller wants no more: rows and places of what is unfinished are free before the next tick. May be repeated."""
        with self._changed:
            self._cancelled.append(submission)
            self._changed.notify()

    def drain(self) -> None:
        """Take up nothing more; what was taken up goes on."""
        with self._changed:
            self._refusal = self._refusal or Closed("the server is shutting down")

    def close(self) -> None:
        """End the thread after the tick it is in; what is unfinished gets `Closed`. May be repeated."""
        self.drain()
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _release(self, n: int) -> None:
        with self._changed:
            self._pending -= n

    # From here on, the service's own thread.

    def _run(self) -> None:
        error: ServiceError = Closed("the server is shutting down")
        try:
            while self._take_up():
                if self._to_score:
                    # One between two ticks, so that answers in work go on.
                    self._score(*self._to_score.popleft())
                for piece in self._speaker.tick():
                    self._hand_out(piece)
                self._end_overdue()
        except Exception as failure:
            log.exception("the engine has failed; nothing is answered until the server is started again")
            error = Broken(
                f"the engine has failed ({type(failure).__name__}): the server's log says more, and it must be restarted"
            )
        with self._changed:
            # From here on `submit` refuses, so nothing arrives that nobody would answer.
            self._has_ended = True
            if self._refusal is None or isinstance(error, Broken):
                self._refusal = error
            left = list(self._open)
        for submission in left:
            self._close(submission)
            submission.deliver(error)

    def _take_up(self) -> bool:
        """Wait until there is something to do and hand it to the engine. False: the end."""
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
            submission.places[number] = prompt * submission.samples + sample
            self._by_number[number] = submission

    def _score(self, submission: Submission, prompt: int) -> None:
        tokens = self.responder.token_scores(submission.requests[prompt].prompt, submission.options)
        self._begin(submission, prompt)
        if not submission.samples:
            self._end_one(submission)
        submission.deliver(PromptScores(prompt, tokens))

    def _hand_out(self, piece: Piece) -> None:
        submission = self._by_number[piece.request]
        part = Part(submission.places[piece.request], piece)
        if piece.answer is not None:
            del self._by_number[piece.request], submission.places[piece.request]
            self._end_one(submission)
        submission.deliver(part)

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
            submission.deliver(TimedOut(f"the answer was not ready {self.timeout:g} s after it was asked for"))

    def _forget(self, submission: Submission) -> None:
        """Take what is unfinished of a submission out of the engine."""
        self._to_score = deque(waiting for waiting in self._to_score if waiting[0] is not submission)
        for number in submission.places:
            self._speaker.cancel(number)
            del self._by_number[number]
        submission.places.clear()
        self._close(submission)

    def _close(self, submission: Submission) -> None:
        """Nothing more comes of a submission; the places of what is unfinished are free. May be repeated."""
        with self._changed:
            self._open.discard(submission)
            self._pending -= submission.unfinished
            submission.unfinished = 0
