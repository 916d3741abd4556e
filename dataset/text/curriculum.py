"""The order of a run's examples: consecutive stages, each a mix of sources. Numbers only; knows no
files or tokens.

The n-th example depends only on n, the seed, the stages and the sources' sizes, so a run resumes
from n.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, repeat
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from config.errors import UsageError
from config.schema import StageConfig

# Two random orders share (seed, round, stage): that of a source's rows, that of the sources.
_ORDER_OF_ROWS, _ORDER_OF_SOURCES = 0, 1
_DRAWS_AT_ONCE = 4096


class Draw(NamedTuple):
    """One example of the order. No two draws of a run are equal."""

    stage: int
    epoch: int
    """Pass over the source, within the stage."""
    example_id: int
    """Row number, over all sources in order."""


@dataclass(frozen=True)
class Stage:
    """`rounds` rounds of quotas[s] examples of each source s, each round in another order."""

    rounds: int
    quotas: tuple[int, ...]

    @property
    def per_round(self) -> int:
        """Examples of a round."""
        return sum(self.quotas)

    @property
    def total(self) -> int:
        """Examples of the stage."""
        return self.rounds * self.per_round


@dataclass(frozen=True)
class Curriculum:
    """The order of a run's examples. sizes: rows of each source.

    In a stage, a source's rows come in consecutive permutations, keyed by (seed, stage, source,
    pass): no row repeats before all rows have come. Another permutation mixes the sources of a
    stage.
    """

    seed: int
    sizes: tuple[int, ...]
    stages: tuple[Stage, ...]

    @classmethod
    def of_epochs(cls, rows: int, seed: int, epochs: int) -> "Curriculum":
        """Passes over one source."""
        return cls(seed, (rows,), (Stage(epochs, (rows,)),))

    @classmethod
    def of_stages(cls, stages: Sequence[StageConfig], sizes: Mapping[str, int], seed: int) -> "Curriculum":
        """`stages` over sources of these sizes, by name. Raises `UsageError` if a stage has none of a source's examples."""
        return cls(seed, tuple(sizes.values()), tuple(_stage(number, stage, sizes) for number, stage in enumerate(stages)))

    @property
    def total(self) -> int:
        """Examples of the run."""
        return sum(stage.total for stage in self.stages)

    def stage_of(self, position: int) -> int:
        """The stage of example number `position`, from 0; at the end of the run, the last stage."""
        ends = accumulate(stage.total for stage in self.stages)
        return next((number for number, end in enumerate(ends) if position < end), len(self.stages) - 1)

    def begin_of(self, stage: int) -> int:
        """Examples before a stage."""
        return sum(earlier.total for earlier in self.stages[:stage])

    def rounds_before(self, position: int) -> int:
        """Whole rounds in the first `position` examples; evaluation counts them as epochs."""
        rounds = 0
        for stage in self.stages:
            if position < stage.total:
                return rounds + position // stage.per_round
            rounds, position = rounds + stage.rounds, position - stage.total
        return rounds

    def draws(self, start: int = 0) -> Iterator[Draw]:
        """The order from example number `start` on."""
        for number, stage in enumerate(self.stages):
            for taken in range(stage.rounds):
                if start >= stage.per_round:
                    start -= stage.per_round
                    continue
                epochs, ids = self._round(number, taken)
                # In parts: as Python integers, millions of rows would take much memory.
                for at in range(start, stage.per_round, _DRAWS_AT_ONCE):
                    part = slice(at, at + _DRAWS_AT_ONCE)
                    yield from map(Draw, repeat(number), epochs[part].tolist(), ids[part].tolist())
                start = 0

    def _round(self, number: int, taken: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Epoch and example id of each example of a stage's round."""
        stage = self.stages[number]
        drawn = [self._rows(number, source, taken * quota, quota) for source, quota in enumerate(stage.quotas)]
        epochs, ids = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
        if np.count_nonzero(stage.quotas) < 2:
            return epochs, ids
        # The order of the sources is random. Each source gives its next row.
        order = np.repeat(np.arange(len(stage.quotas)), stage.quotas)
        order = order[permutation(len(order), self.seed, taken, stage=number, kind=_ORDER_OF_SOURCES)]
        place = np.argsort(np.argsort(order, kind="stable"))
        return epochs[place], ids[place]

    def _rows(self, stage: int, source: int, first: int, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Epoch and example id of `count` examples of a source, after its first `first`."""
        size = self.sizes[source]
        numbers = np.arange(first, first + count)
        epochs = numbers // max(1, size)
        begin = sum(self.sizes[:source])
        ids = [
            begin + permutation(size, self.seed, epoch, stage=stage, source=source)[numbers[epochs == epoch] % size]
            for epoch in np.unique(epochs).tolist()
        ]
        return epochs, np.concatenate(ids) if ids else numbers


def permutation(
    n: int, seed: int, epoch: int, *, stage: int = 0, source: int = 0, kind: int = _ORDER_OF_ROWS
) -> npt.NDArray[np.int64]:
    """A permutation of n, int64 [n], keyed by all arguments and the same on every machine."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64), counter=np.array([0, kind, source, stage], np.uint64))
    # Raw bits: NumPy keeps their stream across versions, but not that of Generator.permutation.
    return np.argsort(bits.random_raw(n), kind="stable").astype(np.int64)


def _stage(number: int, stage: StageConfig, sizes: Mapping[str, int]) -> Stage:
    # Exact fractions: the binary 0.1 would need one row more than 0.1.
    weights = {name: Fraction(sizes[name]) if weight is None else Fraction(str(weight)) for name, weight in stage.mix.items()}
    shares = [weights.get(name, Fraction(0)) / sum(weights.values()) for name in sizes]
    if stage.examples is not None:
        rounds, wanted = 1, stage.examples
    else:
        # As many rounds as the slowest source needs.
        rounds = stage.epochs or 1
        wanted = max(-(-size // share) for size, share in zip(sizes.values(), shares, strict=True) if share)
    # Largest-remainder method: whole examples of each source, closest to the weights.
    quotas = [int(share * wanted) for share in shares]
    rest = sorted(range(len(quotas)), key=lambda source: quotas[source] - shares[source] * wanted)
    for source in rest[: wanted - sum(quotas)]:
        quotas[source] += 1
    missing = [name for name, quota in zip(sizes, quotas, strict=True) if name in stage.mix and quota == 0]
    if missing:
        raise UsageError(
            f"stages[{number}]: {wanted} examples leave none for {', '.join(missing)}: raise its examples, or the weight in its mix"
        )
    return Stage(rounds, tuple(quotas))
