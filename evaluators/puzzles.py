"""Evaluation of puzzles: metrics by set and by ACT step, tensors to save, and evaluators that vote.

Rows take all ACT steps, or with `arch.act_inference` halt by their halting logit. Shape suffixes as
in models/layers.py; P positions of a puzzle's vector, S ACT steps, K samples of a puzzle, R rows of
all samples, or those still active.
"""

import itertools
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from artifacts.outputs import SavedOutputs
from config.progress import progress_bar
from config.schema import PretrainPuzzleConfig
from dataset.puzzles.loader import IGNORE_LABEL_ID, PuzzleBatch, PuzzleData, evaluation_batch_count, evaluation_batches
from evaluators.arc import ARC
from evaluators.search import NO_SEARCH, Search
from models.act import RecursiveModel
from models.device import on_device
from models.distributed import ALONE, Ranks
from models.losses import row_loss
from models.row_halting import halted

# Sums over rows, by the original's names. Rows without a label don't count.
_MEASURES = ("accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss", "q_halt_loss")
_ORACLE = "oracle_accuracy"
_SUMS = ("rows", *_MEASURES, _ORACLE)


@dataclass(frozen=True)
class PuzzleOutput:
    """A batch's rows, without padding, after their last step."""

    set_name: str
    row: Tensor
    """int64 [B]: the place of each in its set."""
    inputs_BT: Tensor
    labels_BT: Tensor
    puzzle_ids_B: Tensor
    preds_BKST: Tensor
    """The argmax tokens of each sample after each ACT step, of its last step once it has halted."""
    halt_logits_BKS: Tensor
    """The halting logits, likewise."""
    steps_BK: Tensor
    """ACT steps that each sample took."""
    chosen_B: Tensor
    """The chosen sample of each puzzle."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the chosen samples, by the names of config.schema.PuzzleOutputName."""
        place = torch.arange(len(self.chosen_B), device=self.chosen_B.device), self.chosen_B
        return {
            "inputs": self.inputs_BT,
            "labels": self.labels_BT,
            "puzzle_identifiers": self.puzzle_ids_B,
            "q_halt_logits": self.halt_logits_BKS[..., -1][place],
            "preds": self.preds_BKST[:, :, -1][place],
            "preds_by_step": self.preds_BKST[place],
            "steps": self.steps_BK[place],
        }

    def ballots(self) -> dict[str, Tensor]:
        """Every sample's answer as its own row, [B * K, ...], by the names that evaluators use."""
        samples = self.preds_BKST.shape[1]
        return {
            "inputs": self.inputs_BT.repeat_interleave(samples, dim=0),
            "puzzle_identifiers": self.puzzle_ids_B.repeat_interleave(samples),
            "q_halt_logits": self.halt_logits_BKS[..., -1].flatten(),
            "preds": self.preds_BKST[:, :, -1].flatten(0, 1),
        }


def evaluate_puzzles(
    model: RecursiveModel,
    data: PuzzleData,
    *,
    batch_size: int,
    search: Search = NO_SEARCH,
    ranks: Ranks = ALONE,
    max_batches: int | None = None,
    on_output: Callable[[PuzzleOutput], None] | None = None,
    bar: str | None = None,
) -> dict[str, Any]:
    """Measure `model` on `data`, or on its first `max_batches` batches of `batch_size` rows, which `ranks` share.

    Returns the metrics for metrics.json, on every rank: over all rows, and under "sets" for each set by name. A halted row counts
    with its last step. `on_output` gets this rank's rows of each batch. bar: label of a progress bar; None: no bar. Raises
    UsageError if the ranks can't share a batch evenly.
    """
    own = np.zeros((len(data.sets), model.config.halt_max_steps, len(_SUMS)))
    by_set = dict(zip(data.sets, own, strict=True))
    batches = evaluation_batches(data, global_batch_size=batch_size, rank=ranks.rank, ranks=ranks.size)
    count = evaluation_batch_count(data, batch_size)
    count = count if max_batches is None else min(count, max_batches)
    for batch in progress_bar(itertools.islice(batches, count), shown=bar is not None, desc=bar, unit="batch", total=count):
        if (batch.rows >= 0).any():
            output, sums = solve(model, batch, search)
            by_set[batch.set_name] += sums.numpy()
            if on_output is not None:
                on_output(output)
    totals = np.reshape(ranks.sum_numbers(own.ravel().tolist()), own.shape)
    has_oracle = search.samples > 1
    sets = {name: _metrics(sums, has_oracle) for name, sums in zip(data.sets, totals, strict=True)}
    return {**_metrics(totals.sum(axis=0), has_oracle), "sets": sets}


def _metrics(sums: npt.NDArray[np.float64], has_oracle: bool) -> dict[str, Any]:
    rows = max(1.0, float(sums[-1, 0]))
    means = {name: float(total) / rows for name, total in zip(_SUMS, sums[-1], strict=True)}
    del means["rows"]
    if not has_oracle:
        del means[_ORACLE]
    curve = (sums[:, _SUMS.index("exact_accuracy")] / rows).tolist()
    return {**means, "exact_accuracy_by_act_step": curve, "rows": int(sums[-1, 0])}


@torch.no_grad()
def solve(model: RecursiveModel, batch: PuzzleBatch, search: Search) -> tuple[PuzzleOutput, Tensor]:
    """Run all ACT steps of rows, which need no labels; and their sums, float64 [S, sums] on the host."""
    config = model.config
    if search.choose == "first":
        config = config.model_copy(update={"act_inference": True})
    real = batch.rows >= 0

    inputs_BT, labels_BT, puzzle_ids_B = (
        on_device(values[real].astype(np.int64), model.device) for values in (batch.inputs, batch.labels, batch.puzzle_identifiers)
    )
    rows, tokens = inputs_BT.shape
    samples = search.samples
    positions = model.prefix_len + tokens
    rotary = model.rotary(torch.arange(positions))
    attend = model.row_attention(torch.zeros(1, positions, dtype=torch.int64, device=model.device))
    inputs_RT, labels_RT = (values.repeat_interleave(samples, dim=0) for values in (inputs_BT, labels_BT))
    places = batch.rows[real].tolist()
    forms = search.forms(places, model.device)
    if forms is not None:
        inputs_RT, labels_RT = forms.of(inputs_RT), forms.of(labels_RT)
    x_RTD = model.embed(inputs_RT, puzzle_ids_B.repeat_interleave(samples))
    states = search.starts(model.initial_states(rows, positions), places)
    # The metrics of each row after its last step so far: one column for each of _MEASURES.
    exact = torch.promote_types(model.dtype, torch.float32)
    measured_RM = torch.zeros(rows * samples, len(_MEASURES), dtype=exact, device=model.device)
    argmax_RT, halt_logits_R = torch.zeros_like(labels_RT), torch.zeros(rows * samples, device=model.device)
    steps_R = torch.zeros_like(argmax_RT[:, 0])
    has_halted_R = torch.zeros_like(steps_R, dtype=torch.bool)
    at_work = torch.arange(rows * samples, device=model.device)
    measured, preds, halt_logits = [], [], []
    for step in range(1, config.halt_max_steps + 1):
        if len(at_work):
            states, output_RTD = model.act_step(states, x_RTD[at_work], rotary, attend)
            halt_logits_R2 = model.halt_logits(output_RTD[:, 0])
            loss = row_loss(
                output_RTD[:, model.prefix_len :], model.lm_head.weight, halt_logits_R2, labels_RT[at_work], config.loss
            )
            now = torch.full_like(at_work, step)
            argmax_RT[at_work], steps_R[at_work] = loss.argmax_BT, now
            halt_logits_R[at_work] = halt_logits_R2[:, 0].to(halt_logits_R.dtype)
            says_right_R = halt_logits_R2[:, 0] >= 0
            columns = (loss.accuracy_B, loss.is_right_B, says_right_R == loss.is_right_B, now, loss.nll_B, loss.halt_bce_B)
            measured_RM[at_work] = torch.stack([column.to(exact) for column in columns], dim=1)
            has_halted_R[at_work] = halted(config, halt_logits_R2, now, None)
            preds_RT = argmax_RT.clone() if forms is None else forms.undone(argmax_RT)
            chosen_B, is_settled_B = search.choice(
                inputs_BT, *(values.unflatten(0, (rows, samples)) for values in (preds_RT, halt_logits_R, has_halted_R))
            )
            leaves = (has_halted_R | is_settled_B.repeat_interleave(samples))[at_work]
            if config.act_inference or search.choose == "rules":
                # Drop rows that have halted from the computation.
                at_work, states = at_work[~leaves], tuple(state[~leaves] for state in states)
        measured.append(_of_chosen(measured_RM.unflatten(0, (rows, samples)), chosen_B))
        preds.append(preds_RT)
        halt_logits.append(halt_logits_R.clone())
    output = PuzzleOutput(
        set_name=batch.set_name,
        row=torch.from_numpy(batch.rows[real]),
        inputs_BT=inputs_BT,
        labels_BT=labels_BT,
        puzzle_ids_B=puzzle_ids_B,
        preds_BKST=torch.stack(preds, dim=1).unflatten(0, (rows, samples)),
        halt_logits_BKS=torch.stack(halt_logits, dim=1).unflatten(0, (rows, samples)),
        steps_BK=steps_R.unflatten(0, (rows, samples)),
        chosen_B=chosen_B,
    )
    # Sum on the host: not every device has float64.
    counted_B1 = torch.from_numpy((batch.labels[real] != IGNORE_LABEL_ID).any(axis=1, keepdims=True))
    measured_SBM = torch.stack(measured).cpu().double()
    counted_SB1 = counted_B1.double().expand(len(measured), -1, -1)
    return output, torch.cat((counted_SB1, measured_SBM * counted_B1), dim=2).sum(dim=1)


def _of_chosen(measured_BKM: Tensor, chosen_B: Tensor) -> Tensor:
    """Of each puzzle's chosen sample; ACT steps of all its samples, and whether any is right."""
    of_chosen_BM = measured_BKM[torch.arange(len(chosen_B), device=chosen_B.device), chosen_B]
    of_chosen_BM[:, _MEASURES.index("steps")] = measured_BKM[..., _MEASURES.index("steps")].sum(dim=1)
    any_right_B1 = measured_BKM[..., _MEASURES.index("exact_accuracy")].amax(dim=1, keepdim=True)
    return torch.cat((of_chosen_BM, any_right_B1), dim=1)


class PuzzleMeasurement:
    """The configured evaluation of one split: metrics, evaluators' results, saved tensors."""

    def __init__(self, config: PretrainPuzzleConfig, data: PuzzleData, data_paths: Sequence[str]) -> None:
        """data: a split of `data_paths`. Raises UsageError if they lack what an evaluator needs."""
        self._config = config
        self._data = data
        self._evaluators: list[tuple[Set[str], str, ARC]] = []
        for settings in config.evaluators:
            for number, path in enumerate(data_paths):
                # Each data path has its own test puzzles. The first one's results have no suffix.
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
        search: Search = NO_SEARCH,
        save: Sequence[str] = (),
        ranks: Ranks = ALONE,
        max_batches: int | None = None,
        bar: str | None = None,
    ) -> dict[str, Any]:
        """The report of `evaluate_puzzles`, with the evaluators' results on the first rank.

        Writes to `folder` the evaluators' submissions, and outputs_<name>.safetensors with the
        tensors `save`: one file for each set and rank if there are several. With choice by votes,
        every sample has a vote in the evaluators.
        """
        saved = {set_name: SavedOutputs(save) for set_name in self._data.sets}
        for _, _, evaluator in self._evaluators:
            evaluator.begin()

        def keep(output: PuzzleOutput) -> None:
            tensors = output.tensors()
            if save:
                saved[output.set_name].add(output.row, tensors)
            ballots = output.ballots() if search.choose == "votes" else tensors
            for sets, _, evaluator in self._evaluators:
                if output.set_name in sets:
                    evaluator.add(**{key: ballots[key] for key in ARC.required_outputs})

        batch_size = search.puzzles_at_once(self._config.global_batch_size)
        report = evaluate_puzzles(
            model, self._data, batch_size=batch_size, search=search, ranks=ranks, max_batches=max_batches, on_output=keep, bar=bar
        )
        if save:
            folder.mkdir(parents=True, exist_ok=True)
        for set_name, outputs in saved.items():
            of_several = [set_name] * (len(saved) > 1) + [f"rank{ranks.rank}"] * (ranks.size > 1)
            if outputs.has_rows:
                outputs.write(folder / f"{'_'.join(['outputs', name, *of_several])}.safetensors")
        for _, suffix, evaluator in self._evaluators:
            # Other data paths than the first have a folder each for their submission.json.
            place = folder / f"ARC{suffix}" if suffix else folder
            place.mkdir(parents=True, exist_ok=True)
            report |= {key.replace("/", f"{suffix}/"): value for key, value in evaluator.result(place, ranks).items()}
        return report
