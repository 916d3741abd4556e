"""Calibration of halting probabilities: measures it at every depth on held-out text, and fits Platt
scaling.

There is one scale and one shift for each depth. Knows no training, no files and no command line.
Shape suffixes as in models/layers.py; N supervised tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from config.errors import UsageError
from dataset.text.loader import IGNORE_LABEL_ID, Examples, collate
from models.act import RecursiveModel
from models.device import on_device
from models.losses import linear_cross_entropy

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

    def to_fit_on(self) -> "HaltingRecord":
        """The tokens of even rows."""
        return self._of(self.rows_N % 2 == 0, "even")

    def to_measure_on(self) -> "HaltingRecord":
        """The tokens of odd rows."""
        return self._of(self.rows_N % 2 == 1, "odd")

    def _of(self, chosen_N: Bools, kind: str) -> "HaltingRecord":
        if not chosen_N.any():
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


@torch.no_grad()
def record_halting(
    model: RecursiveModel,
    dataset: Examples,
    *,
    batch_size: int,
    act_steps: int,
    limit: int | None = None,
    pad_multiple: int = 8,
    progress: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] = lambda batches: batches,
) -> list[HaltingRecord]:
    """Teacher-forced halting logits of the first `limit` rows, after each of 1..act_steps ACT
    steps, without early halting.

    Raises UsageError if a halting logit is not finite.
    """
    count = len(dataset) if limit is None else min(limit, len(dataset))
    order = np.argsort([len(dataset[i].ids) for i in range(count)], kind="stable")
    parts: list[list[HaltingRecord]] = [[] for _ in range(act_steps)]
    for rows in progress([order[start : start + batch_size] for start in range(0, count, batch_size)]):
        batch = collate([dataset[int(row)] for row in rows], pad_id=0, length_multiple=pad_multiple)
        inputs_BT, labels_BT, segments_BT = (
            on_device(batch[name].astype(np.int64), model.device) for name in ("inputs", "labels", "segment")
        )
        place_N = np.flatnonzero(batch["labels"] != IGNORE_LABEL_ID)
        supervised_N = on_device(place_N, model.device)
        labels_N = labels_BT.flatten()[supervised_N]
        weights_N = torch.zeros(len(labels_N), device=model.device)
        rows_N = rows[place_N // inputs_BT.shape[1]]
        refinement = model.refine_rows(inputs_BT, segments_BT, act_steps=act_steps)
        for part, refined in zip(parts, refinement, strict=True):
            output_ND = refined.output_BTD.flatten(0, 1)[supervised_N]
            _, _, argmax_N = linear_cross_entropy(output_ND, model.lm_head.weight, labels_N, weights_N, model.config.loss)
            logits_N = model.halt_logits(output_ND)[..., 0].cpu().double()
            part.append(HaltingRecord(rows_N, logits_N.numpy(), (argmax_N == labels_N).cpu().numpy()))
    records = [_joined(part) for part in parts]
    if not all(np.isfinite(record.logits_N).all() for record in records):
        raise UsageError(
            "the model's halting logits are not finite, so nothing can be fitted; did the run of this checkpoint diverge?"
        )
    return records


def calibrate_halting(records: Sequence[HaltingRecord]) -> list[DepthCalibration]:
    """Fit each depth on the tokens of even rows and measure it on those of odd ones. Raises UsageError if either has none."""
    found = []
    for record in records:
        fitted, measured = record.to_fit_on(), record.to_measure_on()
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
    """Scale a and shift b such that sigmoid(a * logit + b) fits `right_N` best: Platt scaling
    (Platt 1999).

    Minimizes the sum of the tokens' cross-entropies plus `_PULL`/2 * ((a - 1)^2 + b^2), by Newton's
    method with step halving. The second term makes the minimum exist and be unique; without tokens
    it is the identity, (1, 0).
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
    """Mean over tokens of |mean probability - fraction right| of their bin, bins of equal width
    (Guo et al. 2017, eq. 3).

    arXiv 1706.04599. The halting probability is the confidence that the argmax is right.
    """
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


def _joined(parts: Sequence[HaltingRecord]) -> HaltingRecord:
    if not parts:
        return HaltingRecord(np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    return HaltingRecord(
        np.concatenate([part.rows_N for part in parts]),
        np.concatenate([part.logits_N for part in parts]),
        np.concatenate([part.right_N for part in parts]),
    )
