"""Training beside other trainers: the same batches and settings, a process each, in turn, several rounds.

A peer runs with a Python of its own, in which it is installed: ``--peer NAME=PYTHON``. Peers: trl, unsloth, llama-factory,
axolotl. Ratios are medians over the rounds, each against this package in the same round. A peer whose gradient is zero is
said to be broken.

Throughput depends on the tokens per batch, and samplers that sort by length differ in which batches come first.
So this package batches rows by length as its config says, and the others are given the rows of its steps, in that order.

Before and after each round the machine's own rate of bfloat16 products is measured (`scripts/matmul_rate.py`). The share of
it that a peer reaches counts what its rows must compute, each by itself, without padding (`scripts/model_flops.py`). This
package computes shared prefixes once where that pays ("padded": without): then its share counts more than it did.

Example: ``python scripts/bench.py --peer trl=.venv/bin/python --peer unsloth=PYTHON --output FILE.json``
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from model_flops import ModelShape, model_shape, step_flops

ROOT = Path(__file__).parents[1]
SCRIPTS = {
    "ours": "ours.py",
    "ours, no weight cache": "ours.py",
    "ours, padded": "ours.py",
    "trl": "trl_best.py",
    "unsloth": "unsloth_best.py",
    "llama-factory": "llama_factory_best.py",
    "axolotl": "axolotl_best.py",
}
OURS: dict[str, dict[str, list[str]]] = {
    "cpu": {
        "ours": [],
        "ours, no weight cache": ["train.dequantized_cache_gb=0"],
        "ours, padded": ["train.padding_free=false", "model.attn_implementation=eager"],
    },
    "cuda": {"ours": []},
}
"""What this package is measured with, by device. On a GPU no weights are kept unless a config asks for it; eager attention
is what short rows are quickest with on a CPU."""
OPTIMIZER = "adamw_torch_fused"
RATES = ("square_flops_per_second", "model_flops_per_second")
SAME_TOKENS = 0.03
"""Share by which the tokens of the same rows may differ, by what a trainer's template writes around them."""
Runs = dict[str, list[dict[str, Any]]]


def main() -> int:
    """Run the rounds, print a table, write the numbers; a trainer that fails is left out from then on."""
    options = parsed()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pythons = dict.fromkeys(OURS[device], sys.executable) | dict(peer.split("=", 1) for peer in options.peer)
    settings = {
        "model": str(options.model.resolve()), "config": str(options.config.resolve()), "max_length": options.max_length,
        "r": 16, "alpha": 32, "learning_rate": 2e-4, "batch_size": options.batch_size, "steps": options.steps,
        "optim": OPTIMIZER, "conversations": str(options.rows.resolve()),
        "llama_factory_template": options.llama_factory_template, "overrides": options.set,
    }  # fmt: skip
    shape = model_shape(json.loads((options.model / "config.json").read_text()))
    file = options.output or results_file(machine())
    file.parent.mkdir(parents=True, exist_ok=True)
    found: Runs = {name: [] for name in pythons}
    rates: list[list[dict[str, Any]]] = []
    failed: dict[str, str] = {}
    with TemporaryDirectory() as folder:
        for number in range(options.rounds):
            rates.append([matmul_rate(shape, settings, Path(folder))])
            for name in [name for name in pythons if name not in failed]:
                try:
                    run = measured(name, pythons[name], settings, found, Path(folder))
                except PeerError as error:
                    failed[name] = str(error)
                    print(f"round {number + 1}: {error}", flush=True)
                    continue
                found[name].append(run | {"flops": flops_of(run, shape, settings["r"])})
                print(f"round {number + 1}: {name}: {speed(run):.0f} tokens/s", flush=True)
            rates[-1].append(matmul_rate(shape, settings, Path(folder)))
            lines = table(found, rates, failed)
            write(file, settings, lines, rates, found, failed)  # a round that is whole stays
    print("\n".join(lines))
    print(f"results: {file}")
    return 1 if failed else 0


class PeerError(RuntimeError):
    """A process that did not end well, or wrote no result."""


def write(
    file: Path,
    settings: Mapping[str, Any],
    lines: list[str],
    rates: list[list[dict[str, Any]]],
    found: Runs,
    failed: Mapping[str, str],
) -> None:
    """Write what was measured so far."""
    named = ("model", "config", "conversations")
    about = {
        "settings": {key: Path(value).name if key in named else value for key, value in settings.items()},
        "machine": machine(),
        "table": lines,
        "matmul_rates": rates,
        "failed": {name: reason.splitlines()[0] for name, reason in failed.items()},
        "runs": found,
    }
    file.write_text(json.dumps(about, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
    parser.add_argument(
        "--rows", type=Path, default=Path(".demo/addresses/train.jsonl"), help="conversations (messages), as jsonl"
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml", help="of this package's runs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="changes it for this package's runs"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--llama-factory-template", default="smollm", help="the template there that is the model's own")
    parser.add_argument("--output", type=Path, help="benchmarks/results/DATE-MACHINE.json unless given")
    options = parser.parse_args()
    peers = [name for name in SCRIPTS if not name.startswith("ours")]
    unknown = [peer for peer in options.peer if peer.partition("=")[0] not in peers or "=" not in peer]
    if unknown:
        parser.error(f"--peer {unknown[0]}: give NAME=PYTHON; names are {', '.join(peers)}")
    return options


def in_order(rows: Path, lines: Sequence[int], folder: Path) -> dict[str, str]:
    """Write these lines of conversations in this order, and also as prompt and completion, and return the files by name.

    Some trainers mask prompts in no other way.
    """
    conversations, pairs = folder / "conversations.jsonl", folder / "pairs.jsonl"
    text = rows.read_text().splitlines()
    chosen = [text[line - 1] for line in lines]
    conversations.write_text("".join(f"{line}\n" for line in chosen))
    with pairs.open("w") as target:
        for line in chosen:
            *prompt, answer = json.loads(line)["messages"]
            target.write(json.dumps({"prompt": prompt, "completion": [answer]}) + "\n")
    return {"conversations": str(conversations), "pairs": str(pairs)}


def measured(name: str, python: str, settings: dict[str, Any], found: Runs, folder: Path) -> dict[str, Any]:
    """Return what a peer measured of itself.

    Raises:
        PeerError: it did not end well.
    """
    ours = OURS["cuda" if torch.cuda.is_available() else "cpu"]
    own = {**settings, "overrides": [*settings["overrides"], *ours.get(name, [])]}
    if not name.startswith("ours"):
        if not found["ours"]:
            raise PeerError(f"{name}: not run: there are no batches to give it")
        own |= in_order(Path(settings["conversations"]), found["ours"][0]["lines"], folder)
    return answer_of(name, python, Path("peers") / SCRIPTS[name], own, folder)


def matmul_rate(shape: ModelShape, settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the machine's rates of products, with the rows of a batch that is full."""
    asked = {"tokens": settings["batch_size"] * settings["max_length"], "linears": shape.linears}
    return answer_of("matmul", sys.executable, Path("matmul_rate.py"), asked, folder)


def answer_of(name: str, python: str, script: Path, asked: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Run a script of this folder in a process of its own, with a file of settings and one for its result.

    Raises:
        PeerError: it did not end well.
    """
    question, result, log = (folder / f"{kind}-{name.split(',', maxsplit=1)[0]}" for kind in ("asked", "result", "log"))
    question.write_text(json.dumps(asked))
    result.unlink(missing_ok=True)
    command = [python, str(ROOT / "scripts" / script), str(question), str(result)]
    # a peer sees what is installed for it, and this package what is installed for this process
    paths = [str(ROOT), *(filter(None, [os.environ.get("PYTHONPATH")]) if python == sys.executable else ())]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    with log.open("w") as output:
        ended = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    if ended.returncode or not result.exists():
        raise PeerError(f"{name}: status {ended.returncode}\n{log.read_text()[-2000:]}")
    content: dict[str, Any] = json.loads(result.read_text())
    return content


def flops_of(run: Mapping[str, Any], shape: ModelShape, r: int) -> float:
    """Return the operations that the timed steps of a run must compute."""
    steps = zip(run["row_lengths"], run["labels"], strict=True)
    return sum(step_flops(shape, r=r, row_lengths=rows, num_labels=labels).total for rows, labels in steps)


def speed(run: Mapping[str, Any]) -> float:
    """Return tokens per second over all steps but the first."""
    return float(sum(run["tokens"]) / sum(run["seconds"]))


def share(run: Mapping[str, Any], rates: Sequence[Mapping[str, Any]]) -> float:
    """Return the share of the machine's rate of products that a run reached, the best that was measured around it."""
    ceiling = max(rate[key] for rate in rates for key in RATES)
    return float(run["flops"] / sum(run["seconds"]) / ceiling)


def table(
    found: Runs, rates: Sequence[Sequence[Mapping[str, Any]]], failed: Mapping[str, str] | None = None
) -> list[str]:
    """Return a line a peer, and one on the machine; `failed` has what those said that did not end well."""
    found = {name: runs for name, runs in found.items() if runs}
    failures = [f"FAILED {reason.splitlines()[0]}" for reason in (failed or {}).values()]
    if "ours" not in found:
        return failures
    titles = f"{'tokens/s':>10}{'ours is':>12}{'of matmul':>11}{'step s (p10-p90)':>26}{'peak GB':>9}"
    lines = [f"{'':24}{titles}  loss, first to last"]
    for name, runs in found.items():
        ratios = [speed(ours) / speed(run) for ours, run in zip(found["ours"], runs, strict=False)]
        shares = [share(run, around) for run, around in zip(runs, rates, strict=False)]
        steps = sorted(seconds for run in runs for seconds in run["seconds"])
        tenth = len(steps) // 10
        spread = f"{statistics.median(steps):.2f} ({steps[tenth]:.2f}-{steps[-1 - tenth]:.2f})"
        broken = "" if all(norm > 0 for run in runs for norm in run["grad_norms"]) else "  BROKEN: a gradient is zero"
        first, last = (statistics.median(run["losses"][place] for run in runs) for place in (0, -1))
        peak = max(run["peak_device_gb"] or run["peak_gb"] for run in runs)
        lines.append(
            f"{name:24}{statistics.median(map(speed, runs)):10.0f}{statistics.median(ratios):10.2f} x"
            f"{100 * statistics.median(shares):9.1f} %{spread:>26}{peak:9.2f}  {first:.3f} {last:.3f}{broken}"
        )
    return [*lines, *failures, *machine_lines(found, rates)]


def machine_lines(found: Runs, rates: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Return what the machine multiplied at, and who had other threads than that."""
    measured_rates = [rate for around in rates for rate in around]
    square, model = ([rate[key] / 1e9 for rate in measured_rates] for key in RATES)
    first = measured_rates[0]
    lines = [
        f"matmul: {statistics.median(square):.0f} GFLOP/s ({min(square):.0f}-{max(square):.0f}), {first['square']} square; "
        f"{statistics.median(model):.0f} ({min(model):.0f}-{max(model):.0f}) with the model's layers and "
        f"{first['tokens']} rows; bfloat16, {first['threads']} threads"
    ]
    for name, runs in found.items():
        threads, tokens, wanted = runs[0]["threads"], sum(runs[0]["tokens"]), sum(found["ours"][0]["tokens"])
        if threads != first["threads"]:
            lines.append(f"{name} computed with {threads} threads")
        if abs(tokens - wanted) > SAME_TOKENS * wanted:
            lines.append(f"{name} took {tokens} tokens where ours took {wanted}: other batches, not to be compared")
    return lines


def machine() -> dict[str, Any]:
    """Return what was measured on."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu.partition(": ")[2],
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def results_file(about: Mapping[str, Any]) -> Path:
    """Return the file of today's results on this machine, with a number behind it where there is one already."""
    name = about["gpu"] or f"{about['cpu']} {about['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((R|TM)\)|@.*GHz", "", name, flags=re.IGNORECASE).lower()).strip("-")
    folder, stem = ROOT / "benchmarks" / "results", f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}-{slug}"
    names = (f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 100)))
    return next(folder / name for name in names if not (folder / name).exists())


if __name__ == "__main__":
    sys.exit(main())
