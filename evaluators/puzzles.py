"""Puzzles measured: metrics of rows by set and by ACT step, what there is to save, and evaluators that vote.

Rows take all ACT steps, or with `arch.act_inference` leave when their halting logit says so. Shape suffixes as in models/layers.py;
P counts a puzzle vector's positions, S ACT steps, R the rows of a batch that are still at work.
"""

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from artifacts.outputs import SavedOutputs
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import IGNORE_LABEL_ID, PuzzleBatch, PuzzleData, evaluation_batches
from evaluators.arc import ARC
from models.act import RecursiveModel
from models.device import on_device
from models.losses import row_loss
from models.row_halting import halted

# What is summed over rows, under the original's names. Rows without a label count in nothing.
_MEASURES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")
_SUMS = ("rows", *_MEASURES)


@dataclass(frozen=True)
class PuzzleOutput:
    """A batch's rows, without padding, as they left: `row` (int64 [B]) is where each stands in the set `set_name`."""

    set_name: str
    row: Tensor
    inputs_BT: Tensor
    labels_BT: Tensor
    puzzle_ids_B: Tensor
    preds_by_step_BST: Tensor
    """The most probable tokens after each ACT step; after a row has left, those it left with."""
    halt_logits_B: Tensor
    steps_B: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by the names under which it can be saved (config.schema.PuzzleOutput)."""
        return {
            "inputs": self.inputs_BT,
            "labels": self.labels_BT,
            "puzzle_identifiers": self.puzzle_ids_B,
            "q_halt_logits": self.halt_logits_B,
            "preds": self.preds_by_step_BST[:, -1],
            "preds_by_step": self.preds_by_step_BST,
            "steps": self.steps_B,
        }


@dataclass(frozen=True)
class PuzzleResult:
    """Sums over rows by set, float64 [ACT steps, sums]: after each step, rows that have left counted as they left."""

    by_set: dict[str, npt.NDArray[np.float64]]

    def totals(self) -> list[float]:
        """Every sum in it, in a fixed order: those of several ranks, added up, are the sums of the whole."""
        return [float(value) for sums in self.by_set.values() for value in sums.ravel()]

    def with_totals(self, totals: Sequence[float]) -> "PuzzleResult":
        """The result of the same sets and depth whose `totals` these are."""
        parts = np.split(np.array(totals), len(self.by_set))
        return PuzzleResult({name: part.reshape(-1, len(_SUMS)) for name, part in zip(self.by_set, parts, strict=True)})

    def report(self) -> dict[str, Any]:
        """Metrics as they are written to metrics.json: of all rows, and under "sets" of each set by name."""
        whole = np.sum(list(self.by_set.values()), axis=0)
        return {**_metrics(whole), "sets": {name: _metrics(sums) for name, sums in self.by_set.items()}}


def _metrics(sums: npt.NDArray[np.float64]) -> dict[str, Any]:
    rows = max(1.0, float(sums[-1, 0]))
    means = {name: float(sums[-1, place]) / rows for place, name in enumerate(_SUMS) if name in _MEASURES}
    curve = (sums[:, _SUMS.index("exact_accuracy")] / rows).tolist()
    return {**means, "exact_accuracy_by_act_step": curve, "rows": int(sums[-1, 0])}


@torch.no_grad()
def evaluate_puzzles(
    model: RecursiveModel,
    data: PuzzleData,
    *,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    max_batches: int | None = None,
    on_output: Callable[[PuzzleOutput], None] | None = None,
    progress: Callable[[Iterable[PuzzleBatch]], Iterable[PuzzleBatch]] = lambda batches: batches,
) -> PuzzleResult:
    """Measure `model` on a rank's part of every row of `data`, or of its first `max_batches` batches of `batch_size` rows.

    `on_output` gets the rows of each batch. Raises UsageError if the ranks can't share a batch evenly.
    """
    result = {name: np.zeros((model.config.halt_max_steps, len(_SUMS))) for name in data.sets}
    batches = evaluation_batches(data, global_batch_size=batch_size, rank=rank, ranks=ranks)
    for number, batch in enumerate(progress(batches)):
        if number == max_batches:
            break
        if not (batch.rows >= 0).any():
            continue
        output, sums = _solve(model, batch)
        result[batch.set_name] += sums.numpy()
        if on_output is not None:
            on_output(output)
    return PuzzleResult(result)


def _solve(model: RecursiveModel, batch: PuzzleBatch) -> tuple[PuzzleOutput, Tensor]:
    """All ACT steps of a batch's rows, and their sums after each, float64 [S, sums] on the host."""
    config = model.config
    real = batch.rows >= 0

    inputs_BT, labels_BT, puzzle_ids_B = (
        on_device(values[real].astype(np.int64), model.device) for values in (batch.inputs, batch.labels, batch.puzzle_identifiers)
    )
    rows, tokens = inputs_BT.shape
    positions = model.prefix_len + tokens
    rotary = model.rotary(torch.arange(positions))
    mask = model.mask(torch.zeros(1, positions, dtype=torch.int64, device=model.device))
    x_BTD = model.embed(inputs_BT, puzzle_ids_B)
    states = model.initial_states(rows, positions)
    # Of every row as it stands after its last step: one column for each of _MEASURES.
    exact = torch.promote_types(model.dtype, torch.float32)
    measured_BM = torch.zeros(rows, len(_MEASURES), dtype=exact, device=model.device)
    preds_BT, halt_logits_B = torch.zeros_like(inputs_BT), torch.zeros(rows, device=model.device)
    steps_B = torch.zeros_like(puzzle_ids_B)
    at_work_R = torch.arange(rows, device=model.device)
    measured, preds = [], []
    for step in range(1, config.halt_max_steps + 1):
        if len(at_work_R):
            states, output_RTD = model.act_step(states, x_BTD[at_work_R], rotary, mask)
            halt_logits_R2 = model.halt_logits(output_RTD[:, 0])
            loss = row_loss(
                output_RTD[:, model.prefix_len :], model.lm_head.weight, halt_logits_R2, labels_BT[at_work_R], config.loss
            )
            steps_R = torch.full_like(at_work_R, step)
            preds_BT[at_work_R], steps_B[at_work_R] = loss.argmax_BT, steps_R
            halt_logits_B[at_work_R] = halt_logits_R2[:, 0].to(halt_logits_B.dtype)
            says_right_R = halt_logits_R2[:, 0] >= 0
            columns = (loss.accuracy_B, loss.is_right_B, says_right_R == loss.is_right_B, steps_R, loss.nll_B, loss.halt_bce_B)
            measured_BM[at_work_R] = torch.stack([column.to(exact) for column in columns], dim=1)
            going_on_R = ~halted(config, halt_logits_R2, steps_R, None)
            if config.act_inference:
                # Rows that have left cost nothing more.
                at_work_R, states = at_work_R[going_on_R], tuple(state[going_on_R] for state in states)
        measured.append(measured_BM.clone())
        preds.append(preds_BT.clone())
    row = torch.from_numpy(batch.rows[real])
    output = PuzzleOutput(
        batch.set_name, row, inputs_BT, labels_BT, puzzle_ids_B, torch.stack(preds, dim=1), halt_logits_B, steps_B
    )
    # Summed on the host, where there is float64 whatever the device.
    counted_B1 = torch.from_numpy((batch.labels[real] != IGNORE_LABEL_ID).any(axis=1, keepdims=True))
    measured_SBM = torch.stack(measured).cpu().double()
    counted_SB1 = counted_B1.double().expand(len(measured), -1, -1)
    return output, torch.cat((counted_SB1, measured_SBM * counted_B1), dim=2).sum(dim=1)


class PuzzleMeasurement:
    """What a config asks to be measured of one split: metrics, evaluators' results, saved tensors."""

    def __init__(self, config: PretrainPuzzleConfig, data: PuzzleData, data_paths: Sequence[str]) -> None:
        """data: a split of `data_paths`. Raises UsageError if an evaluator misses something in them."""
        self._config = config
        self._data = data
        self._evaluators: list[tuple[Set[str], str, ARC]] = []
        for settings in config.evaluators:
            for number, path in enumerate(data_paths):
                # Of several data paths each has its own test puzzles; the first one's results have the plain names.
                suffix = f"{number or ''}"
                sets = {f"{name}{suffix}" for name in data.metadata.sets}
                voting = ARC(path, pass_ks=settings.pass_Ks, attempts=settings.submission_K, accumulate=settings.aggregated_voting)
                self._evaluators.append((sets, suffix, voting))

    def measure(
        self,
        model: RecursiveModel,
        folder: Path,
        name: str,
        *,
        save: Sequence[str] = (),
        rank: int = 0,
        ranks: int = 1,
        sum_over_ranks: Callable[[list[float]], list[float]] = lambda totals: totals,
        max_batches: int | None = None,
        progress: Callable[[Iterable[PuzzleBatch]], Iterable[PuzzleBatch]] = lambda batches: batches,
    ) -> dict[str, Any]:
        """The report, on every rank; evaluators' results are the first rank's.

        Into `folder` go an evaluator's submission, and outputs_<name>.safetensors with the tensors `save`; where there are several
        sets, or ranks, one file for each of them.
        """
        saved = {set_name: SavedOutputs(save) for set_name in self._data.sets}
        for _, _, evaluator in self._evaluators:
            evaluator.begin()

        def keep(output: PuzzleOutput) -> None:
            tensors = output.tensors()
            if save:
                saved[output.set_name].add(output.row, tensors)
            for sets, _, evaluator in self._evaluators:
                if output.set_name in sets:
                    evaluator.add(**{key: tensors[key] for key in ARC.required_outputs})

        result = evaluate_puzzles(
            model,
            self._data,
            batch_size=self._config.global_batch_size,
            rank=rank,
            ranks=ranks,
            max_batches=max_batches,
            on_output=keep,
            progress=progress,
        )
        report = result.with_totals(sum_over_ranks(result.totals())).report()
        if save:
            folder.mkdir(parents=True, exist_ok=True)
        for set_name, outputs in saved.items():
            of_several = [set_name] * (len(saved) > 1) + [f"rank{rank}"] * (ranks > 1)
            if outputs.has_rows:
                outputs.write(folder / f"{'_'.join(['outputs', name, *of_several])}.safetensors")
        for _, suffix, evaluator in self._evaluators:
            # Each path's submission.json, in a folder of its own from the second path on.
            place = folder / f"ARC{suffix}" if suffix else folder
            place.mkdir(parents=True, exist_ok=True)
            scores = evaluator.result(place)
            report |= {key.replace("/", f"{suffix}/"): value for key, value in (scores or {}).items()}
        return report
