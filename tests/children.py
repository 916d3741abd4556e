"""Training runs in processes of their own, to be killed, stopped, or run as ranks. Not a test.

They are forked from a server that has the imports done already, so each starts in milliseconds. Among them are those that a run
does only when it needs them.
"""

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import datasets  # noqa: F401  token caches are made with it
import torch
import torch._dynamo  # noqa: F401  an optimizer's first step imports it

import training.loop
from config.errors import one_clear_message
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig
from training.instruct_run import run_instruct
from training.puzzle_run import run_puzzles

PHASES = ("starting", "training", "evaluating", "saving", "finished")

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.children"])


class Child:
    """One process that trains. `phase` says what it does; what it prints goes to `out`."""

    def __init__(self, config: TrainingConfig, out: Path, **environment: str) -> None:
        self.out = out
        self._phase = CONTEXT.Value("i", 0, lock=False)
        self._process = CONTEXT.Process(target=_train, args=(config, str(out), environment, self._phase))
        self._process.start()

    @property
    def phase(self) -> str:
        return PHASES[self._phase.value]

    @property
    def text(self) -> str:
        return self.out.read_text()

    def wait_for(self, phase: str) -> bool:
        """Wait until it is in a phase; whether it got there before it ended."""
        while self.phase != phase and self._process.is_alive():
            time.sleep(0.0002)
        return self.phase == phase

    def send(self, number: int) -> None:
        pid = self._process.pid
        assert pid is not None
        os.kill(pid, number)

    def end(self, timeout: float = 60) -> int:
        """Wait for its end; its exit status, negative for a signal that killed it."""
        self._process.join(timeout)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise AssertionError(f"still running after {timeout} s, in phase {self.phase}:\n{self.text}")
        code = self._process.exitcode
        assert code is not None
        return code

    def kill(self) -> str:
        """Kill it as a power failure would; the phase in which it died ("finished" if it was through)."""
        self._process.kill()
        self.end()
        return self.phase

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def start_ranks(config: TrainingConfig, size: int, folder: Path) -> list[Child]:
    """The processes that torchrun would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Child(config, folder / f"rank{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(size)]


def _train(config: TrainingConfig, out: str, environment: dict[str, str], phase: Any) -> None:
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)

    def shown(name: str) -> None:
        method: Callable[..., Any] = getattr(training.loop.Run, name)

        def wrapped(*arguments: Any) -> Any:
            if name != "train":
                phase.value = PHASES.index({"_evaluate": "evaluating", "_save": "saving"}[name])
            result = method(*arguments)
            phase.value = PHASES.index("finished" if name == "train" else "training")
            return result

        setattr(training.loop.Run, name, wrapped)

    catching = training.loop.first_signal

    @contextlib.contextmanager
    def caught() -> Iterator[Any]:
        with catching() as stop:
            # From here on a signal is a request; before, it is the end of any process.
            phase.value = PHASES.index("training")
            yield stop

    for name in ("train", "_evaluate", "_save"):
        shown(name)
    training.loop.first_signal = caught
    with one_clear_message():
        if isinstance(config, PretrainPuzzleConfig):
            run_puzzles(config)
        else:
            assert isinstance(config, PretrainInstructConfig)
            run_instruct(config)
