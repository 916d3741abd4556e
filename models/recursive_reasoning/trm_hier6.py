"""TRM with a reasoning state of its own for each L call, six at most, an ablation of arXiv 2510.04871."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, States
from models.recursive_reasoning.trm import TRM


class SixStateTRM(TRM):
    """`H_cycles` times: z_Li = f(sum z_L + z_H + x) for i = 1..`L_cycles`, then z_H = f(z_H + sum z_L).

    The output is z_H. Sums are over six states; with fewer L calls, the others stay as they were.
    """

    initial_states = ("H_init", "L1_init", "L2_init", "L3_init", "L4_init", "L5_init", "L6_init")

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        z_H, *z_L = states
        for _ in range(self.config.H_cycles):
            for i in range(self.config.L_cycles):
                z_L[i] = call("L_level", sum(z_L[1:], z_L[0]) + z_H + x_BTD)
            z_H = call("L_level", z_H + sum(z_L[1:], z_L[0]))
        return (z_H, *z_L), z_H
