"""metrics.jsonl is deterministic and can be cut back; clocks go elsewhere."""

import json
from pathlib import Path

from artifacts.metrics_log import MetricsLog


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run")
    log.write({"step": 1, "loss": 0.5}, {"step": 1, "seconds": 0.1})
    log.write({"step": 2, "loss": 0.25})
    metrics = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert [json.loads(line) for line in metrics.splitlines()] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert log.length == len(metrics)
    assert json.loads((tmp_path / "run/timing.jsonl").read_text()) == {"step": 1, "seconds": 0.1}
    log.close()


def test_a_resumed_run_keeps_only_what_its_checkpoint_knew(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.write({"step": 1})
    log.write({"step": 1}, {"step": 1})
    kept, kept_timing = log.length, log.timing_length
    log.write({"step": 2, "text": "é"}, {"step": 2})
    log.close()
    resumed = MetricsLog(tmp_path, keep=kept, keep_timing=kept_timing)
    assert resumed.length == kept
    resumed.write({"step": 2, "again": True}, {"step": 2})
    resumed.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 1}\n{"step": 2, "again": true}\n'
    assert resumed.length == (tmp_path / "metrics.jsonl").stat().st_size
    assert len((tmp_path / "timing.jsonl").read_text().splitlines()) == 2


def test_a_fresh_run_starts_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    MetricsLog(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
