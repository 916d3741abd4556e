"""A training step of this program, with its default settings, against the naive way: same weights,
same rows, one run.

    python benchmarks/train_step.py [--batch 2 --seq-len 512 --repeats 5 --same-allocator --without all --loss-memory]

Ours: the Trainer's step in its default dtype, with the allocator setting of pretrain_instruct.py.
Naive (benchmarks/naive.py): fp32, dense float64 loss over all positions, the default allocator
setting. Each side has its own process, and they take turns, so that machine noise affects both
alike. `--same-allocator` adds the naive way with our allocator setting, `--without` ours without
one change, and `--loss-memory` the peak memory of both losses at batch 48
(benchmarks/loss_memory.py). Last line: JSON.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.loss_memory
import models.layers
import training.text
from benchmarks.common import (
    ENDLESS_ROWS,
    SyntheticRows,
    benchmark_config,
    parser,
    peak_memory_bytes,
    synthetic_example,
    trainer_on,
    use_threads,
)
from benchmarks.naive import NaiveTRM, check_arch, stablemax_cross_entropy, train_step
from config.errors import one_clear_message
from config.schema import PretrainInstructConfig
from dataset.text.loader import collate
from models.act import RecursiveModel
from models.device import keep_freed_memory, pick_device
from models.layers import Linear
from models.losses import TokenLoss
from training.optimizer import AdamATan2

REPOSITORY = Path(__file__).resolve().parents[1]
_LABELS = {"ours": "ours", "naive": "naive", "naive_kept": "naive, our allocator"}
# The changes that can be removed from ours, one at a time, and their replacements.
CHANGES = {
    "bfloat16": "activations in float32",
    "attention_products": "torch's attention, in float32 where it is differentiated",
    "supervised_only": "every position meets the vocabulary head",
    "chunked_loss": "dense float64 loss of the supervised positions",
    "held_casts": "weights cast at every call",
    "kept_memory": "the default allocator setting",
}
_OVERRIDES = {"bfloat16": "arch.forward_dtype=float32", "supervised_only": "dataset.supervise=all"}


class Side(Protocol):
    """One way to train, step by step."""

    def step(self) -> dict[str, float]:
        """Train one step; returns its `loss_per_token` (nats), and seconds of its parts if known."""


def settings(arguments: argparse.Namespace, side: str) -> PretrainInstructConfig:
    """The config of a side: all ACT steps, a constant learning rate, for the same work on both."""
    dtype = arguments.naive_dtype if side.startswith("naive") else arguments.dtype
    return benchmark_config(
        [
            f"arch.forward_dtype={dtype}",
            f"arch.halt_max_steps={arguments.act_steps}",
            f"dataset.seq_len={arguments.seq_len}",
            f"global_batch_size={arguments.batch}",
            "lr_min_ratio=1.0",
            "lr_warmup_steps=0",
            f"seed={arguments.seed}",
            *arguments.overrides,
            *([_OVERRIDES[side]] if side in _OVERRIDES else []),
        ]
    )


@contextlib.contextmanager
def taken_away(change: str) -> Iterator[None]:
    """Within the block, ours runs without this change, if it is a change in code."""
    owner, name, instead = {
        "held_casts": (Linear, "cast_weight", lambda linear, dtype: None),
        "attention_products": (models.layers, "product_attention", torch_attention),
        "chunked_loss": (training.text, "token_loss", dense_loss),
    }.get(change, (None, "", None))
    if owner is None:
        yield
        return
    original = getattr(owner, name)
    setattr(owner, name, instead)
    try:
        yield
    finally:
        setattr(owner, name, original)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    """models.product_attention by torch's kernels, with the faster backward pass."""
    dtype = q.dtype
    if q.requires_grad:
        q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, is_causal=is_causal).to(dtype)


def dense_loss(
    output_ND: Tensor, head_VD: Tensor, halt_logits_N: Tensor, labels_N: Tensor, weights_N: Tensor, loss: str, compiled: bool
) -> TokenLoss:
    """A naive models.losses.token_loss: all logits at once, stablemax in float64, never compiled."""
    logits_NV = output_ND @ head_VD.to(output_ND.dtype).T
    nll_N = stablemax_cross_entropy(logits_NV, labels_N)
    argmax_N = logits_NV.argmax(-1)
    right_N = (argmax_N == labels_N).to(halt_logits_N.dtype)
    bce_N = F.binary_cross_entropy_with_logits(halt_logits_N, right_N, reduction="none")
    return TokenLoss((nll_N * weights_N).sum() + 0.5 * (bce_N * weights_N).sum(), nll_N.detach(), argmax_N, bce_N.detach())


class Ours:
    """The real training loop."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int) -> None:
        self.trainer = trainer_on(config, SyntheticRows(config, vocabulary), vocabulary)
        self.model = self.trainer.model
        self._steps = self.trainer.steps()
        self._seconds: dict[str, float] = {}

    def step(self) -> dict[str, float]:
        """Matrix products for the vocabulary head's gradients count as loss, not as backward."""
        self._seconds = {}
        with contextlib.ExitStack() as patches:
            patches.enter_context(self._timed("forward", self.model, "act_step"))
            patches.enter_context(self._timed("loss", training.text, "token_loss"))
            patches.enter_context(self._timed("backward", torch.Tensor, "backward"))
            patches.enter_context(self._timed("optimizer", self.trainer.optimizer, "step"))
            result = next(self._steps)
        return {"loss_per_token": float(result.sums["nll"]) / result.weight, **self._seconds}

    @contextlib.contextmanager
    def _timed(self, part: str, owner: Any, name: str) -> Iterator[None]:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = original(*args, **kwargs)
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - started
            return result

        own = name in vars(owner)
        setattr(owner, name, timed)
        try:
            yield
        finally:
            if own:
                setattr(owner, name, original)
            else:
                delattr(owner, name)


class Naive:
    """The naive way, with the same rows, weights and schedule."""

    def __init__(self, config: PretrainInstructConfig, vocabulary: int) -> None:
        self.config = config
        self.vocabulary = vocabulary
        self.model = RecursiveModel(config.arch, vocabulary, seed=config.seed).to(pick_device(config.device))
        self.naive = NaiveTRM(self.model)
        self.optimizer = AdamATan2(
            self.model.parameters(), lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        self._steps = self._train()

    def step(self) -> dict[str, float]:
        return {"loss_per_token": next(self._steps)}

    def _train(self) -> Iterator[float]:
        config, batch = self.config, self.config.global_batch_size
        for first in range(0, ENDLESS_ROWS, batch):
            rows = [synthetic_example(config.seed, first + i, config.dataset.seq_len, self.vocabulary) for i in range(batch)]
            arrays = collate(rows, pad_id=0, length_multiple=config.pad_multiple)
            inputs_BT = torch.from_numpy(arrays["inputs"].astype(np.int64)).to(self.model.device)
            labels_BT = torch.from_numpy(arrays["labels"]).to(self.model.device)
            yield train_step(self.naive, self.optimizer, inputs_BT, labels_BT, config.arch.halt_max_steps)


def work(arguments: argparse.Namespace) -> None:
    """The process of one side: a step for every line on stdin, its figures as a line on stdout."""
    if arguments.worker not in ("naive", "kept_memory"):
        keep_freed_memory()
    use_threads(arguments.threads)
    config = settings(arguments, arguments.worker)
    with taken_away(arguments.worker):
        side: Side = (Naive if arguments.worker.startswith("naive") else Ours)(config, arguments.vocabulary)
        for _ in sys.stdin:
            started = time.perf_counter()
            figures = side.step()
            figures["seconds"] = time.perf_counter() - started
            figures["peak_memory_bytes"] = peak_memory_bytes()
            print(json.dumps(figures), flush=True)


class Worker:
    """A side in its own process."""

    def __init__(self, name: str) -> None:
        # With the same flags, so that the process composes the same settings.
        command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--worker", name]
        self._process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step(self) -> dict[str, float]:
        """Train a step. Raises RuntimeError if the process has died (its message is on stderr)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of one side ended with status {self._process.wait()}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def take_turns(arguments: argparse.Namespace, ours: Worker, name: str) -> dict[str, list[dict[str, float]]]:
    """The figures of "ours" and of side `name`, in two processes that take turns."""
    other = Worker(name)
    figures: dict[str, list[dict[str, float]]] = {"ours": [], name: []}
    for turn in range(arguments.warmup + arguments.repeats):
        for side, worker in (("ours", ours), (name, other)):
            result = worker.step()
            if turn >= arguments.warmup:
                figures[side].append(result)
            kind = "warm-up" if turn < arguments.warmup else "timed"
            label = _LABELS.get(side, f"ours without {side}")
            print(f"{kind:8} {label:28} {result['seconds']:8.3f} s   loss {result['loss_per_token']:.4f}", flush=True)
    other.close()
    return figures


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time ours in turns with each other side, in two processes, and collect the medians."""
    # Check before any process starts, for a clear message.
    config = settings(arguments, "ours")
    check_arch(config.arch)
    changes = list(CHANGES) if "all" in arguments.without else arguments.without
    ours = Worker("ours")
    turns = {
        name: take_turns(arguments, ours, name)
        for name in ["naive", *(["naive_kept"] if arguments.same_allocator else []), *changes]
    }
    ours.close()

    def median(of: str, figure: str, beside: str = "naive") -> float:
        return statistics.median(result[figure] for result in turns[beside][of])

    def seconds(name: str) -> float:
        return median(name, "seconds", beside=name)

    def times_ours(name: str) -> float:
        return seconds(name) / median("ours", "seconds", beside=name)

    breakdown = {part: median("ours", part) for part in ("forward", "loss", "backward", "optimizer")}
    breakdown["other"] = median("ours", "seconds") - sum(breakdown.values())
    supervised = sum(
        int(synthetic_example(0, i, arguments.seq_len, arguments.vocabulary).supervised[1:].sum()) for i in range(arguments.batch)
    )
    report: dict[str, Any] = {
        "ratio": times_ours("naive"),
        "dtype": config.arch.forward_dtype,
        "dtype_naive": settings(arguments, "naive").arch.forward_dtype,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "threads": use_threads(arguments.threads),
        "seconds_ours": median("ours", "seconds"),
        "seconds_naive": seconds("naive"),
        "seconds_ours_by_part": breakdown,
        "supervised": supervised,
        "positions_per_second": arguments.batch * arguments.seq_len / median("ours", "seconds"),
        "first_loss_ours": turns["naive"]["ours"][0]["loss_per_token"],
        "first_loss_naive": turns["naive"]["naive"][0]["loss_per_token"],
        "peak_memory_bytes_ours": int(turns["naive"]["ours"][-1]["peak_memory_bytes"]),
        "peak_memory_bytes_naive": int(turns["naive"]["naive"][-1]["peak_memory_bytes"]),
        "repeats": arguments.repeats,
        "torch": torch.__version__,
    }
    if arguments.same_allocator:
        report["seconds_naive_same_allocator"] = seconds("naive_kept")
        report["seconds_ours_same_allocator"] = median("ours", "seconds", beside="naive_kept")
        report["ratio_same_allocator"] = times_ours("naive_kept")
    for change in changes:
        peak = int(turns[change][change][-1]["peak_memory_bytes"])
        report.setdefault("without", {})[change] = {
            "seconds": seconds(change),
            "seconds_ours": median("ours", "seconds", beside=change),
            "slower": times_ours(change),
            "peak_memory_bytes": peak,
        }
        print(f"without {change:16} {seconds(change):8.3f} s, {times_ours(change):.2f} times ours: {CHANGES[change]}")
    if arguments.loss_memory:
        hidden_size = config.arch.hidden_size
        report |= benchmarks.loss_memory.measure(
            arguments.loss_batch, arguments.seq_len, arguments.vocabulary, hidden_size, config.arch.forward_dtype
        )
    return report


def main() -> None:
    """Run both sides, or run as one of them."""
    flags = parser(__doc__)
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
    flags.add_argument("--worker", choices=[*_LABELS, *CHANGES], help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    print(json.dumps(compare(arguments)))


if __name__ == "__main__":
    with one_clear_message():
        main()
