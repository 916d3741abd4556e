"""Test-time search: a trained model answers each puzzle several times, from other states or in other forms; one answer is taken.

Knows no labels and no files. Shape suffixes as in models/layers.py; K counts the samples of a puzzle, which stand one after the
other in R = B * K rows; P counts a puzzle vector's positions.
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
# Separates this module's draws from others that are keyed by the same seed.
_NOISE_DRAW = 3
_SYMMETRY_DRAW = "samples"


class Forms(NamedTuple):
    """Symmetric forms of R rows of tokens: which cell comes to each, and what each token becomes (dataset.puzzles.kinds)."""

    cells_RT: Tensor
    tokens_RV: Tensor

    def of(self, rows_RT: Tensor) -> Tensor:
        """The forms of these rows; a negative label stays."""
        moved_RT = rows_RT.gather(1, self.cells_RT)
        return torch.where(moved_RT < 0, moved_RT, self.tokens_RV.gather(1, moved_RT.clamp(min=0)))

    def undone(self, rows_RT: Tensor) -> Tensor:
        """The rows whose forms these are."""
        tokens_RT = self.tokens_RV.argsort(dim=1).gather(1, rows_RT)
        return torch.empty_like(rows_RT).scatter_(1, self.cells_RT, tokens_RT)


@dataclass(frozen=True)
class Search:
    """How many starts, how far from the model's own, and whose answer is taken. Raises UsageError."""

    samples: int = 1
    """K. The first one is the puzzle as it is, from the states that the model was trained to begin with."""
    noise: float = 0.0
    """Standard deviation of what is added to the initial states of the others, which themselves have about 1."""
    symmetries: bool = False
    """The others are symmetric forms of the puzzle, of whose answers the symmetry is undone."""
    choose: Choice = "halting"
    """halting: the highest halting logit. first: of those that halt first, and then the others stop. votes: what most samples
    answer. rules: what solves the puzzle by its rules, and then the others stop. Among equals the highest halting logit."""
    seed: int = 0
    kind: Kind | None = None
    """The puzzle that has these symmetries and rules; None where nothing asks for them."""

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
                "--symmetries, and a single one has none"
            )

    def puzzles_at_once(self, rows: int) -> int:
        """How many puzzles have about `rows` samples."""
        return max(1, rows // self.samples)

    def forms(self, rows: Sequence[int], device: torch.device) -> "Forms | None":
        """The samples' forms of puzzles that stand at `rows` of their set, by seed and row alone; None: the puzzles as they are."""
        if not self.symmetries:
            return None
        assert self.kind is not None
        drawn = [self.kind.symmetries(raw_bits(self.seed, _SYMMETRY_DRAW, row), self.samples) for row in rows]
        return Forms(*(on_device(np.concatenate(tables), device) for tables in zip(*drawn, strict=True)))

    def starts(self, states: States, rows: Sequence[int]) -> States:
        """The latent states [B, P + T, D] of puzzles that stand at `rows` of their set, as those of their samples [R, P + T, D].

        A sample's noise depends on the seed, the row and the sample's number alone.
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
        """Whose answer is taken of samples that stand so, int64 [B], and for which puzzles (bool [B]) no sample need go on."""
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


# One start, the model's own.
NO_SEARCH = Search()
