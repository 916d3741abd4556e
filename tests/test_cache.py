"""What the decoding cache stores, how rows extend it, and what a halted token shows deeper steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.cache import ExtendingLanes, HeldLanes, KVCache, PastLane
from models.layers import Mask, attend

STEPS, LANES, ROWS, HEADS, POSITIONS, CHANNELS = 3, 4, 2, 2, 12, 4


@pytest.fixture
def cache() -> KVCache:
    made = KVCache(
        rows=ROWS,
        act_steps=STEPS,
        lanes=LANES,
        heads=HEADS,
        positions=POSITIONS,
        head_dim=CHANNELS,
        dtype=torch.float64,
        device=torch.device("cpu"),
    )
    made.buffer.zero_()
    return made


def values(positions: int, seed: int, rows: int = ROWS) -> list[torch.Tensor]:
    """Queries, keys and values [B, H, T, K]."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, rows, HEADS, positions, CHANNELS, dtype=torch.float64, generator=generator))


def test_filling_stores_each_prompt_in_its_rows_and_no_padding(cache: KVCache) -> None:
    # Prompts of 3 and 5 tokens; the second one, for instance, goes to row 0.
    lanes = cache.fill([0, 1], [1, 0], [3, 5])
    stored = {}
    for step in range(STEPS):
        for call in range(LANES // 2):
            for layer, lane in enumerate(lanes.at_step(step, None).of_call(2 * call, 2)):
                q, k, v = values(5, 100 * step + 10 * call + layer)
                mask = Mask(is_causal=True)
                assert torch.equal(lane.attend(q, k, v, mask), attend(q, k, v, mask))
                stored[step, 2 * call + layer] = (k, v)
    for (step, number), kv in stored.items():
        for part in range(2):
            assert torch.equal(cache.buffer[0, step, number, part, :, :5], kv[part][1])
            assert torch.equal(cache.buffer[1, step, number, part, :, :3], kv[part][0, :, :3])
    assert not cache.buffer[0, ..., 5:, :].any() and not cache.buffer[1, ..., 3:, :].any()


@given(
    starts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    steps=st.tuples(st.integers(0, STEPS - 1), st.integers(0, STEPS - 1)),
)
def test_each_row_attends_to_its_own_past_at_its_own_step(starts: tuple[int, int], steps: tuple[int, int]) -> None:
    cache = KVCache(
        rows=ROWS, act_steps=STEPS, lanes=1, heads=HEADS, positions=POSITIONS, head_dim=CHANNELS, dtype=torch.float64,
        device=torch.device("cpu"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    cache.buffer.copy_(torch.randn(cache.buffer.shape, dtype=torch.float64, generator=generator))
    before = cache.buffer.clone()
    q, k, v = values(1, 2)
    lanes_B = torch.tensor([steps[0], STEPS + steps[1]])
    lane = PastLane(cache.buffer.flatten(0, 2), lanes_B, torch.arange(max(2, *starts)) < torch.tensor(starts)[:, None])
    together = lane.attend(q, k, v, Mask())
    assert torch.equal(lane.new_B2HK, torch.stack((k[:, :, 0], v[:, :, 0]), 1)) and torch.equal(cache.buffer, before)
    lanes = cache.extend([0, 1], steps, starts)
    assert isinstance(lanes, ExtendingLanes)
    y = lanes.of_call(0, 1)[0].attend(q, k, v, Mask())
    torch.testing.assert_close(together, y, rtol=0, atol=1e-12)
    for row, (step, start) in enumerate(zip(steps, starts, strict=True)):
        past = before[row, step, 0, :, :, :start]
        keys, vals = (torch.cat((past[part], new[row]), 1) for part, new in ((0, k), (1, v)))
        expected = torch.softmax(q[row] @ keys.transpose(1, 2) / CHANNELS**0.5, -1) @ vals
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-12)
        after = before[row].clone()
        after[step, 0, 0, :, start], after[step, 0, 1, :, start] = k[row, :, 0], v[row, :, 0]
        assert torch.equal(cache.buffer[row], after)


def test_a_halted_token_shows_deeper_steps_what_it_halted_with(cache: KVCache) -> None:
    cache.buffer.copy_(torch.arange(cache.buffer.numel(), dtype=torch.float64).view(cache.buffer.shape))
    before = cache.buffer.clone()
    cache.carry_halted(1, position=3, halted_at=0, act_steps=2)
    expected = before.clone()
    expected[1, 1, :, :, :, 3] = before[1, 0, :, :, :, 3]
    assert torch.equal(cache.buffer, expected), "not beyond the steps that the token may take"


@pytest.mark.parametrize("call", [0, 3])
def test_held_lanes_take_new_keys_of_active_tokens_only(call: int) -> None:
    lanes = HeldLanes()
    all_active = torch.ones(ROWS, 5, dtype=torch.bool)
    first, second, third = (values(5, seed) for seed in range(3))
    mask = Mask(is_causal=True)
    lane, other = lanes.at_step(0, all_active).of_call(2 * call, 2)
    assert torch.equal(lane.attend(*first, mask), attend(*first, mask))
    other.attend(*third, mask)
    active = torch.tensor([[True, False, True, False, False], [False, True, True, True, True]])
    lane, other = lanes.at_step(1, active).of_call(2 * call, 2)
    where = active[:, None, :, None]
    k, v = (torch.where(where, new, old) for new, old in zip(second[1:], first[1:], strict=True))
    assert torch.equal(lane.attend(*second, mask), attend(second[0], k, v, mask))
    # Another layer's lane is not touched by it.
    assert torch.equal(other.attend(*third, mask), attend(*third, mask))


def test_held_lanes_keep_nothing_while_no_token_may_halt() -> None:
    lanes = HeldLanes()
    for step in range(2):
        (lane,) = lanes.at_step(step, None).of_call(0, 1)
        new = values(5, step)
        assert torch.equal(lane.attend(*new, Mask()), attend(*new, Mask()))
    assert not lanes._kept
