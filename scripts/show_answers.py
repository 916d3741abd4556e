"""Print the scores of a checkpoint's generated answers as a table.

    python scripts/show_answers.py checkpoints/<project>/<run> [--split train|test_deeper]

Takes a run's folder (for its newest checkpoint), a checkpoint, or a metrics file of
inference_instruct.py. For a folder it shows the whole test split, or the one named by --split.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from artifacts.checkpoint import newest_checkpoint
from config.errors import UsageError, one_clear_message
from config.schema import user_path
from evaluators.answer_scores import Score


def read_metrics(path: Path, split: str | None) -> dict[str, Any]:
    """Read metrics with answers, from a file or a folder of a checkpoint. Raises UsageError."""
    if path.is_dir():
        path = newest_checkpoint(path) / ("metrics.json" if split is None else f"metrics_{split}.json")
    try:
        metrics = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}; write it with inference_instruct.py") from error
    if split is not None and isinstance(metrics, dict) and metrics.get("split") != split:
        raise UsageError(f"{path} is of the split {metrics.get('split')}, not of {split}: name the folder, or leave out --split")
    if not isinstance(metrics, dict) or "answers" not in metrics:
        raise UsageError(f"{path} has no generated answers: only the bundled data's are scored (dataset=sample)")
    return metrics


def table(metrics: dict[str, Any]) -> str:
    """Lines for each family and for all, the accuracy at each depth; for deep families hops."""
    answers = metrics["answers"]
    lines = [f"{metrics['rows']:,} of {metrics['rows_of_split']:,} rows of the {metrics['split']} split, {metrics['checkpoint']}"]
    width = max(14, *map(len, answers["families"]))
    lines += [f"{'family':{width}s} {'exact':>6s} {'95 % from':>9s} {'baseline':>8s} {'count':>6s}"]
    for name, score in [*answers["families"].items(), ("all", answers["overall"])]:
        lines.append(
            f"{name:{width}s} {score['accuracy']:6.1%} {score['lower_95']:9.1%} {score['baseline']:8.1%} {score['count']:6d}"
        )
    depths = ", ".join(f"{accuracy:.1%} at {depth}" for depth, accuracy in enumerate(answers["by_act_step"], 1))
    lines.append(f"exact answers by ACT steps: {depths}")
    lines += by_hops(answers.get("by_hops", {}))
    if metrics["worse_act_steps"]:
        lines.append(f"depth doesn't pay: the loss rises at ACT steps {metrics['worse_act_steps']}")
    lines.append(f"bits per byte {metrics['bits_per_byte']:.3f}, loss per token {metrics['loss_per_token']:.3f} nats")
    return "\n".join(lines)


def by_hops(hops: dict[str, dict[str, Any]]) -> list[str]:
    """Percent exact with 95 % interval, by hops: all at each depth, then families at the last."""
    if not hops:
        return []
    columns = [of["by_act_step"] for of in hops.values()]
    rows = [(f"all at {depth}", [scores["overall"] for scores in at]) for depth, at in enumerate(zip(*columns, strict=True), 1)]
    last = [column[-1]["families"] for column in columns]
    rows += [(name, [families.get(name) for families in last]) for name in sorted(set().union(*last))]
    lines = ["exact by hops    " + "".join(f"{number:>16s}" for number in hops)]
    lines += [f"{name:17s}" + "".join(f"{_with_interval(score):>16s}" for score in scores) for name, scores in rows]
    return [*lines, "ACT steps a token" + "".join(f"{of['mean_act_steps']:16.2f}" for of in hops.values())]


def _with_interval(score: Score | None) -> str:
    if score is None:  # a part of a split may have no rows of a family with this number of hops
        return "-"
    return f"{100 * score['accuracy']:.1f} [{100 * score['lower_95']:.0f}, {100 * score['upper_95']:.0f}]"


def main(arguments: list[str] | None = None) -> None:
    """Read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=user_path, help="folder of a run or of a checkpoint, or a metrics file")
    parser.add_argument("--split", choices=("train", "test", "test_deeper"), help="for a folder: last measurement of this split")
    options = parser.parse_args(arguments)
    with one_clear_message():
        print(table(read_metrics(options.path, options.split)))


if __name__ == "__main__":
    main()
