"""From Hydra and command lines to a checked config. For scripts and benchmarks only: packages get the result."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, OverrideType, Quote, QuotedString, Sweep
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.errors import UsageError
from config.schema import (
    Config,
    GenerationConfig,
    PretrainInstructConfig,
    TextType,
    TrainingConfig,
    no_such_key,
    parse_as,
    parse_config,
    text_type,
    type_of_key,
    user_path,
)
from config.upgrade import RENAMED

CONFIG_FOLDER = Path(__file__).resolve().parent
CHECKPOINT_HELP = "folder checkpoints/<project>/<run>, whose newest checkpoint is taken, or a step_<N> in it"


def check_settings(settings: DictConfig, kind: type[Config]) -> Config:
    """Resolve interpolations and check against the schema of `kind`."""
    try:
        values = OmegaConf.to_container(settings, resolve=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"the configuration can't be resolved: {explain_error(error)}") from None
    assert isinstance(values, dict)
    # The experiment group only names a preset; what it sets stands in the other keys.
    return parse_as(kind, {str(key): value for key, value in values.items() if key != "experiment"})


def plain_overrides(overrides: Sequence[str], kind: type[TrainingConfig], *, is_sweep: bool = False) -> list[str]:
    """Hydra overrides, rewritten so that Hydra reads them as they are meant.

    - A value for a key of text is text: run_name=007 and run_name=1e5 keep their characters. A value that Hydra can't parse is
      quoted whole.
    - In generation.stop, \\n, \\r, \\t and \\\\ stand for newline, return, tab and backslash.
    - Renamed keys get their present names, and the original's spellings become this program's.
    - `+key=value` is `key=value` where a config of `kind` has the key: the original's commands say `+run_name=...`.

    is_sweep: commas outside brackets and quotes separate the values of jobs. Raises UsageError for a key that doesn't exist.
    """
    return [_plain_override(text, kind, is_sweep) for text in overrides]


# Keys of the original TRM whose values name its classes and functions: the key here, and the part of a value that names the same.
_ORIGINAL_SPELLINGS = {
    "arch.name": ("arch.name", r"recursive_reasoning\.(\w+)@\w+"),
    "arch.loss.loss_type": ("arch.loss", r"(stablemax|softmax)_cross_entropy\b"),
}


def _plain_override(text: str, kind: type[TrainingConfig], is_sweep: bool) -> str:
    # Groups that aren't keys, packages, deletions and Hydra's own settings are left to Hydra.
    match = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", text, re.DOTALL)
    if match is None or re.match(r"(hydra|experiment)\b", match[2]):
        return text[1:] if re.match(r"\+experiment\b", text) else text
    plus, key, value = match.groups()
    key = _renamed(key)
    if key in _ORIGINAL_SPELLINGS:
        key, pattern = _ORIGINAL_SPELLINGS[key]
        value = re.sub(pattern, r"\1", value)
    found = type_of_key(key.split("."), kind)
    if found is None:
        if plus:
            return text  # a key that the user's own YAML refers to, or one that the schema refuses
        raise UsageError(f"override {text!r}: {no_such_key(key.split('.'), kind)}")
    kind_of_text = text_type(found)
    if kind_of_text is not None:
        value = _plain_texts(value, kind_of_text, is_sweep, has_escapes=key == "generation.stop")
    # Hydra adds a key to a table of the user's only with a plus.
    if dict in (get_origin(found), get_origin(type_of_key(key.split(".")[:-1], kind))):
        plus = "++"
    return f"{'' if plus == '+' else plus}{key}={value}"


def _renamed(key: str) -> str:
    """The present name of a key that commands of earlier versions may call otherwise."""
    of_source = re.fullmatch(r"(sources\.\w+)(\.\w+)", key)
    section, rest = of_source.groups() if of_source else ("dataset", key.removeprefix("dataset"))
    return key if f"dataset{rest}" not in RENAMED else RENAMED[f"dataset{rest}"].replace("dataset", section, 1)


def _parsed(value: str) -> Any:
    """What Hydra reads in an override's value. Raises HydraException."""
    return OverridesParser.create().parse_override(f"key={value}").value()


def _quoted(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()


def _plain_texts(value: str, kind: TextType, is_sweep: bool, has_escapes: bool) -> str:
    """`value` with quotes around what Hydra would not read as text, and with its escapes read."""

    def plain(word: str) -> str:
        is_quoted = word.startswith(("'", '"'))
        if has_escapes:
            return _quoted(unescaped(_parsed(word) if is_quoted else word))
        return word if is_quoted or _is_text(word) else _quoted(word)

    try:
        parsed = _parsed(value)
    except HydraException:
        if not (kind.is_list and value.startswith("[")):
            return _quoted(unescaped(value) if has_escapes else value)
        parsed = []
    is_choice = isinstance(parsed, ChoiceSweep) and parsed.simple_form
    if isinstance(parsed, str):
        return plain(value)
    if is_choice and not is_sweep and not kind.is_list:
        return _quoted(value)
    is_function = isinstance(parsed, Sweep) and not is_choice
    if is_function or (parsed is None and kind.takes_null) or (isinstance(parsed, list | dict) and not kind.is_list):
        return value
    # By itself, in a list, or as one of the values of a sweep.
    words = re.compile(r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|[^][,'"]+""")
    return words.sub(lambda match: plain(word) if (word := match[0].strip(" ")) else match[0], value)


def _is_text(word: str) -> bool:
    try:
        return isinstance(_parsed(word), str)
    except HydraException:
        return False


def unescaped(text: str) -> str:
    """`text` with a newline, return, tab or backslash for \\n, \\r, \\t or \\\\; another backslash stands for itself."""
    return re.sub(r"\\([nrt\\])", lambda match: {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}[match[1]], text)


_PLUGINS = {
    "hydra/launcher": "hydra-joblib-launcher or hydra-submitit-launcher",
    "hydra/sweeper": "hydra-optuna-sweeper",
}


def explain_error(error: Exception) -> str:
    """An error of Hydra's in a line or two, without advice that doesn't apply here."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group == "source":
            return f"{group}={name}: this group is now called dataset, write /dataset@sources.NAME: {name}"
        near = difflib.get_close_matches(name, error.options, n=1)
        options = f"did you mean {near[0]}? There are" if near else "there are"
        more = f"; more come with pip install {_PLUGINS[group]}" if group in _PLUGINS else ""
        return f"{group}={name}: no file {error.missing_cfg_file}.yaml in config/; {options} {', '.join(error.options)}{more}"
    if isinstance(error, OverrideParseException):
        found = str(error).removeprefix(f"Error parsing override '{error.override}'").strip().splitlines()[0]
        return f"override {error.override!r}: expected key=value; {found.partition(' expecting ')[0]}"
    lines = [line.strip() for part in (error, error.__cause__) if part for line in str(part).splitlines()]
    ambiguous = re.match(r"Ambiguous value for argument '(.*)'$", lines[0]) if lines else None
    if ambiguous:
        return f"{ambiguous[1]!r} has several values: write a list as key=[a,b], text with commas as key=\"'a,b'\", a sweep with -m"
    unknown = re.match(r"Could not override '(.*?)'", lines[0]) if lines else None
    if unknown:
        return f"{unknown[1]!r}: no such key or group"
    return "\n".join([line for line in lines if line and not line.startswith("See http")][:2]) or type(error).__name__


def compose_config(name: str, overrides: Sequence[str] = ()) -> PretrainInstructConfig:
    """`compose_as` for an instruction run."""
    return compose_as(PretrainInstructConfig, name, overrides)


def compose_as(kind: type[Config], name: str, overrides: Sequence[str] = ()) -> Config:
    """The config `name` of this folder with Hydra overrides. Raises UsageError for an unknown name or a wrong override."""
    try:
        with initialize_config_dir(str(CONFIG_FOLDER), version_base=None):
            return check_settings(compose(name, overrides=plain_overrides(overrides, kind)), kind)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(f"config {name!r} can't be composed: {explain_error(error)}") from None


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `key=value` overrides on top, written as Hydra's.

    Raises UsageError for a key that doesn't exist or a value that doesn't fit.
    """
    settings = OmegaConf.create(config.model_dump())
    for override in overrides:
        [plain] = plain_overrides([override], type(config))
        try:
            [parsed] = OverridesParser.create().parse_overrides([plain])
            if parsed.type not in (OverrideType.CHANGE, OverrideType.FORCE_ADD) or parsed.package is not None:
                raise UsageError(f"override {override!r}: expected key=value")
            key = parsed.key_or_group
            if type_of_key(key.split("."), type(config)) is None:
                raise UsageError(f"override {override!r}: {no_such_key(key.split('.'), type(config))}")
            if parsed.is_sweep_override():
                raise UsageError(f"override {override!r} has several values: write a list as key=[a,b]")
            OmegaConf.update(settings, key, parsed.value(), merge=True)
        except (HydraException, OmegaConfBaseException) as error:
            found = explain_error(error)
            raise UsageError(found if repr(override) in found else f"override {override!r}: {found}") from None
    return check_settings(settings, type(config))


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that uses a checkpoint."""
    parser.add_argument("--checkpoint", type=user_path, required=True, help=CHECKPOINT_HELP)
    parser.add_argument(
        "--config-name", help="take all settings but the architecture's from this config instead of the checkpoint's"
    )
    parser.add_argument("--overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings on top of the checkpoint's")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that uses a language model."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--tokenizer-path", type=os.path.expanduser, help="must be the tokenizer of the checkpoint, which is the default"
    )
    parser.add_argument("--act-steps", type=int, help="ACT steps a token takes; default: generation.act_steps, else all")
    parser.add_argument("--halt-threshold", type=float, help="a token stops early when its halting probability passes this")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of scripts that generate. Each overrides the key generation.* of the same name."""
    add = parser.add_argument
    add("--max-output-tokens", type=int, metavar="N", help="longest answer; default: half of dataset.seq_len")
    add("--temperature", type=float, help="0: always the most probable token; above: draw, the flatter the higher")
    add("--top-k", type=int, metavar="K", help="draw among the K most probable tokens only")
    add("--top-p", type=float, metavar="P", help="draw among the fewest tokens that together have this probability")
    add("--min-p", type=float, metavar="P", help="draw among tokens of at least this share of the most probable one's probability")
    add("--repetition-penalty", type=float, help="above 1: makes tokens less probable that were there before")
    add("--seed", type=int, help="seed of the draws")
    add(
        "--stop",
        action="append",
        type=unescaped,
        metavar="TEXT",
        help=r"the answer ends before this text; may be given again; \n, \r, \t and \\ are newline, return, tab and backslash",
    )


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
    # Not as overrides: a text given to --stop may look like anything.
    flags = {key: value for key, value in vars(arguments).items() if key in GenerationConfig.model_fields and value is not None}
    return parse_config({**values, "generation": {**values["generation"], **flags}})
