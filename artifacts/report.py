"""A report of runs: an HTML page that needs no network, or Markdown for a model card.

All figures come from the runs' files. For a missing one it names the command that measures it.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

from artifacts.checkpoint import checkpoints_of, read_about, read_settings
from artifacts.files import json_lines, read_json, write_whole
from artifacts.plots import Log, distinct_names, draw_panel, label_axes, panels_of, read_log, set_logarithmic, svg
from artifacts.weights import count_parameters, weights_file
from config.upgrade import flat, shipped_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ANSWERS_SHOWN = 10
# Settings of folders and logging: their differences from the defaults are left out.
_NOT_COMPARED = ("project_name", "run_name", "checkpoint_dir", "resume", "dataset.data_dir", "dataset.cache_dir")
_MEASURES = (
    ("loss per token, nats", "loss_per_token"),
    ("bits per byte", "bits_per_byte"),
    ("loss of a row, nats", "lm_loss"),
    ("tokens right, teacher-forced", "token_accuracy"),
    ("tokens right", "accuracy"),
    ("rows wholly right", "exact_accuracy"),
    ("halting right", "q_halt_accuracy"),
    ("ACT steps, mean", "mean_act_steps"),
    ("ACT steps, mean", "steps"),
)
_Points = tuple[str, Sequence[float], Sequence[float]]  # a curve's name, positions and values
_SHARES = {"token_accuracy", "exact_accuracy", "accuracy", "q_halt_accuracy", "predicted", "ece"}


class Share(float):
    """A number shown in percent."""


class Seconds(float):
    """A duration."""


class Bytes(int):
    """An amount of memory."""


class Table(NamedTuple):
    """Rows of values under column heads. The first column names the row; `shown` makes text of a value."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]


class Answers(NamedTuple):
    """Sample answers of a run (from answers_<split>.jsonl), and the most ACT steps per token."""

    run: str
    records: Sequence[Mapping[str, Any]]
    most_act_steps: int


class Section(NamedTuple):
    """A section of the report. Without any content it shows `missing`: how to get it."""

    title: str
    missing: str
    charts: Sequence[Callable[[], str]] = ()
    """Each returns an <svg> element."""
    tables: Sequence[Table] = ()
    answers: Sequence[Answers] = ()
    note: str = ""


class _Run:
    """A run's files and newest checkpoint, or of a run up to a checkpoint. Raises UsageError."""

    def __init__(self, path: Path) -> None:
        is_checkpoint = (path / "checkpoint.json").is_file()
        folder = path.absolute().parent if is_checkpoint else path
        self.name = folder.absolute().name
        is_run = not is_checkpoint or (folder / "metrics.jsonl").is_file()
        last = read_about(path, {"step"})["step"] if is_checkpoint else math.inf
        self.log: Log = {step: line for step, line in (read_log(folder) if is_run else {}).items() if step <= last}
        self.checkpoint = path if is_checkpoint else next(reversed(checkpoints_of(path)), None)
        self.settings = {} if self.checkpoint is None else read_settings(self.checkpoint, say=lambda _: None)
        self.flat = flat(self.settings)
        self.about, self.puzzles, self.halting, self.depths = (
            self._json(name) for name in ("checkpoint.json", "dataset.json", "halting.json", "depth.json")
        )
        measured = {name: self._json(name) for name in ("metrics.json", "metrics_test.json")}
        # A measurement of the first batches only is a trial.
        found = [(name, of) for name, of in measured.items() if of and of.get("max_batches") is None]
        # A checkpoint is described by the evaluation of its own step only.
        tests = {step: line["test"] for step, line in self.log.items() if "test" in line and (step == last or not is_checkpoint)}
        found += [(f"training, step {step}", test) for step, test in reversed(tests.items())]
        found += [("train_metrics.json", line["test"]) for line in [self._json("train_metrics.json")] if "test" in line]
        nothing: tuple[str | None, Mapping[str, Any]] = (None, {})
        self.measured_by, self.measured = next(iter(found), nothing)

    def _json(self, name: str) -> dict[str, Any]:
        path = None if self.checkpoint is None else self.checkpoint / name
        return {} if path is None or not path.is_file() else read_json(path, "write it again, or delete it")

    def samples(self) -> list[dict[str, Any]]:
        """The first generated answers to the test split."""
        path = None if self.checkpoint is None else self.checkpoint / "answers_test.jsonl"
        if path is None or not path.is_file():
            return []
        return [record for record in islice(json_lines(path, "prompt"), _ANSWERS_SHOWN) if "answer" in record]

    def last(self, key: str) -> Any:
        """The last value of a key in the log, None if there is none."""
        return next((line[key] for line in reversed(list(self.log.values())) if line.get(key) is not None), None)

    def by_act_step(self) -> list[Mapping[str, Any]]:
        """The metrics at 1, 2, ... ACT steps; empty with a halting threshold."""
        of_puzzles = [{"exact_accuracy": share} for share in self.measured.get("exact_accuracy_by_act_step", [])]
        return list(self.measured.get("by_act_step") or of_puzzles)

    def parameters(self) -> int | None:
        """Of the model; None without its weights."""
        if self.checkpoint is None or not weights_file(self.checkpoint, ema=False).is_file():
            return None
        return count_parameters(self.checkpoint)


def write_report(paths: Sequence[Path], path: Path, *, markdown: bool = False) -> None:
    """Write the report of runs or checkpoints as HTML or Markdown, over any file. Raises UsageError."""
    runs = [_Run(folder) for folder in paths]
    for run, name in zip(runs, distinct_names([run.name for run in runs], paths), strict=True):
        run.name = name
    title = ", ".join(run.name for run in runs)
    if markdown:
        text = f"# {title}\n\n" + "\n".join(map(_as_markdown, _sections(runs)))
    else:
        pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
        pages.filters["shown"] = shown
        text = pages.get_template("report.html.jinja").render(title=title, sections=list(_sections(runs)))
    write_whole(path, text.encode())


def card_tables(checkpoint: Path) -> tuple[str, str]:
    """Tables of a checkpoint's data and results for its model card. Raises UsageError."""
    runs = [_Run(checkpoint)]
    results = (_overview(runs), _depth(runs), _calibration(runs), _families(runs))
    return _tables_as_markdown(_data(runs)), "\n".join(map(_tables_as_markdown, results))


def _sections(runs: Sequence[_Run]) -> Iterator[Section]:
    texts, puzzles = [run for run in runs if not run.puzzles], [run for run in runs if run.puzzles]
    yield from (section(runs) for section in (_overview, _data, _curves, _depth))
    if texts:
        yield from (_calibration(texts), _families(texts))
    if puzzles:
        yield _sets(puzzles)
    if texts:
        yield _samples(texts)
    yield _settings(runs)


def _overview(runs: Sequence[_Run]) -> Section:
    facts: list[tuple[str, Callable[[_Run], Any]]] = [
        ("checkpoint", lambda run: run.checkpoint and run.checkpoint.name),
        ("recursion", lambda run: run.flat.get("arch.name")),
        ("parameters", lambda run: run.parameters()),
        ("width", lambda run: run.flat.get("arch.hidden_size")),
        ("ACT steps, at most", lambda run: run.flat.get("arch.halt_max_steps")),
        ("optimizer", lambda run: run.flat.get("optimizer")),
        ("rows of an optimizer step", lambda run: run.flat.get("global_batch_size")),
        ("optimizer steps", lambda run: run.last("step")),
        ("rows trained", lambda run: None if run.puzzles else run.last("examples")),
        ("training time", lambda run: _as(Seconds, run.last("seconds"))),
        ("peak memory of the process", lambda run: _as(Bytes, run.last("peak_rss_bytes"))),
        ("peak memory of the GPU", lambda run: _as(Bytes, run.last("cuda_peak_bytes"))),
        ("held out: measured by", lambda run: run.measured_by),
        ("held out: rows", lambda run: run.measured.get("rows", run.measured.get("counts", {}).get("conversations"))),
        ("held out: ACT steps, at most", lambda run: run.measured.get("act_steps", len(run.by_act_step()) or None)),
        ("held out: halting threshold", lambda run: run.measured.get("halt_threshold")),
        ("held out: samples of a puzzle", lambda run: run.measured.get("search", {}).get("samples")),
        *((f"held out: {name}", lambda run, key=key: _measure(run.measured, key)) for name, key in _MEASURES),
    ]
    rows = [(name, *(fact(run) for run in runs)) for name, fact in facts]
    known = [row for row in rows if any(value is not None for value in row[1:])]
    return Section("Overview", "", tables=[Table(("", *(run.name for run in runs)), known)])


def _data(runs: Sequence[_Run]) -> Section:
    tables, lengths = [], []
    for run in runs:
        of_run = f"{run.name}: " if len(runs) > 1 else ""
        for source, splits in (run.about.get("data") or {}).get("sources", {}).items():
            found = [
                flat(split["counts"] | {"tokens a row, percentile": split.get("lengths", {}).get("percentiles", {})})
                for split in splits.values()
            ]
            names = [name for name in dict.fromkeys(name for of in found for name in of) if any(of.get(name) for of in found)]
            rows = [(name.replace("_", " ").replace(".", ": "), *(of.get(name) for of in found)) for name in names]
            rows.insert(0, ("files", *(", ".join(split["files"]) for split in splits.values())))
            tables.append(Table((f"{of_run}rows of {source}", *splits), rows))
            lengths += [(f"{of_run}{source}, {name}", split["lengths"]) for name, split in splits.items() if "lengths" in split]
        if run.puzzles:
            known = [(name.replace("_", " "), value) for name, value in run.puzzles.items() if isinstance(value, int)]
            data = ("data", ", ".join(run.flat.get("data_paths") or []))
            tables.append(Table((f"{of_run}puzzles", "training"), [data, *known]))
    curves = [
        (name, of["edges"], [*(whole + cut for whole, cut in zip(of["whole"], of["cut"], strict=True)), 0]) for name, of in lengths
    ]
    charts = [_chart("rows by their length", "tokens a row", curves, drawstyle="steps-post", logarithmic=True)] if curves else []
    return Section("Data", "It is described in the run's first checkpoint.", charts, tables)


def _curves(runs: Sequence[_Run]) -> Section:
    logs = [(run.name, run.log) for run in runs]
    charts = [partial(svg, partial(draw_panel, panel=panel, runs=logs)) for panel in panels_of([run.log for run in runs])]
    return Section("Curves", "They come with the run's first lines in metrics.jsonl.", charts)


def _depth(runs: Sequence[_Run]) -> Section:
    charts, tables = [], []
    for name, key in (measure for measure in _MEASURES if measure[1] in ("bits_per_byte", "exact_accuracy")):
        values = [(run.name, [of[key] for of in run.by_act_step() if key in of]) for run in runs]
        curves = [(run, range(1, len(own) + 1), own) for run, own in values if own]
        charts += [_chart(f"{name}, held out", "ACT steps", curves, marker="o")] if curves else []
    timed = []
    for run in runs:
        rows = run.by_act_step()
        measures = [(name, key) for name, key in _MEASURES if any(key in of for of in rows)]
        cells = [(step, *(_measure(of, key) for _, key in measures)) for step, of in enumerate(rows, 1)]
        head = [f"{run.name}: ACT steps", *(name for name, _ in measures)]
        answers = run.measured.get("answers", {}).get("by_act_step", [])
        if len(answers) == len(cells) > 0:
            head.append("answers exact")
            cells = [(*row, _as(Share, share)) for row, share in zip(cells, answers, strict=True)]
        tables += [Table(head, cells)] if cells else []
        settings = [(of, statistics.median(of["tokens_per_second"])) for of in run.depths.get("settings", [])]
        for is_fixed, label in ((True, "fixed depths"), (False, "halting thresholds")):
            points = [(speed, of["overall"]["accuracy"]) for of, speed in settings if (of["threshold"] is None) == is_fixed]
            timed += [(f"{run.name}, {label}", *_columns(points))] if points else []
        if settings:
            head = [f"{run.name}: at use", *_EXACT, "ACT steps a token", "tokens a second"]
            cells = [(of["name"], *_exact(of["overall"]), of["mean_act_steps"], speed) for of, speed in settings]
            tables.append(Table(head, cells))
    charts += [_chart("answers exact against speed", "tokens a second", timed, marker="o")] if timed else []
    note = "Against time: python benchmarks/depth.py --checkpoint RUN/step_N --output RUN/step_N/depth.json (bundled data)."
    return Section(
        "Depth",
        "Nothing was measured at several ACT steps.",
        charts,
        tables,
        note=note if tables and not (timed or run.puzzles) else "",
    )


def _calibration(runs: Sequence[_Run]) -> Section:
    charts, tables = [], []
    for run in runs:
        depths = run.halting.get("measured", {}).get("by_act_step", [])
        if not depths:
            continue
        last = [(f"{when} calibration", depths[-1][when]) for when in ("before", "after")]
        curves = [(label, *_columns([(p, right) for p, right, _ in of["bins"]])) for label, of in last if "bins" in of]
        title = f"{run.name}: share of tokens right, ACT step {len(depths)}"
        charts.append(_chart(title, "halting probability", [*curves, ("perfectly calibrated", (0, 1), (0, 1))], marker="o"))
        rows = [
            (step, *(_measure(of["after"], key) for key in ("accuracy", "predicted", "ece")), _measure(of["before"], "ece"))
            for step, of in enumerate(depths, 1)
        ]
        head = (f"{run.name}: ACT steps", "tokens right", "halting probability, mean", "calibration error", "before calibration")
        tables.append(Table(head, rows))
    return Section("Calibration of the halting probability", "python scripts/calibrate_halting.py --checkpoint RUN", charts, tables)


def _sets(runs: Sequence[_Run]) -> Section:
    keys = ("rows", "exact_accuracy", "accuracy")
    sets = [(f"{run.name}: {name}", values) for run in runs for name, values in run.measured.get("sets", {}).items()]
    rows = [(name, *(_measure(values, key) for key in keys)) for name, values in sets]
    tables = [Table(("set", "rows", "rows wholly right", "tokens right"), rows)] if rows else []
    return Section("Answers by set", "python inference.py --checkpoint RUN", tables=tables)


def _families(runs: Sequence[_Run]) -> Section:
    missing = "python inference_instruct.py --checkpoint RUN (scores the bundled data's answers)"
    found = [(run.name, run.measured["answers"]) for run in runs if "answers" in run.measured]
    if not found:
        return Section("Answers by family", missing)
    families = list(dict.fromkeys(family for _, answers in found for family in answers["families"]))
    rows = []
    for family in (*families, None):
        scores = [answers["overall"] if family is None else answers["families"].get(family, {}) for _, answers in found]
        about = (_measure(max(scores, key=len), "count"), _as(Share, max(scores, key=len).get("baseline")))
        rows.append((family or "all", *about, *(cell for score in scores for cell in _exact(score))))
    head = ["family", "questions", "most frequent answer", *(f"{name}: {what}" for name, _ in found for what in _EXACT)]

    def draw(axes: "Axes") -> None:
        for number, (name, answers) in enumerate(found):
            scores = [(families.index(family), score) for family, score in answers["families"].items()]
            values = [score["accuracy"] for _, score in scores]
            below = [max(0.0, score["accuracy"] - score["lower_95"]) for _, score in scores]
            above = [max(0.0, score.get("upper_95", score["accuracy"]) - score["accuracy"]) for _, score in scores]
            # Bars of the runs side by side.
            places = [place + 0.2 * (number - (len(found) - 1) / 2) for place, _ in scores]
            axes.errorbar(
                values, places, xerr=(below, above), fmt="o", markersize=4, capsize=2, label=name if len(found) > 1 else ""
            )
        axes.set_yticks(range(len(families)), families)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.02)
        label_axes(axes, "answers exact, with 95 % intervals", "share of the family's questions")

    return Section("Answers by family", missing, [partial(svg, draw, height=1 + 0.22 * len(families))], [Table(head, rows)])


def _chart(title: str, xlabel: str, curves: Sequence[_Points], *, logarithmic: bool = False, **style: Any) -> Callable[[], str]:
    def draw(axes: "Axes") -> None:
        for name, positions, values in curves:
            axes.plot(positions, values, label=name if len(curves) > 1 else "", markersize=4, linewidth=1.2, **style)
        if logarithmic:
            set_logarithmic(axes)
        axes.locator_params(axis="x", integer=xlabel == "ACT steps")
        label_axes(axes, title, xlabel)

    return partial(svg, draw)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _samples(runs: Sequence[_Run]) -> Section:
    answers = [Answers(run.name, records, run.flat["arch.halt_max_steps"]) for run in runs if (records := run.samples())]
    missing = f"python inference_instruct.py --checkpoint RUN --generate --max-generated {_ANSWERS_SHOWN}"
    return Section("Sample answers", missing, answers=answers)


def _settings(runs: Sequence[_Run]) -> Section:
    found = [run.flat for run in runs]
    shipped = [flat(shipped_settings(run.settings)) for run in runs]

    def differs(key: str) -> bool:
        # Skip references to other settings (${...}): only Hydra can resolve them.
        pairs = [
            (own[key], default.get(key, own[key]))
            for own, default in zip(found, shipped, strict=True)
            if key in own and "${" not in str(default.get(key))
        ]
        return any(value != default or value != pairs[0][0] for value, default in pairs)

    keys = [key for key in dict.fromkeys(key for own in found for key in own) if key not in _NOT_COMPARED and differs(key)]
    names = [run.name for run in runs]
    # Runs of several kinds have several defaults.
    is_one_default = all(default.get(key) == shipped[0].get(key) for default in shipped for key in keys)
    defaults = (
        {"default": shipped[0]} if is_one_default else dict(zip((f"{name}: default" for name in names), shipped, strict=True))
    )
    rows = [(key, *(_setting(of, key) for of in (*defaults.values(), *found))) for key in keys]
    title = f"Settings that differ from the defaults{' or between the runs' if len(runs) > 1 else ''}"
    tables = [Table(("setting", *defaults, *names), rows)] if any(found) else []
    return Section(title, "They come with the run's first checkpoint.", tables=tables)


def shown(value: Any) -> str:
    """A value of a table as text."""
    match value:
        case None:
            return "-"
        case Share():
            return f"{value:.1%}"
        case Seconds():
            return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
        case Bytes():
            return f"{value / 1e9:.2f} GB"
        case float():
            return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)


def _as(kind: Callable[[float], float], value: float | None) -> float | None:
    return None if value is None else kind(value)


def _setting(settings: Mapping[str, Any], key: str) -> str:
    value = settings.get(key, "-")
    return value if isinstance(value, str) else json.dumps(value)


def _measure(values: Mapping[str, Any], key: str) -> Any:
    return _as(Share, values.get(key)) if key in _SHARES else values.get(key)


_EXACT = ("exact", "95 % from", "to")


def _exact(score: Mapping[str, float]) -> Sequence[float | None]:
    return [_as(Share, score.get(key)) for key in ("accuracy", "lower_95", "upper_95")]


def _as_markdown(section: Section) -> str:
    text = f"## {section.title}\n\n{_tables_as_markdown(section)}"
    for answers in section.answers:
        for record in answers.records:
            texts = {"Q": record["prompt"][-1]["content"], "A": record["answer"], "expected": record.get("reference")}
            told = [f"- {name}: {json.dumps(text, ensure_ascii=False)}\n" for name, text in texts.items() if text is not None]
            text += "".join([*told, "\n"])
    if not section.tables and not section.answers:
        text += "Charts, which the HTML report shows.\n" if section.charts else f"Not there. To get it: {section.missing}\n"
    return text


def _tables_as_markdown(section: Section) -> str:
    lines = []
    for table in section.tables:
        rows = [table.head, ["---"] * len(table.head), *table.rows]
        lines += ["| " + " | ".join(shown(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |\n" for row in rows]
        lines.append("\n")
    return "".join(lines)
