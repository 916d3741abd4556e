"""Checkpoint retention: keeps a run's newest and best checkpoints, and removes the others."""

import contextlib
import math
import shutil
from pathlib import Path

from artifacts.checkpoint import checkpoints_of, read_train_metrics
from config.errors import UsageError


def held_out_loss(checkpoint: Path, loss_name: str) -> float | None:
    """`loss_name` on held-out data at this checkpoint; None if it wasn't measured."""
    with contextlib.suppress(UsageError, KeyError, TypeError):
        return float(read_train_metrics(checkpoint)["test"][loss_name])
    return None


def best_checkpoints(run: Path, loss_name: str) -> list[Path]:
    """A run's evaluated checkpoints, by ascending `loss_name`; ties: the older first."""
    losses = {folder: held_out_loss(folder, loss_name) for folder in checkpoints_of(run)}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(measured, key=lambda folder: measured[folder])


def prune_checkpoints(run: Path, keep_last: int, keep_best: int, loss_name: str) -> None:
    """Remove a run's checkpoints except the newest and those with the lowest held-out `loss_name`."""
    folders = checkpoints_of(run)
    kept = {*folders[-keep_last:], *best_checkpoints(run, loss_name)[:keep_best]}
    for folder in folders:
        if folder in kept:
            continue
        removed = folder.parent / f".{folder.name}.removed"
        try:
            # Rename first, so that a kill in the middle leaves no folder that looks intact.
            folder.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            raise UsageError(f"the checkpoint {folder} can't be removed: {error}; see checkpoint.keep_last") from error


def remove_partial_checkpoints(run: Path) -> None:
    """Remove checkpoints that a kill left half written or half removed."""
    for kind in ("partial", "removed"):
        for folder in run.glob(f".step_*.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)
