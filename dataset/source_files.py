"""The files of a source of conversations: those in its folder, else downloaded from the Hugging
Face hub.

This file doesn't know their content.
"""

import glob
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from config.errors import UsageError
from dataset.text.hub import download
from dataset.text.rows import FORMATS, format_of

# Files that `datasets` and the builders here write beside the rows.
_NOT_ROWS = ("dataset.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_NAMES_OF_VALIDATION = re.compile(r"(?<![a-z])(validation|valid|val|dev)(?![a-z])")
_NAMES_OF_TEST = re.compile(r"(?<![a-z])(test|testing|eval|evaluation|held-?_?out)(?![a-z])")
_NAMES_OF_TRAINING = re.compile(r"(?<![a-z])train(ing)?(?![a-z])")


@dataclass(frozen=True)
class Hub:
    """The repository to download missing files from. sha256: expected hashes, by file name."""

    repo: str
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)

    def fetch(self, name: str, destination: Path) -> Path:
        """Download one file of the repository. Raises `UsageError`."""
        return download(
            self.repo, name, destination, revision=self.revision, repo_type="dataset", expected_sha256=self.sha256.get(name)
        )


@dataclass(frozen=True)
class SourceFiles:
    """Files for training, files for testing, and files left out because of their names, or splits that
    aren't asked for.

    Without test files, `train` has the rows of both splits.
    """

    train: list[Path]
    validation: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)

    def of(self, split: Literal["train", "test"]) -> list[Path]:
        """The files with the rows of a split."""
        return self.validation if split == "test" and self.validation else self.train


def find_files(
    data_dir: str | Path,
    names: Sequence[str],
    hub: Hub | None = None,
    shards: int | None = None,
    seed: int = 0,
    validation_names: Sequence[str] = (),
) -> SourceFiles:
    """The files of `names`: paths or globs, relative to `data_dir` or absolute; each once, those of a
    glob sorted by name. Without names: the files in `data_dir` with a readable format.

    A folder written by `datasets` stands for its files. A file that a glob or the folder gives isn't
    used for training if its name, or else that of a folder below `data_dir`, says validation or
    test; the former, else the latter, are the test files. `validation_names` name them instead,
    which are used for training only if `names` names them exactly. shards: number of training files,
    drawn by `seed` before any download. A missing file is downloaded from `hub`, to the same name in
    `data_dir`. Raises `UsageError` for a missing file, and for too few files.
    """
    folder = Path(data_dir).expanduser()
    named = _named(folder, validation_names, "dataset.validation_files")
    own = {path.resolve() for path in named}
    found = _named(folder, names or ["*"], "dataset.files")
    train: list[Path] = []
    of_validation: list[Path] = []
    of_test: list[Path] = []
    for path, (_, by_glob) in found.items():
        if by_glob and path.resolve() in own:
            continue
        parts = path.relative_to(folder).parts if by_glob and path.is_relative_to(folder) else (path.name,) if by_glob else ()
        groups = ((_NAMES_OF_TRAINING, train), (_NAMES_OF_VALIDATION, of_validation), (_NAMES_OF_TEST, of_test))
        said = (group for part in reversed(parts) for names_of, group in groups if names_of.search(part.lower()))
        next(said, train).append(path)
    if not train:
        raise UsageError(
            f"dataset.files: all files in {str(folder)!r} are held out, by their names or by dataset.validation_files "
            f"({', '.join(path.name for path in found)}): name those to train on exactly"
        )
    if shards is not None:
        if shards > len(train):
            raise UsageError(
                f"dataset.shards is {shards}, and dataset.files names {len(train)} file(s): lower the one or add to the other"
            )
        # Raw bits, as for the order of examples: NumPy keeps their stream across versions.
        bits = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64)).random_raw(len(train))
        train = [train[index] for index in sorted(np.argsort(bits, kind="stable")[:shards])]
    validation = list(named) or of_validation or of_test
    left_out = [path for path in (*of_validation, *of_test) if path not in validation]
    for path in (*train, *named):
        if path.exists():
            continue
        name, _ = found.get(path) or named[path]
        if hub is None or PurePosixPath(name).is_absolute():
            setting = "dataset.files" if path in found else "dataset.validation_files"
            raise UsageError(f"expected a data file at {str(path)!r}, found none; check dataset.data_dir and {setting}")
        hub.fetch(name, path)
    left_out += [split for path in (*train, *validation) for split in other_splits(path, ["train"])]
    return SourceFiles(_expanded(train), _expanded(validation), left_out)


def _named(folder: Path, names: Sequence[str], setting: str) -> dict[Path, tuple[str, bool]]:
    """The files of `names`, each with the first name that matches, and whether only globs do."""
    found: dict[Path, tuple[str, bool]] = {}
    for name in names:
        is_glob = glob.has_magic(name) and not (folder / name).exists()
        matches = sorted(glob.glob(name, root_dir=folder, recursive=True)) if is_glob else [str(Path(name).expanduser())]  # noqa: PTH207
        files = [folder / match for match in matches if not (is_glob and not _is_data(folder / match))]
        if not files:
            what = f"files that end in {', '.join(FORMATS)}" if name == "*" else f"files like {name!r}"
            raise UsageError(f"{setting}: expected {what} in {str(folder)!r}, found none; check dataset.data_dir and {setting}")
        for path in files:
            first, by_glob = found.get(path, (name, True))
            found[path] = (first, by_glob and is_glob)
    return found


def saved_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder written by `datasets`, of one split if several. Raises `UsageError`."""
    splits = _splits_of(folder)
    if splits is not None:
        if split not in splits:
            raise UsageError(f"{folder} has no split {split!r}: choose dataset.split of {', '.join(splits)}")
        folder = folder / split
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder}: expected a folder of save_to_disk, found none ({error}); name files instead") from error


def other_splits(folder: Path, used: Collection[str | None]) -> list[Path]:
    """The folders of the splits that aren't used of a dictionary of data sets that `datasets` has saved."""
    return [folder / split for split in _splits_of(folder) or [] if split not in used]


def _splits_of(folder: Path) -> list[str] | None:
    """The names of a saved dictionary's splits; None if `folder` has none."""
    described = folder / "dataset_dict.json"
    if not described.is_file():
        return None
    splits: list[str] = json.loads(described.read_text(encoding="utf-8"))["splits"]
    return splits


def is_saved(folder: Path) -> bool:
    """Whether `datasets` has saved a data set, or a dictionary of them, to a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _is_data(path: Path) -> bool:
    if path.is_dir():
        return is_saved(path)
    return format_of(path) is not None and path.name not in _NOT_ROWS and not path.name.startswith(".")


def _expanded(paths: Sequence[Path]) -> list[Path]:
    return [file for path in paths for file in (saved_split(path, "train") if path.is_dir() and is_saved(path) else [path])]
