"""Slots: which example each row of the batch works on, at which ACT step, and when it leaves. Numbers only, no tensors of a model.

Every example that enters is trained until it halts; a freed slot takes the next example of the run's fixed order. All draws are
counter-based on (seed, stage, epoch, example), so the assignment doesn't depend on workers, ranks or restarts.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from config.schema import HaltConfig
from dataset.text.curriculum import Draw
from dataset.text.loader import Example

# Separates this module's draws from others that are keyed by the same (seed, stage, epoch, example).
_DEPTH_DRAW = 1


def depth_distribution(max_steps: int, floor: float, deep: bool = False) -> np.ndarray:
    """Probability of each depth 1..max_steps: min(floor, 1 / max_steps) or more, the rest on the first or, `deep`, the last."""
    probabilities = np.full(max_steps, min(floor, 1 / max_steps))
    probabilities[-1 if deep else 0] += 1 - probabilities.sum()
    return probabilities


def drawn_depth(seed: int, draw: Draw, probabilities: np.ndarray) -> int:
    """The depth (from 1) drawn for one pass of one example."""
    uniform = np.random.Generator(
        np.random.Philox(key=seed, counter=[draw.stage, _DEPTH_DRAW, draw.example_id, draw.epoch])
    ).random()
    passed = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
    return min(passed, len(probabilities) - 1) + 1


@dataclass(frozen=True)
class Entry:
    """An example that enters a slot."""

    slot: int
    """Counted within this rank's part."""
    draw: Draw
    example: Example


class Examples(Protocol):
    """Where examples come from: `dataset.text.loader.ExampleStream`, in the run's fixed order."""

    def __next__(self) -> tuple[Draw, Example]:
        """The next example and where in the order it stands."""

    def skip(self, count: int) -> None:
        """Pass over the next `count` examples."""


class Slots:
    """This rank's slots, a contiguous part of the B of all ranks. `refill`, train a step, `advance`, and again while `busy`.

    stage, epoch, example_id (of the draw), act_step (steps done so far) and depth (drawn at entry) are int64[rows]; active is
    bool[rows].
    """

    def __init__(
        self,
        size: int,
        stream: Examples,
        halt: HaltConfig,
        max_steps: int,
        seed: int,
        total: int,
        part: range | None = None,
    ) -> None:
        """`size`: B. `total`: examples of the run, of which `halt.deepen_at` is a share. `part`: the slots here; None: all."""
        self.size = size
        self.part = range(size) if part is None else part
        self.max_steps = max_steps
        self.admitted = 0
        rows = len(self.part)
        self.stage = np.zeros(rows, np.int64)
        self.epoch = np.zeros(rows, np.int64)
        self.example_id = np.full(rows, -1, np.int64)
        self.act_step = np.zeros(rows, np.int64)
        self.depth = np.zeros(rows, np.int64)
        self.active = np.zeros(rows, bool)
        # Parts are contiguous, so of the other ranks' halted masks only the number of free slots matters, below and above the part.
        self.free_below, self.free_above = self.part.start, size - self.part.stop
        self._halt = halt
        self._stream = stream
        self._seed = seed
        self._total = total
        self._deepen_from = halt.deepen_at * total
        self._probabilities = [depth_distribution(max_steps, halt.depth_floor, deep) for deep in (False, True)]

    def refill(self, share_over: float = 0.0) -> list[Entry]:
        """Give the next examples to the free slots of all ranks, in ascending order; fewer or none at the end of the run.

        share_over: how much of the run is over, if it ends before its data does; `halt.deepen_at` goes by what is further, this or
        the examples admitted.
        """
        self.free_below -= self._pass_over(self.free_below)
        is_late = share_over >= self._halt.deepen_at
        entries = [self._enter(slot, is_late) for slot in np.flatnonzero(~self.active)[: self._total - self.admitted].tolist()]
        self.free_above -= self._pass_over(self.free_above)
        return entries

    def _pass_over(self, free: int) -> int:
        """Leave the next examples to other ranks' free slots; returns how many there were."""
        count = min(free, self._total - self.admitted)
        if count:
            self._stream.skip(count)
            self.admitted += count
        return count

    def _enter(self, slot: int, is_late: bool) -> Entry:
        draw, example = next(self._stream)
        self.stage[slot], self.epoch[slot], self.example_id[slot] = draw
        self.act_step[slot] = 0
        if self._halt.mode == "fixed":
            self.depth[slot] = self.max_steps
        else:
            probabilities = self._probabilities[is_late or self.admitted >= self._deepen_from]
            self.depth[slot] = drawn_depth(self._seed, draw, probabilities)
        self.active[slot] = True
        self.admitted += 1
        return Entry(slot, draw, example)

    def halted(self, settled_share: np.ndarray) -> np.ndarray:
        """Which active rows leave after the step just trained (bool[rows]).

        settled_share: float[rows], share of a row's supervised tokens that is settled; read in mode "settled" only.
        """
        steps = self.act_step + 1
        leaves: np.ndarray = steps >= self.max_steps
        if self._halt.mode == "sampled":
            leaves |= steps >= self.depth
        elif self._halt.mode == "settled":
            leaves |= (steps >= self.depth) & (settled_share >= self._halt.settled_share)
        leaves &= self.active
        return leaves

    def advance(self, halted: np.ndarray) -> None:
        """Count the step for every active row and free the rows that halted."""
        self.act_step[self.active] += 1
        self.active &= ~halted

    @property
    def free(self) -> int:
        """Free slots of this rank."""
        return int(np.count_nonzero(~self.active))

    @property
    def finished(self) -> int:
        """Examples of all ranks that have halted, once `free_below` and `free_above` are up to date."""
        return self.admitted - (self.size - self.free_below - self.free - self.free_above)

    @property
    def busy(self) -> bool:
        """Whether any row of this rank is still being trained."""
        return bool(self.active.any())
