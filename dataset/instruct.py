"""The conversations a config asks for, as data sets. Knows no command line and no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config.errors import UsageError
from config.schema import DatasetConfig, PretrainInstructConfig
from dataset.slimorca import locate
from dataset.source_files import Hub, SourceFiles, find_files, is_saved, saved_split
from dataset.text.conversation import Conversation, Template, with_default_system
from dataset.text.counts import describe_counts
from dataset.text.curriculum import Curriculum
from dataset.text.forms import form_options, to_conversation
from dataset.text.hub import split_files
from dataset.text.loader import TextCorpus, TextDataset, overlap
from dataset.text.rows import BadRow, NothingToLearn, open_row_file, parse_row, to_json
from dataset.text.splits import are_test_hashes, prompt_hash
from dataset.text.token_cache import HashSplit, Split, default_cache_dir, load_split
from dataset.text.tokenizer import Tokenizer, check_reversible

# What a trained model can be measured on: test_deeper has questions of the bundled deep families with more hops than training.
MeasuredSplit = Literal[Split, "test_deeper"]
SAMPLE_BUILDER = "python -m dataset.build_sample_dataset"
_ROWS_TRIED = 1000


def open_instruct_data(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, in_stages: bool = False
) -> tuple[TextDataset, TextDataset | None]:
    """Train and test split of a source for a training run; test is None with `test_ratio=0`.

    Rows to measure on are those of `validation_files` or `validation_split`, or of files beside the others whose names say that
    they are held out (not in_stages, where all sources are split alike); "sample" has those of its builder. `subset_size` then
    takes the first rows of each. All others are split by hash, where `subset_size` counts training rows, and test has its
    proportional share: see `token_cache.load_split`. Raises `UsageError` for missing files, malformed rows, a split without a
    usable row, and a tokenizer that loses text of the first 1,000 training rows.
    """
    files = _files(config, in_stages)
    first_rows = islice(_conversations(config, "train", files), _ROWS_TRIED)
    inexact = check_reversible(tokenizer, [turn.text for conversation in first_rows for turn in conversation])
    train = _open(config, tokenizer, template, "train", files)
    train.left_out = tuple(files.left_out)
    if inexact:
        train.counts["texts of the first 1,000 rows that the tokenizer gives back in another spelling"] = inexact
    return train, _open(config, tokenizer, template, "test", files) if config.test_ratio > 0 else None


def open_instruct_split(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, split: MeasuredSplit, in_stages: bool = False
) -> TextDataset:
    """One split by itself, with `subset_size` rows of its own. Raises `UsageError` as `open_instruct_data` does."""
    if split == "test_deeper":
        if config.source != "sample":
            raise UsageError(f"only the bundled deep families have a split test_deeper, found dataset={config.source}: use test")
        files = SourceFiles([], [_sample_file(Path(config.data_dir).expanduser(), split)])
        return _open(config, tokenizer, template, "test", files, alone=True)
    if split == "test" and config.test_ratio == 0:
        raise UsageError("there is no test split with dataset.test_ratio=0: set it above 0, or use the train split")
    return _open(config, tokenizer, template, split, _files(config, in_stages), alone=True)


@dataclass(frozen=True)
class RunData:
    """What a training run reads: every source's training rows, its test rows if any are held out, and the order."""

    train: TextCorpus
    test: TextCorpus | None
    curriculum: Curriculum

    def report(self) -> dict[str, Any]:
        """What a run keeps of its data, as plain values: files and counts of each source's splits, and the splits' overlap."""
        splits = {"train": self.train, "test": self.test}
        sources = {
            name: {split: corpus.parts[name].report() for split, corpus in splits.items() if corpus is not None}
            for name in self.train.parts
        }
        return {"sources": sources, "overlap": overlap(self.train, self.test) if self.test is not None else None}


def open_run_data(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template) -> RunData:
    """The data of a whole run: `dataset` for `epochs`, or with `stages` what they ask of `sources`.

    All sources are split by one hash, seed and default system prompt: a conversation that one holds out is held out of each.
    Raises `UsageError` as `open_instruct_data` does, and for a stage without examples.
    """
    in_stages = bool(config.stages)
    opened = {name: open_instruct_data(source, tokenizer, template, in_stages) for name, source in source_configs(config).items()}
    train = TextCorpus({name: split for name, (split, _) in opened.items()})
    held_out = {name: split for name, (_, split) in opened.items() if split is not None}
    if config.stages:
        sizes = {name: len(split) for name, split in train.parts.items()}
        curriculum = Curriculum.of_stages(config.stages, sizes, config.seed)
    else:
        curriculum = Curriculum.of_epochs(len(train), config.seed, config.epochs)
    return RunData(train, TextCorpus(held_out) if held_out else None, curriculum)


def open_run_split(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template, split: MeasuredSplit) -> TextCorpus:
    """One split of every source of a run, for measuring; see `open_instruct_split`."""
    return TextCorpus(
        {
            name: open_instruct_split(source, tokenizer, template, split, bool(config.stages))
            for name, source in source_configs(config).items()
        }
    )


def source_configs(config: PretrainInstructConfig) -> dict[str, DatasetConfig]:
    """Each source of a run by its name; without stages there is one, called by its kind."""
    if not config.stages:
        return {config.dataset.source: config.dataset}
    return {name: config.dataset.model_copy(update=dict(source)) for name, source in config.sources.items()}


def _open(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, split: Split, files: SourceFiles, alone: bool = False
) -> TextDataset:
    paths = files.validation if split == "test" and files.validation else files.train
    loaded = load_split(
        source=paths,
        split=split,
        alone=alone,
        tokenizer=tokenizer,
        template=template,
        seq_len=config.seq_len,
        subset_size=config.subset_size,
        hash_split=None if files.validation else HashSplit(config.seed, config.test_ratio),
        default_system_prompt=config.default_system_prompt,
        long_rows=config.long_rows,
        on_bad_row=config.on_bad_row,
        cache_dir=_cache_dir(config),
        forms=form_options(config),
        processes=config.processes,
    )
    dataset = TextDataset(loaded)
    if len(dataset) == 0:
        remedy = "raise dataset.test_ratio, use more data, or train without evaluation (dataset.test_ratio=0)"
        if split == "train":
            remedy = "check the rows, raise dataset.seq_len, or use more data"
        names = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(paths) > 3 else "")
        raise UsageError(f"the {split} split of {names} is empty ({'; '.join(describe_counts(dataset.counts))}): {remedy}")
    return dataset


def split_conversations(config: DatasetConfig, split: Split, in_stages: bool = False) -> Iterator[Conversation]:
    """The conversations of a split in the order of the files, without any tokens; rows that can't be used are passed over.

    `subset_size` ends the train split. Raises `UsageError` for missing and damaged files.
    """
    return _conversations(config, split, _files(config, in_stages))


def _conversations(config: DatasetConfig, split: Split, files: SourceFiles) -> Iterator[Conversation]:
    found = 0
    for path in files.validation if split == "test" and files.validation else files.train:
        for _, data in open_row_file(path).rows():
            if split == "train" and found == config.subset_size:
                return
            try:
                if isinstance(data, BadRow):
                    continue
                conversation, _ = to_conversation(parse_row(to_json(data)), form_options(config))
            except (BadRow, NothingToLearn):  # told and counted where rows are tokenized
                continue
            conversation = with_default_system(conversation, config.default_system_prompt)
            hashes = np.array([prompt_hash(conversation)], np.uint64)
            if files.validation or are_test_hashes(hashes, config.seed, config.test_ratio)[0] == (split == "test"):
                found += 1
                yield conversation


def _cache_dir(config: DatasetConfig) -> Path:
    return Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()


def _files(config: DatasetConfig, in_stages: bool) -> SourceFiles:
    if config.test_ratio == 0 and (config.validation_files or config.validation_split):
        raise UsageError(
            "dataset.test_ratio=0 trains without evaluation, and dataset.validation_files or validation_split says what to "
            "measure on: leave out one of them"
        )
    folder = Path(config.data_dir).expanduser()
    hub = Hub(config.repo, config.revision, config.sha256) if config.repo is not None else None
    if config.source == "sample":
        validation = [_sample_file(folder, "test")] if config.test_ratio > 0 else []
        return SourceFiles([_sample_file(folder, "train")], validation)
    if config.source == "slimorca":
        return SourceFiles([locate(folder, hub)])
    if config.source == "hub" or (not config.files and is_saved(folder)):
        if config.shards or config.validation_files:
            raise UsageError(
                f"{folder} is a folder of save_to_disk, whose files have no names of their own: choose of its splits with "
                "dataset.split and dataset.validation_split, and leave shards and validation_files out"
            )
        return SourceFiles(
            *([] if split is None else _split_files(config, split) for split in (config.split, config.validation_split))
        )
    if config.split != "train" or config.validation_split:
        raise UsageError(
            f"dataset.split and dataset.validation_split choose of a hub data set or a folder of save_to_disk, and {str(folder)!r} "
            "is neither: name files with dataset.files and dataset.validation_files"
        )
    found = find_files(folder, config.files, hub, config.shards, config.seed, config.validation_files)
    # A file that a stage's source holds out by its name alone could be trained on by another.
    in_parts = in_stages and not config.validation_files
    return SourceFiles(found.train, left_out=[*found.validation, *found.left_out]) if in_parts else found


def _split_files(config: DatasetConfig, split: str) -> list[Path]:
    if config.source == "hub":
        if config.repo is None:
            raise UsageError("dataset=hub needs a data set of the hub: set dataset.repo=OWNER/NAME")
        return split_files(config.repo, config.config, split, config.revision, _cache_dir(config))
    return saved_split(Path(config.data_dir).expanduser(), split)


def _sample_file(folder: Path, split: MeasuredSplit) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"expected {split}.jsonl in {str(folder)!r}, found none; build the sample data first: "
        f"`{SAMPLE_BUILDER} {'--families deep ' if split == 'test_deeper' else ''}--output-dir {folder}`"
    )


def last_exchange(conversation: Conversation) -> tuple[Conversation, str] | None:
    """The history before the last assistant turn, and that turn's text; None for raw text, in which nobody is asked."""
    last = max((i for i, turn in enumerate(conversation) if turn.role == "assistant"), default=None)
    return None if last is None else (conversation[:last], conversation[last].text)
