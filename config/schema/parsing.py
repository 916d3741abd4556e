"""From plain values to a checked config, the type of a key, and the messages for keys and values that don't fit."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from config.errors import UsageError
from config.schema.base import OnResume, text_type
from config.schema.text import PretrainInstructConfig
from config.schema.training import TrainingConfig

Config = TypeVar("Config", bound=TrainingConfig)


# Keys of the original TRM that are set in another way here.
_ORIGINAL_KEYS = {
    "checkpoint_path": "the folder of a run is <checkpoint_dir>/<project_name>/<run_name>: set these three",
    "arch.loss.name": "there is one loss head; arch.loss says stablemax or softmax",
    "arch.rms_norm_eps": "it is fixed at the original's value, 1e-5",
}


def type_of_key(path: Sequence[str], kind: type[TrainingConfig]) -> Any:
    """The type of a key of a config of `kind`, given as the key's parts; None if there is no such key."""
    return _find(path, kind)[0]


def on_resume(key: str, kind: type[TrainingConfig]) -> OnResume:
    """What happens when a run of `kind` is resumed with another value of `key`, a dotted name."""
    return _find(key.split("."), kind)[1]


def _find(path: Sequence[str], kind: type[TrainingConfig]) -> tuple[Any, OnResume]:
    """A key's type, or None, and the innermost mark on the way to it."""
    found: Any = kind
    mark = OnResume.REPORTED
    for part in path:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(part)
            mark = next((own for own in field.metadata if isinstance(own, OnResume)), mark) if field else mark
            found = field.annotation if field else None
        elif get_origin(found) is dict:
            found = get_args(found)[1]  # the names in it are the user's
        else:
            # In a list, sections are known by their numbers.
            is_item = get_origin(found) in (list, tuple) and part.isdecimal() and text_type(found) is None
            found = get_args(found)[0] if is_item else None
    return found, mark


def no_such_key(path: Sequence[int | str], kind: type[TrainingConfig]) -> str:
    """The message for a key, given as its parts, that a config of `kind` doesn't have. It names the nearest keys that exist."""
    key = ".".join(map(str, path))
    if key in _ORIGINAL_KEYS:
        return f"{key}: no such key here, {_ORIGINAL_KEYS[key]}"
    section = type_of_key([str(part) for part in path[:-1]], kind)
    keys = ["experiment", *_keys(kind)]  # that is a group of presets, and no key of the result
    if isinstance(section, type) and issubclass(section, BaseModel):
        siblings = [".".join(map(str, (*path[:-1], name))) for name in section.model_fields]
        keys = [*siblings, *(other for other in keys if other not in siblings)]
    by_name: dict[str, list[str]] = {}
    for other in keys:
        by_name.setdefault(other.rpartition(".")[2], []).append(other)
    name = key.rpartition(".")[2]
    keys = [other for other in keys if not key.startswith(f"{other}.")]
    near = (
        by_name.get(name)
        or difflib.get_close_matches(key, keys, n=1, cutoff=0.8)
        or [other for close in difflib.get_close_matches(name, by_name, n=1) for other in by_name[close]]
    )
    return f"{key}: no such key" + (f", did you mean {' or '.join(near[:3])}?" if near else "")


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def parse_config(values: Mapping[str, Any]) -> PretrainInstructConfig:
    """`parse_as` for an instruction run."""
    return parse_as(PretrainInstructConfig, values)


def parse_as(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """Check `values` (a resolved config as plain dicts) against the schema of `kind`.

    Raises UsageError with one line per problem: the key, what was found, what is allowed.
    """
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"])) or "config"
            if problem["type"] == "extra_forbidden":
                lines.append(no_such_key(problem["loc"], kind))
            elif problem["type"] == "missing":
                lines.append(f"{key}: missing")
            else:
                # A rule over several keys names them itself; its input would be the whole section.
                found = "" if isinstance(problem["input"], Mapping) else f" (found {problem['input']!r})"
                lines.append(f"{key}: {problem['msg'].removeprefix('Value error, ')}{found}"[:400])
        raise UsageError("the configuration does not fit config/schema:\n  " + "\n  ".join(lines)) from None
