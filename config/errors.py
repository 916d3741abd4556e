"""The one exception that is meant for the person at the keyboard, and how a door shows it.

Rooms raise `UsageError` where the cause is known; doors turn it into one message and a non-zero exit.
"""

import contextlib
import sys
from collections.abc import Iterator


class UsageError(Exception):
    """Wrong input. The message says what was expected, what was found, and what to do."""


@contextlib.contextmanager
def one_clear_message() -> Iterator[None]:
    """Print a `UsageError` as `error: ...` on stderr and exit with status 2, without a traceback."""
    try:
        yield
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
