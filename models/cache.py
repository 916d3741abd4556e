"""Attention with stored keys and values: the KV cache of decoding, and those of halted tokens.

A lane holds the keys and values of one layer of one level call in one ACT step. Layers attend in a
fixed order, so each attention call uses the next lane, and a recursion needs no code for the cache.
A cache belongs to one set of weights. Shape suffixes as in models/layers.py; S positions attended
to, L lanes.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.device import on_device
from models.layers import Attend, BlockStack, Rotary, dot_product_attention


class StatefulAttention(ABC):
    """Attention whose calls differ: each one uses the next lane."""

    @abstractmethod
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor:
        """See `models.layers.Attend`."""

    def level_call(self, stack: BlockStack, h: Tensor, rotary: Rotary | None) -> Tensor:
        """`stack` applied to `h`, with this attention."""
        # Not through __call__, which is compiled: it would recompile for every lane.
        return stack.forward(h, rotary, self)


class HeldAttention(StatefulAttention):
    """`attend` over all ACT steps; halted tokens keep the keys and values they halted with."""

    def __init__(self, attend: Attend) -> None:
        self._attend = attend
        self.active_BT: Tensor | None = None
        """Whether each token [...] is still active; None, in the first ACT step: all are."""
        self.lanes: deque[tuple[Tensor, Tensor]] = deque()
        """Keys and values [..., H, K] of the lanes of one ACT step, the next call's first."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.active_BT is not None:
            active = self.active_BT[..., None, None]
            k_held, v_held = self.lanes.popleft()
            k, v = torch.where(active, k, k_held), torch.where(active, v, v_held)
        self.lanes.append((k, v))
        return self._attend(q, k, v)


class KVCache:
    """Keys and values of a fixed number of rows, for incremental decoding: `fill` with a prompt,
    then `extend` token by token.

    One buffer [rows, act_steps, lanes, 2, H, positions, K], allocated once. Nothing is read beyond
    the longest row; on a CPU the system provides memory only once it is written to.
    """

    def __init__(
        self,
        *,
        rows: int,
        act_steps: int,
        lanes: int,
        heads: int,
        positions: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        compiled: bool = False,
    ) -> None:
        """compiled: torch.compile the extension of rows; the weights must not change after that."""
        shape = (rows, act_steps, lanes, 2, heads, positions, head_dim)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self._views: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        if compiled:
            # Freezing stores weights in the layout of the CPU's kernels: products of one row take
            # less than half the time.
            frozen = torch._inductor.config.patch(freezing=device.type == "cpu")
            self._compiled = frozen(torch.compile(extend_call, fullgraph=True))

    @property
    def is_compiled(self) -> bool:
        """Whether the code that extends rows by one token is compiled."""
        return self._compiled is not None

    def lanes_of(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each lane of each ACT step, views [1, H, positions, K]."""
        if row not in self._views:
            # Cached: a forward pass uses every one of them, and making a view costs microseconds.
            self._views[row] = [(kv[0:1], kv[1:2]) for kv in self.buffer[row].flatten(0, 1).unbind()]
        return self._views[row]

    def fill(self, rows: Sequence[int], prompts: Sequence[slice], attend: Attend) -> Attend:
        """`attend` for unpadded prompts, which also stores the keys and values of each ACT step.

        Those of the tokens `prompts[i]` go to row `rows[i]`.
        """
        return _Filling(self, rows, prompts, attend)

    def extend(self, rows: Sequence[int], act_steps: Sequence[int], starts: Sequence[int]) -> Attend:
        """Attention of the next token of each of `rows` to its row, for one ACT step; compiled if
        the cache is.

        act_steps: the ACT step of each row, from 0. starts: the position of its token.
        """
        if not self.is_compiled:
            return _Extending(self, rows, act_steps, starts)
        rows_B, act_steps_B, starts_B = on_device([list(rows), list(act_steps), list(starts)], self.buffer.device)
        return self.extend_together(rows_B, act_steps_B, starts_B, max(starts), compiled=True)

    def extend_together(self, rows_B: Tensor, act_steps_B: Tensor, starts_B: Tensor, past: int, *, compiled: bool) -> Attend:
        """`extend` with integer tensors on the cache's device, whose values the host needn't know.

        past: an upper bound of the tokens' positions; that many positions are read. compiled: use
        the compiled code, which requires `is_compiled`.
        """
        return _ExtendingTogether(self, rows_B, act_steps_B, starts_B, past, self._compiled if compiled else None)

    def carry_halted(self, row: int, position: int | slice, halted_at: int, act_steps: int) -> None:
        """Copy halted tokens' keys and values from step `halted_at` (from 0) to deeper ones."""
        kept = self.buffer[row, :act_steps, :, :, :, position]
        kept[halted_at + 1 :] = kept[halted_at]


class _Filling(StatefulAttention):
    def __init__(self, cache: KVCache, rows: Sequence[int], prompts: Sequence[slice], attend: Attend) -> None:
        self._lanes = zip(*(cache.lanes_of(row) for row in rows), strict=True)
        self._prompts = prompts
        self._attend = attend

    def __call__(self, q_NHK: Tensor, k_NHK: Tensor, v_NHK: Tensor) -> Tensor:
        for (k_kept, v_kept), prompt in zip(next(self._lanes), self._prompts, strict=True):
            length = prompt.stop - prompt.start
            k_kept[0, :, :length] = k_NHK[prompt].transpose(0, 1)
            v_kept[0, :, :length] = v_NHK[prompt].transpose(0, 1)
        return self._attend(q_NHK, k_NHK, v_NHK)


class _Extending(StatefulAttention):
    """One row at a time, over its own positions: with few threads, batching gains little."""

    def __init__(self, cache: KVCache, rows: Sequence[int], act_steps: Sequence[int], starts: Sequence[int]) -> None:
        lanes = cache.buffer.shape[2]
        own = (cache.lanes_of(row)[step * lanes : (step + 1) * lanes] for row, step in zip(rows, act_steps, strict=True))
        self._lanes = zip(*own, strict=True)
        self._starts = starts

    def __call__(self, q_B1HK: Tensor, k_B1HK: Tensor, v_B1HK: Tensor) -> Tensor:
        # For a bfloat16 cache too: torch's CPU kernel for a single query takes three times as long
        # in bfloat16, casts included.
        exact = torch.promote_types(q_B1HK.dtype, torch.float32)
        q_BH1K, k_BH1K, v_BH1K = (x.transpose(1, 2) for x in (q_B1HK.to(exact), k_B1HK, v_B1HK))
        y_BH1K = []
        for place, ((k_kept, v_kept), start) in enumerate(zip(next(self._lanes), self._starts, strict=True)):
            this, seen = slice(place, place + 1), slice(start + 1)
            k_kept[:, :, start : start + 1] = k_BH1K[this]
            v_kept[:, :, start : start + 1] = v_BH1K[this]
            y_BH1K.append(dot_product_attention(q_BH1K[this], k_kept[:, :, seen].to(exact), v_kept[:, :, seen].to(exact)))
        return torch.cat(y_BH1K).to(k_B1HK.dtype).transpose(1, 2)


class _ExtendingTogether(StatefulAttention):
    """All rows at once. Compiled code only reads the cache: if it wrote, it would copy the cache."""

    def __init__(
        self,
        cache: KVCache,
        rows_B: Tensor,
        act_steps_B: Tensor,
        starts_B: Tensor,
        past: int,
        compiled: Callable[..., tuple[Tensor, Tensor]] | None,
    ) -> None:
        _, steps, lanes, _, _, positions, _ = cache.buffer.shape
        device = cache.buffer.device
        self._compiled = compiled
        self._kept_N2HPK = cache.buffer.flatten(0, 2)
        self._starts_B = starts_B
        self._lanes_LB = (rows_B * steps + act_steps_B) * lanes + torch.arange(lanes, device=device).unsqueeze(1)
        # At least two positions: torch.compile recompiles for a size of 1.
        past = min(max(2, past), positions)
        self._visible_BS = torch.arange(past, device=device) < starts_B.unsqueeze(1)
        self._lane = 0
        # Compile once for all sizes of these dimensions above 1.
        torch._dynamo.maybe_mark_dynamic(self._visible_BS, (0, 1))
        torch._dynamo.maybe_mark_dynamic(self._kept_N2HPK, (0, 3))

    def __call__(self, q_B1HK: Tensor, k_B1HK: Tensor, v_B1HK: Tensor) -> Tensor:
        lanes_B = self._lanes_LB[self._lane]
        self._lane += 1
        y_B1HK = attend_to_past(q_B1HK, k_B1HK, v_B1HK, self._kept_N2HPK, lanes_B, self._visible_BS)
        self._kept_N2HPK[lanes_B, :, :, self._starts_B] = torch.cat((k_B1HK, v_B1HK), 1)
        return y_B1HK

    def level_call(self, stack: BlockStack, h: Tensor, rotary: Rotary | None) -> Tensor:
        if self._compiled is None:
            return super().level_call(stack, h, rotary)
        lanes_LB = self._lanes_LB[self._lane : self._lane + len(stack.layers)]
        self._lane += len(stack.layers)
        torch._dynamo.maybe_mark_dynamic(lanes_LB, 1)
        for x in (h, *(rotary or ())):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        h, new_LB2HK = self._compiled(stack, h, rotary, self._kept_N2HPK, lanes_LB, self._visible_BS)
        self._kept_N2HPK[lanes_LB, :, :, self._starts_B] = new_LB2HK
        return h


def extend_call(
    stack: BlockStack, h_B1D: Tensor, rotary: Rotary | None, kept_N2HPK: Tensor, lanes_LB: Tensor, visible_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """A level call for one token of each row: its result [B, 1, D], and the new keys and values [L,
    B, 2, H, K] of its L layers.

    kept_N2HPK: keys and values of every lane. lanes_LB: the lane of each layer and row. visible_BS:
    which of a lane's first positions hold the row's past.
    """
    new_B2HK: list[Tensor] = []

    def attend(q_B1HK: Tensor, k_B1HK: Tensor, v_B1HK: Tensor) -> Tensor:
        lanes_B = lanes_LB[len(new_B2HK)]
        new_B2HK.append(torch.cat((k_B1HK, v_B1HK), 1))
        return attend_to_past(q_B1HK, k_B1HK, v_B1HK, kept_N2HPK, lanes_B, visible_BS)

    return stack.forward(h_B1D, rotary, attend), torch.stack(new_B2HK)


def attend_to_past(
    q_B1HK: Tensor, k_B1HK: Tensor, v_B1HK: Tensor, kept_N2HPK: Tensor, lanes_B: Tensor, visible_BS: Tensor
) -> Tensor:
    """Attention of one new token of each row to itself and to the visible part of its lane: [B, 1,
    H, K].

    Compiled, it reads keys and values once, in their stored dtype, and casts them on the fly.
    """
    exact = torch.promote_types(q_B1HK.dtype, torch.float32)
    q_BH1K, k_BH1K, v_BH1K = (x.to(exact).transpose(1, 2) for x in (q_B1HK, k_B1HK, v_B1HK))
    past = visible_BS.shape[1]
    k_BHSK, v_BHSK = (kept_N2HPK[lanes_B, part, :, :past].to(exact) for part in range(2))
    visible_B1S = visible_BS.unsqueeze(1)
    q_BH1K = q_BH1K * q_BH1K.shape[-1] ** -0.5
    past_BHS = (q_BH1K * k_BHSK).sum(-1).masked_fill(~visible_B1S, -math.inf)
    own_BH1 = (q_BH1K * k_BH1K).sum(-1)
    most_BH1 = torch.maximum(past_BHS.amax(-1, keepdim=True), own_BH1)
    past_BHS, own_BH1 = (past_BHS - most_BH1).exp(), (own_BH1 - most_BH1).exp()
    # Unwritten positions may hold anything, and 0 * NaN is NaN.
    v_BHSK = v_BHSK.masked_fill(~visible_B1S.unsqueeze(-1), 0)
    y_BHK = (past_BHS.unsqueeze(-1) * v_BHSK).sum(-2) + own_BH1 * v_BH1K[:, :, 0]
    total_BH1 = past_BHS.sum(-1, keepdim=True) + own_BH1
    y_B1HK: Tensor = (y_BHK / total_BH1).unsqueeze(1)
    return y_B1HK.to(q_B1HK.dtype)
