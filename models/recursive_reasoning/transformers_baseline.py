"""A plain Transformer with the same ACT wrapper, as a baseline: no recursion in an ACT step."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, Recursion, States


class TransformerBaseline(Recursion):
    """One call per ACT step, with gradient: z = f(z + x). The output is z."""

    initial_states = ("H_init",)

    @property
    def levels(self) -> dict[str, int]:
        return {"H_level": self.config.H_layers}

    @property
    def default_grad_calls(self) -> int:
        return 1

    def step(self, states: States, x_BTD: Tensor, call: LevelCall) -> tuple[States, Tensor]:
        (z,) = states
        z = call("H_level", z + x_BTD)
        return (z,), z
