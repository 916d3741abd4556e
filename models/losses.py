"""The losses: chunked cross entropy over the vocabulary, halting losses of tokens and rows.

Text passes only its supervised tokens; no [tokens, vocabulary] tensor is larger than a chunk.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers import TOKEN_MULTIPLE

# Logits of one chunk. 2**24 are 64 MiB in float32; the loss needs about four such tensors.
_LOGITS_PER_CHUNK = 2**24
# The compiled loss needs them only in the compute dtype. Each chunk updates the head's gradient.
_LOGITS_PER_COMPILED_CHUNK = 2**26


def log_probs(logits: Tensor, loss: str, out: Tensor | None = None) -> Tensor:
    """log p over the last dimension of float logits, for `loss` "softmax" or "stablemax". `out`: a
    tensor for the result.

    Stablemax (Prieto et al., arXiv 2501.04697): p = s(v) / sum s, s(v) = v + 1 for v >= 0, else 1 /
    (1 - v). Without a branch, log s(v) = sign(v) log(1 + |v|), which is finite, with a finite
    gradient, everywhere.
    """
    if loss == "stablemax":
        logits = logits.abs().log1p_().copysign_(logits)
    return torch.log_softmax(logits, dim=-1, out=out)


def _chunk_gradient(logp_NV: Tensor, logits_NV: Tensor, labels_N: Tensor, loss: str) -> Tensor:
    """d(-log p[label]) / d(logits), given log p. Overwrites both."""
    grad_NV = logp_NV.exp_()
    grad_NV.scatter_add_(1, labels_N.unsqueeze(1), grad_NV.new_full((len(labels_N), 1), -1.0))
    if loss == "stablemax":
        # d log s(v) / dv is 1 / (1 + |v|) on both sides of zero.
        grad_NV.div_(logits_NV.abs_().add_(1.0))
    return grad_NV


def argmax(logits_NV: Tensor) -> Tensor:
    """The lowest id of the highest logit, [N]."""
    if logits_NV.device.type == "cpu":
        # The same result as torch.argmax, which is not vectorised on a CPU.
        return torch.from_numpy(logits_NV.numpy().argmax(-1))
    return logits_NV.argmax(dim=-1)


def _chunk_tokens(vocab_size: int, compiled: bool = False) -> int:
    logits = _LOGITS_PER_COMPILED_CHUNK if compiled else _LOGITS_PER_CHUNK
    return max(1, logits // vocab_size // TOKEN_MULTIPLE) * TOKEN_MULTIPLE


def _logits_to_gradient(raw_NV: Tensor, labels_N: Tensor, weights_N: Tensor, loss: str) -> tuple[Tensor, Tensor]:
    """-log p(label) and argmax [N]. Overwrites the logits with the gradient of the weighted sum.

    Compiled, it takes few passes over the logits, and no float32 copies of them.
    """
    logits_NV = raw_NV.to(torch.promote_types(raw_NV.dtype, torch.float32))
    logp_NV = log_probs(logits_NV, loss)
    is_label_NV = torch.arange(logits_NV.shape[1], device=labels_N.device) == labels_N.unsqueeze(1)
    grad_NV = (logp_NV.exp() - is_label_NV.to(logp_NV.dtype)) * weights_N.unsqueeze(1)
    if loss == "stablemax":
        grad_NV = grad_NV / (logits_NV.abs() + 1.0)
    nll_N, argmax_N = -logp_NV.gather(1, labels_N.unsqueeze(1)).squeeze(1), logits_NV.argmax(-1)
    raw_NV.copy_(grad_NV)
    return nll_N, argmax_N


@functools.cache
def _compiled_logits_to_gradient() -> Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]]:
    return torch.compile(_logits_to_gradient, dynamic=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """sum_n w_n * -log p(label_n) by chunks of tokens; forward computes the gradients too."""

    @staticmethod
    def forward(
        ctx: Any, output_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor, loss: str, compiled: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_output, needs_weight = ctx.needs_input_grad[:2]
        cast_VD = weight_VD.to(output_ND.dtype)
        exact = torch.promote_types(output_ND.dtype, torch.float32)
        nll_N = torch.empty(len(labels_N), dtype=exact, device=output_ND.device)
        argmax_N = torch.empty_like(labels_N)
        grad_ND = torch.empty_like(output_ND) if needs_output else None
        grad_VD: Tensor | None = None
        chunk = _chunk_tokens(len(weight_VD), compiled)
        if not compiled:
            # Of the same size for any number of tokens, so that freed memory is reused
            # (models/device.keep_freed_memory).
            raw_CV, exact_CV, logp_CV = (
                torch.empty(chunk, len(weight_VD), dtype=dtype, device=output_ND.device)
                for dtype in (output_ND.dtype, exact, exact)
            )
        for start in range(0, len(labels_N), chunk):
            part = slice(start, start + chunk)
            labels = labels_N[part]
            count = len(labels)
            # Rounded up (see models/layers.TOKEN_MULTIPLE). Padding gets no gradient.
            rounded = -(-count // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
            output = F.pad(output_ND[part], (0, 0, 0, rounded - count))
            if compiled:
                raw = torch.mm(output, cast_VD.T)
                # The number of tokens is dynamic, the vocabulary static: code for a dynamic one
                # isn't vectorised.
                torch._dynamo.mark_static(raw, 1)
                padded = [F.pad(x_N, (0, rounded - count)) for x_N in (labels, weights_N[part])]
                nll, best = _compiled_logits_to_gradient()(raw, padded[0], padded[1], loss)
                nll_N[part], argmax_N[part] = nll[:count], best[:count]
            else:
                raw = torch.mm(output, cast_VD.T, out=raw_CV[:rounded])
                logits, logp = exact_CV[:count].copy_(raw[:count]), logp_CV[:count]
                argmax_N[part] = argmax(logits)
                log_probs(logits, loss, out=logp)
                nll_N[part] = -logp.gather(1, labels.unsqueeze(1)).squeeze(1)
                if not (needs_output or needs_weight):
                    continue
                grad = _chunk_gradient(logp, logits, labels, loss).mul_(weights_N[part].unsqueeze(1))
                raw[:count], raw[count:] = grad, 0
            if grad_ND is not None:
                grad_ND[part] = (raw @ cast_VD)[:count]
            if needs_weight:
                part_VD = (raw.T @ output).to(weight_VD.dtype)
                grad_VD = part_VD if grad_VD is None else grad_VD.add_(part_VD)
        if needs_weight and grad_VD is None:
            grad_VD = torch.zeros_like(weight_VD)
        ctx.grads = (grad_ND, grad_VD)
        ctx.mark_non_differentiable(nll_N, argmax_N)
        return (nll_N * weights_N).sum(), nll_N, argmax_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        # In place, so only one backward pass is possible: a copy of the weight's gradient would
        # cost more than the softmax of a short batch. A factor of 1 is skipped on a CPU; on a GPU,
        # reading it would wait for the device.
        grad_output, grad_weight = ctx.grads
        del ctx.grads
        if grads[0].device.type != "cpu" or grads[0] != 1:
            for grad in (grad_output, grad_weight):
                if grad is not None:
                    grad.mul_(grads[0])
        return grad_output, grad_weight, None, None, None, None


class TokenLoss(NamedTuple):
    """The loss of supervised tokens, of one ACT step or several."""

    total: Tensor
    """Scalar, differentiable: sum over tokens of weight * (CE + 0.5 BCE)."""
    nll_N: Tensor
    """-log p(label) of each token, nats."""
    argmax_N: Tensor
    """The most probable id of each token."""
    halt_bce_N: Tensor
    """Binary cross entropy of each token's halting logit, nats."""


def linear_cross_entropy(
    output_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor, loss: str, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross entropy through the vocabulary head `weight_VD`, without the full logits.

    Returns the differentiable sum of `weights_N` * nll, and nll [N] and argmax [N] without
    gradient. N may be 0. compiled: torch.compile the work on a chunk's logits.
    """
    if not torch.is_grad_enabled():
        # The autograd function can't see that, and would compute unused gradients.
        output_ND, weight_VD = output_ND.detach(), weight_VD.detach()
    result: tuple[Tensor, Tensor, Tensor] = _LinearCrossEntropy.apply(output_ND, weight_VD, labels_N, weights_N, loss, compiled)
    return result


def token_loss(
    output_ND: Tensor,
    head_VD: Tensor,
    halt_logits_N: Tensor,
    labels_N: Tensor,
    weights_N: Tensor,
    loss: str,
    compiled: bool = False,
) -> TokenLoss:
    """CE + 0.5 BCE of supervised tokens, maybe of several ACT steps, with a weight each.

    The halting logit is trained to predict whether the argmax is right.
    """
    ce, nll_N, argmax_N = linear_cross_entropy(output_ND, head_VD, labels_N, weights_N, loss, compiled)
    right_N = (argmax_N == labels_N).to(halt_logits_N.dtype)
    bce_N = F.binary_cross_entropy_with_logits(halt_logits_N, right_N, reduction="none")
    return TokenLoss(ce + 0.5 * (bce_N * weights_N).sum(), nll_N, argmax_N, bce_N.detach())


class RowLoss(NamedTuple):
    """The loss of puzzles' rows at one ACT step. Only `total` carries gradient."""

    total: Tensor
    """Sum over rows of mean CE + 0.5 (halting BCE + continuing BCE); not yet a mean over rows."""
    nll_B: Tensor
    """Mean -log p(label) of each row's supervised tokens, nats; 0 without any."""
    halt_bce_B: Tensor
    """Binary cross entropy of each row's halting logit, nats."""
    continue_bce_B: Tensor
    """Binary cross entropy of each row's continuing logit, nats; 0 without a target."""
    argmax_BT: Tensor
    """The most probable id of every token, supervised or not."""
    accuracy_B: Tensor
    """Fraction of each row's supervised tokens whose argmax is right; 0 without any."""
    is_right_B: Tensor
    """Whether all of them are right; true without any."""


def row_loss(
    output_BTD: Tensor,
    head_VD: Tensor,
    halt_logits_B2: Tensor,
    labels_BT: Tensor,
    loss: str,
    continue_target_B: Tensor | None = None,
) -> RowLoss:
    """The loss of TinyRecursiveModels and HRM for whole rows. The halting logit is trained to
    predict whether the row is right.

    labels_BT: negative where a token is not supervised. continue_target_B: probabilities
    (`row_halting.continue_target`), or None if the continuing logit isn't trained. Tokens that are
    not supervised go through the head with weight 0: a puzzle's vocabulary is small, and counting
    them would wait for the device.
    """
    supervised_BT = labels_BT >= 0
    count_B = supervised_BT.sum(dim=1)
    exact = torch.promote_types(output_BTD.dtype, torch.float32)
    weights_BT = supervised_BT.to(exact) / count_B.clamp(min=1).unsqueeze(1)
    ce, nll_N, argmax_N = linear_cross_entropy(
        output_BTD.flatten(0, 1), head_VD, labels_BT.clamp(min=0).flatten(), weights_BT.flatten(), loss
    )
    argmax_BT = argmax_N.view_as(labels_BT)
    right_B = ((argmax_BT == labels_BT) & supervised_BT).sum(dim=1)
    is_right_B = right_B == count_B

    halt_B, continue_B = halt_logits_B2.unbind(-1)
    halt_bce_B = F.binary_cross_entropy_with_logits(halt_B, is_right_B.to(halt_B.dtype), reduction="none")
    continue_bce_B = torch.zeros_like(halt_bce_B)
    if continue_target_B is not None:
        continue_bce_B = F.binary_cross_entropy_with_logits(continue_B, continue_target_B, reduction="none")
    return RowLoss(
        total=ce + 0.5 * (halt_bce_B + continue_bce_B).sum(),
        nll_B=(nll_N.view_as(weights_BT) * weights_BT).sum(dim=1),
        halt_bce_B=halt_bce_B.detach(),
        continue_bce_B=continue_bce_B.detach(),
        argmax_BT=argmax_BT,
        accuracy_B=right_B / count_B.clamp(min=1),
        is_right_B=is_right_B,
    )
