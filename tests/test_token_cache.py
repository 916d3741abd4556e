"""Tokens on disk: reuse, their key, crashes, several processes at once, counts by reason, splits and subsets."""

import contextlib
import errno
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import mistral_common
import numpy as np
import pytest

from config.errors import UsageError
from dataset.text import row_encoder, token_cache
from dataset.text.conversation import Template, Turn, encode_conversation
from dataset.text.loader import TextDataset
from dataset.text.row_encoder import ANSWER_CUT, PROMPT_CUT
from dataset.text.rows import RowFile
from dataset.text.splits import are_test_hashes, prompt_hash
from dataset.text.token_cache import file_sha256, wanted_rows
from dataset.text.tokenizer import Tokenizer
from tests.conftest import load_file

MODEL = (Path(mistral_common.__file__).parent / "data/tokenizer.model.v1").read_bytes()
TOKENIZER = Tokenizer.from_bytes(MODEL)


def row(number: int, answer: str = "") -> str:
    return json.dumps({"prompt": f"Question {number}?", "answer": answer or f"Answer {number}."})


def write(path: Path, lines: list[str], age_s: int = 60) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    os.utime(path, ns=(path.stat().st_mtime_ns - age_s * 10**9,) * 2)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", [row(number) for number in range(40)])


def load(*files: Path, tokenizer: Tokenizer = TOKENIZER, **changes: Any) -> TextDataset:
    return load_file(files, tokenizer, **changes)


@pytest.fixture
def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each row that was tokenized."""
    encoded: list[int] = []

    def counted(*arguments: Any, **more: Any) -> Any:
        encoded.append(1)
        return encode_conversation(*arguments, **more)

    monkeypatch.setattr(row_encoder, "encode_conversation", counted)
    return encoded


def ids_of(loaded: TextDataset, index: int) -> list[int]:
    return [int(token) for token in loaded[index].ids]


def column(loaded: TextDataset, name: str) -> list[Any]:
    return [(loaded.raw if name == "number" else loaded.tokens)[name][int(row)].as_py() for row in loaded.rows]


def content(loaded: TextDataset) -> list[Any]:
    """All that is stored of the rows of a split."""
    return [{name: values[int(row)].as_py() for name, values in loaded.tokens.items()} for row in loaded.rows]


def made(source: Path) -> list[Path]:
    """Files of tokens that are kept."""
    return sorted((source.parent / "cache").glob("tokens-*/*.arrow"))


def test_rows_are_stored_as_they_are_encoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 7)
    loaded = load(source)
    tokens = loaded.tokens
    assert len(loaded) == len(tokens["ids"]) == 40
    for number in range(40):
        turns = (Turn("user", f"Question {number}?"), Turn("assistant", f"Answer {number}."))
        expected = encode_conversation(turns, TOKENIZER, Template())
        for name in ("ids", "supervised", "segment"):
            assert np.array_equal(tokens[name][number].values.to_numpy(), getattr(expected, name))
        assert tokens["turn_bytes"][number].as_py() == expected.turn_bytes == len(f"Answer {number}.")
        assert tokens["length"][number].as_py() == len(expected.ids)
        assert tokens["targets"][number].as_py() == expected.supervised.sum()
        assert loaded.raw["number"][number].as_py() == number + 1
    assert tokens["ids"][0].values.to_numpy().dtype == np.uint16 and tokens["segment"][0].values.to_numpy().dtype == np.uint8


def test_a_second_start_does_not_tokenize_or_hash(source: Path, encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(source)
    assert len(encoded_rows) == 40
    encoded_rows.clear()
    monkeypatch.setattr("hashlib.file_digest", None)
    second = load(source)
    other_split = load(source, split="test", test_ratio=0.5, seed=3)
    assert encoded_rows == [] and len(made(source)) == 1
    assert content(second) == content(first)
    assert len(other_split.rows) < 40


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": Tokenizer.from_bytes(MODEL + b"\x80\x7d\x00")},
        {"template": Template(user="<user>\n")},
        {"default_system_prompt": "Help."},
        {"seq_len": 63},
        {"long_rows": "drop"},
        {"long_rows": "keep_prompt_end"},
        {"on_bad_row": "skip"},
        {"ignore": ("notes",)},
        {"subset_size": 5},
    ],
)
def test_every_part_of_the_key_makes_another_cache(source: Path, change: dict[str, Any]) -> None:
    load(source)
    load(source, **change)
    assert len(made(source)) == 2


def test_another_format_makes_another_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(source)
    monkeypatch.setattr(token_cache, "FORMAT_VERSION", token_cache.FORMAT_VERSION + 1)
    load(source)
    assert len(made(source)) == 2


def test_splits_share_a_cache(source: Path) -> None:
    for split in ({}, {"test_ratio": 0.25}, {"test_ratio": 0.25, "seed": 1}, {"test_ratio": 0.5}):
        load(source, **split)
    assert len(made(source)) == 1


def test_changed_content_makes_another_cache_and_equal_content_the_same(source: Path, tmp_path: Path) -> None:
    load(source)
    load(write(tmp_path / "copy.jsonl", source.read_text().splitlines()))
    assert len(made(source)) == 1
    write(source, [row(number) for number in range(1, 41)], age_s=30)
    load(source)
    assert len(made(source)) == 2


def test_a_file_changed_within_the_clocks_grain_is_hashed_again(source: Path, tmp_path: Path) -> None:
    os.utime(source)
    stamp = source.stat().st_mtime_ns
    before = file_sha256(source, tmp_path / "cache")
    source.write_text(source.read_text().replace("Question", "Riddle ?"))
    os.utime(source, ns=(stamp, stamp))
    assert file_sha256(source, tmp_path / "cache") != before


def test_a_crash_half_way_leaves_nothing_that_is_read(
    source: Path, encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 10)
    counted = vars(row_encoder)["encode_conversation"]

    def failing(*arguments: Any, **more: Any) -> Any:
        if len(encoded_rows) == 20:
            raise KeyboardInterrupt
        return counted(*arguments, **more)

    monkeypatch.setattr(row_encoder, "encode_conversation", failing)
    with pytest.raises(KeyboardInterrupt):
        load(source)
    assert made(source) == []
    monkeypatch.setattr(row_encoder, "encode_conversation", counted)
    assert len(load(source).rows) == 40


def test_what_a_killed_process_left_is_not_read_and_is_cleared_away(source: Path) -> None:
    load(source)
    [tokens] = made(source)
    leftover = tokens.rename(tokens.with_name("tmp12345"))
    assert len(load(source).rows) == 40
    assert made(source) == [tokens] and not leftover.exists()


def test_of_several_at_once_one_makes_the_tokens_and_all_read_them(source: Path, encoded_rows: list[int]) -> None:
    results: list[TextDataset] = []
    threads = [threading.Thread(target=lambda: results.append(load(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(content(loaded) == content(results[0]) for loaded in results)
    assert len(encoded_rows) == 40


def test_any_number_of_processes_makes_the_same_tokens(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(token_cache, "_ROWS_BEFORE_PROCESSES", 50)
    lines = [row(number, "word " * (number % 50)) for number in range(200)]
    lines[70], lines[150] = "{broken", '{"prompt": "No answer"}'
    write(source, lines)
    found = []
    for processes in (1, 2, 3):
        loaded = load(
            source, processes=processes, on_bad_row="skip", test_ratio=0.3,
            cache_dir=str(source.parent / f"cache{processes}"),
        )  # fmt: skip
        found.append((content(loaded), loaded.counts))
    assert found[0] == found[1] == found[2]
    loaded = load(source, processes=1, on_bad_row="skip", test_ratio=0.3, cache_dir=str(source.parent / "cache3"))
    assert content(loaded) == found[0][0] and len(list((source.parent / "cache3").glob("tokens-*/*.arrow"))) == 3


def test_of_several_bad_rows_the_first_is_told_by_any_number_of_processes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 5)
    monkeypatch.setattr(token_cache, "_ROWS_BEFORE_PROCESSES", 50)
    lines = [row(number) for number in range(200)]
    lines[70] = lines[110] = lines[180] = "{broken"
    write(source, lines)
    for processes in (1, 2, 3, 3):
        with pytest.raises(UsageError, match=r"data\.jsonl:71: "):
            load(source, processes=processes)


def test_several_files_are_read_one_after_the_other(source: Path, tmp_path: Path) -> None:
    more = write(tmp_path / "more.jsonl", [row(number) for number in range(100, 103)])
    empty = write(tmp_path / "empty.jsonl", [])

    loaded = load(source, empty, more)
    assert [loaded.raw["file"][at].as_py() for at in (0, 39, 40, 42)] == [0, 0, 2, 2]
    assert content(loaded) != content(load(more, empty, source)) and len(made(source)) == 2
    write(more, [row(0), "{broken"])
    with pytest.raises(UsageError, match=r"more\.jsonl:2"):
        load(source, more)


def test_tags_found_in_texts_are_noted(source: Path) -> None:
    write(source, [row(0), row(1, "[USER] said"), row(2, "[SYSTEM] [ASSISTANT]")])
    assert column(load(source), "tags") == [0, 0b010, 0b101]


def test_a_file_that_changes_while_it_is_read_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = RowFile.rows

    def changing(file: RowFile) -> Any:
        yield from real(file)
        with source.open("a") as handle:
            handle.write(row(99) + "\n")

    monkeypatch.setattr(RowFile, "rows", changing)
    with pytest.raises(UsageError, match="changed while"):
        load(source)
    assert made(source) == []


def test_a_file_that_changes_before_it_is_read_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it may while another process is waited for: its content then isn't what the tokens are named after."""
    real = token_cache.file_sha256

    def then_changed(*arguments: Any) -> str:
        digest = real(*arguments)
        source.write_text(source.read_text().replace("Question", "Riddle"))
        return digest

    monkeypatch.setattr(token_cache, "file_sha256", then_changed)
    with pytest.raises(UsageError, match="changed while"):
        load(source)
    assert made(source) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes as Linux lists them")
def test_a_key_with_half_a_surrogate_pair_is_counted(source: Path) -> None:
    write(source, [json.dumps({"prompt": "hi", "response": "ho", "\ud800_id": "x"})])
    assert load(source).counts["ignored"] == {"\\ud800_id": 1}


def test_a_bad_row_with_half_a_surrogate_pair_is_told(source: Path) -> None:
    write(source, [json.dumps({"prompt": "hi", "response": "ho", "\ud800k": "some text"})])
    with pytest.raises(UsageError, match=r"some text.*ud800k"):
        load(source)


def test_a_source_that_cannot_be_read_is_told_not_the_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, _: Path) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(token_cache, "file_sha256", fail)
    with pytest.raises(UsageError, match=r"jsonl can't be read: Permission denied$"):
        load(source)


def test_a_killed_build_is_never_read_and_leaves_no_process(source: Path, tmp_path: Path) -> None:
    write(source, [row(number, "word " * 200) for number in range(60_000)])
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(MODEL)
    script = (
        "import sys; from pathlib import Path; from tests.conftest import load_file\n"
        "from dataset.text.tokenizer import Tokenizer\n"
        "load_file(Path(sys.argv[1]) / 'data.jsonl', Tokenizer(sys.argv[2]), processes=2)"
    )
    command = [sys.executable, "-c", script, str(source.parent), str(tokenizer)]
    builder = subprocess.Popen(command, cwd=Path(__file__).resolve().parents[1], stderr=subprocess.DEVNULL)

    def children(at_work: bool) -> list[Path]:
        """Processes of the builder's; those at work have each begun a file of their own."""
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                opened = [os.readlink(file) for file in (process / "fd").iterdir()]
                has_begun = any("/tokens-" in name and "/tmp" in name for name in opened)
                if parent == str(builder.pid) and (has_begun or not at_work):
                    found.append(process)
        return found

    deadline = time.monotonic() + 60
    while len(children(at_work=True)) < 2 and builder.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    started = children(at_work=False)  # also the one through which the others report
    builder.kill()
    builder.wait()
    assert len(started) > 2 and made(source) == []
    while any(process.exists() for process in started) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(process.exists() for process in started)


def test_a_damaged_cache_is_told(source: Path) -> None:
    load(source)
    [tokens] = made(source)
    tokens.write_bytes(tokens.read_bytes()[:300])
    with pytest.raises(UsageError, match=r"damaged.*delete"):
        load(source)


def test_a_malformed_row_stops_with_file_and_line_or_is_counted(source: Path) -> None:
    write(source, [row(0), "", "{broken", row(1), '{"prompt": 3, "answer": "x"}', '{"prompt": "Why?"}', "[]"])
    with pytest.raises(UsageError, match=r"data\.jsonl:3: .*on_bad_row=skip"):
        load(source)
    loaded = load(source, on_bad_row="skip")
    assert loaded.counts_read == {
        "read": 7,
        "beyond_subset": 0,
        "dropped": {"blank_line": 1, "no_answer": 1},
        "bad": {"bad_json": 1, "wrong_type": 1, "not_an_object": 1},
        "forms": {"pair": 2},
        "ignored": {},
    }
    assert column(loaded, "number") == [1, 4]


def test_long_rows_are_cut_or_dropped_and_counted(source: Path) -> None:
    long_answer = json.dumps({"prompt": "Go on?", "answer": "word " * 100})
    long_prompt = json.dumps({"prompt": "word " * 100, "answer": "No."})
    write(source, [row(0), long_answer, long_prompt])
    cut = load(source, seq_len=40)
    assert cut.counts["dropped"] == {"answer_beyond_seq_len": 1}
    assert column(cut, "cut") == [0, ANSWER_CUT]
    whole = encode_conversation((Turn("user", "Go on?"), Turn("assistant", "word " * 100)), TOKENIZER, Template())
    assert ids_of(cut, 1) == whole.ids[:41].tolist()
    kept_answer = TOKENIZER.decode(whole.ids[:41][whole.supervised[:41]])
    assert column(cut, "turn_bytes")[1] == len(kept_answer) < whole.turn_bytes
    dropped = load(source, seq_len=40, long_rows="drop")
    assert dropped.counts["dropped"] == {"too_long": 2}
    assert len(dropped.rows) == 1


def test_keeping_the_end_of_the_prompt_leaves_no_row_without_its_answer(source: Path) -> None:
    long_prompt = json.dumps({"prompt": "word " * 100 + "Why?", "answer": "No."})
    both_long = json.dumps({"system": "Be brief.", "prompt": "word " * 100 + "Why?", "answer": "yes " * 100})
    long_answer = json.dumps({"prompt": "Go on?", "answer": "word " * 100})
    write(source, [row(0), long_prompt, both_long, long_answer])
    loaded = load(source, seq_len=40, long_rows="keep_prompt_end")
    assert loaded.counts["dropped"] == {} and len(loaded.rows) == 4
    assert column(loaded, "cut") == [0, PROMPT_CUT, PROMPT_CUT | ANSWER_CUT, ANSWER_CUT]
    texts = [TOKENIZER.decode(ids_of(loaded, index)) for index in range(4)]
    assert texts[1].startswith("[USER]\n word") and texts[1].endswith("word Why? [ASSISTANT]\n No.")
    assert texts[2].startswith("[SYSTEM]\n") and "Why? [ASSISTANT]\n yes yes" in texts[2]
    assert all(len(ids_of(loaded, index)) == 41 for index in (1, 2, 3))
    assert min(column(loaded, "full_length")[1:]) > 100


def test_a_row_that_just_fits_is_not_cut(source: Path) -> None:
    longest = max(len(ids_of(load(source), index)) for index in range(40))
    assert not any(column(load(source, seq_len=longest - 1), "cut"))
    assert any(column(load(source, seq_len=longest - 2), "cut"))


def test_splits_are_disjoint_complete_and_stable_when_rows_are_added(source: Path) -> None:
    def lines(name: str) -> set[int]:
        return set(column(load(source, split=name, test_ratio=0.3), "number"))

    train, test = lines("train"), lines("test")
    assert not train & test and train | test == set(range(1, 41)) and len(test) >= 5
    write(source, [row(number) for number in range(80)], age_s=30)
    assert train < lines("train") and test < lines("test")
    hashes = [prompt_hash((Turn("user", f"Question {line - 1}?"), Turn("assistant", "x"))) for line in sorted(test)]
    assert are_test_hashes(np.array(hashes, np.uint64), 0, 0.3).all()


@pytest.mark.parametrize("likely", [None, 10])
def test_a_subset_takes_the_first_rows_of_each_split_and_stops_reading(
    source: Path, encoded_rows: list[int], monkeypatch: pytest.MonkeyPatch, likely: int | None
) -> None:
    if likely is not None:  # too few at first, several times
        monkeypatch.setattr(token_cache, "_likely_rows", lambda *_: likely)
    write(source, [*(row(number) for number in range(3000)), "{a malformed row that is never reached"])
    parts = {name: load(source, split=name, test_ratio=0.2, subset_size=20) for name in ("train", "test")}
    assert len(encoded_rows) <= 1040
    hashes = [prompt_hash((Turn("user", f"Question {number}?"),)) for number in range(3000)]
    sides = are_test_hashes(np.array(hashes, np.uint64), 0, 0.2)
    for name, count in (("train", 20), ("test", 5)):
        expected = [number + 1 for number in range(3000) if sides[number] == (name == "test")][:count]
        assert column(parts[name], "number") == expected
    counts = parts["train"].counts
    last = max(max(column(part, "number")) for part in parts.values())
    assert counts["read"] == last == counts["beyond_subset"] + 25
    alone = load(source, split="test", test_ratio=0.2, subset_size=20, alone=True)
    assert column(alone, "number") == [number + 1 for number in range(3000) if sides[number]][:20]


def test_a_subset_larger_than_the_files_takes_all(source: Path) -> None:
    loaded = load(source, subset_size=100, test_ratio=0.0)
    assert len(loaded.rows) == 40 and loaded.counts["read"] == 40


def test_a_bad_row_before_a_subset_is_full_is_told(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_likely_rows", lambda *_: 20)
    write(source, [*(row(number) for number in range(15)), "{broken", *(row(number) for number in range(50))])
    with pytest.raises(UsageError, match=r"data\.jsonl:16: "):
        load(source, subset_size=30)
    assert len(load(source, subset_size=15).rows) == 15


def test_the_size_of_a_subset() -> None:
    assert wanted_rows(None, 0.05) == {"train": math.inf, "test": math.inf}
    assert wanted_rows(1000, 0.05) == {"train": 1000, "test": 53}
    assert wanted_rows(64, 0.05) == {"train": 64, "test": 4}
    assert wanted_rows(10, 0.9) == {"train": 10, "test": 10}
    assert wanted_rows(10, 0.0) == {"train": 10, "test": 0}
    assert wanted_rows(10, 0.3, "test") == {"train": 0, "test": 10}


def test_many_segments_and_a_large_vocabulary_get_wider_arrays(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"from": role, "value": "a"} for _ in range(300) for role in ("human", "gpt")]
    write(source, [json.dumps({"conversations": turns})])
    wide = Tokenizer.from_bytes(MODEL)
    monkeypatch.setattr(wide, "vocab_size", 70_000)
    tokens = load(source, seq_len=8192, tokenizer=wide).tokens
    assert tokens["ids"][0].values.to_numpy().dtype == np.int32
    assert tokens["segment"][0].values.to_numpy().max() == 300


def test_a_missing_source_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a data file"):
        load(tmp_path / "none.jsonl")


def test_a_cache_folder_that_can_not_be_written_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="make it writable"):
        load(source, cache_dir=str(tmp_path / "file" / "cache"))


@pytest.mark.parametrize("step", ["from_generator", "map"])
def test_a_full_disk_is_told(source: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"No space left.*dataset\.cache_dir"):
        patch.setattr(datasets.Dataset, step, full)
        load(source)
    assert len(load(source).rows) == 40
