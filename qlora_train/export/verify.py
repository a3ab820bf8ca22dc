"""Prove a merge by measuring it: the merged model's held-out loss beside the adapter's.

The written files are what is measured, loaded as any user would load them.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM

from qlora_train.config.schema import QuantizationSection
from qlora_train.data.types import Example
from qlora_train.durable import staged_folder
from qlora_train.errors import MergeError
from qlora_train.evaluate import HeldOutLoss, held_out_loss
from qlora_train.export.merge import MergeBase, MergeReport, is_stored_in_4bit, merge_adapter

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeVerification:
    """Losses in nats a token on the same held-out rows."""

    adapter_loss: float
    merged_loss: float
    max_loss_increase: float

    @property
    def increase(self) -> float:
        """What the merge costs; negative when the merged model is better."""
        return self.merged_loss - self.adapter_loss


@dataclass(frozen=True)
class MergeRun:
    """What every candidate merge of a run shares; the fields are those of `merge_adapter`."""

    base_folder: Path
    adapter_folder: Path
    quantization: QuantizationSection
    dtype: torch.dtype
    max_shard_size: str = "5GB"
    load_dtype: torch.dtype | None = None
    model_config: Any = None
    device: str = "cpu"

    def merge(self, output: Path, merge_base: MergeBase) -> MergeReport:
        """Merge onto one kind of base."""
        return merge_adapter(
            self.base_folder,
            self.adapter_folder,
            output,
            merge_base=merge_base,
            quantization=self.quantization,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            load_dtype=self.load_dtype,
            model_config=self.model_config,
            device=self.device,
        )


@dataclass(frozen=True)
class MergeChoice:
    """The kept merge; `losses` are the measured ones by base kind, `verification` None without held-out rows."""

    report: MergeReport
    losses: dict[MergeBase, float]
    verification: MergeVerification | None


def merged_loss(
    merged: Path, examples: Sequence[Example], *, dtype: torch.dtype, device: str, batch_size: int
) -> HeldOutLoss:
    """Load a merged folder from disk and return its held-out loss."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=dtype, local_files_only=True, device_map={"": device})
    # Padding is masked everywhere, so that any id of the vocabulary will do.
    return held_out_loss(model, examples, batch_size=batch_size, pad_token_id=0)


def verify_merge(
    merged: Path,
    examples: Sequence[Example],
    adapter_loss: HeldOutLoss,
    *,
    max_loss_increase: float,
    dtype: torch.dtype,
    device: str,
    batch_size: int,
) -> MergeVerification:
    """Measure a merged folder against the adapter.

    Raises:
        MergeError: its loss exceeds the adapter's by more than the limit, or is not a number. The folder stays.
    """
    measured = merged_loss(merged, examples, dtype=dtype, device=device, batch_size=batch_size)
    verification = MergeVerification(adapter_loss.loss, measured.loss, max_loss_increase)
    _refuse_worse(verification, merged)
    return verification


def choose_merge_base(
    run: MergeRun,
    output: Path,
    *,
    merge_base: Literal["auto", "original", "dequantized"],
    examples: Sequence[Example],
    adapter_loss: HeldOutLoss | None,
    max_loss_increase: float,
    batch_size: int,
) -> MergeChoice:
    """Merge into `output`; for `auto` onto each base there is, keeping the one with the lower held-out loss.

    Candidates of `auto` are written beside `output` under hidden names, so that for a while two merges are on the disk.
    `output` appears, or a previous merge there is replaced, only when the loss is within the limit.

    Args:
        examples: held-out rows; without them nothing is measured and `auto` takes what was trained.
        adapter_loss: loss of the adapter on the same rows; None only without rows.

    Raises:
        MergeError: the merge is refused, or costs more than the limit; `output` is then as it was.
    """
    kinds = _candidates(run, merge_base, measured=bool(examples))
    if not examples:
        log.warning("merge: not verified, there are no held-out rows (data.eval)")
        return MergeChoice(run.merge(output, kinds[0]), {}, None)
    assert adapter_loss is not None, "held-out rows without the adapter's loss on them"
    folders = {kind: output.with_name(f".{output.name}.{kind}") for kind in kinds}
    try:
        reports, losses = {}, {}
        for kind, folder in folders.items():
            reports[kind] = run.merge(folder, kind)
            measured = merged_loss(folder, examples, dtype=run.dtype, device=run.device, batch_size=batch_size)
            losses[kind] = measured.loss
            log.info("merge onto %s: held-out loss %.4f, adapter %.4f", kind, measured.loss, adapter_loss.loss)
        best = min(kinds, key=lambda kind: (losses[kind] != losses[kind], losses[kind]))
        verification = MergeVerification(adapter_loss.loss, losses[best], max_loss_increase)
        _refuse_worse(verification, output)
        _move(folders[best], output)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    log.info("merge: kept %s", best)
    return MergeChoice(_at(reports[best], output), losses, verification)


def _candidates(run: MergeRun, merge_base: str, *, measured: bool) -> tuple[MergeBase, ...]:
    """Return the kinds of base to try, what was trained first, and log why."""
    if merge_base != "auto":
        return ("original",) if merge_base == "original" else ("dequantized",)
    if is_stored_in_4bit(run.base_folder):
        log.info("merge_base auto: dequantized (the base is stored in 4 bits, there are no original weights)")
        return ("dequantized",)
    if not run.quantization.load_in_4bit:
        log.info("merge_base auto: original (the run did not quantise)")
        return ("original",)
    if not measured:
        log.info("merge_base auto: dequantized (no held-out rows to compare with; it is what was trained)")
        return ("dequantized",)
    return ("dequantized", "original")


def _refuse_worse(verification: MergeVerification, where: Path) -> None:
    if verification.increase <= verification.max_loss_increase:
        return
    raise MergeError(
        f"{where}: held-out loss {verification.merged_loss:.4f} after merging and {verification.adapter_loss:.4f} with the "
        f"adapter, an increase of {verification.increase:.4f} nats a token where export.max_loss_increase allows "
        f"{verification.max_loss_increase:g}; try the other export.merge_base, use the adapter unmerged, or raise the limit"
    )


def _move(candidate: Path, output: Path) -> None:
    """Make a whole candidate folder the output; the staging folder's manifest replaces the candidate's."""
    with staged_folder(output) as staging:
        for path in candidate.iterdir():
            path.rename(staging / path.name)


def _at(report: MergeReport, output: Path) -> MergeReport:
    return MergeReport(**{**vars(report), "output": output})
