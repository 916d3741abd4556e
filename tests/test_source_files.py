"""Names and globs become files: in order, none twice, some drawn, the missing ones fetched."""

from pathlib import Path
from typing import Any

import pytest

from config.errors import UsageError
from dataset import source_files
from dataset.source_files import Hub, find_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl", "odd[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


def names(paths: list[Path], folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_names_keep_their_order_and_globs_are_sorted(folder: Path) -> None:
    assert names(find_files(folder, ["b.jsonl", "*.jsonl"]), folder) == ["b.jsonl", "a.jsonl", "odd[1].jsonl"]
    assert names(find_files(folder, ["**/*.jsonl"]), folder)[-1] == "odd[1].jsonl"
    assert names(find_files(folder, ["odd[1].jsonl", str(folder / "deep/*/*")]), folder) == ["odd[1].jsonl", "deep/er/c.jsonl"]


def test_shards_are_drawn_by_seed(folder: Path) -> None:
    draws = {seed: tuple(find_files(folder, ["*.jsonl"], shards=2, seed=seed)) for seed in range(20)}
    assert all(len(set(draw)) == 2 for draw in draws.values()) and len(set(draws.values())) == 3
    assert tuple(find_files(folder, ["*.jsonl"], shards=2, seed=7)) == draws[7]


def test_only_drawn_and_missing_files_are_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def note(repo: str, filename: str, destination: Path, **more: Any) -> None:
        asked.append((repo, filename, destination, more["revision"], more["expected_sha256"]))

    monkeypatch.setattr(source_files, "download", note)
    hub = Hub("me/repo", "v1", {"x/d.parquet": "ab"})
    find_files(folder, ["a.jsonl", "x/d.parquet"], hub)
    assert asked == [("me/repo", "x/d.parquet", folder / "x/d.parquet", "v1", "ab")]
    asked.clear()
    drawn = find_files(folder, [f"{n}.parquet" for n in range(9)], hub, shards=1)
    assert [entry[2] for entry in asked] == drawn


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (["none.jsonl"], {}, "expected a data file"),
        (["*.parquet"], {}, "expected files like"),
        (["deep*"], {}, "expected files like"),
        ([], {}, "names no file"),
        (["*.jsonl"], {"shards": 4}, "dataset.shards is 4"),
        (["/nowhere/a.jsonl"], {"hub": Hub("me/repo")}, "expected a data file"),
    ],
)
def test_what_can_not_be_found_is_told(folder: Path, files: list[str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        find_files(folder, files, **changes)
