"""One file from the Hugging Face hub: resumed where it stopped, checked, and put in place whole or not at all.

This file must not know what the file is for. Every failure is a `UsageError` that says what to do.
"""

import contextlib
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

from tqdm import tqdm

from config.errors import UsageError

# Short, so that a machine without a network says so in seconds; a transfer that stalls this long is resumed.
_TIMEOUT_S = 5.0
_TRIES_WITHOUT_PROGRESS = 3
_BLOCK_BYTES = 1 << 18
_STATED_HASH = "X-Linked-ETag"


class _Interrupted(Exception):
    """The transfer broke off after it had begun; it can go on from where it stands."""


def download(
    repo: str,
    filename: str,
    destination: str | Path,
    revision: str = "main",
    repo_type: str = "model",
    expected_sha256: str | None = None,
    expected_size: int | None = None,
) -> Path:
    """Fetch `filename` of a hub repository to `destination`, unless it is there with the expected hash.

    An interrupted transfer leaves `<destination>.part` and goes on from there when called again, even in
    another process. `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_TOKEN` and the usual proxy variables are respected.
    repo_type: "model" or "dataset". expected_size: bytes. Without expected_sha256, the hash is checked that the hub states
    for files in its large-file storage. Raises `UsageError`: offline, no network, no access, not found, wrong size or checksum.
    """
    # Its own downloader can't resume what another process began; its addresses and credentials are used.
    from huggingface_hub import constants, get_token, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    target = Path(destination)
    what = f"{filename} of {repo} (revision {revision})"
    by_hand = f"or put the file at {str(target)!r} by hand"
    if _is_complete(target, expected_sha256):
        return target
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{what} is needed but HF_HUB_OFFLINE is set: unset it, {by_hand}")
    try:
        url = hf_hub_url(repo, filename, repo_type=repo_type, revision=revision)
    except (HFValidationError, ValueError) as error:
        raise UsageError(f"{what}: not a valid hub address ({error}); check repository and file name") from error
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{what}: expected an http(s) address, found {url!r}; correct or unset HF_ENDPOINT")
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(part) as handle:
            etag_file = part.with_suffix(".etag")
            try:
                if not _is_complete(target, expected_sha256):  # another process may have fetched it meanwhile
                    stated_sha256 = _transfer(url, get_token(), handle, etag_file, expected_size, what)
                    handle.flush()
                    os.fsync(handle.fileno())
                    _check(part, expected_sha256 or stated_sha256, what)
                    os.replace(part, target)
            finally:
                handle.flush()
                if not part.is_file() or part.stat().st_size == 0:
                    part.unlink(missing_ok=True)
                    etag_file.unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        raise UsageError(f"{what}: {_advice(error.code)} (HTTP {error.code} from {url}), {by_hand}") from error
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, _Interrupted) as error:
        reason = getattr(error, "reason", None) or error
        raise UsageError(
            f"{what}: no connection to {url} ({reason}): check the network or proxy and start again "
            f"(what has arrived is kept), name a mirror in HF_ENDPOINT, {by_hand}"
        ) from error
    except OSError as error:
        raise UsageError(f"{what} can't be written to {str(target)!r}: {error}") from error
    return target


@contextlib.contextmanager
def _locked(part: Path) -> Iterator[BinaryIO]:
    """The part file, open for appending; a second process waits until the first has closed it."""
    while True:
        with part.open("ab") as handle:
            with contextlib.suppress(OSError):  # no locks here: two at once then end in a checksum or size error
                fcntl.flock(handle, fcntl.LOCK_EX)
            # While this one waited, the file may have been moved into place or deleted.
            is_still_there = False
            with contextlib.suppress(FileNotFoundError):
                is_still_there = os.path.samestat(os.fstat(handle.fileno()), part.stat())
            if is_still_there:
                handle.seek(0, os.SEEK_END)
                yield handle
                return


def _is_complete(target: Path, expected_sha256: str | None) -> bool:
    return target.is_file() and (expected_sha256 is None or _sha256(target) == expected_sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _check(part: Path, expected_sha256: str | None, what: str) -> None:
    if expected_sha256 is None:
        return
    found = _sha256(part)
    if found != expected_sha256:
        part.unlink()
        raise UsageError(
            f"{what}: expected sha256 {expected_sha256}, found {found}; the file was deleted. "
            "Start again, or give the hash of the revision that you mean"
        )


def _advice(status: int) -> str:
    if status in (401, 403):
        return "access denied: it is gated, private or doesn't exist; accept its terms on the hub, then set HF_TOKEN"
    if status == 404:
        return "not found: check repository, file name and revision"
    return "the hub can't serve it now: start again later"


def _transfer(url: str, token: str | None, handle: BinaryIO, etag_file: Path, expected_size: int | None, what: str) -> str | None:
    """Append to `handle` until it holds the whole file, reconnecting after interruptions. Returns its hash as the hub states it."""
    failures = 0
    while True:
        before = handle.tell()
        try:
            return _attempt(url, token, handle, etag_file, expected_size, what)
        except _Interrupted:
            failures = 0 if handle.tell() > before else failures + 1
            if failures >= _TRIES_WITHOUT_PROGRESS:
                raise
            time.sleep(0.5)


class _NotingRedirects(urllib.request.HTTPRedirectHandler):
    """Keeps the headers of the hub's own answer, which sends on to a storage that doesn't repeat them."""

    stated_etag: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        self.stated_etag = self.stated_etag or headers.get(_STATED_HASH)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _attempt(url: str, token: str | None, handle: BinaryIO, etag_file: Path, expected_size: int | None, what: str) -> str | None:
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if token:
        # Not repeated after a redirect: the token is for the hub, not for the storage behind it.
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    begin = handle.tell()
    etag = etag_file.read_text(encoding="utf-8") if etag_file.is_file() else ""
    if begin and etag:
        request.add_header("Range", f"bytes={begin}-")
        request.add_header("If-Range", etag)
    redirects = _NotingRedirects()
    try:
        response = urllib.request.build_opener(redirects).open(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not begin:
            raise
        handle.truncate(0)
        handle.seek(0)
        raise _Interrupted("the part that had arrived belongs to another file") from error
    with response:
        begin = _begin_of(response)
        if begin != handle.tell():  # the server sends all of it: another version, or no ranges
            handle.truncate(begin)
            handle.seek(begin)
        new_etag = response.headers.get("ETag") or ""
        # A weak tag doesn't promise the same bytes, so such a file starts over.
        etag_file.write_text("" if new_etag.startswith("W/") else new_etag, encoding="utf-8")
        length = response.headers.get("Content-Length")
        size = begin + int(length) if length is not None else None
        if expected_size is not None and size is not None and size != expected_size:
            handle.truncate(0)
            raise UsageError(f"{what}: expected {expected_size:,} bytes, the hub offers {size:,}; check the revision")
        with tqdm(total=size, initial=begin, unit="B", unit_scale=True, desc=etag_file.stem, disable=None) as bar:
            try:
                while block := response.read(_BLOCK_BYTES):
                    handle.write(block)
                    bar.update(len(block))
            except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                if isinstance(error, http.client.IncompleteRead):
                    handle.write(error.partial)
                raise _Interrupted(str(error)) from error
        if size is not None and handle.tell() != size:
            raise _Interrupted(f"{handle.tell():,} of {size:,} bytes arrived")
        stated = re.fullmatch(r'"?([0-9a-f]{64})"?', redirects.stated_etag or response.headers.get(_STATED_HASH) or "")
    return stated[1] if stated else None


def _begin_of(response: http.client.HTTPResponse) -> int:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return int(found.group(1)) if response.status == http.HTTPStatus.PARTIAL_CONTENT and found else 0
