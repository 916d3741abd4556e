"""Conversations as a task: slots full of rows, their states, one ACT step. Knows no files, no optimizer, and prints nothing.

Shape suffixes as in models/layers.py; R counts the rows in work, M their tokens (padding is never computed), N the supervised ones.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import TrainerState
from config.schema import PretrainInstructConfig
from dataset.text.curriculum import Curriculum
from dataset.text.loader import IGNORE_LABEL_ID, collate
from dataset.text.packing import lay_out
from models.act import RecursiveModel
from models.device import on_device
from models.layers import TOKEN_MULTIPLE, TokenRows
from models.losses import token_loss
from models.recursive_reasoning.base import States
from training.distributed import Ranks
from training.loop import Part
from training.schedule import learning_rate
from training.slots import Examples, Slots

_SLOT_ARRAYS = ("stage", "epoch", "example_id", "act_step", "depth", "active")


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
    sum_names = ("supervised", "tokens", "attended", "nll", "halt_bce", "correct")

    def __init__(
        self,
        config: PretrainInstructConfig,
        model: RecursiveModel,
        stream: Examples,
        curriculum: Curriculum,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.ranks = ranks or Ranks()
        self.total = curriculum.total
        self._curriculum = curriculum
        arch = config.arch
        part = self.ranks.part(config.global_batch_size)
        self.slots = Slots(config.global_batch_size, stream, arch.halt, arch.halt_max_steps, config.seed, self.total, part)
        multiple = config.pad_multiple
        self._positions = -(-(config.dataset.seq_len + TOKEN_MULTIPLE) // multiple) * multiple
        self.carry = Carry.empty(model, len(part), self._positions)
        self._rotary = model.rotary(torch.arange(self._positions))
        self.finished_depths: list[int] = []
        self._leaving: Counter[str] = Counter()

    @property
    def busy(self) -> bool:
        """Whether any row of any rank is in work."""
        return self.slots.finished < self.slots.admitted

    @property
    def done(self) -> int:
        """Examples that have halted."""
        return self.slots.finished

    @property
    def epochs(self) -> int:
        """Rounds of all stages."""
        return self._curriculum.rounds_before(self.total)

    @property
    def epochs_done(self) -> int:
        """Examples that have halted, in epochs; slots flow over epoch ends, so the last few may be of the next one."""
        return self._curriculum.rounds_before(self.slots.finished)

    def progress(self, step: int) -> float | None:
        """Share of the run that is over after `step` optimizer steps, if it ends before its data does; None: it doesn't."""
        return None if self.config.max_steps is None else step / self.config.max_steps

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at the examples admitted so far.

        Where the run ends before its data, the schedule's end is the number of examples that the pace up to `step` leads to by
        then: at the last step the number admitted.
        """
        config, admitted, begin, end = self.config, self.slots.admitted, 0, float(self.total)
        if progress := self.progress(step):
            end = min(end, admitted / min(1.0, progress))
        if config.lr_schedule == "stage":
            stage = self._curriculum.stage_of(admitted - 1)
            begin = self._curriculum.begin_of(stage)
            end = min(end, begin + self._curriculum.stages[stage].total)
        return learning_rate(
            admitted - begin,
            end - begin,
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

    def report_work(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Of the positions that attention computed, the share that was padding."""
        return {"attention_padding": 1 - sums["tokens"] / max(1, sums["attended"])}

    def warnings(self) -> list[str]:
        """Whether this rank's rows all settled as soon as they may leave, or none did.

        Of those that left since this was last decided; of fewer than it has slots nothing is said yet.
        """
        halt, waited, early, late = self.config.arch.halt, self._leaving.total(), self._leaving["early"], self._leaving["late"]
        if waited < len(self.slots.active):
            return []
        self._leaving.clear()
        if max(early, late) < waited:
            return []
        knobs = f"arch.halt.settled_share={halt.settled_share} or arch.halt.settled_probability={halt.settled_probability}"
        if late:
            return [f"halting has collapsed: no row settles before ACT step {self.slots.max_steps}; lower {knobs}"]
        return [f"halting has collapsed: every row settles at the first ACT step it may leave at; raise {knobs}"]

    def state(self) -> TrainerState:
        """Slots and carry of all ranks, and the number of examples admitted: the same for any number of ranks."""
        tensors = {name: self.ranks.gather(part, self.slots.size) for name, part in self._parts_of_state().items()}
        return TrainerState(tensors, {"admitted": self.slots.admitted})

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`, whatever number of ranks left it; the stream must already stand at example number `admitted`."""
        slots, carry = self.slots, self.carry
        here = slice(slots.part.start, slots.part.stop)
        for name, target in self._parts_of_state().items():
            saved = state.tensors[name][here]
            if target.dim() == 1:
                target.copy_(saved)
                continue
            # Rows may be padded to another width than they were; beyond both widths there is nothing but padding.
            width = min(saved.shape[1], target.shape[1])
            target[:, :width] = saved[:, :width].to(target.device)
        carry.supervised_BT[:] = (carry.labels_BT != IGNORE_LABEL_ID).cpu().numpy()
        free = ~state.tensors["slots.active"].numpy()
        slots.free_below, slots.free_above = int(free[: here.start].sum()), int(free[here.stop :].sum())
        slots.admitted = state.values["admitted"]

    def _parts_of_state(self) -> dict[str, Tensor]:
        """What is kept of this rank's rows, [rows, ...], to be read or written in place."""
        slots, carry = self.slots, self.carry
        return {
            "carry.inputs": carry.inputs_BT,
            "carry.labels": carry.labels_BT,
            "carry.segments": carry.segments_BT,
            "carry.previous_argmax": carry.previous_argmax_BT,
            **{f"carry.state.{i}": state for i, state in enumerate(carry.states)},
            "carry.lengths": torch.from_numpy(carry.lengths),
            **{f"slots.{name}": torch.from_numpy(getattr(slots, name)) for name in _SLOT_ARRAYS},
        }

    def admit(self, step: int) -> None:
        """Give the next examples, with fresh states, to the free slots."""
        entries = self.slots.refill(self.progress(step - 1) or 0.0)
        if not entries:
            return
        carry = self.carry
        batch = collate(
            [entry.example for entry in entries],
            pad_id=0,
            length_multiple=self.config.pad_multiple,
            supervise=self.config.dataset.supervise,
        )
        host_slots = np.array([entry.slot for entry in entries])
        slots = on_device(host_slots, self.model.device)
        width = batch["inputs"].shape[1]
        for target, name, fill in (
            (carry.inputs_BT, "inputs", 0),
            (carry.labels_BT, "labels", IGNORE_LABEL_ID),
            (carry.segments_BT, "segment", 0),
        ):
            # Not by assignment: a GPU would be waited for until the number is copied to it.
            target[:, width:].index_fill_(0, slots, fill)
            target[slots, :width] = on_device(batch[name].astype(np.int64), target.device)
        carry.previous_argmax_BT.index_fill_(0, slots, -1)
        for state, initial in zip(carry.states, self.model.initial_states(len(entries), self._positions), strict=True):
            state[slots] = initial
        carry.lengths[host_slots] = batch["lengths"]
        carry.supervised_BT[host_slots] = False
        carry.supervised_BT[host_slots, :width] = batch["labels"] != IGNORE_LABEL_ID

    def moved(self, lr_factor: float) -> None:
        """Nothing: all of a language model's weights are the optimizer's."""

    def mend(self) -> None:
        """Give initial states again to rows whose states aren't finite, or they would spoil every step until they leave."""
        broken_B = ~torch.stack([state.isfinite().flatten(1).all(dim=1) for state in self.carry.states]).all(dim=0)
        for state, initial in zip(self.carry.states, self.model.initial_states(1, self._positions), strict=True):
            state[broken_B] = initial

    def parts(self) -> Iterator[Part]:
        """At most `act_steps_per_update` ACT steps of the rows in the slots, `micro_batch_size` at a time, while any is left."""
        slots = self.slots
        self.finished_depths = []
        at_once = self.config.micro_batch_size or len(slots.active)
        for _ in range(self.config.act_steps_per_update):
            if not slots.busy:
                break
            settled_share = np.zeros(len(slots.active))
            for first in range(0, len(slots.active), at_once):
                working = first + np.flatnonzero(slots.active[first : first + at_once])
                if len(working):
                    yield self._act_step(working, settled_share)
            halted = slots.halted(settled_share)
            slots.advance(halted)
            self.finished_depths += slots.act_step[halted].tolist()
            if self.config.arch.halt.mode == "settled":
                # Rows whose drawn depth is the limit leave there whatever the rule says.
                steps = slots.act_step[halted & (slots.depth < slots.max_steps)]
                drawn = slots.depth[halted & (slots.depth < slots.max_steps)]
                self._leaving["early"] += int((steps == drawn).sum())
                self._leaving["late"] += int((steps == slots.max_steps).sum())
                self._leaving["between"] += int(((steps > drawn) & (steps < slots.max_steps)).sum())
        free = self.ranks.gather_number(slots.free)
        slots.free_below, slots.free_above = sum(free[: self.ranks.rank]), sum(free[self.ranks.rank + 1 :])

    def _act_step(self, working: np.ndarray, settled_share: np.ndarray) -> Part:
        """One ACT step of the rows in the slots `working`; writes their shares of settled tokens."""
        model, carry = self.model, self.carry
        arch = self.config.arch
        layout = lay_out(carry.lengths[working], self.config.packing, self.config.pad_multiple, TOKEN_MULTIPLE)
        index_M, width = layout.place_N, layout.width
        # The same tokens stand twice in rows: one conversation each in the carry, and as attention has them.
        token_rows = TokenRows(on_device(index_M, model.device), len(working), width)
        attention_rows = [TokenRows(on_device(group.index_N, model.device), *group[1:]) for group in layout.groups]
        documents_M = on_device(layout.document_N, model.device) if self.config.packing == "packed" else None
        # While every slot works, views do; only the end of the run, when slots drain, copies rows.
        first, last = int(working[0]), int(working[-1])
        full = len(working) == last + 1 - first
        index_R = slice(first, last + 1) if full else on_device(working, model.device)
        labels_M = token_rows.gather(carry.labels_BT[index_R, :width])
        is_supervised_M = carry.supervised_BT[working, :width].ravel()[index_M]
        supervised_N = on_device(np.flatnonzero(is_supervised_M), model.device)
        labels_N = labels_M[supervised_N]

        states, output_MD = model.act_step(
            tuple(token_rows.gather(state[index_R, :width]) for state in carry.states),
            model.embed(token_rows.gather(carry.inputs_BT[index_R, :width])),
            None if self._rotary is None else self._rotary.at(on_device(layout.position_N, model.device)),
            model.mask_in_rows(attention_rows, token_rows.gather(carry.segments_BT[index_R, :width]), documents_M),
        )
        output_ND = output_MD[supervised_N]
        halt_logits_N = model.halt_logits(output_MD if arch.halt.backprop else output_MD.detach())[supervised_N, 0]
        loss = token_loss(output_ND, model.lm_head.weight, halt_logits_N, labels_N, torch.ones_like(halt_logits_N), arch.loss)
        with torch.no_grad():
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
        return Part(
            loss=loss.total,
            weight=len(labels_N),
            sums={
                "supervised": len(labels_N),
                "tokens": int(carry.lengths[working].sum()),
                "attended": layout.attended,
                "nll": loss.nll_N.sum(),
                "halt_bce": loss.halt_bce_N.sum(),
                "correct": (loss.argmax_N == labels_N).sum(),
            },
        )
