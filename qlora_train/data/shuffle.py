"""Shuffles that are pure functions of their arguments, independent of library versions."""

import numpy as np
import numpy.typing as npt

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL_BITS = (1 << 64) - 1


def shuffle_hash(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Hash each value with a key: SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Generators", 2014)."""
    with np.errstate(over="ignore"):
        result = values + np.uint64(GOLDEN * (key + 1) & ALL_BITS)
        result = (result ^ (result >> np.uint64(30))) * np.uint64(MIX_1)
        result = (result ^ (result >> np.uint64(27))) * np.uint64(MIX_2)
        return result ^ (result >> np.uint64(31))


def permutation(count: int, *keys: int) -> npt.NDArray[np.int64]:
    """Return a permutation of the numbers below `count` that the keys decide, int64 (count,)."""
    values = np.arange(count, dtype=np.uint64)
    for key in keys:
        values = shuffle_hash(values, key)
    return np.argsort(values, kind="stable").astype(np.int64)
