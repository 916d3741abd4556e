"""Attention as matrix products, for CPUs with bfloat16 instructions: twice as fast as torch's.

Scores and weights are rounded to bfloat16. The softmax and sums of gradients are float32.
"""

from typing import Any

import torch
from torch import Tensor

# Queries per block: scores fit the CPU's cache, and few of those a causal mask hides are computed.
_QUERIES = 128


@torch.library.custom_op("trm::product_attention", mutates_args=())
def product_attention(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    """Scaled dot-product attention [B, H, T, K], with gradients for q, k and v.

    visible: bool [B or 1, 1, T, T], some key for every query; None: all keys, or by `is_causal` the
    past.
    """
    q_MTK, k_MTK, v_MTK = map(_heads, (q_BHTK, k_BHTK, v_BHTK))
    y_MTK = torch.empty_like(v_MTK)
    for queries, keys in _blocks(q_MTK.shape[1], is_causal):
        weights_MQS = _attention_weights(q_MTK, k_MTK, visible, is_causal, queries, keys)
        y_MTK[:, queries] = torch.bmm(weights_MQS, v_MTK[:, keys])
    return y_MTK.view(v_BHTK.shape)


@torch.library.custom_op("trm::product_attention_backward", mutates_args=())
def _backward(
    grad_y_BHTK: Tensor, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, visible: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, each [B, H, T, K]. Recomputes the weights."""
    grad_y_MTK, q_MTK, k_MTK, v_MTK = map(_heads, (grad_y_BHTK, q_BHTK, k_BHTK, v_BHTK))
    head_dim, sum_dtype = q_MTK.shape[-1], torch.promote_types(q_MTK.dtype, torch.float32)
    grad_q_MTK = torch.empty_like(q_MTK)
    # The last block sees all keys and creates these gradients; other blocks add to them.
    sums_MTK: list[Tensor] = []
    for queries, keys in reversed(_blocks(q_MTK.shape[1], is_causal)):
        weights_MQS = _attention_weights(q_MTK, k_MTK, visible, is_causal, queries, keys)
        grad_weights_MQS = torch.bmm(grad_y_MTK[:, queries], v_MTK[:, keys].transpose(1, 2))
        grad_scores_MQS = torch._softmax_backward_data(grad_weights_MQS, weights_MQS, -1, weights_MQS.dtype)
        grad_q_MTK[:, queries] = _scaled_product(grad_scores_MQS, k_MTK[:, keys], head_dim)
        parts_MSK = (
            _scaled_product(grad_scores_MQS.transpose(1, 2), q_MTK[:, queries], head_dim),
            torch.bmm(weights_MQS.transpose(1, 2), grad_y_MTK[:, queries]),
        )
        if not sums_MTK:
            sums_MTK = [part_MSK.to(sum_dtype) for part_MSK in parts_MSK]
        else:
            for sum_MTK, part_MSK in zip(sums_MTK, parts_MSK, strict=True):
                sum_MTK[:, keys] += part_MSK
    grad_k_MTK, grad_v_MTK = sums_MTK
    shape = q_BHTK.shape
    return grad_q_MTK.view(shape), grad_k_MTK.to(k_BHTK.dtype).view(shape), grad_v_MTK.to(v_BHTK.dtype).view(shape)


@product_attention.register_fake
def _fake_result(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool) -> Tensor:
    return v.new_empty(v.shape)


@_backward.register_fake
def _fake_gradients(
    grad_y: Tensor, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_y, *ctx.saved_tensors, ctx.is_causal), None, None


product_attention.register_autograd(_differentiate, setup_context=_save)


def _heads(x_BHTK: Tensor) -> Tensor:
    """[B * H, T, K]"""
    return x_BHTK.flatten(0, 1).contiguous()


def _blocks(positions: int, is_causal: bool) -> list[tuple[slice, slice]]:
    starts = range(0, positions, _QUERIES)
    stops = [min(start + _QUERIES, positions) for start in starts]
    return [(slice(start, stop), slice(0, stop if is_causal else positions)) for start, stop in zip(starts, stops, strict=True)]


def _attention_weights(
    q_MTK: Tensor, k_MTK: Tensor, visible: Tensor | None, is_causal: bool, queries: slice, keys: slice
) -> Tensor:
    """Weights [M, Q, S], which sum to 1 over the keys S."""
    head_dim = q_MTK.shape[-1]
    scores_MQS = _scaled_product(q_MTK[:, queries], k_MTK[:, keys].transpose(1, 2), head_dim)
    # Adding -inf takes a quarter of the time of masked_fill_.
    if visible is not None:
        bias = scores_MQS.new_zeros(()).where(visible[:, :, queries, keys], -torch.inf)
        scores_MQS.unflatten(0, (bias.shape[0], -1)).add_(bias)
    elif is_causal:
        own_MQQ = scores_MQS[:, :, queries]
        own_MQQ.add_(torch.full_like(own_MQQ[0], -torch.inf).triu_(1))
    return scores_MQS.softmax(-1)


def _scaled_product(a_MIJ: Tensor, b_MJL: Tensor, head_dim: int) -> Tensor:
    """a @ b / sqrt(head_dim) [M, I, L], scaled before it is rounded."""
    return torch.baddbmm(a_MIJ.new_zeros(1), a_MIJ, b_MJL, beta=0, alpha=head_dim**-0.5)
