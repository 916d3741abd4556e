"""Slots: which example each row of the batch works on, at which ACT step, and when it leaves. Numbers only, no tensors of a model.

Every example that enters is trained until it halts; a freed slot takes the next example of the run's fixed order. All draws are
counter-based on (seed, epoch, example), so the assignment doesn't depend on workers, ranks or restarts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from config.schema import HaltConfig
from dataset.text.loader import Example

# Separates this module's draws from others that are keyed by the same (seed, epoch, example).
_DEPTH_DRAW = 1


def depth_distribution(max_steps: int, floor: float, deep: bool = False) -> np.ndarray:
    """Probability of each depth 1..max_steps: min(floor, 1 / max_steps) or more, the rest on the first or, `deep`, the last."""
    probabilities = np.full(max_steps, min(floor, 1 / max_steps))
    probabilities[-1 if deep else 0] += 1 - probabilities.sum()
    return probabilities


def drawn_depth(seed: int, epoch: int, example: int, probabilities: np.ndarray) -> int:
    """The depth (from 1) drawn for one pass of one example."""
    uniform = np.random.Generator(np.random.Philox(key=seed, counter=[0, _DEPTH_DRAW, example, epoch])).random()
    passed = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
    return min(passed, len(probabilities) - 1) + 1


@dataclass(frozen=True)
class Entry:
    """An example that enters a slot."""

    slot: int
    epoch: int
    example_id: int
    example: Example


class Slots:
    """One array of B slots. `refill`, train a step, `advance` with the rows that halted, and again while `busy`.

    epoch, example_id, act_step (steps done so far) and depth (drawn at entry) are int64[B]; active is bool[B].
    """

    def __init__(
        self, size: int, stream: Iterator[tuple[int, int, Example]], halt: HaltConfig, max_steps: int, seed: int, total: int
    ) -> None:
        """`total`: examples of the whole run, of which `halt.deepen_at` is a share."""
        self.size = size
        self.max_steps = max_steps
        self.admitted = 0
        self.finished = 0
        self.epoch = np.zeros(size, np.int64)
        self.example_id = np.full(size, -1, np.int64)
        self.act_step = np.zeros(size, np.int64)
        self.depth = np.zeros(size, np.int64)
        self.active = np.zeros(size, bool)
        self._halt = halt
        self._stream = stream
        self._seed = seed
        self._deepen_from = halt.deepen_at * total
        self._probabilities = [depth_distribution(max_steps, halt.depth_floor, deep) for deep in (False, True)]

    def refill(self) -> list[Entry]:
        """Give the next examples to the free slots, in ascending order; fewer or none at the end of the run."""
        entries = []
        for slot in np.flatnonzero(~self.active).tolist():
            following = next(self._stream, None)
            if following is None:
                break
            epoch, example_id, example = following
            self.epoch[slot], self.example_id[slot], self.act_step[slot] = epoch, example_id, 0
            if self._halt.mode == "fixed":
                self.depth[slot] = self.max_steps
            else:
                probabilities = self._probabilities[self.admitted >= self._deepen_from]
                self.depth[slot] = drawn_depth(self._seed, epoch, example_id, probabilities)
            self.active[slot] = True
            self.admitted += 1
            entries.append(Entry(slot, epoch, example_id, example))
        return entries

    def halted(self, settled_share: np.ndarray) -> np.ndarray:
        """Which active rows leave after the step just trained (bool[B]).

        settled_share: float[B], share of a row's supervised tokens that is settled; read in mode "settled" only.
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
        self.finished += int(halted.sum())

    @property
    def busy(self) -> bool:
        """Whether any row is still being trained."""
        return bool(self.active.any())
