"""What a recursion must say of itself. It holds no weights: `models/act.py` owns them and hands `call` to it."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from config.schema import ArchConfig

States = tuple[Tensor, ...]


class LevelCall(Protocol):
    """Apply the block stack named `level` to `h_BTD`; the wrapper counts calls and cuts gradients."""

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

    @functools.cached_property
    def calls(self) -> tuple[str, ...]:
        """The level of every call of one ACT step, in order: those of a step of empty tuples, which add up as vectors do."""
        levels: list[str] = []

        def call(level: str, terms: Any) -> Any:
            levels.append(level)
            return terms

        step: Callable[..., Any] = self.step
        step(tuple(() for _ in self.initial_states), (), call)
        return tuple(levels)

    @property
    @abstractmethod
    def default_grad_calls(self) -> int:
        """How many of the last calls carry gradient in the original."""

    @abstractmethod
    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        """One ACT step from `states` and the input embedding: the new states, and the output [B, T, D] that the heads read.

        It does nothing with vectors but add them up and pass them to `call`.
        """
