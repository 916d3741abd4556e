"""Turns settings that an earlier version saved with a checkpoint into today's. Knows no Hydra and no checkpoints.

A new key of the schema needs an entry here only if the program did something else before it had the key. A key that is renamed or
removed always needs one. tests/test_upgrade.py holds settings as they were once saved.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from config.schema import PretrainInstructConfig, PretrainPuzzleConfig, SourceConfig, TrainingConfig

_FOLDER = Path(__file__).resolve().parent
# A key of `dataset` stands for that of each of `sources`, too. It counts as renamed once the schema has only the new name.
RENAMED: dict[str, str] = {
    "dataset.hub_repo": "dataset.repo",
    "dataset.hub_revision": "dataset.revision",
    "dataset.hub_sha256": "dataset.sha256",
}
# Keys that mean nothing any more, with the value that did what is done now (...: there is none). Other values are reported.
REMOVED: dict[str, Any] = {
    # When a row left its slot, in which it stayed for several optimizer steps. Puzzles never read them.
    "act_steps_per_update": ...,
    **dict.fromkeys(
        (f"arch.halt.{key}" for key in ("mode", "depth_floor", "deepen_at", "settled_share", "settled_probability")), ...
    ),
    # Tokens drafted with few ACT steps and checked together: slower wherever code is compiled or on a GPU.
    "generation.draft_tokens": ...,
    "generation.draft_act_steps": ...,
    # ACT steps that grow in a run or are drawn, and losses that weigh more the deeper they are: behind in every table.
    "act_steps": "fixed",
    "grow_until": 0.6,
    "loss_discount": 1.0,
    # How puzzles' rows come to slots, which has one answer.
    "slots": ...,
}
# What the program did before it had a key, where the default is something else.
BEFORE: dict[str, Any] = {"eval_every_steps": None, "optimizer": "adam_atan2"}


def upgraded(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Saved settings with keys added that are new since then, and the keys that were removed, as key=value.

    A new key gets the value of BEFORE, else the default that the YAML files here have for this kind of run. Unknown keys stay: the
    schema refuses them.
    """
    values = copy.deepcopy(dict(settings))
    kind: type[TrainingConfig] = PretrainPuzzleConfig if "data_paths" in values else PretrainInstructConfig
    dropped: list[str] = []
    _upgrade(values, kind, shipped_settings(values), "", "", dropped)
    return values, dropped


def _upgrade(
    values: dict[str, Any], section: type[BaseModel], shipped: Mapping[str, Any], where: str, known_as: str, dropped: list[str]
) -> None:
    """where: prefix of the section's keys in messages; known_as: their prefix in the tables above."""
    for key in list(values):
        if key in section.model_fields:
            continue
        name = RENAMED.get(f"{known_as}{key}", "").rpartition(".")[2]
        if name in section.model_fields and name not in values:
            values[name] = values.pop(key)
        elif f"{known_as}{key}" in REMOVED:
            value = values.pop(key)
            if value != REMOVED[f"{known_as}{key}"]:
                dropped.append(f"{where}{key}={value}")
    for key, field in section.model_fields.items():
        if key not in values:
            default = BEFORE.get(known_as + key, shipped.get(key, ...))
            # Only Hydra can resolve an interpolation.
            if default is not ... and "${" not in str(default):
                values[key] = copy.deepcopy(default)
        elif key == "sources" and isinstance(values[key], dict):
            for name, source in values[key].items():
                if isinstance(source, dict):
                    _upgrade(source, SourceConfig, _shipped_source(source), f"{where}sources.{name}.", "dataset.", dropped)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and isinstance(values[key], dict):
            of_section = shipped.get(key)
            _upgrade(
                values[key],
                field.annotation,
                of_section if isinstance(of_section, Mapping) else {},
                f"{where}{key}.",
                f"{known_as}{key}.",
                dropped,
            )


def shipped_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that Hydra composes from the files here for this kind of run, its recursion and source, with `${...}` unresolved."""
    name = "cfg_pretrain" if "data_paths" in settings else "cfg_pretrain_instruct"
    shipped = _merged(_read(_FOLDER, "cfg_training"), _read(_FOLDER, name))
    shipped["dataset"] = _merged(_section(shipped, "dataset"), _shipped_source(_section(settings, "dataset")))
    arch = _merged(_read(_FOLDER / "arch", "trm"), _read(_FOLDER / "arch", _section(settings, "arch").get("name")))
    shipped["arch"] = _merged(arch, _section(shipped, "arch"))
    return shipped


def _shipped_source(source: Mapping[str, Any]) -> dict[str, Any]:
    return _merged(_read(_FOLDER / "dataset", "jsonl"), _read(_FOLDER / "dataset", source.get("source")))


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key)
    return section if isinstance(section, Mapping) else {}


def _read(folder: Path, name: object) -> dict[str, Any]:
    """The YAML file of that name in `folder`; empty if there is none, as for the name in a damaged file."""
    path = folder / f"{name}.yaml"
    if path.parent != folder or not path.is_file():
        return {}
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted keys, with lists as YAML reads them back."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found
