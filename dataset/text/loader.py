"""Examples of one or more splits, read from the token cache in the order of a curriculum, and
collated into padded batches.

Knows no models.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from config.errors import UsageError
from config.schema import DatasetConfig
from dataset.text.conversation import Conversation, with_default_system
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.forms import form_options, to_conversation
from dataset.text.row_encoder import ANSWER_CUT, PER_ID, PROMPT_CUT
from dataset.text.rows import RowFile, parse_row

if TYPE_CHECKING:
    from datasets import Dataset

IGNORE_LABEL_ID = -100
_READ_AHEAD_PER_WORKER = 16
_LENGTH_BINS = 32
_PERCENTILES = (5, 50, 95, 99)


@dataclass(frozen=True, eq=False)
class Example:
    """One conversation's ids int32 [L], supervised bool [L], segment int32 [L]; see `conversation.Encoded`."""

    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    segment: npt.NDArray[np.int32]
    turn_bytes: int


class Examples(Protocol):
    """Examples by number: a `TextDataset`, a `TextCorpus`, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


Columns = dict[str, pa.ChunkedArray]
"""The columns of a memory-mapped table. One value takes microseconds to read."""


def columns_of(table: "Dataset") -> Columns:
    """The columns of a data set of `datasets`."""
    return dict(zip(table.column_names, table.data.table.columns, strict=True))


@dataclass(frozen=True, eq=False)
class TextDataset:
    """The examples of one split, in the order of their files, as `token_cache.load_split` opens them.

    settings: `row_encoder.recipe`. files: those read, with their sha256. raw: columns of
    `row_encoder.RAW_SCHEMA`, tokens: of `row_encoder.token_schema`; a row has the same number in
    both. rows: int64 [m], the rows of the split. counts_read: for all rows read from the files,
    "read", "dropped" and "bad" by reason, "beyond_subset" (usable rows left out by `subset_size`),
    "forms" (rows by form), and "ignored" (rows by key whose text was left out). left_out: files
    that the source doesn't read, because of their names.
    """

    config: DatasetConfig
    settings: dict[str, Any]
    files: tuple[RowFile, ...]
    sha256: tuple[str, ...]
    raw: Columns
    tokens: Columns
    rows: npt.NDArray[np.int64]
    counts_read: dict[str, Any]
    left_out: Sequence[Path] = ()

    @cached_property
    def data_hash(self) -> str:
        """Hex SHA-256 of the contents of this split's rows, in order."""
        return hashlib.sha256(self.column("content_hash").astype("<u8").tobytes()).hexdigest()

    @cached_property
    def counts(self) -> dict[str, Any]:
        """`counts_read`; rows "kept" and "truncated" in this split, and of these "prompt_cut" and "answer_cut"."""
        cut = self.column("cut")
        masks = {"truncated": PROMPT_CUT | ANSWER_CUT, "prompt_cut": PROMPT_CUT, "answer_cut": ANSWER_CUT}
        return {
            **self.counts_read,
            "kept": len(self),
            **{name: int(np.count_nonzero(cut & mask)) for name, mask in masks.items()},
        }

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = int(self.rows[index])
        ids, supervised, segment = (self.tokens[name][row].values.to_numpy() for name in PER_ID)
        turn_bytes = self.tokens["turn_bytes"][row].as_py()
        return Example(ids.astype(np.int32), supervised.astype(np.bool_), segment.astype(np.int32), turn_bytes)

    def column(self, name: str) -> npt.NDArray[Any]:
        """A numeric column of `row_encoder.token_schema`, [examples]."""
        values: npt.NDArray[Any] = self.tokens[name].to_numpy()[self.rows]
        return values

    def report(self) -> dict[str, Any]:
        """Names of files, counts and lengths, as JSON values."""
        left_out = {"left_out": [path.name for path in self.left_out]} if self.left_out else {}
        files = [file.path.name for file in self.files]
        return {"files": files, **left_out, "counts": self.counts, "lengths": lengths_of([self])}

    def row(self, index: int) -> dict[str, Any]:
        """The source row of an example, with all its fields."""
        return parse_row(self.raw["row"][int(self.rows[index])].as_py())

    def place(self, index: int) -> str:
        """The example's file, and its line or row there, from 1."""
        file, number = (self.raw[name][int(self.rows[index])].as_py() for name in ("file", "number"))
        where: str = self.files[file].where(number)
        return where

    def conversation(self, index: int) -> Conversation:
        """The uncut conversation, with the default system prompt."""
        conversation, _ = to_conversation(self.row(index), form_options(self.config))
        return with_default_system(conversation, self.config.default_system_prompt)


def lengths_of(splits: Sequence[TextDataset]) -> dict[str, Any]:
    """Ids per row, after cutting: numbers of "whole" and "cut" rows for each bin of "edges" (up to
    the next edge), and "percentiles" of all rows.
    """
    lengths = np.concatenate([split.column("length") for split in splits]).astype(np.int64)
    is_cut = np.concatenate([split.column("cut") for split in splits]) > 0
    longest = int(lengths.max(initial=1))
    width = -(-longest // _LENGTH_BINS)
    edges = np.arange(0, longest + width + 1, width)
    percentiles = np.percentile(lengths, _PERCENTILES, method="nearest") if len(lengths) else [0] * len(_PERCENTILES)
    return {
        "edges": edges.tolist(),
        "whole": np.histogram(lengths[~is_cut], edges)[0].tolist(),
        "cut": np.histogram(lengths[is_cut], edges)[0].tolist(),
        "percentiles": {p: int(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)},
    }


class TextCorpus:
    """The concatenated splits of a run's sources. Reads like a `TextDataset`.

    parts: the splits, by source. data_hash: of all splits, in order; that of a single split is its
    own.
    """

    def __init__(self, parts: Mapping[str, TextDataset]) -> None:
        self.parts = dict(parts)
        self._splits = list(self.parts.values())
        self._ends = list(accumulate(map(len, self._splits)))
        hashes = [split.data_hash for split in self._splits]
        self.data_hash: str = hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        split, index = self._at(index)
        return split[index]

    def _at(self, index: int) -> tuple[TextDataset, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._splits[number], index - (self._ends[number - 1] if number else 0)

    def column(self, name: str) -> npt.NDArray[Any]:
        """See `TextDataset.column`."""
        return np.concatenate([split.column(name) for split in self._splits])

    def first_rows(self, count: int | None) -> list[int]:
        """Numbers of the first `count` examples of each source; None: all."""
        begins = [0, *self._ends]
        return [begin + row for begin, split in zip(begins, self._splits, strict=False) for row in range(len(split))[:count]]

    def row(self, index: int) -> dict[str, Any]:
        """See `TextDataset.row`."""
        split, index = self._at(index)
        return split.row(index)

    def conversation(self, index: int) -> Conversation:
        """See `TextDataset.conversation`."""
        split, index = self._at(index)
        return split.conversation(index)


def overlap(train: TextDataset | TextCorpus, test: TextDataset | TextCorpus) -> dict[str, int]:
    """How many test rows have the questions of a training row ("questions"), and how many equal one
    ("conversations").
    """
    hashes = {"questions": "question_hash", "conversations": "conversation_hash"}
    return {name: int(np.isin(test.column(column), train.column(column)).sum()) for name, column in hashes.items()}


class ExampleStream(AbstractContextManager["ExampleStream"]):
    """Iterates (draw, Example) in the order of a curriculum.

    workers: prefetching threads; 0 reads inline. The order is the same.
    start: examples to skip: the `position` of the stream to resume.
    position: examples returned so far, including `start`. Use as a context manager, or `close` it.
    """

    def __init__(self, dataset: Examples, curriculum: Curriculum, workers: int, start: int = 0) -> None:
        self.total = curriculum.total
        if not 0 <= start <= self.total:
            raise UsageError(
                f"a stream of {self.total} examples can't start at {start}; have the data, the epochs or the stages changed?"
            )
        if len(dataset) != sum(curriculum.sizes):
            raise ValueError(f"a curriculum over {sum(curriculum.sizes)} rows doesn't fit {len(dataset)} examples")
        self.position = start
        self._dataset = dataset
        self._order = curriculum.draws(start)
        self._pool = ThreadPoolExecutor(workers, "example-reader") if workers else None
        self._read_ahead = workers * _READ_AHEAD_PER_WORKER
        self._pending: deque[tuple[Draw, Callable[[], Example]]] = deque()

    def __len__(self) -> int:
        """Remaining examples."""
        return self.total - self.position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Draw, Example]:
        try:
            for draw in islice(self._order, 1 + self._read_ahead - len(self._pending)):
                read = partial(self._dataset.__getitem__, draw.example_id)
                self._pending.append((draw, self._pool.submit(read).result if self._pool is not None else read))
            if not self._pending:
                raise StopIteration
            draw, result = self._pending.popleft()
            example = result()
        except BaseException:  # also at the end of the stream
            self.close()
            raise
        self.position += 1
        return draw, example

    def skip(self, count: int) -> None:
        """Skip the next `count` examples without reading them: those that other ranks take.

        All ranks have the same order, so together they read each example once. Threads can't
        prefetch over a skip, so such a stream needs workers=0.
        """
        if not 0 <= count <= len(self):
            raise ValueError(f"can't skip {count} of {len(self)} examples")
        for _ in range(count):
            if self._pending:
                self._pending.popleft()
            else:
                next(self._order)
        self.position += count

    def close(self) -> None:
        """End the stream and its threads."""
        self._order = iter(())
        self._pending.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def __exit__(self, *error: object) -> None:
        self.close()


def collate(
    examples: Sequence[Example],
    pad_id: int,
    length_multiple: int,
    supervise: Literal["assistant", "all"] = "assistant",
) -> dict[str, npt.NDArray[Any]]:
    """Right-padded arrays of B examples, T the longest input rounded up to `length_multiple`.

    inputs int32 [B, T] (`ids[:-1]`, then `pad_id`); labels int64 [B, T] (`ids[1:]`, -100 where not supervised
    and on padding); segment int32 [B, T] of the inputs, 0 on padding; lengths int64 [B], inputs of each row.
    supervise: "assistant" takes the examples' own mask, "all" supervises every label.
    """
    lengths = np.array([max(0, len(example.ids) - 1) for example in examples], np.int64)
    width = -(-int(lengths.max(initial=1)) // length_multiple) * length_multiple
    inputs = np.full((len(examples), width), pad_id, np.int32)
    labels = np.full((len(examples), width), IGNORE_LABEL_ID, np.int64)
    segment = np.zeros((len(examples), width), np.int32)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        inputs[row, :length] = example.ids[:-1]
        segment[row, :length] = example.segment[:-1]
        is_target = example.supervised[1:] | (supervise == "all")
        labels[row, :length] = np.where(is_target, example.ids[1:], IGNORE_LABEL_ID)
    return {"inputs": inputs, "labels": labels, "segment": segment, "lengths": lengths}
