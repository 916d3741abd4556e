"""HRM (arXiv 2506.21734): a fast stack refines a reasoning state z_L, a slow one of its own then the answer state z_H."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, Recursion, States


class HRM(Recursion):
    """`H_cycles` times: `L_cycles` times z_L = f_L(z_L + z_H + x), then z_H = f_H(z_H + z_L). The output is z_H."""

    initial_states = ("H_init", "L_init")

    @property
    def levels(self) -> dict[str, int]:
        return {"H_level": self.config.H_layers, "L_level": self.config.L_layers}

    @property
    def default_grad_calls(self) -> int:
        # One call of each level: the first-order approximation of the gradient at the fixed point
        # (section 2 of the paper).
        return 2

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        z_H, z_L = states
        for _ in range(self.config.H_cycles):
            for _ in range(self.config.L_cycles):
                z_L = call("L_level", z_L + z_H + x_BTD)
            z_H = call("H_level", z_H + z_L)
        return (z_H, z_L), z_H
