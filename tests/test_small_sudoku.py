"""6x6 Sudoku made here: all grids, their classes, single solutions, and a test split of other classes."""

import itertools

import numpy as np
import pytest

from dataset.puzzles.draws import raw_bits
from dataset.puzzles.small_sudoku import HELD_OUT, deduced, draw_puzzles, held_out_grids, solution_grids, symmetry_classes
from dataset.puzzles.sudoku import SIX, agree, are_solutions, draw_symmetries, symmetric_forms


def test_these_are_all_grids_and_all_classes() -> None:
    """28,200,960 grids and 49 classes are the known numbers for 6x6 (Wikipedia, "Mathematics of Sudoku")."""
    grids = solution_grids()
    assert len(grids) * 720 == 28_200_960 and len(np.unique(grids, axis=0)) == len(grids)
    assert are_solutions(grids, SIX).all()
    assert len(np.unique(symmetry_classes())) == 49


def canonical(grid: np.ndarray) -> bytes:
    """The least of a grid's symmetric forms: rows and columns in any order that boxes allow, digits by first appearance."""

    def orders(blocks: int, size: int) -> list[list[int]]:
        within = list(itertools.permutations(range(size)))
        return [
            [block * size + line for block, lines in zip(order, choice, strict=True) for line in lines]
            for order in itertools.permutations(range(blocks))
            for choice in itertools.product(within, repeat=blocks)
        ]

    square = grid.reshape(6, 6)
    columns = np.array(orders(2, 3))
    best = b"\xff" * 36
    for rows in orders(3, 2):
        forms = square[rows][:, columns].transpose(1, 0, 2).reshape(len(columns), 36)
        names = np.zeros((len(columns), 7), np.uint8)
        np.put_along_axis(names, forms[:, :6], np.arange(1, 7, dtype=np.uint8)[None], axis=1)
        best = min(best, *(form.tobytes() for form in np.take_along_axis(names, forms, axis=1)))
    return best


def test_grids_are_of_one_class_exactly_if_their_canonical_forms_agree() -> None:
    classes, grids = symmetry_classes(), solution_grids()
    firsts, counts = np.unique(classes, return_counts=True)
    assert len({canonical(grids[first]) for first in firsts}) == len(firsts)
    for index in range(0, len(grids), 4000):
        assert canonical(grids[index]) == canonical(grids[classes[index]])
    assert counts.min() == 48 and counts.max() == 3456


def test_test_answers_are_no_symmetric_form_of_a_training_answer() -> None:
    splits = {split: draw_puzzles(split, 60, 30, 3)[1] for split in ("train", "test")}
    forms = {split: {canonical(answer) for answer in answers} for split, answers in splits.items()}
    assert not forms["train"] & forms["test"]
    for seed in range(3):
        assert HELD_OUT <= held_out_grids(seed).mean() < 0.2
    assert not np.array_equal(held_out_grids(0), held_out_grids(1))


def solutions(question: np.ndarray) -> int:
    """How many ways to fill it, up to 2, by trying."""
    blanks = np.flatnonzero(question == 0)
    if not len(blanks):
        return 1
    units = SIX.units()
    seen = [{int(question[c]) for unit in units if cell in unit for c in unit} for cell in blanks]
    tightest = int(np.argmax([len(digits) for digits in seen]))
    found = 0
    for digit in set(range(1, 7)) - seen[tightest]:
        filled = question.copy()
        filled[blanks[tightest]] = digit
        found += solutions(filled)
        if found >= 2:
            return 2
    return found


@pytest.mark.parametrize("clues", [0, 14])
def test_questions_have_one_solution_and_it_is_the_answer(clues: int) -> None:
    questions, answers = draw_puzzles("train", 15, clues, 0)
    assert are_solutions(answers, SIX).all() and agree(questions, answers).all()
    assert all(solutions(question) == 1 for question in questions)
    kept = (questions > 0).sum(axis=1)
    assert kept.min() >= clues and (kept.max() < 20)
    if clues:
        assert np.bincount(kept)[clues] > 0


def test_deduction_answers_no_question_with_several_solutions() -> None:
    answers = draw_puzzles("train", 300, 36, 0)[1]
    questions = np.where(np.random.default_rng(0).random(answers.shape) < 0.3, answers, 0).astype(np.uint8)
    answered = deduced(questions)
    assert 0 < answered.sum() < len(answered)
    assert all(solutions(question) == 1 for question in questions[answered])
    assert deduced(answers).all() and not deduced(np.zeros((1, 36), np.uint8))[0]


def test_answers_are_spread_and_follow_from_the_seed() -> None:
    answers = draw_puzzles("train", 2000, 36, 0)[1]
    assert len(np.unique(answers, axis=0)) > 1990
    assert abs((answers[:, 0] == 1).mean() - 1 / 6) < 0.04
    for seed, same in ((0, True), (1, False)):
        assert np.array_equal(draw_puzzles("test", 20, 12, seed), draw_puzzles("test", 20, 12, 0)) == same


def test_symmetries_stay_within_a_class() -> None:
    grid = solution_grids()[123]
    forms = symmetric_forms(grid, *draw_symmetries(raw_bits(1), 5, SIX))
    assert {canonical(form) for form in forms} == {canonical(grid)}
