"""Both benchmarks run on tiny settings, end in JSON, and compare two sides that compute the same."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common import synthetic_example
from benchmarks.decoding import Setting
from benchmarks.naive import stablemax_cross_entropy
from benchmarks.train_step import CHANGES, Naive, Ours, compare, settings, taken_away
from config.errors import UsageError
from tests.test_entry_scripts import run_script, run_well

REPOSITORY = Path(__file__).resolve().parents[1]
TINY_ARCH = ["arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=2", "arch.L_cycles=2"]
TINY = ["--vocabulary", "70", "--threads", "1", "--repeats", "1", "--overrides", *TINY_ARCH]


def report_in(said: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(said.strip().splitlines()[-1])
    return report


def train_arguments(**changes: Any) -> argparse.Namespace:
    values = {"dtype": "float64", "naive_dtype": "float64", "act_steps": 2, "seq_len": 11, "batch": 3, "seed": 1}
    return argparse.Namespace(**{**values, "overrides": TINY_ARCH, **changes})


def test_train_step_prints_its_figures() -> None:
    sizes = ("--batch", "2", "--seq-len", "16", "--warmup", "1", "--loss-batch", "3")
    flags = (*sizes, "--same-allocator", "--without", "kept_memory", "--loss-memory", *TINY)
    # A process of its own: the peak memory of one that it starts counts from its own.
    command = [sys.executable, "benchmarks/train_step.py", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    report = report_in(done.stdout)
    assert report["ratio"] == pytest.approx(report["seconds_naive"] / report["seconds_ours"])
    assert report["ratio_same_allocator"] == pytest.approx(
        report["seconds_naive_same_allocator"] / report["seconds_ours_same_allocator"]
    )
    assert (report["dtype_naive"], report["threads"], report["batch"], report["seq_len"]) == ("float32", 1, 2, 16)
    assert report["dtype"] in ("bfloat16", "float32")
    assert report["supervised"] == 16
    assert report["first_loss_ours"] == pytest.approx(report["first_loss_naive"], rel=0.02)
    assert sum(report["seconds_ours_by_part"].values()) == pytest.approx(report["seconds_ours"])
    assert set(report["seconds_ours_by_part"]) == {"forward", "loss", "backward", "optimizer", "other"}
    assert report["positions_per_second"] == pytest.approx(32 / report["seconds_ours"])
    assert min(report["peak_memory_bytes_ours"], report["peak_memory_bytes_naive"]) > 2**20
    without = report["without"]["kept_memory"]
    assert without["slower"] == pytest.approx(without["seconds"] / without["seconds_ours"])
    assert (report["loss_batch"], report["loss_supervised"]) == (3, 3 * 8)
    few, twice = (report["loss_peak_bytes_naive_measured"][rows] for rows in ("1", "2"))
    assert report["loss_peak_bytes_naive_extrapolated"] == few + 2 * (twice - few)


def test_decoding_prints_its_figures() -> None:
    sizes = ["--positions", "9", "--act-steps", "3", "--batch", "2", "--batch-act-steps", "2"]
    flags = (*sizes, "--flat-positions", "5", "--near", "8", "--far", "64", "--no-compile", *TINY)
    report = report_in(run_well("benchmarks/decoding.py", *flags, folder=REPOSITORY).out)
    alone, batch = report["alone"], report["batch"]
    assert report["ratio"] == pytest.approx(alone["ms_per_token_naive"] / alone["ms_per_token_ours"])
    assert report["ratio_best"] == pytest.approx(alone["ms_per_token_naive"] / alone["ms_per_token_best"])
    assert report["ratio_batch2"] == pytest.approx(batch["tokens_per_second_ours"] / batch["tokens_per_second_naive"])
    assert report["flatness"] > 0 and report["threads"] == 1
    assert {key: alone[key] for key in ("dtype", "batch", "positions", "act_steps")} == {
        "dtype": "float32",
        "batch": 1,
        "positions": 9,
        "act_steps": 3,
    }
    assert (batch["batch"], batch["act_steps"]) == (2, 2)
    element = {"bfloat16": 2, "float32": 4}[alone["dtype_best"]]
    lanes = 3 * 6 * 2
    assert alone["cache_bytes_best"] == lanes * 2 * 9 * 32 * element
    # Two blocks of qkv, o, gate and up, down (SwiGLU is 256 wide), six calls a step; the head once.
    block = 3 * 32 * 32 + 32 * 32 + 2 * 256 * 32 + 256 * 32
    assert alone["weight_bytes_per_token_best"] == (3 * 6 * 2 * block + 70 * 32) * element
    assert alone["difference_one_step"] < 0.2


def test_both_sides_train_the_same_weights() -> None:
    arguments = train_arguments()
    ours = Ours(settings(arguments, "ours"), vocabulary=70)
    naive = Naive(settings(arguments, "naive"), vocabulary=70)
    backward = torch.Tensor.backward
    # Two ACT steps a row: the third and fourth step are of new rows.
    for _ in range(4):
        assert ours.step()["loss_per_token"] == pytest.approx(naive.step()["loss_per_token"], rel=1e-9)
    assert torch.Tensor.backward is backward
    others = dict(naive.model.named_parameters())
    initial = dict(Ours(settings(arguments, "ours"), vocabulary=70).model.named_parameters())
    for name, parameter in ours.model.named_parameters():
        torch.testing.assert_close(parameter, others[name], rtol=0, atol=1e-9)
        assert not torch.equal(parameter, initial[name])


@pytest.mark.parametrize("change", CHANGES)
def test_without_a_change_the_same_is_computed(change: str) -> None:
    arguments = train_arguments(dtype="float64" if change == "chunked_loss" else "bfloat16")
    ours = Ours(settings(arguments, "ours"), vocabulary=70)
    expected = [ours.step()["loss_per_token"] for _ in range(3)]
    config = settings(arguments, change)
    with taken_away(change):
        without = Ours(config, vocabulary=70)
        found = [without.step() for _ in range(3)]
    assert [step["loss_per_token"] for step in found] == pytest.approx(expected, rel=1e-9 if arguments.dtype == "float64" else 0.05)
    assert config.arch.forward_dtype == ("float32" if change == "bfloat16" else arguments.dtype)
    assert config.dataset.supervise == ("all" if change == "supervised_only" else "assistant")


@pytest.mark.parametrize("act_steps", [1, 4])
def test_both_sides_decode_the_same(act_steps: int) -> None:
    arguments = argparse.Namespace(vocabulary=70, seed=2, compile=False, overrides=TINY_ARCH)
    setting = Setting(arguments, dtype="float64", batch=2, positions=13, act_steps=act_steps)
    assert setting.difference(act_steps) < 1e-9


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["arch=hrm", "arch.H_layers=1"], "arch=trm, found hrm"),
        (["arch.attention=prefix"], "arch.attention=causal, found prefix"),
        (["arch.grad_calls=1"], "arch.grad_calls=null, found 1"),
        (["arch.halt.backprop=true"], "arch.halt.backprop=false"),
    ],
)
def test_what_the_naive_way_is_not_written_for_is_refused(overrides: list[str], told: str) -> None:
    arguments = train_arguments(overrides=[*TINY_ARCH, *overrides], without=[])
    with pytest.raises(UsageError, match=re.escape(told)):
        compare(arguments)
    with pytest.raises(UsageError, match=re.escape(told)):
        Naive(settings(arguments, "naive"), vocabulary=70)


@pytest.mark.parametrize("benchmark", ["train_step", "decoding"])
def test_wrong_settings_are_told_without_a_traceback(benchmark: str) -> None:
    told = run_script(f"benchmarks/{benchmark}.py", *TINY, "arch=hrm", "arch.H_layers=1", folder=REPOSITORY)
    assert told.status == 2
    assert told.err.startswith("error: the naive way is written for arch=trm") and "Traceback" not in told.err


def test_synthetic_rows_are_repeatable_and_half_supervised() -> None:
    first, again, other = (synthetic_example(3, index, 512, 32_000) for index in (0, 0, 1))
    assert np.array_equal(first.ids, again.ids) and not np.array_equal(first.ids, other.ids)
    assert len(first.ids) == 513 and first.supervised[1:].sum() == 256


def test_naive_loss_is_the_published_formula() -> None:
    # s = 3, 1/2, 1 of logits 2, -1, 0; the second position has no label.
    logits_BTV = torch.tensor([[[2.0, -1.0, 0.0], [5.0, 5.0, 5.0]]])
    nll_BT = stablemax_cross_entropy(logits_BTV, torch.tensor([[1, -100]]))
    assert nll_BT.dtype == torch.float64
    torch.testing.assert_close(nll_BT, torch.tensor([[-np.log(0.5 / 4.5), 0.0]], dtype=torch.float64))
