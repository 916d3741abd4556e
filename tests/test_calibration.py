"""Halting probabilities that lie are found out and mended (evaluators/calibration.py)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text.loader import TextDataset
from evaluators.calibration import (
    HaltingRecord,
    calibrate_halting,
    expected_calibration_error,
    fit_platt,
    record_halting,
    sigmoid,
)
from evaluators.language import DepthOutput, evaluate_language
from models.act import RecursiveModel

TOKENS = 20_000


def record(logits: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> HaltingRecord:
    """Each token is of a row of its own."""
    return HaltingRecord(np.arange(len(logits)), np.array(logits, np.float64), np.array(right, bool))


def drawn(scale: float, shift: float, seed: int = 0) -> HaltingRecord:
    """Tokens that are right with probability sigmoid(scale * logit + shift)."""
    rng = np.random.default_rng(seed)
    logits_N = rng.normal(0, 2, TOKENS)
    return record(logits_N, rng.random(TOKENS) < sigmoid(scale * logits_N + shift))


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.3, 1.5), (2.5, -1.0), (-0.5, 0.5)])
def test_a_head_that_lies_is_mended(scale: float, shift: float) -> None:
    [found] = calibrate_halting([drawn(scale, shift)])
    assert found.scale == pytest.approx(scale, abs=0.15) and found.shift == pytest.approx(shift, abs=0.15)
    assert found.after.ece < 0.015 and found.after.tokens == TOKENS // 2
    assert abs(found.after.predicted - found.after.accuracy) < 0.015
    if (scale, shift) != (1.0, 0.0):
        assert found.before.ece > 0.08


def test_each_depth_has_its_own_fit_of_even_rows_measured_on_odd_ones() -> None:
    sure, odd_ones_all_wrong = drawn(1.0, 2.0), drawn(1.0, -2.0)
    odd_ones_all_wrong.right_N[1::2] = False
    first, second = calibrate_halting([sure, odd_ones_all_wrong])
    assert first.shift == pytest.approx(2.0, abs=0.15) and second.shift == pytest.approx(-2.0, abs=0.15)
    assert first.before.accuracy > 0.7 and second.before.accuracy == 0.0
    assert second.after.ece == pytest.approx(second.after.predicted)


def test_without_both_kinds_of_rows_nothing_is_fitted() -> None:
    with pytest.raises(UsageError, match="no odd row has an answer: use more rows"):
        calibrate_halting([HaltingRecord(np.zeros(3, np.int64), np.zeros(3), np.ones(3, bool))])
    with pytest.raises(UsageError, match="no even row"):
        calibrate_halting([HaltingRecord(np.ones(3, np.int64), np.zeros(3), np.ones(3, bool))])


def test_no_tokens_leave_the_logit_as_it_is_and_few_hardly_move_it() -> None:
    assert fit_platt(np.zeros(0), np.zeros(0, bool)) == (1.0, 0.0)
    scale, shift = fit_platt(np.array([0.5]), np.array([True]))
    assert 1.0 < scale < 1.5 and 0.0 < shift < 0.5


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("spread", [0.0, 1.0, 30.0])
def test_all_right_or_all_wrong_gives_a_probability_near_it_and_short_of_certain(right: bool, spread: float) -> None:
    logits_N = np.linspace(-spread, spread, 1000) - 1.0
    scale, shift = fit_platt(logits_N, np.full(1000, right))
    probability = sigmoid(scale * logits_N + shift).mean()
    assert (0.98 < probability < 1.0) if right else (0.0 < probability < 0.02)


def test_a_constant_logit_becomes_the_share_that_is_right() -> None:
    logits_N = np.full(4000, -1.0)
    scale, shift = fit_platt(logits_N, np.arange(4000) % 4 != 0)
    assert sigmoid(scale * logits_N + shift)[0] == pytest.approx(0.75, abs=0.002)


def test_separated_tokens_have_a_finite_scale() -> None:
    logits_N = np.linspace(-1, 1, 1000)
    scale, _ = fit_platt(logits_N, logits_N > 0)
    assert 5 < scale < 100


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.booleans()), max_size=40),
)
def test_the_fit_is_a_minimum_whatever_the_tokens(tokens: list[tuple[float, bool]]) -> None:
    logits_N = np.array([logit for logit, _ in tokens], np.float64)
    right_N = np.array([right for _, right in tokens], bool)

    def objective(scale: float, shift: float) -> float:
        margin_N = scale * logits_N + shift
        loss = np.logaddexp(0, np.where(right_N, -margin_N, margin_N)).sum()
        return float(loss + ((scale - 1) ** 2 + shift**2) / 2)

    scale, shift = fit_platt(logits_N, right_N)
    least = objective(scale, shift)
    assert np.isfinite(least)
    for size in (1e-3, 0.1, 1.0):
        for d_scale, d_shift in ((size, 0), (-size, 0), (0, size), (0, -size), (size, size), (-size, size)):
            assert objective(scale + d_scale, shift + d_shift) >= least - 1e-9 * (1 + abs(least))


def test_expected_calibration_error_by_hand() -> None:
    # Two bins of ten: 0.1 and 0.3 with one of two right, 0.9 and 1.0 with both right.
    probability_N = np.array([0.1, 0.3, 0.9, 1.0])
    right_N = np.array([True, False, True, True])
    assert expected_calibration_error(probability_N, right_N, bins=2) == pytest.approx((abs(0.4 - 1) + abs(1.9 - 2)) / 4)
    # A bin's upper end is its own; 0 is in the first one.
    assert expected_calibration_error(np.array([0.0, 0.5]), np.array([True, False]), bins=2) == pytest.approx(0.25)
    assert expected_calibration_error(np.array([0.0, 0.51]), np.array([True, False]), bins=2) == pytest.approx(0.755)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50))
def test_the_error_lies_between_the_mean_gap_and_the_mean_distance(tokens: list[tuple[float, bool]]) -> None:
    probability_N, right_N = np.array([p for p, _ in tokens]), np.array([right for _, right in tokens])
    error = expected_calibration_error(probability_N, right_N)
    excess_N = probability_N - right_N
    assert abs(excess_N.mean()) - 1e-12 <= error <= np.abs(excess_N).mean() + 1e-12


@pytest.fixture
def rows(text_dataset: Callable[[Sequence[dict[str, Any]]], TextDataset]) -> TextDataset:
    return text_dataset([{"question": "What is " + "1 plus " * (i % 3) + "1?", "answer": f"{i} " * (i % 4 + 1)} for i in range(7)])


def test_recorded_are_the_logits_and_answers_of_the_evaluation_at_each_depth(
    rows: TextDataset, tiny_model: Callable[..., RecursiveModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    # What the model was calibrated to before must not matter.
    model.halt_calibration += 1
    records = record_halting(model, rows, batch_size=3, act_steps=3, limit=5)
    assert len(records) == 3
    for depth, found in enumerate(records, 1):
        outputs: list[DepthOutput] = []
        result = evaluate_language(model, rows, eos_id=2, batch_size=2, act_steps=depth, limit=5, on_output=outputs.append)
        expected: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for output in outputs:
            for place, row in enumerate(output.rows):
                is_label = output.labels_BT[place] != -100
                logits = output.halt_logits_BT[place].double().numpy()[is_label]
                expected[int(row)] = (logits, (output.preds_BT.numpy() == output.labels_BT)[place][is_label])
        assert set(found.rows_N) == set(range(5)) and len(found.rows_N) == result.by_depth[-1].tokens
        for row, (logits, right) in expected.items():
            of_row = found.rows_N == row
            np.testing.assert_allclose(found.logits_N[of_row], logits, rtol=0, atol=1e-9)
            assert (found.right_N[of_row] == right).all()
    assert not np.allclose(records[0].logits_N, records[2].logits_N)


def test_logits_that_are_not_finite_are_told(
    rows: TextDataset, tiny_model: Callable[..., RecursiveModel], tiny_tokenizer: Any
) -> None:
    model = tiny_model(vocab_size=tiny_tokenizer.vocab_size)
    with torch.no_grad():
        model.q_head.weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="not finite"):
        record_halting(model, rows, batch_size=4, act_steps=1)
