"""Measure the data stage: time from a raw file to ready batches beside TRL's own preparation, and peak memory.

    python scripts/bench_data.py speed --rows 200000     both, cold and warm, in one run on the same file
    python scripts/bench_data.py memory --bytes 3e9      peak memory of all processes while a file is prepared
    python scripts/bench_data.py turns                   cost of a conversation of 200 turns beside one of 10
    python scripts/bench_data.py packing                 how full packs are, and how long packing takes

The texts are slices of Python's own help pages with log-normal lengths. Every measurement is a fresh process; imports are
not counted. Results go to standard output as JSON.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML that marks its answers: TRL masks prompts only with such a template. Ours takes the tokenizer's own."""
MAX_LENGTH, BATCH_SIZE = 2048, 8


def conversations(seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows of one to three exchanges, half of them with a system turn; about 1,250 characters each."""
    words = " ".join(" ".join(text.split()) for text in topics.values()).split(" ")
    chance = random.Random(seed)

    def words_of(mean: float) -> str:
        count = min(max(1, int(chance.lognormvariate(mean, 0.8))), 600)
        begin = chance.randrange(len(words) - count)
        return " ".join(words[begin : begin + count])

    while True:
        turns = [{"role": "system", "content": "You are a helpful assistant."}] if chance.random() < 0.5 else []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            turns += [{"role": "user", "content": words_of(3)}, {"role": "assistant", "content": words_of(4)}]
        yield {"messages": turns}


def write(path: Path, *, num_rows: int | None = None, num_bytes: float = float("inf")) -> int:
    """Write rows until there are enough; return how many."""
    written, rows = 0, 0
    with path.open("w", encoding="utf-8") as file:
        for row in conversations(seed=0):
            if rows == num_rows or written >= num_bytes:
                return rows
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    raise AssertionError


def cpu_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for: other work does not lengthen it."""
    return sum(os.times()[:4])


def ours(data: Path, tokenizer_path: Path, cache: Path, num_proc: int) -> dict[str, float]:
    """Prepare a file and go once through its batches."""
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer

    from qlora_train.config.schema import DataSection
    from qlora_train.data import prepare_data
    from qlora_train.data.batch_order import epoch_order
    from qlora_train.data.collate import PaddingCollator, RowDataset

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    section = DataSection(
        train=str(data), max_length=MAX_LENGTH, overflow="truncate", num_proc=num_proc, cache_dir=str(cache)
    )
    start, start_cpu = time.perf_counter(), cpu_seconds()
    prepared = prepare_data(section, tokenizer, seed=42)
    middle = time.perf_counter()
    order = epoch_order(prepared.train.lengths, seed=42, epoch=0, batch_size=BATCH_SIZE, group_by_length=False)
    batches = [order[i : i + BATCH_SIZE] for i in range(0, len(order), BATCH_SIZE)]
    loader: Any = DataLoader(
        RowDataset(prepared.train), sampler=batches, batch_size=None, collate_fn=PaddingCollator(tokenizer.pad_token_id)
    )
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in loader)
    end = time.perf_counter()
    return {
        "prepare": middle - start, "batches": end - middle, "total": end - start,
        "cpu": cpu_seconds() - start_cpu, "num_tokens": num_tokens,
    }  # fmt: skip


def trl(data: Path, tokenizer_path: Path, cache: Path, num_proc: int) -> dict[str, float]:
    """The same with SFTTrainer and loss on the assistant's turns alone."""
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.chat_template = TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        )
    )
    start, start_cpu = time.perf_counter(), cpu_seconds()
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(cache))
    arguments = SFTConfig(
        output_dir=str(cache / "output"), dataset_num_proc=num_proc, assistant_only_loss=True, max_length=MAX_LENGTH,
        per_device_train_batch_size=BATCH_SIZE, use_cpu=True, bf16=False, report_to="none",
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    middle = time.perf_counter()
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in trainer.get_train_dataloader())
    end = time.perf_counter()
    return {
        "prepare": middle - start, "batches": end - middle, "total": end - start,
        "cpu": cpu_seconds() - start_cpu, "num_tokens": num_tokens,
    }  # fmt: skip


def in_fresh_process(
    function: Callable[..., Any], data: Path, options: argparse.Namespace, *, watched: bool = False
) -> dict[str, Any]:
    """Run one of the functions above in a new process and return what it measured, with its peak memory if watched."""
    command = [sys.executable, __file__, "once", function.__name__, str(data), *_common(options)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peak = _Peak(process.pid) if watched else None  # watching takes a tenth of a core
    output, _ = process.communicate()
    assert process.returncode == 0, command
    measured: dict[str, Any] = json.loads(output.splitlines()[-1])
    return measured if peak is None else {**measured, "peak_bytes": peak.stop()}


class _Peak:
    """Largest memory of a process and its children, as proportional set size: shared pages are counted once."""

    def __init__(self, pid: int) -> None:
        self._pid, self._peak, self._stopped = pid, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stopped.wait(0.25):
            self._peak = max(self._peak, sum(map(_pss_bytes, [self._pid, *_children(self._pid)])))

    def stop(self) -> int:
        self._stopped.set()
        self._thread.join()
        return self._peak


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _pss_bytes(pid: int) -> int:
    """Return a process's proportional set size, pages of files that it has mapped included."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.endswith("kB")}
    return sizes["Pss"]


def _common(options: argparse.Namespace) -> list[str]:
    return ["--tokenizer", str(options.tokenizer), "--work", str(options.work), "--num-proc", str(options.num_proc)]


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Both, cold and warm, alternating."""
    data = options.work / f"{options.rows}.jsonl"
    if not data.is_file():
        write(data, num_rows=options.rows)
    results: dict[str, Any] = {"rows": options.rows, "bytes": data.stat().st_size, "num_proc": options.num_proc}
    for repeat in range(options.repeats):
        for function in (ours, trl):
            shutil.rmtree(options.work / function.__name__, ignore_errors=True)
        for state in ("cold", "warm"):
            for function in (ours, trl):
                result = in_fresh_process(function, data, options)
                results.setdefault(f"{function.__name__} {state}", []).append(result)
                print(repeat, state, function.__name__, result, file=sys.stderr)
    for state in ("cold", "warm"):
        pairs = list(zip(results[f"trl {state}"], results[f"ours {state}"], strict=True))
        results[f"trl / ours {state}"] = [round(theirs["total"] / mine["total"], 2) for theirs, mine in pairs]
        results[f"trl / ours {state}, cpu"] = [round(theirs["cpu"] / mine["cpu"], 2) for theirs, mine in pairs]
    return results


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of ours on a file of `--bytes`."""
    data = options.work / "large.jsonl"
    if not data.is_file() or data.stat().st_size < options.bytes:
        write(data, num_bytes=options.bytes)
    shutil.rmtree(options.work / "ours", ignore_errors=True)
    measured = in_fresh_process(ours, data, options, watched=True)
    return {"bytes": data.stat().st_size, "num_proc": options.num_proc, **measured}


def turns(options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of rendering one conversation of 10 and of 200 turns, tokens included."""
    import datetime
    import statistics

    from transformers import AutoTokenizer

    from qlora_train.data.row_encoder import RowEncoder
    from qlora_train.data.types import Message, Row

    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    source = conversations(seed=1)
    results: dict[str, Any] = {}
    for count in (10, 200):
        rows = []
        for _ in range(30):
            pairs: list[Message] = []
            while len(pairs) < count:
                pairs += [turn for turn in next(source)["messages"] if turn["role"] != "system"]
            rows.append(Row("row", messages=tuple(pairs[:count])))
        encoder = RowEncoder(tokenizer, train_on="assistant", date=datetime.date.today())
        seconds = []
        for row in rows:
            start = time.perf_counter()
            encoder.encode(row)
            seconds.append(time.perf_counter() - start)
        results[f"{count} turns"] = {"first": seconds[0], "median": statistics.median(seconds[1:])}
    results["ratio of medians"] = results["200 turns"]["median"] / results["10 turns"]["median"]
    results["ratio of first rows"] = results["200 turns"]["first"] / results["10 turns"]["first"]
    return results


def packing(_options: argparse.Namespace) -> dict[str, Any]:
    """Packs of log-normal lengths: exp of a normal with mean 5.5 and deviation 0.8, at most 2,048 tokens."""
    import numpy as np

    from qlora_train.data.packing import PackOrder

    chance = np.random.default_rng(0)
    results: dict[str, Any] = {}
    for count in (2_000, 200_000, 5_000_000):
        lengths = np.clip(chance.lognormal(5.5, 0.8, count).astype(np.int32) + 1, 1, MAX_LENGTH)
        start = time.perf_counter()
        packs = PackOrder(lengths, max_length=MAX_LENGTH, seed=0)
        seconds = time.perf_counter() - start
        results[f"{count} rows"] = {"packs": packs.num_packs, "full": packs.efficiency, "seconds": seconds}
    return results


def once(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    function = {"ours": ours, "trl": trl}[options.function]
    return function(options.data, options.tokenizer, options.work / options.function, options.num_proc)


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function in (speed, memory, turns, packing, once):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(measure=function)
        command.add_argument("--tokenizer", type=Path, default=Path(".demo/SmolLM2-135M-Instruct"))
        command.add_argument("--work", type=Path, default=Path(".demo/bench"), help="folder of files and caches")
        command.add_argument("--num-proc", type=int, default=2)
        if function is speed:
            command.add_argument("--rows", type=int, default=200_000)
            command.add_argument("--repeats", type=int, default=1)
        if function is memory:
            command.add_argument("--bytes", type=float, default=3e9)
        if function is once:
            command.add_argument("function", choices=("ours", "trl"))
            command.add_argument("data", type=Path)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(json.dumps(options.measure(options)))


if __name__ == "__main__":
    main()
