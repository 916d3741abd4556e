"""Command: generates puzzles that two CPU cores can learn, without a download, in the format of the
other builders.

    python -m dataset.build_small_puzzles sudoku --output-dir data/sudoku6
    python -m dataset.build_small_puzzles maze --output-dir data/maze9

Sudoku is 6x6 with a unique solution; solution grids of the test split aren't symmetric to any in
training. Mazes have a unique shortest path. This file knows the files; `dataset/puzzles/small_*.py`
know the puzzles.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from config.errors import UsageError, one_clear_message
from dataset.puzzles import maze, small_maze, small_sudoku
from dataset.puzzles.storage import BLANK_IDENTIFIER, create_plain_split, new_dataset, write_identifiers
from dataset.puzzles.sudoku import SIX, to_tokens

# Smaller mazes have no room for a path; Maze-Hard has larger ones.
_SIDES = (3, 30)


def build_sudoku(output_dir: str | Path, *, train_size: int, test_size: int, clues: int = 12, seed: int = 0) -> None:
    """6x6 Sudoku; a question keeps at least `clues` digits. Raises `UsageError`."""
    _check_sizes(train_size, test_size)
    if not 0 <= clues <= SIX.cells:
        raise UsageError(f"expected --clues from 0 to {SIX.cells}, found {clues}")
    sizes = {"train": train_size, "test": test_size}
    puzzles = {split: small_sudoku.draw_puzzles(split, size, clues, seed) for split, size in sizes.items()}
    tokens = {split: (to_tokens(questions), to_tokens(answers)) for split, (questions, answers) in puzzles.items()}
    _write(output_dir, tokens, SIX.vocab_size)


def build_mazes(
    output_dir: str | Path, *, train_size: int, test_size: int, side: int = 9, min_steps: int = 9, seed: int = 0
) -> None:
    """Mazes of `side` x `side` cells with at least `min_steps` steps from start to goal. Raises `UsageError`."""
    _check_sizes(train_size, test_size)
    if not _SIDES[0] <= side <= _SIDES[1] or min_steps < 1:
        raise UsageError(
            f"expected --side from {_SIDES[0]} to {_SIDES[1]}, --min-steps of at least 1, found {side} and {min_steps}"
        )
    puzzles = small_maze.draw_puzzles({"train": train_size, "test": test_size}, side, min_steps, seed)
    _write(output_dir, puzzles, maze.VOCAB_SIZE)


def _check_sizes(train_size: int, test_size: int) -> None:
    if train_size < 1 or test_size < 1:
        raise UsageError(f"expected --train-size and --test-size of at least 1, found {train_size} and {test_size}")


def _write(
    output_dir: str | Path, puzzles: Mapping[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]], vocab_size: int
) -> None:
    with new_dataset(output_dir) as folder:
        for split, arrays in puzzles.items():
            questions, answers = (tokens.reshape(len(tokens), -1) for tokens in arrays)
            size, cells = questions.shape
            files = create_plain_split(folder / split, groups=size, forms=1, seq_len=cells, vocab_size=vocab_size)
            files.write(0, questions, answers)
        write_identifiers(folder, [BLANK_IDENTIFIER])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 and one message if it fails."""
    parser = argparse.ArgumentParser(description="Make small puzzles.")
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    sudoku_options = kinds.add_parser("sudoku", help="6x6 Sudoku")
    maze_options = kinds.add_parser("maze", help="mazes with a single shortest path")
    for options_of_kind in (sudoku_options, maze_options):
        options_of_kind.add_argument(
            "--output-dir", type=os.path.expanduser, required=True, help="folder of the data set; must not exist"
        )
        options_of_kind.add_argument("--train-size", type=int, default=20_000, help="training puzzles")
        options_of_kind.add_argument("--test-size", type=int, default=1_000, help="test puzzles")
        options_of_kind.add_argument("--seed", type=int, default=0, help="decides the split and every puzzle")
    sudoku_options.set_defaults(build=build_sudoku)
    maze_options.set_defaults(build=build_mazes)
    sudoku_options.add_argument("--clues", type=int, default=12, help="least number of digits in a question")
    maze_options.add_argument("--side", type=int, default=9, help="cells of a side")
    maze_options.add_argument("--min-steps", type=int, default=9, help="least steps from start to goal")
    options = vars(parser.parse_args(arguments))
    with one_clear_message():
        options.pop("build")(**options)
        print(f"wrote {options['output_dir']}: {options['train_size']:,} training and {options['test_size']:,} test puzzles")


if __name__ == "__main__":
    main()
