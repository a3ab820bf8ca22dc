"""TRL's arguments from the config's train section. What our trainer overrides (data, loss, saving) is off in them."""

from typing import Any

import torch
from trl import SFTConfig

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.config.resume_policy import flat_settings
from qlora_train.runs import RunFolder
from qlora_train.training.optimizer import choose_optimizer
from qlora_train.training.tracking import PROJECT


class RunArguments(SFTConfig):
    """TRL's arguments, which experiment trackers log as the settings of the run, by `section.key`.

    Transformers' callbacks log `to_dict`. TRL's own values would be wrong where our trainer does not use them.
    """

    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the settings of the run."""
        return dict(self.settings)


def sft_config(config: RunConfig, adapted: AdaptedModel, run: RunFolder, *, checkpoints_all: bool) -> RunArguments:
    """Return TRL's arguments of a run.

    `StepEndCallback` decides when to log, evaluate and save: the Trainer would use the arguments stored in a checkpoint.
    `checkpoints_all`: Transformers checkpoints all layers.
    """
    train, on_gpu = config.train, adapted.loaded.device.type == "cuda"
    dtype = adapted.loaded.compute_dtype
    arguments = RunArguments(
        output_dir=str(run.checkpoints),
        optim=train.optim if train.optim != "auto" else choose_optimizer(train.optim, adapted),
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.per_device_train_batch_size,
        per_device_eval_batch_size=train.per_device_eval_batch_size,
        gradient_accumulation_steps=1,  # the batch source gives the loop all micro-batches of a step
        gradient_checkpointing=checkpoints_all,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        neftune_noise_alpha=train.neftune_noise_alpha,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16 and on_gpu,
        use_cpu=not on_gpu,
        seed=config.run.seed,
        run_name=run.path.name,
        project=PROJECT,
        report_to="none",  # the trainer has callbacks of its own for them
        disable_tqdm=True,
        remove_unused_columns=False,
        ignore_data_skip=config.data.streaming,  # a stream starts at the run's step
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        average_tokens_across_devices=False,
        eval_strategy="no",
        save_strategy="no",
    )
    arguments.settings = flat_settings(config.model_dump(mode="json"))
    arguments._n_gpu = int(on_gpu)  # with several visible GPUs the Trainer would use DataParallel, which TRL refuses
    return arguments
