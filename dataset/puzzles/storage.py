"""The on-disk format of a puzzle data set, as in the original TRM: written atomically, read by
memory map.

    <dir>/<split>/dataset.json               PuzzleMetadata
    <dir>/<split>/<set>__inputs.npy          uint8 [examples, seq_len]; the same for labels
    <dir>/<split>/<set>__puzzle_indices.npy  int32 [puzzles + 1], where a puzzle's examples begin
    <dir>/<split>/<set>__group_indices.npy   int32 [groups + 1], where a group's puzzles begin
    <dir>/<split>/<set>__puzzle_identifiers.npy  int32 [puzzles], rows of the puzzle embedding
    <dir>/identifiers.json                   list: the name of each identifier; for ARC `<id>|||t<form>|||<ten digits>`
    <dir>/test_puzzles.json                  for ARC: the test puzzles as read, with outputs

A group is a puzzle with its augmented forms. This file doesn't know batches or the meaning of
tokens.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from config.errors import UsageError

Split = Literal["train", "test"]

# The name of the only set that the builders here and in the original write.
SET_NAME = "all"
PAD_ID = 0
BLANK_IDENTIFIER_ID = 0
BLANK_IDENTIFIER = "<blank>"
TEST_PUZZLES_FILE = "test_puzzles.json"

_METADATA_FILE = "dataset.json"
_IDENTIFIERS_FILE = "identifiers.json"
_OPEN_MEMMAP: Any = np.lib.format.open_memmap
# Disk space to leave free.
_SPARE_BYTES = 64 << 20


class PuzzleMetadata(BaseModel):
    """dataset.json of one split.

    pad_id, blank_identifier_id: token and puzzle identifier of padding rows; the latter also of
    puzzles without their own. ignore_label_id: label of positions that are not supervised.
    vocab_size: tokens, including padding. seq_len: positions of a row. num_puzzle_identifiers: rows
    of the puzzle embedding. total_groups: puzzles, not counting augmented forms; an epoch is one
    pass over them. mean_puzzle_examples: examples per puzzle. total_puzzles: puzzles with augmented
    forms (ARC) or without (Sudoku, Maze), as each builder of the original counts them. sets: names
    of the sets, files' prefixes.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    pad_id: int = Field(ge=0)
    ignore_label_id: int | None
    blank_identifier_id: int = Field(ge=0)
    vocab_size: int = Field(ge=1)
    seq_len: int = Field(ge=1)
    num_puzzle_identifiers: int = Field(ge=1)
    total_groups: int = Field(ge=0)
    mean_puzzle_examples: float = Field(ge=0)
    total_puzzles: int = Field(ge=0)
    sets: tuple[str, ...] = Field(min_length=1)

    def total_steps(self, epochs: int, global_batch_size: int) -> int:
        """Optimizer steps of a run, estimated for the schedule as in the original."""
        return int(epochs * self.total_groups * self.mean_puzzle_examples / global_batch_size)


@dataclass(frozen=True, eq=False)
class PuzzleSet:
    """One set's arrays: inputs and labels [N, T] memory-mapped, the others in memory.

    puzzle_identifiers int64 [P]; puzzle_indices int64 [P+1] into N; group_indices int64 [G+1] into P.
    """

    inputs: npt.NDArray[Any]
    labels: npt.NDArray[Any]
    puzzle_identifiers: npt.NDArray[np.int64]
    puzzle_indices: npt.NDArray[np.int64]
    group_indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.inputs)

    def puzzles_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which puzzle each row (example) belongs to."""
        return np.searchsorted(self.puzzle_indices, rows, side="right") - 1


def read_identifiers(data_path: str | Path) -> list[str]:
    """The name of each puzzle identifier, by its number. Raises `UsageError`."""
    path = Path(data_path) / _IDENTIFIERS_FILE
    names = read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{path}: expected a JSON list of names; build the data set again")
    return names


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `UsageError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"expected a file {str(path)!r}, found none; check the path") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read as JSON: {error}") from error


def open_sets(data_path: str | Path, split: Split) -> tuple[PuzzleMetadata, dict[str, PuzzleSet]]:
    """The metadata and the sets of one split, by name. Raises `UsageError` if a file is missing or they don't fit together."""
    folder = Path(data_path) / split
    path = folder / _METADATA_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and "total_puzzles" not in values and values.get("sets"):
            # Older data sets don't have this key.
            values["total_puzzles"] = len(_load(folder / f"{values['sets'][0]}__puzzle_indices.npy")) - 1
        metadata = PuzzleMetadata.model_validate(values)
    except FileNotFoundError as error:
        raise UsageError(
            f"expected a puzzle data set with a split '{split}' in {str(data_path)!r}, found no {path}; check data_paths, or "
            "build one: docs/puzzle_data.md"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} doesn't describe a puzzle data set: {error}; build it again") from error
    return metadata, {name: _open_set(folder, name, metadata) for name in metadata.sets}


def _load(path: Path, mmap_mode: Literal["r"] | None = None) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read as an array: {error}; build the data set again") from error
    return array


def _open_set(folder: Path, name: str, metadata: PuzzleMetadata) -> PuzzleSet:
    inputs, labels = (_load(folder / f"{name}__{field}.npy", "r") for field in ("inputs", "labels"))
    identifiers, puzzles, groups = (
        _load(folder / f"{name}__{field}.npy").astype(np.int64)
        for field in ("puzzle_identifiers", "puzzle_indices", "group_indices")
    )
    fits = {
        f"inputs and labels have {metadata.seq_len} positions": inputs.shape == labels.shape == (len(inputs), metadata.seq_len),
        "every puzzle has its examples": _divides(puzzles, len(inputs), len(identifiers)),
        "every group has its puzzles": _divides(groups, len(identifiers), len(groups) - 1),
        "every identifier is known": bool(np.all((identifiers >= 0) & (identifiers < metadata.num_puzzle_identifiers))),
    }
    for rule, holds in fits.items():
        if not holds:
            raise UsageError(f"{folder}, set '{name}': expected that {rule}, which is false; build the data set again")
    return PuzzleSet(inputs, labels, identifiers, puzzles, groups)


def _divides(indices: npt.NDArray[np.int64], total: int, parts: int) -> bool:
    """Whether `indices` divides 0..total into `parts` non-empty parts."""
    return indices.shape == (parts + 1,) and indices[0] == 0 and indices[-1] == total and bool(np.all(np.diff(indices) > 0))


@contextlib.contextmanager
def new_dataset(output_dir: str | Path) -> Iterator[Path]:
    """A temporary folder for a data set. It is renamed to `output_dir` at the end of the block, or
    removed after an error.

    Raises `UsageError` if `output_dir` exists and isn't empty, or can't be written.
    """
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists already and is not overwritten: name another --output-dir, or delete it")
    partial = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        yield partial
        # Replace an empty folder of that name.
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(f"the data set can't be written to {str(target)!r}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class SplitFiles:
    """The two large arrays of a split, to write; several processes may write different rows."""

    folder: Path
    seq_len: int

    def write(self, first: int, inputs: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
        """Write rows [n, seq_len] of both arrays, from row `first` on."""
        for field, rows in (("inputs", inputs), ("labels", labels)):
            assert rows.dtype == np.uint8 and rows.shape[1:] == (self.seq_len,)
            # write(), not a memory map: a full disk is then an error, not a signal, and the pages
            # don't count as this process's.
            path = self.folder / f"{SET_NAME}__{field}.npy"
            with path.open("r+b") as handle:
                handle.seek(_OPEN_MEMMAP(path, "r").offset + first * self.seq_len)
                handle.write(np.ascontiguousarray(rows).data)


def create_split(
    folder: Path,
    *,
    seq_len: int,
    vocab_size: int,
    num_puzzle_identifiers: int,
    puzzles_per_group: Sequence[int] | npt.NDArray[np.int64],
    examples_per_puzzle: Sequence[int] | npt.NDArray[np.int64],
    puzzle_identifiers: Sequence[int] | npt.NDArray[np.int64],
    total_puzzles: int,
) -> SplitFiles:
    """Write a split without its rows, with files of full size; the rows can then be written in any
    order.

    total_puzzles: see `PuzzleMetadata`. Raises `UsageError` if the disk has too little room.
    """
    folder.mkdir()
    puzzle_indices = np.concatenate([[0], np.cumsum(examples_per_puzzle)])
    group_indices = np.concatenate([[0], np.cumsum(puzzles_per_group)])
    examples = int(puzzle_indices[-1])
    needed = 2 * examples * seq_len
    free = shutil.disk_usage(folder).free
    if needed + _SPARE_BYTES > free:
        raise UsageError(
            f"the split '{folder.name}' needs {needed / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free: "
            "free space, or use fewer augmentations"
        )
    indices = {"puzzle_identifiers": puzzle_identifiers, "puzzle_indices": puzzle_indices, "group_indices": group_indices}
    for field, values in indices.items():
        np.save(folder / f"{SET_NAME}__{field}.npy", np.asarray(values, np.int32))
    for field in ("inputs", "labels"):
        _OPEN_MEMMAP(folder / f"{SET_NAME}__{field}.npy", "w+", np.uint8, (examples, seq_len))
    metadata = PuzzleMetadata(
        pad_id=PAD_ID,
        ignore_label_id=PAD_ID,
        blank_identifier_id=BLANK_IDENTIFIER_ID,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=num_puzzle_identifiers,
        total_groups=len(group_indices) - 1,
        mean_puzzle_examples=examples / (len(puzzle_indices) - 1),
        total_puzzles=total_puzzles,
        sets=(SET_NAME,),
    )
    (folder / _METADATA_FILE).write_text(metadata.model_dump_json(), encoding="utf-8")
    return SplitFiles(folder, seq_len)


def create_plain_split(folder: Path, *, groups: int, forms: int, seq_len: int, vocab_size: int) -> SplitFiles:
    """`create_split` for puzzles of one example without identifier: groups of `forms` puzzles."""
    puzzles = groups * forms
    return create_split(
        folder,
        seq_len=seq_len,
        vocab_size=vocab_size,
        num_puzzle_identifiers=1,
        puzzles_per_group=np.full(groups, forms),
        examples_per_puzzle=np.ones(puzzles, np.int64),
        puzzle_identifiers=np.zeros(puzzles, np.int64),
        total_puzzles=groups,
    )


def write_identifiers(folder: Path, names: Sequence[str]) -> None:
    """Write identifiers.json: the name of each puzzle identifier, by its number."""
    (folder / _IDENTIFIERS_FILE).write_text(json.dumps(list(names)), encoding="utf-8")
