"""Training: TRL's SFTTrainer, fed with our own tokens, masks and order, and saving checkpoints of our own.

The only file that imports trl. What is overridden, and why:

- the loss is the summed negative log-likelihood of all label tokens of the accumulated batch, divided by their count;
- the order of the rows is a pure function of the seed and the epoch;
- a non-finite loss or gradient stops the run before the update, naming step and rows;
- checkpoints are whole or absent, hold no pickle, and continue the run bit for bit;
- `eval_loss` is total negative log-likelihood over total label tokens;
- adapters stay float32, where TRL casts those of a quantised model to bfloat16.
"""

import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from qlora_train import durable
from qlora_train.adapter import AdaptedModel, trainable_state
from qlora_train.checkpoint import (
    RunFolder,
    load_parameters,
    load_tree,
    random_state,
    restore_random_state,
    save_tree,
)
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.batches import Collator, epoch_order, to_dataset
from qlora_train.errors import TrainingError
from qlora_train.evaluate import held_out_loss
from qlora_train.loss import label_losses
from qlora_train.progress import Progress

logger = logging.getLogger(__name__)

MAX_SCALER_SKIPS = 8


class EpochBatches:
    """Batches of row indices whose order depends on nothing but the seed and the epoch.

    The epoch is read from the trainer's step count when iteration begins, so that a resumed run needs no sampler state.
    """

    def __init__(self, trainer: "QloraTrainer", lengths: list[int]) -> None:
        self._trainer, self._lengths = trainer, lengths
        train = trainer.config.train
        self.batch_size, self.drop_last = train.per_device_train_batch_size, False
        self._group_by_length = train.group_by_length

    def __len__(self) -> int:
        return math.ceil(len(self._lengths) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        accumulation = self._trainer.config.train.gradient_accumulation_steps
        steps_per_epoch = math.ceil(len(self) / accumulation)
        order = epoch_order(
            self._lengths,
            seed=self._trainer.config.run.seed,
            epoch=self._trainer.state.global_step // steps_per_epoch,
            batch_size=self.batch_size,
            group_by_length=self._group_by_length,
        )
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]


class QloraTrainer(SFTTrainer):
    """SFTTrainer with our loss, order, checks and checkpoints."""

    def __init__(
        self,
        adapted: AdaptedModel,
        data: PreparedData,
        config: RunConfig,
        run: RunFolder,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.config, self.run, self.examples = config, run, data
        self._adapted = adapted
        self._lengths = [len(example.input_ids) for example in data.train]
        self._rows_of_step: list[int] = []
        self._losses_are_finite: list[torch.Tensor] = []
        self._num_scaler_skips = 0
        exact = {name: parameter.detach().clone() for name, parameter in trainable_state(adapted.model).items()}
        super().__init__(
            model=adapted.model,
            args=sft_config(config, adapted, run, has_eval=bool(data.eval)),
            train_dataset=to_dataset(data.train),
            eval_dataset=to_dataset(data.eval) if data.eval else None,
            data_collator=Collator(adapted.loaded.tokenizer.pad_token_id),
            processing_class=adapted.loaded.tokenizer,
            callbacks=callbacks,
        )
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = exact[name]  # undo TRL's cast to bfloat16, bit for bit
        self.model_accepts_loss_kwargs = True  # so that the labels of the whole accumulated batch are counted

    # --- data and loss -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the training batches, in the order of `EpochBatches`."""
        return DataLoader(
            self.train_dataset, batch_sampler=EpochBatches(self, self._lengths), collate_fn=self.data_collator
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return this micro-batch's share of the loss of the accumulated batch, a scalar."""
        assert not return_outputs, "evaluation goes through `evaluate`"
        assert num_items_in_batch is not None
        self._rows_of_step += inputs["row"].tolist()
        losses, _ = label_losses(
            model, input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=inputs["labels"]
        )
        loss = losses.sum() / num_items_in_batch
        self._losses_are_finite.append(torch.isfinite(loss.detach()))
        return loss

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Return the gradient norm, once an optimizer step, after checking that it and the loss are finite."""
        if grad_norm is None:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        rows, self._rows_of_step = self._rows_of_step, []
        finite, self._losses_are_finite = torch.stack(self._losses_are_finite).all(), []
        norm = float(grad_norm)
        self._check_finite(bool(finite), norm, rows)
        return norm

    def _check_finite(self, loss_is_finite: bool, norm: float, rows: list[int]) -> None:
        norm_is_finite = norm - norm == 0.0
        if loss_is_finite and norm_is_finite:
            self._num_scaler_skips = 0
            return
        step = self.state.global_step + 1
        if loss_is_finite and self.accelerator.scaler is not None:
            self._num_scaler_skips += 1
            logger.warning("step %d: gradient overflow in float16, the loss scaler skips the update", step)
            if self._num_scaler_skips < MAX_SCALER_SKIPS:
                return
        where = ", ".join(self.examples.train[row].where for row in rows[:4]) + (" ..." if len(rows) > 4 else "")
        what = f"the gradient norm is {norm}" if loss_is_finite else "the loss is not finite"
        raise TrainingError(
            f"step {step}: {what}; nothing was updated; rows of this step: {where}; look at these rows, lower "
            "train.learning_rate, or resume from the last checkpoint with the same command"
        )

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *_arguments: Any, **_keywords: Any) -> dict[str, float]:
        """Return and log `eval_loss`, nats per label token over the whole evaluation set."""
        started = time.perf_counter()
        result = held_out_loss(
            self.model,
            self.examples.eval,
            batch_size=self.config.train.per_device_eval_batch_size,
            pad_token_id=self._adapted.loaded.tokenizer.pad_token_id,
        )
        metrics = {"eval_loss": result.loss, "eval_runtime_seconds": time.perf_counter() - started}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a whole checkpoint of the step just done, then delete what is not to be kept."""
        with durable.staged_folder(self.run.checkpoint(self.state.global_step)) as folder:
            self._write_state(folder)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.run.checkpoint(self.state.best_global_step))
        train = self.config.train
        best = self.state.best_global_step if train.load_best_model_at_end else None
        self.run.rotate(keep=train.save_total_limit, best=best)

    def _write_state(self, folder: Path) -> None:
        save_tree(folder, "adapter", dict(trainable_state(self.model)))
        save_tree(folder, "optimizer", self.optimizer.state_dict())
        save_tree(folder, "scheduler", self.lr_scheduler.state_dict())
        save_tree(folder, "random", random_state())
        scaler = self.accelerator.scaler
        loop = {
            "tr_loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "num_scaler_skips": self._num_scaler_skips,
            "scaler": scaler.state_dict() if scaler is not None else {},
        }
        save_tree(folder, "loop", loop)
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        load_parameters(trainable_state(self.model), load_tree(folder, "adapter"), str(folder))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.optimizer.load_state_dict(load_tree(Path(checkpoint), "optimizer"))
        self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint), "scheduler"))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), "loop")["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators and the loop's own counters, which the Trainer resets after loading the rest."""
        if checkpoint is None:
            return
        restore_random_state(load_tree(Path(checkpoint), "random"))
        loop = load_tree(Path(checkpoint), "loop")
        self._tr_loss = loop["tr_loss"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
        self._num_scaler_skips = loop["num_scaler_skips"]

    def _load_best_model(self) -> None:
        logger.info("best model: %s (eval_loss %.4f)", self.state.best_model_checkpoint, self.state.best_metric)
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def sft_config(config: RunConfig, adapted: AdaptedModel, run: RunFolder, *, has_eval: bool) -> SFTConfig:
    """Translate the config into TRL's arguments; what they do not decide (data, loss, saving) is switched off there."""
    train, on_gpu = config.train, adapted.loaded.device.type == "cuda"
    dtype = adapted.loaded.compute_dtype
    save = (
        {"save_strategy": "steps", "save_steps": train.save_steps} if train.save_steps else {"save_strategy": "epoch"}
    )
    evaluation: dict[str, Any] = {"eval_strategy": "no"}
    if has_eval:
        evaluation = {"eval_strategy": "steps" if train.eval_steps else "epoch", "eval_steps": train.eval_steps}
        evaluation |= {"load_best_model_at_end": train.load_best_model_at_end, "metric_for_best_model": "eval_loss"}
        evaluation |= {"greater_is_better": False}
    return SFTConfig(
        output_dir=str(run.checkpoints),
        optim=resolve_optimizer(train.optim, on_gpu=on_gpu),
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
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        gradient_checkpointing=resolve_checkpointing(train.gradient_checkpointing, on_gpu=on_gpu),
        gradient_checkpointing_kwargs={"use_reentrant": False},
        neftune_noise_alpha=train.neftune_noise_alpha,
        logging_steps=train.logging_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16 and on_gpu,
        use_cpu=not on_gpu,
        seed=config.run.seed,
        report_to=list(config.run.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        average_tokens_across_devices=False,
        **save,
        **evaluation,
    )


def resolve_optimizer(setting: str, *, on_gpu: bool) -> str:
    """Return the optimizer's name for Transformers, logged with the reason when `auto` chose it."""
    if setting == "auto":
        name, reason = ("paged_adamw_8bit", "on a GPU") if on_gpu else ("adamw_torch", "a CPU pages nothing")
        logger.info("optimizer: %s (%s)", name, reason)
        return name
    if setting.startswith("paged") and not on_gpu:
        logger.warning("optimizer: %s runs without paging on a CPU", setting)
    return setting


def resolve_checkpointing(setting: bool | str, *, on_gpu: bool) -> bool:
    """Return whether activations are recomputed, logged with the reason when `auto` chose it."""
    if setting == "auto":
        logger.info("gradient checkpointing: %s (%s)", on_gpu, "on a GPU" if on_gpu else "memory is no limit on a CPU")
        return on_gpu
    return bool(setting)


class EarlyStopping(TrainerCallback):
    """Stop after `patience` evaluations in a row without a lower loss; decided from the logged history alone."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Look at all evaluations so far."""
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if since_best >= self._patience:
            logger.info("early stopping: eval_loss has not fallen for %d evaluations", since_best)
            control.should_training_stop = True


def train(
    adapted: AdaptedModel, data: PreparedData, config: RunConfig, run: RunFolder, resume_from: Path | None
) -> dict[str, Any]:
    """Train the adapter in place.

    Args:
        adapted: the model; its adapter is trained and left in the model.
        data: tokens and masks.
        config: the run's settings.
        run: where checkpoints and metrics go.
        resume_from: a whole checkpoint to continue from, or None.

    Returns:
        What happened: `steps`, `train_loss`, `eval_loss` and `best_step` when there were evaluations, `num_tokens`,
        `train_seconds` of this part of the run.

    Raises:
        TrainingError: a non-finite loss or gradient, or memory that ran out.
    """
    callbacks: list[TrainerCallback] = [Progress(run)]
    if config.train.early_stopping_patience is not None:
        callbacks.append(EarlyStopping(config.train.early_stopping_patience))
    trainer = QloraTrainer(adapted, data, config, run, callbacks)
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    try:
        output = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"out of GPU memory at step {trainer.state.global_step + 1} ({error}); halve "
            "train.per_device_train_batch_size and double train.gradient_accumulation_steps, or lower data.max_length"
        ) from None
    evaluations = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    best = trainer.state.best_global_step if config.train.load_best_model_at_end else None
    return {
        "steps": trainer.state.global_step,
        "taken_from_step": best or trainer.state.global_step,
        "train_loss": output.training_loss,
        "eval_loss": (trainer.state.best_metric if best else evaluations[-1]) if evaluations else None,
        "num_tokens": int(trainer.state.num_input_tokens_seen),
        "train_seconds": time.perf_counter() - started,
    }
