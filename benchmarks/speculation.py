"""Speculation of a row on itself: the same answers one at a time, with and without drafts of few ACT steps.

    python benchmarks/speculation.py --checkpoint checkpoints/<project>/<run> [--draft-tokens 2 4 8 --rows 100]

Each number of drafted tokens answers the same questions of the test split in turns, prompts included. Greedy answers must come out
the same but for rounding (a batch of tokens is multiplied in another order than a single one). Last line: JSON.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from artifacts.checkpoint import open_checkpoint
from benchmarks.common import use_threads
from config.compose import CHECKPOINT_HELP, override_config
from config.errors import one_clear_message
from config.schema import user_path
from dataset.instruct import last_exchange, open_instruct_split
from dataset.text.conversation import Conversation
from generation.answers import Responder
from generation.loading import load_responder
from models.device import keep_freed_memory


def answer_all(responder: Responder, histories: list[Conversation]) -> tuple[float, list[list[int]]]:
    """Seconds, and the ids of every answer."""
    started = time.perf_counter()
    ids = [responder.answers([history])[0].ids for history in histories]
    return time.perf_counter() - started, ids


def main() -> None:
    """Parse, measure in turns, print."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--checkpoint", type=user_path, required=True, help=CHECKPOINT_HELP)
    flags.add_argument("--draft-tokens", type=int, nargs="+", default=[2, 4, 8], help="numbers of drafted tokens to try")
    flags.add_argument("--draft-act-steps", type=int, default=1, help="ACT steps behind a drafted token")
    flags.add_argument("--act-steps", type=int, help="depth of the answers; default: the checkpoint's")
    flags.add_argument("--rows", type=int, default=100, help="questions")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--threads", type=int)
    flags.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = flags.parse_args()
    keep_freed_memory()
    threads = use_threads(arguments.threads)
    checkpoint = open_checkpoint(arguments.checkpoint)
    config = override_config(checkpoint.config, ["generation.temperature=0", *arguments.overrides])
    split = open_instruct_split(config.dataset, checkpoint.tokenizer, checkpoint.template, "test")
    plain = load_responder(checkpoint, config)
    plain = plain.at_depth(arguments.act_steps or plain.options.act_steps)
    # Every few rows, because a split may be sorted by family.
    chosen = range(0, len(split), max(1, len(split) // arguments.rows))
    exchanges = [exchange for i in chosen if (exchange := last_exchange(split.conversation(i))) is not None]
    histories = [history for history, _ in exchanges if plain.fits(history)]
    drafting = {
        count: dataclasses.replace(plain, draft_tokens=count, draft_act_steps=arguments.draft_act_steps)
        for count in [0, *arguments.draft_tokens]
    }
    seconds: dict[int, list[float]] = {count: [] for count in drafting}
    said: dict[int, list[list[int]]] = {}
    for responder in drafting.values():
        answer_all(responder, histories[:5])
    for _ in range(arguments.rounds):
        for count, responder in drafting.items():
            spent, said[count] = answer_all(responder, histories)
            seconds[count].append(spent)
    tokens = sum(map(len, said[0]))
    report: dict[str, Any] = {
        "answers": len(histories),
        "tokens": tokens,
        "act_steps": plain.options.act_steps,
        "draft_act_steps": arguments.draft_act_steps,
        "dtype": plain.model.config.forward_dtype,
        "threads": threads,
        "torch": torch.__version__,
        "by_draft_tokens": {},
    }
    without = statistics.median(seconds[0])
    print("| drafted tokens | tokens/s | times as fast | same answers |\n|---|---|---|---|")
    for count in drafting:
        spent = statistics.median(seconds[count])
        same = sum(a == b for a, b in zip(said[count], said[0], strict=True))
        print(f"| {count} | {tokens / spent:.1f} | {without / spent:.2f} | {same} of {len(histories)} |")
        report["by_draft_tokens"][count] = {"seconds": spent, "ratio": without / spent, "same_answers": same}
    print(json.dumps(report))


if __name__ == "__main__":
    with one_clear_message():
        main()
