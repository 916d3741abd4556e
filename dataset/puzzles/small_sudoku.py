"""Generates 6x6 Sudoku: all solution grids, their symmetry classes, and questions that deduction
alone can solve.

Knows no files.
"""

import functools

import numpy as np
import numpy.typing as npt

from dataset.puzzles.draws import permutations, raw_bits
from dataset.puzzles.sudoku import SIX, Grids, draw_symmetries, symmetric_forms

# Least fraction of solution grids held out.
HELD_OUT = 0.1

_UNITS = SIX.units()
_UNITS_OF_CELL = np.array([np.flatnonzero(np.isin(_UNITS, cell).any(axis=1)) for cell in range(SIX.cells)])
_ALL_DIGITS = (1 << SIX.side) - 1


@functools.cache
def solution_grids() -> Grids:
    """All solution grids with first row 1 to 6, [39168, 36]; others have renamed digits."""
    side = SIX.side
    earlier_peers = [
        [c for c in range(cell) if np.intersect1d(_UNITS_OF_CELL[c], _UNITS_OF_CELL[cell]).size] for cell in range(SIX.cells)
    ]
    grid = [*range(1, side + 1), *[0] * (SIX.cells - side)]
    found: list[bytes] = []

    def fill(cell: int) -> None:
        if cell == SIX.cells:
            found.append(bytes(grid))
            return
        taken = {grid[peer] for peer in earlier_peers[cell]}
        for digit in range(1, side + 1):
            if digit not in taken:
                grid[cell] = digit
                fill(cell + 1)

    fill(side)
    return np.frombuffer(b"".join(found), np.uint8).reshape(-1, SIX.cells)


@functools.cache
def symmetry_classes() -> npt.NDArray[np.int64]:
    """The first grid of each grid's symmetry class, int64 [39168]."""
    grids = solution_grids()
    codes = _codes(grids)
    order = np.argsort(codes)
    neighbours = [order[np.searchsorted(codes[order], _codes(_first_row_in_order(grids[:, cells])))] for cells in _generators()]
    classes = np.arange(len(grids))
    while True:
        smallest = functools.reduce(np.minimum, (classes[neighbour] for neighbour in neighbours), classes)
        if np.array_equal(smallest, classes):
            return classes
        classes = smallest


def _generators() -> list[npt.NDArray[np.int64]]:
    """Swaps of adjacent rows, bands, columns and stacks, each its own inverse: cells [36]."""
    grid = np.arange(SIX.cells).reshape(SIX.side, SIX.side)
    moved = []
    for block, lines in ((SIX.box_height, grid), (SIX.box_width, grid.T)):
        swaps = [[line, line + 1] for line in range(SIX.side - 1) if (line + 1) % block]
        orders = [np.array([{a: b, b: a}.get(line, line) for line in range(SIX.side)]) for a, b in swaps]
        for first in range(0, SIX.side - block, block):
            order = np.arange(SIX.side)
            order[first : first + 2 * block] = np.roll(order[first : first + 2 * block], block)
            orders.append(order)
        moved += [lines[order] if lines is grid else lines[order].T for order in orders]
    return [cells.ravel() for cells in moved]


def _first_row_in_order(grids: Grids) -> Grids:
    """The grids with digits renamed so that the first row is 1 to 6."""
    renamed = np.zeros((len(grids), SIX.side + 1), np.uint8)
    np.put_along_axis(renamed, grids[:, : SIX.side], np.arange(1, SIX.side + 1, dtype=np.uint8)[None], axis=1)
    return np.take_along_axis(renamed, grids, axis=1)


def _codes(grids: Grids) -> npt.NDArray[np.int64]:
    """A unique number for each grid of `solution_grids`. The other cells determine first row, last
    row and last column.
    """
    free = grids.reshape(-1, SIX.side, SIX.side)[:, 1:-1, :-1].reshape(len(grids), -1).astype(np.int64)
    return free @ (SIX.side + 1) ** np.arange(free.shape[1])


def held_out_grids(seed: int) -> npt.NDArray[np.bool_]:
    """Which of `solution_grids` are for testing: whole classes, in random order by seed, until a
    tenth of the grids is held out.
    """
    classes = symmetry_classes()
    names, sizes = np.unique(classes, return_counts=True)
    [order] = permutations(raw_bits(seed, "classes"), 1, len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    return np.isin(classes, names[order[before < HELD_OUT * len(classes)]])


def draw_puzzles(split: str, count: int, clues: int, seed: int) -> tuple[Grids, Grids]:
    """Questions and answers [count, 36] of one split. Answers are drawn uniformly from the grids
    that are (test) or aren't held out.

    clues: least number of digits in a question. A clue is removed only if deduction still solves
    the question, so the answer is unique.
    """
    bits = raw_bits(seed, "puzzles", split)
    own = np.flatnonzero(held_out_grids(seed) == (split == "test"))
    bases = solution_grids()[own[(bits.random_raw(count) % np.uint64(len(own))).astype(np.int64)]]
    answers = symmetric_forms(bases, *draw_symmetries(bits, count, SIX))
    questions = answers.copy()
    everyone = np.arange(count)
    for cells in permutations(bits, count, SIX.cells).T[: SIX.cells - clues]:
        fewer = questions.copy()
        fewer[everyone, cells] = 0
        follows = deduced(fewer)
        questions[follows] = fewer[follows]
    return questions, answers


def deduced(questions: Grids) -> npt.NDArray[np.bool_]:
    """Which questions [N, 36] two rules can solve: a cell with one digit left, and a digit with one
    cell left in a unit.
    """
    left = np.where(questions > 0, 1 << (questions.astype(np.int64) - 1).clip(0), _ALL_DIGITS).astype(np.uint8)
    answered = np.zeros(len(questions), bool)
    working = np.arange(len(questions))
    while len(working):
        before = left
        is_single = (left & (left - 1)) == 0
        taken = np.bitwise_or.reduce(np.where(is_single, left, np.uint8(0))[:, _UNITS], axis=2)
        left = np.where(is_single, left, left & ~_of_cells(taken))
        once: npt.NDArray[np.uint8] = np.zeros(taken.shape, np.uint8)
        twice: npt.NDArray[np.uint8] = np.zeros(taken.shape, np.uint8)
        for cell in left[:, _UNITS].transpose(2, 0, 1):
            twice |= once & cell
            once |= cell
        only_here = left & _of_cells(once & ~twice)
        left = np.where(only_here > 0, only_here, left)
        is_done = np.all((left & (left - 1)) == 0, axis=1)
        answered[working[is_done]] = True
        goes_on = ~is_done & np.any(left != before, axis=1)
        working, left = working[goes_on], left[goes_on]
    return answered


def _of_cells(masks: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Combine the digits of units [N, 18] over each cell's three units: [N, 36]."""
    result: npt.NDArray[np.uint8] = np.bitwise_or.reduce(masks[:, _UNITS_OF_CELL], axis=2)
    return result
