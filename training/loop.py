"""The training loop: optimizer steps over whatever a task hands out. Knows no rows and no files, and prints nothing.

A task (conversations: training/text.py) holds the rows in work and says what one optimizer step consists of; everything about
gradients, weights and their average is here.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from artifacts.checkpoint import TrainerState
from config.errors import UsageError
from config.schema import TrainingConfig
from models.distributed import Ranks
from models.ema import EMA
from training.optimizer import ModelOptimizer

# How the names of the optimizer's tensors begin among the trainer's.
_OPTIMIZER = "optimizer."


@dataclass(frozen=True)
class MicroBatch:
    """The loss of some rows of an optimizer step. Its graph is freed before the next micro-batch is asked for."""

    loss: Tensor
    """Scalar to differentiate: a sum, not a mean."""
    weight: int
    """What the loss sums over: the step's gradient is divided by the weights of all its micro-batches together."""
    sums: dict[str, Tensor | int]
    """What is logged, summed over the rows, with at least the counts "tokens" and "supervised"; tensors are left on the device."""


class Task(Protocol):
    """What is trained: the rows in work, what they have come to, and the losses of an optimizer step."""

    @property
    def busy(self) -> bool:
        """Whether any row is in work."""

    @property
    def done(self) -> int:
        """How far the run has come, of `total`."""

    @property
    def total(self) -> int:
        """Where `done` ends."""

    @property
    def unit(self) -> str:
        """What `done` counts, as the progress bar calls it."""

    @property
    def loss_name(self) -> str:
        """Which entry of `report` is the loss to watch."""

    @property
    def sum_names(self) -> Sequence[str]:
        """The names of a micro-batch's sums."""

    @property
    def epochs(self) -> int:
        """Passes over the training split in the whole run."""

    @property
    def epochs_done(self) -> int:
        """Whole passes over the training split that have been trained."""

    @property
    def finished_depths(self) -> list[int]:
        """ACT steps taken by each of this rank's rows that left in the last optimizer step."""

    def admit(self, step: int) -> None:
        """Take the rows that enter with optimizer step number `step`, from 1, if there are any left."""

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at optimizer step number `step`, from 1, once its rows are taken."""

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches of one optimizer step. Rows have moved on when the iterator is exhausted."""

    def after_step(self, lr_factor: float) -> None:
        """Called after each applied step, at this share of the peak learning rate: update what the optimizer does not own."""

    def after_skipped_step(self) -> None:
        """Called after a step that was skipped: let no row carry on what isn't finite."""

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is logged of some steps, from their micro-batches' sums: the same for any number of ranks and micro-batches."""

    def timing(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is logged with the times of those steps: how they were computed, which is not."""

    def state(self) -> TrainerState:
        """The position in the data, and what rows of all ranks carry from step to step, between two steps."""

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, for logging: sums and depths of this rank, the rest of all. Tensors are left on the device."""

    step: int
    lr: float
    """Of AdamATan2."""
    weight: int
    """What the step's gradient was divided by."""
    grad_norm: float
    """Of the gradient as it would be without clipping; not finite if the step was skipped."""
    skipped: bool
    """The loss or the gradient wasn't finite: no weight has moved."""
    sums: dict[str, Tensor | int]
    finished_depths: list[int]


class Trainer:
    """A model with its optimizer and moving average, trained on a task, by one rank or several that hold the same weights."""

    def __init__(self, config: TrainingConfig, model: nn.Module, task: Task, ranks: Ranks | None = None) -> None:
        self.config = config
        self.model = model
        self.task = task
        self.ranks = ranks or Ranks()
        self.step_number = 0
        self.skipped_in_a_row = 0
        self.optimizer = ModelOptimizer(config, model)
        self.ema = EMA(model, config.ema_rate) if config.ema else None

    def steps(self) -> Iterator[StepResult]:
        """Train until the task has no row left in work.

        Raises UsageError when `skip_limit` steps in a row had to be skipped.
        """
        self.task.admit(self.step_number + 1)
        while self.task.busy:
            yield self._step()
            if self.skipped_in_a_row >= self.config.skip_limit:
                raise UsageError(
                    f"no finite gradient in {self.skipped_in_a_row} steps in a row, up to step {self.step_number}: lower lr, set "
                    "grad_clip, raise lr_warmup_steps, or use arch.forward_dtype=float32; no weight has moved since, and earlier "
                    "checkpoints of the run are kept"
                )
            self.task.admit(self.step_number + 1)

    def _step(self) -> StepResult:
        lr_factor = self.task.lr_factor(self.step_number + 1)
        self.optimizer.zero_grad()
        losses, weight, sums = list[Tensor](), 0, dict[str, Tensor | int]()
        for micro_batch in self.task.micro_batches():
            micro_batch.loss.backward()
            losses.append(micro_batch.loss.detach())
            weight += micro_batch.weight
            for name, value in micro_batch.sums.items():
                sums[name] = sums[name] + value if name in sums else value
        weight, grad_norm = self._reduce_gradients(losses, weight)
        skipped = not math.isfinite(grad_norm)
        if skipped:
            self.skipped_in_a_row += 1
            self.task.after_skipped_step()
        else:
            self.skipped_in_a_row = 0
            self.optimizer.step(lr_factor)
            self.task.after_step(lr_factor)
            if self.ema is not None:
                self.ema.update(self.model)
        self.step_number += 1
        return StepResult(
            step=self.step_number,
            lr=self.config.lr * lr_factor,
            weight=weight,
            grad_norm=grad_norm,
            skipped=skipped,
            sums=sums,
            finished_depths=self.task.finished_depths,
        )

    def _reduce_gradients(self, losses: list[Tensor], weight: int) -> tuple[int, float]:
        """Sum gradients over ranks, divide by the weight of all micro-batches, clip; that weight, and the norm before clipping.

        The norm is not finite if a loss isn't. Reading it is the one time in a step that the host waits for the device: whether
        weights may move depends on it.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        # A rank that has run out of rows has no gradients, but must add zeros where the others have some.
        weight, *with_gradient = map(int, self.ranks.sum_numbers([weight, *(p.grad is not None for p in parameters)]))
        reached = [p for p, ranks in zip(parameters, with_gradient, strict=True) if ranks]
        for p in reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in reached if p.grad is not None]
        # No parameter is reached where only the puzzles' vectors learn.
        zero = grads[0].new_zeros(()) if grads else torch.zeros((), device=losses[0].device)
        loss = torch.stack(losses).sum().to(zero.dtype) if losses else zero
        self.ranks.sum_([*grads, loss])
        # Divided once, at the end: by then the micro-batches of all ranks have said what they sum over.
        if grads:
            torch._foreach_div_(grads, float(max(1, weight)))
        norm = torch.nn.utils.get_total_norm(grads)
        grad_norm = float(norm + 0 * loss)
        if self.config.grad_clip is not None and grad_norm > self.config.grad_clip:
            torch._foreach_mul_(grads, self.config.grad_clip / grad_norm)
        return weight, grad_norm

    def state(self) -> TrainerState:
        """Everything that training goes on from, between two steps, but for the weights and their average."""
        task = self.task.state()
        tensors = {**task.tensors, **{_OPTIMIZER + name: value for name, value in self.optimizer.state().items()}}
        return TrainerState(tensors, {"step": self.step_number, "skipped_in_a_row": self.skipped_in_a_row, **task.values})

    def load_state(self, state: TrainerState, average: Mapping[str, Tensor] | None = None) -> None:
        """Go on from `state` and the weights' moving `average`, if the run keeps one.

        The weights must be loaded, and the task's data stand where the state was taken.
        """
        own = {name.removeprefix(_OPTIMIZER): t for name, t in state.tensors.items() if name.startswith(_OPTIMIZER)}
        self.optimizer.load_state(own)
        if self.ema is not None:
            if average is None:
                raise ValueError("this run keeps a moving average, and there is none to go on from")
            for name, kept in self.ema.average.items():
                kept.copy_(average[name])
        self.step_number = state.values["step"]
        self.skipped_in_a_row = state.values["skipped_in_a_row"]
        self.task.load_state(state)
