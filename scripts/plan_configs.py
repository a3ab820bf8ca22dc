"""Count the memory of every shipped config at its own batch, with `train.gradient_checkpointing: full`.

Micro-batches are full, and the loss is computed in chunks. Not counted: the CUDA context, fragmentation, start-up phases
(`scripts/count_memory.py` has those). With `train.gradient_checkpointing: auto` a run takes more where the GPU has it.

Example::

    PYTHONPATH=. python scripts/plan_configs.py > benchmarks/results/plan.txt
"""

from pathlib import Path

from memory_plan import memory_plan

from qlora_train.config import load_config
from qlora_train.objectives.chunked_loss import CHUNK_BYTES, MIN_CHUNK_TOKENS
from tests.config.test_shipped_yaml import MODELS

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Print a line per config."""
    print(f"{'config':28} {'rows x tokens':>14} {'GB':>6}")
    for path in sorted([*ROOT.glob("configs/*.yaml"), *ROOT.glob("recipes/*.yaml")]):
        config = load_config(path)
        if config.model.model_name_or_path not in MODELS:
            continue  # the demo trains on the CPU
        if config.parallel.strategy == "fsdp":
            continue  # rehearse.py counts a rank
        rows, length = config.train.per_device_train_batch_size, config.data.max_length
        json_values = MODELS[config.model.model_name_or_path]
        chunk_tokens = max(MIN_CHUNK_TOKENS, CHUNK_BYTES["cuda"] // (4 * json_values["vocab_size"]))
        plan = memory_plan(
            json_values,
            r=config.lora.r,
            tokens=rows * length,
            num_labels=min(rows * length, chunk_tokens),
            double_quant=config.quantization.bnb_4bit_use_double_quant,
            accumulates=config.train.gradient_accumulation_steps > 1,
            dropout=config.lora.lora_dropout > 0,
        )
        print(f"{path.relative_to(ROOT)!s:28} {f'{rows} x {length}':>14} {plan.total_bytes / 1e9:6.1f}")


if __name__ == "__main__":
    main()
