"""Decide whether to train padding-free: flatten each step's rows into one sequence and compute shared prefixes once.

A padded micro-batch must be small enough for the longest rows, so shorter rows leave most of its memory unused. A flattened
one (`FlatteningCollator`), where each row attends to itself only, holds as many rows as have the tokens and labels of the
largest padded one: a step needs fewer micro-batches and dequantizes weights less often, in the same memory.

Rows often begin alike: a chat template, a system prompt, a list of tools. In a decoder the hidden states, keys and values
of a shared prefix are the same in every row. They are computed once per micro-batch; their gradient is the sum over rows.

Loss and gradients match padded rows within rounding, which a parity check on the run's own rows shows before step 1.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn

from qlora_train.adapters import AdaptedModel
from qlora_train.config import RunConfig
from qlora_train.data.collate import Batch, FlatteningCollator, IndexedExample, PaddingCollator, flattened_multiple
from qlora_train.data.types import Example
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.kernels.packed.row_positions import PACKED_ATTENTION
from qlora_train.parallel import context
from qlora_train.runs import RunFolder, read_json, write_json
from qlora_train.training.batch_source import RowBatches
from qlora_train.training.memory.worst_case_batch import token_budget
from qlora_train.training.parity.gradients import TOLERANCES, Gradients, gradients_of
from qlora_train.training.parity.parity_check import ParityResult, check_parity, load_parity, save_parity
from qlora_train.utils.constants import GPU_TOKENS
from qlora_train.utils.errors import CheckpointError, ConfigError

logger = logging.getLogger(__name__)

NUM_BATCHES = 32
"""Micro-batches of the first epoch, in whole steps, from which the savings are estimated."""
MIN_SAVINGS = 0.05
"""Min share of tokens or micro-batches saved."""
SIZES = ((8, 128), (4, 128), (2, 128), (2, 32))
LOSS_SLACK = 2.0
"""Factor on the tolerance of the loss: with labels at half of the tokens it differed by up to 0.01 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Savings:
    """Micro-batches and tokens (padding included) of the first steps, as (padded, padding-free).

    Attributes:
        num_row_tokens: tokens of the rows of these steps, without padding or sharing.
    """

    num_batches: tuple[int, int]
    num_tokens: tuple[int, int]
    num_row_tokens: int
    num_steps: int

    @classmethod
    def of(cls, padded: RowBatches, flattened: RowBatches, num_steps: int) -> "Savings":
        """Compare the first steps, over all ranks."""
        counts = []
        for source in (padded, flattened):
            batches = [batch for step in islice(source.steps(), num_steps) for batch in source.collate(step)]
            num_row_tokens = sum(map(_num_row_tokens, batches))
            counts.append([len(batches), sum(batch["input_ids"].numel() for batch in batches), num_row_tokens])
        (before, tokens_before, num_row_tokens), (after, tokens_after, _) = (
            context().sum_(torch.tensor(counts)).tolist()
        )
        return cls((before, after), (tokens_before, tokens_after), num_row_tokens, num_steps)

    def are_enough(self) -> bool:
        """Return whether tokens or micro-batches are saved."""
        return any(after <= (1 - MIN_SAVINGS) * before for before, after in (self.num_batches, self.num_tokens))

    def __str__(self) -> str:
        before, after = (f"{number / self.num_steps:.3g}" for number in self.num_batches)
        change = self.num_tokens[1] / self.num_tokens[0] - 1
        tokens = f"{100 * abs(change):.0f} % {'more' if change > 0 else 'fewer'} tokens"
        shared = 1 - self.num_tokens[1] / self.num_row_tokens
        if shared >= MIN_SAVINGS:
            tokens += f", shared prefixes save {100 * shared:.0f} %"
        if after == before:
            return tokens
        return f"{tokens}, {after} micro-batch{'' if after == '1' else 'es'} per step instead of {before}"


def _num_row_tokens(batch: Batch) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.count_nonzero())


def choose_padding_free(
    adapted: AdaptedModel,
    padded: RowBatches,
    config: RunConfig,
    run: RunFolder,
    *,
    has_router_loss: bool,
    chunked_loss: bool,
) -> RowBatches | None:
    """Return a run's steps padding-free, or None to keep the batches of its settings.

    Sets the model's attention function to that of packed rows.

    Args:
        padded: the run's steps with the batches of the settings.
        has_router_loss: the run has a load-balancing loss, which counts tokens.
        chunked_loss: the run's loss is chunked.

    Raises:
        CheckpointError: the stored result is malformed, or the run began padding-free and cannot resume so.
    """
    reason = _unsupported_reason(adapted, config, has_router_loss, has_pairs=padded.rows.has_pairs)
    if reason:
        logger.info("padding-free: off (%s)", reason)
        return None
    run_id = run.metadata().get("run_id", "")
    parity = load_parity(run.padding_free_file, run_id)
    min_tokens = _initial_min_tokens(adapted, config) if parity is None else parity.min_tokens
    flattened = _flattened(adapted, padded, config, chunked_loss, min_tokens)
    num_steps = min(-(-NUM_BATCHES // config.train.gradient_accumulation_steps), padded.steps_per_epoch)
    savings = Savings.of(padded, flattened, num_steps)
    if parity is None and not savings.are_enough():
        logger.info("padding-free: off (%s)", savings)
        return None
    attention_before = adapted.loaded.model.config._attn_implementation
    problem = _isolation_problem(adapted, config, padded) if parity is None or parity.passed else ""
    if parity is None:
        failed = ParityResult(run_id, False, problem)
        parity = failed if problem else _check_parity(adapted, flattened, num_steps, run_id)
        raised = flattened.collate.budget != _flattened(adapted, padded, config, chunked_loss, 0).collate.budget
        save_parity(run.padding_free_file, replace(parity, min_tokens=min_tokens if raised and parity.passed else 0))
    elif problem:
        raise CheckpointError(
            f"{run.padding_free_file}: this run began padding-free, which fails here ({problem}); resume where it began, "
            "or delete the file to resume with padding"
        )
    if not parity.passed:
        adapted.loaded.model.set_attn_implementation(attention_before)
        logger.warning("padding-free: off (%s); please report this model", parity.problem)
        return None
    logger.info("padding-free: on (%s)", savings)
    return flattened


def _initial_min_tokens(adapted: AdaptedModel, config: RunConfig) -> int:
    # what fits depends on other processes, and reruns would round differently
    return 0 if config.run.deterministic else min_tokens_on(adapted.loaded.device)


def min_tokens_on(device: torch.device) -> int:
    """Return the token budget on a device if that of the settings is smaller; 0: always that of the settings."""
    return GPU_TOKENS if device.type == "cuda" else 0


def has_raised_budget(run: RunFolder) -> bool:
    """Return whether a run's token budget is larger than that of its settings."""
    return bool(read_json(run.padding_free_file).get("min_tokens"))


def lower_token_budget(run: RunFolder, reason: str) -> bool:
    """Reduce a run's token budget to that of its settings; return False if it is that already. No collective."""
    if not has_raised_budget(run):
        return False
    logger.debug("padding-free: token budget lowered to that of the settings (%s)", reason)
    write_json(run.padding_free_file, {**read_json(run.padding_free_file), "min_tokens": 0})
    return True


def _flattened(
    adapted: AdaptedModel, padded: RowBatches, config: RunConfig, chunked_loss: bool, min_tokens: int
) -> RowBatches:
    loaded = adapted.loaded
    # dropout of a shared prefix would be the same for all rows that share it
    share_prefixes = config.lora.lora_dropout == 0
    collate = FlatteningCollator(loaded.tokenizer.pad_token_id, flattened_multiple(loaded.device), share_prefixes)
    if config.data.packing:
        return padded.with_collator(collate)  # packs are full
    budget = token_budget(padded.rows, config, chunked_loss=chunked_loss, min_tokens=min_tokens)
    return padded.with_collator(collate, budget)


def _unsupported_reason(adapted: AdaptedModel, config: RunConfig, has_router_loss: bool, *, has_pairs: bool) -> str:
    """Return why a run cannot be padding-free; empty if it may be."""
    model, train = adapted.loaded.model, config.train
    attn_implementation = model.config._attn_implementation
    if not train.padding_free:
        return "train.padding_free: false"
    if has_router_loss:
        return "the router loss counts every token of every row"
    if train.neftune_noise_alpha or _has_dropout(adapted.model):
        return "NEFTune or the model's own dropout"
    if config.data.packing:
        return "" if attn_implementation == PACKED_ATTENTION else f"attention is {attn_implementation}"
    if train.per_device_train_batch_size * train.gradient_accumulation_steps == 1 and not has_pairs:
        return "a step is one row"
    if adapted.loaded.architecture.packing_error:
        return f"flattened rows would attend to each other: {adapted.loaded.architecture.packing_error}"
    if config.model.attn_implementation == "eager" or attn_implementation not in ("sdpa", PACKED_ATTENTION):
        return f"attention is {attn_implementation}"
    return ""


def _has_dropout(model: Any) -> bool:
    with lora_dropout_off(model.modules()):
        modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))


def _isolation_problem(adapted: AdaptedModel, config: RunConfig, source: RowBatches) -> str:
    """Let flattened rows attend to themselves only; return why they cannot on some rank, or an empty string."""
    problems = context().gather(_isolation_problem_of_this_rank(adapted, config, source))
    return next(filter(None, problems), "")


def _isolation_problem_of_this_rank(adapted: AdaptedModel, config: RunConfig, source: RowBatches) -> str:
    if config.data.packing:
        return ""  # done
    from qlora_train.training.parity.document_isolation import isolate_documents

    try:
        isolate_documents(adapted, config, source.rows)
    except ConfigError:  # its message is about packing
        return "flattened rows attend to each other on this model"
    name = adapted.loaded.model.config._attn_implementation
    return "" if name == PACKED_ATTENTION else f"attention stays {name}"


def _check_parity(adapted: AdaptedModel, flattened: RowBatches, num_steps: int, run_id: str) -> ParityResult:
    """Compare padded and flattened rows; rows with a shared prefix are preferred."""
    assert isinstance(flattened.collate.collate, FlatteningCollator)
    flatten = FlatteningCollator(share_prefixes=flattened.collate.collate.share_prefixes)
    groups = [rows for step in islice(flattened.steps(), num_steps) for rows in flattened.collate.grouped(step)]
    device = adapted.loaded.device

    def gradients(batch: Any) -> Gradients:
        return gradients_of(adapted, {name: tensor.to(device) for name, tensor in batch.items() if name != "row"})

    def compute(num_rows: int, num_tokens: int) -> tuple[Gradients, Gradients]:
        candidates = [rows for group in groups if (rows := _first_tokens(group[:num_rows], num_tokens))]
        rows = next((rows for rows in candidates if _shares_prefix(flatten, rows)), candidates[0])
        return gradients(PaddingCollator(0)(rows)), gradients(flatten(rows))

    tolerances = TOLERANCES[adapted.loaded.compute_dtype]
    tolerances = replace(tolerances, loss=LOSS_SLACK * tolerances.loss)
    return check_parity("padding-free", adapted, run_id, SIZES, compute, tolerances)


def _shares_prefix(flatten: FlatteningCollator, rows: Sequence[IndexedExample]) -> bool:
    return flatten(rows)["input_ids"].numel() != sum(len(example.input_ids) for _, example in rows)


def _first_tokens(batch: Sequence[IndexedExample], num_tokens: int) -> list[IndexedExample]:
    """Return the first tokens of the rows' sequences, the last half of them with labels."""

    def cut(row: Example) -> Example:
        tokens = row.input_ids[:num_tokens]
        mask = np.arange(len(tokens)) >= max(1, len(tokens) // 2)
        return replace(row, input_ids=tokens, loss_mask=mask, rejected=None)

    sequences = ((index, sequence) for index, row in batch for sequence in row.sequences)
    return [(index, cut(sequence)) for index, sequence in sequences if len(sequence.input_ids) > 1]
