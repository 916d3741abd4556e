"""What differs between conversations (training/text.py) and puzzles (training/puzzle.py) to the loop that trains on them.

Knows no optimizer and no files.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from artifacts.checkpoint import TrainerState


class Position(NamedTuple):
    """A place in the training data of a run."""

    examples: int
    """Examples trained."""
    epochs: int
    """Whole passes over the training split."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of an optimizer step with their loss. Its graph is freed before the next micro-batch is asked for."""

    loss: Tensor
    """Scalar to differentiate: a sum, not a mean."""
    weight: int
    """What the loss sums over: the step's gradient is divided by the weights of all its micro-batches together."""
    sums: dict[str, Tensor | int]
    """Figures to log, summed over the rows; tensors stay on the device. Every micro-batch of a task has the same names.

    Among them are the counts "tokens" and "supervised" and, where attention computes padding, "attended": its positions.
    """
    finished_depths: Tensor
    """int64, for each row: the ACT steps that it has taken if it leaves with this step, else 0."""


@dataclass(frozen=True)
class Batch:
    """What one optimizer step trains on."""

    lr_factor: float
    """Share of the peak learning rate."""
    micro_batches: Iterator[MicroBatch]
    """This rank's part. Where any rank has rows, the first one has some."""


class Task(Protocol):
    """What is trained on: rows in a fixed order, and their losses."""

    @property
    def loss_name(self) -> str:
        """Which entry of `report`, and of an evaluation, is the loss to watch."""

    @property
    def total(self) -> Position:
        """The end of the run's data."""

    @property
    def done(self) -> Position:
        """How far all ranks together have come; `total.examples` are reached when there is no further batch."""

    def next_batch(self, step: int) -> Batch:
        """Take the rows of optimizer step number `step`, from 1."""

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is logged of some steps, from their micro-batches' sums: the same for any number of ranks and micro-batches."""

    def state(self) -> TrainerState:
        """The position in the data, and what rows of all ranks carry from step to step, between two steps."""

    def load_state(self, state: TrainerState) -> None:
        """Resume from `state`, whatever number of ranks left it."""
