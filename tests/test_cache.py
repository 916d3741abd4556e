"""What the decoding cache stores, how rows extend it, and what a halted token shows deeper steps."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from config.schema import PretrainInstructConfig
from models.cache import HeldAttention, KVCache, extend_call
from models.layers import BlockStack, RowAttention

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
    """Queries, keys and values [B, T, H, K]."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(3, rows, positions, HEADS, CHANNELS, dtype=torch.float64, generator=generator))


def test_filling_stores_each_prompt_in_its_rows_and_no_padding(cache: KVCache) -> None:
    # Prompts of 3 and 5 tokens, which stand side by side with padding behind each; the second one, for instance, goes to row 0.
    short, long = slice(0, 3), slice(4, 9)
    attend = RowAttention(is_causal=True)
    filling = cache.fill([0, 1], [long, short], lambda *qkv: attend(*(x[None] for x in qkv))[0])
    stored = []
    for lane in range(STEPS * LANES):
        qkv = values(10, lane, rows=1)
        assert torch.equal(filling(*(x[0] for x in qkv)), attend(*qkv)[0])
        stored.append([x[0].transpose(0, 1) for x in qkv[1:]])
    for (step, lane), kv in zip(itertools.product(range(STEPS), range(LANES)), stored, strict=True):
        for part in range(2):
            assert torch.equal(cache.buffer[0, step, lane, part, :, :5], kv[part][:, long])
            assert torch.equal(cache.buffer[1, step, lane, part, :, :3], kv[part][:, short])
    assert not cache.buffer[0, ..., 5:, :].any() and not cache.buffer[1, ..., 3:, :].any()


@given(
    starts=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    steps=st.tuples(st.integers(0, STEPS - 1), st.integers(0, STEPS - 1)),
)
def test_each_row_attends_to_its_own_past_at_its_own_step(starts: tuple[int, int], steps: tuple[int, int]) -> None:
    cache, other = (
        KVCache(
            rows=ROWS, act_steps=STEPS, lanes=2, heads=HEADS, positions=POSITIONS, head_dim=CHANNELS, dtype=torch.float64,
            device=torch.device("cpu"),
        )
        for _ in range(2)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    cache.buffer.copy_(torch.randn(cache.buffer.shape, dtype=torch.float64, generator=generator))
    other.buffer.copy_(cache.buffer)
    after = cache.buffer.clone()
    row_by_row = cache.extend([0, 1], steps, starts)
    numbers = (torch.tensor(numbers) for numbers in ([0, 1], steps, starts))
    together = other.extend_together(*numbers, max(starts), compiled=False)
    for lane in range(2):
        q, k, v = values(1, lane)
        y = row_by_row(q, k, v)
        torch.testing.assert_close(together(q, k, v), y, rtol=0, atol=1e-12)
        for row, (step, start) in enumerate(zip(steps, starts, strict=True)):
            for part, new in enumerate((k, v)):
                after[row, step, lane, part, :, start] = new[row, 0]
            keys, vals = after[row, step, lane, :, :, : start + 1]
            expected = torch.softmax(q[row].transpose(0, 1) @ keys.transpose(1, 2) / CHANNELS**0.5, -1) @ vals
            torch.testing.assert_close(y[row].transpose(0, 1), expected, rtol=0, atol=1e-12)
    assert torch.equal(cache.buffer, after) and torch.equal(other.buffer, after)


def test_a_compiled_level_call_only_reads_the_cache(cache: KVCache, tiny_config: Callable[..., PretrainInstructConfig]) -> None:
    """And gives what layers that store as they attend give."""
    stack = BlockStack(2, tiny_config("arch.hidden_size=8", "arch.num_heads=2").arch).double()
    generator = torch.Generator().manual_seed(1)
    cache.buffer.copy_(torch.randn(cache.buffer.shape, dtype=torch.float64, generator=generator))
    before = cache.buffer.clone()
    h_B1D = torch.randn(ROWS, 1, 8, dtype=torch.float64, generator=generator)
    rows_B, act_steps_B, starts_B = torch.tensor([[0, 1], [1, 2], [4, 3]])
    lanes_LB = (rows_B * STEPS + act_steps_B) * LANES + torch.arange(2).unsqueeze(1)
    found, new_LB2HK = extend_call(stack, h_B1D, None, cache.buffer.flatten(0, 2), lanes_LB, torch.arange(4) < starts_B[:, None])
    assert torch.equal(cache.buffer, before)
    assert torch.equal(found, stack(h_B1D, None, cache.extend_together(rows_B, act_steps_B, starts_B, 4, compiled=False)))
    assert torch.equal(new_LB2HK, cache.buffer.flatten(0, 2)[lanes_LB, :, :, starts_B])


def test_a_halted_token_shows_deeper_steps_what_it_halted_with(cache: KVCache) -> None:
    cache.buffer.copy_(torch.arange(cache.buffer.numel(), dtype=torch.float64).view(cache.buffer.shape))
    before = cache.buffer.clone()
    cache.carry_halted(1, position=3, halted_at=0, act_steps=2)
    expected = before.clone()
    expected[1, 1, :, :, :, 3] = before[1, 0, :, :, :, 3]
    assert torch.equal(cache.buffer, expected), "not beyond the steps that the token may take"


def test_held_tokens_keep_the_keys_and_values_they_halted_with() -> None:
    attend = RowAttention(is_causal=True)
    held = HeldAttention(attend)
    # Of two lanes, in three ACT steps.
    (first, other), *later = ([values(5, 2 * step + lane) for lane in range(2)] for step in range(3))
    assert torch.equal(held(*first), attend(*first)) and torch.equal(held(*other), attend(*other))
    kept = [first[1:], other[1:]]
    is_active = torch.tensor([[True, False, True, False, False], [False, True, True, True, True]])
    for qkv in later:
        held.active_BT = is_active
        for lane, (q, *kv) in enumerate(qkv):
            kept[lane] = [torch.where(is_active[..., None, None], new, old) for new, old in zip(kv, kept[lane], strict=True)]
            assert torch.equal(held(q, *kv), attend(q, *kept[lane]))
        is_active = is_active & torch.tensor([True, True, False, True, True])
    torch.testing.assert_close(list(held.lanes), [tuple(kv) for kv in kept], rtol=0, atol=0)
