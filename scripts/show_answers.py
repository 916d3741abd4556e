"""Print the generated-answer scores of a metrics.json as a table: `python scripts/show_answers.py CHECKPOINT/metrics.json`."""

import json
import sys
from pathlib import Path


def table(metrics: dict) -> str:  # type: ignore[type-arg]
    """One line per family, then all of them, then the accuracy at each depth."""
    answers = metrics["answers"]
    lines = [f"{'family':14s} {'exact':>6s} {'95 % from':>9s} {'baseline':>8s} {'count':>6s}"]
    for name, score in [*answers["families"].items(), ("all", answers["overall"])]:
        lines.append(f"{name:14s} {score['accuracy']:6.1%} {score['lower_95']:9.1%} {score['baseline']:8.1%} {score['count']:6d}")
    depths = ", ".join(f"{accuracy:.1%} at {depth}" for depth, accuracy in enumerate(answers["by_act_step"], 1))
    lines.append(f"exact answers by ACT steps: {depths}")
    if metrics["worse_act_steps"]:
        lines.append(f"depth doesn't pay: the loss rises at ACT steps {metrics['worse_act_steps']}")
    lines.append(f"bits per byte {metrics['bits_per_byte']:.3f}, loss per token {metrics['loss_per_token']:.3f} nats")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
