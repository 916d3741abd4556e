"""Two ranks of a script, as torchrun starts them."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def run_two_ranks(script: Path, arguments: Sequence[str]) -> str:
    """What `script` and torchrun print; torchrun starts the ranks again once. The status must be 0."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script))
    with subprocess.Popen(
        [sys.executable, *torchrun, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=300)
        finally:
            process.terminate()  # it ends its ranks
    assert process.returncode == 0, printed
    return printed
