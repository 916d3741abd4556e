"""The dry run: what a run would take, before it starts. Writes nothing.

FLOPs are counted on the meta device; memory and time are measured on real optimizer steps.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig
from dataset.instruct import RunData
from dataset.puzzles.loader import PuzzleData
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example, ExampleStream
from evaluators.language import rows_evaluated
from models.act import RecursiveModel
from models.device import memory_in_all, peak_memory
from models.distributed import Ranks
from models.layers import BlockStack
from training.loop import Trainer
from training.puzzle import PuzzleTask
from training.schedule import expected_examples
from training.stopping import automatic_evaluations, is_evaluation_due
from training.task import Position, Task
from training.text import TextTask

# The number of sampled rows and of optimizer steps. The first steps, some with the longest rows,
# warm up; the others are timed.
_SAMPLE_ROWS = 2000
_WARM_UP_STEPS, _TIMED_STEPS = 2, 3


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters. A tied head counts once; puzzles' vectors, which are buffers, don't."""
    return sum(p.numel() for p in model.parameters())


class Steps(NamedTuple):
    """The steps and evaluations of a whole run."""

    optimizer_steps: int
    rows: int
    evaluations: int


def count_steps(config: PretrainInstructConfig, curriculum: Curriculum, evaluation_rows: int = 0) -> Steps:
    """The steps of a whole run, at most `max_steps`, and evaluations of `evaluation_rows` rows each."""
    total = Position(curriculum.total, curriculum.rounds_before(curriculum.total))
    expected = expected_examples(config, total.examples)
    steps = math.ceil(expected / config.global_batch_size)
    automatic = automatic_evaluations(config, total, evaluation_rows)
    evaluations, before = 0, Position(0, 0)
    for step in range(1, steps + 1):
        done = min(total.examples, step * config.global_batch_size)
        now = Position(done, curriculum.rounds_before(done))
        evaluations += step == steps or is_evaluation_due(config, automatic, total, step, before, now)
        before = now
    return Steps(steps, expected, evaluations)


def flops_per_token(task: Task) -> float:
    """FLOPs per token and ACT step, forward and backward, of the task's next micro-batch.

    Counts matrix products and whole rows of attention, a multiply-add as two. No elementwise work.
    """
    with FlopCounterMode(display=False) as counter:
        micro_batch = next(task.next_batch(1).micro_batches)
        micro_batch.loss.backward()
    return float(counter.get_total_flops() / micro_batch.sums["tokens"])


def dry_run_instruct(config: PretrainInstructConfig, model: RecursiveModel, data: RunData, ranks: Ranks) -> None:
    """Report what the run would take, by real steps: don't use `model` afterwards. Raises UsageError."""
    say, act_steps = ranks.say, config.arch.halt_max_steps
    _say_parameters(model, say)
    rows = 0 if data.test is None else rows_evaluated(data.test, config.eval_examples)
    steps = count_steps(config, data.curriculum, rows)
    say(f"optimizer steps   {steps.optimizer_steps:,}, {act_steps} ACT steps a row")
    if rows:
        say(f"evaluations       {steps.evaluations:,}, each of {rows:,} held-out rows")
    count = max(_SAMPLE_ROWS, config.global_batch_size)
    sample = [data.train[draw.example_id] for draw in itertools.islice(data.curriculum.draws(), count)]
    tokens = float(np.mean([len(example.ids) - 1 for example in sample]))
    say(f"tokens a row      {tokens:.1f} (mean of {len(sample):,} rows)")

    def task(model: RecursiveModel, rows: Sequence[Example]) -> TextTask:
        curriculum = Curriculum.of_epochs(len(rows), config.seed, 1)
        return TextTask(config, model, ExampleStream(rows, curriculum, 0), curriculum, ranks)

    with torch.device("meta"):
        on_meta = RecursiveModel(model.config, model.vocab_size)
    flops = flops_per_token(task(on_meta, sample))
    total = tokens * steps.rows * act_steps * flops
    say(f"FLOPs a token     {act_steps * flops:.3g} in all its ACT steps; {total:.3g} in the run")
    longest = sorted(sample, key=lambda example: len(example.ids))[-config.global_batch_size :]
    _say_measured(config, model, [task(model, longest), task(model, sample)], flops, total, ranks)


def dry_run_puzzles(config: PretrainPuzzleConfig, model: RecursiveModel, task: PuzzleTask, data: PuzzleData, ranks: Ranks) -> None:
    """Report what the run would take, by real steps of `model` and `task`. Raises UsageError."""
    say, seq_len = ranks.say, data.metadata.seq_len
    _say_parameters(model, say)
    steps = min(task.total_steps, config.max_steps or task.total_steps)
    say(f"optimizer steps   {steps:,} at most, each an ACT step of {config.global_batch_size:,} rows")
    say(f"tokens a row      {seq_len:,}, after {model.prefix_len} positions of its puzzle's vector")
    with torch.device("meta"):
        puzzles = None if model.puzzle_emb is None else len(model.puzzle_emb.weights)
        on_meta = RecursiveModel(model.config, model.vocab_size, seq_len=seq_len, puzzles=puzzles)
    on_meta.requires_grad_(not config.freeze_weights)
    flops = flops_per_token(PuzzleTask(config, on_meta, data, ranks))
    total = steps * config.global_batch_size * seq_len * flops
    say(f"FLOPs a token     {flops:.3g} an ACT step; {total:.3g} in the run")
    _say_measured(config, model, [task], flops, total, ranks)


def _say_parameters(model: RecursiveModel, say: Callable[[str], None]) -> None:
    say("dry run: nothing is written")
    parts = Counter[str]()
    for name, parameter in model.named_parameters():
        first = name.split(".")[0]
        parts["level stacks" if isinstance(model.get_submodule(first), BlockStack) else first] += parameter.numel()
    say(f"parameters        {count_parameters(model):,}: {', '.join(f'{name} {count:,}' for name, count in parts.items())}")
    if model.puzzle_emb is not None:
        puzzles, channels = model.puzzle_emb.weights.shape
        say(f"puzzle vectors    {puzzles * channels:,}: {puzzles:,} of {channels:,} channels; a step updates those of its rows")


def _say_measured(
    config: TrainingConfig, model: RecursiveModel, tasks: Sequence[Task], flops_a_token: float, total: float, ranks: Ranks
) -> None:
    say, there_is = ranks.say, _gb(memory_in_all(model.device))
    results = itertools.chain.from_iterable(Trainer(config, model, task, ranks).steps() for task in tasks)
    ends, tokens = list[float](), list[float]()
    try:
        for result in itertools.islice(results, _WARM_UP_STEPS + _TIMED_STEPS):
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
            tokens.append(int(result.sums["tokens"]))
    except torch.OutOfMemoryError as error:
        raise UsageError(
            f"an optimizer step doesn't fit into {there_is} of {model.device.type} memory: lower micro_batch_size or "
            "global_batch_size, use shorter rows, or set arch.activation_checkpointing=true"
        ) from error
    peaks = ", ".join(f"{name.removesuffix('_bytes')} {_gb(size)}" for name, size in peak_memory(model.device).items())
    say(f"memory            {peaks}{' on each rank' if ranks.size > 1 else ''}, measured; {there_is} in all")
    [timed_tokens] = ranks.sum_numbers([sum(tokens[_WARM_UP_STEPS:])])
    if not timed_tokens:
        say("expected time     not measured: the run has too few steps")
        return
    speed = timed_tokens * flops_a_token / (ends[-1] - ends[_WARM_UP_STEPS - 1])
    say(f"expected time     {total / speed / 3600:.2f} h ({total / speed:,.0f} s) of training at {speed:.3g} FLOP/s,")
    say(f"                  measured on {len(ends) - _WARM_UP_STEPS} steps, without evaluations and checkpoints")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
