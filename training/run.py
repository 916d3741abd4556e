"""What every training run does around its loop: logs, evaluations, checkpoints, the progress bar.

The only file of this room that touches disk and the screen. Knows no Hydra, and not what is trained: that is a `Job`
(conversations: training/instruct.py).
"""

import contextlib
import datetime
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from tqdm import tqdm

from artifacts.checkpoint import TrainerState
from artifacts.plots import draw_runs
from config.errors import UsageError
from config.schema import TrainingConfig
from models.device import peak_memory
from training.loggers import open_logger
from training.loop import StepResult, Task, Trainer


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: what its checkpoint holds, whatever is trained."""

    step: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    metrics: Mapping[str, Any]
    trainer: TrainerState


class Job(Protocol):
    """What differs between kinds of training: the data and how a model is measured and kept."""

    @property
    def model(self) -> nn.Module:
        """What is trained."""

    @property
    def task(self) -> Task:
        """What it is trained on."""

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """Measure the model as it stands after `step` on held-out data, and show what there is to see; None: there is none."""

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """Write the checkpoint `folder`, whole or not at all."""


def run_folder(config: TrainingConfig) -> Path:
    """Where the run is kept. Raises UsageError if a run is there already."""
    assert config.run_name is not None
    folder = Path(config.checkpoint_dir) / config.project_name / config.run_name
    if list(folder.glob("step_*")):
        raise UsageError(f"{folder} has checkpoints already and is not overwritten: choose another run_name, or delete it")
    return folder


def new_run_name(arch: str) -> str:
    """A name of recursion and time."""
    return f"{arch}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


class _Window:
    """Sums since the last log line; tensors are read only when a line is written."""

    def __init__(self) -> None:
        self.lr = 0.0
        self.sums: dict[str, Tensor | float] = {}
        self.depths: Counter[int] = Counter()

    def add(self, result: StepResult) -> None:
        self.lr = result.lr
        self.depths.update(result.finished_depths)
        for name, value in result.sums.items():
            self.sums[name] = self.sums.get(name, 0) + (value.double() if isinstance(value, Tensor) else value)

    def totals(self) -> dict[str, float]:
        return {name: float(value) for name, value in self.sums.items()}


class Run:
    """One training run in `folder`."""

    def __init__(self, config: TrainingConfig, job: Job, folder: Path) -> None:
        self.config = config
        self.job = job
        self.folder = folder
        self.trainer = Trainer(config, job.model, job.task)
        self._device = next(job.model.parameters()).device
        self._logger = open_logger(config, folder)

    def train(self) -> Path:
        """Train to the end; returns the folder of the last checkpoint."""
        config, task = self.config, self.job.task
        saved: Path | None = None
        window, started, logged = _Window(), time.perf_counter(), time.perf_counter()
        evaluated_epochs = 0
        with tqdm(total=task.total, unit=task.unit, dynamic_ncols=True, mininterval=1) as bar:
            for result in self.trainer.steps():
                bar.update(task.done - bar.n)
                window.add(result)
                finished_all = task.done == task.total
                if result.step % config.log_interval == 0 or finished_all:
                    totals = window.totals()
                    metrics = self._metrics(window, totals)
                    if not math.isfinite(metrics[task.loss_name]):
                        raise UsageError(
                            f"the loss is not finite at step {result.step}: lower lr, raise lr_warmup_steps, or use "
                            "arch.forward_dtype=float32; earlier checkpoints of the run are kept"
                        )
                    now = time.perf_counter()
                    timing = {
                        "step": result.step,
                        "seconds": now - started,
                        "tokens_per_second": totals["tokens"] / (now - logged),
                        "supervised_tokens_per_second": totals["supervised"] / (now - logged),
                        **peak_memory(self._device),
                    }
                    self._logger.training(metrics, timing)
                    bar.set_postfix(loss=f"{metrics[task.loss_name]:.3f}", act_steps=_short(metrics["mean_act_steps"]))
                    window, logged = _Window(), now
                epochs = task.epochs_done
                if finished_all or epochs // config.eval_interval > evaluated_epochs // config.eval_interval:
                    evaluated_epochs = epochs
                    saved = self._evaluate_and_save()
        self._logger.close()
        assert saved is not None
        print(f"checkpoint {saved}")
        return saved

    def _metrics(self, window: _Window, totals: dict[str, float]) -> dict[str, Any]:
        depths = window.depths
        return {
            "step": self.trainer.step_number,
            "examples": self.job.task.done,
            "lr": window.lr,
            **self.job.task.report(totals),
            "mean_act_steps": sum(depths.elements()) / depths.total() if depths else None,
            "halted_at": {str(depth): count for depth, count in sorted(depths.items())},
        }

    def _evaluate_and_save(self) -> Path:
        trainer = self.trainer
        metrics: dict[str, Any] = {"step": trainer.step_number, "examples": self.job.task.done}
        averaged = trainer.ema.swapped_in(trainer.model) if trainer.ema is not None else contextlib.nullcontext()
        with averaged:
            report = self.job.evaluate(trainer.step_number)
        if report is not None:
            metrics["test"] = report
            self._logger.evaluation(metrics)
        state = trainer.state()
        state.values.update(self._logger.state())
        folder = self.folder / f"step_{trainer.step_number}"
        average = trainer.ema.average if trainer.ema is not None else None
        if self.config.plot:
            self._draw()
        self.job.save(folder, Snapshot(trainer.step_number, trainer.model.state_dict(), average, metrics, state))
        return folder

    def _draw(self) -> None:
        """The picture of the run so far, for want of which no run ends."""
        try:
            draw_runs([self.folder], self.folder / "run.png")
        except UsageError as error:
            tqdm.write(str(error))


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
