"""The folder of a run: its name, and the lock that makes it belong to one process at a time.

Knows no checkpoints. Reading a run takes no lock.
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

# The kernel releases the lock on this file when its process ends. The file itself means nothing.
_LOCK_FILE = ".lock"
# The lock's owner, in its own file: filelock before version 4 empties the locked file.
_OWNER_FILE = ".lock.json"
# torchrun and Slurm may restart a run while the old process is still ending.
WAIT_SECONDS = 10.0
# flock's errors on file systems without locks, such as some network mounts.
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
    """Within the block the run's folder, created if missing, belongs to this process; yields it.

    is_new: create a new folder: `folder`, or with -2, -3, ... if another process was faster. Waits
    up to `WAIT_SECONDS` for another process. If the file system has no locks, reports that and goes
    on without one. Removes a created folder that is still empty at the end. Raises UsageError.
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
        # Only for the message of a process that is refused.
        with contextlib.suppress(OSError):
            (folder / _OWNER_FILE).write_text(json.dumps(owner))
        yield folder
    finally:
        with contextlib.suppress(OSError):
            (folder / _OWNER_FILE).unlink(missing_ok=True)
            if folder in made and {path.name for path in folder.iterdir()} == {_LOCK_FILE}:
                # Remove the lock file while it is locked: another process that has it open then
                # opens a new one.
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
        say(f"{folder} can't be locked ({error.strerror}): make sure that no other run uses it")
    return lock


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER_FILE).read_text())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    # Not written yet, or the disk is full.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
