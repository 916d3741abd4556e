"""The Sudoku builder: every augmented puzzle is valid and solved, and follows from seed and line alone; wrong rows are told."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.errors import UsageError
from dataset.build_sudoku_dataset import build, main
from dataset.puzzles.draws import raw_bits
from dataset.puzzles.loader import PuzzleData
from dataset.puzzles.storage import read_identifiers
from dataset.puzzles.sudoku import NINE, agree, are_solutions, draw_symmetries, symmetric_forms

REPOSITORY = Path(__file__).resolve().parents[1]
ANSWER = np.array(list("123456789456789123789123456231564897564897231897231564312645978645978312978312645"), np.uint8)


def text(grid: np.ndarray, blank: str) -> str:
    return "".join(map(str, grid.tolist())).replace("0", blank)


def write_csv(path: Path, answers: np.ndarray, rating: int = 5) -> list[np.ndarray]:
    lines, questions = ["source,question,answer,rating"], []
    for number, answer in enumerate(answers):
        questions.append(np.where(np.arange(81) % 4 == number % 4, answer, 0))
        lines.append(f"made,{text(questions[-1], '.')},{text(answer, '0')},{rating + number}")
    path.write_text("\n".join(lines) + "\n")
    return questions


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    answers = symmetric_forms(ANSWER, *draw_symmetries(raw_bits(9), 9, NINE))
    write_csv(folder / "train.csv", answers[:6])
    write_csv(folder / "test.csv", answers[6:])
    return folder


def test_every_augmented_puzzle_is_valid_and_solved(tmp_path: Path, source: Path) -> None:
    assert build(tmp_path / "data", source, num_aug=7) == {"train": 6, "test": 3}
    data = PuzzleData([tmp_path / "data"], "train")
    puzzles = data.sets["all"]
    assert (data.metadata.seq_len, data.metadata.vocab_size, data.metadata.num_puzzle_identifiers) == (81, 11, 1)
    # The original counts groups as puzzles.
    assert (data.metadata.total_groups, data.metadata.total_puzzles, data.metadata.mean_puzzle_examples) == (6, 6, 1)
    assert np.diff(puzzles.group_indices).tolist() == [8] * 6 and len(puzzles) == 48
    questions, answers = np.array(puzzles.inputs) - np.uint8(1), np.array(puzzles.labels) - np.uint8(1)
    assert are_solutions(answers, NINE).all() and agree(questions, answers).all()
    assert len(np.unique(questions, axis=0)) == 48
    assert read_identifiers(tmp_path / "data") == ["<blank>"]


def test_the_first_form_and_the_test_split_are_as_read(tmp_path: Path, source: Path) -> None:
    build(tmp_path / "data", source, num_aug=2)
    for split, stride in (("train", 3), ("test", 1)):
        puzzles = PuzzleData([tmp_path / "data"], split).sets["all"]  # type: ignore[arg-type]
        rows = (source / f"{split}.csv").read_text().splitlines()[1:]
        assert [row.split(",")[1] for row in rows] == [text(row, ".") for row in puzzles.inputs[::stride] - np.uint8(1)]
        assert [row.split(",")[2] for row in rows] == [text(row, ".") for row in puzzles.labels[::stride] - np.uint8(1)]


def test_a_subsample_is_drawn_by_seed_and_keeps_each_puzzles_forms(tmp_path: Path, source: Path) -> None:
    def built(name: str, **options: int) -> np.ndarray:
        build(tmp_path / name, source, num_aug=3, **options)
        puzzles = PuzzleData([tmp_path / name], "train").sets["all"]
        return np.array(puzzles.inputs).reshape(-1, 4, 81)

    everything, some, again = built("all"), built("some", subsample_size=4), built("again", subsample_size=4)
    np.testing.assert_array_equal(some, again)
    assert len(some) == 4 and all(any(np.array_equal(group, other) for other in everything) for group in some)
    other_seed = built("other", subsample_size=4, seed=1)
    assert not np.array_equal(some[:, 1:], other_seed[:, 1:])
    assert PuzzleData([tmp_path / "some"], "test").metadata.total_groups == 3


def test_the_least_difficulty_holds_for_both_splits(tmp_path: Path, source: Path) -> None:
    assert build(tmp_path / "data", source, min_difficulty=7) == {"train": 4, "test": 1}


def test_the_command_as_a_file_and_as_a_module(tmp_path: Path, source: Path) -> None:
    contents = []
    for program in (["-m", "dataset.build_sudoku_dataset"], ["dataset/build_sudoku_dataset.py"]):
        output = tmp_path / program[-1].replace("/", "-")
        arguments = ["--output-dir", str(output), "--source-dir", str(source), "--subsample-size", "2", "--num-aug", "1"]
        done = subprocess.run([sys.executable, *program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert "2 training puzzles, each in 2 forms, and 3 test puzzles" in done.stdout
        contents.append({path.relative_to(output): path.read_bytes() for path in output.rglob("*") if path.is_file()})
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"^made,.", "made,x", "a question of digits"),
        (r",(.)(\d)(\d)(\d{78}),", r",\1\3\2\4,", "an answer with every digit once"),
        (r"^made,.{81}", "made," + "1" * 81, "an answer that keeps the question's digits"),
        (r"^made,.*", "made,1,1,1", "a grid of 81 characters"),
    ],
)
def test_a_row_that_is_no_sudoku_is_told(tmp_path: Path, source: Path, old: str, new: str, message: str) -> None:
    path = source / "test.csv"
    header, row, *_ = path.read_text().splitlines()
    changed = re.sub(old, new, row)
    assert changed != row
    path.write_text("\n".join([header, changed]) + "\n")
    with pytest.raises(UsageError, match=rf"test\.csv, line 2: expected {message}"):
        build(tmp_path / "data", source)
    assert not (tmp_path / "data").exists()


def test_wrong_settings_are_told(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--num-aug", "-1"], ["--subsample-size", "0"], ["--min-difficulty", "1000"]):
        with pytest.raises(SystemExit) as stop:
            main(["--output-dir", str(tmp_path / "data"), "--source-dir", str(source), *arguments])
        assert stop.value.code == 2 and "error:" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
