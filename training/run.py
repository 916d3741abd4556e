"""One instruction-tuning run from a checked config: data, model, loop, evaluation, logs, checkpoints.

The only file of this room that touches disk, the screen and W&B. Knows no Hydra.
"""

import contextlib
import datetime
import itertools
import math
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.checkpoint import save_checkpoint
from artifacts.metrics_log import MetricsLog
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.instruct import last_exchange, open_instruct_data
from dataset.text.conversation import Template
from dataset.text.loader import ExampleStream, TextDataset
from dataset.text.tokenizer import Tokenizer, resolve_tokenizer_path
from evaluators.language import evaluate_language
from generation.loading import make_responder
from models.act import RecursiveModel
from models.device import pick_device, resolve_dtype, should_compile
from training.loop import StepResult, Trainer

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
    config = config.model_copy(update={"run_name": config.run_name or _new_run_name(arch.name)})
    assert config.run_name is not None
    folder = Path(config.checkpoint_dir) / config.project_name / config.run_name
    if list(folder.glob("step_*")):
        raise UsageError(f"{folder} has checkpoints already and is not overwritten: choose another run_name, or delete it")
    tokenizer = Tokenizer(resolve_tokenizer_path(config.dataset.tokenizer_path))
    train, test = open_instruct_data(config.dataset, tokenizer, Template())
    if config.global_batch_size > len(train):
        raise UsageError(
            f"global_batch_size {config.global_batch_size} is larger than the {len(train)} training rows: lower it, or use more "
            "data (dataset.subset_size, dataset.test_ratio)"
        )
    model = RecursiveModel(arch, tokenizer.vocab_size, seed=config.seed).to(device)
    if should_compile(config.compile, device):
        model.compile_levels()
    return _Run(config, model, tokenizer, train, test, folder).train()


def _new_run_name(arch: str) -> str:
    return f"{arch}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


class _Window:
    """Sums since the last log line; tensors are read only when a line is written."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def metrics(self, train: Trainer) -> dict[str, Any]:
        tokens = max(1, sum(result.supervised for result in self.results))
        depths = list(itertools.chain.from_iterable(result.finished_depths for result in self.results))
        return {
            "step": train.step_number,
            "examples": train.slots.finished,
            "lr": self.results[-1].lr,
            "loss_per_token": float(sum(r.nll_sum.double() for r in self.results)) / tokens,
            "halt_loss_per_token": float(sum(r.halt_bce_sum.double() for r in self.results)) / tokens,
            "token_accuracy": int(sum(r.correct for r in self.results)) / tokens,
            "mean_act_steps": sum(depths) / len(depths) if depths else None,
            "halted_at": {str(depth): count for depth, count in sorted(Counter(depths).items())},
            "supervised_tokens": tokens,
        }


@dataclass
class _Run:
    config: PretrainInstructConfig
    model: RecursiveModel
    tokenizer: Tokenizer
    train_split: TextDataset
    test_split: TextDataset | None
    folder: Path

    def train(self) -> Path:
        config, data = self.config, self.train_split
        parameters = sum(p.numel() for p in self.model.parameters())
        test_rows = len(self.test_split) if self.test_split is not None else 0
        print(f"run {self.folder}: {parameters:,} parameters, {self.model.device.type}, {self.model.config.forward_dtype}")
        print(f"data {config.dataset.data_dir}: {len(data):,} training rows, {test_rows:,} test rows; {data.counts}")
        if self.test_split is None:
            print("dataset.test_ratio is 0: training without evaluation")
        log = MetricsLog(self.folder)
        wandb = self._start_wandb()
        saved: Path | None = None
        window, started, logged = _Window(), time.perf_counter(), time.perf_counter()
        with ExampleStream(data, config.seed, config.epochs, config.dataloader_workers) as stream:
            trainer = Trainer(config, self.model, stream, len(data))
            evaluated_epochs = 0
            with tqdm(total=trainer.total_examples, unit="ex", dynamic_ncols=True, mininterval=1) as bar:
                for result in trainer.steps():
                    bar.update(len(result.finished_depths))
                    window.results.append(result)
                    finished_all = not trainer.slots.busy and trainer.slots.finished == trainer.total_examples
                    if result.step % config.log_interval == 0 or finished_all:
                        metrics = window.metrics(trainer)
                        if not math.isfinite(metrics["loss_per_token"]):
                            raise UsageError(
                                f"the loss is not finite at step {result.step}: lower lr, raise lr_warmup_steps, or use "
                                "arch.forward_dtype=float32; earlier checkpoints of the run are kept"
                            )
                        now = time.perf_counter()
                        tokens = sum(r.tokens for r in window.results)
                        timing = {
                            "step": result.step,
                            "seconds": now - started,
                            "tokens_per_second": tokens / (now - logged),
                            "supervised_tokens_per_second": metrics["supervised_tokens"] / (now - logged),
                        }
                        log.write(metrics, timing)
                        if wandb is not None:
                            wandb.log(
                                {f"train/{k}": v for k, v in metrics.items() if isinstance(v, int | float)},
                                step=result.step,
                            )
                        bar.set_postfix(loss=f"{metrics['loss_per_token']:.3f}", act_steps=_short(metrics["mean_act_steps"]))
                        window, logged = _Window(), now
                    epochs = trainer.slots.finished // len(data)
                    if finished_all or epochs // config.eval_interval > evaluated_epochs // config.eval_interval:
                        evaluated_epochs = epochs
                        saved = self._evaluate_and_save(trainer, log, wandb)
        log.close()
        if wandb is not None:
            wandb.finish()
        assert saved is not None
        print(f"checkpoint {saved}")
        return saved

    def _evaluate_and_save(self, trainer: Trainer, log: MetricsLog, wandb: Any) -> Path:
        config = self.config
        metrics: dict[str, Any] = {"step": trainer.step_number, "examples": trainer.slots.finished}
        if self.test_split is not None:
            averaged = trainer.ema.swapped_in(self.model) if trainer.ema is not None else contextlib.nullcontext()
            with averaged:
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
                metrics["test"] = report
                numbers = {name: value for name, value in report.items() if isinstance(value, float)}
                tqdm.write(f"step {trainer.step_number}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
                if report["worse_act_steps"]:
                    tqdm.write(f"  depth doesn't pay: the held-out loss rises at ACT steps {report['worse_act_steps']}")
                self._show_answers(self.test_split)
            log.write(metrics)
            if wandb is not None:
                wandb.log({f"test/{name}": value for name, value in numbers.items()}, step=trainer.step_number)
        state = trainer.state()
        state.values["metrics_log_bytes"] = log.length
        state.values["forward_dtype"] = self.model.config.forward_dtype
        folder = self.folder / f"step_{trainer.step_number}"
        save_checkpoint(
            folder,
            config=config,
            weights=self.model.state_dict(),
            ema=trainer.ema.average if trainer.ema is not None else None,
            tokenizer=self.tokenizer,
            template=Template(),
            data_hash=self.train_split.data_hash,
            step=trainer.step_number,
            metrics=metrics,
            trainer=state,
        )
        return folder

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

    def _start_wandb(self) -> Any:
        mode = os.environ.setdefault("WANDB_MODE", "offline")
        if mode == "disabled":
            return None
        import wandb

        # W&B keeps its own console capture off: tqdm's bar would be logged line by line.
        settings = wandb.Settings(console="off", silent=True)
        return wandb.init(
            project=self.config.project_name,
            name=self.config.run_name,
            config=self.config.model_dump(),
            dir=str(self.folder),
            settings=settings,
        )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
