"""A picture of a run, or of several over each other, from metrics.jsonl and timing.jsonl. Knows files and keys, not training.

matplotlib is imported where a picture is drawn: reading this module must not cost every program its start.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from config.errors import UsageError

METRICS, TIMING = "metrics.jsonl", "timing.jsonl"


class _Curve(NamedTuple):
    """One value of a log over the optimizer steps. `key` may lead into a section, `test.loss_per_token`."""

    file: str
    key: str
    label: str = ""
    dots: bool = False
    scale: float = 1.0


class _Panel(NamedTuple):
    title: str
    curves: tuple[_Curve, ...]
    from_zero: bool = True


# Of each panel, the curves that a run's logs have are drawn, and a panel without any is left out.
_PANELS = (
    _Panel(
        "loss, nats per token",
        (
            _Curve(METRICS, "loss_per_token", "training"),
            _Curve(METRICS, "loss_first_step", "training, first ACT step"),
            _Curve(METRICS, "test.loss_per_token", "held out", dots=True),
        ),
    ),
    _Panel("bits per byte, held out", (_Curve(METRICS, "test.bits_per_byte", dots=True),), from_zero=False),
    _Panel("ACT steps of a row, mean", (_Curve(METRICS, "mean_act_steps"),)),
    _Panel("learning rate", (_Curve(METRICS, "lr"),)),
    _Panel("tokens per second, one ACT step each", (_Curve(TIMING, "tokens_per_second"),)),
    _Panel(
        "peak memory, GB",
        (_Curve(TIMING, "peak_rss_bytes", "process", scale=1e-9), _Curve(TIMING, "cuda_peak_bytes", "CUDA", scale=1e-9)),
    ),
)
_COLUMNS = 2


def draw_runs(folders: Sequence[Path], path: Path) -> None:
    """Write the PNG `path` of the runs in `folders`, the first thick and pale, so that one that lies on it is seen as such.

    Raises UsageError if a folder has no metrics.jsonl, matplotlib is missing, or the file can't be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise UsageError(f"a picture needs matplotlib ({missing}): run `pip install -r requirements.txt`") from None
    runs = [{METRICS: _read(folder / METRICS), TIMING: _read(folder / TIMING, needed=False)} for folder in folders]
    drawn = [panel for panel in _PANELS if any(_points(run, curve) for run in runs for curve in panel.curves)]
    rows = max(1, -(-len(drawn) // _COLUMNS))
    figure = Figure(figsize=(5.5 * _COLUMNS, 2.8 * rows), layout="constrained")
    for axes, panel in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, drawn, strict=False):
        for number, (folder, run) in enumerate(zip(folders, runs, strict=True)):
            for place, curve in enumerate(panel.curves):
                points = _points(run, curve)
                if not points:
                    continue
                steps, values = zip(*sorted(points.items()), strict=True)
                axes.plot(
                    steps,
                    values,
                    color=f"C{number if len(folders) > 1 else place}",
                    linestyle="--" if curve.dots else "-",
                    marker="o" if curve.dots or len(steps) == 1 else "",
                    markersize=4,
                    linewidth=4 if number == 0 and len(folders) > 1 else 1.2,
                    alpha=0.35 if number == 0 and len(folders) > 1 else 1.0,
                    label=", ".join(filter(None, (folder.name if len(folders) > 1 else "", curve.label))),
                )
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel("optimizer steps", fontsize="small")
        axes.tick_params(labelsize="small")
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        if panel.from_zero:
            axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, 1e-9))
        if any(axes.get_legend_handles_labels()[1]):
            axes.legend(fontsize="small")
    for axes in figure.axes[len(drawn) :]:
        axes.set_axis_off()
    figure.suptitle(", ".join(folder.name for folder in folders), fontsize="medium")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, dpi=110, format="png")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UsageError(f"the picture {path} can't be written: {error}; free space, or name another file") from error


def _points(run: Mapping[str, Mapping[int, Mapping[str, Any]]], curve: _Curve) -> dict[int, float]:
    """Values of a curve by optimizer step."""
    *sections, last = curve.key.split(".")
    points = {}
    for step, line in run[curve.file].items():
        section: Any = line
        for name in sections:
            section = section.get(name, {})
        if isinstance(section.get(last), int | float):
            points[step] = curve.scale * section[last]
    return points


def _read(path: Path, needed: bool = True) -> dict[int, dict[str, Any]]:
    """The lines of a log by step; an evaluation's line joins that of its step, and of a step trained again the last one counts."""
    if not path.is_file():
        if needed:
            raise UsageError(f"{path.parent} is not the folder of a run: it has no {path.name}")
        return {}
    lines: dict[int, dict[str, Any]] = {}
    for line in _whole_lines(path):
        lines.setdefault(line["step"], {}).update(line)
    return lines


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines(keepends=True):
        # What a run is writing just now, or was when it was killed, isn't a line yet.
        if line.endswith(b"\n"):
            yield json.loads(line)
