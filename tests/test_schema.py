"""Wrong settings are told with their key, what was found, and what is meant (contract 8)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from config.errors import UsageError
from config.schema import OnResume, PretrainInstructConfig, SourceConfig, on_resume, parse_config
from config.schema.parsing import no_such_key

ConfigFactory = Callable[..., PretrainInstructConfig]


@pytest.fixture
def values(tiny_config: ConfigFactory) -> dict[str, Any]:
    return tiny_config().model_dump()


def put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    values[last] = value


def test_a_config_survives_its_own_dump(tiny_config: ConfigFactory, values: dict[str, Any]) -> None:
    assert parse_config(values) == tiny_config()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("arch.hiden_size", "arch.hiden_size: no such key, did you mean arch.hidden_size?"),
        ("global_batchsize", "global_batchsize: no such key, did you mean global_batch_size?"),
        ("arch.halt.bais", "arch.halt.bais: no such key, did you mean arch.halt.bias?"),
        ("dataset.zzz", "dataset.zzz: no such key"),
        ("dataset.SEED", "dataset.SEED: no such key"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_one(values: dict[str, Any], key: str, expected: str) -> None:
    put(values, key, 3)
    with pytest.raises(UsageError) as error:
        parse_config(values)
    assert str(error.value).splitlines()[1:] == ["  " + expected]


def test_an_unknown_key_of_a_named_source_is_refused_with_its_own() -> None:
    told = no_such_key(("sources", "mine", "data_dirr"), PretrainInstructConfig)
    assert told == "sources.mine.data_dirr: no such key, did you mean sources.mine.data_dir?"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("arch.hidden_size", None),
        ("arch.hidden_size", 0),
        ("arch.hidden_size", "big"),
        ("arch.hidden_size", 16.5),
        ("arch.loss", "hinge"),
        ("arch.halt", None),
        ("arch.halt", 3),
        ("dataset", "slimorca"),
        ("dataset.source", "orca"),
        ("dataset.long_rows", "wrap"),
        ("dataset.on_bad_row", "ignore"),
        ("dataset.processes", 0),
        ("dataset.test_ratio", 1.0),
        ("dataset.subset_size", -5),
        ("dataset.data_dir", None),
        ("dataset.data_dir", [7]),
        ("project_name", ""),
        ("epochs", 0),
        ("epochs", 1.5),
        ("eval_every_steps", 0),
        ("eval_every_steps", "often"),
        ("max_steps", 0),
        ("max_minutes", 0),
        ("early_stopping.patience", 0),
        ("early_stopping.min_delta", -0.1),
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("dataloader_workers", -1),
        ("packing", "tight"),
        ("optimizer", "sgd"),
        ("muon_lr", 0),
        ("lr_schedule", "epoch"),
        ("generation.halt_threshold", 1.0),
        ("device", "tpu"),
    ],
)
def test_a_wrong_value_is_named_and_shown(values: dict[str, Any], key: str, wrong: Any) -> None:
    put(values, key, wrong)
    with pytest.raises(UsageError) as error:
        parse_config(values)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 1 and lines[0].startswith(f"  {key}: ") and lines[0].endswith(f"(found {wrong!r})")


def test_every_problem_is_told_at_once(values: dict[str, Any]) -> None:
    put(values, "lr", -1)
    put(values, "arch.namee", "trm")
    del values["epochs"]
    with pytest.raises(UsageError) as error:
        parse_config(values)
    told = {line.strip().split(":")[0] for line in str(error.value).splitlines()[1:]}
    assert told == {"lr", "arch.namee", "epochs"} and "epochs: missing" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch.attention": "prefix", "dataset.supervise": "all"}, "choose dataset.supervise=assistant or arch.attention=causal"),
        ({"arch.attention": "full"}, "choose causal or prefix"),
        ({"arch.grad_calls": 25}, "grad_calls 25 is more than the 24 level calls of 4 ACT steps"),
        ({"generation.act_steps": 5}, "generation.act_steps 5 is more than arch.halt_max_steps 4"),
        ({"arch.num_heads": 3}, "hidden_size 16 must be num_heads 3"),
        ({"arch.num_heads": 16}, "an even number"),
        ({"arch.num_heads": 17, "arch.pos_encodings": "none"}, "heads have 0 channels"),
        ({"arch.mlp_t": True}, "mlp_t lets every position see every other: choose attention=full"),
        ({"arch.pos_encodings": "learned"}, "pos_encodings=learned is for rows of one length: choose attention=full"),
        ({"arch.attention": "full", "arch.mlp_t": True, "arch.norm": "pre"}, "norm=pre has none of: choose norm=post"),
        ({"arch.puzzle_emb_len": 16}, "puzzle_emb_len 16 without a vector to fill it"),
        (
            {"arch.puzzle_emb_ndim": 33, "arch.puzzle_emb_len": 2},
            "puzzle_emb_ndim 33 doesn't fit into puzzle_emb_len 2 positions of 16",
        ),
        ({"arch.puzzle_emb_ndim": 16}, "arch.puzzle_emb_ndim=16 is for puzzles"),
        ({"arch.no_ACT_continue": False}, "arch.no_ACT_continue=False is for puzzles"),
        ({"arch.halt_exploration_prob": 0.1}, "arch.halt_exploration_prob=0.1 is for puzzles"),
        ({"arch.act_enabled": False}, "arch.act_enabled=False is for puzzles"),
        ({"arch.act_inference": True}, "arch.act_inference=True is for puzzles"),
        ({"arch.H_layers": 2}, "H_layers 2 means nothing to trm: set it to 0"),
        ({"arch.L_layers": 0}, "L_layers must be at least 1 for trm"),
        ({"arch.L_cycles": 0}, "L_cycles must be at least 1 for trm"),
        ({"arch.name": "trm_hier6", "arch.L_cycles": 7}, "trm_hier6 has a state for each of at most 6 L calls"),
        ({"arch.name": "hrm"}, "H_layers must be at least 1 for hrm"),
        (
            {"arch.name": "transformers_baseline", "arch.H_layers": 2, "arch.L_layers": 0},
            "L_cycles 2 means nothing to transformers_baseline: set it to 0",
        ),
        (
            {"arch.name": "transformers_baseline", "arch.H_layers": 2, "arch.L_layers": 0, "arch.L_cycles": 0},
            "H_cycles 2: transformers_baseline passes its blocks once per ACT step",
        ),
    ],
)
def test_combinations_that_cannot_be_right_are_refused_with_a_reason(
    values: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    for key, value in changes.items():
        put(values, key, value)
    with pytest.raises(UsageError) as error:
        parse_config(values)
    lines = str(error.value).splitlines()
    assert len(lines) == 2 and reason in lines[1] and "found {" not in lines[1]


@pytest.mark.parametrize(("key", "value"), [("arch.grad_calls", 24), ("generation.act_steps", 4), ("dataset.subset_size", None)])
def test_limits_themselves_are_allowed(values: dict[str, Any], key: str, value: Any) -> None:
    put(values, key, value)
    parse_config(values)


def with_stages(values: dict[str, Any], *stages: dict[str, Any], **sources: str) -> dict[str, Any]:
    section = {name: values["dataset"][name] for name in SourceConfig.model_fields}
    return {**values, "stages": stages, "sources": {name: {**section, "source": source} for name, source in sources.items()}}


def test_stages_have_a_length_and_shares(values: dict[str, Any]) -> None:
    stages: list[dict[str, Any]] = [
        {"mix": {"a": 1}, "epochs": 2},
        {"mix": {"a": None, "b": None}, "examples": 30},
        {"mix": {"b": 0.5, "a": 3}, "epochs": 1},
    ]
    config = parse_config(with_stages(values, *stages, a="slimorca", b="openorca"))
    assert [stage.model_dump(exclude_none=True)["mix"] for stage in config.stages[::2]] == [{"a": 1.0}, {"b": 0.5, "a": 3.0}]
    assert parse_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ({"mix": {"a": 1, "b": 1}}, "either epochs or examples"),
        ({"mix": {"a": 1, "b": 1}, "epochs": 1, "examples": 3}, "either epochs or examples"),
        ({"mix": {"a": 1, "b": None}, "epochs": 1}, "a weight for each of its sources, or null for each"),
        ({"mix": {"a": 1, "b": 0}, "epochs": 1}, "greater than 0"),
        ({"mix": {}, "epochs": 1}, "at least 1"),
        ({"mix": {"a": 1}, "epochs": 1}, "both must have the same names"),
        ({"mix": {"a": 1, "b": 1, "c": 1}, "epochs": 1}, "both must have the same names"),
    ],
)
def test_stages_that_can_not_be_are_refused(values: dict[str, Any], stage: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse_config(with_stages(values, stage, a="slimorca", b="slimorca"))


def test_stages_leave_no_epochs_and_no_other_split(values: dict[str, Any]) -> None:
    stage = {"mix": {"a": 1}, "epochs": 1}
    with pytest.raises(UsageError, match="give each stage its own"):
        parse_config(with_stages({**values, "epochs": 2}, stage, a="slimorca"))
    with pytest.raises(UsageError, match="its builder made its split"):
        parse_config(with_stages(values, stage, a="sample"))


def test_packing_may_be_written_as_yaml_reads_it(values: dict[str, Any]) -> None:
    assert parse_config({**values, "packing": False}).packing == parse_config({**values, "packing": "off"}).packing == "off"


def test_a_config_cannot_be_changed_behind_its_check(tiny_config: ConfigFactory) -> None:
    with pytest.raises(ValueError, match="frozen"):
        tiny_config().arch.hidden_size = 3


def test_every_knob_is_explained() -> None:
    def fields(section: type[BaseModel], path: str) -> list[str]:
        missing = []
        for name, field in section.model_fields.items():
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                assert inner.__doc__
                missing += fields(inner, f"{path}{name}.")
            elif not field.description:
                missing.append(path + name)
        return missing

    assert fields(PretrainInstructConfig, "") == []


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("run_name", 12345, "12345"),
        ("run_name", 1.5, "1.5"),
        ("run_name", True, "true"),
        ("dataset.sha256", {"a": 12}, {"a": "12"}),
        ("generation.stop", "x", ["x"]),
        ("generation.stop", [1, False, "x"], ["1", "false", "x"]),
        ("generation.stop", 7, ["7"]),
    ],
)
def test_yaml_may_give_text_another_type(values: dict[str, Any], key: str, value: Any, expected: Any) -> None:
    put(values, key, value)
    found = parse_config(values).model_dump()
    for part in key.split("."):
        found = found[part]
    assert found == expected


def test_choices_and_numbers_are_not_taken_for_text(values: dict[str, Any]) -> None:
    for key, value in (("arch.name", True), ("lr", [1]), ("resume", {"a": 1})):
        wrong = copy.deepcopy(values)
        put(wrong, key, value)
        with pytest.raises(UsageError, match=key):
            parse_config(wrong)


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("seed", OnResume.FIXED),
        ("arch.hidden_size", OnResume.FIXED),
        ("arch.halt.bias", OnResume.REPORTED),
        ("lr", OnResume.REPORTED),
        ("dataset.source", OnResume.REPORTED),
        ("arch.activation_checkpointing", OnResume.FREE),
        ("checkpoint.keep_last", OnResume.FREE),
        ("dataset.sha256.rows.jsonl", OnResume.FREE),
        ("sources.mine.data_dir", OnResume.FREE),
        ("sources.mine.subset_size", OnResume.REPORTED),
    ],
)
def test_a_field_says_what_it_means_to_a_resumed_run(key: str, meaning: OnResume) -> None:
    assert on_resume(key, PretrainInstructConfig) is meaning


def test_a_new_field_is_reported_whatever_its_name_begins_with() -> None:
    class Later(PretrainInstructConfig):
        eval_more: int
        plot_of_weights: bool

    assert {on_resume(key, Later) for key in ("eval_more", "plot_of_weights")} == {OnResume.REPORTED}
