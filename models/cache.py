"""Keys and values kept between forwards: for decoding (one lane per ACT step, level call and layer) and for halted tokens.

A lane is what one layer of one level call in one ACT step attends to, so any recursion fits without knowing of it. A cache belongs
to one set of weights. Shape suffixes as in models/layers.py; S is the number of positions in use.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.layers import Lane

# Positions by which a cache grows at least.
_LEAST_GROWTH = 32


class StepLanes(Protocol):
    """The lanes of one ACT step."""

    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        """The lanes of one level call, one per layer of its stack, numbered on from those of the calls before it."""


class Lanes(Protocol):
    """The lanes of all ACT steps."""

    def at_step(self, act_step: int, active_BT: Tensor | None) -> StepLanes:
        """The lanes of ACT step `act_step`, counted from 0.

        Where `active_BT` is given and false, a token has halted and keeps the keys and values it halted with.
        """


class KVCache:
    """Keys and values of every position so far, for incremental decoding.

    One buffer [act_steps, calls * layers, 2, B, H, capacity, K]; `reserve` grows it by a quarter when it must, so cost and memory
    follow the tokens so far and never the configured context.
    """

    def __init__(
        self,
        *,
        act_steps: int,
        lanes: int,
        rows: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.buffer = torch.empty(act_steps, lanes, 2, rows, heads, 0, head_dim, dtype=dtype, device=device)
        self._rows = torch.arange(rows, device=device).unsqueeze(1)
        self._positions: Tensor | None = None
        self._start = 0
        self._used = 0
        self._active_B1T1: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions that fit without growing."""
        return self.buffer.shape[5]

    def reserve(self, positions: int) -> None:
        """Make room for `positions` positions, keeping what is stored."""
        if positions <= self.capacity:
            return
        old = self.buffer
        shape = list(old.shape)
        shape[5] = positions + max(_LEAST_GROWTH, positions // 4)
        # Zeros, because rows shorter than the longest attend over positions they never wrote: masked, but 0 * NaN is NaN.
        self.buffer = old.new_zeros(shape)
        self.buffer[..., : old.shape[5], :] = old

    def write_at(self, start: int, count: int) -> int:
        """The next forwards write positions start..start+count-1 of every row. Returns S, the positions they attend to."""
        self.reserve(start + count)
        self._positions, self._start, self._used = None, start, start + count
        return self._used

    def write_at_positions(self, positions_BT: Tensor, used: int) -> int:
        """The next forwards write these positions, of its own in each row, all below `used`. Returns S = `used`."""
        self.reserve(used)
        self._positions, self._used = positions_BT, used
        return used

    def at_step(self, act_step: int, active_BT: Tensor | None = None) -> StepLanes:
        """The lanes of ACT step `act_step`, counted from 0; `active_BT` as in `Lanes`."""
        self._active_B1T1 = None if active_BT is None else active_BT[:, None, :, None]
        return _CachedStep(self, act_step)

    def store(self, act_step: int, lane: int, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, T, K] of a lane, return all S of them."""
        all_positions = self.buffer[act_step, lane, :, :, :, : self._used]
        for part, (kept_BHSK, new_BHTK) in enumerate(zip(all_positions, new, strict=True)):
            if self._positions is None:
                if act_step > 0 and self._active_B1T1 is not None:
                    # What a halted token shows was stored in the step before, whenever it halted.
                    before_BHTK = self.buffer[act_step - 1, lane, part, :, :, self._start : self._used]
                    new_BHTK = torch.where(self._active_B1T1, new_BHTK, before_BHTK)
                kept_BHSK[:, :, self._start :] = new_BHTK
            else:
                kept_BHSK[self._rows, :, self._positions] = new_BHTK.transpose(1, 2)
        return all_positions[0], all_positions[1]

    def carry_halted(self, halted_at_B: Tensor, position_B: Tensor) -> None:
        """A token that halted at step h (from 0) shows every deeper step its keys and values of step h (contract of halting).

        halted_at_B: the step of each row's token; position_B: where that token stands.
        """
        rows = self._rows.squeeze(1)
        own_BCEHK = self.buffer[halted_at_B, :, :, rows, :, position_B]
        for step in range(1, self.buffer.shape[0]):
            deeper = halted_at_B < step
            self.buffer[step][:, :, rows[deeper], :, position_B[deeper]] = own_BCEHK[deeper]


@dataclass(frozen=True)
class _CachedLane:
    cache: KVCache
    act_step: int
    lane: int

    def exchange(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.store(self.act_step, self.lane, (k_BHTK, v_BHTK))


@dataclass(frozen=True)
class _CachedStep:
    cache: KVCache
    act_step: int

    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        return [_CachedLane(self.cache, self.act_step, first_lane + layer) for layer in range(layers)]


class HeldLanes:
    """Whole rows refined step by step while some tokens have already halted: those keep the keys and values they halted with."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._active_B1T1: Tensor | None = None

    def at_step(self, act_step: int, active_BT: Tensor | None) -> StepLanes:
        """The lanes of ACT step `act_step`; steps must come in order. `active_BT` as in `Lanes`."""
        self._active_B1T1 = None if active_BT is None or act_step == 0 else active_BT[:, None, :, None]
        return self

    def of_call(self, first_lane: int, layers: int) -> list[Lane]:
        """The lanes of one level call; see `StepLanes`."""
        return [_HeldLane(self, first_lane + layer) for layer in range(layers)]

    def hold(self, key: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the active tokens' keys and values of a lane, return the lane."""
        if self._active_B1T1 is not None:
            k_old, v_old = self._kept[key]
            k_BHTK = torch.where(self._active_B1T1, k_BHTK, k_old)
            v_BHTK = torch.where(self._active_B1T1, v_BHTK, v_old)
        self._kept[key] = (k_BHTK, v_BHTK)
        return k_BHTK, v_BHTK


@dataclass(frozen=True)
class _HeldLane:
    lanes: HeldLanes
    key: int

    def exchange(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        return self.lanes.hold(self.key, k_BHTK, v_BHTK)
