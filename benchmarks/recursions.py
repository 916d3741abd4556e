"""Compares the five recursions on small Sudoku, each trained for the same FLOPs.

    python -m dataset.build_small_puzzles sudoku --output-dir data/sudoku6
    python -m benchmarks.recursions --data-path data/sudoku6 --tera-flops 30

Every recursion is the preset sudoku_small with another `arch`, and as many blocks in an ACT step as
TRM. The FLOPs of one optimizer step are counted, forward and backward. The recursion then trains
for the number of steps in the budget, where its schedule ends, and is measured on the held-out
puzzles at every ACT step. Last line: JSON.
"""

import json
import math
import os
import time
from typing import Any

from benchmarks.common import flop_counter, parser, use_threads
from config.compose import compose_as
from config.errors import one_clear_message
from config.schema import PretrainPuzzleConfig, user_path
from dataset.puzzles.loader import PuzzleData
from evaluators.puzzles import evaluate_puzzles
from models.act import RecursiveModel
from models.device import keep_freed_memory, pick_device, resolve_arch
from training.loop import Trainer
from training.puzzle import PuzzleTask

# Settings besides the preset's, in which TRM applies two blocks three times per ACT step.
RECURSIONS = {
    "trm": [],
    "trm_singlez": [],
    "trm_hier6": [],
    "hrm": ["arch.H_layers=2", "arch.L_layers=2"],
    "transformers_baseline": ["arch.H_layers=6", "arch.L_cycles=0"],
}


def puzzle_config(settings: list[str]) -> PretrainPuzzleConfig:
    """cfg_pretrain with these settings, forward_dtype resolved."""
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", settings)
    return config.model_copy(update={"arch": resolve_arch(config.arch, pick_device(config.device))})


def configured(name: str, data_path: str, overrides: list[str], steps: int) -> PretrainPuzzleConfig:
    """The preset with recursion `name`, with enough passes over the data for `steps` batches."""
    settings = [f"arch={name}", "experiment=sudoku_small", f"data_paths=[{data_path}]", *RECURSIONS[name], *overrides]
    config = puzzle_config(settings)
    data = PuzzleData([data_path], "train")
    epochs = 1 + math.ceil(steps / max(1, data.metadata.total_steps(1, config.global_batch_size)))
    return config.model_copy(update={"epochs": epochs, "eval_interval": epochs})


def trainer_of(config: PretrainPuzzleConfig, steps: int) -> Trainer:
    """A trainer whose schedule and data end after `steps` steps."""
    data = PuzzleData(config.data_paths, "train")
    meta = data.metadata
    model = RecursiveModel(
        config.arch, meta.vocab_size, seed=config.seed, seq_len=meta.seq_len, puzzles=meta.num_puzzle_identifiers
    )
    model.to(pick_device(config.device))
    task = PuzzleTask(config, model, data)
    task.total_steps = steps
    return Trainer(config, model, task)


def measure(name: str, data_path: str, overrides: list[str], flops: float) -> dict[str, Any]:
    """Count, train, evaluate: one row of the table."""
    counted = trainer_of(configured(name, data_path, overrides, 1), 1)
    with flop_counter() as counter:
        list(counted.steps())
    per_step = counter.get_total_flops()
    steps = max(1, int(flops / per_step))
    config = configured(name, data_path, overrides, steps)
    trainer = trainer_of(config, steps)
    started = time.perf_counter()
    for result in trainer.steps():
        if result.step % 100 == 0:
            print(f"{name}: step {result.step} of {steps}, {time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    with trainer.averaged_weights():
        test = PuzzleData(config.data_paths, "test")
        report = evaluate_puzzles(trainer.model, test, batch_size=config.global_batch_size)
    return {
        "recursion": name,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "flops_per_step": per_step,
        "steps": steps,
        "seconds": seconds,
        **{key: report[key] for key in ("exact_accuracy", "exact_accuracy_by_act_step", "accuracy", "lm_loss")},
    }


def main() -> None:
    """One recursion after the other; a table, then JSON."""
    flags = parser(__doc__, "threads", "overrides")
    folder = "folder of dataset/build_small_puzzles.py"
    flags.add_argument("--data-path", type=os.path.expanduser, default="data/sudoku6", help=folder)
    flags.add_argument("--tera-flops", type=float, default=30.0, help="operations of each training, in 10^12")
    flags.add_argument("--recursions", nargs="+", choices=RECURSIONS, default=list(RECURSIONS), metavar="NAME")
    flags.add_argument("--output", type=user_path, help="file for the JSON of the last line")
    options = flags.parse_args()
    threads = use_threads(options.threads)
    rows = [measure(name, options.data_path, options.overrides, 1e12 * options.tera_flops) for name in options.recursions]
    for row in rows:
        print(f"{row['recursion']:22} {row['steps']:6} steps  {row['seconds']:6.0f} s  exact {row['exact_accuracy']:.3f}")
    report = {"tera_flops": options.tera_flops, "threads": threads, "rows": rows}
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
