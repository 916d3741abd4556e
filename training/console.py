"""What a run shows: plan, progress, held-out results, and the paths of its files.

Progress goes to stderr, the rest to stdout. Knows numbers and paths, not what is trained.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from config.schema import TrainingConfig

# Without a terminal, seconds between lines.
_LINE_SECONDS = 30.0
# The first steps are slower than the rest, so the speed is reported only after this many seconds.
_WARM_UP_SECONDS = 20.0


class Console:
    """Plan and progress of a run: a bar on a terminal, else lines. Silent unless `shown`."""

    def __init__(self, config: TrainingConfig, *, total: int, done: int, seconds: float, shown: bool) -> None:
        """total: examples of the run. done: those already trained, in `seconds`."""
        self._total = total if config.max_steps is None else min(total, config.max_steps * config.global_batch_size)
        self._seconds_given = math.inf if config.max_minutes is None else 60 * config.max_minutes - seconds
        self._first = done
        self._shown = shown
        self._started = self._line_at = time.perf_counter()
        self._is_measured = False
        is_terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total, initial=done, unit="ex", dynamic_ncols=True, mininterval=1, disable=not (shown and is_terminal)
        )
        if shown:
            steps, rows = math.ceil(self._total / config.global_batch_size), config.global_batch_size
            ends = "" if config.max_minutes is None else f", for {config.max_minutes:g} minutes at most"
            begins = f", from step {done // rows:,} on" if done else ""
            print(f"plan {steps:,} optimizer steps of {rows:,} rows{begins}{ends}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def advance(self, done: int) -> None:
        """Show that `done` examples are trained."""
        self._bar.update(done - self._bar.n)

    def line(self, step: int, done: int, figures: Mapping[str, float], memory: Mapping[str, int]) -> None:
        """Show a part of a log line. memory: the peaks so far in bytes, by name."""
        if not self._shown:
            return
        texts = {name: f"{value:.3f}" for name, value in figures.items()}
        self._bar.set_postfix(texts)
        now = time.perf_counter()
        elapsed = now - self._started
        rate = (done - self._first) / max(elapsed, 1e-9)
        left = max(0.0, min((self._total - done) / max(rate, 1e-9), self._seconds_given - elapsed))
        if elapsed >= _WARM_UP_SECONDS and not self._is_measured:
            self._is_measured = True
            peaks = ", ".join(f"{name.removesuffix('_bytes')} {size / 1e9:.2f} GB" for name, size in memory.items())
            tqdm.write(f"expected time {tqdm.format_interval(elapsed + left)} at {rate:,.0f} ex/s; memory so far: {peaks}")
        if self._bar.disable and now - self._line_at >= _LINE_SECONDS:
            self._line_at = now
            told = [f"{name} {text}" for name, text in texts.items()]
            told += [f"{rate:,.0f} ex/s", f"{done / self._total:.0%}", f"{tqdm.format_interval(left)} left"]
            print(f"step {step:,}: {', '.join(told)}", file=sys.stderr, flush=True)


def show_evaluation(step: int, report: Mapping[str, Any]) -> None:
    """Show the held-out results of a step, as a table of one row."""
    numbers = {name: value for name, value in report.items() if isinstance(value, float)}
    tqdm.write("  ".join([f"{'held out':>12s}", *numbers]))
    tqdm.write("  ".join([f"{f'step {step:,}':>12s}", *(f"{value:{len(name)}.4f}" for name, value in numbers.items())]))


def say_places(checkpoint: Path, say: Callable[[str], None]) -> None:
    """Show the paths of the run's files, as far as they exist."""
    folder = checkpoint.parent
    places = {"checkpoint": checkpoint} | {
        name: folder / file for name, file in (("report", "report.html"), ("curves", "run.png"), ("metrics", "metrics.jsonl"))
    }
    for name, path in places.items():
        if path.exists():
            say(f"{name:10s} {path}")
