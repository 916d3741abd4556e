"""How a run starts: from scratch, with another run's weights, or from its newest intact checkpoint.

A run resumes only when that is safe. A damaged checkpoint is reported and an older one used; the
checkpoint of another run is refused; and a run that has checkpoints never silently starts over.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from artifacts.checkpoint import (
    SavedRun,
    checkpoints_of,
    newest_checkpoint,
    newest_intact,
    read_saved_run,
    read_settings,
    remove_partial,
)
from artifacts.run_folder import check_folder_name, owned_folder
from config.errors import UsageError
from config.schema import OnResume, TrainingConfig, on_resume
from config.upgrade import flat
from models.act import RecursiveModel
from models.device import set_matmul_precision, should_compile
from models.distributed import Ranks

# Settings that a checkpoint's weights were trained with, reported if a new run that starts from
# them has others ...
_OF_WEIGHTS = ("arch.", "dataset.seq_len", "dataset.default_system_prompt", "dataset.supervise")
# ... except those of how a run computes or when its rows halt.
_NOT_OF_WEIGHTS = ("arch.forward_dtype", "arch.activation_checkpointing", "arch.halt.")


@dataclass(frozen=True)
class ResumePoint:
    """A run's folder, and the checkpoint to resume from, if any."""

    folder: Path
    saved: SavedRun | None = None

    @property
    def position(self) -> int:
        """Examples admitted before."""
        return 0 if self.saved is None else int(self.saved.trainer.values["admitted"])

    def check(self, config: TrainingConfig, content: Mapping[str, str], say: Callable[[str], None]) -> None:
        """Compare the saved run with the one that resumes it.

        config: the run's, with forward_dtype resolved; a field that differs is refused, reported or
        free (`config.schema.OnResume`). content: hashes under their names in checkpoint.json, which
        must be equal. Raises UsageError if the run can't resume.
        """
        if self.saved is None:
            return
        for name, value in content.items():
            if self.saved.about.get(name) != value:
                raise UsageError(
                    f"{self.saved.folder} can't be resumed: its {name} is {str(self.saved.about.get(name))[:16]}..., now it "
                    f"is {value[:16]}...; use the same data and tokenizer, or start another run (run_name, load_checkpoint)"
                )
        old, new = flat(self.saved.settings), flat(config.model_dump())
        # The resolved number format, where the config says "auto".
        old["arch.forward_dtype"] = self.saved.trainer.values["forward_dtype"]
        changed: dict[OnResume, list[str]] = {mark: [] for mark in OnResume}
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                changed[on_resume(key, type(config))].append(f"{key} was {old.get(key)}, now {new.get(key)}")
        if refused := changed[OnResume.FIXED]:
            raise UsageError(
                f"{self.saved.folder} can't be resumed with other settings: {'; '.join(refused)}; use the old ones, or start "
                "another run (run_name, load_checkpoint)"
            )
        if reported := changed[OnResume.REPORTED]:
            say(f"resuming with other settings, so not exactly the same run: {'; '.join(reported)}")


@contextlib.contextmanager
def find_resume_point(config: TrainingConfig, ranks: Ranks) -> Iterator[ResumePoint]:
    """The run's folder, and the checkpoint that `config.resume` asks for; rank 0 decides for all.

    Within the block rank 0 holds the folder's lock. Newer, damaged checkpoints are renamed, so that
    the run can write its own. A dry run takes no lock and changes nothing. Raises UsageError if the
    run can't start.
    """
    with contextlib.ExitStack() as lock:
        found = _find(config, ranks.say, lock) if ranks.is_first else None
        place = ranks.agree(None if found is None else [str(found.folder), found.saved and str(found.saved.folder)])
        if found is None:
            folder, checkpoint = place
            found = ResumePoint(Path(folder), None if checkpoint is None else read_saved_run(Path(checkpoint)))
        yield found


def prepare_model(model: RecursiveModel, config: TrainingConfig, device: torch.device, folder: Path, ranks: Ranks) -> None:
    """Move `model` to `device`, compile as configured, and report on the run in `folder`."""
    model.to(device)
    set_matmul_precision(config.tf32, device)
    if should_compile(config.compile, device):
        model.compile_levels()
    parameters = sum(p.numel() for p in model.parameters())
    processes = f", {ranks.size} ranks" if ranks.size > 1 else ""
    ranks.say(f"run {folder}: {parameters:,} parameters, {device.type}, {model.config.forward_dtype}{processes}")


def initial_weights_path(path: Path, config: TrainingConfig, ranks: Ranks) -> Path:
    """The weights file or checkpoint of `load_checkpoint=path`; for a run's folder its newest
    checkpoint. Rank 0 decides for all.

    Reports the checkpoint, and its settings that differ from the run's `config`: only weights are
    loaded. Raises UsageError if no checkpoint of a run is intact.
    """
    source = Path(ranks.agree(str(newest_checkpoint(path, ranks.say)) if ranks.is_first else None))
    ranks.say(f"starting from the weights of {source}")
    if (source / "config.yaml").is_file():
        old, new = flat(read_settings(source, say=ranks.say)), flat(config.model_dump())
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key] and key.startswith(_OF_WEIGHTS) and not key.startswith(_NOT_OF_WEIGHTS):
                ranks.say(f"  other setting: {key} was {old[key]!r}, now {new[key]!r}")
    return source


def _find(config: TrainingConfig, say: Callable[[str], None], lock: contextlib.ExitStack) -> ResumePoint:
    check_folder_name("project_name", config.project_name)
    if config.run_name is not None:
        check_folder_name("run_name", config.run_name)
    elif config.resume == "auto":
        raise UsageError("resume=auto resumes the run named run_name: set run_name, or name a folder (resume=PATH)")
    if config.resume is None or config.resume == "auto":
        name = config.run_name or f"{config.arch.name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        folder = Path(config.checkpoint_dir) / config.project_name / name
    else:
        folder, _ = _named(config, Path(config.resume))
    is_unnamed = config.resume is None and config.run_name is None
    if config.resume is None and not is_unnamed:
        _refuse_to_overwrite(folder)
    if not config.dry_run:
        folder = lock.enter_context(owned_folder(folder, say, is_new=is_unnamed))
    # No other process changes the folder from here on.
    if config.resume is None:
        _refuse_to_overwrite(folder)
        return ResumePoint(folder)
    candidates = checkpoints_of(folder) if config.resume == "auto" else _named(config, Path(config.resume))[1]
    if not candidates:
        say(f"{folder} has no checkpoint yet: starting at step 0")
        return ResumePoint(folder)
    if not config.dry_run:
        remove_partial(folder)
    remedy = "put an intact one there, or delete the folder to start at step 0; the run doesn't start over silently"
    saved, damaged = newest_intact(candidates, read_saved_run, say, remedy)
    for path in damaged if not config.dry_run else ():
        say(f"renamed {path} to {_move_aside(path)}")
    say(f"resuming from {saved.folder}")
    return ResumePoint(folder, saved)


def _refuse_to_overwrite(folder: Path) -> None:
    if checkpoints_of(folder):
        raise UsageError(
            f"{folder} has checkpoints already and is not overwritten: resume with resume=auto, choose another run_name, or "
            "delete it"
        )


def _named(config: TrainingConfig, path: Path) -> tuple[Path, list[Path]]:
    """For resume=PATH: the run's folder and the checkpoints to try."""
    is_checkpoint = path.name.startswith("step_") and path.name[5:].isdecimal()
    folder = path.parent if is_checkpoint else path
    candidates = [c for c in checkpoints_of(folder) if not is_checkpoint or c == path]
    if not candidates:
        raise UsageError(f"resume={path}: no checkpoint there; expected a folder step_<N>, or the folder of a run that has some")
    *_, newest = checkpoints_of(folder)
    if newest != candidates[-1]:
        raise UsageError(
            f"resume={path}: the run has newer checkpoints (up to {newest.name}) and doesn't overwrite them; resume from the "
            "newest, or move them away"
        )
    if config.run_name not in (None, folder.name):
        raise UsageError(f"resume={path} is of run {folder.name!r}, and run_name is {config.run_name!r}: leave run_name out")
    return folder, candidates


def _move_aside(checkpoint: Path) -> Path:
    aside, number = checkpoint.with_name(f"{checkpoint.name}.damaged"), 1
    while aside.exists():
        number += 1
        aside = checkpoint.with_name(f"{checkpoint.name}.damaged-{number}")
    return checkpoint.rename(aside)
