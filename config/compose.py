"""From Hydra and command lines to a checked config. For doors, scripts and benchmarks only: rooms get the result."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, OmegaConfBaseException
from pydantic import BaseModel

from config.errors import UsageError
from config.schema import Config, GenerationConfig, PretrainInstructConfig, TrainingConfig, no_such_key, parse_as, parse_config

CONFIG_FOLDER = Path(__file__).resolve().parent
CHECKPOINT_HELP = "folder checkpoints/<project>/<run>, whose newest checkpoint is taken, or a step_<N> in it"


def checked(settings: DictConfig, kind: type[Config]) -> Config:
    """Resolve interpolations and check against the schema of `kind`."""
    try:
        values = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration can't be resolved: {_first_line(error)}") from None
    assert isinstance(values, dict)
    # The experiment group only names a preset; what it sets stands in the other keys.
    return parse_as(kind, {str(key): value for key, value in values.items() if key != "experiment"})


def without_needless_plus(overrides: Sequence[str], kind: type[TrainingConfig]) -> list[str]:
    """Hydra overrides with `+key=value` as `key=value` where a config of `kind` has the key, which Hydra would refuse.

    The original's commands say `+run_name=...`, a key that its config file doesn't have.
    """
    known = {*kind.model_fields, "experiment"}
    return [text[1:] if re.match(r"\+\w", text) and re.split(r"[.=@]", text[1:])[0] in known else text for text in overrides]


def compose_config(name: str, overrides: Sequence[str] = ()) -> PretrainInstructConfig:
    """`compose_as` for an instruction run."""
    return compose_as(PretrainInstructConfig, name, overrides)


def compose_as(kind: type[Config], name: str, overrides: Sequence[str] = ()) -> Config:
    """The config `name` of this folder with Hydra overrides. Raises UsageError for an unknown name or a wrong override."""
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return checked(compose(name, overrides=without_needless_plus(overrides, kind)), kind)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        unknown = re.match(r"Could not override '([\w.]+)'", str(error))
        problem = no_such_key(unknown[1].split("."), kind) if unknown else _first_line(error)
        raise UsageError(f"config {name!r} can't be composed: {problem}") from None


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides on top. Raises UsageError for a key that doesn't exist or a value that doesn't fit."""
    settings = OmegaConf.create(config.model_dump())
    OmegaConf.set_struct(settings, True)
    _open_tables(settings, config)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"override {override!r}: expected key=value")
        try:
            OmegaConf.update(settings, key, _scalar(value), merge=True, force_add=False)
        except ConfigAttributeError:
            raise UsageError(f"override {override!r}: {no_such_key(key.split('.'), type(config))}") from None
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UsageError(f"override {override!r}: {_first_line(error)}") from None
    return checked(settings, type(config))


def _open_tables(settings: DictConfig, section: BaseModel) -> None:
    """Let overrides add keys where the schema has a table of any, such as dataset.fields; the schema checks them."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, dict):
            OmegaConf.set_struct(settings[name], False)
        elif isinstance(value, BaseModel):
            _open_tables(settings[name], value)


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every door which uses a checkpoint has."""
    parser.add_argument("--checkpoint", type=Path, required=True, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--config-name", help="take all settings but the architecture's from this config instead of the checkpoint's"
    )
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the checkpoint's")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every door which uses a language model has."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--tokenizer-path", help="must be the tokenizer of the checkpoint, which is the default")
    parser.add_argument("--act-steps", type=int, help="ACT steps a token takes; default: generation.act_steps, else all")
    parser.add_argument("--halt-threshold", type=float, help="a token stops early when its halting probability passes this")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of doors that generate: each sets the key generation.* of its name, and defaults to it."""
    add = parser.add_argument
    add("--max-output-tokens", type=int, metavar="N", help="longest answer; default: half of dataset.seq_len")
    add("--temperature", type=float, help="0: always the most probable token; above: draw, the flatter the higher")
    add("--top-k", type=int, metavar="K", help="draw among the K most probable tokens only")
    add("--top-p", type=float, metavar="P", help="draw among the fewest tokens that together have this probability")
    add("--min-p", type=float, metavar="P", help="draw among tokens of at least this share of the most probable one's probability")
    add("--repetition-penalty", type=float, help="above 1: makes tokens less probable that were there before")
    add("--seed", type=int, help="seed of the draws")
    add("--stop", action="append", metavar="TEXT", help="the answer ends before this text; may be given again")


def settings_of_checkpoint(trained: Config, arguments: argparse.Namespace) -> Config:
    """The settings a checkpoint is used with: its own, then `--config-name`, then `--overrides`."""
    config = trained
    if arguments.config_name is not None:
        config = compose_as(type(trained), arguments.config_name).model_copy(update={"arch": trained.arch})
    return override_config(config, arguments.overrides)


def settings_for_use(trained: PretrainInstructConfig, arguments: argparse.Namespace) -> PretrainInstructConfig:
    """The settings a language model is used with: `settings_of_checkpoint`, then single flags."""
    if any(override.startswith("dataset.tokenizer_path=") for override in arguments.overrides):
        raise UsageError("a checkpoint has its own tokenizer: use --tokenizer-path to check that a file is the same one")
    values = settings_of_checkpoint(trained, arguments).model_dump()
    # A flag named like a key generation.* sets it, as it stands: a text given to --stop may look like anything.
    flags = {key: value for key, value in vars(arguments).items() if key in GenerationConfig.model_fields and value is not None}
    return parse_config({**values, "generation": {**values["generation"], **flags}})


def _scalar(text: str) -> Any:
    return OmegaConf.from_dotlist([f"value={text}"])["value"]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
