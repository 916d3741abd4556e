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
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from config.errors import UsageError
from dataset.text.conversation import Template
from dataset.text.forms import USUAL, FormOptions
from dataset.text.row_encoder import RAW_SCHEMA, LongRows, Recipe, RowEncoder
from dataset.text.rows import BadRow, RowFile, open_row_file, to_json
from dataset.text.splits import are_test_hashes
from dataset.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT_VERSION = 3
Split = Literal["train", "test"]

_ROWS_AT_ONCE = 512
# Starting processes pays off only for more rows than this.
_ROWS_BEFORE_PROCESSES = 4096
# One process collects the others' results; about this many keep it busy.
_MOST_PROCESSES = 16
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class HashSplit:
    """A split into train and test rows by `splits.are_test_hashes`."""

    seed: int
    test_ratio: float


class ArrowRows:
    """A memory-mapped table with random access by row, in microseconds."""

    def __init__(self, dataset: "Dataset") -> None:
        self._table = dataset.data.table
        self._batches = self._table.to_batches()
        self._ends = list(accumulate(map(len, self._batches)))
        # For each list column and batch: the offsets of the rows' values, and the values.
        self._lists = {
            field.name: [(batch[field.name].offsets.to_numpy(), batch[field.name].values.to_numpy()) for batch in self._batches]
            for field in self._table.schema
            if pa.types.is_list(field.type)
        }

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def column(self, name: str) -> npt.NDArray[Any]:
        """All values of a column, [rows]."""
        values: npt.NDArray[Any] = self._table[name].to_numpy()
        return values

    def value(self, name: str, row: int) -> Any:
        """One value of a column."""
        batch, row = self._at(row)
        return self._batches[batch][name][row].as_py()

    def row(self, row: int) -> dict[str, Any]:
        """All values of a row."""
        return {name: self.value(name, row) for name in self._table.column_names}

    def list(self, name: str, row: int) -> npt.NDArray[Any]:
        """One value of a column of lists, a view of the file."""
        batch, row = self._at(row)
        offsets, values = self._lists[name][batch]
        view: npt.NDArray[Any] = values[offsets[row] : offsets[row + 1]]
        return view

    def _at(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._ends, row)
        return batch, row - (self._ends[batch - 1] if batch else 0)


@dataclass(frozen=True)
class LoadedSplit:
    """The rows of one split.

    tokens: columns of `row_encoder.token_schema`; raw: of RAW_SCHEMA; a row has the same number in
    both. rows: int64 [m], the rows of the split, in the order of `files`, with their sha256.
    recipe: how the rows were encoded. counts: rows "read" from the files, of these "dropped" and
    "bad" by reason, "beyond_subset", "forms" (rows by form), and "ignored" (rows by key whose text
    was left out).
    """

    tokens: ArrowRows
    raw: ArrowRows
    rows: npt.NDArray[np.int64]
    files: tuple[RowFile, ...]
    sha256: tuple[str, ...]
    recipe: Recipe
    on_bad_row: str
    counts: dict[str, Any]


def load_split(
    *,
    source: Path | Sequence[Path],
    split: Split,
    tokenizer: Tokenizer,
    template: Template,
    seq_len: int,
    subset_size: int | None,
    hash_split: HashSplit | None,
    default_system_prompt: str | None,
    long_rows: LongRows,
    on_bad_row: Literal["error", "skip"],
    cache_dir: Path,
    forms: FormOptions = USUAL,
    alone: bool = False,
    processes: int | None = None,
) -> LoadedSplit:
    """Open one split of the tokens of `source` (a file, or several in order), tokenizing it if
    needed.

    seq_len: input positions; a row keeps at most seq_len + 1 ids. long_rows: for a longer row,
    "keep_prompt_end" cuts the oldest part of its prompt, then the end of its answer
    (`conversation.encode_batch`); "truncate" cuts its end; "drop" drops it. A row without
    supervised ids left is dropped. on_bad_row: "error" stops at the first malformed row and names
    its place, "skip" counts it. forms: options for the rows' forms. processes: number of tokenizing
    processes; null: one for each CPU. The tokens are the same for any number.
    hash_split: None if the files are a single split. subset_size: None takes every row. Otherwise
    reading stops once train has its first `subset_size` rows and test its first `min(subset_size,
    ceil(subset_size * r / (1 - r)))`, r the test ratio: the same proportion, and a small test split
    doesn't need the whole of a large file. alone: load only `split`, with `subset_size` rows.
    Raises `UsageError`.
    """
    import datasets  # takes half a second, and answering a message doesn't need it

    wanted = wanted_rows(subset_size, hash_split, split if alone else None)
    files = tuple(open_row_file(path) for path in ([source] if isinstance(source, Path) else source))
    recipe = Recipe(tokenizer.model_bytes, template, default_system_prompt or None, seq_len, long_rows, forms)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with _as_usage_error(cache_dir):
        # Before hashing the content: the cache must have the content of its key.
        stamps = [_stamp(file.path) for file in files]
        content = [[file.format, file_sha256(file.path, cache_dir)] for file in files]
        # For a subset, read a probable number of rows, then four times as many until it is enough.
        limit = _likely_rows(wanted, hash_split)
        while True:
            key = _key("rows", format=FORMAT_VERSION, files=content, limit=limit)
            raw = _raw_rows(files, stamps, limit, key, cache_dir)
            key = _key("tokens", rows=key, tokenizer=tokenizer.sha256, on_bad_row=on_bad_row, **recipe.key())
            encoder = RowEncoder(recipe, tokenizer.vocab_size)
            with _locked(cache_dir / key) as folder:
                tokens = ArrowRows(_encoded(raw, encoder, on_bad_row == "error", processes_to_use(processes), folder))
            if len(tokens) != len(raw):
                raise pa.ArrowInvalid(f"{len(tokens)} of {len(raw)} rows in {folder.name}")
            outcomes = tokens.column("outcome")
            in_test = np.zeros(len(tokens), np.bool_)
            if hash_split is not None:
                in_test = are_test_hashes(tokens.column("prompt_hash"), hash_split.seed, hash_split.test_ratio)
            taken, read = _taken(outcomes == "", in_test, wanted)
            bad = np.flatnonzero(outcomes[:read] == "bad")
            if len(bad) and on_bad_row == "error":
                source_row = ArrowRows(raw).row(bad[0])
                raise UsageError(
                    f"{files[source_row['file']].where(source_row['number'])}: {tokens.value('message', bad[0])}; correct the row, "
                    "or count such rows instead with dataset.on_bad_row=skip"
                )
            if limit is None or read < len(tokens) or len(tokens) < limit:
                break
            limit *= 4
    return LoadedSplit(
        tokens=tokens,
        raw=ArrowRows(raw),
        rows=np.flatnonzero(taken & (in_test == (split == "test" and hash_split is not None))),
        files=files,
        sha256=tuple(sha256 for _, sha256 in content),
        recipe=recipe,
        on_bad_row=on_bad_row,
        counts=_counts(tokens, taken, read),
    )


def wanted_rows(subset_size: int | None, hash_split: HashSplit | None, alone: Split | None = None) -> dict[Split, float]:
    """How many rows of each split to keep; see `load_split`. A single split counts as "train"."""
    test_ratio = hash_split.test_ratio if hash_split else 0.0
    if subset_size is None:
        return {"train": math.inf, "test": math.inf}
    if alone is not None and hash_split is not None:
        return {split: subset_size if split == alone else 0 for split in ("train", "test")}
    return {
        "train": subset_size,
        "test": min(subset_size, math.ceil(subset_size * test_ratio / (1.0 - test_ratio))),
    }


def processes_to_use(processes: int | None) -> int:
    """`processes`, or by default one for each CPU that this process may use, at most 16."""
    if processes is not None:
        return processes
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(available, _MOST_PROCESSES)


def default_cache_dir() -> Path:
    """A folder in the cache of `datasets` (HF_HOME, HF_DATASETS_CACHE)."""
    from datasets import config

    return Path(config.HF_DATASETS_CACHE) / "instruct-trm"


def file_sha256(path: Path, memo_dir: Path) -> str:
    """SHA-256 of a file, cached in `memo_dir` by its path, size and times of change."""
    stamp = _stamp(path)
    memo = memo_dir / f"source-{hashlib.sha256(str(stamp[0]).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # Don't cache a recent file: a change within the clock's resolution would keep its stamp.
    if time.time_ns() - int(stamp[2]) > 2_000_000_000:
        temporary = _unused_name(memo)
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, memo)
    return digest


def _stamp(path: Path) -> list[str | int]:
    """The stamp that identifies a file's content. Unlike mtime, ctime can't be set back."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _unused_name(path: Path) -> Path:
    """A hidden name beside `path`. `tempfile`'s would be unreadable for other users."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


@contextlib.contextmanager
def _as_usage_error(cache_dir: Path) -> Iterator[None]:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        yield
    except pa.ArrowInvalid as error:
        raise UsageError(f"the cached data in {str(cache_dir)!r} is damaged ({error}): delete it, then start again") from error
    except OSError as error:
        raise UsageError(
            f"tokens can't be cached in {str(cache_dir)!r} ({error}): free space, make it writable, or name another folder with "
            "dataset.cache_dir"
        ) from error


def _likely_rows(wanted: dict[Split, float], hash_split: HashSplit | None) -> int | None:
    ratio = hash_split.test_ratio if hash_split else 0.0
    needed = max(wanted["train"] / (1 - ratio), wanted["test"] / ratio if wanted["test"] and ratio else 0.0)
    return None if math.isinf(needed) else math.ceil(1.25 * needed) + 1000


def _taken(
    is_usable: npt.NDArray[np.bool_], in_test: npt.NDArray[np.bool_], wanted: dict[Split, float]
) -> tuple[npt.NDArray[np.bool_], int]:
    """Which rows to keep, and how many are read for them: up to the row that fills the last split."""
    taken, read = np.zeros(len(is_usable), np.bool_), 0
    sides: tuple[tuple[Split, npt.NDArray[np.bool_]], ...] = (("train", is_usable & ~in_test), ("test", is_usable & in_test))
    for split, is_here in sides:
        rank = np.cumsum(is_here)
        taken |= is_here & (rank <= wanted[split])
        full_at = int(np.searchsorted(rank, wanted[split])) + 1 if wanted[split] else 0
        read = max(read, min(full_at, len(taken)))
    return taken, read


def _counts(tokens: ArrowRows, taken: npt.NDArray[np.bool_], read: int) -> dict[str, Any]:
    outcomes, reasons = tokens.column("outcome")[:read], tokens.column("reason")[:read]
    by_reason = {outcome: dict(Counter(reasons[outcomes == outcome].tolist())) for outcome in ("dropped", "bad")}
    forms, ignored = tokens.column("form")[:read], tokens.column("ignored")[:read]
    return {
        "read": read,
        "beyond_subset": int(np.count_nonzero(outcomes == "") - np.count_nonzero(taken)),
        **by_reason,
        "forms": dict(Counter(forms[forms != ""].tolist())),
        "ignored": dict(Counter(key for keys in ignored[ignored != "[]"].tolist() for key in json.loads(keys))),
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
    count = -1
    for count, (number, place, data) in enumerate(rows):
        if count == limit:
            break
        if isinstance(data, BadRow):
            yield {"file": number, "number": place, "row": None, "bad": json.dumps([data.reason, str(data)])}
        else:
            yield {"file": number, "number": place, "row": to_json(data), "bad": None}
    for file, stamp in zip(files, stamps, strict=True):
        if _stamp(file.path) != stamp:
            raise UsageError(f"{file.path} was changed while it was read: start again when it is complete")
    if count < 0:
        raise UsageError(f"expected rows in {', '.join(str(file.path) for file in files)}, found none: empty files; use others")


def _encoded(raw: "Dataset", encoder: RowEncoder, stops: bool, processes: int, folder: Path) -> "Dataset":
    """Encode all rows; with `stops`, those up to the first bad one."""
    from datasets import Features

    for leftover in folder.glob("tmp*"):  # left by a killed process
        leftover.unlink()
    with tempfile.TemporaryDirectory() as scratch, _children_end_with_us():
        encoder.stop_at = Path(scratch) / "stop" if stops else None
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


_ends_with_its_parent = False


@contextlib.contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Processes forked within the block end with this one, even if it is killed."""
    global _ends_with_its_parent
    _ends_with_its_parent = True
    try:
        yield
    finally:
        _ends_with_its_parent = False


def _after_fork() -> None:
    if _ends_with_its_parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if sys.platform == "linux":  # only Linux has this option
    os.register_at_fork(after_in_child=_after_fork)
