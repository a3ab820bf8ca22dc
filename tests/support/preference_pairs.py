"""Preference pairs of ragged length for tests."""

import json
import random
from pathlib import Path
from typing import Any

SYSTEM = "You add numbers. Answer with the sum."


def sums(count: int, seed: int = 0, *, ragged: bool = False) -> list[dict[str, Any]]:
    """Return pairs of a right and a wrong sum; every third begins with a system prompt.

    Args:
        ragged: right answers differ in length too.
    """
    generator = random.Random(seed)
    rows = []
    for index in range(count):
        numbers = [generator.randint(1, 99) for _ in range(generator.randint(2, 6))]
        prompt = [{"role": "user", "content": " + ".join(map(str, numbers))}]
        if index % 3 == 0:
            prompt.insert(0, {"role": "system", "content": SYSTEM})
        right = json.dumps({"sum": str(sum(numbers))}) + " is right" * (index % 3 if ragged else 0)
        wrong = str(sum(numbers) + generator.choice((-1, 1, 10))) + " is the sum" * generator.randint(0, 3)
        answers = ({"role": "assistant", "content": text} for text in (right, wrong))
        rows.append({"prompt": prompt, "chosen": [next(answers)], "rejected": [next(answers)]})
    return rows


def write_pairs(path: Path, *, count: int = 24, seed: int = 0, ragged: bool = False) -> Path:
    """Write pairs as JSON lines."""
    lines = [json.dumps(row) + "\n" for row in sums(count, seed, ragged=ragged)]
    path.write_text("".join(lines), encoding="utf-8")
    return path
