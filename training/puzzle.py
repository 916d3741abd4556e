"""Puzzles as a task: slots, the latent states they carry, one ACT step.

As in the original, an optimizer step is one ACT step of every slot, and takes one batch of the
loader. Rows for slots that are still busy are discarded. Shape suffixes as in models/layers.py; P
positions of a puzzle's vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import TrainerState
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import IGNORE_LABEL_ID, PuzzleBatch, PuzzleData, TrainBatches
from models.act import RecursiveModel
from models.device import on_device
from models.distributed import ALONE, Ranks
from models.losses import row_loss
from models.recursive_reasoning.base import States
from models.row_halting import continue_target, halted
from training.schedule import lr_factor_by_steps
from training.task import Batch, MicroBatch, Position

# Separates this module's random numbers from others with the same seed.
_EXPLORATION_DRAW = 2


def exploration(seed: int, step: int, rows: int, probability: float, max_steps: int) -> np.ndarray:
    """Minimum depth of each slot at a step, int64: 0, or by `probability` one of 2..max_steps."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, _EXPLORATION_DRAW, step, 0]))
    explores, depth = generator.random((2, rows))
    minimum = np.minimum(2 + (depth * (max_steps - 1)).astype(np.int64), max_steps)
    return np.where(explores < probability, minimum, 0)


@dataclass
class Carry:
    """The rows in this rank's slots and their states."""

    inputs_BT: Tensor
    labels_BT: Tensor
    puzzle_ids_B: Tensor
    steps_B: Tensor
    """ACT steps since the row entered."""
    halted_B: Tensor
    """Slots whose row has halted."""
    states: States
    """Each [B, P + T, D]."""

    @classmethod
    def empty(cls, model: RecursiveModel, rows: int, tokens: int) -> "Carry":
        """`rows` free slots, for rows of `tokens` tokens."""

        def ids(fill: int, *shape: int) -> Tensor:
            return torch.full(shape, fill, dtype=torch.int64, device=model.device)

        states = tuple(state.clone() for state in model.initial_states(rows, model.prefix_len + tokens))
        halted_B = torch.ones(rows, dtype=torch.bool, device=model.device)
        return cls(ids(0, rows, tokens), ids(IGNORE_LABEL_ID, rows, tokens), ids(0, rows), ids(0, rows), halted_B, states)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, to read or to write in place."""
        states = {f"carry.state.{i}": state for i, state in enumerate(self.states)}
        names = ("inputs_BT", "labels_BT", "puzzle_ids_B", "steps_B", "halted_B")
        return {**{f"carry.{name.rpartition('_')[0]}": getattr(self, name) for name in names}, **states}


class PuzzleTask:
    """The puzzles of a run: slots, their carry, and the position in the data."""

    loss_name = "lm_loss"

    def __init__(self, config: PretrainPuzzleConfig, model: RecursiveModel, data: PuzzleData, ranks: Ranks = ALONE) -> None:
        """Raises UsageError if the data doesn't fill a batch."""
        self.config = config
        self.model = model
        self.ranks = ranks
        self.total_steps = data.metadata.total_steps(config.epochs, config.global_batch_size)
        self.steps_done = 0
        self._batches = TrainBatches(
            data,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            epochs_per_iteration=config.eval_interval,
            rank=self.ranks.rank,
            ranks=self.ranks.size,
        )
        self._iterations_done = 0
        self._iteration = self._batches.iteration()
        self._place = self._place_in_data()
        self._batch = self._read_batch()
        if self._batch is None:
            raise UsageError(
                f"global_batch_size {config.global_batch_size} is more than the examples of eval_interval={config.eval_interval} "
                "epochs: lower it, raise eval_interval and epochs, or use more data"
            )
        self._part = self.ranks.part(config.global_batch_size)
        self.carry = Carry.empty(model, len(self._part), data.metadata.seq_len)
        positions = model.prefix_len + data.metadata.seq_len
        self._rotary = model.rotary(torch.arange(positions))
        self._attend = model.row_attention(torch.zeros(1, positions, dtype=torch.int64, device=model.device))

    @property
    def total(self) -> Position:
        """Examples, estimated as in the original for its schedule, and epochs from the config."""
        return Position(self.total_steps * self.config.global_batch_size, self.config.epochs)

    @property
    def done(self) -> Position:
        """Examples that the loader has returned (`total` at its end), and epochs completed."""
        examples = self.total.examples if self._batch is None else self.steps_done * self.config.global_batch_size
        return Position(examples, self._iterations_done * self.config.eval_interval)

    def next_batch(self, step: int) -> Batch:
        """One ACT step of every slot. Rows still busy after the last batch stay unfinished."""
        config, rows = self.config, len(self._part)
        assert self._batch is not None
        self._enter(self._batch)
        drawn = exploration(
            config.seed, self.steps_done, config.global_batch_size, config.arch.halt_exploration_prob, config.arch.halt_max_steps
        )
        minimum_B = on_device(drawn[self._part.start : self._part.stop], self.model.device)
        self.steps_done = step
        self._place = self._place_in_data()
        self._batch = self._read_batch()
        last = min(self.total_steps, config.max_steps or self.total_steps)
        at_once = config.micro_batch_size or rows
        parts = (slice(start, start + at_once) for start in range(0, rows, at_once))
        return Batch(
            lr_factor_by_steps(step, last, min_ratio=config.lr_min_ratio, warmup_steps=config.lr_warmup_steps),
            (self._act_step(part, minimum_B[part]) for part in parts),
        )

    def _enter(self, batch: PuzzleBatch) -> None:
        """Put rows of `batch`, with initial states, into the free slots of the same number."""
        carry = self.carry
        free_B = carry.halted_B
        for target, rows in (
            (carry.inputs_BT, batch.inputs),
            (carry.labels_BT, batch.labels),
            (carry.puzzle_ids_B, batch.puzzle_identifiers),
        ):
            entering = on_device(rows.astype(np.int64), target.device)
            target.copy_(torch.where(free_B.view(-1, *[1] * (target.dim() - 1)), entering, target))
        for state, initial in zip(carry.states, self.model.initial_states(1, 1), strict=True):
            state.copy_(torch.where(free_B.view(-1, 1, 1), initial, state))
        carry.steps_B.masked_fill_(free_B, 0)
        carry.halted_B = torch.zeros_like(free_B)

    def _place_in_data(self) -> dict[str, int | str]:
        return {"iterations": self._iterations_done, **self._batches.state()}

    def _read_batch(self) -> PuzzleBatch | None:
        """The loader's next batch, also from the next iteration; None at the end of the run."""
        while self.steps_done < self.total_steps and self._iterations_done * self.config.eval_interval < self.config.epochs:
            batch = next(self._iteration, None)
            if batch is not None:
                return batch
            self._iterations_done += 1
            self._iteration = self._batches.iteration()
        return None

    def _act_step(self, part: slice, minimum_B: Tensor) -> MicroBatch:
        model, carry, arch = self.model, self.carry, self.config.arch
        labels_BT = carry.labels_BT[part]
        x_BTD = model.embed(carry.inputs_BT[part], carry.puzzle_ids_B[part])
        states = tuple(state[part] for state in carry.states)
        states, output_BTD = model.act_step(states, x_BTD, self._rotary, self._attend)
        output_BD = output_BTD[:, 0]
        halt_logits_B2 = model.halt_logits(output_BD if arch.halt.backprop else output_BD.detach())
        steps_B = carry.steps_B[part] + 1
        target_B = None
        with torch.no_grad():
            states = tuple(state.detach() for state in states)
            if arch.trains_continue:
                _, next_BTD = model.act_step(states, x_BTD, self._rotary, self._attend)
                target_B = continue_target(model.halt_logits(next_BTD[:, 0]), steps_B >= arch.halt_max_steps)
        loss = row_loss(output_BTD[:, model.prefix_len :], model.lm_head.weight, halt_logits_B2, labels_BT, arch.loss, target_B)
        with torch.no_grad():
            halted_B = halted(arch, halt_logits_B2, steps_B, minimum_B)
            # Reset rows whose states aren't finite; otherwise all further steps would be skipped.
            finite_B = torch.stack([state.isfinite().flatten(1).all(dim=1) for state in states]).all(dim=0)
            for kept, new, initial in zip(carry.states, states, model.initial_states(1, 1), strict=True):
                kept[part] = torch.where(finite_B.view(-1, 1, 1), new, initial)
            carry.steps_B[part], carry.halted_B[part] = steps_B, halted_B
            supervised_BT = labels_BT != IGNORE_LABEL_ID
            counted_B = halted_B & supervised_BT.any(dim=1)
            says_right_B = halt_logits_B2[:, 0] >= 0
            # "halted" and the sums after it are over rows that halted in this step and have a
            # label, the others over all rows.
            of_halted = {
                "halted": counted_B,
                "accuracy": loss.accuracy_B,
                "exact_accuracy": loss.is_right_B,
                "q_halt_accuracy": says_right_B == loss.is_right_B,
                "steps": steps_B,
            }
            sums: dict[str, Tensor | int] = {
                "tokens": labels_BT.numel(),
                "supervised": supervised_BT.sum(),
                "rows": len(labels_BT),
                "lm_loss": loss.nll_B.sum(),
                "q_halt_loss": loss.halt_bce_B.sum(),
                "q_continue_loss": loss.continue_bce_B.sum(),
                **{name: (value_B * counted_B).sum() for name, value_B in of_halted.items()},
            }
        return MicroBatch(loss=loss.total, weight=len(labels_BT), sums=sums)

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means by the original's names: losses over all rows, others over halted, labelled ones."""
        rows, of_halted = max(1.0, sums["rows"]), max(1.0, sums["halted"])
        losses = {name: sums[name] / rows for name in ("lm_loss", "q_halt_loss", "q_continue_loss")}
        measures = {name: sums[name] / of_halted for name in ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps")}
        if not self.config.arch.trains_continue:
            del losses["q_continue_loss"]
        # Without such a row there is nothing to report.
        return {**losses, **(measures if sums["halted"] else {}), "halted_rows": sums["halted"]}

    def state(self) -> TrainerState:
        """Carry of all ranks, at the first one, and the position in the data: the same for any number of ranks."""
        own = {name: part.cpu() for name, part in self.carry.tensors().items()}
        of_ranks = self.ranks.gather_at_first(own)
        tensors = {name: torch.cat([parts[name] for parts in of_ranks]) for name in own} if of_ranks else {}
        return TrainerState(tensors, {"steps_done": self.steps_done, "place_in_data": self._place})

    def load_state(self, state: TrainerState) -> None:
        """Resume from `state`, of any number of ranks. Raises UsageError if it is of other data."""
        for name, target in self.carry.tensors().items():
            target.copy_(state.tensors[name][self._part.start : self._part.stop])
        self.steps_done = state.values["steps_done"]
        self._place = state.values["place_in_data"]
        self._iterations_done = int(self._place["iterations"])
        self._batches.restore(self._place)
        self._iteration = self._batches.iteration()
        self._batch = self._read_batch()
