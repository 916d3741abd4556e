"""halting.json in a checkpoint folder: calibrates the halting logit at each depth.

It belongs to one set of weights and names it by hash. evaluators/calibration.py fits it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, FiniteFloat, ValidationError

from artifacts.checkpoint import Checkpoint
from artifacts.files import write_whole
from config.errors import UsageError

FILE_NAME = "halting.json"
_MAKE_IT_AGAIN = "delete the file, and run scripts/calibrate_halting.py to make a new one"


class HaltingCalibration(NamedTuple):
    """sigmoid(scale * halting logit + shift) is the probability that the argmax is right; one entry for each depth 1..N."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


class _File(BaseModel, strict=True):
    format_version: Literal[1]
    weights_sha256: str
    scale: tuple[FiniteFloat, ...]
    shift: tuple[FiniteFloat, ...]
    measured: Any = None


def read_halting_calibration(checkpoint: Checkpoint) -> HaltingCalibration | None:
    """The calibration in the checkpoint's folder, or None. Raises UsageError if it is damaged or was made for other weights."""
    path = checkpoint.folder / FILE_NAME
    if not path.exists():
        return None
    try:
        file = _File.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error}; {_MAKE_IT_AGAIN}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UsageError(f"{path} is no halting calibration of format 1: {place} {problem['msg']}; {_MAKE_IT_AGAIN}") from error
    if file.weights_sha256 != checkpoint.weights_sha256(ema=True):
        raise UsageError(f"{path} was made for other weights than those beside it; {_MAKE_IT_AGAIN}")
    depths = checkpoint.config.arch.halt_max_steps
    if not len(file.scale) == len(file.shift) == depths:
        found = f"{len(file.scale)} and {len(file.shift)}"
        raise UsageError(f"{path}: expected {depths} numbers under scale and shift, found {found}; {_MAKE_IT_AGAIN}")
    return HaltingCalibration(file.scale, file.shift)


def write_halting_calibration(
    checkpoint: Checkpoint, calibration: HaltingCalibration, measured: Mapping[str, Any] | None = None
) -> Path:
    """Write the calibration of the checkpoint's weights (their average, if any); returns its path.

    It replaces a calibration of the same weights. `measured` is for people only. Raises UsageError
    if an existing file is damaged or of other weights, or if the file can't be written.
    """
    read_halting_calibration(checkpoint)
    path = checkpoint.folder / FILE_NAME
    sha256 = checkpoint.weights_sha256(ema=True)
    file = _File(
        format_version=1, weights_sha256=sha256, scale=calibration.scale, shift=calibration.shift, measured=dict(measured or {})
    )
    write_whole(path, (file.model_dump_json(indent=2) + "\n").encode(), "free space, or make the checkpoint's folder writable")
    return path
