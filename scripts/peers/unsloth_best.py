"""Unsloth as a peer of `scripts/bench.py`, without recomputation."""

# ruff: noqa: I001
import unsloth  # before transformers, which it changes

import sys

import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from timing import settings_of
from trl_best import train

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Train a few steps."""
    settings, result = settings_of(sys.argv[1:])
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=settings["model"],
        max_seq_length=settings["max_length"],
        dtype=torch.bfloat16,
        load_in_4bit=True,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=settings["r"],
        lora_alpha=settings["alpha"],
        target_modules=LINEARS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=False,
    )
    train(model, AutoTokenizer.from_pretrained(settings["model"]), settings, result, SFTTrainer, SFTConfig, lora=False)


if __name__ == "__main__":
    main()
