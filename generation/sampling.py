"""Sampling: chooses the next token from logits, greedily or at random, for each row.

Ids only; knows no text, no model and no cache. A row's choice never depends on other rows. Shape
suffixes as in models/layers.py; R rows of one call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config.errors import UsageError
from models.device import on_device
from models.losses import argmax, log_probs


def check_limits(options: object, limits: Sequence[tuple[str, bool, str]]) -> None:
    """Raise UsageError unless all fields are within their limits: name, whether it is, what it must be."""
    for name, is_within, expected in limits:
        if not is_within:
            raise UsageError(f"{name} must be {expected}, found {getattr(options, name)!r}")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of one answer are chosen. Raises UsageError for a value out of range.

    In this order: repetition penalty on the logits, log p, temperature, top-k, top-p of what top-k
    leaves, min-p.
    """

    temperature: float = 0.0
    """Divides log p before the draw. 0 is greedy; top-k, top-p and min-p then don't matter."""
    top_k: int | None = None
    """Keep only the k most probable tokens. Of equally probable ones top-k and top-p keep the
    lowest ids, min-p all.
    """
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens that reaches this (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep only tokens with at least this fraction of the highest probability (arXiv 2407.01082).
    """
    repetition_penalty: float = 1.0
    """Divides positive logits and multiplies others of ids in prompt or answer (arXiv 1909.05858,
    section 4.1).
    """
    seed: int = 0

    def __post_init__(self) -> None:
        limits = (
            ("temperature", 0 <= self.temperature < math.inf, "a finite number of at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or none at all"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"),
            ("seed", 0 <= self.seed < 2**64, "an integer from 0 to 2**64 - 1"),
        )
        check_limits(self, limits)

    @property
    def needs_sampler(self) -> bool:
        """Whether the next token may differ from the argmax of the logits."""
        return self.temperature > 0 or self.repetition_penalty != 1

    @property
    def cuts(self) -> bool:
        """Whether tokens are drawn with top-k or top-p, which need sorted logits."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of each row of a call."""

    ids_R: Tensor
    logp_R: Tensor
    """log p of the id under the model, in nats, before penalty, temperature and truncation."""
    logp_RV: Tensor | None
    """log p over the whole vocabulary, if requested."""


class Sampler:
    """Chooses the tokens of `rows` rows at a time, each by its own `Sampling`.

    Its state has a fixed size: [rows, vocab_size] bytes on `device`, for the repetition penalty. A row not yet admitted is greedy.
    """

    def __init__(self, rows: int, vocab_size: int, loss: str, device: torch.device | str) -> None:
        self._vocab_size = vocab_size
        self._loss = loss
        self._samplings = [Sampling()] * rows
        self._samples = [0] * rows
        self._counts = [0] * rows
        self._seen_BV = torch.zeros(rows, vocab_size, dtype=torch.bool, device=device)

    def admit(self, row: int, sampling: Sampling, sample: int, prompt_ids: Sequence[int] | np.ndarray) -> None:
        """Begin an answer in `row`, in place of an earlier one.

        sample: number of the answer (from 0) among those to one prompt. Each number draws
        differently.
        """
        self._samplings[row] = sampling
        self._samples[row] = sample
        self._counts[row] = 0
        if sampling.repetition_penalty != 1:
            self._seen_BV[row] = False
            self._seen_BV[row].index_fill_(0, on_device(np.asarray(prompt_ids, np.int64), self._seen_BV.device), True)

    @torch.no_grad()
    def choose(self, rows_R: Tensor, logits_RV: Tensor, *, with_logp: bool = False) -> Chosen:
        """The next token of each of these rows (int64, distinct), from raw logits of any float
        dtype.

        On a GPU, pass rows_R in host memory: that avoids the only wait for the device.
        """
        device = logits_RV.device
        logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
        rows = rows_R.tolist()
        samplings = [self._samplings[row] for row in rows]
        logp_RV = log_probs(logits_RV, self._loss)
        any_penalty = any(sampling.repetition_penalty != 1 for sampling in samplings)
        any_drawn = any(sampling.temperature > 0 for sampling in samplings)
        if not (any_penalty or any_drawn):
            ids_R = argmax(logits_RV)
        else:
            # float32 is coarse for sums over a vocabulary, but not every device has float64.
            exact = torch.float64 if device.type == "cpu" else logits_RV.dtype
            numbers = on_device(torch.tensor([self._numbers_of(row, exact) for row in rows], dtype=exact).numpy(), device)
            penalty_R1, uniform_R1, temperature_R1, top_k_R1, top_p_R1, min_p_R1 = numbers.split(1, dim=1)
            rows_R = rows_R.to(device, non_blocking=True)
            scores_RV = logits_RV
            if any_penalty:
                scores_RV = _penalized(logits_RV, self._seen_BV[rows_R], penalty_R1.to(logits_RV.dtype))
            ids_R = argmax(scores_RV)
            if any_drawn:
                weights_RV = _weights(log_probs(scores_RV, self._loss) if any_penalty else logp_RV, temperature_R1)
                if any(sampling.cuts for sampling in samplings):
                    weights_RV *= _within_cuts(scores_RV, self._loss, temperature_R1, top_k_R1.long(), top_p_R1)
                weights_RV.masked_fill_(weights_RV < min_p_R1, 0)
                ids_R = torch.where(temperature_R1.squeeze(1) > 0, _drawn(weights_RV, uniform_R1), ids_R)
            if any_penalty:
                self._seen_BV[rows_R, ids_R] = torch.ones_like(ids_R, dtype=torch.bool)
        for row in rows:
            self._counts[row] += 1
        logp_R = logp_RV.gather(1, ids_R.unsqueeze(1)).squeeze(1)
        return Chosen(ids_R, logp_R, logp_RV if with_logp else None)

    def _numbers_of(self, row: int, dtype: torch.dtype) -> tuple[float, ...]:
        """The numbers that a choice needs for a row. They are copied to the device in one transfer
        for all rows of a call.

        They keep their bounds in `dtype`: a temperature above 0 stays above 0, and a uniform number
        stays below 1.
        """
        sampling, limits = self._samplings[row], torch.finfo(dtype)
        return (
            sampling.repetition_penalty,
            min(_uniform(sampling.seed, self._samples[row], self._counts[row]), 1 - limits.eps / 2)
            if sampling.temperature > 0
            else 0.0,
            max(sampling.temperature, limits.tiny) if sampling.temperature > 0 else 0.0,
            min(sampling.top_k or self._vocab_size, self._vocab_size),
            # No sum reaches infinity, so top-p keeps all tokens, however sums are rounded.
            sampling.top_p if sampling.top_p < 1 else math.inf,
            sampling.min_p,
        )


def _uniform(seed: int, sample: int, number: int) -> float:
    """The uniform number in [0, 1) for a token. number: tokens of its answer before it."""
    bits = np.random.Philox(key=np.array([seed, sample], np.uint64), counter=[0, 0, 0, number]).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _penalized(logits_RV: Tensor, seen_RV: Tensor, penalty_R1: Tensor) -> Tensor:
    lower_RV = torch.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1)
    return torch.where(seen_RV, lower_RV, logits_RV)


def _weights(logp_RV: Tensor, temperature_R1: Tensor) -> Tensor:
    """Probabilities at a temperature, divided by the highest one, in the temperature's dtype.

    The highest is then exactly 1. A temperature of 0 gives NaN: a greedy row doesn't use its
    weights.
    """
    highest_R1 = logp_RV.amax(dim=-1, keepdim=True)
    return (logp_RV - highest_R1).to(temperature_R1.dtype, copy=True).div_(temperature_R1).exp_()


def _within_cuts(scores_RV: Tensor, loss: str, temperature_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """bool[R, V]: the ids that top-k keeps and, of these, top-p.

    Ranks by scores, not weights: at an extreme temperature, weights of different scores may round
    to the same number.
    """
    sorted_RV = _descending(scores_RV)
    reached_RV = _weights(log_probs(sorted_RV, loss), temperature_R1).cumsum(dim=-1)
    goal_R1 = top_p_R1 * reached_RV.gather(1, top_k_R1 - 1)
    kept_R1 = torch.minimum(torch.searchsorted(reached_RV, goal_R1) + 1, top_k_R1)
    lowest_R1 = sorted_RV.gather(1, kept_R1 - 1)
    above_RV, level_RV = scores_RV > lowest_R1, scores_RV == lowest_R1
    places_R1 = kept_R1 - above_RV.sum(dim=-1, keepdim=True)
    return above_RV | (level_RV & (level_RV.cumsum(dim=-1) <= places_R1))


def _descending(scores_RV: Tensor) -> Tensor:
    if scores_RV.device.type == "cpu":
        # numpy sorts values alone, many times faster than torch, which always sorts indices too.
        return torch.from_numpy(np.sort(scores_RV.numpy(), axis=-1)).flip(-1)
    return scores_RV.sort(dim=-1, descending=True).values


def _drawn(weights_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """The id at which the cumulative sum of weights first exceeds `uniform_R1` times the total;
    never an id of weight 0.
    """
    reached_RV = weights_RV.cumsum(dim=-1)
    return torch.searchsorted(reached_RV, uniform_R1 * reached_RV[:, -1:], right=True).squeeze(1)
