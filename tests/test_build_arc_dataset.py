"""The ARC builder: what it reads, where each pair goes, what an identifier means, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config.errors import UsageError
from dataset.build_arc_dataset import build, main
from dataset.puzzles.arc_grids import MAX_SIDE, crop, parse_name
from dataset.puzzles.loader import PuzzleData
from dataset.puzzles.storage import read_identifiers

REPOSITORY = Path(__file__).resolve().parents[1]
AUGMENTATIONS = 6
Task = dict[str, list[dict[str, Any]]]


def random_grid(rng: np.random.Generator) -> list[list[int]]:
    rows: list[list[int]] = rng.integers(0, 10, rng.integers(1, 8, 2)).tolist()
    return rows


def random_tasks(names: str, seed: int) -> dict[str, Task]:
    rng = np.random.default_rng(seed)
    return {
        name: {
            kind: [{"input": random_grid(rng), "output": random_grid(rng)} for _ in range(count)]
            for kind, count in (("train", rng.integers(2, 4)), ("test", rng.integers(1, 3)))
        }
        for name in names
    }


def write_subset(folder: Path, subset: str, tasks: dict[str, Task], *, with_solutions: bool = True) -> None:
    asked = {name: {**task, "test": [{"input": pair["input"]} for pair in task["test"]]} for name, task in tasks.items()}
    (folder / f"arc_{subset}_challenges.json").write_text(json.dumps(asked))
    if with_solutions:
        solutions = {name: [pair["output"] for pair in task["test"]] for name, task in tasks.items()}
        (folder / f"arc_{subset}_solutions.json").write_text(json.dumps(solutions))


@pytest.fixture(scope="module")
def subsets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """training (a, b, c), evaluation (x, y). b has a test pair of x, turned and in other colours; c's only pairs are one of y."""
    folder = tmp_path_factory.mktemp("arc")
    training, evaluation = random_tasks("abc", 0), random_tasks("xy", 1)
    of_x, of_y = (evaluation[name]["test"][0] for name in "xy")
    other = np.array([0, 2, 3, 4, 5, 6, 7, 8, 9, 1])
    training["b"]["train"].append({side: other[np.rot90(of_x[side])].tolist() for side in of_x})
    training["c"] = {"train": [of_y], "test": [of_y]}
    # What a puzzle shows itself, it may ask.
    evaluation["y"]["train"].append(of_y)
    write_subset(folder, "training", training)
    write_subset(folder, "evaluation", evaluation)
    return folder


@pytest.fixture(scope="module")
def built(subsets: Path) -> Path:
    build(str(subsets / "arc"), subsets / "data", ["training", "evaluation"], ["evaluation"], num_aug=AUGMENTATIONS, processes=1)
    return subsets / "data"


def read_tasks(folder: Path, subset: str) -> dict[str, Task]:
    tasks: dict[str, Task] = json.loads((folder / f"arc_{subset}_challenges.json").read_text())
    for name, outputs in json.loads((folder / f"arc_{subset}_solutions.json").read_text()).items():
        for pair, output in zip(tasks[name]["test"], outputs, strict=True):
            pair["output"] = output
    return tasks


def at_its_corner(canvases: np.ndarray) -> np.ndarray:
    """The canvases with the grid, wherever it stands, moved to the corner."""
    moved = np.zeros_like(canvases)
    for index, canvas in enumerate(canvases.reshape(-1, MAX_SIDE, MAX_SIDE)):
        row, column = (np.flatnonzero((canvas > 0).any(axis=axis))[0] for axis in (1, 0))
        moved[index].reshape(MAX_SIDE, MAX_SIDE)[: MAX_SIDE - row, : MAX_SIDE - column] = canvas[row:, column:]
    return moved


def original_pairs(folder: Path, split: str) -> dict[str, list[list[str]]]:
    """Of each puzzle, for each of its forms, the pairs as they were before augmentation."""
    data = PuzzleData([folder], "train" if split == "train" else "test")
    puzzles = data.sets["all"]
    names = read_identifiers(folder)
    found: dict[str, list[list[str]]] = {}
    for puzzle, identifier in enumerate(puzzles.puzzle_identifiers.tolist()):
        rows = slice(*puzzles.puzzle_indices[puzzle : puzzle + 2].tolist())
        name, augmentation = parse_name(names[identifier])
        sides = [
            [augmentation.invert(grid).tolist() for grid in crop(at_its_corner(a[rows]))] for a in (puzzles.inputs, puzzles.labels)
        ]
        found.setdefault(name, []).append([json.dumps(pair) for pair in zip(*sides, strict=True)])
    return found


def as_text(pairs: list[dict[str, Any]]) -> list[str]:
    return [json.dumps((pair["input"], pair["output"])) for pair in pairs]


def test_every_row_is_its_pair_after_the_augmentation_is_undone(subsets: Path, built: Path) -> None:
    training, evaluation = read_tasks(subsets, "training"), read_tasks(subsets, "evaluation")
    train, test = original_pairs(built, "train"), original_pairs(built, "test")
    expected = {name: as_text(task["train"] + task["test"]) for name, task in training.items()}
    del expected["b"][len(training["b"]["train"]) - 1], expected["c"]
    expected |= {name: as_text(task["train"]) for name, task in evaluation.items()}
    assert train == {name: [pairs] * (AUGMENTATIONS + 1) for name, pairs in expected.items()}
    assert test == {name: [as_text(task["test"])] * (AUGMENTATIONS + 1) for name, task in evaluation.items()}


def test_no_test_output_is_in_train(subsets: Path, built: Path) -> None:
    """Not in the rows of any other puzzle, whatever its form."""
    asked = {name: set(as_text(task["test"])) for name, task in read_tasks(subsets, "evaluation").items()}
    for name, forms in original_pairs(built, "train").items():
        for other in asked.keys() - {name}:
            assert not asked[other] & {pair for form in forms for pair in form}


def test_groups_are_puzzles_and_both_splits_share_identifiers(built: Path) -> None:
    train, test = (PuzzleData([built], split) for split in ("train", "test"))  # type: ignore[arg-type]
    assert np.diff(train.sets["all"].group_indices).tolist() == [AUGMENTATIONS + 1] * 4
    assert (train.metadata.total_groups, train.metadata.total_puzzles) == (4, 4 * (AUGMENTATIONS + 1))
    assert train.metadata.num_puzzle_identifiers == test.metadata.num_puzzle_identifiers == 1 + 4 * (AUGMENTATIONS + 1)
    assert train.sets["all"].puzzle_identifiers.tolist() == list(range(1, train.metadata.num_puzzle_identifiers))
    assert test.sets["all"].puzzle_identifiers.tolist() == train.sets["all"].puzzle_identifiers[-14:].tolist()
    names = read_identifiers(built)
    assert names[0] == "<blank>" and len(set(names)) == len(names)
    assert [name for name in names[1:] if "|||" not in name] == ["a", "b", "x", "y"]


def test_train_moves_grids_and_test_does_not(built: Path) -> None:
    corner = {split: PuzzleData([built], split).sets["all"].inputs[:, 0] > 1 for split in ("train", "test")}  # type: ignore[arg-type]
    assert corner["test"].all() and not corner["train"].all()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_seed_decides_and_not_the_number_of_processes(subsets: Path, built: Path, tmp_path: Path) -> None:
    arguments = (str(subsets / "arc"), ["training", "evaluation"], ["evaluation"])
    for name, seed, processes in (("same", 42, 2), ("other", 43, 1)):
        build(arguments[0], tmp_path / name, *arguments[1:], num_aug=AUGMENTATIONS, seed=seed, processes=processes)
    assert content(tmp_path / "same") == content(built)
    assert read_identifiers(tmp_path / "other") != read_identifiers(built)


def test_the_test_puzzles_are_kept_as_they_were(subsets: Path, built: Path) -> None:
    kept, given = json.loads((built / "test_puzzles.json").read_text()), read_tasks(subsets, "evaluation")
    assert list(kept.items()) == list(given.items())


def test_the_command_as_a_file_and_as_a_module(subsets: Path, built: Path, tmp_path: Path) -> None:
    arguments = [
        "--input-file-prefix", str(subsets / "arc"), "--subsets", "training", "evaluation", "--test-set-name", "evaluation",
        "--num-aug", str(AUGMENTATIONS), "--seed", "42",
    ]  # fmt: skip
    for program in (["-m", "dataset.build_arc_dataset"], ["dataset/build_arc_dataset.py"]):
        output = tmp_path / program[-1].replace("/", "-")
        command = [sys.executable, *program, *arguments, "--output-dir", str(output), "--processes", "1"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert "left out 3 training pairs" in done.stdout
        assert content(output) == content(built)


def test_identifiers_start_where_they_are_told(subsets: Path, tmp_path: Path) -> None:
    build(str(subsets / "arc"), tmp_path / "data", ["evaluation"], ["evaluation"], num_aug=1, identifiers_start=5, processes=1)
    assert read_identifiers(tmp_path / "data")[:6] == ["<blank>"] * 5 + ["x"]
    data = PuzzleData([tmp_path / "data"], "train")
    assert data.metadata.num_puzzle_identifiers == 9
    assert data.sets["all"].puzzle_identifiers.tolist() == [5, 6, 7, 8]


def test_a_second_test_set(subsets: Path, tmp_path: Path) -> None:
    build(str(subsets / "arc"), tmp_path / "data", ["training", "evaluation"], ["evaluation", "training"], num_aug=0, processes=1)
    assert PuzzleData([tmp_path / "data"], "test").metadata.total_groups == 5


def test_a_second_test_set_is_evaluation2_if_it_is_there(tmp_path: Path) -> None:
    for name, subset in zip("abc", ("training", "evaluation", "evaluation2"), strict=True):
        write_subset(tmp_path, subset, random_tasks(name, ord(name)))
    subsets = ["--subsets", "training", "evaluation", "evaluation2", "--test-set-name", "evaluation"]
    places = ["--input-file-prefix", str(tmp_path / "arc"), "--output-dir", str(tmp_path / "data")]
    main([*places, *subsets, "--num-aug", "0", "--processes", "1"])
    assert set(json.loads((tmp_path / "data/test_puzzles.json").read_text())) == {"b", "c"}


def test_a_test_set_may_be_without_solutions_and_a_training_set_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_subset(tmp_path, "training", random_tasks("a", 0), with_solutions=False)
    write_subset(tmp_path, "test", random_tasks("x", 1), with_solutions=False)
    build(str(tmp_path / "arc"), tmp_path / "data", ["test"], ["test"], num_aug=0, processes=1)
    assert "a single black cell" in capsys.readouterr().out
    assert {pair["output"] == [[0]] for pair in json.loads((tmp_path / "data/test_puzzles.json").read_text())["x"]["test"]} == {
        True
    }
    with pytest.raises(UsageError, match=r"puzzle 'a': .*solutions are missing"):
        build(str(tmp_path / "arc"), tmp_path / "other", ["training", "test"], ["test"], num_aug=0, processes=1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"train": [], "test": []}, "demonstration and test pairs"),
        ({"test": []}, "no 'train'"),
        ([], "puzzle 'a'"),
        ({"train": [{"input": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]}, "no 'output'"),
        ({"train": [{"input": [[11]], "output": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]}, "colours 0 to 9"),
    ],
)
def test_a_broken_puzzle_is_told_by_file_and_name(tmp_path: Path, task: Any, message: str) -> None:
    (tmp_path / "arc_t_challenges.json").write_text(json.dumps({"a": task}))
    with pytest.raises(UsageError, match=message) as told:
        build(str(tmp_path / "arc"), tmp_path / "data", ["t"], ["t"], num_aug=1, processes=1)
    assert "arc_t_challenges.json, puzzle 'a'" in str(told.value)
    assert not (tmp_path / "data").exists()


def test_other_wrong_input_is_told(subsets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix, output = str(subsets / "arc"), tmp_path / "data"
    with pytest.raises(UsageError, match="evaluation2_challenges"):
        build(prefix, output, ["evaluation2"], ["evaluation2"])
    with pytest.raises(UsageError, match=r"'test' \(--test-set-name\) among them"):
        build(prefix, output, ["training"], ["test", "training"])
    with pytest.raises(UsageError, match="different --subsets"):
        build(prefix, output, ["training", "training"], ["training"])
    with pytest.raises(UsageError, match="--num-aug"):
        build(prefix, output, ["training"], ["training"], num_aug=-1)
    write_subset(tmp_path, "one", random_tasks("a", 0))
    write_subset(tmp_path, "two", random_tasks("a", 0))
    with pytest.raises(UsageError, match="earlier subset"):
        build(str(tmp_path / "arc"), output, ["one", "two"], ["one"])
    with pytest.raises(SystemExit) as stop:
        main(["--input-file-prefix", "none", "--output-dir", str(output), "--subsets", "a", "--test-set-name", "a"])
    assert stop.value.code == 2 and "none_a_challenges.json" in capsys.readouterr().err
