"""TRL's SFTTrainer as a peer of `scripts/bench.py`, as well as it can be set: bf16, no recomputation, rows in order."""

import importlib.util
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from timing import Timing, settings_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Train a few steps."""
    settings, result = settings_of(sys.argv[1:])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    flash = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation="flash_attention_2" if flash else "sdpa",
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    train(model, AutoTokenizer.from_pretrained(settings["model"]), settings, result, SFTTrainer, SFTConfig, lora=True)


def train(
    model: Any,
    tokenizer: Any,
    settings: dict[str, Any],
    result: Path,
    trainer_class: Any,
    config_class: Any,
    *,
    lora: bool,
) -> None:
    """Train a model with a trainer of TRL's kind and write what was measured."""
    timing = Timing()
    with TemporaryDirectory() as folder:
        arguments = config_class(
            output_dir=folder,
            per_device_train_batch_size=settings["batch_size"],
            gradient_accumulation_steps=1,
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="linear",
            max_steps=settings["steps"],
            max_length=settings["max_length"],
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            optim=settings["optim"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            assistant_only_loss=False,
            train_sampling_strategy="sequential",
            max_grad_norm=1.0,
            seed=1,
        )
        peft = LoraConfig(
            r=settings["r"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=load_dataset("json", data_files=settings["pairs"], split="train"),
            processing_class=tokenizer,
            peft_config=peft if lora else None,
            callbacks=[timing],
        )
        trainer.train()
        timing.write(result)


if __name__ == "__main__":
    main()
