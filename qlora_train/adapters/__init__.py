"""LoRA on every linear layer but the output head, trained in float32 over the frozen 4-bit base."""

from qlora_train.adapters.attach import AdaptedModel, attach_adapter, trainable_state
from qlora_train.adapters.load import load_trained
from qlora_train.adapters.targets import choose_targets, find_linears

__all__ = ["AdaptedModel", "attach_adapter", "load_trained", "trainable_state", "find_linears", "choose_targets"]
