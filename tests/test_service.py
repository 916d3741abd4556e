"""One engine answers for many: every answer asked for comes or is refused with a reason, whoever leaves, fails or closes."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.conversation import Template, Turn
from dataset.text.tokenizer import Tokenizer
from generation.answers import Options, Responder, Speaker
from generation.engine import Prompt
from generation.sampling import Sampling
from generation.service import Broken, ChoiceDelta, Closed, Event, Full, PromptScores, Service, ServiceError, Submission, TimedOut

pytestmark = pytest.mark.anyio
QUESTION = (Turn("user", "What is 2 plus 3"),)
OPTIONS = Options(max_output_tokens=6, act_steps=2, sampling=Sampling(temperature=1.0, seed=3))
WAIT = 20.0


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., Any], tiny_tokenizer: Tokenizer) -> Responder:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    return Responder(model, tiny_tokenizer, Template(), context=64, options=OPTIONS, rows=2, kv_budget_gb=1.0)


@pytest.fixture
async def serve(responder: Responder) -> AsyncIterator[Callable[..., Service]]:
    """`serve(queue=3)`: a service with 2 rows, closed after the test."""
    opened = []

    def build(queue: int = 8, timeout: float = 60.0, **changes: Any) -> Service:
        opened.append(Service(replace(responder, **changes), queue=queue, timeout=timeout))
        return opened[-1]

    yield build
    for service in opened:
        await service.close()


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


async def ask(service: Service, n: int = 1, options: Options = OPTIONS) -> Submission:
    return await service.submit([partial(service.responder.prompt, QUESTION)], options, n)


async def end(service: Service, submission: Submission) -> list[Event] | ServiceError:
    """All events of a submission, or the error that ended them."""
    try:
        async with asyncio.timeout(WAIT):
            return [event async for event in service.events(submission, WAIT) if event is not None]
    except ServiceError as error:
        return error


async def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        await asyncio.sleep(0.005)


async def test_answers_are_those_of_the_responder_sample_by_sample(serve: Callable[..., Service], responder: Responder) -> None:
    service = serve()
    submissions = [await ask(service, n=3) for _ in range(3)]
    expected = [[piece.text for piece in responder.stream(QUESTION, sample)] for sample in range(3)]
    assert expected[0] != expected[1]
    for submission in submissions:
        parts = await end(service, submission)
        assert isinstance(parts, list)
        assert [[part.piece.text for part in parts if part.index == sample] for sample in range(3)] == expected
    assert service.pending == 0


async def test_what_has_no_place_is_refused_at_once_and_a_finished_answer_makes_room(
    serve: Callable[..., Service], held: threading.Semaphore
) -> None:
    service = serve(queue=3)
    assert service.capacity == 5
    first = await ask(service, n=4)
    with pytest.raises(Full, match="4 of at most 5 answers are waiting or running: no room for 2 more"):
        await ask(service, n=2)
    second = await ask(service)
    held.release(100)
    for submission in (first, second):
        assert isinstance(await end(service, submission), list)
    assert isinstance(await end(service, await ask(service, n=5)), list)


async def test_a_prompt_that_is_too_long_is_the_callers_error_and_keeps_no_place(serve: Callable[..., Service]) -> None:
    service = serve()
    with pytest.raises(UsageError, match="the context holds 64"):
        await service.submit([partial(service.responder.prompt, (Turn("user", "plus " * 100),))], OPTIONS, 1)
    assert service.pending == 0


async def test_who_leaves_frees_rows_and_places(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve(queue=2)
    first = await ask(service, n=2)
    second = await ask(service, n=2)
    held.release(3)
    await wait_for(lambda: not first.events.empty())
    for submission in (first, second, first):
        service.cancel(submission)
    assert service.pending == 0 and service._speaker.busy
    held.release(1)
    await wait_for(lambda: not service._speaker.busy)
    held.release(100)
    assert isinstance(await end(service, await ask(service)), list)
    assert second.events.empty() and service._speaker.running == 0
    service.cancel(first)
    assert isinstance(await end(service, await ask(service)), list)


async def test_an_answer_that_takes_too_long_ends_waiting_or_in_work(
    serve: Callable[..., Service], held: threading.Semaphore
) -> None:
    service = serve(timeout=0.1)
    submissions = [await ask(service, n=2) for _ in range(2)]
    held.release(2)
    for submission in submissions:
        ended = await end(service, submission)
        assert isinstance(ended, TimedOut) and "not ready 0.1 s after" in str(ended)
        service.cancel(submission)
    assert service.pending == 0


async def test_a_caller_that_reads_slowly_gets_no_more_time(serve: Callable[..., Service]) -> None:
    service = serve(timeout=0.3)
    submission = await ask(service, n=4)
    submission.unfinished += 1  # as if one more answer were in work
    with pytest.raises(TimedOut):
        async with asyncio.timeout(WAIT):
            async for _ in service.events(submission, 0.1):
                await asyncio.sleep(0.1)
    submission.unfinished -= 1


async def test_prompts_are_scored_before_their_answers_and_give_their_places_back(
    serve: Callable[..., Service], responder: Responder
) -> None:
    service = serve()
    texts = ("Red", "What is 2")
    prompts = [partial(responder.begun_prompt, (Turn("text", text),)) for text in texts]
    for samples in (0, 2):
        arrived = (await service.submit(prompts, OPTIONS, samples, scored=True)).events
        await wait_for(lambda: service.pending == 0)
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


async def test_prompts_that_wait_for_their_scores_end_with_their_caller_and_in_time(
    serve: Callable[..., Service], responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(timeout=0.2)
    real, begun, scored = Responder.token_scores, threading.Event(), []

    def score(*arguments: Any) -> Any:
        begun.set()
        scored.append(arguments)
        time.sleep(0.15)
        return real(*arguments)

    monkeypatch.setattr(Responder, "token_scores", score)
    prompts = [partial(responder.begun_prompt, (Turn("text", "Red"),))] * 8
    left = await service.submit(prompts, OPTIONS, 0, scored=True)
    await wait_for(begun.is_set)
    service.cancel(left)
    assert service.pending == 0 and left.events.qsize() < len(prompts)
    await asyncio.sleep(0.4)
    assert len(scored) == 1
    late = await service.submit(prompts, OPTIONS, 0, scored=True)
    assert isinstance(await end(service, late), TimedOut)
    service.cancel(late)
    assert service.pending == 0


async def test_answers_do_not_wait_for_the_scores_of_others(
    serve: Callable[..., Service], responder: Responder, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve(queue=40)
    real, scored = Responder.token_scores, []

    def score(*arguments: Any) -> Any:
        scored.append(arguments)
        time.sleep(0.02)
        return real(*arguments)

    monkeypatch.setattr(Responder, "token_scores", score)
    prompts = [partial(responder.begun_prompt, (Turn("text", "Red"),))] * 30
    await service.submit(prompts, OPTIONS, 0, scored=True)
    assert isinstance(await end(service, await ask(service)), list)
    assert len(scored) < len(prompts)


async def test_a_failure_of_the_engine_fails_everyone_with_a_reason(
    serve: Callable[..., Service], held: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    submissions = [await ask(service) for _ in range(4)]

    def fail(self: Speaker) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("generation.engine.Engine.tick", fail)
    held.release(1)
    for submission in submissions:
        ended = await end(service, submission)
        assert isinstance(ended, Broken) and "RuntimeError" in str(ended)
    assert isinstance(service.refusal, Broken) and service.pending == 0
    with pytest.raises(Broken):
        await ask(service)
    await service.close()
    assert isinstance(service.refusal, Broken)


async def test_closing_ends_what_is_unfinished_and_takes_up_nothing(
    serve: Callable[..., Service], held: threading.Semaphore
) -> None:
    service = serve()
    submissions = [await ask(service) for _ in range(4)]
    held.release(2)
    threading.Timer(0.05, held.release, (5,)).start()
    await service.close()
    await service.close()
    assert all([isinstance(await end(service, submission), Closed) for submission in submissions]) and service.pending == 0
    with pytest.raises(Closed, match="shutting down"):
        await ask(service)


async def test_draining_lets_answers_in_work_end(serve: Callable[..., Service], held: threading.Semaphore) -> None:
    service = serve()
    submission = await ask(service, n=4)
    is_encoded = threading.Event()

    def encode_slowly() -> Prompt:
        is_encoded.wait(WAIT)
        return service.responder.prompt(QUESTION)

    encoding = asyncio.create_task(service.submit([encode_slowly], OPTIONS, 1))
    await wait_for(lambda: service.pending == 5)
    service.drain()
    is_encoded.set()
    with pytest.raises(Closed):
        await ask(service)
    held.release(100)
    for accepted in (submission, await encoding):
        assert isinstance(await end(service, accepted), list)


async def test_the_whole_context_must_fit_the_budget(serve: Callable[..., Service]) -> None:
    service = serve()
    assert service.rows == 2
    one_row = service.cache_bytes / 2 / 1e9
    assert serve(kv_budget_gb=1.5 * one_row).rows == 1
    with pytest.raises(UsageError, match="no room for one row"):
        serve(kv_budget_gb=0.5 * one_row)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.tuples(st.integers(1, 3), st.sampled_from(["stay", "leave", "leave twice"])), min_size=1, max_size=8))
async def test_whoever_comes_and_goes_every_place_is_free_in_the_end(responder: Responder, plan: list[tuple[int, str]]) -> None:
    service = Service(responder, queue=6, timeout=60)
    staying = []
    for n, what in plan:
        try:
            submission = await ask(service, n)
        except Full:
            continue
        if what == "stay":
            staying.append(submission)
        for _ in range(what.count("leave") + what.count("twice")):
            service.cancel(submission)
    for submission in staying:
        assert isinstance(await end(service, submission), list)
    await wait_for(lambda: service.pending == 0)
    await service.close()
