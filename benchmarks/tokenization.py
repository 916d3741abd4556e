"""Tokenization with one and two processes against the naive way, which encodes row by row and keeps
all tensors.

    python benchmarks/tokenization.py [--rows 100000 --naive-rows 20000]
    python benchmarks/tokenization.py --source data/slimorca/SlimOrca.jsonl
    python benchmarks/tokenization.py --before ../earlier-checkout

Each side runs in its own process, on the same file, which is generated unless one is named: words
that the tokenizer knows, with realistic frequencies, in rows as long as SlimOrca's. Peak memory is
that of a side's process and its workers, without mapped files. The naive side may read fewer rows,
because its memory grows with them; rates are comparable. "second_start_s" is the time to open an
existing cache. --before also measures an earlier version of the program. Last line: JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config.compose import compose_config
from config.schema import user_path
from dataset.instruct import Source
from dataset.text.conversation import Template
from dataset.text.forms import to_conversation
from dataset.text.rows import open_row_file, parse_row
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path

REPOSITORY = Path(__file__).resolve().parents[1]
SYSTEM = "You are a helpful assistant."
# About 1.9 kB per row, SlimOrca's average.
_PROMPT_WORDS, _ANSWER_WORDS = 190, 140
_GENERATED_AT_ONCE = 1000


def generate(path: Path, rows: int, tokenizer: Tokenizer, seed: int) -> None:
    """Write `rows` SlimOrca-like conversations, the same for the same seed."""
    rng = np.random.default_rng(seed)
    pieces = (tokenizer.piece(token) for token in range(tokenizer.vocab_size))
    words = np.array([piece[1:] for piece in pieces if piece.startswith("\u2581") and piece[1:].isalpha() and piece.isprintable()])
    # Zipf's law, as in real text: a few words are most of it.
    frequency = np.cumsum(1 / np.arange(1, len(words) + 1))

    def texts(mean: int, count: int) -> list[str]:
        sizes = np.maximum(1, rng.gamma(2.0, mean / 2, count).astype(int))
        drawn = words[np.searchsorted(frequency, rng.random(sizes.sum()) * frequency[-1])]
        return [" ".join(part) for part in np.split(drawn, np.cumsum(sizes)[:-1])]

    with path.open("w", encoding="utf-8") as handle:
        for begin in range(0, rows, _GENERATED_AT_ONCE):
            count = min(_GENERATED_AT_ONCE, rows - begin)
            for number, (prompt, answer) in enumerate(
                zip(texts(_PROMPT_WORDS, count), texts(_ANSWER_WORDS, count), strict=True), begin
            ):
                turns = [{"from": "system", "value": SYSTEM}, {"from": "human", "value": f"{prompt} {number}?"}]
                handle.write(json.dumps({"conversations": [*turns, {"from": "gpt", "value": answer}]}) + "\n")


def naive(path: Path, tokenizer: Tokenizer, seq_len: int, rows: int) -> dict[str, Any]:
    """Encode row by row into torch tensors, and keep them all in memory."""
    import torch

    template, tensors, tokens = Template(), [], 0
    started = time.perf_counter()
    for number, data in open_row_file(path).rows():
        if number > rows:
            break
        assert isinstance(data, bytes)
        ids: list[int] = []
        labels: list[int] = []
        for turn in to_conversation(parse_row(data))[0]:
            assert turn.role != "text"
            is_answer = turn.role == "assistant"
            opening = [tokenizer.bos_id, *tokenizer.encode(template.tag(turn.role))]
            text = [*tokenizer.encode(turn.text), *([tokenizer.eos_id] if is_answer else [])]
            ids += [*opening, *text]
            labels += [*([-100] * len(opening)), *(text if is_answer else [-100] * len(text))]
        ids, labels = ids[: seq_len + 1], labels[: seq_len + 1]
        tokens += len(ids)
        tensors.append((torch.tensor(ids[:-1], dtype=torch.long), torch.tensor(labels[1:], dtype=torch.long)))
    return {"rows": len(tensors), "tokens": tokens, "seconds": time.perf_counter() - started}


def cached(path: Path, tokenizer: Tokenizer, seq_len: int, processes: int, cache_dir: Path) -> dict[str, Any]:
    """Build the cache, or open an existing one."""
    changes = {"data_dir": str(path.parent), "files": (path.name,), "seq_len": seq_len, "processes": processes}
    changes |= {"cache_dir": str(cache_dir)}
    config = compose_config("cfg_pretrain_instruct", ["dataset=jsonl", "dataset.test_ratio=0", "dataset.on_bad_row=skip"]).dataset
    config = config.model_copy(update=changes)  # not as overrides, which may need quotes around a path
    started = time.perf_counter()
    data = Source(config).open_split("train", tokenizer, Template())
    seconds = time.perf_counter() - started
    return {
        "rows": data.counts["read"],
        "tokens": int(data.column("length").sum()),
        "seconds": seconds,
        "data_hash": data.data_hash,
    }


def _side(arguments: argparse.Namespace) -> dict[str, Any]:
    """The measurement in one process, started by `_run`."""
    tokenizer = Tokenizer(resolve_tokenizer_path(arguments.tokenizer_path))
    if arguments.side == "naive":
        return naive(arguments.source, tokenizer, arguments.seq_len, arguments.naive_rows)
    return cached(arguments.source, tokenizer, arguments.seq_len, arguments.processes, arguments.cache_dir)


def _run(arguments: argparse.Namespace, *more: str, repository: Path = REPOSITORY) -> dict[str, Any]:
    """One side in a new process, of this version of the program or another.

    Adds the peak memory of the process and its workers together, and the time of the whole process.
    """
    shared = ["--source", arguments.source, "--seq-len", arguments.seq_len, "--naive-rows", arguments.naive_rows]
    shared += ["--tokenizer-path", arguments.tokenizer_path] if arguments.tokenizer_path else []
    command = [sys.executable, str(repository / "benchmarks/tokenization.py"), *map(str, shared), *more]
    started = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=repository, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            peak[0] = max(peak[0], _memory_of_tree(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, _ = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    report: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    report |= {"peak_memory_bytes": peak[0], "process_seconds": time.perf_counter() - started}
    return report


def _memory_of_tree(root: int) -> int:
    """Anonymous memory of a process and its descendants, in bytes; 0 without /proc."""
    parents, memory = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(
                line.split(":", 1) for line in (folder / "status").read_text(encoding="utf-8").splitlines() if ":" in line
            )
            pid = int(folder.name)
            parents[pid], memory[pid] = int(status["PPid"]), int(status["RssAnon"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            continue  # it has ended, or is a kernel thread
    tree = {root}
    while more := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= more
    return sum(memory.get(pid, 0) for pid in tree)


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides, one after the other."""
    generated_in = None
    if arguments.source is None:
        arguments.source = folder / "rows.jsonl"
        started = time.perf_counter()
        generate(arguments.source, arguments.rows, Tokenizer(resolve_tokenizer_path(arguments.tokenizer_path)), arguments.seed)
        generated_in = time.perf_counter() - started
        print(f"{arguments.rows:,} rows generated in {generated_in:.1f} s", flush=True)

    def rates(side: dict[str, Any]) -> dict[str, Any]:
        per_second = {f"{unit}_per_second": side[unit] / side["seconds"] for unit in ("rows", "tokens")}
        print(f"  {per_second['rows_per_second']:,.0f} rows/s, {side['peak_memory_bytes'] / 2**20:,.0f} MiB", flush=True)
        return {**side, **per_second}

    print("naive", flush=True)
    sides = {"naive": rates(_run(arguments, "--side", "naive"))}
    versions = [("", REPOSITORY), *([("before, ", arguments.before)] if arguments.before else [])]
    for processes in arguments.compared:
        for version, repository in versions:
            name = f"{version}{processes}"
            print(f"{name} process(es)", flush=True)
            flags = ["--side", "cached", "--processes", str(processes), "--cache-dir", str(folder / f"cache {name}")]
            sides[name] = rates(_run(arguments, *flags, repository=repository))
            second = _run(arguments, *flags, repository=repository)
            sides[name] |= {"second_start_s": second["seconds"], "second_start_process_s": second["process_seconds"]}
    hashes = {sides[str(processes)].pop("data_hash") for processes in arguments.compared}
    one, several = (sides[str(arguments.compared[index])]["rows_per_second"] for index in (0, -1))
    return {
        "ratio": several / sides["naive"]["rows_per_second"],
        "ratio_of_processes": several / one,
        "ratio_one_process": one / sides["naive"]["rows_per_second"],
        "same_bytes": len(hashes) == 1,
        "source_bytes": arguments.source.stat().st_size,
        "generated_in_s": generated_in,
        "seq_len": arguments.seq_len,
        "sides": sides,
    }


def main() -> None:
    """Parse, compare, print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--rows", type=int, default=100_000, help="rows to generate")
    flags.add_argument("--naive-rows", type=int, default=20_000, help="rows that the naive side reads")
    flags.add_argument("--source", type=user_path, help="a file to read instead")
    flags.add_argument("--seq-len", type=int, default=512)
    flags.add_argument("--compared", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    flags.add_argument("--folder", type=user_path, help="temporary folder for rows and caches; default: the system's")
    flags.add_argument("--tokenizer-path", type=os.path.expanduser, help="default: as a training run's")
    flags.add_argument(
        "--before", type=Path, metavar="FOLDER", help="an earlier version of the program, measured in turns with this one"
    )
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--side", help=argparse.SUPPRESS)
    flags.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    flags.add_argument("--cache-dir", type=user_path, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.side is not None:
        print(json.dumps(_side(arguments)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        print(json.dumps(compare(arguments, Path(folder))))


if __name__ == "__main__":
    main()
