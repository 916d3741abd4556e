"""The on-disk cache of a source's tokens: built once in bounded memory, then memory-mapped.

A cache folder appears whole or not at all. Its name is a hash of everything its content depends on.
This file must not know about epochs, batches or configuration files.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from config.errors import UsageError
from dataset.text.conversation import Conversation, Encoded, Template, encode_batch, with_default_system
from dataset.text.sources import (
    BadRow,
    Line,
    NothingToLearn,
    SourceFile,
    are_test_hashes,
    check_test_ratio,
    parse_row,
    prompt_hash,
    to_conversation,
)
from dataset.text.tokenizer import Tokenizer

FORMAT_VERSION = 1
Split = Literal["train", "test"]

_ROWS_AT_ONCE = 512
_NPY_FORMAT: Any = np.lib.format
_ARRAYS = (
    "ids", "supervised", "segment", "offsets", "turn_bytes", "truncated", "prompt_hash", "line", "position",
)  # fmt: skip


@dataclass(frozen=True)
class HashSplit:
    """Train and test rows of one file, told apart by `sources.is_test`."""

    seed: int
    test_ratio: float


@dataclass(frozen=True)
class TokenCache:
    """The arrays of one cache folder (memory-mapped, n rows, T ids in all) and its meta.json.

    ids [T] uint16 or int32; supervised [T] bool; segment [T] uint8 or uint16; offsets [n+1] int64;
    turn_bytes [n] int64; truncated [n] bool; prompt_hash [n] uint64; line [n] int64 (counted from 1);
    position [n] int64 (byte offset of the row in the uncompressed source).
    """

    folder: Path
    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return int(self.meta["rows"])


@dataclass(frozen=True)
class LoadedSplit:
    """The rows of one split: `rows` int64 [m] points into `cache`, in the order of the file."""

    cache: TokenCache
    rows: npt.NDArray[np.int64]
    source: Path
    default_system_prompt: str | None


def load_split(
    *,
    source: Path,
    split: Split,
    tokenizer: Tokenizer,
    template: Template,
    seq_len: int,
    subset_size: int | None,
    hash_split: HashSplit | None,
    default_system_prompt: str | None,
    long_rows: str,
    on_bad_row: str,
    cache_dir: Path,
    alone: bool = False,
) -> LoadedSplit:
    """Open the cache of `source`, building it first if it isn't there, and take one split of it.

    seq_len: input positions, so a row keeps at most seq_len + 1 ids. long_rows: "truncate" or "drop".
    on_bad_row: "error" stops at a malformed row with file and line, "skip" counts it.
    hash_split: None when the file is one split by itself. subset_size: None takes every row. Otherwise
    reading stops as soon as train has its first `subset_size` rows and test its first
    `min(subset_size, ceil(subset_size * r / (1 - r)))`, r the test ratio: the same proportion, and
    a large file isn't read to its end to fill a small test split. `alone`: only `split` is wanted, with
    `subset_size` rows of its own.
    Raises `UsageError`.
    """
    if long_rows not in ("truncate", "drop"):
        raise UsageError(f'dataset.long_rows: expected "truncate" or "drop", found {long_rows!r}')
    if on_bad_row not in ("error", "skip"):
        raise UsageError(f'dataset.on_bad_row: expected "error" or "skip", found {on_bad_row!r}')
    if seq_len < 1:
        raise UsageError(f"dataset.seq_len: expected at least 1, found {seq_len}")
    if subset_size is not None and subset_size < 1:
        raise UsageError(f"dataset.subset_size: expected at least 1 or null for all rows, found {subset_size}")
    if hash_split is not None:
        check_test_ratio(hash_split.test_ratio)
    wanted = wanted_rows(subset_size, hash_split, split if alone else None)
    key: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "source_sha256": file_sha256(source, cache_dir),
        "tokenizer_sha256": tokenizer.sha256,
        "template": template.to_dict(),
        "default_system_prompt": default_system_prompt or None,
        "seq_len": seq_len,
        "long_rows": long_rows,
        "on_bad_row": on_bad_row,
    }
    if subset_size is not None:
        key["subset_size"] = subset_size
        key["hash_split"] = [hash_split.seed, hash_split.test_ratio] if hash_split else None
        key["wanted"] = wanted
    builder = _Builder(SourceFile(source), tokenizer, template, key, wanted, hash_split)
    cache = _open_or_build(builder, cache_dir)
    rows = np.arange(len(cache), dtype=np.int64)
    if hash_split is not None:
        in_test = are_test_hashes(np.asarray(cache.arrays["prompt_hash"]), hash_split.seed, hash_split.test_ratio)
        rows = np.flatnonzero(in_test if split == "test" else ~in_test)
    return LoadedSplit(cache, rows, source, default_system_prompt or None)


def wanted_rows(subset_size: int | None, hash_split: HashSplit | None, alone: Split | None = None) -> dict[Split, float]:
    """How many rows of each split to keep; see `load_split`. A file that is one split counts as "train"."""
    test_ratio = hash_split.test_ratio if hash_split else 0.0
    if subset_size is None:
        return {"train": math.inf, "test": math.inf}
    if alone is not None and hash_split is not None:
        return {split: subset_size if split == alone else 0 for split in ("train", "test")}
    return {
        "train": subset_size,
        "test": min(subset_size, math.ceil(subset_size * test_ratio / (1.0 - test_ratio))),
    }


def file_sha256(path: Path, memo_dir: Path) -> str:
    """SHA-256 of a file, remembered under `memo_dir` for its path, size and modification time."""
    if not path.is_file():
        raise UsageError(f"expected a data file at {str(path)!r}, found none; check dataset.data_dir")
    status = path.stat()
    resolved = str(path.resolve())
    stamp = [resolved, status.st_size, status.st_mtime_ns]
    memo = memo_dir / f"source-{hashlib.sha256(resolved.encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # A file changed again within the clock's grain keeps its stamp, so a fresh one isn't remembered.
    if time.time_ns() - status.st_mtime_ns > 2_000_000_000:
        _make_folder(memo_dir)
        with tempfile.NamedTemporaryFile("w", dir=memo_dir, prefix=".source-", delete=False) as temporary:
            json.dump({"stamp": stamp, "sha256": digest}, temporary)
        os.replace(temporary.name, memo)
    return digest


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise UsageError(f"the token cache needs a folder to write to, {str(folder)!r} is none: make it writable, or copy the data")


class _ArrayFile:
    """A one-dimensional .npy file that grows; its header is rewritten with the length on close."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self.handle: BinaryIO = path.open("wb+")
        self._write_header()
        self._body = self.handle.tell()

    def _write_header(self) -> None:
        # NumPy pads the header for a growing first axis, so its size doesn't depend on the length.
        _NPY_FORMAT.write_array_header_1_0(
            self.handle,
            {
                "descr": _NPY_FORMAT.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.length,),
            },
        )

    def append(self, values: npt.NDArray[Any]) -> bytes:
        data = values.astype(self.dtype).tobytes()
        self.handle.write(data)
        self.length += len(values)
        return data

    def close(self) -> None:
        self.handle.seek(0)
        self._write_header()
        if self.handle.tell() != self._body:
            raise RuntimeError("the .npy header changed its size")
        _sync(self.handle)
        self.handle.close()


def _sync(handle: Any) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Builder:
    source: SourceFile
    tokenizer: Tokenizer
    template: Template
    key: dict[str, Any]
    wanted: dict[Split, float]
    hash_split: HashSplit | None

    def build(self, folder: Path) -> None:
        """Write all arrays and meta.json into an empty folder, a few hundred rows in memory at a time."""
        wide = self.tokenizer.vocab_size > 1 << 16
        # A prompt segment and its answer take three ids or more, so there are fewer segments than this.
        segments_fit_a_byte = self.key["seq_len"] // 2 < 1 << 8
        types: dict[str, npt.DTypeLike] = {
            "ids": np.int32 if wide else np.uint16,
            "supervised": np.bool_,
            "segment": np.uint8 if segments_fit_a_byte else np.uint16,
            "offsets": np.int64,
            "turn_bytes": np.int64,
            "truncated": np.bool_,
            "prompt_hash": np.uint64,
            "line": np.int64,
            "position": np.int64,
        }
        kept: Counter[Split] = Counter()
        counts = {"read": 0, "beyond_subset": 0}
        dropped: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        content = hashlib.sha256()
        end = 0
        with contextlib.ExitStack() as stack:
            files = {name: _ArrayFile(folder / f"{name}.npy", dtype) for name, dtype in types.items()}
            for file in files.values():
                stack.callback(file.handle.close)
            files["offsets"].append(np.zeros(1))
            outcomes = self._outcomes()
            stack.callback(outcomes.close)
            rows: list[_Row] = []
            for line, outcome in outcomes:
                if all(kept[split] >= wanted for split, wanted in self.wanted.items()):
                    break
                counts["read"] += 1
                if isinstance(outcome, BadRow):
                    if self.key["on_bad_row"] == "error":
                        raise UsageError(
                            f"{self.source.path}:{line.number}: {outcome}; "
                            "correct the row, or count such rows instead with dataset.on_bad_row=skip"
                        )
                    bad[outcome.reason] += 1
                elif isinstance(outcome, NothingToLearn):
                    dropped[outcome.reason] += 1
                elif kept[outcome.split] >= self.wanted[outcome.split]:
                    counts["beyond_subset"] += 1
                else:
                    kept[outcome.split] += 1
                    rows.append(outcome)
                    end += len(outcome.encoded.ids)
                    if len(rows) == _ROWS_AT_ONCE:
                        _append(files, rows, content)
                        rows = []
            if rows:
                _append(files, rows, content)
            for file in files.values():
                file.close()
        meta = {
            "key": self.key,
            "rows": sum(kept.values()),
            "ids": end,
            "content_sha256": content.hexdigest(),
            "counts": {**counts, "kept": sum(kept.values()), "dropped": dropped, "bad": bad},
        }
        with (folder / "meta.json").open("w", encoding="utf-8") as handle:
            json.dump(meta, handle, indent=1, sort_keys=True)
            _sync(handle)
        _sync_folder(folder)

    def _outcomes(self) -> Generator[tuple[Line, "BadRow | NothingToLearn | _Row"], None, None]:
        """What became of each line, in the order of the file; a batch of lines is encoded at once."""
        lines = self.source.lines()
        with tqdm(total=self.source.size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            while batch := list(islice(lines, _ROWS_AT_ONCE)):
                converted = [(line, self._convert(line)) for line, _ in batch]
                conversations = [outcome for _, outcome in converted if isinstance(outcome, tuple)]
                max_ids = self.key["seq_len"] + 1
                encoded = iter(encode_batch(conversations, self.tokenizer, self.template, max_ids))
                for line, outcome in converted:
                    yield line, self._row(line, outcome, next(encoded)) if isinstance(outcome, tuple) else outcome
                bar.update(batch[-1][1] - bar.n)

    def _convert(self, line: Line) -> Conversation | BadRow | NothingToLearn:
        try:
            conversation = to_conversation(parse_row(line.data))
        except (BadRow, NothingToLearn) as outcome:
            return outcome
        return with_default_system(conversation, self.key["default_system_prompt"])

    def _row(self, line: Line, conversation: Conversation, encoded: Encoded) -> "_Row | NothingToLearn":
        is_cut = encoded.full_length > len(encoded.ids)
        if is_cut and self.key["long_rows"] == "drop":
            return NothingToLearn("too_long")
        if not encoded.supervised.any():
            return NothingToLearn("answer_beyond_seq_len")
        hashed = prompt_hash(conversation)
        in_test = False
        if self.hash_split is not None:
            one = np.array([hashed], np.uint64)
            in_test = bool(are_test_hashes(one, self.hash_split.seed, self.hash_split.test_ratio)[0])
        return _Row(line, encoded, "test" if in_test else "train", hashed, is_cut)


@dataclass(frozen=True)
class _Row:
    line: Line
    encoded: Encoded
    split: Split
    hashed: int
    is_cut: bool


def _append(files: dict[str, _ArrayFile], rows: list[_Row], content: Any) -> None:
    lengths = np.array([len(row.encoded.ids) for row in rows], np.int64)
    columns = {
        "ids": np.concatenate([row.encoded.ids for row in rows]),
        "supervised": np.concatenate([row.encoded.supervised for row in rows]),
        "segment": np.concatenate([row.encoded.segment for row in rows]),
        "offsets": files["ids"].length + np.cumsum(lengths),
        "turn_bytes": np.array([row.encoded.turn_bytes for row in rows], np.int64),
        "truncated": np.array([row.is_cut for row in rows], np.bool_),
        "prompt_hash": np.array([row.hashed for row in rows], np.uint64),
        "line": np.array([row.line.number for row in rows], np.int64),
        "position": np.array([row.line.offset for row in rows], np.int64),
    }
    for name, values in columns.items():
        content.update(files[name].append(values))


def _open_or_build(builder: _Builder, cache_dir: Path) -> TokenCache:
    name = hashlib.sha256(json.dumps(builder.key, sort_keys=True).encode("utf-8")).hexdigest()[:24]
    folder = cache_dir / name
    if not folder.is_dir():
        _make_folder(cache_dir)
        with _only_builder(cache_dir / f"{name}.lock") as alone:
            if alone:  # so what lies here was left by a builder that was killed
                for leftover in cache_dir.glob(f".{name}-*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            if not folder.is_dir():
                _build_atomically(builder, folder)
    return _open(folder)


def _build_atomically(builder: _Builder, folder: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        builder.build(temporary)
        try:
            os.rename(temporary, folder)
        except OSError:
            # On a file system without locks another builder may have been first; its folder is as good.
            if not folder.is_dir():
                raise
        _sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _only_builder(lock: Path) -> Iterator[bool]:
    """Let one process build a folder while the others (ranks of the same run, say) wait for it.

    False where the file system has no locks: building twice is slower, not wrong.
    """
    with lock.open("w") as handle:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone


def _open(folder: Path) -> TokenCache:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        # Plain arrays over the mapping: every slice of a np.memmap would pay for its subclass.
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in _ARRAYS}
        if len(arrays["ids"]) != meta["ids"] or len(arrays["offsets"]) != meta["rows"] + 1:
            raise ValueError("the arrays don't have the lengths that meta.json states")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the token cache {str(folder)!r} is damaged ({error}): delete that folder, then start again") from error
    return TokenCache(folder, arrays, meta)
