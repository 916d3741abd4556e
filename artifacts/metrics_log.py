"""`metrics.jsonl` and `timing.jsonl` of a run: one JSON object per line, readable while the run
continues.

Values that depend on the clock are in timing.jsonl, so metrics.jsonl is reproducible.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from config.errors import UsageError


class MetricsLog:
    """Appends lines to both files of `folder`. A checkpoint saves `length` and `timing_length`, in
    bytes.

    Raises UsageError if the files can't be written.
    """

    def __init__(self, folder: Path, keep: int = 0, keep_timing: int = 0) -> None:
        """Open both files to append, truncated to the lengths that a resumed run saved.

        The length of a shorter file is its own.
        """
        self._folder = folder
        with self._os_errors_reported():
            folder.mkdir(parents=True, exist_ok=True)
            self._metrics = (folder / "metrics.jsonl").open("ab")
            self._timing = (folder / "timing.jsonl").open("ab")
            self.length, self.timing_length = min(keep, self._metrics.tell()), min(keep_timing, self._timing.tell())
            self._metrics.truncate(self.length)
            self._timing.truncate(self.timing_length)

    def write(self, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """Write a line of metrics, and one of timing if given."""
        self.length += self._append(self._metrics, metrics)
        if timing is not None:
            self.timing_length += self._append(self._timing, timing)

    def _append(self, file: BinaryIO, values: Mapping[str, Any]) -> int:
        line = (json.dumps(values) + "\n").encode()
        with self._os_errors_reported():
            file.write(line)
            file.flush()
        return len(line)

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._timing.close()

    @contextlib.contextmanager
    def _os_errors_reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UsageError(
                f"the logs in {self._folder} can't be written: {error}; free space, make the folder writable or choose another "
                "checkpoint_dir"
            ) from error
