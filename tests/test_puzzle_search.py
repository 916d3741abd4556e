"""The benchmark of test-time search: what it reads off one run is what each search gives by itself."""

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest
import torch

from artifacts.puzzle_checkpoint import open_puzzle_checkpoint
from benchmarks.puzzle_search import outcomes
from dataset.build_small_puzzles import build_sudoku
from dataset.puzzles.kinds import kind_of
from dataset.puzzles.loader import PuzzleData
from evaluators.puzzles import PuzzleOutput, evaluate_puzzles
from evaluators.search import Choice, Search
from tests.test_entry_scripts import run_well
from tests.test_puzzle_scripts import RUN, RUN_FOLDER


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a checkpoint that answers some of it: questions of one or two blanks."""
    folder = tmp_path_factory.mktemp("search")
    build_sudoku(folder / "data", train_size=400, test_size=24, clues=35)
    few = ("run_name=s", "arch.mlp_t=true", "arch.pos_encodings=none", "epochs=4", "eval_interval=4", "global_batch_size=16")
    run_well("pretrain.py", "data_paths=[data]", *RUN, *few, "arch.hidden_size=32", folder=folder)
    return folder


def test_choices_and_fewer_samples_are_read_off(trained: Path) -> None:
    checkpoint = open_puzzle_checkpoint(trained / RUN_FOLDER / "s")
    model, data = checkpoint.model(checkpoint.config), PuzzleData([trained / "data"], "test")
    with torch.no_grad():
        model.q_head.weight.normal_(generator=torch.Generator().manual_seed(0))  # halting at several steps
        model.q_head.bias.fill_(-1)
    most = Search(samples=4, noise=1.0, kind=kind_of(checkpoint.metadata))
    outputs: list[PuzzleOutput] = []
    evaluate_puzzles(model, data, batch_size=8, search=most, on_output=outputs.append)
    found = set()
    for choose in get_args(Choice):
        for samples in (2, 4):
            search = dataclasses.replace(most, samples=samples, choose=choose)
            report = evaluate_puzzles(model, data, batch_size=8, search=search)
            right, steps = (torch.cat(parts).double() for parts in zip(*(outcomes(o, search) for o in outputs), strict=True))
            assert (report["exact_accuracy"], report["steps"]) == pytest.approx((right.mean().item(), steps.mean().item()))
            found.add((report["exact_accuracy"], report["steps"]))
    assert len(found) > 4, "searches must differ, or nothing is tested"


def test_the_table_is_printed(trained: Path) -> None:
    arguments = ("--checkpoint", f"{RUN_FOLDER}/s", "--samples", "2", "--symmetries", "--max-puzzles", "9", "--threads", "1")
    lines = run_well("benchmarks/puzzle_search.py", *arguments, folder=trained).out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert [(row["samples"], row["choose"]) for row in rows] == [
        (samples, choose) for samples in (1, 2) for choose in (*get_args(Choice), "oracle")
    ]
    assert len(lines) == 11 and all(row["lower_95"] <= row["share"] <= row["upper_95"] for row in rows)
    assert {row["act_steps"] for row in rows if row["choose"] == "votes"} == {3, 6}
