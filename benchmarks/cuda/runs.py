"""Runs of some minutes: an epoch's time, two networks at equal FLOPs, and Sudoku."""

import functools
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from benchmarks.common import ORIGINAL, SyntheticRows, timed_calls, trainer_on
from benchmarks.cuda.scale import (
    COMPILING_SECONDS,
    Case,
    Figures,
    Found,
    Scale,
    peak_gigabytes,
    synchronize,
    timed_steps,
    training_config,
    varied_lengths,
)
from benchmarks.equal_flops import Budget, compose_arm, measure, open_data
from benchmarks.recursions import puzzle_config, trainer_of
from dataset import build_sample_dataset, build_small_puzzles, build_sudoku_dataset
from dataset.puzzles.loader import PuzzleData
from dataset.text.loader import ExampleStream
from evaluators.puzzles import evaluate_puzzles

# SlimOrca's training rows.
_EPOCH_ROWS = 517_982


def _data_settings(scale: Scale) -> list[str]:
    return [] if scale.data is None else ["dataset=jsonl", f"dataset.data_dir={scale.data}", f"dataset.seq_len={scale.positions}"]


def epoch(scale: Scale) -> Iterator[Case]:
    """Training two networks on conversations, and the time of an epoch of SlimOrca's 517,982 rows
    at that speed.

    With `--data`, an epoch of the same number of its rows. Loading: the host's time to read rows,
    lay out a batch and send it.
    """

    def training(original: Sequence[str], _: Found) -> Figures:
        config = training_config(scale, _data_settings(scale), original)
        rows: Any = SyntheticRows(config, scale.vocabulary, varied_lengths(scale.positions))
        vocabulary = scale.vocabulary
        if scale.data is not None:
            tokenizer, data, _test = open_data(config)
            rows = ExampleStream(data.train, data.curriculum, config.dataloader_workers)
            vocabulary = tokenizer.vocab_size
        trainer = trainer_on(config, rows, vocabulary, compiled=True)
        task, loading = trainer.task, list[float]()
        warm_up, _steps = timed_steps(steps := trainer.steps(), scale.steps, scale)
        done, begun = task.done.examples, time.perf_counter()
        with timed_calls(task, "next_batch", loading):
            results = [next(steps) for _step in range(scale.epoch_steps)]
        synchronize(scale)
        seconds = time.perf_counter() - begun
        return {
            "data": "generated" if scale.data is None else scale.data.name,
            "ms a step": 1e3 * seconds / scale.epoch_steps,
            "tokens/s": sum(int(result.sums["tokens"]) for result in results) / seconds,
            "epoch, minutes": _EPOCH_ROWS * seconds / (task.done.examples - done) / 60,
            "loading, ms a step": 1e3 * sum(loading) / scale.epoch_steps,
            "loading, share": sum(loading) / seconds,
            "first steps, s": sum(warm_up),
        }

    yield Case("default", functools.partial(training, ()), COMPILING_SECONDS)
    yield Case("original's depth", functools.partial(training, (ORIGINAL,)), COMPILING_SECONDS)


def equal_flops(scale: Scale) -> Iterator[Case]:
    """TRM for a minute, and a Transformer of eight blocks for the same FLOPs; then held-out rows.
    Code is not compiled.
    """

    def training(name: str, found: Found) -> Figures:
        if name != "trm" and "trm" not in found:
            raise RuntimeError("trm failed, whose FLOPs this one gets")
        with tempfile.TemporaryDirectory() as folder:
            source = _data_settings(scale) or sample_data(scale, Path(folder))
            overrides = [*source, f"arch={name}", *scale.arch, f"device={scale.device}", f"global_batch_size={scale.batch}"]
            budget = Budget("FLOPs", 1e12 * found["trm"]["TFLOP"]) if found else Budget("seconds", scale.training_seconds)
            result = measure(name, compose_arm(overrides, seed=0), budget, scale.measured_rows)
        return {
            "data": "sample" if scale.data is None else scale.data.name,
            "TFLOP": result["flops"] / 1e12,
            **{key: result[key] for key in ("seconds", "steps", "rows", "parameters")},
            "held-out rows": [{"ACT step": step, **loss} for step, loss in enumerate(result["by_act_step"], 1)],
        }

    for name in ("trm", "transformers_baseline"):
        yield Case(name, functools.partial(training, name), 60 + 2 * scale.training_seconds)


def sample_data(scale: Scale, folder: Path) -> list[str]:
    """Build the bundled tasks with their own tokenizer; returns the settings."""
    build_sample_dataset.build(folder, train_size=scale.sample_rows, test_per_family=20)
    place: dict[str, Any] = {"input": str(folder / "train.jsonl"), "model_prefix": str(folder / "tokenizer")}
    SentencePieceTrainer.train(**place, vocab_size=500, byte_fallback=True, minloglevel=2)
    tokenizer = f"dataset.tokenizer_path={folder / 'tokenizer.model'}"
    return ["dataset=sample", f"dataset.data_dir={folder}", tokenizer, "generation.max_output_tokens=4"]


# Steps of the paper's run on Sudoku-Extreme: 50,000 epochs of 1,000 puzzles in batches of 768.
_PAPER_STEPS = 50_000 * 1_000 // 768
_SUDOKU_POINTS, _SUDOKU_RESERVE = 4, 20.0


def sudoku(scale: Scale) -> Iterator[Case]:
    """Preset sudoku_mlp for the remaining time: exact accuracy of the averaged weights on held-out
    puzzles.

    Also the time of the paper's 65,104 steps. Without puzzles in `--data`, 6x6 grids are generated:
    no reproduction.
    """

    def training(_: Found) -> Figures:
        source = scale.data / "sudoku" if scale.data is not None and (scale.data / "sudoku").is_dir() else None
        with tempfile.TemporaryDirectory() as temporary:
            folder = f"{temporary}/sudoku"
            if source is None:
                build_small_puzzles.build_sudoku(folder, train_size=1000, test_size=200)
            else:
                build_sudoku_dataset.build(folder, source, subsample_size=1000, num_aug=100)
            settings = ["experiment=sudoku_mlp", f"data_paths=[{folder}]", f"device={scale.device}", *scale.puzzles]
            config = puzzle_config(settings)
            trainer, test = trainer_of(config, _PAPER_STEPS), PuzzleData([folder], "test")
        trainer.model.compile_levels()
        warm_up, _steps = timed_steps(steps := trainer.steps(), 3, scale)
        # The time left after the start, without the time of evaluations.
        left = scale.deadline - time.monotonic() - _SUDOKU_RESERVE
        seconds = scale.training_seconds if scale.device == "cpu" else max(5.0, left)
        spent, curve = 0.0, list[Figures]()
        while len(curve) < _SUDOKU_POINTS:
            spent += timed_steps(steps, 1, scale)[0][0]
            if spent >= seconds * (len(curve) + 1) / _SUDOKU_POINTS:
                with trainer.averaged_weights():
                    result = evaluate_puzzles(trainer.model, test, batch_size=config.global_batch_size, max_batches=1)
                kept = {key: result[key] for key in ("exact_accuracy", "accuracy", "lm_loss")}
                curve.append({"seconds": spent, "step": trainer.progress.step, **kept})
        pace = (trainer.progress.step - len(warm_up)) / spent
        return {
            "puzzles": "6x6, generated" if source is None else str(source),
            "batch": config.global_batch_size,
            "steps/s": pace,
            "the paper's run, hours": _PAPER_STEPS / pace / 3600,
            "first steps, s": sum(warm_up),
            "GB": peak_gigabytes(scale),
            "accuracy over time": curve,
        }

    yield Case("sudoku_mlp", training, math.inf)
