"""Where a run's figures go: its JSONL files always, W&B and TensorBoard as the config says. Knows nothing of what is trained.

A logger takes the same two kinds of line that metrics.jsonl has, and says what a checkpoint must remember for it to go on.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from artifacts.metrics_log import MetricsLog
from config.errors import UsageError
from config.schema import TrainingConfig

WANDB_VARIABLE = "WANDB_MODE"
_WANDB_MODES = ("offline", "online", "disabled")


class Logger(Protocol):
    """One place that figures go to. Lines come in the order of their steps."""

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Figures of the steps since the line before, and what depends on the clock, both with their "step"."""

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """An evaluation: "step", "examples", and the measures as "test"."""

    def state(self) -> dict[str, Any]:
        """JSON values that a resumed run gives to `open_logger`."""

    def close(self) -> None:
        """Write what is left to be written."""


def open_logger(config: TrainingConfig, folder: Path, saved: Mapping[str, Any] | None = None) -> Logger:
    """All loggers of the run in `folder` as one; `saved` is the state that it resumes from, None for a new run.

    Raises UsageError if one that is asked for can't begin.
    """
    saved = saved or {}
    step = int(saved.get("step", 0))
    # The others first: if one can't begin, metrics.jsonl hasn't been touched.
    others: list[Logger] = []
    mode = wandb_mode(config)
    if mode != "disabled":
        others.append(_WandB(config, folder, mode, saved.get("wandb_id")))
    if config.tensorboard:
        others.append(_TensorBoard(folder, step))
    return _All([_JSONLines(folder, saved), *others])


def wandb_mode(config: TrainingConfig) -> str:
    """offline, online or disabled: `config.wandb`, else the variable WANDB_MODE, else offline. Raises UsageError for others."""
    mode = config.wandb or os.environ.get(WANDB_VARIABLE) or "offline"
    if mode not in _WANDB_MODES:
        raise UsageError(f"{WANDB_VARIABLE}={mode}: expected one of {', '.join(_WANDB_MODES)}")
    return mode


def numbers(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among `values`, as `group/name`."""
    return {f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float) and name != "step"}


class _All:
    def __init__(self, loggers: list[Logger]) -> None:
        self._loggers = loggers

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.training(metrics, timing)

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        for logger in self._loggers:
            logger.evaluation(metrics)

    def state(self) -> dict[str, Any]:
        return {key: value for logger in self._loggers for key, value in logger.state().items()}

    def close(self) -> None:
        for logger in self._loggers:
            logger.close()


class _JSONLines:
    def __init__(self, folder: Path, saved: Mapping[str, Any]) -> None:
        self._log = MetricsLog(folder, saved.get("metrics_log_bytes", 0), saved.get("timing_log_bytes", 0))

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self._log.write(metrics, timing)

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._log.write(metrics)

    def state(self) -> dict[str, Any]:
        return {"metrics_log_bytes": self._log.length, "timing_log_bytes": self._log.timing_length}

    def close(self) -> None:
        self._log.close()


class _WandB:
    def __init__(self, config: TrainingConfig, folder: Path, mode: str, run_id: str | None) -> None:
        import wandb

        # Or it would write elsewhere.
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=config.project_name,
                name=config.run_name,
                id=run_id,
                resume="allow",
                mode="online" if mode == "online" else "offline",
                config=config.model_dump(),
                dir=str(folder),
                # Its own capture of the console would log tqdm's bar line by line.
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.errors.Error as error:
            raise UsageError(
                f"W&B can't begin: {error}; log in with `wandb login`, or use wandb=offline or wandb=disabled"
            ) from error

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self._run.log({**numbers("train", metrics), **numbers("timing", timing)}, step=metrics["step"])

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._run.log(numbers("test", metrics["test"]), step=metrics["step"])

    def state(self) -> dict[str, Any]:
        return {"wandb_id": self._run.id}

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as missing:
            raise UsageError("tensorboard=true needs a package of that name: run `pip install tensorboard`") from missing
        # A reader drops what a run that was killed had written after `step`.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        self._add({**numbers("train", metrics), **numbers("timing", timing)}, metrics["step"])

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        self._add(numbers("test", metrics["test"]), metrics["step"])

    def _add(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def state(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self._writer.close()
