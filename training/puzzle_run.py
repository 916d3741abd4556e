"""A run on puzzles: its data, evaluation and checkpoints. training/loop.py has the loop."""

import functools
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.puzzle_checkpoint import identifiers_sha256, save_puzzle_checkpoint
from artifacts.weights import load_weights, read_weights
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import PuzzleData
from evaluators.puzzles import PuzzleMeasurement
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch
from models.distributed import Ranks, joined_ranks
from training.console import say_places, show_evaluation
from training.estimate import dry_run_puzzles
from training.loop import Run, RunResult, Trainer
from training.puzzle import PuzzleTask
from training.resume import find_resume_point, initial_weights_path, prepare_model


def run_puzzles(config: PretrainPuzzleConfig) -> RunResult | None:
    """Train as `config` says; returns the last checkpoint and its loss, or None after a dry run.

    Raises UsageError for wrong input, before training starts, and StoppedBySignal.
    """
    with joined_ranks(config.device, config.dist_timeout_minutes) as ranks, find_resume_point(config, ranks) as resume_point:
        device = pick_device(config.device)
        arch = resolve_arch(config.arch, device)
        config = config.model_copy(update={"run_name": resume_point.folder.name})
        test_paths = config.data_paths_test or config.data_paths
        train, test = PuzzleData(config.data_paths, "train"), PuzzleData(test_paths, "test")
        for field in ("vocab_size", "seq_len"):
            found = getattr(train.metadata, field), getattr(test.metadata, field)
            if found[0] != found[1]:
                raise UsageError(
                    f"data_paths_test: expected {field} {found[0]}, as in training, found {found[1]}: use puzzles of the same kind"
                )
        if arch.puzzle_emb_ndim and identifiers_sha256(test_paths) != identifiers_sha256(config.data_paths):
            raise UsageError(
                f"data_paths_test: identifiers.json of {', '.join(test_paths)} numbers puzzles otherwise than that of "
                f"{', '.join(config.data_paths)}, and each number has a vector of its own: build both data sets together, or set "
                "arch.puzzle_emb_ndim=0"
            )
        test_rows = sum(map(len, test.sets.values()))
        measurement = PuzzleMeasurement(config, test, test_paths)
        resolved = config.model_copy(update={"arch": arch})
        resume_point.check(resolved, {"data_hash": train.data_hash}, ranks.say)
        model = RecursiveModel(
            arch,
            train.metadata.vocab_size,
            seed=config.seed,
            seq_len=train.metadata.seq_len,
            puzzles=train.metadata.num_puzzle_identifiers,
        )
        if config.load_checkpoint is not None and resume_point.saved is None:
            source = initial_weights_path(Path(config.load_checkpoint), resolved, ranks)
            load_weights(model, read_weights(source), source, reset_puzzle_embedding=True)
        if config.freeze_weights:
            model.requires_grad_(False)
        prepare_model(model, config, device, resume_point.folder, ranks)
        task = PuzzleTask(config, model, train, ranks)
        train_rows = sum(map(len, train.sets.values()))
        ranks.say(
            f"data {', '.join(config.data_paths)}: {train.metadata.total_groups:,} puzzles, {train_rows:,} train rows, "
            f"{test_rows:,} test rows; {task.total_steps:,} steps"
        )
        if config.dry_run:
            dry_run_puzzles(config, model, task, train, ranks)
            return None
        result = Run(
            Trainer(config, model, task, ranks),
            resume_point,
            evaluate=lambda step: _evaluate(measurement, config, model, resume_point.folder, ranks, step),
            evaluation_rows=test_rows,
            save=functools.partial(
                save_puzzle_checkpoint, config=config, data=train, identifiers=identifiers_sha256(config.data_paths)
            ),
        ).train()
        say_places(result.checkpoint, ranks.say)
        return result


def _evaluate(
    measurement: PuzzleMeasurement, config: PretrainPuzzleConfig, model: RecursiveModel, folder: Path, ranks: Ranks, step: int
) -> dict[str, Any]:
    name, save = f"test_step_{step}", config.eval_save_outputs
    report: dict[str, Any] = ranks.agree(measurement.measure(model, folder, name, save=save, ranks=ranks))
    if ranks.is_first:
        show_evaluation(step, report)
        curve = " ".join(f"{share:.3f}" for share in report["exact_accuracy_by_act_step"])
        tqdm.write(f"  exact_accuracy by ACT step: {curve}")
    return report
