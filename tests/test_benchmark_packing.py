"""The packing benchmark runs on few rows, ends in JSON, and all layouts train the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import packing
from config.errors import UsageError
from dataset.text.tokenizer import Tokenizer

TINY = ["arch.hidden_size=16", "arch.num_heads=2", "arch.H_cycles=1", "arch.L_cycles=1", "arch.halt_max_steps=2", "device=cpu"]


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr("benchmarks.packing.keep_freed_memory", lambda: None)
    monkeypatch.setattr("sys.argv", ["packing.py", "--dtype", "float32", "--threads", "1", "--vocabulary", "70", *arguments])
    packing.main()
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_layouts_learn_the_same_with_less_padding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--rows", "40", "--warmup", "1", "--repeats", "2")
    found = report(monkeypatch, capsys, *sizes, "--overrides", *TINY, "dataset.seq_len=256", "global_batch_size=16")
    layouts = found["layouts"]
    assert list(layouts) == ["off", "bucketed", "packed"] and found["steps"] == 2 and found["rows"] == 40
    assert layouts["off"]["padding"] > layouts["bucketed"]["padding"] > 0 and layouts["packed"]["padding"] >= 0
    assert layouts["off"]["ratio"] == 1.0
    for layout in layouts.values():
        assert layout["loss_per_token"] == pytest.approx(layouts["off"]["loss_per_token"], abs=1e-3)
        rates = layout["supervised_tokens_per_second"] / layouts["off"]["supervised_tokens_per_second"]
        assert layout["ratio"] == pytest.approx(rates)


def test_it_reads_the_data_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_tokenizer: Tokenizer
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?", "answer": "x" * n}) + "\n" for n in range(1, 30)))
    data = [f"dataset.tokenizer_path={tmp_path}/tokenizer.model", f"dataset.data_dir={tmp_path}", "dataset.test_ratio=0"]
    overrides = ["--overrides", "dataset=jsonl", *data, *TINY, "global_batch_size=8"]
    found = report(monkeypatch, capsys, "--from-data", "--compared", "packed", "--warmup", "1", "--repeats", "999", *overrides)
    assert list(found["layouts"]) == ["packed"] and found["rows"] == 29 and found["steps"] < 999
    with pytest.raises(UsageError, match="no step is left"):
        report(monkeypatch, capsys, "--from-data", "--warmup", "999", *overrides)
