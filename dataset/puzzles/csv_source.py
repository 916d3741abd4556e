"""Puzzles in CSV files with the columns source, question, answer, rating: found in a folder, else
downloaded from the hub.

This file doesn't know what a question is.
"""

import argparse
import csv
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from config.errors import UsageError
from dataset.puzzles.draws import raw_bits, subsample
from dataset.source_files import Hub

COLUMNS = ["source", "question", "answer", "rating"]


@dataclass(frozen=True, eq=False)
class CsvPuzzles:
    """The rows of a file: questions and answers (ASCII codes, uint8 [N, L]), lines int64 [N]."""

    path: Path
    questions: npt.NDArray[np.uint8]
    answers: npt.NDArray[np.uint8]
    lines: npt.NDArray[np.int64]

    def require(self, holds: npt.NDArray[np.bool_], what: str) -> None:
        """Raise `UsageError` for the first row where `holds` (bool [N]) is false."""
        if not holds.all():
            raise UsageError(
                f"{self.path}, line {self.lines[int(np.argmin(holds))]}: expected {what}; correct the row or remove it"
            )


def arguments(description: str, *, output_dir: str, source_dir: str, source_repo: str) -> argparse.ArgumentParser:
    """The arguments that the builders from CSV files share, with these defaults."""
    parser = argparse.ArgumentParser(description=description)
    user_path = os.path.expanduser
    parser.add_argument("--output-dir", type=user_path, default=output_dir, help="folder of the data set; must not exist")
    parser.add_argument("--source-dir", type=user_path, default=source_dir, help="folder of train.csv and test.csv")
    parser.add_argument("--source-repo", default=source_repo, help="hub data set to download them from if they are missing")
    parser.add_argument("--subsample-size", type=int, help="training puzzles, drawn by seed; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn")
    return parser


def read_splits(
    folder: str | Path, repo: str, read: Callable[[Path], CsvPuzzles], subsample_size: int | None, seed: int
) -> dict[str, CsvPuzzles]:
    """The puzzles that `read` gives for train.csv and test.csv; of training `subsample_size`, drawn by
    seed, or all. Files that are missing in `folder` are downloaded from the hub's `repo`.
    """
    if subsample_size is not None and subsample_size < 1:
        raise UsageError(f"expected --subsample-size of at least 1, found {subsample_size}")
    train, test = (read(locate(folder, split, repo)) for split in ("train", "test"))
    drawn = subsample(raw_bits(seed, "subsample"), len(train.lines), subsample_size)
    return {"train": CsvPuzzles(train.path, train.questions[drawn], train.answers[drawn], train.lines[drawn]), "test": test}


def locate(folder: str | Path, split: str, repo: str) -> Path:
    """`<folder>/<split>.csv`, downloaded from the hub's `repo` if missing. Raises `UsageError`."""
    path = Path(folder) / f"{split}.csv"
    return path if path.is_file() else Hub(repo).fetch(path.name, path)


def read_csv(path: Path, min_rating: int | None = None) -> CsvPuzzles:
    """All rows, or those with at least this rating. Raises `UsageError` for a row that is malformed
    or of another length.
    """
    questions, answers, lines = bytearray(), bytearray(), []
    length = 0
    try:
        with path.open(encoding="ascii", newline="") as handle:
            reader = csv.reader(_with_bar(handle, path))
            header = next(reader, [])
            if header != COLUMNS:
                raise UsageError(f"{path}: expected the columns {', '.join(COLUMNS)}, found {', '.join(header) or 'nothing'}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(COLUMNS):
                    raise UsageError(f"{where}: expected {len(COLUMNS)} columns, found {len(row)}")
                _, question, answer, rating = row
                if min_rating is not None:
                    try:
                        if int(rating) < min_rating:
                            continue
                    except ValueError:
                        raise UsageError(f"{where}: expected a whole number as rating, found {rating!r}") from None
                length = length or len(question)
                if len(question) != length or len(answer) != length:
                    found = f"{len(question)} and {len(answer)}"
                    raise UsageError(f"{where}: expected a question and an answer of {length} characters, found {found}")
                questions += question.encode()
                answers += answer.encode()
                lines.append(reader.line_num)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} can't be read as CSV: {error}") from error
    if not lines:
        raise UsageError(f"{path} has no puzzle" + ("" if min_rating is None else f" with a rating of at least {min_rating}"))
    shape = len(lines), length
    return CsvPuzzles(
        path, np.frombuffer(questions, np.uint8).reshape(shape), np.frombuffer(answers, np.uint8).reshape(shape), np.array(lines)
    )


def _with_bar(handle: IO[str], path: Path) -> Iterator[str]:
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name, disable=None) as bar:
        for line in handle:
            bar.update(len(line))
            yield line
