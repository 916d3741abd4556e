"""The token cache: reuse, its key, crashes, concurrent builders, counts by reason, splits and subsets."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest

from config.errors import UsageError
from dataset.text import token_cache
from dataset.text.conversation import Template, Turn, encode_batch, encode_conversation
from dataset.text.sources import is_test
from dataset.text.token_cache import HashSplit, LoadedSplit, file_sha256, load_split, wanted_rows
from dataset.text.tokenizer import Tokenizer

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


def load(source: Path, **changes: Any) -> LoadedSplit:
    arguments: dict[str, Any] = {
        "source": source,
        "split": "train",
        "tokenizer": TOKENIZER,
        "template": Template(),
        "seq_len": 64,
        "subset_size": None,
        "hash_split": None,
        "default_system_prompt": None,
        "long_rows": "truncate",
        "on_bad_row": "error",
        "cache_dir": source.parent / "cache",
    }
    return load_split(**{**arguments, **changes})


@pytest.fixture
def encoded_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that were tokenized."""
    sizes: list[int] = []
    real = encode_batch

    def counted(conversations: Any, *arguments: Any) -> Any:
        sizes.append(len(conversations))
        return real(conversations, *arguments)

    monkeypatch.setattr(token_cache, "encode_batch", counted)
    return sizes


def ids_of(loaded: LoadedSplit, index: int) -> list[int]:
    arrays = loaded.cache.arrays
    begin, end = arrays["offsets"][loaded.rows[index] :][:2]
    return [int(token) for token in arrays["ids"][begin:end]]


def leftovers(source: Path) -> list[str]:
    return [path.name for path in (source.parent / "cache").iterdir() if path.name.startswith(".")]


def test_rows_are_stored_as_they_are_encoded(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 7)
    loaded = load(source)
    arrays = loaded.cache.arrays
    assert len(loaded.rows) == len(loaded.cache) == 40
    for number in range(40):
        turns = (Turn("user", f"Question {number}?"), Turn("assistant", f"Answer {number}."))
        expected = encode_conversation(turns, TOKENIZER, Template())
        begin, end = arrays["offsets"][number : number + 2]
        assert np.array_equal(arrays["ids"][begin:end], expected.ids)
        assert np.array_equal(arrays["supervised"][begin:end], expected.supervised)
        assert np.array_equal(arrays["segment"][begin:end], expected.segment)
        assert arrays["turn_bytes"][number] == expected.turn_bytes == len(f"Answer {number}.")
        assert arrays["line"][number] == number + 1
    assert arrays["ids"].dtype == np.uint16 and arrays["segment"].dtype == np.uint8


def test_a_second_start_does_not_tokenize_or_hash(
    source: Path, encoded_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(source)
    assert sum(encoded_batches) == 40
    encoded_batches.clear()
    monkeypatch.setattr("hashlib.file_digest", None)
    second = load(source)
    other_split = load(source, split="test", hash_split=HashSplit(3, 0.5))
    assert encoded_batches == []
    assert second.cache.folder == other_split.cache.folder == first.cache.folder
    assert second.cache.meta == first.cache.meta


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer": Tokenizer.from_bytes(MODEL + b"\x80\x7d\x00")},
        {"template": Template(user="<user>\n")},
        {"default_system_prompt": "Help."},
        {"seq_len": 63},
        {"long_rows": "drop"},
        {"on_bad_row": "skip"},
        {"subset_size": 5},
    ],
)
def test_every_part_of_the_key_makes_another_cache(source: Path, change: dict[str, Any]) -> None:
    assert load(source, **change).cache.folder != load(source).cache.folder


def test_another_format_makes_another_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(source).cache.folder
    monkeypatch.setattr(token_cache, "FORMAT_VERSION", token_cache.FORMAT_VERSION + 1)
    assert load(source).cache.folder != before


def test_seed_and_ratio_belong_to_the_key_of_a_subset(source: Path) -> None:
    splits = [HashSplit(0, 0.25), HashSplit(1, 0.25), HashSplit(0, 0.5)]
    assert len({load(source, subset_size=4, hash_split=split).cache.folder for split in splits}) == 3
    assert len({load(source, hash_split=split).cache.folder for split in splits}) == 1


def test_changed_content_makes_another_cache_and_equal_content_the_same(source: Path, tmp_path: Path) -> None:
    first = load(source)
    copy = write(tmp_path / "copy.jsonl", source.read_text().splitlines())
    assert load(copy).cache.folder == first.cache.folder
    write(source, [row(number) for number in range(1, 41)], age_s=30)
    assert load(source).cache.folder != first.cache.folder


def test_a_file_changed_within_the_clocks_grain_is_hashed_again(source: Path, tmp_path: Path) -> None:
    os.utime(source)
    stamp = source.stat().st_mtime_ns
    before = file_sha256(source, tmp_path / "cache")
    source.write_text(source.read_text().replace("Question", "Riddle ?"))
    os.utime(source, ns=(stamp, stamp))
    assert file_sha256(source, tmp_path / "cache") != before


def test_a_crash_half_way_leaves_nothing_that_is_read(
    source: Path, encoded_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 10)
    counted = vars(token_cache)["encode_batch"]

    def failing(*arguments: Any) -> Any:
        if len(encoded_batches) == 2:
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(token_cache, "encode_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        load(source)
    assert leftovers(source) == []
    assert not [path for path in (source.parent / "cache").iterdir() if path.is_dir()]
    monkeypatch.setattr(token_cache, "encode_batch", counted)
    assert len(load(source).rows) == 40


def test_what_a_killed_builder_left_is_not_read_and_is_cleared_away(source: Path, tmp_path: Path) -> None:
    folder = load(source).cache.folder
    leftover = folder.with_name(f".{folder.name}-killed")
    folder.rename(leftover)
    (leftover / "meta.json").unlink()
    assert len(load(source).rows) == 40
    assert leftovers(source) == []


def test_of_two_builders_at_once_one_builds_and_both_read(source: Path, encoded_batches: list[int]) -> None:
    results: list[LoadedSplit] = []
    threads = [threading.Thread(target=lambda: results.append(load(source))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and len({loaded.cache.folder for loaded in results}) == 1
    assert sum(encoded_batches) == 40


def test_without_file_locks_the_slower_builder_uses_the_faster_ones_cache(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr("fcntl.flock", no_locks)
    real_build = token_cache._Builder.build
    winners: list[LoadedSplit] = []

    def overtaken(builder: Any, folder: Path) -> None:
        real_build(builder, folder)
        if not winners:
            monkeypatch.setattr(token_cache._Builder, "build", real_build)
            winners.append(load(source))

    monkeypatch.setattr(token_cache._Builder, "build", overtaken)
    slower = load(source)
    assert slower.cache.folder == winners[0].cache.folder and len(slower.rows) == 40
    assert leftovers(source) == []


def test_a_damaged_cache_is_told(source: Path) -> None:
    folder = load(source).cache.folder
    (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-10])
    with pytest.raises(UsageError, match="damaged"):
        load(source)


def test_a_malformed_row_stops_with_file_and_line_or_is_counted(source: Path) -> None:
    write(source, [row(0), "", "{broken", row(1), '{"prompt": null, "answer": "x"}', '{"prompt": "Why?"}', "[]"])
    with pytest.raises(UsageError, match=r"data\.jsonl:3: .*on_bad_row=skip"):
        load(source)
    assert leftovers(source) == []
    loaded = load(source, on_bad_row="skip")
    assert loaded.cache.meta["counts"] == {
        "read": 7,
        "beyond_subset": 0,
        "kept": 2,
        "dropped": {"blank_line": 1, "no_answer": 1},
        "bad": {"bad_json": 1, "wrong_type": 1, "not_an_object": 1},
    }
    assert loaded.cache.arrays["line"].tolist() == [1, 4]


def test_long_rows_are_cut_or_dropped_and_counted(source: Path) -> None:
    long_answer = json.dumps({"prompt": "Go on?", "answer": "word " * 100})
    long_prompt = json.dumps({"prompt": "word " * 100, "answer": "No."})
    write(source, [row(0), long_answer, long_prompt])
    cut = load(source, seq_len=40)
    assert cut.cache.meta["counts"]["dropped"] == {"answer_beyond_seq_len": 1}
    assert cut.cache.arrays["truncated"].tolist() == [False, True]
    whole = encode_conversation((Turn("user", "Go on?"), Turn("assistant", "word " * 100)), TOKENIZER, Template())
    assert ids_of(cut, 1) == whole.ids[:41].tolist()
    kept_answer = TOKENIZER.decode(whole.ids[:41][whole.supervised[:41]])
    assert cut.cache.arrays["turn_bytes"][1] == len(kept_answer) < whole.turn_bytes
    dropped = load(source, seq_len=40, long_rows="drop")
    assert dropped.cache.meta["counts"]["dropped"] == {"too_long": 2}
    assert len(dropped.rows) == 1


def test_a_row_that_just_fits_is_not_cut(source: Path) -> None:
    longest = max(len(ids_of(load(source), index)) for index in range(40))
    assert not load(source, seq_len=longest - 1).cache.arrays["truncated"].any()
    assert load(source, seq_len=longest - 2).cache.arrays["truncated"].any()


def test_splits_are_disjoint_complete_and_stable_when_rows_are_added(source: Path) -> None:
    split = HashSplit(seed=0, test_ratio=0.3)

    def lines(name: str) -> set[int]:
        loaded = load(source, split=name, hash_split=split)
        return set(loaded.cache.arrays["line"][loaded.rows].tolist())

    train, test = lines("train"), lines("test")
    assert not train & test and train | test == set(range(1, 41)) and len(test) >= 5
    write(source, [row(number) for number in range(80)], age_s=30)
    assert train < lines("train") and test < lines("test")
    for line in test:
        assert is_test((Turn("user", f"Question {line - 1}?"), Turn("assistant", "x")), 0, 0.3)


def test_a_subset_takes_the_first_rows_of_each_split_and_stops_reading(
    source: Path, encoded_batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_ROWS_AT_ONCE", 16)
    split = HashSplit(seed=0, test_ratio=0.2)
    write(source, [*(row(number) for number in range(400)), "{a malformed row that is never reached"])
    parts = {name: load(source, split=name, hash_split=split, subset_size=20) for name in ("train", "test")}
    assert sum(encoded_batches) <= 64
    sides = [is_test((Turn("user", f"Question {number}?"),), 0, 0.2) for number in range(400)]
    for name, count in (("train", 20), ("test", 5)):
        expected = [number + 1 for number in range(400) if sides[number] == (name == "test")][:count]
        assert parts[name].cache.arrays["line"][parts[name].rows].tolist() == expected
    counts = parts["train"].cache.meta["counts"]
    last = max(parts[name].cache.arrays["line"].max() for name in parts)
    assert counts["read"] == last
    assert counts["beyond_subset"] + counts["kept"] == last


def test_the_size_of_a_subset() -> None:
    assert wanted_rows(None, HashSplit(0, 0.05)) == {"train": math.inf, "test": math.inf}
    assert wanted_rows(1000, HashSplit(0, 0.05)) == {"train": 1000, "test": 53}
    assert wanted_rows(64, HashSplit(0, 0.05)) == {"train": 64, "test": 4}
    assert wanted_rows(10, HashSplit(0, 0.9)) == {"train": 10, "test": 10}
    assert wanted_rows(10, HashSplit(0, 0.0)) == {"train": 10, "test": 0}
    assert wanted_rows(10, None) == {"train": 10, "test": 0}


def test_many_segments_and_a_large_vocabulary_get_wider_arrays(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"from": role, "value": "a"} for _ in range(300) for role in ("human", "gpt")]
    write(source, [json.dumps({"conversations": turns})])
    wide = Tokenizer.from_bytes(MODEL)
    monkeypatch.setattr(wide, "vocab_size", 70_000)
    arrays = load(source, seq_len=8192, tokenizer=wide).cache.arrays
    assert arrays["ids"].dtype == np.int32
    assert arrays["segment"].max() == 300


@pytest.mark.parametrize(
    "change",
    [
        {"long_rows": "wrap"},
        {"on_bad_row": "ignore"},
        {"seq_len": 0},
        {"subset_size": 0},
        {"hash_split": HashSplit(0, 1.0)},
        {"hash_split": HashSplit(0, -0.1)},
    ],
)
def test_wrong_values_are_told(source: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        load(source, **change)


def test_a_missing_source_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected a data file"):
        load(tmp_path / "none.jsonl")


def test_a_cache_folder_that_can_not_be_written_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="make it writable"):
        load(source, cache_dir=tmp_path / "file" / "cache")
