"""When a run is evaluated, and when it ends before its data does. Numbers only; must not know what is trained."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from config.schema import EarlyStoppingConfig, TrainingConfig

# What eval_every_steps=auto aims at: so many evaluations, and at least so many trained rows for each evaluated one. A row costs
# about 0.7 of a trained one to evaluate, so that evaluations take less than a tenth of the run.
_AUTOMATIC_EVALUATIONS = 10
_TRAINED_PER_EVALUATED = 8
# However few rows are evaluated, so many are trained in between: answers, checkpoint and picture take their time, too.
_LEAST_TRAINED_BETWEEN = 1000


class Position(NamedTuple):
    """Where a run stands between two optimizer steps."""

    step: int
    """Optimizer steps taken."""
    examples: int
    """Examples trained."""
    epochs: int
    """Whole passes over the training split."""


def automatic_evaluations(config: TrainingConfig, examples: int, epochs: int, rows: int) -> int:
    """How many evaluations, evenly spaced over the run, `eval_every_steps=auto` adds to those of `eval_interval`; 0: none.

    Ten, or fewer: a thousand examples are trained between two of them at least, and eight for each row that one measures.
    examples, epochs: of the whole run. rows: what one evaluation measures.
    """
    if config.eval_every_steps != "auto" or rows == 0:
        return 0
    # With max_steps, the most that can be trained until then.
    trained = examples if config.max_steps is None else min(examples, config.max_steps * config.global_batch_size)
    count = min(_AUTOMATIC_EVALUATIONS, trained // max(_LEAST_TRAINED_BETWEEN, _TRAINED_PER_EVALUATED * rows))
    by_epochs = epochs * trained // (examples * config.eval_interval)
    return count if count > by_epochs else 0


def is_evaluation_due(config: TrainingConfig, automatic: int, examples: int, before: Position, now: Position) -> bool:
    """Whether the run is evaluated at `now`, one optimizer step after `before`.

    automatic: `automatic_evaluations`. examples: of the whole run.
    """
    if now.epochs // config.eval_interval > max(before.epochs // config.eval_interval, config.unevaluated_intervals):
        return True
    if isinstance(config.eval_every_steps, int):
        return now.step % config.eval_every_steps == 0

    def part(position: Position) -> int:
        by_steps = 0 if config.max_steps is None else automatic * position.step // config.max_steps
        return max(by_steps, automatic * position.examples // examples)

    return part(now) > part(before)


class EarlyStopping:
    """Counts the evaluations since the held-out loss was last lower than before."""

    def __init__(self, config: EarlyStoppingConfig, state: Mapping[str, Any] | None = None) -> None:
        """`state`: of the run that is resumed."""
        self._config = config
        self._best: float | None = None if state is None else state["best"]
        self._waited: int = 0 if state is None else state["waited"]

    def observe(self, loss: float) -> None:
        """Count an evaluation. One without a finite loss is no improvement."""
        if math.isfinite(loss) and (self._best is None or loss < self._best - self._config.min_delta):
            self._best, self._waited = loss, 0
        else:
            self._waited += 1

    @property
    def is_over(self) -> bool:
        """Whether the run's patience has run out."""
        return self._config.patience is not None and self._waited >= self._config.patience

    def state(self) -> dict[str, Any]:
        """JSON values to resume from."""
        return {"best": self._best, "waited": self._waited}


def reason_to_end(config: TrainingConfig, step: int, time_is_up: bool, early_stopping: EarlyStopping) -> str | None:
    """Why a run ends after `step` optimizer steps, whatever data is left; None: it doesn't."""
    if config.max_steps is not None and step >= config.max_steps:
        return f"max_steps={config.max_steps} is reached"
    if time_is_up:
        return f"max_minutes={config.max_minutes:g} are over"
    if early_stopping.is_over:
        patience = config.early_stopping.patience
        return f"{patience} evaluations in a row have not lowered the held-out loss (early_stopping.patience={patience})"
    return None
