"""The CUDA check-up's rehearsal measures everything, and what crashes or hangs costs nothing but itself (benchmarks/cuda)."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import benchmarks.cuda.__main__ as check_up
from benchmarks.cuda.cost import compare_decoding, compare_training
from benchmarks.cuda.scale import Case, Scale, varied_lengths

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
    assert len(cases["smoke"]) == 35 and all(figures["passed"] for figures in cases["smoke"].values())
    training = cases["train_step"]["causal, compiled"]
    assert training["to naive"] == training["tokens/s"] / cases["train_step"]["naive"]["naive tokens/s"]
    assert training["waits"] == "needs CUDA" and len(training["most expensive kernels of a step"]) == 10
    deepest = cases["decoding"]["one kernel, batch 1, 2 ACT steps"]
    recomputed = cases["decoding"]["recomputation, 2 ACT steps"]["recomputed tokens/s"]
    assert deepest["to recomputation"] == deepest["tokens/s"] / recomputed and 0 < deepest["of limit"] < 1
    assert all(figures["epoch, minutes"] > 0 for figures in cases["epoch"].values())
    trm, transformer = cases["equal_flops"]["trm"], cases["equal_flops"]["transformers_baseline"]
    assert transformer["TFLOP"] >= trm["TFLOP"] and len(trm["held-out rows"]) == 2
    assert len(cases["sudoku"]["sudoku_mlp"]["accuracy over time"]) == 4
    tables = (tmp_path / "cuda.md").read_text()
    assert all(f"| {case} |" in tables for part in PARTS for case in cases[part])


# A part whose cases crash, hang and fail; in the process that starts others, and in these.
_PART = """
import os, signal, sys, time
import benchmarks.cuda.__main__ as check_up
from benchmarks.cuda.scale import Case

def fail():
    raise ValueError("no such thing")

def cases(scale):
    "How it goes."
    yield Case("dies", lambda: os.kill(os.getpid(), signal.SIGKILL))
    yield Case("hangs", lambda: time.sleep(60), seconds=0.5)
    yield Case("fails", fail)
    yield Case("works", lambda: {"ms": 1.5})

check_up.PARTS["decoding"] = check_up.Part(cases, 1)
"""


def test_a_case_that_ends_its_process_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_up, "PARTS", dict(check_up.PARTS))
    exec(_PART, {})
    command = [sys.executable, "-c", _PART + "check_up.main()", "--rehearse"]
    log = tmp_path / "decoding.log"
    part = check_up.Measurement("decoding", Scale(), command, time.monotonic() + 200, log, {"works": {"error": "not run"}}).run()
    assert part["about"] == "How it goes."
    assert list(part["cases"]) == ["works", "dies", "hangs", "fails"]
    assert "status -9" in part["cases"]["dies"]["error"]
    assert (
        part["cases"]["hangs"]["error"].startswith("stopped at its time limit, in\n")
        and "<lambda>" in part["cases"]["hangs"]["error"]
    )
    assert part["cases"]["fails"]["error"] == "ValueError: no such thing"
    assert part["cases"]["works"] == {"ms": 1.5}
    assert "no such thing" in log.read_text()
    assert [check_up.has_failed(figures) for figures in part["cases"].values()] == [False, True, True, True]


def test_a_part_stops_where_its_time_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_up, "PARTS", {"decoding": check_up.Part(lambda scale: iter([Case("works", dict)]), 1)})
    monkeypatch.setattr(check_up, "GRACE", 0.0)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    started = time.monotonic()
    part = check_up.Measurement("decoding", Scale(), command, started + 1, tmp_path / "log", {}).run()
    assert "status -9" in part["cases"]["start of a process"]["error"] and time.monotonic() < started + 30


def test_figures_are_compared_with_what_is_there() -> None:
    def training() -> dict[str, dict[str, Any]]:
        step = {"tokens/s": 2e6, "TFLOP/s": None, "of peak": None, "to naive": None}
        return {
            "device": {"matmul TFLOP/s": 800.0},
            "causal, eager": {**step, "MFLOP/token": 100.0},
            "causal, compiled": dict(step),
            "naive": {"naive tokens/s": 1e5},
        }

    def decoding() -> dict[str, dict[str, Any]]:
        return {
            "device": {"copy GB/s": 3000.0},
            "one kernel": {"engine": "", "ACT steps": 4, "batch": 1, "tokens/s": 500.0, "ms": 2.0, "MB read": 600.0},
            "recomputation, 4 ACT steps": {"recomputed tokens/s": 10.0},
        }

    compare_training(cases := training())
    compiled = cases["causal, compiled"]
    assert (compiled["TFLOP/s"], compiled["of peak"], compiled["to naive"]) == (200.0, 0.25, 20.0)
    compare_decoding(cases := decoding())
    # 600 MB at 3000 GB/s are 0.2 ms.
    assert cases["one kernel"]["of limit"] == pytest.approx(0.1) and cases["one kernel"]["to recomputation"] == 50.0
    for missing in training():
        compare_training({name: figures for name, figures in training().items() if name != missing})
    for missing in decoding():
        compare_decoding({name: figures for name, figures in decoding().items() if name != missing})


def test_lengths_are_spread_as_slimorca_s() -> None:
    lengths = sorted(map(varied_lengths(512), range(2000)))
    assert lengths[0] >= 2 and lengths[-1] == 512 and 160 < lengths[1000] < 200
    assert max(map(varied_lengths(32), range(2000))) == 32
