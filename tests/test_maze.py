"""Shortest paths of many mazes at once, against a plain search of each."""

from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataset.puzzles.maze import BLANK, GOAL, PATH, START, WALL, are_shortest, distances, path_cells, shortest_paths, to_tokens

mazes = st.integers(2, 6).flatmap(
    lambda side: st.lists(arrays(np.bool_, (side, side)), min_size=1, max_size=4).map(lambda walls: np.stack(walls))
)


def plain_search(is_open: np.ndarray, origin: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    steps, ways = np.full(is_open.shape, -1), np.zeros(is_open.shape, int)
    steps[origin], ways[origin] = 0, 1
    queue = deque([origin])
    while queue:
        row, column = queue.popleft()
        for cell in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
            if not (0 <= cell[0] < len(is_open) and 0 <= cell[1] < len(is_open)) or not is_open[cell]:
                continue
            if steps[cell] < 0:
                steps[cell] = steps[row, column] + 1
                queue.append(cell)
            if steps[cell] == steps[row, column] + 1:
                ways[cell] += ways[row, column]
    return steps, ways


@given(mazes, st.data())
def test_distances_and_ways_are_those_of_a_plain_search(is_open: np.ndarray, data: st.DataObject) -> None:
    side = is_open.shape[1]
    origins = [(data.draw(st.integers(0, side - 1)), data.draw(st.integers(0, side - 1))) for _ in is_open]
    start = np.zeros_like(is_open)
    for index, origin in enumerate(origins):
        is_open[(index, *origin)] = start[(index, *origin)] = True
    steps, ways = distances(is_open, start)
    for index, origin in enumerate(origins):
        expected = plain_search(is_open[index], origin)
        np.testing.assert_array_equal(steps[index], expected[0])
        np.testing.assert_array_equal(ways[index], np.minimum(expected[1], 2))


def maze(*rows: str) -> np.ndarray:
    return to_tokens(np.frombuffer("".join(rows).encode(), np.uint8)).reshape(1, len(rows), -1)


def test_tokens_are_in_the_order_of_the_originals_characters() -> None:
    assert maze("# S", "Go?").ravel().tolist() == [WALL, BLANK, START, GOAL, PATH, 0]
    assert (WALL, BLANK, START, GOAL, PATH) == (1, 2, 3, 4, 5)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (("Soo", " #o", "  G"), True),
        (("S  ", "o# ", "ooG"), True),
        (("Soo", "o#o", "ooG"), False),  # both ways
        (("S o", " #o", "  G"), False),  # a gap
        (("S  ", " # ", "  G"), False),
        (("Soo", " #o", "o G"), False),  # a further cell
    ],
)
def test_an_answer_is_one_shortest_path_and_nothing_else(answer: tuple[str, ...], is_right: bool) -> None:
    question = maze("S  ", " # ", "  G")
    assert are_shortest(question, maze(*answer)).tolist() == [is_right]
    assert [count.tolist() for count in shortest_paths(question)] == [[4], [2]]


def test_a_detour_is_no_shortest_path() -> None:
    question, detour = maze("S G", "   ", "###"), maze("S G", "ooo", "###")
    assert not are_shortest(question, detour)[0]
    assert are_shortest(question, maze("SoG", "   ", "###"))[0]


def test_a_goal_out_of_reach_has_no_path() -> None:
    question = maze("S#G", " # ", " # ")
    assert [count.tolist() for count in shortest_paths(question)] == [[-1], [0]]
    assert not path_cells(question).any() and not are_shortest(question, question)[0]


def test_neighbours_need_no_cell_between_them() -> None:
    question = maze("SG", "  ")
    assert are_shortest(question, question)[0]


def test_cells_of_all_shortest_paths() -> None:
    assert path_cells(maze("S  ", " # ", "  G"))[0].tolist() == [[True, True, True], [True, False, True], [True, True, True]]
