"""AdamATan2 against a scalar loop that is its formula; Muon for the matrices of the level stacks, and both on one schedule."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from config.schema import PretrainInstructConfig
from models.act import RecursiveModel
from training.optimizer import AdamATan2, ModelOptimizer

ConfigFactory = Callable[..., PretrainInstructConfig]


class ScalarLoop:
    """One number under AdamATan2, formula by formula."""

    def __init__(self, p: float) -> None:
        self.p, self.m, self.v, self.t = p, 0.0, 0.0, 0

    def step(self, g: float, lr: float, b1: float, b2: float, wd: float) -> None:
        self.t += 1
        self.p *= 1 - lr * wd
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        self.p -= lr / (1 - b1**self.t) * math.atan2(self.m, math.sqrt(self.v / (1 - b2**self.t)))


@settings(max_examples=50)
@given(
    start=st.lists(st.floats(-2, 2), min_size=2, max_size=4),
    gradients=st.lists(st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3) | st.just(0.0), min_size=1, max_size=6),
    lr=st.floats(1e-5, 0.5),
    b1=st.sampled_from([0.0, 0.9]),
    b2=st.sampled_from([0.0, 0.95, 0.999]),
    wd=st.floats(0, 1),
)
def test_every_number_follows_the_formula(
    start: list[float], gradients: list[float], lr: float, b1: float, b2: float, wd: float
) -> None:
    first = torch.tensor(start[:1], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([start[1:]], dtype=torch.float64, requires_grad=True)
    optimizer = AdamATan2([first, second], lr=1.0, betas=(b1, b2), weight_decay=wd)
    scalars = [ScalarLoop(p) for p in start]
    for t, g in enumerate(gradients):
        # The rate is set from outside, anew at every step.
        rate = lr / (t + 1)
        optimizer.param_groups[0]["lr"] = rate
        first.grad = torch.tensor([g], dtype=torch.float64)
        second.grad = torch.tensor([[g * (i + 2) for i in range(len(start) - 1)]], dtype=torch.float64)
        optimizer.step()
        for i, scalar in enumerate(scalars):
            scalar.step(g * (i + 1), rate, b1, b2, wd)
    got = [*first.tolist(), *second[0].tolist()]
    assert got == pytest.approx([scalar.p for scalar in scalars], rel=1e-9, abs=1e-12)


def test_a_parameter_without_gradient_is_left_alone_and_counts_its_own_steps() -> None:
    always, late = (torch.tensor([2.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = AdamATan2([always, late], lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    for _ in range(3):
        always.grad = torch.tensor([1.0], dtype=torch.float64)
        optimizer.step()
    assert late.item() == 2.0 and optimizer.state[always]["step"] == 3
    late.grad = torch.tensor([1.0], dtype=torch.float64)
    optimizer.step()
    scalar = ScalarLoop(2.0)
    scalar.step(1.0, 0.1, 0.9, 0.95, 0.5)
    assert late.item() == pytest.approx(scalar.p, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_first_update_is_bounded_whatever_the_gradients_scale(scale: float) -> None:
    p = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = AdamATan2([p], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    p.grad = torch.tensor([scale, -scale, 0.0], dtype=torch.float64)
    optimizer.step()
    bound = 0.01 / 0.1 * math.atan(0.1)
    assert p.tolist() == pytest.approx([-bound, bound, 0.0], rel=1e-9)


def test_a_closure_is_refused() -> None:
    optimizer = AdamATan2([torch.zeros(1, requires_grad=True)], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def with_gradients(config: PretrainInstructConfig) -> RecursiveModel:
    """A model whose parameters all have a gradient, always the same."""
    model = RecursiveModel(config.arch, 13)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
    return model


def moves(config: PretrainInstructConfig, lr_factor: float) -> dict[str, torch.Tensor]:
    """How far a first step moves each parameter."""
    model = with_gradients(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    ModelOptimizer(config, model).step(lr_factor)
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("recursion", ["looped", "trm", "trm_singlez", "trm_hier6", "hrm", "transformers_baseline"])
def test_muon_has_the_matrices_of_the_stacks_and_no_others(tiny_config: ConfigFactory, recursion: str) -> None:
    config = tiny_config(f"arch={recursion}", "optimizer=muon")
    model = with_gradients(config)
    optimizer = ModelOptimizer(config, model)
    optimizer.step(1.0)
    kept = {place.rpartition("momentum_buffer.")[2] for place in optimizer.state() if place.startswith("momentum_buffer.")}
    outside = {"embed_tokens.embedding_weight", "lm_head.weight", "q_head.weight", "q_head.bias"}
    names = {name for name, _ in model.named_parameters()}
    assert kept == names - outside and outside < names
    assert {place.partition(".")[2] for place in optimizer.state() if place.startswith("m.")} == outside


def test_both_optimizers_follow_one_schedule_at_rates_of_their_own(tiny_config: ConfigFactory) -> None:
    settings = ("optimizer=muon", "lr=1e-3", "muon_lr=0.02", "weight_decay=0")
    whole, half = (moves(tiny_config(*settings), factor) for factor in (1.0, 0.5))
    alone = moves(tiny_config("lr=1e-3", "weight_decay=0"), 1.0)
    for name, move in whole.items():
        torch.testing.assert_close(half[name], 0.5 * move, rtol=1e-9, atol=1e-15)
        if "level" not in name:
            assert torch.equal(move, alone[name])
            continue
        # Near an orthogonal matrix, as five iterations of Newton and Schulz bring all but very small singular values near 1.
        singular = torch.linalg.svdvals(move) / (0.02 * math.sqrt(max(1.0, move.shape[0] / move.shape[1])))
        assert (singular > 0.6).sum() >= len(singular) - 1 and singular.max() < 1.3


def test_weights_decay_at_their_rate(tiny_config: ConfigFactory) -> None:
    settings = ("optimizer=muon", "lr=1e-3", "muon_lr=0.02")
    free, decayed = (moves(tiny_config(*settings, f"weight_decay={decay}"), 1.0) for decay in (0, 0.5))
    for name, p in with_gradients(tiny_config(*settings)).named_parameters():
        rate = 0.02 if "level" in name else 1e-3
        torch.testing.assert_close(decayed[name], free[name] - rate * 0.5 * p.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["adam_atan2", "muon"])
def test_a_model_without_any_gradient_is_left_alone_and_nothing_is_kept_of_it(tiny_config: ConfigFactory, kind: str) -> None:
    config = tiny_config(f"optimizer={kind}")
    model = with_gradients(config)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = ModelOptimizer(config, model)
    optimizer.zero_grad()
    optimizer.step(1.0)
    assert all(p.grad is None for p in model.parameters()) and optimizer.state() == {}
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
