"""Measure a checkpoint on a split: `python inference_instruct.py --checkpoint
checkpoints/<project>/<run>`.

Computes teacher-forced metrics; for the bundled data also scores generated answers by family; with
--generate writes all generated answers as JSON lines. Writes metrics_<split>.json, and for the
whole test split at the run's settings metrics.json. torchrun's processes share the rows.
"""

from config import environment  # noqa: F401  (before tqdm)

# isort: split

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tqdm import tqdm

from artifacts.checkpoint import Checkpoint, open_checkpoint
from artifacts.outputs import OUTPUT_FILL, SavedOutputs, output_folder, write_json
from config.compose import add_model_arguments, override_config, settings_for_use
from config.errors import StoppedBySignal, UsageError, one_clear_message, stopped_by_sigterm
from config.schema import PretrainInstructConfig, user_path
from dataset.instruct import MeasuredSplit, open_run_split
from evaluators.generated import evaluate_generated, write_generated
from evaluators.language import DepthOutput, evaluate_sources
from generation import load
from models.device import keep_freed_memory
from models.distributed import Ranks, joined_ranks
from training.loggers import wandb_mode


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


def log_to_wandb(metrics: dict[str, Any], project: str, run: str, folder: Path, mode: str) -> None:
    """Log the numbers among `metrics`. mode: from `wandb_mode`."""
    if mode == "disabled":
        return
    import wandb

    online: Literal["online", "offline"] = "online" if mode == "online" else "offline"
    with wandb.init(project=project, name=run, job_type="inference", dir=str(folder), mode=online) as logged:
        logged.log({f"{metrics['split']}/{key}": value for key, value in metrics.items() if isinstance(value, int | float)})


def _how_it_is_measured(config: PretrainInstructConfig) -> tuple[int, float | None, int]:
    """Depth, halting threshold and length of a row: figures that differ in these don't compare."""
    return config.depth, config.generation.halt_threshold, config.dataset.seq_len


def measure(
    checkpoint: Checkpoint, config: PretrainInstructConfig, arguments: argparse.Namespace, logs_to: str, ranks: Ranks
) -> None:
    """Measure the split, shared by `ranks`; the first writes. logs_to: for `log_to_wandb`."""
    split = open_run_split(config, checkpoint.tokenizer, checkpoint.template, arguments.split)
    responder = load(checkpoint, config)
    folder = output_folder(arguments.output_dir or checkpoint.folder)
    saved = SavedOutputs(arguments.save_outputs)

    def keep(output: DepthOutput) -> None:
        saved.add(torch.from_numpy(output.rows), output.tensors())

    result = evaluate_sources(
        responder.model,
        split,
        eos_id=checkpoint.tokenizer.eos_id,
        batch_size=config.global_batch_size,
        act_steps=responder.options.act_steps,
        halt_threshold=responder.options.halt_threshold,
        max_batches=arguments.max_batches,
        ranks=ranks,
        pad_multiple=config.pad_multiple,
        on_output=keep if saved.keys else None,
        progress=partial(tqdm, desc=arguments.split, unit="batch", disable=not ranks.is_first),
    )
    most = arguments.max_batches and arguments.max_batches * config.global_batch_size
    rows = split.first_rows(most)
    metrics: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "split": arguments.split,
        "rows": len(rows),
        "rows_of_split": len(split),
        "max_batches": arguments.max_batches,
        "act_steps": config.depth,
        "halt_threshold": config.generation.halt_threshold,
        "seq_len": config.dataset.seq_len,
        "sources": {
            name: {"data_dir": source.data_dir, "subset_size": source.subset_size} for name, source in config.all_sources.items()
        },
        **result.report(),
    }
    if all(source.source == "sample" for source in config.all_sources.values()):
        metrics["answers"] = evaluate_generated(responder, split, rows=rows, ranks=ranks)
    if arguments.generate:
        path = folder / f"answers_{arguments.split}.jsonl"
        fewest = min((number for number in (most, arguments.max_generated) if number is not None), default=None)
        metrics["generated"] = write_generated(responder, split, path, rows=split.first_rows(fewest), ranks=ranks)
    saved.gather(ranks)
    if ranks.is_first:
        if saved.has_rows:
            saved.write(folder / f"outputs_{arguments.split}.safetensors")
        write_json(folder / f"metrics_{arguments.split}.json", metrics)
        is_whole = arguments.split == "test" and arguments.max_batches is None
        if is_whole and _how_it_is_measured(config) == _how_it_is_measured(checkpoint.config):
            write_json(folder / "metrics.json", metrics)
        if arguments.project_name is not None:
            log_to_wandb(metrics, arguments.project_name, arguments.run_name or config.run_name or "inference", folder, logs_to)
        print(json.dumps(metrics, indent=2))


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
    with stopped_by_sigterm(), joined_ranks(config.device, config.dist_timeout_minutes) as ranks:
        try:
            measure(checkpoint, config, arguments, logs_to, ranks)
        except StoppedBySignal as stop:
            if ranks.is_first:
                reason = ", which torchrun sends when a rank has died" if ranks.size > 1 else ""
                print(f"stopped by {stop}{reason}: run the same command again", file=sys.stderr)
            raise


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
