"""Measure preference training after the demo's SFT over seeds, beside as many more steps of SFT on the chosen answers.

All runs start from the adapter of one SFT run and take the same pairs, batch size, steps and learning rate; the seed
decides the order. `dpo` trains a config on pairs, `sft` their chosen answers alone: what it gains needs no rejected ones.
`start` is the adapter that both start from. A held-out address counts as answered if every token of the right answer is the
model's first choice after those before it: stricter than comparing its generated answer. Held-out pairs are compared by
their log-probabilities, without a reference. Writes one JSON file with the command, the machine, the versions and
all figures; runs that are there already are not repeated.

Example: ``python scripts/bench_demo_preferences.py runs/demo`` after `make demo` and
``python scripts/demo_pairs.py --answers-of runs/demo``
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from bench import machine
from peft import PeftModel

from qlora_train.config import load_config
from qlora_train.data.types import Example
from qlora_train.evaluation.held_out_loss import held_out_loss, label_log_probabilities
from qlora_train.export.finished_run import open_finished_run
from qlora_train.export.model_card import library_versions
from qlora_train.inference.run_models import run_models
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder

COMMAND = [sys.executable, "-m", "qlora_train.cli.main"]
COLUMNS = {
    "exact_match": "answered exactly", "loss": "loss of right answers", "accuracy": "accuracy of pairs",
    "margin": "margin of pairs",
}  # fmt: skip
"""Figures of an adapter on held-out addresses and pairs, and how the table names them."""
AS_SFT = ["train.objective=sft", "train.beta=null", "train.sft_weight=null"]
Figures = dict[str, Any]


def main() -> None:
    """Train and evaluate what is missing, then print the table."""
    options = parsed()
    report = {"runs": {}} | (json.loads(options.output.read_text()) if options.output.is_file() else {})
    report |= {
        "command": "python scripts/bench_demo_preferences.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(), "machine": machine(), "versions": library_versions(),
    }  # fmt: skip
    runs: dict[str, Figures] = report["runs"]
    rows = chosen_rows(options.pairs / "train.jsonl", options.folder / "chosen.jsonl")
    addresses, pairs = held_out_rows(options)
    if "start" not in runs:
        runs["start"] = evaluated(options.start, addresses, pairs)
    for seed in options.seeds:
        for way in options.ways:
            name = f"{way}, seed {seed}"
            if name not in runs:
                run = trained(options, way, seed, rows)
                runs[name] = evaluated(run, addresses, pairs)
                options.output.write_text(json.dumps(report, indent=1) + "\n")
            print(f"{name}: exact match {runs[name]['exact_match']:.1%}", flush=True)
    report["table"] = table(runs)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(report["table"]))


def parsed() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("start", type=Path, help="the finished SFT run")
    parser.add_argument("--config", type=Path, default=Path("configs/demo_dpo.yaml"))
    parser.add_argument("--pairs", type=Path, default=Path(".demo/pairs"), help="what scripts/demo_pairs.py made")
    parser.add_argument(
        "--addresses", type=Path, default=Path(".demo/addresses"), help="what scripts/demo_data.py made"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=("dpo", "sft"), default=["dpo", "sft"])
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="of all runs")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-preferences"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo-preferences.json"))
    return parser.parse_args()


def chosen_rows(pairs: Path, rows: Path) -> Path:
    """Write the prompts of pairs with their chosen answers as conversations, and return the file."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    with pairs.open(encoding="utf-8") as source, rows.open("w", encoding="utf-8") as target:
        for pair in map(json.loads, source):
            target.write(json.dumps({"messages": pair["prompt"] + pair["chosen"]}, ensure_ascii=False) + "\n")
    return rows


def trained(options: argparse.Namespace, way: str, seed: int, rows: Path) -> Path:
    """Train from the start's adapter and return the run folder."""
    run = options.folder / f"{way}-seed{seed}"
    settings = [
        f"data.train={options.pairs / 'train.jsonl' if way == 'dpo' else rows}", "data.eval=null", "run.row_losses=0",
        f"lora.adapter_path={options.start / 'adapter'}", f"run.seed={seed}", f"run.output_dir={run}", *options.set,
    ]  # fmt: skip
    if way == "sft":
        settings += AS_SFT
    subprocess.run([*COMMAND, str(options.config), *settings], check=True)
    return run


def held_out_rows(options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Return held-out addresses with their right answers, and held-out pairs, as tokens."""
    addresses, pairs = (folder / "heldout.jsonl" for folder in (options.addresses, options.pairs))
    rows = []
    for file, settings in ((addresses, AS_SFT), (pairs, [])):
        with TemporaryDirectory() as folder:
            config = load_config(
                options.config,
                [f"data.train={file}", "data.eval=null", "lora.adapter_path=null", *options.set, *settings],
            )
            rows.append(list(prepare(config, RunFolder(Path(folder)))[1].train))
    return rows[0], rows[1]


def evaluated(run: Path, addresses: Sequence[Example], pairs: Sequence[Example]) -> Figures:
    """Return the figures of a run's adapter on held-out addresses and pairs."""
    finished = open_finished_run(run)
    ((_, base, tokenizer),) = run_models(finished, ["base"])
    # the values of the 4-bit weights in bfloat16: bitsandbytes is several times slower on a CPU
    model = PeftModel.from_pretrained(base.dequantize(), finished.folder.adapter).eval()
    right = [measured(model, example) for example in addresses]
    chosen = {tokens_of(example): nll for example, (nll, _) in zip(addresses, right, strict=True)}
    wrong = [pair.rejected for pair in pairs if pair.rejected is not None]
    losses = held_out_loss(model, wrong, batch_size=16, pad_token_id=tokenizer.pad_token_id).per_example
    margins = [loss.nll - chosen[tokens_of(pair)] for loss, pair in zip(losses, pairs, strict=True)]
    num_labels = sum(example.num_labels for example in addresses)
    return {
        "exact_match": sum(is_greedy for _, is_greedy in right) / len(right),
        "loss": sum(nll for nll, _ in right) / num_labels,
        "accuracy": sum(margin > 0 for margin in margins) / len(margins), "margin": statistics.mean(margins),
        "num_addresses": len(addresses), "num_pairs": len(pairs), "training": finished.folder.read_results()["training"],
    }  # fmt: skip


def measured(model: Any, example: Example) -> tuple[float, bool]:
    """Return the negative log-likelihood of a row's labels, and whether each is the model's first choice."""
    log_probabilities = torch.cat(list(label_log_probabilities(model, [example])))
    labels = torch.from_numpy(example.input_ids[np.asarray(example.loss_mask)]).long()
    nll = -log_probabilities.gather(1, labels[:, None]).sum()
    return float(nll), torch.equal(log_probabilities.argmax(1), labels)


def tokens_of(example: Example) -> bytes:
    """Return what identifies a row."""
    return np.asarray(example.input_ids).tobytes()


def table(runs: Mapping[str, Figures]) -> list[str]:
    """Return a line per way: the mean of its seeds, and min and max."""
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---|' * len(COLUMNS)}"]
    for way in dict.fromkeys(name.partition(",")[0] for name in runs):
        found = [figures for name, figures in runs.items() if name.partition(",")[0] == way]
        cells = [spread([figures[column] for figures in found]) for column in COLUMNS]
        lines.append(f"| {way} ({len(found)}) | {' | '.join(cells)} |")
    return lines


def spread(values: list[float]) -> str:
    """Return mean, min and max."""
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
