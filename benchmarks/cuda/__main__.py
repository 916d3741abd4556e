"""Checks and benchmarks on a CUDA device: correctness, speed, cost of training. One command; a CPU
can rehearse it.

    python -m benchmarks.cuda [--minutes 8 --only smoke train_step --data FOLDER --output FOLDER]
    python -m benchmarks.cuda --rehearse

Parts run in turn and share the minutes. Each has cases with their own time limits, which run in
another process: if one crashes or hangs, its message is recorded and a new process continues with
the next. After every part, `--output` (default: the environment variable OUT, else
checkpoints/cuda) has cuda.md, cuda.json, and the processes' output as PART-NUMBER.log, with reasons
of recompilation and stacks at a time limit. `--data` is a folder of conversations, as for
dataset=jsonl, and of Sudoku-Extreme's train.csv and test.csv under sudoku/; without it, data are
generated. `--rehearse` runs the same code on a CPU with tiny sizes and without compiling, and
reports parts that need CUDA.
"""

import argparse
import dataclasses
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from artifacts.outputs import output_folder, write_json
from benchmarks.common import markdown_table, parser
from benchmarks.cuda.cost import decoding, train_step
from benchmarks.cuda.measurement import Part, has_failed, measure
from benchmarks.cuda.runs import epoch, equal_flops, sudoku
from benchmarks.cuda.scale import REHEARSAL, Figures, Scale
from benchmarks.cuda.smoke import smoke
from config.errors import UsageError, one_clear_message
from config.schema import user_path

PARTS = {
    "smoke": Part(smoke, 90, processes=6),
    "train_step": Part(train_step, 140),
    "decoding": Part(decoding, 70),
    "epoch": Part(epoch, 70),
    "equal_flops": Part(equal_flops, 180),
    "sudoku": Part(sudoku, 60),
}
_REPOSITORY = Path(__file__).resolve().parents[2]


def markdown(report: Mapping[str, Any]) -> str:
    """The report's tables: one for cases with the same figures, and one for each list of figures."""
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
            lines += [*table(rows), ""]
        for case, figures in measured.items():
            for key, value in figures.items():
                if isinstance(value, list):
                    lines += [f"{case}: {key}", "", *table(value), ""]
        for case, figures in cases.items():
            if "error" in figures:
                lines += [f"**{case}** failed:", "", "```", figures["error"], "```", ""]
    return "\n".join(lines)


def table(rows: Sequence[Figures]) -> list[str]:
    """A row for each of `rows`."""
    return markdown_table([{key: shown(value) for key, value in row.items()} for row in rows])


def shown(value: object) -> str:
    """A figure in a table."""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def said_by(*command: str) -> str:
    """The first line that a command prints; "unknown" where it can't."""
    try:
        done = subprocess.run(command, cwd=_REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().partition("\n")[0]


def machine(scale: Scale) -> dict[str, str]:
    """The machine and the versions."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": scale.device,
        "GPU, memory, driver": said_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"),
        "CPU": said_by("grep", "-m1", "model name", "/proc/cpuinfo").partition(": ")[2],
        "threads, cores": f"{torch.get_num_threads()}, {os.cpu_count()}",
        "torch, Python": f"{torch.__version__}, {platform.python_version()}",
        "commit": said_by("git", "rev-parse", "--short", "HEAD"),
        "sizes": f"batch {scale.batch} x {scale.positions}, vocabulary {scale.vocabulary:,}",
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    flags = parser(__doc__)
    add = flags.add_argument
    add("--minutes", type=float, default=8.0, help="time limit in all; remaining cases are reported as not run")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    add("--data", type=user_path, help="folder of conversations, and of puzzles under sudoku/; default: generated ones")
    add("--rehearse", action="store_true", help="tiny sizes on a CPU")
    add("--output", type=user_path, help="folder of the report; default: the variable OUT, else checkpoints/cuda")
    arguments = flags.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device: --rehearse runs the check-up with tiny sizes on a CPU")
    if arguments.data is not None and not arguments.data.is_dir():
        raise UsageError(f"--data {arguments.data}: there is no such folder")
    return arguments


def main() -> None:
    """Run the parts. Exit status 1 if a case failed or wasn't run."""
    arguments = parse_arguments()
    scale = dataclasses.replace(REHEARSAL if arguments.rehearse else Scale(), data=arguments.data)
    end = time.monotonic() + 60 * arguments.minutes
    output = output_folder(arguments.output or user_path(os.environ.get("OUT", "checkpoints/cuda")))
    report: Figures = {"machine": machine(scale), "parts": {}}
    print("\n".join(f"{key}: {value}" for key, value in report["machine"].items()), flush=True)
    parts = {name: part for name, part in PARTS.items() if name in arguments.only}
    waiting = sum(part.weight for part in parts.values())
    for name, part in parts.items():
        # Time that a part leaves goes to the next ones.
        now = time.monotonic()
        timed = dataclasses.replace(scale, deadline=now + part.weight / waiting * (end - now))
        waiting -= part.weight
        if arguments.rehearse:
            part = dataclasses.replace(part, processes=min(2, part.processes))
        report["parts"][name] = measure(name, part, timed, output)
        write_json(output / "cuda.json", report)
        (output / "cuda.md").write_text(markdown(report), encoding="utf-8")
        print(f"{name}: {report['parts'][name]['seconds']:.0f} s", flush=True)
    print(markdown(report))
    cases = [figures for part in report["parts"].values() for figures in part["cases"].values()]
    if failed := sum(map(has_failed, cases)):
        sys.exit(f"{failed} of {len(cases)} cases failed or weren't run")


if __name__ == "__main__":
    with one_clear_message():
        main()
