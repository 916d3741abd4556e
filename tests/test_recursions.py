"""The comparison of recursions counts what a step costs and gives each the steps that the budget pays for."""

from pathlib import Path

import pytest

from benchmarks.recursions import RECURSIONS, measure
from tests.puzzle_data import TINY_PUZZLES, write_puzzles

SIZES = [text for text in TINY_PUZZLES if not text.startswith(("arch.H_", "arch.L_", "epochs", "eval_interval"))]


def test_equal_operations_for_all(tmp_path: Path) -> None:
    path = write_puzzles(tmp_path / "puzzles")
    rows = [measure(name, path, [*SIZES, "arch.forward_dtype=float32"], 3e8) for name in RECURSIONS]
    for row in rows:
        assert row["steps"] > 1 and row["steps"] * row["flops_per_step"] == pytest.approx(3e8, rel=0.2), row
        assert len(row["exact_accuracy_by_act_step"]) == 3
    flops = {row["recursion"]: row["flops_per_step"] for row in rows}
    # The same blocks in the same number of calls; HRM looks a step ahead, and carries gradient through fewer.
    assert flops["trm"] == flops["trm_singlez"] == flops["trm_hier6"]
    assert len(set(flops.values())) > 1
