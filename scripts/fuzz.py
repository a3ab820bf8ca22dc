"""Look for inputs of which an error escapes that is not ours, by coverage (https://github.com/google/atheris).

::

    python scripts/fuzz.py yaml --seconds 600
    python scripts/fuzz.py jsonl --runs 20000 --seed 1

The corpus begins with the malformed files of the tests. What was found lies in --findings, a file an input, and is run
again with ``python scripts/fuzz.py jsonl --input FILE``. Exit status: 0 nothing was found; 77 an input was.
"""

import argparse
import logging
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))
with atheris.instrument_imports(include=["qlora_train.config", "qlora_train.data", "yaml"]):
    from tests.fuzz.targets import TARGETS, pico_tokenizer, words_of

MAX_INPUT_BYTES = 4096


def main() -> None:
    """Fuzz one target until the time or the runs are over."""
    options = parse()
    target, seeds = TARGETS[options.target]
    logging.getLogger("qlora_train").setLevel(logging.ERROR)  # what is announced of every file
    if options.target == "jsonl":
        pico_tokenizer()  # its imports are none of the first input's coverage
    if options.input is not None:
        target(options.input.read_bytes())
        return
    with tempfile.TemporaryDirectory(prefix="corpus-") as temporary:
        corpus, words = Path(temporary, "corpus"), Path(temporary, "words")
        corpus.mkdir()
        for number, seed in enumerate(seeds()):
            Path(corpus, f"seed-{number:03}").write_bytes(seed[:MAX_INPUT_BYTES])
        words.write_text("".join(f'"{quoted(word)}"\n' for word in words_of(options.target)))
        options.findings.mkdir(parents=True, exist_ok=True)
        limit = f"-runs={options.runs}" if options.runs else f"-max_total_time={options.seconds}"
        atheris.Setup(
            [
                sys.argv[0], str(corpus), limit, f"-seed={options.seed}", f"-dict={words}", f"-max_len={MAX_INPUT_BYTES}",
                "-timeout=30", "-rss_limit_mb=4096", "-print_final_stats=1", f"-artifact_prefix={options.findings}/",
            ],
            target,
        )  # fmt: skip
        atheris.Fuzz()


def quoted(word: str) -> str:
    """Return a word as libFuzzer's dictionaries have it."""
    return "".join(f"\\x{byte:02X}" for byte in word.encode())


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", choices=sorted(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--runs", type=int, help="inputs, instead of seconds: the same ones each time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="run this one input")
    parser.add_argument("--findings", type=Path, default=Path("runs/fuzz"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
