"""Data folders: which file is found, downloads, both layouts' splits, and folders that can't be used."""

import json
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from config.errors import UsageError
from dataset import slimorca
from dataset.slimorca import locate, open_text_data
from dataset.text.conversation import Template
from dataset.text.loader import TextDataset
from dataset.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(Path(mistral_common.__file__).parent / "data/tokenizer.model.v1")


def chat(number: int) -> dict[str, Any]:
    return {
        "conversations": [
            {"from": "human", "value": f"Question {number}?", "weight": 0},
            {"from": "gpt", "value": f"Answer {number}.", "weight": 1},
        ]
    }


def write(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def open_data(data_dir: Path, **changes: Any) -> tuple[TextDataset, TextDataset | None]:
    arguments: dict[str, Any] = {
        "source": "slimorca",
        "data_dir": data_dir,
        "tokenizer": TOKENIZER,
        "template": Template(),
        "seq_len": 64,
        "subset_size": None,
        "test_ratio": 0.25,
        "seed": 0,
        "default_system_prompt": "Help.",
        "long_rows": "truncate",
        "on_bad_row": "error",
    }
    return open_text_data(**{**arguments, **changes})


def questions(dataset: TextDataset) -> set[str]:
    return {dataset.conversation(index)[1].text for index in range(len(dataset))}


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the hub: notes what was asked for and writes one row."""
    asked: list[tuple[Any, ...]] = []

    def note(repo: str, filename: str, destination: Path, revision: str, repo_type: str) -> Path:
        asked.append((repo, filename, revision, repo_type))
        write(destination, [chat(0)])
        return destination

    monkeypatch.setattr(slimorca, "download", note)
    return asked


@pytest.mark.parametrize("name", slimorca.LOCAL_FILES)
def test_a_local_file_is_taken(tmp_path: Path, name: str, no_download: list[Any]) -> None:
    (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path) == tmp_path / name
    assert no_download == []


def test_else_it_is_downloaded_unless_forbidden(tmp_path: Path, no_download: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"SlimOrca\.jsonl"):
        locate(tmp_path / "data", fetch=False)
    assert locate(tmp_path / "data") == locate(tmp_path / "data", fetch=False) == tmp_path / "data/SlimOrca.jsonl"
    assert no_download == [("Open-Orca/SlimOrca", "oo-labeled_correct.gpt4.sharegpt.jsonl", "main", "dataset")]


def test_the_command_fetches_and_says_where(tmp_path: Path, no_download: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    slimorca.main(["--data-dir", str(tmp_path), "--repo", "me/copy", "--filename", "f", "--revision", "v1"])
    assert no_download == [("me/copy", "f", "v1", "dataset")]
    assert str(tmp_path / "SlimOrca.jsonl") in capsys.readouterr().out


def test_slimorca_is_split_by_hash(tmp_path: Path) -> None:
    write(tmp_path / "SlimOrca.jsonl", [chat(number % 60) for number in range(120)])
    train, test = open_data(tmp_path)
    assert test is not None and len(train) + len(test) == 120
    assert not questions(train) & questions(test)
    assert all(train.conversation(0)[i].role == role for i, role in enumerate(("system", "user", "assistant")))
    whole, nothing = open_data(tmp_path, test_ratio=0.0)
    assert len(whole) == 120 and nothing is None


def test_a_subset_has_its_rows_of_both_splits(tmp_path: Path) -> None:
    write(tmp_path / "SlimOrca.jsonl", [chat(number) for number in range(300)])
    train, test = open_data(tmp_path, subset_size=30)
    assert test is not None and (len(train), len(test)) == (30, 10)


def test_the_sample_layout_brings_its_own_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{**chat(number), "family": "add"} for number in range(20)])
    write(tmp_path / "test.jsonl", [{**chat(number), "family": "add"} for number in range(20, 28)])
    train, test = open_data(tmp_path, source="sample", test_ratio=0.05)
    assert test is not None
    assert questions(train) == {f"Question {number}?" for number in range(20)}
    assert questions(test) == {f"Question {number}?" for number in range(20, 28)}
    assert test.row(0)["family"] == "add"
    train, test = open_data(tmp_path, source="sample", subset_size=5)
    assert test is not None and (train.line_number(4), len(train), len(test)) == (5, 5, 5)
    assert open_data(tmp_path, source="sample", test_ratio=0)[1] is None


def test_the_cache_goes_where_it_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data/SlimOrca.jsonl", [chat(number) for number in range(40)])
    open_data(tmp_path / "data", cache_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["SlimOrca.jsonl"]
    assert (tmp_path / "cache").is_dir()


def test_a_sample_folder_without_files_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset\.build_sample_dataset"):
        open_data(tmp_path, source="sample")
    write(tmp_path / "train.jsonl", [chat(0)])
    with pytest.raises(UsageError, match=r"test\.jsonl"):
        open_data(tmp_path, source="sample")


def test_splits_without_a_row_are_told_with_the_counts(tmp_path: Path) -> None:
    write(tmp_path / "none/SlimOrca.jsonl", [{"prompt": "Why?"}, {"prompt": "How?", "answer": ""}])
    with pytest.raises(UsageError, match=r"train split.*empty.*'no_answer': 1.*'empty_answer': 1|'empty_answer': 1.*"):
        open_data(tmp_path / "none")
    write(tmp_path / "one/SlimOrca.jsonl", [chat(0)])
    with pytest.raises(UsageError, match=r"test split.*empty.*test_ratio=0"):
        open_data(tmp_path / "one", test_ratio=1e-9)
    write(tmp_path / "empty/SlimOrca.jsonl", [])
    with pytest.raises(UsageError, match=r"train split.*empty"):
        open_data(tmp_path / "empty")


@pytest.mark.parametrize("change", [{"test_ratio": 1.0}, {"source": "orca"}])
def test_wrong_values_are_told(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="expected"):
        open_data(tmp_path, **change)
