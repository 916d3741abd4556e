"""The CUDA check-up's rehearsal measures everything, and what crashes or hangs costs nothing but itself (benchmarks/cuda)."""

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.cuda.cost import ratio
from benchmarks.cuda.measurement import Part, has_failed, measure
from benchmarks.cuda.scale import REHEARSAL, Case, Figures, Found, Scale, varied_lengths

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ["smoke", "train_step", "decoding", "epoch", "equal_flops", "sudoku"]


@pytest.mark.timeout(600)
def test_the_rehearsal_measures_every_case(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.cuda", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "cuda.json").read_text())
    assert list(report["parts"]) == PARTS
    cases = {part: report["parts"][part]["cases"] for part in PARTS}
    assert not [case for part in PARTS for case, figures in cases[part].items() if "error" in figures]
    assert len(cases["smoke"]) == 48 and all(figures["passed"] for figures in cases["smoke"].values())
    device, naive = cases["train_step"]["device"], cases["train_step"]["naive"]
    training = cases["train_step"]["causal, compiled"]
    assert training["to naive"] == training["tokens/s"] / naive["naive tokens/s"]
    assert training["MFLOP/token"] == cases["train_step"]["causal, eager"]["MFLOP/token"]
    assert training["TFLOP/s"] == training["MFLOP/token"] * training["tokens/s"] / 1e6
    assert training["of peak"] == training["TFLOP/s"] / device["matmul TFLOP/s"]
    assert training["host waits"] == "needs CUDA" and len(training["most expensive kernels of a step"]) == 10
    assert len(cases["decoding"]) == 1 + 2 + 3 * 4 + 2
    deepest, device = cases["decoding"]["one kernel, batch 1, 2 ACT steps"], cases["decoding"]["device"]
    recomputed = cases["decoding"]["recomputation, 2 ACT steps"]["recomputed tokens/s"]
    assert deepest["to recomputation"] == deepest["tokens/s"] / recomputed
    # MB over ms are GB/s.
    assert deepest["of limit"] == pytest.approx(deepest["MB read"] / deepest["ms"] / device["copy GB/s"])
    assert all(figures["epoch, minutes"] > 0 for figures in cases["epoch"].values())
    trm, transformer = cases["equal_flops"]["trm"], cases["equal_flops"]["transformers_baseline"]
    assert transformer["TFLOP"] >= trm["TFLOP"] and len(trm["held-out rows"]) == 2
    assert len(cases["sudoku"]["sudoku_mlp"]["accuracy over time"]) == 4
    tables = (tmp_path / "cuda.md").read_text()
    assert all(f"| {case} |" in tables for part in PARTS for case in cases[part])


# What a case may do to its process, which imports this module anew.
def crash(found: Found) -> Figures:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def hang(found: Found) -> Figures:
    """Holds the interpreter, so that no Python code can end it."""
    ctypes.PyDLL(None).sleep(60)
    return {}


def fail(found: Found) -> Figures:
    raise ValueError("no such thing")


def troubled(scale: Scale) -> Iterator[Case]:
    """How it goes."""
    yield Case("crashes", crash)
    yield Case("hangs", hang, seconds=0.5)
    yield Case("fails", fail)
    yield Case("works", lambda _: {"ms": 1.5})
    yield Case("is told", lambda found: {"known": sorted(found)})
    yield Case("is wrong", lambda _: {"passed": False})


def test_a_case_that_ends_its_process_costs_no_other(tmp_path: Path) -> None:
    part = measure("part", Part(troubled, 1), dataclasses.replace(REHEARSAL, deadline=time.monotonic() + 200), tmp_path)
    cases = part["cases"]
    assert part["about"] == "How it goes." and list(cases) == ["crashes", "hangs", "fails", "works", "is told", "is wrong"]
    assert cases["crashes"]["error"] == "the process ended with status -9"
    assert cases["hangs"]["error"].startswith("stopped at its time limit, in\n") and "in hang" in cases["hangs"]["error"]
    assert cases["fails"]["error"] == "ValueError: no such thing"
    assert cases["works"] == {"ms": 1.5} and cases["is told"] == {"known": ["works"]}
    assert [has_failed(figures) for figures in cases.values()] == [True, True, True, False, False, True]
    log = (tmp_path / "part-0.log").read_text()
    assert "Timeout (" in log and "in hang" in log and "no such thing" in log


def slow(scale: Scale) -> Iterator[Case]:
    yield Case("hangs", hang)
    yield Case("works", lambda _: {})


def test_a_part_stops_where_its_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.cuda.measurement.GRACE", 0.0)
    started = time.monotonic()
    part = measure("part", Part(slow, 1), dataclasses.replace(REHEARSAL, deadline=started + 1), tmp_path)
    # It is ended while it starts, or in its first case.
    assert "error" in part["cases"]["hangs"] and time.monotonic() < started + 30
    assert part["cases"]["works"] == {"error": "not run: no time left"}


def test_figures_are_held_against_earlier_ones_that_are_there() -> None:
    found: Found = {"device": {"copy GB/s": 3000.0}}
    assert ratio(600.0, found, "device", "copy GB/s") == 0.2
    assert ratio(None, found, "device", "copy GB/s") is None and ratio(600.0, found, "naive", "naive tokens/s") is None


def test_lengths_are_spread_as_slimorca_s() -> None:
    lengths = sorted(map(varied_lengths(512), range(2000)))
    assert lengths[0] >= 2 and lengths[-1] == 512 and 160 < lengths[1000] < 200
    assert max(map(varied_lengths(32), range(2000))) == 32
