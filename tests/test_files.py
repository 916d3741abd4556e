"""Rows of each kind of file, streamed and found again; damaged files; rows too large to hold."""

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text import files
from dataset.text.files import BadRow, DataFile, open_data_file


def write(path: Path, content: bytes) -> DataFile:
    if path.suffix == ".zst":
        half = len(content) // 2  # two frames, as a file has that was appended to
        content = b"".join(zstandard.ZstdCompressor().compress(part) for part in (content[:half], content[half:]))
    path.write_bytes(content)
    return open_data_file(path)


def text_of(data: Any) -> str:
    assert isinstance(data, bytes)
    return data.decode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst", "a.json"])
@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_lines_end_at_newlines_only_and_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(files, "_READ_BYTES", block)
    expected = ["\ufefffirst", "a\u2028b\x85c\x0b", "", "long " * 50, "last, without a newline"]
    file = write(tmp_path / name, "\n".join(expected).encode())
    rows = [row for row, _ in file.rows()]
    assert [text_of(row.data) for row in rows] == expected
    assert [row.number for row in rows] == [1, 2, 3, 4, 5]
    assert [text_of(file.row_at(row.position)) for row in rows] == expected
    assert [text_of(file.row_at(rows[at].position)) for at in (3, 3, 1, 4, 0)] == [expected[at] for at in (3, 3, 1, 4, 0)]
    assert file.where(3) == f"{file.path}:3"
    assert [read for _, read in file.rows()][-1] == file.size


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.sampled_from(['"', "\\", "],[", "{", '}\\"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5), st.sampled_from([None, 1]), st.booleans(), st.integers(1, 9))
@settings(max_examples=200)
def test_the_elements_of_any_array_are_found(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_text(
        "\ufeff \n" + json.dumps(values, indent=indent, ensure_ascii=ascii_only) + " \n", encoding="utf-8", errors="replace"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_READ_BYTES", block)
        file = open_data_file(path)
        rows = [row for row, _ in file.rows()]
        expected = json.loads(path.read_text(encoding="utf-8-sig"))
        assert [json.loads(text_of(row.data)) for row in rows] == expected
        assert [json.loads(text_of(file.row_at(row.position))) for row in rows] == expected
        assert file.where(2) == f"{path}, element 2"


@pytest.mark.parametrize("content", [b'[{"a": 1}', b'[{"a": "]', b"[", b'[{"a": "\\'])
def test_an_array_that_does_not_end_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match="complete JSON array"):
        list(write(tmp_path / "a.json", content).rows())


def test_more_than_one_array_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name it \.jsonl"):
        list(write(tmp_path / "a.json", b"[1]\n[2]\n").rows())


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"no zstd at all", lambda data: data + b"xx"])
def test_a_damaged_compressed_file_is_told(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(damage(zstandard.ZstdCompressor().compress(b'{"a": 1}\n' * 100)))
    with pytest.raises(UsageError, match="damaged"):
        list(open_data_file(path).rows())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_gigantic_row_is_told_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 50)
    monkeypatch.setattr(files, "_READ_BYTES", 16)
    giant = json.dumps({"a": "x" * 200})
    content = f'{{"a": 1}}\n{giant}\n{{"a": 2}}\n' if name == "a.jsonl" else f'[{{"a": 1}},{giant},{{"a": 2}}]'
    data = [row.data for row, _ in write(tmp_path / name, content.encode()).rows()]
    assert [json.loads(text_of(data[i])) for i in (0, 2)] == [{"a": 1}, {"a": 2}]
    assert isinstance(data[1], BadRow) and data[1].reason == "too_large"


def test_parquet_rows_keep_their_order_and_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PARQUET_ROWS", 3)
    turns = [{"from": "human", "value": "Why?", "weight": None}, {"from": "gpt", "value": "So.", "weight": 1.0}]
    values = [{"id": f"cot.{i}", "question": f"Q{i}", "response": None, "conversations": turns} for i in range(10)]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=4)
    file = open_data_file(path)
    rows = [row for row, _ in file.rows()]
    assert [row.data for row in rows] == values
    assert [row.number for row in rows] == list(range(1, 11))
    assert [file.row_at(row.position) for row in rows] == values
    assert [file.row_at(at) for at in (9, 9, 2, 4, 7, 5, 0)] == [values[at] for at in (9, 9, 2, 4, 7, 5, 0)]
    assert file.where(10) == f"{path}, row 10"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values).slice(0, 0), path)
    assert list(open_data_file(path).rows()) == []


def test_a_parquet_value_that_is_no_text_spoils_its_own_row_only(tmp_path: Path) -> None:
    array = pyarrow.array([b"good", b"\xff\xfe", b"also good"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": array}), tmp_path / "a.parquet")
    data = [row.data for row, _ in open_data_file(tmp_path / "a.parquet").rows()]
    assert data[0] == {"question": "good"} and data[2] == {"question": "also good"}
    assert isinstance(data[1], BadRow) and data[1].reason == "bad_utf8"


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:200], lambda data: b"", lambda data: b"[1, 2]"])
def test_a_damaged_parquet_file_is_told(tmp_path: Path, damage: Any) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["Q"] * 1000}), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match="complete parquet file"):
        list(open_data_file(path).rows())


def test_files_that_can_not_be_opened_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a data file"):
        open_data_file(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="found a folder"):
        open_data_file(tmp_path)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UsageError, match=r"\.parquet"):
        open_data_file(tmp_path / "a.csv")


def test_a_bad_row_travels_between_processes() -> None:
    again = pickle.loads(pickle.dumps(BadRow("why", "what was found")))
    assert (again.reason, str(again)) == ("why", "what was found")
