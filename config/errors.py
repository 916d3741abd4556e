"""The one exception that is meant for the person at the keyboard, and how a door shows it and other endings that are no fault.

Rooms raise `UsageError` where the cause is known; doors turn it into one message and a non-zero exit.
"""

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterator


class UsageError(Exception):
    """Wrong input. The message says what was expected, what was found, and what to do."""


class StoppedBySignal(Exception):
    """A run has saved all it needs to go on and ends because a signal asked it to."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number


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
        "`python` instead of `torchrun` (training is what ranks share)"
    )


@contextlib.contextmanager
def one_clear_message() -> Iterator[None]:
    """Print a `UsageError` as `error: ...` on stderr and exit with status 2, without a traceback.

    A run that a signal has stopped ends with 128 and the signal's number: 143 for SIGTERM, 130 for SIGINT. Ctrl-C elsewhere, and a
    stdout that nobody reads any more (`... | head -1`), end the program without a word, with the status that the signals SIGINT and
    SIGPIPE have in a shell.
    """
    try:
        yield
        print(end="", flush=True)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except StoppedBySignal as stop:
        sys.exit(128 + stop.signal_number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        if not _is_closed_at_the_other_end(sys.stdout.fileno()):
            raise
        # Or the interpreter would try once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _is_closed_at_the_other_end(pipe: int) -> bool:
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
