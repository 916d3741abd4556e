"""The picture of a run: it is one, of what the logs say, and where there is nothing to draw that is told."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from artifacts.plots import draw_panel, draw_runs, panels_of, read_log, set_logarithmic, svg
from config.errors import UsageError
from scripts.plot_runs import main

PNG = b"\x89PNG\r\n\x1a\n"


def lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "first"
    metrics = [{"step": step, "loss_per_token": 5 / step, "lr": 1e-3, "grad_norm": None} for step in (10, 20, 30)]
    by_act_step = [{"bits_per_byte": 0.4}, {"bits_per_byte": 0.1}]
    test = {"loss_per_token": 0.2, "bits_per_byte": 0.1, "by_act_step": by_act_step, "counts": {"text_bytes": 3}}
    lines(folder / "metrics.jsonl", [*metrics, {"step": 30, "examples": 9, "test": test}])
    timing = [
        {"step": step, "seconds": 3.0 * step, "tokens_per_second": 7.0 * step, "peak_rss_bytes": 2e9} for step in (10, 20, 20, 30)
    ]
    timing[2]["tokens_per_second"] = 1.0  # trained again after a kill
    lines(folder / "timing.jsonl", timing)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[list[int], list[float]]]]:
    """What was plotted, by the title of its panel."""
    figures: list[Figure] = []
    save = Figure.savefig
    panels: dict[str, list[tuple[list[int], list[float]]]] = {}

    def savefig(figure: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(figure)
        axes: list[Axes] = figure.axes
        panels.update(
            {a.get_title(): [(list(c.get_xdata()), list(c.get_ydata())) for c in a.get_lines()] for a in axes if a.get_title()}
        )
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return panels


def test_every_value_stands_at_its_step_and_minute(run: Path, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    logarithmic = set()
    monkeypatch.setattr(Axes, "set_yscale", lambda axes, scale: logarithmic.add(axes.get_title()))
    draw_runs([run], run / "run.png")
    assert (run / "run.png").read_bytes().startswith(PNG)
    losses = [0.5, 0.25, pytest.approx(1 / 6)]
    assert drawn["loss, nats per token"] == [([10, 20, 30], losses), ([30], [0.2])]
    assert drawn["loss, nats per token, by time"] == [([0.5, 1.0, 1.5], losses), ([1.5], [0.2])]
    assert logarithmic == {"loss, nats per token", "loss, nats per token, by time"}
    assert drawn["bits per byte, held out"] == [([30], [0.1]), ([30], [0.4])], "at all ACT steps, and at the first"
    assert drawn["learning rate"] == [([10, 20, 30], [1e-3] * 3)]
    assert drawn["tokens per second, one ACT step each"] == [([10, 20, 30], [70.0, 1.0, 210.0])]
    assert drawn["peak memory, GB"] == [([10, 20, 30], [2.0] * 3)]
    assert "mean ACT steps of a row" not in drawn, "there is nothing to draw"


def test_a_line_that_is_being_written_is_no_line_yet(run: Path, drawn: dict[str, Any]) -> None:
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"step": 40, "lr": 2')
    (run / "timing.jsonl").unlink()
    draw_runs([run], run / "run.png")
    assert drawn["learning rate"][0][0] == [10, 20, 30] and "peak memory, GB" not in drawn


def test_what_is_not_finite_is_left_out(run: Path, drawn: dict[str, Any]) -> None:
    """A run that diverges ends with its own message, not with that of its picture."""
    metrics = [{"step": step, "loss_per_token": math.nan if step < 20 else math.inf, "lr": 1e-3} for step in (10, 20)]
    lines(run / "metrics.jsonl", [*metrics, {"step": 20, "test": {"loss_per_token": math.nan, "bits_per_byte": math.nan}}])
    draw_runs([run], run / "run.png")
    assert drawn["learning rate"] == [([10, 20], [1e-3] * 2)] and not any("loss" in title for title in drawn)


def test_a_name_is_text_not_mathematics(run: Path, tmp_path: Path) -> None:
    odd = run.rename(tmp_path / "$\\frac{$ costs")
    draw_runs([odd], tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)
    log = read_log(odd)
    assert ">$\\frac{$ costs, process<" in svg(
        lambda axes: draw_panel(axes, panels_of([log])[-1], [(odd.name, log), ("other", log)])
    )


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [1, 1000])
        set_logarithmic(axes)

    assert ">100<" in svg(draw) and "mathdefault" not in svg(draw)


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run, tmp_path / "project/first")
    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, title, **style: titles.append(title))
    draw_runs([run, tmp_path / "project/first"], tmp_path / "run.png")
    assert titles == [f"{tmp_path.name}/first, project/first"]


def test_runs_lie_over_each_other(run: Path, tmp_path: Path, drawn: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    lines(tmp_path / "second/metrics.jsonl", [{"step": 20, "lr": 2e-3}])
    main([str(run), str(tmp_path / "second"), "--output", str(tmp_path / "both.png")])
    assert (tmp_path / "both.png").read_bytes().startswith(PNG) and capsys.readouterr().out == f"{tmp_path / 'both.png'}\n"
    assert drawn["learning rate"] == [([10, 20, 30], [1e-3] * 3), ([20], [2e-3])]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), "is not the folder of a run: it has no metrics.jsonl"),
        (lambda run: (run / "run.png").mkdir(), "can't be written"),
        (lambda run: (run / "timing.jsonl").write_text('{"step": 1}\n{"seconds"\n'), r"timing\.jsonl, line 2 is damaged"),
    ],
)
def test_what_cannot_be_drawn_is_told(run: Path, prepare: Callable[[Path], None], told: str) -> None:
    prepare(run)
    with pytest.raises(UsageError, match=told):
        draw_runs([run], run / "run.png")
    assert not list(run.glob(".*"))


def test_a_missing_matplotlib_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install -r requirements\.txt"):
        draw_runs([run], run / "run.png")
