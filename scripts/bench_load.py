"""Measure the host memory that loading a sharded checkpoint in NF4 takes at its peak, and the time.

Example: ``python scripts/bench_load.py``. It writes random 16-bit checkpoints of about 2 GB in shards of 200 MB, a dense
one and one with experts stored one by one, and loads each in fresh processes. This process reads the kernel's counts of
the loading ones: anonymous memory, and pages of mapped files, which the kernel can drop but counts as resident.
With ``--ranks 2`` two processes load a part each, as under FSDP; a line then has the largest count of any rank.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.models.base_source import resolve_base
from qlora_train.models.loading import load_model
from qlora_train.models.shard_writer import write_shards
from qlora_train.parallel.process_group import joined
from qlora_train.utils.launcher import Worker

sys.path.insert(0, str(Path(__file__).parents[1]))  # beside a script lie only scripts
from tests.support.pico import build_tokenizer

MB = 10**6
SHARD_BYTES = 200 * MB
MARGIN_BYTES = 300 * MB
"""What a load may take beside one shard and the model it makes."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": (
        "llama",
        {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16},
    ),
    "experts": (
        "qwen3_moe",
        {
            "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 512, "num_experts": 64,
            "num_experts_per_tok": 4, "num_hidden_layers": 9, "num_attention_heads": 16, "num_key_value_heads": 16,
            "head_dim": 64,
        },
    ),
}  # fmt: skip


def main() -> None:
    """Measure, or load when told to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="numbers of processes to load with")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load, arguments.rank, arguments.ranks[0])
    else:
        compare(arguments.runs, arguments.ranks)


def compare(num_runs: int, ranks: list[int]) -> None:
    """Print a line for each kind of checkpoint and number of ranks."""
    print(
        "| checkpoint | ranks | files | NF4 model | imports | peak over imports | anonymous | mapped files | allowed | "
        "seconds |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as temporary:
            folder = write_checkpoint(Path(temporary), kind)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            for num_ranks in ranks:
                line = summarize([measure(folder, num_ranks) for _ in range(num_runs)], size)
                print(f"| {kind} | {num_ranks} | {line} |", flush=True)


def summarize(runs: list[dict[str, float]], size: int) -> str:
    """Return the columns of a line from runs of a checkpoint of `size` bytes."""
    worst = {key: max(run[key] for run in runs) for key in runs[0]}
    allowed = SHARD_BYTES + worst["model_bytes"] + MARGIN_BYTES
    megabytes = [
        size, worst["model_bytes"], worst["imports"], worst["peak"] - worst["imports"], worst["anonymous"],
        worst["mapped"], allowed,
    ]  # fmt: skip
    seconds = statistics.median(run["seconds"] for run in runs)
    return f"{' | '.join(f'{count / MB:,.0f} MB' for count in megabytes)} | {seconds:.1f}"


def write_checkpoint(folder: Path, kind: str) -> Path:
    """Write a random checkpoint with the names that releases have, shard by shard."""
    model_type, settings = KINDS[kind]
    config = AutoConfig.for_model(model_type, vocab_size=32000, tie_word_embeddings=False, **settings)
    config.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    shapes = dict(tensors_of(config))
    sizes = [2 * shape.numel() for shape in shapes.values()]
    tensors = ((torch.randn(shape) / 50).to(torch.bfloat16) for shape in shapes.values())
    write_shards(folder, list(shapes), sizes, SHARD_BYTES, tensors)
    return folder


def tensors_of(config: Any) -> Iterator[tuple[str, torch.Size]]:
    """Yield names and shapes of a checkpoint of Llama's layout, with experts one by one where there are some."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    yield "model.embed_tokens.weight", torch.Size((config.vocab_size, hidden))
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        for name in "qkv":
            yield f"{layer}.self_attn.{name}_proj.weight", torch.Size((heads, hidden))
        yield f"{layer}.self_attn.o_proj.weight", torch.Size((hidden, heads))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}.{name}.weight", torch.Size((hidden,))
        yield from feed_forward(config, f"{layer}.mlp")
    yield "model.norm.weight", torch.Size((hidden,))
    yield "lm_head.weight", torch.Size((config.vocab_size, hidden))


def feed_forward(config: Any, name: str) -> Iterator[tuple[str, torch.Size]]:
    """Yield names and shapes of one layer's feed-forward part."""
    num_experts = getattr(config, "num_experts", 0)
    hidden = config.hidden_size
    inner = config.moe_intermediate_size if num_experts else config.intermediate_size
    if num_experts:
        yield f"{name}.gate.weight", torch.Size((num_experts, hidden))
        for norm in ("q_norm", "k_norm"):
            yield f"{name.removesuffix('mlp')}self_attn.{norm}.weight", torch.Size((config.head_dim,))
    for part in [f"{name}.experts.{expert}" for expert in range(num_experts)] or [name]:
        yield f"{part}.gate_proj.weight", torch.Size((inner, hidden))
        yield f"{part}.up_proj.weight", torch.Size((inner, hidden))
        yield f"{part}.down_proj.weight", torch.Size((hidden, inner))


def measure(folder: Path, num_ranks: int) -> dict[str, float]:
    """Load a checkpoint in fresh processes; return the largest bytes and seconds of any."""
    command = [sys.executable, __file__, "--load", str(folder), "--ranks", str(num_ranks)]
    (folder / "rendezvous").unlink(missing_ok=True)
    processes = [
        subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(num_ranks)
    ]
    loads = [Load(process) for process in processes]
    while sum(load.is_running() for load in loads):
        time.sleep(0.002)
    results = [load.result() for load in loads]
    return {key: max(result[key] for result in results) for key in results[0]}


class Load:
    """A process that loads, and the largest counts seen of its memory."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.before: dict[str, int] = json.loads(self._line())
        self.anonymous = self.mapped = 0

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def is_running(self) -> bool:
        """Count the memory once, and return whether the process has not ended."""
        if self.process.poll() is not None:
            return False
        now = status(self.process.pid)
        if "RssAnon" in now:  # not once it has ended
            self.anonymous = max(self.anonymous, now["RssAnon"] - self.before["RssAnon"])
            self.mapped = max(self.mapped, now["RssFile"] - self.before["RssFile"])
        return True

    def result(self) -> dict[str, float]:
        """Return bytes and seconds."""
        after = json.loads(self._line())
        assert self.process.returncode == 0
        peaks = {"imports": self.before["VmRSS"], "anonymous": self.anonymous, "mapped": self.mapped}
        return {**peaks, "peak": after["VmHWM"], "model_bytes": after["model_bytes"], "seconds": after["seconds"]}


def load(folder: Path, rank: int, num_ranks: int) -> None:
    """Load a checkpoint, or a rank's part of it, and print, in JSON, the memory before and after."""
    model = ModelSection(model_name_or_path=str(folder))
    source = resolve_base(model)
    print(json.dumps(status("self")), flush=True)
    began = time.perf_counter()
    worker = Worker(rank, num_ranks, rank, num_ranks, f"file://{folder / 'rendezvous'}")
    with joined(worker) if num_ranks > 1 else nullcontext():
        loaded = load_model(model, QuantizationSection(), source=source, shard=num_ranks > 1)
        seconds = time.perf_counter() - began
        after = {**status("self"), "model_bytes": loaded.quantization_summary.total_bytes, "seconds": seconds}
    print(json.dumps(after), flush=True)


def status(process: int | str) -> dict[str, int]:
    """Return the kernel's counts of a process's memory, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return {
        key: int(value.split()[0]) * 1024
        for key, _, value in (line.partition(":") for line in lines)
        if key in ("VmRSS", "VmHWM", "RssAnon", "RssFile")
    }


if __name__ == "__main__":
    main()
