"""Keyed random numbers: the same for the same key, others for another, and evenly spread."""

import numpy as np

from dataset.puzzles.draws import permutations, raw_bits, subsample, uniform


def test_the_key_alone_decides() -> None:
    again = [raw_bits(1, "a", 2).random_raw(4).tolist() for _ in range(2)]
    assert again[0] == again[1]
    others = [raw_bits(*key).random_raw(4).tolist() for key in [(2, "a", 2), (1, "b", 2), (1, "a", 3)]]
    assert len({tuple(stream) for stream in [again[0], *others]}) == 4


def test_permutations_are_even() -> None:
    drawn = permutations(raw_bits(0), 6000, 3)
    _, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(counts) == 6 and np.all(abs(counts - 1000) < 150)


def test_uniform_numbers() -> None:
    numbers = uniform(raw_bits(0), 1000, 2)
    assert numbers.shape == (1000, 2) and numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.03


def test_a_subsample_is_in_order_and_without_repeats() -> None:
    drawn = subsample(raw_bits(0), 100, 30)
    assert len(drawn) == 30 and np.all(np.diff(drawn) > 0) and drawn[-1] < 100
    assert subsample(raw_bits(0), 5, None).tolist() == subsample(raw_bits(0), 5, 9).tolist() == [0, 1, 2, 3, 4]
