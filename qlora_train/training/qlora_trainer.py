"""TRL's SFTTrainer, fed with our own tokens, masks and order, and saving checkpoints of our own.

What is overridden, and why:

- the loop takes an optimizer step at a time, which has the micro-batches that the feed makes of its rows;
- rows of a step lie end to end, and what they begin with is computed once, where that is worth it (see `padding_free`);
- the loss is the summed negative log-likelihood of all label tokens of the accumulated batch, divided by their count;
- rows come padded or packed from mapped files, in an order that is a pure function of the seed and the epoch, or streamed;
- a non-finite loss or gradient never reaches the weights (see `numbers`);
- checkpoints are whole or absent, hold no pickle, and continue the run bit for bit;
- `eval_loss` is total negative log-likelihood over total label tokens;
- warm-up begins at a rate above 0 (see `lr_schedule`);
- adapters stay float32, where TRL casts those of a quantised model to bfloat16.
"""

import logging
import math
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState
from trl import SFTTrainer

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.data.collate import Batch, FlatteningCollator
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.kernels import host_copies
from qlora_train.objectives.router_loss import ROUTER_AUX_LOSS, choose_router_aux_loss_coef
from qlora_train.objectives.sft_loss import LabelLosses, choose_chunk_tokens, label_losses
from qlora_train.runs import (
    RunFolder,
    checkpoint_errors,
    load_parameters,
    load_tree,
    random_state,
    restore_random_state,
    save_tree,
)
from qlora_train.training.batch_source import BatchSource, RowBatches, make_batch_source
from qlora_train.training.lr_schedule import fast_forward, make_lr_scheduler
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing, choose_checkpointing
from qlora_train.training.memory.activation_offloading import ActivationOffloading
from qlora_train.training.memory.worst_case_batch import (
    max_documents,
    repeat_to_budget,
    split_into_documents,
    worst_case_rows,
)
from qlora_train.training.optimizer import page_restored_state
from qlora_train.training.padding_free import choose_padding_free
from qlora_train.training.parity.document_isolation import isolate_documents
from qlora_train.training.step_end import StepEndCallback, best_step, evaluations, make_schedule
from qlora_train.training.step_guard import AdvanceSkippedSchedule, NonFiniteGuard, Step, check_finite
from qlora_train.training.trl_arguments import choose_offloading, sft_config
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
STAND_IN = datasets.Dataset.from_dict({"row": [0]})
"""What TRL is given as its data: it looks at the columns, and reads rows of its own loaders only, which are overridden."""


RESERVED_SAVES = 3
"""What is kept free before the end of `run.max_minutes`, in times that the slowest checkpoint took."""


class QloraTrainer(SFTTrainer):
    """SFTTrainer with our loss, order, checks and checkpoints."""

    _tr_loss: torch.Tensor  # sum of the losses since the last log line
    _globalstep_last_logged: int
    lr_scheduler: LambdaLR | None

    def __init__(
        self,
        adapted: AdaptedModel,
        data: PreparedData,
        config: RunConfig,
        run: RunFolder,
        callbacks: list[TrainerCallback],
        *,
        group_batch_size: int | None = None,
        layer_checkpointing: LayerCheckpointing | None = None,
        on_fused_kernels: bool = True,
    ) -> None:
        self.config, self.run, self.examples = config, run, data
        self.adapted = adapted
        loaded = adapted.loaded
        self._feed: BatchSource = make_batch_source(
            data.train, config, loaded.tokenizer.pad_token_id, loaded.device,
            group_batch_size=group_batch_size or config.train.per_device_train_batch_size,
        )  # fmt: skip
        self.balance_weight = choose_router_aux_loss_coef(config.train.router_aux_loss_coef, adapted.model)
        self.loss_chunk_tokens = choose_chunk_tokens(adapted.model)
        if self.loss_chunk_tokens is None:
            logger.info("loss: the logits of all labels at once, as this model's head does not run by itself")
        if isinstance(self._feed, RowBatches):
            self._feed = self._laid_out(self._feed, on_fused_kernels=on_fused_kernels)
        offloads = choose_offloading(config.train.activation_offloading, on_gpu=loaded.device.type == "cuda")
        self._activations = ActivationOffloading(loaded.device).forward_pass if offloads else nullcontext
        self._schedule = make_schedule(config, self._feed.steps_per_epoch, has_eval=bool(data.eval))
        self._micro_losses: list[torch.Tensor] = []
        self._micro_rows: list[torch.Tensor] = []
        self._micro_balances: list[torch.Tensor] = []
        self._balances: list[float] = []  # since the last log line
        self.numbers = NonFiniteGuard(config.train)
        self.layer_checkpointing = layer_checkpointing or LayerCheckpointing(adapted.model, [])
        level, checkpoints_all = choose_checkpointing(
            config.train,
            self.layer_checkpointing,
            on_gpu=loaded.device.type == "cuda",
            supported=loaded.model.supports_gradient_checkpointing,
        )
        if checkpoints_all:
            self.layer_checkpointing.leave_to_transformers()
        else:
            self.layer_checkpointing.set(level)
        exact = {name: parameter.detach().clone() for name, parameter in trainable_state(adapted.model).items()}
        super().__init__(
            model=adapted.model,
            args=sft_config(config, adapted, run, checkpoints_all=checkpoints_all),
            train_dataset=STAND_IN,
            eval_dataset=STAND_IN if data.eval else None,
            processing_class=adapted.loaded.tokenizer,
            callbacks=[*callbacks, AdvanceSkippedSchedule(), StepEndCallback(self._schedule)],
        )
        self.remove_callback(PrinterCallback)
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = exact[name]  # undo TRL's cast to bfloat16, bit for bit
        self.model_accepts_loss_kwargs = True  # so that the labels of the whole accumulated batch are counted

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer, after forgetting which tensors an earlier one of this process kept in 32 bits.

        bitsandbytes remembers them by their place among the parameters, for every optimizer that comes after.
        """
        GlobalOptimManager.get_instance().initialize()
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Make the schedule of the learning rate, once."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_lr_scheduler(
                self.args.lr_scheduler_type,
                optimizer or self.optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True  # `train` makes it anew
        return self.lr_scheduler

    # --- data and loss -----------------------------------------------------------------------------------------------

    def _laid_out(self, feed: RowBatches, *, on_fused_kernels: bool) -> RowBatches:
        """Return the feed with its rows laid out as this model and these rows allow, and let the model attend so."""
        config, loaded, balances = self.config, self.adapted.loaded, self.balance_weight > 0
        if config.data.packing:
            how = isolate_documents(self.adapted, config, feed.rows)
            logger.info("packing: documents attend to themselves alone (%s); checked on this model", how)
        if on_fused_kernels:
            in_chunks = self.loss_chunk_tokens is not None
            found = choose_padding_free(self.adapted, feed, config, self.run, balances=balances, in_chunks=in_chunks)
            if found is not None:
                return found
        counts_padding = config.data.packing and balances  # the load-balancing loss does
        return feed.laid_out(FlatteningCollator(loaded.tokenizer.pad_token_id)) if counts_padding else feed

    def worst_case_batches(self) -> list[Batch]:
        """Return micro-batches as large as any of this run's: of most tokens and labels, and of these in most documents.

        The second is left out where a batch has no more documents than rows. Each row computes all of its tokens.
        """
        rows = worst_case_rows(self.examples, self.config)
        feed = self._feed
        if not isinstance(feed, RowBatches) or not isinstance(feed.collate.collate, FlatteningCollator):
            return [feed.batch_of(rows)]
        most = feed.collate.budget
        if most is not None:
            rows = repeat_to_budget(rows[0], most)
        num_documents = max_documents(feed.rows, self.config, most)
        batches = [rows] if num_documents <= len(rows) else [rows, split_into_documents(rows, num_documents)]
        return [feed.batch_of(batch) for batch in batches]

    def _track_num_input_tokens(self, inputs: list[Batch]) -> None:
        """Count the tokens of the rows: neither padding, nor a shared prefix once for all that have it."""
        self.state.num_input_tokens_seen += sum(map(self._feed.num_tokens, inputs))

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the optimizer steps, each as a list of its micro-batches."""
        return self._feed.loader(self)

    def training_step(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Make the gradients of an optimizer step, and return its loss, a scalar."""
        losses = [super(QloraTrainer, self).training_step(model, batch, num_items_in_batch) for batch in inputs]
        return torch.stack(losses).sum()

    def _get_num_items_in_batch(self, batch_samples: list[list[Batch]], device: torch.device) -> Any:
        """Return the labels of the optimizer step, over all its micro-batches."""
        batches = [batch for step in batch_samples for batch in step]
        return int(super()._get_num_items_in_batch(batches, torch.device("cpu")))  # on the device the host would wait

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Bring to the device what the model reads as it is; the host needs the rest (see `label_losses`)."""
        on_device = ("input_ids", "attention_mask")
        return {
            name: host_copies.to_device(tensor, self.args.device) if name in on_device else tensor
            for name, tensor in inputs.items()
        }

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
        losses = self.label_losses(model, inputs)
        total = losses.nll.sum()
        if losses.aux_loss is not None:
            total = total + self.balance_weight * losses.aux_loss * losses.nll.numel()
            self._micro_balances.append(losses.aux_loss.detach())
        loss = total / num_items_in_batch
        if not self._micro_losses:
            self._loss_before_step = self._tr_loss.clone()
        self._micro_losses.append(loss.detach())
        self._micro_rows.append(inputs["row"])
        return loss

    def label_losses(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LabelLosses:
        """Return the losses of a micro-batch, made as the settings say."""
        named = {name: tensor for name, tensor in inputs.items() if name != "row"}
        with self._activations(model):
            return label_losses(model, self.loss_chunk_tokens, with_aux_loss=self.balance_weight > 0, **named)

    # --- numbers -----------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Return the gradient norm, once an optimizer step, after judging its numbers; None for a step that is left out."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        loss = float(torch.stack(self._micro_losses).sum())
        rows, self._micro_losses, self._micro_rows = self._micro_rows, [], []
        if self._micro_balances:
            self._balances += torch.stack(self._micro_balances).tolist()
            self._micro_balances = []
        scaled = self.accelerator.scaler is not None
        if self.numbers.allow(Step(self.state.global_step + 1, loss, norm, scaled, lambda: self._places(rows))):
            return norm
        model.zero_grad()  # without gradients an optimizer changes neither weights nor moments
        self._tr_loss = self._loss_before_step
        self._globalstep_last_logged += 1  # the mean that is logged next is over one step less
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, the steps' with the mean load-balancing loss of their micro-batches."""
        if "loss" in logs and self._balances:
            logs[ROUTER_AUX_LOSS] = sum(self._balances) / len(self._balances)
            self._balances = []
        super().log(logs, start_time)

    def _places(self, rows: list[torch.Tensor]) -> str:
        numbers = [row for batch in rows for row in batch.tolist()]
        return ", ".join(self._feed.where(number) for number in numbers[:4]) + " ..." * (len(numbers) > 4)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *_arguments: Any, **_keywords: Any) -> dict[str, float]:
        """Return and log `eval_loss`, nats per label token over the whole evaluation set."""
        started = time.perf_counter()
        result = held_out_loss(
            self.model,
            self.examples.eval,
            batch_size=self.config.train.per_device_eval_batch_size,
            pad_token_id=self.adapted.loaded.tokenizer.pad_token_id,
        )
        if not math.isfinite(result.loss):
            raise TrainingError(
                f"step {self.state.global_step}: eval_loss is {result.loss}; lower train.learning_rate, or use bfloat16 "
                "where the hardware has it (quantization.bnb_4bit_compute_dtype)"
            )
        metrics = {"eval_loss": result.loss, "eval_runtime_seconds": time.perf_counter() - started}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Whether nothing is left to train."""
        return self._schedule.is_over(self.state.global_step, self.state.log_history)

    def has_pending_evaluation(self) -> bool:
        """Whether an evaluation was due after the last step and a stop left it out."""
        step = self.state.global_step
        return self._schedule.evaluates_after(step) and step not in evaluations(self.state.log_history)

    def save(self) -> None:
        """Write a whole checkpoint of the step just done, then delete what is not to be kept."""
        assert not self._micro_losses, "this release of transformers takes steps without the check of `_get_grad_norm`"
        started = time.perf_counter()
        step = self.state.global_step
        check_finite(step, trainable_state(self.model), self.optimizer.state)
        with atomic_io.atomic_folder(self.run.checkpoint(step), self.run.checkpoint_metadata(step)) as folder:
            save_tree(folder, "adapter", dict(trainable_state(self.model)))
            save_tree(folder, "optimizer", self.optimizer.state_dict())
            save_tree(folder, "random", random_state())
            save_tree(folder, "loop", self._loop_state())
            atomic_io.write_file(folder / STATE_FILE, lambda path: self.state.save_to_json(str(path)))
        best = best_step(self.state.log_history) if self.config.train.load_best_model_at_end else None
        self.run.rotate(keep=self.config.train.save_total_limit, best=best)
        signals.reserve_time(RESERVED_SAVES * (time.perf_counter() - started))

    def run_pending_evaluation(self, checkpoint: Path) -> None:
        """Do the evaluation that a stop left out after a checkpoint, and write the checkpoint again with its result."""
        with self.accelerator.autocast():  # as inside the training loop, which begins later
            self.evaluate()
        with atomic_io.atomic_folder(checkpoint, atomic_io.read_metadata(checkpoint)) as folder:
            for file in checkpoint.iterdir():
                if file.name not in (STATE_FILE, atomic_io.MANIFEST):
                    shutil.copyfile(file, folder / file.name)
            atomic_io.write_file(folder / STATE_FILE, lambda path: self.state.save_to_json(str(path)))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.save()

    def _loop_state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "tr_loss": self._tr_loss,
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "numbers": self.numbers.state(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "feed": self._feed.memory(),
            "balances": self._balances,
        }

    def restore(self, checkpoint: Path) -> None:
        """Take over the adapter and the history of a checkpoint, as far as they tell what is left to do."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        if self.state.global_step != atomic_io.read_metadata(checkpoint)["step"]:
            raise ValueError(f"{STATE_FILE} is that of step {self.state.global_step}")

    def load_adapter_of(self, step: int) -> None:
        """Load the adapter of one of this run's checkpoints."""
        folder, problem = self.run.checkpoint(step), self.run.checkpoint_problem(step)
        if problem is not None:
            raise CheckpointError(f"{folder}: the best checkpoint is damaged: {problem}; restore it, or train again")
        load_parameters(trainable_state(self.model), load_tree(folder, "adapter"), str(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with checkpoint_errors(folder):
            load_parameters(trainable_state(self.model), load_tree(folder, "adapter"), str(folder))
            loop = load_tree(folder, "loop")
            self.numbers.restore(loop["numbers"])
            self._feed.remember(loop["feed"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take over the optimizer's state; rates and the like come from the settings, their schedule from the step."""
        if checkpoint is None:
            return
        with checkpoint_errors(Path(checkpoint)):
            stored = load_tree(Path(checkpoint), "optimizer")
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": stored["state"]})
            page_restored_state(self.optimizer)
        assert self.lr_scheduler is not None
        fast_forward(self.lr_scheduler, self.state.global_step)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.accelerator.scaler is not None:
            with checkpoint_errors(Path(checkpoint)):
                self.accelerator.scaler.load_state_dict(load_tree(Path(checkpoint), "loop")["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the generators and those counters of the loop that the Trainer resets after loading the rest."""
        if checkpoint is None:
            return
        with checkpoint_errors(Path(checkpoint)):
            restore_random_state(load_tree(Path(checkpoint), "random"))
            loop = load_tree(Path(checkpoint), "loop")
            self._tr_loss = loop["tr_loss"].to(self.args.device)
            self._total_loss_scalar, self._globalstep_last_logged = loop["total_loss"], loop["last_logged"]
            self._balances = list(loop["balances"])
