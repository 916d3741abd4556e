"""What a run would take, before it is begun: parameters, memory, optimizer steps, FLOPs, time. Writes nothing.

Parameters, steps and FLOPs are counted, and so is memory, but for activations, which are measured on two rows. Time is measured on
a few steps of the run itself, or not given. Shape suffixes as in models/layers.py.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig
from dataset.instruct import RunData
from dataset.text.curriculum import Curriculum
from evaluators.language import rows_evaluated
from models.act import RecursiveModel
from models.device import memory_in_all, peak_memory
from models.layers import Block, BlockStack
from models.losses import workspace_bytes
from training.loop import Trainer
from training.optimizer import muon_matrices
from training.puzzle import PuzzleTask
from training.schedule import act_steps_at, expected_examples
from training.stopping import Position, automatic_evaluations, is_evaluation_due
from training.text import TextTask

# Rows whose lengths stand for all, and optimizer steps that are timed after a first one, which warms up.
_LENGTH_ROWS = 2000
_TIMED_STEPS = 3
# An estimate must leave this share of the memory, or it isn't tried out.
_HEADROOM = 0.1


class Flops(NamedTuple):
    """Floating-point operations of one ACT step, forward and backward, a multiplication and an addition counted as two."""

    per_position: float
    """Of each position in work: the level calls, and those of the second forward that trains a continuing logit."""
    per_halting: float
    """Of each output that the halting head reads: a token's of text, the first one of a puzzle's row."""
    per_label: float
    """Of each output that the vocabulary head reads: those with a label of text, all tokens of a puzzle."""


def act_step_flops(model: RecursiveModel, positions: float, grad_calls: int | None = None) -> Flops:
    """Matrix products of a training step's ACT step, in rows of `positions` positions, a puzzle's vector counted in.

    grad_calls: how many of its last level calls carry gradient; None: as where an optimizer step takes a single ACT step.

    A call costs 2 for each weight of its linear layers and, in attention, 4 * D * positions: queries with keys, scores with values,
    over the whole row, although a causal kernel may skip up to half of that. A linear layer over the positions of each channel
    (`mlp_t`) costs a row 2 * D for each weight. Backward costs as much for the inputs and once more for the weights, if they learn,
    in the calls that carry gradient, and the forward once more where activations are computed again. Elementwise work is left out.
    """
    config = model.config
    if grad_calls is None:
        [grad_calls] = model.grad_calls_by_step(1)
    total = 0.0
    for index, level in enumerate(model.level_calls):
        stack = model.get_submodule(level)
        linear, attention = _forward_flops(stack, config.hidden_size, positions)
        total += (linear + attention) * (1 + config.trains_continue)
        if index >= len(model.level_calls) - grad_calls:
            total += linear * (1 + _learns(stack)) + 2 * attention + (linear + attention) * config.activation_checkpointing
    halting = 2.0 * model.q_head.weight.numel() * (1 + config.trains_continue + config.halt.backprop + _learns(model.q_head))
    return Flops(total, halting, 2.0 * model.lm_head.weight.numel() * (2 + _learns(model.lm_head)))


def _forward_flops(stack: nn.Module, hidden_size: int, positions: float) -> tuple[float, float]:
    """Of one call for each position: those of linear layers, and those of attention's own products."""
    linear = attention = 0.0
    for block in stack.modules():
        if not isinstance(block, Block):
            continue
        for part, per_position in ((block.self_attn, 1.0), (block.mlp_t, hidden_size / positions), (block.mlp, 1.0)):
            if part is not None:
                linear += 2 * per_position * count_parameters(part)
        if block.self_attn is not None:
            # The output projection takes in all heads together, however wide they are.
            attention += 4 * block.self_attn.o_proj.weight.shape[1] * positions
    return linear, attention


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at the same time, at most."""

    weights: int
    puzzle_vectors: int
    gradients: int
    optimizer: int
    average: int
    carry: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(vars(self).values())


def estimate_memory(
    config: TrainingConfig, model: RecursiveModel, rows: int, tokens: int, act_steps: int = 1, carry: Sequence[Tensor] = ()
) -> Memory:
    """Memory of an optimizer step of `act_steps` ACT steps on one rank, which has `rows` rows of `tokens` tokens, all with a label.

    carry: the tensors that a puzzle's rows keep from step to step.
    """
    parameters = sum(p.nbytes for p in model.parameters())
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    vectors = 0 if model.puzzle_emb is None else model.puzzle_emb.weights.nbytes
    at_once = min(rows, config.micro_batch_size or rows)
    one, two = (saved_bytes(model, rows, tokens, act_steps) for rows in (1, 2))
    outputs = act_steps * at_once * tokens * config.arch.hidden_size * model.dtype.itemsize
    return Memory(
        weights=parameters + sum(b.nbytes for b in model.buffers()) - vectors,
        puzzle_vectors=vectors,
        gradients=learning,
        # AdamATan2 keeps two running means of a gradient, Muon one.
        optimizer=2 * learning - sum(p.nbytes for p in muon_matrices(config, model) if p.requires_grad),
        average=parameters if config.ema else 0,
        carry=sum(t.nbytes for t in carry),
        # What is saved once, casts of the weights for one, and what each further row adds.
        activations=one + (at_once - 1) * (two - one),
        # The outputs of tokens by themselves, of each ACT step and of all, and their gradient, which is made on the way forward.
        loss=workspace_bytes(model.lm_head.weight, model.dtype) + 3 * outputs,
    )


def saved_bytes(model: RecursiveModel, rows: int, tokens: int, act_steps: int = 1) -> int:
    """Bytes kept for the backward pass of `act_steps` ACT steps of `rows` whole rows: measured by doing the forward pass."""
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # Held, or its address may be another tensor's later.
            kept.append(tensor)
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    positions = model.prefix_len + tokens
    ids_BT = torch.zeros(rows, positions, dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        *_, output_BTD = model.act_steps(
            model.embed(ids_BT[:, model.prefix_len :], ids_BT[:, 0]),
            model.rotary(torch.arange(positions)),
            model.mask(ids_BT),
            act_steps,
        )
    if model.puzzle_emb is not None:
        # Or it would wait for a backward pass of this step, too.
        model.puzzle_emb.take_gradient()
    # A level call that is computed again keeps its input, which is none of autograd's saved tensors.
    inputs = sum(model.grad_calls_by_step(act_steps)) * output_BTD.nbytes if model.config.activation_checkpointing else 0
    return sum(saved.values()) + inputs


class Steps(NamedTuple):
    """What a whole run consists of."""

    optimizer_steps: int
    rows_by_depth: Mapping[int, int]
    """How many of the rows that are trained take so many ACT steps."""
    evaluations: int


def count_steps(config: PretrainInstructConfig, curriculum: Curriculum, evaluation_rows: int = 0) -> Steps:
    """The steps of a whole run, up to `max_steps`; neither `max_minutes` nor `early_stopping` is foreseen.

    evaluation_rows: what an evaluation measures.
    """
    batch, total = config.global_batch_size, curriculum.total
    expected = expected_examples(config, total)
    steps = math.ceil(expected / batch)
    automatic = automatic_evaluations(config, total, curriculum.rounds_before(total), evaluation_rows)
    rows_by_depth, evaluations, before = Counter[int](), 0, Position(0, 0, 0)
    for step in range(1, steps + 1):
        done = min(total, step * batch)
        rows_by_depth[act_steps_at(config, step, before.examples / expected)] += done - before.examples
        now = Position(step, done, curriculum.rounds_before(done))
        evaluations += step == steps or is_evaluation_due(config, automatic, total, before, now)
        before = now
    return Steps(steps, rows_by_depth, evaluations)


def dry_run_instruct(
    config: PretrainInstructConfig, model: RecursiveModel, task: TextTask, data: RunData, say: Callable[[str], None]
) -> None:
    """Say what the run would take. `model` and `task` are of no further use: their first steps are taken to measure time."""
    on_this_rank = len(task.ranks.part(config.global_batch_size))
    memory = estimate_memory(config, model, on_this_rank, config.dataset.seq_len, config.arch.halt_max_steps)
    fits = _say_sizes(model, task, memory, config.dataset.seq_len, say)
    rows = 0 if data.test is None else rows_evaluated(data.test, config.eval_examples)
    steps = count_steps(config, data.curriculum, rows)
    trained = sum(steps.rows_by_depth.values())
    act_steps = sum(depth * count for depth, count in steps.rows_by_depth.items())
    say(f"optimizer steps   {steps.optimizer_steps:,}, {act_steps / trained:.2f} ACT steps a row")
    if rows:
        say(f"evaluations       {steps.evaluations:,}, each of {rows:,} held-out rows")
    examples = [data.train[draw.example_id] for draw in itertools.islice(data.curriculum.draws(), _LENGTH_ROWS)]
    lengths = np.array([len(example.ids) - 1 for example in examples])
    everything = config.dataset.supervise == "all"
    supervised = np.array([len(e.ids) - 1 if everything else int(e.supervised[1:].sum()) for e in examples])
    say(f"tokens a row      {lengths.mean():.1f}, {supervised.mean():.1f} of them supervised (mean of {len(examples):,} rows)")
    per_token = per_label = 0.0
    for depth, count in steps.rows_by_depth.items():
        losses = depth if config.loss_discount else 1
        for number, grad_calls in enumerate(model.grad_calls_by_step(depth), 1):
            flops = act_step_flops(model, float((lengths**2).sum() / lengths.sum()), grad_calls)
            has_loss = number > depth - losses
            per_token += count / trained * (flops.per_position + has_loss * flops.per_halting)
            per_label += count / trained * has_loss * flops.per_label
    total = trained * (lengths.mean() * per_token + supervised.mean() * per_label)
    say(f"FLOPs a token     {per_token:.3g} in all its ACT steps, {per_label:.3g} more if supervised; {total:.3g} in the run")
    _say_time(config, model, task, act_steps * lengths.mean(), total, fits, say)


def dry_run_puzzles(config: PretrainPuzzleConfig, model: RecursiveModel, task: PuzzleTask, say: Callable[[str], None]) -> None:
    """Say what the run would take. `model` and `task` are of no further use: their first steps are taken to measure time."""
    on_this_rank, tokens_a_row = task.carry.inputs_BT.shape
    positions = model.prefix_len + tokens_a_row
    memory = estimate_memory(config, model, on_this_rank, tokens_a_row, carry=tuple(task.carry.tensors().values()))
    fits = _say_sizes(model, task, memory, tokens_a_row, say)
    steps = min(task.total_steps, config.max_steps or task.total_steps)
    rows = steps * config.global_batch_size
    say(f"optimizer steps   {steps:,} at most, each an ACT step of {config.global_batch_size:,} rows")
    say(f"positions a row   {positions:,}, {tokens_a_row:,} of them tokens")
    flops = act_step_flops(model, positions)
    total = rows * (positions * flops.per_position + flops.per_halting + tokens_a_row * flops.per_label)
    say(f"FLOPs a position  {flops.per_position:.3g} an ACT step, {flops.per_label:.3g} more if a token; {total:.3g} in the run")
    _say_time(config, model, task, rows * tokens_a_row, total, fits, say)


def _say_sizes(model: RecursiveModel, task: TextTask | PuzzleTask, memory: Memory, tokens: int, say: Callable[[str], None]) -> bool:
    """Parameters and memory; whether the memory would do."""
    say("dry run: nothing is kept of it")
    _say_parameters(model, say)
    there_is = memory_in_all(model.device)
    each = " on each rank" if task.ranks.size > 1 else ""
    say(f"memory            {_gb(memory.total)}{each} with rows of {tokens} tokens; there is {_gb(there_is)}")
    for name, size in vars(memory).items():
        if size:
            say(f"  {name.replace('_', ' '):15} {_gb(size)}")
    say("  programs and libraries come on top")
    return memory.total <= (1 - _HEADROOM) * there_is


def _say_parameters(model: RecursiveModel, say: Callable[[str], None]) -> None:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.split(".")[0])
        kind = "level stacks" if isinstance(module, BlockStack) else name.split(".")[0]
        parts[kind] = parts.get(kind, 0) + parameter.numel()
    shown = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    say(f"parameters        {count_parameters(model):,}: {shown}")
    if model.puzzle_emb is not None:
        puzzles, channels = model.puzzle_emb.weights.shape
        say(f"puzzle vectors    {puzzles * channels:,}: {puzzles:,} of {channels:,} channels; a step moves those of its rows")


def count_parameters(model: nn.Module) -> int:
    """Numbers that the optimizer may change; a tied head counts once, the puzzles' vectors, which have their own, don't."""
    return sum(p.numel() for p in model.parameters())


def _say_time(
    config: TrainingConfig,
    model: RecursiveModel,
    task: TextTask | PuzzleTask,
    tokens: float,
    flops: float,
    fits: bool,
    say: Callable[[str], None],
) -> None:
    """How long the run's `tokens` and `flops` take, measured on its first steps if its memory `fits`."""
    if not fits:
        say("expected time     not measured: the memory would not suffice; lower micro_batch_size or global_batch_size,")
        say("                  use shorter rows, or set arch.activation_checkpointing=true")
        return
    trainer = Trainer(config, model, task, task.ranks)
    started = time.perf_counter()
    timed_tokens, taken = 0.0, 0
    for result in trainer.steps():
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if taken:
            timed_tokens += int(result.sums["tokens"])
        else:
            started = time.perf_counter()
        taken += 1
        if taken > _TIMED_STEPS:
            break
    seconds = time.perf_counter() - started
    [timed_tokens] = task.ranks.sum_numbers([timed_tokens])
    if not timed_tokens:
        say("expected time     not measured: the whole run is a single step")
        return
    whole = tokens / timed_tokens * seconds
    say(
        f"expected time     {whole / 3600:.2f} h ({whole:,.0f} s) of training at {timed_tokens / seconds:,.0f} tokens a second "
        f"({flops / whole:.3g} FLOP/s),"
    )
    say(f"                  measured on {taken - 1} steps after a first one; evaluations and checkpoints come on top")
    for name, size in peak_memory(model.device).items():
        say(f"measured          {name} {_gb(size)} so far")


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
