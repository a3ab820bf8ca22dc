"""A real run of two steps on a pico model, in a fresh process: training, adapter check and merge."""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qlora_train
from qlora_train.doctor.machine_check import Check
from qlora_train.runs import RunFolder
from qlora_train.utils import network

NUM_STEPS = 2
NUM_ROWS = 48
"""Of which a third is held out; a step has 16, enough for a process on each GPU of a large machine."""
TIMEOUT_SECONDS = 600
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CONFIG: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.08, "bos_token_id": None,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
"""Of a Llama whose rows divide into NF4 blocks."""

logger = logging.getLogger(__name__)


def trial_run() -> Iterator[Check]:
    """Train, check and merge a pico model as `qlora-train CONFIG` would."""
    with tempfile.TemporaryDirectory(prefix="qlora-train-doctor-") as folder:
        transformers.logging.disable_progress_bar()
        yield train_pico(Path(folder))


def train_pico(folder: Path, *overrides: str) -> Check:
    """Run the pipeline in `folder`; the output of a run that fails is logged."""
    logger.info("trial run: training a pico model for %d steps in a fresh process", NUM_STEPS)
    write_pico_model(folder / "model")
    config = write_config(folder)
    command = [sys.executable, "-m", "qlora_train.cli.main", "train", str(config), *overrides]
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(folder), capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return Check("trial run", "problem", f"{NUM_STEPS} steps on a pico model take more than {TIMEOUT_SECONDS} s")
    if done.returncode:
        logger.error("%s", done.stderr.rstrip())
        last = next(reversed(done.stderr.strip().splitlines()), "no message")
        return Check("trial run", "problem", f"exit status {done.returncode}: {last}")
    return _passed(RunFolder(folder / "run"))


def _passed(run: RunFolder) -> Check:
    results, device = run.read_results(), run.metadata()["device"]
    assert results["adapter_check"]["passed"]
    assert run.has_merged()
    return Check(
        "trial run", "ok", f"{NUM_STEPS} steps on {device}; adapter and merged model load and compute the same"
    )


def write_pico_model(folder: Path) -> None:
    """Write a Llama of random weights with its tokenizer and a ChatML template."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant one plus two is three"], trainer)
    pad, _, end = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, model_max_length=CONFIG["max_position_embeddings"]
    ).save_pretrained(folder)


def write_config(folder: Path) -> Path:
    """Write rows and the config of the run."""
    rows = [
        {"messages": [{"role": "user", "content": f"{number} + 1"}, {"role": "assistant", "content": f"{number + 1}"}]}
        for number in range(NUM_ROWS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sections = {
        "model": {"model_name_or_path": str(folder / "model"), "chat_template": "chatml"},
        "data": {"train": str(data), "eval": 0.34, "max_length": 64},
        "train": {
            "max_steps": NUM_STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4,
            "logging_steps": 1,
        },
        "run": {"output_dir": str(folder / "run")},
        "export": {"merge": True},
    }  # fmt: skip
    config = folder / "doctor.yaml"
    config.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")
    return config


def _environment(folder: Path) -> dict[str, str]:
    """Return this process's environment, offline, with the cache in `folder`."""
    source = str(Path(qlora_train.__file__).parent.parent)
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    return {**os.environ, **network.OFFLINE, **cache, "PYTHONPATH": os.pathsep.join(paths)}
