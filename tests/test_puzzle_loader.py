"""Puzzle batches: the original's order, every row where it belongs, over ranks, paths and restarts.

The reference draws one group at a time, as the original does.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.puzzles.loader import (
    IGNORE_LABEL_ID,
    PuzzleBatch,
    PuzzleData,
    TrainBatches,
    evaluation_batch_count,
    evaluation_batches,
)
from dataset.puzzles.storage import create_split, new_dataset, write_identifiers

# Examples of each puzzle of each group.
SIZES = ((1, 1), (3,), (2, 2, 2), (5,), (1,), (4, 4))


def write(
    path: Path,
    sizes: tuple[tuple[int, ...], ...] = SIZES,
    *,
    split: str = "train",
    names: list[str] | None = None,
    seq_len: int = 2,
) -> Path:
    """A data set whose inputs are (1, row number) and whose labels are (0, row number)."""
    puzzles = [examples for group in sizes for examples in group]
    with new_dataset(path) as folder:
        files = create_split(
            folder / split,
            seq_len=seq_len,
            vocab_size=100,
            num_puzzle_identifiers=len(puzzles) + 1,
            puzzles_per_group=[len(group) for group in sizes],
            examples_per_puzzle=puzzles,
            puzzle_identifiers=np.arange(1, len(puzzles) + 1),
            total_puzzles=len(puzzles),
        )
        rows = np.zeros((sum(puzzles), seq_len), np.uint8)
        rows[:, 1] = np.arange(sum(puzzles))
        inputs = rows.copy()
        inputs[:, 0] = 1
        files.write(0, inputs, rows)
        write_identifiers(folder, names or ["<blank>", *(f"p{i}" for i in range(len(puzzles)))])
    return path


def reference_puzzles(data: PuzzleData, name: str, seed: int, epochs: int) -> list[int]:
    """The puzzles of one pair, drawn one by one."""
    puzzles = data.sets[name]
    generator = np.random.Generator(np.random.Philox(seed=seed))
    order = np.concatenate([generator.permutation(len(puzzles.group_indices) - 1) for _ in range(epochs)])
    return [int(generator.integers(puzzles.group_indices[group], puzzles.group_indices[group + 1])) for group in order]


def stream(data: PuzzleData, **more: Any) -> TrainBatches:
    return TrainBatches(data, **{"global_batch_size": 4, "seed": 7, "epochs_per_iteration": 3, **more})


def content(batches: list[PuzzleBatch]) -> list[tuple[str, list[int]]]:
    return [(batch.set_name, batch.rows.tolist()) for batch in batches]


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(0, 2**40), st.integers(1, 4))
def test_groups_and_augmented_forms_are_the_originals(
    tmp_path_factory: pytest.TempPathFactory, size: int, seed: int, epochs: int
) -> None:
    data = PuzzleData([write(tmp_path_factory.mktemp("a") / "data")], "train")
    puzzles = data.sets["all"]
    batches = stream(data, global_batch_size=size, seed=seed, epochs_per_iteration=epochs)
    for iteration in (1, 2):
        drawn = iter(reference_puzzles(data, "all", seed + iteration, epochs))
        for batch in batches.iteration():
            left = size
            rows = batch.rows.tolist()
            while left:
                puzzle = next(drawn)
                examples = range(*puzzles.puzzle_indices[puzzle : puzzle + 2].tolist())
                taken, rows = rows[: min(left, len(examples))], rows[min(left, len(examples)) :]
                left -= len(taken)
                assert len(set(taken)) == len(taken) and set(taken) <= set(examples)
            assert not rows
        # What is left doesn't fill a batch.
        assert sum(int(np.diff(puzzles.puzzle_indices)[puzzle]) for puzzle in drawn) < size


def test_every_example_of_a_puzzle_that_does_not_fit_is_drawn(tmp_path: Path) -> None:
    data = PuzzleData([write(tmp_path / "data", ((5,),))], "train")
    batches = stream(data, global_batch_size=2, epochs_per_iteration=500)
    counts = Counter(row for batch in batches.iteration() for row in batch.rows.tolist())
    assert len(counts) == 5 and all(abs(count - 200) < 60 for count in counts.values())


def test_a_batch_is_its_rows(tmp_path: Path) -> None:
    data = PuzzleData([write(tmp_path / "data")], "train")
    for batch in stream(data).iteration():
        assert (batch.inputs.dtype, batch.labels.dtype, batch.puzzle_identifiers.dtype) == (np.int32, np.int64, np.int32)
        np.testing.assert_array_equal(batch.inputs, np.stack([np.ones(4), batch.rows], axis=1))
        # Row 0's number is the label that isn't supervised, too.
        expected = np.where(batch.rows == 0, IGNORE_LABEL_ID, batch.rows)
        np.testing.assert_array_equal(batch.labels, np.stack([np.full(4, IGNORE_LABEL_ID), expected], axis=1))
        np.testing.assert_array_equal(batch.puzzle_identifiers, 1 + data.sets["all"].puzzles_of(batch.rows))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_a_batch_without_overlap(tmp_path: Path, ranks: int) -> None:
    data = PuzzleData([write(tmp_path / "data")], "train")
    whole = [batch.rows.tolist() for batch in stream(data).iteration()]
    parts = [list(stream(data, rank=rank, ranks=ranks).iteration()) for rank in range(ranks)]
    assert [np.concatenate([batch.rows for batch in batches]).tolist() for batches in zip(*parts, strict=True)] == whole


def test_several_paths_come_one_after_the_other(tmp_path: Path) -> None:
    names = ["<blank>"] * 11 + ["q"]
    data = PuzzleData([write(tmp_path / "a"), write(tmp_path / "b", ((1,),), names=names)], "train")
    assert (data.metadata.total_groups, data.metadata.total_puzzles, data.metadata.num_puzzle_identifiers) == (7, 11, 13)
    assert data.metadata.mean_puzzle_examples == pytest.approx(26 / 11)
    batches = stream(data, global_batch_size=2, epochs_per_iteration=4)
    for _ in range(2):
        order = [batch.set_name for batch in batches.iteration()]
        assert order == sorted(order) and set(order) == {"all", "all1"}
    # The second path's groups are keyed by the second number.
    assert batches.state()["begun"] == 4
    assert content(list(stream(PuzzleData([tmp_path / "a"], "train")).iteration()))


@settings(max_examples=20)
@given(st.integers(0, 60), st.sampled_from([1, 2]))
def test_a_restored_stream_goes_on_where_the_state_was_taken(
    tmp_path_factory: pytest.TempPathFactory, done: int, ranks: int
) -> None:
    folder = tmp_path_factory.mktemp("a")
    paths = [write(folder / "a"), write(folder / "b", ((2,), (1, 1)), names=["<blank>"] * 14)]
    data = PuzzleData(paths, "train")

    def endless(batches: TrainBatches) -> Any:
        while True:
            yield from batches.iteration()

    first = stream(data)
    running = endless(first)
    for _ in range(done):
        next(running)
    state = json.loads(json.dumps(first.state()))
    expected = content([next(running) for _ in range(40)])
    restored = [stream(PuzzleData(paths, "train"), rank=rank, ranks=ranks) for rank in range(ranks)]
    for batches in restored:
        batches.restore(state)
    parts = [endless(batches) for batches in restored]
    for name, rows in expected:
        local = [next(part) for part in parts]
        assert (name, rows) == (local[0].set_name, np.concatenate([batch.rows for batch in local]).tolist())


def test_a_stream_restored_at_an_iterations_end_ends_it_first(tmp_path: Path) -> None:
    data = PuzzleData([write(tmp_path / "data")], "train")
    first = stream(data)
    iteration = first.iteration()
    count = len(list(stream(data).iteration()))
    for _ in range(count):
        next(iteration)
    state = first.state()
    assert list(iteration) == []
    again = stream(data)
    again.restore(state)
    assert list(again.iteration()) == []
    assert content(list(again.iteration())) == content(list(first.iteration())) != []


@pytest.mark.parametrize("change", [{"seed": 8}, {"global_batch_size": 2}, {"epochs_per_iteration": 4}])
def test_another_runs_state_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    data = PuzzleData([write(tmp_path / "data")], "train")
    with pytest.raises(UsageError, match=next(iter(change))):
        stream(data, **change).restore(stream(data).state())


def test_other_data_is_refused(tmp_path: Path) -> None:
    state = stream(PuzzleData([write(tmp_path / "a")], "train")).state()
    for sizes in (SIZES[:-1], (*SIZES[:-1], (4, 3, 1))):
        data = PuzzleData([write(tmp_path / str(len(sizes[-1])), sizes)], "train")
        with pytest.raises(UsageError, match="data_hash"):
            stream(data).restore(state)


@pytest.mark.parametrize(("size", "ranks"), [(1, 1), (4, 1), (4, 2), (40, 4)])
def test_evaluation_sees_every_row_once_in_order(tmp_path: Path, size: int, ranks: int) -> None:
    names = ["<blank>"] * 11 + ["q"]
    paths = [write(tmp_path / "a", split="test"), write(tmp_path / "b", ((1,),), split="test", names=names)]
    data = PuzzleData(paths, "test")
    parts = [list(evaluation_batches(data, global_batch_size=size, rank=rank, ranks=ranks)) for rank in range(ranks)]
    seen: dict[str, list[int]] = {"all": [], "all1": []}
    assert {len(batches) for batches in parts} == {evaluation_batch_count(data, size)}
    for batches in zip(*parts, strict=True):
        rows = np.concatenate([batch.rows for batch in batches])
        assert len(rows) == size
        seen[batches[0].set_name] += rows[rows >= 0].tolist()
        padding = np.concatenate([batch.puzzle_identifiers for batch in batches])[rows < 0]
        assert not padding.any()
        assert np.all(np.concatenate([batch.labels for batch in batches])[rows < 0] == IGNORE_LABEL_ID)
        assert np.all(np.concatenate([batch.inputs for batch in batches])[rows < 0] == 0)
    assert seen == {"all": list(range(25)), "all1": [0]}


def test_wrong_input_is_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    with pytest.raises(UsageError, match="names no folder"):
        PuzzleData([], "train")
    with pytest.raises(UsageError, match="split 'test'"):
        PuzzleData([path], "test")
    with pytest.raises(UsageError, match=r"found seq_len 2 .* and 3"):
        PuzzleData([path, write(tmp_path / "b", seq_len=3)], "train")
    with pytest.raises(UsageError, match="--puzzle-identifiers-start 11"):
        PuzzleData([path, write(tmp_path / "c", names=["<blank>", *"abcdefghijk"])], "train")
    assert PuzzleData([path, write(tmp_path / "d")], "train")
    data = PuzzleData([path], "train")
    with pytest.raises(UsageError, match="multiple of the 3 processes"):
        stream(data, ranks=3)
    with pytest.raises(UsageError, match="rank 2"):
        next(evaluation_batches(data, global_batch_size=4, rank=2, ranks=2))
