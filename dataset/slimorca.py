"""Instruction data as a folder of files: SlimOrca (local or downloaded) and the bundled sample data.

`python -m dataset.slimorca --data-dir data/slimorca` fetches the file ahead of a run.
This file must not know about training; it hands out data sets.
"""

import argparse
from pathlib import Path
from typing import Literal, NotRequired, TypedDict, Unpack

from config.errors import UsageError, one_clear_message
from dataset.text.conversation import Template
from dataset.text.hub import download
from dataset.text.loader import TextDataset
from dataset.text.sources import check_test_ratio
from dataset.text.token_cache import HashSplit, Split, load_split
from dataset.text.tokenizer import Tokenizer

HUB_REPO = "Open-Orca/SlimOrca"
HUB_FILE = "oo-labeled_correct.gpt4.sharegpt.jsonl"
LOCAL_FILES = ("SlimOrca.jsonl", "SlimOrca.jsonl.zst", HUB_FILE)
SAMPLE_BUILDER = "python -m dataset.build_sample_dataset"
_CACHE_FOLDER = ".token_cache"


def locate(
    data_dir: str | Path,
    *,
    fetch: bool = True,
    repo: str = HUB_REPO,
    filename: str = HUB_FILE,
    revision: str = "main",
) -> Path:
    """The SlimOrca file in `data_dir`; with `fetch`, downloaded (about 1 GB) if it isn't there.

    Raises `UsageError` when there is none and it can't be, or may not be, downloaded.
    """
    folder = Path(data_dir)
    for name in LOCAL_FILES:
        if (folder / name).is_file():
            return folder / name
    if not fetch:
        raise UsageError(f"expected one of {', '.join(LOCAL_FILES)} in {str(folder)!r}, found none")
    destination = folder / LOCAL_FILES[0]
    download(repo, filename, destination, revision=revision, repo_type="dataset")
    return destination


class TextSettings(TypedDict):
    """What both functions below read data with: the fields of `config.schema.DatasetConfig` of the same names."""

    source: Literal["slimorca", "sample"]
    data_dir: str | Path
    tokenizer: Tokenizer
    template: Template
    seq_len: int
    subset_size: int | None
    test_ratio: float
    seed: int
    default_system_prompt: str | None
    long_rows: str
    on_bad_row: str
    cache_dir: NotRequired[str | Path | None]
    """Where the token cache goes; a folder inside `data_dir` by default."""


def open_text_data(**settings: Unpack[TextSettings]) -> tuple[TextDataset, TextDataset | None]:
    """Train and test split of a data folder for a training run; test is None with `test_ratio=0`.

    "slimorca": one file, downloaded if it isn't in `data_dir`, split by hash. "sample": train.jsonl and test.jsonl (or .jsonl.zst),
    a split made by their builder; `subset_size` takes the first rows of each, and a `test_ratio` above 0 only says that there is a
    test split. Under a hash split, `subset_size` counts training rows, and test has its proportional share: see
    `token_cache.load_split`. Raises `UsageError` for missing files, malformed rows, and a split without a usable row.
    """
    train = open_text_split("train", alone=False, **settings)
    return train, open_text_split("test", alone=False, **settings) if settings["test_ratio"] > 0 else None


def open_text_split(split: Split, *, alone: bool = True, **settings: Unpack[TextSettings]) -> TextDataset:
    """One split of a data folder; `alone`, it has `subset_size` rows of its own. Raises `UsageError` as `open_text_data` does."""
    check_test_ratio(settings["test_ratio"])
    if split == "test" and settings["test_ratio"] == 0:
        raise UsageError("there is no test split with dataset.test_ratio=0: set it above 0, or use the train split")
    folder = Path(settings["data_dir"])
    if settings["source"] == "sample":
        path, hash_split = _sample_file(folder, split), None
    elif settings["source"] == "slimorca":
        path, hash_split = locate(folder), HashSplit(settings["seed"], settings["test_ratio"])
    else:
        raise UsageError(f'dataset.source: expected "slimorca" or "sample", found {settings["source"]!r}')
    loaded = load_split(
        source=path,
        split=split,
        alone=alone,
        tokenizer=settings["tokenizer"],
        template=settings["template"],
        seq_len=settings["seq_len"],
        subset_size=settings["subset_size"],
        hash_split=hash_split,
        default_system_prompt=settings["default_system_prompt"],
        long_rows=settings["long_rows"],
        on_bad_row=settings["on_bad_row"],
        cache_dir=Path(settings.get("cache_dir") or folder / _CACHE_FOLDER),
    )
    dataset = TextDataset(loaded)
    if len(dataset) == 0:
        remedy = "raise dataset.test_ratio, use more data, or train without evaluation (dataset.test_ratio=0)"
        if split == "train":
            remedy = "check the rows, raise dataset.seq_len, or use more data"
        raise UsageError(f"the {split} split of {str(path)!r} is empty (rows: {dataset.counts}); {remedy}")
    return dataset


def _sample_file(folder: Path, split: Split) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"expected {split}.jsonl in {str(folder)!r}, found none; build the sample data first: "
        f"`{SAMPLE_BUILDER} --output-dir {folder}`"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command: make sure that the SlimOrca file is in a folder, and say where."""
    parser = argparse.ArgumentParser(description="Download SlimOrca unless the folder already has it.")
    parser.add_argument("--data-dir", default="data/slimorca", help="folder that holds, or will hold, the file")
    parser.add_argument("--repo", default=HUB_REPO, help="dataset repository on the Hugging Face hub")
    parser.add_argument("--filename", default=HUB_FILE, help="file inside the repository")
    parser.add_argument("--revision", default="main", help="branch, tag or commit")
    options = parser.parse_args(arguments)
    with one_clear_message():
        path = locate(options.data_dir, repo=options.repo, filename=options.filename, revision=options.revision)
        print(f"SlimOrca: {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main()
