"""One run on puzzles from a checked config: its data, how the model is measured, what is kept.

What runs share is in training/run.py. Knows no Hydra.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from artifacts.checkpoint import Snapshot, load_weights, read_weights
from artifacts.puzzle_checkpoint import identifiers_sha256, save_puzzle_checkpoint
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import PuzzleData
from evaluators.puzzles import PuzzleMeasurement
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch
from models.distributed import Ranks, joined_ranks
from training.estimate import dry_run_puzzles
from training.puzzle import PuzzleTask
from training.resume import find_resume_point, weights_to_begin_with
from training.run import Run, RunResult, make_ready


def run_puzzles(config: PretrainPuzzleConfig) -> RunResult | None:
    """Train, from scratch or from where `config.resume` finds the run; returns the last checkpoint and its held-out loss.

    A dry run (`config.dry_run`) trains nothing and returns None.

    Raises UsageError for anything wrong with the input, before training starts, and StoppedBySignal when a signal has ended it.
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
                    f"data_paths_test: expected {field} {found[0]}, as in training, found {found[1]}: use like puzzles"
                )
        test_rows = sum(map(len, test.sets.values()))
        measurement = PuzzleMeasurement(config, test, test_paths)
        decided = config.model_copy(update={"arch": arch})
        resume_point.check(decided, {"data_hash": train.data_hash}, ranks.say)
        model = RecursiveModel(
            arch,
            train.metadata.vocab_size,
            seed=config.seed,
            seq_len=train.metadata.seq_len,
            puzzles=max(train.metadata.num_puzzle_identifiers, test.metadata.num_puzzle_identifiers),
        )
        if config.load_checkpoint is not None and resume_point.saved is None:
            source = weights_to_begin_with(Path(config.load_checkpoint), decided, ranks)
            load_weights(model, read_weights(source), source, reset_puzzle_embedding=True)
        if config.freeze_weights:
            model.requires_grad_(False)
        make_ready(model, config, device, resume_point, ranks)
        task = PuzzleTask(config, model, train, ranks)
        train_rows = sum(map(len, train.sets.values()))
        ranks.say(
            f"data {', '.join(config.data_paths)}: {train.metadata.total_groups:,} puzzles, {train_rows:,} train rows, "
            f"{test_rows:,} test rows; {task.total_steps:,} steps"
        )
        if config.dry_run:
            dry_run_puzzles(config, model, task, train, ranks)
            return None
        job = _PuzzleJob(
            config, model, task, train, identifiers_sha256(config.data_paths), measurement, test_rows, resume_point.folder, ranks
        )
        result = Run(config, job, resume_point, ranks).train()
        ranks.say(f"checkpoint {result.checkpoint}")
        return result


@dataclass
class _PuzzleJob:
    """Training on puzzles, as training/run.py needs to know it."""

    config: PretrainPuzzleConfig
    model: RecursiveModel
    task: PuzzleTask
    data: PuzzleData
    identifiers: str
    measurement: PuzzleMeasurement
    evaluation_rows: int
    folder: Path
    ranks: Ranks

    def evaluate(self, step: int) -> dict[str, Any] | None:
        """Measure every row of the test split, of which each rank takes a share."""
        report: dict[str, Any] = self.ranks.agree(
            self.measurement.measure(
                self.model,
                self.folder,
                f"test_step_{step}",
                save=self.config.eval_save_outputs,
                rank=self.ranks.rank,
                ranks=self.ranks.size,
                sum_over_ranks=self.ranks.sum_numbers,
            )
        )
        if self.ranks.is_first:
            numbers = {name: value for name, value in report.items() if isinstance(value, float)}
            tqdm.write(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
            curve = " ".join(f"{share:.3f}" for share in report["exact_accuracy_by_act_step"])
            tqdm.write(f"  exact_accuracy by ACT step: {curve}")
        return report

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """The checkpoint, with the description of its data."""
        save_puzzle_checkpoint(folder, snapshot, config=self.config, data=self.data, identifiers=self.identifiers)
