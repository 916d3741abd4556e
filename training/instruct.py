"""One instruction-tuning run from a checked config: its data, how the model is measured, answers to look at, what is kept.

What runs share is in training/run.py. Knows no Hydra.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.checkpoint import save_checkpoint
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import last_exchange, open_instruct_data
from dataset.text.conversation import Template
from dataset.text.loader import ExampleStream, TextDataset
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from evaluators.language import evaluate_language
from generation.loading import make_responder
from models.act import RecursiveModel
from models.device import pick_device, resolve_dtype, set_matmul_precision, should_compile
from training.run import Run, Snapshot, new_run_name, run_folder
from training.text import TextTask

# Answers shown during training are for the eye; longer ones only cost time.
_SHOWN_ANSWER_TOKENS = 48


def run_instruct(config: PretrainInstructConfig) -> Path:
    """Train from scratch and return the folder of the last checkpoint.

    Raises UsageError for anything wrong with the input, before training starts.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("training on several processes is not supported yet: start pretrain_instruct.py without torchrun")
    device = pick_device(config.device)
    arch = config.arch.model_copy(update={"forward_dtype": resolve_dtype(config.arch.forward_dtype, device)})
    config = config.model_copy(update={"run_name": config.run_name or new_run_name(arch.name)})
    folder = run_folder(config)
    tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
    train, test = open_instruct_data(config.dataset, tokenizer, Template())
    if config.global_batch_size > len(train):
        raise UsageError(
            f"global_batch_size {config.global_batch_size} is larger than the {len(train)} training rows: lower it, or use more "
            "data (dataset.subset_size, dataset.test_ratio)"
        )
    model = RecursiveModel(arch, tokenizer.vocab_size, seed=config.seed).to(device)
    set_matmul_precision(config.tf32, device)
    if should_compile(config.compile, device):
        model.compile_levels()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"run {folder}: {parameters:,} parameters, {device.type}, {arch.forward_dtype}")
    test_rows = len(test) if test is not None else 0
    print(f"data {config.dataset.data_dir}: {len(train):,} training rows, {test_rows:,} test rows; {train.counts}")
    if test is None:
        print("dataset.test_ratio is 0: training without evaluation")
    with ExampleStream(train, config.seed, config.epochs, config.dataloader_workers) as stream:
        task = TextTask(config, model, stream, len(train))
        return Run(config, _InstructJob(config, model, task, tokenizer, train.data_hash, test), folder).train()


@dataclass
class _InstructJob:
    """Instruction tuning, as training/run.py needs to know it."""

    config: PretrainInstructConfig
    model: RecursiveModel
    task: TextTask
    tokenizer: Tokenizer
    data_hash: str
    test_split: TextDataset | None

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """Teacher-forced measures of the test split, and a few answers to look at."""
        config = self.config
        if self.test_split is None:
            return None
        report = evaluate_language(
            self.model,
            self.test_split,
            eos_id=self.tokenizer.eos_id,
            batch_size=config.global_batch_size,
            act_steps=config.depth,
            halt_threshold=config.generation.halt_threshold,
            limit=config.eval_examples,
            pad_multiple=config.pad_multiple,
        ).report()
        numbers = {name: value for name, value in report.items() if isinstance(value, float)}
        tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
        if report["worse_act_steps"]:
            tqdm.write(f"  depth doesn't pay: the held-out loss rises at ACT steps {report['worse_act_steps']}")
        self._show_answers(self.test_split)
        return report

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """The checkpoint, with tokenizer and template."""
        save_checkpoint(
            folder,
            config=self.config,
            weights=snapshot.weights,
            ema=snapshot.ema,
            tokenizer=self.tokenizer,
            template=Template(),
            data_hash=self.data_hash,
            step=snapshot.step,
            metrics=snapshot.metrics,
            trainer=snapshot.trainer,
        )

    def _show_answers(self, split: TextDataset) -> None:
        config = self.config
        responder = make_responder(self.model, self.tokenizer, Template(), config)
        responder = responder.with_options(max_output_tokens=min(config.answer_limit, _SHOWN_ANSWER_TOKENS))
        shown = []
        for index in range(min(config.sample_answers, len(split))):
            history, reference = last_exchange(split.conversation(index))
            # A row that training cut short may have a history longer than the context: nothing to show.
            if responder.fits(history):
                shown.append((history, reference))
        answers = responder.answers([history for history, _ in shown])
        for (history, reference), answer in zip(shown, answers, strict=True):
            tqdm.write(f"  Q {history[-1].text[:200]!r}\n  A {answer.text[:200]!r} (reference {reference[:200]!r})")
