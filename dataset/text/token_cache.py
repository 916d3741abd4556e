"""The token cache: tokenizes a source once by `datasets`, in bounded memory, to memory-mapped Arrow
files.

There are two steps, each cached under a hash of everything it depends on: one table of the rows of
all files, and one of the encoded rows. Knows no epochs, batches or configuration files.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from config.errors import UsageError
from config.schema import DatasetConfig
from dataset.text.conversation import Template
from dataset.text.loader import Columns, TextDataset, columns_of
from dataset.text.row_encoder import RAW_SCHEMA, RowEncoder, recipe
from dataset.text.rows import BadRow, RowFile, open_row_file, refused, to_json
from dataset.text.splits import are_test_hashes
from dataset.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 5
Split = Literal["train", "test"]

_ROWS_AT_ONCE = 512
# Starting processes pays off only for more rows than this.
_ROWS_BEFORE_PROCESSES = 4096
# One process collects the others' results; about this many keep it busy.
_MOST_PROCESSES = 16
_PR_SET_PDEATHSIG = 1


def load_split(
    config: DatasetConfig,
    files: Sequence[Path],
    split: Split,
    tokenizer: Tokenizer,
    template: Template,
    *,
    by_hash: bool,
    alone: bool = False,
) -> TextDataset:
    """Open one split of the tokens of `files`, in order, tokenizing them if needed.

    by_hash: the files hold both splits, divided by `splits.are_test_hashes`; otherwise only `split`.
    `config.subset_size`: reading stops once train has its first `subset_size` rows and test its
    first `min(subset_size, ceil(subset_size * r / (1 - r)))`, r the test ratio: the same
    proportion, and a small test split doesn't need the whole of a large file. alone: load only
    `split`, with `subset_size` rows. Raises `UsageError`.
    """
    import datasets  # takes half a second, and answering a message doesn't need it

    test_ratio = config.test_ratio if by_hash else 0.0
    wanted = wanted_rows(config.subset_size, test_ratio, split if alone and by_hash else None)
    opened = tuple(map(open_row_file, files))
    settings = recipe(config, tokenizer, template)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    folder = cache_dir(config)
    with _as_usage_error(folder):
        # Taken before the hashes, so that a file that changes meanwhile is refused.
        stamps = [_stamp(file.path) for file in opened]
        sha256 = tuple(file_sha256(file.path, folder) for file in opened)
        content = [[file.format, digest] for file, digest in zip(opened, sha256, strict=True)]
        # For a subset, read a probable number of rows, then four times as many until it is enough.
        limit = _likely_rows(wanted, test_ratio)
        while True:
            key = _key("rows", format=FORMAT_VERSION, files=content, limit=limit)
            raw = _raw_rows(opened, stamps, limit, key, folder)
            raw_columns = columns_of(raw)
            with _locked(folder / _key("tokens", rows=key, **settings)) as own, tempfile.TemporaryDirectory() as scratch:
                stop_at = Path(scratch) / "stop" if config.on_bad_row == "error" else None
                encoder = RowEncoder(config, tokenizer, template, stop_at)
                tokens = columns_of(_encoded(raw, encoder, processes_to_use(config.processes), own))
            dropped, bad, hashes = (tokens[name].to_numpy() for name in ("dropped", "bad", "prompt_hash"))
            if len(bad) != len(raw):
                raise pa.ArrowInvalid(f"{len(bad)} of {len(raw)} rows in {own.name}")
            in_test = are_test_hashes(hashes, config.seed, test_ratio)
            taken, read = _taken((dropped == "") & (bad == ""), in_test, wanted)
            if config.on_bad_row == "error" and (found := np.flatnonzero(bad[:read] != "")).size:
                first = int(found[0])
                file = opened[raw_columns["file"][first].as_py()]
                raise refused(file, raw_columns["number"][first].as_py(), tokens["message"][first].as_py())
            if limit is None or read < len(raw) or len(raw) < limit:
                break
            limit *= 4
    rows = np.flatnonzero(taken & (in_test == (split == "test" and by_hash)))
    return TextDataset(config, settings, opened, sha256, raw_columns, tokens, rows, _counts(tokens, taken, read))


def wanted_rows(subset_size: int | None, test_ratio: float, alone: Split | None = None) -> dict[Split, float]:
    """How many rows of each split to keep; see `load_split`. If the files hold
    one split, its rows count as "train"."""
    if subset_size is None:
        return {"train": math.inf, "test": math.inf}
    if alone is not None:
        return {split: subset_size if split == alone else 0 for split in ("train", "test")}
    return {"train": subset_size, "test": min(subset_size, math.ceil(subset_size * test_ratio / (1.0 - test_ratio)))}


def processes_to_use(processes: int | None) -> int:
    """`processes`, or by default one for each CPU that this process may use, at most 16."""
    if processes is not None:
        return processes
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_PROCESSES)


def cache_dir(config: DatasetConfig) -> Path:
    """The folder in the settings, by default one in the cache of `datasets` (HF_HOME, HF_DATASETS_CACHE)."""
    from datasets.config import HF_DATASETS_CACHE

    return Path(config.cache_dir) if config.cache_dir else Path(HF_DATASETS_CACHE) / "instruct-trm"


def file_sha256(path: Path, memo_dir: Path) -> str:
    """SHA-256 of a file, cached in `memo_dir` by its path, size and times of change."""
    stamp = _stamp(path)
    memo = memo_dir / f"source-{hashlib.sha256(os.fsencode(str(stamp[0]))).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # Don't cache a recent file: a change within the clock's resolution would keep its stamp.
    if time.time_ns() - int(stamp[2]) > 2_000_000_000:
        temporary = memo.with_name(f".{memo.name}-{uuid.uuid4().hex}")  # readable for others, unlike those of `tempfile`
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, memo)
    return digest


def _stamp(path: Path) -> list[str | int]:
    """The stamp that identifies a file's content. Unlike mtime, ctime can't be set back."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


@contextlib.contextmanager
def _as_usage_error(cache_dir: Path) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except pa.ArrowInvalid as error:
        raise UsageError(f"the cached data in {str(cache_dir)!r} is damaged ({error}): delete it, then start again") from error
    except OSError as error:
        if error.filename is not None and not Path(error.filename).is_relative_to(cache_dir):
            raise UsageError(f"{error.filename} can't be read: {error.strerror}") from error
        raise UsageError(
            f"tokens can't be cached in {str(cache_dir)!r} ({error}): free space, make it writable, or name another folder with "
            "dataset.cache_dir"
        ) from error


def _likely_rows(wanted: dict[Split, float], test_ratio: float) -> int | None:
    needed = max(wanted["train"] / (1 - test_ratio), wanted["test"] / test_ratio if wanted["test"] and test_ratio else 0.0)
    return None if math.isinf(needed) else math.ceil(1.25 * needed) + 1000


def _taken(
    is_usable: npt.NDArray[np.bool_], in_test: npt.NDArray[np.bool_], wanted: dict[Split, float]
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows to keep, and how many are read for them: up to the row that fills the last split."""
    taken, read = np.zeros(len(is_usable), np.bool_), 0
    for count, is_here in ((wanted["train"], is_usable & ~in_test), (wanted["test"], is_usable & in_test)):
        rank = np.cumsum(is_here)
        taken |= is_here & (rank <= count)
        read = max(read, min(int(np.searchsorted(rank, count)) + 1 if count else 0, len(taken)))
    return taken, read


def _counts(tokens: Columns, taken: npt.NDArray[np.bool_], read: int) -> dict[str, Any]:
    def counted(column: str) -> dict[str, int]:
        names = tokens[column][:read]
        pairs = pc.value_counts(pc.list_flatten(names) if column == "ignored" else names).to_pylist()
        return {pair["values"]: pair["counts"] for pair in pairs if pair["values"]}

    dropped, bad = counted("dropped"), counted("bad")
    left = read - sum(dropped.values()) - sum(bad.values()) - int(np.count_nonzero(taken))
    return {
        "read": read,
        "beyond_subset": left,
        "dropped": dropped,
        "bad": bad,
        "forms": counted("form"),
        "ignored": counted("ignored"),
    }


def _key(kind: str, **parts: Any) -> str:
    return f"{kind}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]}"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[Path]:
    """Let one process fill a folder. Others, such as other ranks, wait and find it filled."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        # Without locks, several processes do the same work: slower but correct.
        with contextlib.suppress(NotImplementedError):
            stack.enter_context(FileLock(folder / "lock"))
        yield folder


def _raw_rows(files: Sequence[RowFile], stamps: Sequence[Any], limit: int | None, key: str, cache_dir: Path) -> "Dataset":
    """The first `limit` rows of the files, or all, as a table of RAW_SCHEMA."""
    from datasets import Dataset, Features
    from datasets.exceptions import DatasetGenerationError

    try:
        return Dataset.from_generator(
            _rows_of,
            features=Features.from_arrow_schema(RAW_SCHEMA),
            cache_dir=str(cache_dir),
            gen_kwargs={"files": tuple(files), "stamps": tuple(stamps), "limit": limit},
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None


def _rows_of(files: Sequence[RowFile], stamps: Sequence[Any], limit: int | None) -> Iterator[dict[str, Any]]:
    rows = ((number, place, data) for number, file in enumerate(files) for place, data in file.rows())
    is_empty = True
    for number, place, data in islice(rows, limit):
        is_empty = False
        row, bad = (None, json.dumps(data.args)) if isinstance(data, BadRow) else (to_json(data), None)
        yield {"file": number, "number": place, "row": row, "bad": bad}
    for file, stamp in zip(files, stamps, strict=True):
        if _stamp(file.path) != stamp:
            raise UsageError(f"{file.path} was changed while it was read: start again when it is complete")
    if is_empty:
        raise UsageError(f"expected rows in {', '.join(str(file.path) for file in files)}, found none: empty files; use others")


def _encoded(raw: "Dataset", encoder: RowEncoder, processes: int, folder: Path) -> "Dataset":
    """Encode all rows, or those up to the first bad one. Processes forked meanwhile end with this one,
    even if it is killed.
    """
    from datasets import Features

    global _children_end_with_us
    for leftover in folder.glob("tmp*"):  # left by a killed process
        leftover.unlink()
    _children_end_with_us = True
    try:
        return raw.with_format("arrow").map(
            encoder,
            with_indices=True,
            batched=True,
            batch_size=_ROWS_AT_ONCE,
            remove_columns=raw.column_names,
            features=Features.from_arrow_schema(encoder.schema),
            num_proc=processes if processes > 1 and len(raw) > _ROWS_BEFORE_PROCESSES else None,
            cache_file_name=str(folder / "tokens.arrow"),
            new_fingerprint=folder.name,
            desc="tokenizing",
        )
    finally:
        _children_end_with_us = False


_children_end_with_us = False


def _after_fork() -> None:
    if _children_end_with_us:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":  # only Linux has this option
    os.register_at_fork(after_in_child=_after_fork)
