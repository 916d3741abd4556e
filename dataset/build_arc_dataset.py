"""Command: builds an ARC data set from Kaggle-form JSON, with the arguments and the output of the
original's builder.

    python -m dataset.build_arc_dataset --input-file-prefix kaggle/combined/arc-agi --output-dir data/arc1concept-aug-1000 \\
        --subsets training evaluation concept --test-set-name evaluation

Reads <prefix>_<subset>_challenges.json and <prefix>_<subset>_solutions.json. A test subset's
demonstration pairs are for training, its test pairs for testing; all pairs of other subsets are for
training. This file knows the files; `dataset/puzzles/arc_grids.py` knows the grids.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

if __package__ in (None, ""):  # started as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tqdm import tqdm

from config.errors import UsageError, one_clear_message
from dataset.puzzles.arc_grids import (
    NAME_SEPARATOR,
    SEQ_LEN,
    VOCAB_SIZE,
    Augmentation,
    Codes,
    Pair,
    canonical_pair,
    draw_augmentations,
    lay_out,
    parse_grid,
)
from dataset.puzzles.draws import raw_bits
from dataset.puzzles.storage import (
    BLANK_IDENTIFIER,
    TEST_PUZZLES_FILE,
    Split,
    SplitFiles,
    create_split,
    new_dataset,
    read_json,
    write_identifiers,
)


@dataclass(frozen=True, eq=False)
class Puzzle:
    """A task: its pairs by split, and its JSON if it is a test puzzle."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    source: dict[str, Any] | None

    def pairs(self, split: Split) -> tuple[Pair, ...]:
        """The pairs of one split."""
        return self.train if split == "train" else self.test


def read_puzzles(prefix: str, subsets: Sequence[str], test_sets: Sequence[str]) -> list[Puzzle]:
    """The puzzles of all subsets, in the order of the files. Raises `UsageError` that names a wrong puzzle and its file."""
    puzzles: dict[str, Puzzle] = {}
    for subset in subsets:
        path = Path(f"{prefix}_{subset}_challenges.json")
        tasks = read_json(path)
        is_test_set = subset in test_sets
        solutions_path = Path(f"{prefix}_{subset}_solutions.json")
        solutions = read_json(solutions_path) if solutions_path.exists() else None
        if not isinstance(tasks, dict) or not isinstance(solutions, dict | None):
            raise UsageError(f"{path} and its solutions: expected JSON objects with a puzzle for each key")
        if solutions is None:
            print(f"{subset}: no {solutions_path}; test pairs without an output get a single black cell as output")
        for name, task in tasks.items():
            try:
                if name in puzzles:
                    raise ValueError("the puzzle is in an earlier subset, too")
                if NAME_SEPARATOR in name:
                    raise ValueError(f"a puzzle's name must not contain {NAME_SEPARATOR!r}")
                puzzles[name] = _read_puzzle(name, task, None if solutions is None else solutions.get(name), is_test_set)
            except (ValueError, TypeError, KeyError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else error
                raise UsageError(f"{path}, puzzle {name!r}: {reason}") from error
    return list(puzzles.values())


def _read_puzzle(name: str, task: Any, outputs: Any, is_test_set: bool) -> Puzzle:
    demonstrations, questions = task["train"], [dict(pair) for pair in task["test"]]
    if outputs is not None:
        if len(outputs) != len(questions):
            raise ValueError(f"{len(questions)} test pairs, and {len(outputs)} solutions")
        for pair, output in zip(questions, outputs, strict=True):
            pair["output"] = output
    elif not is_test_set and any("output" not in pair for pair in questions):
        raise ValueError("its test pairs are for training and have no output: solutions are missing")
    for pair in questions:
        pair.setdefault("output", [[0]])
    if not demonstrations or not questions:
        raise ValueError("expected demonstration and test pairs, found none")
    shown, asked = (
        tuple(Pair(parse_grid(pair["input"]), parse_grid(pair["output"])) for pair in pairs)
        for pairs in (demonstrations, questions)
    )
    if is_test_set:
        return Puzzle(name, shown, asked, {"train": demonstrations, "test": questions})
    return Puzzle(name, shown + asked, (), None)


def without_test_pairs(puzzles: Sequence[Puzzle]) -> tuple[list[Puzzle], int]:
    """Leave out training pairs that equal a test pair of another puzzle up to augmentation, as public
    subsets share pairs; also returns their number. A puzzle's own demonstrations stay.
    """
    asked: dict[bytes, set[str]] = {}
    for puzzle in puzzles:
        for pair in puzzle.test:
            asked.setdefault(canonical_pair(pair), set()).add(puzzle.name)
    kept = []
    for puzzle in puzzles:
        own = {puzzle.name}
        train = tuple(pair for pair in puzzle.train if not asked.get(canonical_pair(pair), own) - own)
        kept.append(Puzzle(puzzle.name, train, puzzle.test, puzzle.source))
    removed = sum(len(puzzle.train) for puzzle in puzzles) - sum(len(puzzle.train) for puzzle in kept)
    return [puzzle for puzzle in kept if puzzle.train or puzzle.test], removed


def _forms_of(puzzle: Puzzle, count: int, seed: int) -> Codes:
    return draw_augmentations(puzzle.train + puzzle.test, count, seed, puzzle.name)


def _fill(puzzle: Puzzle, split: Split, forms: Codes, first_row: int, *, files: dict[Split, SplitFiles], seed: int) -> None:
    shift = raw_bits(seed, "places", puzzle.name) if split == "train" else None
    inputs, labels = lay_out(puzzle.pairs(split), forms, shift)
    files[split].write(first_row, inputs.reshape(-1, SEQ_LEN), labels.reshape(-1, SEQ_LEN))


def build(
    prefix: str,
    output_dir: str | Path,
    subsets: Sequence[str],
    test_sets: Sequence[str],
    *,
    num_aug: int = 1000,
    seed: int = 42,
    identifiers_start: int = 1,
    processes: int | None = None,
) -> dict[str, int]:
    """Write the data set; returns counts. The result is the same for any number of processes.
    Raises `UsageError`.

    A process holds one puzzle with its augmentations at a time: at most about 20 MB per array for
    1000 augmentations.
    """
    if num_aug < 0 or identifiers_start < 1 or (processes is not None and processes < 1):
        raise UsageError(
            f"expected --num-aug of at least 0, --puzzle-identifiers-start and --processes of at least 1, found {num_aug}, "
            f"{identifiers_start} and {processes}"
        )
    if test_sets[0] not in subsets or len(set(subsets)) < len(subsets):
        raise UsageError(
            f"expected different --subsets with {test_sets[0]!r} (--test-set-name) among them, found {' '.join(subsets)}"
        )
    puzzles, removed = without_test_pairs(read_puzzles(prefix, subsets, test_sets))
    with new_dataset(output_dir) as folder, _mapping(processes) as in_order:
        bar = partial(tqdm, unit="puzzle", disable=None)
        drawn = in_order(partial(_forms_of, count=num_aug, seed=seed), puzzles)
        forms = list(bar(drawn, total=len(puzzles), desc="augmentations"))
        first_identifiers = identifiers_start + np.cumsum([0, *map(len, forms)])
        files: dict[Split, SplitFiles] = {}
        parts: list[tuple[Puzzle, Split, Codes, int]] = []  # and where its rows begin
        counts = Counter(puzzles=len(puzzles), pairs_left_out=removed, identifiers=int(first_identifiers[-1]))
        counts["short_of_augmentations"] = sum(len(of_puzzle) <= num_aug for of_puzzle in forms)
        for split in get_args(Split):
            present = [index for index, puzzle in enumerate(puzzles) if puzzle.pairs(split)]
            puzzles_per_group = [len(forms[index]) for index in present]
            pairs = [len(puzzles[index].pairs(split)) for index in present]
            files[split] = create_split(
                folder / split,
                seq_len=SEQ_LEN,
                vocab_size=VOCAB_SIZE,
                num_puzzle_identifiers=counts["identifiers"],
                puzzles_per_group=puzzles_per_group,
                examples_per_puzzle=np.repeat(pairs, puzzles_per_group),
                puzzle_identifiers=np.concatenate([np.arange(*first_identifiers[index : index + 2]) for index in present]),
                total_puzzles=sum(puzzles_per_group),
            )
            first_rows = np.cumsum([0, *np.multiply(puzzles_per_group, pairs)]).tolist()
            parts += [(puzzles[i], split, forms[i], row) for i, row in zip(present, first_rows, strict=False)]
            counts[f"{split}_groups"], counts[f"{split}_examples"] = len(present), first_rows[-1]
        deque(bar(in_order(partial(_fill, files=files, seed=seed), *zip(*parts, strict=True)), total=len(parts), desc="grids"), 0)
        names = [BLANK_IDENTIFIER] * identifiers_start
        for puzzle, (_, *augmentations) in zip(puzzles, forms, strict=True):
            names += [puzzle.name, *(Augmentation.of(code).name(puzzle.name) for code in augmentations)]
        write_identifiers(folder, names)
        tests = {puzzle.name: puzzle.source for puzzle in puzzles if puzzle.source is not None}
        (folder / TEST_PUZZLES_FILE).write_text(json.dumps(tests), encoding="utf-8")
    return dict(counts)


@contextlib.contextmanager
def _mapping(processes: int | None) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over `processes`; with 1, in this process."""
    if processes == 1:
        yield map
        return
    # spawn: the new interpreters import this file, without torch. Only the caller handles Ctrl-C.
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=ignore_interrupt)
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise UsageError("a process ended early, probably out of memory: use fewer processes (--processes 1)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exit status 2 and one message if the input can't be used."""
    parser = argparse.ArgumentParser(description="Build an ARC data set.")
    parser.add_argument("--input-file-prefix", type=os.path.expanduser, required=True, help="path before _<subset>_challenges.json")
    parser.add_argument("--output-dir", type=os.path.expanduser, required=True, help="folder of the data set; must not exist")
    parser.add_argument("--subsets", required=True, nargs="+", help="subsets to read")
    parser.add_argument("--test-set-name", required=True, help="subset whose test pairs are the test split")
    parser.add_argument("--test-set-name2", default="evaluation2", help="a second one, if it is among the subsets")
    parser.add_argument("--seed", type=int, default=42, help="seed of augmentations and translations")
    parser.add_argument("--num-aug", type=int, default=1000, help="augmented forms of each puzzle")
    parser.add_argument("--puzzle-identifiers-start", type=int, default=1, help="first identifier, to keep two data sets apart")
    parser.add_argument("--processes", type=int, help="number of processes; default: one for each CPU")
    options = parser.parse_args(arguments)
    with one_clear_message():
        test_sets = options.test_set_name, options.test_set_name2
        limits = {"num_aug": options.num_aug, "seed": options.seed, "processes": options.processes}
        start = options.puzzle_identifiers_start
        counts = build(options.input_file_prefix, options.output_dir, options.subsets, test_sets, identifiers_start=start, **limits)
        print(
            f"wrote {options.output_dir}: {counts['train_groups']:,} groups with {counts['train_examples']:,} training examples, "
            f"{counts['test_groups']:,} with {counts['test_examples']:,} test examples, {counts['identifiers']:,} identifiers; "
            f"{counts['short_of_augmentations']} puzzles have fewer than {options.num_aug} augmentations; "
            f"left out {counts['pairs_left_out']} training pairs that are test pairs of another puzzle"
        )


if __name__ == "__main__":
    main()
