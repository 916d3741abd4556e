"""Settings that were saved by an earlier version open, with the meaning they had.

tests/golden/config_*.yaml were saved in November 2026. They stay as they are; those of a later version are added beside them.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

import config.upgrade
from config.compose import compose_as, compose_config
from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, TrainingConfig, parse_as, parse_config
from config.upgrade import upgraded

GOLDEN = Path(__file__).parent / "golden"
KINDS: dict[str, type[TrainingConfig]] = {
    "config_instruct": PretrainInstructConfig,
    "config_stages": PretrainInstructConfig,
    "config_puzzles": PretrainPuzzleConfig,
}


def saved(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text())
    return settings


def value_of(settings: dict[str, Any], key: str) -> Any:
    """... where there is none."""
    first, _, rest = key.partition(".")
    value = settings.get(first, ...)
    return value_of(value, rest) if rest and isinstance(value, dict) else value


@pytest.mark.parametrize("name", KINDS)
def test_settings_of_earlier_versions_open(name: str) -> None:
    settings = saved(name)
    before = yaml.safe_dump(settings)
    found, dropped = upgraded(settings)
    opened = parse_as(KINDS[name], found).model_dump()
    assert yaml.safe_dump(settings) == before, "what was given isn't changed"
    removed = {key for key, as_now in config.upgrade.REMOVED.items() if value_of(settings, key) not in (..., as_now)}
    assert {line.partition("=")[0] for line in dropped} == removed and len(dropped) == len(removed)
    # Where a key is still there, it says what it said.
    for now, then in ((opened["arch"], settings["arch"]), (opened["arch"]["halt"], settings["arch"]["halt"])):
        same = {key: value for key, value in then.items() if key in now and key != "halt"}
        assert {key: now[key] for key in same} == same and len(same) >= 2
    assert (opened["run_name"], opened["lr"], opened["seed"]) == ("old", settings["lr"], 0)
    assert opened["optimizer"] == "adam_atan2", "what there was before there was a choice"
    if name == "config_stages":
        assert opened["dataset"]["seq_len"] == 256 and set(opened["sources"]) == {"slimorca", "openorca"}


def test_settings_of_this_version_stay_as_they_are() -> None:
    for composed in (
        compose_config("cfg_pretrain_instruct", ["arch=hrm", "experiment=slimorca_then_openorca"]),
        compose_as(PretrainPuzzleConfig, "cfg_pretrain", ["experiment=sudoku_mlp"]),
    ):
        settings = composed.model_dump()
        assert upgraded(settings) == (settings, [])


def without_each_key(settings: dict[str, Any], section: type[BaseModel]) -> Any:
    """The settings as they would be if a key weren't there yet, for each key that ships with a value."""
    for key, field in section.model_fields.items():
        value = settings.get(key)
        if isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for name, rest in without_each_key(value, field.annotation):
                yield f"{key}.{name}", {**settings, key: rest}
        yield key, {name: value for name, value in settings.items() if name != key}


# What a recursion is, what is read, and what Hydra takes from the environment or another key was never left out.
NEVER_NEW = ("arch", "arch.name", "arch.puzzle_emb_ndim", "dataset", "dataset.source", "dataset.tokenizer_path", "data_paths")


@pytest.mark.parametrize(
    "shipped",
    [
        compose_config("cfg_pretrain_instruct", ["arch=hrm", "dataset=jsonl"]),
        compose_as(PretrainPuzzleConfig, "cfg_pretrain", ["arch=transformers_baseline"]),
    ],
    ids=["instruct", "puzzles"],
)
def test_any_key_that_is_not_there_yet_has_the_shipped_default(shipped: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hydra composes it, found by plain reading."""
    monkeypatch.setattr(config.upgrade, "BEFORE", {})
    tried = 0
    for key, settings in without_each_key(shipped.model_dump(), type(shipped)):
        if key not in NEVER_NEW:
            tried += 1
            assert parse_as(type(shipped), upgraded(settings)[0]) == shipped, key
    assert tried > 60


def test_a_source_lacks_keys_as_a_dataset_does() -> None:
    settings = compose_config("cfg_pretrain_instruct", ["experiment=slimorca_then_openorca"]).model_dump()
    expected = parse_config(settings)
    for source in settings["sources"].values():
        del source["fields"], source["validation_split"]
    assert parse_config(upgraded(settings)[0]) == expected


def test_renamed_keys_keep_their_values_and_removed_ones_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "dataset.folder": "dataset.data_dir",
        "arch.halt.reaches_recursion": "arch.halt.backprop",
        "learning_rate": "lr",
        "dataset.files": "gone",
    }
    monkeypatch.setattr(config.upgrade, "RENAMED", names)
    monkeypatch.setattr(config.upgrade, "REMOVED", {"packed": ..., "dataset.shuffle": ..., "silent": 4})
    monkeypatch.setattr(config.upgrade, "BEFORE", {"packing": "packed", "arch.halt.bias": -2.0, "dataset.on_bad_row": "skip"})
    new = compose_config("cfg_pretrain_instruct", ["experiment=slimorca_then_openorca"])
    old = new.model_dump()
    for section in (old["dataset"], *old["sources"].values()):
        section["folder"] = section.pop("data_dir")
        section["shuffle"] = True
    old["arch"]["halt"]["reaches_recursion"] = old["arch"]["halt"].pop("backprop")
    old["learning_rate"] = old.pop("lr")
    old["packed"], old["silent"] = 3, 4
    del old["packing"], old["arch"]["halt"]["bias"], old["dataset"]["on_bad_row"]
    settings, dropped = upgraded(old)
    found = parse_config(settings)
    assert (found.packing, found.arch.halt.bias, found.dataset.on_bad_row) == ("packed", -2.0, "skip")
    halt = found.arch.halt.model_copy(update={"bias": new.arch.halt.bias})
    shipped = {
        "packing": new.packing,
        "arch": found.arch.model_copy(update={"halt": halt}),
        "dataset": found.dataset.model_copy(update={"on_bad_row": new.dataset.on_bad_row}),
    }
    assert found.model_copy(update=shipped) == new
    sections = ("dataset", "sources.slimorca", "sources.openorca")
    assert dropped == ["packed=3", *(f"{section}.shuffle=True" for section in sections)]


def test_what_was_never_a_setting_is_left_to_the_schema() -> None:
    settings = saved("config_instruct")
    settings["nonsense"] = settings[7] = 1
    settings["dataset"]["source"] = settings["arch"]["name"] = "../../tests/golden/config_puzzles"
    settings["sources"] = {"a": 3}
    found, dropped = upgraded(settings)
    assert found["nonsense"] == found[7] == 1 and found["sources"] == {"a": 3}
    assert not any(key in line for line in dropped for key in ("nonsense", "7", "source"))
    assert "data_paths" not in found["dataset"] and "data_paths" not in found["arch"]
