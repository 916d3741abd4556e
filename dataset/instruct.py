"""The conversations of a config, as data sets. Knows no command line and no model."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config.errors import UsageError
from config.schema import DatasetConfig, PretrainInstructConfig
from dataset.slimorca import locate
from dataset.source_files import Hub, SourceFiles, find_files, is_saved, other_splits, saved_split
from dataset.text.conversation import Conversation, Template, with_default_system
from dataset.text.counts import describe_counts
from dataset.text.curriculum import Curriculum
from dataset.text.forms import form_options, to_conversation
from dataset.text.hub import split_files
from dataset.text.loader import TextCorpus, TextDataset, overlap
from dataset.text.rows import BadRow, NothingToLearn, open_row_file, parse_row, refused, to_json
from dataset.text.splits import are_test_hashes, prompt_hash
from dataset.text.token_cache import Split, cache_dir, load_split
from dataset.text.tokenizer import Tokenizer, check_reversible

# Splits to measure: test_deeper has questions of the deep families with more hops.
MeasuredSplit = Literal[Split, "test_deeper"]
SAMPLE_BUILDER = "python -m dataset.build_sample_dataset"
_ROWS_TRIED = 1000


class Source:
    """A source of conversations: its settings, its files and their splits.

    Held-out rows are those of `validation_files` or `validation_split`, or of files with names such
    as test.jsonl; the bundled data has its builder's. All other rows are split by a hash with one
    seed for all sources, so that a row held out of one source is held out of all. `is_alone`: the
    run has no other source. Otherwise files held out by their names are left out, because another
    source could train on their rows. Without a test split, all held-out files are left out.

    Methods raise `UsageError` for missing files, malformed rows and a split without usable rows.
    """

    def __init__(self, config: DatasetConfig, *, is_alone: bool = True) -> None:
        self.config = config
        self._is_alone = is_alone

    @cached_property
    def files(self) -> SourceFiles:
        """The files of both splits. Downloads missing ones."""
        config, folder = self.config, Path(self.config.data_dir)
        hub = Hub(config.repo, config.revision, config.sha256) if config.repo is not None else None
        if config.source == "sample":
            validation = [_sample_file(folder, "test")] if config.test_ratio > 0 else []
            return SourceFiles([_sample_file(folder, "train")], validation)
        if config.source == "slimorca":
            return SourceFiles([locate(folder, hub)])
        if config.source == "hub" or (not config.files and is_saved(folder)):
            if config.shards or config.validation_files:
                raise UsageError(
                    f"{folder} is a folder of save_to_disk, whose files have no names of their own: choose its splits with "
                    "dataset.split and dataset.validation_split, and leave out shards and validation_files"
                )
            splits = config.split, config.validation_split
            train, validation = ([] if split is None else self._split_files(split) for split in splits)
            return SourceFiles(train, validation, other_splits(folder, splits))
        if config.split != "train" or config.validation_split:
            raise UsageError(
                f"dataset.split and dataset.validation_split are for a hub data set or a folder of save_to_disk, and "
                f"{str(folder)!r} is neither: name files with dataset.files and dataset.validation_files"
            )
        found = find_files(folder, config.files, hub, config.shards, config.seed, config.validation_files)
        if config.test_ratio > 0 and (self._is_alone or config.validation_files):
            return found
        return SourceFiles(found.train, left_out=[*found.validation, *found.left_out])

    def open_splits(self, tokenizer: Tokenizer, template: Template) -> tuple[TextDataset, TextDataset | None]:
        """Train and test split for a training run, with `subset_size` as in `token_cache.load_split`; test is
        None with `test_ratio=0`. Also raises `UsageError` for a tokenizer that loses text of the first
        1,000 training rows.
        """
        first_rows = islice(self.conversations("train"), _ROWS_TRIED)
        inexact = check_reversible(tokenizer, [turn.text for conversation in first_rows for turn in conversation])
        train = self._load("train", self.files, tokenizer, template)
        if inexact:
            train.counts["texts of the first 1,000 rows that the tokenizer gives back in another spelling"] = inexact
        return train, self._load("test", self.files, tokenizer, template) if self.config.test_ratio > 0 else None

    def open_split(self, split: MeasuredSplit, tokenizer: Tokenizer, template: Template) -> TextDataset:
        """A single split, with `subset_size` rows."""
        if split == "test_deeper":
            if self.config.source != "sample":
                raise UsageError(
                    f"only the bundled deep families have a split test_deeper, found dataset={self.config.source}: use test"
                )
            files = SourceFiles([], [_sample_file(Path(self.config.data_dir), split)])
            return self._load("test", files, tokenizer, template, alone=True)
        if split == "test" and self.config.test_ratio == 0:
            raise UsageError("there is no test split with dataset.test_ratio=0: set it above 0, or use the train split")
        return self._load(split, self.files, tokenizer, template, alone=True)

    def conversations(self, split: Split) -> Iterator[Conversation]:
        """The usable conversations of a split, in the order of the files, not tokenized. `subset_size`
        limits the train split. Malformed rows are left out if `on_bad_row` says so.
        """
        config, found = self.config, 0
        for file in map(open_row_file, self.files.of(split)):
            for number, data in file.rows():
                if split == "train" and found == config.subset_size:
                    return
                try:
                    if isinstance(data, BadRow):
                        raise data
                    conversation, _ = to_conversation(parse_row(to_json(data)), form_options(config))
                except NothingToLearn:  # counted where rows are tokenized
                    continue
                except BadRow as error:
                    if config.on_bad_row == "error":
                        raise refused(file, number, str(error)) from None
                    continue
                conversation = with_default_system(conversation, config.default_system_prompt)
                hashes = np.array([prompt_hash(conversation)], np.uint64)
                if self.files.validation or are_test_hashes(hashes, config.seed, config.test_ratio)[0] == (split == "test"):
                    found += 1
                    yield conversation

    def _load(
        self, split: Split, files: SourceFiles, tokenizer: Tokenizer, template: Template, *, alone: bool = False
    ) -> TextDataset:
        paths = files.of(split)
        dataset = load_split(self.config, paths, split, tokenizer, template, by_hash=not files.validation, alone=alone)
        if split == "train":
            dataset = replace(dataset, left_out=files.left_out)
        if len(dataset) == 0:
            remedy = "raise dataset.test_ratio, use more data, or train without evaluation (dataset.test_ratio=0)"
            if split == "train":
                remedy = "check the rows, raise dataset.seq_len, or use more data"
            names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
            raise UsageError(f"the {split} split of {names} is empty ({'; '.join(describe_counts(dataset.counts))}): {remedy}")
        return dataset

    def _split_files(self, split: str) -> list[Path]:
        config = self.config
        if config.source != "hub":
            return saved_split(Path(config.data_dir), split)
        if config.repo is None:
            raise UsageError("dataset=hub needs a data set of the hub: set dataset.repo=OWNER/NAME")
        return split_files(config.repo, config.config, split, config.revision, cache_dir(config))


def sources_of(config: PretrainInstructConfig) -> dict[str, Source]:
    """The sources of a run by their names."""
    sources = config.all_sources
    return {name: Source(source, is_alone=len(sources) == 1) for name, source in sources.items()}


@dataclass(frozen=True)
class RunData:
    """The data of a training run: training rows, any held-out test rows, and the order."""

    train: TextCorpus
    test: TextCorpus | None
    curriculum: Curriculum

    def report(self) -> dict[str, Any]:
        """Files and counts of each source's splits, and the splits' overlap, as JSON values."""
        splits = {"train": self.train, "test": self.test}
        sources = {
            name: {split: corpus.parts[name].report() for split, corpus in splits.items() if corpus is not None}
            for name in self.train.parts
        }
        return {"sources": sources, "overlap": overlap(self.train, self.test) if self.test is not None else None}


def open_run_data(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template) -> RunData:
    """The data of a training run. Raises `UsageError` like `Source.open_splits`, and for a stage without examples."""
    opened = {name: source.open_splits(tokenizer, template) for name, source in sources_of(config).items()}
    held_out = {name: test for name, (_, test) in opened.items() if test is not None}
    return RunData(
        TextCorpus({name: train for name, (train, _) in opened.items()}),
        TextCorpus(held_out) if held_out else None,
        Curriculum.of_stages(config.all_stages, {name: len(train) for name, (train, _) in opened.items()}, config.seed),
    )


def open_run_split(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template, split: MeasuredSplit) -> TextCorpus:
    """One split of every source of a run, for evaluation; see `Source.open_split`."""
    return TextCorpus({name: source.open_split(split, tokenizer, template) for name, source in sources_of(config).items()})


def _sample_file(folder: Path, split: MeasuredSplit) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"expected {split}.jsonl in {str(folder)!r}, found none; build the sample data first: "
        f"`{SAMPLE_BUILDER} {'--families deep ' if split == 'test_deeper' else ''}--output-dir {folder}`"
    )


def last_exchange(conversation: Conversation) -> tuple[Conversation, str] | None:
    """The history before the last assistant turn, and that turn's text; None for raw text."""
    last = max((i for i, turn in enumerate(conversation) if turn.role == "assistant"), default=None)
    return None if last is None else (conversation[:last], conversation[last].text)
