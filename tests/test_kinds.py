"""Kinds of puzzles: told by vocabulary and length, read from what a person writes, judged by rule."""

from pathlib import Path

import numpy as np
import pytest

from config.errors import UsageError
from dataset.build_small_puzzles import build_mazes, build_sudoku
from dataset.puzzles import maze, sudoku
from dataset.puzzles.arc_grids import IDENTITY, SEQ_LEN, VOCAB_SIZE, Pair, lay_out
from dataset.puzzles.draws import raw_bits
from dataset.puzzles.kinds import Arc, Kind, Maze, Sudoku, kind_of, read_questions
from dataset.puzzles.storage import PuzzleMetadata, open_sets

# A solved Sudoku, of which a few digits are left as clues.
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
CLUES = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
MAZE = ["S #", "  #", "# G"]


def described(seq_len: int, vocab_size: int) -> PuzzleMetadata:
    return PuzzleMetadata(
        pad_id=0,
        ignore_label_id=0,
        blank_identifier_id=0,
        vocab_size=vocab_size,
        seq_len=seq_len,
        num_puzzle_identifiers=1,
        total_groups=1,
        mean_puzzle_examples=1,
        total_puzzles=1,
        sets=("all",),
    )


def test_a_data_set_says_what_its_puzzles_are() -> None:
    nine, six, mazes, arc = (kind_of(described(*size)) for size in ((81, 11), (36, 8), (49, 6), (900, 12)))
    assert isinstance(nine, Sudoku) and nine.shape == sudoku.NINE
    assert isinstance(six, Sudoku) and six.shape == sudoku.SIX
    assert isinstance(mazes, Maze) and mazes.side == 7
    assert isinstance(arc, Arc)
    with pytest.raises(UsageError, match="found rows of 6 positions with 7 tokens"):
        kind_of(described(6, 7))


@pytest.mark.parametrize("maker", [build_sudoku, build_mazes])
def test_what_is_built_is_solved_and_a_changed_cell_is_not(tmp_path: Path, maker: type) -> None:
    maker(tmp_path / "data", train_size=1, test_size=20)
    metadata, sets = open_sets(tmp_path / "data", "test")
    kind, questions, answers = kind_of(metadata), np.array(sets["all"].inputs), np.array(sets["all"].labels)
    assert kind.solves(questions, answers).all() and not kind.solves(questions, questions).any()
    places = np.arange(20) % metadata.seq_len
    for token in (0, metadata.vocab_size - 1):
        changed = answers.copy()
        changed[np.arange(20), places] = token
        is_changed = (changed != answers).any(axis=1)
        assert is_changed.any() and not kind.solves(questions, changed)[is_changed].any()
    # What is shown can be given back.
    for question in questions:
        np.testing.assert_array_equal(kind.parse(kind.text(question)), question[None])


def test_a_solution_of_another_question_solves_nothing() -> None:
    kind = Sudoku(sudoku.NINE)
    [question], [answer] = kind.parse(CLUES), kind.parse(SOLUTION)
    exchanged = np.where(answer == 6, 7, np.where(answer == 7, 6, answer))  # 5 and 6 exchanged: the rules hold, givens don't
    assert kind.solves(question[None], answer[None]).all()
    assert kind.solves(answer[None] * 0 + 1, exchanged[None]).all() and not kind.solves(question[None], exchanged[None]).any()


def test_a_longer_way_solves_no_maze() -> None:
    kind = Maze(4)
    question = kind.parse("S  G\n    \n    \n    ")
    short, long = (kind_answer.replace("\n", "") for kind_answer in ("SooG\n    \n    \n    ", "So G\n ooo\n    \n    "))
    answers = [maze.to_tokens(np.frombuffer(text.encode(), np.uint8)) for text in (short, long)]
    assert kind.solves(np.repeat(question, 2, axis=0), np.stack(answers)).tolist() == [True, False]


def test_sudoku_is_read_however_it_stands() -> None:
    kind = Sudoku(sudoku.NINE)
    lines = "\n".join(CLUES[start : start + 9] for start in range(0, 81, 9))
    one = kind.parse(CLUES)
    for text in (lines, CLUES.replace(".", "0"), " ".join(CLUES) + "\n"):
        np.testing.assert_array_equal(kind.parse(text), one)
    assert len(kind.parse(f"{CLUES}\n{SOLUTION}\n")) == 2


def test_mazes_are_read_where_an_editor_cut_blanks_off() -> None:
    kind = Maze(3)
    whole = kind.parse("\n".join(MAZE))
    assert kind.text(whole[0]).splitlines() == MAZE
    for text in ("".join(MAZE), "\r\n".join([*MAZE, "", ""])):
        np.testing.assert_array_equal(kind.parse(text), whole)
    np.testing.assert_array_equal(kind.parse("S\n\nG\n"), kind.parse("S  \n   \nG  "))


def test_arc_shows_the_grid_on_the_canvas() -> None:
    grid = np.array([[1, 2], [3, 0]], np.uint8)
    codes = np.array([[IDENTITY.form, *IDENTITY.colours]], np.uint8)
    [[canvas]], _ = lay_out([Pair(grid, grid)], codes, None)
    assert (SEQ_LEN, VOCAB_SIZE) == (900, 12) and Arc().text(canvas) == "1 2\n3 0"
    assert Arc().text(np.zeros(SEQ_LEN, np.uint8)) == "?"


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        (Sudoku(sudoku.NINE), CLUES[:-1], "expected 81 characters for a Sudoku, or 9 lines, found 80"),
        (Sudoku(sudoku.NINE), "", "found 0"),
        (Sudoku(sudoku.SIX), CLUES[:36], "the digits 1 to 6, and 0 or . for a blank, found '7'"),
        (Sudoku(sudoku.NINE), "x" + CLUES[1:], "found 'x'"),
        (Sudoku(sudoku.NINE), "55" + CLUES[2:], "row 1 has the digit 5 twice"),
        (Sudoku(sudoku.NINE), CLUES[:18] + "5" + CLUES[19:], "column 1 has the digit 5 twice"),
        (Sudoku(sudoku.NINE), CLUES[:10] + "8" + CLUES[11:], "box 1 has the digit 8 twice"),
        (Maze(3), "S G", "expected 3 lines of 3 characters for a maze, found 1 lines of up to 3"),
        (Maze(3), "S  #\n\nG", "found 3 lines of up to 4"),
        (Maze(3), "S.G\n\n\n", "found '.'"),
        (Maze(3), "SoG\n\n\n", "found 'o'"),
        (Maze(3), "S  \n\n\n", "expected one G in a maze, found 0"),
        (Maze(3), "SSG\n\n\n", "expected one S in a maze, found 2"),
        (Maze(3), "S#G\n##\n\n", "no path leads from S to G"),
        (Arc(), "{}", "JSON"),
    ],
)
def test_what_is_no_puzzle_is_told(kind: Kind, text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "puzzle.txt"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_questions(path, kind)
    assert told in str(error.value) and str(path) in str(error.value)


def test_csv_without_answers_is_read(tmp_path: Path) -> None:
    path = tmp_path / "puzzles.CSV"
    # As a spreadsheet writes it, with a mark of the encoding before the first column's name.
    path.write_text(f'question,rating\n{CLUES},1\n"{SOLUTION}",2\n', encoding="utf-8-sig")
    assert len(read_questions(path, Sudoku(sudoku.NINE))) == 2
    path.write_text(f"question\n{CLUES}\n{CLUES[:-1]}\n")
    with pytest.raises(UsageError, match="line 3: expected 81 characters"):
        read_questions(path, Sudoku(sudoku.NINE))
    for content, told in (("answer\n1\n", "a column named question, found answer"), ("question\n", "has no puzzle"), ("", "none")):
        path.write_text(content)
        with pytest.raises(UsageError, match=told):
            read_questions(path, Sudoku(sudoku.NINE))
    with pytest.raises(UsageError, match="can't be read"):
        read_questions(tmp_path / "nowhere", Sudoku(sudoku.NINE))


@pytest.mark.parametrize("maker", [build_sudoku, build_mazes])
def test_symmetric_forms_are_puzzles_with_their_solutions(tmp_path: Path, maker: type) -> None:
    maker(tmp_path / "data", train_size=1, test_size=1)
    metadata, sets = open_sets(tmp_path / "data", "test")
    kind, [question], [answer] = kind_of(metadata), np.array(sets["all"].inputs), np.array(sets["all"].labels)
    cells, tokens = kind.symmetries(raw_bits(0, "test"), 8)
    questions, answers = (
        np.stack([table[row[order]] for order, table in zip(cells, tokens, strict=True)]) for row in (question, answer)
    )
    assert kind.solves(questions, answers).all()
    np.testing.assert_array_equal(questions[0], question)
    assert len({row.tobytes() for row in questions}) == 8
