"""Calibrate a checkpoint's halting probabilities on held-out text: at 0.9, nine tokens in ten are
then right.

    python scripts/calibrate_halting.py --checkpoint checkpoints/<project>/<run>

Fits on even rows of the split, prints the calibration error on odd rows, and writes halting.json to
the checkpoint's folder, where every use of the checkpoint reads it. Knows no formula.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artifacts.checkpoint import open_checkpoint
from artifacts.halting import HaltingCalibration, write_halting_calibration
from config.compose import CHECKPOINT_HELP, override_config
from config.errors import UsageError, one_clear_message, refuse_several_ranks
from config.schema import user_path
from dataset.instruct import open_run_split
from evaluators.calibration import DepthCalibration, calibrate_halting, record_halting
from generation.loading import load_model
from models.device import keep_freed_memory


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=user_path, required=True, help=CHECKPOINT_HELP)
    add("--split", choices=("train", "test"), default="test", help="train: overestimates the accuracy, since the model has seen it")
    add("--max-rows", type=int, help="use only this many rows, the first of the split")
    add("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the checkpoint's")
    return parser.parse_args()


def table(depths: Sequence[DepthCalibration]) -> str:
    """One line for each depth, measured on the tokens that weren't used to fit."""
    lines = [f"{'ACT steps':>9s} {'tokens':>7s} {'accuracy':>8s} {'predicted':>16s} {'ECE':>16s} {'scale':>7s} {'shift':>7s}"]
    for depth, found in enumerate(depths, 1):
        predicted = f"{found.before.predicted:.1%} -> {found.after.predicted:.1%}"
        error = f"{found.before.ece:.2%} -> {found.after.ece:.2%}"
        measured = f"{found.before.tokens:7d} {found.before.accuracy:8.1%} {predicted:>16s} {error:>16s}"
        lines.append(f"{depth:9d} {measured} {found.scale:7.3f} {found.shift:7.3f}")
    return "\n".join(lines)


def main() -> None:
    """Measure, fit, write, print."""
    arguments = parse_arguments()
    refuse_several_ranks()
    if arguments.max_rows is not None and arguments.max_rows < 2:
        raise UsageError(f"--max-rows {arguments.max_rows}: expected at least 2, one to fit on and one to measure on")
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = override_config(checkpoint.config, arguments.overrides)
    split = open_run_split(config, checkpoint.tokenizer, checkpoint.template, arguments.split)
    records = record_halting(
        load_model(checkpoint, config),
        split,
        batch_size=config.global_batch_size,
        act_steps=checkpoint.config.arch.halt_max_steps,
        limit=arguments.max_rows,
        pad_multiple=config.pad_multiple,
        progress=partial(tqdm, desc=arguments.split, unit="batch"),
    )
    depths = calibrate_halting(records)
    path = write_halting_calibration(
        checkpoint,
        HaltingCalibration(tuple(depth.scale for depth in depths), tuple(depth.shift for depth in depths)),
        measured={
            "split": arguments.split,
            "rows": min(len(split), arguments.max_rows or len(split)),
            "by_act_step": [dataclasses.asdict(depth) for depth in depths],
        },
    )
    print(table(depths))
    print(f"fitted on even rows, measured on odd ones; predicted and ECE before -> after calibration\nwrote {path}")


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
