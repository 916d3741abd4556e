"""What every training run does around its loop: logs, evaluations, checkpoints, signals, the progress bar.

With resume.py and loggers.py the only files of this room that touch disk and the screen. Knows no Hydra, and not what is trained:
that is a `Job` (conversations: training/instruct_run.py).
"""

import contextlib
import os
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.checkpoint import Snapshot, TrainerState, best_checkpoints, held_out_loss, load_weights, prune_checkpoints
from artifacts.plots import draw_runs
from config.errors import StoppedBySignal, UsageError
from config.schema import TrainingConfig
from models.act import RecursiveModel
from models.device import peak_memory, set_matmul_precision, should_compile
from models.distributed import Ranks
from training.loggers import open_logger
from training.loop import StepResult, Task, Trainer
from training.resume import ResumePoint
from training.stopping import EarlyStopping, Position, automatic_evaluations, is_evaluation_due, reason_to_end

# A loss this much above the median of the last lines is said to be a spike: a factor, and nats beside it for losses near 0.
_SPIKE_FACTOR, _SPIKE_NATS = 1.5, 0.2
_SPIKE_LINES = 20


class Job(Protocol):
    """What differs between kinds of training: the data and how a model is measured and kept."""

    @property
    def model(self) -> RecursiveModel:
        """What is trained."""

    @property
    def task(self) -> Task:
        """What it is trained on."""

    @property
    def evaluation_rows(self) -> int:
        """Rows of held-out data that an evaluation measures."""

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """Measure the model as it stands after `step` on held-out data, and show what there is to see; None: there is none.

        All ranks call it and get the same; the first one shows. `task.loss_name` is among the measures.
        """

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """Write the checkpoint `folder`, whole or not at all."""


@dataclass(frozen=True)
class RunResult:
    """What a run has come to."""

    checkpoint: Path
    """The last one."""
    loss: float | None
    """Held-out loss of that checkpoint, `task.loss_name`; None: there is no held-out data."""


def make_ready(
    model: RecursiveModel, config: TrainingConfig, device: torch.device, resume_point: ResumePoint, ranks: Ranks
) -> None:
    """Bring `model` to where and how it is trained, and say so."""
    model.to(device)
    set_matmul_precision(config.tf32, device)
    if should_compile(config.compile, device):
        model.compile_levels()
    parameters = sum(p.numel() for p in model.parameters())
    processes = f", {ranks.size} ranks" if ranks.size > 1 else ""
    ranks.say(f"run {resume_point.folder}: {parameters:,} parameters, {device.type}, {model.config.forward_dtype}{processes}")


class _Window:
    """Sums since the last log line; tensors are read only when a line is written."""

    def __init__(self, names: tuple[str, ...], depths: int) -> None:
        self.lr = 0.0
        self.steps = 0
        self.skipped = 0
        self.grad_norm = 0.0
        self._sums = dict.fromkeys(names, 0.0)
        self._unread: dict[str, list[Tensor]] = {name: [] for name in names}
        self._halted_at = np.zeros(depths + 1)

    def add(self, result: StepResult) -> None:
        self.lr = result.lr
        self._halted_at += np.bincount(np.array(result.finished_depths, np.int64), minlength=len(self._halted_at))
        if result.skipped:
            self.skipped += 1
            return
        self.steps += 1
        self.grad_norm += result.grad_norm
        for name, value in result.sums.items():
            if isinstance(value, Tensor):
                self._unread[name].append(value)
            else:
                self._sums[name] += value

    def totals(self, ranks: Ranks) -> tuple[dict[str, float], dict[int, int]]:
        """Sums by name, and how many rows halted at each depth, over all ranks."""
        for name, unread in self._unread.items():
            # Added on the host, in float64, which not every device has.
            for value in torch.stack(unread).tolist() if unread else ():
                self._sums[name] += value
            unread.clear()
        numbers = ranks.sum_numbers([*self._sums.values(), *self._halted_at])
        halted_at = {depth: int(count) for depth, count in enumerate(numbers[len(self._sums) :]) if count}
        return dict(zip(self._sums, numbers, strict=False)), halted_at

    def state(self, ranks: Ranks) -> dict[str, Any]:
        """What goes on in another window, as JSON values."""
        sums, halted_at = self.totals(ranks)
        own = {"lr": self.lr, "steps": self.steps, "skipped": self.skipped, "grad_norm": self.grad_norm}
        return {**own, "sums": sums, "halted_at": [[depth, count] for depth, count in halted_at.items()]}

    def load_state(self, state: Mapping[str, Any], ranks: Ranks) -> None:
        self.lr, self.steps, self.skipped = state["lr"], state["steps"], state["skipped"]
        self.grad_norm = state["grad_norm"]
        if ranks.is_first:
            self._sums.update(state["sums"])
            for depth, count in state["halted_at"]:
                self._halted_at[depth] = count


class Run:
    """One training run, begun at `resume_point`."""

    def __init__(self, config: TrainingConfig, job: Job, resume_point: ResumePoint, ranks: Ranks) -> None:
        self.config = config
        self.job = job
        self.folder = resume_point.folder
        self.ranks = ranks
        self.trainer = Trainer(config, job.model, job.task, ranks)
        self._window = self._new_window()
        self._loss: float | None = None
        self._seconds_before = self._logged = 0.0
        self._saved = None if resume_point.saved is None else resume_point.saved.folder
        values: dict[str, Any] = {}
        if resume_point.saved is not None:
            values = resume_point.saved.trainer.values
            load_weights(job.model, resume_point.saved.weights, resume_point.saved.folder)
            self.trainer.load_state(resume_point.saved.trainer, resume_point.saved.average)
            self._window.load_state(values["window"], ranks)
            self._loss = held_out_loss(resume_point.saved.folder, job.task.loss_name)
            self._seconds_before, self._logged = values["seconds"], values["seconds_at_line"]
        self._losses = deque[float](values.get("losses", ()), maxlen=_SPIKE_LINES)
        self._early_stopping = EarlyStopping(config.early_stopping, values.get("early_stopping"))
        step, is_over_time = self.trainer.step_number, self._is_over_time(self._seconds_before)
        is_through = job.task.done == job.task.total
        self._end = None if is_through else reason_to_end(config, step, is_over_time, self._early_stopping)
        # Of a run that has come to its end already, the logs are left as they are.
        self._logger = open_logger(config, self.folder, values) if ranks.is_first and self._end is None else None
        if self._logger is not None and self._logger.state()["metrics_log_bytes"] < values.get("metrics_log_bytes", 0):
            print(f"{self.folder / 'metrics.jsonl'} is shorter than at {self._saved}: lines of the run are missing")

    def train(self) -> RunResult:
        """Train to the end: of the data, or where the config says so before.

        Raises StoppedBySignal once SIGTERM or SIGINT has come and what the run needs to go on is saved.
        """
        config, task = self.config, self.job.task
        self._started = self._saved_at = time.perf_counter()
        if self._end is not None:
            return self._finished(already=True)
        automatic = automatic_evaluations(config, task.total, task.epochs, self.job.evaluation_rows)
        before = self._position()
        with (
            _first_signal() as stop,
            tqdm(
                total=task.total,
                initial=task.done,
                unit=task.unit,
                dynamic_ncols=True,
                mininterval=1,
                disable=not self.ranks.is_first,
            ) as bar,
        ):
            for result in self.trainer.steps():
                bar.update(task.done - bar.n)
                self._window.add(result)
                finished_all = task.done == task.total
                if result.step % config.log_interval == 0 or finished_all:
                    bar.set_postfix(self._write_line())
                metrics = None
                now = self._position()
                if finished_all or is_evaluation_due(config, automatic, task.total, before, now):
                    metrics = self._evaluate()
                    if self._loss is not None:
                        self._early_stopping.observe(self._loss)
                before = now
                # Ranks act as one: on any rank's signal, and by the clock of the first.
                own = 4 * stop.signal_number + 2 * self._is_over_time(self._seconds()) + self._is_save_due(result.step)
                asked = self.ranks.gather_values(own)
                stopped_by = max(number // 4 for number in asked)
                if not finished_all:
                    self._end = reason_to_end(config, result.step, bool(asked[0] & 2), self._early_stopping)
                if self._end is not None:
                    self._close(metrics)
                    break
                of_evaluation = metrics is not None and (config.saves_evaluations or finished_all)
                if of_evaluation or asked[0] & 1 or stopped_by:
                    self._save(metrics or {"step": result.step, "examples": task.done})
                if stopped_by and not finished_all:
                    if self._logger is not None:
                        name = signal.Signals(stopped_by).name
                        tqdm.write(f"{name}: saved {self._saved}; resume=auto run_name={self.folder.name} goes on")
                        self._logger.close()
                    raise StoppedBySignal(stopped_by)
        if self._logger is not None:
            self._logger.close()
        return self._finished()

    def _close(self, metrics: Mapping[str, Any] | None) -> None:
        """End a run that has data left: its last line, evaluation (unless this step has its own, `metrics`) and checkpoint.

        The checkpoint knows the run as it was before them. So a run that goes on, because it may now take longer, takes them out of
        its logs, and is the one that never ended here.
        """
        state = self._state()
        if self._window.steps or self._window.skipped:
            self._write_line()
        self._save(metrics or self._evaluate(), state)

    def _finished(self, already: bool = False) -> RunResult:
        """What the run has come to, and say why it ended, if not because its data did."""
        assert self._saved is not None
        if self._end is not None:
            ended = "has ended already" if already else "ends"
            self.ranks.say(
                f"the run {ended} at step {self.trainer.step_number}: {self._end}; to go on, raise that and give "
                f"resume=auto run_name={self.folder.name}"
            )
            if already and self._loss is None:
                # It was saved there for another reason, before the limit was set or by the clock.
                self._evaluate()
        if self.ranks.is_first and self.config.early_stopping.patience is not None:
            [best, *_] = best_checkpoints(self.folder, self.job.task.loss_name) or [self._saved]
            self.ranks.say(f"best checkpoint {best}")
        return RunResult(self._saved, self._loss)

    def _position(self) -> Position:
        return Position(self.trainer.step_number, self.job.task.done, self.job.task.epochs_done)

    def _new_window(self) -> _Window:
        return _Window(tuple(self.job.task.sum_names), self.config.arch.halt_max_steps)

    def _seconds(self) -> float:
        """Since the run began, without the time it was stopped."""
        return self._seconds_before + time.perf_counter() - self._started

    def _is_over_time(self, seconds: float) -> bool:
        return self.config.max_minutes is not None and seconds >= 60 * self.config.max_minutes

    def _is_save_due(self, step: int) -> bool:
        when = self.config.checkpoint
        by_clock = when.every_minutes is not None and time.perf_counter() - self._saved_at >= 60 * when.every_minutes
        return by_clock or (when.every_steps is not None and step % when.every_steps == 0)

    def _write_line(self) -> dict[str, str]:
        """A line for the steps since the last one; returns what the bar shows of it."""
        window, task = self._window, self.job.task
        totals, halted_at = window.totals(self.ranks)
        rows = sum(halted_at.values())
        metrics: dict[str, Any] = {
            "step": self.trainer.step_number,
            "examples": task.done,
            "lr": window.lr,
            **(task.report(totals) if window.steps else {}),
            "mean_act_steps": sum(depth * count for depth, count in halted_at.items()) / rows if rows else None,
            "halted_at": {str(depth): count for depth, count in halted_at.items()},
            "grad_norm": window.grad_norm / window.steps if window.steps else None,
            "skipped_steps": window.skipped,
        }
        now = self._seconds()
        timing = {
            "step": self.trainer.step_number,
            "seconds": now,
            "tokens_per_second": totals["tokens"] / (now - self._logged),
            "supervised_tokens_per_second": totals["supervised"] / (now - self._logged),
            **(task.timing(totals) if window.steps else {}),
            **peak_memory(self.job.model.device),
        }
        if self._logger is not None:
            self._logger.training(metrics, timing)
            self._warn(metrics)
        self._window, self._logged = self._new_window(), now
        numbers = {"loss": metrics.get(task.loss_name), "act_steps": metrics["mean_act_steps"]}
        return {name: "-" if value is None else f"{value:.3f}" for name, value in numbers.items()}

    def _warn(self, metrics: Mapping[str, Any]) -> None:
        at = f"step {metrics['step']}: "
        if metrics["skipped_steps"]:
            tqdm.write(f"{at}{metrics['skipped_steps']} steps skipped, whose loss or gradient wasn't finite")
        loss = metrics.get(self.job.task.loss_name)
        if loss is not None:
            usual = statistics.median(self._losses) if len(self._losses) == _SPIKE_LINES else loss
            if loss > _SPIKE_FACTOR * usual + _SPIKE_NATS:
                tqdm.write(
                    f"{at}the loss has jumped to {loss:.3f} from about {usual:.3f}; if it stays there, lower lr or set grad_clip"
                )
            self._losses.append(loss)

    def _evaluate(self) -> dict[str, Any]:
        """Measure the weights, or their average if there is one; returns what is kept of it."""
        trainer = self.trainer
        self._loss = None
        metrics: dict[str, Any] = {"step": trainer.step_number, "examples": self.job.task.done}
        averaged = trainer.ema.swapped_in(trainer.model) if trainer.ema is not None else contextlib.nullcontext()
        with averaged:
            report = self.job.evaluate(trainer.step_number)
        if report is not None:
            metrics["test"] = report
            self._loss = float(report[self.job.task.loss_name])
            if self._logger is not None:
                self._logger.evaluation(metrics)
        if self._logger is not None and self.config.plot:
            self._draw()
        return metrics

    def _draw(self) -> None:
        """The picture of the run so far, for want of which no run ends."""
        try:
            draw_runs([self.folder], self.folder / "run.png")
        except UsageError as error:
            tqdm.write(str(error))

    def _state(self) -> TrainerState:
        """What the run goes on from; of ranks but the first, their part of it."""
        state = self.trainer.state()
        state.values["window"] = self._window.state(self.ranks)
        if self._logger is not None:
            state.values.update(self._logger.state())
            state.values["seconds"], state.values["seconds_at_line"] = self._seconds(), self._logged
            state.values["forward_dtype"] = self.job.model.config.forward_dtype
            state.values["early_stopping"] = self._early_stopping.state()
            state.values["losses"] = list(self._losses)
        return state

    def _save(self, metrics: Mapping[str, Any], state: TrainerState | None = None) -> None:
        """Write a checkpoint to go on from `state`, by default the present one, which all ranks gather."""
        trainer = self.trainer
        state = state or self._state()
        folder = self.folder / f"step_{trainer.step_number}"
        if self._logger is not None:
            average = trainer.ema.average if trainer.ema is not None else None
            self.job.save(folder, Snapshot(trainer.step_number, trainer.model.state_dict(), average, metrics, state))
            keep = self.config.checkpoint
            if keep.keep_last is not None:
                keep_best = max(keep.keep_best, self.config.early_stopping.patience is not None)
                prune_checkpoints(self.folder, keep.keep_last, keep_best, self.job.task.loss_name)
        self._saved, self._saved_at = folder, time.perf_counter()


class _Stop:
    """The first signal that asked for an end; 0: none has."""

    signal_number = 0


@contextlib.contextmanager
def _first_signal() -> Iterator[_Stop]:
    """Within the block SIGTERM and SIGINT are noted instead of obeyed; a second Ctrl-C is obeyed at once.

    Not the second where torchrun passes on what the terminal has sent already.
    """
    stop = _Stop()

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal_number = stop.signal_number or number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
