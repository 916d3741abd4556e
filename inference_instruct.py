"""Measure a checkpoint on a split: `python inference_instruct.py --checkpoint
checkpoints/<project>/<run>`.

Computes teacher-forced metrics; for the bundled data also scores generated answers by family; with
--generate writes all generated answers as JSON lines. Writes metrics_<split>.json, and for the
whole test split at the run's settings metrics.json. torchrun's processes share the rows.
"""

import argparse
import json
import os
import sys
from typing import get_args

from artifacts.checkpoint import open_checkpoint
from artifacts.outputs import OUTPUT_FILL
from config.compose import add_model_arguments, override_config, settings_for_use
from config.errors import StoppedBySignal, UsageError, one_clear_message, stopped_by_sigterm
from config.schema import PretrainInstructConfig, user_path
from dataset.instruct import MeasuredSplit
from evaluators.split import measure_split
from models.device import keep_freed_memory
from models.distributed import joined_ranks
from training.loggers import log_measurement, wandb_mode


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_model_arguments(parser)
    add = parser.add_argument
    add("--split", choices=get_args(MeasuredSplit), default="test", help="split to measure")
    add("--batch-size", type=int, help="rows at a time; default: global_batch_size of the run")
    add("--max-batches", type=int, help="stop after this many batches of each source")
    add("--output-dir", type=user_path, help="folder for metrics and saved tensors; default: the checkpoint's")
    add(
        "--save-outputs",
        nargs="+",
        default=[],
        choices=OUTPUT_FILL,
        metavar="KEY",
        help=f"tensors to save, of {', '.join(OUTPUT_FILL)}",
    )
    add("--generate", action="store_true", help="also generate an answer to each row, into answers_<split>.jsonl")
    add("--max-generated", type=int, metavar="N", help="with --generate: only the first N rows of each source")
    add("--data-dir", type=os.path.expanduser, help="folder of the data; default: that of the run")
    add("--subset-size", type=int, help="rows of the split, of each source; default: that of the run")
    add("--seq-len", type=int, help="longest row; default: that of the run")
    add("--project-name", help="also log the metrics to this W&B project, as the run's `wandb` says")
    add("--run-name", help="name of that W&B run; default: that of the training run")
    return parser.parse_args()


def settings(trained: PretrainInstructConfig, arguments: argparse.Namespace) -> PretrainInstructConfig:
    """The checkpoint's settings, overridden by the flags."""
    used = settings_for_use(trained, arguments)
    if used.sources and arguments.data_dir is not None:
        raise UsageError(
            f"--data-dir: the run has the sources {', '.join(used.sources)}, each with its folder: "
            "move one with --overrides sources.NAME.data_dir=FOLDER"
        )
    flags = {
        "dataset.data_dir": arguments.data_dir,
        **{
            f"{section}.subset_size": arguments.subset_size
            for section in ("dataset", *(f"sources.{name}" for name in used.sources))
        },
        "dataset.seq_len": arguments.seq_len,
        "global_batch_size": arguments.batch_size,
    }
    given = [f"{key}={value}" for key, value in flags.items() if value is not None]
    return override_config(used, given)


def main() -> None:
    """Load, measure, write, print."""
    arguments = parse_arguments()
    for flag, value in (("--max-batches", arguments.max_batches), ("--max-generated", arguments.max_generated)):
        if value is not None and value < 1:
            raise UsageError(f"{flag} {value}: expected at least 1")
    if arguments.max_generated is not None and not arguments.generate:
        raise UsageError("--max-generated goes with --generate: give both")
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.tokenizer_path)
    config = settings(checkpoint.config, arguments)
    logs_to = wandb_mode(config)
    folder = arguments.output_dir or checkpoint.folder
    with stopped_by_sigterm(), joined_ranks(config.device, config.dist_timeout_minutes) as ranks:
        try:
            metrics = measure_split(
                checkpoint,
                config,
                arguments.split,
                folder,
                ranks=ranks,
                max_batches=arguments.max_batches,
                save=arguments.save_outputs,
                generate=arguments.generate,
                max_generated=arguments.max_generated,
            )
        except StoppedBySignal as stop:
            if ranks.is_first:
                reason = ", which torchrun sends when a rank has died" if ranks.size > 1 else ""
                print(f"stopped by {stop}{reason}: run the same command again", file=sys.stderr)
            raise
    if ranks.is_first:
        if arguments.project_name is not None:
            name = arguments.run_name or config.run_name or "inference"
            log_measurement(metrics, arguments.project_name, name, folder, logs_to)
        print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
