"""Time training steps of a config on this machine, without checkpoints or evaluation: tokens a second, padding not counted.

Example: ``GOMP_SPINCOUNT=20000 python scripts/bench_step.py configs/demo.yaml``
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from qlora_train.adapter import attach_adapter, trainable_state
from qlora_train.checkpoint import RunFolder
from qlora_train.config import load_config
from qlora_train.data.batches import Collator, RowDataset, epoch_order, padding_multiple
from qlora_train.loader import load_model
from qlora_train.loss import label_losses
from qlora_train.pipeline import prepare

WARM_UP_STEPS = 2


def main() -> None:
    """Print tokens a second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    with tempfile.TemporaryDirectory() as nowhere:
        source, data = prepare(config, RunFolder(Path(nowhere)))
    loaded = load_model(config.model, config.quantization, source=source)
    model = attach_adapter(loaded, config.lora, seed=config.run.seed).model.train()
    rows, size = RowDataset(data.train), config.train.per_device_train_batch_size
    collate = Collator(loaded.tokenizer.pad_token_id, padding_multiple(loaded.device))
    order = epoch_order(
        data.train.lengths, seed=1, epoch=0, batch_size=size, group_by_length=config.train.group_by_length
    )
    optimizer = torch.optim.AdamW(trainable_state(model).values(), lr=config.train.learning_rate)
    num_tokens, started = 0, 0.0
    for step in range(WARM_UP_STEPS + options.steps):
        if step == WARM_UP_STEPS:
            started = time.perf_counter()
        batch = collate([rows[row] for row in order[step * size : (step + 1) * size]])
        num_tokens += int(batch["attention_mask"].sum()) if step >= WARM_UP_STEPS else 0
        batch = {name: tensor.to(loaded.device) for name, tensor in batch.items() if name != "row"}
        with torch.autocast(loaded.device.type, loaded.compute_dtype):
            loss = label_losses(model, **batch).nats.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable_state(model).values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{num_tokens / (time.perf_counter() - started):.0f} tokens/s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
