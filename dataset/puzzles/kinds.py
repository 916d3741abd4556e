"""The kinds of puzzles: each reads a user's puzzles from a file, prints them as text, and checks
answers by its rules.

A data set's kind follows from the number of tokens and the length of a row. Knows no models.
"""

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.puzzles import arc_grids, maze, sudoku
from dataset.puzzles.dihedral import FORMS, dihedral
from dataset.puzzles.storage import PuzzleMetadata

# Rows of tokens [N, cells], or one of them [cells].
Tokens = npt.NDArray[np.integer[Any]]
_NO_CELL = "?"


class Kind(ABC):
    """A kind of puzzle on a square of `side` x `side` cells."""

    name: str
    side: int
    has_rules = True

    @abstractmethod
    def parse(self, text: str) -> Tokens:
        """Parse the questions [N, cells] in a text. Raises ValueError that says what is wrong."""

    @abstractmethod
    def text(self, tokens: Tokens) -> str:
        """A row of tokens [cells] as lines of text, with `?` for an unknown token."""

    def solves(self, questions: Tokens, answers: Tokens) -> npt.NDArray[np.bool_]:
        """Which answers [N, cells] solve their questions by the puzzle's rules, for a kind that `has_rules`."""
        raise NotImplementedError

    def symmetries(self, bits: np.random.Philox, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`count` symmetries of the puzzle, the first of which is the identity, for a kind that
        `has_rules`.

        Returns cells [count, cells] and tokens [count, vocabulary]: `tokens[i][puzzle[cells[i]]]`
        is the transformed puzzle. Its solution is the solution, transformed likewise.
        """
        raise NotImplementedError


class Sudoku(Kind):
    """Digits, `.` for a blank."""

    name = "Sudoku"

    def __init__(self, shape: sudoku.Shape) -> None:
        self.shape, self.side = shape, shape.side

    def parse(self, text: str) -> Tokens:
        cells = "".join(text.split()).replace(".", "0")
        if not cells or len(cells) % self.shape.cells:
            raise ValueError(f"expected {self.shape.cells} characters for a Sudoku, or {self.side} lines, found {len(cells)}")
        digits = "".join(map(str, range(self.side + 1)))
        foreign = sorted(set(cells) - set(digits))
        if foreign:
            raise ValueError(f"expected the digits 1 to {self.side}, and 0 or . for a blank, found {foreign[0]!r}")
        questions = np.array([digits.index(cell) for cell in cells], np.uint8).reshape(-1, self.shape.cells)
        for unit, of_unit in enumerate(np.moveaxis(questions[:, self.shape.units()], 1, 0)):
            for digit in range(1, self.side + 1):
                if ((of_unit == digit).sum(axis=1) > 1).any():
                    where = ("row", "column", "box")[unit // self.side]
                    raise ValueError(f"{where} {unit % self.side + 1} has the digit {digit} twice: no solution keeps it")
        return sudoku.to_tokens(questions)

    def text(self, tokens: Tokens) -> str:
        signs = f"{_NO_CELL}." + "".join(map(str, range(1, self.side + 1)))
        return _lines(" ".join(signs[token] for token in row) for row in tokens.reshape(self.side, -1).tolist())

    def solves(self, questions: Tokens, answers: Tokens) -> npt.NDArray[np.bool_]:
        # A padding token isn't a digit.
        digits = [(tokens.astype(np.int64) - 1).astype(np.uint8) for tokens in (questions, answers)]
        return sudoku.are_solutions(digits[1], self.shape) & sudoku.agree(*digits)

    def symmetries(self, bits: np.random.Philox, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        cells, digits = sudoku.draw_symmetries(bits, count, self.shape)
        cells[0], digits[0] = np.arange(self.shape.cells), np.arange(self.side + 1)
        tokens = np.zeros((count, self.shape.vocab_size), np.int64)
        tokens[:, 1:] = sudoku.to_tokens(digits)
        return cells, tokens


class Maze(Kind):
    """`#` wall, space, `S` start, `G` goal. A solution marks one of the shortest paths with `o`."""

    name = "maze"

    def __init__(self, side: int) -> None:
        self.side = side

    def parse(self, text: str) -> Tokens:
        lines = text.splitlines()
        if len(lines) == 1 and len(lines[0]) == self.side**2:
            lines = [lines[0][start : start + self.side] for start in range(0, self.side**2, self.side)]
        lines = [line.rstrip(" ").ljust(self.side) for line in lines]  # an editor may have removed trailing spaces
        while len(lines) > self.side and not lines[-1].strip():
            lines.pop()
        if len(lines) != self.side or any(len(line) != self.side for line in lines):
            longest = max(map(len, lines), default=0)
            raise ValueError(
                f"expected {self.side} lines of {self.side} characters for a maze, found {len(lines)} lines of up to {longest}"
            )
        foreign = sorted(set("".join(lines)) - set(maze.CHARACTERS[: maze.GOAL]))
        if foreign:
            raise ValueError(f"expected # for a wall, a blank, S for the start and G for the goal, found {foreign[0]!r}")
        question = maze.to_tokens(np.frombuffer("".join(lines).encode(), np.uint8)).reshape(1, self.side, self.side)
        for sign, token in (("S", maze.START), ("G", maze.GOAL)):
            if (question == token).sum() != 1:
                raise ValueError(f"expected one {sign} in a maze, found {(question == token).sum()}")
        if maze.shortest_paths(question)[0] < 0:
            raise ValueError("no path leads from S to G")
        return question.reshape(1, -1)

    def text(self, tokens: Tokens) -> str:
        signs = f"{_NO_CELL}{maze.CHARACTERS}"
        return _lines("".join(signs[token] for token in row) for row in tokens.reshape(self.side, -1).tolist())

    def solves(self, questions: Tokens, answers: Tokens) -> npt.NDArray[np.bool_]:
        marked = (questions == maze.BLANK) & (answers == maze.PATH)
        solved: npt.NDArray[np.bool_] = np.all(marked | (answers == questions), axis=1)
        squares = (tokens[solved].reshape(-1, self.side, self.side).astype(np.uint8) for tokens in (questions, answers))
        solved[solved] = maze.are_shortest(*squares)
        return solved

    def symmetries(self, bits: np.random.Philox, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        cells = np.arange(self.side**2).reshape(self.side, self.side)
        turned = np.stack([dihedral(cells, sample % FORMS).ravel() for sample in range(count)])
        return turned, np.tile(np.arange(maze.VOCAB_SIZE), (count, 1))


class Arc(Kind):
    """Colours 0 to 9 on a canvas. Without rules: the demonstrations define a solution."""

    name = "ARC"
    side = arc_grids.MAX_SIDE
    has_rules = False

    def parse(self, text: str) -> Tokens:
        raise ValueError("an ARC task is JSON, a file whose name ends in .json")

    def text(self, tokens: Tokens) -> str:
        [grid] = arc_grids.crop(tokens[None])
        return self.grid_text(grid)

    @staticmethod
    def grid_text(grid: arc_grids.Grid) -> str:
        """A grid as lines of colours; `?` for an empty one."""
        return _lines(" ".join(map(str, row)) for row in grid.tolist()) or _NO_CELL


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)


def read_questions(path: Path, kind: Kind) -> Tokens:
    """The questions [N, cells] in a file: text, or CSV with a column `question`. Raises `UsageError`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            if path.suffix.lower() != ".csv":
                texts = [(str(path), handle.read())]
            else:
                reader = csv.DictReader(handle)
                if "question" not in (reader.fieldnames or ()):
                    raise UsageError(
                        f"{path}: expected a column named question, found {', '.join(reader.fieldnames or ()) or 'none'}"
                    )
                texts = [(f"{path}, line {reader.line_num}", row["question"] or "") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} can't be read: {error}; name a file with a puzzle") from error
    questions = []
    for where, text in texts:
        try:
            questions.append(kind.parse(text))
        except ValueError as error:
            raise UsageError(f"{where}: {error}; the model is for a {kind.side} x {kind.side} {kind.name}") from None
    if not questions:
        raise UsageError(f"{path} has no puzzle")
    return np.concatenate(questions)


def kind_of(metadata: PuzzleMetadata) -> Kind:
    """The kind of puzzle with this description. Raises `UsageError` for an unknown kind."""
    side = math.isqrt(metadata.seq_len)
    if (metadata.seq_len, metadata.vocab_size) == (arc_grids.SEQ_LEN, arc_grids.VOCAB_SIZE):
        return Arc()
    if metadata.vocab_size == maze.VOCAB_SIZE and side**2 == metadata.seq_len:
        return Maze(side)
    for shape in (sudoku.NINE, sudoku.SIX):
        if (metadata.seq_len, metadata.vocab_size) == (shape.cells, shape.vocab_size):
            return Sudoku(shape)
    raise UsageError(
        f"expected ARC, a maze or Sudoku, found rows of {metadata.seq_len} positions with {metadata.vocab_size} tokens"
    )
