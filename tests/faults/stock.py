"""The same training with TRL's SFTTrainer, resumed as its documentation says, for comparison."""

from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

NUM_STEPS = 8


def train(folder: Path, base: Path, rows: Path) -> None:
    """Train in NF4 to the end, from the last checkpoint if there is one, and save the adapter to `folder/adapter`."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.bfloat16),
        args=SFTConfig(
            output_dir=str(folder / "checkpoints"), max_steps=NUM_STEPS, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-2, optim="adamw_8bit", save_steps=1, save_total_limit=2,
            logging_steps=1, bf16=True, use_cpu=True, seed=7, report_to="none", disable_tqdm=True, max_length=128,
            gradient_checkpointing=False,
        ),
        train_dataset=datasets.load_dataset("json", data_files=str(rows), split="train"),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=64, lora_alpha=32, lora_dropout=0.1, target_modules="all-linear"),
    )  # fmt: skip
    checkpoints = folder / "checkpoints"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    trainer.save_model(str(folder / "adapter"))
