"""Whether a run computes what the rows of a micro-batch begin with once.

A chat template puts the same tokens in front of every conversation, and a system prompt or a list of tools is often that of
the whole data set. A decoder computes the same of them in each row. Laid into one row (`data.batches.PackCollator`), rows
need such a prefix once: its hidden states, keys and values are read by all, and its gradient is the sum over all. Loss and
gradients stay what they are, but for rounding, which a comparison on the run's own rows shows before the first step. The
verdict is kept in the run's folder, so that a run that goes on computes as it began.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch import nn

from qlora_train import durable
from qlora_train.adapter import AdaptedModel
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data.batches import Collator, NumberedExample, PackCollator
from qlora_train.data.types import Example
from qlora_train.device import free_memory
from qlora_train.errors import CheckpointError, ConfigError, first_line
from qlora_train.kernels import document_attention
from qlora_train.trainer.feed import RowFeed
from qlora_train.trainer.gradients import BOUNDS, difference, gradients_of
from qlora_train.trainer.isolation import isolate_documents

logger = logging.getLogger(__name__)

NUM_BATCHES = 32
"""Micro-batches of the first epoch that tell what sharing saves."""
LEAST_SAVED = 0.05
"""Share of the tokens from which on it is done."""
NUM_ROWS, ROW_TOKENS = 8, 128
"""Most rows of the comparison, and the most tokens of each."""
LOSS_SLACK = 2.0
"""By how much more the mean loss may differ than in the comparison of the fast path, where every token has a label: that of
half as many differed by up to 0.01 in bfloat16."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a run found: whether it shares prefixes, and why not."""

    run_id: str
    on: bool
    problem: str = ""


def choose_prefix_sharing(
    adapted: AdaptedModel, feed: RowFeed, config: RunConfig, run: RunFolder, *, balances: bool
) -> bool:
    """Say whether the rows of a micro-batch are laid into one row that holds what they begin with once.

    Where they are and the config does not pack, the model's attention is set to that of packs.

    Args:
        adapted: the model.
        feed: the run's micro-batches.
        config: the run's settings.
        run: remembers the verdict.
        balances: the run has a load-balancing loss, which counts tokens.

    Raises:
        CheckpointError: the verdict of this run cannot be read, or the run began with shared prefixes and cannot go on so.
    """
    obstacle = _obstacle(adapted, config, balances)
    if obstacle:
        logger.info("shared prefixes: each row computes its own (%s)", obstacle)
        return False
    batches = list(islice(feed.batches(), NUM_BATCHES))
    saved = _saved(batches, packs=config.data.packing)
    if saved < LEAST_SAVED:
        logger.info("shared prefixes: each row computes its own (sharing saves %.0f %% of the tokens)", 100 * saved)
        return False
    run_id = run.facts().get("run_id", "")
    verdict = _known_verdict(run, run_id)
    before = adapted.loaded.model.config._attn_implementation
    if verdict is None:
        problem = _isolate(adapted, config, feed) or _compare(adapted, batches)
        verdict = Verdict(run_id, not problem, problem)
        run.path.mkdir(parents=True, exist_ok=True)
        durable.write_text(run.prefixes_file, json.dumps(asdict(verdict), indent=2) + "\n")
    elif verdict.on and (problem := _isolate(adapted, config, feed)):
        raise CheckpointError(
            f"{run.prefixes_file}: this run began with shared prefixes, which fail here ({problem}); go on where it began, "
            "or delete the file to go on without"
        )
    if not verdict.on:
        adapted.loaded.model.set_attn_implementation(before)
        logger.warning("shared prefixes: OFF, each row computes its own: %s; please report this model", verdict.problem)
        return False
    logger.info("shared prefixes: computed once in a micro-batch, and nothing padded, which saves %.0f %% of its tokens",
                100 * saved)  # fmt: skip
    return True


def _obstacle(adapted: AdaptedModel, config: RunConfig, balances: bool) -> str:
    """Return why a run does not try, empty where it does."""
    model, train = adapted.loaded.model, config.train
    if not train.share_prefixes:
        return "train.share_prefixes: false"
    if balances:
        return "the load-balancing loss counts them in every row"
    if train.neftune_noise_alpha or _has_dropout(adapted.model):
        return "dropout and noise differ from row to row"
    if config.data.packing:
        packs = model.config._attn_implementation == document_attention.NAME
        return "" if packs else f"attention is {model.config._attn_implementation}"
    if train.per_device_train_batch_size == 1:
        return "a micro-batch is one row"
    if adapted.loaded.architecture.packing_obstacle:
        return f"rows in one would see each other: {adapted.loaded.architecture.packing_obstacle}"
    if config.model.attn_implementation == "eager" or model.config._attn_implementation not in (
        "sdpa",
        document_attention.NAME,
    ):
        return f"attention is {model.config._attn_implementation}"
    return ""


def _has_dropout(model: Any) -> bool:
    modules = any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))


def _saved(batches: Sequence[Sequence[NumberedExample]], *, packs: bool) -> float:
    """Return the share of the tokens of micro-batches, padding included where they are not packs, that sharing saves."""
    collate = PackCollator(shares=True)
    lengths = [[len(example.input_ids) for _, example in batch] for batch in batches]
    whole = sum(sum(each) if packs else len(each) * max(each) for each in lengths)
    return 1 - sum(collate(batch)["input_ids"].numel() for batch in batches) / whole


def _known_verdict(run: RunFolder, run_id: str) -> Verdict | None:
    content = run.prefixes()
    try:
        verdict = Verdict(**content) if content else None
    except TypeError:
        raise CheckpointError(f"{run.prefixes_file}: is not as it was written; restore it, or delete it") from None
    return verdict if verdict is not None and verdict.run_id == run_id else None


def _isolate(adapted: AdaptedModel, config: RunConfig, feed: RowFeed) -> str:
    """Let rows in one row attend to themselves alone, and return why they cannot; empty where they do."""
    if config.data.packing:
        return ""  # done
    try:
        isolate_documents(adapted, config, feed.rows)
    except ConfigError:  # which speaks of packing
        return "rows of one row see each other on this model"
    name = adapted.loaded.model.config._attn_implementation
    return "" if name == document_attention.NAME else f"attention stays {name}"


def _compare(adapted: AdaptedModel, batches: Sequence[Sequence[NumberedExample]]) -> str:
    """Compute a few rows in both ways, and return what is wrong; empty where they are the same."""
    collate = PackCollator(shares=True)
    candidates = [rows for batch in batches if (rows := _beginnings(batch))]
    rows = next((rows for rows in candidates if not _is_whole(collate, rows)), candidates[0])
    device = adapted.loaded.device

    def computed(made: Any) -> Any:
        return gradients_of(adapted, {name: tensor.to(device) for name, tensor in made.items() if name != "row"})

    try:
        found = difference(computed(Collator(0)(rows)), computed(collate(rows)))
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:  # out of memory included
        problem = f"it fails on this model ({first_line(error)})"
    else:
        bounds = BOUNDS[adapted.loaded.compute_dtype]
        if replace(bounds, loss=LOSS_SLACK * bounds.loss).hold(found):
            return ""
        return found.said()
    free_memory()  # only here, where nothing refers to the error's frames any more
    return problem


def _is_whole(collate: PackCollator, rows: Sequence[NumberedExample]) -> bool:
    return collate(rows)["input_ids"].numel() == sum(len(example.input_ids) for _, example in rows)


def _beginnings(batch: Sequence[NumberedExample]) -> list[NumberedExample]:
    """Return the first tokens of the first rows, the last half of them labels."""

    def cut(row: Example) -> Example:
        tokens = row.input_ids[:ROW_TOKENS]
        return replace(row, input_ids=tokens, loss_mask=np.arange(len(tokens)) >= max(1, len(tokens) // 2))

    return [(number, cut(row)) for number, row in batch[:NUM_ROWS] if len(row.input_ids) > 1]
