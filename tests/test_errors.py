"""How a door shows wrong input: one message, status 2, no traceback."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import StoppedBySignal, UsageError, one_clear_message


def test_a_usage_error_becomes_one_message_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise UsageError("no data at 'x': expected a folder")
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == "error: no data at 'x': expected a folder\n" and shown.out == ""


def test_ctrl_c_ends_quietly(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_a_signal_stopped_ends_with_the_status_of_that_signal(number: int, status: int) -> None:
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise StoppedBySignal(number)
    assert ended.value.code == status


def test_other_exceptions_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_clear_message():
        raise ZeroDivisionError


def test_nothing_happens_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with one_clear_message():
        pass
    assert capsys.readouterr() == ("", "")


def run_into_a_closed_pipe(body: str) -> subprocess.CompletedProcess[str]:
    """What becomes of a door with this body whose output nobody reads."""
    door = f"import sys\nfrom config.errors import one_clear_message\nwith one_clear_message():\n    {body}"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    repository = Path(__file__).resolve().parents[1]
    return subprocess.run([sys.executable, "-c", door], cwd=repository, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('an answer')", "print('an answer', flush=True)", "[print('x' * 999) for _ in range(99)]"])
def test_a_reader_that_leaves_ends_the_program_quietly(monkeypatch: pytest.MonkeyPatch, body: str, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    ended = run_into_a_closed_pipe(body)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_another_broken_pipe_is_told() -> None:
    with pytest.raises(BrokenPipeError), one_clear_message():
        raise BrokenPipeError
