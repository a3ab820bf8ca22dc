"""TRL's SFTTrainer with our own batches, loss, evaluation and checkpoints (`ResumableTrainer`).

What differs from SFTTrainer, and why:

- a loop iteration is an optimizer step, whose micro-batches the batch source makes, possibly padding-free;
- each rank computes its share of a step; label counts, gradients and losses are summed over all ranks;
- the loss is that of an `Objective`, summed over the accumulated batch and divided by its items: label tokens for SFT;
- the order of rows is a function of seed and epoch;
- non-finite losses and gradients never reach the weights (`step_guard`);
- `eval_loss` is the objective's mean over all held-out rows, not a mean of batch means;
- warm-up starts above 0 (`lr_schedule`);
- adapters stay float32, which TRL casts to bfloat16 for quantized models.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import datasets
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from qlora_train.adapters import AdaptedModel, trainable_state
from qlora_train.config import RunConfig
from qlora_train.config.schema import TrainSection
from qlora_train.data import PreparedData
from qlora_train.data.collate import Batch, FlatteningCollator
from qlora_train.data.types import Example
from qlora_train.evaluation.objective_table import SFT, Objective
from qlora_train.kernels import host_copies
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.objectives.batch_loss import SFT_LOSS, BatchLoss
from qlora_train.objectives.label_losses import choose_chunk_tokens
from qlora_train.objectives.router_loss import ROUTER_AUX_LOSS, choose_router_aux_loss_coef
from qlora_train.parallel import context
from qlora_train.runs import RunFolder
from qlora_train.training.batch_source import BatchSource, RowBatches, make_batch_source
from qlora_train.training.flops_utilization import ModelFlops, utilization
from qlora_train.training.gradient_sum import sum_gradients_
from qlora_train.training.lr_schedule import make_lr_scheduler
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing, choose_checkpointing
from qlora_train.training.memory.heap_trimming import TrimHeapCallback
from qlora_train.training.metric_means import MetricMeans
from qlora_train.training.padding_free import choose_padding_free
from qlora_train.training.replicas import SeedEachRank
from qlora_train.training.resumable_trainer import ResumableTrainer
from qlora_train.training.run_clock import RunClock
from qlora_train.training.speed_meter import SpeedMeter
from qlora_train.training.step_end import StepEndCallback, make_schedule
from qlora_train.training.step_guard import AdvanceSkippedSchedule, NonFiniteGuard, Step
from qlora_train.training.tracking import tracker_callbacks
from qlora_train.training.trl_arguments import sft_config
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import TrainingError

if TYPE_CHECKING:
    from qlora_train.training.memory.activation_offloading import ActivationOffloading

logger = logging.getLogger(__name__)

PLACEHOLDER = datasets.Dataset.from_dict({"row": [0]})
"""Data set for TRL, which checks its columns; the loaders that would read rows are overridden."""
MAX_NAMED_ROWS = 4


class QloraTrainer(ResumableTrainer):
    """SFTTrainer with our batches, loss, checks and checkpoints.

    Args:
        adapted: the model; its adapter is trained in place.
        callbacks: called before our own.
        group_batch_size: see `RowOrder`; None: that of the settings.
        layer_checkpointing: the model's layers; None: without fused MLPs.
        has_fused_kernels: padding-free training requires them.
        objective: what is trained.
        flops: of the model, for MFU; None: it is not logged.
        clock: of the run; None: a new one.
    """

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
        has_fused_kernels: bool = True,
        objective: Objective = SFT,
        flops: ModelFlops | None = None,
        clock: RunClock | None = None,
    ) -> None:
        self.config, self.run, self.examples, self.adapted = config, run, data, adapted
        self.objective = objective
        self.aux_loss_weight = choose_router_aux_loss_coef(config.train.router_aux_loss_coef, adapted.model)
        chunk_tokens = choose_chunk_tokens(adapted.model)
        self.loss_chunk_tokens = chunk_tokens if context().all_true(chunk_tokens is not None) else None
        if self.loss_chunk_tokens is None:
            logger.debug("loss: not chunked (this model's head cannot run by itself)")
        self._offloading = _make_offloading(config.train, adapted.loaded.device)
        self.batch_source = self._make_batch_source(group_batch_size, has_fused_kernels)
        self.schedule = make_schedule(config, self.batch_source.steps_per_epoch, has_eval=bool(data.eval))
        self._step_loss: torch.Tensor | None = None
        self._step_tokens = self._step_sft_tokens = self._step_labels = self._max_micro_batches = 0
        self._micro_rows: list[torch.Tensor] = []
        loaded = adapted.loaded
        self._metric_means = MetricMeans()
        self.clock = clock or RunClock()
        self.clock.schedule = self.schedule
        self._speed = SpeedMeter(self.clock, utilization(flops, loaded.device, loaded.compute_dtype))
        self.guard = NonFiniteGuard(config.train)
        self.layer_checkpointing = layer_checkpointing or LayerCheckpointing(adapted.model, [])
        checkpoints_all = choose_checkpointing(
            config.train,
            self.layer_checkpointing,
            on_gpu=adapted.loaded.device.type == "cuda",
            supported=adapted.loaded.model.supports_gradient_checkpointing,
        )
        self._step_end = StepEndCallback(self.schedule)
        exact = {name: parameter.detach().clone() for name, parameter in trainable_state(adapted.model).items()}
        super().__init__(
            model=adapted.model,
            args=sft_config(config, adapted, run, checkpoints_all=checkpoints_all),
            train_dataset=PLACEHOLDER,
            eval_dataset=PLACEHOLDER if data.eval else None,
            processing_class=adapted.loaded.tokenizer,
            callbacks=[
                *callbacks,  # the clock starts after the answers before the first step
                self.clock,
                self._speed,
                TrimHeapCallback(),
                AdvanceSkippedSchedule(),
                SeedEachRank(config.run.seed),
                self._step_end,
                *tracker_callbacks(config, run),
            ],
        )
        self.remove_callback(PrinterCallback)
        for name, parameter in trainable_state(adapted.model).items():
            parameter.data = exact[name]  # undo TRL's cast to bfloat16, bit for bit
        self.model_accepts_loss_kwargs = True  # so that the labels of the whole accumulated batch are counted

    def set_num_steps(self, num_steps: int) -> None:
        """Set the optimizer steps of the run, before its first one."""
        self.args.max_steps = num_steps
        self.schedule = self._step_end.schedule = self.clock.schedule = replace(self.schedule, total_steps=num_steps)

    def forget_steps(self) -> None:
        """Forget the optimizer, and what `compute_gradients` and `evaluate` collected outside of training."""
        self.optimizer, self._micro_rows, self._metric_means = None, [], MetricMeans()

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Return the optimizer.

        bitsandbytes stores which parameters have 32-bit state by their index, in a global that every later optimizer reads.
        """
        GlobalOptimManager.get_instance().initialize()
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LambdaLR:
        """Return the learning-rate schedule; it is made once."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_lr_scheduler(
                self.args.lr_scheduler_type,
                optimizer or self.optimizer,
                num_warmup_steps=self.args.get_warmup_steps(num_training_steps),
                num_training_steps=num_training_steps,
            )
            self._created_lr_scheduler = True  # `train` replaces it
        return self.lr_scheduler

    # --- data and loss -----------------------------------------------------------------------------------------------

    def _make_batch_source(self, group_batch_size: int | None, has_fused_kernels: bool) -> BatchSource:
        config, loaded = self.config, self.adapted.loaded
        source = make_batch_source(
            self.examples.train, config, loaded.tokenizer.pad_token_id, loaded.device,
            group_batch_size=group_batch_size or config.train.per_device_train_batch_size,
        )  # fmt: skip
        if not isinstance(source, RowBatches):
            return source
        if config.data.packing:
            from qlora_train.training.parity.document_isolation import isolate_documents

            how = isolate_documents(self.adapted, config, source.rows)
            logger.debug("packing: documents are isolated (%s; checked on this model)", how)
        has_router_loss = self.aux_loss_weight > 0
        if has_fused_kernels:
            flattened = choose_padding_free(
                self.adapted, source, config, self.run,
                has_router_loss=has_router_loss, chunked_loss=self.loss_chunk_tokens is not None,
            )  # fmt: skip
            if flattened is not None:
                return flattened
        counts_padding = config.data.packing and has_router_loss
        return source.with_collator(FlatteningCollator(loaded.tokenizer.pad_token_id)) if counts_padding else source

    def _track_num_input_tokens(self, inputs: list[Batch]) -> None:
        """Count the tokens of the rows, without padding; a shared prefix counts in every row."""
        self.state.num_input_tokens_seen += self._step_tokens
        self._speed.count_labels(self._step_labels)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the optimizer steps, each a list of micro-batches."""
        return self.batch_source.loader(self)

    def training_step(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Compute the gradients of an optimizer step, and return its loss, a scalar; both are those of all ranks."""
        self._loss_before_step = self._tr_loss.clone()
        self._step_loss = self._sum_gradients(model, inputs, num_items_in_batch)
        return self._step_loss

    def compute_gradients(self, model: torch.nn.Module, inputs: list[Batch]) -> tuple[torch.Tensor, int]:
        """Compute the gradients of an optimizer step outside of training; return its loss, a scalar, and its tokens."""
        num_items = self._get_num_items_in_batch([inputs], self.args.device)
        return self._sum_gradients(model, inputs, num_items), self._step_tokens

    def _sum_gradients(
        self, model: torch.nn.Module, inputs: list[Batch], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        repeated = self._repeated_batches(inputs) if is_sharded(model) else []
        if self.objective.kl_sum is not None:
            assert num_items_in_batch is not None
            both = self.with_step_kl(model, [*inputs, *repeated], int(num_items_in_batch), num_repeated=len(repeated))
            inputs, repeated = both[: len(inputs)], both[len(inputs) :]
        losses = [super(QloraTrainer, self).training_step(model, batch, num_items_in_batch) for batch in inputs]
        self._join_other_ranks(model, repeated)
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=self.args.device)
        if self.accelerator.scaler is not None and not losses:
            self.accelerator.scaler.scale(
                loss
            )  # its first call makes the scale, by which gradients of others are divided
        return sum_gradients_(list(trainable_state(self.model).values()), loss)

    def with_step_kl(
        self, model: torch.nn.Module, batches: list[Batch], num_rows: int, *, num_repeated: int = 0
    ) -> list[Batch]:
        """Return the micro-batches of a step with the KL divergence that their losses read; see `step_kl`."""
        from qlora_train.training.step_kl import with_step_kl

        estimate = self.objective.kl_sum
        assert estimate is not None

        def kl_sum(batch: Batch) -> torch.Tensor:
            with self.compute_loss_context_manager():
                return estimate(model, self._prepare_inputs(batch), chunk_tokens=self.loss_chunk_tokens)

        return with_step_kl(batches, kl_sum, num_rows, self.args.device, num_repeated=num_repeated)

    def _repeated_batches(self, inputs: list[Batch]) -> list[Batch]:
        """Return a micro-batch as often as this rank has fewer than another: they gather the weights together."""
        missing = self._max_micro_batches - len(inputs)
        return [inputs[-1] if inputs else self.batch_source.any_batch()] * missing if missing else []

    def _join_other_ranks(self, model: torch.nn.Module, repeated: list[Batch]) -> None:
        """Run repeated micro-batches with weight 0."""
        for batch in repeated:
            with self.compute_loss_context_manager():
                loss = 0 * self.batch_loss(model, self._prepare_inputs(batch)).total
            self.accelerator.backward(loss)

    def _get_num_items_in_batch(self, batch_samples: list[list[Batch]], device: torch.device) -> Any:
        """Return the number of items of the optimizer step, over all its micro-batches on all ranks; keep other counts."""
        batches = [batch for step in batch_samples for batch in step]
        loss = self.objective.loss
        num_items, num_sft_tokens = sum(map(loss.num_items, batches)), sum(map(loss.num_sft_tokens, batches))
        num_tokens = sum(map(self.batch_source.num_tokens, batches))
        this = context()
        num_batches = [len(batches) if rank == this.rank else 0 for rank in range(this.world_size)]
        num_labels = sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)
        counts = [num_items, num_tokens, num_sft_tokens, num_labels]
        sums = this.sum_(torch.tensor([*counts, *num_batches])).tolist()
        num_items, self._step_tokens, self._step_sft_tokens, self._step_labels = sums[: len(counts)]
        self._max_micro_batches = max(sums[len(counts) :])
        return num_items

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """Move to the device what the model reads; losses need the rest on the host."""
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
        """Return a micro-batch's share of the loss of the accumulated batch, a scalar."""
        assert not return_outputs, "`evaluate` is overridden"
        assert num_items_in_batch is not None
        batch_loss = self.batch_loss(model, inputs)
        total, num_items = batch_loss.total, self.objective.loss.num_items(inputs)
        if batch_loss.aux_loss is not None:
            total = total + self.aux_loss_weight * batch_loss.aux_loss * num_items
            self._metric_means.add(ROUTER_AUX_LOSS, batch_loss.aux_loss, 1)
        if batch_loss.sft_nll is not None:
            self._metric_means.add(SFT_LOSS, batch_loss.sft_nll, self.objective.loss.num_sft_tokens(inputs))
        for name, metric in batch_loss.metrics.items():
            self._metric_means.add(name, metric, batch_loss.metric_counts.get(name, num_items))
        self._micro_rows.append(inputs["row"])
        return total / num_items_in_batch + batch_loss.sft_term(self._step_sft_tokens)

    def batch_loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> BatchLoss:
        """Return the objective's loss of a micro-batch."""
        with self._offloading.forward_pass(model) if self._offloading else nullcontext():
            return self.objective.loss(
                model, inputs, chunk_tokens=self.loss_chunk_tokens, with_aux_loss=self.aux_loss_weight > 0
            )

    # --- checks ------------------------------------------------------------------------------------------------------

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        """Return the gradient norm of an optimizer step, or None if the guard skips the step."""
        norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        assert self._step_loss is not None
        loss, self._step_loss = float(self._step_loss), None
        rows, self._micro_rows = self._micro_rows, []
        scaled = self.accelerator.scaler is not None
        if self.guard.allow(Step(self.state.global_step + 1, loss, norm, scaled, lambda: self._locations(rows))):
            self._metric_means.end_step()
            return norm
        self._metric_means.drop_step()
        model.zero_grad()  # without gradients an optimizer changes neither weights nor its state
        self._tr_loss = self._loss_before_step
        self._globalstep_last_logged += 1  # the next logged mean is over one step less
        return None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics, with the means of the objective's metrics and of the router loss, speed and memory."""
        if "loss" in logs:
            means = self._metric_means.take()
            logs.update(means | self.objective.derived(means) | self._speed.take(self.state.num_input_tokens_seen))
        super().log(logs, start_time)

    def _locations(self, rows: list[torch.Tensor]) -> str:
        """Name the first rows of a step, given this rank's; every rank calls it."""
        of_ranks = context().gather([row for batch in rows for row in batch.tolist()])
        indices = list(dict.fromkeys(row for of_rank in of_ranks for row in of_rank))  # a pair has two
        names = ", ".join(self.batch_source.location(index) for index in indices[:MAX_NAMED_ROWS])
        return names + " ..." * (len(indices) > MAX_NAMED_ROWS)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *_arguments: Any, **_keywords: Any) -> dict[str, float]:
        """Return and log the objective's metrics of all held-out rows, `eval_loss` among them."""
        with self.clock.evaluation():
            started = time.perf_counter()
            result = self.measure(self.examples.eval)
            if not math.isfinite(result["loss"]):
                raise TrainingError(
                    f"step {self.state.global_step}: eval_loss is {result['loss']}; lower train.learning_rate, or use "
                    "bfloat16 where the hardware has it (quantization.bnb_4bit_compute_dtype)"
                )
            metrics = {f"eval_{name}": value for name, value in result.items()}
            metrics["eval_runtime_seconds"] = time.perf_counter() - started
            self.log(metrics)
            self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, rows: Sequence[Example]) -> dict[str, float]:
        """Return the objective's metrics of rows."""
        return self.objective.evaluate(
            self.model,
            rows,
            batch_size=self.config.train.per_device_eval_batch_size,
            pad_token_id=self.adapted.loaded.tokenizer.pad_token_id,
        )


def _make_offloading(train: TrainSection, device: torch.device) -> "ActivationOffloading | None":
    if not train.activation_offloading:
        return None
    if device.type != "cuda":
        logger.warning("train.activation_offloading: has no effect on a CPU")
        return None
    from qlora_train.training.memory.activation_offloading import ActivationOffloading

    return ActivationOffloading(device)
