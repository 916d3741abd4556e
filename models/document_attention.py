"""Attention within concatenated documents, without rows and without padding, on CUDA.

Causal documents use variable-length FlashAttention. Prefix attention uses FlexAttention, which
skips blocks between documents. Both are imported on use: they import torch's compiler, which takes
seconds. Shape suffixes as in models/layers.py; R documents, C blocks of tokens.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.device import on_device

# Tokens of a FlexAttention block: its kernels allow no smaller ones.
_BLOCK = 128


class DocumentAttention(NamedTuple):
    """Attention of tokens [N, H, K] within their documents.

    starts_R1: int32, offsets of the documents' first tokens, and N at the end. longest: tokens of
    the longest document. blocks: a FlexAttention BlockMask, unless all documents are causal.
    """

    starts_R1: Tensor
    longest: int
    blocks: Any = None

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        if self.blocks is None:
            from torch.nn.attention.varlen import varlen_attn

            starts_R1, longest = self.starts_R1, self.longest
            y_NHK = varlen_attn(q_NHK, k_NHK, v_NHK, starts_R1, starts_R1, longest, longest, window_size=(-1, 0))
            assert isinstance(y_NHK, Tensor)
            return y_NHK
        from torch.nn.attention.flex_attention import flex_attention

        q_1HNK, k_1HNK, v_1HNK = (x.transpose(0, 1).unsqueeze(0) for x in (q_NHK, k_NHK, v_NHK))
        y_1HNK: Tensor = flex_attention(q_1HNK, k_1HNK, v_1HNK, block_mask=self.blocks, scale=q_NHK.shape[-1] ** -0.5)
        return y_1HNK.squeeze(0).transpose(0, 1)


def can_attend_in_documents(kind: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there are kernels for attention of `kind`; those for prefix need compiled code."""
    # FlashAttention needs bfloat16 and rows of 16 bytes, FlexAttention heads of 16 channels.
    is_supported = dtype == torch.bfloat16 and head_dim % 8 == 0 and 16 <= head_dim <= 256
    return is_supported and device.type == "cuda" and kind in ("causal", "prefix")


def documents_side_by_side(kind: str, starts: np.ndarray, segments_N: Tensor) -> DocumentAttention:
    """Attention within concatenated documents. starts: offsets of their first tokens, and N.

    causal: j <= i. prefix: j <= i, or i and j in the same prompt segment (equal numbers above 0).
    """
    starts_R1 = on_device(starts.astype(np.int32), segments_N.device)
    longest = int(np.diff(starts).max())
    blocks = _block_mask(*_visible_range(starts_R1, segments_N)) if kind == "prefix" else None
    return DocumentAttention(starts_R1, longest, blocks)


def _visible_range(starts_R1: Tensor, segments_N: Tensor) -> tuple[Tensor, Tensor]:
    """First and last token [N] that each token sees."""
    tokens = len(segments_N)
    token_N = torch.arange(tokens, dtype=torch.int32, device=segments_N.device)
    document_N = torch.bucketize(token_N, starts_R1, right=True) - 1
    goes_on = (document_N[1:] == document_N[:-1]) & (segments_N[1:] == segments_N[:-1]) & (segments_N[:-1] != 0)
    end_N = token_N.masked_fill(F.pad(goes_on, (0, 1)), tokens)
    return starts_R1[document_N], end_N.flip(0).cummin(0).values.flip(0)


def _block_mask(first_N: Tensor, last_N: Tensor) -> Any:
    """FlexAttention's mask for tokens that see the tokens from `first_N`, ascending, to `last_N`.

    A block of tokens attends to all blocks from the first to the last that any of them sees.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tokens = len(first_N)
    begin_C = first_N[::_BLOCK] // _BLOCK
    blocks = len(begin_C)
    end_C = F.pad(last_N, (0, blocks * _BLOCK - tokens)).view(blocks, _BLOCK).amax(1) // _BLOCK
    seen_CC = begin_C[:, None] + torch.arange(blocks, dtype=torch.int32, device=first_N.device)

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        is_seen: Tensor = (first_N[i] <= j) & (j <= last_N[i])
        return is_seen

    count_11C, index_11CC = (end_C - begin_C + 1)[None, None], seen_CC.clamp(max=blocks - 1)[None, None]
    return BlockMask.from_kv_blocks(count_11C, index_11CC, BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens))
