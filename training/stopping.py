"""When a run is evaluated, and when it ends early. Knows nothing of what is trained."""

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from config.schema import EarlyStoppingConfig, TrainingConfig
from training.task import Position

# eval_every_steps=auto aims at this many evaluations, with at least this many trained rows for each
# evaluated row. Evaluating a row costs about 0.7 of training it, so evaluations take less than a
# tenth of the run.
_AUTOMATIC_EVALUATIONS = 10
_TRAINED_PER_EVALUATED = 8
# Train at least this many rows between evaluations: answers, checkpoint and plot take time too.
_LEAST_TRAINED_BETWEEN = 1000


def automatic_evaluations(config: TrainingConfig, total: Position, rows: int) -> int:
    """How many evaluations, evenly spaced, `eval_every_steps=auto` adds to those of `eval_interval`.

    At most ten. Between two of them at least a thousand examples are trained, and eight for each
    row evaluated.
    """
    if config.eval_every_steps != "auto" or rows == 0:
        return 0
    # max_steps limits the examples.
    trained = total.examples if config.max_steps is None else min(total.examples, config.max_steps * config.global_batch_size)
    count = min(_AUTOMATIC_EVALUATIONS, trained // max(_LEAST_TRAINED_BETWEEN, _TRAINED_PER_EVALUATED * rows))
    by_epochs = total.epochs * trained // (total.examples * config.eval_interval)
    return count if count > by_epochs else 0


def is_evaluation_due(config: TrainingConfig, automatic: int, total: Position, step: int, before: Position, now: Position) -> bool:
    """Whether to evaluate after step number `step`, which moved the run from `before` to `now`.

    automatic: from `automatic_evaluations`. total: of the whole run.
    """
    if now.epochs // config.eval_interval > max(before.epochs // config.eval_interval, config.unevaluated_intervals):
        return True
    if isinstance(config.eval_every_steps, int):
        return step % config.eval_every_steps == 0

    def part(step: int, position: Position) -> int:
        by_steps = 0 if config.max_steps is None else automatic * step // config.max_steps
        return max(by_steps, automatic * position.examples // total.examples)

    return part(step, now) > part(step - 1, before)


@dataclass
class EarlyStopping:
    """Counts the evaluations since the lowest held-out loss."""

    best: float | None = None
    waited: int = 0

    def observe(self, loss: float, config: EarlyStoppingConfig) -> None:
        """Count an evaluation. A loss that isn't finite is no improvement."""
        if math.isfinite(loss) and (self.best is None or loss < self.best - config.min_delta):
            self.best, self.waited = loss, 0
        else:
            self.waited += 1


def reason_to_end(config: TrainingConfig, step: int, seconds: float, early_stopping: EarlyStopping) -> str | None:
    """Why a run ends after `step` optimizer steps and `seconds` although data is left; None: it doesn't."""
    if config.max_steps is not None and step >= config.max_steps:
        return f"max_steps={config.max_steps} is reached"
    if config.max_minutes is not None and seconds >= 60 * config.max_minutes:
        return f"max_minutes={config.max_minutes:g} are over"
    patience = config.early_stopping.patience
    if patience is not None and early_stopping.waited >= patience:
        return f"{patience} evaluations in a row have not lowered the held-out loss (early_stopping.patience={patience})"
    return None


class StopRequest:
    """The first signal to stop; 0: none yet."""

    signal_number = 0


@contextlib.contextmanager
def first_signal() -> Iterator[StopRequest]:
    """Within the block, record the first SIGTERM or SIGINT. A second Ctrl-C stops at once.

    Under torchrun it doesn't: that forwards a Ctrl-C which the terminal has already sent.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        request.signal_number = request.signal_number or number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
