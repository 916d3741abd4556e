"""The example of a cluster launch, with two small scripts in place of Slurm's commands: what it starts, when it is queued again."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/slurm.sbatch"
# Stands for srun with all that it starts: says what it was given, then ends as it is told to.
SRUN = """#!/usr/bin/env bash
trap 'exit 143' TERM
echo "$@" > started
if [ -e waits ]; then while true; do sleep 0.05; done; fi
exit 3
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" > queued; fi
"""

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """`job("run", "lr=1")`: the script as Slurm starts it, submitted from `tmp_path`."""
    for name, text in (("bin/srun", SRUN), ("bin/scontrol", SCONTROL), (".venv/bin/activate", "")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    variables = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "70042",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    }
    environment = {key: value for key, value in os.environ.items() if key != "VENV"} | variables
    return lambda *arguments: subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def test_a_job_that_is_told_to_end_is_queued_again(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    (tmp_path / "waits").touch()
    process = job("big", "lr=1e-3")
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert (tmp_path / "queued").exists(), told
    assert (tmp_path / "queued").read_text() == "requeue 70042\n"
    words = (tmp_path / "started").read_text().split()
    assert {"torchrun", "--nnodes=2", "--nproc-per-node=8", "--rdzv-id=70042", "--rdzv-endpoint=node1:29542"} <= set(words)
    assert words[-4:] == ["pretrain_instruct.py", "run_name=big", "resume=auto", "lr=1e-3"]


def test_a_job_that_fails_is_not(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    assert job("big").wait(60) == 3 and (tmp_path / "started").exists() and not (tmp_path / "queued").exists()


def test_a_job_without_a_name_is_told(job: Callable[..., subprocess.Popen[bytes]], tmp_path: Path) -> None:
    process = job()
    assert b"usage: sbatch scripts/slurm.sbatch RUN_NAME" in process.communicate(timeout=60)[1]
    assert process.returncode and not (tmp_path / "started").exists()
