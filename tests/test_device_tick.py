"""Ticks of fixed shape say what the engine's own ticks say, and what can't be recorded runs as it is."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from generation.device_tick import run_and_record
from generation.engine import Engine, Request, Token
from generation.sampling import Sampling
from models.act import RecursiveModel
from tests.test_engine import EACH_RECURSION, NEVER, SAMPLED, VOCABULARY, decode, make_prompts, requests_for

ModelFactory = Callable[..., RecursiveModel]


class Recordings:
    """As CUDA records: the function doesn't run when it is recorded, and its tensors are those of that moment ever after."""

    def __init__(self) -> None:
        self.replays: list[int] = []

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        number = len(self.replays)
        self.replays.append(0)

        def replay() -> None:
            self.replays[number] += 1
            function()

        return replay


def essence(answers: list[list[Token]]) -> list[list[tuple[object, ...]]]:
    return [[(token.id, token.act_steps, token.finish) for token in tokens] for tokens in answers]


def assert_same(found: list[list[Token]], expected: list[list[Token]], tolerance: float = 1e-9) -> None:
    assert essence(found) == essence(expected)
    for got, wanted in zip(found, expected, strict=True):
        assert [token.logp for token in got] == pytest.approx([token.logp for token in wanted], abs=tolerance)


@pytest.mark.parametrize("kind", ["greedy", "sampled", "mixed"])
@pytest.mark.parametrize("threshold", [None, 0.5], ids=["fixed", "halting"])
def test_64_uneven_requests_get_what_the_engine_gives(tiny_model: ModelFactory, kind: str, threshold: float | None) -> None:
    model = tiny_model("arch.attention=prefix", "arch.H_cycles=1", "arch.L_cycles=1", halt_scale=3.0, seed=3)
    rng = np.random.default_rng(1)
    requests = []
    for number, prompt in enumerate(make_prompts(rng.integers(1, 80, 64).tolist())):
        is_sampled = kind == "sampled" or (kind == "mixed" and number % 16 == 3)
        sampling = Sampling(seed=number, **(SAMPLED if is_sampled else {}))  # type: ignore[arg-type]
        requests.append(Request(prompt, int(rng.integers(1, 6)), sampling, halt_threshold=threshold))
    expected = decode(model, requests, act_steps=4, rows=64)
    if threshold is not None:
        assert len({token.act_steps for tokens in expected for token in tokens}) >= 3, "tokens must halt at different steps"
    for rows in (64, 7):
        recordings = Recordings()
        assert_same(decode(model, requests, act_steps=4, rows=rows, record=recordings), expected)
        assert min(recordings.replays) >= 1 and max(recordings.replays) > 3
        assert len(recordings.replays) <= 2 * 4 + 4, "one for each rounded number of rows, and of positions"


@pytest.mark.parametrize(("recursion", "attention", "lengths", "seed"), EACH_RECURSION)
def test_each_recursion(tiny_model: ModelFactory, recursion: str, attention: str, lengths: tuple[int, ...], seed: int) -> None:
    model = tiny_model(f"arch={recursion}", f"arch.attention={attention}", seed=seed)
    requests = [dataclasses.replace(request, top=0) for request in requests_for(make_prompts(lengths), 5)]
    assert_same(decode(model, requests, act_steps=4, record=Recordings()), decode(model, requests, act_steps=4))


def test_rows_enter_and_leave_at_any_time(tiny_model: ModelFactory) -> None:
    model = tiny_model(halt_scale=3.0)
    prompts = make_prompts((4, 7, 3, 6, 5))
    # Depths, thresholds and lengths of their own; the last but one is cancelled, and an answer's ids are reported or not.
    kinds = [{"act_steps": 2}, {"halt_threshold": 0.5}, {}, {"act_steps": 3, "halt_threshold": 0.4}, {"top": VOCABULARY}]
    requests = [Request(prompt, 4 + number, **kind) for number, (prompt, kind) in enumerate(zip(prompts, kinds, strict=True))]  # type: ignore[arg-type]
    alone = [decode(model, [request], act_steps=4)[0] for request in requests]
    engine = Engine(model, eos_id=NEVER, act_steps=4, rows=3, positions=16, record=Recordings())
    answers: list[list[Token]] = [[] for _ in requests]
    submitted = ticks = 0
    while engine.busy or submitted < len(requests):
        if ticks % 3 == 0 and submitted < len(requests):
            submitted = engine.submit(requests[submitted]) + 1
        if ticks == 13:
            engine.cancel(3)
        for token in engine.tick():
            answers[token.request].append(token)
        ticks += 1
    assert 0 < len(answers[3]) < len(alone[3]), "it was cancelled on the way"
    alone[3] = alone[3][: len(answers[3])]
    assert_same(answers, alone)


def _fails(function: Callable[[], None]) -> Callable[[], None]:
    raise RuntimeError("operation not permitted when stream is capturing")


class Counter:
    """Counts in a tensor, in ways of which one is wrong and one raises."""

    def __init__(self) -> None:
        self.count = torch.ones(2)

    def run_and_record(self, *ways: str, record: Callable[[Callable[[], None]], Callable[[], None]]) -> Callable[[], None]:
        chosen = {name: getattr(self, name) for name in ways}
        return run_and_record(chosen, [self.count], self.count, 1e-3, record)

    def plain(self) -> None:
        self.count += 1

    def fast(self) -> None:
        self.count += 1.0001

    def wrong(self) -> None:
        self.count += 1.1

    def broken(self) -> None:
        self.count.zero_()
        raise ValueError("no kernel")


@pytest.mark.parametrize(
    ("record", "told"), [(_fails, "not permitted"), (lambda function: lambda: None, "differs")], ids=["error", "another result"]
)
def test_what_is_not_recorded_well_runs_as_it_is(
    record: Callable[[Callable[[], None]], Callable[[], None]], told: str, caplog: pytest.LogCaptureFixture
) -> None:
    counter = Counter()
    replay = counter.run_and_record("fast", "plain", record=record)
    assert counter.count.tolist() == [2, 2] and caplog.text.count(told) == 2
    replay()
    assert counter.count.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("ways", "taken", "warnings"),
    [
        (["plain"], 1, 0),
        (["fast", "plain"], 1.0001, 0),
        (["broken", "wrong", "fast", "plain"], 1.0001, 2),
        (["wrong", "plain"], 1, 1),
    ],
)
def test_the_first_right_way_is_recorded_and_has_run_once(
    ways: list[str], taken: float, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    counter, recordings = Counter(), Recordings()
    replay = counter.run_and_record(*ways, record=recordings)
    assert counter.count.tolist() == pytest.approx([1 + taken] * 2) and recordings.replays[-1] == 1
    assert len(caplog.records) == warnings
    replay()
    assert counter.count.tolist() == pytest.approx([1 + 2 * taken] * 2) and recordings.replays[-1] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-4)])
def test_graphs_of_a_gpu_say_the_same(
    tiny_model: ModelFactory, caplog: pytest.LogCaptureFixture, dtype: str, tolerance: float
) -> None:
    model = tiny_model(f"arch.forward_dtype={dtype}", "arch.attention=prefix", halt_scale=3.0)
    requests = [
        Request(
            prompt, 3 + number, Sampling(seed=number, temperature=float(number == 2)), halt_threshold=0.5 if number == 3 else None
        )
        for number, prompt in enumerate(make_prompts((5, 80, 1, 9, 3)))
    ]
    expected = [decode(model, requests, act_steps=2, rows=rows) for rows in (1, 3)]
    model.to("cuda")
    for rows, answers in zip((1, 3), expected, strict=True):
        assert_same(decode(model, requests, act_steps=2, rows=rows), answers, tolerance)
    assert not caplog.records, "every graph could be made"
