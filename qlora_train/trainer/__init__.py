"""The trainer stage: the only one that imports trl."""

from qlora_train.trainer.fit import train
from qlora_train.trainer.sft import QloraTrainer

__all__ = ["train", "QloraTrainer"]
