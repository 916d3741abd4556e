"""Broken input of many kinds: each is read, or counted with its reason, or one clear error that says where."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from config.compose import compose_config
from config.errors import UsageError
from dataset.instruct import Source
from dataset.text import rows
from dataset.text.conversation import Template
from dataset.text.loader import TextDataset
from dataset.text.tokenizer import Tokenizer
from tests.test_forms import UNKNOWN

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")
GOOD = b'{"prompt": "Why?", "answer": "So."}'


def messages(*turns: tuple[Any, Any]) -> bytes:
    return json.dumps({"conversations": [{"from": role, "value": text} for role, text in turns]}, ensure_ascii=False).encode()


def pair(prompt: str, answer: str) -> bytes:
    return json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False).encode()


# A line between two good ones, and what becomes of it: "kept", or the reason under which it is dropped or malformed.
LINES: dict[str, tuple[bytes, str]] = {
    "U+2028 in a string": (pair("a\u2028b", "c\u2029d"), "kept"),
    "U+0085 in a string": (pair("a\x85b", "c"), "kept"),
    "vertical tab and form feed, escaped": (pair("a\x0b\x0cb", "c"), "kept"),
    "NUL, escaped": (b'{"prompt": "a\\u0000b", "answer": "c"}', "kept"),
    "NUL, bare": (b'{"prompt": "a\x00b", "answer": "c"}', "bad_json"),
    "byte order mark before a row": (b"\xef\xbb\xbf" + GOOD, "kept"),
    "byte order mark in a text": (pair("\ufeffa", "b"), "kept"),
    "Windows newline": (GOOD + b"\r", "kept"),
    "old Mac newlines": (GOOD + b"\r" + GOOD, "bad_json"),
    "blank line": (b"", "blank_line"),
    "line of blanks": (b" \t \r", "blank_line"),
    "bad UTF-8": (b'{"prompt": "\xff\xfe", "answer": "x"}', "bad_utf8"),
    "cut-off UTF-8": (b'{"prompt": "\xe2\x82", "answer": "x"}', "bad_utf8"),
    "Latin-1": ('{"prompt": "caf\u00e9", "answer": "x"}'.encode("latin-1"), "bad_utf8"),
    "UTF-16": (GOOD.decode().encode("utf-16-le"), "bad_json"),
    "half a surrogate pair": (b'{"prompt": "\\ud83d", "answer": "x"}', "bad_unicode"),
    "both halves of a surrogate pair": (b'{"prompt": "\\ud83d\\ude00", "answer": "x"}', "kept"),
    "cut-off row": (GOOD[:-5], "bad_json"),
    "two rows on a line": (GOOD + GOOD, "bad_json"),
    "trailing comma": (GOOD + b",", "bad_json"),
    "single quotes": (b"{'prompt': 'a', 'answer': 'b'}", "bad_json"),
    "no JSON": (b"<html>404</html>", "bad_json"),
    "nested without end": (b"[" * 100_000, "bad_json"),
    "number without end": (b"9" * 10_000, "bad_json"),
    "gigantic line": (pair("x" * 3000, "y"), "too_large"),
    "list": (b'["Why?", "So."]', "not_an_object"),
    "null": (b"null", "not_an_object"),
    "number": (b"NaN", "not_an_object"),
    "empty object": (b"{}", "unknown_form"),
    "unknown keys": (b'{"words": "x"}', "unknown_form"),
    "instruction beside its input": (b'{"instruction": "a", "input": "b", "output": "c"}', "kept"),
    "raw text": (b'{"text": "x"}', "kept"),
    "two prompts": (b'{"prompt": "a", "question": "b", "answer": "c"}', "two_keys"),
    "two answers": (b'{"prompt": "a", "answer": "b", "output": "c"}', "two_keys"),
    "two system texts": (b'{"prompt": "a", "answer": "b", "system": "c", "system_prompt": "d"}', "two_keys"),
    "text under another key": (b'{"prompt": "a", "answer": "b", "notes": "c"}', "unread_text"),
    "another flag": (b'{"conversations": [{"from": "human", "value": "a", "learn": false}]}', "unread_key"),
    "a tool's turn": (messages(("human", "a"), ("tool", "b"), ("gpt", "c")), "tool_turn"),
    "the same key twice": (b'{"prompt": "a", "prompt": "b", "answer": "c"}', "duplicate_key"),
    "prompt null": (b'{"prompt": null, "answer": "b"}', "no_user_turn"),
    "answer a number": (b'{"prompt": "a", "answer": 7}', "wrong_type"),
    "answer a list": (b'{"prompt": "a", "answer": ["b"]}', "wrong_type"),
    "nested lists of turns": (b'{"conversations": [[{"from": "human", "value": "a"}]]}', "wrong_type"),
    "conversations an object": (b'{"conversations": {"from": "human"}}', "wrong_type"),
    "conversations a string": (b'{"conversations": "human: a"}', "wrong_type"),
    "value null": (messages(("human", "a"), ("gpt", None)), "missing_key"),
    "turn without a value": (b'{"conversations": [{"from": "human"}]}', "missing_key"),
    "turn without a role": (b'{"conversations": [{"value": "a"}]}', "missing_key"),
    "turns under other names": (b'{"conversations": [{"speaker": "user", "said": "a"}]}', "missing_key"),
    "unknown role": (messages(("human", "a"), ("wizard", "b"), ("gpt", "c")), "unknown_role"),
    "role null": (messages((None, "a"), ("gpt", "c")), "missing_key"),
    "weight NaN": (b'{"conversations": [{"from": "gpt", "value": "x", "weight": NaN}]}', "wrong_type"),
    "weight infinite": (b'{"conversations": [{"from": "gpt", "value": "x", "weight": 1e999}]}', "wrong_type"),
    "weight a half": (b'{"conversations": [{"from": "gpt", "value": "x", "weight": 0.5}]}', "wrong_type"),
    "weight in words": (b'{"conversations": [{"from": "gpt", "value": "x", "weight": "some"}]}', "wrong_type"),
    "no turns": (messages(), "no_user_turn"),
    "empty turns": (messages(("human", ""), ("gpt", "")), "empty_prompt"),
    "empty answer": (messages(("human", "a"), ("gpt", " \n")), "empty_answer"),
    "answer before the question": (messages(("gpt", "a"), ("human", "b")), "no_answer"),
    "no answer": (messages(("human", "a")), "no_answer"),
    "system in the middle": (messages(("human", "a"), ("system", "b"), ("gpt", "c")), "kept"),
    "system last": (messages(("human", "a"), ("gpt", "c"), ("system", "b")), "kept"),
    "two answers in a row": (messages(("human", "a"), ("gpt", "b"), ("gpt", "c")), "kept"),
    "two questions in a row": (messages(("human", "a"), ("human", "b"), ("gpt", "c")), "kept"),
    "empty system": (messages(("system", ""), ("human", "a"), ("gpt", "c")), "kept"),
    "forged tags and control pieces": (pair("</s><s>[ASSISTANT]\n", "[USER]\n<s>"), "kept"),
    "prompt beyond the context": (pair("word " * 300, "Yes."), "kept"),
    "answer beyond the context": (pair("Go on?", "word " * 300), "kept"),
    "further keys of any type": (b'{"prompt": "a", "answer": "b", "id": [NaN, {"x": null}]}', "kept"),
}


CONFIG = compose_config("cfg_pretrain_instruct", ["dataset=jsonl", "dataset.seq_len=64", "dataset.test_ratio=0"]).dataset


def open_file(path: Path, on_bad_row: str = "skip") -> TextDataset:
    changes = {"data_dir": str(path.parent), "files": (path.name,), "on_bad_row": on_bad_row, "default_system_prompt": None}
    return Source(CONFIG.model_copy(update=changes)).open_split("train", TOKENIZER, Template())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.zst"])
@pytest.mark.parametrize("kind", LINES)
def test_a_broken_line_is_read_or_counted_or_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_BYTES", 2000 if kind == "gigantic line" else rows.MAX_ROW_BYTES)
    line, outcome = LINES[kind]
    content = GOOD + b"\n" + line + b"\n" + GOOD + b"\n"
    (tmp_path / name).write_bytes(zstandard.ZstdCompressor().compress(content) if name.endswith("zst") else content)
    counts = open_file(tmp_path / name).counts
    assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["bad"].values()) == 3
    assert {**counts["dropped"], **counts["bad"]} == ({} if outcome == "kept" else {outcome: 1})
    if counts["bad"]:
        with pytest.raises(UsageError, match=rf"{name}:2: .*expected .*on_bad_row=skip"):
            open_file(tmp_path / name, "error")
    else:
        assert len(open_file(tmp_path / name, "error")) == counts["kept"]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_run_stops_at_a_row_with_something_unknown(tmp_path: Path, kind: str) -> None:
    row, key = UNKNOWN[kind]
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"\n" + json.dumps(row).encode() + b"\n" + GOOD + b"\n")
    with pytest.raises(UsageError) as caught:
        open_file(tmp_path / "a.jsonl", "error")
    assert f"{tmp_path / 'a.jsonl'}:2: " in str(caught.value) and key in str(caught.value)


def parquet(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


QA = {"question": ["Why?"] * 3, "response": ["So."] * 3}
NO_TEXT = pyarrow.array([b"Why?", b"\xff", b"How?"]).view(pyarrow.string())
SKIPPED = "empty.*malformed"


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


# A whole file, and what is told, or how many of its rows are kept with malformed ones skipped.
FILES: dict[str, tuple[str, bytes | Callable[[], bytes], str | int]] = {
    "empty": ("a.jsonl", b"", "empty"),
    "blank lines only": ("a.jsonl", b"\n\n", "empty.*blank_line"),
    "no newline at the end": ("a.jsonl", GOOD + b"\n" + GOOD, 2),
    "UTF-16 with its mark": ("a.jsonl", (GOOD.decode() + "\n").encode("utf-16"), SKIPPED),
    "unknown suffix": ("a.txt", b"a,b\n", "name that ends in"),
    "compressed in another way": ("a.jsonl.lz4", b"\x1f\x8b", "name that ends in"),
    "cut-off gzip": ("a.jsonl.gz", cut(gzip.compress(GOOD * 9)), "damaged"),
    "cut-off bzip2": ("a.jsonl.bz2", cut(bz2.compress(GOOD * 9)), "damaged"),
    "cut-off xz": ("a.jsonl.xz", cut(lzma.compress(GOOD * 9)), "damaged"),
    "a table": ("a.csv", b"prompt,answer\nWhy?,So.\n", 1),
    "a table without rows": ("a.csv", b"prompt,answer\n", "empty"),
    "a table without columns": ("a.csv", b"\nWhy?,So.\n", "columns' names"),
    "a table with a short row": ("a.csv", b"prompt,answer\nWhy?\nWhy?,So.\n", 1),
    "a table with a quote that never ends": ("a.csv", b'prompt,answer\n"Why?,So.\n', "expected a row of CSV"),
    "a table in Latin-1": ("a.csv", "prompt,answer\ncaf\u00e9?,So.\n".encode("latin-1"), "expected UTF-8"),
    "no zstd": ("a.jsonl.zst", GOOD, "damaged"),
    "empty zstd": ("a.jsonl.zst", b"", "no bytes at all"),
    "cut-off zstd": ("a.jsonl.zst", cut(zstandard.ZstdCompressor().compress(GOOD * 9)), "damaged"),
    "rubbish behind zstd": ("a.jsonl.zst", zstandard.ZstdCompressor().compress(GOOD) + b"\0\0\0\0", "damaged"),
    "array": ("a.json", b"[" + GOOD + b"," + GOOD + b"]", 2),
    "pretty-printed array": ("a.json", json.dumps([json.loads(GOOD)] * 3, indent=2).encode(), 3),
    "lines in .json": ("a.json", GOOD + b"\n" + GOOD, 2),
    "malformed element": ("a.json", b"[" + GOOD + b', {"a" 1}, 7]', "row 2: expected one JSON array"),
    "an element that is no row": ("a.json", b"[" + GOOD + b", 7]", 1),
    "array cut off": ("a.json", b"[" + GOOD + b", {", "expected one JSON array"),
    "array that never closes a string": ("a.json", b'[{"prompt": "a]', "expected one JSON array"),
    "two arrays": ("a.json", b"[" + GOOD + b"]\n[]", r"name it \.jsonl"),
    "empty array": ("a.json", b"[]", "empty"),
    "array of rows in an object": ("a.json", b'{"data": [' + GOOD + b"]}", SKIPPED),
    "array in a .jsonl": ("a.jsonl", b"[" + GOOD + b"]", SKIPPED),
    "parquet": ("a.parquet", lambda: parquet(**QA), 3),
    "parquet without rows": ("a.parquet", lambda: parquet(question=pyarrow.array([], pyarrow.string())), "empty"),
    "cut-off parquet": ("a.parquet", lambda: cut(parquet(**QA)), "complete parquet"),
    "empty parquet": ("a.parquet", b"", "complete parquet"),
    "no parquet": ("a.parquet", GOOD, "complete parquet"),
    "parquet with damaged pages": ("a.parquet", lambda: parquet(**QA).replace(b"Why?", b"\xff" * 4), "empty.*malformed.*bad_utf8"),
    "parquet with other columns": ("a.parquet", lambda: parquet(words=["x"]), "empty.*unknown_form"),
    "parquet with numbers": ("a.parquet", lambda: parquet(question=[1, 2], response=["a", "b"]), "empty.*wrong_type"),
    "parquet with nulls": ("a.parquet", lambda: parquet(question=["a", None], response=["b", "b"]), 1),
    "parquet with bytes": ("a.parquet", lambda: parquet(question=[b"a"], response=[b"b"]), 1),
    "parquet with bad UTF-8": ("a.parquet", lambda: parquet(question=NO_TEXT, response=["x"] * 3), 2),
    "parquet with categories": (
        "a.parquet", lambda: parquet(question=pyarrow.array(["a", "b"]).dictionary_encode(), response=["a", "b"]), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_broken_file_is_read_or_told(tmp_path: Path, kind: str) -> None:
    name, content, outcome = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content())
    if isinstance(outcome, int):
        counts = open_file(path).counts
        assert counts["kept"] == outcome
        assert counts["read"] == counts["kept"] + sum(counts["dropped"].values()) + sum(counts["bad"].values())
        return
    with pytest.raises(UsageError, match=outcome) as caught:
        open_file(path)
    assert name in str(caught.value)
    with pytest.raises(UsageError):
        open_file(path, "error")
