"""Axolotl as a peer of `scripts/bench.py`: bf16, no recomputation, rows in order, prompts masked by the chat template.

On a CPU its LoRA kernels, which are Triton's, are off, and a plugin sets `use_cpu`, for which it has no key; on a GPU its
own choice of kernels stays.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import BasePlugin
from axolotl.train import setup_model_and_trainer
from timing import Timing, settings_of

ON_CPU = {
    "plugins": [f"{Path(__file__).stem}.OnCpu"],
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}


class OnCpu(BasePlugin):
    """Trains on the CPU."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Return what the trainer's arguments are given on top."""
        return {"use_cpu": True}


def main() -> None:
    """Train a few steps."""
    settings, result = settings_of(sys.argv[1:])
    timing = Timing()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config_of(settings, folder)))
        config = load_cfg(str(file))
        trainer, *_ = setup_model_and_trainer(config, load_datasets(cfg=config))
        trainer.add_callback(timing)
        trainer.train()
        timing.write(result)


def config_of(settings: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the config of a run in `folder`."""
    config = {
        "base_model": settings["model"],
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": settings["r"],
        "lora_alpha": settings["alpha"],
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "datasets": [
            {
                "path": settings["conversations"],
                "ds_type": "json",
                "type": "chat_template",
                "field_messages": "messages",
                "roles_to_train": ["assistant"],
            }
        ],
        "shuffle_merged_datasets": False,
        "dataset_prepared_path": f"{folder}/prepared",
        "chat_template": "tokenizer_default",
        "val_set_size": 0,
        "sequence_len": settings["max_length"],
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "curriculum_sampling": True,
        "micro_batch_size": settings["batch_size"],
        "gradient_accumulation_steps": 1,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler": "linear",
        "max_steps": settings["steps"],
        "max_grad_norm": 1.0,
        "optimizer": settings["optim"],
        "bf16": True,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "dataloader_num_workers": 0,
        "seed": 1,
        "output_dir": f"{folder}/run",
        "sdp_attention": True,
    }
    return config if torch.cuda.is_available() else config | ON_CPU


if __name__ == "__main__":
    main()
