"""Progress bars of everything but training, which has training/console.py."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], *, shown: bool, **options: Any) -> "tqdm[Item]":
    """`items` with a bar on standard error, if `shown`; it moves every 30 seconds in a log. options: tqdm's."""
    return tqdm(items, disable=not shown, mininterval=0.1 if sys.stderr.isatty() else 30, **options)
