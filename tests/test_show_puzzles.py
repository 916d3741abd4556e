"""The picture of puzzles: panels for what is there, wrong cells framed, and what can't be drawn told."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file

from dataset.build_small_puzzles import build_mazes, build_sudoku
from dataset.puzzles.arc_grids import SEQ_LEN, VOCAB_SIZE, Pair, lay_out
from dataset.puzzles.loader import PuzzleData
from dataset.puzzles.storage import create_plain_split, new_dataset, write_identifiers
from scripts import show_puzzles
from scripts.show_puzzles import main

KINDS = pytest.mark.parametrize("kind", ["sudoku", "maze", "arc"])


def make(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "sudoku":
        build_sudoku(path, train_size=1, test_size=4)
    elif kind == "maze":
        build_mazes(path, train_size=1, test_size=4, side=5, min_steps=4)
    else:
        grid = np.arange(10, dtype=np.uint8).reshape(2, 5)
        laid = lay_out([Pair(grid, grid.T)] * 4, np.array([[0, *range(10)]], np.uint8), None)
        with new_dataset(path) as partial:
            files = create_plain_split(partial / "test", groups=4, forms=1, seq_len=SEQ_LEN, vocab_size=VOCAB_SIZE)
            files.write(0, *(side.reshape(4, SEQ_LEN) for side in laid))
            write_identifiers(partial, ["<blank>"])
    return path


def show(folder: Path, *arguments: object) -> list[Any]:
    """Run the command; the panels that were drawn, as (title, number of frames)."""
    drawn = []
    original = show_puzzles._draw_grid

    def note(axis: Any, *more: Any) -> None:
        original(axis, *more)
        drawn.append(axis)

    with mock.patch.object(show_puzzles, "_draw_grid", note):
        main(["--data-path", str(folder), *map(str, arguments)])
    return [(axis.get_title(), len(axis.patches)) for axis in drawn]


@KINDS
def test_input_answer_and_every_step_are_drawn(tmp_path: Path, kind: str) -> None:
    folder = make(tmp_path, kind)
    answers = np.array(PuzzleData([folder], "test").sets["all"].labels[1:3]).astype(np.int64)
    first_step = answers.copy()
    supervised = np.flatnonzero(answers[0] > 0)
    first_step[0, supervised[:2]] = answers[0, supervised[:2]] % 5 + 1
    save_file(
        {"rows": np.array([1, 2]), "preds": answers, "preds_by_step": np.stack([first_step, answers], 1)}, tmp_path / "outputs"
    )
    picture = tmp_path / "picture.png"
    panels = show(folder, "--rows", 2, 1, "--outputs", tmp_path / "outputs", "--output", picture)
    right = [("ACT step 1: right", 0), ("ACT step 2: right", 0), ("prediction: right", 0)]
    assert panels == [("row 2", 0), ("answer", 0), *right, ("row 1", 0), ("answer", 0), ("ACT step 1: 2 wrong", 2), *right[1:]]
    assert picture.read_bytes().startswith(b"\x89PNG")


@KINDS
def test_a_data_set_alone_is_drawn(tmp_path: Path, kind: str) -> None:
    assert show(make(tmp_path, kind), "--rows", 3, "--output", tmp_path / "a.png") == [("row 3", 0), ("answer", 0)]


def test_the_training_split(tmp_path: Path) -> None:
    panels = show(make(tmp_path, "sudoku"), "--split", "train", "--rows", 0, "--output", tmp_path / "a.png")
    assert panels == [("row 0", 0), ("answer", 0)]


@pytest.mark.parametrize(
    ("saved", "arguments", "message"),
    [
        (None, ["--rows", "4"], "--rows: expected at most 50 numbers from 0 to 3, found 4"),
        (None, ["--outputs", "none.safetensors"], "can't be read as saved outputs"),
        ({"rows": np.arange(4)}, [], "expected tensors rows and preds or preds_by_step, found rows"),
        ({"rows": np.array([7]), "preds": np.ones((1, 36), np.int64)}, [], "no outputs of row 0"),
        ({"rows": np.arange(4), "preds": np.ones((4, 25), np.int64)}, [], "don't fit this data set"),
        ({"rows": np.arange(4), "preds": np.full((4, 36), 8)}, [], "don't fit this data set"),
        (None, ["--output", "none/a.png"], "can't be written"),
    ],
)
def test_what_cannot_be_drawn_is_told(
    tmp_path: Path, saved: dict[str, np.ndarray] | None, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    folder = make(tmp_path, "sudoku")
    if saved is not None:
        save_file(saved, tmp_path / "outputs")
        arguments = ["--outputs", "outputs", *arguments]
    with pytest.raises(SystemExit) as stop:
        main(["--data-path", str(folder), *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_an_unknown_puzzle_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with new_dataset(tmp_path / "data") as partial:
        create_plain_split(partial / "test", groups=3, forms=1, seq_len=7, vocab_size=3)
        write_identifiers(partial, ["<blank>"])
    with pytest.raises(SystemExit):
        main(["--data-path", str(tmp_path / "data")])
    assert "expected ARC, a maze or Sudoku" in capsys.readouterr().err
