"""The chunked vocabulary loss against the plain float64 formula: values, gradients, chunk borders, nothing supervised."""

import functools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models.losses
from models.layers import TOKEN_MULTIPLE
from models.losses import linear_cross_entropy, log_probs, row_loss, token_loss

LOSSES = ["stablemax", "softmax"]
# Exactly 1 makes the branch 1 / (1 - v) infinite; 0 is where the branches meet; the rest is large or tiny.
CORNERS = [0.0, -0.0, 1.0, -1.0, 1e4, -1e4, 1e-8, -1e-8, 30.0, -30.0]


def plain_log_probs(logits: Tensor, loss: str) -> Tensor:
    """Straight from the definitions, in float64; the branch not taken is kept finite."""
    logits = logits.double()
    if loss == "softmax":
        shifted = logits - logits.max(-1, keepdim=True).values
        return shifted - torch.log(torch.exp(shifted).sum(-1, keepdim=True))
    is_positive = logits >= 0
    s = torch.where(is_positive, logits + 1, 1 / (1 - torch.where(is_positive, 0.0, logits)))
    return torch.log(s / s.sum(-1, keepdim=True))


def plain_loss(output: Tensor, head: Tensor, labels: Tensor, weights: Tensor, loss: str) -> Tensor:
    logp = plain_log_probs(output.double() @ head.double().T, loss)
    return -(weights.double() * logp[torch.arange(len(labels)), labels]).sum()


def corner_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of corner values in every pairing as logits (the head is the identity), labels and weights."""
    size = len(CORNERS)
    logits = torch.tensor([[CORNERS[(i * k + j) % size] for j in range(size)] for i in range(size) for k in (1, 3)], dtype=dtype)
    labels = torch.arange(len(logits)) % size
    return logits, labels, 0.1 + torch.arange(len(logits)).to(dtype) / 7


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("per_chunk", "compiled"), [(1, False), (25, False), (100, False), (2**24, False), (100, True)])
def test_values_and_gradients_equal_the_plain_formula(
    monkeypatch: pytest.MonkeyPatch, loss: str, per_chunk: int, compiled: bool
) -> None:
    monkeypatch.setattr(models.losses, "_LOGITS_PER_CHUNK", per_chunk)
    monkeypatch.setattr(models.losses, "_LOGITS_PER_COMPILED_CHUNK", per_chunk)
    compiler = functools.partial(torch.compile, backend="aot_eager", dynamic=True)
    monkeypatch.setattr(models.losses, "_compiled_logits_to_gradient", lambda: compiler(models.losses._logits_to_gradient))
    corner, labels, weights = corner_logits()
    rng = torch.Generator().manual_seed(0)
    cases = [
        (corner, torch.eye(len(CORNERS)), labels, weights),
        (torch.randn(9, 6, generator=rng), 2 * torch.randn(10, 6, generator=rng), labels[:9], weights[:9]),
    ]
    for output, head, case_labels, case_weights in cases:
        ours = [t.clone().requires_grad_() for t in (output, head)]
        plain = [t.double().requires_grad_() for t in (output, head)]
        total, nll, argmax = linear_cross_entropy(*ours, case_labels, case_weights, loss, compiled)
        expected = plain_loss(*plain, case_labels, case_weights, loss)
        (3 * total).backward()
        (3 * expected).backward()
        torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-6)
        logits = output.double() @ head.double().T
        plain_nll = -plain_log_probs(logits, loss)[torch.arange(len(case_labels)), case_labels]
        torch.testing.assert_close(nll.double(), plain_nll, rtol=1e-4, atol=1e-6)
        assert torch.equal(argmax, (output @ head.T).argmax(-1)) and not nll.requires_grad
        for mine, exact in zip(ours, plain, strict=True):
            assert torch.isfinite(mine.grad).all() and exact.grad.abs().sum() > 0
            torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_stays_float64(loss: str) -> None:
    corner, labels, weights = corner_logits(torch.float64)
    output, head = corner.clone().requires_grad_(), torch.eye(len(CORNERS), dtype=torch.float64).requires_grad_()
    total, _, _ = linear_cross_entropy(output, head, labels, weights, loss)
    total.backward()
    exact = corner.clone().requires_grad_()
    plain_loss(exact, head.detach(), labels, weights, loss).backward()
    assert total.dtype == torch.float64
    torch.testing.assert_close(output.grad, exact.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_outputs_give_float32_losses_and_gradients_of_the_weights_format(loss: str) -> None:
    rng = torch.Generator().manual_seed(0)
    output = torch.randn(7, 6, generator=rng).bfloat16().requires_grad_()
    head = torch.randn(10, 6, generator=rng).requires_grad_()
    total, nll, _ = linear_cross_entropy(output, head, torch.arange(7), torch.ones(7), loss)
    total.backward()
    exact = plain_loss(output.detach(), head.detach(), torch.arange(7), torch.ones(7), loss)
    assert nll.dtype == total.dtype == head.grad.dtype == torch.float32 and output.grad.dtype == torch.bfloat16
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize("loss", LOSSES)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32) | st.sampled_from(CORNERS), min_size=1, max_size=20))
def test_probabilities_sum_to_one_and_keep_the_order(loss: str, values: list[float]) -> None:
    logits = torch.tensor([values])
    before = logits.clone()
    logp = log_probs(logits, loss)
    assert torch.equal(logits, before), "the caller's logits must stay as they are"
    assert logp.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert logp[0, int(logits.argmax())] == logp.max()
    torch.testing.assert_close(logp.double(), plain_log_probs(logits, loss), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_supervised_is_exactly_zero_and_no_nan(loss: str) -> None:
    output, head = torch.randn(0, 6, requires_grad=True), torch.randn(10, 6, requires_grad=True)
    halting = torch.zeros(0, requires_grad=True)
    result = token_loss(output, head, halting, torch.empty(0, dtype=torch.int64), torch.empty(0), loss)
    result.total.backward()
    assert result.total.item() == 0.0 and len(result.nll_N) == len(result.argmax_N) == len(result.halt_bce_N) == 0
    assert torch.equal(head.grad, torch.zeros_like(head)) and output.grad.shape == (0, 6)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_token_of_weight_zero_adds_exactly_nothing(loss: str) -> None:
    corner, labels, weights = corner_logits()
    head = torch.randn(12, len(CORNERS), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(len(labels)) % 2 == 0
    results = []
    for output, label, weight in ((corner, labels, weights * kept), (corner[kept], labels[kept], weights[kept])):
        tensors = [output.clone().requires_grad_(), head.clone().requires_grad_()]
        linear_cross_entropy(*tensors, label, weight, loss)[0].backward()
        results.append([t.grad for t in tensors])
    assert torch.equal(results[0][0][~kept], torch.zeros_like(corner[~kept]))
    torch.testing.assert_close(results[0][0][kept], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("loss", LOSSES)
def test_the_halting_loss_says_whether_the_argmax_is_right(loss: str) -> None:
    head = torch.eye(4, dtype=torch.float64)
    output = torch.tensor([[3.0, 0, 0, 0], [0, 3.0, 0, 0], [0, 0, 3.0, 0]], dtype=torch.float64, requires_grad=True)
    labels, weights = torch.tensor([0, 2, 2]), torch.tensor([0.5, 0.25, 0.125], dtype=torch.float64)
    halting = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    result = token_loss(output, head, halting, labels, weights, loss)
    right = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    probability = 1 / (1 + torch.exp(-halting))
    bce = -(right * torch.log(probability) + (1 - right) * torch.log(1 - probability))
    expected = plain_loss(output, head, labels, weights, loss) + 0.5 * (weights * bce).sum()
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(result.halt_bce_N, bce.detach())
    assert result.argmax_N.tolist() == [0, 1, 2]
    result.total.backward()
    torch.testing.assert_close(halting.grad, (0.5 * weights * (probability - right)).detach())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("has_target", [False, True])
def test_the_row_loss_is_the_originals(loss: str, has_target: bool) -> None:
    """Sum over rows of mean CE + 0.5 (BCE of being all right + BCE of the continuing logit), row by row from the definitions."""
    rng = torch.Generator().manual_seed(0)
    output = torch.randn(4, 5, 3, generator=rng, dtype=torch.float64).requires_grad_()
    head = torch.randn(6, 3, generator=rng, dtype=torch.float64).requires_grad_()
    halting = torch.randn(4, 2, generator=rng, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0.1, 0.5, 0.9, 0.3], dtype=torch.float64) if has_target else None
    best = (output @ head.T).argmax(-1)
    labels = best.clone()
    labels[0, 1:3] = -100  # all right, partly supervised
    labels[1, 4] = (best[1, 4] + 1) % 6  # one wrong
    labels[2] = -100  # nothing to be right about
    labels[3, :3], labels[3, 3:] = (best[3, :3] + 1) % 6, -100  # all wrong, and what isn't supervised doesn't help
    result = row_loss(output, head, halting, labels, loss, target)

    expected, nll, halt_bce, continue_bce = torch.tensor(0.0), [], [], []
    for row, right in enumerate([1.0, 0.0, 1.0, 0.0]):
        logp = plain_log_probs(output[row] @ head.T, loss)
        of_row = [-logp[t, labels[row, t]] for t in range(5) if labels[row, t] != -100]
        nll.append(sum(of_row, torch.tensor(0.0)) / max(1, len(of_row)))
        p = torch.sigmoid(halting[row])
        halt_bce.append(-(right * torch.log(p[0]) + (1 - right) * torch.log(1 - p[0])))
        continue_bce.append(0 * p[1])
        if target is not None:
            continue_bce[-1] = -(target[row] * torch.log(p[1]) + (1 - target[row]) * torch.log(1 - p[1]))
        expected = expected + nll[-1] + 0.5 * (halt_bce[-1] + continue_bce[-1])
    torch.testing.assert_close(result.total, expected, rtol=0, atol=1e-12)
    for name, values in (("nll_B", nll), ("halt_bce_B", halt_bce), ("continue_bce_B", continue_bce)):
        torch.testing.assert_close(getattr(result, name), torch.stack(values).detach(), rtol=0, atol=1e-12)
    assert result.is_right_B.tolist() == [True, False, True, False]
    assert result.accuracy_B.tolist() == pytest.approx([1.0, 0.8, 0.0, 0.0])
    assert torch.equal(result.argmax_BT, best)
    ours = torch.autograd.grad(result.total, (output, head, halting))
    for mine, exact in zip(ours, torch.autograd.grad(expected, (output, head, halting)), strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)
    assert (ours[2][:, 1] != 0).any() == has_target
    assert not any(part.requires_grad for part in result[1:])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("chunk_tokens", [1, 3])
@pytest.mark.parametrize("loss", ["stablemax", "softmax"])
def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch: pytest.MonkeyPatch, loss: str, chunk_tokens: int) -> None:
    monkeypatch.setattr(models.losses, "_LOGITS_PER_CHUNK", chunk_tokens * TOKEN_MULTIPLE * 300)
    tokens, vocabulary = 7 * TOKEN_MULTIPLE + 5, 300
    output, head = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    with LargestTensor() as largest:
        result, _, _ = linear_cross_entropy(output, head, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), loss)
        result.backward()
    assert largest.elements == chunk_tokens * TOKEN_MULTIPLE * vocabulary


def test_products_come_in_round_numbers_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = set()
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: sizes.add(len(a)) or real(a, b, out=out))
    output, head = torch.randn(200, 4), torch.randn(30, 4)
    for tokens in (1, 63, 64, 65, 100, 200):
        linear_cross_entropy(output[:tokens], head, torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens), "softmax")
    assert sizes == {64, 128, 256}


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = models.losses._chunk_gradient
    monkeypatch.setattr(models.losses, "_chunk_gradient", lambda *arguments: made.append(1) or real(*arguments))
    output, head, labels = torch.randn(5, 4), torch.randn(6, 4, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        linear_cross_entropy(output, head, labels, torch.zeros(5), "softmax")
    assert not made
    linear_cross_entropy(output, head, labels, torch.ones(5), "softmax")
    assert made


def test_losses_at_the_same_time_do_not_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of two threads, one of which comes to its turn in the middle of the other's loss."""
    head, labels, weights = torch.randn(30, 4), torch.zeros(9, dtype=torch.int64), torch.ones(9)
    outputs = torch.randn(2, 9, 4)
    expected = [linear_cross_entropy(output, head, labels, weights, "softmax")[1:] for output in outputs]
    real, inner = models.losses.argmax, list[Any]()

    def interrupted(logits_NV: Tensor) -> Tensor:
        monkeypatch.setattr(models.losses, "argmax", real)
        inner.append(linear_cross_entropy(outputs[1], head, labels, weights, "softmax")[1:])
        return real(logits_NV)

    monkeypatch.setattr(models.losses, "argmax", interrupted)
    outer = linear_cross_entropy(outputs[0], head, labels, weights, "softmax")[1:]
    assert all(map(torch.equal, (*outer, *inner[0]), (*expected[0], *expected[1])))
