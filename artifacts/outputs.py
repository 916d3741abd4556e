"""Tensors of an inference run, gathered batch by batch and written as one safetensors file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

# What may be kept, and what fills positions beyond a row's end.
OUTPUT_FILL = {"inputs": 0, "labels": -100, "preds": -100, "nll": 0, "halt_logits": 0, "act_steps": 0}


class SavedOutputs:
    """Keeps the tensors named by `keys` (of OUTPUT_FILL), each [rows, positions], in the order of the split."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self._rows: list[Tensor] = []
        self._batches: list[dict[str, Tensor]] = []

    def add(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """One batch: `rows` int64[B], where its rows stand in the split, and the tensors [B, T]."""
        self._rows.append(rows.cpu())
        self._batches.append({key: tensors[key].cpu() for key in self.keys})

    def write(self, path: Path) -> None:
        """Write all batches, padded to the longest, with a tensor `rows` beside them."""
        rows = torch.cat(self._rows)
        order = torch.argsort(rows)
        width = max(next(iter(batch.values())).shape[1] for batch in self._batches)
        saved = {"rows": rows[order].contiguous()}
        for key in self.keys:
            padded = [
                torch.nn.functional.pad(batch[key], (0, width - batch[key].shape[1]), value=OUTPUT_FILL[key])
                for batch in self._batches
            ]
            saved[key] = torch.cat(padded)[order].contiguous()
        save_file(saved, path)
