"""Random numbers keyed by their purpose, so that they don't depend on the order of work.

Built from raw bits: NumPy keeps their streams across versions, but not those of a Generator's
methods.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def raw_bits(seed: int, *purpose: object) -> np.random.Philox:
    """A stream of raw bits that depends only on the seed and `purpose`."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *purpose))).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(digest, np.uint64))


def uniform(bits: np.random.Philox, *shape: int) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) of the given shape."""
    # The upper 53 bits: the precision of float64.
    return (bits.random_raw(int(np.prod(shape))) >> np.uint64(11)).reshape(shape).astype(np.float64) / 2**53


def permutations(bits: np.random.Philox, count: int, size: int) -> npt.NDArray[np.int64]:
    """Permutations of 0..size-1, [count, size]."""
    return np.argsort(bits.random_raw(count * size).reshape(count, size), axis=1, kind="stable")


def subsample(bits: np.random.Philox, total: int, count: int | None) -> npt.NDArray[np.int64]:
    """`count` of 0..total-1 in ascending order; None: all."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.argsort(bits.random_raw(total), kind="stable")[:count])
