"""What a checkpoint keeps of a run's course comes back as it was, whichever version wrote it, and is the same for any ranks."""

import json
from dataclasses import asdict

import pytest
import torch

from models.distributed import Ranks
from training.progress import RunProgress, StepResult, Window
from training.stopping import EarlyStopping


def step(number: int, *, skipped: bool = False) -> StepResult:
    sums: dict[str, torch.Tensor | int] = {"tokens": 10 * number, "nll": torch.tensor(0.5 * number)}
    return StepResult(number, 0.1 * number, 4, 2.0, skipped, sums)


def test_a_window_sums_what_moved_weights() -> None:
    window = Window()
    for result in (step(1), step(2, skipped=True), step(3)):
        window.add(result)
    total = window.over_ranks(Ranks())
    assert (total.steps, total.skipped, total.grad_norm) == (2, 1, 4.0) and total.lr == pytest.approx(0.3)
    assert total.sums == {"tokens": 40.0, "nll": 2.0}
    window.add(step(4))
    assert window.over_ranks(Ranks()).sums == {"tokens": 80.0, "nll": 4.0}, "the window goes on after it was read"
    assert total.sums["tokens"] == 40.0


def test_progress_comes_back_from_json_beside_the_keys_of_a_task() -> None:
    progress = RunProgress(step=7, losses=[3.0, 2.5], early_stopping=EarlyStopping(2.5, 1), seconds=1.5, forward_dtype="float32")
    progress.window.add(step(7))
    values = json.loads(json.dumps({**progress.values(Ranks()), "admitted": 28}))
    found = RunProgress.from_values(values)
    assert asdict(found) == progress.values(Ranks()) and found.early_stopping == EarlyStopping(2.5, 1)
    found.window.add(step(8))
    assert found.window.over_ranks(Ranks()).sums == {"tokens": 150.0, "nll": 7.5}


def test_progress_of_an_earlier_version_is_read() -> None:
    """Its window counts rows by depth, and without W&B it knows no id."""
    window = {"lr": 0.1, "steps": 1, "skipped": 0, "grad_norm": 2.0, "sums": {"tokens": 9.0, "nll": 0.0}, "halted_at": [[2, 3]]}
    saved = {"step": 4, "skipped_in_a_row": 0, "window": window, "early_stopping": {"best": None, "waited": 0}, "losses": [1.0]}
    found = RunProgress.from_values(saved)
    assert (found.step, found.losses, found.wandb_id) == (4, [1.0], None)
    assert found.window.sums["tokens"] == 9.0
