"""Prove a merge by measuring it: the merged model's held-out loss beside the adapter's.

The written files are what is measured, loaded as any user would load them.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig

from qlora_train.config.schema import QuantizationSection
from qlora_train.data.types import Example
from qlora_train.device import free_memory
from qlora_train.durable import STAGING, remove_folder, staged_folder
from qlora_train.errors import MergeError
from qlora_train.evaluate import HeldOutLoss, held_out_loss
from qlora_train.export.merge import MergeBase, MergeReport, is_stored_in_4bit, merge_adapter, refuse_places
from qlora_train.loader.towers import text_model

logger = logging.getLogger(__name__)


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
    trust_remote_code: bool = False

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
class MergeChoice:
    """The kept merge, and the measured losses by base kind: none without held-out rows."""

    report: MergeReport
    losses: dict[MergeBase, float]


Finish = Callable[[Path, MergeChoice], None]
"""Adds files to the kept merge while its folder is still a staging one."""


def choose_merge_base(
    run: MergeRun,
    output: Path,
    *,
    merge_base: Literal["auto", "original", "dequantized"],
    examples: Sequence[Example],
    adapter_loss: HeldOutLoss | None,
    max_loss_increase: float,
    batch_size: int,
    finish: Finish,
) -> MergeChoice:
    """Merge into `output`; for `auto` onto each base there is, keeping the one with the lower held-out loss.

    Candidates are written beside `output` under hidden names, so that for a while two merges of `auto` are on the disk.
    `output` appears, or a previous merge there is replaced, once the loss is within the limit and `finish` has run.

    Args:
        examples: held-out rows; without them nothing is measured and `auto` takes what was trained.
        adapter_loss: loss of the adapter on the same rows; None only without rows.
        finish: is called with the staging folder of the kept merge.

    Raises:
        MergeError: the merge is refused, or costs more than the limit; `output` is then as it was.
    """
    assert (adapter_loss is None) == (not examples), "the adapter's loss belongs to the held-out rows"
    refuse_places(run.base_folder, run.adapter_folder, output)
    kinds = _candidates(run, merge_base, measured=bool(examples))
    folders = {kind: output.with_name(f".{output.name}-{kind}{STAGING}") for kind in kinds}
    reports: dict[MergeBase, MergeReport] = {}
    losses: dict[MergeBase, float] = {}
    try:
        for kind, folder in folders.items():
            remove_folder(folder)  # a merge that was killed may have left it
            reports[kind] = run.merge(folder, kind)
            if examples:
                losses[kind] = _loss_of_files(folder, run, examples, batch_size)
        best = min(kinds, key=lambda kind: (math.isnan(losses[kind]), losses[kind])) if losses else kinds[0]
        if adapter_loss is None:
            logger.warning("merge: not verified, there are no held-out rows (data.eval)")
        else:
            _refuse_worse(output, losses[best], adapter_loss.loss, max_loss_increase)
        choice = MergeChoice(reports[best], losses)
        _move(folders[best], output, lambda staging: finish(staging, choice))
    finally:
        for folder in folders.values():
            remove_folder(folder)
    return choice


def load_merged(folder: Path, device: torch.device | str, *, trust_remote_code: bool = False) -> Any:
    """Load a merged folder from disk in the dtype it was written in, placed by `place_for`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    return text_model(config).model_class.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        device_map=place_for(folder, device),
        trust_remote_code=trust_remote_code,
    )


def place_for(folder: Path, device: torch.device | str) -> dict[str, torch.device] | Literal["auto"]:
    """Return the `device_map` to load a model folder with: the device, or what fits there and the rest in host memory.

    A model that was trained in 4 bits need not fit on the same device in 16.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {"": device}
    free_memory()
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if fits(weights_bytes, free_bytes):
        return {"": device}
    logger.warning(
        "%s: %.1f GB of weights do not fit in the %.1f GB free on %s; the rest stays in host memory, which is slow",
        folder.name, weights_bytes / 1e9, free_bytes / 1e9, device,
    )  # fmt: skip
    return "auto"


def fits(weights_bytes: int, free_bytes: int) -> bool:
    """Say whether weights leave enough of the free memory for the activations of an evaluation."""
    return weights_bytes <= 0.9 * free_bytes


def _loss_of_files(folder: Path, run: MergeRun, examples: Sequence[Example], batch_size: int) -> float:
    """Return the held-out loss of a merged folder; the model is gone from memory afterwards."""
    model = load_merged(folder, run.device, trust_remote_code=run.trust_remote_code)
    # Padding is masked everywhere, so that any id of the vocabulary will do.
    measured = held_out_loss(model, examples, batch_size=batch_size, pad_token_id=0)
    del model
    free_memory()
    return measured.loss


def _candidates(run: MergeRun, merge_base: str, *, measured: bool) -> tuple[MergeBase, ...]:
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
        return ("dequantized",), "no held-out rows to compare with; it is what was trained"
    return ("dequantized", "original"), ""


def _refuse_worse(where: Path, merged_loss: float, adapter_loss: float, max_loss_increase: float) -> None:
    increase = merged_loss - adapter_loss
    if increase <= max_loss_increase:  # false for a loss that is not a number
        return
    raise MergeError(
        f"{where}: held-out loss {merged_loss:.4f} after merging and {adapter_loss:.4f} with the adapter, an increase of "
        f"{increase:.4f} nats a token where export.max_loss_increase allows {max_loss_increase:g}; try the other "
        "export.merge_base, use the adapter unmerged, or raise the limit"
    )


def _move(candidate: Path, output: Path, finish: Callable[[Path], None]) -> None:
    """Make a whole candidate folder, finished, the output; the staging folder's manifest replaces the candidate's."""
    with staged_folder(output) as staging:
        for path in candidate.iterdir():
            path.rename(staging / path.name)
        finish(staging)
