"""How far a run has come: a step, the steps since the last log line, and all that its checkpoint keeps beside tensors."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator, TypeAdapter
from torch import Tensor

from models.distributed import Ranks
from training.stopping import EarlyStopping


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
    """ACT steps taken by each row that left."""


@dataclass
class Window:
    """The steps since the last log line. Tensors are read only when a line or a checkpoint is written."""

    lr: float = 0.0
    steps: int = 0
    """Without those that were skipped."""
    skipped: int = 0
    grad_norm: float = 0.0
    """A sum over the steps, as are all that follow, of this rank."""
    sums: dict[str, float] = field(default_factory=dict)
    halted_at: Annotated[dict[int, int], BeforeValidator(dict)] = field(default_factory=dict)
    """How many rows left after so many ACT steps. Earlier versions saved pairs."""

    def __post_init__(self) -> None:
        self._unread: dict[str, list[Tensor]] = {}

    def add(self, result: StepResult) -> None:
        """Count a step."""
        self.lr = result.lr
        for depth in result.finished_depths:
            self.halted_at[depth] = self.halted_at.get(depth, 0) + 1
        if result.skipped:
            self.skipped += 1
            return
        self.steps += 1
        self.grad_norm += result.grad_norm
        for name, value in result.sums.items():
            self.sums.setdefault(name, 0.0)
            if isinstance(value, Tensor):
                self._unread.setdefault(name, []).append(value)
            else:
                self.sums[name] += value

    def over_ranks(self, ranks: Ranks, max_depth: int) -> "Window":
        """The same window of all ranks, which all must call."""
        for name, unread in self._unread.items():
            # Added on the host, in float64, which not every device has.
            for value in torch.stack(unread).tolist():
                self.sums[name] += value
        self._unread.clear()
        # A rank without rows knows no names; the first one has rows whenever another has some.
        names, depths = ranks.agree(list(self.sums)), range(max_depth + 1)
        totals = ranks.sum_numbers([self.sums.get(name, 0) for name in names] + [self.halted_at.get(depth, 0) for depth in depths])
        halted_at = {depth: int(count) for depth, count in zip(depths, totals[len(names) :], strict=True) if count}
        return replace(self, sums=dict(zip(names, totals, strict=False)), halted_at=halted_at)


@dataclass
class RunProgress:
    """What trainer/state.json keeps of a run of any task, under the names of these fields."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    skipped_in_a_row: int = 0
    window: Window = field(default_factory=Window)
    losses: list[float] = field(default_factory=list)
    """Of the last log lines, to see a loss that jumps."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    seconds: float = 0.0
    """Of training, without the time that the run was stopped."""
    seconds_at_line: float = 0.0
    """When the last log line was written."""
    forward_dtype: str | None = None
    """What "auto" was decided to be."""
    metrics_log_bytes: int = 0
    timing_log_bytes: int = 0
    wandb_id: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Read state.json, which has the task's keys, too."""
        return TypeAdapter(cls).validate_python(values)

    def values(self, ranks: Ranks, max_depth: int) -> dict[str, Any]:
        """JSON values of all ranks, which all must call."""
        return asdict(replace(self, window=self.window.over_ranks(ranks, max_depth)))
