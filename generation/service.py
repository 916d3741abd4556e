"""Answers for many callers at once: one thread owns the model, any thread may ask, and every answer asked for comes to an end.

Knows nothing of HTTP. What is bounded here: the answers in the house, the time each may take, the keys and values.
"""

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from dataset.text.conversation import Conversation
from generation.answers import Options, Piece, Responder, Speaker
from generation.engine import Request, cache_bytes, rows_that_fit

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
    """A piece of one of the answers to a conversation."""

    sample: int
    piece: Piece


Deliver = Callable[[Part | ServiceError], None]
"""Takes what comes of a submission, on the service's thread: it must return at once and not raise."""


@dataclass(eq=False)
class Submission:
    """Answers to one conversation, waiting or in work. Callers only hand it back to `Service.cancel`."""

    request: Request
    stop: tuple[str, ...]
    deliver: Deliver
    deadline: float
    """On the clock of time.monotonic."""
    unfinished: int
    """Answers that are still to come. Changed by the service's thread alone."""
    samples: dict[int, int] = field(default_factory=dict)
    """Of each of its requests in the engine, by number: which sample it is. Used by the service's thread alone."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the conversation with the opening of its answer."""
        return len(self.request.prompt.ids)


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
    def refusal(self) -> ServiceError | None:
        """Why nothing is taken up any more; None while it is."""
        return self._refusal

    def submit(self, conversation: Conversation, options: Options, n: int, deliver: Deliver) -> Submission:
        """Ask for `n` answers to a conversation. `deliver` gets their parts, the last of each with the `Answer`, or one error.

        Encodes in the caller's thread. Raises UsageError for a prompt longer than the context, Full when there is no room for n
        more answers, Closed or Broken when nothing is taken up any more.
        """
        deadline = time.monotonic() + self.timeout
        with self._changed:
            if self._refusal is not None:
                raise self._refusal
            if self._pending + n > self.capacity:
                raise Full(
                    f"{self._pending} of at most {self.capacity} answers are waiting or in work: no room for {n} more, try later"
                )
            self._pending += n
        try:
            request = self.responder.request(conversation, options)
        except BaseException:
            self._release(n)
            raise
        submission = Submission(request, options.stop, deliver, deadline, unfinished=n)
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
            while not (self._arrived or self._cancelled or self._is_closing or self._speaker.busy):
                self._changed.wait()
            if self._is_closing:
                return False
            arrived, self._arrived = self._arrived, deque()
            cancelled, self._cancelled = self._cancelled, []
        for submission in arrived:
            for sample in range(submission.unfinished):
                number = self._speaker.submit(dataclasses.replace(submission.request, sample=sample), submission.stop)
                submission.samples[number] = sample
                self._by_number[number] = submission
        for submission in cancelled:
            self._forget(submission)
        return True

    def _hand_out(self, piece: Piece) -> None:
        submission = self._by_number[piece.request]
        part = Part(submission.samples[piece.request], piece)
        if piece.answer is not None:
            del self._by_number[piece.request], submission.samples[piece.request]
            submission.unfinished -= 1
            self._release(1)
            if not submission.unfinished:
                self._close(submission)
        submission.deliver(part)

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for submission in {one for one in self._by_number.values() if one.deadline < now}:
            self._forget(submission)
            submission.deliver(TimedOut(f"the answer was not ready {self.timeout:g} s after it was asked for"))

    def _forget(self, submission: Submission) -> None:
        """Take what is unfinished of a submission out of the engine."""
        for number in submission.samples:
            self._speaker.cancel(number)
            del self._by_number[number]
        submission.samples.clear()
        self._close(submission)

    def _close(self, submission: Submission) -> None:
        """Nothing more comes of a submission; the places of what is unfinished are free. May be repeated."""
        with self._changed:
            self._open.discard(submission)
            self._pending -= submission.unfinished
            submission.unfinished = 0
