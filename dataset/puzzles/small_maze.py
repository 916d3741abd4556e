"""Generates small mazes: walls, a start, and a goal with a unique shortest path. Knows no files."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from dataset.puzzles.dihedral import FORMS, dihedral
from dataset.puzzles.draws import raw_bits, uniform
from dataset.puzzles.maze import BLANK, GOAL, PATH, START, WALL, Mazes, distances, path_cells

WALLS = 0.35
# Fraction of mazes held out.
HELD_OUT = 0.1
_DRAWN_AT_ONCE = 4096
# Stop after this many draws without a suitable maze.
_MOST_VAIN_DRAWS = 20


def draw_puzzles(counts: dict[str, int], side: int, min_steps: int, seed: int) -> dict[str, tuple[Mazes, Mazes]]:
    """Questions and answers [count, side, side] of the splits "train" and "test", distinct up to
    symmetry.

    A hash of the seed and of the class of symmetric forms decides which mazes are test mazes. The
    goal is drawn uniformly from the cells with a unique shortest path of at least `min_steps`
    steps. Raises `UsageError` if there are too few such mazes.
    """
    found: dict[str, list[Mazes]] = {split: [] for split in counts}
    seen: set[bytes] = set()
    vain = 0
    for questions in _drawn(side, min_steps, seed):
        vain += 1
        forms = [np.ascontiguousarray(dihedral(questions, form)).reshape(-1, side * side) for form in range(FORMS)]
        for index, question in enumerate(questions):
            key = min(cells[index].tobytes() for cells in forms)
            split = "test" if uniform(raw_bits(seed, "split", key.hex()), 1)[0] < HELD_OUT else "train"
            if key not in seen and len(found[split]) < counts[split]:
                seen.add(key)
                found[split].append(question)
                vain = 0
        if all(len(found[split]) == count for split, count in counts.items()):
            break
        if vain == _MOST_VAIN_DRAWS:
            missing = ", ".join(f"{len(found[split])} of {count} {split} mazes" for split, count in counts.items())
            raise UsageError(
                f"found only {missing} of side {side} with a single shortest path of {min_steps} steps or more: use shorter "
                "paths (--min-steps), a larger --side or fewer mazes"
            )
    puzzles = {}
    for split, mazes in found.items():
        questions = np.stack(mazes)
        puzzles[split] = questions, np.where(path_cells(questions) & (questions == BLANK), PATH, questions).astype(np.uint8)
    return puzzles


def _drawn(side: int, min_steps: int, seed: int) -> Iterator[Mazes]:
    """An endless stream of suitable mazes, in batches."""
    block = 0
    while True:
        bits = raw_bits(seed, "mazes", side, block)
        block += 1
        is_open = uniform(bits, _DRAWN_AT_ONCE, side, side) >= WALLS
        start = _one_of(is_open, uniform(bits, *is_open.shape))
        steps, ways = distances(is_open, start)
        goal = _one_of((steps >= min_steps) & (ways == 1), uniform(bits, *is_open.shape))
        fit = goal.any(axis=(1, 2))
        mazes = np.where(is_open, BLANK, WALL)
        mazes[start], mazes[goal] = START, GOAL
        yield mazes[fit].astype(np.uint8)


def _one_of(cells: npt.NDArray[np.bool_], keys: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """In each maze, the one of these cells with the largest key, if any: bool, same shape."""
    keys = np.where(cells, keys, -1.0)
    largest: npt.NDArray[np.bool_] = keys == keys.max(axis=(1, 2), keepdims=True)
    return cells & largest
