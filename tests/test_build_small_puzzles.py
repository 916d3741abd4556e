"""The command for small puzzles writes what the loader reads; every option does what it says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset.build_small_puzzles import main
from dataset.puzzles.loader import PuzzleData, TrainBatches
from dataset.puzzles.maze import are_shortest, shortest_paths
from dataset.puzzles.sudoku import SIX, agree, are_solutions


def make(path: Path, kind: str, **options: Any) -> tuple[PuzzleData, PuzzleData]:
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    main([kind, "--output-dir", str(path), "--train-size", "40", "--test-size", "10", *flags])
    return PuzzleData([path], "train"), PuzzleData([path], "test")


def test_sudoku(tmp_path: Path) -> None:
    train, test = make(tmp_path / "data", "sudoku", clues=16)
    assert (train.metadata.seq_len, train.metadata.vocab_size, train.metadata.total_groups, test.metadata.total_groups) == (
        36,
        8,
        40,
        10,
    )
    for data in (train, test):
        questions, answers = (np.array(a) - np.uint8(1) for a in (data.sets["all"].inputs, data.sets["all"].labels))
        assert are_solutions(answers, SIX).all() and agree(questions, answers).all()
        assert (questions > 0).sum(axis=1).min() >= 16


def test_mazes(tmp_path: Path) -> None:
    train, test = make(tmp_path / "data", "maze", side=6, min_steps=7)
    assert (train.metadata.seq_len, train.metadata.vocab_size, train.metadata.total_groups, test.metadata.total_groups) == (
        36,
        6,
        40,
        10,
    )
    for data in (train, test):
        questions, answers = (np.array(a).reshape(-1, 6, 6) for a in (data.sets["all"].inputs, data.sets["all"].labels))
        assert are_shortest(questions, answers).all() and shortest_paths(questions)[0].min() >= 7


@pytest.mark.parametrize("kind", ["sudoku", "maze"])
def test_they_are_trained_on_like_any_other(tmp_path: Path, kind: str) -> None:
    train, _ = make(tmp_path / "data", kind)
    batches = list(TrainBatches(train, global_batch_size=8, seed=0, epochs_per_iteration=1).iteration())
    assert sorted(np.concatenate([batch.rows for batch in batches]).tolist()) == list(range(40))
    same, _ = make(tmp_path / "same", kind)
    other, _ = make(tmp_path / "other", kind, seed=1)
    assert train.data_hash == same.data_hash != other.data_hash


@pytest.mark.parametrize(
    "arguments",
    [
        ["sudoku", "--train-size", "0"],
        ["maze", "--test-size", "0"],
        ["sudoku", "--clues", "37"],
        ["maze", "--side", "2"],
        ["maze", "--min-steps", "0"],
        ["maze", "--side", "3", "--min-steps", "9"],
    ],
)
def test_wrong_settings_are_told(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--output-dir", str(tmp_path / "data")])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []
