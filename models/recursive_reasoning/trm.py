"""TRM (arXiv 2510.04871): one stack refines a reasoning state z_L several times, then the answer state z_H from it."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, Recursion, States


class TRM(Recursion):
    """`H_cycles` times: `L_cycles` times z_L = f(z_L + z_H + x), then z_H = f(z_H + z_L). The output is z_H."""

    initial_states: tuple[str, ...] = ("H_init", "L_init")

    @property
    def levels(self) -> dict[str, int]:
        return {"L_level": self.config.L_layers}

    @property
    def default_grad_calls(self) -> int:
        return self.config.L_cycles + 1

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        z_H, z_L = states
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                z_L = call("L_level", z_L + z_H + x_BTD)
            z_H = call("L_level", z_H + z_L)
        return (z_H, z_L), z_H
