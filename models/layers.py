"""The parts every recursion is built of: linear and embedding layers, rotary positions, attention, SwiGLU, the block stack.

Weights stay float32 and are cast to the activations' dtype. Nothing here knows which recursion or how many ACT steps it serves.
Shape suffixes: B rows, T positions, D channels, H heads, K channels of a head, S positions attended to, V vocabulary.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.initialization import truncated_normal_

RMS_EPS = 1e-5
_SWIGLU_MULTIPLE = 256


class Rotary(NamedTuple):
    """Cosines and sines of the positions in use, each [T, K/2] or, with positions of their own per row, [B, 1, T, K/2]."""

    cos: Tensor
    sin: Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Rotary tables for integer `positions` [T] or [B, T] (RoFormer, arXiv 2104.09864, half-split pairs)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each half-split channel pair of `x` [..., B, H, T, K] by its position's angle."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * rotary.cos - high * rotary.sin, high * rotary.cos + low * rotary.sin), dim=-1)


class Mask(NamedTuple):
    """What a position may see: `visible` (bool, [B, 1, T, S] or None for all) or, without a dense mask, the past only."""

    visible: Tensor | None = None
    is_causal: bool = False


def attention_mask(kind: str, segments_BT: Tensor | None, positions: int) -> Mask:
    """The mask of `kind` over `positions` input positions of right-padded rows.

    full: no restriction. causal: j <= i. prefix: j <= i, or i and j in the same prompt segment, that is
    `segments_BT` equal and not 0. Padding stands at the end, so no real position sees it; its segment is 0.
    """
    if kind == "full":
        return Mask()
    if kind == "causal":
        return Mask(is_causal=True)
    if kind != "prefix" or segments_BT is None:
        raise ValueError(f"attention {kind!r}: expected full, causal, or prefix with segments")
    past_TT = torch.ones(positions, positions, dtype=torch.bool, device=segments_BT.device).tril()
    same_BTT = (segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)) & (segments_BT != 0).unsqueeze(2)
    return Mask(visible=(past_TT | same_BTT).unsqueeze(1))


class Lane(Protocol):
    """Where one layer of one level call keeps its keys and values (models/cache.py)."""

    def exchange(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values, return all that the new positions attend to."""


class Linear(nn.Module):
    """Linear layer with a float32 master weight [out, in], computing in the dtype of its input."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal_(torch.empty(out_features, in_features), in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._cast: Tensor | None = None

    def hold_cast(self, dtype: torch.dtype | None) -> None:
        """Cast the weight once for many calls (None: let go); gradients of all calls then meet before the cast back."""
        self._cast = None if dtype is None else self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        weight = self.weight.to(x.dtype) if self._cast is None else self._cast
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class Embedding(nn.Module):
    """Embedding with a float32 master weight [V, D], std 1/sqrt(D); results are cast to `dtype`."""

    def __init__(self, entries: int, dim: int) -> None:
        super().__init__()
        self.embedding_weight = nn.Parameter(truncated_normal_(torch.empty(entries, dim), dim**-0.5))

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """ids [...] -> [..., D]"""
        return F.embedding(ids, self.embedding_weight).to(dtype)


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, without a weight (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.shape[-1],), eps=RMS_EPS)


class Attention(nn.Module):
    """Multi-head self-attention; q, k and v come from one stacked projection."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.o_proj = Linear(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor, rotary: Rotary | None, mask: Mask, lane: Lane | None) -> Tensor:
        B, T, D = x_BTD.shape
        qkv = self.qkv_proj(x_BTD).view(B, T, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        (q_BHTK, k_BHTK), v_BHTK = qkv[:2] if rotary is None else rotate(qkv[:2], rotary), qkv[2]
        if lane is not None:
            k_BHTK, v_BHTK = lane.exchange(k_BHTK, v_BHTK)
        if q_BHTK.requires_grad and q_BHTK.dtype == torch.bfloat16 and q_BHTK.device.type == "cpu":
            # torch's CPU kernel is many times slower backwards in bfloat16 than in float32.
            q_BHTK, k_BHTK, v_BHTK = q_BHTK.float(), k_BHTK.float(), v_BHTK.float()
        y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=mask.visible, is_causal=mask.is_causal and T > 1)
        result: Tensor = self.o_proj(y_BHTK.transpose(1, 2).reshape(B, T, D).to(x_BTD.dtype))
        return result


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202); gate and up come from one stacked projection, gate first."""

    def __init__(self, hidden_size: int, expansion: float) -> None:
        super().__init__()
        width = -(-round(expansion * hidden_size * 2 / 3) // _SWIGLU_MULTIPLE) * _SWIGLU_MULTIPLE
        self.gate_up_proj = Linear(hidden_size, 2 * width)
        self.down_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        result: Tensor = self.down_proj(F.silu(gate) * up)
        return result


class Block(nn.Module):
    """Post-norm transformer block: h = rms(h + attention(h)), then h = rms(h + swiglu(h))."""

    def __init__(self, hidden_size: int, num_heads: int, expansion: float) -> None:
        super().__init__()
        self.self_attn = Attention(hidden_size, num_heads)
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(self, h_BTD: Tensor, rotary: Rotary | None, mask: Mask, lane: Lane | None) -> Tensor:
        h_BTD = rms_norm(h_BTD + self.self_attn(h_BTD, rotary, mask, lane))
        return rms_norm(h_BTD + self.mlp(h_BTD))


class BlockStack(nn.Module):
    """The network of one level: a few blocks, applied to the sum of what a level call receives."""

    def __init__(self, layers: int, hidden_size: int, num_heads: int, expansion: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden_size, num_heads, expansion) for _ in range(layers))

    def forward(self, h_BTD: Tensor, rotary: Rotary | None, mask: Mask, lanes: list[Lane] | None = None) -> Tensor:
        for index, layer in enumerate(self.layers):
            h_BTD = layer(h_BTD, rotary, mask, None if lanes is None else lanes[index])
        return h_BTD
