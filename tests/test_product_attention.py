"""Attention as products against torch's own in float64, with every mask, and where it is used."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import models.layers
from models.layers import RowAttention, dot_product_attention, row_attention
from models.product_attention import product_attention

SEGMENTS = torch.tensor([[1] * 90 + [2] * 110 + [0] * 10, [3] * 10 + [4] * 180 + [0] * 20])
DOCUMENTS = torch.tensor([[1] * 140 + [2] * 60 + [0] * 10, [1] * 50 + [2] * 160])
MASKS = {
    "full": row_attention("full", None, 210),
    "causal": row_attention("causal", None, 210),
    "prefix": row_attention("prefix", SEGMENTS, 210),
    "documents": row_attention("causal", None, 210, DOCUMENTS),
    "one for all rows": RowAttention(visible=torch.ones(1, 1, 210, 210, dtype=torch.bool).tril(3)),
}


def inputs(positions: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k and v as a stacked projection leaves them, and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(2, positions, 4, 3, head_dim, generator=generator, dtype=torch.float64)
    return [x.transpose(1, 2).to(dtype) for x in stacked.unbind(2)]


def with_gradients(y_of: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
    *leaves, grad_y = (x.detach().requires_grad_() for x in given)
    y = y_of(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad_y)


def results(mask: RowAttention, given: list[Tensor], exact: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Ours of what is given and torch's of the same: y and the gradients of q, k and v."""
    ours = with_gradients(partial(product_attention, visible=mask.visible, is_causal=mask.is_causal), given)
    theirs = with_gradients(partial(F.scaled_dot_product_attention, attn_mask=mask.visible, is_causal=mask.is_causal), exact)
    return zip(ours, theirs, strict=True)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("head_dim", [8, 42])
def test_it_is_attention(mask: RowAttention, head_dim: int) -> None:
    """In float64 without roundings; two blocks, of which the second isn't whole."""
    given = inputs(210, head_dim, torch.float64)
    for found, expected in results(mask, given, given):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_roundings_to_bfloat16_stay_small(mask: RowAttention) -> None:
    """Against float64 on the same rounded inputs, relative to the mean square. Rounding a number once is 0.2 %."""
    rounded = inputs(210, 64, torch.bfloat16)
    for found, expected in results(mask, rounded, [x.double() for x in rounded]):
        assert found.dtype == torch.bfloat16
        assert (found - expected).square().mean() < 0.008**2 * expected.square().mean()


@pytest.mark.parametrize("native", [True, False])
def test_it_is_used_where_torch_is_slow(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """In bfloat16 on a CPU that multiplies it, for as many queries as keys and enough of them; so not for a cache."""
    used: list[int] = []

    def spy(q: Tensor, *rest: Tensor) -> Tensor:
        used.append(q.shape[2])
        return product_attention(q, *rest)

    monkeypatch.setattr(models.layers, "product_attention", spy)
    monkeypatch.setattr(models.layers, "_MULTIPLIES_BFLOAT16", native)
    for dtype in (torch.float32, torch.bfloat16):
        for positions in (209, 210):  # two rows with three heads of 210 have more than 2^18 scores
            q, k, v, _ = (x.requires_grad_() for x in inputs(positions, 8, dtype))
            assert dot_product_attention(q, k, v, is_causal=True).dtype == dtype
            dot_product_attention(q[:, :, 20:21], k, v)
    assert used == ([210] if native else [])


def test_compiled_code_is_one_for_small_and_large_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups of rows each may be either; code for every combination would pass the compiler's limit."""
    monkeypatch.setattr(models.layers, "_MULTIPLIES_BFLOAT16", True)
    torch._dynamo.reset()
    compilations = CompileCounter()
    compiled = torch.compile(dot_product_attention, backend=compilations, dynamic=True)
    for positions in (40, 300):
        q, k, v, _ = inputs(positions, 8, torch.bfloat16)
        expected = product_attention(q, k, v, None, True)
        assert torch.equal(compiled(q, k, v, None, True), expected)
    assert compilations.frame_count == 1


@pytest.mark.parametrize("mask", [MASKS["causal"], MASKS["documents"]], ids=["causal", "documents"])
def test_compiled_code_may_rely_on_its_shapes_and_gradients(mask: RowAttention) -> None:
    q, k, v, _ = inputs(140, 8, torch.bfloat16)
    visible = None if mask.visible is None else mask.visible[:, :, :140, :140]
    torch.library.opcheck(product_attention, (*(x.requires_grad_() for x in (q, k, v)), visible, mask.is_causal))
