"""Every YAML file gives a valid config; overrides and flags go on top; mistakes are one message."""

import argparse
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from config.compose import (
    CONFIG_FOLDER,
    add_model_arguments,
    add_sampling_arguments,
    compose_as,
    compose_config,
    explain_error,
    override_config,
    plain_overrides,
    settings_for_use,
)
from config.errors import UsageError
from config.schema import ArchConfig, PretrainInstructConfig, PretrainPuzzleConfig, parse_config
from tests.puzzle_data import PUZZLE_PRESETS

MAIN = "cfg_pretrain_instruct"
PLAIN = compose_config(MAIN)


def choices(group: str) -> list[str]:
    """Names of the group's files, of experiments those that are for instruction runs."""
    return sorted({path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")} - {*PUZZLE_PRESETS})


@pytest.mark.parametrize(
    "overrides",
    [
        ["dataset.sha256={a.parquet: abc, b: def}"],
        ["dataset.sha256={a.parquet: abc}", "dataset.sha256={b: def}"],
        ["dataset.sha256={a.parquet: abc}", "dataset.sha256.b=def"],
    ],
)
def test_tables_take_names_of_the_users_own(overrides: list[str]) -> None:
    expected = {"a.parquet": "abc", "b": "def"}
    assert compose_config(MAIN, overrides).dataset.sha256 == expected
    assert override_config(compose_config(MAIN), overrides).dataset.sha256 == expected
    fields = ["dataset.fields.prompt=pregunta", "dataset.fields.response=respuesta"]
    assert compose_config(MAIN, fields).dataset.fields == {"prompt": "pregunta", "response": "respuesta"}


@pytest.mark.parametrize("preset", [f"{group}={name}" for group in ("arch", "dataset", "experiment") for name in choices(group)])
def test_every_preset_composes(preset: str) -> None:
    assert isinstance(compose_config(MAIN, [preset]), PretrainInstructConfig)


@pytest.mark.parametrize("preset", [*(f"arch={name}" for name in choices("arch")), *(f"experiment={p}" for p in PUZZLE_PRESETS)])
def test_every_preset_for_puzzles_composes(preset: str) -> None:
    assert isinstance(compose_as(PretrainPuzzleConfig, "cfg_pretrain", [preset]), PretrainPuzzleConfig)


@pytest.mark.parametrize("experiment", choices("experiment"))
@pytest.mark.parametrize("dataset", choices("dataset"))
def test_every_experiment_composes_with_every_data_set(experiment: str, dataset: str) -> None:
    compose_config(MAIN, [f"experiment={experiment}", f"dataset={dataset}"])


def test_the_defaults_are_those_of_the_instruction_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLAMA_TOKENIZER", raising=False)
    config = compose_config(MAIN)
    assert (config.arch.name, config.arch.puzzle_emb_ndim, config.arch.puzzle_emb_len) == ("looped", 0, 0)
    assert (config.arch.L_layers, config.arch.num_level_calls, config.arch.halt_max_steps, config.arch.grad_calls) == (
        2,
        1,
        2,
        "all",
    )
    data = config.dataset
    assert (data.data_dir, data.subset_size, data.seq_len, data.test_ratio, data.seed) == ("data/slimorca", 1000, 512, 0.05, 0)
    assert data.tokenizer_path == "tokenizers/llama-32k/tokenizer.model"
    assert (config.global_batch_size, config.epochs, config.eval_interval) == (32, 1, 1)
    assert (config.optimizer, config.lr, config.muon_lr) == ("muon", 1.2e-3, 5e-3)
    assert (config.lr_min_ratio, config.lr_warmup_steps, config.weight_decay) == (0.1, 100, 0.1)
    assert (config.beta1, config.beta2, config.ema, config.ema_rate, config.dataloader_workers) == (0.9, 0.95, False, 0.999, 2)
    assert config.project_name == "SlimOrca-ACT" and config.run_name is None
    assert config.arch.halt.bias == -1.0 and not config.arch.halt.backprop


@pytest.mark.parametrize(
    ("name", "layers", "cycles", "heads", "prefix_len", "compares"),
    [
        ("looped", (0, 2), (1, 0), 8, 16, False),
        ("trm", (0, 2), (3, 6), 8, 16, False),
        ("trm_singlez", (0, 2), (3, 6), 8, 16, False),
        ("trm_hier6", (0, 2), (3, 6), 8, 16, False),
        ("hrm", (4, 4), (2, 2), 8, 1, True),
        ("transformers_baseline", (8, 0), (1, 0), 12, 1, True),
    ],
)
def test_an_architecture_by_itself_is_the_originals_for_puzzles(
    name: str, layers: tuple[int, int], cycles: tuple[int, int], heads: int, prefix_len: int, compares: bool
) -> None:
    with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
        values = OmegaConf.to_container(compose(f"arch/{name}").arch, resolve=True)
    arch = ArchConfig.model_validate(values)
    assert (arch.name, arch.hidden_size, arch.num_heads, arch.expansion) == (name, 512, heads, 4)
    assert ((arch.H_layers, arch.L_layers), (arch.H_cycles, arch.L_cycles)) == (layers, cycles)
    assert (arch.puzzle_emb_ndim, arch.prefix_len, arch.no_ACT_continue) == (512, prefix_len, not compares)
    assert (arch.attention, arch.pos_encodings, arch.mlp_t, arch.loss) == ("full", "rope", False, "stablemax")
    assert (arch.halt_max_steps, arch.halt_exploration_prob, arch.act_enabled, arch.act_inference) == (16, 0.1, True, False)
    assert (arch.halt.bias, arch.halt.backprop) == (-5.0, True)


def test_the_environment_names_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_TOKENIZER", "/somewhere/tokenizer.model")
    assert compose_config(MAIN).dataset.tokenizer_path == "/somewhere/tokenizer.model"
    assert compose_config(MAIN, ["dataset=sample"]).dataset.tokenizer_path == "/somewhere/tokenizer.model"


def test_overrides_of_a_command_line_are_parsed() -> None:
    config = compose_config(
        MAIN, ["dataset.subset_size=null", "lr=3e-4", "ema=true", "run_name='a=b c'", "arch.halt.backprop=true"]
    )
    assert (config.dataset.subset_size, config.lr, config.ema, config.run_name) == (None, 3e-4, True, "a=b c")
    assert config.arch.halt.backprop and config.arch.halt.bias == -1.0


# What is typed for a key of text, and what becomes of it.
TEXTS = {
    "12345": "12345",
    "007": "007",
    "1e5": "1e5",
    "0x10": "0x10",
    "2_000": "2_000",
    "-1.50": "-1.50",
    "on": "on",
    "true": "true",
    "2026-01-01": "2026-01-01",
    "'null'": "null",
    "null": None,
    "": "",
    "'quoted'": "quoted",
    '"1e5"': "1e5",
    "it's": "it's",
    "a\\": "a\\",
    "a: b (c), {d}": "a: b (c), {d}",
    "a,b": "a,b",
    "lr${lr}": "lr0.0012",
}


@pytest.mark.parametrize("typed", TEXTS)
def test_what_is_typed_for_text_is_text(typed: str) -> None:
    override = f"run_name={typed}"
    assert compose_config(MAIN, [override]).run_name == override_config(PLAIN, [override]).run_name == TEXTS[typed]
    assert plain_overrides([f"+{override}"], PretrainInstructConfig) == plain_overrides([override], PretrainInstructConfig)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="$"), min_size=1))
def test_any_text_in_quotes_is_itself(text: str) -> None:
    [plain] = plain_overrides([f"project_name={QuotedString(text, Quote.single).with_quotes()}"], PretrainInstructConfig)
    assert OverridesParser.create().parse_override(plain).value() == text


@pytest.mark.parametrize(
    ("overrides", "key", "expected"),
    [
        (["project_name=2026"], "project_name", "2026"),
        (["project_name=null"], "project_name", "null"),
        (["dataset.revision=1234567"], "dataset.revision", "1234567"),
        (["dataset.hub_revision=1234567"], "dataset.revision", "1234567"),
        (["dataset={revision: 1234567}"], "dataset.revision", "1234567"),
        (["dataset=jsonl", "dataset.files=my.jsonl"], "dataset.files", ("my.jsonl",)),
        (["dataset=jsonl", "dataset.files=7"], "dataset.files", ("7",)),
        (["dataset=jsonl", "dataset.files=[007,1e5,true,'a,b',c d.jsonl,e(1).jsonl]"], "dataset.files",
         ("007", "1e5", "true", "a,b", "c d.jsonl", "e(1).jsonl")),
        (["dataset=jsonl", "dataset.files=~/a.jsonl"], "dataset.files", ("/home/me/a.jsonl",)),
        (["dataset.data_dir=~/data"], "dataset.data_dir", "/home/me/data"),
        (["dataset.tokenizer_path=~/t.model"], "dataset.tokenizer_path", "/home/me/t.model"),
        (["checkpoint_dir=~"], "checkpoint_dir", "/home/me"),
        (["resume=~/run"], "resume", "/home/me/run"),
        (["load_checkpoint=~/run"], "load_checkpoint", "/home/me/run"),
        (["run_name=a~b"], "run_name", "a~b"),
    ],
)  # fmt: skip
def test_text_lists_and_paths_are_forgiven(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], key: str, expected: object
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    values: object = compose_config(MAIN, overrides)
    for part in key.split("."):
        values = getattr(values, part)
    assert values == expected


def test_lists_of_puzzle_runs_take_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["data_paths=~/arc", "data_paths_test=[~/a,2]", "eval_save_outputs=preds", "evaluators=[]"]
    config = compose_as(PretrainPuzzleConfig, "cfg_pretrain", overrides)
    assert (config.data_paths, config.data_paths_test) == (("/home/me/arc",), ("/home/me/a", "2"))
    assert config.eval_save_outputs == ("preds",)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (r"\n", ["\n"]),
        (r"'\n'", ["\n"]),
        (r'"\n"', ["\n"]),
        (r"[\n]", ["\n"]),
        (r"['\n']", ["\n"]),
        (r'["\n", "a\tb", \r\n]', ["\n", "a\tb", "\r\n"]),
        ("'\n'", ["\n"]),
        ("[\n,x]", ["\n", "x"]),
        (r"[\\n,'\\n']", [r"\n", r"\n"]),
        (r"[\d]", [r"\d"]),
        ("[1,</s>]", ["1", "</s>"]),
        ("[]", []),
    ],
)
def test_a_stop_text_may_have_escapes(typed: str, expected: list[str]) -> None:
    override = f"generation.stop={typed}"
    config = compose_config(MAIN, [override])
    assert config.generation.stop == override_config(PLAIN, [override]).generation.stop == expected
    assert parse_config(config.model_dump()) == config, "nothing is read as an escape twice"


def test_values_of_a_sweep_stay_apart_and_are_text() -> None:
    swept = ["run_name=007,1e5,a b,'c,d'", "run_name=choice(1,2)", "dataset.files=a,1", "lr=1e-3,1e-4"]
    assert plain_overrides(swept, PretrainInstructConfig, is_sweep=True) == [
        "run_name=007,'1e5',a b,'c,d'",
        "run_name=choice(1,2)",
        "dataset.files=a,'1'",
        "lr=1e-3,1e-4",
    ]


def test_a_preset_with_the_old_name_of_a_group_gets_the_new_one() -> None:
    message = explain_error(MissingConfigException("Could not find 'source/jsonl'", "source/jsonl", []))
    assert message == "source=jsonl: this group is now called dataset, write /dataset@sources.NAME: jsonl"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["arch.hiden_size=3"], "arch.hiden_size: no such key, did you mean arch.hidden_size?"),
        (["+arch.hiden_size=3"], "arch.hiden_size: no such key, did you mean arch.hidden_size?"),
        (["lrr=3"], "lrr: no such key, did you mean lr?"),
        (["arhc.hidden_size=3"], "arhc.hidden_size: no such key, did you mean arch.hidden_size?"),
        (["hidden_size=3"], "hidden_size: no such key, did you mean arch.hidden_size?"),
        (["seq_len=3"], "seq_len: no such key, did you mean dataset.seq_len?"),
        (["experimnt=quickstart"], "experimnt: no such key, did you mean experiment?"),
        (
            ["checkpoint_path=a"],
            "checkpoint_path: no such key here, the folder of a run is <checkpoint_dir>/<project_name>/",
        ),
        (["dataset=nope"], "dataset/nope"),
        (["arch=trn"], "did you mean trm? There are hrm, looped, transformers_baseline, trm"),
        (["experiment=quickstrat"], "did you mean quickstart?"),
        (["lr=1,2"], "'lr=1,2' has several values: write a list as key=[a,b]"),
        (["dataset.files=[a"], "'dataset.files=[a': expected key=value; no viable alternative"),
        (["arch=null"], "must be a string"),
        (["nonsense"], "nonsense"),
        (["seed=["], "no viable alternative"),
        (["run_name=${nothing}"], "nothing"),
        (["arch.grad_calls=85"], "grad_calls 85"),
        (["arch.attention=full"], "choose causal or prefix"),
    ],
)
def test_a_wrong_override_is_one_clear_message(overrides: list[str], told: str) -> None:
    with pytest.raises(UsageError) as error:
        compose_config(MAIN, overrides)
    assert told in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_an_unknown_config_is_named() -> None:
    with pytest.raises(UsageError, match="cfg_nope"):
        compose_config("cfg_nope")


def test_overriding_changes_what_is_named_and_nothing_else() -> None:
    config = compose_config(MAIN)
    changed = override_config(config, ["dataset.seq_len=64", "run_name=null", "lr=1e-3", "arch.halt={bias: -3}"])
    assert (changed.dataset.seq_len, changed.lr, changed.arch.halt.bias) == (64, 1e-3, -3)
    expected = config.model_dump()
    expected["dataset"]["seq_len"], expected["lr"], expected["arch"]["halt"]["bias"] = 64, 1e-3, -3
    assert changed.model_dump() == expected
    assert override_config(config, []) == config


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("nonsense", "expected key=value"),
        ("arch.hiden_size=3", "arch.hiden_size: no such key, did you mean arch.hidden_size?"),
        ("lr.x=3", "lr.x: no such key"),
        ("=3", "no such key"),
        ("lr=1,2", "has several values"),
        ("+lrr=3", "expected key=value"),
        ("~lr", "expected key=value"),
        ("experiment=quickstart", "no such key"),
        ("seed=[", "seed=["),
        ("lr=abc", "lr: Input should be a valid number"),
        ("arch=null", "arch: Input should be a valid dictionary"),
        ("run_name=${nothing}", "nothing"),
    ],
)
def test_a_wrong_override_of_a_checkpoint_is_one_clear_message(override: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        override_config(PLAIN, [override])
    assert told in str(error.value)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    return parser.parse_args(["--checkpoint", "somewhere", *words])


def test_flags_go_over_overrides_and_those_over_the_checkpoint() -> None:
    trained = compose_config(MAIN, ["arch.hidden_size=64", "arch.halt_max_steps=6", "dataset=sample", "lr=0.5"])
    assert arguments().checkpoint == Path("somewhere")
    assert settings_for_use(trained, arguments()) == trained
    used = settings_for_use(
        trained, arguments("--overrides", "lr=0.25", "generation.act_steps=2", "--act-steps", "3", "--halt-threshold", "0.5")
    )
    assert (used.lr, used.generation.act_steps, used.generation.halt_threshold) == (0.25, 3, 0.5)
    assert used.arch == trained.arch and used.dataset == trained.dataset
    other = settings_for_use(trained, arguments("--config-name", MAIN))
    assert other.arch == trained.arch and other.dataset.source == "slimorca" and other.lr == 1.2e-3
    for wrong in ("--act-steps=7", "--act-steps=0", "--halt-threshold=1.5"):
        with pytest.raises(UsageError):
            settings_for_use(trained, arguments(wrong))


def test_flags_know_home_and_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = arguments("--tokenizer-path=~/t.model", "--checkpoint=~/run", "--stop", r"\n", "--stop", r"\\n")
    assert (given.checkpoint, given.tokenizer_path) == (Path("/home/me/run"), "/home/me/t.model")
    assert settings_for_use(compose_config(MAIN), given).generation.stop == ["\n", r"\n"]
    assert arguments("--checkpoint=~no_such_user/x").checkpoint == Path("~no_such_user/x")
