"""The maze builder: labels are the shortest paths that were read, in eight forms if asked; wrong rows are told."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config.errors import UsageError
from dataset.build_maze_dataset import build, main
from dataset.puzzles.dihedral import FORMS, dihedral
from dataset.puzzles.loader import PuzzleData
from dataset.puzzles.maze import CHARACTERS, are_shortest
from dataset.puzzles.small_maze import draw_puzzles
from dataset.puzzles.storage import read_identifiers

REPOSITORY = Path(__file__).resolve().parents[1]
SIDE = 6


def text(maze: np.ndarray) -> str:
    return "".join(CHARACTERS[token - 1] for token in maze.ravel().tolist())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for split, (questions, answers) in draw_puzzles({"train": 5, "test": 3}, SIDE, 5, 0).items():
        rows = [f"made,{text(q)},{text(a)},5" for q, a in zip(questions, answers, strict=True)]
        (folder / f"{split}.csv").write_text("\n".join(["source,question,answer,rating", *rows]) + "\n")
    return folder


def squares(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    puzzles = PuzzleData([folder], split).sets["all"]  # type: ignore[arg-type]
    return np.array(puzzles.inputs).reshape(-1, SIDE, SIDE), np.array(puzzles.labels).reshape(-1, SIDE, SIDE)


@pytest.mark.parametrize("aug", [False, True])
def test_labels_are_shortest_paths_in_every_form(tmp_path: Path, source: Path, aug: bool) -> None:
    counts = build(tmp_path / "data", source, aug=aug)
    assert counts == {"train": {"mazes": 5, "shortest": 5, "only_one": 5}, "test": {"mazes": 3, "shortest": 3, "only_one": 3}}
    forms = FORMS if aug else 1
    questions, answers = squares(tmp_path / "data", "train")
    assert len(questions) == 5 * forms and are_shortest(questions, answers).all()
    for index in range(5 * forms):
        first, form = index // forms * forms, index % forms
        np.testing.assert_array_equal(questions[index], dihedral(questions[first], form))
        np.testing.assert_array_equal(answers[index], dihedral(answers[first], form))
    metadata = PuzzleData([tmp_path / "data"], "train").metadata
    assert (metadata.seq_len, metadata.vocab_size, metadata.total_groups, metadata.total_puzzles) == (36, 6, 5, 5)
    assert read_identifiers(tmp_path / "data") == ["<blank>"]


def test_rows_are_those_of_the_file(tmp_path: Path, source: Path) -> None:
    build(tmp_path / "data", source)
    for split in ("train", "test"):
        rows = [line.split(",")[1:3] for line in (source / f"{split}.csv").read_text().splitlines()[1:]]
        assert rows == [[text(question), text(answer)] for question, answer in zip(*squares(tmp_path / "data", split), strict=True)]


def test_a_subsample_is_drawn_by_seed(tmp_path: Path, source: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build(tmp_path / name, source, subsample_size=2, seed=seed)
    a, b, c = (squares(tmp_path / name, "train")[0] for name in "abc")
    assert len(a) == 2 and np.array_equal(a, b) and not np.array_equal(a, c)


def test_answers_that_are_no_shortest_path_are_counted(tmp_path: Path, source: Path) -> None:
    path = source / "test.csv"
    header, row, *_ = path.read_text().splitlines()
    path.write_text("\n".join([header, row.replace("o", " ")]) + "\n")
    assert build(tmp_path / "data", source)["test"] == {"mazes": 1, "shortest": 0, "only_one": 1}


def test_the_command_as_a_file_and_as_a_module(tmp_path: Path, source: Path) -> None:
    for program in (["-m", "dataset.build_maze_dataset"], ["dataset/build_maze_dataset.py"]):
        output = tmp_path / program[-1].replace("/", "-")
        arguments = ["--output-dir", str(output), "--source-dir", str(source), "--aug", "--subsample-size", "2"]
        done = subprocess.run([sys.executable, *program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert "train: 2 mazes, 2 answers are a shortest path, the only one in 2" in done.stdout
        assert len(squares(output, "train")[0]) == 16


@pytest.mark.parametrize(
    ("question", "answer", "message"),
    [
        ("S G  ", "SoG  ", "a square maze, not one of 5 cells"),
        ("S G?", "SoG?", "a question of"),
        ("SoG ", "SoG ", "a question of"),
        ("SSG ", "SSG ", "a question with one S"),
        ("S   ", "S   ", "a question with one G"),
        ("S#G ", "SoG ", "an answer that is the question with some blanks marked"),
        ("S #G", "S  G", "an answer that is the question with some blanks marked"),
    ],
)
def test_a_row_that_is_no_maze_is_told(tmp_path: Path, source: Path, question: str, answer: str, message: str) -> None:
    (source / "train.csv").write_text(f"source,question,answer,rating\na,{question},{answer},1\n")
    with pytest.raises(UsageError, match=f"line 2: expected {message}"):
        build(tmp_path / "data", source)


def test_other_wrong_input_is_told(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--output-dir", str(tmp_path / "data"), "--source-dir", str(source), "--subsample-size", "0"])
    assert stop.value.code == 2 and "--subsample-size" in capsys.readouterr().err
    (source / "test.csv").write_text("source,question,answer,rating\na,S G ,SoG ,1\n")
    with pytest.raises(UsageError, match="different sizes"):
        build(tmp_path / "data", source)
