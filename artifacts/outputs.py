"""The files of an evaluation: metrics as JSON, and tensors of all batches as one safetensors file."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from artifacts.files import to_json, whole_file, write_whole
from config.errors import UsageError
from models.distributed import Ranks

# The tensors of text that can be saved, with the fill value beyond a row's end. Rows of puzzles
# have equal lengths.
OUTPUT_FILL = {"inputs": 0, "labels": -100, "preds": -100, "nll": 0, "halt_logits": 0, "act_steps": 0}
_REMEDY = "free space, or name another --output-dir"


class SavedOutputs:
    """Collects tensors [rows, ...] by name. Rows of those in OUTPUT_FILL may differ in length."""

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)
        self._rows: list[Tensor] = []
        self._batches: list[dict[str, Tensor]] = []

    def add(self, rows: Tensor, tensors: Mapping[str, Tensor]) -> None:
        """Add a batch: its rows' indices in the split (int64[B]), and its tensors [B, ...]."""
        self._rows.append(rows.cpu())
        self._batches.append({key: tensors[key].cpu() for key in self.keys})

    @property
    def has_rows(self) -> bool:
        """Whether there are rows to write."""
        return bool(self.keys and self._rows)

    def gather(self, ranks: Ranks) -> None:
        """Move the batches of all ranks to the first one."""
        of_ranks = ranks.gather_at_first((self._rows, self._batches))
        self._rows, self._batches = [], []
        for rows, batches in of_ranks:
            self._rows += rows
            self._batches += batches

    def write(self, path: Path) -> None:
        """Write all batches, padded to the longest row, and the tensor `rows`. Raises UsageError."""
        rows = torch.cat(self._rows)
        order = torch.argsort(rows)
        saved = {"rows": rows[order].contiguous()}
        for key in self.keys:
            parts = [batch[key] for batch in self._batches]
            if key in OUTPUT_FILL:
                width = max(part.shape[1] for part in parts)
                parts = [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=OUTPUT_FILL[key]) for part in parts]
            saved[key] = torch.cat(parts)[order].contiguous()
        with whole_file(path, _REMEDY) as partial:
            save_file(saved, partial)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` atomically, over any existing file. Raises UsageError if that fails."""
    write_whole(path, to_json(values).encode(), _REMEDY)


def output_folder(folder: Path) -> Path:
    """Create `folder` if missing. Raises UsageError if it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {folder}: can't write there ({error.strerror}); name another folder") from error
    return folder
