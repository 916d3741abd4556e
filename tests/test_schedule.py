"""The learning rate rises to its peak, falls to its floor, and counts examples."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import PretrainInstructConfig
from training.schedule import expected_examples, lr_factor_by_examples, lr_factor_by_steps

RUNS = st.tuples(
    st.integers(1, 10**6),  # total examples
    st.floats(0.0, 1.0),  # min_ratio
    st.integers(0, 3000),  # warm-up steps
    st.integers(1, 768),  # batch size
)


def factor(admitted: int, run: tuple[int, float, int, int]) -> float:
    total, min_ratio, warmup_steps, batch_size = run
    return lr_factor_by_examples(admitted, total, min_ratio=min_ratio, warmup_steps=warmup_steps, batch_size=batch_size)


@given(RUNS, st.floats(0, 1))
def test_it_is_the_formula(run: tuple[int, float, int, int], share: float) -> None:
    total, r, warmup_steps, batch_size = run
    c, w = round(share * total), min(warmup_steps * batch_size, total / 10)
    rise = min(1.0, c / w) if w else 1.0
    expected = rise * (r + (1 - r) / 2 * (1 + math.cos(math.pi * max(0.0, (c - w) / (total - w)))))
    assert factor(c, run) == pytest.approx(expected, rel=1e-12, abs=1e-18)


@given(RUNS, st.floats(0, 1), st.floats(0, 1))
def test_it_rises_through_the_warm_up_and_falls_after_it(run: tuple[int, float, int, int], first: float, second: float) -> None:
    total, min_ratio, warmup_steps, batch_size = run
    low, high = sorted((round(first * total), round(second * total)))
    warmup = min(warmup_steps * batch_size, total / 10)
    assert 0 <= factor(low, run) <= 1 + 1e-12
    if high <= warmup:
        assert factor(low, run) <= factor(high, run) * (1 + 1e-12)
    if low >= warmup:
        assert factor(high, run) <= factor(low, run) * (1 + 1e-12)
    assert factor(total, run) == pytest.approx(min_ratio, rel=1e-9, abs=1e-15)


def test_warm_up_ends_at_the_peak_and_takes_at_most_a_tenth() -> None:
    long_run = (100_000, 0.1, 100, 32)
    assert factor(0, long_run) == 0.0 and factor(1600, long_run) == pytest.approx(0.5) and factor(3200, long_run) == 1.0
    short_run = (1000, 0.1, 100, 32)
    assert factor(50, short_run) == pytest.approx(0.5) and factor(100, short_run) == 1.0
    assert factor(550, short_run) == pytest.approx(0.55)
    assert factor(0, (1000, 0.1, 0, 32)) == 1.0


def test_the_originals_schedule_goes_by_steps() -> None:
    """Warm-up takes its steps however short the run; the cosine ends at the last step, or stays at the peak for a ratio of 1."""
    factors = [lr_factor_by_steps(step, 100, min_ratio=0.1, warmup_steps=20) for step in (1, 10, 20, 60, 100)]
    assert factors == pytest.approx([0.05, 0.5, 1.0, 0.55, 0.1])
    assert lr_factor_by_steps(15, 10, min_ratio=1.0, warmup_steps=20) == 0.75
    assert {lr_factor_by_steps(step, 100, min_ratio=1.0, warmup_steps=20) for step in range(20, 101)} == {1.0}
    assert lr_factor_by_steps(1, 100, min_ratio=0.0, warmup_steps=0) == pytest.approx(1.0, abs=1e-3)


ConfigFactory = Callable[..., PretrainInstructConfig]


def test_a_run_comes_to_its_data_or_its_last_step(tiny_config: ConfigFactory) -> None:
    assert [expected_examples(tiny_config(f"max_steps={steps}"), 30) for steps in ("null", 7, 8)] == [30, 28, 30]
