"""A padded batch for pico models."""

import torch

BATCH = {
    "input_ids": torch.arange(60).reshape(3, 20) * 5 % 300 + 4,
    "labels": torch.arange(60).reshape(3, 20) * 5 % 300 + 4,
    "attention_mask": torch.ones(3, 20, dtype=torch.long).index_fill(1, torch.arange(15, 20), 1),
}
