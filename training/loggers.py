"""Loggers of metrics: JSONL files always, W&B and TensorBoard as configured."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from artifacts.files import JsonLines
from config.errors import UsageError
from config.schema import TrainingConfig

WANDB_VARIABLE = "WANDB_MODE"
_WANDB_MODES = ("offline", "online", "disabled")


class RunLogger:
    """All loggers of the run in `folder`. Lines come in the order of their steps.

    metrics.jsonl is reproducible: values that depend on the clock are in timing.jsonl.
    """

    def __init__(self, config: TrainingConfig, folder: Path, saved: Mapping[str, Any] | None = None) -> None:
        """saved: `state` and "step" to resume from. Raises UsageError if a configured logger can't start."""
        saved = saved or {}
        # The JSONL files last: if another logger can't start, metrics.jsonl is still untouched.
        mode = wandb_mode(config)
        self._wandb = None if mode == "disabled" else _start_wandb(config, folder, mode, saved.get("wandb_id"))
        self._tensorboard = _open_tensorboard(folder, int(saved.get("step", 0))) if config.tensorboard else None
        self._metrics = JsonLines(folder / "metrics.jsonl", saved.get("metrics_log_bytes", 0))
        self._timing = JsonLines(folder / "timing.jsonl", saved.get("timing_log_bytes", 0))

    def training(self, metrics: Mapping[str, Any], timing: Mapping[str, Any]) -> None:
        """Log the metrics of the steps since the last line, and their timing; both have a "step"."""
        self._metrics.write(metrics)
        self._timing.write(timing)
        self._draw({**_numbers("train", metrics), **_numbers("timing", timing)}, metrics["step"])

    def evaluation(self, metrics: Mapping[str, Any]) -> None:
        """Log an evaluation: "step", "examples", and the metrics as "test"."""
        self._metrics.write(metrics)
        self._draw(_numbers("test", metrics["test"]), metrics["step"])

    def _draw(self, values: Mapping[str, float], step: int) -> None:
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def state(self) -> dict[str, Any]:
        """JSON values to resume from, named as in `training.progress.RunProgress`."""
        return {
            "metrics_log_bytes": self._metrics.length,
            "timing_log_bytes": self._timing.length,
            "wandb_id": None if self._wandb is None else self._wandb.id,
        }

    def close(self) -> None:
        """Flush and close all loggers."""
        self._metrics.close()
        self._timing.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def wandb_mode(config: TrainingConfig) -> str:
    """offline, online or disabled: `config.wandb`, WANDB_MODE, or offline. Raises UsageError."""
    mode = config.wandb or os.environ.get(WANDB_VARIABLE) or "offline"
    if mode not in _WANDB_MODES:
        raise UsageError(f"{WANDB_VARIABLE}={mode}: expected one of {', '.join(_WANDB_MODES)}")
    return mode


def log_measurement(metrics: dict[str, Any], project: str, run: str, folder: Path, mode: str) -> None:
    """Log the numbers among a split's `metrics` to a W&B run of their own. mode: from `wandb_mode`."""
    if mode == "disabled":
        return
    import wandb

    online: Literal["online", "offline"] = "online" if mode == "online" else "offline"
    with wandb.init(project=project, name=run, job_type="inference", dir=str(folder), mode=online) as logged:
        logged.log({f"{metrics['split']}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)})


def _numbers(group: str, values: Mapping[str, Any]) -> dict[str, float]:
    return {f"{group}/{name}": value for name, value in values.items() if isinstance(value, int | float) and name != "step"}


def _start_wandb(config: TrainingConfig, folder: Path, mode: str, run_id: str | None) -> Any:
    import wandb

    # Otherwise W&B writes to another folder.
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return wandb.init(
            project=config.project_name,
            name=config.run_name,
            id=run_id,
            resume="allow",
            mode="online" if mode == "online" else "offline",
            config=config.model_dump(),
            dir=str(folder),
            # W&B's console capture would log tqdm's bar line by line.
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise UsageError(f"W&B can't start: {error}; log in with `wandb login`, or use wandb=offline or wandb=disabled") from error


def _open_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as missing:
        raise UsageError("tensorboard=true needs a package of that name: run `pip install tensorboard`") from missing
    # TensorBoard then drops what a killed run wrote after `step`.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
