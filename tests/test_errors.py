"""How a door shows wrong input: one message, status 2, no traceback."""

import pytest

from config.errors import UsageError, one_clear_message


def test_a_usage_error_becomes_one_message_and_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, one_clear_message():
        raise UsageError("no data at 'x': expected a folder")
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert shown.err == "error: no data at 'x': expected a folder\n" and shown.out == ""


def test_other_exceptions_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), one_clear_message():
        raise ZeroDivisionError


def test_nothing_happens_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with one_clear_message():
        pass
    assert capsys.readouterr() == ("", "")
