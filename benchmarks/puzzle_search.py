"""How much a puzzle checkpoint gains from several samples: K = 1, 2, 4 ... with every choice.

    python -m benchmarks.puzzle_search --checkpoint checkpoints/TRM-puzzles/sudoku --samples 16 --symmetries

All samples run all ACT steps once. Results for fewer samples, and for choices that stop samples
early, are computed from each sample's answers and halting logits at each step. Fractions have
Wilson's 95 % interval. Last line: JSON.
"""

import argparse
import dataclasses
import json
import os
from typing import Any, get_args

import torch
from torch import Tensor

from artifacts.puzzle_checkpoint import open_puzzle_checkpoint
from benchmarks.common import parser, use_threads
from config.errors import one_clear_message
from dataset.puzzles.kinds import kind_of
from dataset.puzzles.loader import PuzzleData
from evaluators.answer_scores import wilson_lower_bound
from evaluators.puzzles import PuzzleOutput, evaluate_puzzles
from evaluators.search import Choice, Search
from models.device import keep_freed_memory


def is_right(output: PuzzleOutput) -> Tensor:
    """Which samples are right after each ACT step, bool [B, K, S]."""
    labels_B11T = output.labels_BT[:, None, None]
    return ((output.preds_BKST == labels_B11T) | (labels_B11T < 0)).all(dim=3)


def outcomes(output: PuzzleOutput, search: Search) -> tuple[Tensor, Tensor]:
    """The result of `search`, with at most `output`'s samples: whether the answer is right, bool
    [B], and total ACT steps [B].

    Samples halt by their halting logit alone, as in the trm family.
    """
    samples, act_steps = search.samples, output.preds_BKST.shape[2]
    preds_BKST, halt_logits_BKS = output.preds_BKST[:, :samples], output.halt_logits_BKS[:, :samples]
    is_right_BKS = is_right(output)
    everyone_B = torch.arange(len(preds_BKST))
    is_right_B, steps_B = torch.zeros_like(everyone_B, dtype=torch.bool), torch.zeros_like(everyone_B)
    for step in range(act_steps):
        logits_BK = halt_logits_BKS[..., step]
        chosen_B, is_settled_B = search.choice(output.inputs_BT, preds_BKST[:, :, step], logits_BK, logits_BK > 0)
        ends_B = (steps_B == 0) & (is_settled_B | (step == act_steps - 1))
        is_right_B[ends_B] = is_right_BKS[everyone_B, chosen_B, step][ends_B]
        steps_B[ends_B] = samples * (step + 1)
    return is_right_B, steps_B


def share(right_B: Tensor) -> dict[str, float]:
    """The fraction of true values, and its interval."""
    right, count = int(right_B.sum()), len(right_B)
    return {
        "share": right / count,
        "lower_95": wilson_lower_bound(right, count),
        "upper_95": 1 - wilson_lower_bound(count - right, count),
    }


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of samples and choice, and for the oracle choice."""
    checkpoint = open_puzzle_checkpoint(options.checkpoint)
    config, kind = checkpoint.config, kind_of(checkpoint.metadata)
    paths = options.data_paths or config.data_paths_test or config.data_paths
    data = PuzzleData(paths, "test")
    checkpoint.check_data(data, paths)
    most = Search(options.samples, options.noise, options.symmetries, seed=config.seed, kind=kind)
    outputs: list[PuzzleOutput] = []
    at_once = most.puzzles_at_once(config.global_batch_size)
    evaluate_puzzles(
        checkpoint.model(config),
        data,
        batch_size=at_once,
        search=most,
        max_batches=options.max_puzzles and -(-options.max_puzzles // at_once),
        on_output=outputs.append,
        bar="samples",
    )
    rows = []
    for samples in (2**power for power in range(options.samples.bit_length())):
        alone: dict[str, Any] = {"noise": 0.0, "symmetries": False} if samples == 1 else {}
        for choose in get_args(Choice):
            if choose == "rules" and not kind.has_rules:
                continue
            few = dataclasses.replace(most, samples=samples, choose=choose, **alone)
            right_B, steps_B = (torch.cat(parts) for parts in zip(*(outcomes(output, few) for output in outputs), strict=True))
            rows.append({"samples": samples, "choose": choose, **share(right_B), "act_steps": steps_B.double().mean().item()})
        any_right_B = torch.cat([is_right(output)[:, :samples, -1].any(dim=1) for output in outputs])
        act_steps = samples * config.arch.halt_max_steps
        rows.append({"samples": samples, "choose": "oracle", **share(any_right_B), "act_steps": act_steps})
    return rows


def main() -> None:
    """A table, then JSON."""
    flags = parser(__doc__, "checkpoint", "threads")
    flags.add_argument("--data-paths", type=os.path.expanduser, nargs="+", metavar="DIR", help="default: the run's")
    flags.add_argument("--samples", type=int, default=16, metavar="K", help="maximum number of samples")
    flags.add_argument("--noise", type=float, default=0.0, metavar="S", help="as of inference.py")
    flags.add_argument("--symmetries", action="store_true", help="as of inference.py")
    flags.add_argument("--max-puzzles", type=int, help="measure about this many of the first test puzzles")
    options = flags.parse_args()
    threads = use_threads(options.threads)
    rows = measure(options)
    for row in rows:
        within = f"{100 * row['lower_95']:5.1f} to {100 * row['upper_95']:5.1f} %"
        print(f"{row['samples']:4} {row['choose']:8} {100 * row['share']:5.1f} %  ({within})  {row['act_steps']:6.1f} ACT steps")
    print(json.dumps({"checkpoint": str(options.checkpoint), "threads": threads, "rows": rows}))


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
