"""What a run would take, before it is begun: parameters, memory, optimizer steps, FLOPs, time. Writes nothing.

Parameters, steps and FLOPs are counted, and so is memory, but for activations, which are measured on two rows. Time is measured on
a few steps of the run itself, or not given. Shape suffixes as in models/layers.py.
"""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from config.schema import HaltConfig, PretrainInstructConfig
from dataset.instruct import RunData
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import Example
from models.act import RecursiveModel
from models.device import memory_in_all, peak_memory
from models.layers import Attention, BlockStack, Linear
from models.losses import workspace_bytes
from training.loop import Trainer
from training.slots import Slots
from training.text import TextTask

# Rows whose lengths stand for all, and optimizer steps that are timed after a first one, which warms up.
_LENGTH_ROWS = 2000
_TIMED_STEPS = 3
# An estimate must leave this share of the memory, or it isn't tried out.
_HEADROOM = 0.1


class Flops(NamedTuple):
    """Floating-point operations of one ACT step, forward and backward, a multiplication and an addition counted as two."""

    per_token: float
    """Of each token in work: the level calls and the halting head."""
    per_supervised_token: float
    """On top, of each with a label: the vocabulary head, three products of 2 * D * V."""


def act_step_flops(model: RecursiveModel, positions: float) -> Flops:
    """Matrix products of a training step's ACT step, in rows of `positions` positions.

    A call costs 2 for each weight of its linear layers and, in attention, 4 * D * positions: queries with keys, scores with values,
    over the whole row, although a causal kernel may skip up to half of that. Backward costs twice as much in the calls that carry
    gradient, and the forward once more where activations are computed again. Elementwise work is left out.
    """
    total = 0.0
    for index, level in enumerate(model.level_calls):
        stack = model.get_submodule(level)
        forward = sum(2.0 * m.weight.numel() for m in stack.modules() if isinstance(m, Linear))
        # The output projection takes in all heads together, however wide they are.
        forward += sum(4.0 * m.o_proj.weight.shape[1] * positions for m in stack.modules() if isinstance(m, Attention))
        with_gradient = index >= len(model.level_calls) - model.grad_calls
        total += forward * (1 + with_gradient * (2 + model.config.activation_checkpointing))
    halting = 2.0 * model.q_head.weight.numel() * (3 if model.config.halt.backprop else 2)
    return Flops(total + halting, 6.0 * model.lm_head.weight.numel())


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at the same time, at most."""

    weights: int
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


def estimate_memory(config: PretrainInstructConfig, model: RecursiveModel, task: TextTask) -> Memory:
    """Memory of an ACT step with its backward pass on one rank, every slot with a row of `dataset.seq_len`."""
    parameters = sum(p.nbytes for p in model.parameters())
    slots, positions = len(task.carry.lengths), config.dataset.seq_len
    at_once = min(slots, config.micro_batch_size or slots)
    carry = task.carry
    one, two = (saved_bytes(model, rows, positions) for rows in (1, 2))
    return Memory(
        weights=parameters + sum(b.nbytes for b in model.buffers()),
        gradients=parameters,
        optimizer=2 * parameters,
        average=parameters if config.ema else 0,
        carry=sum(t.nbytes for t in (carry.inputs_BT, carry.labels_BT, carry.segments_BT, carry.previous_argmax_BT, *carry.states)),
        # What is saved once, casts of the weights for one, and what each further row adds.
        activations=one + (at_once - 1) * (two - one),
        loss=workspace_bytes(model.lm_head.weight, model.dtype),
    )


def saved_bytes(model: RecursiveModel, rows: int, positions: int) -> int:
    """Bytes kept for the backward pass of one ACT step of `rows` whole rows: measured by doing its forward pass."""
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

    ids_BT = torch.zeros(rows, positions, dtype=torch.int64, device=model.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _, output_BTD = model.act_step(
            model.initial_states(rows, positions),
            model.embed(ids_BT),
            model.rotary(torch.arange(positions, device=model.device)),
            model.mask(ids_BT),
        )
    # A level call that is computed again keeps its input, which is none of autograd's saved tensors.
    inputs = model.grad_calls * output_BTD.nbytes if model.config.activation_checkpointing else 0
    return sum(saved.values()) + inputs


class Steps(NamedTuple):
    """What a whole run consists of."""

    optimizer_steps: int
    act_steps: int
    """ACT steps of all rows together."""


def count_steps(config: PretrainInstructConfig, halt: HaltConfig, curriculum: Curriculum) -> Steps:
    """The steps of a whole run, by letting its examples through the slots without a model.

    Exact where rows halt by a drawn or a fixed depth. For mode "settled" the fewest there can be: each leaves at its least depth.
    """
    slots = Slots(config.global_batch_size, _Draws(curriculum), halt, config.arch.halt_max_steps, config.seed, curriculum.total)
    all_settled = np.ones(config.global_batch_size)
    optimizer_steps = act_steps = 0
    slots.refill()
    while slots.active.any():
        optimizer_steps += 1
        for _ in range(config.act_steps_per_update):
            act_steps += int(slots.active.sum())
            slots.advance(slots.halted(all_settled))
        slots.refill()
    return Steps(optimizer_steps, act_steps)


class _Draws:
    """The order of a run without its rows."""

    def __init__(self, curriculum: Curriculum) -> None:
        self._draws = curriculum.draws()
        empty = np.zeros(0, np.int32)
        self._nothing = Example(empty, empty.astype(bool), empty, 0)

    def __next__(self) -> tuple[Draw, Example]:
        return next(self._draws), self._nothing

    def skip(self, count: int) -> None:
        """Pass over the next `count` examples."""
        next(itertools.islice(self._draws, count - 1, None), None)


def dry_run(
    config: PretrainInstructConfig, model: RecursiveModel, task: TextTask, data: RunData, say: Callable[[str], None]
) -> None:
    """Say what the run would take. `model` and `task` are of no further use: their first steps are taken to measure time."""
    say("dry run: nothing is kept of it")
    _say_parameters(model, say)
    memory = estimate_memory(config, model, task)
    there_is = memory_in_all(model.device)
    each = " on each rank" if task.ranks.size > 1 else ""
    say(
        f"memory            {_gb(memory.total)}{each} with rows of {config.dataset.seq_len} in every slot; there is {_gb(there_is)}"
    )
    for name, size in vars(memory).items():
        say(f"  {name:15} {_gb(size)}")
    say("  programs and libraries come on top")

    halt = config.arch.halt
    steps = count_steps(config, halt, data.curriculum)
    if halt.mode == "settled":
        most = count_steps(config, halt.model_copy(update={"mode": "fixed"}), data.curriculum)
        say(f"optimizer steps   {steps.optimizer_steps:,} to {most.optimizer_steps:,}, as rows settle; below, the fewest")
    else:
        say(f"optimizer steps   {steps.optimizer_steps:,}, {steps.act_steps / data.curriculum.total:.2f} ACT steps a row")
    examples = [data.train[draw.example_id] for draw in itertools.islice(data.curriculum.draws(), _LENGTH_ROWS)]
    lengths = np.array([len(example.ids) - 1 for example in examples])
    everything = config.dataset.supervise == "all"
    supervised = np.array([len(e.ids) - 1 if everything else int(e.supervised[1:].sum()) for e in examples])
    tokens = steps.act_steps * lengths.mean()
    say(f"tokens a row      {lengths.mean():.1f}, {supervised.mean():.1f} of them supervised (mean of {len(examples):,} rows)")
    flops = act_step_flops(model, float((lengths**2).sum() / lengths.sum()))
    total = tokens * flops.per_token + steps.act_steps * supervised.mean() * flops.per_supervised_token
    say(
        f"FLOPs a token     {flops.per_token:.3g} an ACT step, {flops.per_supervised_token:.3g} more if supervised; "
        f"{total:.3g} in the run"
    )
    if memory.total > (1 - _HEADROOM) * there_is:
        say("expected time     not measured: the memory would not suffice; lower global_batch_size or dataset.seq_len,")
        say("                  or set arch.activation_checkpointing=true")
        return
    _say_time(config, model, task, tokens, total, say)


def _say_parameters(model: RecursiveModel, say: Callable[[str], None]) -> None:
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.split(".")[0])
        kind = "level stacks" if isinstance(module, BlockStack) else name.split(".")[0]
        parts[kind] = parts.get(kind, 0) + parameter.numel()
    shown = ", ".join(f"{name} {count:,}" for name, count in parts.items())
    say(f"parameters        {count_parameters(model):,}: {shown}")


def count_parameters(model: nn.Module) -> int:
    """Numbers that training changes; a tied head counts once."""
    return sum(p.numel() for p in model.parameters())


def _say_time(
    config: PretrainInstructConfig, model: RecursiveModel, task: TextTask, tokens: float, flops: float, say: Callable[[str], None]
) -> None:
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
