"""Exponential moving average of a model's parameters (no buffers, no warm-up)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class EMA:
    """average = rate * average + (1 - rate) * parameter, after each optimizer step."""

    def __init__(self, model: nn.Module, rate: float) -> None:
        self.rate = rate
        self.average: dict[str, Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average with the model's parameters."""
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [parameters[n] for n in self.average], 1 - self.rate)

    @contextlib.contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Within the block, the model uses the average in place of its own parameters."""
        own = {name: p.data for name, p in model.named_parameters()}
        try:
            for name, p in model.named_parameters():
                p.data = self.average[name]
            yield
        finally:
            for name, p in model.named_parameters():
                p.data = own[name]
