"""Shared by the parts: sizes, cases, and common workloads. Knows no part."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from unittest import TestCase

import numpy as np
import torch

from benchmarks.common import ORIGINAL, VOCABULARY, benchmark_config
from config.schema import PretrainInstructConfig
from generation.device_tick import Recorder, graph_recorder
from models.device import peak_memory

Figures = dict[str, Any]
Found = Mapping[str, Figures]
"""Figures of a part's earlier cases, by name, without those of failed ones."""
T = TypeVar("T")


@dataclass(frozen=True)
class Scale:
    """The sizes of the measurement, and its device."""

    device: str = "cuda"
    data: Path | None = None
    """Folder of conversations, with puzzles in its folder sudoku."""
    deadline: float = math.inf
    """The end of the part's time, on the clock of time.monotonic."""
    smoke: tuple[str, ...] = ("arch.hidden_size=128", "arch.num_heads=4", "dataset.seq_len=160", "global_batch_size=6")
    """For the smoke part: a float64 reference on the CPU takes a second, and rows exceed a block of
    FlexAttention.
    """
    arch: tuple[str, ...] = ()
    puzzles: tuple[str, ...] = ()
    vocabulary: int = VOCABULARY
    batch: int = 48
    positions: int = 512
    steps: int = 12
    """Optimizer steps of a timing, and on rows of varied lengths before nothing should compile any more."""
    epoch_steps: int = 200
    training_seconds: float = 60.0
    """Seconds of each network at equal FLOPs."""
    measured_rows: int = 500
    sample_rows: int = 20_000
    """Rows to generate without `--data`."""
    batches: tuple[int, ...] = (1, 8, 64)
    act_steps: tuple[int, ...] = (1, 4, 16)
    matrix: int = 8192


_TINY = ("arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=1", "arch.halt_max_steps=2")
REHEARSAL = Scale(
    device="cpu",
    smoke=("arch.hidden_size=64", "arch.num_heads=2", "arch.H_cycles=1", "dataset.seq_len=24", "global_batch_size=3"),
    arch=_TINY,
    puzzles=(*_TINY, "global_batch_size=8"),
    vocabulary=70,
    batch=4,
    positions=32,
    steps=2,
    epoch_steps=3,
    training_seconds=0.2,
    measured_rows=4,
    sample_rows=200,
    batches=(1, 2),
    act_steps=(1, 2),
    matrix=256,
)
COMPILING_SECONDS = 150.0
"""The limit of a case that compiles: the default training step took 24 s with 16 cores and nothing cached, and cores may be few."""


@dataclass(frozen=True)
class Case:
    """An independent measurement, and its time limit in seconds."""

    name: str
    measure: Callable[[Found], Figures]
    seconds: float = 30

    def limit(self, scale: Scale) -> float:
        """Seconds that it has now."""
        return min(self.seconds, max(1.0, scale.deadline - time.monotonic()))


def synchronize(scale: Scale) -> None:
    """Wait until the device has finished all its work."""
    if scale.device == "cuda":
        torch.cuda.synchronize()


def free_memory(scale: Scale) -> None:
    """Free unused memory, and reset the peak."""
    gc.collect()
    if scale.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gigabytes(scale: Scale) -> float:
    """Peak memory of tensors on the device since `free_memory`; on a CPU, of the process."""
    peak = peak_memory(torch.device(scale.device))
    return peak.get("cuda_peak_bytes", peak["peak_rss_bytes"]) / 1e9


def training_config(scale: Scale, overrides: Sequence[str], original: Sequence[str] = (ORIGINAL,)) -> PretrainInstructConfig:
    """The original's network or another, with softmax, batch and positions of `scale`."""
    size = [f"dataset.seq_len={scale.positions}", f"global_batch_size={scale.batch}", "epochs=1000"]
    return benchmark_config([*scale.arch, *size, *overrides], scale.device, original)


def timed_steps(steps: Iterator[T], count: int, scale: Scale) -> tuple[list[float], list[T]]:
    """Seconds and results of `count` steps, with waiting for the device after each."""
    seconds, results = list[float](), list[T]()
    for _ in range(count):
        started = time.perf_counter()
        results.append(next(steps))
        synchronize(scale)
        seconds.append(time.perf_counter() - started)
    return seconds, results


# SlimOrca's rows have a median of 178 ids and a mean of about 340.
_MEDIAN_LENGTH = 178
_LENGTH_SPREAD = math.sqrt(2 * math.log(340 / _MEDIAN_LENGTH))


def varied_lengths(most: int) -> Callable[[int], int]:
    """Positions of row i, distributed like SlimOrca's for `most` (the length at which rows are cut)
    512, in proportion for others.
    """

    def length(row: int) -> int:
        drawn = np.random.default_rng(row).lognormal(math.log(_MEDIAN_LENGTH), _LENGTH_SPREAD)
        return max(2, min(most, round(drawn * most / 512)))

    return length


ENGINES = ("one kernel", "compiled graphs", "graphs", "eager")


def engine_options(engine: str, scale: Scale) -> dict[str, Any]:
    """Options of the engine: its default, with an ACT step of few rows as one kernel; only CUDA
    graphs; or neither.

    Without CUDA nothing is recorded.
    """

    if engine == "one kernel":
        return {}
    record: Recorder = graph_recorder() if scale.device == "cuda" and engine != "eager" else lambda function: function
    return {"record": record, "compiled": engine == "compiled graphs"}


def no_engine_warnings() -> contextlib.AbstractContextManager[None]:
    """A context in which a warning of the engine, of graphs that it can't use, is an error."""
    return TestCase().assertNoLogs("generation.device_tick", "WARNING")
