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
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from config.errors import UsageError
from dataset.text.conversation import Template
from dataset.text.encoder_pool import encode_in_order, processes_to_use
from dataset.text.files import BadRow, DataFile, RawRow, open_data_file
from dataset.text.row_encoder import PER_ID, EncodedRows, LongRows, Recipe, column_types
from dataset.text.sources import are_test_hashes
from dataset.text.tokenizer import Tokenizer

FORMAT_VERSION = 2
Split = Literal["train", "test"]

# What is encoded at once: so many rows, or fewer long ones.
_ROWS_AT_ONCE = 512
_BYTES_AT_ONCE = 1 << 20
_NPY_FORMAT: Any = np.lib.format


@dataclass(frozen=True)
class HashSplit:
    """Train and test rows, told apart by `sources.are_test_hashes`."""

    seed: int
    test_ratio: float


@dataclass(frozen=True)
class TokenCache:
    """The arrays of one cache folder (memory-mapped, n rows, T ids in all) and its meta.json.

    offsets int64 [n+1] says where in [T] a row begins; all others are those of `row_encoder.column_types`, without "length".
    """

    folder: Path
    arrays: dict[str, npt.NDArray[Any]]
    meta: dict[str, Any]

    def __len__(self) -> int:
        return int(self.meta["rows"])

    def file_of(self, row: int) -> int:
        """Which of the source's files a row is from."""
        return int(np.searchsorted(self.meta["file_ends"], row, side="right"))


@dataclass(frozen=True)
class LoadedSplit:
    """The rows of one split: `rows` int64 [m] points into `cache`, in the order of the files."""

    cache: TokenCache
    rows: npt.NDArray[np.int64]
    files: tuple[Path, ...]
    default_system_prompt: str | None


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
    alone: bool = False,
    processes: int | None = None,
) -> LoadedSplit:
    """Open the cache of `source` (a file, or several read one after the other), building it if it isn't there, and take one split.

    seq_len: input positions, so a row keeps at most seq_len + 1 ids. long_rows: what becomes of a longer row. "keep_prompt_end":
    it loses the oldest of its prompt, then the end of its answer (`conversation.encode_batch`); "truncate": its end; "drop": all.
    A row is left out if nothing supervised is left of it. on_bad_row: "error" stops at a malformed row and says where it is, "skip"
    counts it. processes: how many tokenize; null: one for each CPU. The cache is the same, byte for byte.
    hash_split: None when the files are one split by themselves. subset_size: None takes every row. Otherwise
    reading stops as soon as train has its first `subset_size` rows and test its first
    `min(subset_size, ceil(subset_size * r / (1 - r)))`, r the test ratio: the same proportion, and
    a large file isn't read to its end to fill a small test split. `alone`: only `split` is wanted, with
    `subset_size` rows of its own.
    Raises `UsageError`.
    """
    wanted = wanted_rows(subset_size, hash_split, split if alone else None)
    files = [open_data_file(path) for path in ([source] if isinstance(source, Path) else source)]
    # Taken before the content is hashed: a cache must hold what its key was made of, however long another builder is waited for.
    stamps = [_stamp(file.path) for file in files]
    key: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "files": [[file.kind, file_sha256(file.path, cache_dir)] for file in files],
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
    recipe = Recipe(tokenizer.model_bytes, template, default_system_prompt or None, seq_len, long_rows)
    types = column_types(tokenizer.vocab_size, seq_len)
    builder = _Builder(files, stamps, recipe, types, key, wanted, hash_split, processes_to_use(processes))
    cache = _open_or_build(builder, cache_dir)
    rows = np.arange(len(cache), dtype=np.int64)
    if hash_split is not None:
        in_test = are_test_hashes(cache.arrays["prompt_hash"], hash_split.seed, hash_split.test_ratio)
        rows = np.flatnonzero(in_test if split == "test" else ~in_test)
    return LoadedSplit(cache, rows, tuple(file.path for file in files), default_system_prompt or None)


def wanted_rows(subset_size: int | None, hash_split: HashSplit | None, alone: Split | None = None) -> dict[Split, float]:
    """How many rows of each split to keep; see `load_split`. Files that are one split count as "train"."""
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
    """SHA-256 of a file, remembered under `memo_dir` for its path, size and times of change."""
    stamp = _stamp(path)
    memo = memo_dir / f"source-{hashlib.sha256(str(stamp[0]).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with path.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    # A file changed again within the clock's grain keeps its stamp, so a fresh one isn't remembered.
    if time.time_ns() - int(stamp[2]) > 2_000_000_000:
        _make_folder(memo_dir)
        temporary = _unused_name(memo)
        temporary.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        os.replace(temporary, memo)
    return digest


def _stamp(path: Path) -> list[str | int]:
    """What a file is known by. The time of its inode's change can't be set back, as that of its content can."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _unused_name(path: Path) -> Path:
    """A hidden name beside `path`. `tempfile` would keep what is made there from other users of a shared data folder."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise UsageError(f"the token cache needs a folder to write to, {str(folder)!r} is none: make it writable, or copy the data")


class _ArrayFile:
    """A one-dimensional .npy file that grows; its header is rewritten with the length at the end."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._digest = hashlib.sha256()
        self._handle: BinaryIO = path.open("wb+")
        self._write_header()
        self._body = self._handle.tell()

    @property
    def sha256(self) -> str:
        """Of the values so far."""
        return self._digest.hexdigest()

    def append(self, values: npt.NDArray[Any]) -> None:
        data = values.astype(self.dtype).tobytes()
        self._handle.write(data)
        self._digest.update(data)
        self.length += len(values)

    def _write_header(self) -> None:
        # NumPy pads the header for a growing first axis, so its size doesn't depend on the length.
        _NPY_FORMAT.write_array_header_1_0(
            self._handle,
            {
                "descr": _NPY_FORMAT.dtype_to_descr(self.dtype),
                "fortran_order": False,
                "shape": (self.length,),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._handle.seek(0)
            self._write_header()
            if self._handle.tell() != self._body:
                raise RuntimeError("the .npy header changed its size")
            _sync(self._handle)
        self._handle.close()


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
class _Part:
    """Where some rows come from: the number of their file, and how many bytes of all files were read up to their end."""

    file: int
    read: int


@dataclass(frozen=True)
class _Builder:
    files: Sequence[DataFile]
    stamps: Sequence[list[str | int]]
    recipe: Recipe
    types: dict[str, npt.DTypeLike]
    key: dict[str, Any]
    wanted: dict[Split, float]
    hash_split: HashSplit | None
    processes: int

    def build(self, folder: Path) -> None:
        """Write all arrays and meta.json into an empty folder, a few thousand rows in memory at a time."""
        kept: Counter[Split] = Counter()
        counts: Counter[str] = Counter(read=0, beyond_subset=0)
        dropped: Counter[str] = Counter()
        bad: Counter[str] = Counter()
        file_ends = [0] * len(self.files)
        with contextlib.ExitStack() as stack:
            types = {**self.types, "offsets": np.int64}
            del types["length"]
            arrays = {name: stack.enter_context(_ArrayFile(folder / f"{name}.npy", dtype)) for name, dtype in types.items()}
            arrays["offsets"].append(np.zeros(1))
            total = sum(file.size for file in self.files)
            bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None))
            encoded_parts = stack.enter_context(contextlib.closing(encode_in_order(self._parts(), self.recipe, self.processes)))
            for encoded, rows, part in encoded_parts:
                splits = iter(self._splits(encoded))
                taken: list[bool] = []
                for row, outcome in zip(rows, encoded.outcomes, strict=True):
                    if self._is_full(kept):
                        break
                    counts["read"] += 1
                    if isinstance(outcome, BadRow):
                        if self.key["on_bad_row"] == "error":
                            raise UsageError(
                                f"{self.files[part.file].where(row.number)}: {outcome}; "
                                "correct the row, or count such rows instead with dataset.on_bad_row=skip"
                            )
                        bad[outcome.reason] += 1
                    elif outcome is not None:
                        dropped[outcome.reason] += 1
                    else:
                        split = next(splits)
                        taken.append(kept[split] < self.wanted[split])
                        counts["beyond_subset"] += not taken[-1]
                        kept[split] += taken[-1]
                _append(arrays, encoded.columns, taken)
                file_ends[part.file :] = [sum(kept.values())] * (len(self.files) - part.file)
                bar.update(part.read - bar.n)
                if self._is_full(kept):
                    break
        for file, stamp in zip(self.files, self.stamps, strict=True):
            if _stamp(file.path) != stamp:
                raise UsageError(f"{file.path} was changed while it was read: start again when it is complete")
        meta = {
            "key": self.key,
            "rows": sum(kept.values()),
            "ids": arrays["ids"].length,
            "file_ends": file_ends,
            "content_sha256": hashlib.sha256("".join(arrays[name].sha256 for name in sorted(arrays)).encode()).hexdigest(),
            "counts": {**counts, "kept": sum(kept.values()), "dropped": dropped, "bad": bad},
        }
        with (folder / "meta.json").open("w", encoding="utf-8") as handle:
            json.dump(meta, handle, indent=1, sort_keys=True)
            _sync(handle)
        _sync_folder(folder)

    def _is_full(self, kept: Counter[Split]) -> bool:
        return all(kept[split] >= wanted for split, wanted in self.wanted.items())

    def _parts(self) -> Iterator[tuple[list[RawRow], _Part]]:
        """The rows of all files, some at a time; none are of two files."""
        before = 0
        for number, file in enumerate(self.files):
            rows: list[RawRow] = []
            size = read = 0
            for row, read in file.rows():
                rows.append(row)
                size += _size(row)
                if len(rows) == _ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
                    yield rows, _Part(number, before + read)
                    rows, size = [], 0
            if rows:
                yield rows, _Part(number, before + read)
            before += file.size

    def _splits(self, encoded: EncodedRows) -> list[Split]:
        hashes = encoded.columns["prompt_hash"]
        if self.hash_split is None:
            return ["train"] * len(hashes)
        in_test = are_test_hashes(hashes, self.hash_split.seed, self.hash_split.test_ratio)
        return ["test" if is_test else "train" for is_test in in_test.tolist()]


def _size(row: RawRow) -> int:
    if isinstance(row.data, bytes):
        return len(row.data)
    return sum(len(value) for value in row.data.values() if isinstance(value, str)) if isinstance(row.data, dict) else 0


def _append(arrays: dict[str, _ArrayFile], columns: dict[str, npt.NDArray[Any]], taken: list[bool]) -> None:
    """Append the rows that are taken; those after the last entry of `taken` aren't."""
    lengths = columns["length"].astype(np.int64)
    mask = np.zeros(len(lengths), np.bool_)
    mask[: len(taken)] = taken
    if not mask.all():
        id_mask = np.repeat(mask, lengths)
        columns = {name: values[id_mask if name in PER_ID else mask] for name, values in columns.items()}
        lengths = lengths[mask]
    arrays["offsets"].append(arrays["ids"].length + np.cumsum(lengths))
    for name, values in columns.items():
        if name != "length":
            arrays[name].append(values)


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
    temporary = _unused_name(folder)
    try:
        temporary.mkdir()
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
    with lock.open("w", encoding="utf-8") as handle:
        alone = False
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
            alone = True
        yield alone


def _open(folder: Path) -> TokenCache:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        names = [*(name for name in column_types(1, 1) if name != "length"), "offsets"]
        # Plain arrays over the mapping: every slice of a np.memmap would pay for its subclass.
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in names}
        if len(arrays["ids"]) != meta["ids"] or len(arrays["offsets"]) != meta["rows"] + 1:
            raise ValueError("the arrays don't have the lengths that meta.json states")
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"the token cache {str(folder)!r} is damaged ({error}): delete that folder, then start again") from error
    return TokenCache(folder, arrays, meta)
