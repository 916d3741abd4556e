"""The tokenization benchmark runs on few rows, ends in JSON, and both its sides make the same tokens."""

import json
import subprocess
import sys
from pathlib import Path

import mistral_common
import pytest

from benchmarks.tokenization import cached, generate, naive
from dataset.text.tokenizer import Tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = Path(mistral_common.__file__).parent / "data/tokenizer.model.v1"


def test_it_prints_its_figures(tmp_path: Path) -> None:
    command = ["benchmarks/tokenization.py", "--rows", "60", "--naive-rows", "20", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command, "--tokenizer-path", str(MODEL)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    sides = report["sides"]
    assert (sides["naive"]["rows"], sides["1"]["rows"], sides["2"]["rows"]) == (20, 60, 60)
    assert report["same_bytes"] and sides["1"]["tokens"] == sides["2"]["tokens"] > 60 * 100
    rates = {name: side["rows"] / side["seconds"] for name, side in sides.items()}
    assert report["ratio"] == pytest.approx(rates["2"] / rates["naive"])
    assert report["ratio_of_processes"] == pytest.approx(rates["2"] / rates["1"])
    assert report["ratio_one_process"] == pytest.approx(rates["1"] / rates["naive"])
    assert all(side["peak_memory_bytes"] > 2**20 for side in sides.values())
    assert 0 < sides["2"]["second_start_s"] < sides["2"]["second_start_process_s"]
    assert list(tmp_path.iterdir()) == []


def test_both_sides_make_the_same_tokens_of_the_same_rows(tmp_path: Path) -> None:
    tokenizer = Tokenizer(MODEL)
    for name in ("a.jsonl", "b.jsonl"):
        generate(tmp_path / name, 30, tokenizer, seed=1)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    ours = cached(tmp_path / "a.jsonl", tokenizer, 400, 1, tmp_path / "cache")
    theirs = naive(tmp_path / "a.jsonl", tokenizer, 400, 1000)
    assert (ours["rows"], ours["tokens"]) == (theirs["rows"], theirs["tokens"])
