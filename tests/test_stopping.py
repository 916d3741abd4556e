"""When a run is evaluated and when it ends is decided by numbers alone, the same with a restart as without."""

import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.compose import compose_as
from config.schema import EarlyStoppingConfig, PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig
from training.stopping import EarlyStopping, automatic_evaluations, is_evaluation_due, reason_to_end
from training.task import Position

ConfigFactory = Callable[..., PretrainInstructConfig]


def evaluated_at(config: TrainingConfig, finished: list[int], epoch: int, rows: int) -> list[int]:
    """Steps after which a run is evaluated that has trained `finished` examples after each step, in epochs of `epoch` examples."""
    positions = [Position(done, done // epoch) for done in (0, *finished)]
    total = positions[-1]
    automatic = automatic_evaluations(config, total, rows)
    taken = enumerate(itertools.pairwise(positions), start=1)
    return [step for step, (before, now) in taken if is_evaluation_due(config, automatic, total, step, before, now)]


@pytest.mark.parametrize(
    ("settings", "examples", "epochs", "rows", "expected"),
    [
        ((), 40_000, 1, 500, 10),
        ((), 500_000, 1, 500, 10),
        ((), 20_000, 1, 500, 5),
        # Few rows to evaluate: a thousand to train between.
        ((), 10_000, 1, 5, 10),
        ((), 2_000, 1, 5, 2),
        ((), 1_999, 1, 5, 0),
        # As many as by epochs: these are enough.
        ((), 4_000, 1, 500, 0),
        ((), 500_000, 10, 500, 0),
        ((), 500_000, 10, 0, 0),
        (("eval_interval=2",), 500_000, 10, 500, 10),
        # The run ends in its first epoch.
        (("max_steps=1000", "global_batch_size=40"), 500_000, 10, 500, 10),
        (("max_steps=100", "global_batch_size=40"), 500_000, 1, 500, 1),
        (("eval_every_steps=null",), 500_000, 1, 500, 0),
        (("eval_every_steps=7",), 500_000, 1, 500, 0),
    ],
)
def test_automatic_evaluations_are_ten_or_what_the_run_can_afford(
    tiny_config: ConfigFactory, settings: tuple[str, ...], examples: int, epochs: int, rows: int, expected: int
) -> None:
    assert automatic_evaluations(tiny_config(*settings), Position(examples, epochs), rows) == expected


def test_a_run_is_evaluated_by_epochs_and_by_steps(tiny_config: ConfigFactory) -> None:
    finished = list(range(1000, 21_000, 1000))
    none, every = tiny_config("eval_every_steps=null", "eval_interval=2"), tiny_config("eval_every_steps=6", "eval_interval=2")
    assert evaluated_at(none, finished, 5000, 1) == [10, 20]
    assert evaluated_at(every, finished, 5000, 1) == [6, 10, 12, 18, 20]
    # Ten in one epoch, and each epoch's end besides.
    assert evaluated_at(tiny_config(), finished, 20_000, 1) == list(range(2, 22, 2))
    assert evaluated_at(tiny_config(), finished, 7000, 1) == [2, 4, 6, 7, 8, 10, 12, 14, 16, 18, 20]
    # Fewer where it ends sooner.
    assert evaluated_at(tiny_config("max_steps=10", "global_batch_size=500"), finished, 20_000, 1)[:5] == [2, 4, 6, 8, 10]


def test_the_first_intervals_may_go_unevaluated() -> None:
    finished = list(range(1000, 21_000, 1000))
    puzzles = compose_as(PretrainPuzzleConfig, "cfg_pretrain", ["epochs=4", "eval_interval=1"])
    for skipped, expected in ((0, [5, 10, 15, 20]), (1, [10, 15, 20]), (3, [20])):
        config = puzzles.model_copy(update={"min_eval_interval": skipped})
        assert evaluated_at(config, finished, 5000, 1) == expected


@given(steps=st.lists(st.integers(0, 300), min_size=50, max_size=400))
def test_a_long_epoch_has_ten_evaluations_however_its_examples_come(tiny_config: ConfigFactory, steps: list[int]) -> None:
    finished = [sum(steps[: i + 1]) + 200 * (i + 1) for i in range(len(steps))]
    at = evaluated_at(tiny_config(), finished, finished[-1], 1)
    # A step may jump over more than one tenth; each is evaluated once.
    tenths = {10 * done // finished[-1] for done in finished}
    assert len(at) == len(tenths - {0}) and at[-1] == len(finished)


def test_a_run_ends_at_the_first_limit(tiny_config: ConfigFactory) -> None:
    config = tiny_config("max_steps=5", "max_minutes=0.5", "early_stopping.patience=1")
    patient = EarlyStopping()
    assert reason_to_end(config, 4, 0, patient) is None
    assert reason_to_end(config, 5, 0, patient) == "max_steps=5 is reached"
    assert reason_to_end(config, 4, 30, patient) == "max_minutes=0.5 are over"
    patient.observe(2.0, config.early_stopping)
    assert reason_to_end(config, 4, 0, patient) is None
    patient.observe(2.0, config.early_stopping)
    assert "early_stopping.patience=1" in (reason_to_end(config, 4, 0, patient) or "")
    assert reason_to_end(tiny_config(), 10**9, 1e9, EarlyStopping()) is None


def observed(losses: list[float], config: EarlyStoppingConfig) -> EarlyStopping:
    stopping = EarlyStopping()
    for loss in losses:
        stopping.observe(loss, config)
    return stopping


@pytest.mark.parametrize(
    ("losses", "min_delta", "over"),
    [
        ([3.0, 2.0, 1.0, 0.5], 0.0, False),
        ([3.0, 2.0, 2.5], 0.0, False),
        ([3.0, 2.0, 2.5, 2.0], 0.0, True),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 0.0, False),
        # Lower, but by less than counts; what falls slowly is measured against the best that counted.
        ([3.0, 2.95, 2.9], 0.2, True),
        ([3.0, 2.9, 2.79, 2.7], 0.2, False),
        ([3.0, math.nan, math.nan], 0.0, True),
        ([math.nan, 3.0, 2.0], 0.0, False),
        ([3.0, math.inf, 2.0], 0.0, False),
    ],
)
def test_patience_counts_evaluations_without_a_lower_loss(
    tiny_config: ConfigFactory, losses: list[float], min_delta: float, over: bool
) -> None:
    for patience, is_over in ((2, over), ("null", False)):
        config = tiny_config(f"early_stopping.patience={patience}", f"early_stopping.min_delta={min_delta}")
        reason = reason_to_end(config, 1, 0, observed(losses, config.early_stopping))
        assert (reason is not None) is is_over
