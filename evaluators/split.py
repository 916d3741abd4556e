"""Measures a checkpoint on a split of its data and writes the result. Knows no flags."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from artifacts.checkpoint import Checkpoint
from artifacts.outputs import SavedOutputs, output_folder, write_json
from config.progress import progress_bar
from config.schema import PretrainInstructConfig
from dataset.instruct import MeasuredSplit, open_run_split
from evaluators.generated import evaluate_generated, write_generated
from evaluators.language import DepthOutput, evaluate_sources
from generation import load
from models.distributed import Ranks


def measure_split(
    checkpoint: Checkpoint,
    config: PretrainInstructConfig,
    name: MeasuredSplit,
    folder: Path,
    *,
    ranks: Ranks,
    max_batches: int | None = None,
    save: Sequence[str] = (),
    generate: bool = False,
    max_generated: int | None = None,
) -> dict[str, Any]:
    """Measure the split `name` with the settings `config`; the first of `ranks`, which share the rows,
    writes metrics_<name>.json and what else is asked for into `folder`. Returns the metrics.

    The whole test split at the run's own depth, threshold and row length also gives metrics.json.
    max_batches: of `global_batch_size` rows of each source. save: tensors of `OUTPUT_FILL`, into
    outputs_<name>.safetensors. generate: write an answer to each row, at most `max_generated` of
    each source, into answers_<name>.jsonl. Raises UsageError for a split without rows, and for a
    folder that can't be written.
    """
    split = open_run_split(config, checkpoint.tokenizer, checkpoint.template, name)
    responder = load(checkpoint, config)
    folder = output_folder(folder)
    saved = SavedOutputs(save)

    def keep(output: DepthOutput) -> None:
        saved.add(torch.from_numpy(output.rows), output.tensors())

    result = evaluate_sources(
        responder.model,
        split,
        eos_id=checkpoint.tokenizer.eos_id,
        batch_size=config.global_batch_size,
        act_steps=responder.options.act_steps,
        halt_threshold=responder.options.halt_threshold,
        max_batches=max_batches,
        ranks=ranks,
        pad_multiple=config.pad_multiple,
        on_output=keep if saved.keys else None,
        progress=partial(progress_bar, shown=ranks.is_first, desc=name, unit="batch"),
    )
    most = max_batches and max_batches * config.global_batch_size
    rows = split.first_rows(most)
    sources = config.all_sources
    metrics: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "split": name,
        "rows": len(rows),
        "rows_of_split": len(split),
        "max_batches": max_batches,
        "act_steps": config.depth,
        "halt_threshold": config.generation.halt_threshold,
        "seq_len": config.dataset.seq_len,
        "sources": {name: {"data_dir": of.data_dir, "subset_size": of.subset_size} for name, of in sources.items()},
        **result.report(),
    }
    if all(source.source == "sample" for source in sources.values()):
        metrics["answers"] = evaluate_generated(responder, split, rows=rows, ranks=ranks)
    if generate:
        path = folder / f"answers_{name}.jsonl"
        fewest = min((number for number in (most, max_generated) if number is not None), default=None)
        metrics["generated"] = write_generated(responder, split, path, rows=split.first_rows(fewest), ranks=ranks)
    saved.gather(ranks)
    if ranks.is_first:
        if saved.has_rows:
            saved.write(folder / f"outputs_{name}.safetensors")
        write_json(folder / f"metrics_{name}.json", metrics)
        is_whole = name == "test" and max_batches is None
        if is_whole and _how_it_is_measured(config) == _how_it_is_measured(checkpoint.config):
            write_json(folder / "metrics.json", metrics)
    return metrics


def _how_it_is_measured(config: PretrainInstructConfig) -> tuple[int, float | None, int]:
    """Depth, halting threshold and length of a row: figures that differ in these don't compare."""
    return config.depth, config.generation.halt_threshold, config.dataset.seq_len
