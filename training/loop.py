"""The training loop: optimizer steps over whatever a task hands out. Knows no rows and no files, and prints nothing.

A task (conversations: training/text.py) holds the rows in work and says what one optimizer step consists of; everything about
gradients, weights and their average is here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from artifacts.checkpoint import TrainerState
from config.schema import TrainingConfig
from models.ema import EMA
from training.optimizer import AdamATan2


@dataclass(frozen=True)
class Part:
    """One part of an optimizer step: some rows at one ACT step. Its graph is freed before the next part is asked for."""

    loss: Tensor
    """Scalar to differentiate: a sum, not a mean."""
    weight: int
    """What the loss sums over: the step's gradient is divided by the weights of all its parts together."""
    sums: dict[str, Tensor | int]
    """What is logged, summed over the part, with at least the counts "tokens" and "supervised"; tensors are left on the device."""
    finished_depths: list[int]
    """ACT steps taken by each row that halted in this part."""


class Task(Protocol):
    """What is trained: rows in slots, what they have come to, and the losses of an optimizer step."""

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
    def epochs_done(self) -> int:
        """Whole passes over the training split that have been trained."""

    def admit(self) -> None:
        """Fill free slots, if there is anything left to fill them with."""

    def lr_factor(self) -> float:
        """The next step's share of the peak learning rate."""

    def parts(self) -> Iterator[Part]:
        """The parts of one optimizer step. Rows have moved on when the iterator is exhausted."""

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What is logged of some steps, from their parts' sums."""

    def state(self) -> TrainerState:
        """Rows, their states, and the position in the data, between two steps."""

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, for logging. Tensors are left on the device."""

    step: int
    lr: float
    weight: int
    """What the step's gradient was divided by."""
    sums: dict[str, Tensor | int] = field(default_factory=dict)
    finished_depths: list[int] = field(default_factory=list)


class Trainer:
    """A model with its optimizer and moving average, trained on a task."""

    def __init__(self, config: TrainingConfig, model: nn.Module, task: Task) -> None:
        self.config = config
        self.model = model
        self.task = task
        self.step_number = 0
        self.optimizer = AdamATan2(
            model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self.ema = EMA(model, config.ema_rate) if config.ema else None

    def steps(self) -> Iterator[StepResult]:
        """Train until the task has no row left in work."""
        self.task.admit()
        while self.task.busy:
            yield self._step()
            self.task.admit()

    def _step(self) -> StepResult:
        lr = self.config.lr * self.task.lr_factor()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        weight, sums, finished_depths = 0, dict[str, Tensor | int](), list[int]()
        for part in self.task.parts():
            part.loss.backward()
            weight += part.weight
            for name, value in part.sums.items():
                sums[name] = sums[name] + value if name in sums else value
            finished_depths += part.finished_depths
        # Divided once, at the end: with several ACT steps to a step, what they sum over isn't known before the last of them.
        torch._foreach_div_([p.grad for p in self.model.parameters() if p.grad is not None], float(max(1, weight)))
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.model)
        self.step_number += 1
        return StepResult(self.step_number, lr, weight, sums, finished_depths)

    def state(self) -> TrainerState:
        """Everything that training goes on from, between two steps, but for the weights and their average."""
        task = self.task.state()
        tensors = dict(task.tensors)
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        return TrainerState(tensors, {"step": self.step_number, **task.values})

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`; the weights must be loaded, and the task's data stand where the state was taken."""
        tensors = state.tensors
        for name, parameter in self.model.named_parameters():
            if f"optimizer.step.{name}" not in tensors:
                continue  # it never had a gradient: with grad_calls=1 nothing reaches the embedding
            self.optimizer.state[parameter] = {
                "step": int(tensors[f"optimizer.step.{name}"]),
                "m": tensors[f"optimizer.m.{name}"].to(parameter.device, copy=True),
                "v": tensors[f"optimizer.v.{name}"].to(parameter.device, copy=True),
            }
        self.step_number = state.values["step"]
        self.task.load_state(state)
