"""Test-time search: starts keyed by seed, row and sample; who is chosen; what a puzzle's samples cost."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.errors import UsageError
from dataset.puzzles import sudoku
from dataset.puzzles.kinds import Arc, Kind, Sudoku, Tokens
from evaluators.search import Choice, Search

STATES = (torch.zeros(1, 2, 4), torch.ones(1, 2, 4))


class FirstIsThree(Kind):
    """A puzzle that an answer solves by beginning with 3."""

    name, side = "test", 1

    def parse(self, text: str) -> Tokens:
        raise NotImplementedError

    def text(self, tokens: Tokens) -> str:
        raise NotImplementedError

    def solves(self, questions: Tokens, answers: Tokens) -> np.ndarray[Any, Any]:
        assert len(questions) == len(answers)
        solved: np.ndarray[Any, Any] = answers[:, 0] == 3
        return solved


def starts(search: Search, *rows: int) -> Tensor:
    """The starts of puzzles at these rows, [R, states, positions, channels]."""
    return torch.stack(search.starts(tuple(state.expand(len(rows), -1, -1) for state in STATES), rows), dim=1)


def test_the_first_start_is_the_models_own_and_the_others_have_noise() -> None:
    found = starts(Search(samples=400, noise=0.5), 7)
    assert torch.equal(found[0], torch.cat(STATES))
    noise = found[1:] - torch.cat(STATES)
    assert noise.mean().abs() < 0.03 and noise.std() == pytest.approx(0.5, abs=0.03)
    # Every position of every state has its own.
    assert torch.corrcoef(noise.flatten(1).T).fill_diagonal_(0).abs().max() < 0.3
    assert torch.equal(starts(Search(), 7)[0], torch.cat(STATES))


def test_noise_is_keyed_by_seed_row_and_sample() -> None:
    together = starts(Search(samples=3, noise=1), 7, 8)
    assert torch.equal(together[3:], starts(Search(samples=3, noise=1), 8))
    assert torch.equal(together[:2], starts(Search(samples=2, noise=1), 7))
    torch.testing.assert_close(2 * together[:3] - together[0], starts(Search(samples=3, noise=2), 7))
    different = [together[1], together[2], together[4], starts(Search(samples=2, noise=1, seed=1), 7)[1]]
    assert not any(torch.equal(one, other) for i, one in enumerate(different) for other in different[:i])


@pytest.mark.parametrize(
    ("choose", "chosen", "settled"),
    [("halting", [3, 3], [False, False]), ("first", [1, 0], [True, False]), ("votes", [2, 3], [False, False]),
     ("rules", [2, 3], [True, False])],
)  # fmt: skip
def test_whose_answer_is_taken(choose: Choice, chosen: list[int], settled: list[bool]) -> None:
    # The second puzzle: all answer differently, none begins with 3, sample 0 is the only one that has halted in the first case.
    preds = torch.tensor([[[3, 1], [2, 2], [3, 1], [1, 1]], [[1, 1], [1, 2], [2, 1], [2, 2]]])
    logits = torch.tensor([[-2.0, 0.5, -1.0, 1.0], [0.0, -1.0, 1.0, 2.0]])
    has_halted = torch.zeros(2, 4, dtype=torch.bool)
    has_halted[0, :2] = True
    if choose == "first":
        has_halted[1, 0], settled = True, [True, True]
    search = Search(samples=4, noise=1, choose=choose, kind=FirstIsThree())
    found, done = search.choice(torch.zeros(2, 2, dtype=torch.int64), preds, logits, has_halted)
    assert (found.tolist(), done.tolist()) == (chosen, settled)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples": 0}, "--samples 0: expected at least 1"),
        ({"noise": -1.0}, "--noise -1.0"),
        ({"noise": math.nan}, "--noise nan"),
        ({"noise": math.inf}, "--noise inf"),
        ({"samples": 2}, "--samples 2, --noise 0.0: several samples differ by"),
        ({"noise": 1.0}, "--samples 1, --noise 1.0: several samples differ by"),
        ({"choose": "rules"}, "are for Sudoku and mazes"),
        ({"choose": "rules", "kind": Arc()}, "are for Sudoku and mazes"),
        ({"samples": 2, "symmetries": True, "kind": Arc()}, "are for Sudoku and mazes"),
    ],
)
def test_what_can_not_be_searched_for_is_told(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Search(**settings)


def test_forms_are_undone() -> None:
    kind = Sudoku(sudoku.SIX)
    search = Search(samples=5, symmetries=True, kind=kind)
    forms = search.forms([4, 9], torch.device("cpu"))
    assert forms is not None
    rows = torch.randint(0, kind.shape.vocab_size, (10, kind.shape.cells), generator=torch.Generator().manual_seed(0))
    made = forms.of(rows)
    assert torch.equal(forms.undone(made), rows)
    is_plain = (made == rows).all(dim=1)
    assert is_plain.nonzero().flatten().tolist() == [0, 5]
    # By seed and row alone, and what isn't supervised stays so.
    later = search.forms([9], torch.device("cpu"))
    assert later is not None and torch.equal(later.of(rows[5:]), made[5:])
    assert (forms.of(torch.full_like(rows, -100)) == -100).all()
    assert Search(samples=5, noise=1).forms([4, 9], torch.device("cpu")) is None
