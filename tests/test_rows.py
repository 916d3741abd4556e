"""Rows of each format, streamed; damaged files; rows too large to hold."""

import bz2
import datetime
import gzip
import json
import lzma
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from config.errors import UsageError
from dataset.text import rows
from dataset.text.rows import COMPRESSIONS, BadRow, NothingToLearn, RowFile, open_row_file, parse_row, to_json


def compressed(content: bytes, suffix: str) -> bytes:
    compress = {
        ".zst": zstandard.ZstdCompressor().compress,
        ".gz": gzip.compress,
        ".xz": lzma.compress,
        ".bz2": bz2.compress,
    }.get(suffix, bytes)
    half = len(content) // 2  # two frames, as a file has that was appended to
    return compress(content[:half]) + compress(content[half:])


def write(path: Path, content: bytes) -> RowFile:
    path.write_bytes(compressed(content, path.suffix))
    return open_row_file(path)


def text_of(data: Any) -> str:
    assert isinstance(data, bytes)
    return data.decode()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", *(f"a.jsonl{suffix}" for suffix in COMPRESSIONS)])
def test_lines_end_at_newlines_only(tmp_path: Path, name: str) -> None:
    expected = ["\ufefffirst", "a\u2028b\x85c\x0b", "", "long " * 50, "last, without a newline"]
    file = write(tmp_path / name, "\n".join(expected).encode())
    assert [(number, text_of(data)) for number, data in file.rows()] == list(enumerate(expected, 1))
    assert file.where(3) == f"{file.path}:3"


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
        patch.setattr(rows, "_BLOCK", block)
        patch.setattr(rows, "_OPENING", 8)
        file = open_row_file(path)
        expected = json.loads(path.read_text(encoding="utf-8-sig"))
        assert [json.loads(text_of(data)) for _, data in file.rows()] == expected
        assert file.where(2) == f"{path}, row 2"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'[{"a": 1}', "row 1: .*an array that doesn't end"),
        (b'[{"a": "]', "row 1: .*Unterminated string"),
        (b"[", "row 1: .* an array that doesn't end"),
        (b'[{"a": "\\', "row 1: .*Unterminated string"),
        (b'[{"a": 1} {"a": 2}]', "row 2: .*where a comma or ] should be"),
        (b"[,]", "row 1: .*where a row should be"),
        (b"[1, 2", "row 2: .*doesn't end"),
    ],
)
def test_a_damaged_array_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(UsageError, match=f"a.json, {told}"):
        list(write(tmp_path / "a.json", content).rows())


def test_an_array_is_read_in_blocks(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", json.dumps([{"a": "x" * 10_000}] * 3000).encode())
    tracemalloc.start()
    try:
        assert sum(1 for _ in file.rows()) == 3000
        assert tracemalloc.get_traced_memory()[1] < 10 * rows._BLOCK  # of 30 MB
    finally:
        tracemalloc.stop()


def test_more_than_one_array_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"name it \.jsonl"):
        list(write(tmp_path / "a.json", b"[1]\n[2]\n").rows())


@pytest.mark.parametrize("suffix", COMPRESSIONS)
@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: b"nothing of the kind", lambda data: b""])
def test_a_damaged_compressed_file_is_told(tmp_path: Path, damage: Any, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(damage(compressed(b'{"a": 1}\n' * 100, suffix)))
    with pytest.raises(UsageError, match="damaged"):
        list(open_row_file(path).rows())


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_gigantic_row_is_told_and_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 50)
    monkeypatch.setattr(rows, "_BLOCK", 16)
    giant = json.dumps({"a": "x" * 200})
    content = {
        "a.jsonl": f'{{"a": "1"}}\n{giant}\n{{"a": "2"}}\n',
        "a.json": f'[{{"a": "1"}},{giant},{{"a": "2"}}]',
        "a.csv": f"a\n1\n{'x' * 200}\n2\n",
    }[name]
    data = [data for _, data in write(tmp_path / name, content.encode()).rows()]
    assert [data[i] if isinstance(data[i], dict) else json.loads(text_of(data[i])) for i in (0, 2)] == [{"a": "1"}, {"a": "2"}]
    assert isinstance(data[1], BadRow) and data[1].reason == "too_large"


def test_an_element_with_a_key_twice_spoils_its_own_row_only(tmp_path: Path) -> None:
    data = [data for _, data in write(tmp_path / "a.json", b'[{"a": 1, "a": 2}, {"a": [3]}]').rows()]
    assert isinstance(data[0], BadRow) and data[0].reason == "duplicate_key"
    assert text_of(data[1]) == '{"a": [3]}'


def test_values_of_a_table_are_text_as_it_stands(tmp_path: Path) -> None:
    """No value is taken for a number, a date or for nothing."""
    file = write(tmp_path / "a.csv.gz", '\ufeffq,a\n007,NA\n"two\nlines, quoted ""so""",\n\n2020-01-01,null\nshort\n'.encode())
    expected = [{"q": "007", "a": "NA"}, {"q": 'two\nlines, quoted "so"', "a": ""}, {"q": "2020-01-01", "a": "null"}]
    found = list(file.rows())
    assert [data for _, data in found[:3]] == expected and [number for number, _ in found] == [2, 4, 6, 7]
    assert isinstance(found[3][1], BadRow) and found[3][1].reason == "wrong_columns" and file.where(7) == f"{file.path}:7"
    tabs = write(tmp_path / "a.tsv", b"q\ta\nWhy, so?\tSo.\n")
    assert list(tabs.rows()) == [(2, {"q": "Why, so?", "a": "So."})]


def test_two_tables_can_be_read_at_once(tmp_path: Path) -> None:
    """Python's limit on the length of a value, which is too low, is one for all readers."""
    one, other = (write(tmp_path / name, f"a\n1\n{'x' * 200_000}\n".encode()).rows() for name in ("a.csv", "b.csv"))
    next(one), next(other)
    assert [len(list(reader)) for reader in (one, other)] == [1, 1]


def test_a_table_without_a_line_has_no_rows(tmp_path: Path) -> None:
    assert list(write(tmp_path / "a.csv", b"").rows()) == []


@pytest.mark.parametrize("content", [b"a,a\n1,2\n", b"a,\n1,2\n", b'a\n"1"x\n', b'a\n"1', b"a\n\xff\n"])
def test_a_table_that_can_not_be_read_is_told(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UsageError, match=r"a\.csv"):
        list(write(tmp_path / "a.csv", content).rows())


TURNS = [{"from": "human", "value": "Why?", "weight": None}, {"from": "gpt", "value": "So.", "weight": 1.0}]
VALUES = [{"id": f"cot.{i}", "question": f"Q{i}", "response": None, "conversations": TURNS} for i in range(10)]


def write_columns(path: Path, table: Any) -> None:
    """A parquet file, an Arrow stream, or (feather) an Arrow file with a footer."""
    if path.name.startswith("feather"):
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    elif ".arrow" in path.name:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=4)
    else:
        pyarrow.parquet.write_table(table, path, row_group_size=4)


COLUMNAR = ("a.parquet", "a.arrow", "feather.arrow")


@pytest.mark.parametrize("name", COLUMNAR)
@pytest.mark.parametrize("suffix", ["", ".zst", ".xz"])
def test_rows_of_columns_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    monkeypatch.setattr(rows, "_ROWS_AT_ONCE", 3)
    path = tmp_path / name
    write_columns(path, pyarrow.Table.from_pylist(VALUES))
    file = open_row_file(path) if not suffix else write(tmp_path / (name + suffix), path.read_bytes())
    assert list(file.rows()) == list(enumerate(VALUES, 1))
    assert file.where(10) == f"{file.path}, row 10"
    write_columns(path, pyarrow.Table.from_pylist(VALUES).slice(0, 0))
    assert list(open_row_file(path).rows()) == []


def test_a_value_that_is_no_text_spoils_its_own_row_only(tmp_path: Path) -> None:
    array = pyarrow.array([b"good", b"\xff\xfe", b"also good"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"question": array}), tmp_path / "a.parquet")
    data = [data for _, data in open_row_file(tmp_path / "a.parquet").rows()]
    assert data[0] == {"question": "good"} and data[2] == {"question": "also good"}
    assert isinstance(data[1], BadRow) and data[1].reason == "bad_utf8"


def test_a_date_that_python_can_not_hold_is_metadata(tmp_path: Path) -> None:
    far = pyarrow.array([10, 10**9, None], pyarrow.date32())
    table = pyarrow.table({"question": ["a", "b", "c"], "day": far, "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = [json.loads(to_json(data)) for _, data in open_row_file(tmp_path / "a.parquet").rows() if not isinstance(data, BadRow)]
    assert [row["question"] for row in found] == ["a", "b", "c"] and [row["n"] for row in found] == [1, 2, 3]
    assert all(isinstance(row["day"], dict) for row in found[:2]) and found[2]["day"] is None


def test_a_date_within_a_value_spoils_its_own_row_only(tmp_path: Path) -> None:
    days = pyarrow.StructArray.from_arrays(
        [pyarrow.array([10, 10**9], pyarrow.date32()), pyarrow.array(["x", "y"])], ["day", "said"]
    )
    pyarrow.parquet.write_table(pyarrow.table({"turn": days}), tmp_path / "a.parquet")
    good, bad = (data for _, data in open_row_file(tmp_path / "a.parquet").rows())
    assert not isinstance(good, BadRow) and isinstance(bad, BadRow) and bad.reason == "wrong_type"


def test_a_json_object_of_several_lines_is_told(tmp_path: Path) -> None:
    for content in (b'{\n  "data": [\n  ]\n}\n', b'{"data": [\n{"q": "Why?"}]}'):
        with pytest.raises(UsageError, match="found one object over several lines; take the array out of it"):
            write(tmp_path / "a.json", content)
    assert list(write(tmp_path / "b.json", b'{"q": 1}\n{"q":').rows()) == [(1, b'{"q": 1}'), (2, b'{"q":')]
    assert list(write(tmp_path / "c.ndjson", b'{"q": 1}\n').rows()) == [(1, b'{"q": 1}')]


def test_utf_16_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"byte 0xff; .*iconv -f UTF-16 -t UTF-8"):
        list(write(tmp_path / "a.csv", "q\n1\n".encode("utf-16")).rows())


@pytest.mark.parametrize("name", COLUMNAR)
def test_a_column_that_is_there_twice_is_told(tmp_path: Path, name: str) -> None:
    """A row as a dict would keep the last one, and lose the other in silence."""
    table = pyarrow.Table.from_arrays([pyarrow.array(["Q"]), pyarrow.array(["A"])], names=["answer", "answer"])
    write_columns(tmp_path / name, table)
    with pytest.raises(UsageError, match=r"each column once, found \['answer', 'answer'\]"):
        list(open_row_file(tmp_path / name).rows())


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_text_that_is_not_utf8_is_told_with_a_way_to_convert_it(tmp_path: Path, name: str) -> None:
    content = "q\ncafé\n" if name == "a.csv" else '[{"q": "café"}]'
    with pytest.raises(UsageError, match=r"expected UTF-8, found byte 0xe9; convert the file.*iconv"):
        list(write(tmp_path / name, content.encode("latin-1")).rows())


@pytest.mark.parametrize("damage", [lambda data: data[:-7], lambda data: data[:200], lambda data: b"", lambda data: b"[1, 2]"])
@pytest.mark.parametrize("name", COLUMNAR)
def test_a_damaged_file_of_columns_is_told(tmp_path: Path, damage: Any, name: str) -> None:
    path = tmp_path / name
    write_columns(path, pyarrow.table({"question": ["Q"] * 1000}))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UsageError, match=f"complete {path.suffix[1:]} file"):
        list(open_row_file(path).rows())


def test_values_become_json(tmp_path: Path) -> None:
    when = datetime.datetime(2020, 1, 1)
    assert json.loads(to_json({"a": "ü\u2028", "b": b"text", "c": b"\xff", "d": when, "e": [1.5, None]})) == {
        "a": "ü\u2028", "b": "text", "c": {"bytes": True}, "d": {"datetime": True}, "e": [1.5, None],
    }  # fmt: skip
    assert to_json(b'{"a": 1}') == b'{"a": 1}'


@pytest.mark.parametrize("name", ["a.txt", "a", "a.zip", "a.jsonl.lz4", "a.gz"])
def test_files_of_other_formats_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with pytest.raises(UsageError, match=r"\.parquet"):
        open_row_file(tmp_path / name)


def test_files_that_can_not_be_opened_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a data file"):
        open_row_file(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="found a folder"):
        open_row_file(tmp_path)


def test_a_bad_row_travels_between_processes() -> None:
    again = pickle.loads(pickle.dumps(BadRow("why", "what was found")))
    assert (again.reason, str(again)) == ("why", "what was found")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "bad_json"),
        (b'{"a": 1} trailing', "bad_json"),
        (b"[" * 100_000, "bad_json"),
        (b"1" * 10_000, "bad_json"),
        (b'{"prompt": "\xff", "answer": "x"}', "bad_utf8"),
        (b'{"prompt": "a", "prompt": "b", "answer": "x"}', "duplicate_key"),
        (b'{"conversations": [{"from": "gpt", "value": "x", "value": "y"}]}', "duplicate_key"),
        (b"[1]", "not_an_object"),
        (b"null", "not_an_object"),
        (b'"text"', "not_an_object"),
    ],
)
def test_a_line_that_is_no_object_has_a_reason_and_says_what_was_found(line: bytes, reason: str) -> None:
    with pytest.raises(BadRow, match="expected") as caught:
        parse_row(line)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_and_windows_newlines_are_no_obstacle() -> None:
    assert parse_row(b'\xef\xbb\xbf{"a": 1}\r') == {"a": 1}
    with pytest.raises(NothingToLearn, match="blank_line"):
        parse_row(b" \r")
