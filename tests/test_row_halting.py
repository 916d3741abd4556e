"""When a puzzle's row halts, case by case, and the target of its continuing logit."""

import math
from collections.abc import Callable

import pytest
import torch

from config.schema import ArchConfig, PretrainInstructConfig
from models.row_halting import continue_target, halted

ArchFactory = Callable[..., ArchConfig]
# Halting and continuing logits: both below zero, both above, and either the other way round.
LOGITS = torch.tensor([[-2.0, -1.0], [-1.0, -2.0], [1.0, 2.0], [2.0, 1.0], [0.0, 0.0]])
LAST = 4


@pytest.fixture
def arch(tiny_config: Callable[..., PretrainInstructConfig]) -> ArchFactory:
    """`arch(act_enabled=False)`: four ACT steps at most, these knobs changed."""
    return lambda **changes: tiny_config(f"arch.halt_max_steps={LAST}").arch.model_copy(update=changes)


@pytest.mark.parametrize(("no_ACT_continue", "leaves"), [(True, [0, 0, 1, 1, 0]), (False, [0, 1, 0, 1, 0])])
def test_rows_halt_by_their_own_logit_or_by_comparison(arch: ArchFactory, no_ACT_continue: bool, leaves: list[int]) -> None:
    config = arch(no_ACT_continue=no_ACT_continue)
    steps, nothing_drawn = torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    assert halted(config, LOGITS, steps, nothing_drawn).tolist() == [bool(x) for x in leaves]
    assert halted(config, LOGITS, steps + LAST - 1, nothing_drawn).all()


def test_exploration_keeps_rows_until_the_drawn_depth(arch: ArchFactory) -> None:
    wants = torch.tensor([[5.0, 0.0]]).expand(LAST, -1)
    for drawn in range(LAST + 1):
        leaves = halted(arch(), wants, torch.arange(1, LAST + 1), torch.full((LAST,), drawn))
        assert leaves.tolist() == [step >= drawn for step in range(1, LAST + 1)]


@pytest.mark.parametrize("act_enabled", [False, True])
@pytest.mark.parametrize("act_inference", [False, True])
def test_early_halts_are_a_choice_in_training_and_another_in_evaluation(
    arch: ArchFactory, act_enabled: bool, act_inference: bool
) -> None:
    config = arch(act_enabled=act_enabled, act_inference=act_inference)
    wants, steps = torch.tensor([[5.0, 0.0]] * 2), torch.tensor([1, LAST])
    assert halted(config, wants, steps, torch.zeros(2)).tolist() == [act_enabled, True]
    assert halted(config, wants, steps, None).tolist() == [act_inference, True]


def test_the_continuing_logit_foretells_the_better_choice_of_the_next_step() -> None:
    target = continue_target(torch.tensor([[1.0, 3.0], [3.0, 1.0], [1.0, 3.0]]), torch.tensor([False, False, True]))
    assert target.tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (3.0, 3.0, 1.0)])


@pytest.mark.parametrize(
    ("name", "no_ACT_continue", "trained"),
    [("trm", True, False), ("trm", False, True), ("hrm", False, True), ("transformers_baseline", False, False)],
)
def test_which_recursions_train_it(arch: ArchFactory, name: str, no_ACT_continue: bool, trained: bool) -> None:
    assert arch(name=name, no_ACT_continue=no_ACT_continue).trains_continue == trained
