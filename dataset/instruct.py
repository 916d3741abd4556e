"""The conversations a config asks for, as data sets. Knows no command line and no model."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from config.errors import UsageError
from config.schema import DatasetConfig, PretrainInstructConfig
from dataset.slimorca import locate
from dataset.source_files import Hub, find_files
from dataset.text.conversation import Conversation, Template, with_default_system
from dataset.text.curriculum import Curriculum
from dataset.text.files import BadRow, open_data_file
from dataset.text.loader import TextCorpus, TextDataset
from dataset.text.sources import NothingToLearn, are_test_hashes, parse_row, prompt_hash, to_conversation
from dataset.text.token_cache import HashSplit, Split, load_split
from dataset.text.tokenizer import Tokenizer, check_reversible

SAMPLE_BUILDER = "python -m dataset.build_sample_dataset"
_CACHE_FOLDER = ".token_cache"
_ROWS_TRIED = 1000


def open_instruct_data(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, cache_dir: Path | None = None
) -> tuple[TextDataset, TextDataset | None]:
    """Train and test split of a source for a training run; test is None with `test_ratio=0`.

    "slimorca": one file, downloaded if it isn't in `data_dir`. "openorca", "jsonl": all of `files`, see `source_files.find_files`.
    These are split by hash. "sample": train.jsonl and test.jsonl (or .jsonl.zst), a split made by their builder; `subset_size`
    takes the first rows of each, and a `test_ratio` above 0 only says that there is a test split. Under a hash split, `subset_size`
    counts training rows, and test has its proportional share: see `token_cache.load_split`. cache_dir: where the token cache goes;
    a folder inside `data_dir` by default. Raises `UsageError` for missing files, malformed rows, a split without a usable row, and
    a tokenizer that loses text of the first 1,000 training rows.
    """
    first_rows = islice(split_conversations(config, "train"), _ROWS_TRIED)
    check_reversible(tokenizer, [turn.text for conversation in first_rows for turn in conversation])
    train = _open(config, tokenizer, template, "train", cache_dir)
    return train, _open(config, tokenizer, template, "test", cache_dir) if config.test_ratio > 0 else None


def open_instruct_split(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, split: Split, cache_dir: Path | None = None
) -> TextDataset:
    """One split by itself, with `subset_size` rows of its own. Raises `UsageError` as `open_instruct_data` does."""
    if split == "test" and config.test_ratio == 0:
        raise UsageError("there is no test split with dataset.test_ratio=0: set it above 0, or use the train split")
    return _open(config, tokenizer, template, split, cache_dir, alone=True)


@dataclass(frozen=True)
class RunData:
    """What a training run reads: every source's training rows, its test rows if any are held out, and the order."""

    train: TextCorpus
    test: TextCorpus | None
    curriculum: Curriculum


def open_run_data(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template) -> RunData:
    """The data of a whole run: `dataset` for `epochs`, or with `stages` what they ask of `sources`.

    All sources are split by one hash, seed and default system prompt: a conversation that one holds out is held out of each.
    Raises `UsageError` as `open_instruct_data` does, and for a stage without examples.
    """
    opened = {name: open_instruct_data(source, tokenizer, template) for name, source in source_configs(config).items()}
    train = TextCorpus({name: split for name, (split, _) in opened.items()})
    held_out = {name: split for name, (_, split) in opened.items() if split is not None}
    if config.stages:
        sizes = {name: len(split) for name, split in train.parts.items()}
        curriculum = Curriculum.of_stages(config.stages, sizes, config.seed)
    else:
        curriculum = Curriculum.of_epochs(len(train), config.seed, config.epochs)
    return RunData(train, TextCorpus(held_out) if held_out else None, curriculum)


def open_run_split(config: PretrainInstructConfig, tokenizer: Tokenizer, template: Template, split: Split) -> TextCorpus:
    """One split of every source of a run, for measuring; see `open_instruct_split`."""
    return TextCorpus(
        {name: open_instruct_split(source, tokenizer, template, split) for name, source in source_configs(config).items()}
    )


def source_configs(config: PretrainInstructConfig) -> dict[str, DatasetConfig]:
    """Each source of a run by its name; without stages there is one, called by its kind."""
    if not config.stages:
        return {config.dataset.source: config.dataset}
    return {name: config.dataset.model_copy(update=dict(source)) for name, source in config.sources.items()}


def _open(
    config: DatasetConfig, tokenizer: Tokenizer, template: Template, split: Split, cache_dir: Path | None, alone: bool = False
) -> TextDataset:
    loaded = load_split(
        source=_files(config, split),
        split=split,
        alone=alone,
        tokenizer=tokenizer,
        template=template,
        seq_len=config.seq_len,
        subset_size=config.subset_size,
        hash_split=HashSplit(config.seed, config.test_ratio) if config.source != "sample" else None,
        default_system_prompt=config.default_system_prompt,
        long_rows=config.long_rows,
        on_bad_row=config.on_bad_row,
        cache_dir=cache_dir or Path(config.data_dir) / _CACHE_FOLDER,
        processes=config.processes,
    )
    dataset = TextDataset(loaded)
    if len(dataset) == 0:
        remedy = "raise dataset.test_ratio, use more data, or train without evaluation (dataset.test_ratio=0)"
        if split == "train":
            remedy = "check the rows, raise dataset.seq_len, or use more data"
        names = ", ".join(str(path) for path in loaded.files[:3]) + (", ..." if len(loaded.files) > 3 else "")
        raise UsageError(f"the {split} split of {names} is empty (rows: {dataset.counts}); {remedy}")
    return dataset


def split_conversations(config: DatasetConfig, split: Split) -> Iterator[Conversation]:
    """The conversations of a split in the order of the files, without any tokens; rows that can't be used are passed over.

    `subset_size` ends the train split. Raises `UsageError` for missing and damaged files.
    """
    found = 0
    for path in _files(config, split):
        for row, _ in open_data_file(path).rows():
            if split == "train" and found == config.subset_size:
                return
            try:
                if isinstance(row.data, BadRow):
                    continue
                conversation = to_conversation(row.data if isinstance(row.data, dict) else parse_row(row.data))
            except (BadRow, NothingToLearn):  # told and counted where rows are tokenized
                continue
            conversation = with_default_system(conversation, config.default_system_prompt)
            hashes = np.array([prompt_hash(conversation)], np.uint64)
            if config.source == "sample" or are_test_hashes(hashes, config.seed, config.test_ratio)[0] == (split == "test"):
                found += 1
                yield conversation


def _files(config: DatasetConfig, split: Split) -> list[Path]:
    folder = Path(config.data_dir)
    if config.source == "sample":
        return [_sample_file(folder, split)]
    hub = Hub(config.hub_repo, config.hub_revision, config.hub_sha256) if config.hub_repo is not None else None
    if config.source == "slimorca":
        return [locate(folder, hub)]
    return find_files(folder, config.files, hub, config.shards, config.seed)


def _sample_file(folder: Path, split: Split) -> Path:
    for name in (f"{split}.jsonl", f"{split}.jsonl.zst"):
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"expected {split}.jsonl in {str(folder)!r}, found none; build the sample data first: "
        f"`{SAMPLE_BUILDER} --output-dir {folder}`"
    )


def last_exchange(conversation: Conversation) -> tuple[Conversation, str]:
    """The history before the last assistant turn, and that turn's text."""
    last = max(i for i, turn in enumerate(conversation) if turn.role == "assistant")
    return conversation[:last], conversation[last].text
