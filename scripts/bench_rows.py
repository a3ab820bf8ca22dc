"""Write conversations for benchmarks: slices of this project's documents, of log-normal lengths, the same for one seed.

Tokens of `scripts/random_model.py` are bytes, so that lengths in tokens are known: `--median` and `--sigma` are those of
the logarithm of prompt and answer together, `--longest` bounds a row with its template.

Example: ``python scripts/bench_rows.py build/rows.jsonl --rows 2000 --median 700 --sigma 0.9 --longest 2048``
"""

import argparse
import json
import math
import random
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATE_TOKENS = 64
"""At most what turns are wrapped in."""
SHORTEST = 16
SIGMA = 0.9


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--median", type=float, default=700)
    parser.add_argument("--sigma", type=float, default=SIGMA)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_rows(
        options.output, num_rows=options.rows, median=options.median, longest=options.longest, sigma=options.sigma,
        seed=options.seed,
    )  # fmt: skip


def write_rows(
    output: Path, *, num_rows: int, median: float, longest: int, sigma: float = SIGMA, seed: int = 0
) -> None:
    """Write conversations; lengths are in tokens."""
    draw = random.Random(seed)
    text = "".join(path.read_text(encoding="ascii", errors="ignore") for path in sorted((ROOT / "docs").glob("*.md")))
    text = text.replace("<|", "< |")  # special tokens are not content
    with output.open("w", encoding="utf-8") as file:
        for _ in range(num_rows):
            length = round(draw.lognormvariate(math.log(median), sigma))
            length = min(max(length, SHORTEST), longest - TEMPLATE_TOKENS)
            prompt, answer = (_slice(text, length // 2, draw) for _ in range(2))
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def _slice(text: str, length: int, draw: random.Random) -> str:
    begin = draw.randrange(len(text))
    repeated = text[begin:] + text * (length // len(text) + 1)
    return repeated[:length].strip() or "-"


if __name__ == "__main__":
    main()
