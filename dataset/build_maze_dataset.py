"""Command: builds a maze data set from CSV files, with the arguments and the output of the
original's builder.

    python dataset/build_maze_dataset.py --output-dir data/maze-30x30-hard-1k

Reads train.csv and test.csv from --source-dir, and downloads them from the hub if they are missing.
This file knows the files; `dataset/puzzles/maze.py` knows the puzzle.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt

from config.errors import UsageError, one_clear_message
from dataset.puzzles import csv_source
from dataset.puzzles.csv_source import CsvPuzzles, read_csv, read_splits
from dataset.puzzles.dihedral import FORMS, dihedral
from dataset.puzzles.maze import BLANK, GOAL, PATH, START, VOCAB_SIZE, are_shortest, shortest_paths, to_tokens
from dataset.puzzles.storage import BLANK_IDENTIFIER, create_plain_split, new_dataset, write_identifiers

SOURCE_REPO = "sapientinc/maze-30x30-hard-1k"


def read_puzzles(path: Path) -> CsvPuzzles:
    """The rows of a file as tokens [N, L]. Raises `UsageError` unless all are solved mazes."""
    rows = read_csv(path)
    questions, answers = to_tokens(rows.questions), to_tokens(rows.answers)
    length = rows.questions.shape[1]
    rows.require(np.full(len(rows.lines), math.isqrt(length) ** 2 == length), f"a square maze, not one of {length} cells")
    rows.require(np.all((questions > 0) & (questions != PATH), axis=1), "a question of '#', ' ', 'S' and 'G'")
    for token, name in ((START, "S"), (GOAL, "G")):
        rows.require((questions == token).sum(axis=1) == 1, f"a question with one {name}")
    marked = (answers == PATH) & (questions == BLANK)
    rows.require(np.all(marked | (answers == questions), axis=1), "an answer that is the question with some blanks marked 'o'")
    return CsvPuzzles(path, questions, answers, rows.lines)


def build(
    output_dir: str | Path,
    source_dir: str | Path,
    *,
    subsample_size: int | None = None,
    aug: bool = False,
    source_repo: str = SOURCE_REPO,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Write the data set. Returns for each split the number of mazes, of answers that are a
    shortest path, and of unique ones.

    subsample_size: number of training mazes, drawn by seed; None: all. aug: include all eight
    dihedral forms of training mazes. Raises `UsageError`.
    """
    puzzles = read_splits(source_dir, source_repo, read_puzzles, subsample_size, seed)
    if puzzles["train"].questions.shape[1] != puzzles["test"].questions.shape[1]:
        raise UsageError(f"{puzzles['train'].path} and {puzzles['test'].path} have mazes of different sizes: build them separately")
    counts = {}
    with new_dataset(output_dir) as folder:
        for split, of_split in puzzles.items():
            mazes, cells = of_split.questions.shape
            forms = FORMS if aug and split == "train" else 1
            files = create_plain_split(folder / split, groups=mazes, forms=forms, seq_len=cells, vocab_size=VOCAB_SIZE)
            questions, answers = (_squares(tokens) for tokens in (of_split.questions, of_split.answers))
            files.write(0, _in_forms(questions, forms), _in_forms(answers, forms))
            _, ways = shortest_paths(questions)
            counts[split] = {
                "mazes": mazes,
                "shortest": int(are_shortest(questions, answers).sum()),
                "only_one": int((ways == 1).sum()),
            }
        write_identifiers(folder, [BLANK_IDENTIFIER])
    return counts


def _squares(tokens: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    side = math.isqrt(tokens.shape[1])
    return tokens.reshape(-1, side, side)


def _in_forms(mazes: npt.NDArray[np.uint8], forms: int) -> npt.NDArray[np.uint8]:
    """Each maze in its first `forms` dihedral forms, consecutively: [N * forms, cells]."""
    return np.stack([dihedral(mazes, form) for form in range(forms)], axis=1).reshape(len(mazes) * forms, -1)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 and one message if the input can't be used."""
    parser = csv_source.arguments(
        "Build a maze data set.",
        output_dir="data/maze-30x30-hard-1k",
        source_dir="data/maze-30x30-hard",
        source_repo=SOURCE_REPO,
    )
    parser.add_argument("--aug", action=argparse.BooleanOptionalAction, default=False, help="add the eight dihedral forms")
    options = parser.parse_args(arguments)
    with one_clear_message():
        counts = build(**vars(options))
        print(f"wrote {options.output_dir}:")
        for split, of_split in counts.items():
            print(
                f"  {split}: {of_split['mazes']:,} mazes, {of_split['shortest']:,} answers are a shortest path, the only one in "
                f"{of_split['only_one']:,}"
            )


if __name__ == "__main__":
    main()
