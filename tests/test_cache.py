"""What the decoding cache stores, how it grows, and what a halted token shows deeper steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.cache import HeldLanes, KVCache

STEPS, LANES, ROWS, HEADS, CHANNELS = 3, 4, 2, 2, 4


def new_cache() -> KVCache:
    return KVCache(
        act_steps=STEPS,
        lanes=LANES,
        rows=ROWS,
        heads=HEADS,
        head_dim=CHANNELS,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )


def values(positions: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, ROWS, HEADS, positions, CHANNELS, dtype=torch.float64, generator=generator)
    return k, v


def write_everywhere(cache: KVCache, positions: int, seed: int) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    written = {}
    for step in range(STEPS):
        for call in range(LANES // 2):
            for layer, lane in enumerate(cache.at_step(step).of_call(2 * call, 2)):
                new = values(positions, seed + 100 * step + 10 * call + layer)
                lane.exchange(*new)
                written[step, call * 2 + layer] = new
    return written


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_growing_keeps_the_content_and_follows_the_tokens(chunks: list[int]) -> None:
    cache, stored, used = new_cache(), [], 0
    for number, count in enumerate(chunks):
        assert cache.write_at(used, count) == used + count
        stored.append(write_everywhere(cache, count, 1000 * number))
        used += count
        assert used <= cache.capacity <= used + max(32, used // 4)
    for step in range(STEPS):
        for lane in range(LANES):
            for which in range(2):
                expected = torch.cat([chunk[step, lane][which] for chunk in stored], dim=2)
                assert torch.equal(cache.buffer[step, lane, which, :, :, :used], expected)


def test_a_lane_returns_everything_in_use_and_nothing_beyond() -> None:
    cache = new_cache()
    cache.write_at(0, 3)
    first = values(3, 0)
    cache.at_step(0).of_call(0, 1)[0].exchange(*first)
    cache.reserve(64)
    cache.write_at(3, 1)
    second = values(1, 1)
    k, v = cache.at_step(0).of_call(0, 1)[0].exchange(*second)
    assert torch.equal(k, torch.cat((first[0], second[0]), 2)) and torch.equal(v, torch.cat((first[1], second[1]), 2))


def test_rows_write_at_positions_of_their_own() -> None:
    cache = new_cache()
    cache.write_at(0, 5)
    old = values(5, 0)
    cache.at_step(1).of_call(1, 2)[1].exchange(*old)
    assert cache.write_at_positions(torch.tensor([[5], [2]]), 6) == 6
    new = values(1, 1)
    k, v = cache.at_step(1).of_call(1, 2)[1].exchange(*new)
    for kept, before, added in zip((k, v), old, new, strict=True):
        assert torch.equal(kept[0, :, 5], added[0, :, 0]) and torch.equal(kept[1, :, 2], added[1, :, 0])
        assert torch.equal(kept[0, :, :5], before[0]) and torch.equal(kept[1, :, [0, 1, 3, 4]], before[1, :, [0, 1, 3, 4]])


def test_a_halted_token_shows_deeper_steps_what_it_halted_with() -> None:
    cache = new_cache()
    cache.write_at(0, 4)
    write_everywhere(cache, 4, 7)
    before = cache.buffer.clone()
    halted_at, position = torch.tensor([0, 1]), torch.tensor([3, 1])
    cache.carry_halted(halted_at, position)
    for row in range(ROWS):
        for step in range(STEPS):
            for t in range(4):
                is_carried = t == position[row] and step > halted_at[row]
                source = int(halted_at[row]) if is_carried else step
                assert torch.equal(cache.buffer[step, :, :, row, :, t], before[source, :, :, row, :, t])


@pytest.mark.parametrize("call", [0, 3])
def test_held_lanes_take_new_keys_of_active_tokens_only(call: int) -> None:
    lanes = HeldLanes()
    lanes.at_step(0, torch.ones(ROWS, 5, dtype=torch.bool))
    first, second, third = (values(5, seed) for seed in range(3))
    lane = lanes.of_call(2 * call, 2)[1]
    assert all(torch.equal(got, new) for got, new in zip(lane.exchange(*first), first, strict=True))
    lanes.of_call(2 * call, 2)[0].exchange(*third)
    active = torch.tensor([[True, False, True, False, False], [False, True, True, True, True]])
    lanes.at_step(1, active)
    where = active[:, None, :, None]
    expected = [torch.where(where, new, old) for new, old in zip(second, first, strict=True)]
    assert all(torch.equal(got, want) for got, want in zip(lanes.of_call(2 * call, 2)[1].exchange(*second), expected, strict=True))
    # Another layer's lane is not touched by it.
    other = lanes.of_call(2 * call, 2)[0].exchange(*third)
    assert all(torch.equal(got, new) for got, new in zip(other, third, strict=True))
