"""Streams rows of local files: JSON lines, JSON arrays, CSV, parquet and Arrow, each also
compressed.

An unreadable row is passed on as a `BadRow`; an unreadable file is a `UsageError`. This file
doesn't know the content of rows. docs/architecture.md says why `datasets` doesn't read JSON and
CSV.
"""

import contextlib
import csv
import io
import json
import lzma
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from config.errors import UsageError

# Far beyond any context; a few such rows would fill the memory.
MAX_ROW_BYTES = 4 << 20
FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")
# A longer row is skipped up to this length; without a limit, an unclosed quote or bracket would
# swallow the rest of the file.
_MOST_READ_FOR_A_ROW = 16 * MAX_ROW_BYTES
_BLOCK = 1 << 20
# Bytes in which to look for the bracket of an array.
_OPENING = 1 << 16
_ROWS_AT_ONCE = 256
_SEPARATOR = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


class BadRow(Exception):
    """A malformed row. `reason` is a short name for counts; the message says what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that the exception can be pickled
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class NothingToLearn(Exception):
    """A well-formed row without anything to train on. `reason` is a short name for counts."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def too_large() -> BadRow:
    """The error for a row beyond MAX_ROW_BYTES."""
    return BadRow("too_large", f"expected a row of at most {MAX_ROW_BYTES >> 20} MiB, found a longer one")


@dataclass(frozen=True)
class RowFile:
    """A file of rows. format: one of FORMATS, but .jsonl for .ndjson. Reading raises `UsageError` if it is damaged."""

    path: Path
    format: str
    compression: str

    def rows(self) -> Iterator[tuple[int, bytes | dict[str, Any] | BadRow]]:
        """Each row with its number, from 1: its JSON bytes, its values, or its error."""
        try:
            yield from _READERS[self.format](self)
        except UnicodeDecodeError as error:
            encoding = "UTF-16" if error.object[:2] in (b"\xff\xfe", b"\xfe\xff") else "LATIN1"
            raise UsageError(
                f"{self.path}: expected UTF-8, found byte 0x{error.object[error.start]:02x}; convert the file, for example with "
                f"`iconv -f {encoding} -t UTF-8`"
            ) from error
        except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
            raise UsageError(
                f"{self.path}: expected a complete {self.format[1:]} file, found a damaged or cut-off one ({first_line(error)}); "
                "fetch it again"
            ) from error

    def where(self, number: int) -> str:
        """A row's place, for error messages."""
        counts_lines = self.format in (".jsonl", ".csv", ".tsv")
        return f"{self.path}:{number}" if counts_lines else f"{self.path}, row {number}"

    @contextlib.contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The uncompressed bytes, of all frames. A truncated file is an error."""
        if self.compression and self.path.stat().st_size == 0:
            raise EOFError("no bytes at all")
        if self.compression == ".xz":
            with lzma.open(self.path) as handle:
                yield handle
            return
        # Other zstd readers accept a truncated file, and read only the first of several frames.
        codec = {"": None, ".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[self.compression]
        with (
            pa.input_stream(str(self.path), compression=codec, buffer_size=None) as source,
            io.BufferedReader(source, _BLOCK) as text,
        ):
            yield text

    @contextlib.contextmanager
    def seekable(self) -> Iterator[Path]:
        """A path to the uncompressed file, for formats with a footer."""
        if not self.compression:
            yield self.path
            return
        with tempfile.NamedTemporaryFile(suffix=self.format) as plain, self.stream() as source:
            shutil.copyfileobj(source, plain)
            plain.flush()
            yield Path(plain.name)


def refused(file: RowFile, number: int, message: str) -> UsageError:
    """The error for a malformed row, where such rows aren't skipped."""
    return UsageError(f"{file.where(number)}: {message}; correct the row, or count such rows instead with dataset.on_bad_row=skip")


def open_row_file(path: str | Path) -> RowFile:
    """Open a file by its suffix. Raises `UsageError` if it is missing, unreadable, or of an unknown format."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "none"
        raise UsageError(f"expected a data file at {str(path)!r}, found {found}; check dataset.data_dir and dataset.files")
    known = format_of(path)
    if known is None:
        raise UsageError(
            f"{path}: expected a name that ends in {', '.join(FORMATS)}, or in one of these and {', '.join(COMPRESSIONS)}; "
            "convert or rename the file"
        )
    format_, compression = known
    try:
        with path.open("rb") as handle:
            handle.read(1)
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error}") from error
    file = RowFile(path, format_, compression)
    if format_ == ".json":
        start = _start(file)
        if start.startswith(b"["):
            return file
        if start.partition(b"\n")[0].rstrip().endswith((b"{", b"[", b":", b",")):
            raise UsageError(
                f"{path}: expected one JSON array of rows, or a row a line, found one object over several lines; take the array "
                "out of it, or write a row a line"
            )
    # A .json file that doesn't begin with [ has JSON lines.
    return RowFile(path, ".jsonl", compression) if format_ in (".json", ".ndjson") else file


def format_of(path: Path) -> tuple[str, str] | None:
    """Format and compression ("" if none) by a file's name; None for an unknown one."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1], compression) if suffixes and suffixes[-1] in FORMATS else None


def to_json(values: bytes | dict[str, Any]) -> bytes:
    """A row of `RowFile.rows` as JSON, for `parse_row`. Bytes that are UTF-8 become text; other values
    without a JSON type become {name of their type: true}.
    """
    if isinstance(values, bytes):
        return values
    return json.dumps(values, ensure_ascii=False, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: object) -> str | dict[str, bool]:
    with contextlib.suppress(UnicodeDecodeError):
        if isinstance(value, bytes):
            return value.decode()
    # Neither text nor null, which means absent: an error in place of text, metadata elsewhere.
    return {type(value).__name__: True}


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`. Python would keep only the last of equal keys."""
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow("duplicate_key", f"expected each key of an object once, found {shown(twice)} twice")
    return members


def parse_row(data: bytes) -> dict[str, Any]:
    """The JSON object on one line. Raises `BadRow`, or `NothingToLearn` for a blank line."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("bad_utf8", f"expected UTF-8, found byte 0x{data[error.start]:02x}") from error
    if not text.strip():
        raise NothingToLearn("blank_line")
    try:
        row = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad_json", f"expected a JSON object, found {shown(text)} ({error})") from error
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"expected a JSON object, found {shown(text)}")
    return row


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class name if there is none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def shown(value: Any) -> str:
    """A value to quote in a message: its first 60 characters, as ASCII."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return ascii(text if len(text) <= 60 else text[:60] + "...")


def _lines(file: RowFile) -> Iterator[tuple[int, bytes | BadRow]]:
    # Lines end only at \n: JSON strings may contain U+2028 and other separators.
    with file.stream() as handle:
        number = 0
        while line := handle.readline(MAX_ROW_BYTES + 2):
            number += 1
            if len(line.removesuffix(b"\n")) <= MAX_ROW_BYTES:
                yield number, line.removesuffix(b"\n")
                continue
            while line and not line.endswith(b"\n"):
                line = handle.readline(_BLOCK)
            yield number, too_large()


def _start(file: RowFile) -> bytes:
    """The first bytes of a file that aren't blank."""
    try:
        with file.stream() as handle:
            return handle.read(_OPENING).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (OSError, EOFError, lzma.LZMAError):
        return b""  # reported when it is read


def _elements(file: RowFile) -> Iterator[tuple[int, bytes | BadRow]]:
    """The elements of one JSON array. In memory is a block of the file, or an element that takes more."""
    decoder = json.JSONDecoder(object_pairs_hook=unique_keys)
    with file.stream() as handle, io.TextIOWrapper(handle, "utf-8-sig", newline="") as text:
        buffer, at, number = text.read(_OPENING).lstrip()[1:], 0, 0
        while True:
            try:
                separator = _SEPARATOR.match(buffer, at)
                assert separator is not None
                has_comma, begin = bool(separator[1]), separator.end()
                if buffer.startswith("]", begin) and (number or not has_comma):
                    break
                if begin < len(buffer) and has_comma != (number > 0):
                    raise ValueError("where a comma or ] should be" if number else "where a row should be")
                try:
                    value, end = decoder.raw_decode(buffer, begin)
                except BadRow as bad:  # before the element's end: parse again, to find it
                    value, (_, end) = bad, json.JSONDecoder().raw_decode(buffer, begin)
                if end == len(buffer):  # a number may continue
                    raise ValueError("an array that doesn't end")
            except (ValueError, RecursionError) as error:
                more = text.read(max(_BLOCK, len(buffer) - at))
                if more and len(buffer) - at <= _MOST_READ_FOR_A_ROW:
                    buffer, at = buffer[at:] + more, 0
                    continue
                found = f"{buffer[at : at + 40]!a} ({error})" if buffer[at:].strip() else "an array that doesn't end"
                raise UsageError(
                    f"{file.path}, row {number + 1}: expected one JSON array of rows, found {found}; mend the file"
                ) from error
            number += 1
            if end - begin > MAX_ROW_BYTES:
                yield number, too_large()
            else:
                yield number, value if isinstance(value, BadRow) else buffer[begin:end].encode("utf-8", "surrogatepass")
            at = end
        if (buffer[begin + 1 :] + text.read(_BLOCK)).strip():
            raise UsageError(
                f"{file.path}: expected one JSON array, found more behind its end; if it holds a row a line, name it .jsonl"
            )


def _table(file: RowFile) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Rows of CSV or TSV, with all values as text. A row's number is the line that it ends on."""
    with file.stream() as handle, io.TextIOWrapper(handle, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if file.format == ".tsv" else ",", strict=True)
        csv.field_size_limit(_MOST_READ_FOR_A_ROW)  # global to the process, and never lowered: another file may be open
        try:
            header = next(reader, None)
            if header is None:
                return
            if not header or len(set(header)) < len(header) or not all(header):
                raise UsageError(
                    f"{file.path}:1: expected the columns' names, each once, found {header}; name them all, or write the file "
                    "without its index (pandas: index=False)"
                )
            for values in reader:
                if not values:
                    continue
                if len(values) != len(header):
                    yield reader.line_num, BadRow("wrong_columns", f"expected {len(header)} columns, found {len(values)}")
                elif sum(map(len, values)) > MAX_ROW_BYTES:
                    yield reader.line_num, too_large()
                else:
                    yield reader.line_num, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UsageError(
                f'{file.path}:{reader.line_num}: expected a row of {file.format[1:].upper()}, with " around values that '
                f"contain one, and each of those twice, found another ({error}); mend the row, or write the file as .jsonl"
            ) from error


def _parquet(file: RowFile) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    import pyarrow.parquet

    with file.seekable() as path, pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as opened:
        yield from _numbered(file, opened.iter_batches(_ROWS_AT_ONCE, use_threads=False))


def _arrow(file: RowFile) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Both Arrow formats: the stream that `datasets` writes, and the file (Feather)."""
    with file.seekable() as path, pa.memory_map(str(path)) as source:
        is_footed = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_footed:
            reader = pa.ipc.open_file(source)
            batches: Iterable[Any] = map(reader.get_batch, range(reader.num_record_batches))
        else:
            # A stream without its end marker is truncated, possibly between two batches.
            source.seek(max(0, source.size() - len(_END_OF_STREAM)))
            if source.read() != _END_OF_STREAM:
                raise EOFError("the stream doesn't end")
            source.seek(0)
            batches = pa.ipc.open_stream(source)
        parts = (batch.slice(begin, _ROWS_AT_ONCE) for batch in batches for begin in range(0, len(batch), _ROWS_AT_ONCE))
        yield from _numbered(file, parts)


def _numbered(file: RowFile, batches: Iterable[Any]) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    number = 0
    for batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):  # a dict would keep only the last of two equal names
            raise UsageError(f"{file.path}: expected each column once, found {names}; rename one of them")
        for values in _values(batch):
            number += 1
            yield number, values


def _values(batch: Any) -> list[dict[str, Any] | BadRow]:
    try:
        return list(batch.to_pylist())
    # The last two: a date beyond Python's years, and an unknown time zone.
    except (ValueError, OverflowError, KeyError) as error:
        if len(batch) > 1:
            return [values for index in range(len(batch)) for values in _values(batch.slice(index, 1))]
        is_date = [pa.types.is_temporal(column.type) for column in batch.columns]
        if any(is_date) and not isinstance(error, UnicodeDecodeError):
            # Dates and times are metadata, whatever they are.
            dates = {
                name: _plain(column) for name, column, date in zip(batch.schema.names, batch.columns, is_date, strict=True) if date
            }
            [values] = _values(batch.drop_columns(list(dates)))
            return [values if isinstance(values, BadRow) else values | dates]
        is_text = isinstance(error, UnicodeDecodeError)
        return [BadRow("bad_utf8" if is_text else "wrong_type", f"expected readable values, found {error}"[:200])]


_READERS = dict(zip(FORMATS, (_lines, _lines, _elements, _table, _table, _parquet, _arrow), strict=True))
