"""Measure a puzzle checkpoint on a split: `python inference.py --checkpoint checkpoints/<project>/<run>`.

With the run's data and batch size its figures are those of the evaluation in training. Writes metrics_<split>.json.
"""

import argparse
import json
import os
from functools import partial
from typing import Any, get_args

from tqdm import tqdm

from artifacts.checkpoint import load_weights, read_weights
from artifacts.outputs import output_folder, write_json
from artifacts.puzzle_checkpoint import open_puzzle_checkpoint
from config.compose import add_checkpoint_arguments, override_config, settings_of_checkpoint
from config.errors import UsageError, one_clear_message, refuse_several_ranks
from config.schema import PretrainPuzzleConfig, PuzzleOutput, user_path
from dataset.puzzles.loader import PuzzleData, evaluation_batch_count
from evaluators.puzzles import PuzzleMeasurement
from models.act import RecursiveModel
from models.device import keep_freed_memory, pick_device, resolve_arch, set_matmul_precision, should_compile


def parse_arguments() -> argparse.Namespace:
    """The command line of this door."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add(
        "--data-paths",
        "--data-dir",
        type=os.path.expanduser,
        nargs="+",
        metavar="DIR",
        help="folders of puzzle data; default: those the run was measured on",
    )
    add("--split", choices=("train", "test"), default="test", help="which split to run over")
    add("--batch-size", type=int, help="rows at a time; default: global_batch_size of the run")
    add("--max-batches", type=int, help="stop after this many batches")
    add("--output-dir", type=user_path, help="where metrics and saved tensors go; default: the checkpoint's folder")
    names = get_args(PuzzleOutput)
    add("--save-outputs", nargs="+", default=[], choices=names, metavar="KEY", help=f"tensors to keep, of {', '.join(names)}")
    return parser.parse_args()


def settings(trained: PretrainPuzzleConfig, arguments: argparse.Namespace) -> PretrainPuzzleConfig:
    """The checkpoint's settings with this door's flags on top."""
    config = settings_of_checkpoint(trained, arguments)
    if arguments.batch_size is not None:
        config = override_config(config, [f"global_batch_size={arguments.batch_size}"])
    if arguments.data_paths is not None:
        config = config.model_copy(update={"data_paths_test": tuple(arguments.data_paths)})
    return config


def main() -> None:
    """Load, measure, write, print."""
    arguments = parse_arguments()
    refuse_several_ranks()
    if arguments.max_batches is not None and arguments.max_batches < 1:
        raise UsageError(f"--max-batches {arguments.max_batches}: expected at least 1")
    checkpoint = open_puzzle_checkpoint(arguments.checkpoint)
    config = settings(checkpoint.config, arguments)
    data_paths = config.data_paths_test or config.data_paths
    data = PuzzleData(data_paths, arguments.split)
    checkpoint.check_data(data, data_paths)
    measurement = PuzzleMeasurement(config, data, data_paths)
    folder = output_folder(arguments.output_dir or checkpoint.folder)
    device = pick_device(config.device)
    arch = resolve_arch(config.arch, device)
    known = checkpoint.metadata
    model = RecursiveModel(arch, known.vocab_size, seq_len=known.seq_len, puzzles=known.num_puzzle_identifiers)
    load_weights(model, read_weights(checkpoint.folder), checkpoint.folder)
    model.to(device).eval()
    set_matmul_precision(config.tf32, device)
    if should_compile(config.compile, device):
        model.compile_levels()
    batches = evaluation_batch_count(data, config.global_batch_size)
    report = measurement.measure(
        model,
        folder,
        arguments.split,
        save=arguments.save_outputs,
        max_batches=arguments.max_batches,
        progress=partial(tqdm, desc=arguments.split, unit="batch", total=min(batches, arguments.max_batches or batches)),
    )
    metrics: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "split": arguments.split,
        "max_batches": arguments.max_batches,
        **report,
    }
    write_json(folder / f"metrics_{arguments.split}.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
