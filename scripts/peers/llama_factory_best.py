"""LLaMA-Factory as a peer of `scripts/bench.py`: bf16, no recomputation, rows in order, prompts masked by its template.

On a CPU it needs an empty module `torchaudio` beside it, whose released builds do not load next to torch's CPU build.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from llamafactory.train.tuner import run_exp
from timing import Timing, settings_of

COLUMNS = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "system_tag": "system",
    },
}


def main() -> None:
    """Train a few steps."""
    settings, result = settings_of(sys.argv[1:])
    timing = Timing()
    with TemporaryDirectory() as folder:
        rows = {"rows": {"file_name": settings["conversations"], **COLUMNS}}
        (Path(folder) / "dataset_info.json").write_text(json.dumps(rows))
        run_exp(
            {
                "stage": "sft",
                "do_train": True,
                "model_name_or_path": settings["model"],
                "quantization_bit": 4,
                "quantization_type": "nf4",
                "double_quantization": True,
                "finetuning_type": "lora",
                "lora_target": "all",
                "lora_rank": settings["r"],
                "lora_alpha": settings["alpha"],
                "lora_dropout": 0.0,
                "flash_attn": "auto",
                "dataset_dir": folder,
                "dataset": "rows",
                "template": settings["llama_factory_template"],
                "cutoff_len": settings["max_length"],
                "overwrite_cache": True,
                "per_device_train_batch_size": settings["batch_size"],
                "gradient_accumulation_steps": 1,
                "learning_rate": settings["learning_rate"],
                "lr_scheduler_type": "linear",
                "max_steps": settings["steps"],
                "max_grad_norm": 1.0,
                "optim": settings["optim"],
                "disable_shuffling": True,
                "bf16": True,
                "use_cpu": not torch.cuda.is_available(),
                "disable_gradient_checkpointing": True,
                "logging_steps": 1,
                "save_strategy": "no",
                "report_to": "none",
                "seed": 1,
                "output_dir": str(Path(folder) / "run"),
            },
            callbacks=[timing],
        )
        timing.write(result)


if __name__ == "__main__":
    main()
