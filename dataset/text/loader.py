"""Examples of one or more splits, read from the token cache in the order of a curriculum, and
collated into padded batches.

Knows no row forms and no models.
"""

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.text.conversation import Conversation, with_default_system
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.forms import to_conversation
from dataset.text.row_encoder import ANSWER_CUT, PROMPT_CUT
from dataset.text.rows import RowFile, parse_row
from dataset.text.token_cache import LoadedSplit

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


class TextDataset:
    """The examples of one split, in the order of their files.

    data_hash: hex SHA-256 of the contents of this split's rows, in order.
    counts: rows "kept" and "truncated" in this split, and of these "prompt_cut" and "answer_cut".
    For all rows read from the files: "read", "dropped" and "bad" by reason, "beyond_subset" (usable
    rows left out by `subset_size`), "forms" (rows by form), and "ignored" (rows by key whose text
    was left out).
    loaded: the split in the token cache. left_out: files that the source doesn't read, because of
    their names.
    """

    def __init__(self, loaded: LoadedSplit, left_out: Sequence[Path] = ()) -> None:
        self.loaded = loaded
        self.left_out = left_out
        self._rows = loaded.rows
        self.data_hash: str = hashlib.sha256(self.column("content_hash").astype("<u8").tobytes()).hexdigest()
        cut = self.column("cut")
        self.counts: dict[str, Any] = {
            **loaded.counts,
            "kept": len(self._rows),
            "truncated": int(np.count_nonzero(cut)),
            "prompt_cut": int(np.count_nonzero(cut & PROMPT_CUT)),
            "answer_cut": int(np.count_nonzero(cut & ANSWER_CUT)),
        }

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        tokens, row = self.loaded.tokens, self._row_number(index)
        return Example(
            tokens.list("ids", row).astype(np.int32),
            tokens.list("supervised", row).astype(np.bool_),
            tokens.list("segment", row).astype(np.int32),
            tokens.value("turn_bytes", row),
        )

    def _row_number(self, index: int) -> int:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"example {index} of {len(self._rows)}")
        return int(self._rows[index])

    def column(self, name: str) -> npt.NDArray[Any]:
        """A numeric column of `row_encoder.token_schema`, [examples]."""
        values: npt.NDArray[Any] = self.loaded.tokens.column(name)[self._rows]
        return values

    def report(self) -> dict[str, Any]:
        """Names of files, counts and `Lengths`, as JSON values."""
        left_out = {"left_out": [path.name for path in self.left_out]} if self.left_out else {}
        files = [file.path.name for file in self.loaded.files]
        return {"files": files, **left_out, "counts": self.counts, "lengths": asdict(Lengths.of([self]))}

    def row(self, index: int) -> dict[str, Any]:
        """The source row of an example, with all its fields."""
        return parse_row(self.loaded.raw.value("row", self._row_number(index)))

    def place(self, index: int) -> str:
        """The example's file, and its line or row there, from 1."""
        raw, row = self.loaded.raw, self._row_number(index)
        file: RowFile = self.loaded.files[raw.value("file", row)]
        return file.where(raw.value("number", row))

    def conversation(self, index: int) -> Conversation:
        """The uncut conversation, with the default system prompt."""
        recipe = self.loaded.recipe
        return with_default_system(to_conversation(self.row(index), recipe.forms)[0], recipe.default_system_prompt)


@dataclass(frozen=True)
class Lengths:
    """Ids per row: numbers of whole and cut rows for each bin of `edges` (up to the next edge), and
    percentiles of all rows.
    """

    edges: list[int]
    whole: list[int]
    cut: list[int]
    percentiles: dict[int, int]

    @classmethod
    def of(cls, splits: Sequence[TextDataset]) -> Self:
        """The lengths of all rows of `splits`, after cutting."""
        lengths = np.concatenate([split.column("length") for split in splits]).astype(np.int64)
        is_cut = np.concatenate([split.column("cut") for split in splits]) > 0
        longest = int(lengths.max(initial=1))
        width = -(-longest // _LENGTH_BINS)
        edges = np.arange(0, longest + width + 1, width)
        percentiles = np.percentile(lengths, _PERCENTILES, method="nearest") if len(lengths) else [0] * len(_PERCENTILES)
        return cls(
            edges.tolist(),
            np.histogram(lengths[~is_cut], edges)[0].tolist(),
            np.histogram(lengths[is_cut], edges)[0].tolist(),
            {p: int(value) for p, value in zip(_PERCENTILES, percentiles, strict=True)},
        )


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
    columns = {"questions": "question_hash", "conversations": "conversation_hash"}
    return {name: int(np.isin(test.column(column), train.column(column)).sum()) for name, column in columns.items()}


class ExampleStream:
    """Iterates (draw, Example) in the order of a curriculum.

    workers: prefetching threads; 0 reads inline. The order is the same.
    start: examples to skip: the `position` of the stream to resume.
    position: examples returned so far, including `start`. Use as a context manager, or `close` it.
    """

    def __init__(self, dataset: Examples, curriculum: Curriculum, workers: int, start: int = 0) -> None:
        if workers < 0:
            raise UsageError(f"dataloader_workers: expected 0 or more, found {workers}")
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
        self._pending: deque[tuple[Draw, Future[Example]]] = deque()

    def __len__(self) -> int:
        """Remaining examples."""
        return self.total - self.position

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Draw, Example]:
        try:
            item = self._next_inline() if self._pool is None else self._next_read_ahead(self._pool)
        except BaseException:  # also at the end of the stream
            self.close()
            raise
        self.position += 1
        return item

    def _next_inline(self) -> tuple[Draw, Example]:
        draw = next(self._order)
        return draw, self._dataset[draw.example_id]

    def _next_read_ahead(self, pool: ThreadPoolExecutor) -> tuple[Draw, Example]:
        while len(self._pending) < self._read_ahead:
            draw = next(self._order, None)
            if draw is None:
                break
            self._pending.append((draw, pool.submit(self._dataset.__getitem__, draw.example_id)))
        if not self._pending:
            raise StopIteration
        draw, future = self._pending.popleft()
        return draw, future.result()

    def skip(self, count: int) -> None:
        """Skip the next `count` examples without reading them: those that other ranks take.

        All ranks have the same order, so together they read each example once. Threads can't
        prefetch over a skip, so such a stream needs workers=0.
        """
        if not 0 <= count <= len(self):
            raise ValueError(f"can't skip {count} of {len(self)} examples")
        for _ in range(count):
            if self._pending:
                self._pending.popleft()[1].cancel()
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
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
