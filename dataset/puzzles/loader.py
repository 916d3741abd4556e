"""Batches of puzzles: in training the original's order and choice of augmented forms, in testing
every row once.

Random numbers are keyed by (seed, number of the iteration and data path), so a position is three
integers. All ranks draw the same batch and take their part of it. This file doesn't know models,
slots, or the meaning of tokens.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.puzzles.storage import BLANK_IDENTIFIER, PuzzleMetadata, PuzzleSet, Split, open_sets, read_identifiers

IGNORE_LABEL_ID = -100
# Rows of each set in `data_hash`; hashing all of them would read gigabytes at every start.
_HASHED_ROWS = 1024


@dataclass(frozen=True, eq=False)
class PuzzleBatch:
    """This rank's B rows of a batch.

    inputs int32 [B, T]; labels int64 [B, T], -100 where not supervised; puzzle_identifiers int32
    [B]; rows int64 [B], their indices in the set. Padding rows: the padding token, -100, the blank
    identifier, -1. set_name: the set and its data path.
    """

    set_name: str
    inputs: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int64]
    puzzle_identifiers: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]


class PuzzleData:
    """One split of one or more data paths, in order.

    metadata: of all paths; `num_puzzle_identifiers`, `total_groups` and `total_puzzles` are sums,
    `mean_puzzle_examples` is the mean weighted by puzzles, as in the original. sets: by name; from
    the second path on, the name ends with the path's number. data_hash: hex SHA-256 of metadata,
    indices, identifiers, and up to 1,024 evenly spaced rows of each set.
    """

    def __init__(self, data_paths: Sequence[str | Path], split: Split) -> None:
        """Raises `UsageError` if a file is missing or the paths don't fit together."""
        if not data_paths:
            raise UsageError("data_paths names no folder: give at least one puzzle data set")
        opened = [open_sets(path, split) for path in data_paths]
        self.metadata = _merged([metadata for metadata, _ in opened], data_paths)
        self.sets: dict[str, PuzzleSet] = {
            f"{name}{number or ''}": sets[name] for name in self.metadata.sets for number, (_, sets) in enumerate(opened)
        }
        if len(data_paths) > 1:
            _check_identifiers(data_paths)
        digest = hashlib.sha256(self.metadata.model_dump_json().encode())
        for puzzles in self.sets.values():
            sample = np.unique(np.linspace(0, len(puzzles) - 1, min(len(puzzles), _HASHED_ROWS)).astype(np.int64))
            for array in (puzzles.puzzle_identifiers, puzzles.puzzle_indices, puzzles.group_indices):
                digest.update(np.ascontiguousarray(array, "<i8").data)
            for array in (puzzles.inputs, puzzles.labels):
                digest.update(array[sample].astype("<i8").data)
        self.data_hash: str = digest.hexdigest()

    def batch(self, set_name: str, rows: npt.NDArray[np.int64], size: int) -> PuzzleBatch:
        """A batch of these rows of a set (at most `size`), padded to `size` rows."""
        puzzles, meta = self.sets[set_name], self.metadata
        inputs = np.full((size, meta.seq_len), meta.pad_id, np.int32)
        labels = np.full((size, meta.seq_len), IGNORE_LABEL_ID, np.int64)
        identifiers = np.full(size, meta.blank_identifier_id, np.int32)
        places = np.full(size, -1, np.int64)
        count = len(rows)
        inputs[:count] = puzzles.inputs[rows]
        labels[:count] = puzzles.labels[rows]
        if meta.ignore_label_id is not None:
            labels[labels == meta.ignore_label_id] = IGNORE_LABEL_ID
        identifiers[:count] = puzzles.puzzle_identifiers[puzzles.puzzles_of(rows)]
        places[:count] = rows
        return PuzzleBatch(set_name, inputs, labels, identifiers, places)


def _merged(parts: Sequence[PuzzleMetadata], data_paths: Sequence[str | Path]) -> PuzzleMetadata:
    first = parts[0]
    for part, path in zip(parts, data_paths, strict=True):
        for field in ("seq_len", "vocab_size", "pad_id", "ignore_label_id", "blank_identifier_id", "sets"):
            if getattr(part, field) != getattr(first, field):
                raise UsageError(
                    f"data_paths: expected the same kind of puzzles in all, found {field} {getattr(first, field)!r} in "
                    f"{str(data_paths[0])!r} and {getattr(part, field)!r} in {str(path)!r}; train on them separately"
                )
    puzzles = sum(part.total_puzzles for part in parts)
    return first.model_copy(
        update={
            "num_puzzle_identifiers": sum(part.num_puzzle_identifiers for part in parts),
            "total_groups": sum(part.total_groups for part in parts),
            "mean_puzzle_examples": sum(part.mean_puzzle_examples * part.total_puzzles for part in parts) / max(1, puzzles),
            "total_puzzles": puzzles,
        }
    )


def _check_identifiers(data_paths: Sequence[str | Path]) -> None:
    """Check that no two puzzles share an identifier: paths don't shift them."""
    names: dict[int, tuple[str, str | Path]] = {}
    for path in data_paths:
        listed = read_identifiers(path)
        for number, name in enumerate(listed):
            if name == BLANK_IDENTIFIER:
                continue
            known, where = names.setdefault(number, (name, path))
            if known != name:
                raise UsageError(
                    f"data_paths: identifier {number} is {known!r} in {str(where)!r} and {name!r} in {str(path)!r}: build the "
                    f"second with --puzzle-identifiers-start {len(read_identifiers(where))}"
                )


def _rank_size(global_batch_size: int, rank: int, ranks: int) -> int:
    if global_batch_size % ranks or not 0 <= rank < ranks:
        raise UsageError(
            f"global_batch_size {global_batch_size} must be a multiple of the {ranks} processes, whose ranks are below that "
            f"(found rank {rank})"
        )
    return global_batch_size // ranks


class TrainBatches:
    """Training batches of one rank. An iteration makes `epochs_per_iteration` passes over the
    groups of each data path in turn.

    In every pass, each group gives one uniformly drawn puzzle, and as many of its examples as fit
    into the batch. A last batch that isn't full is dropped. Order of groups and choice of puzzles
    equal the original's, draw for draw: NumPy's Philox with seed + n, n the number of (iteration,
    data path) pairs begun.
    """

    def __init__(
        self, data: PuzzleData, *, global_batch_size: int, seed: int, epochs_per_iteration: int, rank: int = 0, ranks: int = 1
    ) -> None:
        self._data = data
        self._names = list(data.sets)
        self._size = global_batch_size
        self._local_size = _rank_size(global_batch_size, rank, ranks)
        self._local = slice(rank * self._local_size, (rank + 1) * self._local_size)
        self._seed = seed
        self._epochs = epochs_per_iteration
        self._begun = 0  # (iteration, data path) pairs, of all iterations
        self._path = 0  # of this iteration
        self._group = 0  # groups used of this pair
        self._drawn: tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]] | None = None

    def iteration(self) -> Iterator[PuzzleBatch]:
        """The batches from the current position to the end of the iteration."""
        while self._path < len(self._names):
            if self._drawn is None:
                self._begun += 1
                self._group = 0
                self._draw()
            rows = self._next_rows()
            if rows is None:
                self._drawn = None
                self._path += 1
            else:
                yield self._data.batch(self._names[self._path], rows[self._local], self._local_size)
        self._path = 0

    def state(self) -> dict[str, int | str]:
        """The position after the last returned batch, as JSON values. The same on every rank."""
        return {
            "begun": self._begun,
            "path": self._path,
            "group": self._group,
            "in_path": int(self._drawn is not None),
            **self._identity(),
        }

    def restore(self, state: Mapping[str, int | str]) -> None:
        """Move to the position of `state`, of any number of ranks. Raises `UsageError` for another stream's."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise UsageError(
                    f"the checkpoint's position in the data is for {name} {state.get(name)!r}, this run has {value!r}: resume with "
                    "the same data and settings, or start a new run"
                )
        self._begun, self._path, self._group = (int(state[name]) for name in ("begun", "path", "group"))
        self._drawn = None
        if state["in_path"]:
            self._draw()

    def _identity(self) -> dict[str, int | str]:
        """Everything that a position in the stream depends on."""
        return {
            "data_hash": self._data.data_hash,
            "seed": self._seed,
            "global_batch_size": self._size,
            "epochs_per_iteration": self._epochs,
        }

    def _draw(self) -> None:
        """Draw the puzzles of the whole pair, in order, and count the examples before each of them."""
        puzzles = self._data.sets[self._names[self._path]]
        groups = len(puzzles.group_indices) - 1
        generator = np.random.Generator(np.random.Philox(seed=self._seed + self._begun))
        order = np.empty(groups * self._epochs, np.int32)
        for epoch in range(self._epochs):
            order[epoch * groups : (epoch + 1) * groups] = generator.permutation(groups)
        # One call gives the same numbers as one call for each group; a test checks that.
        drawn = generator.integers(puzzles.group_indices[order], puzzles.group_indices[order + 1])
        sizes = np.diff(puzzles.puzzle_indices)[drawn]
        self._drawn = drawn.astype(np.int32), np.concatenate([[0], np.cumsum(sizes)])

    def _next_rows(self) -> npt.NDArray[np.int64] | None:
        """The rows of the next full batch; None if there is none left."""
        assert self._drawn is not None
        drawn, before = self._drawn
        begin = self._group
        end = int(np.searchsorted(before, before[begin] + self._size))
        if end == len(before):
            return None
        chosen, first = drawn[begin:end], before[begin:end]
        sizes = np.diff(before[begin : end + 1])
        starts = self._data.sets[self._names[self._path]].puzzle_indices[chosen]
        rows = np.repeat(starts - first, sizes) + np.arange(before[begin], before[end])
        # Shuffle within each puzzle, so that a puzzle that doesn't fit gives random examples.
        key = np.array([self._seed % 2**64, self._begun], np.uint64)
        keys = np.random.Philox(key=key, counter=np.array([0, 0, begin, 0], np.uint64)).random_raw(len(rows))
        self._group = end
        shuffled: npt.NDArray[np.int64] = rows[np.lexsort((keys, np.repeat(np.arange(len(sizes)), sizes)))]
        return shuffled[: self._size]


def evaluation_batches(data: PuzzleData, *, global_batch_size: int, rank: int = 0, ranks: int = 1) -> Iterator[PuzzleBatch]:
    """This rank's part of all rows of all sets, in order; the last batch of a set is padded."""
    local_size = _rank_size(global_batch_size, rank, ranks)
    for name, puzzles in data.sets.items():
        for start in range(0, len(puzzles), global_batch_size):
            end = min(len(puzzles), start + global_batch_size)
            local = start + rank * local_size
            rows = np.arange(min(local, end), min(local + local_size, end))
            yield data.batch(name, rows, local_size)


def evaluation_batch_count(data: PuzzleData, global_batch_size: int) -> int:
    """The number of batches from `evaluation_batches`."""
    return sum(-(-len(puzzles) // global_batch_size) for puzzles in data.sets.values())
