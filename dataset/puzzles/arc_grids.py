"""ARC's grids: augmentations, the 900-token canvas, and the inverses of both.

A grid is uint8 [R, C] of colours 0..9, at most 30 x 30. On the canvas 0 is padding, 1 the end
marker, colours are 2..11. Knows no files.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dataset.puzzles.dihedral import FORMS, INVERSE, dihedral
from dataset.puzzles.draws import permutations, raw_bits

MAX_SIDE = 30
COLOURS = 10
END_MARKER = 1
FIRST_COLOUR = 2
SEQ_LEN = MAX_SIDE * MAX_SIDE
VOCAB_SIZE = FIRST_COLOUR + COLOURS
NAME_SEPARATOR = "|||"

# Draws per augmentation, on average, before a puzzle gets fewer of them.
_DRAWS_PER_AUGMENTATION = 5

Grid = npt.NDArray[np.uint8]
# Augmentations as numbers: uint8 [A, 11], the dihedral form and then the new value of each colour.
Codes = npt.NDArray[np.uint8]


class Pair(NamedTuple):
    """An input and its output."""

    input: Grid
    output: Grid


def parse_grid(value: Any) -> Grid:
    """A grid from JSON's lists. Raises ValueError that says what is wrong."""
    is_rows = isinstance(value, list) and value and all(isinstance(row, list) for row in value)
    if not is_rows or {len(row) for row in value} != {len(value[0])}:
        raise ValueError("expected a grid, a list of rows of the same length")
    if not 1 <= len(value) <= MAX_SIDE or not 1 <= len(value[0]) <= MAX_SIDE:
        raise ValueError(f"expected a grid of at most {MAX_SIDE} x {MAX_SIDE}, found {len(value)} x {len(value[0])}")
    if not all(type(cell) is int and 0 <= cell < COLOURS for row in value for cell in row):
        raise ValueError(f"expected colours 0 to {COLOURS - 1} in a grid")
    return np.array(value, np.uint8)


def grid_hash(grid: Grid) -> bytes:
    """A hash of a grid and its shape."""
    return hashlib.sha256(bytes(grid.shape) + grid.tobytes()).digest()


@dataclass(frozen=True)
class Augmentation:
    """A permutation of the colours except 0, followed by a symmetry of the square."""

    form: int
    colours: tuple[int, ...]

    @classmethod
    def of(cls, code: Codes) -> "Augmentation":
        """The augmentation of a row of `Codes`."""
        form, *colours = code.tolist()
        return cls(form, tuple(colours))

    def apply(self, grid: Grid) -> Grid:
        """The augmented grid."""
        return dihedral(np.array(self.colours, np.uint8)[grid], self.form)

    def invert(self, grid: Grid) -> Grid:
        """The inverse of `apply`."""
        return np.argsort(self.colours).astype(np.uint8)[dihedral(grid, INVERSE[self.form])]

    def name(self, puzzle: str) -> str:
        """The augmented puzzle's name."""
        return f"{puzzle}{NAME_SEPARATOR}t{self.form}{NAME_SEPARATOR}{''.join(map(str, self.colours))}"


IDENTITY = Augmentation(0, tuple(range(COLOURS)))


def parse_name(name: str) -> tuple[str, Augmentation]:
    """The puzzle and the augmentation in an identifier's name. Raises ValueError."""
    if NAME_SEPARATOR not in name:
        return name, IDENTITY
    puzzle, form, colours = name.split(NAME_SEPARATOR)
    augmentation = Augmentation(int(form[1:]), tuple(map(int, colours)))
    if augmentation.name(puzzle) != name or sorted(augmentation.colours) != list(range(COLOURS)) or augmentation.form >= FORMS:
        raise ValueError(f"{name!r} is no name of an augmented puzzle")
    return puzzle, augmentation


def canonical_pair(pair: Pair) -> bytes:
    """A key that is equal for two pairs exactly if an augmentation maps one to the other."""
    forms = []
    for form in range(FORMS):
        turned = [dihedral(grid, form) for grid in pair]
        cells = np.concatenate([grid.ravel() for grid in turned])
        colours, firsts = np.unique(cells[cells > 0], return_index=True)
        renamed = np.zeros(COLOURS, np.uint8)
        renamed[colours[np.argsort(firsts)]] = np.arange(1, len(colours) + 1)
        forms.append(bytes(side for grid in turned for side in grid.shape) + renamed[cells].tobytes())
    smallest: bytes = min(forms)
    return smallest


@dataclass(frozen=True, eq=False)
class _FlatPairs:
    """The concatenated cells of pairs, and the source of each cell of the transformed grids."""

    cells: Grid
    sources: list[npt.NDArray[np.int64]]  # by form, [cells]
    shapes: list[list[tuple[int, int]]]  # by form, of each grid: two of each pair
    ends: npt.NDArray[np.int64]  # of each grid

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "_FlatPairs":
        grids = [grid for pair in pairs for grid in pair]
        ends = np.cumsum([grid.size for grid in grids])
        places = [np.arange(end - grid.size, end).reshape(grid.shape) for grid, end in zip(grids, ends.tolist(), strict=True)]
        turned = [[dihedral(place, form) for place in places] for form in range(FORMS)]
        return cls(
            np.concatenate([grid.ravel() for grid in grids]),
            [np.concatenate([place.ravel() for place in form]) for form in turned],
            [[place.shape for place in form] for form in turned],
            ends,
        )

    def augmented(self, form: int, colours: npt.NDArray[np.uint8]) -> Grid:
        """All cells under one form and each row of `colours` [A, 10]: uint8 [A, cells]."""
        return colours[:, self.cells[self.sources[form]]]


def draw_augmentations(pairs: Sequence[Pair], count: int, seed: int, name: str) -> Codes:
    """The identity and at most `count` augmentations that give different sets of pairs.

    Fewer if five draws for each aren't enough, as for a puzzle with one colour.
    """
    flat = _FlatPairs.of(pairs)
    pair_ends = flat.ends[1::2].tolist()
    bits = raw_bits(seed, "augmentations", name)
    seen = {_as_set(flat.cells, flat.shapes[0], pair_ends)}
    found = [np.array([IDENTITY.form, *IDENTITY.colours], np.uint8)]
    left = _DRAWS_PER_AUGMENTATION * count
    while len(found) <= count and left:
        draws = min(left, count)
        left -= draws
        codes = np.zeros((draws, 1 + COLOURS), np.uint8)
        codes[:, 0] = bits.random_raw(draws) % np.uint64(FORMS)
        codes[:, 2:] = 1 + permutations(bits, draws, COLOURS - 1)
        made: list[Any] = [None] * draws
        for form in range(FORMS):
            chosen = np.flatnonzero(codes[:, 0] == form)
            for draw, cells in zip(chosen.tolist(), flat.augmented(form, codes[chosen, 1:]), strict=True):
                made[draw] = _as_set(cells, flat.shapes[form], pair_ends)
        for code, puzzle in zip(codes, made, strict=True):
            if puzzle not in seen and len(found) <= count:
                seen.add(puzzle)
                found.append(code)
    return np.stack(found)


def _as_set(cells: Grid, shapes: list[tuple[int, int]], pair_ends: list[int]) -> bytes:
    """A key that is equal for two puzzles exactly if they have the same pairs, in any order."""
    raw = cells.tobytes()
    begins = [0, *pair_ends[:-1]]
    sides = [bytes((*shapes[2 * i], *shapes[2 * i + 1])) for i in range(len(pair_ends))]
    return b"".join(sorted(side + raw[begin:end] for side, begin, end in zip(sides, begins, pair_ends, strict=True)))


def lay_out(
    pairs: Sequence[Pair], codes: Codes, shift: np.random.Philox | None
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Every pair under every augmentation on its canvas: inputs and labels, uint8 [A, pairs, 900].

    An output has the same position as its input: the top left corner or, with `shift`, a uniformly
    drawn position where both fit. One uniformly drawn pair of each augmented puzzle stays in the
    corner.
    """
    flat = _FlatPairs.of(pairs)
    canvases = np.zeros((2, len(codes), len(pairs), MAX_SIDE, MAX_SIDE), np.uint8)
    draws = np.zeros((len(codes), len(pairs), 2), np.uint64)
    if shift is not None:
        draws = shift.random_raw(draws.size).reshape(draws.shape)
        unmoved = (shift.random_raw(len(codes)) % np.uint64(len(pairs))).astype(np.int64)
        draws[np.arange(len(codes)), unmoved] = 0
    for form in range(FORMS):
        chosen = np.flatnonzero(codes[:, 0] == form)
        if not len(chosen):
            continue
        cells = flat.augmented(form, codes[chosen, 1:]) + np.uint8(FIRST_COLOUR)
        for pair in range(len(pairs)):
            shapes = flat.shapes[form][2 * pair : 2 * pair + 2]
            room = MAX_SIDE - np.max(shapes, axis=0) + 1
            corners = (draws[chosen, pair] % room.astype(np.uint64)).astype(np.int64)
            for side, (rows, columns) in enumerate(shapes):
                end = int(flat.ends[2 * pair + side])
                grids = cells[:, end - rows * columns : end].reshape(len(chosen), rows, columns)
                _put(canvases[side], chosen, pair, corners, grids)
    inputs, labels = canvases.reshape(2, len(codes), len(pairs), SEQ_LEN)
    return inputs, labels


def _put(
    canvases: npt.NDArray[np.uint8], chosen: npt.NDArray[np.int64], pair: int, corners: npt.NDArray[np.int64], grids: Grid
) -> None:
    """Write grids [n, R, C] of tokens to `canvases`[chosen, pair] at `corners` [n, 2], with end
    markers below and to the right.
    """
    _, height, width = grids.shape
    rows = corners[:, :1] + np.arange(height)
    columns = corners[:, 1:] + np.arange(width)
    canvases[chosen[:, None, None], pair, rows[:, :, None], columns[:, None, :]] = grids
    below, right = corners[:, 0] + height, corners[:, 1] + width
    fits = np.flatnonzero(below < MAX_SIDE)
    canvases[chosen[fits, None], pair, below[fits, None], columns[fits]] = END_MARKER
    fits = np.flatnonzero(right < MAX_SIDE)
    canvases[chosen[fits, None], pair, rows[fits], right[fits, None]] = END_MARKER


def crop(canvases: npt.NDArray[np.integer[Any]]) -> Iterator[Grid]:
    """The grid on each canvas [B, 900]: the largest rectangle of colours from the top left (ties:
    the lowest), or none.
    """
    tokens = canvases.reshape(-1, MAX_SIDE, MAX_SIDE)
    is_colour = (tokens >= FIRST_COLOUR) & (tokens < VOCAB_SIZE)
    # Number of colours at the left of a row, and width of the rectangle that ends at it.
    run = np.cumprod(is_colour, axis=2).sum(axis=2)
    width = np.minimum.accumulate(run, axis=1)
    height = 1 + np.argmax(width * np.arange(1, MAX_SIDE + 1), axis=1)
    for canvas, rows, widths in zip(tokens, height.tolist(), width, strict=True):
        columns = int(widths[rows - 1])
        yield (canvas[: rows if columns else 0, :columns] - FIRST_COLOUR).astype(np.uint8)
