"""ARC's votes against results computed by hand, in one process and two."""

import json
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from config.errors import UsageError
from dataset.puzzles.arc_grids import SEQ_LEN, Augmentation, Pair, lay_out
from dataset.puzzles.storage import write_identifiers
from evaluators.arc import ARC, Votes
from models.distributed import Ranks

PLAIN = Augmentation(0, tuple(range(10)))
TURNED = Augmentation(1, (0, 2, 3, 4, 5, 6, 7, 8, 9, 1))
MIRRORED = Augmentation(4, (0, 9, 8, 7, 6, 5, 4, 3, 2, 1))
FORMS = (PLAIN, TURNED, MIRRORED)
# x has two test pairs, y one. Identifiers: 1 to 3 the forms of x, 4 to 6 those of y, 7 a training puzzle.
ASKED = {"x": [[[1, 2], [3, 4]], [[5, 6]]], "y": [[[7]]]}
RIGHT = {"x": [[[1, 1, 2]], [[0]]], "y": [[[3, 3], [3, 4]]]}
WRONG, WORSE = [[9, 9]], [[8], [8]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    puzzles = {
        name: {"train": [], "test": [{"input": question, "output": RIGHT[name][i]} for i, question in enumerate(questions)]}
        for name, questions in ASKED.items()
    }
    (tmp_path / "test_puzzles.json").write_text(json.dumps(puzzles))
    names = ["<blank>"]
    for name in ASKED:
        names += [name, TURNED.name(name), MIRRORED.name(name)]
    write_identifiers(tmp_path, [*names, "z"])
    return tmp_path


# Puzzle, number of its test pair, form, predicted grid (before the augmentation), halting logit.
Vote = tuple[str, int, Augmentation, list[list[int]], float]


def batch_of(votes: Sequence[Vote], padding: int = 0) -> dict[str, torch.Tensor]:
    """What a model that predicts so gives: everything in augmented form on canvases."""
    inputs, preds, identifiers = [], [], []
    for puzzle, test, form, predicted, _ in votes:
        pair = Pair(np.array(ASKED[puzzle][test], np.uint8), np.array(predicted, np.uint8))
        laid = lay_out([pair], np.array([[form.form, *form.colours]], np.uint8), None)
        inputs.append(laid[0].reshape(SEQ_LEN))
        preds.append(laid[1].reshape(SEQ_LEN))
        identifiers.append(1 + list(ASKED).index(puzzle) * len(FORMS) + FORMS.index(form))
    blank = [np.zeros(SEQ_LEN, np.uint8)] * padding
    return {
        "inputs": torch.from_numpy(np.stack([*inputs, *blank])).int(),
        "preds": torch.from_numpy(np.stack([*preds, *blank])).long(),
        "puzzle_identifiers": torch.tensor(identifiers + [0] * padding),
        "q_halt_logits": torch.tensor([vote[-1] for vote in votes] + [9.0] * padding),
    }


# x, first pair: right twice, wrong twice but surer, worse once: right at 2. x, second pair: right at 1. y: worse twice, wrong once
# and sure, right once and unsure: right at 3.
VOTES: list[Vote] = [
    ("x", 0, PLAIN, RIGHT["x"][0], 0.0),
    ("x", 0, TURNED, RIGHT["x"][0], 1.0),
    ("x", 0, MIRRORED, WRONG, 2.0),
    ("x", 0, PLAIN, WRONG, 0.0),
    ("x", 0, TURNED, WORSE, 50.0),
    ("x", 1, MIRRORED, RIGHT["x"][1], -3.0),
    ("y", 0, PLAIN, WORSE, -9.0),
    ("y", 0, TURNED, WORSE, -9.0),
    ("y", 0, MIRRORED, WRONG, 5.0),
    ("y", 0, PLAIN, RIGHT["y"][0], -5.0),
]
# Mean over x and y of the share of pairs solved: 1/2 and 0; 1 and 0; 1 and 1.
BY_HAND = {"ARC/pass@1": 0.25, "ARC/pass@2": 0.5, "ARC/pass@3": 1.0}
SUBMISSION = {
    "x": [{"attempt_1": WRONG, "attempt_2": RIGHT["x"][0]}, {"attempt_1": RIGHT["x"][1], "attempt_2": RIGHT["x"][1]}],
    "y": [{"attempt_1": WORSE, "attempt_2": WRONG}],
}


def test_pass_at_k_is_that_computed_by_hand(folder: Path) -> None:
    arc = ARC(folder, pass_ks=(1, 2, 3))
    arc.begin()
    arc.add(**batch_of(VOTES[:6], padding=2))
    arc.add(**batch_of(VOTES[6:]))
    assert arc.result(folder) == BY_HAND
    assert json.loads((folder / "submission.json").read_text()) == SUBMISSION


def test_the_ks_are_those_of_the_original(folder: Path) -> None:
    arc = ARC(folder)
    arc.add(**batch_of(VOTES))
    result = arc.result()
    assert result is not None and list(result) == [f"ARC/pass@{k}" for k in (1, 2, 5, 10, 100, 1000)]
    assert not (folder / "submission.json").exists()


@pytest.mark.parametrize("share", [slice(0, None, 2), slice(0, 5), slice(0, 0)])
def test_two_ranks_give_what_one_gives(folder: Path, share: slice) -> None:
    """Which rank has which votes doesn't matter."""
    first, second = (ARC(folder, pass_ks=(1, 2, 3)) for _ in range(2))
    of_second: list[Votes] = []

    class Second(Ranks):
        def gather_at_first(self, value: Votes) -> list[Votes]:
            of_second.append(value)
            return []

    class First(Ranks):
        def gather_at_first(self, value: Votes) -> list[Votes]:
            return [value, *of_second]

    second.add(**batch_of([vote for vote in VOTES if vote not in VOTES[share]]))
    assert second.result(folder, Second(1, 2)) == {}
    assert not (folder / "submission.json").exists()
    if VOTES[share]:
        first.add(**batch_of(VOTES[share]))
    assert first.result(folder, First(0, 2)) == BY_HAND
    assert json.loads((folder / "submission.json").read_text()) == SUBMISSION


def vote_as_rank(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    arc = ARC(folder, pass_ks=(1, 2, 3))
    arc.add(**batch_of(VOTES[rank::2]))
    (folder / f"rank_{rank}.json").write_text(json.dumps(arc.result(folder, Ranks(rank, 2))))
    torch.distributed.destroy_process_group()


def test_two_processes_of_torch_distributed(folder: Path) -> None:
    # Forked, because importing torch anew takes longer than the test.
    ranks = [get_context("fork").Process(target=vote_as_rank, args=(rank, folder)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=120)
    assert [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)] == [BY_HAND, {}]
    assert json.loads((folder / "submission.json").read_text()) == SUBMISSION


@pytest.mark.parametrize("accumulate", [True, False])
def test_votes_of_earlier_evaluations_count_on_unless_told_otherwise(folder: Path, accumulate: bool) -> None:
    arc = ARC(folder, pass_ks=(1,), accumulate=accumulate)
    for votes in (VOTES, [("y", 0, PLAIN, RIGHT["y"][0], 0.0)] * 2):
        arc.begin()
        arc.add(**batch_of(votes))
    # y's right grid has three votes now and leads; x's votes are the first evaluation's.
    assert arc.result() == {"ARC/pass@1": 0.75 if accumulate else 0.5}


def test_what_was_not_predicted_is_unsolved(folder: Path) -> None:
    arc = ARC(folder, pass_ks=(1000,), attempts=3)
    arc.add(**batch_of([("x", 1, PLAIN, RIGHT["x"][1], 0.0)]))
    assert arc.result(folder) == {"ARC/pass@1000": 0.25}
    submission = json.loads((folder / "submission.json").read_text())
    assert submission["y"] == [{f"attempt_{number}": [[0]] for number in (1, 2, 3)}]
    assert len(submission["x"]) == 2


def test_a_canvas_without_a_grid_is_a_wrong_grid(folder: Path) -> None:
    arc = ARC(folder, pass_ks=(1,))
    batch = batch_of(VOTES[5:6])
    batch["preds"][:] = 0
    arc.add(**batch)
    assert arc.result(folder) == {"ARC/pass@1": 0.0}
    assert json.loads((folder / "submission.json").read_text())["x"][1]["attempt_1"] == [[0]]


def test_ties_do_not_depend_on_who_predicted_first(folder: Path) -> None:
    tied: list[Vote] = [("y", 0, PLAIN, grid, 1.0) for grid in (WRONG, WORSE, RIGHT["y"][0])]
    submissions = []
    for order in (tied, tied[::-1]):
        arc = ARC(folder, attempts=3)
        arc.add(**batch_of(order))
        arc.result(folder)
        submissions.append(json.loads((folder / "submission.json").read_text())["y"])
    assert submissions[0] == submissions[1]


def test_training_puzzles_and_padding_have_no_vote(folder: Path) -> None:
    arc = ARC(folder, pass_ks=(1,))
    batch = batch_of(VOTES[5:6], padding=1)
    batch["puzzle_identifiers"][0] = 7
    arc.add(**batch)
    assert arc.result() == {"ARC/pass@1": 0.0}


def test_wrong_input_is_told(folder: Path) -> None:
    batch: dict[str, Any] = batch_of(VOTES[:1])
    batch["puzzle_identifiers"][0] = 8
    with pytest.raises(UsageError, match="identifier 8 isn't one of the data set's 8"):
        ARC(folder).add(**batch)
    (folder / "test_puzzles.json").write_text("{}")
    with pytest.raises(UsageError, match="no test puzzles"):
        ARC(folder)
    with pytest.raises(UsageError, match=r"identifiers\.json"):
        ARC(folder / "none")
