"""Command: builds a Sudoku data set from CSV files, with the arguments and the output of the
original's builder.

    python dataset/build_sudoku_dataset.py --output-dir data/sudoku-extreme-1k-aug-1000 --subsample-size 1000 --num-aug 1000

Reads train.csv and test.csv from --source-dir, and downloads them from the hub if they are missing.
This file knows the files; `dataset/puzzles/sudoku.py` knows the puzzle.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from config.errors import UsageError, one_clear_message
from dataset.puzzles import csv_source
from dataset.puzzles.csv_source import CsvPuzzles, read_csv, read_splits
from dataset.puzzles.draws import raw_bits
from dataset.puzzles.storage import BLANK_IDENTIFIER, SplitFiles, create_plain_split, new_dataset, write_identifiers
from dataset.puzzles.sudoku import NINE, agree, are_solutions, draw_symmetries, symmetric_forms, to_tokens

SOURCE_REPO = "sapientinc/sudoku-extreme"
_PUZZLES_AT_ONCE = 4096


def read_puzzles(path: Path, min_difficulty: int | None) -> CsvPuzzles:
    """The rows of a file as digits 0..9 [N, 81]. Raises `UsageError` unless all are solved."""
    rows = read_csv(path, min_difficulty)
    questions = np.where(rows.questions == ord("."), ord("0"), rows.questions) - ord("0")
    digits = CsvPuzzles(path, questions.astype(np.uint8), rows.answers - np.uint8(ord("0")), rows.lines)
    digits.require(np.full(len(rows.lines), rows.questions.shape[1] == NINE.cells), f"a grid of {NINE.cells} characters")
    digits.require(np.all(digits.questions <= NINE.side, axis=1), "a question of digits, 0 or . for a blank")
    digits.require(are_solutions(digits.answers, NINE), "an answer with every digit once in each row, column and box")
    digits.require(agree(digits.questions, digits.answers), "an answer that keeps the question's digits")
    return digits


def _write(files: SplitFiles, puzzles: CsvPuzzles, num_aug: int, seed: int) -> None:
    """Write each puzzle and its augmented forms, by the seed and the puzzle's line only."""
    at_once = max(1, _PUZZLES_AT_ONCE // (1 + num_aug))
    for first in tqdm(range(0, len(puzzles.lines), at_once), desc=files.folder.name, disable=None):
        end = min(first + at_once, len(puzzles.lines))
        both = np.stack([puzzles.questions[first:end], puzzles.answers[first:end]])
        forms = np.empty((2, end - first, 1 + num_aug, NINE.cells), np.uint8)
        forms[:, :, 0] = both
        if num_aug:
            for index, line in enumerate(puzzles.lines[first:end].tolist()):
                cells, digits = draw_symmetries(raw_bits(seed, "symmetries", line), num_aug, NINE)
                for side in range(2):
                    forms[side, index, 1:] = symmetric_forms(both[side, index], cells, digits)
        inputs, labels = to_tokens(forms.reshape(2, -1, NINE.cells))
        files.write(first * (1 + num_aug), inputs, labels)


def build(
    output_dir: str | Path,
    source_dir: str | Path,
    *,
    subsample_size: int | None = None,
    num_aug: int = 0,
    min_difficulty: int | None = None,
    source_repo: str = SOURCE_REPO,
    seed: int = 0,
) -> dict[str, int]:
    """Write the data set; returns the number of puzzles of each split. Raises `UsageError`.

    subsample_size: number of training puzzles, drawn by seed; None: all. num_aug: augmented forms
    of each training puzzle; test puzzles have none. min_difficulty: least rating, for both splits
    as in the original.
    """
    if num_aug < 0:
        raise UsageError(f"expected --num-aug of at least 0, found {num_aug}")
    read = partial(read_puzzles, min_difficulty=min_difficulty)
    puzzles = read_splits(source_dir, source_repo, read, subsample_size, seed)
    with new_dataset(output_dir) as folder:
        for split, of_split in puzzles.items():
            forms = num_aug if split == "train" else 0
            files = create_plain_split(
                folder / split, groups=len(of_split.lines), forms=1 + forms, seq_len=NINE.cells, vocab_size=NINE.vocab_size
            )
            _write(files, of_split, forms, seed)
        write_identifiers(folder, [BLANK_IDENTIFIER])
    return {split: len(of_split.lines) for split, of_split in puzzles.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 and one message if the input can't be used."""
    parser = csv_source.arguments(
        "Build a Sudoku data set.",
        output_dir="data/sudoku-extreme-full",
        source_dir="data/sudoku-extreme",
        source_repo=SOURCE_REPO,
    )
    parser.add_argument("--num-aug", type=int, default=0, help="augmented forms of each training puzzle")
    parser.add_argument("--min-difficulty", type=int, help="least rating of a puzzle")
    options = parser.parse_args(arguments)
    with one_clear_message():
        counts = build(**vars(options))
        print(
            f"wrote {options.output_dir}: {counts['train']:,} training puzzles, each in {1 + options.num_aug:,} forms, and "
            f"{counts['test']:,} test puzzles"
        )


if __name__ == "__main__":
    main()
