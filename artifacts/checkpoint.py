"""The checkpoint folder `step_<N>`: everything needed to use a model, and to go on training it, written whole or not at all.

    model.safetensors        weights under the original's names (`model.inner.` ...); tied heads are stored once
    ema.safetensors          their moving average, if the run keeps one: what evaluation and generation use
    config.yaml              the resolved configuration
    tokenizer.model          or tokenizer.json: the tokenizer; of puzzles dataset.json instead (artifacts/puzzle_checkpoint.py)
    checkpoint.json          format, step, vocabulary, tokenizer hash, template, data hash
    train_metrics.json       metrics at this step
    trainer/                 state.json and tensors.safetensors: optimizer, cursor, a puzzle run's carry, length of the metrics log

and, once the checkpoint has been calibrated, halting.json (artifacts/halting.py).

Nothing of it is ever unpickled. Weights alone come from foreign files, too (`read_weights`): of a torch pickle, nothing is read but
tensors. This file doesn't know what the trainer's state means.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from config.errors import UsageError
from config.schema import PretrainInstructConfig, TrainingConfig, parse_config
from config.upgrade import upgraded
from dataset.text.conversation import Template
from dataset.text.tokenizer import TOKENIZER_FILES, Tokenizer
from models.act import RecursiveModel

FORMAT_VERSION = 1
WEIGHT_PREFIX = "model.inner."
_COMPILED_PREFIX = "_orig_mod."
_TIED_HEAD = "lm_head.weight"
_PUZZLE_VECTORS = "puzzle_emb.weights"
# A key of checkpoint.json that only one kind of model has, and where it is used.
_DOOR_OF_KIND = {"tokenizer_sha256": "inference_instruct.py or generate_instruct.py", "identifiers_sha256": "inference.py"}


@dataclass(frozen=True)
class TrainerState:
    """What a trainer needs to go on: tensors and JSON values, by names of its own."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps: what its checkpoint holds, whatever is trained."""

    step: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    metrics: Mapping[str, Any]
    trainer: TrainerState


def save_checkpoint(
    folder: Path,
    snapshot: Snapshot,
    *,
    config: PretrainInstructConfig,
    tokenizer: Tokenizer,
    template: Template,
    data_hash: str,
    data_report: Mapping[str, Any] | None = None,
) -> None:
    """`write_checkpoint` of a language model, with its tokenizer and template. data_report: what became of its rows."""
    write_checkpoint(
        folder,
        snapshot,
        config=config,
        files={tokenizer.file_name: tokenizer.model_bytes},
        about={
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "template": template.to_dict(),
            "data_hash": data_hash,
            "data": data_report,
        },
    )


def write_checkpoint(
    folder: Path, snapshot: Snapshot, *, config: TrainingConfig, files: Mapping[str, bytes], about: Mapping[str, Any]
) -> None:
    """Write `folder` atomically: it appears complete, or not at all. Raises UsageError if it exists or can't be written.

    files: what else belongs to this kind of model, by name. about: of checkpoint.json, all but format and step.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already and is not overwritten; choose another run_name, or delete it")
    partial = folder.parent / f".{folder.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "trainer").mkdir(parents=True)
        _save_weights(partial / "model.safetensors", snapshot.weights, config.arch.tie_embeddings)
        if snapshot.ema is not None:
            # Buffers have no average.
            _save_weights(partial / "ema.safetensors", {**snapshot.weights, **snapshot.ema}, config.arch.tie_embeddings)
        (partial / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
        for name, content in files.items():
            (partial / name).write_bytes(content)
        tied = {_TIED_HEAD} if config.arch.tie_embeddings else set()
        parameters = sum(tensor.numel() for name, tensor in snapshot.weights.items() if name not in tied)
        sizes = {"step": snapshot.step, "parameters": parameters}
        _write_json(partial / "checkpoint.json", {"format_version": FORMAT_VERSION, **sizes, **about})
        _write_json(partial / "train_metrics.json", snapshot.metrics)
        save_file(
            {name: t.detach().contiguous() for name, t in snapshot.trainer.tensors.items()},
            partial / "trainer/tensors.safetensors",
        )
        _write_json(partial / "trainer/state.json", snapshot.trainer.values)
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UsageError(
            f"the checkpoint {folder} can't be written: {error}; free space or choose another checkpoint_dir"
        ) from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder, opened: its config, tokenizer and template; weights are read on demand."""

    folder: Path
    config: PretrainInstructConfig
    tokenizer: Tokenizer
    template: Template
    step: int
    data_hash: str

    def weights(self, *, ema: bool) -> dict[str, Tensor]:
        """Weights by the names of `RecursiveModel`, the moving average if `ema` is wanted and there is one."""
        return _named_weights(self._weights_file(ema))

    def weights_sha256(self, *, ema: bool) -> str:
        """Hex SHA-256 of the file that `weights` reads. Raises UsageError if it can't be read."""
        path = self._weights_file(ema)
        try:
            with path.open("rb") as handle:
                return hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"the checkpoint file {path} can't be read: {error}") from error

    def _weights_file(self, ema: bool) -> Path:
        return _weights_file(self.folder, ema)


def open_checkpoint(folder: Path, tokenizer_path: str | None = None) -> Checkpoint:
    """Open a folder written by `save_checkpoint`, or the newest in a run's folder, see `newest_checkpoint`.

    Raises UsageError if it is missing, foreign or damaged.
    The tokenizer is the checkpoint's own. `tokenizer_path`, if given, must be a file with the same content.
    """
    folder = newest_checkpoint(folder)
    about = read_about(folder, {"step", "tokenizer_sha256", "template", "data_hash"})
    settings = read_settings(folder)
    tokenizer_bytes = _read_tokenizer(folder, about)
    if tokenizer_path is not None and (other := Tokenizer(tokenizer_path).sha256) != about["tokenizer_sha256"]:
        raise UsageError(
            f"{tokenizer_path} is another tokenizer than the checkpoint's: sha256 {other[:16]}..., expected "
            f"{about['tokenizer_sha256'][:16]}...; leave --tokenizer-path out to use the one in {folder}"
        )
    return Checkpoint(
        folder=folder,
        config=parse_config(settings),
        tokenizer=Tokenizer.from_bytes(tokenizer_bytes),
        template=Template.from_dict(about["template"]),
        step=about["step"],
        data_hash=about["data_hash"],
    )


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def newest_checkpoint(path: Path, say: Callable[[str], None] = _to_stderr) -> Path:
    """`path`, or where it is the folder of a run, the run's whole checkpoint with the highest step number, which is said.

    Damaged checkpoints are said and passed over. Raises UsageError if none is whole. Anything that is neither is given back as it
    is, for those who read it to judge.
    """
    if (path / "checkpoint.json").is_file():
        return path
    folders = checkpoints_of(path)
    for folder in reversed(folders):
        try:
            _check_whole(folder)
        except UsageError as error:
            say(f"{error}; looking for an older checkpoint")
            continue
        say(f"{path}: taking its newest checkpoint, {folder.name}")
        return folder
    if folders:
        raise UsageError(f"no checkpoint in {path} is whole ({', '.join(folder.name for folder in folders)}): use another run's")
    return path


def _check_whole(folder: Path) -> None:
    """Raise UsageError if what using a checkpoint needs is damaged, as far as that can be seen without reading its weights."""
    about = read_about(folder, {"step"})
    settings = read_settings(folder, say=lambda _: None)
    if "tokenizer_sha256" in about:
        _read_tokenizer(folder, about)
    path = folder / "ema.safetensors" if settings.get("ema") else _weights_file(folder, ema=True)
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the checkpoint file {path} can't be read: {error}") from error


def _read_tokenizer(folder: Path, about: Mapping[str, Any]) -> bytes:
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()] or TOKENIZER_FILES
    try:
        content = (folder / names[0]).read_bytes()
    except OSError as error:
        raise UsageError(f"the checkpoint {folder} is damaged: {error}") from error
    if hashlib.sha256(content).hexdigest() != about["tokenizer_sha256"]:
        raise UsageError(f"the checkpoint {folder} is damaged: its {names[0]} is not the one it was trained with")
    return content


def read_about(folder: Path, keys: Set[str]) -> dict[str, Any]:
    """checkpoint.json of a checkpoint folder, which with these keys. Raises UsageError if it is missing or another kind's."""
    if not (folder / "checkpoint.json").is_file():
        place = folder if folder.is_dir() else folder.parent
        # Of a project, or of all projects, the runs; no deeper, or a folder of another kind would be searched to its ends.
        runs = sorted({p.parents[1] for above in ("*/", "*/*/") for p in place.glob(f"{above}step_*/checkpoint.json")})
        near = checkpoints_of(place) or runs
        found = f"; found nearby: {', '.join(map(str, near[:5]))}{', ...' if len(near) > 5 else ''}" if near else ""
        raise UsageError(f"no checkpoint at {folder}: expected a folder step_<N> with a checkpoint.json, or that of a run{found}")
    about = _read_json(folder / "checkpoint.json")
    _check_format(folder, about)
    if missing := sorted(keys - about.keys()):
        for key, door in _DOOR_OF_KIND.items():
            if key in about and key not in keys:
                raise UsageError(f"the checkpoint {folder} is of another kind of model: use {door}")
        raise UsageError(f"the checkpoint {folder} is damaged: its checkpoint.json has no {', '.join(missing)}")
    return about


def read_settings(folder: Path, say: Callable[[str], None] = _to_stderr) -> dict[str, Any]:
    """config.yaml of a checkpoint folder, as this version would have written it: see config/upgrade.py; what is dropped is said.

    Raises UsageError if there is none.
    """
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the checkpoint {folder} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"the checkpoint {folder} is damaged: its config.yaml holds no settings")
    settings, dropped = upgraded(settings)
    if dropped:
        say(f"{folder}: dropped, as this version has no such settings: {', '.join(dropped)}")
    return settings


def _check_format(folder: Path, about: Mapping[str, Any]) -> None:
    if about.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{folder} has checkpoint format {about.get('format_version')}, this program reads {FORMAT_VERSION}")


@dataclass(frozen=True)
class SavedRun:
    """All that training goes on from, read from a checkpoint folder."""

    folder: Path
    about: dict[str, Any]
    """checkpoint.json"""
    settings: dict[str, Any]
    """config.yaml, see `read_settings`"""
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    trainer: TrainerState


def read_saved_run(folder: Path) -> SavedRun:
    """Read all of a checkpoint folder, so that damage shows before anything is built on it. Raises UsageError if there is any."""
    about = _read_json(folder / "checkpoint.json")
    _check_format(folder, about)
    settings = read_settings(folder)
    averaged = folder / "ema.safetensors"
    if settings.get("ema") and not averaged.exists():
        raise UsageError(f"the checkpoint {folder} is damaged: it has no {averaged.name}")
    values = _read_json(folder / "trainer/state.json")
    return SavedRun(
        folder=folder,
        about=about,
        settings=settings,
        weights=_named_weights(folder / "model.safetensors"),
        average=_named_weights(averaged) if averaged.exists() else None,
        trainer=TrainerState(_load_tensors(folder / "trainer/tensors.safetensors"), values),
    )


def checkpoints_of(run: Path) -> list[Path]:
    """The folders step_<N> of a run, by ascending N."""
    return sorted((path for path in run.glob("step_*") if path.name[5:].isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """N of a folder step_<N>."""
    return int(folder.name.removeprefix("step_"))


def read_train_metrics(checkpoint: Path) -> dict[str, Any]:
    """Metrics of a run when it saved this checkpoint. Raises UsageError if they can't be read."""
    return _read_json(checkpoint / "train_metrics.json")


def held_out_loss(checkpoint: Path, loss_name: str) -> float | None:
    """`loss_name` on held-out data when the checkpoint was saved; None: it wasn't measured."""
    with contextlib.suppress(UsageError, KeyError, TypeError):
        return float(read_train_metrics(checkpoint)["test"][loss_name])
    return None


def best_checkpoints(run: Path, loss_name: str) -> list[Path]:
    """A run's checkpoints that were measured, by ascending `loss_name`; of equals the older first."""
    losses = {folder: held_out_loss(folder, loss_name) for folder in checkpoints_of(run)}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(measured, key=lambda folder: measured[folder])


def prune_checkpoints(run: Path, keep_last: int, keep_best: int, loss_name: str) -> None:
    """Remove a run's checkpoints but the newest, and those with the lowest `loss_name` on held-out data.

    Raises UsageError if they can't be removed.
    """
    folders = checkpoints_of(run)
    kept = {*folders[-keep_last:], *best_checkpoints(run, loss_name)[:keep_best]}
    for folder in folders:
        if folder in kept:
            continue
        removed = folder.parent / f".{folder.name}.removed"
        try:
            # So that a kill in the middle leaves no folder that looks whole.
            folder.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            raise UsageError(f"the checkpoint {folder} can't be removed: {error}; see checkpoint.keep_last") from error


def clear_remains(run: Path) -> None:
    """Remove what kills have left of checkpoints that were being written or removed."""
    for kind in ("partial", "removed"):
        for folder in run.glob(f".step_*.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by the names of `RecursiveModel`, whatever prefix they have in the file.

    path: a checkpoint folder, whose moving average is preferred; a .safetensors file; or a state dict written by torch.save, as the
    original does, of which tensors are read and nothing else. Raises UsageError if it is none of these or would run code.
    """
    if path.is_dir():
        path = _weights_file(path, ema=True)
    tensors = _load_tensors(path) if path.suffix == ".safetensors" else _load_pickled_tensors(path)
    return {_strip_prefix(name): tensor for name, tensor in tensors.items()}


def load_weights(model: RecursiveModel, weights: Mapping[str, Tensor], source: Path, reset_puzzle_embedding: bool = False) -> None:
    """Fill `model`, by name and shape. Raises UsageError with the names that are missing, unknown or of another shape.

    reset_puzzle_embedding: where the number of puzzles is another, each puzzle's vector becomes the mean of those found.
    """
    expected = model.state_dict()
    found = dict(weights)
    vectors = found.get(_PUZZLE_VECTORS)
    if reset_puzzle_embedding and model.puzzle_emb is not None and vectors is not None and vectors.dim() == 2 and len(vectors):
        count = len(model.puzzle_emb.weights)
        if len(vectors) != count:
            found[_PUZZLE_VECTORS] = vectors.mean(dim=0, keepdim=True).expand(count, -1)
    if model.config.tie_embeddings:
        found.setdefault(_TIED_HEAD, found.get("embed_tokens.embedding_weight", expected[_TIED_HEAD]))
    problems = [f"missing {name}" for name in expected.keys() - found.keys()]
    problems += [f"unknown {name}" for name in found.keys() - expected.keys()]
    problems += [
        f"{name}: expected shape {tuple(expected[name].shape)}, found {tuple(found[name].shape)}"
        for name in expected.keys() & found.keys()
        if expected[name].shape != found[name].shape
    ]
    if problems:
        raise UsageError(f"the weights of {source} don't fit the architecture: {'; '.join(sorted(problems)[:5])}")
    model.load_state_dict(found)


def _strip_prefix(name: str) -> str:
    """A state-dict name without the optional prefixes of compiled and wrapped models."""
    return name.removeprefix(_COMPILED_PREFIX).removeprefix(WEIGHT_PREFIX)


def _save_weights(path: Path, weights: Mapping[str, Tensor], tied: bool) -> None:
    # safetensors refuses two names for one tensor.
    named = {name: tensor for name, tensor in weights.items() if not (tied and name == _TIED_HEAD)}
    save_file({WEIGHT_PREFIX + name: tensor.detach().contiguous() for name, tensor in named.items()}, path)


def _weights_file(folder: Path, ema: bool) -> Path:
    path = folder / "ema.safetensors"
    return path if ema and path.exists() else folder / "model.safetensors"


def _load_pickled_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"the weights {path} can't be read: {error}") from error
    # What a file that isn't one does to torch's reader has no common class.
    except Exception as error:
        raise UsageError(
            f"the weights {path} are refused: not a state dict saved by torch, damaged, or a pickle that holds more than tensors "
            "and could run code; if you trust it, have its owner save the tensors as .safetensors"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise UsageError(f"the weights {path} are no state dict: expected names with tensors, and nothing else")
    return content


def _named_weights(path: Path) -> dict[str, Tensor]:
    return {_strip_prefix(name): tensor for name, tensor in _load_tensors(path).items()}


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the checkpoint file {path} can't be read: {error}") from error


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"the checkpoint file {path} can't be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"the checkpoint file {path} is damaged: expected a JSON object")
    return values


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
