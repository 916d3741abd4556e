"""Mazes: characters, tokens, and shortest paths of many mazes at once. Knows no files.

A maze is a square of `#` wall, space, `S` start and `G` goal; in an answer `o` marks a shortest
path between them. Tokens are 1 to 5 in the order of CHARACTERS, 0 is padding.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

CHARACTERS = "# SGo"
WALL, BLANK, START, GOAL, PATH = range(1, 1 + len(CHARACTERS))
VOCAB_SIZE = 1 + len(CHARACTERS)

Mazes = npt.NDArray[np.uint8]
_UNREACHED = -1
_SEVERAL = 2


def to_tokens(codes: npt.NDArray[np.uint8]) -> Mazes:
    """Tokens of ASCII codes; 0 for any other character."""
    tokens = np.zeros(256, np.uint8)
    tokens[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(1, VOCAB_SIZE)
    return tokens[codes]


def distances(is_open: npt.NDArray[np.bool_], origin: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """Breadth-first search in many mazes at once, in steps up, down, left and right.

    is_open, origin: bool [N, R, C]; origins are open. Returns int16 [N, R, C], the steps from an
    origin, -1 if unreachable, and uint8 [N, R, C], the number of shortest paths: 0, 1, or 2 for two
    and more.
    """
    # A border of walls, so that steps off the maze end there.
    rim = ((0, 0), (1, 1), (1, 1))
    front = np.pad(origin & is_open, rim).astype(np.uint8)
    free = np.pad(is_open, rim) & (front == 0)
    steps = np.where(front > 0, 0, _UNREACHED).astype(np.int16)
    ways = front.copy()
    step = 0
    while front.any():
        step += 1
        reached = np.zeros_like(front)
        reached[:, 1:-1, 1:-1] = front[:, :-2, 1:-1] + front[:, 2:, 1:-1] + front[:, 1:-1, :-2] + front[:, 1:-1, 2:]
        front = np.where(free, np.minimum(reached, _SEVERAL), np.uint8(0))
        is_new = front > 0
        free &= ~is_new
        steps[is_new] = step
        ways += front
    inside: Any = np.s_[:, 1:-1, 1:-1]
    return steps[inside], ways[inside]


def shortest_paths(questions: Mazes) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.uint8]]:
    """For mazes [N, R, C]: steps from start to goal [N], -1 if unreachable, and number of shortest
    paths [N], 2 for two and more.
    """
    steps, ways = distances(questions != WALL, questions == START)
    goal = questions == GOAL
    return steps[goal], ways[goal]


def are_shortest(questions: Mazes, answers: Mazes) -> npt.NDArray[np.bool_]:
    """Which answers [N, R, C] mark exactly one shortest path, with one start and one goal."""
    steps, _ = shortest_paths(questions)
    # The marked cells alone: as many as a shortest path has, and the goal in as many steps.
    along, _ = distances((answers == PATH) | (answers == START) | (answers == GOAL), answers == START)
    marked = (answers == PATH).sum(axis=(1, 2))
    result: npt.NDArray[np.bool_] = (steps > 0) & (along[answers == GOAL] == steps) & (marked == steps - 1)
    return result


def path_cells(questions: Mazes) -> npt.NDArray[np.bool_]:
    """The cells on any shortest path of mazes [N, R, C], ends included; none without a path."""
    from_start, _ = distances(questions != WALL, questions == START)
    from_goal, _ = distances(questions != WALL, questions == GOAL)
    total = from_start[questions == GOAL][:, None, None]
    result: npt.NDArray[np.bool_] = (from_start >= 0) & (from_goal >= 0) & (from_start + from_goal == total)
    return result
