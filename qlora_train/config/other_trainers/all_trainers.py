"""The trainers whose configs are known."""

from qlora_train.config.other_trainers.axolotl import AXOLOTL
from qlora_train.config.other_trainers.key_mapping import OtherTrainer
from qlora_train.config.other_trainers.llama_factory import LLAMA_FACTORY
from qlora_train.config.other_trainers.ms_swift import MS_SWIFT
from qlora_train.config.other_trainers.torchtune import TORCHTUNE
from qlora_train.config.other_trainers.trl import TRL
from qlora_train.config.other_trainers.unsloth import UNSLOTH

OTHER_TRAINERS: dict[str, OtherTrainer] = {
    each.name: each for each in (AXOLOTL, LLAMA_FACTORY, TRL, UNSLOTH, TORCHTUNE, MS_SWIFT)
}
