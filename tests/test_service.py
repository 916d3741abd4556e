"""One thread answers for many: every answer asked for comes or is refused with a reason, whoever leaves, fails or closes."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.conversation import Template, Turn
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder, Speaker
from generation.sampling import Sampling
from generation.service import Broken, ChoiceDelta, Closed, Event, Full, PromptScores, Service, ServiceError, Submission, TimedOut

QUESTION = (Turn("user", "What is 2 plus 3"),)
OPTIONS = Options(max_output_tokens=6, act_steps=2, sampling=Sampling(temperature=1.0, seed=3))
WAIT = 20.0


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> Responder:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    return Responder(model, tiny_tokenizer, Template(), context=64, options=OPTIONS, rows=2, kv_budget_gb=1.0)


@pytest.fixture
def serve(responder: Responder) -> Iterator[Callable[..., Service]]:
    """`serve(queue=3)`: a service with 2 rows, closed after the test."""
    opened = []

    def build(queue: int = 8, timeout: float = 60.0, **changes: Any) -> Service:
        opened.append(Service(replace(responder, **changes), queue=queue, timeout=timeout))
        return opened[-1]

    yield build
    for service in opened:
        service.close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """The engine takes a tick for each release of this; at the end it runs freely."""
    ticks = threading.Semaphore(0)
    free = threading.Event()
    real = Speaker.tick

    def tick(self: Speaker) -> Any:
        while not free.is_set() and not ticks.acquire(timeout=0.01):
            pass
        return real(self)

    monkeypatch.setattr(Speaker, "tick", tick)
    yield ticks
    free.set()


@dataclass
class Inbox:
    """What came of a submission."""

    arrived: "queue.Queue[ChoiceDelta | ServiceError]" = field(default_factory=queue.Queue)

    def end(self, n: int = 1) -> list[ChoiceDelta] | ServiceError:
        """All parts of n answers, or the error that ended them."""
        parts: list[ChoiceDelta] = []
        while sum(part.piece.answer is not None for part in parts) < n:
            event = self.arrived.get(timeout=WAIT)
            if isinstance(event, ServiceError):
                return event
            parts.append(event)
        return parts


def ask(service: Service, n: int = 1, options: Options = OPTIONS) -> tuple[Inbox, Submission]:
    inbox = Inbox()
    return inbox, service.submit([partial(service.responder.prompt, QUESTION)], options, n, inbox.arrived.put)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def test_answers_are_those_of_the_responder_sample_by_sample(serve: Callable[..., Service], responder: Responder) -> None:
    service = serve()
    inboxes = [ask(service, n=3)[0] for _ in range(3)]
    expected = [[piece.text for piece in responder.stream(QUESTION, sample)] for sample in range(3)]
    assert expected[0] != expected[1]
    for inbox in inboxes:
        parts = inbox.end(n=3)
        assert isinstance(parts, list)
        assert [[part.piece.text for part in parts if part.index == sample] for sample in range(3)] == expected
    assert service.pending == 0


def test_what_has_no_place_is_refused_at_once_and_a_finished_answer_makes_room(
    serve: Callable[..., Service], held: threading.Semaphore
) -> None:
    service = serve(queue=3)
    assert service.capacity == 5
    first, _ = ask(service, n=4)
    with pytest.raises(Full, match="4 of at most 5 answers are waiting or running: no room for 2 more"):
        ask(service, n=2)
    second, _ = ask(service)
    held.release(100)
    assert isinstance(first.end(n=4), list) and isinstance(second.end(), list)
    assert isinstance(ask(service, n=5)[0].end(n=5), list)


def test_a_prompt_that_is_too_long_is_the_callers_error_and_keeps_no_place(serve: Callable[..., Service]) -> None:
    service = serve()
    with pytest.raises(UsageError, match="the context holds 64"):
        service.submit([partial(service.responder.prompt, (Turn("user", "plus " * 100),))], OPTIONS, 1, Inbox().arrived.put)
    assert service.pending == 0


def test_who_leaves_frees_rows_and_places(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve(queue=2)
    in_work, first = ask(service, n=2)
    waiting, second = ask(service, n=2)
    held.release(3)
    wait_for(lambda: not in_work.arrived.empty())
    for submission in (first, second, first):
        service.cancel(submission)
    held.release(100)
    wait_for(lambda: service.pending == 0)
    assert isinstance(ask(service)[0].end(), list)
    assert waiting.arrived.empty()
    service.cancel(first)
    assert isinstance(ask(service)[0].end(), list)


def test_an_answer_that_takes_too_long_ends_waiting_or_in_work(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve(timeout=0.1)
    inboxes = [ask(service, n=2)[0] for _ in range(2)]
    time.sleep(0.15)
    held.release(2)
    for inbox in inboxes:
        ended = inbox.end(n=2)
        assert isinstance(ended, TimedOut) and "not ready 0.1 s after" in str(ended)
    assert service.pending == 0


def test_prompts_are_scored_before_their_answers_and_give_their_places_back(
    serve: Callable[..., Service], responder: Responder
) -> None:
    service = serve()
    texts = ("Red", "What is 2")
    prompts = [partial(responder.begun_prompt, (Turn("text", text),)) for text in texts]
    for samples in (0, 2):
        arrived: queue.Queue[Event | ServiceError] = queue.Queue()
        service.submit(prompts, OPTIONS, samples, arrived.put, scored=True)
        wait_for(lambda: service.pending == 0)
        events = [arrived.get_nowait() for _ in range(arrived.qsize())]
        scored = {event.prompt: event.tokens for event in events if isinstance(event, PromptScores)}
        assert [scored[place] for place in (0, 1)] == [responder.token_scores(encode(), OPTIONS) for encode in prompts]
        seen = set()
        for event in events:
            if isinstance(event, ChoiceDelta):
                assert event.index // 2 in seen, "the scores of its prompt came first"
            elif isinstance(event, PromptScores):
                seen.add(event.prompt)
        assert {event.index for event in events if isinstance(event, ChoiceDelta)} == set(range(2 * samples))


def test_prompts_that_wait_for_their_scores_end_with_their_caller_and_in_time(
    serve: Callable[..., Service], responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(timeout=0.2)
    real, begun = Responder.token_scores, threading.Event()

    def score(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.15)
        return real(*arguments)

    monkeypatch.setattr(Responder, "token_scores", score)
    prompts = [partial(responder.begun_prompt, (Turn("text", "Red"),))] * 8
    left: queue.Queue[Event | ServiceError] = queue.Queue()
    submission = service.submit(prompts, OPTIONS, 0, left.put, scored=True)
    assert begun.wait(WAIT)
    service.cancel(submission)
    wait_for(lambda: service.pending == 0)
    assert left.qsize() < len(prompts)
    late: queue.Queue[Event | ServiceError] = queue.Queue()
    service.submit(prompts, OPTIONS, 0, late.put, scored=True)
    wait_for(lambda: service.pending == 0)
    events = [late.get_nowait() for _ in range(late.qsize())]
    assert isinstance(events[-1], TimedOut) and len(events) < len(prompts)


def test_a_failure_of_the_engine_fails_everyone_with_a_reason(
    serve: Callable[..., Service], held: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    inboxes = [ask(service)[0] for _ in range(4)]

    def fail(self: Speaker) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("generation.engine.Engine.tick", fail)
    held.release(1)
    for inbox in inboxes:
        ended = inbox.end()
        assert isinstance(ended, Broken) and "RuntimeError" in str(ended)
    assert isinstance(service.refusal, Broken) and service.pending == 0
    with pytest.raises(Broken):
        ask(service)
    service.close()
    assert isinstance(service.refusal, Broken)


def test_closing_ends_what_is_unfinished_and_takes_up_nothing(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve()
    inboxes = [ask(service)[0] for _ in range(4)]
    held.release(2)
    threading.Timer(0.05, held.release, (5,)).start()
    service.close()
    service.close()
    assert all(isinstance(inbox.end(), Closed) for inbox in inboxes) and service.pending == 0
    with pytest.raises(Closed, match="shutting down"):
        ask(service)


def test_draining_lets_answers_in_work_end(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve()
    inbox, _ = ask(service, n=4)
    service.drain()
    with pytest.raises(Closed):
        ask(service)
    held.release(100)
    assert isinstance(inbox.end(n=4), list)


def test_the_whole_context_must_fit_the_budget(serve: Callable[..., Service]) -> None:
    service = serve()
    assert service.rows == 2
    one_row = service.cache_bytes / 2 / 1e9
    assert serve(kv_budget_gb=1.5 * one_row).rows == 1
    with pytest.raises(UsageError, match="no room for one row"):
        serve(kv_budget_gb=0.5 * one_row)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["stay", "leave", "leave twice"])), min_size=1, max_size=8))
def test_whoever_comes_and_goes_every_place_is_free_in_the_end(responder: Responder, plan: list[tuple[int, str]]) -> None:
    service = Service(responder, queue=6, timeout=60)
    staying = []
    for n, what in plan:
        try:
            inbox, submission = ask(service, n)
        except Full:
            continue
        if what == "stay":
            staying.append((inbox, n))
        for _ in range(what.count("leave") + what.count("twice")):
            service.cancel(submission)
    for inbox, n in staying:
        assert isinstance(inbox.end(n), list)
    wait_for(lambda: service.pending == 0)
    service.close()
