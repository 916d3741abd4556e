"""The report of a run: every figure in it stands in the run's files, and what wasn't measured says how to get it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.axes import Axes

from artifacts.checkpoint import read_settings
from artifacts.report import write_report
from config.compose import compose_as
from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from config.upgrade import shipped_settings
from dataset.build_sample_dataset import build
from dataset.text.tokenizer import Tokenizer
from scripts.report import main
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from tests.test_doors import SMALL, run_well
from training.instruct_run import run_instruct
from training.puzzle_run import run_puzzles

NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
SECTIONS = ["Overview", "Data", "Curves", "Depth", "Calibration of the halting probability", "Answers by family"]
SECTIONS += ["Sample answers", "Settings that differ from the defaults"]


@pytest.fixture(scope="module")
def run(tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the bundled data, with all that can be measured of it."""
    folder = tmp_path_factory.mktemp("trained")
    build(folder / "sample", train_size=32, test_per_family=1)
    (folder / "tokenizer.model").write_bytes(tiny_tokenizer.model_bytes)
    data = ("dataset=sample", "dataset.data_dir=sample", "dataset.tokenizer_path=tokenizer.model", "dataset.seq_len=256")
    settings = (*SMALL, *data, "global_batch_size=8", "run_name=one", "log_interval=1", "eval_every_steps=2", "report=true")
    out = run_well("pretrain_instruct.py", *settings, folder=folder).out
    found = folder / "checkpoints/SlimOrca-ACT/one"
    assert f"report     {found.relative_to(folder)}/report.html\n" in out and "Not there" in (found / "report.html").read_text()
    given = ("--checkpoint", str(found))
    run_well("inference_instruct.py", *given, "--generate", "--max-generated", "4", "--halt-threshold", "0.26", folder=folder)
    run_well("inference_instruct.py", *given, folder=folder)
    run_well("scripts/calibrate_halting.py", *given, folder=folder)
    output = str(newest(found) / "depth.json")
    run_well("benchmarks/depth.py", *given, "--rows", "4", "--rounds", "1", "--output", output, folder=folder)
    # An untrained model is never right: scores that can be told apart in place of zeros.
    for name in ("depth.json", "metrics.json"):
        path = newest(found) / name
        content = json.loads(path.read_text())
        for number, score in enumerate(scores_of(content)):
            score |= {"accuracy": 0.4 + number / 97, "lower_95": 0.3 + number / 97, "upper_95": 0.5 + number / 97}
        path.write_text(json.dumps(content))
    return found


def scores_of(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict) and "lower_95" in content:
        yield content
    elif isinstance(content, dict | list):
        for value in content.values() if isinstance(content, dict) else content:
            yield from scores_of(value)


def newest(run: Path) -> Path:
    return max(run.glob("step_*"), key=lambda path: int(path.name[5:]))


def values_of(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        for key, value in content.items():
            yield key
            yield from values_of(value)
    elif isinstance(content, list):
        for value in content:
            yield from values_of(value)
    else:
        yield content


def known(run: Path) -> tuple[set[float], set[str]]:
    """Every number in the files of a run and its newest checkpoint, and every number within a text."""
    files = [path for folder in (run, newest(run)) for path in folder.iterdir() if path.suffix in (".json", ".jsonl", ".yaml")]
    contents = [yaml.safe_load(path.read_text()) for path in files if path.suffix == ".yaml"]
    contents += [json.loads(line) for path in files if path.suffix == ".jsonl" for line in path.read_text().splitlines()]
    contents += [json.loads(path.read_text()) for path in files if path.suffix == ".json"]
    values = list(values_of(contents))
    numbers = {float(value) for value in values if isinstance(value, int | float)}
    texts = [newest(run).name, *(str(value) for value in values)]
    return numbers, {number for text in texts for number in re.findall(NUMBER, text)}


def cells(html: str) -> list[tuple[str, str]]:
    """Text and exact value ("": there is none) of every cell."""
    return [(unescape(text), exact) for exact, text in re.findall(r'<td(?: title="([^"]*)")?>(.*?)</td>', html, re.DOTALL)]


def test_every_figure_is_in_the_files_of_the_run(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    plot, errorbar = Axes.plot, Axes.errorbar

    def watch_plot(axes: Axes, x: Any, y: Any, *rest: Any, **style: Any) -> Any:
        drawn.extend(y)
        return plot(axes, x, y, *rest, **style)

    def watch_errorbar(axes: Axes, x: Any, y: Any, *, xerr: Any, **style: Any) -> Any:
        drawn.extend([*x, *(a - b for a, b in zip(x, xerr[0], strict=True)), *(a + b for a, b in zip(x, xerr[1], strict=True))])
        return errorbar(axes, x, y, xerr=xerr, **style)

    monkeypatch.setattr(Axes, "plot", watch_plot)
    monkeypatch.setattr(Axes, "errorbar", watch_errorbar)
    write_report([run], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == SECTIONS and "Not there" not in html
    numbers, within_texts = known(run)
    shipped = values_of([shipped_settings(read_settings(newest(run)))])
    defaults = {number for value in shipped for number in re.findall(NUMBER, str(value))}
    shown = cells(html)
    exact = [float(value) for _, value in shown if value]
    assert len(exact) > 100 and set(exact) <= numbers
    for text, value in shown:
        if text.endswith("%"):
            assert float(text[:-1]) == pytest.approx(100 * float(value), abs=0.051)
        elif not value:
            assert set(re.findall(NUMBER, text)) <= within_texts | defaults, text
    in_files = sorted({scale * number for number in numbers for scale in (1, 1e-9)} | {0.0, 1.0})
    assert len(drawn) > 60
    for value in drawn:
        assert min(abs(value - number) for number in in_files) <= 1e-12 * max(1.0, abs(value))


def test_the_page_needs_no_network_and_takes_text_for_text(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "<b>run"
    shutil.copytree(run, copy)
    path = newest(copy) / "answers_test.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records[0]["tokens"] = ["<script>", "&"]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_report([copy], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;" in html and "<script" not in html and "<b>" not in html
    assert not re.search(r'(src|href)="(?!#)|url\((?!#)|@import|<link', html.replace("xlink:href", "href"))


def test_sample_answers_are_shaded_by_depth(run: Path) -> None:
    write_report([run], run / "report.html")
    html = (run / "report.html").read_text()
    records = [json.loads(line) for line in (newest(run) / "answers_test.jsonl").read_text().splitlines()]
    tokens = re.findall(
        r'<span class="token" title="(\d) ACT steps" style="background: [^/]*/ ([\d.]+)\)">(.*?)</span>', html, re.DOTALL
    )
    assert [int(steps) for steps, _, _ in tokens] == [steps for record in records for steps in record["act_steps"]]
    assert {float(shade) for steps, shade, _ in tokens if steps == "1"} == {0.35}
    assert [unescape(text) for *_, text in tokens] == [text for record in records for text in record["tokens"]]


def test_what_was_not_measured_says_how_to_get_it(run: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(run / "metrics.jsonl", bare)
    write_report([bare], tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert re.findall(r"<h2[^>]*>(.*?)</h2>", html) == SECTIONS
    for command in ("scripts/calibrate_halting.py", "inference_instruct.py --checkpoint RUN", "--generate", "benchmarks/depth.py"):
        assert command in html
    assert "<svg" in html and html.count("Not there") == 5
    (bare / "step_1").mkdir()
    (bare / "step_1/config.yaml").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        write_report([bare], tmp_path / "report.html")


def test_runs_stand_side_by_side(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    config = newest(other) / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.0001", "lr: 0.003"))
    monkeypatch.chdir(tmp_path)
    main([str(run), str(other)])
    assert capsys.readouterr().out == "report.html\n"
    html = (tmp_path / "report.html").read_text()
    row = re.search(r"<tr><td>lr</td>(.*?)</tr>", html, re.DOTALL)
    assert row is not None and re.findall(r"<td>(.*?)</td>", row[1]) == ["0.0001", "0.0001", "0.003"]
    assert '<th scope="col">one</th><th scope="col">other</th>' in html and "other, training" in html


def test_a_report_as_markdown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a single checkpoint, too."""
    main([str(run), "--markdown"])
    assert capsys.readouterr().out == f"{run / 'report.md'}\n"
    text = (run / "report.md").read_text()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == SECTIONS
    metrics = json.loads((newest(run) / "metrics.json").read_text())
    assert f"| held out: bits per byte | {metrics['bits_per_byte']:.4g} |" in text and "<" not in text.replace("<s>", "")
    main([str(newest(run)), "--markdown"])
    assert (newest(run) / "report.md").read_text() == text
    with pytest.raises(SystemExit) as stop:
        main([str(run.parent)])
    assert stop.value.code == 2 and "is not the folder of a run" in capsys.readouterr().err


def test_a_run_on_puzzles_has_one_too(tmp_path: Path) -> None:
    write_puzzles(tmp_path / "puzzles")
    settings = (f"data_paths=[{tmp_path / 'puzzles'}]", f"checkpoint_dir={tmp_path}", "run_name=toy", *TINY_PUZZLES)
    result = run_puzzles(compose_as(PretrainPuzzleConfig, "cfg_pretrain", [*settings, "report=true"]))
    assert result is not None
    run = result.checkpoint.parent
    html = (run / "report.html").read_text()
    numbers, _ = known(run)
    shown = cells(html)
    assert {float(value) for _, value in shown if value} <= numbers
    assert "calibrate_halting" not in html and "benchmarks/depth" not in html and "Sample answers" not in html, "these are for text"
    assert {"puzzles", "Answers by set"} <= set(re.findall(r">([^<>]*)<", html)) and "toy: all" in {text for text, _ in shown}
    curve = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test"]["exact_accuracy_by_act_step"]
    assert len(curve) == 3 and [str(share) for share in curve] == [value for text, value in shown if text.endswith("%")][-4:-1]


def test_a_report_that_cannot_be_written_ends_no_run(
    run_config: Callable[..., PretrainInstructConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(paths: list[Path], path: Path) -> None:
        raise UsageError(f"no room for {path.name}")

    monkeypatch.setattr("training.loop.write_report", fail)
    result = run_instruct(run_config(tmp_path, "report=true", "max_steps=2"))
    assert result is not None and result.checkpoint.is_dir()
    assert "no room for report.html" in capsys.readouterr().out
