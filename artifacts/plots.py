"""Curves of runs, from metrics.jsonl and timing.jsonl, as run.png or as SVG for an HTML page.

Knows files and keys, not training. matplotlib is imported on use: other programs start fast.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from artifacts.files import json_lines, whole_file
from config.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Mapping[int, Mapping[str, Any]]
"""The lines of both files of a run by step. Each has training `minutes`, or None."""


class _Curve(NamedTuple):
    """One value of a log. `key` leads into sections and lists: `test.by_act_step.0.bits_per_byte`.

    The last value of a list, which has one for each ACT step, is left out: it is also a key beside
    the list.
    """

    key: str
    label: str = ""
    dots: bool = False
    scale: float = 1.0


class Panel(NamedTuple):
    """Values by optimizer step, or by minutes of training."""

    title: str
    curves: tuple[_Curve, ...]
    from_zero: bool = True
    logarithmic: bool = False
    over_minutes: bool = False


def _by_act_step(key: str) -> tuple[_Curve, ...]:
    """Curves of an evaluation at several depths. key: with * for the index of the ACT step, from 0."""
    return tuple(_Curve(key.replace("*", str(k - 1)), f"at ACT step {k}", dots=True) for k in (1, 2, 4, 8))


_LOSS = (
    _Curve("loss_per_token", "training"),
    _Curve("loss_first_step", "training, first ACT step"),
    _Curve("test.loss_per_token", "held out", dots=True),
)
_ROW_LOSS = (_Curve("lm_loss", "training"), _Curve("test.lm_loss", "held out", dots=True))
# Only curves in a run's logs are drawn, and a panel without any is left out.
_PANELS = (
    Panel("loss, nats per token", _LOSS, logarithmic=True),
    Panel("loss, nats per token, by time", _LOSS, logarithmic=True, over_minutes=True),
    Panel("loss of a row, nats", _ROW_LOSS, logarithmic=True),
    Panel("loss of a row, nats, by time", _ROW_LOSS, logarithmic=True, over_minutes=True),
    Panel(
        "bits per byte, held out",
        (_Curve("test.bits_per_byte", "at all ACT steps", dots=True), *_by_act_step("test.by_act_step.*.bits_per_byte")),
        from_zero=False,
    ),
    Panel(
        "rows wholly right, held out",
        (
            _Curve("test.exact_accuracy", "at all ACT steps", dots=True),
            *_by_act_step("test.by_act_step.*.exact_accuracy"),
            *_by_act_step("test.exact_accuracy_by_act_step.*"),
        ),
    ),
    Panel("mean ACT steps of a row", (_Curve("steps"),)),
    Panel(
        "loss of the halting head, nats",
        (_Curve("halt_loss_per_token", "training"), _Curve("q_halt_loss", "training")),
        logarithmic=True,
    ),
    Panel("learning rate", (_Curve("lr"),)),
    Panel("tokens per second, one ACT step each", (_Curve("tokens_per_second"),)),
    Panel(
        "peak memory, GB",
        (_Curve("peak_rss_bytes", "process", scale=1e-9), _Curve("cuda_peak_bytes", "CUDA", scale=1e-9)),
    ),
)
_COLUMNS = 2


def read_log(folder: Path) -> Log:
    """Both logs of a run by step; of several lines of a step the last counts. Raises UsageError."""
    if not (folder / "metrics.jsonl").is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    log: dict[int, dict[str, Any]] = {}
    for path in (folder / "metrics.jsonl", folder / "timing.jsonl"):
        for line in json_lines(path, "step") if path.is_file() else ():
            log.setdefault(line["step"], {}).update(line)
    # Not every evaluation is at a step with a timing line: use the next one.
    seconds: float | None = None
    for step in sorted(log, reverse=True):
        seconds = log[step].get("seconds", seconds)
        log[step]["minutes"] = None if seconds is None else seconds / 60
    return dict(sorted(log.items()))


def panels_of(logs: Sequence[Log]) -> list[Panel]:
    """The panels with something to draw."""
    return [panel for panel in _PANELS if any(_points(log, curve, panel) for log in logs for curve in panel.curves)]


def draw_panel(axes: "Axes", panel: Panel, runs: Sequence[tuple[str, Log]]) -> None:
    """Draw a panel of the named runs. The first is thick and pale, to stay visible under others."""
    several = len(runs) > 1
    for number, (name, log) in enumerate(runs):
        for place, curve in enumerate(panel.curves):
            points = _points(log, curve, panel)
            if not points:
                continue
            axes.plot(
                list(points),
                list(points.values()),
                color=f"C{number if several else place}",
                linestyle="--" if curve.dots else "-",
                marker="o" if curve.dots or len(points) == 1 else "",
                markersize=4,
                linewidth=4 if number == 0 and several else 1.2,
                alpha=0.35 if number == 0 and several else 1.0,
                label=", ".join(filter(None, (name if several else "", curve.label))),
            )
    label_axes(axes, panel.title, "minutes" if panel.over_minutes else "optimizer steps")
    axes.set_xlim(left=0)
    if panel.logarithmic:
        set_logarithmic(axes)
    elif panel.from_zero:
        axes.set_ylim(0, 1.08 * max(axes.dataLim.ymax, 1e-9))


def label_axes(axes: "Axes", title: str, xlabel: str) -> None:
    """Title, horizontal axis and grid of a chart, and a legend if its curves have labels."""
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel(xlabel, fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize="small")


def set_logarithmic(axes: "Axes") -> None:
    """Make the vertical axis logarithmic, with plain numbers: `_TEXT` shows matplotlib's own powers of ten as they are spelled."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def distinct_names(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """`names` if each is another; else as much of the end of each path as tells them apart."""
    parts = [path.absolute().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(of[-length:]) for of in parts]
    return list(names)


# A run may have a $ in its name, which isn't mathematics.
_TEXT: dict[Any, Any] = {"text.parse_math": False}


def draw_runs(folders: Sequence[Path], path: Path) -> None:
    """Draw the runs in `folders` to the PNG file `path`. Raises UsageError."""
    figure_of = _figure_class()
    from matplotlib import rc_context

    names = distinct_names([folder.absolute().name for folder in folders], folders)
    runs = [(name, read_log(folder)) for name, folder in zip(names, folders, strict=True)]
    drawn = panels_of([log for _, log in runs])
    rows = max(1, -(-len(drawn) // _COLUMNS))
    with rc_context(_TEXT):
        figure = figure_of(figsize=(5.5 * _COLUMNS, 2.8 * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, drawn, strict=False):
            draw_panel(axes, panel, runs)
        for axes in figure.axes[len(drawn) :]:
            axes.set_axis_off()
        figure.suptitle(", ".join(names), fontsize="medium")
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=110, format="png")


# Placeholder for the text colour of the page around an SVG. No other grey here has this value.
_INK = "#010203"
_SVG_STYLE: dict[Any, Any] = {
    **_TEXT,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK),
    "grid.linewidth": 0.4,
    "legend.framealpha": 0.0,
}


def svg(draw: Callable[["Axes"], None], *, height: float = 2.8) -> str:
    """The drawing of `draw` as an <svg> element in the colours and font of its page. height: inches."""
    figure_of = _figure_class()
    from matplotlib import rc_context

    with rc_context(_SVG_STYLE):
        figure = figure_of(figsize=(5.5, height), layout="constrained")
        draw(figure.subplots())
        page = io.StringIO()
        figure.savefig(page, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    element = page.getvalue()[page.getvalue().index("<svg") :]
    # Remove the ids of groups: they are unused, and would repeat in every SVG of the page.
    element = re.sub(r' id="[a-z]+\w*_\d+"', "", element)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element)).replace(
        _INK, "currentColor"
    )


def _figure_class() -> type["Figure"]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise UsageError(f"plotting needs matplotlib ({missing}): run `pip install -r requirements.txt`") from None
    return Figure


def _points(log: Log, curve: _Curve, panel: Panel) -> dict[float, float]:
    points: dict[float, float] = {}
    for step, line in log.items():
        value: Any = line
        for name in curve.key.split("."):
            if isinstance(value, list):
                value = value[int(name)] if int(name) < len(value) - 1 else None
            else:
                value = value.get(name) if isinstance(value, Mapping) else None
        at = line["minutes"] if panel.over_minutes else step
        if isinstance(value, int | float) and math.isfinite(value) and at is not None:
            points[at] = curve.scale * value
    return points
