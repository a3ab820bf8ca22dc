"""Reference log-probabilities of a run's rows: computed once, before step 1, and stored.

Training rows are computed in the micro-batches of the first epoch, by the kernels of training without gradients. Before
step 1 the model is its own reference, so the first rewards are exactly 0. Held-out rows are computed as in evaluation.

The run folder has the values, so that a resumed run trains with the same numbers; the cache of tokenised data has them for
later runs. Neither is used unless its fingerprint agrees, and unless a micro-batch computed on the fly does.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft.tuners.lora import LoraLayer

from qlora_train.adapters import trainable_state
from qlora_train.adapters.reference_model import base_model
from qlora_train.config import RunConfig
from qlora_train.data.collate import Batch
from qlora_train.data.token_cache import StoreCache
from qlora_train.data.token_store import Rows
from qlora_train.data.types import LogpArray
from qlora_train.evaluation.reference_pass import compute_reference_logps, join_ranks, set_values
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.kernels.fused_mode import fused_without_gradients
from qlora_train.objectives.batch_loss import model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.reference_logps import Reference, reference_logps, sequence_logps
from qlora_train.parallel import context
from qlora_train.parallel.shared_stop import shared_stop
from qlora_train.runs import RunFolder
from qlora_train.runs.reference_files import RunLogps, UnusableLogpsError, load_logps, save_logps, write_logps
from qlora_train.training.batch_source import RowBatches
from qlora_train.training.memory.auto_batch_size import record_fallback
from qlora_train.training.parity.preserve_state import preserve_model_state
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils import signals
from qlora_train.utils.errors import DataError, TrainingError
from qlora_train.utils.eval_mode import eval_mode
from qlora_train.utils.run_events import progress, stage

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise it when the values change for the same fingerprint."""
MAX_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
"""Mean difference of stored values from those computed on the fly, in nats per label token, by compute dtype."""
ROUNDING_SETTINGS = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size", "group_by_length",
    "fused_kernels", "padding_free", "gradient_checkpointing",
)  # fmt: skip


def store_reference_logps(trainer: QloraTrainer, config: RunConfig, run: RunFolder) -> float:
    """Give the rows of a run their reference log-probabilities, and return the seconds that it took.

    The model must be as before step 1.

    Rows without them are computed for each micro-batch: if the objective has no reference, if the config asks for it, if
    the rows of the run are not known, or if the model at its start is not the reference.

    Raises:
        TrainingError: out of memory, or a value that is not finite.
        Stop: a signal asked the process to stop; nothing is stored.
    """
    reference = trainer.objective.reference
    if reference is None:
        return 0.0
    is_known = isinstance(trainer.batch_source, RowBatches) and config.train.minutes is None
    if config.train.precompute_ref_log_probs is False or not is_known:
        logger.debug("reference: log-probabilities are computed for each micro-batch")
        return 0.0
    started = time.perf_counter()
    with stage("reference"), record_fallback(trainer, config, run, "reference log-probabilities"):
        model = trainer.accelerator.prepare_model(trainer.model)
        with preserve_model_state(model):
            _StoredReference(trainer, config, run, reference, model).use()
    return time.perf_counter() - started


class _StoredReference:
    """The values of one run."""

    def __init__(
        self, trainer: QloraTrainer, config: RunConfig, run: RunFolder, reference: Reference, model: Any
    ) -> None:
        assert isinstance(trainer.batch_source, RowBatches)
        self._trainer, self._config, self._run, self._reference = trainer, config, run, reference
        self._model, self._source = model, trainer.batch_source
        self._num_steps = min(trainer.schedule.total_steps, self._source.steps_per_epoch)
        self._needed = self._source.are_trained(self._num_steps)
        self._num_sequences = 2 if self._source.rows.has_pairs else 1
        self._fingerprint = _fingerprint(trainer, config, run, reference)
        self._cache = StoreCache(config.data.cache_dir, config.data.cache_limit)
        self._key = _cache_key(self._fingerprint, trainer, config, run, self._num_steps)

    def use(self) -> None:
        """Set the values of all rows: those of the run folder, those of the cache, or new ones."""
        started = time.perf_counter()
        sources = (self._load_from_run, "stored by this run"), (self._load_from_cache, "stored by an earlier run")
        for load, origin in sources:
            logps: RunLogps | None = context().broadcast(load() if context().is_main else None)
            if logps is not None and self._agrees(logps, origin):
                break
        else:
            logps, origin = self._compute(), "stored"
            if not self._agrees(logps, "of the model as it is"):
                logger.warning("reference: log-probabilities are computed for each micro-batch")
                return
        if context().is_main:
            self._save(logps, origin)
        logger.info(
            "reference: %s sequences, %.0f s (%s)", f"{logps.num_sequences:,}", time.perf_counter() - started, origin
        )  # fmt: skip

    def _load_from_run(self) -> RunLogps | None:
        folder = self._run.reference_logps
        return self._load(partial(load_logps, folder, fingerprint=self._fingerprint)) if folder.exists() else None

    def _load_from_cache(self) -> RunLogps | None:
        folder = self._cache.folder / self._key
        logps = self._load(partial(load_logps, folder)) if folder.exists() else None
        if logps is not None:
            with contextlib.suppress(OSError):  # a cache that is read-only, or has just lost the folder
                os.utime(folder)  # the cache deletes the least recently used folders
        return logps

    def _load(self, load: Callable[..., RunLogps]) -> RunLogps | None:
        try:
            return load(needed=self._needed, eval_shape=(len(self._trainer.examples.eval), self._num_sequences))
        except UnusableLogpsError as error:
            logger.warning("reference: stored log-probabilities are not used (%s)", error)
            return None

    def _agrees(self, logps: RunLogps, origin: str) -> bool:
        """Set values, and compare those of a micro-batch with a reference pass; unless they agree, set none.

        It costs a forward pass, and finds what no fingerprint does: weights changed where they are not sampled.
        """
        rows, held_out, trainer = self._source.rows, self._trainer.examples.eval, self._trainer
        rows.reference_logps, held_out.reference_logps = logps.train, logps.eval
        batch = trainer._prepare_inputs(self._source.any_batch())
        stored = batch["reference_logps"]
        inputs = {name: tensor for name, tensor in batch.items() if name != "reference_logps"}
        with trainer.compute_loss_context_manager():
            expected = reference_logps(self._model, inputs, self._reference, chunk_tokens=trainer.loss_chunk_tokens)
        per_label = ((expected.cpu() - stored.cpu()).abs() / batch["num_labels"].clamp(min=1)).mean()
        limit = MAX_DIFFERENCE[trainer.adapted.loaded.compute_dtype]
        difference = max(context().gather(float(per_label)))
        if difference <= limit:
            return True
        logger.warning(
            "reference: log-probabilities %s differ by %.2g nats per token from a reference pass: not used",
            origin, difference,
        )  # fmt: skip
        rows.reference_logps = held_out.reference_logps = None
        return False

    def _save(self, logps: RunLogps, origin: str) -> None:
        if origin != "stored by this run":
            save_logps(self._run.reference_logps, logps, self._fingerprint)
        if origin == "stored":
            try:
                self._cache.get(self._key, lambda folder: write_logps(folder, logps), lambda folder: folder)
            except DataError as error:  # the run has its own copy
                logger.debug("reference: not cached (%s)", error)

    # --- computation --------------------------------------------------------------------------------------------------

    def _compute(self) -> RunLogps:
        trainer, held_out = self._trainer, self._trainer.examples.eval
        train = self._compute_training_rows()
        of_eval = np.empty((0, self._num_sequences), np.float32)
        if held_out:
            with trainer.accelerator.autocast():  # as inside the training loop
                of_eval = compute_reference_logps(
                    trainer.model, self._reference, held_out, batch_size=self._config.train.per_device_eval_batch_size,
                    pad_token_id=trainer.adapted.loaded.tokenizer.pad_token_id, task="reference, held-out rows",
                )  # fmt: skip
        _check_finite(train, self._source.rows, np.flatnonzero(self._needed))
        _check_finite(of_eval, held_out, np.arange(len(held_out)))
        return RunLogps(train, of_eval)

    def _compute_training_rows(self) -> LogpArray:
        """Compute this rank's micro-batches of the first epoch; return the values of all ranks."""
        rows, this = self._source.dataset(), context()
        values = np.full((len(self._needed), self._num_sequences), np.nan, np.float32)
        with eval_mode(self._model), progress("reference", int(self._needed.sum()), "rows") as counter:
            for step in islice(self._source.epoch_steps(0), self._num_steps):
                if shared_stop():
                    signals.raise_if_requested()
                batches = self._source.collate([rows[items] for items in step])
                # all ranks gather sharded weights together, in as many forward passes
                num_passes = max(this.gather(len(batches))) if is_sharded(self._model) else len(batches)
                for batch in batches:
                    set_values(values, batch, self._logps(batch))
                for _ in range(num_passes - len(batches)):
                    self._logps(self._source.any_batch())
                counter.advance(this.world_size * sum(map(len, step)))
        return join_ranks(values)

    def _logps(self, batch: Batch) -> torch.Tensor:
        """Return the log-probability of each sequence by the model as it is, bitwise that of the first step."""
        inputs: dict[str, Any] = model_inputs(self._trainer._prepare_inputs(batch))
        with self._trainer.compute_loss_context_manager(), fused_without_gradients():
            losses = label_losses(self._model, self._trainer.loss_chunk_tokens, **inputs)
        return sequence_logps(losses.nll, batch)


def _check_finite(values: LogpArray, rows: Rows, indices: npt.NDArray[np.int64]) -> None:
    wrong = indices[~np.isfinite(values[indices]).all(axis=1)]
    if len(wrong):
        raise TrainingError(
            f"{rows[int(wrong[0])].where}: its log-probability under the reference model is not finite; use bfloat16 where "
            "the hardware has it (quantization.bnb_4bit_compute_dtype), or remove the row"
        )


# --- fingerprints -----------------------------------------------------------------------------------------------------


def _fingerprint(trainer: QloraTrainer, config: RunConfig, run: RunFolder, reference: Reference) -> dict[str, Any]:
    """Return what determines the values, except for rounding."""
    metadata, loaded = run.metadata(), trainer.adapted.loaded
    return {
        "version": VERSION,
        "base": metadata["base_identity"],
        "data": metadata["data_fingerprint"],
        "model settings": config.model.model_dump(mode="json", exclude={"model_name_or_path", "revision"}),
        "quantization": config.quantization.model_dump(mode="json"),
        "compute dtype": str(loaded.compute_dtype).removeprefix("torch."),
        "adapter": None if reference is base_model else _adapter_hash(trainer.model),
    }


def _adapter_hash(model: Any) -> str:
    """Return a hash of the adapter as it is: every trained tensor, and the scale of each layer."""
    digest = hashlib.sha256()
    for name, parameter in sorted(trainable_state(model).items()):
        tensor = parameter.detach().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    scales = [(name, layer.scaling) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    digest.update(repr(sorted(scales, key=lambda each: each[0])).encode())
    return digest.hexdigest()


def _cache_key(
    fingerprint: dict[str, Any], trainer: QloraTrainer, config: RunConfig, run: RunFolder, num_steps: int
) -> str:
    """Return a hash of the fingerprint and of what determines rounding, so that cached values are bitwise new ones."""
    metadata = run.metadata()
    content = {
        **fingerprint,
        "metadata": {name: metadata.get(name) for name in ("device", "num_threads", "world_size", "versions")},
        "train": {name: getattr(config.train, name) for name in ROUNDING_SETTINGS},
        "lora": config.lora.model_dump(mode="json", exclude={"adapter_path"}),
        "run": [config.run.seed, config.run.deterministic, config.parallel.strategy, num_steps],
        "collate": repr(trainer.batch_source.collate) if isinstance(trainer.batch_source, RowBatches) else None,
        "chunk_tokens": trainer.loss_chunk_tokens,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
