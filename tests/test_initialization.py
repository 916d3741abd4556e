"""The truncated normal: its true deviation and its bounds."""

import pytest
import torch

from models.initialization import truncated_normal_
from models.layers import Embedding, Linear


@pytest.mark.parametrize("std", [1.0, 0.05])
def test_the_deviation_after_truncation_is_the_one_asked_for(std: float) -> None:
    torch.manual_seed(0)
    values = truncated_normal_(torch.empty(400_000), std)
    assert values.std().item() == pytest.approx(std, rel=5e-3)
    assert abs(values.mean().item()) < 0.01 * std
    # Cut at two deviations of the normal before truncation, 2 / 0.8796 of the final one.
    assert 2.2 * std < values.abs().max().item() <= 2.2737 * std


def test_layers_take_one_over_the_root_of_their_input() -> None:
    torch.manual_seed(0)
    assert Linear(400, 300).weight.std().item() == pytest.approx(400**-0.5, rel=2e-2)
    assert Embedding(300, 400).embedding_weight.std().item() == pytest.approx(400**-0.5, rel=2e-2)
