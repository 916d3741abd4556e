"""What the training loop knows of its data: training/text.py and training/puzzle.py."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from artifacts.checkpoint import TrainerState


class Position(NamedTuple):
    """A position in the training data of a run."""

    examples: int
    """Examples trained."""
    epochs: int
    """Whole passes over the training split."""


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a step with their loss. Its graph is freed before the next one is built."""

    loss: Tensor
    """Differentiable scalar: a sum, not a mean."""
    weight: int
    """The number of terms in the loss; the gradient is divided by the step's total weight."""
    sums: dict[str, Tensor | int]
    """Sums over the rows, to log; tensors stay on the device. Every micro-batch of a task has the
    same names.

    They include the counts "tokens" and "supervised" and, if attention computes padding,
    "attended": its positions.
    """


@dataclass(frozen=True)
class Batch:
    """The data of one optimizer step."""

    lr_factor: float
    """Fraction of the peak learning rate."""
    micro_batches: Iterator[MicroBatch]
    """This rank's part. If any rank has rows, the first one has some."""


class Task(Protocol):
    """Rows in a fixed order, and their losses."""

    @property
    def loss_name(self) -> str:
        """The key of the loss in `report` and in an evaluation."""

    @property
    def total(self) -> Position:
        """The end of the run's data."""

    @property
    def done(self) -> Position:
        """The position of all ranks together; `examples` is the total once no batch is left."""

    def next_batch(self, step: int) -> Batch:
        """The rows of optimizer step number `step`, from 1."""

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics to log, from micro-batches' sums: the same for any number of ranks and parts."""

    def state(self) -> TrainerState:
        """The position in the data, and the carry of all ranks, between two steps."""

    def load_state(self, state: TrainerState) -> None:
        """Resume from `state`, saved by any number of ranks."""
