"""The one exception that is meant for the person at the keyboard, and how a script shows it and other endings that are no fault.

Packages raise `UsageError` where the cause is known; scripts turn it into one message and a non-zero exit.
"""

import contextlib
import errno
import io
import itertools
import os
import re
import select
import signal
import sys
import time
from collections.abc import Iterator


class UsageError(Exception):
    """Wrong input. The message says what was expected, what was found, and what to do."""


class StoppedBySignal(Exception):
    """A program ends because a signal asked it to; it has kept what it needs to go on, if it goes on."""

    def __init__(self, signal_number: int) -> None:
        # The number, not the name, so that it can be pickled.
        super().__init__(signal_number)
        self.signal_number = signal_number

    def __str__(self) -> str:
        return signal.Signals(self.signal_number).name


# What the machine refuses, with what to do about it. Nothing of it is a fault of the program.
_REFUSED = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission: choose another folder, or change its rights",
    errno.EPERM: "no permission: choose another folder, or change its rights",
    errno.ENAMETOOLONG: "the name is too long: shorten it",
}


_ENCODING_ADVICE = "use UTF-8 names in a UTF-8 locale (export LC_ALL=C.UTF-8, or PYTHONUTF8=1)"


def print_anything() -> None:
    """Let no text fail to be printed: what the terminal's encoding lacks is shown as an escape, such as \\u2603."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


# torchrun ends all ranks once one has ended: the first must have had the time to say why.
_SECONDS_FOR_THE_FIRST_RANK = 10.0


def refuse_several_ranks() -> None:
    """Raise UsageError in a program that can't share its work, if it is one of several ranks; the others end without a word."""
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_SECONDS_FOR_THE_FIRST_RANK)
        sys.exit(2)
    raise UsageError(
        f"WORLD_SIZE is {size}, so each of {size} ranks would do all of the work: this program runs as one process, start it with "
        "`python` instead of `torchrun` (ranks share training, inference_instruct.py, and generate_instruct.py --input)"
    )


@contextlib.contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Within the block SIGTERM, which torchrun sends when another rank has died, raises StoppedBySignal."""

    def stop(number: int, _: object) -> None:
        raise StoppedBySignal(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def one_clear_message() -> Iterator[None]:
    """Print a `UsageError` as `error: ...` on stderr and exit with status 2, without a traceback.

    So it is with what the machine refuses, such as a write to a full disk, and with text that isn't valid UTF-8.

    A run that a signal has stopped ends with 128 and the signal's number: 143 for SIGTERM, 130 for SIGINT. Ctrl-C elsewhere, and a
    stdout that nobody reads any more (`... | head -1`), end the program without a word, with the status that the signals SIGINT and
    SIGPIPE have in a shell.
    """
    print_anything()
    try:
        _check_arguments()
        yield
        print(end="", flush=True)
    except StoppedBySignal as stop:
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _is_closed_at_the_other_end(sys.stdout.fileno()):
            raise
        _print_no_more()
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        message = message_of(error)
        if message is None:
            raise
        try:
            print(end="", flush=True)
        except OSError:
            _print_no_more()
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def message_of(error: Exception) -> str | None:
    """What to tell about an error that is no fault of the program; None: it is one."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or error.strerror}: {_REFUSED[error.errno]}"
    # Bytes of names that aren't UTF-8 come as U+DC80 to U+DCFF; where the locale's encoding is ASCII, no other letter fits either.
    if isinstance(error, UnicodeEncodeError) and (error.encoding != "utf-8" or "\udc80" <= error.object[error.start] <= "\udcff"):
        return f"{ascii(error.object)[:200]} can't be written as {error.encoding}: {_ENCODING_ADVICE}"
    return None


def _check_arguments() -> None:
    for before, argument in itertools.pairwise(sys.argv):
        if re.search("[\ud800-\udfff]", argument):
            after = f" after {before}" if before.startswith("--") else ""
            encoding = sys.getfilesystemencoding()
            wrong = "is not valid UTF-8" if encoding == "utf-8" else f"can't be read, because this locale's encoding is {encoding}"
            raise UsageError(f"argument {argument!a}{after} {wrong}: {_ENCODING_ADVICE}")


def _print_no_more() -> None:
    """Or the interpreter would try once more to flush stdout on its way out, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_closed_at_the_other_end(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
