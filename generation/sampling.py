"""How the next token is chosen from logits: greedy or drawn, row by row.

Ids only; it knows no text, no model and no cache. What a row gets never depends on the rows beside it. Shape suffixes as in
models/layers.py, with R the rows of one call.
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


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one answer's tokens are chosen. Raises UsageError for a value out of range.

    The order: repetition penalty on the logits, log p, temperature, top-k, top-p of what top-k left, min-p.
    """

    temperature: float = 0.0
    """Divides log p before the draw; 0 is greedy, and then no cut matters."""
    top_k: int | None = None
    """Only the k most probable tokens stay. Of equal ones the lowest ids do, in every cut but min-p, which keeps all of them."""
    top_p: float = 1.0
    """Only the smallest set of most probable tokens that reaches this probability stays (arXiv 1904.09751)."""
    min_p: float = 0.0
    """Only tokens of at least this share of the highest probability stay (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """For ids in the prompt or the answer so far, divides positive logits and multiplies others (arXiv 1909.05858, section 4.1)."""
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
        for name, is_within, expected in limits:
            if not is_within:
                raise UsageError(f"{name} must be {expected}, found {getattr(self, name)!r}")

    @property
    def needs_sampler(self) -> bool:
        """Whether the next token is another than the one of the highest logit, or may be."""
        return self.temperature > 0 or self.repetition_penalty != 1

    @property
    def cuts(self) -> bool:
        """Whether tokens are drawn and cut by their rank, for which logits must be sorted."""
        return self.temperature > 0 and (self.top_k is not None or self.top_p < 1)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True)
class Chosen:
    """The next token of each row of a call."""

    ids_R: Tensor
    logp_R: Tensor
    """log p of the id, in nats, as the model gave it: before penalty, temperature and cuts."""
    logp_RV: Tensor | None
    """The same over the whole vocabulary, if it was asked for."""


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
        """Begin an answer in `row`; what was there is forgotten.

        `sample` is the answer's number (from 0) among those to one prompt: each number gives other draws.
        """
        self._samplings[row] = sampling
        self._samples[row] = sample
        self._counts[row] = 0
        if sampling.repetition_penalty != 1:
            self._seen_BV[row] = False
            self._seen_BV[row].index_fill_(0, on_device(np.asarray(prompt_ids, np.int64), self._seen_BV.device), True)

    @torch.no_grad()
    def choose(self, rows_R: Tensor, logits_RV: Tensor, *, with_logp: bool = False) -> Chosen:
        """The next token of each of these rows (int64, none twice), from its raw logits, of any float type.

        On a GPU, rows_R in host memory avoids the only wait for the device.
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
            # A running sum over a vocabulary is coarse in float32, but devices other than CPUs may have nothing finer.
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
        """What a choice needs of a row. All rows of a call take the same path, so these go to the device in one transfer.

        In `dtype` they are what they must be: a temperature above 0 is so, and a uniform is below 1.
        """
        sampling, limits = self._samplings[row], torch.finfo(dtype)
        return (
            sampling.repetition_penalty,
            min(_uniform(sampling.seed, self._samples[row], self._counts[row]), 1 - limits.eps / 2)
            if sampling.temperature > 0
            else 0.0,
            max(sampling.temperature, limits.tiny) if sampling.temperature > 0 else 0.0,
            min(sampling.top_k or self._vocab_size, self._vocab_size),
            # No sum reaches infinity, so nothing is cut, however sums are rounded.
            sampling.top_p if sampling.top_p < 1 else math.inf,
            sampling.min_p,
        )


def _uniform(seed: int, sample: int, number: int) -> float:
    """The uniform in [0, 1) behind a token: `number` counts the tokens of its answer before it."""
    bits = np.random.Philox(key=np.array([seed, sample], np.uint64), counter=[0, 0, 0, number]).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _penalized(logits_RV: Tensor, seen_RV: Tensor, penalty_R1: Tensor) -> Tensor:
    lower_RV = torch.where(logits_RV > 0, logits_RV / penalty_R1, logits_RV * penalty_R1)
    return torch.where(seen_RV, lower_RV, logits_RV)


def _weights(logp_RV: Tensor, temperature_R1: Tensor) -> Tensor:
    """Probabilities at a temperature, divided by the highest of them, which is so exactly 1 at any temperature.

    In the temperature's number format. A temperature of 0 (a greedy row, whose weights nobody
    reads) gives NaN.
    """
    highest_R1 = logp_RV.amax(dim=-1, keepdim=True)
    return (logp_RV - highest_R1).to(temperature_R1.dtype, copy=True).div_(temperature_R1).exp_()


def _within_cuts(scores_RV: Tensor, loss: str, temperature_R1: Tensor, top_k_R1: Tensor, top_p_R1: Tensor) -> Tensor:
    """bool[R, V]: the ids that top-k and, of what that leaves, top-p keep.

    Ranks are those of the scores: weights of different scores may round to the same number at an extreme temperature.
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
        # Values alone are sorted many times faster than values with their ids, the only way torch has.
        return torch.from_numpy(np.sort(scores_RV.numpy(), axis=-1)).flip(-1)
    return scores_RV.sort(dim=-1, descending=True).values


def _drawn(weights_RV: Tensor, uniform_R1: Tensor) -> Tensor:
    """The id at which the running sum of weights first passes its share `uniform_R1` of the whole; never one of weight 0."""
    reached_RV = weights_RV.cumsum(dim=-1)
    return torch.searchsorted(reached_RV, uniform_R1 * reached_RV[:, -1:], right=True).squeeze(1)
