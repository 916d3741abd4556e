"""The checkpoint folder `step_<N>`: what it takes to use a model and to resume its training.

    model.safetensors        weights under the original's names (`model.inner.` ...); tied heads are stored once
    ema.safetensors          their moving average, if the run keeps one: what evaluation and generation use
    config.yaml              the resolved configuration
    tokenizer.model          or tokenizer.json: the tokenizer; for puzzles dataset.json instead (artifacts/puzzle_checkpoint.py)
    checkpoint.json          format, step, vocabulary, tokenizer hash, template, data hash
    train_metrics.json       metrics at this step
    trainer/                 state.json and tensors.safetensors: optimizer, cursor, a puzzle run's carry, length of the metrics log

and, in a calibrated checkpoint, halting.json (artifacts/halting.py).

Nothing in it is unpickled. This file doesn't know what the trainer's state means.
"""

import contextlib
import hashlib
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from artifacts.files import read_json, to_json, whole_folder
from artifacts.weights import load_tensors, read_weights, readable, save_weights, weights_file
from config.errors import UsageError
from config.schema import PretrainInstructConfig, TrainingConfig, parse_config
from config.upgrade import upgraded
from dataset.text.conversation import Template
from dataset.text.tokenizer import TOKENIZER_FILES, Tokenizer

FORMAT_VERSION = 1
Content = TypeVar("Content")
# Keys of checkpoint.json that only one kind of model has, and the programs for that kind.
_SCRIPT_OF_KIND = {"tokenizer_sha256": "inference_instruct.py or generate_instruct.py", "identifiers_sha256": "inference.py"}


@dataclass(frozen=True)
class TrainerState:
    """The state that a trainer resumes from: tensors and JSON values, by the trainer's names."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The content of a checkpoint: a run between two optimizer steps."""

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
    """`write_checkpoint` for a language model. data_report: files and counts of its data."""
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
    """Write `folder` atomically. Raises UsageError if it exists or can't be written.

    files: other files for this kind of model, by name. about: keys of checkpoint.json besides
    format and step.
    """
    with whole_folder(folder, "choose another run_name", "free space or choose another checkpoint_dir") as partial:
        tied = config.arch.tie_embeddings
        save_weights(partial / "model.safetensors", snapshot.weights, tied=tied)
        if snapshot.ema is not None:
            # There is no average of buffers.
            save_weights(partial / "ema.safetensors", {**snapshot.weights, **snapshot.ema}, tied=tied)
        (partial / "config.yaml").write_text(yaml.safe_dump(config.model_dump(), sort_keys=False), encoding="utf-8")
        for name, content in files.items():
            (partial / name).write_bytes(content)
        (partial / "trainer").mkdir()
        for name, values in (
            ("checkpoint.json", {"format_version": FORMAT_VERSION, "step": snapshot.step, **about}),
            ("train_metrics.json", snapshot.metrics),
            ("trainer/state.json", snapshot.trainer.values),
        ):
            (partial / name).write_text(to_json(values), encoding="utf-8")
        save_file(
            {name: t.detach().contiguous() for name, t in snapshot.trainer.tensors.items()},
            partial / "trainer/tensors.safetensors",
        )


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint folder: its config, tokenizer and template. Weights are read on demand."""

    folder: Path
    config: PretrainInstructConfig
    tokenizer: Tokenizer
    template: Template
    step: int
    data_hash: str

    def weights(self, *, ema: bool) -> dict[str, Tensor]:
        """Weights by the names of `RecursiveModel`. ema: the moving average, if there is one."""
        return read_weights(weights_file(self.folder, ema=ema))

    def weights_sha256(self, *, ema: bool) -> str:
        """Hex SHA-256 of the file that `weights` reads. Raises UsageError if it can't be read."""
        path = weights_file(self.folder, ema=ema)
        with readable(path), path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()


def open_checkpoint(folder: Path, tokenizer_path: str | None = None) -> Checkpoint:
    """Open a folder written by `save_checkpoint`, or the newest one in a run's folder.

    Its tokenizer is its own; that of `tokenizer_path`, if given, must have the same content. Raises
    UsageError.
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
    """The newest intact checkpoint of a run's folder; any other `path` is returned unchanged.

    `say` reports the choice, and damaged ones. Raises UsageError if none is intact.
    """
    if (path / "checkpoint.json").is_file():
        return path
    if not (folders := checkpoints_of(path)):
        return path
    newest, _ = newest_intact(folders, _check_whole, say, "use another run's")
    say(f"{path}: using its newest checkpoint, {newest.name}")
    return newest


def newest_intact(
    folders: Sequence[Path], read: Callable[[Path], Content], say: Callable[[str], None], remedy: str
) -> tuple[Content, list[Path]]:
    """What `read` returns for the newest of a run's checkpoints for which it raises no UsageError; and the damaged, newer ones.

    Raises UsageError, which ends with `remedy`, if there is none.
    """
    damaged: list[Path] = []
    for folder in reversed(folders):
        try:
            return read(folder), damaged
        except UsageError as error:
            say(f"{error}; looking for an older checkpoint")
            damaged.append(folder)
    names = ", ".join(folder.name for folder in folders)
    raise UsageError(f"no checkpoint in {folders[0].parent} is intact ({names}): {remedy}")


def _check_whole(folder: Path) -> Path:
    """`folder`. Raises UsageError if a needed file is damaged. Of weights, only the header is read."""
    about = read_about(folder, {"step"})
    settings = read_settings(folder, say=lambda _: None)
    if "tokenizer_sha256" in about:
        _read_tokenizer(folder, about)
    path = folder / "ema.safetensors" if settings.get("ema") else weights_file(folder, ema=True)
    with readable(path), safe_open(path, framework="pt"):
        return folder


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
    """checkpoint.json of a folder, with at least `keys`. Raises UsageError."""
    if not (folder / "checkpoint.json").is_file():
        place = folder if folder.is_dir() else folder.parent
        # The runs of a project, or of all projects. No deeper: `place` may be any folder.
        runs = sorted({p.parents[1] for above in ("*/", "*/*/") for p in place.glob(f"{above}step_*/checkpoint.json")})
        near = checkpoints_of(place) or runs
        found = f"; found nearby: {', '.join(map(str, near[:5]))}{', ...' if len(near) > 5 else ''}" if near else ""
        raise UsageError(f"no checkpoint at {folder}: expected a folder step_<N> with a checkpoint.json, or that of a run{found}")
    about = read_json(folder / "checkpoint.json")
    _check_format(folder, about)
    if missing := sorted(keys - about.keys()):
        for key, script in _SCRIPT_OF_KIND.items():
            if key in about and key not in keys:
                raise UsageError(f"the checkpoint {folder} is of another kind of model: use {script}")
        raise UsageError(f"the checkpoint {folder} is damaged: its checkpoint.json has no {', '.join(missing)}")
    return about


def read_settings(folder: Path, say: Callable[[str], None] = _to_stderr) -> dict[str, Any]:
    """config.yaml of a folder, upgraded to this version. `say` reports dropped keys. Raises UsageError."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the checkpoint {folder} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise UsageError(f"the checkpoint {folder} is damaged: its config.yaml holds no settings")
    settings, dropped = upgraded(settings)
    if dropped:
        say(f"{folder}: ignoring settings that this version doesn't have: {', '.join(dropped)}")
    return settings


def _check_format(folder: Path, about: Mapping[str, Any]) -> None:
    if about.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{folder} has checkpoint format {about.get('format_version')}, this program reads {FORMAT_VERSION}")


@dataclass(frozen=True)
class SavedRun:
    """The saved state of a run, read from a checkpoint folder."""

    folder: Path
    about: dict[str, Any]
    """checkpoint.json"""
    settings: dict[str, Any]
    """config.yaml, see `read_settings`"""
    weights: dict[str, Tensor]
    average: dict[str, Tensor] | None
    trainer: TrainerState


def read_saved_run(folder: Path) -> SavedRun:
    """Read a whole checkpoint folder before using any of it. Raises UsageError if it is damaged."""
    about = read_json(folder / "checkpoint.json")
    _check_format(folder, about)
    settings = read_settings(folder)
    averaged = folder / "ema.safetensors"
    if settings.get("ema") and not averaged.exists():
        raise UsageError(f"the checkpoint {folder} is damaged: it has no {averaged.name}")
    values = read_json(folder / "trainer/state.json")
    return SavedRun(
        folder=folder,
        about=about,
        settings=settings,
        weights=read_weights(folder / "model.safetensors"),
        average=read_weights(averaged) if averaged.exists() else None,
        trainer=TrainerState(load_tensors(folder / "trainer/tensors.safetensors"), values),
    )


def checkpoints_of(run: Path) -> list[Path]:
    """The folders step_<N> of a run, by ascending N."""
    return sorted((path for path in run.glob("step_*") if path.name[5:].isdecimal()), key=step_of)


def step_of(folder: Path) -> int:
    """N of a folder step_<N>."""
    return int(folder.name.removeprefix("step_"))


def held_out_loss(checkpoint: Path, loss_name: str) -> float | None:
    """`loss_name` on held-out data at this checkpoint; None if it wasn't measured."""
    with contextlib.suppress(UsageError, KeyError, TypeError):
        return float(read_json(checkpoint / "train_metrics.json")["test"][loss_name])
    return None


def best_checkpoints(run: Path, loss_name: str) -> list[Path]:
    """A run's evaluated checkpoints, by ascending `loss_name`; ties: the older first."""
    losses = {folder: held_out_loss(folder, loss_name) for folder in checkpoints_of(run)}
    measured = {folder: loss for folder, loss in losses.items() if loss is not None and math.isfinite(loss)}
    return sorted(measured, key=lambda folder: measured[folder])


def prune_checkpoints(run: Path, keep_last: int, keep_best: int, loss_name: str) -> None:
    """Remove a run's checkpoints except the newest and those with the lowest held-out `loss_name`."""
    folders = checkpoints_of(run)
    kept = {*folders[-keep_last:], *best_checkpoints(run, loss_name)[:keep_best]}
    for folder in folders:
        if folder in kept:
            continue
        removed = folder.parent / f".{folder.name}.removed"
        try:
            # Rename first, so that a kill in the middle leaves no folder that looks intact.
            folder.rename(removed)
            shutil.rmtree(removed)
        except OSError as error:
            raise UsageError(f"the checkpoint {folder} can't be removed: {error}; see checkpoint.keep_last") from error


def remove_partial(run: Path) -> None:
    """Remove checkpoints that a kill left half written or half removed."""
    for kind in ("partial", "removed"):
        for folder in run.glob(f".step_*.{kind}"):
            shutil.rmtree(folder, ignore_errors=True)
