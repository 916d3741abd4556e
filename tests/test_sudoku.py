"""Sudoku: what a solution is, and that symmetries keep it one."""

import numpy as np
import pytest

from dataset.puzzles.draws import raw_bits
from dataset.puzzles.sudoku import NINE, SIX, Shape, agree, are_solutions, draw_symmetries, symmetric_forms, to_tokens

SHAPES = pytest.mark.parametrize("shape", [NINE, SIX, Shape(3, 2)])


def solution(shape: Shape) -> np.ndarray:
    """Rows of 1, 2, 3, ... that begin where the pattern of boxes wants it."""
    rows = np.arange(shape.side)
    starts = rows % shape.box_height * shape.box_width + rows // shape.box_height
    grid: np.ndarray = (starts[:, None] + np.arange(shape.side)) % shape.side + 1
    return grid.astype(np.uint8).ravel()


@SHAPES
def test_units_are_rows_columns_and_boxes(shape: Shape) -> None:
    units = shape.units()
    grid = np.arange(shape.cells).reshape(shape.side, shape.side)
    assert units.shape == (3 * shape.side, shape.side)
    assert np.all(np.bincount(units.ravel()) == 3)
    assert units[1].tolist() == grid[1].tolist() and units[shape.side + 1].tolist() == grid[:, 1].tolist()
    assert units[2 * shape.side].tolist() == grid[: shape.box_height, : shape.box_width].ravel().tolist()
    assert units[-1].tolist() == grid[-shape.box_height :, -shape.box_width :].ravel().tolist()


@SHAPES
def test_a_solution_is_told_from_what_is_none(shape: Shape) -> None:
    right = solution(shape)
    grids = np.stack([right] * 4)
    grids[1, [0, 1]] = grids[1, [1, 0]]  # rows and boxes stay right
    grids[2, 0] = 0
    grids[3] = np.arange(shape.cells) % shape.side + 1  # rows alone
    assert are_solutions(grids, shape).tolist() == [True, False, False, False]
    # A Latin square without boxes.
    latin = (np.arange(shape.side)[:, None] + np.arange(shape.side)) % shape.side + 1
    assert not are_solutions(latin.astype(np.uint8).reshape(1, -1), shape)[0]


@SHAPES
def test_every_symmetric_form_is_valid_and_solved(shape: Shape) -> None:
    answer = solution(shape)
    question = np.where(np.arange(shape.cells) % 3 == 0, answer, 0).astype(np.uint8)
    cells, digits = draw_symmetries(raw_bits(0), 500, shape)
    questions, answers = (symmetric_forms(grid, cells, digits) for grid in (question, answer))
    assert are_solutions(answers, shape).all() and agree(questions, answers).all()
    assert np.all((questions > 0).sum(axis=1) == (question > 0).sum())
    assert len(np.unique(answers, axis=0)) > 490


def test_every_kind_of_symmetry_is_drawn() -> None:
    cells, digits = draw_symmetries(raw_bits(0), 400, NINE)
    grids = cells.reshape(-1, 9, 9)
    rows, columns = grids[:, :, 0] // 9, grids[:, 0, :] % 9
    transposed = grids[:, 0, 0] // 9 != grids[:, 0, 1] // 9
    assert 150 < transposed.sum() < 250
    for lines in (rows[~transposed], columns[~transposed]):
        assert set(lines[:, 0].tolist()) == set(range(9))
        assert np.all(lines.reshape(-1, 3, 3) // 3 == (lines.reshape(-1, 3, 3) // 3)[:, :, :1])
    assert np.all(digits[:, 0] == 0) and np.all(np.sort(digits[:, 1:]) == np.arange(1, 10))
    # Boxes that aren't square can't be transposed.
    cells, _ = draw_symmetries(raw_bits(0), 400, SIX)
    assert np.all(cells.reshape(-1, 6, 6)[:, 0, 0] // 6 == cells.reshape(-1, 6, 6)[:, 0, 1] // 6)


def test_an_answer_that_changes_a_clue_does_not_agree() -> None:
    answer = solution(NINE)[None]
    question = answer.copy()
    question[0, 5] = 0
    assert agree(question, answer)[0]
    question[0, 5] = answer[0, 5] % 9 + 1
    assert not agree(question, answer)[0]


def test_tokens() -> None:
    assert to_tokens(np.array([0, 9], np.uint8)).tolist() == [1, 10]
    assert (NINE.vocab_size, SIX.vocab_size) == (11, 8)
