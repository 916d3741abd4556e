"""Test-time search: answers each puzzle several times, from noisy states or in symmetric forms, and
chooses one answer.

Knows no labels and no files. Shape suffixes as in models/layers.py; K samples of a puzzle,
consecutive in R = B * K rows; P positions of a puzzle's vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config.errors import UsageError
from dataset.puzzles.draws import raw_bits
from dataset.puzzles.kinds import Kind
from models.device import on_device
from models.recursive_reasoning.base import States

Choice = Literal["halting", "first", "votes", "rules"]
# Separates this module's random numbers from others with the same seed.
_NOISE_DRAW = 3
_SYMMETRY_DRAW = "samples"


class Forms(NamedTuple):
    """Symmetric forms of R rows: the source cell of each cell, and the new value of each token."""

    cells_RT: Tensor
    tokens_RV: Tensor

    def of(self, rows_RT: Tensor) -> Tensor:
        """The forms of these rows. Negative labels don't change."""
        moved_RT = rows_RT.gather(1, self.cells_RT)
        return torch.where(moved_RT < 0, moved_RT, self.tokens_RV.gather(1, moved_RT.clamp(min=0)))

    def undone(self, rows_RT: Tensor) -> Tensor:
        """The rows that have these forms (the inverse of `of`)."""
        tokens_RT = self.tokens_RV.argsort(dim=1).gather(1, rows_RT)
        return torch.empty_like(rows_RT).scatter_(1, self.cells_RT, tokens_RT)


@dataclass(frozen=True)
class Search:
    """The settings of test-time search. Raises UsageError."""

    samples: int = 1
    """K. The first sample is the unchanged puzzle, from the model's initial states."""
    noise: float = 0.0
    """Standard deviation of noise on the other samples' initial states; their own is about 1."""
    symmetries: bool = False
    """The other samples are symmetric forms of the puzzle; their answers are mapped back."""
    choose: Choice = "halting"
    """halting: the highest halting logit. first: the first sample to halt; the others then stop.
    votes: the most common answer. rules: an answer that solves the puzzle by its rules; the others
    then stop. Ties: the highest halting logit.
    """
    seed: int = 0
    kind: Kind | None = None
    """The kind of puzzle, for its symmetries and rules; None if neither is used."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(f"--samples {self.samples}: expected at least 1")
        if not 0 <= self.noise < math.inf:
            raise UsageError(f"--noise {self.noise}: expected a finite number of at least 0")
        if (self.symmetries or self.choose == "rules") and not (self.kind and self.kind.has_rules):
            raise UsageError("--symmetries and --choose rules are for Sudoku and mazes: choose halting, first or votes, and noise")
        if (self.samples > 1) != bool(self.noise or self.symmetries):
            raise UsageError(
                f"--samples {self.samples}, --noise {self.noise}: several samples differ by --noise, 1 for example, or by "
                "--symmetries, and a single sample needs neither"
            )

    def puzzles_at_once(self, rows: int) -> int:
        """Puzzles per batch of about `rows` samples."""
        return max(1, rows // self.samples)

    def forms(self, rows: Sequence[int], device: torch.device) -> "Forms | None":
        """Forms of the samples of puzzles at `rows`, by seed and row only; None: all unchanged."""
        if not self.symmetries:
            return None
        assert self.kind is not None
        drawn = [self.kind.symmetries(raw_bits(self.seed, _SYMMETRY_DRAW, row), self.samples) for row in rows]
        return Forms(*(on_device(np.concatenate(tables), device) for tables in zip(*drawn, strict=True)))

    def starts(self, states: States, rows: Sequence[int]) -> States:
        """The initial states [R, P + T, D] of all samples, from those [B, P + T, D] of the puzzles.

        A sample's noise depends only on the seed, the puzzle's row and the sample's number.
        """
        repeated = tuple(state.repeat_interleave(self.samples, dim=0) for state in states)
        if not self.noise:
            return repeated
        shape = (len(states), *states[0].shape[1:])
        noise = np.zeros((len(rows), self.samples, *shape), np.float32)
        for index, row in enumerate(rows):
            for sample in range(1, self.samples):
                key = np.random.Philox(key=self.seed, counter=[0, _NOISE_DRAW, row, sample])
                noise[index, sample] = np.random.Generator(key).standard_normal(shape, np.float32)
        drawn = on_device(noise, states[0].device).flatten(0, 1).to(states[0].dtype)
        return tuple(state + self.noise * drawn[:, number] for number, state in enumerate(repeated))

    def choice(
        self, questions_BT: Tensor, preds_BKT: Tensor, halt_logits_BK: Tensor, has_halted_BK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each puzzle's chosen sample, int64 [B], and whether its samples may stop, bool [B]."""
        if self.choose == "halting":
            votes_BK = torch.zeros_like(has_halted_BK, dtype=torch.int64)
        elif self.choose == "first":
            votes_BK = has_halted_BK.long()
        elif self.choose == "votes":
            votes_BK = (preds_BKT.unsqueeze(2) == preds_BKT.unsqueeze(1)).all(dim=3).sum(dim=2)
        else:
            assert self.kind is not None
            questions, answers = questions_BT.repeat_interleave(self.samples, dim=0), preds_BKT.flatten(0, 1)
            solves = self.kind.solves(questions.cpu().numpy(), answers.cpu().numpy())
            votes_BK = on_device(solves.astype(np.int64), preds_BKT.device).view_as(halt_logits_BK)
        is_behind_BK = votes_BK < votes_BK.amax(dim=1, keepdim=True)
        chosen_B = halt_logits_BK.masked_fill(is_behind_BK, -math.inf).argmax(dim=1)
        return chosen_B, (votes_BK > 0).any(dim=1) & (self.choose in ("first", "rules"))


# A single sample, from the model's initial states.
NO_SEARCH = Search()
