"""Small mazes made here: one shortest path each, as long as asked, no maze twice or on both sides."""

import numpy as np
import pytest

from config.errors import UsageError
from dataset.puzzles.dihedral import FORMS, dihedral
from dataset.puzzles.maze import BLANK, PATH, are_shortest, shortest_paths
from dataset.puzzles.small_maze import HELD_OUT, draw_puzzles

COUNTS = {"train": 300, "test": 40}


def test_labels_are_the_only_shortest_path() -> None:
    for split, (questions, answers) in draw_puzzles(COUNTS, 7, 8, 0).items():
        assert questions.shape == answers.shape == (COUNTS[split], 7, 7)
        steps, ways = shortest_paths(questions)
        assert steps.min() >= 8 and np.all(ways == 1)
        assert are_shortest(questions, answers).all()
        np.testing.assert_array_equal(np.where(answers == PATH, BLANK, answers), questions)


def test_no_maze_is_twice_there_turned_or_mirrored_either() -> None:
    """4 x 4 mazes are few enough to meet one again."""
    puzzles = draw_puzzles({"train": 3000, "test": 300}, 4, 4, 0)
    keys = [min(dihedral(maze, form).tobytes() for form in range(FORMS)) for questions, _ in puzzles.values() for maze in questions]
    assert len(set(keys)) == len(keys)


def test_the_split_is_by_maze_and_not_by_what_was_asked_for() -> None:
    few, many = (draw_puzzles({"train": 200, "test": test}, 5, 4, 0) for test in (5, 25))
    np.testing.assert_array_equal(few["test"][0], many["test"][0][:5])
    np.testing.assert_array_equal(few["train"][0], many["train"][0])
    assert 0 < HELD_OUT < 0.5


def test_the_seed_decides() -> None:
    first, again, other = (draw_puzzles(COUNTS, 6, 6, seed)["train"][0] for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_mazes_that_there_are_not_are_told() -> None:
    with pytest.raises(UsageError, match=r"found only 0 of 300 train mazes.*--min-steps"):
        draw_puzzles(COUNTS, 3, 9, 0)
