"""Calibration of halting probabilities: measured at every depth, and fitted by Platt scaling.

Shape suffixes as in models/layers.py; N supervised tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.text.loader import IGNORE_LABEL_ID, Examples
from evaluators.language import DepthOutput, evaluate_language
from models.act import RecursiveModel

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# As in Guo et al. 2017.
ECE_BINS = 15
# Weight of the regularization towards the identity; a token's cross-entropy has weight 1. It
# doesn't matter with thousands of tokens. It decides if there are few tokens, or all are right, all
# wrong, or all have the same logit.
_PULL = 1.0
_IDENTITY = np.array([1.0, 0.0])
_NEWTON_STEPS = 100
_CONVERGED = 1e-10


@dataclass(frozen=True)
class HaltingRecord:
    """Supervised tokens after one ACT step, in the order of the batches."""

    rows_N: npt.NDArray[np.int64]
    """Each token's row in the split."""
    logits_N: Floats
    """Uncalibrated halting logits."""
    right_N: Bools
    """Whether the argmax is the label."""

    def half(self, odd: bool) -> "HaltingRecord":
        """The tokens of even rows, to fit on, or of odd ones, to measure on. Raises UsageError if there are none."""
        chosen_N = self.rows_N % 2 == odd
        if not chosen_N.any():
            kind = "odd" if odd else "even"
            raise UsageError(
                f"calibration fits on even rows and measures on odd ones, but no {kind} row has an answer: use more rows"
            )
        return HaltingRecord(self.rows_N[chosen_N], self.logits_N[chosen_N], self.right_N[chosen_N])


@dataclass(frozen=True)
class Reliability:
    """Halting probabilities compared with accuracy."""

    tokens: int
    accuracy: float
    """Fraction of tokens whose argmax is right."""
    predicted: float
    """Mean halting probability. Equals the accuracy if calibration is perfect, and maybe if not."""
    ece: float
    """Expected calibration error."""
    bins: list[tuple[float, float, int]]
    """For each non-empty bin: mean halting probability, fraction right, number of tokens."""


@dataclass(frozen=True)
class DepthCalibration:
    """The fit at one depth, and the reliability on other tokens before and after it."""

    scale: float
    shift: float
    before: Reliability
    after: Reliability


def record_halting(model: RecursiveModel, dataset: Examples, *, act_steps: int, **options: Any) -> list[HaltingRecord]:
    """Teacher-forced halting logits after each of 1..act_steps ACT steps, without early halting.

    options: of `evaluate_language`, such as batch_size and limit. Raises UsageError if a halting
    logit is not finite.
    """
    parts: list[HaltingRecord] = []

    def keep(output: DepthOutput) -> None:
        row_N, place_N = np.nonzero(output.labels_BT != IGNORE_LABEL_ID)
        preds_BT, logits_BT = output.preds_BT.cpu().numpy(), output.halt_logits_BT.cpu().double().numpy()
        right_N = preds_BT[row_N, place_N] == output.labels_BT[row_N, place_N]
        parts.append(HaltingRecord(output.rows[row_N], logits_BT[row_N, place_N], right_N))

    evaluate_language(model, dataset, eos_id=-1, act_steps=act_steps, on_output=keep, at_every_depth=True, **options)
    records = [
        HaltingRecord(
            *(np.concatenate([getattr(part, key) for part in parts[step::act_steps]]) for key in ("rows_N", "logits_N", "right_N"))
        )
        for step in range(act_steps)
    ]
    if not all(np.isfinite(record.logits_N).all() for record in records):
        raise UsageError(
            "the model's halting logits are not finite, so nothing can be fitted; did the run of this checkpoint diverge?"
        )
    return records


def calibrate_halting(records: Sequence[HaltingRecord]) -> list[DepthCalibration]:
    """Fit each depth on the tokens of even rows and measure it on those of odd ones. Raises UsageError if either has none."""
    found = []
    for record in records:
        fitted, measured = record.half(odd=False), record.half(odd=True)
        scale, shift = fit_platt(fitted.logits_N, fitted.right_N)
        found.append(DepthCalibration(scale, shift, reliability(measured), reliability(measured, scale, shift)))
    return found


def reliability(record: HaltingRecord, scale: float = 1.0, shift: float = 0.0) -> Reliability:
    """The reliability of the halting probabilities sigmoid(scale * logit + shift) of these tokens."""
    probability_N = sigmoid(scale * record.logits_N + shift)
    return Reliability(
        tokens=len(record.right_N),
        accuracy=float(record.right_N.mean()),
        predicted=float(probability_N.mean()),
        ece=expected_calibration_error(probability_N, record.right_N),
        bins=reliability_bins(probability_N, record.right_N),
    )


def fit_platt(logits_N: Floats, right_N: Bools) -> tuple[float, float]:
    """Scale a and shift b such that sigmoid(a * logit + b) fits `right_N` best (Platt 1999).

    Minimizes the sum of the tokens' cross-entropies plus `_PULL`/2 * ((a - 1)^2 + b^2), by Newton's
    method with step halving. The second term makes the minimum unique; without tokens it is (1, 0).
    """
    design_N2 = np.stack((logits_N, np.ones_like(logits_N)), axis=1).astype(np.float64)

    def objective(fitted: Floats) -> float:
        margin_N = design_N2 @ fitted
        return float((np.logaddexp(0, margin_N) - right_N * margin_N).sum() + _PULL / 2 * ((fitted - _IDENTITY) ** 2).sum())

    fitted, value = _IDENTITY, objective(_IDENTITY)
    for _ in range(_NEWTON_STEPS):
        probability_N = sigmoid(design_N2 @ fitted)
        gradient = design_N2.T @ (probability_N - right_N) + _PULL * (fitted - _IDENTITY)
        hessian = (design_N2.T * (probability_N * (1 - probability_N))) @ design_N2 + _PULL * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        # Near the minimum, rounding hides any further decrease.
        while objective(fitted - step) > value and np.abs(step).max() > _CONVERGED:
            step = step / 2
        if np.abs(step).max() <= _CONVERGED:
            break
        fitted = fitted - step
        value = objective(fitted)
    return float(fitted[0]), float(fitted[1])


def expected_calibration_error(probability_N: Floats, right_N: Bools, bins: int = ECE_BINS) -> float:
    """Mean over tokens of |mean probability - fraction right| of their bin (arXiv 1706.04599, eq. 3)."""
    found = reliability_bins(probability_N, right_N, bins)
    return sum(tokens * abs(predicted - right) for predicted, right, tokens in found) / len(probability_N)


def reliability_bins(probability_N: Floats, right_N: Bools, bins: int = ECE_BINS) -> list[tuple[float, float, int]]:
    """Mean probability, fraction right and number of tokens of each non-empty bin, ascending."""
    # A bin contains its upper end but not its lower end, except 0.
    bin_N = np.clip(np.ceil(probability_N * bins).astype(np.int64) - 1, 0, bins - 1)
    return [
        (float(probability_N[chosen].mean()), float(right_N[chosen].mean()), int(chosen.sum()))
        for chosen in (bin_N == number for number in np.unique(bin_N))
    ]


def sigmoid(logits_N: Floats) -> Floats:
    """1 / (1 + exp(-logit)), without overflow."""
    probability_N: Floats = np.exp(-np.logaddexp(0.0, -logits_N))
    return probability_N
