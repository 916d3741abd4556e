"""CSV puzzles: rows as they stand, found or fetched, and every malformed one told with its line."""

from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from dataset import source_files
from dataset.puzzles.csv_source import locate, read_csv

HEADER = "source,question,answer,rating\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(text)
    return path


def test_rows_are_read_as_they_stand(tmp_path: Path) -> None:
    rows = read_csv(write(tmp_path, HEADER + 'a, # ,"o#,",3\nb,123,456,9\n'))
    assert [bytes(question).decode() for question in rows.questions] == [" # ", "123"]
    assert [bytes(answer).decode() for answer in rows.answers] == ["o#,", "456"]
    assert rows.lines.tolist() == [2, 3]


def test_the_least_rating(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "a,1,1,3\nb,2,2,9\nc,3,3,10\n")
    assert read_csv(path, 9).lines.tolist() == [3, 4]
    with pytest.raises(UsageError, match="no puzzle with a rating of at least 11"):
        read_csv(path, 11)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns source, question, answer, rating, found nothing"),
        ("a,b,c,d\n", "found a, b, c, d"),
        (HEADER, "has no puzzle"),
        (HEADER + "a,1,1,1\nb,2,2\n", "line 3: expected 4 columns, found 3"),
        (HEADER + "a,1,1,1\nb,22,2,1\n", "line 3: expected a question and an answer of 1 characters, found 2 and 1"),
        (HEADER + "a,1,12,1\n", "line 2: .*found 1 and 2"),
        (HEADER + "a,é,1,1\n", "can't be read as CSV"),
    ],
)
def test_malformed_rows_are_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_csv(write(tmp_path, text))


def test_a_rating_is_read_only_if_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER + "a,1,1,hard\n")
    assert len(read_csv(path).lines) == 1
    with pytest.raises(UsageError, match="line 2: expected a whole number as rating, found 'hard'"):
        read_csv(path, 1)


def test_a_row_that_breaks_a_rule_is_told_with_its_line(tmp_path: Path) -> None:
    rows = read_csv(write(tmp_path, HEADER + "a,1,1,1\nb,2,2,1\n"))
    rows.require(rows.questions[:, 0] > 0, "anything")
    with pytest.raises(UsageError, match="line 3: expected a one"):
        rows.require(rows.questions[:, 0] == ord("1"), "a one")


def test_missing_files_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def note(repo: str, filename: str, destination: Path, **more: Any) -> Path:
        asked.append((repo, filename, destination, more["repo_type"]))
        return destination

    monkeypatch.setattr(source_files, "download", note)
    path = write(tmp_path, HEADER)
    assert locate(tmp_path, "train", "me/puzzles") == path
    assert locate(tmp_path, "test", "me/puzzles") == tmp_path / "test.csv"
    assert asked == [("me/puzzles", "test.csv", tmp_path / "test.csv", "dataset")]
