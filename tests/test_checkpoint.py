"""A checkpoint is whole (contract 7): it round-trips, appears at once or not at all, and damage is told."""

import json
import pkgutil
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import config.upgrade as config_upgrade
from artifacts.checkpoint import (
    Snapshot,
    TrainerState,
    newest_checkpoint,
    open_checkpoint,
    read_saved_run,
    save_checkpoint,
)
from artifacts.halting import HaltingCalibration, read_halting_calibration, write_halting_calibration
from artifacts.hf.model_card import model_card
from artifacts.weights import load_weights, read_weights
from config.errors import UsageError
from config.schema import PretrainInstructConfig
from dataset.text.conversation import Template
from dataset.text.tokenizer import Tokenizer
from generation.loading import load_model
from models.act import RecursiveModel
from models.ema import EMA

Save = Callable[..., tuple[RecursiveModel, PretrainInstructConfig]]
TEMPLATE = Template(user="<user>\n")


@pytest.fixture
def save(tiny_config: Callable[..., PretrainInstructConfig], tiny_tokenizer: Tokenizer) -> Save:
    """`save(folder, "arch.tie_embeddings=true", ema=True)`: write a checkpoint, give back its model and config."""

    def write(folder: Path, *overrides: str, ema: bool = False) -> tuple[RecursiveModel, PretrainInstructConfig]:
        config = tiny_config("arch.forward_dtype=float32", *overrides)
        model = RecursiveModel(config.arch, tiny_tokenizer.vocab_size)
        average = {name: value + 1 for name, value in EMA(model, 0.9).average.items()} if ema else None
        save_checkpoint(
            folder,
            Snapshot(
                step=7,
                weights=model.state_dict(),
                ema=average,
                metrics={"loss": 0.5},
                trainer=TrainerState({"carry": torch.arange(6).view(2, 3).T, "m": torch.ones(2)}, {"step": 7, "name": "é"}),
            ),
            config=config,
            tokenizer=tiny_tokenizer,
            template=TEMPLATE,
            data_hash="abc",
        )
        return model, config

    return write


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_opened_is_what_was_saved(tmp_path: Path, save: Save, tiny_tokenizer: Tokenizer) -> None:
    folder = tmp_path / "run/step_7"
    model, config = save(folder)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.config, checkpoint.template, checkpoint.step, checkpoint.data_hash) == (config, TEMPLATE, 7, "abc")
    assert checkpoint.tokenizer.sha256 == tiny_tokenizer.sha256
    assert same(checkpoint.weights(ema=True), model.state_dict()) and same(checkpoint.weights(ema=False), model.state_dict())
    state = read_saved_run(folder).trainer
    assert same(state.tensors, {"carry": torch.tensor([[0, 3], [1, 4], [2, 5]]), "m": torch.ones(2)})
    assert state.values == {"step": 7, "name": "é"}
    assert json.loads((folder / "train_metrics.json").read_text()) == {"loss": 0.5}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step_7"]
    fresh = RecursiveModel(config.arch, tiny_tokenizer.vocab_size, seed=99)
    load_weights(fresh, checkpoint.weights(ema=True), folder)
    assert same(fresh.state_dict(), model.state_dict())


def test_names_on_disk_are_the_originals(tmp_path: Path, save: Save) -> None:
    model, _ = save(tmp_path / "step_7")
    assert load_file(tmp_path / "step_7/model.safetensors").keys() == {f"model.inner.{name}" for name in model.state_dict()}


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_average_is_what_is_used_and_the_weights_are_there_for_training(
    tmp_path: Path, save: Save, tiny_tokenizer: Tokenizer, tied: str
) -> None:
    model, config = save(tmp_path / "step_7", f"arch.tie_embeddings={tied}", ema=True)
    checkpoint = open_checkpoint(tmp_path / "step_7")
    averaged, trained = (RecursiveModel(config.arch, tiny_tokenizer.vocab_size, seed=99) for _ in range(2))
    load_weights(averaged, checkpoint.weights(ema=True), tmp_path)
    load_weights(trained, checkpoint.weights(ema=False), tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(trained.state_dict()[name], value)
        is_buffer = name.endswith("_init")
        assert torch.equal(averaged.state_dict()[name], value if is_buffer else value + 1)
    assert (averaged.lm_head.weight is averaged.embed_tokens.embedding_weight) == (tied == "true")


def test_tied_heads_are_stored_once(tmp_path: Path, save: Save, tiny_tokenizer: Tokenizer) -> None:
    _, config = save(tmp_path / "step_7", "arch.tie_embeddings=true")
    assert "model.inner.lm_head.weight" not in load_file(tmp_path / "step_7/model.safetensors")
    untied = config.arch.model_copy(update={"tie_embeddings": False})
    with pytest.raises(UsageError, match=r"missing lm_head\.weight"):
        weights = open_checkpoint(tmp_path / "step_7").weights(ema=True)
        load_weights(RecursiveModel(untied, tiny_tokenizer.vocab_size), weights, tmp_path)


def test_a_folder_that_exists_is_not_overwritten(tmp_path: Path, save: Save) -> None:
    folder = tmp_path / "step_7"
    save(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="not overwritten"):
        save(folder, "seed=5")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("at", ["artifacts.checkpoint.save_weights", "artifacts.checkpoint.to_json", "artifacts.files._sync"])
@pytest.mark.parametrize("failure", [OSError("disk full"), SafetensorError("disk full"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_no_checkpoint(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, at: str, failure: BaseException
) -> None:
    folder, calls = tmp_path / "run/step_7", []
    real = pkgutil.resolve_name(at)

    def fails_the_second_time(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise failure
        return real(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(at, fails_the_second_time)
        with pytest.raises((UsageError, KeyboardInterrupt)) as error:
            save(folder, ema=True)
    if not isinstance(failure, KeyboardInterrupt):
        assert "can't be written: disk full" in str(error.value)
        assert list(folder.parent.iterdir()) == []
    assert list(folder.parent.glob("step_*")) == []
    save(folder)
    assert open_checkpoint(folder).step == 7 and [path.name for path in folder.parent.iterdir()] == ["step_7"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path, save: Save) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    with pytest.raises(UsageError, match="can't be written"):
        save(tmp_path / "run/step_7")


def test_a_missing_checkpoint_names_those_nearby(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "run/step_7")
    save(tmp_path / "run/step_9")
    save(tmp_path / "other/step_1")
    with pytest.raises(UsageError, match=r"no checkpoint at .*step_8: .*found nearby: \S+/run/step_7, \S+/run/step_9$"):
        open_checkpoint(tmp_path / "run/step_8")
    with pytest.raises(UsageError, match=r"no checkpoint at .* or that of a run; found nearby: \S+/other, \S+/run$"):
        open_checkpoint(tmp_path)
    with pytest.raises(UsageError, match="no checkpoint at"):
        open_checkpoint(tmp_path / "nowhere/at/all")


def test_of_a_run_the_newest_whole_checkpoint_is_opened_and_said(
    tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for step in (9, 200, 70, 1000):
        save(run / f"step_{step}")
    # By number, whatever was touched last; what isn't whole, or not a checkpoint, doesn't count.
    (run / "step_9/metrics.json").write_text("{}")
    (run / "step_1000").rename(run / ".step_1000.partial")
    shutil.copytree(run / "step_200", run / "step_300.damaged")
    (run / "step_x").mkdir()
    assert open_checkpoint(run).folder == run / "step_200"
    shown = capsys.readouterr()
    assert shown.err == f"{run}: using its newest checkpoint, step_200\n" and not shown.out
    assert open_checkpoint(run / "step_9").folder == run / "step_9" and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("checkpoint.json", b""),
        ("checkpoint.json", None),
        ("config.yaml", b"- 1"),
        ("tokenizer.model", b"another"),
        ("tokenizer.model", None),
        ("ema.safetensors", None),
        ("ema.safetensors", b"truncated"),
    ],
)
def test_of_a_run_damaged_checkpoints_are_passed_over(
    tmp_path: Path, save: Save, capsys: pytest.CaptureFixture[str], file: str, damage: bytes | None
) -> None:
    run = tmp_path / "run"
    for step in (1, 2):
        save(run / f"step_{step}", "ema=true", ema=True)
    path = run / "step_2" / file
    content = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(content[:-9] if damage == b"truncated" else damage)
    assert newest_checkpoint(run) == run / "step_1"
    said = capsys.readouterr().err
    assert "step_2" in said and "looking for an older checkpoint" in said
    (run / "step_1/checkpoint.json").unlink()
    with pytest.raises(UsageError, match=r"no checkpoint in .* is intact \(step_1, step_2\)"):
        newest_checkpoint(run)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("checkpoint.json", b"{"),
        ("checkpoint.json", b"[1]"),
        ("checkpoint.json", b"\xff\xfe"),
        ("checkpoint.json", b'{"format_version": 1}'),
        ("config.yaml", b"a: ["),
        ("config.yaml", b""),
        ("config.yaml", b"- 1"),
        ("config.yaml", b"\xff\xfe\x00"),
        ("config.yaml", None),
        ("tokenizer.model", b"other"),
        ("tokenizer.model", None),
    ],
)
def test_a_damaged_folder_is_told(tmp_path: Path, save: Save, file: str, content: bytes | None) -> None:
    folder = tmp_path / "step_7"
    save(folder)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match="step_7"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "trainer/tensors.safetensors", "trainer/state.json"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_tensors_are_told_when_read(tmp_path: Path, save: Save, file: str, damage: str) -> None:
    folder = tmp_path / "step_7"
    save(folder, ema=True)
    path = folder / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.unlink()
    checkpoint = open_checkpoint(folder)
    readers = {"model": lambda: checkpoint.weights(ema=False), "ema": lambda: checkpoint.weights(ema=True)}
    if (file, damage) == ("ema.safetensors", "missing"):
        assert same(readers["ema"](), readers["model"]())
        return
    with pytest.raises(UsageError, match=path.name):
        readers.get(path.stem, lambda: read_saved_run(folder).trainer.tensors)()


def test_another_format_or_config_is_refused(tmp_path: Path, save: Save) -> None:
    folder = tmp_path / "step_7"
    save(folder)
    about = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**about, "format_version": 99}))
    with pytest.raises(UsageError, match="format 99, this program reads 1"):
        open_checkpoint(folder)
    (folder / "checkpoint.json").write_text(json.dumps({**about, "template": {**about["template"], "version": 99}}))
    with pytest.raises(UsageError, match="template version 99"):
        open_checkpoint(folder)
    (folder / "checkpoint.json").write_text(json.dumps(about))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("hidden_size:", "hiden_size:"))
    with pytest.raises(UsageError, match=r"did you mean arch\.hidden_size"):
        open_checkpoint(folder)


def test_a_setting_that_is_gone_is_said_once(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = save(tmp_path / "run/step_7")
    monkeypatch.setattr(config_upgrade, "REMOVED", {"dataset.shuffle": ...})
    path = tmp_path / "run/step_7/config.yaml"
    path.write_text(path.read_text().replace("dataset:\n", "dataset:\n  shuffle: 3\n"))
    assert open_checkpoint(tmp_path / "run").config == config
    assert capsys.readouterr().err.count("step_7: ignoring settings that this version doesn't have: dataset.shuffle=3\n") == 1


def test_a_foreign_tokenizer_is_refused_and_an_equal_copy_is_not(tmp_path: Path, save: Save, tiny_tokenizer: Tokenizer) -> None:
    folder = tmp_path / "step_7"
    save(folder)
    shutil.copy(folder / "tokenizer.model", tmp_path / "copy.model")
    assert open_checkpoint(folder, str(tmp_path / "copy.model")).tokenizer.sha256 == tiny_tokenizer.sha256
    # An unknown protobuf field at the end: the same pieces, another file.
    (tmp_path / "other.model").write_bytes(tiny_tokenizer.model_bytes + b"\xa2\x06\x01x")
    with pytest.raises(UsageError, match="another tokenizer than the checkpoint's"):
        open_checkpoint(folder, str(tmp_path / "other.model"))
    with pytest.raises(UsageError, match="no tokenizer at"):
        open_checkpoint(folder, str(tmp_path / "missing.model"))


@pytest.mark.parametrize("ema", [False, True])
def test_of_a_folder_the_average_is_read_if_there_is_one(tmp_path: Path, save: Save, ema: bool) -> None:
    save(tmp_path / "step_7", ema=ema)
    assert same(read_weights(tmp_path / "step_7"), open_checkpoint(tmp_path / "step_7").weights(ema=ema))


def test_nothing_in_the_folder_is_a_pickle(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "step_7", ema=True)
    kinds = {path.suffix for path in (tmp_path / "step_7").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".yaml", ".model"}


CALIBRATION = HaltingCalibration(scale=(0.5, 2.0, 1.0, 3.0), shift=(0.1, -1.0, 0.0, 0.25))


def test_a_calibration_is_what_the_model_halts_by(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "step_7")
    checkpoint = open_checkpoint(tmp_path / "step_7")
    assert read_halting_calibration(checkpoint) is None
    plain = load_model(checkpoint, checkpoint.config)
    assert plain.halt_calibration.tolist() == [[1.0] * 4, [0.0] * 4]
    path = write_halting_calibration(checkpoint, CALIBRATION, {"split": "test"})
    assert path == tmp_path / "step_7/halting.json" and json.loads(path.read_text())["measured"] == {"split": "test"}
    assert read_halting_calibration(checkpoint) == CALIBRATION
    model = load_model(checkpoint, checkpoint.config)
    assert torch.equal(model.halt_calibration, torch.tensor([CALIBRATION.scale, CALIBRATION.shift]))
    assert same(model.state_dict(), plain.state_dict())
    output_ND = torch.randn(5, model.config.hidden_size)
    for step in range(4):
        expected_N = (CALIBRATION.scale[step] * model.halt_logits(output_ND)[:, 0] + CALIBRATION.shift[step]).sigmoid()
        torch.testing.assert_close(model.halting_probability(output_ND, step), expected_N)


def test_a_calibration_is_replaced_for_the_same_weights_and_refused_for_others(tmp_path: Path, save: Save) -> None:
    folder = tmp_path / "step_7"
    save(folder, ema=True)
    checkpoint = open_checkpoint(folder)
    path = write_halting_calibration(checkpoint, HaltingCalibration((1.0,) * 4, (0.0,) * 4))
    write_halting_calibration(checkpoint, CALIBRATION)
    assert read_halting_calibration(checkpoint) == CALIBRATION
    before = path.read_bytes()
    # Without the average, the weights in use are others.
    (folder / "ema.safetensors").unlink()
    for use in (
        lambda: read_halting_calibration(checkpoint),
        lambda: load_model(checkpoint, checkpoint.config),
        lambda: write_halting_calibration(checkpoint, CALIBRATION),
    ):
        with pytest.raises(UsageError, match=r"halting\.json was made for other weights.*delete the file"):
            use()
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "\xff",
        {"format_version": 2},
        {"weights_sha256": "0"},
        {"scale": None},
        {"scale": 1.0},
        {"scale": "1111"},
        {"scale": [1.0, 1.0, 1.0]},
        {"scale": [1.0, 1.0, 1.0, "1"]},
        {"shift": [1.0, 1.0, 1.0, True]},
        {"shift": [1.0, 1.0, 1.0, float("nan")]},
        {"shift": [1.0, 1.0, 1.0, float("inf")]},
    ],
)
def test_a_damaged_calibration_is_told(tmp_path: Path, save: Save, content: str | dict[str, Any]) -> None:
    save(tmp_path / "step_7")
    checkpoint = open_checkpoint(tmp_path / "step_7")
    path = write_halting_calibration(checkpoint, CALIBRATION)
    if isinstance(content, str):
        path.write_bytes(content.encode("latin-1"))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **content}))
    with pytest.raises(UsageError, match=r"step_7/halting\.json.*delete the file"):
        load_model(checkpoint, checkpoint.config)


def test_a_calibration_of_another_format_is_told_and_notes_for_people_may_be_anything(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "step_7")
    checkpoint = open_checkpoint(tmp_path / "step_7")
    path = write_halting_calibration(checkpoint, CALIBRATION)
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "measured": ["by hand", None]}))
    assert read_halting_calibration(checkpoint) == CALIBRATION
    for other in ({**values, "format_version": 2}, {key: value for key, value in values.items() if key != "format_version"}):
        path.write_text(json.dumps(other))
        with pytest.raises(UsageError, match=r"no halting calibration of format 1: format_version .*delete the file"):
            read_halting_calibration(checkpoint)


def test_a_failure_leaves_the_calibration_that_was_there(tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "step_7")
    checkpoint = open_checkpoint(tmp_path / "step_7")
    write_halting_calibration(checkpoint, CALIBRATION)
    files = sorted((tmp_path / "step_7").iterdir())

    def full(_: int) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr("artifacts.files.os.fsync", full)
    with pytest.raises(UsageError, match=r"can't be written: .*no space left"):
        write_halting_calibration(checkpoint, HaltingCalibration((1.0,) * 4, (0.0,) * 4))
    assert read_halting_calibration(checkpoint) == CALIBRATION
    assert sorted((tmp_path / "step_7").iterdir()) == files


def test_a_model_card_needs_no_report_of_the_data(tmp_path: Path, save: Save) -> None:
    save(tmp_path / "run/step_7")
    card = model_card(open_checkpoint(tmp_path / "run/step_7"), "MIT")
    assert "## Data" in card and "7 optimizer steps" in card
