"""Cost and accuracy of depth at inference: a trained model's answers at fixed numbers of ACT steps
and with halting thresholds.

    python benchmarks/depth.py --checkpoint checkpoints/<project>/<run> [--thresholds 0.8 0.9 --rows 300]

All settings answer the same questions of the bundled data's test split, in turns, with the
checkpoint's other generation settings (by default greedy). Reports exact answers with 95 %
intervals, overall and by family; tokens per second of wall time, including prompts; ACT steps per
generated token (an answer's first one comes from the prompt, which takes all steps); and the
calibration error of the halting probability at each depth. The best setting is chosen on these same
answers. Markdown on stdout, the last line is JSON. Knows no training.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from artifacts.checkpoint import open_checkpoint
from benchmarks.common import markdown_table, parser, use_threads
from config.compose import override_config
from config.errors import UsageError, one_clear_message
from config.schema import PretrainInstructConfig, user_path
from dataset.instruct import Source, last_exchange
from dataset.text.conversation import Conversation
from dataset.text.loader import TextDataset
from evaluators.answer_scores import Score, is_exact, score_answers
from evaluators.calibration import record_halting, reliability
from generation import load
from generation.answers import Answer, Responder
from models.device import keep_freed_memory

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
# The accuracy that an adaptive setting may lose against the best fixed depth.
MARGIN = 0.005


class Question(NamedTuple):
    """A question, its reference answer, its family, and the number of dependent steps that it takes, if the row has it."""

    history: Conversation
    reference: str
    family: str
    hops: int | None


@dataclass
class Setting:
    """One depth setting, and its results."""

    act_steps: int
    threshold: float | None
    seconds: list[float] = field(default_factory=list)
    """Per round."""
    answers: list[Answer] = field(default_factory=list)
    """Of the last round."""

    @property
    def name(self) -> str:
        """Its name in the tables."""
        if self.threshold is not None:
            return f"threshold {self.threshold:g}"
        return f"{self.act_steps} ACT step{'s' if self.act_steps > 1 else ''}"

    @property
    def tokens(self) -> int:
        """Generated tokens per round, including EOS."""
        return sum(len(answer.act_steps) for answer in self.answers)

    @property
    def mean_act_steps(self) -> float:
        """Mean ACT steps per generated token."""
        return sum(sum(answer.act_steps) for answer in self.answers) / self.tokens

    @property
    def tokens_per_second(self) -> list[float]:
        """Per round."""
        return [self.tokens / seconds for seconds in self.seconds]

    def right(self, questions: Sequence[Question]) -> list[bool]:
        """Whether each answer is exact."""
        return [is_exact(question.reference, answer.text) for question, answer in zip(questions, self.answers, strict=True)]


def choose(settings: Sequence[Setting], questions: Sequence[Question]) -> tuple[Setting, Setting | None]:
    """The most exact fixed depth (ties: the shallowest), and the fastest threshold within `MARGIN`, if there is one."""
    right = {id(setting): sum(setting.right(questions)) for setting in settings}
    fixed = [setting for setting in settings if setting.threshold is None]
    best = max(fixed, key=lambda setting: (right[id(setting)], -setting.act_steps))
    least = right[id(best)] - MARGIN * len(questions)
    good = [setting for setting in settings if setting.threshold is not None and right[id(setting)] >= least]
    return best, max(good, key=lambda setting: statistics.median(setting.tokens_per_second), default=None)


def ask(split: TextDataset, responder: Responder, rows: int) -> list[Question]:
    """The last questions of the first `rows` rows, if they leave room for an answer. Raises
    UsageError if there are none.
    """
    questions = []
    for index in range(rows):
        exchange = last_exchange(split.conversation(index))
        if exchange is not None and responder.fits(exchange[0]):
            row = split.row(index)
            questions.append(Question(*exchange, str(row.get("task", "no task")), row.get("hops")))
    if not questions:
        raise UsageError(
            f"no question of the test split leaves room for an answer in {responder.context} tokens: raise dataset.seq_len"
        )
    return questions


def measure(responder: Responder, questions: Sequence[Question], settings: Sequence[Setting], rounds: int) -> None:
    """Answer all questions with all settings, in turns, `rounds` times; stores the results."""
    histories = [question.history for question in questions]
    for setting in settings:  # warm up
        responder.at_depth(setting.act_steps, setting.threshold).answers(histories[: responder.rows])
    for _, setting in tqdm([(r, setting) for r in range(rounds) for setting in settings], desc="answering", unit="setting"):
        at_depth = responder.at_depth(setting.act_steps, setting.threshold)
        started = time.perf_counter()
        setting.answers = at_depth.answers(histories)
        setting.seconds.append(time.perf_counter() - started)


def calibration(responder: Responder, split: TextDataset, config: PretrainInstructConfig, rows: int) -> list[dict[str, Any]]:
    """Calibration of the halting probability at each depth, on rows that
    scripts/calibrate_halting.py doesn't fit on.
    """
    records = record_halting(
        responder.model,
        split,
        batch_size=config.global_batch_size,
        act_steps=responder.options.act_steps,
        limit=rows,
        pad_multiple=config.pad_multiple,
    )
    found = []
    for record, (scale, shift) in zip(records, responder.model.halt_calibration.T.tolist(), strict=False):
        measured = record.half(odd=True)
        as_used = reliability(measured, scale, shift)
        found.append({**dataclasses.asdict(as_used), "ece_uncalibrated": reliability(measured).ece})
    return found


def with_interval(score: Score) -> str:
    """Percent exact and the ends of its 95 % interval."""
    return f"{score['accuracy']:.1%} [{score['lower_95']:.1%}, {score['upper_95']:.1%}]".replace("%", "")


def spread(values: Sequence[float]) -> list[float]:
    """Median, least and most."""
    return [statistics.median(values), min(values), max(values)]


def speed_ratio(setting: Setting, to: Setting) -> list[float]:
    """The `spread` over the rounds of tokens per second relative to `to`."""
    return spread([ours / theirs for ours, theirs in zip(setting.tokens_per_second, to.tokens_per_second, strict=True)])


def report(settings: Sequence[Setting], questions: Sequence[Question]) -> dict[str, Any]:
    """The results of all settings, and the chosen one against the best fixed depth, as JSON values."""
    best, adaptive = choose(settings, questions)
    families, references = [question.family for question in questions], [question.reference for question in questions]
    rows = [
        {
            "name": setting.name,
            "act_steps": setting.act_steps,
            "threshold": setting.threshold,
            **score_answers(families, references, [answer.text for answer in setting.answers]),
            "mean_act_steps": setting.mean_act_steps,
            "tokens": setting.tokens,
            "tokens_per_second": setting.tokens_per_second,
            "ratio_to_best_fixed": speed_ratio(setting, best),
        }
        for setting in settings
    ]
    chosen: dict[str, Any] = {"best_fixed": best.name, "margin": MARGIN, "setting": None}
    if adaptive is not None:
        pairs = list(zip(adaptive.right(questions), best.right(questions), strict=True))
        gained, lost = (sum(ours > theirs for ours, theirs in pairs), sum(ours < theirs for ours, theirs in pairs))
        chosen |= {"setting": adaptive.name, "ratio": speed_ratio(adaptive, best)[0], "gained": gained, "lost": lost}
    return {"settings": rows, "chosen": chosen}


def markdown(found: dict[str, Any]) -> str:
    """The tables, and the choice."""
    settings, chosen = found["settings"], found["chosen"]
    overall = [
        {
            "setting": row["name"],
            "% exact [95 % interval]": with_interval(row["overall"]),
            "ACT steps a token": f"{row['mean_act_steps']:.2f}",
            "tokens/s (least to most)": "{:.0f} ({:.0f} to {:.0f})".format(*spread(row["tokens_per_second"])),
            "speed to the best fixed depth": f"{row['ratio_to_best_fixed'][0]:.2f}",
        }
        for row in settings
    ]
    by_family = [
        {
            "% exact [95 % interval]": family,
            "answers": str(score["count"]),
            **{row["name"]: with_interval(row["families"][family]) for row in settings},
        }
        for family, score in settings[0]["families"].items()
    ]
    by_depth = [
        {
            "ACT steps": str(depth),
            "tokens": str(row["tokens"]),
            "argmax right": f"{row['accuracy']:.1%}",
            "mean halting probability": f"{row['predicted']:.1%}",
            "ECE": f"{row['ece']:.2%}",
            "ECE uncalibrated": f"{row['ece_uncalibrated']:.2%}",
        }
        for depth, row in enumerate(found["calibration"], 1)
    ]
    by_name = {row["name"]: row for row in settings}

    def told(label: str, row: dict[str, Any]) -> str:
        ratio, least, most = row["ratio_to_best_fixed"]
        speed = f"{ratio:.2f} times the best fixed depth's speed ({least:.2f} to {most:.2f} over the rounds)"
        steps = f"{row['mean_act_steps']:.2f} ACT steps a token"
        return f"- {label}: {row['name']}, {with_interval(row['overall'])} % exact, {steps}, {speed}"

    choice = f"- chosen: none, no threshold is within {MARGIN * 100:g} points of the best fixed depth"
    if chosen["setting"] is not None:
        choice = f"{told('chosen', by_name[chosen['setting']])}; {chosen['gained']} answers gained, {chosen['lost']} lost"
    told_of = [told("best fixed depth", by_name[chosen["best_fixed"]]), told("depth 1", settings[0]), choice]
    tables = (line for rows in (overall, by_family, by_depth) for line in (*markdown_table(rows), ""))
    return "\n".join([*tables, *told_of])


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    flags = parser(__doc__, "checkpoint", "threads", "overrides")
    add = flags.add_argument
    add("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="halting thresholds, beside the fixed depths")
    add("--rows", type=int, help="use only this many rows, the first of the test split")
    add("--rounds", type=int, default=3, help="how often every setting answers every question")
    add("--output", type=user_path, help="also write the JSON to this file")
    arguments = flags.parse_args()
    if arguments.rounds < 1:
        raise UsageError(f"--rounds {arguments.rounds}: expected at least 1")
    if arguments.rows is not None and arguments.rows < 2:
        raise UsageError(f"--rows {arguments.rows}: expected at least 2, because calibration is measured on every other row")
    wrong = [threshold for threshold in arguments.thresholds if not 0 < threshold < 1]
    if wrong:
        raise UsageError(f"--thresholds {wrong[0]:g}: expected probabilities above 0 and below 1")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise UsageError(f"--output {arguments.output}: there is no folder {arguments.output.parent}; make it first")
    return arguments


def main() -> None:
    """Load, measure, choose, print."""
    arguments = parse_arguments()
    threads = use_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = override_config(checkpoint.config, arguments.overrides)
    if config.dataset.source != "sample":
        raise UsageError(
            f"the depth table needs answers that are right or wrong: those of the bundled data have one, and dataset.source is "
            f"{config.dataset.source}; train on dataset=sample, or take inference_instruct.py's by_act_step for text"
        )
    split = Source(config.dataset).open_split("test", checkpoint.tokenizer, checkpoint.template)
    rows = min(len(split), arguments.rows or len(split))
    responder = load(checkpoint, config)
    deepest = responder.options.act_steps
    settings = [Setting(depth, None) for depth in range(1, deepest + 1)]
    settings += [Setting(deepest, threshold) for threshold in sorted(set(arguments.thresholds))]
    questions = ask(split, responder, rows)
    measure(responder, questions, settings, arguments.rounds)
    found = {
        **report(settings, questions),
        "calibration": calibration(responder, split, config, rows),
        "checkpoint": str(checkpoint.folder),
        "questions": len(questions),
        "longer_than_context": rows - len(questions),
        "batch_size": responder.rows,
        "dtype": responder.model.config.forward_dtype,
        "threads": threads,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    print(markdown(found))
    print(json.dumps(found))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    keep_freed_memory()
    with one_clear_message():
        main()
