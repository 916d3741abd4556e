"""halting.json in a checkpoint folder: scale and shift that calibrate the halting logit at each
depth.

It belongs to one set of weights and names it by hash. evaluators/calibration.py fits it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.checkpoint import Checkpoint
from artifacts.files import write_whole
from config.errors import UsageError

FILE_NAME = "halting.json"
FORMAT_VERSION = 1
_MAKE_IT_AGAIN = "delete the file, and run scripts/calibrate_halting.py to make a new one"


@dataclass(frozen=True)
class HaltingCalibration:
    """sigmoid(scale * halting logit + shift) is the probability that the argmax is right; one entry for each depth 1..N."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]


def read_halting_calibration(checkpoint: Checkpoint) -> HaltingCalibration | None:
    """The calibration in the checkpoint's folder, or None. Raises UsageError if it is damaged or was made for other weights."""
    path = checkpoint.folder / FILE_NAME
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}; {_MAKE_IT_AGAIN}") from error
    if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
        raise UsageError(f"{path} is not a halting calibration of format {FORMAT_VERSION}; {_MAKE_IT_AGAIN}")
    if values.get("weights_sha256") != checkpoint.weights_sha256(ema=True):
        raise UsageError(f"{path} was made for other weights than those beside it; {_MAKE_IT_AGAIN}")
    depths = checkpoint.config.arch.halt_max_steps
    return HaltingCalibration(*(_numbers(path, key, values.get(key), depths) for key in ("scale", "shift")))


def write_halting_calibration(
    checkpoint: Checkpoint, calibration: HaltingCalibration, measured: Mapping[str, Any] | None = None
) -> Path:
    """Write the calibration of the checkpoint's weights (the moving average if there is one)
    atomically; returns its path.

    It replaces a calibration of the same weights. `measured` is written for people; the program
    doesn't read it. Raises UsageError if an existing file is damaged or belongs to other weights,
    or if the file can't be written.
    """
    read_halting_calibration(checkpoint)
    path = checkpoint.folder / FILE_NAME
    values = {
        "format_version": FORMAT_VERSION,
        "weights_sha256": checkpoint.weights_sha256(ema=True),
        "scale": calibration.scale,
        "shift": calibration.shift,
        "measured": measured or {},
    }
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode(), "free space, or make the checkpoint's folder writable")
    return path


def _numbers(path: Path, key: str, found: object, depths: int) -> tuple[float, ...]:
    is_list = isinstance(found, Sequence) and not isinstance(found, str) and len(found) == depths
    if not is_list or not all(type(number) in (int, float) and math.isfinite(number) for number in found):  # type: ignore[attr-defined]
        raise UsageError(f"{path}: expected {depths} finite numbers under {key}, found {found!r:.80}; {_MAKE_IT_AGAIN}")
    return tuple(float(number) for number in found)  # type: ignore[attr-defined]
