"""TRL's DPOTrainer as a peer of `scripts/bench_preferences.py`, as well as it can be set on this machine.

4-bit base, bf16, no recomputation, LoRA on every linear layer, the reference by the base with the adapter off. TRL
1.16 ignores `padding_free`: it warns and pads.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from timing import Timing, settings_of
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import DPOConfig, DPOTrainer


class StepTiming(Timing):
    """Times steps alone: batches of pairs are not those of `Timing`."""

    def _counted(self, collate: Any) -> Any:
        return collate


def main() -> None:
    """Train, and save the adapter."""
    settings, result = settings_of(sys.argv[1:])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"],
        quantization_config=quantization,
        dtype=torch.bfloat16,
        attn_implementation=settings["attention"],
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    timing = StepTiming()
    with TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=model,
            args=arguments(settings, folder),
            train_dataset=load_dataset(
                "json", data_files=settings["pairs"], split="train", cache_dir=str(Path(folder) / "cache")
            ),
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            peft_config=LoraConfig(
                r=settings["r"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[timing],
        )
        trainer.train()
        trainer.save_model(str(Path(folder) / "adapter"))
        timing.write(result)


def arguments(settings: dict[str, Any], folder: str) -> DPOConfig:
    """Return the settings of TRL's trainer."""
    return DPOConfig(
        output_dir=folder,
        beta=settings["beta"],
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="linear",
        max_steps=settings["steps"],
        max_length=settings["max_length"],
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        precompute_ref_log_probs=settings["precompute"],
        precompute_ref_batch_size=settings["precompute_batch_size"],
        optim="adamw_torch_fused",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        train_sampling_strategy="sequential",
        max_grad_norm=1.0,
        seed=1,
    )


if __name__ == "__main__":
    main()
