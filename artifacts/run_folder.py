"""The folder of a run: what it may be called, and that it belongs to one process at a time.

Knows no checkpoints. Who only reads a run takes no lock.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from config.errors import UsageError

# The kernel's lock on this file goes with the process that holds it, however that ends; the file itself means nothing.
_LOCK_FILE = ".lock"
# Who holds it. A file of its own: before version 4, filelock empties the locked one.
_OWNER_FILE = ".lock.json"
# torchrun and Slurm start a run again while its predecessor may still be dying.
WAIT_SECONDS = 10.0
# What flock says where a file system has no locks: some network mounts.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_LONGEST_NAME_BYTES = 255


def check_folder_name(key: str, name: str) -> None:
    """Raise UsageError unless `name`, the value of the setting `key`, is the name of one folder inside its parent."""
    is_text = name.strip() != "" and name.isprintable()
    is_elsewhere = name in (".", "..") or "/" in name
    is_checkpoint = name.startswith("step_") and name[5:].isdecimal()
    if is_text and not is_elsewhere and not is_checkpoint and len(name.encode()) <= _LONGEST_NAME_BYTES:
        return
    shown = ascii(name) if len(name) <= 60 else ascii(name[:60]) + "..."
    raise UsageError(
        f"{key}={shown}: expected the name of one folder: printable characters without a slash, at most {_LONGEST_NAME_BYTES} "
        "bytes, not '.', '..' or step_<N>, which is a checkpoint; checkpoint_dir says where the folder goes"
    )


@contextlib.contextmanager
def owned_folder(folder: Path, say: Callable[[str], None], *, is_new: bool = False) -> Iterator[Path]:
    """Within the block the run's folder, made if it is missing, belongs to this process; yields it.

    is_new: make a folder that wasn't there: `folder`, or if another process was faster its name with -2, -3, ...

    A process that has the folder is waited for, `WAIT_SECONDS` at most. Where the file system has no locks this is said, and
    nothing keeps a second process out. What was made and is still empty at the end is removed. Raises UsageError if another
    process keeps the folder, or it can't be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        if is_new:
            folder = _make_new(folder)
            made = [folder, *made[1:]]
        else:
            folder.mkdir(parents=True, exist_ok=True)
        lock = _acquire(folder, say)
    except OSError as error:
        raise UsageError(f"the run's folder {folder} can't be written: {error}; choose another checkpoint_dir") from error
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"}
        # For the message of the process that is refused, and nothing else.
        with contextlib.suppress(OSError):
            (folder / _OWNER_FILE).write_text(json.dumps(owner))
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder / _OWNER_FILE).unlink(missing_ok=True)
            if folder in made and {path.name for path in folder.iterdir()} == {_LOCK_FILE}:
                # While it is held: whoever has opened this file sees that it is gone, and opens the next.
                (folder / _LOCK_FILE).unlink()
        lock.release()
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()


def _make_new(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


def _acquire(folder: Path, say: Callable[[str], None]) -> FileLock:
    """The lock of `folder`, held. Raises UsageError if another process keeps it."""
    lock = FileLock(folder / _LOCK_FILE)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"{folder} is in use by {_owner(folder)}; waiting up to {WAIT_SECONDS:.0f} s for it")
            lock.acquire(timeout=WAIT_SECONDS)
    except Timeout:
        raise UsageError(
            f"{folder} is in use by {_owner(folder)}, and two runs in one folder would destroy each other: wait for that one to "
            "end, stop it, or choose another run_name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        say(f"{folder} can't be locked ({error.strerror}): take care that no second run uses it")
    return lock


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_FILE).read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    # Not written yet, or on a full disk.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
