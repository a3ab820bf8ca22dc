"""Orders that look random and are pure functions of their arguments, whatever the release of a library."""

import numpy as np
import numpy.typing as npt

GOLDEN, MIX_1, MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
ALL_BITS = (1 << 64) - 1


def mixed(values: npt.NDArray[np.uint64], key: int) -> npt.NDArray[np.uint64]:
    """Return numbers without a pattern, one for each value, unrelated for another key.

    The function is SplitMix64's (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).
    """
    with np.errstate(over="ignore"):
        result = values + np.uint64(GOLDEN * (key + 1) & ALL_BITS)
        result = (result ^ (result >> np.uint64(30))) * np.uint64(MIX_1)
        result = (result ^ (result >> np.uint64(27))) * np.uint64(MIX_2)
        return result ^ (result >> np.uint64(31))


def permutation(count: int, *keys: int) -> npt.NDArray[np.int64]:
    """Return the numbers below `count` in an order that the keys decide, int64 (count,)."""
    values = np.arange(count, dtype=np.uint64)
    for key in keys:
        values = mixed(values, key)
    return np.argsort(values, kind="stable").astype(np.int64)
