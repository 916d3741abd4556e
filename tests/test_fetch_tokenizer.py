"""The command that gets a tokenizer: order of sources, what it says, and what it refuses."""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mistral_common
import pytest

from config.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPT = REPOSITORY / "scripts/fetch_tokenizer.py"
MODEL = (Path(mistral_common.__file__).parent / "data/tokenizer.model.v1").read_bytes()
PACKAGE_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"

spec = importlib.util.spec_from_file_location("fetch_tokenizer", SCRIPT)
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The default place, inside an empty repository, with no variable set."""
    monkeypatch.setattr(script, "REPOSITORY", tmp_path)
    monkeypatch.delenv("LLAMA_TOKENIZER", raising=False)
    return tmp_path / "tokenizers/llama-32k/tokenizer.model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the hub: serves `content`, or fails when that is None; notes each request."""
    state: dict[str, Any] = {"content": None, "asked": []}

    def download(repo: str, filename: str, destination: Path, **options: Any) -> None:
        state["asked"].append((repo, filename, options))
        if state["content"] is None:
            raise UsageError("no connection")
        destination.parent.mkdir(parents=True, exist_ok=True)
        destination.write_bytes(state["content"])

    monkeypatch.setattr(script, "download", download)
    return state


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        script.main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_the_hub_comes_first_with_its_hash_checked(place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    hub["content"] = MODEL
    script.main([])
    assert hub["asked"] == [
        (
            "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
            "tokenizer.model",
            {
                "revision": "main",
                "expected_sha256": "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
            },
        )
    ]
    said = capsys.readouterr().out
    assert "TinyLlama" in said and "Apache-2.0" in said and hashlib.sha256(MODEL).hexdigest() in said
    assert "ids differ" in said


def test_without_a_network_the_package_is_taken_and_said(
    place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([])
    said = capsys.readouterr()
    assert place.read_bytes() == MODEL
    assert "mistral-common" in said.out and PACKAGE_SHA256 in said.out and "Apache-2.0" in said.out
    assert "no connection" in said.err
    source = json.loads((place.parent / "SOURCE.json").read_text())
    assert source["sha256"] == PACKAGE_SHA256 and "mistral-common" in source["source"]
    assert sorted(path.name for path in place.parent.iterdir()) == ["SOURCE.json", "tokenizer.model"]


def test_a_second_run_fetches_nothing_and_says_the_same(
    place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([])
    first = capsys.readouterr().out
    hub["asked"].clear()
    script.main([])
    assert hub["asked"] == []
    assert capsys.readouterr().out == "already there\n" + first


def test_what_was_asked_for_by_name_is_not_replaced_by_something_else(
    place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--source", "hub"], ["--repo", "me/own"], ["--sha256", "0" * 64]):
        assert "no connection" in refused(arguments, capsys)
        assert not place.exists()
    script.main(["--source", "package"])
    assert "another tokenizer" in refused(["--source", "hub"], capsys)
    assert place.read_bytes() == MODEL


def test_another_repository_is_checked_by_the_hash_given(
    place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    hub["content"] = MODEL
    output = tmp_path / "own" / "t.model"
    script.main(["--repo", "me/own", "--filename", "t.model", "--revision", "v1", "--output", str(output)])
    assert hub["asked"] == [("me/own", "t.model", {"revision": "v1", "expected_sha256": None})]
    assert output.read_bytes() == MODEL and not place.exists()
    assert "as stated at me/own" in capsys.readouterr().out
    # Again it is there; another one isn't.
    script.main(["--repo", "me/own", "--filename", "t.model", "--revision", "v1", "--output", str(output)])
    assert "already there" in capsys.readouterr().out and len(hub["asked"]) == 1
    for other in (["--repo", "me/other"], ["--repo", "me/own", "--filename", "u.model"]):
        assert "is there already, from me/own (t.model, revision v1)" in refused([*other, "--output", str(output)], capsys)


def test_the_variable_comes_first(
    place: Path,
    hub: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = tmp_path / "own.model"
    own.write_bytes(MODEL)
    monkeypatch.setenv("LLAMA_TOKENIZER", str(own))
    script.main([])
    assert hub["asked"] == [] and not place.exists()
    said = capsys.readouterr().out
    assert str(own) in said and "a file of your own" in said
    monkeypatch.setenv("LLAMA_TOKENIZER", str(tmp_path / "missing.model"))
    assert "LLAMA_TOKENIZER" in refused([], capsys)
    assert hub["asked"] == [] and not place.exists()
    monkeypatch.setenv("LLAMA_TOKENIZER", str(place))  # exported ahead of the first fetch
    script.main([])
    assert place.read_bytes() == MODEL


def test_a_package_with_another_file_is_refused(
    place: Path, hub: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PACKAGE_SHA256", "0" * 64)
    assert f"expected sha256 {'0' * 64}, found {PACKAGE_SHA256}" in refused(["--source", "package"], capsys)
    monkeypatch.setattr(script, "PACKAGE", "no-such-package")
    assert "pip install no-such-package" in refused(["--source", "package"], capsys)
    assert not place.exists()


def test_the_command_itself_runs_offline(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "LLAMA_TOKENIZER"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--output", str(tmp_path / "t.model")],
        env={**environment, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr and "mistral-common" in result.stdout
    assert (tmp_path / "t.model").read_bytes() == MODEL
