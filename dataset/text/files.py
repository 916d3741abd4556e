"""Raw rows of local files, as a stream: JSON lines (plain or zstd), one JSON array, parquet.

A row that can't even be read is handed on as a `BadRow`; a file that can't is a `UsageError`. This file must not know
what a row should hold.
"""

import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

from config.errors import UsageError

# No context takes a millionth of such a row in; held and tokenized, a few of them would take all memory.
MAX_ROW_BYTES = 4 << 20
_READ_BYTES = 1 << 20
_PARQUET_ROWS = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class BadRow(Exception):
    """A malformed row. `reason` is a short name to count by, the message says what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, or the exception couldn't travel between processes
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


def too_large() -> BadRow:
    """What becomes of a row beyond MAX_ROW_BYTES."""
    return BadRow("too_large", f"expected a row of at most {MAX_ROW_BYTES >> 20} MiB, found a longer one")


@dataclass(frozen=True)
class RawRow:
    """One row of a file: its undecoded JSON, or a parquet row's values, or why it can't be read.

    number: line, element or row, counted from 1. position: what `DataFile.row_at` finds it by.
    """

    number: int
    position: int
    data: bytes | dict[str, Any] | BadRow


class DataFile(ABC):
    """A file of rows. Raises `UsageError` when it is missing or damaged."""

    kind: str
    """Name of the format, for cache keys."""
    counts_in = "line"
    """What a row's number counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size

    @abstractmethod
    def rows(self) -> Iterator[tuple[RawRow, int]]:
        """Yield each row and how many bytes of the file have been read so far."""

    @abstractmethod
    def row_at(self, position: int) -> bytes | dict[str, Any]:
        """The data of the row at a `RawRow.position`; quick for rows in their order. Not for several threads at once."""

    def where(self, number: int) -> str:
        """A row's place, as error messages name it."""
        return f"{self.path}:{number}" if self.counts_in == "line" else f"{self.path}, {self.counts_in} {number}"

    def damaged(self, expected: str, found: object) -> UsageError:
        """The error for a file that can't be read to its end."""
        return UsageError(f"{self.path}: expected {expected}, found a damaged or cut-off one ({found}); fetch it again")


def open_data_file(path: str | Path) -> DataFile:
    """The reader for a file, by its suffix. Raises `UsageError` when it is missing or of no kind that can be read."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise UsageError(f"expected a data file at {str(path)!r}, found {found}; check dataset.data_dir and dataset.files")
    for suffix, reader in _READERS.items():
        if path.name.endswith(suffix):
            try:
                with path.open("rb"):
                    return reader(path)
            except OSError as error:
                raise UsageError(f"{path} can't be read: {error}") from error
    raise UsageError(f"{path}: expected a name that ends in {', '.join(_READERS)}; convert or rename the file")


class JsonLinesFile(DataFile):
    """A JSON value a line. Lines end at \\n only: JSON strings may hold U+2028 and other separators unescaped."""

    kind = "jsonl"

    def rows(self) -> Iterator[tuple[RawRow, int]]:
        number, position, length = 1, 0, 0
        parts: list[bytes] = []  # a line may span many blocks; joining once keeps that linear
        with self.path.open("rb") as handle:
            for block in self._blocks(handle):
                *complete, rest = block.split(b"\n")
                for piece in complete:
                    length += len(piece)
                    yield RawRow(number, position, _joined(parts, piece, length)), handle.tell()
                    number, position, length = number + 1, position + length + 1, 0
                    parts = []
                length += len(rest)
                if rest and length <= MAX_ROW_BYTES:
                    parts.append(rest)
            if length:
                yield RawRow(number, position, _joined(parts, b"", length)), handle.tell()

    def row_at(self, position: int) -> bytes:
        with self.path.open("rb") as handle:
            handle.seek(position)
            return handle.readline().removesuffix(b"\n")

    def _blocks(self, handle: BinaryIO) -> Iterator[bytes]:
        while block := handle.read(_READ_BYTES):
            yield block


class ZstdJsonLinesFile(JsonLinesFile):
    """The same, compressed. A row is found by reading up to it: on from the last one that was asked for, if it lies ahead."""

    kind = "jsonl.zst"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reading: Iterator[tuple[RawRow, int]] = iter(())
        self._last: RawRow | None = None

    def row_at(self, position: int) -> bytes:
        if self._last is None or position < self._last.position:
            self._reading, self._last = self.rows(), None
        while self._last is None or self._last.position != position:
            self._last, _ = next(self._reading)
        assert isinstance(self._last.data, bytes)
        return self._last.data

    def _blocks(self, handle: BinaryIO) -> Iterator[bytes]:
        import zstandard

        expected = "a complete zstd file"
        # The frame-wise object, because the stream reader takes a cut-off file for a complete one.
        frame = None
        try:
            while block := handle.read(_READ_BYTES):
                while block:
                    if frame is None:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    if text := frame.decompress(block):
                        yield text
                    block = b""
                    if frame.eof:
                        block, frame = frame.unused_data, None
        except zstandard.ZstdError as error:
            raise self.damaged(expected, error) from error
        if frame is not None:
            raise self.damaged(expected, "the last frame doesn't end")


class JsonFile(JsonLinesFile):
    """One JSON array of rows, read element by element; a .json file that doesn't open with [ holds JSON lines."""

    kind = "json"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as handle:
            self._is_array = handle.read(1 << 16).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
        if self._is_array:
            self.counts_in = "element"

    def rows(self) -> Iterator[tuple[RawRow, int]]:
        if not self._is_array:
            yield from super().rows()
            return
        with self.path.open("rb") as handle:
            for number, (position, data) in enumerate(self._elements(self._blocks(handle)), start=1):
                yield RawRow(number, position, data), handle.tell()

    def row_at(self, position: int) -> bytes:
        if not self._is_array:
            return super().row_at(position)
        with self.path.open("rb") as handle:
            handle.seek(position)
            # What stands before an element is a comma or the bracket that opens the array.
            data = next(self._elements([b"[", *iter(lambda: handle.read(_READ_BYTES), b"")]))[1]
        assert isinstance(data, bytes)
        return data

    def _elements(self, blocks: Iterable[bytes]) -> Iterator[tuple[int, bytes | BadRow]]:
        """Where each element of the array begins, and its bytes. Strings and nesting are followed, nothing else is parsed."""
        depth, in_string, is_escaped = 0, False, False
        base, begin, length = 0, 0, 0
        parts: list[bytes] = []
        ended = False
        for block in blocks:
            if ended:
                self._nothing_after_the_array(block)
                continue
            start = at = 0  # of the element's part in this block; of the next byte to look at
            while True:
                if is_escaped:
                    if at == len(block):
                        break
                    at, is_escaped = at + 1, False
                match = (_IN_STRING if in_string else _STRUCTURE).search(block, at)
                if match is None:
                    break
                at, found = match.end(), match[0]
                if found == b"\\":
                    is_escaped = True  # _STRUCTURE finds none outside of a string
                elif found == b'"':
                    in_string = not in_string
                elif found in b"[{":
                    depth += 1
                    if depth == 1:
                        start, begin = at, base + at
                elif found in b"]}":
                    depth -= 1
                    ended = depth == 0
                if ended or (found == b"," and depth == 1):
                    piece = block[start : at - 1]
                    data = _joined(parts, piece, length + len(piece))
                    if not (ended and isinstance(data, bytes) and not data.strip()):  # [] and [1,] end without an element
                        yield begin, data
                    start, begin, length, parts = at, base + at, 0, []
                if ended:
                    self._nothing_after_the_array(block[at:])
                    break
            if not ended and depth:
                length += len(block) - start
                if length <= MAX_ROW_BYTES:
                    parts.append(block[start:])
            base += len(block)
        if not ended:
            raise self.damaged("a complete JSON array", "it doesn't end")

    def _nothing_after_the_array(self, rest: bytes) -> None:
        if rest.strip():
            raise UsageError(
                f"{self.path}: expected one JSON array, found more behind its end; if it holds a value a line, name it .jsonl"
            )


_STRUCTURE = re.compile(rb'["\[\]{},]')
_IN_STRING = re.compile(rb'["\\]')


class ParquetFile(DataFile):
    """Rows of a parquet file, some at a time; a row's position is its index."""

    kind = "parquet"
    counts_in = "row"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._group_ends: list[int] | None = None
        self._group = -1
        self._begin = 0
        self._batch: Any = ()
        self._reading: Iterator[Any] = iter(())

    def rows(self) -> Iterator[tuple[RawRow, int]]:
        index = 0
        for batch in self._batches(None):
            for data in self._values(batch):
                # A row's share of the file; how far pyarrow has read isn't known.
                yield RawRow(index + 1, index, data), self.size * (index + 1) // self._count
                index += 1

    def row_at(self, position: int) -> dict[str, Any]:
        # A row group can hold a million rows: reading goes on from the last one asked for, if this one lies ahead in its group.
        group, begin = self._group_of(position)
        if self._group != group or position < self._begin:
            self._group, self._begin, self._batch, self._reading = group, begin, (), self._batches([group])
        while position >= self._begin + len(self._batch):
            self._begin += len(self._batch)
            self._batch = next(self._reading)
        data = self._values(self._batch.slice(position - self._begin, 1))[0]
        assert isinstance(data, dict)
        return data

    def _group_of(self, position: int) -> tuple[int, int]:
        """The row group that a row is in, and the group's first row."""
        if self._group_ends is None:
            with self._opened() as file:
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            self._group_ends = list(accumulate(sizes))
        group = bisect_right(self._group_ends, position)
        return group, self._group_ends[group - 1] if group else 0

    def _opened(self) -> Any:
        import pyarrow.parquet

        try:
            file = pyarrow.parquet.ParquetFile(self.path, memory_map=True, pre_buffer=False)
        except (pyarrow.ArrowException, OSError) as error:
            raise self.damaged("a complete parquet file", _first_line(error)) from error
        self._count = max(1, file.metadata.num_rows)
        return file

    def _batches(self, groups: list[int] | None) -> Iterator[Any]:
        import pyarrow

        with self._opened() as file:
            try:
                yield from file.iter_batches(_PARQUET_ROWS, row_groups=groups, use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                raise self.damaged("a complete parquet file", _first_line(error)) from error

    def _values(self, batch: Any) -> list[dict[str, Any] | BadRow]:
        try:
            return list(batch.to_pylist())
        except (UnicodeDecodeError, ValueError) as error:
            if len(batch) == 1:
                is_text = isinstance(error, UnicodeDecodeError)
                return [BadRow("bad_utf8" if is_text else "wrong_type", f"expected readable values, found {_first_line(error)}")]
            return [self._values(batch.slice(index, 1))[0] for index in range(len(batch))]


def _joined(parts: list[bytes], last: bytes, length: int) -> bytes | BadRow:
    return too_large() if length > MAX_ROW_BYTES else b"".join([*parts, last])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


# A longer suffix stands before the one it ends in.
_READERS: dict[str, type[DataFile]] = {
    ".jsonl.zst": ZstdJsonLinesFile,
    ".jsonl": JsonLinesFile,
    ".json": JsonFile,
    ".parquet": ParquetFile,
}
