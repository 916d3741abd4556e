"""Measure a puzzle checkpoint on a split: `python inference.py --checkpoint
checkpoints/<project>/<run>`.

With the run's data and batch size, the metrics equal those of the evaluation in training. Writes
metrics_<split>.json. With `--puzzle FILE` it solves your own puzzles instead, and writes nothing.
"""

import argparse
import json
import os
from typing import Any, get_args

from artifacts.outputs import output_folder, write_json
from artifacts.puzzle_checkpoint import open_puzzle_checkpoint
from config.compose import add_checkpoint_arguments, override_config, settings_of_checkpoint
from config.errors import UsageError, one_clear_message, refuse_several_ranks
from config.schema import PretrainPuzzleConfig, PuzzleOutputName, user_path
from dataset.puzzles.kinds import kind_of
from dataset.puzzles.loader import PuzzleData
from evaluators.own_puzzles import answer_file
from evaluators.puzzles import PuzzleMeasurement
from evaluators.search import Choice, Search
from models.device import keep_freed_memory


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_checkpoint_arguments(parser)
    add = parser.add_argument
    add(
        "--data-paths",
        "--data-dir",
        type=os.path.expanduser,
        nargs="+",
        metavar="DIR",
        help="folders of puzzle data; default: those of the run's evaluation",
    )
    add("--split", choices=("train", "test"), default="test", help="split to measure")
    add("--batch-size", type=int, help="rows at a time; default: global_batch_size of the run")
    add("--max-batches", type=int, help="stop after this many batches")
    add(
        "--puzzle",
        type=user_path,
        metavar="FILE",
        help="solve this Sudoku or maze (text, or CSV with a column question) or ARC task (JSON)",
    )
    add("--show", action="store_true", help="with --puzzle: show every ACT step")
    add("--samples", type=int, default=1, metavar="K", help="solve each puzzle K times; default: 1")
    add("--noise", type=float, default=0.0, metavar="S", help="standard deviation of the noise on the states of further samples")
    add("--symmetries", action="store_true", help="use symmetric forms of the puzzle for further samples")
    add("--choose", choices=get_args(Choice), default="halting", help="which answer to choose; default: halting")
    add("--output-dir", type=user_path, help="folder for metrics and saved tensors; default: the checkpoint's")
    names = get_args(PuzzleOutputName)
    add("--save-outputs", nargs="+", default=[], choices=names, metavar="KEY", help=f"tensors to save, of {', '.join(names)}")
    return parser.parse_args()


def settings(trained: PretrainPuzzleConfig, arguments: argparse.Namespace) -> PretrainPuzzleConfig:
    """The checkpoint's settings, overridden by the flags."""
    config = settings_of_checkpoint(trained, arguments)
    if arguments.batch_size is not None:
        config = override_config(config, [f"global_batch_size={arguments.batch_size}"])
    if arguments.data_paths is not None:
        config = config.model_copy(update={"data_paths_test": tuple(arguments.data_paths)})
    return config


def main() -> None:
    """Load, measure or solve, write, print."""
    arguments = parse_arguments()
    refuse_several_ranks()
    if arguments.max_batches is not None and arguments.max_batches < 1:
        raise UsageError(f"--max-batches {arguments.max_batches}: expected at least 1")
    if arguments.show and arguments.puzzle is None:
        raise UsageError("--show goes with --puzzle FILE")
    if arguments.puzzle is not None and (arguments.save_outputs or arguments.output_dir):
        raise UsageError("--puzzle writes nothing: --save-outputs and --output-dir are for measuring a split")
    checkpoint = open_puzzle_checkpoint(arguments.checkpoint)
    config = settings(checkpoint.config, arguments)
    kind = kind_of(checkpoint.metadata) if arguments.symmetries or arguments.choose == "rules" else None
    search = Search(arguments.samples, arguments.noise, arguments.symmetries, arguments.choose, config.seed, kind)
    if arguments.puzzle is not None:
        own = {"data_paths": arguments.data_paths or config.data_paths, "max_batches": arguments.max_batches}
        for told in answer_file(arguments.puzzle, checkpoint, config, search, show=arguments.show, **own):
            print(told)
        return
    own_paths = arguments.data_paths or (config.data_paths_test if arguments.split == "test" else None)
    data_paths = own_paths or config.data_paths
    data = PuzzleData(data_paths, arguments.split)
    checkpoint.check_data(data, data_paths)
    measurement = PuzzleMeasurement(config, data, data_paths)
    folder = output_folder(arguments.output_dir or checkpoint.folder)
    model = checkpoint.model(config)
    report = measurement.measure(
        model,
        folder,
        arguments.split,
        search=search,
        save=arguments.save_outputs,
        max_batches=arguments.max_batches,
        bar=arguments.split,
    )
    metrics: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "step": checkpoint.step,
        "split": arguments.split,
        "data_paths": list(data_paths),
        "max_batches": arguments.max_batches,
        "search": {key: getattr(search, key) for key in ("samples", "noise", "symmetries", "choose", "seed")},
        **report,
    }
    write_json(folder / f"metrics_{arguments.split}.json", metrics)
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
