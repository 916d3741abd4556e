"""Measures a part's cases in other processes: a crash or hang affects one case. Knows no part."""

import faulthandler
import inspect
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch._logging._internal import set_logs

from benchmarks.cuda.scale import Case, Figures, Scale, free_memory
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


def serve(connection: Connection, part: Part, scale: Scale, log: Path, names: Sequence[str], found: dict[str, Figures]) -> None:
    """The process that measures the cases `names`, in this order, and sends each one's figures.
    `found`: figures of earlier cases.

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
    for name in names:
        free_memory(scale)
        faulthandler.dump_traceback_later(cases[name].limit(scale), exit=True)
        try:
            found[name] = figures = cases[name].measure(found)
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


def has_failed(figures: Figures) -> bool:
    """Whether a case has no figures, or wrong ones."""
    return "error" in figures or figures.get("passed") is False


def measure(name: str, part: Part, scale: Scale, folder: Path) -> Figures:
    """Measure a part's cases until `scale.deadline`. Processes write NAME-NUMBER.log."""
    started = time.monotonic()
    cases = list(part.cases(scale))
    figures: dict[str, Figures] = {case.name: {"error": "not run: no time left"} for case in cases}
    context = multiprocessing.get_context("spawn")

    def run(number: int) -> None:
        """Every `part.processes`th case, in a new process after each that ended its own."""
        log, waiting = folder / f"{name}-{number}.log", cases[number :: part.processes]
        log.write_bytes(b"")
        while waiting and time.monotonic() < scale.deadline:
            found = {other: known for other, known in figures.items() if "error" not in known}
            connection, its_end = context.Pipe(duplex=False)
            given = (its_end, part, scale, log, [case.name for case in waiting], found)
            process = context.Process(target=serve, args=given, daemon=True)
            process.start()
            its_end.close()
            has_ended = False
            while waiting and not has_ended and time.monotonic() < scale.deadline:
                case, begun, written = waiting.pop(0), time.monotonic(), log.stat().st_size
                left = max(1.0, scale.deadline - begun)
                try:
                    # Give it time to end by itself.
                    if not connection.poll(min(case.seconds + _START_SECONDS, left) + GRACE):
                        raise EOFError
                    figures[case.name] = connection.recv()
                except EOFError:
                    _end(process)
                    has_ended, said = True, tail(log.read_bytes()[written:].decode(errors="replace"))
                    figures[case.name] = {"error": said or f"the process ended with status {process.exitcode}"}
                verdict = "FAILED" if has_failed(figures[case.name]) else "ok"
                print(f"{name:10} {verdict:6} {time.monotonic() - begun:6.1f} s  {case.name}", flush=True)
            connection.close()
            _end(process)

    with ThreadPoolExecutor(part.processes) as pool:
        list(pool.map(run, range(part.processes)))
    return {"about": inspect.cleandoc(part.cases.__doc__ or ""), "seconds": time.monotonic() - started, "cases": figures}


def _end(process: BaseProcess) -> None:
    """End a process, by force after some seconds, and its children."""
    process.join(_END_SECONDS)
    process.kill()
    process.join()
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
