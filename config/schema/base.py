"""What all sections of the settings share: how text is read, paths, and what another value means to a run that is resumed."""

import os
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


class OnResume(Enum):
    """What happens when a run is resumed with another value of a field. A field without a mark has its section's."""

    FIXED = "refused: the checkpoint means nothing under another value"
    REPORTED = "reported: the run resumes, but not exactly as it would have continued"
    FREE = "accepted: no weight depends on it, or what it names is compared by content"


Value = TypeVar("Value")
Fixed = Annotated[Value, OnResume.FIXED]
Reported = Annotated[Value, OnResume.REPORTED]
Free = Annotated[Value, OnResume.FREE]
# A file or folder; a leading ~ is the home folder.
PathStr = Annotated[str, AfterValidator(os.path.expanduser)]


def user_path(text: str) -> Path:
    """A path as typed by a person, `type=` of every flag that takes one. A leading ~ is the home folder."""
    return Path(os.path.expanduser(text))  # pathlib's own raises for an unknown user


class TextType(NamedTuple):
    """A field that holds text: whether it is a list of texts, and whether it may be null."""

    is_list: bool
    takes_null: bool


def text_type(annotation: Any) -> TextType | None:
    """How a field of this type holds text; None if it doesn't. A choice among fixed words isn't text."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kinds = {get_args(option)[0] if get_origin(option) is Annotated else option for option in options} - {NoneType}
    if kinds == {str}:
        return TextType(False, NoneType in options)
    [kind] = kinds if len(kinds) == 1 else [None]
    if get_origin(kind) in (list, tuple):
        item = get_args(kind)[0]
        if text_type(item) == TextType(False, False) or get_origin(item) is Literal:
            return TextType(True, NoneType in options)
    return None


class Section(BaseModel):
    """A group of settings: frozen, without unknown keys, explained by the docstrings of its fields."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        coerce_numbers_to_str=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _keep_text(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `yes` as a boolean where a text is meant, and one text stands for a list of one."""
        text = text_type(cls.model_fields[str(info.field_name)].annotation)
        if text is None:
            return value
        if text.is_list and isinstance(value, str | bool | int | float):
            value = [value]
        if isinstance(value, list | tuple):
            return [_without_booleans(item) for item in value]
        return _without_booleans(value)


def _without_booleans(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value
