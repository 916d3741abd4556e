"""The training loop: a run (`Run.train`), and an optimizer step (`Trainer.step`) of a `Task`."""

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from artifacts.checkpoint import Snapshot, TrainerState, best_checkpoints, held_out_loss, prune_checkpoints
from artifacts.plots import draw_runs
from artifacts.report import write_report
from artifacts.weights import load_weights
from config.errors import StoppedBySignal, UsageError
from config.schema import TrainingConfig
from models.act import RecursiveModel
from models.device import peak_memory
from models.distributed import ALONE, Ranks
from models.ema import EMA
from training.console import Console
from training.loggers import RunLogger
from training.optimizer import ModelOptimizer
from training.progress import RunProgress, StepResult, Window
from training.resume import ResumePoint
from training.stopping import automatic_evaluations, first_signal, is_evaluation_due, reason_to_end
from training.task import Task

# Prefix of the optimizer's tensors in a checkpoint.
_OPTIMIZER = "optimizer."
# Training warns of a loss above factor * median + nats, over the median of the last log lines. The
# nats matter near a loss of 0.
_SPIKE_FACTOR, _SPIKE_NATS = 1.5, 0.2
_SPIKE_LINES = 20


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    checkpoint: Path
    """The last checkpoint."""
    loss: float | None
    """Its held-out loss (`Task.loss_name`); None without held-out data."""


class Run:
    """One training run on disk, from `resume_point` on: everything around the steps of `trainer`."""

    def __init__(
        self,
        trainer: "Trainer",
        resume_point: ResumePoint,
        *,
        evaluate: Callable[[int], dict[str, Any] | None],
        evaluation_rows: int,
        save: Callable[[Path, Snapshot], None],
    ) -> None:
        """Loads the weights and the state of a run that is resumed.

        evaluate: given the number of steps, measure `evaluation_rows` held-out rows, on all ranks,
        and show results; None without any. save: write a checkpoint.
        """
        self.trainer, self.task, self.ranks, self.config = trainer, trainer.task, trainer.ranks, trainer.config
        self.folder = resume_point.folder
        self._measure, self._evaluation_rows, self._write_checkpoint = evaluate, evaluation_rows, save
        self._loss: float | None = None
        self._saved: Path | None = None
        saved = resume_point.saved
        if saved is not None:
            self._saved = saved.folder
            load_weights(trainer.model, saved.weights, saved.folder)
            trainer.load_state(saved.trainer, saved.average)
            self._loss = held_out_loss(saved.folder, self.task.loss_name)
        progress = trainer.progress
        progress.forward_dtype = trainer.model.config.forward_dtype
        data_is_used_up = self.task.done.examples == self.task.total.examples
        limit = reason_to_end(self.config, progress.step, progress.seconds, progress.early_stopping)
        self._end_reason = None if data_is_used_up else limit
        # The logs of a run that has already ended stay as they are.
        self._has_ended = data_is_used_up or self._end_reason is not None
        begins = self.ranks.is_first and not self._has_ended
        self._logger = RunLogger(self.config, self.folder, vars(progress)) if begins else None
        if self._logger is not None and self._logger.state()["metrics_log_bytes"] < progress.metrics_log_bytes:
            print(f"{self.folder / 'metrics.jsonl'} is shorter than when {self._saved} was saved: lines of the run are missing")

    def train(self) -> RunResult:
        """Train to the end of the data, or to an earlier limit of the config.

        Raises StoppedBySignal after SIGTERM or SIGINT, once a checkpoint to resume from is saved.
        """
        self._saved_at = time.perf_counter()
        self._begun_at = self._saved_at - self.trainer.progress.seconds
        if self._has_ended:
            return self._finished()
        config, task, total = self.config, self.task, self.task.total
        automatic = automatic_evaluations(config, total, self._evaluation_rows)
        before = task.done
        console = Console(
            config,
            total=total.examples,
            done=before.examples,
            seconds=self.trainer.progress.seconds,
            shown=self.ranks.is_first,
        )
        logs = contextlib.nullcontext() if self._logger is None else contextlib.closing(self._logger)
        with first_signal() as stop, console, logs:
            for result in self.trainer.steps():
                now = task.done
                is_last = now.examples == total.examples
                console.advance(now.examples)

                # Log.
                self.trainer.progress.window.add(result)
                if result.step % config.log_interval == 0 or is_last:
                    self._log(console)

                # Evaluate.
                metrics = None
                if is_last or is_evaluation_due(config, automatic, total, result.step, before, now):
                    metrics = self._evaluate()
                before = now

                # End, or save. All ranks decide alike: a signal to any of them counts, and rank 0's clock.
                own = (stop.signal_number, self._seconds(), self._is_save_due(result.step))
                signals, (seconds, *_), (is_save_due, *_) = zip(*self.ranks.gather(own), strict=True)
                stopped_by = max(signals)
                if not is_last:
                    self._end_reason = reason_to_end(config, result.step, seconds, self.trainer.progress.early_stopping)
                if self._end_reason is not None and not stopped_by:
                    self._end_early(metrics)
                    break
                keeps_evaluation = metrics is not None and (config.saves_evaluations or is_last)
                if keeps_evaluation or is_save_due or stopped_by:
                    self._save(metrics or {"step": result.step, "examples": now.examples})
                if stopped_by and not is_last:
                    if self._logger is not None:
                        name = signal.Signals(stopped_by).name
                        tqdm.write(f"{name}: saved {self._saved}; resume with resume=auto run_name={self.folder.name}")
                    raise StoppedBySignal(stopped_by)
        return self._finished()

    def _log(self, console: Console | None = None) -> None:
        progress, task, now = self.trainer.progress, self.task, self._seconds()
        window = progress.window.over_ranks(self.ranks)
        sums = window.sums
        metrics: dict[str, Any] = {
            "step": progress.step,
            "examples": task.done.examples,
            "lr": window.lr,
            **(task.report(sums) if window.steps else {}),
            "grad_norm": window.grad_norm / window.steps if window.steps else None,
            "skipped_steps": window.skipped,
        }
        seconds, memory = now - progress.seconds_at_line, peak_memory(self.trainer.model.device)
        timing = {
            "step": progress.step,
            "seconds": now,
            "tokens_per_second": sums.get("tokens", 0.0) / seconds,
            "supervised_tokens_per_second": sums.get("supervised", 0.0) / seconds,
            **({"attention_padding": 1 - sums["tokens"] / sums["attended"]} if sums.get("attended") else {}),
            **memory,
        }
        loss = metrics.get(task.loss_name)
        if self._logger is not None:
            self._logger.training(metrics, timing)
            self._warn(window.skipped, loss)
        progress.window, progress.seconds_at_line = Window(), now
        if console is not None:
            shown = (("loss", task.loss_name), ("act_steps", "steps"))
            figures = {name: metrics[key] for name, key in shown if key in metrics}
            console.line(progress.step, task.done.examples, figures, memory)

    def _warn(self, skipped: int, loss: float | None) -> None:
        progress = self.trainer.progress
        if skipped:
            tqdm.write(f"step {progress.step}: {skipped} steps skipped, because the loss or gradient wasn't finite")
        if loss is None:
            return
        usual = statistics.median(progress.losses) if len(progress.losses) == _SPIKE_LINES else loss
        if loss > _SPIKE_FACTOR * usual + _SPIKE_NATS:
            tqdm.write(
                f"step {progress.step}: the loss has jumped to {loss:.3f} from about {usual:.3f}; if it stays there, "
                "lower lr or set grad_clip"
            )
        progress.losses = [*progress.losses, loss][-_SPIKE_LINES:]

    def _evaluate(self) -> dict[str, Any]:
        """Measure the weights, or their average if there is one; returns the metrics to save."""
        trainer, progress = self.trainer, self.trainer.progress
        self._loss = None
        metrics: dict[str, Any] = {"step": progress.step, "examples": self.task.done.examples}
        with trainer.averaged_weights():
            report = self._measure(progress.step)
        if report is not None:
            metrics["test"] = report
            self._loss = float(report[self.task.loss_name])
            progress.early_stopping.observe(self._loss, self.config.early_stopping)
            if self._logger is not None:
                self._logger.evaluation(metrics)
        if self._logger is not None and self.config.plot:
            with _reported():
                draw_runs([self.folder], self.folder / "run.png")
        return metrics

    def _state(self) -> TrainerState:
        logs = {} if self._logger is None else self._logger.state()
        self.trainer.progress = replace(self.trainer.progress, seconds=self._seconds(), **logs)
        return self.trainer.state()

    def _save(self, metrics: Mapping[str, Any], state: TrainerState | None = None) -> None:
        """Write a checkpoint with `state`, by default the current one, which all ranks gather."""
        trainer, step, keep = self.trainer, self.trainer.progress.step, self.config.checkpoint
        state = state or self._state()
        folder = self.folder / f"step_{step}"
        if self._logger is not None:
            average = trainer.ema.average if trainer.ema is not None else None
            self._write_checkpoint(folder, Snapshot(step, trainer.model.state_dict(), average, metrics, state))
            if keep.keep_last is not None:
                keep_best = max(keep.keep_best, self.config.early_stopping.patience is not None)
                prune_checkpoints(self.folder, keep.keep_last, keep_best, self.task.loss_name)
        self._saved, self._saved_at = folder, time.perf_counter()

    def _end_early(self, metrics: Mapping[str, Any] | None) -> None:
        """End a run that has data left, with its last log line, evaluation and checkpoint.

        The checkpoint holds the state from before this log line and evaluation. Resuming with a
        higher limit cuts both from the logs, and gives the run that never ended here.
        """
        state, window = self._state(), self.trainer.progress.window
        if window.steps or window.skipped:
            self._log()
        self._save(metrics or self._evaluate(), state)

    def _finished(self) -> RunResult:
        """The result of the run. Reports why it ended, unless its data did."""
        assert self._saved is not None
        if self._end_reason is not None:
            ended = "has already ended" if self._has_ended else "ends"
            self.ranks.say(
                f"the run {ended} at step {self.trainer.progress.step}: {self._end_reason}; to resume, raise it and give "
                f"resume=auto run_name={self.folder.name}"
            )
            if self._has_ended and self._loss is None:
                # That checkpoint was saved for another reason and has no evaluation.
                self._evaluate()
        if self.ranks.is_first and self.config.report and not self._has_ended:
            with _reported():
                write_report([self.folder], self.folder / "report.html")
        if self.ranks.is_first and self.config.early_stopping.patience is not None:
            [best, *_] = best_checkpoints(self.folder, self.task.loss_name) or [self._saved]
            self.ranks.say(f"best checkpoint {best}")
        return RunResult(self._saved, self._loss)

    def _seconds(self) -> float:
        """Time that the run has taken, without the time between its processes."""
        return time.perf_counter() - self._begun_at

    def _is_save_due(self, step: int) -> bool:
        when = self.config.checkpoint
        by_clock = when.every_minutes is not None and time.perf_counter() - self._saved_at >= 60 * when.every_minutes
        return by_clock or (when.every_steps is not None and step % when.every_steps == 0)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Report an error in drawing or writing a report, and keep training."""
    try:
        yield
    except UsageError as error:
        tqdm.write(str(error))


class Trainer:
    """A model with its optimizer and moving average, trained on a task by one or more ranks."""

    def __init__(self, config: TrainingConfig, model: RecursiveModel, task: Task, ranks: Ranks = ALONE) -> None:
        self.config, self.model, self.task, self.ranks = config, model, task, ranks
        self.optimizer = ModelOptimizer(config, model)
        self.ema = EMA(model, config.ema_rate) if config.ema else None
        self.progress = RunProgress()

    def steps(self) -> Iterator[StepResult]:
        """Train to the end of the data. Raises UsageError after `skip_limit` skipped steps in a row."""
        while self.task.done.examples < self.task.total.examples:
            result = self.step()
            yield result
            if self.progress.skipped_in_a_row >= self.config.skip_limit:
                raise UsageError(
                    f"no finite gradient in {self.progress.skipped_in_a_row} steps in a row, up to step {result.step}: lower lr, "
                    "set grad_clip, raise lr_warmup_steps, or use arch.forward_dtype=float32; the weights haven't changed since, "
                    "and earlier checkpoints of the run are kept"
                )

    def step(self) -> StepResult:
        """One optimizer step, of all ranks together."""
        config, progress = self.config, self.progress
        progress.step += 1

        # Forward and backward, a micro-batch at a time.
        batch = self.task.next_batch(progress.step)
        self.optimizer.zero_grad()
        losses, weight, sums = list[Tensor](), 0, dict[str, Tensor | int]()
        for micro_batch in batch.micro_batches:
            micro_batch.loss.backward()
            losses.append(micro_batch.loss.detach())
            weight += micro_batch.weight
            for name, value in micro_batch.sums.items():
                sums[name] = sums[name] + value if name in sums else value

        # Sum over ranks. A rank without rows has no gradients; it adds zeros for parameters that
        # have one on other ranks.
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        weight, *with_gradient = map(int, self.ranks.sum_numbers([weight, *(p.grad is not None for p in parameters)]))
        reached = [p for p, ranks in zip(parameters, with_gradient, strict=True) if ranks]
        for p in reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in reached if p.grad is not None]
        # With freeze_weights only the puzzles' vectors learn, and no parameter has a gradient.
        zero = grads[0].new_zeros(()) if grads else torch.zeros((), device=self.model.device)
        loss = torch.stack(losses).sum().to(zero.dtype) if losses else zero
        self.ranks.sum_([*grads, loss])
        # Divide once, at the end: only now are the weights of all micro-batches and ranks known.
        if grads:
            torch._foreach_div_(grads, float(max(1, weight)))

        # Clip. The norm isn't finite if the loss isn't. Reading it is the only time that a step waits
        # for its device.
        grad_norm = float(torch.nn.utils.get_total_norm(grads) + 0 * loss)
        if config.grad_clip is not None and grad_norm > config.grad_clip:
            torch._foreach_mul_(grads, config.grad_clip / grad_norm)

        # Update the weights and their average, or skip the step.
        skipped = not math.isfinite(grad_norm)
        if skipped:
            progress.skipped_in_a_row += 1
        else:
            progress.skipped_in_a_row = 0
            self.optimizer.step(batch.lr_factor)
            if self.ema is not None:
                self.ema.update(self.model)
        return StepResult(
            step=progress.step,
            lr=config.lr * batch.lr_factor,
            weight=weight,
            grad_norm=grad_norm,
            skipped=skipped,
            sums=sums,
        )

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within the block, the model uses the moving average of its weights, if the run keeps one."""
        return contextlib.nullcontext() if self.ema is None else self.ema.swapped_in(self.model)

    def state(self) -> TrainerState:
        """What training resumes from beside weights. All ranks must call it between steps."""
        task = self.task.state()
        tensors = {**task.tensors, **{_OPTIMIZER + name: value for name, value in self.optimizer.state().items()}}
        return TrainerState(tensors, {**self.progress.values(self.ranks), **task.values})

    def load_state(self, state: TrainerState, average: Mapping[str, Tensor] | None = None) -> None:
        """Resume from `state` and the weights' moving `average`, if the run keeps one.

        Load the weights first, and move the task's data to the position of `state`.
        """
        own = {name.removeprefix(_OPTIMIZER): t for name, t in state.tensors.items() if name.startswith(_OPTIMIZER)}
        self.optimizer.load_state(own)
        if self.ema is not None:
            if average is None:
                raise ValueError("this run keeps a moving average, and there is none to resume from")
            for name, kept in self.ema.average.items():
                kept.copy_(average[name])
        self.progress = RunProgress.from_values(state.values)
        if not self.ranks.is_first:
            # The saved sums of all ranks continue on the first one.
            self.progress.window = replace(self.progress.window, sums={})
        self.task.load_state(state)
