"""`metrics.jsonl` and `timing.jsonl` of a run: one JSON object a line, readable while the run goes on.

What depends on the clock goes to timing.jsonl, so metrics.jsonl is the same for the same run.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """Appends lines to both files of `folder`; `length` is what a checkpoint must remember of metrics.jsonl, in bytes."""

    def __init__(self, folder: Path, keep: int = 0) -> None:
        """Open for appending, metrics.jsonl cut back to its first `keep` bytes: what a resumed run knows to be its own."""
        folder.mkdir(parents=True, exist_ok=True)
        self._metrics = (folder / "metrics.jsonl").open("ab")
        self._metrics.truncate(keep)
        self._timing = (folder / "timing.jsonl").open("ab" if keep else "wb")
        self.length = keep

    def write(self, metrics: Mapping[str, Any], timing: Mapping[str, Any] | None = None) -> None:
        """One line of metrics, and one of timing if given."""
        line = (json.dumps(metrics) + "\n").encode()
        self._metrics.write(line)
        self._metrics.flush()
        self.length += len(line)
        if timing is not None:
            self._timing.write((json.dumps(timing) + "\n").encode())
            self._timing.flush()

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._timing.close()
