"""A plain Transformer under the same ACT wrapper, to hold the recursions against: no recursion within an ACT step."""

from torch import Tensor

from models.recursive_reasoning.base import LevelCall, Recursion, States


class TransformerBaseline(Recursion):
    """Once per ACT step z = f(z + x), all of it with gradient. The output is z."""

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
