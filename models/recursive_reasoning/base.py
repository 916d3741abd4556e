"""What a recursion must say of itself. It holds no weights: `models/act.py` owns them and hands `call` to it."""

from abc import ABC, abstractmethod
from typing import Protocol

from torch import Tensor

from config.schema import ArchConfig

States = tuple[Tensor, ...]


class LevelCall(Protocol):
    """Apply the block stack named `level` to `h_BTD`; the wrapper counts calls, cuts gradients and picks the cache lane."""

    def __call__(self, level: str, h_BTD: Tensor) -> Tensor: ...


class Recursion(ABC):
    """The order in which level calls refine latent states during one ACT step."""

    initial_states: tuple[str, ...]
    """Names of the initial-state buffers, one per latent state."""

    def __init__(self, config: ArchConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def levels(self) -> dict[str, int]:
        """Number of blocks of each level's stack, by its name in the state dict."""

    @property
    @abstractmethod
    def calls(self) -> tuple[str, ...]:
        """The level of every call of one ACT step, in order."""

    @property
    @abstractmethod
    def default_grad_calls(self) -> int:
        """How many of the last calls carry gradient in the original."""

    @abstractmethod
    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        """One ACT step from `states` and the input embedding: the new states, and the output [B, T, D] that the heads read."""
