"""A person's own puzzles: what is told of answers that are right, wrong, or voted on. The model answers as a test wants."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from config.errors import UsageError
from dataset.puzzles import sudoku
from dataset.puzzles.arc_grids import Augmentation
from dataset.puzzles.kinds import Arc, Sudoku
from dataset.puzzles.loader import PuzzleBatch
from evaluators import own_puzzles
from evaluators.own_puzzles import Solver
from evaluators.puzzles import PuzzleOutput
from evaluators.search import NO_SEARCH, Search

SIX = Sudoku(sudoku.SIX)
SOLVED = "123456456123214365365214531642642531"
ASKED = SOLVED[:-3] + "..."
TURNED = Augmentation(1, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[PuzzleBatch]]:
    """`answering(answer)`: have rows answered by `answer(inputs [B, T])`, [B, K, ACT steps, T]; returns the batches asked."""

    def prepare(answer: Callable[[Tensor], Tensor]) -> list[PuzzleBatch]:
        asked = []

        def solve(model: object, batch: PuzzleBatch, search: Search) -> tuple[PuzzleOutput, None]:
            asked.append(batch)
            inputs_BT = torch.from_numpy(batch.inputs).long()
            preds_BKST = answer(inputs_BT)
            steps = torch.arange(1, preds_BKST.shape[2] + 1)
            logits_BS = torch.logit(steps / (1 + steps)).expand(len(inputs_BT), -1)
            return PuzzleOutput(
                set_name=batch.set_name,
                row=torch.from_numpy(batch.rows),
                inputs_BT=inputs_BT,
                labels_BT=torch.from_numpy(batch.labels),
                puzzle_ids_B=torch.from_numpy(batch.puzzle_identifiers).long(),
                preds_BKST=preds_BKST,
                halt_logits_BKS=logits_BS.unsqueeze(1).expand(preds_BKST.shape[:3]),
                steps_BK=torch.full(preds_BKST.shape[:2], len(steps)),
                chosen_B=torch.zeros(len(inputs_BT), dtype=torch.int64),
            ), None

        monkeypatch.setattr(own_puzzles, "solve", solve)
        return asked

    return prepare


def solver(kind: Any, search: Search = NO_SEARCH, rows_at_once: int = 4, max_batches: int | None = None) -> Solver:
    return Solver(None, kind, search, rows_at_once=rows_at_once, max_batches=max_batches)  # type: ignore[arg-type]


def test_an_answer_is_shown_and_judged(answering: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "sudoku.txt"
    path.write_text(ASKED)
    [right] = SIX.parse(SOLVED)
    wrong = np.where(np.arange(36) == 35, right[34], right)
    answering(lambda inputs: torch.from_numpy(np.stack([right, wrong])).long().view(1, 2, 1, 36))
    [told] = solver(SIX).solve_file(path, show=False)
    said = "halting probability 0.500 after 1 ACT steps, the answer of 1 of 2 samples: right by the rules of Sudoku"
    assert told == f"{SIX.text(right)}\n{said}"
    answering(lambda inputs: torch.from_numpy(np.stack([wrong, wrong])).long().view(1, 1, 2, 36))
    [told] = solver(SIX).solve_file(path, show=False)
    assert told == f"{SIX.text(wrong)}\nhalting probability 0.667 after 2 ACT steps: wrong by the rules of Sudoku"


def test_each_act_step_is_shown_unless_nothing_changed(answering: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "sudoku.txt"
    path.write_text(ASKED)
    [asked], [right] = SIX.parse(ASKED), SIX.parse(SOLVED)
    half = np.where(np.arange(36) == 35, asked, right)
    answering(lambda inputs: torch.from_numpy(np.stack([half, half, right])).long().view(1, 1, 3, 36))
    [told] = solver(SIX).solve_file(path, show=True)
    assert told.split("\n") == [
        *SIX.text(asked).split("\n"),
        "ACT step 1: 2 cells changed, halting probability 0.500",
        *SIX.text(half).split("\n"),
        "ACT step 2: 0 cells changed, halting probability 0.667",
        "ACT step 3: 1 cells changed, halting probability 0.750",
        *SIX.text(right).split("\n"),
        "halting probability 0.750 after 3 ACT steps: right by the rules of Sudoku",
    ]


def test_many_puzzles_are_asked_a_batch_at_a_time(answering: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "many.csv"
    path.write_text("question\n" + f"{ASKED}\n" * 5)
    asked = answering(lambda inputs: inputs[:, None, None])
    told = list(solver(SIX, Search(samples=2, noise=1)).solve_file(path, show=False))
    assert [text.split("\n")[0] for text in told] == [f"puzzle {number} of 5" for number in range(1, 6)]
    assert [batch.rows.tolist() for batch in asked] == [[0, 1], [2, 3], [4]]
    assert (asked[0].labels == -100).all() and not asked[0].puzzle_identifiers.any()
    assert len(list(solver(SIX, max_batches=1).solve_file(path, show=False))) == 4


def test_forms_of_a_task_vote(answering: Callable[..., Any], tmp_path: Path) -> None:
    """The model copies: undone, every form's answer is the question, but for one of the second sample."""
    grids = [[[1, 2], [3, 4]], [[5, 6, 7]]]
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"train": [], "test": [{"input": grid} for grid in grids]}))
    names = [["<blank>", "x", TURNED.name("x"), "y"]]

    def copy(inputs: Tensor) -> Tensor:
        second = inputs.clone()
        second[0, 0] = 2  # the plain form of the first test
        return torch.stack([inputs, second], dim=1).unsqueeze(2)

    asked = answering(copy)
    first, second = solver(Arc()).solve_task(path, names, show=False)
    assert np.concatenate([batch.puzzle_identifiers for batch in asked]).tolist() == [1, 1, 2, 2]
    no_rule = "ARC has no rules to check an answer"
    assert first == f"test 1 of 2; {no_rule}\nattempt 1: 2 of 2 votes, mean halting probability 0.500\n1 2\n3 4"
    assert second.endswith("2 of 2 votes, mean halting probability 0.500\n5 6 7")
    # With choice by votes, every sample has one.
    first, second = solver(Arc(), Search(samples=2, noise=1, choose="votes"), rows_at_once=100).solve_task(path, names, show=False)
    assert "attempt 1: 3 of 4 votes" in first and first.endswith(
        "attempt 2: 1 of 4 votes, mean halting probability 0.500\n0 2\n3 4"
    )
    for at_once in (1, 2, 100):
        one, two, *votes = solver(Arc(), rows_at_once=at_once).solve_task(path, names, show=True)
        assert one == "test 1 of 2\n1 2\n3 4\nACT step 1: 0 cells changed, halting probability 0.500"
        assert two == "test 2 of 2\n5 6 7\nACT step 1: 0 cells changed, halting probability 0.500" and len(votes) == 2


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("z.json", {"test": [{"input": [[1]]}]}, "the model knows no puzzle 'z'"),
        ("x.json", {"test": []}, "has no test input"),
        ("x.json", {"test": [{"input": [[11]]}]}, "colours 0 to 9"),
        ("x.json", [], "expected an ARC task"),
        ("x.json", {"train": []}, "expected an ARC task"),
    ],
)
def test_what_is_no_known_task_is_told(name: str, content: object, told: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(content))
    with pytest.raises(UsageError, match=told):
        list(solver(Arc()).solve_task(path, [["<blank>", "x"]], show=False))
