"""The trainer stage: the only one that imports trl."""

from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.train_loop import train

__all__ = ["train", "QloraTrainer"]
