"""What a run says of its course, when it is evaluated and why it ends, whether or not it was stopped on the way."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from artifacts.checkpoint import checkpoints_of, step_of
from config.compose import compose_as, compose_config
from config.errors import UsageError
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig
from dataset.text.curriculum import Curriculum
from dataset.text.loader import Example
from tests.conftest import SHORT_RUN, TINY
from tests.puzzle_data import TINY_PUZZLES, write_puzzles
from training.estimate import count_steps
from training.instruct_run import run_instruct
from training.puzzle_run import run_puzzles
from training.task import MicroBatch
from training.text import TextTask

RunConfig = Callable[..., PretrainInstructConfig]

# A loss that falls and wavers; two lines jump, the first before anything is known of the run.
LOSSES = [3 + 2 * 0.95**line + 0.4 * (line % 3) for line in range(100)]
LOSSES[5] = LOSSES[30] = 9.0


def test_a_jump_of_the_loss_is_told_after_a_restart_as_without(
    run_config: RunConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def told(folder: str, begin: int) -> list[str]:
        """What is said of the losses from line `begin` on, a line for each step."""
        losses = iter(LOSSES[begin:])
        monkeypatch.setattr(TextTask, "report", lambda task, sums: {"loss_per_token": next(losses)})
        run_instruct(run_config(tmp_path / folder, "epochs=4", "log_interval=1", "dataset.test_ratio=0", "resume=auto"))
        return [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]

    [line] = undisturbed = told("whole", 0)
    assert line.startswith("step 31: the loss has jumped to 9.000 from about 4.") and "lower lr or set grad_clip" in line
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for checkpoint in checkpoints_of(tmp_path / "stopped/SlimOrca-ACT/run"):
        if step_of(checkpoint) > 24:
            shutil.rmtree(checkpoint)
    assert told("stopped", 24) == undisturbed


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluations_of(run: Path) -> dict[int, float]:
    """Held-out loss by step."""
    return {line["step"]: line["test"]["loss_per_token"] for line in lines_of(run) if "test" in line}


def test_the_preset_of_the_originals_depth_trains(short_run_data: Path, tmp_path: Path) -> None:
    depth = ("cycles", "act_steps", "halt_max_steps")
    settings = [setting for setting in (*TINY, *SHORT_RUN) if not any(name in setting for name in depth)]
    places = [f"dataset.data_dir={short_run_data}", f"dataset.tokenizer_path={short_run_data / 'tokenizer.model'}"]
    places.append(f"checkpoint_dir={tmp_path}")
    config = compose_config("cfg_pretrain_instruct", [*settings, *places, "experiment=original_depth", "max_steps=3"])
    assert config.arch.H_cycles * (config.arch.L_cycles + 1) == 21 and config.arch.grad_calls is None
    result = run_instruct(config)
    assert result is not None and result.loss is not None
    [line] = [line for line in lines_of(result.checkpoint.parent) if "test" not in line]
    assert line["loss_first_step"] > 0
    assert len(json.loads((result.checkpoint / "train_metrics.json").read_text())["test"]["by_act_step"]) == 4


@pytest.mark.parametrize(("rows", "expected"), [(1, 4), (2, 2), (5, 1)])
def test_an_epoch_has_as_many_evaluations_as_it_can_afford(
    run_config: RunConfig, tmp_path: Path, rows: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.stopping._LEAST_TRAINED_BETWEEN", 1)
    config = run_config(tmp_path, "epochs=1", f"eval_examples={rows}")
    result = run_instruct(config)
    assert result is not None
    losses = evaluations_of(result.checkpoint.parent)
    assert len(losses) == expected and result.loss == losses[step_of(result.checkpoint)]
    assert losses.keys() <= {step_of(folder) for folder in checkpoints_of(result.checkpoint.parent)}
    examples = lines_of(result.checkpoint.parent)[-1]["examples"]
    planned = count_steps(config, Curriculum.of_epochs(examples, config.seed, 1), rows)
    assert (planned.optimizer_steps, planned.evaluations) == (step_of(result.checkpoint), expected)


def test_a_run_is_evaluated_every_so_many_steps_and_after_each_epoch(run_config: RunConfig, tmp_path: Path) -> None:
    runs = [run_instruct(run_config(tmp_path / every, f"eval_every_steps={every}")) for every in ("null", "7")]
    by_epoch, by_steps = (set(evaluations_of(result.checkpoint.parent)) for result in runs if result is not None)
    assert len(by_epoch) == 3
    assert by_steps == by_epoch | set(range(7, max(by_epoch) + 1, 7))


def test_the_padding_of_attention_is_logged(run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[list[int]] = []
    parts = TextTask._micro_batch

    def note(task: TextTask, examples: Sequence[Example]) -> MicroBatch:
        lengths.append([len(example.ids) - 1 for example in examples])
        return parts(task, examples)

    monkeypatch.setattr(TextTask, "_micro_batch", note)
    result = run_instruct(run_config(tmp_path, "packing=off", "pad_multiple=8", "log_interval=1", "max_steps=3"))
    assert result is not None
    lines = [json.loads(line) for line in (result.checkpoint.parent / "timing.jsonl").read_text().splitlines()]
    widths = [-(-max(of_step) // 8) * 8 for of_step in lengths]
    expected = [1 - sum(of_step) / (len(of_step) * width) for of_step, width in zip(lengths, widths, strict=True)]
    assert [line["attention_padding"] for line in lines] == pytest.approx(expected) and len(lines) == 3


def test_a_run_ends_at_max_steps_and_goes_on_with_more(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("lr_min_ratio=0.25", "eval_interval=9")
    limited = run_config(tmp_path, *settings, "max_steps=10")
    first = run_instruct(limited)
    assert first is not None
    run, said = first.checkpoint.parent, capsys.readouterr().out
    assert "the run ends at step 10: max_steps=10 is reached; to resume, raise it and give resume=auto run_name=run" in said
    assert first.checkpoint == run / "step_10" and evaluations_of(run) == {10: first.loss}
    last = next(line for line in lines_of(run) if line["step"] == 10)
    assert last["lr"] == pytest.approx(0.25 * limited.lr), "the schedule ends there, and the steps since the last line are logged"
    # Again: nothing is trained, nothing written.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = run_instruct(run_config(tmp_path, *settings, "max_steps=10", "resume=auto"))
    assert again == first and {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "the run has already ended at step 10: max_steps=10" in capsys.readouterr().out
    more = run_instruct(run_config(tmp_path, *settings, "max_steps=15", "resume=auto"))
    assert more is not None and more.checkpoint == run / "step_15" and list(evaluations_of(run)) == [15]
    assert "not exactly the same run: max_steps was 10, now 15" in capsys.readouterr().out
    # A limit that lies behind, at a checkpoint without an evaluation.
    (run / "step_15").rename(tmp_path / "aside")
    behind = run_instruct(run_config(tmp_path, "eval_interval=9", "max_steps=5", "resume=auto"))
    assert behind is not None and behind.checkpoint == run / "step_12" and behind.loss is not None
    assert "the run has already ended at step 12: max_steps=5" in capsys.readouterr().out


def test_a_run_whose_data_ends_with_its_limit_says_nothing_of_it(
    run_config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_instruct(run_config(tmp_path, "epochs=1"))
    assert whole is not None
    for _ in range(2):
        result = run_instruct(run_config(tmp_path, "epochs=1", f"max_steps={step_of(whole.checkpoint)}", "resume=auto"))
        assert result == whole
    assert "max_steps=" not in capsys.readouterr().out


def test_early_stopping_ends_a_run_and_keeps_its_best(
    run_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.25, 10: 2.1, 12: 1.0, 14: 1.5, 16: 1.5}
    monkeypatch.setattr("training.instruct_run._evaluate", lambda *given: {"loss_per_token": losses[given[-1]]})
    settings = ("eval_every_steps=2", "eval_interval=100", "checkpoint.keep_last=1", "checkpoint.keep_best=0")
    result = run_instruct(run_config(tmp_path, *settings, "early_stopping.patience=2"))
    run = tmp_path / "SlimOrca-ACT/run"
    said = capsys.readouterr().out
    assert result is not None and (result.checkpoint, result.loss) == (run / "step_8", 2.25)
    assert "ends at step 8: 2 evaluations in a row have not lowered the held-out loss (early_stopping.patience=2)" in said
    assert f"best checkpoint {run / 'step_4'}" in said
    assert [folder.name for folder in checkpoints_of(run)] == ["step_4", "step_8"]
    # More patience goes on, and isn't another run.
    result = run_instruct(run_config(tmp_path, *settings, "early_stopping.patience=4", "resume=auto", "max_steps=16"))
    assert result is not None and (result.checkpoint, result.loss) == (run / "step_16", 1.5)
    said = capsys.readouterr().out
    assert f"best checkpoint {run / 'step_12'}" in said and "early_stopping.patience" not in said
    assert [folder.name for folder in checkpoints_of(run)] == ["step_12", "step_16"]
    assert list(evaluations_of(run)) == list(losses)


def test_early_stopping_needs_something_to_watch(run_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dataset.test_ratio=0 holds nothing out: raise dataset.test_ratio"):
        run_instruct(run_config(tmp_path, "dataset.test_ratio=0", "early_stopping.patience=2"))
    result = run_instruct(run_config(tmp_path, "dataset.test_ratio=0", "max_steps=3"))
    assert result is not None and result.loss is None and step_of(result.checkpoint) == 3


def test_runs_on_puzzles_have_the_same_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def config(*own: str) -> PretrainPuzzleConfig:
        paths = (f"data_paths=[{tmp_path / 'puzzles'}]", f"checkpoint_dir={tmp_path}", "run_name=run")
        return compose_as(PretrainPuzzleConfig, "cfg_pretrain", [*paths, *TINY_PUZZLES, *own])

    write_puzzles(tmp_path / "puzzles")
    settings = ("eval_every_steps=2", "max_steps=5", "early_stopping.patience=9")
    result = run_puzzles(config(*settings))
    assert result is not None and step_of(result.checkpoint) == 5
    lines = lines_of(result.checkpoint.parent)
    losses = {line["step"]: line["test"]["lm_loss"] for line in lines if "test" in line}
    assert list(losses) == [2, 4, 5] and result.loss == losses[5]
    best = min(losses, key=lambda step: losses[step])
    said = capsys.readouterr().out
    assert (
        "the run ends at step 5: max_steps=5" in said and f"best checkpoint {result.checkpoint.with_name(f'step_{best}')}" in said
    )
    assert run_puzzles(config(*settings, "resume=auto")) == result
    # Killed after its second evaluation, it comes to the same.
    log = (result.checkpoint.parent / "metrics.jsonl").read_bytes()
    shutil.rmtree(result.checkpoint)
    assert run_puzzles(config(*settings, "resume=auto")) == result
    assert (result.checkpoint.parent / "metrics.jsonl").read_bytes() == log


def test_what_is_held_out_by_name_is_said_with_what_became_of_it(
    run_config: Callable[..., PretrainInstructConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in a folder of save_to_disk, where the files of two splits have the same names."""
    rows = [{"question": f"What is {n}?", "answer": "Red."} for n in range(20)]
    test = [*rows[:2], {"question": "Why?", "answer": " "}]
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(split) for name, split in (("train", rows), ("test", test))}
    ).save_to_disk(tmp_path / "data")
    places = (f"dataset.data_dir={tmp_path / 'data'}", "dataset.files=[]", "dataset.validation_split=test")
    run_instruct(run_config(tmp_path / "runs", *places, "dry_run=true", "global_batch_size=4"))
    said = capsys.readouterr().out.splitlines()
    assert f"data {tmp_path / 'data'}: 20 training rows, 2 test rows" in said
    begin = said.index("  held-out files: data-00000-of-00001.arrow")
    assert said[begin + 1] == "    rows read: 3, of these in this split: 2" and "    left out: empty_answer 1" in said[begin:]
    assert "  2 test rows ask the question of a training row; 2 equal a training row" in said
