"""The recursions, one short file each, by their name in `arch.name`."""

from config.schema import ArchConfig
from models.recursive_reasoning.base import Recursion
from models.recursive_reasoning.hrm import HRM
from models.recursive_reasoning.looped import LoopedTransformer
from models.recursive_reasoning.transformers_baseline import TransformerBaseline
from models.recursive_reasoning.trm import TRM
from models.recursive_reasoning.trm_hier6 import SixStateTRM
from models.recursive_reasoning.trm_singlez import SingleStateTRM

_RECURSIONS: dict[str, type[Recursion]] = {
    "looped": LoopedTransformer,
    "trm": TRM,
    "trm_singlez": SingleStateTRM,
    "trm_hier6": SixStateTRM,
    "hrm": HRM,
    "transformers_baseline": TransformerBaseline,
}


def build_recursion(config: ArchConfig) -> Recursion:
    """The recursion named `config.name`."""
    return _RECURSIONS[config.name](config)
