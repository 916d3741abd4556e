"""The on-disk form: what is written is read, whole or not at all, and a folder that isn't one says so."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from config.errors import UsageError
from dataset.puzzles import storage
from dataset.puzzles.storage import create_plain_split, create_split, new_dataset, open_sets, read_identifiers, write_identifiers

ROWS = np.arange(12, dtype=np.uint8).reshape(6, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Groups of 2 and 1 puzzles, these of 1, 3 and 2 examples of two positions."""
    with new_dataset(tmp_path / "data") as partial:
        files = create_split(
            partial / "train",
            seq_len=2,
            vocab_size=12,
            num_puzzle_identifiers=4,
            puzzles_per_group=[2, 1],
            examples_per_puzzle=[1, 3, 2],
            puzzle_identifiers=[1, 2, 3],
            total_puzzles=3,
        )
        files.write(4, ROWS[4:], ROWS[4:] + 100)
        files.write(0, ROWS[:4], ROWS[:4] + 100)
        write_identifiers(partial, ["<blank>", "a", "b", "c"])
    return tmp_path / "data"


def test_what_is_written_is_read(folder: Path) -> None:
    metadata, sets = open_sets(folder, "train")
    puzzles = sets["all"]
    np.testing.assert_array_equal(puzzles.inputs, ROWS)
    np.testing.assert_array_equal(puzzles.labels, ROWS + 100)
    assert isinstance(puzzles.inputs, np.memmap)
    assert puzzles.puzzle_indices.tolist() == [0, 1, 4, 6]
    assert puzzles.group_indices.tolist() == [0, 2, 3]
    assert puzzles.puzzles_of(np.arange(6)).tolist() == [0, 1, 1, 1, 2, 2]
    assert (metadata.total_groups, metadata.total_puzzles, metadata.mean_puzzle_examples) == (2, 3, 2.0)
    assert read_identifiers(folder)[3] == "c"


def test_the_files_are_those_of_the_original(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "train").iterdir()) == [
        "all__group_indices.npy", "all__inputs.npy", "all__labels.npy", "all__puzzle_identifiers.npy", "all__puzzle_indices.npy",
        "dataset.json",
    ]  # fmt: skip
    types = {path.stem.removeprefix("all__"): np.load(path).dtype for path in (folder / "train").glob("*.npy")}
    assert types.pop("inputs") == types.pop("labels") == np.uint8
    assert set(types.values()) == {np.dtype(np.int32)}
    assert json.loads((folder / "train/dataset.json").read_text()) == {
        "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 12, "seq_len": 2, "num_puzzle_identifiers": 4,
        "total_groups": 2, "mean_puzzle_examples": 2.0, "total_puzzles": 3, "sets": ["all"],
    }  # fmt: skip


def test_older_data_sets_have_no_total_puzzles(folder: Path) -> None:
    path = folder / "train/dataset.json"
    values = json.loads(path.read_text())
    del values["total_puzzles"]
    path.write_text(json.dumps(values))
    assert open_sets(folder, "train")[0].total_puzzles == 3


def test_the_schedule_is_that_of_the_original(folder: Path) -> None:
    assert open_sets(folder, "train")[0].total_steps(epochs=7, global_batch_size=5) == int(7 * 2 * 2.0 / 5)


def test_it_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_dataset(tmp_path / "data") as partial:
        create_plain_split(partial / "train", groups=3, forms=1, seq_len=4, vocab_size=3)
        assert not (tmp_path / "data").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder: Path) -> None:
    with pytest.raises(UsageError, match="not overwritten"), new_dataset(folder):
        pass
    assert open_sets(folder, "train")
    with new_dataset(folder.parent / "empty") as partial:
        (folder.parent / "empty").mkdir()
        (partial / "file").touch()
    assert (folder.parent / "empty/file").exists()


def test_a_disk_without_room_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    with pytest.raises(UsageError, match=r"needs 2\.0 GB.*1\.0 GB are free"), new_dataset(tmp_path / "data") as partial:
        create_plain_split(partial / "train", groups=10**6, forms=1, seq_len=1000, vocab_size=3)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="can't be written"), new_dataset(tmp_path / "file/data"):
        pass


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/dataset.json", None, "expected a puzzle data set with a split 'train'"),
        ("train/dataset.json", "{", "doesn't describe a puzzle data set"),
        ("train/dataset.json", '{"vocab_size": 3}', "doesn't describe a puzzle data set"),
        ("train/all__labels.npy", None, "can't be read as an array"),
        ("train/all__labels.npy", "short", "can't be read as an array"),
        ("train/all__labels.npy", np.zeros((5, 2)), "inputs and labels have 2 positions"),
        ("train/all__puzzle_indices.npy", np.array([0, 1, 4, 7]), "every puzzle has its examples"),
        ("train/all__puzzle_indices.npy", np.array([0, 1, 1, 6]), "every puzzle has its examples"),
        ("train/all__group_indices.npy", np.array([0, 2]), "every group has its puzzles"),
        ("train/all__puzzle_identifiers.npy", np.array([1, 2, 4]), "every identifier is known"),
    ],
)
def test_what_does_not_fit_together_is_told(folder: Path, name: str, content: str | np.ndarray | None, message: str) -> None:
    path = folder / name
    if content is None:
        path.unlink()
    elif isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content)
    with pytest.raises(UsageError, match=message):
        open_sets(folder, "train")


@pytest.mark.parametrize("content", [None, "[1]", "{", '{"a": 1}'])
def test_broken_identifiers_are_told(folder: Path, content: str | None) -> None:
    path = folder / "identifiers.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(UsageError, match=r"identifiers\.json"):
        read_identifiers(folder)


def test_a_full_disk_while_writing_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.SplitFiles, "write", full)
    with pytest.raises(UsageError, match="No space left"), new_dataset(tmp_path / "data") as partial:
        create_plain_split(partial / "train", groups=1, forms=1, seq_len=2, vocab_size=3).write(0, ROWS[:1], ROWS[:1])
    assert list(tmp_path.iterdir()) == []
