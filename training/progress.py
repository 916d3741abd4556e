"""The progress of a run: a step's result, the steps since the last log line, state.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import torch
from pydantic import TypeAdapter
from torch import Tensor

from models.distributed import Ranks
from training.stopping import EarlyStopping


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, for logging. `sums` are this rank's; tensors stay on the device."""

    step: int
    lr: float
    """The learning rate of AdamATan2."""
    weight: int
    """The gradient's divisor: the weights of all micro-batches and ranks."""
    grad_norm: float
    """Norm of the gradient before clipping; not finite if the step was skipped."""
    skipped: bool
    """The loss or the gradient wasn't finite, so the weights didn't change."""
    sums: dict[str, Tensor | int]


@dataclass
class Window:
    """The steps since the last log line. Tensors are read only for a log line or a checkpoint."""

    lr: float = 0.0
    steps: int = 0
    """Steps that weren't skipped."""
    skipped: int = 0
    grad_norm: float = 0.0
    """Sum over the steps; so are `sums`, for this rank."""
    sums: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._unread: dict[str, list[Tensor]] = {}

    def add(self, result: StepResult) -> None:
        """Add a step."""
        self.lr = result.lr
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

    def over_ranks(self, ranks: Ranks) -> "Window":
        """The window summed over ranks. All ranks must call it."""
        for name, unread in self._unread.items():
            # Add on the host: not every device has float64.
            for value in torch.stack(unread).tolist():
                self.sums[name] += value
        self._unread.clear()
        # A rank without rows has no names. The first rank has rows whenever another has some.
        names = ranks.agree(list(self.sums))
        totals = ranks.sum_numbers([self.sums.get(name, 0) for name in names])
        return replace(self, sums=dict(zip(names, totals, strict=True)))


@dataclass
class RunProgress:
    """The part of trainer/state.json that all tasks share, by the names of these fields."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    skipped_in_a_row: int = 0
    window: Window = field(default_factory=Window)
    losses: list[float] = field(default_factory=list)
    """Losses of the last log lines, to notice a jump."""
    early_stopping: EarlyStopping = field(default_factory=EarlyStopping)
    seconds: float = 0.0
    """Time that the run has taken, without the time between its processes."""
    seconds_at_line: float = 0.0
    """`seconds` at the last log line."""
    forward_dtype: str | None = None
    """The resolved number format, where the config says "auto"."""
    metrics_log_bytes: int = 0
    timing_log_bytes: int = 0
    wandb_id: str | None = None

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> Self:
        """Read state.json; keys of the task are ignored."""
        return TypeAdapter(cls).validate_python(values)

    def values(self, ranks: Ranks) -> dict[str, Any]:
        """JSON values, summed over ranks. All ranks must call it."""
        return asdict(replace(self, window=self.window.over_ranks(ranks)))
