"""A training step of this program, with its default settings, against the naive way: same weights,
same rows, one run.

    python benchmarks/train_step.py [--batch 2 --seq-len 512 --repeats 5 --same-allocator --without all --loss-memory]

Ours: the Trainer's step in its default dtype, with the allocator setting of pretrain_instruct.py.
Naive (benchmarks/naive.py): fp32, dense float64 loss over all positions, the default allocator
setting. Each side has its own process, and they take turns, so that machine noise affects both
alike. `--same-allocator` adds the naive way with our allocator setting, `--without` ours without
one change. `--loss-memory` adds the growth of a process's peak memory by the loss, forward and
backward, with half of the positions supervised: ours at `--loss-batch` rows; the naive way's is
linear in the rows and extrapolated from one and two. Last line: JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import models.layers
import training.text
from benchmarks.common import SyntheticRows, benchmark_config, parser, peak_memory_bytes, timed_calls, trainer_on, use_threads
from benchmarks.naive import NaiveTRM, check_arch, dense_loss, stablemax_cross_entropy, train_step
from config.errors import one_clear_message
from config.schema import PretrainInstructConfig
from dataset.text.loader import collate
from models.act import DTYPES, RecursiveModel
from models.device import keep_freed_memory, pick_device
from models.layers import Linear
from models.losses import linear_cross_entropy
from training.optimizer import AdamATan2

# The changes that can be removed from ours, one at a time, and their replacements.
CHANGES = {
    "bfloat16": "activations in float32",
    "attention_products": "torch's attention, in float32 where it is differentiated",
    "supervised_only": "every position meets the vocabulary head",
    "chunked_loss": "dense float64 loss of the supervised positions",
    "held_casts": "weights cast at every call",
    "kept_memory": "the default allocator setting",
}
_OVERRIDES = {"bfloat16": ["arch.forward_dtype=float32"], "supervised_only": ["dataset.supervise=all"]}


def settings(arguments: argparse.Namespace, side: str) -> PretrainInstructConfig:
    """The config of a side: all ACT steps, a constant learning rate, for the same work on both."""
    dtype = arguments.naive_dtype if side.startswith("naive") else arguments.dtype
    sizes = [f"arch.halt_max_steps={arguments.act_steps}", f"dataset.seq_len={arguments.seq_len}"]
    sizes += [f"global_batch_size={arguments.batch}", f"seed={arguments.seed}", "lr_min_ratio=1.0", "lr_warmup_steps=0"]
    return benchmark_config([f"arch.forward_dtype={dtype}", *sizes, *arguments.overrides, *_OVERRIDES.get(side, [])])


def torch_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    """models.product_attention by torch's kernels, with the faster backward pass."""
    dtype = q.dtype
    if q.requires_grad:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal).to(dtype)


def taken_away(change: str) -> contextlib.AbstractContextManager[Any]:
    """A context in which ours runs without this change, if it is a change in code."""
    if change == "held_casts":
        return mock.patch.object(Linear, "cast_weight", lambda linear, dtype: None)
    if change == "attention_products":
        return mock.patch.object(models.layers, "product_attention", torch_attention)
    if change == "chunked_loss":
        return mock.patch.object(training.text, "token_loss", dense_loss)
    return contextlib.nullcontext()


class Ours:
    """The real training loop."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int) -> None:
        trainer = trainer_on(config, SyntheticRows(config, vocabulary), vocabulary)
        self.model, self._steps = trainer.model, trainer.steps()
        self._parts = {
            "forward": (self.model, "act_step"),
            "loss": (training.text, "token_loss"),
            "backward": (Tensor, "backward"),
            "optimizer": (trainer.optimizer, "step"),
        }

    def step(self) -> dict[str, float]:
        """Train a step. Returns `loss_per_token` (nats) and the seconds of the step's parts.

        Matrix products for the vocabulary head's gradients count as loss, not as backward.
        """
        seconds: dict[str, list[float]] = {part: [] for part in self._parts}
        with contextlib.ExitStack() as timing:
            for part, (owner, name) in self._parts.items():
                timing.enter_context(timed_calls(owner, name, seconds[part]))
            result = next(self._steps)
        loss = {"loss_per_token": float(result.sums["nll"]) / result.weight}
        return loss | {part: sum(calls) for part, calls in seconds.items()}


class Naive:
    """The naive way, with the same rows, weights and schedule."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int) -> None:
        self._config, self._rows = config, SyntheticRows(config, vocabulary)
        self.model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(pick_device(config.device))
        self._naive = NaiveTRM(self.model)
        self._optimizer = AdamATan2(
            self.model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )

    def step(self) -> dict[str, float]:
        """Train a step. Returns `loss_per_token` (nats)."""
        config = self._config
        rows = [next(self._rows)[1] for _ in range(config.global_batch_size)]
        arrays = collate(rows, pad_id=0, length_multiple=config.pad_multiple)
        inputs_BT, labels_BT = (torch.from_numpy(arrays[name].astype(np.int64)) for name in ("inputs", "labels"))
        inputs_BT, labels_BT = inputs_BT.to(self.model.device), labels_BT.to(self.model.device)
        return {"loss_per_token": train_step(self._naive, self._optimizer, inputs_BT, labels_BT, config.arch.halt_max_steps)}


class _Worker:
    """A side in the process that trains it."""

    name: str
    side: Ours | Naive

    @classmethod
    def begin(cls, name: str, config: PretrainInstructConfig, vocabulary: int, threads: int | None) -> None:
        if name not in ("naive", "kept_memory"):
            keep_freed_memory()
        use_threads(threads)
        cls.name, cls.side = name, (Naive if name.startswith("naive") else Ours)(config, vocabulary)

    @classmethod
    def step(cls) -> dict[str, float]:
        started = time.perf_counter()
        with taken_away(cls.name):
            figures = cls.side.step()
        return figures | {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory_bytes()}


def process_of(arguments: argparse.Namespace, name: str) -> ProcessPoolExecutor:
    """A process that trains this side."""
    given = (name, settings(arguments, name), arguments.vocabulary, arguments.threads)
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _Worker.begin, given)


def take_turns(arguments: argparse.Namespace, ours: ProcessPoolExecutor, name: str) -> dict[str, list[dict[str, float]]]:
    """The figures of "ours" and of side `name`, in two processes that take turns."""
    figures: dict[str, list[dict[str, float]]] = {"ours": [], name: []}
    labels = {"ours": "ours", "naive": "naive", "naive_kept": "naive, our allocator"}
    with process_of(arguments, name) as other:
        for turn in range(arguments.warmup + arguments.repeats):
            for side, worker in (("ours", ours), (name, other)):
                result = worker.submit(_Worker.step).result()
                if turn >= arguments.warmup:
                    figures[side].append(result)
                kind, label = "warm-up" if turn < arguments.warmup else "timed", labels.get(side, f"ours without {side}")
                print(f"{kind:8} {label:28} {result['seconds']:8.3f} s   loss {result['loss_per_token']:.4f}", flush=True)
    return figures


def grown_by_loss(side: str, rows: int, seq_len: int, vocabulary: int, hidden_size: int, dtype: str) -> int:
    """Growth of this process's peak memory, in bytes, from the loss and backward of `rows` rows."""
    if side == "ours":
        keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    head_VD = (torch.randn(vocabulary, hidden_size, generator=generator) * hidden_size**-0.5).requires_grad_()
    output_BTD = torch.randn(rows, seq_len, hidden_size, generator=generator).to(DTYPES[dtype]).requires_grad_()
    labels_BT = torch.randint(0, vocabulary, (rows, seq_len), generator=generator)
    is_supervised_T = torch.arange(seq_len) >= seq_len // 2
    before = peak_memory_bytes()
    if side == "ours":
        output_ND, labels_N = output_BTD[:, is_supervised_T].flatten(0, 1), labels_BT[:, is_supervised_T].flatten()
        linear_cross_entropy(output_ND, head_VD, labels_N, torch.ones(len(labels_N)), "stablemax")[0].backward()
    else:
        labels_BT = torch.where(is_supervised_T, labels_BT, -100)
        stablemax_cross_entropy(output_BTD @ head_VD.T, labels_BT).sum().backward()
    return peak_memory_bytes() - before


def loss_memory(batch: int, seq_len: int, vocabulary: int, hidden_size: int, dtype: str) -> dict[str, Any]:
    """Peak bytes of both sides' losses at `batch` rows, each measurement in its own process."""
    sizes = seq_len, vocabulary, hidden_size
    measurements = (("ours", batch, *sizes, dtype), ("naive", 1, *sizes, "float32"), ("naive", 2, *sizes, "float32"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        ours, few, twice = (pool.submit(grown_by_loss, *measurement).result() for measurement in measurements)
    naive = few + (batch - 1) * (twice - few)
    return {
        "loss_peak_bytes_ours": ours,
        "loss_peak_bytes_naive_extrapolated": naive,
        "loss_peak_bytes_naive_measured": {"1": few, "2": twice},
        "loss_peak_ratio": naive / ours,
        "loss_batch": batch,
        "loss_supervised": batch * (seq_len - seq_len // 2),
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time ours in turns with each other side, in two processes, and collect the medians."""
    # Check before any process starts, for a clear message.
    config = settings(arguments, "ours")
    check_arch(config.arch)
    changes = list(CHANGES) if "all" in arguments.without else arguments.without
    others = ["naive", *(["naive_kept"] if arguments.same_allocator else []), *changes]
    with process_of(arguments, "ours") as process:
        turns = {name: take_turns(arguments, process, name) for name in others}

    def median(figures: Sequence[dict[str, float]], figure: str = "seconds") -> float:
        return statistics.median(result[figure] for result in figures)

    seconds = {name: median(figures[name]) for name, figures in turns.items()}
    beside = {name: median(figures["ours"]) for name, figures in turns.items()}
    times_ours = {name: seconds[name] / beside[name] for name in turns}
    ours, naive = turns["naive"]["ours"], turns["naive"]["naive"]
    breakdown = {part: median(ours, part) for part in ("forward", "loss", "backward", "optimizer")}
    breakdown["other"] = beside["naive"] - sum(breakdown.values())
    report: dict[str, Any] = {
        "ratio": times_ours["naive"],
        "dtype": config.arch.forward_dtype,
        "dtype_naive": settings(arguments, "naive").arch.forward_dtype,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "threads": use_threads(arguments.threads),
        "seconds_ours": beside["naive"],
        "seconds_naive": seconds["naive"],
        "seconds_ours_by_part": breakdown,
        "supervised": arguments.batch * (arguments.seq_len - arguments.seq_len // 2),
        "positions_per_second": arguments.batch * arguments.seq_len / beside["naive"],
        "first_loss_ours": ours[0]["loss_per_token"],
        "first_loss_naive": naive[0]["loss_per_token"],
        "peak_memory_bytes_ours": ours[-1]["peak_memory_bytes"],
        "peak_memory_bytes_naive": naive[-1]["peak_memory_bytes"],
        "repeats": arguments.repeats,
        "torch": torch.__version__,
    }
    if arguments.same_allocator:
        report["seconds_naive_same_allocator"] = seconds["naive_kept"]
        report["seconds_ours_same_allocator"] = beside["naive_kept"]
        report["ratio_same_allocator"] = times_ours["naive_kept"]
    for change in changes:
        report.setdefault("without", {})[change] = {
            "seconds": seconds[change],
            "seconds_ours": beside[change],
            "slower": times_ours[change],
            "peak_memory_bytes": turns[change][change][-1]["peak_memory_bytes"],
        }
        print(f"without {change:16} {seconds[change]:8.3f} s, {times_ours[change]:.2f} times ours: {CHANGES[change]}")
    if arguments.loss_memory:
        sizes = arguments.loss_batch, arguments.seq_len, arguments.vocabulary, config.arch.hidden_size
        report |= loss_memory(*sizes, config.arch.forward_dtype)
    return report


def main() -> None:
    """Parse, compare, print."""
    flags = parser(__doc__, "dtype", "threads", "repeats", "seed", "vocabulary", "overrides")
    flags.set_defaults(dtype="auto")
    flags.add_argument("--naive-dtype", choices=["float32", "float64"], default="float32")
    flags.add_argument("--batch", type=int, default=2, help="rows")
    flags.add_argument("--seq-len", type=int, default=512, help="positions of a row")
    flags.add_argument("--act-steps", type=int, default=1, help="ACT steps of a training step")
    flags.add_argument("--warmup", type=int, default=2, help="steps of each side before its timed ones")
    flags.add_argument("--same-allocator", action="store_true", help="also time the naive way with our allocator setting")
    flags.add_argument("--without", nargs="+", choices=["all", *CHANGES], default=[], help="also time ours without these changes")
    flags.add_argument("--loss-memory", action="store_true", help="also measure the peak memory of both sides' losses")
    flags.add_argument("--loss-batch", type=int, default=48, help="rows of that measurement")
    print(json.dumps(compare(flags.parse_args())))


if __name__ == "__main__":
    with one_clear_message():
        main()
