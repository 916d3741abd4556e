"""The layers of every recursion: linear and embedding layers, rotary positions, attention, SwiGLU,
the block stack.

Weights stay float32 and are cast to the activations' dtype. Nothing here knows the recursion or the
number of ACT steps. Shape suffixes: B rows, T positions, D channels, H heads, K channels of a head,
S positions attended to, V vocabulary. Activations are [B, T, D] or, without padding (`TokenRows`),
[N, D] with N the tokens of all rows; "..." stands for either.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config.schema import ArchConfig
from models.device import cpu_multiplies_bfloat16
from models.product_attention import product_attention

RMS_EPS = 1e-5
_SWIGLU_MULTIPLE = 256


class Rotary(NamedTuple):
    """Cosines and sines of positions [T], [B, T] or [N], each [..., 1, 1, K/2], at least float32."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: Tensor) -> "Rotary":
        """Look up integer `positions` on the same device in a table of positions 0, 1, ..."""
        return Rotary(self.cos[positions], self.sin[positions])


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Rotary:
    """Rotary tables for integer `positions` (RoFormer, arXiv 2104.09864, half-split pairs).

    Angles are float64, which not every device has; the tables are on the device of `positions`.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angles = positions.to(torch.float64)[..., None, None, None] * frequencies
    return Rotary(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate each half-split channel pair of `x` [..., 2, H, K], queries and keys, by its position's angle."""
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((low * rotary.cos - high * rotary.sin, high * rotary.cos + low * rotary.sin), dim=-1)
    return turned.to(x.dtype)


# The number of tokens is rounded up to a multiple of this. A CPU generates a matmul kernel for each
# number of tokens; that takes longer than a small product itself, and the kernel stays in memory.
TOKEN_MULTIPLE = 64


class TokenRows(NamedTuple):
    """Places of unpadded tokens: `index_N` is row * positions + position of each."""

    index_N: Tensor
    rows: int
    positions: int

    def scatter(self, x: Tensor) -> Tensor:
        """[N, ...] -> [B, T, ...], with zeros as padding."""
        padded = x.new_zeros(self.rows * self.positions, *x.shape[1:]).index_copy(0, self.index_N, x)
        return padded.view(self.rows, self.positions, *x.shape[1:])

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [N, ...]"""
        return x.flatten(0, 1).index_select(0, self.index_N)


class Attend(Protocol):
    """Attention: rotated queries and keys, and values, each [..., H, K] -> [..., H, K].

    An implementation decides which tokens see each other. Make it a NamedTuple: torch.compile then
    takes its fields as inputs, and doesn't recompile for each new object.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class RowAttention(NamedTuple):
    """Attention within rows [B, T, H, K]: to all positions, the past, or what `visible` allows.

    visible: bool [B or 1, 1, T, T].
    """

    visible: Tensor | None = None
    is_causal: bool = False

    def __call__(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        q_BHTK, k_BHTK, v_BHTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
        return dot_product_attention(q_BHTK, k_BHTK, v_BHTK, self.visible, self.is_causal).transpose(1, 2)


class TokenAttention(NamedTuple):
    """Attention for tokens without padding [N, H, K], which are padded to rows for it alone."""

    rows: TokenRows
    attend: RowAttention

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        return self.rows.gather(self.attend(*(self.rows.scatter(x) for x in (q_NHK, k_NHK, v_NHK))))


class GroupedAttention(NamedTuple):
    """`TokenAttention` of consecutive groups of tokens; each group has rows of its own width."""

    groups: tuple[TokenAttention, ...]

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        sizes = [len(group.rows.index_N) for group in self.groups]
        parts = zip(self.groups, *(x.split(sizes) for x in (q_NHK, k_NHK, v_NHK)), strict=True)
        return torch.cat([group(*qkv) for group, *qkv in parts])


def row_attention(kind: str, segments_BT: Tensor | None, positions: int, documents_BT: Tensor | None = None) -> RowAttention:
    """Attention of `kind` over `positions` input positions of right-padded rows.

    full: no restriction. causal: j <= i. prefix: j <= i, or i and j in the same prompt segment,
    that is `segments_BT` equal and not 0. Padding is at the end, so no token sees it; its segment
    is 0. With `documents_BT`, a position also sees its own document only. (Padding sees padding: a
    softmax over nothing would be NaN.)
    """
    if kind not in ("full", "causal", "prefix") or (kind == "prefix" and segments_BT is None):
        raise ValueError(f"attention {kind!r}: expected full, causal, or prefix with segments")
    if documents_BT is None and kind != "prefix":
        return RowAttention(is_causal=kind == "causal")
    marks = segments_BT if documents_BT is None else documents_BT
    visible_BTT = torch.ones(1, positions, positions, dtype=torch.bool, device=None if marks is None else marks.device)
    if kind != "full":
        visible_BTT = visible_BTT.tril()
    if kind == "prefix" and segments_BT is not None:
        visible_BTT = visible_BTT | ((segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)) & (segments_BT != 0).unsqueeze(2))
    if documents_BT is not None:
        visible_BTT = visible_BTT & (documents_BT.unsqueeze(2) == documents_BT.unsqueeze(1))
    return RowAttention(visible=visible_BTT.unsqueeze(1))


# In bfloat16 on a CPU, plain matrix products beat torch's attention kernel where the CPU has
# bfloat16 instructions and all rows and heads together have at least this many scores.
_MULTIPLIES_BFLOAT16 = cpu_multiplies_bfloat16()
_MANY_SCORES = 2**18


def dot_product_attention(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, visible: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention [B, H, T, K], with the fastest kernel for dtype and device."""
    dtype = q_BHTK.dtype
    if dtype == torch.bfloat16 and q_BHTK.device.type == "cpu":
        if _MULTIPLIES_BFLOAT16 and q_BHTK.shape == k_BHSK.shape and _are_many_scores(q_BHTK):
            y_BHTK: Tensor = product_attention(q_BHTK, k_BHSK, v_BHSK, visible, is_causal)
            return y_BHTK
        if any(x.requires_grad for x in (q_BHTK, k_BHSK, v_BHSK)):
            # The backward pass of torch's kernel is slower in bfloat16 than in float32.
            q_BHTK, k_BHSK, v_BHSK = q_BHTK.float(), k_BHSK.float(), v_BHSK.float()
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, attn_mask=visible, is_causal=is_causal).to(dtype)


def _are_many_scores(q_BHTK: Tensor) -> bool:
    """Always true while compiling: code that depended on the number of rows would be recompiled."""
    rows, heads, positions, _ = q_BHTK.shape
    return torch.compiler.is_compiling() or rows * heads * positions**2 >= _MANY_SCORES


# Standard deviation of a unit normal cut at +-2: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)).
_STD_OF_NORMAL_CUT_AT_2 = 0.87962566103423978


def truncated_normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill `tensor` as JAX does: from a normal truncated at 2 std, rescaled to standard deviation `std`."""
    scale = std / _STD_OF_NORMAL_CUT_AT_2
    return nn.init.trunc_normal_(tensor, std=scale, a=-2 * scale, b=2 * scale)


class Linear(nn.Module):
    """Linear layer with a float32 master weight [out, in]; computes in its input's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(truncated_normal_(torch.empty(out_features, in_features), in_features**-0.5))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.cached_cast: Tensor | None = None
        """The weight in the compute dtype. Its calls' gradients are summed before the cast back."""

    def cast_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The weight in `dtype`, to be cached; None if it has that dtype already."""
        return None if dtype == self.weight.dtype else self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        weight = self.weight.to(x.dtype) if self.cached_cast is None else self.cached_cast
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
    """Multi-head self-attention; q, k and v come from one stacked projection.

    If the heads don't divide the channels, a head's width is rounded down: 12 heads of 512 channels
    have 42 each, 504 in all. With `qk_norm`, each head's query and key are normalised before
    rotation (arXiv 2010.04245, by RMS and without a scale).
    """

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qk_norm = qk_norm
        width = hidden_size // num_heads * num_heads
        self.qkv_proj = Linear(hidden_size, 3 * width)
        self.o_proj = Linear(width, hidden_size)

    def forward(self, x: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        # split, not slices: backward concatenates gradients in place of padding and adding.
        qk, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).split((2, 1), dim=-3)
        v = v.squeeze(-3)
        if self.qk_norm:
            qk = rms_norm(qk)
        if rotary is not None:
            qk = rotate(qk, rotary)
        q, k = qk.unbind(-3)
        result: Tensor = self.o_proj(attend(q, k, v).flatten(-2))
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
    """Transformer block of attention and SwiGLU, each added to its input.

    Post-norm, as in the original: h = rms(h + attention(h)), then h = rms(h + swiglu(h)). Pre-norm:
    h = h + attention(rms(h)), then h = h + swiglu(rms(h)); the stack normalises the output of its
    last block.

    With `mixed_positions`, rows have exactly that many positions, and a SwiGLU over the positions
    of each channel replaces attention (`mlp_t`). As in the original, the norm after it also runs
    over positions, not channels.
    """

    def __init__(self, config: ArchConfig, mixed_positions: int | None = None) -> None:
        super().__init__()
        hidden_size, expansion = config.hidden_size, config.expansion
        self.is_pre_norm = config.norm == "pre"
        mixed = mixed_positions is not None
        self.self_attn = None if mixed else Attention(hidden_size, config.num_heads, config.qk_norm)
        self.mlp_t = SwiGLU(mixed_positions, expansion) if mixed_positions is not None else None
        self.mlp = SwiGLU(hidden_size, expansion)

    def forward(self, h: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        if self.is_pre_norm:
            assert self.self_attn is not None
            h = h + self.self_attn(rms_norm(h), rotary, attend)
            result: Tensor = h + self.mlp(rms_norm(h))
            return result
        if self.mlp_t is not None:
            h_BDT = h.transpose(1, 2)
            h = rms_norm(h_BDT + self.mlp_t(h_BDT)).transpose(1, 2)
        else:
            assert self.self_attn is not None
            h = rms_norm(h + self.self_attn(h, rotary, attend))
        return rms_norm(h + self.mlp(h))


class BlockStack(nn.Module):
    """The network of one level: a few blocks, applied to the sum of a level call's inputs."""

    def __init__(self, layers: int, config: ArchConfig, mixed_positions: int | None = None) -> None:
        super().__init__()
        self.is_pre_norm = config.norm == "pre"
        self.layers = nn.ModuleList(Block(config, mixed_positions) for _ in range(layers))

    def forward(self, h: Tensor, rotary: Rotary | None, attend: Attend) -> Tensor:
        for layer in self.layers:
            h = layer(h, rotary, attend)
        return rms_norm(h) if self.is_pre_norm else h
