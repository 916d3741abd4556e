"""Conversations as a task: batches of rows, each taken through its ACT steps in one optimizer step. Knows no files, no optimizer.

Shape suffixes as in models/layers.py; R counts the rows in work, M their tokens (padding is never computed), N the supervised ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import TrainerState
from config.schema import PretrainInstructConfig
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import IGNORE_LABEL_ID, Example, collate
from dataset.text.packing import lay_out
from models.act import RecursiveModel
from models.device import on_device
from models.layers import TOKEN_MULTIPLE, TokenRows
from models.losses import token_loss
from training.distributed import Ranks
from training.loop import Part
from training.schedule import learning_rate


class Examples(Protocol):
    """Where examples come from: `dataset.text.loader.ExampleStream`, in the run's fixed order."""

    def __next__(self) -> tuple[Draw, Example]:
        """The next example and where in the order it stands."""

    def skip(self, count: int) -> None:
        """Pass over the next `count` examples."""


class TextTask:
    """The conversations of a run, `global_batch_size` of them an optimizer step."""

    unit = "ex"
    loss_name = "loss_per_token"
    sum_names = ("supervised", "tokens", "attended", "nll", "nll_first", "nll_last", "halt_bce", "correct")

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
        self.admitted = 0
        self.done = 0
        self.act_steps = 1
        self._curriculum = curriculum
        self._stream = stream
        self._part = self.ranks.part(config.global_batch_size)
        self._examples: list[Example] = []
        self.finished_depths: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether any row of any rank is in work."""
        return self.done < self.admitted

    @property
    def epochs(self) -> int:
        """Rounds of all stages."""
        return self._curriculum.rounds_before(self.total)

    @property
    def epochs_done(self) -> int:
        """Examples trained, in epochs; batches flow over epoch ends, so the last few may be of the next one."""
        return self._curriculum.rounds_before(self.done)

    def progress(self, step: int) -> float | None:
        """Share of the run that is over after `step` optimizer steps, if it ends before its data does; None: it doesn't."""
        return None if self.config.max_steps is None else step / self.config.max_steps

    def lr_factor(self, step: int) -> float:
        """Share of the peak learning rate at the examples admitted so far.

        Where the run ends before its data, the schedule's end is the number of examples that the pace up to `step` leads to by
        then: at the last step the number admitted.
        """
        config, admitted, begin, end = self.config, self.admitted, 0, float(self.total)
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
            batch_size=config.global_batch_size,
        )

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Nats and accuracy per supervised token, over all ACT steps, and nats at the first and at the last."""
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
        """None."""
        return []

    def state(self) -> TrainerState:
        """The number of examples admitted: the same for any number of ranks."""
        return TrainerState({}, {"admitted": self.admitted})

    def load_state(self, state: TrainerState) -> None:
        """Go on from `state`; the stream must already stand at example number `admitted`."""
        self.admitted = self.done = state.values["admitted"]

    def admit(self, step: int) -> None:
        """Take the next examples, of which this rank has its part."""
        count = min(self.config.global_batch_size, self.total - self.admitted)
        begin, end = min(count, self._part.start), min(count, self._part.stop)
        self._stream.skip(begin)
        self._examples = [next(self._stream)[1] for _ in range(end - begin)]
        self._stream.skip(count - end)
        over = max(self.admitted / self.total, self.progress(step - 1) or 0.0)
        self.act_steps = self._act_steps_at(step, over)
        self.admitted += count

    def _act_steps_at(self, step: int, over: float) -> int:
        config, most = self.config, self.config.arch.halt_max_steps
        if config.act_steps == "drawn":
            return int(np.random.Generator(np.random.Philox(key=config.seed, counter=[step, 0, 0, 0])).integers(1, most + 1))
        if config.act_steps == "fixed" or over >= config.grow_until:
            return most
        return 1 + int(over / config.grow_until * (most - 1))

    def moved(self, lr_factor: float) -> None:
        """Nothing: all of a language model's weights are the optimizer's."""

    def mend(self) -> None:
        """Nothing: no row outlives its step."""

    def parts(self) -> Iterator[Part]:
        """The rows taken, `micro_batch_size` at a time."""
        at_once = self.config.micro_batch_size or max(1, len(self._examples))
        for first in range(0, len(self._examples), at_once):
            yield self._refine(self._examples[first : first + at_once])
        self.finished_depths = [self.act_steps] * len(self._examples)
        self.done = self.admitted

    def _refine(self, examples: Sequence[Example]) -> Part:
        """All ACT steps of these rows."""
        model, config, act_steps = self.model, self.config, self.act_steps
        arch, device = config.arch, model.device
        batch = collate(examples, pad_id=0, length_multiple=config.pad_multiple, supervise=config.dataset.supervise)
        lengths = batch["lengths"]
        layout = lay_out(lengths, config.packing, config.pad_multiple, TOKEN_MULTIPLE)
        index_M, width = layout.place_N, layout.width

        def tokens(name: str, fill: int) -> np.ndarray[Any, Any]:
            rows = batch[name].astype(np.int64)
            return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=fill).ravel()[index_M]

        labels_M = tokens("labels", IGNORE_LABEL_ID)
        supervised_N = on_device(np.flatnonzero(labels_M != IGNORE_LABEL_ID), device)
        labels_N = on_device(labels_M, device)[supervised_N]
        attention_rows = [TokenRows(on_device(group.index_N, device), *group[1:]) for group in layout.groups]
        documents_M = on_device(layout.document_N, device) if config.packing == "packed" else None
        mask = model.mask_in_rows(attention_rows, on_device(tokens("segment", 0), device), documents_M)
        rotary = model.rotary(on_device(layout.position_N, device))
        x_MD = model.embed(on_device(tokens("inputs", 0), device))
        states = model.initial_states(len(index_M))

        weights = [config.loss_discount ** (act_steps - 1 - step) for step in range(act_steps)]
        calls = len(model.level_calls)
        total = x_MD.new_zeros((), dtype=torch.promote_types(x_MD.dtype, torch.float32))
        sums: dict[str, Tensor | int] = {}
        for step, weight in enumerate(weights):
            grad_calls = None
            if arch.grad_calls is not None:
                grad_calls = min(calls, max(0, arch.grad_calls - calls * (act_steps - 1 - step)))
            else:
                states = tuple(state.detach() for state in states)
            states, output_MD = model.act_step(states, x_MD, rotary, mask, grad_calls=grad_calls)
            if not weight:
                continue
            halt_logits_N = model.halt_logits(output_MD if arch.halt.backprop else output_MD.detach())[supervised_N, 0]
            ones_N = torch.ones_like(halt_logits_N)
            loss = token_loss(output_MD[supervised_N], model.lm_head.weight, halt_logits_N, labels_N, ones_N, arch.loss)
            total = total + weight * loss.total
            of_step = {
                "nll": loss.nll_N.sum(),
                "halt_bce": loss.halt_bce_N.sum(),
                "correct": (loss.argmax_N == labels_N).sum(),
                "supervised": len(labels_N),
            }
            sums = {name: sums.get(name, 0) + value for name, value in of_step.items()}
            if step == act_steps - 1:
                sums["nll_last"] = loss.nll_N.sum()
            if step == 0:
                sums["nll_first"] = loss.nll_N.sum()
        sums.setdefault("nll_first", 0)
        return Part(
            loss=total / sum(weights),
            weight=len(labels_N),
            sums={**sums, "tokens": int(lengths.sum()) * act_steps, "attended": layout.attended * act_steps},
        )
