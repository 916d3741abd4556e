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

from config.errors import UsageError
from config.schema import GenerationConfig, PretrainInstructConfig, no_such_key, parse_config

CONFIG_FOLDER = Path(__file__).resolve().parent


def checked(settings: DictConfig) -> PretrainInstructConfig:
    """Resolve interpolations and check against the schema."""
    try:
        values = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration can't be resolved: {_first_line(error)}") from None
    assert isinstance(values, dict)
    # The experiment group only names a preset; what it sets stands in the other keys.
    return parse_config({str(key): value for key, value in values.items() if key != "experiment"})


def compose_config(name: str, overrides: Sequence[str] = ()) -> PretrainInstructConfig:
    """The config `name` of this folder with Hydra overrides. Raises UsageError for an unknown name or a wrong override."""
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return checked(compose(name, overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        unknown = re.match(r"Could not override '([\w.]+)'", str(error))
        problem = no_such_key(unknown[1].split(".")) if unknown else _first_line(error)
        raise UsageError(f"config {name!r} can't be composed: {problem}") from None


def override_config(config: PretrainInstructConfig, overrides: Sequence[str]) -> PretrainInstructConfig:
    """`config` with `key=value` overrides on top. Raises UsageError for a key that doesn't exist or a value that doesn't fit."""
    settings = OmegaConf.create(config.model_dump())
    OmegaConf.set_struct(settings, True)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"override {override!r}: expected key=value")
        try:
            OmegaConf.update(settings, key, _scalar(value), merge=True, force_add=False)
        except ConfigAttributeError:
            raise UsageError(f"override {override!r}: {no_such_key(key.split('.'))}") from None
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise UsageError(f"override {override!r}: {_first_line(error)}") from None
    return checked(settings)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every door which uses a checkpoint has."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder checkpoints/<project>/<run>/step_<N>")
    parser.add_argument(
        "--config-name", help="take all settings but the architecture's from this config instead of the checkpoint's"
    )
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the checkpoint's")
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


def settings_for_use(trained: PretrainInstructConfig, arguments: argparse.Namespace) -> PretrainInstructConfig:
    """The settings a checkpoint is used with: its own, then `--config-name`, then `--overrides`, then single flags."""
    if any(override.startswith("dataset.tokenizer_path=") for override in arguments.overrides):
        raise UsageError("a checkpoint has its own tokenizer: use --tokenizer-path to check that a file is the same one")
    config = trained
    if arguments.config_name is not None:
        config = compose_config(arguments.config_name).model_copy(update={"arch": trained.arch})
    values = override_config(config, arguments.overrides).model_dump()
    # A flag named like a key generation.* sets it, as it stands: a text given to --stop may look like anything.
    flags = {key: value for key, value in vars(arguments).items() if key in GenerationConfig.model_fields and value is not None}
    return parse_config({**values, "generation": {**values["generation"], **flags}})


def _scalar(text: str) -> Any:
    return OmegaConf.from_dotlist([f"value={text}"])["value"]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
