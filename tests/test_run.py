"""What a run says of its course, whether or not it was stopped on the way."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.checkpoint import checkpoints_of, step_of
from config.schema import PretrainInstructConfig
from training.instruct import run_instruct
from training.text import TextTask

# A loss that falls and wavers; two lines jump, the first before anything is known of the run.
LOSSES = [3 + 2 * 0.95**line + 0.4 * (line % 3) for line in range(100)]
LOSSES[5] = LOSSES[30] = 9.0


def test_a_jump_of_the_loss_is_told_after_a_restart_as_without(
    run_config: Callable[..., PretrainInstructConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(folder: str, begin: int) -> list[str]:
        """What is said of the losses from line `begin` on, a line for each step."""
        losses = iter(LOSSES[begin:])
        monkeypatch.setattr(TextTask, "report", lambda task, sums: {"loss_per_token": next(losses)})
        run_instruct(run_config(tmp_path / folder, "log_interval=1", "dataset.test_ratio=0", "resume=auto"))
        return [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]

    [line] = undisturbed = told("whole", 0)
    assert line.startswith("step 31: the loss has jumped to 9.000 from about 4.") and "lower lr or set grad_clip" in line
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for checkpoint in checkpoints_of(tmp_path / "stopped/SlimOrca-ACT/run"):
        if step_of(checkpoint) > 24:
            shutil.rmtree(checkpoint)
    assert told("stopped", 24) == undisturbed
