"""Which files a source of conversations has: those in its folder, else fetched there from the Hugging Face hub.

This file must not know what is in them.
"""

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from config.errors import UsageError
from dataset.text.hub import download


@dataclass(frozen=True)
class Hub:
    """Where missing files are fetched from. sha256: of files whose content is known ahead, by name."""

    repo: str
    revision: str = "main"
    sha256: Mapping[str, str] = field(default_factory=dict)

    def fetch(self, name: str, destination: Path) -> Path:
        """Download one file of the repository. Raises `UsageError`."""
        return download(
            self.repo,
            name,
            destination,
            revision=self.revision,
            repo_type="dataset",
            expected_sha256=self.sha256.get(name),
        )


def find_files(
    data_dir: str | Path, names: Sequence[str], hub: Hub | None = None, shards: int | None = None, seed: int = 0
) -> list[Path]:
    """The files that `names` name: paths or globs, relative to `data_dir` or absolute; none twice, a glob's in order of name.

    shards: so many of them, drawn by `seed`; drawn before anything is fetched. A name without a file is fetched from `hub`,
    to the same name in `data_dir`. Raises `UsageError` for a name without a file, and too few of them.
    """
    folder = Path(data_dir)
    found: dict[Path, str] = {}
    for name in names:
        is_glob = glob.has_magic(name) and not (folder / name).exists()
        matches = sorted(glob.glob(name, root_dir=folder, recursive=True)) if is_glob else [name]  # noqa: PTH207
        files = [folder / match for match in matches if not (is_glob and (folder / match).is_dir())]
        if not files:
            raise UsageError(f"dataset.files: expected files like {name!r} in {str(folder)!r}, found none; check dataset.data_dir")
        found.update((path, name) for path in files if path not in found)
    if not found:
        raise UsageError("dataset.files names no file: give at least one name or glob")
    paths = list(found)
    if shards is not None:
        if shards > len(paths):
            raise UsageError(
                f"dataset.shards is {shards}, and dataset.files names {len(paths)} file(s): lower the one or add to the other"
            )
        # Raw bits, as for the order of examples: NumPy keeps their stream over versions.
        bits = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64)).random_raw(len(paths))
        paths = [paths[index] for index in sorted(np.argsort(bits, kind="stable")[:shards])]
    for path in paths:
        if path.exists():
            continue
        if hub is None or PurePosixPath(found[path]).is_absolute():
            raise UsageError(f"expected a data file at {str(path)!r}, found none; check dataset.data_dir and dataset.files")
        hub.fetch(found[path], path)
    return paths
