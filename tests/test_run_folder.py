"""A run's folder belongs to one process at a time, whatever ends that process; and a run's name stays inside."""

import fcntl
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from errno import ENOLCK
from pathlib import Path
from typing import Any

import pytest

import artifacts.run_folder
from artifacts.run_folder import check_folder_name, owned_folder
from config.errors import UsageError

# A process that has nothing of this one.
_APART = multiprocessing.get_context("forkserver")


def _stay(folder: Path, of_child: Any) -> None:
    """Hold the folder, with a child as tokenizing in processes has them, which outlives a kill."""
    with owned_folder(folder, print):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
        of_child.put(child.pid)
        time.sleep(60)


def ignore(text: str) -> None:
    pass


@pytest.fixture
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts.run_folder, "WAIT_SECONDS", 0.2)


@pytest.mark.usefixtures("short_wait")
def test_a_second_process_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    said: list[str] = []
    with owned_folder(tmp_path / "p/run", ignore) as folder:
        assert folder == tmp_path / "p/run" and folder.is_dir()
        with pytest.raises(UsageError, match=rf"in use by process {os.getpid()} on \S+, since \d.*choose another run_name"):
            owned_folder(folder, said.append).__enter__()
        assert len(said) == 1 and "waiting up to" in said[0]
        # Whoever has it, knows it still.
        assert json.loads((folder / ".lock.json").read_text())["pid"] == os.getpid()
        (folder / "metrics.jsonl").touch()
    with owned_folder(folder, said.append):
        pass
    assert len(said) == 1 and (folder / "metrics.jsonl").exists()


def test_a_killed_process_leaves_no_lock_and_its_successor_waits_for_it(tmp_path: Path) -> None:
    of_child = _APART.Queue()
    process = _APART.Process(target=_stay, args=(tmp_path, of_child))
    process.start()
    child = of_child.get(timeout=60)
    said: list[str] = []

    def kill(text: str) -> None:
        said.append(text)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)

    with owned_folder(tmp_path, kill):
        assert f"in use by process {process.pid} on" in said[0]
    process.join()
    with owned_folder(tmp_path, pytest.fail):
        os.kill(child, signal.SIGKILL)


def test_runs_without_a_name_never_share_a_folder(tmp_path: Path) -> None:
    def begin(_: int) -> Path:
        with owned_folder(tmp_path / "project/trm-1", pytest.fail, is_new=True) as folder:
            (folder / "metrics.jsonl").write_text("mine")
            return folder

    with ThreadPoolExecutor(8) as threads:
        folders = list(threads.map(begin, range(16)))
    assert {folder.name for folder in folders} == {"trm-1", *(f"trm-1-{number}" for number in range(2, 17))}


def test_a_run_that_leaves_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for is_new in (False, True):
        with pytest.raises(UsageError, match="wrong data"), owned_folder(tmp_path / "a/b/c", ignore, is_new=is_new):
            raise UsageError("wrong data")
        assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with owned_folder(tmp_path / "mine", ignore):
        pass
    assert (tmp_path / "mine").is_dir(), "what was there stays"


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    said: list[str] = []
    with owned_folder(tmp_path / "run", said.append) as folder:
        (folder / "metrics.jsonl").touch()
    assert len(said) == 1 and "can't be locked (No locks available)" in said[0]
    assert (folder / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "make", [lambda path: path.touch(), lambda path: path.symlink_to("nowhere/at/all")], ids=["file", "dangling"]
)
def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "project")
    with pytest.raises(UsageError, match=r"can't be written: .*checkpoint_dir"):
        owned_folder(tmp_path / "project/run", ignore).__enter__()


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "../x", "/tmp/x", "a/b", "a\0b", "a\nb", "x" * 256, "ä" * 128, "\udce4", "step_7"],
)
def test_a_name_that_is_no_folder_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"^run_name='.*expected the name of one folder"):
        check_folder_name("run_name", name)


@pytest.mark.parametrize(
    "name", ["run", "1", "2026-11", "größer", "x" * 255, "step_", "step_x", ".hidden", "lr=1e-3,seed=1", "a b"]
)
def test_other_names_are_taken(name: str, tmp_path: Path) -> None:
    check_folder_name("run_name", name)
    with owned_folder(tmp_path / name, ignore) as folder:
        assert folder.is_dir()
