"""The results of `scripts/bench_gpu.sh` in a folder as one page of Markdown; what is not there is said to be missing.

Example: ``python scripts/bench_gpu_table.py build/gpu/results``
"""

import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import bench_memory
import bench_run

Lines = Iterator[str]


def main() -> None:
    """Print the page."""
    print("\n".join(page(Path(sys.argv[1]))))


def page(folder: Path) -> Lines:
    """Yield the lines of all parts."""
    parts: tuple[tuple[str, str, Callable[[Path], Lines]], ...] = (
        ("Machine", "machine.txt", verbatim),
        ("Tests that need a GPU", "tests.txt", last_line),
        ("The main job: trained, killed, resumed", "run.json", run),
        ("Kernels", "kernels.txt", verbatim),
        ("A step on packed rows", "step.json", step),
        ("Beside other trainers", "peers-*.json", peers),
        ("The longest row under a cap on memory", "memory.jsonl", memory),
        ("Pieces", "pieces.txt", verbatim),
    )
    for title, pattern, lines_of in parts:
        yield from (f"## {title}", "")
        files = sorted(folder.glob(pattern))
        for file in files:
            yield from lines_of(file)
        yield from ((f"{pattern}: missing", "") if not files else ("",))


def verbatim(file: Path) -> Lines:
    """Yield a file as it is."""
    yield from ("```", *file.read_text().rstrip().splitlines(), "```")


def last_line(file: Path) -> Lines:
    """Yield what a test run ends with."""
    yield file.read_text().rstrip().splitlines()[-1]


def run(file: Path) -> Lines:
    """Yield the checks of the main job, the loss and the memory."""
    yield from ("```", *bench_run.table(json.loads(file.read_text())), "```")


def step(file: Path) -> Lines:
    """Yield a line for each path of a step: the median of the rounds, and of the ratios within each."""
    speeds: dict[str, list[float]] = json.loads(file.read_text())["tokens_per_second"]
    yield from ("| path | tokens/s | of plain |", "|---|---|---|")
    for path, found in speeds.items():
        ratio = statistics.median(own / plain for own, plain in zip(found, speeds["plain"], strict=True))
        yield f"| {path} | {statistics.median(found):,.0f} | {ratio:.2f} x |"


def peers(file: Path) -> Lines:
    """Yield the table that was printed."""
    yield from ("```", *json.loads(file.read_text())["table"], "```")


def memory(file: Path) -> Lines:
    """Yield a line a cap."""
    yield from bench_memory.table(bench_memory.read_trials(file))


if __name__ == "__main__":
    main()
