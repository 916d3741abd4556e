"""A file appears whole or not at all, whoever else writes it; damaged lines are reported with their place."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from artifacts.files import JsonLines, json_lines, whole_file, write_whole
from config.errors import UsageError


def test_what_fails_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_bytes(b"ne")
        raise RuntimeError
    with (
        pytest.raises(UsageError, match=r"file can't be written: .*No space left.*; make room"),
        whole_file(path, "make room") as p,
    ):
        p.write_bytes(b"ne")
        raise OSError(28, "No space left on device")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with whole_file(path) as first:
        first.write_bytes(b"first")
        write_whole(path, b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_appeared_meanwhile_is_kept_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "file"
    with whole_file(path, keep_existing=True) as first:
        first.write_bytes(b"first")
        with whole_file(path, keep_existing=True) as second:
            second.write_bytes(b"second")
    assert path.read_bytes() == b"second" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "prepare",
    [lambda path: path.mkdir(), lambda path: path.parent.rmdir(), lambda path: (path.parent.rmdir(), path.parent.touch())],
)
def test_what_cannot_be_written_is_reported(tmp_path: Path, prepare: Callable[[Path], object]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    prepare(folder / "file")
    with pytest.raises(UsageError, match="file can't be written"):
        write_whole(folder / "file", b"new")


def test_a_line_that_is_being_written_is_no_line_yet(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "more": [1]}\n{"step": 3')
    assert list(json_lines(path, "step")) == [{"step": 1}, {"step": 2, "more": [1]}]


@pytest.mark.parametrize("line", ['{"step": 3', "[]", "{}", "\x00\x00", "\udcff"])
def test_a_damaged_line_is_reported_with_its_place(tmp_path: Path, line: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(f"{json.dumps({'step': 1})}\n{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=r"lines\.jsonl, line 2 is damaged: .*mend or delete"):
        list(json_lines(path, "step"))


def test_lines_are_readable_while_a_file_grows(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "run/metrics.jsonl")
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": 0.25})
    found = (tmp_path / "run/metrics.jsonl").read_bytes()
    assert [json.loads(line) for line in found.splitlines()] == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert log.length == len(found)
    log.close()


def test_a_file_of_lines_is_cut_back_to_what_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.write({"step": 1})
    kept = log.length
    log.write({"step": 2, "text": "é"})
    log.close()
    resumed = JsonLines(path, keep=kept)
    assert resumed.length == kept
    resumed.write({"step": 2, "again": True})
    resumed.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2, "again": true}\n' and resumed.length == path.stat().st_size
    JsonLines(path).close()
    assert path.read_text() == ""
