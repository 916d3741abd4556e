"""The interface of a recursion. It holds no weights: `models/act.py` owns them and passes `call`."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from config.schema import ArchConfig

States = tuple[Tensor, ...]


class LevelCall(Protocol):
    """Apply the block stack `level` to `h_BTD`. Counts calls and stops gradients."""

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
        """The levels of all calls of one ACT step, from a dry run with empty tuples as vectors."""
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
        """One ACT step from the input embedding: new states, and the output [B, T, D] for the heads.

        It must only add vectors and pass them to `call`.
        """
