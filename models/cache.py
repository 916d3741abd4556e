"""Keys and values kept between forwards: for decoding (one lane per ACT step, level call and layer) and for halted tokens.

A lane is what one layer of one level call in one ACT step attends to, so any recursion fits without knowing of it. A cache belongs
to one set of weights. Shape suffixes as in models/layers.py; S is the number of positions attended to.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.device import on_device
from models.layers import BlockStack, Lane, Mask, Rotary, attend


class StepLanes(Protocol):
    """The lanes of one ACT step."""

    def call(self, stack: BlockStack, first_lane: int, h: Tensor, rotary: Rotary | None, mask: Mask) -> Tensor:
        """A level call whose layers attend to the lanes from `first_lane` on: those of the calls before it come before."""


class LayerLanes(ABC):
    """Lanes that each layer of a level call gets by itself."""

    @abstractmethod
    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        """The lanes of one level call, one per layer of its stack."""

    def call(self, stack: BlockStack, first_lane: int, h: Tensor, rotary: Rotary | None, mask: Mask) -> Tensor:
        """A level call over these lanes; see `StepLanes`."""
        # Not through __call__: compiled code would be made anew for every lane.
        return stack.forward(h, rotary, mask, self.of_call(first_lane, len(stack.layers)))


class HeldLanes(LayerLanes):
    """Whole rows refined step by step while some tokens have already halted: those keep the keys and values they halted with."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._keeps = False
        self._active_B1T1: Tensor | None = None
        self.act_step = 0

    def at_step(self, act_step: int, active_BT: Tensor | None) -> LayerLanes:
        """The lanes of ACT step `act_step`, counted from 0; steps come in order.

        Where `active_BT` is given and false, a token has halted and keeps the keys and values it halted with.
        """
        self.act_step = act_step
        self._keeps = active_BT is not None
        self._active_B1T1 = None if active_BT is None or act_step == 0 else active_BT[:, None, :, None]
        return self

    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        """The lanes of one level call; see `LayerLanes`."""
        return [_HeldLane(self, first_lane + layer) for layer in range(layers)]

    def hold(self, lane: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the active tokens' keys and values of a lane, return the lane."""
        if self._active_B1T1 is not None:
            k_old, v_old = self._kept[lane]
            k_BHTK = torch.where(self._active_B1T1, k_BHTK, k_old)
            v_BHTK = torch.where(self._active_B1T1, v_BHTK, v_old)
        if self._keeps:
            self._kept[lane] = (k_BHTK, v_BHTK)
        return k_BHTK, v_BHTK


@dataclass(frozen=True)
class _HeldLane:
    lanes: HeldLanes
    lane: int

    def attend(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Mask) -> Tensor:
        k_BHTK, v_BHTK = self.lanes.hold(self.lane, k_BHTK, v_BHTK)
        return attend(q_BHTK, k_BHTK, v_BHTK, mask)


class KVCache:
    """Keys and values of a fixed number of rows, for incremental decoding: `fill` with a prompt, then `extend` token by token.

    One buffer [rows, act_steps, lanes, 2, H, positions, K], allocated once. Memory that no position was written to yet is not read;
    on a CPU the system doesn't even provide it before it is written.
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
        """compiled: torch.compile the level calls that extend rows by one token each, and keep the weights they were made with."""
        shape = (rows, act_steps, lanes, 2, heads, positions, head_dim)
        self.buffer = torch.empty(shape, dtype=dtype, device=device)
        self._views: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        if compiled:
            # Frozen weights are laid out as the CPU's kernels want them: products of one row take less than half the time.
            frozen = torch._inductor.config.patch(freezing=device.type == "cpu")
            self._compiled = frozen(torch.compile(extend_call, fullgraph=True))

    @property
    def is_compiled(self) -> bool:
        """Whether there is compiled code to extend rows by one token each."""
        return self._compiled is not None

    def lanes_of(self, row: int, act_step: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each lane, views [1, H, positions, K]."""
        found = self._views.get((row, act_step))
        if found is None:
            # Kept, because a forward asks for every one of them and making a view costs microseconds.
            found = [(kv[0:1], kv[1:2]) for kv in self.buffer[row, act_step].unbind()]
            self._views[row, act_step] = found
        return found

    def fill(self, rows: Sequence[int], prompts: Sequence[int], lengths: Sequence[int]) -> HeldLanes:
        """Lanes for a forward over whole prompts that stores them: row `rows[i]` takes the forward's prompt `prompts[i]`.

        lengths: tokens of each prompt of the forward.
        """
        return _FillingLanes(self, [(row, prompt, lengths[prompt]) for row, prompt in zip(rows, prompts, strict=True)])

    def extend(self, rows: Sequence[int], act_steps: Sequence[int], starts: Sequence[int]) -> StepLanes:
        """Lanes for one ACT step of the next token of each of `rows`, which attends to what stands before it; compiled if this is.

        act_steps: the ACT step of each row, counted from 0. starts: the position of its token.
        """
        if not self.is_compiled:
            return ExtendingLanes(self, rows, act_steps, starts)
        rows_B, act_steps_B, starts_B = on_device([list(rows), list(act_steps), list(starts)], self.buffer.device)
        return self.extend_together(rows_B, act_steps_B, starts_B, max(starts), compiled=True)

    def extend_together(self, rows_B: Tensor, act_steps_B: Tensor, starts_B: Tensor, past: int, *, compiled: bool) -> StepLanes:
        """The same for rows told in integer tensors of the cache's device, whose values the host needn't know.

        past: no row's token stands beyond this position; so many positions are read. compiled: which `is_compiled` must allow.
        """
        level_call = self._compiled if compiled and self._compiled is not None else extend_call
        return TogetherLanes(self, level_call, rows_B, act_steps_B, starts_B, past)

    def carry_halted(self, row: int, position: int | slice, halted_at: int, act_steps: int) -> None:
        """Tokens that halted at step `halted_at` (from 0) show the deeper ones of their `act_steps` what that step stored of them."""
        kept = self.buffer[row, :act_steps, :, :, :, position]
        kept[halted_at + 1 :] = kept[halted_at]


class _FillingLanes(HeldLanes):
    def __init__(self, cache: KVCache, places: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self._cache = cache
        self._places = places

    def hold(self, lane: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        k_BHTK, v_BHTK = super().hold(lane, k_BHTK, v_BHTK)
        for row, prompt, length in self._places:
            k_kept, v_kept = self._cache.lanes_of(row, self.act_step)[lane]
            k_kept[0, :, :length] = k_BHTK[prompt, :, :length]
            v_kept[0, :, :length] = v_BHTK[prompt, :, :length]
        return k_BHTK, v_BHTK


@dataclass(frozen=True)
class ExtendingLanes(LayerLanes):
    """One ACT step of the next token of some rows; see `KVCache.extend`."""

    cache: KVCache
    rows: Sequence[int]
    act_steps: Sequence[int]
    starts: Sequence[int]

    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        return [RowByRowLane(self, first_lane + layer) for layer in range(layers)]


@dataclass(frozen=True)
class RowByRowLane:
    """Each row by itself, over its own positions and nothing else: without threads to fill, a batched kernel gains little."""

    step: ExtendingLanes
    lane: int

    def attend(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Mask) -> Tensor:
        step = self.step
        # Of a bfloat16 cache, too: torch's CPU kernel for a single query takes three times as long in that format, casts included.
        exact = torch.promote_types(q_BHTK.dtype, torch.float32)
        q_BHTK = q_BHTK.to(exact)
        y_BHTK = []
        for place, (row, act_step, start) in enumerate(zip(step.rows, step.act_steps, step.starts, strict=True)):
            k_kept, v_kept = step.cache.lanes_of(row, act_step)[self.lane]
            this = slice(place, place + 1)
            k_kept[:, :, start : start + 1] = k_BHTK[this]
            v_kept[:, :, start : start + 1] = v_BHTK[this]
            k_seen, v_seen = k_kept[:, :, : start + 1].to(exact), v_kept[:, :, : start + 1].to(exact)
            y_BHTK.append(attend(q_BHTK[this], k_seen, v_seen, Mask()))
        return torch.cat(y_BHTK).to(k_BHTK.dtype)


class TogetherLanes:
    """One ACT step of the next token of some rows; see `KVCache.extend_together`.

    Each level call is one function that only reads the cache: one that wrote to it would be compiled into one that copies it.
    """

    def __init__(
        self,
        cache: KVCache,
        level_call: Callable[..., tuple[Tensor, Tensor]],
        rows_B: Tensor,
        act_steps_B: Tensor,
        starts_B: Tensor,
        past: int,
    ) -> None:
        _, steps, lanes, _, _, positions, _ = cache.buffer.shape
        device = cache.buffer.device
        self._level_call = level_call
        self._kept_N2HPK = cache.buffer.flatten(0, 2)
        self._starts_B = starts_B
        self._lanes_LB = (rows_B * steps + act_steps_B) * lanes + torch.arange(lanes, device=device).unsqueeze(1)
        # Two positions at least: code for one would be made apart.
        past = min(max(2, past), positions)
        self._visible_BS = torch.arange(past, device=device) < starts_B.unsqueeze(1)
        _leave_open(self._visible_BS, 0, 1)
        _leave_open(self._kept_N2HPK, 0, 3)

    def call(self, stack: BlockStack, first_lane: int, h: Tensor, rotary: Rotary | None, mask: Mask) -> Tensor:
        """A level call in one piece; see `StepLanes`."""
        lanes_LB = self._lanes_LB[first_lane : first_lane + len(stack.layers)]
        _leave_open(lanes_LB, 1)
        _leave_open(h, 0)
        for table in rotary or ():
            _leave_open(table, 0)
        h, new_LB2HK = self._level_call(stack, h, rotary, self._kept_N2HPK, lanes_LB, self._visible_BS)
        self._kept_N2HPK[lanes_LB, :, :, self._starts_B] = new_LB2HK
        return h


def _leave_open(x: Tensor, *dims: int) -> None:
    """Have compiled code take any size of these dimensions, if it isn't 1."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)


def extend_call(
    stack: BlockStack, h_B1D: Tensor, rotary: Rotary | None, kept_N2HPK: Tensor, lanes_LB: Tensor, visible_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """A level call of one token of each row: its result [B, 1, D], and the new keys and values [L, B, 2, H, K] of its L layers.

    kept_N2HPK: keys and values of every lane. lanes_LB: which of them each layer and row has. visible_BS: which of a lane's first
    positions hold the row's past.
    """
    lanes = [PastLane(kept_N2HPK, lanes_LB[layer], visible_BS) for layer in range(len(stack.layers))]
    h_B1D = stack.forward(h_B1D, rotary, Mask(), lanes)
    return h_B1D, torch.stack([lane.new_B2HK for lane in lanes])


class PastLane:
    """All rows at once, one new token each. Compiled, it reads keys and values once, as they are kept, and casts on the way."""

    def __init__(self, kept_N2HPK: Tensor, lanes_B: Tensor, visible_BS: Tensor) -> None:
        self._kept_N2HPK = kept_N2HPK
        self._lanes_B = lanes_B
        self._visible_BS = visible_BS
        self.new_B2HK = kept_N2HPK.new_empty(0)
        """Keys and values of the new tokens, once they have attended."""

    def attend(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, mask: Mask) -> Tensor:
        self.new_B2HK = torch.stack((k_BHTK[:, :, 0], v_BHTK[:, :, 0]), dim=1)
        exact = torch.promote_types(q_BHTK.dtype, torch.float32)
        q_BH1K, k_BH1K, v_BH1K = (x.to(exact) for x in (q_BHTK, k_BHTK, v_BHTK))
        past = self._visible_BS.shape[1]
        k_BHSK, v_BHSK = (self._kept_N2HPK[self._lanes_B, part, :, :past].to(exact) for part in range(2))
        visible_B1S = self._visible_BS.unsqueeze(1)
        q_BH1K = q_BH1K * q_BH1K.shape[-1] ** -0.5
        past_BHS = (q_BH1K * k_BHSK).sum(-1).masked_fill(~visible_B1S, -math.inf)
        own_BH1 = (q_BH1K * k_BH1K).sum(-1)
        most_BH1 = torch.maximum(past_BHS.amax(-1, keepdim=True), own_BH1)
        past_BHS, own_BH1 = (past_BHS - most_BH1).exp(), (own_BH1 - most_BH1).exp()
        # Where no position was written, memory may hold anything, and 0 * NaN is NaN.
        v_BHSK = v_BHSK.masked_fill(~visible_B1S.unsqueeze(-1), 0)
        y_BHK = (past_BHS.unsqueeze(-1) * v_BHSK).sum(-2) + own_BH1 * v_BH1K[:, :, 0]
        total_BH1 = past_BHS.sum(-1, keepdim=True) + own_BH1
        y_BH1K: Tensor = (y_BHK / total_BH1).unsqueeze(2)
        return y_BH1K.to(q_BHTK.dtype)
