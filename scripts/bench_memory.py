"""The longest row that trains under a cap on memory, for several caps: rank 32, one row, every token a label.

Each trial is a child process that runs the real command on one row of exactly so many tokens, with activations recomputed
and, on a GPU, kept on the host: data, loading, the trial of the largest batch, one optimizer step. Between the longest row
that fits and the shortest that does not, the next length is their geometric mean, until they are within `--precision`.

On a GPU the cap is torch's (`set_per_process_memory_fraction`), less what the context takes, so that the process as a whole
stays below it: a row fits where the run ends well, and does not where the run says that memory ran out, or where the host,
whose memory holds the activations, kills it. A CPU has no such cap, and a process at its limits there ends in ways that say
nothing: a row fits where the most memory that was resident, imports included, stays below the cap. Anything else that goes
wrong ends the search.

Trials are appended to a file, one line each: the same command resumes there.

Example: ``python scripts/bench_memory.py build/llama-3.1-8b --caps 8 12 16 24 48 80 --trials build/memory.jsonl``
"""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qlora_train.config import LoraSection
from qlora_train.planning.memory import plan_memory, step_settings
from qlora_train.planning.run_plan import model_shapes

GIB = 1 << 30
RANK = 32
SHORTEST = 16
FIRST_BYTE = 4
"""Of the tokens of `scripts/random_model.py`, after the special ones; any model has these numbers."""
OUT_OF_MEMORY = "out of memory"
SETTINGS = (
    f"lora.r={RANK}", "data.format=tokens", "data.train_on=all", "train.per_device_train_batch_size=1",
    "train.gradient_accumulation_steps=1", "train.gradient_checkpointing=full", "train.max_steps=1",
    "train.logging_steps=1",
)  # fmt: skip


def main() -> None:
    """Search, or be a trial when told to."""
    options = parsed()
    if options.trial:
        trial(options.model, options.trial, options.caps[0], options.set)
        return
    on_gpu = torch.cuda.is_available()
    begun, known = time.monotonic(), read_trials(options.trials)
    device_gib = device_bytes() / GIB if on_gpu else math.inf
    for cap in options.caps:
        if cap > device_gib:
            print(f"{cap:g} GiB: the GPU has {device_gib:.1f} GiB")
            continue

        def fits(num_tokens: int, cap: float = cap) -> bool:
            if options.minutes is not None and time.monotonic() - begun > 60 * options.minutes:
                raise TimeoutError
            result = try_in_child(options, num_tokens, cap)
            append(options.trials, result)
            print(f"{cap:g} GiB: {num_tokens} tokens: {'fit' if result['fits'] else 'do not fit'}"
                  f" ({result['seconds']:.0f} s)", flush=True)  # fmt: skip
            return bool(result["fits"])

        of_cap = {line["num_tokens"]: line["fits"] for line in known if line["cap_gib"] == cap}
        start = first_guess(options.model, cap, options.longest)
        try:
            longest_that_fits(fits, of_cap, start=start, longest=options.longest, precision=options.precision)
        except TimeoutError:
            print(f"{options.minutes:g} minutes are over; the same command resumes")
            break
    print("\n".join(table(read_trials(options.trials))))


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--caps", type=float, nargs="+", default=[8, 12, 16, 24, 48, 80], metavar="GIB")
    parser.add_argument("--trials", type=Path, default=Path("build/memory.jsonl"), help="the file that remembers them")
    parser.add_argument("--longest", type=int, default=1 << 19, help="no longer row is tried")
    parser.add_argument("--precision", type=float, default=0.03, help="share of the length that is left open")
    parser.add_argument("--minutes", type=float, help="no trial begins after so long")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS", help="a longer trial does not fit")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="settings of the run")
    parser.add_argument("--trial", type=int, metavar="TOKENS", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the search -------------------------------------------------------------------------------------------------------


def longest_that_fits(
    fits: Callable[[int], bool], known: Mapping[int, bool], *, start: int, longest: int, precision: float
) -> int:
    """Return the longest row found to fit; 0 where the shortest that is tried does not.

    Args:
        fits: tries a length.
        known: results of earlier trials, which are not tried again.
        start: the first length, if none is known.
        longest: the greatest length.
        precision: how far above the result, as a share of it, a length may be that was not seen to fail.
    """
    good = max((length for length, fit in known.items() if fit), default=0)
    bad = min((length for length, fit in known.items() if not fit), default=longest + 1)
    while good < longest and bad > SHORTEST and bad - good > max(1, precision * good):
        length = next_length(good, bad, start, longest)
        if fits(length):
            good = length
        else:
            bad = length
    return good


def next_length(good: int, bad: int, start: int, longest: int) -> int:
    """Return the length to try between one that fits (0: none yet) and one that does not (`longest` + 1: none yet)."""
    if good == 0 and bad > longest:
        return min(max(start, SHORTEST), longest)
    if bad > longest:
        return min(2 * good, longest)
    if good == 0:
        return max(bad // 2, SHORTEST)
    return min(max(round(math.sqrt(good * bad)), good + 1), bad - 1)


def first_guess(model: Path, cap_gib: float, longest: int) -> int:
    """Return the longest row that `plan` expects under a cap, from which the search begins."""
    config = json.loads((model / "config.json").read_text())
    model = model_shapes(config, LoraSection(r=RANK))

    def needed_bytes(num_tokens: int) -> int:
        return plan_memory(model, step_settings(model, r=RANK, num_tokens=num_tokens, num_labels=1)).needed_bytes

    best = SHORTEST
    while best < longest and needed_bytes(2 * best) < cap_gib * GIB:
        best *= 2
    return best


def device_bytes() -> int:
    """Return the memory of the GPU, asked by a process that ends: a process that stays would take some of it."""
    code = "import torch; print(torch.cuda.mem_get_info()[1])"
    return int(subprocess.check_output([sys.executable, "-c", code], text=True))


# --- a trial ----------------------------------------------------------------------------------------------------------


def try_in_child(options: argparse.Namespace, num_tokens: int, cap_gib: float) -> dict[str, Any]:
    """Run a trial in a process of its own and return what became of it.

    Raises:
        SystemExit: it failed for another reason than memory.
    """
    command = [sys.executable, __file__, str(options.model), "--trial", str(num_tokens), "--caps", str(cap_gib)]
    command += [word for setting in options.set for word in ("--set", setting)]
    result: dict[str, Any] = {"cap_gib": cap_gib, "num_tokens": num_tokens, "fits": False}
    began = time.monotonic()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {**result, "seconds": options.timeout, "timed_out": True}
    result["seconds"] = time.monotonic() - began
    if ended.returncode == 0:
        (peak,) = (json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{"peak_bytes"'))
        # torch refuses what is beyond a GPU's cap
        return {**result, **peak, "fits": torch.cuda.is_available() or peak["peak_bytes"] <= cap_gib * GIB}
    if ended.returncode == -signal.SIGKILL:
        return {**result, "killed": True}
    said = ended.stdout + ended.stderr
    if OUT_OF_MEMORY not in said:
        raise SystemExit(f"{num_tokens} tokens under {cap_gib:g} GiB: status {ended.returncode}: {said[-2000:]}")
    return result


def trial(model: Path, num_tokens: int, cap_gib: float, overrides: Sequence[str]) -> None:
    """Limit this process where that can be done, train one step, print the peak, and exit as the command does."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction((cap_gib * GIB - (total - free)) / total)
    from qlora_train.cli import main as cli

    with TemporaryDirectory() as folder:
        rows, config = Path(folder) / "rows.jsonl", Path(folder) / "run.yaml"
        tokens = [FIRST_BYTE + place % 256 for place in range(num_tokens)]
        rows.write_text(json.dumps({"input_ids": tokens, "labels": tokens}) + "\n")
        config.write_text(f"run:\n  output_dir: {folder}/run\n")
        settings = [
            f"model.model_name_or_path={model.resolve()}",
            f"data.train={rows}",
            f"data.max_length={num_tokens}",
        ]
        offloading = [f"train.activation_offloading={str(on_gpu).lower()}"]
        status = cli.main([str(config), *settings, *SETTINGS, *offloading, *overrides])
    if status == 0:
        peak = torch.cuda.max_memory_reserved() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"peak_bytes": peak}), flush=True)
    sys.exit(status)


# --- results ----------------------------------------------------------------------------------------------------------


def read_trials(file: Path) -> list[dict[str, Any]]:
    """Return the trials so far."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def append(file: Path, result: Mapping[str, Any]) -> None:
    """Remember a trial."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as output:
        output.write(json.dumps(result) + "\n")
        output.flush()
        os.fsync(output.fileno())


def table(trials: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line a cap: the longest row that fitted, the shortest that did not, the peak of the former."""
    lines = ["| cap | longest row that trains | shortest that does not | peak |", "|---|---|---|---|"]
    for cap in sorted({trial["cap_gib"] for trial in trials}):
        of_cap = [trial for trial in trials if trial["cap_gib"] == cap]
        best = max((trial for trial in of_cap if trial["fits"]), key=lambda one: one["num_tokens"], default=None)
        worst = min((trial for trial in of_cap if not trial["fits"]), key=lambda one: one["num_tokens"], default=None)
        found = "none" if best is None else f"{best['num_tokens']:,} tokens"
        peak = "" if best is None else f"{best['peak_bytes'] / GIB:.2f} GiB"
        lines.append(f"| {cap:g} GiB | {found} | {_failed(worst)} | {peak} |")
    return lines


def _failed(trial: Mapping[str, Any] | None) -> str:
    if trial is None:
        return "none was tried"
    if "timed_out" in trial:
        return f"{trial['num_tokens']:,} (took over {trial['seconds']:.0f} s)"
    return f"{trial['num_tokens']:,}" + (
        " (killed, as the host does when its memory runs out)" if "killed" in trial else ""
    )


if __name__ == "__main__":
    main()
