"""What each depth gives and costs is measured, and the right one chosen (benchmarks/depth.py, scripts/calibrate_halting.py)."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.depth
import scripts.calibrate_halting
from artifacts.checkpoint import Snapshot, TrainerState, open_checkpoint, save_checkpoint
from artifacts.halting import HaltingCalibration, read_halting_calibration, write_halting_calibration
from benchmarks.depth import Question, Setting, ask, choose, measure, report, speed_ratio, with_interval
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.build_sample_dataset import build
from dataset.text.conversation import Template, Turn
from dataset.text.loader import TextDataset
from dataset.text.tokenizer import Tokenizer
from evaluators.answer_scores import score_answers
from generation.answers import Answer, Options, Responder
from models.act import RecursiveModel

ROWS = 200
DEPTH = 4


def setting(act_steps: int, threshold: float | None, right: Sequence[bool], seconds: Sequence[float] = (1.0, 1.0)) -> Setting:
    answers = [Answer(text="yes" if is_right else "no", act_steps=[act_steps] * 2) for is_right in right]
    return Setting(act_steps, threshold, list(seconds), answers)


def first(count: int) -> list[bool]:
    return [index < count for index in range(ROWS)]


@pytest.fixture
def questions() -> list[Question]:
    return [Question((), "yes", "logic", None)] * ROWS


def test_chosen_is_the_fastest_threshold_within_half_a_point(questions: list[Question]) -> None:
    best = setting(3, None, first(150), [4.0, 6.0])
    fixed = [setting(1, None, first(100), [1.0, 1.0]), setting(2, None, first(148)), best, setting(4, None, first(150))]
    too_bad = setting(4, 0.5, first(148), [0.5, 0.5])
    # One answer in 200 is half a point. It loses two that the best depth has and gains one.
    picked = setting(4, 0.8, [False, False, *first(ROWS)[:148], True, *[False] * (ROWS - 151)], [2.0, 2.0])
    slow = setting(4, 0.9, first(155), [3.0, 3.0])
    assert choose([*fixed, too_bad, picked, slow], questions) == (best, picked)
    found = report([*fixed, too_bad, picked, slow], questions)["chosen"]
    assert (found["best_fixed"], found["setting"]) == ("3 ACT steps", "threshold 0.8")
    assert (found["gained"], found["lost"]) == (1, 2) and found["ratio"] == pytest.approx(2.5)
    assert speed_ratio(picked, best) == pytest.approx([2.5, 2.0, 3.0])
    assert report([*fixed, too_bad], questions)["chosen"]["setting"] is None


def test_both_ends_of_the_interval() -> None:
    # 8 of 10: Wilson's interval is 0.4902 to 0.9433 (Brown, Cai and DasGupta 2001).
    score = score_answers(["f"] * 10, ["a"] * 10, ["a"] * 8 + ["b"] * 2)["overall"]
    assert with_interval(score) == "80.0 [49.0, 94.3]"
    everything = score_answers(["f"] * 10, ["a"] * 10, ["a"] * 10)["overall"]
    assert everything["upper_95"] == 1.0 and everything["lower_95"] == pytest.approx(0.7225, abs=1e-4)


@pytest.fixture(scope="module")
def responder(tiny_model: Callable[..., RecursiveModel], tiny_tokenizer: Tokenizer) -> Responder:
    model = tiny_model(f"arch.halt_max_steps={DEPTH}", vocab_size=tiny_tokenizer.vocab_size, halt_scale=1.0)
    return Responder(model, tiny_tokenizer, Template(), 128, Options(6, DEPTH), rows=3, kv_budget_gb=1.0)


@pytest.fixture
def asked() -> list[Question]:
    texts = [f"What is {index} plus {index * 7}?" for index in range(5)]
    return [Question((Turn("user", text),), "?", "addition", None) for text in texts]


def test_a_higher_threshold_takes_as_many_steps_at_least(responder: Responder, asked: list[Question]) -> None:
    thresholds = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
    settings = [Setting(DEPTH, threshold) for threshold in thresholds]
    measure(responder, asked, settings, rounds=2)
    means = [found.mean_act_steps for found in settings]
    assert means == sorted(means) and means[0] < means[-1]
    assert all(len(found.seconds) == 2 and min(found.seconds) > 0 for found in settings)


def test_the_calibration_of_each_depth_decides_where_a_token_halts(responder: Responder, asked: list[Question]) -> None:
    model = responder.model
    before = model.halt_calibration.clone()
    try:
        # Probabilities of 0.3, 0.6, 0.9 and 0.95, whatever the logit.
        model.halt_calibration = torch.tensor([[0.0] * DEPTH, torch.logit(torch.tensor([0.3, 0.6, 0.9, 0.95])).tolist()]).double()
        for threshold, steps in ((0.2, 1), (0.5, 2), (0.8, 3), (0.99, 4)):
            found = Setting(DEPTH, threshold)
            measure(responder, asked, [found], rounds=1)
            for answer in found.answers:
                # The first token comes out of the prompt, which takes all steps.
                assert answer.act_steps == [DEPTH, *[steps] * (len(answer.act_steps) - 1)] and len(answer.act_steps) > 1
    finally:
        model.halt_calibration = before


@pytest.fixture(scope="module")
def checkpoint(
    tiny_config: Callable[..., PretrainInstructConfig], tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`checkpoint("dataset=slimorca")`: a small model that knows nothing, on the bundled data."""
    data = tmp_path_factory.mktemp("data") / "sample"
    build(data, train_size=32, test_per_family=2)

    def save(*overrides: str) -> Path:
        config = tiny_config(
            "dataset=sample",
            f"dataset.data_dir={data}",
            "dataset.seq_len=256",
            "arch.halt_max_steps=2",
            "generation.max_output_tokens=3",
            *overrides,
        )
        folder = tmp_path_factory.mktemp("run") / "step_1"
        save_checkpoint(
            folder,
            Snapshot(
                step=1,
                weights=RecursiveModel(config.arch, tiny_tokenizer.vocab_size).state_dict(),
                ema=None,
                metrics={},
                trainer=TrainerState({"none": torch.zeros(1)}, {}),
            ),
            config=config,
            tokenizer=tiny_tokenizer,
            template=Template(),
            data_hash="",
        )
        return folder

    return save


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`run(module, "--flag", ...)`: its main with these arguments; gives back what it printed."""

    def call(module: Any, *arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["script", *map(str, arguments)])
        module.main()
        return capsys.readouterr().out

    return call


def test_a_checkpoint_is_calibrated_and_its_table_made(
    checkpoint: Callable[..., Path], run: Callable[..., str], tmp_path: Path
) -> None:
    folder = checkpoint()
    flags = ["--checkpoint", folder, "--rows", 8, "--rounds", 2, "--thresholds", 0.9, 0.2]
    plain = json.loads(run(benchmarks.depth, *flags).splitlines()[-1])
    assert [row["name"] for row in plain["settings"]] == ["1 ACT step", "2 ACT steps", "threshold 0.2", "threshold 0.9"]
    # The head starts at sigmoid(-1) = 0.27 for every token: above 0.2. The first token comes out of the prompt, at full depth.
    shallow, deep, halting, never = (row["mean_act_steps"] for row in plain["settings"])
    assert shallow == 1.0 and deep == never == 2.0
    assert halting == pytest.approx(1 + 8 / plain["settings"][2]["tokens"])
    for row in plain["calibration"]:
        assert row["ece"] == row["ece_uncalibrated"] == pytest.approx(abs(row["accuracy"] - 0.2689), abs=1e-3)

    printed = run(scripts.calibrate_halting, "--checkpoint", folder, "--max-rows", 20)
    assert printed.splitlines()[0].split() == ["ACT", "steps", "tokens", "accuracy", "predicted", "ECE", "scale", "shift"]
    calibration = read_halting_calibration(open_checkpoint(folder))
    assert calibration is not None and len(calibration.scale) == 2
    measured = json.loads((folder / "halting.json").read_text())["measured"]
    assert (measured["split"], measured["rows"], len(measured["by_act_step"])) == ("test", 20, 2)

    output = tmp_path / "depth.json"
    printed = run(benchmarks.depth, *flags, "--output", output)
    found = json.loads(printed.splitlines()[-1])
    assert json.loads(output.read_text()) == found
    for row, without in zip(found["calibration"], plain["calibration"], strict=True):
        assert row["ece"] < row["ece_uncalibrated"] == without["ece"]
    # A model that knows nothing is right nearly never, says so now, and doesn't halt early.
    assert [row["mean_act_steps"] for row in found["settings"]] == [1.0, 2.0, 2.0, 2.0]
    for row in found["settings"]:
        assert len(row["tokens_per_second"]) == 2 and row["overall"]["count"] == found["questions"] == 8
        assert sum(score["count"] for score in row["families"].values()) == 8
        assert f"| {row['name']} | {with_interval(row['overall'])} | {row['mean_act_steps']:.2f} |" in printed
    for family in found["settings"][0]["families"]:
        assert f"| {family} | " in printed
    assert f"- chosen: {found['chosen']['setting']}, " in printed and "- best fixed depth: 1 ACT step, " in printed


def test_a_calibration_of_other_weights_is_not_overwritten(checkpoint: Callable[..., Path], run: Callable[..., str]) -> None:
    folder = checkpoint()
    write_halting_calibration(open_checkpoint(folder), HaltingCalibration((1.0, 1.0), (0.0, 0.0)))
    path = folder / "halting.json"
    path.write_text(path.read_text().replace('"weights_sha256": "', '"weights_sha256": "x'))
    before = path.read_bytes()
    with pytest.raises(UsageError, match="made for other weights"):
        run(scripts.calibrate_halting, "--checkpoint", folder)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", 0.5, 1.5], r"--thresholds 1\.5: expected probabilities"),
        (["--rows", 1], "--rows 1: expected at least 2"),
        (["--rounds", 0], "--rounds 0: expected at least 1"),
        (["--output", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
        (["--overrides", "dataset.source=slimorca"], "dataset.source is slimorca"),
    ],
)
def test_what_cannot_be_measured_is_told(
    checkpoint: Callable[..., Path], run: Callable[..., str], arguments: list[object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(benchmarks.depth, "--checkpoint", checkpoint(), *arguments)


def test_questions_longer_than_the_context_are_left_out(
    responder: Responder, text_dataset: Callable[[Sequence[dict[str, Any]]], TextDataset]
) -> None:
    split = text_dataset([{"question": "1 " * length, "answer": f"{length}", "task": "count"} for length in (2, 40, 3)])
    asked = ask(split, dataclasses.replace(responder, context=30), rows=3)
    assert [(question.reference, question.family) for question in asked] == [("2", "count"), ("3", "count")]
    with pytest.raises(UsageError, match="no question of the test split leaves room for an answer in 3 tokens"):
        ask(split, dataclasses.replace(responder, context=3), rows=3)


def test_too_few_rows_to_calibrate_on_are_told(checkpoint: Callable[..., Path], run: Callable[..., str]) -> None:
    with pytest.raises(UsageError, match="--max-rows 1: expected at least 2"):
        run(scripts.calibrate_halting, "--checkpoint", checkpoint(), "--max-rows", 1)
