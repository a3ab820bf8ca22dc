"""Training: the only package that imports trl."""

from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.train_loop import train

__all__ = ["train", "QloraTrainer"]
