"""What a run shows: few lines without a terminal, what it will take once that is known, where things lie (training/console.py)."""

import io
import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config.schema import PretrainInstructConfig
from training.console import Console, say_places, show_evaluation

GIGABYTE = {"peak_rss_bytes": 1_000_000_000}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(
    tiny_config: Callable[..., PretrainInstructConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """stdout and stderr of 300 steps of 4 rows, each of which takes a second."""

    def run(*overrides: str, done: int = 0, seconds: float = 0.0) -> tuple[str, str]:
        clock = itertools.count(100.0)
        monkeypatch.setattr("training.console.time.perf_counter", lambda: next(clock))
        config = tiny_config(*overrides)
        with Console(config, total=1200, done=done, seconds=seconds, shown=True) as console:
            for step in range(1 + done // 4, 301):
                console.advance(4 * step)
                console.line(step, 4 * step, {"loss": 10 / step, "act_steps": 2}, GIGABYTE)
        return tuple(capsys.readouterr())

    return run


def test_without_a_terminal_a_line_each_half_minute(shown: Callable[..., tuple[str, str]]) -> None:
    out, err = shown()
    assert out.splitlines() == [
        "plan 300 optimizer steps of 4 rows",
        "expected time 05:00 at 4 ex/s; memory so far: peak_rss 1.00 GB",
    ]
    lines = err.splitlines()
    assert len(lines) == 10 and "\r" not in err
    assert lines[0] == "step 30: loss 0.333, act_steps 2.000, 4 ex/s, 10%, 04:30 left"
    assert lines[-1].endswith("100%, 00:00 left")


def test_a_run_that_ends_before_its_data_has_less_left(shown: Callable[..., tuple[str, str]]) -> None:
    out, err = shown("max_minutes=2")
    assert "for 2 minutes at most" in out and "expected time 02:00" in out and "10%, 01:30 left" in err
    out, err = shown("max_steps=100")
    assert "plan 100 optimizer steps" in out and "expected time 01:40" in out and "step 30: " in err and "30%, 01:10 left" in err


def test_a_resumed_run_counts_what_is_left(shown: Callable[..., tuple[str, str]]) -> None:
    out, err = shown("max_minutes=6", done=600, seconds=300.0)
    assert "from step 150 on" in out and "expected time 01:00" in out
    assert err.startswith("step 180: ") and "60%, 00:30 left" in err


def test_a_terminal_has_a_bar_and_no_lines(shown: Callable[..., tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    out, _ = shown()
    assert "1200/1200" in terminal.getvalue() and "loss=" in terminal.getvalue() and "step 30" not in terminal.getvalue()
    assert "expected time 05:00" in out


def test_other_ranks_show_nothing(tiny_config: Callable[..., PretrainInstructConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with Console(tiny_config(), total=8, done=0, seconds=0.0, shown=False) as console:
        console.line(1, 4, {"loss": 1.0}, GIGABYTE)
    assert capsys.readouterr() == ("", "")


def test_a_line_without_figures_has_no_gap(
    tiny_config: Callable[..., PretrainInstructConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    with Console(tiny_config(), total=12, done=0, seconds=0.0, shown=True) as console:
        console._line_at -= 60
        console.line(3, 12, {}, GIGABYTE)
    assert re.search(r"^step 3: [\d,]+ ex/s, 100%, 00:00 left$", capsys.readouterr().err, re.MULTILINE)


def test_held_out_results_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    report: dict[str, Any] = {"loss_per_token": 0.5, "bits_per_byte": 1.25, "counts": {"tokens": 3}, "rows": 7}
    show_evaluation(1400, report)
    head, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["held", "out", "loss_per_token", "bits_per_byte"] and row.split() == [
        "step",
        "1,400",
        "0.5000",
        "1.2500",
    ]
    assert len(head) == len(row)


def test_only_what_is_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "step_3").mkdir()
    (tmp_path / "report.html").touch()
    said: list[str] = []
    say_places(tmp_path / "step_3", said.append)
    assert said == [f"checkpoint {tmp_path / 'step_3'}", f"report     {tmp_path / 'report.html'}"]
