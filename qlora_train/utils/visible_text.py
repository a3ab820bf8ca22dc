"""Text from data, models and configs, made safe for a terminal."""

import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of control characters, changes of the writing direction and other invisible characters."""
JOINERS = "\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
"""Invisible characters that emoji and several scripts need."""


def visible(text: str, keep: str = "") -> str:
    """Escape invisible and control characters, except those in `keep`."""
    return "".join(
        character
        if character in JOINERS or character in keep or unicodedata.category(character) not in INVISIBLE
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shortened(text: str, max_characters: int) -> str:
    """Return a text, of a long one the beginning and the end."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
