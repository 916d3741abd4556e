"""Answers for many callers at once: one thread owns the model, any thread may submit prompts, and every answer ends.

Knows nothing of HTTP. Bounds the answers that wait and run, the time of each, and the keys and values.
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
    """Too many answers are waiting; there will be room later."""


class TimedOut(ServiceError):
    """An answer took longer than the limit."""


class Closed(ServiceError):
    """The service has been closed."""


class Broken(ServiceError):
    """The thread that owns the model has failed, for good."""


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """The next piece of one of a submission's answers."""

    index: int
    """Number of the answer: sample by sample, first those to the first prompt."""
    piece: Piece


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The ids of one of the prompts, without its BOS, with their log p. Delivered before the answers to that prompt."""

    prompt: int
    tokens: list[Token]


Event = ChoiceDelta | PromptScores

Deliver = Callable[[Event | ServiceError], None]
"""Receives the events of a submission, on the service's thread: it must return at once and not raise."""


@dataclass(eq=False)
class Submission:
    """Prompts whose answers are waiting or running. Callers only pass it to `Service.cancel`."""

    requests: list[Request]
    """One for each prompt."""
    samples: int
    """Answers to each prompt; 0: prompts are only scored."""
    options: Options
    scored: bool
    deliver: Deliver
    deadline: float
    """On the clock of time.monotonic."""
    unfinished: int
    """Answers, or prompts that are only scored, still to come. Changed by the service's thread alone."""
    indices: dict[int, int] = field(default_factory=dict)
    """The answer's index by the number of its request in the engine. Used by the service's thread alone."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, openings of answers included."""
        return sum(len(request.prompt.ids) for request in self.requests)


class Service:
    """A `Speaker` for the full context, in a thread of its own."""

    def __init__(self, responder: Responder, *, queue: int, timeout: float) -> None:
        """`queue` answers may wait for those that are running; each must end `timeout` seconds after it was submitted.

        Raises UsageError if the keys and values of one row of the whole context are over the responder's budget.
        """
        self.responder = responder
        self.timeout = timeout
        act_steps = responder.options.act_steps
        self.rows = rows_that_fit(responder.model, act_steps, responder.context, responder.kv_budget_gb, responder.rows)
        self.cache_bytes = cache_bytes(responder.model, act_steps, self.rows, responder.context)
        self.capacity = self.rows + queue
        """Most answers waiting and running."""
        self._speaker = Speaker(responder, rows=self.rows, positions=responder.context)
        self._by_number: dict[int, Submission] = {}
        self._to_score: deque[tuple[Submission, int]] = deque()
        self._changed = threading.Condition()
        # Guarded by that lock:
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
        """Answers waiting and running."""
        return self._pending

    @property
    def running(self) -> int:
        """Answers running."""
        return self._speaker.running

    @property
    def refusal(self) -> ServiceError | None:
        """Why no submission is accepted any more; None while they are."""
        return self._refusal

    def submit(
        self, prompts: Sequence[Callable[[], Prompt]], options: Options, samples: int, deliver: Deliver, *, scored: bool = False
    ) -> Submission:
        """Submit prompts for `samples` answers each. `scored`: also for the log p of the prompts' ids (0 samples: only for that).

        `deliver` receives scores and pieces of answers, the last piece of each with the `Answer`; or one error. Each of `prompts`
        encodes one, in the caller's thread. Raises UsageError for a prompt longer than the context, Full if there is no room for
        so many more answers, Closed or Broken once no submission is accepted any more.
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
        """Drop what is unfinished: its rows are free before the next tick. May be repeated."""
        with self._changed:
            self._cancelled.append(submission)
            self._changed.notify()

    def drain(self) -> None:
        """Accept no further submission; those accepted are finished."""
        with self._changed:
            self._refusal = self._refusal or Closed("the server is shutting down")

    def close(self) -> None:
        """End the thread after its current tick; what is unfinished gets `Closed`. May be repeated."""
        self.drain()
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _release(self, n: int) -> None:
        with self._changed:
            self._pending -= n

    # From here on: the service's own thread.

    def _run(self) -> None:
        error: ServiceError = Closed("the server is shutting down")
        try:
            while self._take_up():
                if self._to_score:
                    # One prompt between two ticks, so that running answers don't stall.
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
            # From here on `submit` refuses, so nothing arrives that would never be answered.
            self._has_ended = True
            if self._refusal is None or isinstance(error, Broken):
                self._refusal = error
            left = list(self._open)
        for submission in left:
            self._close(submission)
            submission.deliver(error)

    def _take_up(self) -> bool:
        """Wait for work and hand it to the engine. Returns False once the service is closing."""
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
            submission.deliver(TimedOut(f"the answer was not ready {self.timeout:g} s after it was asked for"))

    def _forget(self, submission: Submission) -> None:
        """Remove what is unfinished of a submission from the engine."""
        self._to_score = deque(waiting for waiting in self._to_score if waiting[0] is not submission)
        for number in submission.indices:
            self._speaker.cancel(number)
            del self._by_number[number]
        submission.indices.clear()
        self._close(submission)

    def _close(self, submission: Submission) -> None:
        """End a submission; what is unfinished no longer counts as pending. May be repeated."""
        with self._changed:
            self._open.discard(submission)
            self._pending -= submission.unfinished
            submission.unfinished = 0
