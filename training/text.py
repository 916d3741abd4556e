"""Conversations as a task: an optimizer step runs a batch of them through all ACT steps.

Knows no files and no optimizer, and prints nothing. Shape suffixes as in models/layers.py; M tokens
of some rows (without padding), N the supervised ones among them, S ACT steps.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from artifacts.checkpoint import TrainerState
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import IGNORE_LABEL_ID, Example, collate
from dataset.text.packing import row_layout
from models.act import RecursiveModel
from models.device import on_device
from models.distributed import ALONE, Ranks
from models.document_attention import documents_side_by_side
from models.layers import TOKEN_MULTIPLE, Attend, TokenRows
from models.losses import token_loss
from training.schedule import expected_examples, lr_factor_by_examples
from training.task import Batch, MicroBatch, Position


class ExampleIterator(Protocol):
    """Examples in the run's fixed order, as from `dataset.text.loader.ExampleStream`."""

    def __next__(self) -> tuple[Draw, Example]:
        """The next example and its place in the order."""

    def skip(self, count: int) -> None:
        """Skip the next `count` examples."""


class TextTask:
    """The conversations of a run, `global_batch_size` of them an optimizer step."""

    loss_name = "loss_per_token"

    def __init__(
        self,
        config: PretrainInstructConfig,
        model: RecursiveModel,
        stream: ExampleIterator,
        curriculum: Curriculum,
        ranks: Ranks = ALONE,
    ) -> None:
        self.config = config
        self.model = model
        self.ranks = ranks
        self.admitted = 0
        self._curriculum = curriculum
        self._stream = stream
        multiple = config.pad_multiple
        self._rotary = model.rotary(torch.arange(-(-(config.dataset.seq_len + TOKEN_MULTIPLE) // multiple) * multiple))
        self._part = self.ranks.part(config.global_batch_size)

    @property
    def total(self) -> Position:
        """Examples and rounds of all stages."""
        return self._position(self._curriculum.total)

    @property
    def done(self) -> Position:
        """Examples and rounds trained. A batch may end in the next round."""
        return self._position(self.admitted)

    def _position(self, examples: int) -> Position:
        return Position(examples, self._curriculum.rounds_before(examples))

    def _lr_factor(self) -> float:
        config, admitted, begin = self.config, self.admitted, 0
        end: float = expected_examples(config, self._curriculum.total)
        if config.lr_schedule == "stage":
            stage = self._curriculum.stage_of(admitted - 1)
            begin = self._curriculum.begin_of(stage)
            end = min(end, begin + self._curriculum.stages[stage].total)
        return lr_factor_by_examples(
            admitted - begin,
            end - begin,
            min_ratio=config.lr_min_ratio,
            warmup_steps=config.lr_warmup_steps,
            batch_size=config.global_batch_size,
        )

    def report(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Means over supervised tokens at the last ACT step; of several, also the first's loss."""
        tokens = max(1, int(sums["supervised"]))
        first = {"loss_first_step": sums["nll_first"] / sums["supervised_first"]} if sums["supervised_first"] else {}
        return {
            "loss_per_token": sums["nll"] / tokens,
            **first,
            "halt_loss_per_token": sums["halt_bce"] / tokens,
            "token_accuracy": sums["correct"] / tokens,
            "supervised_tokens": tokens,
        }

    def state(self) -> TrainerState:
        """The number of examples admitted: the same for any number of ranks."""
        return TrainerState({}, {"admitted": self.admitted})

    def load_state(self, state: TrainerState) -> None:
        """Resume from `state`. The stream must already be at example number `admitted`.

        Raises UsageError for the state of an earlier version, with rows between two ACT steps.
        """
        if "slots.active" in state.tensors:
            raise UsageError(
                "the checkpoint is of an earlier version, which took an optimizer step after each ACT step of a row, and can't be "
                "resumed: start another run with its weights (run_name, load_checkpoint)"
            )
        self.admitted = state.values["admitted"]

    def next_batch(self, step: int) -> Batch:
        """The next examples in the run's order; this rank reads its part of them."""
        count = min(self.config.global_batch_size, self._curriculum.total - self.admitted)
        begin, end = min(count, self._part.start), min(count, self._part.stop)
        self._stream.skip(begin)
        rows = [next(self._stream)[1] for _ in range(end - begin)]
        self._stream.skip(count - end)
        self.admitted += count
        at_once = self.config.micro_batch_size or max(1, len(rows))
        parts = (rows[first : first + at_once] for first in range(0, len(rows), at_once))
        return Batch(self._lr_factor(), map(self._micro_batch, parts))

    def _micro_batch(self, examples: Sequence[Example]) -> MicroBatch:
        model, config, device = self.model, self.config, self.model.device
        act_steps = config.arch.halt_max_steps
        batch = collate(examples, pad_id=0, length_multiple=config.pad_multiple, supervise=config.dataset.supervise)
        packing = config.packing
        if model.needs_no_rows or (model.is_compiled and packing == "bucketed"):
            packing = "off"  # with groups of rows, torch.compile would recompile for each number of groups
        layout = row_layout(batch["lengths"], packing, config.pad_multiple, TOKEN_MULTIPLE)
        # Padding that rounds up the number of tokens may be beyond the batch's width.
        beyond = (0, layout.width - batch["inputs"].shape[1])
        inputs_M, segments_M, labels_M = (
            np.pad(batch[name].astype(np.int64), ((0, 0), beyond), constant_values=fill).ravel()[layout.place_N]
            for name, fill in (("inputs", 0), ("segment", 0), ("labels", IGNORE_LABEL_ID))
        )
        supervised = np.flatnonzero(labels_M != IGNORE_LABEL_ID)
        supervised_N, labels_N = on_device(supervised, device), on_device(labels_M[supervised], device)
        segments = on_device(segments_M, device)
        if model.needs_no_rows:
            attend: Attend = documents_side_by_side(config.arch.attention, layout.starts, segments)
        else:
            rows = [TokenRows(on_device(group.index_N, device), *group[1:]) for group in layout.groups]
            documents = on_device(layout.document_N, device) if packing == "packed" else None
            attend = model.token_attention(rows, segments, documents)
        outputs = model.act_steps(
            model.embed(on_device(inputs_M, device)),
            None if self._rotary is None else self._rotary.at(on_device(layout.position_N, device)),
            attend,
            act_steps,
        )
        output_SND, halt_logits_SN = list[Tensor](), list[Tensor]()
        for output_MD in outputs:
            output_SND.append(output_MD[supervised_N])
            seen_MD = output_MD if config.arch.halt.backprop else output_MD.detach()
            halt_logits_SN.append(model.halt_logits(seen_MD)[supervised_N, 0])
        # One loss over all ACT steps: the vocabulary head's gradient, as large as its weight, is
        # then computed once.
        halt_logits = torch.cat(halt_logits_SN)
        loss = token_loss(
            torch.cat(output_SND),
            model.lm_head.weight,
            halt_logits,
            labels_N.repeat(act_steps),
            torch.full_like(halt_logits, 1 / act_steps),
            config.arch.loss,
            model.is_compiled,
        )
        nll_SN, argmax_SN, halt_bce_SN = (values.view(act_steps, -1) for values in (loss.nll_N, loss.argmax_N, loss.halt_bce_N))
        has_first = act_steps > 1
        # "tokens" and "attended" count all ACT steps. "nll", "halt_bce" and "correct" are sums over
        # supervised tokens at the last ACT step. The "_first" ones are of the first ACT step, where
        # there are several.
        return MicroBatch(
            loss=loss.total,
            weight=len(supervised),
            sums={
                "rows": len(examples),
                "tokens": int(batch["lengths"].sum()) * act_steps,
                "attended": (len(inputs_M) if model.needs_no_rows else layout.attended) * act_steps,
                "supervised": len(supervised),
                "nll": nll_SN[-1].sum(),
                "halt_bce": halt_bce_SN[-1].sum(),
                "correct": (argmax_SN[-1] == labels_N).sum(),
                "supervised_first": len(supervised) if has_first else 0,
                "nll_first": nll_SN[0].sum() if has_first else 0,
            },
        )
