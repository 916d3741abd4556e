"""The check-up on a CUDA device: is it right there, how fast is it, what does training cost. One command, rehearsed on a CPU.

    python -m benchmarks.cuda [--minutes 8 --only smoke train_step --data FOLDER --output FOLDER]
    python -m benchmarks.cuda --rehearse

Parts run one after the other and share the minutes. Each consists of cases with a time limit of their own, which run in another
process: where one crashes or hangs, its message is kept and a new process goes on with the next. After every part, `--output`
(default: the environment variable OUT, else checkpoints/cuda) holds cuda.md, cuda.json, and what the processes wrote to stderr,
reasons of recompilation among it, as PART.log. `--data` is a folder of conversations, as dataset=jsonl takes them, and of
Sudoku-Extreme's train.csv and test.csv under sudoku/; without it, data are generated. `--rehearse` runs the same code on a CPU with
tiny sizes and without compiling; what only CUDA has says so.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import inspect
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from artifacts.outputs import output_folder, write_json
from benchmarks.cuda.cost import compare_decoding, compare_training, decoding, train_step
from benchmarks.cuda.runs import epoch, equal_flops, sudoku
from benchmarks.cuda.scale import REHEARSAL, Case, Figures, Scale, free_memory
from benchmarks.cuda.smoke import smoke
from config.errors import UsageError, one_clear_message
from config.schema import user_path
from models.device import keep_freed_memory


@dataclass(frozen=True)
class Part:
    """Cases, and by what they are compared when they have ended."""

    cases: Callable[[Scale], Iterator[Case]]
    weight: float
    """Seconds that it should take: parts share the time in proportion."""
    compare: Callable[[Mapping[str, Figures]], None] = lambda cases: None
    shared: bool = False
    """Among several processes; nothing is timed then."""


PARTS = {
    "smoke": Part(smoke, 90, shared=True),
    "train_step": Part(train_step, 140, compare_training),
    "decoding": Part(decoding, 70, compare_decoding),
    "epoch": Part(epoch, 70),
    "equal_flops": Part(equal_flops, 180),
    "sudoku": Part(sudoku, 60),
}

REPOSITORY = Path(__file__).resolve().parents[2]
# What a case is that a process can't begin with.
_START = "start of a process"
_START_SECONDS = 90
GRACE = 15.0
"""Seconds that a process has to end by itself."""


def work(part: str, scale: Scale, share: int, seconds: float, done: Sequence[str]) -> None:
    """A process of `part`: the cases of its `share` that aren't `done`, a JSON line on stdout as each begins and ends.

    Where a case takes longer than it may, the process ends and says on stderr where it was.
    """
    deadline = time.monotonic() + seconds
    scale = dataclasses.replace(scale, left=seconds)
    keep_freed_memory()
    if scale.device == "cpu":
        torch.compiler.set_stance("force_eager")
    # Whoever else writes to stdout may not spoil the lines.
    lines = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for case in itertools.islice(PARTS[part].cases(scale), share, None, scale.processes if PARTS[part].shared else 1):
        started = time.monotonic()
        if case.name in done or started > deadline:
            continue
        print(json.dumps({"begin": case.name}), file=lines, flush=True)
        faulthandler.dump_traceback_later(min(case.seconds, max(1.0, deadline - started)), exit=True)
        try:
            figures = case.measure()
        except torch.AcceleratorError:
            raise  # the device answers this process no more
        except Exception as error:
            traceback.print_exc()
            figures = {"error": f"{type(error).__name__}: {tail(str(error))}"}
        seconds = time.monotonic() - started
        print(json.dumps({"end": case.name, "figures": figures, "seconds": seconds}), file=lines, flush=True)
        faulthandler.dump_traceback_later(_START_SECONDS, exit=True)
        free_memory(scale)
    faulthandler.cancel_dump_traceback_later()


def tail(message: str) -> str:
    """What a report shows of a message: its last lines, or where a process was that took too long."""
    lines = [line for line in message.strip().splitlines() if "[__recompiles]" not in line]
    if any(line.startswith("Timeout (") for line in lines):
        last = max(place for place, line in enumerate(lines) if "most recent call first" in line)
        return "\n".join(["stopped at its time limit, in", *lines[last + 1 : last + 9]])
    return "\n".join(lines[-10:])[-1500:]


def has_failed(figures: Figures) -> bool:
    """Whether a case has no figures, or such as it must not have."""
    return "error" in figures or figures.get("passed") is False


@dataclass
class Measurement:
    """One part under way. `figures` of its cases grow as they end."""

    part: str
    scale: Scale
    command: list[str]
    """Starts this program."""
    deadline: float
    """As time.monotonic counts."""
    log: Path
    figures: dict[str, Figures]

    def run(self) -> Figures:
        """Have every case measured: what is kept of the part."""
        started = time.monotonic()
        self.log.unlink(missing_ok=True)
        part = PARTS[self.part]
        processes = self.scale.processes if part.shared else 1
        with ThreadPoolExecutor(processes) as pool:
            list(pool.map(self._run_share, range(processes)))
        part.compare({case: figures for case, figures in self.figures.items() if "error" not in figures})
        about = inspect.cleandoc(part.cases.__doc__ or "")
        return {"about": about, "seconds": time.monotonic() - started, "cases": self.figures}

    def _run_share(self, share: int) -> None:
        done: list[str] = []
        stopped: str | None = ""
        while stopped not in (None, _START) and time.monotonic() < self.deadline:
            stopped = self._run_process(share, done)

    def _run_process(self, share: int, done: list[str]) -> str | None:
        """Go on after the cases `done`, which grow; the case that the process ended in, if it did."""
        seconds = self.deadline - time.monotonic()
        task = ["--worker", self.part, "--share", str(share), "--seconds", str(seconds), "--done", *done]
        environment = {**os.environ, "TORCH_LOGS": "recompiles"}
        if PARTS[self.part].shared:
            threads = str(max(1, (os.cpu_count() or 1) // self.scale.processes))
            environment |= {"TORCHINDUCTOR_COMPILE_THREADS": threads, "OMP_NUM_THREADS": threads}
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as stderr:
            process = subprocess.Popen(
                [*self.command, *task],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,  # so that compilers which it starts end with it
            )

            def kill() -> None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

            # It ends by itself, unless it can't.
            guard = threading.Timer(seconds + GRACE, kill)
            guard.start()
            running: str | None = _START
            assert process.stdout is not None
            for line in process.stdout:
                news = json.loads(line)
                running = news.get("begin")
                if running is None:
                    self._note(news["end"], news["figures"], news["seconds"])
                    done.append(news["end"])
            guard.cancel()
            kill()
            process.wait()
            stderr.seek(0)
            messages = stderr.read()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(messages)
        if running is not None:
            self._note(running, {"error": tail(messages) or f"the process ended with status {process.returncode}"}, 0.0)
            done.append(running)
        return running

    def _note(self, case: str, figures: Figures, seconds: float) -> None:
        self.figures[case] = figures
        print(f"{self.part:10} {'FAILED' if has_failed(figures) else 'ok':6} {seconds:6.1f} s  {case}", flush=True)


def markdown(report: Mapping[str, Any]) -> str:
    """The tables: cases with the same figures share one, and a list of figures is one of its own."""
    lines = ["# CUDA check-up", "", *(f"- {key}: {value}" for key, value in report["machine"].items()), ""]
    for name, part in report["parts"].items():
        cases = part["cases"]
        measured = {case: figures for case, figures in cases.items() if "error" not in figures}
        lines += [f"## {name}: {len(measured)} of {len(cases)} cases, {part['seconds']:.0f} s", "", part["about"], ""]
        kinds: dict[tuple[str, ...], list[Figures]] = {}
        for case, figures in measured.items():
            row = {"case": case, **{key: value for key, value in figures.items() if not isinstance(value, list)}}
            kinds.setdefault(tuple(row), []).append(row)
        for rows in kinds.values():
            lines += table(rows)
        for case, figures in measured.items():
            for key, value in figures.items():
                if isinstance(value, list):
                    lines += [f"{case}: {key}", "", *table(value)]
        failed = [(case, figures["error"]) for case, figures in cases.items() if "error" in figures]
        lines += [line for case, error in failed for line in (f"**{case}** failed:", "", "```", error, "```", "")]
    return "\n".join(lines)


def table(rows: Sequence[Figures]) -> list[str]:
    """Rows with the same keys."""
    if not rows:
        return ["none", ""]
    cells = [list(rows[0]), ["---"] * len(rows[0]), *([shown(value) for value in row.values()] for row in rows)]
    return [*("| " + " | ".join(row) + " |" for row in cells), ""]


def shown(value: object) -> str:
    """A figure in a table."""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def said_by(*command: str) -> str:
    """The first line that a command prints; empty where it can't."""
    try:
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().partition("\n")[0]


def machine(scale: Scale) -> dict[str, str]:
    """What is measured on."""
    cpus = Path("/proc/cpuinfo")
    names = [line for line in cpus.read_text(encoding="utf-8").splitlines() if "model name" in line] if cpus.exists() else []
    gpu = said_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": scale.device,
        "GPU, memory, driver": gpu or "unknown: no nvidia-smi here",
        "CPU": f"{os.cpu_count()} x {names[0].partition(':')[2].strip() if names else platform.machine()}",
        "torch, Python": f"{torch.__version__}, {platform.python_version()}",
        "commit": said_by("git", "rev-parse", "--short", "HEAD") or "unknown: no git here",
        "sizes": f"batch {scale.batch} x {scale.positions}, vocabulary {scale.vocabulary:,}",
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="time for everything; what doesn't fit is reported as not run")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    add("--data", type=user_path, help="folder of conversations, and of puzzles under sudoku/; default: generated ones")
    add("--rehearse", action="store_true", help="tiny sizes on a CPU")
    add("--output", type=user_path, help="folder of the report; default: the variable OUT, else checkpoints/cuda")
    add("--worker", choices=PARTS, help=argparse.SUPPRESS)
    add("--share", type=int, default=0, help=argparse.SUPPRESS)
    add("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    add("--done", nargs="*", default=[], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device: --rehearse runs the check-up with tiny sizes on a CPU")
    if arguments.data is not None and not arguments.data.is_dir():
        raise UsageError(f"--data {arguments.data}: there is no such folder")
    return arguments


def main() -> None:
    """Run the parts, or be a process of one. Exit status 1 if a case failed or wasn't run."""
    arguments = parse_arguments()
    scale = dataclasses.replace(REHEARSAL if arguments.rehearse else Scale(), data=arguments.data)
    if arguments.worker is not None:
        work(arguments.worker, scale, arguments.share, arguments.seconds, arguments.done)
        return
    deadline = time.monotonic() + 60 * arguments.minutes
    output = output_folder(arguments.output or user_path(os.environ.get("OUT", "checkpoints/cuda")))
    command = [sys.executable, "-m", "benchmarks.cuda", *(["--rehearse"] if arguments.rehearse else [])]
    command += ["--data", str(arguments.data)] if arguments.data else []
    report: Figures = {"machine": machine(scale), "parts": {}}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    parts = [name for name in PARTS if name in arguments.only]
    for place, name in enumerate(parts):
        # What a part leaves of its share goes to those after it.
        share = PARTS[name].weight / sum(PARTS[other].weight for other in parts[place:])
        until = time.monotonic() + share * (deadline - time.monotonic())
        not_run: dict[str, Figures] = {case.name: {"error": "not run: no time left"} for case in PARTS[name].cases(scale)}
        measured = Measurement(name, scale, command, until, output / f"{name}.log", not_run).run()
        report["parts"][name] = measured
        write_json(output / "cuda.json", report)
        (output / "cuda.md").write_text(markdown(report), encoding="utf-8")
        print(f"{name}: {measured['seconds']:.0f} s", flush=True)
    print(markdown(report))
    cases = [figures for part in report["parts"].values() for figures in part["cases"].values()]
    if failed := sum(map(has_failed, cases)):
        sys.exit(f"{failed} of {len(cases)} cases failed or weren't run")


if __name__ == "__main__":
    with one_clear_message():
        main()
