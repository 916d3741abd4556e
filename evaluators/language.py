"""Teacher-forced metrics over a split: ratios of sums over the corpus, never means of ratios.

`loss_per_token` is in nats per supervised token, EOS included. `bits_per_byte` divides the -log2 p
of supervised text tokens (without EOS) by the UTF-8 bytes of the decoded supervised ids. Shape
suffixes as in models/layers.py; N supervised tokens.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dataset.text.loader import IGNORE_LABEL_ID, Examples, TextCorpus, collate
from models.act import RecursiveModel
from models.device import on_device
from models.distributed import ALONE, Ranks
from models.losses import linear_cross_entropy

# An ACT step is worse if its loss is more than this above the step before, in nats per token.
DEPTH_GATE_NATS = 0.01


class LanguageSums(NamedTuple):
    """Totals over tokens and conversations at one depth."""

    nll: float = 0.0
    text_nll: float = 0.0
    tokens: float = 0.0
    text_bytes: float = 0.0
    correct: float = 0.0
    conversations: float = 0.0
    exact: float = 0.0
    act_steps: float = 0.0
    """Of all tokens; counted at the last depth only."""

    def metrics(self) -> dict[str, float]:
        """The ratios by name; NaN where nothing was counted."""

        def ratio(part: float, whole: float) -> float:
            return part / whole if whole else math.nan

        return {
            "loss_per_token": ratio(self.nll, self.tokens),
            "bits_per_byte": ratio(self.text_nll / math.log(2), self.text_bytes),
            "token_accuracy": ratio(self.correct, self.tokens),
            "exact_accuracy": ratio(self.exact, self.conversations),
        }


@dataclass(frozen=True)
class DepthOutput:
    """One batch at one depth, by input position (label t is the id after input t; -100 is none)."""

    rows: np.ndarray
    """Index of each row in the split, int64[B]."""
    inputs_BT: np.ndarray
    labels_BT: np.ndarray
    preds_BT: Tensor
    """Most probable id at supervised positions, -100 elsewhere."""
    nll_BT: Tensor
    """Nats at supervised positions, 0 elsewhere."""
    halt_logits_BT: Tensor
    act_steps_BT: Tensor
    """ACT steps that each position took."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors [B, T], by the names to save them under."""
        return {
            "inputs": torch.from_numpy(self.inputs_BT),
            "labels": torch.from_numpy(self.labels_BT),
            "preds": self.preds_BT,
            "nll": self.nll_BT,
            "halt_logits": self.halt_logits_BT,
            "act_steps": self.act_steps_BT,
        }


class LanguageResult(NamedTuple):
    """`by_depth` ends with the requested depth; with a halting threshold it has only that one."""

    by_depth: list[LanguageSums]
    by_source: "dict[str, LanguageResult] | None" = None
    """The result of each source, if there are several."""

    def worse_steps(self) -> list[int]:
        """ACT steps (from 2) with a loss of over `DEPTH_GATE_NATS` above the step before."""
        losses = [sums.metrics()["loss_per_token"] for sums in self.by_depth]
        return [step for step in range(2, len(losses) + 1) if losses[step - 1] > losses[step - 2] + DEPTH_GATE_NATS]

    def report(self) -> dict[str, object]:
        """The metrics for metrics.json."""
        final = self.by_depth[-1]
        return {
            **final.metrics(),
            "mean_act_steps": final.act_steps / max(1, final.tokens),
            "by_act_step": [sums.metrics() for sums in self.by_depth] if len(self.by_depth) > 1 else [],
            "worse_act_steps": self.worse_steps(),
            "counts": {
                "conversations": int(final.conversations),
                "supervised_tokens": int(final.tokens),
                "text_bytes": int(final.text_bytes),
            },
            **({"by_source": {name: part.report() for name, part in self.by_source.items()}} if self.by_source else {}),
        }


def evaluate_sources(
    model: RecursiveModel,
    corpus: TextCorpus,
    *,
    on_output: Callable[[DepthOutput], None] | None = None,
    **options: Any,
) -> LanguageResult:
    """`evaluate_language` of each source, and the sums over all. Rows are numbered in the corpus."""
    by_source: dict[str, LanguageResult] = {}
    begin = 0

    def numbered(output: DepthOutput) -> None:
        assert on_output is not None
        on_output(replace(output, rows=output.rows + begin))

    for name, part in corpus.parts.items():
        by_source[name] = evaluate_language(model, part, on_output=on_output and numbered, **options)
        begin += len(part)
    if len(by_source) == 1:
        return by_source[name]
    return LanguageResult(_added([result.by_depth for result in by_source.values()]), by_source)


def _added(parts: npt.ArrayLike) -> list[LanguageSums]:
    return [LanguageSums(*sums) for sums in np.sum(parts, axis=0).tolist()]


def rows_evaluated(corpus: TextCorpus, limit: int | None) -> int:
    """Rows that `evaluate_sources` measures with this limit."""
    return sum(len(part) if limit is None else min(limit, len(part)) for part in corpus.parts.values())


@torch.no_grad()
def evaluate_language(
    model: RecursiveModel,
    dataset: Examples,
    *,
    eos_id: int,
    batch_size: int,
    act_steps: int,
    halt_threshold: float | None = None,
    max_batches: int | None = None,
    limit: int | None = None,
    ranks: Ranks = ALONE,
    pad_multiple: int = 8,
    on_output: Callable[[DepthOutput], None] | None = None,
    at_every_depth: bool = False,
    progress: Callable[[Iterable[np.ndarray]], Iterable[np.ndarray]] = lambda batches: batches,
) -> LanguageResult:
    """Measure `model` on the first `limit` rows of `dataset`, in at most `max_batches` batches.

    Without `halt_threshold` every depth 1..act_steps is measured. With it, an assistant's token
    halts once its halting probability exceeds the threshold, and prompts take all steps.
    `on_output` gets each batch at the final depth, or `at_every_depth`. `ranks` take turns at the
    batches; each gets the whole result, the same bits as from one process.
    """
    most = len(dataset) if max_batches is None else max_batches * batch_size
    count = min(len(dataset), most, len(dataset) if limit is None else limit)
    depths = 1 if halt_threshold is not None else act_steps
    # Sort rows by length, so that batches have little padding.
    order = np.argsort([len(dataset[i].ids) for i in range(count)], kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
    own: list[list[LanguageSums]] = []
    for rows in progress(batches[ranks.rank :: ranks.size]):
        by_depth: list[LanguageSums] = []
        examples = [dataset[int(row)] for row in rows]
        batch = collate(examples, pad_id=0, length_multiple=pad_multiple)
        turn_bytes = sum(example.turn_bytes for example in examples)
        inputs_BT, labels_BT, segments_BT = (
            on_device(batch[name].astype(np.int64), model.device) for name in ("inputs", "labels", "segment")
        )
        # Count on the host, to avoid waiting for the device.
        place_N = np.flatnonzero(batch["labels"] != IGNORE_LABEL_ID)
        is_text_N = torch.from_numpy(batch["labels"].ravel()[place_N] != eos_id)
        supervised_N = on_device(place_N, model.device)
        labels_N = labels_BT.flatten()[supervised_N]
        weights_N = torch.zeros(len(labels_N), device=model.device)
        refinement = model.refine_rows(inputs_BT, segments_BT, act_steps=act_steps, halt_threshold=halt_threshold)
        for refined in refinement:
            if halt_threshold is not None and not refined.is_last:
                continue
            output_ND = refined.output_BTD.flatten(0, 1)[supervised_N]
            _, nll_N, argmax_N = linear_cross_entropy(output_ND, model.lm_head.weight, labels_N, weights_N, model.config.loss)
            # In one transfer, because each waits for the device.
            read_nll_N, right_N = torch.stack((nll_N, (argmax_N == labels_N).to(nll_N.dtype))).cpu().double()
            wrong_rows = np.unique(place_N[right_N.numpy() == 0] // inputs_BT.shape[1])
            by_depth.append(
                LanguageSums(
                    nll=float(read_nll_N.sum()),
                    text_nll=float(read_nll_N[is_text_N].sum()),
                    tokens=len(labels_N),
                    text_bytes=turn_bytes,
                    correct=int(right_N.sum()),
                    conversations=len(rows),
                    exact=len(rows) - len(wrong_rows),
                    act_steps=int(refined.steps_BT.flatten()[supervised_N].sum()) if refined.is_last else 0,
                )
            )
            if on_output is not None and (refined.is_last or at_every_depth):
                preds_BT = torch.full_like(labels_BT, IGNORE_LABEL_ID)
                preds_BT.view(-1)[supervised_N] = argmax_N
                nll_BT = torch.zeros(labels_BT.shape, dtype=nll_N.dtype, device=model.device)
                nll_BT.view(-1)[supervised_N] = nll_N
                halt_logits_BT = model.halt_logits(refined.output_BTD)[..., 0]
                on_output(DepthOutput(rows, batch["inputs"], batch["labels"], preds_BT, nll_BT, halt_logits_BT, refined.steps_BT))
        own.append(by_depth)
    # Add in the order of the batches: the same bits for any number of ranks.
    of_batches = np.zeros((len(batches), depths, len(LanguageSums._fields)))
    for rank, part in enumerate(ranks.gather(own)):
        of_batches[rank :: ranks.size] = np.reshape(part, (-1, *of_batches.shape[1:]))
    return LanguageResult(_added(of_batches))
