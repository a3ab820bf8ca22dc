"""Write docs/convert.md from the tables of other trainers' keys.

    python scripts/conversion_page.py [FILE]

A test holds the page to what this writes.
"""

import sys
from pathlib import Path

from qlora_train.config import RunConfig
from qlora_train.config.other_trainers.all_trainers import OTHER_TRAINERS
from qlora_train.config.other_trainers.key_mapping import OtherTrainer

PAGE = Path(__file__).parents[1] / "docs" / "convert.md"
MAX_KEYS = 4
HEAD = """# Coming from another trainer

```
qlora-train convert their.yaml -o mine.yaml
qlora-train check mine.yaml
```

`convert` reads a config of Axolotl, LLaMA-Factory, TRL (`trl sft`, `trl dpo`, `trl kto`, `cpo.py`, `orpo.py`), Unsloth
(`unsloth train`, `unsloth-cli.py`), torchtune or ms-swift, and writes one of ours. The keys show which trainer it is;
`--from NAME` says so where they do not. A command line is read from a `.sh` file. LLaMA-Factory's data sets are looked up
in the `dataset_info.json` of its `dataset_dir`.

- Each value has a comment with the key that it comes from: `r: 32  # axolotl: lora_r`.
- What the other trainer does where its config is silent is written down if our default differs:
  `weight_decay: 0.1  # ms-swift's default`.
- Every other key is in one of four lists, printed and at the end of the file: to do before training, different in
  meaning, not carried over (and why), not needed here. None is dropped silently.
- The result passes `qlora-train check` if the files exist. If the base model or the data is missing, the exit status is 2.

Differences that matter:

| there | here |
|---|---|
| micro-batches of each GPU | `train.gradient_accumulation_steps` counts those of all GPUs: multiply by their number |
| warm-up steps | `train.warmup_ratio`, a share of the steps; it is computed if the file has `max_steps` |
| held-out rows at random | `data.eval`, a share chosen by a hash of each row |
| a base in 8 bits | 4 bits, or 16 with `quantization.load_in_4bit: false` |
| a named template for an instruction-tuned model | the tokenizer's own template |
| a YAML file of TRL for ORPO, which looks like DPO | convert the command, or set `train.objective` |
| PPO, GRPO and other online objectives | not available; TRL loads the adapters and merged models |
| FlashAttention | `sdpa`, as exact and without its package; `model.attn_implementation: flash_attention_2` uses it |

A key of another trainer in one of our configs is an error that names the setting:
`mine.yaml:9: train.micro_batch_size: unknown key; here it is train.per_device_train_batch_size`.

## Keys

This table is made by `python scripts/conversion_page.py` from `qlora_train/config/other_trainers/`.

"""


def page() -> str:
    """Return the page."""
    lines = ["| setting | " + " | ".join(each.title for each in OTHER_TRAINERS.values()) + " |", "|---" * 7 + "|"]
    for section, spec in RunConfig.model_fields.items():
        for key in spec.annotation.model_fields:  # type: ignore[union-attr]
            cells = [_keys(each, f"{section}.{key}") for each in OTHER_TRAINERS.values()]
            if any(cells):
                lines.append(f"| `{section}.{key}` | " + " | ".join(cells) + " |")
    return HEAD + "\n".join(lines) + "\n"


def _keys(trainer: OtherTrainer, setting: str) -> str:
    """Return the trainer's keys for a setting, a section's before the same one without its section."""
    own = [key for key, row in trainer.keys.items() if row.setting.partition("[")[0] == setting]
    nested = {key.rpartition(".")[2] for key in own if "." in key}
    shown = [key for key in own if key not in nested and not key.startswith(("test_datasets[", "pretraining_dataset["))]
    return ", ".join(f"`{key}`" for key in shown[:MAX_KEYS]) + (", ..." if len(shown) > MAX_KEYS else "")


if __name__ == "__main__":
    (Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE).write_text(page(), encoding="utf-8")
