"""Files that appear whole or not at all, and files of JSON lines that may still grow. Knows nothing of what is in them."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from config.errors import UsageError

_REMEDY = "free space, or write to another place"


@contextlib.contextmanager
def _written(path: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} can't be written: {error}; {remedy}") from error


@contextlib.contextmanager
def whole_file(path: Path, remedy: str = _REMEDY, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yield a new path beside `path`. What the block writes there replaces `path` at its end, unless the block raises.

    Several processes may write the same file: the last one wins, or with `keep_existing` the first. Raises UsageError, which ends
    with `remedy`, where the file can't be written.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    with _written(path, remedy):
        try:
            yield partial
            _sync(partial)
            if keep_existing:
                _rename_if_new(partial, path)
            else:
                partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, new: str, remedy: str) -> Iterator[Path]:
    """Yield a new folder beside `path`, which becomes `path` at the block's end, unless the block raises.

    Raises UsageError if `path` exists, which ends with `new`, or can't be written, which ends with `remedy`.
    """
    if path.exists():
        raise UsageError(f"{path} exists already and is not overwritten: {new}, or delete it")
    partial = path.with_name(f".{path.name}.partial")
    with _written(path, remedy):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            for written in [*partial.rglob("*"), partial]:
                _sync(written)
            partial.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_if_new(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        if not path.exists():
            partial.replace(path)


def write_whole(path: Path, content: bytes, remedy: str = _REMEDY) -> None:
    """Write `content` in place of what is there, as `whole_file` does."""
    with whole_file(path, remedy) as partial:
        partial.write_bytes(content)


def to_json(values: Mapping[str, Any]) -> str:
    """`values` as the text of a JSON file."""
    return json.dumps(values, indent=2) + "\n"


def read_json(path: Path, remedy: str | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError, with a remedy if there is one."""
    advice = "" if remedy is None else f"; {remedy}"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}{advice}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged: expected a JSON object{advice}")
    return found


def json_lines(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file's lines, up to one that is still being written. Raises UsageError for a line without `key`."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            # What a process is writing just now, or was when it was killed, isn't a line yet.
            if not line.endswith(b"\n"):
                return
            try:
                found = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{path}, line {number} is damaged: {error}; mend or delete that line") from error
            if not isinstance(found, dict) or key not in found:
                raise UsageError(f"{path}, line {number} is damaged: expected an object with {key!r}; mend or delete that line")
            yield found


class JsonLines:
    """A file that JSON lines are appended to, and its length in bytes. Raises UsageError."""

    _REMEDY = "free space, make the folder writable, or choose another checkpoint_dir"

    def __init__(self, path: Path, keep: int = 0) -> None:
        """keep: bytes of an existing file to keep."""
        with _written(path, self._REMEDY):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self.length = min(keep, self._file.tell())
            self._file.truncate(self.length)

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line."""
        line = (json.dumps(values) + "\n").encode()
        with _written(Path(self._file.name), self._REMEDY):
            self._file.write(line)
            self._file.flush()
        self.length += len(line)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
