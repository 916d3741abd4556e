"""The table of a measured checkpoint says which rows of which split it is about."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluators.answer_scores import score_answers
from scripts.show_answers import main

SCORE = {"accuracy": 0.5, "lower_95": 0.25, "baseline": 0.1, "count": 4}


def metrics(split: str, rows: int) -> dict[str, Any]:
    answers = {"families": {"sort": SCORE}, "overall": SCORE, "by_act_step": [0.25, 0.5]}
    measures = {"worse_act_steps": [2], "bits_per_byte": 1.5, "loss_per_token": 0.75, "answers": answers}
    return {"checkpoint": "somewhere/step_3", "split": split, "rows": rows, "rows_of_split": 40, "max_batches": None, **measures}


@pytest.fixture
def measured(tmp_path: Path) -> Path:
    for name, of in {"metrics": metrics("test", 40), "metrics_train": metrics("train", 8)}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(of))
    return tmp_path


def test_the_heading_names_the_split_and_its_rows(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(measured)])
    shown = capsys.readouterr().out
    assert shown.startswith("40 of 40 rows of the test split, somewhere/step_3\n")
    assert "sort            50.0%     25.0%    10.0%      4\n" in shown and "25.0% at 1, 50.0% at 2" in shown
    assert "the loss rises at ACT steps [2]" in shown
    for arguments in ([str(measured), "--split", "train"], [str(measured / "metrics_train.json")]):
        main(arguments)
        assert capsys.readouterr().out.startswith("8 of 40 rows of the train split, ")


def test_deep_families_are_shown_by_hops_and_depth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def at_depths(right: tuple[int, ...], families: tuple[str, ...]) -> dict[str, Any]:
        scores = [score_answers(families, ["A"] * 4, ["A"] * count + ["B"] * (4 - count)) for count in right]
        return {"by_act_step": scores, "mean_act_steps": 1.5}

    of = metrics("test_deeper", 8)
    both, one = ("deep_map", "deep_map", "deep_order", "deep_order"), ("deep_map",) * 4
    of["answers"]["by_hops"] = {"7": at_depths((2, 4), both), "8": at_depths((0, 3), one)}
    (tmp_path / "metrics_test_deeper.json").write_text(json.dumps(of))
    main([str(tmp_path), "--split", "test_deeper"])
    shown = capsys.readouterr().out.splitlines()
    first = shown.index("exact by hops                   7               8")
    assert [line.split(maxsplit=1)[0] for line in shown[first + 1 : first + 6]] == ["all", "all", "deep_map", "deep_order", "ACT"]
    assert shown[first + 1].split() == ["all", "at", "1", "50.0", "[15,", "85]", "0.0", "[0,", "49]"]
    assert shown[first + 2].split() == ["all", "at", "2", "100.0", "[51,", "100]", "75.0", "[30,", "95]"]
    assert shown[first + 4].split() == ["deep_order", "100.0", "[34,", "100]", "-"]
    assert shown[first + 5].split() == ["ACT", "steps", "a", "token", "1.50", "1.50"]


@pytest.mark.parametrize(
    ("content", "told"), [(None, "inference_instruct.py"), ("{", "can't be read"), ('{"split": "test"}', "no generated answers")]
)
def test_what_has_no_answers_is_told(tmp_path: Path, content: str | None, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    if content is not None:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path)])
    shown = capsys.readouterr().err
    assert stop.value.code == 2 and told in shown and shown.startswith("error: ")
