"""Sudoku: its rules, its symmetries, and tokens. Knows no files.

A grid is uint8 [R * R] of digits 0 (blank) to R, R 9 or 6; a token is the digit + 1, 0 is padding.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dataset.puzzles.draws import permutations

Grids = npt.NDArray[np.uint8]


class Shape(NamedTuple):
    """Height and width of a box; the grid's side is their product."""

    box_height: int
    box_width: int

    @property
    def side(self) -> int:
        return self.box_height * self.box_width

    @property
    def cells(self) -> int:
        return self.side**2

    @property
    def vocab_size(self) -> int:
        """Padding, blank and digits."""
        return self.side + 2

    def units(self) -> npt.NDArray[np.int64]:
        """The cells of each row, column and box: [3 * side, side]."""
        cells = np.arange(self.cells).reshape(self.side, self.side)
        boxes = cells.reshape(self.box_width, self.box_height, self.box_height, self.box_width).swapaxes(1, 2)
        return np.concatenate([cells, cells.T, boxes.reshape(self.side, self.side)])


NINE = Shape(3, 3)
SIX = Shape(2, 3)


def are_solutions(grids: Grids, shape: Shape) -> npt.NDArray[np.bool_]:
    """Which grids [N, cells] have every digit once in each row, column and box."""
    in_units = np.sort(grids[:, shape.units()], axis=2)
    result: npt.NDArray[np.bool_] = np.all(in_units == np.arange(1, shape.side + 1), axis=(1, 2))
    return result


def agree(questions: Grids, answers: Grids) -> npt.NDArray[np.bool_]:
    """Which answers [N, cells] keep their question's digits."""
    result: npt.NDArray[np.bool_] = np.all((questions == 0) | (questions == answers), axis=1)
    return result


def draw_symmetries(bits: np.random.Philox, count: int, shape: Shape) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Uniformly drawn symmetries of Sudoku: cells int64 [count, cells], digits uint8 [count, side +
    1].

    `digits[i][grid[cells[i]]]` is the new grid. Symmetries rename digits and permute bands, the
    rows in them, stacks and the columns in them; if boxes are square, half of them also transpose.
    """
    digits = np.zeros((count, shape.side + 1), np.uint8)
    digits[:, 1:] = 1 + permutations(bits, count, shape.side)
    rows = _lines(bits, count, shape.box_width, shape.box_height)
    columns = _lines(bits, count, shape.box_height, shape.box_width)
    cells = rows[:, :, None] * shape.side + columns[:, None, :]
    if shape.box_height == shape.box_width:
        transposed = bits.random_raw(count) % np.uint64(2) == 1
        cells[transposed] = cells[transposed].swapaxes(1, 2)
    return cells.reshape(count, shape.cells), digits


def _lines(bits: np.random.Philox, count: int, blocks: int, size: int) -> npt.NDArray[np.int64]:
    """A random order of the lines, [count, blocks * size], that keeps blocks together."""
    block = permutations(bits, count, blocks)
    line = permutations(bits, count * blocks, size).reshape(count, blocks, size)
    return (block[:, :, None] * size + line).reshape(count, blocks * size)


def symmetric_forms(grids: Grids, cells: npt.NDArray[np.int64], digits: npt.NDArray[np.uint8]) -> Grids:
    """One grid [cells], or one for each symmetry [count, cells], transformed by the results of
    `draw_symmetries`: [count, cells].
    """
    moved = np.take_along_axis(np.broadcast_to(grids, cells.shape), cells, axis=1)
    return np.take_along_axis(digits, moved, axis=1)


def to_tokens(grids: Grids) -> Grids:
    """Digits to tokens."""
    return grids + np.uint8(1)
