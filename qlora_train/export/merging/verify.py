"""Prove a merge by measuring it: what the written files do, beside what the adapter does on its base.

The files are loaded in a fresh process, as any user would load them (`qlora_train.export.fresh_process`). The loss on
held-out rows says whether the merged model is as good. The divergence from the adapter's predictions says whether it is the
same model: a damaged tensor can leave the loss of a poor model as it was, or lower it. It is limited where nothing but
rounding to 16 bits lies between the two. On SmolLM2-135M that rounding is 0.001 nats a token and a zeroed matrix 0.015 to
7, but the step from 4-bit to original weights is 0.16: a merge onto those is another model by intent, judged by its loss
(benchmarks/results/divergence.txt).
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_train.config.schema import ExportSection, QuantizationSection
from qlora_train.export.fresh_process import ReloadCheck, check_in_fresh_process
from qlora_train.export.loading_code import THIS_MODEL, merged_code
from qlora_train.export.merging.check_budget import bounded_reference
from qlora_train.export.merging.merge import (
    MergeBase,
    MergeReport,
    check_output_folder,
    is_stored_in_4bit,
    merge_adapter,
)
from qlora_train.export.predictions import Reference
from qlora_train.utils.atomic_io import STAGING, atomic_folder, remove_folder
from qlora_train.utils.errors import MergeError

logger = logging.getLogger(__name__)

INSTEAD = "try the other export.merge_base, use the adapter unmerged, or raise the limit"


@dataclass(frozen=True)
class MergeSettings:
    """What every candidate merge of a run shares; the fields are those of `merge_adapter` and `merged_code`."""

    base_folder: Path
    adapter_folder: Path
    quantization: QuantizationSection
    dtype: torch.dtype | None
    max_shard_size: str = "5GB"
    load_dtype: torch.dtype | None = None
    model_config: Any = None
    device: str = "cpu"
    trust_remote_code: bool = False
    auto_class: str = "AutoModelForCausalLM"
    attention: str | None = None

    def loading_code(self, this: str = THIS_MODEL, device_map: str = "auto") -> str:
        """Return the lines of the card that load what was merged."""
        return merged_code(
            self.auto_class, attention=self.attention, trust_remote_code=self.trust_remote_code, this=this,
            device_map=device_map,
        )  # fmt: skip

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
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class MergeResult:
    """The kept merge, and what was measured of every candidate, by base kind, beside the adapter on the same rows."""

    reference: Reference
    report: MergeReport
    checks: dict[MergeBase, ReloadCheck]

    @property
    def losses(self) -> dict[MergeBase, float]:
        """Loss on the rows of the reference, by base kind."""
        return {kind: check.loss for kind, check in self.checks.items()}


Finish = Callable[[Path, MergeResult], None]
"""Adds files to the kept merge while its folder is still a staging one."""


def choose_merge_base(
    run: MergeSettings, output: Path, *, reference: Reference, export: ExportSection, batch_size: int, finish: Finish
) -> MergeResult:
    """Merge into `output`; for `auto` onto each base there is, keeping the one with the lower held-out loss.

    Candidates are written beside `output` under hidden names, so that for a while two merges of `auto` are on the disk.
    `output` appears, or a previous merge there is replaced, once what was measured is within the limits and `finish` has
    run.

    Args:
        reference: what the adapter does, on all rows; where they were not held out, `auto` takes what was trained.
        export: the base to merge onto, and the limits.
        batch_size: rows computed at a time.
        finish: is called with the staging folder of the kept merge.

    Raises:
        MergeError: the merge is refused, cannot be loaded, or is further from the adapter than the limits allow; `output`
            is then as it was.
    """
    check_output_folder(run.base_folder, run.adapter_folder, output)
    kinds = _candidates(run, export.merge_base, measured=reference.held_out)
    folders = {kind: output.with_name(f".{output.name}-{kind}{STAGING}") for kind in kinds}
    asked = output.with_name(f".{output.name}-reference{STAGING}")
    reports: dict[MergeBase, MergeReport] = {}
    checks: dict[MergeBase, ReloadCheck] = {}
    try:
        remove_folder(asked)  # a merge that was killed may have left it
        asked.mkdir()
        for kind, folder in folders.items():
            remove_folder(folder)
            reports[kind] = run.merge(folder, kind)
            if not checks:  # every candidate is as large, and is measured on the same rows
                reference = bounded_reference(reference, folder, run.device)
                reference.save(asked / "reference.safetensors")
            checks[kind] = check_in_fresh_process(
                output,
                run.loading_code(str(folder), "cpu" if run.device == "cpu" else "auto"),
                asked / "reference.safetensors",
                batch_size=batch_size,
                error=MergeError,
            )
            _refuse_other_tokens(output, checks[kind])
        best = min(kinds, key=lambda kind: (math.isnan(checks[kind].loss), checks[kind].loss))
        _refuse_worse(output, checks[best], reference, export)
        if best == "dequantized" or not run.quantization.load_in_4bit:
            _refuse_other(output, checks[best], export)
        choice = MergeResult(reference, reports[best], checks)
        _move(folders[best], output, lambda staging: finish(staging, choice))
    finally:
        for folder in (*folders.values(), asked):
            remove_folder(folder)
    return choice


def _candidates(run: MergeSettings, merge_base: str, *, measured: bool) -> tuple[MergeBase, ...]:
    """Return the kinds of base to try, what was trained first, and log why."""
    kinds, reason = candidate_bases(
        merge_base,
        stored_in_4bit=is_stored_in_4bit(run.base_folder),
        load_in_4bit=run.quantization.load_in_4bit,
        measured=measured,
    )
    if reason:
        logger.info("merge_base auto: %s (%s)", kinds[0], reason)
    return kinds


def candidate_bases(
    merge_base: str, *, stored_in_4bit: bool, load_in_4bit: bool, measured: bool
) -> tuple[tuple[MergeBase, ...], str]:
    """Return the kinds of base to try, what was trained first, and why `auto` tries one alone.

    Args:
        merge_base: the setting.
        stored_in_4bit: the base's files are in 4 bits.
        load_in_4bit: the run held it in 4 bits.
        measured: there are held-out rows to compare merges on.
    """
    if merge_base != "auto":
        return ("original" if merge_base == "original" else "dequantized",), ""
    if stored_in_4bit:
        return ("dequantized",), "the base is stored in 4 bits, there are no original weights"
    if not load_in_4bit:
        return ("original",), "the run did not quantise"
    if not measured:
        return ("dequantized",), "no held-out rows to compare bases on; it is what was trained"
    return ("dequantized", "original"), ""


def _refuse_other_tokens(where: Path, check: ReloadCheck) -> None:
    if check.token_differences:
        raise MergeError(
            f"{where}: the tokenizer of the merged model makes other tokens than the run trained on: "
            f"{check.token_differences[0]}; the merged model is not kept, use the adapter"
        )


def _refuse_worse(where: Path, check: ReloadCheck, reference: Reference, export: ExportSection) -> None:
    increase = check.loss - reference.loss
    if increase <= export.max_loss_increase:  # false for a loss that is not a number
        return
    raise MergeError(
        f"{where}: {'held-out' if reference.held_out else 'training'} loss {check.loss:.4f} after merging and "
        f"{reference.loss:.4f} with the adapter, an increase of {increase:.4f} nats a token where export.max_loss_increase "
        f"allows {export.max_loss_increase:g}; {INSTEAD}"
    )


def _refuse_other(where: Path, check: ReloadCheck, export: ExportSection) -> None:
    found = check.divergence
    if found.kl <= export.max_divergence:
        return
    raise MergeError(
        f"{where}: the merged model is another than the adapter on its base: its predictions are {found.kl:.4f} "
        f"nats a token (Kullback-Leibler) from the adapter's at {found.num_tokens} tokens, where export.max_divergence "
        f"allows {export.max_divergence:g}; {100 * found.top1_agreement:.1f} % of first choices are the same; {INSTEAD}"
    )


def _move(candidate: Path, output: Path, finish: Callable[[Path], None]) -> None:
    """Make a whole candidate folder, finished, the output; the staging folder's manifest replaces the candidate's."""
    with atomic_folder(output) as staging:
        for path in candidate.iterdir():
            path.rename(staging / path.name)
        finish(staging)
