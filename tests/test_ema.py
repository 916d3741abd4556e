"""The moving average of the weights, and its loan to the model."""

from collections.abc import Callable

import pytest
import torch

from models.act import RecursiveModel
from models.ema import EMA


def test_the_average_follows_its_formula_over_parameters_only(tiny_model: Callable[..., RecursiveModel]) -> None:
    model = tiny_model()
    ema = EMA(model, 0.9)
    assert ema.average.keys() == dict(model.named_parameters()).keys()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5).add_(step)
        ema.update(model)
        for name, p in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * p.detach()
    for name, value in expected.items():
        torch.testing.assert_close(ema.average[name], value)


@pytest.mark.parametrize("tied", ["true", "false"])
def test_the_model_gets_its_own_weights_back(tiny_model: Callable[..., RecursiveModel], tied: str) -> None:
    model = tiny_model(f"arch.tie_embeddings={tied}")
    ema = EMA(model, 0.5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError), ema.swapped_in(model):
        for name, p in model.named_parameters():
            assert torch.equal(p, ema.average[name]) and not torch.equal(p, own[name])
        assert (model.lm_head.weight is model.embed_tokens.embedding_weight) == (tied == "true")
        raise KeyError("an evaluation that fails")
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    ema.update(model)
    assert torch.equal(model.embed_tokens.embedding_weight, own["embed_tokens.embedding_weight"])
