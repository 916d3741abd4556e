"""Measures a part's cases in other processes: a crash or hang affects one case. Knows no part."""

import contextlib
import faulthandler
import inspect
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._logging._internal import set_logs

from benchmarks.cuda.scale import Case, Figures, Found, Scale, free_memory
from models.device import keep_freed_memory

GRACE = 15.0
"""Seconds for a process to end by itself."""
_START_SECONDS, _END_SECONDS = 90.0, 3.0


@dataclass(frozen=True)
class Part:
    """A function that yields cases; its docstring describes them."""

    cases: Callable[[Scale], Iterator[Case]]
    weight: float
    """Expected seconds: parts share the time in proportion."""
    processes: int = 1
    """Number of processes that share the cases. With several, nothing is timed."""


def serve(connection: Connection, part: Part, scale: Scale, log: Path) -> None:
    """The process that measures cases, given their name, time limit and earlier figures, until
    there are no more.

    Its output goes to `log`. If a case exceeds its time limit, the process ends and writes its
    stack.
    """
    os.setsid()  # so that its compilers can be ended with it
    with log.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    keep_freed_memory()
    set_logs(recompiles=True)
    if scale.device == "cpu":
        torch.compiler.set_stance("force_eager")
        torch.set_num_threads(1)  # sizes are tiny: several threads would wait for each other
    elif part.processes > 1:
        threads = max(1, torch.get_num_threads() // part.processes)
        torch.set_num_threads(threads)
        torch._inductor.config.compile_threads = threads
    cases = {case.name: case for case in part.cases(scale)}
    with contextlib.suppress(EOFError):
        while True:
            name, seconds, found = connection.recv()
            faulthandler.dump_traceback_later(seconds, exit=True)
            try:
                free_memory(scale)
                figures = cases[name].measure(found)
            except torch.AcceleratorError:
                raise  # this process can't use the device any more
            except Exception as error:
                traceback.print_exc()
                figures = {"error": f"{type(error).__name__}: {tail(str(error))}"}
            faulthandler.cancel_dump_traceback_later()
            connection.send(figures)


def tail(message: str) -> str:
    """The part of a message for the report: its last lines, or the stack at a time limit."""
    lines = [line for line in message.strip().splitlines() if "[__recompiles]" not in line]
    if any(line.startswith("Timeout (") for line in lines):
        last = max(place for place, line in enumerate(lines) if "most recent call first" in line)
        return "\n".join(["stopped at its time limit, in", *lines[last + 1 : last + 9]])
    return "\n".join(lines[-10:])[-1500:]


class _Process:
    """`serve` in its own process."""

    def __init__(self, part: Part, scale: Scale, log: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, its_end = context.Pipe()
        self._log, self._deadline = log, scale.deadline
        self._process = context.Process(target=serve, args=(its_end, part, scale, log), daemon=True)
        self._process.start()
        its_end.close()

    def measure(self, case: Case, found: Found) -> Figures:
        """The figures of a case; if the process ends or is ended first, its last output."""
        left = max(1.0, self._deadline - time.monotonic())
        written = self._log.stat().st_size if self._log.exists() else 0
        with contextlib.suppress(EOFError, OSError):
            self._connection.send((case.name, min(case.seconds, left), found))
            # Give it time to end by itself.
            if self._connection.poll(min(case.seconds + _START_SECONDS, left) + GRACE):
                figures: Figures = self._connection.recv()
                return figures
        self.end()
        said = self._log.read_bytes()[written:].decode(errors="replace") if self._log.exists() else ""
        return {"error": tail(said) or f"the process ended with status {self._process.exitcode}"}

    @property
    def has_ended(self) -> bool:
        return not self._process.is_alive()

    def end(self) -> None:
        """End the process and its children."""
        self._connection.close()
        self._process.join(_END_SECONDS)
        self._process.kill()
        self._process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)


def has_failed(figures: Figures) -> bool:
    """Whether a case has no figures, or wrong ones."""
    return "error" in figures or figures.get("passed") is False


def measure(name: str, part: Part, scale: Scale, folder: Path) -> Figures:
    """Measure a part's cases until `scale.deadline`. Processes write NAME-NUMBER.log."""
    started = time.monotonic()
    cases = list(part.cases(scale))
    figures: dict[str, Figures] = {case.name: {"error": "not run: no time left"} for case in cases}

    def run(number: int) -> None:
        log = folder / f"{name}-{number}.log"
        log.unlink(missing_ok=True)
        process: _Process | None = None
        for case in cases[number :: part.processes]:
            begun = time.monotonic()
            if begun > scale.deadline:
                break
            if process is None or process.has_ended:
                process = _Process(part, scale, log)
            found = {other: known for other, known in figures.items() if "error" not in known}
            figures[case.name] = process.measure(case, found)
            verdict = "FAILED" if has_failed(figures[case.name]) else "ok"
            print(f"{name:10} {verdict:6} {time.monotonic() - begun:6.1f} s  {case.name}", flush=True)
        if process is not None:
            process.end()

    with ThreadPoolExecutor(part.processes) as pool:
        list(pool.map(run, range(part.processes)))
    return {"about": inspect.cleandoc(part.cases.__doc__ or ""), "seconds": time.monotonic() - started, "cases": figures}
