"""This package as a peer of `scripts/bench.py`: the trainer of a run, with its own choices, rows by length.

It tells which lines of the rows its steps took, in order: the others are given these.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from timing import Timing, settings_of

from qlora_train.adapters import attach_adapter
from qlora_train.config import load_config
from qlora_train.models import load_model
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training.memory.dequantized_cache import fill_cache
from qlora_train.training.parity.fused_kernels import choose_fused_kernels
from qlora_train.training.qlora_trainer import QloraTrainer


def main() -> None:
    """Train a few steps."""
    settings, result = settings_of(sys.argv[1:])
    with TemporaryDirectory() as folder:
        config = load_config(
            Path(settings["config"]),
            [
                f"model.model_name_or_path={settings['model']}",
                f"data.train={settings['conversations']}",
                "data.eval=null",
                f"data.max_length={settings['max_length']}",
                f"lora.r={settings['r']}",
                f"lora.lora_alpha={settings['alpha']}",
                f"train.learning_rate={settings['learning_rate']}",
                f"train.per_device_train_batch_size={settings['batch_size']}",
                f"train.max_steps={settings['steps']}",
                "train.gradient_checkpointing=none",
                "train.logging_steps=1",
                f"run.output_dir={folder}",
                *settings["overrides"],
            ],
        )
        run = RunFolder(Path(folder))
        source, data = prepare(config, run)
        loaded = load_model(config.model, config.quantization, source=source)
        adapted = attach_adapter(loaded, config.lora, seed=1)
        timing = Timing()
        fast = choose_fused_kernels(adapted, data, config, run)
        if fast is not None:
            fill_cache(fast.weights, config.train.dequantized_cache_gb, loaded.device)
        trainer: Any = QloraTrainer(adapted, data, config, run, [timing])
        trainer.save = lambda: None
        trainer.train()
        lines = [int(data.train[row].where.rpartition(":")[2]) for batch in timing.rows for row in batch]
        timing.write(result, lines=lines[: settings["steps"] * settings["batch_size"]])


if __name__ == "__main__":
    main()
