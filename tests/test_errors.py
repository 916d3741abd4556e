"""How a script shows wrong input: one message, status 2, no traceback."""

import errno
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from config.errors import StoppedBySignal, UsageError, one_clear_message

REPOSITORY = Path(__file__).resolve().parents[1]


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
    """What becomes of a script with this body whose output nobody reads."""
    script = f"import sys\nfrom config.errors import one_clear_message\nwith one_clear_message():\n    {body}"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    return subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("body", ["print('an answer')", "print('an answer', flush=True)", "[print('x' * 999) for _ in range(99)]"])
def test_a_reader_that_leaves_ends_the_program_quietly(monkeypatch: pytest.MonkeyPatch, body: str, unbuffered: str) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    ended = run_into_a_closed_pipe(body)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_another_broken_pipe_is_told() -> None:
    with pytest.raises(BrokenPipeError), one_clear_message():
        raise BrokenPipeError


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "the file system is read-only"), (errno.EACCES, "no permission")],
)
def test_what_the_machine_refuses_is_one_message(capsys: pytest.CaptureFixture[str], number: int, told: str) -> None:
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise OSError(number, os.strerror(number), "runs/metrics.jsonl")
    assert ended.value.code == 2 and capsys.readouterr().err.startswith(f"error: runs/metrics.jsonl: {told}")


def test_other_faults_of_files_keep_their_traceback() -> None:
    with pytest.raises(FileNotFoundError), one_clear_message():
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")


def test_a_full_disk_under_stdout_is_told() -> None:
    command = [sys.executable, "-c", "from config.errors import one_clear_message\nwith one_clear_message(): print('x')"]
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        ended = subprocess.run(command, cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    assert (ended.returncode, ended.stderr) == (2, "error: No space left on device: the disk is full: free some space\n")


def test_the_end_by_a_signal_can_be_pickled() -> None:
    stop = pickle.loads(pickle.dumps(StoppedBySignal(signal.SIGTERM)))
    assert (str(stop), stop.signal_number) == ("SIGTERM", signal.SIGTERM)


# A locale whose encoding is ASCII, without the help that Python otherwise gives.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run_in_ascii(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = f"from config.errors import one_clear_message\nwith one_clear_message():\n    {body}"
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **ASCII}, capture_output=True, text=True, encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere this locale is UTF-8")
@pytest.mark.parametrize(
    ("body", "arguments", "expected"),
    [
        (r"print('caf\xe9 \u2603')", (), (0, "caf\\xe9 \\u2603\n", "")),
        ("print('fine')", ("run_name=caf\xe9",), (2, "", "error: argument 'run_name=caf\\udcc3\\udca9' can't be read, because")),
        ("print('fine')", ("--message", "\udcff"), (2, "", "error: argument '\\udcff' after --message can't be read, because")),
        (r"open('caf\xe9', 'w')", (), (2, "", "error: 'caf\\xe9' can't be written as ascii: use UTF-8 names in a UTF-8 locale")),
    ],
    ids=["printed", "argument", "after-a-flag", "file-name"],
)
def test_a_world_that_is_not_utf8(body: str, arguments: tuple[str, ...], expected: tuple[int, str, str]) -> None:
    ended = run_in_ascii(body, *arguments)
    assert (ended.returncode, ended.stdout) == expected[:2] and ended.stderr.startswith(expected[2])


def test_an_argument_that_is_not_utf8_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py", "run_name=\udcff"])
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise AssertionError("begun")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: argument 'run_name=\\udcff' is not valid UTF-8: ")


def test_half_a_surrogate_pair_in_a_text_is_a_fault_of_the_program() -> None:
    with pytest.raises(UnicodeEncodeError), one_clear_message():
        "\ud83d".encode()
