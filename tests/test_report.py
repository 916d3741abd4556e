"""The report of a run: every figure in it stands in the run's files, and what wasn't measured says how to get it."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.axes import Axes
from safetensors.torch import save_file

from artifacts.checkpoint import read_settings
from artifacts.report import card_tables, write_report
from artifacts.weights import count_parameters
from config.compose import compose_as
from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from config.upgrade import shipped_settings
from dataset.build_sample_dataset import build
from dataset.text.tokenizer import Tokenizer
from scripts.report import main
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from tests.test_entry_scripts import SMALL, run_well
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
    assert len(exact) > 100 and set(exact) <= numbers | {count_parameters(newest(run))}
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


def write_known_run(folder: Path) -> Path:
    """A run of two checkpoints, written by hand, each value another; `folder`."""
    measures = [{"bits_per_byte": 0.75, "exact_accuracy": 0.125}, {"bits_per_byte": 0.5, "exact_accuracy": 0.25}]
    tests = {2: measures[0], 4: measures[1]}
    lines: list[dict[str, Any]] = []
    for step, test in tests.items():
        lines += [{"step": step, "examples": 8 * step, "lr": 0.1}, {"step": step, "examples": 8 * step, "test": test}]
        checkpoint = folder / f"step_{step}"
        checkpoint.mkdir(parents=True)
        write(checkpoint / "checkpoint.json", {"format_version": 1, "step": step})
        write(checkpoint / "config.yaml", {"arch": {"name": "looped", "halt_max_steps": 2}, "lr": 0.003})
        save_file(
            {"model.inner.H_init": torch.zeros(7), "model.inner.q_head.weight": torch.zeros(2, 5)}, checkpoint / "model.safetensors"
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = [{"step": step, "seconds": 30 * step, "peak_rss_bytes": step * 10**9} for step in tests]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))
    score = {"accuracy": 0.625, "lower_95": 0.5, "upper_95": 0.75, "count": 16, "baseline": 0.0625}
    of_split = {"rows": 12, "act_steps": 2, "max_batches": None, "by_act_step": measures, **measures[1]}
    of_split["answers"] = {"overall": score, "families": {"logic": {**score, "count": 9}}, "by_act_step": [0.375, 0.625]}
    write(folder / "step_4/metrics.json", of_split)
    fast = {"name": "1 ACT step", "threshold": None, "overall": score, "mean_act_steps": 1.0, "tokens_per_second": [40, 10, 30, 20]}
    write(folder / "step_4/depth.json", {"settings": [fast]})
    after = {"accuracy": 0.8, "predicted": 0.7, "ece": 0.1}
    write(folder / "step_4/halting.json", {"measured": {"by_act_step": [{"before": {"ece": 0.2}, "after": after}]}})
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def figures(markdown: str) -> dict[str, list[list[str]]]:
    """The rows of each section's tables, without their heads."""
    sections = {part.splitlines()[0]: part.splitlines() for part in markdown.split("## ")[1:]}
    rows = {title: [line[2:-2].split(" | ") for line in lines if line.startswith("| ")] for title, lines in sections.items()}
    return {
        title: [row for row, below in zip(found, [*found[1:], [""]], strict=False) if {row[0], below[0]}.isdisjoint({"---"})]
        for title, found in rows.items()
    }


def report(*paths: Path) -> dict[str, list[list[str]]]:
    path = paths[0] / "report.md"
    write_report(paths, path, markdown=True)
    return figures(path.read_text())


def test_each_figure_stands_under_its_label(tmp_path: Path) -> None:
    found = report(write_known_run(tmp_path / "run"))
    assert found["Overview"] == [
        ["checkpoint", "step_4"],
        ["recursion", "looped"],
        ["parameters", "10"],
        ["width", "512"],
        ["ACT steps, at most", "2"],
        ["optimizer", "adam_atan2"],
        ["rows of an optimizer step", "32"],
        ["optimizer steps", "4"],
        ["rows trained", "32"],
        ["training time", "2.0 min"],
        ["peak memory of the process", "4.00 GB"],
        ["held out: measured by", "metrics.json"],
        ["held out: rows", "12"],
        ["held out: ACT steps, at most", "2"],
        ["held out: bits per byte", "0.5"],
        ["held out: rows wholly right", "25.0%"],
    ]
    exact = ["62.5%", "50.0%", "75.0%"]
    assert found["Depth"] == [
        ["1", "0.75", "12.5%", "37.5%"], ["2", "0.5", "25.0%", "62.5%"], ["1 ACT step", *exact, "1", "25"],
    ]  # fmt: skip
    assert found["Calibration of the halting probability"] == [["1", "80.0%", "70.0%", "10.0%", "20.0%"]]
    assert found["Answers by family"] == [["logic", "9", "6.2%", *exact], ["all", "16", "6.2%", *exact]]
    assert ["lr", "0.0012", "0.003"] in found["Settings that differ from the defaults"]


def test_an_earlier_checkpoint_shows_the_run_until_then(tmp_path: Path) -> None:
    run = write_known_run(tmp_path / "run")
    first = {row[0]: row[1] for row in report(run / "step_2")["Overview"]}
    assert (first["optimizer steps"], first["rows trained"], first["training time"]) == ("2", "16", "1.0 min")
    assert (first["held out: measured by"], first["held out: bits per byte"]) == ("training, step 2", "0.75")
    assert "| held out: bits per byte | 0.75 |" in card_tables(run / "step_2")[1]
    # One that was saved between two evaluations has no figures of its own.
    (run / "step_2").rename(run / "step_3")
    write(run / "step_3/checkpoint.json", {"format_version": 1, "step": 3})
    assert not [row for row in report(run / "step_3")["Overview"] if row[0].startswith("held out")]
    write(run / "step_3/train_metrics.json", {"step": 3, "test": {"bits_per_byte": 0.625}})
    between = report(run / "step_3")["Overview"]
    assert between[-2:] == [["held out: measured by", "train_metrics.json"], ["held out: bits per byte", "0.625"]]


def test_all_sections_show_one_measurement(tmp_path: Path) -> None:
    run = write_known_run(tmp_path / "run")
    (run / "step_4/metrics.json").unlink()
    with_threshold = {"rows": 12, "act_steps": 2, "halt_threshold": 0.5, "by_act_step": [], "bits_per_byte": 0.875}
    write(run / "step_4/metrics_test.json", with_threshold)
    (run / "step_4/depth.json").unlink()
    write(run / "step_4/train_metrics.json", {"step": 4, "test": {"by_act_step": [{"bits_per_byte": 0.5}] * 2}})
    found = report(run)
    assert ["held out: halting threshold", "0.5"] in found["Overview"] and ["held out: bits per byte", "0.875"] in found["Overview"]
    assert found["Depth"] == []
    write(run / "step_4/metrics_test.json", with_threshold | {"max_batches": 1})
    assert ["held out: measured by", "training, step 4"] in report(run)["Overview"], "a trial is no measurement of the split"


def test_settings_are_compared_with_the_defaults_and_between_the_runs(tmp_path: Path) -> None:
    runs = [write_known_run(tmp_path / name) for name in ("one", "two")]
    for checkpoint in runs[1].glob("step_*"):
        write(checkpoint / "config.yaml", {"arch": {"name": "trm", "halt_max_steps": 3}, "lr": 0.003})
    found = {row[0]: row[1:] for row in report(*runs)["Settings that differ from the defaults or between the runs"]}
    assert found["lr"] == ["0.0012", "0.0012", "0.003", "0.003"], "each run's default, then its value"
    assert found["arch.H_cycles"] == ["1", "3", "1", "3"], "either is its recursion's default"
    assert "seed" not in found


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [write_known_run(tmp_path / project / "run") for project in ("one", "two")]
    write_report(runs, tmp_path / "report.md", markdown=True)
    assert (tmp_path / "report.md").read_text().startswith("# one/run, two/run\n")
    write_report(sorted(runs[0].glob("step_*")), tmp_path / "report.md", markdown=True)
    assert (tmp_path / "report.md").read_text().startswith("# step_2, step_4\n")


def test_a_run_on_puzzles_hides_nothing_of_one_on_text(tmp_path: Path) -> None:
    text, puzzles = (write_known_run(tmp_path / name) for name in ("text", "puzzles"))
    write(puzzles / "step_4/dataset.json", {"seq_len": 81})
    write(puzzles / "step_4/config.yaml", {"arch": {"name": "trm"}, "data_paths": ["data"]})
    (puzzles / "step_4/metrics.json").unlink()
    write(puzzles / "step_4/metrics_test.json", {"sets": {"hard": {"rows": 3, "exact_accuracy": 0.5, "accuracy": 0.75}}})
    found = report(text, puzzles)
    assert [row[0] for row in found["Answers by family"]] == ["logic", "all"]
    assert found["Answers by set"] == [["puzzles: hard", "3", "50.0%", "75.0%"]]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step"\n', r"metrics\.jsonl, line 2 is damaged"),
        ("step_4/answers_test.jsonl", "{}\n", r"answers_test\.jsonl, line 1 is damaged"),
        ("step_4/metrics.json", "[]", r"metrics\.json is damaged"),
    ],
)
def test_damaged_files_are_reported(tmp_path: Path, name: str, content: str, told: str) -> None:
    run = write_known_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(UsageError, match=told):
        write_report([run], tmp_path / "report.html")


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
    config.write_text(config.read_text().replace("lr: 0.0012", "lr: 0.003"))
    monkeypatch.chdir(tmp_path)
    main([str(run), str(other)])
    assert capsys.readouterr().out == "report.html\n"
    html = (tmp_path / "report.html").read_text()
    row = re.search(r"<tr><td>lr</td>(.*?)</tr>", html, re.DOTALL)
    assert row is not None and re.findall(r"<td>(.*?)</td>", row[1]) == ["0.0012", "0.0012", "0.003"]
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
    assert {float(value) for _, value in shown if value} <= numbers | {count_parameters(newest(run))}
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
