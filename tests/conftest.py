"""What many tests share: a tiny config, tokenizer, models and data sets. Nothing here needs a network."""

import atexit
import functools
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceTrainer

from config.compose import compose_config
from config.schema import DatasetConfig, PretrainInstructConfig
from dataset.text.conversation import Template
from dataset.text.loader import Example, TextDataset
from dataset.text.token_cache import Split, load_split
from dataset.text.tokenizer import Tokenizer
from models.act import RecursiveModel

os.environ.setdefault("WANDB_MODE", "disabled")
if not torch.cuda.is_available():
    # Triton's interpreter, for kernels of a GPU that isn't there. Triton reads this when it is imported, which torch does later.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Before anything reads it: what tests and their processes make of data is kept nowhere else.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="instruct-trm-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
# Toy tensors gain nothing from threads, and threads that fight over cores lose much; here, and in processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# How long an example takes depends on what else the machine does, another test process for one.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

TINY = (
    "arch=trm",
    "arch.halt_max_steps=4",
    "arch.hidden_size=16",
    "arch.num_heads=2",
    "arch.expansion=1",
    "arch.H_cycles=2",
    "arch.L_cycles=2",
    "arch.forward_dtype=float64",
    "device=cpu",
    "global_batch_size=4",
    # Muon rounds to bfloat16, and most tests compare in float64.
    "optimizer=adam_atan2",
    "lr=1e-4",
    "dataset.seq_len=32",
    "dataset.tokenizer_path=unused",
    "dataset.default_system_prompt=null",
    "dataloader_workers=0",
)


# What a recursion says otherwise at toy size, its layers in the first place.
TINY_RECURSIONS = {
    "arch=hrm": ("arch.H_layers=1", "arch.L_layers=2"),
    "arch=looped": ("arch.H_cycles=1",),
    "arch=transformers_baseline": ("arch.H_layers=2", "arch.H_cycles=1", "arch.L_cycles=0"),
}

# Neither the intervals of saving and logging nor the epochs fall together.
SHORT_RUN = (
    "arch.forward_dtype=float32",
    "arch.H_cycles=1",
    "arch.L_cycles=1",
    "arch.L_layers=1",
    "arch.halt_max_steps=3",
    "dataset=jsonl",
    "dataset.files=[rows.jsonl]",
    "dataset.seq_len=64",
    "dataset.test_ratio=0.2",
    "dataset.processes=1",
    "dataset.default_system_prompt=null",
    "sample_answers=0",
    "eval_examples=5",
    "epochs=3",
    "lr=1e-3",
    "ema=true",
    "log_interval=3",
    "checkpoint.every_steps=4",
    "checkpoint.every_minutes=null",
    "checkpoint.keep_last=null",
    "plot=false",
    "report=false",
    "run_name=run",
)

# What takes longest begins first, so that of two processes none is left with much at the end.
LONG_FILES = (
    "distributed",
    "cuda_benchmark",
    "readme",
    "resume",
    "benchmarks",
    "engine",
    "entry_scripts",
    "act",
    "loop",
    "sweeps",
    "recursive_reasoning",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> PretrainInstructConfig:
    of_recursion = [own for override in overrides for own in TINY_RECURSIONS.get(override, ())]
    return compose_config("cfg_pretrain_instruct", [*TINY, *of_recursion, *overrides])


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., PretrainInstructConfig]:
    """`tiny_config("arch=hrm", "arch.loss=softmax", ...)`: the instruction config at toy size, float64, with overrides on top."""
    return lambda *overrides: _composed(tuple(overrides))


@pytest.fixture(scope="session")
def tiny_model(tiny_config: Callable[..., PretrainInstructConfig]) -> Callable[..., RecursiveModel]:
    """`tiny_model("arch.attention=prefix", vocab_size=13)`: a model whose halting head sees its state (weights not zero)."""

    def build(*overrides: str, vocab_size: int = 13, seed: int = 0, halt_scale: float = 0.5) -> RecursiveModel:
        model = RecursiveModel(tiny_config(*overrides).arch, vocab_size, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.q_head.weight.copy_(halt_scale * torch.randn(model.q_head.weight.shape, generator=generator))
        return model

    return build


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Tokenizer:
    """320 SentencePiece pieces with byte fallback, so it can say any text."""
    sentences = [f"{word} {i} plus {i + 1} gives {2 * i + 1}." for i in range(60) for word in ("Red", "blue", "What is")]
    sentences += ["[SYSTEM] [USER] [ASSISTANT]"] * 60
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
    )
    return Tokenizer.from_bytes(model.getvalue())


@pytest.fixture(scope="session")
def random_examples() -> Callable[..., list[Example]]:
    """`random_examples(12, vocab_size=13)`: rows of a prompt segment and supervised answer, of uneven lengths."""

    def build(count: int, *, vocab_size: int = 13, seed: int = 0, longest: int = 16) -> list[Example]:
        rng = np.random.default_rng(seed)
        examples = []
        for _ in range(count):
            prompt, answer = int(rng.integers(2, longest // 2)), int(rng.integers(1, longest // 2))
            ids = rng.integers(0, vocab_size, prompt + answer).astype(np.int32)
            is_answer = np.arange(len(ids)) >= prompt
            examples.append(Example(ids, is_answer, (~is_answer).astype(np.int32), turn_bytes=answer))
        return examples

    return build


@functools.cache
def file_config() -> DatasetConfig:
    return compose_config("cfg_pretrain_instruct", ["dataset=jsonl", "dataset.seq_len=64"]).dataset


def load_file(
    source: Path | Sequence[Path],
    tokenizer: Tokenizer,
    *,
    split: Split = "train",
    template: Template | None = None,
    alone: bool = False,
    **changes: Any,
) -> TextDataset:
    """`load_split` of a file, or several, with `changes` to its settings: wholly one split unless they have a `test_ratio`.

    The cache lies beside the first file.
    """
    files = [source] if isinstance(source, Path) else list(source)
    usual = {"default_system_prompt": None, "long_rows": "truncate", "cache_dir": str(files[0].parent / "cache")}
    config = file_config().model_copy(update={**usual, **changes})
    return load_split(config, files, split, tokenizer, template or Template(), by_hash="test_ratio" in changes, alone=alone)


@pytest.fixture
def text_dataset(tmp_path: Path, tiny_tokenizer: Tokenizer) -> Callable[[Sequence[dict[str, Any]]], TextDataset]:
    """`text_dataset(rows)`: JSONL rows as a data set that is wholly one split."""

    def build(rows: Sequence[dict[str, Any]]) -> TextDataset:
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_file(source, tiny_tokenizer, seq_len=256)

    return build


@pytest.fixture(scope="session")
def short_run_data(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": f"{2 * i + 1}, Red{' and blue' * (i % 4)}."} for i in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    return folder


@pytest.fixture(scope="session")
def run_config(tiny_config: Callable[..., PretrainInstructConfig], short_run_data: Path) -> Callable[..., PretrainInstructConfig]:
    """`run_config(folder, "key=value", ...)`: a short run kept in `folder`."""

    def build(folder: Path, *overrides: str) -> PretrainInstructConfig:
        places = (f"dataset.data_dir={short_run_data}", f"dataset.tokenizer_path={short_run_data / 'tokenizer.model'}")
        return tiny_config(*SHORT_RUN, *places, f"checkpoint_dir={folder}", *overrides)

    return build
