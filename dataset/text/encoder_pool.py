"""Encoding rows in several processes, with results in the order of the rows, however many there are.

A worker is `python -m dataset.text.encoder_pool`. The standard library's pools would start each one with an import of the
program that called them, and with it of torch; this one imports neither, and ends when its caller does, killed or not.
"""

import contextlib
import os
import pickle
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

from config.errors import UsageError
from dataset.text.files import RawRow
from dataset.text.row_encoder import EncodedRows, Recipe, RowEncoder

_REPOSITORY = Path(__file__).resolve().parents[2]
# What a start costs (half a second and 60 MB a worker) only pays for more rows than this.
_PARTS_BEFORE_WORKERS = 8
# One process reads for all, and about so many keep it busy.
_MOST_BY_DEFAULT = 16

Tag = TypeVar("Tag")


def processes_to_use(processes: int | None) -> int:
    """`processes`, or by default one for each CPU that this process may use, at most 16."""
    if processes is not None:
        return processes
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_BY_DEFAULT)


def encode_in_order(
    parts: Iterable[tuple[list[RawRow], Tag]], recipe: Recipe, processes: int
) -> Generator[tuple[EncodedRows, list[RawRow], Tag]]:
    """Encode each part of a corpus; yields what became of it, its rows and its tag, in order.

    The first few parts are encoded here, and workers start only if more follow. A few parts a process are held at a time.
    Raises `UsageError` when a worker dies.
    """
    parts = iter(parts)
    here = islice(parts, _PARTS_BEFORE_WORKERS) if processes > 1 else parts
    encoder = RowEncoder(recipe)
    for rows, tag in here:
        yield encoder.encode(rows), rows, tag
    following = next(parts, None)
    if following is None:
        return
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_Worker()) for _ in range(processes)]
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers:  # all have been started: one takes its recipe when it has imported what it needs
            with contextlib.suppress(BrokenPipeError):  # told at the first part
                worker.send(recipe)
            idle.put(worker)

        def encode(rows: list[RawRow]) -> EncodedRows:
            worker = idle.get()
            try:
                return worker.encode(rows)
            finally:
                idle.put(worker)

        # A thread a worker: it waits for the pipe, so it takes no processor time from anyone.
        threads = ThreadPoolExecutor(processes, "encoder-pipe")
        stack.callback(threads.shutdown, wait=True, cancel_futures=True)
        pending: deque[tuple[Future[EncodedRows], list[RawRow], Tag]] = deque()
        while following is not None or pending:
            while following is not None and len(pending) < 2 * processes + 1:
                rows, tag = following
                pending.append((threads.submit(encode, rows), rows, tag))
                following = next(parts, None)
            future, rows, tag = pending.popleft()
            yield future.result(), rows, tag


class _Worker:
    """A process that encodes one part at a time."""

    def __init__(self) -> None:
        # One computing thread each; Ctrl-C is for the caller alone, who then closes the pipe.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dataset.text.encoder_pool"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=_REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def encode(self, rows: list[RawRow]) -> EncodedRows:
        try:
            self.send(rows)
            assert self._process.stdout is not None
            result = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"a tokenizing process ended early (exit status {self._process.wait()}), most likely for want of memory: "
                "use fewer of them (dataset.processes=1 for none)"
            ) from error
        assert isinstance(result, EncodedRows)
        return result

    def send(self, value: object) -> None:
        assert self._process.stdin is not None
        pickle.dump(value, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()


def _serve() -> None:
    """A worker's whole life: a recipe, then parts of rows, each answered; it ends with its input."""
    recipe = pickle.load(sys.stdin.buffer)
    encoder = RowEncoder(recipe)
    # Whatever a library prints must not come between the answers.
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            rows = pickle.load(sys.stdin.buffer)
            pickle.dump(encoder.encode(rows), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


if __name__ == "__main__":
    _serve()
