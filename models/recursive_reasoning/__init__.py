"""The recursions, one short file each, by the name that `arch.name` gives them."""

from config.schema import ArchConfig
from models.recursive_reasoning.base import Recursion
from models.recursive_reasoning.trm import TRM

_RECURSIONS: dict[str, type[Recursion]] = {"trm": TRM}


def build_recursion(config: ArchConfig) -> Recursion:
    """The recursion that `config.name` names."""
    return _RECURSIONS[config.name](config)
