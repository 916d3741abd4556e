"""Names and globs become files: in order, none twice, some drawn, the missing ones fetched."""

from pathlib import Path
from typing import Any

import datasets
import pytest

from config.errors import UsageError
from dataset import source_files
from dataset.source_files import Hub, find_files, is_saved, saved_split


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_names_keep_their_order_and_globs_are_sorted(folder: Path) -> None:
    assert names(find_files(folder, ["b.jsonl", "*.jsonl"]).train, folder) == ["b.jsonl", "a.jsonl", "odd[1].jsonl"]
    assert names(find_files(folder, ["**/*.jsonl"]).train, folder)[-1] == "odd[1].jsonl"
    assert names(find_files(folder, ["odd[1].jsonl", str(folder / "deep/*/*")]).train, folder) == [
        "odd[1].jsonl",
        "deep/er/c.jsonl",
    ]


def test_folders_say_what_is_held_out(tmp_path: Path) -> None:
    """Where a file's own name says nothing; and the folders above `data_dir` say nothing of it."""
    folder = tmp_path / "test" / "mine"
    for name in ("default/train/0.jsonl", "default/test/0.jsonl", "dev/a.jsonl", "train/test.jsonl", "test/train.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    found = find_files(folder, ["**/*.jsonl"])
    assert names(found.train, folder) == ["default/train/0.jsonl", "test/train.jsonl"]
    assert names(found.validation, folder) == ["dev/a.jsonl"]
    assert names(found.left_out, folder) == ["default/test/0.jsonl", "train/test.jsonl"]
    assert names(find_files(folder, ["default/test/0.jsonl"]).train, folder) == ["default/test/0.jsonl"]


def test_shards_are_drawn_by_seed(folder: Path) -> None:
    draws = {seed: tuple(find_files(folder, ["*.jsonl"], shards=2, seed=seed).train) for seed in range(20)}
    assert all(len(set(draw)) == 2 for draw in draws.values()) and len(set(draws.values())) == 3
    assert tuple(find_files(folder, ["*.jsonl"], shards=2, seed=7).train) == draws[7]


def test_only_drawn_and_missing_files_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(repo: str, filename: str, destination: Path, **more: Any) -> None:
        asked.append((repo, filename, destination, more["revision"], more["expected_sha256"]))

    monkeypatch.setattr(source_files, "download", note)
    hub = Hub("me/repo", "v1", {"x/d.parquet": "ab"})
    find_files(folder, ["a.jsonl", "x/d.parquet"], hub)
    assert asked == [("me/repo", "x/d.parquet", folder / "x/d.parquet", "v1", "ab")]
    asked.clear()
    drawn = find_files(folder, [f"{n}.parquet" for n in range(9)], hub, shards=1, validation_names=["v.parquet"])
    assert [entry[2] for entry in asked] == [*drawn.train, folder / "v.parquet"] == [*drawn.train, *drawn.validation]


def test_without_names_all_files_that_can_be_read_are_taken(folder: Path) -> None:
    for name in ("c.csv.gz", "d.parquet", "e.txt", "dataset.json", ".hidden.jsonl", "f.json.zst"):
        (folder / name).write_text("")
    assert names(find_files(folder, []).train, folder) == [
        "a.jsonl",
        "b.jsonl",
        "c.csv.gz",
        "d.parquet",
        "f.json.zst",
        "odd[1].jsonl",
    ]


@pytest.mark.parametrize(
    ("present", "train", "validation", "left_out"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"], ["test.jsonl"], []),
        (["a.csv", "a_test.csv"], ["a.csv"], ["a_test.csv"], []),
        (["x-train.json", "x-valid.json", "x-test.json"], ["x-train.json"], ["x-valid.json"], ["x-test.json"]),
        (["latest.jsonl", "contest.jsonl", "devices.jsonl"], ["contest.jsonl", "devices.jsonl", "latest.jsonl"], [], []),
        (["training-eval-mix.jsonl", "dev.jsonl"], ["training-eval-mix.jsonl"], ["dev.jsonl"], []),
    ],
)
def test_files_named_as_held_out_are_not_trained_on(
    tmp_path: Path, present: list[str], train: list[str], validation: list[str], left_out: list[str]
) -> None:
    for name in present:
        (tmp_path / name).write_text("")
    for asked in ([], ["*"], [f"*{Path(present[0]).suffix}"]):
        found = find_files(tmp_path, asked)
        assert [names(paths, tmp_path) for paths in (found.train, found.validation, found.left_out)] == [
            train,
            validation,
            left_out,
        ]
    assert names(find_files(tmp_path, present).train, tmp_path) == present, "what is named exactly is what is meant"


@pytest.mark.parametrize(
    ("asked", "measured", "train", "validation", "left_out"),
    [
        ([], ["val-*.jsonl"], ["a.jsonl", "b.jsonl"], ["val-1.jsonl", "val-2.jsonl"], ["test.jsonl"]),
        ([], ["b.jsonl"], ["a.jsonl"], ["b.jsonl"], ["val-1.jsonl", "val-2.jsonl", "test.jsonl"]),
        (["*.jsonl"], ["{folder}/b.jsonl", "test*"], ["a.jsonl"], ["b.jsonl", "test.jsonl"], ["val-1.jsonl", "val-2.jsonl"]),
        (["a.jsonl", "b.jsonl"], ["b.jsonl"], ["a.jsonl", "b.jsonl"], ["b.jsonl"], []),
    ],
)
def test_what_is_named_to_measure_on_is_measured_on_and_trained_on_only_if_named_for_that_too(
    tmp_path: Path, asked: list[str], measured: list[str], train: list[str], validation: list[str], left_out: list[str]
) -> None:
    for name in ("a.jsonl", "b.jsonl", "test.jsonl", "val-1.jsonl", "val-2.jsonl"):
        (tmp_path / name).write_text("")
    measured = [name.format(folder=tmp_path) for name in measured]
    found = find_files(tmp_path, asked, validation_names=measured)
    assert [names(paths, tmp_path) for paths in (found.train, found.validation, found.left_out)] == [train, validation, left_out]
    with pytest.raises(UsageError, match=r"dataset\.validation_files: expected files like 'no\*'"):
        find_files(tmp_path, asked, validation_names=["no*"])
    with pytest.raises(UsageError, match=r"held out.*name those to train on exactly"):
        find_files(tmp_path, ["*"], validation_names=["*.jsonl"])


def test_a_folder_with_nothing_but_held_out_files_is_told(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"test\.jsonl.*name those to train on exactly"):
        find_files(tmp_path, [])


def test_a_folder_that_datasets_has_saved_stands_for_its_files(tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"a": list(range(size))}) for name, size in (("train", 7), ("test", 2))}
    parts["train"].save_to_disk(tmp_path / "alone", num_shards=2)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    assert [path.parent.name for path in find_files(tmp_path, ["alone"]).train] == ["alone", "alone"]
    assert is_saved(tmp_path / "alone") and is_saved(tmp_path / "both") and not is_saved(tmp_path)
    assert [path.parent.name for path in saved_split(tmp_path / "both", "test")] == ["test"]
    assert len(saved_split(tmp_path / "alone", "train")) == 2
    with pytest.raises(UsageError, match=r"no split 'dev'.*train, test"):
        saved_split(tmp_path / "both", "dev")
    (tmp_path / "alone/state.json").write_text("{}")
    with pytest.raises(UsageError, match="save_to_disk"):
        find_files(tmp_path, ["alone"])


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (["none.jsonl"], {}, "expected a data file"),
        (["*.parquet"], {}, "expected files like"),
        (["deep*"], {}, "expected files like"),
        (["*.jsonl"], {"shards": 4}, "dataset.shards is 4"),
        (["a.jsonl"], {"validation_names": ["none.jsonl"]}, "check dataset.data_dir and dataset.validation_files"),
        (["/nowhere/a.jsonl"], {"hub": Hub("me/repo")}, "expected a data file"),
    ],
)
def test_what_can_not_be_found_is_told(folder: Path, files: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_files(folder, files, **changes)
