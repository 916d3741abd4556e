"""Slots lose nothing (contract 4) and let rows go as their mode says, without ever seeing a label."""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.schema import HaltConfig
from dataset.text.curriculum import Curriculum, Draw
from dataset.text.loader import Example, ExampleStream
from training.slots import Slots, depth_distribution, drawn_depth

ROW = Example(np.zeros(3, np.int32), np.ones(3, bool), np.zeros(3, np.int32), 1)


def halting(mode: str, floor: float = 0.1, share: float = 0.95) -> HaltConfig:
    return HaltConfig(
        mode=mode, depth_floor=floor, deepen_at=1.0, settled_share=share, settled_probability=0.5, bias=-1.0, backprop=False
    )


def passes(examples: int, seed: int, epochs: int) -> ExampleStream:
    return ExampleStream([ROW] * examples, Curriculum.of_epochs(examples, seed, epochs), 0)


def run(
    slots: Slots, settled: Callable[[Slots], np.ndarray]
) -> Iterator[tuple[list[tuple[int, int, int]], list[tuple[int, int, int, int]]]]:
    """Each step's entries (slot, epoch, example) and departures (slot, epoch, example, steps taken)."""
    entered = [(e.slot, e.draw.epoch, e.draw.example_id) for e in slots.refill()]
    while slots.busy:
        halted = slots.halted(settled(slots))
        slots.advance(halted)
        left = [(int(s), int(slots.epoch[s]), int(slots.example_id[s]), int(slots.act_step[s])) for s in np.flatnonzero(halted)]
        yield entered, left
        entered = [(e.slot, e.draw.epoch, e.draw.example_id) for e in slots.refill()]
    assert not entered


@pytest.mark.parametrize("mode", ["fixed", "sampled", "settled"])
def test_every_drawn_example_halts_exactly_once_an_epoch(mode: str) -> None:
    examples, epochs, size, deepest = 256, 2, 8, 5
    stream = passes(examples, 0, epochs)
    slots = Slots(size, stream, halting(mode), deepest, seed=0, total=epochs * examples)
    order = [(draw.epoch, draw.example_id) for draw, _ in passes(examples, 0, epochs)]
    drawn, halted, depths, per_step, depth_at_entry = [], [], Counter(), [], {}
    # Forced short and long halts: even examples settle at once, odd ones never.
    for entered, left in run(slots, lambda s: (s.example_id % 2 == 0).astype(float)):
        for slot, epoch, example in entered:
            drawn.append((epoch, example))
            depth_at_entry[epoch, example] = int(slots.depth[slot])
        for slot, epoch, example, steps in left:
            halted.append((epoch, example))
            depths[steps] += 1
            assert depth_at_entry[epoch, example] == slots.depth[slot], "a depth is drawn once, at entry"
            limit = depth_at_entry[epoch, example]
            expected = {"fixed": deepest, "sampled": limit, "settled": limit if example % 2 == 0 else deepest}[mode]
            assert steps == expected
        per_step.append(len(entered))
    everything = Counter((epoch, example) for epoch in range(epochs) for example in range(examples))
    assert Counter(drawn) == Counter(halted) == everything and drawn == order
    assert slots.admitted == slots.finished == examples * epochs and not slots.active.any()
    assert (len(depths) == 1) == (mode == "fixed")


@given(
    size=st.integers(1, 9),
    examples=st.integers(1, 40),
    epochs=st.integers(1, 3),
    deepest=st.integers(1, 6),
    mode=st.sampled_from(["fixed", "sampled", "settled"]),
    seed=st.integers(0, 5),
)
def test_free_slots_take_the_next_examples_in_ascending_order(
    size: int, examples: int, epochs: int, deepest: int, mode: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    order = [(draw.epoch, draw.example_id) for draw, _ in passes(examples, seed, epochs)]
    slots = Slots(size, passes(examples, seed, epochs), halting(mode), deepest, seed, total=epochs * examples)
    free, position, finished = list(range(size)), 0, 0
    for entered, left in run(slots, lambda s: rng.choice([0.0, 0.94, 0.95, 1.0], s.size)):
        expected = [(slot, *drawn) for slot, drawn in zip(free, order[position:], strict=False)]
        assert entered == expected
        position += len(entered)
        free = sorted([*free[len(entered) :], *(slot for slot, *_ in left)])
        assert all(1 <= steps <= deepest for *_, steps in left)
        finished += len(left)
        # Slots stay full until the stream ends: only the end of the run drains.
        assert position == len(order) or position - finished + len(left) == size
    assert position == finished == len(order)


@given(st.integers(1, 10), st.floats(0.1, 1.0))
def test_every_depth_up_to_ten_has_a_tenth(deepest: int, floor: float) -> None:
    probabilities = depth_distribution(deepest, floor)
    assert len(probabilities) == deepest and probabilities.sum() == pytest.approx(1.0)
    assert (probabilities >= 0.1 - 1e-12).all()
    assert (probabilities >= min(floor, 1 / deepest) - 1e-12).all()


def test_more_than_ten_depths_are_drawn_evenly() -> None:
    assert depth_distribution(16, 0.1) == pytest.approx(np.full(16, 1 / 16))


def test_what_the_floor_leaves_over_goes_to_the_first_depth() -> None:
    assert depth_distribution(4, 0.1) == pytest.approx([0.7, 0.1, 0.1, 0.1])


def test_drawn_depths_follow_the_distribution_and_depend_on_their_key_alone() -> None:
    probabilities = depth_distribution(4, 0.15)
    drawn = [drawn_depth(3, Draw(0, epoch, example), probabilities) for epoch in range(2) for example in range(2000)]
    shares = np.bincount(drawn, minlength=5)[1:] / len(drawn)
    assert shares == pytest.approx(probabilities, abs=0.03)
    assert [drawn_depth(3, Draw(0, 1, example), probabilities) for example in reversed(range(2000))] == drawn[:1999:-1]
    first, second = drawn[:2000], drawn[2000:]
    assert first != [drawn_depth(3, Draw(1, 0, example), probabilities) for example in range(2000)]
    assert first != second and first != [drawn_depth(4, Draw(0, 0, example), probabilities) for example in range(2000)]
    # Another epoch draws independently: both halves agree about as often as chance has it.
    assert np.mean(np.equal(first, second)) == pytest.approx(float((probabilities**2).sum()), abs=0.05)


def test_the_same_examples_get_the_same_depths_whatever_the_number_of_slots() -> None:
    depths = []
    for size in (1, 7):
        slots = Slots(size, passes(30, 0, 1), halting("sampled", 0.25), 4, seed=9, total=30)
        departures = [departure for _, left in run(slots, lambda s: np.zeros(s.size)) for departure in left]
        depths.append({(epoch, example): steps for _, epoch, example, steps in departures})
    assert depths[0] == depths[1] and len(set(depths[0].values())) == 4


def test_settled_rows_leave_at_the_share_from_their_drawn_depth_on() -> None:
    # floor 1 / N on every depth: all depths are drawn.
    slots = Slots(64, passes(64, 0, 1), halting("settled", 0.25, share=0.9), 4, seed=0, total=64)
    slots.refill()
    for step in range(1, 5):
        below, at = slots.halted(np.full(64, 0.89)), slots.halted(np.full(64, 0.9))
        assert below.tolist() == [step == 4] * 64
        assert at.tolist() == [step >= depth or step == 4 for depth in slots.depth.tolist()]
        slots.advance(np.zeros(64, bool))


def test_free_slots_neither_halt_nor_count() -> None:
    slots = Slots(4, passes(2, 0, 1), halting("fixed"), 1, seed=0, total=2)
    assert len(slots.refill()) == 2
    halted = slots.halted(np.ones(4))
    assert halted.tolist() == [True, True, False, False]
    slots.advance(halted)
    assert slots.finished == 2 and not slots.busy and slots.act_step.tolist() == [1, 1, 0, 0] and slots.refill() == []


def test_no_label_and_no_loss_can_reach_the_decision() -> None:
    assert list(inspect.signature(Slots.halted).parameters) == ["self", "settled_share"]


def test_late_in_the_run_the_rest_of_the_draw_goes_to_the_last_depth() -> None:
    assert depth_distribution(4, 0.1, deep=True) == pytest.approx([0.1, 0.1, 0.1, 0.7])
    halt = halting("sampled").model_copy(update={"deepen_at": 0.5})
    slots = Slots(8, passes(400, 0, 1), halt, 4, seed=0, total=400)
    depths = []
    for entered, _ in run(slots, lambda s: np.zeros(s.size)):
        depths += [int(slots.depth[slot]) for slot, _, _ in entered]
    early, late = np.array(depths[:200]), np.array(depths[200:])
    assert (early == 1).mean() > 0.6 and (late == 4).mean() > 0.6
    assert set(early.tolist()) == set(late.tolist()) == {1, 2, 3, 4}


def test_late_by_its_number_of_steps_it_is_the_same() -> None:
    """Where the run is to end after so many steps, its share of them counts if it is larger."""
    halt = halting("sampled").model_copy(update={"deepen_at": 0.5})
    depths = []
    for share in (0.49, 0.5):
        slots = Slots(200, passes(400, 0, 1), halt, 4, seed=0, total=10**6)
        slots.refill(share)
        depths.append(slots.depth)
    early, late = depths
    assert (early == 1).mean() > 0.6 and (late == 4).mean() > 0.6
