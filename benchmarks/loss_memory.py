"""Peak memory of the loss: of this program, measured at full size, and of the naive way,
extrapolated from few rows.

    python -m benchmarks.loss_memory [--batch 48 --seq-len 512]

Half of the positions are supervised. Each measurement has its own process, which creates outputs
and head, records its peak memory, computes the loss forward and backward, and reports the growth of
the peak, including gradients and workspace. Naive (benchmarks/naive.py): logits of all positions,
dense float64 stablemax. Its memory is linear in the rows, so two sizes determine it. Last line:
JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.common import VOCABULARY, peak_memory_bytes
from benchmarks.naive import stablemax_cross_entropy
from models.act import DTYPES
from models.device import keep_freed_memory, resolve_dtype
from models.losses import linear_cross_entropy

REPOSITORY = Path(__file__).resolve().parents[1]
# The naive way is measured on this many rows and on twice as many.
_NAIVE_ROWS = 1


def grown_by_loss(side: str, rows: int, seq_len: int, vocabulary: int, hidden_size: int, dtype: str) -> int:
    """Growth of this process's peak memory, in bytes, from the loss and backward of `rows` rows."""
    generator = torch.Generator().manual_seed(0)
    exact = DTYPES[dtype]
    head_VD = (torch.randn(vocabulary, hidden_size, generator=generator) * hidden_size**-0.5).requires_grad_()
    output_BTD = torch.randn(rows, seq_len, hidden_size, generator=generator).to(exact).requires_grad_()
    labels_BT = torch.randint(0, vocabulary, (rows, seq_len), generator=generator)
    is_supervised_T = torch.arange(seq_len) >= seq_len // 2
    before = peak_memory_bytes()
    if side == "ours":
        output_ND, labels_N = output_BTD[:, is_supervised_T].flatten(0, 1), labels_BT[:, is_supervised_T].flatten()
        ones_N = torch.ones(len(labels_N))
        linear_cross_entropy(output_ND, head_VD, labels_N, ones_N, "stablemax")[0].backward()
    else:
        labels_BT = torch.where(is_supervised_T, labels_BT, -100)
        stablemax_cross_entropy(output_BTD @ head_VD.T, labels_BT).sum().backward()
    return peak_memory_bytes() - before


def measure(batch: int, seq_len: int, vocabulary: int, hidden_size: int, dtype: str) -> dict[str, Any]:
    """Peak bytes at `batch` rows: ours measured, the naive way's extrapolated from two sizes."""

    def measured(side: str, rows: int) -> int:
        sizes = ["--batch", rows, "--seq-len", seq_len, "--vocabulary", vocabulary, "--hidden-size", hidden_size, "--dtype", dtype]
        command = [sys.executable, "-m", "benchmarks.loss_memory", *map(str, sizes), "--worker", side]
        done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, check=True, text=True)
        return int(json.loads(done.stdout)["bytes"])

    ours = measured("ours", batch)
    few, twice = (measured("naive", rows) for rows in (_NAIVE_ROWS, 2 * _NAIVE_ROWS))
    naive = few + (batch - _NAIVE_ROWS) * (twice - few) / _NAIVE_ROWS
    return {
        "loss_peak_bytes_ours": ours,
        "loss_peak_bytes_naive_extrapolated": int(naive),
        "loss_peak_bytes_naive_measured": {str(_NAIVE_ROWS): few, str(2 * _NAIVE_ROWS): twice},
        "loss_peak_ratio": naive / ours,
        "loss_batch": batch,
        "loss_supervised": batch * (seq_len - seq_len // 2),
    }


def main() -> None:
    """Measure both sides, or run as one of them."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch", type=int, default=48, help="rows")
    flags.add_argument("--seq-len", type=int, default=512, help="positions of a row")
    flags.add_argument("--vocabulary", type=int, default=VOCABULARY)
    flags.add_argument("--hidden-size", type=int, default=512)
    flags.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="of our outputs; naive: float32")
    flags.add_argument("--worker", choices=["ours", "naive"], help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    dtype = resolve_dtype(arguments.dtype, torch.device("cpu"))
    sizes = (arguments.batch, arguments.seq_len, arguments.vocabulary, arguments.hidden_size)
    if arguments.worker is None:
        report = measure(*sizes, dtype)
        print(json.dumps({**report, "dtype": dtype, "seq_len": arguments.seq_len, "torch": torch.__version__}))
        return
    if arguments.worker == "ours":
        keep_freed_memory()
    print(json.dumps({"bytes": grown_by_loss(arguments.worker, *sizes, dtype if arguments.worker == "ours" else "float32")}))


if __name__ == "__main__":
    main()
