"""A looped Transformer: one state, and every call of the stack gets the input again."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, States
from models.recursive_reasoning.trm import TRM


class LoopedTransformer(TRM):
    """`H_cycles * (L_cycles + 1)` times z = f(z + x). The output is z."""

    initial_states = ("L_init",)

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        (z,) = states
        for _ in range(self.config.H_cycles * (self.config.L_cycles + 1)):
            z = call("L_level", z + x_BTD)
        return (z,), z
