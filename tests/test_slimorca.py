"""SlimOrca's file: found under any of its names, else downloaded, by a run or by the command."""

from pathlib import Path
from typing import Any

import pytest

from config.compose import compose_config
from config.errors import UsageError
from dataset import slimorca, source_files
from dataset.slimorca import locate
from dataset.source_files import Hub

HUB = Hub("me/copy", "v1", {"f": "0" * 64})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Stands in for the hub: notes what was asked for and writes a file."""
    seen: list[tuple[Any, ...]] = []

    def note(repo: str, filename: str, destination: Path, **more: Any) -> Path:
        seen.append((repo, filename, *more.values()))
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_text("")
        return destination

    monkeypatch.setattr(source_files, "download", note)
    return seen


@pytest.mark.parametrize("name", slimorca.LOCAL_FILES)
def test_a_local_file_is_taken(tmp_path: Path, name: str, asked: list[Any]) -> None:
    (tmp_path / name).write_bytes(b"")
    assert locate(tmp_path, HUB) == tmp_path / name
    assert asked == []


def test_else_it_is_downloaded_unless_forbidden(tmp_path: Path, asked: list[Any]) -> None:
    with pytest.raises(UsageError, match=r"SlimOrca\.jsonl.*dataset\.repo"):
        locate(tmp_path / "data", None)
    assert locate(tmp_path / "data", HUB, "f") == locate(tmp_path / "data", None) == tmp_path / "data/SlimOrca.jsonl"
    assert asked == [("me/copy", "f", "v1", "dataset", "0" * 64)]


def test_the_command_fetches_what_the_config_names(tmp_path: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    slimorca.main(["--data-dir", str(tmp_path)])
    assert str(tmp_path / "SlimOrca.jsonl") in capsys.readouterr().out
    config = compose_config("cfg_pretrain_instruct").dataset
    assert asked == [(config.repo, slimorca.HUB_FILE, config.revision, "dataset", None)]
    slimorca.main(["--data-dir", str(tmp_path / "b"), "--repo", "me/copy", "--filename", "f", "--revision", "v1"])
    assert asked[1] == ("me/copy", "f", "v1", "dataset", None)
