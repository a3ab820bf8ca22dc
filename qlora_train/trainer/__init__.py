"""The trainer stage: the only one that imports trl."""

from qlora_train.trainer.arguments import check_trackers
from qlora_train.trainer.fit import train
from qlora_train.trainer.sft import QloraTrainer

__all__ = ["train", "QloraTrainer", "check_trackers"]
