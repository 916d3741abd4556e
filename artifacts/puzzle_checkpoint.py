"""The checkpoint of a puzzle model: it has the description of its data in place of a tokenizer.

    dataset.json             PuzzleMetadata of the training data: vocabulary, length of a row, number of puzzle identifiers
    checkpoint.json          format, step, hash of the data, hash of the puzzle identifiers' names

Other files are as in artifacts/checkpoint.py.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from artifacts.checkpoint import Snapshot, newest_checkpoint, read_about, read_settings, write_checkpoint
from artifacts.weights import load_weights, read_weights
from config.errors import UsageError
from config.schema import PretrainPuzzleConfig, parse_as
from dataset.puzzles.loader import PuzzleData
from dataset.puzzles.storage import PuzzleMetadata, read_identifiers
from models.act import RecursiveModel
from models.device import pick_device, resolve_arch, set_matmul_precision, should_compile

_METADATA_FILE = "dataset.json"


def identifiers_sha256(data_paths: Sequence[str]) -> str:
    """Hex SHA-256 of the names of all puzzle identifiers, equal if puzzles are numbered alike."""
    digest = hashlib.sha256()
    for path in data_paths:
        digest.update("\n".join([*read_identifiers(path), ""]).encode())
    return digest.hexdigest()


def save_puzzle_checkpoint(
    folder: Path, snapshot: Snapshot, *, config: PretrainPuzzleConfig, data: PuzzleData, identifiers: str
) -> None:
    """`write_checkpoint` for a puzzle model. identifiers: `identifiers_sha256` of its data."""
    write_checkpoint(
        folder,
        snapshot,
        config=config,
        files={_METADATA_FILE: data.metadata.model_dump_json(indent=2).encode()},
        about={"data_hash": data.data_hash, "identifiers_sha256": identifiers},
    )


@dataclass(frozen=True)
class PuzzleCheckpoint:
    """An open checkpoint folder: its config and the description of its data."""

    folder: Path
    config: PretrainPuzzleConfig
    metadata: PuzzleMetadata
    step: int
    identifiers_sha256: str

    def model(self, config: PretrainPuzzleConfig) -> RecursiveModel:
        """The model for evaluation, with the device, number formats and compilation of `config`."""
        device = pick_device(config.device)
        known = self.metadata
        arch = resolve_arch(config.arch, device)
        model = RecursiveModel(arch, known.vocab_size, seq_len=known.seq_len, puzzles=known.num_puzzle_identifiers)
        load_weights(model, read_weights(self.folder), self.folder)
        model.to(device).eval()
        set_matmul_precision(config.tf32, device)
        if should_compile(config.compile, device):
            model.compile_levels()
        return model

    def check_data(self, data: PuzzleData, data_paths: Sequence[str]) -> None:
        """Raise UsageError if the data has other tokens, another length or other puzzle numbers."""
        fields = ["vocab_size", "seq_len"]
        if self.config.arch.puzzle_emb_ndim:
            fields.append("num_puzzle_identifiers")
        for field in fields:
            expected, found = getattr(self.metadata, field), getattr(data.metadata, field)
            if found != expected:
                raise UsageError(
                    f"{self.folder} is for {field} {expected}, found {found} in {', '.join(data_paths)}: use the data set the "
                    "model was trained on, or one built like it"
                )
        self.check_identifiers(data_paths)

    def check_identifiers(self, data_paths: Sequence[str]) -> None:
        """Raise UsageError if puzzles have vectors and this data numbers its puzzles otherwise."""
        if self.config.arch.puzzle_emb_ndim and identifiers_sha256(data_paths) != self.identifiers_sha256:
            raise UsageError(
                f"{self.folder} numbers puzzles otherwise than identifiers.json of {', '.join(data_paths)}: use the data "
                "set the model was trained on"
            )


def open_puzzle_checkpoint(folder: Path) -> PuzzleCheckpoint:
    """Open a folder written by `save_puzzle_checkpoint`, or the newest of a run. Raises UsageError."""
    folder = newest_checkpoint(folder)
    about = read_about(folder, {"step", "data_hash", "identifiers_sha256"})
    config = parse_as(PretrainPuzzleConfig, read_settings(folder))
    try:
        metadata = PuzzleMetadata.model_validate_json((folder / _METADATA_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise UsageError(f"the checkpoint {folder} is damaged: {_METADATA_FILE}: {error}") from error
    return PuzzleCheckpoint(folder, config, metadata, about["step"], about["identifiers_sha256"])
