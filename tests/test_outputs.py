"""Saved tensors stand in the order of the split, whatever batches they came in."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from artifacts.outputs import OUTPUT_FILL, SavedOutputs, write_json
from config.errors import UsageError
from models.distributed import Ranks


def test_batches_of_any_order_and_width_become_one_table(tmp_path: Path) -> None:
    saved = SavedOutputs(["preds", "nll", "labels"])
    full = {row: torch.arange(10 * row, 10 * row + 2 + row) for row in range(5)}
    for rows in ([3, 0], [4], [1, 2]):
        width = max(len(full[row]) for row in rows)
        batch = {key: torch.full((len(rows), width), OUTPUT_FILL[key]) for key in ("preds", "labels", "act_steps")}
        batch["nll"] = torch.zeros(len(rows), width)
        for place, row in enumerate(rows):
            for key in batch:
                batch[key][place, : len(full[row])] = full[row]
        saved.add(torch.tensor(rows), batch)
    saved.write(tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == {"rows", "preds", "nll", "labels"}
    assert tensors["rows"].tolist() == [0, 1, 2, 3, 4] and tensors["preds"].shape == (5, 6)
    for row, values in full.items():
        for key, fill in (("preds", -100), ("labels", -100), ("nll", 0)):
            assert tensors[key][row].tolist() == [*values.tolist(), *[fill] * (6 - len(values))]


def test_only_the_first_rank_gets_the_batches_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def gather(value: Any, values: list[Any] | None) -> None:
        """The others have come first."""
        sent.append(value)
        if values is not None:
            values[:] = [value, *sent[:-1]]

    monkeypatch.setattr("torch.distributed.gather_object", gather)
    first, second = SavedOutputs(["preds"]), SavedOutputs(["preds"])
    first.add(torch.tensor([0]), {"preds": torch.tensor([[5]])})
    second.add(torch.tensor([1]), {"preds": torch.tensor([[7]])})
    second.gather(Ranks(1, 2))
    first.gather(Ranks(0, 2))
    assert first.has_rows and not second.has_rows
    first.write(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["preds"].tolist() == [[5], [7]]


def test_what_is_kept_does_not_change_with_the_batch(tmp_path: Path) -> None:
    saved, values = SavedOutputs(["halt_logits"]), torch.ones(1, 2)
    saved.add(torch.tensor([0]), {"halt_logits": values.clone()})
    values.zero_()
    saved.write(tmp_path / "out.safetensors")
    assert load_file(tmp_path / "out.safetensors")["halt_logits"].tolist() == [[1.0, 1.0]]


def test_metrics_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics_test.json"
    write_json(path, {"loss": 1})
    write_json(path, {"loss": 2})
    write = Path.write_bytes

    def full_disk(self: Path, content: bytes) -> int:
        write(self, content[:3])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(UsageError, match=r"can't be written: .*No space left.*--output-dir"):
        write_json(path, {"loss": 3})
    assert json.loads(path.read_text()) == {"loss": 2} and list(tmp_path.iterdir()) == [path]


def test_tensors_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.safetensors"
    saved = SavedOutputs(["preds"])
    saved.add(torch.tensor([0]), {"preds": torch.ones(1, 2)})
    saved.write(path)
    whole = path.read_bytes()

    def full_disk(tensors: dict[str, torch.Tensor], target: Path) -> None:
        target.write_bytes(whole[:9])
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("artifacts.outputs.save_file", full_disk)
    with pytest.raises(UsageError, match=r"out\.safetensors can't be written: No space left.*--output-dir"):
        saved.write(path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    saved = SavedOutputs(["preds"])
    saved.add(torch.tensor([0]), {"preds": torch.ones(1, 2)})
    with pytest.raises(UsageError, match=r"gone/out\.safetensors can't be written"):
        saved.write(tmp_path / "gone/out.safetensors")
