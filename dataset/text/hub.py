"""Downloads files from the Hugging Face hub: resumes interrupted transfers, and checks hashes.

huggingface_hub handles addresses, credentials, retries and mirrors; `datasets` decides which files
make a split. Every failure is a `UsageError` that says what to do.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from tarfile import TarError

from config.errors import UsageError
from dataset.text.rows import first_line, format_of


def download(
    repo: str,
    filename: str,
    destination: str | Path,
    revision: str = "main",
    repo_type: str = "model",
    expected_sha256: str | None = None,
) -> Path:
    """Download `filename` of a hub repository to `destination`, unless it exists with the expected
    hash.

    An interrupted transfer leaves `.<name>.<version>.part` beside `destination`; the next call
    resumes it, also in another process. repo_type: "model" or "dataset". Without `expected_sha256`,
    checks the hub's hash for files in its large-file storage. Raises `UsageError`: offline, no
    network, no access, not found, wrong size or checksum.
    """
    from filelock import FileLock
    from huggingface_hub import get_hf_file_metadata, get_token, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    # huggingface_hub's downloader doesn't resume the transfer of another process; 1 GB over a slow
    # line needs that.
    target = Path(destination)
    what = f"{filename} of {repo} (revision {revision})"
    if _is_complete(target, expected_sha256):
        return target
    with _as_usage_error(what, f"or put the file at {str(target)!r} by hand"):
        url = hf_hub_url(repo, filename, repo_type=repo_type, revision=revision)
        about = get_hf_file_metadata(url, token=get_token())
        if about.etag is None:
            raise UsageError(f"{what}: the hub states no version of it, so a transfer can't resume; is HF_ENDPOINT a hub?")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{hashlib.sha256(about.etag.encode()).hexdigest()[:16]}.part")
        with FileLock(target.with_name(f".{target.name}.lock")):  # a second process waits, then finds the file
            if not _is_complete(target, expected_sha256):
                with part.open("ab") as handle:
                    headers = {**build_hf_headers(token=get_token()), "Accept-Encoding": "identity"}
                    http_get(
                        url,
                        handle,
                        resume_size=handle.tell(),
                        headers=headers,
                        expected_size=about.size,
                        displayed_filename=filename,
                    )
                    handle.flush()
                    os.fsync(handle.fileno())
                stated = about.etag if re.fullmatch("[0-9a-f]{64}", about.etag) else None
                expected = expected_sha256 or stated
                if expected is not None and (found := _sha256(part)) != expected:
                    part.unlink()
                    raise UsageError(
                        f"{what}: expected sha256 {expected}, found {found}; the file was deleted. "
                        "Start again, or give the hash of the revision that you mean"
                    )
                os.replace(part, target)
    return target


def split_files(repo: str, config: str | None, split: str, revision: str, cache_dir: Path) -> list[Path]:
    """The files of a hub data set's split, in order, downloaded to `cache_dir`. Raises
    `UsageError`.

    The result is recorded, so that later runs need no network. `datasets` converts data sets that
    aren't files of known formats to Arrow.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfFileSystem, constants
    from huggingface_hub.hf_file_system import HfFileSystemResolvedRepositoryPath

    name = json.dumps([repo, config, split, revision])
    note = cache_dir / "hub" / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.json"
    known: list[Path] = []
    with contextlib.suppress(OSError, ValueError):  # not written yet, or truncated by a full disk
        known = [Path(path) for path in json.loads(note.read_text("utf-8"))]
    if known and constants.HF_HUB_OFFLINE and all(path.is_file() for path in known):
        return known
    what = f"the data set {repo} (revision {revision})"
    by_hand = "or fetch its files by hand and name them: dataset=jsonl dataset.data_dir=FOLDER"
    otherwise = "or use what was fetched before: HF_HUB_OFFLINE=1" if known else by_hand
    with _as_usage_error(what, otherwise, DatasetsError, RuntimeError):  # RuntimeError: the data set has code, which isn't run
        builder = load_dataset_builder(repo, config, revision=revision, cache_dir=str(cache_dir / "converted"))
        splits = {str(name): urls for name, urls in (builder.config.data_files or {}).items()}
        if split not in splits:
            raise UsageError(f"{what} has no split {split!r}: choose dataset.split of {', '.join(sorted(splits)) or 'none'}")
        files = []
        for url in splits[split]:
            place = HfFileSystem().resolve_path(url)
            assert isinstance(place, HfFileSystemResolvedRepositoryPath)
            target = cache_dir / "hub" / repo.replace("/", "--") / place.revision / place.path_in_repo
            files.append(download(repo, place.path_in_repo, target, revision=place.revision, repo_type="dataset"))
        if any(format_of(path) is None for path in files):
            try:
                builder.download_and_prepare()
            except (ImportError, TarError) as error:  # from the reader of a format
                raise RuntimeError(str(error)) from error
            files = [Path(file["filename"]) for file in builder.as_dataset(split).cache_files]
    note.write_text(json.dumps([str(path) for path in files]), encoding="utf-8")
    return files


@contextlib.contextmanager
def _as_usage_error(what: str, otherwise: str, *wrong_use: type[Exception]) -> Iterator[None]:
    """Turn every transfer error into a `UsageError` about `what` that ends with `otherwise`, another way to get it.
    wrong_use: errors, besides ValueError, for a `what` that can't be used as requested.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    offline = f"{what} is needed but HF_HUB_OFFLINE is set: unset it, {otherwise}"
    of_use: tuple[type[Exception], ...] = (ValueError, *wrong_use)
    # HfHubHTTPError belongs to huggingface_hub's HTTP library, and is an OSError.
    of_the_network: tuple[type[Exception], ...] = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UsageError(offline) from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        raise UsageError(f"{what}: {_advice(status)} (HTTP {status}), {otherwise}") from error
    except of_the_network as error:
        if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
            raise UsageError(f"{what} can't be written: {error}") from error
        if constants.HF_HUB_OFFLINE:  # `datasets` has its own error for it
            raise UsageError(offline) from error
        raise UsageError(
            f"{what}: {first_line(error)}: check names, network and proxy and start again (what has arrived is kept), name a "
            f"mirror in HF_ENDPOINT, {otherwise}"
        ) from error
    except of_use as error:
        raise UsageError(f"{what}: {first_line(error)}; check repository, config and file names, {otherwise}") from error


def _advice(status: int) -> str:
    if status in (401, 403):
        return "access denied: it is gated, private or doesn't exist; accept its terms on the hub, then set HF_TOKEN"
    if status == 404:
        return "not found: check repository, file name and revision"
    return "the hub can't serve it now: start again later"


def _is_complete(target: Path, expected_sha256: str | None) -> bool:
    return target.is_file() and (expected_sha256 is None or _sha256(target) == expected_sha256)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
