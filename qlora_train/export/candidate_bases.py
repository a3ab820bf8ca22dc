"""The bases that a merge tries."""

from typing import Literal

MergeBase = Literal["original", "dequantized"]


def candidate_bases(
    merge_base: str, *, stored_in_4bit: bool, load_in_4bit: bool, measured: bool
) -> tuple[tuple[MergeBase, ...], str]:
    """Return the kinds of base to try, the trained one first, and why `auto` tries only one."""
    if merge_base != "auto":
        return ("original" if merge_base == "original" else "dequantized",), ""
    if stored_in_4bit:
        return ("dequantized",), "the base is stored in 4 bits and has no original weights"
    if not load_in_4bit:
        return ("original",), "the run did not quantize"
    if not measured:
        return ("dequantized",), "no held-out rows to compare bases on; it is what was trained"
    return ("dequantized", "original"), ""
