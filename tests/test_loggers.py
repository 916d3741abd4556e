"""Every logger gets every line, a resumed run goes on in each, and one that can't begin says what to do."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from config.schema import PretrainInstructConfig
from training.loggers import WANDB_VARIABLE, RunLogger, wandb_mode

ConfigFactory = Callable[..., PretrainInstructConfig]
TIMING = {"step": 2, "tokens_per_second": 30.0, "peak_rss_bytes": 5}


def metrics(step: int) -> dict[str, Any]:
    return {"step": step, "lr": 0.5, "loss_per_token": 2.0 / step, "grad_norm": None}


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "examples": 8, "test": {"bits_per_byte": 0.25, "by_act_step": [], "counts": {"text_bytes": 9}}}


class FakeRun:
    """What the program uses of a W&B run."""

    def __init__(self, **given: Any) -> None:
        self.given, self.id, self.logged, self.finished = given, given["id"] or "new", [], False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb_runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    import wandb

    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        runs.append(FakeRun(**given))
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    return runs


def test_files_are_always_written_and_cut_back(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    logger = RunLogger(tiny_config("wandb=disabled"), tmp_path)
    logger.training(metrics(1), {**TIMING, "step": 1})
    kept = logger.state()
    logger.training(metrics(2), TIMING)
    logger.close()
    again = RunLogger(tiny_config("wandb=disabled"), tmp_path, {**kept, "step": 1})
    again.evaluation(evaluation(1))
    again.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [metrics(1), evaluation(1)]
    assert json.loads((tmp_path / "timing.jsonl").read_text().splitlines()[0])["peak_rss_bytes"] == 5
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "timing.jsonl"}


def test_wandb_gets_the_numbers_of_every_line_and_goes_on_with_its_id(
    tiny_config: ConfigFactory, tmp_path: Path, wandb_runs: list[FakeRun]
) -> None:
    config = tiny_config("wandb=online", "run_name=one")
    logger = RunLogger(config, tmp_path)
    logger.training(metrics(2), TIMING)
    logger.evaluation(evaluation(2))
    logger.close()
    [first] = wandb_runs
    assert (first.given["mode"], first.given["project"], first.given["name"]) == ("online", config.project_name, "one")
    assert first.logged == [
        (2, {"train/lr": 0.5, "train/loss_per_token": 1.0, "timing/tokens_per_second": 30.0, "timing/peak_rss_bytes": 5}),
        (2, {"test/bits_per_byte": 0.25}),
    ]
    assert first.finished and logger.state()["wandb_id"] == "new"
    RunLogger(config, tmp_path, {**logger.state(), "step": 2})
    assert wandb_runs[1].given["id"] == "new" and wandb_runs[1].given["resume"] == "allow"


@pytest.mark.parametrize(
    ("setting", "variable", "mode"),
    [("null", "", "offline"), ("null", "online", "online"), ("offline", "online", "offline"), ("disabled", "online", "disabled")],
)
def test_the_setting_wins_over_the_variable(
    tiny_config: ConfigFactory, monkeypatch: pytest.MonkeyPatch, setting: str, variable: str, mode: str
) -> None:
    monkeypatch.setenv(WANDB_VARIABLE, variable)
    assert wandb_mode(tiny_config(f"wandb={setting}")) == mode


def test_what_wandb_cannot_do_is_told(tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv(WANDB_VARIABLE, "on")
    with pytest.raises(UsageError, match="WANDB_MODE=on: expected one of offline, online, disabled"):
        RunLogger(tiny_config(), tmp_path)

    def init(**given: Any) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UsageError, match="No API key configured; log in with `wandb login`, or use wandb=offline"):
        RunLogger(tiny_config("wandb=online"), tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_tensorboard_reads_back_what_was_logged(tiny_config: ConfigFactory, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = tiny_config("wandb=disabled", "tensorboard=true")
    logger = RunLogger(config, tmp_path)
    for step in (1, 2, 3):
        logger.training(metrics(step), {**TIMING, "step": step})
    kept = {**logger.state(), "step": 1}
    logger.close()
    # Killed after step 3, resumed from step 1.
    logger = RunLogger(config, tmp_path, kept)
    logger.training(metrics(2), TIMING)
    logger.evaluation(evaluation(2))
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss_per_token")]
    assert losses == [(1, 2.0), (2, 1.0)]
    assert [event.value for event in events.Scalars("test/bits_per_byte")] == [0.25]
    assert {tag.split("/")[0] for tag in events.Tags()["scalars"]} == {"train", "timing", "test"}


def test_a_missing_tensorboard_is_told(tiny_config: ConfigFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="run `pip install tensorboard`"):
        RunLogger(tiny_config("wandb=disabled", "tensorboard=true"), tmp_path)
    assert not list(tmp_path.iterdir())
