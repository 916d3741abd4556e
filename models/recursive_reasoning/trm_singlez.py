"""TRM with a single state that is reasoning and answer at once, an ablation of arXiv 2510.04871."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, States
from models.recursive_reasoning.trm import TRM


class SingleStateTRM(TRM):
    """`H_cycles` times: `L_cycles` times z = f(z + x), then z = f(z). The output is z."""

    initial_states = ("L_init",)

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        (z,) = states
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                z = call("L_level", z + x_BTD)
            z = call("L_level", z)
        return (z,), z
