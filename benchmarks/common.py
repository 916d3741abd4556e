"""Shared parts of the benchmarks: flags, config, synthetic conversations, a trainer, timing, FLOP
counting. Knows neither side of a comparison.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from config.compose import CHECKPOINT_HELP, compose_config
from config.schema import PretrainInstructConfig, user_path
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import Example
from models.act import RecursiveModel
from models.device import peak_memory, pick_device, resolve_arch, set_matmul_precision
from training.loop import Trainer
from training.text import ExampleIterator, TextTask

VOCABULARY = 32_000
# Measured by default: the network of the original, which the naive way computes.
ORIGINAL = "experiment=original_depth"
# Enough synthetic rows that the schedule stays far from its end.
_ENDLESS_ROWS = 1_000_000
_SHARED_FLAGS: dict[str, dict[str, Any]] = {
    "checkpoint": {"type": user_path, "required": True, "help": CHECKPOINT_HELP},
    "dtype": {"choices": ["auto", "bfloat16", "float32", "float64"]},
    "threads": {"type": int, "help": "threads of a computation; default: torch's own choice"},
    "repeats": {"type": int, "default": 5, "help": "timings of each side; medians are reported"},
    "seed": {"type": int, "default": 0, "help": "seed of weights and ids"},
    "vocabulary": {"type": int, "default": VOCABULARY},
    "overrides": {"nargs": "*", "default": [], "metavar": "KEY=VALUE", "help": "settings, arch.hidden_size=64 for one"},
}


def parser(description: str | None, *shared: str) -> argparse.ArgumentParser:
    """A parser with the flags named in `shared`, which several benchmarks have."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in shared:
        flags.add_argument(f"--{name}", **_SHARED_FLAGS[name])
    return flags


def benchmark_config(
    overrides: Sequence[str], device: str = "cpu", original: Sequence[str] = (ORIGINAL, "arch.loss=stablemax")
) -> PretrainInstructConfig:
    """cfg_pretrain_instruct with `original` (by default the original's network and loss), then
    `overrides`.

    forward_dtype is resolved.
    """
    config = compose_config("cfg_pretrain_instruct", [f"device={device}", *original, *overrides])
    return config.model_copy(update={"arch": resolve_arch(config.arch, pick_device(config.device))})


def synthetic_example(seed: int, index: int, positions: int, vocabulary: int) -> Example:
    """A conversation of exactly `positions` inputs with random ids, the second half of its labels supervised."""
    ids = np.random.default_rng((seed, index)).integers(0, vocabulary, positions + 1, dtype=np.int32)
    supervised = np.arange(positions + 1) > positions // 2
    return Example(ids, supervised, (~supervised).astype(np.int32), turn_bytes=0)


class SyntheticRows:
    """An endless stream of synthetic rows for the trainer. `length` gives the positions of row i."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int, length: Callable[[int], int] | None = None) -> None:
        """Without `length`, every row has `dataset.seq_len` positions."""
        self.length: Callable[[int], int] = length or (lambda _: config.dataset.seq_len)
        self._seed, self._vocabulary = config.seed, vocabulary
        self._next = 0

    def __next__(self) -> tuple[Draw, Example]:
        index = self._next
        self.skip(1)
        return Draw(0, 0, index), synthetic_example(self._seed, index, self.length(index), self._vocabulary)

    def skip(self, count: int) -> None:
        """Skip the next `count` rows."""
        self._next += count


def trainer_on(config: PretrainInstructConfig, rows: ExampleIterator, vocabulary: int, *, compiled: bool = False) -> Trainer:
    """The real training loop on `rows`, of which there must be enough, on the device of `config`."""
    device = pick_device(config.device)
    model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(device)
    set_matmul_precision(config.tf32, device)
    if compiled:
        model.compile_levels()
    return Trainer(config, model, TextTask(config, model, rows, Curriculum.of_epochs(_ENDLESS_ROWS, config.seed, 1)))


def timed_calls(owner: Any, name: str, seconds: list[float]) -> Any:
    """A context in which every call of `owner.name` appends its time to `seconds`."""
    original = getattr(owner, name)

    def call(*args: Any, **named: Any) -> Any:
        started = time.perf_counter()
        result = original(*args, **named)
        seconds.append(time.perf_counter() - started)
        return result

    return mock.patch.object(owner, name, call)


def peak_memory_bytes() -> int:
    """Peak memory of this process, including torch's libraries."""
    return peak_memory(torch.device("cpu"))["peak_rss_bytes"]


def use_threads(threads: int | None) -> int:
    """Set the number of torch's threads (None: unchanged) and return it."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def markdown_table(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """The lines of a table with a column for each key, empty where a row lacks it."""
    titles = list(dict.fromkeys(title for row in rows for title in row))
    cells = [[row.get(title, "") for title in titles] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in (titles, ["---"] * len(titles), *cells)]


def flop_counter() -> FlopCounterMode:
    """Counts the FLOPs of matrix products and attention in a block, also those of attention on
    CPUs, which torch's counter lacks.
    """
    aten = torch.ops.aten
    of_cpu = {
        aten._scaled_dot_product_flash_attention_for_cpu: unwrap(sdpa_flop),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: unwrap(sdpa_backward_flop),
    }
    return FlopCounterMode(display=False, custom_mapping=of_cpu)
