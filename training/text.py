"""Conversations as a task: slots full of rows, their states, one ACT step. Knows no files, no optimizer, and prints nothing.

Shape suffixes as in models/layers.py; R counts the rows in work, M their tokens (padding is never computed), N the supervised ones.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import TrainerState
from config.schema import PretrainInstructConfig
from dataset.text.loader import IGNORE_LABEL_ID, Example, collate
from models.act import RecursiveModel
from models.layers import TOKEN_MULTIPLE, TokenRows, tokens_in_rows
from models.losses import token_loss
from models.recursive_reasoning.base import States
from training.loop import Part
from training.schedule import learning_rate
from training.slots import Slots

_SLOT_ARRAYS = ("epoch", "example_id", "act_step", "depth", "active")


@dataclass
class Carry:
    """What the rows in the slots are and how far their states have come. Positions beyond a row's length are padding."""

    inputs_BT: Tensor
    labels_BT: Tensor
    segments_BT: Tensor
    previous_argmax_BT: Tensor
    states: States
    lengths: np.ndarray
    """Input positions of each row, int64[B], on the host."""
    supervised_BT: np.ndarray
    """Which positions have a label, bool, on the host: a step's shapes are known without asking the device."""

    @classmethod
    def empty(cls, model: RecursiveModel, rows: int, positions: int) -> "Carry":
        """Room for `rows` rows of at most `positions` positions."""

        def ids(fill: int) -> Tensor:
            return torch.full((rows, positions), fill, dtype=torch.int64, device=model.device)

        states = tuple(state.clone() for state in model.initial_states(rows, positions))
        return cls(
            ids(0), ids(IGNORE_LABEL_ID), ids(0), ids(-1), states, np.zeros(rows, np.int64), np.zeros((rows, positions), bool)
        )


class TextTask:
    """The conversations of a run: slots and what they carry."""

    unit = "ex"
    loss_name = "loss_per_token"

    def __init__(
        self,
        config: PretrainInstructConfig,
        model: RecursiveModel,
        stream: Iterator[tuple[int, int, Example]],
        examples_per_epoch: int,
    ) -> None:
        self.config = config
        self.model = model
        self.total = examples_per_epoch * config.epochs
        self._examples_per_epoch = examples_per_epoch
        arch = config.arch
        self.slots = Slots(config.global_batch_size, stream, arch.halt, arch.halt_max_steps, config.seed, self.total)
        multiple = config.pad_multiple
        self._positions = -(-(config.dataset.seq_len + TOKEN_MULTIPLE) // multiple) * multiple
        self.carry = Carry.empty(model, config.global_batch_size, self._positions)

    @property
    def busy(self) -> bool:
        """Whether any row is in work."""
        return self.slots.busy

    @property
    def done(self) -> int:
        """Examples that have halted."""
        return self.slots.finished

    @property
    def epochs_done(self) -> int:
        """Examples that have halted, in epochs; slots flow over epoch ends, so the last few may be of the next one."""
        return self.slots.finished // self._examples_per_epoch

    def lr_factor(self) -> float:
        """Share of the peak learning rate at the examples admitted so far."""
        config = self.config
        return learning_rate(
            self.slots.admitted,
            self.total,
            base=1.0,
            min_ratio=config.lr_min_ratio,
            warmup_steps=config.lr_warmup_steps,
            batch_size=self.slots.size,
        )

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Nats and accuracy per supervised token."""
        tokens = max(1, int(sums["supervised"]))
        return {
            "loss_per_token": sums["nll"] / tokens,
            "halt_loss_per_token": sums["halt_bce"] / tokens,
            "token_accuracy": sums["correct"] / tokens,
            "supervised_tokens": tokens,
        }

    def state(self) -> TrainerState:
        """Slots, carry and the number of examples admitted."""
        slots, carry = self.slots, self.carry
        tensors = {
            "carry.inputs": carry.inputs_BT,
            "carry.labels": carry.labels_BT,
            "carry.segments": carry.segments_BT,
            "carry.previous_argmax": carry.previous_argmax_BT,
            **{f"carry.state.{i}": state for i, state in enumerate(carry.states)},
            **{f"slots.{name}": torch.from_numpy(getattr(slots, name)) for name in _SLOT_ARRAYS},
            "carry.lengths": torch.from_numpy(carry.lengths),
        }
        return TrainerState(tensors, {"admitted": slots.admitted, "finished": slots.finished})

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`; the stream must already stand at example number `admitted`."""
        tensors = state.tensors
        carry, slots = self.carry, self.slots
        for name, target in (
            ("inputs", carry.inputs_BT),
            ("labels", carry.labels_BT),
            ("segments", carry.segments_BT),
            ("previous_argmax", carry.previous_argmax_BT),
            *((f"state.{i}", state_BTD) for i, state_BTD in enumerate(carry.states)),
        ):
            target.copy_(tensors[f"carry.{name}"])
        carry.lengths[:] = tensors["carry.lengths"].numpy()
        carry.supervised_BT[:] = (tensors["carry.labels"] != IGNORE_LABEL_ID).numpy()
        for name in _SLOT_ARRAYS:
            getattr(slots, name)[:] = tensors[f"slots.{name}"].numpy()
        slots.admitted, slots.finished = state.values["admitted"], state.values["finished"]

    def admit(self) -> None:
        """Give the next examples, with fresh states, to the free slots."""
        entries = self.slots.refill()
        if not entries:
            return
        carry = self.carry
        batch = collate(
            [entry.example for entry in entries],
            pad_id=0,
            length_multiple=self.config.pad_multiple,
            supervise=self.config.dataset.supervise,
        )
        slots = torch.tensor([entry.slot for entry in entries], device=self.model.device)
        width = batch["inputs"].shape[1]
        for target, name, fill in (
            (carry.inputs_BT, "inputs", 0),
            (carry.labels_BT, "labels", IGNORE_LABEL_ID),
            (carry.segments_BT, "segment", 0),
        ):
            target[slots, width:] = fill
            target[slots, :width] = torch.from_numpy(batch[name].astype(np.int64)).to(target.device)
        carry.previous_argmax_BT[slots] = -1
        for state, initial in zip(carry.states, self.model.initial_states(len(entries), self._positions), strict=True):
            state[slots] = initial
        host_slots = [entry.slot for entry in entries]
        carry.lengths[host_slots] = batch["lengths"]
        carry.supervised_BT[host_slots] = False
        carry.supervised_BT[host_slots, :width] = batch["labels"] != IGNORE_LABEL_ID

    def parts(self) -> Iterator[Part]:
        """At most `act_steps_per_update` ACT steps of the rows in the slots, until all have halted."""
        for _ in range(self.config.act_steps_per_update):
            if not self.slots.busy:
                return
            yield self._act_step()

    def _act_step(self) -> Part:
        """One ACT step of every row in the slots."""
        model, carry, slots = self.model, self.carry, self.slots
        arch = self.config.arch
        working = np.flatnonzero(slots.active)
        index_M, width = tokens_in_rows(carry.lengths[working], self.config.pad_multiple)
        token_rows = TokenRows(torch.from_numpy(index_M).to(model.device), len(working), width)
        # While every slot works, views do; only the end of the run, when slots drain, copies rows.
        full = len(working) == slots.size
        index_R = slice(None) if full else torch.from_numpy(working).to(model.device)
        labels_M = token_rows.gather(carry.labels_BT[index_R, :width])
        is_supervised_M = carry.supervised_BT[working, :width].ravel()[index_M]
        supervised_N = torch.from_numpy(np.flatnonzero(is_supervised_M)).to(model.device)
        labels_N = labels_M[supervised_N]

        states, output_MD = model.act_step(
            tuple(token_rows.gather(state[index_R, :width]) for state in carry.states),
            model.embed(token_rows.gather(carry.inputs_BT[index_R, :width])),
            model.rotary(token_rows.index_N % width),
            model.mask(carry.segments_BT[index_R, :width])._replace(token_rows=token_rows),
        )
        output_ND = output_MD[supervised_N]
        halt_logits_N = model.halt_logits(output_MD if arch.halt.backprop else output_MD.detach())[supervised_N, 0]
        loss = token_loss(output_ND, model.lm_head.weight, halt_logits_N, labels_N, torch.ones_like(halt_logits_N), arch.loss)
        with torch.no_grad():
            settled_share = np.zeros(slots.size)
            if arch.halt.mode == "settled":
                previous_M = token_rows.gather(carry.previous_argmax_BT[index_R, :width])
                settled_N = loss.argmax_N == previous_M[supervised_N]
                settled_N |= halt_logits_N.sigmoid() > arch.halt.settled_probability
                per_row = torch.zeros(2, len(working), device=model.device)
                rows_N = token_rows.index_N[supervised_N] // width
                per_row[0].index_add_(0, rows_N, settled_N.float())
                per_row[1].index_add_(0, rows_N, torch.ones_like(settled_N, dtype=torch.float32))
                settled_share[working] = (per_row[0] / per_row[1].clamp(min=1)).cpu().numpy()
                previous_M[supervised_N] = loss.argmax_N
                carry.previous_argmax_BT[index_R, :width] = token_rows.lay_out(previous_M)
            for kept, new in zip(carry.states, states, strict=True):
                kept[index_R, :width] = token_rows.lay_out(new.detach())
        halted = slots.halted(settled_share)
        slots.advance(halted)
        return Part(
            loss=loss.total,
            weight=len(labels_N),
            sums={
                "supervised": len(labels_N),
                "tokens": int(carry.lengths[working].sum()),
                "nll": loss.nll_N.sum(),
                "halt_bce": loss.halt_bce_N.sum(),
                "correct": (loss.argmax_N == labels_N).sum(),
            },
            finished_depths=slots.act_step[halted].tolist(),
        )
