"""Decide whether to train padding-free: flatten each step's rows into one sequence and compute shared prefixes once.

A micro-batch must be small enough for the longest row, so that shorter rows leave most of its memory unused. Flattened
(`FlatteningCollator`), where each row attends to itself only, a micro-batch holds as many rows as the largest one of
the settings has tokens and labels. A step then has fewer micro-batches and dequantizes weights less often, in the same
memory.

A chat template puts the same tokens in front of every conversation; a system prompt or a list of tools is often shared by
the whole data set. In a decoder their hidden states, keys and values are the same in every row. They are computed once per
micro-batch, and their gradient is the sum over the rows.

Loss and gradients match padded rows within rounding. A parity check on the run's own rows shows it before the first step.
The result is stored in the run folder, so that a resumed run computes in the same way.
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
from qlora_train.data.collate import FlatteningCollator, IndexedExample, PaddingCollator, flattened_multiple
from qlora_train.data.types import Example
from qlora_train.kernels.lora_dropout import lora_dropout_off
from qlora_train.kernels.packed import attention
from qlora_train.runs import RunFolder, read_json
from qlora_train.training.batch_source import RowBatches
from qlora_train.training.memory.worst_case_batch import token_budget
from qlora_train.training.parity.document_isolation import isolate_documents
from qlora_train.training.parity.gradients import (
    FAILURES,
    TOLERANCES,
    GradientDifference,
    compare_gradients,
    full_checkpointing,
    gradients_of,
    within_memory,
)
from qlora_train.training.parity.parity_result import ParityResult, load_parity, save_parity
from qlora_train.utils.errors import CheckpointError, ConfigError, first_line, nondeterministic_operation

logger = logging.getLogger(__name__)

GPU_TOKENS = 8192
"""Tokens of a micro-batch on a GPU: with 2,048 of a 7B, Python takes about as long to launch an H100's kernels as it to run
them (counted, not measured)."""
NUM_BATCHES = 32
"""Micro-batches of the first epoch, in whole steps, that tell what is saved."""
LEAST_SAVED = 0.05
"""Share of the tokens, or of the micro-batches, from which on it is done."""
SIZES = ((8, 128), (4, 128), (2, 128), (2, 32))
"""Most rows of the parity check and most tokens of each; the next size where memory runs out."""
LOSS_SLACK = 2.0
"""By how much more the mean loss may differ than in the comparison of the fast path, where every token has a label: that of
half as many differed by up to 0.01 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Savings:
    """What the first steps take in two ways.

    Attributes:
        num_batches: micro-batches, as the settings ask for them and as they are computed.
        num_tokens: tokens, padding included, in the same two ways.
        num_steps: that were looked at.
    """

    num_batches: tuple[int, int]
    num_tokens: tuple[int, int]
    num_steps: int

    @classmethod
    def of(cls, feed: RowBatches, laid_out: RowBatches, num_steps: int) -> "Savings":
        """Compare the first steps of a feed."""
        ways = []
        for each in (feed, laid_out):
            made = [batch for step in islice(each.steps(), num_steps) for batch in each.collate(step)]
            ways.append((len(made), sum(batch["input_ids"].numel() for batch in made)))
        (batches, tokens), (fewer_batches, fewer_tokens) = ways
        return cls((batches, fewer_batches), (tokens, fewer_tokens), num_steps)

    def is_worth_it(self) -> bool:
        """Say whether enough is saved."""
        return any(after <= (1 - LEAST_SAVED) * before for before, after in (self.num_batches, self.num_tokens))

    def __str__(self) -> str:
        before, after = (f"{number / self.num_steps:.3g}" for number in self.num_batches)
        change = self.num_tokens[1] / self.num_tokens[0] - 1
        tokens = f"{100 * abs(change):.0f} % {'more' if change > 0 else 'fewer'} tokens"
        return f"the {before} micro-batches of a step as {after}, with {tokens}"


def choose_padding_free(
    adapted: AdaptedModel, feed: RowBatches, config: RunConfig, run: RunFolder, *, balances: bool, in_chunks: bool
) -> RowBatches | None:
    """Return a run's steps padding-free, or None to keep the batches of its settings.

    If they are padding-free and the config does not pack, the model's attention becomes that of packed rows.

    Args:
        adapted: the model.
        feed: the run's steps as the settings ask for them.
        config: the run's settings.
        run: stores the result.
        balances: the run has a load-balancing loss, which counts tokens.
        in_chunks: its loss is chunked.

    Raises:
        CheckpointError: the stored result cannot be read, or the run began padding-free and cannot resume so.
    """
    obstacle = _obstacle(adapted, config, balances)
    if obstacle:
        logger.info("padding-free: off (%s)", obstacle)
        return None
    run_id = run.metadata().get("run_id", "")
    parity = load_parity(run.padding_free_file, read_json(run.padding_free_file), run_id)
    if parity is not None:
        min_tokens = parity.min_tokens
    else:  # what fits depends on other processes, and reruns would round differently
        min_tokens = 0 if config.run.deterministic else min_tokens_on(adapted.loaded.device)
    laid_out = _laid_out(adapted, feed, config, in_chunks, min_tokens)
    num_steps = min(-(-NUM_BATCHES // config.train.gradient_accumulation_steps), feed.steps_per_epoch)
    savings = Savings.of(feed, laid_out, num_steps)
    if parity is None and not savings.is_worth_it():
        logger.info("padding-free: off (it computes %s)", savings)
        return None
    before = adapted.loaded.model.config._attn_implementation
    if parity is None:
        problem = _isolate(adapted, config, feed)
        parity = ParityResult(run_id, False, problem) if problem else _compare(adapted, laid_out, num_steps, run_id)
        raised = laid_out.collate.budget != _laid_out(adapted, feed, config, in_chunks, 0).collate.budget
        save_parity(run.padding_free_file, replace(parity, min_tokens=min_tokens if raised and parity.on else 0))
    elif parity.on and (problem := _isolate(adapted, config, feed)):
        raise CheckpointError(
            f"{run.padding_free_file}: this run began with its rows end to end, which fails here ({problem}); go on where "
            "it began, or delete the file to go on without"
        )
    if not parity.on:
        adapted.loaded.model.set_attn_implementation(before)
        logger.warning("padding-free: OFF, rows are computed apart: %s; please report this model", parity.problem)
        return None
    logger.info("padding-free: ON, computes %s", savings)
    return laid_out


def min_tokens_on(device: torch.device) -> int:
    """Return the tokens that a micro-batch may hold on a device where the settings make fewer; 0: not more."""
    return GPU_TOKENS if device.type == "cuda" else 0


def lower_token_budget(run: RunFolder, reason: str) -> bool:
    """Let a run's micro-batches hold no more tokens than the settings' largest; False where they hold no more already."""
    content = read_json(run.padding_free_file)
    if not content.get("min_tokens"):
        return False
    logger.info("padding-free: micro-batches of the settings' size (%s)", reason)
    save_parity(run.padding_free_file, ParityResult(**{**content, "min_tokens": 0}))
    return True


def _laid_out(
    adapted: AdaptedModel, feed: RowBatches, config: RunConfig, in_chunks: bool, min_tokens: int
) -> RowBatches:
    loaded = adapted.loaded
    # dropout of a shared prefix would be the same for all rows that have it
    share_prefixes = config.lora.lora_dropout == 0
    collate = FlatteningCollator(loaded.tokenizer.pad_token_id, flattened_multiple(loaded.device), share_prefixes)
    if config.data.packing:
        return feed.laid_out(collate)  # packs are full
    return feed.laid_out(collate, token_budget(feed.rows, config, in_chunks=in_chunks, min_tokens=min_tokens))


def _obstacle(adapted: AdaptedModel, config: RunConfig, balances: bool) -> str:
    """Return why a run does not try, empty where it does."""
    model, train = adapted.loaded.model, config.train
    if not train.padding_free:
        return "train.padding_free: false"
    if balances:
        return "the load-balancing loss counts every token of every row"
    if train.neftune_noise_alpha or _has_dropout(adapted.model):
        return "NEFTune or the model's own dropout"
    if config.data.packing:
        packs = model.config._attn_implementation == attention.NAME
        return "" if packs else f"attention is {model.config._attn_implementation}"
    if train.per_device_train_batch_size * train.gradient_accumulation_steps == 1:
        return "a step is one row"
    if adapted.loaded.architecture.packing_error:
        return f"rows in one would see each other: {adapted.loaded.architecture.packing_error}"
    if config.model.attn_implementation == "eager" or model.config._attn_implementation not in (
        "sdpa",
        attention.NAME,
    ):
        return f"attention is {model.config._attn_implementation}"
    return ""


def _has_dropout(model: Any) -> bool:
    with lora_dropout_off(model.modules()):
        modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))


def _isolate(adapted: AdaptedModel, config: RunConfig, feed: RowBatches) -> str:
    """Let rows in one row attend to themselves alone, and return why they cannot; empty where they do."""
    if config.data.packing:
        return ""  # done
    try:
        isolate_documents(adapted, config, feed.rows)
    except ConfigError:  # which speaks of packing
        return "rows of one row see each other on this model"
    name = adapted.loaded.model.config._attn_implementation
    return "" if name == attention.NAME else f"attention stays {name}"


def _compare(adapted: AdaptedModel, laid_out: RowBatches, num_steps: int, run_id: str) -> ParityResult:
    """Compute a few rows in both ways, every layer recomputed."""
    assert isinstance(laid_out.collate.collate, FlatteningCollator)
    collate = FlatteningCollator(share_prefixes=laid_out.collate.collate.share_prefixes)
    groups = [rows for step in islice(laid_out.steps(), num_steps) for rows in laid_out.collate.grouped(step)]
    device = adapted.loaded.device

    def computed(made: Any) -> Any:
        return gradients_of(adapted, {name: tensor.to(device) for name, tensor in made.items() if name != "row"})

    def compared(num_rows: int, num_tokens: int) -> GradientDifference:
        candidates = [rows for group in groups if (rows := _beginnings(group[:num_rows], num_tokens))]
        rows = next((rows for rows in candidates if not _is_whole(collate, rows)), candidates[0])
        with full_checkpointing(adapted.loaded.model):
            return compare_gradients(computed(PaddingCollator(0)(rows)), computed(collate(rows)))

    try:
        found = within_memory("padding-free", SIZES, compared)
    except FAILURES as error:
        if nondeterministic_operation(error):
            raise
        return ParityResult(run_id, False, f"it fails on this model ({first_line(error)})")
    bounds = TOLERANCES[adapted.loaded.compute_dtype]
    return ParityResult.of(run_id, found, replace(bounds, loss=LOSS_SLACK * bounds.loss))


def _is_whole(collate: FlatteningCollator, rows: Sequence[IndexedExample]) -> bool:
    return collate(rows)["input_ids"].numel() == sum(len(example.input_ids) for _, example in rows)


def _beginnings(batch: Sequence[IndexedExample], num_tokens: int) -> list[IndexedExample]:
    """Return the first tokens of the rows, the last half of them labels."""

    def cut(row: Example) -> Example:
        tokens = row.input_ids[:num_tokens]
        return replace(row, input_ids=tokens, loss_mask=np.arange(len(tokens)) >= max(1, len(tokens) // 2))

    return [(number, cut(row)) for number, row in batch if len(row.input_ids) > 1]
