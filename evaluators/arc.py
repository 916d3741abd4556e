"""ARC by voting: counts equal grids among the predictions for the augmented forms of a puzzle."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from artifacts.files import write_whole
from config.errors import UsageError
from dataset.puzzles.arc_grids import SEQ_LEN, Augmentation, Grid, crop, grid_hash, parse_grid, parse_name
from dataset.puzzles.storage import TEST_PUZZLES_FILE, read_identifiers, read_json
from models.distributed import ALONE, Ranks

PASS_KS = (1, 2, 5, 10, 100, 1000)
ATTEMPTS = 2
SUBMISSION_FILE = "submission.json"
# The submission for a test input without a prediction.
_NO_PREDICTION = [[0]]


@dataclass
class Votes:
    """Votes by question and hash of the predicted grid: their number and sum of probabilities."""

    counts: dict[tuple[str, bytes], dict[bytes, tuple[int, float]]] = field(default_factory=dict)
    grids: dict[bytes, Grid] = field(default_factory=dict)

    def add(self, question: tuple[str, bytes], grid: Grid, probability: float, count: int = 1) -> None:
        """Add `count` votes for a grid, with the sum of their probabilities."""
        key = grid_hash(grid)
        self.grids.setdefault(key, grid)
        candidates = self.counts.setdefault(question, {})
        before, total = candidates.get(key, (0, 0.0))
        candidates[key] = before + count, total + probability

    def add_rows(
        self,
        forms: Sequence[tuple[str, Augmentation] | None],
        *,
        inputs: Tensor,
        preds: Tensor,
        q_halt_logits: Tensor,
    ) -> None:
        """Add the votes of B rows: inputs and preds [B, 900] tokens, q_halt_logits [B].

        forms: each row's puzzle and augmentation, which is inverted; None skips the row.
        """
        probabilities = torch.sigmoid(q_halt_logits.cpu().double()).tolist()
        canvases = (tokens.cpu().numpy().reshape(-1, SEQ_LEN) for tokens in (inputs, preds))
        for form, question, predicted, probability in zip(forms, *map(crop, canvases), probabilities, strict=True):
            if form is not None:
                puzzle, augmentation = form
                key = puzzle, grid_hash(augmentation.invert(question))
                self.add(key, np.ascontiguousarray(augmentation.invert(predicted)), probability)

    def merge(self, other: "Votes") -> None:
        """Add another process's votes."""
        for question, candidates in other.counts.items():
            for key, (count, probability) in candidates.items():
                self.add(question, other.grids[key], probability, count)

    def ranked(self, question: tuple[str, bytes]) -> list[bytes]:
        """Hashes of the predicted grids: most votes first, then highest mean halting probability."""
        candidates = self.counts.get(question, {})

        # The hash breaks ties, so that the order doesn't depend on which prediction came first.
        def weight(key: bytes) -> tuple[int, float, bytes]:
            count, total = candidates[key]
            return count, total / count, key

        return sorted(candidates, key=weight, reverse=True)


class ARC:
    """pass@K of one data set: `begin` an evaluation, `add` its batches, read the `result`.

    accumulate: keep votes of earlier evaluations, as in the original; otherwise `begin` clears them.
    """

    # Keys that a batch and its predictions must have.
    required_outputs = ("inputs", "puzzle_identifiers", "q_halt_logits", "preds")

    def __init__(
        self, data_path: str | Path, *, pass_ks: Sequence[int] = PASS_KS, attempts: int = ATTEMPTS, accumulate: bool = True
    ) -> None:
        """data_path: of dataset/build_arc_dataset.py. attempts: of a submission. Raises UsageError."""
        self._pass_ks = tuple(pass_ks)
        self._attempts = attempts
        self._accumulate = accumulate
        self._names = read_identifiers(data_path)
        self._puzzles: dict[str, dict[str, Any]] = read_json(Path(data_path) / TEST_PUZZLES_FILE)
        if not self._puzzles:
            raise UsageError(f"{data_path} has no test puzzles: build it with a --test-set-name that is among its --subsets")
        self._votes = Votes()

    def begin(self) -> None:
        """Begin an evaluation."""
        if not self._accumulate:
            self._votes = Votes()

    def add(self, inputs: Tensor, puzzle_identifiers: Tensor, preds: Tensor, q_halt_logits: Tensor) -> None:
        """Add predictions of B rows: inputs and preds [B, 900] tokens, identifiers and logits [B].

        Skips padding and other puzzles than test puzzles. Raises UsageError for an unknown identifier.
        """
        forms: list[tuple[str, Augmentation] | None] = []
        for identifier in puzzle_identifiers.tolist():
            if not 0 <= identifier < len(self._names):
                raise UsageError(
                    f"puzzle identifier {identifier} isn't one of the data set's {len(self._names)}: evaluate on the data that "
                    "the model is for"
                )
            form = parse_name(self._names[identifier])
            forms.append(form if form[0] in self._puzzles else None)
        self._votes.add_rows(forms, inputs=inputs, preds=preds, q_halt_logits=q_halt_logits)

    def result(self, output_dir: str | Path | None = None, ranks: Ranks = ALONE) -> dict[str, float]:
        """Metrics `ARC/pass@K` from the votes of all `ranks`; empty on ranks other than the first.

        pass@K: the mean over puzzles of the fraction of their test pairs whose output is among the
        K grids with most votes. Writes submission.json if `output_dir` is given; a second attempt
        there repeats the first if only one grid was predicted.
        """
        gathered = ranks.gather_at_first(self._votes)
        if not gathered:
            return {}
        votes = Votes()
        for of_rank in gathered:
            votes.merge(of_rank)
        solved = np.zeros(len(self._pass_ks))
        submission: dict[str, list[dict[str, list[list[int]]]]] = {}
        for name, puzzle in self._puzzles.items():
            submission[name] = []
            for pair in puzzle["test"]:
                ranked = votes.ranked((name, grid_hash(parse_grid(pair["input"]))))
                wanted = grid_hash(parse_grid(pair["output"]))
                solved += np.array([wanted in ranked[:k] for k in self._pass_ks]) / len(puzzle["test"])
                grids = [votes.grids[key].tolist() or _NO_PREDICTION for key in ranked[: self._attempts]] or [_NO_PREDICTION]
                grids += [grids[0]] * (self._attempts - len(grids))
                submission[name].append({f"attempt_{number}": grid for number, grid in enumerate(grids, 1)})
        if output_dir is not None:
            write_whole(Path(output_dir) / SUBMISSION_FILE, json.dumps(submission).encode())
        return {f"ARC/pass@{k}": float(share) / len(self._puzzles) for k, share in zip(self._pass_ks, solved, strict=True)}
